"""What an experiment is: a function from a model and two splits of examples to findings, and what is said of it."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from mmlens.arguments import (
    flag,
    fraction_of,
    fractions_of,
    instance_of,
    known_keywords,
    names_of,
    number,
    one_of,
    path_of,
    seed_of,
    text,
    texts,
    whole_number,
    whole_numbers,
)
from mmlens.data.examples import Example, examples_of
from mmlens.data.splits import check_no_repeats, overlap_message, shared_groups
from mmlens.errors import InvalidValueError
from mmlens.experiments.judging import FIRST_TOKEN, JUDGES, Judge, check_candidates
from mmlens.interventions.ablation import MODES
from mmlens.model.hooked_vlm import HookedVLM, model_of
from mmlens.token_map import mapping_of


@dataclass(frozen=True)
class Setup:
    """What every experiment is given: heads are chosen on `selection` and judged on `evaluation`.

    `name` is the model's, as the user wrote it. Splits that share an example or a group are refused unless
    `force_overlap`, which warns, and says so in `leak`. `answers` says how answers are judged: by their "first token",
    "whole" or "generated" (docs/experiments.md). Raises ValueError for these, and where one of the splits holds
    an example twice, or an example lacks the candidates that whole answers are judged among.
    """

    model: HookedVLM
    selection: Sequence[Example]
    evaluation: Sequence[Example]
    seed: int = 0
    batch_size: int = 30
    progress: bool = True
    name: str = ""
    force_overlap: bool = False
    answers: str = FIRST_TOKEN
    leak: str = field(default="", init=False)

    @property
    def options(self) -> dict[str, Any]:
        """How to run examples: what scores and effects take as their keywords `batch_size` and `progress`."""
        return {"batch_size": self.batch_size, "progress": self.progress}

    @property
    def judge(self) -> Judge:
        """The metrics that answers are judged by."""
        return JUDGES[self.answers]

    def __post_init__(self) -> None:
        model_of(self.model)
        one_of("answers", self.answers, tuple(JUDGES))
        for part in ("selection", "evaluation"):
            object.__setattr__(self, part, examples_of(getattr(self, part), part, least=0))
        seed_of(self.seed)
        whole_number("batch_size", self.batch_size, least=1)
        flag("progress", self.progress)
        for name, split in (("selection", self.selection), ("evaluation", self.evaluation)):
            check_no_repeats(name, split)
            check_candidates(self.answers, name, split)
        flag("force_overlap", self.force_overlap)
        shared = shared_groups(self.selection, self.evaluation)
        if shared and not self.force_overlap:
            raise InvalidValueError(
                f"{overlap_message(shared)}, or pass force_overlap=True to see by how much"
            )
        if shared:
            leak = (
                f"Selection and evaluation share {len(shared)} example(s) or group(s), by force: heads chosen and "
                "judged on the same data look better than they are"
            )
            object.__setattr__(self, "leak", leak)
            # After this method and `__init__`, whoever asked for it.
            warnings.warn(leak, stacklevel=4)


def _draws(name: str, value: object) -> int:
    return whole_number(name, value, least=1)


def _per_kind(name: str, value: object) -> int | None:
    return None if value is None else whole_number(name, value, least=2)


_SETTINGS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("fraction", "keep"), fraction_of),
    **dict.fromkeys(("shares", "fractions", "ratio_shares", "coverage_shares"), fractions_of),
    **dict.fromkeys(("n_draws", "n_resamples", "n_splits", "n_groups", "n_heads"), _draws),
    **dict.fromkeys(("n_per_kind", "n_per_kind_single"), _per_kind),
    **dict.fromkeys(
        ("scores", "rankings"), lambda name, value: texts(name, value, "a list of names", least=1)
    ),
    **dict.fromkeys(("tags", "fallback_tags"), lambda name, value: _tags(name, value)),
    "q": lambda name, value: number(name, value, above=0, below=1),
    "sink": lambda name, value: whole_number(name, value, least=0),
    "windows": lambda name, value: whole_numbers(name, value, least=1),
    "counts": lambda name, value: None if value is None else whole_numbers(name, value),
    "mapping": lambda name, value: mapping_of(value),
    "mode": lambda name, value: one_of("ablation mode", value, MODES),
    "modes": lambda name, value: names_of("ablation modes", value, MODES),
    "null_questions": lambda name, value: [
        text(name, one) for one in texts(name, value, "a list of questions")
    ],
    "pages_per_prompt": lambda name, value: None if value is None else whole_number(name, value, least=1),
    "checkpoints": lambda name, value: str(path_of(name, value)),
}
"""What is checked of a setting, by its name: the same in all experiments."""


def _tags(name: str, value: object) -> list[str]:
    pair = texts(name, value, "two texts, the mark before the evidence and the mark after it")
    if len(pair) != 2:
        raise InvalidValueError(
            f"{name} is {pair}; expected two texts, the mark before the evidence and the mark after it"
        )
    return pair


def judges_as_asked(run: Callable[..., Findings]) -> Callable[..., Findings]:
    """Decorator of an experiment's `run` that judges answers by `setup.judge`. Others take the first token alone."""
    marked: Any = run
    marked.judges_as_asked = True
    return run


