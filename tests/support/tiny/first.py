"""The seven families that the whole test suite runs on: one of each common kind."""

from __future__ import annotations

import copy
from typing import Any

from transformers import (
    Idefics3Processor,
    InternVLProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen3VLProcessor,
    SmolVLMProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tiny.base import D_MODEL, PATCH, TinyFamily, TokenIds, text_config, tower, with_video

LLAVA_SIZE = 40
# 34 = 4 patches of 8 and a remainder of 2 that the vision tower never sees, as 384 is 27 x 14 and 6.
ONEVISION_SIZE = 34
ONEVISION_PINPOINTS = [[34 * h, 34 * w] for h in range(1, 5) for w in range(1, 5) if h * w <= 8]
INTERNVL_SIZE = 48
IDEFICS_SIZE = 48
IDEFICS_SEQ_LEN = (IDEFICS_SIZE // PATCH // 2) ** 2


# ---------------------------------------------------------------------- llava


def _llava_processor(shared: dict[str, Any]) -> ProcessorMixin:
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": LLAVA_SIZE}, crop_size={"height": LLAVA_SIZE, "width": LLAVA_SIZE}
        ),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        **shared,
    )


def _llava_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": tower(model_type="clip_vision_model", image_size=LLAVA_SIZE, projection_dim=32),
        "text_config": text_config("llama", vocab_size),
        "image_token_index": ids["image_token"],
        "image_seq_length": (LLAVA_SIZE // PATCH) ** 2,
        "vision_feature_layer": -1,
    }


# ---------------------------------------------------------------------- llava_onevision


def _onevision_processor(shared: dict[str, Any]) -> ProcessorMixin:
    return with_video(
        LlavaOnevisionProcessor,
        "LlavaOnevisionVideoProcessor",
        {"size": {"height": ONEVISION_SIZE, "width": ONEVISION_SIZE}},
        image_processor=LlavaOnevisionImageProcessorPil(
            size={"height": ONEVISION_SIZE, "width": ONEVISION_SIZE},
            image_grid_pinpoints=copy.deepcopy(ONEVISION_PINPOINTS),
        ),
        num_image_tokens=(ONEVISION_SIZE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
        **shared,
    )


def _onevision_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": tower(
            model_type="siglip_vision_model", image_size=ONEVISION_SIZE, vision_use_head=False
        ),
        "text_config": text_config("qwen2", vocab_size),
        "image_token_index": ids["image_token"],
        "video_token_index": ids["video_token"],
        "image_grid_pinpoints": copy.deepcopy(ONEVISION_PINPOINTS),
        "vision_aspect_ratio": "anyres_max_4",
    }


# ---------------------------------------------------------------------- qwen

QWEN_SPECIAL = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
QWEN_IMAGE_TEXT = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_VIDEO_TEXT = "<|vision_start|><|video_pad|><|vision_end|>"


_QWEN_VIDEO = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
# The sizes of Qwen2-VL's halves are of a frame, Qwen3-VL's of a clip.
QWEN_VIDEOS: dict[str, dict[str, Any]] = {
    "Qwen2VLVideoProcessor": {
        **_QWEN_VIDEO,
        "size": {"shortest_edge": 32 * 32, "longest_edge": 128 * 128},
        "cap_pixels_per_frame": False,
    },
    "Qwen3VLVideoProcessor": {
        **_QWEN_VIDEO,
        "size": {"shortest_edge": 2 * 32 * 32, "longest_edge": 8 * 128 * 128},
        "cap_pixels_per_frame": False,
    },
    "CohereCompassVideoProcessor": {
        **_QWEN_VIDEO,
        "size": {"shortest_edge": 2 * 32 * 32, "longest_edge": 8 * 128 * 128},
    },
    "VideoLlama3VideoProcessor": {
        "patch_size": PATCH,
        "size": {"shortest_edge": 32 * 32, "longest_edge": 20 * 128 * 128},
    },
}


def qwen_image_processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128},
    )


def qwen_tower(**changes: Any) -> dict[str, Any]:
    return {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": D_MODEL,
        **changes,
    }


def qwen_ids(ids: TokenIds) -> dict[str, int]:
    return {
        "image_token_id": ids["image_token"],
        "video_token_id": ids["video_token"],
        "vision_start_token_id": ids["vision_start_token"],
        "vision_end_token_id": ids["vision_end_token"],
    }


def _qwen2_5_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    return {
        # A window of 4 x 4 patches, so that tiny images have several windows and one full layer.
        "vision_config": qwen_tower(window_size=4 * PATCH, fullatt_block_indexes=[2]),
        "text_config": text_config("qwen2_5_vl_text", vocab_size, rope_parameters=rope, head_dim=None),
        **qwen_ids(ids),
    }


