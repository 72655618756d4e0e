"""All experiments on several models, and one report of them all.

1. Every experiment is run on every model (`mmlens.runs.run.run`) in OUT/<experiment>/<model>/. A run that is there
   already is kept where it was asked for alike, of the same weights and examples, with the same versions and source.
2. What an experiment says across models is written to OUT/<experiment>/across/.
3. OUT/summary.json, OUT/report.html and OUT/paper.md hold what was found, and what failed and why; the last without
   pictures and results of single models beyond their statements.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from mmlens.errors import InvalidValueError
from mmlens.experiments.catalog import EXPERIMENTS
from mmlens.experiments.experiment import Experiment, Findings, can_judge, check_answers
from mmlens.files import read_json, write_text_at_once
from mmlens.provenance import versions
from mmlens.runs.folder import any_files, broken_parts, check_folder, finish_moving, is_ours, is_run, locked
from mmlens.runs.methods import bibliography, markdown_text
from mmlens.runs.record import RunError, read_record
from mmlens.runs.report import (
    LARGEST_PICTURE,
    Section,
    figure_parts,
    part,
    record_part,
    table_parts,
    title_of,
    write_page,
)
from mmlens.runs.rerun import is_current
from mmlens.runs.run import (
    Prepared,
    Request,
    experiment_named,
    model_folders,
    prepare,
    read_findings,
    request_record,
    run,
    write_across,
)

SCHEMA = "mmlens.paper/1"

PICTURE_BYTES = 16_000_000
"""Bytes of all pictures of the report together, shared out evenly."""

_ROWS = 40
"""Rows of a table that the report shows; the run's folder has the rest."""


@dataclass(frozen=True)
class Outcome:
    """How one experiment went on one model: "done", "kept" from an earlier time, or "failed" with its error."""

    experiment: str
    model: str
    status: str
    folder: Path
    seconds: float = 0.0
    error: str = ""
    details: str = ""
    broken: str = ""
    """What was broken of the run that stood there before, where that is why it was run again."""


def run_all(
    models: Sequence[str],
    out: str | Path,
    request: Request,
    *,
    experiments: Sequence[str] | None = None,
    jobs: int = 1,
    command: str = "",
    progress: bool = True,
) -> list[Outcome]:
    """Run experiments on models, one folder each, and write the summary and the report.

    By default these are all but those with a `by_name`, which says why, and those that cannot judge answers as the
    request asks. `jobs` models are run at a time, each in a
    process of its own where there are several: bars of progress are left out then, not the line that ends a run.
    `request` gives all else: sizes, seed, data, dtype; its experiment, model and settings are not read. A failure
    is noted and the others go on; what fails across models is an outcome of its own. Raises ValueError for an
    unknown experiment or citation, an experiment that cannot judge answers so, or `jobs` below 1, RunError where `out`
    holds other files than those of such a run.
    """
    if jobs < 1:
        raise InvalidValueError(f"jobs is a number of models run at a time, 1 or more, not {jobs}")
    by_default = [
        name
        for name, experiment in EXPERIMENTS.items()
        if not experiment.by_name and can_judge(experiment.run, request.answers)
    ]
    chosen = [experiment_named(name) for name in experiments or by_default]
    for experiment in chosen:
        check_answers(experiment.name, experiment.run, request.answers)
    references = bibliography(key for experiment in chosen for key in experiment.cites)
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise RunError(f"{str(out)!r} is a file; the report is written to a folder")
    if out.is_dir() and any_files(out) and not _is_paper(out):
        raise RunError(
            f"the folder {str(out)!r} holds files that no such run wrote: give a new folder, or empty it"
        )
    folders = {experiment.name: model_folders(models, out / experiment.name) for experiment in chosen}
    with locked(out):
        _write_summary(out, models, [], {})
        by_model = [
            (
                replace(request, model=model),
                {name: places[model] for name, places in folders.items()},
                out,
                command,
                progress,
            )
            for model in models
        ]
        outcomes = [outcome for found in _in_turn_or_parallel(by_model, jobs) for outcome in found]
        across: dict[str, Findings | str] = {}
        failures = [outcome for outcome in outcomes if outcome.status == "failed"]
        for experiment in chosen:
            whole = {
                o.model: o.folder
                for o in outcomes
                if o.experiment == experiment.name and o.status != "failed"
            }
            place = out / experiment.name / "across"
            try:
                found = write_across(experiment, whole, place)
            except Exception as error:
                across[experiment.name] = f"{type(error).__name__}: {error}"
                failures.append(_failure(experiment.name, "across models", place, error))
            else:
                if found is not None:
                    across[experiment.name] = found
        _write_summary(out, models, outcomes, across)
        _write_report(out, chosen, outcomes, across, failures, references)
        _write_markdown(out, chosen, outcomes, across)
        return [*outcomes, *(failure for failure in failures if failure not in outcomes)]


