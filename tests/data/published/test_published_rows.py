"""Readers over the rows that authors published, where these are at hand: counts, boxes, the traps that are known."""

from __future__ import annotations

import functools
import io
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from clips import made_clip, written_clip
from PIL import Image

from mmlens.data.examples import DataError, Example
from mmlens.data.images import LateImage
from mmlens.data.published.catalog import CATALOG
from mmlens.data.splits import shared_groups
from mmlens.data.tables import Rows

FOLDER = Path(__file__).parents[4] / "shared" / "artefacts" / "data"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the published rows are not at hand")


class Blank:
    """Files of which there are none: every image is blank, every document has pages enough."""

    def __init__(self, split: str, size: tuple[int, int] = (640, 480), n_pages: int = 140) -> None:
        self.split, self.size, self.n_pages = split, size, n_pages

    def path(self, name: str) -> Path:
        return Path(name)

    def first(self, *names: str) -> Path:
        return Path(names[0])

    def find(self, name: str) -> Path | None:
        return None

    def table(self, pattern: str) -> Rows:
        raise AssertionError(pattern)

    def row_numbers(self, pattern: str, column: str) -> dict[Any, int]:
        raise AssertionError(pattern)

    def image(self) -> LateImage:
        return LateImage(lambda: Image.new("RGB", self.size))

    def pages(self, name: str) -> list[LateImage]:
        return [self.image()] * self.n_pages


@functools.cache
def blank(width: int, height: int) -> bytes:
    encoded = io.BytesIO()
    Image.new("1", (width, height)).save(encoded, "PNG")
    return encoded.getvalue()


@functools.cache
def rows_in(name: str) -> list[dict[str, Any]]:
    text = (FOLDER / name).read_text(encoding="utf-8")
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]


def read(name: str, rows: Iterable[dict[str, Any]], files: Any, **options: Any) -> list[Example]:
    return [example for row in rows for example in CATALOG[name].read(row, files, **options)]


def all_differ(examples: list[Example]) -> bool:
    return len({example.id for example in examples}) == len(examples)


# ------------------------------------------------------------------------------ documents


class TwiceAsLarge(Blank):
    """Pages of MMDocIR in two pixels a point, in the rows that its documents name."""

    def __init__(self, rows: list[dict[str, Any]], pages: dict[tuple[str, int], tuple[float, float]]) -> None:
        super().__init__("test")
        self.of_row = {
            row["page_indices"][0] + page: (row["doc_name"].removesuffix(".pdf"), page)
            for row in rows
            for page in range(row["page_indices"][1] - row["page_indices"][0] + 1)
        }
        self.sizes = pages

    def table(self, pattern: str) -> Rows:
        def at(number: int) -> dict[str, Any]:
            document, page = self.of_row[number]
            width, height = self.sizes.get((document, page), (300, 400))
            return {"doc_name": document, "image_binary": blank(round(2 * width), round(2 * height))}

        return Rows(pattern, n=20_395, at=at)


@functools.cache
def of_mmlongbench_doc() -> list[Example]:
    return read("mmlongbench-doc", rows_in("MMLongBench-Doc/samples_first400.json"), Blank("train"))


@functools.cache
def of_mmdocir() -> list[Example]:
    """With the pages that have evidence alone."""
    rows = rows_in("MMDocIR/annotations_first.jsonl")
    return read("mmdocir", rows, TwiceAsLarge(rows, {}), max_pages=1)


def test_mmdocir_boxes_are_points_of_the_page() -> None:
    rows = rows_in("MMDocIR/annotations_first.jsonl")
    layouts = [
        (row["doc_name"].removesuffix(".pdf"), number, layout)
        for row in rows
        for number, question in enumerate(row["questions"])
        for layout in question["layout_mapping"]
    ]
    sizes = {(document, layout["page"]): tuple(layout["page_size"]) for document, _, layout in layouts}
    examples = read("mmdocir", rows, TwiceAsLarge(rows, sizes))
    assert (
        len(rows) == 78
        and len(examples) == sum(len(row["questions"]) for row in rows)
        and all_differ(examples)
    )
    assert {example.group for example in examples} == {row["doc_name"].removesuffix(".pdf") for row in rows}
    found = {(example.group, example.id.rsplit("-", 1)[1]): example for example in examples}
    n_cut = 0
    for document, number, layout in layouts:
        example = found[document, str(number)]
        assert len(example.images) == example.metadata["n_pages"]
        boxes = [region.box for region in example.evidence if region.image == layout["page"]]
        width, height = example.images.given[layout["page"]].size
        across, down = width / layout["page_size"][0], height / layout["page_size"][1]
        left, top, right, bottom = layout["bbox"]
        if left == right or top == bottom:
            continue
        expected = [left * across, top * down, min(right * across, width), min(bottom * down, height)]
        n_cut += right > layout["page_size"][0] or bottom > layout["page_size"][1]
        assert any(box == pytest.approx(expected) for box in boxes), (document, number, layout)
        assert across == pytest.approx(2, rel=0.01)
    assert n_cut <= 5
    for row in rows:
        for number, question in enumerate(row["questions"]):
            example = found[row["doc_name"].removesuffix(".pdf"), str(number)]
            assert {region.image for region in example.evidence} >= set(question["page_id"])


