"""`mmlens data`, as one would type it, on made-up rows."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image, ImageDraw

from mmlens import Evidence, load_examples
from mmlens.cli import main
from mmlens.data.published.catalog import CATALOG
from mmlens.errors import MmlensWarning

RED = (200, 40, 40)
N = 4


def left(number: int) -> int:
    return 40 + 10 * number


def page(number: int) -> Image.Image:
    """A page with a red rectangle."""
    image = Image.new("RGB", (320, 240), (230, 230, 240))
    ImageDraw.Draw(image).rectangle((left(number), 60, left(number) + 79, 159), fill=RED)
    return image


def encoded(number: int) -> bytes:
    file = io.BytesIO()
    page(number).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the working directory, with nothing in the caches of `datasets`."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "work"


@pytest.fixture
def refcocog(place: Path) -> str:
    rows = [
        {
            "question_id": str(number),
            "image": {"bytes": encoded(number), "path": None},
            "question": "Describe it.",
            "answer": ["the red box", "it"],
            "bbox": [float(left(number)), 60.0, 80.0, 100.0],
            "file_name": f"COCO_train2014_{number:012d}.jpg",
        }
        for number in range(N)
    ]
    path = place / "refcocog" / "data" / "val-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(str(path))
    return "refcocog"


@pytest.fixture
def jsonl(place: Path) -> str:
    (place / "mine" / "images").mkdir(parents=True)
    lines = []
    for number in range(N):
        page(number).save(place / "mine" / "images" / f"{number}.png")
        row = {
            "q": f"What is {number}?",
            "a": 1,
            "img": f"images/{number}.png",
            "at": [left(number), 60, 80, 100],
        }
        lines.append(json.dumps(row | {"opts": ["ball", "box"], "doc": f"d{number // 2}", "n": number}))
    (place / "mine" / "rows.jsonl").write_text("\n".join(lines))
    return "mine/rows.jsonl"


COLUMNS = [
    *("--question", "q", "--answer", "a", "--images", "img", "--evidence", "at", "--box-format", "xywh"),
    *("--candidates", "opts", "--group", "doc", "--id", "n", "--metadata", "n"),
]


def test_data_lists_every_set_with_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data"]) == 0
    told = capsys.readouterr().out
    assert f"{len(CATALOG)} data sets" in told
    words = " ".join(told.split())
    for entry in CATALOG.values():
        assert f"{entry.name}: {entry.title}" in words
        assert f"evidence: {' '.join(entry.evidence.split())}" in words
        assert f"licence: {entry.licence}; size: {entry.size}" in words
    assert words.count("checked against rows that its authors published") == sum(
        entry.checked == "published rows" for entry in CATALOG.values()
    )
    assert "revision unverified" in words


def test_data_tells_all_about_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "refcocog"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert f"revision: {CATALOG['refcocog'].revision}" in words
    assert "columns: question_id (string), image (image)" in words
    assert "to fetch: hf download --repo-type dataset lmms-lab/RefCOCOg" in words


def test_data_shows_rows_with_their_boxes_drawn(
    refcocog: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "refcocog", "--n", "3", "--data-dir", refcocog]) == 0
    told = capsys.readouterr().out
    assert "evidence: image 0 at 40, 60, 120, 160" in told
    assert told.rstrip().endswith("picture: refcocog.png")
    with Image.open(place / "refcocog.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    for colour, least in ((RED, 10_000), ((0, 0x72, 0xB2), 300)):
        assert (pixels == colour).all(axis=2).sum() > least


@pytest.mark.parametrize("source", ["jsonl", "parquet", "folder", "saved", "saved splits", "image folder"])
def test_data_converts_rows_of_any_form(
    jsonl: str, place: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    columns, given = list(COLUMNS), jsonl
    if source != "jsonl":
        rows = [json.loads(line) for line in Path(jsonl).read_text().splitlines()]
        for row in rows:
            row["img"] = {"bytes": encoded(row["n"]), "path": None}
        table = datasets.Dataset.from_list(rows).cast_column("img", datasets.Image())
        if source == "parquet":
            given = "rows.parquet"
            table.to_parquet(given)
        elif source == "folder":
            given = "rows"
            Path("rows").mkdir()
            table.to_parquet("rows/train.parquet")
        elif source == "saved":
            given = "saved"
            table.save_to_disk(given)
        elif source == "saved splits":
            given = "saved"
            datasets.DatasetDict({"a": table.select([0]), "b": table}).save_to_disk(given)
            columns += ["--split", "b"]
        else:
            given = "mine"
            lines = [json.loads(line) for line in Path(jsonl).read_text().splitlines()]
            text = "\n".join(json.dumps({"file_name": row.pop("img"), **row}) for row in lines)
            Path("mine/metadata.jsonl").write_text(text)
            Path(jsonl).unlink()
            columns[columns.index("img")] = "image"
    assert main(["data", "convert", given, *columns, "--out", "ours"]) == 0
    assert capsys.readouterr().out.strip() == "4 examples in ours"
    examples = load_examples("ours")
    assert [example.question for example in examples] == [f"What is {number}?" for number in range(N)]
    assert [example.evidence for example in examples] == [
        (Evidence(0, (left(number), 60, left(number) + 80, 160)),) for number in range(N)
    ]
    assert {example.answer for example in examples} == {"box"}
    assert [example.group for example in examples] == ["d0", "d0", "d1", "d1"]
    assert [example.id for example in examples] == [str(number) for number in range(N)]
    assert [example.metadata for example in examples] == [{"n": number} for number in range(N)]
    for number, example in enumerate(examples):
        assert (np.asarray(example.images[0]) == np.asarray(page(number))).all()
    # And what was converted can be looked at.
    assert main(["data", "ours", "--n", "1", "--out", "one.png"]) == 0
    assert Path("one.png").is_file()


def test_data_converts_a_table_of_plain_text(jsonl: str, place: Path) -> None:
    for name, sign in (("rows.csv", ","), ("rows.tsv", "\t")):
        with open(place / "mine" / name, "w", newline="") as file:
            writer = csv.writer(file, delimiter=sign)
            writer.writerow(["q", "a", "img", "pages"])
            writer.writerow(["What, here?", "box", "images/0.png", "[1]"])
        given = ["--question", "q", "--answer", "a", "--images", "img", "--evidence", "pages"]
        given += ["--box-format", "pages", "--first-page", "1", "--candidates", "box", "ball"]
        assert main(["data", "convert", f"mine/{name}", *given, "--out", f"from-{name}"]) == 0
        (example,) = load_examples(f"from-{name}")
        assert (example.question, example.candidates) == ("What, here?", ("box", "ball"))
        assert example.evidence == (Evidence(0),)


def test_data_converts_a_published_set(refcocog: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["data", "convert", "refcocog", "--data-dir", refcocog, "--out", "ours"]
    assert main([*given, "--n", "3"]) == 0
    assert capsys.readouterr().out.strip() == "3 examples in ours"
    assert [example.id for example in load_examples("ours")] == ["0-0", "0-1", "1-0"]
    assert main(given) == 2
    assert "'ours' holds examples already" in capsys.readouterr().err


def test_rows_that_are_skipped_are_counted_and_named(jsonl: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in Path(jsonl).read_text().splitlines()]
    rows[2]["at"] = [300, 60, 80, 100]
    Path(jsonl).write_text("\n".join(map(json.dumps, rows)))
    given = ["data", "convert", jsonl, *COLUMNS, "--out", "ours"]
    assert main(given) == 2
    assert "mine/rows.jsonl, row 2 (id '2'), image 0: the box (300, 60, 380, 160)" in capsys.readouterr().err
    with pytest.warns(MmlensWarning, match=r"1 row\(s\) were skipped"):
        assert main([*given, "--on-error", "skip"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("3 examples in ours; 1 row(s) skipped:\n    skipped row 2 (id '2'): ")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("data refcog", "no data set 'refcog'; the nearest: 'refcocog'"),
        ("data refcocog --n 0", "expected a whole number of at least 1"),
        ("data refcocog --n 3 --data-dir nowhere", "there is no such folder"),
        ("data refcocog --n 3 --data-dir nowhere --splitt test", "the nearest: '--split'"),
        ("data refcocog --n 3 --split tets --data-dir .", "there is no split 'tets'; the nearest: 'test'"),
        ("data refcocog --data-dir x", "--data-dir needs --n, rows to show"),
        ("data --n 3", "--n needs --n, rows to show|--n needs"),
        ("data refcocog --n 3 --question q", "--question needs convert"),
        ("data refcocog pope", "there is no action 'refcocog'; there are: 'convert'"),
        ("data convert", "takes what to convert and --out"),
        ("data convert mine/rows.jsonl", "takes what to convert and --out"),
        ("data convert nowhere.jsonl --out x", "there is no file or folder 'nowhere.jsonl'"),
        ("data convert refcogoc --out x", "the nearest: 'refcocog'"),
        ("data convert mine/rows.jsonl --out x", "--question .* and --answer"),
        (
            "data convert mine/rows.jsonl --question q --answer an --out x",
            "no column 'an' in mine/rows.jsonl",
        ),
        ("data convert mine/images/0.png --question q --answer a --out x", "is no table"),
        (
            "data convert mine/rows.jsonl --question q --answer a --evidence at --box-format xwyh --out x",
            "'xywh'",
        ),
        ("data convert refcocog --question q --out x", "--question cannot be given"),
        ("data convert mine/rows.jsonl --question q --answer a --data-dir mine --out x", "--data-dir is of"),
        (
            "data convert mine/rows.jsonl --question q --answer q --evidence at --out x",
            "row 0.*by box_format=",
        ),
    ],
)
def test_what_is_mistyped_is_said(
    jsonl: str, typed: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(typed.split())
    except SystemExit as stopped:
        status = int(str(stopped.code))
    assert status == 2
    told = capsys.readouterr().err
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(told)
    assert not Path("x").exists()
