"""Tiny random models of every supported family, with the family's REAL processor, built offline.

The model classes, processor classes and image processors are transformers' own; only the sizes are
small and the tokenizer is a byte-level BPE trained on a few sentences, so nothing is downloaded.

    processor, model = tiny_processor("qwen3_vl"), tiny_model("qwen3_vl")
    images = tiny_images(2, seed=0)
    inputs = tiny_inputs("qwen3_vl", [2, 1])      # a left-padded batch: two images, then one
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from mmlens.families.catalog import FAMILIES as RECORDS
from mmlens.families.record import Family
from tiny import first, glm_like, llava_like, ocr_and_others, pooled, queries_and_cross, qwen_like
from tiny.base import TinyFamily, chat_template, redraw, tiny_images, token_ids_of, tokenizer_of

_GROUPS = (first, llava_like, qwen_like, glm_like, pooled, ocr_and_others, queries_and_cross)
TINY: dict[str, TinyFamily] = {family.model_type: family for group in _GROUPS for family in group.FAMILIES}
FAMILIES = tuple(TINY)
REPRESENTATIVES = tuple(family.model_type for family in first.FAMILIES)
"""A family of each common kind, for tests that need not see all."""
FURTHER_KINDS = ("gemma3", "mllama", "instructblip", "qwen3_5", "llama4", "fuyu")
"""Sliding windows, cross attention, queries, linear attention, experts, and no tower."""

__all__ = [
    "FAMILIES",
    "FURTHER_KINDS",
    "REPRESENTATIVES",
    "TINY",
    "cast",
    "others_slow",
    "record_of",
    "tiny_config",
    "tiny_images",
    "tiny_inputs",
    "tiny_model",
    "tiny_processor",
]


def others_slow(always: Collection[str], of: Collection[str] = FAMILIES) -> list[Any]:
    """Families `of` as parameters of a test; those that are not `always` run are slow."""
    if unknown := set(always) - set(of):
        raise ValueError(f"{sorted(unknown)} are to be run always, and are none of {sorted(of)}")
    return [pytest.param(name, marks=[] if name in always else [pytest.mark.slow]) for name in of]


def record_of(family: str) -> Family:
    """The family's record in the package."""
    return RECORDS[TINY[family].variant_of or family]


def tiny_processor(family: str) -> ProcessorMixin:
    """The family's real processor with its PIL image processor and a small offline tokenizer."""
    tiny = TINY[family]
    if tiny.processor is None:
        raise ValueError(f"the processor of {family!r} cannot be built offline")
    return tiny.processor(
        {"tokenizer": tokenizer_of(tiny), "chat_template": chat_template(tiny.image_text, tiny.video_text)}
    )


def tiny_config(family: str) -> Any:
    """The configuration that agrees with `tiny_processor(family)`."""
    tiny = TINY[family]
    return AutoConfig.for_model(**{"model_type": family, **tiny.options(*token_ids_of(tiny))})


def tiny_model(
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A random-weight model of the family: 3 decoder layers, 4 query heads on 2 KV heads, d_head 16.

    A fresh one each call (a HookedVLM wraps in place); equal seeds give equal weights. Its attention is SDPA
    where transformers has that for the family.
    """
    model = AutoModelForImageTextToText.from_config(
        tiny_config(family),
        attn_implementation=attn_implementation or TINY[family].attention[0],
        dtype=dtype,
    )
    # What the family keeps in float32 stays so, as in from_pretrained.
    kept = "|".join(model._keep_in_fp32_modules_strict or ())
    for name, weight in model.named_parameters():
        if kept and re.search(rf"(^|\.)({kept})(\.|$)", name):
            weight.data = weight.data.float()
    # model.to(dtype) in the end would make Llama 4's complex rotary frequencies real.
    redraw(model, seed)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            # As loading in this dtype would: some models read there what to cast pixels to.
            module.config.dtype = dtype
    return model.eval()


_QUESTIONS = ("What colour is the letter K?", "Where?", "Which page?")


def tiny_inputs(family: str, n_images: Sequence[int] = (2,)) -> dict[str, Tensor]:
    """Model inputs, one row per entry of `n_images`, that many images of different sizes in each; left-padded."""
    tiny = TINY[family]
    if tiny.most_images is not None:
        n_images = [min(n, tiny.most_images) for n in n_images]
    if tiny.inputs is not None:
        return tiny.inputs(n_images)
    processor = tiny_processor(family)
    images = iter(tiny_images(sum(n_images), seed=1, sizes=tiny.sizes or None))
    text = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}] * n + [{"type": "text", "text": question}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for n, question in zip(n_images, _QUESTIONS, strict=False)
    ]
    encoded = processor(
        text=text,
        images=[[next(images) for _ in range(n)] for n in n_images],
        padding=len(text) > 1,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    )
    return {name: value for name, value in encoded.items() if isinstance(value, Tensor) and name != "labels"}


def cast(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs with pixels in the model's dtype."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
