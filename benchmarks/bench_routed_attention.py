"""routed_attention alone: decode, re-injections, visual mass, prefill and training.

pytest benchmarks/bench_routed_attention.py --benchmark-columns=median,iqr
pytest benchmarks/bench_routed_attention.py -k "decode and 32768" --benchmark-json=out.json
"""

from __future__ import annotations

import pytest
import torch

from lookagain_ext import ops
from lookagain_ext.bench.attention import sdpa_candidates
from lookagain_ext.bench.problems import MODELS, Problem, rotating

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.mark.parametrize("kernel", ["ours", "grouped", "expanded"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [4096, 32768])
@pytest.mark.parametrize("model", ["qwen2.5-vl-7b", "qwen3-vl-8b"])
def test_decode(measure, benchmark, model: str, keys: int, dtype: str, kernel: str) -> None:
    benchmark.group = f"decode {model} {dtype} L={keys}"
    problem = Problem(MODELS[model], DTYPES[dtype], keys)
    call = {"ours": ops.routed_attention, **sdpa_candidates(causal=False)}[kernel]
    buffers = problem.buffers()
    expected = sdpa_candidates(causal=False)["expanded"](*buffers[0])
    torch.testing.assert_close(call(*buffers[0]), expected, atol=2e-2, rtol=2e-2)
    flop = 4 * problem.shape.query_heads * keys * problem.shape.head_dim
    measure(rotating(call, buffers), bytes=problem.cache_bytes, flop=flop, problem=problem)


@pytest.mark.parametrize("mass", [False, True], ids=["plain", "mass"])
@pytest.mark.parametrize("reinjections", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reinjections(measure, benchmark, dtype: str, reinjections: int, mass: bool) -> None:
    benchmark.group = f"decode with COPY of 1024 in 4096, {dtype}"
    shape = MODELS["qwen2.5-vl-7b"]
    problem = Problem(shape, DTYPES[dtype], 4096, visual_tokens=1024, reinjections=reinjections)
    visual = problem.visual()
    buffer = torch.zeros(1, shape.key_heads, 1024) if mass else None
    call = rotating(
        lambda q, k, v: ops.routed_attention(q, k, v, visual, visual_mass=buffer),
        problem.buffers(),
    )
    measure(call, bytes=problem.cache_bytes, problem=problem)


@pytest.mark.parametrize("kernel", ["ours", "grouped", "expanded"])
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill(measure, benchmark, dtype: str, training: bool, kernel: str) -> None:
    length = 1024
    benchmark.group = f"prefill {dtype} L={length} {'training' if training else 'forward'}"
    problem = Problem(MODELS["qwen2.5-vl-7b"], DTYPES[dtype], length, queries=length)
    call = {"ours": ops.routed_attention, **sdpa_candidates(causal=True)}[kernel]
    inputs = [x.requires_grad_(training) for x in problem.tensors()]

    def step() -> None:
        out = call(*inputs)
        if training:
            torch.autograd.grad(out.sum(), inputs)

    heads, size = problem.shape.query_heads, problem.shape.head_dim
    flop = int(2 * heads * size * length**2 * (3.5 if training else 1))
    measure(step, flop=flop, problem=problem)
