"""What look_again adds to a step of generate: operations, each a launch on a GPU."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import parse
from tiny_models import REFLECTION, generate, reflect_at, tiny_inputs, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from lookagain_ext import rollout
from lookagain_ext.generation import LookAgainConfig, look_again

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [[3, (2, 3), 4], [2, (2, 2), 2, (1, 3), 3]]
EVEN = [[3, (2, 3), 4], [2, (2, 3), 5]]
STEPS = [[0, 2, 6], [4]]
ADDED = {
    "off": ({"strategy": "off"}, 12),
    "copy": ({}, 19),
    "route": ({"strategy": "route"}, 27),
    "route_tracked": ({"strategy": "route", "track_attention": True}, 29),
    "route_layer": ({"strategy": "route", "route_scope": "layer"}, 33),
}
"""Operations that a step may have more than the unpatched model's, apart from attention."""
# Before 5.23 generate kept a mask of ones, from which each layer then reads where its rows begin.
OF_A_LAYER = 0 if parse(transformers.__version__) >= parse("5.23") else 3


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Where values cannot be looked at without waiting, a step does the same whatever it holds."""
    monkeypatch.setattr(rollout, "is_unread", lambda _: True)


def config(**fields):
    return LookAgainConfig(**{"reflection_token_id": REFLECTION, **fields})


class Count(TorchDispatchMode):
    """Counts operations that do something: neither views nor memory nor attention."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returns = function._schema.returns
        view = returns and returns[0].alias_info is not None and not returns[0].alias_info.is_write
        name = function._schema.name
        if not view and "empty" not in name and "attention" not in name and "detach" not in name:
            self.total += 1
        return function(*args, **(kwargs or {}))


def operations_of_a_step(model, inputs):
    """Those of the steps between the fourth and the eighth token, on average."""

    def count(steps):
        with Count() as counted:
            model.generate(**inputs, do_sample=False, min_new_tokens=steps, max_new_tokens=steps)
        return counted.total

    return (count(8) - count(4)) / 4


@pytest.mark.parametrize("name", ADDED)
def test_a_step_adds_few_operations_and_none_to_a_layer(name, as_on_a_device):
    fields, most = ADDED[name]
    added = []
    for layers in (1, 3):
        model, inputs = tiny_model(layers=layers, dtype=torch.float32), tiny_inputs(EVEN)
        inputs["pixel_values"] = inputs["pixel_values"].float()
        plain = operations_of_a_step(model, inputs)
        with look_again(model, config(**fields)):
            added.append(operations_of_a_step(model, inputs) - plain)
    assert added[0] <= most + OF_A_LAYER, added
    assert added[1] <= added[0] + 2 * OF_A_LAYER, added


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"strategy": "off"},
        {"strategy": "off", "track_attention": True},
        {"max_reinjections": 1},
        {"max_reinjections": 1, "keep": "latest", "strategy": "route"},
        {"strategy": "route", "track_attention": True},
        {"strategy": "route", "route_scope": "layer"},
        {"strategy": "route", "backend": "append"},
        {"strategy": "route", "backend": "append", "route_scope": "layer"},
    ],
    ids=str,
)
def test_steps_that_do_not_look_at_values_do_the_same(fields, monkeypatch):
    model, inputs = tiny_model(), tiny_inputs([*ROWS, [6]])
    found = []
    for unread in (False, True):
        if unread:
            monkeypatch.setattr(rollout, "is_unread", lambda _: True)
        with look_again(model, config(**fields)) as session:
            found.append((*generate(model, inputs, reflect_at(*STEPS, [3])), session.trace))
    (new, logits, trace), (other, other_logits, other_trace) = found
    assert torch.equal(new, other)
    assert torch.equal(logits, other_logits)
    assert trace.summary() == other_trace.summary()
    for row, other_row in zip(trace.reflections, other_trace.reflections, strict=True):
        for reflection, again in zip(row, other_row, strict=True):
            assert torch.equal(reflection.shown, again.shown)
            assert (reflection.step, reflection.key_index) == (again.step, again.key_index)
            if reflection.mass_before is not None:
                assert torch.equal(reflection.mass_before, again.mass_before)
