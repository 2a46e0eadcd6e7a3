"""Gradients of routed_attention: gradcheck, the specification's autograd, unread slots."""

from __future__ import annotations

import pytest
import torch
from cases import DECODE, PREFILL, Case, Problem
from physical import assert_as_accurate_as, attend
from torch import Tensor

from lookagain_ext import VisualContext, ops, reference

SMALL = [
    Case(batch=2, queries=3, keys=9, size=8, spans=2, again=3, select=True, poison=False),
    Case(batch=1, groups=3, queries=18, keys=20, size=8, spans=1, again=2, poison=False),
    Case(batch=2, queries=20, keys=20, size=16, rotary=8, again=0, poison=False),
]


def gradients(problem: Problem, attention) -> tuple[Tensor, ...]:
    inputs = [x.detach().clone().requires_grad_() for x in problem[:3]]
    out = attention(problem._replace(query=inputs[0], key=inputs[1], value=inputs[2]))
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out)
    return torch.autograd.grad((out * weight).sum(), inputs)


def ours(problem: Problem) -> Tensor:
    return ops.routed_attention(*problem[:4], **problem.kwargs())


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case: Case) -> None:
    problem = case.but(dtype=torch.float64).make()
    inputs = [x.clone().requires_grad_() for x in problem[:3]]
    assert torch.autograd.gradcheck(
        lambda q, k, v: ops.routed_attention(q, k, v, problem.visual, **problem.kwargs()), inputs
    )


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("case", [DECODE[2], DECODE[5], *PREFILL], ids=str)
def test_against_autograd_of_physical_append(
    case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    problem = case.but(dtype=dtype, poison=False).make(device)
    found = gradients(problem, ours)
    problem = Problem(*(x if isinstance(x, int) else x.to("cpu") for x in problem))
    exact = gradients(problem.double(), lambda p: attend(p, dtype=torch.float64).out)
    eager = gradients(problem, lambda p: attend(p, dtype=dtype).out)
    for name, a, b, c in zip(("query", "key", "value"), found, exact, eager, strict=True):
        assert_as_accurate_as(a.cpu(), b, c, f"gradient of {name}")


@pytest.mark.parametrize("case", [*SMALL, DECODE[2], DECODE[7], PREFILL[2]], ids=str)
def test_written_out_backward_is_autograd(case: Case) -> None:
    """`reference.routed_attention_backward`, which stands in where autograd does not reach."""
    problem = case.but(dtype=torch.float64, poison=False).make()
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(problem.query.shape, generator=draw, dtype=torch.float64)
    found = reference.routed_attention_backward(weight, *problem[:4], **problem.kwargs())
    leaves = [x.clone().requires_grad_() for x in problem[:3]]
    out = reference.routed_attention(*leaves, problem.visual, **problem.kwargs())
    for one, other in zip(found, torch.autograd.grad(out, leaves, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("queries", [2, 40])
def test_unread_slots_are_not_touched(queries: int, device: torch.device) -> None:
    """NaN in padding and past the end of a row: forward ignores it, its gradient is zero."""
    problem = Case(queries=queries, keys=60, again=2).make(device)
    _, grad_key, grad_value = gradients(problem, ours)
    for grad in (grad_key, grad_value):
        for row in range(2):
            start, length = int(problem.key_start[row]), int(problem.key_length[row])
            assert grad[row].isfinite().all()
            assert torch.equal(grad[row, :, length:], torch.zeros_like(grad[row, :, length:]))
            assert torch.equal(grad[row, :, :start], torch.zeros_like(grad[row, :, :start]))
            assert grad[row, :, start:length].abs().max() > 0


@pytest.fixture
def deterministic():
    """torch's deterministic algorithms, which gradients on a GPU go by."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_are_bit_identical(
    dtype: torch.dtype, device: torch.device, deterministic: None
) -> None:
    problem = PREFILL[2].but(dtype=dtype, poison=False).make(device)
    first = gradients(problem, ours)
    for _ in range(3):
        for one, other in zip(first, gradients(problem, ours), strict=True):
            assert torch.equal(one, other)


def test_key_gradient_holds_every_sighting(device: torch.device) -> None:
    """With one key seen again unturned n times, its gradient is that of the log(n + 1) bias."""
    problem = Case(batch=1, queries=1, keys=12, spans=1, again=0, ragged=False).make(device)
    spans = torch.tensor([[[4, 1]]], dtype=torch.int32, device=device)
    visual = VisualContext.from_spans(spans, problem.visual.inv_freq)
    for _ in range(3):
        visual = visual.reinject(torch.ones(1, dtype=torch.bool, device=device), 0, 6)

    def biased(p: Problem) -> Tensor:
        bias = torch.zeros(1, 12, device=device)
        bias[0, 4] = torch.log(torch.tensor(4.0))
        key, value = (x.repeat_interleave(2, 1) for x in (p.key, p.value))
        weight = (p.query @ key.mT * 32**-0.5 + bias).softmax(-1)
        return weight @ value

    found = gradients(problem._replace(visual=visual), ours)
    for one, other in zip(found, gradients(problem, biased), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_mass_beside_gradients(device: torch.device) -> None:
    """visual_mass is the same whether or not a gradient is wanted."""
    problem = PREFILL[1].make(device)
    plain, with_grad = (torch.zeros(2, 2, problem.max_visual, device=device) for _ in range(2))
    kwargs = problem.kwargs() | {"mass_from": problem.mass_from}
    ops.routed_attention(*problem[:4], **kwargs, visual_mass=plain)
    query = problem.query.clone().requires_grad_()
    out = ops.routed_attention(query, *problem[1:4], **kwargs, visual_mass=with_grad)
    torch.testing.assert_close(plain, with_grad, atol=1e-5, rtol=1e-5)
    assert out.requires_grad and plain.sum() > 0
