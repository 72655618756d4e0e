"""Whether kinds of task share their heads: rank correlations and stability counts (the paper's Fig. 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
import torch

from mmlens.errors import InvalidValueError
from mmlens.experiments.common import (
    FIVE_PERCENT,
    PAPER,
    POOLED,
    across_table,
    by_kind,
    flat_per_example,
    head_names,
    kinds_of,
    of_models,
    plain,
    ranged,
    resampled_means,
    selection_ram,
)
from mmlens.experiments.experiment import Experiment, Figures, Findings, Setup, checked_settings
from mmlens.head_scores import HeadScores
from mmlens.heads import HeadSet
from mmlens.statistics import (
    percentile_interval,
    rank_correlation,
    rank_correlation_interval,
    split_halves,
    stepped_up,
)
from mmlens.viz.head_map import plot_head_map
from mmlens.viz.intervals import plot_intervals
from mmlens.viz.matrix import plot_matrix

PUBLISHED = pd.DataFrame(
    [
        ("RefCOCOg", "MMLongBench", 0.79),
        ("RefCOCOg", "VidSTG", 0.85),
        ("RefCOCOg", "MMDocIR", 0.81),
        ("MMLongBench", "VidSTG", 0.92),
        ("MMLongBench", "MMDocIR", 0.92),
        ("VidSTG", "MMDocIR", 0.88),
    ],
    columns=["one", "other", "spearman"],
).assign(model="Qwen3-VL-4B")
"""Beside them: about 30 of 1152 heads in all four tasks' top 5% (58 heads each)."""

LOWEST_PUBLISHED = 0.79


def chance_of_shared(n_heads: int, top: int, n_kinds: int, n_draws: int, seed: int) -> np.ndarray:
    """Heads that stand in 0, 1, ... `n_kinds` tops [draw, count] where each kind's top is drawn at random.

    >>> chance_of_shared(n_heads=4, top=4, n_kinds=2, n_draws=1, seed=0).tolist()
    [[0, 0, 4]]
    """
    rng = np.random.default_rng(seed)
    found = np.zeros((n_draws, n_kinds + 1), dtype=int)
    for draw in range(n_draws):
        drawn = [rng.choice(n_heads, size=top, replace=False) for _ in range(n_kinds)]
        times = np.bincount(np.concatenate(drawn), minlength=n_heads)
        found[draw] = np.bincount(times, minlength=n_kinds + 1)
    return found


@dataclass(frozen=True)
class _Measured:
    """RAM of the kinds, and how far their rankings and their tops are the same."""

    kinds: list[str]
    correlations: pd.DataFrame
    reliability: pd.DataFrame
    tops: _Tops
    fraction: float

    @property
    def lowest(self) -> pd.Series:
        return self.correlations.loc[self.correlations["spearman"].idxmin()]

    @property
    def as_published(self) -> bool:
        return bool(self.lowest["high"] >= LOWEST_PUBLISHED)


@dataclass(frozen=True)
class _Tops:
    """How many heads are in the top of how many kinds, and which in all: `in_tops_of` is a score for a map."""

    n_heads: int
    top: int
    counts: pd.DataFrame
    p_value: float
    everywhere: HeadSet
    in_tops_of: HeadScores

    @property
    def shared(self) -> bool:
        return self.p_value <= 0.05


@checked_settings
def run(
    setup: Setup,
    *,
    fraction: float = FIVE_PERCENT,
    n_resamples: int = 1000,
    n_splits: int = 100,
    n_draws: int = 2000,
) -> Findings:
    """Spearman of RAM between kinds, how many heads their tops share, and how reliable each ranking is (selection).

    Intervals are `rank_correlation_interval`'s, of the correlation that this number of examples gives. Noise in the
    scores lowers it, so beside it stands the one that perfectly measured scores would have (divided, as are its
    limits, by the root of the two rankings' reliabilities; Spearman 1904), the reliabilities being those of split
    halves (`n_splits`) corrected for length (Spearman-Brown). Raises ValueError for fewer than two kinds.
    """
    scores = selection_ram(setup)
    kinds = kinds_of(scores)
    if len(kinds) < 2:
        raise InvalidValueError(f"stability compares kinds of task; the examples have {kinds or 'none'}")
    reliability = _reliability(scores, n_splits, setup.seed)
    found = _Measured(
        kinds,
        _correlations(scores, reliability, n_resamples, setup.seed),
        reliability,
        _tops(scores, fraction, n_draws, setup.seed),
        fraction,
    )
    return Findings(
        _statement(found),
        plain(_numbers(found)),
        tables={
            "spearman": (
                "Rank correlation of RAM between kinds, with bootstrap intervals.",
                found.correlations,
            ),
            "stability": (
                "How many heads are in the top of how many kinds, and how many by chance.",
                found.tops.counts,
            ),
            "reliability": ("Spearman of split halves, and of the whole by Spearman-Brown.", reliability),
        },
        figures=_figures(found),
    )


