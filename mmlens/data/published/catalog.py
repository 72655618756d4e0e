"""The data sets that can be named: a row each."""

from __future__ import annotations

from mmlens.data.published.record import EvidenceData

CATALOG: dict[str, EvidenceData] = {}
"""Entries by name."""
