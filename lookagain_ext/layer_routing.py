"""Attention of whole sequences on their visual tokens: measured, tracked, and ROUTE by it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks as _everywhere

from . import ops
from .visual import VisualContext


@dataclass
class MassProbe:
    """Collects visual mass over ranges of queries, during one forward of the whole sequence.

    Attributes:
        rows: int32 [B, T, 2], half-open ranges of key indices of queries.
        total: float32 [B, T, L_c], added to in place by every layer: the sum over its heads.
        last: the attention module after which nothing is left to collect and the forward is to
            end, by `ProbeFilled`; None lets it run to its end.
    """

    rows: Tensor
    total: Tensor
    last: nn.Module | None = None

    def ends_at(self, attention: nn.Module) -> bool:
        """Whether the forward is to end here. Never under torch.compile, which cannot raise."""
        return attention is self.last and not torch.compiler.is_compiling()

    def fill(self, query: Tensor, key: Tensor, context: VisualContext, **keywords: Any) -> NoReturn:  # noqa: ANN401
        """Add the last layer's mass, for which it needs no values, and end the forward.

        Raises:
            ProbeFilled: always.
        """
        self.total += ops.visual_mass(query, key, context, self.rows, **keywords).sum(2)
        raise ProbeFilled


class BackwardProbe:
    """Collects the visual mass of whole answers as the backward of each layer runs.

    A layer whose backward runs again counts its mean, so that one differentiated more often than
    others weighs no more.

    Not a dataclass: what wraps layers (FSDP) takes these apart and hands on a copy.

    Args:
        queries: bool [B, L], the queries that count; [1, B · L] of packed sequences.
        rows: B, or the number of packed sequences.
        width: L_c.

    Attributes:
        passes: of each layer's backward, by index.
    """

    def __init__(self, queries: Tensor, rows: int, width: int) -> None:
        self.passes: Counter[int] = Counter()
        self._queries = queries
        self._shape = (rows, width)
        self._totals: dict[int, Tensor] = {}

    def keywords(self, key: Tensor, layer: int) -> dict[str, Any]:
        """What lets a layer's `routed_attention` count in its backward, on the layer's device."""
        if layer not in self._totals:
            rows, width = self._shape
            shape = (rows, key.shape[1], width)
            self._totals[layer] = torch.zeros(shape, dtype=torch.float32, device=key.device)
        if self._queries.device != key.device:
            self._queries = self._queries.to(key.device)
        counting = {"visual_mass": self._totals[layer], "mass_queries": self._queries}
        return {**counting, "mass_in_backward": True}

    def watch(self, out: Tensor, layer: int) -> None:
        """Note the layer when a gradient reaches its attention's output."""
        if out.requires_grad:
            out.register_hook(lambda _: self.passes.update((layer,)))

    def attention(self, heads: int) -> Tensor | None:
        """Mean over `heads` and over the layers whose backward ran; None before any did.

        Returns:
            float32 [B, L_c] on the CPU, summed over the counted queries; this waits for the device.
        """
        if not self.passes:
            return None
        means = [self._totals[layer].sum(1).cpu() / n for layer, n in self.passes.items()]
        return torch.stack(means).mean(0) / heads


class ProbeFilled(Exception):  # noqa: N818 - nothing went wrong
    """Ends a forward whose output nobody wants, from within its last layer's attention."""


def last_attention(decoder: nn.Module) -> nn.Module | None:
    """The attention module in which a forward of the decoder may end early.

    None where it must not, since something waits for a module to return: hooks of accelerate, which
    then move its parameters away, or a user's own. Sharded parameters are the caller's to ask for.
    """
    layer = decoder.layers[-1]
    attention = layer.self_attn
    if sum(each is layer for each in decoder.layers) > 1:
        return None
    path = next(name for name, each in decoder.named_modules() if each is attention).split(".")
    entered = [decoder.get_submodule(".".join(path[:depth])) for depth in range(len(path) + 1)]
    ours = __name__.partition(".")[0] + "."
    for module in entered:
        hooks = [*module._forward_hooks.values(), *_everywhere.values()]
        foreign = any(not getattr(hook, "__module__", "").startswith(ours) for hook in hooks)
        if foreign or hasattr(module, "_hf_hook"):
            return None
    return attention


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
