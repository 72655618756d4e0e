"""Chats: checked, with every image loaded, in one form, whatever form they were given in.

A chat is a list of messages in transformers' format. Here every part of a message's content is one of

    {"type": "text", "text": ...}            with "question": True, or a text of it, where it is the question
    {"type": "image", "image": PIL image}    or, in an example, a LateImage
    {"type": "video", "video": Video}

and content that was written as a plain text stays one, since chat templates tell the two apart.
"""

from __future__ import annotations

import base64
import binascii
import functools
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from mmlens.arguments import instance_of, listed, shown, unknown_name_message
from mmlens.data.images import LateImage, is_transparent, load_image
from mmlens.data.videos import Video, video_of
from mmlens.errors import PromptError

Message = dict[str, Any]
RENDERED = "rendered"
"""The role of the one message of a chat that is not known: its content is what a chat template made of it."""
ROLES = ("system", "user", "assistant", "tool", "developer")
"""Roles that any chat template may know; others count where the template itself names them."""

KINDS = ("text", "image", "video")
_MEDIA_KEYS = {
    "image": ("image", "url", "path", "base64", "image_url"),
    "video": ("video", "url", "path"),
}
QUESTION = "question"
"""The key that marks a text part as the question: True, or a text that stands in it."""


class Place(NamedTuple):
    """A part of a chat: the message's number, and the part's number in it."""

    turn: int
    part: int

    def __str__(self) -> str:
        return f"part {self.part} of turn {self.turn}"


@dataclass(frozen=True)
class Chat:
    """One chat, checked and loaded."""

    messages: list[Message]

    def parts(self, kind: str | None = None) -> list[tuple[Place, dict[str, Any]]]:
        """Every part (of one kind) with its place, in order; content that is a plain text counts as its part 0."""
        return [entry for entry in self._parts if kind is None or entry[1]["type"] == kind]

    @functools.cached_property
    def _parts(self) -> list[tuple[Place, dict[str, Any]]]:
        return [
            (Place(turn, number), part)
            for turn, message in enumerate(self.messages)
            for number, part in enumerate(parts_of(message))
        ]

    @functools.cached_property
    def images(self) -> list[Any]:
        """The images in order, those that no part places last; in an example they may be late."""
        unplaced = [image for message in self.messages for image in message.get(UNPLACED, ())]
        return [part["image"] for _, part in self.parts("image")] + unplaced

    @property
    def image_places(self) -> list[tuple[int, int]]:
        """(turn, part) of each image; (-1, -1) where no part places it."""
        placed = [(place.turn, place.part) for place, _ in self.parts("image")]
        return placed + [(-1, -1)] * (len(self.images) - len(placed))

    @property
    def videos(self) -> list[Video]:
        unplaced = [video for message in self.messages for video in message.get(UNPLACED_VIDEOS, ())]
        return [part["video"] for _, part in self.parts("video")] + unplaced

    @property
    def video_places(self) -> list[tuple[int, int]]:
        """(turn, part) of each video; (-1, -1) where no part places it."""
        placed = [(place.turn, place.part) for place, _ in self.parts("video")]
        return placed + [(-1, -1)] * (len(self.videos) - len(placed))

    @property
    def roles(self) -> tuple[str, ...]:
        return () if self.is_rendered else tuple(message["role"] for message in self.messages)

    @property
    def is_rendered(self) -> bool:
        """Whether only the rendered text is known, and not the chat."""
        return self.messages[0]["role"] == RENDERED

    @property
    def said(self) -> tuple[tuple[str, str, str], ...]:
        """(role, kind, text) of every part in order: the same for chats that differ in their pixels alone."""
        return tuple(
            (self.messages[place.turn]["role"], part["type"], part.get("text", ""))
            for place, part in self.parts()
        )

    @property
    def is_continued(self) -> bool:
        """Whether the last turn is the beginning of the answer."""
        return self.messages[-1]["role"] == "assistant"

    def named(self, place: Place) -> str:
        return f"{place} ({self.messages[place.turn]['role']})"


def parts_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parts of a message's content; of a plain text one part."""
    content = message.get("content")
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def is_chat(value: object) -> bool:
    """Whether this is one chat: a list of messages."""
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(message, Mapping) and "role" in message for message in value)
    )


