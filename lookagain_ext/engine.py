"""What the hooks do: read the tokens, keep the state of each sequence, hand keywords down.

The base model's hook sees `input_ids` and the cache, and decides; the decoder's hook sees the
embeddings and puts the keywords in, so that the vision tower never meets them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from .bookmark import Bookmark, known_length
from .cache import CACHE, is_ragged, make_ragged, set_reserve
from .cache_state import CacheStates, is_left_alone, limit_of
from .config import LookAgainConfig
from .layout import cached_starts, visual_layout
from .models import Family
from .packing import Packing
from .reencode import is_sharded
from .rollout import Rollout
from .sequence import read_sequence
from .sequence_forward import SequenceForward
from .trace import Trace


class _Plan(NamedTuple):
    """What the decoder's hook is to do in the forward that the base model's hook saw begin.

    Attributes:
        keywords: for the decoder.
        rollout: whose step it is.
        forward: what runs whole sequences.
        capture: who wants the prompt's embeddings.
        filled: (state, its cache, tokens in it afterwards, or None where the host does not know).
    """

    keywords: dict[str, Any]
    rollout: Rollout | None = None
    forward: SequenceForward | None = None
    capture: Rollout | None = None
    filled: tuple[Rollout, Any, int | None] | None = None


class _Call(threading.local):
    """What one hook leaves for the next, in each thread; a copy begins with nothing."""

    labels: Tensor | None = None
    plan: _Plan | None = None
    generating = False
    prompt_length: int | None = None
    """Tokens of the prompt while generate runs."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Call, ())


