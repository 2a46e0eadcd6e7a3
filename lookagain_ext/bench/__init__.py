"""`lookagain bench`: every measured ratio, with its goal, in one table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from . import attention, generation, training_step
from .measure import Row, machine

SUITES: dict[str, Callable[[bool], Iterator[Row]]] = {
    "decode": attention.decode,
    "decode_mass": attention.decode_mass,
    "decode_paged": attention.decode_paged,
    "decode_reinjections": attention.decode_reinjections,
    "prefill": attention.prefill,
    "training_reinjections": attention.training_reinjections,
    "training_mass": attention.training_mass,
    "append": attention.append,
    "generation": generation.generation,
    "training_step": training_step.training_step,
}


def run(
    quick: bool = False,
    out: Path | None = None,
    suites: list[str] | None = None,
    console: Console | None = None,
) -> list[Row]:
    """Measure, print a table and optionally keep the results.

    Ratios are times of ours over times of the baseline, medians of rounds in which all
    candidates took turns; below 1 ours is faster.

    Args:
        quick: fewer shapes and rounds, about a minute.
        out: JSON file for the results, with machine, versions and commit.
        suites: names from `SUITES`; default all.
        console: where to print.

    Returns:
        The rows of the table.

    Raises:
        ValueError: if a suite has an unknown name.
    """
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 150)
    names = list(SUITES) if suites is None else suites
    for name in names:
        if name not in SUITES:
            raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {name!r}")
    where = machine()
    console.print(
        f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}, "
        f"{where['lookagain_ext']['isa']}"
    )
    rows: list[Row] = []
    with console.status("measuring") as status:
        for name in names:
            status.update(f"measuring {name}")
            for row in SUITES[name](quick):
                rows.append(row)
                found = "not measured" if row.ratio is None else f"{row.ratio:.3g}x"
                status.update(f"measuring {name}: {row.name} {found}")
    console.print(table(rows))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": where, "quick": quick, "rows": [row.as_dict() for row in rows]}
        out.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"Results: {out}", markup=False, soft_wrap=True)
    return rows


def table(rows: list[Row]) -> Table:
    """The rows as a table for the terminal."""
    title = "Times of ours over times of the baseline (median, p20-p80)"
    result = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("what", "against", "ratio", "ms", "goal", "met", "note"):
        result.add_column(column, justify="right" if column in ("ratio", "ms") else "left")
    for row in rows:
        met = {True: "yes", False: "[bold]no[/bold]", None: ""}[row.met]
        ratio = time = ""
        if row.ratio is not None:
            ratio = f"{row.ratio:.3g} ({row.p20:.3g}-{row.p80:.3g})"
            time = f"{row.milliseconds:.3g}"
        result.add_row(row.name, row.against, ratio, time, row.goal, met, row.note)
    return result


def markdown(result: dict[str, Any]) -> str:
    """The table of a kept result, as in the README.

    Args:
        result: what `run(out=...)` wrote, read back.
    """
    where = result["machine"]
    lines = [
        f"{where['cpu']}, {where['threads']} threads, {where['lookagain_ext']['isa']}, torch "
        f"{where['torch']}, commit {where['commit']}. Times of ours over times of the baseline, "
        "medians (20th to 80th percentile) of rounds in which all candidates took turns.",
        "",
        "| what | against | ratio | goal | met |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        met = {True: "yes", False: "**no**", None: ""}[row["met"]]
        ratio = row["note"]  # why it was not measured
        if row["ratio"] is not None:
            ratio = f"{row['ratio']:.3g} ({row['p20']:.3g} to {row['p80']:.3g})"
        lines.append(f"| {row['name']} | {row['against']} | {ratio} | {row['goal']} | {met} |")
    return "\n".join(lines)
