"""`lookagain recipe`: all stages of a method, each resumable, and a report at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from . import inputs
from .errors import UserError
from .printing import plain

RECIPES = ("qwen-la",)


def run(
    name: str, config: str, out: Path | None, questions: int | None, jobs: int | None = None
) -> None:
    """Run a recipe, or go on where it was interrupted.

    Raises:
        UserError: there is no such recipe, its configuration is wrong, the folder holds another
            one, or a stage failed.
    """
    if name not in RECIPES:
        raise UserError(f"there is no recipe {name!r}", f"Known are: {', '.join(RECIPES)}.")
    if out is not None:
        inputs.check_folder(out)
    from ..training.recipe import RecipeConfig
    from ..training.recipe_run import run_recipe
    from ..training.run_config import read_yaml

    console = Console(highlight=False)
    hint = "See lookagain recipe --help."
    try:
        replaced: dict[str, Any] = {} if out is None else {"output": str(out)}
        if questions is not None:
            given = read_yaml(config).get("evaluate") or {}
            if isinstance(given, dict):  # else the configuration's own check says so
                replaced["evaluate"] = {**given, "questions": questions}
        if jobs is not None:
            replaced["jobs"] = jobs
        settings = RecipeConfig.load(config, **replaced)
        inputs.check_folder(Path(settings.output))
        done = run_recipe(settings, lambda line: console.print(plain(line), soft_wrap=True))
        from ..training.recipe_report import write_report

        report = write_report(settings, done)
    except ValueError as error:
        raise UserError(str(error), hint) from error
    except RuntimeError as error:
        raise UserError(str(error), "What is done is kept: the same command goes on.") from error
    console.print(plain(f"report in {report}"))
