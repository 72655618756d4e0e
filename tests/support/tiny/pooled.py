"""Families whose tokens pool or shuffle a block of patches.

The image processors of cohere2_vision, llama4, lfm2_vl and gemma4_unified are written on torchvision only: with
torchvision installed these families run through their real processor, without it on hand-made inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AyaVisionProcessor,
    Cohere2VisionProcessor,
    Gemma3nAudioFeatureExtractor,
    Gemma3nProcessor,
    Gemma3Processor,
    Gemma4AudioFeatureExtractor,
    Gemma4Processor,
    GraniteDoclingProcessor,
    Idefics2Processor,
    Lfm2VlProcessor,
    Lfm3VlProcessor,
    Llama4Processor,
    Ovis2Processor,
    PaliGemmaProcessor,
    ProcessorMixin,
    QianfanOCRProcessor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.granite_docling.image_processing_pil_granite_docling import (
    GraniteDoclingImageProcessorPil,
)
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.utils import is_timm_available, is_torchvision_available

from mmlens.families.processors import without_video
from tiny.base import D_MODEL, PATCH, TinyFamily, TokenIds, text_config, token_ids_of, tower, with_video
from tiny.first import QWEN_VIDEOS, qwen_image_processor

SIDE = 48
TOKENS = (SIDE // PATCH // 2) ** 2
"""Tokens of a view of SIDE pixels, one per 2 x 2 patches."""


def _got_ocr_image_processor() -> GotOcr2ImageProcessorPil:
    return GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=True, min_patches=1, max_patches=4
    )


def _hand_made(
    special: Callable[[], tuple[TokenIds, int]],
    image: Callable[[TokenIds, int], list[int]],
    pixels: Callable[[int], dict[str, Tensor]],
    question: Sequence[int] = (40, 41, 42, 43, 44, 45),
) -> Callable[[Sequence[int]], dict[str, Tensor]]:
    """Inputs made without the processor: every row holds its images, then a question that grows with the row."""

    def inputs(n_images: Sequence[int]) -> dict[str, Tensor]:
        ids, _ = special()
        rows, number = [], 0
        for row, n in enumerate(n_images):
            own = [ids["bos"]]
            for _ in range(n):
                own += image(ids, number)
                number += 1
            rows.append([*own, *question, *range(50, 50 + row)])
        length = max(map(len, rows))
        return {
            "input_ids": torch.tensor([[ids["pad"]] * (length - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
            **pixels(number),
        }

    return inputs


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


# ---------------------------------------------------------------------- gemma3, shieldgemma2

GEMMA3_SPECIAL = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
}


def _gemma3_processor(shared: dict[str, Any]) -> ProcessorMixin:
    return Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(
            size={"height": SIDE, "width": SIDE},
            do_pan_and_scan=False,
            pan_and_scan_min_crop_size=32,
            pan_and_scan_max_num_crops=3,
            pan_and_scan_min_ratio_to_activate=1.2,
        ),
        image_seq_length=TOKENS,
        **shared,
    )


def _gemma3_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": tower(model_type="siglip_vision_model", image_size=SIDE, vision_use_head=False),
        "text_config": text_config(
            "gemma3_text",
            vocab_size,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            sliding_window=24,
            query_pre_attn_scalar=16,
        ),
        "mm_tokens_per_image": TOKENS,
        "image_token_index": ids["image_token"],
        "boi_token_index": ids["boi_token"],
        "eoi_token_index": ids["eoi_token"],
    }


def _shieldgemma2_inputs(n_images: Sequence[int]) -> dict[str, Tensor]:
    """ShieldGemma2Processor writes the prompts itself, one image and one policy each; what it does with them is
    Gemma3Processor's doing, which here takes prompts of any kind."""
    import tiny

    return tiny.tiny_inputs("gemma3", n_images)


# ---------------------------------------------------------------------- gemma3n

GEMMA3N_SPECIAL = {
    **GEMMA3_SPECIAL,
    "audio_token": "<audio_soft_token>",
    "boa_token": "<start_of_audio>",
    "eoa_token": "<end_of_audio>",
}


GEMMA3N_SIDE = 64
GEMMA3N_TOKENS = 4


