"""One generation under look_again: device buffers of fixed shape, one update a step.

No Python branch depends on what the device holds, except on the CPU in eager mode, where a look
costs nothing, and for real cache rows, which are written only when a row asks. So a step traces
under `torch.compile(fullgraph=True)` and replays in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .cache import LookAgainCache
from .config import LookAgainConfig
from .layer_routing import select_after
from .layout import VisualLayout
from .record import AttentionRecord, Buffers, DecoderShape, ReflectionLog
from .reencode import Reencoder
from .sequence import Sequence
from .trace import Trace
from .visual import NEVER, VisualContext


class Rollout:
    """State of one batch of sequences that are being generated.

    Args:
        config: how to look again, with `reflection_token_id` set.
        decoder: sizes and frequencies of the decoder.
        layout: the prompt's visual tokens.
        prompt_length: cached tokens when generation begins.
        max_steps: steps that the attention record holds at first.
        buffers: where tensors that change come from.
    """

    def __init__(
        self,
        config: LookAgainConfig,
        decoder: DecoderShape,
        layout: VisualLayout,
        prompt_length: int,
        max_steps: int,
        buffers: Buffers,
    ) -> None:
        self.config = config
        self.decoder = decoder
        self.layout = layout
        self.virtual = config.backend == "virtual" or not config.looks
        self.prompt: tuple[Tensor, Tensor] | None = None
        self.prompt_length = prompt_length
        self.reencoder: Reencoder | None = None
        device, batch = layout.spans.device, layout.spans.shape[0]
        self._prompt_length = buffers.full("prompt_length", (), prompt_length, torch.int64)
        self._token = torch.tensor(config.reflection_token_id, device=device)
        self._can_look = layout.num_visual > 0
        number = torch.arange(layout.max_visual, device=device)
        self._all_shown = number < layout.num_visual[:, None]
        # Row 0 of position_ids numbers the text and stays as it is.
        self._axis_moves = torch.tensor([0, 1, 1, 1], device=device)[:, None, None]
        self.offset = buffers.zeros("offset", 4, batch, 1)
        self.appended = buffers.zeros("appended", batch, dtype=torch.int32)
        self.context = layout.context(decoder.inv_freq)
        self.layer_selected: Tensor | None = None
        if self.virtual and config.looks:
            self._open_columns(buffers, batch)
        tracks = config.track_attention or config.routes
        self.log = ReflectionLog(buffers, batch, layout.max_visual, tracks)
        self.record: AttentionRecord | None = None
        if tracks:
            copies = 0 if self.virtual else config.max_reinjections
            self.record = AttentionRecord(
                buffers,
                decoder,
                batch,
                layout.max_visual,
                copies,
                max_steps,
                config.track_attention,
            )
        if self.record is not None and not self.virtual:
            spans = buffers.zeros(
                "spans", batch, layout.spans.shape[1] + copies, 2, dtype=torch.int32
            )
            spans[:, : layout.spans.shape[1]] = layout.spans
            self.context = VisualContext.from_spans(spans, decoder.inv_freq)
            self._numbered = buffers.zeros("numbered", batch)
            self._numbered += layout.num_visual

    def _open_columns(self, buffers: Buffers, batch: int) -> None:
        """Empty re-injection columns, filled in place as rows reflect."""
        config, tokens, again = self.config, self.layout.max_visual, self.config.max_reinjections
        self._column = torch.arange(again, device=self.offset.device)
        selected = None
        if config.routes and config.route_scope == "layer":
            shape = (self.decoder.num_layers, batch, again, tokens)
            self.layer_selected = buffers.zeros("layer_selected", *shape, dtype=torch.bool)
        elif config.routes:
            selected = buffers.zeros("selected", batch, again, tokens, dtype=torch.bool)
        self.context = VisualContext(
            self.context.spans,
            self.context.inv_freq,
            buffers.zeros("shift", batch, again, dtype=torch.int32),
            buffers.full("start", (batch, again), NEVER, torch.int32),
            selected,
        )

    def step(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        past: Tensor | int,
        cache: Any,  # noqa: ANN401 - any cache
    ) -> tuple[Tensor, dict[str, Any]]:
        """Take in one generated token for each row, before its forward.

        Args:
            input_ids: int64 [B, 1].
            position_ids: int64 [3 or 4, B, 1], as generate counts them on.
            past: tokens in the cache, without re-injected ones.
            cache: the cache; its length and, for real rows, its keys and values.

        Returns:
            (position_ids moved past the re-injected blocks, keywords for the attention).
        """
        hit = input_ids[:, -1] == self._token
        if torch.compiler.is_compiling() or hit.device.type != "cpu" or bool(hit.any()):
            position = position_ids[-1, :, -1] + self.offset[-1, :, 0]
            self._reflect(hit, position, past, cache)
        position_ids = position_ids + self.offset[-position_ids.shape[0] :]
        keywords: dict[str, Any] = {"key_start": self.layout.key_start}
        if isinstance(cache, LookAgainCache):
            keywords["key_length"] = cache.lengths() + 1
        elif isinstance(past, Tensor):
            keywords["key_length"] = (past + 1).to(torch.int32).expand(hit.shape[0]).contiguous()
        if self.record is not None:
            host = None if isinstance(past, Tensor) else past - self.prompt_length
            keywords["visual_mass"] = self.record.begin(self._steps_before(past), host)
        if self.record is not None or (self.virtual and self.config.looks):
            keywords["visual_context"] = self.context
            keywords["layer_selected"] = self.layer_selected
        return position_ids, keywords

    def finish_step(self) -> None:
        """Take in the visual mass of the step's forward."""
        if self.record is not None:
            self.record.finish()

    def _steps_before(self, past: Tensor | int) -> Tensor:
        """int64 [1], tokens generated and fed back before this one."""
        if isinstance(past, Tensor):
            return (past - self._prompt_length).reshape(1)
        return torch.tensor([past - self.prompt_length], device=self.offset.device)

    def _reflect(self, hit: Tensor, position: Tensor, past: Tensor | int, cache: Any) -> None:  # noqa: ANN401
        """Give the rows of `hit` their re-injection, and write it down."""
        config, layout = self.config, self.layout
        look = hit & self._can_look
        if not config.looks:
            look = torch.zeros_like(look)
        elif config.keep == "all":
            look = look & (self.log.count < config.max_reinjections)
        shift, steps = position - layout.first_position, self._steps_before(past)
        slot = past + torch.zeros_like(shift)
        shown, by_layer = self._all_shown, None
        if config.routes:
            shown, by_layer = self._select((steps > 0).expand(hit.shape[0]))
        if self.virtual and config.looks:
            self._fill_column(look, shift, slot, shown, by_layer)
        elif config.looks:
            slot = self._append(look, shift, shown, by_layer, cache)
        self.offset += torch.where(look, layout.extent, 0)[:, None] * self._axis_moves
        self.log.write(
            hit,
            shown & look[:, None],
            None if self.record is None else self.record.mean(steps),
            step=steps.expand(hit.shape[0]),
            key_index=slot,
            shift=shift,
            looked=look,
        )

    def _select(self, generated: Tensor) -> tuple[Tensor, Tensor | None]:
        """ROUTE's choice: (bool [B, L_c], bool [layers, B, L_c] when each layer has its own)."""
        ratio, counts = self.config.route_ratio, self.layout.num_visual
        total = self.record.total
        if self.config.route_scope == "model":
            return select_after(total.sum(0), ratio, counts, generated), None
        layers = total.shape[0]
        counts, generated = counts.repeat(layers), generated.repeat(layers)
        chosen = select_after(total.flatten(0, 1), ratio, counts, generated).view(total.shape)
        return chosen.any(0), chosen

    def _fill_column(
        self, look: Tensor, shift: Tensor, slot: Tensor, shown: Tensor, by_layer: Tensor | None
    ) -> None:
        """Virtual: one more column of the context, in place; the oldest one's once all are used."""
        chosen = (self.log.count % self.config.max_reinjections)[:, None] == self._column
        chosen = chosen & look[:, None]
        context = self.context
        context.shift.copy_(torch.where(chosen, shift[:, None].int(), context.shift))
        context.start.copy_(torch.where(chosen, slot[:, None].int(), context.start))
        if context.selected is not None:
            context.selected.copy_(torch.where(chosen[..., None], shown[:, None], context.selected))
        if by_layer is not None:
            self.layer_selected.copy_(
                torch.where(chosen[..., None], by_layer[:, :, None], self.layer_selected)
            )

    def _append(
        self,
        look: Tensor,
        shift: Tensor,
        shown: Tensor,
        by_layer: Tensor | None,
        cache: LookAgainCache,
    ) -> Tensor:
        """Append or reencode: real cache rows; returns the slot of the next token, int64 [B]."""
        before = cache.lengths().clone()
        if torch.compiler.is_compiling() or bool(look.any()):
            if self.reencoder is not None:
                self.reencoder.write(cache, look, shift, shown)
            else:
                self._append_layers(look, shift, shown if by_layer is None else by_layer, cache)
        after = cache.lengths()
        self.appended += after - before
        if self.record is not None:
            self._number_copies(look, before, shown if by_layer is None else by_layer)
        return after.long()

    def _append_layers(
        self, look: Tensor, shift: Tensor, shown: Tensor, cache: LookAgainCache
    ) -> None:
        for number, layer in enumerate(cache.layers):
            selected = shown if shown.dim() == 2 else shown[number]
            ops.append_visual_(
                layer.keys,
                layer.values,
                layer.lengths,
                self.layout.spans,
                shift.int(),
                self.decoder.inv_freq,
                selected=selected if self.config.routes else None,
                rows=look,
            )

    def _number_copies(self, rows: Tensor, first: Tensor, shown: Tensor) -> None:
        """Let the copies from slot `first` on count as visual tokens, each as its original."""
        chosen = shown if shown.dim() == 2 else shown[0]
        count = torch.where(rows, chosen.sum(-1), 0)
        spans, runs = self.context.spans, self.layout.spans.shape[1]
        used = runs + self.log.count.clamp(max=self.config.max_reinjections - 1)
        place = torch.arange(spans.shape[1], device=spans.device) == used[:, None]
        place = (place & rows[:, None])[..., None]
        spans.copy_(torch.where(place, torch.stack([first, count.int()], -1)[:, None], spans))
        self.record.fold_copies(self._numbered, count, shown)
        self._numbered += count

    def keep_embeddings(self, decoder: nn.Module, keywords: dict[str, Any]) -> None:
        """Reencode: keep the prompt's visual embeddings, from what its forward was given."""
        self.reencoder = Reencoder(decoder, self.layout, self.prompt[1], keywords)

    def restart(self, prompt_length: int) -> None:
        """Begin another answer on the same cache: what was shown stays, attention counts anew."""
        self.prompt_length = prompt_length
        self._prompt_length.fill_(prompt_length)
        if self.record is not None:
            self.record.restart()

    def take_over(self, sequence: Sequence, selected: Tensor | None) -> None:
        """Go on from a forward of whole sequences: its re-injections become these columns."""
        device, batch = self.offset.device, self.offset.shape[1]
        columns = sequence.num_columns
        shift = torch.zeros(batch, max(map(len, sequence.hits)), dtype=torch.int64, device=device)
        shift[:, :columns] = sequence.shift
        for number in range(shift.shape[1]):
            index = [found[number] if number < len(found) else -1 for found in sequence.hits]
            index = torch.tensor(index, device=device)
            steps = [b[number] if number < len(b) else 0 for b in sequence.begins]
            look = torch.zeros_like(index, dtype=torch.bool)
            shown = self._all_shown
            if number < columns:
                look = sequence.index[:, number] >= 0
                shown = shown if selected is None else selected[:, number]
                self._fill_column(look, shift[:, number], index, shown, None)
            self.offset += torch.where(look, self.layout.extent, 0)[:, None] * self._axis_moves
            self.log.write(
                index >= 0,
                shown & look[:, None],
                step=index - torch.tensor(steps, device=device),
                key_index=index,
                shift=shift[:, number],
                looked=look,
            )

    def trace(self) -> Trace:
        """Copy what happened so far to the host."""
        reflections = self.log.read(self.layout.num_visual.tolist(), self.config.looks)
        attention, every_token = (None, None) if self.record is None else self.record.read()
        return Trace(reflections, attention, every_token, self.layout.grids)
