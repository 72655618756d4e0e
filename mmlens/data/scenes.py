"""Generated questions over drawn scenes, with the evidence marked: the data of the micro model.

Four kinds show a key letter beside a value and ask for the value. They differ in layout, in the
words of the question and in the class of answers:

- `objects`: one crowded image of lettered plaques; the answer is a plaque's colour; the evidence is
  the plaque's box.
- `documents`: several pages of lines "letter ... digit"; the answer is a digit; the evidence is the
  line's box on its page.
- `frames`: a clip given as separate frames, in which each letter and shape stay for a few consecutive
  frames; the answer is a shape; the evidence is those frames.
- `images`: a long context of small marked images; the answer is a texture; the evidence is the one
  image that carries the letter.

Two kinds have no image and serve as controls: `text_recall` lists words in the question's own text and
asks for the one of a named class (the tree, the metal), `text_knowledge` for the next letter of the
alphabet, which stands nowhere in the context.

Everything is drawn from hand-made bitmaps and integer formulas, so that no font, no rasteriser and
no library version changes a pixel; the random choices come from `random.Random` seeded by a string,
so that example `i` of a seed is the same whatever else is drawn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmlens.data.examples import Box, Evidence, Example

KINDS = ("objects", "documents", "frames", "images")
TEXT_KINDS = ("text_recall", "text_knowledge")

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
CLASSES: dict[str, tuple[str, ...]] = {
    "animal": ("cat", "dog", "cow", "hen", "fox", "owl", "bee", "pig"),
    "tree": ("oak", "elm", "ash", "fir", "yew", "pine", "palm", "teak"),
    "drink": ("tea", "milk", "wine", "beer", "juice", "cider", "cocoa", "water"),
    "metal": ("iron", "gold", "zinc", "lead", "tin", "silver", "copper", "nickel"),
    "city": ("Rome", "Oslo", "Paris", "Cairo", "Delhi", "Lima", "Tokyo", "Accra"),
    "tool": ("saw", "axe", "rake", "drill", "chisel", "spade", "wrench", "hammer"),
    "fruit": ("fig", "pear", "plum", "lime", "apple", "mango", "grape", "lemon"),
    "instrument": ("drum", "flute", "harp", "horn", "viola", "piano", "cello", "guitar"),
}

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


def _texture_masks(side: int) -> dict[str, Mask]:
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


TEXTURES: dict[str, Mask] = _texture_masks(2 * CELL)
"""Ink of every texture over a whole small image, 32 by 32 pixels."""

ANSWERS: dict[str, tuple[str, ...]] = {
    "objects": tuple(COLOURS),
    "documents": DIGITS,
    "frames": tuple(SHAPES),
    "images": tuple(TEXTURES),
    "text_recall": tuple(word for words in CLASSES.values() for word in words),
    "text_knowledge": KEYS,
}
"""The full class of answers of every kind; it becomes `Example.candidates`."""

QUESTIONS: dict[str, tuple[str, ...]] = {
    "objects": ("What colour is the {key}?", "Which colour has the {key}?"),
    "documents": ("Which number is listed for {key}?", "What number stands beside {key}?"),
    "frames": ("Which shape appears together with {key}?", "What shape is shown with {key}?"),
    "images": ("What texture fills the image {key}?", "Which texture has the image marked {key}?"),
    "text_recall": ("Which of these words names the {key}?", "What was listed as the {key}?"),
    "text_knowledge": ("Which letter comes after {key}?", "What letter follows {key}?"),
}


@dataclass(frozen=True)
class Scene:
    """Everything that can be asked about one drawn context.

    `facts` gives the answer for every key that may be asked; `evidence` where it is drawn.
    `contents[i][row][column]` holds the words of what the 16 x 16 cell of image i belongs to: both
    key and value for every cell of an object, line, frame or image, nothing for background.
    `preamble` is text that stands before the question (the stated facts of `text_recall`).
    """

    kind: str
    facts: dict[str, str]
    images: tuple[Image.Image, ...] = ()
    evidence: dict[str, tuple[Evidence, ...]] | None = None
    contents: tuple[tuple[tuple[tuple[str, ...], ...], ...], ...] = ()
    preamble: str = ""

    def question(self, key: str, phrasing: int = 0) -> str:
        """The question about `key`, the stated facts included, in one of the kind's phrasings."""
        return self.preamble + QUESTIONS[self.kind][phrasing].format(key=key)

    def example(self, key: str, phrasing: int = 0, id: str = "") -> Example:
        """The question about `key` with its answer, candidates and evidence."""
        return Example(
            question=self.question(key, phrasing),
            answer=self.facts[key],
            images=self.images,
            evidence=() if self.evidence is None else self.evidence[key],
            kind=self.kind,
            candidates=ANSWERS[self.kind],
            id=id,
            group=id,
            metadata={"key": key, "facts": dict(self.facts)},
        )


