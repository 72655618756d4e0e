"""How much of the evidence is among the tokens that heads attend to most (the paper's Fig. 6b and 6c)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mmlens.experiments.ablations import with_evidence
from mmlens.experiments.common import (
    FIVE_PERCENT,
    PAPER,
    across_rows,
    across_table,
    head_names,
    of_models,
    plain,
    ranged,
    selection_ram,
    token_counts,
)
from mmlens.experiments.experiment import Experiment, Figures, Findings, Setup, checked_settings
from mmlens.head_scores import HeadScores, share_of
from mmlens.heads import HeadSet
from mmlens.scores.retrieval import EvidenceAttention, evidence_attention
from mmlens.statistics import difference_interval_of, interval_of
from mmlens.viz.intervals import plot_curves, plot_intervals

_COVERAGE = (
    ("Qwen3-VL-4B", 1152, {20: 53, 50: 67, 100: 80, 150: 85, 200: 87}),
    ("LLaVA-OneVision-7B", 784, {20: 64, 50: 74, 100: 75, 150: 80, 200: 83}),
)
PUBLISHED = pd.DataFrame(
    [
        ("key token ratio, top 15", "Qwen3-VL-4B", 15, 15 / 1152, 25.6),
        ("key token ratio, bottom 15", "Qwen3-VL-4B", 15, 15 / 1152, 2.1),
        ("key token ratio, top 15", "LLaVA-OneVision-7B", 15, 15 / 784, 14.4),
        ("key token ratio, bottom 15", "LLaVA-OneVision-7B", 15, 15 / 784, 2.6),
        *(
            ("key token coverage of the top", model, count, count / n, percent)
            for model, n, values in _COVERAGE
            for count, percent in values.items()
        ),
    ],
    columns=["what", "model", "heads", "share", "percent"],
)
"""Coverages are read off a figure, +-1; so are the bottom ratios."""

COVERAGE_SHARES = tuple(sorted(count / n for _, n, values in _COVERAGE for count in values))


@dataclass(frozen=True)
class _Measured:
    """Ratios and coverages in percent, a row for each arm and number of heads; `gaps` is top minus bottom."""

    n_examples: int
    n_heads: int
    ceiling: float
    chance: float
    few_heads: HeadSet
    ratios: pd.DataFrame
    gaps: dict[int, dict[str, float]]
    coverage: pd.DataFrame
    per_example: pd.DataFrame

    @property
    def few(self) -> int:
        return len(self.few_heads)

    @property
    def agrees(self) -> bool:
        return self.gaps[self.few]["low"] > 0


@checked_settings
def run(
    setup: Setup,
    *,
    ratio_shares: tuple[float, ...] = (15 / 1152, FIVE_PERCENT),
    coverage_shares: tuple[float, ...] = COVERAGE_SHARES,
    n_draws: int = 10,
) -> Findings:
    """Key Token Ratio of the top and bottom heads (Eq. 22-23), and Key Token Coverage against their number (Eq. 24-25).

    Heads are ranked by pooled RAM on the selection split and measured on the evaluation split. A head has
    floor(.05 L) key tokens, so that where the evidence has more the ratio cannot reach 100%: `ceiling` is the most it
    can be, `chance` what key tokens at random positions give. Shares of heads are those of the paper's figures, and
    5%. "random" is the mean of `n_draws` draws from the heads outside the top.
    """
    scores = selection_ram(setup)
    examples = with_evidence(setup.evaluation)
    seen = evidence_attention(setup.model, examples, **setup.options)
    tokens = token_counts(setup, examples)
    total = len(scores.grid)
    of_ratio, gaps = _ratios(seen, scores, sorted({share_of(s, total) for s in ratio_shares}), setup.seed)
    of_coverage = _coverage(
        seen, scores, sorted({share_of(s, total) for s in coverage_shares}), n_draws, setup.seed
    )
    ids = [example.id for example in examples]
    found = _Measured(
        len(examples),
        total,
        ceiling=100 * float((tokens[["key", "evidence"]].min(axis=1) / tokens["evidence"]).mean()),
        chance=100 * float((tokens["key"] / tokens["positions"]).mean()),
        few_heads=scores.top(share_of(ratio_shares[0], total)),
        ratios=pd.DataFrame([row for row, _ in of_ratio]),
        gaps=gaps,
        coverage=pd.DataFrame([row for row, _ in of_coverage]),
        per_example=pd.concat(
            [
                pd.DataFrame(
                    {"what": what, "arm": row["arm"], "heads": row["heads"], "value": each, "id": ids}
                )
                for what, rows in (("ratio", of_ratio), ("coverage", of_coverage))
                for row, each in rows
            ],
            ignore_index=True,
        ),
    )
    return Findings(
        _statement(found),
        plain(_numbers(found)),
        tables={
            "ratio": (
                "Key Token Ratio in percent, mean over heads and examples, and share of hits (50% and more).",
                found.ratios,
            ),
            "coverage": ("Key Token Coverage in percent against the number of heads.", found.coverage),
        },
        per_example={"key_tokens": found.per_example},
        figures=_figures(found),
    )


# ---------------------------------------------------------------------- what is computed


def _ratios(
    seen: EvidenceAttention, scores: HeadScores, counts: Sequence[int], seed: int
) -> tuple[list[tuple[dict[str, Any], np.ndarray]], dict[int, dict[str, float]]]:
    """Rows of the top and bottom of each count, each with its examples' values, and top minus bottom."""
    rows, gaps = [], {}
    for count in counts:
        of_arm = {}
        for arm, heads in (("top", scores.top(count)), ("bottom", scores.bottom(count))):
            layers, within = zip(*heads, strict=True)
            of_heads = seen.key_token_ratio.per_example[:, list(layers), list(within)].double().numpy()
            of_arm[arm] = np.asarray(of_heads.mean(-1))
            row = {"arm": arm, "heads": count} | _mean(of_arm[arm], seed)
            rows.append((row | {"hits_at_50": float((of_heads >= 50).mean())}, of_arm[arm]))
        top, bottom = of_arm["top"], of_arm["bottom"]
        low, high = _percent(difference_interval_of(top / 100, bottom / 100, seed))
        gaps[count] = {"difference": float((top - bottom).mean()), "low": low, "high": high}
    return rows, gaps


