"""Every op in plain PyTorch: the specification, and the fall-back where no kernel exists.

Written for reading, not for speed: logits of all sightings are materialised and one softmax is
taken over them. Computed in float64 for float64 inputs, in float32 otherwise. Differentiable
through autograd.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .visual import NEVER, VisualContext


def rotate(x: Tensor, shift: Tensor, inv_freq: Tensor) -> Tensor:
    """Turn vectors by a rotary offset (NeoX layout: feature i pairs with i + rotary_dim / 2).

    Args:
        x: [..., D], D >= rotary_dim; the features past rotary_dim are not turned.
        shift: integer, broadcastable to x.shape[:-1].
        inv_freq: [rotary_dim / 2].

    Returns:
        [..., D] in float64 for float64 input, else float32.
    """
    x = _accurate(x)
    half = inv_freq.shape[0]
    angle = shift[..., None].double() * inv_freq.double()
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


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
    return_lse: bool = False,
    mass_in_backward: bool = False,
    mass_queries: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`lookagain_ext.ops.routed_attention` in plain PyTorch; see there."""
    if block_table is not None:
        start = torch.zeros_like(key_length) if key_start is None else key_start
        slot = torch.arange(block_table.shape[1] * key.shape[2], device=key.device)
        read = (slot >= start[:, None]) & (slot < key_length[:, None])
        if visual is not None:
            tokens, valid = visual.token_keys()
            again = (visual.start < key_length[:, None]).any(1)
            read = read.long().scatter_add(1, tokens, (valid & again[:, None]).long()) > 0
        _check_block_table(block_table, key, read)
        key, value = _gather_blocks(key, block_table), _gather_blocks(value, block_table)
    scores = _scores(query, key, visual, scale, key_start, key_length)
    lse = _logsumexp(scores.logits)
    probability = _probability(scores.logits, lse)
    rows = _expand(_readable(_accurate(value), scores), query.shape[1])
    if scores.sightings:
        seen = rows.gather(2, _index(scores.keys, rows))
        rows = torch.cat([rows, *[seen] * scores.sightings], dim=2)
    out = (probability @ rows).to(query.dtype)
    if visual_mass is not None:
        width, given = visual_mass.shape[-1], scores.valid.shape[-1]
        most = int(scores.valid.sum(-1).max()) if given > width else 0
        if most > width:
            raise ValueError(
                f"spans must hold at most {width} visual tokens (the last axis of the mass), got "
                f"{most}"
            )
        counted = scores.position >= (0 if mass_from is None else mass_from[:, None])
        if mass_queries is not None:
            counted = counted & mass_queries
        weight = probability.detach()

        def add(*_: Tensor) -> None:
            mass = _token_mass(weight * counted[:, None, :, None], scores)
            grouped = mass.sum(2).unflatten(1, (key.shape[1], -1)).sum(2)[..., :width]
            with torch.no_grad():
                visual_mass[..., : grouped.shape[-1]] += grouped.to(visual_mass.dtype)

        if not mass_in_backward:
            add()
        elif out.requires_grad:
            out.register_hook(add)
    return (out, lse.float()) if return_lse else out