def scene_examples(kind: str, n: int, seed: int) -> list[Example]:
    """`n` examples of one kind, one question per freshly drawn scene, determined by `seed`.

    Example i depends on (kind, seed, i) alone. Different seeds give different scenes; the training
    script of the micro model draws with seeds from 2**20 on, so smaller seeds are unseen by it.

    Raises ValueError for an unknown kind or a negative `n`.

    >>> example = scene_examples("objects", 1, seed=0)[0]
    >>> len(example.images), len(example.evidence), example.answer in example.candidates
    (1, 1, True)
    """
    _check_kind(kind)
    if n < 0:
        raise ValueError(f"the number of examples must not be negative, got {n}")
    examples = []
    for index in range(n):
        rng = random.Random(f"{kind}/{seed}/{index}")
        scene = draw_scene(kind, rng)
        key = rng.choice(sorted(scene.facts))
        phrasing = rng.randrange(len(QUESTIONS[kind]))
        examples.append(scene.example(key, phrasing, id=f"{kind}-{seed}-{index}"))
    return examples


def draw_scene(kind: str, rng: random.Random) -> Scene:
    """One scene of `kind`, its choices taken from `rng`.

    Raises ValueError for an unknown kind.

    >>> scene = draw_scene("text_knowledge", random.Random(0))
    >>> scene.facts["K"], scene.facts["Z"]
    ('L', 'A')
    """
    _check_kind(kind)
    return _DRAW[kind](rng)


def scene_vocabulary() -> list[str]:
    """Every word and mark that a question or an answer of any kind may hold, sorted.

    >>> {"colour", "red", "K", "?"} <= set(scene_vocabulary())
    True
    """
    text = " ".join(question for kind in QUESTIONS for question in QUESTIONS[kind])
    words = set(text.replace("{key}", " ").replace("?", " ? ").split()) | set(_LIST_MARKS)
    return sorted(words.union(KEYS, CLASSES, *ANSWERS.values()))


