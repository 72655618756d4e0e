"""Figures as files, and those files inlined in a page."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

_MARGIN = 0.05
"""Inches of white around a figure."""


def picture_files(figure: Figure, folder: Path, stem: str) -> float:
    """Write a figure as `stem`.svg and `stem`.png (twice as fine as its dpi), and return its width in inches."""
    folder.mkdir(parents=True, exist_ok=True)
    # Without a salt the names inside an SVG, and so the file, would differ from run to run.
    with matplotlib.rc_context({"svg.hashsalt": "mmlens", "svg.fonttype": "path"}):
        _save(figure, folder / f"{stem}.svg", metadata={"Date": None, "Creator": None})
    _save(figure, folder / f"{stem}.png", dpi=2 * figure.dpi, metadata={"Software": None})
    # Said in inches so that text has one size in all figures, however wide they are.
    return figure.get_tightbbox().width + 2 * _MARGIN


def _save(figure: Figure, path: Path, **options: Any) -> None:
    figure.savefig(path, bbox_inches="tight", pad_inches=_MARGIN, **options)


def inlined(stem: Path, largest: int) -> str:
    """The picture that `picture_files` wrote as a data URL, in at most `largest` bytes where that can be.

    As SVG where that fits, else as WebP, ever coarser down to a quarter of the width.
    """
    data, kind = stem.with_suffix(".svg").read_bytes(), "svg+xml"
    if 4 * len(data) > 3 * largest:  # base64 takes four bytes for three
        with Image.open(stem.with_suffix(".png")) as picture:
            pixels = picture.convert("RGB")
        kind = "webp"
        for scale in (1, 0.7, 0.5, 0.25):
            buffer = io.BytesIO()
            size = (max(1, round(scale * pixels.width)), max(1, round(scale * pixels.height)))
            pixels.resize(size, Image.Resampling.LANCZOS).save(buffer, "webp", quality=80, method=4)
            data = buffer.getvalue()
            if 4 * len(data) <= 3 * largest:
                break
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
