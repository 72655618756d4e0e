"""What the entries of the catalog share: images, boxes, answers and names of groups as data sets write them."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmlens.boxes import Box
from mmlens.data.examples import DataError, Evidence, Example
from mmlens.data.images import LateImage
from mmlens.data.published.record import Files
from mmlens.data.tables import Cell

YES_NO = ("yes", "no")
SIDES = ("left", "right")
NOT_ANSWERABLE = "Not answerable"


def picture(value: Any, name: str, files: Files) -> LateImage:
    """The image of a cell: what `datasets` holds of it, encoded bytes, a path, or the name of one of the files."""
    if isinstance(value, LateImage):
        return LateImage(value.file, name)
    if isinstance(value, Path):
        return LateImage(value, name)
    if isinstance(value, str) and value:
        return LateImage(files.path(value), name)
    if isinstance(value, Mapping):
        return LateImage(Cell(value), name)
    if isinstance(value, bytes) and value:
        return LateImage(value, name)
    raise DataError(f"{name}: there is no image, its column holds {value!r}")


def first_of(row: Mapping[str, Any], *columns: str) -> Any:
    """The value of the first of these columns that the row has: a data set's authors and its copy on the hub may call
    one thing by two names."""
    for column in columns:
        if column in row:
            return row[column]
    raise DataError(f"the row has none of the columns {', '.join(map(repr, columns))}; it has {list(row)}")


# ------------------------------------------------------------------------------ boxes


def xywh(box: Sequence[float]) -> Box:
    """(left, top, width, height) as (left, top, right, bottom).

    >>> xywh([10, 20, 30, 40])
    (10, 20, 40, 60)
    """
    left, top, width, height = box
    return left, top, left + width, top + height


def clipped(box: Sequence[float], size: Sequence[float]) -> Box | None:
    """The part of a box that lies in an image of this size; None where none of it has an area.

    >>> clipped((8, 22, 1191, 815), (1190.55, 841.89)), clipped((300, 100, 300, 450), (340, 468))
    ((8, 22, 1190.55, 815), None)
    """
    left, top, right, bottom = box
    left, top = max(left, 0), max(top, 0)
    right, bottom = min(right, size[0]), min(bottom, size[1])
    return (left, top, right, bottom) if left < right and top < bottom else None


def scaled(box: Sequence[float], of: Sequence[float], to: Sequence[float]) -> Box:
    """A box on a page of the size `of`, on a picture of the size `to`.

    >>> scaled((61.2, 79.2, 122.4, 396), (612, 792), (1224, 1584))
    (122.4, 158.4, 244.8, 792.0)
    """
    across, down = to[0] / of[0], to[1] / of[1]
    left, top, right, bottom = box
    return left * across, top * down, right * across, bottom * down


def side_of(box: Box, size: tuple[int, int]) -> str:
    """The half of the image, "left" or "right", that holds the middle of a box."""
    return SIDES[box[0] + box[2] >= size[0]]


def regions(boxes: Iterable[Box | None], image: int = 0) -> tuple[Evidence, ...]:
    """Evidence in one image; a region without a box is the whole image, and each stands once."""
    return tuple(dict.fromkeys(Evidence(image, box) for box in boxes))


# ------------------------------------------------------------------------------ texts


def texts_in(value: Any) -> list[Any]:
    """The members of a list, or of a text that holds one, as in "[5, 6]" and "['Chart']".

    >>> texts_in("[5, 6]"), texts_in("['Chart']"), texts_in([1]), texts_in(None)
    ([5, 6], ['Chart'], [1], [])
    """
    if value is None:
        return []
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise DataError(f"{value!r} is a text that holds no list") from error
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{value!r} is no list")
    return list(value)


def most_given(answers: Sequence[str]) -> tuple[str, list[str]]:
    """The answer that most people gave, the first of equals, and all of them, each once.

    >>> most_given(["nokia", "Nokia", "nokia"])
    ('nokia', ['nokia', 'Nokia'])
    """
    counts = Counter(answer for answer in answers if answer and answer.strip())
    if not counts:
        raise DataError("there is no answer: the list is empty. Splits for a leaderboard hold none")
    return counts.most_common(1)[0][0], list(counts)


def letters(n: int) -> tuple[str, ...]:
    """The first n letters, as options are marked."""
    return tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:n])


_OPTION = re.compile(r"^\s*\(?([A-Z])[).]\s*\S", re.MULTILINE)


def options_in(text: str) -> tuple[str, ...]:
    """The letters of the options that stand in a question, a line each.

    >>> options_in("What is it made of?\\n(A) rubber\\n(B) cotton")
    ('A', 'B')
    """
    return tuple(dict.fromkeys(_OPTION.findall(text)))


# ------------------------------------------------------------------------------ groups and pages


def document_name(name: str) -> str:
    """What a document is called in all sets that hold it: without the folder and the ending of its file.

    >>> document_name("documents/Independents-Report.pdf"), document_name("2303.05039v2")
    ('Independents-Report', '2303.05039v2')
    """
    return re.sub(r"\.pdf$", "", name.rsplit("/", 1)[-1], flags=re.IGNORECASE)


_COCO = re.compile(r"^(?:COCO_)?(?:(?:train|val|test)20\d\d_)?(\d{1,12})(?:_\d+)?(?:\.\w+)?$")


def coco_image(name: object) -> str:
    """What an image of COCO is called in all sets that hold it, by its number or the name of its file.

    >>> coco_image("COCO_val2014_000000310196.jpg"), coco_image("000000310196.jpg"), coco_image(310196)
    ('COCO 310196', 'COCO 310196', 'COCO 310196')
    """
    found = _COCO.match(str(name))
    return f"COCO {int(found[1])}" if found else str(name)


def shown_pages(n: int, with_evidence: Iterable[int], max_pages: int | None) -> list[int]:
    """Numbers of the pages that are shown of n: all, or `max_pages` of them, those with evidence and then their
    neighbours, the nearest first. Never fewer than those with evidence; of a document without any, the first.

    >>> shown_pages(10, [4], 3), shown_pages(10, [0, 9], 4), shown_pages(10, [], 2), shown_pages(3, [1], None)
    ([3, 4, 5], [0, 1, 8, 9], [0, 1], [0, 1, 2])
    """
    if max_pages is None or max_pages >= n:
        return list(range(n))
    evidence = sorted(set(with_evidence)) or [0]
    nearest = sorted(range(n), key=lambda page: (min(abs(page - each) for each in evidence), page))
    return sorted(nearest[: max(max_pages, len(evidence))])


def questions(row: Mapping[str, Any], column: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The questions of a row that holds several, with their numbers."""
    given = row[column]
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise DataError(f"the column {column!r} holds {type(given).__name__}; expected a list of questions")
    yield from enumerate(given)


def example(
    kind: str,
    id: object,
    *,
    answers: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Example:
    """An Example of a data set: its name is the kind, and all right answers stand in the metadata."""
    beside = dict(metadata or {})
    if len(answers) > 1:
        beside["answers"] = list(answers)
    return Example(kind=kind, id=str(id), metadata=beside, **fields)
