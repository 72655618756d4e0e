"""How often 95% intervals of Spearman's rho hold the rho to be expected from as many examples, by simulation.

    python experiments/validation/rank_intervals.py [n_simulations]

Three ways to make an interval of the same bootstrap draws, in worlds of heads (or of groups of heads) whose scores are
known: `recentred` moves the draws' quantiles to the estimate, `fisher` takes their spread on Fisher's scale and
Student's t, and `chosen` is `mmlens.statistics.rank_correlation_interval`: recentred, with quantiles as far out as t
asks for. Prints one row per world and number of examples; docs/truth.md has what 200 simulations a row gave.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import scipy.stats
from tqdm import tqdm

from mmlens.statistics import rank_correlation, rank_correlation_interval

N_RESAMPLES, N_WORLDS, N_HEADS, N_GROUPS = 400, 5, 64, 10
SIZES = (6, 12, 24, 60)

Rng = np.random.Generator
Draw = Callable[[Rng, int], list[np.ndarray]]
"""The two quantities [example, head] of so many new examples."""


def worlds() -> Iterator[tuple[str, bool, Callable[[Rng], Draw]]]:
    """Name, whether both quantities are of the same examples, and what draws a world of the kind."""
    for same in (False, True):
        for rho in (0.0, 0.6, 0.95):
            for shape in (0.2, 2.0):
                of = "same" if same else "two sets"
                yield f"heads rho {rho} shape {shape} {of}", same, _heads(rho, shape, same)
    for noise in (0.5, 3.0):
        yield f"{N_GROUPS} groups noise {noise}", True, _groups(noise)


def _heads(rho: float, shape: float, same: bool) -> Callable[[Rng], Draw]:
    """Log-normal true scores; an example has a level of its own, and noise that is gamma distributed."""

    def world(rng: Rng) -> Draw:
        base = rng.normal(size=N_HEADS)
        other = rho * base + np.sqrt(1 - rho * rho) * rng.normal(size=N_HEADS)

        def draw(rng: Rng, n: int) -> list[np.ndarray]:
            levels = [rng.gamma(4, 0.25, (n, 1)) for _ in range(1 if same else 2)]
            return [
                np.exp(true) * level * rng.gamma(shape, 1 / shape, (n, N_HEADS))
                for true, level in zip((base, other), levels * (2 if same else 1), strict=True)
            ]

        return draw

    return world


def _groups(noise: float) -> Callable[[Rng], Draw]:
    """Groups of a ranking, whose places are known, against their noisy costs."""

    def world(rng: Rng) -> Draw:
        cost = np.linspace(1, 0, N_GROUPS) + 0.3 * rng.normal(size=N_GROUPS)
        place = -np.arange(N_GROUPS, dtype=float)
        return lambda rng, n: [
            np.broadcast_to(place, (n, N_GROUPS)),
            cost + noise * rng.normal(size=(n, N_GROUPS)),
        ]

    return world


def intervals(rho: float, draws: np.ndarray, n: int) -> dict[str, tuple[float, float]]:
    low, middle, high = np.quantile(draws, [0.025, 0.5, 0.975])
    bound = 1 - 1e-9
    error = np.arctanh(draws.clip(-bound, bound)).std(ddof=1) * scipy.stats.t.ppf(0.975, n - 1)
    centre = np.arctanh(np.clip(rho, -bound, bound))
    return {
        "recentred": (rho - (middle - low), rho + (high - middle)),
        "fisher": (float(np.tanh(centre - error)), float(np.tanh(centre + error))),
        "chosen": rank_correlation_interval(rho, draws, n),
    }


def _counts(rng: Rng, n: int) -> np.ndarray:
    """How often each example is drawn, as shares: [resample, example]."""
    return rng.multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES) / n


def coverage(n_simulations: int, *, progress: bool = True) -> pd.DataFrame:
    """One row per world and number of examples: the share of intervals that hold the expected rho, for each way."""
    rows = []
    cells = [(world, n) for world in worlds() for n in SIZES]
    for (name, same, world), n in tqdm(cells, desc="coverage", disable=not progress):
        held: dict[str, list[bool]] = {}
        rng = np.random.default_rng([n, len(name)])
        for seed in range(N_WORLDS):
            draw = world(np.random.default_rng(seed))
            expected = np.mean([rank_correlation(*(x.mean(0) for x in draw(rng, n))) for _ in range(600)])
            for _ in range(n_simulations // N_WORLDS):
                one, other = draw(rng, n)
                counts = [_counts(rng, n) for _ in range(1 if same else 2)]
                draws = rank_correlation(counts[0] @ one, counts[-1] @ other)
                rho = float(rank_correlation(one.mean(0), other.mean(0)))
                for way, (low, high) in intervals(rho, draws, n).items():
                    held.setdefault(way, []).append(low <= expected <= high)
        rows.append({"world": name, "n": n} | {way: np.mean(found) for way, found in held.items()})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    table = coverage(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
    print(table.to_string())
    print(table.drop(columns="world").groupby("n").agg(["mean", "min", "max"]).round(3).T.to_string())
