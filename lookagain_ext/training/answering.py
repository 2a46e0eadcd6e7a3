"""A vision-language model that answers batches of questions, looking again as it does."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ..generation import LookAgainConfig, look_again
from ..template import hidden_tokens
from .records import Record


class ModelAnswerer:
    """Answers of a model, tags kept; the same for the same batch, whenever it is asked.

    Args:
        model: in evaluation mode.
        processor: its processor; its tokenizer is made to pad on the left.
        config: what a reflection shows; None leaves the model as it is, tags or not.
        max_new_tokens: the longest answer; one that is cut off leaves the template.
        temperature: 0 takes the likeliest token each time.
        seed: of the sampling.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,  # noqa: ANN401 - of any family
        config: LookAgainConfig | None,
        *,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        if max_new_tokens < 1 or not 0 <= temperature < float("inf"):
            raise ValueError(
                "max_new_tokens must be at least 1 and temperature at least 0, "
                f"got {max_new_tokens} and {temperature}"
            )
        self._model = model
        self._processor = processor
        self._config = config
        self._seed = seed
        self._options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        self._options |= sampling
        processor.tokenizer.padding_side = "left"

    @torch.no_grad()
    def __call__(self, records: Sequence[Record], number: int) -> list[str]:
        """The answers to ``records``, of which the first is number ``number`` of its set."""
        template = self._processor.apply_chat_template
        text = [
            template(one.prompt(), tokenize=False, add_generation_prompt=True) for one in records
        ]
        images = [one.image for one in records]
        inputs = self._processor(images=images, text=text, padding=True, return_tensors="pt")
        inputs = inputs.to(self._model.device)
        tokenizer = self._processor.tokenizer
        torch.manual_seed((self._seed * 1_000_003 + number) % 2**63)
        looking = nullcontext()
        if self._config is not None:
            looking = look_again(self._model, self._config, tokenizer=tokenizer)
        with looking:
            output = self._model.generate(**inputs, **self._options)
        hidden = hidden_tokens(tokenizer)
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [tokenizer.decode([i for i in row if i not in hidden]).strip() for row in rows]
