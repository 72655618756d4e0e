"""Scenes in which one key letter is asked for: the data of the model `micro`.

A key stands beside a value. Four kinds differ in layout, in the words of the question and in the class of answers:

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
"""

from __future__ import annotations

import random

from PIL import Image

from mmlens.data.drawing import (
    CELL,
    COLOURS,
    DIGITS,
    GLYPHS,
    KEYS,
    SHAPES,
    TEXTURES,
    blank_canvas,
    ink_on,
    plaque,
    stamp,
    tint,
)
from mmlens.data.examples import Evidence
from mmlens.data.scene import Contents, Kind, Scene, box, whole

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

OBJECTS = Kind("objects", ("What colour is the {0}?", "Which colour has the {0}?"), tuple(COLOURS))
DOCUMENTS = Kind("documents", ("Which number is listed for {0}?", "What number stands beside {0}?"), DIGITS)
FRAMES = Kind(
    "frames", ("Which shape appears together with {0}?", "What shape is shown with {0}?"), tuple(SHAPES)
)
IMAGES = Kind(
    "images",
    ("What texture fills the image {0}?", "Which texture has the image marked {0}?"),
    tuple(TEXTURES),
)
TEXT_RECALL = Kind(
    "text_recall",
    ("Which of these words names the {0}?", "What was listed as the {0}?"),
    tuple(word for words in CLASSES.values() for word in words),
)
TEXT_KNOWLEDGE = Kind("text_knowledge", ("Which letter comes after {0}?", "What letter follows {0}?"), KEYS)


def draw_objects(rng: random.Random) -> Scene:
    rows, columns = 6, 6
    canvas = blank_canvas(rows, columns, tint(rng, 225, 250))
    slots = [(row, column) for row in range(rows) for column in range(0, columns, 2)]
    count = rng.randint(10, 14)
    contents = Contents(rows, columns)
    facts: dict[str, str] = {}
    evidence: dict[str, tuple[Evidence, ...]] = {}
    for key, (row, column) in zip(rng.sample(KEYS, count), rng.sample(slots, count), strict=True):
        colour = rng.choice(list(COLOURS))
        top, left = CELL * row, CELL * column
        canvas[top + 1 : top + CELL - 1, left + 1 : left + 2 * CELL - 1] = COLOURS[colour]
        ink = ink_on(COLOURS[colour])
        stamp(canvas, GLYPHS[key], top + 1, left + 3 + CELL * rng.randrange(2), ink)
        contents.fill(row, column, 1, 2, (key, colour))
        facts[key] = colour
        evidence[key] = (Evidence(0, box(left, top, 2 * CELL, CELL)),)
    return Scene(OBJECTS, facts, (Image.fromarray(canvas),), evidence, (contents.freeze(),))


def draw_documents(rng: random.Random) -> Scene:
    pages, rows, columns = rng.randint(3, 4), 4, 3
    lines = [(page, row) for page in range(pages) for row in range(rows)]
    count = len(lines) - rng.randint(0, 3)
    canvases = [blank_canvas(rows, columns, tint(rng, 235, 255)) for _ in range(pages)]
    contents = [Contents(rows, columns) for _ in range(pages)]
    facts: dict[str, str] = {}
    evidence: dict[str, tuple[Evidence, ...]] = {}
    for key, (page, row) in zip(rng.sample(KEYS, count), sorted(rng.sample(lines, count)), strict=True):
        digit = rng.choice(DIGITS)
        ink = tint(rng, 0, 70)
        top = CELL * row
        stamp(canvases[page], GLYPHS[key], top + 1, 3, ink)
        # A leader of dots joins the letter to its digit, as in a table of contents.
        canvases[page][top + 12 : top + 14, CELL + 2 : 2 * CELL : 4] = ink
        canvases[page][top + 12 : top + 14, CELL + 3 : 2 * CELL : 4] = ink
        stamp(canvases[page], GLYPHS[digit], top + 1, 2 * CELL + 3, ink)
        contents[page].fill(row, 0, 1, columns, (key, digit))
        facts[key] = digit
        evidence[key] = (Evidence(page, box(0, top, columns * CELL, CELL)),)
    images = tuple(Image.fromarray(canvas) for canvas in canvases)
    return Scene(DOCUMENTS, facts, images, evidence, tuple(page.freeze() for page in contents))


def draw_frames(rng: random.Random) -> Scene:
    spans = [2] * 6
    for _ in range(rng.randint(0, 2)):
        # Two spans of three take the place of three spans of two: always twelve frames.
        spans = [*spans[3:], 3, 3]
    rng.shuffle(spans)
    background = tint(rng, 20, 70)
    images: list[Image.Image] = []
    contents = []
    facts: dict[str, str] = {}
    evidence: dict[str, tuple[Evidence, ...]] = {}
    for key, length in zip(rng.sample(KEYS, len(spans)), spans, strict=True):
        shape = rng.choice(list(SHAPES))
        ink = tint(rng, 140, 255)
        facts[key] = shape
        evidence[key] = tuple(Evidence(len(images) + offset) for offset in range(length))
        for _ in range(length):
            canvas = blank_canvas(2, 2, background)
            plaque(canvas, key, CELL * rng.randrange(2), 0)
            stamp(canvas, SHAPES[shape], CELL * rng.randrange(2) + 1, CELL + 1, ink)
            images.append(Image.fromarray(canvas))
            contents.append(whole(2, 2, (key, shape)))
    return Scene(FRAMES, facts, tuple(images), evidence, tuple(contents))


def draw_images(rng: random.Random) -> Scene:
    images: list[Image.Image] = []
    contents = []
    facts: dict[str, str] = {}
    evidence: dict[str, tuple[Evidence, ...]] = {}
    for index, key in enumerate(rng.sample(KEYS, rng.randint(12, 14))):
        texture = rng.choice(list(TEXTURES))
        canvas = blank_canvas(2, 2, tint(rng, 170, 240))
        canvas[TEXTURES[texture]] = tint(rng, 20, 110)
        plaque(canvas, key, CELL * rng.randrange(2), CELL * rng.randrange(2))
        images.append(Image.fromarray(canvas))
        contents.append(whole(2, 2, (key, texture)))
        facts[key] = texture
        evidence[key] = (Evidence(index),)
    return Scene(IMAGES, facts, tuple(images), evidence, tuple(contents))


def draw_text_recall(rng: random.Random) -> Scene:
    facts = {key: rng.choice(CLASSES[key]) for key in rng.sample(list(CLASSES), rng.randint(5, 8))}
    return Scene(TEXT_RECALL, facts, preamble=f"Words: {', '.join(facts.values())}. ")


def draw_text_knowledge(rng: random.Random) -> Scene:
    return Scene(TEXT_KNOWLEDGE, dict(zip(KEYS, KEYS[1:] + KEYS[:1], strict=True)))
