"""One generation under look_again: device buffers of fixed shape, one update a step.

No Python branch depends on what the device holds, except on the CPU in eager mode, where a look
costs nothing, and for real cache rows, which are written only when a row asks. So a step traces
under `torch.compile(fullgraph=True)` and replays in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .bookmark import Bookmark
from .cache import is_ragged
from .config import LookAgainConfig
from .layer_routing import select_after
from .layout import VisualLayout, check_step_mask
from .record import AttentionRecord, Buffers, DecoderShape, ReflectionLog, put_
from .reencode import Reencoder
from .rollout_cache import FollowsCache
from .sequence import Sequence
from .trace import Trace
from .visual import NEVER, VisualContext


def is_unread(tensor: Tensor) -> bool:
    """Whether Python must not look at a tensor: it is traced, or that would wait for a device."""
    return torch.compiler.is_compiling() or tensor.device.type != "cpu"


class Rollout(FollowsCache):
    """State of one batch of sequences that are being generated.

    Args:
        config: how to look again, with `reflection_token_id` set.
        decoder: sizes and frequencies of the decoder.
        layout: the prompt's visual tokens.
        prompt_length: cached tokens when generation begins.
        max_steps: steps that the attention record holds at first.
        buffers: where tensors that change come from.

    Attributes:
        bookmark: the cache when it was last seen; None if that was within a compiled call.
        answering: whether the next token that is fed was generated: True after a step, or once
            generate has fed the whole prompt; False while it feeds that in parts; None where only
            the caller knows, when one token is taken for a generated one, and several are not.
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
        self._static = buffers.static
        self.bookmark: Bookmark | None = None
        self.answering: bool | None = None
        self._answers: list[tuple[int, int]] = []
        device, batch = layout.spans.device, layout.spans.shape[0]
        # Plus the tokens in the cache: a token's step, its key index, and they themselves.
        self._origin = buffers.zeros("origin", 3, batch)
        self._origin[0] = -prompt_length
        number = torch.arange(layout.max_visual, device=device)
        self._all_shown = number < layout.num_visual[:, None]
        # Row 0 leads from a position to a shift. Row 0 of position_ids numbers the text and stays.
        moves = torch.tensor([1, 0, 1, 1, 1], device=device)[:, None, None]
        self._extent = moves * layout.extent[:, None]
        self.offset = buffers.zeros("offset", 5, batch, 1)
        self.offset[0] -= layout.first_position[:, None]
        self.appended = buffers.zeros("appended", batch, dtype=torch.int32)
        self.context = layout.context(decoder.inv_freq)
        self.layer_selected: Tensor | None = None
        if self.virtual and config.looks:
            self._open_columns(buffers, batch)
        tracks = config.track_attention or config.routes
        self.log = ReflectionLog(buffers, batch, layout.max_visual, config.routes, tracks)
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
                config.routes and config.route_scope == "layer",
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
        self._columns = buffers.zeros("columns", 2, batch, again, dtype=torch.int32)
        self._columns[0] = NEVER
        selected = None
        if config.routes and config.route_scope == "layer":
            shape = (self.decoder.num_layers, batch, again, tokens)
            self.layer_selected = buffers.zeros("layer_selected", *shape, dtype=torch.bool)
        elif config.routes:
            selected = buffers.zeros("selected", batch, again, tokens, dtype=torch.bool)
        self.context = VisualContext(
            self.context.spans,
            self.context.inv_freq,
            self._columns[1],
            self._columns[0],
            selected,
        )

    def step(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        past: Tensor | int,
        cache: Any,  # noqa: ANN401 - any cache
        decoder: nn.Module,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Take in one generated token for each row, before its forward.

        Args:
            input_ids: int64 [B, 1].
            position_ids: int64 [3 or 4, B, 1], as generate counts them on.
            past: tokens in the cache, without re-injected ones.
            cache: the cache; its length and, for real rows, its keys and values.
            decoder: the text decoder, which reencode runs.

        Returns:
            (position_ids moved past the re-injected blocks, keywords for the attention).
        """
        self.answering = True
        hit = input_ids[:, -1] == self.config.reflection_token_id
        if is_unread(hit) or bool(hit.any()):
            self.reflect(hit, position_ids, past, cache, decoder)
        position_ids = position_ids + self.offset[-position_ids.shape[0] :]
        keywords: dict[str, Any] = {"key_start": self.layout.key_start}
        if is_ragged(cache):
            keywords["key_length"] = cache.layers[0].lengths + 1
        elif isinstance(past, Tensor):
            keywords["key_length"] = (past + 1).to(torch.int32).expand(hit.shape[0]).contiguous()
        if self.record is not None:
            keywords["visual_mass"] = self.record.begin(self._steps_before(past))
        if self.record is not None or (self.virtual and self.config.looks):
            keywords["visual_context"] = self.seen()
            if self.layer_selected is not None:
                keywords["layer_selected"] = self.layer_selected.unbind()
        return position_ids, keywords

    def check_mask(self, mask: Tensor | None, past: Tensor | int) -> None:
        """Refuse a mask that says something else of the cached tokens than is known of them.

        Where that would have to be waited for, a step goes by what the prompt's mask said.

        Raises:
            ValueError: see `check_step_mask`.
        """
        if mask is None:
            return
        if isinstance(past, Tensor):
            past = None if is_unread(past) else int(past)
        check_step_mask(mask, past, self.layout.key_start, not is_unread(mask))

    def seen(self) -> VisualContext:
        """The context of a step.

        The columns' views are made at each step, for a compiled one must not have inputs that
        overlap: it writes to `_columns`.
        """
        if not (self.virtual and self.config.looks):
            return self.context
        start, shift = self._columns.unbind()
        context = self.context
        return VisualContext(context.spans, context.inv_freq, shift, start, context.selected)

    def finish_step(self) -> None:
        """Take in the visual mass of the step's forward."""
        if self.record is not None:
            self.record.finish()

    def _steps_before(self, past: Tensor | int) -> Tensor | int:
        """Tokens generated and fed back before this one; int64 [1] where the host does not know."""
        return self._origin[0, :1] + past if isinstance(past, Tensor) else past - self.prompt_length

    def reflect(
        self,
        hit: Tensor,
        position_ids: Tensor,
        past: Tensor | int,
        cache: Any,  # noqa: ANN401 - any cache
        decoder: nn.Module,
    ) -> None:
        """Give the rows of `hit` their re-injection, and write it down.

        On a GPU this runs at every step, whether a row reflects or not: each operation counts.
        """
        config = self.config
        numbers = self._origin + past
        shift = position_ids[-1] + self.offset[0]
        place = self.log.places(hit)
        shown = by_layer = mass = None
        if config.routes:
            shown, by_layer = self._select(self._steps_before(past))
        if config.looks:
            # Rows without an image may look as well: there is nothing to see, and no extent.
            chosen, look = place, hit[:, None]
            if config.keep == "all":
                chosen = place[:, : config.max_reinjections]
                look = chosen.any(-1, keepdim=True)
            elif self.virtual:
                chosen = (self.log.count[:, None] % config.max_reinjections == self._column) & look
            if self.virtual:
                self._fill_column(chosen, numbers[2:], shift, shown, by_layer)
            else:
                slot = self._append(look[:, 0], shift[:, 0], shown, by_layer, cache, decoder)
                numbers = torch.stack([numbers[0], slot, numbers[2]])
            self.offset += self._extent * look
        if self.record is not None:
            mass = self.record.so_far()
        self.log.write(hit, place, torch.cat([numbers, shift.mT]), shown, mass)

    def _select(self, steps: Tensor | int) -> tuple[Tensor, Tensor | None]:
        """ROUTE's choice: (bool [B, L_c], bool [layers, B, L_c] when each layer has its own)."""
        ratio, counts = self.config.route_ratio, self.layout.num_visual
        total = self.record.total
        if self.record.lost:
            raise ValueError(
                "strategy='route' chooses by the attention of the answer so far, and the cache was "
                "cropped within the answer: what the tokens taken away had attended cannot be told "
                "from the rest. Crop to where the answer begins, or set track_attention=True, "
                "which keeps each token's (with route_scope='model')"
            )
        if self.record.by_layer:
            counts = counts.repeat(total.shape[0])
        if isinstance(steps, Tensor):
            chosen = select_after(total.flatten(0, -2), ratio, counts, steps > 0)
        elif steps > 0:
            chosen = ops.select_visual_tokens(total.flatten(0, -2), ratio, counts)
        else:
            chosen = self._all_shown.expand(total.shape)
        chosen = chosen.reshape(total.shape)
        return (chosen.any(0), chosen) if self.record.by_layer else (chosen, None)

    def _fill_column(
        self,
        chosen: Tensor,
        slot: Tensor,
        shift: Tensor,
        shown: Tensor | None,
        by_layer: Tensor | None,
    ) -> None:
        """Virtual: one more column of the context, in place; the oldest one's once all are used.

        Args:
            chosen: bool [B, R], the column of each row that looks.
            slot: int64 [1, B], key index.
            shift: int64 [B, 1].
            shown: bool [B, L_c] or None.
            by_layer: bool [layers, B, L_c] or None.
        """
        values = torch.cat([slot, shift.mT])[..., None]
        columns = torch.where(chosen, values, self._columns)
        if self._is_saved():
            self._columns = columns.int()
            self.context = replace(self.context, selected=_copied(self.context.selected))
            self.layer_selected = _copied(self.layer_selected)
        else:
            self._columns.copy_(columns)
        if by_layer is not None:
            put_(self.layer_selected, chosen[..., None], by_layer[:, :, None])
        elif self.context.selected is not None:
            put_(self.context.selected, chosen[..., None], shown[:, None])

    def _is_saved(self) -> bool:
        """Whether autograd may have saved the columns of earlier steps, which must stay then.

        With a static cache they are written in place: its own keys and values are, too.
        """
        return not torch.compiler.is_compiling() and not self._static and torch.is_grad_enabled()

    def _append(
        self,
        look: Tensor,
        shift: Tensor,
        shown: Tensor | None,
        by_layer: Tensor | None,
        cache: Any,  # noqa: ANN401 - a ragged cache
        decoder: nn.Module,
    ) -> Tensor:
        """Append or reencode: real cache rows; returns the slot of the next token, int64 [B]."""
        before = cache.layers[0].lengths.clone()
        look = look & (self.layout.num_visual > 0)
        shown = self._all_shown if shown is None else shown
        if torch.compiler.is_compiling() or bool(look.any()):
            if self.reencoder is not None:
                self.reencoder.write(decoder, cache, look, shift, shown)
            else:
                self._append_layers(look, shift, shown if by_layer is None else by_layer, cache)
            if self.record is not None:
                self._number_copies(look, before, shown if by_layer is None else by_layer)
        after = cache.layers[0].lengths
        self.appended += after - before
        return after.long()

    def _append_layers(self, look: Tensor, shift: Tensor, shown: Tensor, cache: Any) -> None:  # noqa: ANN401
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

    def keep_embeddings(self, keywords: dict[str, Any]) -> None:
        """Reencode: keep the prompt's visual embeddings, from what its forward was given."""
        self.reencoder = Reencoder(self.layout, self.prompt[1], keywords)

    def restart(self, past: int, prompt_length: int) -> None:
        """Begin another answer on the same cache: what was shown stays, attention counts anew.

        Args:
            past: tokens cached so far, the answer before among them.
            prompt_length: those when the new answer begins.
        """
        if past > self.prompt_length:
            self._answers.append((self.prompt_length, past))
        self._begin(prompt_length)

    def _begin(self, prompt_length: int) -> None:
        self.prompt_length = prompt_length
        self._origin[0] = -prompt_length
        if self.record is not None:
            self.record.restart()

    def take_over(
        self,
        sequence: Sequence,
        selected: Tensor | None,
        mass: Tensor | None,
        begun: Tensor | None,
    ) -> None:
        """Go on from a forward of whole sequences: its re-injections become these columns.

        Args:
            sequence: the forward's; the rollout was opened at the first token of its answers.
            selected: bool [B, N, L_c], or None when all tokens are shown.
            mass: float32 [B, N, L_c], mean attention before each re-injection, or None.
            begun: float32 [B, steps, L_c], attention of the answers so far, summed over layers and
                heads, or None where none counts.
        """
        self._origin[0] -= torch.tensor(
            [sequence.positions.shape[-1] - count - self.prompt_length for count in sequence.begun],
            device=self.offset.device,
        )
        if self.record is not None and begun is not None:
            self.record.carry(begun)
        device, batch = self.offset.device, self.offset.shape[1]
        columns = sequence.num_columns
        shift = torch.zeros(batch, max(map(len, sequence.hits)), dtype=torch.int64, device=device)
        shift[:, :columns] = sequence.shift
        for number in range(shift.shape[1]):
            index = [found[number] if number < len(found) else -1 for found in sequence.hits]
            index = torch.tensor(index, device=device)
            begins = [b[number] if number < len(b) else 0 for b in sequence.begins]
            numbers = torch.stack([index - torch.tensor(begins, device=device), index, index])
            hit, moved, shown = index >= 0, shift[:, number, None], None
            if number < columns:
                look = sequence.index[:, number, None] >= 0
                shown = None if selected is None else selected[:, number]
                chosen = self.log.count[:, None] % self.config.max_reinjections == self._column
                self._fill_column(chosen & look, numbers[2:], moved, shown, None)
                self.offset += self._extent * look
            before, steps = None, numbers[0][:, None]
            if mass is not None and number < columns:
                before = mass[:, number] * steps.clamp(min=1) / self.record.share
            elif begun is not None:
                # Of a reflection in an earlier answer it is not known.
                same = (numbers[1] - numbers[0] == self.prompt_length)[:, None]
                passed = torch.arange(begun.shape[1], device=device) < steps
                before = torch.where(same, (begun * passed[..., None]).sum(1), torch.nan)
            self.log.write(hit, self.log.places(hit), torch.cat([numbers, moved.mT]), shown, before)

    def trace(self) -> Trace:
        """Copy what happened so far to the host."""
        share = 1.0 if self.record is None else self.record.share
        reflections = self.log.read(self.layout.num_visual.tolist(), self.config, share)
        attention, every_token = (None, None) if self.record is None else self.record.read()
        return Trace(reflections, attention, every_token, self.layout.grids)


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()
