"""What is left of the answers as more heads are masked (the paper's Fig. 6a), by the core-heads experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from mmlens.experiments.ablations import first_of_kinds
from mmlens.experiments.common import (
    FIVE_PERCENT,
    PAPER,
    POOLED,
    across_table,
    arm_difference,
    of_models,
    plain,
)
from mmlens.experiments.core_heads_claim import CoreHeads, measured, metric_figures
from mmlens.experiments.experiment import (
    Experiment,
    Figures,
    Findings,
    Setup,
    checked_settings,
    judges_as_asked,
)
from mmlens.head_scores import share_of
from mmlens.viz.ablation_curves import plot_ablation_panels
from mmlens.viz.intervals import plot_intervals

_N_HEADS = {"Qwen3-VL-4B": 1152, "LLaVA-OneVision-7B": 784}
_COUNTS = (0, 5, 10, 20, 30)
PUBLISHED = pd.DataFrame(
    [
        {"model": model, "arm": arm, "heads": count, "share": count / _N_HEADS[model], "score": score}
        for model, arm, scores in (
            ("Qwen3-VL-4B", "top", (45.3, 27.0, 16, 10, 7)),
            ("Qwen3-VL-4B", "random", (45.3, 42, 38.5, 34.5, 28.7)),
            ("Qwen3-VL-4B", "bottom", (45.3, 43, 41.3, 38, 32.3)),
            ("LLaVA-OneVision-7B", "top", (16.4, 10.6, 7, 4, 2.4)),
            ("LLaVA-OneVision-7B", "random", (16.4, 13.5, 12.2, 11, 6)),
            ("LLaVA-OneVision-7B", "bottom", (16.4, 14.3, 13.4, 12.7, 12.2)),
        )
        for count, score in zip(_COUNTS, scores, strict=True)
    ]
)
"""MMLongBench scores. 0 and 5 heads of the top arms and Qwen's "below 7" are in the text, the rest is read off, +-1."""

PAPER_SHARES = tuple(count / n for n in _N_HEADS.values() for count in _COUNTS[1:])
LARGEST_OF_QWEN = 30 / 1152


@checked_settings
@judges_as_asked
def run(
    setup: Setup,
    *,
    shares: Sequence[float] = (*PAPER_SHARES, FIVE_PERCENT),
    modes: tuple[str, ...] = ("uniform", "uniform_leaky", "zero", "mean"),
    n_draws: int = 3,
    n_per_kind: int | None = 10,
) -> Findings:
    """Accuracy and invalid answers with `shares` of the heads masked: top, bottom, random and layer-matched random.

    `shares` are by default those that the paper's figure masks, and the 5% of its abstract; the largest of the figure
    and the 5% are always among them. Each is rounded to a whole number of heads, at least 1. The heads are chosen by
    pooled RAM on the selection split, and judged on the first `n_per_kind` evaluation examples of each kind (None:
    all), `n_draws` draws of each random arm.
    "uniform" is the paper's masking within the causal mask, "uniform_leaky" its algorithm literally.
    """
    total = len(setup.model.heads)
    counts = sorted({share_of(share, total) for share in (*shares, LARGEST_OF_QWEN)})
    few, many = share_of(LARGEST_OF_QWEN, total), share_of(FIVE_PERCENT, total)
    judged = replace(setup, evaluation=first_of_kinds(setup.evaluation, n_per_kind))
    found = measured(judged, counts=counts, modes=modes, n_draws=n_draws)
    # Random arms are compared by each example's mean over draws.
    with_evidence = found.outcomes[~found.outcomes["kind"].isin(found.summary["controls"])]
    verdicts = {mode: _verdict(with_evidence, mode, few, setup.seed) for mode in modes}
    numbers = {
        "agrees": all(verdict["top_below_random"] for verdict in verdicts.values()),
        "counts": counts,
        "count_nearest_2.6_percent": few,
        "count_nearest_5_percent": many,
        "n_heads": total,
        "chance": float(found.summary["finding"]["chance"]),
        "verdicts": verdicts,
        "ablation": found.ablation,
        "layer_matched_shortfall": found.summary["heads"]["layer_matched_shortfall"],
    }
    return Findings(
        _statement(found, numbers),
        plain(numbers),
        tables=_tables(found, verdicts, few, total),
        per_example={"outcomes": found.outcomes},
        figures=_figures(found),
    )