def _is_paper(out: Path) -> bool:
    """Whether a folder's summary is one of ours, one that was cut off among them."""
    return (out / "summary.json").is_file() and is_ours(out / "summary.json", "schema", SCHEMA)


def _in_turn_or_parallel(by_model: Sequence[tuple[Any, ...]], jobs: int) -> list[list[Outcome]]:
    if jobs == 1 or len(by_model) == 1:
        return [_run_model(*arguments) for arguments in by_model]
    others = multiprocessing.active_children()
    # Spawned, for a forked process may not use threads that torch has started.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker)
    try:
        with _interrupts_held_back():
            running = [
                pool.submit(_work, partial(_run_model, bars=False), *arguments) for arguments in by_model
            ]
        return [_found(future, *arguments) for future, arguments in zip(running, by_model, strict=True)]
    except BaseException:
        for worker in multiprocessing.active_children():
            if worker not in others:
                worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach, which a terminal sends to all: this one ends them in order."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop_worker)


_CLEARING = 10.0
"""Seconds in which a worker that was told to stop clears its folder away, and hears of no second order."""
_stopped_at = -_CLEARING


def _stop_worker(number: int, frame: object) -> None:
    """End the worker, once: a signal to the whole group reaches it, and then its parent's own."""
    global _stopped_at
    now = time.monotonic()
    if now - _stopped_at >= _CLEARING:
        _stopped_at = now
        raise SystemExit(143)


def _work(run_model: Callable[..., list[Outcome]], *arguments: Any) -> list[Outcome]:
    """Run a model's experiments in a process of their own, which ends when it is told to, its folders cleared away."""
    try:
        return run_model(*arguments)
    except SystemExit:
        os._exit(143)


def _found(
    future: Future[list[Outcome]], request: Request, folders: Mapping[str, Path], *_: Any
) -> list[Outcome]:
    """What a process found; where it died, every run of its model failed."""
    try:
        return future.result()
    except Exception as error:
        return [_failure(name, request.model, folder, error) for name, folder in folders.items()]


def _run_model(
    request: Request,
    folders: Mapping[str, Path],
    out: Path,
    command: str,
    progress: bool,
    bars: bool = True,
) -> list[Outcome]:
    """Experiments, name -> folder, on the request's model, loaded once."""
    try:
        prepared: Prepared | Outcome = prepare(request)
    except Exception as error:
        prepared = _failure("", request.model, out, error)
    outcomes = []
    for name, folder in folders.items():
        if isinstance(prepared, Outcome):
            outcome = replace(prepared, experiment=name, folder=folder)
        else:
            asked = replace(request, experiment=name, settings={})
            outcome = _run_one(EXPERIMENTS[name], asked, folder, prepared, command, progress and bars)
        outcomes.append(outcome)
        if progress:
            _say(outcome, len(outcomes), len(folders))
    return outcomes


