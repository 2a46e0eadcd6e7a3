"""select_visual_tokens: exact, deterministic at ties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lookagain_ext import ops


def chosen_by_sorting(mass: list[float], ratio: float, count: int) -> list[bool]:
    order = sorted(range(count), key=lambda j: (-mass[j], j))
    keep = set(order[: max(0, math.ceil(ratio * count - 1e-9))])
    return [j in keep for j in range(len(mass))]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_against_sorting(data: st.DataObject) -> None:
    batch, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 70))
    values = st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0, 1, width=32)
    rows = st.lists(values, min_size=width, max_size=width)
    mass = data.draw(st.lists(rows, min_size=batch, max_size=batch))
    count = data.draw(st.lists(st.integers(0, width), min_size=batch, max_size=batch))
    ratio = data.draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1))
    found = ops.select_visual_tokens(
        torch.tensor(mass), ratio, torch.tensor(count, dtype=torch.int32)
    )
    expected = [chosen_by_sorting(m, ratio, n) for m, n in zip(mass, count, strict=True)]
    assert found.tolist() == expected


def test_many_tokens(device: torch.device) -> None:
    draw = torch.Generator().manual_seed(0)
    mass = (torch.rand(3, 16384, generator=draw) * 100).round() / 100
    count = torch.tensor([16384, 9999, 1], dtype=torch.int32)
    found = ops.select_visual_tokens(mass.to(device), 0.3, count.to(device)).cpu()
    for row in range(3):
        assert found[row].tolist() == chosen_by_sorting(mass[row].tolist(), 0.3, int(count[row]))


def test_ties_go_to_the_lower_number(device: torch.device) -> None:
    mass = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]], device=device)
    found = ops.select_visual_tokens(mass, 0.4, torch.tensor([5], dtype=torch.int32, device=device))
    assert found.tolist() == [[False, True, True, False, False]]


def test_heads_are_summed(device: torch.device) -> None:
    mass = torch.tensor([[[3.0, 0.0, 1.0], [0.0, 2.0, 2.5]]], device=device)
    found = ops.select_visual_tokens(
        mass, 1 / 3, torch.tensor([3], dtype=torch.int32, device=device)
    )
    assert found.tolist() == [[False, False, True]]


@pytest.mark.parametrize(("ratio", "keep"), [(0.0, 0), (1.0, 10), (0.3, 3), (0.31, 4), (1e-12, 0)])
def test_number_kept(ratio: float, keep: int, device: torch.device) -> None:
    """ceil(ratio · n - 1e-9): 0.3 · 10 = 3.0000000000000004 in binary keeps 3, not 4."""
    mass = torch.rand(1, 12, device=device)
    found = ops.select_visual_tokens(
        mass, ratio, torch.tensor([10], dtype=torch.int32, device=device)
    )
    assert int(found.sum()) == keep
