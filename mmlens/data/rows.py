"""Rows of any data set as examples, by the names of their columns or by functions of a row."""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import json
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmlens.arguments import instance_of, listed, one_of, path_of, shown, unknown_name_message
from mmlens.boxes import Box, TokenMapError, box_of, to_pixels
from mmlens.data.examples import DataError, Evidence, Example
from mmlens.data.images import LateImage
from mmlens.data.reading import RowError, RowExamples, RowStream, said
from mmlens.data.tables import Cell, Row, Rows, key_of_image, rows_of
from mmlens.errors import InvalidTypeError, InvalidValueError
from mmlens.files import path_within

Column = str | Callable[[Row], Any]
"""The name of a column, or a function of the row."""

BOX_FORMATS: dict[str, tuple[bool, str | None]] = {
    "xyxy": (False, None),
    "xywh": (True, None),
    "relative": (False, "0-1"),
    "relative xywh": (True, "0-1"),
    "0-1000": (False, "0-1000"),
    "0-1000 xywh": (True, "0-1000"),
}
"""How a box may be written: (whether width and height follow its corner, the scale that is not pixels)."""

PAGES = "pages"


def examples_from(
    rows: Any,
    *,
    question: Column | None = None,
    answer: Column,
    images: Column | Sequence[str] | None = None,
    evidence: Column | None = None,
    box_format: str | None = None,
    box_pages: Column | None = None,
    first_page: int | None = None,
    candidates: Column | Sequence[str] | None = None,
    group: Column | None = None,
    id: Column | None = None,
    kind: Column | None = None,
    messages: Column | None = None,
    metadata: Sequence[str] = (),
    image_folder: str | Path | None = None,
    on_error: str = "raise",
    name: str | None = None,
) -> Any:
    """Examples of a `datasets.Dataset`, a pandas frame or a list of dicts; of an `IterableDataset` a stream of them.

    A column is named ("image"; "objects.bbox" is a field within one), or a function of the row gives its value. Of a
    function the row is as `dataset[i]` gives it, but for images, which are `LateImage`s (`.open()`, `.size`).

    - `question`: a text; in its place `messages`, a chat.
    - `answer`: a text; a list of texts, of which the first is the answer, and all stand in `metadata["answers"]`; or a
      whole number, which of the candidates it is, from 0. A column of classes gives their names.
    - `images`: one image, a list, or several columns in prompt order, where those that are empty at the end of a row
      are left out. Paths lie in `image_folder`, where that is given.
    - `evidence`: one box, or a list of boxes, of the row's one image, written as `box_format` says: "xyxy" (left, top,
      right, bottom) or "xywh" (left, top, width, height) in pixels, "relative" (xyxy from 0 to 1), "relative xywh",
      "0-1000", "0-1000 xywh". Of rows with several images, `box_pages` says in which image each box lies. With
      `box_format="pages"` evidence is the number of an image, or a list of them: each whole. `first_page`, 0 or 1, is
      what the first image is counted as. A function may give `Evidence`, or a list of it, without a format. None, or an
      empty list: none.
    - `candidates`: a list of texts in every row, or one list for all: ("yes", "no"). Lists of evidence and candidates
      may be written as texts, "[5, 6]".
    - `group`: what must not be split, such as a document. `id`: unique; without it a hash of what the row holds.
    - `metadata`: columns that are kept beside.

    Rows are read when their examples are, again each time, and images open when they are used. Only a relative box
    needs the size of its image, which is read from the header.

    Raises DataError, with the nearest name, for a column that there is not; with the row's number, its id and the
    reason for a row that cannot be read, and for the second row of one id. `on_error="skip"` leaves such rows out:
    `.skipped` of what is returned lists them, and a warning says how many. To know them, headers of images are read,
    and of rows that have numbers all at once; an image that is broken after its header still raises where it is used.

    >>> rows = [{"q": "Is it red?", "a": "yes", "img": Image.new("RGB", (8, 8)), "at": [2, 2, 4, 4]}]
    >>> examples_from(rows, question="q", answer="a", images="img", evidence="at", box_format="xywh")[0].evidence
    (Evidence(image=0, box=(2, 2, 6, 6), video=None, frames=None),)
    >>> examples_from(rows, question="q", answer="an")
    Traceback (most recent call last):
        ...
    mmlens.data.examples.DataError: answer='an': there is no column 'an' in the list; ...
    """
    name = None if name is None else instance_of("name", name, str, "a text")
    source = rows_of(rows, name)
    skips = one_of("on_error", on_error, ("raise", "skip")) == "skip"
    if (question is None) == (messages is None):
        raise InvalidTypeError("a row has a question or a chat: give question=, or messages=, and not both")
    reader = _Reader(
        source,
        {
            argument: _column(argument, given, source)
            for argument, given in (
                ("question", question),
                ("answer", answer),
                ("evidence", evidence),
                ("box_pages", box_pages),
                ("group", group),
                ("id", id),
                ("kind", kind),
                ("messages", messages),
            )
            if given is not None
        },
        _image_columns(images, source),
        _candidates(candidates, source),
        _Regions(_format_of(box_format, evidence), first_page, box_pages is not None),
        [
            (key, _column("metadata", key, source))
            for key in listed("metadata", metadata, "a list of names of columns")
        ],
        None if image_folder is None else path_of("image_folder", image_folder),
    )
    made = RowExamples if source.n is not None else RowStream
    return made(source, reader, skips=skips)


