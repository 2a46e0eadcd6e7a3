"""Qwen3-VL: interleaved M-RoPE, normalised queries and keys, and DeepStack.

DeepStack (arXiv 2406.04334) adds features of earlier vision layers to the hidden states of the
first decoder layers at visual positions. Cached keys and values hold them already, so re-injection
from the cache needs nothing extra; re-encoding gives them to the decoder again.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from .family import Family


class Qwen3_VL(Family):
    """Qwen3-VL, dense and mixture-of-experts."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl", "qwen3_vl_moe")

    def positions(self, inputs: dict[str, Any], past: Tensor | int = 0) -> Tensor:
        """As in `Family`; a video is one image a frame here, with its time in the text."""
        return super().positions({**inputs, "second_per_grid_ts": None}, past)
