"""How much of the evidence is among the tokens that heads attend to most (the paper's Fig. 6b and 6c)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mmlens.experiments.common import (
    FIVE_PERCENT,
    PAPER,
    across_table,
    head_names,
    plain,
    ranged,
    records,
    token_counts,
    with_evidence,
)
from mmlens.experiments.experiment import Experiment, Findings, Setup, checked_settings
from mmlens.head_scores import share_of
from mmlens.heads import HeadSet
from mmlens.scores.retrieval import EvidenceAttention, evidence_attention, ram
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
    options: dict[str, Any] = {"batch_size": setup.batch_size, "progress": setup.progress}
    scores = ram(setup.model, with_evidence(setup.selection), **options)
    examples = with_evidence(setup.evaluation)
    seen = evidence_attention(setup.model, examples, **options)
    tokens = token_counts(setup, examples)
    ceiling = 100 * float((tokens[["key", "evidence"]].min(axis=1) / tokens["evidence"]).mean())
    chance = 100 * float((tokens["key"] / tokens["positions"]).mean())
    total = len(scores.grid)

    per_example, ratios, differences = [], [], {}
    for count in sorted({share_of(share, total) for share in ratio_shares}):
        values = {
            arm: _ratio(seen, heads)
            for arm, heads in (("top", scores.top(count)), ("bottom", scores.bottom(count)))
        }
        for arm, each in values.items():
            low, high = _percent(interval_of(each / 100, setup.seed))
            hits = _hits(seen, scores.top(count) if arm == "top" else scores.bottom(count))
            ratios.append(
                {
                    "arm": arm,
                    "heads": count,
                    "mean": each.mean(),
                    "low": low,
                    "high": high,
                    "hits_at_50": hits,
                }
            )
            per_example.append(pd.DataFrame({"what": "ratio", "arm": arm, "heads": count, "value": each}))
        low, high = _percent(difference_interval_of(values["top"] / 100, values["bottom"] / 100, setup.seed))
        differences[str(count)] = {
            "difference": float((values["top"] - values["bottom"]).mean()),
            "low": low,
            "high": high,
        }

    coverage = []
    for count in sorted({share_of(share, total) for share in coverage_shares}):
        top = scores.top(count)
        sets = {"top": [top], "bottom": [scores.bottom(count)]}
        if 2 * count <= total:
            sets["random"] = [top.random(setup.seed + draw) for draw in range(n_draws)]
        for arm, chosen in sets.items():
            each = np.mean([seen.key_token_coverage(heads).numpy() for heads in chosen], axis=0)
            low, high = _percent(interval_of(each / 100, setup.seed))
            coverage.append(
                {
                    "arm": arm,
                    "heads": count,
                    "share": count / total,
                    "mean": each.mean(),
                    "low": low,
                    "high": high,
                }
            )
            per_example.append(pd.DataFrame({"what": "coverage", "arm": arm, "heads": count, "value": each}))
    ratio_table, curve = pd.DataFrame(ratios), pd.DataFrame(coverage)

    few = share_of(ratio_shares[0], total)
    few_rows = ratio_table[ratio_table["heads"] == few].set_index("arm")
    of_top, of_bottom, gap = few_rows.loc["top"], few_rows.loc["bottom"], differences[str(few)]
    agrees = gap["low"] > 0
    last = curve[curve["heads"] == curve["heads"].max()].set_index("arm")
    statement = (
        f"Key Token Ratio on {len(examples)} held-out examples: "
        f"{ranged(of_top['mean'], of_top['low'], of_top['high'], '.1f')}% "
        f"for the top {few} of {total} heads ({head_names(scores.top(few))}), "
        f"{ranged(of_bottom['mean'], of_bottom['low'], of_bottom['high'], '.1f')}% for the bottom {few}; key "
        f"tokens at "
        f"random would give {chance:.1f}%, and {ceiling:.1f}% is the most that there can be. The top above the "
        f"bottom by "
        f"{ranged(gap['difference'], gap['low'], gap['high'], '.1f')} points: "
        f"{'agrees' if agrees else 'does not agree'} "
        f"with the paper (25.6 against 2.1 in Qwen3-VL-4B, 14.4 against 2.6 in LLaVA). Coverage of the top "
        f"{int(last['heads'].iloc[0])} heads ({last['share'].iloc[0]:.0%}): {last.loc['top', 'mean']:.0f}%, of "
        f"as many "
        f"bottom heads {last.loc['bottom', 'mean']:.0f}%"
        + (f", of random ones {last.loc['random', 'mean']:.0f}%" if "random" in last.index else "")
        + "."
    )
    numbers = {
        "agrees": agrees,
        "n_heads": total,
        "ceiling": ceiling,
        "chance": chance,
        "ratios": records(ratio_table),
        "top_minus_bottom": differences,
        "coverage": records(curve),
        "few": few,
    }
    drawn = pd.concat(
        [
            curve.assign(series=curve["arm"] + " heads"),
            *(
                pd.DataFrame(
                    {"share": [count / n for count in values], "mean": list(values.values())}
                ).assign(series=f"paper: {model}, top", low=np.nan, high=np.nan)
                for model, n, values in _COVERAGE
            ),
        ],
        ignore_index=True,
    )
    drawn["share"] = 100 * drawn["share"]
    ids = [example.id for example in examples]
    return Findings(
        statement,
        plain(numbers),
        tables={
            "ratio": (
                "Key Token Ratio in percent, mean over heads and examples, and share of hits (50% and more).",
                ratio_table,
            ),
            "coverage": ("Key Token Coverage in percent against the number of heads.", curve),
        },
        per_example={
            "key_tokens": pd.concat([frame.assign(id=ids) for frame in per_example], ignore_index=True)
        },
        figures=[
            (
                "Key Token Ratio",
                "Share of the evidence among a head's key tokens, 95% intervals over held-out examples.",
                plot_intervals(
                    ratio_table.assign(row=[f"{row.arm} {row.heads}" for row in ratio_table.itertuples()]),
                    row="row",
                    xlabel="Key Token Ratio, %",
                    lines={"random": chance, "ceiling": ceiling},
                ),
            ),
            (
                "Key Token Coverage",
                "Share of the evidence that is a key token of at least one of the heads; dashed: the paper's "
                "top heads.",
                plot_curves(
                    drawn,
                    x="share",
                    series="series",
                    xlabel="Heads, % of all",
                    ylabel="Key Token Coverage, %",
                    dashed=[f"paper: {model}, top" for model, _, _ in _COVERAGE],
                ),
            ),
        ],
    )


def _percent(interval: tuple[float, float]) -> tuple[float, float]:
    """Intervals are taken of shares, where 0 and 1 are known to be the ends."""
    return 100 * interval[0], 100 * interval[1]


def _ratio(seen: EvidenceAttention, heads: HeadSet) -> np.ndarray:
    """Key Token Ratio of every example, mean over the heads."""
    return np.asarray(_of_heads(seen, heads).mean(-1))


def _hits(seen: EvidenceAttention, heads: HeadSet) -> float:
    """Share of the pairs of example and head whose ratio is at least 50%."""
    return float((_of_heads(seen, heads) >= 50).mean())


def _of_heads(seen: EvidenceAttention, heads: HeadSet) -> np.ndarray:
    layers, within = zip(*heads, strict=True)
    return seen.key_token_ratio.per_example[:, list(layers), list(within)].double().numpy()


def across(findings: Mapping[str, Findings]) -> Findings:
    """Key Token Ratio of the top and bottom heads at the paper's share, by model."""

    def rows_of(name: str, rows: Sequence[Mapping[str, object]], few: int) -> list[dict[str, object]]:
        return [{"model": name, **row} for row in rows if row["heads"] == few]

    rows = [
        row
        for name, found in findings.items()
        for row in rows_of(name, found.numbers["ratios"], found.numbers["few"])
    ]
    table = pd.DataFrame(rows)
    agreed = across_table(
        findings, lambda found: {key: found[key] for key in ("agrees", "n_heads", "few", "chance", "ceiling")}
    )
    return Findings(
        f"The top heads' Key Token Ratio is above the bottom heads' in {int(agreed['agrees'].sum())} of "
        f"{len(agreed)} models.",
        plain({"models": records(agreed), "ratios": rows}),
        tables={
            "ratio": ("Key Token Ratio in percent of the top and bottom heads.", table),
            "models": ("What random key tokens would give, and the most there can be, in percent.", agreed),
        },
        figures=[
            (
                "Key Token Ratio by model",
                "Top and bottom heads, as many as the paper's 15 of 1152 come to; 95% intervals.",
                plot_intervals(table, row="model", series="arm", xlabel="Key Token Ratio, %"),
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
        "bottom heads and the Key Token Coverage of growing sets were measured (Eq. 22-25), with {n_draws} "
        "random sets of "
        "the same size."
    ),
    run=run,
    cites=("arxiv_2606_05843",),
    published=PUBLISHED,
    across=across,
)
