"""Every model type of the mapping is supported or refused, and what a refusal says of it is so."""

from __future__ import annotations

import inspect

import pytest
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mmlens.families.catalog import FAMILIES
from mmlens.families.refused import REFUSED

IMAGE_INPUTS = {"pixel_values", "flattened_patches"}


def test_every_model_type_of_the_mapping_is_supported_or_refused() -> None:
    assert not set(FAMILIES) & set(REFUSED)
    assert set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) <= set(FAMILIES) | set(REFUSED)
    assert set(REFUSED) <= set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


@pytest.mark.parametrize("model_type", REFUSED)
def test_refusals_say_what_is_so(model_type: str) -> None:
    reason = REFUSED[model_type]
    is_encoder_decoder = getattr(CONFIG_MAPPING[model_type], "is_encoder_decoder", False)
    assert reason.startswith("encoder-decoder") == (is_encoder_decoder is True)
    model_class = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type])
    takes_images = bool(IMAGE_INPUTS & set(inspect.signature(model_class.forward).parameters))
    # The block-diffusion model hands its images to the encoder by keyword.
    assert ("takes no image" in reason) == (not takes_images and model_type != "diffusion_gemma")
