"""Videos of files, arrays and lists of frames."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import made_clip, written_clip
from PIL import Image

from mmlens.data.examples import DataError, Evidence, Example, load_examples, save_examples
from mmlens.data.videos import Video, video_of
from mmlens.errors import MissingFileError, MmlensWarning, PromptError
from mmlens.provenance import data_fingerprint


def test_an_array_a_tensor_and_a_list_of_images_are_the_same_video() -> None:
    frames = made_clip(5, (24, 16))
    given = [frames, torch.as_tensor(frames), list(frames), [Image.fromarray(frame) for frame in frames]]
    videos = [Video(each, fps=5) for each in given]
    for video in videos:
        assert (len(video), video.size, video.fps, video.duration) == (5, (24, 16), 5, 1)
        assert np.array_equal(video.read([4, 0]), frames[[4, 0]])
        assert video.fingerprint == videos[0].fingerprint
    assert Video(frames).duration is None
    assert Video(frames, fps=4).fingerprint != videos[0].fingerprint
    assert video_of(videos[0]) is videos[0]


def test_a_file_is_read_frame_by_frame(tmp_path: Path) -> None:
    pytest.importorskip("av")
    frames = made_clip(13, (64, 48))
    path = written_clip(tmp_path / "clip.mp4", frames, fps=6)
    for given in (path, str(path)):
        video = Video(given)
        assert (len(video), video.size, video.fps) == (13, (64, 48), 6)
        # Its codec loses a little.
        assert np.abs(video.read(range(13)).astype(int) - frames).mean() < 6
        assert np.array_equal(video.read([12, 3, 3]), video.read(range(13))[[12, 3, 3]])
        assert np.abs(np.asarray(video.frame(7)).astype(int) - frames[7]).mean() < 6
    with pytest.raises(IndexError, match="has 13 frames, 0 to 12; no 13"):
        video.read([13])
    with pytest.raises(PromptError, match="a file knows its own"):
        Video(path, fps=2)


def test_what_is_no_video_file_is_refused(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with pytest.raises(MissingFileError, match="does not exist"):
        Video(tmp_path / "none.mp4")
    with pytest.raises(MissingFileError, match="is a folder"):
        Video(tmp_path)
    with pytest.raises(PromptError, match="is a URL .*nothing is downloaded"):
        Video("https://example.org/clip.mp4")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all")
    with pytest.raises(PromptError, match="is broken and cannot be decoded"):
        Video(broken)
    whole = written_clip(tmp_path / "whole.mp4", made_clip(13, (64, 48)), fps=6).read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PromptError, match="is broken and cannot be decoded"):
        Video(broken)
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        samples.sample_rate = 8000
        container.mux(stream.encode(samples))
    with pytest.raises(PromptError, match="has no video stream"):
        Video(sound)


def test_a_file_that_is_cut_off_is_told(tmp_path: Path) -> None:
    pytest.importorskip("av")
    whole = written_clip(tmp_path / "whole.mp4", made_clip(40, (64, 48)), fps=6, movflags="faststart")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: 3 * whole.stat().st_size // 5])
    with pytest.warns(MmlensWarning, match="says that it has 40 frames, of which .* could be decoded"):
        video = Video(cut)
    assert 10 < len(video) < 40


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((5, 3, 8, 8), np.uint8), "the channels come last"),
        (np.zeros((8, 8, 3), np.uint8), "of the shape (8, 8, 3)"),
        (np.zeros((0, 8, 8, 3), np.uint8), "is empty"),
        (np.full((2, 8, 8, 3), 0.5), "whole numbers from 0 to 255"),
        (np.ones((2, 8, 8, 3)), "from 0 to 1"),
        (np.full((2, 8, 8, 3), 300), "values from 300 to 300"),
        ([], "has no frame"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))], "frames of 8 x 8 and of 8 x 9 pixels"),
        (Image.new("RGB", (8, 8)), "a single image"),
        (np.zeros((4, 3, 8, 3), np.uint8), "takes a height of 3 for colours"),
        (5, "a list of its frames"),
    ],
)
def test_what_is_no_list_of_frames_is_refused(given: Any, message: str) -> None:
    with pytest.raises((PromptError, TypeError), match=re.escape(message)):
        Video(given, fps=2)


def test_a_rate_is_a_positive_number() -> None:
    for fps in (0, -1, float("nan")):
        with pytest.raises((ValueError, TypeError), match="fps of the video"):
            Video(made_clip(2, (8, 8)), fps=fps)
    with pytest.raises(PromptError, match="a Video that has its own rate"):
        video_of(Video(made_clip(2, (8, 8)), fps=2), fps=3)


def _with_videos(*videos: Video, frames: tuple[int, int] = (1, 3), **more: Any) -> Example:
    parts = [{"type": "video", "video": video} for video in videos]
    chat = [{"role": "user", "content": [*parts, {"type": "text", "text": "What is seen?"}]}]
    return Example(messages=chat, answer="a cat", evidence=(Evidence(video=0, frames=frames),), **more)


def test_an_example_holds_videos_on_disk_too(tmp_path: Path) -> None:
    pytest.importorskip("av")
    frames = made_clip(5, (64, 48))
    of_file = Video(written_clip(tmp_path / "clip.mp4", frames, fps=6))
    examples = [
        _with_videos(Video(frames, fps=2), of_file, id="a"),
        _with_videos(Video(frames), id="b"),
    ]
    folder = save_examples(examples, tmp_path / "examples")
    for given, read in zip(examples, load_examples(folder), strict=True):
        assert read.evidence == given.evidence and read.said == given.said
        assert [video.fingerprint for video in read.videos] == [video.fingerprint for video in given.videos]
    assert data_fingerprint(load_examples(folder)) == data_fingerprint(examples)
    other = [_with_videos(Video(frames[::-1].copy(), fps=2), of_file, id="a"), examples[1]]
    assert data_fingerprint(other) != data_fingerprint(examples)
    # A folder from somebody else reads no file outside it.
    line = (folder / "examples.jsonl").read_text().replace("videos/000000-1.mp4", str(tmp_path / "clip.mp4"))
    (folder / "examples.jsonl").write_text(line)
    with pytest.raises(DataError, match="line 1.*outside"):
        load_examples(folder)
    assert len(load_examples(folder, images_outside=True)) == 2


def test_evidence_of_a_video_lies_within_it() -> None:
    video = Video(made_clip(5, (64, 48)), fps=2)
    with pytest.raises(ValueError, match="end after the last of its 5 frames"):
        _with_videos(video, frames=(2, 6))
    with pytest.raises(ValueError, match=re.escape("names video 0, but the example has 0 video(s)")):
        Example(question="What?", answer="x", evidence=(Evidence(video=0),))
    with pytest.raises(ValueError, match="of an image or of a video"):
        Evidence(0, video=0)
    with pytest.raises(ValueError, match="are of a video"):
        Evidence(0, frames=(0, 1))
    with pytest.raises(NotImplementedError, match="evidence of images alone"):
        _ = Evidence(video=0).of_image
