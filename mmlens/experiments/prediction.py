"""Does a head's score say what ablating the head costs? RAM, its corrected forms and attribution against ablation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

from mmlens.arguments import BATCH_SIZE, one_of
from mmlens.attribution.nodes import attribute
from mmlens.data.examples import Example
from mmlens.errors import InvalidValueError
from mmlens.experiments.ablations import (
    ablated,
    all_heads,
    costs,
    head_costs,
    references,
    single_heads,
    with_evidence,
)
from mmlens.experiments.common import (
    FIVE_PERCENT,
    across_rows,
    across_table,
    flat_per_example,
    plain,
    ranged,
    resampled_means,
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
from mmlens.experiments.judging import FIRST_TOKEN, JUDGES
from mmlens.head_scores import HeadScores, share_of
from mmlens.heads import HeadSet, head_name
from mmlens.interventions.ablation import mean_activations
from mmlens.model.batches import Batches
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.prompt import Prompt
from mmlens.scores.registry import SCORES
from mmlens.statistics import (
    benjamini_hochberg,
    paired_permutation_test,
    percentile_interval,
    permutation_p,
    rank_correlation,
    rank_correlation_interval,
    split_half_reliability,
    without_noise,
)
from mmlens.viz.intervals import plot_curves, plot_intervals
from mmlens.viz.scatter import plot_scatter

FEWEST = 5
"""Fewer heads than this give no rank correlation worth a number."""


def attributed_cost(
    model: HookedVLM,
    examples: Sequence[Example],
    *,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
    answers: str = FIRST_TOKEN,
) -> HeadScores:
    """The gradient's estimate of what mean ablation of each head costs: one forward and one backward run.

    -(z_mean - z) . dm/dz summed over positions (`attribute`, method "gradient"), with text and image means of the
    examples. m is the graded metric of `answers`: by the first token the logit difference (or the answer's log
    probability, where an example has no wrong candidate).
    """
    means = {
        name: mean
        for name, mean in mean_activations(model, examples, batch_size=batch_size).items()
        if name.endswith("attn.hook_z")
    }
    _, metric = JUDGES[answers].graded(examples)

    def mean_of(model: HookedVLM, prompt: Prompt) -> dict[str, torch.Tensor]:
        is_image = prompt.token_map.is_image[..., None, None].to(model.device)
        at = {name: mean.to(model.device) for name, mean in means.items()}
        return {name: torch.where(is_image, mean[1], mean[0]) for name, mean in at.items()}

    parts = []
    for _, prompt in Batches(model, examples, batch_size, progress=progress, label="attribution"):
        found = attribute(model, prompt, mean_of, metric, nodes="z").heads()
        parts.append(-found.per_example)
    kinds = tuple(example.kind for example in examples)
    return HeadScores(torch.cat(parts), "attribution", kinds, model.grid)


PREDICTORS = (
    "ram",
    "null_calibrated_ram",
    "ram_per_token",
    "ram_lift",
    "logit_contribution",
    "vision_mass",
    "attribution",
)
"""What may predict where nothing else is asked for: names in `mmlens.scores.SCORES`, and `attributed_cost`."""


@dataclass(frozen=True)
class _Measured:
    """Each score against the costs of single heads and of groups; `metrics` says of each metric how sure its costs are.

    `of_heads` has every head's score, rank and cost, `groups` the cost of each group of a score's ranking.
    """

    graded: str
    mode: str
    q: float
    n_groups: int
    n: dict[str, int]
    metrics: dict[str, dict[str, Any]]
    correlations: pd.DataFrame
    of_heads: pd.DataFrame
    groups: pd.DataFrame


@checked_settings
@judges_as_asked
def run(
    setup: Setup,
    *,
    scores: Sequence[str] = PREDICTORS,
    mode: str = "mean",
    n_per_kind: int | None = 12,
    n_groups: int = 10,
    n_resamples: int = 2000,
    q: float = 0.05,
) -> Findings:
    """Rank correlation of scores on the selection split with ablation costs on the evaluation split, over heads.

    For each score and metric: Spearman's rho over all heads with its interval (both splits resampled by example) and
    two permutation p-values, over all heads and within layers; rho among heads whose cost differs from 0 (paired
    permutation test, false discovery rate `q`); how many of the 5% of heads of highest cost are among the score's top
    5%; and rho over `n_groups` equal groups of the score's ranking, each ablated as a whole. `n_per_kind` examples of
    each kind of either split (None: all).
    """
    known: dict[str, Callable[..., HeadScores]] = {
        **SCORES,
        "attribution": partial(attributed_cost, answers=setup.answers),
    }
    names = [one_of("score", name, known) for name in scores]
    heads = all_heads(setup)
    if not 3 <= n_groups <= len(heads):
        raise InvalidValueError(
            f"n_groups is a number of groups from 3 to the model's {len(heads)} heads, not {n_groups}"
        )
    selection = with_evidence(setup.selection, n_per_kind)
    evaluation = with_evidence(setup.evaluation, n_per_kind)
    of_score = {name: known[name](setup.model, selection, **setup.options) for name in names}
    graded, metrics = setup.judge.graded_and_accuracy(evaluation)
    groups = {name: _groups(of_score[name], heads, n_groups) for name in names}
    sets = single_heads(heads)
    sets |= {f"{name} {at}": group for name in names for at, group in enumerate(groups[name])}
    outcomes = ablated(setup, evaluation, sets, references(setup, [mode]), metrics)
    of_metric: dict[str, dict[str, Any]] = {}
    rows, of_heads, of_groups = [], [], []
    for metric in metrics:
        cost = head_costs(setup, outcomes, metric, mode, heads)
        detected = _detected(flat_per_example(cost), q, setup.seed)
        of_metric[metric] = {
            "n_detected": int(detected.sum()),
            "reliability": split_half_reliability(flat_per_example(cost), seed=setup.seed),
            "costliest": top_unless_tied(cost, FIVE_PERCENT),
        }
        of_sets = costs(outcomes, metric, mode)
        for name in names:
            key = {"score": name, "metric": metric}
            own = of_sets.loc[[f"{name} {at}" for at in range(n_groups)]].to_numpy()
            row = _correlations(of_score[name], cost, heads, detected, n_resamples, setup.seed)
            rows.append(key | row | _over_groups(own, n_resamples, setup.seed))
            of_groups += [key | row for row in _group_costs(groups[name], own, n_resamples, setup.seed)]
            of_heads.append(_of_heads(key, of_score[name], cost, heads, detected))
    found = _Measured(
        graded,
        mode,
        q,
        n_groups,
        {"n_heads": len(heads), "n_selection": len(selection), "n_evaluation": len(evaluation)},
        of_metric,
        pd.DataFrame(rows),
        pd.concat(of_heads, ignore_index=True),
        pd.DataFrame(of_groups),
    )
    return Findings(
        _statement(found),
        plain(_numbers(found)),
        tables=_tables(found),
        per_example={"outcomes": outcomes},
        figures=_figures(found),
    )


# ---------------------------------------------------------------------- what is computed


def _groups(scores: HeadScores, heads: HeadSet, n_groups: int) -> list[HeadSet]:
    """The ranking, best first, cut into groups whose sizes differ by at most one head."""
    sizes = [len(cut) for cut in np.array_split(np.arange(len(heads)), n_groups)]
    # `top` refuses scores that rank nothing, and warns where a cut goes through a tie.
    tops = [heads - heads, *(scores.top(int(count)) for count in np.cumsum(sizes))]
    return [after - before for before, after in itertools.pairwise(tops)]


def _detected(effect: np.ndarray, q: float, seed: int) -> np.ndarray:
    """Which heads' costs differ from 0: paired permutation tests over examples, Benjamini-Hochberg over all heads."""
    n_resamples = max(9999, int(np.ceil(2 * effect.shape[1] / q)))
    p = [
        paired_permutation_test(own, np.zeros(len(own)), n_resamples=n_resamples, seed=seed)
        for own in effect.T
    ]
    return benjamini_hochberg(np.array(p)) <= q


