"""P-values against brute force, scipy and simulation, and their correction against its definition."""

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
    benjamini_hochberg,
    minimal_detectable_change,
    minimal_detectable_effect,
    paired_permutation_test,
)


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
