"""Reading files that somebody else may have written, and writing so that nothing half-written is ever seen."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from mmlens.errors import InvalidValueError, MissingFileError


def parsed_json(text: str) -> Any:
    """JSON as its standard has it: a key that stands twice, NaN and Infinity are errors, as is nesting without end.

    >>> parsed_json('{"id": "a", "id": "b"}')
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidValueError: the key 'id' stands twice in one object
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise InvalidValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InvalidValueError(f"the key {key!r} stands twice in one object")
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise InvalidValueError(f"{name} is no JSON; write null for what is not known")


def read_json(path: Path, error: Callable[[str], Exception] = InvalidValueError) -> Any:
    """What a JSON file holds; `error(message)` is raised, the file named, where it cannot be read or is no JSON."""
    try:
        return parsed_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as reason:
        raise error(
            f"{str(path)!r} cannot be read as JSON ({reason}): it is broken or was cut off"
        ) from reason


def path_within(folder: Path, name: object, what: str) -> Path:
    """`folder / name` where `name` is a relative path of something below the folder, symbolic links followed.

    Raises InvalidValueError for anything else: an absolute path, "..", ".", a link that leads out of the folder.

    >>> path_within(Path("run"), "../secrets", "a file of the run")
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidValueError: a file of the run is '../secrets'; expected a path below the folder 'run'
    """
    expected = f"expected a path below the folder {str(folder)!r}"
    if not isinstance(name, str) or not name or "\0" in name:
        raise InvalidValueError(f"{what} is {name!r}; {expected}")
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).anchor:
        raise InvalidValueError(f"{what} is {name!r}; {expected}")
    path = folder / name
    try:
        leads_out = not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as reason:
        raise InvalidValueError(f"{what} is {name!r}, which leads nowhere: {reason}") from reason
    if leads_out:
        raise InvalidValueError(f"{what} is {name!r}, a link that leads out of the folder {str(folder)!r}")
    return path


def make_folder(folder: Path, error: Callable[[str], Exception] = InvalidValueError) -> None:
    """Make a folder and those above it where they are not there; `error` where one of them is a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as reason:
        file = next(path for path in (folder, *folder.parents) if path.is_file())
        raise error(
            f"{str(file)!r} is a file; expected a folder to write to, or a name that is free"
        ) from reason


def read_parquet(path: Path, error: Callable[[str], Exception] = InvalidValueError) -> pd.DataFrame:
    """A table; `error`, the file named, where it is missing, broken or was cut off."""
    if not path.is_file():
        raise MissingFileError(f"there is no file {str(path)!r}; expected a table in parquet")
    try:
        return pd.read_parquet(path)
    # pyarrow has errors of its own for every way in which a file can be broken.
    except Exception as reason:
        raise error(
            f"{str(path)!r} cannot be read as parquet ({reason}): it is broken or was cut off"
        ) from reason


def sha256(path: Path) -> str:
    """The hash of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text_at_once(path: Path, text: str) -> None:
    """Write a text file so that at every moment the old text or the new one stands there, whole."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED, delete=False
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            # Temporary files are for their owner alone; what is written here is as open as any other file.
            umask = os.umask(0)
            os.umask(umask)
            Path(file.name).chmod(0o666 & ~umask)
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise


UNFINISHED = ".unfinished"
"""Ends the name of a file that is being written; one that is left over was cut off, and holds nothing of worth."""
