"""Prediction against scipy, plain runs of the model and finite differences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from plain_runs import small_setup, without_heads

import mmlens
from mmlens.experiments.experiment import Findings, Setup
from mmlens.experiments.prediction import EXPERIMENT, attributed_cost, run
from mmlens.scores.registry import SCORES
from mmlens.scores.score import HeadScore

N_HEADS = 64


@pytest.fixture(scope="module")
def setup(micro: mmlens.HookedVLM) -> Setup:
    return small_setup(micro)


@pytest.fixture(scope="module")
def found(setup: Setup) -> Findings:
    return run(setup, scores=("ram", "vision_mass"), mode="zero", n_per_kind=3, n_groups=8, n_resamples=200)


def test_costs_are_the_plain_model_s(setup: Setup, found: Findings) -> None:
    table = found.tables["heads"][1]
    table = table[(table["score"] == "ram") & (table["metric"] == "logit_difference")].set_index("head")
    examples = [e for e in setup.evaluation if e.evidence and e.id.endswith(("-0", "-1", "-2"))]
    clean = without_heads(setup.model, [], examples)
    assert found.numbers["n_evaluation"] == len(examples)
    for layer, head in ((0, 4), (2, 3)):
        without = without_heads(setup.model, [(layer, head)], examples)
        expected = np.mean([clean[e.id][1] - without[e.id][1] for e in examples])
        assert table.loc[f"L{layer}H{head}", "cost"] == pytest.approx(expected, abs=2e-3)


def test_correlations_are_scipys_of_the_head_table(found: Findings) -> None:
    heads = found.tables["heads"][1]
    assert len(found.numbers["correlations"]) == 4
    for row in found.numbers["correlations"]:
        own = heads[(heads["score"] == row["score"]) & (heads["metric"] == row["metric"])]
        assert len(own) == N_HEADS
        ordered = own["cost"].sort_values(ascending=False).to_numpy()
        if ordered[2] == ordered[3]:
            assert row["top_found"] is None and row["precision"] is None
        if own["cost"].nunique() == 1:
            assert row["rho"] is None
            continue
        result = scipy.stats.spearmanr(own["value"], own["cost"])
        assert row["rho"] == pytest.approx(result.statistic, abs=1e-6)
        assert row["rho_low"] <= row["rho_high"] and 0 < row["p"] <= 1
        if ordered[2] > ordered[3]:
            costliest = set(own.sort_values("cost", ascending=False)["head"][:3])
            highest = set(own.sort_values("rank")["head"][:3])
            assert row["top_found"] == len(costliest & highest)
            assert row["precision"] == pytest.approx(row["top_found"] / 3)
        assert row["n_detected"] == int(own["detected"].sum())


def test_groups_cut_the_whole_ranking_and_cost_what_the_plain_model_loses(
    setup: Setup, found: Findings
) -> None:
    table = found.tables["groups"][1]
    ranked = found.tables["heads"][1]
    ranked = ranked[(ranked["score"] == "ram") & (ranked["metric"] == "accuracy")].sort_values("rank")
    own = table[(table["score"] == "ram") & (table["metric"] == "logit_difference")].set_index("group")
    assert list(own.index) == list(range(1, 9)) and own["heads"].sum() == N_HEADS
    first = [tuple(map(int, name[1:].split("H"))) for name in ranked["head"][:8]]
    examples = [e for e in setup.evaluation if e.evidence and e.id.endswith(("-0", "-1", "-2"))]
    clean, without = without_heads(setup.model, [], examples), without_heads(setup.model, first, examples)
    expected = np.mean([clean[e.id][1] - without[e.id][1] for e in examples])
    assert own.loc[1, "mean"] == pytest.approx(expected, abs=5e-3)
    rho = next(
        r for r in found.numbers["correlations"] if r["score"] == "ram" and r["metric"] == "logit_difference"
    )
    assert rho["rho_groups"] == pytest.approx(
        scipy.stats.spearmanr(-own.index.to_numpy(), own["mean"]).statistic, abs=1e-6
    )


def test_a_score_that_is_the_cost_predicts_it_and_noise_does_not(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The score is the cost on the very examples that judge it: rho 1, every top head found."""
    truth = run(setup, scores=("ram",), mode="zero", n_per_kind=3, n_groups=4, n_resamples=50)
    heads = truth.tables["heads"][1]
    cost = heads[heads["metric"] == "logit_difference"]["cost"].to_numpy()
    rng = np.random.default_rng(0)

    def scored(values: np.ndarray):
        of_heads = torch.tensor(values).reshape(1, 8, 8)
        return HeadScore("planted", lambda model, prompt: of_heads.repeat(len(prompt), 1, 1))

    monkeypatch.setitem(SCORES, "oracle", scored(cost))
    monkeypatch.setitem(SCORES, "noise", scored(rng.permutation(cost)))
    again = run(setup, scores=("oracle", "noise"), mode="zero", n_per_kind=3, n_groups=4, n_resamples=50)
    rows = {r["score"]: r for r in again.numbers["correlations"] if r["metric"] == "logit_difference"}
    # Heads whose cost is rounding alone change places between the two runs.
    assert rows["oracle"]["rho"] > 0.99 and rows["oracle"]["top_found"] == 3
    assert rows["oracle"]["p"] < 0.001 and rows["oracle"]["p_within_layers"] < 0.001
    assert abs(rows["noise"]["rho"]) < 0.4 and rows["noise"]["p"] > 0.01
    assert "oracle: 1.00" in again.statement or "oracle: 0.99" in again.statement


