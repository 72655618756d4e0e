"""Chats as people write them: every form of images, and what is refused by name."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import record_of, tiny_images, tiny_model, tiny_processor

import mmlens
from mmlens.errors import InvalidTypeError, MmlensWarning, PromptError
from mmlens.interventions import blank_region, evidence_of, other_question
from mmlens.interventions.corruptions import CorruptionError
from mmlens.model.prompt import Prompt
from mmlens.model.prompt_making import make_prompt

torch.set_num_threads(1)

FAMILY = "qwen3_vl"


def prompt_of(messages: Any, images: Any = (), processor: Any = None, **options: Any) -> Prompt:
    return make_prompt(
        processor or tiny_processor(FAMILY), record_of(FAMILY).layout, messages, images, **options
    )


def asked(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


def test_an_image_may_be_given_in_every_form(tmp_path: Path) -> None:
    image = tiny_images(1)[0]
    file = tmp_path / "a.png"
    image.save(file)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    short = prompt_of("What is it?", [image])
    for part in (
        {"type": "image", "image": image},
        {"type": "image", "image": str(file)},
        {"type": "image", "path": file},
        {"type": "image", "url": f"file://{file}"},
        {"type": "image", "image": np.asarray(image)},
        {"type": "image", "base64": data},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"image": image},
    ):
        prompt = prompt_of(asked(part))
        assert all(torch.equal(prompt.inputs[name], short.inputs[name]) for name in short.inputs)
    beside = prompt_of(asked({"type": "image"}), [image])
    assert all(torch.equal(beside.inputs[name], short.inputs[name]) for name in short.inputs)
    assert torch.equal(beside.token_map.is_question, short.token_map.is_question)


def test_the_question_is_the_last_user_turn_or_what_is_marked() -> None:
    processor = tiny_processor(FAMILY)
    chat = [
        {"role": "user", "content": "Is it red?"},
        {"role": "assistant", "content": "No."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Look. "},
                {"type": "text", "text": "What is it? Be brief."},
            ],
        },
    ]

    def question(prompt: Prompt) -> str:
        return processor.tokenizer.decode(prompt.inputs["input_ids"][0][prompt.token_map.is_question[0]])

    assert question(prompt_of(chat, processor=processor)) == "Look. What is it? Be brief."
    marked = prompt_of(chat, question="What is it?", processor=processor)
    assert "What is it?" in question(marked) and "brief" not in question(marked)
    assert marked.questions == ["What is it?"]
    chat[0] = {"role": "user", "content": [{"type": "text", "text": "Is it red?", "question": True}]}
    by_part = prompt_of(chat, processor=processor)
    assert question(by_part) == "Is it red?" and by_part.questions == ["Is it red?"]
    with pytest.raises(PromptError, match="stands 0 times in the chat's last user turn"):
        prompt_of(chat, question="Is it blue?")


def test_a_last_turn_of_the_assistant_is_continued() -> None:
    chat = [*asked(), {"role": "assistant", "content": "It is"}]
    prompt = prompt_of(chat)
    assert prompt.text[0].endswith("assistant\nIt is")
    assert prompt.token_map.roles == (("user", "assistant"),)
    assert int(prompt.positions("assistant").nonzero()[-1, 1]) == prompt.shape[1] - 1


def test_what_is_no_chat_is_refused_by_name() -> None:
    image = tiny_images(1)[0]
    for messages, images, message in (
        ([{"role": "usr", "content": "a"}], (), "example 0, turn 0: .*'usr'.*'user'"),
        (asked({"type": "image"}), (), "part 0 of turn 0 of example 0 is an image part without an image"),
        (asked({"type": "image"}), [image, image], r"2 image\(s\) were given beside the chat, but it has 1"),
        (asked({"type": "img", "img": image}), (), "part 0 of turn 0 of example 0: .*'img'.*'image'"),
        (asked({"type": "image", "url": "https://x.org/a.png"}), (), "is a URL .*nothing is downloaded"),
        (asked({"type": "image_url", "image_url": {"url": "http://x.org/a"}}), (), "is a URL"),
        (asked({"type": "image", "base64": "%%%"}), (), "no valid base64"),
        (asked({"type": "image", "image": image, "path": "a.png"}), (), "holds its image 2 times"),
        (asked(image), (), "is an image; expected {'type': 'image'"),
        ({"role": "user", "content": "a"}, (), "expected a list of messages"),
        ([], (), "the chat, is empty"),
        ([[]], (), "chat 0 is empty"),
        ([[{"role": "user", "content": "a"}], []], (), "chat 1 is empty"),
        ([{"role": "user"}], (), "turn 0: the message has no content"),
        ([{"role": "user", "content": []}], (), "the chat says nothing"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": []}], (), "has no text"),
        ("  ", (), "the question is empty"),
        ([{"role": "user", "content": "a"}], [image], "1 image.* were given, but .* 0 placeholder"),
        (asked({"type": "text", "text": 5}), (), "is 5"),
    ):
        with pytest.raises((PromptError, InvalidTypeError), match=message):
            prompt_of(messages, images)
    with pytest.raises(FileNotFoundError, match=r"part 0 of turn 0 of example 0 \(nowhere.png\)"):
        prompt_of(asked({"type": "image", "image": "nowhere.png"}))
    with pytest.raises(InvalidTypeError, match="'max_pixel'.*'max_pixels'"):
        prompt_of("a", max_pixel=3)


def test_what_a_template_refuses_names_the_turn() -> None:
    processor = tiny_processor(FAMILY)
    alternate = (
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
    )
    start = "{% for message in messages %}"
    processor.chat_template = processor.chat_template.replace(start, start + alternate)
    chat = [*asked(), {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(PromptError, match=r"refuses turn 2 \(role 'assistant'.*roles must alternate"):
        prompt_of(chat, processor=processor)


def test_what_a_template_moves_is_said_and_mapped_where_it_stands() -> None:
    """Images first, as LLaVA's published templates write them."""
    processor = tiny_processor("llava")
    processor.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] if p['type'] == 'image' %}<image>"
        "{% endfor %}{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %} {% endfor %}"
    )
    chat = asked({"type": "text", "text": "Look: "}, {"type": "image", "image": tiny_images(1)[0]})
    with pytest.warns(MmlensWarning, match="image stands where the chat has part 0 of turn 0"):
        prompt = make_prompt(processor, record_of("llava").layout, chat)
    image = int(prompt.positions("image").nonzero()[0, 1])
    assert image < int(prompt.positions(text="Look").nonzero()[0, 1])
    assert prompt.token_map.where(image).part == 1


