"""The visual mass that the backward of routed_attention adds up: whose, how often, and when."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from cases import DECODE, PREFILL, Case, Problem
from test_prefill_backward import DTYPES, SHAPES
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lookagain_ext import NEVER, VisualContext, ops, reference
from lookagain_ext.ops import _checks

CASES = [DECODE[1], DECODE[5], DECODE[8], *PREFILL, *SHAPES]


@pytest.fixture(params=["kernels", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Also as on devices that have no kernels."""
    if request.param == "reference":
        monkeypatch.setattr(_checks, "use_kernels", lambda _: False)
    return request.param


def buffer(problem: Problem) -> Tensor:
    shape = (len(problem.query), problem.key.shape[1], problem.max_visual)
    return torch.zeros(shape, device=problem.query.device)


def drawn(problem: Problem) -> Tensor:
    """bool [B, L_q], about two thirds of the queries."""
    generator = torch.Generator().manual_seed(2)
    shape = (problem.query.shape[0], problem.query.shape[2])
    return (torch.rand(shape, generator=generator) < 0.66).to(problem.query.device)


def differentiate(attention, problem: Problem, mass: Tensor | None = None, **kwargs):
    """The three gradients; `mass` is filled by the backward."""
    inputs = [x.detach().clone().requires_grad_() for x in problem[:3]]
    if mass is not None:
        kwargs |= {"visual_mass": mass, "mass_in_backward": True}
    out = attention(*inputs, problem.visual, **problem.kwargs(), **kwargs)
    if mass is not None:
        assert not mass.any()  # nothing yet
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out)
    return torch.autograd.grad((out * weight).sum(), inputs)


def exact_mass(problem: Problem, **kwargs) -> Tensor:
    mass = buffer(problem)
    differentiate(reference.routed_attention, problem.double(), mass, **kwargs)
    return mass


