"""Attention that sees visual tokens again at other positions, and tells how much it saw them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import reference
from ..visual import NEVER, VisualContext, is_traced
from . import _cuda, _cuda_training, _packed
from ._attention_library import backward, forward
from ._checks import (
    check_added_to,
    check_attention,
    check_block_table,
    check_in_backward,
    check_kernel_layout,
    check_rows,
    check_scale,
    check_tensor,
    check_visual,
    check_width,
    has_kernels,
)
from ._counted_mass import CountedMass, counted_packed, counted_queries
from ._transforms import (
    is_transformed,
    refuse_batch,
    refuse_transform,
    transformed_backward,
    transforms,
)
from .visual_mass import forward as visual_mass_forward

# `is_traced` and `is_transformed` would cost a small call too much: their parts stand in
# `routed_attention`.
is_compiling, len_dispatch_stack = torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack


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
    block_table: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    return_lse: bool = False,
    mass_in_backward: bool = False,
    mass_queries: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Causal grouped-query attention with re-injected visual tokens, in one softmax.

    Query i of row b has key index `key_length[b] - L_q + i`. It sees the keys from `key_start[b]`
    to that index and, for every re-injection r with `start[b, r]` at or before that index, the
    row's (selected) visual tokens once more, their keys turned by `shift[b, r]`. No key moves:
    since ⟨R(p)q, R(p_j + Δ)k⟩ = ⟨R(p - Δ)q, R(p_j)k⟩, each visual row is read once and scored
    with one turned query per sighting. A query with nothing to see gives zeros.

    Differentiable in query, key and value; a re-injected sighting sends its gradient to the one
    row it came from. Neither `visual_mass` nor the log-sum-exp is differentiated. The same inputs
    give the same bits, on a GPU those of gradients where torch is asked for deterministic
    algorithms (`torch.use_deterministic_algorithms`), which take two to three times as long there,
    or where our own kernels are chosen (`LOOKAGAIN_CUDA_TRAINING=kernels`). Where forward-mode
    differentiation or a transform of `torch.func` follows an argument, the reference in plain
    PyTorch runs, with all logits in memory.

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
        mass_from: int32 [B], first key index whose query is counted; default 0. (Queries before
            key 0 exist where L_q > key_length; they can only see re-injections.)
        block_table: int32 [B, blocks], of a paged cache: key and value are then
            [num_blocks, H_kv, block_size, D] (a cache that lies [num_blocks, block_size, H_kv, D]
            is passed as `.transpose(1, 2)`), slot j of row b is slot j % block_size of block
            `block_table[b, j // block_size]`, and L_k = blocks · block_size. -1 is an unused
            entry; several rows may share a block. Needs `key_length`; has no gradient.
        cu_seqlens: [S + 1], int32 or a list of int, of S sequences packed into one row without
            padding: sequence s is the tokens from `cu_seqlens[s]` to before `cu_seqlens[s + 1]`,
            and sees only itself. B = 1 and L_q = L_k then; what else has one entry for each row
            (`visual`, `visual_mass`, `mass_from`) has one for each sequence, and key indices begin
            at 0 in each. A tensor on a GPU is read once, which waits for the device; under
            `torch.compile` pass a list.
        return_lse: also return the log-sum-exp of the logits.
        mass_in_backward: add to `visual_mass` when this call's backward runs, which has the
            probabilities anyway, instead of now: once for each backward, so once for a layer that
            gradient checkpointing computes again, and not at all where no gradient is wanted.
            (Beside the gradients of a GPU's library it is a pass of its own.) Not under
            `torch.compile`.
        mass_queries: bool [B, L_q], with `mass_in_backward`: the queries that are counted, as far
            as `mass_from` counts them too; default all. [1, L_q] with `cu_seqlens`.

    Returns:
        out, like query; with `return_lse` (out, lse), lse float32 [B, H_q, L_q], -inf for a
        query with nothing to see.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if a shape, device, layout or index does not fit; the message names it. Also
            if `block_table` has no block for a slot that is read, or a gradient is wanted with it.
        NotImplementedError: if `mass_in_backward` stands under forward-mode differentiation or a
            transform of `torch.func`; in the backward, if it comes from `is_grads_batched`.
        ExtensionError: if the C++ extension is missing.

    Example:
        Without re-injections, equivalent to::

            F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    """
    if cu_seqlens is not None:
        _packed.refuse_limits(key_start=key_start, key_length=key_length, block_table=block_table)
        counted = (visual_mass, mass_from, mass_in_backward, mass_queries)
        return _packed_attention(query, key, value, visual, cu_seqlens, *counted, scale, return_lse)
    arguments = (query, key, value, key_start, key_length, visual, visual_mass, mass_from)
    arguments = (*arguments, block_table, scale)
    if mass_in_backward or mass_queries is not None:
        _check(*arguments)
        check_in_backward(mass_in_backward, mass_queries, visual_mass, block_table, query)
        out, lse = _counting_in_backward(*arguments, mass_queries)
    elif (
        is_compiling()
        or len_dispatch_stack()
        or not (type(query) is type(key) is type(value) is Tensor)
        or forward_ad._current_level >= 0
        or transforms() is not None
        or not has_kernels(query)
    ):
        _check(*arguments)
        traced = is_compiling() or is_traced(query, key, value) or query.is_meta
        if not is_compiling() and _by_reference(*arguments):
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
                block_table=block_table,
                return_lse=return_lse,
            )
        out, lse = _traced(*arguments) if traced else _eager(*arguments, return_lse)
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


