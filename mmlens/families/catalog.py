"""The families mmlens knows, one record each."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from mmlens.arguments import unknown_name_message
from mmlens.errors import InvalidValueError, MmlensWarning
from mmlens.families.layouts import (
    anyres,
    block_grid,
    corner_grid,
    fixed_grid,
    framed_grid,
    overlapping_crops,
    padded_grid,
    pooled_grid,
    queries,
    resized_grid,
    sliced,
    stretched,
    strided_grid,
    thumbnail_first,
    tiles,
    visual_codes,
)
from mmlens.families.record import DeepInjection, Family, Stack
from mmlens.families.refused import refusal


def _deepstack(mergers: str = "model.visual.deepstack_merger_list") -> DeepInjection:
    """Qwen3-VL's: one merger for each of the first language layers."""
    return DeepInjection(
        after=lambda config: list(range(len(config.vision_config.deepstack_visual_indexes))), mergers=mergers
    )


def _q_former(layers: str) -> Stack:
    """The transformer that turns an image into a few learnt queries."""
    return Stack(
        layers,
        names={
            "attention": "attention.attention",
            "layer_out": "attention.output.dense",
            "attention_output": None,
            "cross_attention": "crossattention.attention",
            "layer_cross_out": "crossattention.output.dense",
        },
    )


_BLOCKS: dict[str, Any] = {"layout": block_grid.qwen, "video_layout": block_grid.qwen_video}
_WINDOW_MERGER = {"merger.": Stack("model.vision_tower.vit_merger")}
_NORMED_TOWER = Stack(norm="model.vision_tower.post_layernorm")
_NORMED_MODEL = Stack(norm="model.vision_model.post_layernorm")
_GLM_TOWER = Stack(norm="model.visual.post_layernorm")
_SIGLIP_OF_DEEPSEEK = Stack("model.vision_model.encoder.layers", norm="model.vision_model.post_layernorm")


def _granite_injects(config: Any) -> list[int]:
    """Granite adds features before a layer; before the first one they are part of hook_embed."""
    before = [layer for _, layer in config.deepstack_layer_map] + list(config.spatial_target_layers or [])
    return sorted(layer - 1 for layer in before if layer > 0)


def _granite_reads(config: Any) -> list[int]:
    """Every projector takes the state after a vision layer of its own; `vision_feature_layer` is not read.

    Of two for one language layer the later counts.
    """
    read = {language: vision for vision, language in config.deepstack_layer_map}
    read |= dict.fromkeys(config.spatial_target_layers or [], config.spatial_vision_layer)
    return [vision for language, vision in read.items() if language < config.text_config.num_hidden_layers]


# What is missing, and why: shared by the families that have the same kind of layer.


def _lacking(why: str, *parts: str) -> dict[str, str]:
    """Language layers do not have these hook points."""
    return {f"blocks.{{l}}.{part}": why for part in parts}


def _hybrid(kind: str) -> dict[str, str]:
    return _lacking(f"its {kind} layers have no softmax attention", "attn.*", "image.hook_z")


_BETWEEN_BRANCHES = ("hook_resid_mid", "image.hook_resid_mid", "hook_mlp_in")
_BEFORE_BRANCHES = ("hook_attn_in", "ln1.*", "ln2.*")
_PARALLEL = _lacking("attention and MLP run in parallel on one norm's output", *_BETWEEN_BRANCHES, "ln2.*")
_NO_NORM_BEFORE = _lacking(
    "attention and MLP read the stream itself; the norms stand after them", *_BEFORE_BRANCHES
)
_MIXED = "attention and MLP read a learnt mixture of several streams"
_HYPER_CONNECTIONS = _lacking(_MIXED, *_BETWEEN_BRANCHES)
_NO_NORMS = _lacking(_MIXED, *_BEFORE_BRANCHES)
_ONE_BRANCH = _lacking(
    "each of its layers is one norm and one mixer, MLPs included",
    *_BETWEEN_BRANCHES,
    "hook_mlp_out",
    "image.hook_mlp_out",
    "ln2.*",
)


def _no_tower(what: str) -> dict[str, str]:
    return {"vision.*": f"its vision side is {what}"}


