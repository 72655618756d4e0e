"""Rows as examples: through datasets.load_dataset itself, on made-up files of every kind it reads."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import mmlens
from mmlens import Evidence
from mmlens.data import LateImage, examples_from
from mmlens.data.examples import DataError
from mmlens.errors import InvalidTypeError, InvalidValueError, MmlensError, MmlensWarning

N = 6
COLUMNS: dict[str, Any] = {"question": "query", "answer": "label", "images": "image", "id": "qid"}


def picture(number: int, size: tuple[int, int] = (40, 20)) -> Image.Image:
    return Image.new("RGB", size, (number, 0, 0))


def encoded(number: int, size: tuple[int, int] = (40, 20)) -> bytes:
    file = io.BytesIO()
    picture(number, size).save(file, "PNG")
    return file.getvalue()


def made_up_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows whose images are files of the folder."""
    rows = []
    for number in range(N):
        picture(number).save(folder / f"{number}.png")
        rows.append(
            {
                "qid": f"q{number}",
                "query": f"What is {number}?",
                "label": "yes" if number % 2 else "no",
                "image": f"{number}.png",
                "bbox": [number, 2, 10, 5],
                "document": f"d{number // 2}",
                "pages": [number % 3 + 1],
            }
        )
    return rows


def with_bytes(folder: Path) -> list[dict[str, Any]]:
    return [
        row | {"image": {"bytes": encoded(int(row["qid"][1:])), "path": None}} for row in made_up_rows(folder)
    ]


FEATURES = datasets.Features(
    {
        "qid": datasets.Value("string"),
        "query": datasets.Value("string"),
        "label": datasets.Value("string"),
        "image": datasets.Image(),
        "bbox": datasets.List(datasets.Value("int64")),
        "document": datasets.Value("string"),
        "pages": datasets.List(datasets.Value("int64")),
    }
)


def parquet(folder: Path, streaming: bool = False) -> Any:
    """What `load_dataset` gives of a parquet file with images in it."""
    path = folder / "rows" / "test-00000-of-00001.parquet"
    if not path.exists():
        path.parent.mkdir()
        datasets.Dataset.from_list(with_bytes(folder), features=FEATURES).to_parquet(str(path))
    return datasets.load_dataset(
        str(path.parent), split="test", streaming=streaming, cache_dir=str(folder / "cache")
    )


def jsonl(folder: Path, streaming: bool = False) -> Any:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made_up_rows(folder)))
    return datasets.load_dataset(
        "json", data_files=str(path), split="train", streaming=streaming, cache_dir=str(folder / "cache")
    )


def image_folder(folder: Path, streaming: bool = False) -> Any:
    place = folder / "pictures"
    place.mkdir()
    rows = made_up_rows(place)
    lines = [
        json.dumps({"file_name" if key == "image" else key: value for key, value in row.items()})
        for row in rows
    ]
    (place / "metadata.jsonl").write_text("\n".join(lines))
    return datasets.load_dataset(
        "imagefolder",
        data_dir=str(place),
        split="train",
        streaming=streaming,
        cache_dir=str(folder / "cache"),
    )


def frame(folder: Path) -> pd.DataFrame:
    parquet(folder)
    return pd.read_parquet(folder / "rows")


