"""Re-injection by the letter: visual embeddings go through the decoder again where they re-enter.

Keys and values are then computed in the context of the text so far, so this is another function
than seeing the cached ones again. It costs a forward of the visual tokens for each re-injection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .cache import CACHE, row_of
from .layout import VisualLayout
from .sequence import Sequence


def is_sharded(decoder: nn.Module) -> bool:
    """Whether parameters are spread over processes (ZeRO-3, FSDP, tensor parallelism).

    A forward that only some of the processes run then leaves the others waiting for ever.
    """
    kinds = ("DTensor", "FlatParameter")
    # FSDP with use_orig_params shows plain parameters and marks the modules.
    if any(getattr(module, "_is_fsdp_managed_module", False) for module in decoder.modules()):
        return True
    return any(hasattr(p, "ds_id") or type(p).__name__ in kinds for p in decoder.parameters())


class Reencoder:
    """The visual embeddings of a prompt, ready to go through the decoder again.

    Args:
        layout: the prompt's visual tokens.
        positions: int64 [3 or 4, B, L], the prompt's rotary positions.
        keywords: what the base model called the decoder with, for the whole prompt.
    """

    def __init__(self, layout: VisualLayout, positions: Tensor, keywords: dict[str, Any]) -> None:
        self.layout = layout
        embeddings = keywords["inputs_embeds"].detach()
        self.rows = [_indices(spans) for spans in layout.spans.tolist()]
        self.embeddings = [embeddings[b, keys] for b, keys in enumerate(self.rows)]
        self.positions = [positions[-3:, b, keys] for b, keys in enumerate(self.rows)]
        self.deepstack: list[tuple[Tensor, ...]] | None = None
        if keywords.get("deepstack_visual_embeds") is not None:
            counts = layout.num_visual.tolist()
            self.deepstack = [
                features.detach().split(counts) for features in keywords["deepstack_visual_embeds"]
            ]

    def pick(self, rows: list[int], layout: VisualLayout) -> None:
        """Let row i be what row `rows[i]` was; `layout` is picked already."""
        self.layout = layout
        self.rows = [self.rows[row] for row in rows]
        self.embeddings = [self.embeddings[row] for row in rows]
        self.positions = [self.positions[row] for row in rows]
        if self.deepstack is not None:
            self.deepstack = [tuple(features[row] for row in rows) for features in self.deepstack]

    @torch.no_grad()
    def write(
        self, decoder: nn.Module, cache: Cache, rows: Tensor, shift: Tensor, shown: Tensor
    ) -> None:
        """Append the visual tokens of some rows to their cache, re-encoded.

        Args:
            decoder: the text decoder. It is not kept: this lives on a cache, which may be copied.
            cache: a ragged one, written in place.
            rows: bool [B], the rows to write to.
            shift: int64 [B], rotary offset.
            shown: bool [B, L_c], the tokens to write.

        Raises:
            ValueError: under torch.compile.
        """
        if torch.compiler.is_compiling():
            raise ValueError(
                "backend='reencode' cannot be compiled: call generate with disable_compile=True"
            )
        for row in rows.nonzero().flatten().tolist():
            part = slice(row, row + 1)
            chosen = shown[row, : len(self.rows[row])]
            extra: dict[str, Any] = {}
            if self.deepstack is not None:
                extra["deepstack_visual_embeds"] = [f[row][chosen] for f in self.deepstack]
                extra["visual_pos_masks"] = chosen[chosen][None]
            if self.layout.key_start is not None:
                extra["key_start"] = self.layout.key_start[part]
            extra[CACHE] = row_of(cache, row)
            embeddings = self.embeddings[row][chosen][None]
            decoder(
                inputs_embeds=embeddings,
                position_ids=self.positions[row][:, None, chosen] + shift[row],
                use_cache=True,
                key_length=cache.layers[0].lengths[part] + embeddings.shape[1],
                **extra,
            )


@dataclass(frozen=True)
class Expansion:
    """Whole sequences with the visual tokens written out before each reflection.

    Attributes:
        source: int64 [B, E], original index of each token; padding repeats index 0.
        real: bool [B, E], False on padding at the end.
        kept: int64 [B, L], where each original token went.
        positions: int64 [3, B, E].
        spans: int32 [B, S, 2], runs of visual tokens, copies included.
        fold: int64 [B, W], original visual token number of each visual token in the spans.
        copies: for each row, the (first index, length) of each written block.
    """

    source: Tensor
    real: Tensor
    kept: Tensor
    positions: Tensor
    spans: Tensor
    fold: Tensor
    copies: list[list[tuple[int, int]]]

    @classmethod
    def of(cls, sequence: Sequence, selected: Tensor | None, count: int) -> Expansion:
        """Write out the first `count` re-injections of each row.

        Args:
            sequence: whole sequences with their reflections.
            selected: bool [B, N, L_c], the tokens of each; None writes all.
            count: columns to write out.
        """
        length = sequence.positions.shape[-1]
        index, shift = sequence.index.tolist(), sequence.shift.tolist()
        spans = sequence.layout.spans.tolist()
        shown = None if selected is None else selected.tolist()
        rows = [
            _expand_row(
                length,
                spans[b],
                [at for at in index[b][:count] if at >= 0],
                shift[b],
                None if shown is None else shown[b],
            )
            for b in range(len(index))
        ]
        device = sequence.index.device
        longest = max(len(row.source) for row in rows)
        most = max(len(row.spans) for row in rows)
        widest = max(len(row.fold) for row in rows)
        source, moved, fold = (
            torch.tensor([_filled(getattr(row, name), size) for row in rows], device=device)
            for name, size in (("source", longest), ("shift", longest), ("fold", widest))
        )
        copied = torch.tensor([_filled(row.copied, longest) for row in rows], device=device)
        ends = torch.tensor([len(row.source) for row in rows], device=device)
        runs = [row.spans + [(0, 0)] * (most - len(row.spans)) for row in rows]
        here = sequence.positions[-3:].gather(-1, source.expand(3, -1, -1))
        there = sequence.original[-3:].gather(-1, source.expand(3, -1, -1)) + moved
        return cls(
            source,
            torch.arange(longest, device=device) < ends[:, None],
            torch.tensor([row.kept for row in rows], device=device),
            torch.where(copied.bool(), there, here),
            torch.tensor(runs, dtype=torch.int32, device=device),
            fold,
            [row.copies for row in rows],
        )

    def inputs(self, keywords: dict[str, Any]) -> dict[str, Any]:
        """The decoder's keywords for the written-out sequences."""
        embeddings = keywords["inputs_embeds"]
        index = self.source[..., None].expand(-1, -1, embeddings.shape[-1])
        changed = {
            "inputs_embeds": embeddings.gather(1, index),
            "position_ids": self.positions,
            "attention_mask": None,
            "use_cache": False,
        }
        if keywords.get("deepstack_visual_embeds") is not None:
            mask = keywords["visual_pos_masks"]
            number = (mask.flatten().cumsum(0) - 1).view_as(mask).gather(1, self.source)
            mask = mask.gather(1, self.source) & self.real
            changed["visual_pos_masks"] = mask
            changed["deepstack_visual_embeds"] = [
                features[number[mask]] for features in keywords["deepstack_visual_embeds"]
            ]
        return {**keywords, **changed}

    def ranges(self, rows: Tensor) -> Tensor:
        """Ranges of original tokens as ranges of written-out ones, without the copies.

        Args:
            rows: int32 [B, 2].

        Returns:
            int32 [B, T, 2].
        """
        parts = []
        for row, (begin, end) in enumerate(rows.tolist()):
            if end <= begin:
                parts.append([])
                continue
            first, last = int(self.kept[row, begin]), int(self.kept[row, end - 1]) + 1
            inside = [(at, n) for at, n in self.copies[row] if first < at < last]
            edges = [first, *[edge for at, n in inside for edge in (at, at + n)], last]
            parts.append(list(zip(edges[::2], edges[1::2], strict=True)))
        most = max(1, max(map(len, parts)))
        padded = [part + [(0, 0)] * (most - len(part)) for part in parts]
        return torch.tensor(padded, dtype=torch.int32, device=rows.device)

    def restore(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, E, H] at the original tokens, [B, L, H]."""
        return hidden.gather(1, self.kept[..., None].expand(-1, -1, hidden.shape[-1]))


@dataclass
class _Row:
    source: list[int]
    copied: list[int]
    shift: list[int]
    kept: list[int]
    spans: list[tuple[int, int]]
    fold: list[int]
    copies: list[tuple[int, int]]


def _expand_row(
    length: int,
    spans: list[list[int]],
    index: list[int],
    shift: list[int],
    shown: list[list[bool]] | None,
) -> _Row:
    keys = _indices(spans)
    row = _Row([], [], [], [], [(at, n) for at, n in spans if n], list(range(len(keys))), [])
    column = 0
    for token in range(length):
        if column < len(index) and token == index[column]:
            chosen = [n for n in range(len(keys)) if shown is None or shown[column][n]]
            row.copies.append((len(row.source), len(chosen)))
            row.spans.append(row.copies[-1])
            row.fold += chosen
            row.source += [keys[n] for n in chosen]
            row.copied += [1] * len(chosen)
            row.shift += [shift[column]] * len(chosen)
            column += 1
        row.kept.append(len(row.source))
        row.source.append(token)
        row.copied.append(0)
        row.shift.append(0)
    return row


def _indices(spans: list[list[int]]) -> list[int]:
    return [key for first, count in spans for key in range(first, first + count)]


def _filled(values: list[int], size: int) -> list[int]:
    return values + [0] * (size - len(values))
