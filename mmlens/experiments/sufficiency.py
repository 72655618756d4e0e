"""How few heads are enough? The top k of a ranking are kept, and all others ablated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from mmlens.arguments import one_of
from mmlens.errors import InvalidValueError
from mmlens.experiments.ablations import (
    ablated,
    all_heads,
    head_costs,
    references,
    single_heads,
    with_evidence,
)
from mmlens.experiments.common import across_rows, plain, selection_ram, summarised
from mmlens.experiments.experiment import (
    Experiment,
    Figures,
    Findings,
    Setup,
    checked_settings,
    judges_as_asked,
)
from mmlens.head_scores import HeadScores, share_of
from mmlens.heads import HeadSet
from mmlens.viz.intervals import plot_curves, plot_intervals

RANKINGS = ("ram", "effect")
NONE, ALL = "no head", "all heads"


@checked_settings
@judges_as_asked
def run(
    setup: Setup,
    *,
    rankings: Sequence[str] = RANKINGS,
    shares: Sequence[float] = (0.05, 0.1, 0.2, 0.5, 0.7, 0.9),
    modes: Sequence[str] = ("mean", "resample"),
    n_draws: int = 3,
    n_per_kind: int | None = 8,
    keep: float = 0.9,
) -> Findings:
    """Accuracy on the evaluation split with only k heads left, for several k, rankings and ways to choose.

    Rankings, of the selection split: "ram", and "effect", the cost of ablating each head alone there (mean ablation, 6
    examples of each kind). Controls: the first k of `n_draws` random orders of all heads ("random"), and as many heads
    in each layer as the first ranking's top k has, drawn from all heads of that layer ("layer_matched"). Both can draw
    top heads, as any set of more than half the heads must: the question is whether k heads of any kind do. All other
    heads are ablated at all positions, among them those that carry text and move the answer. `keep` is the share of the
    clean accuracy for which the smallest k is sought. `n_per_kind` evaluation examples of each kind with evidence.
    """
    for ranking in rankings:
        one_of("ranking", ranking, RANKINGS)
    if not rankings or not 0 < keep <= 1:
        raise InvalidValueError(
            f"at least one of the rankings {RANKINGS}, and keep in (0, 1]; got {list(rankings)}, {keep}"
        )
    heads = all_heads(setup)
    # None and all are the same for every way to choose: the first is run once, the second is the clean run.
    counts = sorted({share_of(share, len(heads)) for share in shares} - {len(heads)})
    found = {ranking: _ranking(setup, ranking, heads) for ranking in rankings}
    kept = _kept(setup, found, heads, counts, n_draws)
    examples = with_evidence(setup.evaluation, n_per_kind)
    sets = {_label(key): own.complement() for key, own in kept.items()} | {NONE: heads}
    table = ablated(setup, examples, sets, references(setup, modes), {"accuracy": setup.judge.right})
    curves = _curves(table, kept, len(heads), setup.seed)
    smallest = _smallest(curves, keep)
    clean = float(curves.loc[curves["count"] == len(heads), "mean"].iloc[0])
    return Findings(
        _statement(curves, smallest, keep, clean, len(heads)),
        plain(
            {
                "n_heads": len(heads),
                "n_evaluation": len(examples),
                "clean": clean,
                "chance": float(np.mean([1 / len(e.candidates) if e.candidates else 0.0 for e in examples])),
                "keep": keep,
                "smallest": smallest,
                "curves": curves,
                "order": {name: found[name].top(len(heads)) for name in rankings},
            }
        ),
        tables={
            "smallest": (
                f"Fewest heads that keep {keep:.0%} of the clean accuracy, of the counts tried.",
                smallest,
            ),
            "curves": ("Accuracy with k heads kept and all others ablated.", curves),
        },
        per_example={"outcomes": table},
        figures=_figures(curves, len(examples), len(heads)),
    )


def _figures(curves: pd.DataFrame, n_examples: int, n_heads: int) -> Figures:
    labels = {
        "ram": "top by RAM",
        "effect": "top by single-head cost",
        "layer_matched": "layer-matched random",
    }
    return [
        (
            f"Accuracy with k heads kept, {mode} ablation of the others",
            f"{n_examples} held-out examples; bands: 95% intervals (means over draws of the random arms).",
            plot_curves(
                rows.assign(arm=rows["arm"].replace(labels)),
                x="count",
                series="arm",
                xlabel=f"Heads kept, of {n_heads}",
                ylabel="Accuracy",
                percent=True,
            ),
        )
        for mode, rows in curves.groupby("mode", sort=False)
    ]


def _kept(
    setup: Setup, found: Mapping[str, HeadScores], heads: HeadSet, counts: Sequence[int], n_draws: int
) -> dict[tuple[str, int, int], HeadSet]:
    """(arm, count, draw) -> the heads that are kept."""
    rngs = [np.random.default_rng([setup.seed, draw]) for draw in range(n_draws)]
    # `top` refuses scores that rank nothing, and warns where a cut goes through a tie.
    kept = {(name, count, 0): scores.top(count) for name, scores in found.items() for count in counts}
    for draw, rng in enumerate(rngs):
        order = [heads.heads[at] for at in rng.permutation(len(heads))]
        kept |= {("random", count, draw): HeadSet(order[:count], heads.grid) for count in counts}
    first = next(iter(found))
    for count in counts:
        for draw, rng in enumerate(rngs):
            kept["layer_matched", count, draw] = same_layers(kept[first, count, 0], rng)
    return kept


def _label(key: tuple[str, int, int]) -> str:
    return "{} {} #{}".format(*key)


def same_layers(heads: HeadSet, rng: np.random.Generator) -> HeadSet:
    """As many heads in each layer as `heads` has, drawn from all heads of that layer, those of `heads` included.

    >>> chosen = HeadSet([(0, 1), (1, 0), (1, 1)], grid=(2, 2))
    >>> drawn = same_layers(chosen, np.random.default_rng(0))
    >>> [len(drawn.by_layer()[layer]) for layer in (0, 1)]
    [1, 2]
    """
    drawn = [
        (layer, int(head))
        for layer, members in heads.by_layer().items()
        for head in rng.permutation(heads.grid.heads_per_layer[layer])[: len(members)]
    ]
    return HeadSet(drawn, heads.grid)


def _ranking(setup: Setup, ranking: str, heads: HeadSet) -> HeadScores:
    if ranking == "ram":
        return selection_ram(setup)
    examples = with_evidence(setup.selection, 6)
    graded, function = setup.judge.graded(examples)
    table = ablated(setup, examples, single_heads(heads), references(setup, ["mean"]), {graded: function})
    return head_costs(setup, table, graded, "mean", heads)


def _curves(
    table: pd.DataFrame, kept: Mapping[tuple[str, int, int], HeadSet], n_heads: int, seed: int
) -> pd.DataFrame:
    """One row per mode, arm and count (0 and all heads among them): mean accuracy over examples, interval, draws."""
    runs = []
    for _, rows in table.groupby("mode", sort=False):
        none = rows[rows["heads"] == NONE]
        for arm in dict.fromkeys(arm for arm, _, _ in kept):
            own = [
                (count, draw, rows[rows["heads"] == _label((name, count, draw))])
                for name, count, draw in kept
                if name == arm
            ]
            ends = [(0, 0, none), (n_heads, 0, none.assign(value=none["clean"]))]
            runs += [
                part.assign(arm=arm, count=count, draw=draw)
                for count, draw, part in sorted([*ends, *own], key=lambda run: run[:2])
            ]
    outcomes = pd.concat(runs, ignore_index=True)
    curves = summarised(outcomes, ["mode", "arm", "count"], paired=None, seed=seed)
    curves.insert(3, "fraction", curves["count"] / n_heads)
    return curves.drop(columns="clean")


def _smallest(curves: pd.DataFrame, keep: float) -> pd.DataFrame:
    """For each mode and arm the smallest count tried from which on all counts keep the share of the clean accuracy."""
    rows = []
    for (mode, arm), part in curves.groupby(["mode", "arm"], sort=False):
        part = part.sort_values("count", ascending=False)
        goal = keep * part["mean"].iloc[0]
        enough = part[(part["mean"] >= goal - 1e-12).cummin()]
        last = enough.iloc[-1]
        rows.append({"mode": mode, "arm": arm, **last[["count", "fraction", "mean", "low", "high"]]})
    return pd.DataFrame(rows)


def _statement(curves: pd.DataFrame, smallest: pd.DataFrame, keep: float, clean: float, n_heads: int) -> str:
    said = []
    for mode, rows in smallest.groupby("mode", sort=False):
        fewest = ", ".join(
            f"{row['arm'].replace('_', '-')} {row['count']:.0f} ({row['fraction']:.0%})"
            for row in rows.to_dict("records")
        )
        first = curves[(curves["mode"] == mode) & (curves["count"] > 0)]
        five = first[first["count"] == first["count"].min()]
        left = ", ".join(
            f"{row['arm'].replace('_', '-')} {row['mean']:.0%}" for row in five.to_dict("records")
        )
        none = curves[(curves["mode"] == mode) & (curves["count"] == 0)]["mean"].iloc[0]
        said.append(
            f"{mode} ablation: {fewest}; with {int(five['count'].iloc[0])} heads kept accuracy is {left}, "
            f"with none {none:.0%}"
        )
    return (
        f"Fewest heads (of {n_heads}, of the counts tried) that keep {keep:.0%} of the clean accuracy of "
        f"{clean:.0%} while "
        f"all others are ablated - {'. '.join(said)}. The others include the heads that read the question and move the "
        "answer, so a set that retrieves may still fail."
    )


def across(findings: Mapping[str, Findings]) -> Findings:
    """The fewest heads by model, arm and mode, as shares of all heads."""
    table = across_rows(findings, "smallest").drop(columns=["low", "high"])
    table = table.rename(columns={"mean": "accuracy"})
    table.insert(1, "n_heads", [findings[model].numbers["n_heads"] for model in table["model"]])
    mode = table["mode"].iloc[0]
    of_mode = table[table["mode"] == mode]
    mean = of_mode.groupby("arm", sort=False)["fraction"].mean()
    drawn = of_mode.assign(mean=of_mode["fraction"], low=math.nan, high=math.nan)
    figure = plot_intervals(drawn, row="model", series="arm", xlabel="Share of heads kept", percent=True)
    return Findings(
        f"Mean share of the heads that has to be kept ({mode} ablation of the others): "
        + ", ".join(f"{arm.replace('_', '-')} {share:.0%}" for arm, share in mean.items())
        + ".",
        plain({"mode": mode, "share": mean.to_dict()}),
        tables={"smallest": ("Fewest heads that keep the accuracy.", table)},
        figures=[
            (
                "Share of heads that has to be kept",
                f"{mode.capitalize()} ablation of all others; of the counts tried.",
                figure,
            )
        ],
    )


EXPERIMENT = Experiment(
    name="sufficiency",
    title="How few heads are enough?",
    source="beyond arXiv 2606.05843",
    question="Do the top heads keep the accuracy when all other heads are ablated, and how many does it take?",
    method=(
        "Only the top k heads of a ranking ({rankings}, both on the selection split) were kept and all others ablated "
        "({modes}), for shares {shares} of all heads, beside {n_draws} random orders of all heads and {n_draws} draws "
        "of as many heads in each layer; {n_per_kind} evaluation examples of each kind. The smallest k is reported "
        "from which on {keep} of the clean accuracy is kept."
    ),
    run=run,
    cites=("arxiv_2606_05843",),
    across=across,
)
