"""The curves of a run as one picture."""

from __future__ import annotations

from pathlib import Path

from .checkpoint import read_metrics


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
