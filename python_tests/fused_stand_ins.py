"""torch's fused attention operators for CPU tensors, as picky as those of a GPU.

They are registered with torch's dispatcher, as `torch.nn.attention` registers FlashAttention 3
and 4 in place of torch's own: names, order and kinds of all arguments are checked against the
operators' schemas. They compute in float32, sequence by sequence.

What is written down here of the libraries, and what of it differs between them:

* FlashAttention takes [B, L, H, D], or [total, H, D] with int32 cumulative lengths; its causal mask
  is aligned with the last query and the last key. torch's own gives the log-sum-exp +inf to a query
  without keys, version 3 and 4 give it -inf. In a backward +inf is the weight 0 for all of them,
  -inf is none.
* cuDNN's takes [B, H, L, D] and gives the log-sum-exp as [B, H, L, 1].
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.library import Library

Piece = tuple[slice, slice]


class StandIns:
    """The operators, while registered; `calls` counts them.

    Args:
        nothing: log-sum-exp of a query without keys.
    """

    def __init__(self, nothing: float) -> None:
        self.calls: Counter[str] = Counter()
        self._nothing = nothing
        self._library = Library("aten", "IMPL")
        operators = {
            "_flash_attention_forward": self._flash_forward,
            "_flash_attention_backward": self._flash_backward,
            "_scaled_dot_product_cudnn_attention": self._cudnn_forward,
            "_scaled_dot_product_cudnn_attention_backward": self._cudnn_backward,
        }
        for name, call in operators.items():
            self._library.impl(name, call, "CPU")

    def remove(self) -> None:
        """Takes the operators back."""
        self._library._destroy()

    def _flash_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cum_q: Tensor | None,
        cum_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout: float,
        causal: bool,
        debug: bool,
        *,
        scale: float | None = None,
        **others: object,
    ) -> tuple[Tensor, ...]:
        self.calls["flash forward"] += 1
        assert not (dropout or debug or others)
        tensors = _as_sequences(cum_q, query, key, value)
        out, lse = torch.zeros_like(tensors[0]), _sums(tensors[0]).fill_(self._nothing)
        for q, k in _pieces(tensors, cum_q, cum_k, max_q, max_k):
            logits = _logits(tensors[0][q], tensors[1][k], causal, scale)
            if logits.shape[-1]:
                lse[:, q] = logits.logsumexp(-1)
                out[q] = _weighted(logits.softmax(-1), tensors[2][k]).to(out.dtype)
        nothing = torch.empty(0)
        if cum_q is None:
            batch = query.shape[0]
            out, lse = out.view_as(query), lse.unflatten(1, (batch, -1)).transpose(0, 1)
        return out, lse.contiguous(), nothing, nothing, nothing

    def _flash_backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        cum_q: Tensor | None,
        cum_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout: float,
        causal: bool,
        state: Tensor,
        unused: Tensor,
        *,
        scale: float | None = None,
        **others: object,
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.calls["flash backward"] += 1
        assert not (dropout or others) and state.dtype == unused.dtype == torch.uint64
        assert lse.dtype == torch.float32 and lse.is_contiguous() and not (lse == -math.inf).any()
        if cum_q is None:
            assert lse.shape == (query.shape[0], query.shape[2], query.shape[1])
            lse = lse.transpose(0, 1).flatten(1)
        else:
            assert lse.shape == (query.shape[1], query.shape[0])
        tensors = _as_sequences(cum_q, query, key, value, out, grad_out)
        grads = [torch.zeros_like(x) for x in tensors[:3]]
        for q, k in _pieces(tensors, cum_q, cum_k, max_q, max_k):
            here = (tensors[0][q], tensors[1][k], tensors[2][k], tensors[3][q], tensors[4][q])
            shares = _share(*here, lse[:, q], causal, scale)
            for grad, share, part in zip(grads, shares, (q, k, k), strict=True):
                grad[part] = share.to(grad.dtype)
        return tuple(x.view_as(y) for x, y in zip(grads, (query, key, value), strict=True))

    def _cudnn_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        want_lse: bool,
        dropout: float = 0.0,
        causal: bool = False,
        debug: bool = False,
        *,
        scale: float | None = None,
    ) -> tuple[Tensor | int, ...]:
        self.calls["cudnn forward"] += 1
        assert bias is None and want_lse and not dropout and not debug
        _as_read(query, key, value)
        out, lse = torch.empty_like(query), _sums(query[:, 0]).new_empty(query.shape[:3])
        assert query.shape[2] == key.shape[2]  # its causal mask begins at the first key
        for row in range(query.shape[0]):
            q, k, v = (x[row].transpose(0, 1) for x in (query, key, value))
            logits = _logits(q, k, causal, scale)
            lse[row] = logits.logsumexp(-1)
            out[row] = _weighted(logits.softmax(-1), v).transpose(0, 1).to(out.dtype)
        nothing = torch.empty(0)
        lengths = (query.shape[2], key.shape[2])
        return out, lse[..., None], nothing, nothing, *lengths, nothing, nothing, nothing

    def _cudnn_backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        seed: Tensor,
        offset: Tensor,
        bias: Tensor,
        cum_q: Tensor,
        cum_k: Tensor,
        max_q: int,
        max_k: int,
        dropout: float,
        causal: bool,
        *,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.calls["cudnn backward"] += 1
        assert lse.shape == (*query.shape[:3], 1) and lse.dtype == torch.float32 and not dropout
        assert bias is cum_q is cum_k is None and (max_q, max_k) == (query.shape[2], key.shape[2])
        assert seed.dtype == offset.dtype == torch.int64
        _as_read(grad_out, query, key, value, out)
        grads = [torch.empty_like(x) for x in (query, key, value)]
        for row in range(query.shape[0]):
            here = (x[row].transpose(0, 1) for x in (query, key, value, out, grad_out))
            for grad, share in zip(
                grads, _share(*here, lse[row, ..., 0], causal, scale), strict=True
            ):
                grad[row] = share.transpose(0, 1).to(grad.dtype)
        return tuple(grads)


def _as_sequences(cum: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """[total, H, D] of each."""
    assert all(x.dim() == (4 if cum is None else 3) for x in tensors)
    _as_read(*tensors)
    return [x if cum is not None else x.flatten(0, 1) for x in tensors]


def _as_read(*tensors: Tensor) -> None:
    """Kernels of a GPU read them as they lie, 16 bytes at a time."""
    for x in tensors:
        assert x.dtype in (torch.bfloat16, torch.float16) and x.stride(-1) == 1
        assert all(n > 0 and n % 8 == 0 for n in x.stride()[:-1]) and x.data_ptr() % 16 == 0


def _sums(query: Tensor) -> Tensor:
    """Float32 [H, total], of query [total, H, D]."""
    return query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)


def _pieces(
    tensors: list[Tensor], cum_q: Tensor | None, cum_k: Tensor | None, max_q: int, max_k: int
) -> Iterator[Piece]:
    totals = (len(tensors[0]), len(tensors[1]))
    if cum_q is None:
        bounds = [range(0, n + 1, most) for n, most in zip(totals, (max_q, max_k), strict=True)]
    else:
        assert cum_q.dtype == cum_k.dtype == torch.int32
        bounds = [cum_q.tolist(), cum_k.tolist()]
    assert [x[-1] for x in bounds] == list(totals)
    pairs = zip(*(itertools.pairwise(x) for x in bounds), strict=True)
    for (a, b), (c, d) in pairs:
        assert a <= b and b - a <= max_q and c <= d and d - c <= max_k
        yield slice(a, b), slice(c, d)


def _expanded(x: Tensor, heads: int) -> Tensor:
    """[H_q, L, D] in float32, of [L, H_kv, D]."""
    return x.float().repeat_interleave(heads // x.shape[1], 1).transpose(0, 1)


def _logits(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    """[H, L_q, L_k] of query [L_q, H, D] and key [L_k, H_kv, D]."""
    logits = scale * query.float().transpose(0, 1) @ _expanded(key, query.shape[1]).mT
    queries, keys = logits.shape[-2:]
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    return logits.masked_fill(hidden, -math.inf) if causal else logits


def _weighted(weight: Tensor, value: Tensor) -> Tensor:
    return (weight @ _expanded(value, weight.shape[0])).transpose(0, 1)


def _share(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients [L, H, D] of one sequence, of a softmax with these sums."""
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    q, upstream = (x.float().transpose(0, 1) for x in (query, grad_out))
    weight = (_logits(query, key, causal, scale) - lse[..., None]).exp()
    inner = (upstream * out.float().transpose(0, 1)).sum(-1, keepdim=True)
    change = scale * weight * (upstream @ _expanded(value, heads).mT - inner)
    grad_key, grad_value = (
        x.unflatten(0, (-1, groups)).sum(1) for x in (change.mT @ q, weight.mT @ upstream)
    )
    grads = (change @ _expanded(key, heads), grad_key, grad_value)
    return tuple(x.transpose(0, 1) for x in grads)
