"""Where there is nothing, the tests find nothing: random weights, shuffled evidence, shuffled answers.

Answers and evidence are drawn without a look at the model, so that every null hypothesis holds exactly. Before
correction about 5% of the heads may be called significant; after it, in at most 5% of the seeds any.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats
import torch
from planted import Planted, planted_model
from truth import noise_p_values

from mmlens.scores.significance import RamSignificance, ram_significance, region_permutation_test
from mmlens.statistics import benjamini_hochberg, paired_permutation_test

LEVEL = 0.05


def assert_nothing_found(p_values: Sequence[np.ndarray]) -> None:
    """p_values: one array of all heads for each seed; seeds are independent, heads of one model are not."""
    found = [bool((benjamini_hochberg(p) <= LEVEL).any()) for p in p_values]
    # The bound on seeds with a false discovery, as often as 1 run in 1000 would break it by chance.
    assert sum(found) <= scipy.stats.binom.ppf(0.999, len(found), LEVEL)
    shares = np.array([(p <= LEVEL).mean() for p in p_values])
    error = shares.std(ddof=1) / np.sqrt(len(shares))
    assert shares.mean() <= LEVEL + 3.5 * error
    # A test that never calls anything significant would pass the above.
    assert shares.mean() >= 0.5 * LEVEL - 3.5 * error


@pytest.mark.slow
@pytest.mark.minutes
def test_random_models_have_no_significant_heads() -> None:
    of_seeds = [noise_p_values("llava", seed) for seed in range(200)]
    assert_nothing_found([p["RAM"] for p in of_seeds])
    assert_nothing_found([p["ablation"] for p in of_seeds])


# ---------------------------------------------------------------------- shuffled evidence, of models that do retrieve


@functools.cache
def retrieving() -> tuple[Planted, RamSignificance]:
    case = planted_model("llava")
    return case, ram_significance(case.model, case.examples(16, seed=5), progress=False)


def shuffled(found: RamSignificance, rng: np.random.Generator) -> list[torch.Tensor]:
    """The same regions, any of them as the evidence."""
    masses = []
    for own in found.masses:
        order = np.roll(np.arange(len(own)), -rng.integers(len(own)))
        masses.append(own[order].flatten(1))
    return masses


def test_shuffled_evidence_of_a_model_that_retrieves() -> None:
    case, found = retrieving()
    assert set(case.named("matching", "reader")) <= set(found.significant())
    rng = np.random.default_rng(0)
    p_values = [
        region_permutation_test(shuffled(found, rng), n_resamples=999, seed=seed) for seed in range(200)
    ]
    assert_nothing_found(p_values)


def test_regions_without_a_difference() -> None:
    """64 heads of skewed masses, dependent between heads, 12 regions of 20 examples."""
    rng = np.random.default_rng(1)
    p_values = []
    for seed in range(200):
        shared = rng.gamma(0.3, size=(20, 12, 1))
        masses = torch.from_numpy(shared * rng.gamma(0.5, size=(20, 12, 64)))
        p_values.append(region_permutation_test(list(masses), n_resamples=1999, seed=seed))
    assert_nothing_found(p_values)


def test_the_paired_test_of_shuffled_answers_is_exact_for_any_distribution() -> None:
    """Sizes of one head's effects are heavy-tailed, and common to all heads; signs are tosses of a coin."""
    rng = np.random.default_rng(2)
    p_values = []
    for _ in range(200):
        signs = rng.choice([-1.0, 1.0], size=9)
        sizes = rng.standard_t(2, size=(8, 9)) + 2
        p_values.append(np.array([paired_permutation_test(own * signs, np.zeros(9)) for own in sizes]))
    assert_nothing_found(p_values)
