"""The families mmlens knows, one record each."""

from __future__ import annotations

import warnings

from mmlens.families.layouts import (
    anyres,
    block_grid,
    fixed_grid,
    framed_grid,
    padded_grid,
    pooled_grid,
    queries,
    resized_grid,
    stretched,
    thumbnail_first,
    tiles,
)
from mmlens.families.record import DeepInjection, Family, Stack
from mmlens.families.refused import REFUSED
from mmlens.hook_names import unknown_name_message


def _deepstack(mergers: str) -> DeepInjection:
    """Qwen3-VL's: one merger for each of the first language layers."""
    return DeepInjection(
        after=lambda config: list(range(len(config.vision_config.deepstack_visual_indexes))), mergers=mergers
    )


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llava", layout=fixed_grid.llava),
        Family("llava_onevision", layout=anyres.llava_onevision),
        Family("qwen2_5_vl", layout=block_grid.qwen),
        Family(
            "qwen3_vl",
            layout=block_grid.qwen,
            deep_injection=_deepstack("model.visual.deepstack_merger_list"),
        ),
        Family("internvl", layout=tiles.internvl, vision=Stack(norm="model.vision_tower.layernorm")),
        Family("idefics3", layout=tiles.idefics3, vision=Stack(norm="model.vision_model.post_layernorm")),
        Family("smolvlm", layout=tiles.idefics3, vision=Stack(norm="model.vision_model.post_layernorm")),
        # llava_like
        Family("vipllava", layout=fixed_grid.llava),
        Family("video_llava", layout=fixed_grid.llava),
        Family("llava_next", layout=anyres.llava_next),
        Family("llava_next_video", layout=anyres.llava_next),
        Family("granite4_vision", layout=anyres.llava_next),
        Family("fast_vlm", layout=fixed_grid.llava),
        Family("deepseek_vl", layout=fixed_grid.deepseek),
        Family("deepseek_vl_hybrid", layout=fixed_grid.deepseek),
        Family("janus", layout=fixed_grid.deepseek),
        Family("perception_lm", layout=thumbnail_first.perception),
        Family("pixtral", layout=resized_grid.pixtral),
        Family("mistral3", layout=resized_grid.pixtral),
        Family("lighton_ocr", layout=resized_grid.pixtral),
        Family("mistral_large4", layout=resized_grid.pixtral),
        # qwen_like
        Family("qwen2_vl", layout=block_grid.qwen),
        Family("exaone4_5", layout=block_grid.qwen),
        Family("hyperclovax_vision_v2", layout=block_grid.qwen),
        Family("qwen2_5_omni_thinker", layout=block_grid.qwen),
        Family("qwen3_vl_moe", layout=block_grid.qwen),
        Family("cosmos3_omni", layout=block_grid.qwen),
        Family("cohere_compass", layout=block_grid.qwen),
        Family("qwen3_omni_moe_thinker", layout=block_grid.qwen),
        Family("qwen3_5", layout=block_grid.qwen),
        Family("qwen3_5_moe", layout=block_grid.qwen),
        Family("qwen4_exp", layout=block_grid.qwen),
        Family("video_llama_3", layout=block_grid.qwen),
        Family("cosmos3_edge", layout=block_grid.qwen),
        Family("minimax_m3_vl", layout=block_grid.qwen),
        # glm_like
        Family("glm4v", layout=block_grid.qwen),
        Family("glm46v", layout=block_grid.qwen),
        Family("glmga", layout=block_grid.qwen),
        Family("glm_ocr", layout=block_grid.qwen),
        Family("glm4v_moe", layout=block_grid.qwen),
        Family("glm5_next", layout=padded_grid.glm),
        Family("paddleocr_vl", layout=block_grid.qwen),
        Family("ernie4_5_vl_moe", layout=block_grid.qwen),
        Family("hunyuan_vl", layout=framed_grid.hunyuan),
        Family("kimi_k25", layout=padded_grid.kimi),
        Family("muse_glimmer", layout=block_grid.qwen),
        Family("muse_spark", layout=block_grid.qwen),
        Family("dots3_note", layout=block_grid.qwen),
        Family("nemotron_h_omni", layout=block_grid.nemotron),
        # pooled
        Family("gemma3", layout=stretched.gemma3),
        Family("shieldgemma2", layout=stretched.gemma3),
        Family("gemma3n"),
        Family("gemma4", layout=pooled_grid.gemma4),
        Family("gemma4_unified", layout=pooled_grid.gemma4_unified),
        Family("paligemma", layout=stretched.paligemma),
        Family("aya_vision", layout=tiles.aya),
        Family("cohere2_vision", layout=tiles.cohere2),
        Family("qianfan_ocr", layout=tiles.internvl),
        Family("lfm2_vl", layout=tiles.lfm2),
        Family("lfm3_vl", layout=block_grid.qwen),
        Family("llama4", layout=tiles.llama4),
        Family("ovis2", layout=tiles.ovis2),
        Family("idefics2", layout=queries.idefics2),
        Family("granite_docling", layout=tiles.granite_docling),
        # ocr_and_others
        Family("got_ocr2"),
        Family("pp_chart2table"),
        Family("chameleon"),
        Family("emu3"),
        Family("fuyu"),
        Family("molmo2"),
        Family("minicpmv4_6"),
        Family("minicpmv4_7"),
        Family("minicpm_ocr"),
        Family("step3p7"),
        Family("deepseek_ocr2"),
        Family("unlimited_ocr"),
        Family("aria"),
        Family("inkling2"),
        Family("inkling_mm_model"),
        # queries_and_cross
        Family("blip-2", layout=queries.per_image("num_query_tokens")),
        Family("instructblip", layout=queries.per_image("num_query_tokens")),
        # The frames of a clip are its images.
        Family(
            "instructblipvideo",
            layout=queries.per_image("num_query_tokens"),
            image_token="video_token_index",
        ),
        # Cross-attention reads their images: no position of the prompt is one.
        Family("mllama"),
        Family("idefics"),
        Family("kosmos-2", layout=queries.per_image("num_image_tokens")),
    )
}


class UnknownFamilyError(ValueError):
    """A model of a family that mmlens refuses."""


class UntestedFamilyWarning(UserWarning):
    """A model of a family that mmlens has no record of: its parts are found by the common names alone."""


def family_of(model_type: str) -> Family:
    """The record of a family; an empty one, with a warning, for a family that mmlens has never met.

    Raises UnknownFamilyError, with the reason, for a family that is refused.

    >>> family_of("qwen3_vl").layout.__name__
    'qwen'
    >>> family_of("pix2struct")
    Traceback (most recent call last):
        ...
    mmlens.families.catalog.UnknownFamilyError: 'pix2struct' is refused: ...
    """
    if model_type in REFUSED:
        raise UnknownFamilyError(f"{model_type!r} is refused: {REFUSED[model_type]}")
    if model_type not in FAMILIES:
        warnings.warn(
            unknown_name_message("record of the model family", model_type, FAMILIES)
            + ". Its parts are looked for under the common names; nothing about this family has been tested",
            UntestedFamilyWarning,
            stacklevel=2,
        )
        return Family(model_type, no_layout="the family is not known to mmlens")
    return FAMILIES[model_type]
