"""The `mmlens` command."""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from mmlens.arguments import file_to_write, unknown_name_message, whole_number
from mmlens.data.rows import BOX_FORMATS, PAGES
from mmlens.errors import InvalidTypeError, InvalidValueError, MmlensError
from mmlens.experiments.catalog import EXPERIMENTS
from mmlens.experiments.core_heads_claim import EXPERIMENT as CORE_HEADS
from mmlens.experiments.experiment import Experiment
from mmlens.experiments.judging import JUDGES
from mmlens.families.catalog import UnknownFamilyError
from mmlens.files import parsed_json
from mmlens.hybrid.speed import PARTS
from mmlens.interventions.ablation import MODES
from mmlens.model.loading import shipped_models
from mmlens.model.support import support_table
from mmlens.runs.data_command import COLUMNS, convert, description, listing, show
from mmlens.runs.folder import check_folder
from mmlens.runs.paper import run_all
from mmlens.runs.prefill_speed import RECORD as PREFILL_SPEED_RECORD
from mmlens.runs.prefill_speed import load_scores, time_prefill
from mmlens.runs.record import read_record
from mmlens.runs.request import MOST_SEED, MOST_THREADS, Request
from mmlens.runs.rerun import rerun, runs_in
from mmlens.runs.run import (
    experiment_named,
    load_model,
    model_folders,
    request_of,
    run,
    write_across,
)
from mmlens.scores.recomputed import recompute_published

T = TypeVar("T")

_USER_ERRORS = (MmlensError, OSError, ValueError, IndexError)

_DIFFERENCES_SHOWN = 50


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    0 on success, 1 where results differ or a run failed, 2 where the input is at fault, 130 after Ctrl-C and 143 after
    SIGTERM, both of which leave no folder half-written.
    """
    before = signal.getsignal(signal.SIGTERM)
    on_main_thread = threading.current_thread() is threading.main_thread()
    if on_main_thread:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        return _main(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        print("mmlens: interrupted", file=sys.stderr)
        return 130
    except _Terminated:
        print("mmlens: terminated", file=sys.stderr)
        return 143
    finally:
        if on_main_thread:
            signal.signal(signal.SIGTERM, before)


class _Terminated(BaseException):
    """SIGTERM as an exception, so that what was begun is cleared away as after Ctrl-C."""


def _terminate(number: int, frame: object) -> None:
    raise _Terminated


def _main(arguments: list[str]) -> int:
    options = _parsed_arguments(arguments)
    options.command = shlex.join(["mmlens", *arguments])
    if getattr(options, "threads", None):
        torch.set_num_threads(options.threads)
    try:
        return COMMANDS[options.command_name].does(options) or 0
    except _USER_ERRORS as error:
        print(f"mmlens: {_printable(str(error))}", file=sys.stderr)
        return 2


def _printable(text: str) -> str:
    """A text without signs that would move a terminal's cursor or change its colours."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else repr(sign)[1:-1] for sign in text)


# ---------------------------------------------------------------------- options


