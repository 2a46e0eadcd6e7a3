"""visual_mass over ranges of queries against physically appended rows."""

from __future__ import annotations

import pytest
import torch
from cases import DECODE, PREFILL, Case, Problem
from physical import assert_as_accurate_as, attend

from lookagain_ext import ops, reference


def ranges(problem: Problem) -> torch.Tensor:
    """Three ranges a row: all queries, the last one, none."""
    end = problem.key_length
    none = torch.zeros_like(end)
    pairs = [(none, end), (end - 1, end), (end, end)]
    return torch.stack([torch.stack(pair, -1) for pair in pairs], 1)


@pytest.mark.parametrize("with_lse", [True, False])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("case", [DECODE[2], DECODE[4], *PREFILL], ids=str)
def test_ranges(case: Case, dtype: torch.dtype, with_lse: bool, device: torch.device) -> None:
    problem = case.but(dtype=dtype).make(device)
    rows, lse = ranges(problem), None
    if with_lse:
        _, lse = ops.routed_attention(*problem[:4], **problem.kwargs(), return_lse=True)
    arguments = (problem.query, problem.key, problem.visual, rows)
    found = ops.visual_mass(*arguments, **problem.kwargs(), lse=lse)
    assert found.shape == (case.batch, 3, case.kv_heads, problem.max_visual)
    cpu = Problem(*(x if isinstance(x, int) else x.to("cpu") for x in problem))
    for number, first in enumerate((rows[:, 0, 0], rows[:, 1, 0])):
        counted = cpu._replace(mass_from=first.cpu())
        exact = attend(counted, dtype=torch.float64).mass
        eager = attend(counted, dtype=dtype).mass
        assert_as_accurate_as(found[:, number].cpu(), exact, eager, f"mass of range {number}")
    assert torch.equal(found[:, 2], torch.zeros_like(found[:, 2]))


def test_equals_the_mass_of_routed_attention(device: torch.device) -> None:
    problem = PREFILL[1].make(device)
    mass = torch.zeros(2, 2, problem.max_visual, device=device)
    _, lse = ops.routed_attention(
        *problem[:4], **problem.kwargs(), visual_mass=mass, return_lse=True
    )
    found = ops.visual_mass(
        problem.query, problem.key, problem.visual, ranges(problem), **problem.kwargs(), lse=lse
    )
    torch.testing.assert_close(found[:, 0], mass, atol=1e-5, rtol=1e-5)


def test_mass_is_probability(device: torch.device) -> None:
    """When every key is visual, each query's mass sums to the number of heads of the group."""
    problem = Case(batch=1, groups=3, queries=20, keys=20, ragged=False, again=2).make(device)
    spans = torch.tensor([[[0, 20], [20, 0]]], dtype=torch.int32, device=device)
    visual = type(problem.visual)(
        spans, problem.visual.inv_freq, problem.visual.shift, problem.visual.start
    )
    rows = torch.tensor([[[0, 20], [7, 9]]], dtype=torch.int32, device=device)
    found = ops.visual_mass(problem.query, problem.key, visual, rows)
    expected = torch.tensor([[[60.0, 60.0], [6.0, 6.0]]], device=device)
    torch.testing.assert_close(found.sum(-1), expected, atol=1e-4, rtol=1e-5)


def test_repeats_are_bit_identical(device: torch.device) -> None:
    problem = PREFILL[2].make(device)
    arguments = (problem.query, problem.key, problem.visual, ranges(problem))
    first = ops.visual_mass(*arguments, **problem.kwargs())
    for _ in range(3):
        assert torch.equal(first, ops.visual_mass(*arguments, **problem.kwargs()))


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_do_not_change_a_bit(threads: int, set_threads) -> None:
    problem = PREFILL[2].make()
    arguments = (problem.query, problem.key, problem.visual, ranges(problem))
    set_threads(1)
    alone = ops.visual_mass(*arguments, **problem.kwargs())
    set_threads(threads)
    assert torch.equal(ops.visual_mass(*arguments, **problem.kwargs()), alone)


def test_specification_agrees() -> None:
    problem = PREFILL[3].but(dtype=torch.float64).make()
    arguments = (problem.query, problem.key, problem.visual, ranges(problem))
    exact = reference.visual_mass(*arguments, **problem.kwargs())
    found = ops.visual_mass(*arguments, **problem.kwargs())
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("queries", [9, 30])
def test_queries_before_the_first_key_are_not_counted(queries: int) -> None:
    """Where L_q > key_length they may see a re-injection that began before key 0."""
    problem = Case(queries=queries, keys=6, again=1, ragged=False, poison=False).make()
    fields = (problem.visual.spans, problem.visual.inv_freq, problem.visual.shift)
    visual = type(problem.visual)(*fields, torch.full((2, 1), -40, dtype=torch.int32))
    masses = []
    for call, grad in (
        (ops.routed_attention, False),
        (ops.routed_attention, True),
        (reference.routed_attention, False),
    ):
        masses.append(torch.zeros(2, 2, problem.max_visual))
        query = problem.query.clone().requires_grad_(grad)
        call(query, *problem[1:3], visual, visual_mass=masses[-1])
    assert masses[0].sum() > 0
    for other in masses[1:]:
        torch.testing.assert_close(masses[0], other)
