"""GLM-V and other packed-patch towers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    Dots3NoteFeatureExtractor,
    Dots3NoteProcessor,
    Ernie4_5_VLMoeProcessor,
    Glm4vProcessor,
    Glm5NextProcessor,
    Glm46VProcessor,
    HunYuanVLProcessor,
    Kimi_K25Processor,
    MuseGlimmerProcessor,
    MuseSparkFeatureExtractor,
    MuseSparkProcessor,
    NemotronH_Omni_Reasoning_V3Processor,
    PaddleOCRVLProcessor,
    ParakeetFeatureExtractor,
    ProcessorMixin,
)
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeImageProcessorPil,
)
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm5_next.image_processing_pil_glm5_next import Glm5NextImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.glmga.image_processing_pil_glmga import GlmgaImageProcessorPil
from transformers.models.hunyuan_vl.image_processing_pil_hunyuan_vl import HunYuanVLImageProcessorPil
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available

from mmlens.families.processors import without_video
from tiny.base import D_MODEL, PATCH, TinyFamily, TokenIds, text_config, tokenizer_of, tower, with_video

# ---------------------------------------------------------------------- glm4v and its relatives

GLM_SPECIAL = {
    "image_token": "<|image|>",
    "video_token": "<|video|>",
    "image_start_token": "<|begin_of_image|>",
    "image_end_token": "<|end_of_image|>",
    "video_start_token": "<|begin_of_video|>",
    "video_end_token": "<|end_of_video|>",
}
GLM_IMAGE_TEXT = "<|begin_of_image|><|image|><|end_of_image|>"
# A clip of temporal_patch_size = 2 equal frames is what these processors count as an image's pixels.
GLM_PIXELS = {"shortest_edge": 2 * 32 * 32, "longest_edge": 2 * 128 * 128}


def _glm_ids(ids: TokenIds) -> dict[str, int]:
    return {f"{name}_id": ids[name] for name in GLM_SPECIAL}


def _glm_tower(**changes: Any) -> dict[str, Any]:
    return {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "image_size": 8 * PATCH,
        "patch_size": PATCH,
        "out_hidden_size": D_MODEL,
        **changes,
    }


def _glm_rope(partial: float) -> dict[str, Any]:
    """RoPE on a part of d_head = 16, its frequencies shared out between time, height and width."""
    section = [2, 3, 3] if partial == 1 else [2, 1, 1]
    return {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": partial,
        "mrope_section": section,
    }


def _glm4v_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": _glm_tower(model_type="glm4v_vision"),
        "text_config": text_config("glm4v_text", vocab_size, rope_parameters=_glm_rope(0.5)),
        **_glm_ids(ids),
    }


def _glm4v_moe_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": _glm_tower(),
        "text_config": text_config(
            "glm4v_moe_text",
            vocab_size,
            rope_parameters=_glm_rope(0.5),
            first_k_dense_replace=1,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
        ),
        **_glm_ids(ids),
    }


def _glm_ocr_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": _glm_tower(),
        "text_config": text_config("glm_ocr_text", vocab_size, rope_parameters=_glm_rope(1)),
        **_glm_ids(ids),
    }


def _glm(
    model_type: str, options: Any, processor_class: Any, image_processor_class: Any, video: str
) -> TinyFamily:
    def processor(shared: dict[str, Any]) -> ProcessorMixin:
        sizes = {"patch_size": PATCH, "merge_size": 2}
        return with_video(
            processor_class,
            video,
            {**sizes, "size": {"shortest_edge": 2 * 32 * 32, "longest_edge": 8 * 128 * 128}},
            image_processor=image_processor_class(**sizes, size=dict(GLM_PIXELS)),
            **shared,
        )

    return TinyFamily(
        model_type,
        options,
        special=GLM_SPECIAL,
        image_text=GLM_IMAGE_TEXT,
        video_text="<|begin_of_video|><|video|><|end_of_video|>",
        processor=processor,
        cell=2 * PATCH,
    )


# ---------------------------------------------------------------------- paddleocr_vl

PADDLE_SPECIAL = {
    "image_token": "<|IMAGE_PLACEHOLDER|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|IMAGE_START|>",
    "vision_end_token": "<|IMAGE_END|>",
}


def _paddle_processor(shared: dict[str, Any]) -> ProcessorMixin:
    image_processor = PaddleOCRVLImageProcessorPil(
        patch_size=PATCH, merge_size=2, size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    )
    return PaddleOCRVLProcessor(image_processor=image_processor, **shared)


def _paddle_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    return {
        "vision_config": tower(image_size=8 * PATCH, spatial_merge_size=2),
        "text_config": text_config("paddleocr_vl_text", vocab_size, rope_parameters=rope),
        "tie_word_embeddings": False,
        **{f"{name}_id": ids[name] for name in PADDLE_SPECIAL},
    }


# ---------------------------------------------------------------------- ernie4_5_vl_moe

ERNIE_SPECIAL = {
    "image_token": "<|IMAGE_PLACEHOLDER|>",
    "image_start_token": "<|IMAGE_START|>",
    "image_end_token": "<|IMAGE_END|>",
    "video_token": "<|VIDEO_PLACEHOLDER|>",
    "video_start_token": "<|VIDEO_START|>",
    "video_end_token": "<|VIDEO_END|>",
}


def _ernie_processor(shared: dict[str, Any]) -> ProcessorMixin:
    image_processor = Ernie4_5_VLMoeImageProcessorPil(
        patch_size=PATCH, merge_size=2, size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    )
    return without_video(Ernie4_5_VLMoeProcessor)(image_processor=image_processor, **shared)


def _ernie_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
    return {
        "vision_config": {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": PATCH,
        },
        "text_config": text_config(
            "ernie4_5_vl_moe_text",
            vocab_size,
            rope_parameters=rope,
            mlp_layer_types=["dense", "sparse", "sparse"],
            moe_num_experts=4,
            moe_k=2,
            moe_num_shared_experts=1,
            moe_intermediate_size=[32, 16],
        ),
        "tie_word_embeddings": False,
        **{f"{name}_id": ids[name] for name in ERNIE_SPECIAL},
    }


# ---------------------------------------------------------------------- hunyuan_vl

HUNYUAN_SPECIAL = {
    "image_token": "<|hy_image|>",
    "image_start_token": "<|hy_image_start|>",
    "image_end_token": "<|hy_image_end|>",
}


def _hunyuan_processor(shared: dict[str, Any]) -> ProcessorMixin:
    image_processor = HunYuanVLImageProcessorPil(
        patch_size=PATCH, merge_size=2, size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    )
    return HunYuanVLProcessor(image_processor=image_processor, **shared)


def _hunyuan_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    # Four axes: position, width, height and the image's number.
    rope = {
        "rope_type": "dynamic",
        "rope_theta": 10000.0,
        "alpha": 1000.0,
        "factor": 1.0,
        "mrope_section": [2, 2, 2, 2],
    }
    return {
        "vision_config": tower(max_image_size=16 * PATCH, spatial_merge_size=2),
        "text_config": text_config("hunyuan_vl_text", vocab_size, rope_parameters=rope),
        "image_token_id": ids["image_token"],
        "im_start_id": ids["image_start_token"],
        "im_end_id": ids["image_end_token"],
        "tie_word_embeddings": False,
    }


# ---------------------------------------------------------------------- latent attention

MLA = {
    "num_key_value_heads": 4,
    "head_dim": None,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
}
"""Keys of 16 + 8 and values of 16 out of two latents, and a mixture of experts: DeepSeek-V3's text options."""