def chats_of(
    messages: object,
    images: Iterable[Any] | None,
    question: str | Sequence[str] | None,
    extra_roles: str | None = "",
) -> list[Chat]:
    """The chats that `messages` means: of a text, a chat, or a list of either, with the images given beside them.

    Roles are ROLES, and what stands in quotation marks in `extra_roles`, a chat template; None: any.

    Raises PromptError for what is no chat, and for images in another number than the parts that hold none;
    FileNotFoundError for a path that does not exist.
    """
    given, image_lists = _batch(messages, images)
    questions = [question] * len(given) if question is None or isinstance(question, str) else list(question)
    if len(questions) != len(given):
        raise PromptError(f"{len(questions)} questions for {len(given)} chat(s); expected one for each")
    return [
        _opened(_chat(each, own, asked, f"example {number}", extra_roles))
        for number, (each, own, asked) in enumerate(zip(given, image_lists, questions, strict=True))
    ]


def _opened(chat: Chat) -> Chat:
    """The chat with its late images opened."""
    images = chat.images
    if not any(isinstance(image, LateImage) for image in images):
        return chat
    return Chat(exchanged(chat.messages, images=[load_image(image) for image in images]))


def chat_of_example(messages: Sequence[Any], images: Sequence[Any], question: str, where: str) -> Chat:
    """The chat of an example: with the images beside it, if they are not those in it, and its question marked.

    The chat of an example and its images and question give it again. Raises as `chats_of`.
    """
    if not is_chat(messages):
        raise PromptError(
            f"the messages of {where} are {shown(messages)}; expected a chat: [{{'role': ..., 'content': ...}}]"
        )
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, (list, tuple)) for part in content]
    own = [part.get("image") for part in parts if isinstance(part, Mapping)]
    own += [image for message in messages for image in message.get(UNPLACED, ())]
    held = {id(image) for image in own if image is not None}
    beside = [] if all(id(image) in held for image in images) else list(images)
    chat = _chat(messages, beside, None, where, None)
    return chat if question in ("", question_of(chat)) else _asked(chat, question, where)


# ---------------------------------------------------------------------- one chat or many

_NO_LISTS = (str, bytes, os.PathLike, io.IOBase, Mapping, np.ndarray, Tensor)
"""What can be iterated over and is still no list of images."""


def _batch(messages: Any, images: Any) -> tuple[list[Any], list[list[Any]]]:
    if isinstance(images, (str, os.PathLike, Image.Image, LateImage)):
        raise PromptError(
            f"images is a single {type(images).__name__}; expected a list of images: images=[image]"
        )
    image_list = [] if images is None else listed("images", images, "a list of images")
    nested = [isinstance(entry, Iterable) and not isinstance(entry, _NO_LISTS) for entry in image_list]
    if isinstance(messages, Mapping):
        raise PromptError(
            f"the chat is {shown(messages)}; expected a list of messages: [{{'role': 'user', 'content': ...}}]"
        )
    if isinstance(messages, str) or is_chat(messages):
        if any(nested):
            raise PromptError("one question takes a flat list of images; a batch takes a list of questions")
        return [messages], [image_list]
    expected = "a question or a chat (a list of messages), or a list of them"
    given = listed("questions", messages, expected)
    if not given:
        raise PromptError("there is no question: the list of questions, or the chat, is empty")
    for number, each in enumerate(given):
        if not isinstance(each, str) and not is_chat(each):
            if isinstance(each, (list, tuple)) and not each:
                raise PromptError(f"chat {number} is empty: it has no message")
            instance_of(f"question {number}", each, str, "a text, or a chat: [{'role': ..., 'content': ...}]")
    if not image_list:
        return given, [[] for _ in given]
    if not all(nested) or len(image_list) != len(given):
        raise PromptError(
            f"{len(given)} question(s) take a list of {len(given)} image lists, one per question; "
            f"got {len(image_list)} entries, {sum(nested)} of them lists"
        )
    return given, [
        listed(f"the images of question {number}", own, "a list of images")
        for number, own in enumerate(image_list)
    ]


# ---------------------------------------------------------------------- one chat


def _chat(given: Any, images: list[Any], question: str | None, where: str, extra_roles: str | None) -> Chat:
    beside = iter([(image, f"image {number} of {where}") for number, image in enumerate(images)])
    if isinstance(given, str):
        if not given.strip():
            raise PromptError(f"{where}: the question is empty ({given!r})")
        content: list[dict[str, Any]] = [{"type": "image"}] * len(images)
        given = [{"role": "user", "content": [*content, {"type": "text", "text": given}]}]
    messages = [_message(message, turn, beside, where, extra_roles) for turn, message in enumerate(given)]
    left = list(beside)
    # Where no part says where an image stands, a placeholder in a text may: the rendered prompt will tell.
    unplaced = [image_of(image, name) for image, name in left]
    chat = Chat(messages)
    if unplaced:
        if chat.parts("image"):
            raise PromptError(
                f"{where}: {len(images)} image(s) were given beside the chat, but it has "
                f"{len(images) - len(left)} image part(s) without an image of their own"
            )
        chat = Chat(_with_unplaced(messages, unplaced))
    if not any(message.get("content") for message in messages):
        raise PromptError(f"{where}: the chat says nothing: no message has content")
    if chat.is_continued and not any(part["type"] == "text" for part in parts_of(messages[-1])):
        raise PromptError(
            f"{where}: the last turn is the assistant's, to be continued, and has no text; leave it out, or give the "
            "beginning of the answer"
        )
    return chat if question is None else _asked(chat, question, where)