def routed_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visual: VisualContext | None = None,
    *,
    scale: float | None = None,
    key_start: Tensor | None = None,
    key_length: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `routed_attention` written out, for where autograd does not reach.

    Takes the gradient of the result, [B, H_q, L_q, D], and the arguments that gave it; returns the
    gradients of query, key and value, in their dtypes.
    """
    scores = _scores(query, key, visual, scale, key_start, key_length)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    probability = _probability(scores.logits, _logsumexp(scores.logits))
    heads, kv_heads, keys = query.shape[1], key.shape[1], key.shape[2]
    turned, upstream = _accurate(query), _accurate(grad_out)
    k, v = (_expand(_readable(_accurate(x), scores), heads) for x in (key, value))
    index = _index(scores.keys, k) if scores.sightings else None
    rows = v if index is None else torch.cat([v, *[v.gather(2, index)] * scores.sightings], dim=2)
    change = upstream @ rows.mT
    change = probability * (change - (probability * change).sum(-1, keepdim=True)) * scale
    widths = [keys] if index is None else [keys, *[scores.keys.shape[-1]] * scores.sightings]
    grad_v, *again_v = (probability.mT @ upstream).split(widths, dim=2)
    change, *again = change.split(widths, dim=-1)
    grad_query, grad_k = change @ k, change.mT @ turned
    for number in range(scores.sightings):
        shift = visual.shift[:, number, None, None]
        grad_query = grad_query + again[number] @ rotate(k.gather(2, index), shift, visual.inv_freq)
        back = rotate(again[number].mT @ turned, -shift, visual.inv_freq)
        grad_k = grad_k.scatter_add(2, index, back)
        grad_v = grad_v.scatter_add(2, index, again_v[number])
    grouped = (x.unflatten(1, (kv_heads, -1)).sum(2) for x in (grad_k, grad_v))
    grad_key, grad_value = (x.to(key.dtype) for x in grouped)
    return grad_query.to(query.dtype), grad_key, grad_value


def visual_mass(
    query: Tensor,
    key: Tensor,
    visual: VisualContext,
    rows: Tensor,
    *,
    scale: float | None = None,
    key_start: Tensor | None = None,
    key_length: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """`lookagain_ext.ops.visual_mass` in plain PyTorch; see there."""
    with torch.no_grad():
        scores = _scores(query, key, visual, scale, key_start, key_length)
        if lse is None:
            lse = _logsumexp(scores.logits)
        mass = _token_mass(_probability(scores.logits, lse.to(scores.logits.dtype)), scores)
        first, end = rows.long().unbind(-1)
        position = scores.position[:, None]
        counted = (position >= first[..., None]) & (position < end[..., None])
        ranges = torch.einsum("btq,bhqc->bthc", counted.to(mass.dtype), mass)
        return ranges.unflatten(2, (key.shape[1], -1)).sum(3).float()


def select_visual_tokens(mass: Tensor, ratio: float, num_visual: Tensor) -> Tensor:
    """`lookagain_ext.ops.select_visual_tokens` in plain PyTorch; see there."""
    if mass.dim() == 3:
        mass = mass.sum(1)
    number = torch.arange(mass.shape[-1], device=mass.device)
    valid = number < num_visual[:, None]
    order = mass.masked_fill(~valid, -math.inf).sort(dim=-1, descending=True, stable=True).indices
    keep = torch.ceil(ratio * num_visual.double() - 1e-9).clamp(min=0)
    chosen = torch.zeros_like(valid).scatter(1, order, number < keep[:, None])
    return chosen & valid


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
) -> None:
    """`lookagain_ext.ops.append_visual_` in plain PyTorch; see there."""
    table, size = block_table, key_cache.shape[2]
    if table is None:  # one block for each row
        table = torch.arange(key_cache.shape[0], device=key_cache.device)[:, None]
    keys, valid = VisualContext.from_spans(spans, inv_freq).token_keys()
    if selected is not None:
        valid = valid & selected[:, : valid.shape[1]]
    if rows is not None:
        valid = valid & rows[:, None]
    count = valid.sum(-1)
    end, capacity = key_length + count, table.shape[1] * size
    full = (end > capacity).nonzero()
    if full.numel():
        row = int(full[0])
        raise ValueError(
            f"row {row} of key_cache has no room: it holds {int(key_length[row])} keys, "
            f"{int(count[row])} visual tokens are to be appended, its capacity is {capacity}"
        )
    if block_table is not None:
        slot = torch.arange(capacity, device=key_cache.device)
        used = (slot >= key_length[:, None]) & (slot < end[:, None])
        used = used.long().scatter_add(1, keys, valid.long()) > 0
        _check_block_table(block_table, key_cache, used)
    for row in range(table.shape[0]):
        source = keys[row, valid[row]]
        target = torch.arange(int(key_length[row]), int(end[row]), device=source.device)
        read, write = _places(table[row], source, size), _places(table[row], target, size)
        turned = rotate(key_cache[read], shift[row], inv_freq)
        key_cache[write] = turned.to(key_cache.dtype)
        value_cache[write] = value_cache[read]
    key_length += count.to(key_length.dtype)


def _places(blocks: Tensor, slots: Tensor, block_size: int) -> tuple[Tensor, slice, Tensor]:
    """What takes the slots of one row out of a paged cache, as [slots, H_kv, D]."""
    return blocks[slots // block_size].long(), slice(None), slots % block_size


def _gather_blocks(cache: Tensor, block_table: Tensor) -> Tensor:
    """The rows of a paged cache, [B, H_kv, blocks · block_size, D]; any block for an unused one."""
    if cache.shape[0] == 0:
        cache = cache.new_zeros(1, *cache.shape[1:])
    return cache[block_table.clamp(min=0).long()].transpose(1, 2).flatten(2, 3)


def _check_block_table(block_table: Tensor, cache: Tensor, used: Tensor) -> None:
    """Raise unless entries name blocks, or are -1 where none of the `used` [B, L_k] slots lies."""
    number, size = cache.shape[0], cache.shape[2]
    unknown = (block_table < -1) | (block_table >= number)
    missing = (block_table == -1) & used.unflatten(1, (block_table.shape[1], size)).any(-1)
    for bad, wanted in (
        (unknown, f"hold blocks 0 … {number - 1} of the cache or -1 (unused)"),
        (missing, "name a block for every slot that is read or written"),
    ):
        for row, entry in bad.nonzero().tolist()[:1]:
            raise ValueError(
                f"block_table must {wanted}, got {int(block_table[row, entry])} in row {row}, "
                f"entry {entry}"
            )


class _Scores(NamedTuple):
    logits: Tensor  # [B, H_q, L_q, L_k + sightings * L_c], -inf where a query may not look
    position: Tensor  # int64 [B, L_q], the key index of each query
    keys: Tensor | None  # int64 [B, L_c], the key index of each visual token
    valid: Tensor | None  # bool [B, L_c]
    sightings: int  # R


def _scores(
    query: Tensor,
    key: Tensor,
    visual: VisualContext | None,
    scale: float | None,
    key_start: Tensor | None,
    key_length: Tensor | None,
) -> _Scores:
    """Logits of the plain keys followed by one block of L_c for each re-injection."""
    batch, heads, queries, size = query.shape
    keys = key.shape[2]
    scale = size**-0.5 if scale is None else scale
    device = query.device
    start = torch.zeros(batch, device=device) if key_start is None else key_start
    length = torch.full((batch,), keys, device=device) if key_length is None else key_length
    position = length.long()[:, None] - queries + torch.arange(queries, device=device)
    column = torch.arange(keys, device=device)
    allowed = (column <= position[..., None]) & (column >= start[:, None, None])
    turned_query = _accurate(query)
    rows = _expand(_accurate(key), heads)
    logits = [_mask(turned_query @ rows.mT * scale, allowed)]
    if visual is None:
        return _Scores(logits[0], position, None, None, 0)
    width = None if visual.selected is None else visual.selected.shape[-1]
    index, valid = visual.token_keys(width)
    seen = rows.gather(2, _index(index, rows))
    for number in range(visual.num_reinjections):
        again = rotate(seen, visual.shift[:, number, None, None], visual.inv_freq)
        shown = valid if visual.selected is None else valid & visual.selected[:, number]
        begin = visual.start[:, number].long()
        active = (position >= begin[:, None]) & (begin != NEVER)[:, None]
        allowed = shown[:, None, :] & active[..., None]
        logits.append(_mask(turned_query @ again.mT * scale, allowed))
    return _Scores(torch.cat(logits, -1), position, index, valid, visual.num_reinjections)


def _token_mass(probability: Tensor, scores: _Scores) -> Tensor:
    """[B, H_q, L_q, L_c]: probability on each visual token, all its sightings together."""
    batch, heads, queries, _ = probability.shape
    tokens = scores.keys.shape[-1]
    plain, *again = probability.split(
        [probability.shape[-1] - scores.sightings * tokens, *[tokens] * scores.sightings], dim=-1
    )
    mass = plain.gather(-1, scores.keys[:, None, None].expand(batch, heads, queries, tokens))
    mass = mass * scores.valid[:, None, None]
    return mass + torch.stack(again).sum(0) if again else mass


def _probability(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits - lse), zero where a query has nothing to see."""
    empty = lse == -math.inf
    return (logits - lse.masked_fill(empty, 0.0)[..., None]).exp()


def _logsumexp(logits: Tensor) -> Tensor:
    """-inf, with a zero gradient, for a query that has nothing to see."""
    empty = (logits == -math.inf).all(-1)
    return logits.masked_fill(empty[..., None], 0.0).logsumexp(-1).masked_fill(empty, -math.inf)


def _readable(rows: Tensor, scores: _Scores) -> Tensor:
    """Zero in cache slots that no query sees: they may hold anything, NaN included."""
    seen = (scores.logits.detach() > -math.inf).any(1).any(1)
    plain = seen[:, : rows.shape[2]]
    if scores.sightings:
        again = seen[:, rows.shape[2] :].unflatten(-1, (scores.sightings, -1)).any(1)
        plain = plain.scatter_add(1, scores.keys, again & scores.valid)
    return rows.masked_fill(~plain[:, None, :, None], 0.0)


def _mask(logits: Tensor, allowed: Tensor) -> Tensor:
    return logits.masked_fill(~allowed[:, None], -math.inf)


def _index(keys: Tensor, rows: Tensor) -> Tensor:
    return keys[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[-1])


def _expand(rows: Tensor, heads: int) -> Tensor:
    return rows.repeat_interleave(heads // rows.shape[1], dim=1)


def _accurate(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