def _run_one(
    experiment: Experiment, request: Request, folder: Path, prepared: Prepared, command: str, progress: bool
) -> Outcome:
    start = time.monotonic()
    try:
        check_folder(folder)
        finish_moving(folder)
        if is_kept(experiment, request, folder, prepared):
            return Outcome(experiment.name, request.model, "kept", folder, read_record(folder)["seconds"])
        broken = "; ".join(broken_parts(folder)[:3]) if is_run(folder) else ""
        run(request, folder, prepared=prepared, command=command, progress=progress)
    except Exception as error:
        return _failure(experiment.name, request.model, folder, error, time.monotonic() - start)
    seconds = round(time.monotonic() - start, 1)
    return Outcome(experiment.name, request.model, "done", folder, seconds, broken=broken)


def _failure(experiment: str, model: str, folder: Path, error: Exception, seconds: float = 0.0) -> Outcome:
    said, details = f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))
    return Outcome(experiment, model, "failed", folder, round(seconds, 1), said, details)


def is_kept(experiment: Experiment, request: Request, folder: Path, prepared: Prepared) -> bool:
    """Whether a folder holds the run that would be done now.

    It does where it was asked for alike, of the same weights and examples, with the same versions and the same source
    of the experiment, and all its files are as they were written.
    """
    if not is_run(folder):
        return False
    try:
        record = read_record(folder)
    except RunError:
        return False
    prints = [
        (split["n"], split["fingerprint"])
        for split in (record["data"]["selection"], record["data"]["evaluation"])
    ]
    now = prepared.data_record
    return (
        record["request"] == request_record(request, experiment)
        and record["model"]["fingerprint"] == prepared.model_record["fingerprint"]
        and prints == [(split["n"], split["fingerprint"]) for split in (now["selection"], now["evaluation"])]
        and is_current(record, experiment)
        and not broken_parts(folder)
    )


def _say(outcome: Outcome, number: int, total: int) -> None:
    what = f"{outcome.error}" if outcome.status == "failed" else f"{outcome.seconds:.0f} s"
    if outcome.broken:
        what += f"; the run that stood there was broken: {outcome.broken}"
    print(
        f"[{number}/{total}] {outcome.experiment} on {outcome.model}: {outcome.status}, {what}",
        file=sys.stderr,
        flush=True,
    )


def _write_summary(
    out: Path, models: Sequence[str], outcomes: Sequence[Outcome], across: Mapping[str, Findings | str]
) -> None:
    rows = []
    for outcome in outcomes:
        row: dict[str, Any] = {
            "experiment": outcome.experiment,
            "model": outcome.model,
            "status": outcome.status,
            "seconds": outcome.seconds,
            "folder": str(outcome.folder.relative_to(out)),
        }
        if outcome.status == "failed":
            row |= {"error": outcome.error, "traceback": outcome.details}
        else:
            found = read_findings(outcome.folder)
            row |= {"statement": found.statement, "numbers": found.numbers}
        if outcome.broken:
            row["broken_before"] = outcome.broken
        rows.append(row)
    summary = {
        "schema": SCHEMA,
        "versions": versions(),
        "models": list(models),
        "runs": rows,
        "across": {
            name: {"error": found}
            if isinstance(found, str)
            else {"statement": found.statement, "numbers": found.numbers}
            for name, found in across.items()
        },
    }
    write_text_at_once(out / "summary.json", json.dumps(summary, indent=1))


# ---------------------------------------------------------------------- report


