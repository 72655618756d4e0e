"""Videos: files, arrays or lists of frames, with their rate; decoded no further than a processor asks."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from mmlens.arguments import listed, shown
from mmlens.arguments import number as real_number
from mmlens.data.images import load_image
from mmlens.errors import MissingFileError, OutOfRangeError, PromptError, UnsupportedError, warn

Frames = UInt8[np.ndarray, "frame height width 3"]

EXPECTED = (
    "the path of a video file, an array [frame, height, width, 3] of whole numbers from 0 to 255, or a list of its "
    "frames"
)

_LIKE_CHANNELS = (1, 3)
"""Heights that transformers takes for a number of colour channels."""


@dataclass(frozen=True, eq=False, repr=False)
class Video:
    """Frames with the rate at which they were taken: of a file, of an array, or of a list of images.

    `fps` is the rate of the frames given, in frames per second; a file knows its own. Many models are told the time of
    every frame, and then a video without a rate is refused. Which frames a model is shown is its processor's choice.
    A file is decoded by the package av (`pip install "mmlens[video]"`), no frame more than the processor asks for.

    Raises PromptError for what is no video (a broken file, one without a video stream, frames of several sizes, a URL:
    nothing is downloaded), MissingFileError (a FileNotFoundError) for a path at which there is no file, and
    UnsupportedError where av is missing.

    >>> clip = Video(np.zeros((6, 32, 48, 3), np.uint8), fps=2)
    >>> clip
    Video(6 frames of 48 x 32 pixels, 2 a second)
    >>> clip.frame(5).size
    (48, 32)
    """

    source: Any
    fps: float | None = None
    where: str = "the video"
    """What errors call it."""
    n_frames: int = field(init=False)
    size: tuple[int, int] = field(init=False)
    """(width, height) of the frames."""

    def __post_init__(self) -> None:
        source, fps = self.source, self.fps
        if isinstance(source, (str, os.PathLike)):
            if fps is not None:
                raise PromptError(
                    f"{self.where}: fps={fps!r} is the rate of frames that are given, and a file knows its own. "
                    "How many frames a second the model is shown is an option of its processor"
                )
            source, fps, n_frames, size = _opened(source, self.where)
        else:
            source = _frames_of(source, self.where)
            fps = None if fps is None else float(real_number(f"fps of {self.where}", fps, above=0))
            n_frames, size = len(source), (source.shape[2], source.shape[1])
        if size[1] in _LIKE_CHANNELS:
            raise PromptError(
                f"{self.where} is {size[0]} x {size[1]} pixels; transformers takes a height of {size[1]} for colours"
            )
        for name, value in (("source", source), ("fps", fps), ("n_frames", n_frames), ("size", size)):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return self.n_frames

    def __repr__(self) -> str:
        rate = "at an unknown rate" if self.fps is None else f"{self.fps:g} a second"
        return f"Video({self.n_frames} frames of {self.size[0]} x {self.size[1]} pixels, {rate})"

    @property
    def duration(self) -> float | None:
        """In seconds; None where the rate is not known."""
        return None if self.fps is None else self.n_frames / self.fps

    @functools.cached_property
    def fingerprint(self) -> str:
        """Two videos with the same fingerprint have the same rate and the same frames."""
        content = self.source.read_bytes() if isinstance(self.source, Path) else self.source.tobytes()
        return f"{self!r} {hashlib.sha256(content).hexdigest()}"

    def read(self, numbers: Sequence[int]) -> Frames:
        """These frames, by their numbers from 0, in this order.

        Raises IndexError for one that there is not, PromptError for a file that has changed.
        """
        numbers = [int(number) for number in numbers]
        for number in numbers:
            if not 0 <= number < self.n_frames:
                raise OutOfRangeError(
                    f"{self.where} has {self.n_frames} frames, 0 to {self.n_frames - 1}; no {number}"
                )
        if not isinstance(self.source, Path):
            return self.source[numbers]
        wanted, found = set(numbers), {}
        with _decoded(self.source, self.where) as (_, _, frames):
            for number, frame in enumerate(frames):
                if number in wanted:
                    found[number] = frame.to_ndarray(format="rgb24")
                if len(found) == len(wanted):
                    break
        if len(found) < len(wanted):
            raise PromptError(f"{self.where} ({self.source}) has fewer frames than when it was opened")
        return np.stack([found[number] for number in numbers])

    def frame(self, number: int) -> Image.Image:
        """One frame, as an image."""
        return Image.fromarray(self.read([number])[0])


def video_of(value: Any, fps: float | None = None, where: str = "the video") -> Video:
    """A Video of whatever a video may be given as; `fps` is the rate of frames that are given. Raises as Video does."""
    if not isinstance(value, Video):
        return Video(value, fps, where)
    if fps is not None and fps != value.fps:
        raise PromptError(f"{where}: fps={fps!r} beside a Video that has its own rate, {value.fps!r}")
    return value


def _frames_of(source: Any, where: str) -> Frames:
    if isinstance(source, Image.Image):
        raise PromptError(f"{where} is a single image; expected {EXPECTED}")
    if isinstance(source, Tensor):
        source = source.detach().cpu().numpy()
    if not isinstance(source, np.ndarray):
        frames = listed(where, source, EXPECTED)
        if not frames:
            raise PromptError(f"{where} has no frame")
        arrays = [
            _checked(np.asarray(frame)[None], f"frame {at} of {where}")[0]
            if isinstance(frame, (np.ndarray, Tensor))
            else np.asarray(load_image(frame, f"frame {at} of {where}"))
            for at, frame in enumerate(frames)
        ]
        sizes = list(dict.fromkeys(f"{array.shape[1]} x {array.shape[0]}" for array in arrays))
        if len(sizes) > 1:
            raise PromptError(f"{where} has frames of {' and of '.join(sizes[:3])} pixels; expected one size")
        return np.stack(arrays)
    return _checked(source, where)


def _checked(array: np.ndarray, where: str) -> Frames:
    if array.ndim != 4 or array.shape[-1] != 3:
        hint = "; the channels come last: array.transpose(0, 2, 3, 1)" if array.shape[1:2] == (3,) else ""
        raise PromptError(f"{where} is an array of the shape {array.shape}; expected {EXPECTED}{hint}")
    if not array.size:
        raise PromptError(f"{where} is empty: an array of the shape {array.shape}")
    if array.dtype == np.uint8:
        return array
    low, high = array.min(), array.max()
    if array.dtype.kind not in "iuf" or not (low >= 0 and high <= 255) or not (array == np.rint(array)).all():
        raise PromptError(
            f"{where} is an array of {array.dtype} with values from {low} to {high}; expected whole numbers from 0 to "
            "255"
        )
    if array.dtype.kind == "f" and high <= 1:
        raise PromptError(
            f"{where} is an array of {array.dtype} from 0 to 1; expected whole numbers from 0 to 255"
        )
    return array.astype(np.uint8)


# ---------------------------------------------------------------------- files


def _opened(path: Any, where: str) -> tuple[Path, float | None, int, tuple[int, int]]:
    """A file, its rate, the number of its frames and their size: every frame is decoded once."""
    if isinstance(path, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path):
        raise PromptError(
            f"{where} is a URL ({shown(path)}), and nothing is downloaded: fetch the file yourself and give its path"
        )
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{where} ({path}) {'is a folder' if path.is_dir() else 'does not exist'}")
    sizes: dict[tuple[int, int], None] = {}
    n_frames = 0
    with _decoded(path, where) as (fps, n_said, frames):
        for frame in frames:
            if frame.rotation % 360:
                raise PromptError(
                    f"{where} ({path}) is to be shown turned by {frame.rotation} degrees, as its file says; turn the "
                    "frames themselves (ffmpeg -i old.mp4 new.mp4)"
                )
            sizes[frame.width, frame.height] = None
            n_frames += 1
    if len(sizes) != 1:
        raise PromptError(
            f"{where} ({path}) has {n_frames} frames of the sizes {list(sizes)}; expected one size"
        )
    if n_frames < n_said:
        warn(
            f"{where} ({path}) says that it has {n_said} frames, of which {n_frames} could be decoded: is it cut off? "
            f"Frames are numbered from 0 to {n_frames - 1} here"
        )
    return path, fps, n_frames, next(iter(sizes))


@contextmanager
def _decoded(path: Path, where: str) -> Iterator[tuple[float | None, int, Iterator[Any]]]:
    """The rate of a file's video, how many frames it says it has (0: nothing), and the frames one after the other."""
    try:
        import av
    except ImportError as error:
        raise UnsupportedError(f"{where} ({path}): reading video files needs av: pip install av") from error
    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.video:
                raise PromptError(f"{where} ({path}) has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = stream.average_rate
            yield float(rate) if rate else None, stream.frames, container.decode(stream)
    except av.FFmpegError as error:
        raise PromptError(f"{where} ({path}) is broken and cannot be decoded ({error})") from error
