"""`mmlens accelerate` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

import mmlens
from mmlens.cli import main
from mmlens.hooked_vlm import HookedVLM


@pytest.fixture(scope="module")
def scores(micro: HookedVLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scores") / "ram.parquet"
    mmlens.ram(micro, mmlens.scene_examples("documents", 4, seed=1), progress=False).save(path)
    return path


def test_it_prints_and_writes_table_and_pictures(
    scores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["accelerate", "--model", "micro", "--heads", str(scores), "--lengths", "64", "128"]
    options = ["--fractions", "0.03", "0.2", "--sink", "4", "--window", "16", "--repeats", "1"]
    assert main([*command, *options, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "3.0% dense" in printed and "first token" in printed
    table = pd.read_parquet(out / "speed.parquet")
    assert set(table["length"]) == {64, 128} and set(table["n_dense"]) == {2, 13}
    record = json.loads((out / "accelerate.json").read_text())
    assert record["model"]["name"] == "micro" and record["settings"]["window"] == 16
    top = mmlens.HeadScores.load(scores).top(2)
    assert record["settings"]["heads"]["3.0% dense"] == [list(head) for head in top]
    page = (out / "report.html").read_text()
    assert page.count("<svg") + page.count("<img") == 3 and "Speed-up of prefill" in page
    # A second time replaces the first; another folder with files is refused.
    assert main([*command, *options, "--out", str(out)]) == 0
    (tmp_path / "mine.txt").write_text("mine")
    assert main([*command, *options, "--out", str(tmp_path)]) == 2


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
    import re

    given = [
        "accelerate",
        "--heads",
        str(scores),
        "--lengths",
        "64",
        "--out",
        str(tmp_path / "out"),
        *changed,
    ]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()
