"""Data sets of single pictures and of pairs: how a row of each becomes examples."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmlens.data.examples import DataError, Example
from mmlens.data.images import LateImage
from mmlens.data.published.parts import (
    SIDES,
    YES_NO,
    clipped,
    coco_image,
    example,
    first_of,
    letters,
    most_given,
    options_in,
    picture,
    questions,
    regions,
    scaled,
    side_of,
    xywh,
)
from mmlens.data.published.record import EvidenceData, Files
from mmlens.data.tables import key_of_image
from mmlens.errors import MissingFileError

Row = Mapping[str, Any]

IN_WHICH_HALF = 'Left or right: in which half of the image is "{}"?'
"""The question of data that have expressions and boxes. Its answer is the half that holds the middle of the box."""

IS_IT_TRUE = "Is this true of the {}? {}"

_HALVES = (
    "The expressions are no questions. Ours asks whether it is in the left or the right half of the image, and the "
    "answer is the half that holds the middle of the box, so that metrics have a text to look at; scores of attention, "
    "as the paper's RAM, read the question alone."
)


# ------------------------------------------------------------------------------ boxes of expressions


def _in_a_half(kind: str, id: str, expression: str, box: Any, image: Any, **fields: Any) -> Example:
    """The example of an expression and its box, (left, top, width, height) in pixels."""
    size = image.size
    inside = clipped(xywh(box), size)
    if inside is None:
        raise DataError(
            f"the box {list(box)} of {expression!r} lies outside its image, {size[0]} x {size[1]}"
        )
    said = expression.strip().rstrip(".")
    if not said:
        raise DataError("the expression is empty")
    return example(
        kind,
        id,
        question=IN_WHICH_HALF.format(said),
        answer=side_of(inside, size),
        candidates=SIDES,
        images=(image,),
        evidence=regions([inside]),
        **fields,
    )


def read_refcocog(row: Row, files: Files) -> Iterator[Example]:
    """An example of each expression of an object."""
    image = picture(row["image"], f"the image of {row['question_id']}", files)
    for number, expression in enumerate(row["answer"]):
        yield _in_a_half(
            "refcocog",
            f"{row['question_id']}-{number}",
            expression,
            row["bbox"],
            image,
            group=coco_image(row["file_name"]),
            metadata={"expression": expression},
        )


REFCOCOG = EvidenceData(
    name="refcocog",
    title="RefCOCOg",
    hub="lmms-lab/RefCOCOg",
    splits=("val", "test"),
    revision="93af55545967808285637a67431e4971a6f9fd49",
    columns={
        "question_id": "string",
        "image": "image",
        "answer": "list of string",
        "bbox": "list of float32",
        "file_name": "string",
    },
    read=read_refcocog,
    evidence="box of the object (left, top, width, height in pixels)",
    group="image of COCO",
    licence="not stated",
    size="7,573 and 5,023 objects, about two expressions each; 1.3 GB a split",
    cite="mao2016generation",
    source="the data set's card and the list of its commits; lmms-eval, tasks/refcocog (xywh, the answers are "
    "expressions)",
    checked="card",
    overlaps=("pope", "vqav2", "vsr", "visual-genome", "gqa"),
    notes=_HALVES + " An example an expression. Boxes are cut at the edge of their image.",
)


def read_visual_genome(row: Row, files: Files) -> Iterator[Example]:
    """An example of each region of an image."""
    number = first_of(row, "image_id", "id")
    regions_of_image = list(questions(row, "regions"))
    given = row.get("image")
    if given is None:
        given = files.first(f"VG_100K/{number}.jpg", f"VG_100K_2/{number}.jpg")
    image = picture(given, f"image {number}", files)
    for _, region in regions_of_image:
        yield _in_a_half(
            "visual-genome",
            str(region["region_id"]),
            region["phrase"],
            (region["x"], region["y"], region["width"], region["height"]),
            image,
            group=f"Visual Genome {number}",
            metadata={"expression": region["phrase"]},
        )


VISUAL_GENOME = EvidenceData(
    name="visual-genome",
    title="Visual Genome, region descriptions",
    hub="",
    splits=("train",),
    files={"train": "region_descriptions.json"},
    columns={
        "id": "int",
        "regions": "list of {region_id, image_id, phrase, x, y, width, height}",
    },
    read=read_visual_genome,
    evidence="box of the region (x, y, width, height in pixels)",
    group="image",
    licence="CC BY 4.0",
    size="108,077 images, 5.4 million regions; 15 GB",
    cite="krishna2017visual",
    source="visualgenome.org's region_descriptions.json (version 1.2), and the card of "
    "ranjaykrishna/visual_genome",
    checked="published rows",
    overlaps=("gqa", "refcocog", "pope", "vqav2", "vsr"),
    notes=_HALVES
    + " Its copy on the hub, ranjaykrishna/visual_genome, is a loading script, which datasets runs no more: "
    "give data_dir= with region_descriptions.json and the images in VG_100K and VG_100K_2. About half of the "
    "images are COCO's under other numbers.",
)


# ------------------------------------------------------------------------------ true or not


def read_nlvr(row: Row, files: Files) -> Iterator[Example]:
    """The example of a sentence and the first of the six orders of its three boxes, which the shapes are told of."""
    identifier, directory = row["identifier"], row["directory"]
    name = f"{files.split}-{identifier}-0.png"
    image = picture(
        files.first(
            f"{files.split}/images/{directory}/{name}",
            f"images/{directory}/{name}",
            f"images/{name}",
            name,
        ),
        name,
        files,
    )
    boxes = [
        (
            x := item["x_loc"] + _NLVR_STEP * number,
            item["y_loc"],
            x + item["size"],
            item["y_loc"] + item["size"],
        )
        for number, items in enumerate(row["structured_rep"])
        for item in items
    ]
    yield example(
        "nlvr",
        identifier,
        question=IS_IT_TRUE.format("image", row["sentence"].strip()),
        answer=YES_NO[str(row["label"]).lower() != "true"],
        candidates=YES_NO,
        images=(image,),
        evidence=regions(boxes),
        group=identifier.rsplit("-", 1)[0],
    )


_NLVR_STEP = 150
"""Pixels from one of the three boxes of 100 x 100 pixels to the next."""

_NOT_QUESTIONS = 'The sentences are no questions. Ours is "Is this true of the ...?", answered "yes" or "no".'

NLVR = EvidenceData(
    name="nlvr",
    title="NLVR",
    hub="",
    splits=("dev", "test", "train"),
    files={split: f"{split}/{split}.json" for split in ("dev", "test", "train")},
    columns={
        "identifier": "string",
        "directory": "string",
        "sentence": "string",
        "label": "string",
        "structured_rep": "list of three lists of {type, color, x_loc, y_loc, size}",
    },
    read=read_nlvr,
    one_each=True,
    evidence="boxes of all shapes, by the structured representation",
    group="the four images that a sentence was written for",
    licence="CC BY 4.0",
    size="989 (dev), 989 (test), about 12,400 (train) pairs of a sentence and a picture",
    cite="suhr2017corpus",
    fetch="git clone https://github.com/lil-lab/nlvr && mv nlvr/nlvr FOLDER",
    source="lil-lab/nlvr @ 1892484, nlvr/README.md and rows of dev",
    checked="published rows",
    notes=_NOT_QUESTIONS
    + " Each sentence has six pictures, which differ in the order of the three boxes; the shapes are told of "
    "the first (-0.png), and that one is read. Not on the hub: data_dir= is the folder nlvr of the authors' "
    "repository.",
)


def read_nlvr2(row: Row, files: Files) -> Iterator[Example]:
    """The example of a sentence and its two images."""
    identifier = row["identifier"]
    pair = identifier.rsplit("-", 1)[0]
    images = [
        picture(
            files.first(*(f"{folder}{pair}-img{side}.png" for folder in _nlvr2_folders(row, files.split))),
            f"{pair}-img{side}.png",
            files,
        )
        for side in (0, 1)
    ]
    yield example(
        "nlvr2",
        identifier,
        question=IS_IT_TRUE.format("two images", row["sentence"].strip()),
        answer=YES_NO[str(row["label"]).lower() != "true"],
        candidates=YES_NO,
        images=tuple(images),
        group="-".join(identifier.split("-")[:2]),
    )


def _nlvr2_folders(row: Row, split: str) -> tuple[str, ...]:
    directory = row.get("directory")
    inner = (f"images/{split}/{directory}/",) if directory is not None else ()
    return (*inner, f"images/{split}/", f"{split}/", "images/", "")


NLVR2 = EvidenceData(
    name="nlvr2",
    title="NLVR2",
    hub="",
    splits=("dev", "test1", "test2", "train"),
    files={split: f"data/{split}.json" for split in ("dev", "test1", "test2", "train")},
    columns={"identifier": "string", "sentence": "string", "label": "string"},
    read=read_nlvr2,
    one_each=True,
    evidence="none",
    group="the set of eight images that a sentence was written for",
    licence="CC BY 4.0 (sentences); the images are others'",
    size="86,373 sentences (train), 6,982 (dev), 6,967 (test1), 6,970 (test2)",
    cite="suhr2019corpus",
    fetch="git clone https://github.com/lil-lab/nlvr && mv nlvr/nlvr2 FOLDER",
    source="lil-lab/nlvr @ 1892484, nlvr2/README.md and rows of dev",
    checked="published rows",
    notes=_NOT_QUESTIONS
    + " data_dir= is the folder nlvr2 of the authors' repository, with the images, which are to be asked for, "
    "in images/dev (test1, test2; of train images/train/0 to 99). Copies on the hub have other columns.",
)


def read_vsr(row: Row, files: Files) -> Iterator[Example]:
    """The example of a caption."""
    name = row["image"]
    image = picture(
        files.first(f"images/{name}", f"trainval2017/{name}", f"train2017/{name}", f"val2017/{name}", name),
        name,
        files,
    )
    yield example(
        "vsr",
        f"{name.partition('.')[0]}-{row['relation']}-{row['caption']}",
        question=IS_IT_TRUE.format("image", row["caption"].strip()),
        answer=YES_NO[not int(row["label"])],
        candidates=YES_NO,
        images=(image,),
        group=coco_image(name),
        metadata={"relation": row["relation"]},
    )


VSR = EvidenceData(
    name="vsr",
    title="Visual Spatial Reasoning, random split",
    hub="cambridgeltl/vsr_random",
    splits=("test", "dev", "train"),
    files={split: f"{split}.jsonl" for split in ("test", "dev", "train")},
    columns={"image": "string", "caption": "string", "label": "int", "relation": "string"},
    read=read_vsr,
    one_each=True,
    evidence="none",
    group="image of COCO",
    licence="CC BY 4.0",
    size="2,195 (test), 1,097 (dev), 7,680 (train) captions; images by name",
    cite="liu2023visual",
    source="cambridgeltl/visual-spatial-reasoning @ b27a0af, data/splits/random, and the list of files of the "
    "hub's copy",
    checked="published rows",
    overlaps=("refcocog", "pope", "vqav2", "visual-genome", "gqa"),
    notes=_NOT_QUESTIONS + " Images are files of COCO 2017, train and val, in a folder images of data_dir=.",
)


def read_pope(row: Row, files: Files) -> Iterator[Example]:
    """The example of a question whether an object is in the image; of what is there, its boxes, where COCO's are."""
    given = row["image"]
    source = row.get("image_source") or (given if isinstance(given, str) else None)
    if source is None:
        raise DataError("the row names no image of COCO: image_source is empty")
    name = f"{source}.jpg" if "." not in source else source
    if isinstance(given, str):
        given = files.first(f"val2014/{given}", f"images/{given}", given)
    category = row.get("category") or files.split
    question, answer = (
        first_of(row, "question", "text"),
        str(first_of(row, "answer", "label")).strip().lower(),
    )
    image = picture(given, name, files)
    boxes = _coco_boxes(name, question, answer, files)
    yield example(
        "pope" if boxes != [] else "pope, no evidence",
        f"{category}-{row['question_id']}",
        question=question,
        answer=answer,
        candidates=YES_NO,
        images=(image,),
        evidence=regions(_inside(xywh(box), image, name) for box in boxes or ()),
        group=coco_image(name),
        metadata={"category": category},
    )


