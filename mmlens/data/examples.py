"""A question about images whose evidence is known, and its plain on-disk format.

A folder of examples holds `examples.jsonl` and the image files that it names; docs/data.md
describes every field. One line:

    {"id": "scene-0", "kind": "objects", "question": "What colour is K", "answer": "red",
     "images": ["images/scene-0.png"], "evidence": [{"image": 0, "box": [16, 0, 48, 32]}],
     "candidates": ["red", "blue"], "group": "scene-0"}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Evidence:
    """One region that holds the answer: a box of an image, or the whole image when `box` is None.

    `image` counts the prompt's images from 0 (a page or a frame of a clip is an image). `box` is
    (left, top, right, bottom) in pixels of the ORIGINAL image, right and bottom exclusive.
    """

    image: int
    box: Box | None = None


@dataclass(frozen=True)
class Example:
    """A question, its images, its answer, and where in the images the answer stands.

    `kind` names the task; `candidates` are the answers that count as well-formed (empty: any);
    `group` names what must not be split between selection and evaluation, such as a document
    (empty: the example is its own group). An example without evidence is a text-only control.

    >>> Example(question="What colour is K", answer="red", evidence=(Evidence(0),)).evidence[0].box
    Traceback (most recent call last):
        ...
    ValueError: example '': evidence names image 0, but the example has 0 image(s)
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
        for region in self.evidence:
            if not 0 <= region.image < len(self.images):
                raise ValueError(
                    f"example {self.id!r}: evidence names image {region.image}, "
                    f"but the example has {len(self.images)} image(s)"
                )
            check_box(
                region.box, self.images[region.image].size, f"example {self.id!r}, image {region.image}"
            )


def check_box(box: Box | None, size: tuple[int, int], where: str) -> None:
    """Raise ValueError unless `box` is a non-empty box inside an image of `size` = (width, height)."""
    if box is None:
        return
    width, height = size
    left, top, right, bottom = box
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(
            f"{where}: the box {tuple(box)} is not a box (left, top, right, bottom) "
            f"inside the image of {width} x {height} pixels"
        )