def _statement(found: CoreHeads, numbers: Mapping[str, Any]) -> str:
    few, many = numbers["count_nearest_2.6_percent"], numbers["count_nearest_5_percent"]
    total = numbers["n_heads"]
    table = found.ablation
    pooled = table[table["kind"] == POOLED].set_index(["metric", "mode", "arm", "count"])
    mean, clean = pooled["mean"], pooled.loc[("accuracy", "clean", "clean", 0)]
    parts = []
    for mode in numbers["verdicts"]:
        arms = [
            f"{arm} {mean.loc[('accuracy', mode, arm, few)]:.0%}{at.format(few / total)} and "
            f"{mean.loc[('accuracy', mode, arm, many)]:.0%}{at.format(many / total)}"
            for arm, at in (("top", " at {:.1%}"), ("random", ""), ("bottom", ""))
        ]
        if "invalid" in set(table["metric"]):
            arms.append(f"invalid answers with the top {mean.loc[('invalid', mode, 'top', many)]:.0%}")
        parts.append(f"{mode}: {', '.join(arms)}")
    failed = [mode for mode, verdict in numbers["verdicts"].items() if not verdict["top_below_random"]]
    statement = (
        f"Accuracy on {clean['n']} held-out examples is {clean['mean']:.0%} (chance {numbers['chance']:.0%}). "
        f"With {few} of {total} heads masked (what comes nearest to the 30 of 1152 that the paper's figure ends at) "
        f"and with {many} (5%, its abstract) - {'; '.join(parts)}. With {few}, the top heads cost more than random "
        f"ones, as in the paper, {'but not in ' + ', '.join(failed) if failed else 'in every mode'}."
    )
    top = table[(table["metric"] == "accuracy") & (table["arm"] == "top") & (table["count"] == many)]
    by_control = top.set_index(["kind", "mode"])["mean"]
    controls = [
        f"{kind}: " + ", ".join(f"{mode} {by_control[kind, mode]:.0%}" for mode in numbers["verdicts"])
        for kind in found.summary["controls"]
    ]
    if controls:
        statement += f" Text-only controls, the top 5% masked - {'; '.join(controls)}."
    if few == many:
        statement += " In a model of so few heads 2.6% and 5% are the same number of heads."
    return statement


def _tables(
    found: CoreHeads, verdicts: Mapping[str, Mapping[str, object]], few: int, total: int
) -> dict[str, tuple[str, pd.DataFrame]]:
    shares = pd.DataFrame(
        [
            {
                "model": model,
                "heads there": count,
                "share there": count / n,
                "heads here": share_of(count / n, total),
            }
            for model, n in _N_HEADS.items()
            for count in _COUNTS[1:]
        ]
    )
    return {
        "ablation": ("Every mode, arm, count, kind and metric, with 95% intervals.", found.ablation),
        "shares": ("The paper's numbers of heads, and the same share of this model's heads.", shares),
        "verdicts": (
            f"Accuracy of the top arm minus another, {few} heads masked, paired by example.",
            pd.DataFrame([{"mode": mode, **verdict} for mode, verdict in verdicts.items()]),
        ),
    }


def _figures(found: CoreHeads) -> Figures:
    controls = found.summary["controls"]
    figures = metric_figures(found, {"accuracy": "Masking: accuracy", "invalid": "Masking: invalid answers"})
    if controls:
        figures.append(
            (
                "Masking: text-only controls",
                "Accuracy on questions without an image, with the same heads masked.",
                plot_ablation_panels(found.ablation, kinds=controls),
            )
        )
    return figures


def _verdict(outcomes: pd.DataFrame, mode: str, count: int, seed: int) -> dict[str, object]:
    at_count = outcomes[(outcomes["mode"] == mode) & (outcomes["count"] == count)]
    verdict: dict[str, object] = {}
    for other in ("random", "layer_matched", "bottom"):
        mean, low, high = arm_difference(at_count, "top", other, mode=mode, seed=seed)
        verdict[f"top_minus_{other}"] = mean
        verdict[f"top_minus_{other}_interval"] = (low, high)
        verdict[f"top_below_{other}"] = high < 0
    return verdict


def across(findings: Mapping[str, Findings]) -> Findings:
    """Top minus random at the paper's largest share, by model and mode."""
    rows = [
        (
            name,
            mode,
            found.numbers["count_nearest_2.6_percent"],
            verdict["top_minus_random"],
            *verdict["top_minus_random_interval"],
        )
        for name, found in findings.items()
        for mode, verdict in found.numbers["verdicts"].items()
    ]
    table = pd.DataFrame(rows, columns=["model", "mode", "heads", "mean", "low", "high"])
    agreed = across_table(findings, ("agrees", "n_heads"))
    figure = plot_intervals(
        table,
        row="model",
        series="mode",
        xlabel="Accuracy, top \N{MINUS SIGN} random",
        lines={"no difference": 0.0},
    )
    return Findings(
        f"The top heads cost more than random ones in every mode in {of_models(agreed['agrees'])}.",
        plain({"models": agreed, "top_minus_random": table}),
        tables={"top_minus_random": ("Accuracy, top masked minus random masked, 2.6% of heads.", table)},
        figures=[
            (
                "Top minus random",
                "Accuracy with the top heads masked minus that with random ones, 2.6% of all, 95% intervals.",
                figure,
            )
        ],
    )


EXPERIMENT = Experiment(
    name="masking",
    title="Masking the top heads, the bottom ones, and random ones",
    source=f"{PAPER}, Fig. 6a",
    question="How fast do answers go wrong as the heads with most RAM are masked, and how fast with other heads?",
    method=(
        "The top, the bottom, random and layer-matched random heads ({n_draws} draws) by RAM on the selection split "
        "were masked at all positions (modes: {modes}) in the shares of heads of the paper's figure and at 5%; "
        "accuracy and invalid answers were taken on {n_per_kind} evaluation examples of each kind."
    ),
    run=run,
    cites=("arxiv_2606_05843",),
    published=PUBLISHED,
    across=across,
)