def _parsed_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mmlens",
        description="Find and test attention heads of vision-language models.",
        allow_abbrev=False,
    )
    parsers = parser.add_subparsers(required=True, metavar="COMMAND", dest="command_name")
    for name, command in COMMANDS.items():
        added = parsers.add_parser(
            name,
            help=command.help,
            description=command.help,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        defaults = {key: value for function in command.calls for key, value in defaults_of(function).items()}
        for option, given in command.options.items():
            action: dict[str, Any] = {"action": _Once} if option.startswith("--") else {}
            default = defaults.get(given.get("dest", option.removeprefix("--").replace("-", "_")))
            added.add_argument(option, **action | {"default": default} | given)
    # What argparse says of an unknown command or option names none that is near.
    name = next(iter(arguments), "-")
    if name in COMMANDS:
        known = ["--help", *COMMANDS[name].options]
        before = itertools.takewhile(lambda text: text != "--", arguments[1:])
        for option in (text.partition("=")[0] for text in before if text.startswith("--")):
            if option not in known:
                parsers.choices[name].error(unknown_name_message("option", option, known))
    elif not name.startswith("-"):
        parser.error(unknown_name_message("command", name, COMMANDS))
    return parser.parse_args(arguments)


class _Once(argparse.Action):
    """An option that is given once, its values all different; one of no values is a flag."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        given = namespace.__dict__.setdefault("given", set())
        several = values if isinstance(values, list) else []
        twice = [repr(value) for i, value in enumerate(several) if value in several[:i]]
        if self.dest in given or twice:
            raise argparse.ArgumentError(self, f"{option if self.dest in given else twice[0]} is given twice")
        given.add(self.dest)
        setattr(namespace, self.dest, True if self.nargs == 0 else values)


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A whole number on the command line, within bounds."""

    def parse(text: str) -> int:
        try:
            return whole_number("it", int(text), least=least, most=most)
        except ValueError as error:
            bounds = f"from {least} to {most:,}" if most is not None else f"of at least {least}"
            raise argparse.ArgumentTypeError(f"expected a whole number {bounds}, not {text!r}") from error

    return parse


def _name_of(kind: str, names: Sequence[str]) -> Callable[[str], str]:
    """One of a few names on the command line; another is an error with the nearest."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(unknown_name_message(kind, text, names))
        return text

    return parse


def defaults_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments that may be left out, with their defaults; tuples as lists, as a command line gives them."""
    return {
        name: list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty
    }


def _called(function: Callable[..., T], options: argparse.Namespace, **given: Any) -> T:
    """`function` with the options that it has arguments for, and with these in place of options."""
    names = inspect.signature(function).parameters
    return function(**{name: getattr(options, name) for name in names if name in options} | given)


def parsed_settings(experiment: Experiment, given: Sequence[str]) -> dict[str, Any]:
    """Settings from NAME=VALUE, each value of the type of the setting's default.

    Members of a list are parted by commas. Where the default is None, a value is JSON, a number, or else text.

    Raises ValueError for what is not NAME=VALUE, an unknown setting, or a value of another type.

    >>> parsed_settings(experiment_named("core-heads"), ["n_draws=2", "modes=zero,mean", "counts=1,2"])
    {'n_draws': 2, 'modes': ('zero', 'mean'), 'counts': (1, 2)}
    """
    defaults = experiment.settings
    settings: dict[str, Any] = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not equals:
            raise InvalidValueError(f"--set takes NAME=VALUE, not {item!r}")
        if name in settings:
            raise InvalidValueError(f"--set gives the setting {name!r} twice")
        if name not in defaults:
            raise InvalidValueError(unknown_name_message(f"{experiment.name} setting", name, defaults))
        try:
            is_none = text.lower() in ("none", "null") and name in experiment.may_be_none
            settings[name] = None if is_none else _parsed(text, defaults[name])
        except ValueError as error:
            raise InvalidValueError(
                f"the setting {name} is like its default {defaults[name]!r}, which {text!r} is not: {error}"
            ) from error
    return settings


def _parsed(text: str, default: Any) -> Any:
    if default is not None and text == "none":
        raise InvalidValueError("it cannot be none")
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise InvalidValueError("true or false")
        return text.lower() == "true"
    if isinstance(default, int | float | str):
        return type(default)(text)
    if isinstance(default, list | tuple):
        parts = [part.strip() for part in text.split(",") if part.strip()]
        return type(default)(_parsed(part, default[0] if len(default) else None) for part in parts)
    if isinstance(default, dict):
        value = json.loads(text)
        if not isinstance(value, dict):
            raise InvalidValueError("expected a JSON object")
        return value
    if text.lower() in ("none", "null"):
        return None
    if "," in text and not text.lstrip().startswith(("[", "{", '"')):
        return tuple(_parsed(part.strip(), None) for part in text.split(",") if part.strip())
    for read in (json.loads, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _run(options: argparse.Namespace) -> None:
    experiment = experiment_named(options.experiment)
    settings = parsed_settings(experiment, options.settings)
    folders = model_folders(options.models, options.out)
    for folder in folders.values():
        check_folder(folder)
    for model, folder in folders.items():
        request = _called(Request, options, experiment=experiment.name, model=model, settings=settings)
        run(request, folder, command=options.command)
        print(f"\n{model}: {read_record(folder)['statement']}\nreport: {folder / 'report.html'}")
    across = options.out / "across"
    found = write_across(experiment, folders, across)
    if found is not None:
        print(f"\nAcross models: {found.statement}\nreport: {across / 'report.html'}")


def _experiments(options: argparse.Namespace) -> None:
    if options.experiment is None:
        for experiment in EXPERIMENTS.values():
            print(
                f"{experiment.name}: {experiment.title}\n    {experiment.question}\n    {experiment.source}"
            )
        return
    experiment = experiment_named(options.experiment)
    print(f"{experiment.name}: {experiment.title}\n{experiment.question}\nSource: {experiment.source}")
    print(f"Method: {experiment.method}\nSettings:")
    for name, default in experiment.settings.items():
        print(
            f"    {name}={default if not isinstance(default, list | tuple) else ','.join(map(str, default))}"
        )


def _rerun(options: argparse.Namespace) -> int:
    differ = False
    for folder in runs_in(options.folder):
        out = options.out / folder.relative_to(options.folder) if options.out is not None else None
        request = request_of(read_record(folder)) if options.settings else None
        settings = parsed_settings(experiment_named(request.experiment), options.settings) if request else {}
        found = _called(rerun, options, folder=folder, out=out, settings=settings)
        print(f"{folder}: {found.n_values} values compared, {len(found.differences)} differ")
        for name, (before, after) in found.changed.items():
            print(_printable(f"    {name}: was {before}, is {after}"))
        for difference in found.differences[:_DIFFERENCES_SHOWN]:
            print(_printable(f"    {difference}"))
        if len(found.differences) > _DIFFERENCES_SHOWN:
            print(f"    and {len(found.differences) - _DIFFERENCES_SHOWN} more")
        where = f" ({found.largest_at})" if found.largest else ""
        print(f"    largest relative difference of two floats: {found.largest:.3g}{where}")
        differ |= not found.same
    return int(differ)


def _paper(options: argparse.Namespace) -> int:
    request = _called(Request, options, experiment="", model="")
    outcomes = _called(run_all, options, request=request)
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    print(f"{len(outcomes)} runs, {len(failed)} failed\nreport: {options.out / 'report.html'}")
    return int(bool(failed))


def _prefill_speed(options: argparse.Namespace) -> None:
    check_folder(options.out, PREFILL_SPEED_RECORD)
    scores = load_scores(options.heads)
    model = load_model(_called(Request, options, experiment=""))
    found = _called(time_prefill, options, model=model, scores=scores, name=options.model)
    shown = found.table[["heads", "length", "part", "dense_seconds", "hybrid_seconds", "speedup", "limit"]]
    print(shown.to_string(index=False, float_format=lambda value: f"{value:.3g}"))
    print(f"report: {found.save(options.out) / 'report.html'}")


def _families(options: argparse.Namespace) -> None:
    table = support_table()
    if options.csv is not None:
        file_to_write("--csv", options.csv)
        table.to_csv(options.csv, index=False)
        print(options.csv)
        return
    if options.family is not None:
        found = table[table["family"] == options.family]
        if not len(found):
            raise UnknownFamilyError(unknown_name_message("family", options.family, table["family"]))
        for name, value in found.iloc[0].items():
            print(f"{name}: {value or '-'}")
        return
    for row in table.itertuples():
        print(f"{row.family:26} {row.status:10} token map: {row.token_map:4.3} {row.notes[:120]}".rstrip())
    counts = table["status"].value_counts()
    print(
        f"\n{len(table)} families: {', '.join(f'{n} {status}' for status, n in counts.items())}. "
        "All notes of one: mmlens families FAMILY; the whole table: --csv FILE"
    )


def _published(options: argparse.Namespace) -> int:
    table = recompute_published(options.folder)
    if options.csv is not None:
        file_to_write("--csv", options.csv)
        table.to_csv(options.csv, index=False)
    for (source, model), rows in table.groupby(["source", "model"], sort=False):
        print(_printable(f"{source}, {model}"))
        for row in rows.itertuples():
            judged = {True: "  agrees", False: "  DIFFERS"}.get(row.agrees, "")
            lines = [row.what]
            if len(row.stated + row.recomputed) > 80:
                lines += [f"    stated {row.stated}", f"    recomputed {row.recomputed}{judged}"]
            elif row.recomputed:
                lines = [f"{row.what}: stated {row.stated or '-'}, recomputed {row.recomputed}{judged}"]
            lines += [f"    {row.note}"] if row.note else []
            print(_printable("\n".join(f"    {line}" for line in lines)))
    n_agree, n_differ = (sum(each is value for each in table["agrees"]) for value in (True, False))
    print(
        f"\n{len(table)} rows: {n_agree} agree, {n_differ} differ, {len(table) - n_agree - n_differ} not judged"
    )
    return int(n_differ > 0)


def _data(options: argparse.Namespace) -> None:
    given: set[str] = getattr(options, "given", set())
    converts = options.what == "convert"
    if converts and (options.source is None or options.out is None):
        raise InvalidTypeError("mmlens data convert takes what to convert and --out, the folder to write to")
    if not converts and options.source is not None:
        raise InvalidValueError(unknown_name_message("action", options.what, ["convert"]))
    fit = {*DATA_OPTIONS, "out", "n"} | ({*COLUMNS, "config"} if converts else set())
    if options.what is None or (not converts and options.n is None):
        fit = set()
    if given - fit:
        needs = "--n, rows to show" if given & {*DATA_OPTIONS, "out"} else "convert"
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(given - fit))
        raise InvalidTypeError(f"{names} needs {needs}: mmlens data --help")
    if options.what is None:
        print(listing())
    elif converts:
        print(_printable(_called(convert, options, **{name: getattr(options, name) for name in COLUMNS})))
    elif options.n is None:
        print(description(options.what))
    else:
        print(_printable(_called(show, options, name=options.what)))


DATA_OPTIONS = ("split", "data_dir", "revision", "streaming", "on_error")


def _core_heads(options: argparse.Namespace) -> None:
    settings = {name: getattr(options, name) for name in ("counts", "modes", "n_draws", "mapping")}
    request = _called(Request, options, experiment="core-heads", settings=settings)
    run(request, options.out, command=options.command)
    print(f"\n{read_record(options.out)['statement']}")
    print(f"report: {options.out / 'report.html'}")


# ---------------------------------------------------------------------- the commands and their options


Options = dict[str, dict[str, Any]]
"""What argparse's `add_argument` takes, by name."""


@dataclass(frozen=True)
class Command:
    """What a command does, in code and in words, and its options; its exit status is what `does` returns, or 0.

    An option that has no default of its own has that of its name in the functions that it `calls`, or else None.
    """

    does: Callable[[argparse.Namespace], int | None]
    help: str
    options: Options
    calls: Sequence[Callable[..., Any]] = ()


def _option(help: str, read: Callable[[str], Any] = str, **given: Any) -> dict[str, Any]:
    return {"help": help, "type": read} | given


def _several(help: str, read: Callable[[str], Any] = str, **given: Any) -> dict[str, Any]:
    return _option(help, read, nargs="+", **given)


def _flag(help: str) -> dict[str, Any]:
    return _option(help, nargs=0, default=False)


def _json_object(text: str) -> dict[str, Any]:
    value = parsed_json(text)
    if not isinstance(value, dict):
        raise InvalidTypeError(f'{text!r} is no JSON object, such as {{"enable_thinking": false}}')
    return value


def _settings(help: str) -> dict[str, Any]:
    return _several(help, dest="settings", action="extend", default=[], metavar="NAME=VALUE")


def _out(help: str) -> Options:
    return {"--out": _option(help, Path, required=True)}


_MODEL = {"--model": _option("a shipped model, a folder, or a hub id", default="micro")}
_MODELS = {
    "--model": _several("shipped models, folders, or hub ids", dest="models", default=shipped_models())
}
_OUTSIDE = {"--images-outside": _flag("with --data: read images that lie outside the folder too")}
_SEED = _whole(0, MOST_SEED)
_THREADS = _whole(0, MOST_THREADS)
_LOADING = {
    "--dtype": _option("as transformers takes it, e.g. bfloat16"),
    "--device-map": _option("as transformers takes it, e.g. auto"),
    "--attn-implementation": _option("as transformers takes it, e.g. sdpa"),
    "--trust-remote-code": _flag("run model code from the hub"),
    "--threads": _option("torch threads (0: torch's own choice)", _THREADS),
}
# The fields of `Request`, but for the experiment, the model and the settings.
_REQUEST = {
    "--data": _several(
        "a folder of examples (docs/data.md), or data sets by name (`mmlens data` lists them), each then a kind of "
        "task; shipped models have their own"
    ),
    **_OUTSIDE,
    "--data-dir": _option("a folder with the published files of --data NAME, or with a folder NAME of them"),
    "--data-options": _option(
        'of load_data, as JSON: \'{"split": "val", "streaming": true}\'', _json_object, metavar="JSON"
    ),
    "--n-selection": _option(
        "examples to choose heads on: scenes of each kind, or of each data set by name", _whole(1)
    ),
    "--n-evaluation": _option(
        "examples to judge heads on: scenes of each kind, or of each data set by name", _whole(1)
    ),
    "--selection-share": _option("with --data: share of its groups to choose heads on", float),
    "--seed": _option("seed of examples and of all random choices", _SEED),
    "--batch-size": _option("examples in a forward pass", _whole(1)),
    "--answers": _option(
        f"how answers are judged: {', '.join(JUDGES)} (docs/experiments.md)",
        _name_of("answers", tuple(JUDGES)),
    ),
    "--prompt-options": _option(
        "of chat template and processor, as JSON: '{\"enable_thinking\": false}'",
        _json_object,
        metavar="JSON",
    ),
    **_LOADING,
}

COMMANDS = {
    "core-heads": Command(
        _core_heads,
        "find CoRe heads on one split and test them causally on another",
        {
            **_MODEL,
            **_out("folder for summary.json, tables and report.html"),
            **_REQUEST,
            "--counts": _several("numbers of heads to ablate; 5%% of all is always added", _whole(1)),
            "--modes": _several(f"ablation modes: {', '.join(MODES)}", _name_of("mode", MODES)),
            "--draws": _option("draws of each random arm", _whole(1), dest="n_draws", metavar="DRAWS"),
            "--mapping": _option(
                "box to token: merged or paper_floor", _name_of("mapping", ("merged", "paper_floor"))
            ),
        },
        (Request, CORE_HEADS.run),
    ),
    "run": Command(
        _run,
        "run one experiment on one or more models (docs/experiments.md)",
        {
            "experiment": _option("its name; `mmlens experiments` lists them"),
            **_MODELS,
            **_out("folder for a folder of every model"),
            **_REQUEST,
            "--set": _settings("settings of the experiment; `mmlens experiments NAME` lists them"),
        },
        (Request,),
    ),
    "experiments": Command(
        _experiments,
        "list the experiments, or all about one",
        {"experiment": _option("one experiment, with its method and settings", nargs="?")},
    ),
    "rerun": Command(
        _rerun,
        "run again what a run's folder says, and compare every number",
        {
            "folder": _option("a run's folder, or one with runs below it", Path),
            "--out": _option("keep the new run in this folder", Path),
            "--tolerance": _option("relative difference at which floats still agree", float),
            "--model": _option("where the model lies now, if not where it lay"),
            "--data": _option("where the folder of examples lies now, if not where it lay"),
            "--data-dir": _option("where the published files lie now, if not where they lay"),
            **_OUTSIDE,
            "--threads": _option("torch threads, if not those of the run", _THREADS),
            "--trust-remote-code": _flag("run code that lies in the model's folder, where the run did"),
            "--set": _settings(
                "settings in place of the record's, which are not taken from it above a million"
            ),
        },
        (rerun,),
    ),
    "paper": Command(
        _paper,
        "run all experiments on all models, and write one report of them",
        {
            **_MODELS,
            **_out("folder for the runs and report.html"),
            "--experiments": _several("these alone (default: all)", metavar="NAME"),
            "--jobs": _option("models run at a time (default: 1)", _whole(1), default=1),
            **_REQUEST,
        },
        (Request,),
    ),
    "prefill-speed": Command(
        _prefill_speed,
        "time prefill with the heads of the highest scores dense, the others streaming",
        {
            **_MODEL,
            "--heads": _option("scores, as `mmlens core-heads` writes them", Path, required=True),
            "--lengths": _several("tokens of the prompts", int, required=True),
            "--fractions": _several("shares of dense heads", float),
            "--sink": _option("first tokens that every head sees", int),
            "--window": _option("last tokens that every head sees", int),
            "--parts": _several(f"what to time: {', '.join(PARTS)}", _name_of("part", PARTS)),
            "--quality": _option("a run of `mmlens run hybrid`, to put accuracy beside speed", Path),
            "--repeats": _option("pairs of runs, after two of either side", _whole(1)),
            **_out("folder for speed.csv and report.html"),
            "--seed": _option("seed of the random tokens", _SEED),
            **_LOADING,
        },
        (Request, time_prefill),
    ),
    "published": Command(
        _published,
        "recompute what papers state of their heads from the scores that they published (docs/published-heads.md)",
        {
            "folder": _option("a folder with their files, or one file", Path),
            "--csv": _option("write the table to this file too", Path),
        },
    ),
    "data": Command(
        _data,
        "list published data sets, show rows of one with their boxes drawn, or convert rows to our own format "
        "(docs/data.md)",
        {
            "what": _option("a data set, or a folder of examples: all about it; or `convert`", nargs="?"),
            "source": _option(
                "with convert: a data set, a file (parquet, jsonl, csv), a folder, or a hub id", nargs="?"
            ),
            "--n": _option("rows to show, the first ones; with convert: at most so many examples", _whole(1)),
            "--out": _option("the picture of the rows shown (NAME.png); with convert: the folder", Path),
            "--split": _option("which split of it (default: its first)"),
            "--data-dir": _option(
                "the folder with its published files, if they are not to come from the hub", Path
            ),
            "--revision": _option("a commit on the hub, if not the one that the list names"),
            "--streaming": _flag("read rows as they come, and write nothing to the disk"),
            "--on-error": _option(
                "rows that cannot be read: raise or skip", _name_of("on_error", ("raise", "skip"))
            ),
            "--config": _option("with convert: its configuration on the hub"),
            "--question": _option("the column of questions"),
            "--answer": _option("the column of answers"),
            "--images": _several("the column of images, or several columns"),
            "--evidence": _option("the column of boxes, or of numbers of pages"),
            "--box-format": _option(
                f"how evidence is written: {', '.join((*BOX_FORMATS, PAGES))}",
                _name_of("box format", (*BOX_FORMATS, PAGES)),
            ),
            "--box-pages": _option("the column of the numbers of the images that boxes lie in"),
            "--first-page": _option("what the first image is counted as: 0 or 1", _whole(0, 1)),
            "--candidates": _several("the column of candidates, or the candidates of all rows"),
            "--group": _option("the column of what must not be split, such as a document"),
            "--id": _option("the column of names of rows"),
            "--kind": _option("the column of kinds of tasks"),
            "--messages": _option("the column of chats, in place of --question"),
            "--metadata": _several("columns to keep beside"),
            "--image-folder": _option(
                "where paths of images are relative to (default: the file's folder)", Path
            ),
        },
        (show,),
    ),
    "families": Command(
        _families,
        "which of transformers' image-text-to-text families are supported, and how far",
        {
            "family": _option("one family (a model_type), with all its notes", nargs="?"),
            "--csv": _option("write the whole table to this file", Path),
        },
    ),
}
