"""Models that read images by cross-attention, whose image keys are at no position of the prompt."""

from __future__ import annotations

from mmlens.errors import InvalidTypeError
from mmlens.model.hooked_vlm import HookedVLM, model_of


class CrossAttentionError(InvalidTypeError):
    """Attention from positions to positions was asked of a model whose images are at no position."""


def refuse_cross_attention(model: HookedVLM) -> None:
    """Raise CrossAttentionError for a model whose image keys are at no position of the prompt."""
    family = model_of(model).family
    if family.reads_by_cross_attention:
        raise CrossAttentionError(
            f"{family.model_type} reads images by cross-attention: the keys there are image patches, and no "
            "position of the prompt is one, so no attention goes from the question to the image's positions. Hooks "
            "read the patterns of those layers (attn.hook_pattern)"
        )
