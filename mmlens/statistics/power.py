"""What a number of examples can show, asked before the run."""

from __future__ import annotations

import math

import scipy.optimize
import scipy.stats

from mmlens.arguments import fraction_of, number, whole_number
from mmlens.errors import InvalidValueError


def minimal_detectable_effect(n: int, sd: float, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest true mean difference that a two-sided paired t-test of n examples finds with `power`.

    `sd` is the standard deviation of the per-example differences (from a pilot), and the result is in its unit.
    Solved from the noncentral t distribution: P(|T| > t) = power, T with n - 1 degrees of freedom and noncentrality
    sqrt(n) effect / sd, t the two-sided critical value at `alpha` (Cohen, Statistical Power Analysis, 1988, ch. 2).
    The permutation test and the bootstrap have close to the same power unless n is small or tails are heavy. For
    m heads at once, alpha / m is a bound that is always safe.

    Raises ValueError for fewer than 2 examples, an sd that is not positive, alpha outside (0, 1) and power that
    does not lie between alpha and 1.

    >>> round(minimal_detectable_effect(34, sd=1.0), 2)  # half a standard deviation takes 34 examples
    0.5
    """
    n = whole_number("n", n, least=2)
    _check_power(power, alpha)
    sd = number("sd", sd, above=0)
    critical = scipy.stats.t.isf(alpha / 2, n - 1)

    def excess(shift: float) -> float:
        # Both tails at once, as T^2 is noncentral F; scipy's noncentral t is NaN far out in its lower tail.
        return float(scipy.stats.ncf.sf(critical**2, 1, n - 1, shift**2)) - power

    high = 1.0
    while excess(high) < 0:
        high *= 2
    shift = scipy.optimize.brentq(excess, 0, high, xtol=1e-12)
    return float(shift) * sd / math.sqrt(n)


def minimal_detectable_change(n: int, discordant: float, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest change of a share (accuracy) that McNemar's two-sided test of n examples finds with `power`.

    `discordant` is the share of examples whose outcome, 0 or 1, differs between the two runs. The change d solves
    sqrt(n) d = z(1 - alpha / 2) sqrt(discordant) + z(power) sqrt(discordant - d^2), the normal approximation
    (Connor, Biometrics 43, 1987); the exact test needs a little more. A change cannot exceed `discordant`.

    Raises ValueError for fewer than 2 examples, a share outside (0, 1], power or alpha as in
    `minimal_detectable_effect`, and where n examples are too few for even a change of `discordant`.

    >>> round(minimal_detectable_change(200, discordant=0.2), 3)
    0.088
    """
    n = whole_number("n", n, least=2)
    _check_power(power, alpha)
    discordant = fraction_of("discordant", discordant)
    z_alpha, z_power = scipy.stats.norm.isf(alpha / 2), scipy.stats.norm.ppf(power)

    def excess(change: float) -> float:
        spread = math.sqrt(max(discordant - change * change, 0.0))
        return math.sqrt(n) * change - z_alpha * math.sqrt(discordant) - z_power * spread

    if excess(discordant) < 0:
        raise InvalidValueError(
            f"{n} examples of which {discordant:g} differ cannot show a change with power {power:g} at alpha "
            f"{alpha:g}, not even where all of them differ the same way: use more examples"
        )
    return float(scipy.optimize.brentq(excess, 0, discordant, xtol=1e-12))


def _check_power(power: float, alpha: float) -> None:
    number("alpha", alpha, above=0, below=1)
    number("power", power)
    if not alpha < power < 1:
        raise InvalidValueError(f"power is a number that lies between alpha ({alpha}) and 1, not {power}")
