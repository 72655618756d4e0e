"""Intervals of means, differences and ratios of per-example numbers; scipy does the work."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.stats

from mmlens.arguments import array_of, number, one_of, seed_of, whole_number
from mmlens.errors import InvalidValueError
from mmlens.statistics.samples import Values, pairs_of, sample_of


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


_METHODS = ("BCa", "percentile", "basic")


def bootstrap_interval(
    values: Values, *, level: float = 0.95, n_resamples: int = 9999, seed: int = 0, method: str = "BCa"
) -> Interval:
    """Bootstrap interval of the mean (scipy.stats.bootstrap).

    `method` is "BCa" (bias-corrected and accelerated, for skewed outcomes such as logit differences),
    "percentile" or "basic". Where all values are equal no resample differs, the interval has no width and
    a warning says so: for outcomes that are 0 or 1 use `proportion_interval`, which knows what an
    all-correct sample leaves open. Quantiles are taken further out for few values (Hesterberg 2015's expanded
    intervals: at 95%, 0.0188 instead of 0.025 for 30 values). docs/truth.md says how often the intervals hold the
    truth: less than they say where few values are very skewed. Raises ValueError for fewer than 2 values or one that
    is not finite.
    """
    sample = sample_of(values, "a bootstrap interval", at_least=2)
    _check_resampling(level, n_resamples, seed)
    one_of("method", method, _METHODS)
    if np.ptp(sample) == 0:
        warnings.warn(
            f"all {len(sample)} values are {sample[0]:g}: their bootstrap interval has no width and says "
            "nothing about values that were not met",
            stacklevel=2,
        )
        return Interval(float(sample[0]), float(sample[0]), level)
    return _bootstrap((sample,), np.mean, level, n_resamples, seed, method)


def proportion_interval(values: Values, *, level: float = 0.95) -> Interval:
    """Wilson's score interval of the share of ones among values that are 0 or 1; never without width.

    >>> proportion_interval([1] * 20)
    Interval(low=0.8388..., high=1.0, level=0.95)
    """
    sample = sample_of(values, "a proportion", at_least=1)
    number("level", level, above=0, below=1)
    if not is_binary(sample):
        raise InvalidValueError(
            f"a proportion is of values that are 0 or 1; got values up to {sample.max():g}"
        )
    result = scipy.stats.binomtest(int(sample.sum()), len(sample))
    interval = result.proportion_ci(confidence_level=level, method="wilson")
    return Interval(float(interval.low), float(interval.high), level)


def mean_interval(values: Values, *, level: float = 0.95, n_resamples: int = 9999, seed: int = 0) -> Interval:
    """Interval of the mean: Wilson's where every value is 0 or 1, the bootstrap's (BCa) otherwise."""
    _check_resampling(level, n_resamples, seed)
    if is_binary(sample_of(values, "an interval of a mean", at_least=1)):
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
    sample, reference = pairs_of(values, baseline, "a paired difference", at_least=1)
    _check_resampling(level, n_resamples, seed)
    if is_binary(sample) and is_binary(reference):
        return _newcombe(sample, reference, level)
    return bootstrap_interval(sample - reference, level=level, n_resamples=n_resamples, seed=seed)


def ratio_interval(
    numerator: Values,
    denominator: Values,
    *,
    level: float = 0.95,
    n_resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval (BCa) of mean(numerator) / mean(denominator), both of the same examples in the same order.

    Examples are drawn with both of their numbers. Warns where mean(denominator) lies within about two of its
    standard errors of zero: the ratio is then hardly determined, and the interval is (-inf, inf) where some draw
    has a denominator of zero at a bound. Warns likewise where every example has the same ratio, so that the
    interval has no width. Raises ValueError for different numbers of examples, fewer than 2, a number that is not
    finite, or a mean denominator of zero.

    >>> low, high = ratio_interval([1.0, 2.0, 3.5, 3.0], [2.0, 4.0, 6.0, 7.0])
    >>> 0.4 < low < 0.5 < high < 0.6
    True
    """
    above, below = pairs_of(numerator, denominator, "a ratio of means", at_least=2)
    _check_resampling(level, n_resamples, seed)
    if below.mean() == 0:
        raise InvalidValueError("a ratio of means needs a denominator whose mean is not zero")
    ratio = float(above.mean() / below.mean())
    reach = scipy.stats.norm.ppf(0.5 + level / 2) * below.std(ddof=1) / math.sqrt(len(below))
    if abs(below.mean()) <= reach:
        warnings.warn(
            f"the denominator's mean {below.mean():.4g} is not told from zero ({len(below)} examples, about "
            f"+- {reach:.4g} at level {level:g}): the ratio {ratio:.4g} is hardly determined",
            stacklevel=2,
        )
    if np.abs(above - ratio * below).max() <= 1e-9 * max(np.abs(above).max(), np.abs(ratio * below).max()):
        warnings.warn(
            f"all {len(above)} examples have the same ratio {ratio:g}: its bootstrap interval has no width and says "
            "nothing about values that were not met",
            stacklevel=2,
        )
        return Interval(ratio, ratio, level)

    def statistic(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(x.mean(axis) / y.mean(axis))

    # A draw of equal examples can have a denominator of zero; where that reaches a bound, the bound is not finite.
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        interval = _bootstrap((above, below), statistic, level, n_resamples, seed)
    return interval if np.isfinite([*interval]).all() else Interval(-math.inf, math.inf, level)


def is_binary(values: Values) -> bool:
    """Whether every value is 0 or 1."""
    return bool(np.isin(array_of("values", values, None), (0, 1)).all())


# ---------------------------------------------------------------------- as tables and experiments write them


TABLE_RESAMPLES = 2000


def interval_of(values: np.ndarray, seed: int) -> tuple[float, float]:
    """95% interval of a mean, as in every table; no width for one value, or where all are alike and not 0 or 1."""
    if len(values) < 2 or (np.ptp(values) == 0 and values[0] not in (0, 1)):
        return float(values.mean()), float(values.mean())
    low, high = mean_interval(values, n_resamples=TABLE_RESAMPLES, seed=seed)
    return low, high


def difference_interval_of(values: np.ndarray, before: np.ndarray, seed: int) -> tuple[float, float]:
    """95% interval of the mean of `values - before` on the same examples, with the same exceptions."""
    difference = values - before
    if len(values) < 2 or (np.ptp(difference) == 0 and not set(values) <= {0.0, 1.0}):
        return float(difference.mean()), float(difference.mean())
    low, high = paired_difference_interval(values, before, n_resamples=TABLE_RESAMPLES, seed=seed)
    return low, high


def percentile_interval(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of a bootstrap's draws: where resamples put a number, whatever their bias."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def basic_interval(value: float, draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The basic bootstrap's interval, 2 value - quantiles: for numbers that noise in the scores shifts to one side.

    >>> low, high = basic_interval(1.0, np.linspace(1.0, 2.0, 101))
    >>> round(low, 3), round(high, 3)
    (0.025, 0.975)
    """
    low, high = percentile_interval(draws, level)
    return 2 * value - high, 2 * value - low


# ---------------------------------------------------------------------- inside


def _bootstrap(
    samples: tuple[np.ndarray, ...],
    statistic: Callable[..., np.ndarray],
    level: float,
    n_resamples: int,
    seed: int,
    method: str = "BCa",
) -> Interval:
    """Of a statistic of one sample, or of several whose values are of the same examples."""
    result = scipy.stats.bootstrap(
        samples,
        statistic,
        paired=len(samples) > 1,
        vectorized=True,
        confidence_level=expanded(level, len(samples[0])),
        n_resamples=n_resamples,
        batch=1000,
        method=method,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(result.low), float(result.high), level)


def expanded(level: float, n: int) -> float:
    """The level at which the bootstrap's quantiles are as far out as Student's t of n values asks for.

    Resampling uses the sample's own spread, without its n - 1, and takes it for known: its intervals of few values are
    too narrow. Hesterberg 2015 (The American Statistician 69) puts the tail at
    Phi(-sqrt(n / (n - 1)) t) with t of n - 1 degrees of freedom.
    """
    reach = math.sqrt(n / (n - 1)) * scipy.stats.t.ppf(0.5 + level / 2, n - 1)
    return float(min(2 * scipy.stats.norm.cdf(reach) - 1, 1 - 1e-9))


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


def _check_resampling(level: float, n_resamples: int, seed: int) -> None:
    number("level", level, above=0, below=1)
    whole_number("n_resamples", n_resamples, least=1)
    seed_of(seed)