def test_a_batch_may_mix_chats_and_questions() -> None:
    image = tiny_images(1)[0]
    prompt = prompt_of(["What is it?", asked({"type": "image", "image": image})], padding_side="left")
    assert len(prompt) == 2 and prompt.token_map.roles == (("user",), ("user",))
    assert prompt.token_map.is_image.any(1).tolist() == [False, True]
    alone = prompt_of("What is it?", [Image.fromarray(np.asarray(image))])
    n = alone.shape[1]
    assert torch.equal(prompt.inputs["input_ids"][1, -n:], alone.inputs["input_ids"][0])


def test_inputs_of_the_users_own_call_are_a_full_prompt(micro: mmlens.HookedVLM) -> None:
    """RAM, accuracy and corruptions on them are those of the prompt that the library makes."""
    examples = mmlens.scene_examples("objects", 3, seed=0)
    prompt = micro.prompt_examples(examples)
    call = micro.processor(
        text=prompt.text,
        images=[list(example.images) for example in examples],
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=False,
    )
    expected = mmlens.ram(micro, prompt, progress=False).per_example
    for text in (None, prompt.text):
        own = micro.prompt_from_inputs(dict(call), examples=examples, text=text)
        assert torch.equal(mmlens.ram(micro, own, progress=False).per_example, expected)
        assert mmlens.effect(micro, own, None, mmlens.accuracy, progress=False).mean == 1
    blank = blank_region(evidence_of(examples))
    assert all(
        torch.equal(value, blank(micro, prompt).inputs[name])
        for name, value in blank(micro, own).inputs.items()
    )
    again = other_question(lambda prompt, i: prompt.questions[i].replace("colour", "shape"))
    assert torch.equal(again(micro, own).inputs["input_ids"], again(micro, prompt).inputs["input_ids"])
    unread = micro.prompt_from_inputs(dict(call), examples=examples)
    with pytest.raises(CorruptionError, match="give model.prompt_from_inputs the text too"):
        blank(micro, unread)


def test_options_of_a_model_are_those_of_all_its_prompts() -> None:
    """A thinking model's template, told not to think: for one prompt, or for all."""
    model = mmlens.HookedVLM(tiny_model(FAMILY), tiny_processor(FAMILY))
    thought = "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
    model.processor.chat_template = model.processor.chat_template.replace(
        "assistant\n{% endif %}", "assistant\n" + thought + "{% endif %}"
    )
    assert model.prompt("What?").text[0].endswith("<think>\n")
    assert model.prompt("What?", enable_thinking=False).text[0].endswith("assistant\n")
    model.prompt_options = {"enable_thinking": False}
    example = mmlens.Example("What?", "red")
    assert model.prompt("What?").text == model.prompt_examples([example]).text
    assert model.prompt("What?").text[0].endswith("assistant\n")
    assert model.prompt("What?", enable_thinking=True).text[0].endswith("<think>\n")