def _correlations(
    scores: HeadScores,
    cost: HeadScores,
    heads: HeadSet,
    detected: np.ndarray,
    n_resamples: int,
    seed: int,
) -> dict[str, Any]:
    x, y = flat_per_example(scores).mean(0), flat_per_example(cost).mean(0)
    draws = resampled_means(scores, n_resamples, seed), resampled_means(cost, n_resamples, seed + 1)
    rho = float(rank_correlation(x, y))
    low, high = rank_correlation_interval(rho, rank_correlation(*draws), min(len(scores), len(cost)))
    among = float(rank_correlation(x[detected], y[detected])) if detected.sum() >= FEWEST else np.nan
    count = share_of(FIVE_PERCENT, len(y))
    # Costs or scores that are equal at the cut name no top 5%: the order of the heads would decide.
    tops = [top_unless_tied(each, FIVE_PERCENT) for each in (cost, scores)]
    hits = None if tops[0] is None or tops[1] is None else len(tops[0] & tops[1])
    return {
        "rho": rho,
        "rho_low": low,
        "rho_high": high,
        "rho_without_noise": without_noise(
            rho,
            split_half_reliability(flat_per_example(scores), seed=seed),
            split_half_reliability(flat_per_example(cost), seed=seed),
        ),
        "p": permutation_p(x, y, seed=seed),
        "p_within_layers": permutation_p(x, y, blocks=[layer for layer, _ in heads], seed=seed),
        "rho_detected": among,
        "p_detected": permutation_p(x[detected], y[detected], seed=seed) if np.isfinite(among) else np.nan,
        "n_detected": int(detected.sum()),
        "top_found": hits,
        "top_count": count,
        "precision": np.nan if hits is None else hits / count,
        "precision_by_chance": count / len(x),
    }


