"""Times of GPU work: calls captured in CUDA graphs, measured by events, the caches kept cold."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lookagain_ext.bench.measure import Comparison, machine

Call = Callable[..., object]
LEAST_CALLS = 16  # in a graph
L2_BYTES = 256 * 2**20  # inputs of this size in turn leave nothing of a call in any cache


def candidate(call: Call, inputs: Sequence[tuple]) -> Callable[[], float]:
    """A call that returns the seconds of one execution, without Python's part in it.

    The call is captured for each of `inputs` in turn, so that no execution finds its inputs in the
    cache, and often enough that starting the graph does not count. On a CPU it is simply called.

    Raises:
        RuntimeError: if the call cannot be captured.
    """
    inputs = list(inputs)
    if not torch.cuda.is_available() or not _on_gpu(inputs[0]):
        return lambda: _wall(call, inputs)
    inputs *= -(-LEAST_CALLS // len(inputs))
    graph = _capture(call, inputs)
    return _timed(graph.replay, len(inputs))  # the bound method keeps the capture's memory


def _timed(play: Callable[[], object], calls: int = 1) -> Callable[[], float]:
    """Seconds of one of the `calls` that `play` starts."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run() -> float:
        first.record()
        play()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / calls

    return run


def compare(calls: dict[str, Callable[[], float]], seconds: float) -> Comparison:
    """The candidates in turn for about so many seconds."""
    return Comparison(calls, budget=seconds, least=15)


def copies(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """As many copies of the inputs as no cache holds; at least two, at most 32."""
    size = sum(x.numel() * x.element_size() for x in tensors)
    count = min(32, max(2, -(-L2_BYTES // max(size, 1))))
    if not tensors[0].is_cuda:
        count = 2
    return [tensors, *(tuple(x.clone() for x in tensors) for _ in range(count - 1))]


def copy_bandwidth(device: torch.device, megabytes: int = 2048) -> Callable[[], float]:
    """Seconds to copy a buffer on the device; it moves twice its size."""
    if device.type == "cpu":
        megabytes = 16
    source = torch.empty(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    if device.type == "cuda":
        # Not captured: a graph may copy with an engine that is slower than the multiprocessors.
        run = _timed(lambda: target.copy_(source))
    else:
        run = candidate(lambda: target.copy_(source), [()])
    run.bytes = 2 * source.numel()
    return run


def describe(device: torch.device) -> dict[str, object]:
    """What a measured number depends on."""
    where = machine()
    where["benchmark_time"] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    if device.type != "cuda":
        return where
    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )
    except (OSError, subprocess.CalledProcessError):
        driver = []
    return where | {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory": properties.total_memory,
        "driver": driver,
        "cuda": torch.version.cuda,
    }


def _on_gpu(inputs: tuple) -> bool:
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    return not tensors or tensors[0].is_cuda


def _wall(call: Call, inputs: Sequence[tuple]) -> float:
    begin = time.perf_counter()
    for each in inputs:
        call(*each)
    return (time.perf_counter() - begin) / len(inputs)


def _capture(call: Call, inputs: Sequence[tuple]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            for each in inputs[:2]:
                call(*each)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in inputs:
            call(*each)
    return graph
