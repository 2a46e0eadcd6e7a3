"""Shared by the kernel benchmarks: shapes, and counted bytes beside each time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from lookagain_ext.bench.measure import machine


@pytest.fixture
def measure(benchmark: BenchmarkFixture) -> Callable[..., None]:
    """Time a call and keep what it moves: `measure(call, bytes=…, flop=…, **shape)`."""

    def run(call: Callable[[], object], *, bytes: int = 0, flop: int = 0, **shape: object) -> None:
        benchmark.extra_info.update(
            {name: str(value) for name, value in shape.items()},
            threads=torch.get_num_threads(),
            torch=torch.__version__,
        )
        benchmark.pedantic(call, rounds=30, warmup_rounds=3)
        seconds = benchmark.stats.stats.median
        if bytes:
            benchmark.extra_info["GB/s"] = round(bytes / seconds / 1e9, 2)
        if flop:
            benchmark.extra_info["GFLOP/s"] = round(flop / seconds / 1e9, 1)

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """The machine, versions and commit go into the kept JSON."""
    machine_info["lookagain"] = machine()
