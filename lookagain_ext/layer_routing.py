"""ROUTE over a whole sequence: measuring attention in its forward, and choosing by it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .visual import VisualContext


@dataclass
class MassProbe:
    """Collects visual mass over ranges of queries, during one forward of the whole sequence.

    Attributes:
        rows: int32 [B, T, 2], half-open ranges of key indices of queries.
        total: float32 [B, T, L_c], added to in place by every layer: the sum over its heads.
    """

    rows: Tensor
    total: Tensor


@dataclass(frozen=True)
class LayerRouting:
    """Asks each layer to choose the visual tokens of every re-injection by its own attention.

    Attributes:
        ratio: share of a row's visual tokens to show.
        num_visual: int32 [B].
        rows: int32 [B, R, 2], for each re-injection the queries generated before it.
        max_visual: L_c.
    """

    ratio: float
    num_visual: Tensor
    rows: Tensor
    max_visual: int


def select_after(mass: Tensor, ratio: float, num_visual: Tensor, generated: Tensor) -> Tensor:
    """Visual tokens to show, all of them for a row that has generated nothing to rank them by.

    Args:
        mass: float32 [B, L_c].
        ratio: share to show, 0 to 1.
        num_visual: int32 [B].
        generated: bool [B], whether the row's mass holds anything.

    Returns:
        bool [B, L_c].
    """
    chosen = ops.select_visual_tokens(mass, ratio, num_visual)
    number = torch.arange(mass.shape[-1], device=mass.device)
    return torch.where(generated[:, None], chosen, number < num_visual[:, None])


@torch.no_grad()
def route_layer(
    query: Tensor,
    key: Tensor,
    context: VisualContext,
    routing: LayerRouting,
    keywords: dict[str, Any],
) -> VisualContext:
    """The context with this layer's own selection, one re-injection after the other.

    Args:
        query: [B, H_q, L, D], the layer's queries.
        key: [B, H_kv, L, D], the layer's keys.
        context: the re-injections, without a selection.
        routing: how to choose.
        keywords: scale, key_start and key_length of the attention.
    """
    batch, count = context.shift.shape
    selected = torch.zeros(batch, count, routing.max_visual, dtype=torch.bool, device=query.device)
    for number in range(count):
        earlier = replace(
            context,
            shift=context.shift[:, :number],
            start=context.start[:, :number],
            selected=selected[:, :number] if number else None,
        )
        rows = routing.rows[:, number : number + 1]
        mass = ops.visual_mass(query, key, earlier, rows.contiguous(), **keywords)
        mass = nn.functional.pad(mass, (0, routing.max_visual - mass.shape[-1]))
        generated = rows[:, 0, 1] > rows[:, 0, 0]
        chosen = select_after(mass[:, 0].sum(1), routing.ratio, routing.num_visual, generated)
        selected[:, number] = chosen
    return replace(context, selected=selected)
