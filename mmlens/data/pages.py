"""Documents as examples: each image is a page, and metadata says what else is known of the pages.

| key of `metadata` | value |
|---|---|
| `page_texts` | a text for each page |
| `layouts` | all regions that may be asked for: {"page": from 0, "box": [left, top, right, bottom], "text": optional} |
| `domain` | what sort of document it is; left out, the example's kind |

A box is in pixels of its page; with "page_size": [width, height] beside it in the units of that size (points of a PDF),
which are brought to pixels, and cut off at the page's edge, when the layout is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmlens.arguments import instance_of, listed, number, shown, texts, whole_number
from mmlens.boxes import Box, box_of, checked_box
from mmlens.data.chats import UNPLACED, Message, exchanged, parts_of
from mmlens.data.examples import Example
from mmlens.errors import InvalidValueError, MmlensError, OutOfRangeError, UnsupportedError


@dataclass(frozen=True)
class Layout:
    """A region of a page: a paragraph, a table, a figure. `box` is in pixels of the page."""

    page: int
    box: Box
    text: str | None = None

    @property
    def area(self) -> float:
        """In square pixels."""
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)

    def common_area(self, other: Layout) -> float:
        """The area that both cover.

        >>> corner = Layout(0, (0, 0, 4, 4))
        >>> corner.common_area(Layout(0, (2, 2, 9, 9))), corner.common_area(Layout(1, (2, 2, 9, 9)))
        (4, 0)
        """
        if self.page != other.page:
            return 0
        width, height = (
            min(self.box[end], other.box[end]) - max(self.box[start], other.box[start])
            for start, end in ((0, 2), (1, 3))
        )
        return max(width, 0) * max(height, 0)


def pages_with_evidence(example: Example) -> list[int]:
    """The pages that hold evidence, in order; UnsupportedError where it is of a video."""
    return sorted({region.of_image for region in example.evidence})


def evidence_layouts(example: Example) -> list[Layout]:
    """The evidence as layouts: its boxes, or all of a page where evidence has none."""
    return [
        Layout(region.of_image, region.box or (0, 0, *_size(example, region.of_image)))
        for region in example.evidence
    ]


def layouts_of(example: Example) -> list[Layout]:
    """All layouts that the metadata of an example hold, in their order; none where they say nothing of layouts.

    Raises InvalidValueError, naming the example and the layout, for one that is no such dict, or a box outside its
    page.

    >>> from mmlens.data import scene_examples
    >>> layouts = layouts_of(scene_examples("composed_documents", 1, seed=0)[0])
    >>> len(layouts), layouts[0].page, layouts[0].box
    (12, 0, (0.0, 0.0, 64.0, 16.0))
    """
    given = example.metadata.get("layouts") or ()
    where = f"example {example.id!r}: metadata['layouts']"
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise InvalidValueError(f"{where} is {shown(given)}; expected a list of dicts with page and box")
    return [_layout(example, one, f"{where}[{at}]") for at, one in enumerate(given)]


def page_texts_of(example: Example) -> list[str] | None:
    """The texts of the example's pages; None where its metadata hold none.

    Raises InvalidValueError where their number is not that of the pages.
    """
    if "page_texts" not in example.metadata:
        return None
    where = f"metadata['page_texts'] of example {example.id!r}"
    found = texts(where, example.metadata["page_texts"], "a text for each page")
    if len(found) != len(example.images):
        raise InvalidValueError(f"{where}: {len(found)} texts for {len(example.images)} pages")
    return found


def domain_of(example: Example) -> str:
    """What sort of document it is: `metadata["domain"]`, or the kind of the example."""
    where = f"metadata['domain'] of example {example.id!r}"
    return instance_of(where, example.metadata.get("domain") or example.kind, str, "a text")


def with_pages(example: Example, pages: Sequence[int], question: str | None = None) -> Example:
    """The example's question, or another one, about some of its pages, in their order; without evidence.

    The texts of a chat stay as they are, those that stand beside pages too.

    >>> from mmlens.data import scene_examples
    >>> example = scene_examples("composed_documents", 1, seed=0)[0]
    >>> len(example.images), len(with_pages(example, [2]).images)
    (3, 1)
    """
    changes: dict[str, Any] = {"evidence": ()}
    if example.messages:
        changes |= {"messages": _cut_chat(example.messages, pages), "images": ()}
    else:
        changes |= {"images": [example.images.given[page] for page in pages]}
    cut = replace(example, **changes)
    if question is None:
        return cut
    if not example.messages:
        return replace(cut, question=question)
    return replace(cut, messages=exchanged(cut.messages, question=question), question=question)


# ---------------------------------------------------------------------- plumbing


def _size(example: Example, page: int) -> tuple[int, int]:
    return example.images.given[page].size


def _layout(example: Example, given: Any, where: str) -> Layout:
    if not isinstance(given, Mapping) or not {"page", "box"} <= given.keys():
        raise InvalidValueError(f"{where} is {shown(given)}; expected a dict with page and box")
    try:
        page = whole_number("page", given["page"], least=0)
        if page >= len(example.images):
            raise OutOfRangeError(f"page {page}: the document has {len(example.images)} page(s), from 0")
        size, box = _size(example, page), box_of("box", given["box"])
        if given.get("page_size") is not None:
            box = _in_pixels(box, given["page_size"], size)
        box = checked_box(box, size, f"page {page}")
    except MmlensError as error:
        raise InvalidValueError(f"{where}: {error}") from error
    said = given.get("text")
    return Layout(page, box, said if isinstance(said, str) else None)


def _in_pixels(box: Box, page_size: Any, size: tuple[int, int]) -> Box:
    """A box in the units of `page_size` in pixels of a page of `size`; what lies beyond the page is cut off."""
    sides = listed("page_size", page_size, "[width, height] of the page")
    if len(sides) != 2:
        raise InvalidValueError(f"page_size is {shown(page_size)}; expected [width, height] of the page")
    width, height = (number("page_size", side, above=0) for side in sides)
    across, down = size[0] / width, size[1] / height
    left, top, right, bottom = box
    return (
        max(left * across, 0.0),
        max(top * down, 0.0),
        min(right * across, float(size[0])),
        min(bottom * down, float(size[1])),
    )


def _cut_chat(messages: Sequence[Message], pages: Sequence[int]) -> list[Message]:
    """The chat without the images that are not among `pages`."""
    if any(message.get(UNPLACED) for message in messages):
        raise UnsupportedError(
            "pages of a chat that was rendered before cannot be left out: give its messages"
        )
    made, page = [], 0
    for message in messages:
        content = []
        for part in parts_of(message):
            if part["type"] != "image" or page in pages:
                content.append(part)
            page += part["type"] == "image"
        made.append(message if isinstance(message.get("content"), str) else {**message, "content": content})
    return made