class Engine:
    """The working part of a session.

    Args:
        family: the model, with what is particular to it.
        config: how to look again, with `reflection_token_id` set.
    """

    def __init__(self, family: Family, config: LookAgainConfig) -> None:
        self.family = family
        self.config = config
        if config.backend == "reencode" and config.looks and is_sharded(family.decoder):
            raise ValueError(
                "backend='reencode' runs extra forwards for some rows only, which hangs when "
                "parameters are sharded; use backend='virtual' or 'append'"
            )
        self._states = CacheStates(family, config)
        self._call = _Call()
        self._latest: Rollout | SequenceForward | None = None

    def trace(self) -> Trace | None:
        """What happened in the latest sequence; None before the first."""
        return None if self._latest is None else self._latest.trace()

    def note_labels(self, keywords: dict[str, Any]) -> None:
        """Keep the labels that the model with the head was called with."""
        labels, shifted = keywords.get("labels"), keywords.get("shift_labels")
        if labels is None and shifted is not None:
            labels = torch.nn.functional.pad(shifted[:, :-1], (1, 0), value=-100)
        self._call.labels = labels

    def forget_labels(self) -> None:
        """After the forward of the model with the head, whether it returned or raised."""
        self._call.labels = None

    @contextmanager
    def generation(self, running: bool) -> Iterator[None]:
        """While generate runs in this thread, or within it something that is no part of it."""
        call = self._call
        before = call.generating, call.prompt_length
        call.generating, call.prompt_length = running, None
        try:
            yield
        finally:
            call.generating, call.prompt_length = before

    def begin_answer(self, prompt_length: int | None) -> None:
        """Note where the prompt of the running generation ends."""
        if self._call.generating:
            self._call.prompt_length = prompt_length

    def before_base(self, keywords: dict[str, Any]) -> dict[str, Any]:
        """Before the base model's forward: decide what this call is, and move its positions."""
        labels, self._call.labels = self._call.labels, None
        ids, cache = keywords.get("input_ids"), keywords.get(CACHE)
        if ids is None:
            raise ValueError("input_ids are needed to see reflections, got only inputs_embeds")
        if cache is None:
            return self._sequence(keywords, labels)
        if not isinstance(cache, Cache):
            raise ValueError(
                f"{CACHE} must be a cache of transformers' or a LookAgainCache, got "
                f"{type(cache).__name__}, which is not supported under look_again"
            )
        state, past = self._states.of(cache), cache.get_seq_length()
        alone = state is not None and ids.shape[1] == 1 and is_left_alone(state, cache, past)
        if not alone and int(past) == 0:
            if labels is not None:
                self._refuse_labels(cache)
                return self._sequence(keywords, labels)
            return self._prefill(keywords)
        if state is None:
            raise ValueError(
                f"{CACHE} was filled before look_again was in force: its reflections and "
                "images are unknown; start with an empty cache"
            )
        rollout = self._states.rollout_of(cache, state)
        if not alone:
            rollout = self._states.follow(rollout, cache)
        self._latest = rollout
        rows, batch = ids.shape[0], rollout.appended.shape[0]
        if rows != batch:
            raise ValueError(
                f"input_ids must have a row for each of the {batch} that {CACHE} holds, got {rows}"
            )
        generated = rollout.answering
        if generated is None:
            generated = self._call.prompt_length is None
        if ids.shape[1] == 1 and generated:
            return self._step(keywords, rollout)
        counted = labels is not None and (ids == self.config.reflection_token_id) & (labels != -100)
        if counted is not False and bool(counted.any()):
            raise ValueError(
                f"labels mark a reflection among several tokens given with a filled {CACHE}, where "
                "they are a prompt and none of them triggers: feed an answer token by token, or "
                f"give the whole sequence without a {CACHE}"
            )
        return self._continue(keywords, rollout)

    def _refuse_labels(self, cache: Any) -> None:  # noqa: ANN401 - any cache
        """Raise unless a forward of whole sequences can fill an empty cache."""
        real = self.config.backend != "virtual" and self.config.looks
        if real or limit_of(cache) > 0 or is_ragged(cache):
            raise ValueError(
                f"labels with {CACHE}={type(cache).__name__} and backend={self.config.backend!r} "
                f"are not supported: a forward with labels takes no {CACHE}, or with "
                "backend='virtual' an empty DynamicCache; without labels this is a prompt, in "
                "which nothing triggers"
            )

    def before_decoder(self, keywords: dict[str, Any]) -> dict[str, Any]:
        """Before the decoder's forward: put in what the attention needs."""
        plan, self._call.plan = self._call.plan, None
        if plan is None:
            return keywords
        if plan.capture is not None:
            plan.capture.keep_embeddings(keywords)
        if plan.forward is not None:
            # May call the decoder itself; those calls find no plan and pass through.
            keywords = plan.forward.prepare(keywords)
        else:
            keywords = {**keywords, **plan.keywords}
        self._call.plan = plan
        return keywords

    def after_decoder(self, output: Any) -> Any:  # noqa: ANN401 - a model output or a tuple
        """After the decoder's forward: take in the visual mass, give the output its old length."""
        plan, self._call.plan = self._call.plan, None
        if plan is None:
            return output
        if plan.forward is not None:
            output = plan.forward.finish(output)
            cache = getattr(output, CACHE, None)
            if cache is not None and len(cache):
                self._states.keep(cache, self._states.filled(plan.forward, cache))
        elif plan.rollout is not None:
            plan.rollout.finish_step()
        if plan.filled is not None:
            state, cache, length = plan.filled
            state.bookmark = None
            if not torch.compiler.is_compiling():
                state.bookmark = Bookmark(cache, length)
        return output

    def forget_plan(self) -> None:
        """After the base model's forward, whether it returned or raised."""
        self._call.plan = None

    def _step(self, keywords: dict[str, Any], rollout: Rollout) -> dict[str, Any]:
        """One generated token for each row."""
        cache, ids = keywords[CACHE], keywords["input_ids"]
        past, positions = cache.get_seq_length(), keywords.get("position_ids")
        rollout.check_mask(_plain_mask(keywords.get("attention_mask")), past)
        if positions is None:
            positions = self.family.positions(keywords, past)
        positions, extra = rollout.step(ids, _axes(positions), past, cache, self.family.decoder)
        self._call.plan = _Plan(extra, rollout, filled=(rollout, cache, _after(rollout, past)))
        return {**keywords, "position_ids": positions}

    def _prefill(self, keywords: dict[str, Any]) -> dict[str, Any]:
        """The prompt of a generation: nothing in it triggers."""
        ids, cache = keywords["input_ids"], keywords[CACHE]
        positions = keywords.get("position_ids")
        positions = _axes(self.family.positions(keywords) if positions is None else positions)
        mask = _seen_mask(keywords.get("attention_mask"), ids.shape[1])
        _refuse_packing(Packing.find(positions, mask, keywords.get("cu_seq_lens_q")))
        cached_starts(mask, ids.shape[1])
        layout = visual_layout(ids, positions, mask, self.family.visual_token_ids())
        self._prepare_cache(cache, layout.max_visual)
        rollout = self._states.open(layout, ids.shape[1], cache)
        rollout.prompt = (ids, positions[-3:])
        keywords = self._prompt_part(keywords, cache, rollout, positions, ids.shape[1])
        if not rollout.virtual and self.config.backend == "reencode":
            self._call.plan = self._call.plan._replace(capture=rollout)
        return keywords

    def _continue(self, keywords: dict[str, Any], rollout: Rollout) -> dict[str, Any]:
        """More prompt on a cache that holds some: a long prompt in chunks, or another turn."""
        ids, cache = keywords["input_ids"], keywords[CACHE]
        past = int(cache.get_seq_length())
        positions = keywords.get("position_ids")
        positions = _axes(self.family.positions(keywords, past) if positions is None else positions)
        count, total = ids.shape[1], past + ids.shape[1]
        mask = _plain_mask(keywords.get("attention_mask"))
        start = cached_starts(mask, total)
        visual = torch.tensor(self.family.visual_token_ids(), device=ids.device)
        # The last token of an answer is fed with what comes after it.
        hit = ids[:, 0] == self.config.reflection_token_id
        reflects = rollout.answering is True and bool(hit.any())
        reflected = reflects or bool(rollout.log.count.any())
        if bool(torch.isin(ids, visual).any()):
            if self.config.backend == "reencode" and self.config.looks:
                raise ValueError("backend='reencode' needs the whole prompt in one forward")
            if rollout.prompt is None or reflected:
                raise ValueError(
                    "a new image after a reflection needs a new generation: give the whole "
                    "conversation and an empty cache"
                )
            ids, whole = self._whole_prompt(rollout, ids, positions, past)
            mask = None if mask is None else mask[..., :total]
            layout = visual_layout(ids, whole, mask, self.family.visual_token_ids())
            self._prepare_cache(cache, layout.max_visual)
            rollout = self._states.open(layout, total, cache)
            rollout.prompt = (ids, whole)
        else:
            if reflects:
                decoder = self.family.decoder
                rollout.reflect(hit, positions[..., :1], past, cache, decoder)
            if rollout.prompt is not None and not reflected:
                rollout.prompt = self._whole_prompt(rollout, ids, positions, past)
            if mask is not None:  # a row may have been nothing but padding until now
                rollout.layout = replace(rollout.layout, key_start=start)
            rollout.restart(past + reflects, total)
            positions = positions + rollout.offset[-positions.shape[0] :]
        return self._prompt_part(keywords, cache, rollout, positions[..., -count:], total)

    @staticmethod
    def _whole_prompt(
        rollout: Rollout, ids: Tensor, positions: Tensor, past: int
    ) -> tuple[Tensor, Tensor]:
        """(ids, positions) of all prompts so far; answers between them are text of any kind."""
        old_ids, old_positions = rollout.prompt
        between = (past - old_ids.shape[1], 0)
        ids = torch.nn.functional.pad(ids, between, value=-1)
        positions = torch.nn.functional.pad(positions[-3:].expand(3, -1, -1), between)
        return torch.cat([old_ids, ids], dim=1), torch.cat([old_positions, positions], dim=-1)

    def _prompt_part(
        self,
        keywords: dict[str, Any],
        cache: Any,  # noqa: ANN401 - any cache
        rollout: Rollout,
        positions: Tensor,
        total: int,
    ) -> dict[str, Any]:
        self._states.keep(cache, rollout)
        self._latest = rollout
        prompt_length = self._call.prompt_length
        rollout.answering = None if prompt_length is None else total >= prompt_length
        extra: dict[str, Any] = {"key_start": rollout.layout.key_start}
        if limit_of(cache) > 0 or is_ragged(cache):
            batch = rollout.appended.shape[0]
            used = torch.full((batch,), total, dtype=torch.int32, device=positions.device)
            extra["key_length"] = used + rollout.appended
        earlier_turns = total > positions.shape[-1]
        if earlier_turns and rollout.virtual and self.config.looks:
            extra["visual_context"] = rollout.seen()
            extra["layer_selected"] = rollout.layer_selected
        self._call.plan = _Plan(extra, filled=(rollout, cache, total))
        return {**keywords, "position_ids": positions}

    def _sequence(self, keywords: dict[str, Any], labels: Tensor | None) -> dict[str, Any]:
        """A whole sequence without a cache: training, scoring, or a loop's first call."""
        ids, positions = keywords["input_ids"], keywords.get("position_ids")
        prompt_length = self._call.prompt_length
        if labels is None and prompt_length is not None:
            labels = ids.clone()  # generate without a cache: only what it wrote triggers
            labels[:, :prompt_length] = -100
        given = positions is not None
        if given and positions.dim() == 2:  # the text's, which tell where packed sequences begin
            positions = positions.expand(4, -1, -1)
        positions = _axes(positions if given else self.family.positions(keywords))
        mask = _seen_mask(keywords.get("attention_mask"), ids.shape[1])
        packing, real = Packing.find(positions, mask, keywords.get("cu_seq_lens_q")), None
        if keywords.get(CACHE) is not None:
            _refuse_packing(packing)
        if packing is None:
            real = None if mask is None else mask.to(ids.device) != 0
        else:
            mask, keywords = None, {**keywords, "attention_mask": None}
            ids, positions, real = packing.rows(ids, -1), packing.rows(positions), packing.real
            labels = None if labels is None else packing.rows(labels, -100)
        layout = visual_layout(ids, positions, mask, self.family.visual_token_ids())
        sequence = read_sequence(self.config, layout, ids, positions, labels, real)
        forward = SequenceForward(self.family, self.config, sequence, packing, mask)
        self._latest = forward
        self._call.plan = _Plan({}, forward=forward)
        if sequence.num_columns or given:
            keywords = {**keywords, "position_ids": forward.positions}
        return keywords

    def _prepare_cache(self, cache: Any, max_visual: int) -> None:  # noqa: ANN401 - any cache
        """Let a cache take re-injected rows where the backend writes them."""
        if self.config.backend == "virtual" or not self.config.looks:
            return
        if not is_ragged(cache):
            if type(cache) is not DynamicCache or cache.offloading or int(cache.get_seq_length()):
                offloading = " with offloading" if cache.offloading else ""
                raise ValueError(
                    f"backend={self.config.backend!r} writes rows into the cache and needs a "
                    f"LookAgainCache, got {type(cache).__name__}{offloading}"
                )
            make_ragged(cache, self.family.num_layers)
        set_reserve(cache, self.config.max_reinjections * max_visual)


