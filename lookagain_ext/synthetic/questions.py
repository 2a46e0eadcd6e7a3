"""Questions about a scene, with exact answers and the evidence that decides them.

Six types: count, existence, colour, kind, position, comparison. Answers are balanced where the
scene allows it, so that little is to be won by guessing without the picture.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from .scenes import Scene, Shape
from .vocabulary import COLOURS, KINDS, SIZES

TYPES: tuple[str, ...] = ("count", "existence", "colour", "kind", "position", "comparison")


@dataclass(frozen=True)
class Filter:
    """Which shapes are meant; None leaves an attribute open."""

    size: str | None = None
    colour: str | None = None
    kind: str | None = None

    def matches(self, shape: Shape) -> bool:
        """Whether ``shape`` is meant."""
        return all(
            wanted is None or wanted == got
            for wanted, got in (
                (self.size, shape.size),
                (self.colour, shape.colour),
                (self.kind, shape.kind),
            )
        )

    @property
    def fixed(self) -> tuple[str, ...]:
        """The names of the attributes that are not left open."""
        return tuple(n for n in ("size", "colour", "kind") if getattr(self, n) is not None)

    def find(self, scene: Scene) -> list[Shape]:
        """The shapes meant, in reading order."""
        return [shape for shape in scene.shapes if self.matches(shape)]

    def phrase(self, plural: bool = False) -> str:
        """For example "red circle", or "large shapes"."""
        words = [word for word in (self.size, self.colour, self.kind or "shape") if word]
        return " ".join(words) + ("s" if plural else "")


@dataclass(frozen=True)
class Question:
    """A question and what is known about it.

    Attributes:
        type: one of ``TYPES``.
        text: the wording.
        answer: what the conclusion must say.
        asks: what "The question asks" goes on with: "for the number of red shapes".
        looks: for each reflection, what it writes down after looking.
    """

    type: str
    text: str
    answer: str
    asks: str
    looks: tuple[str, ...]


def _filters() -> tuple[Filter, ...]:
    sizes, colours, kinds = (None, *SIZES), (None, *COLOURS), (None, *KINDS)
    every = (Filter(*parts) for parts in product(sizes, colours, kinds))
    return tuple(wanted for wanted in every if 1 <= len(wanted.fixed) <= 2)


FILTERS = _filters()
_BOTH = ("colour", "kind")


def article(phrase: str) -> str:
    """``phrase`` with "a" or "an"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def tally(wanted: Filter, scene: Scene) -> str:
    """Evidence for a number: "red shapes: B2 is 1, C4 is 2." or "red shapes: none."."""
    cells = [f" {shape.cell} is {i + 1}" for i, shape in enumerate(wanted.find(scene))]
    return f"{wanted.phrase(plural=True)}:{','.join(cells) or ' none'}."


def locate(wanted: Filter, scene: Scene) -> str:
    """Evidence for a thing: "red circle: B2 holds a large red circle." or "red circle: none."."""
    found = wanted.find(scene)
    if not found:
        return f"{wanted.phrase()}: none."
    return f"{wanted.phrase()}: {look_at(found[0].cell, scene)}"


def look_at(cell: str, scene: Scene) -> str:
    """Evidence about a cell: "B2 holds a large red circle." or "B2 holds nothing."."""
    shape = scene.at(cell)
    return f"{cell} holds {article(shape.name) if shape else 'nothing'}."


def _by_count(scene: Scene, rng: random.Random, pool: Sequence[Filter]) -> Filter:
    """A filter whose number of matches is drawn evenly from the numbers that occur."""
    groups: dict[int, list[Filter]] = {}
    for wanted in pool:
        groups.setdefault(len(wanted.find(scene)), []).append(wanted)
    return rng.choice(groups[rng.choice(sorted(groups))])


def _unique(scene: Scene, rng: random.Random, pool: Sequence[Filter]) -> Filter | None:
    """A filter that means exactly one shape, or None when there is none in the pool."""
    single = [wanted for wanted in pool if len(wanted.find(scene)) == 1]
    return rng.choice(single) if single else None


def _count(scene: Scene, rng: random.Random) -> Question:
    wanted = _by_count(scene, rng, FILTERS)
    phrase = wanted.phrase(plural=True)
    text = rng.choice((f"How many {phrase} are there?", f"Count the {phrase}."))
    answer = str(len(wanted.find(scene)))
    return Question("count", text, answer, f"for the number of {phrase}", (tally(wanted, scene),))


def _existence(scene: Scene, rng: random.Random) -> Question:
    present = rng.random() < 0.5
    # First which attributes, then whether: what is asked must not tell the answer.
    fixed = rng.choice((("colour",), ("kind",), ("size", "colour"), ("size", "kind"), _BOTH))
    alike = [f for f in FILTERS if f.fixed == fixed]
    fitting = [f for f in alike if bool(f.find(scene)) == present]
    wanted = rng.choice(fitting or alike)
    phrase = article(wanted.phrase())
    text = rng.choice((f"Is there {phrase}?", f"Is there {phrase} on the board?"))
    look = (locate(wanted, scene),)
    answer = "yes" if wanted.find(scene) else "no"
    return Question("existence", text, answer, f"whether there is {phrase}", look)


