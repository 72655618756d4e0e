"""The shared arithmetic of the experiments against scipy, exact counts and simulated truths."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from plain_runs import scenes, small_setup, without_heads

import mmlens
from mmlens.experiments.ablations import (
    ablated,
    all_heads,
    cost_interval,
    costs,
    first_of_kinds,
    first_with_evidence,
    graded_metric,
    head_costs,
    permutation_p,
    rank_correlation,
    recentred_interval,
    references,
    split_half_reliability,
    without_noise,
)
from mmlens.heads import head_name


def test_rank_correlation_is_scipys_with_ties_and_has_none_for_a_constant() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 5, (20, 9)).astype(float), rng.normal(size=(20, 9))
    one[3] = 2.0
    found = rank_correlation(one, other)
    for row in range(20):
        if row == 3:
            assert np.isnan(found[row])
        else:
            assert found[row] == pytest.approx(scipy.stats.spearmanr(one[row], other[row]).statistic)


def test_permutation_p_is_the_exact_share_of_all_orders() -> None:
    one, other = np.array([1.0, 2, 3, 4, 5, 6]), np.array([2.0, 1, 3, 5, 4, 6])
    rho = scipy.stats.spearmanr(one, other).statistic
    null = [scipy.stats.spearmanr(one, order).statistic for order in permutations(other)]
    exact = np.mean(np.abs(null) >= abs(rho) - 1e-9)
    assert permutation_p(one, other, n_permutations=3000) == pytest.approx(exact, abs=0.01)


def test_permutation_within_blocks_finds_nothing_where_only_blocks_differ() -> None:
    """Score and effect rise with the layer and are noise within it: all heads together mislead."""
    rng = np.random.default_rng(1)
    p_all, p_within = [], []
    blocks = np.repeat(np.arange(4), 8)
    for seed in range(30):
        one, other = blocks + 0.3 * rng.normal(size=32), blocks + 0.3 * rng.normal(size=32)
        p_all.append(permutation_p(one, other, n_permutations=300, seed=seed))
        p_within.append(permutation_p(one, other, blocks=blocks, n_permutations=300, seed=seed))
    assert max(p_all) < 0.05
    assert np.mean(np.array(p_within) <= 0.05) < 0.2
    together = rng.normal(size=32)
    assert permutation_p(together + blocks, together - blocks, blocks=blocks, n_permutations=300) < 0.05


def test_interval_covers_the_expected_correlation_and_correction_finds_the_one_without_noise() -> None:
    """Simulated heads with known true scores and effects; both are measured on resampled examples."""
    rng = np.random.default_rng(2)
    n_heads, n_examples, noise, covered, corrected, truths = 40, 60, 2.5, [], [], []
    for _ in range(20):
        scores = rng.normal(size=n_heads)
        effects = 0.7 * scores + 0.7 * rng.normal(size=n_heads)
        error = noise / np.sqrt(n_examples) * rng.normal(size=(2, 1000, n_heads))
        expected = rank_correlation(scores + error[0], effects + error[1]).mean()
        truths.append(float(rank_correlation(scores, effects)))
        for _ in range(3):
            seen = [mean + noise * rng.normal(size=(n_examples, n_heads)) for mean in (scores, effects)]
            counts = (
                rng.multinomial(n_examples, np.full(n_examples, 1 / n_examples), size=(2, 300)) / n_examples
            )
            draws = rank_correlation(counts[0] @ seen[0], counts[1] @ seen[1])
            rho = float(rank_correlation(seen[0].mean(0), seen[1].mean(0)))
            low, high = recentred_interval(rho, draws)
            covered.append(low <= expected <= high)
            corrected.append(without_noise(rho, *(split_half_reliability(own, n_splits=30) for own in seen)))
    assert 0.87 <= np.mean(covered) <= 1.0
    assert np.mean(corrected) == pytest.approx(np.mean(truths), abs=0.05)


def test_intervals_are_the_quantiles_about_the_estimate_and_stay_within_one() -> None:
    draws = np.linspace(0, 1, 1001)
    assert recentred_interval(0.5, draws) == pytest.approx((0.025, 0.975), abs=1e-3)
    assert recentred_interval(0.7, draws) == pytest.approx((0.225, 1.0), abs=1e-3)
    assert np.isnan(recentred_interval(0.5, np.array([np.nan]))).all()
    assert np.isnan(recentred_interval(0.5, np.full(9, 0.5))).all()
    assert np.isnan(recentred_interval(float("nan"), draws)).all()
    assert np.isnan(without_noise(0.5, -0.1, 0.9)) and without_noise(0.9, 0.5, 0.5) == 1.0


def test_reliability_is_that_of_signal_and_noise() -> None:
    rng = np.random.default_rng(3)
    items = rng.normal(size=400)
    noisy = items + 4 * rng.normal(size=(64, 400))
    # Variance 1 of the items, 16/64 of the noise in a mean of 64: reliability .8 (a little less in ranks).
    assert split_half_reliability(noisy) == pytest.approx(0.8, abs=0.06)
    assert np.isnan(split_half_reliability(np.zeros((8, 5))))


def test_single_head_costs_are_those_of_the_plain_model(micro: mmlens.HookedVLM) -> None:
    setup = small_setup(micro)
    heads = all_heads(setup)
    examples = first_with_evidence(setup.evaluation, 2)
    name, metric = graded_metric(examples)
    metrics = {name: metric, "accuracy": mmlens.accuracy}
    sets = {
        head_name(head): heads - heads.__class__([h for h in heads if h != head], **grid(heads))
        for head in heads
    }
    table = ablated(setup, examples, sets, references(setup, ["zero"]), metrics)
    by_head = head_costs(setup, table, name, "zero", heads)
    assert by_head.kinds == tuple(example.kind for example in examples)
    clean = without_heads(micro, [], examples)
    for head in ((0, 4), (0, 5), (7, 7)):
        truth = without_heads(micro, [head], examples)
        for index, example in enumerate(examples):
            expected = clean[example.id][1] - truth[example.id][1]
            assert float(by_head.per_example[index][head]) == pytest.approx(expected, abs=3e-3)
    accuracy = costs(table, "accuracy", "zero")
    assert list(accuracy.index) == [head_name(head) for head in micro.heads] and accuracy.shape[1] == len(
        examples
    )


def grid(heads: mmlens.HeadSet) -> dict[str, object]:
    return {"n_layers": heads.n_layers, "n_heads": heads.n_heads, "heads_per_layer": heads.heads_per_layer}


def test_equal_sets_share_a_run_and_every_name_keeps_its_rows(micro: mmlens.HookedVLM) -> None:
    setup = small_setup(micro)
    one = mmlens.HeadSet([(0, 1), (1, 2)], **grid(all_heads(setup)))
    same = mmlens.HeadSet([(1, 2), (0, 1)], **grid(all_heads(setup)))
    table = ablated(setup, setup.evaluation[:3], {"a": one, "b": same}, references(setup, ["zero", "mean"]),
                    {"accuracy": mmlens.accuracy, "logit_difference": mmlens.logit_difference})  # fmt: skip
    assert len(table) == 2 * 2 * 2 * 3
    for mode in ("zero", "mean"):
        found = costs(table, "logit_difference", mode)
        assert list(found.index) == ["a", "b"]
        np.testing.assert_array_equal(found.loc["a"], found.loc["b"])
    assert not np.allclose(costs(table, "logit_difference", "zero"), costs(table, "logit_difference", "mean"))


def test_a_cost_counts_each_example_once() -> None:
    table = pd.DataFrame(
        {"example": [0, 0, 1, 1], "clean": [1.0, 1, 1, 1], "value": [0.0, 1, 1, 1], "heads": list("abab")}
    )
    mean, low, high = cost_interval(table, 0)
    assert mean == 0.25 and low <= 0.25 <= high


def test_examples_are_cut_by_kind_and_the_metric_follows_the_candidates() -> None:
    examples = scenes(6, 1)
    chosen = first_of_kinds(examples, 2)
    assert {e.id for e in chosen} == {e.id for e in examples if e.id.endswith(("-0", "-1"))}
    assert chosen == sorted(chosen, key=lambda e: (e.kind, len(e.images)))
    assert {e.id for e in first_with_evidence(examples, 2)} == {e.id for e in chosen if e.evidence}
    assert len(first_of_kinds(examples, None)) == len(examples)
    with pytest.raises(ValueError, match="none of the 6 examples has evidence"):
        first_with_evidence([e for e in examples if not e.evidence], None)
    assert graded_metric(chosen)[0] == "logit_difference"
    assert graded_metric([*chosen, mmlens.Example("What?", "x")])[0] == "answer_log_probability"
    with pytest.raises(ValueError, match="at least 2"):
        first_of_kinds(examples, 1)
