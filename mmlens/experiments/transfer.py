"""Do the heads of one task carry the others? Heads chosen on one kind of task, ablated on every kind."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mmlens.errors import InvalidValueError
from mmlens.experiments.ablations import ablated, first_of_kinds, references
from mmlens.experiments.common import (
    FIVE_PERCENT,
    POOLED,
    across_rows,
    arm_difference,
    by_kind,
    head_names,
    kinds_of,
    matched_controls,
    plain,
    ranged,
    selection_ram,
    summarised,
)
from mmlens.experiments.experiment import (
    Experiment,
    Figures,
    Findings,
    Setup,
    checked_settings,
    judges_as_asked,
)
from mmlens.heads import HeadSet
from mmlens.statistics import ratio_interval
from mmlens.viz.intervals import plot_intervals
from mmlens.viz.matrix import plot_matrix

OWN, OTHER = "own kind", "other kinds"


@checked_settings
@judges_as_asked
def run(
    setup: Setup,
    *,
    fraction: float = FIVE_PERCENT,
    mode: str = "mean",
    n_draws: int = 4,
    n_per_kind: int | None = 20,
) -> Findings:
    """Accuracy lost on every kind when the top `fraction` of heads by RAM on one kind is ablated.

    Heads are chosen on the selection split, kind by kind and pooled, and judged on `n_per_kind` examples of each kind
    of the evaluation split, text-only kinds among them. Beside each choice stand `n_draws` layer-matched random sets of
    the same size; `beyond` is the loss beyond theirs, paired by example. Raises ValueError where the selection split
    has fewer than two kinds with evidence.
    """
    scores = selection_ram(setup)
    if len(kinds_of(scores)) < 2:
        raise InvalidValueError(
            f"transfer is between kinds of task: the selection split has {kinds_of(scores)} with evidence, expected two"
        )
    chosen = {kind: own.top(fraction) for kind, own in by_kind(scores).items()}
    chosen = {kind: chosen[kind] for kind in [*kinds_of(scores), POOLED]}
    controls = {kind: matched_controls(heads, n_draws, setup.seed) for kind, heads in chosen.items()}
    evaluation = first_of_kinds(setup.evaluation, n_per_kind)
    text = sorted({example.kind for example in evaluation if not example.evidence})
    judged = [*(kind for kind in dict.fromkeys(e.kind for e in evaluation) if kind not in text), *text]
    sets: dict[str, HeadSet] = dict(chosen)
    for kind, (drawn, _) in controls.items():
        sets |= {f"{kind} #{draw}": own for draw, own in enumerate(drawn)}
    table = ablated(setup, evaluation, sets, references(setup, [mode]), {"accuracy": setup.judge.right})
    table["chosen_on"] = table["heads"].str.replace(r" #\d+$", "", regex=True)
    table["arm"] = np.where(table["heads"] == table["chosen_on"], "chosen", "layer_matched")
    cells = _cells(table, judged, setup.seed)
    groups = _groups(table, [kind for kind in chosen if kind != POOLED], text, setup.seed)
    ratio = _ratio(table, list(chosen), groups, setup.seed)
    overlap = pd.DataFrame(
        [[len(one & other) for other in chosen.values()] for one in chosen.values()],
        index=list(chosen),
        columns=list(chosen),
    )
    count = len(chosen[POOLED])
    return Findings(
        _statement(cells, groups, ratio, overlap, count, mode),
        plain(
            {
                "count": count,
                "n_heads": len(setup.model.grid),
                "n_evaluation": len(evaluation),
                "heads": chosen,
                "moved": {kind: moved for kind, (_, moved) in controls.items() if moved},
                "cells": cells,
                "groups": groups,
                "other_to_own": ratio,
                "overlap": {kind: row.to_dict() for kind, row in overlap.iterrows()},
            }
        ),
        tables={
            "cells": (f"Accuracy lost with {count} heads ablated, by kinds chosen and judged on.", cells),
            "groups": ("The same, together.", groups),
            "heads": (
                "The heads chosen on each kind.",
                pd.DataFrame({"chosen_on": list(chosen), "heads": [head_names(heads) for heads in chosen.values()]}),
            ),
        },
        per_example={"outcomes": table},
        figures=_figures(cells, groups, overlap, judged, mode, n_draws),
    )  # fmt: skip


def _figures(
    cells: pd.DataFrame,
    groups: pd.DataFrame,
    overlap: pd.DataFrame,
    judged: Sequence[str],
    mode: str,
    n_draws: int,
) -> Figures:
    chosen, count = list(overlap.index), overlap.loc[POOLED, POOLED]
    square, random = (
        cells.pivot(index="chosen_on", columns="judged_on", values=name).loc[chosen, judged].to_numpy()
        for name in ("lost", "lost_random")
    )
    of_both: dict[str, Any] = {
        # Where no choice of heads costs anything, any scale shows it.
        "vmax": float(np.abs([square, random]).max()) or 1.0,
        "label": "Accuracy lost",
        "column_label": "Judged on",
    }
    return [
        (
            "Accuracy lost: heads chosen on a kind, judged on a kind",
            f"Top {count} heads by RAM on the row's kind, {mode} ablation, evaluation split; text-only kinds last.",
            plot_matrix(square, chosen, judged, row_label="Chosen on", **of_both),
        ),
        (
            "Accuracy lost: layer-matched random heads",
            f"Means over {n_draws} sets with as many heads in each layer as the row's.",
            plot_matrix(random, chosen, judged, row_label="Layers of", **of_both),
        ),
        (
            "Accuracy lost on own kind, other kinds and text-only kinds",
            "Every example counts once: means over the choices of heads and the draws; 95% intervals.",
            plot_intervals(groups, row="judged_on", series="arm", xlabel="Accuracy lost", lines={"0": 0.0}),
        ),
        (
            "Heads in common",
            f"Heads that two kinds' top {count} share.",
            plot_matrix(overlap.to_numpy(), chosen, label="Heads in both", decimals=0),
        ),
    ]


def _cells(table: pd.DataFrame, judged: Sequence[str], seed: int) -> pd.DataFrame:
    """What each choice of heads costs on each kind, what layer-matched heads cost, and the loss beyond theirs."""
    lost = summarised(
        table.assign(draw=table["heads"]),
        ["chosen_on", "arm"],
        {kind: [kind] for kind in judged},
        paired=("lost", "clean", "value"),
        seed=seed,
    ).rename(columns={"kind": "judged_on"})
    own, random = (
        lost[lost["arm"] == arm].set_index(["chosen_on", "judged_on"]) for arm in ("chosen", "layer_matched")
    )
    losses = ["lost", "lost_low", "lost_high"]
    cells = own[["clean", *losses]].join(
        random[losses].rename(columns=lambda name: name.replace("lost", "lost_random"))
    )
    beyond = {
        (one, other): arm_difference(part, "layer_matched", "chosen", seed=seed)
        for (one, other), part in table.groupby(["chosen_on", "kind"])
    }
    for at, name in enumerate(("beyond", "beyond_low", "beyond_high")):
        cells[name] = [beyond[cell][at] for cell in cells.index]
    return cells.join(own["n"]).join(random["n_draws"]).reset_index()


def _groups(table: pd.DataFrame, chosen: list[str], text: list[str], seed: int) -> pd.DataFrame:
    """Loss on the kind the heads were chosen on, on other kinds with evidence, and on each text-only kind, by arm."""
    alone = table[table["chosen_on"].isin(chosen)]
    by_choice = np.where(alone["kind"] == alone["chosen_on"], OWN, OTHER)
    where = np.where(alone["kind"].isin(text), alone["kind"], by_choice)
    lost = summarised(
        alone.assign(kind=where, draw=alone["heads"]),
        ["arm"],
        {name: [name] for name in (OWN, OTHER, *text)},
        paired=("lost", "clean", "value"),
        seed=seed,
    )
    lost["kind"] = pd.Categorical(lost["kind"], [OWN, OTHER, *text])
    lost = lost.sort_values(["kind", "arm"], ignore_index=True)
    groups = lost[["kind", "arm", "lost", "lost_low", "lost_high", "n"]]
    return groups.set_axis(["judged_on", "arm", "mean", "low", "high", "n"], axis=1).astype(
        {"judged_on": object}
    )


def _ratio(table: pd.DataFrame, chosen: list[str], groups: pd.DataFrame, seed: int) -> dict[str, Any]:
    """Loss by other kinds' heads over loss by the kind's own, both on the same examples: 1 if heads are shared.

    None where the own loss is not told from 0: a share of nothing is noise.
    """
    own = groups[(groups["judged_on"] == OWN) & (groups["arm"] == "chosen")]
    if not (own["low"] > 0).all():
        return {"ratio": None, "low": None, "high": None}
    part = table[(table["arm"] == "chosen") & (table["chosen_on"] != POOLED) & table["kind"].isin(chosen)]
    loss = part.assign(loss=part["clean"] - part["value"], own=part["kind"] == part["chosen_on"])
    by_example = loss.groupby(["example", "own"])["loss"].mean().unstack().dropna()
    if not len(by_example):
        return {"ratio": None, "low": None, "high": None}
    with warnings.catch_warnings():
        # What the warnings say is seen in the interval: it is wide, or without width.
        warnings.simplefilter("ignore", UserWarning)
        low, high = ratio_interval(by_example[False].to_numpy(), by_example[True].to_numpy(), seed=seed)
    ratio = float(by_example[False].mean() / by_example[True].mean())
    finite = math.isfinite(low) and math.isfinite(high)
    return {"ratio": ratio, "low": low if finite else None, "high": high if finite else None}


def _statement(
    cells: pd.DataFrame,
    groups: pd.DataFrame,
    ratio: Mapping[str, Any],
    overlap: pd.DataFrame,
    count: int,
    mode: str,
) -> str:
    losses = []
    for name, rows in groups.groupby("judged_on", sort=False):
        shown = {row["arm"]: ranged(row["mean"], row["low"], row["high"]) for row in rows.to_dict("records")}
        losses.append(f"{name} {shown['chosen']} (layer-matched random {shown['layer_matched']})")
    kinds = [kind for kind in overlap.index if kind != POOLED]
    shared = [overlap.loc[one, other] for one in kinds for other in kinds if one != other]
    told = cells[(cells["chosen_on"] != POOLED) & (cells["chosen_on"] != cells["judged_on"])]
    told = told[told["judged_on"].isin(kinds)]
    harmed = int((told["beyond_low"] > 0).sum())
    own = cells[cells["chosen_on"] == cells["judged_on"]].sort_values("lost")
    idle = list(own.loc[own["beyond_low"] <= 0, "judged_on"])
    if ratio["ratio"] is None:
        verdict = "What a kind's own heads cost is not told from 0, so there is nothing to transfer"
    elif ratio["low"] is None:
        verdict = f"Other kinds' heads cost {ratio['ratio']:.2f} of what a kind's own do (no finite interval)"
    else:
        share = ranged(ratio["ratio"], ratio["low"], ratio["high"])
        verdict = f"Other kinds' heads cost {share} of what a kind's own do"
    return (
        f"{verdict}; in {harmed} of {len(told)} pairs of different kinds with evidence they cost more than "
        "layer-matched random heads"
        + (f", while the own heads of {', '.join(idle)} cost no more than those" if idle else "")
        + f". Two kinds share {np.mean(shared):.1f} of their top {count} heads on average. Accuracy lost "
        f"under {mode} ablation on - {'; '.join(losses)}."
    )


def across(findings: Mapping[str, Findings]) -> Findings:
    """Loss on own and other kinds and on text, by model."""
    table = across_rows(findings, "groups", lambda row, _: row["arm"] == "chosen")
    figure = plot_intervals(table, row="model", series="judged_on", xlabel="Accuracy lost", lines={"0": 0.0})
    ratios = {model: found.numbers["other_to_own"]["ratio"] for model, found in findings.items()}
    known = [ratio for ratio in ratios.values() if ratio is not None]
    said = (
        f"{np.mean(known):.2f} on average ({min(known):.2f} to {max(known):.2f})" if known else "not defined"
    )
    return Findings(
        f"What other kinds' heads cost, as a share of what a kind's own do, over {len(known)} model(s): {said}.",
        plain({"other_to_own": ratios}),
        tables={"groups": ("Accuracy lost by model.", table)},
        figures=[
            (
                "Accuracy lost on own kind, other kinds and text-only kinds",
                "By model, 95% intervals.",
                figure,
            )
        ],
    )


EXPERIMENT = Experiment(
    name="transfer",
    title="Do the heads of one task carry the others?",
    source="beyond arXiv 2606.05843, whose Fig. 5 compares scores, not effects",
    question="What does ablating the heads chosen on one kind of task cost on the others, and on text?",
    method=(
        "The top {fraction} of heads by RAM was chosen on each kind of task alone, and pooled, on the selection split, "
        "and ablated ({mode} ablation) on {n_per_kind} evaluation examples of every kind, text-only kinds among them, "
        "beside {n_draws} layer-matched random sets each. Losses of accuracy are paired by example; other kinds' loss "
        "as a share of own loss has a bootstrap interval."
    ),
    run=run,
    cites=("arxiv_2606_05843",),
    across=across,
)
