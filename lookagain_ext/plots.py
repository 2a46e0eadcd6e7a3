"""Two pictures of a second look: where on the image, and when in the answer.

Colours come from one short palette that people with any colour vision can tell apart (Okabe and
Ito); heat runs from white to rust with falling lightness. Nothing is told by colour alone.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .analysis import AttentionCurve, ReflectionMap, to_grids

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#6E6E6E"
MOST_ROWS = 4
"""Reflections drawn in one overlay; an answer with more shows the first ones and says so."""
_STYLE = {
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "savefig.dpi": 130,
}


def heat_map() -> LinearSegmentedColormap:
    """White, amber, rust: lightness falls evenly, so it also reads in grey."""
    from matplotlib.colors import LinearSegmentedColormap

    stops = ("#ffffff", "#fde3a7", "#f9b54c", "#ee7f1e", "#cc4a0a")
    return LinearSegmentedColormap.from_list("look", stops)


def heat_over(picture: Image.Image, heat: NDArray, top: float) -> NDArray:
    """The picture in pale grey with heat laid over it, as a printer lays ink on a sketch.

    Colours multiply: marks stay visible under the heat, and heat on white paper has the very
    colour of the scale beside it.

    Args:
        picture: RGB.
        heat: float [h, w], one value for each visual token.
        top: the value that is drawn strongest.

    Returns:
        float [height, width, 3] in [0, 1].
    """
    grey = np.asarray(picture.convert("L"), dtype=np.float64)[..., None] / 255
    level = np.clip(heat / max(top, 1e-12), 0, 1).astype(np.float32)
    large = Image.fromarray(level).resize(picture.size, Image.Resampling.NEAREST)
    return (0.55 + 0.45 * grey) * heat_map()(np.asarray(large))[..., :3]


def overlay(
    picture: Image.Image,
    maps: Sequence[ReflectionMap],
    grids: Sequence[tuple[int, int, int]],
    path: Path | None = None,
    title: str = "",
    whole: NDArray | None = None,
) -> Figure:
    """What was attended before and during each reflection, side by side over the picture.

    Args:
        picture: the image as the model saw it (its first one; frame 0 of a video).
        maps: of the reflections, from `reflection_maps`.
        grids: (t, h, w) of the row's images.
        path: where to write the PNG; None writes nothing.
        title: a line above, for example the question.
        whole: float [L_c], attention over the whole answer, drawn when there was no reflection.

    Returns:
        The figure.
    """
    from matplotlib import rc_context
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    picture = _readable(picture.convert("RGB"))
    drawn = list(maps[:MOST_ROWS])
    rows = max(len(drawn), 1)
    height = min(3.1 * picture.height / picture.width, 6.0)
    values = [part for found in drawn for part in (found.before, found.during)] or [whole]
    top = max((float(_cells(part, grids).max()) for part in values if part is not None), default=0)
    with rc_context(_STYLE):
        figure = Figure(figsize=(10.4, rows * (height + 0.62) + 0.6), layout="constrained")
        axes = figure.subplots(rows, 3 if drawn else 2, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis in axes[:, 0]:
            axis.imshow(picture)
        if not drawn:
            axes[0, 0].set_title("no reflection\n", loc="left")
            _panel(axes[0, 1], picture, whole, grids, top, "the whole answer")
        for line, found in enumerate(drawn):
            axes[line, 0].set_title(_what(line, found), loc="left")
            _panel(axes[line, 1], picture, found.before, grids, top, "before")
            _panel(axes[line, 2], picture, found.during, grids, top, "during")
            if found.during is not None:
                _mark(axes[line, 2], picture, _cells(found.shown, grids))
        if top:
            scale = ScalarMappable(Normalize(0, 100 * top), heat_map())
            bar = figure.colorbar(scale, ax=axes[:, 1:], shrink=0.75 / rows, pad=0.02, aspect=28)
            bar.set_label("attention on one visual token, %")
            bar.outline.set_edgecolor(GREY)
        _set_headline(figure, title, len(maps))
        figure.supxlabel(_caption(drawn), x=0.01, ha="left", fontsize=9, color=GREY)
        if path is not None:
            _save(figure, path)
    return figure


def curve(found: AttentionCurve, path: Path | None = None, title: str = "") -> Figure:
    """Visual attention against generated tokens, the reflections marked.

    Args:
        found: from `attention_curve`.
        path: where to write the PNG; None writes nothing.
        title: a line above.

    Returns:
        The figure: above the share of attention on the picture beside the uniform share, below
        the ratio of the two.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    step = np.arange(len(found.share))
    with rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 5.4), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        above.plot(step, 100 * found.share, color=BLUE, lw=1.6, label="attention on the picture")
        above.plot(
            step, 100 * found.uniform, color=GREY, lw=1.2, ls=(0, (4, 2)), label="if spread evenly"
        )
        above.set_ylabel("share, %")
        below.plot(step, found.ratio, color=BLUE, lw=1.6)
        below.axhline(1, color=GREY, lw=1.2, ls=(0, (4, 2)))
        below.set_ylabel("share / even share")
        below.set_xlabel("generated token")
        for axis in (above, below):
            axis.set_ylim(bottom=0)
            axis.margins(x=0.01)
            for start, end in zip(found.reflections, found.ends, strict=True):
                label = "reflection" if axis is above and start == found.reflections[0] else None
                axis.axvspan(start, end, color=ORANGE, alpha=0.14, lw=0, label=label)
                axis.axvline(start, color=ORANGE, lw=1.2)
        for number, start in enumerate(found.reflections):
            above.annotate(
                f"look {number + 1}" if len(found.reflections) > 1 else "looks again",
                (start, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(3, 2),
                textcoords="offset points",
                color=ORANGE,
                fontsize=9,
            )
        figure.legend(frameon=False, loc="outside lower left", ncols=3, fontsize=9)
        _set_headline(figure, title, width=85)
        if path is not None:
            _save(figure, path)
    return figure


def _cells(values: NDArray, grids: Sequence[tuple[int, int, int]]) -> NDArray:
    """The values of the first image's first frame, [h, w]."""
    return to_grids(values, grids)[0][0]


def _panel(
    axis: Axes,
    picture: Image.Image,
    values: NDArray | None,
    grids: Sequence[tuple[int, int, int]],
    top: float,
    when: str,
) -> None:
    if values is None:
        axis.imshow(picture.convert("L"), cmap="gray", alpha=0.25)
        axis.set_title(f"{when}\nnothing recorded", loc="left", color=GREY)
        return
    axis.imshow(heat_over(picture, _cells(values, grids), top))
    axis.set_title(f"{when}\n{float(values.sum()):.0%} of attention on the picture", loc="left")


def _mark(axis: Axes, picture: Image.Image, shown: NDArray) -> None:
    """Put a dot into the corner of each shown token, when they are some of all."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Circle

    if shown.all() or not shown.any():
        return
    height, width = picture.height / shown.shape[0], picture.width / shown.shape[1]
    many = shown.size > 200  # then the cells are small, and their dots need more of them
    radius = (0.22 if many else 0.09) * min(height, width)
    dots = [
        Circle(((column + 0.85) * width - 0.5, (row + 0.85) * height - 0.5), radius)
        for row, column in np.argwhere(shown)
    ]
    axis.add_collection(
        PatchCollection(dots, facecolor=BLUE, edgecolor="white", lw=0.5 * (not many))
    )


def _what(line: int, found: ReflectionMap) -> str:
    count = int(found.shown.sum())
    again = f"{count} of {len(found.shown)} visual tokens shown again" if count else "text only"
    return f"reflection {line + 1}, at token {found.step}\n{again}"


def _set_headline(figure: Figure, title: str, count: int = 0, width: int = 105) -> None:
    """The title above a figure, cut after a few lines: a long one would leave the plot no room."""
    lines = textwrap.wrap(title, width, max_lines=3, placeholder=" …")
    if count > MOST_ROWS:
        lines += [f"(the first {MOST_ROWS} of {count} reflections)"]
    headline = "\n".join(lines)
    figure.suptitle(headline, x=0.01, ha="left", fontsize=12, parse_math=False)


def _save(figure: Figure, path: Path) -> None:
    """Write the figure; a character that the font lacks is drawn as a box, without a word."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(path)


def _caption(drawn: Sequence[ReflectionMap]) -> str:
    text = "Mean over layers, heads and the tokens of the time. One colour scale for all panels."
    if any(0 < found.shown.sum() < len(found.shown) for found in drawn):
        text += " A blue dot: shown again."
    return text


def _readable(picture: Image.Image, least: int = 420) -> Image.Image:
    """The picture, enlarged when it has too few pixels for clean edges."""
    factor = -(-least // max(picture.size))
    if factor <= 1:
        return picture
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)
