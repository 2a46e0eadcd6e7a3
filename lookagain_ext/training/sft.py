"""A plain trainer: stages of supervised fine-tuning, exactly resumable.

``lookagain train sft --config configs/tiny.yaml`` calls :func:`train`.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from ..models.loading import TINY
from ..synthetic.processor import SceneProcessor
from ..synthetic.tiny import build_tiny, load_tiny, save_tiny
from .checkpoint import (
    CHECKPOINT,
    METRICS,
    load_checkpoint,
    rewind_metrics,
    save_checkpoint,
    write_atomically,
)
from .config import SFTConfig, Stage
from .curves import plot_curves
from .data import batches
from .stages import look_again_entries, looking_again, loss_of


@dataclass
class _Run:
    """Everything a checkpoint must bring back."""

    config: SFTConfig
    model: Qwen2_5_VLForConditionalGeneration
    processor: SceneProcessor
    stage: int = 0
    step: int = 0
    seconds: float = 0.0
    optimizer: torch.optim.Optimizer | None = None
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    @property
    def total(self) -> int:
        """Steps done since the beginning of the run."""
        return sum(stage.steps for stage in self.config.stages[: self.stage]) + self.step

    def begin_stage(self, stage: Stage) -> None:
        """Choose what the stage trains, and make a fresh optimizer for it."""
        self.model.requires_grad_(True)
        self.model.model.visual.requires_grad_(stage.train_vision)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=self.config.weight_decay
        )

    def save(self) -> None:
        """Write the checkpoint."""
        state = {
            "config": self.config.to_dict(),
            "stage": self.stage,
            "step": self.step,
            "seconds": self.seconds,
            "sums": self.sums,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
        }
        save_checkpoint(self.folder, state)

    def export(self, stage: Stage, name: str) -> Path:
        """Write the model to a folder of its own, with how it was trained to look again."""
        self.model.config.lookagain = look_again_entries(stage)
        return save_tiny(self.model, self.processor, self.folder / name)

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint's content."""
        self.stage, self.step = state["stage"], state["step"]
        self.seconds, self.sums = state["seconds"], state["sums"]
        self.model.load_state_dict(state["model"])
        if self.stage < len(self.config.stages) and state["optimizer"] is not None:
            self.begin_stage(self.config.stages[self.stage])
            self.optimizer.load_state_dict(state["optimizer"])


def learning_rate(stage: Stage, step: int) -> float:
    """Linear rise over the warm-up, then a cosine to a tenth, at ``step`` counted from 0."""
    if step < stage.warmup:
        return stage.learning_rate * (step + 1) / stage.warmup
    done = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return stage.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def train(
    config: SFTConfig | str | Path,
    *,
    output: str | Path | None = None,
    resume: bool = True,
    console: Console | None = None,
) -> Path:
    """Run all stages; the folder of the trained model comes back.

    Writes to ``output``: ``config.yaml``, ``checkpoint.pt`` every ``checkpoint_every`` steps,
    ``metrics.jsonl``, ``curves.png``, a model folder for each stage and ``model`` at the end.
    A run that was interrupted, even by ``kill -9``, goes on from its checkpoint and ends with the
    same weights as if it had not been.

    Args:
        config: or the path of its YAML file, or the name of a packaged one.
        output: replaces the configuration's folder.
        resume: go on from a checkpoint in ``output``; False refuses to start where one lies.
        console: to print to.

    Raises:
        ValueError: a wrong configuration, or a folder that holds another run.
    """
    config = config if isinstance(config, SFTConfig) else SFTConfig.load(config)
    if output is not None:
        config = SFTConfig.from_dict({**config.to_dict(), "output": str(output)})
    console = console or Console()
    if config.threads:
        torch.set_num_threads(config.threads)
    run = _start(config, resume, console)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    try:
        with bar:
            for number in range(run.stage, len(config.stages)):
                _train_stage(run, config.stages[number], bar)
    except KeyboardInterrupt:
        console.print(f"interrupted after step {run.total}; the same command goes on from there")
        raise
    done = run.export(config.stages[-1], "model")
    plot_curves(run.folder / METRICS, run.folder / "curves.png")
    said = f"{run.total} steps in {run.seconds / 60:.1f} minutes; model in {done}"
    console.print(said, markup=False)
    if config.held_out:
        _report(run, console)
    return done


