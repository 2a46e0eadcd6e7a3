"""Calls of the CUDA kernels: the current stream, workspaces, and which way a call takes.

Queries beyond a decode step's, and gradients, go the way of `_cuda_training.py`.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from .._native import native
from ..visual import NEVER
from ._counted_mass import CountedMass

MOST_COUNTED_QUERIES = 16  # whose logits on visual tokens the kernel keeps for the mass


def on_gpu(tensor: Tensor) -> bool:
    """Whether the CUDA kernels take this tensor."""
    return tensor.is_cuda


def are_many(query: Tensor, key: Tensor, block_table: Tensor | None) -> bool:
    """Whether these queries may take the way of `_cuda_training.py`.

    A paged cache does not: it keeps to the decode kernel.
    """
    many = query.shape[2] > MOST_COUNTED_QUERIES and query.numel() > 0 and key.numel() > 0
    return many and block_table is None


def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor | None,
    visual_mass: Tensor | None,
    mass_from: Tensor | None,
    key_start: Tensor | None,
    key_length: Tensor | None,
    visual: tuple[Tensor | None, ...],
    block_table: Tensor | None,
    scale: float,
) -> None:
    """Writes `out` and `lse`, adds to `visual_mass`; the ops' own arguments otherwise."""
    # Not through `_contiguous`: this runs in every layer of every step, and its calls would show.
    index = (mass_from, key_start, key_length, *visual, block_table)
    index = [None if x is None else x.contiguous() for x in index]
    if visual_mass is None or query.shape[2] <= MOST_COUNTED_QUERIES:
        launch_routed_attention(query, key, value, out, lse, visual_mass, *index, scale)
        return
    # The kernel keeps the logits of a decode step's queries only.
    if lse is None:
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    launch_routed_attention(query, key, value, out, lse, None, None, *index[1:], scale)
    limits = (key_start, key_length)
    add_mass(query, key, lse, visual_mass, mass_from, *limits, visual, block_table, scale)


def add_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    mass: Tensor,
    mass_from: Tensor | None,
    key_start: Tensor | None,
    key_length: Tensor | None,
    visual: tuple[Tensor | None, ...],
    block_table: Tensor | None,
    scale: float,
) -> None:
    """Adds the visual mass of a forward whose log-sum-exp is known to `mass` [B, H_kv, width]."""
    if mass_from is None:
        mass_from = torch.zeros(query.shape[0], dtype=torch.int32, device=query.device)
    rows = torch.stack([mass_from, torch.full_like(mass_from, NEVER)], -1)[:, None]
    found = mass.new_zeros(mass.shape[0], 1, *mass.shape[1:])
    limits = (key_start, key_length)
    visual_mass(query, key, rows, found, lse, *limits, visual, block_table, scale)
    mass += found[:, 0]


def add_counted_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    mass: CountedMass,
    fields: tuple[Tensor | None, ...],
    scale: float,
    bounds: tuple[int, ...] | None,
) -> None:
    """Adds the visual mass of the counted queries, from the forward's `lse`.

    `fields` are key_start, key_length and those of the visual context; with the `bounds` of packed
    sequences the context and the mass have a row for each of these.
    """
    if not mass.total.numel():
        return
    if mass.counted is not None:  # a query whose log-sum-exp is -inf has no weight
        lse = lse.masked_fill(~mass.counted[:, None], -math.inf)
    if bounds is None:
        limits, visual = fields[:2], fields[2:]
        add_mass(query, key, lse, mass.total, None, *limits, visual, None, scale)
        return
    spans, inv_freq, *again = fields[2:]
    for number, (begin, end) in enumerate(pairwise(bounds)):
        if begin == end:
            continue
        row, tokens = slice(number, number + 1), slice(begin, end)
        visual = (spans[row], inv_freq, *(None if x is None else x[row] for x in again))
        one, other = query[:, :, tokens], key[:, :, tokens]
        part = lse[..., tokens].contiguous()
        add_mass(one, other, part, mass.total[row], None, None, None, visual, None, scale)


