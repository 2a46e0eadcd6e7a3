"""The ops under torch.library.opcheck and torch.compile(fullgraph=True)."""

from __future__ import annotations

import pytest
import torch
from cases import Case
from paging import page, paged_problem

from lookagain_ext import VisualContext, ops
from lookagain_ext._native import _use_kernels, native, use_kernels


def flat(problem) -> tuple:
    visual = problem.visual
    fields = (visual.spans, visual.inv_freq, visual.shift, visual.start, visual.selected)
    tensors = (problem.query, problem.key, problem.value)
    return (*tensors, problem.key_start, problem.key_length, *fields)


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_attention(queries: int, grad: bool) -> None:
    problem = Case(queries=queries, keys=24, select=True, poison=False).make()
    arguments = [x.clone() if x is not None else None for x in flat(problem)]
    if grad:
        arguments[:3] = [x.requires_grad_() for x in arguments[:3]]
    torch.library.opcheck(torch.ops.lookagain.routed_attention.default, (*arguments, 0.2))


def test_opcheck_mass() -> None:
    problem = Case(keys=24, select=True, poison=False).make()
    mass = torch.zeros(2, 2, problem.max_visual)
    arguments = (*flat(problem), mass, problem.mass_from, 0.2)
    torch.library.opcheck(torch.ops.lookagain.routed_attention_mass_.default, arguments)
    rows = torch.tensor([[[0, 24]], [[2, 9]]], dtype=torch.int32)
    query, key, _, start, length, *fields = flat(problem)
    arguments = (query, key, rows, problem.max_visual, None, start, length, *fields, 0.2)
    torch.library.opcheck(torch.ops.lookagain.visual_mass.default, arguments)


def test_opcheck_selection_and_append() -> None:
    count = torch.tensor([9, 5], dtype=torch.int32)
    arguments = (torch.rand(2, 9), 0.5, count)
    torch.library.opcheck(torch.ops.lookagain.select_visual_tokens.default, arguments)
    cache = torch.randn(2, 2, 30, 16)
    length = torch.tensor([12, 9], dtype=torch.int32)
    spans = torch.tensor([[[0, 5]], [[2, 3]]], dtype=torch.int32)
    shift, inv_freq = torch.tensor([3, 4], dtype=torch.int32), torch.rand(8)
    arguments = (cache, cache.clone(), length, spans, shift, inv_freq, None, None)
    torch.library.opcheck(torch.ops.lookagain.append_visual_.default, arguments)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_choice_of_kernels_is_a_constant_of_compiled_code(kind: str) -> None:
    """Tracing it would follow the import of the extension, which does not compile."""
    native.cache_clear()
    _use_kernels.cache_clear()

    def step(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if use_kernels(kind) else x

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(3)), step(torch.zeros(3)))


@pytest.mark.parametrize("queries", [1, 20])
def test_compiled_forward_is_eager(queries: int, device: torch.device) -> None:
    problem = Case(queries=queries, keys=24, select=True).make(device)

    def step(query, key, value, visual: VisualContext, mass, start, length):
        out = ops.routed_attention(
            query * 1.5, key, value, visual, key_start=start, key_length=length, visual_mass=mass
        )
        return out + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    masses = [torch.zeros(2, 2, problem.max_visual, device=device) for _ in range(2)]
    results = [
        run(*problem[:4], mass, problem.key_start, problem.key_length)
        for run, mass in zip((step, compiled), masses, strict=True)
    ]
    assert torch.equal(*results)
    assert torch.equal(*masses)
    assert masses[0].sum() > 0