WAS_TRANSPARENT = "was transparent"
"""Marks an image, in its `info`, that was given transparent and laid over white."""

UNPLACED = "unplaced"
"""The key of images that no part places: placeholders in the chat's own texts do."""
UNPLACED_VIDEOS = "unplaced_videos"
"""The same of videos, in a chat of which only the rendered text is known."""


def images_beside(images: Any, n: int) -> list[list[Image.Image]]:
    """The images of each of `n` prompts, loaded: for one prompt given as a flat list."""
    given = listed(
        "images", () if images is None else images, "a list of images, or one such list for each prompt"
    )
    nested = [isinstance(entry, Iterable) and not isinstance(entry, _NO_LISTS) for entry in given]
    lists = given if n > 1 or any(nested) else [given]
    if not given:
        lists = [[] for _ in range(n)]
    if len(lists) != n or (n > 1 and not all(nested) and given):
        raise PromptError(
            f"{len(given)} entries of images for inputs of {n} prompt(s); expected one list for each"
        )
    return [
        [load_image(image_of(image, f"image {number} of example {row}")) for number, image in enumerate(own)]
        for row, own in enumerate(lists)
    ]


def videos_beside(videos: Any, n: int) -> list[list[Video]]:
    """The videos of each of `n` prompts: for one prompt a flat list, for several a list of lists."""
    expected = "a list of videos" if n == 1 else "a list of videos for each prompt"
    given = listed("videos", () if videos is None else videos, expected)
    lists = [given] if n == 1 else given or [[]] * n
    if len(lists) != n:
        raise PromptError(f"{len(given)} lists of videos for inputs of {n} prompt(s); expected one for each")
    return [
        [
            video_of(video, where=f"video {number} of example {row}")
            for number, video in enumerate(listed(f"the videos of example {row}", own, "a list of videos"))
        ]
        for row, own in enumerate(lists)
    ]


def rendered_chat(
    text: str, images: list[Image.Image], videos: list[Video], question: str | None, where: str
) -> Chat:
    """What stands for a chat of which only the rendered text is known.

    Raises PromptError where the question does not stand in the text once.
    """
    times = 1 if question is None else text.count(question)
    if times != 1 or (question is not None and not question.strip()):
        raise PromptError(
            f"the question {question!r} stands {times} times in the prompt of {where}, {text!r}; expected once"
        )
    said = {"role": RENDERED, "content": text, QUESTION: question}
    return Chat([{**said, UNPLACED: images, UNPLACED_VIDEOS: videos}])


def _with_unplaced(messages: list[Message], images: list[Image.Image]) -> list[Message]:
    return [{**messages[0], UNPLACED: images}, *messages[1:]]


def _message(message: Any, turn: int, beside: Any, where: str, extra_roles: str | None) -> Message:
    name = f"{where}, turn {turn}"
    role = message["role"]
    if role == RENDERED and UNPLACED in message:
        # Of a prompt that was made of inputs, and is made again.
        return dict(message)
    is_known = role in ROLES or extra_roles is None or _is_named(role, extra_roles)
    if not isinstance(role, str) or not is_known:
        raise PromptError(f"{name}: {unknown_name_message('role', role, ROLES)}")
    made = {key: value for key, value in message.items() if key != UNPLACED}
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        made["content"] = [
            _part(part, f"part {number} of turn {turn} of {where}", beside)
            for number, part in enumerate(content)
        ]
    elif content is not None:
        instance_of(f"the content of {name}", content, str, "a text, or a list of parts")
    elif not set(message) - {"role", "content"}:
        raise PromptError(f"{name}: the message has no content")
    if UNPLACED in message:
        made[UNPLACED] = message[UNPLACED]
    return made


def _is_named(role: object, template: str) -> bool:
    return isinstance(role, str) and re.search(rf"['\"]{re.escape(role)}['\"]", template) is not None