def box_in_pixels(box: object, box_format: str, size: Callable[[], tuple[int, int]]) -> Box:
    """A box, written as `box_format` says, as (left, top, right, bottom) in pixels; `size` gives the image's.

    Raises TokenMapError for one that is reversed, has no area, or leaves its scale.

    >>> box_in_pixels([0.5, 0, 1, 1], "relative", lambda: (640, 480))
    (320.0, 0.0, 640.0, 480.0)
    """
    has_width, scale = BOX_FORMATS[one_of("box_format", box_format, BOX_FORMATS)]
    left, top, right, bottom = box_of("the box", box)
    if has_width:
        if right <= 0 or bottom <= 0:
            raise TokenMapError(
                f"the box {[left, top, right, bottom]} as {box_format!r} has a width of {right:g} and a height of "
                f"{bottom:g}; expected both above 0"
            )
        # The sum of two rounded numbers may leave the image by the last digit of a float.
        right, bottom = round(left + right, 6), round(top + bottom, 6)
    if left < 0 or top < 0 or left >= right or top >= bottom:
        given = listed("the box", box, "a box")
        hint = (
            "; as 'xywh' it would be one"
            if not has_width and min(left, top) >= 0 < min(right, bottom)
            else ""
        )
        raise TokenMapError(
            f"the box {given} as {box_format!r} is outside or reversed: expected "
            f"(left, top, {'width, height' if has_width else 'right, bottom'}), left below right and top below "
            f"bottom{hint}"
        )
    return (
        (left, top, right, bottom) if scale is None else to_pixels((left, top, right, bottom), scale, size())
    )


# ------------------------------------------------------------------------------ columns


def _column(argument: str, given: Any, rows: Rows) -> Callable[[Row], Any]:
    """What reads an argument from a row: the value of a column, or of a function."""
    if callable(given) and not isinstance(given, type):
        return lambda row: _of_function(argument, given, row)
    if not isinstance(given, str):
        raise InvalidTypeError(
            f"{argument} is {shown(given)}; expected the name of a column, or a function of the row"
        )
    if rows.columns is not None:
        _check_column(argument, given, rows.columns, rows.name)
    labels = rows.labels.get(given)

    def read(row: Row) -> Any:
        if given in row:
            value = row[given]
        else:
            _check_column(argument, given, list(row), "the row")
            value = _within(row, given.split("."), argument, given)
        if labels is not None and isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return labels[value]
        return value

    return read


