"""Families that read the image by learnt queries or by cross-attention."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Blip2Processor,
    IdeficsProcessor,
    InstructBlipProcessor,
    Kosmos2Processor,
    MllamaProcessor,
    ProcessorMixin,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from tiny.base import (
    D_MODEL,
    PATCH,
    TinyFamily,
    TokenIds,
    text_config,
    tiny_images,
    token_ids_of,
    tokenizer_of,
    tower,
)

SIZE = 40
N_QUERIES = 6
_SQUARE = {"height": SIZE, "width": SIZE}

# These processors come without a chat template and put the image's tokens before the text themselves.
_QUESTION_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "Question: {{ part['text'] }} Answer:{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def _with_question_template(processor: ProcessorMixin) -> ProcessorMixin:
    processor.chat_template = _QUESTION_TEMPLATE
    return processor


# ---------------------------------------------------------------------- blip-2, instructblip, instructblipvideo


def _opt(vocab_size: int) -> dict[str, Any]:
    """OPT: as many KV heads as query heads, learnt positions, no gate in the MLP."""
    return text_config(
        "opt",
        vocab_size,
        ffn_dim=96,
        word_embed_proj_dim=D_MODEL,
        tie_word_embeddings=False,
        intermediate_size=None,
        num_key_value_heads=None,
        head_dim=None,
    )


def _blip_options(text: dict[str, Any], qformer_vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": tower(image_size=SIZE),
        "qformer_config": {
            "vocab_size": qformer_vocab_size,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
        },
        "text_config": text,
        "num_query_tokens": N_QUERIES,
    }


def _blip_2_processor(shared: dict[str, Any]) -> ProcessorMixin:
    return _with_question_template(
        Blip2Processor(BlipImageProcessorPil(size=_SQUARE), shared["tokenizer"], num_query_tokens=N_QUERIES)
    )


def _blip_2_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {**_blip_options(_opt(vocab_size), vocab_size), "image_token_index": ids["image"]}


def _instructblip_processor(shared: dict[str, Any]) -> ProcessorMixin:
    return _with_question_template(
        InstructBlipProcessor(
            BlipImageProcessorPil(size=_SQUARE),
            shared["tokenizer"],
            copy.deepcopy(shared["tokenizer"]),
            num_query_tokens=N_QUERIES,
        )
    )


def _instructblip_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        **_blip_options(text_config("llama", vocab_size), vocab_size),
        "image_token_index": ids["image"],
    }


def _instructblipvideo_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        **_blip_options(text_config("llama", vocab_size), vocab_size),
        "video_token_index": ids["video"],
    }


_FRAMES = 4  # the processor writes the tokens of four frames, whatever the clip has


def _clips(n_images: Sequence[int]) -> dict[str, Tensor]:
    """One clip of four frames a row, its tokens before the question; the decoder's rows are padded on the left.

    The family's processor is built around a video processor, which needs torchvision.
    """
    generator = torch.Generator().manual_seed(1)
    ids, _ = token_ids_of(_INSTRUCTBLIPVIDEO)
    questions = [
        torch.randint(10, 300, (9 + 4 * row,), generator=generator).tolist() for row in range(len(n_images))
    ]
    longest = max(len(question) for question in questions)
    clip = [ids["video"]] * (_FRAMES * N_QUERIES)
    rows = {"qformer_input_ids": [], "qformer_attention_mask": [], "input_ids": [], "attention_mask": []}
    for question in questions:
        padding = [ids["pad"]] * (longest - len(question))
        nothing, one = [0] * len(padding), [1] * len(question)
        # The Q-Former counts positions from the left, so its text is padded on the right.
        rows["qformer_input_ids"].append(question + padding)
        rows["qformer_attention_mask"].append(one + nothing)
        rows["input_ids"].append(padding + clip + question)
        rows["attention_mask"].append(nothing + [1] * len(clip) + one)
    return {
        "pixel_values": torch.randn(len(n_images), _FRAMES, 3, SIZE, SIZE, generator=generator),
        **{name: torch.tensor(values) for name, values in rows.items()},
    }


# ---------------------------------------------------------------------- kosmos-2

_KOSMOS_PATCH_INDICES = 4
_KOSMOS_ADDED = 11 + _KOSMOS_PATCH_INDICES
"""Tokens that the processor adds to its tokenizer: 11 tags, and one for every index of a patch."""


def _kosmos_processor(shared: dict[str, Any]) -> ProcessorMixin:
    # The tokenizer's ids after that of the unknown token stand for the image.
    shared["tokenizer"].unk_token = "<unk>"
    processor = Kosmos2Processor(
        CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=_SQUARE),
        shared["tokenizer"],
        num_patch_index_tokens=_KOSMOS_PATCH_INDICES,
    )
    processor.num_image_tokens = N_QUERIES
    return _with_question_template(processor)


def _kosmos_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": tower(image_size=SIZE),
        "text_config": {
            "vocab_size": vocab_size + _KOSMOS_ADDED,
            "embed_dim": D_MODEL,
            "layers": 3,
            "ffn_dim": 96,
            "attention_heads": 4,
            "max_position_embeddings": 512,
            "pad_token_id": ids["pad"],
            "bos_token_id": ids["bos"],
            "eos_token_id": None,
            "tie_word_embeddings": False,
        },
        "latent_query_num": N_QUERIES,
        "tie_word_embeddings": False,
    }


# ---------------------------------------------------------------------- mllama


def _mllama_processor(shared: dict[str, Any]) -> ProcessorMixin:
    return MllamaProcessor(
        image_processor=MllamaImageProcessorPil(size=_SQUARE, max_image_tiles=4),
        **shared,
    )


def _mllama_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_global_layers": 2,
            "attention_heads": 4,
            "image_size": SIZE,
            "patch_size": PATCH,
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 3 * 32,
        },
        "text_config": text_config(
            "mllama_text_model",
            vocab_size,
            num_hidden_layers=4,
            cross_attention_layers=[1, 3],
            bos_token_id=ids["bos"],
            head_dim=None,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        "image_token_index": ids["image_token"],
    }


# ---------------------------------------------------------------------- idefics


def _idefics_processor(shared: dict[str, Any]) -> ProcessorMixin:
    processor = IdeficsProcessor(
        IdeficsImageProcessorPil(image_size=SIZE), shared["tokenizer"], image_size=SIZE
    )
    return _with_question_template(processor)


def _interleaved(n_images: Sequence[int]) -> dict[str, Tensor]:
    """A row is a list of images and texts in their order: beside `images=` the processor puts them after the text."""
    images = iter(tiny_images(sum(n_images), seed=1))
    questions = ("Question: What colour is the letter K? Answer:", "Question: Where? Answer:")
    prompts = [
        [*(next(images) for _ in range(n)), question]
        for n, question in zip(n_images, questions, strict=False)
    ]
    return dict(
        _idefics_processor({"tokenizer": tokenizer_of(_IDEFICS)})(
            text=prompts, add_end_of_utterance_token=False
        )
    )


def _idefics_options(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": {
            "embed_dim": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": SIZE,
            "patch_size": PATCH,
        },
        "vocab_size": vocab_size,
        "hidden_size": D_MODEL,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "cross_layer_interval": 2,
        "qk_layer_norms": True,
        "alpha_initializer": "ones",
        "pad_token_id": ids["pad"],
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


_IDEFICS = TinyFamily(
    "idefics",
    _idefics_options,
    special={"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"},
    processor=_idefics_processor,
    inputs=_interleaved,
    # Cross-attention norms its queries, which undoes a change of scale.
    inert=("cross.blocks.*.ln1.hook_scale",),
)
_INSTRUCTBLIPVIDEO = TinyFamily(
    "instructblipvideo", _instructblipvideo_options, special={"video": "<video>"}, inputs=_clips
)

FAMILIES: tuple[TinyFamily, ...] = (
    # Under the name image_token the processor would take the text "<image>" for an AddedToken and fail.
    TinyFamily(
        "blip-2", _blip_2_options, special={"image": "<image>"}, processor=_blip_2_processor, most_images=1
    ),
    TinyFamily(
        "instructblip",
        _instructblip_options,
        special={"image": "<image>"},
        processor=_instructblip_processor,
        most_images=1,
    ),
    TinyFamily(
        "mllama",
        _mllama_options,
        special={"image_token": "<|image|>"},
        more_tokens=("<|python_tag|>",),
        image_text="<|image|>",
        processor=_mllama_processor,
        # Cross-attention (layers 1 and 3) norms its queries, which undoes a change of scale.
        inert=("blocks.[13].ln1.hook_scale",),
    ),
    _IDEFICS,
    TinyFamily(
        "kosmos-2",
        _kosmos_options,
        special={"unknown": "<unk>"},
        more_tokens=tuple(f"<image_{i}>" for i in range(N_QUERIES)),
        processor=_kosmos_processor,
        most_images=1,
    ),
    _INSTRUCTBLIPVIDEO,
)
