"""The on-disk format: what is written is read back, and every fault is named with its line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import mmlens
from mmlens.data.examples import DataError, Evidence, Example, load_examples, save_examples, split_examples


def picture(width: int = 32, height: int = 16, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def example(**changes: object) -> Example:
    fields = {
        "question": "What colour is K", "answer": "red", "images": (picture(), picture(8, 8, 1)),
        "evidence": (Evidence(0, (16, 0, 32, 16)), Evidence(1)), "kind": "objects",
        "candidates": ("red", "blue"), "id": "a", "group": "g", "metadata": {"page": 3},
    }  # fmt: skip
    return Example(**{**fields, **changes})


def test_examples_survive_the_disk(tmp_path: Path) -> None:
    written = [example(), example(id="b", images=(), evidence=(), kind="text")]
    read = load_examples(save_examples(written, tmp_path / "data"))
    for before, after in zip(written, read, strict=True):
        assert (before.question, before.answer, before.kind, before.id, before.group) == (
            after.question, after.answer, after.kind, after.id, after.group,
        )  # fmt: skip
        assert before.evidence == after.evidence and before.candidates == after.candidates
        assert before.metadata == after.metadata
        assert [np.array(i).tolist() for i in before.images] == [np.array(i).tolist() for i in after.images]


def test_two_examples_of_one_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the id 'a'"):
        save_examples([example(), example()], tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questoin": "x"}, "no field 'questoin'; the nearest: 'question'"),
        ({"question": " "}, "'question' must be a non-empty text"),
        ({"answer": None}, "'answer' must be a non-empty text"),
        ({"images": ["images/none.png"]}, "there is no image"),
        ({"evidence": [{"image": 2}]}, "evidence names image 2"),
        ({"evidence": [{"image": 0, "box": [0, 0, 33, 16]}]}, "inside the image of 32 x 16"),
        ({"evidence": [{"image": 0, "box": [8, 0, 8, 16]}]}, "is not a box"),
    ],
)
def test_a_faulty_line_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    save_examples([example()], tmp_path)
    record = json.loads((tmp_path / "examples.jsonl").read_text())
    (tmp_path / "examples.jsonl").write_text("\n" + json.dumps({**record, **change}))
    with pytest.raises(DataError, match=message) as caught:
        load_examples(tmp_path)
    assert "examples.jsonl, line 2" in str(caught.value)


def test_missing_broken_and_empty_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder of examples"):
        load_examples(tmp_path / "none")
    with pytest.raises(DataError, match=r"has no examples\.jsonl"):
        load_examples(tmp_path)
    (tmp_path / "examples.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no example"):
        load_examples(tmp_path)
    (tmp_path / "examples.jsonl").write_text("{")
    with pytest.raises(DataError, match="line 1"):
        load_examples(tmp_path)
    save_examples([example()], tmp_path)
    (tmp_path / "images" / "000000-0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"line 1.*cannot identify"):
        load_examples(tmp_path)


@given(
    groups=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 9)), min_size=1, max_size=40),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 5),
)
def test_splits_are_disjoint_whole_and_keep_groups(
    groups: list[tuple[str, int]], fraction: float, seed: int
) -> None:
    examples = [
        mmlens.Example(question="q", answer="a", kind=kind, group=f"{kind}{group}", id=str(i))
        for i, (kind, group) in enumerate(groups)
    ]
    if any(len({g for k, g in groups if k == kind}) < 2 for kind in {k for k, _ in groups}):
        with pytest.raises(ValueError, match="cannot be split"):
            split_examples(examples, fraction, seed)
        return
    first, second = split_examples(examples, fraction, seed)
    assert {e.kind for e in first} == {e.kind for e in second} == {e.kind for e in examples}
    assert {e.id for e in first} | {e.id for e in second} == {e.id for e in examples}
    assert len(first) + len(second) == len(examples)
    assert not {e.group for e in first} & {e.group for e in second}
