"""`lookagain train`: the trainers, from the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    from ..training.run_config import read_yaml
    from ..training.sft import train

    try:
        if "trainer" in read_yaml(config):
            run_trl("sft", config, out, None, resume)
            return
        settings = SFTConfig.load(config)
        if out is None:
            inputs.check_folder(Path(settings.output))
        train(settings, output=out, resume=resume)
    except ValueError as error:
        raise UserError(str(error), "See lookagain train sft --help.") from error


def run_coldstart(config: str, out: Path | None, data_only: bool, resume: bool) -> None:
    """Write the reflections of a cold start and train on them; going on where it stopped.

    Raises:
        UserError: as `run_trl`, or the writer cannot be asked.
    """
    if out is not None:
        inputs.check_folder(out)
    from ..training.coldstart_run import run_coldstart as run
    from ..training.endpoint import EndpointError

    with _told("coldstart"):
        try:
            run(config, output=out, resume=resume, data_only=data_only)
        except EndpointError as error:
            hint = "What is written is kept: the same command goes on."
            raise UserError(str(error), hint) from error


def run_trl(kind: str, config: str, out: Path | None, look_again: str | None, resume: bool) -> None:
    """Train by a TRL trainer; going on where an earlier run stopped.

    Raises:
        UserError: the extra is not installed, the configuration is wrong, or the folder holds
            another run.
    """
    if out is not None:
        inputs.check_folder(out)
    with _told(kind):
        from ..training.trl_run import run

        run(kind, config, output=out, look_again=look_again, resume=resume)


@contextmanager
def _told(kind: str) -> Iterator[None]:
    """Mistakes in a configuration, and a missing extra, as one line with a hint."""
    hint = f"See lookagain train {kind} --help."
    try:
        yield
    except ImportError as error:
        if "lookagain" not in str(error):
            raise
        raise UserError(str(error), hint) from error
    except ValueError as error:
        raise UserError(str(error), hint) from error
