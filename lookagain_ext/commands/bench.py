"""`lookagain bench`: every measured ratio in one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import inputs
from .errors import UserError


def run(quick: bool, out: Path | None, suites: Sequence[str] = ()) -> None:
    """Measure all suites or some, print, and write the figures to `out` if there is one.

    Raises:
        UserError: a suite has an unknown name.
    """
    if out is not None:
        inputs.check_file(out)
    from ..bench import run as measure

    try:
        measure(quick, out, list(suites) or None)
    except ValueError as error:
        raise UserError(str(error), "See lookagain bench --help.") from error
