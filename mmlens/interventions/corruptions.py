"""Corruptions: the same prompt with something else in it.

A corruption is a function (model, prompt) -> Prompt. Images and questions are changed before the model's own
processor sees them, for every example of the batch, and answers and candidates stay attached, so that metrics
of the corrupted run are about the clean prompt's answer.

They are in `image_edits` and `question_edits`. `noise_images` acts on embeddings, which no prompt holds: it is an
intervention, (model, prompt) -> hooks.

Two things are checked each time. Every example must have changed in what the model is given, or the corruption
would weaken an effect unseen. And its positions must be what they were (`layout_difference`), as activation
patching needs; `equal_layout=False` lifts that where another image or question may be laid out otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmlens.arguments import (
    flag,
    listed,
    texts,
)
from mmlens.data.chats import Message, exchanged
from mmlens.errors import InvalidValueError, PromptError
from mmlens.interventions.layouts import layout_difference
from mmlens.model.fingerprints import pixel_fingerprints, real_tokens
from mmlens.model.hooked_vlm import HookedVLM, model_of
from mmlens.model.prompt import Prompt, prompt_of
from mmlens.model.prompt_answers import answered

Corruption = Callable[[HookedVLM, Prompt], Prompt]
"""The same prompt with something else in it."""


class CorruptionError(InvalidValueError):
    """A corruption that cannot be made, changes nothing, or changes the layout."""


def corrupted_prompt(
    model: HookedVLM,
    prompt: Prompt,
    *,
    questions: Sequence[str] | None = None,
    images: Sequence[Sequence[Any]] | None = None,
    messages: Sequence[Sequence[Message]] | None = None,
    equal_layout: bool = True,
) -> Prompt:
    """`prompt` made again with other questions, images or chats, one entry per example; for corruptions of your own.

    `messages` are whole chats, as `prompt.messages` holds them, in which `questions` and `images` then take the place
    of the question and of all the images, in order. It goes through the model's processor, with the prompt's own
    options. Answers and candidates are the prompt's own, their first tokens found
    again where the text has changed. Images are encoded where the prompt's were (`HookedVLM.encode_images`).

    Raises CorruptionError where an example's inputs stay what they were, `equal_layout` is set and the layout
    has changed, the number of questions, image lists or chats is not the batch's, a question stands in several
    parts, or the prompt does not hold its chats (`prompt_from_inputs`).
    """
    model_of(model)
    flag("equal_layout", equal_layout)
    before = prompt_of(prompt).continuation
    if before is not None:
        # The same answer after the corrupted prompt.
        plain = corrupted_prompt(
            model, before.prompt, questions=questions, images=images, equal_layout=equal_layout
        )
        longer = plain.continued(before.ids)
        encode = prompt.image_features is not None and plain.image_features is None
        return model.encode_images(longer) if encode else longer
    if questions is not None:
        questions = texts("questions", questions, "one question for each example")
    if images is not None:
        images = listed("images", images, "one list of images for each example")
    if messages is not None:
        messages = listed("messages", messages, "one chat for each example")
    own = messages_of(prompt)
    for name, given in (("question(s)", questions), ("image list(s)", images), ("chat(s)", messages)):
        if given is not None and len(given) != len(prompt):
            raise CorruptionError(f"{len(given)} {name} for a batch of {len(prompt)} example(s)")
    made = _remade(model, prompt, own if messages is None else messages, questions, images)
    difference = layout_difference(prompt, made) if equal_layout else None
    if difference:
        raise CorruptionError(
            f"the corrupted prompt is laid out in another way: {difference}. Activation patching needs equal "
            "layouts; where nothing does, pass equal_layout=False"
        )
    for example in range(len(prompt)):
        unchanged = _unchanged(model, prompt, made, example)
        if unchanged:
            raise CorruptionError(f"the corruption leaves example {example} as it is: {unchanged}")
    made = _answered(model, prompt, made)
    return made if prompt.image_features is None else model.encode_images(made)


def messages_of(prompt: Prompt) -> list[list[Message]]:
    """The chats of a prompt; CorruptionError where it does not hold them."""
    messages = prompt_of(prompt).messages
    if messages is None:
        raise CorruptionError(
            "the prompt does not hold its questions and images, so it cannot be made again: make it with "
            "model.prompt(...) or model.prompt_examples(...), or give model.prompt_from_inputs the text too: text=..."
        )
    return messages


def _remade(
    model: HookedVLM,
    prompt: Prompt,
    messages: Sequence[Sequence[Message]],
    questions: Sequence[str] | None,
    images: Sequence[Sequence[Any]] | None,
) -> Prompt:
    """These chats, with other questions and images, made as the prompt was."""
    chats = []
    for row, own in enumerate(messages):
        asked = None if questions is None else questions[row]
        shown = None if images is None else images[row]
        try:
            chats.append(exchanged(own, question=asked, images=shown))
        except PromptError as error:
            raise CorruptionError(f"example {row}: {error}") from error
    return model.prompt(chats, **prompt.options).to(prompt.token_map.device)


def _unchanged(model: HookedVLM, before: Prompt, after: Prompt, example: int) -> str:
    """Why one example's inputs are what they were; "" where they are not."""
    if real_tokens(before, example) != real_tokens(after, example):
        return ""
    images = [pixel_fingerprints(prompt, example) for prompt in (before, after)]
    if images[0] == images[1]:
        return "no pixel of its images and no token of its question is another"
    pair = [before, after]
    if len(before) > 1 or before.image_features is not None:
        # Families pack the images of a batch in ways of their own; alone, an example's inputs are all there is.
        pair = [model.prompt(messages_of(prompt)[example], **prompt.options) for prompt in pair]
    if _equal_inputs(*(prompt.inputs for prompt in pair)):
        return (
            "pixels were changed, but the processor crops or shrinks the change away before the model sees it"
        )
    return ""


def _equal_inputs(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        for name, value in one.items()
    )


def _answered(model: HookedVLM, before: Prompt, after: Prompt) -> Prompt:
    """`after` with the answers of `before`."""
    names = (
        *("answers", "candidates", "answer_tokens", "candidate_tokens", "start_tokens"),
        *("answer_ids", "candidate_ids", "answer_starts", "spelling"),
    )
    kept = replace(after, **{name: getattr(before, name) for name in names})
    if before.answers is None or before.text == after.text:
        return kept
    candidates = before.candidates or [()] * len(before)
    return answered(kept, model.processor, before.answers, candidates, before.answer_starts)
