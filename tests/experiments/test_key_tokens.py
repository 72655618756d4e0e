"""Key Token Ratio and Coverage, token by token from the plain model's attention."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_attention import Seen, seen_by_plain_model
from plain_runs import small_setup

import mmlens
from mmlens.cli import main
from mmlens.experiments.ablations import with_evidence
from mmlens.experiments.experiment import Findings, Setup
from mmlens.experiments.key_tokens import COVERAGE_SHARES, EXPERIMENT, across
from mmlens.runs.rerun import rerun
from mmlens.runs.run import read_record
from mmlens.scores.retrieval import ram
from mmlens.statistics import proportion_interval


@pytest.fixture(scope="module")
def setup(micro: mmlens.HookedVLM) -> Setup:
    return small_setup(micro)


@pytest.fixture(scope="module")
def found(setup: Setup) -> Findings:
    return EXPERIMENT.run(setup, coverage_shares=(0.02, 0.1), n_draws=2)


@pytest.fixture(scope="module")
def seen(setup: Setup) -> list[Seen]:
    return seen_by_plain_model(setup.model, with_evidence(setup.evaluation))


def test_ratios_are_counted_on_the_evaluation_split(setup: Setup, found: Findings, seen: list[Seen]) -> None:
    scores = ram(setup.model, with_evidence(setup.selection), progress=False)
    for row in found.numbers["ratios"]:
        heads = scores.top(row["heads"]) if row["arm"] == "top" else scores.bottom(row["heads"])
        each = [[float(s.hits(*head).float().mean()) for head in heads] for s in seen]
        assert row["mean"] == pytest.approx(100 * np.mean(each), abs=1e-4)
        assert row["hits_at_50"] == pytest.approx(np.mean(np.array(each) >= 0.5))
        assert row["low"] <= row["mean"] + 1e-9 and row["mean"] <= row["high"] + 1e-9
        if not np.any(each):
            # Zero in n examples leaves as much open as Wilson's interval says, in percent.
            assert row["high"] == pytest.approx(100 * proportion_interval([0] * len(seen)).high)
    assert {row["heads"] for row in found.numbers["ratios"]} == {1, 3}
    assert found.numbers["ceiling"] == pytest.approx(
        100 * np.mean([min(1, (s.mean.shape[-1] // 20) / int(s.evidence.sum())) for s in seen])
    )
    assert found.numbers["chance"] == pytest.approx(
        100 * np.mean([(s.mean.shape[-1] // 20) / s.mean.shape[-1] for s in seen])
    )
    json.dumps(found.numbers, allow_nan=False)


def test_coverage_is_the_union_over_heads(setup: Setup, found: Findings, seen: list[Seen]) -> None:
    scores = ram(setup.model, with_evidence(setup.selection), progress=False)
    rows = {(row["arm"], row["heads"]): row["mean"] for row in found.numbers["coverage"]}
    assert set(rows) == {(arm, count) for arm in ("top", "bottom", "random") for count in (1, 6)}
    sets = {"top": [scores.top(6)], "random": [scores.top(6).random(draw) for draw in (0, 1)]}
    for arm, chosen in sets.items():
        covered = [
            float(torch.stack([s.hits(*head) for head in heads]).any(0).float().mean())
            for heads in chosen
            for s in seen
        ]
        assert rows[arm, 6] == pytest.approx(100 * np.mean(covered), abs=1e-4)


def test_the_default_shares_are_those_of_the_figure() -> None:
    assert len(COVERAGE_SHARES) == 10 and COVERAGE_SHARES[0] == 20 / 1152 and COVERAGE_SHARES[-1] == 200 / 784


def test_across_has_top_and_bottom_of_every_model(found: Findings) -> None:
    both = across({"one": found, "two": found})
    assert both.tables["ratio"][1]["arm"].tolist() == ["top", "bottom"] * 2
    assert set(both.tables["ratio"][1]["heads"]) == {1}


@pytest.mark.slow
def test_the_command_s_lists_are_kept_and_repeated(tmp_path: Path) -> None:
    given = ["run", "key-tokens", "--out", str(tmp_path), "--n-selection", "2", "--n-evaluation", "2"]
    assert main([*given, "--set", "ratio_shares=.05,.1", "coverage_shares=.05", "n_draws=1"]) == 0
    assert read_record(tmp_path / "micro")["request"]["settings"] == {
        "ratio_shares": [0.05, 0.1], "coverage_shares": [0.05], "n_draws": 1
    }  # fmt: skip
    found = rerun(tmp_path / "micro", progress=False)
    assert found.same and found.largest == 0
