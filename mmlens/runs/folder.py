"""A run's folder: written whole or not at all, by one process at a time, and checked against what was written.

1. Files are written to `.partial`. A process that dies meanwhile leaves nothing that counts.
2. When all are there, and a record that lists them with their hashes, `.partial` is renamed to `.complete`. From then
   on the run is whole, wherever a process dies.
3. The record of the run that was there is set aside, its files are removed, the new files are moved, the record last.
   Whoever finds `.complete` finishes this. So a record stands in the folder only beside all files that it lists.

Broken disks and editors are left: `broken_parts` compares every file with its hash.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

from mmlens.errors import InvalidValueError
from mmlens.files import UNFINISHED, path_within, read_json, sha256
from mmlens.runs.record import RunError

_PARTIAL = ".partial"
_COMPLETE = ".complete"
_LOCK = ".lock"
_BEFORE = ".before.json"
"""Within `.complete`: the record of the run that is being replaced."""


def check_folder(out: Path, record: str = "run.json") -> None:
    """Raise RunError where `out` is a file, or a folder with files but without a record of what wrote them.

    A record that was cut off is one all the same, so that its folder can be used again.
    """
    if out.exists() and not out.is_dir():
        raise RunError(f"{str(out)!r} is a file; a run is written to a folder")
    if not out.is_dir():
        return
    begun = any((out / name).is_dir() for name in (_PARTIAL, _COMPLETE))
    if (out / record).exists():
        if not is_ours(out / record, "files"):
            raise RunError(f"{str(out / record)!r} is no record of what was written there: it lists no files")
    elif not begun and any_files(out):
        raise RunError(f"the folder {str(out)!r} holds files but no {record}: give a new folder, or empty it")


def any_files(folder: Path) -> bool:
    """Whether a folder holds anything but what a process that was cut off leaves."""
    own = (_PARTIAL, _COMPLETE, _LOCK)
    return any(path.name not in own and not path.name.endswith(UNFINISHED) for path in folder.iterdir())


def is_ours(path: Path, field: str, value: object = None) -> bool:
    """Whether a JSON file is one that mmlens wrote: it has the field (with that value), or was cut off before."""
    try:
        content = read_json(path)
    except InvalidValueError:
        start = path.read_bytes()[:200].strip(b"\0 \n\r\t")
        first = b'{\n "schema": "mmlens.'
        return start[: len(first)] == first[: len(start)]
    return isinstance(content, dict) and field in content and value in (None, content[field])


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run that was written whole."""
    return (folder / "run.json").is_file()


def broken_parts(folder: Path, record: str = "run.json") -> list[str]:
    """What of a run's files is missing, cut off or changed since it was written, each in words; [] where nothing is."""
    try:
        content = read_json(folder / record, RunError)
        checksums = content["checksums"]
        names = {path_within(folder, name, "one of files"): name for name in content["files"]}
    except (InvalidValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{record} cannot be used: {error}"]
    broken = []
    for path, name in names.items():
        if not path.is_file():
            broken.append(f"{name} is missing")
        elif sha256(path) != checksums.get(name):
            broken.append(
                f"{name} is not as it was written: cut off or changed ({path.stat().st_size:,} bytes)"
            )
    return broken


# ---------------------------------------------------------------------- one process at a time


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; it is made where there is none, and removed where an error leaves it empty.

    The operating system drops the lock of a process that dies. Raises RunError, the holder named, where it is held.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _held(folder / _LOCK):
            yield
    except BaseException:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        raise


@contextmanager
def _held(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise RunError(
            f"the folder {str(path.parent)!r} is being written by {_holder(path)}: wait for it, or give another folder"
        ) from None
    try:
        # A file system without locks has filelock's own, which notes the same.
        if not isinstance(lock, SoftFileLock):
            path.write_text(f"{os.getpid()}\n{socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        # While it is held: whoever opened the file meanwhile finds it unlinked, and makes a new one.
        with suppress(OSError):
            path.unlink()
        lock.release()


def _holder(path: Path) -> str:
    with suppress(OSError, ValueError):
        pid, host, *_ = path.read_text(encoding="utf-8").split()
        return f"process {int(pid)} on {host!r:.80}"
    return "another process"


# ---------------------------------------------------------------------- whole or not at all


@contextmanager
def written_at_once(out: Path, name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder to write to and a record to fill; both reach `out` if nothing is raised, and neither else.

    The record, a file of that name, lists the files with their hashes. Raises RunError where another process writes
    to `out`.
    """
    with locked(out):
        _finish(out, name)
        partial = out / _PARTIAL
        _remove(partial)
        partial.mkdir()
        record: dict[str, Any] = {}
        try:
            yield partial, record
        except BaseException:
            _remove(partial)
            raise
        files = sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file())
        record = {**record, "files": files, "checksums": {file: sha256(partial / file) for file in files}}
        (partial / name).write_text(json.dumps(record, indent=1, allow_nan=False), encoding="utf-8")
        os.replace(partial, out / _COMPLETE)
        _finish(out, name)


def finish_moving(folder: Path, name: str = "run.json") -> None:
    """Move the files of a run that was whole when its process died. RunError where another process is at it."""
    if (folder / _COMPLETE).is_dir():
        with _held(folder / _LOCK):
            _finish(folder, name)


def interrupted_runs(folder: Path) -> list[Path]:
    """The folders at or below one whose runs were whole when their processes died, their files not yet moved."""
    return [path.parent for path in folder.rglob(_COMPLETE) if path.is_dir()]


def _finish(out: Path, name: str) -> None:
    """Move what lies in `.complete`, from wherever that stopped."""
    complete = out / _COMPLETE
    if not (complete / name).is_file():
        _remove(complete)
        return
    try:
        new = read_json(complete / name, RunError)["files"]
        moves = [(path_within(complete, file, "a file"), path_within(out, file, "a file")) for file in new]
    except (InvalidValueError, KeyError, TypeError):
        # What was to be a record is none: the folder stays one in which a run was begun.
        _remove(out / _PARTIAL)
        os.replace(complete, out / _PARTIAL)
        return
    if (out / name).is_file():
        os.replace(out / name, complete / _BEFORE)
    if (complete / _BEFORE).is_file():
        _remove_files(out, complete / _BEFORE, keep={target for _, target in moves})
    for source, target in moves:
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
    os.replace(complete / name, out / name)
    _remove(complete)


def _remove_files(folder: Path, record: Path, keep: set[Path]) -> None:
    """Remove the files below a folder that a record lists, and the folders that this empties; other files stay."""
    removed = set()
    for path in _listed_files(folder, record) - keep:
        path.unlink()
        removed.add(path.parent)
    for parent in sorted(removed - {folder}, reverse=True):
        if not any(parent.iterdir()):
            parent.rmdir()


def _listed_files(folder: Path, record: Path) -> set[Path]:
    """The files below the folder that a record lists; whatever else it lists is none of a run's, and left alone."""
    found: set[Path] = set()
    with suppress(InvalidValueError, KeyError, TypeError):
        for file in read_json(record)["files"]:
            with suppress(InvalidValueError):
                path = path_within(folder, file, "one of files")
                if path.is_file() and not path.is_relative_to(folder / _COMPLETE):
                    found.add(path)
    return found


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.is_dir():
        shutil.rmtree(folder)
