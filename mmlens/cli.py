"""The `mmlens` command."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from mmlens.arguments import file_to_write, unknown_name_message, whole_number
from mmlens.errors import InvalidValueError, MmlensError
from mmlens.experiments.catalog import EXPERIMENTS
from mmlens.experiments.core_heads_claim import MODES
from mmlens.experiments.experiment import Experiment
from mmlens.families.catalog import UnknownFamilyError
from mmlens.hybrid.speed import PARTS
from mmlens.interventions.ablation import MODES as ABLATION_MODES
from mmlens.model.loading import shipped_models
from mmlens.model.support import support_table
from mmlens.runs.accelerate import RECORD as ACCELERATE_RECORD
from mmlens.runs.accelerate import accelerate, load_scores
from mmlens.runs.folder import check_folder
from mmlens.runs.paper import run_all
from mmlens.runs.record import read_record
from mmlens.runs.rerun import TOLERANCE, rerun, runs_in
from mmlens.runs.run import (
    MOST_SEED,
    MOST_THREADS,
    Request,
    experiment_named,
    load_model,
    model_folders,
    request_of,
    run,
    write_across,
)

_USER_ERRORS = (MmlensError, OSError, ValueError, IndexError)

_DIFFERENCES_SHOWN = 50

_OUTSIDE = "with --data: read images that lie outside the folder too"


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
    options = _parser(arguments).parse_args(arguments)
    options.command = shlex.join(["mmlens", *arguments])
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        code: int | None = options.run(options)
    except _USER_ERRORS as error:
        print(f"mmlens: {_printable(str(error))}", file=sys.stderr)
        return 2
    return code or 0


def _printable(text: str) -> str:
    """A text without signs that would move a terminal's cursor or change its colours."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else repr(sign)[1:-1] for sign in text)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmlens",
        description="Find and test attention heads of vision-language models.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    def command(
        name: str, does: Callable[[argparse.Namespace], int | None], help: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=help, description=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        added.set_defaults(run=does, threads=0, given=set())
        return added

    core = command(
        "core-heads", _core_heads, "find CoRe heads on one split and test them causally on another"
    )
    core.add_argument("--model", default="micro", help="a shipped model, a folder, or a hub id")
    core.add_argument(
        "--out", type=Path, required=True, help="folder for summary.json, tables and report.html"
    )
    _add_run_options(core)
    core.add_argument(
        "--counts", type=_whole(1), nargs="+", help="numbers of heads to ablate; 5%% of all is always added"
    )
    core.add_argument(
        "--modes",
        nargs="+",
        default=list(MODES),
        type=_name_of("mode", list(ABLATION_MODES)),
        help=f"ablation modes: {', '.join(ABLATION_MODES)}",
    )
    core.add_argument("--draws", type=_whole(1), default=10, help="draws of each random arm")
    core.add_argument(
        "--mapping",
        default="merged",
        type=_name_of("mapping", ("merged", "paper_floor")),
        help="box to token: merged or paper_floor",
    )

    one = command("run", _run, "run one experiment on one or more models (docs/experiments.md)")
    one.add_argument("experiment", help="its name; `mmlens experiments` lists them")
    _add_models(one)
    one.add_argument("--out", type=Path, required=True, help="folder for a folder of every model")
    _add_run_options(one)
    one.add_argument(
        "--set",
        dest="settings",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="settings of the experiment; `mmlens experiments NAME` lists them",
    )

    listed = command("experiments", _experiments, "list the experiments, or all about one")
    listed.add_argument("experiment", nargs="?", help="one experiment, with its method and settings")

    again = command("rerun", _rerun, "run again what a run's folder says, and compare every number")
    again.add_argument("folder", type=Path, help="a run's folder, or one with runs below it")
    again.add_argument("--out", type=Path, help="keep the new run in this folder")
    again.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="relative difference at which floats still agree"
    )
    again.add_argument("--model", help="where the model lies now, if not where it lay")
    again.add_argument("--data", help="where the folder of examples lies now, if not where it lay")
    again.add_argument("--images-outside", action="store_true", help=_OUTSIDE)
    again.add_argument(
        "--threads", type=_whole(0, MOST_THREADS), help="torch threads, if not those of the run"
    )
    again.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code that lies in the model's folder, where the run did",
    )
    again.add_argument(
        "--set",
        dest="settings",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="settings in place of the record's, which are not taken from it above a million",
    )

    paper = command("paper", _paper, "run all experiments on all models, and write one report of them")
    _add_models(paper)
    paper.add_argument("--out", type=Path, required=True, help="folder for the runs and report.html")
    paper.add_argument("--experiments", nargs="+", metavar="NAME", help="these alone (default: all)")
    paper.add_argument("--jobs", type=_whole(1), default=1, help="models run at a time (default: 1)")
    _add_run_options(paper)

    faster = command(
        "accelerate",
        _accelerate,
        "time prefill with the heads of the highest scores dense, the others streaming",
    )
    faster.add_argument("--model", default="micro", help="a shipped model, a folder, or a hub id")
    faster.add_argument(
        "--heads", type=Path, required=True, help="scores, as `mmlens core-heads` writes them"
    )
    faster.add_argument("--lengths", type=int, nargs="+", required=True, help="tokens of the prompts")
    faster.add_argument("--fractions", type=float, nargs="+", default=[0.05], help="shares of dense heads")
    faster.add_argument("--sink", type=int, default=512, help="first tokens that every head sees")
    faster.add_argument("--window", type=int, default=4096, help="last tokens that every head sees")
    faster.add_argument(
        "--parts",
        nargs="+",
        default=list(PARTS),
        type=_name_of("part", PARTS),
        help=f"what to time: {', '.join(PARTS)}",
    )
    faster.add_argument(
        "--quality", type=Path, help="a run of `mmlens run hybrid`, to put accuracy beside speed"
    )
    faster.add_argument(
        "--repeats", type=_whole(1), default=5, help="pairs of runs, after two of either side"
    )
    faster.add_argument("--out", type=Path, required=True, help="folder for speed.csv and report.html")
    faster.add_argument("--seed", type=_whole(0, MOST_SEED), default=0, help="seed of the random tokens")
    _add_loading_options(faster)

    families = command(
        "families",
        _families,
        "which of transformers' image-text-to-text families are supported, and how far",
    )
    families.add_argument("family", nargs="?", help="one family (a model_type), with all its notes")
    families.add_argument("--csv", type=Path, help="write the whole table to this file")
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands.choices:
        parser.error(unknown_name_message("command", arguments[0], commands.choices))
    return parser


