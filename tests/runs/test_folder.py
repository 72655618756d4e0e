"""A run's folder is whole or no run, wherever its process is killed, and one process at a time writes to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from mmlens.files import write_text_at_once
from mmlens.runs.folder import (
    any_files,
    broken_parts,
    check_folder,
    finish_moving,
    interrupted_runs,
    is_run,
    locked,
    written_at_once,
)
from mmlens.runs.record import RunError

OLD = {"numbers.json": "old", "tables/heads.csv": "old", "figures/old.svg": "old"}
NEW = {
    "numbers.json": "new",
    "tables/heads.csv": "new",
    "tables/modes.csv": "new",
    "per_example/x.csv": "new",
}


def write(out: Path, files: dict[str, str]) -> None:
    with written_at_once(out, "run.json") as (folder, record):
        record["schema"] = "mmlens.run/1"
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)


def files_of(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "run.json"
    }


def forked(does: Callable[[], None]) -> int:
    """Do something in a process of its own, and return its number."""
    pid = os.fork()
    if pid == 0:
        try:
            does()
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
    return pid


def killed_at(moment: int, does: Callable[[], None]) -> bool:
    """Do something in a process that kills itself at its n-th dealing with files; False where there are fewer."""
    events = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}

    def counted() -> None:
        seen = 0

        def hook(event: str, _: object) -> None:
            nonlocal seen
            seen += event in events
            # os.kill is an event too.
            if event in events and seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        does()

    _, status = os.waitpid(forked(counted), 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert status == 0
    return False


EVERY = pytest.param(1, marks=pytest.mark.slow)


@pytest.mark.parametrize("stride", [7, EVERY])
@pytest.mark.parametrize("before", [{}, OLD])
def test_a_run_killed_at_any_moment_is_whole_or_none_and_can_be_done_again(
    tmp_path: Path, before: dict[str, str], stride: int
) -> None:
    moment, seen = 0, set()
    while True:
        moment += stride
        out = tmp_path / str(moment) / "run"
        if before:
            write(out, before)
            (out / "notes.txt").write_text("mine")
        mine = {"notes.txt": "mine"} if before else {}
        if not killed_at(moment, lambda out=out: write(out, NEW)):
            break
        if is_run(out):
            assert broken_parts(out) == []
            listed = json.loads((out / "run.json").read_text())["files"]
            assert {(out / name).read_text() for name in listed} in ({"old"}, {"new"})
            seen.add((out / listed[0]).read_text())
        elif out.is_dir():
            seen.add("none")
            if (out / ".complete/run.json").is_file():
                assert interrupted_runs(tmp_path / str(moment)) == [out]
                finish_moving(out)
                assert broken_parts(out) == [] and files_of(out).items() >= NEW.items()
                seen.add("finished")
        check_folder(out)
        write(out, NEW)
        assert broken_parts(out) == [] and files_of(out) == {**NEW, **mine}
    assert moment > 30 and (stride > 1 or seen >= {"none", "new", "finished", *({"old"} if before else ())})


@pytest.mark.parametrize("stride", [11, EVERY])
def test_a_kill_while_a_killed_run_is_finished_leaves_no_folder_that_is_refused(
    tmp_path: Path, stride: int
) -> None:
    def prepared(out: Path) -> Path:
        write(out, OLD)
        # Killed where half of the files have been moved.
        moves = []

        def hook(event: str, _: object) -> None:
            moves.append(event == "os.rename")
            if moves[-1] and sum(moves) == 4:
                os.kill(os.getpid(), signal.SIGKILL)

        def does() -> None:
            sys.addaudithook(hook)
            write(out, NEW)

        os.waitpid(forked(does), 0)
        assert not is_run(out) and (out / ".complete").is_dir()
        return out

    def fails(out: Path) -> None:
        with written_at_once(out, "run.json"):
            raise KeyboardInterrupt

    moment = 0
    while True:
        moment += stride
        out = prepared(tmp_path / str(moment))
        killed = killed_at(moment, lambda out=out: write(out, {"numbers.json": "newer"}))
        check_folder(out)
        with pytest.raises(KeyboardInterrupt):
            fails(out)
        assert is_run(out) and broken_parts(out) == []
        if not killed:
            break
    assert moment > 30


def test_a_run_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), written_at_once(tmp_path / "a/b", "run.json"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "run", OLD)
    with pytest.raises(KeyboardInterrupt), written_at_once(tmp_path / "run", "run.json") as (folder, _):
        (folder / "numbers.json").write_text("new")
        raise KeyboardInterrupt
    assert files_of(tmp_path / "run") == OLD and broken_parts(tmp_path / "run") == []


def test_a_second_process_is_refused_by_name_and_a_dead_one_is_none(tmp_path: Path) -> None:
    reading, writing = os.pipe()

    def hold() -> None:
        with locked(tmp_path / "run"):
            os.write(writing, b"x")
            time.sleep(600)

    holder = forked(hold)
    os.read(reading, 1)
    with pytest.raises(RunError, match=f"process {holder} on '{socket.gethostname()}'"):
        write(tmp_path / "run", NEW)
    with pytest.raises(RunError, match="is being written by"), locked(tmp_path / "run"):
        pass
    # Another folder beside it is free, and so is this one when its holder is dead.
    write(tmp_path / "other", NEW)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert (tmp_path / "run/.lock").exists()
    check_folder(tmp_path / "run")
    write(tmp_path / "run", NEW)
    assert files_of(tmp_path / "run") == NEW


def test_what_is_broken_is_named(tmp_path: Path) -> None:
    write(tmp_path, NEW)
    assert broken_parts(tmp_path) == []
    (tmp_path / "numbers.json").write_text("ne")
    (tmp_path / "tables/heads.csv").unlink()
    assert [text.split(" ")[0] for text in broken_parts(tmp_path)] == ["numbers.json", "tables/heads.csv"]
    assert "cut off or changed" in broken_parts(tmp_path)[0] and "missing" in broken_parts(tmp_path)[1]
    record = (tmp_path / "run.json").read_text()
    for cut in (0, 1, 20, len(record) // 2, len(record) - 1):
        (tmp_path / "run.json").write_text(record[:cut])
        assert "run.json cannot be used" in broken_parts(tmp_path)[0]
        check_folder(tmp_path)
    write(tmp_path, NEW)
    assert broken_parts(tmp_path) == []


def test_folders_of_others_are_refused_and_empty_ones_are_not(tmp_path: Path) -> None:
    check_folder(tmp_path)
    check_folder(tmp_path / "none")
    for name, text in (("run.json", "[]"), ("run.json", '{"name": "other tool"}'), ("run.json", "speed: 3")):
        folder = tmp_path / str(abs(hash(text)))
        folder.mkdir()
        (folder / name).write_text(text)
        with pytest.raises(RunError, match="is no record of what was written there"):
            check_folder(folder)
    with pytest.raises(RunError, match="is a file"):
        check_folder(folder / "run.json")
    (folder / "run.json").rename(folder / "precious.txt")
    with pytest.raises(RunError, match="holds files but no run.json"):
        check_folder(folder)


def test_a_text_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    moment = 0
    while True:
        moment += 1
        path.write_text("old")
        killed = killed_at(moment, lambda: write_text_at_once(path, "new"))
        assert path.read_text() in ("old", "new")
        if not killed:
            break
    assert moment > 2 and path.read_text() == "new"
    path.unlink()
    assert not any_files(tmp_path)
    write_text_at_once(path, "new")
    (tmp_path / "plain.txt").write_text("x")
    assert path.stat().st_mode == (tmp_path / "plain.txt").stat().st_mode
