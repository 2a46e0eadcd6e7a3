"""Calls within a session that come from several sides: threads, labels, loops, copies, modes."""

from __future__ import annotations

import io
import pickle
import threading

import pytest
import torch
from tiny_models import (
    FAMILIES,
    IMAGE,
    REFLECTION,
    VOCABULARY,
    generate,
    reflect_at,
    tiny_inputs,
    tiny_model,
    whole_sequence,
)
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache

from lookagain_ext.cache import CACHE, LookAgainCache
from lookagain_ext.generation import LookAgainConfig, look_again

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [[3, (2, 3), 4], [2, (2, 2), 2, (1, 3), 3]]
STEPS = [[2, 6], [4]]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def config(**fields):
    return LookAgainConfig(**{"reflection_token_id": REFLECTION, **fields})


def counts(trace):
    return [len(row) for row in trace.reflections]


def answered(model, inputs, **fields):
    """A whole sequence with reflections in it, and the logits that generated it."""
    with look_again(model, config(**fields)):
        new, logits = generate(model, inputs, reflect_at(*STEPS))
    return whole_sequence(inputs, new), new, logits


def unlabelled(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.mark.parametrize("fields", [{}, {"strategy": "route"}, {"strategy": "off"}])
def test_labels_count_with_an_empty_cache(fields):
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    batch, _, _ = answered(model, inputs)
    with look_again(model, config(**fields)) as session, torch.no_grad():
        without = model(**batch)
        wanted = counts(session.trace)
        cache = DynamicCache()
        found = model(**batch, **{CACHE: cache})
        assert counts(session.trace) == wanted == [2, 1]
        assert torch.equal(found.loss, without.loss)
        # What was filled so can be continued as what the model made itself.
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
        step = {"input_ids": torch.full((2, 1), 20), "attention_mask": mask}
        model(**batch)
        following = model(**step, **{CACHE: without[CACHE]}).logits
        model(**batch)
        torch.testing.assert_close(model(**step, **{CACHE: cache}).logits, following)


def test_labels_are_refused_where_a_cache_cannot_take_them():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    batch, _, _ = answered(model, inputs)
    fixed = StaticCache(model.config.text_config, max_cache_len=40)
    for cache in (fixed, LookAgainCache(2)):
        wanted = f"labels with {CACHE}={type(cache).__name__}"
        with look_again(model, config()), pytest.raises(ValueError, match=wanted):
            model(**batch, **{CACHE: cache})
    for backend in ("append", "reencode"):
        with look_again(model, config(backend=backend)):
            with pytest.raises(ValueError, match=f"labels with {CACHE}=DynamicCache"):
                model(**batch, **{CACHE: DynamicCache()})
    more = {"input_ids": torch.tensor([[20, REFLECTION], [20, 21]])}
    more["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 2), value=1)
    with look_again(model, config()), torch.no_grad():
        cache = DynamicCache()
        model(**unlabelled(batch), **{CACHE: cache})
        with pytest.raises(ValueError, match="labels mark a reflection among several tokens"):
            model(**more, labels=more["input_ids"], **{CACHE: cache})


def test_threads_do_not_meet():
    """Each is held between the base model's hook and the decoder's until the other is there."""
    model = tiny_model(layers=1)
    batches = [tiny_inputs(ROWS), tiny_inputs([*ROWS[::-1]], seed=5)]
    sequences = [answered(model, inputs)[0] for inputs in batches]
    sequences[1]["labels"][:] = -100
    barrier, found = threading.Barrier(2), [None, None]
    with look_again(model, config()), torch.no_grad():
        expected = [model(**batch).logits for batch in sequences]

        def run(number):
            with torch.no_grad():
                found[number] = model(**sequences[number]).logits

        def meet(*_):
            barrier.wait(30)

        hooks = [part.register_forward_pre_hook(meet) for part in (model, model.model.visual)]
        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for hook in hooks:
            hook.remove()
    for one, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(one, exact)


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_a_pickled_model_is_a_model(way):
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    _, plain = generate(model, inputs, reflect_at(*STEPS))
    with look_again(model, config()):
        _, looked = generate(model, inputs, reflect_at(*STEPS))
        if way == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
    assert torch.equal(generate(twin, inputs, reflect_at(*STEPS))[1], looked)
    look_again(twin, config(strategy="off")).detach()
    assert not hasattr(twin.config, "lookagain") and "generate" not in twin.__dict__
    assert torch.equal(generate(twin, inputs, reflect_at(*STEPS))[1], plain)


def test_models_that_share_a_config_take_turns():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    twin = type(model)(model.config).double().eval()
    twin.load_state_dict(model.state_dict())
    _, _, expected = answered(twin, inputs)
    session = look_again(model, config())
    with pytest.raises(ValueError, match=r"shares its config with another model.*deepcopy"):
        look_again(twin, config())
    look_again(model, config()).detach()  # on the model itself sessions nest as before
    session.detach()
    assert model.config.text_config._attn_implementation != "lookagain"
    assert torch.equal(answered(twin, inputs)[2], expected)
    assert torch.equal(answered(model, inputs)[2], expected)


def loop(model, batch, new, begun, **first):
    """Logits of a loop whose first call, without a cache, holds `begun` tokens of the answer."""
    prompt = batch["input_ids"].shape[1] - new.shape[1]
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "labels")
    part = {n: v[:, : prompt + begun] if n in names else v for n, v in batch.items()}
    with torch.set_grad_enabled(first.get("grad", False)):
        out = model(**part, use_cache=True)
    found, mask = [out.logits[:, -1]], part["attention_mask"]
    with torch.no_grad():
        for step in range(begun, new.shape[1] - 1):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            ids = new[:, step : step + 1]
            out = model(input_ids=ids, attention_mask=mask, **{CACHE: out[CACHE]})
            found.append(out.logits[:, -1])
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("begun", [0, 1, 3, 7])
@pytest.mark.parametrize(
    "fields",
    [
        {"strategy": "route"},
        {"strategy": "route", "track_attention": True},
        {"track_attention": True},
        {},
    ],
)
def test_a_loop_begun_within_an_answer(begun, fields):
    """Labels tell where it began: what it attended so far counts, and its steps go on."""
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    with look_again(model, config(**fields)) as session:
        new, logits = generate(model, inputs, reflect_at([5, 9], [6]))
        expected = session.trace
        found = loop(model, whole_sequence(inputs, new), new, begun)
        trace = session.trace
    torch.testing.assert_close(found.float(), logits[:, begun:], **CLOSE)
    for row, exact_row in zip(trace.reflections, expected.reflections, strict=True):
        for one, exact in zip(row, exact_row, strict=True):
            assert (one.step, one.key_index, one.shift) == (
                exact.step,
                exact.key_index,
                exact.shift,
            )
            assert torch.equal(one.shown, exact.shown)
            if exact.mass_before is not None:
                torch.testing.assert_close(one.mass_before, exact.mass_before, **CLOSE)
    if expected.attention is not None:
        torch.testing.assert_close(trace.attention, expected.attention, **CLOSE)
    if expected.attention_map is not None:
        torch.testing.assert_close(trace.attention_map, expected.attention_map, **CLOSE)


def test_a_loop_begun_within_answers_of_different_lengths():
    """Steps are each row's own; attention that would have to begin at several is refused."""
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    with look_again(model, config()) as session:
        new, _ = generate(model, inputs, reflect_at([5, 9], [6]))
        steps = [[r.step for r in row] for row in session.trace.reflections]
        batch = whole_sequence(inputs, new)
        batch["labels"][1, : inputs["input_ids"].shape[1] + 2] = -100
        loop(model, batch, new, 4)
        found = [[r.step for r in row] for row in session.trace.reflections]
        assert found == [steps[0], [steps[1][0] - 2]]
    with look_again(model, config(strategy="route")):
        with pytest.raises(ValueError, match=r"begin 4, 2 tokens before the end"):
            loop(model, batch, new, 4)


def test_a_loop_begun_with_gradients_is_refused_where_attention_counts():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    batch, new, logits = answered(model, inputs)
    with look_again(model, config()):
        found = loop(model, batch, new, 3, grad=True)
        torch.testing.assert_close(found.float(), logits[:, 3:], **CLOSE)
    for fields in ({"strategy": "route"}, {"track_attention": True}):
        with look_again(model, config(**fields)):
            loop(model, batch, new, 0, grad=True)
            with pytest.raises(ValueError, match=r"under torch.no_grad\(\)"):
                loop(model, batch, new, 3, grad=True)


@pytest.mark.parametrize("fields", [{}, {"strategy": "route", "track_attention": True}])
@pytest.mark.parametrize("cache", [DynamicCache, lambda: LookAgainCache(2)])
def test_inference_mode_may_end_between_turns(fields, cache):
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        kept = cache()
        with look_again(model, config(**fields)) as session:
            with mode():
                new, _ = generate(model, inputs, reflect_at([1], [3]), 5, **{CACHE: kept})
            ids = torch.cat([inputs["input_ids"], new, torch.full((2, 2), 20)], dim=1)
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 7), value=1)
            turn = {"input_ids": ids, "attention_mask": mask}
            found.append(generate(model, turn, reflect_at([2], [1]), 5, **{CACHE: kept})[1])
            assert counts(session.trace) == [2, 2]
    assert torch.equal(*found)


