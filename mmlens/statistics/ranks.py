"""Rank correlations: of scores with scores, and with effects; how sure, and how much of it noise hides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.stats
from jaxtyping import Float

from mmlens.errors import InvalidValueError
from mmlens.statistics.intervals import expanded


def rank_correlation(
    one: Float[np.ndarray, "*rows item"], other: Float[np.ndarray, "*rows item"]
) -> Float[np.ndarray, "*rows"]:
    """Spearman's rho of each row with the same row; NaN where a row is constant.

    >>> rank_correlation(np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 3.0, 2.0]])).tolist()
    [0.5]
    """
    x, y = (scipy.stats.rankdata(values, axis=-1) for values in (one, other))
    x, y = (ranks - ranks.mean(-1, keepdims=True) for ranks in (x, y))
    size = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return np.divide((x * y).sum(-1), size, out=np.full(size.shape, np.nan), where=size > 0)


def rank_correlation_interval(
    rho: float, draws: Float[np.ndarray, " draw"], n: int, level: float = 0.95
) -> tuple[float, float]:
    """Interval of a rank correlation: the quantiles of bootstrap draws of it, moved so that their median is `rho`.

    Noise in the ranks pulls a rank correlation towards 0, and resampled examples are noisier still: plain percentiles
    lie too low. What is covered is the correlation to be expected from as many other examples, noise included;
    `without_noise` is farther from 0. The quantiles are as far out as Student's t of `n` examples asks for
    (Hesterberg 2015, as in `bootstrap_interval`); where the two rankings have different examples, `n` is the smaller
    number. Within -1 and 1; draws that are NaN are left out; (nan, nan) where there is none, all are one number, or `n`
    is below 2.
    """
    draws = draws[np.isfinite(draws)]
    if n < 2 or not len(draws) or not np.isfinite(rho) or np.ptp(draws) == 0:
        return float("nan"), float("nan")
    level = expanded(level, n)
    low, middle, high = np.quantile(draws, [(1 - level) / 2, 0.5, (1 + level) / 2])
    return max(-1.0, float(rho - (middle - low))), min(1.0, float(rho + (high - middle)))


def without_noise(rho: float, one: float, other: float) -> float:
    """A rank correlation with the noise of both rankings taken out: rho / sqrt(one * other), at most 1 in size.

    Spearman's correction for attenuation (American Journal of Psychology 15, 1904), from the `split_half_reliability`
    of both. NaN where one of them is not above 0.

    >>> round(without_noise(0.4, 0.8, 0.8), 2)
    0.5
    """
    if not (one > 0 and other > 0):
        return float("nan")
    return float(np.clip(rho / np.sqrt(one * other), -1, 1))


def permutation_p(
    one: Float[np.ndarray, " item"],
    other: Float[np.ndarray, " item"],
    *,
    blocks: Sequence[int] | np.ndarray | None = None,
    n_permutations: int = 10_000,
    seed: int = 0,
) -> float:
    """Two-sided p-value of Spearman's rho when `other` is dealt to the items at random.

    With `blocks` (layers), only among items of one block: the null that the score says nothing beyond the block. It is
    the mean over blocks that such a null keeps, so |rho - mean of the null| is compared. p is at least
    1 / (n_permutations + 1); NaN where a variable is constant.
    """
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    rng = np.random.default_rng(seed)
    x, y = scipy.stats.rankdata(one), scipy.stats.rankdata(other)
    keys = np.zeros(len(y)) if blocks is None else np.asarray(blocks, dtype=float)
    members = np.argsort(keys, kind="stable")
    dealt = np.empty((n_permutations, len(y)))
    # Sorting by (block, noise) shuffles within blocks.
    dealt[:, members] = y[
        np.lexsort((rng.random((n_permutations, len(y))), np.broadcast_to(keys, dealt.shape)), axis=-1)
    ]
    null = rank_correlation(np.broadcast_to(x, dealt.shape), dealt)
    centre = 0.0 if blocks is None else float(null.mean())
    found = float(rank_correlation(x, y))
    extreme = int((np.abs(null - centre) >= abs(found - centre) - 1e-12).sum())
    return (1 + extreme) / (n_permutations + 1)


def split_halves(
    per_example: Float[np.ndarray, "example item"], groups: Sequence[str], *, n_splits: int, seed: int = 0
) -> Float[np.ndarray, " split"]:
    """Spearman's rho between the sums of two random halves of the examples, for each of `n_splits`.

    Examples of one group (a kind of task) are halved apart. Raises ValueError for a group of fewer than 2.
    """
    rng = np.random.default_rng(seed)
    names = np.array(groups)
    members = [np.flatnonzero(names == name) for name in sorted(set(groups))]
    if min(map(len, members)) < 2:
        raise InvalidValueError("split halves need at least 2 examples of every kind")
    halves = np.zeros((2, n_splits, per_example.shape[1]))
    for split in range(n_splits):
        for group in members:
            order, half = rng.permutation(group), len(group) // 2
            halves[0, split] += per_example[order[:half]].sum(0)
            halves[1, split] += per_example[order[half : 2 * half]].sum(0)
    return rank_correlation(halves[0], halves[1])


def stepped_up(rho: float) -> float:
    """Reliability of all examples from that of halves, 2 rho / (1 + rho) (Spearman-Brown); NaN where there is none.

    >>> round(stepped_up(0.6), 2)
    0.75
    """
    return 2 * rho / (1 + rho) if rho > -1 else float("nan")


def split_half_reliability(
    per_example: Float[np.ndarray, "example item"], *, n_splits: int = 200, seed: int = 0
) -> float:
    """How well the examples determine the ranking of the items: Spearman between halves, stepped up to all examples.

    Mean over random halves of the examples of rho, then 2 rho / (1 + rho) (Spearman-Brown); NaN where it is undefined.
    No score can be expected to correlate with the measured ranking by much more than the root of this.
    """
    rng = np.random.default_rng(seed)
    n = len(per_example)
    if n < 2:
        return float("nan")
    halves = np.argsort(rng.random((n_splits, n)), axis=-1)
    first, second = (
        per_example[part].mean(1) for part in (halves[:, : n // 2], halves[:, n // 2 : 2 * (n // 2)])
    )
    found = rank_correlation(first, second)
    rho = float(found[np.isfinite(found)].mean()) if np.isfinite(found).any() else float("nan")
    return stepped_up(rho)
