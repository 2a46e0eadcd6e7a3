"""Rotary embeddings of Hugging Face attention layers, and what else such layers may compute."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_NAMES = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
_SOFTCAPS = ("attn_logit_softcapping", "softcap")
_CHANGING = ("dynamic", "longrope")


def refuse_unknown_layer(attention: nn.Module) -> None:
    """Refuse a layer that computes anything beyond grouped-query attention with rotary positions.

    Args:
        attention: `self_attn` of a decoder layer.

    Raises:
        TypeError: if a projection is missing.
        ValueError: naming what it does besides: softcapping, attention sinks, sliding windows,
            layers without positions, interleaved rotary pairs, further parameters.
    """
    kind = type(attention).__name__
    wanted = ("q_proj", "k_proj", "v_proj", "o_proj")
    if missing := [name for name in wanted if not hasattr(attention, name)]:
        raise TypeError(f"{kind} has no {', '.join(missing)}")
    has = None
    if any(getattr(attention, name, None) is not None for name in _SOFTCAPS):
        has = "softcapping of the attention logits"
    elif getattr(attention, "sinks", None) is not None:
        has = "attention sinks"
    elif getattr(attention, "sliding_window", None):
        has = "sliding-window attention"
    elif not getattr(attention, "use_rope", True):
        has = "no rotary positions (use_rope is off)"
    elif _pairs_neighbours(attention):
        has = "rotary embeddings that turn neighbouring features as pairs (not the two halves)"
    elif further := {name.split(".")[0] for name, _ in attention.named_parameters()} - _NAMES:
        has = f"parameters that RoutedAttention does not know: {', '.join(sorted(further))}"
    if has is not None:
        raise ValueError(f"{kind} has {has}, which is not supported")


class RotaryLayer(NamedTuple):
    """What tells the rotary frequencies of a Hugging Face attention layer.

    Attributes:
        config: the decoder's; None where the layer has none.
        layer_type: which of a config's several rotary embeddings, or None.
        head_dim: D.
    """

    config: Any
    layer_type: str | None
    head_dim: int

    @classmethod
    def of(cls, attention: nn.Module) -> RotaryLayer:
        """Of `self_attn` of a decoder layer, with its `head_dim`."""
        config, layer_type = getattr(attention, "config", None), None
        if (kind := getattr(attention, "layer_type", None)) in _parameters(config):
            layer_type = kind
        return cls(config, layer_type, attention.head_dim)


def layer_frequencies(
    layer: RotaryLayer, device: torch.device | str | None
) -> tuple[Tensor, float]:
    """The inverse rotary frequencies of a Hugging Face attention layer.

    Args:
        layer: the layer's settings; without a `config`, base 10000 is taken.
        device: where to make them.

    Returns:
        (float32 [rotary_dim / 2], factor on cosines and sines).

    Raises:
        ValueError: if they change with the length, or are of a type unknown to transformers.
    """
    rope = _parameters(layer.config)
    if layer.layer_type is not None:
        rope = rope[layer.layer_type] or {}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        rotary_dim = int(layer.head_dim * rope.get("partial_rotary_factor", 1.0))
        return frequencies(rope.get("rope_theta", 10000.0), rotary_dim, device), 1.0
    if kind in _CHANGING or kind not in ROPE_INIT_FUNCTIONS:
        raise ValueError(
            f"rotary embeddings of type {kind!r} are not supported: known keys cannot be turned "
            "by frequencies that change with the length or are unknown"
        )
    make = ROPE_INIT_FUNCTIONS[kind]
    inv_freq, factor = make(layer.config, device, layer_type=layer.layer_type)
    return inv_freq.float(), factor


def _parameters(config: Any) -> dict[str, Any]:  # noqa: ANN401 - a class per family
    return getattr(config, "rope_parameters", None) or {}


def frequencies(theta: float, rotary_dim: int, device: torch.device | str | None) -> Tensor:
    """float32 [rotary_dim / 2], theta^(-2i / rotary_dim).

    Args:
        theta: base.
        rotary_dim: features that are turned.
        device: where to make them.
    """
    steps = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device)
    return theta ** (-steps / rotary_dim)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys turned to their positions, in the NeoX layout.

    Args:
        x: [..., D].
        cos: [..., rotary_dim], cosines; features past rotary_dim stay as they are.
        sin: [..., rotary_dim].
    """
    turned, rest = x.tensor_split([cos.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def _pairs_neighbours(attention: nn.Module) -> bool:
    """Whether the layer's own file turns features 0 and 1 as a pair, not 0 and D / 2."""
    rotate = getattr(sys.modules[type(attention).__module__], "rotate_half", None)
    return rotate is not None and rotate(torch.arange(4.0, device="cpu")).tolist() != [
        -2.0,
        -3.0,
        0.0,
        1.0,
    ]
