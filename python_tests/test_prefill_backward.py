"""The tiled prefill, its backward and visual_mass against the float64 specification.

Shapes are chosen around the tiles: panels of 12 (or 6) queries, 192 and 384 keys, vectors of 16
features, and both ways of sharing work (many heads, few heads) with several thread counts.
"""

from __future__ import annotations

import pytest
import torch
from cases import Case, Problem
from physical import assert_as_accurate_as
from torch import Tensor

from lookagain_ext import NEVER, VisualContext, ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

SHAPES = [
    Case(batch=1, kv_heads=1, groups=7, queries=17, keys=400, size=128, spans=3, again=2),
    Case(batch=1, kv_heads=3, groups=1, queries=193, keys=193, size=40, spans=1, again=1),
    Case(batch=2, kv_heads=1, groups=3, queries=60, keys=260, size=40, again=4, select=True),
    Case(batch=9, kv_heads=2, groups=2, queries=26, keys=33, size=16, spans=2, again=2),
    Case(batch=2, kv_heads=1, groups=16, queries=25, keys=33, size=16, rotary=8, again=3),
    Case(batch=1, kv_heads=1, groups=1, queries=385, keys=385, size=24, again=0),
]


def differentiate(attention, problem: Problem, **kwargs) -> list[Tensor]:
    """out, lse and the three gradients."""
    inputs = [x.detach().clone().requires_grad_() for x in problem[:3]]
    out, lse = attention(*inputs, problem.visual, return_lse=True, **problem.kwargs(), **kwargs)
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out)
    return [out.detach(), lse.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]


def compare(problem: Problem, **kwargs) -> None:
    found = differentiate(ops.routed_attention, problem, **kwargs)
    exact = differentiate(reference.routed_attention, problem.double(), **kwargs)
    eager = differentiate(rounded_attention, problem, **kwargs)
    names = ("out", "lse", "gradient of query", "gradient of key", "gradient of value")
    for name, a, b, c in zip(names, found, exact, eager, strict=True):
        assert_as_accurate_as(a, b, c, name)


class Rounded(torch.autograd.Function):
    """Rounds to a dtype in both directions, as every tensor of an eager computation is."""

    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype).to(grad.dtype), None


def rounded_attention(query, key, value, visual, *, return_lse, key_start, key_length, scale=None):
    """Eager attention in the dtype of its inputs: scores, probabilities and turned keys rounded."""
    dtype = query.dtype
    scores = reference._scores(query, key, visual, scale, key_start, key_length)
    logits = scores.logits
    if dtype in (torch.bfloat16, torch.float16):
        logits = Rounded.apply(logits, dtype)
    lse = reference._logsumexp(logits)
    probability = reference._probability(logits, lse)
    if dtype in (torch.bfloat16, torch.float16):
        probability = Rounded.apply(probability, dtype)
    rows = reference._readable(reference._accurate(value), scores)
    rows = reference._expand(rows, query.shape[1])
    if scores.sightings:
        seen = rows.gather(2, reference._index(scores.keys, rows))
        rows = torch.cat([rows, *[seen] * scores.sightings], dim=2)
    return (probability @ rows).to(dtype), lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_against_the_specification(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    compare(case.but(dtype=dtype, poison=False).make(device))


@pytest.mark.parametrize("size", [8, 24, 56, 136, 200, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_sizes(size: int, dtype: torch.dtype, device: torch.device) -> None:
    compare(Case(queries=30, keys=70, size=size, dtype=dtype, poison=False).make(device))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_scales(scale: float, device: torch.device) -> None:
    compare(Case(queries=20, keys=40, poison=False).make(device), scale=scale)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_and_repeats(threads: int) -> None:
    """The forward does not depend on the thread count; a repeat gives the same bits."""
    problem = Case(batch=1, kv_heads=2, queries=300, keys=300, again=2, poison=False).make()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = differentiate(ops.routed_attention, problem)
        torch.set_num_threads(threads)
        first, second = (differentiate(ops.routed_attention, problem) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first[:3], alone[:3], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first[3:], alone[3:], strict=True):
        torch.testing.assert_close(a, b)


def test_re_injection_that_starts_inside_a_panel() -> None:
    """Every start from before the first query to after the last, one query apart."""
    spans = torch.tensor([[[3, 20]]], dtype=torch.int32).expand(9, 1, 2)
    start = torch.tensor([[20], [28], [29], [35], [40], [41], [57], [58], [NEVER]])
    problem = Case(batch=9, queries=30, keys=58, again=0, ragged=False, poison=False).make()
    visual = VisualContext.from_spans(spans.contiguous(), problem.visual.inv_freq)
    visual = VisualContext(
        visual.spans, visual.inv_freq, torch.full((9, 1), 31, dtype=torch.int32), start.int()
    )
    compare(problem._replace(visual=visual))


@pytest.mark.parametrize("given", [True, False], ids=["lse given", "lse computed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES[:5], ids=str)
def test_visual_mass(case: Case, dtype: torch.dtype, given: bool) -> None:
    problem = case.but(dtype=dtype).make()
    query, key, _, visual = problem[:4]
    first = int(problem.key_length.min()) - case.queries
    edges = [(0, 10**9), (first + 1, first + 14), (first + 5, first + 5), (first + 13, 10**9)]
    rows = torch.tensor(edges, dtype=torch.int32).expand(case.batch, -1, -1).contiguous()
    kwargs = problem.kwargs()
    exact = reference.visual_mass(query.double(), key.double(), visual, rows, **kwargs)
    lse = ops.routed_attention(*problem[:4], return_lse=True, **kwargs)[1] if given else None
    found = ops.visual_mass(query, key, visual, rows, lse=lse, **kwargs)
    assert found.shape == exact.shape
    assert (found[:, 2] == 0).all()
    exact = exact.double()
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(dtype, 1e-5)
    assert float((found - exact).abs().max()) <= tolerance * float(exact.abs().max())
    assert torch.equal(found, ops.visual_mass(query, key, visual, rows, lse=lse, **kwargs))
