"""Intervals, tests and power: agreement with scipy, published figures, brute force and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlens.statistics import (
    Interval,
    basic_interval,
    benjamini_hochberg,
    bootstrap_interval,
    mean_interval,
    minimal_detectable_change,
    minimal_detectable_effect,
    paired_difference_interval,
    paired_permutation_test,
    proportion_interval,
    ratio_interval,
)


def test_bootstrap_is_close_to_student_t_on_normal_data() -> None:
    sample = np.random.default_rng(0).normal(2.0, 1.0, size=200)
    low, high = bootstrap_interval(sample)
    expected = scipy.stats.t.interval(0.95, 199, loc=sample.mean(), scale=scipy.stats.sem(sample))
    assert (low, high) == pytest.approx(expected, abs=0.02)


def test_bootstrap_covers_the_mean_of_skewed_data_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = [1.0 in bootstrap_interval(rng.exponential(size=50), n_resamples=400) for _ in range(200)]
    # The BCa interval of 50 exponential draws covers a little under 95%; 200 trials have a spread of 1.7%.
    assert 0.88 <= np.mean(covered) <= 0.99


def test_paired_proportions_agree_with_newcombe_1998() -> None:
    """Table III of Statistics in Medicine 17:2635, cells 36, 12, 2, 0, method 10."""
    values = [1] * 48 + [0] * 2
    baseline = [1] * 36 + [0] * 12 + [1] * 2
    low, high = paired_difference_interval(values, baseline)
    assert (low, high) == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_paired_proportions_with_a_positive_association() -> None:
    """Cells 20, 12, 2, 16, worked from the four counts: phi's numerator is lowered by n / 2 where positive."""
    values = [1] * 32 + [0] * 18
    baseline = [1] * 20 + [0] * 12 + [1] * 2 + [0] * 16
    z = scipy.stats.norm.ppf(0.975)

    def wilson(k: int, n: int = 50) -> tuple[float, float]:
        middle, half = (k + z * z / 2) / (n + z * z), z / (n + z * z) * (k * (n - k) / n + z * z / 4) ** 0.5
        return middle - half, middle + half

    phi = (20 * 16 - 12 * 2 - 25) / (32 * 18 * 22 * 28) ** 0.5
    (low1, high1), (low2, high2) = wilson(32), wilson(22)
    a, b = 0.64 - low1, high2 - 0.44
    c, d = high1 - 0.64, 0.44 - low2
    expected = (
        0.2 - (a * a - 2 * phi * a * b + b * b) ** 0.5,
        0.2 + (c * c - 2 * phi * c * d + d * d) ** 0.5,
    )
    assert tuple(paired_difference_interval(values, baseline)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("p_both", "p_first", "p_second"), [(0.6, 0.3, 0.05), (0.85, 0.05, 0.05)])
def test_paired_proportions_cover_the_true_difference(p_both: float, p_first: float, p_second: float) -> None:
    rng = np.random.default_rng(2)
    cells = np.array([[1, 1], [1, 0], [0, 1], [0, 0]])
    share = [p_both, p_first, p_second, 1 - p_both - p_first - p_second]
    covered = []
    for _ in range(400):
        pairs = cells[rng.choice(4, size=60, p=share)]
        covered.append(p_first - p_second in paired_difference_interval(pairs[:, 0], pairs[:, 1]))
    assert np.mean(covered) >= 0.92


@settings(deadline=None)
@given(st.integers(1, 300), st.booleans())
def test_samples_without_spread_keep_a_width(n: int, right: bool) -> None:
    low, high = mean_interval(np.full(n, float(right)))
    assert high - low > 0
    assert float(right) in Interval(low, high, 0.95)
    low, high = paired_difference_interval(np.full(n, float(right)), np.full(n, float(right)))
    assert low < 0 < high
    assert low == pytest.approx(-high)


def test_no_spread_in_other_numbers_warns() -> None:
    with pytest.warns(UserWarning, match="no width"):
        assert tuple(bootstrap_interval([2.5, 2.5, 2.5])) == (2.5, 2.5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=3, max_size=20), st.integers(0, 100))
def test_paired_difference_of_numbers_is_the_bootstrap_of_the_differences(
    numbers: list[float], seed: int
) -> None:
    noise = np.random.default_rng(seed).normal(size=len(numbers))
    paired = paired_difference_interval(np.array(numbers) + noise, numbers, n_resamples=200, seed=seed)
    assert tuple(paired) == pytest.approx(
        tuple(bootstrap_interval(np.array(numbers) + noise - numbers, n_resamples=200, seed=seed))
    )


