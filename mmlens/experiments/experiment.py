"""What an experiment is: a function from a model and two splits of examples to findings, and what is said of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from mmlens.data.examples import Example, overlap_message, shared_groups
from mmlens.errors import InvalidValueError
from mmlens.hooked_vlm import HookedVLM


@dataclass(frozen=True)
class Setup:
    """What every experiment is given: heads are chosen on `selection` and judged on `evaluation`.

    `name` is the model's, as the user wrote it. Raises ValueError where the splits share an example or a group.
    """

    model: HookedVLM
    selection: Sequence[Example]
    evaluation: Sequence[Example]
    seed: int = 0
    batch_size: int = 30
    progress: bool = True
    name: str = ""

    def __post_init__(self) -> None:
        shared = shared_groups(self.selection, self.evaluation)
        if shared:
            raise InvalidValueError(overlap_message(shared))


@dataclass(frozen=True, eq=False)
class Findings:
    """What an experiment found.

    `numbers` is plain JSON (no NaN) and is what a rerun is compared by; `tables` is name -> (caption, table);
    `per_example` the raw results, one row per example and measurement; `figures` are (title, caption, figure).
    `save` writes them in another layout than a run's own (docs/experiments.md) to a folder, with its own
    report.html, and returns the files by which a rerun is compared.
    """

    statement: str
    numbers: dict[str, Any]
    tables: dict[str, tuple[str, pd.DataFrame]] = field(default_factory=dict)
    per_example: dict[str, pd.DataFrame] = field(default_factory=dict)
    figures: list[tuple[str, str, Figure]] = field(default_factory=list)
    save: Callable[[Path], list[str]] | None = None


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
    needs: str = ""
    """What it needs beyond a model and examples. Such an experiment is run by name only, not by `mmlens paper`."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of `run` with their defaults."""
        return {
            name: parameter.default
            for name, parameter in inspect.signature(self.run).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        }
