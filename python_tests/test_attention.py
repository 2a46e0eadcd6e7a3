"""The attention function and the RoutedAttention module."""

from __future__ import annotations

import copy
import doctest
import pickle

import pytest
import torch
from tiny_models import FAMILIES, tiny_inputs, tiny_model
from torch import nn
from transformers import (
    CohereConfig,
    CohereModel,
    DynamicCache,
    Gemma2Config,
    Gemma2Model,
    GptOssConfig,
    GptOssModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    SmolLM3Config,
    SmolLM3Model,
    StableLmConfig,
    StableLmForCausalLM,
    StableLmModel,
    StaticCache,
)

from lookagain_ext.attention import RoutedAttention, lookagain_attention, lookagain_mask
from lookagain_ext.cache import CACHE, LookAgainCache
from lookagain_ext.visual import VisualContext

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_from_hf_is_the_layer(family):
    """Swapped into an unpatched model: with its masks, its padding and its cache."""
    model, inputs = tiny_model(family), tiny_inputs([[3, (2, 3), 4], [2, (1, 3), 3]])
    expected = model(**inputs).logits
    answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    for layer in model.model.language_model.layers:
        before = layer.self_attn
        layer.self_attn = RoutedAttention.from_hf(before)
        assert layer.self_attn.q_proj.weight is before.q_proj.weight
        assert set(layer.self_attn.state_dict()) == set(before.state_dict())
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[kept], expected[kept], **CLOSE)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), answer)
    static = {"cache_implementation": "static", "disable_compile": True}
    again = model.generate(**inputs, max_new_tokens=6, do_sample=False, **static)
    assert torch.equal(again, answer)


@pytest.mark.parametrize("norm", [None, 1e-6])
def test_plain_module_is_causal_attention(norm):
    torch.manual_seed(0)
    module = RoutedAttention(48, 6, 2, 8, qkv_bias=True, qk_norm_eps=norm, dtype=torch.float64)
    hidden = torch.randn(2, 7, 48, dtype=torch.float64)
    out, weights = module(hidden)
    assert weights is None and out.shape == (2, 7, 48)

    def heads(projection, normalise):
        x = projection(hidden).view(2, 7, -1, 8)
        return (x if normalise is None else normalise(x)).transpose(1, 2)

    angle = torch.arange(7.0)[:, None] * module.inv_freq
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)

    def turned(x):
        pairs = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    expected = nn.functional.scaled_dot_product_attention(
        turned(heads(module.q_proj, module.q_norm)),
        turned(heads(module.k_proj, module.k_norm)),
        heads(module.v_proj, None),
        is_causal=True,
        enable_gqa=True,
    )
    expected = module.o_proj(expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def fixed(length):
    return StaticCache(LlamaConfig(**SMALL), max_cache_len=length)


@pytest.mark.parametrize("make", [DynamicCache, lambda: LookAgainCache(1), lambda: fixed(20), None])
@torch.no_grad()
def test_reinjection_in_a_module_of_ones_own(make):
    """A re-injection equals its keys and values written out; steps with a cache equal one call."""
    torch.manual_seed(0)
    module = RoutedAttention(32, 4, 2, dtype=torch.float64)
    hidden = torch.randn(1, 10, 32, dtype=torch.float64)
    plain = VisualContext.from_spans(torch.tensor([[[2, 4]]]), module.inv_freq)
    context = plain.reinject(torch.tensor([True]), shift=6, start=8)
    # Tokens 2 to 5 come again before token 8, at positions 8 to 11; token 8 moves to position 12.
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 12, 13]])
    mass = torch.zeros(1, 2, 4)
    whole, _ = module(hidden, position_ids=positions, visual_context=context, visual_mass=mass)
    written = torch.cat([hidden[:, :8], hidden[:, 2:6], hidden[:, 8:]], dim=1)
    expected, _ = module(written, position_ids=torch.arange(14)[None])
    torch.testing.assert_close(whole[:, 8:], expected[:, 12:], **CLOSE)
    without, _ = module(hidden, position_ids=positions)
    assert (without[:, 8:] - whole[:, 8:]).abs().max() > 1e-3
    assert 0 < float(mass.sum()) < 40
    if make is not None:
        cache, parts = make(), []
        for first, end in ((0, 6), (6, 8), (8, 9), (9, 10)):
            out, _ = module(
                hidden[:, first:end],
                position_ids=positions[:, first:end],
                **{CACHE: cache},
                visual_context=context,
            )
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, **CLOSE)


