"""Several models at a time: the same findings as one after the other, and a process that dies takes no other along."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import mmlens
from mmlens.runs import paper
from mmlens.runs.paper import run_all
from mmlens.runs.run import Request


@pytest.fixture(scope="module")
def request_of_all(tmp_path_factory: pytest.TempPathFactory) -> Request:
    examples = [e for kind in ("objects", "documents") for e in mmlens.scene_examples(kind, 6, 3)]
    data = mmlens.data.save_examples(examples, tmp_path_factory.mktemp("jobs") / "data")
    return Request("", "", data=str(data), batch_size=4, threads=1)


@pytest.mark.slow
def test_findings_are_those_of_one_model_after_the_other(request_of_all: Request, tmp_path: Path) -> None:
    copy = str(shutil.copytree(Path(mmlens.__file__).parent / "shipped/micro", tmp_path / "copy"))
    numbers = []
    for jobs in (1, 2):
        out = tmp_path / f"out{jobs}"
        outcomes = run_all(
            ["micro", copy], out, request_of_all, experiments=["vision-heads"], jobs=jobs, progress=False
        )
        assert [(o.model, o.status) for o in outcomes] == [("micro", "done"), (copy, "done")]
        numbers.append(
            [
                json.loads((out / "vision-heads" / name / "numbers.json").read_text())
                for name in ("micro", "copy")
            ]
        )
    assert numbers[0] == numbers[1]


def _dies(*arguments: object, **options: object) -> None:
    os._exit(1)


@pytest.mark.slow
def test_a_process_that_dies_is_reported(
    request_of_all: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper, "_run_model", _dies)
    out = tmp_path / "out"
    outcomes = run_all(
        ["micro", "llava-onevision"], out, request_of_all, experiments=["overlays"], jobs=2, progress=False
    )
    assert [o.status for o in outcomes] == ["failed", "failed"] and "terminated" in outcomes[0].error
    assert "Failed: 2; done: 0" in (out / "report.html").read_text()


def test_no_models_at_a_time_are_refused(request_of_all: Request, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 or more, not 0"):
        run_all(["micro"], tmp_path / "out", request_of_all, jobs=0)
