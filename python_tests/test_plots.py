"""The pictures are looked at by eye; here, that they show the right thing in the right place."""

import numpy as np
import pytest
from PIL import Image

from lookagain_ext import plots
from lookagain_ext.analysis import AttentionCurve, ReflectionMap

GRID = (1, 2, 3)


def a_map(before=None, during=None, shown=None, step=4):
    shown = np.ones(6, bool) if shown is None else np.array(shown)
    return ReflectionMap(step, step + 2, before, during, shown)


def titles(figure):
    return [axis.get_title(loc="left") for axis in figure.axes]


def test_heat_lies_on_the_cell_of_its_token():
    picture = Image.new("RGB", (30, 20), "white")
    heat = np.zeros((2, 3))
    heat[1, 2] = 1.0
    drawn = plots.heat_over(picture, heat, top=1.0)
    np.testing.assert_allclose(drawn[:10], 1.0, atol=1e-6)
    np.testing.assert_allclose(drawn[10:, :20], 1.0, atol=1e-6)
    strongest = plots.heat_map()(1.0)[:3]
    np.testing.assert_allclose(drawn[10:, 20:], np.broadcast_to(strongest, (10, 10, 3)), atol=1e-2)


def test_heat_gets_darker_evenly():
    levels = plots.heat_map()(np.linspace(0, 1, 21))[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(levels) < 0).all()


def test_marks_stay_visible_under_the_strongest_heat():
    picture = Image.new("RGB", (20, 20), "white")
    picture.paste("black", (0, 0, 20, 10))
    drawn = plots.heat_over(picture, np.ones((1, 1)), top=1.0)
    assert (drawn[15] - drawn[5]).max() > 0.2


def test_overlay_tells_how_much_went_to_the_picture(tmp_path):
    before, during = np.full(6, 0.02), np.array([0, 0, 0.3, 0, 0.1, 0])
    found = a_map(before, during, [False, False, True, False, True, False])
    path = tmp_path / "overlay.png"
    picture = Image.new("RGB", (420, 280))
    figure = plots.overlay(picture, [found], [GRID], path, "Why?")
    assert titles(figure)[:3] == [
        "reflection 1, at token 4\n2 of 6 visual tokens shown again",
        "before\n12% of attention on the picture",
        "during\n40% of attention on the picture",
    ]
    (dots,) = figure.axes[2].collections
    centres = [path.get_extents().get_points().mean(0).tolist() for path in dots.get_paths()]
    assert len(centres) == 2, "only the tokens shown again have a dot"
    assert (np.array(centres) // (picture.width / 3)).tolist() == [[2, 0], [1, 1]]
    assert Image.open(path).size[0] > 800


def test_overlay_of_an_answer_without_reflection_shows_the_whole_answer():
    picture = Image.new("RGB", (90, 60))
    figure = plots.overlay(picture, [], [GRID], whole=np.full(6, 0.05))
    assert titles(figure)[:2] == [
        "no reflection\n",
        "the whole answer\n30% of attention on the picture",
    ]
    assert len(plots.overlay(picture, [], [GRID]).axes) == 2, "nothing recorded: no colour scale"


def test_overlay_draws_the_first_few_reflections_and_says_so():
    heat = np.full(6, 0.02)
    maps = [a_map(heat, heat, step=step) for step in range(7)]
    figure = plots.overlay(Image.new("RGB", (90, 60)), maps, [GRID])
    assert sum(title.startswith("reflection") for title in titles(figure)) == plots.MOST_ROWS
    assert "the first 4 of 7 reflections" in figure.get_suptitle()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("title", ["why not? " * 3000, "y" * 9000, r"$\frac$", "看图"])
def test_any_title_leaves_room_for_the_plot(tmp_path, title):
    heat = np.full(6, 0.02)
    maps = [a_map(heat, heat, step=step) for step in range(7)]
    figure = plots.overlay(Image.new("RGB", (90, 60)), maps, [GRID], tmp_path / "a.png", title)
    assert figure.get_suptitle().endswith("the first 4 of 7 reflections)")
    one = np.array([0.2], np.float32)
    figure = plots.curve(AttentionCurve(one, one, (), ()), tmp_path / "b.png", title)
    assert figure.get_suptitle()[:9] == title[:9]
    assert figure.get_suptitle().count("\n") < 3


def test_overlay_says_when_nothing_came_before():
    figure = plots.overlay(Image.new("RGB", (90, 60)), [a_map(None, np.full(6, 0.1))], [GRID])
    assert titles(figure)[1] == "before\nnothing recorded"


@pytest.mark.parametrize("size", [(400, 40), (40, 400), (3, 2)])
def test_overlay_of_pictures_of_any_form(tmp_path, size):
    heat = np.full(6, 0.1)
    path = tmp_path / "overlay.png"
    plots.overlay(Image.new("RGB", size), [a_map(heat, heat)], [GRID], path)
    assert Image.open(path).size[1] < 1500


def test_curve_marks_each_reflection(tmp_path):
    found = AttentionCurve(
        np.array([0.2, 0.1, 0.4, 0.3], np.float32), np.full(4, 0.2, np.float32), (1, 2), (2, 4)
    )
    figure = plots.curve(found, tmp_path / "curve.png", "Why?")
    above, below = figure.axes
    np.testing.assert_allclose(above.lines[0].get_ydata(), [20, 10, 40, 30], rtol=1e-5)
    np.testing.assert_allclose(below.lines[0].get_ydata(), [1, 0.5, 2, 1.5], rtol=1e-5)
    assert [text.get_text() for text in above.texts] == ["look 1", "look 2"]
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_curve_without_reflections_and_of_one_token(tmp_path):
    one = np.array([0.2], np.float32)
    figure = plots.curve(AttentionCurve(one, one, (), ()), tmp_path / "curve.png")
    assert not figure.axes[0].texts
