"""routed_attention with many queries on a GPU, forward and backward: training and prefill.

The plain causal part goes through torch's fused attention, and so does every re-injection, whose
rectangle (queries from `start` on, turned by -shift, over the tokens shown) is ordinary attention
without a mask; the parts are joined by their log-sum-exp. The backward hands each part the joined
out and log-sum-exp, which makes its result that part's share; gradients of turned queries are
turned back, and those of shown tokens are added to the rows that the tokens came from.

Why not a kernel of our own for all of it: on Hopper the libraries use the warp-group products and
the bulk copies that a kernel for sm_80 and later cannot, 1.6 times and more of its speed, and
nearly all of the FLOP are in these two shapes. What is lost is one pass over the turned queries.

Work: 4 D (8 D + 2 D backward) FLOP for each query head, query and key seen, sightings included,
nothing for padding. Memory: linear in the length. Bytes beyond the library's: for each pair (row,
re-injection), 2 D H_q a query for its turned queries and as much for its out; backward also for its
copies of grad_out and out. Pairs are taken together up to as many queries as the call has, so this
does not grow with the number of re-injections.

Deterministic: no sum depends on the order in which blocks run. See `_fused_attention.backward`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _fused_attention as library
from ._sightings import Fields, Group, Layout, LayoutCache, Pair, read_layout

_layouts = LayoutCache()


def forward(
    query: Tensor, key: Tensor, value: Tensor, fields: Fields, scale: float, keep: bool = False
) -> tuple[Tensor, Tensor]:
    """Out like query, in the layout of models, and float32 lse; the op's own contract.

    Args:
        query: [B, H_q, L_q, D].
        key: [B, H_kv, L_k, D].
        value: likewise.
        fields: key_start, key_length, spans, inv_freq, shift, start, selected.
        scale: of the logits.
        keep: whether a backward and other layers with the very same fields will follow.
    """
    layout = (_layouts.read if keep else read_layout)(query, key, fields)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if layout.plain is None:
        first, end = layout.keys
        seen = (x[:, first:end] for x in (key, value))
        out, lse = library.forward(query, *seen, True, scale)
    else:
        flat = (x.flatten(0, 1)[None] for x in (query, key, value))
        out, lse = library.forward(*flat, True, scale, layout.plain)
        out = out[0].view(query.shape)
        lse = lse[0].unflatten(1, (query.shape[0], -1)).transpose(0, 1).contiguous()
    for group in layout.groups:
        turned = turn(_queries(query, group), group, back=True)
        seen = (_tokens(x, group) for x in (key, value))
        again, weight = library.forward(turned, *seen, False, scale, group.sequences)
        _join(out, lse, again[0], weight[0], group)
    return out.transpose(1, 2), lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    fields: Fields,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, shaped as they are."""
    layout = _layouts.read(query, key, fields)
    grad_out, query, key, value, out = (
        x.transpose(1, 2) for x in (grad_out, query, key, value, out)
    )
    grad_query, grad_key, grad_value = _plain_backward(
        layout, grad_out, query, key, value, out, lse, scale
    )
    if layout.groups:
        exact = torch.promote_types(key.dtype, torch.float32)
        grad_key, grad_value = grad_key.to(exact), grad_value.to(exact)
    for group in layout.groups:
        turned = turn(_queries(query, group), group, back=True)
        upstream, result = (_queries(x, group) for x in (grad_out, out))
        sums = torch.cat([lse[pair.row, :, pair.first :] for pair in group.pairs], 1)
        seen = (_tokens(x, group) for x in (key, value))
        shares = library.backward(
            upstream, turned, *seen, result, sums[None], False, scale, group.sequences
        )
        _add_queries(grad_query, turn(shares[0], group, back=False)[0], group)
        _add_tokens(grad_key, shares[1][0], group)
        _add_tokens(grad_value, shares[2][0], group)
    grads = (grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype))
    return tuple(x.transpose(1, 2) for x in grads)


