"""Sequences packed into one row: each is attended as if it were alone."""

from __future__ import annotations

import pytest
import torch
from cases import Case
from tiny_models import (
    FAMILIES,
    REFLECTION,
    VOCABULARY,
    generate,
    reflect_at,
    row_alone,
    tiny_inputs,
    tiny_model,
    whole_sequence,
)
from transformers.cache_utils import DynamicCache
from transformers.data import DataCollatorWithFlattening

from lookagain_ext import NEVER, LookAgainConfig, VisualContext, look_again, ops
from lookagain_ext._native import _use_kernels
from lookagain_ext.cache import CACHE

ROWS = [[3, (2, 3), 4], [2, (2, 2), 2, (1, 3), 3], [6], [1, (3, 2), 9]]
STEPS = [[2, 6], [4], [1], []]
WAYS = {
    "copy": {},
    "reencode": {"backend": "reencode"},
    "route": {"strategy": "route", "route_ratio": 0.4},
    "route-layer": {"strategy": "route", "route_ratio": 0.4, "route_scope": "layer"},
    "route-reencode": {"strategy": "route", "route_ratio": 0.4, "backend": "reencode"},
    "off": {"strategy": "off"},
}


def config(**fields) -> LookAgainConfig:
    return LookAgainConfig(**{"reflection_token_id": REFLECTION, **fields})


# The ops.


class Packed:
    """A ragged batch without padding on the left, and the same sequences in one row."""

    def __init__(self, device, dtype=torch.float32, keys=90, **fields) -> None:
        case = Case(batch=3, queries=keys, keys=keys, poison=False, dtype=dtype, **fields)
        self.problem = problem = case.make(device)
        lengths = problem.key_length.tolist()
        assert len(set(lengths)) == 3  # ragged: else a mistake in the bounds could not be seen
        first = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        self.cu_seqlens = torch.tensor(first, dtype=torch.int32, device=device)
        tensors = (problem.query, problem.key, problem.value)
        self.heads = [self.pack(x, lengths) for x in tensors]
        visual = problem.visual
        start = torch.where(visual.start == NEVER, NEVER, visual.start.clamp(min=1))
        fields = (visual.spans, visual.inv_freq, visual.shift, start, visual.selected)
        self.visual, self.lengths = VisualContext(*fields), lengths

    @staticmethod
    def pack(padded, lengths):
        parts = [row[None, :, :n] for row, n in zip(padded, lengths, strict=True)]
        return torch.cat(parts, dim=2).detach()

    def alone(self, number):
        """Heads and context of one sequence."""
        part = slice(*self.cu_seqlens[number : number + 2].tolist())
        return [x[:, :, part] for x in self.heads], self.visual.row(number)


