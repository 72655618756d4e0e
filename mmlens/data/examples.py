"""A question about images whose evidence is known, and its plain on-disk format.

A folder of examples holds `examples.jsonl` and the image files that it names; docs/data.md
describes every field. One line:

    {"id": "scene-0", "kind": "objects", "question": "What colour is K", "answer": "red",
     "images": ["images/scene-0.png"], "evidence": [{"image": 0, "box": [16, 0, 48, 32]}],
     "candidates": ["red", "blue"], "group": "scene-0"}
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from mmlens.arguments import (
    folder_to_write,
    instance_of,
    listed,
    path_of,
    seed_of,
    shown,
    unknown_name_message,
    whole_number,
)
from mmlens.arguments import number as real_number
from mmlens.errors import InvalidTypeError, InvalidValueError
from mmlens.token_map import Box, Region, box_of, checked_box


@dataclass(frozen=True)
class Evidence:
    """One region that holds the answer: a box of an image, or the whole image when `box` is None.

    `image` counts the prompt's images from 0 (a page or a frame of a clip is an image). `box` is
    (left, top, right, bottom) in pixels of the ORIGINAL image, right and bottom exclusive.
    """

    image: int
    box: Box | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "image", whole_number("image", self.image, least=0))
        if self.box is not None:
            object.__setattr__(self, "box", box_of("box", self.box))


@dataclass(frozen=True)
class Example:
    """A question, its images, its answer, and where in the images the answer stands.

    `kind` names the task; `candidates` are the answers that count as well-formed (empty: any);
    `group` names what must not be split between selection and evaluation, such as a document
    (empty: the example is its own group). An example without evidence is a text-only control.

    >>> Example(question="What colour is K", answer="red", evidence=(Evidence(0),)).evidence[0].box
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidValueError: example '': evidence names image 0, but the example has 0 image(s)
    """

    question: str
    answer: str
    images: tuple[Image.Image, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    kind: str = ""
    candidates: tuple[str, ...] = ()
    id: str = ""
    group: str = ""
    metadata: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "evidence", tuple(regions_of("evidence", self.evidence)))
        instance_of("metadata", self.metadata, dict, "a dict")
        for region in self.evidence:
            if not 0 <= region.image < len(self.images):
                raise InvalidValueError(
                    f"example {self.id!r}: evidence names image {region.image}, "
                    f"but the example has {len(self.images)} image(s)"
                )
            if region.box is not None:
                where = f"example {self.id!r}, image {region.image}"
                checked_box(region.box, self.images[region.image].size, where)


def regions_of(name: str, value: object) -> list[Any]:
    """A list of `Evidence`; InvalidTypeError for anything else, such as one alone or (image, box) pairs."""
    expected = "a list of Evidence(image, box)"
    if isinstance(value, Evidence):
        raise InvalidTypeError(
            f"{name} is {shown(value)}; expected {expected}: one region is written (Evidence(...),)"
        )
    regions = listed(name, value, expected)
    for at, region in enumerate(regions):
        if not isinstance(region, Region):
            raise InvalidTypeError(
                f"{name}[{at}] is {shown(region)}; expected Evidence(image, box), such as Evidence(0, (0, 0, 9, 9))"
            )
    return regions


def examples_of(value: object, name: str = "examples", *, least: int = 1) -> list[Example]:
    """A list of `least` or more examples, gathered once; InvalidTypeError for anything else.

    >>> examples_of(Example("What?", "x"))
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidTypeError: examples is Example(...; expected a list of Example: one is written [example]
    """
    expected = "a list of Example"
    if isinstance(value, Example):
        raise InvalidTypeError(f"{name} is {shown(value)}; expected {expected}: one is written [example]")
    if hasattr(value, "token_map"):
        raise InvalidTypeError(
            f"{name} is a Prompt; expected {expected} (mmlens.Example, with question, images, answer and evidence), "
            "since a prompt knows no evidence"
        )
    if isinstance(value, (str, os.PathLike)):
        raise InvalidTypeError(
            f"{name} is {shown(value)}; expected {expected}: of a folder they are load_examples(folder)"
        )
    examples = listed(name, value, expected, least=least)
    for at, example in enumerate(examples):
        if not isinstance(example, Example):
            raise InvalidTypeError(
                f"{name}[{at}] is {shown(example)}; expected an mmlens.Example: {name} is {expected}"
            )
    return examples


class DataError(InvalidValueError):
    """A folder of examples that is missing, empty or not in the documented format."""


_TEXT_FIELDS = ("id", "kind", "question", "answer", "group")
_FIELDS = (*_TEXT_FIELDS, "images", "evidence", "candidates", "metadata")


def save_examples(examples: Iterable[Example], folder: str | Path) -> Path:
    """Write `examples.jsonl` and the images (PNG, lossless) to `folder`, and return the folder.

    Raises DataError where two examples share an id, since their images would overwrite each other.
    """
    examples = examples_of(examples)
    folder = folder_to_write("folder", folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines, seen = [], set()
    for index, example in enumerate(examples):
        name = example.id or f"example-{index}"
        if name in seen:
            raise DataError(f"two examples have the id {name!r}")
        seen.add(name)
        files = []
        for number, image in enumerate(example.images):
            files.append(f"images/{index:06d}-{number}.png")
            image.save(folder / files[-1])
        record = {field: getattr(example, field) for field in _TEXT_FIELDS} | {
            "id": name,
            "images": files,
            "evidence": [
                {"image": e.image} | ({} if e.box is None else {"box": list(e.box)}) for e in example.evidence
            ],
            "candidates": list(example.candidates),
            "metadata": example.metadata,
        }
        lines.append(json.dumps(record))
    (folder / "examples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def load_examples(folder: str | Path) -> list[Example]:
    """Read a folder of examples (docs/data.md).

    Raises DataError, naming the folder and the line, for a missing folder or file, an empty set, an unknown
    or missing field, an image that is missing or broken, or evidence outside its image.
    """
    path = path_of("folder", folder) / "examples.jsonl"
    if not Path(folder).is_dir():
        raise DataError(f"there is no folder of examples {str(folder)!r}")
    if not path.is_file():
        raise DataError(f"the folder {str(folder)!r} has no examples.jsonl")
    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                examples.append(_example(json.loads(line), Path(folder)))
            except (ValueError, TypeError, KeyError, OSError) as error:
                raise DataError(f"{path}, line {number}: {error}") from error
    if not examples:
        raise DataError(f"{path} holds no example")
    return examples


def _example(record: Any, folder: Path) -> Example:
    if not isinstance(record, dict):
        raise InvalidValueError(
            f"expected an object with the fields {', '.join(_FIELDS)}, got {type(record).__name__}"
        )
    for field_name in record:
        if field_name not in _FIELDS:
            raise InvalidValueError(unknown_name_message("field", field_name, _FIELDS))
    for field_name in ("question", "answer"):
        if not isinstance(record.get(field_name), str) or not record[field_name].strip():
            raise InvalidValueError(
                f"the field {field_name!r} must be a non-empty text, got {record.get(field_name)!r}"
            )
    images = tuple(_open_image(folder / name) for name in record.get("images", ()))
    evidence = tuple(
        Evidence(region["image"], tuple(region["box"]) if region.get("box") is not None else None)
        for region in record.get("evidence", ())
    )
    return Example(
        **{name: record.get(name, "") for name in _TEXT_FIELDS},
        images=images,
        evidence=evidence,
        candidates=tuple(record.get("candidates", ())),
        metadata=record.get("metadata", {}),
    )


def _open_image(path: Path) -> Image.Image:
    if not path.is_file():
        raise InvalidValueError(f"there is no image {str(path)!r}")
    with Image.open(path) as image:
        return image.convert("RGB")


def split_examples(
    examples: Sequence[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Two disjoint lists, about `fraction` of every kind in the first, groups kept whole.

    Raises ValueError where there is no example, or a kind with fewer than two groups.
    """
    examples = examples_of(examples)
    fraction = real_number("fraction", fraction, above=0, below=1)
    rng = random.Random(seed_of(seed))
    first: list[Example] = []
    second: list[Example] = []
    for kind in sorted({example.kind for example in examples}):
        groups: dict[object, list[Example]] = {}
        for index, example in enumerate(examples):
            if example.kind == kind:
                groups.setdefault(example.group or example.id or index, []).append(example)
        names = list(groups)
        if len(names) < 2:
            raise InvalidValueError(
                f"{len(examples)} example(s) cannot be split in two: those of kind {kind!r} form "
                f"{len(names)} group, and every kind needs at least two"
            )
        rng.shuffle(names)
        cut = min(max(round(fraction * len(names)), 1), len(names) - 1)
        for position, name in enumerate(names):
            (first if position < cut else second).extend(groups[name])
    return first, second


def shared_groups(first: Iterable[Example], second: Iterable[Example]) -> list[str]:
    """Names of what two splits share: a group, the id of an example without a group, or the very same example.

    >>> page = Example("What?", "x", id="a", group="report.pdf")
    >>> shared_groups([page], [Example("Where?", "y", id="b", group="report.pdf")])
    ['report.pdf']
    """
    ours, theirs = ({_group(example): example for example in split} for split in (first, second))
    return sorted(
        ours[name].group or ours[name].id or f"{ours[name].question!r}"
        for name in ours.keys() & theirs.keys()
    )


def _group(example: Example) -> tuple[object, ...]:
    if example.group:
        return ("group", example.group)
    return ("id", example.kind, example.id) if example.id else ("object", id(example))


def overlap_message(shared: Sequence[str]) -> str:
    """What is wrong with splits that share these groups."""
    return (
        f"selection and evaluation share {len(shared)} example(s) or group(s) ({', '.join(shared[:5])}): heads chosen "
        "and judged on the same data look better than they are. Split them by mmlens.split_examples"
    )
