"""OCR models, visual codes, and towers of their own kind.

Six of these families resize images with torchvision alone (no PIL half): their processors are built where it is
installed, and the parity suite runs on inputs made by hand, of the same form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AriaProcessor,
    ChameleonProcessor,
    DeepseekOcr2Processor,
    Emu3Processor,
    FuyuProcessor,
    GotOcr2Processor,
    MiniCPMV4_6Processor,
    MiniCPMV4_7Processor,
    PPChart2TableProcessor,
    ProcessorMixin,
)
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil
from transformers.models.deepseek_ocr2.image_processing_pil_deepseek_ocr2 import DeepseekOcr2ImageProcessorPil
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.pp_chart2table.image_processing_pil_pp_chart2table import (
    PPChart2TableImageProcessorPil,
)
from transformers.utils import is_torchvision_available

from mmlens.families.processors import with_flat_images, with_placeholders, without_video
from tiny.base import D_MODEL, PATCH, TinyFamily, TokenIds, text_config, token_ids_of, tower

_QUESTIONS = ((70, 71, 72, 73, 74, 75), (80, 81), (90, 91, 92, 93))
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _rows(
    family: Callable[[], TinyFamily], images: Sequence[Sequence[Sequence[str | int]]]
) -> dict[str, Tensor]:
    """input_ids and attention_mask of prompts made by hand: a start token, images, a question; left-padded.

    An image is a list of special tokens by name (or text), and of ids.
    """
    ids, _ = token_ids_of(family())
    rows = []
    for own, question in zip(images, _QUESTIONS, strict=False):
        row = [ids["bos"]]
        for image in own:
            row += [ids[part] if isinstance(part, str) else part for part in image]
        rows.append([*row, *question])
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[ids["pad"]] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


def _per_row(n_images: Sequence[int], images: Sequence[Any]) -> list[list[Any]]:
    rest = iter(images)
    return [[next(rest) for _ in range(n)] for n in n_images]


# ---------------------------------------------------------------------- molmo2

MOLMO_SIZE = 5 * PATCH
_MOLMO_SPECIAL = {
    "image_token": "<|image|>",
    "video_token": "<|video|>",
    "patch_token": "<im_patch>",
    "column_token": "<im_col>",
    "start_token": "<im_start>",
    "low_start_token": "<low_res_im_start>",
    "frame_start_token": "<frame_start>",
    "end_token": "<im_end>",
    "frame_end_token": "<frame_end>",
    "low_token": "<im_low>",
}


def _molmo2_processor(shared: dict[str, Any]) -> ProcessorMixin:
    from transformers import Molmo2ImageProcessor, Molmo2Processor

    return without_video(Molmo2Processor)(
        image_processor=Molmo2ImageProcessor(
            size={"height": MOLMO_SIZE, "width": MOLMO_SIZE},
            max_crops=4,
            overlap_margins=[1, 1],
            patch_size=PATCH,
            pooling_size=[2, 2],
        ),
        **shared,
    )


def _molmo2_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": tower(num_key_value_heads=4, head_dim=8, image_size=[MOLMO_SIZE, MOLMO_SIZE]),
        "adapter_config": {
            "vision_feature_layer": [2, 1],
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "intermediate_size": 48,
            "text_hidden_size": D_MODEL,
        },
        "text_config": text_config("molmo2_text", vocab_size, additional_vocab_size=8, rope_parameters=_ROPE),
        "image_patch_id": ids["patch_token"],
        "image_start_token_id": ids["start_token"],
        "low_res_image_start_token_id": ids["low_start_token"],
        "image_end_token_id": ids["end_token"],
        "frame_start_token_id": ids["frame_start_token"],
        "frame_end_token_id": ids["frame_end_token"],
    }


def _molmo2_inputs(n_images: Sequence[int]) -> dict[str, Tensor]:
    """Each image whole (3 x 3 tokens), then one crop of it (3 x 3), or two side by side (3 x 4)."""
    side = MOLMO_SIZE // PATCH
    pooling, grids, crops, images, n_patches = [], [], [], [], 0
    for i in range(sum(n_images)):
        whole = torch.arange(side * side).reshape(side, side)
        first, second = whole + side * side, whole + 2 * side * side
        canvas = first if i % 2 else torch.cat([first[:, :-1], second[:, 1:]], dim=1)
        shapes = []
        for grid in (whole, canvas):
            pad_x, pad_y = grid.shape[1] % 2, grid.shape[0] % 2
            padded = torch.nn.functional.pad(grid, (0, pad_x, 0, pad_y), value=-1)
            rows, columns = padded.shape[0] // 2, padded.shape[1] // 2
            blocks = padded.reshape(rows, 2, columns, 2).transpose(1, 2).reshape(-1, 4)
            pooling.append(torch.where(blocks >= 0, blocks + n_patches, -1))
            shapes += [rows, columns]
        grids.append(shapes)
        crops.append(2 if i % 2 else 3)
        n_patches += crops[-1] * side * side
        images.append(
            [
                "low_start_token",
                *(["patch_token"] * shapes[1] + ["column_token"]) * shapes[0],
                "end_token",
                "start_token",
                *(["patch_token"] * shapes[3] + ["column_token"]) * shapes[2],
                "end_token",
            ]
        )
    inputs = _rows(lambda: _MOLMO2, _per_row(n_images, images))
    ids, _ = token_ids_of(_MOLMO2)
    visual = torch.tensor(
        [ids[name] for name in _MOLMO_SPECIAL if name not in ("image_token", "video_token")]
    )
    return {
        **inputs,
        "mm_token_type_ids": torch.isin(inputs["input_ids"], visual).long(),
        "pixel_values": _noise(sum(crops), side * side, 3 * PATCH * PATCH),
        "image_token_pooling": torch.cat(pooling),
        "image_grids": torch.tensor(grids),
        "image_num_crops": torch.tensor(crops),
    }


# ---------------------------------------------------------------------- fuyu


def _fuyu_processor(shared: dict[str, Any]) -> ProcessorMixin:
    return with_placeholders(FuyuProcessor)(
        image_processor=FuyuImageProcessorPil(
            size={"height": 6 * PATCH, "width": 8 * PATCH}, patch_size={"height": PATCH, "width": PATCH}
        ),
        **shared,
    )


def _fuyu_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    text = text_config(
        "persimmon",
        vocab_size,
        # Persimmon has as many key and value heads as query heads, and d_head = d_model / heads.
        num_key_value_heads=None,
        head_dim=None,
        rope_parameters={**_ROPE, "partial_rotary_factor": 0.5},
        qk_layernorm=True,
    )
    return {"text_config": text, "patch_size": PATCH, "image_token_id": ids["image_token"]}


# ---------------------------------------------------------------------- chameleon

N_CODES = 64
CHAMELEON_SIZE = 24
_CHAMELEON_SPECIAL = {"image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>"}
# A code's digits are letters in the token's name: 12 is BC.
_CHAMELEON_CODES = tuple(
    "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(i)) + "Z" for i in range(N_CODES)
)


def _chameleon_processor(shared: dict[str, Any]) -> ProcessorMixin:
    processor = ChameleonProcessor(
        image_processor=ChameleonImageProcessorPil(
            size={"shortest_edge": CHAMELEON_SIZE},
            crop_size={"height": CHAMELEON_SIZE, "width": CHAMELEON_SIZE},
        ),
        tokenizer=shared["tokenizer"],
        image_seq_length=(CHAMELEON_SIZE // 4) ** 2,
    )
    # Its constructor takes no template; and where a template ends the turn, the processor should not.
    processor.chat_template = shared["chat_template"]
    processor.return_for_text_completion = True
    return processor


def _code_ids(codes: Sequence[str], vocab_size: int) -> dict[str, int]:
    """The ids of `codes`, which are the last tokens of the vocabulary."""
    return {code: vocab_size - len(codes) + i for i, code in enumerate(codes)}


def _chameleon_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        **text_config("chameleon", vocab_size, head_dim=None, rope_parameters=_ROPE),
        "vq_config": {
            "embed_dim": 4,
            "num_embeddings": N_CODES,
            "latent_channels": 4,
            "resolution": CHAMELEON_SIZE,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1],
            "num_res_blocks": 1,
        },
        "vocabulary_map": {"<image>": ids["image_token"], **_code_ids(_CHAMELEON_CODES, vocab_size)},
    }


# ---------------------------------------------------------------------- emu3

_EMU_SPECIAL = {
    "image_token": "<image>",
    "boi_token": "<|image start|>",
    "eoi_token": "<|image end|>",
    "image_wrapper_token": "<|image token|>",
    "eof_token": "<|extra_201|>",
}
_EMU_CODES = ("<|extra_200|>", *(f"<|visual token {i:06d}|>" for i in range(N_CODES)))


def _emu3_processor(shared: dict[str, Any]) -> ProcessorMixin:
    return Emu3Processor(
        image_processor=Emu3ImageProcessor(min_pixels=24 * 24, max_pixels=48 * 48, spatial_factor=8), **shared
    )


def _emu3_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "text_config": text_config(
            "emu3_text_model",
            vocab_size,
            pad_token_id=ids["pad"],
            bos_token_id=ids["bos"],
            eos_token_id=ids["eos"],
            head_dim=None,
            rope_parameters=_ROPE,
            attention_dropout=0.0,
        ),
        "vq_config": {
            "codebook_size": N_CODES,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "hidden_size": 32,
            "num_attention_heads": 2,
        },
        "vocabulary_map": {"<image>": ids["image_token"], **_code_ids(_EMU_CODES, vocab_size)},
    }


# ---------------------------------------------------------------------- apertus1p5, new in transformers 5.24

_N_SOUNDS = 8
_APERTUS_SPECIAL = {
    "image_token": "<|image|>",
    "audio_token": "<|audio|>",
    "boi_token": "<|image start|>",
    "eoi_token": "<|image end|>",
    "image_wrapper_token": "<|image token|>",
    "eol_token": "<|end of line|>",
    "boa_token": "<|audio start|>",
    "eoa_token": "<|audio end|>",
}
_APERTUS_CODES = (
    *(f"<|visual token {i}|>" for i in range(N_CODES)),
    *(f"<|audio token {i}|>" for i in range(_N_SOUNDS)),
)
APERTUS_CELL = 8


def _apertus_processor(shared: dict[str, Any]) -> ProcessorMixin:
    from transformers import Apertus1p5ImageProcessor, Apertus1p5Processor, WavTokenizerFeatureExtractor

    return Apertus1p5Processor(
        image_processor=Apertus1p5ImageProcessor(
            size={"min_pixels": 24 * 24, "max_pixels": 48 * 48}, spatial_factor=APERTUS_CELL
        ),
        feature_extractor=WavTokenizerFeatureExtractor(),
        **shared,
    )


def _apertus_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    visual = vocab_size - len(_APERTUS_CODES)
    return {
        "text_config": text_config(
            "apertus1p5_text", vocab_size, head_dim=None, rope_parameters=_ROPE, pad_token_id=ids["pad"]
        ),
        "vision_config": {
            "codebook_size": N_CODES,
            "embed_dim": 8,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
        },
        "audio_config": {
            "model_type": "wavtokenizer_encoder",
            "num_filters": 2,
            "upsampling_ratios": [2, 2],
            "num_lstm_layers": 1,
            "hidden_size": 8,
            "codebook_size": _N_SOUNDS,
            "codebook_dim": 8,
        },
        "image_token_id": ids["image_token"],
        "audio_token_id": ids["audio_token"],
        "image_token_offset": visual,
        "audio_token_offset": visual + N_CODES,
    }


def _apertus_inputs(n_images: Sequence[int]) -> dict[str, Tensor]:
    grids = [((5, 4), (3, 5), (4, 4), (3, 4))[i % 4] for i in range(sum(n_images))]
    images = []
    for rows, columns in grids:
        line = [*["image_token"] * columns, "eol_token"]
        lines = [part for _ in range(rows) for part in line][:-1]
        images.append(["boi_token", 40, 41, "image_wrapper_token", *lines, "eoi_token"])
    most = APERTUS_CELL * max(side for grid in grids for side in grid)
    return {
        **_rows(lambda: _APERTUS, _per_row(n_images, images)),
        "pixel_values": _noise(len(grids), 3, most, most),
        "image_sizes": torch.tensor(grids) * APERTUS_CELL,
    }


# ---------------------------------------------------------------------- got_ocr2, pp_chart2table

GOT_SIZE = 96
_GOT_SEQ_LEN = (GOT_SIZE // PATCH // 4) ** 2


def _sam(**changes: Any) -> dict[str, Any]:
    """SAM's tower: three layers, the last of them without windows."""
    return {
        "hidden_size": 32,
        "output_channels": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "patch_size": PATCH,
        "image_size": GOT_SIZE,
        "window_size": 5,
        "global_attn_indexes": [2],
        "mlp_dim": 48,
        **changes,
    }