# Sparse attention picks keys by a sum of rectified scores. Few heads score many keys exactly 0, and which of equals
# topk picks depends on the padding: 8 heads make that rare.
INDEXER = {"index_topk": 16, "index_n_heads": 8, "index_head_dim": 16}

# ---------------------------------------------------------------------- dots3_note

DOTS_SPECIAL = {
    "image_token": "<|imgpad|>",
    "image_start_token": "<|img|>",
    "image_end_token": "<|endofimg|>",
    "video_token": "<|video_pad|>",
    "audio_token": "<|audio_comp_pad|>",
}


def _dots_processor(shared: dict[str, Any]) -> ProcessorMixin:
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=2,
        temporal_patch_size=1,
        size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128},
    )
    return with_video(
        Dots3NoteProcessor,
        "Qwen3VLVideoProcessor",
        {
            "patch_size": PATCH,
            "merge_size": 2,
            "temporal_patch_size": 1,
            "size": {"shortest_edge": 32 * 32, "longest_edge": 8 * 128 * 128},
        },
        image_processor=image_processor,
        feature_extractor=Dots3NoteFeatureExtractor(),
        **shared,
    )


def _dots_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": tower(
            spatial_merge_size=2,
            adapter_in_dim=32,
            adapter_out_dim=D_MODEL,
            mlp_layer_types=["dense", "sparse", "dense"],
            moe_intermediate_size=16,
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "feature_size": 16,
            "downsample_hidden_size": 8,
            "adapter_input_size": 32,
            "adapter_out_dim": D_MODEL,
        },
        "text_config": text_config(
            "dots3_note_text",
            vocab_size,
            **{**MLA, "head_dim": 24},
            **INDEXER,
            layer_types=["indexed_attention", "sliding_attention", "indexed_attention"],
            mlp_layer_types=["dense", "sparse", "sparse"],
            sliding_window=16,
            shared_experts_intermediate_size=32,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=4,
            swa_q_lora_rank=32,
            swa_kv_lora_rank=24,
            swa_head_dim=24,
            swa_qk_nope_head_dim=16,
            swa_v_head_dim=16,
        ),
        **{f"{name}_id": ids[name] for name in ("image_token", "video_token", "audio_token")},
    }


