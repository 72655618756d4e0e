"""Prompts: a batch of questions about images as model inputs, with the token map that says what is where.

How the question's own tokens are found: the chat template is rendered with the question and once more with a
marker in its place, which gives the text before and after it. Images stand before the question, so what their
placeholders expand to changes nothing after it, and the question's tokens, known from the
tokenizer's offsets in the text with placeholders, are counted back from the end. Token ids are never searched.
"""

from __future__ import annotations

import functools
import io
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from mmlens.arguments import device_of, instance_of, listed, shown
from mmlens.data.examples import Example
from mmlens.data.images import is_transparent, load_image
from mmlens.errors import (
    InvalidTypeError,
    InvalidValueError,
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
    placeholder_of,
    sees_missing_images,
)
from mmlens.model.fingerprints import example_fingerprint, processor_fingerprint, vision_fingerprints
from mmlens.token_map import ImageGrid, TokenMap


class UnknownWordWarning(MmlensWarning):
    """A question holds a word that the tokenizer does not know."""


@dataclass(eq=False)
class Spelling:
    """How a prompt's answers are written as tokens, and what another spelling of them would be.

    Many tokenizers tell " yes" from "yes". `tokens` are the answers' first tokens as the tokenizer writes them;
    `others` holds, per example, the first tokens that the answer and the candidates would have with the space
    before them that they lack, or without the one that they have, where these are no candidate's own. (One entry
    stands for all examples where the tokens are the same for all.)
    """

    tokens: list[str]
    blank: list[bool]
    """Whether the answer's or a candidate's first token is white space alone, per example."""
    others: list[dict[int, str]]
    is_checked: bool = False

    def check(self, greedy: Sequence[int]) -> None:
        """Warn where a most probable token is the other spelling; of the first run of a prompt alone."""
        if self.is_checked:
            return
        self.is_checked = True
        rows = len(self.others)
        for row, token in enumerate(greedy):
            if token in self.others[row % rows]:
                warnings.warn(
                    f"the most probable token after a prompt is the first of {self.others[row % rows][token]!r}, and "
                    f"what is measured is {self.tokens[row % rows]!r}: the model writes its answers with another "
                    "space before them than the metric looks for. Choose it by model.prompt_examples(examples, "
                    "answer_start=' ') or '', or write the answers so",
                    MmlensWarning,
                    stacklevel=5,
                )
                return


@dataclass(frozen=True, repr=False)
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
    """First token of each answer, as it follows the prompt (`with_answers`)."""
    candidate_ids: list[Int[Tensor, " _"]] | None = None
    """First token of every candidate, per example."""
    answer_starts: list[str] | None = None
    """What stands between each prompt and its answer: "", or the space that the chat template writes there."""
    spelling: Spelling | None = None
    """How the tokens of the answers are written, and the tokens that the other spelling would have."""
    examples: tuple[Example, ...] | None = None
    """What it was made of, evidence included; None for a prompt of questions and images, and for a corrupted one."""

    image_features: Any = None
    """What the vision tower gave, where `HookedVLM.encode_images` has already run it."""
    encoded: Mapping[str, str] | None = None
    """Fingerprints of the inputs that it read, which are then no inputs any more."""
    processor: str = ""
    """Fingerprint of the processor that made it; "" where that is not known."""

    def __len__(self) -> int:
        return len(self.token_map)

    def __repr__(self) -> str:
        """The questions, how many images and positions each has, and the token that stands for its answer."""
        n_positions = (~self.token_map.is_padding).sum(1).tolist()
        n_visual = self.token_map.is_image.sum(1).tolist()
        lines = []
        for row, question in enumerate(self.questions[:_MOST_SHOWN]):
            said = f"{_short(question)}, {len(self.images[row])} image(s), {n_positions[row]} positions"
            said += f" ({n_visual[row]} visual)" if n_visual[row] else ""
            if self.answers is not None and self.spelling is not None:
                said += f", answer {_short(self.answers[row])} as token {self.spelling.tokens[row]!r}"
            lines.append(said)
        more = len(self) - len(lines)
        lines += [f"and {more} more"] if more else []
        return f"Prompt({'; '.join(lines)})" if len(lines) == 1 else "\n  ".join(["Prompt(", *lines]) + ")"

    @property
    def shape(self) -> torch.Size:
        """[batch, pos], as that of the tokens which TransformerLens' tools take in a prompt's place."""
        return self.token_map.image.shape

    @functools.cached_property
    def vision(self) -> dict[str, str]:
        """Fingerprints of what the model is given beside tokens and mask, the same after `encode_images`."""
        return {**(self.encoded or {}), **vision_fingerprints(self.inputs)}

    @functools.cached_property
    def fingerprints(self) -> tuple[str, ...]:
        """A fingerprint of each example: its tokens, images and answers, in whatever batch it stands."""
        return tuple(example_fingerprint(self, row) for row in range(len(self)))

    @property
    def last(self) -> Bool[Tensor, "batch pos"]:
        """The last position of each prompt, which predicts the first token of the answer."""
        real = ~self.token_map.is_padding
        length = real.shape[1]
        position = length - 1 - real.flip(1).int().argmax(dim=1, keepdim=True)
        return torch.arange(length, device=real.device) == position

    def to(self, device: torch.device | str) -> Prompt:
        """The same prompt with inputs, token map and answer ids on `device`."""
        device = device_of(device)
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
        hint += ", or of inputs that a processor made mmlens.model.prompt.prompt_from_inputs(...)"
    elif isinstance(value, Example):
        hint = "model.prompt_examples([example])"
    elif isinstance(value, (list, tuple)):
        hint = "model.prompt(questions, images) or model.prompt_examples(examples) make one of a whole batch"
    raise InvalidTypeError(f"{name} is {shown(value)}; expected a Prompt: {hint}")


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
        example
        for example, own in enumerate(images)
        if own and _n_placeholders(processor, text[example]) == 0
    ]

    def unplaced_error(example: int) -> PromptError:
        return _placeholder_error(processor, text[example], len(images[example]), f"example {example}")

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
    )


