"""Every entry is whole: its splits, columns, citation and overlaps are there."""

from __future__ import annotations

import inspect
import re

import pytest

from mmlens.data.published.catalog import CATALOG
from mmlens.data.published.record import EvidenceData
from mmlens.runs.methods import bibtex_entries


@pytest.mark.parametrize("entry", CATALOG.values(), ids=list(CATALOG))
def test_entries_are_whole(entry: EvidenceData) -> None:
    texts = (entry.title, entry.evidence, entry.group, entry.licence, entry.size, entry.source)
    assert all(text.strip() == text and text for text in texts) and entry.splits
    assert re.fullmatch(r"[a-z0-9-]+", entry.name)
    assert entry.cite in bibtex_entries()
    assert entry.revision is None or re.fullmatch("[0-9a-f]{40}", entry.revision)
    assert not entry.files or set(entry.files) == set(entry.splits)
    assert set(entry.own_files) <= set(entry.splits) and set(entry.other_names) <= set(entry.columns)
    assert bool(entry.hub) or entry.files
    assert all(entry.name in CATALOG[other].overlaps for other in entry.overlaps)
    options = list(inspect.signature(entry.read).parameters.values())[2:]
    assert all(each.default is not each.empty and f"{each.name}=" in entry.notes for each in options)
    assert "  " not in entry.notes + entry.source