def _check_column(argument: str, given: str, columns: Sequence[str], where: str) -> None:
    if given not in columns and given.partition(".")[0] not in columns:
        # Of names as short as "q", difflib finds no near one.
        folded = [column for column in columns if column.lower() == given.lower()]
        near = folded or difflib.get_close_matches(given, columns, n=3, cutoff=0.5)
        named = f"the nearest: {', '.join(map(repr, near))}" if near else f"there are: {list(columns)}"
        raise DataError(f"{argument}={given!r}: there is no column {given!r} in {where}; {named}")


def _within(value: Any, keys: Sequence[str], argument: str, given: str) -> Any:
    """The field at "objects.bbox" of a row; of a list of structs, the field of each."""
    for at, key in enumerate(keys):
        if value is None:
            return None
        if isinstance(value, (list, tuple)):
            return [_within(each, keys[at:], argument, given) for each in value]
        if not isinstance(value, Mapping) or key not in value:
            known = list(value) if isinstance(value, Mapping) else []
            raise InvalidValueError(
                f"{argument}={given!r}: {unknown_name_message('field', key, known)}"
                if known
                else f"{argument}={given!r}: {'.'.join(keys[:at])!r} is {shown(value)}, which has no fields"
            )
        value = value[key]
    return value


def _of_function(argument: str, function: Callable[[Row], Any], row: Row) -> Any:
    try:
        return function(row)
    except Exception as error:
        hint = ""
        if isinstance(error, KeyError) and error.args and isinstance(error.args[0], str):
            hint = f"; {unknown_name_message('column', error.args[0], row)}"
        raise InvalidValueError(f"{argument}, a function of the row, raised {said(error)}{hint}") from error


def _image_columns(given: Any, rows: Rows) -> list[Callable[[Row], Any]]:
    if given is None:
        return []
    if isinstance(given, str) or callable(given):
        return [_column("images", given, rows)]
    names = listed("images", given, "the name of a column, a list of names, or a function of the row")
    return [_column("images", each, rows) for each in names]


def _candidates(given: Any, rows: Rows) -> Callable[[Row], Any]:
    if given is None:
        return lambda row: ()
    if isinstance(given, str) or callable(given):
        return _column("candidates", given, rows)
    for_all = tuple(
        listed("candidates", given, "the name of a column, a list of texts, or a function of the row")
    )
    return lambda row: for_all


def _format_of(box_format: str | None, evidence: Any) -> str | None:
    if box_format is None:
        return None
    one_of("box_format", box_format, (*BOX_FORMATS, PAGES))
    if evidence is None:
        raise InvalidTypeError(f"box_format={box_format!r} without evidence=, whose boxes it is of")
    return box_format


# ------------------------------------------------------------------------------ evidence