def _refuse_packing(packing: Packing | None) -> None:
    if packing is not None:
        raise ValueError(
            f"packed sequences cannot be continued, so they take no {CACHE}: call the model "
            "without one, with use_cache=False, or generate from a batch with a row for each"
        )


def _axes(positions: Tensor) -> Tensor:
    """Positions with an axis for time, height and width: [P, B, L]."""
    return positions if positions.dim() == 3 else positions.expand(3, -1, -1)


def _after(rollout: Rollout, past: Tensor | int) -> int | None:
    """Tokens in a cache after a step, where the host knows."""
    known = None if torch.compiler.is_compiling() else known_length(past, rollout.bookmark)
    return None if known is None else known + 1


def _plain_mask(mask: Any) -> Tensor | None:  # noqa: ANN401 - a tensor or a dict
    """The mask as it was given, before transformers or `lookagain_mask` made it ready."""
    if isinstance(mask, dict):
        mask = next(iter(mask.values()))
    return mask[:, 0] if mask is not None and mask.dim() == 3 else mask


def _seen_mask(mask: Any, length: int) -> Tensor | None:  # noqa: ANN401 - a tensor or a dict
    """The two-dimensional mask over the first `length` tokens."""
    mask = _plain_mask(mask)
    return None if mask is None else mask[..., :length]
