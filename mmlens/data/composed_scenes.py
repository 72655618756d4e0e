"""Scenes in which a question's words must be put together before anything can be found: the data of the zoo.

Every image is 64 x 64, four by four cells. Each key is two words, and other items share one of them, so that
neither word alone tells which item is meant. The four kinds are those of `one_key_scenes`, made harder:

- `composed_objects`: coloured shapes in one image, each with a digit; asked by colour and shape.
- `composed_documents`: pages of lines "letter letter ... digit"; asked by both letters.
- `composed_frames`: a clip of eight frames, a letter on a coloured plaque and a shape in each; asked by colour
  and letter; the evidence is one frame or two that follow each other.
- `composed_images`: eight textured images with a letter on a coloured plaque; asked by colour and letter.

A fifth takes two steps: in `legends` the first image says which colour each letter stands for, the second shows
numbers on coloured plaques, and the question names the letter. Its evidence are both regions.

A sixth asks for a spatial relation: `relations` is a board of letters and digits in turn, and the question names a
letter and a direction. Nothing but place joins the two cells, which are the evidence.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations, product

from PIL import Image

from mmlens.data.drawing import (
    CELL,
    COLOURS,
    DIGITS,
    GLYPHS,
    KEYS,
    SHAPES,
    blank_canvas,
    plaque,
    stamp,
    texture_masks,
    tint,
)
from mmlens.data.examples import Evidence
from mmlens.data.scene import Cells, Contents, Kind, Scene, box, whole

SIDE = 4
"""Cells along each side of every image."""

TEXTURES = texture_masks(SIDE * CELL)

OBJECTS = Kind(
    "composed_objects",
    ("Which number is on the {0} {1}?", "What number has the {1} that is {0}?"),
    DIGITS,
)
DOCUMENTS = Kind(
    "composed_documents",
    ("Which number is listed for {0} {1}?", "What number stands beside {0} and {1}?"),
    DIGITS,
)
FRAMES = Kind(
    "composed_frames",
    ("Which shape appears together with the {0} {1}?", "What shape is shown with the {1} on {0}?"),
    tuple(SHAPES),
)
IMAGES = Kind(
    "composed_images",
    ("What texture fills the image with the {0} {1}?", "Which texture has the image marked {1} on {0}?"),
    tuple(TEXTURES),
)
LEGENDS = Kind(
    "legends",
    ("Which number is on the colour of {0}?", "What number has the colour that stands for {0}?"),
    DIGITS,
)
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""(rows, columns) of one step."""

RELATIONS = Kind(
    "relations",
    ("Which number is one step {0} from {1}?", "What number comes next going {0} from {1}?"),
    DIGITS,
    key_words=tuple(DIRECTIONS),
)

Regions = dict[str, tuple[Evidence, ...]]


def draw_objects(rng: random.Random) -> Scene:
    canvas = blank_canvas(SIDE, SIDE, tint(rng, 170, 215))
    contents = Contents(SIDE, SIDE)
    facts: dict[str, str] = {}
    evidence: Regions = {}
    count = rng.randint(7, 8)
    names = list(product(rng.sample(list(COLOURS), 3), rng.sample(list(SHAPES), 3)))
    for (colour, shape), (row, column) in zip(rng.sample(names, count), _plates(rng, count), strict=True):
        digit = rng.choice(DIGITS)
        top, left = CELL * row, CELL * column
        canvas[top : top + CELL, left : left + 2 * CELL] = 255
        stamp(canvas, SHAPES[shape], top + 1, left + 1, COLOURS[colour])
        stamp(canvas, GLYPHS[digit], top + 1, left + CELL + 3, (0, 0, 0))
        contents.fill(row, column, 1, 2, (colour, shape, digit))
        key = f"{colour} {shape}"
        facts[key] = digit
        evidence[key] = (Evidence(0, box(left, top, 2 * CELL, CELL)),)
    return Scene(OBJECTS, facts, (Image.fromarray(canvas),), evidence, (contents.freeze(),))


def draw_documents(rng: random.Random) -> Scene:
    pages = 3
    canvases = [blank_canvas(SIDE, SIDE, tint(rng, 235, 255)) for _ in range(pages)]
    contents = [Contents(SIDE, SIDE) for _ in range(pages)]
    facts: dict[str, str] = {}
    evidence: Regions = {}
    pairs = rng.sample(list(combinations(rng.sample(KEYS, 6), 2)), pages * SIDE)
    for line, pair in enumerate(pairs):
        page, row = divmod(line, SIDE)
        first, second = rng.sample(pair, 2)
        digit, ink, top = rng.choice(DIGITS), tint(rng, 0, 70), CELL * row
        for column, character in ((0, first), (1, second), (3, digit)):
            stamp(canvases[page], GLYPHS[character], top + 1, CELL * column + 3, ink)
        # A leader of dots joins the letters to their digit.
        canvases[page][top + 12 : top + 14, 2 * CELL + 2 : 3 * CELL : 4] = ink
        canvases[page][top + 12 : top + 14, 2 * CELL + 3 : 3 * CELL : 4] = ink
        contents[page].fill(row, 0, 1, SIDE, (first, second, digit))
        key = f"{first} {second}"
        facts[key] = digit
        evidence[key] = (Evidence(page, box(0, top, SIDE * CELL, CELL)),)
    images = tuple(Image.fromarray(canvas) for canvas in canvases)
    return Scene(DOCUMENTS, facts, images, evidence, tuple(page.freeze() for page in contents))


