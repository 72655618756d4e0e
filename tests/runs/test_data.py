"""Experiments on published data sets by name: made-up rows of the published schema, read by `datasets` itself."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tiny import tiny_model, tiny_processor

from mmlens.cli import main, parsed_settings
from mmlens.data.examples import DataError, save_examples
from mmlens.data.scenes import scene_examples
from mmlens.data.splits import group_of, is_in_first
from mmlens.errors import InvalidTypeError, InvalidValueError, MmlensWarning
from mmlens.runs.data import splits
from mmlens.runs.methods import filled_method
from mmlens.runs.record import read_record
from mmlens.runs.request import Request
from mmlens.runs.rerun import rerun
from mmlens.runs.run import experiment_named, full_settings, request_of, settings_of

WORDS = ("red", "green", "blue", "left", "right", "cup", "cat", "tree")


def encoded(seed: int, size: tuple[int, int] = (64, 64)) -> dict[str, Any]:
    """An image as Hugging Face datasets hold one."""
    values = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{seed}.png"}


def write_refcocog(folder: Path, n: int) -> None:
    """Rows of lmms-lab/RefCOCOg: boxes as left, top, width, height; two expressions of an object."""
    draw = random.Random(0)
    rows = []
    for at in range(n):
        left, top = draw.randrange(0, 30), draw.randrange(0, 30)
        rows.append(
            {
                "question_id": f"{at}",
                "image": encoded(at // 2),
                "question": "Please describe the region.",
                "answer": [f"the {draw.choice(WORDS)} {at}", f"a {draw.choice(WORDS)} thing {at}"],
                "segmentation": [float(left), float(top)],
                "bbox": [float(left), float(top), 20.0, 25.0],
                "iscrowd": 0,
                "file_name": f"COCO_train2014_{at // 2:012d}_{at}.jpg",
            }
        )
    features = datasets.Features(
        {
            "question_id": datasets.Value("string"),
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answer": datasets.Sequence(datasets.Value("string")),
            "segmentation": datasets.Sequence(datasets.Value("float32")),
            "bbox": datasets.Sequence(datasets.Value("float32")),
            "iscrowd": datasets.Value("int64"),
            "file_name": datasets.Value("string"),
        }
    )
    (folder / "data").mkdir(parents=True)
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(folder / "data" / "val-00000-of-00001.parquet")


def write_mmdocir(folder: Path, n_documents: int, n_questions: int = 2, n_pages: int = 3) -> None:
    """annotations.jsonl and pages.parquet of MMDocIR: pages from 0, boxes in points of a page of 128 x 128."""
    draw = random.Random(1)
    folder.mkdir(parents=True)
    lines, pages = [], []
    for at in range(n_documents):
        first = len(pages)
        for page in range(n_pages):
            name = f"doc{at}_{page}"
            pages.append(
                {"doc_name": f"doc{at}", "passage_id": str(page), "ocr_text": name, "vlm_text": name}
                | {"image_binary": encoded(1000 + 10 * at + page)["bytes"], "image_path": f"{name}.jpg"}
            )
        questions = []
        for number in range(n_questions):
            page = draw.randrange(n_pages)
            box = {"page": page, "page_size": [128.0, 128.0], "bbox": [10.0, 20.0, 90.0, 100.0]}
            questions.append(
                {"Q": f"Which {draw.choice(WORDS)} is on sheet {number} of {at}?", "A": draw.choice(WORDS)}
                | {"type": "['Figure']", "page_id": [page], "layout_mapping": [box]}
            )
        lines.append(
            {"doc_name": f"doc{at}.pdf", "domain": "Guidebook", "page_indices": [first, first + n_pages - 1]}
            | {"layout_indices": [0, 0], "questions": questions}
        )
    (folder / "MMDocIR_annotations.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    pd.DataFrame(pages).to_parquet(folder / "MMDocIR_pages.parquet")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder of two data sets."""
    folder = tmp_path_factory.mktemp("published")
    write_refcocog(folder / "refcocog", 40)
    write_mmdocir(folder / "mmdocir", 24)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small model of random weights, whose tokenizer knows all words."""
    folder = tmp_path_factory.mktemp("models") / "small"
    tiny_model("qwen3_vl").save_pretrained(folder)
    tiny_processor("qwen3_vl").save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def asked(published: Path, **changed: Any) -> Request:
    given = {"data": "refcocog", "data_dir": str(published), "n_selection": 9, "n_evaluation": 7, "seed": 3}
    return Request("masking", "micro", **given | changed)


# ---------------------------------------------------------------------- splits


@pytest.mark.parametrize("options", [None, {"streaming": True}], ids=["numbered", "streaming"])
@pytest.mark.parametrize("name", ["refcocog", "mmdocir"])
def test_a_data_set_is_split_by_its_groups(published: Path, name: str, options: Any) -> None:
    found = splits(asked(published, data=name, data_options=options))
    assert (len(found.selection), len(found.evaluation)) == (9, 7)
    assert {*map(group_of, found.selection)}.isdisjoint(map(group_of, found.evaluation))
    assert all(is_in_first(each, 0.5, 3) for each in found.selection)
    assert not any(is_in_first(each, 0.5, 3) for each in found.evaluation)
    assert all(each.evidence and each.images[0].size == (64, 64) for each in found.selection)
    assert found.source["source"] == name and found.source["group"] and found.source["licence"]
    again = splits(asked(published, data=name, data_options=options))
    assert found.record() == again.record()
    if options is None:
        other = splits(asked(published, data=name, seed=4)).record()
        assert other["selection"]["ids"] != found.record()["selection"]["ids"]


def test_several_data_sets_are_kinds_of_task(published: Path) -> None:
    options = {"mmdocir": {"max_pages": 1}}
    found = splits(asked(published, data=["refcocog", "mmdocir"], data_options=options))
    assert found.record()["selection"]["n_by_kind"] == {"mmdocir": 9, "refcocog": 9}
    assert {len(each.images) for each in found.selection if each.kind == "mmdocir"} == {1}
    assert [part["source"] for part in found.source["parts"]] == ["refcocog", "mmdocir"]


def test_fewer_than_asked_for_is_said(published: Path) -> None:
    with pytest.warns(
        MmlensWarning, match="refcocog: .* examples in the selection split, 500 were asked for"
    ):
        splits(asked(published, n_selection=500))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"data": "refcoco"}, DataError, "no folder of examples 'refcoco'.*the nearest: 'refcocog'"),
        ({"data": ["refcocog", "refcocog"]}, InvalidValueError, "names 'refcocog' twice"),
        ({"data": None}, InvalidValueError, "no data are named"),
        ({"data_options": {"splt": "val"}}, Exception, "the nearest: 'split'"),
        ({"data_options": {"split": "vale"}}, InvalidValueError, "the nearest: 'val'"),
        ({"data_dir": "/nowhere"}, Exception, "no such folder"),
        ({"data": "."}, DataError, r"are of data sets by name, and \. is none"),
        ({"data_options": {"refcocog": 3}}, InvalidTypeError, "expected a dict of options of load_data"),
    ],
)
def test_what_is_no_data_set_is_said(
    published: Path, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        splits(asked(published, **changed))


def test_a_folder_with_the_name_of_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_examples(scene_examples("objects", 6, seed=0), tmp_path / "pope")
    with pytest.raises(InvalidValueError, match=r"write \./pope for the folder"):
        splits(Request("masking", "micro", data="pope"))
    assert len(splits(Request("masking", "micro", data="./pope")).selection) == 3


def test_requests_in_json() -> None:
    for data in ("refcocog", ["refcocog", "mmdocir"]):
        request = Request("masking", "micro", data=data, data_options={"split": "val"})
        record = {"request": json.loads(json.dumps({**vars(request)}))}
        assert request_of(record) == request


# ---------------------------------------------------------------------- runs


def test_an_experiment_on_a_data_set_is_run_and_repeated(
    published: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a user types it: the record, the method and the bibliography name the data set, and a rerun finds it again."""
    out = tmp_path / "out"
    sizes = ["--n-selection", "8", "--n-evaluation", "6", "--threads", "1", "--batch-size", "4"]
    command = [
        "run",
        "head-map",
        "--model",
        model,
        "--data",
        "refcocog",
        "--data-dir",
        str(published),
        *sizes,
    ]
    assert main([*command, "--out", str(out)]) == 0, capsys.readouterr().err
    folder = out / "small"
    record = read_record(folder)
    assert record["request"]["data"] == "refcocog" and record["data"]["selection"]["n"] == 8
    assert record["data"]["hub"] == "lmms-lab/RefCOCOg" and record["data"]["columns_checked_against"]
    method = (folder / "methods.md").read_text()
    cite = record["data"]["cite"]
    assert "RefCOCOg" in method and f"[@{cite}]" in method and cite in (folder / "references.bib").read_text()
    assert rerun(folder, progress=False).same
    moved = published.rename(published.with_name("moved"))
    try:
        assert main(["rerun", str(folder)]) == 2
        assert "no such folder" in capsys.readouterr().err
        assert main(["rerun", str(folder), "--data-dir", str(moved)]) == 0
    finally:
        moved.rename(published)