@pytest.mark.parametrize("way", ["by name", "from_hf"])
@pytest.mark.parametrize("kind", [StaticCache, LookAgainCache])
@pytest.mark.parametrize("rows", [[[3, (2, 3), 4]], [[3, (2, 3), 4], [2, (1, 3), 3]]])
@torch.no_grad()
def test_caches_of_fixed_size_without_a_session(rows, kind, way):
    """In one's own loop and in generate, with and without padding; the prompt in two parts."""
    inputs, length = tiny_inputs(rows), 40

    def logits(model, make):
        found, mask = [], inputs["attention_mask"]
        positions = model.model.get_rope_index(
            **{name: value for name, value in inputs.items() if "pixel" not in name}
        )[0]
        cache = make(model)
        found.append(model(**inputs, position_ids=positions, **{CACHE: cache}).logits)
        for count in (2, 1, 1):
            mask = nn.functional.pad(mask, (0, count), value=1)
            positions = positions[..., -1:] + 1 + torch.arange(count)
            ids = 20 + torch.arange(count).expand(len(rows), -1)
            step = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            found.append(model(**step, **{CACHE: cache}).logits)
        answer = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
        answer |= {"return_dict_in_generate": True, "disable_compile": True}
        found += model.generate(**inputs, **answer, **{CACHE: make(model)}).logits
        return [
            part[inputs["attention_mask"].bool()] if n == 0 else part
            for n, part in enumerate(found)
        ]

    expected = logits(tiny_model(), lambda _: DynamicCache())
    model = tiny_model()
    if way == "by name":
        model.set_attn_implementation({"text_config": "lookagain"})
    else:
        for layer in model.model.language_model.layers:
            layer.self_attn = RoutedAttention.from_hf(layer.self_attn)
    makes = {
        StaticCache: lambda model: StaticCache(model.config.text_config, max_cache_len=length),
        LookAgainCache: lambda _: LookAgainCache(2, max_length=length),
    }
    for found, wanted in zip(logits(model, makes[kind]), expected, strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)


def test_module_refuses_a_sliding_cache():
    config = LlamaConfig(**SMALL, sliding_window=4, layer_types=["sliding_attention"] * 2)
    module = RoutedAttention(64, 4, 2)
    for cache in (StaticCache(config, max_cache_len=20), DynamicCache(config=config)):
        with pytest.raises(ValueError, match="SlidingWindowLayer is not supported"):
            module(torch.randn(1, 3, 64), **{CACHE: cache})


def test_example_of_the_docstring():
    names = {"torch": torch, "VisualContext": VisualContext, "RoutedAttention": RoutedAttention}
    exec(
        "\n".join(
            example.source
            for example in doctest.DocTestParser().get_examples(RoutedAttention.__doc__)
        ),
        names,
    )
    assert names["out"].shape == (1, 10, 64) and names["context"].num_reinjections == 1


def test_module_refuses():
    with pytest.raises(ValueError, match="multiple of num_key_value_heads, got 4 and 3"):
        RoutedAttention(32, 4, 3)
    with pytest.raises(ValueError, match="multiple of num_attention_heads"):
        RoutedAttention(30, 4)
    with pytest.raises(TypeError, match="Linear has no q_proj, k_proj, v_proj, o_proj"):
        RoutedAttention.from_hf(nn.Linear(2, 2))


