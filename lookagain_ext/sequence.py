"""A whole sequence in one forward: training, scoring, and the first call of a custom loop.

The same reflections, shifts and selections as token-by-token decoding, for all positions at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import LookAgainConfig
from .layout import VisualLayout
from .trace import Reflection, Trace
from .visual import NEVER, VisualContext


@dataclass(frozen=True)
class Sequence:
    """The reflections of a batch of whole sequences, N columns for the row with most.

    Attributes:
        config: how to look again.
        layout: the visual tokens.
        hits: for each row, the indices of the tokens that trigger, ignored ones included.
        begins: for each row and hit, the first token of the answer that it belongs to.
        index: int64 [B, N], index of the token of each re-injection; -1 where a row has fewer.
        original: int64 [3 or 4, B, L], rotary positions without re-injections.
        positions: int64 [3 or 4, B, L], moved past the re-injected blocks.
        shift: int32 [B, N], rotary offset of each re-injection.
        rows: int32 [B, N, 2], tokens generated before each re-injection.
        counted: bool [B, L], the tokens that could trigger.
        begun: for each row, the tokens of an answer at its end that labels tell, which later calls
            may go on with; 0 without labels, which do not tell a prompt's text from an answer.
    """

    config: LookAgainConfig
    layout: VisualLayout
    hits: list[list[int]]
    begins: list[list[int]]
    index: Tensor
    original: Tensor
    positions: Tensor
    shift: Tensor
    rows: Tensor
    counted: Tensor
    begun: tuple[int, ...]

    def last_answer(self) -> Tensor:
        """int32 [B, T, 2], each of the last T tokens as a range, T the longest of `begun`."""
        length = self.positions.shape[-1]
        first = torch.arange(length - max(self.begun), length, device=self.index.device)
        ranges = torch.stack([first, first + 1], dim=-1).to(torch.int32)
        return ranges.expand(len(self.begun), -1, -1).contiguous()

    @property
    def num_columns(self) -> int:
        """N, re-injections of the row with most."""
        return self.index.shape[1]

    def context(self, inv_freq: Tensor, selected: Tensor | None, count: int) -> VisualContext:
        """The visual context with the first `count` columns."""
        start = torch.where(self.index >= 0, self.index, NEVER).to(torch.int32)
        plain = self.layout.context(inv_freq)
        return VisualContext(
            plain.spans,
            plain.inv_freq,
            self.shift[:, :count].contiguous(),
            start[:, :count].contiguous(),
            None if selected is None else selected[:, :count].contiguous(),
        )

    def each_counted(self) -> Tensor:
        """int32 [B, T, 2], each counted token as a range; empty ranges where a row has fewer."""
        order = torch.argsort(~self.counted, dim=1, stable=True)
        count = self.counted.sum(1)
        order = order[:, : int(count.max())]
        real = torch.arange(order.shape[1], device=order.device) < count[:, None]
        return torch.stack([order, order + real], dim=-1).to(torch.int32)

    def trace(
        self,
        selected: Tensor | None,
        mass: Tensor | None,
        attention: Tensor | None = None,
        answer: Tensor | None = None,
    ) -> Trace:
        """The reflections, in the form of a generation's trace.

        Args:
            selected: bool [B, N, L_c], or None when all tokens are shown.
            mass: float32 [B, N, L_c], mean attention before each re-injection, or None.
            attention: float32 [B, T, L_c], mean attention of each counted token, or None.
            answer: float32 [B, L_c], that of all counted tokens together, or None.
        """
        counts = self.layout.num_visual.tolist()
        selected = None if selected is None else selected.cpu()
        mass = None if mass is None else mass.cpu()
        shift, number = self.shift.cpu(), torch.arange(self.layout.max_visual)
        again = self.config.max_reinjections
        found: list[list[Reflection]] = []
        for row, hits in enumerate(self.hits):
            found.append([])
            for column, index in enumerate(hits):
                wanted = self.config.looks and counts[row] > 0
                looked = wanted and column < again
                shown = (number < counts[row]) & looked
                if looked and selected is not None:
                    shown = selected[row, column].clone()
                found[row].append(
                    Reflection(
                        step=index - self.begins[row][column],
                        key_index=index,
                        shift=int(shift[row, column]) if looked else 0,
                        num_visual=counts[row],
                        num_shown=int(shown.sum()),
                        shown=shown,
                        mass_before=mass[row, column] if looked and mass is not None else None,
                        ignored=wanted and not looked,
                    )
                )
        share = None if attention is None else attention.sum(-1)
        tokens = None if answer is None else self.counted.sum(1).cpu()
        return Trace(found, share, attention, self.layout.grids, answer, tokens)


def read_sequence(
    config: LookAgainConfig,
    layout: VisualLayout,
    input_ids: Tensor,
    positions: Tensor,
    labels: Tensor | None,
    real: Tensor | None = None,
) -> Sequence:
    """Find the reflections of whole sequences.

    Args:
        config: how to look again, with `reflection_token_id` set.
        layout: the visual tokens of `input_ids`.
        input_ids: int64 [B, L].
        positions: int64 [3 or 4, B, L].
        labels: int64 [B, L]: only tokens whose label is not -100 trigger. None: those after the
            last visual token.
        real: bool [B, L], False on padding that a mask does not tell; None: there is none.

    Raises:
        ValueError: if `keep="latest"` would have to forget a re-injection within one forward, or a
            picture comes after a reflection, which would show it before it is there.
    """
    batch, length = input_ids.shape
    if labels is None:
        spans = layout.spans.long()
        after = torch.where(spans[..., 1] > 0, spans.sum(-1), 0)
        after = after.amax(-1) if spans.shape[1] else spans.new_zeros(batch)
        counted = torch.arange(length, device=input_ids.device) >= after[:, None]
    else:
        counted = labels.to(input_ids.device) != -100
    if real is not None:
        counted = counted & real
    mask = (input_ids == config.reflection_token_id) & counted
    hits = [row.nonzero().flatten().tolist() for row in mask.cpu()]
    host = counted.cpu()
    begins = [[_run_begin(host[row], index) for index in found] for row, found in enumerate(hits)]
    begun = tuple(0 if labels is None else length - _run_begin(row, length) for row in host)
    counts = layout.num_visual.tolist()
    looks = [found if config.looks and counts[row] else [] for row, found in enumerate(hits)]
    most = max(map(len, looks))
    if config.keep == "latest" and most > config.max_reinjections:
        raise ValueError(
            f"a row reflects {most} times, past max_reinjections={config.max_reinjections}: with "
            "keep='latest' it cannot be replayed in one forward; raise max_reinjections"
        )
    looks = [found[: config.max_reinjections] for found in looks]
    for row, (found, runs) in enumerate(zip(looks, layout.spans.tolist(), strict=True)):
        last = max((first + length for first, length in runs if length), default=0)
        if found and found[0] < last:
            raise ValueError(
                f"row {row} has a picture up to token {last - 1}, after its reflection at token "
                f"{found[0]}, which would show it before it comes: end the sequence before that "
                "picture, or leave the earlier answer out of the labels"
            )
    columns = max(map(len, looks))
    index = torch.full((batch, columns), -1, dtype=torch.int64)
    rows = torch.zeros(batch, columns, 2, dtype=torch.int32)
    for row, found in enumerate(looks):
        for column, at in enumerate(found):
            index[row, column] = at
            rows[row, column] = torch.tensor([begins[row][column], at])
    index, rows = index.to(input_ids.device), rows.to(input_ids.device)
    shift = positions[-1].gather(1, index.clamp(min=0)) - layout.first_position[:, None]
    shift = shift + layout.extent[:, None] * torch.arange(columns, device=index.device)
    passed = torch.arange(length, device=index.device) >= index[..., None]
    passed = (passed & (index >= 0)[..., None]).sum(1)
    weight = torch.ones(positions.shape[0], 1, 1, dtype=torch.int64, device=index.device)
    weight[:-3] = 0
    moved = positions + weight * passed * layout.extent[:, None]
    shift = shift.to(torch.int32)
    return Sequence(
        config, layout, hits, begins, index, positions, moved, shift, rows, counted, begun
    )


def _run_begin(counted: Tensor, index: int) -> int:
    """First index of the unbroken run of counted tokens that holds `index`."""
    before = (~counted[:index]).nonzero().flatten()
    return int(before[-1]) + 1 if len(before) else 0
