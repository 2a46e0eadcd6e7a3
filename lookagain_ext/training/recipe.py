"""Qwen Look Again's recipe (arXiv 2505.23558) from end to end, by commands that exist.

Base model → cold start → BRPO → distillation → fine-tuning of the *base* model on what was
distilled, with reflections that see nothing again (off), all visual tokens (COPY) or the most
attended (ROUTE). Each stage is a command with a configuration file that anyone can run by hand;
the recipe writes the files, runs the commands in turn, and keeps a journal of what is done.
Interrupted, even by ``kill -9``, the same call goes on: finished stages are skipped, the one that
was interrupted goes on by its own means.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .checkpoint import write_atomically
from .journal import Journal
from .rewards import PRESETS
from .run_config import read_yaml

JOURNAL = "recipe.jsonl"
STRATEGIES: tuple[str, ...] = ("off", "copy", "route")
_QUIET = {  # bars for the loading of small files, and warnings for authors, hide what matters
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}


@dataclass(frozen=True)
class RecipeConfig:
    """What a recipe does, stage by stage.

    The entries of a stage are those of its command's configuration, without `output`, `model` and
    what the recipe knows from the stages before.

    Attributes:
        output: folder of everything.
        base: `{model: NAME}`, a folder or a name on the hub whose vocabulary has the tags; or a
            configuration of `lookagain train sft` for the small model, which makes the base.
        coldstart: of `lookagain train coldstart`.
        brpo: of `lookagain train brpo`.
        distill: options of `lookagain distill` by name, and `questions`.
        sft: of `lookagain train sft` through TRL, without `look_again`.
        presets: of BRPO's rewards, one run for each; distillation goes on from the first.
        strategies: of the last stage, one run for each.
        route_ratio: the share of visual tokens that ROUTE is trained with.
        evaluate: `{questions: N}` grades every model on N held-out drawn questions, and
            `ratios: [...]` the ROUTE model at these shares too; None leaves that out.
        speed: whether to measure a training step that looks again beside others.
        launch: what starts a training command on several devices, as a list of words:
            `[accelerate, launch, --config_file, zero3.yaml]`.

    Raises:
        ValueError: if an entry is missing, unknown or wrong, by name.
    """

    output: str
    base: dict[str, Any]
    coldstart: dict[str, Any]
    brpo: dict[str, Any]
    distill: dict[str, Any]
    sft: dict[str, Any]
    presets: tuple[str, ...] = PRESETS
    strategies: tuple[str, ...] = STRATEGIES
    route_ratio: float = 0.5
    evaluate: dict[str, Any] | None = None
    speed: bool = False
    launch: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        """Check what the stages themselves would not see, or only hours later."""
        for name in ("base", "coldstart", "brpo", "distill", "sft"):
            stage = getattr(self, name)
            if not isinstance(stage, dict) or not stage:
                raise ValueError(f"{name} must hold names and values, got {stage!r}")
            if name != "base" and (set(stage) & {"output", "model"}):
                raise ValueError(f"{name}: output and model are set by the recipe")
        for name, known in (("presets", PRESETS), ("strategies", STRATEGIES)):
            chosen = getattr(self, name)
            if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(known):
                hint = "; YAML reads a bare off as false: use quotes" if False in chosen else ""
                raise ValueError(f"{name} must be some of {', '.join(known)}, got {chosen}{hint}")
        if "questions" not in self.distill:
            raise ValueError("distill needs questions, such as scenes:1000:7")
        if self.evaluate is not None and "questions" not in self.evaluate:
            raise ValueError("evaluate needs questions, the number of held-out ones")

    @classmethod
    def load(cls, path: str | Path, **replaced: Any) -> RecipeConfig:  # noqa: ANN401
        """Read a YAML file, or a packaged one such as "configs/tiny/recipe-quick.yaml".

        Args:
            path: of the file.
            **replaced: entries that are not to be as in the file.
        """
        data = {**read_yaml(path), **replaced}
        fields = {one.name: one for one in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - set(fields)):
            known = ", ".join(sorted(fields))
            raise ValueError(f"a recipe has no entry {', '.join(unknown)}; known are: {known}")
        required = ("output", "base", "coldstart", "brpo", "distill", "sft")
        if missing := [name for name in required if name not in data]:
            raise ValueError(f"a recipe needs {', '.join(missing)}")
        lists = {n: tuple(data[n]) for n in ("presets", "strategies", "launch") if data.get(n)}
        return cls(**{**data, **lists})


@dataclass(frozen=True)
class Step:
    """One command of a recipe.

    Attributes:
        name: of the step, and of what it makes.
        command: its words; the first is "lookagain", or "python" for a module.
        settings: what its configuration file holds, or None.
        launched: whether it runs under `launch`.
    """

    name: str
    command: tuple[str, ...]
    settings: dict[str, Any] | None = None
    launched: bool = False


def steps(config: RecipeConfig) -> list[Step]:
    """All commands of a recipe, in order."""
    folder = Path(config.output)
    made: list[Step] = []

    def train(kind: str, name: str, stage: dict[str, Any], **more: Any) -> str:  # noqa: ANN401
        settings = {"output": str(folder / name), **stage, **more}
        file = str(folder / "configs" / f"{name}.yaml")
        command = ("lookagain", "train", kind, "--config", file)
        if kind == "coldstart":
            made.append(Step(f"{name}-data", (*command, "--data-only"), settings))
        made.append(Step(name, command, settings, launched="trainer" in settings))
        return str(folder / name / "model")

    base = config.base.get("model")
    if not isinstance(base, str):
        base = train("sft", "base", {**config.base, "held_out": 0})
    cold = train("coldstart", "coldstart", config.coldstart, model=base)
    zero = {}
    for preset in config.presets:
        rewards = {**config.brpo.get("rewards", {}), "preset": preset}
        zero[preset] = train("brpo", f"brpo-{preset}", config.brpo, model=cold, rewards=rewards)
    options = {k: v for k, v in config.distill.items() if k != "questions"}
    options = {"model": zero[config.presets[0]], "strategy": _looks(config.brpo), **options}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    where = folder / "distill"
    questions = str(config.distill["questions"])
    made.append(Step("distill", ("lookagain", "distill", questions, *words, f"--out={where}")))
    data = {"path": str(where / "kept-00000-of-00001.jsonl"), "reader": "llava-cot"}
    for strategy in config.strategies:
        looks = {"strategy": strategy, "route_ratio": config.route_ratio}
        trainer = {**config.sft.get("trainer", {}), "look_again": looks}
        more = {"model": base, "data": data, "trainer": trainer}
        train("sft", f"sft-{strategy}", config.sft, **more)
    made += _evaluations(config, base, zero)
    if config.speed:
        file = folder / "evaluation" / "speed.json"
        made.append(Step("speed", ("lookagain", "bench", "--suite=training_step", f"--out={file}")))
    return made


def _evaluations(config: RecipeConfig, base: str, zero: dict[str, str]) -> list[Step]:
    """A grading of each model, of ROUTE at other shares, and of COPY that says nothing."""
    if config.evaluate is None:
        return []
    folder = Path(config.output)
    looks = {"base": "off", "coldstart": _looks(config.coldstart)}
    models = {"base": base, "coldstart": str(folder / "coldstart" / "model")}
    for preset, model in zero.items():
        looks[f"brpo-{preset}"], models[f"brpo-{preset}"] = _looks(config.brpo), model
    for strategy in config.strategies:
        looks[f"sft-{strategy}"] = strategy
        models[f"sft-{strategy}"] = str(folder / f"sft-{strategy}" / "model")
    made = [
        _evaluation(config, name, models[name], looks[name], config.route_ratio) for name in models
    ]
    if "copy" in config.strategies:
        name, more = "vision-only", ("--empty-reflections",)
        made.append(_evaluation(config, name, models["sft-copy"], "copy", 1.0, *more))
    if "route" in config.strategies:
        for ratio in config.evaluate.get("ratios", ()):
            name = f"route-{round(100 * ratio)}"
            made.append(_evaluation(config, name, models["sft-route"], "route", ratio))
    return made


def _evaluation(
    config: RecipeConfig, name: str, model: str, strategy: str, ratio: float, *more: str
) -> Step:
    options = {k: v for k, v in (config.evaluate or {}).items() if k != "ratios"}
    words = [f"--{option.replace('_', '-')}={value}" for option, value in options.items()]
    if name != "base":
        words.append("--no-guessing")
    file = Path(config.output) / "evaluation" / f"{name}.json"
    module = ("python", "-m", "lookagain_ext.synthetic", model)
    chosen = (f"--strategy={strategy}", f"--ratio={ratio}")
    return Step(f"evaluate-{name}", (*module, *chosen, *more, *words, f"--json={file}"))


def _looks(stage: dict[str, Any]) -> str:
    looks = stage.get("trainer", {}).get("look_again", "off")
    return looks["strategy"] if isinstance(looks, dict) else looks


def run_recipe(config: RecipeConfig, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Run what is not done yet; the journal's entries come back, one a step.

    Args:
        config: the recipe.
        say: told what begins, what is skipped and what it took.

    Raises:
        ValueError: the folder holds another recipe.
        RuntimeError: a command failed; what is done stays done.
    """
    folder = Path(config.output)
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    about = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("output", "launch")}
    with Journal(folder / JOURNAL, about) as journal:
        planned = steps(config)
        for number, step in enumerate(planned):
            words = shlex.join(step.command)
            head = f"[{number + 1}/{len(planned)}] {step.name}"
            if number in journal.done:
                say(f"{head}: done, {journal.done[number]['seconds']:.0f} s")
                continue
            say(f"{head}: {words}")
            if step.settings is not None:
                plain = yaml.safe_dump(step.settings, sort_keys=False)
                write_atomically(
                    folder / "configs" / f"{step.name.removesuffix('-data')}.yaml", plain
                )
            begun = time.perf_counter()
            dies = functools.partial(_die_with_parent, os.getpid())
            environment = {**_QUIET, **os.environ}
            argv = _argv(step, config.launch)
            code = subprocess.call(argv, preexec_fn=dies, env=environment)
            if code:
                raise RuntimeError(f"{step.name} failed with exit code {code}: {words}")
            seconds = round(time.perf_counter() - begun, 1)
            journal.add(
                [{"number": number, "name": step.name, "command": words, "seconds": seconds}]
            )
        return [journal.done[number] for number in range(len(planned))]


def _argv(step: Step, launch: tuple[str, ...]) -> list[str]:
    """What is executed: this interpreter, or the launcher, with the step's words."""
    words = list(step.command)
    start = ["-m", "lookagain_ext.cli", *words[1:]] if words[0] == "lookagain" else words[1:]
    return [*launch, *start] if launch and step.launched else [sys.executable, *start]


def _die_with_parent(parent: int) -> None:
    """Ask Linux to end a step when the recipe is killed: else two could run at once."""
    parent_death_signal = 1  # PR_SET_PDEATHSIG in <sys/prctl.h>
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)
    if os.getppid() != parent:  # it was killed before this was asked
        os.kill(os.getpid(), signal.SIGTERM)
