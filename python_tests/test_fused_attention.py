"""Many queries on a GPU by way of torch's fused attention: what those operators are given.

On the emulated GPU, with operators that stand in for the libraries' (`fused_stand_ins`).
"""

from __future__ import annotations

import math
from itertools import pairwise

import emulated
import pytest
import torch
from cases import Case
from fused_stand_ins import StandIns
from test_packing import Packed
from test_prefill_backward import SHAPES, compare, differentiate
from torch._subclasses.fake_tensor import FakeTensorMode

from lookagain_ext import ops, reference
from lookagain_ext.ops import _cuda, _cuda_many, _cuda_training
from lookagain_ext.ops import _fused_attention as library

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[math.inf, -math.inf], ids=["torch's own", "version 3"])
def fused(request, monkeypatch):
    """The stand-ins, and tensors that the libraries would take."""
    emulated.install(monkeypatch)
    monkeypatch.setattr(
        library, "_is_fused", lambda x: x.dtype in library.HALVES and x.shape[-1] % 8 == 0
    )
    monkeypatch.setattr(library, "_capability", lambda index: (8, 0))
    stand_ins = StandIns(request.param)
    yield stand_ins
    stand_ins.remove()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_against_the_specification(case, dtype, fused) -> None:
    compare(case.but(dtype=dtype, poison=False).make())
    assert fused.calls["flash forward"] == fused.calls["flash backward"] >= 1


@pytest.mark.parametrize("again", [0, 2])
def test_cudnn_takes_what_is_square(again, fused, monkeypatch) -> None:
    """Re-injections go through FlashAttention all the same."""
    monkeypatch.setattr(library, "_capability", lambda index: (9, 0))
    case = Case(queries=128, keys=128, size=64, again=again, ragged=False, poison=False)
    compare(case.but(dtype=torch.bfloat16).make())
    both = {"forward": 1, "backward": 1}
    expected = {f"cudnn {way}": n for way, n in both.items()}
    expected |= {f"flash {way}": n for way, n in both.items() if again}
    assert fused.calls == expected


def test_rows_that_see_nothing(fused) -> None:
    """A row without a key, and one with fewer keys than queries: zeros, -inf, no gradients."""
    problem = Case(queries=20, keys=24, again=0, poison=False, dtype=torch.bfloat16).make()
    problem = problem._replace(
        visual=None,
        key_start=torch.zeros(2, dtype=torch.int32),
        key_length=torch.tensor([0, 7], dtype=torch.int32),
    )
    out, lse, *grads = differentiate(ops.routed_attention, problem)
    for row, nothing in enumerate([20, 13]):
        assert (out[row, :, :nothing] == 0).all() and (lse[row, :, :nothing] == -math.inf).all()
        assert (grads[0][row, :, :nothing] == 0).all()
    for x in (out, *grads):
        assert x[1].isfinite().all() and x[1].any()
    assert not any(x[0].any() for x in grads)
    expected = differentiate(reference.routed_attention, problem.double())
    torch.testing.assert_close(lse.double(), expected[1].double(), rtol=1e-3, atol=1e-3)


def test_packed_sequences_are_one_call(fused) -> None:
    packed = Packed("cpu", torch.bfloat16)
    heads = [x.requires_grad_() for x in packed.heads]
    out = ops.routed_attention(*heads, packed.visual, cu_seqlens=packed.cu_seqlens)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, heads, upstream)
    assert fused.calls == {"flash forward": 2, "flash backward": 2}
    for number, (begin, end) in enumerate(pairwise(packed.cu_seqlens.tolist())):
        alone, visual = packed.alone(number)
        exact = [x.detach().double().requires_grad_() for x in alone]
        expected = reference.routed_attention(*exact, visual)
        wanted = torch.autograd.grad(expected, exact, upstream[:, :, begin:end].double())
        for found, right in zip((out, *grads), (expected, *wanted), strict=True):
            torch.testing.assert_close(found[:, :, begin:end].double(), right, rtol=2e-2, atol=2e-2)


def displaced(x, gap, offset):
    """The same numbers `offset` elements behind a boundary, rows `gap` longer than they need be."""
    shape = (*x.shape[:3], x.shape[3] + gap)
    flat = torch.zeros(math.prod(shape) + offset, dtype=x.dtype)
    return flat[offset:].view(shape)[..., : x.shape[3]].copy_(x)


