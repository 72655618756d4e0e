"""The files of a published data set beside its rows: in a folder, or fetched from the hub as they are asked for."""

from __future__ import annotations

import fnmatch
import functools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmlens.data.examples import DataError
from mmlens.data.images import LateImage
from mmlens.data.published.record import EvidenceData
from mmlens.data.tables import Rows, rows_of
from mmlens.errors import MissingFileError
from mmlens.files import path_within


class PublishedFiles:
    """The `Files` of record.py: those of a folder, or, where `folder` is None, of the hub at one commit."""

    def __init__(
        self, data_set: EvidenceData, split: str, folder: Path | None, commit: str | None = None
    ) -> None:
        self.data_set, self.split, self.folder, self.commit = data_set, split, folder, commit
        self._tables: dict[str, Rows] = {}
        self._numbers: dict[tuple[str, str], Mapping[Any, int]] = {}

    def path(self, name: str) -> Path:
        """The path of a published file, fetched where it is on the hub.

        Raises InvalidValueError for a name that leads out of the folder, MissingFileError for a file that there is not.
        """
        if self.folder is not None:
            path = _within(self.folder, name)
            if not path.exists():
                raise MissingFileError(f"there is no {name!r} in {str(self.folder)!r}{self.to_fetch()}")
            return path
        import httpx
        import huggingface_hub

        if Path(name).is_absolute() and Path(name).is_relative_to(huggingface_hub.constants.HF_HUB_CACHE):
            return Path(name)
        try:
            fetched = huggingface_hub.hf_hub_download(
                self.data_set.hub, name, repo_type="dataset", revision=self.commit
            )
        except (OSError, httpx.HTTPError, huggingface_hub.errors.EntryNotFoundError) as error:
            raise MissingFileError(
                f"{name!r} of {self.data_set.hub} cannot be fetched ({first_line(error)}){self.to_fetch()}"
            ) from error
        return Path(fetched)

    def first(self, *names: str) -> Path:
        """The first of these that there is; MissingFileError, which names all, where there is none."""
        for name in names:
            if name in self._on_hub if self.folder is None else _within(self.folder, name).exists():
                return self.path(name)
        where = self.data_set.hub if self.folder is None else repr(str(self.folder))
        raise MissingFileError(f"there is none of {', '.join(map(repr, names))} in {where}{self.to_fetch()}")

    def find(self, name: str) -> Path | None:
        """The file that is called so in whatever folder, None where there is none."""
        if self.folder is not None:
            return next(iter(sorted(self.folder.rglob(name))), None)
        found = [each for each in sorted(self._on_hub) if each.rsplit("/", 1)[-1] == name]
        return self.path(found[0]) if found else None

    def table(self, pattern: str) -> Rows:
        """The rows of further tables, of all files that match; opened once."""
        if pattern not in self._tables:
            self._tables[pattern] = self._read(pattern)
        return self._tables[pattern]

    def row_numbers(self, pattern: str, column: str) -> Mapping[Any, int]:
        """Of such a table, which row holds which value of a column; read once."""
        if (pattern, column) not in self._numbers:
            rows = self.table(pattern)
            self._numbers[pattern, column] = {row[column]: number for number, row in enumerate(rows)}
        return self._numbers[pattern, column]

    def pages(self, name: str) -> list[LateImage]:
        """The pages of a PDF file, each drawn when it opens."""
        from mmlens.data.published.pdf import pdf_pages

        return pdf_pages(self.path(name))

    def to_fetch(self) -> str:
        """The end of a message: what fetches the files."""
        command = self.data_set.fetch or download_command(self.data_set, self.commit)
        if not command:
            return f". Its files come from their authors: {self.data_set.source}"
        return f": `{command}` fetches its files, for data_dir='FOLDER' (--data-dir FOLDER)"

    def _read(self, pattern: str) -> Rows:
        import datasets

        if self.folder is not None:
            found = matches(self.folder, pattern)
        else:
            found = [
                str(self.path(name)) for name in sorted(self._on_hub) if fnmatch.fnmatchcase(name, pattern)
            ]
        if not found:
            where = self.data_set.hub if self.folder is None else repr(str(self.folder))
            raise MissingFileError(f"there is no file {pattern!r} in {where}{self.to_fetch()}")
        try:
            table = datasets.load_dataset(builder_of(found), data_files=found, split="train")
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"{found[0]!r} cannot be read as a table ({first_line(error)})") from error
        return rows_of(table, f"{self.data_set.name} {pattern}")

    @functools.cached_property
    def _on_hub(self) -> frozenset[str]:
        import huggingface_hub

        api = huggingface_hub.HfApi()
        return frozenset(api.list_repo_files(self.data_set.hub, repo_type="dataset", revision=self.commit))


def download_command(data_set: EvidenceData, revision: str | None = None) -> str:
    """What fetches the published files from the hub into a folder; "" for a data set that is not there."""
    if not data_set.hub:
        return ""
    command = ["hf", "download", "--repo-type", "dataset", data_set.hub]
    revision = revision or data_set.revision
    return f"{shlex.join(command + (['--revision', revision] if revision else []))} --local-dir FOLDER"


def _within(folder: Path, name: str) -> Path:
    if Path(name).is_absolute() and Path(name).is_relative_to(folder):
        name = str(Path(name).relative_to(folder))
    # A snapshot of the hub's cache is made of links to files that lie beside it.
    if folder.parent.name == "snapshots" and not Path(name).is_absolute() and ".." not in Path(name).parts:
        return folder / name
    return path_within(folder, name, "the file")


_BUILDERS = {
    "json": "json",
    "jsonl": "json",
    "parquet": "parquet",
    "csv": "csv",
    "tsv": "csv",
    "arrow": "arrow",
}


def builder_of(files: Sequence[str]) -> str:
    """What `datasets` calls its reader of these files; DataError where it has none."""
    ending = Path(files[0]).name.rpartition(".")[2].lower()
    if ending not in _BUILDERS:
        raise DataError(f"{files[0]!r} is no table; expected a file that ends in .{', .'.join(_BUILDERS)}")
    return _BUILDERS[ending]


def matches(folder: Path, pattern: str) -> list[str]:
    """The files of a folder that match a pattern, in order."""
    return sorted(str(path) for path in folder.glob(pattern) if path.is_file())


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}".removesuffix(".")
