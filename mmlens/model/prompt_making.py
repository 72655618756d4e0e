"""Making a prompt of chats by the processor, with the token map that says what is where.

A chat is checked and loaded (`chat`), rendered (`rendering`), made into inputs by the processor, which is watched
meanwhile (`families.watched`), and mapped: every token has its characters in the rendered text, so its turn and part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from mmlens.arguments import shown
from mmlens.data.chats import (
    WAS_TRANSPARENT,
    Chat,
    asked_texts,
    chats_of,
    images_beside,
    question_of,
    rendered_chat,
    videos_beside,
)
from mmlens.data.videos import Video
from mmlens.errors import MmlensError, MmlensWarning, PromptError, UnsupportedError, warn
from mmlens.families.layouts.grids import Layout, SeenVideo, VideoLayout
from mmlens.families.media import media_of, unmapped_message
from mmlens.families.placeholders import (
    drops_alpha,
    image_positions,
    placeholders_of,
    sees_missing_images,
    values_after,
    visual_positions,
)
from mmlens.families.videos import Reader, example_order, reader_of
from mmlens.families.watched import Characters, watched
from mmlens.model.choosing import covered_by
from mmlens.model.fingerprints import processor_fingerprint
from mmlens.model.prompt import Prompt, check_left_padding
from mmlens.model.prompt_options import configured, template_source
from mmlens.model.rendering import Rendered, TextSpan, placeholder_error, render
from mmlens.token_map import NO_PATCH, ImageGrid, TokenMap


class UnknownWordWarning(MmlensWarning):
    """A text of a chat holds a word that the tokenizer does not know."""


def make_prompt(
    processor: ProcessorMixin,
    layout: Layout,
    messages: Any,
    images: Iterable[Any] | None = (),
    *,
    question: str | Sequence[str] | None = None,
    device: torch.device | str | None = None,
    padding_side: Literal["left", "right"] = "left",
    video_layout: VideoLayout | None = None,
    **options: Any,
) -> Prompt:
    """The prompt of a text with its images, of a chat, or of a batch: a list of either with a list of image lists.

    Of a text, the images (PIL images or paths) stand in order before it. Images given beside a chat go to its image
    parts, in order. The processor gets them upright and as RGB: laid over white where they are transparent, as
    transformers does for a PIL image (`open_image` says what is turned and what is refused). `layout` and
    `video_layout` are the family's (mmlens.families.layouts). `options` are variables of the chat template and options
    of the processor.

    Raises PromptError for an empty question or chat, a text that the template drops or alters, image
    placeholders in another number than images, a broken or gigantic image, a processor without chat template
    or fast tokenizer; FileNotFoundError for a path that does not exist; TokenMapError where input_ids hold
    another number of image tokens than the layout predicts; InvalidTypeError for an option that neither the template
    nor the processor knows.
    """
    chats = chats_of(messages, images, question, template_source(processor))
    own, template = configured(processor, options)
    _warn_of_dropped_alpha(own, chats)
    rendered = [render(own, chat, template, f"example {number}") for number, chat in enumerate(chats)]
    layouts = Layouts(layout, video_layout)
    prompt = _assembled(own, layouts, chats, rendered, padding_side, options)
    return prompt if device is None else prompt.to(device)


class Layouts(NamedTuple):
    """How a family lays out the tokens of images, and of videos where that is known."""

    images: Layout
    videos: VideoLayout | None = None


def _assembled(
    processor: ProcessorMixin,
    layouts: Layouts,
    chats: list[Chat],
    rendered: list[Rendered],
    padding_side: str,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Prompt:
    text = [each.text for each in rendered]
    images = [chat.images for chat in chats]
    reader = reader_of(
        processor, layouts.videos, [chat.videos for chat in chats], sum(map(len, images)), options
    )
    encoded, characters, is_image = _called(processor, layouts, chats, text, padding_side, reader)
    marks = [
        _mapped(processor, encoded["input_ids"][row], own, chats[row], rendered[row], is_image[row], row)
        for row, own in enumerate(characters)
    ]
    sizes = [[image.size for image in own] for own in images]
    # Some models take numbers of tiles as lists; what else is no tensor is the processor's own bookkeeping.
    listed = [
        name
        for half in ("image_processor", "video_processor")
        for name in getattr(getattr(processor, half, None), "model_input_names", None) or ()
    ]
    inputs = {name: value for name, value in encoded.items() if isinstance(value, Tensor) or name in listed}
    if sees_missing_images(inputs, list(map(len, images))):
        warn(
            f"the examples of this batch have {list(map(len, images))} images: plain transformers lets what stands "
            "before an example's image look at the padding of those it lacks, so its logits are others than alone; "
            "give batches of equal numbers of images",
            MmlensWarning,
            stacklevel=4,
        )
    if padding_side == "left" and len(text) > 1:
        check_left_padding(inputs["attention_mask"])
    order = [_order(processor, chat, each.text) for chat, each in zip(chats, rendered, strict=True)]
    token_map = _token_map(
        processor,
        layouts,
        inputs,
        is_image,
        sizes,
        torch.stack([each.is_question for each in marks]),
        reader.seen,
        order,
    )
    token_map = token_map.with_parts(
        torch.stack([each.turn for each in marks]),
        torch.stack([each.part for each in marks]),
        [chat.roles for chat in chats],
        [chat.image_places for chat in chats],
        [chat.video_places for chat in chats],
    )
    return Prompt(
        inputs=inputs,
        token_map=token_map,
        questions=[question_of(chat) for chat in chats],
        images=images,
        text=text,
        messages=[chat.messages for chat in chats],
        options=dict(options),
        offsets=torch.from_numpy(np.stack(characters)),
        processor=processor_fingerprint(processor),
        pad_id=processor.tokenizer.pad_token_id,
        values_after=values_after(processor),
    )


def _called(
    processor: ProcessorMixin,
    layouts: Layouts,
    chats: list[Chat],
    text: list[str],
    padding_side: str,
    reader: Reader,
) -> tuple[dict[str, Any], list[Characters], Bool[Tensor, "batch pos"]]:
    """What the processor gives, the characters of each position, and which positions are visual."""
    images = [chat.images for chat in chats]
    # No placeholder is right where the processor writes the images' tokens itself, and only there.
    placeholder = placeholders_of(processor).get("image")
    unplaced = [
        example
        for example, own in enumerate(images)
        if own and (placeholder is None or placeholder not in text[example])
    ]
    try:
        encoded, characters = _process(reader.processor, text, images, padding_side, reader.options)
    except MmlensError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        if unplaced:
            at = unplaced[0]
            raise placeholder_error(processor, text[at], len(images[at]), f"example {at}") from error
        shapes = ", ".join(f"{image.width} x {image.height}" for own in images for image in own) or "none"
        clips = "".join(f", {video!r}" for chat in chats for video in chat.videos)
        raise PromptError(
            f"{type(processor).__name__} takes no such prompt, with {list(map(len, images))} image(s) of {shapes} "
            f"pixels{clips}: {error}"
        ) from error
    is_image = _visual(processor, layouts, encoded)
    for at in unplaced:
        if not bool(is_image[at].any()):
            raise placeholder_error(processor, text[at], len(images[at]), f"example {at}")
    return encoded, characters, is_image


class _Marks(NamedTuple):
    """Of each position of a row: whose text stands there."""

    turn: Int[Tensor, " pos"]
    part: Int[Tensor, " pos"]
    is_question: Bool[Tensor, " pos"]


def _mapped(
    processor: ProcessorMixin,
    ids: Int[Tensor, " pos"],
    characters: Characters,
    chat: Chat,
    rendered: Rendered,
    is_image: Bool[Tensor, " pos"],
    row: int,
) -> _Marks:
    """Which text each position belongs to: a token that covers characters of two, to the first."""
    is_text = ~is_image.numpy()
    spans = sorted(rendered.spans, key=lambda span: span.start)
    # After them one that begins nowhere: of the tokens beyond the last.
    starts, stops, turns, parts = np.array(
        [*((span.start, span.stop, *span.place) for span in spans), (len(rendered.text) + 1, 0, 0, 0)]
    ).T
    first = np.searchsorted(stops[:-1], characters[:, 0], side="right")
    covered = (characters[:, 0] >= 0) & (characters[:, 1] > starts[first]) & is_text
    turn, part = (np.where(covered, of_spans[first], NO_PATCH) for of_spans in (turns, parts))
    n_missing = np.concatenate([[0], np.cumsum(_missing(characters, rendered.text))])
    is_lost = n_missing[stops] > n_missing[np.minimum(starts, len(rendered.text))]
    is_alone = np.bincount(first[covered], minlength=len(starts)) > 0
    for span, lost, alone in zip(spans, is_lost, is_alone, strict=False):
        if lost or not (alone or (covered_by(characters, span.start, span.stop) & is_text).any()):
            raise PromptError(
                f"example {row}: the text of {chat.named(span.place)} was not found among the prompt's tokens; the "
                "processor changed the text after the chat template in a way other than expanding images"
            )
    unknown = ids.numpy() == processor.tokenizer.unk_token_id
    for at in sorted(set(first[covered & unknown].tolist()), reverse=True) if unknown.any() else ():
        _warn_of_unknown_words(processor, characters[unknown], rendered.text, spans[at], row)
    asked = np.zeros(len(ids), dtype=bool)
    for start, stop in _question_spans(chat, rendered):
        asked |= covered_by(characters, start, stop) & is_text
    return _Marks(torch.from_numpy(turn), torch.from_numpy(part), torch.from_numpy(asked))


def _missing(characters: Characters, text: str) -> Bool[np.ndarray, " character"]:
    """Characters that no token stands for, but white space and what tokenizers may leave out."""
    known = characters[characters[:, 0] >= 0]
    steps = [np.bincount(known[:, edge], minlength=len(text) + 1) for edge in range(2)]
    missing = np.cumsum(steps[0] - steps[1])[:-1] == 0
    for at in np.flatnonzero(missing).tolist():
        missing[at] = not text[at].isspace() and text[at].isprintable()
    return missing


def _question_spans(chat: Chat, rendered: Rendered) -> list[tuple[int, int]]:
    """The characters of the question."""
    found = []
    if chat.is_rendered:
        asked = question_of(chat)
        start = rendered.text.index(asked)
        return [(start, start + len(asked))] if asked else []
    for place, said in asked_texts(chat):
        for span in rendered.span_of(place):
            if said is None:
                found.append((span.start, span.stop))
                continue
            start = rendered.text.find(said, span.start, span.stop)
            if start < 0:
                raise PromptError(f"the question {said!r} is not in the prompt: {rendered.text!r}")
            found.append((start, start + len(said)))
    return found


def prompt_from_inputs(
    processor: ProcessorMixin,
    layout: Layout,
    inputs: Mapping[str, Tensor],
    images: Sequence[Any] | None = (),
    *,
    videos: Sequence[Any] | None = (),
    text: str | Sequence[str] | None = None,
    question: str | Sequence[str | None] | None = None,
    video_layout: VideoLayout | None = None,
) -> Prompt:
    """A prompt of inputs that a call of the processor has given, as it is, images and texts included.

    `images` and `videos` are those of the call, for one prompt a list and for a batch a list of lists: boxes are pixels
    of theirs. Which frames of a video were taken, the call says (return_metadata=True), or the call that is made with
    `text`; else it is all of them.
    `text` is what the call was given, for which the processor is called once more, to see that it gives these inputs:
    then the prompt can be made again by corruptions. Without it positions are found in the tokens' own text. `question`
    is a text that stands there once; without it no position is the question's.

    Raises PromptError where a batch is not padded on the left, the question is not there once, or the call gives other
    inputs for this text and these images; TokenMapError where input_ids hold another number of image tokens than the
    layout predicts; UnsupportedError where they hold audio, or a video that is not given or not laid out.
    """
    if not isinstance(inputs, Mapping) or not isinstance(inputs.get("input_ids"), Tensor):
        raise PromptError(
            f"inputs is {shown(inputs)}; expected what a processor gives, with input_ids [batch, pos]"
        )
    ids = inputs["input_ids"]
    layouts, clips = Layouts(layout, video_layout), videos_beside(videos, len(ids))
    mapped = ["video"] if video_layout is not None and any(clips) else []
    image_ids = ids[image_positions(processor, layout, inputs).to(ids.device)]
    held = media_of(processor, image_ids, mapped).held(inputs)
    if held is not None:
        raise UnsupportedError(
            ("" if video_layout is None or mapped else "give the videos of the call too, videos=[...]; ")
            + unmapped_message(held, "a token map")
        )
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    check_left_padding(mask)
    loaded = images_beside(images, len(ids))
    texts = None if text is None else [text] if isinstance(text, str) else list(text)
    questions = [question] * len(ids) if question is None or isinstance(question, str) else list(question)
    for name, given in (("text", texts), ("question", questions)):
        if given is not None and len(given) != len(ids):
            raise PromptError(
                f"{len(given)} {name}(s) for inputs of {len(ids)} prompt(s); expected one for each"
            )
    own = {name: value for name, value in inputs.items() if name != METADATA} | {"attention_mask": mask}
    if texts is None:
        return _unread(processor, layouts, own, loaded, _seen(clips, inputs.get(METADATA)), questions)
    chats = [
        rendered_chat(each, images, shown, asked, f"example {row}")
        for row, (each, images, shown, asked) in enumerate(zip(texts, loaded, clips, questions, strict=True))
    ]
    rendered = [render(processor, chat, {}) for chat in chats]
    again = _assembled(processor, layouts, chats, rendered, "left")
    for name, value in again.inputs.items():
        called_with = inputs.get(name)
        if isinstance(value, Tensor) and isinstance(called_with, Tensor):
            is_same = called_with.shape == value.shape and torch.equal(called_with.to(value), value)
            if not is_same:
                raise PromptError(
                    f"the processor gives other inputs for this text and these images: {name} differs. Give the text "
                    "and the images of the call, and set the options of that call on the processor itself"
                )
    return replace(again, inputs=own).to(ids.device)


METADATA = "video_metadata"
"""What processors say of their videos where they are asked to: no input of a model."""


def _seen(videos: list[list[Video]], metadata: Any) -> list[list[SeenVideo]]:
    """Which frames of each video were taken: what the call says, or all of them."""
    flat = [video for own in videos for video in own]
    said = [None] * len(flat) if metadata is None else list(metadata)
    if len(said) != len(flat):
        raise PromptError(f"the inputs are of {len(said)} video(s), and {len(flat)} were given")
    taken = iter(
        tuple(range(video.n_frames) if numbers is None else map(int, numbers))
        for video, numbers in zip(flat, (getattr(each, "frames_indices", None) for each in said), strict=True)
    )
    return [[SeenVideo(video.size, video.n_frames, next(taken)) for video in own] for own in videos]


def _unread(
    processor: ProcessorMixin,
    layouts: Layouts,
    inputs: dict[str, Any],
    images: list[list[Image.Image]],
    videos: list[list[SeenVideo]],
    questions: Sequence[str | None],
) -> Prompt:
    """The prompt of inputs whose text is known by their tokens alone."""
    ids = inputs["input_ids"]
    for row, (pictures, clips) in enumerate(zip(images, videos, strict=True)):
        if pictures and clips:
            raise PromptError(
                f"example {row} has images and videos, whose order is not known without the text: give text=..., what "
                "the processor's call was given"
            )
    order = [
        ["image"] * len(pictures) + ["video"] * len(clips)
        for pictures, clips in zip(images, videos, strict=True)
    ]
    texts, characters = _written_out(processor, ids, inputs["attention_mask"])
    is_question = torch.zeros(ids.shape, dtype=torch.bool)
    for row, asked in enumerate(questions):
        if asked is not None:
            # Tokenizers of words write a space between any two tokens.
            letters = r"\s*".join(re.escape(letter) for letter in asked if not letter.isspace())
            found = [match.span() for match in re.finditer(letters, texts[row])] if letters else []
            if len(found) != 1:
                raise PromptError(
                    f"the question {asked!r} stands {len(found)} times in the prompt of example {row}, "
                    f"{texts[row]!r}; expected once"
                )
            is_question[row] = torch.from_numpy(covered_by(characters[row], *found[0]))
    sizes = [[image.size for image in own] for own in images]
    is_image = _visual(processor, layouts, inputs)
    seen = [clip for own in videos for clip in own]
    token_map = _token_map(processor, layouts, inputs, is_image, sizes, is_question, seen, order)
    return Prompt(
        inputs=inputs,
        token_map=token_map.to(ids.device),
        questions=[each or "" for each in questions],
        images=images,
        text=texts,
        offsets=torch.from_numpy(np.stack(characters)).to(ids.device),
        processor=processor_fingerprint(processor),
        pad_id=processor.tokenizer.pad_token_id,
        values_after=values_after(processor),
    )


def _written_out(
    processor: ProcessorMixin, ids: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
) -> tuple[list[str], list[Characters]]:
    """The text that the tokens write, one after the other, and the characters of each in it."""
    texts, characters = [], []
    for row, real in zip(ids.tolist(), mask.tolist(), strict=True):
        said, found = "", np.full((len(row), 2), NO_PATCH)
        before: list[int] = []
        pending: list[int] = []
        for at, token in enumerate(row):
            if not real[at]:
                continue
            # A character may be written by several tokens, and the space before a word only after another one.
            pending.append(token)
            written = _decoded(processor, before + pending)
            shown = written.removeprefix(_decoded(processor, before))
            found[at + 1 - len(pending) : at + 1] = len(said), len(said) + len(shown)
            if not written.endswith("\ufffd"):
                said, before, pending = said + shown, pending, []
        said += _decoded(processor, pending)
        texts.append(said)
        characters.append(found)
    return texts, characters


def _decoded(processor: ProcessorMixin, ids: list[int]) -> str:
    return processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False) if ids else ""


def _warn_of_dropped_alpha(processor: ProcessorMixin, chats: list[Chat]) -> None:
    if drops_alpha(processor) and any(
        WAS_TRANSPARENT in image.info for chat in chats for image in chat.images
    ):
        warn(
            f"transparent images were laid over white, as transformers does for other models; plain "
            f"{type(processor).__name__} drops the alpha channel and shows the colours that lie under it",
            MmlensWarning,
            stacklevel=4,
        )


def _process(
    processor: ProcessorMixin,
    text: list[str],
    images: list[list[Image.Image]],
    padding_side: str,
    more: Mapping[str, Any],
) -> tuple[dict[str, Any], list[Characters]]:
    """The processor's output, and the characters of the texts of each position."""
    tokenizer = processor.tokenizer
    if not tokenizer.is_fast:
        raise PromptError(
            f"the tokenizer {type(tokenizer).__name__} gives no offsets, which positions of texts are read from; load "
            "the processor with a fast tokenizer (use_fast=True)"
        )
    if len(text) > 1 and tokenizer.pad_token_id is None:
        raise PromptError(
            "a batch needs padding, but the tokenizer has no pad_token; set tokenizer.pad_token"
        )
    options: dict[str, Any] = {}
    if tokenizer.bos_token and text[0].startswith(tokenizer.bos_token):
        # The template has written the start token; the tokenizer must not add a second one.
        options["add_special_tokens"] = False
    encoded, characters = watched(
        processor,
        text,
        images=images if any(images) else None,
        padding=len(text) > 1,
        padding_side=padding_side,
        return_tensors="pt",
        **options,
        **more,
    )
    # Labels are for training alone.
    return {name: value for name, value in encoded.items() if name != "labels"}, characters