def _write_report(
    out: Path,
    experiments: Sequence[Experiment],
    outcomes: Sequence[Outcome],
    across: Mapping[str, Findings | str],
    failures: Sequence[Outcome],
    references: str,
) -> None:
    """OUT/report.html from the runs' folders: one section an experiment, what each model shows folded."""
    whole = [outcome.folder for outcome in outcomes if outcome.status != "failed"]
    places = {name: out / name / "across" for name, found in across.items() if not isinstance(found, str)}
    n_pictures = sum(len(_words(folder)["figures"]) for folder in (*whole, *places.values()))
    largest = min(LARGEST_PICTURE, PICTURE_BYTES // max(n_pictures, 1))
    models = list(dict.fromkeys(outcome.model for outcome in outcomes))
    by_run = {(outcome.experiment, outcome.model): outcome for outcome in outcomes}
    sections: list[Section] = [("Overview", part("overview", experiments, models, by_run), [])]
    for experiment in experiments:
        name = experiment.name
        runs = [
            (o, "", "") if o.status == "failed" else (o, *_of_folder(o.folder, largest, with_record=True))
            for o in outcomes
            if o.experiment == name
        ]
        over_models = _of_folder(places[name], largest)[1] if name in places else ""
        body = part("experiment", experiment, across.get(name), over_models, runs)
        sections.append((experiment.title, body, []))
    sections.append(("Models, versions and machine", _setting(whole), []))
    sections.append(("References", part("preformatted", references), []))
    subtitle = f"Experiments: {len(experiments)}. Models: {', '.join(models)}."
    lead = part("failures", failures, len(whole)) if failures else ""
    write_page(out / "report.html", "Visual retrieval heads: all experiments", subtitle, lead, sections)


def _words(folder: Path) -> dict[str, Any]:
    words: dict[str, Any] = read_json(folder / "findings.json", RunError)
    return words


def _of_folder(folder: Path, largest: int, *, with_record: bool = False) -> tuple[str, str]:
    """What was found by a run in a sentence, and as HTML."""
    found = read_findings(folder)
    parts = [*figure_parts(folder, largest), *table_parts(found, _ROWS)]
    record = record_part(read_record(folder)) if with_record else ""
    return found.statement, part("findings", parts, found.numbers, record)


def _setting(folders: Sequence[Path]) -> Markup:
    records = [read_record(folder) for folder in folders]
    models = {record["model"]["name"]: record["model"] for record in records}
    columns = list(dict.fromkeys(name for model in models.values() for name in model))
    rows = [[str(model.get(column, "")) for column in columns] for model in models.values()]
    html = part("grid", [title_of(column) for column in columns], rows) if rows else Markup()
    seen: list[dict[str, Any]] = []
    for record in records:
        setting = {**record["versions"], **record["machine"]}
        if setting not in seen:
            seen.append(setting)
    return html + Markup().join(part("pairs", setting) for setting in seen)


# ---------------------------------------------------------------------- markdown


def _write_markdown(
    out: Path,
    experiments: Sequence[Experiment],
    outcomes: Sequence[Outcome],
    across: Mapping[str, Findings | str],
) -> None:
    """OUT/paper.md: of every experiment the question, the published numbers, and what was found."""
    parts = ["# All experiments: what the papers give, and what was found"]
    for experiment in experiments:
        parts += [f"## {experiment.title}", f"{experiment.question} ({experiment.source}.)"]
        if experiment.published is not None:
            parts += ["Published:", markdown_table(experiment.published)]
        found = across.get(experiment.name)
        if isinstance(found, str):
            parts.append(f"Across models: failed, {markdown_text(found)}")
        elif found is not None:
            parts.append(f"**Across models.** {markdown_text(found.statement)}")
            for caption, table in found.tables.values():
                parts += [markdown_text(caption), markdown_table(table)]
        for outcome in outcomes:
            if outcome.experiment == experiment.name:
                failed = outcome.status == "failed"
                said = f"failed, {outcome.error}" if failed else _words(outcome.folder)["statement"]
                parts.append(f"- **{markdown_text(outcome.model)}**: {markdown_text(said)}")
    write_text_at_once(out / "paper.md", "\n\n".join(parts) + "\n")


def markdown_table(table: pd.DataFrame) -> str:
    """A table in Markdown, floats to three digits.

    >>> print(markdown_table(pd.DataFrame({"head": ["L0H4"], "ram": [0.4166]})))
    | head | ram |
    | --- | --- |
    | L0H4 | 0.417 |
    """
    rows = [[markdown_text(column) for column in table.columns], ["---"] * table.shape[1]]
    rows += [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(value: object) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return "" if text in ("nan", "None") else markdown_text(text)
