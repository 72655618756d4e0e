"""What is known of a published data set: where it is, what its rows hold, and how a row becomes examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from mmlens.data.examples import Example
from mmlens.data.images import LateImage
from mmlens.data.tables import Rows

Row = Mapping[str, Any]

Checked = Literal["published rows", "card", "not"]
"""What an entry's columns were held to: rows that the authors published, its card or public code, nothing."""


@runtime_checkable
class Files(Protocol):
    """The files of a data set beside its rows: in the folder with the published files, or on the hub.

    Names are relative, with slashes, as the authors' own repository has them.
    """

    split: str
    """The split that is read."""

    def path(self, name: str) -> Path:
        """The file of this name; of the hub it is fetched. MissingFileError where there is none."""

    def first(self, *names: str) -> Path:
        """The first of these that there is; MissingFileError, which names all, where there is none."""

    def find(self, name: str) -> Path | None:
        """The file that is called so in whatever folder, None where there is none: of optional files."""

    def table(self, pattern: str) -> Rows:
        """The rows of the parquet files that match, read by their numbers; opened once."""

    def row_numbers(self, pattern: str, column: str) -> Mapping[Any, int]:
        """Of such a table, which row holds which value of a column; read once."""

    def pages(self, name: str) -> list[LateImage]:
        """The pages of a PDF file, each drawn when it opens."""


@dataclass(frozen=True)
class EvidenceData:
    """A published data set.

    `hub` is its repository on the Hugging Face hub ("" where it is not there), with `config` where that has several;
    `splits` are the names of its splits, the default first. `revision` is the commit that a public source names, None
    where none does. `files` are what to read where the data are no table that `datasets` finds by itself (split ->
    pattern within the repository, or within a folder with the published files). `columns` names the columns that `read`
    needs, with their types.

    `own_files` are the files in which the authors themselves published it (split -> pattern), where the hub's copy has
    others; `other_names` says what a column is called there, None where it is not there.

    `evidence` says in words what holds the answer, `group` what is kept on one side of a split.

    `read(row, files)` gives the examples of one row: none, one, or several. `files` finds what rows name and do not
    hold: pages, frames, images. Whatever more arguments `read` has, by name and with a default, are options of loading.
    """

    name: str
    title: str
    hub: str
    splits: tuple[str, ...]
    columns: Mapping[str, str]
    read: Callable[..., Iterable[Example]]
    evidence: str
    group: str
    licence: str
    size: str
    cite: str
    source: str
    checked: Checked
    config: str | None = None
    revision: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    own_files: Mapping[str, str] = field(default_factory=dict)
    other_names: Mapping[str, str | None] = field(default_factory=dict)
    overlaps: tuple[str, ...] = ()
    """Names of data sets that hold the same documents, images or videos."""
    fetch: str = ""
    """The command that fetches the published files, where that is not `hf download` of all of `hub`."""
    notes: str = ""
    one_each: bool = False
    """Whether every row is one example, so that examples have numbers."""
