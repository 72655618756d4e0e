"""CoRe heads against heads that look at the images at large (the paper's section 4.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import scipy.stats

from mmlens.experiments.ablations import first_of_kinds, with_evidence
from mmlens.experiments.common import (
    FIVE_PERCENT,
    PAPER,
    POOLED,
    ablation_outcomes,
    ablation_table,
    across_table,
    arm_difference,
    beside_chance,
    head_names,
    matched_controls,
    of_models,
    plain,
    ranged,
    selectivity,
    token_counts,
)
from mmlens.experiments.experiment import (
    Experiment,
    Figures,
    Findings,
    Setup,
    checked_settings,
    judges_as_asked,
)
from mmlens.head_scores import HeadScores
from mmlens.heads import HeadSet, head_name
from mmlens.scores.retrieval import evidence_attention
from mmlens.viz.head_map import plot_head_map
from mmlens.viz.intervals import plot_intervals

CORE, VISION = "CoRe", "vision"


@dataclass(frozen=True)
class _Measured:
    """Both sets of heads, how far they are the same, what they look at, and the accuracy without each."""

    ram: HeadScores
    vision_mass: HeadScores
    core: HeadSet
    vision: HeadSet
    fraction: float
    looks: pd.DataFrame
    outcomes: pd.DataFrame
    ablation: pd.DataFrame
    differences: dict[str, dict[str, float]]
    shortfall: dict[str, str]

    @property
    def overlap(self) -> int:
        return len(self.core & self.vision)

    @property
    def by_chance(self) -> Any:
        """The distribution of the overlap of two random sets of these sizes."""
        return scipy.stats.hypergeom(len(self.ram.grid), len(self.core), len(self.vision))

    @property
    def p_value(self) -> float:
        return float(self.by_chance.sf(self.overlap - 1))

    @property
    def spearman(self) -> float:
        return self.ram.spearman(self.vision_mass)

    @property
    def core_matters_more(self) -> bool:
        return all(found["high"] < 0 for found in self.differences.values())

    @property
    def accuracy(self) -> pd.DataFrame:
        return self.ablation[(self.ablation["kind"] == POOLED) & (self.ablation["metric"] == "accuracy")]


@checked_settings
@judges_as_asked
def run(
    setup: Setup,
    *,
    fraction: float = FIVE_PERCENT,
    modes: tuple[str, ...] = ("mean", "zero"),
    n_draws: int = 3,
    n_per_kind: int | None = 20,
) -> Findings:
    """The top `fraction` by RAM and by attention to all visual tokens: how far they are the same, and what each does.

    Heads are chosen on the selection split. Both sets, and `n_draws` layer-matched random sets for each, are ablated
    on the first `n_per_kind` evaluation examples of each kind (None: all). Selectivity is the share of a head's
    attention to visual tokens that goes to the evidence, mean RAM / mean vision mass on the evaluation split.
    """
    chosen_on = evidence_attention(setup.model, with_evidence(setup.selection), **setup.options)
    sets = {CORE: chosen_on.ram.top(fraction), VISION: chosen_on.vision_mass.top(fraction)}
    looks = _looks(setup, sets)
    controls = {
        f"{name} layer-matched": matched_controls(heads, n_draws, setup.seed) for name, heads in sets.items()
    }
    arms = {name: [heads] for name, heads in sets.items()} | {n: drawn for n, (drawn, _) in controls.items()}
    judged = replace(setup, evaluation=first_of_kinds(setup.evaluation, n_per_kind))
    outcomes = ablation_outcomes(judged, arms, modes)
    differences = {}
    for mode in modes:
        mean, low, high = arm_difference(outcomes, CORE, VISION, mode=mode, seed=setup.seed)
        differences[mode] = {"difference": mean, "low": low, "high": high}
    found = _Measured(
        chosen_on.ram,
        chosen_on.vision_mass,
        sets[CORE],
        sets[VISION],
        fraction,
        looks,
        outcomes,
        ablation_table(outcomes, setup.seed),
        differences,
        {name: message for name, (_, message) in controls.items()},
    )
    return Findings(
        _statement(found),
        plain(_numbers(found)),
        tables={
            "ablation": (
                "Accuracy and invalid answers on the evaluation split with each set ablated.",
                found.ablation,
            ),
            "selectivity": ("Attention to evidence and to all visual tokens, evaluation split.", looks),
        },
        per_example={"ablation": outcomes},
        figures=_figures(found),
    )


# ---------------------------------------------------------------------- what is computed


def _looks(setup: Setup, sets: Mapping[str, HeadSet]) -> pd.DataFrame:
    """The selectivity of every head of the two sets, on the evaluation split."""
    examples = with_evidence(setup.evaluation)
    seen = evidence_attention(setup.model, examples, **setup.options)
    counts = token_counts(setup, examples)
    evidence_share = (counts["evidence"] / counts["visual"]).to_numpy()
    return pd.DataFrame(
        [
            {"heads": arm, "head": head_name((layer, head))}
            | selectivity(
                seen.ram.per_example[:, layer, head],
                seen.vision_mass.per_example[:, layer, head],
                evidence_share,
            )
            for arm, heads in sets.items()
            for layer, head in heads
        ]
    )


# ---------------------------------------------------------------------- how it is told


def _statement(found: _Measured) -> str:
    cell = found.accuracy.set_index(["mode", "arm"])
    accuracies = "; ".join(
        f"{mode}: CoRe {cell.loc[(mode, CORE), 'mean']:.0%}, vision {cell.loc[(mode, VISION), 'mean']:.0%} "
        f"(difference {ranged(*difference.values())})"
        for mode, difference in found.differences.items()
    )
    return (
        f"Of the top {found.fraction:.0%} by RAM ({head_names(found.core)}) {found.overlap} of {len(found.core)} are "
        f"also in the top {found.fraction:.0%} by attention to all visual tokens ({head_names(found.vision)}); by "
        f"chance {found.by_chance.mean():.2g} would be (p = {found.p_value:.2g}). The two scores' Spearman is "
        f"{found.spearman:.2f}. Accuracy on {cell['n'].iloc[0]} held-out examples, {cell['clean'].iloc[0]:.0%} with "
        f"all heads, with each set ablated - {accuracies}. "
        f"CoRe heads {'' if found.core_matters_more else 'do not clearly '}matter more than vision heads in every "
        "mode; the paper's own numbers for this comparison are not at hand."
    )


def _numbers(found: _Measured) -> dict[str, Any]:
    return {
        "core_matters_more": found.core_matters_more,
        "core": found.core,
        "vision": found.vision,
        "overlap": found.overlap,
        "expected_overlap": found.by_chance.mean(),
        "overlap_p_value": found.p_value,
        "spearman": found.spearman,
        "core_minus_vision": found.differences,
        "ablation": found.ablation,
        "selectivity": found.looks,
        "layer_matched_shortfall": found.shortfall,
    }


def _figures(found: _Measured) -> Figures:
    return [
        (
            "RAM",
            "Attention to the evidence, selection split; outlined: its top.",
            plot_head_map(found.ram, heads=found.core, title="RAM, CoRe heads"),
        ),
        (
            "Vision mass",
            "Attention to all visual tokens, selection split; outlined: its top.",
            plot_head_map(found.vision_mass, heads=found.vision, title="vision mass, vision heads"),
        ),
        (
            "Ablation",
            "Accuracy on held-out examples with each set ablated, 95% intervals.",
            plot_intervals(
                found.accuracy,
                row="arm",
                series="mode",
                xlabel="Accuracy",
                percent=True,
                lines={"all heads": float(found.accuracy["clean"].iloc[0])},
            ),
        ),
        (
            "Selectivity",
            "Share of the attention to visual tokens that lies on the evidence, 95% bootstrap intervals; beside "
            "each, what the same attention spread evenly over the visual tokens would give.",
            plot_intervals(
                beside_chance(found.looks, "heads"),
                row="head",
                series="series",
                xlabel="RAM / vision mass",
                percent=True,
            ),
        ),
    ]


def across(findings: Mapping[str, Findings]) -> Findings:
    """Overlap of the two sets and the difference of their effects, by model and mode."""
    rows = [
        {"model": name, "mode": mode, **difference}
        for name, found in findings.items()
        for mode, difference in found.numbers["core_minus_vision"].items()
    ]
    table = pd.DataFrame(rows).rename(columns={"difference": "mean"})
    names = ("overlap", "expected_overlap", "overlap_p_value", "spearman", "core_matters_more")
    shared = across_table(findings, names)
    shared.insert(1, "top", [len(found.numbers["core"]) for found in findings.values()])
    figure = plot_intervals(
        table,
        row="model",
        series="mode",
        xlabel="Accuracy, CoRe ablated \N{MINUS SIGN} vision ablated",
        lines={"no difference": 0.0},
    )
    return Findings(
        "CoRe heads matter more than vision heads in every mode in "
        f"{of_models(shared['core_matters_more'])}.",
        plain({"models": shared, "core_minus_vision": table}),
        tables={
            "overlap": ("How far the top heads by RAM and by vision mass are the same.", shared),
            "ablation": ("Accuracy with CoRe heads ablated minus accuracy with vision heads ablated.", table),
        },
        figures=[
            (
                "CoRe minus vision",
                "Difference in accuracy, paired by example, 95% intervals; below 0: CoRe heads matter more.",
                figure,
            )
        ],
    )


EXPERIMENT = Experiment(
    name="vision-heads",
    title="CoRe heads against vision heads",
    source=f"{PAPER}, section 4.2",
    question=(
        "Are heads that look at the evidence other heads than those that look at the images at large, and which "
        "matter?"
    ),
    method=(
        "On the selection split heads were ranked by RAM and by attention from the question to all visual tokens; the "
        "top {fraction} of each, and {n_draws} layer-matched random sets, were ablated (modes: {modes}) on the "
        "evaluation split."
    ),
    run=run,
    cites=("arxiv_2606_05843",),
    across=across,
)
