"""Tiny random models of every supported family, with the family's REAL processor, built offline.

The model classes, processor classes and image processors are transformers' own; only the sizes are
small and the tokenizer is a byte-level BPE trained on a few sentences, so nothing is downloaded.

    processor, model = tiny_processor("qwen3_vl"), tiny_model("qwen3_vl")
    images = tiny_images(2, seed=0)
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Idefics3Processor,
    InternVLProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
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

from mmlens.families.processors import without_video

FAMILIES = ("llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "smolvlm")

PATCH = 8
LLAVA_SIZE = 40
# 34 = 4 patches of 8 and a remainder of 2 that the vision tower never sees, as 384 is 27 x 14 and 6.
ONEVISION_SIZE = 34
ONEVISION_PINPOINTS = [[34 * h, 34 * w] for h in range(1, 5) for w in range(1, 5) if h * w <= 8]
INTERNVL_SIZE = 48
IDEFICS_SIZE = 48

_SENTENCES = (
    "What colour is the letter K in the second image?",
    "Where is the red square, and which page holds the number seven?",
    "The answer stands in the first column of the table.",
    "How many objects are there in this picture? Describe the scene.",
    "user assistant system question answer image images frame page",
)

_SPECIAL: dict[str, dict[str, str]] = {
    "llava": {"image_token": "<image>"},
    "llava_onevision": {"image_token": "<image>", "video_token": "<video>"},
    "qwen2_5_vl": {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    },
    "qwen3_vl": {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    },
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "idefics3": {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    },
    "smolvlm": {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
        "video_token": "<video>",
    },
}

# What each family's template writes for one image, and after all of them.
_IMAGE_TEXT = {
    "llava": "<image>\\n",
    "llava_onevision": "<image>\\n",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": "<IMG_CONTEXT>\\n",
    "idefics3": "<image>",
    "smolvlm": "<image>",
}


def _chat_template(family: str) -> str:
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '" + _IMAGE_TEXT[family] + "' }}"
        "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


@functools.cache
def _base_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the family's own special tokens, padding on the left."""
    special = dict(_SPECIAL[family])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_base_tokenizer()),
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        padding_side="left",
        extra_special_tokens=special,
    )
    if family in ("idefics3", "smolvlm"):
        tokenizer.add_tokens(
            [f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)], special_tokens=True
        )
    return tokenizer


def _qwen_image_processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128},
    )