@pytest.mark.parametrize("select", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_mass_are_those_of_a_padded_batch(device, dtype, select) -> None:
    packed = Packed(device, dtype, select=select)
    problem = packed.problem
    mass = torch.zeros(3, 2, problem.max_visual, device=device)
    counted = problem.mass_from
    out, lse = ops.routed_attention(
        *packed.heads,
        packed.visual,
        visual_mass=mass,
        mass_from=counted,
        cu_seqlens=packed.cu_seqlens,
        return_lse=True,
    )
    # Right-aligned, as `key_length` has it: query i of a row is key `key_length - L_q + i`.
    longest = problem.query.shape[2]
    aligned = torch.zeros_like(problem.query)
    for row, n in enumerate(packed.lengths):
        aligned[row, :, longest - n :] = problem.query[row, :, :n]
    wanted_mass = torch.zeros_like(mass)
    wanted, wanted_lse = ops.routed_attention(
        aligned,
        problem.key,
        problem.value,
        packed.visual,
        key_length=problem.key_length,
        visual_mass=wanted_mass,
        mass_from=counted,
        return_lse=True,
    )
    loose = (
        {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 2e-5, "atol": 2e-5}
    )
    for row, n in enumerate(packed.lengths):
        part = slice(*packed.cu_seqlens[row : row + 2].tolist())
        torch.testing.assert_close(out[0, :, part], wanted[row, :, longest - n :], **loose)
        torch.testing.assert_close(lse[0, :, part], wanted_lse[row, :, longest - n :], **loose)
    torch.testing.assert_close(mass, wanted_mass, **loose)
    assert mass.sum(-1).min() > 0


def test_mass_of_ranges(device) -> None:
    packed = Packed(device, select=True)
    rows = torch.tensor([[[0, 20], [5, 6]], [[3, 40], [0, 0]], [[1, 2], [2, 45]]], device=device)
    rows = rows.int()
    query, key, _ = packed.heads
    found = ops.visual_mass(query, key, packed.visual, rows, cu_seqlens=packed.cu_seqlens)
    _, lse = ops.routed_attention(
        *packed.heads, packed.visual, cu_seqlens=packed.cu_seqlens, return_lse=True
    )
    again = ops.visual_mass(query, key, packed.visual, rows, cu_seqlens=packed.cu_seqlens, lse=lse)
    torch.testing.assert_close(found, again, rtol=1e-4, atol=1e-5)
    for number in range(3):
        (one, other, _), visual = packed.alone(number)
        wanted = ops.visual_mass(one, other, visual, rows[number : number + 1])
        torch.testing.assert_close(found[number], wanted[0])
    assert found[1, 1].abs().max() == 0 < found[1, 0].max()


def test_widths_differ() -> None:
    packed = Packed("cpu")
    query, key, _ = packed.heads
    rows = torch.tensor([[[0, 40]]] * 3).int()
    found = ops.visual_mass(query, key, packed.visual, rows, cu_seqlens=packed.cu_seqlens.tolist())
    counts = packed.visual.num_visual()
    assert len(set(counts.tolist())) > 1 and found.shape == (3, 1, 2, int(counts.max()))
    beyond = torch.arange(found.shape[-1]) >= counts[:, None, None, None]
    assert (found * beyond).abs().max() == 0


def test_gradients_are_those_of_each_sequence_alone(device) -> None:
    packed = Packed(device)
    heads = [x.clone().requires_grad_() for x in packed.heads]
    out = ops.routed_attention(*heads, packed.visual, cu_seqlens=packed.cu_seqlens)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    found = torch.autograd.grad(out, heads, weight)
    for number in range(3):
        part = slice(*packed.cu_seqlens[number : number + 2].tolist())
        one, visual = packed.alone(number)
        one = [x.detach().clone().requires_grad_() for x in one]
        alone = ops.routed_attention(*one, visual)
        for whole, single in zip(
            found, torch.autograd.grad(alone, one, weight[:, :, part]), strict=True
        ):
            torch.testing.assert_close(whole[:, :, part], single)


def test_empty_and_single_sequences() -> None:
    heads = [torch.randn(1, heads, 7, 16) for heads in (4, 2, 2)]
    bounds = [0, 0, 1, 7, 7]
    out = ops.routed_attention(*heads, cu_seqlens=bounds)
    torch.testing.assert_close(out[:, :, :1], heads[2][:, :, :1].repeat_interleave(2, 1))
    alone = ops.routed_attention(*(x[:, :, 1:] for x in heads))
    torch.testing.assert_close(out[:, :, 1:], alone)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_empty_sequences_with_a_context(backend, monkeypatch, request) -> None:
    monkeypatch.setenv("LOOKAGAIN_BACKEND", backend)
    _use_kernels.cache_clear()
    request.addfinalizer(_use_kernels.cache_clear)
    heads = [torch.randn(1, heads, 7, 16) for heads in (4, 2, 2)]
    spans = torch.tensor([[[0, 0]], [[1, 3]], [[0, 0]]])
    visual = VisualContext.from_spans(spans, torch.ones(8))
    visual = visual.reinject(torch.tensor([False, True, True]), 5, 5)
    mass = torch.zeros(3, 2, 3)
    out = ops.routed_attention(*heads, visual, visual_mass=mass, cu_seqlens=[0, 0, 7, 7])
    wanted = torch.zeros(1, 2, 3)
    alone = ops.routed_attention(*heads, visual.row(1), visual_mass=wanted)
    assert torch.equal(out, alone) and torch.equal(mass[1:2], wanted)
    assert mass[[0, 2]].abs().max() == 0 < mass[1].min()
    rows = torch.tensor([[[0, 7]]] * 3, dtype=torch.int32)
    found = ops.visual_mass(heads[0], heads[1], visual, rows, cu_seqlens=[0, 0, 7, 7])
    torch.testing.assert_close(found[:, 0], mass)


def test_bounds_change_between_calls_of_one_shape(device) -> None:
    """What is remembered of a call's layout is not that of other bounds."""
    heads = [torch.randn(1, n, 60, 16, device=device, requires_grad=True) for n in (4, 2, 2)]
    for bounds in ([0, 20, 60], [0, 40, 60], [0, 60]):
        out = ops.routed_attention(*heads, cu_seqlens=bounds)
        for begin, end in zip(bounds, bounds[1:], strict=False):
            alone = ops.routed_attention(*(x[:, :, begin:end] for x in heads))
            torch.testing.assert_close(out[:, :, begin:end], alone)
        torch.autograd.grad(out.sum(), heads)


def test_compiles_whole() -> None:
    packed = Packed("cpu")
    bounds = packed.cu_seqlens.tolist()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(query, key, value):
        return ops.routed_attention(query, key, value, packed.visual, cu_seqlens=bounds)

    eager = ops.routed_attention(*packed.heads, packed.visual, cu_seqlens=bounds)
    assert torch.equal(compiled(*packed.heads), eager)


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"cu_seqlens": [0, 5]}, ValueError, "cu_seqlens must go from 0 to the 9 tokens"),
        ({"cu_seqlens": [1, 9]}, ValueError, "cu_seqlens must go from 0"),
        ({"cu_seqlens": [0, 6, 5, 9]}, ValueError, "without going back"),
        ({"cu_seqlens": []}, ValueError, "cu_seqlens must go from 0"),
        ({"cu_seqlens": 9}, TypeError, "cu_seqlens must be an integer tensor"),
        ({"cu_seqlens": torch.tensor([0.0, 9.0])}, TypeError, "cu_seqlens must hold integers"),
        ({"cu_seqlens": torch.tensor([[0, 9]])}, TypeError, "integers in one axis"),
        ({"key_start": torch.zeros(1, dtype=torch.int32)}, ValueError, "key_start is of padded"),
        ({"key_length": torch.ones(1, dtype=torch.int32)}, ValueError, "key_length is of padded"),
        ({"query": torch.zeros(2, 2, 9, 16)}, ValueError, r"query must have shape \[1, H, T, D\]"),
        ({"key": torch.zeros(1, 2, 8, 16)}, ValueError, "key must have query's 9 tokens"),
        ({"value": torch.zeros(1, 2, 8, 16)}, ValueError, "value must have query's 9 tokens"),
        ({"value": None}, TypeError, "value must be a tensor, got NoneType"),
        ({"visual": "all"}, TypeError, "visual must be a VisualContext"),
        ({"mass_from": torch.zeros(1, dtype=torch.int32)}, ValueError, "mass_from must have a row"),
    ],
)
def test_wrong_arguments(wrong, error, words) -> None:
    given = {name: torch.zeros(1, 2, 9, 16) for name in ("query", "key", "value")}
    given |= {"cu_seqlens": [0, 4, 9], **wrong}
    with pytest.raises(error, match=words):
        ops.routed_attention(**given)


