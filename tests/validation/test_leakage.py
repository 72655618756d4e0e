"""Heads chosen and judged on the same examples: refused, unless forced, and how good heads of no effect then look."""

from __future__ import annotations

import dataclasses
import functools
import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.integrate
import scipy.stats
import torch
from planted import Planted, planted_model
from truth import optimism

import mmlens
from mmlens.statistics import paired_permutation_test

SETTINGS = {"counts": [1], "modes": ["zero"], "n_draws": 1, "progress": False}


@functools.cache
def planted() -> Planted:
    return planted_model("llava")


def test_shared_examples_and_groups_are_refused() -> None:
    case = planted()
    one, other = case.examples(4, seed=0), case.examples(4, seed=1)
    with pytest.raises(
        ValueError, match=r"share 4 example\(s\).*look better than they are.*force_overlap=True"
    ):
        mmlens.core_heads(case.model, one, one, **SETTINGS)
    pages = [
        [dataclasses.replace(e, group=f"document {i}") for i, e in enumerate(own)] for own in (one, other)
    ]
    with pytest.raises(ValueError, match="share 4 example.*document 0"):
        mmlens.core_heads(case.model, *pages, **SETTINGS)
    anonymous = [dataclasses.replace(e, id="") for e in one]
    with pytest.raises(ValueError, match="share 1 example"):
        mmlens.core_heads(case.model, anonymous, anonymous[:1], **SETTINGS)


def test_forced_overlap_warns_and_is_told_in_the_finding() -> None:
    case = planted()
    one, other = case.examples(4, seed=0), case.examples(4, seed=1)
    for judged, forced in ((one, True), (other, False)):
        # Two heads of this model tie in their scores, which is warned of as well.
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = mmlens.core_heads(case.model, one, judged, force_overlap=True, **SETTINGS)
        assert any("share 4 example" in str(warning.message) for warning in caught) == forced
        told = "share 4 example(s) or group(s), by force" in found.summary["finding"]["statement"]
        assert told == forced


def test_the_best_of_64_heads_of_no_effect() -> None:
    """The best one's mean on its own examples is that of the largest of 64 normal numbers; on others it is 0."""
    rng = np.random.default_rng(0)
    n, n_heads, rows = 9, 64, []
    for _ in range(200):
        first, second = (mmlens.HeadScores(torch.from_numpy(rng.normal(size=(n, 8, 8)))) for _ in range(2))
        (best,) = first.top(1)
        p_values = [
            paired_permutation_test(own.per_example[:, *best], np.zeros(n)) for own in (first, second)
        ]
        rows.append((first.values[best], second.values[best], *p_values))
    same, others, p_same, p_others = np.array(rows).T

    def largest(x: float) -> float:
        return x * n_heads * scipy.stats.norm.pdf(x) * scipy.stats.norm.cdf(x) ** (n_heads - 1)

    expected = scipy.integrate.quad(largest, -10, 10)[0] / np.sqrt(n)
    assert same.mean() == pytest.approx(expected, abs=4 * same.std() / np.sqrt(200))
    assert abs(others.mean()) < 4 * others.std() / np.sqrt(200)
    assert (p_same <= 0.05).mean() > 0.35
    assert (p_others <= 0.05).sum() <= scipy.stats.binom.ppf(0.999, 200, 0.05)


@pytest.mark.slow
def test_random_models_look_good_where_they_were_chosen() -> None:
    found = pd.concat([optimism("llava", seed, n=10) for seed in range(16)])
    for _, own in found.groupby("measure"):
        same, others = own["on_same"], own["on_others"]
        assert same.mean() > 4 * scipy.stats.sem(same)
        assert abs(others.mean()) < 4 * scipy.stats.sem(others)
