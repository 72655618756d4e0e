"""Qwen-VL's relatives: packed patches, a 2 x 2 merger, image_grid_thw."""

from __future__ import annotations

from tiny.base import TinyFamily

FAMILIES: tuple[TinyFamily, ...] = ()
