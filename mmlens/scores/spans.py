"""Spans of a prompt as the authors of other scores take them: marks around images, and choice images as part of the
question."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from mmlens.data.examples import Example
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.prompt import Prompt, prompt_of
from mmlens.model.prompt_making import UnknownWordWarning
from mmlens.token_map import NO_PATCH


def image_marks(model: HookedVLM, prompt: Prompt) -> dict[tuple[int, int], list[int]]:
    """(row, image) -> the positions of the tokens that mark where this image begins and ends, if its family has such.

    A mark is a special token right before an image's first token or right after its last, of a kind that no prompt
    without images has: `<|vision_start|>` and its like, but no token of the chat template.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownWordWarning)
        without_images = model.prompt("N/A", **prompt.options).inputs["input_ids"]
    special = {*model.tokenizer.all_special_ids, *model.tokenizer.added_tokens_decoder}
    kinds = special - set(without_images.flatten().tolist())
    token_map, found = prompt.token_map, {}
    for row, ids in enumerate(prompt.inputs["input_ids"].tolist()):
        images, is_image = token_map.image[row].cpu(), token_map.is_image[row].cpu()
        for image in images[images != NO_PATCH].unique().tolist():
            at = (images == image).nonzero().flatten()
            before, after = int(at[0]) - 1, int(at[-1]) + 1
            # A single token between two images is the end of the first.
            ends_another = before > 0 and bool(is_image[before - 1])
            found[row, image] = [
                place
                for place, is_other in ((before, ends_another), (after, False))
                if 0 <= place < len(ids)
                and ids[place] in kinds
                and not bool(is_image[place])
                and not is_other
            ]
    return found


def marks_of_evidence(
    model: HookedVLM, prompt: Prompt, examples: Sequence[Example]
) -> Bool[Tensor, "batch pos"]:
    """The marks around the images that are evidence as a whole; `examples` are those of the prompt."""
    found = torch.zeros_like(prompt.token_map.is_image)
    marks = image_marks(model, prompt)
    for row, example in enumerate(examples):
        for part in example.evidence:
            if part.image is not None and part.box is None:
                found[row, marks[row, part.image]] = True
    return found


def question_with_images(model: HookedVLM, prompt: Prompt) -> Bool[Tensor, "batch pos"]:
    """From the question's first token to its last, or to the end of the last image that its turn shows after it."""
    token_map, marks = prompt.token_map, image_marks(model, prompt)
    found = token_map.is_question.clone()
    at = torch.arange(found.shape[1], device=found.device)
    for row, asked in enumerate(token_map.is_question):
        if not bool(asked.any()):
            continue
        places = asked.nonzero().flatten()
        first, last = int(places[0]), int(places[-1])
        own_turn = token_map.turn[row] == token_map.turn[row, first]
        shown = token_map.image[row][own_turn & token_map.is_image[row] & (at > first)]
        for image in shown[shown != NO_PATCH].unique().tolist():
            of_image = (token_map.image[row] == image).nonzero().flatten().tolist()
            last = max(last, *of_image, *marks[row, image])
        found[row] = (at >= first) & (at <= last)
    return found


def question_to_end(prompt: Prompt) -> Bool[Tensor, "batch pos"]:
    """From the question's first token to the prompt's last: QRHead's query span, which takes in the template's end.

    It stands where functions take `queries`. (QRHead's own prompt has its instruction right before the question; give
    it as a part of the question.)

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> prompt = model.prompt("What colour is K")
    >>> bool((question_to_end(prompt) >= prompt.positions("question")).all()), bool(question_to_end(prompt)[0, -1])
    (True, True)
    """
    token_map = prompt_of(prompt).token_map
    begun = token_map.is_question.cumsum(-1) > 0
    return begun & ~token_map.is_padding & ~token_map.is_answer
