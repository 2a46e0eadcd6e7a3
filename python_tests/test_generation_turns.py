"""look_again over several calls on one cache: what counts as generated, which masks are right."""

from __future__ import annotations

import pytest
import torch
import transformers
from own_loops import CACHES, Loop, drawn, made
from packaging.version import parse
from tiny_models import (
    REFLECTION,
    generate,
    reflect_at,
    row_alone,
    tiny_inputs,
    tiny_model,
    whole_sequence,
)
from transformers import DynamicCache

from lookagain_ext.cache import CACHE
from lookagain_ext.generation import LookAgainConfig, look_again

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [[3, (2, 3), 4], [2, (2, 2), 2, (1, 3), 3]]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def config(**fields):
    return LookAgainConfig(**{"reflection_token_id": REFLECTION, **fields})


def texts(ids, mask):
    return {"input_ids": ids, "attention_mask": mask, "disable_compile": True}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("count", [1, 2])
def test_a_reflection_at_the_end_of_a_prompt_never_triggers(count, kind):
    """Also where the last part of the prompt that generate feeds is that token alone."""
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    inputs["input_ids"][:, -1] = REFLECTION
    first = {
        name: x[:, :-count] if x.shape == inputs["input_ids"].shape else x
        for name, x in inputs.items()
    }
    with look_again(model, config()) as session:
        new, logits = generate(model, inputs, reflect_at([3], []), 5)
        assert [len(row) for row in session.trace.reflections] == [1, 0]
        cache = Loop(model, first, made(kind, model)).cache
        given = texts(inputs["input_ids"], inputs["attention_mask"])
        found, again = generate(model, given, reflect_at([3], []), 5, **{CACHE: cache})
        assert torch.equal(found, new)
        torch.testing.assert_close(again, logits, **CLOSE)
        assert [len(row) for row in session.trace.reflections] == [1, 0]


@pytest.mark.skipif(
    parse(transformers.__version__) < parse("5.23"), reason="it cannot split prompts with pictures"
)
@pytest.mark.parametrize("size", [7, 14])
def test_a_prompt_in_chunks_triggers_nothing(size):
    model, inputs = tiny_model(), row_alone(tiny_inputs(ROWS), 0)
    assert inputs["input_ids"].shape[1] == 15
    inputs["input_ids"][:, -1] = inputs["input_ids"][:, 14 - 14 % size] = REFLECTION
    with look_again(model, config()) as session:
        _, logits = generate(model, inputs, reflect_at([1]), 5)
        _, found = generate(model, inputs, reflect_at([1]), 5, prefill_chunk_size=size)
        torch.testing.assert_close(found, logits, **CLOSE)
        assert [len(row) for row in session.trace.reflections] == [1]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"strategy": "route", "track_attention": True},
        {"strategy": "route", "route_scope": "layer"},
        {"backend": "append"},
        {"backend": "append", "strategy": "route"},
        {"backend": "reencode"},
        {"max_reinjections": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", CACHES)
def test_an_answer_cut_off_at_its_reflection(kind, fields):
    """Its last token is first fed with the next turn; the labelled forward says what is right."""
    if "backend" in fields and kind == "static":
        kind = "dynamic"
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    turn = drawn(2, 3, 7, 0)
    with look_again(model, config(**fields)) as session:
        cache = made(kind, model)
        new, _ = generate(
            model, inputs, reflect_at([1, 4], [2]), 5, **{CACHE: cache}, disable_compile=True
        )
        ids = torch.cat([inputs["input_ids"], new, turn], dim=1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 8), value=1)
        more, logits = generate(model, texts(ids, mask), reflect_at([2], [1]), 5, **{CACHE: cache})
        trace = session.trace
        batch = whole_sequence(inputs, torch.cat([new, turn, more], dim=1))
        batch["labels"][:, 18 + 5 : 18 + 8] = -100
        with torch.no_grad():
            expected = model(**batch).logits[:, 18 + 7 : -1]
        torch.testing.assert_close(logits.double(), expected, **CLOSE)
        for row, other in zip(trace.reflections, session.trace.reflections, strict=True):
            assert [(r.step, r.shift) for r in row] == [(r.step, r.shift) for r in other]


