"""Rows of tables, whatever holds them: Hugging Face datasets, streams of them, pandas frames, lists of dicts.

Nothing is decoded here. Images of a row are `LateImage`s that read their cell of the table when they open.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from mmlens.arguments import shown
from mmlens.data.images import LateImage, pixel_fingerprint
from mmlens.errors import InvalidTypeError, InvalidValueError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows that are read when they are used: `at` gives one by its number, of a stream `start` all, anew each time.

    `columns` are the names of the columns, None where that is not known before a row was read; `labels` holds the names
    that stand for the whole numbers of a column of classes.
    """

    name: str
    columns: Sequence[str] | None = None
    n: int | None = None
    at: Callable[[int], Row] | None = None
    start: Callable[[], Iterable[Row]] | None = None
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Row]:
        if self.start is not None:
            return iter(self.start())
        assert self.at is not None and self.n is not None
        return map(self.at, range(self.n))


def rows_of(given: object, name: str | None = None) -> Rows:
    """The rows of a `datasets.Dataset` or `IterableDataset`, a pandas frame, or a list of dicts.

    Raises InvalidTypeError for anything else, with what to do.
    """
    for read in (_rows_of_datasets, _rows_of_frame, _rows_of_list):
        rows = read(given, name)
        if rows is not None:
            if rows.n == 0:
                raise InvalidValueError(f"{rows.name} has no rows; expected at least one")
            return rows
    raise InvalidTypeError(f"rows is {shown(given)}; expected {_EXPECTED}{_way_out(given)}")


_EXPECTED = "a datasets.Dataset or IterableDataset, a pandas DataFrame, or a list of dicts"


def _way_out(given: object) -> str:
    if isinstance(given, (str, Path)):
        return (
            ": of a hub id or files they are datasets.load_dataset(...), of a folder of mmlens' own format "
            "mmlens.load_examples(folder), of a name in `mmlens data` mmlens.load_data(name)"
        )
    if isinstance(given, Mapping):
        parts = [str(key) for key in list(given)[:6]]
        if type(given).__name__ in ("DatasetDict", "IterableDatasetDict"):
            return f": choose one of its splits {parts}, as dataset[{parts[0]!r}]" if parts else ""
        return ": of a dict of columns they are datasets.Dataset.from_dict(columns)"
    if isinstance(given, Iterator):
        return (
            ": a generator can be gone through once; datasets.IterableDataset.from_generator(function) makes one "
            "that begins anew"
        )
    if type(given).__module__.startswith("pyarrow"):
        return ": of an Arrow table they are datasets.Dataset(table)"
    return ""


# ------------------------------------------------------------------------------ Hugging Face datasets


def _rows_of_datasets(given: Any, name: str | None) -> Rows | None:
    # Whoever has a dataset has imported the package, which takes more than a second.
    datasets = sys.modules.get("datasets")
    if datasets is None or not isinstance(given, (datasets.Dataset, datasets.IterableDataset)):
        return None
    called = name or _name_of_dataset(given)
    features = given.features or {}
    labels = {
        column: tuple(feature.names)
        for column, feature in features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    if isinstance(given, datasets.IterableDataset):
        # Of features that are not known, nothing is decoded.
        plain = given.with_format(None)
        plain = plain.decode(False) if features else plain

        def stream() -> Iterator[Row]:
            for row in plain:
                yield {
                    column: _late(features.get(column), value, f"column {column!r}")
                    for column, value in row.items()
                }

        return Rows(called, list(features) or None, start=stream, labels=labels)
    if given.format["type"] == "custom":
        # A transform of the user's own says what a row is.
        return Rows(called, None, len(given), given.__getitem__)
    columns = list(given.column_names)
    table = given.with_format("arrow", columns=columns)

    def at(number: int) -> Row:
        # A slice of the memory-mapped table: nothing is read yet.
        return _ArrowRow(table[number], features)

    return Rows(called, columns, len(given), at, labels=labels)


def _name_of_dataset(dataset: Any) -> str:
    parts = (dataset.info.dataset_name, dataset.split)
    return "/".join(str(part) for part in parts if part) or "rows"


class _ArrowRow(Mapping[str, Any]):
    """One row of an Arrow table, whose cells are read as they are asked for."""

    def __init__(self, table: Any, features: Mapping[str, Any]) -> None:
        self._table, self._features = table, features

    def __getitem__(self, column: str) -> Any:
        if column not in self._table.column_names:
            raise KeyError(column)
        return _late(self._features.get(column), self._table.column(column)[0], f"column {column!r}")

    def __contains__(self, column: object) -> bool:
        return column in self._table.column_names

    def __iter__(self) -> Iterator[str]:
        return iter(self._table.column_names)

    def __len__(self) -> int:
        return self._table.num_columns


def _late(feature: Any, value: Any, where: str) -> Any:
    """A cell, of Arrow or of Python, as Python's own values, with a LateImage wherever its feature is an image."""
    if not _holds_images(feature):
        return _plain(value)
    if getattr(value, "is_valid", value is not None) is False:
        return None
    if isinstance(feature, dict):
        return {key: _late(of_key, value[key], where) for key, of_key in feature.items()}
    if hasattr(feature, "feature"):
        members = getattr(value, "values", value)
        return [_late(feature.feature, member, where) for member in members]
    return LateImage(Cell(value), where)


def _plain(value: Any) -> Any:
    return value.as_py() if hasattr(value, "as_py") else value


def _holds_images(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_holds_images, feature.values()))
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return _holds_images(inner)
    return type(feature).__name__ == "Image" and type(feature).__module__.startswith("datasets.")