# ---------------------------------------------------------------------- hy_v4_vl, new in transformers 5.24

HY_V4_SPECIAL = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<|vision_start|>",
    "image_end_token": "<|vision_end|>",
}


def _hy_v4_processor(shared: dict[str, Any]) -> ProcessorMixin:
    from transformers import HYV4VLProcessor
    from transformers.models.hy_v4_vl.image_processing_pil_hy_v4_vl import HYV4VLImageProcessorPil

    image_processor = HYV4VLImageProcessorPil(
        patch_size=PATCH, merge_size=2, size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    )
    return without_video(HYV4VLProcessor)(image_processor=image_processor, **shared)


def _hy_v4_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": tower(max_image_size=16 * PATCH, spatial_merge_size=2, out_hidden_size=D_MODEL),
        "text_config": text_config(
            "hy_v4_vl_text",
            vocab_size,
            **MLA,
            **INDEXER,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            indexer_types=["full", "full", "shared"],
            mlp_layer_types=["dense", "sparse", "sparse"],
            n_shared_experts=1,
            hc_mult=2,
        ),
        "image_token_id": ids["image_token"],
        "video_token_id": ids["video_token"],
    }


# ---------------------------------------------------------------------- glm5_next


def _glm5_next_processor(shared: dict[str, Any]) -> ProcessorMixin:
    image_processor = Glm5NextImageProcessorPil(
        patch_size=PATCH, merge_size=2, min_image_tokens=4, max_image_tokens=64
    )
    return without_video(Glm5NextProcessor)(image_processor=image_processor, **shared)


def _glm5_next_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": _glm_tower(projection_intermediate_size=48),
        "text_config": text_config(
            "glm5_next_text",
            vocab_size,
            **{**MLA, "qk_rope_head_dim": 0, "qk_nope_head_dim": 24},
            **INDEXER,
            index_kpool=4,
            layer_types=["linear_attention", "indexed_attention", "indexed_attention"],
            indexer_types=["full", "full", "shared"],
            mlp_layer_types=["dense", "sparse", "sparse"],
            linear_head_dim=16,
            linear_num_heads=4,
            hc_mult=2,
        ),
        **_glm_ids(ids),
    }