SMALL = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("rope", ROPES)
@torch.no_grad()
def test_from_hf_has_the_frequencies_of_the_model(rope):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**SMALL, rope_parameters={"rope_theta": 500.0, **ROPES[rope]})
    )
    module = RoutedAttention.from_hf(model.model.layers[0].self_attn)
    rotary, hidden = model.model.rotary_emb, torch.randn(1, 40, 64)
    torch.testing.assert_close(module.inv_freq, rotary.inv_freq)
    given = rotary(hidden, torch.arange(40)[None])
    alone, _ = module(hidden)
    torch.testing.assert_close(module(hidden, position_embeddings=given)[0], alone, **CLOSE)


@torch.no_grad()
def test_from_hf_turns_only_the_rotary_features():
    torch.manual_seed(0)
    fields = {name: value for name, value in SMALL.items() if name != "head_dim"}
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    model = StableLmForCausalLM(StableLmConfig(**fields, rope_parameters=rope)).eval()
    ids = torch.randint(32, (2, 12))
    expected = model(ids).logits
    for layer in model.model.layers:
        layer.self_attn = RoutedAttention.from_hf(layer.self_attn)
    module = model.model.layers[0].self_attn
    torch.testing.assert_close(module.inv_freq, model.model.rotary_emb.inv_freq)
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    hidden = torch.randn(2, 12, 64)
    given = model.model.rotary_emb(hidden, torch.arange(12)[None])
    alone, _ = module(hidden)
    torch.testing.assert_close(module(hidden, position_embeddings=given)[0], alone, **CLOSE)


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (Gemma2Model, Gemma2Config(**SMALL), "Gemma2Attention has softcapping of the attention"),
        (GptOssModel, GptOssConfig(**SMALL, num_local_experts=2), "has attention sinks"),
        (CohereModel, CohereConfig(**SMALL), "turn neighbouring features as pairs"),
        (StableLmModel, StableLmConfig(**SMALL, qk_layernorm=True), "k_layernorm, q_layernorm"),
        (SmolLM3Model, SmolLM3Config(**SMALL, no_rope_layers=[1, 0]), "no rotary positions"),
        (
            LlamaModel,
            LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
            "rotary embeddings of type 'dynamic' are not supported",
        ),
    ],
)
def test_from_hf_refuses_what_it_does_not_compute(model, config, message):
    with pytest.raises(ValueError, match=message):
        RoutedAttention.from_hf(model(config).layers[1].self_attn)


def test_mask_tells_the_padding_and_what_is_used_of_the_cache():
    assert lookagain_mask(kv_length=8, q_length=3, q_offset=5) is None
    mask = torch.tensor([[False, True, True]])
    assert lookagain_mask(kv_length=3, q_length=3, attention_mask=mask) is mask
    for offset in (2, torch.tensor(2)):
        wide = lookagain_mask(kv_length=5, q_length=1, q_offset=offset, attention_mask=mask)
        assert wide.tolist() == [[[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]]
        assert lookagain_mask(kv_length=5, attention_mask=wide) is wide
    alone = lookagain_mask(kv_length=3, batch_size=2, q_length=1, q_offset=0)
    assert alone.tolist() == [[[1, 0, 0], [1, 0, 0]]] * 2
    with pytest.raises(ValueError, match="attention_mask has holes"):
        lookagain_mask(
            kv_length=4, q_length=1, q_offset=3, attention_mask=mask.new_tensor([[1, 0, 1]])
        )
    with pytest.raises(ValueError, match="sliding-window caches are not supported"):
        lookagain_mask(kv_length=4, q_length=1, q_offset=9, kv_offset=5)


@pytest.mark.parametrize("form", ["padding", "bool", "float"])
def test_function_reads_padding_from_any_mask(form):
    torch.manual_seed(0)
    query = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 5, 8, dtype=torch.float64)
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    full = padding[:, None, None] & torch.ones(5, 5).tril().bool()
    mask = {
        "padding": padding,
        "bool": full,
        "float": torch.where(full, 0.0, torch.finfo(torch.float32).min),
    }[form]
    out, _ = lookagain_attention(nn.Identity(), query, key, value, mask)
    expected = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=full, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(out[padding], expected[padding], **CLOSE)
    with pytest.raises(ValueError, match="dropout"):
        lookagain_attention(nn.Identity(), query, key, value, dropout=0.1)
    with pytest.raises(ValueError, match="got sliding_window=4"):
        lookagain_attention(nn.Identity(), query, key, value, sliding_window=4)


