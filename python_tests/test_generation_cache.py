"""look_again and what its user does to the cache: crop, pick rows, pass one's own, copy it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from own_loops import CACHES, Loop, crop, drawn, made
from tiny_models import REFLECTION, generate, reflect_at, row_alone, tiny_inputs, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lookagain_ext.cache import CACHE, LookAgainCache
from lookagain_ext.generation import LookAgainConfig, look_again

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [[3, (2, 3), 4], [2, (2, 2), 2, (1, 3), 3]]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
VIRTUAL = {
    "off": {"strategy": "off"},
    "copy": {},
    "one": {"max_reinjections": 1},
    "latest": {"max_reinjections": 2, "keep": "latest"},
    "route": {"strategy": "route", "track_attention": True},
    "route-latest": {
        "strategy": "route",
        "track_attention": True,
        "max_reinjections": 2,
        "keep": "latest",
    },
}
REAL = {
    "append": {"backend": "append", "max_reinjections": 3},
    "append-route": {"backend": "append", "strategy": "route", "track_attention": True},
    "reencode": {"backend": "reencode", "max_reinjections": 3},
}
WAYS = [(way, kind) for way in VIRTUAL for kind in CACHES]
WAYS += [(way, kind) for way in REAL for kind in ("dynamic", "growing", "fixed")]
FIELDS = VIRTUAL | REAL


def config(**fields):
    return LookAgainConfig(**{"reflection_token_id": REFLECTION, **fields})


def same_trace(found, expected):
    for row, other in zip(found.reflections, expected.reflections, strict=True):
        assert len(row) == len(other)
        for one, two in zip(row, other, strict=True):
            assert (one.step, one.key_index, one.shift) == (two.step, two.key_index, two.shift)
            assert torch.equal(one.shown, two.shown) and one.ignored == two.ignored
    if expected.attention is not None:
        torch.testing.assert_close(found.attention, expected.attention, **CLOSE)


@pytest.mark.parametrize(("way", "kind"), WAYS)
def test_a_cropped_cache_goes_on_as_if_it_had_never_been_longer(way, kind):
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    for seed in range(2):
        first, then = drawn(2, 7, seed), drawn(2, 5, seed + 10)
        with look_again(model, config(**FIELDS[way])) as session:
            for removed in (2, 7):
                fresh = Loop(model, inputs, made(kind, model))
                kept = torch.cat([first[:, : 7 - removed], then], dim=1)
                expected, trace = fresh.steps(kept)[:, -5:], session.trace
                loop = Loop(model, inputs, made(kind, model))
                loop.steps(first)
                loop.crop(removed)
                torch.testing.assert_close(loop.steps(then), expected, **CLOSE)
                same_trace(session.trace, trace)


@pytest.mark.parametrize(("way", "kind"), WAYS)
def test_rows_of_a_cache_can_be_picked_and_repeated(way, kind):
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    tokens = drawn(2, 9, 5)
    ways = {
        "reorder_cache": [1, 0],
        "batch_select_indices": [1],
        "batch_repeat_interleave": [0, 0, 1, 1],
    }
    with look_again(model, config(**FIELDS[way])) as session:
        fresh = Loop(model, inputs, made(kind, model))
        expected, trace = fresh.steps(tokens), session.trace
        for method, rows in ways.items():
            if kind == "static" and method != "reorder_cache":
                continue  # transformers' static layer has no other
            index = torch.tensor(rows)
            for steps in (0, 4):
                loop = Loop(model, inputs, made(kind, model))
                if steps:
                    loop.steps(tokens[:, :steps])
                getattr(loop.cache, method)(2 if "repeat" in method else index)
                loop.pick(index)
                found = loop.steps(tokens[index, steps:])
                torch.testing.assert_close(found, expected[index, steps:], **CLOSE)
                picked = [trace.reflections[row] for row in rows]
                for row, other in zip(session.trace.reflections, picked, strict=True):
                    assert [r.key_index for r in row] == [r.key_index for r in other]
                    assert [r.shown.sum() for r in row] == [r.shown.sum() for r in other]


@pytest.mark.parametrize("kind", CACHES[::2])
def test_one_prompt_for_several_samples(kind):
    model, inputs = tiny_model(), row_alone(tiny_inputs(ROWS), 0)
    tokens = drawn(3, 6, 1)
    with look_again(model, config()):
        expected = [Loop(model, inputs, made(kind, model)).steps(row[None])[0] for row in tokens]
        loop = Loop(model, inputs, made(kind, model))
        loop.cache.batch_repeat_interleave(3)
        loop.pick(torch.tensor([0, 0, 0]))
        torch.testing.assert_close(loop.steps(tokens), torch.stack(expected), **CLOSE)


@pytest.mark.parametrize("kind", CACHES)
def test_a_cropped_cache_takes_another_turn(kind):
    """Back into the first answer after a second one; and generate goes on after a crop."""
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    answer, turn, second = drawn(2, 5, 1), drawn(2, 3, 2, 0), drawn(2, 4, 3)
    with look_again(model, config(max_reinjections=3)) as session:
        fresh = Loop(model, inputs, made(kind, model))
        fresh.steps(answer[:, :3])
        expected = fresh.feed(turn), fresh.steps(second)
        trace = session.trace
        loop = Loop(model, inputs, made(kind, model))
        loop.steps(answer)
        loop.feed(turn)
        loop.steps(second)
        loop.crop(3 + 4 + 2)
        found = loop.feed(turn), loop.steps(second)
        torch.testing.assert_close(found, expected, **CLOSE)
        same_trace(session.trace, trace)
        loop.crop(4 + 3)
        ids = torch.cat([inputs["input_ids"], answer[:, :3], turn], dim=1)
        options = {"attention_mask": torch.nn.functional.pad(loop.mask, (0, 3), value=1)}
        options |= {"input_ids": ids, "disable_compile": True}
        _, logits = generate(model, options, reflect_at([], []), 3, **{CACHE: loop.cache})
        torch.testing.assert_close(logits[:, 0].double(), expected[0], **CLOSE)


@pytest.mark.parametrize("fields", [{}, {"route_scope": "layer", "track_attention": True}], ids=str)
def test_route_says_when_it_cannot_take_attention_back(fields):
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    tokens = drawn(2, 5, 1, 0)
    reflect = torch.full((2, 1), REFLECTION)
    with look_again(model, config(strategy="route", **fields)):
        fresh = Loop(model, inputs, DynamicCache())
        fresh.steps(tokens)
        expected = fresh.feed(reflect)
        loop = Loop(model, inputs, DynamicCache())
        loop.steps(tokens)
        loop.crop(2)
        plain = loop.steps(tokens[:, 3:])  # nothing is chosen here
        with pytest.raises(ValueError, match="the cache was cropped within the answer"):
            loop.feed(reflect)
        assert plain.isfinite().all()
        loop = Loop(model, inputs, DynamicCache())
        loop.steps(drawn(2, 5, 2))
        loop.crop(5)
        loop.steps(tokens)
        torch.testing.assert_close(loop.feed(reflect), expected, **CLOSE)


@pytest.mark.parametrize(
    ("backend", "kind"), [("virtual", kind) for kind in CACHES] + [("append", "growing")]
)
def test_a_prompt_can_be_cropped(backend, kind):
    """Also of pictures, when it was given with a cache."""
    model, inputs = tiny_model(), tiny_inputs([[2, (2, 2), 2, (1, 3), 3]])
    words, tokens = drawn(1, 2, 3, 0), drawn(1, 6, 4)
    with look_again(model, config(backend=backend)) as session:
        for left in (15, 10):  # after both pictures; between them
            named = ("input_ids", "attention_mask", "mm_token_type_ids")
            short = {n: x[:, :left] if n in named else x for n, x in inputs.items()}
            if left == 10:
                short["image_grid_thw"] = inputs["image_grid_thw"][:1]
                short["pixel_values"] = inputs["pixel_values"][:16]
            fresh = Loop(model, short, made(kind, model))
            place = fresh.mask, fresh.last
            expected = fresh.feed(words), fresh.steps(tokens)
            trace = session.trace
            loop = Loop(model, inputs, made(kind, model))
            loop.steps(tokens)
            crop(loop.cache, loop.mask.shape[1] - left)
            loop.mask, loop.last = place
            found = loop.feed(words), loop.steps(tokens)
            torch.testing.assert_close(found, expected, **CLOSE)
            same_trace(session.trace, trace)


def test_what_cannot_be_followed_is_refused():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    tokens = drawn(2, 2, 1)
    with look_again(model, config()):
        loop = Loop(model, inputs, DynamicCache())
        with pytest.raises(ValueError, match="must have a row for each of the 2 that .* got 1"):
            loop.feed(tokens[:1])
        for layer in loop.cache.layers:
            layer.keys = layer.keys + 1
        with pytest.raises(ValueError, match="keys in the cache are not those"):
            loop.feed(tokens)
        loop = Loop(model, inputs, DynamicCache())
        with torch.no_grad():
            embeds = model.get_input_embeddings()(tokens)
            model.model.language_model(inputs_embeds=embeds, **{CACHE: loop.cache})
        with pytest.raises(ValueError, match="has 20 tokens, and look_again saw only 18"):
            loop.feed(tokens)

        class Other(DynamicLayer):
            """A layer of another library's."""

        cache = DynamicCache()
        cache.layer_class_to_replicate = Other
        loop = Loop(model, inputs, cache)
        loop.steps(tokens)
        cache.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(ValueError, match="the rows of a DynamicCache with Others were changed"):
            loop.feed(tokens)
        out = model(**inputs, use_cache=True)
        out[CACHE].crop(-10)
        with pytest.raises(ValueError, match="cropped to 8 tokens, within or before a picture"):
            model(input_ids=tokens[:, :1], **{CACHE: out[CACHE]})
    with look_again(model, config(backend="reencode")):
        loop = Loop(model, inputs, DynamicCache())
        loop.crop(10)
        with pytest.raises(ValueError, match="within or before a picture, .* under 'reencode'"):
            loop.feed(tokens)
        with pytest.raises(ValueError, match="got DynamicCache with offloading"):
            Loop(model, inputs, DynamicCache(offloading=True))


