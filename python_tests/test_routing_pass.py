"""ROUTE's pass for the visual mass ends in the last layer's attention, where nothing forbids it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tiny_models import (
    FAMILIES,
    REFLECTION,
    generate,
    reflect_at,
    tiny_inputs,
    tiny_model,
    whole_sequence,
)

from lookagain_ext import layer_routing, sequence_forward
from lookagain_ext.generation import LookAgainConfig, look_again
from lookagain_ext.reencode import is_sharded

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [[3, (2, 3), 4], [2, (2, 2), 2, (1, 3), 3]]
STEPS = [[2, 6], [4]]
BACKENDS = ("virtual", "append", "reencode")


def route(backend="virtual"):
    return LookAgainConfig(
        strategy="route", route_ratio=0.4, backend=backend, reflection_token_id=REFLECTION
    )


def example(family="qwen2_5_vl", dtype=torch.float32, layers=3):
    """A model and a batch that takes two passes."""
    model, inputs = tiny_model(family, dtype, layers=layers), tiny_inputs(ROWS, dtype)
    new, _ = generate(model, inputs, reflect_at(*STEPS))
    return model, whole_sequence(inputs, new)


def count(model, place):
    """Calls of a module of the last layer, without touching what runs after it."""
    calls = []
    layer = model.model.language_model.layers[-1]
    layer.get_submodule(place).register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def outcome(model, batch, backend="virtual"):
    """(logits, mass, selection) of one forward."""
    with look_again(model, route(backend)) as session, torch.no_grad():
        logits = model(**batch).logits
        forward = session._engine._latest
    return logits, forward.mass, forward.selected


def to_the_end(monkeypatch):
    monkeypatch.setattr(sequence_forward, "last_attention", lambda decoder: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits(family, backend, dtype, monkeypatch):
    model, batch = example(family, dtype)
    entered, mlp, projected = (count(model, p) for p in ("self_attn", "mlp", "self_attn.o_proj"))
    short = outcome(model, batch, backend)
    assert (len(entered), len(mlp), len(projected)) == (3, 1, 1)
    to_the_end(monkeypatch)
    whole = outcome(model, batch, backend)
    assert (len(entered), len(mlp), len(projected)) == (6, 4, 4)
    assert short[1].any() and short[2].any() and not short[2].all()
    assert torch.equal(short[0], whole[0]) and torch.equal(short[2], whole[2])
    if dtype == torch.float64:  # the log-sum-exp that attention returns is float32
        torch.testing.assert_close(short[1], whole[1], rtol=1e-6, atol=0)
    else:
        assert torch.equal(short[1], whole[1])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(reentrant, backend, monkeypatch):
    model, batch = example(dtype=torch.float64)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    mlp = count(model, "mlp")

    def gradients():
        model.zero_grad()
        with look_again(model, route(backend)):
            model(**batch, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    short = gradients()
    assert len(mlp) == 2  # the forward and what the backward computes again
    to_the_end(monkeypatch)
    whole = gradients()
    assert len(mlp) == 2 + 4
    assert all(torch.equal(a, b) for a, b in zip(short, whole, strict=True))


def test_with_adapters(monkeypatch):
    model, batch = example()
    peft = pytest.importorskip("peft", reason="needs the extra 'train'")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "o_proj", "down_proj"])
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    mlp = count(model, "mlp")
    short = outcome(adapted, batch)
    assert len(mlp) == 1
    to_the_end(monkeypatch)
    for found, expected in zip(short, outcome(adapted, batch), strict=True):
        assert torch.equal(found, expected)


def hooked_by_accelerate(model):
    hooks = pytest.importorskip("accelerate.hooks", reason="needs the extra 'train'")
    hooks.add_hook_to_module(model.model.language_model.layers[-1], hooks.ModelHook())


def hooked_by_a_user(model):
    model.model.language_model.layers[-1].register_forward_hook(lambda *_: None)


def sharded(model):
    model.model.language_model.norm.weight.ds_id = 1


def sharded_with_plain_parameters(model):
    model.model.language_model.layers[0]._is_fsdp_managed_module = True


def looped(model):
    layers = model.model.language_model.layers
    layers[1] = layers[2]


@pytest.mark.parametrize(
    "waits",
    [hooked_by_accelerate, hooked_by_a_user, sharded, sharded_with_plain_parameters, looped],
)
def test_what_waits_for_the_end_gets_it(waits):
    model, batch = example()
    short = outcome(model, batch) if waits is not looped else None
    waits(model)
    mlp = count(model, "mlp")
    whole = outcome(model, batch)
    assert len(mlp) == (6 if waits is looped else 3)
    assert is_sharded(model.model.language_model) == waits.__name__.startswith("sharded")
    if short is not None:
        assert all(torch.equal(a, b) for a, b in zip(short, whole, strict=True))


def test_global_hooks_get_their_end():
    model, batch = example()
    mlp = count(model, "mlp")
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        outcome(model, batch)
    finally:
        handle.remove()
    assert len(mlp) == 3
    outcome(model, batch)
    assert len(mlp) == 3 + 1


def test_compiled_layers_give_the_same(monkeypatch):
    """Within a compiled frame nothing is ended: Dynamo would give a layer up that raises."""
    model, batch = example()
    short = outcome(model, batch)
    last = model.model.language_model.layers[-1].self_attn
    probe = layer_routing.MassProbe(torch.empty(0), torch.empty(0), last)
    assert probe.ends_at(last)
    with monkeypatch.context() as patched:
        patched.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not probe.ends_at(last)
    torch._dynamo.utils.counters.clear()
    for layer in model.model.language_model.layers:
        layer.compile(backend="eager")
    whole = outcome(model, batch)
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] == frames["total"] > 0
    for one, other in zip(short, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [list(getattr(m, kind)) for m in model.modules() for kind in kinds]


def test_nothing_stays_behind():
    """Neither hooks nor activations, though a layer was left by an exception, or by an error."""
    model, batch = example()
    before = hooks(model)
    seen = []

    def note(module, args, keywords):
        hidden = args[0] if args else keywords["hidden_states"]
        seen.append(weakref.ref(hidden))

    layer = model.model.language_model.layers[-1]
    handle = layer.register_forward_pre_hook(note, with_kwargs=True)
    gc.collect()
    gc.disable()
    try:
        outcome(model, batch)
        alive = [ref() is not None for ref in seen]
    finally:
        gc.enable()
    handle.remove()
    assert len(alive) == 3 and not any(alive)
    assert hooks(model) == before

    def fail(*_):
        raise RuntimeError("out of luck")

    handle = layer.self_attn.q_proj.register_forward_pre_hook(fail)
    with look_again(model, route()), torch.no_grad():
        with pytest.raises(RuntimeError, match="out of luck"):
            model(**batch)
        handle.remove()
        model(**batch)
    assert hooks(model) == before