def _gemma3n_processor(shared: dict[str, Any]) -> ProcessorMixin:
    return Gemma3nProcessor(
        feature_extractor=Gemma3nAudioFeatureExtractor(),
        image_processor=SiglipImageProcessorPil(size={"height": GEMMA3N_SIDE, "width": GEMMA3N_SIDE}),
        image_seq_length=GEMMA3N_TOKENS,
        **shared,
    )


def _gemma3n_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    from timm.models._efficientnet_builder import decode_arch_def

    # The published tower's kinds of blocks, one or two of each: convolutions, then multi-query attention.
    blocks = [
        ["er_r1_k3_s2_e2_c16"],
        ["uir_r1_a3_k5_s2_e2_c16"],
        ["uir_r1_a5_k5_s2_e2_c32", "mqa_r1_k3_h4_v2_s1_d8_c32", "uir_r1_a0_k0_s1_e2_c32"],
        ["uir_r1_a5_k5_s2_e2_c32", *["mqa_r1_k3_h4_s1_d8_c32"] * 2, "uir_r1_a0_k0_s1_e2_c32"],
    ]
    return {
        "vision_config": {
            "model_type": "gemma3n_vision",
            "architecture": "mobilenetv5_300m_enc",
            "model_args": {
                "block_args": decode_arch_def(blocks),
                "stem_size": 16,
                "msfa_output_resolution": math.isqrt(GEMMA3N_TOKENS),
            },
            "vocab_size": 8,
            "vocab_offset": vocab_size,
        },
        "audio_config": {
            "model_type": "gemma3n_audio",
            "vocab_size": 8,
            "vocab_offset": vocab_size + 8,
            "hidden_size": 32,
            "conf_num_hidden_layers": 1,
            "conf_num_attention_heads": 4,
            "sscp_conv_channel_size": [8, 4],
        },
        # As in the published models: sparse first layers, the last ones read the keys and values of earlier ones.
        "text_config": text_config(
            "gemma3n_text",
            vocab_size,
            num_hidden_layers=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            sliding_window=24,
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=vocab_size,
            altup_num_inputs=2,
            laurel_rank=8,
            activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
            pad_token_id=ids["pad"],
        ),
        "vision_soft_tokens_per_image": GEMMA3N_TOKENS,
        "image_token_id": ids["image_token"],
        "boi_token_id": ids["boi_token"],
        "eoi_token_id": ids["eoi_token"],
        "audio_token_id": ids["audio_token"],
        "boa_token_id": ids["boa_token"],
        "eoa_token_id": ids["eoa_token"],
    }


# ---------------------------------------------------------------------- gemma4, gemma4_unified

GEMMA4_SPECIAL = {**GEMMA3N_SPECIAL, "image_token": "<|image|>", "audio_token": "<|audio|>"}
# The tokens of an image depend on its aspect ratio alone, at most 70: long strips get few.
GEMMA4_SIZES = ((210, 10), (14, 240), (30, 190), (60, 48), (20, 200))
GEMMA4_SOFT_TOKENS = 70


def _gemma4_processor(shared: dict[str, Any]) -> ProcessorMixin:
    return with_video(
        Gemma4Processor,
        "Gemma4VideoProcessor",
        {"patch_size": PATCH, "pooling_kernel_size": 2, "max_soft_tokens": GEMMA4_SOFT_TOKENS},
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessorPil(
            patch_size=PATCH, pooling_kernel_size=2, max_soft_tokens=GEMMA4_SOFT_TOKENS
        ),
        image_seq_length=GEMMA4_SOFT_TOKENS,
        **shared,
    )


def _gemma4_ids(ids: TokenIds) -> dict[str, int]:
    return {
        "image_token_id": ids["image_token"],
        "boi_token_id": ids["boi_token"],
        "eoi_token_id": ids["eoi_token"],
        "video_token_id": ids["video_token"],
        "audio_token_id": ids["audio_token"],
        "boa_token_id": ids["boa_token"],
        "eoa_token_index": ids["eoa_token"],
    }