def _over_groups(of_groups: np.ndarray, n_resamples: int, seed: int) -> dict[str, Any]:
    """Rho between a group's place in the ranking (first = highest) and its cost; examples are resampled."""
    place = -np.arange(len(of_groups), dtype=float)
    cost = of_groups.mean(-1)
    rho = float(rank_correlation(place, cost))
    draws = _resampled(of_groups, n_resamples, seed)
    resampled = rank_correlation(np.broadcast_to(place, draws.shape), draws)
    low, high = rank_correlation_interval(rho, resampled, of_groups.shape[1])
    return {
        "rho_groups": rho,
        "rho_groups_low": low,
        "rho_groups_high": high,
        "p_groups": permutation_p(place, cost, seed=seed),
    }


def _resampled(of_groups: np.ndarray, n_resamples: int, seed: int) -> np.ndarray:
    n = of_groups.shape[1]
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples)
    return counts @ of_groups.T / n


def _group_costs(
    groups: Sequence[HeadSet], of_groups: np.ndarray, n_resamples: int, seed: int
) -> list[dict[str, Any]]:
    rows = []
    for at, (group, own) in enumerate(zip(groups, of_groups, strict=True)):
        low, high = percentile_interval(_resampled(own[None], n_resamples, seed))
        rows.append(
            {"group": at + 1, "heads": len(group), "mean": float(own.mean()), "low": low, "high": high}
        )
    return rows


def _of_heads(
    key: Mapping[str, str], scores: HeadScores, cost: HeadScores, heads: HeadSet, detected: np.ndarray
) -> pd.DataFrame:
    return pd.DataFrame(
        {
            **key,
            "head": [head_name(head) for head in heads],
            "value": flat_per_example(scores).mean(0),
            "rank": scores.rank()[scores.grid.exists].numpy() + 1,
            "cost": flat_per_example(cost).mean(0),
            "detected": detected,
        }
    )


# ---------------------------------------------------------------------- how it is told


def _statement(found: _Measured) -> str:
    of_graded = found.correlations[found.correlations["metric"] == found.graded]
    said = [
        _said(row)
        for row in of_graded.sort_values("rho", ascending=False, na_position="last").to_dict("records")
    ]
    sure = found.metrics[found.graded]
    return (
        f"Spearman of each score with the cost in {found.graded.replace('_', ' ')} of ablating single heads "
        f"({found.mode} ablation, {found.n['n_heads']} heads, of which {sure['n_detected']} have a cost told from 0; "
        f"reliability of the cost's ranking {sure['reliability']:.2f}) - " + "; ".join(said) + "."
    )


def _said(row: Mapping[Any, Any]) -> str:
    if not np.isfinite(row["rho"]):
        return f"{row['score']}: no rank correlation, as all heads have the same score or cost"
    told = row["rho_low"] > 0 and row["p"] <= 0.05
    against = row["rho_high"] < 0 and row["p"] <= 0.05
    beyond = told and row["p_within_layers"] <= 0.05
    return (
        f"{row['score']}: {ranged(row['rho'], row['rho_low'], row['rho_high'])}, "
        f"{row['rho_without_noise']:.2f} without noise"
        + (" (predicts it" if told else " (predicts the opposite" if against else " (does not predict it")
        + ("" if beyond or not told else ", but no better than a head's layer does")
        + (
            f"; {row['top_found']:.0f} of the {row['top_count']} heads of highest cost in its top 5%"
            if np.isfinite(row["precision"])
            else ""
        )
        + (
            f"; {row['rho_detected']:.2f} among the {row['n_detected']} heads with a cost told from 0)"
            if np.isfinite(row["rho_detected"])
            else ")"
        )
    )


