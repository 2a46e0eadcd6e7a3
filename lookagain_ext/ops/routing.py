"""ROUTE: which visual tokens are shown again."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import reference
from .._native import native, use_kernels
from ..visual import as_int32, is_integer, is_traced
from . import _cuda
from ._checks import check_tensor
from ._transforms import is_transformed


def select_visual_tokens(mass: Tensor, ratio: float, num_visual: Tensor) -> Tensor:
    """The most attended visual tokens of each row (Qwen Look Again, arXiv 2505.23558, VTR).

    Of row b's first n = num_visual[b] tokens the ceil(ratio · n - 1e-9) with the largest mass are
    chosen, ties to the lower number. A ratio of 1 is COPY, a ratio of 0 chooses nothing.

    Args:
        mass: float32 [B, L_c], or [B, H_kv, L_c] (summed over H_kv first).
        ratio: share of the tokens, in [0, 1].
        num_visual: int32 [B], visual tokens of each row, at most L_c.

    Returns:
        bool [B, L_c], True for the chosen tokens.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if a shape or device does not fit, or ratio is not in [0, 1].
        ExtensionError: if the C++ extension is missing.
    """
    if not isinstance(mass, Tensor):
        raise TypeError(f"mass must be a tensor, got {type(mass).__name__}")
    if mass.dim() not in (2, 3):
        raise ValueError(f"mass must have shape [B, L_c] or [B, H_kv, L_c], got {list(mass.shape)}")
    if not mass.is_floating_point():
        raise TypeError(f"mass must be torch.float32, got {mass.dtype}")
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"ratio must be a number in [0, 1], got {type(ratio).__name__}")
    if not (math.isfinite(ratio) and 0 <= ratio <= 1):
        raise ValueError(f"ratio must be a number in [0, 1], got {ratio}")
    check_tensor("num_visual", num_visual, (mass.shape[0],), None, mass)
    if not is_integer(num_visual):
        raise TypeError(f"num_visual must be torch.int32, got {num_visual.dtype}")
    num_visual = as_int32("num_visual", num_visual)
    if mass.dim() == 3:
        mass = mass.sum(1)
    if not use_kernels(mass.device.type) or is_transformed(mass, num_visual):
        return reference.select_visual_tokens(mass, ratio, num_visual)
    traced = is_traced(mass, num_visual)
    call = torch.ops.lookagain.select_visual_tokens if traced else _forward
    return call(mass.detach().float().contiguous(), float(ratio), num_visual)


def _forward(mass: Tensor, ratio: float, num_visual: Tensor) -> Tensor:
    chosen = torch.empty_like(mass, dtype=torch.bool)
    if _cuda.on_gpu(mass):
        _cuda.select_visual_tokens(mass, ratio, num_visual, chosen)
        return chosen
    native().select_visual_tokens(mass, ratio, num_visual.contiguous(), chosen)
    return chosen


_op = torch.library.custom_op("lookagain::select_visual_tokens", _forward, mutates_args=())


@_op.register_fake
def _(mass: Tensor, ratio: float, num_visual: Tensor) -> Tensor:
    return torch.empty_like(mass, dtype=torch.bool)
