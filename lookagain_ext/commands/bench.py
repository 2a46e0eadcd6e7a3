"""`lookagain bench`: every measured ratio in one table."""

from __future__ import annotations

from pathlib import Path

from . import inputs


def run(quick: bool, out: Path | None) -> None:
    """Measure, print, and write the figures to `out` if there is one."""
    if out is not None:
        inputs.check_file(out)
    from ..bench import run as measure

    measure(quick, out)
