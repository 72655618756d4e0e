"""The data sets that can be named: a row each."""

from __future__ import annotations

from mmlens.data.published import documents, pictures, videos
from mmlens.data.published.record import EvidenceData

CATALOG: dict[str, EvidenceData] = {
    entry.name: entry
    for entry in (
        pictures.REFCOCOG,
        videos.VIDSTG,
        documents.MMDOCIR,
        documents.MMLONGBENCH,
        documents.MMLONGBENCH_DOC,
        documents.SLIDEVQA,
        videos.MLVU,
        pictures.VISUALWEBBENCH,
        pictures.POPE,
        pictures.TEXTVQA,
        documents.DOCVQA,
        pictures.CHARTQA,
        pictures.VQAV2,
        pictures.GQA,
        pictures.NLVR,
        pictures.NLVR2,
        pictures.VSR,
        pictures.VSTAR,
        pictures.MMVP,
        pictures.VISUAL_GENOME,
    )
}
"""Entries by name."""