@pytest.mark.parametrize("fields", REAL.values(), ids=REAL)
def test_ones_own_dynamic_cache_takes_real_rows(fields):
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    tokens = drawn(2, 8, 3)
    with look_again(model, config(**fields)) as session:
        expected = Loop(model, inputs, LookAgainCache(2)).steps(tokens)
        trace = session.trace
        loop = Loop(model, inputs, DynamicCache())
        torch.testing.assert_close(loop.steps(tokens), expected, **CLOSE)
        assert loop.cache.get_seq_length() == 18 + 8
        same_trace(session.trace, trace)

        def two_turns(cache):
            new, first = generate(model, inputs, reflect_at([1], [2]), 4, **{CACHE: cache})
            ids = torch.cat([inputs["input_ids"], new, tokens[:, :2]], dim=1)
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 6), value=1)
            more = {"input_ids": ids, "attention_mask": mask}
            return first, generate(model, more, reflect_at([1], []), 4, **{CACHE: cache})[1]

        torch.testing.assert_close(two_turns(DynamicCache()), two_turns(LookAgainCache(2)), **CLOSE)


@pytest.mark.parametrize(
    ("backend", "kind"),
    [("virtual", kind) for kind in CACHES] + [("append", "fixed"), ("reencode", "growing")],
)
def test_a_copied_cache_has_its_own_state_and_no_model(backend, kind):
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    tokens, other = drawn(2, 6, 1), drawn(2, 5, 2)
    with look_again(model, config(backend=backend)):
        loop = Loop(model, inputs, made(kind, model))
        loop.steps(tokens[:, :3])
        held = len(pickle.dumps(loop.cache))
        buffers = sum(2 * x.keys.numel() * x.keys.element_size() for x in loop.cache.layers)
        assert held < 3 * buffers + 40_000 < weights + 3 * buffers
        mask, last, original = loop.mask, loop.last, loop.cache
        copies = copy.deepcopy(original), pickle.loads(pickle.dumps(original))
        loop.steps(other)
        for cache in (*copies, original):
            if cache is original:
                crop(cache, 5)
            loop.cache, loop.mask, loop.last = cache, mask, last
            fresh = Loop(model, inputs, made(kind, model))
            torch.testing.assert_close(
                loop.steps(tokens[:, 3:]), fresh.steps(tokens)[:, 3:], **CLOSE
            )
        if backend == "virtual":
            cache = model(**inputs, use_cache=True)[CACHE]
            assert len(pickle.dumps(cache)) < weights / 2


