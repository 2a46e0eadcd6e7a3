"""One question to one model about one picture: the answer, and what was looked at."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from .. import __version__, analysis, plots
from ..generation import LookAgainConfig, look_again
from ..template import REFLECTION_END, hidden_tokens, parse
from . import inputs
from .errors import UserError
from .printing import sighting

if TYPE_CHECKING:
    from transformers import BatchFeature, PreTrainedModel
    from transformers.processing_utils import ProcessorMixin

    from ..generation import LookAgainSession, Trace

Streamer = Callable[["LookAgainSession"], object]


@dataclass(frozen=True)
class Answer:
    """What came back for one question.

    Attributes:
        text: the answer with its tags, other special tokens removed.
        tokens: the generated tokens, one string each.
        prompt_length: prompt tokens, visual ones included.
        trace: of the session.
        seconds: that generating took, reading the prompt included.
        cut_off: whether the answer had to stop before its end.
    """

    text: str
    tokens: tuple[str, ...]
    prompt_length: int
    trace: Trace
    seconds: float
    cut_off: bool

    @property
    def conclusion(self) -> str | None:
        """Text of the conclusion, or None when the answer has none."""
        return parse(self.text).conclusion

    @property
    def closings(self) -> list[int]:
        """The steps that close a reflection."""
        return [step for step, token in enumerate(self.tokens) if token == REFLECTION_END]

    @property
    def sightings(self) -> list[str]:
        """For each reflection, in words, what it was shown."""
        return [sighting(found) for found in self.trace.reflections[0]]

    @property
    def rate(self) -> float:
        """Generated tokens a second."""
        return len(self.tokens) / max(self.seconds, 1e-9)


def encode(processor: ProcessorMixin, picture: Image.Image, question: str) -> BatchFeature:
    """Model inputs for one question about one picture, in the model's own chat format.

    Raises:
        UserError: the processor cannot take them.
    """
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    try:
        prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return processor(images=[picture], text=[prompt], return_tensors="pt")
    except ValueError as error:  # no chat template; a picture too narrow for its patches
        raise UserError(f"the model's processor refuses: {error}") from error


def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    picture: Image.Image,
    question: str,
    config: LookAgainConfig,
    *,
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    seed: int = 0,
    streamer: Streamer | None = None,
) -> Answer:
    """Ask, and let the model look again as `config` says.

    Args:
        model: a vision-language model.
        processor: its processor.
        picture: RGB.
        question: in words.
        config: of the session.
        max_new_tokens: the longest answer.
        temperature: 0 takes the likeliest token each time.
        seed: of the sampling.
        streamer: makes, from the session, the streamer that shows the answer as it comes.

    Raises:
        UserError: question and picture do not fit into the model's context.
    """
    prompt = encode(processor, picture, question).to(model.device)
    prompt_length = prompt["input_ids"].shape[1]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and prompt_length >= limit:
        hint = "Use a smaller picture or a shorter question."
        raise UserError(f"the prompt has {prompt_length} tokens, the model takes {limit}", hint)
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    if config.strategy == "off" and inputs.reflection_token(processor.tokenizer) is None:
        # The session wants to know the token even so; this one no model may write.
        config = replace(config, reflection_token_id=model.config.image_token_id)
    torch.manual_seed(seed)
    begun = time.perf_counter()
    with look_again(model, config, tokenizer=processor.tokenizer) as session:
        output = model.generate(
            **prompt,
            **sampling,
            max_new_tokens=max_new_tokens,
            streamer=None if streamer is None else streamer(session),
        )
    seconds = time.perf_counter() - begun
    generated = output[0, prompt_length:].tolist()
    tokenizer = processor.tokenizer
    hidden = hidden_tokens(tokenizer)
    text = tokenizer.decode([token for token in generated if token not in hidden])
    tokens = tuple(tokenizer.decode([token]) for token in generated)
    cut_off = len(generated) == max_new_tokens and generated[-1] not in hidden
    return Answer(text.strip(), tokens, prompt_length, session.trace, seconds, cut_off)


def seen(processor: ProcessorMixin, picture: Image.Image) -> Image.Image:
    """The picture framed as the model sees it, with pixels enough to be looked at."""
    from ..synthetic.processor import SceneProcessor, letterbox

    if isinstance(processor, SceneProcessor):
        return letterbox(picture, processor.side * 3)
    return picture.convert("RGB")


def record(found: Answer, question: str, **about: object) -> dict[str, object]:
    """Everything about an answer that JSON can hold: what `trace.json` is made of."""
    trace = found.trace
    curve = None
    if trace.attention is not None:
        curve = analysis.attention_curve(trace, found.prompt_length, closings=found.closings)
    maps = analysis.reflection_maps(trace, closings=found.closings)
    return {
        "lookagain_ext": __version__,
        "question": question,
        **about,
        "answer": found.text,
        "conclusion": found.conclusion,
        "prompt_tokens": found.prompt_length,
        "generated_tokens": len(found.tokens),
        "seconds": round(found.seconds, 3),
        "tokens": found.tokens,
        "grids": trace.grids[0],
        "reflections": [
            {
                "step": one.step,
                "end": one.end,
                "shown": one.shown.astype(int).tolist(),
                "attention_before": _listed(one.before),
                "attention_during": _listed(one.during),
            }
            for one in maps
        ],
        "ignored_reflections": sum(one.ignored for one in trace.reflections[0]),
        "attention": None if curve is None else _listed(curve.share),
        "uniform_share": None if curve is None else _listed(curve.uniform),
    }


def write_results(
    folder: Path, picture: Image.Image, found: Answer, question: str, **about: object
) -> list[Path]:
    """Write `overlay.png`, `curve.png` and `trace.json`; their paths come back.

    Args:
        folder: that exists.
        picture: as the model saw it, see `seen`.
        found: the answer.
        question: it answers.
        **about: more entries of `trace.json`: model, strategy and so on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = ("overlay.png", "curve.png", "trace.json")
    overlay, curve, trace = (folder / name for name in names)
    maps = analysis.reflection_maps(found.trace, closings=found.closings)
    whole = analysis.answer_map(found.trace)
    plots.overlay(picture, maps, found.trace.grids[0], overlay, question, whole)
    points = analysis.attention_curve(found.trace, found.prompt_length, closings=found.closings)
    plots.curve(points, curve, question)
    text = json.dumps(record(found, question, **about), indent=1, ensure_ascii=False)
    # A file's name may hold bytes that are no characters: they become \udcXX, as JSON writes them.
    trace.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    return [overlay, curve, trace]


def _listed(values: analysis.Floats | None) -> list[float] | None:
    return None if values is None else [round(float(value), 6) for value in values]