def test_few_pages_of_mmdocir_hold_the_evidence() -> None:
    rows = rows_in("MMDocIR/annotations_first.jsonl")
    files = TwiceAsLarge(rows, {})
    for example, whole in zip(
        read("mmdocir", rows, files, max_pages=4), read("mmdocir", rows, files), strict=True
    ):
        pages = example.metadata["pages"]
        evidence = {pages[region.of_image] for region in example.evidence}
        assert evidence == {region.of_image for region in whole.evidence}
        assert len(example.images) == len(pages) == min(max(4, len(evidence)), whole.metadata["n_pages"])


def test_mmlongbench_doc_counts_pages_from_one() -> None:
    rows = rows_in("MMLongBench-Doc/samples_first400.json")
    examples = of_mmlongbench_doc()
    assert len(rows) == len(examples) == 400 and all_differ(examples)
    n_of_page_0 = 0
    for row, example in zip(rows, examples, strict=True):
        assert isinstance(row["evidence_pages"], str)
        pages = json.loads(row["evidence_pages"])
        n_of_page_0 += 0 in pages
        assert [region.image for region in example.evidence] == list(
            dict.fromkeys(max(page - 1, 0) for page in pages)
        )
        assert example.metadata["pages"] == list(range(140))
    assert n_of_page_0 == 2
    without = [example for example in examples if not example.evidence]
    assert Counter(example.kind for example in without) == {
        "mmlongbench-doc, no evidence": sum(row["evidence_pages"] == "[]" for row in rows)
    }
    # Nearly all: a few have an answer all the same, such as the number of what there is none of.
    answers = Counter(example.answer for example in without)
    assert answers["Not answerable"] > 0.95 * len(without)


def test_the_two_sets_of_documents_count_pages_alike() -> None:
    """Of the questions that are in both, nine of ten have the same pages; counted otherwise, hardly one would."""
    first = {
        (each.group, each.question): {each.metadata["pages"][region.image] for region in each.evidence}
        for each in of_mmdocir()
    }
    both = [
        (first[example.group, example.question], {region.image for region in example.evidence})
        for example in of_mmlongbench_doc()
        if (example.group, example.question) in first
    ]
    assert len(both) > 150
    assert sum(mine == theirs for mine, theirs in both) > 0.85 * len(both)


def test_the_two_sets_of_documents_share_groups() -> None:
    shared = shared_groups(of_mmdocir(), of_mmlongbench_doc())
    assert len(shared) > 20 and "Independents-Report" in shared
    assert (
        "mmdocir" in CATALOG["mmlongbench-doc"].overlaps and "mmlongbench-doc" in CATALOG["mmdocir"].overlaps
    )


# ------------------------------------------------------------------------------ pictures


class Pictures(Blank):
    """NLVR's pictures, where they lie."""

    def first(self, *names: str) -> Path:
        found = [FOLDER / "NLVR" / name for name in names]
        return next(path for path in found if path.is_file())


def test_nlvr_boxes_lie_on_shapes_of_their_colour() -> None:
    colours = {"Yellow": (255, 255, 0), "Black": (0, 0, 0), "#0099ff": (0, 153, 255)}
    rows = rows_in("NLVR/dev_first24.jsonl")
    examples = read("nlvr", rows, Pictures("dev"))
    assert len(examples) == 24 and all_differ(examples)
    n_shapes = 0
    for row, example in zip(rows, examples, strict=True):
        image = example.images[0]
        shapes = [shape for box in row["structured_rep"] for shape in box]
        assert len(example.evidence) == len(shapes)
        for shape, region in zip(shapes, example.evidence, strict=True):
            left, top, right, bottom = region.box
            assert right - left == bottom - top == shape["size"]
            seen = image.getpixel((int((left + right) / 2), int((top + bottom) / 2)))
            assert max(abs(a - b) for a, b in zip(seen, colours[shape["color"]], strict=True)) < 60
            n_shapes += 1
        assert example.answer == {"true": "yes", "false": "no"}[row["label"]]
    assert n_shapes == 220


