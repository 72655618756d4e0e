"""OCR models, visual codes, and towers of their own kind."""

from __future__ import annotations

from tiny.base import TinyFamily

FAMILIES: tuple[TinyFamily, ...] = ()
