"""Folders as data sets are published, with made-up rows."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Features
from PIL import Image


def png(width: int = 200, height: int = 100, colour: str | tuple[int, int, int] = "white") -> bytes:
    """An image file."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def cell(width: int = 200, height: int = 100) -> dict[str, Any]:
    """What a column of images holds."""
    return {"bytes": png(width, height), "path": None}


def write_parquet(path: Path, features: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Rows with exactly these columns, of exactly these types."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {column: [row[column] for row in rows] for column in features}
    datasets.Dataset.from_dict(columns, Features(features)).to_parquet(str(path))


def write_json(path: Path, rows: Sequence[Any], *, lines: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    path.write_text(text, encoding="utf-8")


def write_image(path: Path, width: int = 200, height: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "white").save(path)
