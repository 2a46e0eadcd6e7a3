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

from lookagain_ext import ops, reference
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


@pytest.mark.parametrize("offset", [0, 4])
def test_rows_that_a_library_cannot_read_are_copied(offset, fused) -> None:
    """Rows 36 elements apart, or eight bytes off their boundary."""
    problem = Case(queries=20, keys=40, ragged=False, poison=False, dtype=torch.bfloat16).make()
    wide = [x.new_zeros(*x.shape[:3], 36 if offset == 0 else 40) for x in problem[:3]]
    moved = [x[..., offset : offset + 32].copy_(y) for x, y in zip(wide, problem, strict=False)]
    expected = differentiate(ops.routed_attention, problem)
    inputs = [x.detach().requires_grad_() for x in moved]
    out, lse = ops.routed_attention(*inputs, problem.visual, return_lse=True, **problem.kwargs())
    draw = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out)
    found = (out, lse, *torch.autograd.grad(out, inputs, upstream))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
