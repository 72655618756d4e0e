"""What differs between model families, as data: what cannot be found in the model itself.

An empty record means that everything is where `families/anatomy.py` looks by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmlens.families.layouts.grids import Layout, VideoLayout
from mmlens.hook_names import STREAM


@dataclass(frozen=True)
class Stack:
    """A transformer stack that discovery needs help with."""

    layers: str | None = None
    """Path of its list of layers from the model; None: discovered."""
    names: Mapping[str, str | tuple[str, ...] | None] = field(default_factory=dict)
    """Role (see names.ROLES) -> the attribute's path from the layer, or from the attention module for its
    projections, where it has an uncommon name; of several the first that is there (versions of transformers differ);
    None where the layer has no such part."""
    norm: str | None = None
    """Path from the model of the vision stack's last norm, where the features pass through it."""
    norm_pools: bool = False
    """Whether that norm runs a second time, on a pooled vector [image, d_vision] that no hook should see."""


@dataclass(frozen=True)
class DeepInjection:
    """Visual features that are added to the residual stream again, between language layers."""

    after: Callable[[Any], list[int]]
    """From the model's configuration: the layers after which they are added."""
    mergers: str
    """Path of the list of modules that make them."""


@dataclass(frozen=True)
class Family:
    """One family of vision-language models (`model_type` of its configuration)."""

    model_type: str
    layout: Layout | None = None
    """How its processor lays out image tokens; see families/layouts. None: prompts have no map, see `no_layout`."""
    no_layout: str = ""
    """Why there is no layout."""
    video_layout: VideoLayout | None = None
    """How its processor lays out the tokens of videos; None: a prompt with a video is refused."""
    language: Stack = Stack()
    vision: Stack | None = Stack()
    """None where images pass through no transformer stack."""
    more_stacks: Mapping[str, Stack] = field(default_factory=dict)
    """Prefix of the hook points -> further stacks (query transformers, second towers, gated cross-attention)."""
    projector: str | None = None
    """Path of the module from vision features to the language model's width; None: discovered, "": has none."""
    deep_injection: DeepInjection | None = None
    image_token: str | None = None
    """The configuration's attribute with the id at visual positions; None: discovered, "": the text has none."""
    image_positions: str = ""
    """The model input that marks visual positions by a mask, where no token id does."""
    feature_layer: str | Callable[[Any], list[int]] = "vision_feature_layer"
    """The configuration's attribute (of a layer or a list of layers) after which the features are taken, or a function
    from the configuration to these layers."""
    stream: str = STREAM
    """The axes of the residual stream between layers, where it is no single vector per position."""
    past_the_stream: str = ""
    """How the embeddings reach later layers past the residual stream, where they do."""
    adds: bool = True
    """Whether a layer's output is its input plus hook_attn_out plus hook_mlp_out, and nothing more."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Pattern of hook points (layer numbers written {l}) that this family, or some of its layers, does not have
    -> why. "other attention" stands for attention that has no hook points at all."""

    @property
    def reads_by_cross_attention(self) -> bool:
        """Whether no position of a prompt is an image's: the language model looks at images from outside."""
        return self.image_token == "" and not self.image_positions
