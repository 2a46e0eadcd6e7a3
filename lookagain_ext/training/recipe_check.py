"""What can be wrong in a recipe's stages, found before the first of them begins."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .checks import check_data, check_names, check_run, is_number, is_whole
from .config import STRATEGIES, SFTConfig
from .run_config import RunConfig

if TYPE_CHECKING:
    from .recipe import RecipeConfig, Step

__all__ = ["check_entries_of_recipe", "check_files", "check_stages"]

Check = tuple[Callable[[Any], bool], str]
_COUNT: Check = (lambda value: is_whole(value, 1), "a whole number from 1 on")
_SEED: Check = (lambda value: is_whole(value, 0), "a whole number from 0 on")
_SHARE: Check = (lambda value: is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
_TEXT: Check = (lambda value: isinstance(value, str), "a text")
_SHARES: Check = (
    lambda value: isinstance(value, list | tuple) and all(map(_SHARE[0], value)),
    "a list of numbers from 0 to 1",
)
_STRATEGY: Check = (lambda value: value in STRATEGIES, f"one of {', '.join(STRATEGIES)}")
_EVALUATE = {"questions": _COUNT, "ratios": _SHARES, "seed": _SEED, "threads": _SEED}
_DISTILL = {
    "questions": _TEXT,
    "reader": _TEXT,
    "split": _TEXT,
    "model": _TEXT,
    "strategy": _STRATEGY,
    "ratio": _SHARE,
    "batch_size": _COUNT,
    "max_new_tokens": _COUNT,
    "temperature": (lambda value: is_number(value) and value >= 0, "a number from 0 on"),
    "seed": _SEED,
    "judge": _TEXT,
    "judge_key": _TEXT,
    "review_votes": _COUNT,
    "device": _TEXT,
}


def check_entries_of_recipe(config: RecipeConfig) -> None:
    """Refuse wrong entries beside the stages that train, and stages that cannot be put together.

    Raises:
        ValueError: by name.
    """
    for name, (right, wanted) in (("output", _TEXT), ("route_ratio", _SHARE)):
        if not right(getattr(config, name)):
            raise ValueError(f"{name} must be {wanted}, got {getattr(config, name)!r}")
    for stage in ("coldstart", "brpo", "sft"):
        for name in ("data", "trainer", "rewards"):
            value = getattr(config, stage).get(name, {})
            if not isinstance(value, dict):
                raise ValueError(f"{stage}: {name} must hold names and values, got {value!r}")
    for stage, known in (("distill", _DISTILL), ("evaluate", _EVALUATE)):
        given = getattr(config, stage)
        if given is None:
            continue
        if not isinstance(given, dict):
            raise ValueError(f"{stage} must hold names and values, got {given!r}")
        check_names(stage, given, known)
        for name, value in given.items():
            right, wanted = known[name]
            if not right(value):
                raise ValueError(f"{stage}: {name} must be {wanted}, got {value!r}")


def check_stages(config: RecipeConfig) -> None:
    """Refuse a recipe of which a stage would refuse its configuration when its turn comes.

    Raises:
        ValueError: with the stage and what its command would say.
    """
    from .recipe import steps

    for step in steps(config):
        if step.settings is None:
            continue
        stage, kind = step.name.split("-")[0], step.command[2]
        try:
            _check_stage(stage, "brpo" if kind == "brpo" else "sft", step.settings)
        except ValueError as error:
            raise ValueError(f"{stage}: {error}") from error


def check_files(step: Step) -> None:
    """Refuse a step whose data is a file that is not there and that no other step makes.

    Raises:
        ValueError: with the stage and the file.
    """
    stage = step.name.split("-")[0]
    if stage in ("coldstart", "brpo") and step.settings is not None:
        try:
            check_data(step.settings["data"])
        except ValueError as error:
            raise ValueError(f"{stage}: {error}") from error


def _check_stage(stage: str, kind: str, settings: dict[str, Any]) -> None:
    if stage == "base":
        SFTConfig.from_dict(settings)
        return
    run = RunConfig.from_dict(settings)
    if kind == "sft" and run.rewards:
        raise ValueError("rewards: only BRPO has them")
    if importlib.util.find_spec("trl") is not None:
        check_run(kind, run.trainer, run.lora)