@pytest.mark.parametrize("fields", [{}, {"strategy": "route", "track_attention": True}])
def test_inference_mode_for_the_prompt_alone(fields):
    """Steps follow under no_grad, also more than the record held at first."""
    model, inputs = tiny_model(layers=1), tiny_inputs(ROWS)
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        cache, logits = DynamicCache(), []
        mask = inputs["attention_mask"]
        with look_again(model, config(**fields)):
            with mode():
                model(**inputs, **{CACHE: cache})
            for step in range(140):
                ids = torch.full((2, 1), REFLECTION if step in (3, 135) else 20)
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                with mode() if step == 128 else torch.no_grad():
                    out = model(input_ids=ids, attention_mask=mask, **{CACHE: cache})
                logits.append(out.logits[:, -1])
        found.append(torch.stack(logits, dim=1))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"strategy": "off"},
        {"strategy": "route", "track_attention": True},
        {"strategy": "route", "route_scope": "layer"},
    ],
    ids=str,
)
def test_gradients_through_decoded_steps(fields):
    """As through one forward of the whole, though the steps come one after the other."""
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    batch, new, _ = answered(model, inputs, **fields)
    weight, chosen = model.lm_head.weight.requires_grad_(), model.model.language_model.norm.weight
    wanted = [weight, chosen, model.model.language_model.layers[0].self_attn.q_proj.weight]
    prompt, cache = inputs["input_ids"].shape[1], DynamicCache()
    with look_again(model, config(**fields)):
        logits = [model(**inputs, **{CACHE: cache}).logits[:, -1]]
        mask = inputs["attention_mask"]
        for step in range(new.shape[1] - 1):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            ids = new[:, step : step + 1]
            out = model(input_ids=ids, attention_mask=mask, **{CACHE: cache})
            logits.append(out.logits[:, -1])
        found = torch.autograd.grad(torch.stack(logits, 1).square().mean(), wanted)
        whole = model(**batch).logits[:, prompt - 1 : -1]
        exact = torch.autograd.grad(whole.square().mean(), wanted)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_gradients_from_a_prompt_in_inference_mode():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    ids = torch.full((2, 1), REFLECTION)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        with look_again(model, config()):
            with mode():
                cache = DynamicCache()
                model(**inputs, **{CACHE: cache})
            if mode is torch.inference_mode:  # torch saves no tensor of that mode for a backward
                for layer in cache.layers:
                    layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
            out = model(input_ids=ids, attention_mask=mask, **{CACHE: cache}).logits
            found.append(torch.autograd.grad(out.square().mean(), model.lm_head.weight)[0])
    assert torch.equal(*found)