def _part(part: Any, name: str, beside: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Image.Image):
        raise PromptError(f"{name} is an image; expected {{'type': 'image', 'image': image}}")
    if not isinstance(part, Mapping):
        raise PromptError(
            f"{name} is {shown(part)}; expected {{'type': 'text', 'text': ...}} or {{'type': 'image', ...}}"
        )
    kind = part.get("type")
    if kind is None:
        kind = next((known for known in KINDS if known in part), None)
    if kind == "image_url":
        kind = "image"
    if kind not in KINDS:
        raise PromptError(f"{name}: {unknown_name_message('type of part', kind, KINDS)}")
    if kind == "text":
        said = instance_of(f"the text of {name}", part.get("text"), str, "a text")
        made = {"type": "text", "text": said}
        if part.get(QUESTION):
            made[QUESTION] = part[QUESTION]
        return made
    given = [part[key] for key in _MEDIA_KEYS[kind] if part.get(key) is not None]
    if len(given) > 1:
        raise PromptError(f"{name} holds its {kind} {len(given)} times; expected it once")
    if kind == "video":
        if not given:
            raise PromptError(f"{name} is a video part without a video: {{'type': 'video', 'video': ...}}")
        return {"type": "video", "video": video_of(given[0], part.get("fps"), name)}
    if given:
        return {"type": "image", "image": image_of(given[0], name, is_base64="base64" in part)}
    image, image_name = next(beside, (beside, ""))
    if image is beside:
        raise PromptError(
            f"{name} is an image part without an image: give it in the part, {{'type': 'image', 'image': image}}, or "
            "beside the chat, images=[...]"
        )
    return {"type": "image", "image": image_of(image, image_name)}


def image_of(value: Any, name: str, *, is_base64: bool = False) -> Any:
    """A PIL image of what stands in an image part: an image, a path, an array, or its data. A late image stays one."""
    if isinstance(value, LateImage):
        return value
    if isinstance(value, Mapping) and "url" in value:
        value = value["url"]
    if isinstance(value, str) and (is_base64 or value.startswith("data:")):
        try:
            data = base64.b64decode(value.rpartition(",")[2], validate=True)
        except (binascii.Error, ValueError) as error:
            raise PromptError(f"{name} is no valid base64 ({error})") from error
        try:
            value = Image.open(io.BytesIO(data))
            value.load()
        except OSError as error:
            raise PromptError(f"{name} is no image that PIL can read ({error})") from error
    loaded = load_image(_no_url(value, name), name)
    if isinstance(value, Image.Image) and is_transparent(value):
        loaded.info[WAS_TRANSPARENT] = True
    return loaded


def _no_url(value: Any, name: str) -> Any:
    if isinstance(value, str) and re.match(r"(https?|ftp|s3|gs)://", value):
        raise PromptError(
            f"{name} is a URL ({value[:80]}), and nothing is downloaded here; load it yourself and give the image, as "
            "in PIL.Image.open(io.BytesIO(requests.get(url).content)), or save it and give the path"
        )
    return value.removeprefix("file://") if isinstance(value, str) else value


def _asked(chat: Chat, question: str, where: str) -> Chat:
    """The chat with the part of its last user turn marked in which the question stands."""
    instance_of(f"the question of {where}", question, str, "a text")
    turn = max((at for at, role in enumerate(chat.roles) if role == "user"), default=None)
    if turn is None:
        raise PromptError(f"{where}: the chat has no user turn, so the question {question!r} stands nowhere")
    message = chat.messages[turn]
    parts = parts_of(message)
    found = [
        at for at, part in enumerate(parts) if part["type"] == "text" and question.strip() in part["text"]
    ]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    times = sum(text.count(question.strip()) for text in texts)
    if not question.strip() or times != 1:
        raise PromptError(
            f"{where}: the question {question!r} stands {times} times in the chat's last user turn, which says "
            f"{texts}; expected once. Mark the part instead: {{'type': 'text', 'text': ..., 'question': True}}"
        )
    marked = [
        {**part, QUESTION: question.strip()} if at == found[0] else part for at, part in enumerate(parts)
    ]
    content: Any = marked
    if isinstance(message["content"], str):
        # A plain text has no part to mark; the message holds the mark.
        return Chat(
            [*chat.messages[:turn], {**message, QUESTION: question.strip()}, *chat.messages[turn + 1 :]]
        )
    return Chat([*chat.messages[:turn], {**message, "content": content}, *chat.messages[turn + 1 :]])


