"""How the extension is found, and what is said when it is not there or not ours."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import lookagain_ext
from lookagain_ext import ExtensionError, _native, build_info, ops


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch):
    """Makes importing `_C` give or raise what a test wants."""

    def arrange(outcome: object) -> None:
        def import_module(name: str) -> object:
            assert name == "lookagain_ext._C"
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(importlib, "import_module", import_module)
        _native.native.cache_clear()

    yield arrange
    monkeypatch.undo()
    _native.native.cache_clear()


def attend() -> torch.Tensor:
    query = torch.ones(1, 2, 1, 8)
    return ops.routed_attention(query, query[:, :1], query[:, :1])


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (ModuleNotFoundError("lookagain_ext._C"), "is not built for this Python.*pip install"),
        (ImportError("undefined symbol: foo"), "cannot be loaded .undefined symbol: foo.*Rebuild"),
        (SimpleNamespace(build_info=lambda: {"version": "0.0.9"}), "was built for 0.0.9.*Rebuild"),
    ],
)
def test_a_missing_or_wrong_build_is_told_in_words(loading, outcome: object, words: str) -> None:
    loading(outcome)
    with pytest.raises(ExtensionError, match=words) as raised:
        attend()
    assert "LOOKAGAIN_BACKEND=reference" in str(raised.value)


def test_a_build_without_cuda_says_once_that_it_is_slow_there(loading) -> None:
    info = {"version": lookagain_ext.__version__, "cuda_archs": []}
    loading(SimpleNamespace(build_info=lambda: info))
    _native._use_kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match="without CUDA kernels.*nvcc"):
            assert not _native.use_kernels("cuda")
        assert _native.use_kernels("cpu")
    finally:
        _native._use_kernels.cache_clear()


def test_the_reference_needs_no_extension() -> None:
    code = """
import sys, torch
sys.modules["lookagain_ext._C"] = None
from lookagain_ext import ops
x = torch.ones(1, 2, 1, 8)
print(ops.routed_attention(x, x[:, :1], x[:, :1]).sum().item())
"""
    environment = os.environ | {"LOOKAGAIN_BACKEND": "reference"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert run.stdout.strip() == "16.0", run.stderr


def test_build_info() -> None:
    info = build_info()
    assert info["version"] == lookagain_ext.__version__
    assert info["isa"] in info["isas"]
    assert "plain" in info["isas"]
    assert isinstance(info["cuda_archs"], list)


def test_tensors_arrive_the_same_without_the_exchange_interface() -> None:
    """torch before 2.9 hands tensors over through data_ptr and strides."""
    module = _native.native()
    query = torch.randn(2, 4, 3, 16).transpose(0, 1).contiguous().transpose(0, 1)
    key = torch.randn(2, 2, 10, 24)[..., :16]
    fast = ops.routed_attention(query, key, key)
    module.use_dlpack_exchange(False)
    try:
        slow = ops.routed_attention(query, key, key)
    finally:
        module.use_dlpack_exchange(True)
    assert torch.equal(fast, slow)
