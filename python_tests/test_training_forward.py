"""look_again in a forward over whole sequences: it agrees with decoding, and trains."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import (
    FAMILIES,
    FIRST_WORD,
    REFLECTION,
    generate,
    log_probabilities,
    reflect_at,
    tiny_inputs,
    tiny_model,
    whole_sequence,
)
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)

from lookagain_ext.generation import LookAgainConfig, look_again

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [[3, (2, 3), 4], [2, (2, 2), 2, (1, 3), 3]]
STEPS = [[2, 6], [4]]
WAYS = {
    "copy": {},
    "copy-append": {"backend": "append"},
    "copy-reencode": {"backend": "reencode"},
    "route": {"strategy": "route", "route_ratio": 0.4},
    "route-layer": {"strategy": "route", "route_ratio": 0.4, "route_scope": "layer"},
    "route-append": {"strategy": "route", "route_ratio": 0.4, "backend": "append"},
    "route-reencode": {"strategy": "route", "route_ratio": 0.4, "backend": "reencode"},
    "off": {"strategy": "off"},
}


def config(**fields):
    return LookAgainConfig(**{"reflection_token_id": REFLECTION, **fields})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_full_forward_is_decoding(family, way):
    model, inputs = tiny_model(family), tiny_inputs(ROWS)
    with look_again(model, config(**WAYS[way])) as session, torch.no_grad():
        new, decoded = generate(model, inputs, reflect_at(*STEPS))
        rollout = session.trace
        prompt = inputs["input_ids"].shape[1]
        full = model(**whole_sequence(inputs, new)).logits[:, prompt - 1 : -1]
        read = session.trace
    torch.testing.assert_close(full.float(), decoded, rtol=1e-5, atol=1e-5)
    for written, found in zip(rollout.reflections, read.reflections, strict=True):
        assert [r.step for r in written] == [r.step for r in found]
        if way not in ("route-layer",):
            assert [r.shown.tolist() for r in written] == [r.shown.tolist() for r in found]


@pytest.mark.parametrize("way", ["copy", "route", "route-layer", "off"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_of_a_full_forward_is_that_of_decoding(family, way):
    model, inputs = tiny_model(family), tiny_inputs(ROWS)
    tracked = config(**WAYS[way], track_attention=True)
    with look_again(model, tracked) as session, torch.no_grad():
        new, _ = generate(model, inputs, reflect_at(*STEPS))
        decoded = session.trace
        batch = whole_sequence(inputs, new)
        batch["labels"][0, -3:] = -100  # a row with fewer
        model(**batch)
        read = session.trace
    steps = decoded.attention.shape[1]
    torch.testing.assert_close(
        read.attention_map[1, :steps], decoded.attention_map[1], rtol=1e-5, atol=1e-6
    )
    short = new.shape[1] - 3
    torch.testing.assert_close(
        read.attention[0, :short], decoded.attention[0, :short], rtol=1e-5, atol=1e-6
    )
    assert not read.attention[0, short:].any() and read.attention[1, -1] > 0
    with look_again(model, tracked) as session:
        model(**batch)
        assert session.trace.attention is None  # checkpointing would count a layer twice


@pytest.mark.parametrize("way", ["copy", "copy-append", "copy-reencode", "route", "route-layer"])
def test_log_probabilities_of_samples(way):
    """float32, sampled, 0 to 4 reflections a row, two samples for each prompt."""
    model = tiny_model(dtype=torch.float32)
    inputs = tiny_inputs([[3, (2, 3), 4], [2, (2, 2), 2, (1, 3), 3], [1, (1, 2), 1]], torch.float32)
    steps = [[], [3], [1, 5], [2, 4, 8], [1, 3, 5, 7], [0, 9]]
    with look_again(model, config(**WAYS[way])) as session, torch.no_grad():
        torch.manual_seed(3)
        options = {"do_sample": True, "num_return_sequences": 2, "top_k": 0}
        new, logits = generate(model, inputs, reflect_at(*steps), 12, **options)
        assert [len(row) for row in session.trace.reflections] == [0, 1, 2, 3, 4, 2]
        twice = {
            name: inputs[name].repeat_interleave(2, 0)
            for name in ("input_ids", "attention_mask", "mm_token_type_ids")
        }
        pixels = inputs["pixel_values"].split((inputs["image_grid_thw"].prod(-1)).tolist())
        grids = list(inputs["image_grid_thw"])
        order = [0, 0, 1, 2, 1, 2, 3, 3]
        twice["pixel_values"] = torch.cat([pixels[image] for image in order])
        twice["image_grid_thw"] = torch.stack([grids[image] for image in order])
        full = model(**whole_sequence(twice, new)).logits
    sampled = log_probabilities(logits, new)
    trained = log_probabilities(full[:, inputs["input_ids"].shape[1] - 1 : -1], new)
    assert (sampled - trained).abs().max() < 1e-5


def test_labels_decide_what_triggers():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    new, _ = generate(model, inputs, reflect_at(*STEPS))
    batch = whole_sequence(inputs, new)
    prompt = inputs["input_ids"].shape[1]
    with torch.no_grad():
        plain = model(**batch).logits
        with look_again(model, config()) as session:
            hidden = {**batch, "labels": torch.full_like(batch["labels"], -100)}
            torch.testing.assert_close(model(**hidden).logits, plain, rtol=1e-5, atol=1e-5)
            assert session.trace.reflections == [[], []]
            one = batch["labels"].clone()
            one[0, : prompt + 3] = -100
            model(**{**batch, "labels": one})
            assert [r.key_index for r in session.trace.reflections[0]] == [prompt + 6]
            model(**{name: value for name, value in batch.items() if name != "labels"})
            assert [len(row) for row in session.trace.reflections] == [2, 1]


def test_reflections_past_the_limit():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    prompt = inputs["input_ids"].shape[1]
    with look_again(model, config(max_reinjections=1)) as session, torch.no_grad():
        new, decoded = generate(model, inputs, reflect_at(*STEPS))
        full = model(**whole_sequence(inputs, new)).logits[:, prompt - 1 : -1]
        assert [r.ignored for r in session.trace.reflections[0]] == [False, True]
    torch.testing.assert_close(full.float(), decoded, rtol=1e-5, atol=1e-5)
    latest = config(max_reinjections=1, keep="latest")
    with look_again(model, latest), pytest.raises(ValueError, match="keep='latest'"):
        model(**whole_sequence(inputs, new))


@pytest.mark.parametrize("way", ["copy", "copy-reencode", "route", "route-layer"])
def test_no_picture_is_shown_before_it_comes(way):
    """In a conversation a later picture would be seen by an earlier reflection."""
    model, inputs = tiny_model(), tiny_inputs([[3, (2, 3), 10, (2, 2), 4]])
    ids = inputs["input_ids"].clone()
    ids[0, 14] = REFLECTION
    labels = torch.full_like(ids, -100)
    labels[0, 12:17] = ids[0, 12:17]
    batch = {**inputs, "input_ids": ids}
    with look_again(model, config(**WAYS[way])) as session, torch.no_grad():
        with pytest.raises(ValueError, match="row 0 has a picture up to token 25, after its refle"):
            model(**batch, labels=labels)
        model(**batch, labels=torch.full_like(ids, -100))  # not an answer: nothing triggers
        assert session.trace.reflections == [[]]


def test_text_without_labels():
    model, ids = tiny_model(), torch.randint(FIRST_WORD, 64, (2, 9))
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with look_again(model, config()):
            torch.testing.assert_close(model(input_ids=ids).logits, plain)


def test_padding_on_either_side():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    with look_again(model, config()), torch.no_grad():
        new, _ = generate(model, inputs, reflect_at(*STEPS))
        batch = whole_sequence(inputs, new)
        expected = model(**batch).logits
        names = ("input_ids", "attention_mask", "mm_token_type_ids")
        longer = {name: torch.nn.functional.pad(batch[name], (0, 3)) for name in names}
        longer["labels"] = torch.nn.functional.pad(batch["labels"], (0, 3), value=-100)
        padded = model(**{**batch, **longer}).logits[:, :-3]
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(padded[kept], expected[kept], rtol=1e-5, atol=1e-5)


def gradients(model, batch, checkpoint):
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    model.zero_grad()
    model(**batch).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.gradient_checkpointing_disable()
    model.eval()
    return found


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", ["copy", "route", "route-layer", "copy-reencode"])
def test_gradient_checkpointing_changes_nothing(way):
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    with look_again(model, config(**WAYS[way])):
        new, _ = generate(model, inputs, reflect_at(*STEPS))
        batch = whole_sequence(inputs, new)
        plain = gradients(model, batch, checkpoint=False)
        checkpointed = gradients(model, batch, checkpoint=True)
    off = gradients(model, batch, checkpoint=False)
    assert any(name.startswith("model.visual") for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-6, atol=1e-9)
    name = "model.language_model.layers.0.self_attn.k_proj.weight"
    assert (plain[name] - off[name]).abs().max() > 1e-4


def wrap_layers(model, reentrant):
    """PyTorch's own activation checkpointing, as FSDP users have it."""
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    layers = model.model.language_model.layers
    for number, layer in enumerate(layers):
        layers[number] = checkpoint_wrapper(layer, kind)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", ["copy", "route", "route-layer", "copy-reencode"])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_after_the_session(reentrant, wrapped, way):
    """What is recomputed is what was computed, though the model is its old self again."""
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    with look_again(model, config(**WAYS[way])):
        new, _ = generate(model, inputs, reflect_at(*STEPS))
        batch = whole_sequence(inputs, new)
        expected = gradients(model, batch, checkpoint=False)
        if wrapped:
            wrap_layers(model, reentrant)
        else:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train(not wrapped).zero_grad()  # transformers checkpoints in training mode only
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    assert model.config.text_config._attn_implementation == "sdpa"
    for name, parameter in model.named_parameters():
        gradient = expected[name.replace("_checkpoint_wrapped_module.", "")]
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointing_is_as_before_after_the_session():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    batch = {**inputs, "labels": inputs["input_ids"]}
    model.gradient_checkpointing_enable({"use_reentrant": True})
    layer = model.train().model.language_model.layers[0]
    before = layer._gradient_checkpointing_func
    with look_again(model, config()), look_again(model, config(strategy="off")):
        for _ in range(2):
            model(**batch, use_cache=False).loss.backward()
        twin = copy.deepcopy(model)
    assert layer._gradient_checkpointing_func is before
    held = twin.model.language_model.layers[0]._gradient_checkpointing_func
    assert held.args[0] is twin.config.text_config and held.args[2].func is before.func


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_against_finite_differences():
    """The loss falls along its gradient as fast as the gradient says, re-injections included."""
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    with look_again(model, config()):
        new, _ = generate(model, inputs, reflect_at(*STEPS))
        batch = whole_sequence(inputs, new)
        weight = model.model.language_model.layers[0].self_attn.k_proj.weight
        found = gradients(model, batch, False)[
            "model.language_model.layers.0.self_attn.k_proj.weight"
        ]
        direction, step = found / found.norm(), 1e-2
        losses = []
        with torch.no_grad():
            for sign in (1, -1):
                weight += sign * step * direction
                losses.append(float(model(**batch).loss))
                weight -= sign * step * direction
    slope = (losses[0] - losses[1]) / (2 * step)
    assert slope == pytest.approx(float(found.norm()), rel=1e-2)


def test_processes_that_share_parameters_run_the_same_passes(monkeypatch):
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    new, _ = generate(model, inputs, reflect_at(*STEPS))
    batch = whole_sequence(inputs, new)
    calls = []
    model.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    way = config(**WAYS["route"])
    with look_again(model, way), torch.no_grad():
        alone = model(**batch).logits
        assert len(calls) == 3
        model.model.language_model.norm.weight.ds_id = 1
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda most, _: most.fill_(4))
        calls.clear()
        together = model(**batch).logits
        assert len(calls) == 5
        calls.clear()
        model(**{**batch, "labels": torch.full_like(batch["labels"], -100)})
        assert len(calls) == 5
    assert torch.equal(together, alone)
