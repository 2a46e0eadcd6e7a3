"""Named model shapes and random inputs that do not fit in the caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from ..visual import VisualContext


@dataclass(frozen=True)
class ModelShape:
    """The attention of one decoder layer."""

    query_heads: int
    key_heads: int
    head_dim: int


MODELS = {
    "qwen2.5-vl-7b": ModelShape(28, 4, 128),
    "qwen2.5-vl-3b": ModelShape(16, 2, 128),
    "qwen3-vl-8b": ModelShape(32, 8, 128),
}


@dataclass(frozen=True)
class Problem:
    """Inputs of one attention call; visual tokens lie at the front of each row."""

    shape: ModelShape
    dtype: torch.dtype
    keys: int
    queries: int = 1
    batch: int = 1
    visual_tokens: int = 0
    reinjections: int = 0
    seed: int = 0

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of the batch."""
        per_key = 2 * self.shape.key_heads * self.shape.head_dim * self.dtype.itemsize
        return self.batch * self.keys * per_key

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, normal."""
        draw = torch.Generator().manual_seed(self.seed)
        sizes = (
            (self.shape.query_heads, self.queries),
            (self.shape.key_heads, self.keys),
            (self.shape.key_heads, self.keys),
        )
        return tuple(
            torch.randn(self.batch, heads, length, self.shape.head_dim, generator=draw).to(
                self.dtype
            )
            for heads, length in sizes
        )

    def buffers(self, total_bytes: int = 192 * 2**20) -> list[tuple[Tensor, Tensor, Tensor]]:
        """As many different inputs as make the caches useless between two calls."""
        first = self.tensors()
        count = max(1, min(16, total_bytes // max(self.cache_bytes, 1)))
        return [first] + [tuple(x.clone() for x in first) for _ in range(count - 1)]

    def visual(self) -> VisualContext | None:
        """COPY of all visual tokens, `reinjections` times, seen by every query."""
        if not self.visual_tokens:
            return None
        span = torch.tensor([[[0, self.visual_tokens]]], dtype=torch.int32)
        half = self.shape.head_dim // 2
        inv_freq = 1e6 ** -(torch.arange(half) / half)
        visual = VisualContext.from_spans(span.repeat(self.batch, 1, 1), inv_freq)
        everyone = torch.ones(self.batch, dtype=torch.bool)
        begin = self.keys - self.queries
        for number in range(self.reinjections):
            visual = visual.reinject(everyone, begin - 7 * number, begin)
        return visual


def rotating(call: Callable[..., object], buffers: list) -> Callable[[], object]:
    """A call that takes the next buffer each time."""
    inputs: Iterator = cycle(buffers)
    return lambda: call(*next(inputs))
