"""A model and its processor from a name, a folder or a hub id; images work without torchvision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import FAMILIES

TINY = "lookagain-tiny"
ADAPTER_CONFIG = "lookagain.json"
"""In the folder of an adapter: how the model looks again with it, as `config.lookagain` says it."""


def load(
    name_or_path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> tuple[nn.Module, Any]:
    """Load a vision-language model in evaluation mode, and its processor.

    Args:
        name_or_path: "lookagain-tiny" (shipped with the package), a folder, or a hub id such as
            "Qwen/Qwen2.5-VL-7B-Instruct". A folder with an adapter of PEFT gives the model that it
            belongs to with the adapter merged in, and looking again as it was trained with it.
        dtype: of the parameters; None: float32 for lookagain-tiny, else as they were saved.
        device: where to; None: the CPU.

    Returns:
        (model, processor). Without torchvision the processor takes images but no videos.

    Raises:
        ValueError: if there is no such folder or model, or it is not a supported vision-language
            model; one line, with a hint.
    """
    from ..synthetic.processor import is_scene_processor
    from ..synthetic.tiny import load_tiny

    name = str(name_or_path)
    folder = Path(name).expanduser()
    if (folder / "adapter_config.json").is_file():
        return _load_adapted(folder, dtype, device)
    if name == TINY or (folder.is_dir() and is_scene_processor(folder)):
        path = None if name == TINY else folder
        kind = torch.float32 if dtype in (None, "auto") else _as_dtype(dtype)
        model, processor = load_tiny(path, kind)
    else:
        model, processor = _load_pretrained(name, folder, dtype)
    return (model if device is None else model.to(device)).eval(), processor


def _load_adapted(
    folder: Path, dtype: torch.dtype | str | None, device: torch.device | str | None
) -> tuple[nn.Module, Any]:
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ValueError(f"{folder} holds an adapter: pip install peft to load it") from error

    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    model, processor = load(base, dtype, device)
    merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload().eval()
    if (said := folder / ADAPTER_CONFIG).is_file():
        merged.config.lookagain = json.loads(said.read_text(encoding="utf-8"))
    return merged, processor


def _load_pretrained(
    name: str, folder: Path, dtype: torch.dtype | str | None
) -> tuple[nn.Module, Any]:
    from transformers import AutoConfig, AutoModelForImageTextToText

    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{name} does not hold a model: there is no config.json in it")
        name = str(folder)
    elif folder.exists():
        raise ValueError(f"{name} is a file: give the folder that holds the model")
    elif name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(
            f"there is no folder {name!r}, and it is no hub id (owner/model) nor {TINY!r}"
        )
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"cannot load {name!r}: {reason}") from error
    known = [kind for family in FAMILIES for kind in family.model_types]
    if config.model_type not in known:
        what = "a text-only model" if not hasattr(config, "vision_config") else "not supported"
        raise ValueError(
            f"{name!r} has model_type {config.model_type!r} and is {what}; a vision-language "
            f"model of one of these is needed: {', '.join(known)}"
        )
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype or "auto")
    return model, load_processor(name, config.model_type)


def load_processor(name: str, model_type: str) -> Any:  # noqa: ANN401 - one class per family
    """The processor of a saved model; one for images only where torchvision is missing.

    Args:
        name: folder or hub id.
        model_type: of its config.
    """
    from transformers import AutoProcessor, AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        return AutoProcessor.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    images = Qwen2VLImageProcessorPil.from_pretrained(name)
    return images_only(model_type, images, tokenizer)


def images_only(model_type: str, image_processor: Any, tokenizer: Any) -> Any:  # noqa: ANN401
    """A family's processor without its video half, which needs torchvision.

    Args:
        model_type: "qwen2_vl", "qwen2_5_vl" or "qwen3_vl".
        image_processor: makes patches.
        tokenizer: with the family's vision tokens.
    """
    from transformers.processing_utils import ProcessorMixin

    parent = _processor_class(model_type)

    class ImagesOnly(parent):
        def __init__(
            self,
            image_processor: Any = None,  # noqa: ANN401
            tokenizer: Any = None,  # noqa: ANN401
            chat_template: str | None = None,
        ) -> None:
            ids = tokenizer.convert_tokens_to_ids
            for kind, text in _TOKENS.items():
                setattr(self, f"{kind}_token", text)
                setattr(self, f"{kind}_token_id", ids(text))
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

        @property
        def model_input_names(self) -> list[str]:
            names = [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]
            return [*dict.fromkeys([*names, "mm_token_type_ids"])]

    ImagesOnly.__name__ = ImagesOnly.__qualname__ = parent.__name__
    return ImagesOnly(image_processor, tokenizer, tokenizer.chat_template)


_TOKENS = {
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}


def _processor_class(model_type: str) -> type:
    if model_type.startswith("qwen3_vl"):
        from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor as Processor
    elif model_type == "qwen2_vl":
        from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor as Processor
    else:
        from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import (
            Qwen2_5_VLProcessor as Processor,
        )
    return Processor


def _as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype must be a torch dtype, got {dtype!r}")
    return found
