"""The curves of a run as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..plots import BLUE, GREY, ORANGE
from .checkpoint import read_metrics

PANELS: dict[str, tuple[str, ...]] = {
    "reward": (
        "rewards/format_reward/mean",
        "rewards/accuracy_reward/mean",
        "rewards/reflection_balance_reward/mean",
    ),
    "reflections an answer": ("reflections/count",),
    "tokens a reflection": ("reflections/length",),
    "loss": ("loss",),
    "right tokens": ("mean_token_accuracy",),
    "KL": ("kl",),
    "attention on the picture": ("visual_attention",),
    "tokens a second": ("tokens_per_second",),
    "seconds a step": ("seconds/rollout", "seconds/scoring", "seconds/training"),
}
"""What is drawn of a run of a TRL trainer: a title, and the metrics under it."""


def plot_curves(metrics: Path, picture: Path) -> None:
    """Draw loss, token accuracy and speed against steps, stages marked, to ``picture`` (PNG).

    Raises:
        ValueError: the metrics file holds no line of training.
    """
    lines = [line for line in read_metrics(metrics) if "loss" in line]
    if not lines:
        raise ValueError(f"{metrics} holds no training steps")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 1, sharex=True)
    rows = (("loss", "loss"), ("accuracy", "share of targets right"), ("rate", "steps per second"))
    steps = [line["step"] for line in lines]
    for axis, (name, label) in zip(axes, rows, strict=True):
        axis.plot(steps, [line[name] for line in lines], linewidth=1)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        previous = None
        for line in lines:
            if line["stage"] != previous:
                axis.axvline(line["step"], color="0.5", linestyle=":", linewidth=1)
                if axis is axes[0]:
                    axis.annotate(
                        line["stage"],
                        (line["step"], 1.02),
                        xycoords=("data", "axes fraction"),
                        fontsize=8,
                    )
                previous = line["stage"]
    axes[0].set_yscale("log")
    axes[-1].set_xlabel("step")
    figure.savefig(picture, dpi=120)


def plot_runs(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    picture: Path,
    panels: Sequence[str] = tuple(PANELS),
) -> None:
    """Draw the metrics of runs of a TRL trainer against their steps, to ``picture`` (PNG).

    For BRPO these are, among others, the curves of Figures 6 and 7 of Qwen Look Again (arXiv
    2505.23558): reflections and their length over the steps, and the rewards.

    Args:
        runs: for each run's name, the lines of its metrics file.
        picture: to write.
        panels: which of ``PANELS`` to draw; those of which no run has a metric are left out.

    Raises:
        ValueError: no run has any of them.
    """
    found = [
        title
        for title in panels
        if any(name in line for lines in runs.values() for line in lines for name in PANELS[title])
    ]
    if not found:
        raise ValueError(f"no metric to draw in the runs {', '.join(runs)}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.7 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in grid[len(found) :]:
        axis.remove()
    for axis, title in zip(grid, found, strict=False):
        for style, (run, lines) in zip(("-", "--", ":"), runs.items(), strict=False):
            names = [n for n in PANELS[title] if any(line.get(n) is not None for line in lines)]
            for colour, name in zip((BLUE, ORANGE, GREY), names, strict=False):
                points = [
                    (line["step"], line[name]) for line in lines if line.get(name) is not None
                ]
                part = name.removesuffix("/mean").split("/")[-1].removesuffix("_reward")
                label = " ".join(word for word in (run if len(runs) > 1 else "", part) if word)
                axis.plot(*zip(*points, strict=True), style, color=colour, linewidth=1, label=label)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.set_xlabel("step")
        if len(axis.lines) > 1:
            axis.legend(fontsize=7)
    figure.savefig(picture, dpi=120)