def _gemma4_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": tower(
            model_type="gemma4_vision",
            num_key_value_heads=4,
            head_dim=8,
            pooling_kernel_size=2,
            position_embedding_size=256,
        ),
        # As in the published models: heads of full layers are wider, the last layers read the keys and values
        # of earlier ones, every layer has its own small embedding, and image tokens see each other.
        "text_config": text_config(
            "gemma4_text",
            vocab_size,
            num_hidden_layers=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            sliding_window=24,
            global_head_dim=32,
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=vocab_size,
            use_bidirectional_attention="vision",
            final_logit_softcapping=30.0,
            pad_token_id=ids["pad"],
        ),
        "audio_config": None,
        **_gemma4_ids(ids),
    }


def _gemma4_unified_processor(shared: dict[str, Any]) -> ProcessorMixin:
    from transformers import Gemma4UnifiedAudioFeatureExtractor, Gemma4UnifiedProcessor
    from transformers.models.gemma4_unified.image_processing_gemma4_unified import Gemma4UnifiedImageProcessor

    return without_video(Gemma4UnifiedProcessor)(
        feature_extractor=Gemma4UnifiedAudioFeatureExtractor(),
        image_processor=Gemma4UnifiedImageProcessor(
            patch_size=PATCH, pooling_kernel_size=2, max_soft_tokens=GEMMA4_SOFT_TOKENS
        ),
        video_processor=None,
        image_seq_length=GEMMA4_SOFT_TOKENS,
        **shared,
    )


def _gemma4_unified_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": {
            "model_type": "gemma4_unified_vision",
            "patch_size": PATCH,
            "pooling_kernel_size": 2,
            "mm_embed_dim": D_MODEL,
            "mm_posemb_size": 80,
            "output_proj_dims": D_MODEL,
        },
        "text_config": text_config(
            "gemma4_unified_text",
            vocab_size,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            sliding_window=24,
            global_head_dim=32,
            final_logit_softcapping=30.0,
            pad_token_id=ids["pad"],
        ),
        "audio_config": None,
        **_gemma4_ids(ids),
    }


_UNIFIED_GRIDS = ((3, 2), (2, 4))


def _gemma4_unified_inputs(n_images: Sequence[int]) -> dict[str, Tensor]:
    def image(ids: TokenIds, number: int) -> list[int]:
        rows, columns = _UNIFIED_GRIDS[number % 2]
        return [ids["boi_token"], *[ids["image_token"]] * (rows * columns), ids["eoi_token"]]

    def pixels(n: int) -> dict[str, Tensor]:
        positions = torch.full((n, 8, 2), -1)
        for number in range(n):
            rows, columns = _UNIFIED_GRIDS[number % 2]
            cell = torch.arange(rows * columns)
            positions[number, : rows * columns] = torch.stack([cell % columns, cell // columns], dim=-1)
        values = (0.5 + 0.2 * _noise(n, 8, 3 * (2 * PATCH) ** 2)).clamp(0, 1)
        return {
            "pixel_values": values * (positions[..., :1] >= 0),
            "image_position_ids": positions,
        }

    inputs = _hand_made(lambda: token_ids_of(GEMMA4_UNIFIED), image, pixels)(n_images)
    image_id = token_ids_of(GEMMA4_UNIFIED)[0]["image_token"]
    return {**inputs, "mm_token_type_ids": (inputs["input_ids"] == image_id).long()}


# ---------------------------------------------------------------------- paligemma

# The processor adds these to any tokenizer it is given.
PALIGEMMA_TOKENS = tuple([f"<loc{i:0>4}>" for i in range(1024)] + [f"<seg{i:0>3}>" for i in range(128)])


def _paligemma_processor(shared: dict[str, Any]) -> ProcessorMixin:
    image_processor = SiglipImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_seq_length=4 * TOKENS
    )
    return PaliGemmaProcessor(image_processor=image_processor, **shared)


def _paligemma_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": tower(
            model_type="siglip_vision_model",
            image_size=SIDE,
            vision_use_head=False,
            projection_dim=D_MODEL,
        ),
        "text_config": text_config("gemma", vocab_size),
        "image_token_index": ids["image_token"],
        "projection_dim": D_MODEL,
        "hidden_size": D_MODEL,
        "vocab_size": vocab_size,
    }


# ---------------------------------------------------------------------- aya_vision, cohere2_vision

AYA_TOKENS = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL")