def test_seed_level_and_tensors() -> None:
    sample = torch.randn(40, generator=torch.manual_seed(0))
    assert bootstrap_interval(sample, seed=3) == bootstrap_interval(sample.numpy(), seed=3)
    assert bootstrap_interval(sample, seed=3) != bootstrap_interval(sample, seed=4)
    wide, narrow = bootstrap_interval(sample, level=0.99), bootstrap_interval(sample, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high
    assert wide.level == 0.99


def test_bad_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        bootstrap_interval([1.5])
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval([1.0, np.inf])
    with pytest.raises(ValueError, match="0 or 1"):
        proportion_interval([0.5, 1.0])
    with pytest.raises(ValueError, match="got 2 and 3"):
        paired_difference_interval([1, 0], [1, 0, 1])
    with pytest.raises(ValueError, match="level"):
        proportion_interval([1, 0], level=95)
    with pytest.raises(ValueError, match="shape"):
        proportion_interval(np.ones((2, 2)))


# ---------------------------------------------------------------------- ratios


def test_a_ratio_interval_equals_a_percentile_bootstrap_by_loops_on_plenty_of_data() -> None:
    rng = np.random.default_rng(3)
    below = rng.normal(4, 1, size=400)
    above = 0.6 * below + rng.normal(0, 0.8, size=400)
    low, high = ratio_interval(above, below)
    ratios = []
    for _ in range(4000):
        drawn = rng.integers(400, size=400)
        ratios.append(above[drawn].sum() / below[drawn].sum())
    assert (low, high) == pytest.approx(tuple(np.quantile(ratios, [0.025, 0.975])), abs=0.004)


def test_a_ratio_interval_covers_the_true_ratio() -> None:
    rng = np.random.default_rng(4)
    covered = []
    for _ in range(200):
        below = rng.exponential(2.0, size=60) + 0.5
        above = 0.3 * below + rng.exponential(0.5, size=60)
        covered.append((0.3 * 2.5 + 0.5) / 2.5 in ratio_interval(above, below, n_resamples=400))
    assert 0.89 <= np.mean(covered) <= 0.99


def test_ratios_that_are_hardly_determined_warn() -> None:
    with pytest.warns(UserWarning, match="not told from zero"):
        interval = ratio_interval([1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0])
    assert (interval.low, interval.high) == (-np.inf, np.inf)
    with pytest.warns(UserWarning, match="same ratio 0.5"):
        assert tuple(ratio_interval([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])) == (0.5, 0.5)
    with pytest.raises(ValueError, match="mean is not zero"):
        ratio_interval([1.0, 2.0], [1.0, -1.0])
    with pytest.raises(ValueError, match="got 2 and 3"):
        ratio_interval([1.0, 2.0], [1.0, 2.0, 3.0])


# ---------------------------------------------------------------------- tests


def all_sign_flips(differences: np.ndarray, alternative: str) -> float:
    """The p-value by its definition: the share of all sign patterns at least as extreme."""
    observed = differences.sum()
    sums = np.array(
        [np.dot(signs, np.abs(differences)) for signs in itertools.product([-1, 1], repeat=len(differences))]
    )
    higher, lower = np.mean(sums >= observed - 1e-9), np.mean(sums <= observed + 1e-9)
    return {"greater": higher, "less": lower, "two-sided": min(1.0, 2 * min(higher, lower))}[alternative]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=8), st.sampled_from(["two-sided", "less", "greater"])
)
def test_the_permutation_test_is_exact_for_few_examples(differences: list[int], alternative: str) -> None:
    baseline = np.arange(len(differences)) / 2
    p_value = paired_permutation_test(baseline + differences, baseline, alternative=alternative)  # type: ignore[arg-type]
    assert p_value == pytest.approx(all_sign_flips(np.array(differences, dtype=float), alternative))


def test_the_permutation_test_of_many_examples() -> None:
    rng = np.random.default_rng(5)
    baseline = rng.normal(size=80)
    values = baseline + rng.normal(0.25, 1.0, size=80)
    p_value = paired_permutation_test(values, baseline, n_resamples=20_000)
    assert p_value == pytest.approx(scipy.stats.ttest_rel(values, baseline).pvalue, abs=0.01)
    assert p_value == paired_permutation_test(values, baseline, n_resamples=20_000)
    assert paired_permutation_test(values + 5, baseline, n_resamples=999) == pytest.approx(2 / 1000)


def test_outcomes_of_0_and_1_get_mcnemars_exact_test() -> None:
    values = [1] * 9 + [0] * 2 + [1] * 30 + [0] * 20
    baseline = [0] * 9 + [1] * 2 + [1] * 30 + [0] * 20
    expected = 2 * sum(math.comb(11, k) for k in range(3)) / 2**11
    assert paired_permutation_test(values, baseline) == pytest.approx(expected)
    # Far below what drawn permutations can reach, since it is exact.
    assert paired_permutation_test([1] * 100, [0] * 100) == pytest.approx(2 / 2.0**100)
    assert paired_permutation_test([1, 0, 1], [1, 0, 1]) == 1.0


def test_the_permutation_test_keeps_its_level() -> None:
    rng = np.random.default_rng(6)
    found = [paired_permutation_test(rng.standard_t(3, size=9), np.zeros(9)) <= 0.05 for _ in range(300)]
    assert np.mean(found) <= 0.09


