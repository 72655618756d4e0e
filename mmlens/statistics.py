"""Intervals for the means of per-example numbers; scipy does the work.

Examples are the sampling unit throughout. Examples that share a document or an image are not independent:
average them first, or the interval is too narrow.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
from torch import Tensor

Values = Sequence[float] | Sequence[int] | np.ndarray | Tensor


@dataclass(frozen=True)
class Interval:
    """A confidence interval [low, high] at `level`; unpacks into (low, high).

    >>> low, high = Interval(0.2, 0.4, level=0.95)
    >>> 0.3 in Interval(low, high, level=0.95)
    True
    """

    low: float
    high: float
    level: float

    def __iter__(self) -> Iterator[float]:
        return iter((self.low, self.high))

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def bootstrap_interval(
    values: Values, *, level: float = 0.95, n_resamples: int = 9999, seed: int = 0, method: str = "BCa"
) -> Interval:
    """Bootstrap interval of the mean (scipy.stats.bootstrap).

    `method` is "BCa" (bias-corrected and accelerated, for skewed outcomes such as logit differences),
    "percentile" or "basic". Where all values are equal no resample differs, the interval has no width and
    a warning says so: for outcomes that are 0 or 1 use `proportion_interval`, which knows what an
    all-correct sample leaves open. Raises ValueError for fewer than 2 values or one that is not finite.
    """
    sample = _sample(values, "a bootstrap interval", at_least=2)
    _check_level(level)
    if np.ptp(sample) == 0:
        warnings.warn(
            f"all {len(sample)} values are {sample[0]:g}: their bootstrap interval has no width and says "
            "nothing about values that were not met",
            stacklevel=2,
        )
        return Interval(float(sample[0]), float(sample[0]), level)
    result = scipy.stats.bootstrap(
        (sample,),
        np.mean,
        confidence_level=level,
        n_resamples=n_resamples,
        batch=1000,
        method=method,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(result.low), float(result.high), level)


def proportion_interval(values: Values, *, level: float = 0.95) -> Interval:
    """Wilson's score interval of the share of ones among values that are 0 or 1; never without width.

    >>> proportion_interval([1] * 20)
    Interval(low=0.8388..., high=1.0, level=0.95)
    """
    sample = _sample(values, "a proportion", at_least=1)
    _check_level(level)
    if not is_binary(sample):
        raise ValueError(f"a proportion is of values that are 0 or 1; got values up to {sample.max():g}")
    result = scipy.stats.binomtest(int(sample.sum()), len(sample))
    interval = result.proportion_ci(confidence_level=level, method="wilson")
    return Interval(float(interval.low), float(interval.high), level)


def mean_interval(values: Values, *, level: float = 0.95, n_resamples: int = 9999, seed: int = 0) -> Interval:
    """Interval of the mean: Wilson's where every value is 0 or 1, the bootstrap's (BCa) otherwise."""
    if is_binary(_sample(values, "an interval of a mean", at_least=1)):
        return proportion_interval(values, level=level)
    return bootstrap_interval(values, level=level, n_resamples=n_resamples, seed=seed)


def paired_difference_interval(
    values: Values, baseline: Values, *, level: float = 0.95, n_resamples: int = 9999, seed: int = 0
) -> Interval:
    """Interval of mean(values - baseline), both measured on the same examples in the same order.

    Where both are 0 or 1 throughout: Newcombe's score interval for paired proportions (Statistics in
    Medicine 17, 1998, method 10), which keeps its width when no pair differs. Otherwise the bootstrap
    (BCa) of the per-example differences. Raises ValueError for different numbers of examples.
    """
    sample = _sample(values, "a paired difference", at_least=1)
    reference = _sample(baseline, "a paired difference", at_least=1)
    _check_level(level)
    if len(sample) != len(reference):
        raise ValueError(f"paired values are of the same examples: got {len(sample)} and {len(reference)}")
    if is_binary(sample) and is_binary(reference):
        return _newcombe(sample, reference, level)
    return bootstrap_interval(sample - reference, level=level, n_resamples=n_resamples, seed=seed)


def is_binary(values: Values) -> bool:
    """Whether every value is 0 or 1."""
    return bool(np.isin(np.asarray(values), (0, 1)).all())


def _newcombe(sample: np.ndarray, reference: np.ndarray, level: float) -> Interval:
    n = len(sample)
    p, q = sample.mean(), reference.mean()
    p_low, p_high = proportion_interval(sample, level=level)
    q_low, q_high = proportion_interval(reference, level=level)
    both = float((sample * reference).sum())
    neither = float(((1 - sample) * (1 - reference)).sum())
    product = both * neither - (sample.sum() - both) * (reference.sum() - both)
    if product > 0:
        product = max(product - n / 2, 0.0)
    spread = n * n * math.sqrt(p * (1 - p) * q * (1 - q))
    phi = product / spread if spread else 0.0

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    difference = float(p - q)
    low = difference - reach(float(p - p_low), float(q_high - q))
    high = difference + reach(float(p_high - p), float(q - q_low))
    return Interval(low, high, level)


def _sample(values: Values, what: str, *, at_least: int) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    sample = array.astype(np.float64)
    if sample.ndim != 1 or len(sample) < at_least:
        raise ValueError(
            f"{what} needs one number for each of at least {at_least} example(s), "
            f"got shape {list(sample.shape)}"
        )
    if not np.isfinite(sample).all():
        raise ValueError(f"{what} needs finite numbers, got {sample[~np.isfinite(sample)][0]}")
    return sample


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is a share between 0 and 1, not {level}")
