"""Answers in the template, and dense exercises for the skills that an answer needs.

The summary, caption and reasoning say what is asked and how to find out, never what the picture
shows; the evidence is written inside the reflections, where the model looks again. So the text
before a reflection distracts, and the reflection cannot be copied from it.
"""

from __future__ import annotations

import random

from ..template import wrap
from .questions import FILTERS, Question, ask, locate, look_at, tally
from .scenes import Scene
from .vocabulary import CELLS

_CAPTIONS = (
    "The picture shows a board with columns A to E and rows 1 to 5. Some cells hold a shape.",
    "A board of five rows and five columns. The cells are empty or hold one shape.",
)
_METHOD = {
    "count": (
        "To get a number right I go through the board row by row, from top to bottom and from left "
        "to right, and number each shape that fits.",
        "A shape that fits only in part must not be counted.",
    ),
    "existence": (
        "One shape that fits in all its words is enough, and without one the answer is no.",
        "A shape that fits only in part is not enough.",
    ),
    "colour": (
        "First I find the cell that is meant, then I read the colour of what it holds.",
        "Shapes in other cells do not matter here.",
    ),
    "kind": (
        "First I find the cell that is meant, then I see which kind of shape it holds.",
        "Shapes in other cells do not matter here.",
    ),
    "position": (
        "A place is a column and a row, so I find the cell of each shape that is named.",
        "Left and right are about columns, above and below are about rows.",
    ),
    "comparison": (
        "I need two numbers, so I look once for each and then compare them.",
        "If the numbers are equal, the answer is no.",
    ),
}
_CAUTION = (
    "My memory of the picture fades while I write, so I do not answer yet.",
    "What I wrote so far says nothing about the picture, so it cannot decide the question.",
    "It would be easy to guess here, and a guess is often wrong.",
)
LOOK = "I look at the picture again."


def write_answer(question: Question, seed: int | str) -> str:
    """The whole answer to ``question``; the seed picks among wordings that mean the same."""
    rng = random.Random(f"answer-{seed}")
    caution = rng.sample(_CAUTION, 2)
    reasoning = " ".join((*_METHOD[question.type], *caution))
    return " ".join(
        (
            wrap("SUMMARY", f"The question asks {question.asks}."),
            wrap("CAPTION", rng.choice(_CAPTIONS)),
            wrap("REASONING", reasoning),
            *(wrap("REFLECTION", f"{LOOK} {look}") for look in question.looks),
            wrap("CONCLUSION", f" {question.answer} "),
        )
    )


def write_exercise(scene: Scene, seed: int | str, items: int = 20) -> list[tuple[str, str]]:
    """Many small looks at one picture, as (given, expected) pairs of text.

    Each is written as a reflection writes it: what a cell holds, where a thing is, how many there
    are. What is given is context without loss, what is expected is trained.
    """
    rng = random.Random(f"exercise-{seed}")
    pairs = []
    filled = [shape.cell for shape in scene.shapes]
    for _ in range(items):
        skill = rng.random()
        if skill < 0.3:
            cell = rng.choice(filled if rng.random() < 0.7 else CELLS)
            line = look_at(cell, scene)
            given = cell
        else:
            found = rng.random() < 0.8
            pool = [f for f in FILTERS if bool(f.find(scene)) == found]
            wanted = rng.choice(pool)
            many = skill < 0.65
            line = tally(wanted, scene) if many else locate(wanted, scene)
            given = wanted.phrase(plural=many) + ":"
        pairs.append((f" {given}", line[len(given) :]))
    return pairs


def write_short_answers(scene: Scene, seed: int | str, items: int = 7) -> list[tuple[str, str]]:
    """Many questions about one picture, as (question, looks and conclusion) pairs of text."""
    pairs = []
    for i in range(items):
        question = ask(scene, f"{seed}-{i}")
        conclusion = wrap("CONCLUSION", f" {question.answer} ")
        pairs.append((f" {question.text}", f" {' '.join(question.looks)} {conclusion}"))
    return pairs


def corpus(samples: int = 3000) -> list[str]:
    """Texts that hold every word of the shipped task; the vocabulary is read off them."""
    texts = [*_CAUTION, *_CAPTIONS, LOOK, *(" ".join(f" {cell} {cell}" for cell in CELLS),)]
    for i in range(samples):
        question = ask(Scene.random(f"corpus-{i}"), f"corpus-{i}")
        texts += [question.text, write_answer(question, i)]
    return texts
