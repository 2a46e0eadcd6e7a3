"""Decoding splits keys into chunks and shares them among threads: neither may be noticed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from lookagain_ext import VisualContext, ops, reference
from lookagain_ext.visual import NEVER


def example(
    length: int, queries: int, groups: int, size: int, again: int, dtype: torch.dtype
) -> tuple[tuple[torch.Tensor, ...], VisualContext]:
    generator = torch.Generator().manual_seed(length + queries)

    def random(heads: int, rows: int) -> torch.Tensor:
        return torch.randn(2, heads, rows, size, generator=generator).to(dtype)

    tensors = random(2 * groups, queries), random(2, length), random(2, length)
    first, last = length // 5, length // 2
    spans = torch.tensor([[[first, 3], [first + 5, last - first - 5]], [[first, 6], [0, 0]]])
    context = VisualContext.from_spans(spans, 1e4 ** -torch.linspace(0, 1, size // 2))
    for number in range(again):
        rows = torch.tensor([True, number % 3 == 0])
        start = length - 1 - number % (queries + 1)
        chosen = torch.rand(2, last, generator=generator) < 0.6 if number % 2 else None
        context = context.reinject(rows, 500 + 37 * number, start, chosen)
    return tensors, context


def attend(
    tensors: tuple[torch.Tensor, ...], context: VisualContext, threads: int
) -> list[torch.Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    mass = torch.zeros(2, 2, int(context.num_visual().max()) + tensors[1].shape[2])
    try:
        outputs = ops.routed_attention(*tensors, context, visual_mass=mass, return_lse=True)
    finally:
        torch.set_num_threads(before)
    return [*outputs, mass]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("length", "queries", "groups", "size", "again"),
    [
        (511, 1, 7, 128, 1),
        (512, 1, 1, 64, 0),
        (513, 2, 7, 128, 4),
        (1100, 16, 9, 32, 3),  # many rows: longer chunks
        (577, 3, 8, 88, 16),  # a head size that is no multiple of a vector
    ],
)
def test_chunks_and_threads(
    length: int, queries: int, groups: int, size: int, again: int, dtype: torch.dtype
) -> None:
    tensors, context = example(length, queries, groups, size, again, dtype)
    got = attend(tensors, context, 1)
    for threads in (2, 3, 8):
        for one, many in zip(got, attend(tensors, context, threads), strict=True):
            assert torch.equal(one, many)
    mass = torch.zeros_like(got[2], dtype=torch.float64)
    exact = reference.routed_attention(
        *(x.double() for x in tensors), context, visual_mass=mass, return_lse=True
    )
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for ours, truth in zip(got, [*exact, mass], strict=True):
        torch.testing.assert_close(ours.double(), truth.double(), atol=tolerance, rtol=tolerance)


def test_columns_that_no_row_uses_change_nothing() -> None:
    tensors, context = example(300, 1, 4, 64, 0, torch.bfloat16)
    empty = context.reinject(torch.tensor([False, False]), 5, NEVER)
    for plain, other in zip(attend(tensors, context, 2), attend(tensors, empty, 2), strict=True):
        assert torch.equal(plain, other)


def test_calls_from_several_threads() -> None:
    tensors, context = example(1500, 1, 7, 128, 2, torch.bfloat16)
    expected = attend(tensors, context, 2)
    wrong: list[str] = []

    def repeat() -> None:
        torch.set_num_threads(2)  # holds for this thread, and ends with it
        for _ in range(20):
            mass = torch.zeros_like(expected[2])
            out = ops.routed_attention(*tensors, context, visual_mass=mass)
            if not (torch.equal(out, expected[0]) and torch.equal(mass, expected[2])):
                wrong.append("differs")

    workers = [threading.Thread(target=repeat) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


OWN_THREADS = """
import os, torch
from lookagain_ext import build_info, ops
assert build_info()["threading"] == "own threads"
torch.set_num_threads(4)
query, key = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 3000, 64)
expected = ops.routed_attention(query, key, key)
for _ in range(50):
    assert torch.equal(ops.routed_attention(query, key, key), expected)
child = os.fork()
if child == 0:  # none of the parent's threads exist here
    same = torch.equal(ops.routed_attention(query, key, key), expected)
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0
print("done")
"""


def test_own_threads_and_fork() -> None:
    environment = os.environ | {"LOOKAGAIN_THREADS": "own"}
    run = subprocess.run(
        [sys.executable, "-c", OWN_THREADS], capture_output=True, text=True, env=environment
    )
    assert run.stdout.strip() == "done", run.stderr


def test_asking_before_torch_is_there_does_not_fix_the_threads() -> None:
    code = """
from lookagain_ext import _C
_C.build_info()
import torch
print(_C.build_info()["threading"])
"""
    fresh = "import torch; from lookagain_ext import _C; print(_C.build_info()['threading'])"
    printed = [
        subprocess.run([sys.executable, "-c", text], capture_output=True, text=True).stdout
        for text in (code, fresh)
    ]
    assert printed[0] == printed[1] != ""


def test_an_unknown_instruction_set_is_named() -> None:
    environment = os.environ | {"LOOKAGAIN_ISA": "sse9"}
    run = subprocess.run(
        [sys.executable, "-c", "import lookagain_ext; lookagain_ext.build_info()"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert "got sse9" in run.stderr
    assert "plain" in run.stderr
