"""What the hooks do: read the tokens, keep the state of each sequence, hand keywords down.

The base model's hook sees `input_ids` and the cache, and decides; the decoder's hook sees the
embeddings and puts the keywords in, so that the vision tower never meets them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .cache import CACHE, LookAgainCache
from .config import LookAgainConfig
from .layout import key_starts, visual_layout
from .models import Family
from .packing import Packing
from .record import Buffers, DecoderShape
from .reencode import is_sharded
from .rollout import Rollout
from .sequence import read_sequence
from .sequence_forward import SequenceForward
from .trace import Trace

_STATE = "_lookagain"
"""Attribute of a cache that holds the state of the sequences in it: it lives as long as they."""

_BUFFERS = "_lookagain_buffers"


class _Plan(NamedTuple):
    """What the decoder's hook is to do in the forward that the base model's hook saw begin."""

    keywords: dict[str, Any]
    rollout: Rollout | None = None
    forward: SequenceForward | None = None
    capture: Rollout | None = None


class Engine:
    """The working part of a session.

    Args:
        family: the model, with what is particular to it.
        config: how to look again, with `reflection_token_id` set.

    Attributes:
        prompt_length: tokens of the prompt while generate runs, else None.
    """

    def __init__(self, family: Family, config: LookAgainConfig) -> None:
        self.family = family
        self.config = config
        self.prompt_length: int | None = None
        if config.backend == "reencode" and config.looks and is_sharded(family.decoder):
            raise ValueError(
                "backend='reencode' runs extra forwards for some rows only, which hangs when "
                "parameters are sharded; use backend='virtual' or 'append'"
            )
        self._labels: Tensor | None = None
        self._plan: _Plan | None = None
        self._latest: Rollout | SequenceForward | None = None

    def trace(self) -> Trace | None:
        """What happened in the latest sequence; None before the first."""
        return None if self._latest is None else self._latest.trace()

    def note_labels(self, keywords: dict[str, Any]) -> None:
        """Keep the labels that the model with the head was called with."""
        self._labels = keywords.get("labels")
        shifted = keywords.get("shift_labels")
        if self._labels is None and shifted is not None:
            self._labels = torch.nn.functional.pad(shifted[:, :-1], (1, 0), value=-100)

    def before_base(self, keywords: dict[str, Any]) -> dict[str, Any]:
        """Before the base model's forward: decide what this call is, and move its positions."""
        labels, self._labels = self._labels, None
        ids, cache = keywords.get("input_ids"), keywords.get(CACHE)
        if ids is None:
            raise ValueError("input_ids are needed to see reflections, got only inputs_embeds")
        state = getattr(cache, _STATE, None)
        if cache is None:
            return self._sequence(keywords, labels)
        if state is not None and ids.shape[1] == 1:
            return self._step(keywords, self._rollout_of(cache, state))
        if int(cache.get_seq_length()) == 0:
            return self._prefill(keywords)
        if state is None:
            raise ValueError(
                f"{CACHE} was filled before look_again was in force: its reflections and "
                "images are unknown; start with an empty cache"
            )
        return self._continue(keywords, self._rollout_of(cache, state))

    def before_decoder(self, keywords: dict[str, Any]) -> dict[str, Any]:
        """Before the decoder's forward: put in what the attention needs."""
        plan, self._plan = self._plan, None
        if plan is None:
            return keywords
        if plan.capture is not None:
            plan.capture.keep_embeddings(self.family.decoder, keywords)
        if plan.forward is not None:
            # May call the decoder itself; those calls find no plan and pass through.
            keywords = plan.forward.prepare(keywords)
        else:
            keywords = {**keywords, **plan.keywords}
        self._plan = plan
        return keywords

    def after_decoder(self, output: Any) -> Any:  # noqa: ANN401 - a model output or a tuple
        """After the decoder's forward: take in the visual mass, give the output its old length."""
        plan, self._plan = self._plan, None
        if plan is None:
            return output
        if plan.forward is not None:
            output = plan.forward.finish(output)
            cache = getattr(output, CACHE, None)
            if cache is not None:
                setattr(cache, _STATE, plan.forward)
        elif plan.rollout is not None:
            plan.rollout.finish_step()
        return output

    def forget_plan(self) -> None:
        """After the base model's forward, whether it returned or raised."""
        self._plan = None

    def _step(self, keywords: dict[str, Any], rollout: Rollout) -> dict[str, Any]:
        """One generated token for each row."""
        cache = keywords[CACHE]
        past, positions = cache.get_seq_length(), keywords.get("position_ids")
        if positions is None:
            positions = self.family.positions(keywords, past)
        positions, extra = rollout.step(keywords["input_ids"], _axes(positions), past, cache)
        self._plan = _Plan(extra, rollout)
        return {**keywords, "position_ids": positions}

    def _prefill(self, keywords: dict[str, Any]) -> dict[str, Any]:
        """The prompt of a generation: nothing in it triggers."""
        ids, cache = keywords["input_ids"], keywords[CACHE]
        positions = keywords.get("position_ids")
        positions = _axes(self.family.positions(keywords) if positions is None else positions)
        mask = _seen_mask(keywords.get("attention_mask"), ids.shape[1])
        if Packing.find(positions, mask, keywords.get("cu_seq_lens_q")) is not None:
            raise ValueError(
                f"packed sequences cannot be continued, so they take no {CACHE}: call the model "
                "without one, with use_cache=False, or generate from a batch with a row for each"
            )
        layout = visual_layout(ids, positions, mask, self.family.visual_token_ids())
        cache = self._own_cache(cache, layout.max_visual)
        rollout = self._open(layout, ids.shape[1], cache)
        rollout.prompt = (ids, positions)
        keywords = self._prompt_part(keywords, cache, rollout, positions, ids.shape[1])
        if not rollout.virtual and self.config.backend == "reencode":
            self._plan = self._plan._replace(capture=rollout)
        return keywords

    def _continue(self, keywords: dict[str, Any], rollout: Rollout) -> dict[str, Any]:
        """More prompt on a cache that holds some: a long prompt in chunks, or another turn."""
        ids, cache = keywords["input_ids"], keywords[CACHE]
        past = int(cache.get_seq_length())
        positions = keywords.get("position_ids")
        positions = _axes(self.family.positions(keywords, past) if positions is None else positions)
        visual = torch.tensor(self.family.visual_token_ids(), device=ids.device)
        if bool(torch.isin(ids, visual).any()):
            if self.config.backend == "reencode" and self.config.looks:
                raise ValueError("backend='reencode' needs the whole prompt in one forward")
            if rollout.prompt is None or bool(rollout.log.count.any()):
                raise ValueError(
                    "a new image after a reflection needs a new generation: give the whole "
                    "conversation and an empty cache"
                )
            old_ids, old_positions = rollout.prompt
            ids = torch.cat([old_ids, ids], dim=1)
            positions = positions.expand(old_positions.shape[0], -1, -1)
            whole = torch.cat([old_positions, positions], dim=-1)
            mask = _seen_mask(keywords.get("attention_mask"), ids.shape[1])
            layout = visual_layout(ids, whole, mask, self.family.visual_token_ids())
            cache = self._own_cache(cache, layout.max_visual)
            rollout = self._open(layout, ids.shape[1], cache)
            rollout.prompt = (ids, whole)
        else:
            if rollout.prompt is not None and not bool(rollout.log.count.any()):
                old_ids, old_positions = rollout.prompt
                more = positions.expand(old_positions.shape[0], -1, -1)
                rollout.prompt = (
                    torch.cat([old_ids, ids], dim=1),
                    torch.cat([old_positions, more], dim=-1),
                )
            mask = _seen_mask(keywords.get("attention_mask"), past + ids.shape[1])
            if mask is not None:  # a row may have been nothing but padding until now
                rollout.layout = replace(rollout.layout, key_start=key_starts(mask))
            rollout.restart(past + ids.shape[1])
            positions = positions + rollout.offset[-positions.shape[0] :]
        count = keywords["input_ids"].shape[1]
        return self._prompt_part(keywords, cache, rollout, positions, past + count)

    def _prompt_part(
        self,
        keywords: dict[str, Any],
        cache: Any,  # noqa: ANN401 - any cache
        rollout: Rollout,
        positions: Tensor,
        total: int,
    ) -> dict[str, Any]:
        setattr(cache, _STATE, rollout)
        self._latest = rollout
        extra: dict[str, Any] = {"key_start": rollout.layout.key_start}
        if _limit(cache) > 0 or isinstance(cache, LookAgainCache):
            batch = rollout.appended.shape[0]
            used = torch.full((batch,), total, dtype=torch.int32, device=positions.device)
            extra["key_length"] = used + rollout.appended
        earlier_turns = total > positions.shape[-1]
        if earlier_turns and rollout.virtual and self.config.looks:
            extra["visual_context"] = rollout.context
            extra["layer_selected"] = rollout.layer_selected
        self._plan = _Plan(extra)
        return {**keywords, "position_ids": positions, CACHE: cache}

    def _sequence(self, keywords: dict[str, Any], labels: Tensor | None) -> dict[str, Any]:
        """A whole sequence without a cache: training, scoring, or a loop's first call."""
        ids, positions = keywords["input_ids"], keywords.get("position_ids")
        if labels is None and self.prompt_length is not None:
            labels = ids.clone()  # generate without a cache: only what it wrote triggers
            labels[:, : self.prompt_length] = -100
        given = positions is not None
        if given and positions.dim() == 2:  # the text's, which tell where packed sequences begin
            positions = positions.expand(4, -1, -1)
        positions = _axes(positions if given else self.family.positions(keywords))
        mask = _seen_mask(keywords.get("attention_mask"), ids.shape[1])
        packing, real = Packing.find(positions, mask, keywords.get("cu_seq_lens_q")), None
        if packing is None:
            real = None if mask is None else mask.to(ids.device) != 0
        else:
            mask, keywords = None, {**keywords, "attention_mask": None}
            ids, positions, real = packing.rows(ids, -1), packing.rows(positions), packing.real
            labels = None if labels is None else packing.rows(labels, -100)
        layout = visual_layout(ids, positions, mask, self.family.visual_token_ids())
        sequence = read_sequence(self.config, layout, ids, positions, labels, real)
        forward = SequenceForward(self.family, self.config, sequence, packing)
        self._latest = forward
        self._plan = _Plan({}, forward=forward)
        if sequence.num_columns or given:
            keywords = {**keywords, "position_ids": forward.positions}
        return keywords

    def _open(self, layout: Any, prompt_length: int, cache: Any) -> Rollout:  # noqa: ANN401
        limit = _limit(cache)
        steps = limit - prompt_length + 1 if limit > 0 else 128
        buffers = getattr(cache, _BUFFERS, None)
        if buffers is None:
            buffers = Buffers(layout.spans.device, static=limit > 0)
            if limit > 0:
                setattr(cache, _BUFFERS, buffers)
        return Rollout(self.config, self._shape(), layout, prompt_length, max(steps, 1), buffers)

    def _shape(self) -> DecoderShape:
        family = self.family
        return DecoderShape(
            family.num_layers,
            family.num_attention_heads,
            family.num_key_value_heads,
            family.inv_freq(),
        )

    def _own_cache(self, cache: Any, max_visual: int) -> Any:  # noqa: ANN401 - any cache
        """A cache that can take re-injected rows, in place of generate's empty default."""
        if self.config.backend == "virtual" or not self.config.looks:
            return cache
        if not isinstance(cache, LookAgainCache):
            if type(cache) is not DynamicCache:
                raise ValueError(
                    f"backend={self.config.backend!r} writes rows into the cache and needs a "
                    f"LookAgainCache, got {type(cache).__name__}"
                )
            cache = LookAgainCache(self.family.num_layers)
        cache.set_reserve(self.config.max_reinjections * max_visual)
        return cache

    def _rollout_of(self, cache: Any, state: Rollout | SequenceForward) -> Rollout:  # noqa: ANN401
        """The state of a cache, made from the forward that filled it where need be."""
        if state.config is not self.config and state.config != self.config:
            raise ValueError(
                f"{CACHE} was filled under another configuration: "
                f"{_differences(state.config, self.config)}; start with an empty cache, or look "
                "again as before"
            )
        if isinstance(state, SequenceForward):
            if state.packing is not None:
                raise ValueError(
                    f"{CACHE} holds packed sequences, which cannot be continued: generate from a "
                    "batch with a row for each"
                )
            if self.config.backend != "virtual" and self.config.looks:
                raise ValueError(
                    f"backend={self.config.backend!r} needs its own cache from the first call on: "
                    f"pass {CACHE}=LookAgainCache(...) with the prompt"
                )
            if self.config.routes and self.config.route_scope == "layer":
                raise ValueError(
                    "route_scope='layer' needs a cache from the first call on: pass "
                    f"{CACHE}=DynamicCache() with the prompt"
                )
            sequence = state.sequence
            rollout = self._open(sequence.layout, sequence.positions.shape[-1], cache)
            rollout.take_over(sequence, state.selected)
            setattr(cache, _STATE, rollout)
            state = rollout
        self._latest = state
        return state


def _differences(before: LookAgainConfig, now: LookAgainConfig) -> str:
    """What each field that differs was and is, in words."""
    old, new = before.to_dict(), now.to_dict()
    changed = [name for name in old if old[name] != new[name]]
    return ", ".join(f"{name} was {old[name]!r} and is {new[name]!r}" for name in changed)


def _limit(cache: Any) -> int:  # noqa: ANN401 - any cache
    """Tokens that a cache can hold, -1 when it grows."""
    return cache.get_max_length() if len(cache) else -1


def _axes(positions: Tensor) -> Tensor:
    """Positions with an axis for time, height and width: [P, B, L]."""
    return positions if positions.dim() == 3 else positions.expand(3, -1, -1)


def _seen_mask(mask: Any, length: int) -> Tensor | None:  # noqa: ANN401 - a tensor or a dict
    """The two-dimensional mask over the first `length` tokens."""
    if isinstance(mask, dict):
        mask = next(iter(mask.values()))
    if mask is not None and mask.dim() == 3:  # made by `lookagain_mask`
        mask = mask[:, 0]
    return None if mask is None else mask[..., :length]
