"""Held-out questions, the guessing rate, and the share of conclusions that are right."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessor, Qwen2_5_VLForConditionalGeneration

from ..template import REFLECTION, REFLECTION_END, parse, parse_ids
from .processor import SceneProcessor
from .questions import TYPES, Question, ask
from .scenes import Scene
from .tiny import encode


def held_out(questions: int, seed: int = 0) -> list[tuple[Scene, Question]]:
    """Scenes and questions that no training run draws: the types in turn, one scene each."""
    if questions < 1:
        raise ValueError(f"questions must be at least 1, got {questions}")
    pairs = []
    for i in range(questions):
        key = f"held-out-{seed}-{i}"
        scene = Scene.random(key)
        pairs.append((scene, ask(scene, key, TYPES[i % len(TYPES)])))
    return pairs


def is_right(answer: str, question: Question) -> bool:
    """Whether the text inside the conclusion is the answer, case and a final stop aside."""
    said = parse(answer).conclusion
    return said is not None and said.rstrip(".").lower() == question.answer.lower()


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson's score interval)."""
    if total < 1:
        raise ValueError(f"total must be at least 1, got {total}")
    z, share = 1.959964, right / total
    middle = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return (middle - spread) / scale, (middle + spread) / scale


def guessing_rate(pairs: list[tuple[Scene, Question]], known: int = 20000) -> dict[str, float]:
    """Share right without the picture: for each wording, its most frequent answer in training.

    Args:
        pairs: the questions to guess at.
        known: questions from other scenes from which the frequencies are learned. A wording that
            did not come there is guessed by its type.

    Returns:
        The share for each type, and for "all".
    """
    by_wording: dict[str, Counter[str]] = {}
    by_type: dict[str, Counter[str]] = {}
    for i in range(known):
        question = ask(Scene.random(f"guess-{i}"), f"guess-{i}")
        by_wording.setdefault(question.text, Counter())[question.answer] += 1
        by_type.setdefault(question.type, Counter())[question.answer] += 1
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for _, question in pairs:
        seen = by_wording.get(question.text) or by_type[question.type]
        hit = seen.most_common(1)[0][0] == question.answer
        for name in (question.type, "all"):
            right[name] += hit
            total[name] += 1
    return {name: right[name] / total[name] for name in (*TYPES, "all") if total[name]}


@dataclass(frozen=True)
class Report:
    """What :func:`evaluate` measured; shares lie in [0, 1].

    Attributes:
        questions: how many were asked.
        accuracy: share of right conclusions.
        interval: its 95 % confidence interval.
        by_type: the same for each type of question.
        guessing: share right without the picture, see :func:`guessing_rate`.
        well_formed: share of answers that follow the template to the letter.
        mean_tokens: mean length of the answers.
        mean_reflections: mean number of reflections.
        strategy: what was put before the reflections: "copy", "route" or "off".
        mean_reflection_tokens: mean length of a reflection, tags not counted; 0 without any.
        seconds: that answering took, on whatever ran beside it.
        marks: a digit for each question in order, 1 for right: for paired comparisons.
    """

    questions: int
    accuracy: float
    interval: tuple[float, float]
    by_type: dict[str, float]
    guessing: dict[str, float]
    well_formed: float
    mean_tokens: float
    mean_reflections: float
    strategy: str
    mean_reflection_tokens: float = 0.0
    seconds: float = 0.0
    marks: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """A few lines for people."""
        low, high = self.interval
        lines = [
            f"{self.accuracy:.1%} of {self.questions} held-out questions right "
            f"(95 % interval {low:.1%} to {high:.1%}), strategy {self.strategy}"
        ]
        guessed = {name: f"   guessing {share:6.1%}" for name, share in self.guessing.items()}
        lines[0] += guessed.get("all", "").replace("   guessing ", "; guessing:")
        lines += [
            f"  {name:<12}{share:7.1%}{guessed.get(name, '')}"
            for name, share in self.by_type.items()
        ]
        lines.append(
            f"  {self.well_formed:.1%} follow the template; {self.mean_tokens:.0f} tokens and "
            f"{self.mean_reflections:.2f} reflections an answer, {self.mean_reflection_tokens:.0f} "
            "tokens each"
        )
        return "\n".join(lines)


