"""routed_attention with many queries by kernels of our own: forward, backward, mass within it.

The other way is `_cuda_training.py`, which composes it of a library's attention. These kernels need
no layout on the host, so nothing waits for the device and a step can be captured in a CUDA graph;
their gradients repeat bit by bit; the visual mass is a sum that the backward takes on its way. They
multiply with `mma.sync`, which reaches less of a Hopper GPU than the libraries do.

`LOOKAGAIN_CUDA_TRAINING` chooses: "kernels", "library", or "auto" (default): the library's, but the
kernels where a training step is captured in a CUDA graph.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import _cuda
from ._counted_mass import CountedMass
from ._packed import on_device

CHOICES = ("auto", "kernels", "library")
choice = os.environ.get("LOOKAGAIN_CUDA_TRAINING", "auto")
if choice not in CHOICES:
    raise ValueError(
        f"LOOKAGAIN_CUDA_TRAINING must be one of {', '.join(map(repr, CHOICES))}, got {choice!r}"
    )


def is_chosen(query: Tensor, key: Tensor, value: Tensor, scale: float, training: bool) -> bool:
    """Whether a call goes to these kernels; `training`: a backward, or a forward that has one."""
    captured = training and _cuda.is_capturing(query)
    wanted = choice == "kernels" or (choice == "auto" and captured)
    return wanted and fits(query, key, value, scale)


def fits(query: Tensor, key: Tensor, value: Tensor, scale: float) -> bool:
    """Whether the kernels take these tensors.

    They have 16 bits, head sizes up to 128, rows at 16-byte boundaries, and fewer than 2^30
    queries and elements of keys.
    """
    size = query.shape[-1]
    halves = query.dtype in (torch.bfloat16, torch.float16)
    small = query.numel() < size << 30 and key.numel() < 1 << 30
    aligned = all(map(_is_aligned, (query, key, value)))
    return halves and size <= 128 and scale > 0 and small and aligned


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fields: tuple[Tensor | None, ...],
    scale: float,
    bounds: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """Out in the layout of models and float32 lse; arguments as in `_cuda_training.forward`."""
    batch, heads, queries, size = query.shape
    out = query.new_empty(batch, queries, heads, size).transpose(1, 2)
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    _launch((query, key, value, out, lse), None, None, None, fields, scale, bounds)
    return out, lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    fields: tuple[Tensor | None, ...],
    scale: float,
    bounds: tuple[int, ...] | None = None,
    mass: CountedMass | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, shaped as they are.

    Args:
        grad_out: [B, H_q, L_q, D].
        query: likewise.
        key: [B, H_kv, L_k, D].
        value: likewise.
        out: the forward's.
        lse: the forward's, float32 [B, H_q, L_q].
        fields: as in `_cuda_training.forward`.
        scale: of the logits.
        bounds: of packed sequences.
        mass: the visual mass of these queries is added to it.
    """
    # `contiguous` would give back what is contiguous, wherever it begins.
    whole = torch.contiguous_format
    grad_out, out = (x if _is_aligned(x) else x.clone(memory_format=whole) for x in (grad_out, out))
    grads = tuple(_like_models(x) for x in (query, key, value))
    tensors = (query, key, value, out, lse.contiguous())
    total, counted = (None, None) if mass is None else mass
    _launch(tensors, (grad_out, *grads), total, counted, fields, scale, bounds)
    return grads


def _launch(
    tensors: tuple[Tensor, ...],
    gradients: tuple[Tensor, ...] | None,
    mass: Tensor | None,
    counted: Tensor | None,
    fields: tuple[Tensor | None, ...],
    scale: float,
    bounds: tuple[int, ...] | None,
) -> None:
    index = [None if x is None else x.contiguous() for x in (counted, *fields)]
    longest = 0
    if bounds is not None:
        longest = max(b - a for a, b in zip(bounds, bounds[1:], strict=False))
        bounds = on_device(bounds, tensors[0].device)
    _cuda.launch_many_queries(*tensors, gradients, mass, *index, bounds, longest, scale)


def _like_models(x: Tensor) -> Tensor:
    """An empty tensor of the shape of x, in the layout [B, L, H, D] that projections go on with."""
    batch, heads, length, size = x.shape
    return x.new_empty(batch, length, heads, size).transpose(1, 2)


def _is_aligned(x: Tensor) -> bool:
    """Whether its rows are contiguous and lie at 16-byte boundaries."""
    whole = all(stride % 8 == 0 for stride in x.stride()[:3])
    return x.stride(3) == 1 and whole and x.data_ptr() % 16 == 0 and x.shape[3] % 8 == 0
