"""Qwen Look Again's recipe (arXiv 2505.23558) from end to end, by commands that exist.

Base model → cold start → BRPO → distillation → fine-tuning of the *base* model on what was
distilled, with reflections that see nothing again (off), all visual tokens (COPY) or the most
attended (ROUTE). Each stage is a command with a configuration file that anyone can run by hand;
the recipe writes the files and runs the commands: see `lookagain_ext.training.recipe_run`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .recipe_check import check_entries_of_recipe, check_stages
from .rewards import PRESETS
from .run_config import read_yaml

STRATEGIES: tuple[str, ...] = ("off", "copy", "route")


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
        jobs: how many commands may run at the same time; 1 where one takes up the devices.

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
    jobs: int = 1

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
        if isinstance(self.evaluate, dict) and "questions" not in self.evaluate:
            raise ValueError("evaluate needs questions, the number of held-out ones")
        if type(self.jobs) is not int or self.jobs < 1:
            raise ValueError(f"jobs must be a number from 1 on, got {self.jobs!r}")
        check_entries_of_recipe(self)

    @classmethod
    def load(cls, path: str | Path, **replaced: Any) -> RecipeConfig:  # noqa: ANN401
        """Read a YAML file, or a packaged one such as "configs/tiny/recipe-quick.yaml".

        Args:
            path: of the file.
            **replaced: entries that are not to be as in the file.

        Raises:
            ValueError: if an entry of the recipe or of one of its stages is wrong, by name.
        """
        data = {**read_yaml(path), **replaced}
        fields = {one.name: one for one in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - set(fields)):
            known = ", ".join(sorted(fields))
            raise ValueError(f"a recipe has no entry {', '.join(unknown)}; known are: {known}")
        required = ("output", "base", "coldstart", "brpo", "distill", "sft")
        if missing := [name for name in required if name not in data]:
            raise ValueError(f"a recipe needs {', '.join(missing)}")
        lists = {n: data[n] for n in ("presets", "strategies", "launch") if data.get(n)}
        for name, value in lists.items():
            if not isinstance(value, list | tuple):
                raise ValueError(f"{name} must be a list, got {value!r}")
            lists[name] = tuple(value)
        made = cls(**{**data, **lists})
        check_stages(made)
        return made


@dataclass(frozen=True)
class Step:
    """One command of a recipe.

    Attributes:
        name: of the step, and of what it makes.
        command: its words; the first is "lookagain", or "python" for a module.
        needs: names of the steps that must be done before it begins.
        settings: what its configuration file holds, or None.
        launched: whether it runs under `launch`.
        alone: whether it measures speed, so that nothing may run beside it; it needs all others.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    settings: dict[str, Any] | None = None
    launched: bool = False
    alone: bool = False


def steps(config: RecipeConfig) -> list[Step]:
    """All commands of a recipe; each comes after those that it needs."""
    folder = Path(config.output)
    made: list[Step] = []

    def train(
        kind: str,
        name: str,
        stage: dict[str, Any],
        needs: tuple[str, ...] = (),
        **more: Any,  # noqa: ANN401
    ) -> str:
        settings = {"output": str(folder / name), **stage, **more}
        file = str(folder / "configs" / f"{name}.yaml")
        command = ("lookagain", "train", kind, "--config", file)
        if kind == "coldstart":
            made.append(Step(f"{name}-data", (*command, "--data-only"), needs, settings))
            needs = (*needs, f"{name}-data")
        made.append(Step(name, command, needs, settings, launched="trainer" in settings))
        return str(folder / name / "model")

    base = config.base.get("model")
    after_base: tuple[str, ...] = ()
    if not isinstance(base, str):
        base, after_base = train("sft", "base", {**config.base, "held_out": 0}), ("base",)
    cold = train("coldstart", "coldstart", config.coldstart, after_base, model=base)
    zero = {}
    for preset in config.presets:
        more = {"model": cold, "rewards": {**config.brpo.get("rewards", {}), "preset": preset}}
        zero[preset] = train("brpo", f"brpo-{preset}", config.brpo, ("coldstart",), **more)
    options = {k: v for k, v in config.distill.items() if k != "questions"}
    options = {"model": zero[config.presets[0]], "strategy": _looks(config.brpo), **options}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    where = folder / "distill"
    command = ("lookagain", "distill", str(config.distill["questions"]), *words, f"--out={where}")
    made.append(Step("distill", command, (f"brpo-{config.presets[0]}",)))
    data = {"path": str(where / "kept-00000-of-00001.jsonl"), "reader": "llava-cot"}
    for strategy in config.strategies:
        looks = {"strategy": strategy, "route_ratio": config.route_ratio}
        trainer = {**config.sft.get("trainer", {}), "look_again": looks}
        more = {"model": base, "data": data, "trainer": trainer}
        train("sft", f"sft-{strategy}", config.sft, (*after_base, "distill"), **more)
    made += _evaluations(config, base, zero, after_base)
    if config.speed:
        file = folder / "evaluation" / "speed.json"
        command = ("lookagain", "bench", "--suite=training_step", f"--out={file}")
        made.append(Step("speed", command, tuple(step.name for step in made), alone=True))
    return made


def _evaluations(
    config: RecipeConfig, base: str, zero: dict[str, str], after_base: tuple[str, ...]
) -> list[Step]:
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

    def grade(name: str, model: str, strategy: str, ratio: float, *more: str) -> Step:
        needs = after_base if model == "base" else (model,)
        return _evaluation(config, name, models[model], needs, strategy, ratio, *more)

    made = [grade(name, name, looks[name], config.route_ratio) for name in models]
    if "copy" in config.strategies:
        made.append(grade("vision-only", "sft-copy", "copy", 1.0, "--empty-reflections"))
    if "route" in config.strategies:
        for ratio in config.evaluate.get("ratios", ()):
            made.append(grade(f"route-{round(100 * ratio)}", "sft-route", "route", ratio))
    return made


def _evaluation(
    config: RecipeConfig,
    name: str,
    model: str,
    needs: tuple[str, ...],
    strategy: str,
    ratio: float,
    *more: str,
) -> Step:
    options = {k: v for k, v in (config.evaluate or {}).items() if k != "ratios"}
    words = [f"--{option.replace('_', '-')}={value}" for option, value in options.items()]
    if name != "base":
        words.append("--no-guessing")
    file = Path(config.output) / "evaluation" / f"{name}.json"
    module = ("python", "-m", "lookagain_ext.synthetic", model)
    chosen = (f"--strategy={strategy}", f"--ratio={ratio}")
    command = (*module, *chosen, *more, *words, f"--json={file}")
    return Step(f"evaluate-{name}", command, needs)


def _looks(stage: dict[str, Any]) -> str:
    looks = stage.get("trainer", {}).get("look_again", "off")
    return looks["strategy"] if isinstance(looks, dict) else looks
