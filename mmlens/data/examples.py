"""A question about images, or a chat, whose evidence is known, and its plain on-disk format.

A folder of examples holds `examples.jsonl` and the image files that it names; docs/data.md
describes every field. One line:

    {"id": "scene-0", "kind": "objects", "question": "What colour is K", "answer": "red",
     "images": ["images/scene-0.png"], "evidence": [{"image": 0, "box": [16, 0, 48, 32]}],
     "candidates": ["red", "blue"], "group": "scene-0"}

or, in the place of a question, "messages": [{"role": "user", "content": [{"type": "image"}, ...]}].
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from mmlens.arguments import (
    flag,
    folder_to_write,
    instance_of,
    listed,
    path_of,
    shown,
    unknown_name_message,
    whole_number,
)
from mmlens.boxes import Box, box_of, checked_box
from mmlens.data.chats import (
    UNPLACED,
    Chat,
    Message,
    chat_of_example,
    exchanged,
    parts_of,
    question_of,
)
from mmlens.data.images import Images, LateImage, as_rgb, open_image
from mmlens.data.videos import Video
from mmlens.errors import InvalidTypeError, InvalidValueError, MmlensError, UnsupportedError
from mmlens.files import make_folder, parsed_json, path_within, write_text_at_once
from mmlens.token_map import Region, checked_frames, frames_of


@dataclass(frozen=True)
class Evidence:
    """One region that holds the answer: of an image or of a video, all of it or a box.

    `image` counts the prompt's images from 0 (a page is an image, and so is a frame that was given as one), `video` its
    videos; one of the two is given. `frames` is a span (first, stop) of the ORIGINAL video's frames, stop exclusive;
    None: all of them. `box` is (left, top, right, bottom) in pixels of the ORIGINAL image or video, right and bottom
    exclusive; None: the whole.

    >>> Evidence(video=0, frames=(4, 9), box=(0, 0, 32, 32)).frames
    (4, 9)
    >>> Evidence()
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidValueError: evidence is of an image or of a video: Evidence(image, box) or ...
    """

    image: int | None = None
    box: Box | None = None
    video: int | None = None
    frames: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if (self.image is None) == (self.video is None):
            raise InvalidValueError(
                "evidence is of an image or of a video: Evidence(image, box) or Evidence(video=0, frames=(first, "
                f"stop), box=box); got image={self.image!r} and video={self.video!r}"
            )
        for name in ("image", "video"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole_number(name, getattr(self, name), least=0))
        if self.frames is not None:
            if self.video is None:
                raise InvalidValueError(
                    f"frames={self.frames!r} are of a video, and the evidence names an image"
                )
            object.__setattr__(self, "frames", frames_of("frames", self.frames))
        if self.box is not None:
            object.__setattr__(self, "box", box_of("box", self.box))

    @property
    def of_image(self) -> int:
        """`image`, for what reads images alone; UnsupportedError for evidence of a video."""
        if self.image is None:
            raise UnsupportedError(f"this takes evidence of images alone, and {self} is of a video")
        return self.image


@dataclass(frozen=True)
class Example:
    """A question with its images or a chat, its answer, and where in the images the answer stands.

    `messages` is a chat in transformers' format, as `model.prompt` takes it, images in its parts or beside it in
    `images`. Then `images` are those of the whole chat, in order, which evidence counts, and `question` is the text of
    its last user turn, or what is given for it: a text that stands there once. An example without messages is the
    chat of one turn: its images, then its question.

    `kind` names the task; `candidates` are the answers that count as well-formed (empty: any);
    `group` names what must not be split between selection and evaluation, such as a document
    (empty: the example is its own group). An example without evidence is a text-only control.

    Images are PIL images; paths are opened, and a `LateImage` opens when it is used: `images` gives PIL images, each
    opened as it is read (`Images`). Each is turned upright as its EXIF data say, and boxes are pixels of it so; of a
    late image they are checked when it opens. Raises PromptError for what is no image or cannot be shown to a model as
    it is (`open_image`), and for messages that are no chat; InvalidTypeError for another type, and InvalidValueError
    for evidence outside its image, a candidate that stands twice, and an answer that is no candidate.

    >>> Example(question="What colour is K", answer="red", evidence=(Evidence(0),)).evidence[0].box
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidValueError: example '': evidence names image 0, but the example has 0 image(s)
    >>> chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What colour is K?"}]
    >>> Example(messages=chat, answer="red").question
    'What colour is K?'
    """

    question: str = ""
    answer: str = ""
    images: Any = ()
    evidence: tuple[Evidence, ...] = ()
    kind: str = ""
    candidates: tuple[str, ...] = ()
    id: str = ""
    group: str = ""
    metadata: dict[str, Any] = field(default_factory=dict, compare=False)
    messages: Sequence[Message] = ()

    def __post_init__(self) -> None:
        for name in _TEXT_FIELDS:
            instance_of(f"the {name} of an Example", getattr(self, name), str, "a text")
        name = f"example {self.id!r}"
        object.__setattr__(self, "evidence", tuple(regions_of("evidence", self.evidence)))
        self._take_images(name)
        object.__setattr__(self, "candidates", self._checked_candidates(name))
        instance_of("metadata", self.metadata, dict, "a dict")
        for region in self.evidence:
            if region.video is not None:
                _check_of_video(region, self.videos, name)
            elif not 0 <= region.of_image < len(self.images):
                raise InvalidValueError(
                    f"{name}: evidence names image {region.image}, but the example has {len(self.images)} image(s)"
                )

    def _take_images(self, name: str) -> None:
        """Set `images`, `messages` and `question` as they are kept, and check boxes of the images that are open."""
        given: Any = self.images
        images = (
            list(given.given)
            if isinstance(given, Images)
            else listed(f"the images of {name}", given, "a list of images: images=(image,)")
        )
        messages = listed(f"the messages of {name}", self.messages, "a chat: a list of messages")
        question = self.question
        if messages:
            chat = chat_of_example(messages, images, question, name)
            images, messages, question = chat.images, list(chat.messages), question_of(chat)
        else:
            images = [
                image if isinstance(image, LateImage) else open_image(image, f"image {number} of {name}")
                for number, image in enumerate(images)
            ]
        if any(isinstance(image, LateImage) for image in images):
            images = [self._checked_image(number, image) for number, image in enumerate(images)]
            messages = exchanged(messages, images=images) if messages else []
        else:
            for number, image in enumerate(images):
                self._checked_image(number, image)
        for field_name, value in (
            ("images", Images(images)),
            ("messages", tuple(messages)),
            ("question", question),
        ):
            object.__setattr__(self, field_name, value)

    def _checked_image(self, number: int, image: Any) -> Any:
        """The image, once the boxes in it were found to lie in it; a late one is checked when it opens."""
        name = image.name if isinstance(image, LateImage) and image.name != "the image" else ""
        name = name or f"example {self.id!r}, image {number}"
        boxes = [region.box for region in self.evidence if region.image == number and region.box is not None]
        check = functools.partial(_check_boxes, boxes, name)
        if isinstance(image, LateImage):
            return image.checked(name, check)
        check(image.size)
        return image

    def check_images(self) -> None:
        """Check the boxes of late images by their sizes, which reads the headers of their files."""
        for number, size in enumerate(self.images.sizes):
            image = self.images.given[number]
            if isinstance(image, LateImage) and image.check is not None:
                image.check(size)

    @property
    def videos(self) -> tuple[Video, ...]:
        """The videos of its chat, in order."""
        return tuple(Chat(list(self.messages)).videos)

    @property
    def said(self) -> tuple[tuple[str, str, str], ...]:
        """(role, kind, text) of every part of its chat: equal for examples that differ in pixels and answers alone."""
        if self.messages:
            return Chat(list(self.messages)).said
        return (*[("user", "image", "")] * len(self.images), ("user", "text", self.question))

    def _checked_candidates(self, name: str) -> tuple[str, ...]:
        candidates = listed(
            f"the candidates of {name}", self.candidates, "a list of texts, such as ('yes', 'no')"
        )
        seen: dict[str, str] = {}
        for candidate in candidates:
            instance_of(f"a candidate of {name}", candidate, str, "a text")
            if not candidate.strip():
                raise InvalidValueError(f"{name}: a candidate is empty ({candidate!r})")
            if candidate.strip() in seen:
                raise InvalidValueError(
                    f"{name}: {seen[candidate.strip()]!r} and {candidate!r} are one candidate given twice: {candidates}"
                )
            seen[candidate.strip()] = candidate
        if candidates and self.answer not in candidates:
            raise InvalidValueError(
                f"{name}: the answer {self.answer!r} is none of the candidates {candidates}; they are all answers "
                "that count as well-formed, the right one among them"
            )
        return tuple(candidates)


def _check_boxes(boxes: Sequence[Box], where: str, size: tuple[int, int]) -> None:
    for box in boxes:
        checked_box(box, size, where)


def _check_of_video(region: Evidence, videos: Sequence[Video], where: str) -> None:
    """Raise InvalidValueError for evidence of a video, of frames or of pixels that there are not."""
    assert region.video is not None
    if region.video >= len(videos):
        raise InvalidValueError(
            f"{where}: evidence names video {region.video}, but the example has {len(videos)} video(s)"
        )
    video = videos[region.video]
    if region.frames is not None:
        checked_frames(region.frames, video.n_frames, f"{where}, video {region.video}")
    if region.box is not None:
        checked_box(region.box, video.size, f"{where}, video {region.video}")


def regions_of(name: str, value: object) -> list[Any]:
    """A list of `Evidence`; InvalidTypeError for anything else, such as one alone or (image, box) pairs."""
    expected = "a list of Evidence(image, box)"
    if isinstance(value, Evidence):
        raise InvalidTypeError(
            f"{name} is {shown(value)}; expected {expected}: one region is written (Evidence(...),)"
        )
    regions = listed(name, value, expected)
    for at, region in enumerate(regions):
        if not isinstance(region, Region):
            raise InvalidTypeError(
                f"{name}[{at}] is {shown(region)}; expected Evidence(image, box), such as Evidence(0, (0, 0, 9, 9))"
            )
    return regions


def examples_of(value: object, name: str = "examples", *, least: int = 1) -> list[Example]:
    """A list of `least` or more examples, gathered once; InvalidTypeError for anything else.

    >>> examples_of(Example("What?", "x"))
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidTypeError: examples is Example(...; expected a list of Example: one is written [example]
    """
    expected = "a list of Example"
    if isinstance(value, Example):
        raise InvalidTypeError(f"{name} is {shown(value)}; expected {expected}: one is written [example]")
    if hasattr(value, "token_map"):
        raise InvalidTypeError(
            f"{name} is a Prompt; expected {expected} (mmlens.Example, with question, images, answer and evidence), "
            "since a prompt knows no evidence"
        )
    if isinstance(value, (str, os.PathLike)):
        raise InvalidTypeError(
            f"{name} is {shown(value)}; expected {expected}: of a folder they are load_examples(folder)"
        )
    examples = listed(name, value, expected, least=least)
    for at, example in enumerate(examples):
        if not isinstance(example, Example):
            raise InvalidTypeError(
                f"{name}[{at}] is {shown(example)}; expected an mmlens.Example: {name} is {expected}"
            )
    return examples


def chats_of_examples(examples: Sequence[Example]) -> tuple[list[Any], list[list[Image.Image]]]:
    """What `model.prompt` takes of examples: chats or questions, and the images that stand beside them."""
    return (
        [list(each.messages) or each.question for each in examples],
        [[] if each.messages else list(each.images) for each in examples],
    )


class DataError(InvalidValueError):
    """A folder of examples that is missing, empty or not in the documented format."""


_TEXT_FIELDS = ("id", "kind", "question", "answer", "group")
_FIELDS = (*_TEXT_FIELDS, "messages", "images", "evidence", "candidates", "metadata")


def save_examples(examples: Iterable[Example], folder: str | Path) -> Path:
    """Write `examples.jsonl` and the images, as models are shown them (RGB, PNG), to `folder`, and return the folder.

    Raises DataError where two examples share an id, since their images would overwrite each other, where metadata is
    no JSON, and where `folder` is a file.
    """
    examples = examples_of(examples)
    folder = folder_to_write("folder", folder)
    make_folder(folder / "images", DataError)
    lines, seen = [], set()
    for index, example in enumerate(examples):
        name = example.id or f"example-{index}"
        if name in seen:
            raise DataError(f"two examples have the id {name!r}")
        seen.add(name)
        files = []
        for number, image in enumerate(example.images):
            files.append(f"images/{index:06d}-{number}.png")
            as_rgb(image).save(folder / files[-1])
        record = {field: getattr(example, field) for field in _TEXT_FIELDS} | {
            "id": name,
            "images": files,
            "evidence": [
                {
                    name: list(value) if isinstance(value, tuple) else value
                    for name in _REGION_FIELDS
                    if (value := getattr(region, name)) is not None
                }
                for region in example.evidence
            ],
            "candidates": list(example.candidates),
            "metadata": example.metadata,
        }
        if example.messages:
            record["messages"] = _written_messages(example.messages, folder, f"videos/{index:06d}")
        try:
            lines.append(json.dumps(record, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"example {name!r} cannot be written as JSON, its metadata perhaps: {error}"
            ) from error
    write_text_at_once(folder / "examples.jsonl", "\n".join(lines) + "\n")
    return folder


def _written_messages(messages: Sequence[Message], folder: Path, place: str) -> list[dict[str, Any]]:
    """A chat as it is written: its images are those of the field "images", in order, its videos files at `place`."""
    written, n_videos = [], 0
    for message in messages:
        made = {key: value for key, value in message.items() if key != UNPLACED}
        if isinstance(message.get("content"), list):
            made["content"] = []
            for part in parts_of(message):
                if part["type"] == "image":
                    part = {"type": "image"}
                elif part["type"] == "video":
                    part = _written_video(part["video"], folder, f"{place}-{n_videos}")
                    n_videos += 1
                made["content"].append(part)
        written.append(made)
    return written


def _written_video(video: Video, folder: Path, place: str) -> dict[str, Any]:
    """A part with the path of a copy of the video's file, or with those of its frames, which no file would hold as
    they are."""
    if isinstance(video.source, Path):
        name = place + video.source.suffix
        make_folder((folder / name).parent, DataError)
        shutil.copyfile(video.source, folder / name)
        return {"type": "video", "video": name}
    make_folder(folder / place, DataError)
    names = [f"{place}/{number:05d}.png" for number in range(len(video))]
    for name, frame in zip(names, video.source, strict=True):
        Image.fromarray(frame).save(folder / name)
    return {"type": "video", "video": names} | ({} if video.fps is None else {"fps": video.fps})


def load_examples(folder: str | Path, *, images_outside: bool = False) -> list[Example]:
    """Read a folder of examples (docs/data.md).

    Images lie in the folder; `images_outside` allows paths and links that leave it, which a folder from somebody else
    could use to read any image of this machine. Links within one snapshot of the hub's cache are none of those.

    Raises DataError, naming the folder, the line and the field, for a missing folder or file, an empty set, an unknown
    or missing field or one of another type, a key or an id that stands twice, an image that is missing, broken or
    outside, or evidence outside its image. Images open late: of each the header is read here, and what is broken
    further on raises where the image is used.
    """
    flag("images_outside", images_outside)
    path = path_of("folder", folder) / "examples.jsonl"
    if not Path(folder).is_dir():
        raise DataError(f"there is no folder of examples {str(folder)!r}")
    if not path.is_file():
        raise DataError(f"the folder {str(folder)!r} has no examples.jsonl")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {at}: it is not written in UTF-8 ({error})") from error
    examples: list[Example] = []
    numbers: dict[str, int] = {}
    # Lines end at "\n" alone: str.splitlines also cuts at U+2028 and its like, which may stand in a text.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            example = _example(parsed_json(line), Path(folder), images_outside)
            example.check_images()
        except (MmlensError, ValueError, OSError) as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        if example.id and example.id in numbers:
            raise DataError(
                f"{path}, line {number}: the id {example.id!r} is that of line {numbers[example.id]} too"
            )
        numbers[example.id] = number
        examples.append(example)
    if not examples:
        raise DataError(f"{path} holds no example")
    return examples


_REGION_FIELDS = ("image", "video", "frames", "box")


def _example(record: Any, folder: Path, images_outside: bool) -> Example:
    if not isinstance(record, dict):
        raise InvalidValueError(
            f"expected an object with the fields {', '.join(_FIELDS)}, got {type(record).__name__}"
        )
    _check_names("field", record, _FIELDS)
    for name in ("answer",) if record.get("messages") else ("question", "answer"):
        if not _text(name, record.get(name)).strip():
            raise InvalidValueError(f"the field {name!r} must be a non-empty text, got {record[name]!r}")
    messages = [
        _message(f"messages[{i}]", message, folder, images_outside)
        for i, message in enumerate(_list(record, "messages", "messages"))
    ]
    files = [_text(f"images[{i}]", name) for i, name in enumerate(_list(record, "images", "paths"))]
    images = tuple(_late_image(_place(folder, name, images_outside)) for name in files)
    evidence = [
        _region(f"evidence[{i}]", region) for i, region in enumerate(_list(record, "evidence", "regions"))
    ]
    candidates = [
        _text(f"candidates[{i}]", text) for i, text in enumerate(_list(record, "candidates", "texts"))
    ]
    return Example(
        **{name: _text(name, record.get(name, "")) for name in _TEXT_FIELDS},
        images=images,
        evidence=tuple(evidence),
        candidates=tuple(candidates),
        metadata=instance_of("the field 'metadata'", record.get("metadata", {}), dict, "an object"),
        messages=tuple(messages),
    )


def _message(where: str, message: Any, folder: Path, images_outside: bool) -> dict[str, Any]:
    """A message with the images that its parts name by paths; what else it may hold, `Example` says."""
    if not isinstance(message, dict):
        raise InvalidTypeError(
            f'{where} must be a message, {{"role": "user", "content": ...}}, got {_json(message)}'
        )
    content = message.get("content")
    if isinstance(content, str):
        _text(f"{where}.content", content)
    if not isinstance(content, list):
        return message
    parts = []
    for number, part in enumerate(content):
        name = f"{where}.content[{number}]"
        if isinstance(part, dict):
            part = dict(part)
            if isinstance(part.get("text"), str):
                _text(f"{name}.text", part["text"])
            if part.get("type") == "video":
                parts.append(_video_part(part, folder, images_outside))
                continue
            for key in _PATH_KEYS:
                given = part.get(key)
                given = given.get("url") if isinstance(given, dict) else given
                if isinstance(given, str) and not _is_no_path(given):
                    part[key] = _late_image(_place(folder, given.removeprefix("file://"), images_outside))
        parts.append(part)
    return {**message, "content": parts}


def _video_part(part: dict[str, Any], folder: Path, outside: bool) -> dict[str, Any]:
    """A part with its video's path in the folder, or with the paths of its frames."""

    def placed(given: Any) -> Any:
        if not isinstance(given, str) or _is_no_path(given):
            return given
        return _place(folder, given.removeprefix("file://"), outside)

    for key in ("video", "url", "path"):
        given = part.get(key)
        part[key] = list(map(placed, given)) if isinstance(given, list) else placed(given)
    return {key: value for key, value in part.items() if value is not None}


_PATH_KEYS = ("image", "url", "path", "image_url")
"""What parts of messages may call the path of their image."""


def _is_no_path(text: str) -> bool:
    """Whether an image is named by a URL, which is refused, or is written out itself."""
    return text.startswith("data:") or ("://" in text and not text.startswith("file://"))


def _check_names(kind: str, given: Iterable[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise InvalidValueError(unknown_name_message(kind, name, known))


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidTypeError(f"the field {name!r} must be a text, got {_json(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidValueError(f"the field {name!r} holds half a character: {error}") from error
    return value


def _list(record: dict[str, Any], name: str, of: str) -> list[Any]:
    value = record.get(name, [])
    if not isinstance(value, list):
        raise InvalidTypeError(f"the field {name!r} must be a list of {of}, got {_json(value)}")
    return value


def _json(value: Any) -> str:
    """A value as it stands in the file, cut short."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:59] + "..."


def _region(where: str, region: Any) -> Evidence:
    if not isinstance(region, dict):
        raise InvalidTypeError(
            f'{where} must be a region, {{"image": 0}}, {{"image": 0, "box": [left, top, right, bottom]}} or '
            f'{{"video": 0, "frames": [first, stop]}}, got {_json(region)}'
        )
    _check_names(f"field of {where}", region, _REGION_FIELDS)
    if ("image" in region) == ("video" in region):
        raise InvalidValueError(
            f"{where} has no field 'image', or both it and 'video': which of the example's images or videos, counted "
            "from 0"
        )
    fields: dict[str, Any] = {
        name: whole_number(f"the field {name!r} of {where}", region[name], least=0)
        for name in ("image", "video")
        if name in region
    }
    for name, checked in (("frames", frames_of), ("box", box_of)):
        if region.get(name) is not None:
            fields[name] = checked(f"the field {name!r} of {where}", region[name])
    return Evidence(**fields)


def _place(folder: Path, name: str, images_outside: bool) -> Path:
    """Where an image lies; an error where that is outside the folder, symbolic links followed, and not allowed."""
    if images_outside:
        return folder / name
    hint = "; images outside the folder are read with images_outside=True (--images-outside) only"
    try:
        return path_within(folder, name, "an image")
    except InvalidValueError as error:
        target = (folder / name).resolve()
        blobs = _hub_files(folder)
        inside = ".." not in Path(name).parts and not Path(name).is_absolute()
        if inside and blobs is not None and target.is_relative_to(blobs):
            return folder / name
        raise InvalidValueError(f"{error}{hint}") from error


def _hub_files(folder: Path) -> Path | None:
    """Where the hub's cache keeps the files that its snapshots link to, if the folder lies in a snapshot."""
    place = folder.resolve()
    for snapshots in (place, *place.parents):
        if snapshots.name == "snapshots" and "--" in snapshots.parent.name:
            return snapshots.parent / "blobs"
    return None


def _late_image(path: Path) -> LateImage:
    if not path.is_file():
        raise InvalidValueError(f"there is no image {str(path)!r}")
    return LateImage(path)