def _coverage(
    seen: EvidenceAttention, scores: HeadScores, counts: Sequence[int], n_draws: int, seed: int
) -> list[tuple[dict[str, Any], np.ndarray]]:
    rows, total = [], len(scores.grid)
    for count in counts:
        top = scores.top(count)
        sets = {"top": [top], "bottom": [scores.bottom(count)]}
        if 2 * count <= total:
            sets["random"] = [top.random(seed + draw) for draw in range(n_draws)]
        for arm, chosen in sets.items():
            each = np.mean([seen.key_token_coverage(heads).numpy() for heads in chosen], axis=0)
            rows.append(({"arm": arm, "heads": count, "share": count / total} | _mean(each, seed), each))
    return rows


def _mean(percents: np.ndarray, seed: int) -> dict[str, Any]:
    low, high = _percent(interval_of(percents / 100, seed))
    return {"mean": percents.mean(), "low": low, "high": high}


def _percent(interval: tuple[float, float]) -> tuple[float, float]:
    """Intervals are taken of shares, where 0 and 1 are known to be the ends."""
    return 100 * interval[0], 100 * interval[1]


# ---------------------------------------------------------------------- how it is told


def _statement(found: _Measured) -> str:
    rows = found.ratios[found.ratios["heads"] == found.few].set_index("arm")
    top, bottom = (ranged(*rows.loc[arm, ["mean", "low", "high"]], style=".1f") for arm in ("top", "bottom"))
    last = found.coverage[found.coverage["heads"] == found.coverage["heads"].max()].set_index("arm")
    return (
        f"Key Token Ratio on {found.n_examples} held-out examples: {top}% for the top {found.few} of "
        f"{found.n_heads} heads ({head_names(found.few_heads)}), {bottom}% for the bottom {found.few}; key tokens at "
        f"random would give {found.chance:.1f}%, and {found.ceiling:.1f}% is the most that there can be. The top above "
        f"the bottom by {ranged(*found.gaps[found.few].values(), style='.1f')} points: "
        f"{'agrees' if found.agrees else 'does not agree'} "
        "with the paper (25.6 against 2.1 in Qwen3-VL-4B, 14.4 against 2.6 in LLaVA). Coverage of the top "
        f"{int(last['heads'].iloc[0])} heads ({last['share'].iloc[0]:.0%}): {last.loc['top', 'mean']:.0f}%, of as many "
        f"bottom heads {last.loc['bottom', 'mean']:.0f}%"
        + (f", of random ones {last.loc['random', 'mean']:.0f}%" if "random" in last.index else "")
        + "."
    )


