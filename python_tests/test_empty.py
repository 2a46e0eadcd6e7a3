"""Sizes of zero: no rows, heads, queries, keys, visual tokens or ranges."""

from __future__ import annotations

import pytest
import torch
from cases import Case

from lookagain_ext import VisualContext, ops, reference
from lookagain_ext.ops import _cuda_many

SIZES = ["batch", "groups", "queries", "keys", "visual"]


def empty_problem(zero: str, queries: int, device, dtype=torch.float32):
    """A problem of two rows and two key heads, one of its sizes zero."""
    case = Case(queries=queries, keys=24, again=1, ragged=False, poison=False, dtype=dtype)
    problem = case.make(device)
    query, key, value, visual = problem[:4]
    fields = [visual.spans, visual.inv_freq, visual.shift, visual.start]
    mass = torch.zeros(2, 2, problem.max_visual, device=device)
    if zero == "batch":
        query, key, value, mass = (x[:0] for x in (query, key, value, mass))
        fields = [x if x.dim() == 1 else x[:0] for x in fields]
    elif zero == "groups":
        query = query[:, :0]
    elif zero == "queries":
        query = query[:, :, :0]
    elif zero in ("keys", "visual"):
        fields[0], mass = fields[0][:, :0], mass[..., :0]
        if zero == "keys":
            key, value = key[:, :, :0], value[:, :, :0]
    return query, key, value, VisualContext(*fields), mass


def compare(zero: str, grad: bool, queries: int, device, dtype) -> None:
    *tensors, visual, mass = empty_problem(zero, queries, device, dtype)
    results = []
    for module in (ops, reference):
        inputs = [x.clone().requires_grad_(grad) for x in tensors]
        seen = mass.clone()
        out, lse = module.routed_attention(*inputs, visual, visual_mass=seen, return_lse=True)
        grads = ()
        if grad:
            out.sum().backward()
            grads = (x.grad for x in inputs)
        results.append([out.detach(), lse.detach(), seen, *grads])
    exact = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **exact)


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("zero", SIZES)
def test_attention(zero: str, grad: bool, queries: int, device) -> None:
    compare(zero, grad, queries, device, torch.float32)


@pytest.mark.parametrize("choice", ["kernels", "library"])
@pytest.mark.parametrize("zero", SIZES)
def test_training_in_16_bits(zero: str, choice: str, device, monkeypatch) -> None:
    monkeypatch.setattr(_cuda_many, "choice", choice)
    compare(zero, True, 20, device, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("zero", [*SIZES, "ranges"])
def test_visual_mass(zero: str, dtype, device) -> None:
    named = "none" if zero == "ranges" else zero
    query, key, _, visual, _ = empty_problem(named, 20, device, dtype)
    number = 0 if zero == "ranges" else 3
    rows = torch.tensor([0, 24], dtype=torch.int32, device=device)
    rows = rows.expand(query.shape[0], number, 2)
    found = ops.visual_mass(query, key, visual, rows)
    exact = reference.visual_mass(query, key, visual, rows)
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-2)
    _, lse = ops.routed_attention(query, key, key, visual, return_lse=True)
    torch.testing.assert_close(ops.visual_mass(query, key, visual, rows, lse=lse), found)


@pytest.mark.parametrize("zero", ["batch", "visual", "heads"])
def test_append(zero: str, device) -> None:
    rows, heads = (0 if zero == "batch" else 2), (0 if zero == "heads" else 2)
    caches = [torch.randn(rows, heads, 9, 16, device=device) for _ in range(2)]
    before = [x.clone() for x in caches]
    length = torch.full((rows,), 4, dtype=torch.int32, device=device)
    spans = torch.tensor([0, 0 if zero == "visual" else 3], dtype=torch.int32, device=device)
    spans = spans.expand(rows, 1, 2)
    ops.append_visual_(*caches, length, spans, length.clone(), torch.ones(8, device=device))
    assert length.tolist() == [7 if zero == "heads" else 4] * rows
    assert all(torch.equal(*pair) for pair in zip(caches, before, strict=True))
