"""How much ranges of queries attended each visual token, apart from the attention itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from .._native import native
from ..visual import VisualContext, is_traced
from . import _cuda, _cuda_training, _packed
from ._attention_library import forward as attention
from ._checks import (
    check_attention,
    check_kernel_layout,
    check_rows,
    check_scale,
    check_tensor,
    check_visual,
    has_kernels,
)
from ._transforms import is_transformed


def visual_mass(
    query: Tensor,
    key: Tensor,
    visual: VisualContext,
    rows: Tensor,
    *,
    scale: float | None = None,
    key_start: Tensor | None = None,
    key_length: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention probability on each visual token, summed over ranges of queries.

    For training and prefill; while decoding, `routed_attention` gives it in the same pass. Not
    differentiated. The same inputs give the same bits.

    Args:
        query: [B, H_q, L_q, D], as given to `routed_attention`.
        key: [B, H_kv, L_k, D].
        visual: spans and re-injections; L_c is the width of `selected` or the largest row.
        rows: int32 [B, T, 2], half-open ranges (first, end) of key indices of queries.
        scale: factor on the logits; default 1 / sqrt(D).
        key_start: int32 [B], first key of each row; default 0.
        key_length: int32 [B], keys in each row; default L_k.
        cu_seqlens: [S + 1], of S packed sequences, as of `routed_attention`; `visual`, `rows` and
            the result have one entry for each of them instead of for each row.
        lse: float32 [B, H_q, L_q], the log-sum-exp that `routed_attention` returned for the same
            inputs; computed when None.

    Returns:
        float32 [B, T, H_kv, L_c]: over each range, the probability on each visual token, all its
        sightings together, summed over the query heads of each group.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if a shape, device, layout or index does not fit; the message names it.
        ExtensionError: if the C++ extension is missing.
    """
    if cu_seqlens is not None:
        _packed.refuse_limits(key_start=key_start, key_length=key_length)
        return _packed_mass(query, key, visual, rows, cu_seqlens, scale, lse)
    check_attention(query, key, None)
    check_visual(visual, query)
    scale = check_scale(scale, query.shape[-1])
    check_tensor("rows", rows, (query.shape[0], None, 2), torch.int32, query)
    check_rows("key_start", key_start, query, torch.int32)
    check_rows("key_length", key_length, query, torch.int32)
    if lse is not None:
        check_tensor("lse", lse, tuple(query.shape[:3]), None, query)
        if lse.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"lse must be torch.float32, got {lse.dtype}")
    fields = (visual.spans, visual.inv_freq, visual.shift, visual.start, visual.selected)
    limits = (key_start, key_length)
    transformed = is_transformed(query, key, rows, lse, *limits, *fields)
    if transformed or not (has_kernels(query) or query.is_meta):
        return reference.visual_mass(
            query,
            key,
            visual,
            rows,
            scale=scale,
            key_start=key_start,
            key_length=key_length,
            lse=lse,
        )
    if not query.is_meta:
        check_kernel_layout(query=query, key=key)
    elif visual.selected is None:
        raise ValueError(
            "visual.selected is needed on the meta device, where the number of visual tokens, the "
            "last axis of the result, cannot be read from visual.spans"
        )
    if lse is not None:
        lse = lse.to(torch.float64 if query.dtype == torch.float64 else torch.float32).contiguous()
    width = _width(visual)
    traced = query.is_meta or is_traced(query, key, rows, lse, *limits, *fields)
    call = torch.ops.lookagain.visual_mass if traced else forward
    return call(query.detach(), key.detach(), rows, width, lse, *limits, *fields, scale)


def _width(visual: VisualContext) -> int:
    """L_c of a context; without a selection this waits for the device."""
    if visual.selected is not None:
        return visual.selected.shape[-1]
    return int(visual.num_visual().max()) if visual.spans.numel() else 0


def _packed_mass(
    query: Tensor,
    key: Tensor,
    visual: VisualContext,
    rows: Tensor,
    cu_seqlens: Tensor | Sequence[int],
    scale: float | None,
    lse: Tensor | None,
) -> Tensor:
    """The mass of one sequence after the other; all have the context's width."""
    if visual is None:
        raise TypeError("visual must be a VisualContext, got NoneType")
    bounds = _packed.sequence_bounds(cu_seqlens, visual, query=query, key=key)
    _packed.check_rows(len(bounds) - 1, rows=rows)
    check_attention(query, key, None)
    check_visual(visual.row(0), query)
    if lse is not None:
        check_tensor("lse", lse, tuple(query.shape[:3]), None, query)
    scale = check_scale(scale, query.shape[-1])
    together = lse is None and has_kernels(query) and _cuda.on_gpu(query)
    together = together and not is_transformed(query, key)
    if together and _cuda_training.takes(query, key, key, None, scale):
        fields = (visual.spans, visual.inv_freq, visual.shift, visual.start, visual.selected)
        limits = (None, None)
        _, lse = attention(
            query, key, key, *limits, *fields, None, None, None, scale, bounds=bounds
        )
    width = _width(visual)
    found = []
    for number, (one, other) in enumerate(_packed.split(bounds, query, key)):
        context, wanted = visual.row(number), _packed.row(rows, number)
        if one.shape[2] == 0:
            found.append(_output(one, other, wanted, width))
            continue
        part = None if lse is None else lse[..., bounds[number] : bounds[number + 1]]
        with _packed.naming(number):
            mass = visual_mass(one, other, context, wanted, scale=scale, lse=part)
        found.append(torch.nn.functional.pad(mass, (0, width - mass.shape[-1])))
    return torch.cat(found)


def forward(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    width: int,
    lse: Tensor | None,
    key_start: Tensor | None,
    key_length: Tensor | None,
    spans: Tensor,
    inv_freq: Tensor,
    shift: Tensor,
    start: Tensor,
    selected: Tensor | None,
    scale: float,
) -> Tensor:
    """The mass of `width` visual tokens, all arguments checked; see `visual_mass`."""
    mass = _output(query, key, rows, width)
    if _cuda.on_gpu(query):
        fields = (spans, inv_freq, shift, start, selected)
        limits = (key_start, key_length)
        if lse is None:
            _, lse = attention(query, key, key, *limits, *fields, None, None, None, scale)
        _cuda.visual_mass(query, key, rows, mass, lse, *limits, fields, None, scale)
        return mass
    native().visual_mass(
        query,
        key,
        lse,
        rows,
        mass,
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
    return mass


def _output(query: Tensor, key: Tensor, rows: Tensor, width: int, *_: object) -> Tensor:
    shape = (query.shape[0], rows.shape[1], key.shape[1], width)
    return query.new_zeros(shape, dtype=torch.float32)


_op = torch.library.custom_op("lookagain::visual_mass", forward, mutates_args=())
_op.register_fake(_output)
