"""Is there a change at all, and which of many heads changed: p-values, and their correction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import scipy.stats
from jaxtyping import Float
from torch import Tensor

from mmlens.arguments import array_of, one_of, seed_of, whole_number
from mmlens.errors import InvalidValueError
from mmlens.statistics.samples import Values, pairs_of

Alternative = Literal["two-sided", "less", "greater"]


def paired_permutation_test(
    values: Values,
    baseline: Values,
    *,
    alternative: Alternative = "two-sided",
    n_resamples: int = 9999,
    seed: int = 0,
) -> float:
    """P-value of mean(values - baseline) under sign flips of the per-example differences (Fisher's test).

    The null hypothesis: an example's two numbers could as well be exchanged. "less" and "greater" test whether
    `values` are lower or higher. Only examples that differ count. It is exact where at most log2(n_resamples) of
    them do (13 by default; all sign flips are counted, by scipy.stats.permutation_test), and where the differences
    all have one size, as those of outcomes that are 0 or 1 have (McNemar's exact test, by scipy.stats.binomtest).
    Otherwise `n_resamples` flips are drawn, and no p-value is below 2 / (n_resamples + 1), two-sided; with many
    heads to test, `benjamini_hochberg` at q may need n_resamples > 2 heads / q.

    Raises ValueError for different numbers of examples, none, or a number that is not finite.

    >>> paired_permutation_test([1.0, 2.0, 3.0, 5.0, 8.0], [0.0] * 5)  # 2 of 2^5 signs
    0.0625
    """
    sample, reference = pairs_of(values, baseline, "a paired test", at_least=1)
    one_of("alternative", alternative, get_args(Alternative))
    n_resamples, seed = whole_number("n_resamples", n_resamples, least=1), seed_of(seed)
    differences = sample - reference
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    if np.ptp(np.abs(differences)) == 0:
        n_higher = int((differences > 0).sum())
        return float(scipy.stats.binomtest(n_higher, len(differences), alternative=alternative).pvalue)
    return float(
        scipy.stats.permutation_test(
            (differences,),
            np.sum,
            permutation_type="samples",
            vectorized=True,
            n_resamples=n_resamples,
            batch=1000,
            alternative=alternative,
            rng=np.random.default_rng(seed),
        ).pvalue
    )


def benjamini_hochberg(
    p_values: Float[Tensor, "*shape"] | Float[np.ndarray, "*shape"] | Sequence[float],
) -> Float[np.ndarray, "*shape"]:
    """P-values adjusted for the false discovery rate, in the same shape (scipy.stats.false_discovery_control).

    Benjamini and Hochberg 1995: calling what is at most q a discovery keeps the expected share of false ones among
    them at q or below, for tests that are independent or positively dependent. Hand over every head that was
    tested, not those that look best. NaN is a head that does not exist: it stays NaN and does not count as a test.

    Raises ValueError for numbers outside 0 to 1, and where there is no number.

    >>> benjamini_hochberg([0.01, 0.02, float("nan"), 0.5]).tolist()
    [0.03, 0.03, nan, 0.5]
    """
    adjusted = array_of("p_values", p_values, None).copy()
    tested = ~np.isnan(adjusted)
    if not tested.any():
        raise InvalidValueError(f"no p-value given: {adjusted.size} number(s), none but NaN")
    outside = tested & ~((adjusted >= 0) & (adjusted <= 1))
    if outside.any():
        raise InvalidValueError(f"p-values lie between 0 and 1, got {adjusted[outside][0]:g}")
    adjusted[tested] = scipy.stats.false_discovery_control(adjusted[tested], method="bh")
    return adjusted
