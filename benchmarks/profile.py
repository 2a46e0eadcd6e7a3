"""One kernel alone, for a profiler: its bytes, its FLOP, the limit, the share reached.

    python -m benchmarks.profile decode --batch 32 --keys 8192 --reinjections 4

prints the `ncu` line that looks closer.
"""

from __future__ import annotations

import sys
from enum import Enum
from typing import Annotated

import torch
import typer
from rich.console import Console

from lookagain_ext import ops
from lookagain_ext.bench.problems import MODELS, Problem

from .gpu_timing import candidate, compare, copies, copy_bandwidth

Kernel = Enum("Kernel", {name: name for name in ("decode", "append", "select")}, type=str)
KERNELS = {
    "decode": "regex:routed_attention_(decode|simt|combine)",
    "append": "regex:append_",
    "select": "regex:select_",
}


def main(
    kernel: Kernel,
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "qwen2.5-vl-7b",
    batch: int = 32,
    keys: int = 8192,
    queries: int = 1,
    visual: Annotated[int, typer.Option(help="Visual tokens of a row.")] = 1024,
    reinjections: int = 0,
    mass: Annotated[bool, typer.Option(help="With visual_mass.")] = False,
    dtype: str = "bfloat16",
    device: str = "cuda",
    seconds: float = 2.0,
) -> None:
    """Run one kernel and say how near its limit it comes."""
    console = Console(width=120, highlight=False)
    if shape not in MODELS:
        raise typer.BadParameter(f"must be one of {', '.join(MODELS)}, got {shape}")
    model, kind = MODELS[shape], getattr(torch, dtype)
    problem = Problem(model, kind, keys, queries, batch, min(visual, keys), reinjections)
    sizes = (
        (model.query_heads, queries, model.head_dim),
        *[(model.key_heads, keys + visual, model.head_dim)] * 2,
    )
    inputs = copies(tuple(torch.randn(batch, *size, dtype=kind, device=device) for size in sizes))
    context = problem.visual().to(device)
    length = torch.full((batch,), keys, dtype=torch.int32, device=device)
    grown, shift = length.clone(), length.clone()
    total = torch.zeros(batch, model.key_heads, problem.visual_tokens, device=device)
    counts = torch.full((batch,), problem.visual_tokens, dtype=torch.int32, device=device)

    def decode(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        ops.routed_attention(
            query, key, value, context, key_length=length, visual_mass=total if mass else None
        )

    def append(_: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        grown.copy_(length)
        ops.append_visual_(
            key, value, grown, context.spans, shift, context.inv_freq, check_room=False
        )

    def select(*_: torch.Tensor) -> None:
        ops.select_visual_tokens(total[:, 0], 0.5, counts)

    calls = {"decode": decode, "append": append, "select": select}
    copy = copy_bandwidth(torch.device(device))
    comparison = compare({"kernel": candidate(calls[kernel.value], inputs), "copy": copy}, seconds)
    moved, flop = work(kernel.value, problem, mass)
    took = comparison.timing("kernel").p50
    rate = copy.bytes / comparison.timing("copy").p50
    console.print(f"{kernel.value}: {shape}, {dtype}, batch {batch}, keys {keys}, on {device}")
    console.print(f"bytes       {moved / 1e6:.2f} MB")
    console.print(f"FLOP        {flop / 1e9:.3f} G, {flop / moved:.1f} a byte")
    console.print(f"time        {took * 1e6:.2f} us")
    console.print(f"rate        {moved / took / 1e9:.0f} GB/s, {flop / took / 1e12:.2f} TFLOP/s")
    console.print(f"limit       {moved / rate * 1e6:.2f} us at {rate / 1e9:.0f} GB/s copied")
    console.print(f"share       {moved / rate / took:.1%}")
    line = "ncu --set full --clock-control none --launch-skip 6 --launch-count 2"
    console.print(f"closer      {line} -k '{KERNELS[kernel.value]}' \\")
    console.print(f"            python -m benchmarks.profile {' '.join(sys.argv[1:])}")


def work(kernel: str, problem: Problem, mass: bool) -> tuple[int, int]:
    """Bytes that must be moved and FLOP that must be done by one call.

    Args:
        kernel: "decode", "append" or "select".
        problem: the shapes.
        mass: whether a decode gives the visual mass.
    """
    model, size = problem.shape, problem.dtype.itemsize
    if kernel == "append":
        elements = problem.batch * problem.visual_tokens * model.key_heads * model.head_dim
        return 4 * elements * size, 3 * elements
    if kernel == "select":
        return 5 * problem.batch * problem.visual_tokens, 0
    rows = problem.batch * model.query_heads * problem.queries
    moved = problem.cache_bytes + 2 * rows * model.head_dim * size
    if mass:
        moved += 8 * problem.batch * model.key_heads * problem.visual_tokens
    seen_again = problem.reinjections * problem.visual_tokens
    return moved, 2 * rows * model.head_dim * (2 * problem.keys + seen_again)


if __name__ == "__main__":
    typer.run(main)
