"""Repeat a run from its record, and compare every number."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mmlens.arguments import flag, number
from mmlens.experiments.experiment import Experiment
from mmlens.files import read_json, sha256
from mmlens.provenance import EDITED, code_fingerprint, versions
from mmlens.runs.folder import check_folder, finish_moving, interrupted_runs
from mmlens.runs.record import RunError, check_harmless, check_settings, read_record, threads_of
from mmlens.runs.run import Prepared, experiment_named, full_settings, prepare, read_table, request_of, run

TOLERANCE = 1e-6

_SMALL = 1e-6
"""Numbers smaller than this are compared as if they were this large: rounding leaves 1e-17 for 0."""


@dataclass(frozen=True)
class Difference:
    """One place where two runs differ; `relative` is None where what stands there is no pair of floats."""

    path: str
    before: Any
    after: Any
    relative: float | None = None

    def __str__(self) -> str:
        by = "" if self.relative is None else f" (by {self.relative:.2g})"
        return f"{self.path}: was {self.before!r}, is {self.after!r}{by}"


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side: where they differ, how many values were compared, and the largest difference.

    `largest` is the largest relative difference of two floats, those within the tolerance too, and `largest_at`
    where it is. `changed` names the versions, code and machine that are not what they were, and the files that are not
    as they were written: name -> (was, is).
    """

    differences: tuple[Difference, ...]
    n_values: int
    largest: float
    largest_at: str
    changed: dict[str, tuple[str, str]]

    @property
    def same(self) -> bool:
        """Whether no value differs by more than the tolerance."""
        return not self.differences


