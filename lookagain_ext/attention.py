"""Attention that sees visual tokens again: a function for transformers, a module for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache

from . import ops
from .cache import LookAgainLayer, attention_dtype
from .layer_routing import BackwardProbe, LayerRouting, MassProbe, route_layer
from .layout import key_starts
from .rope import RotaryLayer, frequencies, layer_frequencies, refuse_unknown_layer, turn
from .visual import VisualContext, is_traced

ATTENTION_NAME = "lookagain"
"""Name under which `lookagain_attention` is registered with transformers."""


def lookagain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    visual_context: VisualContext | None = None,
    layer_selected: Sequence[Tensor] | Tensor | None = None,
    layer_routing: LayerRouting | None = None,
    key_start: Tensor | None = None,
    key_length: Tensor | None = None,
    visual_mass: Sequence[Tensor] | Tensor | None = None,
    mass_probe: MassProbe | None = None,
    backward_probe: BackwardProbe | None = None,
    cu_seq_lens_q: Tensor | Sequence[int] | None = None,
    cache_position: Tensor | None = None,
    sliding_window: int | None = None,
    **_: Any,  # noqa: ANN401 - every model passes keywords of its own
) -> tuple[Tensor, None]:
    """The attention function that transformers calls under the name "lookagain".

    Under autocast, queries, keys and values are brought to its dtype, as by PyTorch's own attention
    functions.

    Args:
        module: the attention module; only its `layer_idx` is read.
        query: [B, H_q, L_q, D], rotary embedding applied.
        key: [B, H_kv, L_k, D], as the cache returned it.
        value: [B, H_kv, L_k, D].
        attention_mask: None, [B, L] (0 on padding), what `lookagain_mask` makes, or
            [B, 1, L_q, L_k]; only the padding and the keys in use are read from it, and only when
            neither `key_start` nor `key_length` is given.
        scaling: factor on the logits; default 1 / sqrt(D).
        dropout: must be 0.
        visual_context: visual tokens and their re-injections.
        layer_selected: bool [B, R, L_c] of each layer, replaces the context's selection by this
            layer's.
        layer_routing: chooses the selection inside this layer (full forward).
        key_start: int32 [B], first key of each row.
        key_length: int32 [B], keys of each row. By default what the mask tells, else
            `cache_position`, else L_k: a buffer with room to spare, given with nothing that tells
            how much of it is used, is taken to be full.
        visual_mass: float32 [B, H_kv, L_c] of each layer, or this layer's alone; added to in place.
        mass_probe: collects visual mass over ranges of queries.
        backward_probe: collects it in the backward, in place of `visual_mass`; a layer that is
            compiled is not counted.
        cu_seq_lens_q: [S + 1], bounds of sequences packed without padding into the B · L tokens,
            under transformers' name for them; what has a row for each of B otherwise has one for
            each sequence then. As a tuple of int, no layer waits for a device to read it.
        cache_position: int [L_q], key indices of the queries, as older models pass it.
        sliding_window: must be None.

    Returns:
        (out [B, L_q, H_q, D], None): there are no attention weights.

    Raises:
        ValueError: if dropout or a sliding window is asked for, or a mask that can be read has
            holes, or rows that begin at different keys (packed sequences, windows).
    """
    if dropout:
        raise ValueError(f"attention dropout is not supported, got {dropout}; set it to 0")
    if sliding_window is not None:
        raise ValueError(f"sliding windows are not supported, got sliding_window={sliding_window}")
    kind = query.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        query, key, value = (states.to(attention_dtype(states)) for states in (query, key, value))
    if key_start is None and key_length is None and attention_mask is not None:
        key_start, key_length = _bounds(attention_mask, query.shape[2], key.shape[2])
    if key_length is None and cache_position is not None and query.shape[2] < key.shape[2]:
        key_length = (cache_position[-1:] + 1).to(torch.int32).expand(query.shape[0]).contiguous()
    if layer_selected is not None:
        visual_context = replace(visual_context, selected=layer_selected[module.layer_idx])
    keywords = {"scale": scaling, "key_start": key_start, "key_length": key_length}
    batch = query.shape[0]
    if cu_seq_lens_q is not None:
        keywords["cu_seqlens"] = cu_seq_lens_q
        query, key, value = (_one_row(states) for states in (query, key, value))
    if layer_routing is not None:
        visual_context = route_layer(query, key, visual_context, layer_routing, keywords)
    if mass_probe is not None and mass_probe.ends_at(module):
        mass_probe.fill(query, key, visual_context, **keywords)
    mass = visual_mass
    if mass is not None and not (isinstance(mass, Tensor) and mass.dim() == 3):
        mass = mass[module.layer_idx]
    if backward_probe is not None and not is_traced(query, key, value):
        counting = backward_probe.keywords(key, module.layer_idx)
        out = ops.routed_attention(query, key, value, visual_context, **counting, **keywords)
        backward_probe.watch(out, module.layer_idx)
    elif mass_probe is None:
        out = ops.routed_attention(query, key, value, visual_context, visual_mass=mass, **keywords)
    else:
        out, lse = ops.routed_attention(
            query, key, value, visual_context, visual_mass=mass, return_lse=True, **keywords
        )
        found = ops.visual_mass(query, key, visual_context, mass_probe.rows, lse=lse, **keywords)
        mass_probe.total += found.sum(2)
    out = out.transpose(1, 2)
    return out if cu_seq_lens_q is None else out.unflatten(1, (batch, -1)).flatten(0, 1), None


def lookagain_mask(
    *,
    kv_length: int,
    batch_size: int = 1,
    q_length: int = 0,
    q_offset: Tensor | int = 0,
    kv_offset: Tensor | int = 0,
    attention_mask: Tensor | None = None,
    device: torch.device | str | None = None,
    **_: Any,  # noqa: ANN401
) -> Tensor | None:
    """The mask function registered under "lookagain": hands on what is padding and what is used.

    The kernels make the causal mask themselves. They need to know the padding, and how much of a
    cache of fixed size is in use; the shape then is that of the cache at every step.

    Args:
        kv_length: slots of the key cache.
        batch_size: rows B.
        q_length: tokens that are fed.
        q_offset: tokens in the cache before them; a tensor when its size is fixed.
        kv_offset: first key that the cache still holds.
        attention_mask: [B, L], 0 on padding, or None.
        device: of the mask, where there is none yet.

    Returns:
        The mask as it came when all slots are in use, None included. Else bool [B, 2, kv_length]:
        what is no padding, and what is in use.

    Raises:
        ValueError: if the cache is a sliding one, or a mask on the CPU has holes.
    """
    if not isinstance(kv_offset, Tensor) and kv_offset:
        raise ValueError("sliding-window caches are not supported: use a DynamicCache()")
    if attention_mask is not None and attention_mask.dim() != 2:
        return attention_mask
    if _is_read(attention_mask):
        key_starts(attention_mask)  # refuses holes
    if not isinstance(q_offset, Tensor) and kv_length <= q_offset + q_length:
        return attention_mask
    if attention_mask is not None:
        batch_size, device = attention_mask.shape[0], attention_mask.device
    if isinstance(q_offset, Tensor):
        device = q_offset.device if device is None else device
    used = torch.arange(kv_length, device=device) < q_offset + q_length
    used = used.expand(batch_size, -1)
    real = used if attention_mask is None else attention_mask[:, :kv_length].bool()
    missing = kv_length - real.shape[1]
    return torch.stack([nn.functional.pad(real, (0, missing), value=True), used], dim=1)


AttentionInterface.register(ATTENTION_NAME, lookagain_attention)
AttentionMaskInterface.register(ATTENTION_NAME, lookagain_mask)


def _one_row(states: Tensor) -> Tensor:
    """Heads [B, H, L, D] as [1, H, B · L, D]; a view, as a projection lays them out."""
    return states.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2)


def _is_read(mask: Tensor | None) -> bool:
    """Whether Python may look at a mask: nothing is traced, and no device is waited for."""
    return mask is not None and mask.device.type == "cpu" and not torch.compiler.is_compiling()


def _bounds(mask: Tensor, queries: int, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """(key_start, key_length) of each row from a mask of any form."""
    if mask.dim() == 2:
        return mask.int().argmax(-1).to(torch.int32), None
    if mask.dim() == 3:
        real, used = mask.unbind(1)
        return real.int().argmax(-1).to(torch.int32), used.sum(-1, dtype=torch.int32)
    first, last = (mask[:, 0, at] for at in (0, -1))
    if mask.dtype != torch.bool:
        first, last = first > -1.0, last > -1.0
    start, ends = last.int().argmax(-1), [_end(last)]
    if queries > 1:
        # The last query of a row that is padded on the right sees less than its own key; the first
        # one of a row that is padded on the left sees nothing.
        ends.append(torch.where(first.any(-1), _end(first) + queries - 1, 0))
    length = torch.stack(ends).amax(0).clamp(max=keys)
    if _is_read(mask):
        holes = (last.sum(-1) != _end(last) - start) & last.any(-1)
        other = first.any(-1) & (first.int().argmax(-1) != start)
        if bool((holes | other).any()):
            raise ValueError(
                "attention_mask must be causal with padding at one end of a row: it has holes, or "
                "windows, or several sequences in a row"
            )
    return start.to(torch.int32), length.to(torch.int32)


def _plain_frequencies(
    theta: float, rotary_dim: int, device: torch.device | str | None
) -> tuple[Tensor, float]:
    return frequencies(theta, rotary_dim, device), 1.0


def _fill_frequencies(module: RoutedAttention, _: Any) -> None:  # noqa: ANN401 - torch's own
    """After `load_state_dict(assign=True)` on a module without memory, which assigns no buffer."""
    device = module.q_proj.weight.device
    if module.inv_freq.is_meta and device.type != "meta":
        module.inv_freq, _ = module._make_frequencies(device)


def _end(row: Tensor) -> Tensor:
    """int64 [B], one past the last True of bool [B, L_k]; L_k when there is none."""
    return row.shape[-1] - row.flip(-1).int().argmax(-1)


def _used_keys(layer: Any, key: Tensor) -> Tensor | None:  # noqa: ANN401 - any cache layer
    """int32 [B], keys that a cache layer holds in `key`, which it returned; None: all of them."""
    if isinstance(layer, LookAgainLayer):
        return layer.lengths
    if getattr(layer, "is_sliding", False):
        raise ValueError(
            f"{type(layer).__name__} is not supported: a sliding window drops keys; use a "
            "DynamicCache() or a StaticCache without one"
        )
    used, batch = layer.get_seq_length(), key.shape[0]
    if isinstance(used, Tensor):
        return used.to(device=key.device, dtype=torch.int32).expand(batch).contiguous()
    if used < key.shape[2]:
        return torch.full((batch,), used, dtype=torch.int32, device=key.device)
    return None


class RoutedAttention(nn.Module):
    """Grouped-query self-attention that can see visual tokens again.

    For authors of models and frameworks. Called without a `visual_context` it is plain causal
    attention; with one, queries also see the re-injected visual tokens at their shifted rotary
    positions, in the same softmax (COPY and ROUTE of Qwen Look Again, arXiv 2505.23558).
    Parameters are named as in transformers' Qwen models.

    Its inverse frequencies `inv_freq` stay float32 and right whatever the module is cast to or
    loaded from.

    Args:
        hidden_size: width of the hidden states.
        num_attention_heads: query heads H_q.
        num_key_value_heads: key heads H_kv, a divisor of H_q; default H_q.
        head_dim: D, a multiple of 8 up to 256; default hidden_size / H_q.
        layer_idx: which layer of a cache this is.
        qkv_bias: whether the three input projections have a bias (Qwen2 has, Qwen3 has not).
        qk_norm_eps: normalise queries and keys with this epsilon (Qwen3); None: do not.
        rope_theta: base of the rotary embedding, used when `position_embeddings` are not given.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: if the heads do not divide.

    Example:
        >>> attention = RoutedAttention(64, 4, 2)
        >>> hidden = torch.randn(1, 10, 64)
        >>> spans = torch.tensor([[[2, 4]]])  # keys 2 to 5 are an image
        >>> context = VisualContext.from_spans(spans, attention.inv_freq)
        >>> context = context.reinject(torch.tensor([True]), shift=6, start=8)
        >>> out, _ = attention(hidden, visual_context=context)
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        *,
        layer_idx: int = 0,
        qkv_bias: bool = False,
        qk_norm_eps: float | None = None,
        rope_theta: float = 10000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_key_value_heads = num_key_value_heads or num_attention_heads
        if num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads, got "
                f"{num_attention_heads} and {num_key_value_heads}"
            )
        if head_dim is None and hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads when head_dim is not "
                f"given, got {hidden_size} and {num_attention_heads}"
            )
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.layer_idx = layer_idx
        self.scaling = self.head_dim**-0.5
        made = {"device": device, "dtype": dtype}
        queries = num_attention_heads * self.head_dim
        keys = num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, queries, bias=qkv_bias, **made)
        self.k_proj = nn.Linear(hidden_size, keys, bias=qkv_bias, **made)
        self.v_proj = nn.Linear(hidden_size, keys, bias=qkv_bias, **made)
        self.o_proj = nn.Linear(queries, hidden_size, bias=False, **made)
        self.q_norm = self.k_norm = None
        if qk_norm_eps is not None:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=qk_norm_eps, **made)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=qk_norm_eps, **made)
        self._set_frequencies(partial(_plain_frequencies, rope_theta, self.head_dim), device)

    @classmethod
    def from_hf(cls, attention: nn.Module) -> RoutedAttention:
        """The same attention as a Hugging Face layer's, sharing its parameters.

        Args:
            attention: `self_attn` of a decoder layer with `q_proj`, `k_proj`, `v_proj`, `o_proj`
                (and `q_norm`, `k_norm` where the family has them).

        Raises:
            TypeError: if a projection is missing.
            ValueError: if it computes anything more: sliding windows, softcapping, attention
                sinks, or rotary embeddings of another kind.

        Example:
            >>> layer.self_attn = RoutedAttention.from_hf(layer.self_attn)
        """
        refuse_unknown_layer(attention)
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(module, name, getattr(attention, name))
        module.q_norm = getattr(attention, "q_norm", None)
        module.k_norm = getattr(attention, "k_norm", None)
        module.head_dim = attention.head_dim
        module.layer_idx = getattr(attention, "layer_idx", 0)
        module.scaling = getattr(attention, "scaling", attention.head_dim**-0.5)
        device = attention.q_proj.weight.device
        module._set_frequencies(partial(layer_frequencies, RotaryLayer.of(attention)), device)
        return module.train(attention.training)

    def _set_frequencies(
        self,
        make: Callable[[torch.device | str | None], tuple[Tensor, float]],
        device: torch.device | str | None,
    ) -> None:
        self._make_frequencies = make
        inv_freq, self.rotary_factor = make(device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_load_state_dict_post_hook(_fill_frequencies)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoutedAttention:
        """As of any module (`to`, `to_empty`, `half`), but the frequencies keep their values.

        A lower precision would round them, which turns far positions by wrong angles, and no state
        dict would fill them again where memory comes without values.
        """
        before = self.inv_freq
        super()._apply(fn, recurse)
        now = self.inv_freq
        if now is before:
            return self
        if now.is_meta:
            self.inv_freq = now.float()
        elif before.is_meta:
            self.inv_freq, _ = self._make_frequencies(now.device)
        else:
            self.inv_freq = before.to(now.device)
        return self

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *,
        past_key_values: Cache | None = None,
        **keywords: Any,  # noqa: ANN401 - what a model hands to all its layers
    ) -> tuple[Tensor, None]:
        """Attend; the signature is that of transformers' attention modules.

        Args:
            hidden_states: [B, L, hidden_size].
            attention_mask: padding, see `lookagain_attention`; causality needs no mask.
            position_ids: integer [B, L], read when `position_embeddings` is None; default: counted
                on from the cache.
            cache: a cache, written in place.
            position_embeddings: (cos, sin), each [B, L, rotary_dim], NeoX layout; features past
                rotary_dim are not turned.
            past_key_values: what `cache` is called before transformers 5.24.
            **keywords: `visual_context`, `key_start` int32 [B], `key_length` int32 [B],
                `visual_mass` float32 [B, H_kv, L_c] (added to in place); others are ignored.

        Returns:
            ([B, L, hidden_size], None).
        """
        cache = past_key_values if cache is None else cache
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key = self.q_proj(hidden_states).view(heads), self.k_proj(hidden_states).view(heads)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if position_embeddings is None:
            position_embeddings = self._rotary(hidden_states, position_ids, cache)
        cos, sin = (part.unsqueeze(2) for part in position_embeddings)
        query, key = turn(query, cos, sin).transpose(1, 2), turn(key, cos, sin).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
            if keywords.get("key_length") is None:
                used = _used_keys(cache.layers[self.layer_idx], key)
                if used is not None and "key_start" not in keywords and attention_mask is not None:
                    queries, keys = query.shape[2], key.shape[2]
                    keywords["key_start"], _ = _bounds(attention_mask, queries, keys)
                keywords["key_length"] = used
        out, _ = lookagain_attention(
            self, query, key, value, attention_mask, self.scaling, **keywords
        )
        return self.o_proj(out.flatten(2)), None

    def _rotary(
        self, hidden: Tensor, position_ids: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length(self.layer_idx)
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None] + past
        angle = position_ids[..., None].float() * self.inv_freq
        angle = torch.cat([angle, angle], dim=-1)
        factor, kind = self.rotary_factor, hidden.dtype
        return (angle.cos() * factor).to(kind), (angle.sin() * factor).to(kind)
