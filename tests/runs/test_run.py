"""A run's folder holds what was found and what it was found with, is whole or is not there, and can be repeated."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small_experiment
import torch
from safetensors.torch import load_file, save_file

import mmlens
from mmlens.experiments import catalog
from mmlens.experiments.experiment import Findings, Setup
from mmlens.model.loading import scene_kinds
from mmlens.provenance import data_fingerprint, fingerprint, versions
from mmlens.runs.data import EVALUATION_SEED, SELECTION_SEED
from mmlens.runs.rerun import compare, rerun, runs_in
from mmlens.runs.run import (
    Prepared,
    Request,
    RunError,
    model_folders,
    prepare,
    read_findings,
    read_record,
    run,
    write_across,
)

REQUEST = Request(
    "small", "micro", n_selection=2, n_evaluation=2, batch_size=6, settings={"modes": ["zero", "uniform"]}
)


@pytest.fixture(autouse=True, scope="module")
def _experiments() -> Iterator[None]:
    with small_experiment.registered():
        yield


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare(REQUEST)


@pytest.fixture(scope="module")
def folder(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "new" / "run"
    return run(REQUEST, out, prepared=prepared, command="mmlens run small", progress=False)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copied")


def setup_of(prepared: Prepared) -> Setup:
    return Setup(
        prepared.model, prepared.selection, prepared.evaluation, batch_size=6, progress=False, name="micro"
    )


def test_the_folder_holds_what_the_function_finds(folder: Path, prepared: Prepared) -> None:
    found = small_experiment.run(setup_of(prepared), modes=("zero", "uniform"))
    numbers = json.loads((folder / "numbers.json").read_text())
    assert numbers["top"] == found.numbers["top"] and numbers["mean"] == found.numbers["mean"]
    assert numbers["largest"] == float(found.numbers["largest"]) and numbers["nothing"] is None
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "tables/heads.parquet"), found.tables["heads"][1])
    pd.testing.assert_frame_equal(
        pd.read_csv(folder / "tables/heads.csv"), found.tables["heads"][1], rtol=1e-6, check_dtype=False
    )
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "tables/modes.parquet"), found.tables["modes"][1])
    pd.testing.assert_frame_equal(
        pd.read_parquet(folder / "per_example/outcomes.parquet"), found.per_example["outcomes"]
    )
    assert (folder / "figures/01-ram-every-head.png").stat().st_size > 1000
    assert (folder / "figures/01-ram-every-head.svg").read_text().count("<svg") == 1
    again = read_findings(folder)
    assert again.statement == found.statement and again.numbers == numbers and again.figures == []
    pd.testing.assert_frame_equal(again.tables["modes"][1], found.tables["modes"][1])


def test_the_record_says_what_was_run_on_what(folder: Path, micro: mmlens.HookedVLM) -> None:
    record = read_record(folder)
    assert record["model"]["fingerprint"] == fingerprint(micro) and record["model"]["name"] == "micro"
    tasks = scene_kinds("micro")
    kinds = [*tasks["visual"], *tasks["text"]]
    for name, seed in (("selection", SELECTION_SEED), ("evaluation", EVALUATION_SEED)):
        examples = [e for kind in kinds for e in mmlens.scene_examples(kind, 2, seed)]
        split = record["data"][name]
        assert split["ids"] == [e.id for e in examples] and split["n"] == len(examples)
        assert split["fingerprint"] == data_fingerprint(examples)
        assert split["n_by_kind"] == dict.fromkeys(sorted(kinds), 2)
        assert split["controls"] == sorted(tasks["text"])
    assert record["request"]["settings"] == {
        "share": 0.05, "modes": ["zero", "uniform"], "n_heads": 1, "kinds": None, "exact": False
    }  # fmt: skip
    assert record["versions"]["torch"] == versions()["torch"] and record["seconds"] > 0
    assert record["command"] == "mmlens run small" and record["machine"]["threads"] == torch.get_num_threads()
    assert sorted([*record["files"], "run.json"]) == sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
    )


def test_methods_and_references_are_of_this_run(folder: Path) -> None:
    methods = (folder / "methods.md").read_text()
    for part in (
        "The top 5% by RAM, and 1 random head, modes zero, uniform (exact: no, kinds: none).",
        "12 for selection (2 documents, ",
        "seeds 100000 (selection) and 200000 (evaluation)",
        "8 layers, 8 heads each",
        f"PyTorch {versions()['torch']}",
        "Text-only controls: text_knowledge, text_recall.",
    ):
        assert part in methods, part
    references = (folder / "references.bib").read_text()
    for key in set(re.findall(r"\[@(\w+)\]", methods)):
        assert references.count(f"{{{key},") == 1
    assert "Mechanistic Insights into Functional Sparsity" in references


def test_the_page_needs_nothing_beside_it_and_escapes(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert "&amp; &lt;more&gt;" in page and "<more>" not in page
    assert 'src="data:image/svg+xml;base64,' in page and "Qwen3-VL-4B" in page and "45.3" in page
    assert "http://" not in page and "https://" not in page


def test_a_rerun_in_this_process_and_in_a_fresh_one_gives_the_same_numbers(
    folder: Path, tmp_path: Path
) -> None:
    found = rerun(folder, tmp_path / "again", progress=False)
    assert found.same and found.largest == 0 and found.changed == {}
    # 64 rows of 7 columns, 2 modes with a mean, 24 outcomes of 3 columns, and the 3 x 2 + 5 numbers.
    assert found.n_values == 64 * 7 + 2 * 2 + 24 * 3 + 3 * 2 + 1 + 2 + 1 + 1
    assert (
        read_record(tmp_path / "again")["request"]["settings"] == read_record(folder)["request"]["settings"]
    )
    code = (
        "import small_experiment, sys; small_experiment.register(); from mmlens.cli import main; "
        "sys.exit(main(['rerun', sys.argv[1]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=Path(__file__).parents[1] / "support", capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{found.n_values} values compared, 0 differ" in done.stdout
    assert "largest relative difference of two floats: 0" in done.stdout


def edit_json(path: Path, *keys: Any, value: Any) -> None:
    content = json.loads(path.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(content))


def test_what_differs_is_named_by_its_place(folder: Path, copied: Path) -> None:
    numbers = json.loads((folder / "numbers.json").read_text())
    mean = numbers["mean"]["zero"]
    edit_json(copied / "numbers.json", "mean", "zero", value=mean * (1 + 1e-8))
    close = compare(folder, copied)
    assert close.same and close.largest == pytest.approx(1e-8, rel=1e-3)
    assert close.largest_at == "numbers.json: mean.zero"
    assert not compare(folder, copied, tolerance=1e-9).same
    edit_json(copied / "numbers.json", "mean", "zero", value=mean * 1.5)
    edit_json(copied / "numbers.json", "top", 1, 0, value=numbers["top"][1][0] + 1)
    edit_json(copied / "numbers.json", "exact", value=0)
    edit_json(copied / "numbers.json", "more", value="x")
    table = pd.read_parquet(copied / "tables/heads.parquet")
    table.loc[3, "score"] = np.nan
    table.drop(index=63).to_parquet(copied / "tables/heads.parquet")
    found = {difference.path: difference for difference in compare(folder, copied).differences}
    assert found["numbers.json: mean.zero"].relative == pytest.approx(1 / 3)
    assert found["numbers.json: top[1][0]"].after == numbers["top"][1][0] + 1
    assert found["numbers.json: more"].before == "absent"
    assert {"numbers.json: exact", "tables/heads.parquet: score[3]", "tables/heads.parquet: score"} <= set(
        found
    )


def test_versions_that_differ_are_named(folder: Path, copied: Path) -> None:
    edit_json(copied / "run.json", "versions", "torch", value="1.0")
    edit_json(copied / "run.json", "code", value="0")
    found = rerun(copied, progress=False)
    assert found.same and set(found.changed) == {"torch", "code of the experiment"}
    assert found.changed["torch"] == ("1.0", versions()["torch"])


def test_other_weights_and_other_data_are_refused(tmp_path: Path) -> None:
    data = mmlens.data.save_examples(mmlens.scene_examples("objects", 6, 3), tmp_path / "data")
    model = shutil.copytree(Path(mmlens.__file__).parent / "shipped/micro", tmp_path / "model")
    request = Request("small", str(model), data=str(data))
    folder = run(request, tmp_path / "run", progress=False)
    assert read_record(folder)["model"]["name"] == str(model)
    moved = shutil.move(data, tmp_path / "moved")
    with pytest.raises(mmlens.data.examples.DataError, match="no folder of examples"):
        rerun(folder, progress=False)
    assert rerun(folder, data=str(moved), progress=False).same
    shutil.move(moved, data)
    lines = (data / "examples.jsonl").read_text()
    (data / "examples.jsonl").write_text(lines.replace('"kind": "objects"', '"kind": "object"'))
    with pytest.raises(
        RunError, match=r"the data of the selection split are not those of the run: .*\b3 examples"
    ):
        rerun(folder, progress=False)
    (data / "examples.jsonl").write_text(lines)
    weights = load_file(model / "model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 1e-3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        RunError, match=r"the model .* is not the one of the run: the fingerprint of its weights"
    ):
        rerun(folder, progress=False)


def test_a_run_takes_the_place_of_one_and_of_nothing_else(
    copied: Path, prepared: Prepared, tmp_path: Path
) -> None:
    (copied / "notes.txt").write_text("mine")
    (copied / "figures" / "old.png").write_text("")
    record = read_record(copied)
    edit_json(copied / "run.json", "files", value=[*record["files"], "figures/old.png"])
    run(REQUEST, copied, prepared=prepared, progress=False)
    assert (copied / "notes.txt").read_text() == "mine" and not (copied / "figures/old.png").exists()
    assert compare(copied, run(REQUEST, tmp_path / "other", prepared=prepared, progress=False)).same
    other = tmp_path / "full"
    other.mkdir()
    (other / "precious.txt").write_text("mine")
    with pytest.raises(RunError, match="holds files but no run.json"):
        run(REQUEST, other, prepared=prepared, progress=False)
    with pytest.raises(RunError, match="is a file"):
        run(REQUEST, other / "precious.txt", prepared=prepared, progress=False)
    (other / "run.json").write_text("[]")
    with pytest.raises(RunError, match="is no record of what was written there"):
        run(REQUEST, other, prepared=prepared, progress=False)
    (other / "run.json").write_text('{"files": ["../copied/notes.txt"]}')
    run(REQUEST, other, prepared=prepared, progress=False)
    assert (copied / "notes.txt").exists() and (other / "precious.txt").exists()


def test_a_run_that_fails_leaves_nothing_and_the_one_before_whole(
    copied: Path, prepared: Prepared, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="it broke"):
        run(Request("broken", "micro"), tmp_path / "none", prepared=prepared, progress=False)
    assert not (tmp_path / "none").exists()
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    with pytest.raises(RuntimeError, match="it broke"):
        run(Request("broken", "micro"), copied, prepared=prepared, progress=False)
    assert before == {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("findings", "message"),
    [
        (Findings("", {"a": {"b": [1.0, float("nan")]}}), r"numbers\.a\.b\[1\] is nan; say None"),
        (Findings("", {"a": {1: 2}}), r"numbers\.a has the key 1"),
        (Findings("", {"a": torch.zeros(1)}), r"numbers\.a is a Tensor"),
        (Findings("", {}, {"a/b": ("", pd.DataFrame())}), r"a table's name is a file's: .* not 'a/b'"),
        (
            Findings("", {}, {"a": ("", pd.DataFrame({"x": [1, "b"]}))}),
            r"the table 'a' cannot be written as parquet",
        ),
    ],
)
def test_findings_that_cannot_be_compared_are_refused(
    findings: Findings, message: str, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = dataclasses.replace(small_experiment.BROKEN, run=lambda setup: findings)
    monkeypatch.setitem(catalog.EXPERIMENTS, "broken", found)
    with pytest.raises(RunError, match=message):
        run(Request("broken", "micro"), tmp_path / "out", prepared=prepared, progress=False)
    assert not (tmp_path / "out").exists()


def test_unknown_names_come_with_the_nearest(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no experiment 'smal'; the nearest: 'small'"):
        run(Request("smal", "micro"), tmp_path, prepared=prepared)
    with pytest.raises(ValueError, match="no small setting 'shar'; the nearest: 'share'"):
        run(Request("small", "micro", settings={"shar": 1}), tmp_path, prepared=prepared)
    with pytest.raises(RunError, match="no run in"):
        rerun(tmp_path)
    with pytest.raises(RunError, match="no folder"):
        runs_in(tmp_path / "none")
    (tmp_path / "run.json").write_text('{"schema": "mmlens.run/99"}')
    with pytest.raises(RunError, match=r"schema 'mmlens.run/99'; this version reads 'mmlens.run/1'"):
        rerun(tmp_path)


def test_across_reads_the_runs_back(folder: Path, copied: Path, tmp_path: Path) -> None:
    edit_json(copied / "numbers.json", "largest", value=0.75)
    out = tmp_path / "across"
    found = write_across(small_experiment.EXPERIMENT, {"one": folder, "two": copied}, out)
    assert found is not None and found.numbers == {"rows": 128}
    table = pd.read_parquet(out / "tables/models.parquet")
    assert table["model"].tolist() == ["one", "two"] and table["largest"][1] == 0.75
    assert "Both were run." in (out / "report.html").read_text()
    assert write_across(small_experiment.EXPERIMENT, {"one": folder, "two": copied}, out) is not None
    assert write_across(small_experiment.EXPERIMENT, {"one": folder}, tmp_path / "none") is None
    assert not (tmp_path / "none").exists()
    with pytest.raises(RunError, match="holds files but no across.json"):
        write_across(small_experiment.EXPERIMENT, {"one": folder, "two": copied}, folder)


def test_folders_of_models_are_told_apart(tmp_path: Path) -> None:
    found = model_folders(["micro", "Qwen/Qwen3-VL-4B-Instruct"], tmp_path)
    assert [path.name for path in found.values()] == ["micro", "Qwen--Qwen3-VL-4B-Instruct"]
    (tmp_path / "micro").mkdir()
    with pytest.raises(ValueError, match="cannot be told apart"):
        model_folders(["micro", str(tmp_path / "micro")], tmp_path)
    with pytest.raises(ValueError, match="no model may be called 'across'"):
        model_folders(["./across"], tmp_path)
