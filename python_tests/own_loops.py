"""Generation in loops of one's own: a prompt, steps, and what may be done to a cache between."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import IMAGE, REFLECTION
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from lookagain_ext.cache import CACHE, LookAgainCache

CACHES = ("dynamic", "static", "growing", "fixed")


def made(kind: str, model: nn.Module, length: int = 60) -> Any:
    """An empty cache of one of the four kinds."""
    if kind == "dynamic":
        return DynamicCache()
    if kind == "static":
        return StaticCache(model.config.text_config, max_cache_len=length)
    return LookAgainCache(2, max_length=length if kind == "fixed" else None, reserve=80)


def crop(cache: Any, count: int) -> None:
    """Take back the last `count` tokens; before 5.18 static layers could not."""
    for layer in cache.layers:
        if hasattr(layer, "crop"):
            layer.crop(-count)
        else:
            layer.cumulative_length.sub_(count)


class Loop:
    """A batch that is generated token by token.

    Attributes:
        cache: the cache, to do things to.
        mask: int64 [B, L].
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor], cache: Any) -> None:
        self.model = model
        self.cache = cache
        self.mask = inputs["attention_mask"]
        named = {n: x for n, x in inputs.items() if n not in ("pixel_values", "labels")}
        self.last = model.model.get_rope_index(**named)[0][:, :, -1].amax(0)
        self.logits = self._call(**inputs)

    def _call(self, **keywords: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(**keywords, **{CACHE: self.cache}).logits[:, -1]

    def feed(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] after `tokens` [B, n], which come in one call."""
        count = tokens.shape[1]
        self.mask = nn.functional.pad(self.mask, (0, count), value=1)
        positions = self.last[:, None] + 1 + torch.arange(count)
        self.last = positions[:, -1]
        return self._call(
            input_ids=tokens,
            attention_mask=self.mask,
            position_ids=positions.expand(3, -1, -1),
        )

    def steps(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] after each of `tokens` [B, T], one a call."""
        return torch.stack([self.feed(token) for token in tokens.split(1, dim=1)], dim=1)

    def crop(self, count: int) -> None:
        """Take back the last `count` tokens."""
        crop(self.cache, count)
        self.mask, self.last = self.mask[:, :-count], self.last - count

    def pick(self, rows: Tensor) -> None:
        """What belongs to the loop follows the rows of the cache."""
        self.mask, self.last = self.mask[rows], self.last[rows]


def drawn(batch: int, count: int, seed: int, reflections: float = 0.3) -> Tensor:
    """Tokens [B, T] of an answer, among them reflections."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(IMAGE + 4, 60, (batch, count), generator=generator)
    reflects = torch.rand(batch, count, generator=generator) < reflections
    return torch.where(reflects, REFLECTION, words)
