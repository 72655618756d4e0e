"""Positions by name, text, turn, role, image: against the prompt's own tokens, decoded."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tiny import REPRESENTATIVES, record_of, tiny_images, tiny_processor
from torch import Tensor

import mmlens
from mmlens.errors import InvalidValueError, OutOfRangeError
from mmlens.model.prompt import Prompt
from mmlens.model.prompt_making import make_prompt

torch.set_num_threads(1)

CHAT = [
    {"role": "system", "content": [{"type": "text", "text": "You name colours."}]},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "the red car in "},
            {"type": "image"},
            {"type": "text", "text": " and the red car in "},
            {"type": "image"},
            {"type": "text", "text": ": which is which?"},
        ],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "The first."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the red car here?"}]},
]


def chat_of(family: str) -> tuple[Any, Prompt]:
    processor = tiny_processor(family)
    return processor, make_prompt(processor, record_of(family).layout, CHAT, tiny_images(3))


def said(processor: Any, prompt: Prompt, mask: Tensor, row: int = 0) -> str:
    return processor.tokenizer.decode(prompt.inputs["input_ids"][row][mask[row]])


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_a_text_is_found_by_its_occurrence_or_its_turn(family: str) -> None:
    processor, prompt = chat_of(family)
    masks = [prompt.positions(text="the red car", occurrence=number) for number in range(3)]
    assert torch.equal(masks[2], prompt.positions(text="the red car", turn=-1))
    assert torch.equal(masks[1], prompt.positions(text="the red car", turn=1, part=2))
    assert torch.equal(masks[2], prompt.positions("question", text="the red car"))
    assert torch.equal(masks[2], prompt.positions(text="the red car", occurrence=-1))
    assert not bool((masks[0] & masks[1]).any() | (masks[1] & masks[2]).any())
    for mask in masks:
        # A token that covers an edge of the text belongs to it.
        assert "the red car" in said(processor, prompt, mask)
        assert len(said(processor, prompt, mask)) <= len("the red car") + 2
    assert torch.equal(mmlens.positions(text="the red car", turn=-1)(prompt), masks[2])


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_roles_turns_parts_template_and_images_divide_the_prompt(family: str) -> None:
    processor, prompt = chat_of(family)
    assert said(processor, prompt, prompt.positions("system")).strip() == "You name colours."
    assert said(processor, prompt, prompt.positions(role="assistant")).strip() == "The first."
    assert torch.equal(prompt.positions("user"), prompt.positions(turn=1) | prompt.positions(turn=3))
    images = [prompt.positions(image=number) for number in range(3)]
    assert torch.equal(images[2], prompt.positions("image", turn=3))
    assert torch.equal(images[0], prompt.positions("image", turn=1, part=1))
    parts = [prompt.positions(role) for role in ("system", "user", "assistant")]
    whole = torch.stack([*parts, prompt.positions("template")]).int().sum(0)
    assert torch.equal(whole, prompt.positions("prompt").int())
    place = prompt.token_map.where(int(images[2][0].nonzero()[0]))
    assert (place.turn, place.role, place.part, place.image) == (3, "user", 0, 2)
    assert said(processor, prompt, prompt.positions("question")).strip() == "Where is the red car here?"


def test_what_is_not_there_or_twice_shows_where() -> None:
    _, prompt = chat_of("llava")
    with pytest.raises(InvalidValueError, match=r"it stands there 3 times \(0: '.*\[the red car\]"):
        prompt.positions(text="the red car")
    with pytest.raises(InvalidValueError, match=re.escape("it is not there, but 'the red car' is")):
        prompt.positions(text="The  Red car")
    with pytest.raises(InvalidValueError, match="it is not there"):
        prompt.positions("assistant", text="the red car")
    with pytest.raises(OutOfRangeError, match="it stands there 3 time"):
        prompt.positions(text="the red car", occurrence=3)
    with pytest.raises(OutOfRangeError, match=r"the chat has 4 turn\(s\) \(system, user, assistant, user\)"):
        prompt.positions(turn=4)
    with pytest.raises(InvalidValueError, match="role 'usr'.*'user'"):
        prompt.positions(role="usr")
    with pytest.raises(InvalidValueError, match="'questoin'.*'question'"):
        prompt.positions("questoin")
    with pytest.raises(InvalidValueError, match="knows no evidence"):
        prompt.positions("evidence")
    with pytest.raises(InvalidValueError, match="give the text too"):
        prompt.positions(occurrence=0)
    with pytest.raises(InvalidValueError, match="not empty"):
        prompt.positions(text=" ")
    with pytest.raises(TypeError, match="'txt'.*'text'"):
        mmlens.positions(txt="a")


def test_the_words_stand_where_positions_stand(micro: mmlens.HookedVLM) -> None:
    """In an ablation, a knockout and a patch, words are the masks that they name."""
    example = mmlens.scene_examples("objects", 1, seed=0)[0]
    prompt = micro.prompt_examples([example])
    word = example.question.split()[-2]
    for chosen in ("template", "user", "evidence", mmlens.positions("question", text=word)):
        mask = chosen(prompt) if callable(chosen) else prompt.positions(chosen)
        by_word, by_mask = (
            micro.run_with_hooks(prompt, fwd_hooks=mmlens.ablate([(0, 1)], positions=where)(micro, prompt))
            for where in (chosen, mask)
        )
        assert torch.equal(by_word, by_mask)
        one, other = (
            micro.run_with_hooks(prompt, fwd_hooks=mmlens.knockout("last", where)(micro, prompt))
            for where in (chosen, mask)
        )
        assert torch.equal(one, other)
    assert torch.equal(prompt.positions("evidence"), prompt.token_map.evidence(example))
