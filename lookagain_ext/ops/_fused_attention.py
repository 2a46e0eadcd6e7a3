"""Attention of queries over keys, with its log-sum-exp: torch's fused kernels, or chunks.

The one interface between `_cuda_training.py` and the libraries that do the arithmetic. Tensors lie
[B, L, H, D] with a contiguous last axis, any other strides; the log-sum-exp [B, H, L_q]. With
`Sequences` B is 1 and L counts through several sequences of queries and keys that see only each
other. Causal means that the last query of a sequence sees its last key.

* bfloat16 and float16 on a GPU: FlashAttention through aten, which takes sequences, and cuDNN,
  which is faster on Hopper, for plain causal attention. Both give the log-sum-exp of scaled logits
  in natural units, so either's backward takes the other's. cuDNN makes a plan for each new length,
  which took about a second for forward and backward on an H200: it is used for lengths that are
  multiples of 128, of which there are few, and batches padded to them gain from it.
* Everything else, float32 first of all: matrix products over blocks of queries, with logits of one
  block at a time, so that memory stays linear in the length.

A backward is given the out and log-sum-exp of a *merged* softmax, of which these keys were a part.
It needs nothing else to be right: P = exp(logit - lse) and D = rowsum(grad_out out) are then those
of the whole softmax, and the result is exactly this part's share of the gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
_BLOCK_LOGITS = 2**26  # of one block of queries in the chunked arithmetic


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences behind each other: their cumulative lengths, on the host and on the device."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    device_queries: Tensor
    device_keys: Tensor

    @classmethod
    def of(cls, lengths: list[tuple[int, int]], device: torch.device) -> Sequences:
        """From the numbers of queries and of keys of each; either may be 0."""
        sums = [tuple(accumulate(each, initial=0)) for each in zip(*lengths, strict=True)]
        both = torch.tensor(sums, dtype=torch.int32).to(device)
        return cls(*sums, *both)

    @functools.cached_property
    def longest(self) -> tuple[int, int]:
        """Of queries and of keys, at least 2: FlashAttention lays out single queries otherwise."""
        return tuple(max(2, *(b - a for a, b in pairwise(x))) for x in (self.queries, self.keys))


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    scale: float,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """Out like query, and the float32 log-sum-exp; zeros and -inf where there is nothing to see."""
    if not _is_fused(query):
        return _chunked_forward(query, key, value, causal, scale, sequences)
    if sequences is None and causal and _cudnn_fits(query, key):
        turned = (_aligned(x).transpose(1, 2) for x in (query, key, value))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *turned, None, True, 0.0, True, False, scale=scale
        )
        return out.transpose(1, 2), lse.view(lse.shape[:3])
    layout = _flash_layout(query, key, sequences)
    tensors = [_aligned(x if sequences is None else x[0]) for x in (query, key, value)]
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *tensors, *layout, 0.0, causal, False, scale=scale
    )
    if sequences is None:
        return out, lse
    # Nothing to see is +inf there.
    return out[None], lse.masked_fill(lse == math.inf, -math.inf)[None]


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """This part's share of the gradients of query, key and value, in their dtypes.

    The libraries' backward adds gradients of the query in the order in which blocks happen to run.
    Where torch is asked for deterministic algorithms (`torch.use_deterministic_algorithms`) only
    FlashAttention is used, which then sums in a fixed order, at about half the speed.
    """
    if not _is_fused(query):
        return _chunked_backward(grad_out, query, key, value, out, lse, causal, scale, sequences)
    exact_order = torch.are_deterministic_algorithms_enabled()
    if sequences is None and causal and not exact_order and _cudnn_fits(query, key):
        turned = [_aligned(x).transpose(1, 2) for x in (grad_out, query, key, value, out)]
        state = torch.empty(2, dtype=torch.int64, device=query.device)  # of dropout, unread
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *turned,
            lse.contiguous()[..., None],
            state[0],
            state[1],
            None,
            None,
            None,
            query.shape[1],
            key.shape[1],
            0.0,
            True,
            scale=scale,
        )
        return tuple(x.transpose(1, 2) for x in grads)
    layout = _flash_layout(query, key, sequences)
    # exp(logit - inf) is the weight 0 of a query with nothing to see.
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    tensors = (grad_out, query, key, value, out, lse)
    if sequences is not None:
        tensors = tuple(x[0] for x in tensors)
    grad_out, query, key, value, out, lse = tensors
    state = torch.empty(2, dtype=torch.uint64, device=query.device)  # of dropout, unread
    grads = torch.ops.aten._flash_attention_backward(
        *(_aligned(x) for x in (grad_out, query, key, value, out)),
        lse.contiguous(),
        *layout,
        0.0,
        causal,
        state,
        state,
        scale=scale,
    )
    return grads if sequences is None else tuple(x[None] for x in grads)


def _is_fused(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in HALVES and query.shape[-1] % 8 == 0


def _flash_layout(
    query: Tensor, key: Tensor, sequences: Sequences | None
) -> tuple[Tensor | None, Tensor | None, int, int]:
    if sequences is None:
        return None, None, query.shape[1], key.shape[1]
    return sequences.device_queries, sequences.device_keys, *sequences.longest


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _cudnn_fits(query: Tensor, key: Tensor) -> bool:
    """Where it is known to be right and the faster one: Hopper, square (its mask is top-left)."""
    size, length = query.shape[-1], query.shape[1]
    return (
        length == key.shape[1]
        and length % 128 == 0
        and size in (64, 128)
        and _capability(query.get_device()) == (9, 0)
        and torch.backends.cuda.cudnn_sdp_enabled()
    )


def _aligned(x: Tensor) -> Tensor:
    """As libraries read it: rows at 16-byte boundaries, each its own, the last axis contiguous."""
    strides = x.stride()
    odd = any(stride % 8 or not stride for stride in strides[:-1]) or x.data_ptr() % 16
    # `contiguous` would give back what is contiguous, wherever it begins.
    return x.clone(memory_format=torch.contiguous_format) if odd or strides[-1] != 1 else x


def _chunks(
    query: Tensor, key: Tensor, causal: bool, sequences: Sequences | None
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Blocks of queries, the keys that they see, and what of those is hidden from whom."""
    bounds = (
        [(0, query.shape[1], 0, key.shape[1])]
        if sequences is None
        else [
            (*q, *k)
            for q, k in zip(pairwise(sequences.queries), pairwise(sequences.keys), strict=True)
        ]
    )
    for first, end, first_key, end_key in bounds:
        keys = end_key - first_key
        if first == end or keys == 0:
            continue
        size = max(16, _BLOCK_LOGITS // (query.shape[0] * query.shape[2] * keys))
        for begin in range(first, end, size):
            last = min(begin + size, end)
            hidden, seen = None, end_key
            if causal:
                seen = end_key - (end - last)
                own = torch.arange(begin, last, device=query.device) + (end_key - end)
                hidden = torch.arange(first_key, seen, device=query.device) > own[:, None]
            yield slice(begin, last), slice(first_key, seen), hidden


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[B, L, H_kv G, D] as [B, H_kv, G L, D], to float32 (float64 stays)."""
    x = x if x.dtype == torch.float64 else x.float()
    return x.unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _chunked_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    scale: float,
    sequences: Sequences | None,
) -> tuple[Tensor, Tensor]:
    groups = query.shape[2] // key.shape[2]
    exact = torch.promote_types(query.dtype, torch.float32)
    out = torch.zeros_like(query)
    lse = query.new_full((query.shape[0], query.shape[2], query.shape[1]), -math.inf, dtype=exact)
    for rows, keys, hidden in _chunks(query, key, causal, sequences):
        logits = _logits(query[:, rows], key[:, keys], groups, scale, hidden)
        block = logits.logsumexp(-1)
        weight = (logits - block[..., None]).exp_().flatten(2, 3)
        found = (weight @ _grouped(value[:, keys], 1)).unflatten(2, (groups, -1))
        out[:, rows] = found.permute(0, 3, 1, 2, 4).flatten(2, 3).to(out.dtype)
        lse[:, :, rows] = block.flatten(1, 2)
    return out, lse


def _logits(query: Tensor, key: Tensor, groups: int, scale: float, hidden: Tensor | None) -> Tensor:
    """[B, H_kv, G, queries, keys]."""
    logits = _grouped(query, groups) @ _grouped(key, 1).mT
    logits = logits.mul_(scale).unflatten(2, (groups, -1))
    return logits if hidden is None else logits.masked_fill_(hidden, -math.inf)


def _chunked_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    sequences: Sequences | None,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = query.shape[2] // key.shape[2]
    exact = torch.promote_types(query.dtype, torch.float32)
    grad_query = torch.zeros_like(query)
    heads_first = (key.shape[0], key.shape[2], key.shape[1], key.shape[3])
    grad_key, grad_value = (key.new_zeros(heads_first, dtype=exact) for _ in range(2))
    for rows, keys, hidden in _chunks(query, key, causal, sequences):
        rows_of_query = _grouped(query[:, rows], groups)
        upstream = _grouped(grad_out[:, rows], groups)
        block = lse[:, :, rows].unflatten(1, (-1, groups))[..., None]
        block = block.masked_fill(block == -math.inf, math.inf)
        logits = _logits(query[:, rows], key[:, keys], groups, scale, hidden)
        weight = (logits - block).exp_().flatten(2, 3)
        inner = (upstream * _grouped(out[:, rows], groups)).sum(-1, keepdim=True)
        grad_value[:, :, keys] += weight.mT @ upstream
        change = (upstream @ _grouped(value[:, keys], 1).mT - inner).mul_(weight).mul_(scale)
        grad_key[:, :, keys] += change.mT @ rows_of_query
        found = (change @ _grouped(key[:, keys], 1)).unflatten(2, (groups, -1))
        grad_query[:, rows] = found.permute(0, 3, 1, 2, 4).flatten(2, 3).to(query.dtype)
    return grad_query, *(x.transpose(1, 2).to(key.dtype) for x in (grad_key, grad_value))