_ASKED_OBJECT = re.compile(r"is there an? (.+?) in the im", re.IGNORECASE)


def _coco_boxes(name: str, question: str, answer: str, files: Files) -> list[list[float]] | None:
    """The boxes, (left, top, width, height), of the object that is asked for; None without COCO's annotations."""
    path = files.find("instances_val2014.json")
    if path is None:
        return None
    asked = _ASKED_OBJECT.search(question)
    if asked is None:
        raise DataError(f"{question!r} names no object")
    return _coco_instances(path).get((coco_image(name), asked[1].lower()), []) if answer == "yes" else []


@functools.lru_cache(maxsize=1)
def _coco_instances(path: Path) -> dict[tuple[str, str], list[list[float]]]:
    """Boxes by image and category, of COCO's own annotations."""
    told = json.loads(path.read_text(encoding="utf-8"))
    categories = {each["id"]: each["name"] for each in told["categories"]}
    found: dict[tuple[str, str], list[list[float]]] = {}
    for each in told["annotations"]:
        key = (coco_image(each["image_id"]), categories[each["category_id"]])
        found.setdefault(key, []).append(each["bbox"])
    return found


POPE = EvidenceData(
    name="pope",
    title="POPE",
    hub="lmms-lab/POPE",
    splits=("test", "random", "popular", "adversarial"),
    files={
        "test": "data/test-*.parquet",
        **{split: f"Full/{split}-*.parquet" for split in ("random", "popular", "adversarial")},
    },
    revision="4db1276663dfa5eb8ad16a52d24c31a09e470896",
    columns={
        "question_id": "string",
        "question": "string",
        "answer": "string",
        "image": "image",
        "image_source": "string",
        "category": "string",
    },
    other_names={"question": "text", "answer": "label", "image_source": None, "category": None},
    read=read_pope,
    one_each=True,
    evidence="none; with COCO's annotations, the boxes of the object that is there",
    group="image of COCO",
    licence="MIT (questions); the images are COCO's",
    size="9,000 questions, 3,000 each random, popular and adversarial, of 500 images; 255 MB",
    cite="li2023evaluating",
    source="AoiDragon/POPE @ 08d957b, coco_pope_random.json; of the hub's copy lmms-eval, tasks/pope, and its "
    "list of files",
    checked="published rows",
    overlaps=("refcocog", "vqav2", "vsr", "visual-genome", "gqa"),
    notes="Images are in the hub's copy. The authors' own files, coco_pope_random.json and the like in "
    "data_dir=, name files of COCO val2014, to be put into a folder val2014 beside them. With COCO's "
    "instances_val2014.json in data_dir= questions that are answered yes have the boxes of the object as "
    "evidence, and the others make a kind of their own.",
    own_files={split: f"*{split}*.json" for split in ("random", "popular", "adversarial")},
)


