"""The state that hangs on a cache: made with it, found again, kept in step with what is done to it.

A cache outlives calls, and a session; its owner may crop it and move its rows between them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bookmark import Bookmark
from .cache import CACHE, is_ragged
from .config import LookAgainConfig
from .layout import cached_starts, visual_layout
from .models import Family
from .record import Buffers, DecoderShape
from .rollout import Rollout
from .sequence import Sequence
from .sequence_forward import SequenceForward

_STATE = "_lookagain"
"""Attribute of a cache that holds the state of the sequences in it: it lives as long as they."""

_BUFFERS = "_lookagain_buffers"


class Filled(NamedTuple):
    """State of a cache that a forward of whole sequences has filled.

    Without that forward, which holds the model: a cache may be copied.
    """

    config: LookAgainConfig
    sequence: Sequence
    selected: Tensor | None
    mass: Tensor | None
    begun_mass: Tensor | None
    packed: bool
    padding_mask: Tensor | None
    bookmark: Bookmark


class CacheStates:
    """States of caches under one session.

    Args:
        family: the model.
        config: how to look again.
    """

    def __init__(self, family: Family, config: LookAgainConfig) -> None:
        self.family = family
        self.config = config

    @staticmethod
    def of(cache: Any) -> Rollout | Filled | None:  # noqa: ANN401 - any cache
        """The state on a cache, if there is one."""
        return getattr(cache, _STATE, None)

    @staticmethod
    def keep(cache: Any, state: Rollout | Filled) -> None:  # noqa: ANN401 - any cache
        """Hang a state on its cache."""
        setattr(cache, _STATE, state)

    def open(self, layout: Any, prompt_length: int, cache: Any) -> Rollout:  # noqa: ANN401
        """The state of sequences whose prompt is laid out so, at the beginning of their answers."""
        limit = limit_of(cache)
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

    def filled(self, forward: SequenceForward, cache: Any) -> Filled:  # noqa: ANN401 - any cache
        """What a later call needs of a forward of whole sequences that has filled a cache."""
        length = cache.get_seq_length()
        return Filled(
            self.config,
            forward.sequence,
            forward.selected,
            forward.mass,
            forward.begun_mass() if len(set(forward.sequence.begun)) == 1 else None,
            forward.packing is not None,
            forward.padding_mask,
            Bookmark(cache, None if isinstance(length, Tensor) else length),
        )

    def follow(self, rollout: Rollout, cache: Any) -> Rollout:  # noqa: ANN401 - any cache
        """Do to the state what was done to its cache since: rows picked, an end cut off."""
        mark, length = rollout.bookmark, int(cache.get_seq_length())
        rows = None if mark is None else mark.rows(cache)
        if rows is not None:
            rollout.pick(rows)
        known = None if mark is None else mark.length
        if known is not None and length > known:
            raise ValueError(
                f"{CACHE} has {length} tokens, and look_again saw only {known} of them being fed: "
                "their reflections are unknown; start with an empty cache"
            )
        rollout.bookmark = Bookmark(cache, length)
        if length == known:
            return rollout
        if known is not None:
            rollout.answering = None
        spans = rollout.layout.spans
        if not spans.numel() or int(spans.sum(-1).max()) <= length:
            rollout.rewind(length, cache)
            return rollout
        if rollout.prompt is None or rollout.reencoder is not None:
            reason = "after a forward without one" if rollout.prompt is None else "under 'reencode'"
            raise ValueError(
                f"{CACHE} was cropped to {length} tokens, within or before a picture, which is not "
                f"supported {reason}; start with an empty cache"
            )
        for layer in cache.layers if is_ragged(cache) else ():
            layer.lengths.fill_(length)
        ids, positions = (tensor[..., :length] for tensor in rollout.prompt)
        layout = visual_layout(ids, positions, None, self.family.visual_token_ids())
        layout = replace(layout, key_start=rollout.layout.key_start)
        rollout = self.open(layout, length, cache)
        rollout.prompt = (ids, positions)
        rollout.bookmark = Bookmark(cache, length)
        self.keep(cache, rollout)
        return rollout

    def rollout_of(self, cache: Any, state: Rollout | Filled) -> Rollout:  # noqa: ANN401
        """The state of a cache, made from the forward that filled it where need be."""
        if state.config is not self.config and state.config != self.config:
            raise ValueError(
                f"{CACHE} was filled under another configuration: "
                f"{_differences(state.config, self.config)}; start with an empty cache, or look "
                "again as before"
            )
        if isinstance(state, Filled):
            if state.packed:
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
            begun = self._begun_mass(state)
            tokens = sequence.positions.shape[-1]
            cached_starts(state.padding_mask, tokens)
            rollout = self.open(sequence.layout, tokens - max(sequence.begun), cache)
            rollout.take_over(sequence, state.selected, state.mass, begun)
            rollout.bookmark = state.bookmark
            self.keep(cache, rollout)
            state = rollout
        return state

    def _begun_mass(self, state: Filled) -> Tensor | None:
        """Attention of the answers that a forward of whole sequences ended in, where it counts."""
        begun = state.sequence.begun
        if not any(begun) or not (self.config.routes or self.config.track_attention):
            return None
        if len(set(begun)) > 1:
            raise ValueError(
                f"the answers in {CACHE} begin {', '.join(map(str, begun))} tokens before the end "
                "of its rows: where attention counts (strategy='route' or track_attention) a loop "
                "goes on only with answers that begin together; begin it with the prompts alone"
            )
        if state.begun_mass is None:
            raise ValueError(
                f"the attention of the {begun[0]} answer tokens in {CACHE} was not measured, since "
                "the call that filled it recorded gradients: call the model under torch.no_grad(), "
                "or begin the loop with the prompts alone"
            )
        return state.begun_mass


def _differences(before: LookAgainConfig, now: LookAgainConfig) -> str:
    """What each field that differs was and is, in words."""
    old, new = before.to_dict(), now.to_dict()
    changed = [name for name in old if old[name] != new[name]]
    return ", ".join(f"{name} was {old[name]!r} and is {new[name]!r}" for name in changed)


def limit_of(cache: Any) -> int:  # noqa: ANN401 - any cache
    """Tokens that a cache can hold, -1 when it grows."""
    return cache.get_max_length() if len(cache) else -1


def is_left_alone(state: Rollout | Filled, cache: Any, past: Tensor | int) -> bool:  # noqa: ANN401
    """Whether nothing was done to a cache since; taken to be so where finding out would wait."""
    if torch.compiler.is_compiling():
        return isinstance(past, Tensor) or past > 0
    return state.bookmark is not None and state.bookmark.is_current(cache)
