"""Paged caches: the same answers as a dense cache, whatever the blocks and wherever they lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import DECODE, PREFILL, Case, Problem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paging import page, paged_problem
from physical import Answer, assert_as_accurate_as, attend
from torch import Tensor

from lookagain_ext import VisualContext, ops, reference
from lookagain_ext._native import native
from lookagain_ext.ops import _cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BLOCK_SIZES = [1, 3, 16, 64, 256]


def run(problem: Problem, block_table: Tensor | None = None, op=ops.routed_attention) -> Answer:
    batch, kv_heads = problem.query.shape[0], problem.key.shape[1]
    mass = torch.zeros(batch, kv_heads, problem.max_visual, device=problem.query.device)
    keywords = problem.kwargs() | {"mass_from": problem.mass_from, "block_table": block_table}
    out, lse = op(*problem[:4], **keywords, visual_mass=mass, return_lse=True)
    return Answer(out, lse, mass)


def assert_same(found: Answer, dense: Answer) -> None:
    """To the bit on a CPU, where both go through the same tiles.

    A GPU cuts the key axis by its capacity, which blocks round up.
    """
    exact = not _cuda.on_gpu(found.out)
    tolerance = 0 if exact else 8 * torch.finfo(found.out.dtype).eps
    for one, other in zip(found, dense, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def check(problem: Problem, block_size: int) -> None:
    """As accurate as the dense computation in the problem's dtype."""
    found = run(*paged_problem(problem, block_size))
    exact = attend(problem, dtype=torch.float64)
    eager = attend(problem, dtype=problem.query.dtype)
    for name in Answer._fields:
        assert_as_accurate_as(
            getattr(found, name), getattr(exact, name), getattr(eager, name), name
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*DECODE, *PREFILL], ids=str)
def test_paged_is_dense(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    problem = case.but(dtype=dtype).make(device)
    dense = run(problem)
    assert dense.out.isfinite().all()
    # Long queries take the same way through a table as short ones, only slowly where emulated.
    sizes = BLOCK_SIZES if case.queries <= 40 or not _cuda.on_gpu(dense.out) else BLOCK_SIZES[1:2]
    for seed, block_size in enumerate(sizes):
        assert_same(run(*paged_problem(problem, block_size, seed)), dense)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    case=st.builds(
        Case,
        batch=st.integers(1, 3),
        kv_heads=st.integers(1, 3),
        groups=st.integers(1, 8),
        queries=st.one_of(st.integers(1, 16), st.integers(17, 40)),
        keys=st.integers(1, 150),
        size=st.sampled_from([8, 16, 24, 64, 128]),
        spans=st.integers(1, 4),
        again=st.integers(0, 3),
        select=st.booleans(),
        ragged=st.booleans(),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 2**31),
    ),
    block_size=st.integers(1, 80),
)
def test_any_shape(case: Case, block_size: int) -> None:
    problem = case.make()
    assert_same(run(*paged_problem(problem, block_size, case.seed)), run(problem))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [DECODE[2], DECODE[4], PREFILL[1]], ids=str)
def test_every_instruction_set(case: Case, dtype: torch.dtype, isa: str) -> None:
    assert native().build_info()["isa"] == isa
    for block_size in (3, 64):
        check(case.but(dtype=dtype).make(), block_size)


