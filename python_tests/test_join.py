"""Two results of attention under one softmax become one: the CUDA kernel against float64."""

from __future__ import annotations

import math

import emulated
import pytest
import torch

from lookagain_ext.ops import _cuda

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(params=["emulated", "cuda"])
def device(request, monkeypatch) -> torch.device:
    if request.param == "emulated":
        emulated.install(monkeypatch)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


def rows(queries, heads, size, dtype, device, width):
    """[queries, heads, size] within rows of `width` elements, NaN around them."""
    whole = torch.full((queries + 2, heads, width), torch.nan, dtype=dtype, device=device)
    inner = whole[1:-1, :, width - size :]
    return whole, inner.copy_(torch.randn(inner.shape).to(dtype))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("queries", "heads", "size", "width"),
    [
        (37, 7, 128, 128),
        (5, 3, 96, 104),
        (9, 2, 80, 81),  # rows at odd places: an element a thread
        (3, 4, 36, 36),
        (2, 1, 256, 256),
        (3, 2, 301, 301),
        (1, 1, 1, 1),
    ],
)
def test_both_results(queries, heads, size, width, dtype, device):
    torch.manual_seed(queries)
    whole, out = rows(queries, heads, size, dtype, device, width)
    _, part = rows(queries, heads, size, dtype, device, width)
    sums = torch.full((2, heads, queries + 3), torch.nan, device=device)
    lse, more = sums[:, :, 1:-2].copy_(3 * torch.randn(2, heads, queries))
    a, b = (x.double() for x in (lse, more))
    total = torch.logaddexp(a, b)
    first, second = ((x - total).exp().mT[..., None] for x in (a, b))
    expected = first * out.double() + second * part.double()
    other = part.clone(), more.clone()
    _cuda.join(out, lse, part, more)
    torch.testing.assert_close(lse.double(), total, rtol=1e-6, atol=1e-6)
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=limit, atol=limit / 4)
    assert torch.equal(part, other[0]) and torch.equal(more, other[1])
    assert whole[0].isnan().all() and whole[-1].isnan().all()
    assert whole[..., : width - size].isnan().all()
    assert sums[..., 0].isnan().all() and sums[..., -2:].isnan().all()


def test_where_one_or_both_saw_nothing(device):
    """Its log-sum-exp is -inf, and what it holds then has no weight."""
    out, part = torch.ones(3, 2, 8, device=device), torch.full((3, 2, 8), 5.0, device=device)
    nothing, some = -math.inf, 700.0  # far beyond what exp can hold
    lse = torch.tensor([[some, nothing, nothing]] * 2, device=device)
    more = torch.tensor([[nothing, some, nothing]] * 2, device=device)
    _cuda.join(out, lse, part, more)
    assert lse.tolist() == [[some, some, nothing]] * 2
    assert (out[0] == 1).all() and (out[1] == 5).all() and (out[2] == 0).all()


@pytest.mark.parametrize("shape", [(0, 2, 8), (3, 0, 8)])
def test_nothing_to_join(shape, device):
    out = torch.zeros(shape, device=device)
    lse = torch.zeros(shape[1], shape[0], device=device)
    _cuda.join(out, lse, out.clone(), lse.clone())
