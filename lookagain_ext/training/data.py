"""Training batches of synthetic scenes: a pure function of seed, stage and step.

Because batch ``step`` depends on nothing else, a run that is resumed sees exactly the data that it
would have seen without the interruption.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..synthetic.answers import write_answer, write_exercise, write_short_answers
from ..synthetic.processor import SceneProcessor, letterbox
from ..synthetic.questions import ask
from ..synthetic.scenes import Scene
from ..synthetic.tiny import prompt_text
from ..synthetic.vocabulary import CELLS, COLOURS, COLUMNS, KINDS, ROWS, SIZES
from .coldstart import remove_reflections
from .config import Stage

IGNORE = -100
# What is read off a visual token, in the decoder's own words; the first of each group is for
# tokens that hold nothing, or that lie outside the board.
_NOTHING = " nothing"
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "kind": (_NOTHING, *(f" {kind}" for kind in KINDS)),
    "kinds": (_NOTHING, *(f" {kind}s" for kind in KINDS)),
    "colour": (_NOTHING, *(f" {colour}" for colour in COLOURS)),
    "size": (_NOTHING, *(f" {size}" for size in SIZES)),
    "cell": (_NOTHING, *(f" {cell}" for cell in CELLS)),
}


def spelled(words: Sequence[str]) -> list[str]:
    """Words as the tokenizer's vocabulary spells them: a leading space is a letter of its own."""
    return [word.replace(" ", "\u0120") for word in words]


def cell_labels(scene: Scene) -> np.ndarray:
    """int64 [36, 5]: for each visual token, which word of each of ``ATTRIBUTES`` is true of it."""
    labels = np.zeros((ROWS + 1, len(COLUMNS) + 1, len(ATTRIBUTES)), dtype=np.int64)
    labels[1:, 1:, 4] = 1 + np.arange(len(CELLS)).reshape(ROWS, len(COLUMNS))
    colours = tuple(COLOURS)
    for shape in scene.shapes:
        kind = 1 + KINDS.index(shape.kind)
        words = (kind, kind, 1 + colours.index(shape.colour), 1 + SIZES.index(shape.size))
        labels[shape.row + 1, shape.column + 1, :4] = words
    return labels.reshape(-1, len(ATTRIBUTES))


def patchify(pictures: torch.Tensor, processor: SceneProcessor) -> torch.Tensor:
    """Cut uint8 pictures [B, side, side, 3] as ``processor.patches`` does, a whole batch at once.

    Returns:
        float32 [B * patches, 3 * temporal_patch * patch * patch].
    """
    parts = processor.image_processor
    mean, std = (torch.tensor(one) for one in (parts.image_mean, parts.image_std))
    batch, side = pictures.shape[:2]
    patch, merge, times = parts.patch_size, parts.merge_size, parts.temporal_patch_size
    blocks = side // (patch * merge)
    values = (pictures.float() / 255.0 - mean) / std
    values = values.view(batch, blocks, merge, patch, blocks, merge, patch, 3)
    values = values.permute(0, 1, 4, 2, 5, 7, 3, 6).unsqueeze(6)
    values = values.expand(*values.shape[:6], times, patch, patch)
    return values.reshape(-1, 3 * times * patch * patch)


