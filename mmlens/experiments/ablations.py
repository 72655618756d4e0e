"""What the experiments beyond the paper share: sets of heads ablated on the same examples, as costs to each metric."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from mmlens.data.examples import Example
from mmlens.effects.sweeps import sweep
from mmlens.errors import InvalidValueError
from mmlens.experiments.experiment import Setup
from mmlens.head_scores import HeadScores
from mmlens.heads import HeadSet, head_name
from mmlens.interventions.ablation import Means, ablate, mean_activations
from mmlens.metrics.outcomes import Metric
from mmlens.statistics import difference_interval_of


def all_heads(setup: Setup) -> HeadSet:
    """Every head of the model, layer by layer."""
    return HeadSet.every(setup.model.grid)


def single_heads(heads: HeadSet) -> dict[str, HeadSet]:
    """Each of the heads as a set of its own, by `head_name`.

    >>> list(single_heads(HeadSet([(1, 3), (0, 2)], grid=(2, 4))))
    ['L1H3', 'L0H2']
    """
    return {head_name(head): HeadSet([head], heads.grid) for head in heads}


def first_of_kinds(examples: Sequence[Example], n_per_kind: int | None) -> list[Example]:
    """The first `n_per_kind` examples of each kind (None: all), then sorted by kind and number of images.

    Raises ValueError for fewer than 2: there is no interval of one example.
    """
    if n_per_kind is not None and n_per_kind < 2:
        raise InvalidValueError(
            f"n_per_kind is a number of examples of each kind, at least 2, or None; not {n_per_kind}"
        )
    seen: Counter[str] = Counter()
    chosen = []
    for example in examples:
        seen[example.kind] += 1
        if n_per_kind is None or seen[example.kind] <= n_per_kind:
            chosen.append(example)
    return sorted(chosen, key=lambda example: (example.kind, len(example.images)))


def with_evidence(examples: Sequence[Example], n_per_kind: int | None = None) -> list[Example]:
    """`first_of_kinds` of those that have evidence (None: all of them); raises ValueError where none has."""
    chosen = [example for example in examples if example.evidence]
    if not chosen:
        raise InvalidValueError(f"none of the {len(examples)} examples has evidence")
    return first_of_kinds(chosen, n_per_kind)


def references(setup: Setup, modes: Sequence[str]) -> dict[str, Any]:
    """For each ablation mode the reference that `ablate` takes, all of them from the selection split."""
    means: Means | None = None
    if {"mean", "mean_query"} & set(modes):
        means = mean_activations(setup.model, setup.selection, batch_size=setup.batch_size)
    given = {"mean": means, "mean_query": means, "resample": list(setup.selection)}
    return {mode: given.get(mode) for mode in modes}


def ablated(
    setup: Setup,
    examples: Sequence[Example],
    sets: Mapping[Any, HeadSet],
    reference: Mapping[str, Any],
    metrics: Mapping[str, Metric],
    *,
    names: Sequence[str] = ("heads",),
) -> pd.DataFrame:
    """Every set of heads ablated, at all positions, in each mode of `reference`: `metrics` on every example.

    One row per mode, set, metric and example: mode, heads (the set's key), example, id, kind, metric, value, clean.
    Keys that are tuples stand in columns of their own, called `names`. Equal sets are run once. Raises ValueError for
    no sets, and as `ablate`.
    """
    runs: dict[tuple[str, HeadSet], str] = {}
    for mode in reference:
        for heads in sets.values():
            runs.setdefault((mode, heads), f"{len(runs)}")
    interventions = {
        run: ablate(heads, mode, reference=reference[mode], seed=setup.seed)
        for (mode, heads), run in runs.items()
    }
    table = sweep(setup.model, examples, interventions, metrics, **setup.options)
    of_run = dict(list(table.groupby("intervention", sort=False)))
    frames = [
        of_run[runs[mode, heads]].assign(
            mode=mode, **dict(zip(names, key if isinstance(key, tuple) else (key,), strict=True))
        )
        for mode in reference
        for key, heads in sets.items()
    ]
    found = pd.concat(frames, ignore_index=True)
    found["id"] = [examples[index].id for index in found["example"]]
    found["kind"] = [examples[index].kind for index in found["example"]]
    found.attrs = {}
    return found[["mode", *names, "example", "id", "kind", "metric", "value", "clean"]]


def by_example(table: pd.DataFrame) -> pd.Series:
    """Each example's mean value over the rows that it has (draws of a control)."""
    return table.groupby("example")["value"].mean()


def paired_difference(one: pd.Series, other: pd.Series, seed: int) -> tuple[float, float, float]:
    """Mean of `one - other`, values of the same examples, and its 95% interval."""
    low, high = difference_interval_of(one.to_numpy(), other.to_numpy(), seed)
    return float((one - other).mean()), low, high


def costs(table: pd.DataFrame, metric: str, mode: str) -> pd.DataFrame:
    """What ablation takes away, clean - ablated: a row for each set, in their order, a column for each example."""
    rows = table[(table["metric"] == metric) & (table["mode"] == mode)]
    cost = (rows["clean"] - rows["value"]).to_numpy().reshape(rows["heads"].nunique(), -1)
    return pd.DataFrame(cost, index=list(dict.fromkeys(rows["heads"])), columns=rows["example"].unique())


def head_costs(setup: Setup, table: pd.DataFrame, metric: str, mode: str, heads: HeadSet) -> HeadScores:
    """The costs of single heads, whose sets go by `head_name`, as `HeadScores`: [example, layer, head].

    `heads` are all heads of the model; raises KeyError where the table lacks one of them.
    """
    found = costs(table, metric, mode)
    first = table[(table["metric"] == metric) & (table["mode"] == mode)].drop_duplicates("example")
    values = heads.grid.full(found.shape[1])
    for layer, head in heads:
        values[:, layer, head] = torch.tensor(found.loc[head_name((layer, head))].to_numpy())
    return HeadScores(values, f"cost in {metric.replace('_', ' ')}", tuple(first["kind"]), heads.grid)
