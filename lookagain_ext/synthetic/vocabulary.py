"""What a scene may contain: the words of the shipped task."""

from __future__ import annotations

KINDS: tuple[str, ...] = ("circle", "square", "triangle", "star")
COLOURS: dict[str, tuple[tuple[int, int, int], ...]] = {  # RGB: soft, full and dark
    "red": ((220, 38, 38), (255, 0, 0), (190, 20, 45)),
    "green": ((34, 160, 60), (0, 210, 0), (0, 120, 30)),
    "blue": ((37, 80, 220), (0, 0, 255), (20, 50, 150)),
    "yellow": ((245, 200, 20), (255, 240, 0), (225, 180, 0)),
    "purple": ((150, 50, 190), (190, 0, 220), (110, 20, 130)),
    "black": ((25, 25, 25), (0, 0, 0), (45, 45, 50)),
}
SIZES: tuple[str, ...] = ("small", "large")
COLUMNS = "ABCDE"
ROWS = 5
CELLS: tuple[str, ...] = tuple(f"{column}{row + 1}" for row in range(ROWS) for column in COLUMNS)
