"""append_visual_: exact copies, keys turned once from the original, nothing else touched."""

from __future__ import annotations

import pytest
import torch
from cases import Case, Problem, on_cpu
from physical import assert_as_accurate_as, attend, turn
from torch import Tensor

from lookagain_ext import VisualContext, ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def caches(case: Case, room: int, device: torch.device) -> tuple[Problem, Tensor, Tensor]:
    """A problem and its caches with `room` more slots, NaN wherever nothing was written yet."""
    problem = case.make(device)
    grown = []
    for cache in problem[1:3]:
        batch, heads, keys, size = cache.shape
        larger = cache.new_full((batch, keys + room, heads, size), torch.nan).transpose(1, 2)
        larger[:, :, :keys] = cache
        grown.append(larger)
    return problem, *grown


@pytest.mark.parametrize("select", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotary", [None, 16])
def test_whole_cache(
    dtype: torch.dtype, select: bool, rotary: int | None, device: torch.device
) -> None:
    case = Case(
        batch=3, keys=60, size=40, spans=3, again=1, rotary=rotary, select=select, dtype=dtype
    )
    problem, key, value = caches(case, 45, device)
    visual = problem.visual
    selected = visual.selected[:, 0] if select else None
    rows = torch.tensor([True, False, True], device=device)
    length, before = problem.key_length.clone(), (key.clone(), value.clone())
    ops.append_visual_(
        key,
        value,
        length,
        visual.spans,
        visual.shift[:, 0].contiguous(),
        visual.inv_freq,
        selected=selected,
        rows=rows,
    )
    for row in range(3):
        tokens = [j for a, n in visual.spans[row].tolist() for j in range(a, a + n)]
        if select:
            tokens = [j for c, j in enumerate(tokens) if selected[row, c]]
        if row == 1:
            tokens = []
        old = int(problem.key_length[row])
        new = slice(old, old + len(tokens))
        assert int(length[row]) == new.stop
        shift, inv_freq = int(visual.shift[row, 0]), visual.inv_freq.cpu()
        original = before[0][row].cpu()[:, tokens]
        exact = turn(original, shift, inv_freq)
        assert_as_accurate_as(key[row, :, new].cpu(), exact, exact.to(dtype), "key")
        assert torch.equal(value[row, :, new], before[1][row][:, tokens])
        for cache, was in zip((key, value), before, strict=True):
            for untouched in (slice(0, new.start), slice(new.stop, None)):
                torch.testing.assert_close(
                    cache[row, :, untouched], was[row, :, untouched], rtol=0, atol=0, equal_nan=True
                )


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_do_not_change_a_bit(threads: int, set_threads) -> None:
    """Five threads for the six key heads of three rows."""
    written = []
    for number in (1, threads):
        problem, *cache = caches(Case(batch=3, keys=60, spans=3, again=1), 45, torch.device("cpu"))
        visual, length = problem.visual, problem.key_length.clone()
        set_threads(number)
        shift = visual.shift[:, 0].contiguous()
        ops.append_visual_(*cache, length, visual.spans, shift, visual.inv_freq)
        written.append([*cache, length])
    assert not torch.equal(length, problem.key_length)
    for alone, several in zip(*written, strict=True):
        torch.testing.assert_close(several, alone, rtol=0, atol=0, equal_nan=True)


def test_repeated_appends_do_not_drift(device: torch.device) -> None:
    """The tenth append turns from the original as exactly as the first."""
    case = Case(batch=1, keys=20, size=64, spans=1, ragged=False)
    problem, key, value = caches(case, 200, device)
    spans = torch.tensor([[[2, 10]]], dtype=torch.int32, device=device)
    length = problem.key_length.clone()
    shift = torch.tensor([700], dtype=torch.int32, device=device)
    for _ in range(10):
        ops.append_visual_(key, value, length, spans, shift, problem.visual.inv_freq)
    assert int(length) == 120
    for number in range(1, 10):
        assert torch.equal(key[:, :, 20 + 10 * number : 30 + 10 * number], key[:, :, 20:30])


def test_a_row_without_room_raises_and_nothing_is_written(device: torch.device) -> None:
    case = Case(batch=3, keys=30, spans=1, ragged=False)
    problem, key, value = caches(case, 10, device)
    spans = torch.tensor([[[0, 4]], [[0, 11]], [[0, 4]]], dtype=torch.int32, device=device)
    length, before = problem.key_length.clone(), (key.clone(), value.clone())
    shift = torch.ones(3, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"row 1.*30.*11.*40"):
        ops.append_visual_(key, value, length, spans, shift, problem.visual.inv_freq)
    assert torch.equal(length, problem.key_length)
    for cache, was in zip((key, value), before, strict=True):
        torch.testing.assert_close(cache, was, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("select", [False, True])
def test_appending_is_a_virtual_reinjection(select: bool, device: torch.device) -> None:
    """A query that follows sees the same, whether rows were appended or re-injected."""
    case = Case(
        batch=2, keys=50, spans=2, again=1, select=select, ragged=False, dtype=torch.float64
    )
    problem, key, value = caches(case, 60, device)
    visual, length = problem.visual, problem.key_length.clone()
    everyone = VisualContext(
        visual.spans,
        visual.inv_freq,
        visual.shift,
        torch.full_like(visual.start, 40),
        visual.selected,
    )
    virtual = ops.routed_attention(*problem[:3], everyone, **problem.kwargs())
    selected = visual.selected[:, 0].contiguous() if select else None
    ops.append_visual_(
        key, value, length, visual.spans, visual.shift[:, 0].contiguous(), visual.inv_freq,
        selected=selected,
    )  # fmt: skip
    appended = ops.routed_attention(problem.query, key, value, key_length=length)
    torch.testing.assert_close(virtual, appended, atol=1e-12, rtol=1e-12)
    exact = attend(on_cpu(problem._replace(visual=everyone)), dtype=torch.float64).out
    torch.testing.assert_close(virtual.cpu(), exact, atol=1e-12, rtol=1e-12)
