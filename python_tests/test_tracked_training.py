"""track_attention in a training forward: the backward counts what the answers attended."""

from __future__ import annotations

import copy

import pytest
import torch
from test_packing import ROWS as PACKED_ROWS
from test_packing import pack, sequences
from test_training_forward import ROWS, STEPS, WAYS, config, wrap_layers
from tiny_models import FAMILIES, generate, reflect_at, tiny_inputs, tiny_model, whole_sequence

from lookagain_ext.generation import look_again

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
TRACKED = [way for way in WAYS if not way.endswith("reencode")]


def padded_batch(model, way):
    """Two rows of different prompts and answers, padded on the left and on the right."""
    inputs = tiny_inputs(ROWS)
    with look_again(model, config(**WAYS[way])):
        new, _ = generate(model, inputs, reflect_at(*STEPS))
    batch = whole_sequence(inputs, new)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        batch[name] = torch.nn.functional.pad(batch[name], (0, 3))
    batch["labels"] = torch.nn.functional.pad(batch["labels"], (0, 3), value=-100)
    batch["labels"][0, -6:] = -100  # an answer that is shorter
    return batch


def without_gradients(model, tracked, batch):
    """Mean attention of all answer tokens together, each read in a forward."""
    with look_again(model, tracked) as session, torch.no_grad():
        model(**batch, use_cache=False)
        return session.trace.attention_map.sum(1)


def assert_counted(trace, wanted, batch):
    assert trace.answer_attention.dtype == torch.float32
    torch.testing.assert_close(trace.answer_attention, wanted, rtol=1e-5, atol=1e-6)
    tokens = (batch["labels"] != -100).sum(1)
    assert torch.equal(trace.answer_tokens, tokens)
    assert trace.answer_share == pytest.approx(float(wanted.sum() / tokens.sum()), rel=1e-5)
    assert 0 < trace.answer_share < 1


@pytest.mark.parametrize("way", TRACKED)
@pytest.mark.parametrize("family", FAMILIES)
def test_backward_counts_what_a_forward_reads(family, way):
    model = tiny_model(family)
    batch = padded_batch(model, way)
    tracked = config(**WAYS[way], track_attention=True)
    wanted = without_gradients(model, tracked, batch)
    with look_again(model, tracked) as session:
        loss = model(**batch, use_cache=False).loss
        assert session.trace.answer_attention is None and session.trace.answer_share is None
        loss.backward()
        assert_counted(session.trace, wanted, batch)
        assert session.trace.attention is None
        model(**batch, use_cache=False)
        assert session.trace.answer_attention is None  # of the latest forward


@pytest.mark.parametrize("way", ["copy", "route", "route-layer", "off"])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_layer_counts_once(reentrant, wrapped, way):
    """Also when the session is over by then."""
    model = tiny_model()
    batch = padded_batch(model, way)
    tracked = config(**WAYS[way], track_attention=True)
    wanted = without_gradients(model, tracked, batch)
    if wrapped:
        wrap_layers(model, reentrant)
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train(not wrapped)
    ran = []
    layer = model.model.language_model.layers[0]
    layer = layer._checkpoint_wrapped_module if wrapped else layer
    layer.self_attn.register_forward_hook(lambda *_: ran.append(1))
    with look_again(model, tracked) as session:
        loss = model(**batch, use_cache=False).loss
    passes = len(ran)
    loss.backward()
    assert len(ran) == passes + 1  # it was computed again
    assert_counted(session.trace, wanted, batch)


@pytest.mark.parametrize("way", ["copy", "route-layer", "off"])
def test_gradients_keep_their_bits(way):
    model = tiny_model()
    batch, found = padded_batch(model, way), []
    for tracked in (False, True):
        model.zero_grad()
        with look_again(model, config(**WAYS[way], track_attention=tracked)):
            model(**batch, use_cache=False).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_mean_over_the_layers_that_the_backward_runs_through():
    model = tiny_model()
    batch = padded_batch(model, "copy")
    tracked = config(track_attention=True)
    both = without_gradients(model, tracked, batch)
    lower = copy.deepcopy(model)
    lower.model.language_model.layers = lower.model.language_model.layers[:1]
    lower.config.text_config.num_hidden_layers = 1
    first = without_gradients(lower, tracked, batch)
    model.requires_grad_(False)
    model.model.language_model.layers[1].requires_grad_(True)
    with look_again(model, tracked) as session:
        model(**batch, use_cache=False).loss.backward()
        assert_counted(session.trace, 2 * both - first, batch)
    assert (both - first).abs().max() > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("way", ["copy", "route", "route-layer", "off"])
