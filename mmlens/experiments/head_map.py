"""Where the heads are that look at the evidence: RAM over layers and heads (the paper's Fig. 4 and 9)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mmlens.errors import InvalidValueError
from mmlens.experiments.ablations import with_evidence
from mmlens.experiments.common import (
    FIVE_PERCENT,
    PAPER,
    POOLED,
    across_table,
    by_kind,
    flat_per_example,
    head_names,
    plain,
    ranged,
    resampled_means,
)
from mmlens.experiments.experiment import Experiment, Figures, Findings, Setup, checked_settings
from mmlens.head_scores import HeadScores
from mmlens.heads import HeadSet, head_name
from mmlens.scores.retrieval import ram
from mmlens.statistics import basic_interval, percentile_interval
from mmlens.viz.head_map import plot_head_map
from mmlens.viz.intervals import plot_curves, plot_intervals

PUBLISHED = pd.DataFrame(
    [
        ("Qwen3-VL-4B", 36, 13, 24, "most of the about 30 heads that are in all four tasks' top 5%"),
        ("Qwen3-VL-32B", 64, 44, 56, "the block of late layers to which the heads move with scale"),
    ],
    columns=["model", "n_layers", "first_layer", "last_layer", "what"],
)
"""Of the 8B model the paper says only that it lies between; whether layers count from 0 or 1 it does not say."""

BAND = (13 / 35, 24 / 35)
"""Depths of layers 13 to 24 of 36, counted from 0."""


def gini(values: np.ndarray) -> np.ndarray:
    """Gini coefficient of scores >= 0 along the last axis: 0 where all are equal, near 1 where one holds all.

    G = sum_i (2 i - n - 1) x_i / (n sum x), x ascending, i from 1.

    >>> gini(np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 3.0]])).round(3).tolist()
    [0.0, 0.667]
    """
    if (values < 0).any() or (values.sum(-1) == 0).any():
        raise InvalidValueError("the Gini coefficient is of scores >= 0, one at least above 0")
    n = values.shape[-1]
    weights = 2 * np.arange(1, n + 1) - n - 1
    return np.asarray((np.sort(values, axis=-1) * weights).sum(-1) / (n * values.sum(-1)))


@dataclass(frozen=True)
class _Measured:
    """RAM pooled and per kind, and where the top heads of each lie; `n_parameters` and the like tell the model."""

    parts: dict[str, HeadScores]
    places: dict[str, dict[str, Any]]
    fraction: float
    model: dict[str, Any]

    @property
    def scores(self) -> HeadScores:
        return self.parts[POOLED]

    @property
    def top(self) -> HeadSet:
        return self.scores.top(self.fraction)

    @property
    def in_band(self) -> int:
        return sum(_in_band(layer, self.scores.grid.n_layers) for layer, _ in self.top)

    @property
    def all_in_band(self) -> float:
        layers = np.nonzero(self.scores.grid.exists.numpy())[0]
        return float(np.mean([_in_band(layer, self.scores.grid.n_layers) for layer in layers]))

    @property
    def agrees(self) -> bool:
        return 2 * self.in_band >= len(self.top)


@checked_settings
def run(setup: Setup, *, fraction: float = FIVE_PERCENT, n_resamples: int = 1000) -> Findings:
    """RAM of every head on the selection split, per kind and pooled; where its top `fraction` lies and what it holds.

    `n_resamples` resamples of the examples within kinds, the top chosen anew in each, give the intervals: of the depth
    the middle 95%, of shares and Gini coefficients, which noise in the scores raises, the basic bootstrap's.
    """
    model, examples = setup.model, with_evidence(setup.selection)
    scores = ram(model, examples, **setup.options)
    parts = by_kind(scores)
    places = {kind: _place(part, fraction, n_resamples, setup.seed) for kind, part in parts.items()}
    about = {
        "family": model.family.model_type,
        "n_parameters": sum(p.numel() for p in model.hf_model.parameters()),
        "n_layers": model.cfg.n_layers,
        "n_heads": len(model.heads),
    }
    found = _Measured(parts, places, fraction, about)
    profile = _profile(parts, fraction)
    per_example = pd.DataFrame(flat_per_example(scores), columns=[head_name(head) for head in model.heads])
    per_example.insert(0, "id", [example.id for example in examples])
    return Findings(
        _statement(found),
        plain(_numbers(found)),
        tables={
            "heads": (
                "Every head, best first: RAM pooled and per kind, with rank intervals.",
                _heads(found),
            ),
            "layers": ("Share of all RAM and number of top heads in each layer.", profile),
            "places": (
                "Where the top heads lie, and how concentrated RAM is.",
                pd.DataFrame([{"kind": kind, **place} for kind, place in places.items()]),
            ),
        },
        per_example={"ram": per_example},
        figures=_figures(found, profile),
    )


# ---------------------------------------------------------------------- what is computed


def _heads(found: _Measured) -> pd.DataFrame:
    heads = found.scores.table()
    for kind in list(found.parts)[1:]:
        heads[f"score_{kind}"] = found.parts[kind].values.numpy()[heads["layer"], heads["head"]]
    return heads


def _in_band(layer: int | np.integer, n_layers: int) -> bool:
    return BAND[0] <= _depth(layer, n_layers) <= BAND[1]


def _depth(layer: int | np.integer, n_layers: int) -> float:
    return float(layer) / max(n_layers - 1, 1)


def _place(scores: HeadScores, fraction: float, n_resamples: int, seed: int) -> dict[str, Any]:
    top = scores.top(fraction)
    means = resampled_means(scores, n_resamples, seed)
    depths = np.nonzero(scores.grid.exists.numpy())[0] / max(scores.grid.n_layers - 1, 1)

    def of(values: np.ndarray) -> dict[str, np.ndarray]:
        """Of mean scores [resample, head]."""
        best = np.argsort(-values, axis=-1, kind="stable")[:, : len(top)]
        return {
            "depth": depths[best].mean(-1),
            "share": np.take_along_axis(values, best, -1).sum(-1) / values.sum(-1),
            "gini": gini(values),
        }

    here, draws = of(flat_per_example(scores).mean(0, keepdims=True)), of(means)
    return {
        "top": [list(head) for head in top],
        "depth": float(here["depth"][0]),
        "depth_interval": percentile_interval(draws["depth"]),
        "share_of_top": float(here["share"][0]),
        "share_interval": basic_interval(float(here["share"][0]), draws["share"]),
        "gini": float(here["gini"][0]),
        "gini_interval": basic_interval(float(here["gini"][0]), draws["gini"]),
        "n_examples": len(scores),
    }


def _profile(parts: Mapping[str, HeadScores], fraction: float) -> pd.DataFrame:
    rows = []
    for kind, part in parts.items():
        values, top = part.values.double().nan_to_num(0.0), part.top(fraction).by_layer()
        for layer in range(part.grid.n_layers):
            rows.append(
                {
                    "kind": kind,
                    "layer": layer,
                    "depth": _depth(layer, part.grid.n_layers),
                    "share_of_ram": float(values[layer].sum() / values.sum()),
                    "top_heads": len(top.get(layer, ())),
                }
            )
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------- how it is told


def _statement(found: _Measured) -> str:
    pooled, top = found.places[POOLED], found.top
    return (
        f"The top {found.fraction:.0%} by RAM ({len(top)} of {len(found.scores.grid)} heads: "
        f"{head_names(top)}) lie at a mean depth of "
        f"{ranged(pooled['depth'], *pooled['depth_interval'])} (0 the first layer, 1 the last). {found.in_band} of "
        f"{len(top)} lie at depths {BAND[0]:.2f} to {BAND[1]:.2f}, where the paper finds most of Qwen3-VL-4B's, and "
        f"{found.all_in_band:.0%} of all heads do: this {'agrees' if found.agrees else 'does not agree'} with the "
        f"paper. They hold {ranged(pooled['share_of_top'], *pooled['share_interval'])} of all RAM; its Gini "
        f"coefficient is {ranged(pooled['gini'], *pooled['gini_interval'])} (the paper reports neither)."
    )


def _numbers(found: _Measured) -> dict[str, Any]:
    return {
        "agrees": found.agrees,
        **found.model,
        "in_band": found.in_band,
        "share_of_all_heads_in_band": found.all_in_band,
        "kinds": found.places,
    }


def _figures(found: _Measured, profile: pd.DataFrame) -> Figures:
    caption = (
        "Mean attention from the question to the evidence, selection split; outlined: the top "
        f"{found.fraction:.0%}."
    )
    maps = [
        (f"RAM, {kind}", caption, plot_head_map(part, heads=part.top(found.fraction), title=kind))
        for kind, part in found.parts.items()
    ]
    by_depth = plot_curves(
        profile.rename(columns={"share_of_ram": "mean"}).assign(low=np.nan, high=np.nan),
        x="layer",
        series="kind",
        xlabel="Layer",
        ylabel="Share of all RAM",
        percent=True,
    )
    return [*maps, ("RAM by depth", "Each layer's share of the sum of RAM over all heads.", by_depth)]


def across(findings: Mapping[str, Findings]) -> Findings:
    """Whether the heads lie later in larger models of one family and the same tasks (the paper's 4B, 8B and 32B)."""
    table = across_table(
        findings,
        lambda found: {
            **{name: found[name] for name in ("family", "n_parameters", "n_layers", "n_heads", "agrees")},
            "tasks": " ".join(kind for kind in found["kinds"] if kind != POOLED),
            "mean": found["kinds"][POOLED]["depth"],
            "low": found["kinds"][POOLED]["depth_interval"][0],
            "high": found["kinds"][POOLED]["depth_interval"][1],
            "gini": found["kinds"][POOLED]["gini"],
            "share_of_top": found["kinds"][POOLED]["share_of_top"],
        },
    ).sort_values(["family", "tasks", "n_parameters"], ignore_index=True)
    said: list[str] = []
    later: dict[str, bool] = {}
    for (family, _), part in table.groupby(["family", "tasks"], sort=False):
        if part["n_parameters"].nunique() > 1:
            small, large = part.iloc[0], part.iloc[-1]
            clearly = bool(large["low"] > small["high"])
            later[str(family)] = later.get(str(family), True) and clearly
            said.append(
                f"{family}, {len(part)} sizes: mean depth {small['mean']:.2f} in {small['model']}, {large['mean']:.2f} "
                f"in {large['model']}, {'later with scale, as in the paper' if clearly else 'not clearly later'}"
            )
    statement = (
        "; ".join(said) + ". The sizes here are far from 4B to 32B, and few."
        if said
        else "No family has two sizes with the same tasks here, so whether heads move with scale cannot be seen."
    )
    return Findings(
        statement,
        plain({"later_with_scale": later, "models": table}),
        tables={"models": ("Mean depth of the top heads, with concentration, by model.", table)},
        figures=[
            (
                "Depth of the top heads",
                "Mean depth of the top heads by pooled RAM, 95% bootstrap intervals; dashed: depths of "
                "Qwen3-VL-4B's.",
                plot_intervals(
                    table,
                    row="model",
                    series="family",
                    xlabel="Mean depth (0 first layer, 1 last)",
                    lines={"layer 13 of 36": BAND[0], "24 of 36": BAND[1]},
                ),
            )
        ],
    )


EXPERIMENT = Experiment(
    name="head-map",
    title="Where the heads are that look at the evidence",
    source=f"{PAPER}, Fig. 4 and 9",
    question=(
        "In which layers are the heads with the highest Retrieval Attention Mass, and how few hold how much of it?"
    ),
    method=(
        "Retrieval Attention Mass (RAM, Eq. 1) of every head was averaged over the selection examples; the top "
        "{fraction} of all heads was located by depth, with 95% intervals from {n_resamples} resamples of examples."
    ),
    run=run,
    cites=("arxiv_2606_05843",),
    published=PUBLISHED,
    across=across,
)
