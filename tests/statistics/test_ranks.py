"""Rank correlations against scipy, exact counts and simulated truths."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import scipy.stats

from mmlens.statistics import (
    percentile_interval,
    permutation_p,
    rank_correlation,
    rank_correlation_interval,
    split_half_reliability,
    split_halves,
    without_noise,
)


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
            low, high = rank_correlation_interval(rho, draws, n_examples)
            covered.append(low <= expected <= high)
            corrected.append(without_noise(rho, *(split_half_reliability(own, n_splits=30) for own in seen)))
    assert 0.87 <= np.mean(covered) <= 1.0
    assert np.mean(corrected) == pytest.approx(np.mean(truths), abs=0.05)


def test_intervals_are_the_quantiles_about_the_estimate_and_stay_within_one() -> None:
    draws, many = np.linspace(0, 1, 1001), 10**6
    assert rank_correlation_interval(0.5, draws, many) == pytest.approx((0.025, 0.975), abs=1e-3)
    assert rank_correlation_interval(0.7, draws, many) == pytest.approx((0.225, 1.0), abs=1e-3)
    assert np.isnan(rank_correlation_interval(0.5, np.array([np.nan]), many)).all()
    assert np.isnan(rank_correlation_interval(0.5, np.full(9, 0.5), many)).all()
    assert np.isnan(rank_correlation_interval(float("nan"), draws, many)).all()
    assert np.isnan(rank_correlation_interval(0.5, draws, 1)).all()
    assert np.isnan(without_noise(0.5, -0.1, 0.9)) and without_noise(0.9, 0.5, 0.5) == 1.0


def test_intervals_of_few_examples_reach_as_far_as_students_t() -> None:
    """Of draws that are normal: as far as the t interval whose standard error has n - 1 in it."""
    draws = 0.5 + 0.05 * scipy.stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    low, high = rank_correlation_interval(0.5, draws, 12)
    reach = 0.05 * np.sqrt(12 / 11) * scipy.stats.t.ppf(0.975, 11)
    assert (low, high) == pytest.approx((0.5 - reach, 0.5 + reach), abs=1e-3)


def test_reliability_is_that_of_signal_and_noise() -> None:
    rng = np.random.default_rng(3)
    items = rng.normal(size=400)
    noisy = items + 4 * rng.normal(size=(64, 400))
    # Variance 1 of the items, 16/64 of the noise in a mean of 64: reliability .8 (a little less in ranks).
    assert split_half_reliability(noisy) == pytest.approx(0.8, abs=0.06)
    assert np.isnan(split_half_reliability(np.zeros((8, 5))))


def test_split_halves_tell_signal_from_noise() -> None:
    rng = np.random.default_rng(0)
    signal = np.linspace(0, 1, 30) + rng.normal(0, 1e-6, (10, 30))
    assert split_halves(signal, ["a"] * 5 + ["b"] * 5, n_splits=10).min() > 0.999
    noise = split_halves(rng.normal(size=(40, 300)), [""] * 40, n_splits=50)
    # Halves of one sample of noise: each split's correlation is centred at 0.
    assert abs(noise.mean()) < 0.1
    with pytest.raises(ValueError, match="at least 2 examples of every kind"):
        split_halves(signal[:3], ["a", "a", "b"], n_splits=10)


def test_the_interval_covers_what_as_many_examples_give_and_the_middle_of_the_draws_does_not() -> None:
    rng = np.random.default_rng(0)
    n, n_heads, trials = 30, 64, 150
    base = rng.normal(size=n_heads)
    truths = np.exp(0.5 * base), np.exp(0.5 * (0.6 * base + 0.8 * rng.normal(size=n_heads)))
    estimates, intervals, naive = [], [], []
    for _ in range(trials):
        samples = [truth * rng.gamma(1.0, 1.0, (n, n_heads)) for truth in truths]
        draws = [rng.multinomial(n, np.full(n, 1 / n), size=150) @ sample / n for sample in samples]
        estimates.append(float(rank_correlation(*[sample.mean(0) for sample in samples])))
        resampled = rank_correlation(*draws)
        intervals.append(rank_correlation_interval(estimates[-1], resampled, n))
        naive.append(percentile_interval(resampled))
    target = np.mean(estimates)
    covered, naively = (np.mean([low <= target <= high for low, high in each]) for each in (intervals, naive))
    assert 0.88 <= covered <= 0.99 and naively < covered
