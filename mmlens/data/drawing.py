"""What scenes are drawn from: hand-made bitmaps of letters, digits, shapes and textures, and named colours.

Bitmaps and integer formulas alone, so that no font, no rasteriser and no library version changes a pixel.
"""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray

CELL = 16
"""Side in pixels of the square that one visual token of the micro model covers."""

KEYS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 220, 50),
    "orange": (245, 140, 20),
    "purple": (130, 50, 170),
    "pink": (250, 150, 200),
    "brown": (120, 75, 35),
    "cyan": (60, 210, 225),
    "grey": (130, 130, 130),
}
DIGITS = tuple("0123456789")
# Rows of five: "#" is ink.
_GLYPH_ROWS = {
    "A": ".###. #...# #...# ##### #...# #...# #...#",
    "B": "####. #...# #...# ####. #...# #...# ####.",
    "C": ".#### #.... #.... #.... #.... #.... .####",
    "D": "####. #...# #...# #...# #...# #...# ####.",
    "E": "##### #.... #.... ####. #.... #.... #####",
    "F": "##### #.... #.... ####. #.... #.... #....",
    "G": ".#### #.... #.... #.### #...# #...# .###.",
    "H": "#...# #...# #...# ##### #...# #...# #...#",
    "I": "##### ..#.. ..#.. ..#.. ..#.. ..#.. #####",
    "J": "..### ....# ....# ....# ....# #...# .###.",
    "K": "#...# #..#. #.#.. ##... #.#.. #..#. #...#",
    "L": "#.... #.... #.... #.... #.... #.... #####",
    "M": "#...# ##.## #.#.# #.#.# #...# #...# #...#",
    "N": "#...# ##..# ##..# #.#.# #..## #..## #...#",
    "O": ".###. #...# #...# #...# #...# #...# .###.",
    "P": "####. #...# #...# ####. #.... #.... #....",
    "Q": ".###. #...# #...# #...# #.#.# #..#. .##.#",
    "R": "####. #...# #...# ####. #.#.. #..#. #...#",
    "S": ".#### #.... #.... .###. ....# ....# ####.",
    "T": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    "U": "#...# #...# #...# #...# #...# #...# .###.",
    "V": "#...# #...# #...# #...# .#.#. .#.#. ..#..",
    "W": "#...# #...# #...# #.#.# #.#.# ##.## #...#",
    "X": "#...# .#.#. .#.#. ..#.. .#.#. .#.#. #...#",
    "Y": "#...# #...# .#.#. ..#.. ..#.. ..#.. ..#..",
    "Z": "##### ....# ...#. ..#.. .#... #.... #####",
    "0": ".###. #..## #..## #.#.# ##..# ##..# .###.",
    "1": "..#.. .##.. #.#.. ..#.. ..#.. ..#.. #####",
    "2": ".###. #...# ....# ..##. .#... #.... #####",
    "3": "####. ....# ....# .###. ....# ....# ####.",
    "4": "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "5": "##### #.... ####. ....# ....# #...# .###.",
    "6": "..##. .#... #.... ####. #...# #...# .###.",
    "7": "##### ....# ....# ...#. ..#.. ..#.. ..#..",
    "8": ".###. #...# #...# .###. #...# #...# .###.",
    "9": ".###. #...# #...# .#### ....# ...#. .##..",
}

Mask = NDArray[np.bool_]
Canvas = NDArray[np.uint8]
Rgb = tuple[int, int, int]


def _glyph(character: str) -> Mask:
    rows = _GLYPH_ROWS[character].split()
    small = np.array([[pixel == "#" for pixel in row] for row in rows])
    return small.repeat(2, axis=0).repeat(2, axis=1)


GLYPHS: dict[str, Mask] = {character: _glyph(character) for character in _GLYPH_ROWS}
"""Ink of every letter and digit, 14 rows by 10 columns."""


def _shape_masks() -> dict[str, Mask]:
    # Odd coordinates -13 .. 13 keep every test in integers and every shape symmetric.
    x, y = np.meshgrid(np.arange(-13, 14, 2), np.arange(-13, 14, 2))
    radius = x * x + y * y
    return {
        "circle": radius <= 170,
        "square": np.maximum(abs(x), abs(y)) <= 11,
        "triangle": 2 * abs(x) <= y + 13,
        "diamond": abs(x) + abs(y) <= 14,
        "cross": abs(abs(x) - abs(y)) <= 4,
        "plus": np.minimum(abs(x), abs(y)) <= 3,
        "ring": (radius <= 170) & (radius >= 70),
        "arrow": np.where(x < 0, abs(y) <= 3, abs(y) <= 13 - x),
        "moon": (radius <= 170) & ((x - 7) ** 2 + y * y >= 120),
        "frame": np.maximum(abs(x), abs(y)) >= 9,
    }


SHAPES: dict[str, Mask] = _shape_masks()
"""Ink of every shape, 14 by 14 pixels."""


def texture_masks(side: int) -> dict[str, Mask]:
    """Ink of every texture over a square of `side` pixels."""
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    fold = abs(x % 8 - 4)
    return {
        "stripes": y % 4 < 2,
        "bars": x % 4 < 2,
        "diagonals": (x + y) % 8 < 4,
        "checks": (x // 4 + y // 4) % 2 == 0,
        "dots": (x % 4 < 2) & (y % 4 < 2),
        "grid": (x % 8 < 2) | (y % 8 < 2),
        "zigzags": (y + fold) % 8 < 3,
        "bricks": (y % 4 == 0) | ((x + 4 * (y // 4 % 2)) % 8 == 0),
        "rings": np.maximum(abs(2 * (x % 8) - 7), abs(2 * (y % 8) - 7)) // 2 % 2 == 0,
        "blank": np.zeros_like(x, dtype=bool),
    }


TEXTURES: dict[str, Mask] = texture_masks(2 * CELL)
"""Ink of every texture over a whole small image, 32 by 32 pixels."""


def tint(rng: random.Random, low: int, high: int) -> Rgb:
    """A colour with each channel drawn from low to high."""
    return (rng.randint(low, high), rng.randint(low, high), rng.randint(low, high))


def blank_canvas(rows: int, columns: int, colour: Rgb) -> Canvas:
    """An image of rows x columns cells in one colour."""
    return np.full((CELL * rows, CELL * columns, 3), colour, dtype=np.uint8)


def stamp(canvas: Canvas, ink: Mask, top: int, left: int, colour: tuple[int, ...]) -> None:
    """Print a bitmap onto the canvas, in place."""
    height, width = ink.shape
    canvas[top : top + height, left : left + width][ink] = colour


def ink_on(colour: Rgb) -> Rgb:
    """Black, or white on dark colours."""
    return (255, 255, 255) if sum(colour) < 330 else (0, 0, 0)


def plaque(canvas: Canvas, key: str, top: int, left: int, colour: Rgb = (255, 255, 255)) -> None:
    """A cell of one colour with a letter or digit on it, in place."""
    canvas[top : top + CELL, left : left + CELL] = colour
    stamp(canvas, GLYPHS[key], top + 1, left + 3, ink_on(colour))