def _start(config: SFTConfig, resume: bool, console: Console) -> _Run:
    """A fresh run, or the one whose checkpoint lies in the folder."""
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    if config.init:
        model, processor = load_tiny(None if config.init == TINY else config.init)
    else:
        model, processor = build_tiny(config.seed, **config.model)
    model.set_attn_implementation("eager")  # a fifth faster than sdpa at these lengths on a CPU
    model.train()
    run = _Run(config, model, processor)
    state = load_checkpoint(folder)
    if state is None:
        write_atomically(folder / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
        write_atomically(folder / METRICS, "")
        return run
    if not resume:
        raise ValueError(f"{folder} already holds {CHECKPOINT}; resume it or choose another folder")
    ours, theirs = config.to_dict(), state["config"]
    differing = sorted(k for k in ours if k != "output" and ours[k] != theirs.get(k))
    if differing:
        names = ", ".join(differing)
        raise ValueError(f"{folder} holds a run with another configuration ({names} differ)")
    run.restore(state)
    rewind_metrics(folder / METRICS, run.total)
    console.print(f"going on from step {run.total} of {config.total_steps}")
    return run


def _train_stage(run: _Run, stage: Stage, bar: Progress) -> None:
    """Train from ``run.step`` to the end of the stage and move on to the next."""
    if run.optimizer is None:
        run.begin_stage(stage)
    config = run.config
    task = bar.add_task(stage.name, total=stage.steps, completed=run.step, note="")
    source = batches(stage, run.processor, config.seed, run.step, config.workers)
    begun = time.perf_counter()
    with looking_again(run.model, stage, run.processor.tokenizer):
        for batch in source:
            loss, accuracy = _step(run, stage, batch)
            run.step += 1
            elapsed, begun = time.perf_counter() - begun, time.perf_counter()
            run.seconds += elapsed
            new = (loss, accuracy, elapsed, 1.0)
            run.sums = [a + b for a, b in zip(run.sums, new, strict=True)]
            if run.total % config.log_every == 0 or run.step == stage.steps:
                _log(run, stage, bar, task)
            if run.step == stage.steps:
                break
            if run.total % config.checkpoint_every == 0:
                run.save()
            bar.advance(task)
    bar.update(task, completed=stage.steps)
    run.export(stage, stage.name)
    run.stage, run.step, run.optimizer = run.stage + 1, 0, None
    run.save()


def _step(run: _Run, stage: Stage, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """One optimizer step; loss and accuracy come back."""
    optimizer = run.optimizer
    assert optimizer is not None  # begin_stage made it
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(stage, run.step)
    with torch.autocast("cpu", torch.bfloat16, enabled=run.config.precision == "bf16"):
        loss, accuracy = loss_of(run.model, batch, run.processor)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, run.config.max_grad_norm, error_if_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item(), accuracy


def _log(run: _Run, stage: Stage, bar: Progress, task: Any) -> None:  # noqa: ANN401 - rich's id
    """Write the mean since the last line to the metrics file and the bar."""
    loss, accuracy, elapsed, count = run.sums
    line = {
        "step": run.total,
        "stage": stage.name,
        "loss": round(loss / count, 5),
        "accuracy": round(accuracy / count, 5),
        "learning_rate": learning_rate(stage, run.step - 1),
        "seconds": round(run.seconds, 2),
        "rate": round(count / max(elapsed, 1e-9), 3),
    }
    with open(run.folder / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    run.sums = [0.0] * 4
    bar.update(task, note=f"loss {line['loss']:.3f} right {line['accuracy']:.3f}")


def _report(run: _Run, console: Console) -> None:
    """Answer held-out questions by generation, and write what came of it."""
    from ..synthetic.grade import evaluate

    stage = run.config.stages[-1]
    report = evaluate(
        run.model.eval(), run.processor, questions=run.config.held_out, strategy=stage.look_again
    )
    write_atomically(run.folder / "held_out.json", json.dumps(report.to_dict(), indent=2) + "\n")
    console.print(report.summary())
