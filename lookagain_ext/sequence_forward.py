"""The decoder's forward of whole sequences, with every re-injection in place at once."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from .config import LookAgainConfig
from .layer_routing import (
    BackwardProbe,
    LayerRouting,
    MassProbe,
    ProbeFilled,
    last_attention,
    select_after,
)
from .models import Family
from .packing import Packing
from .reencode import Expansion, is_sharded
from .sequence import Sequence
from .trace import Trace
from .visual import VisualContext

_KEPT = (
    "inputs_embeds",
    "position_ids",
    "attention_mask",
    "visual_pos_masks",
    "deepstack_visual_embeds",
)
_NOT_PACKED: dict[str, Any] = {"cu_seq_lens_q": None}


class SequenceForward:
    """One forward of whole sequences under look_again.

    Args:
        family: the model.
        config: how to look again.
        sequence: the reflections in it.
        packing: where the rows of `sequence` lie in the batch, if it is packed.
        mask: [B, L], 0 on padding, or None.

    Attributes:
        positions: int64 [3 or 4, B, L], rotary positions moved past what is re-injected.
    """

    def __init__(
        self,
        family: Family,
        config: LookAgainConfig,
        sequence: Sequence,
        packing: Packing | None = None,
        mask: Tensor | None = None,
    ) -> None:
        self.padding_mask = mask
        self.family = family
        self.config = config
        self.sequence = sequence
        self.packing = packing
        positions = sequence.positions
        self.positions = positions if packing is None else packing.pack(positions)
        self.selected: Tensor | None = None
        self.mass: Tensor | None = None
        self.expansion: Expansion | None = None
        self.probe: MassProbe | None = None
        self.begun: MassProbe | None = None
        self.backward_probe: BackwardProbe | None = None

    def trace(self) -> Trace:
        """The reflections of the sequences, and where their attention went if it was tracked."""
        attention = answer = None
        heads = self.family.num_attention_heads
        if self.probe is not None:
            attention = (self.probe.total / (self.family.num_layers * heads)).cpu()
            answer = attention.sum(1)
        elif self.backward_probe is not None:
            answer = self.backward_probe.attention(heads)
        return self.sequence.trace(self.selected, self.mass, attention, answer)

    def prepare(self, keywords: dict[str, Any]) -> dict[str, Any]:
        """Keywords for the decoder, from those that the base model calls it with."""
        sequence, config = self.sequence, self.config
        extra = self._bounds()
        passes = self._agreed_passes()
        if passes:
            self._route(keywords, passes)
        # Re-encoded tokens have keys of their own.
        if config.track_attention and config.backend != "reencode":
            extra |= self._probe()
            extra["visual_context"] = sequence.context(self.family.inv_freq(), None, 0)
        elif self._continues(keywords):
            self.begun = MassProbe(sequence.last_answer(), self._total(max(sequence.begun)))
            extra["mass_probe"] = self.begun
            extra["visual_context"] = sequence.context(self.family.inv_freq(), None, 0)
        if not sequence.num_columns:
            return {**keywords, **extra}
        if config.routes and config.route_scope == "layer":
            extra["layer_routing"] = LayerRouting(
                config.route_ratio,
                sequence.layout.num_visual,
                sequence.rows,
                sequence.layout.max_visual,
            )
        if config.backend == "reencode":
            self.expansion = Expansion.of(sequence, self.selected, sequence.num_columns)
            return {**self.expansion.inputs(self._unpacked(keywords)), **extra, **_NOT_PACKED}
        extra["visual_context"] = sequence.context(
            self.family.inv_freq(), self.selected, sequence.num_columns
        )
        return {**keywords, **extra}

    def finish(self, output: Any) -> Any:  # noqa: ANN401 - a model output
        """The decoder's output, in the length of the sequence."""
        if self.expansion is None:
            return output
        expansion, self.expansion = self.expansion, None

        def restore(hidden: Tensor) -> Tensor:
            hidden = expansion.restore(hidden)
            return hidden if self.packing is None else self.packing.repack(hidden)

        output.last_hidden_state = restore(output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(map(restore, output.hidden_states))
        return output

    def _probe(self) -> dict[str, Any]:
        """Keywords that let every layer collect what it attends of the picture.

        With gradients in the backward: in the forward, a layer that is recomputed would count
        twice.
        """
        sequence, width = self.sequence, self.sequence.layout.max_visual
        if torch.is_grad_enabled():
            counted, packing = sequence.counted, self.packing
            queries = counted if packing is None else packing.pack(counted).flatten()[None]
            self.backward_probe = BackwardProbe(queries, len(counted), width)
            return {"backward_probe": self.backward_probe}
        rows = sequence.each_counted()
        self.probe = MassProbe(rows, self._total(rows.shape[1]))
        return {"mass_probe": self.probe}

    def _total(self, ranges: int) -> Tensor:
        sequence = self.sequence
        shape = (len(sequence.counted), ranges, sequence.layout.max_visual)
        return torch.zeros(shape, dtype=torch.float32, device=sequence.index.device)

    def _continues(self, keywords: dict[str, Any]) -> bool:
        """Whether a loop may go on by ROUTE with an answer that this forward ends in."""
        config = self.config
        routes = config.routes and config.route_scope == "model" and config.backend == "virtual"
        cached = keywords.get("use_cache") is not False and self.packing is None
        return routes and cached and any(self.sequence.begun) and not torch.is_grad_enabled()

    def begun_mass(self) -> Tensor | None:
        """Attention of each token of `sequence.begun`, which is the same for all rows.

        Returns:
            float32 [B, T, L_c], summed over layers and heads; None where it was not measured.
        """
        if self.probe is None:
            return None if self.begun is None else self.begun.total
        # Of the counted tokens of each row, which stand side by side, the last ones.
        steps, count = self.sequence.begun[0], self.sequence.counted.sum(1, keepdim=True)
        place = count - steps + torch.arange(steps, device=count.device)
        width = self.probe.total.shape[-1]
        return self.probe.total.gather(1, place[..., None].expand(-1, -1, width))

    def _bounds(self) -> dict[str, Any]:
        """Keywords that tell the attention where sequences begin."""
        if self.packing is None:
            return {"key_start": self.sequence.layout.key_start}
        return {"cu_seq_lens_q": self.packing.bounds}

    def _unpacked(self, keywords: dict[str, Any]) -> dict[str, Any]:
        return keywords if self.packing is None else self.packing.unpacked(keywords)

    def _agreed_passes(self) -> int:
        """Passes that ROUTE by the whole model needs: one for each re-injection.

        Processes that share parameters must run the same number: the largest any of them needs.
        """
        if not self.config.routes or self.config.route_scope != "model":
            return 0
        passes = self.sequence.num_columns
        if torch.distributed.is_initialized() and is_sharded(self.family.decoder):
            most = torch.tensor([passes], device=self.sequence.index.device)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            passes = int(most)
        return passes

    @torch.no_grad()
    def _route(self, keywords: dict[str, Any], passes: int) -> None:
        """Choose the tokens of each re-injection by a pass that has those before it.

        A pass ends at the last token that any row has before its re-injection.
        """
        sequence = self.sequence
        batch, columns = sequence.index.shape
        shape = (batch, columns, sequence.layout.max_visual)
        self.selected = torch.zeros(shape, dtype=torch.bool, device=sequence.index.device)
        self.mass = torch.zeros(shape, device=sequence.index.device)
        share = self.family.num_layers * self.family.num_attention_heads
        decoder = self.family.decoder
        last = None if is_sharded(decoder) else last_attention(decoder)
        for number in range(columns):
            rows = sequence.rows[:, number]
            count = (rows[:, 1] - rows[:, 0]).clamp(min=1)
            total = self._pass(keywords, number, int(rows[:, 1].max()), last)
            self.mass[:, number] = total / (share * count[:, None])
            self.selected[:, number] = select_after(
                total, self.config.route_ratio, sequence.layout.num_visual, rows[:, 1] > rows[:, 0]
            )
        for _ in range(passes - columns):
            self._decode(_kept(keywords))

    def _decode(self, kept: dict[str, Any], **extra: Any) -> None:  # noqa: ANN401 - as the decoder
        given = {**kept, "input_ids": None, "use_cache": False, **self._bounds(), **extra}
        with suppress(ProbeFilled):
            self.family.decoder(**given)

    def _pass(
        self, keywords: dict[str, Any], number: int, end: int, last: nn.Module | None
    ) -> Tensor:
        """float32 [B, L_c]: visual mass of the tokens before re-injection `number`."""
        sequence, inv_freq = self.sequence, self.family.inv_freq()
        kept = _kept(keywords)
        rows, fold = sequence.rows[:, number : number + 1].contiguous(), None
        extra: dict[str, Any] = {}
        if self.config.backend == "reencode":
            expansion = Expansion.of(sequence, self.selected, number)
            rows, fold = expansion.ranges(rows[:, 0]), expansion.fold
            context = VisualContext.from_spans(expansion.spans, inv_freq)
            kept, extra = expansion.inputs(self._unpacked(kept)), _NOT_PACKED
        else:
            selected = self.selected if number else None
            context = sequence.context(inv_freq, selected, number)
            kept = kept | {"position_ids": self.positions}
            if self.packing is None:
                kept = _shortened(kept, end)
        width = self.mass.shape[-1] if fold is None else fold.shape[-1]
        total = self.mass.new_zeros(*rows.shape[:2], width)
        probe = MassProbe(rows, total, last)
        self._decode(kept, visual_context=context, mass_probe=probe, **extra)
        total = total.sum(1)
        return (
            total if fold is None else torch.zeros_like(self.mass[:, 0]).scatter_add(1, fold, total)
        )


def _kept(keywords: dict[str, Any]) -> dict[str, Any]:
    """What a pass without gradient needs of the decoder's keywords."""
    kept = {name: keywords[name] for name in _KEPT if keywords.get(name) is not None}
    return kept | {"inputs_embeds": kept["inputs_embeds"].detach()}


def _shortened(keywords: dict[str, Any], end: int) -> dict[str, Any]:
    """The decoder's keywords for the first `end` tokens, which hold all visual ones."""
    names = ("inputs_embeds", "attention_mask", "visual_pos_masks")
    short = {name: value[:, :end] if name in names else value for name, value in keywords.items()}
    return {**short, "position_ids": keywords["position_ids"][..., :end]}
