"""Correlations and stability counts against scipy and the plain model's attention, intervals by simulation."""

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
from mmlens.experiments.common import with_evidence
from mmlens.experiments.experiment import Findings, Setup
from mmlens.experiments.stability import (
    EXPERIMENT,
    across,
    chance_of_shared,
    correlation_interval,
    rank_correlations,
    split_half,
)
from mmlens.heads import HeadScores
from mmlens.statistics import percentile_interval

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


def test_rank_correlations_are_scipy_s_with_ties_too() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 5, (4, 20)), rng.integers(0, 5, (4, 20))
    expected = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(rank_correlations(one, other), expected)


def test_chance_is_that_of_independent_draws() -> None:
    drawn = chance_of_shared(n_heads=20, top=6, n_kinds=3, n_draws=3000, seed=0)
    expected = 20 * scipy.stats.binom.pmf(range(4), 3, 6 / 20)
    np.testing.assert_allclose(drawn.mean(0), expected, atol=0.1)
    assert (drawn @ np.arange(4) == 18).all()


def test_split_halves_tell_signal_from_noise() -> None:
    rng = np.random.default_rng(0)
    signal = np.linspace(0, 1, 30) + rng.normal(0, 1e-6, (10, 30))
    kinds = ("a",) * 5 + ("b",) * 5
    assert split_half(HeadScores(torch.tensor(signal)[:, None], kinds=kinds), 10, 0).min() > 0.999
    noise = split_half(HeadScores(torch.tensor(rng.normal(size=(40, 1, 300)))), 50, 0)
    # Halves of one sample of noise: each split's correlation is centred at 0.
    assert abs(noise.mean()) < 0.1
    with pytest.raises(ValueError, match="at least 2 examples of every kind"):
        split_half(HeadScores(torch.tensor(signal)[:3, None], kinds=("a", "a", "b")), 10, 0)


def test_the_interval_covers_what_as_many_examples_give_and_the_middle_of_the_draws_does_not() -> None:
    rng = np.random.default_rng(0)
    n, n_heads, trials = 30, 64, 150
    base = rng.normal(size=n_heads)
    truths = np.exp(0.5 * base), np.exp(0.5 * (0.6 * base + 0.8 * rng.normal(size=n_heads)))
    estimates, intervals, naive = [], [], []
    for _ in range(trials):
        samples = [truth * rng.gamma(1.0, 1.0, (n, n_heads)) for truth in truths]
        draws = [rng.multinomial(n, np.full(n, 1 / n), size=150) @ sample / n for sample in samples]
        estimates.append(float(rank_correlations(*[sample.mean(0, keepdims=True) for sample in samples])[0]))
        resampled = rank_correlations(*draws)
        intervals.append(correlation_interval(estimates[-1], resampled, n))
        naive.append(percentile_interval(resampled))
    target = np.mean(estimates)
    covered, naively = (np.mean([low <= target <= high for low, high in each]) for each in (intervals, naive))
    assert 0.88 <= covered <= 0.99 and naively < covered


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
