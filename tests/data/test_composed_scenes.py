"""Composed scenes, read back from their pixels: one word names no item, and the evidence holds the answer."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mmlens.data.composed_scenes import SIDE, TEXTURES
from mmlens.data.drawing import CELL, COLOURS, DIGITS, GLYPHS, KEYS, SHAPES
from mmlens.data.examples import Example
from mmlens.data.scenes import COMPOSED_KINDS, scene_examples, scene_of, scene_vocabulary

NAMES = {colour: name for name, colour in COLOURS.items()}


def cell_of(image: np.ndarray, row: int, column: int) -> np.ndarray:
    return image[CELL * row : CELL * (row + 1), CELL * column : CELL * (column + 1)]


def character_in(cell: np.ndarray) -> str | None:
    """The letter or digit whose bitmap is one colour that the rest of its window lacks."""
    window = cell[1:15, 3:13]
    for name, ink in GLYPHS.items():
        if (window[ink] == window[ink][0]).all() and not (window[~ink] == window[ink][0]).all(-1).any():
            return name
    return None


def shape_in(cell: np.ndarray) -> str | None:
    window = cell[1:15, 1:15]
    for name, ink in SHAPES.items():
        if (window[ink] == window[ink][0]).all() and not (window[~ink] == window[ink][0]).all(-1).any():
            return name
    return None


def colour_of(pixel: np.ndarray) -> str | None:
    return NAMES.get(tuple(int(value) for value in pixel))


def cells() -> list[tuple[int, int]]:
    return [(row, column) for row in range(SIDE) for column in range(SIDE)]


def read_objects(example: Example) -> list[tuple[str, str, tuple[int, tuple | None]]]:
    """(key, value, region) of every item in the images."""
    image = np.asarray(example.images[0])
    found = []
    for row in range(SIDE):
        for column in range(0, SIDE, 2):
            shape, digit = (
                shape_in(cell_of(image, row, column)),
                character_in(cell_of(image, row, column + 1)),
            )
            if shape is None or digit not in DIGITS:
                continue
            colour = colour_of(cell_of(image, row, column)[1:15, 1:15][SHAPES[shape]][0])
            box = (CELL * column, CELL * row, CELL * (column + 2), CELL * (row + 1))
            found.append((f"{colour} {shape}", digit, (0, box)))
    return found


def read_documents(example: Example) -> list[tuple[str, str, tuple[int, tuple | None]]]:
    found = []
    for page, picture in enumerate(example.images):
        image = np.asarray(picture)
        for row in range(SIDE):
            first, second, digit = (character_in(cell_of(image, row, column)) for column in (0, 1, 3))
            box = (0, CELL * row, CELL * SIDE, CELL * (row + 1))
            found.append((f"{first} {second}", str(digit), (page, box)))
    return found


def plaque_in(image: np.ndarray) -> str | None:
    """ "colour letter" of the one coloured cell with a letter."""
    for row, column in cells():
        cell = cell_of(image, row, column)
        letter, colour = character_in(cell), colour_of(cell[0, 0])
        if letter in KEYS and colour is not None and (cell[[0, -1]] == cell[0, 0]).all():
            return f"{colour} {letter}"
    return None


def read_frames(example: Example) -> list[tuple[str, str, tuple[int, tuple | None]]]:
    found = []
    for number, picture in enumerate(example.images):
        image = np.asarray(picture)
        shapes = [shape_in(cell_of(image, row, column)) for row, column in cells() if row >= 2]
        found.append((str(plaque_in(image)), next(s for s in shapes if s), (number, None)))
    return found


def read_images(example: Example) -> list[tuple[str, str, tuple[int, tuple | None]]]:
    found = []
    for number, picture in enumerate(example.images):
        image = np.asarray(picture)
        key = str(plaque_in(image))
        free = np.ones(image.shape[:2], dtype=bool)
        for row, column in cells():
            if colour_of(cell_of(image, row, column)[0, 0]) == key.split()[0]:
                cell_of(free, row, column)[:] = False
        fits = []
        for name, ink in TEXTURES.items():
            parts = [image[ink & free], image[~ink & free]]
            plain = all((part == part[:1]).all() for part in parts)
            differ = not len(parts[0]) or (parts[0][0] != parts[1][0]).any()
            fits += [name] if plain and differ else []
        assert len(fits) == 1, fits
        found.append((key, fits[0], (number, None)))
    return found


def read_legends(example: Example) -> list[tuple[str, str, tuple[int, tuple | None]]]:
    """(letter, digit, region) for both regions of every letter."""
    legend, board = (np.asarray(picture) for picture in example.images)
    digits = {}
    for row in range(SIDE):
        for column in range(0, SIDE, 2):
            left, right = cell_of(board, row, column), cell_of(board, row, column + 1)
            colour = colour_of(left[1, 1]) or colour_of(right[1, 1])
            if colour is not None:
                box = (CELL * column, CELL * row, CELL * (column + 2), CELL * (row + 1))
                characters = [character_in(cell) for cell in (left, right)]
                digits[colour] = next(c for c in characters if c in DIGITS), box
    found = []
    for row in range(SIDE):
        letter = str(character_in(cell_of(legend, row, 0)))
        digit, box = digits[str(colour_of(cell_of(legend, row, 2)[8, 8]))]
        found.append((letter, digit, (0, (0, CELL * row, CELL * SIDE, CELL * (row + 1)))))
        found.append((letter, digit, (1, box)))
    return found


def read_relations(example: Example) -> list[tuple[str, str, tuple[int, tuple | None]]]:
    """("direction letter", digit, region) for every letter and every digit beside it."""
    image = np.asarray(example.images[0])
    board = {place: str(character_in(cell_of(image, *place))) for place in cells()}
    found = []
    for (row, column), letter in board.items():
        for direction, there in (
            ("left", (row, column - 1)),
            ("right", (row, column + 1)),
            ("up", (row - 1, column)),
            ("down", (row + 1, column)),
        ):
            if letter in KEYS and there in board:
                (top, left), (bottom, right) = sorted([(row, column), there])
                box = (CELL * left, CELL * top, CELL * (right + 1), CELL * (bottom + 1))
                found.append((f"{direction} {letter}", board[there], (0, box)))
    return found


READERS = {
    "composed_objects": read_objects,
    "composed_documents": read_documents,
    "composed_frames": read_frames,
    "composed_images": read_images,
    "legends": read_legends,
    "relations": read_relations,
}


@pytest.mark.parametrize("kind", READERS)
def test_pixels_hold_the_facts_and_the_evidence_of_the_question(kind: str) -> None:
    for example in scene_examples(kind, 25, 1):
        items = READERS[kind](example)
        assert {key: value for key, value, _ in items} == example.metadata["facts"]
        key = example.metadata["key"]
        assert {value for name, value, _ in items if name == key} == {example.answer}
        regions = {(region.image, region.box) for region in example.evidence}
        assert regions == {region for name, _, region in items if name == key}


@pytest.mark.parametrize("kind", [kind for kind in READERS if kind != "legends"])
def test_one_word_of_a_key_does_not_name_its_item(kind: str) -> None:
    """The best guess from one word alone is right for at most half of the questions."""
    right: Counter[int] = Counter()
    examples = scene_examples(kind, 200, 2)
    for example in examples:
        words = example.metadata["key"].split()
        for at in range(2):
            others = [value for key, value in example.metadata["facts"].items() if words[at] in key.split()]
            right[at] += Counter(others).most_common(1)[0][1] / len(others)
    assert max(right.values()) / len(examples) < 0.6


def test_the_hop_of_a_legend_is_its_colour() -> None:
    for example in scene_examples("legends", 20, 3):
        contents = scene_of(example).contents
        letter, hop = example.metadata["key"], example.metadata["hop"]
        assert (letter, hop) in {words for line in contents[0] for words in line}
        assert (hop, example.answer) in {words for line in contents[1] for words in line}


@pytest.mark.parametrize("kind", COMPOSED_KINDS)
def test_contents_name_what_stands_in_the_evidence_and_nowhere_else(kind: str) -> None:
    for example in scene_examples(kind, 10, 4):
        words = set(example.metadata["key"].split())
        marked = set()
        for image, grid in enumerate(scene_of(example).contents):
            marked |= {
                (image, row, column)
                for row, line in enumerate(grid)
                for column, cell in enumerate(line)
                if words <= set(cell) or example.metadata.get("hop") in cell
            }
        covered = set()
        for region in example.evidence:
            left, top, right, bottom = region.box or (0, 0, SIDE * CELL, SIDE * CELL)
            covered |= {
                (region.image, row, column)
                for row in range(int(top) // CELL, int(bottom) // CELL)
                for column in range(int(left) // CELL, int(right) // CELL)
            }
        assert marked == covered


def test_the_evidence_of_a_relation_is_the_letter_and_the_digit_one_step_away() -> None:
    for example in scene_examples("relations", 20, 5):
        _, letter = example.metadata["key"].split()
        left, top, right, bottom = (int(side) // CELL for side in example.evidence[0].box or ())
        contents = scene_of(example).contents[0]
        held = [contents[row][column] for row in range(top, bottom) for column in range(left, right)]
        assert sorted(held) == sorted([(letter,), (example.answer,)])


def test_words_of_directions_are_in_the_vocabulary_of_relations_alone() -> None:
    directions = {"left", "right", "up", "down"}
    assert directions <= set(scene_vocabulary(["relations"]))
    assert not directions & set(scene_vocabulary())


def test_scene_of_refuses_what_it_did_not_draw() -> None:
    with pytest.raises(ValueError, match="example 'page-7' is no generated scene"):
        scene_of(Example("What?", "x", id="page-7"))