def _numbers(found: _Measured) -> dict[str, Any]:
    return {
        **found.n,
        "metrics": found.metrics,
        "correlations": found.correlations,
        "groups": found.groups,
    }


def _tables(found: _Measured) -> dict[str, tuple[str, pd.DataFrame]]:
    return {
        "correlations": ("Rank correlation of each score with the cost of ablation.", found.correlations),
        "heads": ("Every head: its scores, their ranks, and its cost.", found.of_heads),
        "groups": (
            f"Cost of ablating each of {found.n_groups} groups of a score's ranking, best first.",
            found.groups,
        ),
    }


def _figures(found: _Measured) -> Figures:
    of_heads, correlations, groups = (
        table[table["metric"] == found.graded] for table in (found.of_heads, found.correlations, found.groups)
    )
    label = f"Cost in {found.graded.replace('_', ' ')}"
    drawn = correlations.rename(columns={"rho": "mean", "rho_low": "low", "rho_high": "high"})
    return [
        (
            "Cost of single heads by rank of the score",
            f"Every dot is a head, rank 1 has the highest score. {found.mode.capitalize()} ablation, evaluation split.",
            plot_scatter(
                of_heads,
                panel="score",
                x="rank",
                y="cost",
                marked="detected",
                xlabel="Rank by score",
                ylabel=label,
                note=f"cost differs from 0 (false discovery rate {found.q:g})",
            ),
        ),
        (
            "Rank correlation with the cost of single heads",
            f"Spearman over all heads with the {label.lower()}, 95% intervals from resampled examples of both "
            "splits; 0 without interval where it is not defined.",
            plot_intervals(
                drawn.fillna({"mean": 0.0}),
                row="score",
                xlabel="Spearman's rank correlation",
                lines={"0": 0.0},
            ),
        ),
        (
            "Cost of groups of heads",
            f"The ranking of each score cut into {found.n_groups} groups, each ablated as a whole.",
            plot_curves(
                groups,
                x="group",
                series="score",
                xlabel="Group of the ranking (1: highest scores)",
                ylabel=label,
            ),
        ),
    ]


def across(findings: Mapping[str, Findings]) -> Findings:
    """The correlations of all models, score by score."""

    def is_known(row: Mapping[str, Any], numbers: Mapping[str, Any]) -> bool:
        return row["metric"] == next(iter(numbers["metrics"])) and row["rho"] is not None

    table = across_rows(findings, "correlations", is_known)
    if not len(table):
        return Findings("No model has a rank correlation.", {"models": []})
    table = table[["model", *_ACROSS]]
    table = table.rename(columns={"rho": "mean", "rho_low": "low", "rho_high": "high"})
    mean = table.groupby("score", sort=False)["mean"].mean().sort_values(ascending=False)
    statement = (
        f"Mean Spearman with single-head costs over {table['model'].nunique()} model(s): "
        + ", ".join(f"{score} {rho:.2f}" for score, rho in mean.items())
    )
    figure = plot_intervals(
        table, row="model", series="score", xlabel="Spearman with the cost of single heads", lines={"0": 0.0}
    )
    return Findings(
        statement + ".",
        plain({"models": across_table(findings, ["n_heads"]), "mean": mean.to_dict()}),
        tables={"correlations": ("Rank correlation with single-head costs, by model and score.", table)},
        figures=[("Does the score predict the cost?", "Spearman over heads, 95% intervals.", figure)],
    )


_ACROSS = (
    "score",
    "metric",
    "rho",
    "rho_low",
    "rho_high",
    "rho_without_noise",
    "p",
    "p_within_layers",
    "rho_detected",
    "precision",
    "rho_groups",
)

EXPERIMENT = Experiment(
    name="prediction",
    title="Does the score predict the causal effect?",
    source="beyond arXiv 2606.05843; attention is not importance: arXiv 1902.10186, 1908.04626",
    question="Do heads with a higher score cost more when they are ablated, one by one and in groups?",
    method=(
        "Scores ({scores}) were taken on the selection split, and every head was ablated alone ({mode} ablation) on "
        "the evaluation split ({n_per_kind} examples of each kind of either split). Spearman's rank correlation over "
        "heads has a bootstrap interval ({n_resamples} resamples of the examples of both splits) and permutation "
        "p-values over all heads and within layers; costs were told from zero by paired permutation tests at a false "
        "discovery rate of {q}. Each score's ranking was also cut into {n_groups} groups, each ablated as a whole."
    ),
    run=run,
    cites=("arxiv_2606_05843", "arxiv_1902_10186", "arxiv_1908_04626"),
    across=across,
)
