"""Examples that hold chats: in Python, on disk, and what tells one from another."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_chats import Chat, says
from tiny import tiny_images

import mmlens
from mmlens.data.chats import QUESTION
from mmlens.data.examples import (
    DataError,
    Evidence,
    Example,
    chats_of_examples,
    load_examples,
    save_examples,
)
from mmlens.data.splits import check_no_repeats, split_examples
from mmlens.errors import InvalidValueError, PromptError
from mmlens.provenance import data_fingerprint

IMAGE = {"type": "image"}
FIRST, SECOND, THIRD = tiny_images(3, seed=0)


def chat(asked: str = "What is gone?") -> Chat:
    return [
        {"role": "system", "content": "Answer with one word."},
        says("user", "Before:", IMAGE, "after:", IMAGE, asked),
    ]


def example(**changes: Any) -> Example:
    options = {"messages": chat(), "images": (FIRST, SECOND), "answer": "cup", "id": "one"}
    return Example(**{**options, "evidence": (Evidence(1, (0, 0, 20, 30)),), **changes})


def same(one: Example, other: Example) -> bool:
    return one == other and one.said == other.said


# ---------------------------------------------------------------------- in Python


def test_images_beside_and_in_the_parts_are_the_same() -> None:
    parts = [dict(part) for part in chat()[1]["content"]]
    parts[1]["image"], parts[3]["image"] = FIRST, np.asarray(SECOND)
    inline = example(messages=[chat()[0], {"role": "user", "content": parts}], images=())
    assert same(inline, example())
    assert [image.size for image in inline.images] == [FIRST.size, SECOND.size]
    given, beside = chats_of_examples([inline, Example("Who?", "K", (THIRD,))])
    assert given[1] == "Who?" and beside == [[], [THIRD]]
    assert [part["type"] for part in given[0][1]["content"]] == ["text", "image", "text", "image", "text"]


def test_the_question_is_the_last_user_turn_s_text_or_what_is_named_in_it() -> None:
    assert example().question == "Before: after: What is gone?"
    named = example(question="What is gone?")
    assert named.question == "What is gone?"
    assert named.messages[1]["content"][-1][QUESTION] == "What is gone?"
    with pytest.raises(PromptError, match="'Who.' stands 0 times in the chat's last user turn"):
        example(question="Who?")


@pytest.mark.parametrize("question", ["", "What is gone?"])
def test_an_example_made_again_of_its_own_fields_is_the_same(question: str) -> None:
    one = example(question=question)
    again = dataclasses.replace(one, answer="plate")
    assert again.messages == one.messages and again.question == one.question and again.images == one.images
    assert same(dataclasses.replace(again, answer="cup"), one)


def test_evidence_counts_the_images_of_the_whole_chat() -> None:
    few_shot = [says("user", IMAGE, "Who?"), says("assistant", "K"), says("user", IMAGE, IMAGE, "And now?")]
    images = (FIRST, SECOND, THIRD)
    made = Example(messages=few_shot, images=images, answer="Q", evidence=(Evidence(2),))
    assert len(made.images) == 3
    with pytest.raises(InvalidValueError, match=r"names image 3, but the example has 3 image\(s\)"):
        dataclasses.replace(made, evidence=(Evidence(3),))
    with pytest.raises(InvalidValueError, match="image 1: the box"):
        dataclasses.replace(made, evidence=(Evidence(1, (0, 0, 41, 10)),))


@pytest.mark.parametrize(
    ("messages", "images", "message"),
    [
        ([{"content": "What?"}], (), "expected a chat"),
        ([{"role": "user", "content": 3}], (), "content of"),
        (chat(), (FIRST,), r"part 3 of turn 1 .* is an image part without an image"),
        (chat(), (FIRST, SECOND, THIRD), r"3 image\(s\) were given beside the chat"),
        ([says("user", {"type": "sound"})], (), "type of part"),
        ([says("user", {"type": "image", "image": "https://example.org/a.png"})], (), "URL"),
        ([says("user")], (), "says nothing"),
    ],
)
def test_what_is_no_chat_is_refused_by_turn_and_part(messages: Any, images: Any, message: str) -> None:
    with pytest.raises((PromptError, mmlens.errors.InvalidTypeError), match=message):
        Example(messages=messages, images=images, answer="x")


def test_examples_that_differ_in_a_turn_alone_are_two() -> None:
    """By content, where they have no id, and in the fingerprint of data."""
    one = example(id="")
    other = example(id="", messages=[{"role": "system", "content": "Be brief."}, chat()[1]])
    assert one.question == other.question and one.images == other.images
    check_no_repeats("selection", [one, other])
    with pytest.raises(InvalidValueError, match="more than once"):
        check_no_repeats("selection", [one, example(id="")])
    assert data_fingerprint([one]) != data_fingerprint([other])
    assert len(split_examples([one, other], 0.5, seed=0)[0]) == 1


# ---------------------------------------------------------------------- on disk


def test_chats_on_disk_come_back(tmp_path: Path) -> None:
    prefilled = [says("user", IMAGE, "Who?"), says("assistant", "It is")]
    examples = [
        example(question="What is gone?", candidates=("cup", "plate")),
        Example(messages=prefilled, images=(THIRD,), answer="K", id="two"),
        Example("What colour?", "red", (FIRST,), id="three"),
        Example(messages=[{"role": "user", "content": "Who?"}], answer="I", id="four"),
    ]
    found = load_examples(save_examples(examples, tmp_path / "chats"))
    assert all(same(late, given) for late, given in zip(found, examples, strict=True))
    assert data_fingerprint(found) == data_fingerprint(examples)
    lines = (tmp_path / "chats" / "examples.jsonl").read_text().splitlines()
    assert (
        "messages" not in json.loads(lines[2]) and json.loads(lines[0])["messages"][1]["content"][1] == IMAGE
    )


def written(folder: Path, record: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, image in (("a.png", FIRST), ("b.png", SECOND)):
        image.save(folder / name)
    (folder / "examples.jsonl").write_text(json.dumps({"answer": "cup", **record}) + "\n")
    return folder


@pytest.mark.parametrize("key", ["image", "path", "url", "image_url"])
def test_parts_may_name_their_images(tmp_path: Path, key: str) -> None:
    parts = [dict(part) for part in chat()[1]["content"]]
    parts[1][key] = "a.png" if key != "image_url" else {"url": "a.png"}
    record = {"messages": [chat()[0], {"role": "user", "content": parts}], "images": ["b.png"]}
    (found,) = load_examples(written(tmp_path / key, record))
    assert found.images == (FIRST, SECOND)


def test_images_of_messages_lie_in_the_folder(tmp_path: Path) -> None:
    THIRD.save(tmp_path / "outside.png")
    message = says("user", {"type": "image", "image": "../outside.png"}, "Who?")
    folder = written(tmp_path / "chats", {"messages": [message]})
    with pytest.raises(DataError, match=r"line 1: .*outside"):
        load_examples(folder)
    assert load_examples(folder, images_outside=True)[0].images == (THIRD,)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("What?", "'messages' must be a list"),
        (["What?"], r"messages\[0\] must be a message"),
        ([{"role": "user", "content": ["What?", 3]}], "part 1 of turn 0"),
        ([says("user", {"type": "image", "image": "c.png"})], "no image"),
        ([says("user", {"type": "image", "url": "https://example.org/a.png"}, "Who?")], "URL"),
        ([{"role": "user", "content": "\ud800"}], "half a character"),
    ],
)
def test_faults_of_messages_are_said_with_their_line(tmp_path: Path, messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"examples.jsonl, line 1: .*{message}"):
        load_examples(written(tmp_path / "chats", {"messages": messages}))
