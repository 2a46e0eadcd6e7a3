"""Prompts for models that help to make training data: text files with ``$names`` to fill in."""

from __future__ import annotations

from importlib import resources
from string import Template


def fill(prompt: str, **parts: str) -> str:
    """The prompt in the file ``prompt``.txt with its names filled in.

    What is filled in is not looked at, whatever signs it holds.

    Raises:
        ValueError: there is no such prompt, or a name in it is not given.
    """
    file = resources.files(__package__) / f"{prompt}.txt"
    if not file.is_file():
        raise ValueError(f"there is no prompt {prompt!r}")
    try:
        return Template(file.read_text(encoding="utf-8")).substitute(parts)
    except KeyError as error:
        raise ValueError(f"the prompt {prompt!r} needs {error.args[0]!r}") from None
