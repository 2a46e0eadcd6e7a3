"""look_again in generate(): the oracles that any implementation must meet."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny_models import (
    END,
    EOS,
    FAMILIES,
    IMAGE,
    PAD,
    REFLECTION,
    START,
    VIDEO,
    ForceTokens,
    generate,
    reflect_at,
    row_alone,
    tiny_inputs,
    tiny_model,
    whole_sequence,
)
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, TextStreamer

from lookagain_ext.cache import CACHE, LookAgainCache
from lookagain_ext.generation import LookAgainConfig, look_again
from lookagain_ext.visual import NEVER

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [[3, (2, 3), 4], [2, (2, 2), 2, (1, 3), 3]]
STEPS = [[2, 6], [4]]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
ROUTES = [
    {"strategy": "route", "route_ratio": 0.4},
    {"strategy": "route", "route_ratio": 0.4, "route_scope": "layer"},
]


def config(**fields):
    return LookAgainConfig(**{"reflection_token_id": REFLECTION, **fields})


def run(model, inputs, steps=STEPS, count=12, options=None, **fields):
    with look_again(model, config(**fields)) as session:
        new, logits = generate(model, inputs, reflect_at(*steps), count, **(options or {}))
        return new, logits, session.trace


def shown(trace):
    return [[r.shown.nonzero().flatten().tolist() for r in row] for row in trace.reflections]


@pytest.mark.parametrize("family", FAMILIES)
def test_off_is_the_unpatched_model(family):
    model, inputs = tiny_model(family), tiny_inputs(ROWS)
    new, logits = generate(model, inputs, reflect_at(*STEPS))
    off, off_logits, trace = run(model, inputs, strategy="off")
    assert torch.equal(new, off)
    torch.testing.assert_close(off_logits, logits, **CLOSE)
    assert shown(trace) == [[[], []], [[]]]


@pytest.mark.parametrize("family", FAMILIES)
def test_copy_changes_what_follows_a_reflection_and_nothing_before(family):
    model, inputs = tiny_model(family), tiny_inputs(ROWS)
    _, off, _ = run(model, inputs, strategy="off")
    _, copy, trace = run(model, inputs, strategy="copy")
    changed = (off - copy).abs().amax(-1) > 1e-3
    # The logits of step s come from token s - 1: the reflection at step 2 is read by step 3.
    assert not changed[0, :3].any() and changed[0, 3]
    assert not changed[1, :5].any() and changed[1, 5]
    assert shown(trace) == [[[*range(6)]] * 2, [[*range(7)]]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("fields", [{"strategy": "copy"}, *ROUTES])
@pytest.mark.parametrize("family", FAMILIES)
def test_virtual_is_append(family, fields, dtype):
    model, inputs = tiny_model(family, dtype), tiny_inputs(ROWS, dtype)
    new, logits, trace = run(model, inputs, **fields, track_attention=True)
    copied, copied_logits, copied_trace = run(
        model, inputs, **fields, track_attention=True, backend="append"
    )
    assert torch.equal(new, copied)
    limit = 1e-5 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(copied_logits, logits, rtol=limit, atol=limit)
    assert shown(trace) == shown(copied_trace)
    assert [[r.shift for r in row] for row in trace.reflections] == [
        [r.shift for r in row] for row in copied_trace.reflections
    ]
    torch.testing.assert_close(copied_trace.attention_map, trace.attention_map, **CLOSE)


@pytest.mark.parametrize("backend", ["virtual", "append", "reencode"])
def test_route_of_everything_is_copy(backend):
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    new, logits, trace = run(model, inputs, backend=backend)
    routed, routed_logits, routed_trace = run(
        model, inputs, backend=backend, strategy="route", route_ratio=1.0
    )
    assert torch.equal(new, routed) and shown(trace) == shown(routed_trace)
    torch.testing.assert_close(routed_logits, logits, **CLOSE)


@pytest.mark.parametrize("backend", ["virtual", "append", "reencode"])
def test_route_of_nothing_is_off(backend):
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    new, logits, _ = run(model, inputs, strategy="off")
    routed, routed_logits, trace = run(
        model, inputs, backend=backend, strategy="route", route_ratio=0.0
    )
    assert torch.equal(new, routed)
    torch.testing.assert_close(routed_logits, logits, **CLOSE)
    assert [r.num_shown for row in trace.reflections for r in row] == [0, 0, 0]
    assert not any(r.ignored for row in trace.reflections for r in row)


@pytest.mark.parametrize("fields", [{"strategy": "copy"}, *ROUTES, {"backend": "append"}])
def test_row_of_a_batch_is_the_row_alone(fields):
    model = tiny_model()
    inputs = tiny_inputs([*ROWS, [1, (1, 2), 1]])
    steps = [[2, 6], [4], [0, 3, 9]]
    new, logits, trace = run(model, inputs, steps, **fields)
    for row, found in enumerate(steps):
        one, one_logits, one_trace = run(model, row_alone(inputs, row), [found], **fields)
        assert torch.equal(one[0], new[row])
        torch.testing.assert_close(one_logits[0], logits[row], **CLOSE)
        count = sum(ROWS_TOKENS[row])
        assert shown(one_trace)[0] == shown(trace)[row]
        assert all(r.num_visual == count for r in trace.reflections[row])


ROWS_TOKENS = [[6], [4, 3], [2]]


@pytest.mark.parametrize("family", FAMILIES)
def test_reencode_is_a_plain_forward_of_the_expanded_sequence(family):
    model = tiny_model(family)
    for row, steps in enumerate([[2, 6], [4, 5, 9]]):
        inputs = row_alone(tiny_inputs(ROWS), row)
        new, logits, _ = run(model, inputs, [steps], backend="reencode")
        plain = plain_forward(model, inputs, new, steps)
        torch.testing.assert_close(plain.float(), logits[0], **CLOSE)
        _, virtual, _ = run(model, inputs, [steps], backend="virtual")
        assert (virtual[0, steps[0] + 1] - logits[0, steps[0] + 1]).abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["virtual", "append"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_one_layer_seen_again_is_encoded_again(family, backend):
    """First-layer keys and values depend on the embeddings alone, so there the two coincide."""
    model = tiny_model(family, layers=1)
    for row, steps in enumerate([[2, 6], [0, 5, 9]]):
        inputs = row_alone(tiny_inputs(ROWS), row)
        new, logits, _ = run(model, inputs, [steps], backend=backend)
        plain = plain_forward(model, inputs, new, steps)
        torch.testing.assert_close(plain.float(), logits[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def plain_forward(model, inputs, new, steps):
    """Logits of each new token by the unpatched model, the images given once more each time."""
    ids = inputs["input_ids"]
    index = {name: inputs[name] for name in ("mm_token_type_ids", "image_grid_thw")}
    positions, _ = model.model.get_rope_index(ids, **index)
    at = ids[0] == IMAGE
    block, extent = positions[:, 0, at], int(positions[:, 0, at].max() - positions[:, 0, at].min())
    tokens, places, readers = [ids[0]], [positions[:, 0]], [ids.shape[1] - 1]
    following, length = int(positions.max()) + 1, ids.shape[1]
    for step, token in enumerate(new[0]):
        if step in steps:
            tokens.append(ids[0, at])
            places.append(block + following - block.min())
            following += extent + 1
            length += int(at.sum())
        tokens.append(token[None])
        places.append(torch.full((3, 1), following))
        following += 1
        readers.append(length)
        length += 1
    times = 1 + sum(step in steps for step in range(new.shape[1]))
    sequence = torch.cat(tokens)[None]
    out = model(
        input_ids=sequence,
        position_ids=torch.cat(places, dim=1)[:, None],
        mm_token_type_ids=(sequence == IMAGE).long(),
        pixel_values=inputs["pixel_values"].repeat(times, 1),
        image_grid_thw=inputs["image_grid_thw"].repeat(times, 1),
    )
    return out.logits[0, readers[:-1]]


@pytest.mark.parametrize("backend", ["virtual", "append", "reencode"])
def test_reflections_past_the_limit_are_text_only(backend):
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    steps = [[2, 6, 8], [4]]
    _, all_logits, _ = run(model, inputs, steps, backend=backend)
    _, logits, trace = run(model, inputs, steps, backend=backend, max_reinjections=1)
    assert [r.ignored for r in trace.reflections[0]] == [False, True, True]
    assert [r.num_shown for r in trace.reflections[0]] == [6, 0, 0]
    torch.testing.assert_close(logits[0, :7], all_logits[0, :7], **CLOSE)
    torch.testing.assert_close(logits[1], all_logits[1], **CLOSE)
    assert (logits[0, 7] - all_logits[0, 7]).abs().max() > 1e-3


def test_latest_replaces_the_oldest():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    _, logits, trace = run(model, inputs, keep="latest", max_reinjections=1)
    assert [r.ignored for r in trace.reflections[0]] == [False, False]

    class Forgetting(ForceTokens):
        """Closes the first re-injection of row 0 by hand once the second is written."""

        def __call__(self, input_ids, scores):
            scores = super().__call__(input_ids, scores)
            if input_ids.shape[1] - self.prompt == 6:
                state.append(session._engine._latest)
                state[0].context.start[0, 0] = NEVER
            return scores

    state = []
    with look_again(model, config()) as session:
        forced = [dict.fromkeys(steps, REFLECTION) for steps in STEPS]
        _, expected = generate(model, inputs, LogitsProcessorList([Forgetting(forced)]))
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_prompt_never_triggers():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    inputs["input_ids"][:, -1] = REFLECTION
    new, logits, trace = run(model, inputs, [[], []])
    off, off_logits, _ = run(model, inputs, [[], []], strategy="off")
    assert torch.equal(new, off) and trace.reflections == [[], []]
    torch.testing.assert_close(logits, off_logits, **CLOSE)


def test_row_without_an_image_reflects_in_text():
    model, inputs = tiny_model(), tiny_inputs([[3, (2, 3), 4], [5]])
    new, logits, trace = run(model, inputs)
    off, off_logits, _ = run(model, inputs, strategy="off")
    assert trace.reflections[1][0].num_shown == 0 and trace.grids[1] == []
    torch.testing.assert_close(logits[1], off_logits[1], **CLOSE)
    assert (logits[0] - off_logits[0]).abs().max() > 1e-3


def test_batch_without_any_image():
    model, inputs = tiny_model(), tiny_inputs([[4], [5]])
    for fields in ({"strategy": "copy"}, {"strategy": "route"}, {"backend": "append"}):
        new, logits, _ = run(model, inputs, **fields)
        _, expected = generate(model, inputs, reflect_at(*STEPS))
        torch.testing.assert_close(logits, expected, **CLOSE)


def test_placeholders_are_never_written():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    with torch.no_grad():
        model.lm_head.weight[[IMAGE, VIDEO]] *= 50

    def written(**options):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            out = model.generate(**inputs, max_new_tokens=20, do_sample=True, **options)
        new = out[:, inputs["input_ids"].shape[1] :]
        return bool(((new == IMAGE) | (new == VIDEO)).any())

    assert written()
    with look_again(model, config()):
        assert not written()
        assert not written(suppress_tokens=[9])
        assert not written(generation_config=GenerationConfig(eos_token_id=EOS, pad_token_id=PAD))
        mine = reflect_at(*STEPS)
        generate(model, inputs, mine)
        assert len(mine) == 1


@pytest.mark.parametrize("fields", [{}, *ROUTES, {"backend": "reencode"}])
def test_generate_without_a_cache(fields):
    """A reflection in the prompt does not trigger, as with a cache."""
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    inputs["input_ids"][:, -1] = REFLECTION
    with look_again(model, config(**fields)) as session, torch.no_grad():
        new, logits = generate(model, inputs, reflect_at(*STEPS))
        again, found = generate(model, inputs, reflect_at(*STEPS), use_cache=False)
        steps = [[r.step for r in row] for row in session.trace.reflections]
        assert torch.equal(again, new) and steps == STEPS
        batch = whole_sequence(inputs, new)
        model(**{name: value for name, value in batch.items() if name != "labels"})
        assert [len(row) for row in session.trace.reflections] == [3, 2]
    torch.testing.assert_close(found, logits, **CLOSE)


def test_streaming():
    model, inputs = tiny_model(), row_alone(tiny_inputs(ROWS), 0)

    class Letters:
        def decode(self, ids, **_):
            return "".join(chr(32 + token) for token in ids)

    heard = []

    class Listener(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            heard.append(text)

    listener = Listener(Letters(), skip_prompt=True)
    new, _, trace = run(model, inputs, [[2, 6]], options={"streamer": listener})
    assert "".join(heard) == Letters().decode(new[0].tolist())
    assert len(trace.reflections[0]) == 2


def test_second_turn_on_the_same_cache():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    with look_again(model, config()) as session, torch.no_grad():
        cache = DynamicCache()
        options = {CACHE: cache}
        first, _ = generate(model, inputs, reflect_at(*STEPS), 10, **options)
        more = torch.full((2, 3), 20)
        ids = torch.cat([inputs["input_ids"], first, more], dim=1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 13), value=1)
        turn = {"input_ids": ids, "attention_mask": mask}
        second, logits = generate(model, turn, reflect_at([1], [3]), 6, **options)
        assert [len(row) for row in session.trace.reflections] == [3, 2]
        whole = torch.cat([ids, second], dim=1)
        labels = whole.clone()
        labels[:, : inputs["input_ids"].shape[1]] = -100
        labels[:, -9:-6] = -100
        kinds = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 19))
        mask = torch.nn.functional.pad(mask, (0, 6), value=1)
        rest = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
        full = model(
            input_ids=whole, labels=labels, attention_mask=mask, mm_token_type_ids=kinds, **rest
        ).logits
    torch.testing.assert_close(full[:, -7:-1].float(), logits, **CLOSE)


@pytest.mark.parametrize("begun", [0, 5])
@pytest.mark.parametrize("fields", [{}, {"max_reinjections": 1}])
def test_loop_of_ones_own(begun, fields):
    """A first call without a cache, then single tokens without position_ids."""
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    new, logits, trace = run(model, inputs, **fields)
    batch = dict(inputs)
    batch["input_ids"] = torch.cat([inputs["input_ids"], new[:, :begun]], dim=1)
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        batch[name] = torch.nn.functional.pad(inputs[name], (0, begun), value=value)
    with look_again(model, config(**fields)) as session, torch.no_grad():
        out = model(**batch, use_cache=True)
        found, mask = [out.logits[:, -1]], batch["attention_mask"]
        for step in range(begun, 11):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            out = model(
                input_ids=new[:, step : step + 1],
                attention_mask=mask,
                **{CACHE: out[CACHE]},
            )
            found.append(out.logits[:, -1])
        assert shown(session.trace) == shown(trace)
        places = [[r.key_index for r in row] for row in session.trace.reflections]
    assert places == [[r.key_index for r in row] for row in trace.reflections]
    torch.testing.assert_close(torch.stack(found, dim=1).float(), logits[:, begun:], **CLOSE)


@pytest.mark.parametrize(
    "fields", [{"strategy": "route", "track_attention": True}, {"backend": "append"}]
)
@pytest.mark.parametrize("rows", [ROWS, [ROWS[1], [1, (1, 2)]], [ROWS[1], [2]]])
def test_prompt_in_chunks(rows, fields):
    """Also where the first chunks of a row are nothing but padding, or hold part of an image."""
    model, inputs = tiny_model(), tiny_inputs(rows)
    new, logits, trace = run(model, inputs, [[1, 2, 3, 4, 6], [1, 3, 4, 5, 7]], **fields)
    positions, _ = model.model.get_rope_index(**{k: inputs[k] for k in inputs if "pix" not in k})
    embeddings = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    features = torch.cat(embeddings.pooler_output)
    cache, first = LookAgainCache(2) if "backend" in fields else DynamicCache(), 0
    with look_again(model, config(**fields)), torch.no_grad():
        session_logits = []
        for first, end in ((0, 6), (6, 11), (11, 18)):
            ids = inputs["input_ids"][:, first:end]
            hook = partial(fill, inputs, features, (first, end))
            handle = model.get_input_embeddings().register_forward_hook(hook)
            out = model(
                input_ids=ids,
                attention_mask=inputs["attention_mask"][:, :end],
                position_ids=positions[..., first:end],
                **{CACHE: cache},
            )
            handle.remove()
        session_logits.append(out.logits[:, -1])
        for step in range(11):
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, step + 1), value=1)
            out = model(
                input_ids=new[:, step : step + 1],
                attention_mask=mask,
                position_ids=positions.amax((0, 2))[None, :, None].expand(3, -1, -1) + step + 1,
                **{CACHE: cache},
            )
            session_logits.append(out.logits[:, -1])
    torch.testing.assert_close(torch.stack(session_logits, 1).float(), logits, **CLOSE)


def fill(inputs, features, span, module, args, out):
    """Image features in place of the placeholders of one chunk."""
    everywhere = inputs["input_ids"] == IMAGE
    number = (everywhere.flatten().cumsum(0) - 1).view_as(everywhere)[:, span[0] : span[1]]
    mask = args[0] == IMAGE
    out = out.clone()
    out[mask] = features[number[mask]]
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_video(family):
    """Two frames of 2 x 2 tokens: one run in Qwen2-VL and Qwen2.5-VL, one a frame in Qwen3-VL."""
    model = tiny_model(family)
    frame = [START, *[VIDEO] * 4, END]
    video = [START, *[VIDEO] * 8, END] if family != "qwen3_vl" else [*frame, 20, *frame]
    ids = torch.tensor([[10, 11, *video, 12, 13]])
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == VIDEO) * 2,
        "pixel_values_videos": torch.randn(32, 96, generator=generator, dtype=torch.float64),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }
    new, logits, trace = run(model, inputs, [[1, 5]], 9)
    copied, copied_logits, _ = run(model, inputs, [[1, 5]], 9, backend="append")
    assert torch.equal(new, copied) and shown(trace) == [[[*range(8)]] * 2]
    torch.testing.assert_close(copied_logits, logits, **CLOSE)
    assert trace.grids == ([[(1, 2, 2)] * 2] if family == "qwen3_vl" else [[(2, 2, 2)]])
    with look_again(model, config()), torch.no_grad():
        full = model(**whole_sequence(inputs, new)).logits[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(full.float(), logits, **CLOSE)
