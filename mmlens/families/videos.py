"""A processor that is given videos, and which of their frames it takes.

Processors choose frames by themselves, some of them by the rate of the video. Here a processor asks a Video for the
frames that it has chosen, so that a long file is never decoded whole, and what it asked for is what the token map says.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from transformers import ProcessorMixin

from mmlens import internals
from mmlens.errors import PromptError, UnsupportedError
from mmlens.families.layouts.grids import SeenVideo, VideoLayout

SAMPLES_IN_ITS_CHATS = ("SmolVLMProcessor",)
"""Processors whose apply_chat_template asks for a number of frames and a rate; called by themselves they take all."""

IMAGES_OR_VIDEOS = {
    "SmolVLMProcessor": "the pixels of the videos would replace those of the images",
    "Glm4vProcessor": "the model takes the positions of both for those of either",
    "Glm46VProcessor": "the model takes the positions of both for those of either",
}
"""Processors of prompts that cannot hold both, and why."""


@runtime_checkable
class Video(Protocol):
    """What a video is, as far as processors read it (`mmlens.data.Video`)."""

    @property
    def fps(self) -> float | None: ...

    @property
    def where(self) -> str: ...

    @property
    def n_frames(self) -> int: ...

    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def duration(self) -> float | None: ...

    def read(self, numbers: Sequence[int]) -> np.ndarray: ...


class Reader(NamedTuple):
    """A processor that takes these `options` for the videos, and writes down what it has taken of them."""

    processor: ProcessorMixin
    options: dict[str, Any]
    taken: dict[str, tuple[int, ...]]
    videos: dict[str, Video]

    @property
    def seen(self) -> list[SeenVideo]:
        """The videos as the processor has seen them, in order."""
        return [
            SeenVideo(video.size, video.n_frames, self.taken[name]) for name, video in self.videos.items()
        ]


def reader_of(
    processor: ProcessorMixin,
    layout: VideoLayout | None,
    videos: Sequence[Sequence[Video]],
    n_images: int,
    options: Collection[str],
) -> Reader:
    """The processor for the videos of each example; `options` are the names of those that the prompt is made with.

    Raises UnsupportedError where it takes no videos, none beside images, or their layout is not known.
    """
    named = {f"video-{number}": video for number, video in enumerate(v for own in videos for v in own)}
    taken: dict[str, tuple[int, ...]] = {}
    if not named:
        return Reader(processor, {}, taken, named)
    name = type(processor).__name__
    if layout is None:
        raise UnsupportedError(
            f"{next(iter(named.values())).where}: how {name} lays out the tokens of a video is not known here, so that "
            "no token map can be made; give the frames as images"
        )
    half: Any = getattr(processor, "video_processor", None)
    half_class: Any = type(half)
    if not isinstance(half, internals.VideoProcessorMixin):
        mend = "" if internals.is_torchvision_available() else ": pip install torchvision"
        raise UnsupportedError(
            f"{next(iter(named.values())).where}: {type(processor).__name__} has no video half here"
            + (f"; it needs torchvision{mend}" if mend else ", and the files of its model hold none")
        )
    if n_images and name in IMAGES_OR_VIDEOS:
        raise UnsupportedError(
            f"{name} takes images or videos in a prompt, not both: {IMAGES_OR_VIDEOS[name]}"
        )
    twin: Any = copy.copy(processor)
    reading: Any = copy.copy(half)
    reading.__class__ = _reading(half_class)
    reading.known, reading.taken = named, taken
    twin.video_processor = reading
    names = iter(named)
    chosen: dict[str, Any] = {"videos": [[next(names) for _ in own] for own in videos]}
    if name in SAMPLES_IN_ITS_CHATS:
        chosen |= {"num_frames": half.num_frames, "fps": half.fps}
    sampled = name in SAMPLES_IN_ITS_CHATS or {"num_frames", "fps"} & set(options)
    if sampled and "do_sample_frames" not in options:
        # As apply_chat_template does: who asks for a number of frames wants them chosen.
        chosen["do_sample_frames"] = True
    for one, other in (("num_frames", "fps"), ("fps", "num_frames")):
        if one in options and other not in options:
            # Halves refuse both, their own default included.
            chosen.setdefault(other, None)
    return Reader(twin, chosen, taken, named)


@functools.cache
def _reading(video_processor_class: type) -> type:
    """The class of a video processor that reads its videos by name from `known`, and notes the frames in `taken`."""

    def fetch_videos(self: Any, names: Any, sample_indices_fn: Any = None) -> Any:
        if isinstance(names, list):
            pairs = [self.fetch_videos(name, sample_indices_fn) for name in names]
            return [list(each) for each in zip(*pairs, strict=True)]
        video = self.known[names]
        metadata = _Metadata(video, type(self).__name__)
        numbers = (
            list(range(video.n_frames)) if sample_indices_fn is None else sample_indices_fn(metadata=metadata)
        )
        metadata.frames_indices = numbers
        self.taken[names] = tuple(int(number) for number in numbers)
        return video.read(self.taken[names]), metadata

    return type(
        video_processor_class.__name__,
        (video_processor_class,),
        {"fetch_videos": fetch_videos, "__module__": video_processor_class.__module__},
    )


class _Metadata(internals.VideoMetadata):
    """What a processor is told of a video; to ask for the rate of one that has none is an error.

    Processors would take 24 frames a second, or 1, and tell the model times that nobody measured.
    """

    def __init__(self, video: Video, asked_by: str) -> None:
        self.video, self.asked_by = video, asked_by
        super().__init__(
            total_num_frames=video.n_frames,
            fps=video.fps,
            width=video.size[0],
            height=video.size[1],
            duration=video.duration,
        )

    @property
    def fps(self) -> float:
        if self.rate is None:
            raise PromptError(
                f"{self.video.where} has no rate, and {self.asked_by} makes the frames' times of it: give it, as in "
                '{"type": "video", "video": frames, "fps": 2} or Video(frames, fps=2)'
            )
        return self.rate

    @fps.setter
    def fps(self, rate: float | None) -> None:
        self.rate = rate


def example_order(text: str, placeholders: Mapping[str, str | None]) -> list[str]:
    """The kinds of media ("image", "video") whose placeholders stand in a rendered prompt, in order.

    >>> example_order("<v> and <i>, <v>", {"image": "<i>", "video": "<v>"})
    ['video', 'image', 'video']
    """
    found = []
    for kind, placeholder in placeholders.items():
        at = text.find(placeholder) if placeholder else -1
        while placeholder and at >= 0:
            found.append((at, kind))
            at = text.find(placeholder, at + len(placeholder))
    return [kind for _, kind in sorted(found)]
