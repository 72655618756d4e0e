"""Every experiment of the catalog can be described, cited and recorded before it is run."""

from __future__ import annotations

import json
import re

import pytest

from mmlens.experiments.catalog import EXPERIMENTS
from mmlens.experiments.core_heads import CORE_HEADS
from mmlens.runs.methods import bibliography, bibtex_entries, filled_method

ALL = {**EXPERIMENTS, CORE_HEADS.name: CORE_HEADS}


def test_names_are_their_own() -> None:
    assert CORE_HEADS.name not in EXPERIMENTS
    for name, experiment in EXPERIMENTS.items():
        assert name == experiment.name and re.fullmatch(r"[a-z0-9-]+", name)


@pytest.mark.parametrize("name", ALL)
def test_an_experiment_can_be_described(name: str) -> None:
    experiment = ALL[name]
    assert experiment.title and experiment.source and experiment.question.endswith("?")
    assert "{" not in filled_method(experiment, experiment.settings)
    assert json.loads(json.dumps(experiment.settings)).keys() == experiment.settings.keys()
    assert bibliography(experiment.cites).count("\n@") == len(experiment.cites) + 2


def test_references_are_whole() -> None:
    entries = bibtex_entries()
    assert {"mmlens", "transformers", "transformer_lens", "arxiv_2606_05843"} <= set(entries)
    for key, entry in entries.items():
        assert entry.count("{") == entry.count("}"), key
        assert re.search(r"\n  (title|eprint) = \{\S", entry), key
    with pytest.raises(ValueError, match=r"no entry of references.bib 'arxiv_2606_0584'; the nearest"):
        bibliography(["arxiv_2606_0584"])
