"""The families mmlens knows, one record each."""

from __future__ import annotations

import warnings

from mmlens.families.layouts import anyres, block_grid, fixed_grid, tiles
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
        Family("vipllava"),
        Family("video_llava"),
        Family("llava_next"),
        Family("llava_next_video"),
        Family("granite4_vision"),
        Family("fast_vlm"),
        Family("deepseek_vl"),
        Family("deepseek_vl_hybrid"),
        Family("janus"),
        Family("perception_lm"),
        Family("pixtral"),
        Family("mistral3"),
        Family("lighton_ocr"),
        Family("mistral_large4"),
        # qwen_like
        Family("qwen2_vl"),
        Family("exaone4_5"),
        Family("hyperclovax_vision_v2"),
        Family("qwen2_5_omni_thinker"),
        Family("qwen3_vl_moe"),
        Family("cosmos3_omni"),
        Family("cohere_compass"),
        Family("qwen3_omni_moe_thinker"),
        Family("qwen3_5"),
        Family("qwen3_5_moe"),
        Family("qwen4_exp"),
        Family("video_llama_3"),
        Family("cosmos3_edge"),
        Family("minimax_m3_vl"),
        # glm_like
        Family("glm4v"),
        Family("glm46v"),
        Family("glmga"),
        Family("glm_ocr"),
        Family("glm4v_moe"),
        Family("glm5_next"),
        Family("paddleocr_vl"),
        Family("ernie4_5_vl_moe"),
        Family("hunyuan_vl"),
        Family("kimi_k25"),
        Family("muse_glimmer"),
        Family("muse_spark"),
        Family("dots3_note"),
        Family("nemotron_h_omni"),
        # pooled
        Family("gemma3"),
        Family("shieldgemma2"),
        Family("gemma3n"),
        Family("gemma4"),
        Family("gemma4_unified"),
        Family("paligemma"),
        Family("aya_vision"),
        Family("cohere2_vision"),
        Family("qianfan_ocr"),
        Family("lfm2_vl"),
        Family("lfm3_vl"),
        Family("llama4"),
        Family("ovis2"),
        Family("idefics2"),
        Family("granite_docling"),
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
        Family("blip-2"),
        Family("instructblip"),
        Family("instructblipvideo"),
        Family("mllama"),
        Family("idefics"),
        Family("kosmos-2"),
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
