"""Making a prompt of questions and images, by the processor, with the token map that says what is where.

How the question's own tokens are found: the chat template is rendered with the question and once more with a
marker in its place, which gives the text before and after it. Images stand before the question, so what their
placeholders expand to changes nothing after it, and the question's tokens, known from the
tokenizer's offsets in the text with placeholders, are counted back from the end. Token ids are never searched.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from mmlens.arguments import instance_of, listed, shown
from mmlens.data.images import is_transparent, load_image
from mmlens.errors import (
    MmlensError,
    MmlensWarning,
    PromptError,
    UnsupportedError,
)
from mmlens.families.layouts.grids import Layout
from mmlens.families.media import media_of, unmapped_message
from mmlens.families.placeholders import (
    drops_alpha,
    image_positions,
    sees_missing_images,
    values_after,
)
from mmlens.model.chat_template import Rendered, n_placeholders, placeholder_error, render
from mmlens.model.fingerprints import processor_fingerprint
from mmlens.model.prompt import Prompt, check_left_padding
from mmlens.token_map import ImageGrid, TokenMap


class UnknownWordWarning(MmlensWarning):
    """A question holds a word that the tokenizer does not know."""


def make_prompt(
    processor: ProcessorMixin,
    layout: Layout,
    questions: str | Iterable[str],
    images: Iterable[Any] | None = (),
    *,
    device: torch.device | str | None = None,
    padding_side: Literal["left", "right"] = "left",
) -> Prompt:
    """One question with its images, or a batch: a list of questions with a list of image lists.

    Images (PIL images or paths) stand in order before the question, through the processor's chat template and
    the processor itself, which gets them upright and as RGB: laid over white where they are transparent, as
    transformers does for a PIL image (`open_image` says what is turned and what is refused). `layout` is the
    family's (mmlens.families.layouts).

    Raises PromptError for an empty question, a question the template drops, repeats or alters, image
    placeholders in another number than images, a broken or gigantic image, a processor without chat template
    or fast tokenizer; FileNotFoundError for a path that does not exist; TokenMapError where input_ids hold
    another number of image tokens than the layout predicts.
    """
    question_list, image_lists = _batch(questions, images)
    _warn_of_dropped_alpha(processor, image_lists)
    loaded = [
        [load_image(image, f"image {i} of example {example}") for i, image in enumerate(own)]
        for example, own in enumerate(image_lists)
    ]
    rendered = [
        render(processor, question, len(own), f"example {example}")
        for example, (question, own) in enumerate(zip(question_list, loaded, strict=True))
    ]
    prompt = assembled_prompt(processor, layout, rendered, question_list, loaded, padding_side)
    return prompt if device is None else prompt.to(device)


def assembled_prompt(
    processor: ProcessorMixin,
    layout: Layout,
    rendered: Sequence[tuple[str, str, str]],
    questions: list[str],
    images: list[list[Image.Image]],
    padding_side: str = "left",
) -> Prompt:
    """The prompt of rendered texts (before the question, question, after it) with their images.

    For texts that no chat template gives, such as marks between images; else `make_prompt`. Raises as it does.
    """
    text = _joined(rendered)
    # No placeholder is right where the processor writes the images' tokens itself, and only there.
    unplaced = [
        example for example, own in enumerate(images) if own and n_placeholders(processor, text[example]) == 0
    ]

    def unplaced_error(example: int) -> PromptError:
        return placeholder_error(processor, text[example], len(images[example]), f"example {example}")

    rendered = _laid_out(processor, rendered, images)
    try:
        encoded, plain = _process(processor, text, _joined(rendered), images, padding_side)
    except MmlensError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        if unplaced:
            raise unplaced_error(unplaced[0]) from error
        shapes = ", ".join(f"{image.width} x {image.height}" for own in images for image in own) or "none"
        raise PromptError(
            f"{type(processor).__name__} takes no such prompt, with {list(map(len, images))} image(s) of {shapes} "
            f"pixels: {error}"
        ) from error
    is_image = image_positions(processor, layout, encoded)
    for example in unplaced:
        if not bool(is_image[example].any()):
            raise unplaced_error(example)
    is_question = torch.zeros(encoded["input_ids"].shape, dtype=torch.bool)
    for example, (_, question, suffix) in enumerate(rendered):
        real = encoded["attention_mask"][example] == 1
        found = _question_tokens(
            encoded["input_ids"][example][real],
            plain[example],
            n_text=sum(map(len, rendered[example])),
            n_question=len(question),
            n_suffix=len(suffix),
        )
        if found is None:
            raise PromptError(
                f"example {example}: the question {question!r} was not found among the prompt's tokens; the "
                "processor changed the text after the chat template in a way other than expanding images"
            )
        is_question[example, real] = found
        _warn_of_unknown_words(
            processor, plain[example], question, sum(map(len, rendered[example][:2])), example
        )
    sizes = [[image.size for image in own] for own in images]
    # Some models take numbers of tiles as lists; what else is no tensor is the processor's own bookkeeping.
    listed = getattr(getattr(processor, "image_processor", None), "model_input_names", ())
    inputs = {name: value for name, value in encoded.items() if isinstance(value, Tensor) or name in listed}
    if sees_missing_images(inputs, list(map(len, images))):
        warnings.warn(
            f"the examples of this batch have {list(map(len, images))} images: plain transformers lets what stands "
            "before an example's image look at the padding of those it lacks, so its logits are others than alone; "
            "give batches of equal numbers of images",
            MmlensWarning,
            stacklevel=4,
        )
    if padding_side == "left" and len(questions) > 1:
        check_left_padding(inputs["attention_mask"])
    return Prompt(
        inputs=inputs,
        token_map=_token_map(processor, layout, inputs, sizes, is_question),
        questions=questions,
        images=images,
        text=_joined(rendered),
        processor=processor_fingerprint(processor),
        pad_id=processor.tokenizer.pad_token_id,
        values_after=values_after(processor),
    )


def prompt_from_inputs(
    processor: ProcessorMixin,
    layout: Layout,
    inputs: Mapping[str, Tensor],
    image_sizes: Sequence[Sequence[tuple[int, int]]],
    question_spans: Sequence[tuple[int, int]] | None = None,
) -> Prompt:
    """A prompt from inputs that the processor has already made.

    `image_sizes` are the original (width, height) of each example's images, `question_spans` each example's
    question as positions (start, stop).

    Raises PromptError where a batch is not padded on the left or a span lies outside the prompt, and
    TokenMapError where input_ids hold another number of image tokens than the layout predicts, and UnsupportedError
    where they hold video or audio.
    """
    if not isinstance(inputs, Mapping) or not isinstance(inputs.get("input_ids"), Tensor):
        raise PromptError(
            f"inputs is {shown(inputs)}; expected what a processor gives, with input_ids [batch, pos]"
        )
    ids = inputs["input_ids"]
    held = media_of(processor, ids[image_positions(processor, layout, inputs).to(ids.device)]).held(inputs)
    if held is not None:
        raise UnsupportedError(unmapped_message(held, "a token map"))
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    check_left_padding(mask)
    is_question = torch.zeros(ids.shape, dtype=torch.bool)
    for example, (start, stop) in enumerate(question_spans or ()):
        if not 0 <= start < stop <= ids.shape[1]:
            raise PromptError(
                f"example {example}: the question span ({start}, {stop}) does not lie in 0 to {ids.shape[1]}"
            )
        is_question[example, start:stop] = True
    tensors = {**inputs, "attention_mask": mask}
    n = len(ids)
    return Prompt(
        inputs=tensors,
        token_map=_token_map(processor, layout, tensors, image_sizes, is_question).to(ids.device),
        questions=[""] * n,
        images=[[] for _ in range(n)],
        text=[""] * n,
        processor=processor_fingerprint(processor),
        pad_id=processor.tokenizer.pad_token_id,
        values_after=values_after(processor),
    )


def _warn_of_dropped_alpha(processor: ProcessorMixin, images: list[list[Any]]) -> None:
    if drops_alpha(processor) and any(
        isinstance(image, Image.Image) and is_transparent(image) for own in images for image in own
    ):
        warnings.warn(
            f"transparent images were laid over white, as transformers does for other models; plain "
            f"{type(processor).__name__} drops the alpha channel and shows the colours that lie under it",
            MmlensWarning,
            stacklevel=4,
        )


_NO_LISTS = (str, bytes, os.PathLike, io.IOBase, Mapping, np.ndarray, Tensor)
"""What can be iterated over and is still no list of images."""


def _batch(questions: Any, images: Any) -> tuple[list[str], list[list[Any]]]:
    if isinstance(images, (str, os.PathLike, Image.Image)):
        raise PromptError(
            f"images is a single {type(images).__name__}; expected a list of images: images=[image]"
        )
    image_list = [] if images is None else listed("images", images, "a list of images")
    nested = [isinstance(entry, Iterable) and not isinstance(entry, _NO_LISTS) for entry in image_list]
    if isinstance(questions, str):
        if any(nested):
            raise PromptError("one question takes a flat list of images; a batch takes a list of questions")
        return [questions], [image_list]
    question_list = listed("questions", questions, "a question, or a list of questions")
    for number, question in enumerate(question_list):
        instance_of(f"question {number}", question, str, "a text")
    if not question_list:
        raise PromptError("there is no question: the list of questions is empty")
    if not image_list:
        return question_list, [[] for _ in question_list]
    if not all(nested) or len(image_list) != len(question_list):
        raise PromptError(
            f"{len(question_list)} question(s) take a list of {len(question_list)} image lists, one per question; "
            f"got {len(image_list)} entries, {sum(nested)} of them lists"
        )
    return question_list, [
        listed(f"the images of question {number}", own, "a list of images")
        for number, own in enumerate(image_list)
    ]


Tokens = tuple[Int[Tensor, " _"], Int[Tensor, "_ 2"]]
"""Token ids and the characters (start, stop) that each covers."""


def _joined(rendered: Sequence[Rendered]) -> list[str]:
    return [prefix + question + suffix for prefix, question, suffix in rendered]


def _laid_out(
    processor: ProcessorMixin, rendered: Sequence[Rendered], images: list[list[Image.Image]]
) -> list[Rendered]:
    """The rendered texts with what the processor adds to them before it expands images (PaliGemma: a start token
    after the images and a newline at the end)."""
    _, laid_out, *_ = processor.prepare_inputs_layout(
        images=[list(own) for own in images] if any(images) else None, text=_joined(rendered)
    )
    result = []
    for (prefix, question, suffix), text in zip(rendered, laid_out, strict=True):
        before, found, after = text.rpartition(question + suffix)
        result.append((before, question, suffix + after) if found else (prefix, question, suffix))
    return result


def _process(
    processor: ProcessorMixin,
    text: list[str],
    laid_out: list[str],
    images: list[list[Image.Image]],
    padding_side: str,
) -> tuple[dict[str, Any], list[Tokens]]:
    """The processor's output, and the tokens of each text laid out, but with images not yet expanded."""
    tokenizer = processor.tokenizer
    if not tokenizer.is_fast:
        raise PromptError(
            f"the tokenizer {type(tokenizer).__name__} gives no offsets, which the question's positions are read "
            "from; load the processor with a fast tokenizer (use_fast=True)"
        )
    if len(text) > 1 and tokenizer.pad_token_id is None:
        raise PromptError(
            "a batch needs padding, but the tokenizer has no pad_token; set tokenizer.pad_token"
        )
    options: dict[str, Any] = {}
    if tokenizer.bos_token and text[0].startswith(tokenizer.bos_token):
        # The template has written the start token; the tokenizer must not add a second one.
        options["add_special_tokens"] = False
    encoded = processor(
        text=list(text),
        images=images if any(images) else None,
        padding=len(text) > 1,
        padding_side=padding_side,
        return_tensors="pt",
        **options,
    )
    plain = tokenizer(laid_out, return_offsets_mapping=True, **options)
    tokens = [
        (torch.tensor(ids), torch.tensor(offsets))
        for ids, offsets in zip(plain["input_ids"], plain["offset_mapping"], strict=True)
    ]
    # Labels are for training alone.
    return {name: value for name, value in encoded.items() if name != "labels"}, tokens


