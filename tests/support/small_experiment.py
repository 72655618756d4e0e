"""A real experiment that takes a second: RAM on one split, and one random head ablated on the other."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pandas as pd

import mmlens
from mmlens.experiments import catalog
from mmlens.experiments.experiment import Experiment, Findings, Setup
from mmlens.viz.head_map import plot_head_map


def run(
    setup: Setup,
    *,
    share: float = 0.05,
    modes: tuple[str, ...] = ("zero",),
    n_heads: int = 1,
    kinds: tuple[str, ...] | None = None,
    exact: bool = False,
) -> Findings:
    seen = [e for e in setup.selection if e.evidence and (kinds is None or e.kind in kinds)]
    scores = mmlens.ram(setup.model, seen, batch_size=setup.batch_size, progress=setup.progress)
    heads = random.Random(setup.seed).sample(list(setup.model.heads), n_heads)
    rows = []
    for mode in modes:
        found = mmlens.effect(
            setup.model, setup.evaluation, mmlens.ablate(heads, mode), mmlens.logit_difference
        )
        rows += [
            {"mode": mode, "id": example.id, "value": value}
            for example, value in zip(setup.evaluation, found.values.tolist(), strict=True)
        ]
    outcomes = pd.DataFrame(rows)
    numbers = {
        "top": [list(head) for head in scores.top(share)],
        "largest": np.float32(scores.values.max()),
        "mean": {mode: part["value"].mean() for mode, part in outcomes.groupby("mode")},
        "nothing": None,
        "exact": exact,
    }
    return Findings(
        f"The largest RAM of {setup.name} is {scores.values.max():.3f} & <more>.",
        numbers,
        {
            "heads": ("Every head.", scores.table()),
            "modes": ("By mode.", outcomes.groupby("mode")[["value"]].mean()),
        },
        {"outcomes": outcomes},
        [("RAM: every head", "Selection split.", plot_head_map(scores, title="all"))],
    )


def across(findings: Mapping[str, Findings]) -> Findings:
    table = pd.DataFrame(
        {"model": list(findings), "largest": [found.numbers["largest"] for found in findings.values()]}
    )
    rows = sum(len(found.tables["heads"][1]) for found in findings.values())
    return Findings("Both were run.", {"rows": rows}, {"models": ("Largest RAM.", table)})


EXPERIMENT = Experiment(
    name="small",
    title="A small experiment",
    source="tests",
    question="Does it run?",
    method="The top {share:.0%} by RAM, and {n_heads} random head, modes {modes} (exact: {exact}, kinds: {kinds}).",
    run=run,
    cites=("arxiv_2606_05843",),
    published=pd.DataFrame({"model": ["Qwen3-VL-4B"], "score": [45.3]}),
    across=across,
)


def broken(setup: Setup) -> Findings:
    raise RuntimeError("it broke")


BROKEN = Experiment("broken", "A broken experiment", "tests", "Does it fail?", "Nothing.", broken)


def register() -> None:
    """Make these all the experiments there are."""
    catalog.EXPERIMENTS.clear()
    catalog.EXPERIMENTS.update({"small": EXPERIMENT, "broken": BROKEN})


@contextmanager
def registered() -> Iterator[None]:
    """These are all the experiments there are, for a while."""
    before = dict(catalog.EXPERIMENTS)
    register()
    yield
    catalog.EXPERIMENTS.clear()
    catalog.EXPERIMENTS.update(before)
