"""Every bad block table is refused by name, with what was expected and what came."""

from __future__ import annotations

import re

import pytest
import torch
from cases import Case
from torch import Tensor

from lookagain_ext import VisualContext, ops, reference

ATTEND = {"kernels": ops.routed_attention, "reference": reference.routed_attention}
APPEND = {"kernels": ops.append_visual_, "reference": reference.append_visual_}


def ints(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attention_arguments(queries: int = 1) -> dict[str, object]:
    """Two rows of 20 and 17 slots in 5 blocks of 8; block 2 is nobody's."""
    query = Case(queries=queries, keys=20).make().query
    draw = torch.Generator().manual_seed(0)
    cache = torch.randn(5, 2, 8, 32, generator=draw)
    return {
        "query": query,
        "key": cache,
        "value": cache * 2,
        "key_length": ints(20, 17),
        "block_table": ints([3, 0, 4], [1, 0, 4]),
    }


ATTENTION_SHAPES = {
    "a list": ({"block_table": [[0]]}, TypeError, "block_table must be a tensor, got list"),
    "int64": (
        {"block_table": ints([3, 0, 4], [1, 0, 4]).long()},
        TypeError,
        "block_table must be torch.int32, got torch.int64",
    ),
    "another batch": (
        {"block_table": ints([3, 0, 4])},
        ValueError,
        "block_table must have shape [2, any], got [1, 3]",
    ),
    "three axes": (
        {"block_table": ints([[3, 0, 4], [1, 0, 4]])},
        ValueError,
        "block_table must have shape [2, any], got [1, 2, 3]",
    ),
    "another device": (
        {"block_table": torch.zeros(2, 3, dtype=torch.int32, device="meta")},
        ValueError,
        "block_table must be on cpu like the others, got meta",
    ),
    "no key_length": (
        {"key_length": None},
        ValueError,
        "block_table needs key_length, the filled slots of each row",
    ),
    "blocks without slots": (
        {"key": torch.zeros(5, 2, 0, 32), "value": torch.zeros(5, 2, 0, 32)},
        ValueError,
        "block_table needs a cache [num_blocks, H_kv, block_size, D] with a block_size of at least "
        "1, got [5, 2, 0, 32]",
    ),
    "value with other blocks": (
        {"value": torch.zeros(6, 2, 8, 32)},
        ValueError,
        "value must have shape [5, 2, 8, 32], got [6, 2, 8, 32]",
    ),
    "key_length past the blocks": (
        {"key_length": ints(20, 25)},
        ValueError,
        "key_length must lie in 0 … 24 (L_k, the slots of a row), got 25 in row 1",
    ),
}


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("name", ATTENTION_SHAPES)
def test_attention(name: str, queries: int) -> None:
    changes, error, message = ATTENTION_SHAPES[name]
    with pytest.raises(error, match=re.escape(message)):
        ops.routed_attention(**(attention_arguments(queries) | changes))


ENTRIES = {
    "past the cache": (
        ints([3, 0, 4], [1, 5, 4]),
        "block_table must hold blocks 0 … 4 of the cache or -1 (unused), got 5 in row 1, entry 1",
    ),
    "past the cache, unread": (
        ints([3, 0, 4, 9], [1, 0, 4, 0]),
        "block_table must hold blocks 0 … 4 of the cache or -1 (unused), got 9 in row 0, entry 3",
    ),
    "below -1": (
        ints([3, 0, 4], [1, 0, -2]),
        "block_table must hold blocks 0 … 4 of the cache or -1 (unused), got -2 in row 1, entry 2",
    ),
    "unused but read": (
        ints([3, 0, 4], [1, 0, -1]),
        "block_table must name a block for every slot that is read",
    ),
}


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("op", ATTEND)
@pytest.mark.parametrize("name", ENTRIES)
def test_attention_entries(name: str, op: str, queries: int) -> None:
    table, message = ENTRIES[name]
    arguments = attention_arguments(queries) | {"block_table": table}
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        ATTEND[op](**arguments)
    if name == "unused but read":
        assert "got -1" in str(caught.value) and "in row 1, entry 2" in str(caught.value)


@pytest.mark.parametrize("op", ATTEND)
def test_unused_entries_that_nothing_reads_are_fine(op: str) -> None:
    arguments = attention_arguments() | {"key_start": ints(0, 8), "key_length": ints(20, 15)}
    plain = ATTEND[op](**arguments)
    unused = ATTEND[op](**(arguments | {"block_table": ints([3, 0, 4], [-1, 0, -1])}))
    assert torch.equal(plain, unused)


@pytest.mark.parametrize("op", ATTEND)
def test_blocks_before_key_start_are_read_by_a_reinjection(op: str) -> None:
    visual = VisualContext.from_spans(ints([[2, 3]], [[2, 3]]), torch.ones(8))
    arguments = attention_arguments() | {"key_start": ints(8, 8)}
    arguments["block_table"] = ints([3, 0, 4], [-1, 0, 4])
    ATTEND[op](**arguments, visual=visual)
    again = visual.reinject(torch.tensor([True, False]), 5, 10)
    ATTEND[op](**arguments, visual=again)
    again = visual.reinject(torch.tensor([False, True]), 5, 10)
    with pytest.raises(ValueError, match=r"block_table must name .*in row 1, entry 0"):
        ATTEND[op](**arguments, visual=again)


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("queries", [1, 20])
def test_no_gradient(queries: int, name: str) -> None:
    arguments = attention_arguments(queries)
    arguments[name] = arguments[name].clone().requires_grad_()
    with pytest.raises(ValueError, match="block_table has no gradient: query, key and value must"):
        ops.routed_attention(**arguments)
    with torch.no_grad():
        ops.routed_attention(**arguments)


def append_arguments() -> dict[str, object]:
    """Two rows of 9 slots in blocks of 8, three tokens of each to be appended."""
    cache = torch.randn(5, 2, 8, 32, generator=torch.Generator().manual_seed(0))
    return {
        "key_cache": cache,
        "value_cache": cache * 2,
        "key_length": ints(9, 14),
        "spans": ints([[0, 3]], [[2, 3]]),
        "shift": ints(5, 5),
        "inv_freq": torch.ones(16),
        "block_table": ints([3, 0, 4], [1, 2, 4]),
    }


APPEND_SHAPES = {
    "a list": ({"block_table": [[0]]}, TypeError, "block_table must be a tensor, got list"),
    "int64": (
        {"block_table": ints([3, 0, 4], [1, 2, 4]).long()},
        TypeError,
        "block_table must be torch.int32, got torch.int64",
    ),
    "another batch": (
        {"block_table": ints([3, 0, 4])},
        ValueError,
        "block_table must have shape [2, any], got [1, 3]",
    ),
    "blocks without slots": (
        {"key_cache": torch.zeros(5, 2, 0, 32), "value_cache": torch.zeros(5, 2, 0, 32)},
        ValueError,
        "block_table needs a cache [num_blocks, H_kv, block_size, D] with a block_size of at least "
        "1, got [5, 2, 0, 32]",
    ),
}


@pytest.mark.parametrize("name", APPEND_SHAPES)
def test_append(name: str) -> None:
    changes, error, message = APPEND_SHAPES[name]
    with pytest.raises(error, match=re.escape(message)):
        ops.append_visual_(**(append_arguments() | changes))


APPEND_VALUES = {
    "past the cache": (
        {"block_table": ints([3, 0, 5], [1, 2, 4])},
        "block_table must hold blocks 0 … 4 of the cache or -1 (unused), got 5 in row 0, entry 2",
    ),
    "below -1": (
        {"block_table": ints([3, 0, 4], [-3, 2, 4])},
        "block_table must hold blocks 0 … 4 of the cache or -1 (unused), got -3 in row 1, entry 0",
    ),
    "unused but read": (
        {"block_table": ints([3, 0, 4], [-1, 2, 4])},
        r"block_table must name a block for every slot that is read.*in row 1, entry 0",
    ),
    "unused but written": (
        {"block_table": ints([3, 0, 4], [1, 2, -1])},
        r"block_table must name a block for every slot that is .*written.*in row 1, entry 2",
    ),
    "no room": (
        {"block_table": ints([3, 0], [1, 2])},
        "row 1 of key_cache has no room: it holds 14 keys, 3 visual tokens are to be appended, its "
        "capacity is 16",
    ),
}


@pytest.mark.parametrize("op", APPEND)
@pytest.mark.parametrize("name", APPEND_VALUES)
def test_append_writes_nothing_when_it_refuses(name: str, op: str) -> None:
    changes, message = APPEND_VALUES[name]
    arguments = append_arguments() | changes
    before = {name: arguments[name].clone() for name in ("key_cache", "value_cache", "key_length")}
    pattern = message if ".*" in message else re.escape(message)
    with pytest.raises(ValueError, match=pattern):
        APPEND[op](**arguments)
    for name, was in before.items():
        assert torch.equal(arguments[name], was), name


@pytest.mark.parametrize("op", APPEND)
def test_append_leaves_unused_entries_alone_that_it_does_not_need(op: str) -> None:
    """Of row 0 the slots 0 … 2 and 9 … 11 are needed, row 1 does not take part."""
    arguments = append_arguments() | {"rows": torch.tensor([True, False])}
    arguments["block_table"] = ints([3, 0, -1], [-1, -1, -1])
    APPEND[op](**arguments)
    assert arguments["key_length"].tolist() == [12, 14]
    value = arguments["value_cache"]
    assert torch.equal(value[0, :, 1:4], value[3, :, :3])
    arguments = append_arguments() | {"selected": torch.tensor([[False] * 3, [True] * 3])}
    arguments["block_table"] = ints([-1, -1, -1], [1, 2, 4])
    APPEND[op](**arguments)
    assert arguments["key_length"].tolist() == [9, 17]
