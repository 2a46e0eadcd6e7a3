"""Several sequences in one row, without padding: each is attended by itself.

What the ops read of a batch's rows (spans, re-injections, mass) they read of the sequences then,
with key indices that begin at 0 in each. The heads of a sequence are a view of those of all, so a
kernel runs on them in place, and autograd joins the gradients as `split` and `cat` do.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from ..visual import VisualContext


def checked_bounds(name: str, given: object, tokens: int) -> tuple[int, ...]:
    """Where each packed sequence begins, and the end of the last, from [S + 1] integers.

    Raises:
        TypeError: if `given` holds anything but integers, or is neither a tensor nor a sequence.
        ValueError: unless it goes from 0 to `tokens` without going back.
    """
    bounds = given.tolist() if isinstance(given, Tensor) else given
    if not isinstance(bounds, Sequence) or isinstance(bounds, (str, bytes)):
        raise TypeError(
            f"{name} must be an integer tensor [S + 1] or a list, got {type(given).__name__}"
        )
    if any(isinstance(bound, bool) or not isinstance(bound, int) for bound in bounds):
        raise TypeError(f"{name} must hold integers in one axis, got {bounds}")
    rising = all(begin <= end for begin, end in pairwise(bounds))
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != tokens or not rising:
        raise ValueError(
            f"{name} must go from 0 to the {tokens} tokens without going back, got {bounds}"
        )
    return tuple(bounds)


def sequence_bounds(
    cu_seqlens: object, visual: object, *, query: Tensor, **others: Tensor
) -> tuple[int, ...]:
    """The bounds of packed sequences, if all else is packed by them too.

    Args:
        cu_seqlens: [S + 1], what to check.
        visual: a context with a row for each sequence, or None.
        query: [1, H_q, T, D].
        **others: key and value [1, H_kv, T, D].

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if bounds or a shape do not fit.
    """
    for name, tensor in (("query", query), *others.items()):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4 or tensor.shape[0] != 1:
            raise ValueError(
                f"{name} must have shape [1, H, T, D] with cu_seqlens, got {list(tensor.shape)}"
            )
        if tensor.shape[2] != query.shape[2]:
            raise ValueError(
                f"{name} must have query's {query.shape[2]} tokens with cu_seqlens, got "
                f"{tensor.shape[2]}"
            )
    bounds = checked_bounds("cu_seqlens", cu_seqlens, query.shape[2])
    if isinstance(visual, VisualContext):
        names = ("spans", "shift", "start", "selected")
        check_rows(len(bounds) - 1, **{f"visual.{name}": getattr(visual, name) for name in names})
    elif visual is not None:
        raise TypeError(f"visual must be a VisualContext, got {type(visual).__name__}")
    return bounds


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


@contextmanager
def naming(number: int) -> Iterator[None]:
    """Errors within say which sequence they are about, whose row is the only one there."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"sequence {number} of cu_seqlens, its row 0: {error}") from error


def on_device(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    """The bounds as int32 [S + 1]; not to be written to, since layers share it."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A capture allows no copy from the host, and what it reads must be in the graph's memory.
        kind = {"dtype": torch.int32, "device": device}
        return torch.cat([torch.full((1,), bound, **kind) for bound in bounds])
    return _copied(bounds, device)


@functools.lru_cache(maxsize=64)
def _copied(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32).to(device)