# ---------------------------------------------------------------------- without a PIL image processor

GRIDS = ((6, 8), (4, 6), (8, 4), (6, 6))
"""(rows, columns) of the images' patches in hand-made inputs."""


def _packed_inputs(
    special: dict[str, str], image_text: str, patch_shape: tuple[int, ...], grids: str, axes: int
) -> Callable[[Sequence[int]], dict[str, Tensor]]:
    """Hand-made inputs of a tower that takes packed patches: what the processor gives where torchvision is."""
    tiny = TinyFamily("", lambda ids, vocab_size: {}, special=special)

    def inputs(n_images: Sequence[int]) -> dict[str, Tensor]:
        tokenizer = tokenizer_of(tiny)
        sizes = torch.tensor([GRIDS[i % len(GRIDS)] for i in range(sum(n_images))])
        runs = iter((sizes.prod(-1) // 4).tolist())
        text = []
        for n, question in zip(
            n_images, ("What colour is the letter K?", "Where?", "Which page?"), strict=False
        ):
            images = "".join(
                image_text.replace(special["image_token"], special["image_token"] * next(runs))
                for _ in range(n)
            )
            text.append(f"<|im_start|>user\n{images}{question}<|im_end|>\n<|im_start|>assistant\n")
        encoded = tokenizer(text, padding=True, padding_side="left", return_tensors="pt")
        generator = torch.Generator().manual_seed(1)
        shapes = torch.cat([torch.ones(len(sizes), axes - 2, dtype=torch.long), sizes], dim=-1)
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "pixel_values": torch.randn(int(sizes.prod(-1).sum()), *patch_shape, generator=generator),
            grids: shapes,
        }

    return inputs


def _only_with_torchvision(
    build: Callable[[dict[str, Any]], ProcessorMixin],
) -> Callable[[dict[str, Any]], ProcessorMixin] | None:
    """These families have no PIL image processor: their layouts are proven wherever torchvision is installed."""
    return build if is_torchvision_available() else None


# ---------------------------------------------------------------------- kimi_k25

KIMI_SPECIAL = {
    "image_token": "<|media_pad|>",
    "video_token": "<|kimi_k25_video_placeholder|>",
    "vision_start_token": "<|media_begin|>",
    "vision_end_token": "<|media_end|>",
}
KIMI_IMAGE_TEXT = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>"


def _kimi_processor(shared: dict[str, Any]) -> ProcessorMixin:
    from transformers import Kimi_K25ImageProcessor

    image_processor = Kimi_K25ImageProcessor(
        patch_size=PATCH, merge_size=2, max_patches=256, size={"max_height": 32, "max_width": 32}
    )
    return without_video(Kimi_K25Processor)(image_processor=image_processor, **shared)


def _kimi_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": tower(pos_emb_height=8, pos_emb_width=8),
        "text_config": text_config("deepseek_v3", vocab_size, **MLA, first_k_dense_replace=1),
        "projection_hidden_size": 32,
        "tie_word_embeddings": False,
        **{f"{name}_id": ids[name] for name in KIMI_SPECIAL},
    }


# ---------------------------------------------------------------------- nemotron_h_omni

NEMOTRON_SPECIAL = {
    "image_token": "<image>",
    "video_token": "<video>",
    "audio_token": "<so_embedding>",
    "image_start_token": "<img>",
    "image_end_token": "</img>",
}


def _nemotron_processor(shared: dict[str, Any]) -> ProcessorMixin:
    from transformers import NemotronH_Omni_Reasoning_V3ImageProcessor

    image_processor = NemotronH_Omni_Reasoning_V3ImageProcessor(
        patch_size=PATCH, min_num_patches=16, max_num_patches=256
    )
    return without_video(NemotronH_Omni_Reasoning_V3Processor)(
        image_processor=image_processor, feature_extractor=ParakeetFeatureExtractor(), **shared
    )


