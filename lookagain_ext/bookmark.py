"""What a cache looked like when it was last seen, to notice what has been done to it since.

A cache is its owner's: it may be cropped, reset, and its rows reordered, picked or repeated between
two calls. Nothing here waits for a device while a cache is left alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer

from .cache import LookAgainLayer

_KNOWN = (DynamicLayer, StaticLayer, LookAgainLayer)
"""Layers whose `keys` are all their keys, in the order of the rows."""


class Bookmark:
    """The length and the keys of a cache's first layer.

    Args:
        cache: any cache, after a forward.
        length: tokens in it, None where the host does not know.

    Attributes:
        length: the same.
    """

    def __init__(self, cache: Any, length: int | None) -> None:  # noqa: ANN401 - any cache
        self.length = length
        self._keys = _keys(cache)
        self._version = _version(cache)

    def is_current(self, cache: Any) -> bool:  # noqa: ANN401 - any cache
        """Whether a cache was left alone, as far as can be told without waiting for its device."""
        if self._keys is not _keys(cache):
            return False
        length = cache.get_seq_length()
        if isinstance(length, Tensor) and not is_host(length):
            return self.length is not None and self._version == _version(cache)
        return self.length == int(length)

    def rows(self, cache: Any) -> list[int] | None:  # noqa: ANN401 - any cache
        """Which row each row of a cache was before; None if they are what they were.

        Rows are known again by their keys: a row that is not there twice is found wherever it went,
        and of equal ones it does not matter which is which.

        Raises:
            ValueError: if a row was not there before, or the cache keeps its keys in another form.
        """
        new, old = _keys(cache), self._keys
        if new is old or new is None or old is None:
            return None
        if type(cache.layers[0]) not in _KNOWN:
            raise ValueError(
                f"the rows of a {type(cache).__name__} with {type(cache.layers[0]).__name__}s were "
                "changed, which look_again cannot follow: use a DynamicCache, StaticCache or "
                "LookAgainCache, or start with an empty cache"
            )
        used = min(new.shape[2], old.shape[2])
        if new.shape[1] == old.shape[1] and new.shape[3] == old.shape[3]:
            old = old[:, :, :used].to(new)
            found = [_find(row[:, :used], old, number) for number, row in enumerate(new)]
            if None not in found:
                return None if found == list(range(old.shape[0])) else found
        raise ValueError(
            "the keys in the cache are not those that were put there under look_again: its rows "
            "can be reordered, selected and repeated, and its end cropped; for anything else "
            "start with an empty cache"
        )


def is_host(length: Tensor) -> bool:
    """Whether a counter can be read without waiting for a device."""
    return length.device.type == "cpu"


def known_length(length: Tensor | int, mark: Bookmark | None) -> int | None:
    """Tokens in a cache that was left alone since `mark`, where the host knows.

    Args:
        length: what `get_seq_length` says, a tensor when the cache has a fixed size.
        mark: the cache when it was last seen.
    """
    if not isinstance(length, Tensor) or is_host(length):
        return int(length)
    return None if mark is None else mark.length


def _find(row: Tensor, rows: Tensor, first: int) -> int | None:
    """Which of some rows is like this one; `first` is tried before the others."""
    order = [number for number in range(len(rows)) if number != first]
    order = [first, *order] if first < len(rows) else order
    return next((number for number in order if torch.equal(row, rows[number])), None)


def _keys(cache: Any) -> Tensor | None:  # noqa: ANN401 - any cache
    """The first layer's keys; None where they move between devices all the time."""
    if not len(cache) or getattr(cache, "offloading", False):
        return None
    return getattr(cache.layers[0], "keys", None)


def _version(cache: Any) -> int | None:  # noqa: ANN401 - any cache
    """How often the counter of a cache of fixed size was written to."""
    length = cache.get_seq_length()
    if not isinstance(length, Tensor) or length.is_inference():
        return None
    return length._version