def tiny_processor(family: str) -> ProcessorMixin:
    """The family's real processor with its PIL image processor and a small offline tokenizer."""
    tokenizer = tiny_tokenizer(family)
    shared: dict[str, Any] = {"tokenizer": tokenizer, "chat_template": _chat_template(family)}
    if family == "llava":
        return LlavaProcessor(
            image_processor=CLIPImageProcessorPil(
                size={"shortest_edge": LLAVA_SIZE}, crop_size={"height": LLAVA_SIZE, "width": LLAVA_SIZE}
            ),
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            **shared,
        )
    if family == "llava_onevision":
        return without_video(LlavaOnevisionProcessor)(
            image_processor=LlavaOnevisionImageProcessorPil(
                size={"height": ONEVISION_SIZE, "width": ONEVISION_SIZE},
                image_grid_pinpoints=copy.deepcopy(ONEVISION_PINPOINTS),
            ),
            num_image_tokens=(ONEVISION_SIZE // PATCH) ** 2,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_4",
            **shared,
        )
    if family == "qwen2_5_vl":
        return without_video(Qwen2_5_VLProcessor)(image_processor=_qwen_image_processor(), **shared)
    if family == "qwen3_vl":
        return without_video(Qwen3VLProcessor)(image_processor=_qwen_image_processor(), **shared)
    if family == "internvl":
        return without_video(InternVLProcessor)(
            image_processor=GotOcr2ImageProcessorPil(
                size={"height": INTERNVL_SIZE, "width": INTERNVL_SIZE}, crop_to_patches=True, max_patches=6
            ),
            image_seq_length=(INTERNVL_SIZE // PATCH // 2) ** 2,
            **shared,
        )
    idefics_options: dict[str, Any] = {
        "size": {"longest_edge": 2 * IDEFICS_SIZE},
        "max_image_size": {"longest_edge": IDEFICS_SIZE},
    }
    image_seq_len = (IDEFICS_SIZE // PATCH // 2) ** 2
    if family == "idefics3":
        return Idefics3Processor(
            image_processor=Idefics3ImageProcessorPil(**idefics_options),
            image_seq_len=image_seq_len,
            **shared,
        )
    if family == "smolvlm":
        return without_video(SmolVLMProcessor)(
            image_processor=SmolVLMImageProcessorPil(**idefics_options),
            video_processor=None,
            image_seq_len=image_seq_len,
            **shared,
        )
    raise ValueError(f"no tiny processor for family {family!r}; there is one for {', '.join(FAMILIES)}")


def _text_config(model_type: str, vocab_size: int, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        **changes,
    }


def _tower(**changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "patch_size": PATCH,
        **changes,
    }


@functools.cache
def _token_ids(family: str) -> tuple[int, dict[str, int]]:
    tokenizer = tiny_processor(family).tokenizer
    special = {**_SPECIAL[family], "pad": "<|pad|>", "eos": "<|im_end|>"}
    return len(tokenizer), {name: tokenizer.convert_tokens_to_ids(text) for name, text in special.items()}


def tiny_config(family: str) -> Any:
    """The configuration that agrees with `tiny_processor(family)`."""
    vocab_size, ids = _token_ids(family)
    options: dict[str, Any]
    if family == "llava":
        options = {
            "vision_config": _tower(model_type="clip_vision_model", image_size=LLAVA_SIZE, projection_dim=32),
            "text_config": _text_config("llama", vocab_size),
            "image_token_index": ids["image_token"],
            "image_seq_length": (LLAVA_SIZE // PATCH) ** 2,
            "vision_feature_layer": -1,
        }
    elif family == "llava_onevision":
        options = {
            "vision_config": _tower(
                model_type="siglip_vision_model", image_size=ONEVISION_SIZE, vision_use_head=False
            ),
            "text_config": _text_config("qwen2", vocab_size),
            "image_token_index": ids["image_token"],
            "video_token_index": ids["video_token"],
            "image_grid_pinpoints": copy.deepcopy(ONEVISION_PINPOINTS),
            "vision_aspect_ratio": "anyres_max_4",
        }
    elif family in ("qwen2_5_vl", "qwen3_vl"):
        vision = {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 64,
        }
        if family == "qwen2_5_vl":
            # A window of 4 x 4 patches, so that tiny images have several windows and one full layer.
            vision |= {"window_size": 4 * PATCH, "fullatt_block_indexes": [2]}
            rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
        else:
            vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
            rope = {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            }
        text = _text_config(f"{family}_text", vocab_size, rope_parameters=rope)
        if family == "qwen2_5_vl":
            text.pop("head_dim")
        options = {
            "vision_config": vision,
            "text_config": text,
            "image_token_id": ids["image_token"],
            "video_token_id": ids["video_token"],
            "vision_start_token_id": ids["vision_start_token"],
            "vision_end_token_id": ids["vision_end_token"],
        }
    elif family == "internvl":
        options = {
            "vision_config": _tower(
                image_size=[INTERNVL_SIZE, INTERNVL_SIZE],
                patch_size=[PATCH, PATCH],
                layer_scale_init_value=1.0,
            ),
            "text_config": _text_config("qwen2", vocab_size),
            "image_token_id": ids["context_image_token"],
            "image_seq_length": (INTERNVL_SIZE // PATCH // 2) ** 2,
            "tie_word_embeddings": False,
        }
    elif family in ("idefics3", "smolvlm"):
        options = {
            "vision_config": _tower(image_size=IDEFICS_SIZE),
            "text_config": _text_config("llama", vocab_size, pad_token_id=ids["pad"]),
            "image_token_id": ids["image_token"],
            "scale_factor": 2,
        }
    else:
        raise ValueError(f"no tiny model for family {family!r}; there is one for {', '.join(FAMILIES)}")
    return AutoConfig.for_model(family, **options)


def _redraw(model: PreTrainedModel, seed: int) -> None:
    """Weights of the size that keeps every layer's output near 1, so that an edit anywhere shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            centre = 1.0 if name.endswith("weight") or "lambda" in name else 0.0
            weight.data = (centre + 0.2 * noise).to(weight.dtype)
        elif "embed" in name and weight.ndim == 2:
            weight.data = noise.to(weight.dtype)
        else:
            fan_in = weight[0].numel()
            weight.data = (1.3 * noise / fan_in**0.5).to(weight.dtype)


def tiny_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> PreTrainedModel:
    """A random-weight model of the family: 3 decoder layers, 4 query heads on 2 KV heads, d_head 16.

    A fresh one each call (a HookedVLM wraps in place); equal seeds give equal weights.
    """
    model = AutoModelForImageTextToText.from_config(
        tiny_config(family), attn_implementation=attn_implementation, dtype=torch.float32
    )
    _redraw(model, seed)
    return model.to(dtype).eval()


_SIZES = ((64, 48), (40, 72), (97, 64), (50, 50), (48, 96), (33, 61))


def tiny_images(n: int, seed: int = 0, sizes: Sequence[tuple[int, int]] | None = None) -> list[Image.Image]:
    """`n` RGB images of different (width, height) with random blocks and noise, none of them flat."""
    generator = np.random.default_rng(seed)
    images = []
    for i in range(n):
        width, height = (sizes or _SIZES)[i % len(sizes or _SIZES)]
        blocks = generator.integers(0, 256, size=(-(-height // 7), -(-width // 7), 3))
        pixels = np.kron(blocks, np.ones((7, 7, 1), dtype=np.int64))[:height, :width]
        pixels = np.clip(pixels + generator.integers(-30, 31, size=pixels.shape), 0, 255)
        images.append(Image.fromarray(pixels.astype(np.uint8)))
    return images
