"""look_again with static caches, and under torch.compile without a graph break."""

from __future__ import annotations

import pytest
import torch
from tiny_models import REFLECTION, generate, reflect_at, tiny_inputs, tiny_model
from transformers import CompileConfig, StaticCache

from lookagain_ext.cache import CACHE, LookAgainCache
from lookagain_ext.generation import LookAgainConfig, look_again

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [[3, (2, 3), 4], [2, (2, 2), 2, (1, 3), 3]]
STEPS = [[2, 6], [4]]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def config(**fields):
    return LookAgainConfig(**{"reflection_token_id": REFLECTION, **fields})


def compiled():
    options = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager", mode=None)
    options._compile_all_devices = True
    return options


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("fields", [{}, {"strategy": "route"}], ids=["copy", "route"])
@pytest.mark.parametrize("kind", ["static", "lookagain", "growing"])
def test_static_cache_is_the_dynamic_one(kind, fields):
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    caches = {
        "static": lambda: StaticCache(model.config.text_config, max_cache_len=40),
        "lookagain": lambda: LookAgainCache(2, max_length=40),
        "growing": lambda: LookAgainCache(2),
    }
    with look_again(model, config(**fields, track_attention=True)) as session:
        new, logits = generate(model, inputs, reflect_at(*STEPS))
        attention = session.trace.attention
        options = {CACHE: caches[kind](), "disable_compile": True}
        found, found_logits = generate(model, inputs, reflect_at(*STEPS), **options)
        assert torch.equal(new, found)
        torch.testing.assert_close(found_logits, logits, **CLOSE)
        torch.testing.assert_close(session.trace.attention, attention, **CLOSE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "fields",
    [{}, {"strategy": "route"}, {"backend": "append"}],
    ids=["copy", "route", "append"],
)
def test_one_graph_for_all_steps_and_calls(fields):
    model = tiny_model()
    first, second = tiny_inputs(ROWS), tiny_inputs(ROWS, seed=2)
    with look_again(model, config(**fields, track_attention=True)) as session:
        for inputs, steps in ((first, STEPS), (second, [[1, 3, 5], []])):
            new, logits = generate(model, inputs, reflect_at(*steps))
            expected = session.trace
            options = {"compile_config": compiled()}
            if "backend" in fields:
                options[CACHE] = LookAgainCache(2, max_length=40, reserve=60)
            else:
                options["cache_implementation"] = "static"
            found, found_logits = generate(model, inputs, reflect_at(*steps), **options)
            assert torch.equal(new, found)
            torch.testing.assert_close(found_logits, logits, **CLOSE)
            assert session.trace.summary() == expected.summary()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_notices_sessions_come_and_go():
    model, inputs = tiny_model(layers=1), tiny_inputs(ROWS)
    options = {"cache_implementation": "static", "compile_config": compiled()}
    _, plain = generate(model, inputs, reflect_at(*STEPS), **options)
    for fields in ({"strategy": "copy"}, {"strategy": "off"}):
        with look_again(model, config(**fields)):
            _, eager = generate(model, inputs, reflect_at(*STEPS))
            _, logits = generate(model, inputs, reflect_at(*STEPS), **options)
        torch.testing.assert_close(logits, eager, **CLOSE)
    _, again = generate(model, inputs, reflect_at(*STEPS), **options)
    torch.testing.assert_close(again, plain, **CLOSE)


def test_append_refuses_a_cache_that_it_cannot_write_to():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    with look_again(model, config(backend="append")):
        with pytest.raises(ValueError, match="LookAgainCache, got StaticCache"):
            generate(model, inputs, reflect_at(*STEPS), cache_implementation="static")
        # Reserved for one re-injection of 7 tokens in each row; the next config wants eight.
        small = LookAgainCache(2, max_length=32)
    with look_again(model, config(backend="append", max_reinjections=1)):
        generate(model, inputs, reflect_at(*STEPS), **{CACHE: small}, disable_compile=True)
    small.reset()
    with look_again(model, config(backend="append")):
        with pytest.raises(ValueError, match="reserve=7, and 56 slots are needed"):
            options = {CACHE: small, "disable_compile": True}
            generate(model, inputs, reflect_at([1, 2, 3, 4], [1]), **options)
