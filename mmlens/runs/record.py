"""What `run.json` says, read as what it is: a file that anybody may have written.

Every field that is used is checked for its type, every path for staying inside the folder. What could harm whoever
repeats a run (code of a model's own, numbers of threads, counts without end) counts only where the caller gives it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mmlens.arguments import instance_of, number, whole_number
from mmlens.errors import InvalidTypeError, InvalidValueError
from mmlens.files import path_within, read_json

SCHEMA = "mmlens.run/1"

MOST = 1_000_000
"""The largest whole number among a record's settings that is taken from it; larger ones are typed anew."""


class RunError(InvalidValueError):
    """A folder that is no run, a run that cannot be repeated, or results that cannot be written."""


def read_record(folder: str | Path) -> dict[str, Any]:
    """What `run.json` of a folder says. RunError where there is none, one of another schema, or a field is wrong."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise RunError(f"there is no run in {str(folder)!r}: no run.json")
    record = read_json(path, RunError)
    if not isinstance(record, dict) or "schema" not in record:
        raise RunError(f"{str(path)!r} is no record of a run: it names no schema")
    if record["schema"] != SCHEMA:
        raise RunError(f"{str(path)!r} has the schema {record['schema']!r}; this version reads {SCHEMA!r}")
    try:
        _check("", record, _FIELDS)
        for name in ("results", "files"):
            for file in record[name]:
                path_within(Path(folder), file, f"one of {name}")
    except (InvalidValueError, InvalidTypeError) as error:
        raise RunError(f"{str(path)!r} is no record of a run: {error}") from error
    return record


def threads_of(record: Mapping[str, Any]) -> int:
    """The number of threads of a run, where this machine has as many; else 0, torch's own choice."""
    threads = int(record["machine"]["threads"])
    return threads if threads <= (os.cpu_count() or 1) else 0


def check_harmless(record: Mapping[str, Any], folder: Path, *, trust_remote_code: bool) -> None:
    """Raise RunError where a record asks for what only whoever repeats the run may ask for."""
    request = record["request"]
    where = f"the run in {str(folder)!r}"
    if request.get("trust_remote_code") and not trust_remote_code:
        raise RunError(
            f"{where} ran code that lies in the model's folder ({request.get('model')!r}). A record cannot allow that: "
            "read the code, and give --trust-remote-code (trust_remote_code=True) if you trust it"
        )
    attention = request.get("attn_implementation")
    if isinstance(attention, str) and "/" in attention and not trust_remote_code:
        raise RunError(
            f"{where} used the attention {attention!r}, code from the hub. A record cannot allow that: give "
            "--trust-remote-code (trust_remote_code=True) if you trust it"
        )
    if request.get("data") is None:
        for name in ("selection", "evaluation"):
            asked, listed = request.get(f"n_{name}", 0), len(record["data"][name]["ids"])
            if isinstance(asked, int) and asked > max(listed, 1):
                raise RunError(
                    f"{where} asks for {asked} examples of each kind for {name} and lists {listed} ids"
                )


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise RunError for a whole number among a record's settings that would keep a machine busy without end."""
    for name, value in settings.items():
        for member in _leaves(value):
            if isinstance(member, int) and abs(member) > MOST and "seed" not in name:
                raise RunError(
                    f"the record's setting {name} is {member}; above {MOST:,} it counts only where you type it: "
                    f"--set {name}={member}"
                )


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for inner in value.values() for leaf in _leaves(inner)]
    if isinstance(value, list | tuple):
        return [leaf for inner in value for leaf in _leaves(inner)]
    return [value]


# ---------------------------------------------------------------------- fields

Check = Callable[[str, Any], Any]


_whole = partial(whole_number, least=0)
_number = partial(number, least=0)


def _text(name: str, value: Any) -> None:
    instance_of(name, value, str, "a text")


def _object(name: str, value: Any) -> None:
    instance_of(name, value, dict, "an object")


def _listed(of: Check) -> Check:
    def check(name: str, value: Any) -> None:
        instance_of(name, value, list, "a list")
        for index, member in enumerate(value):
            of(f"{name}[{index}]", member)

    return check


def _mapped(of: Check) -> Check:
    def check(name: str, value: Any) -> None:
        _object(name, value)
        for key, member in value.items():
            of(f"{name}.{key}", member)

    return check


def _check(name: str, value: Any, fields: Mapping[str, Any] | Check) -> None:
    """Check a value by its function, or an object by those of its fields; names that end in "?" may be absent."""
    if not isinstance(fields, Mapping):
        fields(name, value)
        return
    _object(name or "the record", value)
    for key, inner in fields.items():
        field = key.removesuffix("?")
        where = f"{name}.{field}" if name else field
        if field in value:
            _check(where, value[field], inner)
        elif not key.endswith("?"):
            raise InvalidValueError(f"the field {where} is missing")


_SPLIT = {
    "n": _whole,
    "n_by_kind": _mapped(_whole),
    "controls": _listed(_text),
    "fingerprint": _text,
    "ids": _listed(_text),
}

_FIELDS: dict[str, Any] = {
    "command": _text,
    "request": _object,
    "experiment": {
        "title": _text,
        "source": _text,
        "question": _text,
        "method": _text,
        "cites": _listed(_text),
    },
    "model": {
        "name": _text,
        "family": _text,
        "n_layers": _whole,
        "n_heads": _whole,
        "heads_per_layer?": _listed(_whole),
        "n_parameters": _whole,
        "fingerprint": _text,
    },
    "data": {"source": _text, "selection": _SPLIT, "evaluation": _SPLIT},
    "versions": _mapped(_text),
    "code": _text,
    "machine": {"platform": _text, "threads": _whole, "device": _text, "dtype": _text},
    "started": _text,
    "seconds": _number,
    "statement": _text,
    "results": _listed(_text),
    "files": _listed(_text),
    "checksums?": _mapped(_text),
}
