"""Generated scenes: deterministic, one matching item a question, evidence that holds the answer."""

from __future__ import annotations

import numpy as np
import pytest

from mmlens.data.drawing import CELL, COLOURS, GLYPHS, KEYS, SHAPES, TEXTURES
from mmlens.data.examples import Example
from mmlens.data.one_key_scenes import CLASSES
from mmlens.data.scenes import KINDS, TEXT_KINDS, scene_examples, scene_vocabulary


def find_keys(image: np.ndarray) -> dict[str, list[tuple[int, int]]]:
    """Cells (row, column) where each letter is drawn, read back from the pixels alone."""
    letters = {GLYPHS[key].tobytes(): key for key in KEYS}
    found: dict[str, list[tuple[int, int]]] = {}
    for row in range(image.shape[0] // CELL):
        for column in range(image.shape[1] // CELL):
            window = image[CELL * row + 1 : CELL * row + 15, CELL * column + 3 : CELL * column + 13]
            packed = window.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
            for colour in np.unique(packed):
                key = letters.get((packed == colour).tobytes())
                if key is not None:
                    found.setdefault(key, []).append((row, column))
    return found


def read_value(kind: str, image: np.ndarray, row: int, column: int) -> str:
    """The value drawn beside the key at a cell, read back from the pixels alone."""
    if kind == "objects":
        pixel = tuple(int(v) for v in image[CELL * row + 1, CELL * column + 2])
        return next(name for name, colour in COLOURS.items() if colour == pixel)
    if kind == "documents":
        window = image[CELL * row + 1 : CELL * row + 15, 2 * CELL + 3 : 2 * CELL + 13]
        return matching({digit: GLYPHS[digit] for digit in "0123456789"}, window)
    if kind == "frames":
        background = image[0, 0] if not (image[0, 0] == 255).all() else image[CELL, 0]
        for other in range(2):
            window = image[CELL * other + 1 : CELL * other + 15, CELL + 1 : CELL + 15]
            if not (window == background).all():
                return matching(SHAPES, window)
    free = np.ones(image.shape[:2], dtype=bool)
    free[CELL * row : CELL * (row + 1), CELL * column : CELL * (column + 1)] = False
    for name, ink in TEXTURES.items():
        inside, outside = image[ink & free], image[~ink & free]
        plain = all((part == part[:1]).all() for part in (inside, outside))
        if plain and len(outside) and not (len(inside) and (inside[0] == outside[0]).all()):
            return name
    raise AssertionError("no texture")


def matching(masks: dict[str, np.ndarray], window: np.ndarray) -> str:
    """The mask whose ink has one colour that the rest of the window lacks."""
    for name, mask in masks.items():
        ink, rest = window[mask], window[~mask]
        if (ink == ink[0]).all() and not (rest == ink[0]).all(axis=-1).any():
            return name
    raise AssertionError("no match")


def read_answer(example: Example) -> list[tuple[str, int]]:
    """(value, image) of every place where the asked key is drawn."""
    key = example.metadata["key"]
    answers = []
    for number, picture in enumerate(example.images):
        image = np.asarray(picture)
        for row, column in find_keys(image).get(key, []):
            answers.append((read_value(example.kind, image, row, column), number))
    return answers


@pytest.mark.parametrize("kind", KINDS + TEXT_KINDS)
def test_examples_depend_on_kind_seed_and_index_alone(kind: str) -> None:
    first, again, longer = scene_examples(kind, 4, 5), scene_examples(kind, 4, 5), scene_examples(kind, 9, 5)
    for one, two, three in zip(first, again, longer[:4], strict=True):
        assert one.question == two.question == three.question
        assert (one.answer, one.evidence, one.id) == (two.answer, two.evidence, two.id)
        pixels = [[image.tobytes() for image in e.images] for e in (one, two, three)]
        assert pixels[0] == pixels[1] == pixels[2]
    other = scene_examples(kind, 30, 6)
    assert [e.question for e in other] != [e.question for e in scene_examples(kind, 30, 5)]


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_hold_one_matching_key_whose_value_is_the_answer(kind: str) -> None:
    for example in scene_examples(kind, 40, 1):
        answers = read_answer(example)
        images = [number for _, number in answers]
        assert {value for value, _ in answers} == {example.answer}
        assert images == sorted({region.image for region in example.evidence})
        assert len(images) == len(set(images)), "the key is drawn twice in one image"
        if kind == "frames":
            assert images == list(range(images[0], images[0] + len(images)))
            assert 2 <= len(images) <= 3
        else:
            assert len(images) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_evidence_decides_the_answer_and_nothing_else_does(kind: str) -> None:
    """Blank everything outside the evidence: same answer. Blank the evidence: no answer."""
    for example in scene_examples(kind, 20, 2):
        inside = {(region.image, region.box) for region in example.evidence}
        only, without = [], []
        for number, picture in enumerate(example.images):
            image = np.asarray(picture)
            mask = np.zeros(image.shape[:2], dtype=bool)
            for where, box in inside:
                if where == number:
                    left, top, right, bottom = (
                        (0, 0, *picture.size) if box is None else (int(edge) for edge in box)
                    )
                    mask[top:bottom, left:right] = True
            only.append(np.where(mask[..., None], image, image[:1, :1]))
            without.append(np.where(mask[..., None], image[:1, :1], image))
        key = example.metadata["key"]
        kept = [(number, cell) for number, image in enumerate(only) for cell in find_keys(image).get(key, [])]
        assert kept
        assert {read_value(kind, only[n], *cell) for n, cell in kept} == {example.answer}
        assert not any(key in find_keys(image) for image in without)


@pytest.mark.parametrize("kind", KINDS)
def test_evidence_covers_several_visual_tokens_on_the_grid(kind: str) -> None:
    for example in scene_examples(kind, 20, 3):
        cells = 0
        for region in example.evidence:
            width, height = example.images[region.image].size
            left, top, right, bottom = region.box or (0, 0, width, height)
            assert not any(edge % CELL for edge in (left, top, right, bottom, width, height))
            cells += int((right - left) * (bottom - top)) // CELL**2
        assert cells >= 2


def test_kinds_are_as_crowded_as_they_say() -> None:
    for example in scene_examples("objects", 20, 4):
        assert len(example.images) == 1 and len(example.metadata["facts"]) >= 10
    assert all(len(example.images) >= 3 for example in scene_examples("documents", 20, 4))
    assert all(len(example.images) == 12 for example in scene_examples("frames", 20, 4))
    assert all(len(example.images) >= 12 for example in scene_examples("images", 20, 4))
    assert all(not example.images for kind in TEXT_KINDS for example in scene_examples(kind, 5, 4))


@pytest.mark.parametrize("kind", KINDS + TEXT_KINDS)
def test_candidates_hold_the_answer_and_make_chance_low(kind: str) -> None:
    examples = scene_examples(kind, 300, 7)
    assert len(examples[0].candidates) >= 8
    assert {example.answer for example in examples} <= set(examples[0].candidates)
    counts = [sum(e.answer == c for e in examples) for c in examples[0].candidates]
    assert max(counts) <= 60, "one answer must not be a good guess"


def test_question_words_and_answer_classes_differ_between_kinds() -> None:
    classes = {kind: set(scene_examples(kind, 1, 0)[0].candidates) for kind in KINDS + TEXT_KINDS}
    for one in classes:
        for two in classes:
            assert one == two or not classes[one] & classes[two]


def test_vocabulary_holds_every_word() -> None:
    known = set(scene_vocabulary())
    for kind in KINDS + TEXT_KINDS:
        for example in scene_examples(kind, 20, 8):
            text = example.question
            for mark in ".,:?":
                text = text.replace(mark, f" {mark} ")
            assert set(text.split()) | {example.answer} <= known


def test_text_recall_lists_one_word_of_the_asked_class() -> None:
    for example in scene_examples("text_recall", 50, 9):
        listed = example.question.removeprefix("Words: ").split(". ")[0].split(", ")
        asked = CLASSES[example.metadata["key"]]
        assert [word for word in listed if word in asked] == [example.answer]


def test_unknown_kind_names_the_kinds_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no kind 'object'; the nearest: 'objects'"):
        scene_examples("object", 1, 0)
    with pytest.raises(ValueError, match="n is -1; expected"):
        scene_examples("objects", -1, 0)