# ---------------------------------------------------------------------- what is computed


def _reliability(scores: HeadScores, n_splits: int, seed: int) -> pd.DataFrame:
    rows = []
    for kind, part in by_kind(scores).items():
        groups = part.kinds or [""] * len(part)
        halves = split_halves(flat_per_example(part), groups, n_splits=n_splits, seed=seed)
        low, high = percentile_interval(halves)
        half = float(halves.mean())
        rows.append(
            {"kind": kind, "split_half": half, "splits_low": low, "splits_high": high}
            | {"reliability": stepped_up(half), "n": len(part)}
        )
    return pd.DataFrame(rows)


def _correlations(scores: HeadScores, reliability: pd.DataFrame, n_resamples: int, seed: int) -> pd.DataFrame:
    """One row for every two kinds: Spearman with its interval, and all three without noise."""
    reliable = reliability.set_index("kind")["reliability"]
    parts = {kind: scores.select(kind) for kind in kinds_of(scores)}
    draws = {
        kind: resampled_means(part, n_resamples, seed + at) for at, (kind, part) in enumerate(parts.items())
    }
    rows = []
    for one, other in combinations(parts, 2):
        rho = parts[one].spearman(parts[other])
        low, high = rank_correlation_interval(
            rho, rank_correlation(draws[one], draws[other]), min(len(parts[one]), len(parts[other]))
        )
        row: dict[str, Any] = {"spearman": rho, "low": low, "high": high}
        noise = np.sqrt(max(reliable[one], 0.0) * max(reliable[other], 0.0)) or np.nan
        names = ("without_noise", "without_noise_low", "without_noise_high")
        # Above 1 is sampling error: a kind's halves then differ more than the kinds.
        clean = {name: min(value / noise, 1.0) for name, value in zip(names, row.values(), strict=True)}
        rows.append({"one": one, "other": other} | row | clean)
    return pd.DataFrame(rows)


def _tops(scores: HeadScores, fraction: float, n_draws: int, seed: int) -> _Tops:
    n_kinds, n_heads, top = len(kinds_of(scores)), len(scores.grid), len(scores.top(fraction))
    in_tops_of = scores.stability(fraction)
    observed = np.bincount(in_tops_of[scores.grid.exists].numpy(), minlength=n_kinds + 1)
    chance = chance_of_shared(n_heads, top, n_kinds, n_draws, seed)
    counts = pd.DataFrame(
        {
            "in_tops_of": range(n_kinds + 1),
            "heads": observed,
            "expected_by_chance": n_heads * scipy.stats.binom.pmf(range(n_kinds + 1), n_kinds, top / n_heads),
            "chance_95th_percentile": np.quantile(chance, 0.95, axis=0),
        }
    )
    everywhere = HeadSet((in_tops_of == n_kinds).nonzero().tolist(), scores.grid)
    values = in_tops_of.double().masked_fill(~scores.grid.exists, torch.nan)
    return _Tops(
        n_heads,
        top,
        counts,
        p_value=float((1 + (chance[:, -1] >= observed[-1]).sum()) / (1 + n_draws)),
        everywhere=everywhere,
        in_tops_of=HeadScores(values[None], "kinds of task", grid=scores.grid),
    )


# ---------------------------------------------------------------------- how it is told


def _statement(found: _Measured) -> str:
    n_kinds, tops, lowest = len(found.kinds), found.tops, found.lowest
    kinds = found.reliability[found.reliability["kind"].isin(found.kinds)]["reliability"]
    return (
        f"Between {n_kinds} kinds of task Spearman of RAM over heads is {lowest['spearman']:.2f} to "
        f"{found.correlations['spearman'].max():.2f} (the lowest, {lowest['one']} and {lowest['other']}: "
        f"{ranged(lowest['spearman'], lowest['low'], lowest['high'])}), "
        f"{'which agrees with' if found.as_published else 'below'} the paper's .79 to .92. In the top "
        f"{found.fraction:.0%} ({tops.top} of {tops.n_heads} heads) of all {n_kinds} kinds stand "
        f"{len(tops.everywhere)} ({head_names(tops.everywhere) or 'none'}), "
        f"{tops.counts['expected_by_chance'].iloc[-1]:.2g} by chance (p = {tops.p_value:.2g}), which "
        f"{'agrees' if tops.shared else 'does not agree'} with the paper, where about 30 of 58 are. "
        "Split halves of a kind's examples rank heads with a reliability of "
        f"{kinds.min():.2f} to {kinds.max():.2f}."
    )


