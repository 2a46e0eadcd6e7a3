"""Qwen2-VL (arXiv 2409.12191): the first with M-RoPE; no absolute time for video."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from .family import Family


class Qwen2_VL(Family):
    """Qwen2-VL, 2B to 72B."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)

    def positions(self, inputs: dict[str, Any], past: Tensor | int = 0) -> Tensor:
        """As in `Family`; video frames carry no time in seconds here."""
        return super().positions({**inputs, "second_per_grid_ts": None}, past)
