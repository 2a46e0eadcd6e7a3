"""COPY and ROUTE as real cache rows: gather, turn from the original, write at each row's end."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._native import native, use_kernels
from ..visual import is_traced
from . import _cuda
from ._checks import (
    check_block_table,
    check_inv_freq,
    check_kernel_layout,
    check_rows,
    check_tensor,
)
from ._transforms import is_transformed


def append_visual_(
    key_cache: Tensor,
    value_cache: Tensor,
    key_length: Tensor,
    spans: Tensor,
    shift: Tensor,
    inv_freq: Tensor,
    *,
    selected: Tensor | None = None,
    rows: Tensor | None = None,
    block_table: Tensor | None = None,
    check_room: bool = True,
) -> None:
    """Append each row's visual tokens to its cache once more, at shifted rotary positions.

    In place: for each row b, keys and values of its (selected) visual tokens are gathered from
    the cache, the keys turned by `shift[b]`, and both written from slot `key_length[b]` on, in
    visual order; `key_length[b]` grows by their number. Rows that do not take part keep every
    bit. Keys are always turned from the original span, so repeated calls do not drift.

    Args:
        key_cache: [B, H_kv, capacity, D], changed in place; any strides with a contiguous last
            axis.
        value_cache: [B, H_kv, capacity, D], changed in place.
        key_length: int32 [B], filled slots of each row, changed in place.
        spans: int32 [B, S, 2], (first key index, length) of each run of visual keys.
        shift: int32 [B], rotary offset of the new sighting.
        inv_freq: float32 [rotary_dim / 2], the model's inverse frequencies (NeoX layout).
        selected: bool [B, L_c], the tokens to append; None appends all.
        rows: bool [B], the rows to append to; None takes all.
        block_table: int32 [B, blocks], of a paged cache: key_cache and value_cache are then
            [num_blocks, H_kv, block_size, D] (a cache that lies [num_blocks, block_size, H_kv, D]
            is passed as `.transpose(1, 2)`), slot j of row b is slot j % block_size of block
            `block_table[b, j // block_size]`, and capacity = blocks · block_size. -1 is an unused
            entry. Rows may share blocks that are read. That no other row lists a slot that is
            written is not checked: a block must be the row's own before it is written to.
        check_room: on a GPU, whether to wait for the device and raise if nothing could be written.
            Without it, and while a CUDA graph is captured, a call that cannot write writes nothing
            and says nothing. On a CPU it always raises.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if a shape, device, layout or span does not fit, a row has no room, or
            `block_table` has no block for a slot that is read or written; then nothing is written.
        NotImplementedError: under forward-mode differentiation or a transform of `torch.func`.
        ExtensionError: if the C++ extension is missing.
    """
    if not isinstance(key_cache, Tensor):
        raise TypeError(f"key_cache must be a tensor, got {type(key_cache).__name__}")
    if key_cache.dim() != 4 or not key_cache.is_floating_point():
        raise ValueError(
            "key_cache must be a floating tensor [B, H_kv, capacity, D] (paged: "
            "[num_blocks, H_kv, block_size, D]), "
            f"got {key_cache.dtype} {list(key_cache.shape)}"
        )
    batch = key_cache.shape[0]
    if block_table is not None:
        check_tensor("key_length", key_length, (None,), torch.int32, key_cache)
        batch = key_length.shape[0]
        check_block_table(block_table, key_cache, batch)
    check_tensor("value_cache", value_cache, tuple(key_cache.shape), key_cache.dtype, key_cache)
    check_tensor("key_length", key_length, (batch,), torch.int32, key_cache)
    check_tensor("spans", spans, (batch, None, 2), torch.int32, key_cache)
    check_tensor("shift", shift, (batch,), torch.int32, key_cache)
    check_inv_freq("inv_freq", inv_freq, key_cache)
    check_rows("rows", rows, key_length, torch.bool)
    if selected is not None:
        check_tensor("selected", selected, (batch, None), torch.bool, key_cache)
    tensors = (key_cache, value_cache, key_length, spans, shift, inv_freq, selected, rows)
    if is_transformed(*tensors, block_table):
        raise NotImplementedError(
            "append_visual_ works under neither forward-mode differentiation nor torch.func, which "
            "do not see what it writes to a cache; call it without them"
        )
    if key_cache.is_meta:
        return  # nothing to write
    odd = key_cache.dtype == torch.float64 or key_cache.shape[1] == 0  # no kernel of a GPU's
    if not use_kernels(key_cache.device.type) or (odd and _cuda.on_gpu(key_cache)):
        reference.append_visual_(
            key_cache,
            value_cache,
            key_length,
            spans,
            shift,
            inv_freq,
            selected=selected,
            rows=rows,
            block_table=block_table,
        )
        return
    check_kernel_layout(key_cache=key_cache, value_cache=value_cache)
    traced = is_traced(*tensors, block_table)
    call = torch.ops.lookagain.append_visual_ if traced else _forward
    call(*tensors, block_table, check_room)


def _forward(
    key_cache: Tensor,
    value_cache: Tensor,
    key_length: Tensor,
    spans: Tensor,
    shift: Tensor,
    inv_freq: Tensor,
    selected: Tensor | None,
    rows: Tensor | None,
    block_table: Tensor | None = None,
    check_room: bool = True,
) -> None:
    if _cuda.on_gpu(key_cache):
        _cuda.append_visual_(
            key_cache,
            value_cache,
            key_length,
            spans,
            shift,
            inv_freq,
            selected,
            rows,
            block_table,
            check_room,
        )
        return
    native().append_visual_(
        key_cache,
        value_cache,
        key_length,
        spans,
        shift,
        inv_freq,
        selected,
        rows,
        block_table,
        torch.get_num_threads(),
    )


_op = torch.library.custom_op(
    "lookagain::append_visual_",
    _forward,
    mutates_args=("key_cache", "value_cache", "key_length"),
)


@_op.register_fake
def _(key_cache: Tensor, *_: object, **__: object) -> None:
    return None
