"""The on-disk format: what is written is read back, and every fault is named with its line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import mmlens
from mmlens.data.examples import DataError, Evidence, Example, load_examples, save_examples
from mmlens.data.splits import split_examples


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
        ({"answer": None}, "'answer' must be a text, got null"),
        ({"answer": 3}, "'answer' must be a text, got 3"),
        ({"kind": None}, "'kind' must be a text, got null"),
        ({"id": 7}, "'id' must be a text, got 7"),
        ({"group": ["a"]}, r"'group' must be a text, got \[\"a\"\]"),
        ({"images": "images/none.png"}, "'images' must be a list of paths"),
        ({"images": [3]}, r"'images\[0\]' must be a text, got 3"),
        ({"images": None}, "'images' must be a list of paths, got null"),
        ({"images": ["images/none.png"]}, "there is no image"),
        ({"images": ["images"]}, "there is no image"),
        ({"candidates": "red"}, "'candidates' must be a list of texts"),
        ({"candidates": ["red", None]}, r"'candidates\[1\]' must be a text, got null"),
        ({"metadata": None}, "'metadata' is None .*expected an object"),
        ({"evidence": {"image": 0}}, "'evidence' must be a list of regions"),
        ({"evidence": [0]}, r"evidence\[0\] must be a region, .* got 0"),
        ({"evidence": [{"image": 0, "bbox": [0, 0, 8, 8]}]}, r"of evidence\[0\] 'bbox'; the nearest: 'box'"),
        ({"evidence": [{"image": 0, "label": "x"}]}, r"no field of evidence\[0\] 'label'"),
        ({"evidence": [{"box": [0, 0, 8, 8]}]}, r"evidence\[0\] has no field 'image'"),
        ({"evidence": [{"image": True}]}, r"'image' of evidence\[0\] is True"),
        ({"evidence": [{"image": 0.0}]}, r"'image' of evidence\[0\] is 0.0"),
        ({"evidence": [{"image": -1}]}, r"'image' of evidence\[0\] is -1"),
        ({"evidence": [{"image": 2}]}, "evidence names image 2"),
        (
            {"evidence": [{"image": 0, "box": [0, True, 8, 8]}]},
            r"top of the field 'box' of evidence\[0\] .* is True",
        ),
        (
            {"evidence": [{"image": 0, "box": [0, "0", 8, 8]}]},
            r"top of the field 'box' of evidence\[0\] .* is '0'",
        ),
        ({"evidence": [{"image": 0, "box": [0, 0, 8]}]}, r"a box is \(left, top, right, bottom\)"),
        ({"evidence": [{"image": 0, "box": "0088"}]}, r"expected a box \(left, top, right, bottom\)"),
        ({"evidence": [{"image": 0, "box": [0, 0, 33, 16]}]}, "inside the image of 32 x 16"),
        ({"evidence": [{"image": 0, "box": [8, 0, 8, 16]}]}, "is not a box"),
        (
            {"evidence": [{"image": 0, "box": [0.25, 0, 0.5, 1]}]},
            r"scaled to 0 to 1.* it is \(8.0, 0, 16.0, 16\)",
        ),
        ({"evidence": [{"image": 0, "box": [0, 0, 1, 1]}]}, "scaled to 0 to 1"),
        ({"question": "\ud800"}, "'question' holds half a character"),
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


def lines(folder: Path, *texts: str, ending: str = "\n") -> Path:
    (folder / "examples.jsonl").write_bytes(ending.join(texts).encode())
    return folder


LINE = '{"question": "What?", "answer": "x", "id": "%s"}'


def test_a_key_or_an_id_that_stands_twice_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 3: the id 'a' is that of line 1 too"):
        load_examples(lines(tmp_path, LINE % "a", LINE % "b", LINE % "a"))
    with pytest.raises(DataError, match=r"line 1: the key 'answer' stands twice"):
        load_examples(lines(tmp_path, '{"question": "What?", "answer": "x", "answer": "y"}'))
    with pytest.raises(DataError, match=r"line 1: the key 'box' stands twice"):
        twice = (
            '{"question": "?", "answer": "x", "evidence": [{"image": 0, "box": [0, 0, 2, 2], "box": null}]}'
        )
        load_examples(lines(tmp_path, twice))
    with pytest.raises(DataError, match="line 1: NaN is no JSON"):
        load_examples(lines(tmp_path, '{"question": "?", "answer": "x", "metadata": {"a": NaN}}'))
    assert len(load_examples(lines(tmp_path, LINE % "", LINE % "", LINE % "a"))) == 3


def test_what_is_valid_is_read(tmp_path: Path) -> None:
    text = '{"question": "one\u2028two\u0085three\x1c?", "answer": "x"}'.replace("\x1c", "\\u001c")
    assert load_examples(lines(tmp_path, text))[0].question == "one\u2028two\u0085three\x1c?"
    marked = load_examples(lines(tmp_path, "\ufeff" + LINE % "a", LINE % "b"))
    assert [example.id for example in marked] == ["a", "b"]
    windows = load_examples(lines(tmp_path, LINE % "a", "", LINE % "b", "", ending="\r\n"))
    assert [example.id for example in windows] == ["a", "b"]
    save_examples([example()], tmp_path)
    record = json.loads((tmp_path / "examples.jsonl").read_text())
    record["evidence"] = [{"image": 0, "box": None}, {"image": 1, "box": [0, 0, 2, 1]}]
    (tmp_path / "examples.jsonl").write_text(json.dumps(record))
    assert load_examples(tmp_path)[0].evidence == (Evidence(0), Evidence(1, (0, 0, 2, 1)))


def test_a_line_that_was_cut_off_and_another_encoding_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2: "):
        load_examples(lines(tmp_path, LINE % "a", (LINE % "b")[:-9]))
    (tmp_path / "examples.jsonl").write_bytes((LINE % "a").encode() + b'\n{"question": "\xff"}')
    with pytest.raises(DataError, match="line 2: it is not written in UTF-8"):
        load_examples(tmp_path)
    (tmp_path / "examples.jsonl").write_bytes(b"[" * 100_000)
    with pytest.raises(DataError, match="line 1: it is nested too deeply"):
        load_examples(tmp_path)


def with_image(folder: Path, name: str) -> Path:
    return lines(folder, json.dumps({"question": "What?", "answer": "x", "images": [name]}))


def test_images_that_leave_the_folder_are_read_by_name_only(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    picture().save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    for name in (
        "../secret.png",
        str(tmp_path / "secret.png"),
        "link.png",
        "up/secret.png",
        "./../secret.png",
    ):
        with pytest.raises(DataError, match=r"line 1: an image is .*--images-outside"):
            load_examples(with_image(folder, name))
        assert load_examples(folder, images_outside=True)[0].images[0].size == (32, 16)


def test_images_inside_by_whatever_way_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "a/b").mkdir(parents=True)
    picture().save(folder / "a/b/c.png")
    (folder / "inner.png").symlink_to("a/b/c.png")
    (tmp_path / "linked").symlink_to(folder)
    for name in ("a/b/c.png", "./a/b/c.png", "inner.png"):
        for place in (folder, tmp_path / "linked"):
            assert len(load_examples(with_image(place, name))[0].images) == 1


def test_the_hub_s_cache_is_read(tmp_path: Path) -> None:
    cache = tmp_path / "datasets--owner--name"
    snapshot = cache / "snapshots/0123abcd/split"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    picture().save(cache / "blobs/sha", "png")
    (snapshot / "page.png").symlink_to("../../../blobs/sha")
    assert load_examples(with_image(snapshot, "page.png"))[0].images[0].size == (32, 16)
    picture().save(tmp_path / "secret.png")
    (snapshot / "secret.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match="a link that leads out"):
        load_examples(with_image(snapshot, "secret.png"))
    with pytest.raises(DataError, match="an image is"):
        load_examples(with_image(snapshot, "../../../blobs/sha"))


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file/data"):
        with pytest.raises(ValueError, match=r"file' is a file; expected a folder"):
            save_examples([example()], folder)
    with pytest.raises(DataError, match="'a' cannot be written as JSON"):
        save_examples([example(metadata={"a": picture()})], tmp_path / "data")
    assert (tmp_path / "file").read_text() == "mine"


def test_boxes_of_arrays_and_whole_small_images_are_boxes(tmp_path: Path) -> None:
    small = picture(2, 1)
    written = [
        example(evidence=(Evidence(0, tuple(np.array([0.0, 0, 32, 16]))),)),
        example(id="b", images=(small,), evidence=(Evidence(0, (0, 0, 1, 1)),)),
    ]
    read = load_examples(save_examples(written, tmp_path))
    assert [e.evidence[0].box for e in read] == [(0, 0, 32, 16), (0, 0, 1, 1)]
    assert example(evidence=(Evidence(0, (0, 0, 1.5, 1)),)).evidence[0].box == (0, 0, 1.5, 1)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Evidence(True), "image is True"),
        (lambda: Evidence(0, (0, 0, True, 8)), "right of box .* is True"),
        (lambda: Evidence(0, (0, 0, float("nan"), 8)), "of finite numbers"),
        (lambda: example(evidence=(Evidence(0, (0.1, 0.1, 0.9, 0.9)),)), "scaled to 0 to 1"),
    ],
)
def test_evidence_made_in_python_is_checked(made: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        made()


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