def _about_one(scene: Scene, rng: random.Random, attribute: str) -> Question:
    """Colour or kind of one shape, named by its other attributes or by its cell."""
    pool = [f for f in FILTERS if getattr(f, attribute) is None]
    wanted = _unique(scene, rng, pool) if rng.random() < 0.6 else None
    if wanted:
        shape, look = wanted.find(scene)[0], locate(wanted, scene)
        phrase = f"the {wanted.phrase()}"
    else:
        shape = rng.choice(scene.shapes)
        phrase = f"the shape in {shape.cell}"
        look = f"shape in {shape.cell}: {look_at(shape.cell, scene)}"
    if attribute == "colour":
        text = rng.choice((f"What colour is {phrase}?", f"Tell me the colour of {phrase}."))
        return Question("colour", text, shape.colour, f"for the colour of {phrase}", (look,))
    text = rng.choice((f"What kind of shape is {phrase}?", f"Name the kind of {phrase}."))
    return Question("kind", text, shape.kind, f"for the kind of {phrase}", (look,))


def _colour(scene: Scene, rng: random.Random) -> Question:
    return _about_one(scene, rng, "colour")


def _kind(scene: Scene, rng: random.Random) -> Question:
    return _about_one(scene, rng, "kind")


def _beyond(side: str, one: Shape, other: Shape) -> bool:
    """Whether ``one`` lies on that side of ``other``."""
    return {
        "left of": one.column < other.column,
        "right of": one.column > other.column,
        "above": one.row < other.row,
        "below": one.row > other.row,
    }[side]


def _position(scene: Scene, rng: random.Random) -> Question:
    single = [wanted for wanted in FILTERS if len(wanted.find(scene)) == 1]
    one = rng.choice(single) if single else Filter()
    others = [f for f in single if f.find(scene) != one.find(scene)]
    if not single:
        return _colour(scene, rng)
    if not others or rng.random() < 0.5:
        phrase = f"the {one.phrase()}"
        text = rng.choice((f"Where is {phrase}?", f"In which cell is {phrase}?"))
        answer = one.find(scene)[0].cell
        looks = (locate(one, scene),)
        return Question("position", text, answer, f"for the place of {phrase}", looks)
    want = rng.random() < 0.5
    choices = [
        (side, other)
        for side in ("left of", "right of", "above", "below")
        for other in others
        if _beyond(side, one.find(scene)[0], other.find(scene)[0]) == want
    ]
    side, other = rng.choice(choices)
    text = f"Is the {one.phrase()} {side} the {other.phrase()}?"
    asks = f"whether the {one.phrase()} is {side} the {other.phrase()}"
    first, second = one.find(scene)[0], other.find(scene)[0]
    lines, part = ("Columns", 0) if side in ("left of", "right of") else ("Rows", 1)
    compared = f"{lines} {first.cell[part]} and {second.cell[part]}."
    looks = (locate(one, scene), f"{locate(other, scene)} {compared}")
    return Question("position", text, "yes" if want else "no", asks, looks)


def _comparison(scene: Scene, rng: random.Random) -> Question:
    by_colour = [Filter(colour=colour) for colour in COLOURS]
    by_kind = [Filter(kind=kind) for kind in KINDS]
    pool = by_colour if rng.random() < 0.5 else by_kind
    number = {wanted: len(wanted.find(scene)) for wanted in pool}
    every = [(a, b) for a, b in product(pool, pool) if a != b and number[a] + number[b]]
    want = rng.random() < 0.5
    pairs = [(a, b) for a, b in every if (number[a] > number[b]) == want]
    one, other = rng.choice(pairs or every)
    first, second = one.phrase(plural=True), other.phrase(plural=True)
    text = rng.choice((f"Are there more {first} than {second}?", f"Do {first} outnumber {second}?"))
    asks = f"whether there are more {first} than {second}"
    looks = (tally(one, scene), tally(other, scene))
    answer = "yes" if number[one] > number[other] else "no"
    return Question("comparison", text, answer, asks, looks)


_ASK: dict[str, Callable[[Scene, random.Random], Question]] = {
    "count": _count,
    "existence": _existence,
    "colour": _colour,
    "kind": _kind,
    "position": _position,
    "comparison": _comparison,
}


def ask(scene: Scene, seed: int | str, kind: str | None = None) -> Question:
    """A question about ``scene``; the same scene and seed give the same question.

    Args:
        scene: the board.
        seed: of the choice of type, wording and objects.
        kind: one of ``TYPES``; None draws one evenly.

    Raises:
        ValueError: an unknown type.
    """
    if kind is not None and kind not in TYPES:
        raise ValueError(f"kind must be one of {', '.join(TYPES)}, got {kind!r}")
    rng = random.Random(f"question-{seed}")
    return _ASK[kind or rng.choice(TYPES)](scene, rng)
