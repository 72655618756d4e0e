"""What a tiny family is, and the parts that tiny families share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin
from transformers.utils import is_torchvision_available

from mmlens.families.processors import without_video

PATCH = 8
D_MODEL = 64

TokenIds = Mapping[str, int]


@dataclass(frozen=True)
class TinyFamily:
    """How to build a tiny random model of one family, and its real processor, without a download."""

    model_type: str
    options: Callable[[TokenIds, int], dict[str, Any]]
    """(ids of the special tokens by name, vocabulary size) -> options of the family's configuration class.

    The names are those of `special`, and "pad" and "eos"."""
    special: Mapping[str, str]
    """The tokenizer's named special tokens: attribute -> text. The processor finds them as tokenizer.<name>."""
    more_tokens: tuple[str, ...] = ()
    """Further special tokens without a name of their own."""
    image_text: str = ""
    """What the chat template writes for one image."""
    video_text: str = ""
    """What it writes for one video."""
    processor: Callable[[dict[str, Any]], ProcessorMixin] | None = None
    """Builds the family's own processor from {"tokenizer": ..., "chat_template": ...}; None where it cannot
    be built offline (say why beside it)."""
    inputs: Callable[[Sequence[int]], dict[str, Tensor]] | None = None
    """Without a processor, or where it is called in a way of its own: the number of images of each row -> model
    inputs, rows padded on the left."""
    cell: float = 0
    """Pixels of the model's view that one image token shows (the occlusion proof's margins follow from it)."""
    reach: float = 2
    """How many source pixels a resampled pixel mixes to each side, at scale 1: 1 bilinear, 2 bicubic, 3 Lanczos."""
    exact_proof: bool = True
    """False where convolutions mix neighbours beside attention: the proof then asks that the tokens of the
    painted pixels change most, instead of alone."""
    attention: tuple[str, ...] = ("sdpa", "eager")
    """The attention implementations that transformers takes for this family."""
    generates: bool = True
    """False where the plain model cannot generate from the tiny inputs (say why beside it)."""
    inert: tuple[str, ...] = ()
    """Patterns of hook points whose edits cannot reach the logits by the family's own arithmetic (say why)."""
    differentiable: bool = True
    """False where no gradient reaches the vision tower's patterns (visual codes)."""
    variant_of: str = ""
    """The family whose record it has, where it is another shape of one: LLaVA with Pixtral's tower."""
    sizes: tuple[tuple[int, int], ...] = ()
    """(width, height) of the images of the parity suite, where the family needs particular ones."""
    most_images: int | None = None
    """1 where the processor takes one image a prompt."""


def with_video(
    processor_class: type[ProcessorMixin], video: str, options: Mapping[str, Any], **parts: Any
) -> ProcessorMixin:
    """The processor of these parts, with the video half of this name where torchvision is installed."""
    if not is_torchvision_available():
        return without_video(processor_class)(video_processor=None, **parts)
    return processor_class(video_processor=getattr(transformers, video)(**options), **parts)


_SENTENCES = (
    "What colour is the letter K in the second image?",
    "Where is the red square, and which page holds the number seven?",
    "The answer stands in the first column of the table.",
    "How many objects are there in this picture? Describe the scene.",
    "user assistant system question answer image images frame page",
)


def chat_template(image_text: str, video_text: str = "") -> str:
    """A ChatML template that writes `image_text` for every image and `video_text` for every video."""
    videos = video_text.replace("\n", "\\n")
    of_videos = "{% elif part['type'] == 'video' %}{{ '" + videos + "' }}" if video_text else ""
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '"
        + image_text.replace("\n", "\\n")
        + "' }}"
        + of_videos
        + "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
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


def tokenizer_of(family: TinyFamily) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the family's own special tokens, padding on the left."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_base_tokenizer()),
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        padding_side="left",
        extra_special_tokens=dict(family.special),
    )
    if family.more_tokens:
        tokenizer.add_tokens(list(family.more_tokens), special_tokens=True)
    return tokenizer


def token_ids_of(family: TinyFamily) -> tuple[dict[str, int], int]:
    """The ids of the family's special tokens by name, and the vocabulary's size."""
    tokenizer = tokenizer_of(family)
    special = {**family.special, "pad": "<|pad|>", "eos": "<|im_end|>", "bos": "<|im_start|>"}
    return {name: tokenizer.convert_tokens_to_ids(text) for name, text in special.items()}, len(tokenizer)


def text_config(model_type: str, vocab_size: int, **changes: Any) -> dict[str, Any]:
    """A decoder of 3 layers, 4 query heads on 2 KV heads, d_head 16. A change to None leaves the option out
    unless it is one of the token ids."""
    options = {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": D_MODEL,
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
    return {name: value for name, value in options.items() if value is not None or name.endswith("_token_id")}


def tower(**changes: Any) -> dict[str, Any]:
    """A vision tower of 3 layers and 4 heads of 8."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "patch_size": PATCH,
        **changes,
    }


def redraw(model: PreTrainedModel, seed: int) -> None:
    """Weights of the size that keeps every layer's output near 1, so that an edit anywhere shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if not weight.is_floating_point():
            continue
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim <= 1:
            # A norm's weight begins at 1, or at 0 where the norm multiplies by 1 + weight.
            centre = 1.0 if "lambda" in name or (name.endswith("weight") and bool(weight.any())) else 0.0
            weight.data = (centre + 0.2 * noise).to(weight.dtype)
        elif "embed" in name and weight.ndim == 2:
            weight.data = noise.to(weight.dtype)
        else:
            fan_in = weight.shape[-1] if weight.ndim == 3 and "experts" in name else weight[0].numel()
            weight.data = (1.3 * noise / fan_in**0.5).to(weight.dtype)


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