SOURCES: dict[str, Callable[[Path], Any]] = {
    "parquet": parquet,
    "parquet, streaming": lambda folder: parquet(folder, streaming=True),
    "jsonl": jsonl,
    "jsonl, streaming": lambda folder: jsonl(folder, streaming=True),
    "image folder": image_folder,
    "image folder, streaming": lambda folder: image_folder(folder, streaming=True),
    "pandas": frame,
    "a list": made_up_rows,
    "a list with PIL images": lambda folder: [
        row | {"image": picture(number)} for number, row in enumerate(made_up_rows(folder))
    ],
    "a list with bytes": with_bytes,
    "a selection": lambda folder: (
        parquet(folder).select([*range(N - 1, -1, -1)]).select([*range(N - 1, -1, -1)])
    ),
    "torch format": lambda folder: parquet(folder).with_format("torch"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_of_rows_gives_the_same_examples(tmp_path: Path, source: str) -> None:
    rows = SOURCES[source](tmp_path)
    examples = examples_from(
        rows, **COLUMNS, evidence="bbox", box_format="xywh", group="document", image_folder=tmp_path
    )
    for _ in range(2):  # a stream begins anew
        found = list(examples)
        assert [example.id for example in found] == [f"q{number}" for number in range(N)]
        for number, example in enumerate(found):
            assert example.question == f"What is {number}?"
            assert example.answer == ("yes" if number % 2 else "no")
            assert example.group == f"d{number // 2}"
            assert example.evidence == (Evidence(0, (number, 2, number + 10, 7)),)
            assert len(example.images) == 1
            assert example.images[0].size == (40, 20)
            assert example.images[0].getpixel((0, 0)) == (number, 0, 0)


@pytest.mark.parametrize("source", ["parquet", "parquet, streaming", "jsonl", "image folder", "pandas"])
def test_no_image_opens_before_it_is_used(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = SOURCES[source](tmp_path)
    opened: list[object] = []
    whole = Image.open

    def watched(file: Any, *args: Any, **kwargs: Any) -> Image.Image:
        opened.append(file)
        return whole(file, *args, **kwargs)

    monkeypatch.setattr(Image, "open", watched)
    examples = examples_from(rows, **COLUMNS, evidence="bbox", box_format="xywh", image_folder=tmp_path)
    kept = list(examples)
    assert [len(example.images) for example in kept] == [1] * N
    assert not opened
    assert kept[3].images[0].getpixel((0, 0)) == (3, 0, 0)
    assert len(opened) == 1


def test_relative_boxes_need_headers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row | {"bbox": [0.25, 0.5, 0.5, 1]} for row in with_bytes(tmp_path)]
    examples = examples_from(rows, **COLUMNS, evidence="bbox", box_format="relative")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("an image was decoded"))
    assert {example.evidence for example in examples} == {(Evidence(0, (10, 10, 20, 20)),)}


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_relative_boxes_are_of_the_upright_image(kind: str) -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    picture(0).save(file, kind, exif=exif)
    row = {"q": "What?", "a": "x", "image": file.getvalue(), "box": [0, 0, 1, 0.5]}
    example = examples_from(
        [row], question="q", answer="a", images="image", evidence="box", box_format="relative"
    )[0]
    assert example.evidence[0].box == (0, 0, 20, 20)
    assert example.images[0].size == (20, 40)


@pytest.mark.parametrize(
    ("box_format", "box"),
    [
        ("xyxy", [10, 5, 30, 20]),
        ("xywh", [10, 5, 20, 15]),
        ("relative", [0.25, 0.25, 0.75, 1]),
        ("relative xywh", [0.25, 0.25, 0.5, 0.75]),
        ("0-1000", [250, 250, 750, 1000]),
        ("0-1000 xywh", [250, 250, 500, 750]),
    ],
)
def test_one_box_in_every_format(box_format: str, box: list[float]) -> None:
    row = {"q": "What?", "a": "x", "image": picture(0), "one": box, "several": [box, box]}
    for column, n in (("one", 1), ("several", 2)):
        found = examples_from(
            [row], question="q", answer="a", images="image", evidence=column, box_format=box_format
        )
        assert found[0].evidence == (Evidence(0, (10, 5, 30, 20)),) * n


def test_a_width_that_ends_at_the_edge_stays_inside() -> None:
    # 311.73 + 328.27 is 640 and some in floats of 32 bits, as they stand in published tables.
    left, width = float(np.float32(311.7)), float(np.float32(640) - np.float32(311.7))
    row = {"q": "What?", "a": "x", "image": picture(0, (640, 20)), "box": [left, 0, width, 20]}
    example = examples_from(
        [row], question="q", answer="a", images="image", evidence="box", box_format="xywh"
    )[0]
    assert example.evidence[0].box is not None
    assert example.evidence[0].box[2] == 640


def test_pages_by_their_numbers() -> None:
    row = {
        "q": "What?",
        "a": "x",
        "pages": [picture(i) for i in range(4)],
        "at": [2, 4],
        "one": 2,
        "none": [],
    }
    given: dict[str, Any] = {"question": "q", "answer": "a", "images": "pages", "box_format": "pages"}
    assert examples_from([row], **given, evidence="at", first_page=1)[0].evidence == (
        Evidence(1),
        Evidence(3),
    )
    assert examples_from([row], **given, evidence="one", first_page=0)[0].evidence == (Evidence(2),)
    assert examples_from([row], **given, evidence="none", first_page=0)[0].evidence == ()
    with pytest.raises(DataError, match=r"row 0.*page 4, counted from 0, is out of range.*4 image.*from 1\?"):
        examples_from([row], **given, evidence="at", first_page=0)
    with pytest.raises(InvalidTypeError, match="first_page=0 or first_page=1"):
        examples_from([row], **given, evidence="at")


def test_lists_that_are_written_as_texts() -> None:
    row = {
        "q": "What?",
        "a": "x",
        "pages": [picture(i) for i in range(4)],
        "at": "[2, 4]",
        "of": "['x', 'y']",
    }
    given: dict[str, Any] = {"question": "q", "answer": "a", "images": "pages", "candidates": "of"}
    example = examples_from([row], **given, evidence="at", box_format="pages", first_page=1)[0]
    assert example.evidence == (Evidence(1), Evidence(3))
    assert example.candidates == ("x", "y")
    box = {"q": "What?", "a": "x", "image": picture(0), "box": "[1, 2, 3.5, 4]"}
    example = examples_from(
        [box], question="q", answer="a", images="image", evidence="box", box_format="xyxy"
    )[0]
    assert example.evidence == (Evidence(0, (1, 2, 3.5, 4)),)


def test_boxes_on_pages() -> None:
    row = {
        "q": "What?",
        "a": "x",
        "pages": [picture(0), picture(1, (80, 40))],
        "layout": [{"page": 1, "bbox": [0, 0, 0.5, 0.5]}, {"page": 0, "bbox": [0, 0, 0.5, 0.5]}],
    }
    given: dict[str, Any] = {"question": "q", "answer": "a", "images": "pages", "box_format": "relative"}
    found = examples_from([row], **given, evidence="layout.bbox", box_pages="layout.page", first_page=0)
    assert found[0].evidence == (Evidence(1, (0, 0, 40, 20)), Evidence(0, (0, 0, 20, 10)))
    with pytest.raises(DataError, match="row has 2 images: say in which they lie by box_pages="):
        examples_from([row], **given, evidence="layout.bbox")


def test_functions_of_a_row(tmp_path: Path) -> None:
    examples = examples_from(
        parquet(tmp_path),
        question=lambda row: row["query"].upper(),
        answer=lambda row: {"yes": "ja", "no": "nein"}[row["label"]],
        images=lambda row: [row["image"], row["image"]],
        evidence=lambda row: Evidence(1, (0, 0, *[side // 2 for side in row["image"].size])),
        candidates=("ja", "nein"),
        id=lambda row: row["qid"],
        kind=lambda row: "made up",
        metadata=["document"],
    )
    example = examples[1]
    assert (example.question, example.answer, example.candidates) == ("WHAT IS 1?", "ja", ("ja", "nein"))
    assert example.evidence == (Evidence(1, (0, 0, 20, 10)),)
    assert (example.kind, example.metadata) == ("made up", {"document": "d0"})
    assert len(example.images) == 2


def test_answers_are_texts_lists_numbers_and_classes() -> None:
    row = {"q": "What?", "text": "b", "texts": ["b", "B"], "number": 1, "options": ["a", "b"]}
    for column, answers in (("text", {}), ("texts", {"answers": ["b", "B"]}), ("number", {})):
        candidates = None if column == "texts" else "options"
        example = examples_from([row], question="q", answer=column, candidates=candidates)[0]
        assert (example.answer, example.metadata) == ("b", answers)
    features = datasets.Features(
        {"q": datasets.Value("string"), "c": datasets.ClassLabel(names=["no", "yes"])}
    )
    classes = datasets.Dataset.from_dict({"q": ["What?"], "c": [1]}, features=features)
    assert examples_from(classes, question="q", answer="c")[0].answer == "yes"
    assert next(iter(examples_from(classes.to_iterable_dataset(), question="q", answer="c"))).answer == "yes"


def test_images_in_several_columns() -> None:
    rows = [
        {"q": "What?", "a": "x", "image_1": picture(0), "image_2": picture(1), "image_3": None},
        {"q": "Who?", "a": "x", "image_1": picture(2), "image_2": None, "image_3": picture(3)},
    ]
    columns = ["image_1", "image_2", "image_3"]
    examples = examples_from(rows, question="q", answer="a", images=columns)
    assert len(examples[0].images) == 2
    with pytest.raises(DataError, match="row 1: there is no image"):
        examples[1]


def test_a_list_of_images_of_a_dataset_opens_late(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "q": datasets.Value("string"),
            "a": datasets.Value("string"),
            "pages": datasets.List(datasets.Image()),
        }
    )
    rows = [{"q": "What?", "a": "x", "pages": [{"bytes": encoded(i), "path": None} for i in range(3)]}]
    path = tmp_path / "pages.parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(path))
    loaded = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    example = examples_from(loaded, question="q", answer="a", images="pages")[0]
    assert all(isinstance(image, LateImage) for image in example.images.given)
    assert [image.getpixel((0, 0))[0] for image in example.images] == [0, 1, 2]


def test_chats_of_a_dataset(tmp_path: Path) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    rows = [
        {"chat": [{"role": "user", "content": parts}], "a": "x", "image": {"bytes": encoded(i), "path": None}}
        for i in range(2)
    ]
    loaded = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    examples = examples_from(loaded, messages="chat", answer="a", images="image")
    assert examples[0].question == "What is it?"
    assert [example.images[0].getpixel((0, 0))[0] for example in examples] == [0, 1]
    # What a row is not told by its text alone.
    assert examples[0].id != examples[1].id


def test_ids_follow_what_a_row_holds_and_not_where_it_stands(tmp_path: Path) -> None:
    columns = {key: value for key, value in COLUMNS.items() if key != "id"}
    rows = parquet(tmp_path)
    ids = [example.id for example in examples_from(rows, **columns)]
    turned = [example.id for example in examples_from(rows.select(range(N - 1, -1, -1)), **columns)]
    assert len(set(ids)) == N
    assert turned == ids[::-1]
    assert [example.id for example in examples_from(parquet(tmp_path, streaming=True), **columns)] == ids
    first, second = mmlens.split_examples(examples_from(rows, **columns), 0.5, seed=0)
    assert sorted([*(e.id for e in first), *(e.id for e in second)]) == sorted(ids)


# ---------------------------------------------------------------------- rows that cannot be read


def faulty(tmp_path: Path, number: int, **changed: Any) -> list[dict[str, Any]]:
    rows = with_bytes(tmp_path)
    rows[number] |= changed
    return rows


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no question": ({"query": None}, "question is missing"),
    "an empty question": ({"query": " "}, "question is empty"),
    "a question that is a number": ({"query": 3}, r"question is 3 \(int\)"),
    "no answer": ({"label": None}, "answer is missing"),
    "an empty list of answers": ({"label": []}, "answer is an empty list"),
    "an answer that is a number": ({"label": 3}, "no candidates"),
    "an answer that is a truth": ({"label": True}, "'yes' if row"),
    "no image": ({"image": None}, "there is no image"),
    "an empty list of images": ({"image": []}, "there is no image"),
    "an image that is a number": ({"image": 3}, r"image is 3 \(int\)"),
    "an image that is a URL": ({"image": "https://example.org/a.png"}, "nothing is downloaded"),
    "a reversed box": ({"bbox": [10, 2, -5, 5]}, "width of -5"),
    "a box left of the image": ({"bbox": [-3, 2, 5, 5]}, "outside or reversed"),
    "a box of three numbers": ({"bbox": [1, 2, 3]}, "a box is"),
    "a box that is a text": ({"bbox": "left"}, "evidence is 'left' .*a text"),
    "a box that is a broken text": ({"bbox": "[1, 2, 3, 4"}, "a text"),
    "a box with NaN": ({"bbox": [1, 2, float("nan"), 4]}, "finite"),
    "another row's id": ({"qid": "q0"}, "id is that of row 0 too"),
    "no id": ({"qid": None}, "id is missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_their_row(tmp_path: Path, fault: str) -> None:
    changed, reason = FAULTS[fault]
    rows = faulty(tmp_path, 4, **changed)
    given: dict[str, Any] = COLUMNS | {"evidence": "bbox", "box_format": "xywh", "name": "mine"}
    examples = examples_from(rows, **given)
    with pytest.raises(DataError, match=rf"^mine, row 4( \(id 'q\d'\))?: .*{reason}"):
        list(examples)
    with pytest.warns(MmlensWarning, match=r"mine: 1 row\(s\) were skipped: row 4"):
        skipping = examples_from(rows, **given, on_error="skip")
    assert len(skipping) == len(list(skipping)) == N - 1
    assert [example.id for example in skipping] == ["q0", "q1", "q2", "q3", "q5"]
    assert skipping[4].id == "q5"
    (left_out,) = skipping.skipped
    assert left_out.row == 4
    assert "1 row(s) skipped" in repr(skipping)


BROKEN_IMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "no image file": ({"image": b"no image"}, "no image that PIL can read"),
    "a missing file": ({"image": "nowhere.png"}, "does not exist"),
    "a cut-off header": ({"image": encoded(3)[:20]}, "no image that PIL can read|broken"),
    "a box that leaves the image": ({"bbox": [10, 2, 35, 5]}, "inside the image of 40 x 20"),
}


@pytest.mark.parametrize("fault", BROKEN_IMAGES)
def test_faults_that_need_the_image_name_their_row_when_it_opens(tmp_path: Path, fault: str) -> None:
    changed, reason = BROKEN_IMAGES[fault]
    rows = faulty(tmp_path, 4, **changed)
    given: dict[str, Any] = COLUMNS | {"evidence": "bbox", "box_format": "xywh", "name": "mine"}
    examples = list(examples_from(rows, **given))
    with pytest.raises(MmlensError, match=rf"mine, row 4 \(id 'q4'\), image 0.*({reason})"):
        examples[4].images[0]
    with pytest.warns(MmlensWarning, match="row 4"):
        skipping = examples_from(rows, **given, on_error="skip")
    assert len(skipping) == N - 1


def test_a_stream_counts_what_it_skipped_in_each_pass(tmp_path: Path) -> None:
    rows = faulty(tmp_path, 4, label="")
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    examples = examples_from(stream, **COLUMNS, on_error="skip")
    with pytest.warns(MmlensWarning, match=r"1 row\(s\) were skipped: row 4 \(id 'q4'\)"):
        assert len(list(examples)) == N - 1
    with warnings.catch_warnings():  # of the same rows it says so once
        warnings.simplefilter("error")
        assert len(list(examples)) == N - 1
    assert [left_out.id for left_out in examples.skipped] == ["q4"]


def test_a_stream_that_breaks_off_says_where() -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield {"q": "What?", "a": "x"}
        raise OSError("the line is cut")

    stream = datasets.IterableDataset.from_generator(broken)
    examples = examples_from(stream, question="q", answer="a", on_error="skip", name="mine")
    with pytest.raises(DataError, match="mine, row 1: the stream broke off here.*the line is cut"):
        list(examples)


def test_when_no_row_can_be_read_skipping_is_an_error(tmp_path: Path) -> None:
    rows = [row | {"label": 3} for row in with_bytes(tmp_path)]
    with (
        pytest.warns(MmlensWarning),
        pytest.raises(DataError, match="no row of the list could be read: row 0"),
    ):
        examples_from(rows, **COLUMNS, on_error="skip")


def test_errors_of_functions_are_named() -> None:
    rows = [{"query": "What?", "label": "x"}]
    with pytest.raises(
        DataError, match=r"row 0: answer, a function of the row, raised KeyError.*nearest: 'label'"
    ):
        examples_from(rows, question="query", answer=lambda row: row["lable"])


COLUMN_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt column": ({"question": "querry"}, r"question='querry': there is no column 'querry'.*'query'"),
    "a misspelt image column": ({"images": ["imag"]}, "the nearest: 'image'"),
    "a column in capitals": ({"answer": "LABEL"}, "the nearest: 'label'"),
    "a misspelt kept column": ({"metadata": ["documnt"]}, "the nearest: 'document'"),
    "a misspelt field": ({"evidence": "bbox.x", "box_format": "xyxy"}, "which has no fields"),
}


@pytest.mark.parametrize("fault", COLUMN_FAULTS)
@pytest.mark.parametrize("source", ["parquet", "parquet, streaming", "pandas", "a list"])
def test_columns_that_there_are_not(tmp_path: Path, fault: str, source: str) -> None:
    changed, reason = COLUMN_FAULTS[fault]
    rows = SOURCES[source](tmp_path)
    with pytest.raises(DataError, match=reason):
        list(examples_from(rows, **COLUMNS | changed))


MISUSES: dict[str, tuple[dict[str, Any], str]] = {
    "no question": ({"question": None}, "give question=, or messages="),
    "a question and a chat": ({"messages": "query"}, "not both"),
    "boxes without a format": ({"evidence": "bbox"}, "say how boxes are written by box_format="),
    "a misspelt format": ({"evidence": "bbox", "box_format": "xwyh"}, "nearest: 'xywh'"),
    "a format without boxes": ({"box_format": "xyxy"}, "without evidence="),
    "first_page of boxes": ({"evidence": "bbox", "box_format": "xyxy", "first_page": 1}, "numbers of pages"),
    "first_page of 2": ({"evidence": "pages", "box_format": "pages", "first_page": 2}, "expected 0 or 1"),
    "a misspelt on_error": ({"on_error": "skipp"}, "nearest: 'skip'"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuses_are_refused_at_once(tmp_path: Path, misuse: str) -> None:
    changed, reason = MISUSES[misuse]
    with pytest.raises((InvalidTypeError, InvalidValueError), match=reason):
        examples_from(made_up_rows(tmp_path), **COLUMNS | changed)


def test_what_is_no_table_is_refused_with_the_way_to_one() -> None:
    nothing: Any
    for nothing, way in (
        ("lmms-lab/POPE", "load_dataset"),
        (3, "expected a datasets.Dataset"),
        ({"q": ["What?"]}, "from_dict"),
        (datasets.DatasetDict({"val": datasets.Dataset.from_dict({"q": ["What?"]})}), r"dataset\['val'\]"),
        (iter([{"q": "What?"}]), "from_generator"),
        ([3], "list of dicts"),
        ([], "no rows"),
        (pd.DataFrame({"q": []}), "no rows"),
    ):
        with pytest.raises((InvalidTypeError, InvalidValueError), match=way):
            examples_from(nothing, question="q", answer="q")
