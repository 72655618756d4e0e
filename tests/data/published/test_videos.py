"""Data sets of videos: made-up rows of the published columns, read by name from a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from clips import written_clip
from published_files import write_json

from mmlens import Evidence
from mmlens.data.examples import DataError
from mmlens.data.published.loading import load_data


@pytest.fixture(autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def grey(path: Path, n: int = 40) -> None:
    """A video of 96 x 64 pixels whose frame i has the grey 6 * i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.repeat(6 * np.arange(n, dtype=np.uint8), 64 * 96 * 3).reshape(n, 64, 96, 3)
    written_clip(path, frames, fps=10)


def row(**changed: Any) -> dict[str, Any]:
    told = {
        "vid": "123",
        "fps": 10.0,
        "frame_count": 40,
        "used_segment": {"begin_fid": 8, "end_fid": 39},
        "width": 192,
        "height": 128,
        "subject/objects": [{"tid": 0, "category": "child"}, {"tid": 1, "category": "ball/sports_ball"}],
        "used_relation": {
            "subject_tid": 0,
            "object_tid": 1,
            "predicate": "watch",
            "begin_fid": 12,
            "end_fid": 24,
        },
        "temporal_gt": {"begin_fid": 12, "end_fid": 24},
        "captions": [{"description": "a child watches a ball.", "type": "object", "target_id": 1}],
        "questions": [
            {"description": "what does the child watch?", "type": "object", "target_id": 1},
            {"description": "who watches the ball?", "type": "person", "target_id": 0},
        ],
    }
    return {**told, **changed}


def test_vidstg_shows_frames_of_the_segment(tmp_path: Path) -> None:
    write_json(tmp_path / "annotations" / "val_annotations.json", [row()])
    grey(tmp_path / "video" / "0001" / "123.mp4")
    ball, child = load_data("vidstg", data_dir=tmp_path, n_frames=8)
    # 32 frames, 8 to 39, in eight parts of four: their middles. The span is 12 to 23.
    assert ball.metadata["frames"] == [10, 14, 18, 22, 26, 30, 34, 38]
    assert ball.evidence == (Evidence(1), Evidence(2), Evidence(3)) == child.evidence
    assert [image.getpixel((48, 32))[0] for image in ball.images] == pytest.approx(
        [6 * frame for frame in ball.metadata["frames"]], abs=6
    )
    assert (ball.answer, ball.metadata["answers"], child.answer) == ("ball", ["ball", "sports ball"], "child")
    assert ball.question == "what does the child watch?" and ball.group == child.group == "VidOR 123"
    assert ball.id != child.id and ball.kind == "vidstg"


def test_vidstg_with_the_trajectories_of_vidor(tmp_path: Path) -> None:
    """Boxes of the one object, of each frame, on a video that is half as large as it was told."""
    write_json(tmp_path / "annotations" / "val_annotations.json", [row()])
    grey(tmp_path / "video" / "123.mp4")

    def tracked(frame: int) -> list[dict[str, Any]]:
        box = {"xmin": frame, "ymin": 20, "xmax": 40 + frame, "ymax": 60}
        other = {"tid": 0, "bbox": dict.fromkeys(("xmin", "ymin"), 1) | dict.fromkeys(("xmax", "ymax"), 9)}
        # The ball is not seen in frame 18.
        return [other] if frame == 18 else [other, {"tid": 1, "bbox": box, "generated": 0, "tracker": "none"}]

    told = {"video_id": "123", "trajectories": [tracked(frame) for frame in range(40)]}
    (tmp_path / "vidor").mkdir()
    (tmp_path / "vidor" / "123.json").write_text(json.dumps(told))
    ball, child = load_data("vidstg", data_dir=tmp_path, n_frames=8)
    assert ball.evidence == (Evidence(1, (7, 10, 27, 30)), Evidence(2), Evidence(3, (11, 10, 31, 30)))
    assert child.evidence[0] == Evidence(1, (0.5, 0.5, 4.5, 4.5))


def test_a_short_span_of_vidstg_is_shown(tmp_path: Path) -> None:
    short = row(temporal_gt={"begin_fid": 15, "end_fid": 17})
    write_json(tmp_path / "annotations" / "val_annotations.json", [short, row(vid="124", questions=[])])
    grey(tmp_path / "123.mp4")
    grey(tmp_path / "124.mp4")
    ball, _ = load_data("vidstg", data_dir=tmp_path, n_frames=4)
    # 12, 20, 28 and 36 are the middles; the nearest gives way.
    assert ball.metadata["frames"] == [12, 16, 28, 36] or ball.metadata["frames"] == [16, 20, 28, 36]
    assert [ball.metadata["frames"][region.of_image] for region in ball.evidence] == [16]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"vid": "9"}, "there is no video '9.mp4'"),
        ({"questions": [{"description": "who?", "type": "x", "target_id": 7}]}, "target 7, which is none of"),
    ],
)
def test_rows_of_vidstg_that_cannot_be_read(tmp_path: Path, changed: Any, reason: str) -> None:
    write_json(tmp_path / "annotations" / "val_annotations.json", [row(**changed)])
    grey(tmp_path / "123.mp4")
    with pytest.raises(DataError, match=f"vidstg val, row 0.*{reason}"):
        list(load_data("vidstg", data_dir=tmp_path))


def test_mlvu_marks_its_options_by_letters(tmp_path: Path) -> None:
    told = {
        "video": "needle_32.mp4",
        "duration": 4.0,
        "question": "What is seen?",
        "candidates": ["A dog", "A cat", "A cow"],
        "answer": "A cat",
        "question_type": "findNeedle",
    }
    write_json(tmp_path / "MLVU" / "json" / "2_needle.json", [told])
    grey(tmp_path / "MLVU" / "video" / "2_needle" / "needle_32.mp4")
    (example,) = load_data("mlvu", data_dir=tmp_path)
    assert (example.answer, example.candidates, example.group) == ("B", ("A", "B", "C"), "needle_32.mp4")
    assert example.question == "What is seen?\n(A) A dog\n(B) A cat\n(C) A cow"
    assert example.videos[0].n_frames == 40 and example.evidence == ()
    assert example.metadata["option"] == "A cat"
    write_json(tmp_path / "MLVU" / "json" / "2_needle.json", [{**told, "answer": "A pig"}])
    with pytest.raises(DataError, match="the answer 'A pig' is none of the candidates"):
        list(load_data("mlvu", data_dir=tmp_path))
