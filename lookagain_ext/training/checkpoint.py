"""Checkpoints that survive a kill: written beside the old one, then renamed over it."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace ``path`` by ``data``; at any moment the old or the new content is there, whole."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write ``state`` and the states of all random generators to ``folder``, atomically."""
    partial = folder / (CHECKPOINT + ".partial")
    random_states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    with open(partial, "wb") as file:
        torch.save({**state, "random": random_states}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / CHECKPOINT)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The state in ``folder``, or None; the random generators are set as they were.

    The file is one this trainer wrote itself: like every pickle, do not load a stranger's.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    state = torch.load(path, map_location="cpu", weights_only=False)
    random.setstate(state["random"]["python"])
    np.random.set_state(state["random"]["numpy"])
    torch.set_rng_state(state["random"]["torch"])
    return state


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def rewind_metrics(path: Path, step: int) -> None:
    """Drop the lines written after ``step``: they will be written again."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
