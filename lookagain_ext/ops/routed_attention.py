"""Attention that sees visual tokens again at other positions, and tells how much it saw them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._native import native, use_kernels
from ..visual import VisualContext
from ._checks import (
    check_attention,
    check_kernel_layout,
    check_rows,
    check_scale,
    check_tensor,
    check_visual,
)


def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visual: VisualContext | None = None,
    *,
    scale: float | None = None,
    key_start: Tensor | None = None,
    key_length: Tensor | None = None,
    visual_mass: Tensor | None = None,
    mass_from: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Causal grouped-query attention with re-injected visual tokens, in one softmax.

    Query i of row b has key index `key_length[b] - L_q + i`. It sees the keys from `key_start[b]`
    to that index and, for every re-injection r with `start[b, r]` at or before that index, the
    row's (selected) visual tokens once more, their keys turned by `shift[b, r]`. No key moves:
    since ⟨R(p)q, R(p_j + Δ)k⟩ = ⟨R(p - Δ)q, R(p_j)k⟩, each visual row is read once and scored
    with one turned query per sighting. A query with nothing to see gives zeros.

    Differentiable in query, key and value; a re-injected sighting sends its gradient to the one
    row it came from. Neither `visual_mass` nor the log-sum-exp is differentiated. The same inputs
    give the same bits.

    Args:
        query: [B, H_q, L_q, D], float32, bfloat16, float16 or (CPU) float64; any strides with a
            contiguous last axis; D a multiple of 8 up to 256.
        key: [B, H_kv, L_k, D], keys as cached, rotary embedding applied. H_q = G · H_kv.
        value: [B, H_kv, L_k, D].
        visual: spans and re-injections; None for plain causal attention.
        scale: factor on the logits; default 1 / sqrt(D).
        key_start: int32 [B], first key of each row (left padding before it); default 0.
        key_length: int32 [B], keys in each row's cache; default L_k. Slots past it are not read.
        visual_mass: float32 [B, H_kv, L_c], **added to in place**: the attention probability on
            each visual token, all its sightings together, summed over the G query heads of the
            group and over the counted queries (Eq. 5 of Qwen Look Again, arXiv 2505.23558, before
            the mean over tokens, heads and layers).
        mass_from: int32 [B], first key index whose query is counted; default: all.
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        out, like query; with `return_lse` (out, lse), lse float32 [B, H_q, L_q], -inf for a
        query with nothing to see.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if a shape, device, layout or index does not fit; the message names it.
        ExtensionError: if the C++ extension is missing.

    Example:
        Without re-injections, equivalent to::

            F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    """
    arguments = (query, key, value, key_start, key_length, visual, visual_mass, mass_from, scale)
    compiling = torch.compiler.is_compiling()
    if compiling or not isinstance(query, Tensor) or not use_kernels(query.device.type):
        _check(*arguments)
        if not compiling:
            return reference.routed_attention(
                query,
                key,
                value,
                visual,
                scale=scale,
                key_start=key_start,
                key_length=key_length,
                visual_mass=visual_mass,
                mass_from=mass_from,
                return_lse=return_lse,
            )
        out, lse = _compiled(*arguments)
    else:
        try:
            out, lse = _eager(*arguments, return_lse)
        except (AttributeError, TypeError, ValueError):
            # The kernel's binding checks everything that it reads, at no cost worth mentioning.
            # The checks here cost more than a small kernel: they run when it refused, for a
            # message in this function's words.
            _check(*arguments)
            raise
    return (out, lse.float()) if return_lse else out


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_start: Tensor | None,
    key_length: Tensor | None,
    visual: VisualContext | None,
    visual_mass: Tensor | None,
    mass_from: Tensor | None,
    scale: float | None,
) -> None:
    check_attention(query, key, value)
    check_scale(scale, query.shape[-1])
    check_rows("key_start", key_start, query, torch.int32)
    check_rows("key_length", key_length, query, torch.int32)
    check_rows("mass_from", mass_from, query, torch.int32)
    if visual is not None:
        check_visual(visual, query)
    if visual_mass is not None:
        if visual is None:
            raise ValueError("visual_mass needs visual, which tells where the visual tokens are")
        shape = (query.shape[0], key.shape[1], None)
        check_tensor("visual_mass", visual_mass, shape, torch.float32, query)
    elif mass_from is not None:
        raise ValueError("mass_from needs visual_mass, the buffer the mass is added to")
    if use_kernels(query.device.type):
        check_kernel_layout(query=query, key=key, value=value)