def _nemotron_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "mlp_ratio": 1.5,
            "patch_size": PATCH,
            "max_img_size": 16 * PATCH,
            "num_cls_tokens": 2,
            "num_registers": 2,
            "video_temporal_patch_size": 2,
        },
        "text_config": text_config(
            "nemotron_h",
            vocab_size,
            num_hidden_layers=None,
            layers_block_type=["linear_attention", "full_attention", "moe", "mlp", "full_attention"],
            ssm_state_size=8,
            mamba_num_heads=4,
            mamba_head_dim=16,
            n_groups=2,
            chunk_size=16,
            n_routed_experts=4,
            moe_intermediate_size=32,
            moe_shared_expert_intermediate_size=32,
        ),
        "projector_hidden_size": 48,
        "vision_hidden_size": 32,
        **{f"{name}_id": ids[name] for name in ("image_token", "video_token", "audio_token")},
    }


# ---------------------------------------------------------------------- muse_glimmer, muse_spark

MUSE_SPECIAL = {
    "image_token": "<|patch|>",
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "video_token": "<|video|>",
    "video_sep_token": "<|vid_frame_separator|>",
    "video_start_token": "<|vid_start|>",
    "video_end_token": "<|vid_end|>",
    "audio_token": "<|audio|>",
}


def _muse(processor_class: type[ProcessorMixin], **more: Any) -> Callable[[dict[str, Any]], ProcessorMixin]:
    def processor(shared: dict[str, Any]) -> ProcessorMixin:
        from transformers import MuseGlimmerImageProcessor

        image_processor = MuseGlimmerImageProcessor(patch_size=PATCH, merge_size=2, max_image_tokens=64)
        return without_video(processor_class)(image_processor=image_processor, **more, **shared)

    return processor


_MUSE_VISION: dict[str, Any] = {
    # Windows of 4 x 4 patches, so that tiny images have several, and one full layer.
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "layer_types": ["window_attention", "window_attention", "full_attention"],
}
_MUSE_TEXT: dict[str, Any] = {
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "layer_rope_theta": [10000.0, 10000.0, 0],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "sliding_window": 16,
    "output_multiplier": (D_MODEL / 256) ** -0.5,
}


def _muse_glimmer_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": tower(**_MUSE_VISION),
        "text_config": text_config("muse_glimmer_text", vocab_size, **_MUSE_TEXT),
        "out_hidden_size": 4 * 32,
        "projector_hidden_size": 48,
        "image_token_id": ids["image_token"],
        "video_token_id": ids["video_token"],
    }


def _muse_spark_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        **_muse_glimmer_options(ids, vocab_size),
        "text_config": text_config(
            "muse_spark_text",
            vocab_size,
            **_MUSE_TEXT,
            mlp_layer_types=["dense", "sparse", "sparse"],
            num_local_experts=4,
            num_experts_per_tok=2,
            moe_hidden_size=32,
            moe_intermediate_size=32,
        ),
        "audio_config": {
            "patch_sizes": [4, 2],
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "num_hidden_layers": 2,
            "out_hidden_size": D_MODEL,
        },
        "audio_token_id": ids["audio_token"],
    }