def _cohere_text(vocab_size: int) -> dict[str, Any]:
    return text_config(
        "cohere2",
        vocab_size,
        head_dim=None,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=24,
        logit_scale=0.25,
    )


def _aya_processor(shared: dict[str, Any]) -> ProcessorMixin:
    return AyaVisionProcessor(
        image_processor=_got_ocr_image_processor(),
        patch_size=PATCH,
        img_size=SIDE,
        downsample_factor=2,
        **shared,
    )


def _aya_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": tower(model_type="siglip_vision_model", image_size=SIDE, vision_use_head=False),
        "text_config": _cohere_text(vocab_size),
        "image_token_index": ids["img_patch_token"],
        "downsample_factor": 2,
    }


COHERE_SPECIAL = {
    "image_token": "<|IMG_PATCH|>",
    "boi_token": "<|START_OF_IMG|>",
    "eoi_token": "<|END_OF_IMG|>",
    "img_line_break_token": "<|IMG_LINE_BREAK|>",
}


def _cohere2_processor(shared: dict[str, Any]) -> ProcessorMixin:
    from transformers.models.cohere2_vision.image_processing_cohere2_vision import Cohere2VisionImageProcessor

    return Cohere2VisionProcessor(
        # The image processor's patch_size is the number of TOKENS on a side of a tile.
        image_processor=Cohere2VisionImageProcessor(
            size={"height": SIDE, "width": SIDE}, max_patches=4, patch_size=SIDE // PATCH // 2
        ),
        **shared,
    )


def _cohere2_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": tower(model_type="siglip_vision_model", image_size=SIDE, vision_use_head=False),
        "text_config": _cohere_text(vocab_size),
        "image_token_id": ids["image_token"],
        "downsample_factor": 2,
        "alignment_intermediate_size": 96,
    }


def _tiles_of(number: int) -> int:
    return (1, 3, 1)[number % 3]


def _n_tiles(n_images: int) -> int:
    return sum(map(_tiles_of, range(n_images)))


def _cohere2_inputs(n_images: Sequence[int]) -> dict[str, Tensor]:
    def image(ids: TokenIds, number: int) -> list[int]:
        tile = [*[ids["image_token"]] * TOKENS, ids["img_line_break_token"]]
        return [ids["boi_token"], *tile * _tiles_of(number), ids["eoi_token"]]

    return _hand_made(
        lambda: token_ids_of(COHERE2_VISION),
        image,
        lambda n: {"pixel_values": _noise(_n_tiles(n), 3, SIDE, SIDE)},
    )(n_images)


# ---------------------------------------------------------------------- llama4

LLAMA4_SPECIAL = {
    "image_token": "<|image|>",
    "start_of_image_token": "<|image_start|>",
    "end_of_image_token": "<|image_end|>",
    "patch_token": "<|patch|>",
    "tile_x_separator_token": "<|tile_x_separator|>",
    "tile_y_separator_token": "<|tile_y_separator|>",
}


def _llama4_processor(shared: dict[str, Any]) -> ProcessorMixin:
    from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor

    return Llama4Processor(
        image_processor=Llama4ImageProcessor(size={"height": SIDE, "width": SIDE}, max_patches=4),
        patch_size=PATCH,
        pixel_shuffle_ratio=0.5,
        **shared,
    )


def _llama4_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": tower(
            model_type="llama4_vision_model",
            image_size=SIDE,
            intermediate_size=128,
            vision_output_dim=40,
            projector_input_dim=40,
            projector_output_dim=40,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        # Three layers of chunked attention with rotary positions and one of full attention without, experts in
        # every second.
        "text_config": text_config(
            "llama4_text",
            vocab_size,
            num_hidden_layers=4,
            intermediate_size_mlp=96,
            num_local_experts=4,
            interleave_moe_layer_step=2,
            attention_chunk_size=64,
        ),
        "image_token_index": ids["patch_token"],
        "boi_token_index": ids["start_of_image_token"],
        "eoi_token_index": ids["end_of_image_token"],
    }


