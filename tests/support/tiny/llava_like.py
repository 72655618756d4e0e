"""LLaVA's relatives: a CLIP, SigLIP or Pixtral tower and a projector."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from transformers import LlavaProcessor, ProcessorMixin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.deepseek_vl.processing_deepseek_vl import DeepseekVLProcessor
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
    DeepseekVLHybridImageProcessorPil,
)
from transformers.models.deepseek_vl_hybrid.processing_deepseek_vl_hybrid import DeepseekVLHybridProcessor
from transformers.models.granite4_vision.processing_granite4_vision import Granite4VisionProcessor
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.janus.processing_janus import JanusProcessor
from transformers.models.lighton_ocr.processing_lighton_ocr import LightOnOcrProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_next_video.processing_llava_next_video import LlavaNextVideoProcessor
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.video_llava.image_processing_video_llava import VideoLlavaImageProcessor
from transformers.models.video_llava.processing_video_llava import VideoLlavaProcessor
from transformers.utils import is_timm_available, is_torchvision_available

from mmlens.families.processors import without_video
from mmlens.internals import pixtral_processor
from tiny.base import D_MODEL, PATCH, TinyFamily, TokenIds, text_config, tower, with_video

VIEW = 24
FIXED = 40
# An even number of patches, which a clip's are pooled of.
VIDEO_VIEW = 32
LONGEST_EDGE = 48

_IMAGE = {"image_token": "<image>"}
_IMAGE_AND_VIDEO = {**_IMAGE, "video_token": "<video>"}


def _clip_tower(image_size: int, **changes: Any) -> dict[str, Any]:
    return tower(model_type="clip_vision_model", image_size=image_size, projection_dim=32, **changes)


def _clip_images(edge: int) -> dict[str, Any]:
    return {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}


# ---------------------------------------------------------------------- llava_next, llava_next_video


def _pinpoints(view: int) -> list[list[int]]:
    return [[view * down, view * across] for down, across in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


def _next_images(view: int = VIEW) -> LlavaNextImageProcessorPil:
    return LlavaNextImageProcessorPil(image_grid_pinpoints=_pinpoints(view), **_clip_images(view))


_NEXT_PROCESSOR: dict[str, Any] = {
    "patch_size": PATCH,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}


def _next_options(ids: TokenIds, vocab_size: int, view: int = VIEW) -> dict[str, Any]:
    return {
        "vision_config": _clip_tower(view),
        "text_config": text_config("llama", vocab_size),
        "image_token_index": ids["image_token"],
        "image_grid_pinpoints": _pinpoints(view),
    }


def _next_video_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {**_next_options(ids, vocab_size, VIDEO_VIEW), "video_token_index": ids["video_token"]}


# ---------------------------------------------------------------------- pixtral, mistral3, lighton_ocr

_PIXTRAL_SPECIAL = {
    "image_token": "[IMG]",
    "image_break_token": "[IMG_BREAK]",
    "image_end_token": "[IMG_END]",
}


def _pixtral_tower() -> dict[str, Any]:
    return tower(model_type="pixtral", image_size=2 * LONGEST_EDGE)


def _pixtral_images(patch: int) -> PixtralImageProcessorPil:
    return PixtralImageProcessorPil(
        size={"longest_edge": LONGEST_EDGE}, patch_size={"height": patch, "width": patch}
    )


def _pixtral_processor(merge: int) -> Callable[[dict[str, Any]], ProcessorMixin]:
    return lambda shared: pixtral_processor()(
        image_processor=_pixtral_images(PATCH), patch_size=PATCH, spatial_merge_size=merge, **shared
    )


def _pixtral_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    """Pixtral-12B as transformers has it: LLaVA's model around a Pixtral tower."""
    return {
        "model_type": "llava",
        "vision_config": _pixtral_tower(),
        "text_config": text_config("mistral", vocab_size, sliding_window=None),
        "image_token_index": ids["image_token"],
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
    }


def _mistral3_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": _pixtral_tower(),
        "text_config": text_config("mistral", vocab_size, sliding_window=None),
        "image_token_index": ids["image_token"],
        "spatial_merge_size": 2,
        "tie_word_embeddings": False,
    }


def _lighton_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": _pixtral_tower(),
        "text_config": text_config("qwen3", vocab_size),
        "image_token_id": ids["image_token"],
        "spatial_merge_size": 2,
        "tie_word_embeddings": False,
    }


