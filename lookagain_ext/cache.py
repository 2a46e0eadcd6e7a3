"""A key/value cache that is allocated once, written in place, and whose rows differ in length."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache, CacheLayerMixin

CACHE = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
"""The argument, and the field of an output, that holds a model's cache.

transformers 5.24 renamed `past_key_values` to `cache`, and takes both until 5.40.
"""


@contextmanager
def lasting() -> Iterator[None]:
    """Make tensors that may be written to later on, where inference mode may have ended.

    Not under torch.compile, in whose graphs the mode cannot change; what is written there exists.
    """
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(mode=False), torch.no_grad():
        yield


_GROWTH = 256
"""Slots that a growing cache adds at least, so that it seldom moves."""


def attention_dtype(states: Tensor) -> torch.dtype:
    """The dtype in which queries, keys or values take part in attention.

    Autocast's where it is on. Without this, rotary embedding would leave queries and keys in
    float32, and values in the lower precision.

    Args:
        states: of any shape; float64 stays as it is, as everywhere under autocast.
    """
    kind = states.device.type
    known = states.dtype != torch.float64 and torch.amp.is_autocast_available(kind)
    if known and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return states.dtype


class LookAgainLayer(CacheLayerMixin):
    """The keys and values of one decoder layer.

    Attributes:
        keys: [B, H_kv, capacity, D]; slots from `lengths[b]` on are unused.
        values: [B, H_kv, capacity, D].
        lengths: int32 [B], used slots of each row, left padding and re-injected rows included.
        seen: int64 [], tokens fed so far, re-injected rows not counted.
    """

    is_compileable = True
    is_croppable = True
    is_sliding = False

    def __init__(self, max_length: int | None, reserve: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.reserve = reserve
        self.is_compileable = max_length is not None
        self.tokens = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch, heads, dtype and device of the first keys and values."""
        self.dtype, self.device = attention_dtype(key_states), key_states.device
        batch, heads, new, size = key_states.shape
        capacity = self.max_length or new + _GROWTH
        shape = (batch, heads, capacity + self.reserve)
        made = {"dtype": self.dtype, "device": self.device}
        with lasting():
            self.keys = torch.zeros(*shape, size, **made)
            self.values = torch.zeros(*shape, value_states.shape[-1], **made)
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=self.device)
            self.seen = torch.zeros((), dtype=torch.int64, device=self.device)
            self.rows = torch.arange(batch, device=self.device)[:, None]
        if self.max_length is not None and not torch.compiler.is_compiling():
            for tensor in (self.keys, self.values, self.lengths, self.seen, self.rows):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *_: object,
        **__: object,
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values at the end of each row, in place.

        Args:
            key_states: [B, H_kv, n, D].
            value_states: [B, H_kv, n, D].

        Returns:
            (keys, values), each [B, H_kv, slots, D], with room for all that rows may hold: read
            `lengths` slots of each row.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        if self.max_length is None:
            self._make_room(new)
        elif self.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_room(new)
        slots = self.lengths[:, None] + torch.arange(new, device=self.device)
        for kept, states in ((self.keys, key_states), (self.values, value_states)):
            kept.transpose(1, 2)[self.rows, slots] = states.transpose(1, 2).to(self.dtype)
        self.lengths += new
        self.seen += new
        if self.max_length is None:
            used = self.tokens + self.reserve
            return self.keys[:, :, :used], self.values[:, :, :used]
        return self.keys, self.values

    def _make_room(self, new: int) -> None:
        self.tokens += new
        missing = self.tokens + self.reserve - self.keys.shape[2]
        if missing > 0:
            room = (0, 0, 0, max(missing, self.keys.shape[2] // 2, _GROWTH))
            with lasting():
                self.keys = torch.nn.functional.pad(self.keys, room)
                self.values = torch.nn.functional.pad(self.values, room)

    def _check_room(self, new: int) -> None:
        used, capacity = int(self.lengths.max()), self.keys.shape[2]
        if used + new > capacity:
            raise ValueError(
                f"the cache is full: {used} of {capacity} slots are used and {new} more are "
                "needed; make it with a larger max_length"
            )

    def get_seq_length(self) -> Tensor | int:
        """Tokens fed so far; re-injected rows do not count. A tensor when the size is fixed."""
        if not self.is_initialized:
            return 0
        return self.tokens if self.max_length is None else self.seen

    def get_max_length(self) -> int:
        """Tokens that fit besides the reserve, or -1 when the cache grows."""
        return -1 if self.max_length is None else self.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(slots, offset) for transformers' mask functions."""
        if self.is_initialized and self.max_length is not None:
            return self.keys.shape[2], 0
        return (self.max_length or self.tokens + query_length) + self.reserve, 0

    def reset(self) -> None:
        """Forget everything; the buffers stay."""
        if self.is_initialized:
            self.lengths.zero_()
            self.seen.zero_()
            self.tokens = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens away.

        Re-injected rows among them go as well when look_again next sees the cache, which knows
        where they are; the buffers stay.

        Args:
            tokens_to_remove: minus their number, as transformers' layers take it.

        Raises:
            ValueError: if it is positive, or there are fewer tokens.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                "tokens_to_remove must be minus the number of tokens to take away, got "
                f"{tokens_to_remove}"
            )
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        if -tokens_to_remove > int(self.get_seq_length()):
            raise ValueError(
                f"tokens_to_remove is {tokens_to_remove}, and the cache has only "
                f"{int(self.get_seq_length())} tokens"
            )
        self.tokens += tokens_to_remove if self.max_length is None else 0
        self.lengths += tokens_to_remove
        self.seen += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i become what row `beam_idx[i]` was."""
        self._pick(beam_idx.to(self.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        self._pick(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._pick(self.rows[:, 0].repeat_interleave(repeats))

    def _pick(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys[indices], self.values[indices]
            self.lengths = self.lengths[indices]
            self.rows = torch.arange(self.lengths.shape[0], device=self.device)[:, None]

    def row(self, number: int) -> LookAgainLayer:
        """A view of one row: what is written to it is written here."""
        view = LookAgainLayer(self.keys.shape[2], 0)
        view.dtype, view.device = self.dtype, self.device
        part = slice(number, number + 1)
        view.keys, view.values = self.keys[part], self.values[part]
        view.lengths, view.rows = self.lengths[part], self.rows[:1]
        view.seen = self.lengths[number].long()
        view.is_initialized = True
        return view


class LookAgainCache(Cache):
    """A cache for models that look again: preallocated, in place, each row with its own length.

    Give it to `generate` or to a model, as `cache` (`past_key_values` before transformers 5.24).
    With `max_length` it never moves, and `generate` can compile the decoder; without, it grows in
    steps.

    Args:
        num_layers: layers of the decoder.
        max_length: tokens that a row can hold, prompt and answer; None grows as needed.
        reserve: further slots for re-injected rows (`backend="append"` or "reencode");
            look_again raises it to max_reinjections times the visual tokens of the largest row. A
            cache with `max_length` that has been used cannot be raised: give it the reserve that
            its largest images will need.

    Raises:
        ValueError: if a size is not positive.
    """

    def __init__(self, num_layers: int, max_length: int | None = None, reserve: int = 0) -> None:
        for name, value, least in (
            ("num_layers", num_layers, 1),
            ("max_length", max_length, 1),
            ("reserve", reserve, 0),
        ):
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        super().__init__(layers=[LookAgainLayer(max_length, reserve) for _ in range(num_layers)])

    def set_reserve(self, reserve: int) -> None:
        """Reserve at least so many slots for re-injected rows.

        Raises:
            ValueError: if the cache has a `max_length` and was allocated with less.
        """
        set_reserve(self, reserve)

    def lengths(self) -> Tensor:
        """int32 [B], used slots of each row, re-injected rows included."""
        return self.layers[0].lengths

    def row(self, number: int) -> Cache:
        """A cache of one row that writes into this one; its tokens count as re-injected."""
        return row_of(self, number)


def is_ragged(cache: Any) -> bool:  # noqa: ANN401 - any cache
    """Whether the rows of a cache differ in length: a LookAgainCache, or one made into one."""
    return len(cache) > 0 and isinstance(cache.layers[0], LookAgainLayer)


def make_ragged(cache: Cache, num_layers: int) -> None:
    """Let an empty cache that grows hold rows that differ in length, as a LookAgainCache does.

    In place, so that the one whose cache it is finds it filled.
    """
    cache.layers[:] = [LookAgainLayer(None, 0) for _ in range(num_layers)]


def set_reserve(cache: Cache, reserve: int) -> None:
    """See `LookAgainCache.set_reserve`; of any ragged cache."""
    for layer in cache.layers:
        if reserve > layer.reserve and layer.is_initialized and layer.max_length is not None:
            raise ValueError(
                f"the cache was allocated with reserve={layer.reserve}, and {reserve} slots "
                f"are needed for re-injected rows; make a new one with reserve={reserve}"
            )
        layer.reserve = max(layer.reserve, reserve)


def row_of(cache: Cache, number: int) -> Cache:
    """See `LookAgainCache.row`; of any ragged cache."""
    return Cache(layers=[layer.row(number) for layer in cache.layers])