def _qwen3_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    }
    return {
        "vision_config": qwen_tower(num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        "text_config": text_config("qwen3_vl_text", vocab_size, rope_parameters=rope),
        **qwen_ids(ids),
    }


# ---------------------------------------------------------------------- internvl


def _internvl_processor(shared: dict[str, Any]) -> ProcessorMixin:
    return with_video(
        InternVLProcessor,
        "InternVLVideoProcessor",
        {"size": {"height": INTERNVL_SIZE, "width": INTERNVL_SIZE}},
        image_processor=GotOcr2ImageProcessorPil(
            size={"height": INTERNVL_SIZE, "width": INTERNVL_SIZE}, crop_to_patches=True, max_patches=6
        ),
        image_seq_length=(INTERNVL_SIZE // PATCH // 2) ** 2,
        **shared,
    )


def _internvl_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": tower(
            image_size=[INTERNVL_SIZE, INTERNVL_SIZE],
            patch_size=[PATCH, PATCH],
            layer_scale_init_value=1.0,
        ),
        "text_config": text_config("qwen2", vocab_size),
        "image_token_id": ids["context_image_token"],
        "image_seq_length": (INTERNVL_SIZE // PATCH // 2) ** 2,
        "tie_word_embeddings": False,
    }


# ---------------------------------------------------------------------- idefics3, smolvlm

_IDEFICS_SPECIAL = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
_IDEFICS_ROWS = tuple(f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5))
_IDEFICS_IMAGES: dict[str, Any] = {
    "size": {"longest_edge": 2 * IDEFICS_SIZE},
    "max_image_size": {"longest_edge": IDEFICS_SIZE},
}


def _idefics3_processor(shared: dict[str, Any]) -> ProcessorMixin:
    return Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(**copy.deepcopy(_IDEFICS_IMAGES)),
        image_seq_len=IDEFICS_SEQ_LEN,
        **shared,
    )


def _smolvlm_processor(shared: dict[str, Any]) -> ProcessorMixin:
    return with_video(
        SmolVLMProcessor,
        "SmolVLMVideoProcessor",
        {**copy.deepcopy(_IDEFICS_IMAGES), "num_frames": 8, "fps": 1},
        image_processor=SmolVLMImageProcessorPil(**copy.deepcopy(_IDEFICS_IMAGES)),
        image_seq_len=IDEFICS_SEQ_LEN,
        **shared,
    )


def _idefics_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": tower(image_size=IDEFICS_SIZE),
        "text_config": text_config("llama", vocab_size, pad_token_id=ids["pad"]),
        "image_token_id": ids["image_token"],
        "scale_factor": 2,
    }


FAMILIES = (
    TinyFamily(
        "llava",
        _llava_options,
        special={"image_token": "<image>"},
        image_text="<image>\n",
        processor=_llava_processor,
        cell=PATCH,
    ),
    TinyFamily(
        "llava_onevision",
        _onevision_options,
        special={"image_token": "<image>", "video_token": "<video>"},
        image_text="<image>\n",
        video_text="<video>\n",
        processor=_onevision_processor,
        cell=PATCH,
    ),
    TinyFamily(
        "qwen2_5_vl",
        _qwen2_5_options,
        special=QWEN_SPECIAL,
        image_text=QWEN_IMAGE_TEXT,
        video_text=QWEN_VIDEO_TEXT,
        processor=lambda shared: with_video(
            Qwen2_5_VLProcessor,
            "Qwen2VLVideoProcessor",
            QWEN_VIDEOS["Qwen2VLVideoProcessor"],
            image_processor=qwen_image_processor(),
            **shared,
        ),
        cell=2 * PATCH,
    ),
    TinyFamily(
        "qwen3_vl",
        _qwen3_options,
        special=QWEN_SPECIAL,
        image_text=QWEN_IMAGE_TEXT,
        video_text=QWEN_VIDEO_TEXT,
        processor=lambda shared: with_video(
            Qwen3VLProcessor,
            "Qwen3VLVideoProcessor",
            QWEN_VIDEOS["Qwen3VLVideoProcessor"],
            image_processor=qwen_image_processor(),
            **shared,
        ),
        cell=2 * PATCH,
    ),
    TinyFamily(
        "internvl",
        _internvl_options,
        special={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        image_text="<IMG_CONTEXT>\n",
        video_text="<video>\n",
        processor=_internvl_processor,
        cell=2 * PATCH,
    ),
    TinyFamily(
        "idefics3",
        _idefics_options,
        special=_IDEFICS_SPECIAL,
        more_tokens=_IDEFICS_ROWS,
        image_text="<image>",
        processor=_idefics3_processor,
        cell=2 * PATCH,
        reach=3,
    ),
    TinyFamily(
        "smolvlm",
        _idefics_options,
        special={**_IDEFICS_SPECIAL, "video_token": "<video>"},
        more_tokens=_IDEFICS_ROWS,
        image_text="<image>",
        video_text="<video>",
        processor=_smolvlm_processor,
        cell=2 * PATCH,
        reach=3,
    ),
)