def read_mmvp(row: Row, files: Files) -> Iterator[Example]:
    """The example of one picture of a pair, with its options in the question."""
    number = int(row["Index"])
    options = re.findall(r"\(([ab])\)", row["Options"])
    yield example(
        "mmvp",
        number,
        question=f"{row['Question'].strip()} {row['Options'].strip()}",
        answer=row["Correct Answer"].strip().lower(),
        candidates=tuple(f"({option})" for option in dict.fromkeys(options)),
        images=(picture(row["image"], f"image {number}", files),),
        group=f"pair {(number + 1) // 2}",
    )


MMVP = EvidenceData(
    name="mmvp",
    title="MMVP",
    hub="lmms-lab-eval/MMVP",
    splits=("train",),
    columns={
        "Index": "int or string",
        "Question": "string",
        "Options": "string",
        "Correct Answer": "string",
        "image": "image",
    },
    read=read_mmvp,
    one_each=True,
    evidence="none",
    group="pair of pictures",
    licence="MIT",
    size="300 questions on 150 pairs of pictures",
    cite="tong2024eyes",
    source="tsb0601/MMVP, scripts/evaluate_mllm.py and its README; lmms-eval @ 75571cf, tasks/mmvp",
    checked="card",
    notes='Options and answers are written "(a)" and "(b)". The copy of lmms-eval has the answers of 99, 100, '
    "279 and 280 the other way round than the authors' Questions.csv: the pictures show so.",
)


