"""Qwen2.5-VL (arXiv 2502.13923): sectioned M-RoPE over time, height and width."""

from __future__ import annotations

from typing import ClassVar

from .family import Family


class Qwen2_5_VL(Family):
    """Qwen2.5-VL, 3B to 72B, and models of its architecture such as lookagain-tiny."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)
