"""A chat's inputs are, to the bit, what the family's own processor gives for it; and every position says whose it is.

The truth is a processor of its own that mmlens never sees, called as its users call it:
`processor.apply_chat_template(chat, tokenize=True, return_dict=True)`. What stands at a position is held to what its
token ids decode to.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from plain_chats import (
    Chat,
    check_equal_inputs,
    check_positions,
    parts_of,
    plain_inputs,
    says,
    text_part,
)
from tiny import FAMILIES, REPRESENTATIVES, TINY, record_of, tiny_images, tiny_processor

from mmlens.model.prompt import Prompt
from mmlens.model.prompt_making import make_prompt

torch.set_num_threads(1)

CHATS = tuple(name for name in FAMILIES if TINY[name].processor and not TINY[name].most_images)
"""Families whose processor can be built offline and whose template writes a mark for every image."""
WANT_IMAGES = ("paligemma", "got_ocr2", "pp_chart2table")
"""Whose processors themselves refuse text alone."""
UNMARKED = ("idefics",)
"""Whose processors take images between texts, in a list, and no chat template: the short form is all there is."""


def _shapes(family: str) -> dict[str, list[Chat]]:
    """Batches of chats by name. No text stands twice in a chat, nor in another text of it."""
    images = iter(tiny_images(24, seed=3, sizes=TINY[family].sizes or None))

    def image() -> dict[str, Any]:
        return {"type": "image", "image": next(images)}

    system = [says("system", "Answer with one word."), says("user", image(), "What colour is K?")]
    few_shot = [
        says("user", image(), "Which letter?"),
        says("assistant", "It is Q"),
        says("user", image(), "And here?"),
        says("assistant", "seven"),
        says("user", image(), "How many objects are there?"),
    ]
    between = [says("user", "The first page", image(), "and the second", image(), "differ. How?")]
    prefill = [says("user", image(), "What colour is K?"), says("assistant", "The letter is")]
    only_text = [
        says("system", "Be brief."),
        says("user", "Who?"),
        says("assistant", "Me."),
        says("user", "Why?"),
    ]
    shapes = {
        "system": [system],
        "few-shot": [few_shot],
        "text before the image": [[says("user", "Look here:", image(), "What is it?")]],
        "images between texts": [between],
        "prefill": [prefill],
        "several images a turn": [[says("user", image(), image(), image(), "Which page?")]],
        "text only": [only_text],
        "unequal ones": [system, few_shot, only_text, between],
        "prefills": [prefill, [*few_shot, says("assistant", "There are")]],
        "strings": [[{"role": "system", "content": "Be brief."}, says("user", image(), "Who is it?")]],
    }
    if family in WANT_IMAGES:
        del shapes["text only"]
    return shapes


def _prompt(family: str, chats: Sequence[Chat], images: Any = (), **options: Any) -> Prompt:
    given = copy.copy(list(chats)) if len(chats) > 1 else chats[0]
    return make_prompt(tiny_processor(family), record_of(family).layout, given, images, **options)


def check_roles(prompt: Prompt, chats: Sequence[Chat]) -> None:
    """A role's positions are those of its turns, and the template's those of none."""
    found = prompt.token_map
    for role in {message["role"] for chat in chats for message in chat}:
        mask = prompt.positions(role)
        for example, chat in enumerate(chats):
            turns = [turn for turn, message in enumerate(chat) if message["role"] == role]
            expected = torch.isin(found.turn[example], torch.tensor(turns, dtype=found.turn.dtype))
            assert torch.equal(mask[example], expected)
    assert torch.equal(prompt.positions("template"), (found.turn < 0) & ~found.is_padding)
    for example, chat in enumerate(chats):
        turn = max(number for number, message in enumerate(chat) if message["role"] == "user")
        asked = (found.turn[example] == turn) & ~found.is_image[example]
        assert torch.equal(prompt.positions("question")[example], asked)
        assert torch.equal(found.is_question[example], asked)


@pytest.mark.parametrize("family", CHATS)
def test_inputs_are_the_processors_own(family: str) -> None:
    if family in UNMARKED:
        pytest.skip("its processor knows no chats")
    for name, chats in _shapes(family).items():
        plain = plain_inputs(tiny_processor(family), chats)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            prompt = _prompt(family, chats)
        assert not [each for each in caught if "turn" in str(each.message)], name
        check_equal_inputs(prompt, plain)
        check_positions(tiny_processor(family), prompt, chats)
        check_roles(prompt, chats)


def test_at_least_thirty_families_are_held_to_it() -> None:
    assert len(set(CHATS) - set(UNMARKED)) >= 60


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_images_beside_the_messages_are_those_in_them(family: str) -> None:
    """In the order of the parts that hold none, for one chat and for a batch."""
    shapes = _shapes(family)
    for chats in (shapes["few-shot"], shapes["images between texts"], shapes["unequal ones"]):
        images: list[list[Image.Image]] = []
        bare = []
        for chat in chats:
            images.append([part["image"] for _, _, part in parts_of(chat) if part["type"] == "image"])
            bare.append(
                [
                    {
                        "role": message["role"],
                        "content": [
                            {"type": "image"} if part["type"] == "image" else part
                            for part in message["content"]
                        ],
                    }
                    for message in chat
                ]
            )
        beside = _prompt(family, bare, images if len(chats) > 1 else images[0])
        check_equal_inputs(beside, plain_inputs(tiny_processor(family), chats))


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_the_short_form_is_a_chat(family: str) -> None:
    images = tiny_images(3, seed=1)
    prompt = make_prompt(
        tiny_processor(family), record_of(family).layout, ["Who?", "Where?"], [images[:1], images[1:]]
    )
    chats = [
        [{"role": "user", "content": [*({"type": "image", "image": each} for each in own), text_part(asked)]}]
        for asked, own in (("Who?", images[:1]), ("Where?", images[1:]))
    ]
    check_equal_inputs(prompt, plain_inputs(tiny_processor(family), chats))
    check_positions(tiny_processor(family), prompt, chats)
    check_roles(prompt, chats)


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_one_processor_serves_batches_and_single_chats_alike(family: str) -> None:
    """A row of a batch, less its padding, holds the tokens and the map of the chat alone."""
    chats = _shapes(family)["unequal ones"]
    batch = _prompt(family, chats)
    for example, chat in enumerate(chats):
        alone = _prompt(family, [chat])
        real = ~batch.token_map.is_padding[example]
        assert torch.equal(batch.inputs["input_ids"][example][real], alone.inputs["input_ids"][0])
        for name in ("turn", "part", "image", "row", "col", "tile"):
            column = getattr(batch.token_map, name)[example][real]
            assert torch.equal(column, getattr(alone.token_map, name)[0]), name


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_messages_are_left_as_they_were_given(family: str) -> None:
    chats = _shapes(family)["prefills"]
    before = copy.deepcopy(chats)
    _prompt(family, chats)
    assert [[message["role"] for message in chat] for chat in chats] == [
        [message["role"] for message in chat] for chat in before
    ]
    for one, other in zip(chats, before, strict=True):
        for (_, _, part), (_, _, old) in zip(parts_of(one), parts_of(other), strict=True):
            assert part.keys() == old.keys() and part.get("text") == old.get("text")
