"""What differs between model families, as data: where things stand, and how image tokens are laid out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stack:
    """A transformer stack. `layers` and `final_norm` are paths from the model, the others from a layer."""

    layers: str
    attention: str
    norm1: str
    norm2: str
    mlp: str
    qkv: tuple[str, ...]
    """Paths from the attention module: ("q_proj", "k_proj", "v_proj"), or one fused projection."""
    out_proj: str
    final_norm: str | None = None


@dataclass(frozen=True)
class DeepInjection:
    """Visual features added to the stream again after the first layers, one merger per layer."""

    mergers: str
    owner: str
    method: str


@dataclass(frozen=True)
class Family:
    """One family of vision-language models (`model_type` of its configuration)."""

    model_type: str
    layout: Callable[..., Any] | None = None
    """How its processor lays out image tokens; see families/layouts."""
    language: Stack | None = None
    vision: Stack | None = None
    projector: str | None = None
    deep_injection: DeepInjection | None = None
    image_token: str = "image_token_id"
    """The configuration's attribute that holds the id at visual positions."""
    feature_layer: str | None = None
    """The configuration's attribute that says after which vision layer the features are taken."""