def read_vstar(row: Row, files: Files) -> Iterator[Example]:
    """The example of a question with its options; boxes of what it asks for are in a file beside the image."""
    name = row["image"]
    beside = json.loads(files.path(re.sub(r"\.\w+$", ".json", name)).read_text(encoding="utf-8"))
    image = picture(name, name, files)
    candidates = options_in(row["text"])
    yield example(
        "vstar",
        f"{row['category']}-{row['question_id']}",
        question=row["text"].strip(),
        answer=row["label"].strip(),
        candidates=candidates,
        images=(image,),
        evidence=regions(_inside(xywh(box), image, name) for box in beside["bbox"]),
        group=name,
        metadata={"category": row["category"], "target": list(beside["target_object"])},
    )


def _inside(box: Any, image: Any, name: str) -> Any:
    inside = clipped(box, image.size)
    if inside is None:
        raise DataError(
            f"{name}: the box {list(box)} lies outside its image, {image.size[0]} x {image.size[1]}"
        )
    return inside


VSTAR = EvidenceData(
    name="vstar",
    title="V*Bench",
    hub="craigwu/vstar_bench",
    splits=("test",),
    files={"test": "test_questions.jsonl"},
    revision="d9ae62c903da0c98336e85c5ee89cd863b04b4da",
    columns={
        "image": "string",
        "text": "string",
        "category": "string",
        "label": "string",
        "question_id": "int or string",
    },
    read=read_vstar,
    one_each=True,
    evidence="boxes of the objects asked for (left, top, width, height in pixels)",
    group="image",
    licence="MIT (code); of the images SA-1B's",
    size="191 questions: 115 direct_attributes, 76 relative_position",
    cite="wu2024vstar",
    source="penghao-wu/vstar @ 4ede664, README and vstar_bench_eval.py; the data set's list of files and "
    "commits",
    checked="card",
    notes="Boxes are in a .json beside each image (target_object, bbox). Questions hold their options and ask "
    "for a letter.",
)