def _numbers(found: _Measured) -> dict[str, Any]:
    tops = found.tops
    return {
        "agrees": found.as_published and tops.shared,
        "spearman": found.correlations,
        "lowest": {name: found.lowest[name] for name in ("spearman", "low", "high")},
        "top": tops.top,
        "n_heads": tops.n_heads,
        "in_all_tops": tops.everywhere,
        "share_of_top_in_all": len(tops.everywhere) / tops.top,
        "p_value": tops.p_value,
        "counts": tops.counts,
        "reliability": found.reliability,
    }


def _figures(found: _Measured) -> Figures:
    matrix = pd.DataFrame(np.eye(len(found.kinds)), index=found.kinds, columns=found.kinds)
    for one, other, rho in found.correlations[["one", "other", "spearman"]].itertuples(index=False):
        matrix.loc[one, other] = matrix.loc[other, one] = rho
    pairs = found.correlations.assign(
        pair=found.correlations["one"] + " - " + found.correlations["other"],
        mean=found.correlations["spearman"],
    )
    return [
        (
            "Spearman between kinds of task",
            "Rank correlation of RAM over all heads.",
            plot_matrix(matrix.to_numpy(), found.kinds, label="Spearman", vmax=1.0),
        ),
        (
            "The same with intervals",
            "95% bootstrap intervals over examples; dashed: the lowest and highest of the paper (Qwen3-VL-4B).",
            plot_intervals(pairs, row="pair", xlabel="Spearman of RAM", lines={".79": 0.79, ".92": 0.92}),
        ),
        (
            "Stability",
            f"In how many kinds' top {found.fraction:.0%} each head is; outlined: in all of them.",
            plot_head_map(found.tops.in_tops_of, heads=found.tops.everywhere),
        ),
    ]


def across(findings: Mapping[str, Findings]) -> Findings:
    """The lowest correlation between kinds, and the share of the top that all kinds have in common, by model."""
    table = across_table(
        findings,
        lambda found: {
            "lowest_spearman": found["lowest"]["spearman"],
            "low": found["lowest"]["low"],
            "high": found["lowest"]["high"],
            "in_all_tops": len(found["in_all_tops"]),
            "top": found["top"],
            "p_value": found["p_value"],
            "reliability_pooled": next(
                row["reliability"] for row in found["reliability"] if row["kind"] == POOLED
            ),
            "agrees": found["agrees"],
        },
    )
    figure = plot_intervals(
        table.rename(columns={"lowest_spearman": "mean"}),
        row="model",
        xlabel="Lowest Spearman of RAM between two kinds",
        lines={".79": LOWEST_PUBLISHED},
    )
    statement = (
        f"Rank correlations between kinds reach the paper's range and the tops share more heads than chance in "
        f"{of_models(table['agrees'])}."
    )
    return Findings(
        statement,
        plain({"models": table}),
        tables={"models": ("The lowest Spearman between two kinds, and heads in all kinds' tops.", table)},
        figures=[
            (
                "Lowest Spearman between kinds",
                "With 95% bootstrap intervals; dashed: the lowest of the paper (Qwen3-VL-4B).",
                figure,
            )
        ],
    )


EXPERIMENT = Experiment(
    name="stability",
    title="Do kinds of task share their heads?",
    source=f"{PAPER}, Fig. 5",
    question="Do different kinds of visual question rank heads alike by RAM, and are the same heads at the top?",
    method=(
        "RAM was averaged over the selection examples of each kind; Spearman's rank correlation over heads between "
        "kinds has recentred bootstrap intervals ({n_resamples} resamples of the examples); the number of heads in "
        "every kind's top {fraction} is compared with {n_draws} random choices; reliability is that of {n_splits} "
        "split halves."
    ),
    run=run,
    cites=("arxiv_2606_05843",),
    published=PUBLISHED,
    across=across,
)
