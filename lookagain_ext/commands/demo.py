"""`lookagain demo`: a fresh scene, one question, the three strategies side by side."""

from __future__ import annotations

import random
from pathlib import Path

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from . import inputs
from .ask import choose_strategy, print_files, quiet_transformers
from .printing import plain

_SAYS = {
    "copy": "all visual tokens again",
    "route": "the most attended again",
    "off": "text only",
}


def run(seed: int | None, ratio: float, model_name: str, out: Path) -> None:
    """Draw, ask three times, and print the answers beside each other.

    Raises:
        UserError: something handed over is wrong.
    """
    inputs.check_ratio(ratio)
    inputs.check_folder(out)
    quiet_transformers()
    console = Console(highlight=False)
    seed = random.randrange(100_000) if seed is None else seed
    with Console(stderr=True).status(plain(f"loading {model_name}")) as status:
        from ..generation import LookAgainConfig
        from ..synthetic.grade import is_right
        from ..synthetic.questions import ask
        from ..synthetic.scenes import Scene
        from .asking import answer, seen, write_results
        from .printing import styled

        model, processor = inputs.load_model(model_name)
        choose_strategy("copy", processor.tokenizer, model_name)
        board = Scene.random(seed)
        question = ask(board, seed)
        picture = board.render(3)
        picture.save(out / "scene.png")
        panels, files = [], [out / "scene.png"]
        for strategy, says in _SAYS.items():
            status.update(f"asking with {strategy}")
            config = LookAgainConfig(strategy=strategy, route_ratio=ratio, track_attention=True)
            found = answer(model, processor, picture, question.text, config)
            files += write_results(
                out / strategy,
                seen(processor, picture),
                found,
                question.text,
                seed=seed,
                model=model_name,
                strategy=strategy,
                ratio=ratio if strategy == "route" else None,
                right_answer=question.answer,
            )
            right = is_right(found.text, question)
            verdict = Text(f"{'✓' if right else '✗'} {found.conclusion or 'no conclusion'}", "bold")
            verdict.append(f"   {len(found.tokens)} tokens, {found.rate:.0f} a second", "dim")
            body = styled(found.text, found.sightings)
            body.append("\n\n").append(verdict)
            panels.append((f"{strategy}: {says}", body, "green" if right else "yellow"))
    console.print(f"scene {seed}: [bold]{question.text}[/]")
    console.print(f"[dim]right answer:[/] {question.answer}")
    width = max(25, min(46, console.width // len(panels) - 1))
    console.print(
        Columns([Panel(body, title=t, border_style=s, width=width) for t, body, s in panels])
    )
    print_files(console, [file for file in files if file.suffix == ".png"])
    console.print(f"[dim]The same scene again: lookagain demo --seed {seed}")