def _question_tokens(
    ids: Int[Tensor, " position"], plain: Tokens, *, n_text: int, n_question: int, n_suffix: int
) -> Bool[Tensor, " position"] | None:
    """Which tokens of the expanded text cover the question; None where the two texts do not end alike."""
    plain_ids, offsets = plain
    stop = n_text - n_suffix
    asked = (offsets[:, 0] < stop) & (offsets[:, 1] > stop - n_question) & (offsets[:, 1] > offsets[:, 0])
    if not bool(asked.any()):
        return None
    n_tail = len(plain_ids) - int(asked.int().argmax())
    if not torch.equal(ids[-n_tail:], plain_ids[-n_tail:]):
        return None
    found = torch.zeros(len(ids), dtype=torch.bool)
    found[-n_tail:] = asked[-n_tail:]
    return found


def _token_map(
    processor: ProcessorMixin,
    layout: Layout,
    inputs: Mapping[str, Tensor],
    sizes: Sequence[Sequence[tuple[int, int]]],
    is_question: Bool[Tensor, "batch pos"],
) -> TokenMap:
    flat = [size for own in sizes for size in own]
    grids = iter(layout(processor, inputs, flat) if flat else [])
    per_example: list[list[ImageGrid]] = [[next(grids) for _ in own] for own in sizes]
    return TokenMap.from_grids(
        image_positions(processor, layout, inputs), inputs["attention_mask"], is_question, per_example
    )


def _warn_of_unknown_words(
    processor: ProcessorMixin, plain: Tokens, question: str, stop: int, example: int
) -> None:
    """Warn of words of the question that the tokenizer does not know; it ends at character `stop` of the text."""
    tokenizer = processor.tokenizer
    ids, offsets = plain
    start = stop - len(question)
    inside = (offsets[:, 0] >= start) & (offsets[:, 1] <= stop) & (offsets[:, 1] > offsets[:, 0])
    unknown = inside & (ids == (-1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id))
    words = [question[first - start : last - start] for first, last in offsets[unknown].tolist()]
    words = [word for word in dict.fromkeys(words) if word != tokenizer.unk_token]
    if words:
        warnings.warn(
            f"example {example}: the tokenizer does not know {', '.join(map(repr, words))} in the question "
            f"{question!r}; the model reads {tokenizer.unk_token!r} there, as for every word that it does not know",
            UnknownWordWarning,
            stacklevel=4,
        )