def _llama4_inputs(n_images: Sequence[int]) -> dict[str, Tensor]:
    def image(ids: TokenIds, number: int) -> list[int]:
        tile = [ids["patch_token"]] * TOKENS
        tiled = [*tile, ids["tile_x_separator_token"], *tile, ids["tile_y_separator_token"]]
        view = [ids["image_token"], *tile, ids["end_of_image_token"]]
        return [ids["start_of_image_token"], *(tiled if _tiles_of(number) > 1 else []), *view]

    return _hand_made(
        lambda: token_ids_of(LLAMA4),
        image,
        lambda n: {"pixel_values": _noise(_n_tiles(n), 3, SIDE, SIDE)},
    )(n_images)


# ---------------------------------------------------------------------- lfm2_vl, lfm3_vl

LFM_SPECIAL = {
    "image_token": "<image>",
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "image_thumbnail_token": "<|img_thumbnail|>",
}
LFM_ROWS = tuple(f"<|img_row_{r}_col_{c}|>" for r in range(1, 5) for c in range(1, 5))
LFM_MOST = 12
"""Tokens of an image that is not cut into tiles, at most."""


def _lfm2_processor(shared: dict[str, Any]) -> ProcessorMixin:
    from transformers.models.lfm2_vl.image_processing_lfm2_vl import Lfm2VlImageProcessor

    return Lfm2VlProcessor(
        image_processor=Lfm2VlImageProcessor(
            encoder_patch_size=PATCH,
            downsample_factor=2,
            tile_size=SIDE,
            min_tiles=2,
            max_tiles=4,
            min_image_tokens=4,
            max_image_tokens=LFM_MOST,
        ),
        **shared,
    )


def _lfm2_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": tower(
            model_type="siglip2_vision_model", num_patches=64, vision_use_head=False, image_size=None
        )
        | {"image_size": SIDE},
        "text_config": text_config(
            "lfm2",
            vocab_size,
            head_dim=None,
            layer_types=["conv", "full_attention", "full_attention"],
            block_auto_adjust_ff_dim=False,
        ),
        "image_token_id": ids["image_token"],
        "downsample_factor": 2,
        "projector_hidden_size": 96,
    }


_LFM_GRIDS = ((3, 2), (2, 4))


def _lfm2_inputs(n_images: Sequence[int]) -> dict[str, Tensor]:
    def image(ids: TokenIds, number: int) -> list[int]:
        rows, columns = _LFM_GRIDS[number % 2]
        return [ids["image_start_token"], *[ids["image_token"]] * (rows * columns), ids["image_end_token"]]

    def pixels(n: int) -> dict[str, Tensor]:
        shapes = torch.tensor([[2 * side for side in _LFM_GRIDS[number % 2]] for number in range(n)])
        mask = (torch.arange(4 * LFM_MOST) < shapes.prod(dim=-1, keepdim=True)).int()
        return {
            "pixel_values": _noise(n, 4 * LFM_MOST, 3 * PATCH**2) * mask[..., None],
            "pixel_attention_mask": mask,
            "spatial_shapes": shapes,
        }

    return _hand_made(lambda: token_ids_of(LFM2_VL), image, pixels)(n_images)


def _lfm3_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": {
            "model_type": "lfm3_vl_vision",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "patch_size": PATCH,
            "layer_types": ["conv", "full_attention", "full_attention"],
        },
        "text_config": text_config(
            "lfm3",
            vocab_size,
            layer_types=["conv", "full_attention", "sliding_attention"],
            sliding_window=24,
            conv_L_cache=3,
        ),
        "image_token_id": ids["image_token"],
        "video_token_id": ids["video_token"],
        "vision_start_token_id": ids["vision_start_token"],
        "vision_end_token_id": ids["vision_end_token"],
        "projector_hidden_size": 96,
    }


# ---------------------------------------------------------------------- idefics2

IDEFICS2_LATENTS = 4


def _idefics2_processor(shared: dict[str, Any]) -> ProcessorMixin:
    return Idefics2Processor(
        image_processor=Idefics2ImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64}),
        image_seq_len=IDEFICS2_LATENTS,
        **shared,
    )


def _idefics2_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": tower(image_size=64),
        "perceiver_config": {
            "hidden_size": D_MODEL,
            "resampler_n_latents": IDEFICS2_LATENTS,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
        "text_config": text_config("mistral", vocab_size, pad_token_id=ids["pad"]),
        "image_token_id": ids["image_token"],
    }


