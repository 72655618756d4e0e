"""Whether kinds of task share their heads: rank correlations and stability counts (the paper's Fig. 5)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
import torch
from jaxtyping import Int
from torch import Tensor

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
    plain,
    ranged,
    records,
    resampled_means,
    with_evidence,
)
from mmlens.experiments.experiment import Experiment, Findings, Setup, checked_settings
from mmlens.head_scores import HeadScores
from mmlens.heads import HeadSet
from mmlens.scores.retrieval import ram
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
    scores = ram(
        setup.model, with_evidence(setup.selection), batch_size=setup.batch_size, progress=setup.progress
    )
    kinds = kinds_of(scores)
    if len(kinds) < 2:
        raise InvalidValueError(f"stability compares kinds of task; the examples have {kinds or 'none'}")
    reliability = _reliability(scores, n_splits, setup.seed)
    reliable = {row["kind"]: float(row["reliability"]) for row in records(reliability)}
    parts = {kind: scores.select(kind) for kind in kinds}
    draws = {
        kind: resampled_means(part, n_resamples, setup.seed + at)
        for at, (kind, part) in enumerate(parts.items())
    }
    pairs: list[dict[str, Any]] = []
    for one, other in combinations(kinds, 2):
        rho = parts[one].spearman(parts[other])
        low, high = rank_correlation_interval(
            rho, rank_correlation(draws[one], draws[other]), min(len(parts[one]), len(parts[other]))
        )
        noise = np.sqrt(max(reliable[one], 0.0) * max(reliable[other], 0.0)) or np.nan
        # Above 1 is sampling error: a kind's halves then differ more than the kinds.
        clean = {
            name: min(value / noise, 1.0)
            for name, value in (
                ("without_noise", rho),
                ("without_noise_low", low),
                ("without_noise_high", high),
            )
        }
        pairs.append({"one": one, "other": other, "spearman": rho, "low": low, "high": high} | clean)
    correlations = pd.DataFrame(pairs)
    n_heads, top = len(scores.grid), len(scores.top(fraction))
    stable = scores.stability(fraction)
    observed = np.bincount(stable[scores.grid.exists].numpy(), minlength=len(kinds) + 1)
    chance = chance_of_shared(n_heads, top, len(kinds), n_draws, setup.seed)
    p_value = float((1 + (chance[:, -1] >= observed[-1]).sum()) / (1 + n_draws))
    expected = n_heads * scipy.stats.binom.pmf(range(len(kinds) + 1), len(kinds), top / n_heads)
    counts = pd.DataFrame(
        {
            "in_tops_of": range(len(kinds) + 1),
            "heads": observed,
            "expected_by_chance": expected,
            "chance_95th_percentile": np.quantile(chance, 0.95, axis=0),
        }
    )
    everywhere = HeadSet(
        (stable == len(kinds)).nonzero().tolist(),
        scores.grid,
    )
    lowest = correlations.loc[correlations["spearman"].idxmin()]
    in_size = bool(lowest["high"] >= LOWEST_PUBLISHED)
    shared = p_value <= 0.05
    statement = (
        f"Between {len(kinds)} kinds of task Spearman of RAM over heads is {lowest['spearman']:.2f} to "
        f"{correlations['spearman'].max():.2f} (the lowest, {lowest['one']} and {lowest['other']}: "
        f"{ranged(lowest['spearman'], lowest['low'], lowest['high'])}), "
        f"{'which agrees with' if in_size else 'below'} the paper's .79 to .92. In the top {fraction:.0%} ({top} of "
        f"{n_heads} heads) of all {len(kinds)} kinds stand {len(everywhere)} ({head_names(everywhere) or 'none'}), "
        f"{expected[-1]:.2g} by chance (p = {p_value:.2g}), which "
        f"{'agrees' if shared else 'does not agree'} with the paper, where about 30 of 58 are. "
        f"Split halves of a kind's examples rank heads with a reliability of "
        f"{min(reliable[k] for k in kinds):.2f} to "
        f"{max(reliable[k] for k in kinds):.2f}."
    )
    matrix = np.eye(len(kinds))
    for row in pairs:
        at = kinds.index(row["one"]), kinds.index(row["other"])
        matrix[at] = matrix[at[::-1]] = row["spearman"]
    numbers = {
        "agrees": in_size and shared,
        "spearman": pairs,
        "lowest": {name: lowest[name] for name in ("spearman", "low", "high")},
        "top": top,
        "n_heads": n_heads,
        "in_all_tops": [list(head) for head in everywhere],
        "share_of_top_in_all": len(everywhere) / top,
        "p_value": p_value,
        "counts": records(counts),
        "reliability": records(reliability),
    }
    drawn = correlations.assign(
        pair=correlations["one"] + " - " + correlations["other"], mean=correlations["spearman"]
    )
    return Findings(
        statement,
        plain(numbers),
        tables={
            "spearman": ("Rank correlation of RAM between kinds, with bootstrap intervals.", correlations),
            "stability": ("How many heads are in the top of how many kinds, and how many by chance.", counts),
            "reliability": ("Spearman of split halves, and of the whole by Spearman-Brown.", reliability),
        },
        figures=[
            (
                "Spearman between kinds of task",
                "Rank correlation of RAM over all heads.",
                plot_matrix(matrix, kinds, label="Spearman", vmax=1.0),
            ),
            (
                "The same with intervals",
                "95% bootstrap intervals over examples; dashed: the lowest and highest of the paper (Qwen3-VL-4B).",
                plot_intervals(drawn, row="pair", xlabel="Spearman of RAM", lines={".79": 0.79, ".92": 0.92}),
            ),
            (
                "Stability",
                f"In how many kinds' top {fraction:.0%} each head is; outlined: in all of them.",
                plot_head_map(_as_scores(stable, scores), heads=everywhere),
            ),
        ],
    )


def _as_scores(counts: Int[Tensor, "layer head"], like: HeadScores) -> HeadScores:
    """Counts per head for a map that knows which heads there are."""
    values = counts.double().masked_fill(~like.grid.exists, torch.nan)
    return HeadScores(values[None], "kinds of task", grid=like.grid)


def _reliability(scores: HeadScores, n_splits: int, seed: int) -> pd.DataFrame:
    rows = []
    for kind, part in by_kind(scores).items():
        halves = split_halves(
            flat_per_example(part), part.kinds or [""] * len(part), n_splits=n_splits, seed=seed
        )
        low, high = percentile_interval(halves)
        half = float(halves.mean())
        rows.append(
            {"kind": kind, "split_half": half, "splits_low": low, "splits_high": high}
            | {"reliability": stepped_up(half), "n": len(part)}
        )
    return pd.DataFrame(rows)


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
    statement = (
        f"Rank correlations between kinds reach the paper's range and the tops share more heads than chance in "
        f"{int(table['agrees'].sum())} of {len(table)} models."
    )
    return Findings(
        statement,
        plain({"models": table.to_dict("records")}),
        tables={"models": ("The lowest Spearman between two kinds, and heads in all kinds' tops.", table)},
        figures=[
            (
                "Lowest Spearman between kinds",
                "With 95% bootstrap intervals; dashed: the lowest of the paper (Qwen3-VL-4B).",
                plot_intervals(
                    table.rename(columns={"lowest_spearman": "mean"}),
                    row="model",
                    xlabel="Lowest Spearman of RAM between two kinds",
                    lines={".79": LOWEST_PUBLISHED},
                ),
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
        "kinds has recentred bootstrap intervals ({n_resamples} resamples of the examples); "
        "the number of heads in every "
        "kind's top {fraction} is compared with {n_draws} random choices; reliability is that of {n_splits} "
        "split halves."
    ),
    run=run,
    cites=("arxiv_2606_05843",),
    published=PUBLISHED,
    across=across,
)
