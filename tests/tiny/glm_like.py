"""GLM-V and other packed-patch towers."""

from __future__ import annotations

from tiny.base import TinyFamily

FAMILIES: tuple[TinyFamily, ...] = ()
