"""Data sets of videos: how a row of each becomes examples."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mmlens.boxes import Box
from mmlens.data.examples import DataError, Evidence, Example
from mmlens.data.images import LateImage
from mmlens.data.published.parts import clipped, example, letters, questions, scaled
from mmlens.data.published.record import EvidenceData, Files
from mmlens.data.videos import Frames, Video
from mmlens.errors import MissingFileError

Row = Mapping[str, Any]


# ------------------------------------------------------------------------------ VidSTG


def read_vidstg(row: Row, files: Files, n_frames: int = 16) -> Iterator[Example]:
    """An example of each question on a video, shown as frames of the segment that it is asked of."""
    path = _video_file(f"{row['vid']}.mp4", files)
    segment, truth = row["used_segment"], row["temporal_gt"]
    # The last frame of a segment belongs to it, that of the truth does not.
    shown = _sampled(segment["begin_fid"], segment["end_fid"] + 1, n_frames)
    shown = _one_within(shown, truth["begin_fid"], truth["end_fid"])
    categories = {each["tid"]: each["category"] for each in row["subject/objects"]}
    relation = "-".join(
        str(row["used_relation"][part]) for part in ("subject_tid", "predicate", "object_tid")
    )
    images = tuple(
        LateImage(functools.partial(_frame, path, tuple(shown), at), f"frame {number} of {path.name}")
        for at, number in enumerate(shown)
    )
    for number, question in questions(row, "questions"):
        target = question["target_id"]
        if target not in categories:
            raise DataError(
                f"question {number} asks for target {target}, which is none of {sorted(categories)}"
            )
        names = [name.replace("_", " ") for name in categories[target].split("/")]
        boxes = _boxes_of(row, target, files, path)
        yield example(
            "vidstg",
            f"{row['vid']}-{segment['begin_fid']}-{relation}-{truth['begin_fid']}-{truth['end_fid']}-{number}",
            question=question["description"].strip(),
            answer=names[0],
            answers=names,
            images=images,
            evidence=tuple(
                Evidence(at, boxes.get(frame))
                for at, frame in enumerate(shown)
                if truth["begin_fid"] <= frame < truth["end_fid"]
            ),
            group=f"VidOR {row['vid']}",
            metadata={"frames": shown, "span": [truth["begin_fid"], truth["end_fid"]], "target": target},
        )


def _video_file(name: str, files: Files) -> Path:
    found = files.find(name)
    if found is None:
        raise MissingFileError(f"there is no video {name!r} in data_dir=, in whatever folder of it")
    return found


def _sampled(first: int, stop: int, n: int) -> list[int]:
    """n numbers of frames in the middle of n equal parts of a span; all of them where there are no more.

    >>> _sampled(0, 100, 4), _sampled(5, 8, 4)
    ([12, 37, 62, 87], [5, 6, 7])
    """
    length = stop - first
    return sorted({first + int((at + 0.5) * length / n) for at in range(n)})


def _one_within(shown: list[int], first: int, stop: int) -> list[int]:
    """The same numbers where one is within a span; else the nearest of them gives way to the middle of the span.

    >>> _one_within([12, 37, 62, 87], 40, 50), _one_within([12, 37], 30, 40)
    ([12, 45, 62, 87], [12, 37])
    """
    if any(first <= frame < stop for frame in shown):
        return shown
    middle = (first + stop) // 2
    nearest = min(range(len(shown)), key=lambda at: abs(shown[at] - middle))
    return sorted([*shown[:nearest], middle, *shown[nearest + 1 :]])


def _frame(path: Path, shown: tuple[int, ...], at: int) -> Image.Image:
    return Image.fromarray(_frames(path, shown)[at])


@functools.lru_cache(maxsize=2)
def _frames(path: Path, shown: tuple[int, ...]) -> Frames:
    """Frames that are used together: a video is decoded from its beginning, whichever of them is asked for."""
    return Video(path).read(shown)


def _boxes_of(row: Row, target: int, files: Files, video: Path) -> dict[int, Box]:
    """The boxes of an object by frame, in pixels, where VidOR's own file of the video is at hand."""
    path = files.find(f"{row['vid']}.json")
    if path is None:
        return {}
    trajectories = json.loads(path.read_text(encoding="utf-8"))["trajectories"]
    size = Video(video).size
    found: dict[int, Box] = {}
    for frame, objects in enumerate(trajectories):
        for each in objects:
            if each["tid"] == target:
                box = [each["bbox"][edge] for edge in ("xmin", "ymin", "xmax", "ymax")]
                inside = clipped(scaled(box, (row["width"], row["height"]), size), size)
                if inside is not None:
                    found[frame] = inside
    return found


