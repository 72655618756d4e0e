"""`sweep`: many interventions on many prompts as one table, at the price of what differs between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from mmlens.arguments import BATCH_SIZE, flag, instance_of, number, shown
from mmlens.effects.runner import (
    MetricRuns,
    Metrics,
    PromptRuns,
    warn_of_nothing,
)
from mmlens.errors import InvalidTypeError, InvalidValueError
from mmlens.interventions.edits import intervention_of
from mmlens.metrics.outcomes import Metric
from mmlens.model.batches import Batches, Prompts
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import Intervention

Part = tuple[int, Tensor, Tensor]
"""A batch's first example, and each example's value and clean value."""


@torch.no_grad()
def sweep(
    model: HookedVLM,
    prompts: Prompts,
    interventions: Mapping[Any, Intervention],
    metric: Metric | Metrics,
    *,
    batch_size: int = BATCH_SIZE,
    memory: float = 1.0,
    logits_to_keep: int = 1,
    progress: bool = True,
) -> pd.DataFrame:
    """`metric` on every prompt under every intervention, each alone: what `effect` gives, one by one, but faster.

    One row per intervention, example and metric: intervention (its label), example, metric, value, clean.
    `table.attrs["reuse"]` says, for every intervention and prompt, from which layer and position it was run, in a
    batch of how many, and why not from later; `reuse_table` shows it.

    Every prompt is run once without an intervention. An intervention then runs from the first layer and the first
    position that it touches, on the clean run's residual stream, keys and values; interventions that start together
    run as one batch; images are encoded once. All this is taken only where a run without edits gives the clean
    logits (to 1e-5 in fp32; in half precision other kernels round otherwise). Hook functions that are not the
    library's edits may touch any position, so they reuse layers only.

    `prompts` and `batch_size` are as for `effect`; `memory` bounds, in GiB, what the stacked runs hold beside
    model and clean run (an estimate; out of memory halves the batch). `logits_to_keep` is the number of last
    positions whose logits the metric reads (0: all, which gives up the reuse of positions). Metrics that read
    generated answers run `generate` under one intervention after the other.

    Raises ValueError for no interventions, and HookNeverFiredError where one of an intervention's hooks never fired;
    warns (NoChangeWarning) of interventions that changed nothing on any prompt.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> examples = mmlens.scene_examples("objects", 4, seed=0)
    >>> heads = {head: mmlens.ablate([head], positions="last") for head in model.heads[:3]}
    >>> table = sweep(model, examples, heads, mmlens.answer_log_probability, progress=False)
    >>> list(table.columns), len(table)
    (['intervention', 'example', 'metric', 'value', 'clean'], 12)
    """
    runs = MetricRuns(model, metric, logits_to_keep)
    batches = Batches(model, prompts, batch_size)
    flag("progress", progress)
    memory = number("memory", memory, above=0)
    _check_interventions(interventions)
    labels = list(interventions)
    notes: list[dict[str, Any]] = []
    found: dict[tuple[int, str], list[Part]] = {
        (index, name): [] for index in range(len(labels)) for name in runs.metrics
    }
    with tqdm(
        total=batches.n_batches and len(labels) * batches.n_batches, disable=not progress, unit="run"
    ) as bar:
        for (first, *_), prompt in batches:
            own = PromptRuns(runs, prompt, memory=memory)
            for outcome in own.under(list(interventions.values())):
                for name, values in outcome.values.items():
                    found[outcome.index, name].append((first, values, own.clean_values[name]))
                notes.append({"intervention": labels[outcome.index], "example": first, **outcome.how})
                bar.update()
    changed = {note["intervention"] for note in notes if note["size"] > 0}
    idle = [label for label in labels if label not in changed]
    if idle:
        warn_of_nothing(
            f"{len(idle)} of {len(labels)} interventions changed no activation of any prompt, the first of them "
            f"{idle[0]!r}: their values are the clean run's"
        )
    return _table(labels, found, notes)


def _table(
    labels: Sequence[Any], found: Mapping[tuple[int, str], Sequence[Part]], notes: list[dict[str, Any]]
) -> pd.DataFrame:
    rows: dict[str, list[Any]] = {
        name: [] for name in ("intervention", "example", "metric", "value", "clean")
    }
    for (index, metric), parts in found.items():
        for first, values, clean in parts:
            n = len(values)
            rows["intervention"] += [labels[index]] * n
            rows["example"] += range(first, first + n)
            rows["metric"] += [metric] * n
            rows["value"] += values.double().tolist()
            rows["clean"] += clean.double().tolist()
    frame = pd.DataFrame({**rows, "intervention": pd.Series(rows["intervention"], dtype=object)})
    frame.attrs["reuse"] = notes
    return frame


def reuse_table(table: pd.DataFrame) -> pd.DataFrame:
    """What each run of a sweep reused: intervention, example (the first of its batch), layer, position, batch,
    fired, size of the largest change, and why not more."""
    if "reuse" not in instance_of("table", table, pd.DataFrame, "a sweep's table").attrs:
        raise InvalidValueError(
            "this table is not a sweep's, or has lost its attrs on the way: no 'reuse' in table.attrs"
        )
    return pd.DataFrame(table.attrs["reuse"])


def _check_interventions(interventions: object) -> None:
    expected = "a dict {label: intervention}"
    if not isinstance(interventions, Mapping):
        hint = (
            ": dict(enumerate(interventions)) numbers them"
            if isinstance(interventions, (list, tuple))
            else ""
        )
        raise InvalidTypeError(f"interventions is {shown(interventions)}; expected {expected}{hint}")
    if not interventions:
        raise InvalidValueError(
            f"no interventions given: sweep needs at least one intervention, as {expected}"
        )
    for label, intervention in interventions.items():
        intervention_of(intervention, f"interventions[{label!r}]")
