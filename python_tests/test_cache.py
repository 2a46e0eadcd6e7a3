"""LookAgainCache: in place, each row with its own length, usable as any transformers cache."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, REFLECTION, generate, reflect_at, tiny_inputs, tiny_model

from lookagain_ext import LookAgainConfig, look_again, ops
from lookagain_ext.cache import CACHE, LookAgainCache

pytestmark = pytest.mark.usefixtures("one_thread")


def states(batch, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, 2, count, 8, generator=generator)


def test_rows_grow_apart_and_nothing_else_is_touched():
    cache = LookAgainCache(1, max_length=10, reserve=5)
    first, second = states(2, 4), states(2, 2, seed=1)
    cache.update(*first, 0)
    layer = cache.layers[0]
    assert layer.keys.shape == (2, 2, 15, 8) and cache.get_seq_length() == 4
    places = layer.keys.data_ptr(), layer.values.data_ptr()
    layer.keys[:, :, 4:] = layer.values[:, :, 4:] = torch.nan
    spans, rows = torch.tensor([[[1, 2]], [[0, 3]]], dtype=torch.int32), torch.tensor([False, True])
    shift = torch.tensor([5, 5], dtype=torch.int32)
    ops.append_visual_(
        layer.keys, layer.values, layer.lengths, spans, shift, torch.ones(4), rows=rows
    )
    keys, values = cache.update(*second, 0)
    assert (keys.data_ptr(), values.data_ptr()) == places
    assert cache.lengths().tolist() == [6, 9] and cache.get_seq_length() == 6
    for row, begin in ((0, 4), (1, 7)):
        assert torch.equal(keys[row, :, :4], first[0, row])
        assert torch.equal(values[row, :, begin : begin + 2], second[1, row])
        assert torch.equal(keys[row, :, begin : begin + 2], second[0, row])
        assert keys[row, :, begin + 2 :].isnan().all()
    assert torch.equal(values[1, :, 4:7], first[1, 1, :, :3])


def test_growing_keeps_what_it_holds():
    cache, written = LookAgainCache(1, reserve=3), []
    for number in range(5):
        part = states(2, 130, seed=number)
        written.append(part)
        keys, values = cache.update(*part, 0)
    whole = torch.cat(written, dim=3)
    assert cache.get_seq_length() == 650 and cache.get_max_length() == -1
    assert not cache.is_compileable and keys.shape[2] >= 653
    assert torch.equal(keys[:, :, :650], whole[0]) and torch.equal(values[:, :, :650], whole[1])


def test_rows_can_be_picked_repeated_and_forgotten():
    cache = LookAgainCache(2, max_length=6)
    part = states(3, 4)
    for layer in range(2):
        cache.update(*part, layer)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(cache.layers[1].keys[1, :, :4], part[0, 0])
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[0].values[1, :, :4], part[1, 2])
    cache.batch_select_indices(torch.tensor([0, 5]))
    assert cache.lengths().tolist() == [4, 4]
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    keys, _ = cache.update(*states(2, 2, seed=9), 0)
    assert torch.equal(keys[:, :, :2], states(2, 2, seed=9)[0])


def test_a_row_writes_into_the_whole():
    cache = LookAgainCache(1, max_length=6, reserve=4)
    cache.update(*states(2, 3), 0)
    part = states(1, 2, seed=4)
    row = cache.row(1)
    assert int(row.get_seq_length()) == 3
    row.update(*part, 0)
    assert cache.lengths().tolist() == [3, 5] and int(cache.get_seq_length()) == 3
    assert torch.equal(cache.layers[0].keys[1, :, 3:5], part[0, 0])


@pytest.mark.parametrize("length", [None, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_without_look_again(family, length):
    model, inputs = tiny_model(family), tiny_inputs([[3, (2, 3), 4], [2, (1, 3), 3]])
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    cache = LookAgainCache(2, max_length=length)
    options = {CACHE: cache, "disable_compile": True}
    found = model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["append", "reencode"])
def test_a_larger_image_after_reset(backend):
    """The reserve grows with the image, or the cache says that it cannot."""
    model, small = tiny_model(), tiny_inputs([[2, (2, 2), 2]])
    large, steps = tiny_inputs([[2, (12, 12), 2]]), [1, 2, 3, 4, 5, 6]
    growing, static = LookAgainCache(2), LookAgainCache(2, max_length=400)
    with look_again(model, LookAgainConfig(reflection_token_id=REFLECTION, backend=backend)):
        _, expected = generate(model, large, reflect_at(steps))
        for cache in (growing, static):
            options = {CACHE: cache, "disable_compile": True}
            generate(model, small, reflect_at([2]), **options)
            cache.reset()
            if cache is growing:
                _, logits = generate(model, large, reflect_at(steps), **options)
                torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
            else:
                wanted = "allocated with reserve=32, and 1152 slots are needed"
                with pytest.raises(ValueError, match=wanted):
                    generate(model, large, reflect_at(steps), **options)


def test_refuses():
    with pytest.raises(ValueError, match="num_layers must be an integer of at least 1, got 0"):
        LookAgainCache(0)
    with pytest.raises(ValueError, match="reserve must be an integer of at least 0, got -1"):
        LookAgainCache(1, reserve=-1)
    cache = LookAgainCache(1, max_length=3)
    with pytest.raises(ValueError, match="the cache is full: 0 of 3 slots are used and 4 more"):
        cache.update(*states(1, 4), 0)
