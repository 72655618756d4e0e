"""Modes against the plain model, scipy and the raw outcomes."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from plain_runs import small_setup, without_heads

import mmlens
from mmlens.experiments.experiment import Findings, Setup
from mmlens.experiments.modes import EXPERIMENT, run

MODES = ("mean", "zero", "uniform")


@pytest.fixture(scope="module")
def setup(micro: mmlens.HookedVLM) -> Setup:
    return small_setup(micro)


@pytest.fixture(scope="module")
def found(setup: Setup) -> Findings:
    return run(setup, modes=MODES, n_draws=2, n_per_kind=4, n_per_kind_single=3, n_resamples=100)


def test_zero_costs_are_the_plain_model_s(setup: Setup, found: Findings) -> None:
    top = [tuple(head) for head in found.numbers["top"]]
    examples = [e for e in setup.evaluation if e.id.endswith(("-0", "-1", "-2", "-3"))]
    clean, without = without_heads(setup.model, [], examples), without_heads(setup.model, top, examples)
    for name, kept in (
        ("with evidence", lambda e: bool(e.evidence)),
        ("text only", lambda e: not e.evidence),
    ):
        for at, metric in enumerate(("accuracy", "logit_difference")):
            expected = np.mean([clean[e.id][at] - without[e.id][at] for e in examples if kept(e)])
            row = next(
                r for r in found.numbers["costs"]
                if (r["mode"], r["arm"], r["metric"], r["examples"]) == ("zero", "top", metric, name)
            )  # fmt: skip
            assert row["mean"] == pytest.approx(expected, abs=2e-3)
            assert row["low"] <= row["mean"] + 1e-9 and row["mean"] <= row["high"] + 1e-9


def test_agreement_is_scipys_over_the_raw_single_head_costs(found: Findings) -> None:
    heads = found.per_example["heads"]
    heads = heads[heads["metric"] == "logit_difference"]
    cost = (heads["clean"] - heads["value"]).groupby([heads["mode"], heads["heads"]]).mean().unstack(0)
    assert len(found.numbers["agreement"]) == 3
    for row in found.numbers["agreement"]:
        one, other = cost[row["one"]], cost[row["other"]]
        assert row["rho"] == pytest.approx(scipy.stats.spearmanr(one, other).statistic, abs=1e-6)
        tops = [set(each.nlargest(3).index) for each in (one, other)]
        assert row["in_both"] == len(tops[0] & tops[1]) and row["n_top"] == 3
    widest = found.numbers["disagreement"][0]
    spread = cost.max(axis=1) - cost.min(axis=1)
    assert widest["head"] == spread.idxmax() and widest["range"] == pytest.approx(spread.max(), abs=1e-5)
    assert widest["highest_in"] == cost.loc[widest["head"]].idxmax()


def test_controls_hold_none_of_the_top_heads_and_draws_are_averaged(found: Findings) -> None:
    sets = found.per_example["sets"]
    assert set(sets["arm"]) == {"top", "random", "layer_matched"}
    row = next(r for r in found.numbers["costs"] if r["arm"] == "random" and r["mode"] == "mean")
    own = sets[(sets["arm"] == "random") & (sets["mode"] == "mean") & (sets["metric"] == row["metric"])]
    own = own[own["is_control"] == (row["examples"] == "text only")]
    assert row["n_draws"] == 2 and row["n"] == own["example"].nunique()
    assert row["mean"] == pytest.approx((own["clean"] - own["value"]).mean())


def test_what_cannot_be_is_refused(setup: Setup) -> None:
    with pytest.raises(ValueError, match="ablation mode 'uniformly'; the nearest: 'uniform'"):
        run(setup, modes=("mean", "uniformly"))
    with pytest.raises(ValueError, match="'mean' more than once"):
        run(setup, modes=("mean", "mean"))


def test_across_averages_agreement(found: Findings) -> None:
    across = EXPERIMENT.across({"one": found, "two": found})
    for row in found.numbers["agreement"]:
        assert across.numbers["mean_agreement"][f"{row['one']} - {row['other']}"] == pytest.approx(row["rho"])
    assert len(across.tables["costs"][1]) == 2 * len(MODES)