def check_left_padding(attention_mask: Int[Tensor, "batch pos"]) -> None:
    """Raise PromptError where a row has padding on the right: the next token would follow the padding.

    >>> check_left_padding(torch.tensor([[0, 1, 1], [1, 1, 1]]))
    >>> check_left_padding(torch.tensor([[1, 1, 0], [1, 1, 1]]))
    Traceback (most recent call last):
        ...
    mmlens.errors.PromptError: example 0 is padded on the right (its last position is padding); ...
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


def _n_placeholders(processor: ProcessorMixin, text: str) -> int:
    placeholder = placeholder_of(processor)
    return text.count(placeholder) if placeholder else 0


def _placeholder_error(processor: ProcessorMixin, text: str, n_images: int, where: str) -> PromptError:
    return PromptError(
        f"{where}: {n_images} image(s) were given, but the rendered prompt holds "
        f"{_n_placeholders(processor, text)} placeholder(s) {placeholder_of(processor)!r}: {text!r}"
    )


def with_answers(
    prompt: Prompt,
    processor: ProcessorMixin,
    examples: Sequence[Example],
    answer_start: str | None = None,
) -> Prompt:
    """The prompt of these examples with them, and with their answers and candidates (`answered`)."""
    if len(examples) != len(prompt):
        raise PromptError(f"answers of {len(examples)} example(s), but the prompt has {len(prompt)}")
    answers, candidates = [each.answer for each in examples], [each.candidates for each in examples]
    return replace(answered(prompt, processor, answers, candidates, answer_start), examples=tuple(examples))


def answered(
    prompt: Prompt,
    processor: ProcessorMixin,
    answers: list[str],
    candidates: list[tuple[str, ...]],
    answer_start: str | Sequence[str] | None = None,
) -> Prompt:
    """The prompt with an answer and candidates for each example, and their first token ids as they follow the prompt.

    Many tokenizers tell " yes" from "yes". `answer_start` is what stands between the prompt and an answer: None
    for what the chat template writes there in an assistant's turn (`answer_start_of`), "" or " " to choose, for all
    examples or for each. An answer that itself begins with white space is taken as it is.

    Raises PromptError where an answer or candidate is empty or holds a word that the tokenizer does not know, or
    another processor made the prompt; InvalidValueError for another `answer_start`.
    """
    if prompt.processor and prompt.processor != processor_fingerprint(processor):
        raise PromptError(
            "the prompt was made by another processor than this one, whose tokenizer would give the answers other ids"
        )
    if answer_start is None:
        rows = zip(prompt.text, prompt.images, strict=True)
        starts = [answer_start_of(processor, text, len(own)) for text, own in rows]
    else:
        starts = [answer_start] * len(prompt) if isinstance(answer_start, str) else list(answer_start)
        if len(starts) != len(prompt) or not set(starts) <= {"", " "}:
            raise InvalidValueError(
                f"answer_start is {shown(answer_start)}; expected '' or ' ', or None for what the chat template writes"
            )

    @functools.cache
    def first_id(text: str, answer: str, unknown: bool = False) -> int:
        return _first_token_after(processor, text, answer, unknown=unknown)

    device = prompt.token_map.device
    answer_ids: list[int] = []
    candidate_ids: list[list[int]] = []
    spelling = Spelling([], [], [])
    for text, start, answer, options in zip(prompt.text, starts, answers, candidates, strict=True):
        spelt = [_spelt(start, each) for each in (answer, *options)]
        ids = [first_id(text, each) for each in spelt]
        answer_ids.append(ids[0])
        candidate_ids.append(ids[1:])
        spelling.tokens.append(str(processor.tokenizer.convert_ids_to_tokens(ids[0])))
        spelling.blank.append(any(not processor.tokenizer.decode([each]).strip() for each in ids))
        others = {first_id(text, each, unknown=True): each for each in map(respelt, spelt)}
        spelling.others.append({token: each for token, each in others.items() if token not in ids})
    return replace(
        prompt,
        answers=answers,
        candidates=candidates,
        answer_ids=torch.tensor(answer_ids, device=device),
        candidate_ids=[torch.tensor(ids, dtype=torch.long, device=device) for ids in candidate_ids],
        answer_starts=starts,
        spelling=spelling,
    )


def answer_ids_of(prompt: Prompt) -> Int[Tensor, " batch"]:
    """The first token of each answer, for what measures the next token.

    Raises InvalidValueError where the prompt carries no answers, or where an answer or candidate begins with a token
    of white space alone, which tells no answer from another.
    """
    if prompt.answer_ids is None:
        raise InvalidValueError("the prompt carries no answers: make it with model.prompt_examples(examples)")
    if prompt.spelling is not None and any(prompt.spelling.blank):
        row = prompt.spelling.blank.index(True)
        assert prompt.answers is not None and prompt.candidates is not None
        raise InvalidValueError(
            f"example {row} of the batch: after the prompt, the answer {prompt.answers[row]!r} or one of its "
            f"candidates {prompt.candidates[row]} begins with a token of white space alone, so the next token does not "
            "tell answers apart. Measure generated answers (mmlens.generated_accuracy), or leave the space out: "
            "model.prompt_examples(examples, answer_start='')"
        )
    return prompt.answer_ids


def answer_start_of(processor: ProcessorMixin, text: str, n_images: int = 0) -> str:
    """The space that the chat template writes between the prompt for an answer and the answer: " ", or "".

    LLaVA's prompts end in "ASSISTANT:", and its assistant's turns are "ASSISTANT: yes": the model goes on with
    " yes". The conversation is rendered with an answer, and what stands before it compared with the end of the
    prompt `text`. A template that writes no assistant's turn is judged by the turns that it writes: where a role's
    colon is followed by a space there, it is before the answer. Whatever else such turns hold (a thought, other
    line breaks) is not in the prompt, and changes nothing: the answer follows the prompt as that stands.
    """
    if not getattr(processor, "chat_template", None) or not text.strip():
        return ""
    asked = _turns(processor, [("user", _ASKED, n_images), ("assistant", _ANSWERED, 0)])
    before = asked.partition(_ANSWERED)[0] if asked.count(_ANSWERED) == 1 else ""
    role, end = before.rstrip().split()[-1:], text.rstrip()
    if role == end.split()[-1:]:
        written = before
    elif end.endswith(":"):
        written = _turns(processor, [("user", _ASKED, 0)]).partition(_ASKED)[0]
        if not written.rstrip().endswith(":"):
            return ""
    else:
        return ""
    spaces, own = written[len(written.rstrip()) :], text[len(end) :]
    return " " if spaces == f"{own} " else ""


_ASKED, _ANSWERED = "QUESTIONGOESHERE", "ANSWERGOESHERE"


def _turns(processor: ProcessorMixin, turns: Sequence[tuple[str, str, int]]) -> str:
    """The chat template's text of a conversation of (role, text, number of images); "" where it takes none such."""
    for listed_parts in (True, False):
        messages = [
            {
                "role": role,
                "content": [{"type": "image"}] * n_images + [{"type": "text", "text": said}]
                if role == "user" or listed_parts
                else said,
            }
            for role, said, n_images in turns
        ]
        try:
            text = processor.apply_chat_template(messages, add_generation_prompt=False, tokenize=False)
        except (TemplateError, ValueError, TypeError, LookupError):
            continue
        if turns[-1][1] in text and "'type': 'text'" not in text:
            return text
    return ""


