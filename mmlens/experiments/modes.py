"""Do the ways to ablate agree? Mean, zero, resample, uniform and mean-query ablation of the same heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from mmlens.data.examples import Example
from mmlens.errors import InvalidValueError
from mmlens.experiments.ablations import (
    ablated,
    all_heads,
    first_of_kinds,
    head_costs,
    references,
    single_heads,
    with_evidence,
)
from mmlens.experiments.common import (
    FIVE_PERCENT,
    across_rows,
    flat_per_example,
    matched_controls,
    plain,
    ranged,
    resampled_means,
    selection_ram,
    summarised,
    top_unless_tied,
)
from mmlens.experiments.experiment import (
    Experiment,
    Figures,
    Findings,
    Setup,
    checked_settings,
    judges_as_asked,
)
from mmlens.head_scores import HeadScores, share_of
from mmlens.heads import HeadSet, head_name
from mmlens.metrics.outcomes import Metric
from mmlens.statistics import rank_correlation, rank_correlation_interval, split_half_reliability
from mmlens.viz.intervals import plot_intervals
from mmlens.viz.matrix import plot_matrix


@dataclass(frozen=True)
class _Measured:
    """Costs of sets of heads and of every single head in each mode, and how far the modes agree on the latter.

    `agreement` is a square of the modes, its diagonal their reliability; `pairs` has its rows with intervals.
    """

    graded: str
    n_heads: int
    n_examples: dict[str, int]
    top: HeadSet
    moved: str
    costs: pd.DataFrame
    agreement: pd.DataFrame
    pairs: pd.DataFrame
    disagreement: pd.DataFrame

    @property
    def accuracy(self) -> pd.DataFrame:
        costs = self.costs
        return costs[(costs["metric"] == "accuracy") & (costs["examples"] == "with evidence")]


@checked_settings
@judges_as_asked
def run(
    setup: Setup,
    *,
    modes: Sequence[str] = ("mean", "zero", "resample", "uniform", "uniform_leaky", "mean_query"),
    n_draws: int = 2,
    n_per_kind: int | None = 12,
    n_per_kind_single: int | None = 5,
    n_resamples: int = 2000,
) -> Findings:
    """The cost of the top 5% by RAM, of random and layer-matched heads, and of every single head, in every mode.

    Heads are ranked by RAM on the selection split; `n_draws` draws of each control. Sets of heads are ablated on
    `n_per_kind` examples of each kind of the evaluation split, text-only kinds among them (reported apart); single
    heads on `n_per_kind_single` examples of each kind with evidence. Modes agree as far as Spearman's rho between
    their single-head costs goes, and the overlap of their 5% of heads of highest cost.
    """
    if len(set(modes)) < 2:
        raise InvalidValueError(f"modes are compared: at least two different ones, not {list(modes)}")
    heads = all_heads(setup)
    top = selection_ram(setup).top(FIVE_PERCENT)
    matched, moved = matched_controls(top, n_draws, setup.seed)
    arms = {
        "top": [top],
        "random": [top.random(setup.seed + draw) for draw in range(n_draws)],
        "layer_matched": matched,
    }
    evaluation = first_of_kinds(setup.evaluation, n_per_kind)
    graded, metrics = setup.judge.graded_and_accuracy(evaluation)
    reference = references(setup, modes)
    of_sets = _of_sets(setup, evaluation, arms, reference, metrics)
    judged = with_evidence(setup.evaluation, n_per_kind_single)
    of_heads = ablated(setup, judged, single_heads(heads), reference, metrics)
    cost = {mode: head_costs(setup, of_heads, graded, mode, heads) for mode in modes}
    found = _Measured(
        graded,
        len(heads),
        {"n_evaluation": len(evaluation), "n_single": len(judged)},
        top,
        moved,
        _costs(of_sets, setup.seed),
        *_agreement(cost, n_resamples, setup.seed),
        _disagreement(cost, heads),
    )
    return Findings(
        _statement(found),
        plain(_numbers(found)),
        tables={
            "costs": (f"Cost of ablating {len(top)} heads (5%), by mode.", found.costs),
            "agreement": (
                f"Rank correlation of single-head costs in {graded.replace('_', ' ')} between modes.",
                found.pairs,
            ),
            "disagreement": ("Heads whose cost depends most on the mode.", found.disagreement),
        },
        per_example={"sets": of_sets, "heads": of_heads},
        figures=_figures(found),
    )


# ---------------------------------------------------------------------- what is computed


def _of_sets(
    setup: Setup,
    examples: Sequence[Example],
    arms: Mapping[str, Sequence[HeadSet]],
    reference: Mapping[str, Any],
    metrics: Mapping[str, Metric],
) -> pd.DataFrame:
    sets = {f"{arm} {draw}": own for arm, drawn in arms.items() for draw, own in enumerate(drawn)}
    controls = {example.kind for example in examples if not example.evidence}
    outcomes = ablated(setup, examples, sets, reference, metrics)
    outcomes["arm"] = outcomes["heads"].str.rsplit(n=1).str[0]
    outcomes["is_control"] = outcomes["kind"].isin(controls)
    return outcomes


def _costs(of_sets: pd.DataFrame, seed: int) -> pd.DataFrame:
    outcomes = of_sets.assign(
        draw=of_sets["heads"], examples=of_sets["is_control"].map({True: "text only", False: "with evidence"})
    )
    by = ["mode", "arm", "metric", "examples"]
    table = summarised(outcomes, by, paired=("cost", "clean", "value"), seed=seed)
    table = table[[*by, "clean", "cost", "cost_low", "cost_high", "n", "n_draws"]]
    return table.rename(columns={"cost": "mean", "cost_low": "low", "cost_high": "high"})


def _agreement(
    cost: Mapping[str, HeadScores], n_resamples: int, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rho between every two modes as a square (its diagonal: reliability), and as rows with intervals and overlap.

    The same resampled examples serve both modes.
    """
    modes = list(cost)
    means = {mode: flat_per_example(cost[mode]).mean(0) for mode in modes}
    draws = {mode: resampled_means(cost[mode], n_resamples, seed) for mode in modes}
    square = pd.DataFrame(np.nan, index=modes, columns=modes)
    for mode in modes:
        square.loc[mode, mode] = split_half_reliability(flat_per_example(cost[mode]), seed=seed)
    rows = []
    for one, other in combinations(modes, 2):
        rho = float(rank_correlation(means[one], means[other]))
        low, high = rank_correlation_interval(rho, rank_correlation(draws[one], draws[other]), len(cost[one]))
        square.loc[one, other] = square.loc[other, one] = rho
        # Costs that are equal at the cut name no top 5%.
        first, second = (top_unless_tied(cost[mode], FIVE_PERCENT) for mode in (one, other))
        rows.append(
            {"one": one, "other": other, "rho": rho, "low": low, "high": high}
            | {"n_top": share_of(FIVE_PERCENT, len(means[one]))}
            | {"in_both": None if first is None or second is None else len(first & second)}
        )
    return square, pd.DataFrame(rows)


