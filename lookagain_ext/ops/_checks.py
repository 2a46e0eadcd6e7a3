"""Argument checks shared by the ops: each names the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from .._native import use_kernels
from ..visual import VisualContext
from . import _cuda

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def has_kernels(tensor: Tensor) -> bool:
    """Whether kernels take this tensor; else the reference does."""
    if tensor.dtype == torch.float64 and _cuda.on_gpu(tensor):
        return False
    return use_kernels(tensor.device.type)


def check_tensor(
    name: str,
    tensor: object,
    shape: tuple[int | None, ...],
    dtype: torch.dtype | None,
    like: Tensor,
) -> None:
    """Raise unless `tensor` has the shape (None = any size), the dtype and the device of `like`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    fits = tensor.dim() == len(shape) and all(
        want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the others, got {tensor.device}")


def check_attention(query: object, key: object, value: object | None, paged: bool = False) -> None:
    """Raise unless query, key and value are the heads of one grouped-query attention.

    The first axis of a paged cache holds blocks and may have any size.
    """
    for name, tensor in (("query", query), ("key", key)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have shape [B, H, L, D], got {list(tensor.shape)}")
    if query.dtype not in _DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"query must be one of {names}, got {query.dtype}")
    batch, heads, _, size = query.shape
    rows = None if paged else batch
    check_tensor("key", key, (rows, None, None, size), query.dtype, query)
    kv_heads = key.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query must have a multiple of key's {kv_heads} heads, got {heads} heads")
    if value is not None:
        check_tensor("value", value, tuple(key.shape), query.dtype, query)


def check_kernel_layout(**tensors: Tensor) -> None:
    """Raise unless the head size suits the kernels and the last axes are contiguous."""
    for name, tensor in tensors.items():
        size = tensor.shape[-1]
        if size % 8 or not 8 <= size <= 256:
            raise ValueError(f"{name} must have a head size of 8, 16, … 256, got {size}")
        if tensor.stride(-1) != 1 and size > 1:
            raise ValueError(
                f"{name} must be contiguous in its last axis, got strides {list(tensor.stride())}"
            )


def check_added_to(name: str, tensor: Tensor) -> None:
    """Raise unless the elements of `tensor` lie apart, so that each can be added to."""
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1 and tensor.numel():
            raise ValueError(
                f"{name} is written to and must not be expanded, got stride 0 on axis {axis}"
            )
    if use_kernels(tensor.device.type) and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(
            f"{name} must be contiguous in its last axis, got strides {list(tensor.stride())}"
        )


def check_rows(name: str, tensor: Tensor | None, like: Tensor, dtype: torch.dtype) -> None:
    """Raise unless `tensor` is None or holds one value of `dtype` for each row of `like`."""
    if tensor is not None:
        check_tensor(name, tensor, (like.shape[0],), dtype, like)


def check_block_table(block_table: object, cache: Tensor, batch: int) -> None:
    """Raise unless `block_table` lists blocks of `cache` for each of `batch` rows.

    Its values are checked where they are used: looking at them here would wait for the device.
    """
    check_tensor("block_table", block_table, (batch, None), torch.int32, cache)
    if cache.shape[2] == 0:
        raise ValueError(
            "block_table needs a cache [num_blocks, H_kv, block_size, D] with a block_size of at "
            f"least 1, got {list(cache.shape)}"
        )


def check_in_backward(
    mass_in_backward: bool,
    mass_queries: Tensor | None,
    visual_mass: Tensor | None,
    block_table: Tensor | None,
    query: Tensor,
) -> None:
    """Raise unless there is a mass to add to, and `mass_queries` tells of each query."""
    if not mass_in_backward:
        raise ValueError(
            "mass_queries needs mass_in_backward=True; a forward counts from mass_from on"
        )
    if visual_mass is None:
        raise ValueError("mass_in_backward needs visual_mass, the buffer the mass is added to")
    if block_table is not None:
        raise ValueError("mass_in_backward counts nothing with block_table, which has no gradient")
    if mass_queries is not None:
        shape = (query.shape[0], query.shape[2])
        check_tensor("mass_queries", mass_queries, shape, torch.bool, query)


def check_width(visual: VisualContext, width: int) -> None:
    """Raise if a row has more visual tokens than the mass; reads the spans, so not on a GPU."""
    most = int(visual.num_visual().max()) if visual.spans.numel() else 0
    if most > width:
        raise ValueError(
            f"spans must hold at most {width} visual tokens (the last axis of the mass), got {most}"
        )


def check_visual(visual: object, like: Tensor) -> None:
    """Raise unless `visual` is a context for the rows, head size and device of `like`."""
    if not isinstance(visual, VisualContext):
        raise TypeError(f"visual must be a VisualContext, got {type(visual).__name__}")
    batch, again = like.shape[0], visual.shift.shape[-1]
    check_tensor("visual.spans", visual.spans, (batch, None, 2), torch.int32, like)
    check_inv_freq("visual.inv_freq", visual.inv_freq, like)
    check_tensor("visual.shift", visual.shift, (batch, again), torch.int32, like)
    check_tensor("visual.start", visual.start, (batch, again), torch.int32, like)
    if visual.selected is not None:
        check_tensor("visual.selected", visual.selected, (batch, again, None), torch.bool, like)


def check_inv_freq(name: str, inv_freq: Tensor, like: Tensor) -> None:
    """Raise unless there is at most one frequency for each pair of features of `like`."""
    check_tensor(name, inv_freq, (None,), torch.float32, like)
    if 2 * inv_freq.shape[0] > like.shape[-1]:
        raise ValueError(
            f"{name} must have at most {like.shape[-1] // 2} frequencies for head size "
            f"{like.shape[-1]}, got {inv_freq.shape[0]}"
        )


def check_scale(scale: float | None, size: int) -> float:
    """The softmax scale, 1 / sqrt(head size) by default."""
    if scale is None:
        return size**-0.5
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"scale must be a finite number, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    return float(scale)
