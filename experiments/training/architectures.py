"""The micro models before training: three architectures of transformers, small, with their own processors.

What differs between them is how an image stands in the prompt, how positions count, and how features are asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mmlens.data.drawing import CELL
from mmlens.data.scenes import scene_vocabulary
from mmlens.families.processors import without_video

Shape = Mapping[str, int]
Visual = tuple[int, int, int] | None
"""(image, row, column) of the cell that a visual token shows; None for a learnt line break."""

NORMALISED = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
SIDE = 4 * CELL
"""Side in pixels of the images of the composed scenes, and of the towers that take one size."""


@dataclass(frozen=True)
class Architecture:
    """One family: how to build it and how its prompts and features are laid out.

    `image_tokens(image, grid, alone)` gives what stands for one image: words of the vocabulary, or a visual token;
    `alone` says that the prompt has no other image. `features(model, processor, prompts)` gives the visual
    embeddings [token, d_model] of the images of all prompts in the order in which they stand, and the deep ones.
    """

    specials: tuple[str, ...]
    image_text: str
    image_token: str
    processor: Callable[[dict[str, Any]], ProcessorMixin]
    model: Callable[[PreTrainedTokenizerFast, Shape], PreTrainedModel]
    image_tokens: Callable[[int, tuple[int, int], bool], list[str | Visual]]
    features: Callable[
        [PreTrainedModel, ProcessorMixin, Sequence[Sequence[Image.Image]]], tuple[Tensor, list[Tensor] | None]
    ]
    named_specials: Mapping[str, str] = field(default_factory=dict)
    """All special tokens by name, where the processor asks its tokenizer for some."""
    grid_positions: bool = False
    """Whether visual tokens have (t, h, w) positions; all tokens are counted through otherwise."""

    def build_processor(self, kinds: Sequence[str]) -> ProcessorMixin:
        """The processor with a tokenizer of the words of these kinds."""
        tokenizer = build_tokenizer(self.specials, kinds, self.named_specials)
        return self.processor({"tokenizer": tokenizer, "chat_template": chat_template(self.image_text)})

    def build_model(self, tokenizer: PreTrainedTokenizerFast, shape: Shape) -> PreTrainedModel:
        """The untrained model in float32."""
        model = self.model(tokenizer, shape)
        model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=4,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return model.float()


def build_tokenizer(
    specials: Sequence[str], kinds: Sequence[str], named: Mapping[str, str]
) -> PreTrainedTokenizerFast:
    """One token a word or mark; left padding; spaces and line ends carry no token."""
    words = [*specials, "user", "assistant", "system", *scene_vocabulary(kinds)]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unk|>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        **(
            {"extra_special_tokens": dict(named)}
            if named
            else {"additional_special_tokens": list(specials[1:-1])}
        ),
    )


def chat_template(image_text: str) -> str:
    """ChatML, with `image_text` for every image."""
    return (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '" + image_text + "' }}"
        "{% elif part['type'] == 'text' %}{{ part['text'] }}"
        "{% else %}{{ raise_exception('this template takes image and text parts, not ' + part['type']) }}"
        "{% endif %}{% endfor %}{% endif %}"
        "{{ '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def _text(tokenizer: PreTrainedTokenizerFast, shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": shape["width"],
        "intermediate_size": shape["mlp"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape["head_dim"],
        "max_position_embeddings": 4096,
        "initializer_range": 0.05,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _tower(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_size": shape["vision_width"],
        "intermediate_size": shape["vision_mlp"],
        "num_hidden_layers": shape["vision_layers"],
        "num_attention_heads": 4,
        "initializer_range": 0.05,
    }


def _grid(image: int, grid: tuple[int, int]) -> list[str | Visual]:
    return [(image, row, column) for row in range(grid[0]) for column in range(grid[1])]


# ---------------------------------------------------------------------- Qwen3-VL


def _qwen_processor(shared: dict[str, Any]) -> ProcessorMixin:
    """Patches of 8 pixels, merged 2 x 2; sides that are multiples of 16 are not resized."""
    return without_video(Qwen3VLProcessor)(
        image_processor=Qwen2VLImageProcessorPil(
            patch_size=CELL // 2,
            merge_size=2,
            temporal_patch_size=2,
            size={"shortest_edge": CELL * CELL, "longest_edge": 512 * 512},
            **NORMALISED,
        ),
        **shared,
    )


def _qwen_model(tokenizer: PreTrainedTokenizerFast, shape: Shape) -> PreTrainedModel:
    """Qwen3-VL, its DeepStack branch starting at zero."""
    config = Qwen3VLConfig(
        text_config={
            **_text(tokenizer, shape),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": shape["vision_layers"],
            "hidden_size": shape["vision_width"],
            "intermediate_size": shape["vision_mlp"],
            "num_heads": 4,
            "patch_size": CELL // 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": shape["width"],
            "num_position_embeddings": 144,
            "deepstack_visual_indexes": [0],
            "initializer_range": 0.05,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen3VLForConditionalGeneration(config)
    for merger in model.model.visual.deepstack_merger_list:
        nn.init.zeros_(merger.linear_fc2.weight)
        nn.init.zeros_(merger.linear_fc2.bias)
    return model


def _qwen_features(
    model: PreTrainedModel, processor: ProcessorMixin, prompts: Sequence[Sequence[Image.Image]]
) -> tuple[Tensor, list[Tensor] | None]:
    images = [image for prompt in prompts for image in prompt]
    inputs = processor.image_processor(images=images, return_tensors="pt")
    seen = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    return seen.pooler_output, seen.deepstack_features


QWEN3_VL = Architecture(
    specials=(
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
        "<|unk|>",
    ),
    image_text="<|vision_start|><|image_pad|><|vision_end|>",
    image_token="<|image_pad|>",
    processor=_qwen_processor,
    model=_qwen_model,
    image_tokens=lambda image, grid, alone: ["<|vision_start|>", *_grid(image, grid), "<|vision_end|>"],
    features=_qwen_features,
    grid_positions=True,
)


# ---------------------------------------------------------------------- LLaVA-OneVision

_PINPOINTS = [[SIDE, SIDE]]


def _onevision_processor(shared: dict[str, Any]) -> ProcessorMixin:
    """Patches of 16 pixels; a lone image is shown whole and once more as a tile, as the family does."""
    return without_video(LlavaOnevisionProcessor)(
        image_processor=LlavaOnevisionImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=copy.deepcopy(_PINPOINTS), **NORMALISED
        ),
        num_image_tokens=(SIDE // CELL) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        **shared,
    )


def _onevision_model(tokenizer: PreTrainedTokenizerFast, shape: Shape) -> PreTrainedModel:
    config = LlavaOnevisionConfig(
        text_config={
            "model_type": "qwen2",
            **_text(tokenizer, shape),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            **_tower(shape),
            "image_size": SIDE,
            "patch_size": CELL,
            "vision_use_head": False,
        },
        vision_feature_layer=-1,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=copy.deepcopy(_PINPOINTS),
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=True,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def _onevision_tokens(image: int, grid: tuple[int, int], alone: bool) -> list[str | Visual]:
    whole = _grid(image, grid)
    if not alone:
        return [*whole, None]
    tile: list[str | Visual] = []
    for row in range(grid[0]):
        tile += [*((image, row, column) for column in range(grid[1])), None]
    return [*whole, *tile]


def _onevision_features(
    model: PreTrainedModel, processor: ProcessorMixin, prompts: Sequence[Sequence[Image.Image]]
) -> tuple[Tensor, list[Tensor] | None]:
    """A lone image passes the tower once: its tile shows the same pixels as its whole view."""
    pixels = [
        processor.image_processor(images=[list(prompt)], return_tensors="pt")["pixel_values"][:, 0]
        for prompt in prompts
    ]
    pixels = torch.cat(pixels)
    tower = model.model.vision_tower(pixels, output_hidden_states=True)
    seen = model.model.multi_modal_projector(tower.hidden_states[-1])
    newline = model.model.image_newline
    parts, at = [], 0
    side = SIDE // CELL
    for prompt in prompts:
        for _ in prompt:
            image = seen[at]
            at += 1
            parts.append(image)
            if len(prompt) > 1:
                parts.append(newline[None])
            else:
                rows = image.view(side, side, -1)
                parts.append(torch.cat([rows, newline.expand(side, 1, -1)], dim=1).flatten(0, 1))
    return torch.cat(parts), None


LLAVA_ONEVISION = Architecture(
    specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>", "<|unk|>"),
    image_text="<image>",
    image_token="<image>",
    processor=_onevision_processor,
    model=_onevision_model,
    image_tokens=_onevision_tokens,
    features=_onevision_features,
)


# ---------------------------------------------------------------------- InternVL


def _internvl_processor(shared: dict[str, Any]) -> ProcessorMixin:
    """Patches of 8 pixels, four to a token by pixel shuffle; one tile an image."""
    return without_video(InternVLProcessor)(
        image_processor=GotOcr2ImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, crop_to_patches=False, max_patches=1, **NORMALISED
        ),
        image_seq_length=(SIDE // CELL) ** 2,
        **shared,
    )


def _internvl_model(tokenizer: PreTrainedTokenizerFast, shape: Shape) -> PreTrainedModel:
    config = InternVLConfig(
        text_config={
            "model_type": "qwen2",
            **_text(tokenizer, shape),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
        },
        vision_config={
            **_tower(shape),
            "image_size": [SIDE, SIDE],
            "patch_size": [CELL // 2, CELL // 2],
            "layer_scale_init_value": 1.0,
        },
        vision_feature_layer=-1,
        downsample_ratio=0.5,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(SIDE // CELL) ** 2,
        tie_word_embeddings=True,
    )
    return InternVLForConditionalGeneration(config)


def _internvl_features(
    model: PreTrainedModel, processor: ProcessorMixin, prompts: Sequence[Sequence[Image.Image]]
) -> tuple[Tensor, list[Tensor] | None]:
    images = [image for prompt in prompts for image in prompt]
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    return model.model.get_image_features(pixels).pooler_output.flatten(0, 1), None


INTERNVL = Architecture(
    specials=(
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<img>",
        "</img>",
        "<IMG_CONTEXT>",
        "<video>",
        "<|unk|>",
    ),
    named_specials={
        "turn_token": "<|im_start|>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    image_text="<IMG_CONTEXT>",
    image_token="<IMG_CONTEXT>",
    processor=_internvl_processor,
    model=_internvl_model,
    image_tokens=lambda image, grid, alone: ["<img>", *_grid(image, grid), "</img>"],
    features=_internvl_features,
)
