"""MMDocIR, from files such as it is published in to Recall@k: made-up rows of its columns, counted by its rules."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image, ImageDraw
from tiny.wrapped import hooked

from mmlens.data.examples import Example
from mmlens.data.pages import domain_of, layouts_of, page_texts_of
from mmlens.data.published.loading import load_data
from mmlens.errors import MmlensError
from mmlens.scores.pages import page_scores
from mmlens.scores.ranking import bm25_scores, layout_recall, macro_mean, page_recall, ranked

POINTS = [612.0, 792.0]


def jpeg(width: int, height: int, shade: int) -> bytes:
    image, encoded = Image.new("RGB", (width, height), (shade, 255 - shade, 128)), io.BytesIO()
    ImageDraw.Draw(image).rectangle((0, shade, width // 2, shade + 30), "black")
    image.save(encoded, "JPEG")
    return encoded.getvalue()


def question(text: str, pages: list[int], *boxes: list[float]) -> dict[str, Any]:
    mapping = [
        {"page": page, "page_size": POINTS, "bbox": box} for page, box in zip(pages, boxes, strict=True)
    ]
    return {"Q": text, "A": "x", "type": "['Table']", "page_id": pages, "layout_mapping": mapping}


ANNOTATIONS = [
    {
        "doc_name": "one.pdf",
        "domain": "Laws",
        "page_indices": [0, 2],
        "layout_indices": [0, 3],
        "questions": [
            question("What does the table of taxes say?", [1], [100, 100, 300, 200.5]),
            question("Who signed?", [0, 2], [10, 10, 110, 60], [50, 700, 612, 792]),
        ],
    },
    {
        "doc_name": "two.pdf",
        "domain": "News",
        "page_indices": [3, 4],
        "layout_indices": [4, 5],
        "questions": [question("Which weather is forecast?", [1], [0, 0, 306, 396])],
    },
]
PAGES = [
    ("one", "0", "The law of 1999", "Signed by nobody"),
    ("one", "1", "taxes taxes", "A table of taxes"),
    ("one", "2", "Signatures who signed", ""),
    ("two", "0", "Sport", "Sport and games"),
    ("two", "1", "", "The weather forecast is rain"),
]
LAYOUTS = [
    ("one", "text", 0, 0, [0.0, 0.0, 200.0, 100.0]),
    ("one", "table", 1, 1, [100.0, 150.0, 300.0, 250.0]),
    ("one", "text", 2, 2, [0.0, 600.0, 620.0, 800.0]),
    ("one", "image", 3, 2, [40.0, 40.0, 40.0, 90.0]),  # no area
    ("two", "image", 0, 0, [0.0, 0.0, 612.0, 792.0]),
    ("two", "equation", 1, 1, [200.0, 200.0, 400.0, 500.0]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three files, with the columns and types of the data set's README."""
    path = tmp_path_factory.mktemp("mmdocir")
    lines = "\n".join(json.dumps(row) for row in ANNOTATIONS)
    (path / "MMDocIR_annotations.jsonl").write_text(lines, encoding="utf-8")
    domains = {row["doc_name"].removesuffix(".pdf"): row["domain"] for row in ANNOTATIONS}
    pages = [
        {
            "doc_name": name,
            "domain": domains[name],
            "passage_id": page,
            "image_path": f"page_images/{name}_{page}.jpg",
            "image_binary": jpeg(306, 396, 40 * at),
            "ocr_text": ocr,
            "vlm_text": vlm,
        }
        for at, (name, page, ocr, vlm) in enumerate(PAGES)
    ]
    pd.DataFrame(pages).to_parquet(path / "MMDocIR_pages.parquet")
    layouts = [
        {
            "doc_name": name,
            "domain": domains[name],
            "type": kind,
            "layout_id": number,
            "page_id": page,
            "image_path": f"layout_images/{name}_{number}.jpg",
            "image_binary": jpeg(30, 30, 1),
            "text": "a paragraph" if kind in ("text", "equation") else None,
            "ocr_text": None if kind in ("text", "equation") else "read",
            "vlm_text": None if kind in ("text", "equation") else "seen",
            "bbox": box,
            "page_size": POINTS,
        }
        for name, kind, number, page, box in LAYOUTS
    ]
    pd.DataFrame(layouts).to_parquet(path / "MMDocIR_layouts.parquet")
    return path


