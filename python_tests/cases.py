"""Random attention problems with re-injections, described by one printable dataclass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lookagain_ext import NEVER, VisualContext


class Problem(NamedTuple):
    """The arguments of `routed_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    visual: VisualContext
    key_start: Tensor
    key_length: Tensor
    mass_from: Tensor
    max_visual: int

    def kwargs(self) -> dict[str, Tensor]:
        return {"key_start": self.key_start, "key_length": self.key_length}

    def double(self) -> Problem:
        tensors = (self.query.double(), self.key.double(), self.value.double())
        return Problem(*tensors, *self[3:])

    def row(self, row: int) -> Problem:
        """One row of the batch alone."""
        visual = self.visual
        selected = None if visual.selected is None else visual.selected[row : row + 1]
        fields = (visual.spans, visual.inv_freq, visual.shift, visual.start)
        spans, inv_freq, shift, start = fields
        one = VisualContext(
            spans[row : row + 1], inv_freq, shift[row : row + 1], start[row : row + 1], selected
        )
        rest = (self.key_start, self.key_length, self.mass_from)
        tensors = (x[row : row + 1] for x in (self.query, self.key, self.value))
        return Problem(*tensors, one, *(x[row : row + 1] for x in rest), self.max_visual)


@dataclass(frozen=True)
class Case:
    """A problem's shape; `make` draws its values."""

    batch: int = 2
    kv_heads: int = 2
    groups: int = 2
    queries: int = 1
    keys: int = 40
    size: int = 32
    rotary: int | None = None
    spans: int = 2
    again: int = 2
    select: bool = False
    ragged: bool = True
    poison: bool = True
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def but(self, **changes: object) -> Case:
        return replace(self, **changes)

    def make(self, device: torch.device | str = "cpu") -> Problem:
        draw = torch.Generator().manual_seed(self.seed)

        def integer(low: int, high: int) -> int:
            return int(torch.randint(low, max(high, low + 1), (), generator=draw))

        def normal(heads: int, length: int, layout: str) -> Tensor:
            if layout == "BLHD":
                shape = (self.batch, length, heads, self.size)
                return torch.randn(shape, generator=draw, dtype=torch.float64).transpose(1, 2)
            padded = torch.randn(
                (self.batch, heads, length, self.size + 8), generator=draw, dtype=torch.float64
            )
            return padded[..., : self.size]

        query = normal(self.kv_heads * self.groups, self.queries, "BLHD")
        key, value = (
            normal(self.kv_heads, self.keys, "BHLD"),
            normal(self.kv_heads, self.keys, "BLHD"),
        )
        starts, lengths, spans, shifts, firsts, counts = [], [], [], [], [], []
        for _ in range(self.batch):
            length = integer(max(1, self.keys // 2), self.keys + 1) if self.ragged else self.keys
            start = integer(0, length // 4 + 1) if self.ragged else 0
            end = start + max(1, 2 * (length - start) // 3)
            bounds = sorted(integer(start, end + 1) for _ in range(2 * self.spans))
            row = [[a, b - a] for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
            spans.append(row)
            counts.append(sum(n for _, n in row))
            starts.append(start)
            lengths.append(length)
            shifts.append([integer(-50, 3000) for _ in range(self.again)])
            begin = [integer(end, length) for _ in range(self.again)]
            firsts.append([NEVER if integer(0, 5) == 0 else x for x in begin])
        width = max(counts)
        selected = None
        if self.select:
            selected = torch.rand((self.batch, self.again, width), generator=draw) < 0.5
        for row in range(self.batch if self.poison else 0):
            for cache in (key, value):
                cache[row, :, : starts[row]] = torch.nan
                cache[row, :, lengths[row] :] = torch.nan
        half = (self.rotary or self.size) // 2
        integers = [torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, lengths)]
        visual = VisualContext(
            torch.tensor(spans, dtype=torch.int32, device=device).view(self.batch, self.spans, 2),
            (10000.0 ** -(torch.arange(half) / half)).to(device),
            torch.tensor(shifts, dtype=torch.int32, device=device).view(self.batch, self.again),
            torch.tensor(firsts, dtype=torch.int32, device=device).view(self.batch, self.again),
            None if selected is None else selected.to(device),
        )
        mass_from = torch.tensor(lengths, dtype=torch.int32, device=device) - self.queries // 2 - 1
        tensors = (_cast(x, self.dtype, device) for x in (query, key, value))
        return Problem(*tensors, visual, *integers, mass_from, width)


def on_cpu(problem: Problem) -> Problem:
    return Problem(*(x if isinstance(x, int) else x.to("cpu") for x in problem))


def _cast(x: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """To dtype and device with the strides kept, gaps between rows included."""
    storage = torch.empty(x.untyped_storage().nbytes() // 8, dtype=dtype, device=device)
    return storage.as_strided(x.shape, x.stride()).copy_(x)


# Shapes at the edges of tiles, splits, groups and head sizes.
DECODE = [
    Case(),
    Case(keys=1, spans=1, again=1, ragged=False),
    Case(batch=3, groups=7, keys=131, size=128, spans=3, again=4, select=True),
    Case(batch=1, kv_heads=1, groups=1, keys=700, size=64, again=1),
    Case(batch=2, groups=4, queries=5, keys=257, size=80, again=3),
    Case(batch=2, groups=3, queries=16, keys=90, size=96, again=2, select=True),
    Case(batch=1, kv_heads=4, groups=7, keys=1030, size=128, again=16, select=True),
    Case(batch=2, groups=2, keys=65, size=256, again=2, rotary=64),
    Case(batch=2, groups=2, keys=33, size=8, again=1),
    Case(batch=4, groups=2, keys=50, size=72, again=0),
    Case(batch=2, groups=2, queries=9, keys=9, size=40, again=2),
]
PREFILL = [
    Case(queries=17, keys=17, ragged=False),
    Case(queries=40, keys=64, size=64, again=3, select=True),
    Case(batch=2, groups=7, queries=129, keys=129, size=128, spans=3, again=4),
    Case(batch=1, kv_heads=1, groups=1, queries=300, keys=333, size=80, again=1, select=True),
    Case(batch=3, groups=3, queries=65, keys=65, size=96, again=2, rotary=32),
    Case(batch=2, groups=2, queries=70, keys=70, size=256, again=2),
    Case(batch=2, groups=2, queries=33, keys=100, size=8, again=0),
    Case(batch=2, groups=2, queries=100, keys=60, size=24, again=2),
]
