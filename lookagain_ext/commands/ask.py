"""`lookagain ask`: one picture, one question."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from . import inputs
from .errors import UserError
from .printing import plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run(
    image: Path,
    question: str,
    strategy: str,
    ratio: float,
    model_name: str,
    out: Path,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: str | None = None,
) -> None:
    """Check everything that is cheap, load the model, ask, and write the pictures.

    Raises:
        UserError: something handed over is wrong.
    """
    inputs.check_strategy(strategy)
    inputs.check_ratio(ratio)
    inputs.check_temperature(temperature)
    question = inputs.check_question(question)
    picture = inputs.read_picture(image)
    inputs.check_folder(out)
    quiet_transformers()

    console = Console(highlight=False)
    with Console(stderr=True).status(plain(f"loading {model_name}")):
        from ..generation import LookAgainConfig
        from ..synthetic.processor import to_rgb
        from .asking import answer, seen, write_results
        from .printing import AnswerPrinter, latest_reflection

        model, processor = inputs.load_model(model_name, device)
    strategy = choose_strategy(strategy, processor.tokenizer, model_name)
    picture = to_rgb(picture)
    config = LookAgainConfig(strategy=strategy, route_ratio=ratio, track_attention=True)
    found = answer(
        model,
        processor,
        picture,
        question,
        config,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        streamer=lambda session: AnswerPrinter(
            processor.tokenizer, console, lambda: latest_reflection(session.trace)
        ),
    )
    files = write_results(
        out,
        seen(processor, picture),
        found,
        question,
        image=str(image),
        model=model_name,
        strategy=strategy,
        ratio=ratio if strategy == "route" else None,
    )
    notes = [f"{len(found.tokens)} tokens in {found.seconds:.1f} s, {found.rate:.0f} a second"]
    if found.cut_off:
        notes.append("cut off: give it more with --max-new-tokens")
    console.print(f"\n{'; '.join(notes)}", style="dim")
    print_files(console, files)


def choose_strategy(strategy: str, tokenizer: PreTrainedTokenizerBase, model_name: str) -> str:
    """The strategy that the model can follow.

    A model whose tokenizer lacks `<REFLECTION>` never opens a reflection. At a terminal the
    person is asked whether to go on without; elsewhere that is an error.

    Raises:
        UserError: the model cannot look again, and nobody is there to say that it need not.
    """
    if strategy == "off" or inputs.reflection_token(tokenizer) is not None:
        return strategy
    message = f"{model_name} has no <REFLECTION> token, so it cannot look again"
    if sys.stdin.isatty() and sys.stderr.isatty():
        import typer

        if typer.confirm(f"{message}. Ask without (--strategy off)?", default=True, err=True):
            return "off"
    hint = (
        "Ask with --strategy off, or give it the token with "
        "lookagain_ext.add_reflection_tokens(model, tokenizer) and fine-tune it."
    )
    raise UserError(message, hint)


def quiet_transformers() -> None:
    """Keep transformers' progress bars and advice out of an answer; the environment can undo it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def print_files(console: Console, files: list[Path]) -> None:
    """Where the results are, one line each."""
    about = {
        "overlay.png": "where it looked",
        "curve.png": "when it looked",
        "trace.json": "all figures",
        "scene.png": "the picture",
    }
    paths = [plain(file) for file in files]
    width = max(len(path) for path in paths)
    for file, path in zip(files, paths, strict=True):
        path.append(" " * (width - len(path) + 2)).append(about.get(file.name, ""), "dim")
        console.print(path, soft_wrap=True)