class Score(LogitsProcessor):
    """Scores a sequence with the very model that generates, as a verifier would."""

    def __init__(self, model, batch):
        self.model, self.batch, self.found = model, batch, []

    def __call__(self, input_ids, scores):
        with torch.no_grad():
            self.found.append(self.model(**self.batch, use_cache=False).logits)
        return scores


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_model_may_score_while_it_generates(use_cache):
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    batch, new, logits = answered(model, inputs)
    batch = unlabelled(batch)
    scored = {**batch, "input_ids": batch["input_ids"].clone()}
    scored["input_ids"][:, inputs["input_ids"].shape[1] - 1] = REFLECTION
    with look_again(model, config()) as session:
        with torch.no_grad():
            expected = model(**scored, use_cache=False).logits
        assert counts(session.trace) == [3, 2]
        score = Score(model, scored)
        processors = LogitsProcessorList([*reflect_at(*STEPS), score])
        found, found_logits = generate(model, inputs, processors, use_cache=use_cache)
    assert torch.equal(found, new)
    torch.testing.assert_close(found_logits, logits, **CLOSE)
    assert len(score.found) == 12
    for one in score.found:
        assert torch.equal(one, expected)


def test_labels_of_a_call_that_failed_are_forgotten():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    batch, _, _ = answered(model, inputs)

    def fail(*_):
        raise RuntimeError("not today")

    with look_again(model, config()) as session, torch.no_grad():
        handle = model.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="not today"):
            model(**{**batch, "labels": torch.full_like(batch["labels"], -100)})
        handle.remove()
        model.model(**unlabelled(batch))
        assert counts(session.trace) == [2, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_that_was_changed_within_a_session(family):
    model, inputs = tiny_model(family), tiny_inputs(ROWS)
    before = model.config.text_config._attn_implementation
    with look_again(model, config()):
        model.set_attn_implementation("eager")
        with pytest.raises(RuntimeError, match=r"attention was set to 'eager' within the session"):
            model(**inputs)
        with pytest.raises(RuntimeError, match=r"detach\(\)"):
            model.generate(**inputs, max_new_tokens=2)
        model.set_attn_implementation({"text_config": "lookagain"})
        model(**inputs)
    assert model.config.text_config._attn_implementation == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reflection_token_id": -3}, "reflection_token_id must be a token's id or None, got -3"),
        ({"reflection_token_id": True}, "reflection_token_id must be a token's id or None"),
        ({"reflection_token_id": "6"}, "reflection_token_id must be a token's id or None, got '6'"),
        ({"reflection_token_id": 6.0}, "reflection_token_id must be a token's id or None, got 6.0"),
        ({"reflection_token": 5}, "reflection_token must be the text of a token, got 5"),
        ({"reflection_token": ""}, "reflection_token must be the text of a token, got ''"),
        ({"track_attention": "no"}, "track_attention must be True or False, got 'no'"),
        ({"track_attention": 1}, "track_attention must be True or False, got 1"),
    ],
)
def test_config_refuses_what_would_never_reflect(fields, message):
    with pytest.raises(ValueError) as error:
        LookAgainConfig(**fields)
    assert message in str(error.value)


def test_tokens_that_the_model_cannot_write():
    model = tiny_model()
    wanted = f"reflection_token_id {VOCABULARY} is not in the model's vocabulary of {VOCABULARY}"
    with pytest.raises(ValueError, match=wanted):
        look_again(model, config(reflection_token_id=VOCABULARY))
    with pytest.raises(ValueError, match=f"reflection_token_id {IMAGE} is the model's placeholder"):
        look_again(model, config(reflection_token_id=IMAGE))
    look_again(model, config(reflection_token_id=VOCABULARY - 1)).detach()
