"""append_visual_ and select_visual_tokens alone.

pytest benchmarks/bench_reinjection.py
"""

from __future__ import annotations

import pytest
import torch

from lookagain_ext import ops, reference
from lookagain_ext.bench.problems import MODELS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", ["ours", "reference"])
@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_append(measure, benchmark, tokens: int, kernel: str, dtype: torch.dtype) -> None:
    benchmark.group = f"append {tokens} visual tokens, {dtype}"
    shape = MODELS["qwen2.5-vl-7b"]
    key = torch.randn(1, shape.key_heads, 8192 + tokens, shape.head_dim).to(dtype)
    value, filled = torch.randn_like(key), torch.tensor([8192], dtype=torch.int32)
    spans = torch.tensor([[[16, tokens]]], dtype=torch.int32)
    shift = torch.tensor([5000], dtype=torch.int32)
    inv_freq = 1e6 ** -(torch.arange(64) / 64)
    op = {"ours": ops.append_visual_, "reference": reference.append_visual_}[kernel]

    def call() -> None:
        op(key, value, filled.clone(), spans, shift, inv_freq)

    moved = 4 * tokens * shape.key_heads * shape.head_dim * dtype.itemsize
    measure(call, bytes=moved, tokens=tokens, shape=shape)


@pytest.mark.parametrize("kernel", ["ours", "reference"])
@pytest.mark.parametrize("tokens", [256, 1024, 16384])
def test_select(measure, benchmark, tokens: int, kernel: str) -> None:
    benchmark.group = f"select half of {tokens} visual tokens, batch 8"
    mass, count = torch.rand(8, tokens), torch.full((8,), tokens, dtype=torch.int32)
    op = {"ours": ops.select_visual_tokens, "reference": reference.select_visual_tokens}[kernel]
    measure(lambda: op(mass, 0.5, count), bytes=mass.nbytes, tokens=tokens)