class Reads(TorchDispatchMode):
    """Counts what a GPU would have to be waited for."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.total += function._schema.name in ("aten::_local_scalar_dense", "aten::nonzero")
        self.total += function._schema.name == "aten::equal"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", VIRTUAL)
@pytest.mark.parametrize("kind", CACHES)
def test_a_step_reads_nothing_where_that_would_wait(kind, way, monkeypatch):
    """And yet a cropped or reset cache is noticed: its counter was written to."""
    monkeypatch.setattr("lookagain_ext.rollout.is_unread", lambda _: True)
    monkeypatch.setattr("lookagain_ext.bookmark.is_host", lambda _: False)
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    tokens = drawn(2, 6, 1)

    def reads():
        loop = Loop(model, inputs, made(kind, model))
        with Reads() as counted:
            logits = loop.steps(tokens)
        return counted.total, logits, loop

    monkeypatch.setattr("lookagain_ext.cache.LookAgainLayer._check_room", lambda *_: None)
    monkeypatch.setattr("lookagain_ext.attention._is_read", lambda _: False)
    with look_again(model, config(**VIRTUAL[way])):
        found, expected, loop = reads()
        assert found == 0
        loop.crop(6)
        torch.testing.assert_close(loop.steps(tokens), expected, **CLOSE)
        loop.cache.reset()
        if kind != "dynamic":
            again = Loop(model, inputs, loop.cache).steps(tokens)
            torch.testing.assert_close(again, expected, **CLOSE)
