"""What is done to a cache between two calls is done to the rollout on it: see `Bookmark`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .visual import NEVER, VisualContext

if TYPE_CHECKING:
    from .config import LookAgainConfig
    from .layout import VisualLayout
    from .record import AttentionRecord, ReflectionLog
    from .reencode import Reencoder


class FollowsCache:
    """What a `Rollout` does when its cache was cropped, or rows of it were picked, by the owner."""

    config: LookAgainConfig
    layout: VisualLayout
    context: VisualContext
    virtual: bool
    prompt: tuple[Tensor, Tensor] | None
    prompt_length: int
    offset: Tensor
    appended: Tensor
    log: ReflectionLog
    record: AttentionRecord | None
    reencoder: Reencoder | None
    layer_selected: Tensor | None

    def rewind(self, tokens: int, cache: Any) -> None:  # noqa: ANN401 - any cache
        """Follow a cache whose end was cut off: what began in it is taken back.

        Args:
            tokens: tokens that are left; the picture is among them.
            cache: the cache; the lengths of its rows are set right.

        Raises:
            ValueError: if that cannot be taken back.
        """
        config, logged = self.config, self.log.count
        kept = self.log.kept(tokens)
        if self.prompt is not None:
            ids, positions = self.prompt
            self.prompt = ids[:, :tokens], positions[..., :tokens]
        if config.looks and bool((kept < logged).any()):
            again = config.max_reinjections
            looked, before = (
                n if config.keep == "latest" else n.clamp(max=again) for n in (kept, logged)
            )
            self.offset -= self._extent * (before - looked)[:, None]
            if self.virtual:
                self._refill_columns(kept, before)
            else:
                self._forget_copies(kept)
        self.log.count.copy_(kept)
        if not self.virtual:
            for layer in cache.layers:
                layer.lengths.copy_(tokens + self.appended)
        self._rewind_answer(tokens)

    def _rewind_answer(self, tokens: int) -> None:
        if tokens >= self.prompt_length:
            if self.record is not None:
                self.record.rewind(tokens - self.prompt_length)
            return
        within = [(begin, end) for begin, end in self._answers if begin < tokens <= end]
        self._answers = [(begin, end) for begin, end in self._answers if end < tokens]
        self._begin(within[0][0] if within else tokens)
        if within and self.record is not None:
            self.record.lost = True

    def _refill_columns(self, kept: Tensor, before: Tensor) -> None:
        """Virtual: only the first `kept` reflections of each row, int64 [B], have columns.

        Columns that later ones took from earlier ones, which are seen again, are read from the log.
        """
        again, place = self.config.max_reinjections, self.log.column
        taken = (before > again) & (kept > 0) & (kept < before)
        if bool(taken.any()) and self.layer_selected is not None:
            raise ValueError(
                "keep='latest' and route_scope='layer' cannot follow a cache that was cropped by "
                "more reflections than max_reinjections; start with an empty cache"
            )
        number = kept[:, None] - 1 - (kept[:, None] - 1 - self._column) % again
        if self.config.keep == "all":
            number = self._column.expand_as(number)
        there = (number >= 0) & (number < kept[:, None])
        number = number.clamp(0, len(place) - 1)
        _, _, start, shift = (numbers.gather(1, number) for numbers in self.log.numbers)
        self._columns[0] = torch.where(there, start, NEVER)
        self._columns[1] = torch.where(there, shift, 0)
        if self.context.selected is not None:
            index = number[..., None].expand(-1, -1, self.log.shown.shape[-1])
            self.context.selected.copy_(self.log.shown.gather(1, index) & there[..., None])

    def _forget_copies(self, kept: Tensor) -> None:
        """Append or reencode: rows written for all but the first `kept` reflections are gone."""
        last = (kept - 1).clamp(min=0)[:, None]
        _, slot, token, _ = (numbers.gather(1, last)[:, 0] for numbers in self.log.numbers)
        self.appended.copy_(torch.where(kept > 0, slot - token, 0))
        if self.record is not None:
            self._numbered.copy_(self.layout.num_visual + self.appended)
            runs, spans = self.layout.spans.shape[1], self.context.spans
            gone = torch.arange(spans.shape[1], device=spans.device) >= runs + kept[:, None]
            spans.masked_fill_(gone[..., None], 0)

    def pick(self, rows: list[int]) -> None:
        """Follow a cache whose row i is what row `rows[i]` was."""
        self.layout = self.layout.pick(rows)
        self._origin, self._extent, self.offset = (
            tensor[:, rows] for tensor in (self._origin, self._extent, self.offset)
        )
        self._all_shown, self.appended = self._all_shown[rows], self.appended[rows]
        if self.prompt is not None:
            self.prompt = self.prompt[0][rows], self.prompt[1][:, rows]
        context = self.context
        self.context = replace(
            context,
            spans=context.spans[rows],
            shift=context.shift[rows],
            start=context.start[rows],
            selected=None if context.selected is None else context.selected[rows],
        )
        if self.virtual and self.config.looks:
            self._columns = self._columns[:, rows]
        elif self.record is not None and not self.virtual:
            self._numbered = self._numbered[rows]
        if self.layer_selected is not None:
            self.layer_selected = self.layer_selected[:, rows]
        self.log.pick(rows)
        if self.record is not None:
            self.record.pick(rows)
        if self.reencoder is not None:
            self.reencoder.pick(rows, self.layout)
