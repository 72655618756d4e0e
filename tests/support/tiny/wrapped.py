"""Tiny models as a HookedVLM, and prompts for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import mmlens
import tiny
from mmlens.model.hooks import Hook
from mmlens.model.prompt import Prompt
from mmlens.token_map import text_only_map

QUESTION = "What colour is the letter K?"


def hooked(family: str, **options: object) -> mmlens.HookedVLM:
    return mmlens.HookedVLM(tiny.tiny_model(family, **options).eval(), tiny.tiny_processor(family))


def two_image_prompt(model: mmlens.HookedVLM) -> Prompt:
    return model.prompt(QUESTION, images=tiny.tiny_images(2, seed=0))


def padded_prompt(model: mmlens.HookedVLM) -> Prompt:
    """Two rows of different length: the second has one image and a shorter question."""
    images = tiny.tiny_images(3, seed=1)
    return model.prompt([QUESTION, "Where?"], images=[images[:2], images[2:]])


def hooked_family(name: str) -> mmlens.HookedVLM:
    """Any family's tiny model, its attention SDPA where it has that, with its processor where it can be built."""
    family = tiny.TINY[name]
    model = tiny.tiny_model(name, attn_implementation=family.attention[0])
    return mmlens.HookedVLM(model, None if family.processor is None else tiny.tiny_processor(name))


def family_prompt(name: str, model: mmlens.HookedVLM) -> Prompt:
    """A padded batch through the real processor, or of hand-made inputs where it cannot be built here."""
    if model.processor is not None and model.family.layout is not None:
        n_images = tiny.TINY[name].most_images or 2
        images = tiny.tiny_images(n_images, seed=1, sizes=tiny.TINY[name].sizes or None)
        questions = ["What colour is K?", "Where is the big one now?"]
        return model.prompt(questions, images=[images, images[-1:] if n_images > 1 else images])
    inputs = tiny.tiny_inputs(name, (2, 1))
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    n = len(mask)
    return Prompt(dict(inputs), text_only_map(mask), [""] * n, [[] for _ in range(n)], [""] * n)


def largest_logit(logits: Tensor) -> float:
    """The largest size of a logit that is not masked by the lowest number, at least 1: what rounding grows with."""
    return max(1.0, float(logits[logits > torch.finfo(logits.dtype).min].abs().max()))


def generate(
    model: mmlens.HookedVLM, prompt: Prompt, n_tokens: int, hooks: Sequence[Hook], **options: Any
) -> tuple[Tensor, Tensor]:
    """Greedy decoding of exactly `n_tokens` under hooks: the token ids, and the logits of each step.

    Random weights may choose the token that stands for an image's part, which without a cache is one too many.
    """
    visual = prompt.inputs["input_ids"][prompt.token_map.is_image].unique().tolist()
    with model.hooks(fwd_hooks=list(hooks)):
        out = model.hf_model.generate(
            **prompt.inputs,
            max_new_tokens=n_tokens,
            min_new_tokens=n_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            suppress_tokens=visual or None,
            **options,
        )
    return out.sequences, torch.stack(out.logits)