def assert_same_mass(found: Tensor, exact: Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert found.shape == exact.shape
    if not exact.numel():  # a row without a picture
        return
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(dtype, 1e-5)
    assert float((found - exact).abs().max()) <= tolerance * float(exact.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_specification(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    problem = case.but(dtype=dtype, poison=False).make(device)
    kwargs = {"mass_queries": drawn(problem)}
    mass = buffer(problem)
    differentiate(ops.routed_attention, problem, mass, **kwargs)
    assert_same_mass(mass, exact_mass(problem, **kwargs), dtype)


@pytest.mark.parametrize("given", ["all", "from", "both"])
@pytest.mark.parametrize("case", [PREFILL[0], PREFILL[1], PREFILL[7], SHAPES[4]], ids=str)
def test_which_queries_count(case: Case, given: str, device: torch.device) -> None:
    problem = case.but(poison=False).make(device)
    kwargs = {} if given == "all" else {"mass_from": problem.mass_from}
    if given == "both":
        kwargs["mass_queries"] = drawn(problem)
    mass = buffer(problem)
    differentiate(ops.routed_attention, problem, mass, **kwargs)
    assert_same_mass(mass, exact_mass(problem, **kwargs))


@pytest.mark.parametrize("case", [PREFILL[1], PREFILL[2], SHAPES[2], SHAPES[4]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_instruction_set(case: Case, dtype: torch.dtype, isa: str) -> None:
    """As a pass of its own to float32's precision: P is summed before any rounding to bfloat16."""
    problem = case.but(dtype=dtype, poison=False).make()
    mass, counted = buffer(problem), drawn(problem)
    differentiate(ops.routed_attention, problem, mass, mass_queries=counted)
    _, lse = ops.routed_attention(*problem[:4], **problem.kwargs(), return_lse=True)
    lse = lse.masked_fill(~counted[:, None], -torch.inf)
    rows = torch.tensor([[[0, NEVER]]], dtype=torch.int32).repeat(case.batch, 1, 1)
    arguments = (problem.query, problem.key, problem.visual, rows)
    alone = ops.visual_mass(*arguments, **problem.kwargs(), lse=lse)[:, 0]
    assert_same_mass(mass, alone)


@pytest.mark.parametrize("case", [PREFILL[2], SHAPES[0], SHAPES[4]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_a_pass_of_its_own(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    problem = case.but(dtype=dtype, poison=False).make(device)
    mass = buffer(problem)
    differentiate(ops.routed_attention, problem, mass, mass_from=problem.mass_from)
    rows = torch.stack([problem.mass_from, torch.full_like(problem.mass_from, NEVER)], -1)[:, None]
    arguments = (problem.query, problem.key, problem.visual, rows)
    alone = ops.visual_mass(*arguments, **problem.kwargs())[:, 0]
    assert_same_mass(mass, torch.nn.functional.pad(alone, (0, mass.shape[-1] - alone.shape[-1])))


@pytest.mark.parametrize("case", [PREFILL[2], PREFILL[6], SHAPES[3]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_keep_their_bits(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    problem = case.but(dtype=dtype, poison=False).make(device)
    plain = differentiate(ops.routed_attention, problem)
    for kwargs in ({}, {"mass_queries": drawn(problem)}):
        counted = differentiate(ops.routed_attention, problem, buffer(problem), **kwargs)
        for one, other in zip(plain, counted, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("heads", [(1, 2), (5, 4)], ids=["few heads", "many heads"])
def test_repeats_are_bit_identical(heads: tuple[int, int], threads: int, set_threads) -> None:
    case = Case(batch=heads[0], kv_heads=heads[1], queries=300, keys=300, again=2, poison=False)
    problem, masses = case.make(), []
    set_threads(threads)
    for _ in range(3):
        masses.append(buffer(problem))
        differentiate(ops.routed_attention, problem, masses[-1], mass_queries=drawn(problem))
    assert torch.equal(masses[0], masses[1]) and torch.equal(masses[0], masses[2])
    assert_same_mass(masses[0], exact_mass(problem, mass_queries=drawn(problem)))


def test_added_to_once_for_each_backward(device: torch.device) -> None:
    problem = PREFILL[1].but(poison=False).make(device)
    inputs = [x.clone().requires_grad_() for x in problem[:3]]
    mass = torch.full_like(buffer(problem), 3.0)
    given = {"visual_mass": mass, "mass_in_backward": True, **problem.kwargs()}
    out = ops.routed_attention(*inputs, problem.visual, **given)
    out.sum().backward(retain_graph=True)
    once = mass - 3
    out.sum().backward()
    torch.testing.assert_close(mass - 3, 2 * once, rtol=1e-5, atol=1e-5)
    assert_same_mass(once, exact_mass(problem))


@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_any_gradient_counts(which: int, device: torch.device) -> None:
    problem = PREFILL[1].but(poison=False).make(device)
    inputs = [x.clone().requires_grad_(number == which) for number, x in enumerate(problem[:3])]
    mass = buffer(problem)
    given = {"visual_mass": mass, "mass_in_backward": True, **problem.kwargs()}
    ops.routed_attention(*inputs, problem.visual, **given).sum().backward()
    assert_same_mass(mass, exact_mass(problem))


def test_nothing_without_a_gradient(backend: str, device: torch.device) -> None:
    problem = PREFILL[1].but(poison=False).make(device)
    mass = buffer(problem)
    given = {"visual_mass": mass, "mass_in_backward": True, **problem.kwargs()}
    plain = ops.routed_attention(*problem[:4], **problem.kwargs())
    assert torch.equal(ops.routed_attention(*problem[:4], **given), plain)
    inputs = [x.clone().requires_grad_() for x in problem[:3]]
    with torch.no_grad():
        ops.routed_attention(*inputs, problem.visual, **given)
    assert not mass.any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_once(reentrant: bool, backend: str, device: torch.device) -> None:
    problem = PREFILL[1].but(poison=False).make(device)
    inputs, mass = [x.clone().requires_grad_() for x in problem[:3]], buffer(problem)
    given = {"visual_mass": mass, "mass_in_backward": True, **problem.kwargs()}
    calls = []

    def layer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        calls.append(1)
        return ops.routed_attention(query * 1, key * 1, value * 1, problem.visual, **given)

    out = checkpoint(layer, *inputs, use_reentrant=reentrant)
    assert not mass.any()
    out.sum().backward()
    assert len(calls) == 2
    assert_same_mass(mass, exact_mass(problem))


def test_counts_in_the_backward_of_either(backend: str, device: torch.device) -> None:
    problem = PREFILL[1].but(poison=False).make(device)
    kwargs = {"mass_from": problem.mass_from, "mass_queries": drawn(problem)}
    mass = buffer(problem)
    differentiate(ops.routed_attention, problem, mass, **kwargs)
    assert_same_mass(mass, exact_mass(problem, **kwargs))
    assert mass.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counted", ["all", "from", "queries", "both"])
def test_packed_sequences(counted: str, dtype: torch.dtype, device: torch.device) -> None:
    """Each sequence has the mass that it has alone; one is empty, one a single token."""
    case = Case(batch=4, queries=70, keys=70, ragged=False, poison=False, again=2, dtype=dtype)
    problem = case.make(device)
    lengths = [70, 0, 1, 55]
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    spans = problem.visual.spans.clone()
    spans[1:3] = 0
    fields = (problem.visual.inv_freq, problem.visual.shift, problem.visual.start)
    visual = VisualContext(spans, *fields)
    heads = [
        torch.cat([x[row, :, :length] for row, length in enumerate(lengths)], 1)[None]
        for x in problem[:3]
    ]
    kwargs = {"mass_from": problem.mass_from - 20} if counted in ("from", "both") else {}
    queries = None
    if counted in ("queries", "both"):
        queries = (torch.arange(bounds[-1], device=device) % 3 != 0)[None]
    mass, wanted = buffer(problem), buffer(problem)
    inputs = [x.clone().requires_grad_() for x in heads]
    given = {"visual_mass": mass, "mass_in_backward": True, "mass_queries": queries}
    out = ops.routed_attention(*inputs, visual, cu_seqlens=bounds, **given, **kwargs)
    assert not mass.any()
    out.sum().backward()
    for row, (begin, end) in enumerate(pairwise(bounds)):
        if begin == end:
            continue
        alone = [x[:, :, begin:end].double().requires_grad_() for x in heads]
        some = {name: value[row : row + 1] for name, value in kwargs.items()}
        some["mass_queries"] = None if queries is None else queries[:, begin:end]
        some |= {"visual_mass": wanted[row : row + 1], "mass_in_backward": True}
        reference.routed_attention(*alone, visual.row(row), **some).sum().backward()
    assert_same_mass(mass, wanted, dtype)
    assert mass[0].any() and mass[3].any() and not mass[1].any()


def test_queries_before_the_first_key_are_not_counted(device: torch.device) -> None:
    problem = Case(queries=30, keys=6, again=1, ragged=False, poison=False).make(device)
    fields = (problem.visual.spans, problem.visual.inv_freq, problem.visual.shift)
    visual = VisualContext(*fields, torch.full((2, 1), -40, dtype=torch.int32, device=device))
    now, later = buffer(problem), buffer(problem)
    ops.routed_attention(*problem[:3], visual, visual_mass=now)
    query = problem.query.clone().requires_grad_()
    given = {"visual_mass": later, "mass_in_backward": True}
    ops.routed_attention(query, *problem[1:3], visual, **given).sum().backward()
    assert now.any()
    assert_same_mass(later, now)


def test_uncounted_queries_do_not_spoil_it() -> None:
    """Padding may hold anything at all."""
    problem = Case(queries=40, keys=40, ragged=False, poison=False, again=1).make()
    queries = torch.ones(2, 40, dtype=torch.bool)
    queries[:, [0, 7, 21]] = False
    clean, found = buffer(problem), buffer(problem)
    differentiate(ops.routed_attention, problem, clean, mass_queries=queries)
    query = problem.query.clone()
    query.transpose(1, 2)[~queries] = torch.nan
    differentiate(ops.routed_attention, problem._replace(query=query), found, mass_queries=queries)
    assert torch.equal(found, clean)


def test_a_mass_of_any_strides() -> None:
    problem = PREFILL[1].but(poison=False).make()
    whole = torch.zeros(2, 3, 5, problem.max_visual + 4)
    mass = whole[:, 2, 1:5:2, : problem.max_visual + 1]
    differentiate(ops.routed_attention, problem, mass)
    assert_same_mass(mass[..., :-1], exact_mass(problem))
    assert not mass[..., -1].any()
    assert torch.isclose(whole.sum(), mass.sum())


PROBLEM = PREFILL[1].but(poison=False).make()
GIVEN = {"visual_mass": buffer(PROBLEM), "mass_in_backward": True}
WRONG = {
    "queries alone": (
        {"mass_in_backward": False, "mass_queries": torch.ones(2, 40, dtype=torch.bool)},
        ValueError,
        "mass_queries needs mass_in_backward=True",
    ),
    "no mass": ({"visual_mass": None}, ValueError, "mass_in_backward needs visual_mass"),
    "mass too narrow": (
        {"visual_mass": torch.zeros(2, 2, 1)},
        ValueError,
        "spans must hold at most 1 visual tokens",
    ),
    "mass of another dtype": (
        {"visual_mass": buffer(PROBLEM).double()},
        TypeError,
        "visual_mass must be torch.float32",
    ),
    "queries of another shape": (
        {"mass_queries": torch.ones(2, 41, dtype=torch.bool)},
        ValueError,
        r"mass_queries must have shape \[2, 40\], got \[2, 41\]",
    ),
    "queries are int": (
        {"mass_queries": torch.ones(2, 40, dtype=torch.int32)},
        TypeError,
        "mass_queries must be torch.bool, got torch.int32",
    ),
    "queries on another device": (
        {"mass_queries": torch.ones(2, 40, dtype=torch.bool, device="meta")},
        ValueError,
        "mass_queries must be on cpu",
    ),
    "queries are a list": ({"mass_queries": [1]}, TypeError, "mass_queries must be a tensor"),
    "mass_from of another dtype": (
        {"mass_from": torch.zeros(2).long()},
        TypeError,
        "mass_from must be torch.int32",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_by_name(name: str, backend: str) -> None:
    changes, error, words = WRONG[name]
    query = PROBLEM.query.clone().requires_grad_()
    with pytest.raises(error, match=words):
        ops.routed_attention(query, *PROBLEM[1:4], **PROBLEM.kwargs(), **(GIVEN | changes))


def test_errors_of_paged_and_packed_calls() -> None:
    table = torch.zeros(1, 1, dtype=torch.int32)
    query, cache = torch.randn(1, 4, 4, 32), torch.randn(1, 2, 40, 32)
    visual = VisualContext.from_spans(
        torch.tensor([[[0, 3]]], dtype=torch.int32), PROBLEM.visual.inv_freq[:16]
    )
    given = {"visual_mass": torch.zeros(1, 2, 3), "mass_in_backward": True}
    length = torch.tensor([40], dtype=torch.int32)
    with pytest.raises(ValueError, match="counts nothing with block_table"):
        ops.routed_attention(
            query, cache, cache, visual, block_table=table, key_length=length, **given
        )
    heads = (torch.randn(1, 2, 9, 32), torch.randn(1, 2, 9, 32), torch.randn(1, 2, 9, 32))
    for queries, words in ((torch.ones(2, 9), "shape"), (torch.ones(1, 9), "torch.bool")):
        with pytest.raises((TypeError, ValueError), match=f"mass_queries must .*{words}"):
            ops.routed_attention(*heads, visual, cu_seqlens=[0, 9], mass_queries=queries, **given)
    with pytest.raises(ValueError, match="mass_queries needs mass_in_backward=True"):
        queries = torch.ones(1, 9, dtype=torch.bool)
        ops.routed_attention(*heads, visual, cu_seqlens=[0, 9], mass_queries=queries)


@pytest.mark.parametrize("packed", [False, True])
def test_refused_under_compile(packed: bool) -> None:
    problem = Case(batch=1, queries=20, keys=20, ragged=False, poison=False).make()
    kwargs = {"cu_seqlens": [0, 20]} if packed else {}
    mass = buffer(problem)

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(query: Tensor) -> Tensor:
        given = {"visual_mass": mass, "mass_in_backward": True, **kwargs}
        return ops.routed_attention(query * 1, *problem[1:4], **given)

    query = problem.query.clone().requires_grad_()
    with pytest.raises(Exception, match="mass_in_backward does not work under torch.compile"):
        compiled(query)
