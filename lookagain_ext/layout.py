"""Where the visual tokens of a batch lie, at which rotary positions, and where its rows begin."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .visual import VisualContext


@dataclass(frozen=True)
class VisualLayout:
    """The visual tokens of a batch of sequences.

    Attributes:
        spans: int32 [B, S, 2], (first key index, length) of each run of visual tokens.
        num_visual: int32 [B], visual tokens of each row.
        max_visual: L_c, those of the largest row.
        first_position: int64 [B], rotary position at which the row's visual block begins.
        extent: int64 [B], rotary positions that the block takes: max - min + 1 over time, height
            and width; 0 without visual tokens.
        key_start: int32 [B], first key index that is not padding, or None when nothing is padded.
        grids: for each row, the (t, h, w) grids of its runs, in tokens.
    """

    spans: Tensor
    num_visual: Tensor
    max_visual: int
    first_position: Tensor
    extent: Tensor
    key_start: Tensor | None
    grids: list[list[tuple[int, int, int]]]

    def context(self, inv_freq: Tensor) -> VisualContext:
        """A visual context of these tokens, without re-injections."""
        return VisualContext.from_spans(self.spans, inv_freq)

    def pick(self, rows: list[int]) -> VisualLayout:
        """The layout of a batch whose row i is row `rows[i]` of this one."""
        picked = {
            name: getattr(self, name)[rows]
            for name in ("spans", "num_visual", "first_position", "extent")
        }
        start = None if self.key_start is None else self.key_start[rows]
        grids = [self.grids[row] for row in rows]
        return replace(self, **picked, key_start=start, grids=grids)


def visual_layout(
    input_ids: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None,
    visual_token_ids: tuple[int, ...],
) -> VisualLayout:
    """Find the visual tokens of a batch.

    Reads the batch on the host once: call it when a sequence begins, not at every step.

    Args:
        input_ids: int64 [B, L].
        position_ids: int64 [3 or 4, B, L]; the last three are time, height and width.
        attention_mask: [B, L], 0 on padding, or None.
        visual_token_ids: placeholder ids of images and videos.

    Raises:
        ValueError: if a mask has holes, or visual tokens carry plain text positions (the sign of
            missing `mm_token_type_ids`).
    """
    device = input_ids.device
    visual = torch.isin(input_ids, torch.tensor(visual_token_ids, device=device)).cpu()
    places = position_ids[-3:].cpu()
    runs = [_runs(row) for row in visual]
    spans = torch.zeros(len(runs), max(map(len, runs)), 2, dtype=torch.int32)
    first = torch.zeros(len(runs), dtype=torch.int64)
    extent = torch.zeros(len(runs), dtype=torch.int64)
    grids = []
    for row, found in enumerate(runs):
        if found:
            spans[row, : len(found)] = torch.tensor(found, dtype=torch.int32)
            taken = places[:, row, visual[row]]
            first[row] = taken.min()
            extent[row] = taken.max() - taken.min() + 1
        grids.append([_grid(places[:, row, at : at + count], row) for at, count in found])
    count = spans[..., 1].sum(-1, dtype=torch.int32)
    return VisualLayout(
        spans.to(device),
        count.to(device),
        int(count.max()),
        first.to(device),
        extent.to(device),
        key_starts(attention_mask),
        grids,
    )


def key_starts(attention_mask: Tensor | None) -> Tensor | None:
    """First key index of each row that is not padding; L for a row that is nothing else so far.

    Args:
        attention_mask: [B, L], 0 on padding, or None.

    Returns:
        int32 [B], or None when no row is padded on the left.

    Raises:
        ValueError: if the mask is not two-dimensional or has holes between tokens.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask must have shape [B, L], got {list(attention_mask.shape)}; "
            "look_again makes its own causal mask"
        )
    kept = attention_mask.bool()
    if bool(kept.all()):
        return None
    if bool((kept[:, :-1] <= kept[:, 1:]).all()):  # on the left only: soon told, at every step
        return kept.shape[1] - kept.sum(-1, dtype=torch.int32)
    first = kept.int().argmax(-1)
    last = kept.shape[1] - 1 - kept.flip(-1).int().argmax(-1)
    count = kept.sum(-1)
    first = torch.where(count > 0, first, kept.shape[1])
    if bool((count != (last - first + 1).clamp(min=0)).any()):
        raise ValueError(
            "attention_mask has holes: pad rows on one side only, and on the left where a cache "
            "is continued"
        )
    return first.to(torch.int32)


