"""routed_attention with many queries on a GPU, forward and backward: training and prefill.

The plain causal part goes through torch's fused attention, and so do the re-injections: the queries
between the starts of two of them see all tokens shown so far, their keys turned by +shift, which is
ordinary attention without a mask. The two parts are joined by their log-sum-exp. The backward hands
each part the joined out and log-sum-exp, which makes its result that part's share; gradients of
turned keys are turned back, and those of shown tokens added to the rows that the tokens came from.

`_cuda_many.py` has kernels of our own for all of it, and says when they are chosen. On Hopper the
libraries use warp-group products and bulk copies, which those kernels do not, and nearly all of the
FLOP are in these two shapes.

Work: 4 D (8 D + 2 D backward) FLOP for each query head, query and key seen, sightings included,
nothing for padding. Memory: linear in the length. Bytes beyond the library's: one pass to join the
outs of the queries that see a re-injection (backward: to add their gradients), and the shown keys
and values, which are few: (R + 1) R / 2 times those of the picture.

The forward gives the same bits each time. The backward does where torch is asked for deterministic
algorithms; see `_fused_attention.backward`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _cuda, _cuda_many
from . import _fused_attention as library
from ._counted_mass import CountedMass
from ._sightings import Again, Fields, Layout, LayoutCache, read_layout

_layouts = LayoutCache()


def takes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor | None,
    scale: float,
    training: bool = False,
) -> bool:
    """Whether a call goes this way, not to the decode kernel; `training` as of `forward`.

    Within the capture of a CUDA graph the library's way is closed: it reads a layout on the host.
    """
    if not _cuda.are_many(query, key, block_table):
        return False
    own = _cuda_many.is_chosen(query, key, value, scale, training)
    return own or not _cuda.is_capturing(query)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fields: Fields,
    scale: float,
    training: bool = False,
    keep: bool = False,
    bounds: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """Out like query, in the layout of models, and float32 lse; the op's own contract.

    Args:
        query: [B, H_q, L_q, D].
        key: [B, H_kv, L_k, D].
        value: likewise.
        fields: key_start, key_length, spans, inv_freq, shift, start, selected.
        scale: of the logits.
        training: whether a backward will follow.
        keep: whether calls with the very same fields, unchanged, will follow: its own backward and
            those of other layers. Not in compiled code, which writes to tensors that it reuses
            without a trace.
        bounds: of packed sequences, see `read_layout`.
    """
    if _cuda_many.is_chosen(query, key, value, scale, training):
        return _cuda_many.forward(query, key, value, fields, scale, bounds)
    layout = (_layouts.read if keep else read_layout)(query, key, fields, bounds)
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
    if layout.again is not None:
        again = layout.again
        seen = _seen(key, value, again)
        found = library.forward(_queries(query, again), *seen, False, scale, again.sequences)
        _join(out, lse, *(x[0] for x in found), again)
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
    bounds: tuple[int, ...] | None = None,
    mass: CountedMass | None = None,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, shaped as they are; adds to `mass`.

    `keep` as of `forward`.

    The libraries keep their probabilities to themselves: beside them the mass is a pass of its own.
    """
    if _cuda_many.is_chosen(query, key, value, scale, True):
        tensors = (grad_out, query, key, value, out, lse)
        return _cuda_many.backward(*tensors, fields, scale, bounds, mass)
    if mass is not None:
        _cuda.add_counted_mass(query, key, lse, mass, fields, scale, bounds)
    layout = (_layouts.read if keep else read_layout)(query, key, fields, bounds)
    grad_out, query, key, value, out = (
        x.transpose(1, 2) for x in (grad_out, query, key, value, out)
    )
    grad_query, grad_key, grad_value = _plain_backward(
        layout, grad_out, query, key, value, out, lse, scale
    )
    if layout.again is not None:
        again = layout.again
        upstream, asking, result = (_queries(x, again) for x in (grad_out, query, out))
        sums = torch.cat([lse[row, :, begin:end] for row, begin, end in again.rows], 1)[None]
        shares = library.backward(
            upstream,
            asking,
            *_seen(key, value, again),
            result,
            sums,
            False,
            scale,
            again.sequences,
        )
        _add_queries(grad_query, shares[0][0], again)
        exact = torch.promote_types(key.dtype, torch.float32)
        back, grad = (_shown_share(x[0], again) for x in shares[1:])
        grad_key = _add_tokens(grad_key.to(exact), turn(back, again, back=True), again)
        grad_value = _add_tokens(grad_value.to(exact), grad, again)
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


