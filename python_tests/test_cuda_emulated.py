"""What only an emulated GPU shows of the CUDA kernels: how work is cut, in which order it runs.

The kernels' results are tested where the ops are, by the same bodies as on the CPU.
"""

from __future__ import annotations

from dataclasses import replace

import emulated
import pytest
import torch
from cases import Case, Problem
from physical import Answer, assert_as_accurate_as, attend


@pytest.fixture(autouse=True)
def small_device():
    """Four multiprocessors, so that small problems are cut into pieces."""
    emulated.device()
    yield
    emulated.device()


def run(problem: Problem, plan: list[int] | None = None) -> Answer:
    batch, heads, queries, size = problem.query.shape
    out = torch.full_like(problem.query, torch.nan).contiguous()
    lse = torch.full((batch, heads, queries), torch.nan)
    mass = torch.zeros(batch, problem.key.shape[1], problem.max_visual)
    visual = problem.visual
    emulated.launch_routed_attention(
        problem.query,
        problem.key,
        problem.value,
        out,
        lse,
        mass,
        problem.mass_from,
        problem.key_start,
        problem.key_length,
        visual.spans,
        visual.inv_freq,
        visual.shift,
        visual.start,
        visual.selected,
        None,
        size**-0.5,
        plan,
    )
    return Answer(out, lse, mass)


def check(problem: Problem, found: Answer) -> None:
    exact = attend(problem, dtype=torch.float64)
    eager = attend(problem, dtype=problem.query.dtype)
    for name in Answer._fields:
        assert_as_accurate_as(
            getattr(found, name), getattr(exact, name), getattr(eager, name), name
        )


# (tensor cores, head size compiled for, blocks of 8 rows, pieces, tiles in flight, warps)
@pytest.mark.parametrize(
    ("case", "multiprocessors", "shared", "plan"),
    [
        (Case(groups=7, keys=600, size=128), 4, 227 << 10, [1, 128, 1, 1, 3, 4]),
        (Case(groups=7, keys=600, size=128), 16, 227 << 10, [1, 128, 1, 4, 3, 4]),
        (Case(groups=7, keys=600, size=128), 16, 99 << 10, [1, 128, 1, 4, 2, 2]),
        (Case(groups=7, keys=600, size=128), 2, 163 << 10, [1, 128, 1, 1, 2, 4]),
        (Case(batch=1, groups=9, keys=600, size=80, again=3), 16, 99 << 10, [1, 96, 4, 5, 2, 4]),
        (Case(batch=1, groups=2, keys=600, size=256, again=16), 4, 99 << 10, [0, 256, 1, 5, 1, 4]),
        (Case(batch=1, groups=3, keys=130, size=64, queries=6), 1, 227 << 10, [1, 64, 4, 1, 4, 4]),
        (Case(batch=1, groups=7, keys=600, size=128, queries=4), 8, 99 << 10, [1, 128, 3, 2, 2, 4]),
    ],
    ids=lambda value: str(value),
)
def test_every_way_to_cut_the_work_is_right(
    case: Case, multiprocessors: int, shared: int, plan: list[int]
) -> None:
    emulated.device(multiprocessors=multiprocessors, shared=shared)
    problem = case.but(dtype=torch.bfloat16).make()
    found: list[int] = []
    answer = run(problem, found)
    assert found == plan
    check(problem, answer)


def test_unaligned_rows_take_the_other_kernel() -> None:
    problem = Case(keys=90, size=64, dtype=torch.bfloat16).make()
    storage = torch.full((2, 2, 90, 69), torch.nan, dtype=torch.bfloat16)
    storage[..., 3:67] = problem.key
    odd = problem._replace(key=storage[..., 3:67])
    plan: list[int] = []
    answer = run(odd, plan)
    assert plan[0] == 0
    check(odd, answer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_order_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    problem = Case(groups=5, keys=300, size=64, again=3, select=True, dtype=dtype).make()
    first = run(problem)
    for seed in range(2, 8):
        emulated.device(seed=seed)
        for one, other in zip(first, run(problem), strict=True):
            assert torch.equal(one, other)


def test_wrong_lengths_read_nothing_outside() -> None:
    """Values of index tensors are clamped on a GPU, where a check would wait for the device."""
    problem = Case(batch=2, keys=40, size=64, dtype=torch.bfloat16, poison=False).make()
    wild = problem._replace(
        key_length=torch.tensor([4000, -3], dtype=torch.int32),
        key_start=torch.tensor([-5, 99], dtype=torch.int32),
    )
    tame = problem._replace(
        key_length=torch.tensor([40, 0], dtype=torch.int32),
        key_start=torch.tensor([0, 0], dtype=torch.int32),
    )
    for one, other in zip(run(wild), run(tame), strict=True):
        assert torch.equal(one, other)


def test_too_many_columns_for_the_device_are_refused_in_words() -> None:
    emulated.device(shared=48 << 10)
    problem = Case(batch=1, keys=40, size=256, again=16).make()
    with pytest.raises(RuntimeError, match="16 columns.*head size 256.*this GPU has 49152"):
        run(problem)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_empty_spans_anywhere_hold_nothing(dtype: torch.dtype) -> None:
    problem = Case(batch=1, keys=60, spans=2, again=2, size=64, ragged=False, dtype=dtype).make()
    spans = torch.tensor([[[5, 9], [20, 12]]], dtype=torch.int32)
    start = torch.full_like(problem.visual.start, 50)
    visual = replace(problem.visual, spans=spans, start=start)
    plain = problem._replace(visual=visual, max_visual=21)
    holes = torch.tensor([[[40, 0], [5, 9], [0, 0], [20, 12], [7, 0]]], dtype=torch.int32)
    empty = plain._replace(visual=replace(visual, spans=holes))
    for one, other in zip(run(empty), run(plain), strict=True):
        assert torch.equal(one, other)


def test_tokens_past_the_selection_are_not_shown() -> None:
    problem = Case(batch=1, keys=60, again=1, size=64, select=True, ragged=False).make()
    wide = problem.visual.selected
    narrow = wide[..., :3].clone()
    cut = wide.clone()
    cut[..., 3:] = False
    found = run(problem._replace(visual=replace(problem.visual, selected=narrow)))
    expected = run(problem._replace(visual=replace(problem.visual, selected=cut)))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
