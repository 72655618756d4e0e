"""Runs of experiments: a folder each that says what was run on what, and holds all that a rerun is compared by.

docs/experiments.md lists the files. `Request` is what was asked for and `run` carries it out.
"""

from __future__ import annotations

import json
import math
import numbers
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from mmlens.arguments import flag, instance_of, number, unknown_name_message, whole_number
from mmlens.data.examples import Example
from mmlens.errors import InvalidTypeError, InvalidValueError
from mmlens.experiments.catalog import EXPERIMENTS
from mmlens.experiments.experiment import Experiment, Findings, Setup, check_answers
from mmlens.files import path_within, read_json, read_parquet
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.loading import shipped_models
from mmlens.provenance import code_fingerprint, describe_model, machine, versions
from mmlens.runs.data import cites, is_published, splits
from mmlens.runs.folder import check_folder, written_at_once
from mmlens.runs.methods import bibliography, filled_method, methods_text
from mmlens.runs.record import SCHEMA, RunError
from mmlens.runs.record import read_record as read_record
from mmlens.runs.report import pictures_of, write_findings_report
from mmlens.runs.request import Request
from mmlens.viz.pictures import picture_files


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model and its two splits, loaded, with what a run's record says of them."""

    model: HookedVLM
    selection: list[Example]
    evaluation: list[Example]
    model_record: dict[str, Any]
    data_record: dict[str, Any]


def experiment_named(name: str) -> Experiment:
    """The experiment of that name; ValueError with the nearest name where there is none.

    >>> experiment_named("core-heads").settings["n_draws"]
    10
    """
    if name not in EXPERIMENTS:
        raise InvalidValueError(
            unknown_name_message("experiment", name, EXPERIMENTS) + ". `mmlens experiments` lists them all"
        )
    return EXPERIMENTS[name]


