"""Correlations and stability counts against scipy and the plain model's attention."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import scipy.stats
import torch
from plain_attention import seen_by_plain_model
from plain_runs import scenes

import mmlens
from mmlens.experiments.ablations import with_evidence
from mmlens.experiments.experiment import Findings, Setup
from mmlens.experiments.stability import (
    EXPERIMENT,
    across,
    chance_of_shared,
)

KINDS = ("documents", "images", "objects")


@pytest.fixture(scope="module")
def setup(micro: mmlens.HookedVLM) -> Setup:
    return Setup(micro, scenes(4, 1, KINDS), scenes(2, 2, KINDS), batch_size=10, progress=False)


@pytest.fixture(scope="module")
def found(setup: Setup) -> Findings:
    return EXPERIMENT.run(setup, n_resamples=200, n_splits=20, n_draws=300)


def test_correlations_and_counts_are_those_of_the_plain_model(setup: Setup, found: Findings) -> None:
    examples = with_evidence(setup.selection)
    plain = torch.stack([seen.ram for seen in seen_by_plain_model(setup.model, examples)]).flatten(1)
    means = {kind: plain[[e.kind == kind for e in examples]].mean(0).numpy() for kind in KINDS}
    rows = found.numbers["spearman"]
    assert [(row["one"], row["other"]) for row in rows] == [KINDS[:2], KINDS[::2], KINDS[1:]]
    for row in rows:
        expected = scipy.stats.spearmanr(means[row["one"]], means[row["other"]]).statistic
        assert row["spearman"] == pytest.approx(expected, abs=1e-3)
        assert row["low"] < row["spearman"] < row["high"] and row["without_noise"] >= row["spearman"]
    times = np.zeros(64, dtype=int)
    for mean in means.values():
        times[np.argsort(-mean)[:3]] += 1
    assert [row["heads"] for row in found.numbers["counts"]] == np.bincount(times, minlength=4).tolist()
    assert found.numbers["in_all_tops"] == [[at // 8, at % 8] for at in np.flatnonzero(times == 3)]
    json.dumps(found.numbers, allow_nan=False)


def test_chance_is_that_of_independent_draws() -> None:
    drawn = chance_of_shared(n_heads=20, top=6, n_kinds=3, n_draws=3000, seed=0)
    expected = 20 * scipy.stats.binom.pmf(range(4), 3, 6 / 20)
    np.testing.assert_allclose(drawn.mean(0), expected, atol=0.1)
    assert (drawn @ np.arange(4) == 18).all()


def test_one_kind_is_refused(setup: Setup) -> None:
    one = dataclasses.replace(setup, selection=scenes(3, 1, ["objects"]))
    with pytest.raises(
        ValueError, match=r"stability compares kinds of task; the examples have \['objects'\]"
    ):
        EXPERIMENT.run(one)


def test_across_counts_the_models_that_agree(found: Findings) -> None:
    agreeing = Findings("", {**found.numbers, "agrees": True})
    both = across({"one": agreeing, "two": Findings("", {**found.numbers, "agrees": False})})
    assert "in 1 of 2 models" in both.statement and len(both.figures) == 1
