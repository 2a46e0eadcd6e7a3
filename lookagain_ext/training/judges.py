"""Judges of answers: any function of a record and an answer, a model, or an endpoint."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .endpoint import ChatEndpoint, EndpointError
from .prompts import fill
from .records import Record

VERDICTS: tuple[str, ...] = ("correct", "incorrect", "unsure")
Judge = Callable[[Record, str], str]
"""Takes a record and an answer to its question, gives one of ``VERDICTS``."""
_VERDICT = re.compile(r"\b(?:(not\s+correct|incorrect)|correct)\b", re.IGNORECASE)


class JudgeError(RuntimeError):
    """A judge that cannot be asked; its answers so far are kept."""


def read_verdict(text: str) -> str:
    """The last verdict in what a judge wrote; "unsure" when there is none."""
    verdicts = list(_VERDICT.finditer(text))
    if not verdicts:
        return "unsure"
    return "incorrect" if verdicts[-1].group(1) else "correct"


class TextJudge:
    """A judge made of a function from prompt to text, a local model for example.

    Args:
        ask: gets the prompt in ``prompts/judge.txt``, filled in.
    """

    def __init__(self, ask: Callable[[str], str]) -> None:
        self._ask = ask

    def __call__(self, record: Record, answer: str) -> str:
        """One of ``VERDICTS``."""
        return read_verdict(self._ask(_prompt(record, answer)))


class EndpointJudge:
    """A judge behind an endpoint of chat completions; may be used by threads.

    Args:
        url: as of :class:`.endpoint.ChatEndpoint`.
        model: the name that the endpoint knows it by.
        show_image: whether the judge is sent the picture.
        **options: the endpoint's other arguments.

    Attributes:
        endpoint: the :class:`.endpoint.ChatEndpoint`.

    Raises:
        ValueError: the URL is none of http or https, the variable is not set, or a number is out
            of range.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        show_image: bool = False,
        **options: Any,  # noqa: ANN401 - as ChatEndpoint's
    ) -> None:
        self.endpoint = ChatEndpoint(url, model, **options)
        self._show_image = show_image

    def __call__(self, record: Record, answer: str) -> str:
        """One of ``VERDICTS``.

        Raises:
            JudgeError: the endpoint refuses the request, or gave no usable reply in all attempts.
        """
        image = record.image if self._show_image else None
        try:
            return read_verdict(self.endpoint(_prompt(record, answer), image))
        except EndpointError as error:
            raise JudgeError(str(error)) from error


def _prompt(record: Record, answer: str) -> str:
    return fill("judge", question=record.question, answer=record.answer, response=answer)