def full_settings(experiment: Experiment, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of an experiment: its defaults, and over them those given (lists, as JSON has them, as tuples).

    Raises ValueError for a setting that the experiment does not have, TypeError for one of another type than its
    default.
    """
    defaults = experiment.settings
    for name, value in given.items():
        if name not in defaults:
            raise InvalidValueError(unknown_name_message(f"{experiment.name} setting", name, defaults))
        if value is not None or name not in experiment.may_be_none:
            _check_kind(f"the setting {name}", value, defaults[name])
    return defaults | {
        name: value if isinstance(defaults[name], list) else _frozen(value) for name, value in given.items()
    }


def settings_of(request: Request, experiment: Experiment) -> dict[str, Any]:
    """All settings of a request's experiment. Raises as `full_settings` does.

    Of published data sets every example that was asked for is used: the limit of so many of each kind, which keeps runs
    on generated scenes short, is off unless it is given.
    """
    given = dict(request.settings)
    if LIMIT in experiment.settings and any(map(is_published, request.data_names)):
        given = {LIMIT: None} | given
    return full_settings(experiment, given)


LIMIT = "n_per_kind"
"""The setting that limits the examples of each kind."""


def _check_kind(name: str, value: Any, default: Any) -> None:
    """Raise InvalidTypeError where a setting is not of the kind of its default; a default of None says nothing."""
    if isinstance(default, bool):
        flag(name, value)
    elif isinstance(default, int):
        whole_number(name, value)
    elif isinstance(default, float):
        number(name, value)
    elif isinstance(default, str):
        instance_of(name, value, str, "a text")
    elif isinstance(default, list | tuple):
        instance_of(name, value, (list, tuple), "a list")


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def load_model(request: Request) -> HookedVLM:
    """The request's model, loaded as it asks."""
    options = {name: getattr(request, name) for name in ("dtype", "device_map", "attn_implementation")}
    model = HookedVLM.from_pretrained(
        request.model,
        trust_remote_code=request.trust_remote_code,
        **{name: value for name, value in options.items() if value is not None},
    )
    model.prompt_options = dict(request.prompt_options or {})
    return model


def prepare(request: Request) -> Prepared:
    """Load the examples, then the model, and take their fingerprints."""
    if request.threads:
        torch.set_num_threads(request.threads)
    data = splits(request)
    model = load_model(request)
    return Prepared(
        model, data.selection, data.evaluation, describe_model(model, request.model), data.record()
    )


def run(
    request: Request,
    out: str | Path,
    *,
    prepared: Prepared | None = None,
    command: str = "",
    progress: bool = True,
) -> Path:
    """Run an experiment and write its folder; return the folder.

    Files are written apart and moved to `out` when all are there, `run.json` last, so that a folder with a
    `run.json` is whole (`mmlens.runs.folder`). A run that was there before is replaced, and files that it did not
    write are left. `prepared` saves loading the model anew; `command` is noted in the record.

    Raises ValueError for an unknown experiment, setting or citation, or a way to judge answers that the experiment
    lacks, and RunError where `out` holds files but no run, where another process writes to it, or where the findings
    are not plain (NaN, names that are no file names).
    """
    experiment = experiment_named(request.experiment)
    check_answers(experiment.name, experiment.run, request.answers)
    request = replace(request, settings=settings_of(request, experiment))
    references = bibliography((*experiment.cites, *cites(request)))
    out = Path(out)
    check_folder(out)
    with written_at_once(out, "run.json") as (folder, record):
        prepared = prepared or prepare(request)
        record |= _record(request, experiment, prepared, command)
        start = time.monotonic()
        setup = Setup(
            prepared.model,
            prepared.selection,
            prepared.evaluation,
            seed=request.seed,
            batch_size=request.batch_size,
            progress=progress,
            name=prepared.model_record["name"],
            answers=request.answers,
        )
        findings = experiment.run(setup, **request.settings)
        record["seconds"] = round(time.monotonic() - start, 1)
        record["statement"] = findings.statement
        record["results"] = write_findings(findings, folder)
        write_findings_report(folder, experiment, findings, record)
        (folder / "methods.md").write_text(methods_text(record), encoding="utf-8")
        (folder / "references.bib").write_text(references, encoding="utf-8")
    return out


def request_of(record: Mapping[str, Any]) -> Request:
    """The request that a record came from; RunError where a field is not what `Request` takes.

    Threads, and the leave to run a model's own code and to read images anywhere, are never taken from a record.
    """
    given = {**record["request"], "threads": 0, "trust_remote_code": False, "images_outside": False}
    unknown = sorted(set(given) - {known.name for known in fields(Request)})
    if unknown:
        raise RunError(f"the run was asked for with {', '.join(unknown)}, which this version does not know")
    try:
        return Request(**given)
    except (InvalidValueError, InvalidTypeError, TypeError) as error:
        raise RunError(f"what the run was asked for cannot be asked: {error}") from error


def request_record(request: Request, experiment: Experiment) -> dict[str, Any]:
    """A request in plain JSON with all its settings, the folders in it wherever one stands when it is repeated."""
    settings = settings_of(request, experiment)
    places: dict[str, Any] = {
        name: str(Path(place).resolve())
        for name, place in (("model", request.model), ("data_dir", request.data_dir))
        if place is not None and place not in shipped_models() and Path(place).is_dir()
    }
    data = [name if is_published(name) else str(Path(name).resolve()) for name in request.data_names]
    if data:
        places["data"] = data[0] if len(data) == 1 else data
    return _plain(asdict(replace(request, settings=settings)) | places, "request")


def folder_name(model: str) -> str:
    """What a model's folder is called: its name, or `owner--name` of one on the hub.

    >>> folder_name("micro"), folder_name("Qwen/Qwen3-VL-4B-Instruct"), folder_name("/models/mine/")
    ('micro', 'Qwen--Qwen3-VL-4B-Instruct', 'mine')
    """
    if Path(model).is_dir() or model.startswith(("/", ".", "~")):
        return Path(model).resolve().name
    return model.replace("/", "--")


def model_folders(models: Sequence[str], out: str | Path) -> dict[str, Path]:
    """A folder of `out` for every model; ValueError where two would share one, or one is called `across`."""
    folders = {model: Path(out) / folder_name(model) for model in models}
    for folder, count in Counter(folders.values()).items():
        if count > 1 or folder.name == "across":
            raise InvalidValueError(
                f"the models {', '.join(models)} cannot be told apart by their folders' names: {folder.name!r}"
                if count > 1
                else "no model may be called 'across': that folder holds what is said across models"
            )
    return folders


# ---------------------------------------------------------------------- findings as files

_LAYOUTS = {False: ("numbers.json", "tables", "per_example"), True: ("summary.json", ".", ".")}
"""Whether findings are flat -> the file of numbers, and where tables and results per example lie."""


def write_findings(findings: Findings, folder: Path) -> list[str]:
    """Write numbers.json, tables, per_example and figures, and findings.json with the words; return the results.

    Results are the files that a rerun is compared by: all but the pictures and the csv copies of tables.
    """
    numbers_file, *places = _LAYOUTS[findings.flat]
    plain = _plain(findings.numbers, "numbers")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / numbers_file).write_text(json.dumps(plain, indent=1, allow_nan=False), encoding="utf-8")
    tables = {name: table for name, (_, table) in findings.tables.items()}
    results = [numbers_file]
    for place, given in zip(places, (tables, findings.per_example), strict=True):
        for name, table in given.items():
            results.append((Path(place) / f"{name}.parquet").as_posix())
            _write_table(table, folder / place, name, with_csv=given is tables)
    pictures = []
    for count, (title, caption, figure) in enumerate(findings.figures, start=1):
        slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60]
        stem = f"{count:02d}-{slug}".strip("-")
        width = picture_files(figure, folder / "figures", stem)
        pictures.append({"file": f"figures/{stem}", "title": title, "caption": caption, "width": width})
    words = {
        "statement": findings.statement,
        "tables": {name: caption for name, (caption, _) in findings.tables.items()},
        "per_example": list(findings.per_example),
        "figures": pictures,
        **({"flat": True} if findings.flat else {}),
    }
    (folder / "findings.json").write_text(json.dumps(words, indent=1), encoding="utf-8")
    return results


