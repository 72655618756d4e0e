"""The families mmlens knows, one record each."""

from __future__ import annotations

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