def read_visualwebbench(row: Row, files: Files) -> Iterator[Example]:
    """The example of an element of a web page, among the boxes that are marked by letters in the picture."""
    marks = letters(len(row["options"]))
    image = picture(row["image"], f"the image of {row['id']}", files)
    box = row["options"][row["answer"]]
    # A box of pixels is larger than a pixel.
    relative = max(number for option in row["options"] for number in option) <= 1
    size = image.size
    at = scaled(box, (1, 1) if relative else row["image_size"], size)
    yield example(
        "visualwebbench",
        row["id"],
        question="Boxes of this web page are marked by letters. Which letter marks the element that is described so: "
        f"{row['elem_desc'].strip()}?",
        answer=marks[row["answer"]],
        candidates=marks,
        images=(image,),
        evidence=regions([_inside(at, image, str(row["id"]))]),
        group=str(row["website"]),
    )


VISUALWEBBENCH = EvidenceData(
    name="visualwebbench",
    title="VisualWebBench, element grounding",
    hub="visualwebbench/VisualWebBench",
    config="element_ground",
    splits=("test",),
    columns={
        "id": "string",
        "website": "string",
        "image": "image",
        "image_size": "list of int64",
        "options": "list of lists of float64",
        "elem_desc": "string",
        "answer": "int64",
    },
    read=read_visualwebbench,
    one_each=True,
    evidence="box of the element, the option that is the answer (xyxy)",
    group="website",
    licence="Apache-2.0",
    size="413 elements; about 1,500 rows in all seven tasks, 1.2 GB",
    cite="liu2024visualwebbench",
    source="the data set's card (columns and types); VisualWebBench/VisualWebBench @ ec8feda, run.py and "
    "utils/prompts.py",
    checked="card",
    notes="The description is no question; ours asks for the letter, as the authors' prompt does. Boxes that "
    "are all within 0 and 1 are parts of the image, others pixels of image_size.",
)


