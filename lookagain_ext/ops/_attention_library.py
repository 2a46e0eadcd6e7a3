"""Calls of the attention kernels, and the torch.library ops that `torch.compile` sees.

Under torch.compile the same code runs behind these ops, with shapes told by fakes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._native import native
from . import _cuda, _cuda_training
from ._counted_mass import CountedMass
from ._transforms import refuse_tangents


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_start: Tensor | None,
    key_length: Tensor | None,
    spans: Tensor | None,
    inv_freq: Tensor | None,
    shift: Tensor | None,
    start: Tensor | None,
    selected: Tensor | None,
    visual_mass: Tensor | None,
    mass_from: Tensor | None,
    block_table: Tensor | None,
    scale: float,
    want_lse: bool = True,
    training: bool = False,
    keep: bool = False,
    bounds: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Out and, unless `want_lse` is False, the log-sum-exp; adds to `visual_mass`.

    With `training` a backward follows; with `keep` it and calls of other layers have the very same
    index tensors, unchanged.
    `bounds` are those of packed sequences, on a GPU, where all of them are one call.
    """
    on_gpu = _cuda.on_gpu(query)
    if on_gpu and _cuda_training.takes(query, key, value, block_table, scale, training):
        fields = (key_start, key_length, spans, inv_freq, shift, start, selected)
        heads = (query, key, value)
        out, lse = _cuda_training.forward(*heads, fields, scale, training, keep, bounds)
        if visual_mass is not None:
            limits, visual = fields[:2], fields[2:]
            _cuda.add_mass(query, key, lse, visual_mass, mass_from, *limits, visual, None, scale)
        return out, lse
    out, lse = outputs(query, want_lse)
    if on_gpu:
        _cuda.routed_attention(
            query,
            key,
            value,
            out,
            lse,
            visual_mass,
            mass_from,
            key_start,
            key_length,
            (spans, inv_freq, shift, start, selected),
            block_table,
            scale,
        )
        return out, lse
    native().routed_attention(
        query,
        key,
        value,
        out,
        lse,
        visual_mass,
        mass_from,
        key_start,
        key_length,
        spans,
        inv_freq,
        shift,
        start,
        selected,
        block_table,
        scale,
        torch.get_num_threads(),
    )
    return out, lse


def outputs(query: Tensor, want_lse: bool = True) -> tuple[Tensor, Tensor | None]:
    """Uninitialised out and lse; out lies [B, L_q, H_q, D], the layout that models go on with."""
    batch, heads, queries, size = query.shape
    if queries == 1:
        out = query.new_empty(batch, heads, 1, size)
    else:
        out = query.new_empty(batch, queries, heads, size).transpose(1, 2)
    if not want_lse:
        return out, None
    precise = torch.float64 if query.dtype == torch.float64 else torch.float32
    return out, query.new_empty(batch, heads, queries, dtype=precise)


def backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    tensors: tuple[Tensor | None, ...],
    scale: float,
    bounds: tuple[int, ...] | None = None,
    mass: CountedMass | None = None,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, the first three of `tensors`; adds to `mass`.

    `keep` as of `forward`.
    """
    query, key, value, *rest = tensors
    if query.numel() == 0 or key.numel() == 0:  # no query sees a key
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    if _cuda.on_gpu(query):
        heads, fields = tensors[:3], tensors[3:]
        arguments = (grad_out, *heads, out, lse, fields, scale, bounds, mass, keep)
        return _cuda_training.backward(*arguments)
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    grads = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
    total, counted = (None, None) if mass is None else mass
    native().routed_attention_backward(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        *grads,
        total,
        counted,
        *rest,
        scale,
        torch.get_num_threads(),
    )
    return grads


def _meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _laid_out(found: tuple[Tensor, ...], promised: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Results with the strides that the fakes told a compiler, whatever a library chose."""
    return tuple(
        x if x.stride() == y.stride() else torch.empty_like(y, device=x.device).copy_(x)
        for x, y in zip(found, promised, strict=True)
    )


@torch.library.custom_op("lookagain::routed_attention", mutates_args=())
def _op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_start: Tensor | None,
    key_length: Tensor | None,
    spans: Tensor | None,
    inv_freq: Tensor | None,
    shift: Tensor | None,
    start: Tensor | None,
    selected: Tensor | None,
    scale: float,
    block_table: Tensor | None = None,
    training: bool = False,
) -> tuple[Tensor, Tensor]:
    refuse_tangents()
    tensors = (query, key, value, key_start, key_length, spans, inv_freq, shift, start, selected)
    found = forward(*tensors, None, None, block_table, scale, training=training)
    return _laid_out(found, outputs(_meta(query)))


@_op.register_fake
def _(query: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    refuse_tangents()
    return outputs(query)


@torch.library.custom_op("lookagain::routed_attention_mass_", mutates_args=("visual_mass",))
def _mass_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_start: Tensor | None,
    key_length: Tensor | None,
    spans: Tensor | None,
    inv_freq: Tensor | None,
    shift: Tensor | None,
    start: Tensor | None,
    selected: Tensor | None,
    visual_mass: Tensor,
    mass_from: Tensor | None,
    scale: float,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    refuse_tangents()
    tensors = (query, key, value, key_start, key_length, spans, inv_freq, shift, start, selected)
    found = forward(*tensors, visual_mass, mass_from, block_table, scale)
    return _laid_out(found, outputs(_meta(query)))


@_mass_op.register_fake
def _(query: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    refuse_tangents()
    return outputs(query)


@torch.library.custom_op("lookagain::routed_attention_backward", mutates_args=())
def _backward_op(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_start: Tensor | None,
    key_length: Tensor | None,
    spans: Tensor | None,
    inv_freq: Tensor | None,
    shift: Tensor | None,
    start: Tensor | None,
    selected: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (query, key, value, key_start, key_length, spans, inv_freq, shift, start, selected)
    found = backward(grad_out, out, lse, tensors, scale, keep=False)
    return _laid_out(found, tuple(torch.empty_like(_meta(x)) for x in tensors[:3]))


@_backward_op.register_fake
def _(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:  # noqa: ANN401 - autograd's own
    *tensors, scale, block_table, _ = inputs
    if block_table is not None:
        raise ValueError("block_table must be None where gradients are wanted")
    ctx.save_for_backward(*tensors, *output)
    ctx.scale = scale


def _op_backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    *tensors, out, lse = ctx.saved_tensors
    grads = torch.ops.lookagain.routed_attention_backward(grad_out, out, lse, *tensors, ctx.scale)
    return (*grads, *[None] * 10)


_op.register_autograd(_op_backward, setup_context=_setup_context)
