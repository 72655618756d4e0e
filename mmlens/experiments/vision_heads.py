"""CoRe heads against heads that look at the images at large (the paper's section 4.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd
import scipy.stats

from mmlens.experiments.ablations import first_of_kinds
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
    plain,
    ranged,
    records,
    selectivity,
    token_counts,
    with_evidence,
)
from mmlens.experiments.experiment import Experiment, Findings, Setup, checked_settings
from mmlens.heads import head_name
from mmlens.scores.retrieval import evidence_attention
from mmlens.viz.head_map import plot_head_map
from mmlens.viz.intervals import plot_intervals

CORE, VISION = "CoRe", "vision"


@checked_settings
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
    options: dict[str, Any] = {"batch_size": setup.batch_size, "progress": setup.progress}
    chosen_on = evidence_attention(setup.model, with_evidence(setup.selection), **options)
    core, vision = chosen_on.ram.top(fraction), chosen_on.vision_mass.top(fraction)
    total, both = len(chosen_on.ram.grid), core & vision
    by_chance = scipy.stats.hypergeom(total, len(core), len(vision))
    p_value = float(by_chance.sf(len(both) - 1))
    spearman = chosen_on.ram.spearman(chosen_on.vision_mass)

    examples = with_evidence(setup.evaluation)
    held_out = evidence_attention(setup.model, examples, **options)
    counts = token_counts(setup, examples)
    evidence_share = (counts["evidence"] / counts["visual"]).to_numpy()
    looks = pd.DataFrame(
        [
            {"heads": arm, "head": head_name((layer, head))}
            | selectivity(
                held_out.ram.per_example[:, layer, head],
                held_out.vision_mass.per_example[:, layer, head],
                evidence_share,
            )
            for arm, heads in ((CORE, core), (VISION, vision))
            for layer, head in heads
        ]
    )
    controls = {
        f"{name} layer-matched": matched_controls(heads, n_draws, setup.seed)
        for name, heads in ((CORE, core), (VISION, vision))
    }
    arms = {CORE: [core], VISION: [vision], **{name: drawn for name, (drawn, _) in controls.items()}}
    judged = replace(setup, evaluation=first_of_kinds(setup.evaluation, n_per_kind))
    outcomes = ablation_outcomes(judged, arms, modes)
    ablation = ablation_table(outcomes, setup.seed)
    differences = {}
    for mode in modes:
        mean, low, high = arm_difference(outcomes, CORE, VISION, mode=mode, seed=setup.seed)
        differences[mode] = {"difference": mean, "low": low, "high": high}
    core_matters_more = all(found["high"] < 0 for found in differences.values())
    cell = ablation[(ablation["kind"] == POOLED) & (ablation["metric"] == "accuracy")].set_index(
        ["mode", "arm"]
    )
    accuracies = "; ".join(
        f"{mode}: CoRe {cell.loc[(mode, CORE), 'mean']:.0%}, vision {cell.loc[(mode, VISION), 'mean']:.0%} "
        f"(difference {ranged(differences[mode]['difference'], differences[mode]['low'], differences[mode]['high'])})"
        for mode in modes
    )
    statement = (
        f"Of the top {fraction:.0%} by RAM ({head_names(core)}) {len(both)} of {len(core)} are also in the top "
        f"{fraction:.0%} by attention to all visual tokens ({head_names(vision)}); by chance {by_chance.mean():.2g} "
        f"would be (p = {p_value:.2g}). The two scores' Spearman is {spearman:.2f}. Accuracy on {cell['n'].iloc[0]} "
        f"held-out examples, {cell['clean'].iloc[0]:.0%} with all heads, with each set ablated - {accuracies}. "
        f"CoRe heads {'' if core_matters_more else 'do not clearly '}matter more than vision heads in every "
        f"mode; the "
        "paper's own numbers for this comparison are not at hand."
    )
    numbers = {
        "core_matters_more": core_matters_more,
        "core": core,
        "vision": vision,
        "overlap": len(both),
        "expected_overlap": by_chance.mean(),
        "overlap_p_value": p_value,
        "spearman": spearman,
        "core_minus_vision": differences,
        "ablation": records(ablation),
        "selectivity": records(looks),
        "layer_matched_shortfall": {name: message for name, (_, message) in controls.items()},
    }
    drawn = ablation[(ablation["kind"] == POOLED) & (ablation["metric"] == "accuracy")]
    return Findings(
        statement,
        plain(numbers),
        tables={
            "ablation": (
                "Accuracy and invalid answers on the evaluation split with each set ablated.",
                ablation,
            ),
            "selectivity": ("Attention to evidence and to all visual tokens, evaluation split.", looks),
        },
        per_example={"ablation": outcomes},
        figures=[
            (
                "RAM",
                "Attention to the evidence, selection split; outlined: its top.",
                plot_head_map(chosen_on.ram, heads=core, title="RAM, CoRe heads"),
            ),
            (
                "Vision mass",
                "Attention to all visual tokens, selection split; outlined: its top.",
                plot_head_map(chosen_on.vision_mass, heads=vision, title="vision mass, vision heads"),
            ),
            (
                "Ablation",
                "Accuracy on held-out examples with each set ablated, 95% intervals.",
                plot_intervals(
                    drawn,
                    row="arm",
                    series="mode",
                    xlabel="Accuracy",
                    percent=True,
                    lines={"all heads": float(drawn["clean"].iloc[0])},
                ),
            ),
            (
                "Selectivity",
                "Share of the attention to visual tokens that lies on the evidence, 95% bootstrap intervals; beside "
                "each, what the same attention spread evenly over the visual tokens would give.",
                plot_intervals(
                    beside_chance(looks, "heads"),
                    row="head",
                    series="series",
                    xlabel="RAM / vision mass",
                    percent=True,
                ),
            ),
        ],
    )


def across(findings: Mapping[str, Findings]) -> Findings:
    """Overlap of the two sets and the difference of their effects, by model and mode."""
    rows = []
    for name, found in findings.items():
        for mode, difference in found.numbers["core_minus_vision"].items():
            rows.append(
                {"model": name, "mode": mode, "mean": difference["difference"]}
                | {"low": difference["low"], "high": difference["high"]}
            )
    table = pd.DataFrame(rows)
    shared = across_table(
        findings,
        lambda found: {
            "top": len(found["core"]),
            **{
                key: found[key]
                for key in ("overlap", "expected_overlap", "overlap_p_value", "spearman", "core_matters_more")
            },
        },
    )
    return Findings(
        f"CoRe heads matter more than vision heads in every mode in {int(shared['core_matters_more'].sum())} "
        f"of {len(shared)} models.",
        plain({"models": shared.to_dict("records"), "core_minus_vision": rows}),
        tables={
            "overlap": ("How far the top heads by RAM and by vision mass are the same.", shared),
            "ablation": ("Accuracy with CoRe heads ablated minus accuracy with vision heads ablated.", table),
        },
        figures=[
            (
                "CoRe minus vision",
                "Difference in accuracy, paired by example, 95% intervals; below 0: CoRe heads matter more.",
                plot_intervals(
                    table,
                    row="model",
                    series="mode",
                    xlabel="Accuracy, CoRe ablated \N{MINUS SIGN} vision ablated",
                    lines={"no difference": 0.0},
                ),
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
        "On the selection split heads were ranked by RAM and by attention from the question to all visual "
        "tokens; the "
        "top {fraction} of each, and {n_draws} layer-matched random sets, were ablated (modes: {modes}) on the "
        "evaluation split."
    ),
    run=run,
    cites=("arxiv_2606_05843",),
    across=across,
)
