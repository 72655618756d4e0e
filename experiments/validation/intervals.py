"""How often the library's 95% intervals hold the true value, by simulation.

    python experiments/validation/intervals.py [n_simulations]

Prints one row per interval, distribution and number of examples.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from tqdm import tqdm

from mmlens.statistics import mean_interval, paired_difference_interval, ratio_interval

N_RESAMPLES = 999
SIZES = (30, 100)

Rng = np.random.Generator
Sample = np.ndarray


@dataclass(frozen=True)
class Cell:
    """A distribution of one sample or a pair of them, the true value, and whether an interval of a draw holds it."""

    interval: str
    distribution: str
    truth: float
    draw: Callable[[Rng, int], tuple[Sample, ...]]


def _mean(name: str, truth: float, draw: Callable[[Rng, int], Sample]) -> Cell:
    return Cell("mean", name, truth, lambda rng, n: (draw(rng, n),))


def _pairs_of_outcomes(both: float, first: float, second: float) -> Cell:
    """Pairs that are (1, 1), (1, 0), (0, 1) with these probabilities, else (0, 0)."""

    def draw(rng: Rng, n: int) -> tuple[Sample, ...]:
        kinds = rng.choice(4, size=n, p=[both, first, second, 1 - both - first - second])
        return np.isin(kinds, (0, 1)).astype(float), np.isin(kinds, (0, 2)).astype(float)

    name = f"outcomes: both {both:g}, first only {first:g}, second only {second:g}"
    return Cell("paired difference", name, first - second, draw)


def _ratio(name: str, share: float, noise: float, shape: float) -> Cell:
    """A gap, gamma distributed with mean 1, of which an intervention recovers `share` and noise."""

    def draw(rng: Rng, n: int) -> tuple[Sample, ...]:
        gap = rng.gamma(shape, 1 / shape, size=n)
        return share * gap + noise * rng.normal(size=n), gap

    return Cell("ratio of means", name, share, draw)


def _logit_differences(rng: Rng, n: int) -> tuple[Sample, ...]:
    clean = rng.normal(4, 2, size=n)
    return clean - rng.exponential(1, size=n), clean


CELLS = (
    _mean("normal", 0.0, lambda rng, n: rng.normal(size=n)),
    _mean("uniform", 0.5, lambda rng, n: rng.random(n)),
    _mean("Student t, 4 degrees of freedom", 0.0, lambda rng, n: rng.standard_t(4, size=n)),
    _mean("exponential", 1.0, lambda rng, n: rng.exponential(size=n)),
    _mean("log-normal", float(np.exp(0.5)), lambda rng, n: rng.lognormal(size=n)),
    _mean(
        "ties: 0, 1, 2 or 3, at 0.4, 0.3, 0.2, 0.1",
        1.0,
        lambda rng, n: rng.choice(4, n, p=[0.4, 0.3, 0.2, 0.1]),
    ),
    _mean(
        "nine in ten are 0, else exponential",
        0.1,
        lambda rng, n: (rng.random(n) < 0.1) * rng.exponential(size=n),
    ),
    *(
        _mean(f"outcomes at {p:g}", p, lambda rng, n, p=p: (rng.random(n) < p).astype(float))
        for p in (0.5, 0.8, 0.95, 0.99)
    ),
    Cell("paired difference", "logit differences, the change exponential", -1.0, _logit_differences),
    _pairs_of_outcomes(0.5, 0.2, 0.1),
    _pairs_of_outcomes(0.8, 0.15, 0.02),
    _pairs_of_outcomes(0.97, 0.01, 0.01),
    _ratio("even gaps, little noise", 0.6, 0.2, 8.0),
    _ratio("skewed gaps, much noise", 0.6, 1.0, 1.0),
)

DOCUMENTED = {
    ("mean", "Student t, 4 degrees of freedom", 30): (0.90, 0.93),
    ("mean", "log-normal", 30): (0.89, 0.92),
    ("mean", "nine in ten are 0, else exponential", 30): (0.84, 0.88),
    ("mean", "nine in ten are 0, else exponential", 100): (0.89, 0.92),
    ("mean", "outcomes at 0.95", 100): (0.95, 0.98),
    ("mean", "outcomes at 0.99", 100): (0.90, 0.94),
    ("paired difference", "outcomes: both 0.8, first only 0.15, second only 0.02", 30): (0.97, 0.99),
    ("paired difference", "outcomes: both 0.97, first only 0.01, second only 0.01", 30): (0.99, 1.0),
    ("paired difference", "outcomes: both 0.97, first only 0.01, second only 0.01", 100): (0.98, 1.0),
}
"""Where the coverage lies, for the cells that are not between 93% and 97%."""


def covers(cell: Cell, n: int, seed: int) -> bool:
    rng = np.random.default_rng([seed, n])
    sample = cell.draw(rng, n)
    with warnings.catch_warnings():
        # A sample without spread, or a denominator near zero: both are part of the simulation.
        warnings.simplefilter("ignore")
        if cell.interval == "mean":
            interval = mean_interval(sample[0], n_resamples=N_RESAMPLES, seed=seed)
        elif cell.interval == "paired difference":
            interval = paired_difference_interval(*sample, n_resamples=N_RESAMPLES, seed=seed)
        else:
            interval = ratio_interval(*sample, n_resamples=N_RESAMPLES, seed=seed)
    return cell.truth in interval


def coverage(n_simulations: int, *, progress: bool = True) -> pd.DataFrame:
    """One row per cell and number of examples: the share of intervals that hold the truth, and its standard error."""
    rows = []
    for cell, n in tqdm([(cell, n) for cell in CELLS for n in SIZES], desc="coverage", disable=not progress):
        held = np.mean([covers(cell, n, seed) for seed in range(n_simulations)])
        error = np.sqrt(held * (1 - held) / n_simulations)
        rows.append((cell.interval, cell.distribution, n, held, error))
    return pd.DataFrame(rows, columns=["interval", "distribution", "n", "coverage", "standard_error"])


if __name__ == "__main__":
    print(coverage(int(sys.argv[1]) if len(sys.argv) > 1 else 1000).to_string())