# ---------------------------------------------------------------------- ovis2

OVIS_SPECIAL = {
    "image_token": "<image>",
    "image_atom": "<IMG_ATOM>",
    "image_start": "<IMG_START>",
    "image_grid": "<IMG_GRID>",
    "image_column": "<IMG_COL>",
    "image_row": "<IMG_ROW>",
    "image_end": "<IMG_END>",
}


def _ovis2_processor(shared: dict[str, Any]) -> ProcessorMixin:
    return Ovis2Processor(
        image_processor=Ovis2ImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=4
        ),
        image_seq_length=TOKENS,
        **shared,
    )


def _ovis2_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    indicators = ("image_start", "image_grid", "image_column", "image_row", "image_end")
    return {
        "vision_config": tower(
            model_type="ovis2_vision",
            image_size=SIDE,
            hidden_stride=2,
            vocab_size=40,
            num_visual_indicator_tokens=len(indicators),
        ),
        "text_config": text_config("qwen2", vocab_size, head_dim=None),
        "image_token_id": ids["image_atom"],
        "visual_indicator_token_ids": [ids[name] for name in indicators],
        "vocab_size": vocab_size,
        "hidden_size": D_MODEL,
    }


# ---------------------------------------------------------------------- qianfan_ocr

QIANFAN_SPECIAL = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
}


def _qianfan_processor(shared: dict[str, Any]) -> ProcessorMixin:
    return QianfanOCRProcessor(image_processor=_got_ocr_image_processor(), image_seq_length=TOKENS, **shared)


def _qianfan_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": tower(
            model_type="qianfan_ocr_vision",
            image_size=[SIDE, SIDE],
            patch_size=[PATCH, PATCH],
            layer_scale_init_value=1.0,
        ),
        "text_config": text_config("qwen3", vocab_size),
        "image_token_id": ids["context_image_token"],
        "image_seq_length": TOKENS,
    }


# ---------------------------------------------------------------------- granite_docling

DOCLING_SIDE = 64
DOCLING_SCALE = 4


def _granite_docling_processor(shared: dict[str, Any]) -> ProcessorMixin:
    return GraniteDoclingProcessor(
        image_processor=GraniteDoclingImageProcessorPil(
            size={"height": DOCLING_SIDE, "width": DOCLING_SIDE}, max_patches=4
        ),
        image_seq_len=(DOCLING_SIDE // PATCH // DOCLING_SCALE) ** 2,
        **shared,
    )


def _granite_docling_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": tower(
            model_type="granite_docling_vision",
            image_size=DOCLING_SIDE,
            out_hidden_size=D_MODEL,
            scale_factor=DOCLING_SCALE,
            deepstack_visual_indexes=[0, 1],
        ),
        "text_config": text_config(
            "granite_docling_text",
            vocab_size,
            head_dim=None,
            embedding_multiplier=2.0,
            logits_scaling=2.0,
            residual_multiplier=0.5,
            attention_multiplier=0.25,
        ),
        "image_token_id": ids["image_token"],
        "pad_token_id": ids["pad"],
    }


# ---------------------------------------------------------------------- the families


def _with_torchvision(build: Callable[[dict[str, Any]], ProcessorMixin]) -> Any:
    return build if is_torchvision_available() else None


GEMMA4_UNIFIED = TinyFamily(
    "gemma4_unified",
    _gemma4_unified_options,
    special={**GEMMA4_SPECIAL, "video_token": "<|video|>"},
    image_text="<|image|>",
    processor=_with_torchvision(_gemma4_unified_processor),
    inputs=_gemma4_unified_inputs,
    cell=2 * PATCH,
    sizes=GEMMA4_SIZES,
    # Queries, keys and values are all normed again, which undoes a change of scale.
    inert=("blocks.*.ln1.hook_scale",),
)
COHERE2_VISION = TinyFamily(
    "cohere2_vision",
    _cohere2_options,
    special=COHERE_SPECIAL,
    image_text="<|IMG_PATCH|>",
    processor=_with_torchvision(_cohere2_processor),
    inputs=_cohere2_inputs,
    cell=2 * PATCH,
)
LLAMA4 = TinyFamily(
    "llama4",
    _llama4_options,
    special=LLAMA4_SPECIAL,
    image_text="<|image|>",
    processor=_with_torchvision(_llama4_processor),
    inputs=_llama4_inputs,
    cell=2 * PATCH,
)
LFM2_VL = TinyFamily(
    "lfm2_vl",
    _lfm2_options,
    special=LFM_SPECIAL,
    more_tokens=LFM_ROWS,
    image_text="<image>",
    processor=_with_torchvision(_lfm2_processor),
    inputs=_lfm2_inputs,
    cell=2 * PATCH,
)

