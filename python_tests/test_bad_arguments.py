"""Every bad argument is refused by name, with what was expected and what came."""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from cases import Case

from lookagain_ext import NEVER, VisualContext, ops, reference

PROBLEM = Case(keys=20, again=1, select=True, ragged=False, poison=False).make()
ONES = torch.ones(2, dtype=torch.bool)


def ints(*values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def with_visual(**changes: torch.Tensor) -> dict[str, VisualContext]:
    names = ("spans", "inv_freq", "shift", "start", "selected")
    fields = {name: getattr(PROBLEM.visual, name) for name in names} | changes
    return {"visual": VisualContext(**fields)}


ATTENTION = {
    "query is no tensor": ({"query": [1.0]}, TypeError, "query must be a tensor, got list"),
    "query has 3 axes": ({"query": torch.zeros(2, 4, 32)}, ValueError, "query must have shape"),
    "query is int": ({"query": torch.zeros(2, 4, 1, 32).int()}, TypeError, "query must be one of"),
    "key of another batch": ({"key": torch.zeros(3, 2, 20, 32)}, ValueError, "key must have shape"),
    "key of another size": ({"key": torch.zeros(2, 2, 20, 16)}, ValueError, "key must have shape"),
    "key of another dtype": ({"key": PROBLEM.key.half()}, TypeError, "key must be torch.float32"),
    "heads do not divide": ({"query": torch.zeros(2, 3, 1, 32)}, ValueError, "multiple of key's 2"),
    "value of another length": (
        {"value": torch.zeros(2, 2, 21, 32)},
        ValueError,
        "value must have shape [2, 2, 20, 32], got [2, 2, 21, 32]",
    ),
    "key on another device": (
        {"key": PROBLEM.key.to("meta")},
        ValueError,
        "key must be on cpu like the others, got meta",
    ),
    "odd head size": (
        {
            name: torch.zeros(2, 2, 20, 12)[:, :, : 1 if name == "query" else 20]
            for name in ("query", "key", "value")
        }
        | {"visual": None},
        ValueError,
        "head size of 8, 16, … 256, got 12",
    ),
    "last axis strided": (
        {"query": torch.zeros(2, 4, 1, 64)[..., ::2]},
        ValueError,
        "query must be contiguous in its last axis",
    ),
    "scale is nan": ({"scale": float("nan")}, ValueError, "scale must be a finite number"),
    "scale is inf": ({"scale": np.float32("inf")}, ValueError, "scale must be a finite number"),
    "scale is bool": ({"scale": True}, TypeError, "scale must be a finite number, got bool"),
    "scale is text": ({"scale": "1"}, TypeError, "scale must be a finite number, got str"),
    "scale is a tensor": (
        {"scale": torch.tensor(0.1)},
        TypeError,
        "scale must be a finite number, got Tensor",
    ),
    "key_start is int64": ({"key_start": torch.zeros(2).long()}, TypeError, "key_start must be"),
    "key_length too short": ({"key_length": ints(20)}, ValueError, "key_length must have shape"),
    "key_length past the cache": ({"key_length": ints(20, 21)}, ValueError, "key_length"),
    "key_length negative": ({"key_length": ints(20, -1)}, ValueError, "key_length"),
    "key_start negative": ({"key_start": ints(0, -1)}, ValueError, "key_start"),
    "visual is a tuple": ({"visual": (1, 2)}, TypeError, "visual must be a VisualContext"),
    "spans of another batch": (with_visual(spans=ints([[0, 1]])), ValueError, "visual.spans"),
    "spans are int64": (
        with_visual(spans=PROBLEM.visual.spans.long()),
        TypeError,
        "visual.spans must be torch.int32",
    ),
    "span past the keys": (
        with_visual(spans=ints([[0, 1], [2, 3]], [[0, 1], [15, 6]])),
        ValueError,
        "spans",
    ),
    "span of negative length": (
        with_visual(spans=ints([[0, 1], [2, 3]], [[0, 1], [5, -1]])),
        ValueError,
        "spans",
    ),
    "span of negative start": (
        with_visual(spans=ints([[-1, 1], [2, 3]], [[0, 1], [5, 1]])),
        ValueError,
        "spans",
    ),
    "spans overlap": (
        with_visual(spans=ints([[0, 4], [3, 3]], [[0, 1], [5, 1]])),
        ValueError,
        "spans",
    ),
    "too many frequencies": (with_visual(inv_freq=torch.ones(17)), ValueError, "inv_freq"),
    "shift of another width": (with_visual(start=ints([1, 2], [3, 4])), ValueError, "visual.start"),
    "selected is int": (
        with_visual(selected=PROBLEM.visual.selected.int()),
        TypeError,
        "visual.selected must be torch.bool",
    ),
    "selected too narrow": (
        with_visual(selected=PROBLEM.visual.selected[..., :1]),
        ValueError,
        "selected",
    ),
    "mass without visual": (
        {"visual": None, "visual_mass": torch.zeros(2, 2, 9)},
        ValueError,
        "visual_mass needs visual",
    ),
    "mass too narrow": ({"visual_mass": torch.zeros(2, 2, 1)}, ValueError, "at most 1 visual"),
    "mass expanded": (
        {"visual_mass": torch.zeros(2, 1, 40).expand(2, 2, 40)},
        ValueError,
        "visual_mass is written to and must not be expanded, got stride 0 on axis 1",
    ),
    "mass last axis strided": (
        {"visual_mass": torch.zeros(2, 2, 80)[..., ::2]},
        ValueError,
        "visual_mass must be contiguous in its last axis",
    ),
    "mass of wrong heads": ({"visual_mass": torch.zeros(2, 4, 40)}, ValueError, "visual_mass"),
    "mass of wrong dtype": (
        {"visual_mass": torch.zeros(2, 2, 40).half()},
        TypeError,
        "visual_mass",
    ),
    "mass_from without mass": (
        {"mass_from": ints(1, 1)},
        ValueError,
        "mass_from needs visual_mass",
    ),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("name", ATTENTION)
def test_routed_attention(name: str, queries: int, grad: bool) -> None:
    changes, error, message = ATTENTION[name]
    problem = Case(
        queries=queries, keys=20, again=1, select=True, ragged=False, poison=False
    ).make()
    arguments = problem._asdict() | changes
    for field in ("max_visual", "mass_from"):
        arguments.pop(field, None) if field not in changes else None
    if grad and isinstance(arguments["value"], torch.Tensor):
        arguments["value"] = arguments["value"].clone().requires_grad_()
    before = str(arguments.get("visual_mass"))
    with pytest.raises(error, match=re.escape(message)):
        ops.routed_attention(**arguments)
    assert str(arguments.get("visual_mass")) == before


def test_a_mass_too_narrow_for_the_specification() -> None:
    mass = torch.zeros(2, 2, 1)
    with pytest.raises(ValueError, match="at most 1 visual tokens"):
        reference.routed_attention(*PROBLEM[:4], visual_mass=mass)


@pytest.mark.parametrize("scale", [1, np.float32(0.5), np.int64(2), Fraction(1, 3)])
def test_any_real_number_is_a_scale(scale) -> None:
    out, lse = ops.routed_attention(*PROBLEM[:4], scale=scale, return_lse=True)
    assert torch.equal(out, ops.routed_attention(*PROBLEM[:4], scale=float(scale)))
    rows = ints([[0, 20]], [[0, 20]])
    one, other = (
        ops.visual_mass(PROBLEM.query, PROBLEM.key, PROBLEM.visual, rows, scale=x)
        for x in (scale, float(scale))
    )
    assert torch.equal(one, other)


MASS = {
    "rows of another batch": ({"rows": ints([[0, 1]])}, ValueError, "rows must have shape"),
    "rows are int64": (
        {"rows": torch.zeros(2, 1, 2).long()},
        TypeError,
        "rows must be torch.int32",
    ),
    "lse of another shape": ({"lse": torch.zeros(2, 4, 2)}, ValueError, "lse must have shape"),
    "lse in half": ({"lse": torch.zeros(2, 4, 1).half()}, TypeError, "lse must be torch.float32"),
    "scale is bool": ({"scale": True}, TypeError, "scale must be a finite number, got bool"),
    "scale is a tensor": ({"scale": torch.ones(())}, TypeError, "scale must be a finite number"),
    "no context": ({"visual": None}, TypeError, "visual must be a VisualContext"),
    "span past the keys": (
        with_visual(spans=ints([[0, 1], [2, 3]], [[0, 1], [15, 6]])),
        ValueError,
        "spans",
    ),
}


@pytest.mark.parametrize("name", MASS)
def test_visual_mass(name: str) -> None:
    changes, error, message = MASS[name]
    arguments = {
        "query": PROBLEM.query,
        "key": PROBLEM.key,
        "visual": PROBLEM.visual,
        "rows": ints([[0, 20]], [[0, 20]]),
    }
    with pytest.raises(error, match=re.escape(message)):
        ops.visual_mass(**(arguments | changes))


SELECT = {
    "mass is a list": ({"mass": [1.0]}, TypeError, "mass must be a tensor, got list"),
    "mass is flat": ({"mass": torch.zeros(3)}, ValueError, "mass must have shape"),
    "mass is int": ({"mass": torch.zeros(2, 3).int()}, TypeError, "mass must be torch.float32"),
    "ratio of 50": ({"ratio": 50}, ValueError, "ratio must be a number in [0, 1], got 50"),
    "ratio is nan": (
        {"ratio": float("nan")},
        ValueError,
        "ratio must be a number in [0, 1], got nan",
    ),
    "ratio is text": ({"ratio": "0.5"}, TypeError, "ratio must be a number in [0, 1], got str"),
    "count of another batch": ({"num_visual": ints(3)}, ValueError, "num_visual must have shape"),
    "count past the tokens": ({"num_visual": ints(3, 4)}, ValueError, "num_visual"),
    "count negative": ({"num_visual": ints(3, -1)}, ValueError, "num_visual"),
    "count past int32": (
        {"num_visual": torch.tensor([3, 2**33])},
        ValueError,
        "num_visual must fit into int32, got 8589934592",
    ),
    "count is float": ({"num_visual": torch.ones(2)}, TypeError, "num_visual must be torch.int32"),
}


@pytest.mark.parametrize("name", SELECT)
def test_select_visual_tokens(name: str) -> None:
    changes, error, message = SELECT[name]
    arguments = {"mass": torch.rand(2, 3), "ratio": 0.5, "num_visual": ints(3, 3)}
    with pytest.raises(error, match=re.escape(message)):
        ops.select_visual_tokens(**(arguments | changes))


APPEND = {
    "key_cache is int": (
        {"key_cache": torch.zeros(2, 2, 20, 32).int()},
        ValueError,
        "key_cache must be a floating tensor",
    ),
    "value of another shape": (
        {"value_cache": torch.zeros(2, 2, 19, 32)},
        ValueError,
        "value_cache must have shape",
    ),
    "key_length is int64": ({"key_length": ints(9, 9).long()}, TypeError, "key_length must be"),
    "key_length past the cache": ({"key_length": ints(9, 21)}, ValueError, "key_length"),
    "shift is a column": ({"shift": ints([1], [1])}, ValueError, "shift must have shape"),
    "rows are int": ({"rows": ints(1, 0)}, TypeError, "rows must be torch.bool"),
    "selected too narrow": (
        {"selected": torch.ones(2, 1, dtype=torch.bool)},
        ValueError,
        "selected",
    ),
    "span past the row": ({"spans": ints([[0, 3]], [[8, 3]])}, ValueError, "spans"),
}


@pytest.mark.parametrize("name", APPEND)
def test_append_visual(name: str) -> None:
    changes, error, message = APPEND[name]
    key = torch.zeros(2, 2, 20, 32)
    arguments = {
        "key_cache": key,
        "value_cache": key.clone(),
        "key_length": ints(9, 9),
        "spans": ints([[0, 3]], [[2, 3]]),
        "shift": ints(5, 5),
        "inv_freq": torch.ones(16),
    }
    with pytest.raises(error, match=re.escape(message)):
        ops.append_visual_(**(arguments | changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VisualContext.from_spans(ints([0, 1]), torch.ones(4)), "spans must have shape"),
        (lambda: VisualContext.from_spans(ints([[0, 1]]), torch.ones(1, 4)), "inv_freq must have"),
        (lambda: PROBLEM.visual.reinject(ONES.int(), 1, 2), "rows must be bool [2]"),
        (lambda: PROBLEM.visual.reinject(ONES, torch.ones(2), 2), "shift must be an int"),
        (lambda: PROBLEM.visual.reinject(ONES, 1, ints(1, 2, 3)), "start must be an int"),
        (lambda: PROBLEM.visual.reinject(ONES, 1, 2, ONES), "selected must be bool [2, L_c]"),
        (
            lambda: PROBLEM.visual.reinject(ONES, 1, 2, torch.ones(2, 99, dtype=torch.bool)),
            "selected must cover",
        ),
    ],
)
def test_visual_context(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


FREQUENCIES = torch.ones(4)
WIDE = torch.tensor([1, 2**33])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: VisualContext.from_spans([[1, 2]], FREQUENCIES),
            TypeError,
            "spans must be a tensor, got list",
        ),
        (
            lambda: VisualContext.from_spans(ints([[0, 1]]), [1.0]),
            TypeError,
            "inv_freq must be a tensor, got list",
        ),
        (
            lambda: VisualContext.from_spans(torch.ones(2, 1, 2), FREQUENCIES),
            TypeError,
            "spans must be an integer tensor, got torch.float32",
        ),
        (
            lambda: VisualContext.from_spans(ints([[0, 1]]), FREQUENCIES.int()),
            TypeError,
            "inv_freq must be floating, got torch.int32",
        ),
        (
            lambda: VisualContext.from_spans(WIDE.view(1, 1, 2), FREQUENCIES),
            ValueError,
            "spans must fit into int32, got 8589934592",
        ),
        (
            lambda: PROBLEM.visual.reinject([True, False], 1, 2),
            TypeError,
            "rows must be a tensor, got list",
        ),
        (
            lambda: PROBLEM.visual.reinject(ONES, 1, 2, [[True]]),
            TypeError,
            "selected must be a tensor, got list",
        ),
        (lambda: PROBLEM.visual.reinject(ONES, 3.7, 2), TypeError, "shift must be an int"),
        (lambda: PROBLEM.visual.reinject(ONES, 1, True), TypeError, "start must be an int"),
        (lambda: PROBLEM.visual.reinject(ONES, 2**33, 2), ValueError, "shift must fit into int32"),
        (lambda: PROBLEM.visual.reinject(ONES, 1, -WIDE), ValueError, "start must fit into int32"),
    ],
)
def test_visual_context_types(call, error, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_reinject_leaves_the_original_alone() -> None:
    visual = VisualContext.from_spans(ints([[0, 3]], [[2, 3]]), torch.ones(4))
    again = visual.reinject(torch.tensor([True, False]), ints(7, 8), 5)
    assert (visual.num_reinjections, again.num_reinjections) == (0, 1)
    assert again.start.tolist() == [[5], [NEVER]]
    assert again.shift.tolist() == [[7], [8]]
    routed = again.reinject(ONES, 1, 6, torch.eye(3, dtype=torch.bool)[:2])
    assert routed.selected.tolist() == [
        [[True, True, True], [True, False, False]],
        [[True, True, True], [False, True, False]],
    ]


def test_token_keys_count_through_the_spans() -> None:
    spans = ints([[1, 2], [5, 0], [6, 1]], [[0, 1], [3, 1], [4, 0]])
    keys, valid = VisualContext.from_spans(spans, torch.ones(4)).token_keys()
    assert keys.tolist() == [[1, 2, 6], [0, 3, 0]]
    assert valid.tolist() == [[True, True, True], [True, True, False]]