class _Parser(argparse.ArgumentParser):
    """argparse's, but for what it lets pass: an option cut short, or given twice, of which it takes the last.

    An option that there is not is named with the nearest.
    """

    def __init__(self, **options: Any) -> None:
        self.names: list[str] = []
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        for text in args or ():
            name = str(text).partition("=")[0]
            if name == "--":
                break
            if name.startswith("--") and name not in self.names:
                self.error(unknown_name_message("option", name, self.names))
        return super().parse_known_args(args, namespace)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        self.names += [name for name in names if str(name).startswith("--")]
        if names and str(names[0]).startswith("--"):
            known = {"store": _Once, "store_true": _FlagOnce}
            options["action"] = known.get(options.get("action", "store"), options.get("action"))
        return super().add_argument(*names, **options)


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


def _note_given(namespace: argparse.Namespace, action: argparse.Action, option: str | None) -> None:
    given = namespace.__dict__.setdefault("given", set())
    if action.dest in given:
        raise argparse.ArgumentError(action, f"{option} is given twice")
    given.add(action.dest)


class _Once(argparse.Action):
    """An option with a value, or with several that all differ."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        _note_given(namespace, self, option)
        for index, value in enumerate(values if isinstance(values, list) else []):
            if value in values[:index]:
                raise argparse.ArgumentError(self, f"{value!r} is given twice")
        setattr(namespace, self.dest, values)


class _FlagOnce(argparse.Action):
    """An option without a value."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, default=False, **options)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        _note_given(namespace, self, option)
        setattr(namespace, self.dest, True)


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        nargs="+",
        dest="models",
        default=shipped_models(),
        help="shipped models, folders, or hub ids",
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options that are fields of `Request`."""
    parser.add_argument("--data", help="a folder of examples (docs/data.md); shipped models have their own")
    parser.add_argument("--images-outside", action="store_true", help=_OUTSIDE)
    parser.add_argument(
        "--n-selection", type=_whole(1), default=40, help="generated examples of each kind to choose heads on"
    )
    parser.add_argument(
        "--n-evaluation", type=_whole(1), default=30, help="generated examples of each kind to judge heads on"
    )
    parser.add_argument(
        "--selection-share", type=float, default=0.5, help="with --data: share of it to choose heads on"
    )
    parser.add_argument(
        "--seed", type=_whole(0, MOST_SEED), default=0, help="seed of examples and of all random choices"
    )
    parser.add_argument("--batch-size", type=_whole(1), default=30, help="examples in a forward pass")
    _add_loading_options(parser)


def _add_loading_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", help="as transformers takes it, e.g. bfloat16")
    parser.add_argument("--device-map", help="as transformers takes it, e.g. auto")
    parser.add_argument("--attn-implementation", help="as transformers takes it, e.g. sdpa")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code from the hub")
    parser.add_argument(
        "--threads", type=_whole(0, MOST_THREADS), default=0, help="torch threads (0: torch's own choice)"
    )


def _request(options: argparse.Namespace, experiment: str, model: str, settings: dict[str, Any]) -> Request:
    names = {field.name for field in fields(Request)} - {"experiment", "model", "settings"}
    given = {name: getattr(options, name) for name in names}
    return Request(experiment, model, settings=settings, **given)


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
            settings[name] = _parsed(text, defaults[name])
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
        run(_request(options, experiment.name, model, settings), folder, command=options.command)
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
        found = rerun(
            folder,
            out,
            tolerance=options.tolerance,
            model=options.model,
            data=options.data,
            threads=options.threads,
            trust_remote_code=options.trust_remote_code,
            images_outside=options.images_outside,
            settings=_given_settings(folder, options.settings),
        )
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


def _given_settings(folder: Path, given: Sequence[str]) -> dict[str, Any]:
    if not given:
        return {}
    return parsed_settings(experiment_named(request_of(read_record(folder)).experiment), given)


def _paper(options: argparse.Namespace) -> int:
    outcomes = run_all(
        options.models,
        options.out,
        _request(options, "", "", {}),
        experiments=options.experiments,
        jobs=options.jobs,
        command=options.command,
    )
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    print(f"{len(outcomes)} runs, {len(failed)} failed\nreport: {options.out / 'report.html'}")
    return int(bool(failed))


def _accelerate(options: argparse.Namespace) -> None:
    check_folder(options.out, ACCELERATE_RECORD)
    scores = load_scores(options.heads)
    model = load_model(
        Request(
            "",
            options.model,
            dtype=options.dtype,
            device_map=options.device_map,
            attn_implementation=options.attn_implementation,
            trust_remote_code=options.trust_remote_code,
        )
    )
    found = accelerate(
        model,
        scores,
        options.lengths,
        fractions=options.fractions,
        sink=options.sink,
        window=options.window,
        parts=options.parts,
        repeats=options.repeats,
        seed=options.seed,
        name=options.model,
        quality=options.quality,
    )
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


def _core_heads(options: argparse.Namespace) -> None:
    settings = {
        "counts": options.counts,
        "modes": options.modes,
        "n_draws": options.draws,
        "mapping": options.mapping,
    }
    run(_request(options, "core-heads", options.model, settings), options.out, command=options.command)
    print(f"\n{read_record(options.out)['statement']}")
    print(f"report: {options.out / 'report.html'}")
