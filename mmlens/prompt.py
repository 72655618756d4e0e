"""Prompts: a batch of questions about images as model inputs, with the token map that says what is where.

How the question's own tokens are found: the chat template is rendered with the question and once more with a
marker in its place, which gives the text before and after it. Images stand before the question, so what their
placeholders expand to changes nothing after it, and the question's tokens, known from the
tokenizer's offsets in the text with placeholders, are counted back from the end. Token ids are never searched.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from PIL import Image, ImageOps
from torch import Tensor
from transformers import ProcessorMixin

from mmlens.arguments import shown
from mmlens.errors import InvalidTypeError, InvalidValueError, MissingFileError, UnsupportedError
from mmlens.families.layouts.grids import Layout
from mmlens.families.media import media_of, unmapped_message
from mmlens.token_map import ImageGrid, TokenMap

MAX_IMAGE_PIXELS = 89_478_485
"""The largest image taken: PIL's own bound against decompression bombs (256 MB at three bytes a pixel)."""


class PromptError(InvalidValueError):
    """A question, image or template from which no prompt can be made."""


@runtime_checkable
class HasAnswer(Protocol):
    """What `Example` is, as far as `with_answers` reads it."""

    @property
    def answer(self) -> str: ...

    @property
    def candidates(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Prompt:
    """Model inputs for a batch, and what stands at each position.

    `inputs` are exactly the Hugging Face model's keyword inputs (tensors, or lists of numbers). `text` is each
    example's rendered template, image placeholders not yet expanded. The answer fields are set by `with_answers`.
    """

    inputs: dict[str, Any]
    token_map: TokenMap
    questions: list[str]
    images: list[list[Image.Image]]
    text: list[str]
    answers: list[str] | None = None
    candidates: list[tuple[str, ...]] | None = None
    answer_ids: Int[Tensor, " batch"] | None = None
    """First token of each answer, as it follows the prompt."""
    candidate_ids: list[Int[Tensor, " _"]] | None = None
    """First token of every candidate, per example."""

    image_features: Any = None
    """What the vision tower gave, where `HookedVLM.encode_images` has already run it."""

    def __len__(self) -> int:
        return len(self.token_map)

    @property
    def shape(self) -> torch.Size:
        """[batch, pos], as that of the tokens which TransformerLens' tools take in a prompt's place."""
        return self.token_map.image.shape

    @property
    def last(self) -> Bool[Tensor, "batch pos"]:
        """The last position of each prompt, which predicts the first token of the answer."""
        real = ~self.token_map.is_padding
        length = real.shape[1]
        position = length - 1 - real.flip(1).int().argmax(dim=1, keepdim=True)
        return torch.arange(length, device=real.device) == position

    def to(self, device: torch.device | str) -> Prompt:
        """The same prompt with inputs, token map and answer ids on `device`."""
        return replace(
            self,
            inputs={
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in self.inputs.items()
            },
            token_map=self.token_map.to(device),
            answer_ids=None if self.answer_ids is None else self.answer_ids.to(device),
            candidate_ids=None
            if self.candidate_ids is None
            else [ids.to(device) for ids in self.candidate_ids],
        )


def prompt_of(value: object, name: str = "prompt") -> Prompt:
    """A Prompt; InvalidTypeError for anything else, which says how to make one of it.

    >>> prompt_of("Who?")
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidTypeError: prompt is 'Who?' (str); expected a Prompt: model.prompt(question, images)
    """
    if isinstance(value, Prompt):
        return value
    hint = "model.prompt(question, images)"
    if isinstance(value, Mapping):
        hint += ", or of inputs that a processor made mmlens.prompt.prompt_from_inputs(...)"
    elif isinstance(value, HasAnswer):
        hint = "model.prompt_examples([example])"
    elif isinstance(value, (list, tuple)):
        hint = "model.prompt(questions, images) or model.prompt_examples(examples) make one of a whole batch"
    raise InvalidTypeError(f"{name} is {shown(value)}; expected a Prompt: {hint}")


def make_prompt(
    processor: ProcessorMixin,
    layout: Layout,
    questions: str | Sequence[str],
    images: Sequence[Any] = (),
    *,
    device: torch.device | str | None = None,
    padding_side: Literal["left", "right"] = "left",
) -> Prompt:
    """One question with its images, or a batch: a list of questions with a list of image lists.

    Images (PIL images or paths) stand in order before the question, through the processor's chat template and
    the processor itself. `layout` is the family's (mmlens.families.layouts).

    Raises PromptError for an empty question, a question the template drops, repeats or alters, image
    placeholders in another number than images, a broken or gigantic image, a processor without chat template
    or fast tokenizer; FileNotFoundError for a path that does not exist; TokenMapError where input_ids hold
    another number of image tokens than the layout predicts.
    """
    question_list, image_lists = _batch(questions, images)
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
        example
        for example, own in enumerate(images)
        if own and _n_placeholders(processor, text[example]) == 0
    ]

    def unplaced_error(example: int) -> PromptError:
        return _placeholder_error(processor, text[example], len(images[example]), f"example {example}")

    rendered = _laid_out(processor, rendered, images)
    try:
        encoded, plain = _process(processor, text, _joined(rendered), images, padding_side)
    except ValueError as error:
        if isinstance(error, PromptError) or not unplaced:
            raise
        raise unplaced_error(unplaced[0]) from error
    is_image = _image_positions(processor, layout, encoded)
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
    sizes = [[image.size for image in own] for own in images]
    # Some models take numbers of tiles as lists; what else is no tensor is the processor's own bookkeeping.
    listed = getattr(getattr(processor, "image_processor", None), "model_input_names", ())
    inputs = {name: value for name, value in encoded.items() if isinstance(value, Tensor) or name in listed}
    if padding_side == "left" and len(questions) > 1:
        check_left_padding(inputs["attention_mask"])
    return Prompt(
        inputs=inputs,
        token_map=_token_map(processor, layout, inputs, sizes, is_question),
        questions=questions,
        images=images,
        text=_joined(rendered),
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
    ids = inputs["input_ids"]
    held = media_of(processor, ids[_image_positions(processor, layout, inputs).to(ids.device)]).held(inputs)
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
    )


