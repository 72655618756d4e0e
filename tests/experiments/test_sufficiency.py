"""Sufficiency against the plain model with all other heads cut out, and hand-made curves."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from plain_runs import small_setup, without_heads

import mmlens
from mmlens.experiments.experiment import Findings, Setup
from mmlens.experiments.sufficiency import EXPERIMENT, _smallest, run, same_layers
from mmlens.heads import HeadGrid


@pytest.fixture(scope="module")
def setup(micro: mmlens.HookedVLM) -> Setup:
    return small_setup(micro, n_evaluation=6)


@pytest.fixture(scope="module")
def found(setup: Setup) -> Findings:
    return run(
        setup, rankings=("ram", "effect"), shares=(0.5, 0.95), modes=("zero",), n_draws=2, n_per_kind=5
    )


def test_only_the_kept_heads_work(setup: Setup, found: Findings) -> None:
    examples = [e for e in setup.evaluation if e.evidence and not e.id.endswith("-5")]
    heads = set(setup.model.heads)
    for arm in ("ram", "effect"):
        order = [tuple(head) for head in found.numbers["order"][arm]]
        assert set(order) == heads and len(order) == len(heads)
        for count in (0, 61):
            without = without_heads(setup.model, heads - set(order[:count]), examples)
            row = next(r for r in found.numbers["curves"] if (r["arm"], r["count"]) == (arm, count))
            assert row["mean"] == pytest.approx(np.mean([without[e.id][0] for e in examples]))
            assert row["n"] == len(examples) and row["low"] <= row["mean"] <= row["high"]


def test_the_effect_ranking_is_the_plain_model_s_order_of_costs_on_the_selection_split(
    setup: Setup, found: Findings
) -> None:
    order = [tuple(head) for head in found.numbers["order"]["effect"]]
    examples = [e for e in setup.selection if e.evidence]
    # The ranking is by mean ablation: its best head costs more than its worst, here by zero ablation.
    clean = without_heads(setup.model, [], examples)
    first, last = (without_heads(setup.model, [head], examples) for head in (order[0], order[-1]))
    assert np.mean([clean[e.id][1] - first[e.id][1] for e in examples]) > np.mean(
        [clean[e.id][1] - last[e.id][1] for e in examples]
    )


def test_curves_begin_without_heads_and_end_clean(setup: Setup, found: Findings) -> None:
    examples = [e for e in setup.evaluation if e.evidence and not e.id.endswith("-5")]
    clean = np.mean([value[0] for value in without_heads(setup.model, [], examples).values()])
    curves = pd.DataFrame(found.numbers["curves"])
    assert set(curves["arm"]) == {"ram", "effect", "random", "layer_matched"}
    assert set(curves["count"]) == {0, 32, 61, 64}
    np.testing.assert_allclose(curves.loc[curves["count"] == 64, "mean"], clean)
    assert found.numbers["clean"] == pytest.approx(clean)
    assert curves.loc[curves["count"] == 0, "mean"].nunique() == 1
    assert set(curves.loc[curves["arm"] == "random"].groupby("count")["n_draws"].first()) == {1, 2}


def test_the_smallest_count_is_one_from_which_on_all_keep_enough() -> None:
    curves = pd.DataFrame(
        {"mode": "mean", "arm": "ram", "count": [0, 2, 5, 9, 10], "mean": [0.1, 0.95, 0.5, 0.9, 1.0]}
    ).assign(fraction=lambda t: t["count"] / 10, low=0.0, high=1.0)
    assert _smallest(curves, 0.9)["count"].tolist() == [9]
    assert _smallest(curves, 0.95)["count"].tolist() == [10]
    assert _smallest(curves, 0.05)["count"].tolist() == [0]


def test_layer_matched_sets_have_as_many_heads_in_each_layer_and_may_repeat_the_top() -> None:
    chosen = mmlens.HeadSet([(0, 0), (0, 1), (2, 3)], HeadGrid((2, 0, 4)))
    seen = set()
    for seed in range(40):
        drawn = same_layers(chosen, np.random.default_rng(seed))
        assert {layer: len(own) for layer, own in drawn.by_layer().items()} == {0: 2, 2: 1}
        seen |= set(drawn)
    assert seen == {(0, 0), (0, 1), (2, 0), (2, 1), (2, 2), (2, 3)}


def test_what_cannot_be_is_refused(setup: Setup) -> None:
    with pytest.raises(ValueError, match="ranking 'rams'; the nearest: 'ram'"):
        run(setup, rankings=("rams",))
    with pytest.raises(ValueError, match="keep is 1.5; expected"):
        run(setup, keep=1.5)


def test_across_gives_shares_of_heads(found: Findings) -> None:
    across = EXPERIMENT.across({"one": found, "two": found})
    ram = next(r for r in found.numbers["smallest"] if r["arm"] == "ram")
    assert across.numbers["share"]["ram"] == pytest.approx(ram["fraction"])