def read_findings(folder: str | Path) -> Findings:
    """Findings as they were written, but for the figures, of which there are none.

    Raises RunError, the file named, where one is missing, broken, or not what `write_findings` writes.
    """
    folder = Path(folder)
    path = folder / "findings.json"
    words = read_json(path, RunError)
    pictures_of(folder)
    try:
        instance_of("statement", words["statement"], str, "a text")
        captions = {
            name: instance_of(f"tables.{name}", caption, str, "a text")
            for name, caption in words["tables"].items()
        }
        names = [instance_of("per_example", name, str, "a list of names") for name in words["per_example"]]
        flat = flag("flat", words.get("flat", False))
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{str(path)!r} does not hold a run's findings: {error!r}") from error
    numbers_file, tables, per_example = _LAYOUTS[flat]
    numbers = read_json(folder / numbers_file, RunError)
    if not isinstance(numbers, dict):
        raise RunError(f"{str(folder / numbers_file)!r} does not hold the numbers of a run: {numbers!r:.60}")
    return Findings(
        words["statement"],
        numbers,
        {name: (caption, _read_table(folder, tables, name)) for name, caption in captions.items()},
        {name: _read_table(folder, per_example, name) for name in names},
        flat=flat,
    )


def _read_table(folder: Path, place: str, name: str) -> pd.DataFrame:
    if not re.fullmatch(_TABLE_NAME, name):
        raise RunError(f"{str(folder / 'findings.json')!r} names a table {name!r}, which is no name of one")
    try:
        path = path_within(folder, f"{place}/{name}.parquet", "a table")
    except InvalidValueError as error:
        raise RunError(str(error)) from error
    return read_table(path)


def read_table(path: Path) -> pd.DataFrame:
    """A table of a run; RunError, the file named, where it is missing or broken."""
    if not path.is_file():
        raise RunError(f"the run lacks {str(path)!r}, which its record names")
    return read_parquet(path, RunError)


def write_across(experiment: Experiment, folders: Mapping[str, Path], out: Path) -> Findings | None:
    """What an experiment says across the models of its runs, written to `out`; None where it has nothing to say.

    The findings of each model are read back from its run's folder.
    """
    if experiment.across is None or len(folders) < 2:
        return None
    check_folder(out, "across.json")
    findings = experiment.across({model: read_findings(folder) for model, folder in folders.items()})
    with written_at_once(out, "across.json") as (partial, record):
        record |= {"schema": "mmlens.across/1", "models": list(folders), "versions": versions()}
        write_findings(findings, partial)
        write_findings_report(partial, experiment, findings, record)
    return findings


_TABLE_NAME = r"[A-Za-z0-9_.-]+"


def _write_table(table: pd.DataFrame, folder: Path, name: str, *, with_csv: bool) -> None:
    if not re.fullmatch(_TABLE_NAME, name):
        raise RunError(f"a table's name is a file's: letters, digits, '_', '.', '-' only, not {name!r}")
    folder.mkdir(parents=True, exist_ok=True)
    # Whatever a sweep notes beside its table need not be JSON, which parquet's metadata is.
    table = table.rename(columns=str)
    table.attrs = {}
    try:
        table.to_parquet(folder / f"{name}.parquet")
    except (ValueError, TypeError, OverflowError) as error:
        raise RunError(f"the table {name!r} cannot be written as parquet: {error}") from error
    if with_csv:
        table.to_csv(folder / f"{name}.csv", index=not isinstance(table.index, pd.RangeIndex))


def _plain(value: Any, where: str) -> Any:
    """`value` as plain JSON; RunError that says where it is not."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RunError(f"{where} has the key {key!r}; names in JSON are text")
        return {key: _plain(inner, f"{where}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, f"{where}[{i}]") for i, inner in enumerate(value)]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        if not math.isfinite(value):
            raise RunError(f"{where} is {value}; say None for what is not known")
        return float(value)
    raise RunError(f"{where} is a {type(value).__name__}, and the numbers of findings are plain JSON")


# ---------------------------------------------------------------------- record


def _record(request: Request, experiment: Experiment, prepared: Prepared, command: str) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "command": command,
        "request": request_record(request, experiment),
        "experiment": {
            "title": experiment.title,
            "source": experiment.source,
            "question": experiment.question,
            "method": filled_method(experiment, request.settings),
            "cites": list(experiment.cites),
        },
        "model": prepared.model_record,
        "data": prepared.data_record,
        "versions": versions(),
        "code": code_fingerprint(experiment.run),
        "machine": machine(prepared.model),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
