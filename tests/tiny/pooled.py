"""Families whose tokens pool or shuffle a block of patches."""

from __future__ import annotations

from tiny.base import TinyFamily

FAMILIES: tuple[TinyFamily, ...] = ()
