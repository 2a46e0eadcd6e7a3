"""The ops on FakeTensors and under make_fx: the right shapes, and graphs that compute."""

from __future__ import annotations

import pytest
import torch
from cases import Case, Problem
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lookagain_ext import VisualContext, ops


def arguments(problem: Problem) -> tuple:
    visual = problem.visual
    fields = (visual.spans, visual.inv_freq, visual.shift, visual.start, visual.selected)
    mass = torch.zeros(2, 2, problem.max_visual)
    return (*problem[:3], *fields, mass, *problem.kwargs().values())


def attention(query, key, value, spans, inv_freq, shift, start, selected, mass, begin, length):
    visual = VisualContext(spans, inv_freq, shift, start, selected)
    limits = {"key_start": begin, "key_length": length}
    return ops.routed_attention(
        query, key, value, visual, **limits, visual_mass=mass, return_lse=True
    )


def mass(query, key, value, spans, inv_freq, shift, start, selected, mass, begin, length):
    visual = VisualContext(spans, inv_freq, shift, start, selected)
    rows = torch.stack([begin, length], -1)[:, None]
    return (ops.visual_mass(query, key, visual, rows, key_start=begin, key_length=length),)


def selection(query, key, value, spans, inv_freq, shift, start, selected, mass, begin, length):
    count = spans[..., 1].sum(-1, dtype=torch.int32)
    return (ops.select_visual_tokens(mass, 0.5, count),)


def append(query, key, value, spans, inv_freq, shift, start, selected, mass, begin, length):
    key, value, length = key.clone(), value.clone(), length // 2
    rows = begin < 0
    spans = torch.zeros_like(spans)
    ops.append_visual_(key, value, length, spans, begin, inv_freq, rows=rows)
    return key, value, length


def gradient(query, key, value, spans, inv_freq, shift, start, selected, mass, begin, length):
    inputs = [x.detach().requires_grad_() for x in (query, key, value)]
    rest = (spans, inv_freq, shift, start, selected, mass, begin, length)
    out, _ = attention(*inputs, *rest)
    return torch.autograd.grad(out.square().sum(), inputs)


CALLS = [attention, mass, selection, append, gradient]


def drawn(seed: int, queries: int) -> tuple:
    """The same shapes and visual tokens for every seed."""
    case = Case(queries=queries, keys=24, select=True, poison=False)
    problem, other = case.make(), case.but(seed=seed).make()
    return arguments(problem._replace(query=other.query, key=other.key, value=other.value))


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("call", CALLS)
def test_fake_tensors_have_the_shapes_of_real_ones(call, queries: int) -> None:
    real = drawn(0, queries)
    with FakeTensorMode() as mode:
        inside = call(*map(mode.from_tensor, real))
    outside = call(*map(mode.from_tensor, real))
    for exact, *fakes in zip(call(*real), inside, outside, strict=True):
        for fake in fakes:
            assert type(fake).__name__ == "FakeTensor"
            assert (fake.shape, fake.dtype) == (exact.shape, exact.dtype)
            strides = zip(fake.stride(), exact.stride(), exact.shape, strict=True)
            assert all(one == other for one, other, size in strides if size > 1)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("call", CALLS)
def test_a_traced_graph_computes_what_the_op_does(call, queries: int, mode: str) -> None:
    """On other values than those it was traced with, which the graph must not have kept."""
    graph = make_fx(call, tracing_mode=mode)(*drawn(0, queries))
    assert any("lookagain" in str(node.target) for node in graph.graph.nodes)
    for found, exact in zip(graph(*drawn(3, queries)), call(*drawn(3, queries)), strict=True):
        assert torch.equal(found, exact)