def test_compiled_gradients_are_eager(device: torch.device) -> None:
    problem = Case(queries=20, keys=24, poison=False).make(device)

    def loss(query, key, value):
        return ops.routed_attention(query, key, value, problem.visual).square().sum()

    grads = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        inputs = [x.clone().requires_grad_() for x in problem[:3]]
        grads.append(torch.autograd.grad(run(*inputs), inputs))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_compiled_selection_and_append() -> None:
    def step(mass, count, key, value, length, spans, shift, inv_freq):
        chosen = ops.select_visual_tokens(mass, 0.5, count)
        ops.append_visual_(key, value, length, spans, shift, inv_freq, selected=chosen)
        return chosen

    spans = torch.tensor([[[0, 5]], [[2, 3]]], dtype=torch.int32)
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        draw = torch.Generator().manual_seed(0)
        key = torch.randn(2, 2, 30, 16, generator=draw)
        value, length = key * 2, torch.tensor([12, 9], dtype=torch.int32)
        mass, count = torch.rand(2, 5, generator=draw), torch.tensor([5, 3], dtype=torch.int32)
        shift = torch.tensor([3, 4], dtype=torch.int32)
        chosen = run(mass, count, key, value, length, spans, shift, torch.ones(8))
        results.append((chosen, key, value, length))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert results[0][3].tolist() == [15, 11]


@pytest.mark.parametrize("queries", [1, 20])
def test_opcheck_paged(queries: int) -> None:
    problem, table = paged_problem(Case(queries=queries, keys=24, select=True).make(), 8)
    for op, mass in (
        (torch.ops.lookagain.routed_attention.default, ()),
        (
            torch.ops.lookagain.routed_attention_mass_.default,
            (torch.zeros(2, 2, problem.max_visual), problem.mass_from),
        ),
    ):
        torch.library.opcheck(op, (*flat(problem), *mass, 0.2, table))


def test_opcheck_paged_append() -> None:
    cache = torch.randn(9, 2, 8, 16)
    length = torch.tensor([12, 9], dtype=torch.int32)
    spans = torch.tensor([[[0, 5]], [[2, 3]]], dtype=torch.int32)
    shift, inv_freq = torch.tensor([3, 4], dtype=torch.int32), torch.rand(8)
    table = torch.tensor([[0, 3, 7], [2, 1, -1]], dtype=torch.int32)
    arguments = (cache, cache.clone(), length, spans, shift, inv_freq, None, None, table)
    torch.library.opcheck(torch.ops.lookagain.append_visual_.default, arguments)


@pytest.mark.parametrize("with_mass", [False, True])
@pytest.mark.parametrize("queries", [1, 20])
def test_compiled_paged_attention_is_eager(queries: int, with_mass: bool) -> None:
    problem, table = paged_problem(Case(queries=queries, keys=24, select=True).make(), 8)

    def step(query, key, value, visual: VisualContext, mass, start, length, table):
        limits = {"key_start": start, "key_length": length, "block_table": table}
        out = ops.routed_attention(query * 1.5, key, value, visual, visual_mass=mass, **limits)
        return out + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    masses = [torch.zeros(2, 2, problem.max_visual) if with_mass else None for _ in range(2)]
    results = [
        run(*problem[:4], mass, problem.key_start, problem.key_length, table)
        for run, mass in zip((step, compiled), masses, strict=True)
    ]
    assert torch.equal(*results)
    assert results[0].isfinite().all()
    if with_mass:
        assert torch.equal(*masses)
        assert masses[0].sum() > 0


def test_compiled_paged_append_is_eager() -> None:
    def step(key, value, length, spans, shift, inv_freq, table):
        ops.append_visual_(key, value, length, spans, shift, inv_freq, block_table=table)

    problem = Case(keys=30, ragged=False, poison=False).make()
    spans = torch.tensor([[[0, 5]], [[2, 3]]], dtype=torch.int32)
    shift = torch.tensor([3, 4], dtype=torch.int32)
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        limits = problem.key_start, problem.key_length
        paged = page(problem.key, problem.value, *limits, 8, room=8)
        length = problem.key_length.clone()
        run(*paged[:2], length, spans, shift, torch.ones(16), paged.block_table)
        results.append((*(x.nan_to_num(1e9) for x in paged[:2]), length))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert results[0][2].tolist() == [35, 33]


def test_a_paged_cache_has_no_gradient_in_the_op() -> None:
    problem, table = paged_problem(Case(keys=24).make(), 8)
    query, *rest = flat(problem)
    with pytest.raises(ValueError, match="block_table must be None where gradients are wanted"):
        torch.ops.lookagain.routed_attention(query.clone().requires_grad_(), *rest, 0.2, table)
