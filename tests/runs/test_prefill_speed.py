"""`mmlens prefill-speed` as a user types it."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny.wrapped import hooked

import mmlens
from mmlens.cli import main
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.runs.prefill_speed import time_prefill
from mmlens.runs.run import RunError, read_findings


@pytest.fixture(scope="module")
def scores(micro: HookedVLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scores") / "ram.parquet"
    mmlens.ram(micro, mmlens.scene_examples("documents", 4, seed=1), progress=False).save(path)
    return path


def test_it_prints_and_writes_table_and_pictures(
    scores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["prefill-speed", "--model", "micro", "--heads", str(scores), "--lengths", "64", "128"]
    options = ["--fractions", "0.03", "0.2", "--sink", "4", "--window", "16", "--repeats", "1"]
    assert main([*command, *options, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "3.0% dense" in printed and "first token" in printed
    table = pd.read_parquet(out / "speed.parquet")
    assert set(table["length"]) == {64, 128} and set(table["n_dense"]) == {2, 13}
    record = json.loads((out / "prefill_speed.json").read_text())
    assert record["model"]["name"] == "micro" and record["settings"]["window"] == 16
    top = mmlens.HeadScores.load(scores).top(2)
    assert record["settings"]["heads"]["3.0% dense"] == [list(head) for head in top]
    page = (out / "report.html").read_text()
    assert page.count("<svg") + page.count("<img") == 3 and "Speed-up of prefill" in page
    # A second time replaces the first; another folder with files is refused.
    assert main([*command, *options, "--out", str(out)]) == 0
    (tmp_path / "mine.txt").write_text("mine")
    assert main([*command, *options, "--out", str(tmp_path)]) == 2


@pytest.fixture(scope="module")
def quality(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quality")
    sizes = ["--n-selection", "3", "--n-evaluation", "2"]
    settings = ["--set", "fractions=0.03,0.2", "windows=8,16", "n_draws=1", "n_per_kind=2"]
    assert main(["run", "hybrid", "--model", "micro", "--out", str(out), *sizes, *settings]) == 0
    return out / "micro"


def test_accuracy_of_a_run_is_put_beside_speed(scores: Path, quality: Path, tmp_path: Path) -> None:
    given = [
        "prefill-speed",
        "--heads",
        str(scores),
        "--lengths",
        "64",
        "128",
        "--repeats",
        "1",
        "--sink",
        "4",
    ]
    options = [
        "--window",
        "16",
        "--fractions",
        "0.03",
        "0.2",
        "--parts",
        "prefill",
        "--quality",
        str(quality),
    ]
    assert main([*given, *options, "--out", str(tmp_path / "out")]) == 0
    speed = pd.read_csv(tmp_path / "out" / "speed.csv").set_index(["length", "n_dense"])["speedup"]
    table = read_findings(quality).tables["quality"][1]
    rows = pd.read_csv(tmp_path / "out" / "speed_quality.csv")
    assert len(rows) == 2 * 2 * 2 * 2
    for row in rows.itertuples():
        assert row.speedup == pytest.approx(speed[row.length, row.n_dense])
        same = table[
            (table["window"] == row.window) & (table["arm"] == row.arm) & (table["count"] == row.n_dense)
            & (table["kind"] == "pooled") & (table["metric"] == "accuracy")
        ]  # fmt: skip
        assert row.mean == pytest.approx(same["mean"].item())
    assert "Speed against accuracy" in (tmp_path / "out" / "report.html").read_text()


def test_a_run_that_does_not_fit_is_refused(
    scores: Path, quality: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["prefill-speed", "--heads", str(scores), "--lengths", "64", "--out", str(tmp_path / "out")]
    for options, message in (
        (["--quality", str(tmp_path)], "there is no run"),
        (["--quality", str(quality), "--fractions", "0.5"], "has [2, 13] dense heads, and none"),
        (["--quality", str(quality), "--parts", "attention", "--fractions", "0.03"], "by prefill, and only"),
    ):
        assert main([*given, *options]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(RunError, match="other weights than 'other'"):
        time_prefill(
            hooked("qwen3_vl"),
            mmlens.HeadScores(torch.rand(1, 3, 4), "x"),
            [64],
            name="other",
            quality=quality,
        )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--heads", "nowhere.parquet"], "no head scores at 'nowhere.parquet'"),
        (["--lengths", "1"], "lengths are 2 or more"),
        (["--model", "llava-onevision"], "8 x 8 .* 6 x 8"),
        (["--window", "0"], "window=0"),
    ],
)
def test_bad_input_is_one_line(
    scores: Path, tmp_path: Path, changed: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"--heads": str(scores), "--lengths": "64"} | dict(
        zip(changed[::2], changed[1::2], strict=True)
    )
    given = ["prefill-speed", "--out", str(tmp_path / "out"), *itertools.chain(*options.items())]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()