def test_packed_sequences(way, batch, checkpointing):
    model = tiny_model()
    alone = sequences(model, tiny_inputs(PACKED_ROWS))
    tracked = config(**WAYS[way], track_attention=True)
    packed = pack(alone, batch)
    wanted = [without_gradients(model, tracked, one)[0] for one in alone]
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    with look_again(model, tracked) as session:
        model(**packed, use_cache=False).loss.backward()
        trace = session.trace
    found = trace.answer_attention
    if batch == 2:  # without the filling of the shorter row
        assert len(found) == len(alone) + 1
        filled = [n for n, tokens in enumerate(trace.answer_tokens.tolist()) if not tokens]
        found = found[[n for n in range(len(found)) if n not in filled]]
    for row, one in zip(found, wanted, strict=True):
        torch.testing.assert_close(row[: len(one)], one, rtol=1e-5, atol=1e-6)
        assert not row[len(one) :].any()


@pytest.mark.parametrize("way", ["copy-reencode", "route-reencode"])
def test_re_encoded_sequences_are_not_tracked(way):
    model = tiny_model()
    batch = padded_batch(model, way)
    with look_again(model, config(**WAYS[way], track_attention=True)) as session:
        model(**batch, use_cache=False).loss.backward()
        assert session.trace.answer_attention is None


def test_nothing_trains():
    model = tiny_model().requires_grad_(False)
    batch = padded_batch(model, "copy")
    with look_again(model, config(track_attention=True)) as session:
        model(**batch, use_cache=False)
        assert session.trace.answer_attention is None


def test_text_alone_has_no_picture():
    model = tiny_model()
    ids = torch.randint(8, 64, (2, 9))
    with look_again(model, config(track_attention=True)) as session:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert session.trace.answer_attention.shape == (2, 0)
        assert session.trace.answer_share == 0


def test_compiled_layers_train_uncounted():
    model = tiny_model(dtype=torch.float32)
    batch = padded_batch(model, "copy")
    batch["pixel_values"] = batch["pixel_values"].float()
    layers = model.model.language_model.layers
    layers[0].compile(backend="eager")
    tracked = config(track_attention=True)
    with look_again(model, tracked) as session:
        model(**batch, use_cache=False).loss.backward()
        found = session.trace
        assert set(session._engine._latest.backward_probe.passes) == {1}  # the other layer
    assert found.answer_attention is not None
    assert all(p.grad is not None for p in layers[0].parameters())


def test_summary_tells_the_share():
    model = tiny_model()
    batch = padded_batch(model, "copy")
    with look_again(model, config(track_attention=True)) as session:
        model(**batch, use_cache=False).loss.backward()
        trace = session.trace
    share = trace.answer_attention[0].sum() / trace.answer_tokens[0]
    assert f"Mean attention on visual tokens: {share:.1%}." in trace.summary()


def test_differentiated_again_it_is_the_same_share():
    """A second backward, and one layer's alone before all: no layer weighs more for it."""
    model = tiny_model()
    batch = padded_batch(model, "copy")
    shares = []
    for ways in (["all"], ["all", "all"], ["upper", "all"]):
        model.zero_grad()
        with look_again(model, config(track_attention=True)) as session:
            loss = model(**batch, use_cache=False).loss
            upper = model.model.language_model.layers[1].self_attn.q_proj.weight
            for way in ways:
                if way == "upper":
                    torch.autograd.grad(loss, upper, retain_graph=True)
                else:
                    loss.backward(retain_graph=True)
            shares.append(session.trace.answer_share)
    assert 0 < shares[0] < 1
    assert shares == pytest.approx([shares[0]] * 3, rel=1e-5)


def test_under_another_default_dtype():
    model = tiny_model()
    batch = padded_batch(model, "copy")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with look_again(model, config(track_attention=True)) as session:
            model(**batch, use_cache=False).loss.backward()
            assert session.trace.answer_attention.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def test_padding_is_no_part_of_an_answer():
    """Without labels all that follows the picture counts, but for what the mask leaves out."""
    model = tiny_model()
    batch = padded_batch(model, "copy")
    batch.pop("labels")
    found = []
    for masked in (3, 5):
        batch["attention_mask"][:, -masked:] = 0
        with torch.no_grad(), look_again(model, config(track_attention=True)) as session:
            model(**batch, use_cache=False)
            found.append(session.trace.answer_tokens)
    assert torch.equal(found[0], found[1] + 2)