def _by_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_start: Tensor | None,
    key_length: Tensor | None,
    visual: VisualContext | None,
    visual_mass: Tensor | None,
    mass_from: Tensor | None,
    block_table: Tensor | None,
    _: float | None,
) -> bool:
    """Whether the reference computes an eager call: no kernel can, and there are values."""
    limits = (key_start, key_length, mass_from, block_table)
    if is_transformed(query, key, value, visual_mass, *limits, *_fields(visual)):
        return True
    return not has_kernels(query) and not query.is_meta


def _counting_in_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_start: Tensor | None,
    key_length: Tensor | None,
    visual: VisualContext,
    visual_mass: Tensor,
    mass_from: Tensor | None,
    block_table: None,
    scale: float | None,
    mass_queries: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The attention of a call whose mass is added up in its backward; all arguments checked."""
    fields = _fields(visual)
    _refuse_tracing(query, key, value, visual_mass, mass_queries, *fields)
    if query.is_meta:  # there is nothing to count
        return _traced(query, key, value, key_start, key_length, visual, None, None, None, scale)
    if not has_kernels(query):
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
            return_lse=True,
            mass_in_backward=True,
            mass_queries=mass_queries,
        )
    scale = check_scale(scale, query.shape[-1])
    tensors = (query, key, value, key_start, key_length, *fields)
    if not _wants_grad(query, key, value):
        return forward(*tensors, None, None, block_table, scale)
    if not _cuda.on_gpu(query):
        check_width(visual, visual_mass.shape[-1])
    counted = counted_queries(mass_from, mass_queries, key_length, query, key)
    return _RoutedAttention.apply(*tensors, scale, None, CountedMass(visual_mass, counted))


def _refuse_tracing(*tensors: Tensor | None) -> None:
    if is_transformed(*tensors):
        refuse_transform(mass_in_backward=True)
    if is_traced(*tensors):
        raise ValueError(
            "mass_in_backward does not work under torch.compile or another tracer, which would "
            "have to know of what a backward adds to; leave it out there"
        )


def _packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visual: VisualContext | None,
    cu_seqlens: Tensor | Sequence[int],
    visual_mass: Tensor | None,
    mass_from: Tensor | None,
    mass_in_backward: bool,
    mass_queries: Tensor | None,
    scale: float | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """All sequences in one call where the library takes them so, else one after the other."""
    bounds = _packed.sequence_bounds(cu_seqlens, visual, query=query, key=key, value=value)
    _packed.check_rows(len(bounds) - 1, visual_mass=visual_mass, mass_from=mass_from)
    heads, rows = _packed.split(bounds, query, key, value), _packed.row
    first = None if visual is None else visual.row(0)
    counted = (rows(visual_mass, 0), rows(mass_from, 0))
    _check(query, key, value, None, None, first, *counted, None, scale)
    if mass_in_backward or mass_queries is not None:
        check_in_backward(mass_in_backward, mass_queries, visual_mass, None, query)
        _refuse_tracing(query, key, value, visual_mass, mass_queries, *_fields(visual))
    scale = check_scale(scale, query.shape[-1])
    together = has_kernels(query) and _cuda.on_gpu(query)
    training = _wants_grad(query, key, value)
    together = together and _cuda_training.takes(query, key, value, None, scale, training)
    tensors = (query, key, value, visual_mass, *_fields(visual))
    if not together or is_traced(*tensors) or is_transformed(*tensors):
        outs, sums = [], []
        for number, one in enumerate(heads):
            if one[0].shape[2] == 0:
                continue
            begin, end = bounds[number : number + 2]
            with _packed.naming(number):
                out, lse = routed_attention(
                    *one,
                    None if visual is None else visual.row(number),
                    scale=scale,
                    visual_mass=rows(visual_mass, number),
                    mass_from=rows(mass_from, number),
                    return_lse=True,
                    mass_in_backward=mass_in_backward,
                    mass_queries=None if mass_queries is None else mass_queries[:, begin:end],
                )
            outs.append(out.transpose(1, 2))
            sums.append(lse)
        if not outs:  # no token at all
            return routed_attention(query, key, value, scale=scale, return_lse=return_lse)
        out = torch.cat(outs, dim=1).transpose(1, 2)
        return (out, torch.cat(sums, dim=2)) if return_lse else out
    tensors = (query, key, value, None, None, *_fields(visual))
    if training:
        later = None
        if mass_in_backward:
            later = CountedMass(visual_mass, counted_packed(mass_from, mass_queries, bounds))
        out, lse = _RoutedAttention.apply(*tensors, scale, bounds, later)
    else:
        out, lse = forward(*tensors, None, None, None, scale, bounds=bounds)
    if visual_mass is not None and not mass_in_backward:
        for number, one in enumerate(heads):
            part = lse[..., bounds[number] : bounds[number + 1]].contiguous()
            fields = _fields(visual.row(number))
            counted = (rows(visual_mass, number), rows(mass_from, number))
            _add_mass(*counted, part, *one, None, None, *fields, scale)
    return (out, lse) if return_lse else out


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_start: Tensor | None,
    key_length: Tensor | None,
    visual: VisualContext | None,
    visual_mass: Tensor | None,
    mass_from: Tensor | None,
    block_table: Tensor | None,
    scale: float | None,
) -> None:
    check_attention(query, key, value, paged=block_table is not None)
    check_scale(scale, query.shape[-1])
    check_rows("key_start", key_start, query, torch.int32)
    check_rows("key_length", key_length, query, torch.int32)
    check_rows("mass_from", mass_from, query, torch.int32)
    if block_table is not None:
        check_block_table(block_table, key, query.shape[0])
        if key_length is None:
            raise ValueError("block_table needs key_length, the filled slots of each row")
        if _wants_grad(query, key, value):
            raise ValueError(
                "block_table has no gradient: query, key and value must not require grad, or the "
                "call must stand under torch.no_grad()"
            )
    if visual is not None:
        check_visual(visual, query)
    if visual_mass is not None:
        if visual is None:
            raise ValueError("visual_mass needs visual, which tells where the visual tokens are")
        shape = (query.shape[0], key.shape[1], None)
        check_tensor("visual_mass", visual_mass, shape, torch.float32, query)
        check_added_to("visual_mass", visual_mass)
    elif mass_from is not None:
        raise ValueError("mass_from needs visual_mass, the buffer the mass is added to")
    if has_kernels(query):
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
    block_table: Tensor | None,
    scale: float | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    if type(scale) is not float:
        scale = check_scale(scale, query.shape[-1])
    tensors = (query, key, value, key_start, key_length, *_fields(visual))
    if visual_mass is None and mass_from is not None:
        raise ValueError("mass_from needs visual_mass")
    # The number of queries first: a decode step asks no further, here and below.
    checked = query.shape[2] > _cuda.MOST_COUNTED_QUERIES and _cuda.on_gpu(query)
    training = checked and _wants_grad(query, key, value)
    checked = checked and _cuda_training.takes(query, key, value, block_table, scale, training)
    if checked:  # libraries know nothing of these arguments
        _check(*tensors[:5], visual, visual_mass, mass_from, block_table, scale)
    if not torch.is_grad_enabled() or not _wants_grad(query, key, value):
        return forward(*tensors, visual_mass, mass_from, block_table, scale, return_lse)
    if block_table is not None:
        raise ValueError("block_table has no gradient")
    if visual_mass is not None and not checked:  # no kernel will check it
        _check(*tensors[:5], visual, visual_mass, mass_from, block_table, scale)
    out, lse = _RoutedAttention.apply(*tensors, scale, None, None)
    if visual_mass is not None:
        _add_mass(visual_mass, mass_from, lse, *tensors, scale)
    return out, lse


def _traced(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_start: Tensor | None,
    key_length: Tensor | None,
    visual: VisualContext | None,
    visual_mass: Tensor | None,
    mass_from: Tensor | None,
    block_table: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    if type(scale) is not float:
        scale = check_scale(scale, query.shape[-1])
    tensors = (query, key, value, key_start, key_length, *_fields(visual))
    if visual_mass is not None and not _wants_grad(query, key, value):
        call = torch.ops.lookagain.routed_attention_mass_
        return call(*tensors, visual_mass, mass_from, scale, block_table)
    out, lse = torch.ops.lookagain.routed_attention(
        *tensors, scale, block_table, _wants_grad(query, key, value)
    )
    if visual_mass is not None:
        _add_mass(visual_mass, mass_from, lse, *tensors, scale)
    return out, lse


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
    fields, limits = (spans, inv_freq, shift, start, selected), (key_start, key_length)
    first = query.new_zeros(query.shape[0], dtype=torch.int32) if mass_from is None else mass_from
    rows = torch.stack([first, torch.full_like(first, NEVER)], -1)[:, None]
    traced = query.is_meta or is_traced(query, key, lse)
    call = torch.ops.lookagain.visual_mass if traced else visual_mass_forward
    tensors = (query.detach(), key.detach(), rows, mass.shape[-1], lse.detach(), *limits, *fields)
    with torch.no_grad():
        mass += call(*tensors, scale)[:, 0]


class _RoutedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - autograd's own
        *tensors, scale, bounds, mass = args
        out, lse = forward(
            *tensors, None, None, None, scale, training=True, keep=True, bounds=bounds
        )
        ctx.save_for_backward(*tensors, out, lse)
        ctx.scale, ctx.bounds, ctx.mass = scale, bounds, mass
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        *tensors, out, lse = ctx.saved_tensors
        refuse_batch(grad_out)
        if is_transformed(grad_out):
            refuse_transform(cu_seqlens=ctx.bounds, mass_in_backward=ctx.mass)
            return (*transformed_backward(grad_out, tensors, ctx.scale), *[None] * 10)
        if is_traced(grad_out):
            if ctx.bounds is not None:
                raise ValueError(
                    "cu_seqlens has no backward that can be traced after an eager call"
                )
            if ctx.mass is not None:
                _refuse_tracing(grad_out)
            call = torch.ops.lookagain.routed_attention_backward
            return (*call(grad_out, out, lse, *tensors, ctx.scale), *[None] * 10)
        grads = backward(grad_out, out, lse, tuple(tensors), ctx.scale, ctx.bounds, ctx.mass)
        return (*grads, *[None] * 10)
