"""The commands, each as one would type it; `core-heads` is tested with its experiment too."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import small_experiment
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import mmlens
from mmlens.cli import COMMANDS, main, parsed_settings
from mmlens.runs.folder import broken_parts
from mmlens.runs.rerun import compare
from mmlens.runs.run import Request, read_record

SIZES = ["--n-selection", "2", "--n-evaluation", "2"]


@pytest.fixture
def small() -> Iterator[None]:
    core_heads = small_experiment.catalog.EXPERIMENTS["core-heads"]
    with small_experiment.registered():
        small_experiment.catalog.EXPERIMENTS["core-heads"] = core_heads
        yield


def test_families_lists_every_family_and_counts_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families"]) == 0
    lines = capsys.readouterr().out.splitlines()
    n = len(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    n_refused = sum(line.split()[1] == "refused" for line in lines[:n])
    assert len(lines) == n + 2 and n_refused >= 13
    assert lines[-1].startswith(f"{n} families: ") and f"{n_refused} refused" in lines[-1]
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
    assert list(table.columns) == ["family", "status", "token_map", "notes"] and len(table) == len(
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    )


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("small", "threads")
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
        "--threads",
        "2",
        "--set",
        "share=.1",
        "--set",
        "modes=zero,uniform",
    ]
    assert main(given) == 0
    torch.set_num_threads(1)
    assert "The largest RAM of micro is" in capsys.readouterr().out
    record = read_record(out / "micro")
    assert record["command"] == " ".join(["mmlens", *given])
    assert record["request"]["settings"]["modes"] == ["zero", "uniform"]
    assert len(json.loads((out / "micro/numbers.json").read_text())["top"]) == 6
    assert main(["rerun", str(out), "--out", str(tmp_path / "again")]) == 0
    assert "0 differ" in capsys.readouterr().out
    # With the threads of the run, where this machine has as many.
    again = read_record(tmp_path / "again/micro")
    assert again["machine"]["threads"] == min(record["machine"]["threads"], os.cpu_count() or 1)
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


@pytest.mark.slow
def test_core_heads_can_be_rerun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    data = mmlens.data.save_examples(mmlens.scene_examples("objects", 6, 3), tmp_path / "data")
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


@pytest.mark.parametrize("name", ["core-heads", "run", "paper"])
def test_all_that_a_request_says_can_be_asked_for(name: str) -> None:
    named = {field.name for field in dataclasses.fields(Request)} - {"experiment", "model", "settings"}
    assert {f"--{field.replace('_', '-')}" for field in named} <= set(COMMANDS[name].options)


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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["rn", "small"], "no command 'rn'; the nearest: 'run', 'rerun'"),
        (["run", "small", "--out", "x", "--modle", "micro"], "no option '--modle'; the nearest: '--model'"),
        (["core-heads", "--ot", "x"], "no option '--ot'; the nearest: '--out'"),
        (["rerun", "x", "--tolerence=1"], "no option '--tolerence'; the nearest: '--tolerance'"),
        (["core-heads", "--out", "x", "--modes", "meen"], "no mode 'meen'; the nearest: 'mean'"),
        (["core-heads", "--out", "x", "--mapping", "merge"], "no mapping 'merge'; the nearest: 'merged'"),
        (["core-heads", "--out", "x", "--batch-size", "true"], "--batch-size: expected a whole number"),
        (["core-heads", "--out", "x", "--batch-size", "1.5"], "not '1.5'"),
        (["core-heads", "--out", "x", "--n-selection", "0"], "--n-selection: expected a whole number of at least 1"),
        (["core-heads", "--out", "x", "--n-evaluation", "-1"], "--n-evaluation: expected a whole number"),
        (["core-heads", "--out", "x", "--threads", "-1"], "--threads: expected a whole number from 0 to"),
        (["core-heads", "--out", "x", "--threads", "1000000000"], "--threads: expected a whole number from 0 to"),
        (["core-heads", "--out", "x", "--seed", "-1"], "--seed: expected a whole number from 0"),
        (["core-heads", "--out", "x", "--draws", "0"], "--draws: expected a whole number of at least 1"),
        (["paper", "--out", "x", "--jobs", "0"], "--jobs: expected a whole number of at least 1"),
    ],
)  # fmt: skip
def test_a_wrong_word_or_number_is_named_with_the_right_one(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not Path("x").exists()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["run", "smal", "--out", "{}/new"], "no experiment 'smal'; the nearest: 'small'"),
        (["run", "small", "--model", "micr", "--out", "{}/new"], "micr"),
        (["run", "small", "--model", "./micr", "--data", "{}/data", "--out", "{}/new"], "there is no folder './micr'"),
        (["run", "small", "--model", "micro", "--data", "{}/none", "--out", "{}/new"], "no folder of examples"),
        (["run", "small", "--model", "micro", "--out", "{}/file"], "file"),
        (["core-heads", "--out", "{}/file"], "file' is a file"),
        (["core-heads", "--out", "{}/file/new"], "file"),
        (["paper", "--out", "{}/file"], "file' is a file"),
        (["paper", "--out", "{}/new", "--experiments", "smal"], "no experiment 'smal'; the nearest: 'small'"),
        (["rerun", "{}/none"], "there is no folder"),
        (["rerun", "{}/data"], "there is no run in"),
        (["families", "--csv", "{}/data"], "expected the path of a file to write"),
        (["families", "--csv", "{}/none/families.csv"], "there is no folder"),
        (["core-heads", "--out", "{}/new", "--dtype", "floot32"], "no dtype 'floot32'; the nearest: 'float32'"),
        (["core-heads", "--out", "{}/new", "--selection-share", "1"], "selection_share is 1.0"),
        (["run", "small", "--out", "{}/new", "--set", "n_heads=1", "n_heads=2"], "gives the setting 'n_heads' twice"),
        (["prefill-speed", "--heads", "{}/file", "--lengths", "64", "--out", "{}/new"], "cannot be read as parquet"),
        (["prefill-speed", "--heads", "{}/none", "--lengths", "64", "--out", "{}/new"], "no head scores at"),
        (["core-heads", "--out", "{}/new", "--attn-implementation", "spda"], "spda"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    mmlens.data.save_examples(mmlens.scene_examples("objects", 4, 3), tmp_path / "data")
    assert main([part.format(tmp_path) for part in given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mmlens: ") and message in error and "Traceback" not in error
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "new").exists()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Tests that run in the background are started with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("small", "ctrl_c")
@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_one_line_and_leaves_the_run_before(
    stop: signal.Signals,
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = ["run", "small", "--model", "micro", "--out", str(tmp_path / "out"), *SIZES]
    stopped = dataclasses.replace(
        small_experiment.EXPERIMENT, method="Nothing.", run=lambda setup: signal.raise_signal(stop)
    )
    with monkeypatch.context() as patched:
        patched.setitem(small_experiment.catalog.EXPERIMENTS, "small", stopped)
        assert main(given) == code
        assert not (tmp_path / "out").exists()
    assert capsys.readouterr().err.splitlines()[-1] in ("mmlens: interrupted", "mmlens: terminated")
    assert main(given) == 0
    monkeypatch.setitem(small_experiment.catalog.EXPERIMENTS, "small", stopped)
    assert main(given) == code
    assert broken_parts(tmp_path / "out/micro") == [] and not (tmp_path / "out/micro/.lock").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def started(*given: str) -> subprocess.Popen[str]:
    code = "import mmlens_command, sys; sys.exit(mmlens_command.main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *given],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)


def error_after(command: subprocess.Popen[str], stop: signal.Signals) -> str:
    """What it writes until it ends. Python drops what a signal raises inside a `__del__`: it is then given again."""
    for _ in range(5):
        try:
            return command.communicate(timeout=20)[1]
        except subprocess.TimeoutExpired:
            os.killpg(command.pid, stop)
    return command.communicate(timeout=120)[1]


@pytest.mark.slow
@pytest.mark.minutes
@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_command_stopped_from_outside_can_be_given_again(
    tmp_path: Path, stop: signal.Signals, jobs: str
) -> None:
    copy = shutil.copytree(Path(mmlens.__file__).parent / "shipped/micro", tmp_path / "copy")
    out = tmp_path / "out"
    given = ["paper", "--model", "micro", str(copy), "--out", str(out), *SIZES, "--threads", "1", "--jobs", jobs,
             "--experiments", "masking"]  # fmt: skip
    command = started(*given)
    wait_for(out / "masking/micro/.partial")
    # As a terminal does it: to every process of the command.
    os.killpg(command.pid, stop)
    error = error_after(command, stop)
    if stop != signal.SIGKILL:
        assert command.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[stop], error
        assert error.count("mmlens: ") == 1, error
        assert "Traceback" not in error or "Exception ignored in" in error, error
        assert not list(out.rglob(".lock")) and not list(out.rglob(".partial"))
    assert not list(out.rglob("run.json"))
    assert main([*given[:-1], "head-map"]) == 0
    assert all(broken_parts(path.parent) == [] for path in out.rglob("run.json"))


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.3, 1, 3])
def test_ctrl_c_before_anything_has_begun_is_one_line(tmp_path: Path, seconds: float) -> None:
    command = started("core-heads", "--out", str(tmp_path / "out"))
    time.sleep(seconds)
    command.send_signal(signal.SIGINT)
    error = error_after(command, signal.SIGINT)
    if "mmlens_command" in error or command.returncode < 0:
        pytest.skip("the interpreter itself had not started yet")
    assert command.returncode == 130 and error.splitlines()[-1] == "mmlens: interrupted", error
    assert "Traceback" not in error or "Exception ignored in" in error, error
    assert not (tmp_path / "out").exists()
