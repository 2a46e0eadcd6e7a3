"""What a rollout writes down on the device: its reflections, and where its attention went."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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


class ReflectionLog:
    """The reflections of each row, in the order in which they were opened.

    Args:
        buffers: where the tensors come from.
        batch: rows B.
        tokens: visual tokens L_c of the largest row.
        with_mass: whether each reflection keeps the attention before it.
    """

    def __init__(self, buffers: Buffers, batch: int, tokens: int, with_mass: bool) -> None:
        self.count = buffers.zeros("count", batch)
        self.column = torch.arange(LOGGED, device=buffers.device)
        names = ("step", "key_index", "shift", "looked")
        self.numbers = {name: buffers.zeros(f"log_{name}", batch, LOGGED) for name in names}
        shape = (batch, LOGGED, tokens)
        self.shown = buffers.zeros("log_shown", *shape, dtype=torch.bool)
        self.mass: Tensor | None = None
        if with_mass:
            self.mass = buffers.zeros("log_mass", *shape, dtype=torch.float32)

    def write(
        self, hit: Tensor, shown: Tensor, mass: Tensor | None = None, **numbers: Tensor
    ) -> None:
        """Add a reflection to the rows of `hit`.

        Args:
            hit: bool [B].
            shown: bool [B, L_c], the tokens shown; none in rows that did not look.
            mass: float32 [B, L_c], mean attention before it.
            **numbers: integer [B] each: `step`, `key_index`, `shift`, `looked`.
        """
        place = (self.column == self.count[:, None]) & hit[:, None]
        for name, value in numbers.items():
            kept = self.numbers[name]
            kept.copy_(torch.where(place, value[:, None].to(kept.dtype), kept))
        self.shown.copy_(torch.where(place[..., None], shown[:, None], self.shown))
        if self.mass is not None and mass is not None:
            self.mass.copy_(torch.where(place[..., None], mass[:, None], self.mass))
        self.count += hit

    def read(self, num_visual: list[int], looks: bool) -> list[list[Reflection]]:
        """The reflections of each row, on the host.

        Args:
            num_visual: visual tokens of each row.
            looks: whether the configuration shows anything.
        """
        numbers = {name: values.tolist() for name, values in self.numbers.items()}
        shown = self.shown.cpu()
        mass = None if self.mass is None else self.mass.cpu()
        rows = []
        for row, count in enumerate(self.count.tolist()):
            rows.append(
                [
                    Reflection(
                        step=numbers["step"][row][i],
                        key_index=numbers["key_index"][row][i],
                        shift=numbers["shift"][row][i],
                        num_visual=num_visual[row],
                        num_shown=int(shown[row, i].sum()),
                        shown=shown[row, i].clone(),
                        mass_before=None if mass is None else mass[row, i].clone(),
                        ignored=looks and num_visual[row] > 0 and not numbers["looked"][row][i],
                    )
                    for i in range(min(count, LOGGED))
                ]
            )
        return rows


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
    ) -> None:
        layers, kind = decoder.num_layers, torch.float32
        self.share = 1.0 / (layers * decoder.num_attention_heads)
        width = tokens * (1 + copies)
        heads = decoder.num_key_value_heads
        self.mass = buffers.zeros("mass", layers, batch, heads, width, dtype=kind)
        self.total = buffers.zeros("total", layers, batch, tokens, dtype=kind)
        self.attention = buffers.zeros("attention", batch, max_steps, dtype=kind)
        self.map: Tensor | None = None
        if every_token:
            self.map = buffers.zeros("attention_map", batch, max_steps, tokens, dtype=kind)
        self.step = buffers.zeros("step", 1)
        self.done = buffers.zeros("done", 1)
        self.fold: Tensor | None = None
        if copies:
            self.fold = buffers.zeros("fold", layers, batch, width)
            self.fold[..., :tokens] = torch.arange(tokens, device=buffers.device)

    def begin(self, step: Tensor, host_step: int | None) -> Tensor:
        """Make ready for a step; returns the zeroed mass that the layers add to.

        Args:
            step: int64 [1], its number.
            host_step: the same on the host when it is known there: then the buffers can grow.
        """
        if host_step is not None and host_step >= self.attention.shape[1]:
            self.attention = torch.cat([self.attention, torch.zeros_like(self.attention)], dim=1)
            if self.map is not None:
                self.map = torch.cat([self.map, torch.zeros_like(self.map)], dim=1)
        self.step.copy_(step)
        return self.mass.zero_()

    def finish(self) -> None:
        """Take in what the layers added."""
        found = self.mass.sum(2)
        if self.fold is not None:
            found = torch.zeros_like(self.total).scatter_add_(-1, self.fold, found)
        self.total += found
        mean = found.sum(0) * self.share
        self.attention.index_copy_(1, self.step, mean.sum(-1, keepdim=True))
        if self.map is not None:
            self.map.index_copy_(1, self.step, mean[:, None])
        self.done.copy_(self.step + 1)

    def mean(self, steps: Tensor) -> Tensor:
        """float32 [B, L_c], mean attention over layers, heads and the steps so far (Eq. 5)."""
        return self.total.sum(0) * self.share / steps.clamp(min=1)

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

    def restart(self) -> None:
        """Count from nothing again."""
        for tensor in (self.total, self.attention, self.step, self.done):
            tensor.zero_()
        if self.map is not None:
            self.map.zero_()

    def read(self) -> tuple[Tensor, Tensor | None]:
        """(attention [B, steps], attention on every token [B, steps, L_c] or None), on the host."""
        done = int(self.done)
        return self.attention[:, :done].cpu(), None if self.map is None else self.map[
            :, :done
        ].cpu()
