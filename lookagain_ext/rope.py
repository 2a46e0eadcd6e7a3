"""Rotary embeddings of Hugging Face attention layers, and what else such layers may compute."""

from __future__ import annotations

import sys

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


def layer_frequencies(attention: nn.Module) -> tuple[Tensor, float]:
    """The inverse rotary frequencies of a Hugging Face attention layer.

    Args:
        attention: `self_attn` of a decoder layer, with its `head_dim`; without a `config`, base
            10000 is taken.

    Returns:
        (float32 [rotary_dim / 2], factor on cosines and sines).

    Raises:
        ValueError: if they change with the length, or are of a type unknown to transformers.
    """
    config, device = getattr(attention, "config", None), attention.q_proj.weight.device
    rope = getattr(config, "rope_parameters", None) or {}
    layer_type = getattr(attention, "layer_type", None)
    if layer_type in rope:
        rope = rope[layer_type] or {}
    else:
        layer_type = None
    kind = rope.get("rope_type", "default")
    if kind == "default":
        rotary_dim = int(attention.head_dim * rope.get("partial_rotary_factor", 1.0))
        return frequencies(rope.get("rope_theta", 10000.0), rotary_dim, device), 1.0
    if kind in _CHANGING or kind not in ROPE_INIT_FUNCTIONS:
        raise ValueError(
            f"rotary embeddings of type {kind!r} are not supported: known keys cannot be turned "
            "by frequencies that change with the length or are unknown"
        )
    inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config, device, layer_type=layer_type)
    return inv_freq.float(), factor


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
    return rotate is not None and rotate(torch.arange(4.0)).tolist() != [-2.0, -3.0, 0.0, 1.0]
