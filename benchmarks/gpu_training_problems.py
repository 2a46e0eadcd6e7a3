"""Problems of the training benchmarks: sequences with a picture that is shown again, and how a call
on them is timed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lookagain_ext import VisualContext
from lookagain_ext.bench.problems import MODELS, ModelShape

BFLOAT16 = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """A sequence with a picture at its front that is shown again at even distances."""

    length: int
    again: int = 0
    tokens: int = 1024
    batch: int = 1
    flex: bool = True  # it compiles for each shape, so not all of them

    @property
    def starts(self) -> list[int]:
        """Where the re-injections begin: in the three quarters after the picture."""
        first = max(self.length // 4, self.tokens)
        return [
            first + (self.length - first) * (n + 1) // (self.again + 1) for n in range(self.again)
        ]

    @property
    def pairs(self) -> float:
        """(query, key) pairs of one head of one row, sightings included."""
        again = sum((self.length - start) * self.tokens for start in self.starts)
        return self.length * (self.length + 1) / 2 + again

    @property
    def same_flop(self) -> int:
        """Length of plain causal attention with as many pairs, to a multiple of 64."""
        return round(math.sqrt(2 * self.pairs) / 64) * 64

    def __str__(self) -> str:
        again = f", {self.again} x {self.tokens} tokens" if self.again else ""
        return f"L={self.length}{again}"


SHAPES = (
    Shape(2048, flex=False),
    Shape(8192),
    Shape(32768),
    Shape(4096, 1, 1024),
    Shape(8192, 2, 1024),
    Shape(8192, 4, 256, flex=False),
    Shape(8192, 8, 1024),
    Shape(16384, 4, 2048),
    Shape(32768, 2, 1024),
)
SMALL = (Shape(192), Shape(192, 2, 32))


class Setting:
    """Device, shapes and patience of a run."""

    def __init__(
        self,
        device: str,
        small: bool,
        seconds: float,
        compile_seconds: float = 110.0,
        own_kernels: bool = True,
    ) -> None:
        self.device = torch.device(device)
        self.seconds = seconds
        self.compile_seconds = compile_seconds
        self.own_kernels = own_kernels
        self.model = ModelShape(4, 2, 64) if small else MODELS["qwen2.5-vl-7b"]
        self.shapes = SMALL if small else SHAPES
        self.growth = (64, 128) if small else (8192, 32768)

    @property
    def on_gpu(self) -> bool:
        """Whether this is a measurement."""
        return self.device.type == "cuda"

    def tensors(self, length: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key, value and the gradient of the result, laid out as models do."""
        model = self.model
        heads = (model.query_heads, model.key_heads, model.key_heads, model.query_heads)
        sizes = [(batch, length, number, model.head_dim) for number in heads]
        drawn = [torch.randn(size, dtype=BFLOAT16, device=self.device) for size in sizes]
        query, key, value, upstream = (x.transpose(1, 2) for x in drawn)
        return *(x.requires_grad_() for x in (query, key, value)), upstream

    def visual(self, shape: Shape) -> VisualContext | None:
        """The shape's re-injections."""
        if not shape.again:
            return None
        span = torch.tensor([[[8, shape.tokens]]] * shape.batch, dtype=torch.int32)
        half = self.model.head_dim // 2
        visual = VisualContext.from_spans(span, 1e6 ** -(torch.arange(half) / half))
        for start in shape.starts:
            everyone = torch.ones(shape.batch, dtype=torch.bool)
            visual = visual.reinject(everyone, start - 8, start)
        return visual.to(self.device)

    @contextmanager
    def only(self, shapes: Iterable[Shape]) -> Iterator[None]:
        """These shapes, for a while."""
        before, self.shapes = self.shapes, tuple(shapes)
        try:
            yield
        finally:
            self.shapes = before

    def timed(self, call: Callable[[], object]) -> Callable[[], float]:
        """Seconds of the device's work, launches queued behind a pause so that they do not show."""
        if not self.on_gpu:

            def wall() -> float:
                begin = time.perf_counter()
                call()
                return time.perf_counter() - begin

            return wall
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def run() -> float:
            torch.cuda._sleep(4_000_000)
            first.record()
            call()
            last.record()
            last.synchronize()
            return first.elapsed_time(last) / 1e3

        return run

    def peak(self, call: Callable[[], object]) -> int:
        """Bytes that a call needs at most beyond what is held before it."""
        if not self.on_gpu:
            call()
            return 0
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