@pytest.fixture(scope="module")
def examples(folder: Path) -> list[Example]:
    return list(load_data("mmdocir", data_dir=folder, texts=True, layouts=True))


def test_pages_texts_and_layouts_are_those_of_the_files(examples: list[Example]) -> None:
    assert [domain_of(example) for example in examples] == ["Laws", "Laws", "News"]
    assert page_texts_of(examples[0]) == ["Signed by nobody", "A table of taxes", "Signatures who signed"]
    assert page_texts_of(examples[2]) == ["Sport and games", "The weather forecast is rain"]
    # Pictures of half a pixel a point; what leaves the page is cut off, what has no area left out.
    assert [(layout.page, layout.box, layout.text) for layout in layouts_of(examples[1])] == [
        (0, (0, 0, 100, 50), "a paragraph"),
        (1, (50, 75, 150, 125), "seen"),
        (2, (0, 300, 306, 396), "a paragraph"),
    ]
    assert [layout.page for layout in layouts_of(examples[2])] == [0, 1]


def points_recall(row: dict[str, Any], asked: dict[str, Any], scores: list[float], k: int) -> float:
    """MMDocIR's recall of layouts, from the published boxes in points."""
    first, last = row["layout_indices"]
    candidates = [box for box in LAYOUTS[first : last + 1] if box[4][2] > box[4][0]]
    order = sorted(range(len(candidates)), key=lambda at: -scores[at])
    covered = total = 0.0
    for number in order[:k]:
        _, _, _, page, (left, top, right, bottom) = candidates[number]
        for gold in asked["layout_mapping"]:
            one, two, three, four = gold["bbox"]
            width, height = min(right, three) - max(left, one), min(bottom, four) - max(top, two)
            if gold["page"] == page and width > 0 and height > 0:
                covered += width * height
    for gold in asked["layout_mapping"]:
        one, two, three, four = gold["bbox"]
        total += (three - one) * (four - two)
    return covered / total


def test_recall_is_counted_as_its_authors_count(examples: list[Example]) -> None:
    found = page_scores(hooked("qwen2_vl"), examples, [(0, 1), (1, 0)], pages_per_prompt=2, progress=False)
    asked = [(row, question) for row in ANNOTATIONS for question in row["questions"]]
    for k in (1, 2, 3):
        pages, layouts = page_recall(examples, found.pages, k), layout_recall(examples, found.layouts, k)
        for at, (row, one) in enumerate(asked):
            scores = found.pages[at].tolist()
            first = sorted(range(len(scores)), key=lambda page: -scores[page])[:k]
            assert pages[at] == len(set(first) & set(one["page_id"])) / len(one["page_id"])
            assert layouts[at] == pytest.approx(points_recall(row, one, found.layouts[at].tolist(), k))
        domains = [domain_of(example) for example in examples]
        assert macro_mean(pages, domains) == pytest.approx(((pages[0] + pages[1]) / 2 + pages[2]) / 2)
    assert layout_recall(examples, found.layouts, 3)[0] == pytest.approx(200 * 50.5 / (200 * 100.5))


def test_bm25_reads_the_published_texts(examples: list[Example]) -> None:
    texts = [page_texts_of(example) or [] for example in examples]
    first = [ranked(bm25_scores(e.question, own))[0] for e, own in zip(examples, texts, strict=True)]
    assert first == [1, 2, 1]


def test_few_pages_keep_their_own_layouts_and_texts(folder: Path) -> None:
    few = list(load_data("mmdocir", data_dir=folder, max_pages=2, texts=True, layouts=True))
    assert [len(example.images) for example in few] == [2, 2, 2]
    # The second question's evidence is on pages 0 and 2.
    assert page_texts_of(few[1]) == ["Signed by nobody", "Signatures who signed"]
    assert [layout.page for layout in layouts_of(few[1])] == [0, 1]


def test_what_is_not_asked_for_is_not_read(folder: Path, tmp_path: Path) -> None:
    for name in ("MMDocIR_annotations.jsonl", "MMDocIR_pages.parquet"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    plain = list(load_data("mmdocir", data_dir=tmp_path))
    assert page_texts_of(plain[0]) is None and not layouts_of(plain[0])
    with pytest.raises(MmlensError, match=r"MMDocIR_layouts\.parquet"):
        list(load_data("mmdocir", data_dir=tmp_path, layouts=True))
    with pytest.raises(MmlensError, match="layout"):
        load_data("mmdocir", data_dir=tmp_path, layout=True)
