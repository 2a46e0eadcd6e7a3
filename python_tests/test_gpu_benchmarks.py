"""The GPU suite's programs run where there is no GPU, on tiny shapes: none of it rots unseen."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import emulated
import pytest
import torch
import typer
from typer.testing import CliRunner

from lookagain_ext.ops import _cuda

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks").is_dir(), reason="the benchmarks lie in the repository only"
)


@pytest.fixture
def run(one_thread, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Calls a benchmark's program in this process, which has imported most of it already."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setenv("COLUMNS", "150")

    def call(module: str, *arguments: str) -> str:
        program = typer.Typer()
        program.command()(importlib.import_module(module).main)
        done = CliRunner().invoke(program, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output[-3000:]
        return done.output

    return call


def test_kernels_as_a_program_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    command = [sys.executable, "-m", "benchmarks.gpu_kernels", "--device", "cpu", "--small"]
    done = subprocess.run(
        [*command, "--seconds", "0.02", "--out", str(out)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    rows = json.loads(out.read_text())["rows"]
    goals = {row["goal"] for row in rows}
    assert {"<= 1x", "<= 1.1x", "<= 1 us more", "<= 0.2x", ">= 0.9", ">= 0.85"} <= goals
    assert all(row["ratio"] > 0 for row in rows)
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_one_kernel_alone(run) -> None:
    options = ("--device", "cpu", "--batch", "1", "--keys", "256", "--visual", "64")
    for kernel in ("decode", "append", "select"):
        printed = run("benchmarks.profile", kernel, *options, "--seconds", "0.02")
        assert "share" in printed and "ncu --set full" in printed


def test_generate(run, tmp_path: Path) -> None:
    out = tmp_path / "generate.json"
    options = ("--small", "--layers", "1", "--steps", "6", "--rounds", "1", "--batch", "1")
    printed = run("benchmarks.gpu_generate", "--device", "cpu", *options, "--out", str(out))
    kept = json.loads(out.read_text())
    kinds = [row["kind"] for row in kept["rows"]]
    assert kinds == ["unpatched", "off", "copy", "route", "eager"], printed
    assert all(row["tokens_per_second"] > 0 for row in kept["rows"]), printed
    assert kept["reencoding"]["ratio"] > 0


def test_training(run, tmp_path: Path) -> None:
    out = tmp_path / "training.json"
    options = ("--device", "cpu", "--small", "--seconds", "0.02")
    run("benchmarks.gpu_training", *options, "--out", str(out))
    rows = json.loads(out.read_text())["rows"]
    for word in ("forward", "backward", "visual_mass", "peak memory", "first call"):
        assert any(row["name"].startswith(word) for row in rows)
    # Peers that need a GPU say so in their row.
    assert all(row["ratio"] > 0 for row in rows if "not measured: " not in row["note"])
    left_out = {row["against"] for row in rows if row["ratio"] is None}
    assert {"FlexAttention", "FlexAttention, copies appended"} <= left_out
    elsewhere = ("FlexAttention", "flash-attn", "own kernels", "through FA")
    assert all(against.startswith(elsewhere) for against in left_out)


def test_training_by_our_own_kernels(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have rows beside the library's way, and are compared with it first."""
    emulated.install(monkeypatch)
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import gpu_training_problems as problems

    shapes = (problems.Shape(64), problems.Shape(64, 1, 16))
    monkeypatch.setattr(problems, "SMALL", shapes)
    out = tmp_path / "training.json"
    options = ("--device", "cpu", "--small", "--seconds", "0.02", "--compile-seconds", "0")
    run("benchmarks.gpu_training", *options, "--suite", "attention", "--out", str(out))
    rows = [row for row in json.loads(out.read_text())["rows"] if "own kernels" in row["against"]]
    assert len(rows) == 4 and all(row["ratio"] > 0 for row in rows)
    run("benchmarks.gpu_training", *options, "--suite", "mass", "--out", str(out))
    rows = [row for row in json.loads(out.read_text())["rows"] if "within" in row["name"]]
    assert len(rows) == 1 and rows[0]["ratio"] > 0


def test_training_step(run, tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    options = ("--device", "cpu", "--small", "--seconds", "0.1")
    run("benchmarks.gpu_training_step", *options, "--out", str(out))
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"].split(", ")[-1] for row in rows] == ["copy", "route", "off"] + [
        "copy",
        "route",
    ]


def test_every_kernel_on_the_emulated_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a memory checker is run over: all of it agrees with the reference here too."""
    emulated.install(monkeypatch)
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import gpu_every_kernel

    smaller = {"DEVICE": "cpu", "MANY_ROWS": 8, "QUERIES": 60}  # for four multiprocessors
    for name, value in smaller.items():
        monkeypatch.setattr(gpu_every_kernel, name, value)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    captured = []

    @contextmanager
    def graph(_):
        with monkeypatch.context() as patch:
            patch.setattr(_cuda, "is_capturing", lambda tensor: captured.append(tensor) or True)
            yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    gpu_every_kernel.main()
    assert captured
