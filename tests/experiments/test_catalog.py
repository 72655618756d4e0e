"""Every experiment of the catalog can be described, cited and recorded before it is run."""

from __future__ import annotations

import functools
import inspect
import json
import re
import typing
from typing import Any

import pytest
from beartype.door import is_bearable

import mmlens
from mmlens.experiments.catalog import EXPERIMENTS
from mmlens.experiments.experiment import Findings, Setup, checked_settings
from mmlens.runs.methods import bibliography, bibtex_entries, filled_method
from mmlens.runs.run import Request, full_settings, request_of, request_record


def test_names_are_their_own() -> None:
    for name, experiment in EXPERIMENTS.items():
        assert name == experiment.name and re.fullmatch(r"[a-z0-9-]+", name)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_can_be_described(name: str) -> None:
    experiment = EXPERIMENTS[name]
    assert experiment.title and experiment.source and experiment.question.endswith("?")
    assert "{" not in filled_method(experiment, experiment.settings)
    assert json.loads(json.dumps(experiment.settings)).keys() == experiment.settings.keys()
    assert bibliography(experiment.cites).count("\n@") == len(experiment.cites) + 2


def given_to(run: Any, setup: Setup, **settings: Any) -> dict[str, Any]:
    """What reaches an experiment's own function of the settings that its `run` is called with."""
    plain, seen = inspect.unwrap(run), {}

    @functools.wraps(plain)
    def function(setup: Setup, **given: Any) -> Findings:
        seen.update(given)
        return Findings("", {})

    checked_settings(function)(setup, **settings)
    return seen


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_settings_are_of_their_kind_after_a_record(micro: mmlens.HookedVLM, name: str) -> None:
    """As given in Python, and as read back from a record: JSON has lists only, the functions say tuples."""
    experiment, setup = EXPERIMENTS[name], Setup(micro, [], [])
    hints = typing.get_type_hints(inspect.unwrap(experiment.run))
    lists = {name: list(v) if isinstance(v, tuple) else v for name, v in experiment.settings.items()}
    if "counts" in lists:
        lists["counts"] = [1, 2]
    record = json.loads(json.dumps(request_record(Request(name, "micro", settings=lists), experiment)))
    read = full_settings(experiment, request_of({"request": record}).settings)
    for given in (given_to(experiment.run, setup, **lists), given_to(experiment.run, setup, **read)):
        assert given == experiment.settings | ({"counts": (1, 2)} if "counts" in lists else {})
        for setting, value in given.items():
            assert is_bearable(value, hints[setting]), (setting, value)


def test_references_are_whole() -> None:
    entries = bibtex_entries()
    assert {"mmlens", "transformers", "transformer_lens", "arxiv_2606_05843"} <= set(entries)
    for key, entry in entries.items():
        assert entry.count("{") == entry.count("}"), key
        assert re.search(r"\n  (title|eprint) = \{\S", entry), key
    with pytest.raises(ValueError, match=r"no entry of references.bib 'arxiv_2606_0584'; the nearest"):
        bibliography(["arxiv_2606_0584"])


@pytest.mark.parametrize(
    ("name", "settings"), [("head-map", {}), ("core-heads", {"modes": ["zero"], "n_draws": 1})]
)
def test_findings_on_splits_that_overlap_say_so(
    name: str, settings: dict[str, Any], micro: mmlens.HookedVLM
) -> None:
    """Once, whichever experiment it is; one without an overlap does not."""
    examples = mmlens.scene_examples("objects", 4, seed=0)
    with pytest.warns(UserWarning, match="share 4 example"):
        setup = Setup(micro, examples, examples, progress=False, force_overlap=True)
    found = EXPERIMENTS[name].run(setup, **settings)
    assert found.statement.count("by force: heads chosen and judged on the same data look better") == 1
    apart = Setup(micro, examples, mmlens.scene_examples("objects", 4, seed=1), progress=False)
    assert "by force" not in EXPERIMENTS[name].run(apart, **settings).statement
