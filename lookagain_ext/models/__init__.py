"""What differs between model families, one small file each, and how to find the right one."""

from __future__ import annotations

from torch import nn

from .family import Family, unwrap
from .qwen2_5_vl import Qwen2_5_VL
from .qwen2_vl import Qwen2_VL
from .qwen3_vl import Qwen3_VL

FAMILIES: tuple[type[Family], ...] = (Qwen2_5_VL, Qwen2_VL, Qwen3_VL)

__all__ = ["FAMILIES", "Family", "family_of", "unwrap"]


def family_of(model: nn.Module) -> Family:
    """The family that a model belongs to, bound to it.

    Args:
        model: a Hugging Face vision-language model; wrappers (PEFT, DDP) are looked through.

    Raises:
        TypeError: if it is not a transformers model.
        ValueError: if no family knows its `model_type`; the message lists those that are known.
    """
    inner = unwrap(model)
    config = getattr(inner, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family(inner)
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    kind = "" if hasattr(config, "vision_config") else " (it has no vision tower)"
    raise ValueError(
        f"model has model_type {config.model_type!r}{kind}, which is not supported; known: {known}"
    )