def check_left_padding(attention_mask: Int[Tensor, "batch pos"]) -> None:
    """Raise PromptError where a row has padding on the right: the next token would follow the padding.

    >>> check_left_padding(torch.tensor([[0, 1, 1], [1, 1, 1]]))
    >>> check_left_padding(torch.tensor([[1, 1, 0], [1, 1, 1]]))
    Traceback (most recent call last):
        ...
    mmlens.prompt.PromptError: example 0 is padded on the right (its last position is padding); ...
    """
    ends_padded = torch.nonzero(attention_mask[:, -1] == 0).flatten().tolist()
    if ends_padded:
        raise PromptError(
            f"example {ends_padded[0]} is padded on the right (its last position is padding); what reads or "
            "continues the last position needs padding on the left: tokenizer.padding_side = 'left'"
        )


def render(
    processor: ProcessorMixin, question: str, n_images: int, where: str = "the prompt"
) -> tuple[str, str, str]:
    """The chat template's text before the question, the question as it stands there, and the text after it.

    Raises PromptError as `make_prompt` does.
    """
    if not question.strip():
        raise PromptError(f"{where}: the question is empty ({question!r})")
    marker = "QUESTIONGOESHERE"
    while marker in question:
        marker += "X"
    marked = _apply_template(processor, marker, n_images)
    text = _apply_template(processor, question, n_images)
    if marked.count(marker) != 1:
        raise PromptError(
            f"{where}: the chat template shows the question {marked.count(marker)} times instead of once: {marked!r}"
        )
    prefix, suffix = marked.split(marker)
    middle = text[len(prefix) : len(text) - len(suffix)]
    if prefix + middle + suffix != text or middle.strip() != question.strip():
        raise PromptError(
            f"{where}: the question {question!r} is not found in the rendered prompt, the chat template altered it: "
            f"{text!r}"
        )
    if "'type': 'text'" in prefix:
        raise PromptError(
            f"{where}: the chat template does not take message content as a list of parts: {text!r}"
        )
    if _n_placeholders(processor, text) not in (0, n_images):
        raise _placeholder_error(processor, text, n_images, where)
    return prefix, middle, suffix


def _image_token(processor: ProcessorMixin) -> str | None:
    token = getattr(processor, "image_placeholder_token", None) or getattr(processor, "image_token", None)
    return None if token is None else str(token)


def _n_placeholders(processor: ProcessorMixin, text: str) -> int:
    image_token = _image_token(processor)
    return text.count(image_token) if image_token else 0


def _placeholder_error(processor: ProcessorMixin, text: str, n_images: int, where: str) -> PromptError:
    return PromptError(
        f"{where}: {n_images} image(s) were given, but the rendered prompt holds "
        f"{_n_placeholders(processor, text)} placeholder(s) {_image_token(processor)!r}: {text!r}"
    )