@pytest.mark.parametrize("case", [DECODE[0], DECODE[2], PREFILL[1]], ids=str)
def test_specification(case: Case) -> None:
    problem = case.but(dtype=torch.float64).make()
    dense = run(problem, op=reference.routed_attention)
    for block_size in BLOCK_SIZES:
        found = run(*paged_problem(problem, block_size), op=reference.routed_attention)
        for one, other in zip(found, dense, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("block_size", [1, 16])
def test_rows_may_share_blocks(block_size: int, queries: int, device: torch.device) -> None:
    """Three rows with the same first 32 slots: one copy of them is enough."""
    problem = Case(batch=3, queries=queries, keys=70, ragged=False).make(device)
    for cache in (problem.key, problem.value):
        cache[1:, :, :32] = cache[:1, :, :32]
    dense = run(problem)
    limits = problem.key_start, problem.key_length
    paged = page(problem.key, problem.value, *limits, block_size)
    shared = 32 // block_size
    for row in (1, 2):
        for block in paged.block_table[row, :shared].tolist():
            paged.key[block] = paged.value[block] = torch.nan
        paged.block_table[row, :shared] = paged.block_table[0, :shared]
    problem = problem._replace(key=paged.key, value=paged.value)
    assert_same(run(problem, paged.block_table), dense)


@pytest.mark.parametrize("queries", [1, 20])
def test_visual_tokens_before_key_start(queries: int, device: torch.device) -> None:
    """A re-injection shows tokens that lie before the row's keys: their blocks are read."""
    problem = Case(queries=queries, keys=60, again=2, ragged=False, poison=False).make(device)
    end = problem.visual.spans.sum(-1).amax(-1).to(torch.int32)
    assert (end > 0).all()
    problem = problem._replace(key_start=end)
    dense = run(problem)
    whole = page(problem.key, problem.value, torch.zeros_like(end), problem.key_length, 4)
    problem = problem._replace(key=whole.key, value=whole.value)
    assert_same(run(problem, whole.block_table), dense)


@pytest.mark.parametrize("queries", [1, 20])
def test_rows_without_keys(queries: int, device: torch.device) -> None:
    problem = Case(queries=queries, keys=40, again=0).make(device)
    paged, table = paged_problem(problem, 16)
    table[0] = -1
    length = problem.key_length.clone()
    length[0] = 0
    start = problem.key_start.clone()
    start[0] = 0
    limits = {"key_start": start, "key_length": length}
    out = ops.routed_attention(*paged[:3], **limits, block_table=table)
    dense = ops.routed_attention(*problem[:3], **limits)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    torch.testing.assert_close(out, dense)
    assert out[1].abs().sum() > 0


@pytest.mark.parametrize("queries", [1, 20])
def test_offsets_past_two_to_the_31(queries: int) -> None:
    """Blocks 2^27 elements apart: the last lies past 2^31. Only the touched pages take memory."""
    problem = Case(batch=1, kv_heads=1, queries=queries, keys=24, size=16, ragged=False).make()
    far = []
    for cache in (problem.key, problem.value):
        storage = torch.empty(24 * 2**27, dtype=torch.float32)
        blocks = storage.as_strided((24, 1, 1, 16), (2**27, 0, 0, 1))
        far.append(blocks.copy_(cache.transpose(0, 2)))
    table = torch.arange(24, dtype=torch.int32)[None]
    spread = run(problem._replace(key=far[0], value=far[1]), table)
    assert_same(spread, run(problem))


def test_under_no_grad_inputs_may_require_grad(device: torch.device) -> None:
    problem = Case().make(device)
    paged, table = paged_problem(problem, 16)
    query = problem.query.clone().requires_grad_()
    with torch.no_grad():
        out = ops.routed_attention(query, *paged[1:3], **problem.kwargs(), block_table=table)
    assert not out.requires_grad
    torch.testing.assert_close(out, ops.routed_attention(*problem[:3], **problem.kwargs()))


def visual_arguments(visual: VisualContext) -> tuple[Tensor, Tensor, Tensor]:
    return visual.spans, visual.shift[:, 0].contiguous(), visual.inv_freq


def dense_append(problem: Problem, room: int, **keywords: Tensor | None) -> tuple[Tensor, ...]:
    """Key and value caches and lengths after an append to a dense cache."""
    grown = []
    for cache in problem[1:3]:
        batch, heads, keys, size = cache.shape
        grown.append(cache.new_full((batch, heads, keys + room, size), torch.nan))
        grown[-1][:, :, :keys] = cache
    length = problem.key_length.clone()
    ops.append_visual_(*grown, length, *visual_arguments(problem.visual), **keywords)
    return *grown, length


@pytest.mark.parametrize("op", [ops.append_visual_, reference.append_visual_])
@pytest.mark.parametrize("select", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_append_changes_the_new_slots_and_nothing_else(
    block_size: int, dtype: torch.dtype, select: bool, op, device: torch.device
) -> None:
    case = Case(
        batch=3, keys=60, size=40, spans=3, again=1, rotary=16, select=select, dtype=dtype, seed=13
    )
    problem = case.make(device)
    keywords = {
        "selected": problem.visual.selected[:, 0] if select else None,
        "rows": torch.tensor([True, False, True], device=device),
    }
    *dense, expected_length = dense_append(problem, 45, **keywords)
    old, new = problem.key_length, expected_length
    assert new[0] > old[0] and new[1] == old[1] and new[2] > old[2]
    limits = problem.key_start, old
    paged = page(problem.key, problem.value, *limits, block_size, room=45, seed=block_size)
    expected = paged.key.clone(), paged.value.clone()
    for row in range(3):
        for slot in range(int(old[row]), int(new[row])):
            block, within = paged.block(row, slot)
            for cache, source in zip(expected, dense, strict=True):
                cache[block, :, within] = source[row, :, slot]
    length = old.clone()
    op(
        *paged[:2],
        length,
        *visual_arguments(problem.visual),
        **keywords,
        block_table=paged.block_table,
    )
    assert torch.equal(length, new)
    exact = op is ops.append_visual_ and device.type == "cpu"
    close = {"rtol": 0, "atol": 0} if exact else {}
    torch.testing.assert_close(paged.key, expected[0], equal_nan=True, **close)
    torch.testing.assert_close(paged.value, expected[1], equal_nan=True, rtol=0, atol=0)


def test_append_after_a_shared_prefix(device: torch.device) -> None:
    """Two rows list the same picture; each writes its turned keys into a block of its own."""
    problem = Case(batch=2, keys=32, ragged=False).make(device)
    for cache in (problem.key, problem.value):
        cache[1] = cache[0]
    spans = torch.tensor([[[3, 9]], [[3, 9]]], dtype=torch.int32, device=device)
    visual = replace(problem.visual, spans=spans)
    problem = problem._replace(visual=visual)
    *dense, _ = dense_append(problem, 16)
    limits = problem.key_start, problem.key_length
    paged = page(problem.key, problem.value, *limits, 16, room=16)
    paged.block_table[1, :2] = paged.block_table[0, :2]
    length = problem.key_length.clone()
    ops.append_visual_(*paged[:2], length, *visual_arguments(visual), block_table=paged.block_table)
    assert length.tolist() == [41, 41]
    for row in range(2):
        for cache, source in zip(paged[:2], dense, strict=True):
            block = int(paged.block_table[row, 2])
            torch.testing.assert_close(cache[block, :, :9], source[row, :, 32:41])
            assert cache[block, :, 9:].isnan().all()
    assert not torch.equal(dense[0][0, :, 32:41], dense[0][1, :, 32:41])
