"""All experiments in one report: what failed is said, what is there is kept, and pictures fit."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_experiment

import mmlens
from mmlens.runs import paper
from mmlens.runs.folder import broken_parts, locked
from mmlens.runs.paper import is_kept, run_all
from mmlens.runs.run import Request, RunError, prepare, read_record


@pytest.fixture(autouse=True, scope="module")
def _experiments() -> Iterator[None]:
    with small_experiment.registered():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    copy = tmp_path_factory.mktemp("models") / "copy"
    return ["micro", str(shutil.copytree(Path(mmlens.__file__).parent / "shipped/micro", copy))]


@pytest.fixture(scope="module")
def request_of_all(tmp_path_factory: pytest.TempPathFactory) -> Request:
    examples = [e for kind in ("objects", "text_recall") for e in mmlens.scene_examples(kind, 4, 3)]
    data = mmlens.data.save_examples(examples, tmp_path_factory.mktemp("paper") / "data")
    return Request("", "", data=str(data), batch_size=4)


@pytest.fixture(scope="module")
def out(models: list[str], request_of_all: Request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("paper") / "out"
    outcomes = run_all(models, out, request_of_all, progress=False)
    assert [(o.experiment, o.status) for o in outcomes] == [("small", "done"), ("broken", "failed")] * 2
    return out


def test_the_report_holds_every_run_and_every_failure(out: Path, models: list[str]) -> None:
    page = (out / "report.html").read_text()
    for part in (
        "Failed: 2; done: 2", "broken on micro: RuntimeError: it broke", "A small experiment", "Does it run?",
        "The largest RAM of micro is ", "&amp; &lt;more&gt;", "Both were run.",
        "45.3", "micro: figures, tables, settings",
        "Largest RAM.", "raise RuntimeError", "Mechanistic Insights", "(The first 40 of 64 rows.)",
    ):  # fmt: skip
        assert part in page, part
    assert page.count("data:image/") == 2
    assert "http" not in re.sub(r"(?s)<pre>.*?</pre>", "", page)
    for anchor in re.findall(r'href="#([^"]+)"', page):
        assert f'id="{anchor}"' in page
    assert page.count("<details>") == page.count("</details>")
    assert (out / "small/across/report.html").is_file()


def test_the_page_in_markdown_holds_statements_and_published_numbers(out: Path, models: list[str]) -> None:
    page = (out / "paper.md").read_text()
    for part in (
        "## A small experiment", "Does it run?", "45.3", "**Across models.** Both were run.",
        "- **micro**: The largest RAM of micro is ", f"- **{models[1]}**: failed, RuntimeError: it broke",
    ):  # fmt: skip
        assert part in page, part
    assert not re.search(r"\bnan\b", page)


def test_the_summary_holds_all_numbers(out: Path, models: list[str]) -> None:
    summary = json.loads((out / "summary.json").read_text())
    assert summary["schema"] == "mmlens.paper/1" and summary["models"] == models
    runs = {(row["experiment"], row["model"]): row for row in summary["runs"]}
    numbers = json.loads((out / "small/copy/numbers.json").read_text())
    assert runs["small", models[1]]["numbers"] == numbers
    assert runs["small", "micro"]["folder"] == "small/micro" and runs["small", "micro"]["status"] == "done"
    assert runs["broken", "micro"]["error"] == "RuntimeError: it broke"
    assert "in broken" in runs["broken", "micro"]["traceback"]
    assert summary["across"]["small"]["numbers"] == {"rows": 128}


def test_a_finished_run_is_kept(out: Path, request_of_all: Request, tmp_path: Path) -> None:
    here = shutil.copytree(out, tmp_path / "out")
    started = read_record(here / "small/micro")["started"]
    found = run_all(["micro"], here, request_of_all, experiments=["small"], progress=False)
    assert found[0].status == "kept" and read_record(here / "small/micro")["started"] == started
    assert "The largest RAM of micro is " in (here / "report.html").read_text()
    (here / "small/micro/tables/heads.parquet").unlink()
    found = run_all(["micro"], here, request_of_all, experiments=["small"], progress=False)
    assert found[0].status == "done" and read_record(here / "small/micro")["started"] >= started


@pytest.mark.parametrize(
    "name",
    ["tables/heads.parquet", "numbers.json", "findings.json", "run.json", "figures/01-ram-every-head.svg"],
)
def test_a_run_that_was_cut_off_is_named_and_done_again(
    out: Path, request_of_all: Request, tmp_path: Path, name: str
) -> None:
    here = shutil.copytree(out, tmp_path / "out")
    path = here / "small/micro" / name
    path.write_bytes(path.read_bytes()[:-20])
    found = run_all(["micro"], here, request_of_all, experiments=["small"], progress=False)
    assert found[0].status == "done" and name in found[0].broken
    assert broken_parts(here / "small/micro") == []
    rows = json.loads((here / "summary.json").read_text())["runs"]
    assert rows[0]["broken_before"] == found[0].broken


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_summary_that_was_cut_off_locks_nothing(
    out: Path, request_of_all: Request, tmp_path: Path, cut: int
) -> None:
    here = shutil.copytree(out, tmp_path / "out")
    text = (here / "summary.json").read_text()
    (here / "summary.json").write_text(text[:cut])
    found = run_all(["micro"], here, request_of_all, experiments=["small"], progress=False)
    assert found[0].status == "kept" and json.loads((here / "summary.json").read_text())["runs"]


def test_two_reports_into_one_folder_are_refused(request_of_all: Request, tmp_path: Path) -> None:
    with locked(tmp_path / "out"), pytest.raises(RunError, match=f"process {os.getpid()} on "):
        run_all(["micro"], tmp_path / "out", request_of_all, experiments=["small"], progress=False)


def test_a_run_is_not_kept_when_something_of_it_changed(
    out: Path, request_of_all: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(out / "small/micro", tmp_path / "run")
    request = dataclasses.replace(request_of_all, model="micro", experiment="small")
    prepared = prepare(request)

    def kept(request: Request = request) -> bool:
        return is_kept(small_experiment.EXPERIMENT, request, folder, prepared)

    assert kept() and not kept(dataclasses.replace(request, batch_size=5))
    path = folder / "run.json"
    whole = path.read_text()
    for keys in (
        ("code",),
        ("versions", "torch"),
        ("model", "fingerprint"),
        ("data", "evaluation", "fingerprint"),
    ):
        record = json.loads(whole)
        inner = record
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = "other"
        path.write_text(json.dumps(record))
        assert not kept(), keys
    path.write_text(whole)
    assert kept()
    defaults = {**small_experiment.run.__kwdefaults__, "share": 0.1}
    monkeypatch.setattr(small_experiment.run, "__kwdefaults__", defaults)
    assert not kept()


def test_a_failure_across_models_is_reported(out: Path, models: list[str], request_of_all: Request, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    here = shutil.copytree(out, tmp_path / "out")
    (here / "small/across/across.json").unlink()
    found = run_all(models, here, request_of_all, experiments=["small"], progress=False)
    assert [(o.model, o.status) for o in found][2:] == [("across models", "failed")]
    error = json.loads((here / "summary.json").read_text())["across"]["small"]["error"]
    assert "holds files but no across.json" in error
    assert "holds files but no across.json" in (here / "report.html").read_text()


def test_a_model_that_cannot_be_loaded_fails_alone(
    out: Path, request_of_all: Request, tmp_path: Path
) -> None:
    here = shutil.copytree(out, tmp_path / "out")
    found = run_all(["micro", "./nowhere"], here, request_of_all, experiments=["small"], progress=False)
    assert found[0].status != "failed" and found[1].status == "failed"
    assert (
        "there is no folder" in found[1].error and "there is no folder" in (here / "report.html").read_text()
    )


def test_pictures_share_the_room_there_is(
    out: Path, request_of_all: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = shutil.copytree(out, tmp_path / "out")
    before = (here / "report.html").stat().st_size
    monkeypatch.setattr(paper, "PICTURE_BYTES", 30_000)
    run_all(["micro"], here, request_of_all, experiments=["small"], progress=False)
    page = (here / "report.html").read_text()
    assert "data:image/webp;base64," in page and len(page) < before
    assert len(re.findall(r"base64,([A-Za-z0-9+/=]+)", page)[0]) <= 30_000


def test_other_folders_and_unknown_experiments_are_refused(request_of_all: Request, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(RunError, match="holds files that no such run wrote"):
        run_all(["micro"], tmp_path, request_of_all, progress=False)
    with pytest.raises(ValueError, match="no experiment 'smal'; the nearest: 'small'"):
        run_all(["micro"], tmp_path / "out", request_of_all, experiments=["smal"], progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
