"""Pages of PDF files as images that open late, by pypdfium2 (the extra `pdf`)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from PIL import Image

from mmlens.data.examples import DataError
from mmlens.data.images import LateImage
from mmlens.errors import MissingFileError, UnsupportedError

DOTS_PER_INCH = 144
"""How pages are drawn: two pixels a point, which is legible, and the resolution of MMLongBench-Doc's own code."""


def pdf_pages(path: Path, dpi: float = DOTS_PER_INCH) -> list[LateImage]:
    """The pages of a PDF file, in order; each is drawn when it opens.

    Raises MissingFileError (a FileNotFoundError), UnsupportedError where pypdfium2 is missing, DataError for a
    file that
    is no PDF.
    """
    return [
        LateImage(functools.partial(_drawn, path, page, dpi), f"page {page + 1} of {path.name}")
        for page in range(_n_pages(path))
    ]


@functools.lru_cache(maxsize=512)
def _n_pages(path: Path) -> int:
    document = _opened(path)
    try:
        return len(document)
    finally:
        document.close()


def _drawn(path: Path, page: int, dpi: float) -> Image.Image:
    document = _opened(path)
    try:
        return document[page].render(scale=dpi / 72).to_pil().convert("RGB")
    finally:
        document.close()


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise MissingFileError(f"there is no document {str(path)!r}")
    try:
        import pypdfium2
    except ImportError as error:
        raise UnsupportedError(
            f"{path.name} is a PDF, whose pages are drawn by pypdfium2: pip install 'mmlens[pdf]'"
        ) from error
    try:
        return pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        raise DataError(f"{path} is no PDF that can be read ({error})") from error