def asked_texts(chat: Chat) -> list[tuple[Place, str | None]]:
    """Where the question stands: places, with the text there, or None for the whole part.

    Parts that are marked, else all text parts of the last user turn.
    """
    marked: list[tuple[Place, str | None]] = []
    for turn, message in enumerate(chat.messages):
        if message.get(QUESTION):
            marked.append((Place(turn, 0), message[QUESTION]))
        for number, part in enumerate(parts_of(message)):
            if part.get(QUESTION):
                marked.append((Place(turn, number), None if part[QUESTION] is True else part[QUESTION]))
    if marked:
        return marked
    turn = max((at for at, role in enumerate(chat.roles) if role == "user"), default=-1)
    return [
        (place, None) for place, part in chat.parts("text") if place.turn == turn and part["text"].strip()
    ]


def question_of(chat: Chat) -> str:
    """The question as a text; "" where the chat asks none."""
    if chat.is_rendered:
        return chat.messages[0][QUESTION] or ""
    texts = {place: part["text"] for place, part in chat.parts("text")}
    return " ".join(texts[place] if said is None else said for place, said in asked_texts(chat))


def with_text(messages: Sequence[Message], turn: int, part: int, text: str) -> list[Message]:
    """A loaded chat with another text in one part's place; a part that holds the question is the question then."""
    message = messages[turn]
    if isinstance(message.get("content"), str):
        changed = {key: value for key, value in message.items() if key != QUESTION} | {"content": text}
    else:
        parts = parts_of(message)
        mark = {QUESTION: True} if parts[part].get(QUESTION) else {}
        parts[part] = {"type": "text", "text": text, **mark}
        changed = {**message, "content": parts}
    return [*messages[:turn], changed, *messages[turn + 1 :]]


def exchanged(
    messages: Sequence[Message], *, question: str | None = None, images: Sequence[Any] | None = None
) -> list[Message]:
    """A loaded chat with another text for its question, or with other images, in order.

    Of a question in several parts the other one has all texts but one, joined by spaces. Raises PromptError where that
    is not so, and for images in another number.
    """
    chat = Chat(list(messages))
    made = list(chat.messages)
    if question is not None and not question.strip():
        raise PromptError(f"the question is empty ({question!r})")
    if question is not None:
        place, said, other = _exchanged_part(chat, question)
        made = _with_text(made, place, said, other)
    if images is not None:
        n_own = len(chat.images)
        if len(images) != n_own:
            raise PromptError(f"{len(images)} image(s) for a chat with {n_own}; expected one for each")
        others = iter(images)
        made = [_with_images(message, others) for message in made]
        made = [
            {**message, UNPLACED: [next(others) for _ in message[UNPLACED]]}
            if UNPLACED in message
            else message
            for message in made
        ]
    return made


def _exchanged_part(chat: Chat, question: str) -> tuple[Place, str | None, str]:
    """Where the question is to be another text, what stands there (None: the whole part), and that other text."""
    places = asked_texts(chat)
    if len(places) == 1:
        return *places[0], question
    whole = {place: part["text"] for place, part in chat.parts("text")}
    texts = [whole[place] if said is None else said for place, said in places]
    found = []
    for number, (place, said) in enumerate(places):
        before = "".join(f"{text} " for text in texts[:number])
        after = "".join(f" {text}" for text in texts[number + 1 :])
        middle = question.removeprefix(before).removesuffix(after)
        if middle.strip() and f"{before}{middle}{after}" == question:
            found.append((place, said, middle))
    if len(found) != 1:
        raise PromptError(
            f"the question of the chat stands in {len(places)} parts, {texts}, and {question!r} is not these, joined "
            "by spaces, with one of them another: mark the part to exchange, "
            "{'type': 'text', 'text': ..., 'question': True}, or take other_text(turn=, part=)"
        )
    return found[0]


def _with_text(messages: list[Message], place: Place, said: str | None, question: str) -> list[Message]:
    message = messages[place.turn]
    parts = parts_of(message)
    whole = parts[place.part]["text"]
    text = question if said is None else whole.replace(said, question)
    mark: dict[str, Any] = {} if said is None else {QUESTION: question}
    if isinstance(message["content"], str):
        changed = {**message, "content": text, **mark}
    else:
        parts[place.part] = {**parts[place.part], "text": text, **mark}
        changed = {**message, "content": parts}
    return [*messages[: place.turn], changed, *messages[place.turn + 1 :]]


def _with_images(message: Message, others: Iterator[Any]) -> Message:
    if not isinstance(message.get("content"), list):
        return message
    parts = [
        {**part, "image": next(others)} if part["type"] == "image" else part for part in message["content"]
    ]
    return {**message, "content": parts}