def turn(x: Tensor, again: Again, back: bool) -> Tensor:
    """Shown tokens [tokens, H_kv, D] turned by their pair's +shift, or -shift, in float32.

    NeoX layout; features past the rotary ones are copied.
    """
    half = again.cosine.shape[-1]
    cosine, sine = (table[:, None] for table in (again.cosine, again.sine))
    if back:
        sine = -sine
    turned = torch.empty_like(x)
    first, second = x[..., :half], x[..., half : 2 * half]
    turned[..., :half] = (first * cosine).addcmul_(second, sine, value=-1)
    turned[..., half : 2 * half] = (second * cosine).addcmul_(first, sine)
    turned[..., 2 * half :] = x[..., 2 * half :]
    return turned


def _queries(x: Tensor, again: Again) -> Tensor:
    """What belongs to the queries that see a re-injection of x [B, L_q, H, D], B = 1."""
    return _together([x[row, begin:end] for row, begin, end in again.rows])[None]


def _seen(key: Tensor, value: Tensor, again: Again) -> tuple[Tensor, Tensor]:
    """Keys and values of all segments behind each other, B = 1."""
    shown = (turn(_tokens(key, again), again, back=False), _tokens(value, again))
    return tuple(_together([x[first:end] for first, end in again.seen])[None] for x in shown)


def _tokens(x: Tensor, again: Again) -> Tensor:
    """The shown tokens of keys or values [B, L_k, H_kv, D]."""
    parts = []
    for pair in again.pairs:
        if pair.runs is None:
            parts.append(x[pair.row, pair.index])
        else:
            parts += [x[pair.row, first : first + length] for first, length in pair.runs]
    return _together(parts)


def _together(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _join(out: Tensor, lse: Tensor, part: Tensor, weight: Tensor, again: Again) -> None:
    """Joins the results [queries, H, D] and [H, queries] with `out` and `lse`, in place."""
    place = 0
    for row, begin, end in again.rows:
        mine = slice(place, place + end - begin)
        place = mine.stop
        _cuda.join(out[row, begin:end], lse[row, :, begin:end], part[mine], weight[:, mine])


def _add_queries(grad: Tensor, shares: Tensor, again: Again) -> None:
    """Adds gradients of the queries that see a re-injection to those of all, in place."""
    place = 0
    for row, begin, end in again.rows:
        grad[row, begin:end] += shares[place : place + end - begin]
        place += end - begin


def _shown_share(shares: Tensor, again: Again) -> Tensor:
    """Gradients of the shown tokens, from those of all segments; float32, in a fixed order."""
    if again.sequences is None:
        return shares.to(torch.promote_types(shares.dtype, torch.float32))
    shape = (len(again.cosine), *shares.shape[1:])
    total = shares.new_zeros(shape, dtype=torch.promote_types(shares.dtype, torch.float32))
    place = 0
    for first, end in again.seen:
        total[first:end] += shares[place : place + end - first]
        place += end - first
    return total


def _add_tokens(grad: Tensor, shares: Tensor, again: Again) -> Tensor:
    """Adds gradients of the shown tokens to those of their rows, in place.

    Pair by pair: within one the rows are distinct, so nothing is added in a race.
    """
    place = 0
    for pair in again.pairs:
        if pair.runs is None:
            grad[pair.row, pair.index] += shares[place : place + pair.count]
            place += pair.count
            continue
        for first, length in pair.runs:
            grad[pair.row, first : first + length] += shares[place : place + length]
            place += length
    return grad