GEMMA3N = TinyFamily(
    "gemma3n",
    _gemma3n_options,
    special=GEMMA3N_SPECIAL,
    image_text="<image_soft_token>",
    processor=_gemma3n_processor,
    cell=GEMMA3N_SIDE // math.isqrt(GEMMA3N_TOKENS),
    exact_proof=False,
)

FAMILIES: tuple[TinyFamily, ...] = (
    TinyFamily(
        "gemma3",
        _gemma3_options,
        special=GEMMA3_SPECIAL,
        image_text="<start_of_image>",
        processor=_gemma3_processor,
        cell=2 * PATCH,
    ),
    TinyFamily(
        "paligemma",
        _paligemma_options,
        special={"image_token": "<image>"},
        more_tokens=PALIGEMMA_TOKENS,
        image_text="<image>",
        processor=_paligemma_processor,
        cell=PATCH,
    ),
    TinyFamily(
        "gemma4",
        _gemma4_options,
        special={**GEMMA4_SPECIAL, "video_token": "<|video|>"},
        image_text="<|image|>",
        video_text="<|video|>",
        processor=_gemma4_processor,
        cell=2 * PATCH,
        sizes=GEMMA4_SIZES,
        # Queries, keys and values are all normed again, which undoes a change of scale.
        inert=("blocks.*.ln1.hook_scale",),
    ),
    TinyFamily(
        "aya_vision",
        _aya_options,
        special={"image_token": "<image>", "img_patch_token": "<|IMG_PATCH|>"},
        more_tokens=AYA_TOKENS,
        image_text="<image>",
        processor=_aya_processor,
        cell=2 * PATCH,
    ),
    COHERE2_VISION,
    LLAMA4,
    LFM2_VL,
    TinyFamily(
        "idefics2",
        _idefics2_options,
        special={"image_token": "<image>", "image_boundary_token": "<fake_token_around_image>"},
        more_tokens=("<end_of_utterance>",),
        image_text="<image>",
        processor=_idefics2_processor,
    ),
    TinyFamily(
        "ovis2",
        _ovis2_options,
        special=OVIS_SPECIAL,
        image_text="<image>\n",
        processor=_ovis2_processor,
        cell=2 * PATCH,
    ),
    TinyFamily(
        "qianfan_ocr",
        _qianfan_options,
        special=QIANFAN_SPECIAL,
        more_tokens=("<image>",),
        image_text="<image>\n",
        processor=_qianfan_processor,
        cell=2 * PATCH,
    ),
    TinyFamily(
        "lfm3_vl",
        _lfm3_options,
        special={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
        image_text="<|vision_start|><|image_pad|><|vision_end|>",
        video_text="<|vision_start|><|video_pad|><|vision_end|>",
        processor=lambda shared: with_video(
            Lfm3VlProcessor,
            "Qwen3VLVideoProcessor",
            QWEN_VIDEOS["Qwen3VLVideoProcessor"],
            image_processor=qwen_image_processor(),
            **shared,
        ),
        cell=2 * PATCH,
    ),
    TinyFamily(
        "granite_docling",
        _granite_docling_options,
        special={"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"},
        more_tokens=("<global-img>", *(f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5))),
        image_text="<image>",
        processor=_granite_docling_processor,
        cell=DOCLING_SCALE * PATCH,
    ),
    TinyFamily(
        "shieldgemma2",
        _gemma3_options,
        special=GEMMA3_SPECIAL,
        image_text="<start_of_image>",
        inputs=_shieldgemma2_inputs,
    ),
    GEMMA4_UNIFIED,
    # Its vision tower is timm's, which imports torchvision.
    *((GEMMA3N,) if is_timm_available() and is_torchvision_available() else ()),
)
