"""The tiny model: Qwen2.5-VL's architecture at about three million parameters."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    BatchFeature,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from .processor import SceneProcessor
from .scenes import BOARD_UNITS
from .tokenizer import build_tokenizer

SHIPPED = Path(__file__).parents[1] / "weights" / "lookagain-tiny"


def tiny_config(
    tokenizer: PreTrainedTokenizerFast,
    *,
    text_hidden: int = 192,
    text_layers: int = 4,
    vision_hidden: int = 128,
    vision_layers: int = 3,
) -> Qwen2_5_VLConfig:
    """Configuration for ``tokenizer``: 36 visual tokens of 28 pixels a side, G = 2.

    Args:
        tokenizer: made by :func:`~lookagain_ext.synthetic.tokenizer.build_tokenizer`.
        text_hidden: width of the decoder, a multiple of 64.
        text_layers: layers of the decoder.
        vision_hidden: width of the vision tower, a multiple of 32.
        vision_layers: blocks of the vision tower, all with full attention.

    Raises:
        ValueError: a width that does not divide into heads.
    """
    if text_hidden % 64 or text_hidden < 64:
        raise ValueError(f"text_hidden must be a positive multiple of 64, got {text_hidden}")
    if vision_hidden % 32 or vision_hidden < 32:
        raise ValueError(f"vision_hidden must be a positive multiple of 32, got {vision_hidden}")
    head_dim = text_hidden // 4
    grid = head_dim // 2 // 3
    rope = {
        "rope_type": "default",
        "rope_theta": 1000000.0,
        "mrope_section": [head_dim // 2 - 2 * grid, grid, grid],
    }
    ids = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": text_hidden,
        "intermediate_size": text_hidden * 8 // 3,
        "num_hidden_layers": text_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": rope,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": ids("<|im_end|>"),
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": vision_layers,
        "hidden_size": vision_hidden,
        "intermediate_size": vision_hidden * 2,
        "num_heads": vision_hidden // 32,
        "out_hidden_size": text_hidden,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": BOARD_UNITS,
        "fullatt_block_indexes": list(range(vision_layers)),
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def build_processor() -> SceneProcessor:
    """The processor of the tiny model."""
    return SceneProcessor(Qwen2VLImageProcessorPil(), build_tokenizer(), side=BOARD_UNITS)


def build_tiny(
    seed: int = 0, **sizes: int
) -> tuple[Qwen2_5_VLForConditionalGeneration, SceneProcessor]:
    """A fresh, untrained model and its processor; ``sizes`` as in :func:`tiny_config`."""
    processor = build_processor()
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(tiny_config(processor.tokenizer, **sizes))
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model, processor


def load_tiny(
    path: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Qwen2_5_VLForConditionalGeneration, SceneProcessor]:
    """Load a trained tiny model, in evaluation mode, and its processor.

    Args:
        path: a folder written by the trainer; None takes the weights shipped with the package.
        dtype: of the parameters in memory; they are stored as float16.

    Raises:
        ValueError: the folder does not hold such a model.
    """
    folder = Path(path) if path is not None else SHIPPED
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} does not hold a model: there is no config.json in it")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        str(folder), dtype=dtype, attn_implementation="sdpa", local_files_only=True
    )
    return model.eval(), SceneProcessor.from_pretrained(folder)


def save_tiny(
    model: Qwen2_5_VLForConditionalGeneration, processor: SceneProcessor, path: str | Path
) -> Path:
    """Write model (float16 safetensors) and processor to ``path``; the model is left as it is."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    half = copy.deepcopy(model).to(torch.float16)
    half.save_pretrained(str(folder))
    (folder / "model.safetensors").chmod(0o644)
    processor.save_pretrained(folder)
    return folder


def prompt_text(question: str) -> str:
    """The prompt of one question about one picture, ready for the processor."""
    return (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        f"{question}<|im_end|>\n<|im_start|>assistant\n"
    )


def encode(
    processor: SceneProcessor, images: list[Image.Image], questions: list[str]
) -> BatchFeature:
    """Model inputs for a batch of questions, one picture each, padded on the left."""
    return processor(images=images, text=[prompt_text(question) for question in questions])