@dataclass(frozen=True)
class _Regions:
    """How the evidence of a row is written."""

    box_format: str | None
    first_page: int | None
    has_box_pages: bool

    def __post_init__(self) -> None:
        if self.first_page is not None and self.first_page not in (0, 1):
            raise InvalidValueError(
                f"first_page is {shown(self.first_page)}; expected 0 or 1: what the first image of a row is counted as"
            )
        counts = self.box_format == PAGES or self.has_box_pages
        if counts and self.first_page is None:
            raise InvalidTypeError(
                "numbers of pages count from 0 or from 1, which they do not say: give first_page=0 or first_page=1"
            )
        if not counts and self.first_page is not None:
            raise InvalidTypeError(
                f"first_page={self.first_page} is of numbers of pages: box_format='pages', or box_pages="
            )
        if self.has_box_pages and self.box_format in (None, PAGES):
            raise InvalidTypeError(
                "box_pages= says in which images boxes lie; say by box_format= how these are written"
            )

    def of(self, value: Any, pages: Any, images: Sequence[Any]) -> tuple[Evidence, ...]:
        """The evidence of a row with these images."""
        value = _written_list(_plain_list(value))
        if value is None:
            return ()
        if isinstance(value, Evidence):
            return (value,)
        if isinstance(value, (str, bytes)):
            raise InvalidTypeError(f"the evidence is {shown(value)}, a text; expected {self._expected()}")
        if isinstance(value, Mapping):
            raise InvalidTypeError(
                f"the evidence is {shown(value)}, with the fields {list(value)}; expected {self._expected()}: name "
                "the field, as in evidence='objects.bbox'"
            )
        if self.box_format == PAGES or not isinstance(value, (list, tuple)):
            if self.box_format != PAGES:
                raise InvalidTypeError(
                    f"the evidence is {shown(value)}; expected {self._expected()}; of numbers of pages or images, "
                    "box_format='pages' with first_page=0 or 1"
                )
            numbered = value if isinstance(value, (list, tuple)) else [value]
            return tuple(Evidence(self._page(each, len(images))) for each in numbered)
        if not value:
            return ()
        if all(isinstance(each, Evidence) for each in value):
            return tuple(value)
        boxes = [value] if all(isinstance(each, numbers.Real) for each in value) else list(value)
        if self.box_format is None:
            raise InvalidTypeError(
                f"the evidence is {shown(value)}; say how boxes are written by box_format=: one of "
                f"{', '.join(map(repr, (*BOX_FORMATS, PAGES)))}"
            )
        return tuple(
            Evidence(page, box_in_pixels(box, self.box_format, functools.partial(_size_of, images[page])))
            for box, page in zip(boxes, self._pages_of_boxes(pages, len(boxes), len(images)), strict=True)
        )

    def _expected(self) -> str:
        if self.box_format == PAGES:
            return "the number of an image, or a list of them"
        return "a box of four numbers, a list of boxes, or Evidence of a function"

    def _pages_of_boxes(self, pages: Any, n_boxes: int, n_images: int) -> list[int]:
        if not self.has_box_pages:
            if n_images != 1:
                raise InvalidValueError(
                    f"the evidence is {n_boxes} box(es), and the row has {n_images} images: say in which they lie by "
                    "box_pages=, or by a function that gives Evidence(image, box)"
                )
            return [0] * n_boxes
        pages = _written_list(_plain_list(pages))
        numbered = list(pages) if isinstance(pages, (list, tuple)) else [pages] * n_boxes
        if len(numbered) != n_boxes:
            raise InvalidValueError(
                f"the evidence is {n_boxes} box(es), and box_pages gives {len(numbered)} number(s)"
            )
        return [self._page(each, n_images) for each in numbered]

    def _page(self, given: Any, n_images: int) -> int:
        if isinstance(given, float) and given.is_integer():
            given = int(given)
        if isinstance(given, (bool, np.bool_)) or not isinstance(given, numbers.Integral):
            raise InvalidTypeError(f"the page is {shown(given)}; expected a whole number")
        assert self.first_page is not None
        page = int(given) - self.first_page
        if not 0 <= page < n_images:
            other = 1 - self.first_page
            hint = f"; is it counted from {other}?" if 0 <= int(given) - other < n_images else ""
            raise InvalidValueError(
                f"the page {given}, counted from {self.first_page}, is out of range: the row has {n_images} "
                f"image(s){hint}"
            )
        return page


def _size_of(image: Any) -> tuple[int, int]:
    return (image if isinstance(image, (LateImage, Image.Image)) else LateImage(image)).size


def _plain_list(value: Any) -> Any:
    """Arrays, which pandas has in the place of lists, as lists."""
    if isinstance(value, np.ndarray):
        return [_plain_list(each) for each in value.tolist()] if value.ndim else value.item()
    if isinstance(value, (list, tuple)):
        return [_plain_list(each) for each in value]
    return value