def rerun(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    tolerance: float = TOLERANCE,
    model: str | None = None,
    data: str | None = None,
    data_dir: str | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
    images_outside: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Comparison:
    """Run again what a folder's `run.json` says, with the same settings, seed and threads, and compare the results.

    The new run is kept where `out` is given. `model` and `data` say where these lie now, if not where they lay, and
    `data_dir` where the published files of a data set by name do.
    A record is a file that anybody may have written, so some things count only where they are given here:
    `trust_remote_code` (code that lies in the model's folder), `images_outside` (images anywhere), `threads` beyond
    the cores of this machine, and `settings` above a million, which take the place of the record's.

    Raises RunError where the weights or the examples are not those of the run, `out` is the run itself, or the record
    asks for what has to be given here.
    """
    folder = Path(folder)
    finish_moving(folder)
    number("tolerance", tolerance, least=0)
    flag("trust_remote_code", trust_remote_code)
    if out is not None and Path(out).resolve() == folder.resolve():
        raise RunError("the new run would replace the one that it is compared with: give another folder")
    if out is not None:
        check_folder(Path(out))
    record = read_record(folder)
    check_harmless(record, folder, trust_remote_code=trust_remote_code)
    request = request_of(record)
    given = dict(settings or {})
    check_settings({name: value for name, value in request.settings.items() if name not in given})
    request = replace(
        request,
        model=model or request.model,
        data=data or request.data,
        data_dir=data_dir or request.data_dir,
        threads=threads_of(record) if threads is None else threads,
        trust_remote_code=trust_remote_code,
        images_outside=images_outside,
        settings={**request.settings, **given},
    )
    full_settings(experiment_named(request.experiment), request.settings)
    prepared = prepare(request)
    _check_fingerprints(record, prepared)
    # The record's name, wherever the model lies now.
    prepared.model_record["name"] = record["model"]["name"]
    command = f"mmlens rerun {folder}"
    if out is not None:
        return compare(
            folder, run(request, out, prepared=prepared, command=command, progress=progress), tolerance
        )
    with tempfile.TemporaryDirectory() as place:
        again = run(request, Path(place) / "run", prepared=prepared, command=command, progress=progress)
        return compare(folder, again, tolerance)


def compare(before: str | Path, after: str | Path, tolerance: float = TOLERANCE) -> Comparison:
    """Compare the results of two runs value by value: floats within `tolerance`, all else exactly.

    The difference of floats a and b is |a - b| / max(|a|, |b|, 1e-6).
    """
    old, new = read_record(before), read_record(after)
    found: list[Difference] = []
    n_values, largest, largest_at = 0, 0.0, ""
    for name in dict.fromkeys((*old["results"], *new["results"])):
        if name not in new["results"] or name not in old["results"]:
            found.append(Difference(name, *_presence(name in old["results"])))
            continue
        one, other = (_read(Path(folder) / name) for folder in (before, after))
        for difference in _differences(one, other, f"{name}: "):
            n_values += 1
            if difference.relative is None:
                if difference.before != difference.after:
                    found.append(difference)
                continue
            if difference.relative > largest:
                largest, largest_at = difference.relative, difference.path
            if difference.relative > tolerance:
                found.append(difference)
    altered = {
        f"{name} in {str(folder)!r}": ("as it was written", "cut off or changed since")
        for folder, record in ((before, old), (after, new))
        for name, checksum in record.get("checksums", {}).items()
        if name in record["results"] and sha256(Path(folder) / name) != checksum
    }
    return Comparison(tuple(found), n_values, largest, largest_at, {**altered, **changed(old, new)})


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Which versions, code and machine differ between two records: name -> (was, is)."""

    def parts(record: Mapping[str, Any]) -> dict[str, str]:
        machine = {name: str(value) for name, value in record["machine"].items()}
        return {**record["versions"], "code of the experiment": record["code"], **machine}

    one, other = parts(old), parts(new)
    return {
        name: (one.get(name, "-"), other.get(name, "-"))
        for name in dict.fromkeys((*one, *other))
        if one.get(name) != other.get(name)
    }


def is_current(record: Mapping[str, Any], experiment: Experiment) -> bool:
    """Whether a run's versions and the source of its experiment are those that would run now, and known for sure."""
    code = record["code"]
    return bool(
        record["versions"] == versions()
        and not code.endswith(EDITED)
        and code == code_fingerprint(experiment.run)
    )


def runs_in(folder: str | Path) -> list[Path]:
    """The folder, if it is a run, else all runs below it. RunError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"there is no folder {str(folder)!r}")
    for path in interrupted_runs(folder):
        finish_moving(path)
    if (folder / "run.json").is_file():
        return [folder]
    found = sorted(
        path.parent
        for path in folder.rglob("run.json")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise RunError(f"there is no run in {str(folder)!r}: no run.json")
    return found


def _check_fingerprints(record: Mapping[str, Any], prepared: Prepared) -> None:
    was, now = record["model"]["fingerprint"], prepared.model_record["fingerprint"]
    if was != now:
        raise RunError(
            f"the model {record['model']['name']!r} is not the one of the run: the fingerprint of its weights was "
            f"{was} and is {now}"
        )
    for split in ("selection", "evaluation"):
        was, now = record["data"][split]["fingerprint"], prepared.data_record[split]["fingerprint"]
        if was != now:
            raise RunError(
                f"the data of the {split} split are not those of the run: their fingerprint was {was} and is {now} "
                f"({record['data'][split]['n']} examples then, {prepared.data_record[split]['n']} now)"
            )


def _read(path: Path) -> Any:
    if not path.is_file():
        raise RunError(f"the run lacks {str(path)!r}, which its record names")
    if path.suffix == ".parquet":
        table = read_table(path)
        if not isinstance(table.index, pd.RangeIndex):
            table = table.reset_index()
        return {str(column): table[column].tolist() for column in table}
    content = read_json(path, RunError)
    if not isinstance(content, dict):
        raise RunError(f"{str(path)!r} holds no results: {content!r:.60}")
    # A summary notes versions among its numbers; they are compared apart.
    return {key: value for key, value in content.items() if key != "versions"}


def _differences(one: Any, other: Any, path: str) -> Iterator[Difference]:
    """Every pair of values with its difference; those that are there once only, with None for the other."""
    one, other = (value.tolist() if isinstance(value, np.ndarray) else value for value in (one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in dict.fromkeys((*one, *other)):
            where = f"{path}{key}" if path.endswith(": ") else f"{path}.{key}"
            if key in one and key in other:
                yield from _differences(one[key], other[key], where)
            else:
                yield Difference(where, *_presence(key in one))
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            yield Difference(path, f"{len(one)} values", f"{len(other)} values")
        for index, (first, second) in enumerate(zip(one, other, strict=False)):
            yield from _differences(first, second, f"{path}[{index}]")
    elif isinstance(one, float) and isinstance(other, float):
        if np.isfinite(one) and np.isfinite(other):
            yield Difference(path, one, other, abs(one - other) / max(abs(one), abs(other), _SMALL))
        else:
            yield Difference(path, repr(one), repr(other))
    elif type(one) is not type(other):
        yield Difference(path, f"{one!r} ({type(one).__name__})", f"{other!r} ({type(other).__name__})")
    else:
        yield Difference(path, one, other)


def _presence(before: bool) -> tuple[str, str]:
    return ("there", "absent") if before else ("absent", "there")
