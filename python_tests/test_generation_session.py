"""Sessions come and go without a trace, refuse what they cannot do, and tell what happened."""

from __future__ import annotations

import copy
import gc
import json
import weakref

import pytest
import torch
from tiny_models import (
    EOS,
    FAMILIES,
    REFLECTION,
    generate,
    reflect_at,
    row_alone,
    tiny_inputs,
    tiny_model,
    whole_sequence,
)
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from lookagain_ext.attention import ATTENTION_NAME
from lookagain_ext.cache import CACHE
from lookagain_ext.generation import LookAgainConfig, look_again
from lookagain_ext.record import LOGGED

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [[3, (2, 3), 4], [2, (2, 2), 2, (1, 3), 3]]
STEPS = [[2, 6], [4]]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def config(**fields):
    return LookAgainConfig(**{"reflection_token_id": REFLECTION, **fields})


def state(model):
    """Everything about a model that a session could leave behind."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
    hooks = {
        name: [len(getattr(module, kind)) for kind in kinds]
        for name, module in model.named_modules()
    }
    inside = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    implementations = [
        part._attn_implementation
        for part in (model.config, model.config.text_config, model.config.vision_config)
    ]
    generation = copy.deepcopy(model.generation_config.to_dict())
    return hooks, inside, implementations, generation, model.config.to_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_detach_restores_the_model_exactly(family):
    model, inputs = tiny_model(family), tiny_inputs(ROWS)
    _, logits = generate(model, inputs, reflect_at(*STEPS))
    before = state(model)
    for fields in ({}, {"strategy": "route"}, {"backend": "append"}, {"backend": "reencode"}):
        with look_again(model, config(**fields)):
            assert model.config.text_config._attn_implementation == ATTENTION_NAME
            assert model.config.vision_config._attn_implementation != ATTENTION_NAME
            generate(model, inputs, reflect_at(*STEPS))
        assert state(model) == before
    _, after = generate(model, inputs, reflect_at(*STEPS))
    assert torch.equal(after, logits)


def test_detach_after_an_error():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    before = state(model)
    with pytest.raises(RuntimeError, match="stop here"), look_again(model, config()):
        handle = model.model.language_model.layers[1].register_forward_hook(fail)
        try:
            model(**inputs)
        finally:
            handle.remove()
    assert state(model) == before


def fail(*_):
    raise RuntimeError("stop here")


def test_an_interrupted_forward_leaves_the_session_usable():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    with look_again(model, config()):
        _, expected = generate(model, inputs, reflect_at(*STEPS))
        for where in (model.model.visual, model.model.language_model.layers[0]):
            handle = where.register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="stop here"):
                model(**inputs, labels=inputs["input_ids"])
            handle.remove()
        _, logits = generate(model, inputs, reflect_at(*STEPS))
    assert torch.equal(logits, expected)


def test_an_interrupted_forward_leaves_nothing_for_the_next_one():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    decoder, embeddings = model.model.language_model, torch.randn(1, 5, 64, dtype=torch.float64)
    for cache in (None, DynamicCache()):
        with look_again(model, config()), torch.no_grad():
            expected = decoder(inputs_embeds=embeddings).last_hidden_state
            for where in (model.model.visual, decoder.layers[1]):
                handle = where.register_forward_hook(fail)
                with pytest.raises(RuntimeError, match="stop here"):
                    model(**inputs, labels=inputs["input_ids"], **{CACHE: cache})
                handle.remove()
                found = decoder(inputs_embeds=embeddings).last_hidden_state
                assert torch.equal(found, expected)


def test_a_cache_belongs_to_one_configuration():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    cache, more = DynamicCache(), torch.full((2, 3), 20)
    with look_again(model, config()), torch.no_grad():
        new, _ = generate(model, inputs, reflect_at(*STEPS), **{CACHE: cache})
    ids = torch.cat([inputs["input_ids"], new, more], dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 15), value=1)
    turn = {"input_ids": ids, "attention_mask": mask}
    wanted = "strategy was 'copy' and is 'off'; start with an empty cache"
    with look_again(model, config(strategy="off")), pytest.raises(ValueError, match=wanted):
        generate(model, turn, reflect_at([], []), **{CACHE: cache})
    with look_again(model, config(strategy="off")), pytest.raises(ValueError, match=wanted):
        model(input_ids=ids[:, -1:], attention_mask=mask, **{CACHE: cache})
    with look_again(model, config()) as session:
        generate(model, turn, reflect_at([], []), **{CACHE: cache})
        assert [len(row) for row in session.trace.reflections] == [2, 1]


def test_sessions_nest():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    before = state(model)
    outer = look_again(model, config())
    _, copied = generate(model, inputs, reflect_at(*STEPS))
    with look_again(model, config(strategy="off")) as inner:
        assert inner.attached and outer.attached
        assert model.config.lookagain["strategy"] == "off"
        _, off = generate(model, inputs, reflect_at(*STEPS))
        assert (off - copied).abs().max() > 1e-3
    assert model.config.lookagain["strategy"] == "copy"
    _, again = generate(model, inputs, reflect_at(*STEPS))
    assert torch.equal(again, copied)
    outer.detach()
    outer.detach()
    assert not outer.attached and state(model) == before


def test_a_copy_of_the_model_looks_by_itself_and_nothing_is_kept_alive():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    before = state(model)
    session = look_again(model, config())
    _, logits = generate(model, inputs, reflect_at(*STEPS))
    twin = copy.deepcopy(model)
    session.detach()
    _, again = generate(twin, inputs, reflect_at(*STEPS))
    assert torch.equal(again, logits)
    _, plain = generate(model, inputs, reflect_at(*STEPS))
    assert (plain - logits).abs().max() > 1e-3
    with look_again(twin, config(strategy="off")):
        _, off = generate(twin, inputs, reflect_at(*STEPS))
    assert state(twin) == before
    _, own = generate(twin, inputs, reflect_at(*STEPS))
    assert torch.equal(own, plain)
    torch.testing.assert_close(off, plain, **CLOSE)
    gone = weakref.ref(twin)
    del twin
    gc.collect()
    assert gone() is None


def test_config_is_saved_with_the_model_and_read_back(tmp_path):
    model, inputs = tiny_model(dtype=torch.float32), tiny_inputs(ROWS, torch.float32)
    wanted = config(strategy="route", route_ratio=0.4, max_reinjections=3)
    with look_again(model, wanted):
        _, expected = generate(model, inputs, reflect_at(*STEPS))
        model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["lookagain"] == wanted.to_dict()
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert "suppress_tokens" not in generation
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    with look_again(loaded) as session:
        assert session.config == wanted
        _, logits = generate(loaded, inputs, reflect_at(*STEPS))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert loaded.config.lookagain == wanted.to_dict()


def test_attention_is_that_of_eager_attention_weights():
    # float32: transformers' eager attention gives NaN on padded float64 batches.
    model, inputs = tiny_model(dtype=torch.float32), tiny_inputs(ROWS, torch.float32)
    with look_again(model, config(strategy="off", track_attention=True)) as session:
        new, _ = generate(model, inputs, reflect_at(*STEPS))
        trace = session.trace
    model.set_attn_implementation("eager")
    out = model.generate(
        **inputs,
        logits_processor=reflect_at(*STEPS),
        max_new_tokens=12,
        do_sample=False,
        output_attentions=True,
        return_dict_in_generate=True,
    )
    assert trace.attention.shape == (2, 11) and trace.attention_map.shape == (2, 11, 7)
    weights = torch.stack(
        [torch.stack(step).mean((0, 2))[:, 0, :18] for step in out.attentions[1:]]
    )
    for row in range(2):
        visual = inputs["mm_token_type_ids"][row].bool()
        count = int(visual.sum())
        expected = weights[:, row, visual].float()
        torch.testing.assert_close(trace.attention_map[row, :, :count], expected, **CLOSE)
        torch.testing.assert_close(trace.attention[row], expected.sum(-1), **CLOSE)
        assert not trace.attention_map[row, :, count:].any()
        for reflection in trace.reflections[row]:
            mean = expected[: reflection.step].mean(0)
            torch.testing.assert_close(reflection.mass_before[:count], mean, **CLOSE)
    assert trace.grids == [[(1, 2, 3)], [(1, 2, 2), (1, 1, 3)]]


def test_trace_says_where_and_what():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    with look_again(model, config(max_reinjections=1)) as session:
        assert session.trace is None
        generate(model, inputs, reflect_at(*STEPS))
        trace = session.trace
    first, second = trace.reflections[0]
    prompt = inputs["input_ids"].shape[1]
    assert (first.step, first.key_index, first.num_visual, first.num_shown) == (2, prompt + 2, 6, 6)
    assert first.shown.tolist() == [True] * 6 + [False] and first.mass_before is None
    # Row 0: text 3, image start, 2 x 3 tokens on 3 positions, image end, text 4, then 2 tokens.
    assert first.shift == (3 + 1 + 3 + 1 + 4 + 2) - 4
    assert second.ignored and second.num_shown == 0
    assert trace.attention is None and trace.attention_map is None
    words = trace.summary()
    assert "at generated token 2, saw 6 of 6" in words and "max_reinjections" in words
    assert len(words.split("\n\n")) == 2


def test_long_generations_outgrow_the_first_buffers():
    model, inputs = tiny_model(layers=1), row_alone(tiny_inputs(ROWS), 0)
    with look_again(model, config(strategy="route", track_attention=True)) as session:
        generate(model, inputs, reflect_at([140]), 150)
        trace = session.trace
        assert trace.attention.shape == (1, 149) and bool((trace.attention > 0).all())
        mean = trace.attention_map[0, :140].mean(0)
        torch.testing.assert_close(trace.reflections[0][0].mass_before, mean, **CLOSE)


def test_the_trace_lists_so_many_reflections():
    """As its docstring says; those after them had their effect."""
    model, inputs = tiny_model(layers=1), row_alone(tiny_inputs(ROWS), 0)
    with look_again(model, config(max_reinjections=2, keep="latest")) as session:
        generate(model, inputs, reflect_at(range(70)), 72)
        assert len(session.trace.reflections[0]) == LOGGED
    assert f"the first {LOGGED} at most" in type(session.trace).__doc__


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({"num_beams": 2}, "beam_search"),
        ({"num_beams": 2, "do_sample": True}, "beam_sample"),
        ({"prompt_lookup_num_tokens": 2}, "assisted_generation"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "(?i)contrastive.search"),
    ],
)
def test_modes_that_are_not_supported(options, mode):
    model, inputs = tiny_model(), row_alone(tiny_inputs(ROWS), 0)
    with look_again(model, config()), pytest.raises(ValueError, match=mode):
        model.generate(**inputs, max_new_tokens=4, **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strategy": "both"}, "strategy must be one of 'copy', 'route', 'off', got 'both'"),
        ({"route_ratio": 50}, "route_ratio must lie between 0 and 1, got 50: did you mean 0.5?"),
        ({"route_ratio": float("nan")}, "route_ratio must lie between 0 and 1, got nan"),
        ({"backend": "eager"}, "backend must be one of"),
        ({"max_reinjections": 0}, "max_reinjections must be an integer from 1 to 16, got 0"),
        ({"keep": "latest", "backend": "append"}, "keep='latest' needs backend='virtual'"),
        (
            {"strategy": "route", "route_scope": "layer", "backend": "reencode"},
            "route_scope='layer' needs backend",
        ),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError) as error:
        LookAgainConfig(**fields)
    assert message in str(error.value)


def test_config_refuses_unknown_entries():
    with pytest.raises(ValueError, match="unknown LookAgainConfig entries: ratio"):
        LookAgainConfig.from_dict({"ratio": 0.5})


def test_models_that_are_not_supported():
    text = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    with pytest.raises(ValueError, match="'qwen2' .it has no vision tower., which is not support"):
        look_again(text, config())
    with pytest.raises(TypeError, match="must be a transformers model, got Linear"):
        look_again(torch.nn.Linear(2, 2), config())
    model = tiny_model()
    with pytest.raises(ValueError, match="'<REFLECTION>' is unknown: pass the tokenizer"):
        look_again(model, LookAgainConfig())
    with pytest.raises(TypeError, match="config must be a LookAgainConfig, got dict"):
        look_again(model, {"strategy": "copy"})


def test_inputs_that_are_not_supported():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    with look_again(model, config()):
        without = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
        with pytest.raises(ValueError, match="mm_token_type_ids"):
            model(**without)
        with pytest.raises(ValueError, match="mm_token_type_ids"):
            model.generate(**without, max_new_tokens=2)
        holes = inputs["attention_mask"].clone()
        holes[1, -2] = 0
        with pytest.raises(ValueError, match="holes"):
            model.generate(**{**inputs, "attention_mask": holes}, max_new_tokens=2)
        embeddings = torch.randn(1, 4, 64, dtype=torch.float64)
        with pytest.raises(ValueError, match="input_ids are needed"):
            model(inputs_embeds=embeddings)
    cache = DynamicCache()
    with torch.no_grad():
        model(**inputs, **{CACHE: cache})
    with look_again(model, config()), pytest.raises(ValueError, match="filled before look_again"):
        model(input_ids=torch.full((2, 1), 9), **{CACHE: cache})


def test_dropout_is_refused():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    with look_again(model, config()), pytest.raises(ValueError, match="dropout is not supported"):
        model.train()(**inputs)


def test_reencode_refuses_sharded_parameters():
    model = tiny_model()
    model.model.language_model.norm.weight.ds_id = 1
    look_again(model, config()).detach()
    with pytest.raises(ValueError, match="parameters are sharded"):
        look_again(model, config(backend="reencode"))


def test_finished_rows_do_not_reflect():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    from tiny_models import ForceTokens
    from transformers import LogitsProcessorList

    forced = [{2: REFLECTION}, {1: EOS, 4: REFLECTION}]
    processors = LogitsProcessorList([ForceTokens(forced)])
    with look_again(model, config()) as session:
        new, _ = generate(model, inputs, processors, 8)
        assert [len(row) for row in session.trace.reflections] == [1, 0]
    assert not (new[1, 2:] != 0).any()


def test_peft_and_the_fused_head_of_trl():
    peft = pytest.importorskip("peft")
    utils = pytest.importorskip("trl.trainer.utils")
    model, inputs = tiny_model(dtype=torch.float32), tiny_inputs(ROWS, torch.float32)
    utils.add_fused_lm_head(model)
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, lora).eval()
    prompt = inputs["input_ids"].shape[1]
    with look_again(wrapped, config()) as session:
        with torch.no_grad():
            new, logits = generate(wrapped, inputs, reflect_at(*STEPS))
        batch = whole_sequence(inputs, new)
        # A reflection in the prompt's text must not trigger: only labels tell.
        found = wrapped(**batch, fused_lm_head=True)
        assert [len(row) for row in session.trace.reflections] == [2, 1]
        found.log_probs.sum().backward()
        hidden = torch.full_like(batch["labels"], -100)
        wrapped(**{**batch, "labels": hidden})
        assert session.trace.reflections == [[], []]
    expected = logits.log_softmax(-1).gather(-1, new[..., None])[..., 0]
    log_probs = found.log_probs.detach()[:, prompt - 1 :]
    torch.testing.assert_close(log_probs, expected, rtol=1e-4, atol=1e-4)
    names = [n for n, p in wrapped.named_parameters() if p.grad is not None]
    assert names and all("lora" in name for name in names)


def test_the_base_model_takes_the_cache_by_its_old_name():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    answers = []
    for name in (CACHE, "past_key_values"):
        cache = DynamicCache()
        with torch.no_grad(), look_again(model, config()) as session:
            model.model(**inputs, **{name: cache})
            more = torch.full((2, 1), REFLECTION)
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
            out = model.model(input_ids=more, attention_mask=mask, **{name: cache})
            assert [len(row) for row in session.trace.reflections] == [1, 1]
        answers.append(out.last_hidden_state)
    assert torch.equal(*answers)