def _plain_backward(
    layout: Layout,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if layout.plain is not None:
        flat = [x.flatten(0, 1)[None] for x in (grad_out, query, key, value, out)]
        sums = lse.transpose(0, 1).flatten(1, 2)[None]
        grads = library.backward(*flat, sums, True, scale, layout.plain)
        return tuple(
            x[0].view(like.shape) for x, like in zip(grads, (query, key, value), strict=True)
        )
    first, end = layout.keys
    seen = (x[:, first:end] for x in (key, value))
    grad_query, *grads = library.backward(grad_out, query, *seen, out, lse, True, scale)
    if (first, end) != (0, key.shape[1]):
        around = (0, 0, 0, 0, first, key.shape[1] - end)
        grads = [torch.nn.functional.pad(x, around) for x in grads]
    return grad_query, *grads


def turn(x: Tensor, group: Group, back: bool) -> Tensor:
    """Vectors [1, queries, H, D] of a group turned by their pair's +shift, or -shift, in float32.

    NeoX layout; features past the rotary ones are copied.
    """
    half = group.cosine.shape[-1]
    cosine, sine = (table[:, None] for table in (group.cosine, group.sine))
    if back:
        sine = -sine
    turned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    first, second = x[..., :half], x[..., half : 2 * half]
    turned[..., :half] = (first * cosine).addcmul_(second, sine, value=-1)
    turned[..., half : 2 * half] = (second * cosine).addcmul_(first, sine)
    turned[..., 2 * half :] = x[..., 2 * half :]
    return turned


def _queries(x: Tensor, group: Group) -> Tensor:
    """What belongs to a group's queries of x [B, L_q, H, D], behind each other, B = 1."""
    parts = [x[pair.row, pair.first :] for pair in group.pairs]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]


def _tokens(x: Tensor, group: Group) -> Tensor:
    """The tokens shown by a group, of keys or values [B, L_k, H_kv, D]."""
    parts = []
    for pair in group.pairs:
        if pair.runs is None:
            parts.append(x[pair.row, pair.index])
        else:
            parts += [x[pair.row, first : first + length] for first, length in pair.runs]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]


def _by_row(group: Group) -> list[tuple[int, int, list[tuple[Pair, int]]]]:
    """For each row its earliest query, and its pairs with their place in the group's queries."""
    found: dict[int, list[tuple[Pair, int]]] = {}
    place = 0
    for pair in group.pairs:
        found.setdefault(pair.row, []).append((pair, place))
        place += group.queries - pair.first
    return [(row, min(p.first for p, _ in pairs), pairs) for row, pairs in found.items()]


def _join(out: Tensor, lse: Tensor, again: Tensor, weight: Tensor, group: Group) -> None:
    """Joins a group's results [queries, H, D] and [H, queries] with `out` and `lse`, in place."""
    for row, begin, pairs in _by_row(group):
        before = lse[row, :, begin:]
        total = before.clone()
        for pair, place in pairs:
            part, count = total[:, pair.first - begin :], group.queries - pair.first
            torch.logaddexp(part, weight[:, place : place + count], out=part)
        finite = total.masked_fill(total == -math.inf, 0.0)
        share = (before - finite).exp_().mT[..., None]
        mixed = out[row, begin:] * share
        for pair, place in pairs:
            count, skipped = group.queries - pair.first, pair.first - begin
            share = (weight[:, place : place + count] - finite[:, skipped:]).exp_()
            mixed[skipped:].addcmul_(again[place : place + count], share.mT[..., None])
        out[row, begin:] = mixed
        lse[row, :, begin:] = total


def _add_queries(grad: Tensor, shares: Tensor, group: Group) -> None:
    """Adds a group's gradients to those of the queries, in place, one rounding each."""
    exact = torch.promote_types(grad.dtype, torch.float32)
    for row, begin, pairs in _by_row(group):
        total = grad[row, begin:].to(exact)
        for pair, place in pairs:
            count = group.queries - pair.first
            total[pair.first - begin :] += shares[place : place + count]
        grad[row, begin:] = total


def _add_tokens(grad: Tensor, shares: Tensor, group: Group) -> None:
    """Adds a group's gradients of shown tokens to those of their rows, in place.

    Pair by pair: within one the rows are distinct, so nothing is added in a race.
    """
    place = 0
    for pair in group.pairs:
        if pair.runs is None:
            grad[pair.row, pair.index] += shares[place : place + pair.count]
            place += pair.count
            continue
        for first, length in pair.runs:
            grad[pair.row, first : first + length] += shares[place : place + length]
            place += length