def _mistral_large4_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": _pixtral_tower(),
        "text_config": text_config(
            "mistral_large4_text",
            vocab_size,
            num_hidden_layers=4,
            num_key_value_heads=4,
            head_dim=8,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
            moe_intermediate_size=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            # Fewer than a prompt has, so that the top-k mask cuts something away.
            index_topk=16,
            index_head_dim=16,
            # Enough that no two keys tie at a score of 0, where the width of the padding would choose between them.
            index_n_heads=8,
            # A dense layer and sparse ones, with and without RoPE, own and shared keys, own and shared top-k.
            no_rope_layers=[1, 0, 1, 0],
            kv_source_layers=[0, 1, 0, 1],
            indexer_types=["full", "full", "shared", "full"],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        "image_token_index": ids["image_token"],
        "spatial_merge_size": 2,
    }


# ---------------------------------------------------------------------- vipllava, video_llava


def _vipllava_processor(shared: dict[str, Any]) -> ProcessorMixin:
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(**_clip_images(FIXED)), **_NEXT_PROCESSOR, **shared
    )


def _vipllava_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": _clip_tower(FIXED),
        "text_config": text_config("llama", vocab_size),
        "image_token_index": ids["image_token"],
        "image_seq_length": (FIXED // PATCH) ** 2,
        "vision_feature_layer": [-2, -3, 1],
    }


def _video_llava_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": _clip_tower(FIXED),
        "text_config": text_config("llama", vocab_size),
        "image_token_index": ids["image_token"],
        "video_token_index": ids["video_token"],
        "image_seq_length": (FIXED // PATCH) ** 2,
    }


# ---------------------------------------------------------------------- deepseek_vl, deepseek_vl_hybrid, janus

_N_FIXED = (FIXED // PATCH) ** 2
_DEEPSEEK_SPECIAL = {"image_token": "<image_placeholder>"}
# The high-resolution patches (12 x 12) are four times the tokens (3 x 3), so that nothing is interpolated.
_HYBRID = 24
_HIGH_RES = 96
_JANUS_SPECIAL = {
    "image_token": "<image_placeholder>",
    "boi_token": "<begin_of_image>",
    "eoi_token": "<end_of_image>",
}


def _padded_square(edge: int) -> dict[str, Any]:
    return {"size": {"height": edge, "width": edge}}


def _deepseek_options(ids: TokenIds, vocab_size: int, view: int = FIXED) -> dict[str, Any]:
    return {
        "vision_config": tower(model_type="siglip_vision_model", image_size=view, vision_use_head=False),
        "text_config": text_config("llama", vocab_size),
        "image_token_id": ids["image_token"],
        "tie_word_embeddings": False,
    }


def _deepseek_hybrid_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        **_deepseek_options(ids, vocab_size, _HYBRID),
        "high_res_vision_config": {
            "model_type": "sam_vision_model",
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": _HIGH_RES,
            "patch_size": PATCH,
            "window_size": 4,
            "global_attn_indexes": [1, 2],
            "num_pos_feats": 16,
            "mlp_dim": 48,
        },
    }


def _janus_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    vision = tower(image_size=FIXED, mlp_ratio=1.5, projection_dim=D_MODEL, num_image_tokens=_N_FIXED)
    vision.pop("intermediate_size")
    return {
        "vision_config": vision,
        "text_config": text_config("llama", vocab_size),
        # The image decoder: no text logit reads it.
        "vq_config": {
            "embed_dim": 8,
            "num_embeddings": 16,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": D_MODEL,
            "image_token_embed_dim": D_MODEL,
        },
        "image_token_id": ids["image_token"],
        "tie_word_embeddings": False,
    }


# ---------------------------------------------------------------------- granite4_vision

GRANITE_VIEW = 32
GRANITE_PINPOINTS = [[32 * h, 32 * w] for h in range(1, 4) for w in range(1, 4) if 1 < h * w <= 4]


def _granite_processor(shared: dict[str, Any]) -> ProcessorMixin:
    return Granite4VisionProcessor(
        image_processor=LlavaNextImageProcessorPil(
            image_grid_pinpoints=copy.deepcopy(GRANITE_PINPOINTS), **_clip_images(GRANITE_VIEW)
        ),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        downsample_rate="2/4",
        **shared,
    )


