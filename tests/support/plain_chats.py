"""What plain transformers gives for a chat, and checks that a prompt is that and that its positions say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmlens.model.prompt import Prompt

Chat = list[dict[str, Any]]


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def says(role: str, *parts: dict[str, Any] | str) -> dict[str, Any]:
    """A message whose content is a list of parts; a text stands for a part of it."""
    return {"role": role, "content": [text_part(part) if isinstance(part, str) else part for part in parts]}


def plain_inputs(processor: Any, chats: Sequence[Chat]) -> Mapping[str, Any]:
    """What a user of transformers gets of the chats, padded on the left."""
    prefilled = chats[0][-1]["role"] == "assistant"
    copies = [[dict(message) for message in chat] for chat in chats]
    return processor.apply_chat_template(
        copies if len(chats) > 1 else copies[0],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=not prefilled,
        continue_final_message=prefilled,
        processor_kwargs={"padding": len(chats) > 1, "padding_side": "left"},
    )


def check_equal_inputs(prompt: Prompt, plain: Mapping[str, Any]) -> None:
    """Every input of the prompt is the plain one to the bit, and the plain ones are all there."""
    assert set(prompt.inputs) <= set(plain)
    left_out = set(plain) - set(prompt.inputs) - {"labels"}
    assert not [name for name in left_out if isinstance(plain[name], Tensor)]
    for name, value in prompt.inputs.items():
        if isinstance(value, Tensor):
            assert value.dtype == plain[name].dtype and torch.equal(value, plain[name]), name
        else:
            assert value == plain[name], name


def parts_of(chat: Chat) -> list[tuple[int, int, dict[str, Any]]]:
    """(turn, part, what it is) of every part of a chat; a string is one text."""
    return [
        (turn, number, part)
        for turn, message in enumerate(chat)
        for number, part in enumerate(
            [text_part(message["content"])] if isinstance(message["content"], str) else message["content"]
        )
    ]


def check_positions(processor: Any, prompt: Prompt, chats: Sequence[Chat]) -> None:
    """Every part's positions stand in one piece, in the chat's order, and decode to its text or are its image's."""
    found, ids = prompt.token_map, prompt.inputs["input_ids"]
    for example, chat in enumerate(chats):
        assert list(found.roles[example]) == [message["role"] for message in chat]
        after, images = 0, 0
        for turn, number, part in parts_of(chat):
            own = (found.turn[example] == turn) & (found.part[example] == number)
            if part["type"] == "image" and not bool(found.is_image.any()):
                # Images of Mllama and its like stand beside the text, at no position of it.
                assert not bool(own.any())
                continue
            assert bool(own.any()), (turn, number)
            at = torch.nonzero(own).flatten()
            assert int(at[0]) >= after
            after = int(at[-1]) + 1
            if part["type"] == "text":
                assert not bool((own & found.is_image[example]).any())
                assert (at.diff() == 1).all()
                decoded = processor.tokenizer.decode(ids[example][own])
                # A token that covers an edge of the text belongs to it; templates may trim texts.
                said = part["text"].strip()
                assert said in decoded and len(decoded) <= len(part["text"]) + 2, (turn, number, decoded)
                if len(chats) == 1:
                    assert torch.equal(prompt.positions(turn=turn, part=number)[example], own)
                    inside = prompt.positions(text=said)[example]
                    assert torch.equal(inside, own) or (
                        said != part["text"] and not bool((inside & ~own).any())
                    )
            else:
                assert torch.equal(found.image[example] == images, own & found.is_image[example])
                assert bool((found.image[example] == images).any())
                images += 1
        assert int(found.image[example].max()) == images - 1
        # Each turn's positions are those of its parts; template and padding have neither turn nor part.
        assert torch.equal(found.turn[example] >= 0, found.part[example] >= 0)
        assert not bool(((found.turn[example] >= 0) & found.is_padding[example]).any())