def _written_list(value: Any) -> Any:
    """The list that a text holds, "[3, 4]", as tables of plain text and not a few published ones have it."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            return ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return value
    return value


# ------------------------------------------------------------------------------ rows


@dataclass(frozen=True)
class _Reader:
    """Reads a row as one example."""

    rows: Rows
    columns: Mapping[str, Callable[[Row], Any]]
    image_columns: Sequence[Callable[[Row], Any]]
    candidates: Callable[[Row], Any]
    regions: _Regions
    metadata: Sequence[tuple[str, Callable[[Row], Any]]]
    image_folder: Path | None

    def __call__(self, number: int, row: Row) -> Iterable[Example]:
        id = ""
        try:
            if not isinstance(row, Mapping):
                raise InvalidTypeError(f"the row is {shown(row)}; expected a dict of its columns")
            if "id" in self.columns:
                id = _name("id", self.columns["id"](row))
            return [self._example(number, row, id)]
        except RowError:
            raise
        # A function of the user's may raise anything.
        except Exception as error:
            raise RowError(self.rows.name, number, id, said(error)) from error

    def _value(self, argument: str, row: Row) -> Any:
        read = self.columns.get(argument)
        return None if read is None else read(row)

    def _example(self, number: int, row: Row, id: str) -> Example:
        where = f"{self.rows.name}, row {number}" + (f" (id {id!r})" if id else "")
        given = self._images(row)
        images = [_image(each, f"{where}, image {at}", self.image_folder) for at, each in enumerate(given)]
        candidates = _texts("candidates", self.candidates(row))
        evidence = self.regions.of(self._value("evidence", row), self._value("box_pages", row), images)
        answer, answers = _answer(self._value("answer", row), candidates)
        question, messages = self._value("question", row), self._messages(row, where, given)
        if "question" in self.columns:
            question = _text("question", question)
        elif not messages:
            raise InvalidValueError(f"messages is {shown(messages)}; expected a chat: a list of messages")
        metadata = {key: _plain_list(read(row)) for key, read in self.metadata}
        if len(answers) > 1:
            metadata.setdefault("answers", answers)
        said_of_row = (question, repr(messages), answer, candidates, repr(evidence))
        return Example(
            question=question or "",
            answer=answer,
            images=tuple(images),
            evidence=evidence,
            candidates=tuple(candidates),
            id=id or _content_id(said_of_row, given),
            group=_name("group", self.columns["group"](row)) if "group" in self.columns else "",
            kind=_name("kind", self.columns["kind"](row)) if "kind" in self.columns else "",
            metadata=metadata,
            messages=messages or (),
        )

    def _messages(self, row: Row, where: str, given: list[Any]) -> Any:
        """The chat of a row, without the fields that Arrow adds to a message wherever another one has them.

        What its parts hold of images opens late, and is added to `given`.
        """

        def read(value: Any) -> Any:
            if isinstance(value, Mapping):
                kept = {key: each for key, each in value.items() if each is not None}
                if kept.get("type") == "image" and "image" in kept:
                    given.append(kept["image"])
                    kept["image"] = _image(kept["image"], f"{where}, an image of its chat", self.image_folder)
                    return kept
                return {key: read(each) for key, each in kept.items()}
            if isinstance(value, (list, tuple, np.ndarray)):
                return [read(each) for each in value]
            return value

        return read(self._value("messages", row))

    def _images(self, row: Row) -> list[Any]:
        """What the row holds of its images, in order."""
        cells = [read(row) for read in self.image_columns]
        if len(cells) > 1:
            while cells and cells[-1] is None:
                cells.pop()
        images: list[Any] = []
        for cell in cells:
            if isinstance(cell, np.ndarray) and cell.dtype == object:
                cell = cell.tolist()
            images += cell if isinstance(cell, (list, tuple)) else [cell]
        if self.image_columns and not images:
            raise InvalidValueError("there is no image: the list is empty, or its columns are")
        return images


def _image(given: Any, name: str, folder: Path | None) -> Any:
    """An image that opens late, whatever the row holds of it; PIL images and arrays stay as they are."""
    if isinstance(given, LateImage):
        source = given.file
        if isinstance(source, Cell) and folder is not None:
            return LateImage(_CellIn(source, folder), name)
        return LateImage(source, name)
    if isinstance(given, Mapping):
        return _image(LateImage(Cell(given)), name, folder)
    if isinstance(given, bytes):
        return LateImage(given, name)
    if isinstance(given, (str, Path)):
        return LateImage(_path(str(given), folder), name)
    if given is None:
        raise InvalidValueError("there is no image: its column is empty")
    if isinstance(given, (Image.Image, np.ndarray)):
        return given
    raise InvalidTypeError(
        f"the image is {shown(given)}; expected a path, the bytes of an image file, a PIL image, or the image column "
        "of a dataset"
    )


class _CellIn(Cell):
    """A cell whose path, where it has one, lies in a folder."""

    def __init__(self, cell: Cell, folder: Path) -> None:
        super().__init__(cell)
        self._cell, self._folder = cell, folder

    def __call__(self) -> Any:
        found = self._cell()
        return _path(found, self._folder) if isinstance(found, str) else found

    def key(self) -> bytes:
        return self._cell.key()


def _path(name: str, folder: Path | None) -> Path:
    if name.startswith(("http://", "https://")):
        raise InvalidValueError(
            f"the image is the URL {name!r}: nothing is downloaded; fetch it and name its path"
        )
    if folder is None:
        return Path(name)
    if Path(name).is_absolute() and Path(name).is_relative_to(folder.absolute()):
        return Path(name)
    return path_within(folder, name, "the image")


def _answer(value: Any, candidates: Sequence[str]) -> tuple[str, list[str]]:
    """The answer, and all that are right."""
    value = _plain_list(value)
    if isinstance(value, (list, tuple)):
        if not value:
            raise InvalidValueError(
                "the answer is an empty list; expected a text, or a list that begins with it"
            )
        texts = [_text(f"answer {at} of {len(value)}", each) for at, each in enumerate(value)]
        return texts[0], texts
    if isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_)):
        if not candidates:
            raise InvalidTypeError(
                f"the answer is {shown(value)}, a number, and there are no candidates that it could count; as a text "
                "it is given by a function: answer=lambda row: str(row[...])"
            )
        if not 0 <= int(value) < len(candidates):
            raise InvalidValueError(
                f"the answer is candidate {value}, counted from 0, and there are {len(candidates)} candidates"
            )
        return candidates[int(value)], []
    if isinstance(value, (bool, np.bool_)):
        raise InvalidTypeError(
            f"the answer is {shown(value)}; expected a text: answer=lambda row: 'yes' if row[...] else 'no'"
        )
    answer = _text("answer", value)
    if candidates and answer not in candidates:
        at = ord(answer) - ord("A") if len(answer) == 1 else -1
        hint = (
            f"; if it is the letter of a candidate, that is {candidates[at]!r}: "
            "answer=lambda row: row[...]['ABCDEFGH'.index(row[...])]"
            if 0 <= at < len(candidates)
            else ""
        )
        raise InvalidValueError(f"the answer {answer!r} is none of the candidates {list(candidates)}{hint}")
    return answer, []


def _text(argument: str, value: Any) -> str:
    if value is None:
        raise InvalidValueError(f"the {argument} is missing")
    if not isinstance(value, str):
        raise InvalidTypeError(f"the {argument} is {shown(value)}; expected a text")
    if not value.strip():
        raise InvalidValueError(f"the {argument} is empty ({value!r}); expected a text")
    return value


def _texts(argument: str, value: Any) -> list[str]:
    value = _written_list(_plain_list(value))
    if value is None:
        return []
    given = listed(f"the {argument}", value, "a list of texts")
    return [_text(f"candidate {at}", each) for at, each in enumerate(given)]


def _name(argument: str, value: Any) -> str:
    """An id or the like: a text, or a whole number, which is written as one."""
    if isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_)):
        return str(int(value))
    return _text(argument, value)


def _content_id(said_of_row: tuple[Any, ...], images: Sequence[Any]) -> str:
    """An id by what the row says and shows, so that a row has the same one wherever it stands."""
    digest = hashlib.blake2b(
        json.dumps(said_of_row, ensure_ascii=False).encode(errors="replace"), digest_size=8
    )
    for image in images:
        digest.update(key_of_image(image))
    return digest.hexdigest()