# ------------------------------------------------------------------------------ questions of one picture


def _simple(
    kind: str, id: object, question: str, answers: Any, image: Any, group: str, **metadata: Any
) -> Example:
    answer, all_answers = answers
    return example(
        kind,
        id,
        question=question.strip(),
        answer=answer,
        answers=all_answers,
        images=(image,),
        group=group,
        metadata=metadata,
    )


def read_textvqa(row: Row, files: Files) -> Iterator[Example]:
    """The example of a question; the answer is the one that most of ten people gave."""
    image = picture(row["image"], f"image {row['image_id']}", files)
    yield _simple(
        "textvqa", row["question_id"], row["question"], most_given(row["answers"]), image, row["image_id"]
    )


TEXTVQA = EvidenceData(
    name="textvqa",
    title="TextVQA",
    hub="lmms-lab/textvqa",
    splits=("validation", "train"),
    columns={
        "image_id": "string",
        "question_id": "int32",
        "question": "string",
        "image": "image",
        "answers": "list of string",
    },
    read=read_textvqa,
    one_each=True,
    evidence="none",
    group="image",
    licence="CC BY 4.0",
    size="5,000 (validation), 34,602 (train) questions; 1.4 and 9.8 GB",
    cite="singh2019towards",
    source="the data set's card (columns, types, splits, as its copies hold it); facebook/textvqa's card; "
    "lmms-eval, tasks/textvqa",
    checked="card",
    notes="The answer is the one given most often, the first of equals; all stand in metadata['answers']. The "
    "split test holds no answers.",
)


def read_vqav2(row: Row, files: Files) -> Iterator[Example]:
    """The example of a question."""
    image = picture(row["image"], f"image {row['image_id']}", files)
    given = most_given([each["answer"] for each in row["answers"]])[1] if row["answers"] else []
    answer = row["multiple_choice_answer"]
    if not answer:
        raise DataError("there is no answer: splits for a leaderboard hold none")
    yield _simple(
        "vqav2",
        row["question_id"],
        row["question"],
        (answer, list(dict.fromkeys([answer, *given]))),
        image,
        coco_image(row["image_id"]),
        question_type=row.get("question_type"),
        answer_type=row.get("answer_type"),
    )


VQAV2 = EvidenceData(
    name="vqav2",
    title="VQA v2",
    hub="lmms-lab/VQAv2",
    splits=("validation",),
    revision="32665d35052eb4a6d4414851c3c829a72754915a",
    columns={
        "question_id": "int64",
        "image_id": "int64",
        "question": "string",
        "multiple_choice_answer": "string",
        "answers": "list of {answer, answer_confidence, answer_id}",
        "image": "image",
    },
    read=read_vqav2,
    one_each=True,
    evidence="none",
    group="image of COCO",
    licence="CC BY 4.0",
    size="214,354 questions; 33.7 GB",
    cite="goyal2017making",
    source="the data set's card (columns, types, splits); lmms-eval, tasks/vqav2",
    checked="card",
    overlaps=("refcocog", "pope", "vsr", "visual-genome", "gqa"),
    notes="The answer is multiple_choice_answer, which most of ten people gave; all stand in "
    "metadata['answers'].",
)


def read_chartqa(row: Row, files: Files) -> Iterator[Example]:
    """The example of a question on a chart."""
    given = first_of(row, "image", "imgname")
    if isinstance(given, str):
        given = files.first(f"png/{given}", f"{files.split}/png/{given}", f"images/{given}", given)
    image = picture(given, "the chart", files)
    question, answer = first_of(row, "question", "query"), str(first_of(row, "answer", "label"))
    chart = row["imgname"] if "imgname" in row else key_of_image(image).hex()
    kept = {"type": row["type"]} if row.get("type") else {}
    yield _simple("chartqa", f"{chart}-{question}", question, (answer, [answer]), image, chart, **kept)