def _got_ocr2_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": _sam(),
        "text_config": text_config("qwen2", vocab_size, head_dim=None),
        "image_token_index": ids["image_token"],
        "image_seq_length": _GOT_SEQ_LEN,
        "tie_word_embeddings": False,
    }


def _got_ocr2_processor(shared: dict[str, Any]) -> ProcessorMixin:
    processor = with_flat_images(GotOcr2Processor)(
        image_processor=GotOcr2ImageProcessorPil(size={"height": GOT_SIZE, "width": GOT_SIZE}), **shared
    )
    processor.num_image_tokens = _GOT_SEQ_LEN
    return processor


def _pp_chart2table_processor(shared: dict[str, Any]) -> ProcessorMixin:
    processor = PPChart2TableProcessor(
        image_processor=PPChart2TableImageProcessorPil(size={"height": GOT_SIZE, "width": GOT_SIZE}), **shared
    )
    # It names no image token; load_processor takes the model's.
    processor.image_token_id = shared["tokenizer"].image_token_id
    return processor


# ---------------------------------------------------------------------- minicpm

MINICPM_RESOLUTION = 8 * PATCH
_MINICPM_SPECIAL = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
_MINICPM_IMAGES: dict[str, Any] = {
    "patch_size": PATCH,
    "scale_resolution": MINICPM_RESOLUTION,
    "max_slice_nums": 4,
}


