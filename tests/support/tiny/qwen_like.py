"""Qwen-VL's relatives: packed patches, a 2 x 2 merger, image_grid_thw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    CohereCompassProcessor,
    Cosmos3EdgeProcessor,
    Exaone4_5_Processor,
    HyperCLOVAXVisionV2Processor,
    MiniMaxM3VLProcessor,
    ProcessorMixin,
    Qwen2_5OmniProcessor,
    Qwen2VLProcessor,
    Qwen3OmniMoeProcessor,
    Qwen3VLProcessor,
    VideoLlama3Processor,
    WhisperFeatureExtractor,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.cohere_compass.image_processing_pil_cohere_compass import (
    CohereCompassImageProcessorPil,
)
from transformers.models.cosmos3_edge.image_processing_pil_cosmos3_edge import Cosmos3EdgeImageProcessorPil
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil

from mmlens.families.processors import without_video
from tiny.base import D_MODEL, PATCH, TinyFamily, TokenIds, text_config, tower, with_video
from tiny.first import (
    QWEN_IMAGE_TEXT,
    QWEN_SPECIAL,
    QWEN_VIDEO_TEXT,
    QWEN_VIDEOS,
    qwen_ids,
    qwen_image_processor,
    qwen_tower,
)

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_INTERLEAVED = {**_MROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
_PARTIAL = {
    **_MROPE,
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
    "partial_rotary_factor": 0.5,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
_WINDOWS = {"window_size": 4 * PATCH, "fullatt_block_indexes": [2]}
_AUDIO = {
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "num_mel_bins": 16,
    "output_dim": D_MODEL,
}
_OMNI_SPECIAL = {
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "audio_token": "<|AUDIO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
_COMPASS_SPECIAL = {
    "image_token": "<|IMAGE_PAD|>",
    "video_token": "<|VIDEO_PAD|>",
    "vision_start_token": "<|VISION_START|>",
    "vision_end_token": "<|VISION_END|>",
}
_MINIMAX_SPECIAL = {
    "image_token": MiniMaxM3VLProcessor.IMAGE_TOKEN,
    "video_token": MiniMaxM3VLProcessor.VIDEO_TOKEN,
    "vision_start_token": MiniMaxM3VLProcessor.VISION_START_TOKEN,
    "vision_end_token": MiniMaxM3VLProcessor.VISION_END_TOKEN,
}


def _processor(
    processor_class: type[ProcessorMixin],
    image_processor: Callable[[], BaseImageProcessor] = qwen_image_processor,
    video: str = "",
    **parts: Any,
) -> Callable[[dict[str, Any]], ProcessorMixin]:
    def build(shared: dict[str, Any]) -> ProcessorMixin:
        made = {name: make() for name, make in parts.items()}
        own = {"image_processor": image_processor(), **made, **shared}
        if not video:
            return without_video(processor_class)(**own)
        return with_video(processor_class, video, QWEN_VIDEOS[video], **own)

    return build


def _image_processor(
    image_processor_class: type[BaseImageProcessor], **options: Any
) -> Callable[[], BaseImageProcessor]:
    return lambda: image_processor_class(
        patch_size=PATCH, size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128}, **options
    )


def _cosmos_edge_processor(shared: dict[str, Any]) -> ProcessorMixin:
    image_processor = _image_processor(Cosmos3EdgeImageProcessorPil, temporal_patch_size=1)
    processor = _processor(Cosmos3EdgeProcessor, image_processor)(shared)
    # The class leaves them out, the model refuses to run without them.
    processor.return_mm_token_type_ids = True
    return processor


# ---------------------------------------------------------------------- Qwen


def _qwen2_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    vision = {
        name: value
        for name, value in qwen_tower(embed_dim=32, hidden_size=D_MODEL, mlp_ratio=2).items()
        if name not in ("out_hidden_size", "intermediate_size")
    }
    return {
        "vision_config": vision,
        "text_config": text_config("qwen2_vl_text", vocab_size, rope_parameters=_MROPE, head_dim=None),
        **qwen_ids(ids),
    }


def _deepstack_tower() -> dict[str, Any]:
    return qwen_tower(num_position_embeddings=64, deepstack_visual_indexes=[0, 1])


def _qwen3_moe_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    text = text_config(
        "qwen3_vl_moe_text", vocab_size, rope_parameters=_INTERLEAVED, mlp_only_layers=[1], **_EXPERTS
    )
    return {"vision_config": _deepstack_tower(), "text_config": text, **qwen_ids(ids)}


def _qwen3_5_options(text_type: str, **changes: Any) -> Callable[[TokenIds, int], dict[str, Any]]:
    def options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
        text = text_config(
            text_type,
            vocab_size,
            rope_parameters=_PARTIAL,
            layer_types=["linear_attention", "full_attention", "full_attention"],
            **_DELTA_NET,
            **changes,
        )
        return {
            "vision_config": qwen_tower(num_position_embeddings=64),
            "text_config": text,
            **qwen_ids(ids),
        }

    return options


def _qwen4_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    text = text_config(
        "qwen4_exp_text",
        vocab_size,
        rope_parameters=_PARTIAL,
        layer_types=["linear_attention", "indexed_attention", "linear_attention"],
        **_DELTA_NET,
        **_EXPERTS,
        shared_expert_intermediate_size=32,
        hc_count=2,
        hc_lowrank=16,
        # Per-layer embeddings of n-grams, in the first layer.
        ple_layer_ids=[1],
        ngram_size=2,
        heads_per_ngram=2,
        ngram_vocab_size_base=50,
        make_ngram_vocab_size_divisible_by=8,
        split_ngram_parts=1,
        eos_token_id=ids["eos"],
        # Every query attends to the best 24 of the positions before it, in blocks of 4.
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=24,
        indexer_compress_ratio=4,
    )
    return {"vision_config": qwen_tower(num_position_embeddings=64), "text_config": text, **qwen_ids(ids)}


def _audio_extractor() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=16)


def _qwen2_5_omni_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": qwen_tower(**_WINDOWS),
        "audio_config": {**_AUDIO, "n_window": 4, "max_source_positions": 64},
        "text_config": text_config("qwen2_5_omni_text", vocab_size, rope_parameters=_MROPE, head_dim=None),
        "image_token_index": ids["image_token"],
        "video_token_index": ids["video_token"],
        "audio_token_index": ids["audio_token"],
        "vision_start_token_id": ids["vision_bos_token"],
        "vision_end_token_id": ids["vision_eos_token"],
        "audio_start_token_id": ids["audio_bos_token"],
        "audio_end_token_id": ids["audio_eos_token"],
    }


def _qwen3_omni_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    text = text_config(
        "qwen3_omni_moe_text", vocab_size, rope_parameters=_INTERLEAVED, mlp_only_layers=[1], **_EXPERTS
    )
    return {
        "vision_config": _deepstack_tower(),
        "audio_config": {**_AUDIO, "n_window": 4, "n_window_infer": 8, "downsample_hidden_size": 8},
        "text_config": text,
        "image_token_id": ids["image_token"],
        "video_token_id": ids["video_token"],
        "audio_token_id": ids["audio_token"],
        "vision_start_token_id": ids["vision_bos_token"],
        "vision_end_token_id": ids["vision_eos_token"],
        "audio_start_token_id": ids["audio_bos_token"],
        "audio_end_token_id": ids["audio_eos_token"],
    }


# ---------------------------------------------------------------------- other makers' models


def _video_llama_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": tower(),
        "text_config": text_config("qwen2", vocab_size),
        "image_token_id": ids["image_token"],
        "video_token_id": ids["video_token"],
    }


def _cosmos_omni_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": {"model_type": "qwen3_vl_vision", **_deepstack_tower()},
        "text_config": text_config("qwen3_vl_text", vocab_size, rope_parameters=_INTERLEAVED),
        **qwen_ids(ids),
    }


def _compass_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    text = text_config(
        "cohere_compass_text",
        vocab_size,
        head_dim=None,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        # A kind of layer without entry has no RoPE.
        rope_parameters={"sliding_attention": _INTERLEAVED, "full_attention": None},
        logit_scale=0.5,
    )
    return {"vision_config": _deepstack_tower(), "text_config": text, **qwen_ids(ids)}


def _exaone_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    text = text_config(
        "exaone4",
        vocab_size,
        sliding_window=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )
    return {
        "vision_config": qwen_tower(**_WINDOWS, num_key_value_heads=2),
        "text_config": text,
        "image_token_id": ids["image_token"],
        "video_token_id": ids["video_token"],
    }


def _hyperclovax_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    text = text_config(
        "hyperclovax",
        vocab_size,
        use_post_norm=True,
        embedding_multiplier=1.5,
        residual_multiplier=0.7,
        attention_multiplier=0.3,
        logits_scaling=0.5,
    )
    return {
        "vision_config": {"model_type": "qwen2_5_vl_vision", **qwen_tower(**_WINDOWS, out_hidden_size=48)},
        "text_config": text,
        "image_token_id": ids["image_token"],
        "video_token_id": ids["video_token"],
    }


def _cosmos_edge_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": tower(num_patches=64, spatial_merge_size=2),
        "text_config": text_config("cosmos3_edge_text", vocab_size, rope_parameters=_MROPE),
        "projector_hidden_size": 48,
        **qwen_ids(ids),
    }


def _minimax_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    text = text_config(
        "minimax_m3_vl_text",
        vocab_size,
        intermediate_size=32,
        dense_intermediate_size=96,
        shared_intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        mlp_layer_types=["dense", "sparse", "sparse"],
        layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        # Every query attends to the best 3 blocks of 8 keys, its own block among them.
        index_n_heads=2,
        index_head_dim=16,
        index_block_size=8,
        index_topk_blocks=3,
    )
    return {
        "vision_config": tower(temporal_patch_size=2, spatial_merge_size=2),
        "text_config": text,
        "projector_hidden_size": 48,
        "image_token_index": ids["image_token"],
        "video_token_index": ids["video_token"],
    }


FAMILIES = (
    TinyFamily(
        "qwen2_vl",
        _qwen2_options,
        special=QWEN_SPECIAL,
        image_text=QWEN_IMAGE_TEXT,
        video_text=QWEN_VIDEO_TEXT,
        processor=_processor(Qwen2VLProcessor, video="Qwen2VLVideoProcessor"),
        cell=2 * PATCH,
    ),
    TinyFamily(
        "qwen3_vl_moe",
        _qwen3_moe_options,
        special=QWEN_SPECIAL,
        image_text=QWEN_IMAGE_TEXT,
        video_text=QWEN_VIDEO_TEXT,
        processor=_processor(Qwen3VLProcessor, video="Qwen3VLVideoProcessor"),
        cell=2 * PATCH,
    ),
    TinyFamily(
        "qwen3_5",
        _qwen3_5_options("qwen3_5_text"),
        special=QWEN_SPECIAL,
        image_text=QWEN_IMAGE_TEXT,
        video_text=QWEN_VIDEO_TEXT,
        processor=_processor(Qwen3VLProcessor, video="Qwen3VLVideoProcessor"),
        cell=2 * PATCH,
    ),
    TinyFamily(
        "qwen3_5_moe",
        _qwen3_5_options("qwen3_5_moe_text", **_EXPERTS, shared_expert_intermediate_size=32),
        special=QWEN_SPECIAL,
        image_text=QWEN_IMAGE_TEXT,
        video_text=QWEN_VIDEO_TEXT,
        processor=_processor(Qwen3VLProcessor, video="Qwen3VLVideoProcessor"),
        cell=2 * PATCH,
    ),
    TinyFamily(
        "qwen4_exp",
        _qwen4_options,
        special=QWEN_SPECIAL,
        image_text=QWEN_IMAGE_TEXT,
        video_text=QWEN_VIDEO_TEXT,
        processor=_processor(Qwen3VLProcessor, video="Qwen3VLVideoProcessor"),
        cell=2 * PATCH,
    ),
    TinyFamily(
        "qwen2_5_omni_thinker",
        _qwen2_5_omni_options,
        special=_OMNI_SPECIAL,
        image_text="<|vision_bos|><|IMAGE|><|vision_eos|>",
        processor=_processor(Qwen2_5OmniProcessor, feature_extractor=_audio_extractor),
        cell=2 * PATCH,
    ),
    TinyFamily(
        "qwen3_omni_moe_thinker",
        _qwen3_omni_options,
        special=_OMNI_SPECIAL,
        image_text="<|vision_bos|><|IMAGE|><|vision_eos|>",
        processor=_processor(Qwen3OmniMoeProcessor, feature_extractor=_audio_extractor),
        cell=2 * PATCH,
    ),
    TinyFamily(
        "video_llama_3",
        _video_llama_options,
        special={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        image_text="<|image_pad|>\n",
        video_text="<|video_pad|>\n",
        processor=_processor(
            VideoLlama3Processor, _image_processor(VideoLlama3ImageProcessorPil), "VideoLlama3VideoProcessor"
        ),
        # Images are not merged, as videos are: one token per patch.
        cell=PATCH,
    ),
    TinyFamily(
        "cosmos3_omni",
        _cosmos_omni_options,
        special=QWEN_SPECIAL,
        image_text=QWEN_IMAGE_TEXT,
        video_text=QWEN_VIDEO_TEXT,
        processor=_processor(Qwen3VLProcessor, video="Qwen3VLVideoProcessor"),
        cell=2 * PATCH,
    ),
    TinyFamily(
        "cosmos3_edge",
        _cosmos_edge_options,
        special=QWEN_SPECIAL,
        image_text=QWEN_IMAGE_TEXT,
        video_text=QWEN_VIDEO_TEXT,
        processor=_cosmos_edge_processor,
        cell=2 * PATCH,
    ),
    TinyFamily(
        "cohere_compass",
        _compass_options,
        special=_COMPASS_SPECIAL,
        image_text="<|VISION_START|><|IMAGE_PAD|><|VISION_END|>",
        video_text="<|VISION_START|><|VIDEO_PAD|><|VISION_END|>",
        processor=_processor(
            CohereCompassProcessor,
            _image_processor(CohereCompassImageProcessorPil, temporal_patch_size=2, merge_size=2),
            "CohereCompassVideoProcessor",
        ),
        cell=2 * PATCH,
    ),
    TinyFamily(
        "exaone4_5",
        _exaone_options,
        special=QWEN_SPECIAL,
        image_text=QWEN_IMAGE_TEXT,
        video_text=QWEN_VIDEO_TEXT,
        processor=_processor(Exaone4_5_Processor, video="Qwen2VLVideoProcessor"),
        cell=2 * PATCH,
    ),
    TinyFamily(
        "hyperclovax_vision_v2",
        _hyperclovax_options,
        special=QWEN_SPECIAL,
        image_text=QWEN_IMAGE_TEXT,
        video_text=QWEN_VIDEO_TEXT,
        processor=_processor(HyperCLOVAXVisionV2Processor, video="Qwen2VLVideoProcessor"),
        cell=2 * PATCH,
    ),
    TinyFamily(
        "minimax_m3_vl",
        _minimax_options,
        special=_MINIMAX_SPECIAL,
        image_text=MiniMaxM3VLProcessor.IMAGE_TOKEN,
        # Its own image processor exists for torchvision alone; Qwen2-VL's by PIL resizes to the same sizes
        # and orders the patches in the same way.
        processor=_processor(MiniMaxM3VLProcessor),
        cell=2 * PATCH,
    ),
)