def visual_mass(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    mass: Tensor,
    lse: Tensor,
    key_start: Tensor | None,
    key_length: Tensor | None,
    visual: tuple[Tensor | None, ...],
    block_table: Tensor | None,
    scale: float,
) -> None:
    """Writes `mass` [B, T, H_kv, width], from the forward's `lse`."""
    index = (_contiguous(x) for x in (key_start, key_length, *visual, block_table))
    launch_visual_mass(query, key, lse, _contiguous(rows), mass, *index, scale)


def join(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Adds to a result of attention what more keys give under the same softmax, in place.

    Args:
        out: [queries, H, D], contiguous last axis.
        lse: float32 [H, queries], likewise.
        part: of the other keys, as `out`.
        part_lse: as `lse`.
    """
    native().cuda_join(out, lse, part, part_lse, _stream(out))


def select_visual_tokens(mass: Tensor, ratio: float, num_visual: Tensor, out: Tensor) -> None:
    """Writes the choice of each row to `out`."""
    native().cuda_select_visual_tokens(mass, ratio, _contiguous(num_visual), out, _stream(mass))


def append_visual_(
    key_cache: Tensor,
    value_cache: Tensor,
    key_length: Tensor,
    spans: Tensor,
    shift: Tensor,
    inv_freq: Tensor,
    selected: Tensor | None,
    rows: Tensor | None,
    block_table: Tensor | None,
    check_room: bool,
) -> None:
    """The op; with `check_room` waits for the device and raises if nothing was written."""
    # Written by the kernel, which does not run for no rows and no heads.
    new = torch.empty if key_length.numel() and key_cache.shape[1] else torch.zeros
    failed = new(4, dtype=torch.int32, device=key_cache.device)
    lengths = _contiguous(key_length)
    launch_append_visual_(
        key_cache,
        value_cache,
        lengths,
        _contiguous(spans),
        _contiguous(shift),
        _contiguous(inv_freq),
        _contiguous(selected),
        _contiguous(rows),
        _contiguous(block_table),
        failed,
    )
    if lengths is not key_length:
        key_length.copy_(lengths)
    if check_room and not is_capturing(key_cache):
        _raise(failed.tolist(), capacity(key_cache, block_table))


def capacity(key_cache: Tensor, block_table: Tensor | None) -> int:
    """Slots of a row."""
    slots = key_cache.shape[2]
    return slots if block_table is None else slots * block_table.shape[1]


def launch_routed_attention(*arguments: Tensor | float | None) -> None:
    """The binding, with stream and workspace."""
    query = arguments[0]
    native().cuda_routed_attention(*arguments, _stream(query), partial(_workspace, query))


def launch_visual_mass(*arguments: Tensor | float | None) -> None:
    """The binding, with stream and workspace."""
    query = arguments[0]
    native().cuda_visual_mass(*arguments, _stream(query), partial(_workspace, query))


def launch_many_queries(*arguments: Tensor | tuple[Tensor, ...] | float | None) -> None:
    """The binding, with stream and workspace."""
    query = arguments[0]
    native().cuda_many_queries(*arguments, _stream(query), partial(_workspace, query))


def launch_append_visual_(*arguments: Tensor | None) -> None:
    """The binding, with stream and workspace."""
    cache = arguments[0]
    native().cuda_append_visual_(*arguments, _stream(cache), partial(_workspace, cache))


def _raise(failed: list[int], capacity: int) -> None:
    what, row, length, tokens = failed
    if what == 1:
        raise ValueError(
            f"row {row} of key_cache has no room: it holds {length} keys, {tokens} visual tokens "
            f"are to be appended, its capacity is {capacity}"
        )
    if what == 2:
        raise ValueError(
            f"key_length must lie in 0 … {capacity} (the capacity of key_cache), got {length} "
            f"in row {row}"
        )
    if what == 3:
        raise ValueError(
            "spans must be ascending, disjoint, end at or before key_length and hold no more "
            f"tokens than selected, which they do not in row {row}"
        )
    if what == 4:
        raise ValueError(
            "block_table must name a block for every slot that is read or written, got -1 "
            f"(unused) in row {row}"
        )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _stream(tensor: Tensor) -> int:
    # What torch.cuda.current_stream(device).cuda_stream gives, without building a Stream object.
    return torch._C._cuda_getCurrentRawStream(tensor.get_device())


def _workspace(tensor: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=tensor.device)


def is_capturing(tensor: Tensor) -> bool:
    """Whether work on its device is being recorded in a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
