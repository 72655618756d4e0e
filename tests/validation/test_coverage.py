"""Intervals hold the truth as often as docs/truth.md says; the table there comes from the same simulation."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import rank_intervals
import scipy.stats

from mmlens.statistics import bootstrap_interval


def simulation() -> ModuleType:
    path = Path(__file__).parents[2] / "experiments" / "validation" / "intervals.py"
    spec = importlib.util.spec_from_file_location("truth_intervals", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


COVERAGE = simulation()


@pytest.mark.parametrize("n", [30, 100])
@pytest.mark.parametrize("cell", COVERAGE.CELLS, ids=lambda cell: f"{cell.interval}: {cell.distribution}")
def test_intervals_cover_what_is_documented(cell, n: int) -> None:
    outcomes = "outcomes" in cell.distribution
    n_simulations = 300 if outcomes else 60
    held = sum(COVERAGE.covers(cell, n, seed) for seed in range(n_simulations))
    low, high = COVERAGE.DOCUMENTED.get((cell.interval, cell.distribution, n), (0.93, 0.97))
    assert scipy.stats.binom.ppf(0.001, n_simulations, low) <= held
    assert held <= scipy.stats.binom.ppf(0.999, n_simulations, high)


def test_bootstrap_intervals_of_few_values_reach_as_far_as_students_t() -> None:
    """Of a sample whose resampled means are close to normal the two are the same interval."""
    sample = scipy.stats.norm.ppf((np.arange(12) + 0.5) / 12)
    found = bootstrap_interval(sample, n_resamples=40_000, method="percentile")
    expected = scipy.stats.t.interval(0.95, 11, loc=sample.mean(), scale=scipy.stats.sem(sample))
    assert tuple(found) == pytest.approx(expected, rel=0.03)
    plain = scipy.stats.norm.interval(0.95, loc=sample.mean(), scale=sample.std() / np.sqrt(12))
    assert found.high > 1.1 * plain[1]


def test_the_simulation_knows_the_truth() -> None:
    """The true values, by large samples."""
    for cell in COVERAGE.CELLS:
        sample = cell.draw(np.random.default_rng(0), 200_000)
        estimate = {
            "mean": lambda x: x.mean(),
            "paired difference": lambda x, y: (x - y).mean(),
            "ratio of means": lambda x, y: x.mean() / y.mean(),
        }[cell.interval](*sample)
        assert estimate == pytest.approx(cell.truth, abs=0.02), cell.distribution


def test_the_chosen_interval_of_rho_covers_more_of_few_examples_than_moved_quantiles_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One row of the table in docs/truth.md, by the same script."""
    world = next(rank_intervals.worlds())
    monkeypatch.setattr(rank_intervals, "worlds", lambda: [world])
    monkeypatch.setattr(rank_intervals, "SIZES", (6,))
    row = rank_intervals.coverage(100, progress=False).iloc[0]
    assert row["recentred"] < 0.92 <= row["chosen"]