def _granite_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        # The Q-Former has one head for every 64 of the tower's width.
        "vision_config": tower(
            model_type="siglip_vision_model", image_size=GRANITE_VIEW, vision_use_head=False, hidden_size=128
        ),
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "num_hidden_layers": 1,
            "intermediate_size": 48,
            "cross_attention_frequency": 1,
            "use_qformer_text_input": False,
            "vocab_size": 8,
        },
        # Features of one vision layer enter before layer 0, the four spatial groups before layers 1 to 4.
        "text_config": text_config(
            "granite4_vision_text",
            vocab_size,
            num_hidden_layers=5,
            head_dim=None,
            embedding_multiplier=1.5,
            residual_multiplier=0.7,
            attention_multiplier=0.2,
            logits_scaling=2.0,
        ),
        "image_token_index": ids["image_token"],
        "image_grid_pinpoints": copy.deepcopy(GRANITE_PINPOINTS),
        "vision_feature_select_strategy": "full",
        "downsample_rate": "2/4",
        "deepstack_layer_map": [[-2, 0]],
        "spatial_vision_layer": -1,
        "spatial_target_layers": [1, 2, 3, 4],
    }


# ---------------------------------------------------------------------- fast_vlm, perception_lm

FAST_PATCH = 64
"""FastViT's five stages leave one token for 64 x 64 pixels."""
PERCEPTION_TILE = 32


def _fast_vlm_processor(shared: dict[str, Any]) -> ProcessorMixin:
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(**_clip_images(3 * FAST_PATCH)),
        patch_size=FAST_PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        **shared,
    )


def _fast_vlm_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "global_pool": "avg",
            "hidden_size": 2 * 64,
            "model_args": {
                "inference_mode": True,
                "layers": [1, 1, 1, 1, 2],
                "embed_dims": [8, 16, 32, 64, 64],
                "mlp_ratios": [1, 1, 1, 1, 1],
            },
        },
        "text_config": text_config("qwen2", vocab_size),
        "image_token_index": ids["image_token"],
        "image_seq_length": 9,
    }


def _perception_processor(shared: dict[str, Any]) -> ProcessorMixin:
    # Its image processor is torchvision's alone, hence the imports here.
    from transformers.models.perception_lm.image_processing_perception_lm import PerceptionLMImageProcessor
    from transformers.models.perception_lm.processing_perception_lm import PerceptionLMProcessor

    return without_video(PerceptionLMProcessor)(
        image_processor=PerceptionLMImageProcessor(tile_size=PERCEPTION_TILE, max_num_tiles=6),
        patch_size=PATCH,
        pooling_ratio=2,
        **shared,
    )


def _perception_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    side = PERCEPTION_TILE // PATCH
    return {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_lang_large_patch14_448",
            "do_pooling": True,
            "global_pool": "",
            "model_args": {
                "embed_dim": 32,
                "depth": 3,
                "num_heads": 4,
                "patch_size": PATCH,
                "img_size": [PERCEPTION_TILE, PERCEPTION_TILE],
                "ref_feat_shape": [side, side],
                "global_pool": "",
                "init_values": 0.1,
                "use_post_transformer_norm": False,
            },
        },
        "text_config": text_config("llama", vocab_size),
        "image_token_id": ids["image_token"],
        "video_token_id": ids["video_token"],
        "projector_pooling_ratio": 2,
        "vision_use_cls_token": True,
    }


# timm builds these two towers, and does not import without torchvision.
_TIMM_FAMILIES = (
    TinyFamily(
        "fast_vlm",
        _fast_vlm_options,
        special=_IMAGE,
        image_text="<image>\n",
        processor=_fast_vlm_processor,
        cell=FAST_PATCH,
    ),
    TinyFamily(
        "perception_lm",
        _perception_options,
        special={"image_token": "<|image|>", "video_token": "<|video|>"},
        image_text="<|image|>",
        processor=_perception_processor,
        cell=2 * PATCH,
        # The model stacks the tiles of all images, so every image needs as many of them.
        sizes=((128, 96),),
    ),
)
_HAS_TIMM = is_timm_available() and is_torchvision_available()

