"""A training step whose answers look again, against the same step without and re-encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .._native import build_info
from ..config import LookAgainConfig
from ..generation import look_again
from .generation import GRID, REFLECTION, WORDS, decoder, prompt
from .measure import Comparison, Row


def training_step(quick: bool) -> Iterator[Row]:
    """Forward and backward of one row with two reflections, where attention takes the time.

    A narrow model (hidden size 256, two heads of 128): in a 7B on a few cores the matrices would
    hide what the attention costs.
    """
    dtype = torch.bfloat16 if "bf16" in str(build_info()["isa"]) else torch.float32
    model = decoder(2, hidden=256, intermediate=256, heads=(2, 1), dtype=dtype).train()
    inputs = answered(prompt(), 400 if quick else 1600, dtype)
    visual, length = GRID * GRID, inputs["input_ids"].shape[1]

    def step() -> None:
        model(**inputs, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    def session(**fields: str) -> Callable[[], None]:
        config = LookAgainConfig(reflection_token_id=REFLECTION, **fields)

        def run() -> None:
            with look_again(model, config) as active:
                step()
                shown = [one.num_shown for one in active.trace.reflections[0]]
            if shown != [visual if config.looks else 0] * 2:
                raise RuntimeError(f"two reflections were to be shown again, got {shown}")

        return run

    calls = {
        "virtual": session(),
        "off": session(strategy="off"),
        "reencode": session(backend="reencode"),
        "unpatched": step,
    }
    comparison = Comparison(calls, budget=5 if quick else 60, least=3 if quick else 7)
    saved = length / (length + 2 * visual)
    kind = str(dtype).split(".")[-1]
    note = f"{kind}, {length} tokens, {visual} visual, hidden 256; {saved:.2f} of the tokens"
    rows = (
        ("virtual", "off", "the same session, strategy off", 1.10, "<= 1.1x"),
        ("virtual", "reencode", "re-encoded", saved, f"<= {saved:.2f}x"),
        ("reencode", "off", "the same session, strategy off", None, ""),
        ("off", "unpatched", "unpatched model, SDPA", None, ""),
    )
    names = {"virtual": "2 x COPY", "reencode": "2 x COPY re-encoded", "off": "strategy off"}
    for ours, baseline, against, most, goal in rows:
        ratio, seconds = comparison.ratio(ours, baseline), comparison.timing(ours).p50
        yield Row(
            f"training step, {names[ours]}",
            against,
            ratio.p50,
            ratio.p20,
            ratio.p80,
            seconds * 1e3,
            goal,
            None if most is None else ratio.p50 <= most,
            note,
        )


def answered(inputs: dict[str, Tensor], length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A prompt with an answer of `length` tokens that reflects at one and at two thirds."""
    draw = torch.Generator().manual_seed(1)
    answer = torch.randint(WORDS, 1024, (1, length), generator=draw)
    answer[0, [length // 3, 2 * length // 3]] = REFLECTION
    ids = torch.cat([inputs["input_ids"], answer], dim=1)
    ignored = torch.full_like(inputs["input_ids"], -100)
    kinds = nn.functional.pad(inputs["mm_token_type_ids"], (0, length))
    return {
        **inputs,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": kinds,
        "labels": torch.cat([ignored, answer], dim=1),
        "pixel_values": inputs["pixel_values"].to(dtype),
    }
