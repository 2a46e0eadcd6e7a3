"""routed_attention against the specification and against physically appended rows."""

from __future__ import annotations

import pytest
import torch
from cases import DECODE, PREFILL, Case, Problem, on_cpu
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from physical import Answer, assert_as_accurate_as, attend, error

from lookagain_ext import NEVER, VisualContext, ops, reference
from lookagain_ext._native import native

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def run(problem: Problem, op=ops.routed_attention, **kwargs) -> Answer:
    batch, kv_heads = problem.key.shape[:2]
    mass = torch.zeros(batch, kv_heads, problem.max_visual, device=problem.query.device)
    out, lse = op(
        *problem[:4],
        **problem.kwargs(),
        visual_mass=mass,
        mass_from=problem.mass_from,
        return_lse=True,
        **kwargs,
    )
    return Answer(out, lse, mass)


def check(problem: Problem, **kwargs) -> None:
    """Both kernels and specification agree with physically appended rows."""
    found = run(problem, **kwargs)
    problem = on_cpu(problem)
    exact = attend(problem, dtype=torch.float64, **kwargs)
    eager = attend(problem, dtype=problem.query.dtype, **kwargs)
    for name in Answer._fields:
        assert_as_accurate_as(
            getattr(found, name).cpu(), getattr(exact, name), getattr(eager, name), name
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    check(case.but(dtype=dtype).make(device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PREFILL, ids=str)
def test_prefill(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    check(case.but(dtype=dtype).make(device))


@pytest.mark.parametrize("case", [*DECODE, *PREFILL], ids=str)
def test_specification_is_physical_append(case: Case) -> None:
    problem = case.but(dtype=torch.float64).make()
    found, exact = run(problem, reference.routed_attention), attend(problem, dtype=torch.float64)
    assert error(found.out, exact.out) < 1e-12
    assert error(found.lse, exact.lse) < 1e-5
    assert error(found.mass, exact.mass) < 1e-5


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    case=st.builds(
        Case,
        batch=st.integers(1, 3),
        kv_heads=st.integers(1, 3),
        groups=st.integers(1, 8),
        queries=st.one_of(st.integers(1, 16), st.integers(17, 40)),
        keys=st.integers(1, 150),
        size=st.sampled_from([8, 16, 24, 48, 64, 104, 128]),
        spans=st.integers(1, 4),
        again=st.integers(0, 5),
        select=st.booleans(),
        ragged=st.booleans(),
        seed=st.integers(0, 2**31),
    )
)
def test_any_shape(case: Case) -> None:
    check(case.make())


@pytest.mark.parametrize("queries", [1, 40])
def test_scale(queries: int, device: torch.device) -> None:
    check(Case(queries=queries).make(device), scale=0.05)


@pytest.mark.parametrize("case", [DECODE[2], PREFILL[2]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_are_bit_identical(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    problem = case.but(dtype=dtype).make(device)
    first = run(problem)
    for _ in range(5):
        for one, other in zip(first, run(problem), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("queries", [1, 40])
def test_row_of_a_batch_is_the_row_alone(queries: int, device: torch.device) -> None:
    problem = Case(batch=4, queries=queries, keys=200, again=3, select=True).make(device)
    whole = run(problem)
    for row in range(4):
        alone = run(problem.row(row))
        for one, other in zip(whole, alone, strict=True):
            torch.testing.assert_close(one[row], other[0], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("queries", [1, 40])
def test_unused_columns_change_no_bit(queries: int, device: torch.device) -> None:
    problem = Case(queries=queries, again=0, keys=90).make(device)
    unused = problem.visual.reinject(
        torch.zeros(2, dtype=torch.bool, device=device), shift=5, start=3
    )
    plain, padded = run(problem), run(problem._replace(visual=unused))
    for one, other in zip(plain, padded, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("queries", [1, 40])
def test_selecting_all_is_copy_and_selecting_none_is_off(
    queries: int, device: torch.device
) -> None:
    problem = Case(queries=queries, keys=90, again=2).make(device)
    visual = problem.visual
    chosen = torch.ones(2, 2, problem.max_visual, dtype=torch.bool, device=device)
    fields = (visual.spans, visual.inv_freq, visual.shift, visual.start)
    copy, every = run(problem), run(problem._replace(visual=VisualContext(*fields, chosen)))
    none = run(problem._replace(visual=VisualContext(*fields, ~chosen)))
    off = run(problem._replace(visual=VisualContext.from_spans(visual.spans, visual.inv_freq)))
    for a, b in ((copy, every), (none, off)):
        torch.testing.assert_close(a.out, b.out, atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(a.lse, b.lse, atol=2e-6, rtol=2e-6)
    assert (copy.out - off.out).abs().max() > 1e-3


def test_mass_is_added_to(device: torch.device) -> None:
    problem = Case().make(device)
    mass = torch.full((2, 2, problem.max_visual + 3), 7.0, device=device)
    ops.routed_attention(*problem[:4], **problem.kwargs(), visual_mass=mass)
    fresh = torch.zeros_like(mass)
    ops.routed_attention(*problem[:4], **problem.kwargs(), visual_mass=fresh)
    torch.testing.assert_close(mass, fresh + 7.0, atol=1e-6, rtol=1e-6)
    assert fresh[..., : problem.max_visual].sum() > 0
    assert torch.equal(fresh[..., problem.max_visual :], torch.zeros(2, 2, 3, device=device))


def test_nothing_to_see_gives_zeros(device: torch.device) -> None:
    problem = Case(queries=3, keys=20, again=0, poison=False).make(device)
    problem = problem._replace(key_start=problem.key_length.clone())
    found = run(problem)
    assert torch.equal(found.out, torch.zeros_like(found.out))
    assert torch.equal(found.lse, torch.full_like(found.lse, -torch.inf))
    assert torch.equal(found.mass, torch.zeros_like(found.mass))


def test_a_reinjection_may_begin_at_the_first_query(device: torch.device) -> None:
    problem = Case(queries=4, keys=30, again=1, ragged=False).make(device)
    everywhere = VisualContext(
        problem.visual.spans,
        problem.visual.inv_freq,
        problem.visual.shift,
        torch.zeros_like(problem.visual.start),
    )
    check(problem._replace(visual=everywhere))


def test_many_reinjections_of_one_key(device: torch.device) -> None:
    """n sightings without a shift weigh a key n + 1 times: its logit grows by log(n + 1)."""
    query = torch.zeros(1, 1, 1, 16, device=device)
    key, value = (
        torch.zeros(1, 1, 4, 16, device=device),
        torch.eye(4, 16, device=device)[None, None],
    )
    visual = VisualContext.from_spans(torch.tensor([[[1, 1]]], device=device), torch.ones(8))
    for _ in range(16):
        visual = visual.reinject(torch.ones(1, dtype=torch.bool, device=device), 0, 2)
    mass = torch.zeros(1, 1, 1, device=device)
    out = ops.routed_attention(query, key, value, visual, visual_mass=mass)
    expected = torch.tensor([1.0, 17.0, 1.0, 1.0], device=device) / 20
    torch.testing.assert_close(out[0, 0, 0, :4], expected)
    torch.testing.assert_close(mass[0, 0], expected[1:2])


def test_huge_logits_do_not_overflow(device: torch.device) -> None:
    problem = Case(queries=3, keys=80, again=2).make(device)
    problem = problem._replace(query=problem.query * 300)
    found = run(problem)
    assert found.out.isfinite().all()
    exact = attend(on_cpu(problem), dtype=torch.float64)
    torch.testing.assert_close(found.out.cpu().double(), exact.out, atol=1e-3, rtol=1e-3)


def test_never_is_int32_max() -> None:
    assert NEVER == 2**31 - 1


@pytest.mark.parametrize("queries", [1, 20])
def test_offsets_past_two_to_the_31(queries: int) -> None:
    """Rows 2^27 elements apart: the last lies past 2^31. Only the touched pages take memory."""
    problem = Case(batch=1, kv_heads=1, queries=queries, keys=24, size=16, ragged=False).make()
    far = []
    for cache in (problem.key, problem.value):
        storage = torch.empty(24 * 2**27, dtype=torch.float32)
        far.append(storage.as_strided((1, 1, 24, 16), (0, 0, 2**27, 1)).copy_(cache))
    near, spread = run(problem), run(problem._replace(key=far[0], value=far[1]))
    for one, other in zip(near, spread, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [DECODE[2], DECODE[4], PREFILL[1]], ids=str)
def test_every_instruction_set(case: Case, dtype: torch.dtype, isa: str) -> None:
    assert native().build_info()["isa"] == isa
    check(case.but(dtype=dtype).make())
