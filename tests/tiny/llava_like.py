"""LLaVA's relatives: a CLIP, SigLIP or Pixtral tower and a projector."""

from __future__ import annotations

from tiny.base import TinyFamily

FAMILIES: tuple[TinyFamily, ...] = ()
