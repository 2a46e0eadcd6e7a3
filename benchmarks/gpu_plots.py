"""Kept results of a GPU as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 - after the choice of a backend


def plot_kernels(result: dict[str, Any], path: Path) -> None:
    """Each row's ratio with its spread; green where a goal is met, red where it is missed."""
    rows = [
        row for row in result["rows"] if row["against"] != "itself" and row["ratio"] is not None
    ]
    figure, axes = plt.subplots(figsize=(11, 0.32 * len(rows) + 1.2), layout="constrained")
    colours = {True: "tab:green", False: "tab:red", None: "tab:grey"}
    for place, row in enumerate(rows):
        spread = [[max(row["ratio"] - row["p20"], 0)], [max(row["p80"] - row["ratio"], 0)]]
        axes.barh(place, row["ratio"], xerr=spread, color=colours[row["met"]], height=0.7)
        edge = max(row["ratio"], row["p80"])
        axes.text(edge, place, f"  {row['ratio']:.3g} {row['goal']}", va="center", size=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{row['name']} | {row['against']}" for row in rows], size=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("time of ours over time of the baseline, or share of the limit")
    axes.set_title(str(result["machine"].get("gpu", result["machine"]["cpu"])), size=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_generate(result: dict[str, Any], path: Path) -> None:
    """Tokens a second of each way of generating."""
    rows = [row for row in result["rows"] if "tokens_per_second" in row]
    figure, axes = plt.subplots(figsize=(8, 0.3 * len(rows) + 1.2), layout="constrained")
    names = [
        f"{row['kind']}, batch {row['batch']}, {'static' if row['static'] else 'dynamic'} cache"
        for row in rows
    ]
    bars = axes.barh(range(len(rows)), [row["tokens_per_second"] for row in rows])
    axes.bar_label(bars, fmt="%.0f", size=7)
    axes.set_yticks(range(len(rows)), names, size=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(f"tokens a second, {result['layers']} layers of the 7B's shape")
    axes.set_title(str(result["machine"].get("gpu", result["machine"]["cpu"])), size=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
