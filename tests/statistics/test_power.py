"""Power against published sample sizes and simulation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from mmlens.statistics import (
    minimal_detectable_change,
    minimal_detectable_effect,
)


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