def respelt(answer: str) -> str:
    """The answer without the space before it, or with one where it has none."""
    return answer.lstrip() if answer[:1].isspace() else f" {answer}"


def _spelt(start: str, answer: str) -> str:
    if not answer.strip():
        raise PromptError(f"an answer or candidate is empty ({answer!r}), so it has no first token")
    return answer if answer[0].isspace() else start + answer


# ---------------------------------------------------------------------- plumbing


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
        image_positions(processor, layout, inputs), inputs["attention_mask"], is_question, per_example
    )


def _first_token_after(processor: ProcessorMixin, text: str, answer: str, *, unknown: bool = False) -> int:
    tokenizer = processor.tokenizer
    encoded = tokenizer(text + answer, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    own = [token for token, (_, last) in zip(ids, offsets, strict=True) if last > len(text)]
    if not own or offsets[len(ids) - len(own)][0] < len(text):
        # The tokenizer would merge the answer's start into the prompt's last token, but the prompt stands as it is.
        own = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not unknown:
        check_known(tokenizer, answer, own)
    return own[0]


def check_known(tokenizer: Any, text: str, ids: Sequence[int]) -> None:
    """Raise PromptError where the tokenizer knows a text only as its token for unknown words."""
    unknown = tokenizer.unk_token
    if unknown is not None and unknown not in text and tokenizer.unk_token_id in ids:
        raise PromptError(
            f"the tokenizer does not know {text!r}, or a word of it: it would be the token {unknown!r}, which stands "
            "for every word that it does not know"
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


_MOST_SHOWN = 4


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
