"""What tells one example, image, prompt or model from another: short hashes of what they are made of.

They say that two things are of the same origin, so that what was built for one is not used for the other, and they
seed whatever is drawn for an example, so that a draw does not depend on the batch the example stands in.
"""

from __future__ import annotations

import hashlib
import weakref
import zlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mmlens import internals
from mmlens.data.images import pixel_fingerprint

if TYPE_CHECKING:
    from mmlens.model.prompt import Prompt

_DIGITS = 16
"""Hexadecimal digits: 64 bits."""

TEXT_INPUTS = ("input_ids", "attention_mask")
"""Inputs of a model that are no part of its images."""


# ---------------------------------------------------------------------- examples and prompts


def example_seed(prompt: Prompt, example: int) -> list[int]:
    """Numbers that are an example's own in whatever batch it stands: of its tokens (no padding) and its images.

    What follows the prompt does not count: what is drawn for an example is the same for each of its answers.
    """
    ids = real_tokens(prompt if prompt.continuation is None else prompt.continuation.prompt, example)
    return [
        zlib.crc32(ids),
        *(zlib.crc32(each.encode()) for each in pixel_fingerprints(prompt, example)),
    ]


def example_fingerprint(prompt: Prompt, example: int) -> str:
    """One example's tokens (no padding), images, answer and candidates, in whatever batch it stands.

    A prompt that does not hold its images (`prompt_from_inputs`) has them by the batch's inputs.
    """
    images: list[Any] = pixel_fingerprints(prompt, example)
    answers = [None if each is None else each[example] for each in (prompt.answers, prompt.candidates)]
    seen = images or (sorted(prompt.vision.items()), example)
    return _short(real_tokens(prompt, example), repr((seen, answers)).encode())


def pixel_fingerprints(prompt: Prompt, example: int) -> list[str]:
    """One of every image and video of an example."""
    return [
        *map(pixel_fingerprint, prompt.images[example]),
        *(video.fingerprint for video in prompt.videos[example]),
    ]


def vision_fingerprints(inputs: Mapping[str, Any]) -> dict[str, str]:
    """A fingerprint of every input but the tokens and their mask: what the model is given of the images."""
    return {
        name: _short(tensor_bytes(value) if isinstance(value, Tensor) else repr(value).encode())
        for name, value in inputs.items()
        if name not in TEXT_INPUTS
    }


def real_tokens(prompt: Prompt, example: int) -> bytes:
    """One example's token ids without padding."""
    real = ~prompt.token_map.is_padding[example].cpu()
    return prompt.inputs["input_ids"][example].cpu()[real].numpy().astype(np.int64).tobytes()


# ---------------------------------------------------------------------- processors

_TOKENIZERS: weakref.WeakKeyDictionary[Any, bytes] = weakref.WeakKeyDictionary()
_SAMPLED_TOKENS = 512


def processor_fingerprint(processor: Any) -> str:
    """What makes token ids and pixels of one processor wrong for a model with another.

    Tokens of the vocabulary (a sample; tokens that were added later do not count, but for the image token), and the
    normalization of images. Settings such as the largest image or the chat template may differ. The vocabulary is read
    once for each tokenizer, which processors with other options share.
    """
    tokenizer, images = processor.tokenizer, getattr(processor, "image_processor", None)
    vocabulary = _TOKENIZERS.get(tokenizer)
    if vocabulary is None:
        size = tokenizer.vocab_size
        sampled = sorted({int(at) for at in np.linspace(0, max(size - 1, 0), _SAMPLED_TOKENS)})
        said = repr((size, tokenizer.convert_ids_to_tokens(sampled)))
        vocabulary = _TOKENIZERS[tokenizer] = hashlib.sha256(said.encode()).digest()
    of_images = (
        getattr(processor, "image_token_id", None),
        *(getattr(images, name, None) for name in ("image_mean", "image_std")),
    )
    return _short(vocabulary, repr(of_images).encode())


# ---------------------------------------------------------------------- weights

_SAMPLED_WEIGHTS = 4096
"""Of each tensor: evenly spread over it, so that a changed row, column or head is met."""

_COARSER = {
    torch.float64: (torch.float64, torch.float32, torch.float16, torch.bfloat16),
    torch.float32: (torch.float32, torch.float16, torch.bfloat16),
}

_WEIGHTS: weakref.WeakKeyDictionary[nn.Module, tuple[int, dict[str, str]]] = weakref.WeakKeyDictionary()


def weights_version(model: nn.Module) -> int:
    """A number that changes when a weight is replaced or changed in place (not through `.data`)."""
    return hash(
        tuple((name, id(tensor), internals.n_changes(tensor)) for name, tensor in model.named_parameters())
    )


def weights_fingerprints(model: nn.Module) -> dict[str, str]:
    """{dtype: hash of a sample of the weights in that dtype}, for the model's own dtype and all coarser ones.

    So a model and its copy in half precision have one in common. What lies on no device (offloaded) is left out.
    """
    version = weights_version(model)
    known = _WEIGHTS.get(model)
    if known is None or known[0] != version:
        dtypes = _COARSER.get(
            getattr(model, "dtype", torch.float32), (getattr(model, "dtype", torch.float32),)
        )
        known = _WEIGHTS[model] = (version, {str(dtype): _short(*_sampled(model, dtype)) for dtype in dtypes})
    return known[1]


def same_weights(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two `weights_fingerprints` are of the same numbers, rounded to the coarser of the two dtypes.

    >>> same_weights({"float32": "a", "bfloat16": "b"}, {"bfloat16": "b"})
    True
    """
    return any(one[dtype] == other[dtype] for dtype in one.keys() & other.keys())


def _sampled(model: nn.Module, dtype: torch.dtype) -> Iterator[bytes]:
    for name, tensor in sorted(model.named_parameters()):
        yield f"{name} {tuple(tensor.shape)}".encode()
        for part in internals.tensors_in(tensor):
            if part.device.type == "meta":
                continue
            flat = part.detach().reshape(-1)
            sample = flat[:: -(-max(len(flat), 1) // _SAMPLED_WEIGHTS)]
            yield tensor_bytes(sample.to(dtype) if sample.is_floating_point() else sample)


def tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor's numbers as they lie in memory, in the order of its axes."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _short(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:_DIGITS]