def _minicpm_processor(processor_class: type[ProcessorMixin]) -> Callable[[dict[str, Any]], ProcessorMixin]:
    def build(shared: dict[str, Any]) -> ProcessorMixin:
        return without_video(processor_class)(
            image_processor=MiniCPMV4_6ImageProcessorPil(**_MINICPM_IMAGES), **shared
        )

    return build


def _minicpm_ocr_processor(shared: dict[str, Any]) -> ProcessorMixin:
    from transformers import MiniCPMOcrImageProcessor, MiniCPMOcrProcessor

    return without_video(MiniCPMOcrProcessor)(
        image_processor=MiniCPMOcrImageProcessor(**_MINICPM_IMAGES), **shared
    )


def _minicpm_options(downsample_mode: str, **changes: Any) -> Callable[[TokenIds, int], dict[str, Any]]:
    def options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
        text = text_config(
            "qwen3_5_text",
            vocab_size,
            layer_types=["linear_attention", "full_attention", "full_attention"],
            rope_parameters={
                **_ROPE,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_conv_kernel_dim=4,
        )
        return {
            "vision_config": tower(image_size=MINICPM_RESOLUTION),
            "text_config": text,
            # The tower's patches are merged 2 x 2 after its second layer already (not with downsample_mode 4x).
            "insert_layer_id": 1,
            "downsample_mode": downsample_mode,
            "tie_word_embeddings": False,
            "image_token_id": ids["image_token"],
            "video_token_id": ids["video_token"],
            **{name: ids[token] if isinstance(token, str) else token for name, token in changes.items()},
        }

    return options


def _minicpm_ocr_inputs(n_images: Sequence[int]) -> dict[str, Tensor]:
    """One strip of patches for all views: of each image the whole, and of every other one two slices as well."""
    views, images = [], []
    for i in range(sum(n_images)):
        own = ((4, 4), (2, 4), (2, 4)) if i % 2 else ((4, 6),)
        views += own
        image = ["image_start_token", *["image_token"] * (own[0][0] * own[0][1] // 4), "image_end_token"]
        for rows, columns in own[1:]:
            image += ["slice_start_token", *["image_token"] * (rows * columns // 4), "slice_end_token"]
        images.append(image)
    n_patches = sum(rows * columns for rows, columns in views)
    return {
        **_rows(lambda: _MINICPM_OCR, _per_row(n_images, images)),
        "pixel_values": _noise(1, 3, PATCH, PATCH * n_patches),
        "target_sizes": torch.tensor(views, dtype=torch.int32),
    }


# ---------------------------------------------------------------------- step3p7

STEP_SIZE = 12 * PATCH
STEP_CROP = 8 * PATCH
_STEP_SPECIAL = {
    "image_token": "<im_patch>",
    "patch_start_token": "<patch_start>",
    "patch_end_token": "<patch_end>",
    "patch_newline_token": "<patch_newline>",
    "start_token": "<im_start>",
    "end_token": "<im_end>",
}


def _step3p7_processor(shared: dict[str, Any]) -> ProcessorMixin:
    from transformers import Step3p7ImageProcessor, Step3p7Processor

    image_processor = Step3p7ImageProcessor(
        size={"height": STEP_SIZE, "width": STEP_SIZE}, patch_size=STEP_CROP, max_image_size=4 * STEP_CROP
    )
    image_processor.vision_patch_size = PATCH
    return Step3p7Processor(image_processor=image_processor, **shared)


def _step3p7_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    text = text_config(
        "step3p5",
        vocab_size,
        pad_token_id=ids["pad"],
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"],
        # Sliding layers have their own number of query heads.
        num_sliding_attention_heads=8,
        sliding_window=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        share_expert_dim=32,
    )
    return {
        "vision_config": {**tower(image_size=STEP_SIZE), "mlp_ratio": 1.5, "max_position_embeddings": 144},
        "text_config": text,
        "image_token_id": ids["image_token"],
    }


def _step3p7_inputs(n_images: Sequence[int]) -> dict[str, Tensor]:
    """The whole image after its crops: none, or two beside each other."""
    n = sum(n_images)
    n_crops = [2 * (i % 2) for i in range(n)]
    crop = ["patch_start_token", *["image_token"] * (STEP_CROP // PATCH // 4) ** 2, "patch_end_token"]
    whole = ["start_token", *["image_token"] * (STEP_SIZE // PATCH // 4) ** 2, "end_token"]
    inputs = {
        **_rows(lambda: _STEP3P7, _per_row(n_images, [crop * k + whole for k in n_crops])),
        "pixel_values": _noise(n, 3, STEP_SIZE, STEP_SIZE),
        "num_local_patches": torch.tensor(n_crops),
    }
    if any(n_crops):
        inputs["pixel_values_local"] = _noise(sum(n_crops), 3, STEP_CROP, STEP_CROP)
    return inputs


# ---------------------------------------------------------------------- deepseek_ocr2, unlimited_ocr

# The tower has 144 learnt queries for a view of up to 144 patches, whatever the configuration says.
DEEPSEEK_SIZE = 96
_DEEPSEEK_MOE: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}


def _deepseek_ocr2_processor(shared: dict[str, Any]) -> ProcessorMixin:
    return DeepseekOcr2Processor(
        image_processor=DeepseekOcr2ImageProcessorPil(
            size={"height": DEEPSEEK_SIZE, "width": DEEPSEEK_SIZE}, tile_size=DEEPSEEK_SIZE, max_patches=3
        ),
        patch_size=DEEPSEEK_SIZE // 12 // 4,
        downsample_ratio=4,
        **shared,
    )


def _deepseek_ocr2_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": {
            "sam_config": _sam(image_size=DEEPSEEK_SIZE, num_hidden_layers=2, downsample_channels=[24, 32]),
            "encoder_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "rope_parameters": _ROPE,
            },
        },
        "text_config": text_config(
            "deepseek_ocr2_text", vocab_size, head_dim=None, rope_parameters=_ROPE, **_DEEPSEEK_MOE
        ),
        "image_token_id": ids["image_token"],
    }


UNLIMITED_SIZE = 96
UNLIMITED_TILE = 64


def _unlimited_ocr_processor(shared: dict[str, Any]) -> ProcessorMixin:
    from transformers import UnlimitedOcrImageProcessor, UnlimitedOcrProcessor

    return UnlimitedOcrProcessor(
        image_processor=UnlimitedOcrImageProcessor(
            size={"height": UNLIMITED_SIZE, "width": UNLIMITED_SIZE}, tile_size=UNLIMITED_TILE, max_patches=6
        ),
        patch_size=PATCH,
        downsample_ratio=4,
        **shared,
    )


def _unlimited_ocr_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    text = text_config(
        "unlimited_ocr_text",
        vocab_size,
        # Its eager attention does not repeat key and value heads, so there must be as many as query heads.
        num_key_value_heads=4,
        head_dim=None,
        rope_parameters=_ROPE,
        sliding_window=16,
        **_DEEPSEEK_MOE,
    )
    return {
        "vision_config": {
            "sam_config": _sam(image_size=UNLIMITED_SIZE, downsample_channels=[24, 32]),
            "encoder_config": {**tower(image_size=3 * PATCH), "hidden_act": "quick_gelu"},
        },
        "text_config": text,
        "image_token_id": ids["image_token"],
    }


def _unlimited_ocr_inputs(n_images: Sequence[int]) -> dict[str, Tensor]:
    """Views of the whole alone (3 x 3, a newline after every row, a separator): grids of tiles are no tensors."""
    n = sum(n_images)
    image = ["image_token"] * (3 * (3 + 1) + 1)
    return {
        **_rows(lambda: _UNLIMITED_OCR, _per_row(n_images, [image] * n)),
        "pixel_values": _noise(n, 3, UNLIMITED_SIZE, UNLIMITED_SIZE),
    }


# ---------------------------------------------------------------------- aria

# Its image processor knows two sizes, 490 and 980: patches of 70 keep the tower small.
ARIA_SIZE = 490
ARIA_PATCH = 70
ARIA_QUERIES = 8


def _aria_processor(shared: dict[str, Any]) -> ProcessorMixin:
    processor = AriaProcessor(
        image_processor=AriaImageProcessorPil(max_image_size=ARIA_SIZE, min_image_size=140),
        size_conversion={ARIA_SIZE: ARIA_QUERIES},
        **shared,
    )
    # The processor's own default is 980, whatever its image half was given.
    processor.images_kwargs = {"max_image_size": ARIA_SIZE, "split_image": False}
    return processor


def _aria_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": tower(
            model_type="idefics3_vision", image_size=ARIA_SIZE, patch_size=ARIA_PATCH, num_hidden_layers=2
        ),
        "text_config": text_config(
            "aria_text",
            vocab_size,
            head_dim=None,
            rope_parameters=_ROPE,
            moe_num_experts=4,
            moe_topk=2,
            moe_num_shared_experts=1,
        ),
        "projector_patch_to_query_dict": {(ARIA_SIZE // ARIA_PATCH) ** 2: ARIA_QUERIES},
        "image_token_index": ids["image_token"],
        "vision_feature_layer": -1,
    }


# ---------------------------------------------------------------------- inkling2, inkling_mm_model

INKLING_CELL = 2 * PATCH
_INKLING_HEADS: dict[str, Any] = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": 24,
    "d_rel": 4,
    "rel_extent": 64,
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid"],
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "route_scale": 1.0,
}


def _inkling2_processor(shared: dict[str, Any]) -> ProcessorMixin:
    from transformers import Inkling2ImageProcessor, Inkling2Processor

    return Inkling2Processor(
        image_processor=Inkling2ImageProcessor(size={"height": INKLING_CELL, "width": INKLING_CELL}), **shared
    )


def _inkling2_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    text = text_config(
        "inkling2_text",
        vocab_size,
        intermediate_size=None,
        unpadded_vocab_size=vocab_size,
        n_layers_per_attn_res_block=2,
        **_INKLING_HEADS,
    )
    vision = tower(posemb_grid_size=4, projection_hidden_dim=48, text_hidden_size=D_MODEL)
    return {"text_config": text, "vision_config": vision, "image_token_id": ids["image_token"]}


def _inkling2_inputs(n_images: Sequence[int]) -> dict[str, Tensor]:
    grids = [(1, *((2, 3), (3, 2), (1, 4), (2, 2))[i % 4]) for i in range(sum(n_images))]
    images = [["image_token"] * (rows * columns) for _, rows, columns in grids]
    return {
        **_rows(lambda: _INKLING2, _per_row(n_images, images)),
        "pixel_values": _noise(sum(map(len, images)), INKLING_CELL, INKLING_CELL, 3),
        "image_grid_thw": torch.tensor(grids),
    }


def _inkling_processor(shared: dict[str, Any]) -> ProcessorMixin:
    from transformers import InklingFeatureExtractor, InklingImageProcessor, InklingProcessor

    return InklingProcessor(
        feature_extractor=InklingFeatureExtractor(),
        image_processor=InklingImageProcessor(size={"height": INKLING_CELL, "width": INKLING_CELL}),
        image_bos_token="<|content_image|>",
        audio_bos_token="<|content_audio_input|>",
        **shared,
    )


def _inkling_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    text = text_config(
        "inkling_text",
        vocab_size,
        n_shared_experts=1,
        mlp_layer_types=["dense", "sparse", "sparse"],
        logits_mup_width_multiplier=2.0,
        **_INKLING_HEADS,
    )
    return {
        "text_config": text,
        # One layer for each factor of the cell's edge and of its two equal frames: no vision attention.
        "vision_config": {"patch_size": INKLING_CELL, "hidden_size": 32, "num_hidden_layers": 5},
        "audio_config": {"n_mel_bins": 4, "mel_vocab_size": 8},
        "image_token_id": ids["image_token"],
        "audio_token_id": ids["audio_token"],
        "image_bos_token_id": ids["image_bos_token"],
        "audio_bos_token_id": ids["audio_bos_token"],
    }


def _inkling_inputs(n_images: Sequence[int]) -> dict[str, Tensor]:
    images = [["image_bos_token", *["image_token"] * (6, 4, 8, 3)[i % 4]] for i in range(sum(n_images))]
    n_cells = sum(len(image) - 1 for image in images)
    return {
        **_rows(lambda: _INKLING, _per_row(n_images, images)),
        "pixel_values": _noise(n_cells, 2, INKLING_CELL, INKLING_CELL, 3),
    }


# ---------------------------------------------------------------------- records


def _with_torchvision(
    processor: Callable[[dict[str, Any]], ProcessorMixin],
) -> Callable[[dict[str, Any]], ProcessorMixin] | None:
    return processor if is_torchvision_available() else None


_MOLMO2 = TinyFamily(
    "molmo2",
    _molmo2_options,
    special=_MOLMO_SPECIAL,
    image_text="<|image|>",
    processor=_with_torchvision(_molmo2_processor),
    inputs=_molmo2_inputs,
    cell=2 * PATCH,
    reach=1,
)
_MINICPM_OCR = TinyFamily(
    "minicpm_ocr",
    _minicpm_options("4x"),
    special=_MINICPM_SPECIAL,
    image_text="<|image_pad|>",
    processor=_with_torchvision(_minicpm_ocr_processor),
    inputs=_minicpm_ocr_inputs,
    cell=2 * PATCH,
)
_STEP3P7 = TinyFamily(
    "step3p7",
    _step3p7_options,
    special=_STEP_SPECIAL,
    image_text="<im_patch>",
    processor=_with_torchvision(_step3p7_processor),
    inputs=_step3p7_inputs,
    cell=4 * PATCH,
)
_UNLIMITED_OCR = TinyFamily(
    "unlimited_ocr",
    _unlimited_ocr_options,
    special={"image_token": "<image>"},
    image_text="<image>\n",
    processor=_with_torchvision(_unlimited_ocr_processor),
    inputs=_unlimited_ocr_inputs,
    cell=4 * PATCH,
)
_INKLING2 = TinyFamily(
    "inkling2",
    _inkling2_options,
    special={"image_token": "<|unused_200054|>"},
    image_text="<|unused_200054|>",
    processor=_with_torchvision(_inkling2_processor),
    inputs=_inkling2_inputs,
    cell=INKLING_CELL,
    reach=0,
    attention=("eager",),
)
_INKLING = TinyFamily(
    "inkling_mm_model",
    _inkling_options,
    special={
        "image_token": "<|unused_200054|>",
        "audio_token": "<|unused_200053|>",
        "image_bos_token": "<|content_image|>",
        "audio_bos_token": "<|content_audio_input|>",
    },
    image_text="<|content_image|><|unused_200054|>",
    processor=_with_torchvision(_inkling_processor),
    inputs=_inkling_inputs,
    cell=INKLING_CELL,
    reach=0,
)

_APERTUS = TinyFamily(
    "apertus1p5",
    _apertus_options,
    special=_APERTUS_SPECIAL,
    more_tokens=_APERTUS_CODES,
    image_text="<|image|>",
    processor=_with_torchvision(_apertus_processor),
    inputs=_apertus_inputs,
    cell=APERTUS_CELL,
    # Its encoder has an attention of its own, and transformers refuses the name.
    attention=("eager",),
    differentiable=False,
)

FAMILIES: tuple[TinyFamily, ...] = (
    *([_APERTUS] if "apertus1p5" in CONFIG_MAPPING else []),
    _MOLMO2,
    TinyFamily(
        "fuyu",
        _fuyu_options,
        special={"image_token": "|SPEAKER|", "newline_token": "|NEWLINE|"},
        more_tokens=("<s>", "<0x04>"),
        image_text="|SPEAKER|",
        processor=_fuyu_processor,
        cell=PATCH,
        reach=1,
    ),
    TinyFamily(
        "chameleon",
        _chameleon_options,
        special=_CHAMELEON_SPECIAL,
        more_tokens=_CHAMELEON_CODES,
        image_text="<image>",
        processor=_chameleon_processor,
        cell=4,
        reach=3,
        differentiable=False,
    ),
    TinyFamily(
        "got_ocr2",
        _got_ocr2_options,
        special={"image_token": "<imgpad>", "start_token": "<img>", "end_token": "</img>"},
        image_text="<img><imgpad></img>\n",
        processor=_got_ocr2_processor,
        cell=4 * PATCH,
        # Its tower has an attention of its own, and transformers refuses the name.
        attention=("eager",),
    ),
    TinyFamily(
        "minicpmv4_6",
        _minicpm_options("16x"),
        special=_MINICPM_SPECIAL,
        image_text="<|image_pad|>",
        processor=_minicpm_processor(MiniCPMV4_6Processor),
        cell=4 * PATCH,
    ),
    _STEP3P7,
    TinyFamily(
        "emu3",
        _emu3_options,
        special=_EMU_SPECIAL,
        more_tokens=_EMU_CODES,
        image_text="<image>",
        processor=_emu3_processor,
        cell=8,
        differentiable=False,
    ),
    TinyFamily(
        "deepseek_ocr2",
        _deepseek_ocr2_options,
        special={"image_token": "<image>"},
        image_text="<image>\n",
        processor=_deepseek_ocr2_processor,
        sizes=((64, 48), (40, 72), (96, 64)),
    ),
    _UNLIMITED_OCR,
    TinyFamily(
        "minicpmv4_7",
        _minicpm_options(
            "16x",
            image_start_id="image_start_token",
            image_end_id="image_end_token",
            slice_start_id="slice_start_token",
            slice_end_id="slice_end_token",
            # The byte-level tokenizer's id of a line break.
            newline_id=198,
        ),
        special=_MINICPM_SPECIAL,
        image_text="<|image_pad|>",
        processor=_minicpm_processor(MiniCPMV4_7Processor),
        cell=4 * PATCH,
    ),
    _MINICPM_OCR,
    TinyFamily(
        "pp_chart2table",
        _got_ocr2_options,
        special={"image_token": "<imgpad>"},
        more_tokens=("<img>", "</img>"),
        # The template writes all of an image's placeholders itself.
        image_text="<img>" + "<imgpad>" * _GOT_SEQ_LEN + "</img>\n",
        processor=_pp_chart2table_processor,
        cell=4 * PATCH,
        # Its tower has an attention of its own, and transformers refuses the name.
        attention=("eager",),
    ),
    TinyFamily(
        "aria",
        _aria_options,
        special={"image_token": "<image>"},
        image_text="<image>",
        processor=_aria_processor,
    ),
    _INKLING2,
    _INKLING,
)