def test_stability_across_data_sets(
    published: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--n-selection", "8", "--n-evaluation", "4", "--threads", "1", "--batch-size", "4"]
    settings = ["--set", "n_resamples=50", "n_splits=5", "n_draws=50"]
    data = ["--data", "refcocog", "mmdocir", "--data-dir", str(published)]
    command = ["run", "stability", "--model", model, *data, *sizes, *settings, "--out", str(tmp_path / "out")]
    assert main(command) == 0, capsys.readouterr().err
    numbers = json.loads((tmp_path / "out" / "small" / "numbers.json").read_text())
    (pair,) = numbers["spearman"]
    assert {pair["one"], pair["other"]} == {"refcocog", "mmdocir"}
    assert rerun(tmp_path / "out" / "small", progress=False).same


def test_all_examples_that_were_asked_for_are_used(published: Path) -> None:
    """The limit of so many of each kind is for generated scenes, unless it is given."""
    masking = experiment_named("masking")
    assert settings_of(asked(published), masking)["n_per_kind"] is None
    assert settings_of(asked(published, settings={"n_per_kind": 4}), masking)["n_per_kind"] == 4
    assert settings_of(Request("masking", "micro"), masking)["n_per_kind"] == 10
    assert parsed_settings(masking, ["n_per_kind=none"]) == {"n_per_kind": None}
    assert full_settings(masking, {"n_per_kind": None})["n_per_kind"] is None
    assert "n_draws" not in masking.may_be_none
    assert "on all evaluation examples" in filled_method(masking, settings_of(asked(published), masking))