def test_nlvr2_has_two_images_a_question() -> None:
    rows = rows_in("NLVR2/dev_first300.jsonl")
    examples = read("nlvr2", rows, Blank("dev"))
    assert len(examples) == 300 and all_differ(examples)
    assert all(len(example.images) == 2 and not example.evidence for example in examples)
    assert Counter(example.answer for example in examples) == Counter(
        {"True": "yes", "False": "no"}[row["label"]] for row in rows
    )
    first = examples[0]
    assert first.images.given[1].name == "dev-850-0-img1.png" and first.group == "dev-850"


def test_pope_asks_six_questions_of_each_image() -> None:
    rows = rows_in("POPE/coco_pope_random_first1500.jsonl")
    examples = read("pope", rows, Blank("random"))
    assert len(examples) == 1500 and all_differ(examples)
    assert Counter(example.answer for example in examples) == {"yes": 750, "no": 750}
    assert set(Counter(example.group for example in examples).values()) == {6}
    assert examples[0].group == "COCO 310196" and examples[0].question == "Is there a snowboard in the image?"


def test_visual_genome_regions(tmp_path: Path) -> None:
    row = rows_in("VisualGenome/two_regions.json")

    class Here(Blank):
        def first(self, *names: str) -> Path:
            assert names == ("VG_100K/1.jpg", "VG_100K_2/1.jpg")
            Image.new("RGB", (800, 600)).save(tmp_path / "1.jpg")
            return tmp_path / "1.jpg"

    examples = read("visual-genome", [{"id": 1, **row[0]}], Here("train"))
    assert [example.evidence[0].box for example in examples] == [(421, 57, 503, 196), (194, 372, 376, 481)]
    assert [example.answer for example in examples] == ["right", "left"]
    assert examples[0].question.endswith('"the clock is green in colour"?')


# ------------------------------------------------------------------------------ videos


def test_vidstg_spans_lie_in_their_segments() -> None:
    rows = rows_in("VidSTG/val_first150.json")

    class Videos(Blank):
        def find(self, name: str) -> Path | None:
            return Path(name) if name.endswith(".mp4") else None

    examples = read("vidstg", rows, Videos("val"))
    assert len(examples) == sum(len(row["questions"]) for row in rows) and all_differ(examples)
    assert sum(not row["questions"] for row in rows) == 6
    asked = [row for row in rows for _ in row["questions"]]
    for row, example in zip(asked, examples, strict=True):
        frames, span = example.metadata["frames"], tuple(row["temporal_gt"].values())
        assert example.group == f"VidOR {row['vid']}"
        assert row["used_segment"]["begin_fid"] <= frames[0] < frames[-1] <= row["used_segment"]["end_fid"]
        assert frames[-1] < row["frame_count"] and len(frames) == len(example.images) <= 16
        shown = {frames[region.of_image] for region in example.evidence}
        assert shown == {frame for frame in frames if span[0] <= frame < span[1]} and shown
        categories = {each["tid"]: each["category"] for each in row["subject/objects"]}
        assert example.answer == categories[example.metadata["target"]].split("/")[0].replace("_", " ")


@pytest.mark.parametrize(("task", "n"), [("2_needle", 355), ("4_count", 206)])
def test_mlvu_answers_are_options(tmp_path: Path, task: str, n: int) -> None:
    rows = rows_in(f"MLVU/{task}.json")
    path = written_clip(tmp_path / "clip.mp4", made_clip(3, (32, 32)), fps=1)

    class Videos(Blank):
        def find(self, name: str) -> Path | None:
            return path

    # The answer of two is none of their options.
    odd = [row for row in rows if row["answer"] not in row["candidates"]]
    assert len(rows) == n and len(odd) == {"2_needle": 2, "4_count": 0}[task]
    for row in odd:
        with pytest.raises(DataError, match="is none of the candidates"):
            read("mlvu", [row], Videos("needle"))
    rows = [row for row in rows if row not in odd]
    examples = read("mlvu", rows, Videos("needle"))
    assert all_differ(examples)
    for row, example in zip(rows, examples, strict=True):
        assert row["candidates"]["ABCDEFGH".index(example.answer)] == row["answer"]
        assert not example.evidence and len(example.candidates) == len(row["candidates"])


# ------------------------------------------------------------------------------ rows of which a few are at hand


def test_chartqa_and_docvqa_of_their_authors() -> None:
    rows = rows_in("ChartQA/test_human_8rows.json")
    examples = read("chartqa", rows, Blank("test"))
    assert [example.answer for example in examples] == [row["label"] for row in rows] and all_differ(examples)
    assert {example.group for example in examples} == {row["imgname"] for row in rows}
    told = json.loads((FOLDER / "DocVQA" / "two_rows.json").read_text(encoding="utf-8"))["data"]
    first, second = read("docvqa", told, Blank("validation"))
    assert (first.id, first.answer, first.group) == ("49153", "0.28", "pybv0228")
    assert second.metadata == {"question_types": ["handwritten", "form"]}
