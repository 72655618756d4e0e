"""The families mmlens knows, one record each."""

from __future__ import annotations

from mmlens.families.layouts import anyres, block_grid, fixed_grid, tiles
from mmlens.families.record import DeepInjection, Family, Stack
from mmlens.hook_names import unknown_name_message


def _decoder(language_model: str) -> Stack:
    """The decoder that Llama, Qwen2, Qwen3 and their relatives share."""
    return Stack(
        layers=f"{language_model}.layers",
        attention="self_attn",
        norm1="input_layernorm",
        norm2="post_attention_layernorm",
        mlp="mlp",
        qkv=("q_proj", "k_proj", "v_proj"),
        out_proj="o_proj",
        final_norm=f"{language_model}.norm",
    )


def _clip_like(tower: str, final_norm: str | None = None) -> Stack:
    """The encoder that CLIP, SigLIP and Idefics3 share; its last norm counts only where the features pass it."""
    return Stack(
        layers=f"{tower}.encoder.layers",
        attention="self_attn",
        norm1="layer_norm1",
        norm2="layer_norm2",
        mlp="mlp",
        qkv=("q_proj", "k_proj", "v_proj"),
        out_proj="out_proj",
        final_norm=final_norm,
    )


_QWEN_TOWER = Stack(
    layers="model.visual.blocks",
    attention="attn",
    norm1="norm1",
    norm2="norm2",
    mlp="mlp",
    qkv=("qkv",),
    out_proj="proj",
)

_INTERNVL_TOWER = Stack(
    layers="model.vision_tower.encoder.layer",
    attention="attention",
    norm1="layernorm_before",
    norm2="layernorm_after",
    mlp="mlp",
    qkv=("q_proj", "k_proj", "v_proj"),
    out_proj="projection_layer",
    final_norm="model.vision_tower.layernorm",
)


def _idefics(model_type: str) -> Family:
    return Family(
        model_type=model_type,
        language=_decoder("model.text_model"),
        vision=_clip_like("model.vision_model", final_norm="model.vision_model.post_layernorm"),
        projector="model.connector",
        layout=tiles.idefics3,
    )


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="llava",
            language=_decoder("model.language_model"),
            vision=_clip_like("model.vision_tower"),
            projector="model.multi_modal_projector",
            layout=fixed_grid.llava,
            feature_layer="vision_feature_layer",
        ),
        Family(
            model_type="llava_onevision",
            language=_decoder("model.language_model"),
            vision=_clip_like("model.vision_tower"),
            projector="model.multi_modal_projector",
            layout=anyres.llava_onevision,
            feature_layer="vision_feature_layer",
        ),
        Family(
            model_type="qwen2_5_vl",
            language=_decoder("model.language_model"),
            vision=_QWEN_TOWER,
            projector="model.visual.merger",
            layout=block_grid.qwen,
        ),
        Family(
            model_type="qwen3_vl",
            language=_decoder("model.language_model"),
            vision=_QWEN_TOWER,
            projector="model.visual.merger",
            layout=block_grid.qwen,
            deep_injection=DeepInjection(
                mergers="model.visual.deepstack_merger_list",
                owner="model.language_model",
                method="_deepstack_process",
            ),
        ),
        Family(
            model_type="internvl",
            language=_decoder("model.language_model"),
            vision=_INTERNVL_TOWER,
            projector="model.multi_modal_projector",
            layout=tiles.internvl,
            feature_layer="vision_feature_layer",
        ),
        _idefics("idefics3"),
        _idefics("smolvlm"),
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
    """A model whose family mmlens has no record of."""


def family_of(model_type: str) -> Family:
    """The record of a family; raises UnknownFamilyError with the families there are.

    >>> family_of("qwen3_vl").projector
    'model.visual.merger'
    >>> family_of("qwen3vl")
    Traceback (most recent call last):
        ...
    mmlens.families.catalog.UnknownFamilyError: there is no model family 'qwen3vl'; the nearest: 'qwen3_vl', ...
    """
    if model_type not in FAMILIES:
        raise UnknownFamilyError(
            unknown_name_message("model family", model_type, FAMILIES)
            + ". A family needs a record: the paths of its decoder layers, vision layers and projector, "
            "and how its processor lays out image tokens (see docs/design.md)"
        )
    return FAMILIES[model_type]
