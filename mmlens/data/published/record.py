"""What is known of a published data set: where it is, what its rows hold, and how a row becomes examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mmlens.data.examples import Example

Row = Mapping[str, Any]

Checked = Literal["published rows", "card", "not"]
"""What an entry's columns were held to: rows that the authors published, the data set's card or code, nothing."""


@dataclass(frozen=True)
class EvidenceData:
    """A published data set.

    `hub` is its repository on the Hugging Face hub, with `config` where that has several; `splits` are the names of its
    splits, the default first. `revision` is the commit that a public source names, None where none does. `files` are
    what to fetch where the data are no table that `datasets` reads by itself (split -> pattern within the repository,
    or within a folder with the published files). `columns` names the columns that `read` needs, with their types.
    `evidence` says in words what holds the answer, `group` what is kept on one side of a split.

    `read(row, files)` gives the examples of one row: none, one, or several. `files` finds what rows name and do not
    hold: pages, frames, images.
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
    overlaps: tuple[str, ...] = ()
    """Names of data sets that hold the same documents, images or videos."""
    notes: str = ""
