"""Questions about drawn scenes as training records, as many as are wanted."""

from __future__ import annotations

from collections.abc import Sequence

from ..synthetic.questions import TYPES, ask
from ..synthetic.scenes import Scene
from .coldstart import synthetic_answer
from .records import Record


class SceneRecords(Sequence[Record]):
    """Questions about scenes, drawn when they are asked for; never one of the held-out ones.

    Args:
        count: how many; the types of question come in turn.
        seed: another seed gives other scenes.
        respond: whether each brings an answer that reflects once, as a cold start needs it.

    Raises:
        ValueError: a count below 1.
    """

    def __init__(self, count: int, seed: int = 0, *, respond: bool = False) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self._count = count
        self._seed = seed
        self._respond = respond

    def __len__(self) -> int:
        """How many there are."""
        return self._count

    def __getitem__(self, number: int) -> Record:
        """Record ``number``, from 0 on."""
        if not 0 <= number < self._count:
            raise IndexError(f"there is no record {number}, there are {self._count}")
        key = f"records-{self._seed}-{number}"
        scene = Scene.random(key)
        question = ask(scene, key, TYPES[number % len(TYPES)])
        response = synthetic_answer(question, key) if self._respond else None
        return Record(key, question.text, question.answer, scene.render(), response)