def load_image(image: Any, where: str = "the image") -> Image.Image:
    """An RGB copy of a PIL image, or of the image file at a path (turned upright as its EXIF data say).

    Raises PromptError for what is no image, a truncated file, an empty image or one above MAX_IMAGE_PIXELS,
    and FileNotFoundError for a path that does not exist.
    """
    if not isinstance(image, (str, os.PathLike)):
        return _decoded(image, where)
    name = f"{where} ({os.fspath(image)})"
    if not Path(image).is_file():
        raise MissingFileError(f"{name} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(image)
    except Image.DecompressionBombError as error:
        raise PromptError(f"{name} is gigantic, more than {MAX_IMAGE_PIXELS} pixels ({error})") from error
    except OSError as error:
        raise PromptError(f"{name} is no image that PIL can read ({error})") from error
    with opened:
        return _decoded(opened, name, upright=True)


def with_answers(prompt: Prompt, processor: ProcessorMixin, examples: Sequence[HasAnswer]) -> Prompt:
    """The prompt with its examples' answers and candidates, and their first token ids as they follow the prompt.

    Raises PromptError where the number of examples is not the batch's, or an answer or candidate is empty.
    """
    if len(examples) != len(prompt):
        raise PromptError(f"answers of {len(examples)} example(s), but the prompt has {len(prompt)}")
    known: dict[tuple[str, str], int] = {}

    def first_id(text: str, answer: str) -> int:
        if (text, answer) not in known:
            known[text, answer] = _first_token_after(processor, text, answer)
        return known[text, answer]

    device = prompt.token_map.device
    answers = [example.answer for example in examples]
    candidates = [tuple(example.candidates) for example in examples]
    return replace(
        prompt,
        answers=answers,
        candidates=candidates,
        answer_ids=torch.tensor(
            [first_id(text, answer) for text, answer in zip(prompt.text, answers, strict=True)], device=device
        ),
        candidate_ids=[
            torch.tensor([first_id(text, answer) for answer in own], dtype=torch.long, device=device)
            for text, own in zip(prompt.text, candidates, strict=True)
        ],
    )


# ---------------------------------------------------------------------- plumbing


def _decoded(image: Any, name: str, *, upright: bool = False) -> Image.Image:
    if not isinstance(image, Image.Image):
        raise PromptError(
            f"{name} is a {type(image).__name__}; expected a PIL image or the path of an image file"
        )
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise PromptError(
            f"{name} is gigantic: {width} x {height} = {width * height} pixels, at most {MAX_IMAGE_PIXELS} are taken; "
            "resize it or cut it into pages"
        )
    if not width * height:
        raise PromptError(f"{name} is empty: {width} x {height} pixels")
    try:
        return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise PromptError(f"{name} is broken and cannot be decoded ({error})") from error


def _batch(questions: str | Sequence[str], images: Sequence[Any]) -> tuple[list[str], list[list[Any]]]:
    if isinstance(images, (str, os.PathLike, Image.Image)):
        raise PromptError(
            f"images is a single {type(images).__name__}; expected a list of images: images=[image]"
        )
    nested = [isinstance(entry, (list, tuple)) for entry in images]
    if isinstance(questions, str):
        if any(nested):
            raise PromptError("one question takes a flat list of images; a batch takes a list of questions")
        return [questions], [list(images)]
    question_list = list(questions)
    if not question_list:
        raise PromptError("there is no question: the list of questions is empty")
    if not len(images):
        return question_list, [[] for _ in question_list]
    if not all(nested) or len(images) != len(question_list):
        raise PromptError(
            f"{len(question_list)} question(s) take a list of {len(question_list)} image lists, one per question; "
            f"got {len(images)} entries, {sum(nested)} of them lists"
        )
    return question_list, [list(own) for own in images]


def _apply_template(processor: ProcessorMixin, question: str, n_images: int) -> str:
    if not getattr(processor, "chat_template", None):
        raise PromptError(
            f"the processor {type(processor).__name__} has no chat template; set processor.chat_template to the "
            "model's template"
        )
    content: list[dict[str, str]] = [{"type": "image"}] * n_images + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


Tokens = tuple[Int[Tensor, " _"], Int[Tensor, "_ 2"]]
"""Token ids and the characters (start, stop) that each covers."""


Rendered = tuple[str, str, str]
"""The text before the question, the question, and the text after it."""


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
    grids = iter(layout(processor, inputs, [size for own in sizes for size in own]))
    per_example: list[list[ImageGrid]] = [[next(grids) for _ in own] for own in sizes]
    return TokenMap.from_grids(
        _image_positions(processor, layout, inputs), inputs["attention_mask"], is_question, per_example
    )


def _image_positions(
    processor: ProcessorMixin, layout: Layout, inputs: Mapping[str, Any]
) -> Bool[Tensor, "batch pos"]:
    """Where the images' embeddings stand: marked by the processor itself, or by the id of its image token."""
    if hasattr(layout, "visual_token"):
        token = layout.visual_token(processor)
        visual_id = None if token is None else processor.tokenizer.convert_tokens_to_ids(token)
        ids = inputs["input_ids"].cpu()
        return torch.zeros_like(ids, dtype=torch.bool) if visual_id is None else ids == visual_id
    if "image_embeds_position_mask" in inputs:
        return inputs["image_embeds_position_mask"].cpu() == 1
    token_id = getattr(processor, "image_token_id", None)
    if token_id is None:
        token = _image_token(processor) or getattr(processor, "video_token", None)
        if token is None:
            raise PromptError(f"the processor {type(processor).__name__} names no image token")
        token_id = processor.tokenizer.convert_tokens_to_ids(str(token))
    return inputs["input_ids"].cpu() == token_id


def _first_token_after(processor: ProcessorMixin, text: str, answer: str) -> int:
    if not answer:
        raise PromptError("an answer or candidate is empty, so it has no first token")
    tokenizer = processor.tokenizer
    encoded = tokenizer(text + answer, add_special_tokens=False, return_offsets_mapping=True)
    for token, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if last > len(text):
            if first >= len(text):
                return token
            break
    # The tokenizer would merge the answer's start into the prompt's last token, but the prompt stands as it is.
    return tokenizer(answer, add_special_tokens=False)["input_ids"][0]
