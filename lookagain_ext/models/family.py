"""What look_again must know about a model, with the answers that Qwen's families share."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..cache import CACHE


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT, DistributedDataParallel or torch.compile wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


class Family:
    """One family of vision-language models, bound to one model.

    A subclass names its `model_types` and overrides what differs.

    Args:
        model: the `…ForConditionalGeneration`, unwrapped.

    Raises:
        ValueError: if the model has something that re-injection cannot express (sliding windows,
            rotary frequencies that change with the length).
    """

    model_types: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config = model.config
        self._check()

    @property
    def base(self) -> nn.Module:
        """The multimodal model without its head: it sees `input_ids` and the cache."""
        return self.model.model

    @property
    def decoder(self) -> nn.Module:
        """The text decoder, called by `base` with embeddings."""
        return self.base.language_model

    @property
    def text_config(self) -> Any:  # noqa: ANN401 - a class per family
        """The decoder's configuration."""
        return self.config.text_config

    @property
    def num_layers(self) -> int:
        """Layers of the decoder."""
        return self.text_config.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        """Query heads of each layer."""
        return self.text_config.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Key heads of each layer."""
        return self.text_config.num_key_value_heads

    def visual_token_ids(self) -> tuple[int, ...]:
        """Ids of the placeholders that visual features replace."""
        names = ("image_token_id", "video_token_id")
        ids = (getattr(self.config, name, None) for name in names)
        return tuple(number for number in ids if number is not None)

    def check_token(self, name: str, number: int) -> None:
        """Refuse a token that the model can never write.

        Raises:
            ValueError: if it is not in the vocabulary, or is a placeholder of visual tokens, by
                the `name` of what holds it.
        """
        rows = getattr(self.model.get_input_embeddings(), "num_embeddings", 0)
        size = max(self.text_config.vocab_size, rows)
        if number >= size:
            raise ValueError(
                f"{name} {number} is not in the model's vocabulary of {size}: it would never be "
                "written; lookagain_ext.add_reflection_tokens(model, tokenizer) makes room"
            )
        if number in self.visual_token_ids():
            raise ValueError(
                f"{name} {number} is the model's placeholder of images or videos, which it never "
                "writes; give the id of a token of its own"
            )

    def inv_freq(self) -> Tensor:
        """float32 [rotary_dim / 2], the decoder's inverse rotary frequencies."""
        return self.decoder.rotary_emb.inv_freq.float()

    def positions(self, inputs: dict[str, Any], past: Tensor | int = 0) -> Tensor:
        """Rotary positions that the model would compute for inputs that come without them.

        Args:
            inputs: keyword arguments of the base model's forward, with `input_ids` [B, L].
            past: tokens already cached.

        Returns:
            int64 [3, B, L]: time, height and width.

        Raises:
            ValueError: if there are visual tokens but no `mm_token_type_ids`: the model would
                silently fall back to one-dimensional positions.
        """
        ids = inputs["input_ids"]
        if int(past) == 0 and inputs.get("mm_token_type_ids") is None:
            wanted = torch.tensor(self.visual_token_ids(), device=ids.device)
            if torch.isin(ids, wanted).any():
                raise ValueError(
                    "mm_token_type_ids is missing: without it the model gives visual tokens plain "
                    "text positions. Pass what the processor returns."
                )
        names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids")
        known = {name: inputs[name] for name in names if inputs.get(name) is not None}
        positions = self.base.compute_3d_position_ids(
            input_ids=ids,
            inputs_embeds=ids.new_empty(*ids.shape, 0),
            attention_mask=inputs.get("attention_mask"),
            image_grid_thw=known.pop("image_grid_thw", None),
            video_grid_thw=known.pop("video_grid_thw", None),
            **{CACHE: inputs.get(CACHE), **known},
        )
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device) + past
            positions = positions.expand(3, ids.shape[0], -1)
        # With a cache and a mask, the model counts the whole mask.
        return positions[..., -ids.shape[1] :]

    def _check(self) -> None:
        config = self.text_config
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            raise ValueError("model uses sliding-window attention, which is not supported")
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type", "default") in ("dynamic", "longrope"):
            raise ValueError(
                f"model uses {rope['rope_type']!r} rotary embeddings, whose frequencies change "
                "with the length; cached keys cannot be turned to new positions"
            )