CHARTQA = EvidenceData(
    name="chartqa",
    title="ChartQA",
    hub="lmms-lab/ChartQA",
    splits=("test",),
    columns={"question": "string", "answer": "string", "image": "image"},
    other_names={"question": "query", "answer": "label", "image": "imgname"},
    read=read_chartqa,
    one_each=True,
    evidence="none",
    group="chart",
    licence="GPL-3.0",
    size="2,500 questions, half of them by people; 122 MB",
    cite="masry2022chartqa",
    source="vis-nlp/ChartQA, rows of test_human.json; the cards of lmms-lab/ChartQA and ahmed-masry/ChartQA",
    checked="published rows",
    own_files={"test": "test_*.json"},
    notes="The hub's copy names no chart: charts are told by their bytes. The authors' own files, "
    "test_human.json and test_augmented.json in data_dir=, name files of a folder png.",
)


def read_gqa(row: Row, files: Files) -> Iterator[Example]:
    """The example of a question; where the scene graphs are at hand, the boxes of the objects that it is about."""
    number = str(row["imageId"])
    image = LateImage(functools.partial(_gqa_image, number, files), f"image {number}")
    boxes = _gqa_boxes(row, number, files)
    yield example(
        "gqa" if boxes != [] else "gqa, no evidence",
        row["id"],
        question=row["question"].strip(),
        answer=row["answer"].strip(),
        images=(image,),
        evidence=regions(_inside(xywh(box), image, number) for box in boxes or ()),
        group=f"Visual Genome {number}",
        metadata={"full_answer": row["fullAnswer"]} if row.get("fullAnswer") else None,
    )


def _gqa_image(number: str, files: Files) -> Any:
    """An image by its number: a row of the table of images, or a file."""
    try:
        table = files.table(f"{files.split}_balanced_images/*.parquet")
        row = files.row_numbers(f"{files.split}_balanced_images/*.parquet", "id").get(number)
    except MissingFileError:
        return files.first(f"images/{number}.jpg", f"{number}.jpg")
    if row is None:
        raise DataError(f"the table of images has none of the id {number!r}")
    assert table.at is not None
    return table.at(row)["image"].open()


def _gqa_boxes(row: Row, number: str, files: Files) -> list[list[float]] | None:
    """The boxes of the objects that the question's program names; None without scene graphs."""
    path = files.find(f"{files.split}_sceneGraphs.json")
    if path is None:
        return None
    objects = _scene_graphs(path).get(number, {}).get("objects", {})
    steps = row.get("semantic") or ()
    named = dict.fromkeys(name for step in steps for name in re.findall(r"\((\d+)\)", str(step["argument"])))
    return [[objects[name][edge] for edge in "xywh"] for name in named if name in objects]


@functools.lru_cache(maxsize=1)
def _scene_graphs(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


GQA = EvidenceData(
    name="gqa",
    title="GQA, balanced questions",
    hub="lmms-lab/GQA",
    splits=("testdev", "val"),
    files={split: f"{split}_balanced_instructions/*.parquet" for split in ("testdev", "val")},
    revision="78e9ec37481de666feb0180c7b5a773741cb47ca",
    columns={"id": "string", "imageId": "string", "question": "string", "answer": "string"},
    read=read_gqa,
    one_each=True,
    evidence="none; of val, with the scene graphs, the boxes of the objects that the question is about",
    group="image of Visual Genome",
    licence="MIT by the card of the hub's copy",
    size="12,578 questions on 398 images (testdev), 132,062 on 10,234 (val)",
    cite="hudson2019gqa",
    source="the data set's card and commits (its configurations); lmms-eval @ 75571cf, tasks/gqa (images by "
    "imageId in a second table); the format of scene graphs and programs by GQA's site",
    checked="card",
    overlaps=("visual-genome", "refcocog", "pope", "vqav2", "vsr"),
    notes="Scene graphs are published of train and val alone: val_sceneGraphs.json, in whatever folder of "
    "data_dir=. The evidence are the objects that the question's program (the column semantic) names; a "
    "question that names none makes a kind of its own. About half of Visual Genome's images are COCO's under "
    "other numbers.",
)
