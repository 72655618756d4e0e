"""Data sets of documents: how a row of each becomes examples of many pages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmlens.data.examples import DataError, Evidence, Example
from mmlens.data.images import LateImage
from mmlens.data.published.parts import (
    NOT_ANSWERABLE,
    clipped,
    document_name,
    example,
    letters,
    picture,
    questions,
    scaled,
    shown_pages,
    texts_in,
)
from mmlens.data.published.record import EvidenceData, Files
from mmlens.data.tables import key_of_image

Row = Mapping[str, Any]

_MAX_PAGES = (
    " max_pages= shows fewer pages: those with evidence and their neighbours, never fewer than the former. All are "
    "shown otherwise, each opened when it is used."
)


# ------------------------------------------------------------------------------ MMDocIR


def read_mmdocir(
    row: Row, files: Files, max_pages: int | None = None, texts: bool = False, layouts: bool = False
) -> Iterator[Example]:
    """An example of each question on a document, with its layouts as boxes on its pages.

    What pages and layouts are ranked by is read where it is asked for: the `texts` of the pages, and all `layouts` of
    the document (mmlens.data.pages).
    """
    document = document_name(row["doc_name"])
    first, last = row["page_indices"]
    page_texts = _mmdocir_texts(files, document, first, last) if texts else None
    candidates = _mmdocir_layouts(files, document, *row["layout_indices"]) if layouts else None
    for number, question in questions(row, "questions"):
        answering = question["layout_mapping"]
        with_evidence = [*question["page_id"], *(layout["page"] for layout in answering)]
        if not all(0 <= page <= last - first for page in with_evidence):
            raise DataError(
                f"question {number} of {row['doc_name']} names the pages {sorted(set(with_evidence))}, counted from 0; "
                f"the document has {last - first + 1}"
            )
        shown = shown_pages(last - first + 1, with_evidence, max_pages)
        images = [_mmdocir_page(files, document, first + page, page) for page in shown]
        yield example(
            "mmdocir",
            f"{document}-{number}",
            question=question["Q"].strip(),
            answer=str(question["A"]).strip(),
            images=tuple(images),
            evidence=_mmdocir_evidence(question["page_id"], answering, shown, images),
            group=document,
            metadata={
                "pages": shown,
                "n_pages": last - first + 1,
                "domain": row["domain"],
                "type": texts_in(question["type"]),
                **({} if page_texts is None else {"page_texts": [page_texts[page] for page in shown]}),
                **({} if candidates is None else {"layouts": _on_pages(candidates, shown)}),
            },
        )


_PAGES, _LAYOUTS = "MMDocIR_pages.parquet", "MMDocIR_layouts.parquet"


def _mmdocir_row(files: Files, file: str, document: str, row: int, name: str) -> Row:
    """A row of one of the tables, found to be of this document."""
    table = files.table(file)
    assert table.at is not None
    if not 0 <= row < (table.n or 0):
        raise DataError(f"{name}: {file} has {table.n} rows, no {row}")
    found = table.at(row)
    if document_name(found["doc_name"]) != document:
        raise DataError(
            f"{name}: row {row} of {file} is of {found['doc_name']!r}; the files are of two revisions"
        )
    return found


def _mmdocir_page(files: Files, document: str, row: int, page: int) -> LateImage:
    name = f"page {page} of {document}"
    return LateImage(lambda: _mmdocir_row(files, _PAGES, document, row, name)["image_binary"], name)


def _mmdocir_texts(files: Files, document: str, first: int, last: int) -> list[str]:
    """What a vision-language model read on each page, or, where that is empty, what OCR did."""
    rows = (
        _mmdocir_row(files, _PAGES, document, row, f"page {row - first} of {document}")
        for row in range(first, last + 1)
    )
    return [row["vlm_text"] or row["ocr_text"] or "" for row in rows]


def _mmdocir_layouts(files: Files, document: str, first: int, last: int) -> list[dict[str, Any]]:
    """All layouts of a document that have an area, in points of their pages, with their texts."""
    found = []
    for number in range(first, last + 1):
        row = _mmdocir_row(files, _LAYOUTS, document, number, f"layout {number - first} of {document}")
        size = [float(side) for side in row["page_size"]]
        box = clipped([float(edge) for edge in row["bbox"]], size)
        if box is not None:
            said = row["text"] or row["vlm_text"] or row["ocr_text"] or ""
            found.append({"page": int(row["page_id"]), "box": list(box), "page_size": size, "text": said})
    return found


def _on_pages(layouts: Sequence[Mapping[str, Any]], shown: Sequence[int]) -> list[dict[str, Any]]:
    """The layouts of the pages that are shown, by the numbers that these have among the images."""
    return [{**layout, "page": shown.index(layout["page"])} for layout in layouts if layout["page"] in shown]


def _mmdocir_evidence(
    pages: Sequence[int], layouts: Sequence[Mapping[str, Any]], shown: list[int], images: list[LateImage]
) -> tuple[Evidence, ...]:
    """Layouts, in points of their page, in pixels of its picture; whole, where a page has none with an area."""
    found: list[Evidence] = []
    for layout in layouts:
        at = shown.index(layout["page"])
        inside = clipped(layout["bbox"], layout["page_size"])
        if inside is not None:
            found.append(
                Evidence(at, clipped(scaled(inside, layout["page_size"], images[at].size), images[at].size))
            )
    boxed = {region.image for region in found}
    whole = {shown.index(page) for page in (*pages, *(layout["page"] for layout in layouts))} - boxed
    return tuple(dict.fromkeys([*found, *map(Evidence, sorted(whole))]))


MMDOCIR = EvidenceData(
    name="mmdocir",
    title="MMDocIR, evaluation set",
    hub="MMDocIR/MMDocIR_Evaluation_Dataset",
    splits=("test",),
    files={"test": "MMDocIR_annotations.jsonl"},
    columns={
        "doc_name": "string",
        "domain": "string",
        "page_indices": "list of two int",
        "questions": "list of {Q, A, type, page_id: list of int, layout_mapping: list of {page, page_size, bbox}}",
    },
    read=read_mmdocir,
    evidence="boxes of layouts (xyxy in points of the page)",
    group="document",
    licence="Apache-2.0 by its card, CC BY-NC 4.0 by its authors' README",
    size="1,658 questions on 313 documents of 20,395 pages",
    cite="dong2025mmdocir",
    source="MMDocRAG/MMDocIR @ 394d84d, dataset/README.md and all rows of dataset/MMDocIR_annotations.jsonl",
    checked="published rows",
    overlaps=("mmlongbench-doc", "mmlongbench"),
    fetch="hf download --repo-type dataset MMDocIR/MMDocIR_Evaluation_Dataset MMDocIR_annotations.jsonl "
    "MMDocIR_pages.parquet --local-dir FOLDER",
    notes="A row is a document. Pages count from 0, rows page_indices[0] to page_indices[1] of "
    "MMDocIR_pages.parquet, the last among them. A page without a layout counts whole. Of the 2,638 boxes, "
    "five leave their page, and are cut at its edge (one by 204 points, the others by less than one); one has "
    "no width, and its page counts whole. 134 of the 135 documents of MMLongBench-Doc are in it. texts=True "
    "gives what was read on each page, layouts=True all layouts of a document but those without an area (from "
    "MMDocIR_layouts.parquet), by which pages and layouts are ranked (mmlens.data.pages)." + _MAX_PAGES,
)


# ------------------------------------------------------------------------------ MMLongBench-Doc


def read_mmlongbench_doc(row: Row, files: Files, max_pages: int | None = None) -> Iterator[Example]:
    """The example of a question on a document; its evidence are whole pages."""
    document = document_name(row["doc_id"])
    pages = files.pages(f"documents/{row['doc_id']}")
    counted_from_one = texts_in(row["evidence_pages"])
    wrong = [page for page in counted_from_one if not 0 <= page <= len(pages)]
    if wrong:
        raise DataError(
            f"evidence_pages names {wrong}, counted from 1; {row['doc_id']} has {len(pages)} pages"
        )
    # A few rows name page 0, which is the first: MMDocIR, which has one of them too, says so.
    with_evidence = [max(page, 1) - 1 for page in counted_from_one]
    shown = shown_pages(len(pages), with_evidence, max_pages)
    yield example(
        "mmlongbench-doc" if with_evidence else "mmlongbench-doc, no evidence",
        f"{document}-{_digest(row['question'])}",
        question=row["question"].strip(),
        answer=str(row["answer"]).strip(),
        images=tuple(pages[page] for page in shown),
        evidence=tuple(Evidence(shown.index(page)) for page in dict.fromkeys(with_evidence)),
        group=document,
        metadata={
            "pages": shown,
            "n_pages": len(pages),
            "doc_type": row["doc_type"],
            "evidence_sources": texts_in(row["evidence_sources"]),
            "answer_format": row["answer_format"],
        },
    )


def _digest(text: str) -> str:
    """Of rows without an id, what tells one from another."""
    return key_of_image(text.encode()).hex()[:12]


MMLONGBENCH_DOC = EvidenceData(
    name="mmlongbench-doc",
    title="MMLongBench-Doc",
    hub="yubo2333/MMLongBench-Doc",
    splits=("train",),
    columns={
        "doc_id": "string",
        "doc_type": "string",
        "question": "string",
        "answer": "string",
        "evidence_pages": "string that holds a list of int",
        "evidence_sources": "string that holds a list of string",
        "answer_format": "string",
    },
    read=read_mmlongbench_doc,
    one_each=True,
    evidence="numbers of pages, from 1, in a text",
    group="document",
    licence="CC BY-NC 4.0",
    size="1,091 questions on 135 PDF documents of 47.5 pages on average",
    cite="ma2024mmlongbench",
    source="mayubo2333/MMLongBench-Doc @ d73f0dc, 400 rows of data/samples.json; lmms-eval @ 75571cf, "
    "tasks/mmlongbench_doc",
    checked="published rows",
    overlaps=("mmdocir", "mmlongbench"),
    own_files={"train": "data/samples.json"},
    notes='Two of 400 rows name page 0, which is read as the first page. "[]" stands for questions that '
    'cannot be answered ("Not answerable", but for a few that have an answer); they make a kind of their own, '
    "without evidence. Pages are drawn from the PDF files of the folder documents, 144 pixels an inch (the "
    "extra pdf)." + _MAX_PAGES,
)


# ------------------------------------------------------------------------------ SlideVQA, DocVQA


def read_slidevqa(row: Row, files: Files, max_pages: int | None = None) -> Iterator[Example]:
    """The example of a question on a deck of slides; its evidence are whole slides."""
    columns = [f"page_{number}" for number in range(1, 21) if row.get(f"page_{number}") is not None]
    counted_from_one = [int(page) for page in texts_in(row["evidence_pages"])]
    wrong = [page for page in counted_from_one if f"page_{page}" not in columns]
    if wrong:
        raise DataError(f"evidence_pages names {wrong}, counted from 1; the deck has {len(columns)} slides")
    with_evidence = [columns.index(f"page_{page}") for page in dict.fromkeys(counted_from_one)]
    shown = shown_pages(len(columns), with_evidence, max_pages)
    deck = str(row["deck_name"])
    yield example(
        "slidevqa",
        row["qa_id"],
        question=row["question"].strip(),
        answer=NOT_ANSWERABLE if row["answer"] is None else str(row["answer"]).strip(),
        images=tuple(picture(row[columns[page]], f"{columns[page]} of {deck}", files) for page in shown),
        evidence=tuple(Evidence(shown.index(page)) for page in with_evidence),
        group=deck,
        metadata={"pages": shown, "n_pages": len(columns)},
    )


SLIDEVQA = EvidenceData(
    name="slidevqa",
    title="SlideVQA",
    hub="NTT-hil-insight/SlideVQA",
    splits=("val", "test", "train"),
    revision="e780ea258d734958befbfaed19fa059584642ca8",
    columns={
        "deck_name": "string",
        "qa_id": "int64",
        "question": "string",
        "answer": "string",
        "evidence_pages": "list of int64",
        "page_1": "image, and so to page_20",
    },
    read=read_slidevqa,
    one_each=True,
    evidence="numbers of slides, from 1 to 20",
    group="deck of slides",
    licence="NTT's, for evaluation alone",
    size="1,652 (val), 2,215 (test), 10,617 (train) questions on 2,619 decks; 10.9 GB",
    cite="tanaka2023slidevqa",
    source="nttmdlab-nlp/SlideVQA @ e1f0bd9, README; of the hub's copy lmms-eval @ 75571cf, tasks/slidevqa",
    checked="card",
    overlaps=("mmlongbench",),
    notes="Gated. The boxes that the authors publish beside it are of everything on a slide, not of answers: "
    "whole slides are the evidence." + _MAX_PAGES,
)


def read_docvqa(row: Row, files: Files) -> Iterator[Example]:
    """The example of a question on one page."""
    answers = list(dict.fromkeys(answer for answer in row["answers"] or () if answer.strip()))
    if not answers:
        raise DataError("there is no answer: the list is empty. Splits for a leaderboard hold none")
    yield example(
        "docvqa",
        row["questionId"],
        question=row["question"].strip(),
        answer=answers[0],
        answers=answers,
        images=(
            picture(row["image"], f"page {row['ucsf_document_page_no']} of {row['ucsf_document_id']}", files),
        ),
        group=str(row["ucsf_document_id"]),
        metadata={"question_types": list(row.get("question_types") or ())},
    )


DOCVQA = EvidenceData(
    name="docvqa",
    title="DocVQA",
    hub="lmms-lab/DocVQA",
    config="DocVQA",
    splits=("validation", "train"),
    revision="59fed3cdc38662abeef8f363171b2ec7c95c165c",
    columns={
        "questionId": "string",
        "question": "string",
        "image": "image",
        "ucsf_document_id": "string",
        "ucsf_document_page_no": "string",
        "answers": "list of string",
    },
    read=read_docvqa,
    one_each=True,
    evidence="none",
    group="document",
    licence="Apache-2.0 by the card of the hub's copy",
    size="5,349 (validation), 39,463 (train) questions; 2.5 and 5.7 GB",
    cite="mathew2021docvqa",
    source="the data set's card (columns, types, splits); two rows of the authors' files",
    checked="published rows",
    notes="The first answer is the answer; all stand in metadata['answers']. The split test holds no answers.",
)


# ------------------------------------------------------------------------------ MMLongBench


def read_mmlongbench(row: Row, files: Files) -> Iterator[Example]:
    """The example of a question on documents, or on a text with pictures (the needle), by what the row holds."""
    yield (_mmlongbench_pages if "page_list" in row else _mmlongbench_needle)(row, files)


_MMLONGBENCH_IMAGES = "mmlb_image/"


def _mmlongbench_pages(row: Row, files: Files) -> Example:
    names = list(row["page_list"])
    document = str(row["doc_name"])
    with_evidence = _mmlongbench_answer_pages(row, names, document)
    parts: list[dict[str, Any]] = []
    for name in names:
        parts.append({"type": "text", "text": f"A page of document {_folder_of(name)}:"})
        parts.append({"type": "image", "image": picture(_MMLONGBENCH_IMAGES + name, name, files)})
    parts.append({"type": "text", "text": f"A question on document {document}:"})
    parts.append({"type": "text", "text": row["question"].strip(), "question": True})
    given = row["answer"]
    answers = (
        [str(each).strip() for each in given] if isinstance(given, (list, tuple)) else [str(given).strip()]
    )
    return example(
        "mmlongbench" if with_evidence else "mmlongbench, no evidence",
        f"{files.split}-{row['id']}",
        answer=answers[0],
        answers=answers,
        messages=[{"role": "user", "content": parts}],
        evidence=tuple(map(Evidence, with_evidence)),
        group=document_name(document),
        metadata={"answer_format": row.get("answer_format")},
    )


def _folder_of(name: str) -> str:
    return name.rsplit("/", 2)[-2] if "/" in name else name


_PAGE_NUMBER = re.compile(r"(?:_page(\d+)|-(\d+)-\d+)\.\w+$")


def _mmlongbench_answer_pages(row: Row, names: list[str], document: str) -> list[int]:
    """Which pages hold the answer, by their names, or by the numbers that their names end in."""
    named = row.get("ans_page_path_list") or ()
    if not named:
        numbers = {int(page) for page in texts_in(row.get("ans_page_list"))}
        of_document = [name for name in names if document_name(_folder_of(name)) == document_name(document)]
        found = {name: _PAGE_NUMBER.search(name) for name in of_document or names}
        named = [name for name, at in found.items() if at and int(at[1] or at[2]) in numbers]
        if numbers and not named:
            raise DataError(
                f"ans_page_list names the pages {sorted(numbers)} of {document}, none of which is in page_list"
            )
    missing = sorted(set(named) - set(names))
    if missing:
        raise DataError(f"the page {missing[0]!r} holds the answer and is not in page_list")
    return [number for number, name in enumerate(names) if name in set(named)]


def _mmlongbench_needle(row: Row, files: Files) -> Example:
    text = "\n\n".join(paragraph["text"] for paragraph in row["ctxs"])
    pieces, names, choices = text.split("<image>"), list(row["image_list"]), list(row["choices_image"])
    if len(pieces) != len(names) + 1:
        raise DataError(f"the text has {len(pieces) - 1} places for images, and image_list has {len(names)}")
    needles = {f"mm-niah/{needle['image']}" for needle in row["positive_ctxs"]}
    with_evidence = [number for number, name in enumerate(names) if name in needles]
    if not with_evidence:
        raise DataError(f"the image that is looked for, {sorted(needles)}, is not in image_list")
    marks = letters(len(choices))
    asked = [
        part
        for mark, name in zip(marks, choices, strict=True)
        for part in ({"type": "text", "text": f"{mark}."}, _mmlongbench_image(name, files))
    ]
    parts = [
        part
        for piece, name in zip(pieces, [*names, None], strict=True)
        for part in (
            *([{"type": "text", "text": piece.strip()}] if piece.strip() else ()),
            *([_mmlongbench_image(name, files)] if name is not None else ()),
        )
    ]
    question = {"type": "text", "text": row["question"].strip(), "question": True}
    ask = {"type": "text", "text": "Answer with the letter of one of these:"}
    return example(
        "mmlongbench",
        f"{files.split}-{row['id']}",
        answer=marks[int(row["answer"])],
        candidates=marks,
        messages=[{"role": "user", "content": [*parts, question, ask, *asked]}],
        evidence=tuple(map(Evidence, with_evidence)),
        group=str(row["id"]),
    )


def _mmlongbench_image(name: str, files: Files) -> dict[str, Any]:
    return {"type": "image", "image": picture(_MMLONGBENCH_IMAGES + name, name, files)}


_LENGTHS = ("K8", "K16", "K32", "K64", "K128")
_MMLONGBENCH_FILES = {
    **{
        f"{task}_{length}": f"mmlb_data/documentQA/{task}_{length}.jsonl"
        for task in ("mmlongdoc", "longdocurl", "slidevqa")
        for length in _LENGTHS
    },
    **{
        f"retrieval_image_{length}": f"mmlb_data/NIAH/retrieval-image_test_{length}_dep6.jsonl"
        for length in _LENGTHS
    },
}

MMLONGBENCH = EvidenceData(
    name="mmlongbench",
    title="MMLongBench, document QA and images as needles",
    hub="ZhaoweiWang/MMLongBench",
    splits=tuple(_MMLONGBENCH_FILES),
    files=_MMLONGBENCH_FILES,
    columns={
        "id": "string",
        "question": "string",
        "answer": "string, or int of a choice",
    },
    read=read_mmlongbench,
    one_each=True,
    evidence="pages that hold the answer, or the image that is looked for; whole",
    group="document, or question",
    licence="MIT (code); of the documents their own",
    size="about 1,000 questions a split of documents, at 8,000 to 128,000 tokens",
    cite="wang2025mmlongbench",
    source="EdinburghNLP/MMLongBench @ 22b9f27, data.py and README; ab-cli/MMRetHead @ 126112d, "
    "src/mmrethead/data.py",
    checked="card",
    overlaps=("mmlongbench-doc", "mmdocir", "slidevqa"),
    fetch="hf download --repo-type dataset ZhaoweiWang/MMLongBench --local-dir FOLDER && cd FOLDER && for "
    'archive in *.tar.gz; do tar -xzf "$archive"; done',
    notes="Published as archives: unpack them, mmlb_data and mmlb_image side by side in data_dir=. Of "
    "documents the rows have page_list, ans_page_list (or ans_page_path_list) and doc_name, of needles ctxs, "
    "image_list, positive_ctxs and choices_image. Every page is preceded by the name of its document. The "
    "summaries, many-shot and text tasks hold no evidence in an image and are not read.",
)
