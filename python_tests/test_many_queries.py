"""The CUDA kernels for many queries: the bodies of the other files, and what is theirs alone.

Elsewhere training and prefill on a GPU go through a library's attention.
"""

from __future__ import annotations

import emulated
import pytest
import torch
from cases import PREFILL, Case
from test_packing import Packed
from test_prefill_backward import SHAPES, compare, differentiate
from torch import Tensor

from lookagain_ext import NEVER, VisualContext, ops, reference
from lookagain_ext.ops import _cuda, _cuda_many
from lookagain_ext.ops._counted_mass import CountedMass

FITTING = [case for case in [*SHAPES, *PREFILL] if case.size <= 128]
BOTH = [case.but(dtype=torch.bfloat16) for case in FITTING]
BOTH += [FITTING[number].but(dtype=torch.float16) for number in (0, 2, 7)]


@pytest.fixture(autouse=True)
def calls(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """These kernels take every call that fits; what they were called for, in order."""
    if device.type == "cpu" and not _cuda.on_gpu(torch.zeros(0)):
        pytest.skip("kernels of a GPU")
    monkeypatch.setattr(_cuda_many, "choice", "kernels")
    found, launch = [], _cuda.launch_many_queries

    def counted(*arguments: object) -> None:
        found.append("forward" if arguments[5] is None else "backward")
        launch(*arguments)

    monkeypatch.setattr(_cuda, "launch_many_queries", counted)
    return found


@pytest.mark.parametrize("case", BOTH, ids=str)
def test_against_the_specification(case: Case, device: torch.device, calls: list[str]) -> None:
    compare(case.but(poison=False).make(device))
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("size", [8, 64, 72, 96, 104, 128])
def test_head_sizes(size: int, device: torch.device, calls: list[str]) -> None:
    case = Case(queries=30, keys=70, size=size, rotary=size // 2, dtype=torch.bfloat16)
    compare(case.but(poison=False).make(device))
    assert len(calls) == 2


@pytest.mark.parametrize(
    "case",
    [
        Case(queries=30, dtype=torch.float32),
        Case(queries=30, size=136, dtype=torch.bfloat16),
        Case(queries=30, size=256, dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_what_does_not_fit_goes_the_other_way(
    case: Case, device: torch.device, calls: list[str]
) -> None:
    compare(case.but(poison=False).make(device))
    assert calls == []


def test_a_scale_that_is_not_positive_goes_the_other_way(
    device: torch.device, calls: list[str]
) -> None:
    compare(Case(queries=30, dtype=torch.bfloat16, poison=False).make(device), scale=-0.3)
    assert calls == []


def test_rows_off_their_boundaries(device: torch.device, calls: list[str]) -> None:
    """An output gradient that lies anywhere; queries that do not lie at 16 bytes do not fit."""
    problem = Case(queries=40, keys=40, size=64, dtype=torch.bfloat16, poison=False).make(device)
    inputs = [x.detach().clone().requires_grad_() for x in problem[:3]]
    out = ops.routed_attention(*inputs, problem.visual, **problem.kwargs())
    apart = torch.randn(*out.shape[:3], 65, device=device, dtype=torch.float64).to(out)[..., 1:]
    found = torch.autograd.grad(out, inputs, apart, retain_graph=True)
    for a, b in zip(found, torch.autograd.grad(out, inputs, apart.contiguous()), strict=True):
        assert torch.equal(a, b)
    assert calls == ["forward", "backward", "backward"]
    shifted = torch.randn(*problem.query.shape[:3], 65, device=device).to(out)[..., 1:]
    exact = reference.routed_attention(shifted.double(), *problem.double()[1:4], **problem.kwargs())
    out = ops.routed_attention(shifted, *problem[1:4], **problem.kwargs())
    assert len(calls) == 3
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("case", [PREFILL[1], PREFILL[2], PREFILL[4]], ids=str)
def test_unread_slots_are_not_touched(case: Case, device: torch.device) -> None:
    """NaN in every slot that no query sees reaches neither results nor other gradients."""
    case = case.but(dtype=torch.bfloat16)
    found = differentiate(ops.routed_attention, case.make(device))
    clean = differentiate(ops.routed_attention, case.but(poison=False).make(device))
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a, b)


def test_a_key_shown_only_after_the_end_is_not_read(device: torch.device) -> None:
    """Visual keys before `key_start`, shown again from a place that no query reaches."""
    spans = torch.tensor([[[2, 4]]], dtype=torch.int32, device=device)
    shift, start, begin = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in ([[9]], [[40]], [8])
    )
    case = Case(batch=1, queries=40, keys=40, again=0, ragged=False, dtype=torch.bfloat16)
    problem = case.make(device)
    visual = VisualContext(spans, problem.visual.inv_freq, shift, start)
    results = []
    for poison in (0.0, torch.nan):
        tensors = [x.detach().clone() for x in problem[:3]]
        for cache in tensors[1:]:
            cache[:, :, :8] = poison
        inputs = [x.requires_grad_() for x in tensors]
        out = ops.routed_attention(*inputs, visual, key_start=begin)
        results.append([out, *torch.autograd.grad(out.sum(), inputs)])
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


def test_re_injection_that_starts_anywhere(device: torch.device) -> None:
    """Every start from before the first query to after the last, and none."""
    starts = [20, 28, 29, 35, 40, 41, 57, 58, NEVER]
    spans = torch.tensor([[[3, 20]]], dtype=torch.int32, device=device).expand(9, 1, 2)
    shift, start = (
        torch.tensor(x, dtype=torch.int32, device=device)[:, None] for x in ([31] * 9, starts)
    )
    case = Case(batch=9, queries=30, keys=58, again=0, ragged=False, poison=False)
    problem = case.but(dtype=torch.bfloat16).make(device)
    visual = VisualContext(spans.contiguous(), problem.visual.inv_freq, shift, start)
    compare(problem._replace(visual=visual))


@pytest.mark.parametrize("multiprocessors", [1, 4, 64])
def test_pieces_and_order_of_threads(multiprocessors: int, device: torch.device) -> None:
    """However the work is cut the results are right, and a repeat gives the same bits."""
    if device.type == "cuda" and multiprocessors > 1:
        pytest.skip("a GPU is what it is")
    case = Case(batch=1, groups=7, queries=150, keys=170, size=64, again=2, select=True)
    problem = case.but(dtype=torch.bfloat16, poison=False).make(device)
    runs = []
    for seed in (1, 2):
        emulated.device(seed, multiprocessors)
        runs.append(differentiate(ops.routed_attention, problem))
    emulated.device()
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
    exact = differentiate(reference.routed_attention, problem.double())
    for a, b in zip(runs[0], exact, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=3e-2, rtol=3e-2)


def run_backward(
    problem, mass: Tensor | None, counted: Tensor | None, **kwargs
) -> tuple[Tensor, ...]:
    visual = problem.visual
    fields = (problem.key_start, problem.key_length, visual.spans, visual.inv_freq)
    fields = (*fields, visual.shift, visual.start, visual.selected)
    scale = problem.query.shape[-1] ** -0.5
    out, lse = _cuda_many.forward(*problem[:3], fields, scale)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    wanted = None if mass is None else CountedMass(mass, counted)
    return _cuda_many.backward(grad, *problem[:3], out, lse, fields, scale, mass=wanted)


@pytest.mark.parametrize("counts", [False, True], ids=["all queries", "some queries"])
@pytest.mark.parametrize("case", FITTING[:5], ids=str)
def test_mass_within_the_backward(case: Case, counts: bool, device: torch.device) -> None:
    """Column sums of the backward's weights; added to what is there, gradients unchanged."""
    problem = case.but(dtype=torch.bfloat16).make(device)
    batch, heads = problem.key.shape[:2]
    counted = None
    if counts:
        draw = torch.Generator().manual_seed(3)
        counted = (torch.rand(batch, case.queries, generator=draw) < 0.4).to(device)
    mass = torch.full((batch, heads, problem.max_visual + 2), 7.0, device=device)
    grads = run_backward(problem, mass, counted)
    for a, b in zip(grads, run_backward(problem, None, None), strict=True):
        assert torch.equal(a, b)
    again = torch.full_like(mass, 7.0)
    run_backward(problem, again, counted)
    assert torch.equal(mass, again)
    assert (mass[..., problem.max_visual :] == 7).all()
    first = problem.key_length[:, None] - case.queries + torch.arange(case.queries, device=device)
    rows = torch.stack([first, first + 1], -1).int()
    if counts:
        rows[..., 1] -= (~counted).int()
    exact = reference.visual_mass(*problem.double()[:2], problem.visual, rows, **problem.kwargs())
    exact = exact.sum(1).double()
    found = (mass[..., : problem.max_visual] - 7).double()
    assert float((found - exact).abs().max()) <= 1e-2 * float(exact.abs().max().clamp(min=1))


@pytest.mark.parametrize("select", [False, True])
def test_packed_sequences_are_one_call(
    select: bool, device: torch.device, calls: list[str]
) -> None:
    """Each sequence gives what it gives alone, in one call for all."""
    packed = Packed(device, torch.bfloat16, select=select)
    heads = [x.clone().requires_grad_() for x in packed.heads]
    out = ops.routed_attention(*heads, packed.visual, cu_seqlens=packed.cu_seqlens)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    found = [out, *torch.autograd.grad(out, heads, weight)]
    assert calls == ["forward", "backward"]
    for number in range(3):
        part = slice(*packed.cu_seqlens[number : number + 2].tolist())
        one, visual = packed.alone(number)
        one = [x.detach().clone().requires_grad_() for x in one]
        alone = ops.routed_attention(*one, visual)
        alone = [alone, *torch.autograd.grad(alone, one, weight[:, :, part])]
        for whole, single in zip(found, alone, strict=True):
            torch.testing.assert_close(whole[:, :, part], single, atol=1e-2, rtol=1e-2)
    assert len(calls) == 8


def test_packed_mass_has_a_row_for_each_sequence(device: torch.device) -> None:
    packed = Packed(device, torch.bfloat16, select=True)
    visual, bounds = packed.visual, tuple(packed.cu_seqlens.tolist())
    fields = (None, None, visual.spans, visual.inv_freq, visual.shift, visual.start)
    fields = (*fields, visual.selected)
    out, lse = _cuda_many.forward(*packed.heads, fields, 0.2, bounds)
    mass = torch.zeros(3, 2, visual.selected.shape[-1], device=device)
    counted = torch.arange(out.shape[2], device=device)[None] % 3 > 0
    wanted = CountedMass(mass, counted)
    _cuda_many.backward(out, *packed.heads, out, lse, fields, 0.2, bounds, wanted)
    for number in range(3):
        (query, key, _), context = packed.alone(number)
        mine = counted[0, bounds[number] : bounds[number + 1]]
        begin = torch.arange(len(mine), device=device)
        rows = torch.stack([begin, begin + mine], -1)[None].int()
        exact = reference.visual_mass(query.double(), key.double(), context, rows, scale=0.2)
        exact = exact.sum(1)[0].float()
        torch.testing.assert_close(mass[number], exact, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_can_be_captured(
    packed: bool, device: torch.device, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward in a CUDA graph, which nobody has to choose these kernels for."""
    if device.type != "cuda":
        pytest.skip("CUDA graphs")
    sequences = Packed(device, torch.bfloat16, select=True)
    heads, visual = sequences.heads, sequences.visual
    keywords = {"cu_seqlens": sequences.cu_seqlens.tolist()}
    if not packed:
        heads, visual = sequences.alone(1)
        keywords = {}
    inputs = [x.detach().clone().requires_grad_() for x in heads]
    weight = torch.randn(heads[0].shape, generator=torch.Generator().manual_seed(1)).to(heads[0])
    rows = visual.spans.shape[0]
    mass = torch.zeros(rows, 2, visual.selected.shape[-1], device=device)
    keywords |= {"visual_mass": mass, "mass_in_backward": True}
    keywords["mass_from"] = torch.full((rows,), 20, dtype=torch.int32, device=device)

    def step() -> list[Tensor]:
        out, lse = ops.routed_attention(*inputs, visual, return_lse=True, **keywords)
        return [out, lse, *torch.autograd.grad(out, inputs, weight)]

    expected, counted = step(), mass.clone()
    monkeypatch.setattr(_cuda_many, "choice", "auto")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    assert calls == ["forward", "backward"]  # "auto" takes the library's way elsewhere
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    assert calls == ["forward", "backward"] * 2
    mass.zero_()
    graph.replay()
    for a, b in zip([*found, mass], [*expected, counted], strict=True):
        assert torch.equal(a, b.view(a.shape))


@pytest.mark.parametrize("packed", [False, True])
def test_the_op_counts_within_the_backward(
    packed: bool, device: torch.device, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mass_in_backward` takes the column sums, and no pass of its own."""
    sequences = Packed(device, torch.bfloat16, keys=60, select=True)
    heads, visual = sequences.heads, sequences.visual
    keywords = {"cu_seqlens": sequences.cu_seqlens}
    if not packed:
        heads, visual = sequences.alone(1)
        keywords = {}
    rows = visual.spans.shape[0]
    mass_from = torch.full((rows,), 20, dtype=torch.int32, device=device)
    keywords |= {"mass_from": mass_from}
    before, within = torch.zeros(2, rows, 2, visual.selected.shape[-1], device=device)
    ops.routed_attention(*heads, visual, visual_mass=before, **keywords)
    inputs = [x.detach().clone().requires_grad_() for x in heads]
    out = ops.routed_attention(
        *inputs, visual, visual_mass=within, mass_in_backward=True, **keywords
    )
    monkeypatch.setattr(_cuda, "launch_visual_mass", None)  # would not be called
    assert within.abs().max() == 0
    out.sum().backward()
    assert calls == ["forward", "forward", "backward"]
    torch.testing.assert_close(within, before, atol=2e-2, rtol=2e-2)
    assert within.sum(-1).min() > 0


def test_auto_takes_them_where_training_is_captured(
    device: torch.device, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without gradients a capture keeps to the decode kernel, and nothing else to these."""
    if device.type == "cuda":
        pytest.skip("a capture is only pretended here")
    monkeypatch.setattr(_cuda_many, "choice", "auto")
    problem = Case(queries=30, keys=40, dtype=torch.bfloat16, poison=False).make(device)
    found = []
    for capturing in (False, True):
        monkeypatch.setattr(_cuda, "is_capturing", lambda _, capturing=capturing: capturing)
        found.append(differentiate(ops.routed_attention, problem))
        with torch.no_grad():
            out = ops.routed_attention(*problem[:4], **problem.kwargs())
        torch.testing.assert_close(out, found[0][0], atol=2e-2, rtol=2e-2)
        assert calls == (["forward", "backward"] if capturing else [])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=3e-2, rtol=3e-2)
    monkeypatch.setattr(_cuda_many, "choice", "library")
    differentiate(ops.routed_attention, problem.row(0))
    assert len(calls) == 2