def _check_kind(kind: str) -> None:
    if kind not in _DRAW:
        nearest = get_close_matches(kind, _DRAW, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown kind {kind!r}; the kinds are {', '.join(_DRAW)} (nearest: {nearest!r})")


def _objects(rng: random.Random) -> Scene:
    rows, columns = 6, 6
    canvas = _canvas(rows, columns, _tint(rng, 225, 250))
    slots = [(row, column) for row in range(rows) for column in range(0, columns, 2)]
    count = rng.randint(10, 14)
    contents = _Contents(rows, columns)
    facts: dict[str, str] = {}
    evidence: dict[str, tuple[Evidence, ...]] = {}
    for key, (row, column) in zip(rng.sample(KEYS, count), rng.sample(slots, count), strict=True):
        colour = rng.choice(list(COLOURS))
        top, left = CELL * row, CELL * column
        canvas[top + 1 : top + CELL - 1, left + 1 : left + 2 * CELL - 1] = COLOURS[colour]
        dark = sum(COLOURS[colour]) < 330
        _stamp(
            canvas, GLYPHS[key], top + 1, left + 3 + CELL * rng.randrange(2), (255,) * 3 if dark else (0,) * 3
        )
        contents.fill(row, column, 1, 2, (key, colour))
        facts[key] = colour
        evidence[key] = (Evidence(0, _box(left, top, 2 * CELL, CELL)),)
    return Scene("objects", facts, (Image.fromarray(canvas),), evidence, (contents.freeze(),))


def _documents(rng: random.Random) -> Scene:
    pages, rows, columns = rng.randint(3, 4), 4, 3
    lines = [(page, row) for page in range(pages) for row in range(rows)]
    count = len(lines) - rng.randint(0, 3)
    canvases = [_canvas(rows, columns, _tint(rng, 235, 255)) for _ in range(pages)]
    contents = [_Contents(rows, columns) for _ in range(pages)]
    facts: dict[str, str] = {}
    evidence: dict[str, tuple[Evidence, ...]] = {}
    for key, (page, row) in zip(rng.sample(KEYS, count), sorted(rng.sample(lines, count)), strict=True):
        digit = rng.choice(DIGITS)
        ink = _tint(rng, 0, 70)
        top = CELL * row
        _stamp(canvases[page], GLYPHS[key], top + 1, 3, ink)
        # A leader of dots joins the letter to its digit, as in a table of contents.
        canvases[page][top + 12 : top + 14, CELL + 2 : 2 * CELL : 4] = ink
        canvases[page][top + 12 : top + 14, CELL + 3 : 2 * CELL : 4] = ink
        _stamp(canvases[page], GLYPHS[digit], top + 1, 2 * CELL + 3, ink)
        contents[page].fill(row, 0, 1, columns, (key, digit))
        facts[key] = digit
        evidence[key] = (Evidence(page, _box(0, top, columns * CELL, CELL)),)
    images = tuple(Image.fromarray(canvas) for canvas in canvases)
    return Scene("documents", facts, images, evidence, tuple(page.freeze() for page in contents))


def _frames(rng: random.Random) -> Scene:
    spans = [2] * 6
    for _ in range(rng.randint(0, 2)):
        # Two spans of three take the place of three spans of two: always twelve frames.
        spans = [*spans[3:], 3, 3]
    rng.shuffle(spans)
    background = _tint(rng, 20, 70)
    images: list[Image.Image] = []
    contents = []
    facts: dict[str, str] = {}
    evidence: dict[str, tuple[Evidence, ...]] = {}
    for key, length in zip(rng.sample(KEYS, len(spans)), spans, strict=True):
        shape = rng.choice(list(SHAPES))
        ink = _tint(rng, 140, 255)
        facts[key] = shape
        evidence[key] = tuple(Evidence(len(images) + offset) for offset in range(length))
        for _ in range(length):
            canvas = _canvas(2, 2, background)
            _plaque(canvas, key, CELL * rng.randrange(2), 0)
            _stamp(canvas, SHAPES[shape], CELL * rng.randrange(2) + 1, CELL + 1, ink)
            images.append(Image.fromarray(canvas))
            contents.append(_whole(2, 2, (key, shape)))
    return Scene("frames", facts, tuple(images), evidence, tuple(contents))


def _images(rng: random.Random) -> Scene:
    images: list[Image.Image] = []
    contents = []
    facts: dict[str, str] = {}
    evidence: dict[str, tuple[Evidence, ...]] = {}
    for index, key in enumerate(rng.sample(KEYS, rng.randint(12, 14))):
        texture = rng.choice(list(TEXTURES))
        canvas = _canvas(2, 2, _tint(rng, 170, 240))
        canvas[TEXTURES[texture]] = _tint(rng, 20, 110)
        _plaque(canvas, key, CELL * rng.randrange(2), CELL * rng.randrange(2))
        images.append(Image.fromarray(canvas))
        contents.append(_whole(2, 2, (key, texture)))
        facts[key] = texture
        evidence[key] = (Evidence(index),)
    return Scene("images", facts, tuple(images), evidence, tuple(contents))


_LIST_MARKS = ("Words", ":", ",", ".")


def _text_recall(rng: random.Random) -> Scene:
    facts = {key: rng.choice(CLASSES[key]) for key in rng.sample(list(CLASSES), rng.randint(5, 8))}
    return Scene("text_recall", facts, preamble=f"Words: {', '.join(facts.values())}. ")


def _text_knowledge(rng: random.Random) -> Scene:
    return Scene("text_knowledge", dict(zip(KEYS, KEYS[1:] + KEYS[:1], strict=True)))


_DRAW: dict[str, Callable[[random.Random], Scene]] = {
    "objects": _objects,
    "documents": _documents,
    "frames": _frames,
    "images": _images,
    "text_recall": _text_recall,
    "text_knowledge": _text_knowledge,
}


class _Contents:
    """The words of every cell of one image while it is being drawn."""

    def __init__(self, rows: int, columns: int) -> None:
        self.cells: list[list[tuple[str, ...]]] = [[()] * columns for _ in range(rows)]

    def fill(self, row: int, column: int, height: int, width: int, words: tuple[str, ...]) -> None:
        for line in self.cells[row : row + height]:
            line[column : column + width] = [words] * width

    def freeze(self) -> tuple[tuple[tuple[str, ...], ...], ...]:
        return tuple(tuple(line) for line in self.cells)


def _whole(rows: int, columns: int, words: tuple[str, ...]) -> tuple[tuple[tuple[str, ...], ...], ...]:
    return ((words,) * columns,) * rows


def _box(left: int, top: int, width: int, height: int) -> Box:
    return (float(left), float(top), float(left + width), float(top + height))


def _tint(rng: random.Random, low: int, high: int) -> Rgb:
    return (rng.randint(low, high), rng.randint(low, high), rng.randint(low, high))


def _canvas(rows: int, columns: int, colour: Rgb) -> Canvas:
    return np.full((CELL * rows, CELL * columns, 3), colour, dtype=np.uint8)


def _stamp(canvas: Canvas, ink: Mask, top: int, left: int, colour: tuple[int, ...]) -> None:
    height, width = ink.shape
    canvas[top : top + height, left : left + width][ink] = colour


def _plaque(canvas: Canvas, key: str, top: int, left: int) -> None:
    canvas[top : top + CELL, left : left + CELL] = 255
    _stamp(canvas, GLYPHS[key], top + 1, left + 3, (0, 0, 0))


def iterate_scenes(kind: str, seed: int) -> Iterator[Scene]:
    """Scenes of one kind without end, for training: scene i is determined by (kind, seed, i)."""
    _check_kind(kind)
    index = 0
    while True:
        yield draw_scene(kind, random.Random(f"{kind}/{seed}/{index}"))
        index += 1