@pytest.mark.parametrize("way", ["flash", "cudnn", "kernels"])
@pytest.mark.parametrize(("gap", "offset"), [(4, 0), (0, 4), (8, 4)])
def test_rows_that_cannot_be_read_as_they_lie_are_copied(
    gap, offset, way, fused, monkeypatch
) -> None:
    """Also a gradient that is contiguous, but begins elsewhere."""
    monkeypatch.setattr(library, "_capability", lambda index: (9, 0) if way == "cudnn" else (8, 0))
    monkeypatch.setattr(_cuda_many, "choice", "kernels" if way == "kernels" else "library")
    case = Case(queries=128, keys=128, size=64, ragged=False, poison=False, again=1)
    problem = case.but(dtype=torch.bfloat16).make()
    upstream = torch.randn_like(problem.query)
    results = []
    for move in (lambda x: x.detach().clone(), lambda x: displaced(x, gap, offset)):
        heads = problem[:3] if way == "kernels" else [move(x) for x in problem[:3]]
        inputs = [x.detach().requires_grad_() for x in heads]
        out = ops.routed_attention(*inputs, problem.visual)
        results.append((out, *torch.autograd.grad(out, inputs, move(upstream))))
    assert all(map(torch.equal, *results))
    ran = {"kernels": set(), "flash": {"flash forward", "flash backward"}}
    ran["cudnn"] = ran["flash"] | {"cudnn forward", "cudnn backward"}
    assert set(fused.calls) == ran[way]


LAYOUTS = {
    "of models": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "heads first": lambda x: x.contiguous(),
    "with gaps": lambda x: x.new_zeros(*x.shape[:3], 48)[..., :40].copy_(x),
}


@pytest.mark.parametrize("choice", ["kernels", "library"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_code_is_told_the_strides(layout, choice, fused, monkeypatch) -> None:
    """A compiler plans with what the fakes say and does not look again."""
    monkeypatch.setattr(_cuda_many, "choice", choice)
    case = Case(queries=20, keys=24, size=40, poison=False, dtype=torch.bfloat16)
    query, key, value, visual, *limits = case.make()[:6]
    heads = [LAYOUTS[layout](x) for x in (query, key, value)]
    fields = (*limits, visual.spans, visual.inv_freq, visual.shift, visual.start, None)
    forward, backward = (
        getattr(torch.ops.lookagain, f"routed_attention{end}") for end in ("", "_backward")
    )
    real = forward(*heads, *fields, 0.2)
    real += backward(torch.randn_like(real[0]), *real, *heads, *fields, 0.2)
    with FakeTensorMode() as mode:
        fake = [None if x is None else mode.from_tensor(x) for x in (*heads, *fields)]
        told = forward(*fake, 0.2)
        told += backward(torch.randn_like(told[0]), *told, *fake, 0.2)
    assert [x.stride() for x in real] == [x.stride() for x in told]
    assert fused.calls == ({} if choice == "kernels" else {"flash forward": 2, "flash backward": 2})


def test_a_compiled_training_step_that_is_captured(fused, monkeypatch) -> None:
    """Forward and backward by our own kernels, which read nothing on the host."""
    monkeypatch.setattr(_cuda, "is_capturing", lambda tensor: True)
    asked = []
    monkeypatch.setattr(_cuda_training, "read_layout", lambda *arguments: asked.append(arguments))
    launch = _cuda.launch_many_queries
    monkeypatch.setattr(
        _cuda,
        "launch_many_queries",
        lambda *arguments: (
            asked.append("backward" if arguments[5] else "forward"),
            launch(*arguments),
        ),
    )
    problem = Case(queries=20, keys=24, poison=False, dtype=torch.bfloat16).make()
    compiled = torch.compile(ops.routed_attention, fullgraph=True, backend="aot_eager")
    inputs = [x.detach().requires_grad_() for x in problem[:3]]
    out = compiled(*inputs, problem.visual, **problem.kwargs())
    torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert asked == ["forward", "backward"] and not fused.calls


def test_layouts_are_not_remembered_in_compiled_code(fused) -> None:
    """It writes to a tensor again without a trace that a cache could see."""
    problem = Case(queries=20, keys=24, poison=False, dtype=torch.bfloat16, ragged=False).make()
    inputs = [x.detach().requires_grad_() for x in problem[:3]]
    length = problem.key_length.clone()
    visual = problem.visual
    fields = (None, length, visual.spans, visual.inv_freq, visual.shift, visual.start, None)
    results = []
    for filled in (24, 21):
        length.data.fill_(filled)
        length = length.detach()
        out, _ = torch.ops.lookagain.routed_attention(*inputs, *fields, 0.2)
        grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
        limits = {"key_length": torch.full((2,), filled, dtype=torch.int32)}
        again = ops.routed_attention(*inputs, visual, scale=0.2, **limits)
        results.append((out, *grads))
        expected = (again, *torch.autograd.grad(again, inputs, torch.ones_like(again)))
        assert all(map(torch.equal, results[-1], expected))
    assert not torch.equal(results[0][2], results[1][2])