def test_attribution_is_the_slope_towards_the_mean(micro: mmlens.HookedVLM) -> None:
    """A small step of one head's z towards its mean, by a plain hook, one example at a time."""
    examples = mmlens.scene_examples("objects", 3, seed=5)
    found = attributed_cost(micro, examples, batch_size=2, progress=False)
    means = mmlens.mean_activations(micro, examples)
    step = 0.01
    for layer, head in ((0, 4), (3, 1)):
        name = f"blocks.{layer}.attn.hook_z"
        for index, example in enumerate(examples):
            prompt = micro.prompt_examples([example])
            is_image = prompt.token_map.is_image[0]

            def towards(z, hook, head=head, name=name, is_image=is_image):
                target = torch.where(is_image[:, None], means[name][1][head], means[name][0][head])
                z = z.clone()
                z[0, :, head] += step * (target - z[0, :, head])
                return z

            def difference(hooks, prompt=prompt):
                with torch.no_grad():
                    return float(
                        mmlens.logit_difference(micro.run_with_hooks(prompt, fwd_hooks=hooks), prompt)
                    )

            slope = (difference([(name, towards)]) - difference([])) / step
            assert float(found.per_example[index, layer, head]) == pytest.approx(-slope, abs=0.03, rel=0.1)


def test_what_cannot_be_is_refused(setup: Setup) -> None:
    with pytest.raises(ValueError, match="score 'ramm'; the nearest: 'ram'"):
        run(setup, scores=("ramm",))
    with pytest.raises(ValueError, match="n_groups is a number of groups from 3 to the model's 64"):
        run(setup, n_groups=2)
    with pytest.raises(ValueError, match="none of the"):
        run(replace(setup, evaluation=[e for e in setup.evaluation if not e.evidence]), scores=("ram",))


def test_across_lists_every_model_and_score(found: Findings) -> None:
    across = EXPERIMENT.across({"one": found, "two": found})
    table = across.tables["correlations"][1]
    assert set(table["model"]) == {"one", "two"} and set(table["score"]) == {"ram", "vision_mass"}
    assert across.numbers["mean"]["ram"] == pytest.approx(found.numbers["correlations"][0]["rho"])