def _disagreement(cost: Mapping[str, HeadScores], heads: HeadSet, most: int = 10) -> pd.DataFrame:
    """The heads with the widest range of costs over the modes, each mode's cost beside it."""
    means = {mode: own.values[own.grid.exists].numpy() for mode, own in cost.items()}
    table = pd.DataFrame(means)
    table.insert(0, "head", [head_name(head) for head in heads])
    table["range"] = table[list(means)].max(axis=1) - table[list(means)].min(axis=1)
    table["highest_in"] = table[list(means)].idxmax(axis=1)
    table["lowest_in"] = table[list(means)].idxmin(axis=1)
    return table.sort_values("range", ascending=False, kind="stable").head(most).reset_index(drop=True)


# ---------------------------------------------------------------------- how it is told


def _statement(found: _Measured) -> str:
    by_mode = []
    for mode, rows in found.accuracy.groupby("mode", sort=False):
        top, random = (rows[rows["arm"] == arm].iloc[0] for arm in ("top", "random"))
        by_mode.append(
            f"{mode} {ranged(top['mean'], top['low'], top['high'])} (random "
            f"{ranged(random['mean'], random['low'], random['high'])})"
        )
    known = found.pairs.dropna(subset="rho")
    told = "Single-head costs have no rank correlation"
    if len(known):
        worst, best = known.loc[known["rho"].idxmin()], known.loc[known["rho"].idxmax()]
        told = (
            f"Single-head costs in {found.graded.replace('_', ' ')} agree best between {best['one']} and "
            f"{best['other']} (Spearman {ranged(best['rho'], best['low'], best['high'])}) and least between "
            f"{worst['one']} and {worst['other']} ({ranged(worst['rho'], worst['low'], worst['high'])})"
        )
    widest = found.disagreement.iloc[0]
    return (
        f"Accuracy lost when the top {len(found.top)} of {found.n_heads} heads by RAM are ablated - "
        f"{'; '.join(by_mode)}. {told}. "
        f"The head that depends most on the mode is {widest['head']}: {widest[widest['highest_in']]:.2f} under "
        f"{widest['highest_in']}, {widest[widest['lowest_in']]:.2f} under {widest['lowest_in']}."
    )