_SHARED_KEYS = _lacking(
    "its last layers attend with the keys and values of earlier ones", "attn.hook_k", "attn.hook_v"
)
_CLIPPED = "its output projection clips what it reads, so heads do not add up"
_CONVOLUTIONS_TOO = "its short convolution layers have no softmax attention"
_SAM = {"vision.blocks.{l}.attn.*": "SAM's relative-position attention bypasses transformers' interface"}
_CODES = "a convolutional net turns the image into discrete codes, which the language model embeds"
_VISUAL_CODES = {"vision.*": _CODES, "projector.*": _CODES}
_CROSS_ATTENTION = "cross-attention reads the images: no position of the prompt is one"
_NO_IMAGE_POSITIONS = {"image.*": _CROSS_ATTENTION, "blocks.{l}.image.*": _CROSS_ATTENTION}
_STREAMS_FIRST = (
    "its stream is several, stacked in front of the batch: read hook_resid_* at the positions wanted"
)
_NO_FINAL_NORM = {"ln_final.*": "the last step of its language model is no single norm"}

# What several families share as a whole.

_BLIP = Family(
    "blip-2",
    layout=queries.per_image("num_query_tokens"),
    vision=Stack(norm="vision_model.post_layernorm", norm_pools=True),
    more_stacks={"qformer.": _q_former("qformer.encoder.layer")},
)
_MINICPM = Family(
    "minicpm_ocr", layout=sliced.minicpm, vision=_NORMED_TOWER, missing=_hybrid("gated delta net")
)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llava", layout=fixed_grid.llava),
        Family("llava_onevision", layout=anyres.llava_onevision, video_layout=anyres.llava_onevision_video),
        Family("qwen2_5_vl", **_BLOCKS),
        Family(
            "qwen3_vl",
            **_BLOCKS,
            deep_injection=_deepstack(),
        ),
        Family(
            "internvl",
            layout=tiles.internvl,
            video_layout=tiles.internvl_video,
            vision=Stack(norm="model.vision_tower.layernorm"),
        ),
        Family("idefics3", layout=tiles.idefics3, vision=_NORMED_MODEL),
        Family("smolvlm", layout=tiles.idefics3, video_layout=tiles.smolvlm_video, vision=_NORMED_MODEL),
        # llava_like
        Family("vipllava", layout=fixed_grid.llava, feature_layer="vision_feature_layers"),
        Family("video_llava", layout=fixed_grid.llava, video_layout=fixed_grid.video_llava),
        Family("llava_next", layout=anyres.llava_next),
        Family("llava_next_video", layout=anyres.llava_next, video_layout=anyres.llava_next_video),
        Family(
            "granite4_vision",
            layout=anyres.llava_next,
            more_stacks={
                "qformer.": _q_former("model.layerwise_projectors.*.qformer.encoder.layer"),
                "qformer.spatial.": _q_former("model.spatial_projectors.*.qformer.encoder.layer"),
            },
            projector="",
            feature_layer=_granite_reads,
            deep_injection=DeepInjection(after=_granite_injects, mergers="model.layerwise_projectors"),
            missing={"projector.*": "each deep injection has a projector of its own: vision.deepstack.*"},
        ),
        Family(
            "fast_vlm", layout=fixed_grid.llava, vision=None, missing=_no_tower("a timm convolutional net")
        ),
        Family("deepseek_vl", layout=fixed_grid.deepseek, vision=_SIGLIP_OF_DEEPSEEK),
        Family(
            "deepseek_vl_hybrid",
            layout=fixed_grid.deepseek,
            vision=_SIGLIP_OF_DEEPSEEK,
            more_stacks={"vision.high_res.": Stack("model.high_res_vision_model.vision_encoder.layers")},
        ),
        Family(
            "janus",
            layout=fixed_grid.deepseek,
            vision=replace(_SIGLIP_OF_DEEPSEEK, norm_pools=True),
        ),
        Family(
            "perception_lm",
            layout=thumbnail_first.perception,
            vision=None,
            missing=_no_tower("a timm transformer with attention of its own"),
        ),
        Family("mistral3", layout=resized_grid.pixtral),
        Family("lighton_ocr", layout=resized_grid.pixtral),
        Family("mistral_large4", layout=resized_grid.pixtral),
        # qwen_like
        Family("qwen2_vl", **_BLOCKS),
        Family("exaone4_5", **_BLOCKS, missing=_NO_NORM_BEFORE),
        Family("hyperclovax_vision_v2", **_BLOCKS),
        Family("qwen2_5_omni_thinker", layout=block_grid.qwen),
        Family(
            "qwen3_vl_moe",
            **_BLOCKS,
            deep_injection=_deepstack(),
        ),
        Family("cosmos3_omni", **_BLOCKS, deep_injection=_deepstack()),
        Family("cohere_compass", **_BLOCKS, deep_injection=_deepstack(), missing=_PARALLEL),
        Family(
            "qwen3_omni_moe_thinker",
            layout=block_grid.qwen,
            deep_injection=_deepstack("model.visual.merger_list"),
        ),
        Family(
            "qwen3_5",
            **_BLOCKS,
            missing=_hybrid("gated delta net"),
        ),
        Family(
            "qwen3_5_moe",
            **_BLOCKS,
            missing=_hybrid("gated delta net"),
        ),
        Family(
            "qwen4_exp",
            **_BLOCKS,
            language=Stack(names={"resid_mid": None}, norm="model.language_model.hyper_connection_mixer"),
            stream="[batch, pos, streams * d_model]",
            adds=False,
            missing={**_hybrid("gated delta net"), **_HYPER_CONNECTIONS, **_NO_NORMS, **_NO_FINAL_NORM},
        ),
        Family(
            "video_llama_3", layout=block_grid.qwen, video_layout=block_grid.video_llama, vision=_NORMED_MODEL
        ),
        Family("cosmos3_edge", layout=block_grid.qwen, vision=Stack(norm="model.visual.post_layernorm")),
        Family("minimax_m3_vl", layout=block_grid.qwen),
        # glm_like
        Family("glm4v", **_BLOCKS, vision=_GLM_TOWER),
        Family("glm46v", **_BLOCKS, vision=_GLM_TOWER),
        Family("glmga", **_BLOCKS, vision=_GLM_TOWER),
        Family("glm_ocr", **_BLOCKS, vision=_GLM_TOWER),
        Family("glm4v_moe", **_BLOCKS, vision=_GLM_TOWER),
        Family(
            "glm5_next",
            layout=padded_grid.glm,
            language=Stack(names={"resid_mid": None}),
            vision=_GLM_TOWER,
            stream="[batch, pos, streams, d_model]",
            adds=False,
            missing={**_hybrid("linear attention"), **_HYPER_CONNECTIONS},
        ),
        Family(
            "paddleocr_vl",
            layout=block_grid.qwen,
            vision=Stack(norm="model.visual.vision_model.post_layernorm"),
        ),
        Family("ernie4_5_vl_moe", layout=block_grid.qwen, vision=Stack(norm="model.vision_tower.ln")),
        Family("hunyuan_vl", layout=framed_grid.hunyuan),
        Family(
            "hy_v4_vl",
            layout=framed_grid.hy_v4,
            language=Stack(names={"resid_mid": None}),
            stream="[batch, pos, streams, d_model]",
            adds=False,
            missing=_HYPER_CONNECTIONS,
        ),
        Family("kimi_k25", layout=padded_grid.kimi, vision=Stack(norm="model.vision_tower.final_layernorm")),
        Family("muse_glimmer", layout=block_grid.qwen, vision=Stack(norm="model.vision_tower.ln_post")),
        Family(
            "muse_spark",
            layout=block_grid.qwen,
            vision=Stack(norm="model.vision_tower.ln_post"),
            # Learnt gates weigh the stream and what is added to it.
            adds=False,
        ),
        Family("dots3_note", **_BLOCKS, vision=Stack(norm="model.vision_tower.norm")),
        Family(
            "nemotron_h_omni",
            layout=block_grid.nemotron,
            missing={**_hybrid("Mamba, MLP and expert"), **_ONE_BRANCH},
        ),
        # pooled
        Family("gemma3", layout=stretched.gemma3, vision=_NORMED_TOWER),
        Family("shieldgemma2", layout=stretched.gemma3, vision=_NORMED_TOWER),
        Family(
            "gemma3n",
            no_layout="the strided convolutions of its tower mix far beyond a token's cell, and lean to one side",
            vision=None,
            stream="[stream, batch, pos, d_model]",
            # Layers predict and correct several streams, and add a low-rank branch beside attention.
            adds=False,
            missing={
                **_no_tower("a timm convolutional net"),
                **_SHARED_KEYS,
                "image.hook_embed": _STREAMS_FIRST,
                "blocks.{l}.image.hook_resid_*": _STREAMS_FIRST,
            },
        ),
        Family(
            "gemma4",
            layout=pooled_grid.gemma4,
            video_layout=pooled_grid.gemma4_video,
            past_the_stream="what its layers read beside the stream is projected from the embeddings themselves",
            # A per-layer embedding is added after the MLP, and the whole stream is scaled.
            adds=False,
            missing={**_SHARED_KEYS, "vision.blocks.{l}.attn.hook_result": _CLIPPED},
        ),
        Family(
            "gemma4_unified",
            layout=pooled_grid.gemma4_unified,
            vision=None,
            adds=False,
            missing=_no_tower("one projection of the pixels of each patch"),
        ),
        Family("paligemma", layout=stretched.paligemma, vision=_NORMED_TOWER),
        Family("aya_vision", layout=tiles.aya, missing=_PARALLEL),
        Family("cohere2_vision", layout=tiles.cohere2, vision=_NORMED_TOWER, missing=_PARALLEL),
        Family("qianfan_ocr", layout=tiles.internvl),
        Family("lfm2_vl", layout=tiles.lfm2, vision=_NORMED_TOWER, missing=_hybrid("short convolution")),
        Family(
            "lfm3_vl",
            **_BLOCKS,
            missing={**_hybrid("short convolution"), "vision.blocks.{l}.attn.*": _CONVOLUTIONS_TOO},
        ),
        Family("llama4", layout=tiles.llama4, vision=Stack(norm="vision_model.layernorm_post")),
        Family(
            "ovis2",
            layout=tiles.ovis2,
            vision=Stack(norm="model.vision_tower.transformer.rms_norm"),
            projector="model.visual_embeddings_table",
        ),
        Family(
            "idefics2",
            layout=queries.idefics2,
            vision=_NORMED_MODEL,
            more_stacks={"resampler.": Stack("model.connector.perceiver_resampler.layers")},
        ),
        Family(
            "granite_docling",
            layout=tiles.granite_docling,
            vision=_NORMED_MODEL,
            deep_injection=_deepstack("model.vision_model.connector.coarse.deepstack_mergers"),
        ),
        # ocr_and_others
        Family("got_ocr2", layout=strided_grid.got_ocr2, missing=_SAM),
        Family("pp_chart2table", layout=strided_grid.pp_chart2table, missing=_SAM),
        Family(
            "chameleon",
            layout=visual_codes.chameleon,
            language=Stack("model.layers"),
            vision=None,
            projector="",
            missing=_VISUAL_CODES,
        ),
        Family(
            "emu3",
            layout=visual_codes.emu3,
            vision=None,
            projector="",
            missing={**_VISUAL_CODES, "other attention": _CODES},
        ),
        Family(
            "apertus1p5",
            layout=visual_codes.apertus,
            language=Stack(names={"norm1": "attention_layernorm", "norm2": "feedforward_layernorm"}),
            vision=None,
            projector="",
            missing=_VISUAL_CODES,
        ),
        Family(
            "fuyu",
            layout=corner_grid.fuyu,
            language=Stack(names={"qkv_order": "by_head"}),
            vision=None,
            projector="model.vision_embed_tokens",
            missing=_no_tower("one projection of the pixels of each patch"),
        ),
        Family(
            "molmo2",
            layout=overlapping_crops.molmo2,
            feature_layer="adapter_config.vision_feature_layer",
            more_stacks={
                "pooling.": Stack("model.multi_modal_projector", names={"attention": "image_pooling_2d"})
            },
        ),
        replace(_MINICPM, model_type="minicpmv4_6", more_stacks=_WINDOW_MERGER),
        replace(_MINICPM, model_type="minicpmv4_7", more_stacks=_WINDOW_MERGER),
        _MINICPM,
        Family("step3p7", layout=strided_grid.step3p7),
        Family(
            "deepseek_ocr2",
            layout=queries.deepseek_ocr2,
            vision=Stack(
                "model.vision_tower.vision_encoder.layers", norm="model.vision_tower.vision_encoder.norm"
            ),
            more_stacks={"vision.sam.": Stack("model.vision_tower.sam_encoder.layers")},
        ),
        Family(
            "unlimited_ocr",
            layout=strided_grid.unlimited_ocr,
            vision=Stack("model.vision_tower.vision_encoder.encoder.layers"),
            more_stacks={"vision.sam.": Stack("model.vision_tower.sam_encoder.layers")},
        ),
        Family("aria", layout=queries.aria),
        Family(
            "inkling2",
            layout=corner_grid.inkling2,
            language=Stack(
                names={
                    "resid_mid": None,
                    "attention_output": "post_attention_convolution",
                    "mlp_output": "post_mlp_convolution",
                    # From transformers 5.24 on these modules also normalize, or gate what W_O reads.
                    **{role: (f"{role}_proj.linear", f"{role}_proj") for role in ("q", "k", "v")},
                    "out": ("o_proj.linear", "o_proj"),
                }
            ),
            projector="model.vision_tower.merger",
            past_the_stream="its later layers read the embeddings themselves beside the stream",
            # Attention and MLP read a mixture of the states of earlier blocks of layers; full layers have a norm
            # for queries, keys and values each.
            adds=False,
            missing={
                **_HYPER_CONNECTIONS,
                "blocks.{l}.hook_attn_in": _MIXED,
                "blocks.{l}.ln1.*": "queries, keys and values each have a norm in its full layers",
                "other attention": "the mixture attends over blocks of layers, position by position",
            },
        ),
        Family(
            "inkling_mm_model",
            layout=corner_grid.inkling,
            language=Stack(names={"attention_output": "attn_sconv", "mlp_output": "mlp_sconv"}),
            vision=None,
            projector="model.vision_tower",
            missing=_no_tower("a stack of projections without attention"),
        ),
        # queries_and_cross
        _BLIP,
        replace(_BLIP, model_type="instructblip"),
        # The frames of a clip are its images.
        replace(_BLIP, model_type="instructblipvideo", image_token="video_token_index"),
        Family(
            "mllama",
            layout=queries.cross_attention,
            more_stacks={
                "vision.global.": Stack(
                    "model.vision_model.global_transformer.layers",
                    names={"attention_scale": "tanh gate_attn", "mlp_scale": "tanh gate_ffn"},
                )
            },
            image_token="",
            # The MLP of a cross-attention layer is dropped at positions that see no image.
            adds=False,
            missing=_NO_IMAGE_POSITIONS,
        ),
        Family(
            "idefics",
            no_layout=_CROSS_ATTENTION,
            language=Stack("model.layers"),
            vision=Stack("model.vision_model.encoder.layers"),
            more_stacks={"cross.": Stack("model.gated_cross_attn_layers")},
            projector="",
            image_token="",
            missing={**_NO_IMAGE_POSITIONS, "projector.*": "cross-attention reads the tower's output itself"},
        ),
        Family(
            "kosmos-2",
            layout=queries.per_image("num_image_tokens"),
            vision=Stack(norm="vision_model.model.post_layernorm", norm_pools=True),
            more_stacks={"resampler.": Stack("image_to_text_projection", names={"attention": "x_attn"})},
            image_positions="image_embeds_position_mask",
        ),
    )
}


class UnknownFamilyError(InvalidValueError):
    """A model of a family that mmlens refuses."""


class UntestedFamilyWarning(MmlensWarning):
    """A model of a family that mmlens has no record of: its parts are found by the common names alone."""


def family_of(model_type: str) -> Family:
    """The record of a family; an empty one, with a warning, for a family that mmlens has never met.

    Raises UnknownFamilyError, with the reason, for a family that is refused, or that the installed transformers
    does not run.

    >>> family_of("qwen3_vl").layout.__name__
    'qwen'
    >>> family_of("pix2struct")
    Traceback (most recent call last):
        ...
    mmlens.families.catalog.UnknownFamilyError: 'pix2struct' is refused: ...
    """
    why = refusal(model_type)
    if why is not None:
        raise UnknownFamilyError(f"{model_type!r} is refused: {why}")
    if model_type not in FAMILIES:
        warnings.warn(
            unknown_name_message("record of the model family", model_type, FAMILIES)
            + ". Its parts are looked for under the common names; nothing about this family has been tested",
            UntestedFamilyWarning,
            stacklevel=2,
        )
        return Family(model_type, no_layout="the family is not known to mmlens")
    return FAMILIES[model_type]
