"""What a rollout writes down on the device: its reflections, and where its attention went."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import LookAgainConfig
from .trace import Reflection

LOGGED = 64
"""Reflections of a row that the trace can list."""


@dataclass(frozen=True)
class DecoderShape:
    """What a rollout needs to know about the decoder."""

    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    inv_freq: Tensor


class Buffers:
    """Tensors that are changed in place, by name.

    Kept with a static cache and used again by the next generation on it, at the same addresses:
    a CUDA graph that was recorded with them stays valid.

    Args:
        device: where they lie.
        static: tell the compiler that the addresses stay.
    """

    def __init__(self, device: torch.device, static: bool) -> None:
        self.device = device
        self.static = static
        self._kept: dict[str, Tensor] = {}

    def full(self, name: str, shape: tuple[int, ...], value: int, dtype: torch.dtype) -> Tensor:
        """The tensor called `name`, filled with `value`: the one from before if the shape fits."""
        kept = self._kept.get(name)
        if kept is not None and kept.shape == shape and kept.dtype == dtype:
            return kept.fill_(value)
        made = torch.full(shape, value, dtype=dtype, device=self.device)
        if self.static:
            torch._dynamo.mark_static_address(made)
            self._kept[name] = made
        return made

    def zeros(self, name: str, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """As `full`, with zeros."""
        return self.full(name, shape, 0, dtype)


def put_(kept: Tensor, place: Tensor, value: Tensor) -> None:
    """Write `value` to a tensor where `place` says so, in one operation; all broadcast to it."""
    torch.where(place, value, kept, out=kept)


class ReflectionLog:
    """The reflections of each row, in the order in which they were opened.

    Args:
        buffers: where the tensors come from.
        batch: rows B.
        tokens: visual tokens L_c of the largest row.
        with_shown: whether each reflection keeps the tokens shown; else they are all of them.
        with_mass: whether each reflection keeps the attention before it.
    """

    def __init__(
        self, buffers: Buffers, batch: int, tokens: int, with_shown: bool, with_mass: bool
    ) -> None:
        self.tokens = tokens
        self.count = buffers.zeros("count", batch)
        self.column = torch.arange(LOGGED, device=buffers.device)
        self.numbers = buffers.zeros("log_numbers", 4, batch, LOGGED)
        self.shown = self.mass = None
        if with_shown:
            self.shown = buffers.zeros("log_shown", batch, LOGGED, tokens, dtype=torch.bool)
        if with_mass:
            self.mass = buffers.zeros("log_mass", batch, LOGGED, tokens, dtype=torch.float32)

    def places(self, hit: Tensor) -> Tensor:
        """Where the next reflection of the rows of `hit`, bool [B], goes: bool [B, LOGGED]."""
        return (self.column == self.count[:, None]) & hit[:, None]

    def write(
        self,
        hit: Tensor,
        place: Tensor,
        numbers: Tensor,
        shown: Tensor | None = None,
        mass: Tensor | None = None,
    ) -> None:
        """Add a reflection to the rows of `hit`.

        Args:
            hit: bool [B].
            place: bool [B, LOGGED], what `places` says of them.
            numbers: int64 [4, B]: step, key index, tokens in the cache before it (as the key
                index, but for re-injected rows), and shift.
            shown: bool [B, L_c], the tokens shown to a row that may look.
            mass: float32 [B, L_c], attention before it, summed over steps, layers and heads.
        """
        put_(self.numbers, place, numbers[..., None])
        if self.shown is not None and shown is not None:
            put_(self.shown, place[..., None], shown[:, None])
        if self.mass is not None and mass is not None:
            put_(self.mass, place[..., None], mass[:, None])
        self.count += hit

    def read(
        self, num_visual: list[int], config: LookAgainConfig, share: float
    ) -> list[list[Reflection]]:
        """The reflections of each row, on the host.

        Args:
            num_visual: visual tokens of each row.
            config: how to look again.
            share: factor on the mass of a step, for the mean over layers and heads.
        """
        steps, indices, _, shifts = self.numbers.tolist()
        kept = None if self.shown is None else self.shown.cpu()
        mass = None if self.mass is None else self.mass.cpu()
        number = torch.arange(self.tokens)
        rows = []
        for row, count in enumerate(self.count.tolist()):
            found = []
            for i in range(min(count, LOGGED)):
                wanted = config.looks and num_visual[row] > 0
                looked = wanted and (config.keep == "latest" or i < config.max_reinjections)
                shown = number < (num_visual[row] if looked else 0)
                if kept is not None:
                    shown &= kept[row, i]
                before = None if mass is None else mass[row, i] * share / max(steps[row][i], 1)
                found.append(
                    Reflection(
                        step=steps[row][i],
                        key_index=indices[row][i],
                        shift=shifts[row][i] if looked else 0,
                        num_visual=num_visual[row],
                        num_shown=int(shown.sum()),
                        shown=shown,
                        mass_before=before,
                        ignored=wanted and not looked,
                    )
                )
            rows.append(found)
        return rows

    def kept(self, tokens: int) -> Tensor:
        """int64 [B], the reflections of each row among the first `tokens` tokens.

        Raises:
            ValueError: if a row has more reflections than are logged, and may lose some.
        """
        logged = self.column < self.count[:, None]
        count = (logged & (self.numbers[2] < tokens)).sum(-1)
        if bool(((self.count > LOGGED) & (count >= LOGGED)).any()):
            raise ValueError(
                f"a row has more than {LOGGED} reflections, and its cache was cropped: which of "
                "them are gone is not known; start with an empty cache"
            )
        return count

    def pick(self, rows: Tensor) -> None:
        """Let row i be what row `rows[i]` was."""
        self.count, self.numbers = self.count[rows], self.numbers[:, rows]
        self.shown = None if self.shown is None else self.shown[rows]
        self.mass = None if self.mass is None else self.mass[rows]


class AttentionRecord:
    """Attention on visual tokens: of this step, of all steps together, and step by step.

    Args:
        buffers: where the tensors come from.
        decoder: sizes of the decoder.
        batch: rows B.
        tokens: visual tokens L_c of the largest row.
        copies: re-injections written to real cache rows that a row can have; 0 when they are seen
            in place. Copies have visual token numbers of their own, and `fold` [layers, B, width]
            tells the original's.
        max_steps: steps to hold at first.
        every_token: keep each step's attention on every token, not only the sum.
        by_layer: keep the sum over the steps for each layer, not only for all together.

    Attributes:
        share: factor on a step's mass, for the mean over layers and heads.
        total: float32 [layers, B, L_c], or [B, L_c] for all layers together; sum over the steps.
        lost: whether `total` still holds steps that were taken back.
    """

    def __init__(
        self,
        buffers: Buffers,
        decoder: DecoderShape,
        batch: int,
        tokens: int,
        copies: int,
        max_steps: int,
        every_token: bool,
        by_layer: bool,
    ) -> None:
        layers, kind = decoder.num_layers, torch.float32
        self.share = 1.0 / (layers * decoder.num_attention_heads)
        width = tokens * (1 + copies)
        heads = decoder.num_key_value_heads
        self.mass = buffers.zeros("mass", layers, batch, heads, width, dtype=kind)
        self.by_layer = by_layer
        shape = (layers, batch, tokens) if by_layer else (batch, tokens)
        self.total = buffers.zeros("total", *shape, dtype=kind)
        self.attention = buffers.zeros("attention", batch, max_steps, dtype=kind)
        self.map: Tensor | None = None
        if every_token:
            self.map = buffers.zeros("attention_map", batch, max_steps, tokens, dtype=kind)
        # A step's number and the steps done: on the host where known, else on the device.
        self.host_step: int | None = None
        self.host_done = 0
        self.step = buffers.zeros("step", 1)
        self.done = buffers.zeros("done", 1)
        self.lost = False
        self.fold: Tensor | None = None
        if copies:
            self.fold = buffers.zeros("fold", layers, batch, width)
            self.fold[..., :tokens] = torch.arange(tokens, device=buffers.device)

    def begin(self, step: Tensor | int) -> tuple[Tensor, ...]:
        """Make ready for a step; returns the zeroed mass that each layer adds to.

        Args:
            step: its number, a tensor of one element or, so that the buffers can grow, an int.
        """
        self.host_step = None if isinstance(step, Tensor) else step
        if self.host_step is None:
            self.step.copy_(step)
        else:
            self._make_room(step)
        return self.mass.zero_().unbind()

    def _make_room(self, step: int) -> None:
        while step >= self.attention.shape[1]:
            self.attention = torch.cat([self.attention, torch.zeros_like(self.attention)], dim=1)
            if self.map is not None:
                self.map = torch.cat([self.map, torch.zeros_like(self.map)], dim=1)

    def carry(self, mass: Tensor) -> None:
        """Go on after steps that were made elsewhere.

        Args:
            mass: float32 [B, steps, L_c], the attention of each, summed over layers and heads.
        """
        self.host_done = steps = mass.shape[1]
        self._make_room(steps)
        self.total += mass.sum(1)
        self.attention[:, :steps] = mass.sum(-1)
        if self.map is not None:
            self.map[:, :steps] = mass

    def finish(self) -> None:
        """Take in what the layers added."""
        if self.by_layer or self.fold is not None:
            found = self.mass.sum(2)
            if self.fold is not None:
                shape = (*found.shape[:-1], self.total.shape[-1])
                found = found.new_zeros(shape).scatter_add_(-1, self.fold, found)
            every = found.sum(0)
        else:
            every = self.mass.sum((0, 2))
        self.total += found if self.by_layer else every
        if self.host_step is not None:
            torch.sum(every, -1, out=self.attention[:, self.host_step])
            if self.map is not None:
                self.map[:, self.host_step] = every
            self.host_done = self.host_step + 1
            return
        self.attention.index_copy_(1, self.step, every.sum(-1, keepdim=True))
        if self.map is not None:
            self.map.index_copy_(1, self.step, every[:, None])
        self.done.copy_(self.step + 1)

    def so_far(self) -> Tensor:
        """float32 [B, L_c], attention summed over layers, heads and the steps so far (Eq. 5)."""
        return self.total.sum(0) if self.by_layer else self.total

    def fold_copies(self, numbered: Tensor, count: Tensor, shown: Tensor) -> None:
        """Remember whose copies the next visual token numbers are.

        Args:
            numbered: int64 [B], visual token numbers in use.
            count: int64 [B], copies made.
            shown: bool [B, L_c] or [layers, B, L_c], the tokens copied, in visual order.
        """
        shown = shown.expand(self.fold.shape[0], -1, -1)
        order = (~shown).int().argsort(dim=-1, stable=True)
        column = torch.arange(self.fold.shape[-1], device=order.device) - numbered[:, None]
        copied = (column >= 0) & (column < count[:, None])
        column = column.clamp(0, order.shape[-1] - 1).expand(order.shape[0], -1, -1)
        self.fold.copy_(torch.where(copied, order.gather(-1, column), self.fold))

    def rewind(self, steps: int) -> None:
        """Take back all but the first `steps` steps."""
        done = max(self.host_done, int(self.done))
        if steps >= done:
            return
        if steps <= 0:
            self.restart()
            return
        if self.map is not None and not self.by_layer:
            self.map[:, steps:] = 0
            self.total.copy_(self.map.sum(1))
        else:
            self.lost = True
        self.attention[:, steps:] = 0
        self.host_done = min(self.host_done, steps)
        self.done.clamp_(max=steps)

    def pick(self, rows: Tensor) -> None:
        """Let row i be what row `rows[i]` was."""
        self.mass = self.mass[:, rows]
        self.total = self.total[:, rows] if self.by_layer else self.total[rows]
        self.attention = self.attention[rows]
        self.map = None if self.map is None else self.map[rows]
        self.fold = None if self.fold is None else self.fold[:, rows]

    def restart(self) -> None:
        """Count from nothing again."""
        self.host_done, self.lost = 0, False
        for tensor in (self.total, self.attention, self.step, self.done):
            tensor.zero_()
        if self.map is not None:
            self.map.zero_()

    def read(self) -> tuple[Tensor, Tensor | None]:
        """(attention [B, steps], attention on every token [B, steps, L_c] or None), on the host."""
        done = max(self.host_done, int(self.done))
        attention = self.attention[:, :done].cpu() * self.share
        return attention, None if self.map is None else self.map[:, :done].cpu() * self.share