FAMILIES: tuple[TinyFamily, ...] = (
    _glm("glm4v", _glm4v_options, Glm4vProcessor, Glm4vImageProcessorPil, "Glm4vVideoProcessor"),
    _glm("glm4v_moe", _glm4v_moe_options, Glm4vProcessor, Glm4vImageProcessorPil, "Glm4vVideoProcessor"),
    _glm("glm46v", _glm4v_options, Glm46VProcessor, Glm46VImageProcessorPil, "Glm46VVideoProcessor"),
    # transformers maps no processor to these two; their checkpoints name GLM-4.6V's.
    _glm("glm_ocr", _glm_ocr_options, Glm46VProcessor, Glm46VImageProcessorPil, "Glm46VVideoProcessor"),
    _glm("glmga", _glm4v_options, Glm46VProcessor, GlmgaImageProcessorPil, "GlmgaVideoProcessor"),
    TinyFamily(
        "paddleocr_vl",
        _paddle_options,
        special=PADDLE_SPECIAL,
        image_text="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        processor=_paddle_processor,
        cell=2 * PATCH,
    ),
    TinyFamily(
        "ernie4_5_vl_moe",
        _ernie_options,
        special=ERNIE_SPECIAL,
        image_text="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        processor=_ernie_processor,
        cell=2 * PATCH,
    ),
    TinyFamily(
        "hunyuan_vl",
        _hunyuan_options,
        special=HUNYUAN_SPECIAL,
        image_text="<|hy_image_start|><|hy_image|><|hy_image_end|>",
        processor=_hunyuan_processor,
        cell=2 * PATCH,
    ),
    TinyFamily(
        "kimi_k25",
        _kimi_options,
        special=KIMI_SPECIAL,
        more_tokens=("<|media_content|>",),
        image_text=KIMI_IMAGE_TEXT,
        processor=_only_with_torchvision(_kimi_processor),
        inputs=_packed_inputs(
            KIMI_SPECIAL, "<|media_begin|><|media_pad|><|media_end|>", (3, PATCH, PATCH), "image_grid_thw", 3
        ),
        cell=2 * PATCH,
    ),
    TinyFamily(
        "nemotron_h_omni",
        _nemotron_options,
        special=NEMOTRON_SPECIAL,
        more_tokens=("<so_start>", "<so_end>"),
        image_text="<image>",
        processor=_only_with_torchvision(_nemotron_processor),
        inputs=_packed_inputs(
            NEMOTRON_SPECIAL, "<img><image></img>", (3 * PATCH * PATCH,), "image_grid_hw", 2
        ),
        cell=2 * PATCH,
    ),
    TinyFamily(
        "dots3_note",
        _dots_options,
        special=DOTS_SPECIAL,
        image_text="<|img|><|imgpad|><|endofimg|>",
        video_text="<|img|><|video_pad|><|endofimg|>",
        processor=_dots_processor,
        cell=2 * PATCH,
        # The merger opens with a norm, which undoes a change of scale.
        inert=("vision.ln_post.hook_scale",),
    ),
    TinyFamily(
        "muse_glimmer",
        _muse_glimmer_options,
        special=MUSE_SPECIAL,
        image_text="<|patch|>",
        processor=_only_with_torchvision(_muse(MuseGlimmerProcessor)),
        inputs=_packed_inputs(
            MUSE_SPECIAL, "<|image_start|><|patch|><|image_end|>", (6 * PATCH * PATCH,), "image_grid_thw", 3
        ),
        cell=2 * PATCH,
        reach=3,
    ),
    TinyFamily(
        "muse_spark",
        _muse_spark_options,
        special=MUSE_SPECIAL,
        more_tokens=("<|soft_audio_start|>", "<|soft_audio_end|>"),
        image_text="<|patch|>",
        processor=_only_with_torchvision(
            _muse(MuseSparkProcessor, feature_extractor=MuseSparkFeatureExtractor())
        ),
        inputs=_packed_inputs(
            MUSE_SPECIAL, "<|image_start|><|patch|><|image_end|>", (6 * PATCH * PATCH,), "image_grid_thw", 3
        ),
        cell=2 * PATCH,
        reach=3,
    ),
    TinyFamily(
        "glm5_next",
        _glm5_next_options,
        special=GLM_SPECIAL,
        image_text=GLM_IMAGE_TEXT,
        processor=_glm5_next_processor,
        cell=2 * PATCH,
        # Queries and keys without rotation pass a norm of their latents, which undoes a change of scale.
        inert=("blocks.2.ln1.hook_scale",),
    ),
    *(
        [
            TinyFamily(
                "hy_v4_vl",
                _hy_v4_options,
                special=HY_V4_SPECIAL,
                image_text="<|vision_start|><|image_pad|><|vision_end|>",
                processor=_hy_v4_processor,
                cell=2 * PATCH,
                # Learnt sinks and selected keys: transformers has eager attention alone.
                attention=("eager",),
            )
        ]
        if "hy_v4_vl" in CONFIG_MAPPING
        else []
    ),
)