class SceneBatches(Dataset):
    """Batches of one stage, by step.

    Each is a dict with ``pictures`` uint8 [B, side, side, 3] and either ``cells`` int64 [B, 36, 5]
    (vision) or ``input_ids``, ``labels`` and ``mm_token_type_ids`` int64 [B, L], padded on the
    right: a causal model never sees that padding, so no attention mask is needed. A batch of
    exercises or short answers also has ``looks`` int64 [B, L]: the number of the visual token that
    the *next* token speaks of, or -1.
    """

    def __init__(self, stage: Stage, processor: SceneProcessor, seed: int) -> None:
        """Batches of ``stage`` for a run with this ``seed``."""
        self.stage = stage
        self.processor = processor
        self.seed = seed
        ids = processor.tokenizer.convert_tokens_to_ids
        side = len(COLUMNS) + 1
        numbers = [(1 + i // (side - 1)) * side + 1 + i % (side - 1) for i in range(len(CELLS))]
        self.places = dict(zip(ids(spelled(ATTRIBUTES["cell"][1:])), numbers, strict=True))
        self.stop, self.comma, self.none = ids([".", ",", *spelled([" none"])])
        self.numbers = set(ids(spelled([f" {i + 1}" for i in range(len(CELLS))])))
        words = [word for name in ("kind", "colour", "size") for word in ATTRIBUTES[name]]
        self.attributes = set(ids(spelled(words)))

    def __len__(self) -> int:
        """Steps of the stage."""
        return self.stage.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        """The batch of ``step``."""
        keys = [
            f"train-{self.seed}-{self.stage.name}-{step}-{i}" for i in range(self.stage.batch_size)
        ]
        scenes = [Scene.random(key) for key in keys]
        side = self.processor.side
        pictures = [
            np.asarray(letterbox(scene.render(random.Random(key).choice((1, 2, 2, 3))), side))
            for key, scene in zip(keys, scenes, strict=True)
        ]
        batch = {"pictures": torch.from_numpy(np.stack(pictures))}
        if self.stage.task == "vision":
            cells = np.stack([cell_labels(scene) for scene in scenes])
            return {**batch, "cells": torch.from_numpy(cells)}
        rows = [self._row(scene, key) for scene, key in zip(scenes, keys, strict=True)]
        batch.update(self._pad(rows))
        if self.stage.task in ("exercise", "short"):
            ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
            looks = [self._looks(*row) for row in zip(ids, labels, strict=True)]
            batch["looks"] = torch.tensor(looks)
        return batch

    def _row(self, scene: Scene, key: str) -> tuple[list[int], list[int]]:
        """Token ids of one example, and its labels."""
        task = self.stage.task
        whole = task in ("answer", "plain")
        if whole and random.Random(f"mix-{key}").random() < self.stage.rehearsal:
            whole, task = False, "short"
        if whole:
            question = ask(scene, key)
            answer = write_answer(question, key)
            answer = remove_reflections(answer) if task == "plain" else answer
            parts = [(prompt_text(question.text), False), (f"{answer}<|im_end|>", True)]
        else:
            parts = [(prompt_text("Look at the board."), False)]
            write = write_exercise if task == "exercise" else write_short_answers
            for given, expected in write(scene, key):
                parts += [(given, False), (expected, True)]
        ids: list[int] = []
        labels: list[int] = []
        token = self.processor.image_token
        for text, trained in parts:
            text = text.replace(token, token * self.processor.visual_tokens)
            piece = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += piece
            labels += piece if trained else [IGNORE] * len(piece)
        return ids, labels

    def _looks(self, ids: list[int], labels: list[int]) -> list[int]:
        """For each position, the visual token that the next token is about, or -1.

        "None", and the stop after the last number, are about the corner of the picture: it holds
        nothing, so that it wins against shapes that fit in part and loses against one that fits.
        """
        looks, cell = [-1] * len(ids), -1
        for i, token in enumerate(ids):
            if token in self.places:
                cell = self.places[token]
            elif labels[i] == IGNORE or token == self.stop:
                cell = -1
            if labels[i] == IGNORE:
                continue
            if token in self.places or token in self.attributes:
                looks[i - 1] = cell
            elif token == self.none or (token == self.stop and ids[i - 1] in self.numbers):
                looks[i - 1] = 0
            elif token == self.comma:
                looks[i - 1] = self.places[ids[i + 1]]
        return looks

    def _pad(self, rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        """Rows as tensors of one length."""
        length = max(len(ids) for ids, _ in rows)
        pad = self.processor.tokenizer.pad_token_id
        input_ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows])
        labels = torch.tensor([one + [IGNORE] * (length - len(one)) for _, one in rows])
        is_image = (input_ids == self.processor.image_token_id).long()
        return {"input_ids": input_ids, "labels": labels, "mm_token_type_ids": is_image}


def batches(
    stage: Stage, processor: SceneProcessor, seed: int, first: int, workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of ``stage`` from step ``first`` on, in order."""
    loader = DataLoader(
        SceneBatches(stage, processor, seed),
        batch_size=None,
        sampler=range(first, stage.steps),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    return iter(loader)