def test_wrong_arguments_of_the_mass() -> None:
    query, key = torch.zeros(1, 2, 9, 16), torch.zeros(1, 2, 9, 16)
    visual = VisualContext.from_spans(torch.tensor([[[0, 3]], [[0, 2]]]), torch.ones(8))
    rows = torch.zeros(2, 1, 2, dtype=torch.int32)
    given = {"cu_seqlens": [0, 4, 9]}
    with pytest.raises(TypeError, match="visual must be a VisualContext"):
        ops.visual_mass(query, key, None, rows, **given)
    with pytest.raises(ValueError, match=r"lse must have shape \[1, 2, 9\]"):
        ops.visual_mass(query, key, visual, rows, lse=torch.zeros(1, 2, 99), **given)
    with pytest.raises(ValueError, match="rows must have a row for each of the 2"):
        ops.visual_mass(query, key, visual, rows[:1], **given)
    spans = torch.tensor([[[0, 3]], [[0, 8]]])
    beyond = VisualContext.from_spans(spans, torch.ones(8)).reinject(torch.tensor([True] * 2), 9, 3)
    with pytest.raises(ValueError, match="sequence 1 of cu_seqlens, its row 0: spans"):
        ops.routed_attention(query, key, key, beyond, **given)


def test_context_needs_a_row_for_each_sequence() -> None:
    heads = [torch.zeros(1, 2, 9, 16)] * 3
    visual = VisualContext.from_spans(torch.tensor([[[0, 3]]]), torch.ones(8))
    with pytest.raises(ValueError, match=r"visual.spans must have a row for each of the 2"):
        ops.routed_attention(*heads, visual, cu_seqlens=[0, 4, 9])


