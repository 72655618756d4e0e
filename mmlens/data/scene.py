"""A drawn context and what can be asked about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from mmlens.data.drawing import CELL
from mmlens.data.examples import Box, Evidence, Example

Cells = tuple[tuple[tuple[str, ...], ...], ...]
"""The words of every cell of an image: [row][column] -> words."""


@dataclass(frozen=True)
class Kind:
    """A kind of question: its phrasings, in which {0}, {1} stand for the key's words, and all its answers.

    >>> Kind("documents", ("Which number is listed for {0}?",), ("1", "2")).question("K")
    'Which number is listed for K?'
    """

    name: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    key_words: tuple[str, ...] = ()
    """Words of its keys beside letters, classes, colours and shapes."""

    def question(self, key: str, phrasing: int = 0) -> str:
        """The question about `key`."""
        return self.questions[phrasing].format(*key.split())


@dataclass(frozen=True)
class Scene:
    """Everything that can be asked about one drawn context.

    `facts` gives the answer for every key that may be asked; `evidence` where it is drawn.
    `contents[i][row][column]` holds the words of what the 16 x 16 cell of image i belongs to: keys and value
    for every cell of an object, line, frame or image, nothing for background. `preamble` is text that stands
    before the question. `hops` gives, where a question takes two steps, the word that the first step finds.
    """

    of: Kind
    facts: dict[str, str]
    images: tuple[Image.Image, ...] = ()
    evidence: dict[str, tuple[Evidence, ...]] | None = None
    contents: tuple[Cells, ...] = ()
    preamble: str = ""
    hops: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The name of the kind."""
        return self.of.name

    def question(self, key: str, phrasing: int = 0) -> str:
        """The question about `key`, the stated facts included, in one of the kind's phrasings."""
        return self.preamble + self.of.question(key, phrasing)

    def example(self, key: str, phrasing: int = 0, id: str = "") -> Example:
        """The question about `key` with its answer, candidates and evidence."""
        more: dict[str, Any] = {"hop": self.hops[key]} if key in self.hops else {}
        if len(self.images) > 1:
            more |= {"page_texts": [_text_of(cells) for cells in self.contents], **self._layouts()}
        return Example(
            question=self.question(key, phrasing),
            answer=self.facts[key],
            images=self.images,
            evidence=() if self.evidence is None else self.evidence[key],
            kind=self.kind,
            candidates=self.of.answers,
            id=id,
            group=id,
            metadata={"key": key, "facts": dict(self.facts), **more},
        )

    def _layouts(self) -> dict[str, Any]:
        """Every boxed region that is evidence of something, page by page, with the words in it; none without boxes."""
        regions = [region for of_key in (self.evidence or {}).values() for region in of_key]
        boxes = sorted({(region.of_image, region.box) for region in regions if region.box is not None})
        if not boxes:
            return {}
        layouts = []
        for page, (left, top, right, bottom) in boxes:
            rows = self.contents[page][int(top) // CELL : int(bottom) // CELL]
            cells = tuple(row[int(left) // CELL : int(right) // CELL] for row in rows)
            layouts.append({"page": page, "box": [left, top, right, bottom], "text": _text_of(cells)})
        return {"layouts": layouts}


class Contents:
    """The words of every cell of one image while it is being drawn."""

    def __init__(self, rows: int, columns: int) -> None:
        self.cells: list[list[tuple[str, ...]]] = [[()] * columns for _ in range(rows)]

    def fill(self, row: int, column: int, height: int, width: int, words: tuple[str, ...]) -> None:
        """Give a rectangle of cells its words."""
        for line in self.cells[row : row + height]:
            line[column : column + width] = [words] * width

    def freeze(self) -> Cells:
        """The cells as they are now."""
        return tuple(tuple(line) for line in self.cells)


def _text_of(cells: Cells) -> str:
    """The words of all items in reading order; an item of several cells is read once, at its first."""
    words: list[str] = []
    for row, line in enumerate(cells):
        for column, item in enumerate(line):
            begun = (column and line[column - 1] == item) or (row and cells[row - 1][column] == item)
            words.extend(() if begun else item)
    return " ".join(words)


def whole(rows: int, columns: int, words: tuple[str, ...]) -> Cells:
    """The same words in every cell."""
    return ((words,) * columns,) * rows


def box(left: int, top: int, width: int, height: int) -> Box:
    """A box from its corner and size."""
    return (float(left), float(top), float(left + width), float(top + height))