def _numbers(found: _Measured) -> dict[str, Any]:
    return {
        "n_heads": found.n_heads,
        "count": len(found.top),
        "top": found.top,
        "moved": found.moved,
        **found.n_examples,
        "costs": found.costs,
        "agreement": found.pairs,
        "reliability": {mode: found.agreement.loc[mode, mode] for mode in found.agreement},
        "disagreement": found.disagreement,
    }


def _figures(found: _Measured) -> Figures:
    return [
        (
            "Accuracy lost by mode",
            f"{len(found.top)} heads ablated; means over draws of the controls, 95% intervals, examples with evidence.",
            plot_intervals(
                found.accuracy, row="mode", series="arm", xlabel="Accuracy lost", lines={"0": 0.0}
            ),
        ),
        (
            "Agreement of single-head costs",
            "Spearman between modes over all heads, on the same examples; the diagonal is each mode's reliability "
            "over other examples (split half), which modes that share the examples' noise can exceed.",
            plot_matrix(found.agreement.to_numpy(), list(found.agreement), label="Spearman", vmax=1.0),
        ),
    ]


def across(findings: Mapping[str, Findings]) -> Findings:
    """The top heads' cost in accuracy by model and mode, and the agreement of modes."""
    wanted = ("top", "accuracy", "with evidence")
    table = across_rows(
        findings, "costs", lambda row, _: (row["arm"], row["metric"], row["examples"]) == wanted
    )
    figure = plot_intervals(table, row="model", series="mode", xlabel="Accuracy lost", lines={"0": 0.0})
    agreement = across_rows(findings, "agreement")
    rho = agreement.dropna(subset="rho").groupby(["one", "other"], sort=False)["rho"].mean()
    said = [
        f"{one} and {other} {value:.2f}" for (one, other), value in rho.sort_values(ascending=False).items()
    ]
    return Findings(
        f"Mean Spearman of single-head costs over {len(findings)} model(s): {', '.join(said) or 'none is defined'}.",
        plain({"mean_agreement": {f"{one} - {other}": value for (one, other), value in rho.items()}}),
        tables={
            "costs": ("Cost of the top heads by model and mode.", table),
            "agreement": ("Agreement.", agreement),
        },
        figures=[
            ("Accuracy lost without the top heads", "By model and ablation mode, 95% intervals.", figure)
        ],
    )


EXPERIMENT = Experiment(
    name="modes",
    title="Do the ways to ablate agree?",
    source="beyond arXiv 2606.05843; zero ablation is off-distribution: arXiv 2604.14433",
    question="Does it matter for the finding whether heads are ablated by mean, zero, resample, uniform or mean query?",
    method=(
        "The top 5% of heads by RAM on the selection split, and {n_draws} random and layer-matched sets of as many, "
        "were ablated in each mode ({modes}) on {n_per_kind} evaluation examples of each kind; every single head on "
        "{n_per_kind_single} of each kind with evidence. References for mean and resample are the selection split. "
        "Agreement is Spearman's rank correlation of single-head costs (bootstrap over examples, {n_resamples} "
        "resamples)."
    ),
    run=run,
    cites=("arxiv_2606_05843", "arxiv_2604_14433"),
    across=across,
)
