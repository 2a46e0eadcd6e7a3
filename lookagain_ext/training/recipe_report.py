"""The report of a recipe: one Markdown page and its pictures, made of what the stages wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..bench import markdown
from ..bench.measure import machine
from ..plots import BLUE
from .checkpoint import METRICS, read_metrics, write_atomically
from .curves import plot_runs
from .journal import read_journal
from .recipe import RecipeConfig

_MMMU = {  # Table 4 of arXiv 2505.23558
    "base": 58.6,
    "text-only": 58.8,
    "vision-only": 56.1,
    "route-25": 55.6,
    "sft-route": 59.1,
    "sft-copy": 60.3,
}
_SECONDS = {0: 17.52, 25: 17.90, 50: 18.29, 75: 20.31, 100: 22.33}  # its Table 5, MMMU
_PANELS = (
    "reflections an answer",
    "tokens a reflection",
    "reward",
    "KL",
    "attention on the picture",
    "seconds a step",
)


def write_report(config: RecipeConfig, done: Sequence[dict[str, Any]]) -> Path:
    """Write `report.md`, `brpo.png` and `accuracy.png` to the recipe's folder.

    Args:
        config: the recipe.
        done: the entries of its journal.

    Returns:
        The page.
    """
    folder = Path(config.output)
    grades = {}
    for file in sorted((folder / "evaluation").glob("*.json")):
        read = json.loads(file.read_text(encoding="utf-8"))
        if "marks" in read:
            grades[file.stem] = read
    parts = [_head(config, done)]
    if grades:
        parts += [_stages(config, grades), _comparisons(config, grades)]
        parts += [_table_4(config, grades), _table_5(grades)]
        _plot_accuracy(grades, folder / "accuracy.png")
    parts += [_brpo(config, folder), _distilled(folder), _speed(folder), _commands(done)]
    page = folder / "report.md"
    write_atomically(page, "\n\n".join(part for part in parts if part) + "\n")
    return page


def _head(config: RecipeConfig, done: Sequence[dict[str, Any]]) -> str:
    where = machine()
    minutes = sum(entry["seconds"] for entry in done) / 60
    most = max((entry.get("jobs", 1) for entry in done), default=1)
    beside = f" in sum, up to {most} at the same time" if most > 1 else ""
    seeds = [stage.get("trainer", {}).get("seed") for stage in (config.brpo, config.sft)]
    return (
        "# Qwen Look Again's recipe, from end to end\n\n"
        f"{len(done)} commands, {minutes:.0f} minutes{beside}. "
        f"{where['cpu']}, {where['cores']} cores; torch {where['torch']}, "
        f"transformers {version('transformers')}, TRL {version('trl')}. "
        f"Seeds: base {config.base.get('seed', 0)}, BRPO {seeds[0]}, fine-tuning {seeds[1]}; one "
        "run of each stage, so what differs between two runs of a stage is not in the intervals."
    )


def _stages(config: RecipeConfig, grades: dict[str, Any]) -> str:
    count = next(iter(grades.values()))["questions"]
    guess = grades.get("base", {}).get("guessing", {}).get("all")
    lines = [
        "## Stages",
        "",
        f"Right conclusions among {count} held-out questions, answered greedily, with 95 % "
        "intervals (Wilson)" + (f"; guessing without the picture: {guess:.1%}." if guess else "."),
        "",
        "| model | a reflection shows | right | 95 % interval | in the template | reflections an "
        "answer | tokens each | tokens an answer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in _ordered(config, grades).items():
        low, high = one["interval"]
        lines.append(
            f"| {name} | {one['strategy']} | {one['accuracy']:.1%} | {low:.1%} to {high:.1%} | "
            f"{one['well_formed']:.1%} | {one['mean_reflections']:.2f} | "
            f"{one['mean_reflection_tokens']:.1f} | {one['mean_tokens']:.0f} |"
        )
    types = list(next(iter(grades.values()))["by_type"])
    lines += ["", f"| right, by type of question | {' | '.join(types)} |", "|---" * 7 + "|"]
    for name, one in _ordered(config, grades).items():
        shares = " | ".join(f"{one['by_type'][kind]:.1%}" for kind in types)
        lines.append(f"| {name} | {shares} |")
    return "\n".join([*lines, "", "![Right conclusions of each model](accuracy.png)"])


def _ordered(config: RecipeConfig, grades: dict[str, Any]) -> dict[str, Any]:
    """The models of the stages in their order, without the sweeps."""
    names = ["base", "coldstart", *(f"brpo-{preset}" for preset in config.presets)]
    names += [f"sft-{strategy}" for strategy in config.strategies]
    return {name: grades[name] for name in names if name in grades}


def paired(ours: str, theirs: str) -> tuple[float, float, float]:
    """Difference of two models' shares right on the same questions, with its 95 % interval.

    Args:
        ours: a digit for each question, 1 for right.
        theirs: likewise.

    Returns:
        (difference, low, high), by the normal approximation to the mean of paired differences.

    Raises:
        ValueError: they are not of the same questions.
    """
    if len(ours) != len(theirs) or len(ours) < 2:
        raise ValueError(f"marks must be of the same questions, got {len(ours)}, {len(theirs)}")
    each = [int(a) - int(b) for a, b in zip(ours, theirs, strict=True)]
    mean = sum(each) / len(each)
    variance = sum((one - mean) ** 2 for one in each) / (len(each) - 1)
    spread = 1.959964 * math.sqrt(variance / len(each))
    return mean, mean - spread, mean + spread


def _comparisons(config: RecipeConfig, grades: dict[str, Any]) -> str:
    first = f"brpo-{config.presets[0]}"
    pairs = [
        ("coldstart", "base"),
        (first, "coldstart"),
        ("brpo-hardened", "brpo-paper"),
        ("sft-off", "base"),
        ("sft-copy", "sft-off"),
        ("sft-route", "sft-off"),
        ("sft-copy", "sft-route"),
        ("vision-only", "sft-copy"),
    ]
    lines = [
        "## Paired differences",
        "",
        "On the same questions, in points, with 95 % intervals; one that holds 0 says nothing.",
        "",
        "| | minus | difference | 95 % interval |",
        "|---|---|---|---|",
    ]
    for ours, theirs in dict.fromkeys(pairs):
        if ours != theirs and ours in grades and theirs in grades:
            mean, low, high = paired(grades[ours]["marks"], grades[theirs]["marks"])
            row = f"{100 * mean:+.1f} | {100 * low:+.1f} to {100 * high:+.1f}"
            lines.append(f"| {ours} | {theirs} | {row} |")
    return "\n".join(lines)


def _table_4(config: RecipeConfig, grades: dict[str, Any]) -> str:
    first = f"brpo-{config.presets[0]}"
    rows = [
        ("base model", "base", "base"),
        ("text-only reflection (BRPO)", first, "text-only"),
        ("text-only reflection (fine-tuned, off)", "sft-off", ""),
        ("vision-only: COPY, then close at once", "vision-only", "vision-only"),
        ("ROUTE 25 %", "route-25", "route-25"),
        ("ROUTE 50 %", "sft-route", "sft-route"),
        ("COPY", "sft-copy", "sft-copy"),
    ]
    lines = [
        "## The ablation of Table 4, in shape",
        "",
        "Beside it the paper's MMMU, another task and a model 2600 times as large: only order and "
        "signs can be compared.",
        "",
        "| | right here | 95 % interval | paper, MMMU |",
        "|---|---|---|---|",
    ]
    for text, name, theirs in rows:
        if name in grades:
            low, high = grades[name]["interval"]
            share = f"{grades[name]['accuracy']:.1%} | {low:.1%} to {high:.1%}"
            lines.append(f"| {text} | {share} | {_MMMU.get(theirs, '')} |")
    return "\n".join(lines)


def _table_5(grades: dict[str, Any]) -> str:
    found = {int(name[6:]): one for name, one in grades.items() if name.startswith("route-")}
    if "sft-route" in grades:
        found.setdefault(50, grades["sft-route"])
    if len(found) < 2:
        return ""
    lines = [
        "## The sweep of m of Table 5, in shape",
        "",
        "The model trained with ROUTE answers with other shares. Times are of batches on a machine "
        "that others use too; the paper's +27 % from m = 0 to 100 is its copying, which is not "
        "done here.",
        "",
        "| m | right here | 95 % interval | ms an answer here | paper, s an answer on MMMU |",
        "|---|---|---|---|---|",
    ]
    for share, one in sorted(found.items()):
        low, high = one["interval"]
        ms = 1e3 * one["seconds"] / one["questions"]
        right = f"{one['accuracy']:.1%} | {low:.1%} to {high:.1%}"
        lines.append(f"| {share} % | {right} | {ms:.0f} | {_SECONDS.get(share, '')} |")
    return "\n".join(lines)


def _brpo(config: RecipeConfig, folder: Path) -> str:
    runs = {preset: read_metrics(folder / f"brpo-{preset}" / METRICS) for preset in config.presets}
    runs = {preset: lines for preset, lines in runs.items() if lines}
    if not runs:
        return ""
    plot_runs(runs, folder / "brpo.png", _PANELS)
    shown = {
        "reflections an answer": "reflections/count",
        "tokens each": "reflections/length",
        "format": "rewards/format_reward/mean",
        "accuracy": "rewards/accuracy_reward/mean",
        "balance": "rewards/reflection_balance_reward/mean",
        "KL": "kl",
        "attention on the picture": "visual_attention",
    }
    target = config.brpo.get("rewards", {}).get("target_length", 100)
    lines = [
        "## BRPO: the paper's reward and the hardened one",
        "",
        f"Reflections are to have {target} tokens. Means over the first and the last fifth of the "
        "steps, of sampled answers. The paper sees the number of reflections rise, their length "
        "fall, and accuracy rise (Figures 6 and 7).",
        "",
        f"| | {' | '.join(shown)} |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for preset, logs in runs.items():
        fifth = max(1, len(logs) // 5)
        for when, part in (("first", logs[:fifth]), ("last", logs[-fifth:])):
            row = " | ".join(_mean(part, name, ".3g") for name in shown.values())
            lines.append(f"| {preset}, {when} fifth | {row} |")
    lines += [
        "",
        "![Curves of both runs](brpo.png)",
        "",
        "Seconds of a step, means of the run:",
        "",
    ]
    kinds = ("rollout", "scoring", "training")
    lines += [f"| | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for preset, logs in runs.items():
        row = " | ".join(_mean(logs, f"seconds/{kind}", ".2f") for kind in kinds)
        lines.append(f"| {preset} | {row} |")
    return "\n".join(lines)


def _mean(lines: Sequence[dict[str, Any]], name: str, form: str) -> str:
    values = [line[name] for line in lines if line.get(name) is not None]
    return format(sum(values) / len(values), form) if values else "-"


def _distilled(folder: Path) -> str:
    counts: dict[str, int] = {}
    for journal in sorted((folder / "distill").glob("journal-*.jsonl")):
        for entry in read_journal(journal):
            counts[entry["status"]] = counts.get(entry["status"], 0) + 1
    if not counts:
        return ""
    said = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    return f"## Distillation\n\n{sum(counts.values())} questions answered: {said}."


def _speed(folder: Path) -> str:
    file = folder / "evaluation" / "speed.json"
    if not file.is_file():
        return ""
    measured = json.loads(file.read_text(encoding="utf-8"))
    notes = {row["note"] for row in measured["rows"]}
    return f"## A training step that looks again\n\n{'; '.join(notes)}.\n\n{markdown(measured)}"


def _commands(done: Sequence[dict[str, Any]]) -> str:
    lines = ["## Commands", "", "The recipe's commands; one after the other, this order does:", ""]
    lines.append("```sh")
    lines += [f"{entry['command']}  # {entry['seconds']:.0f} s" for entry in done]
    return "\n".join([*lines, "```"])


def _plot_accuracy(grades: dict[str, Any], picture: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(grades)
    shares = [grades[name]["accuracy"] for name in names]
    spans = [[s - grades[n]["interval"][0] for n, s in zip(names, shares, strict=True)]]
    spans.append([grades[n]["interval"][1] - s for n, s in zip(names, shares, strict=True)])
    figure = Figure(figsize=(7, 0.9 + 0.3 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.errorbar(shares, names, xerr=spans, fmt="o", color=BLUE, capsize=3)
    guess = grades.get("base", {}).get("guessing", {}).get("all")
    if guess:
        axis.axvline(guess, color="0.5", linestyle=":", label="guessing")
        axis.legend()
    axis.set_xlim(0, 1)
    axis.invert_yaxis()
    axis.grid(alpha=0.3)
    axis.set_xlabel("share of right conclusions, 95 % interval")
    figure.savefig(picture, dpi=120)
