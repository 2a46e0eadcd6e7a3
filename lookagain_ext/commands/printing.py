"""An answer on the terminal, as it comes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.text import Text

from ..template import REFLECTION, TAGS, hidden_tokens

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from ..trace import Reflection, Trace

MARK = "⟲"
_TAG = re.compile("(" + "|".join(re.escape(tag) for tag in TAGS) + ")")
_STYLES = {"REFLECTION": "bright_cyan", "CONCLUSION": "bold"}


def plain(text: object) -> Text:
    """Text for the terminal that a person named: no markup, and no byte that is no character."""
    return Text(str(text).encode(errors="backslashreplace").decode())


def sighting(reflection: Reflection) -> str:
    """For example "looked again: 18 of 36 visual tokens"."""
    if reflection.ignored:
        return "text only: too many reflections before this one"
    if not reflection.num_shown:
        return "text only"
    return f"looked again: {reflection.num_shown} of {reflection.num_visual} visual tokens"


def latest_reflection(trace: Trace | None) -> Reflection | None:
    """The last reflection of the only row so far."""
    return trace.reflections[0][-1] if trace and trace.reflections[0] else None


def styled(answer: str, sightings: list[str]) -> Text:
    """A whole answer with its tags dimmed and each reflection marked.

    Args:
        answer: decoded with the tags kept.
        sightings: one for each `<REFLECTION>`; missing ones are not marked.
    """
    text, style, marks = Text(), "", iter(sightings)
    for piece in _TAG.split(answer):
        if not piece.strip():
            continue
        if piece not in TAGS:
            text.append(piece.strip() + " ", style)
            continue
        name = piece.strip("</>")
        if piece.startswith("</"):
            text.append(piece, "dim")
            style = ""
        else:
            text.append("" if not text or text.plain.endswith("\n") else "\n")
            text.append(piece + " ", "dim")
            style = _STYLES.get(name, "")
        if piece == REFLECTION and (mark := next(marks, None)):
            text.append(f"{MARK} {mark}\n", "yellow")
    return text


class AnswerPrinter:
    """A streamer for `model.generate` that prints blocks on lines of their own.

    How much a reflection was shown is known one token later than its tag; it is printed then.

    Args:
        tokenizer: decodes the tokens.
        console: to print to.
        latest: gives what the last reflection so far was shown, or None.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        console: Console,
        latest: Callable[[], Reflection | None],
    ) -> None:
        self._tokenizer = tokenizer
        self._console = console
        self._latest = latest
        vocabulary = tokenizer.get_vocab()
        self._tags = {vocabulary[tag]: tag for tag in TAGS if tag in vocabulary}
        self._hidden = hidden_tokens(tokenizer)
        self._prompt_seen = False
        self._pending: list[int] = []
        self._printed = ""
        self._style = ""
        self._spaces = ""
        self._line_open = False
        self._awaiting = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (first call) or the next token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.reshape(-1).tolist():
            self._settle()
            if token in self._tags:
                self._print_tag(self._tags[token])
            elif token not in self._hidden:
                self._print_token(token)

    def end(self) -> None:
        """Print what is left and close the line."""
        self._settle()
        self._flush()
        self._new_line()

    def _settle(self) -> None:
        """Say what the reflection just opened was shown."""
        if not self._awaiting:
            return
        self._awaiting = False
        found = self._latest()
        if found is not None:
            self._emit(f" {MARK} {sighting(found)}", "yellow")
            self._new_line()

    def _print_tag(self, tag: str) -> None:
        self._flush()
        name = tag.strip("</>")
        closes = tag.startswith("</")
        if not closes:
            self._new_line()
        self._emit(tag, "dim")
        self._style = "" if closes else _STYLES.get(name, "")
        self._awaiting = tag == REFLECTION

    def _print_token(self, token: int) -> None:
        """Print the new end of the text; half a character waits for its other half."""
        self._pending.append(token)
        text = self._tokenizer.decode(self._pending)
        if text.endswith("\ufffd"):
            return
        new = text[len(self._printed) :]
        self._printed = text
        if not self._line_open:
            new = new.lstrip(" ")
        self._emit(new, self._style)
        if text.endswith("\n"):
            self._pending, self._printed = [], ""

    def _flush(self) -> None:
        if self._pending:
            text = self._tokenizer.decode(self._pending)
            self._emit(text[len(self._printed) :], self._style)
        self._pending, self._printed = [], ""

    def _emit(self, text: str, style: str) -> None:
        """Print, but keep spaces back until something follows them on the line."""
        text = self._spaces + text
        kept = text.rstrip(" ")
        self._spaces = text[len(kept) :]
        if kept:
            self._console.out(kept, style=style or None, highlight=False, end="")
            self._line_open = not kept.endswith("\n")

    def _new_line(self) -> None:
        if self._line_open:
            self._console.print()
        self._line_open, self._spaces = False, ""