FAMILIES: tuple[TinyFamily, ...] = (
    TinyFamily(
        "llava_next",
        _next_options,
        special=_IMAGE,
        image_text="<image>\n",
        processor=lambda shared: LlavaNextProcessor(
            image_processor=_next_images(), **_NEXT_PROCESSOR, **shared
        ),
        cell=PATCH,
    ),
    TinyFamily(
        "pixtral",
        _pixtral_options,
        special=_PIXTRAL_SPECIAL,
        image_text="[IMG]",
        processor=_pixtral_processor(1),
        cell=PATCH,
        variant_of="llava",
    ),
    TinyFamily(
        "mistral3",
        _mistral3_options,
        special=_PIXTRAL_SPECIAL,
        image_text="[IMG]",
        processor=_pixtral_processor(2),
        cell=2 * PATCH,
    ),
    TinyFamily(
        "vipllava",
        _vipllava_options,
        special=_IMAGE,
        image_text="<image>\n",
        processor=_vipllava_processor,
        cell=PATCH,
    ),
    TinyFamily(
        "llava_next_video",
        _next_video_options,
        special=_IMAGE_AND_VIDEO,
        image_text="<image>\n",
        video_text="<video>\n",
        processor=lambda shared: with_video(
            LlavaNextVideoProcessor,
            "LlavaNextVideoVideoProcessor",
            _clip_images(VIDEO_VIEW),
            image_processor=_next_images(VIDEO_VIEW),
            **_NEXT_PROCESSOR,
            **shared,
        ),
        cell=PATCH,
    ),
    TinyFamily(
        "video_llava",
        _video_llava_options,
        special=_IMAGE_AND_VIDEO,
        image_text="<image>\n",
        video_text="<video>\n",
        processor=lambda shared: with_video(
            VideoLlavaProcessor,
            "VideoLlavaVideoProcessor",
            _clip_images(FIXED),
            image_processor=VideoLlavaImageProcessor(**_clip_images(FIXED)),
            patch_size=PATCH,
            **shared,
        ),
        cell=PATCH,
    ),
    TinyFamily(
        "deepseek_vl",
        _deepseek_options,
        special=_DEEPSEEK_SPECIAL,
        image_text="<image_placeholder>",
        processor=lambda shared: DeepseekVLProcessor(
            image_processor=DeepseekVLImageProcessorPil(**_padded_square(FIXED)),
            num_image_tokens=_N_FIXED,
            **shared,
        ),
        cell=PATCH,
    ),
    TinyFamily(
        "janus",
        _janus_options,
        special=_JANUS_SPECIAL,
        image_text="<image_placeholder>\n",
        processor=lambda shared: JanusProcessor(
            image_processor=JanusImageProcessorPil(**_padded_square(FIXED)),
            num_image_tokens=_N_FIXED,
            **shared,
        ),
        cell=PATCH,
    ),
    TinyFamily(
        "lighton_ocr",
        _lighton_options,
        special={
            "image_token": "<|image_pad|>",
            "image_break_token": "<|vision_pad|>",
            "image_end_token": "<|vision_end|>",
        },
        image_text="<|image_pad|>",
        processor=lambda shared: LightOnOcrProcessor(
            image_processor=_pixtral_images(2 * PATCH), patch_size=PATCH, spatial_merge_size=2, **shared
        ),
        cell=2 * PATCH,
    ),
    TinyFamily(
        "granite4_vision",
        _granite_options,
        special=_IMAGE,
        image_text="<image>\n",
        processor=_granite_processor,
        cell=2 * PATCH,
    ),
    TinyFamily(
        "deepseek_vl_hybrid",
        _deepseek_hybrid_options,
        special=_DEEPSEEK_SPECIAL,
        image_text="<image_placeholder>",
        processor=lambda shared: DeepseekVLHybridProcessor(
            image_processor=DeepseekVLHybridImageProcessorPil(
                high_res_size={"height": _HIGH_RES, "width": _HIGH_RES}, **_padded_square(_HYBRID)
            ),
            num_image_tokens=(_HYBRID // PATCH) ** 2,
            **shared,
        ),
        cell=PATCH,
        # Bicubic to the high resolution, and again from there to a quarter of it.
        reach=2.5,
    ),
    TinyFamily(
        "mistral_large4",
        _mistral_large4_options,
        special=_PIXTRAL_SPECIAL,
        image_text="[IMG]",
        processor=_pixtral_processor(2),
        cell=2 * PATCH,
    ),
    *(_TIMM_FAMILIES if _HAS_TIMM else ()),
)
