"""Data sets of documents: made-up rows of the published columns and types, read by name from a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import List, Value
from PIL import Image
from published_files import cell, png, write_image, write_json, write_parquet

import mmlens
from mmlens import Evidence
from mmlens.data.examples import DataError, Example
from mmlens.data.published.loading import load_data
from mmlens.data.splits import shared_groups
from mmlens.errors import InvalidValueError
from mmlens.experiments.experiment import Setup

STRING, INT, IMAGE = Value("string"), Value("int64"), datasets.Image()


@pytest.fixture(autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


# ------------------------------------------------------------------------------ MMDocIR

PAGES = {
    "doc_name": STRING,
    "domain": STRING,
    "passage_id": STRING,
    "image_path": STRING,
    "image_binary": Value("binary"),
    "ocr_text": STRING,
    "vlm_text": STRING,
}


def layout(page: int, *box: float, size: Sequence[float] = (612.0, 792.0)) -> dict[str, Any]:
    return {"page": page, "page_size": list(size), "bbox": list(box)}


def question(text: str, pages: list[int], *layouts: dict[str, Any]) -> dict[str, Any]:
    return {"Q": text, "A": "42", "page_id": pages, "type": "['Chart']", "layout_mapping": list(layouts)}


def mmdocir(folder: Path, questions: list[dict[str, Any]], n_pages: int = 6) -> None:
    """Two documents: `other` of two pages, and `report`, whose pages follow in the table."""
    documents = [("other", 2), ("report", n_pages)]
    pages = [
        {
            "doc_name": name,
            "domain": "News",
            "passage_id": str(page),
            "image_path": f"page_images/{name}_{page}.jpg",
            "image_binary": png(1224, 1584, (page, 0, 0)),
            "ocr_text": "",
            "vlm_text": "",
        }
        for name, n in documents
        for page in range(n)
    ]
    write_parquet(folder / "MMDocIR_pages.parquet", PAGES, pages)
    rows = [
        {
            "doc_name": "other.pdf",
            "page_indices": [0, 1],
            "questions": [question("Who?", [0], layout(0, 1, 2, 3, 4))],
        },
        {"doc_name": "report.pdf", "page_indices": [2, 1 + n_pages], "questions": questions},
    ]
    told = [{"domain": "News", "layout_indices": [0, 9], **row} for row in rows]
    write_json(folder / "MMDocIR_annotations.jsonl", told, lines=True)


def test_mmdocir_boxes_are_points_and_pages_count_from_zero(tmp_path: Path) -> None:
    mmdocir(
        tmp_path,
        [question("How many?", [4, 5], layout(4, 61.2, 79.2, 122.4, 396), layout(5, 0, 0, 612, 792))],
    )
    other, example = load_data("mmdocir", data_dir=tmp_path)
    assert (other.id, example.id, example.group) == ("other-0", "report-0", "report")
    assert len(example.images) == 6 and example.images[5].getpixel((0, 0)) == (5, 0, 0)
    first, second = example.evidence
    assert (first.image, second.image) == (4, 5) and second.box == pytest.approx((0, 0, 1224, 1584))
    assert first.box == pytest.approx((122.4, 158.4, 244.8, 792))
    assert other.evidence == (Evidence(0, (2, 4, 6, 8)),)
    assert example.metadata["type"] == ["Chart"] and example.answer == "42" and example.kind == "mmdocir"


def test_mmdocir_shows_the_pages_about_its_evidence(tmp_path: Path) -> None:
    mmdocir(tmp_path, [question("How many?", [4], layout(4, 61.2, 79.2, 122.4, 396))])
    _, example = load_data("mmdocir", data_dir=tmp_path, max_pages=3)
    assert example.metadata["pages"] == [3, 4, 5] and example.metadata["n_pages"] == 6
    assert [image.getpixel((0, 0))[0] for image in example.images] == [3, 4, 5]
    assert example.evidence[0].image == 1 and example.evidence[0].box == pytest.approx(
        (122.4, 158.4, 244.8, 792)
    )


def test_mmdocir_pages_without_a_box_count_whole(tmp_path: Path) -> None:
    """A page that no layout is of, one whose layout has no width; and boxes are cut at the edge of the page."""
    layouts = [layout(1, 300, 100, 300, 450), layout(2, 600, 0, 613, 800)]
    mmdocir(tmp_path, [question("How many?", [1, 2, 3], *layouts)])
    _, example = load_data("mmdocir", data_dir=tmp_path)
    boxed, *whole = example.evidence
    assert boxed.image == 2 and boxed.box == pytest.approx((1200, 0, 1224, 1584))
    assert whole == [Evidence(1), Evidence(3)]


def test_mmdocir_files_that_do_not_fit(tmp_path: Path) -> None:
    mmdocir(tmp_path, [question("How many?", [6], layout(6, 1, 1, 2, 2))])
    with pytest.raises(
        DataError, match=r"row 1: .*question 0 of report.pdf names the pages \[6\], counted from 0"
    ):
        list(load_data("mmdocir", data_dir=tmp_path))
    mmdocir(tmp_path, [question("How many?", [0], layout(0, 1, 1, 2, 2))])
    text = (
        (tmp_path / "MMDocIR_annotations.jsonl")
        .read_text()
        .replace('"page_indices": [2, 7]', '"page_indices": [1, 6]')
    )
    (tmp_path / "MMDocIR_annotations.jsonl").write_text(text)
    with pytest.raises(DataError, match="row 1 of MMDocIR_pages.parquet is of 'other'; the files are of two"):
        list(load_data("mmdocir", data_dir=tmp_path))
    (tmp_path / "MMDocIR_pages.parquet").unlink()
    with pytest.raises(DataError, match=r"MMDocIR_pages\.parquet"):
        list(load_data("mmdocir", data_dir=tmp_path))


# ------------------------------------------------------------------------------ MMLongBench-Doc

MMLONGBENCH_DOC = dict.fromkeys(
    ("doc_id", "doc_type", "question", "answer", "evidence_pages", "evidence_sources", "answer_format"),
    STRING,
)


def mmlongbench_doc(folder: Path, *changed: dict[str, Any]) -> list[Example]:
    """Rows on one PDF document of five pages, 100 x 50 points each, of growing grey."""
    row = {
        "doc_id": "report.pdf",
        "doc_type": "News",
        "question": "How many?",
        "answer": "42",
        "evidence_pages": "[5]",
        "evidence_sources": "['Chart', 'Table']",
        "answer_format": "Int",
    }
    write_parquet(folder / "data" / "train-0.parquet", MMLONGBENCH_DOC, [{**row, **each} for each in changed])
    (folder / "documents").mkdir(exist_ok=True)
    pages = [Image.new("RGB", (100, 50), (40 * number, 0, 0)) for number in range(5)]
    pages[0].save(folder / "documents" / "report.pdf", save_all=True, append_images=pages[1:], resolution=72)
    return list(load_data("mmlongbench-doc", data_dir=folder))


def test_mmlongbench_doc_counts_from_one_in_a_text(tmp_path: Path) -> None:
    (example,) = mmlongbench_doc(tmp_path, {})
    assert example.evidence == (Evidence(4),) and len(example.images) == 5
    assert example.images[4].size == (200, 100)
    assert example.images[4].getpixel((100, 50))[0] == pytest.approx(160, abs=4)
    assert example.metadata["evidence_sources"] == ["Chart", "Table"]
    assert (example.group, example.kind, example.answer) == ("report", "mmlongbench-doc", "42")
    (few,) = load_data("mmlongbench-doc", data_dir=tmp_path, max_pages=2)
    assert few.metadata["pages"] == [3, 4] and few.evidence == (Evidence(1),)


def test_mmlongbench_doc_without_an_answer(tmp_path: Path) -> None:
    first, second = mmlongbench_doc(
        tmp_path,
        {"question": "Who?", "evidence_pages": "[]", "answer": "Not answerable", "evidence_sources": "[]"},
        {"evidence_pages": "[0, 2, 2]"},
    )
    assert first.evidence == () and first.kind == "mmlongbench-doc, no evidence"
    # Page 0 is the first one.
    assert second.evidence == (Evidence(0), Evidence(1))
    assert first.id != second.id


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"evidence_pages": "[6]"}, r"evidence_pages names \[6\], counted from 1; report.pdf has 5 pages"),
        ({"evidence_pages": "five"}, "'five' is a text that holds no list"),
        ({"doc_id": "reports.pdf"}, "documents/reports.pdf"),
    ],
)
def test_rows_of_mmlongbench_doc_that_cannot_be_read(tmp_path: Path, changed: Any, reason: str) -> None:
    with pytest.raises(DataError, match=rf"mmlongbench-doc train, row 0 .*{reason}"):
        mmlongbench_doc(tmp_path, changed)


def test_a_document_that_is_no_pdf(tmp_path: Path) -> None:
    mmlongbench_doc(tmp_path, {})
    (tmp_path / "documents" / "report.pdf").write_bytes(b"a text")
    from mmlens.data.published.pdf import _n_pages

    _n_pages.cache_clear()
    with pytest.raises(DataError, match=r"row 0 .*report.pdf is no PDF that can be read"):
        list(load_data("mmlongbench-doc", data_dir=tmp_path))


def test_selecting_on_one_set_and_judging_on_the_other_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    mmdocir(tmp_path / "a", [question("How many?", [4], layout(4, 61.2, 79.2, 122.4, 396))])
    selection = list(load_data("mmdocir", data_dir=tmp_path / "a"))
    evaluation = mmlongbench_doc(tmp_path / "b", {})
    assert shared_groups(selection, evaluation) == ["report"]
    model = mmlens.HookedVLM.from_pretrained("micro")
    with pytest.raises(InvalidValueError, match=r"share 1 example\(s\) or group\(s\) \(report\)"):
        Setup(model, selection, evaluation)
    assert Setup(model, selection[:1], evaluation).leak == ""


# ------------------------------------------------------------------------------ SlideVQA, DocVQA

SLIDES = {
    "deck_name": STRING,
    "deck_url": STRING,
    **{f"page_{number}": IMAGE for number in range(1, 21)},
    "qa_id": INT,
    "question": STRING,
    "answer": STRING,
    "arithmetic_expression": STRING,
    "evidence_pages": List(INT),
}


def test_slidevqa_decks_may_have_fewer_slides(tmp_path: Path) -> None:
    row = {
        "deck_name": "a deck",
        "deck_url": "https://a/b",
        **{f"page_{number}": cell(20 * number, 30) if number < 8 else None for number in range(1, 21)},
        "qa_id": 5,
        "question": "How many?",
        "answer": "42",
        "arithmetic_expression": None,
        "evidence_pages": [3, 7],
    }
    write_parquet(tmp_path / "data" / "val-0.parquet", SLIDES, [row])
    (example,) = load_data("slidevqa", data_dir=tmp_path)
    assert len(example.images) == 7 and example.evidence == (Evidence(2), Evidence(6))
    assert example.images.sizes[2] == (60, 30) and (example.id, example.group) == ("5", "a deck")
    write_parquet(tmp_path / "data" / "val-0.parquet", SLIDES, [{**row, "evidence_pages": [8]}])
    with pytest.raises(DataError, match=r"evidence_pages names \[8\], counted from 1; the deck has 7 slides"):
        list(load_data("slidevqa", data_dir=tmp_path))


def test_docvqa(tmp_path: Path) -> None:
    features = {
        "questionId": STRING,
        "question": STRING,
        "question_types": List(STRING),
        "image": IMAGE,
        "docId": INT,
        "ucsf_document_id": STRING,
        "ucsf_document_page_no": STRING,
        "answers": List(STRING),
        "data_split": STRING,
    }
    row = {
        "questionId": "49153",
        "question": "What is the date?",
        "question_types": ["form"],
        "image": cell(),
        "docId": 14465,
        "ucsf_document_id": "pybv0228",
        "ucsf_document_page_no": "81",
        "answers": ["1/8/93", "1/8/1993"],
        "data_split": "val",
    }
    write_parquet(tmp_path / "DocVQA" / "validation-0.parquet", features, [row])
    (example,) = load_data("docvqa", data_dir=tmp_path)
    assert example.answer == "1/8/93" and example.metadata["answers"] == ["1/8/93", "1/8/1993"]
    assert (example.id, example.group) == ("49153", "pybv0228")


# ------------------------------------------------------------------------------ MMLongBench


def test_mmlongbench_pages_of_several_documents(tmp_path: Path) -> None:
    pages = [
        f"mmlongbench-doc/{name}/{name}_page{number}.jpg"
        for name in ("other", "report")
        for number in (1, 2, 3)
    ]
    row = {
        "id": "7",
        "doc_name": "report",
        "question": "How many?",
        "answer": "42",
        "ans_page_list": [2],
        "page_list": pages,
        "answer_format": "Int",
    }
    write_json(tmp_path / "mmlb_data" / "documentQA" / "mmlongdoc_K8.jsonl", [row], lines=True)
    for number, page in enumerate(pages):
        write_image(tmp_path / "mmlb_image" / page, 20 + number, 30)
    (example,) = load_data("mmlongbench", data_dir=tmp_path)
    assert example.images.sizes == tuple((20 + number, 30) for number in range(6))
    # Page 2 of the document that is asked of, not of the other one.
    assert example.evidence == (Evidence(4),) and example.question == "How many?"
    assert (example.group, example.id, example.answer) == ("report", "mmlongdoc_K8-7", "42")
    content = example.messages[0]["content"]
    assert [part["type"] for part in content] == ["text", "image"] * 6 + ["text", "text"]
    assert content[8]["text"] == "A page of document report:"


def test_mmlongbench_images_as_needles(tmp_path: Path) -> None:
    row = {
        "id": "retrieval-9",
        "question": "Which of these is in the text?",
        "answer": 1,
        "ctxs": [{"type": "text", "text": "A <image> b"}, {"type": "text", "text": "c <image>"}],
        "positive_ctxs": [{"type": "image", "image": "abnormal/2.jpg"}],
        "image_list": ["mm-niah/1.jpg", "mm-niah/abnormal/2.jpg"],
        "choices_image": ["mm-niah/3.jpg", "mm-niah/4.jpg"],
    }
    write_json(tmp_path / "mmlb_data" / "NIAH" / "retrieval-image_test_K8_dep6.jsonl", [row], lines=True)
    for number, name in enumerate([*row["image_list"], *row["choices_image"]]):  # type: ignore[misc]
        write_image(tmp_path / "mmlb_image" / name, 20 + number, 30)
    (example,) = load_data("mmlongbench", "retrieval_image_K8", data_dir=tmp_path)
    assert example.images.sizes == ((20, 30), (21, 30), (22, 30), (23, 30))
    assert example.evidence == (Evidence(1),) and (example.answer, example.candidates) == ("B", ("A", "B"))
    texts = [part.get("text", "<image>") for part in example.messages[0]["content"]]
    assert texts[:4] == ["A", "<image>", "b\n\nc", "<image>"]
    assert texts[4:] == [
        row["question"],
        "Answer with the letter of one of these:",
        "A.",
        "<image>",
        "B.",
        "<image>",
    ]
    assert example.question == row["question"] and json.loads(json.dumps(example.metadata)) == {}
