"""`lookagain doctor`: does looking again hold on this model, on this machine."""

from __future__ import annotations

from rich.console import Console

from . import inputs
from .ask import quiet_transformers
from .errors import UserError
from .printing import plain


def run(model_name: str) -> None:
    """Load the model, put one drawn scene to it, print the findings; exit 1 when one is bad.

    Raises:
        UserError: there is no such model, it takes no pictures or has no reflection token.
    """
    quiet_transformers()
    console = Console(highlight=False)
    with Console(stderr=True).status(plain(f"loading {model_name}")) as status:
        from .. import doctor
        from ..synthetic.questions import ask
        from ..synthetic.scenes import Scene
        from .asking import encode

        model, processor = inputs.load_model(model_name)
        if inputs.reflection_token(processor.tokenizer) is None:
            hint = "lookagain_ext.add_reflection_tokens(model, tokenizer) adds it."
            raise UserError(f"{model_name} has no <REFLECTION> token to examine", hint)
        status.update(plain(f"examining {model_name}"))
        board = Scene.random(0)
        prompt = encode(processor, board.render(2), ask(board, 0).text)
        report = doctor(model, prompt.to(model.device), processor.tokenizer)
    console.print(str(report), soft_wrap=True, markup=False)
    if not report.ok:
        raise SystemExit(1)