def can_judge(run: Callable[..., Findings], answers: str) -> bool:
    """Whether the experiment's `run` can judge answers so."""
    return answers == FIRST_TOKEN or getattr(run, "judges_as_asked", False)


def check_answers(name: str, run: Callable[..., Findings], answers: str) -> None:
    """Raise ValueError where the experiment of that name cannot judge answers so."""
    one_of("answers", answers, tuple(JUDGES))
    if not can_judge(run, answers):
        raise InvalidValueError(
            f"the experiment {name} cannot judge answers as {answers!r}: it reads first tokens only, or judges no "
            f"answers; it takes answers={FIRST_TOKEN!r}"
        )


def checked_settings(run: Callable[..., Findings]) -> Callable[..., Findings]:
    """Decorator of an experiment's `run`: its setup and its settings are checked before anything is run.

    Of splits that overlap by force, and of answers judged by more than their first token, the statement says so. Lists
    reach `run` as tuples, whoever gave them: Python, JSON or the command line. Raises ValueError where answers are to
    be judged as the experiment cannot (`judges_as_asked`).
    """

    @functools.wraps(run)
    def checked(setup: Setup, **settings: Any) -> Findings:
        instance_of("setup", setup, Setup, "a Setup: Setup(model, selection, evaluation)")
        check_answers(run.__module__.rsplit(".", 1)[-1].replace("_", "-"), run, setup.answers)
        parameters = inspect.signature(run).parameters
        known_keywords("the experiment", settings, [name for name in parameters if name != "setup"])
        given = {
            name: _SETTINGS[name](name, value) if name in _SETTINGS else value
            for name, value in settings.items()
        }
        found = run(
            setup,
            **{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()},
        )
        told = [said for said in (setup.judge.told, setup.leak) if said not in found.statement]
        return replace(found, statement=" ".join([found.statement, *(f"{said}." for said in told)]))

    return checked


Figures = list[tuple[str, str, Figure]]
"""(title, caption, figure), in the order of a report."""


@dataclass(frozen=True, eq=False)
class Findings:
    """What an experiment found.

    `numbers` is plain JSON (no NaN) and is what a rerun is compared by; `tables` is name -> (caption, table);
    `per_example` the raw results, one row per example and measurement; `figures` are (title, caption, figure).
    A run's folder holds numbers.json and a folder for each sort of table (docs/experiments.md), or, if `flat`,
    summary.json and all tables beside it.
    """

    statement: str
    numbers: dict[str, Any]
    tables: dict[str, tuple[str, pd.DataFrame]] = field(default_factory=dict)
    per_example: dict[str, pd.DataFrame] = field(default_factory=dict)
    figures: Figures = field(default_factory=list)
    flat: bool = False


@dataclass(frozen=True)
class Experiment:
    """An experiment by name: what it asks, where it comes from, and the function that runs it.

    `run(setup, **settings)`; the settings are its keyword-only parameters. `method` says in one or two sentences
    what is done, for the methods section of a paper; {names} in it are settings. `cites` are keys of
    `mmlens/experiments/references.bib`. `published` holds the numbers that the source gives, if it gives any, and
    `across` turns the findings of several models into one table and figure; it is given them as they were read
    back from the runs' folders: without figures, and with arrays where a table's cells held lists.
    """

    name: str
    title: str
    source: str
    question: str
    method: str
    run: Callable[..., Findings]
    cites: tuple[str, ...] = ()
    published: pd.DataFrame | None = None
    across: Callable[[Mapping[str, Findings]], Findings] | None = None
    by_name: str = ""
    """Why `mmlens paper` runs it only where it is named: what it needs beyond a model and examples, or repeats."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of `run` with their defaults."""
        return {
            name: parameter.default
            for name, parameter in inspect.signature(self.run).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        }

    @property
    def may_be_none(self) -> frozenset[str]:
        """The settings that may be None whatever their default is, by their annotations."""
        parameters = inspect.signature(self.run).parameters
        return frozenset(
            name for name in self.settings if "None" in str(parameters[name].annotation).split(" | ")
        )
