"""Cold start: answers that reflect exactly once, between reasoning and conclusion.

Before any reinforcement, Chu et al. (arXiv 2505.23558) fine-tune on about 2000 answers with one
reflection between ``</REASONING>`` and ``<CONCLUSION>``. Here the reflection comes from what is
known about a drawn scene (:func:`synthetic_answer`), or from a model that is asked for it
(:class:`ReflectionWriter`). The paper does not print its prompt; ours is
``prompts/reflection.txt``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..synthetic.answers import LOOK, write_answer
from ..synthetic.questions import Question
from ..template import TAGS, ParsedAnswer, parse, wrap
from .prompts import fill
from .records import Record

_ORDER = ["SUMMARY", "CAPTION", "REASONING", "REFLECTION", "CONCLUSION"]


def insert_reflection(answer: str, reflection: str) -> str:
    """``answer`` with this one reflection between reasoning and conclusion.

    Nothing else changes: the new block and one space are put right before ``<CONCLUSION>``.

    Args:
        answer: in the template, without a reflection.
        reflection: its text, without tags.

    Raises:
        ValueError: the answer is not in the template or reflects already, or the reflection is
            empty or holds a tag.
    """
    parsed = _well_formed(answer)
    if parsed.reflections:
        raise ValueError(f"the answer must not reflect yet, it does so {parsed.reflections} times")
    text = " ".join(reflection.split())
    if not text:
        raise ValueError("the reflection is empty")
    if tags := [tag for tag in TAGS if tag in text]:
        raise ValueError(f"the reflection must not hold a tag, it holds {', '.join(tags)}")
    place = answer.index("<CONCLUSION>")
    return f"{answer[:place]}{wrap('REFLECTION', text)} {answer[place:]}"


def remove_reflections(answer: str) -> str:
    """``answer`` without its reflections and the space before each.

    Raises:
        ValueError: the answer is not in the template.
    """
    for block in reversed(_well_formed(answer).blocks):
        if block.name == "REFLECTION":
            before = answer[: block.start - len("<REFLECTION>")].rstrip()
            answer = before + answer[block.end + len("</REFLECTION>") :]
    return answer


def reflects_once(answer: str) -> bool:
    """Whether ``answer`` is in the template with one reflection, right before the conclusion."""
    parsed = parse(answer)
    return parsed.well_formed and [block.name for block in parsed.blocks] == _ORDER


def synthetic_answer(question: Question, seed: int | str) -> str:
    """An answer about a drawn scene that reflects once, with all that decides the question in it.

    The seed picks among wordings, as in :func:`lookagain_ext.synthetic.answers.write_answer`.
    """
    bare = remove_reflections(write_answer(question, seed))
    return insert_reflection(bare, " ".join((LOOK, *question.looks)))


class ReflectionWriter:
    """Has a model write the one reflection of answers that have none.

    Args:
        ask: takes a prompt and gives the model's text. It may hold the picture that the prompt is
            about: the writer asks about one record at a time, see ``ask_about``.
        ask_about: as ``ask``, but gets the record too, for models that can see its picture. Exactly
            one of the two is given.
        attempts: how often to ask when what comes back is no reflection.
        min_words: a shorter reflection is none.
        max_words: likewise a longer one.

    Raises:
        ValueError: both or none of ``ask`` and ``ask_about``, or a bound below 1.
    """

    def __init__(
        self,
        ask: Callable[[str], str] | None = None,
        *,
        ask_about: Callable[[str, Record], str] | None = None,
        attempts: int = 3,
        min_words: int = 5,
        max_words: int = 200,
    ) -> None:
        if (ask is None) == (ask_about is None):
            raise ValueError("give exactly one of ask and ask_about")
        if attempts < 1 or not 1 <= min_words <= max_words:
            raise ValueError(
                "attempts and min_words must be at least 1 and max_words no smaller than "
                f"min_words, got {attempts}, {min_words} and {max_words}"
            )
        self._ask = ask_about or (lambda prompt, record: ask(prompt))
        self._attempts = attempts
        self._words = (min_words, max_words)

    def __call__(self, record: Record) -> Record:
        """``record`` with the reflection in its response.

        Raises:
            ValueError: it has no response in the template, reflects already, or the model wrote no
                reflection in all attempts; the message says what was wrong with the last.
        """
        if record.response is None:
            raise ValueError(f"record {record.id} has no response to put a reflection into")
        try:
            insert_reflection(record.response, "x")  # refuses what cannot take one, unasked
        except ValueError as error:
            raise ValueError(f"record {record.id}: {error}") from error
        place = record.response.index("<CONCLUSION>")
        prompt = fill(
            "reflection",
            question=record.question,
            draft=record.response[:place].strip(),
            conclusion=parse(record.response).conclusion or "",
        )
        for _ in range(self._attempts):
            try:
                text = self._checked(self._ask(prompt, record))
                return replace(record, response=insert_reflection(record.response, text))
            except ValueError as error:
                reason = error
        raise ValueError(
            f"record {record.id}: no reflection in {self._attempts} attempts: {reason}"
        ) from reason

    def _checked(self, said: str) -> str:
        """The text of a reflection in what a model said; it may have written the tags itself."""
        text = said.strip()
        if text.startswith("<REFLECTION>") and text.endswith("</REFLECTION>"):
            text = text[len("<REFLECTION>") : -len("</REFLECTION>")].strip()
        low, high = self._words
        if not low <= (count := len(text.split())) <= high:
            raise ValueError(f"the reflection must have {low} to {high} words, it has {count}")
        return text


def _well_formed(answer: str) -> ParsedAnswer:
    parsed = parse(answer)
    if not parsed.well_formed:
        raise ValueError(f"the answer is not in the template: {'; '.join(parsed.errors)}")
    return parsed
