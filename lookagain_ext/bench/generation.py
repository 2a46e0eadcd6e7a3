"""generate() with re-injections against the same without, and against eager attention weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from ..config import LookAgainConfig
from ..generation import look_again
from .measure import Comparison, Row

START, END, IMAGE, VIDEO, REFLECTION, WORDS = 2, 3, 4, 5, 6, 8
GRID = 24  # visual tokens along each side of the image


def generation(quick: bool) -> Iterator[Row]:
    """A decoder layer of the 7B's shape, bf16, three reflections forced at the same steps.

    Times are those of the decoding steps: from the first new token to the last.
    """
    model, inputs = decoder(), prompt()
    steps = 24 if quick else 48

    def generate(**options: object) -> float:
        forced = Force({steps // 4, steps // 2, 3 * steps // 4})
        model.generate(
            **inputs,
            do_sample=False,
            min_new_tokens=steps,
            max_new_tokens=steps,
            logits_processor=LogitsProcessorList([forced]),
            **options,
        )
        return forced.times[-1] - forced.times[0]

    def session(strategy: str) -> Callable[[], float]:
        config = LookAgainConfig(strategy=strategy, reflection_token_id=REFLECTION)

        def run() -> float:
            with look_again(model, config) as active:
                seconds = generate()
                shown = [len(row) for row in active.trace.reflections]
            if strategy != "off" and shown != [3]:
                raise RuntimeError(f"{strategy} should have looked again 3 times, did {shown}")
            return seconds

        return run

    def eager() -> float:
        model.set_attn_implementation({"text_config": "eager"})
        try:
            return generate(output_attentions=True, return_dict_in_generate=True)
        finally:
            model.set_attn_implementation({"text_config": "sdpa"})

    calls = {name: session(name) for name in ("off", "copy", "route")}
    calls |= {"unpatched": generate, "eager": eager}
    comparison = Comparison(calls, budget=10 if quick else 90, least=3 if quick else 7)
    note = f"{GRID * GRID} visual tokens, prompt {inputs['input_ids'].shape[1]}, {steps} new tokens"
    rows = (
        ("generate with COPY x 3", "copy", "off", 1.02, "<= 1.02x"),
        ("generate with ROUTE x 3", "route", "off", None, ""),
        ("generate, strategy off", "off", "unpatched", 1.0, "<= 1x"),
        ("generate with ROUTE x 3", "route", "eager", 0.2, "<= 0.2x"),
    )
    against = {
        "off": "the same session, strategy off",
        "unpatched": "unpatched model, SDPA",
        "eager": "eager with output_attentions",
    }
    for name, ours, baseline, most, goal in rows:
        ratio, seconds = comparison.ratio(ours, baseline), comparison.timing(ours).p50
        met = None if most is None else ratio.p50 <= most
        yield Row(
            name,
            against[baseline],
            ratio.p50,
            ratio.p20,
            ratio.p80,
            seconds * 1e3,
            goal,
            met,
            note,
        )


def decoder(
    layers: int = 1,
    device: str = "cpu",
    *,
    hidden: int = 3584,
    intermediate: int = 18944,
    heads: tuple[int, int] = (28, 4),
    dtype: torch.dtype = torch.bfloat16,
) -> nn.Module:
    """Qwen2.5-VL with the decoder layers of the 7B, random weights, a tiny tower.

    Narrower ones, with fewer query and key heads of the same 128, leave attention more of the time.
    """
    text = {
        "vocab_size": 1024,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "max_position_embeddings": 32768,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    vision = {
        "depth": 1,
        "hidden_size": 64,
        "num_heads": 2,
        "intermediate_size": 64,
        "patch_size": 14,
        "out_hidden_size": hidden,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen2_5_VLForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(previous)
    model.set_attn_implementation({"text_config": "sdpa"})
    return model


def prompt(rows: int = 1, device: str = "cpu") -> dict[str, Tensor]:
    """The same picture and words for each row of a batch."""
    draw = torch.Generator().manual_seed(0)
    words = torch.randint(WORDS, 1024, (1, 128), generator=draw)
    image = torch.full((1, GRID * GRID), IMAGE)
    before, after = words[:, :8], words[:, 8:]
    ids = torch.cat([before, torch.tensor([[START]]), image, torch.tensor([[END]]), after], dim=1)
    patches = (2 * GRID) ** 2
    row = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.randn(patches, 3 * 2 * 14 * 14, generator=draw).bfloat16(),
        "image_grid_thw": torch.tensor([[1, 2 * GRID, 2 * GRID]]),
    }
    return {name: x.repeat(rows, 1).to(device) for name, x in row.items()}


class Force(LogitsProcessor):
    """Writes <REFLECTION> at the given generated steps, plain words at others, notes the time."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps
        self.times: list[float] = []
        self.prompt = GRID * GRID + 130

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores with all but the wanted tokens forbidden."""
        if scores.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        step = input_ids.shape[1] - self.prompt
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        allowed[:, REFLECTION if step in self.steps else slice(WORDS, None)] = True
        return scores.masked_fill(~allowed, -torch.inf)