class Cell:
    """What a table holds of an image, {"bytes", "path"}: read when it is called, by a LateImage."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __call__(self) -> Any:
        cell = _plain(self._value)
        if not isinstance(cell, Mapping):
            return cell
        if cell.get("bytes") is not None:
            return cell["bytes"]
        path = cell.get("path")
        return _remote(path) if isinstance(path, str) and ("://" in path or "::" in path) else path

    def key(self) -> bytes:
        """What tells this image from others, without reading a file: its bytes, or its path."""
        cell = _plain(self._value)
        if not isinstance(cell, Mapping):
            return key_of_image(cell)
        return key_of_image(cell.get("bytes") or cell.get("path"))


def _remote(path: str) -> bytes:
    """The bytes of a file in an archive or on the hub, as streams of `datasets` name them."""
    import fsspec

    with fsspec.open(path, "rb") as file:
        return file.read()


def key_of_image(image: Any) -> bytes:
    """What tells an image from others: the hash of its bytes, its path, or, of a PIL image, its pixels."""
    if isinstance(image, LateImage):
        source = image.file
        if isinstance(source, Cell):
            return source.key()
        return image.fingerprint.encode() if callable(source) else key_of_image(source)
    if isinstance(image, Mapping):
        return key_of_image(image.get("bytes") or image.get("path"))
    if isinstance(image, bytes):
        return hashlib.blake2b(image, digest_size=16).digest()
    if isinstance(image, Image.Image):
        return pixel_fingerprint(image).encode()
    return str(image).encode(errors="replace")


# ------------------------------------------------------------------------------ pandas, lists


def _rows_of_frame(given: object, name: str | None) -> Rows | None:
    if not isinstance(given, pd.DataFrame):
        return None
    columns = [str(column) for column in given.columns]
    twice = [column for at, column in enumerate(columns) if column in columns[:at]]
    if twice:
        raise InvalidValueError(f"two columns of the frame are called {twice[0]!r}")
    # By column: a row of a frame would make floats of whole numbers.
    values = {column: given.iloc[:, at].array for at, column in enumerate(columns)}

    def at(number: int) -> Row:
        return {column: _without_nan(array[number]) for column, array in values.items()}

    return Rows(name or "the frame", columns, len(given), at)


def _without_nan(value: Any) -> Any:
    """The value of a cell; pandas has several marks of one that holds none."""
    return None if pd.api.types.is_scalar(value) and pd.isna(value) else value


def _rows_of_list(given: Any, name: str | None) -> Rows | None:
    if isinstance(given, (str, bytes, Mapping, Path)) or not (
        hasattr(given, "__len__") and hasattr(given, "__getitem__")
    ):
        return None
    called = name or "the list"
    if not isinstance(given, (list, tuple)):
        # A Dataset of torch, or the like.
        return Rows(called, None, len(given), given.__getitem__)
    columns: dict[str, None] = {}
    for row in given:
        if isinstance(row, Mapping):
            columns.update(dict.fromkeys(map(str, row)))
    if given and not columns:
        raise InvalidTypeError(f"rows is a list of {shown(given[0])}; expected {_EXPECTED}")

    @functools.cache
    def empty() -> Row:
        return dict.fromkeys(columns)

    def at(number: int) -> Row:
        row = given[number]
        return {**empty(), **row} if isinstance(row, Mapping) else row

    return Rows(called, list(columns), len(given), at)
