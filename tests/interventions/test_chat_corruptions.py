"""Corruptions of chats: what was named is exchanged, wherever in the chat it stands, and the rest stays.

The truth is the chat written anew by hand and given to the model.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from PIL import Image
from plain_chats import Chat, says
from tiny import REPRESENTATIVES, tiny_images
from tiny.wrapped import hooked

from mmlens.data.examples import Evidence, Example
from mmlens.errors import MmlensWarning, OutOfRangeError
from mmlens.interventions import (
    CorruptionError,
    blank_region,
    corrupted_prompt,
    evidence_of,
    other_image,
    other_question,
    other_text,
    replace_region,
    swap_regions,
)
from mmlens.model.prompt import Prompt

IMAGES = tiny_images(3, seed=1, sizes=[(64, 48)])
OTHER = tiny_images(1, seed=2, sizes=[(64, 48)])[0]


def few_shot(system: str, shot: str, asked: str, images: list[Image.Image]) -> Chat:
    first, second, third = ({"type": "image", "image": image} for image in images)
    return [
        {"role": "system", "content": system},
        says("user", first, "Which letter?"),
        says("assistant", shot),
        says(
            "user",
            "Of this page",
            second,
            "and that",
            third,
            {"type": "text", "text": asked, "question": True},
        ),
    ]


def examples() -> list[Example]:
    evidence = (Evidence(2, (8, 8, 40, 40)),)
    known = {"candidates": ("seven", "red"), "evidence": evidence}
    return [
        Example(messages=few_shot("Be brief.", "Q", "What is new?", IMAGES), answer="seven", **known),
        Example(messages=few_shot("Be kind.", "seven", "Where?", IMAGES[::-1]), answer="red", **known),
    ]


def changed(chats: list[Chat], turn: int, part: int | None, new: Any) -> list[Chat]:
    """The chats with something else in one place of each."""
    made = []
    for chat in chats:
        other = copy.deepcopy(chat)
        if part is None:
            other[turn]["content"] = new
        elif isinstance(new, str):
            other[turn]["content"][part]["text"] = new
        else:
            other[turn]["content"][part]["image"] = new
        made.append(other)
    return made


def assert_is(made: Prompt, expected: Prompt, clean: Prompt) -> None:
    """The corrupted prompt is the one written by hand, with the clean prompt's answers."""
    assert made.inputs.keys() == expected.inputs.keys()
    for name, value in made.inputs.items():
        assert torch.equal(value, expected.inputs[name]), name
    for name in ("turn", "part", "image", "is_question"):
        assert torch.equal(getattr(made.token_map, name), getattr(expected.token_map, name)), name
    assert made.answers == clean.answers and made.candidates == clean.candidates
    assert torch.equal(made.answer_ids, clean.answer_ids)


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_one_image_of_the_whole_chat(family: str) -> None:
    model, given = hooked(family), examples()
    clean = model.prompt_examples(given)
    chats = [list(example.messages) for example in given]
    made = other_image(OTHER, image=1)(model, clean)
    assert_is(made, model.prompt(changed(chats, 3, 1, OTHER)), clean)
    assert [own[1].tobytes() for own in made.images] == [OTHER.tobytes()] * 2
    for before, after in zip(clean.images, made.images, strict=True):
        assert [before[at].tobytes() == after[at].tobytes() for at in range(3)] == [True, False, True]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_regions_of_images_in_any_turn(family: str) -> None:
    model, given = hooked(family), examples()
    clean = model.prompt_examples(given)
    chats = [list(example.messages) for example in given]

    def edited(number: int, edit: Any) -> list[Chat]:
        turn, part = ((1, 0), (3, 1), (3, 3))[number]
        made = []
        for chat in chats:
            image = chat[turn]["content"][part]["image"].copy()
            edit(image)
            made += changed([chat], turn, part, image)
        return made

    box = (8, 8, 40, 40)
    blanked = blank_region(evidence_of(given), fill="red")(model, clean)
    assert_is(blanked, model.prompt(edited(2, lambda image: image.paste((255, 0, 0), box))), clean)
    put = replace_region(box, OTHER.crop(box), image=0)(model, clean)
    assert_is(put, model.prompt(edited(0, lambda image: image.paste(OTHER.crop(box), box))), clean)
    swapped = swap_regions(Evidence(0, (0, 0, 16, 16)), Evidence(1, (32, 16, 48, 32)))(model, clean)
    for before, after in zip(clean.images, swapped.images, strict=True):
        assert after[0].crop((0, 0, 16, 16)) == before[1].crop((32, 16, 48, 32))
        assert after[1].crop((32, 16, 48, 32)) == before[0].crop((0, 0, 16, 16))
    with pytest.raises(OutOfRangeError, match=r"image 3 of example 0: the example has 3 image\(s\)"):
        blank_region(box, image=3)(model, clean)


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_a_text_of_any_turn(family: str) -> None:
    model, given = hooked(family), examples()
    clean = model.prompt_examples(given)
    chats = [list(example.messages) for example in given]
    free = {"equal_layout": False}
    for turn, part, new in ((0, None, "Be good."), (2, 0, "K"), (3, 2, "with")):
        made = other_text(new, turn=turn, part=part or 0, **free)(model, clean)
        assert_is(made, model.prompt(changed(chats, turn, part, new)), clean)
    asked = other_question("Who?", **free)(model, clean)
    assert_is(asked, model.prompt(changed(chats, 3, 4, "Who?")), clean)
    assert asked.questions == ["Who?", "Who?"]
    last = other_text(lambda prompt, row: f"Who{row}?", turn=-1, part=4, **free)(model, clean)
    assert last.questions == ["Who0?", "Who1?"]
    # What is drawn is laid out alike, and never the text itself.
    drawn = other_text(["Q", "K", "seven pages of it"], turn=2)(model, model.prompt(chats[0]))
    assert drawn.messages[0][2]["content"][0]["text"] == "K"