# The models.


def sequences(model, inputs) -> list[dict[str, torch.Tensor]]:
    """Each row of `inputs` with an answer, alone, with its positions [4, 1, L]."""
    alone = []
    for row, steps in enumerate(STEPS):
        prompt = row_alone(inputs, row)
        if not len(prompt["image_grid_thw"]):
            del prompt["image_grid_thw"], prompt["pixel_values"]
        with look_again(model, config()), torch.no_grad():
            new, _ = generate(model, prompt, reflect_at(steps))
        one = whole_sequence(prompt, new)
        del one["attention_mask"]
        places = model.model.get_rope_index(
            one["input_ids"],
            mm_token_type_ids=one["mm_token_type_ids"],
            image_grid_thw=one.get("image_grid_thw"),
        )[0]
        text = torch.arange(one["input_ids"].shape[1])[None, None]
        one["position_ids"] = torch.cat([text, places])
        alone.append(one)
    return alone


def pack(alone, batch=1) -> dict[str, torch.Tensor]:
    """One row (or two of the same length, the second filled up with a sequence of words)."""
    rows = [alone] if batch == 1 else [alone[: len(alone) // 2], alone[len(alone) // 2 :]]
    lengths = [sum(one["input_ids"].shape[1] for one in row) for row in rows]
    packed = {}
    for name in ("input_ids", "labels", "position_ids", "mm_token_type_ids"):
        parts = []
        for row, length in zip(rows, lengths, strict=True):
            missing = max(lengths) - length
            fill = torch.full((*row[0][name].shape[:-1], missing), 9)
            if name == "position_ids":
                fill = torch.arange(missing).expand_as(fill)
            elif name != "input_ids":
                fill = torch.full_like(fill, -100 if name == "labels" else 0)
            parts.append(torch.cat([*(one[name] for one in row), fill], dim=-1))
        packed[name] = torch.cat(parts, dim=-2)
    for name in ("pixel_values", "image_grid_thw"):
        packed[name] = torch.cat([one[name] for one in alone if name in one])
    return packed


def logits_of(model, alone) -> list[torch.Tensor]:
    return [model(**one, use_cache=False).logits[0] for one in alone]


@pytest.fixture
def made(one_thread, request):
    model = tiny_model(request.param)
    return model, sequences(model, tiny_inputs(ROWS))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("made", FAMILIES, indirect=True)
def test_packed_is_each_sequence_alone(made, way) -> None:
    model, alone = made
    with torch.no_grad(), look_again(model, config(**WAYS[way])) as session:
        wanted, traces = [], []
        for one in alone:
            wanted += logits_of(model, [one])
            traces += session.trace.reflections
        for batch in (1, 2):
            logits = model(**pack(alone, batch), use_cache=False).logits
            rows = logits.flatten(0, 1)
            # The filling of the first of two rows lies between.
            begin = 0
            for number, one in enumerate(wanted):
                if batch == 2 and number == 2:
                    begin = logits.shape[1]
                torch.testing.assert_close(
                    rows[begin : begin + len(one)], one, rtol=1e-6, atol=1e-6
                )
                begin += len(one)
            found = [row for row in session.trace.reflections if row or batch == 1]
            before = [row for row in traces if row or batch == 1]
            for old, new in zip(before, found, strict=True):
                assert [(r.step, r.key_index, r.shift, r.num_shown) for r in old] == [
                    (r.step, r.key_index, r.shift, r.num_shown) for r in new
                ]
                assert [r.shown.tolist()[: r.num_visual] for r in old] == [
                    r.shown.tolist()[: r.num_visual] for r in new
                ]
    assert sum(map(len, traces)) == 4 and sum(r.num_shown > 0 for row in traces for r in row) in (
        0 if way == "off" else 3,
    )


@pytest.mark.parametrize("made", FAMILIES, indirect=True)
def test_off_is_the_unpatched_model(made) -> None:
    model, alone = made
    packed = pack(alone)
    with torch.no_grad():
        wanted = model(**packed, use_cache=False).logits
        with look_again(model, config(strategy="off")):
            logits = model(**packed, use_cache=False).logits
    torch.testing.assert_close(logits, wanted)


@pytest.mark.parametrize("way", ["copy", "route", "reencode"])
@pytest.mark.parametrize("made", ["qwen2_5_vl"], indirect=True)
def test_gradients(made, way) -> None:
    model, alone = made
    model.train()
    checked = [p for n, p in model.named_parameters() if "q_proj" in n or "v_proj" in n]
    with look_again(model, config(**WAYS[way])):
        total = 0
        for one, logits in zip(alone, logits_of(model, alone), strict=True):
            keep = one["labels"][0] != -100
            total = total + logits.log_softmax(-1)[keep].pow(2).sum()
        wanted = torch.autograd.grad(total, checked, allow_unused=True)
        packed = pack(alone)
        logits = model(**packed, use_cache=False).logits[0]
        keep = packed["labels"][0] != -100
        total = logits.log_softmax(-1)[keep].pow(2).sum()
        found = torch.autograd.grad(total, checked, allow_unused=True)
    seen = [(a, b) for a, b in zip(found, wanted, strict=True) if b is not None]
    assert len(seen) >= 4
    for a, b in seen:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("made", ["qwen2_5_vl"], indirect=True)
def test_tracked_attention(made) -> None:
    model, alone = made
    with torch.no_grad(), look_again(model, config(track_attention=True)) as session:
        single = []
        for one in alone:
            logits_of(model, [one])
            single.append(session.trace.attention[0])
        model(**pack(alone), use_cache=False)
        together = session.trace.attention
    for number, one in enumerate(single):
        torch.testing.assert_close(together[number, : len(one)], one, rtol=1e-5, atol=1e-6)
    assert [bool(row.any()) for row in together] == [True, True, False, True]


@pytest.mark.parametrize("made", ["qwen2_5_vl"], indirect=True)
def test_bounds_by_name(made) -> None:
    """Three axes of positions do not tell where sequences begin; transformers' keyword does."""
    model, alone = made
    packed = pack(alone)
    bounds = [0, *torch.tensor([one["input_ids"].shape[1] for one in alone]).cumsum(0).tolist()]
    with torch.no_grad(), look_again(model, config()) as session:
        wanted = model(**packed, use_cache=False).logits
        packed["position_ids"] = packed["position_ids"][1:]
        named = {"cu_seq_lens_q": torch.tensor(bounds, dtype=torch.int32)}
        logits = model(**packed, **named, use_cache=False).logits
        assert len(session.trace.reflections) == 4
        torch.testing.assert_close(logits, wanted)
        named = {"cu_seq_lens_q": torch.tensor([0, 3], dtype=torch.int32)}
        with pytest.raises(ValueError, match="cu_seq_lens_q must go from 0 to the"):
            model(**packed, **named, use_cache=False)


@pytest.mark.parametrize("made", ["qwen2_5_vl"], indirect=True)
def test_ways_to_say_where_sequences_begin(made) -> None:
    """A single token between two, a mask of ones, a list; not: padding, bounds across two rows."""
    model, alone = made
    word = {name: alone[2][name][..., :1] for name in ("input_ids", "mm_token_type_ids")}
    word |= {"labels": torch.tensor([[-100]]), "position_ids": torch.zeros(4, 1, 1).long()}
    packed = pack([alone[0], word, word, alone[1]])
    first = alone[0]["input_ids"].shape[1]
    bounds = [0, first, first + 1, first + 2, packed["input_ids"].shape[1]]
    ones = torch.ones_like(packed["input_ids"])
    with torch.no_grad(), look_again(model, config()):
        wanted = logits_of(model, [alone[0], word, word, alone[1]])
        for more in ({}, {"attention_mask": ones}, {"cu_seq_lens_q": bounds}):
            logits = model(**packed, **more, use_cache=False).logits[0]
            torch.testing.assert_close(logits, torch.cat(wanted), rtol=1e-6, atol=1e-6)
        named = {"cu_seq_lens_q": bounds, "attention_mask": ones.clone()}
        named["attention_mask"][0, 0] = 0
        with pytest.raises(ValueError, match="attention_mask has padding: with cu_seq_lens_q"):
            model(**packed, **named, use_cache=False)
        with pytest.raises(TypeError, match="cu_seq_lens_q must hold integers"):
            model(**packed, cu_seq_lens_q=torch.tensor(bounds) + 0.2, use_cache=False)
        two = {name: value for name, value in pack(alone, 2).items() if name != "labels"}
        whole = two["input_ids"].numel()
        with pytest.raises(ValueError, match="cu_seq_lens_q has a sequence in two rows"):
            model(**two, cu_seq_lens_q=[0, 5, whole], use_cache=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_flattening_collator(family, one_thread) -> None:
    """Transformers' own, whose position ids are those of the text alone."""
    model = tiny_model(family)
    rows = [torch.randint(9, VOCABULARY, (n,)).tolist() for n in (7, 4, 9)]
    features = [{"input_ids": row, "labels": row} for row in rows]
    for keywords in (False, True):
        batch = DataCollatorWithFlattening(return_flash_attn_kwargs=keywords)(features)
        with torch.no_grad(), look_again(model, config()):
            wanted = [model(input_ids=torch.tensor([row]), use_cache=False).logits for row in rows]
            logits = model(**batch, use_cache=False).logits
        torch.testing.assert_close(logits, torch.cat(wanted, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("made", ["qwen2_5_vl"], indirect=True)
def test_no_cache_for_packed_sequences(made) -> None:
    model, alone = made
    with torch.no_grad(), look_again(model, config()):
        with pytest.raises(ValueError, match="packed sequences cannot be continued"):
            model(**pack(alone), **{CACHE: DynamicCache()})


@pytest.mark.parametrize("made", ["qwen2_5_vl"], indirect=True)
def test_packed_sequences_are_not_continued(made) -> None:
    model, alone = made
    packed = pack(alone)
    with torch.no_grad(), look_again(model, config()):
        cache = model(**packed, use_cache=True)[CACHE]
        assert isinstance(cache, DynamicCache)
        step = torch.randint(9, VOCABULARY, (1, 1))
        with pytest.raises(ValueError, match="packed sequences, which cannot be continued"):
            model(input_ids=step, **{CACHE: cache})
