"""Intervals of means: agreement with scipy, published figures, brute force and simulation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlens.statistics import (
    Interval,
    basic_interval,
    bootstrap_interval,
    mean_interval,
    paired_difference_interval,
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


def test_the_basic_interval_turns_the_draws_around_the_value() -> None:
    assert basic_interval(1.0, np.array([1.0, 3.0]), level=1.0) == (-1.0, 1.0)