def test_places_that_are_no_text_are_refused() -> None:
    model = hooked("llava")
    clean = model.prompt_examples(examples())
    with pytest.raises(CorruptionError, match=r"turn 4 of example 0: its chat has 4 turn\(s\)"):
        other_text("K", turn=4)(model, clean)
    with pytest.raises(
        CorruptionError, match=r"part 1 of turn 3 of example 0 is no text; .*'text', 'image', 'text'"
    ):
        other_text("K", turn=3, part=1)(model, clean)
    with pytest.raises(CorruptionError, match="none is laid out in the"):
        other_text(["a long text of many words, longer than any"], turn=2)(model, clean)
    with pytest.raises(CorruptionError, match="leaves example 0 as it is"):
        other_text(lambda prompt, row: prompt.messages[row][2]["content"][0]["text"], turn=2)(model, clean)


def test_a_prompt_of_inputs_has_no_turns_to_exchange() -> None:
    model = hooked("llava")
    made = model.prompt([says("user", "Who is K?")])
    prompt = model.prompt_from_inputs(made.inputs, text=made.text)
    with pytest.raises(CorruptionError, match="made of inputs, whose turns are not known"):
        other_text("K", turn=0)(model, prompt)


def test_a_question_in_several_parts_is_exchanged_by_its_parts() -> None:
    model = hooked("llava")
    image = {"type": "image", "image": IMAGES[0]}
    prompt = model.prompt([says("user", "Look:", image, "Who?")])
    with pytest.raises(CorruptionError, match=r"stands in 2 parts, \['Look:', 'Who\?'\], .*mark the part"):
        other_question("What?")(model, prompt)
    # All but one of the texts stay: then it is clear which is another.
    for other in ("Look: When?", lambda prompt, row: prompt.questions[row].replace("Who", "When")):
        exchanged = other_question(other, equal_layout=False)(model, prompt)
        assert [part.get("text") for part in exchanged.messages[0][0]["content"]] == ["Look:", None, "When?"]
    twice = model.prompt([says("user", "Who", image, "Who?")])
    with pytest.raises(CorruptionError, match="stands in 2 parts"):
        other_question("Who Who Who?")(model, twice)
    made = other_text("When?", turn=0, part=2, equal_layout=False)(model, prompt)
    assert made.questions == ["Look: When?"]


def test_prefilled_chats_and_template_options_are_kept() -> None:
    model = hooked("qwen3_vl")
    template = model.processor.chat_template
    model.processor.chat_template = "{% if be_brief %}Brief!{% endif %}" + template
    image = {"type": "image", "image": IMAGES[0]}
    chat = [says("user", image, "What is it?"), says("assistant", "It is")]
    prompt = model.prompt(chat, be_brief=True)
    made = other_image(OTHER, image=0)(model, prompt)
    assert made.text == prompt.text and made.text[0].startswith("Brief!") and made.text[0].endswith("It is")
    assert other_text("She is", turn=1, equal_layout=False)(model, prompt).text[0].endswith("She is")


def test_chats_of_ones_own_are_corruptions_too() -> None:
    model, given = hooked("llava"), examples()
    clean = model.prompt_examples(given)
    chats = [list(example.messages) for example in given]
    made = corrupted_prompt(model, clean, messages=[chat[1:] for chat in chats], equal_layout=False)
    assert_is(made, model.prompt([chat[1:] for chat in chats]), clean)
    with pytest.raises(CorruptionError, match="laid out in another way"):
        corrupted_prompt(model, clean, messages=[chat[1:] for chat in chats])
    with pytest.raises(CorruptionError, match=r"1 chat\(s\) for a batch of 2"):
        corrupted_prompt(model, clean, messages=chats[:1])


def test_evidence_is_matched_by_the_whole_chat() -> None:
    """Two examples that ask the same of the same images after other turns have their own evidence."""
    model, (one, _) = hooked("llava"), examples()
    chat = few_shot("Be kind.", "Q", "What is new?", IMAGES)
    other = Example(messages=chat, answer="red", evidence=(Evidence(0),))
    where = evidence_of([one, other])
    prompt = model.prompt_examples([dataclasses.replace(other, answer="seven"), one])
    assert [where(prompt, row) for row in range(2)] == [[Evidence(0)], [Evidence(2, (8, 8, 40, 40))]]
    stranger = model.prompt_examples([examples()[1]])
    with pytest.raises(CorruptionError, match="matched by texts and pixels"):
        where(stranger, 0)


def test_draws_do_not_depend_on_the_batch() -> None:
    model, given = hooked("llava"), examples()
    pool = tiny_images(6, seed=9, sizes=[(64, 48)])
    together = other_image(pool, image=1, seed=3)(model, model.prompt_examples(given))
    alone = [other_image(pool, image=1, seed=3)(model, model.prompt_examples([each])) for each in given]
    for row, each in enumerate(alone):
        assert each.images[0][1].tobytes() == together.images[row][1].tobytes()


def test_a_template_that_moves_parts_warns_in_corruptions_as_before() -> None:
    """The corrupted prompt is made as the prompt was, warnings and all."""
    model = hooked("llava")
    moved = (
        "{% for m in messages %}{% for p in m['content'] if p['type'] == 'image' %}<image>{% endfor %}"
        "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}{% endfor %}"
    )
    model.processor.chat_template = moved
    chat = [says("user", "What is", {"type": "image", "image": IMAGES[0]}, "this?")]
    with pytest.warns(MmlensWarning, match="another order"):
        prompt = model.prompt(chat)
    with pytest.warns(MmlensWarning, match="another order"):
        other_image(OTHER)(model, prompt)