def test_benjamini_hochberg_on_the_papers_example() -> None:
    """Benjamini and Hochberg 1995, section 4: 15 p-values, of which the first four are discoveries at .05."""
    p_values = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459]
    p_values += [0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0000]
    adjusted = benjamini_hochberg(p_values)
    assert (adjusted <= 0.05).tolist() == [True] * 4 + [False] * 11
    assert adjusted[3] == pytest.approx(0.0095 * 15 / 4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1) | st.just(float("nan")), min_size=6, max_size=6))
def test_benjamini_hochberg_by_its_definition_with_absent_heads(numbers: list[float]) -> None:
    grid = torch.tensor(numbers, dtype=torch.float64).reshape(2, 3)
    known = sorted(number for number in numbers if number == number)
    if not known:
        with pytest.raises(ValueError, match="none but NaN"):
            benjamini_hochberg(grid)
        return
    adjusted = benjamini_hochberg(grid)
    assert adjusted.shape == (2, 3)
    for number, found in zip(numbers, adjusted.flatten(), strict=True):
        if number != number:
            assert np.isnan(found)
        else:
            ranks = [rank for rank, other in enumerate(known, start=1) if other >= number]
            expected = min(len(known) * known[rank - 1] / rank for rank in ranks)
            assert found == pytest.approx(min(expected, 1.0))
    assert grid.isnan().flatten().tolist() == [number != number for number in numbers]


# ---------------------------------------------------------------------- power


@pytest.mark.parametrize(("effect_size", "n"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_the_minimal_detectable_effect_agrees_with_published_sample_sizes(effect_size: float, n: int) -> None:
    """G*Power's sample sizes for a two-sided paired t-test, power .8, alpha .05: 199, 34 and 15."""
    assert minimal_detectable_effect(n, 3.0) <= 3 * effect_size < minimal_detectable_effect(n - 1, 3.0)


@pytest.mark.parametrize(("n", "alpha", "power"), [(12, 0.05, 0.8), (40, 0.001, 0.9)])
def test_the_minimal_detectable_effect_has_its_power_in_simulation(
    n: int, alpha: float, power: float
) -> None:
    shift = minimal_detectable_effect(n, 2.0, power=power, alpha=alpha)
    draws = np.random.default_rng(7).normal(shift, 2.0, size=(4000, n))
    assert np.mean(scipy.stats.ttest_1samp(draws, 0, axis=1).pvalue <= alpha) == pytest.approx(
        power, abs=0.025
    )


def test_the_minimal_detectable_change_has_its_power_in_simulation() -> None:
    """McNemar's statistic (b - c)^2 / (b + c) on draws with the change that the formula names."""
    n, discordant = 300, 0.25
    change = minimal_detectable_change(n, discordant)
    rng = np.random.default_rng(8)
    better, worse = (discordant + change) / 2, (discordant - change) / 2
    counts = rng.multinomial(n, [better, worse, 1 - discordant], size=4000)
    statistic = (counts[:, 0] - counts[:, 1]) ** 2 / (counts[:, 0] + counts[:, 1])
    assert np.mean(statistic >= scipy.stats.chi2.isf(0.05, 1)) == pytest.approx(0.8, abs=0.025)
    # Connor's formula, solved for n.
    z_alpha, z_power = scipy.stats.norm.ppf([0.975, 0.8])
    needed = ((z_alpha * discordant**0.5 + z_power * (discordant - change**2) ** 0.5) / change) ** 2
    assert needed == pytest.approx(n)


def test_bad_tests_are_refused() -> None:
    cases = [
        (lambda: paired_permutation_test([1.0], [1.0, 2.0]), "got 1 and 2"),
        (lambda: paired_permutation_test([1.0, np.nan], [1.0, 2.0]), "finite"),
        (lambda: paired_permutation_test([1.0], [2.0], n_resamples=0), "n_resamples is 0; expected"),
        (lambda: benjamini_hochberg([0.5, 1.5]), "between 0 and 1, got 1.5"),
        (lambda: benjamini_hochberg([]), "no p-value given"),
        (lambda: minimal_detectable_effect(1, 1.0), "n is 1; expected"),
        (lambda: minimal_detectable_effect(10, 0.0), "sd is 0.0; expected"),
        (lambda: minimal_detectable_effect(10, 1.0, power=0.01), "power is a number that lies between"),
        (lambda: minimal_detectable_effect(10, 1.0, alpha=5.0), "alpha"),
        (lambda: minimal_detectable_change(50, 1.5), "discordant is 1.5; expected"),
        (lambda: minimal_detectable_change(20, 0.1), "20 examples of which 0.1 differ cannot show"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_the_basic_interval_turns_the_draws_around_the_value() -> None:
    assert basic_interval(1.0, np.array([1.0, 3.0]), level=1.0) == (-1.0, 1.0)
