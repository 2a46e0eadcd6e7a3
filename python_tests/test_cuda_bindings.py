"""What stands before the CUDA kernels, as far as it runs without a GPU.

Ops are told that CPU tensors are on a GPU: every argument goes through the checks of the binding,
and the call ends where the driver is asked for the device.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case

from lookagain_ext import build_info, ops
from lookagain_ext.ops import _cuda

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels themselves"),
    pytest.mark.skipif(not build_info()["cuda_archs"], reason="built without CUDA"),
]
REACHED = r"lookagain_ext: cuda\w+: .*\(cuda\w+\)"  # CUDA's own words for what failed


@pytest.fixture(autouse=True)
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(_cuda, "_stream", lambda tensor: 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("select", [False, True])
def test_attention_reaches_the_device(dtype: torch.dtype, select: bool) -> None:
    problem = Case(dtype=dtype, select=select).make()
    mass = torch.zeros(2, 2, problem.max_visual)
    with pytest.raises(RuntimeError, match=REACHED):
        ops.routed_attention(
            *problem[:4],
            **problem.kwargs(),
            visual_mass=mass,
            mass_from=problem.mass_from,
            return_lse=True,
        )
    with pytest.raises(RuntimeError, match=REACHED):
        ops.routed_attention(*problem[:3])
    table = torch.arange(2, dtype=torch.int32)[:, None]
    with pytest.raises(RuntimeError, match=REACHED):
        ops.routed_attention(*problem[:3], key_length=problem.key_length, block_table=table)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_mass_reaches_the_device(dtype: torch.dtype) -> None:
    problem = Case(dtype=dtype, select=True, queries=20).make()
    query, key, _, visual = problem[:4]
    rows = torch.tensor([[[3, 30]], [[0, 9]]], dtype=torch.int32)
    lse = torch.zeros(query.shape[:3])
    with pytest.raises(RuntimeError, match=REACHED):
        ops.visual_mass(query, key, visual, rows, lse=lse, **problem.kwargs())


def test_selection_and_append_reach_the_device() -> None:
    problem = Case(dtype=torch.bfloat16, select=True).make()
    visual, counts = problem.visual, torch.tensor([3, 4], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=REACHED):
        ops.select_visual_tokens(torch.rand(2, 5), 0.5, counts)
    arguments = (problem.key, problem.value, problem.key_length, visual.spans)
    arguments = (*arguments, visual.shift[:, 0], visual.inv_freq)
    with pytest.raises(RuntimeError, match=REACHED):
        ops.append_visual_(*arguments, selected=visual.selected[:, 0])
    with pytest.raises(RuntimeError, match=REACHED):
        ops.append_visual_(*arguments, rows=torch.tensor([True, False]))


def test_join_reaches_the_device() -> None:
    out, lse = torch.zeros(5, 2, 8), torch.zeros(2, 9)[:, 2:7]
    with pytest.raises(RuntimeError, match=REACHED):
        _cuda.join(out, lse, out.clone(), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="lse must"):
        _cuda.join(out, lse.mT, out.clone(), torch.zeros(2, 5))
    with pytest.raises(TypeError, match="part must"):
        _cuda.join(out, lse, out.half(), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="out must be a float32, float16 or bfloat16 tensor"):
        _cuda.join(out.double(), lse, out.double(), torch.zeros(2, 5))


def test_wrong_arguments_are_named() -> None:
    problem = Case(dtype=torch.bfloat16, again=1).make()
    query, key, value, visual = problem[:4]
    with pytest.raises(ValueError, match="key must"):
        ops.routed_attention(query, key[:, :, :, :8], value)
    with pytest.raises(ValueError, match="key must be contiguous in its last axis"):
        ops.routed_attention(query, key.transpose(2, 3).contiguous().transpose(2, 3), value)
    with pytest.raises(TypeError, match="key_length must be"):
        ops.routed_attention(query, key, value, key_length=problem.key_length.long())
    with pytest.raises(ValueError, match="shift must have at most 32 columns on a GPU, got 33"):
        many = visual.shift.expand(2, 33).contiguous()
        wide = replace(visual, shift=many, start=visual.start.expand(2, 33).contiguous())
        ops.routed_attention(query, key, value, wide)
    with pytest.raises(ValueError, match="visual_mass|mass"):
        ops.routed_attention(query, key, value, visual, visual_mass=torch.zeros(2, 3, 40))