def draw_frames(rng: random.Random) -> Scene:
    count = rng.choice((5, 6))
    lengths = [2] * (8 - count) + [1] * (2 * count - 8)
    rng.shuffle(lengths)
    background = tint(rng, 170, 215)
    images: list[Image.Image] = []
    contents: list[Cells] = []
    facts: dict[str, str] = {}
    evidence: Regions = {}
    for (colour, letter), length in zip(_marks(rng, count), lengths, strict=True):
        shape, ink = rng.choice(list(SHAPES)), tint(rng, 0, 70)
        key = f"{colour} {letter}"
        facts[key] = shape
        evidence[key] = tuple(Evidence(len(images) + offset) for offset in range(length))
        for _ in range(length):
            canvas = blank_canvas(SIDE, SIDE, background)
            plaque(canvas, letter, CELL * rng.randrange(2), CELL * rng.randrange(SIDE), COLOURS[colour])
            bottom, left = CELL * (2 + rng.randrange(2)), CELL * rng.randrange(SIDE)
            stamp(canvas, SHAPES[shape], bottom + 1, left + 1, ink)
            images.append(Image.fromarray(canvas))
            contents.append(whole(SIDE, SIDE, (colour, letter, shape)))
    return Scene(FRAMES, facts, tuple(images), evidence, tuple(contents))


def draw_images(rng: random.Random) -> Scene:
    images: list[Image.Image] = []
    contents: list[Cells] = []
    facts: dict[str, str] = {}
    evidence: Regions = {}
    for index, (colour, letter) in enumerate(_marks(rng, 8)):
        texture = rng.choice(list(TEXTURES))
        canvas = blank_canvas(SIDE, SIDE, tint(rng, 170, 240))
        canvas[TEXTURES[texture]] = tint(rng, 20, 110)
        plaque(canvas, letter, CELL * rng.randrange(SIDE), CELL * rng.randrange(SIDE), COLOURS[colour])
        images.append(Image.fromarray(canvas))
        contents.append(whole(SIDE, SIDE, (colour, letter, texture)))
        key = f"{colour} {letter}"
        facts[key] = texture
        evidence[key] = (Evidence(index),)
    return Scene(IMAGES, facts, tuple(images), evidence, tuple(contents))


def draw_legends(rng: random.Random) -> Scene:
    legend, board = (blank_canvas(SIDE, SIDE, tint(rng, 225, 255)) for _ in range(2))
    lines, plates = Contents(SIDE, SIDE), Contents(SIDE, SIDE)
    facts: dict[str, str] = {}
    evidence: Regions = {}
    colours, letters = rng.sample(list(COLOURS), 7), rng.sample(KEYS, SIDE)
    order = rng.sample(range(SIDE), SIDE)
    for index, (colour, (row, column)) in enumerate(zip(colours, _plates(rng, 7), strict=True)):
        digit, top, left = rng.choice(DIGITS), CELL * row, CELL * column
        board[top + 1 : top + CELL - 1, left + 1 : left + 2 * CELL - 1] = COLOURS[colour]
        plaque(board, digit, top, left + CELL * rng.randrange(2))
        plates.fill(row, column, 1, 2, (colour, digit))
        if index < SIDE:
            letter, line = letters[index], CELL * order[index]
            stamp(legend, GLYPHS[letter], line + 1, 3, (0, 0, 0))
            legend[line + 2 : line + CELL - 2, CELL + 2 : SIDE * CELL - 2] = COLOURS[colour]
            lines.fill(order[index], 0, 1, SIDE, (letter, colour))
            facts[letter] = digit
            evidence[letter] = (
                Evidence(0, box(0, line, SIDE * CELL, CELL)),
                Evidence(1, box(left, top, 2 * CELL, CELL)),
            )
    images = (Image.fromarray(legend), Image.fromarray(board))
    hops = dict(zip(letters, colours[:SIDE], strict=True))
    return Scene(LEGENDS, facts, images, evidence, (lines.freeze(), plates.freeze()), hops=hops)


def draw_relations(rng: random.Random) -> Scene:
    canvas = blank_canvas(SIDE, SIDE, tint(rng, 200, 255))
    contents = Contents(SIDE, SIDE)
    facts: dict[str, str] = {}
    evidence: Regions = {}
    odd, letters, ink = rng.randrange(2), rng.sample(KEYS, SIDE * SIDE // 2), tint(rng, 0, 70)
    cells = list(product(range(SIDE), repeat=2))
    of_letter = (cell for cell in cells if sum(cell) % 2 == odd)
    board = dict(zip(of_letter, letters, strict=True))
    board |= {cell: rng.choice(DIGITS) for cell in cells if sum(cell) % 2 != odd}
    for (row, column), character in board.items():
        stamp(canvas, GLYPHS[character], CELL * row + 1, CELL * column + 3, ink)
        contents.fill(row, column, 1, 1, (character,))
    for (row, column), letter in board.items():
        for direction, (down, right) in DIRECTIONS.items():
            there = (row + down, column + right)
            if letter in KEYS and there in board:
                key = f"{direction} {letter}"
                facts[key] = board[there]
                top, left = CELL * min(row, there[0]), CELL * min(column, there[1])
                region = box(left, top, CELL * (1 + abs(right)), CELL * (1 + abs(down)))
                evidence[key] = (Evidence(0, region),)
    return Scene(RELATIONS, facts, (Image.fromarray(canvas),), evidence, (contents.freeze(),))


def _plates(rng: random.Random, count: int) -> list[tuple[int, int]]:
    """Cells (row, column) at which `count` items of one row and two columns begin."""
    return rng.sample(list(product(range(SIDE), range(0, SIDE, 2))), count)


def _marks(rng: random.Random, count: int) -> Sequence[tuple[str, str]]:
    """`count` of the nine pairs of three colours and three letters."""
    return rng.sample(list(product(rng.sample(list(COLOURS), 3), rng.sample(KEYS, 3))), count)
