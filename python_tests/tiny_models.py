"""Tiny random vision-language models of each family, inputs for them, and forced reflections."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")
VOCABULARY = 64
PAD, EOS, START, END, IMAGE, VIDEO, REFLECTION = 0, 1, 2, 3, 4, 5, 6
FIRST_WORD = 8
PATCH = 4


def tiny_model(
    family: str = "qwen2_5_vl",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    layers: int = 2,
    vocabulary: int = VOCABULARY,
) -> nn.Module:
    """A random model in evaluation mode: `layers` layers, 4 query and 2 key heads of size 16."""
    torch.manual_seed(seed)
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": None,
    }
    section = [4, 2, 2] if family == "qwen3_vl" else [2, 3, 3]
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": section,
    }
    special = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "tie_word_embeddings": False,
    }
    vision = {"depth": 2, "patch_size": PATCH, "spatial_merge_size": 2, "num_heads": 2}
    if family == "qwen2_5_vl":
        vision |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48}
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special)
        model = Qwen2_5_VLForConditionalGeneration(config)
    elif family == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
        config = Qwen2VLConfig(text_config=text, vision_config=vision, **special)
        model = Qwen2VLForConditionalGeneration(config)
    else:
        vision |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48}
        vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
        config = Qwen3VLConfig(text_config=text, vision_config=vision, **special)
        model = Qwen3VLForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        # Wide enough that attention is far from uniform and positions matter.
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.4 if "embed" in name else 0.2)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    return model.to(dtype).eval()


def tiny_inputs(
    rows: list[list[int | tuple[int, int]]], dtype: torch.dtype = torch.float64, seed: int = 1
) -> dict[str, Tensor]:
    """A left-padded batch of prompts.

    Args:
        rows: for each row, its parts: a number of text tokens, or an image's (height, width) in
            visual tokens.
        dtype: of the pixels.
        seed: of words and pixels; the same part of two calls with other batches differs.
    """
    ids, kinds, patches, grids = [], [], [], []
    for number, parts in enumerate(rows):
        generator = torch.Generator().manual_seed(100 * seed + number)
        row: list[int] = []
        for part in parts:
            if isinstance(part, int):
                words = torch.randint(FIRST_WORD, VOCABULARY, (part,), generator=generator)
                row += words.tolist()
            else:
                height, width = part
                row += [START, *[IMAGE] * (height * width), END]
                grids.append([1, 2 * height, 2 * width])
                size = (4 * height * width, 3 * 2 * PATCH * PATCH)
                patches.append(torch.randn(size, generator=generator, dtype=torch.float64))
        ids.append(row)
        kinds.append([int(token == IMAGE) for token in row])
    longest = max(map(len, ids))
    padding = [longest - len(row) for row in ids]
    batch = {
        "input_ids": torch.tensor([[PAD] * p + r for p, r in zip(padding, ids, strict=True)]),
        "attention_mask": torch.tensor(
            [[0] * p + [1] * len(r) for p, r in zip(padding, ids, strict=True)]
        ),
        "mm_token_type_ids": torch.tensor(
            [[0] * p + k for p, k in zip(padding, kinds, strict=True)]
        ),
    }
    if grids:
        batch["pixel_values"] = torch.cat(patches).to(dtype)
        batch["image_grid_thw"] = torch.tensor(grids)
    return batch


class ForceTokens(LogitsProcessor):
    """Forces tokens at given steps, row by row, and forbids unforced reflections and ends.

    Args:
        forced: for each row, {step: token}.
        free: allow the model to reflect or to stop by itself.
    """

    def __init__(self, forced: list[dict[int, int]], free: bool = False) -> None:
        self.forced = forced
        self.free = free
        self.prompt: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores with -inf everywhere but at the forced token."""
        if self.prompt is None:
            self.prompt = input_ids.shape[1]
        step = input_ids.shape[1] - self.prompt
        scores = scores.clone()
        if not self.free:
            scores[:, [EOS, PAD, REFLECTION, IMAGE, VIDEO]] = -torch.inf
        for row, tokens in enumerate(self.forced):
            if step in tokens:
                scores[row] = -torch.inf
                scores[row, tokens[step]] = 0.0
        return scores


def reflect_at(*rows: list[int]) -> LogitsProcessorList:
    """Reflections at the given steps of each row."""
    return LogitsProcessorList([ForceTokens([dict.fromkeys(steps, REFLECTION) for steps in rows])])


def generate(
    model: nn.Module,
    inputs: dict[str, Tensor],
    processors: LogitsProcessorList,
    steps: int = 12,
    **options: object,
) -> tuple[Tensor, Tensor]:
    """(new tokens [B, steps], logits [B, steps, V]) of a greedy or sampled generation."""
    out = model.generate(
        **inputs,
        logits_processor=processors,
        max_new_tokens=steps,
        return_dict_in_generate=True,
        output_logits=True,
        **{"do_sample": False, **options},
    )
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    return new, torch.stack(out.logits, dim=1)


def whole_sequence(inputs: dict[str, Tensor], new: Tensor) -> dict[str, Tensor]:
    """Inputs of one forward over prompts and answers, with labels on the answers."""
    ids = torch.cat([inputs["input_ids"], new], dim=1)
    ones, zeros = torch.ones_like(new), torch.zeros_like(new)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), new], dim=1)
    return {
        **inputs,
        "input_ids": ids,
        "attention_mask": torch.cat([inputs["attention_mask"], ones], dim=1),
        "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], zeros], dim=1),
        "labels": labels,
    }


def row_alone(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch, without its padding."""
    kept = inputs["attention_mask"][row].bool()
    alone = {
        name: inputs[name][row : row + 1, kept]
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    ids = inputs["input_ids"]
    images = ((ids == START).sum(-1)).tolist()
    first = sum(images[:row])
    grids = inputs["image_grid_thw"]
    patches = grids.prod(-1).tolist()
    begin = sum(patches[:first])
    end = begin + sum(patches[first : first + images[row]])
    alone["image_grid_thw"] = grids[first : first + images[row]]
    alone["pixel_values"] = inputs["pixel_values"][begin:end]
    return alone


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """float64 [B, T], of each token under the logits that preceded it."""
    return logits.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
