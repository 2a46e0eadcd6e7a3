"""Under autocast rotary embedding leaves queries and keys in float32, and values lower."""

from __future__ import annotations

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
from transformers import DynamicCache

from lookagain_ext import LookAgainCache, LookAgainConfig, RoutedAttention, look_again, ops

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [[3, (2, 3), 4], [2, (2, 2), 2, (1, 3), 3]]
STEPS = [[2, 6], [4]]


def config(**fields):
    return LookAgainConfig(**{"reflection_token_id": REFLECTION, **fields})


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.fixture
def kernel_dtypes(monkeypatch):
    """The dtypes that reach the kernel."""
    seen, kernel = set(), ops.routed_attention

    def watched(query, key, value, *args, **keywords):
        seen.update((query.dtype, key.dtype, value.dtype))
        return kernel(query, key, value, *args, **keywords)

    monkeypatch.setattr(ops, "routed_attention", watched)
    return seen


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("checkpoint", [None, {"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("backend", ["virtual", "reencode"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training(family, backend, checkpoint, kernel_dtypes):
    model, inputs = tiny_model(family, torch.float32), tiny_inputs(ROWS, torch.float32)
    weight = model.model.language_model.layers[0].self_attn.k_proj.weight
    with look_again(model, config(backend=backend)) as session:
        new, _ = generate(model, inputs, reflect_at(*STEPS))
        batch = whole_sequence(inputs, new)
        exact = model(**batch, use_cache=False).loss
        exact.backward()
        expected, weight.grad = weight.grad, None
        if checkpoint:
            model.gradient_checkpointing_enable(checkpoint)
            model.enable_input_require_grads()
        kernel_dtypes.clear()
        with autocast():
            loss = model.train()(**batch, use_cache=False).loss
        loss.backward()
        assert [len(row) for row in session.trace.reflections] == [2, 1]
    assert kernel_dtypes == {torch.bfloat16}
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=2e-2)
    assert (weight.grad - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("backend", ["virtual", "append", "reencode"])
@pytest.mark.parametrize("strategy", ["copy", "route"])
def test_decoding_is_the_full_forward(strategy, backend, kernel_dtypes):
    model, inputs = tiny_model(dtype=torch.float32), tiny_inputs(ROWS, torch.float32)
    prompt = inputs["input_ids"].shape[1]
    fields = {"strategy": strategy, "backend": backend, "route_ratio": 0.4}
    with look_again(model, config(**fields)) as session, autocast(), torch.no_grad():
        new, decoded = generate(model, inputs, reflect_at(*STEPS))
        assert [len(row) for row in session.trace.reflections] == [2, 1]
        full = model(**whole_sequence(inputs, new), use_cache=False).logits[:, prompt - 1 : -1]
    assert kernel_dtypes == {torch.bfloat16}
    assert (full.float() - decoded).norm() < 0.05 * decoded.norm()


@pytest.mark.parametrize("make", [lambda: None, DynamicCache, lambda: LookAgainCache(1)])
def test_routed_attention(make):
    torch.manual_seed(0)
    module, hidden = RoutedAttention(32, 4, 2), torch.randn(2, 6, 32)
    expected, _ = module(hidden)
    with autocast():
        out, _ = module(hidden, cache=make())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=5e-2, atol=2e-2)


def test_float64_stays():
    module, hidden = RoutedAttention(32, 4, 2, dtype=torch.float64), torch.randn(1, 6, 32).double()
    expected, _ = module(hidden)
    with autocast():
        assert torch.equal(module(hidden, past_key_values=LookAgainCache(1))[0], expected)


def test_devices_without_autocast():
    keys, _ = LookAgainCache(1).update(*torch.zeros(2, 1, 2, 3, 8, device="meta"), 0)
    assert keys.device.type == "meta"
