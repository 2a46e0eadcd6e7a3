"""`lookagain scene`: a drawn board and what can be asked about it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import inputs
from .errors import UserError
from .printing import plain


def run(path: Path, seed: int, scale: int) -> None:
    """Write the picture, print one question of each type with its answer.

    Raises:
        UserError: the file cannot be written, or its name says no format.
    """
    from PIL import Image

    from ..synthetic.questions import TYPES, ask
    from ..synthetic.scenes import Scene

    if path.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"{path} does not say which format to write", "End the name in .png.")
    inputs.check_file(path)
    board = Scene.random(seed)
    board.render(scale).save(path)
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("type", "question", "answer"):
        table.add_column(name)
    for kind in TYPES:
        question = ask(board, seed, kind)
        table.add_row(question.type, question.text, question.answer)
    console = Console(highlight=False)
    console.print(table)
    about = f"  {len(board.shapes)} shapes, seed {seed}"
    console.print(plain(path).append(about, "dim"), soft_wrap=True)