def _numbers(found: _Measured) -> dict[str, Any]:
    return {
        "agrees": found.agrees,
        "n_heads": found.n_heads,
        "ceiling": found.ceiling,
        "chance": found.chance,
        "ratios": found.ratios,
        "top_minus_bottom": found.gaps,
        "coverage": found.coverage,
        "few": found.few,
    }


def _figures(found: _Measured) -> Figures:
    curves = [
        found.coverage.assign(series=found.coverage["arm"] + " heads"),
        *(
            pd.DataFrame({"share": [count / n for count in values], "mean": list(values.values())}).assign(
                series=f"paper: {model}, top", low=np.nan, high=np.nan
            )
            for model, n, values in _COVERAGE
        ),
    ]
    drawn = pd.concat(curves, ignore_index=True)
    rows = found.ratios["arm"] + " " + found.ratios["heads"].astype(str)
    return [
        (
            "Key Token Ratio",
            "Share of the evidence among a head's key tokens, 95% intervals over held-out examples.",
            plot_intervals(
                found.ratios.assign(row=rows),
                row="row",
                xlabel="Key Token Ratio, %",
                lines={"random": found.chance, "ceiling": found.ceiling},
            ),
        ),
        (
            "Key Token Coverage",
            "Share of the evidence that is a key token of at least one of the heads; dashed: the paper's top heads.",
            plot_curves(
                drawn.assign(share=100 * drawn["share"]),
                x="share",
                series="series",
                xlabel="Heads, % of all",
                ylabel="Key Token Coverage, %",
                dashed=[f"paper: {model}, top" for model, _, _ in _COVERAGE],
            ),
        ),
    ]


def across(findings: Mapping[str, Findings]) -> Findings:
    """Key Token Ratio of the top and bottom heads at the paper's share, by model."""
    table = across_rows(findings, "ratios", lambda row, numbers: row["heads"] == numbers["few"])
    agreed = across_table(findings, ("agrees", "n_heads", "few", "chance", "ceiling"))
    figure = plot_intervals(table, row="model", series="arm", xlabel="Key Token Ratio, %")
    return Findings(
        f"The top heads' Key Token Ratio is above the bottom heads' in {of_models(agreed['agrees'])}.",
        plain({"models": agreed, "ratios": table}),
        tables={
            "ratio": ("Key Token Ratio in percent of the top and bottom heads.", table),
            "models": ("What random key tokens would give, and the most there can be, in percent.", agreed),
        },
        figures=[
            (
                "Key Token Ratio by model",
                "Top and bottom heads, as many as the paper's 15 of 1152 come to; 95% intervals.",
                figure,
            )
        ],
    )


EXPERIMENT = Experiment(
    name="key-tokens",
    title="Evidence among the key tokens of heads",
    source=f"{PAPER}, Fig. 6b and 6c",
    question="How much of the evidence is among the tokens that a head attends to most, and how many heads cover it?",
    method=(
        "Heads were ranked by RAM on the selection split. On the evaluation split the Key Token Ratio of the top and "
        "bottom heads and the Key Token Coverage of growing sets were measured (Eq. 22-25), with {n_draws} random sets "
        "of the same size."
    ),
    run=run,
    cites=("arxiv_2606_05843",),
    published=PUBLISHED,
    across=across,
)