def test_a_picture_after_an_answer_without_reflection():
    model, inputs = tiny_model(), tiny_inputs([[3, (2, 3), 4]])
    second = tiny_inputs([[2, (3, 2), 2]], seed=4)
    with look_again(model, config()):
        cache = DynamicCache()
        new, _ = generate(model, inputs, reflect_at([]), 4, **{CACHE: cache})
        both = {
            name: torch.cat([inputs[name], x], dim=int(name in texts(0, 0) or "type" in name))
            for name, x in second.items()
        }
        at = inputs["input_ids"].shape[1]
        for name, filler in (("input_ids", new), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            filler = torch.zeros_like(new) + filler
            both[name] = torch.cat([both[name][:, :at], filler, both[name][:, at:]], dim=1)
        _, expected = generate(model, both, reflect_at([1, 3]), 6)
        more = {**both, "pixel_values": second["pixel_values"]}
        more["image_grid_thw"] = second["image_grid_thw"]
        positions = model.model.get_rope_index(
            **{name: x for name, x in both.items() if name != "pixel_values"}
        )[0]
        loop = Loop(model, both, DynamicCache())
        loop.cache, past = cache, at + 3
        with torch.no_grad():
            logits = model(
                **{
                    n: x[:, past:] if n in ("input_ids", "mm_token_type_ids") else x
                    for n, x in more.items()
                },
                position_ids=positions[..., past:],
                **{CACHE: cache},
            ).logits[:, -1]
        torch.testing.assert_close(logits, loop.logits, **CLOSE)
        tokens = generate(model, both, reflect_at([1, 3]), 6)[0]
        found = loop.steps(tokens[:, :5])
        torch.testing.assert_close(found, expected[:, 1:].double(), **CLOSE)


@pytest.mark.parametrize("kind", CACHES[1:])
@pytest.mark.parametrize("strategy", ["off", "copy"])
def test_a_reset_cache_begins_anew_with_one_token(strategy, kind):
    model, inputs, token = tiny_model(), tiny_inputs(ROWS), torch.tensor([[20], [21]])
    short = {"input_ids": token, "attention_mask": torch.ones_like(token)}
    with look_again(model, config(strategy=strategy)), torch.no_grad():
        expected = model(**short, **{CACHE: made(kind, model)}).logits
        cache = made(kind, model)
        Loop(model, inputs, cache).steps(drawn(2, 5, 1))
        cache.reset()
        torch.testing.assert_close(model(**short, **{CACHE: cache}).logits, expected, **CLOSE)


@pytest.mark.parametrize("kind", CACHES)
def test_padding_on_the_right_of_what_is_cached_is_refused(kind):
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    right = {**inputs, "attention_mask": inputs["attention_mask"].flip(1)}
    wanted = "attention_mask pads rows on the right"
    with look_again(model, config(strategy="off")), torch.no_grad():
        with pytest.raises(ValueError, match=wanted):
            model(**right, **{CACHE: made(kind, model)})
        with pytest.raises(ValueError, match=wanted):
            model.generate(**right, max_new_tokens=2, **{CACHE: made(kind, model)})
        loop = Loop(model, inputs, made(kind, model))
        mask = torch.nn.functional.pad(loop.mask, (0, 3), value=1)
        mask[0, -1] = 0
        with pytest.raises(ValueError, match=wanted):
            model(input_ids=drawn(2, 3, 1), attention_mask=mask, **{CACHE: loop.cache})
        if kind == "dynamic":
            cache = model(**right, use_cache=True)[CACHE]  # scored, which is fine
            loop.mask, loop.cache = right["attention_mask"], cache
            with pytest.raises(ValueError, match=wanted):
                loop.feed(drawn(2, 1, 1))


@pytest.mark.parametrize("strategy", ["off", "copy"])
@pytest.mark.parametrize("kind", CACHES)
def test_the_mask_of_a_step_is_that_of_the_prompt_and_ones(kind, strategy):
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    token = drawn(2, 1, 1, 0)
    with look_again(model, config(strategy=strategy)), torch.no_grad():
        loop = Loop(model, inputs, made(kind, model))
        right = torch.nn.functional.pad(loop.mask, (0, 1), value=1)
        hole, other = right.clone(), right.clone()
        hole[:, 7] = 0
        other[1, :2] = 0
        wrong = {
            "has holes": hole,
            "begins rows at other tokens than at the prompt": other,
            r"must reach over .* \[B, 19\], got \[2, 1\]": torch.ones_like(token),
            r"must have shape \[B, L\] at a step, got \[2, 1, 1, 19\]": right[:, None, None].bool(),
        }
        for message, mask in wrong.items():
            with pytest.raises(ValueError, match=message):
                model(input_ids=token, attention_mask=mask, **{CACHE: loop.cache})
        expected = Loop(model, inputs, made(kind, model)).feed(token)
        torch.testing.assert_close(loop.feed(token), expected, **CLOSE)


def test_a_short_mask_is_refused_without_looking_at_it(monkeypatch):
    monkeypatch.setattr("lookagain_ext.rollout.is_unread", lambda _: True)
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    token = drawn(2, 1, 1, 0)
    with look_again(model, config()), torch.no_grad():
        loop = Loop(model, inputs, DynamicCache())
        for mask in (torch.ones_like(token), torch.ones(2, 1, 1, 19).bool()):
            with pytest.raises(ValueError, match="attention_mask must"):
                model(input_ids=token, attention_mask=mask, **{CACHE: loop.cache})


@pytest.mark.parametrize("kind", ["static", "fixed"])
@torch.no_grad()
def test_the_decoder_itself_with_a_cache_of_fixed_size(kind):
    model = tiny_model()
    embeds = torch.randn(1, 9, 64, dtype=torch.float64)
    expected = model.model.language_model(inputs_embeds=embeds).last_hidden_state
    with look_again(model, config()):
        cache, parts = made(kind, model), []
        for part in embeds.split([6, 2, 1], dim=1):
            out = model.model.language_model(inputs_embeds=part, **{CACHE: cache})
            parts.append(out.last_hidden_state)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **CLOSE)


def test_reflections_that_see_nothing_have_no_shift():
    """In a generation as in a forward of the same sequence: past the limit, or no picture."""
    model, inputs = tiny_model(), tiny_inputs([*ROWS, [6]])
    with look_again(model, config(max_reinjections=1)) as session:
        new, _ = generate(model, inputs, reflect_at([2, 6], [4], [3]))
        shifts = [[r.shift for r in row] for row in session.trace.reflections]
        model(**whole_sequence(inputs, new))
        assert shifts == [[r.shift for r in row] for row in session.trace.reflections]
    assert shifts[0][0] > 0 and shifts[0][1:] == [0] and shifts[2] == [0]


def test_continuous_batching_is_refused():
    model = tiny_model(dtype=torch.float32)
    with look_again(model, config()):
        with pytest.raises(ValueError, match="continuous batching"):
            model.generate_batch([[8, 9, 10]], max_new_tokens=2)
        with pytest.raises(ValueError, match="must be a cache of transformers' .* got tuple"):
            model(input_ids=torch.tensor([[8]]), **{CACHE: ((1, 2),)})
    assert "init_continuous_batching" not in model.__dict__
