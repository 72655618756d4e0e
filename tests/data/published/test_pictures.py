"""Data sets of pictures: made-up rows of the published columns and types, read by name from a folder."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import List, Value
from PIL import Image
from published_files import cell, png, write_image, write_json, write_parquet

from mmlens import Evidence
from mmlens.data.examples import DataError
from mmlens.data.published.loading import load_data

STRING, INT, IMAGE = Value("string"), Value("int64"), datasets.Image()


@pytest.fixture(autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def refcocog_rows(**changed: Any) -> list[dict[str, Any]]:
    row = {
        "question_id": "17",
        "image": cell(640, 480),
        "question": "Please carefully observe the area",
        "answer": ["the man in blue", "Man holding a kite."],
        "segmentation": [1.0, 2.0, 3.0, 4.0],
        "bbox": [100.5, 20.25, 200.0, 300.0],
        "iscrowd": 0,
        "file_name": "COCO_train2014_000000380440_2.jpg",
    }
    other = {**row, "question_id": "18", "answer": ["a dog"], "bbox": [600.0, 10.0, 41.5, 20.0]}
    return [{**row, **changed}, other]


REFCOCOG = {
    "question_id": STRING,
    "image": IMAGE,
    "question": STRING,
    "answer": List(STRING),
    "segmentation": List(Value("float32")),
    "bbox": List(Value("float32")),
    "iscrowd": Value("int8"),
    "file_name": STRING,
}


def test_refcocog_has_an_example_of_each_expression(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "val-00000-of-00001.parquet", REFCOCOG, refcocog_rows())
    first, second, third = load_data("refcocog", data_dir=tmp_path)
    assert [each.id for each in (first, second, third)] == ["17-0", "17-1", "18-0"]
    assert first.evidence == (Evidence(0, (100.5, 20.25, 300.5, 320.25)),) == second.evidence
    # Its box leaves the image by a pixel and a half.
    assert third.evidence == (Evidence(0, (600.0, 10.0, 640.0, 30.0)),)
    assert first.question == 'Left or right: in which half of the image is "the man in blue"?'
    assert second.question.endswith('"Man holding a kite"?')
    assert (first.answer, third.answer) == ("left", "right") and first.candidates == ("left", "right")
    assert {each.group for each in (first, second, third)} == {"COCO 380440"}
    assert first.kind == "refcocog" and first.images[0].size == (640, 480)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"bbox": [700.0, 10.0, 20.0, 20.0]}, "lies outside its image, 640 x 480"),
        ({"answer": [" . "]}, "the expression is empty"),
        ({"bbox": [1.0, 2.0]}, "not enough values"),
    ],
)
def test_rows_of_refcocog_that_cannot_be_read(tmp_path: Path, changed: Any, reason: str) -> None:
    write_parquet(tmp_path / "data" / "val-0.parquet", REFCOCOG, refcocog_rows(**changed))
    with pytest.raises(DataError, match=rf"refcocog val, row 0 \(id '17'\): .*{reason}"):
        list(load_data("refcocog", data_dir=tmp_path))
    with pytest.warns(match="1 row"):
        assert len(list(load_data("refcocog", data_dir=tmp_path, on_error="skip"))) == 1


def test_visual_genome(tmp_path: Path) -> None:
    region = {
        "region_id": 5,
        "image_id": 9,
        "phrase": "a red cup",
        "x": 10,
        "y": 20,
        "width": 30,
        "height": 40,
    }
    rows = [{"id": 9, "regions": [region, {**region, "region_id": 6, "x": 150}]}]
    write_json(tmp_path / "region_descriptions.json", rows)
    write_image(tmp_path / "VG_100K_2" / "9.jpg")
    first, second = load_data("visual-genome", data_dir=tmp_path)
    assert first.evidence == (Evidence(0, (10, 20, 40, 60)),) and second.evidence[0].box == (150, 20, 180, 60)
    assert (first.answer, second.answer) == ("left", "right")
    assert (first.id, first.group, first.metadata["expression"]) == ("5", "Visual Genome 9", "a red cup")


def test_nlvr_boxes_of_the_second_and_third_box_are_shifted(tmp_path: Path) -> None:
    shape = {"x_loc": 10, "y_loc": 70, "size": 30, "type": "square", "color": "Yellow"}
    row = {
        "sentence": "There is a yellow square.",
        "label": "true",
        "identifier": "72-3",
        "directory": "5",
        "evals": {"r0": "true"},
        "structured_rep": [[shape], [], [shape, {**shape, "size": 20, "y_loc": 0}]],
    }
    write_json(tmp_path / "dev" / "dev.json", [row], lines=True)
    write_image(tmp_path / "dev" / "images" / "5" / "dev-72-3-0.png", 400, 100)
    examples = load_data("nlvr", data_dir=tmp_path)
    assert len(examples) == 1
    example = examples[0]
    assert [region.box for region in example.evidence] == [
        (10, 70, 40, 100),
        (310, 70, 340, 100),
        (310, 0, 330, 20),
    ]
    assert (example.answer, example.group, example.images[0].size) == ("yes", "72", (400, 100))
    assert example.question == "Is this true of the image? There is a yellow square."


def test_nlvr2(tmp_path: Path) -> None:
    row = {
        "sentence": "Both have dogs.",
        "label": "False",
        "identifier": "dev-850-2-1",
        "left_url": "https://a/b.jpg",
        "right_url": "https://a/c.jpg",
        "validation": {"61": "False"},
    }
    write_json(tmp_path / "data" / "dev.json", [row], lines=True)
    for side, width in ((0, 50), (1, 60)):
        write_image(tmp_path / "images" / "dev" / f"dev-850-2-img{side}.png", width, 40)
    (example,) = load_data("nlvr2", data_dir=tmp_path)
    assert example.images.sizes == ((50, 40), (60, 40)) and example.evidence == ()
    assert (example.answer, example.id, example.group) == ("no", "dev-850-2-1", "dev-850")


def test_vsr(tmp_path: Path) -> None:
    row = {
        "image": "000000451431.jpg",
        "image_link": "http://images/train2017/000000451431.jpg",
        "caption": "The cat is on the box.",
        "label": 0,
        "relation": "on",
        "annotator_id": 2,
        "vote_true_validator_id": "[2]",
        "vote_false_validator_id": "[]",
    }
    write_json(
        tmp_path / "test.jsonl", [row, {**row, "label": 1, "caption": "The box is under it."}], lines=True
    )
    write_image(tmp_path / "images" / "000000451431.jpg")
    first, second = load_data("vsr", data_dir=tmp_path)
    assert (first.answer, second.answer, first.group) == ("no", "yes", "COCO 451431")
    assert first.id != second.id and first.metadata == {"relation": "on"}


POPE = {
    "id": STRING,
    "question_id": STRING,
    "question": STRING,
    "answer": STRING,
    "image_source": STRING,
    "image": IMAGE,
    "category": STRING,
}


def test_pope_of_the_hub(tmp_path: Path) -> None:
    row = {
        "id": "0",
        "question_id": "1",
        "question": "Is there a dog in the image?",
        "answer": "yes",
        "image_source": "COCO_val2014_000000310196",
        "image": cell(),
        "category": "popular",
    }
    write_parquet(
        tmp_path / "data" / "test-00000-of-00001.parquet",
        POPE,
        [row, {**row, "question_id": "2", "answer": "no"}],
    )
    first, second = load_data("pope", data_dir=tmp_path)
    assert (first.id, first.answer, first.group, first.kind) == ("popular-1", "yes", "COCO 310196", "pope")
    assert second.answer == "no" and first.candidates == ("yes", "no") and first.evidence == ()


def test_pope_of_its_authors_with_boxes_of_coco(tmp_path: Path) -> None:
    row = {
        "question_id": 1,
        "image": "COCO_val2014_000000000042.jpg",
        "text": "Is there a dog in the image?",
        "label": "yes",
    }
    rows = [row, {**row, "question_id": 2, "text": "Is there an apple in the image?", "label": "no"}]
    write_json(tmp_path / "coco_pope_random.json", rows, lines=True)
    write_image(tmp_path / "val2014" / "COCO_val2014_000000000042.jpg")
    first, second = load_data("pope", "random", data_dir=tmp_path)
    assert (first.id, first.kind, first.evidence) == ("random-1", "pope", ())
    told = {
        "categories": [{"id": 18, "name": "dog"}],
        "annotations": [{"image_id": 42, "category_id": 18, "bbox": [10, 20, 30, 40]}],
    }
    write_json(tmp_path / "annotations" / "instances_val2014.json", told)  # type: ignore[arg-type]
    first, second = load_data("pope", "random", data_dir=tmp_path)
    assert first.evidence == (Evidence(0, (10, 20, 40, 60)),) and first.kind == "pope"
    assert second.evidence == () and second.kind == "pope, no evidence"


def test_mmvp(tmp_path: Path) -> None:
    features = {"Index": INT, "Question": STRING, "Options": STRING, "Correct Answer": STRING, "image": IMAGE}
    row = {
        "Index": 3,
        "Question": "Is it open?",
        "Options": "(a) Open (b) Closed",
        "Correct Answer": "(a)",
        "image": cell(),
    }
    write_parquet(
        tmp_path / "data" / "train-0.parquet", features, [row, {**row, "Index": 4, "Correct Answer": "(b)"}]
    )
    first, second = load_data("mmvp", data_dir=tmp_path)
    assert first.question == "Is it open? (a) Open (b) Closed" and first.candidates == ("(a)", "(b)")
    assert (first.answer, second.answer, first.group, second.group) == ("(a)", "(b)", "pair 2", "pair 2")


def test_vstar_has_its_boxes_beside_the_image(tmp_path: Path) -> None:
    row = {
        "image": "direct_attributes/sa_1.jpg",
        "text": "What is it made of?\n(A) rubber\n(B) cotton\nAnswer with the option's letter.",
        "category": "direct_attributes",
        "label": "B",
        "question_id": 0,
    }
    write_json(tmp_path / "test_questions.jsonl", [row], lines=True)
    write_image(tmp_path / row["image"])  # type: ignore[operator]
    beside = {"target_object": ["glove"], "bbox": [[20, 30, 40, 50]], "question": "", "options": []}
    (tmp_path / "direct_attributes" / "sa_1.json").write_text(json.dumps(beside))
    (example,) = load_data("vstar", data_dir=tmp_path)
    assert example.evidence == (Evidence(0, (20, 30, 60, 80)),)
    assert (example.answer, example.candidates, example.group) == (
        "B",
        ("A", "B"),
        "direct_attributes/sa_1.jpg",
    )
    assert example.metadata == {"category": "direct_attributes", "target": ["glove"]}


WEB = {
    "id": STRING,
    "task_type": STRING,
    "website": STRING,
    "image": IMAGE,
    "image_size": List(INT),
    "options": List(List(Value("float64"))),
    "elem_desc": STRING,
    "answer": INT,
}


@pytest.mark.parametrize(
    "options",
    [[[0.0, 0.0, 0.5, 0.1], [0.1, 0.5, 0.2, 1.0]], [[0.0, 0.0, 200.0, 20.0], [40.0, 100.0, 80.0, 200.0]]],
)
def test_visualwebbench_boxes_are_parts_of_the_image_or_pixels(tmp_path: Path, options: Any) -> None:
    row = {
        "id": "element_ground_1",
        "task_type": "element_ground",
        "website": "a.org",
        "image": cell(400, 200),
        "image_size": [400, 200],
        "options": options,
        "elem_desc": "a button that says go",
        "answer": 1,
    }
    write_parquet(tmp_path / "element_ground" / "test-0.parquet", WEB, [row])
    (example,) = load_data("visualwebbench", data_dir=tmp_path)
    assert example.evidence[0].box == pytest.approx((40, 100, 80, 200))
    assert (example.answer, example.candidates, example.group) == ("B", ("A", "B"), "a.org")


def test_textvqa_takes_the_answer_that_most_gave(tmp_path: Path) -> None:
    features = {
        "image_id": STRING,
        "question_id": Value("int32"),
        "question": STRING,
        "image": IMAGE,
        "answers": List(STRING),
    }
    row = {
        "image_id": "003a",
        "question_id": 34602,
        "question": "what is the brand?",
        "image": cell(),
        "answers": ["casio", "nokia", "nokia"] + ["Nokia"] * 2,
    }
    write_parquet(tmp_path / "data" / "validation-0.parquet", features, [row])
    (example,) = load_data("textvqa", data_dir=tmp_path)
    assert example.answer == "nokia" and example.metadata["answers"] == ["casio", "nokia", "Nokia"]
    assert (example.id, example.group) == ("34602", "003a")
    write_parquet(tmp_path / "data" / "validation-0.parquet", features, [{**row, "answers": []}])
    with pytest.raises(DataError, match=r"row 0 \(id '.*'\): .*there is no answer"):
        list(load_data("textvqa", data_dir=tmp_path))


def test_vqav2(tmp_path: Path) -> None:
    answer = {"answer": "net", "answer_confidence": "maybe", "answer_id": 1}
    features = {
        "question_type": STRING,
        "multiple_choice_answer": STRING,
        "answers": List({"answer": STRING, "answer_confidence": STRING, "answer_id": INT}),
        "image_id": INT,
        "answer_type": STRING,
        "question_id": INT,
        "question": STRING,
        "image": IMAGE,
    }
    row = {
        "question_type": "what is",
        "multiple_choice_answer": "net",
        "answers": [answer, {**answer, "answer": "netting"}],
        "image_id": 458752,
        "answer_type": "other",
        "question_id": 458752000,
        "question": "What is behind him?",
        "image": cell(),
    }
    write_parquet(tmp_path / "data" / "validation-0.parquet", features, [row])
    (example,) = load_data("vqav2", data_dir=tmp_path)
    assert example.answer == "net" and example.metadata["answers"] == ["net", "netting"]
    assert (example.id, example.group) == ("458752000", "COCO 458752")


def test_chartqa_knows_charts_by_their_bytes(tmp_path: Path) -> None:
    features = {"type": STRING, "question": STRING, "answer": STRING, "image": IMAGE}
    row = {"type": "human_test", "question": "How many bars?", "answer": "14", "image": cell()}
    rows = [row, {**row, "question": "How high?"}, {**row, "image": cell(30, 30)}]
    write_parquet(tmp_path / "data" / "test-0.parquet", features, rows)
    first, second, third = load_data("chartqa", data_dir=tmp_path)
    assert first.group == second.group != third.group and len({first.id, second.id, third.id}) == 3
    assert (first.answer, first.metadata) == ("14", {"type": "human_test"})


def test_chartqa_of_its_authors(tmp_path: Path) -> None:
    row = {"imgname": "4169.png", "query": "How many bars?", "label": "14"}
    write_json(tmp_path / "test_human.json", [row])
    write_image(tmp_path / "png" / "4169.png")
    (example,) = load_data("chartqa", data_dir=tmp_path)
    assert (example.question, example.answer, example.group) == ("How many bars?", "14", "4169.png")
    assert example.images[0].size == (200, 100)


GQA = {
    "id": STRING,
    "imageId": STRING,
    "question": STRING,
    "answer": STRING,
    "fullAnswer": STRING,
    "isBalanced": Value("bool"),
    "semantic": List({"operation": STRING, "argument": STRING, "dependencies": List(Value("int32"))}),
}


def gqa_row(*arguments: str) -> dict[str, Any]:
    steps = [{"operation": "select", "argument": each, "dependencies": []} for each in arguments]
    return {
        "id": f"q{len(arguments)}",
        "imageId": "n1",
        "question": "Is the bag red?",
        "answer": "yes",
        "fullAnswer": "Yes, it is.",
        "isBalanced": True,
        "semantic": steps,
    }


def test_gqa_has_its_images_in_a_second_table(tmp_path: Path) -> None:
    write_parquet(tmp_path / "testdev_balanced_instructions" / "testdev-0.parquet", GQA, [gqa_row("bag (7)")])
    images = [{"id": "n0", "image": cell(10, 10)}, {"id": "n1", "image": cell(200, 100)}]
    write_parquet(
        tmp_path / "testdev_balanced_images" / "testdev-0.parquet", {"id": STRING, "image": IMAGE}, images
    )
    (example,) = load_data("gqa", data_dir=tmp_path)
    assert example.images[0].size == (200, 100) and example.evidence == () and example.kind == "gqa"
    assert (example.group, example.metadata) == ("Visual Genome n1", {"full_answer": "Yes, it is."})


def test_gqa_with_scene_graphs(tmp_path: Path) -> None:
    rows = [gqa_row("bag (7)", "on,(8)", "color"), gqa_row("scene")]
    write_parquet(tmp_path / "val_balanced_instructions" / "val-0.parquet", GQA, rows)
    write_image(tmp_path / "images" / "n1.jpg")
    place = {"name": "bag", "x": 10, "y": 20, "w": 30, "h": 40}
    graph = {"n1": {"width": 200, "height": 100, "objects": {"7": place, "8": {**place, "x": 50}}}}
    (tmp_path / "val_sceneGraphs.json").write_text(json.dumps(graph))
    first, second = load_data("gqa", "val", data_dir=tmp_path)
    assert [region.box for region in first.evidence] == [(10, 20, 40, 60), (50, 20, 80, 60)]
    assert (first.kind, second.kind, second.evidence) == ("gqa", "gqa, no evidence", ())


def test_an_image_that_does_not_open_is_named(tmp_path: Path) -> None:
    rows = refcocog_rows(image={"bytes": b"no image", "path": None})
    write_parquet(tmp_path / "data" / "val-0.parquet", REFCOCOG, rows)
    with pytest.raises(DataError, match=r"refcocog val, row 0 \(id '17'\): .*no image that PIL can read"):
        list(load_data("refcocog", data_dir=tmp_path))


def test_pictures_are_the_rows_own(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "data" / "val-0.parquet",
        REFCOCOG,
        refcocog_rows(image={"bytes": png(640, 480, "red"), "path": None}),
    )
    first = next(iter(load_data("refcocog", data_dir=tmp_path)))
    assert first.images[0].getpixel((0, 0)) == (255, 0, 0)
    assert Image.open(io.BytesIO(png())).size == (200, 100)
