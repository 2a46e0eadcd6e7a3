"""Several sequences in one row, without padding: each is attended by itself.

A sequence is a range of tokens, so its heads are a view and a kernel runs on it in place; autograd
joins the gradients as `split` and `cat` do. What the ops read of a batch's rows (spans,
re-injections, mass) they read of the sequences then, with key indices that begin at each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..visual import VisualContext


def sequence_lengths(cu_seqlens: Tensor | Sequence[int], tokens: int) -> list[int]:
    """The length of each packed sequence.

    Args:
        cu_seqlens: [S + 1], where each sequence begins, and the end of the last.
        tokens: of all sequences.

    Raises:
        TypeError: if `cu_seqlens` holds no integers.
        ValueError: unless it goes from 0 to `tokens` without going back.
    """
    given = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        name = type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens must be an integer tensor [S + 1] or a list, got {name}")
    if any(isinstance(bound, bool) or not isinstance(bound, int) for bound in given):
        raise TypeError(f"cu_seqlens must hold integers in one axis, got {given}")
    lengths = [end - begin for begin, end in zip(given[:-1], given[1:], strict=True)]
    if not lengths or given[0] or given[-1] != tokens or min(lengths) < 0:
        raise ValueError(
            f"cu_seqlens must go from 0 to the {tokens} tokens without going back, got {given}"
        )
    return lengths


def attend(
    attention: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visual: VisualContext | None,
    cu_seqlens: Tensor | Sequence[int],
    *,
    visual_mass: Tensor | None,
    mass_from: Tensor | None,
    return_lse: bool,
    **unpacked: Any,  # noqa: ANN401 - what a padded batch has
) -> Tensor | tuple[Tensor, Tensor]:
    """`routed_attention` of packed sequences; see there."""
    lengths = _checked(query, key, visual, cu_seqlens, unpacked)
    for name, rows in (("visual_mass", visual_mass), ("mass_from", mass_from)):
        _check_rows(name, rows, len(lengths))
    each = (
        attention(
            *heads,
            None if visual is None else visual.row(number),
            scale=unpacked["scale"],
            visual_mass=_row(visual_mass, number),
            mass_from=_row(mass_from, number),
            return_lse=return_lse,
        )
        for number, heads in enumerate(_split(lengths, query, key, value))
    )
    if not return_lse:
        return torch.cat(list(each), dim=2)
    out, lse = zip(*each, strict=True)
    return torch.cat(out, dim=2), torch.cat(lse, dim=2)


def mass(
    visual_mass: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    visual: VisualContext,
    rows: Tensor,
    cu_seqlens: Tensor | Sequence[int],
    *,
    lse: Tensor | None,
    **unpacked: Any,  # noqa: ANN401 - what a padded batch has
) -> Tensor:
    """`visual_mass` of packed sequences; see there."""
    lengths = _checked(query, key, visual, cu_seqlens, unpacked)
    _check_rows("rows", rows, len(lengths))
    found = []
    for number, (queries, keys) in enumerate(_split(lengths, query, key)):
        begin = sum(lengths[:number])
        part = None if lse is None else lse[..., begin : begin + lengths[number]]
        one = visual.row(number)
        found.append(
            visual_mass(queries, keys, one, _row(rows, number), scale=unpacked["scale"], lse=part)
        )
    width = max(part.shape[-1] for part in found)
    return torch.cat([nn.functional.pad(part, (0, width - part.shape[-1])) for part in found])


def _checked(
    query: Tensor,
    key: Tensor,
    visual: VisualContext | None,
    cu_seqlens: Tensor | Sequence[int],
    unpacked: dict[str, Any],
) -> list[int]:
    """The lengths, if the arguments are those of packed sequences."""
    for name, tensor in (("query", query), ("key", key)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 4 or tensor.shape[0] != 1:
            got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} must have shape [1, H, T, D] with cu_seqlens, got {got}")
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"key must have query's {query.shape[2]} tokens with cu_seqlens, got {key.shape[2]}"
        )
    for name in ("key_start", "key_length", "block_table"):
        if unpacked.get(name) is not None:
            raise ValueError(f"{name} is of padded or paged batches, cu_seqlens of packed ones")
    lengths = sequence_lengths(cu_seqlens, query.shape[2])
    if isinstance(visual, VisualContext):
        for name in ("spans", "shift", "start", "selected"):
            _check_rows(f"visual.{name}", getattr(visual, name), len(lengths))
    elif visual is not None:
        raise TypeError(f"visual must be a VisualContext, got {type(visual).__name__}")
    return lengths


def _check_rows(name: str, rows: Tensor | None, count: int) -> None:
    if rows is None:
        return
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(rows).__name__}")
    if rows.dim() == 0 or rows.shape[0] != count:
        raise ValueError(
            f"{name} must have a row for each of the {count} sequences in cu_seqlens, got "
            f"{list(rows.shape)}"
        )


def _row(rows: Tensor | None, number: int) -> Tensor | None:
    return None if rows is None else rows[number : number + 1]


def _split(lengths: list[int], *heads: Tensor) -> Any:  # noqa: ANN401 - an iterator of tuples
    return zip(*(tensor.split(lengths, dim=2) for tensor in heads), strict=True)
