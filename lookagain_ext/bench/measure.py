"""Timing that holds on a shared machine: candidates take turns, ratios are taken per round."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

Candidate = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, over the rounds of a comparison."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """The 20th, 50th and 80th percentile."""
        if len(seconds) == 1:
            return cls(*seconds * 3)
        cuts = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(cuts[1], statistics.median(seconds), cuts[7])


class Comparison:
    """Interleaved timings of several candidates for the same work.

    Args:
        candidates: name -> a call that does the work once. It may return the seconds that count,
            as a float; otherwise the whole call counts.
        budget: seconds to spend; at least `least` rounds are made.
        least: smallest number of rounds.
    """

    def __init__(
        self, candidates: dict[str, Candidate], budget: float = 2.0, least: int = 5
    ) -> None:
        for call in candidates.values():
            call()
        self.seconds: dict[str, list[float]] = {name: [] for name in candidates}
        names = list(candidates)
        gc_was_on = gc.isenabled()
        gc.disable()
        try:
            begin = time.perf_counter()
            rounds = 0
            while rounds < least or time.perf_counter() - begin < budget:
                turn = rounds % len(names)
                for name in names[turn:] + names[:turn]:
                    call = candidates[name]
                    started = time.perf_counter()
                    result = call()
                    seconds = time.perf_counter() - started
                    self.seconds[name].append(result if isinstance(result, float) else seconds)
                rounds += 1
        finally:
            if gc_was_on:
                gc.enable()

    def timing(self, name: str) -> Timing:
        """Percentiles of one candidate."""
        return Timing.of(self.seconds[name])

    def ratio(self, name: str, baseline: str) -> Timing:
        """Percentiles of seconds(name) / seconds(baseline), taken round by round."""
        pairs = zip(self.seconds[name], self.seconds[baseline], strict=True)
        return Timing.of([a / b for a, b in pairs])

    def fastest(self, *names: str) -> str:
        """The candidate with the smallest median."""
        return min(names, key=lambda name: self.timing(name).p50)


@dataclass
class Row:
    """One line of the table: what was measured, against what, the goal and the outcome."""

    name: str
    against: str
    ratio: float | None  # of times, ours / baseline; None: not measured, the note says why
    p20: float | None
    p80: float | None
    milliseconds: float | None
    goal: str
    met: bool | None  # None: no goal
    note: str = ""

    @classmethod
    def left_out(cls, name: str, against: str, why: str) -> Row:
        """A comparison that could not be made."""
        return cls(name, against, None, None, None, None, "", None, f"not measured: {why}")

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def read_bandwidth(megabytes: int = 512) -> Candidate:
    """A call that reads a buffer far larger than the caches once, and its size in bytes."""
    buffer = torch.ones(megabytes * 2**20 // 8, dtype=torch.int64)
    return buffer.sum


def machine() -> dict[str, object]:
    """What a measured number depends on."""
    from .._native import build_info

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        model = " ".join(
            f"{name} {fields[key]}" if name else fields[key]
            for name, key in (("", "model name"), ("family", "cpu family"), ("model", "model"))
            if key in fields
        )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lookagain_ext": build_info(),
        "commit": _commit(),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }


def _commit() -> str | None:
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
