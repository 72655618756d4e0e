"""Every model type of the mapping is supported or refused, and what a refusal says of it is so."""

from __future__ import annotations

import inspect

import pytest
import tiny
import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mmlens.errors import MmlensError
from mmlens.families.catalog import FAMILIES
from mmlens.families.refused import BROKEN, REFUSED
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.support import support_table

IMAGE_INPUTS = {"pixel_values", "flattened_patches"}


def test_every_model_type_of_the_mapping_is_supported_or_refused() -> None:
    assert not set(FAMILIES) & set(REFUSED)
    assert set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) <= set(FAMILIES) | set(REFUSED)
    newest = transformers.__version__.startswith("5.24.")
    assert not newest or set(REFUSED) <= set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


@pytest.mark.parametrize("model_type", [name for name in REFUSED if name in CONFIG_MAPPING])
def test_refusals_say_what_is_so(model_type: str) -> None:
    reason = REFUSED[model_type]
    is_encoder_decoder = getattr(CONFIG_MAPPING[model_type], "is_encoder_decoder", False)
    assert reason.startswith("encoder-decoder") == (is_encoder_decoder is True)
    model_class = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type])
    takes_images = bool(IMAGE_INPUTS & set(inspect.signature(model_class.forward).parameters))
    # The block-diffusion model hands its images to the encoder by keyword.
    assert ("takes no image" in reason) == (not takes_images and model_type != "diffusion_gemma")


@pytest.mark.parametrize("family", [pytest.param(name, id=f"canary of {name}") for name in BROKEN])
@torch.no_grad()
def test_what_transformers_breaks_is_broken_and_nothing_more(family: str) -> None:
    """With plain transformers: where this fails, BROKEN in families/refused.py no longer says what is so."""
    plain, inputs = tiny.tiny_model(family), tiny.tiny_inputs(family, [1])
    version, why = BROKEN[family]
    try:
        plain(**inputs)
    except AttributeError as error:
        assert transformers.__version__ == version, (
            f"transformers {transformers.__version__} still does not run {family}: {error}; name this release in BROKEN"
        )
        assert "image_outputs" in str(error) and "image_outputs" in why
        with pytest.raises(MmlensError, match=f"{family}.*transformers {version} is broken.*5.23 runs it"):
            HookedVLM(plain)
        table = support_table().set_index("family")
        assert table.loc[family, "status"] == "refused" and version in table.loc[family, "notes"]
        return
    assert transformers.__version__ != version, (
        f"transformers {version} has mended {family}: take its row out of BROKEN, and its tests run again"
    )
    HookedVLM(plain)
    assert support_table().set_index("family").loc[family, "status"] != "refused"


@pytest.mark.skipif("inkling2_loop" not in CONFIG_MAPPING, reason="new in transformers 5.24")
@torch.no_grad()
def test_the_layers_of_inkling2_loop_run_several_times() -> None:
    """What its refusal says, with plain transformers."""
    config = CONFIG_MAPPING["inkling2_loop"](
        text_config={**tiny.tiny_config("inkling2").text_config.to_dict(), **_LOOP},
        vision_config=tiny.tiny_config("inkling2").vision_config.to_dict(),
    )
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    calls = []
    for index, layer in enumerate(model.get_decoder().layers):
        layer.register_forward_hook(lambda *args, index=index: calls.append(index))
    model(input_ids=torch.tensor([[5, 6, 7]]))
    assert calls == [0, 1, 2, 1, 2]
    with pytest.raises(MmlensError, match="inkling2_loop.*several times in one forward pass"):
        HookedVLM(model)


_LOOP = {
    "model_type": "inkling2_loop_text",
    "n_layers_per_attn_res_block": 1,
    "loop_layer_index_start": 1,
    "loop_layer_index_end": 3,
    "loop_num_passes": 2,
    "loop_gate_rank": 4,
}
