"""Several sequences in one row, without padding: each is attended by itself.

What the ops read of a batch's rows (spans, re-injections, mass) they read of the sequences then,
with key indices that begin at 0 in each. The heads of a sequence are a view of those of all, so a
kernel runs on them in place, and autograd joins the gradients as `split` and `cat` do.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..visual import VisualContext


def sequence_bounds(
    cu_seqlens: Tensor | Sequence[int], query: Tensor, key: Tensor, visual: object
) -> tuple[int, ...]:
    """Where each packed sequence begins, and the end of the last, checked.

    Args:
        cu_seqlens: [S + 1], what to check.
        query: [1, H_q, T, D].
        key: [1, H_kv, T, D].
        visual: a context with a row for each sequence, or None.

    Raises:
        TypeError: if `cu_seqlens` holds no integers, or an argument has the wrong type.
        ValueError: unless `cu_seqlens` goes from 0 to T without going back, and all else fits.
    """
    for name, tensor in (("query", query), ("key", key)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4 or tensor.shape[0] != 1:
            raise ValueError(
                f"{name} must have shape [1, H, T, D] with cu_seqlens, got {list(tensor.shape)}"
            )
    tokens = query.shape[2]
    if key.shape[2] != tokens:
        raise ValueError(
            f"key must have query's {tokens} tokens with cu_seqlens, got {key.shape[2]}"
        )
    given = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        name = type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens must be an integer tensor [S + 1] or a list, got {name}")
    if any(isinstance(bound, bool) or not isinstance(bound, int) for bound in given):
        raise TypeError(f"cu_seqlens must hold integers in one axis, got {given}")
    rising = all(begin <= end for begin, end in pairwise(given))
    if len(given) < 2 or given[0] != 0 or given[-1] != tokens or not rising:
        raise ValueError(
            f"cu_seqlens must go from 0 to the {tokens} tokens without going back, got {given}"
        )
    if isinstance(visual, VisualContext):
        names = ("spans", "shift", "start", "selected")
        check_rows(len(given) - 1, **{f"visual.{name}": getattr(visual, name) for name in names})
    elif visual is not None:
        raise TypeError(f"visual must be a VisualContext, got {type(visual).__name__}")
    return tuple(given)


def refuse_limits(**given: object) -> None:
    """Raise if something is given that only padded or paged batches have."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} is of padded or paged batches, cu_seqlens of packed ones")


def check_rows(count: int, **tensors: object) -> None:
    """Raise unless each tensor that is not None has a row for each of `count` sequences."""
    for name, rows in tensors.items():
        if rows is None:
            continue
        if not isinstance(rows, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(rows).__name__}")
        if rows.dim() == 0 or rows.shape[0] != count:
            raise ValueError(
                f"{name} must have a row for each of the {count} sequences in cu_seqlens, got "
                f"{list(rows.shape)}"
            )


def split(bounds: tuple[int, ...], *heads: Tensor) -> list[tuple[Tensor, ...]]:
    """The heads [1, H, n, D] of each sequence; views."""
    lengths = [end - begin for begin, end in pairwise(bounds)]
    return list(zip(*(tensor.split(lengths, dim=2) for tensor in heads), strict=True))


def row(rows: Tensor | None, number: int) -> Tensor | None:
    """One row of a tensor, as a batch of one."""
    return None if rows is None else rows[number : number + 1]


def together(parts: list[Tensor]) -> Tensor:
    """Rows of different widths, [S, ..., widest], filled up with zeros."""
    width = max(part.shape[-1] for part in parts)
    filled = [torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in parts]
    return torch.cat(filled)