def evaluate(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: SceneProcessor,
    questions: int = 1000,
    *,
    seed: int = 0,
    strategy: str = "copy",
    route_ratio: float = 0.5,
    batch_size: int = 64,
    max_new_tokens: int = 260,
    picture: Callable[[Scene], Image.Image] = Scene.render,
    empty_reflections: bool = False,
    guess: bool = True,
) -> Report:
    """Let the model answer held-out questions greedily and grade its conclusions.

    Args:
        model: in evaluation mode.
        processor: the model's.
        questions: how many, the types in turn.
        seed: of the held-out set.
        strategy: visual re-injection while generating: "copy", "route" or "off".
        route_ratio: the share that "route" takes.
        batch_size: questions at a time.
        max_new_tokens: longest answer.
        picture: draws a scene; give another one to test what happens without the right picture.
        empty_reflections: close each reflection as soon as it is opened, so that the picture is
            shown again and nothing is said about it ("vision-only" in Qwen Look Again's Table 4).
        guess: also work out the guessing rate, which takes seconds.
    """
    pairs = held_out(questions, seed)
    answers, parsed, tokens = [], [], 0
    extra = {"logits_processor": [_CloseAtOnce(processor)]} if empty_reflections else {}
    extra |= {"max_new_tokens": max_new_tokens, "do_sample": False}
    begun = time.perf_counter()
    with _looking(model, processor, strategy, route_ratio):
        for text, ids in _answers(model, processor, pairs, batch_size, picture, extra):
            answers.append(text)
            parsed.append(parse_ids(ids, processor.tokenizer))
            tokens += len(ids)
    seconds = time.perf_counter() - begun
    lengths = [length for one in parsed for length in one.reflection_lengths]
    asked = [question for _, question in pairs]
    right = [is_right(answer, question) for answer, question in zip(answers, asked, strict=True)]
    by_type = {
        name: [hit for hit, question in zip(right, asked, strict=True) if question.type == name]
        for name in TYPES
    }
    return Report(
        questions=questions,
        accuracy=sum(right) / questions,
        interval=wilson(sum(right), questions),
        by_type={name: sum(hits) / len(hits) for name, hits in by_type.items() if hits},
        guessing=guessing_rate(pairs) if guess else {},
        well_formed=sum(one.well_formed for one in parsed) / questions,
        mean_tokens=tokens / questions,
        mean_reflections=sum(one.reflections for one in parsed) / questions,
        strategy=strategy,
        mean_reflection_tokens=sum(lengths) / len(lengths) if lengths else 0.0,
        seconds=seconds,
        marks="".join(str(int(hit)) for hit in right),
    )


class _CloseAtOnce(LogitsProcessor):
    """After `<REFLECTION>` only `</REFLECTION>` may come."""

    def __init__(self, processor: SceneProcessor) -> None:
        self._tags = processor.tokenizer.convert_tokens_to_ids([REFLECTION, REFLECTION_END])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        opening, closing = self._tags
        only = torch.full_like(scores, -torch.inf)
        only[:, closing] = 0
        return torch.where(input_ids[:, -1:] == opening, only, scores)


def _looking(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: SceneProcessor,
    strategy: str,
    route_ratio: float,
) -> Any:  # noqa: ANN401 - a context manager of either kind
    """The context in which to generate."""
    if strategy == "off":
        return nullcontext()
    from ..generation import LookAgainConfig, look_again

    config = LookAgainConfig(strategy=strategy, route_ratio=route_ratio)
    return look_again(model, config, processor.tokenizer)


@torch.inference_mode()
def _answers(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: SceneProcessor,
    pairs: list[tuple[Scene, Question]],
    batch_size: int,
    picture: Callable[[Scene], Image.Image],
    options: dict[str, Any],
) -> Iterator[tuple[str, list[int]]]:
    """Each answer's text, tags kept, and its tokens without padding."""
    tokenizer = processor.tokenizer
    for first in range(0, len(pairs), batch_size):
        part = pairs[first : first + batch_size]
        inputs = encode(processor, [picture(s) for s, _ in part], [q.text for _, q in part])
        out = model.generate(**inputs, **options)
        for row in out[:, inputs["input_ids"].shape[1] :].tolist():
            ids = [token for token in row if token != tokenizer.pad_token_id]
            yield tokenizer.decode(ids, skip_special_tokens=True), ids
