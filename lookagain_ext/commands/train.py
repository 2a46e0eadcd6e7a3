"""`lookagain train`: the trainers, from the command line."""

from __future__ import annotations

from pathlib import Path

from . import inputs
from .errors import UserError


def run_sft(config: str, out: Path | None, resume: bool) -> None:
    """Train by supervised fine-tuning; going on where an earlier run stopped.

    Raises:
        UserError: the configuration is wrong, or the folder holds another run.
    """
    if out is not None:
        inputs.check_folder(out)
    from ..training.config import SFTConfig
    from ..training.sft import train

    try:
        settings = SFTConfig.load(config)
        if out is None:
            inputs.check_folder(Path(settings.output))
        train(settings, output=out, resume=resume)
    except ValueError as error:
        raise UserError(str(error), "See lookagain train sft --help.") from error
