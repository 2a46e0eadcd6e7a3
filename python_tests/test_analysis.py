"""Curves and maps against figures worked out by hand."""

import numpy as np
import pytest
import torch

from lookagain_ext import analysis
from lookagain_ext.trace import Reflection, Trace


def reflection(step, shown, mass=None, ignored=False):
    shown = torch.tensor(shown)
    return Reflection(step, 0, 0, len(shown), int(shown.sum()), shown, mass, ignored)


def trace_of(attention_map, reflections, grids=((1, 1, 3),)):
    """A trace of two rows; row 1 is the one looked at, row 0 would give other figures."""
    tracked = torch.tensor(attention_map)[None]
    both = torch.cat([torch.full_like(tracked, 9.0), tracked])
    return Trace([[], reflections], both.sum(-1), both, [[(1, 1, 3)], list(grids)])


def test_uniform_share_falls_and_jumps_where_tokens_are_shown_again():
    share = analysis.uniform_share(10, 4, 3, [(1, 2)])
    np.testing.assert_allclose(share, [4 / 11, 6 / 14, 6 / 15], rtol=1e-6)


def test_uniform_share_adds_up_several_reflections():
    share = analysis.uniform_share(10, 4, 2, [(0, 4), (1, 3)])
    np.testing.assert_allclose(share, [8 / 15, 11 / 19], rtol=1e-6)


def test_uniform_share_refuses_more_visual_tokens_than_the_prompt_has():
    with pytest.raises(ValueError, match="num_visual must be between 0 and prompt_length = 3"):
        analysis.uniform_share(3, 4, 1)


@pytest.mark.parametrize(
    ("starts", "closings", "ends"),
    [
        ([], [], ()),
        ([2], [5], (6,)),
        ([2], [], (9,)),
        ([2], [1], (9,)),
        ([2, 6], [4, 8], (5, 9)),
        ([2, 6], [8], (6, 9)),
        ([2, 6], [4, 5], (5, 9)),
        ([9], [], (10,)),
    ],
)
def test_reflections_end_at_their_tag_or_where_the_next_begins(starts, closings, ends):
    assert analysis.reflection_ends(starts, 9, closings) == ends


def test_curve_counts_what_was_shown_and_takes_the_asked_row():
    weights = [[0.2, 0.1, 0.0], [0.1, 0.1, 0.1], [0.3, 0.0, 0.0], [0.0, 0.1, 0.0]]
    trace = trace_of(weights, [reflection(2, [True, False, True])])
    curve = analysis.attention_curve(trace, 6, row=1, closings=[3])
    np.testing.assert_allclose(curve.share, [0.3, 0.3, 0.3, 0.1], rtol=1e-6)
    np.testing.assert_allclose(curve.uniform, [3 / 7, 3 / 8, 5 / 11, 5 / 12], rtol=1e-6)
    np.testing.assert_allclose(curve.ratio[0], 0.3 * 7 / 3, rtol=1e-6)
    assert (curve.reflections, curve.ends) == ((2,), (4,))


def test_text_only_reflections_are_marked_but_add_no_keys():
    trace = trace_of([[0.1, 0.1, 0.1]] * 3, [reflection(1, [False] * 3, ignored=True)])
    curve = analysis.attention_curve(trace, 6, row=1)
    np.testing.assert_allclose(curve.uniform, [3 / 7, 3 / 8, 3 / 9], rtol=1e-6)
    assert curve.reflections == (1,)


def test_curve_without_tracked_attention_says_how_to_get_it():
    with pytest.raises(ValueError, match="track_attention=True"):
        analysis.attention_curve(Trace([[]], None, None, [[]]), 6)


def test_curve_of_a_row_that_is_not_there():
    with pytest.raises(ValueError, match="row must be between 0 and 1, got 2"):
        analysis.attention_curve(trace_of([[0.0] * 3], []), 6, row=2)


def test_maps_are_means_before_and_inside_the_reflection():
    weights = [[0.2, 0.1, 0.0], [0.4, 0.1, 0.2], [0.3, 0.0, 0.1], [0.1, 0.0, 0.3], [9.0] * 3]
    trace = trace_of(weights, [reflection(2, [True, False, True])])
    (found,) = analysis.reflection_maps(trace, row=1, closings=[3])
    np.testing.assert_allclose(found.before, [0.3, 0.1, 0.1], rtol=1e-6)
    np.testing.assert_allclose(found.during, [0.2, 0.0, 0.2], rtol=1e-6)
    assert (found.step, found.end) == (2, 4)
    assert found.shown.tolist() == [True, False, True]


def test_a_reflection_with_nothing_before_it_has_no_map_before():
    trace = trace_of([[0.1, 0.1, 0.1]], [reflection(0, [True] * 3)])
    (found,) = analysis.reflection_maps(trace, row=1)
    assert found.before is None
    np.testing.assert_allclose(found.during, [0.1] * 3, rtol=1e-6)


def test_without_tracking_the_mass_that_routed_is_the_map_before():
    mass = torch.tensor([0.5, 0.25, 0.0])
    trace = Trace([[reflection(4, [True] * 3, mass)]], None, None, [[(1, 1, 3)]])
    (found,) = analysis.reflection_maps(trace)
    np.testing.assert_allclose(found.before, mass)
    assert found.during is None


def test_values_are_cut_into_images_in_order_and_the_tail_is_dropped():
    first, second = analysis.to_grids(np.arange(12), [(1, 2, 3), (2, 1, 2)])
    assert first.tolist() == [[[0, 1, 2], [3, 4, 5]]]
    assert second.tolist() == [[[6, 7]], [[8, 9]]]


def test_too_few_values_for_the_grids():
    with pytest.raises(ValueError, match="the grids' 6 tokens, got 5"):
        analysis.to_grids(np.arange(5), [(1, 2, 3)])
