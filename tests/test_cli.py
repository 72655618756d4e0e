"""The commands, each as one would type it; `core-heads` is tested with its experiment too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import small_experiment

import mmlens
from mmlens.cli import main, parsed_settings
from mmlens.runs.rerun import compare
from mmlens.runs.run import read_record

SIZES = ["--n-selection", "2", "--n-evaluation", "2"]


@pytest.fixture
def small() -> Iterator[None]:
    with small_experiment.registered():
        yield


def test_families_lists_every_family_and_counts_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 97 + 2
    assert lines[-1].startswith("97 families: ") and "13 refused" in lines[-1]
    assert any(line.split()[:2] == ["qwen3_vl", "supported"] for line in lines)


def test_families_tells_all_about_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families", "qwen3_5"]) == 0
    told = capsys.readouterr().out
    assert "status: partly" in told and "blocks.{l}.attn.*: its gated delta net layers" in told
    assert main(["families", "qwen35"]) == 2
    assert "no family 'qwen35'; the nearest: 'qwen3_5'" in capsys.readouterr().err


def test_families_writes_the_table(tmp_path: Path) -> None:
    assert main(["families", "--csv", str(tmp_path / "families.csv")]) == 0
    table = pd.read_csv(tmp_path / "families.csv")
    assert list(table.columns) == ["family", "status", "token_map", "notes"] and len(table) == 97


@pytest.mark.usefixtures("small")
def test_run_and_rerun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    given = [
        "run",
        "small",
        "--model",
        "micro",
        "--out",
        str(out),
        *SIZES,
        "--set",
        "share=.1",
        "--set",
        "modes=zero,uniform",
    ]
    assert main(given) == 0
    assert "The largest RAM of micro is" in capsys.readouterr().out
    record = read_record(out / "micro")
    assert record["command"] == " ".join(["mmlens", *given])
    assert record["request"]["settings"]["modes"] == ["zero", "uniform"]
    assert len(json.loads((out / "micro/numbers.json").read_text())["top"]) == 6
    assert main(["rerun", str(out), "--out", str(tmp_path / "again")]) == 0
    assert "0 differ" in capsys.readouterr().out and read_record(tmp_path / "again/micro")
    numbers = out / "micro/numbers.json"
    numbers.write_text(numbers.read_text().replace('"nothing": null', '"nothing": 1'))
    assert main(["rerun", str(out / "micro")]) == 1
    told = capsys.readouterr().out
    assert "1 differ" in told and "numbers.json: nothing: was '1 (int)', is 'None (NoneType)'" in told


@pytest.mark.usefixtures("small")
def test_paper_fails_where_a_run_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["paper", "--model", "micro", "--out", str(tmp_path / "out"), *SIZES]
    assert main([*given, "--experiments", "small"]) == 0
    assert main(given) == 1
    told = capsys.readouterr()
    assert "2 runs, 1 failed" in told.out and "[2/2] broken on micro: failed, RuntimeError" in told.err


@pytest.mark.usefixtures("small")
def test_experiments_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiments"]) == 0
    told = capsys.readouterr().out
    assert "small: A small experiment" in told and "Does it fail?" in told
    assert main(["experiments", "small"]) == 0
    told = capsys.readouterr().out
    assert "share=0.05" in told and "modes=zero\n" in told and "kinds=None" in told
    assert main(["experiments", "smal"]) == 2


def test_core_heads_can_be_rerun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    data = mmlens.save_examples(mmlens.scene_examples("objects", 6, 3), tmp_path / "data")
    options = ["--draws", "1", "--counts", "3", "--modes", "zero"]
    assert main(["core-heads", "--data", str(data), "--out", str(out), *options]) == 0
    record = read_record(out)
    assert record["results"][0] == "summary.json" and "report.html" in record["files"]
    assert "(1 draws of each)" in (out / "methods.md").read_text() and (out / "references.bib").is_file()
    assert main(["rerun", str(out), "--out", str(tmp_path / "again")]) == 0
    told = capsys.readouterr().out
    assert "values compared, 0 differ" in told and "largest relative difference of two floats: 0\n" in told
    summary = (out / "summary.json").read_text()
    (out / "summary.json").write_text(summary.replace('"n_selection": 3', '"n_selection": 4'))
    found = compare(out, tmp_path / "again").differences
    assert list(map(str, found)) == ["summary.json: settings.n_selection: was 4, is 3"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["share"], "--set takes NAME=VALUE, not 'share'"),
        (["shar=1"], "no small setting 'shar'; the nearest: 'share'"),
        (["share=x"], "like its default 0.05, which 'x' is not"),
        (["share=none"], "it cannot be none"),
        (["n_heads=1.5"], "like its default 1, which '1.5' is not"),
        (["exact=maybe"], "true or false"),
    ],
)
def test_settings_of_another_kind_are_refused(given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed_settings(small_experiment.EXPERIMENT, given)


def test_settings_have_the_type_of_their_defaults() -> None:
    given = ["share=1", "n_heads=2", "exact=True", "kinds=objects", "modes=a, b"]
    found = parsed_settings(small_experiment.EXPERIMENT, given)
    assert found == {"share": 1.0, "n_heads": 2, "exact": True, "kinds": "objects", "modes": ("a", "b")}
    assert isinstance(found["share"], float)
    for text, value in {"none": None, "a,b": ("a", "b"), "1,.5": (1, 0.5), "[1, 2]": [1, 2], "3": 3}.items():
        assert parsed_settings(small_experiment.EXPERIMENT, [f"kinds={text}"]) == {"kinds": value}


def test_a_folder_in_use_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    assert main(["core-heads", "--out", str(tmp_path)]) == 2
    assert "holds files but no run.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["core-heads", "--out", "x", "--trust-remote-cod"], "--trust-remote-cod"),
        (["rerun", "x", "--trust"], "--trust"),
        (["run", "small", "--ou", "x"], "--ou"),
        (["core-heads", "--out", "x", "--seed", "1", "--seed", "2"], "--seed is given twice"),
        (["core-heads", "--out", "x", "--trust-remote-code", "--trust-remote-code"], "given twice"),
        (["paper", "--out", "x", "--model", "micro", "--model", "micro"], "--model is given twice"),
        (["core-heads", "--out", "x", "--counts", "3", "5", "3"], "3 is given twice"),
    ],
)
def test_an_option_cut_short_or_given_twice_is_refused(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not Path("x").exists()
