"""Scenes: boards of coloured shapes whose content is known exactly, drawn as pictures.

A board has five columns A to E and five rows 1 to 5, named along the top and left edge like a
chess board, so that a cell can be read off the picture alone. One cell is as large as one visual
token of the tiny model: 28 of the 168 units of a side, the names taking the first 28.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from .vocabulary import CELLS, COLOURS, COLUMNS, KINDS, ROWS, SIZES

CELL_UNITS = 28
BOARD_UNITS = CELL_UNITS * (ROWS + 1)
_RADIUS = {"small": (5.0, 6.5), "large": (10.0, 12.0)}
_PAPER = ((255, 255, 255), (250, 248, 240), (238, 240, 244))


@dataclass(frozen=True)
class Shape:
    """One shape: its kind, colour and size (words of the vocabulary) and its cell, "A1" to "E5"."""

    kind: str
    colour: str
    size: str
    cell: str

    def __post_init__(self) -> None:
        """Check the words."""
        for name, value, known in (
            ("kind", self.kind, KINDS),
            ("colour", self.colour, tuple(COLOURS)),
            ("size", self.size, SIZES),
            ("cell", self.cell, CELLS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")

    @property
    def column(self) -> int:
        """Column number, 0 for A."""
        return COLUMNS.index(self.cell[0])

    @property
    def row(self) -> int:
        """Row number, 0 for row 1."""
        return int(self.cell[1]) - 1

    @property
    def name(self) -> str:
        """For example "large red circle"."""
        return f"{self.size} {self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """A board: its shapes in reading order, and the seed of the small accidents of drawing."""

    shapes: tuple[Shape, ...]
    style: int = 0

    def __post_init__(self) -> None:
        """Check that no cell is taken twice, and bring the shapes into reading order."""
        cells = [shape.cell for shape in self.shapes]
        if len(set(cells)) != len(cells):
            raise ValueError(f"two shapes share a cell: {', '.join(cells)}")
        ordered = sorted(self.shapes, key=lambda shape: CELLS.index(shape.cell))
        object.__setattr__(self, "shapes", tuple(ordered))

    def at(self, cell: str) -> Shape | None:
        """The shape in ``cell``, or None."""
        return next((shape for shape in self.shapes if shape.cell == cell), None)

    @classmethod
    def random(cls, seed: int | str, most: int = 10) -> Scene:
        """A random board of 3 to ``most`` shapes; the same seed gives the same board.

        Each board draws from two to four of the kinds and two to four of the colours, so that
        shapes with something in common are frequent.
        """
        if not 3 <= most <= len(CELLS):
            raise ValueError(f"most must be between 3 and {len(CELLS)}, got {most}")
        rng = random.Random(f"scene-{seed}")
        kinds = rng.sample(KINDS, rng.randint(2, 4))
        colours = rng.sample(tuple(COLOURS), rng.randint(2, 4))
        cells = rng.sample(CELLS, rng.randint(3, most))
        shapes = tuple(
            Shape(rng.choice(kinds), rng.choice(colours), rng.choice(SIZES), cell) for cell in cells
        )
        return cls(shapes, rng.randrange(2**31))

    def render(self, scale: int = 2) -> Image.Image:
        """The picture, RGB, ``168 * scale`` pixels a side."""
        if not 1 <= scale <= 32:
            raise ValueError(f"scale must be between 1 and 32, got {scale}")
        rng = random.Random(self.style)
        look = (rng.randrange(len(_PAPER)), rng.random() < 0.8, rng.choice((40, 90)))
        image = _paper(*look, scale).copy()
        draw = ImageDraw.Draw(image)
        tone = rng.randrange(3)
        outline = (40, 40, 40) if rng.random() < 0.15 else None
        for shape in self.shapes:
            radius = rng.uniform(*_RADIUS[shape.size])
            room = (CELL_UNITS / 2 - radius - 0.5) * 0.5
            x = (shape.column + 1.5) * CELL_UNITS + rng.uniform(-room, room)
            y = (shape.row + 1.5) * CELL_UNITS + rng.uniform(-room, room)
            colour = tuple(
                max(0, min(255, part + rng.randint(-12, 12)))
                for part in COLOURS[shape.colour][tone]
            )
            _draw(draw, shape.kind, x * scale, y * scale, radius * scale, colour, outline)
        return image


@functools.lru_cache(maxsize=64)
def _paper(number: int, lines: bool, ink: int, scale: int) -> Image.Image:
    """An empty board with lines and names."""
    side = BOARD_UNITS * scale
    image = Image.new("RGB", (side, side), _PAPER[number])
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=18 * scale)
    for i in range(ROWS):
        middle = (i + 1.5) * CELL_UNITS * scale
        for text, place in ((COLUMNS[i], (middle, 14 * scale)), (str(i + 1), (14 * scale, middle))):
            draw.text(place, text, fill=(ink, ink, ink), font=font, anchor="mm")
        if not lines:
            continue
        line = (i + 1) * CELL_UNITS * scale
        draw.line((line, CELL_UNITS * scale, line, side), fill=(205, 205, 210), width=scale)
        draw.line((CELL_UNITS * scale, line, side, line), fill=(205, 205, 210), width=scale)
    return image


def _draw(
    draw: ImageDraw.ImageDraw,
    kind: str,
    x: float,
    y: float,
    radius: float,
    colour: tuple[int, ...],
    outline: tuple[int, ...] | None,
) -> None:
    """Draw one shape around (x, y), all in pixels."""
    if kind == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline=outline)
    elif kind == "square":
        half = radius * 0.88
        draw.rectangle((x - half, y - half, x + half, y + half), fill=colour, outline=outline)
    else:
        points = 3 if kind == "triangle" else 10
        corners = []
        for i in range(points):
            reach = radius * (1.1 if kind == "triangle" else (1.15, 0.46)[i % 2])
            angle = 2 * math.pi * i / points - math.pi / 2
            corners.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
        draw.polygon(corners, fill=colour, outline=outline)
