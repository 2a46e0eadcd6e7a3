"""The visual mass that a backward adds up: which queries count, and where it goes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._packed import on_device


class CountedMass(NamedTuple):
    """Where a backward adds its visual mass to, and of which queries.

    Attributes:
        total: float32 [B, H_kv, L_c], added to in place; S rows for S packed sequences.
        counted: bool [B, L_q], contiguous; None: all queries.
    """

    total: Tensor
    counted: Tensor | None


def counted_queries(
    mass_from: Tensor | None,
    mass_queries: Tensor | None,
    key_length: Tensor | None,
    query: Tensor,
    key: Tensor,
) -> Tensor | None:
    """Queries that count, bool [B, L_q]: those of both arguments; None if that is each."""
    queries, keys = query.shape[2], key.shape[2]
    if mass_from is None and key_length is None and queries <= keys:
        return None if mass_queries is None else mass_queries.contiguous()
    index = torch.arange(queries, device=query.device)[None] - queries
    index = index + (keys if key_length is None else key_length[:, None])
    counted = index >= (0 if mass_from is None else mass_from[:, None])
    counted = counted.expand(query.shape[0], -1)
    return (counted if mass_queries is None else counted & mass_queries).contiguous()


def counted_packed(
    mass_from: Tensor | None, mass_queries: Tensor | None, bounds: tuple[int, ...]
) -> Tensor | None:
    """As `counted_queries`, [1, T], of sequences packed into one row."""
    if mass_from is None:
        return None if mass_queries is None else mass_queries.contiguous()
    edges = on_device(bounds, mass_from.device)
    first = edges[:-1] + mass_from
    first = first.repeat_interleave(edges.diff(), output_size=bounds[-1])
    counted = torch.arange(bounds[-1], device=mass_from.device)[None] >= first
    return counted if mass_queries is None else counted & mass_queries