def cached_starts(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """As `key_starts`, of tokens that stay in a cache.

    Args:
        attention_mask: [B, L] or None, L at least `length`; the rest is not looked at.
        length: tokens in the cache when these are in it.

    Raises:
        ValueError: also if the mask does not reach over all of them, or a row is padded on the
            right: what comes next would be fed after its padding.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() == 2 and attention_mask.shape[1] < length:
        raise ValueError(
            "attention_mask must reach over the tokens in the cache and those that are fed, "
            f"[B, {length}], got {list(attention_mask.shape)}"
        )
    mask = attention_mask[..., :length]
    start = key_starts(mask)
    if start is not None and bool((mask.bool().any(-1) & ~mask[:, -1].bool()).any()):
        raise ValueError(
            "attention_mask pads rows on the right, and the cache would keep the padding between "
            "them and what follows: pad on the left (padding_side='left')"
        )
    return start


def check_step_mask(
    attention_mask: Tensor, past: int | None, key_start: Tensor | None, read: bool
) -> None:
    """Refuse a mask at a step that says something else of the cached tokens than is known of them.

    Args:
        attention_mask: [B, at least past + 1], 0 on padding.
        past: tokens in the cache, None where the host does not know.
        key_start: int32 [B], where rows begin; None: none is padded.
        read: whether the mask's values may be looked at.

    Raises:
        ValueError: if it has another form, holes, or other padding than the prompt had.
    """
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask must have shape [B, L] at a step, got {list(attention_mask.shape)}: "
            "look_again makes its own causal mask, and knows the padding from the prompt's"
        )
    if past is None or (attention_mask.shape[1] > past and not read):
        return
    if key_start is not None and attention_mask.shape[1] > past and read:
        real = torch.arange(past + 1, device=key_start.device) >= key_start[:, None]
        if torch.equal(attention_mask[:, : past + 1].bool(), real):
            return
    start = cached_starts(attention_mask, past + 1)
    if start is None and key_start is None:
        return
    start, key_start = (0 if x is None else x.to(attention_mask.device) for x in (start, key_start))
    if bool((start != key_start).any()):
        raise ValueError(
            "attention_mask begins rows at other tokens than at the prompt, which is not "
            "supported: give the prompt's mask with a 1 for each token that came since"
        )


def _runs(visual: Tensor) -> list[tuple[int, int]]:
    """(first index, length) of each run of True in a bool [L] on the host."""
    edges = torch.diff(visual.int(), prepend=torch.zeros(1, dtype=torch.int32))
    starts = (edges == 1).nonzero().flatten().tolist()
    ends = (edges == -1).nonzero().flatten().tolist()
    ends += [len(visual)] * (len(starts) - len(ends))
    return [(start, end - start) for start, end in zip(starts, ends, strict=True)]


def _grid(places: Tensor, row: int) -> tuple[int, int, int]:
    """Token grid of one run, read from its positions [3, n]; (n, 1, 1) if it is no grid."""
    count = places.shape[1]
    if count > 1 and bool((places[0] == places[1]).all() and (places[1] == places[2]).all()):
        raise ValueError(
            f"the visual tokens of row {row} have plain text positions: were mm_token_type_ids "
            "left out, or position_ids [B, L] given? Pass everything the processor returns, and "
            "position_ids, if any, as [4, B, L]: those of the text, then time, height and width."
        )
    height, width = ((places[axis].max() - places[axis].min() + 1).item() for axis in (1, 2))
    if count % (height * width):
        return (count, 1, 1)
    return (count // (height * width), height, width)