def _token_map(
    processor: ProcessorMixin,
    layouts: Layouts,
    inputs: Mapping[str, Tensor],
    is_image: Bool[Tensor, "batch pos"],
    sizes: Sequence[Sequence[tuple[int, int]]],
    is_question: Bool[Tensor, "batch pos"],
    videos: Sequence[SeenVideo],
    order: Sequence[Sequence[str]],
) -> TokenMap:
    """`order`: the kinds of each example's images and videos as they stand in its text."""
    flat = [size for own in sizes for size in own]
    grids: dict[str, Iterator[ImageGrid]] = {
        "image": iter(layouts.images(processor, inputs, flat) if flat else []),
        "video": iter(layouts.videos(processor, inputs, videos) if layouts.videos and videos else []),
    }
    return TokenMap.from_grids(
        is_image,
        inputs["attention_mask"],
        is_question,
        [[next(grids[kind]) for kind in own] for own in order],
    )


def _visual(
    processor: ProcessorMixin, layouts: Layouts, inputs: Mapping[str, Tensor]
) -> Bool[Tensor, "batch pos"]:
    return visual_positions(processor, layouts.images, inputs, videos=layouts.videos is not None)


def _order(processor: ProcessorMixin, chat: Chat, text: str) -> list[str]:
    """The kinds of the chat's images and videos as they stand in its text."""
    if not chat.videos:
        return ["image"] * len(chat.images)
    found = example_order(text, placeholders_of(processor))
    counts = {"image": len(chat.images), "video": len(chat.videos)}
    if {kind: found.count(kind) for kind in counts} == counts:
        return found
    # Where a processor writes the images itself, there are no videos.
    return ["image"] * counts["image"] + ["video"] * counts["video"]


def _warn_of_unknown_words(
    processor: ProcessorMixin, unknown: Characters, text: str, span: TextSpan, example: int
) -> None:
    """Warn of words of a text part that the tokenizer does not know; `unknown` are the characters of all of the row."""
    tokenizer = processor.tokenizer
    inside = (unknown[:, 0] >= span.start) & (unknown[:, 1] <= span.stop)
    words = [text[start:stop] for start, stop in unknown[inside].tolist()]
    words = [word for word in dict.fromkeys(words) if word != tokenizer.unk_token]
    if words:
        warn(
            f"example {example}: the tokenizer does not know {', '.join(map(repr, words))} in the text "
            f"{text[span.start : span.stop]!r}; the model reads {tokenizer.unk_token!r} there, as for every word that "
            "it does not know",
            UnknownWordWarning,
            stacklevel=6,
        )