VIDSTG = EvidenceData(
    name="vidstg",
    title="VidSTG, questions, as frames",
    hub="",
    splits=("val", "test", "train"),
    files={split: f"annotations/{split}_annotations.json" for split in ("val", "test", "train")},
    columns={
        "vid": "string",
        "width": "int",
        "height": "int",
        "used_segment": "{begin_fid, end_fid}",
        "temporal_gt": "{begin_fid, end_fid}",
        "used_relation": "{subject_tid, predicate, object_tid}",
        "subject/objects": "list of {tid, category}",
        "questions": "list of {description, type, target_id}",
    },
    read=read_vidstg,
    evidence="span of frames (begin_fid to before end_fid); VidOR's trajectories have a box in each",
    group="video",
    licence="none stated; of VidOR's videos their own",
    size="3,996 (val), 4,610 (test) segments of about 1.2 questions, and those of train",
    cite="zhang2020where",
    source="Guaranteer/VidSTG-Dataset @ 6820cb5, README and all rows of val; VidOR's format of trajectories "
    "by its site",
    checked="published rows",
    fetch="git clone https://github.com/Guaranteer/VidSTG-Dataset FOLDER",
    notes="Videos are VidOR's: ID.mp4, in whatever folder of data_dir=. With VidOR's own annotations "
    "(ID.json) there the evidence is the box of the object in each frame of the span, without them, or where "
    "the object has none, the whole frame. n_frames= (16) frames of the segment are shown, one of them within "
    "the span at least. The answer is the category of the object. Of 3,996 segments of val, 180 have no "
    "question and give no example; declarative captions are not read. The last frame of used_segment belongs "
    "to it, that of temporal_gt does not.",
)


# ------------------------------------------------------------------------------ MLVU


def read_mlvu(row: Row, files: Files) -> Iterator[Example]:
    """The example of a question on a long video, with its options."""
    options = list(row["candidates"])
    marks = letters(len(options))
    if row["answer"] not in options:
        raise DataError(f"the answer {row['answer']!r} is none of the candidates {options}")
    lines = [f"({mark}) {option}" for mark, option in zip(marks, options, strict=True)]
    question = "\n".join([row["question"].strip(), *lines])
    name = row["video"]
    yield example(
        "mlvu",
        f"{name}-{row['question']}",
        answer=marks[options.index(row["answer"])],
        candidates=marks,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "video", "video": str(_video_file(name, files))},
                    {"type": "text", "text": question},
                ],
            }
        ],
        group=name,
        metadata={"task": row["question_type"], "option": row["answer"], "duration": row["duration"]},
    )


_MLVU_TASKS = {
    "needle": "2_needle",
    "plotQA": "1_plotQA",
    "ego": "3_ego",
    "count": "4_count",
    "order": "5_order",
    "anomaly_reco": "6_anomaly_reco",
    "topic_reasoning": "7_topic_reasoning",
}

MLVU = EvidenceData(
    name="mlvu",
    title="MLVU, questions with options",
    hub="MLVU/MVLU",
    splits=tuple(_MLVU_TASKS),
    files={task: f"**/{file}.json" for task, file in _MLVU_TASKS.items()},
    columns={
        "video": "string",
        "duration": "float",
        "question": "string",
        "candidates": "list of string",
        "answer": "string",
        "question_type": "string",
    },
    read=read_mlvu,
    one_each=True,
    evidence="none",
    group="video",
    licence="CC BY-NC-SA 4.0",
    size="2,174 questions in the seven tasks with options (355 of needles, 206 of counts); videos of 3 "
    "minutes to 2 hours",
    cite="zhou2024mlvu",
    source="JUNJIE99/MLVU @ fd060c1, 2_needle.json and 4_count.json; the card of MLVU/MVLU",
    checked="published rows",
    notes="Gated. Videos are decoded by av (the extra video). The rows say nothing of the time at which the "
    "answer is seen. Options are marked by letters, and the answer is the letter. Two of the 355 questions of "
    'needles have an answer that is none of their options, and cannot be read: on_error="skip" leaves them '
    "out.",
)