@pytest.mark.parametrize("make", ["plain", "from_hf"])
@torch.no_grad()
def test_frequencies_keep_their_values(make):
    """Cast to a lower precision, copied, or read into memory that came without values."""
    layer = tiny_model(dtype=torch.float32).model.language_model.layers[0].self_attn

    def made():
        if make == "plain":
            return RoutedAttention(64, 4, 2, rope_theta=5e5)
        return RoutedAttention.from_hf(copy.deepcopy(layer))

    torch.manual_seed(0)
    module = made()
    exact, weights, hidden = module.inv_freq.clone(), module.state_dict(), torch.randn(2, 9, 64)
    expected, _ = module(hidden)
    for kind in (torch.bfloat16, torch.float16, torch.float64):
        cast = made().to(kind)
        assert cast.q_proj.weight.dtype == kind
        assert torch.equal(cast.inv_freq, exact) and cast.inv_freq.dtype == torch.float32
        assert torch.equal(copy.deepcopy(cast).inv_freq, exact)
        assert torch.equal(pickle.loads(pickle.dumps(cast)).inv_freq, exact)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # fills what is empty with NaN
    try:
        emptied = [made().to_empty(device="cpu"), made().to("meta").to_empty(device="cpu")]
        with torch.device("meta"):
            other = RoutedAttention(64, 4, 2, rope_theta=5e5) if make == "plain" else made()
        assert other.inv_freq.dtype == torch.float32
        emptied.append(other.to_empty(device="cpu"))
    finally:
        torch.use_deterministic_algorithms(False)
    assigned = made().to("meta").to(torch.bfloat16)
    assert assigned.inv_freq.is_meta and assigned.inv_freq.dtype == torch.float32
    for empty in (*emptied, assigned):
        empty.load_state_dict(weights, assign=empty is assigned)
        assert torch.equal(empty.inv_freq, exact)
        torch.testing.assert_close(empty(hidden)[0], expected)


@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("queries", "used"), [(9, 9), (4, 9), (4, 7), (1, 7)])
def test_function_reads_what_is_used_from_a_full_mask(side, queries, used, form):
    """A buffer of nine keys, some of them not written yet, and padding at either end."""
    torch.manual_seed(0)
    query = torch.randn(2, 4, queries, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 9, 8, dtype=torch.float64)
    index = torch.arange(9)
    real = torch.stack([index >= 3 if side == "left" else index < used - 2, index >= 0])
    if queries == 1 and side == "right":
        real[0] = True
    full = index <= torch.arange(used - queries, used)[:, None]
    full = full & real[:, None, None]
    mask = full if form == "bool" else torch.where(full, 0.0, torch.finfo(torch.float32).min)
    out, _ = lookagain_attention(nn.Identity(), query, key, value, mask)
    expected = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=full, enable_gqa=True
    ).transpose(1, 2)
    seen = real[:, used - queries : used]
    torch.testing.assert_close(out[seen], expected[seen], **CLOSE)


def test_function_refuses_masks_that_it_does_not_compute():
    query, key, value = torch.randn(3, 1, 2, 6, 8).unbind(0)
    causal = torch.ones(6, 6).tril().bool()
    packed = causal & (torch.arange(6) // 3 == (torch.arange(6) // 3)[:, None])
    holes = causal & (torch.arange(6) != 2)
    for mask in (packed, holes, holes & ~causal.tril(-4)):
        with pytest.raises(ValueError, match="attention_mask must be causal with padding at one"):
            lookagain_attention(nn.Identity(), query, key, value, mask[None, None])


def test_function_reads_cache_position():
    query, key, value = torch.randn(1, 2, 2, 8), *torch.randn(2, 1, 2, 6, 8).unbind(0)
    out, _ = lookagain_attention(
        nn.Identity(), query, key, value, cache_position=torch.tensor([2, 3])
    )
    expected, _ = lookagain_attention(nn.Identity(), query, key[:, :, :4], value[:, :, :4])
    assert torch.equal(out, expected)
