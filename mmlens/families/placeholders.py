"""Where a processor puts images into a prompt, and what single processors do otherwise than all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import ProcessorMixin

from mmlens.errors import PromptError
from mmlens.families.layouts.grids import Layout

POSITION_MASKS = ("image_embeds_position_mask",)
"""Inputs in which a processor itself marks the positions of images (Kosmos-2's)."""

PADDED_IMAGES = "cross_attention_mask"
"""The input of models that let what stands before an example's image look at the padding of those it lacks (Mllama)."""

DROP_ALPHA = ("Idefics2Processor",)
"""Processors that load images anew and lose the alpha channel, which all others lay over white."""

VALUES_AFTER_PROMPT: Mapping[str, Mapping[str, int]] = {"PaliGemmaProcessor": {"token_type_ids": 1}}
"""Inputs that change where the prompt ends: PaliGemma's prompt sees itself in both directions, an answer what is before
it. All others go on as they stood at the last position."""

_PLACEHOLDERS = ("image_placeholder_token", "image_token")
"""What processors call the text that stands for an image before it is expanded; the first that is there counts."""


def placeholder_of(processor: ProcessorMixin) -> str | None:
    """The text that stands for an image in a rendered prompt; None where the processor writes images by itself."""
    token = next((token for name in _PLACEHOLDERS if (token := getattr(processor, name, None))), None)
    return None if token is None else str(token)


def placeholders_of(processor: ProcessorMixin) -> dict[str, str]:
    """The texts that stand for an image and for a video in a rendered prompt, of those that the processor has."""
    found = {"image": placeholder_of(processor), "video": getattr(processor, "video_token", None)}
    known = {kind: str(token) for kind, token in found.items() if token}
    return known if len(set(known.values())) == len(known) else {"image": known["image"]}


def visual_positions(
    processor: ProcessorMixin, layout: Layout, inputs: Mapping[str, Any], *, videos: bool
) -> Bool[Tensor, "batch pos"]:
    """Where embeddings of images stand, and with `videos` those of videos. Raises as `image_positions`."""
    found = image_positions(processor, layout, inputs)
    token = getattr(processor, "video_token", None) if videos else None
    if token is None:
        return found
    return found | (inputs["input_ids"].cpu() == processor.tokenizer.convert_tokens_to_ids(str(token)))


def image_positions(
    processor: ProcessorMixin, layout: Layout, inputs: Mapping[str, Any]
) -> Bool[Tensor, "batch pos"]:
    """Where the images' embeddings stand: marked by the processor itself, or by the id of its image token.

    Raises PromptError for a processor that names no image token.
    """
    ids = inputs["input_ids"].cpu()
    if hasattr(layout, "visual_token"):
        token = layout.visual_token(processor)
        visual_id = None if token is None else processor.tokenizer.convert_tokens_to_ids(token)
        return torch.zeros_like(ids, dtype=torch.bool) if visual_id is None else ids == visual_id
    for name in POSITION_MASKS:
        if name in inputs:
            return inputs[name].cpu() == 1
    token_id = getattr(processor, "image_token_id", None)
    if token_id is None:
        # Where clips are all that a processor takes, frames stand at their token.
        token = placeholder_of(processor) or getattr(processor, "video_token", None)
        if token is None:
            raise PromptError(f"the processor {type(processor).__name__} names no image token")
        token_id = processor.tokenizer.convert_tokens_to_ids(str(token))
    return ids == token_id


def drops_alpha(processor: ProcessorMixin) -> bool:
    """Whether plain use of the processor shows the colours that lie under transparency."""
    return type(processor).__name__ in DROP_ALPHA


def values_after(processor: ProcessorMixin) -> Mapping[str, int]:
    """By input, what stands at the positions of an answer where that is not what stands at the prompt's last one."""
    return VALUES_AFTER_PROMPT.get(type(processor).__name__, {})


def sees_missing_images(inputs: Mapping[str, Any], n_images: Sequence[int]) -> bool:
    """Whether an example's logits depend on images that others of its batch have and it has not."""
    return PADDED_IMAGES in inputs and len(set(n_images)) > 1