def _fields(visual: VisualContext | None) -> tuple[Tensor | None, ...]:
    if visual is None:
        return (None,) * 5
    return visual.spans, visual.inv_freq, visual.shift, visual.start, visual.selected


def _wants_grad(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    )


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_start: Tensor | None,
    key_length: Tensor | None,
    visual: VisualContext | None,
    visual_mass: Tensor | None,
    mass_from: Tensor | None,
    scale: float | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    tensors = (query, key, value, key_start, key_length, *_fields(visual))
    if visual_mass is None and mass_from is not None:
        raise ValueError("mass_from needs visual_mass")
    if not _wants_grad(query, key, value):
        return _forward(*tensors, visual_mass, mass_from, scale, return_lse)
    out, lse = _RoutedAttention.apply(*tensors, scale)
    if visual_mass is not None:
        _add_mass(visual_mass, mass_from, lse, *tensors, scale)
    return out, lse


def _compiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_start: Tensor | None,
    key_length: Tensor | None,
    visual: VisualContext | None,
    visual_mass: Tensor | None,
    mass_from: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    tensors = (query, key, value, key_start, key_length, *_fields(visual))
    if visual_mass is not None and not _wants_grad(query, key, value):
        return torch.ops.lookagain.routed_attention_mass_(*tensors, visual_mass, mass_from, scale)
    out, lse = torch.ops.lookagain.routed_attention(*tensors, scale)
    if visual_mass is not None:
        _add_mass(visual_mass, mass_from, lse, *tensors, scale)
    return out, lse


def _forward(
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
    scale: float,
    want_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    out, lse = _outputs(query, want_lse)
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
        scale,
        torch.get_num_threads(),
    )
    return out, lse


def _outputs(query: Tensor, want_lse: bool = True) -> tuple[Tensor, Tensor | None]:
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


def _backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, tensors: tuple[Tensor | None, ...], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, *rest = tensors
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    grads = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
    native().routed_attention_backward(
        grad_out, query, key, value, out, lse, *grads, *rest, scale, torch.get_num_threads()
    )
    return grads


def _add_mass(
    mass: Tensor,
    mass_from: Tensor | None,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_start: Tensor | None,
    key_length: Tensor | None,
    spans: Tensor,
    inv_freq: Tensor,
    shift: Tensor,
    start: Tensor,
    selected: Tensor | None,
    scale: float,
) -> None:
    """The visual mass of a forward whose log-sum-exp is known."""
    from .visual_mass import visual_mass

    rows = torch.empty(query.shape[0], 1, 2, dtype=torch.int32, device=query.device)
    rows[..., 0] = 0 if mass_from is None else mass_from[:, None]
    rows[..., 1] = torch.iinfo(torch.int32).max
    context = VisualContext(spans, inv_freq, shift, start, selected)
    with torch.no_grad():
        found = visual_mass(
            query.detach(),
            key.detach(),
            context,
            rows,
            scale=scale,
            key_start=key_start,
            key_length=key_length,
            lse=lse.detach(),
        )[:, 0]
        width = min(found.shape[-1], mass.shape[-1])
        mass[..., :width] += found[..., :width]


class _RoutedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - autograd's own
        *tensors, scale = args
        out, lse = _forward(*tensors, None, None, scale)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.scale = scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        *tensors, out, lse = ctx.saved_tensors
        return (*_backward(grad_out, out, lse, tuple(tensors), ctx.scale), *[None] * 8)


# Under torch.compile the same code runs behind torch.library ops, with shapes told by fakes.


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
) -> tuple[Tensor, Tensor]:
    tensors = (query, key, value, key_start, key_length, spans, inv_freq, shift, start, selected)
    return _forward(*tensors, None, None, scale)


@_op.register_fake
def _(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _outputs(query)


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
) -> tuple[Tensor, Tensor]:
    tensors = (query, key, value, key_start, key_length, spans, inv_freq, shift, start, selected)
    return _forward(*tensors, visual_mass, mass_from, scale)


@_mass_op.register_fake
def _(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _outputs(query)


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
    return _backward(grad_out, out, lse, tensors, scale)


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


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:  # noqa: ANN401
    ctx.save_for_backward(*inputs[:-1], *output)
    ctx.scale = inputs[-1]


def _op_backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    *tensors, out, lse = ctx.saved_tensors
    grads = torch.ops.lookagain.routed_attention_backward(grad_out, out, lse, *tensors, ctx.scale)
    return (*grads, *[None] * 8)


_op.register_autograd(_op_backward, setup_context=_setup_context)
