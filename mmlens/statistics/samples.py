"""What every statistic is given: one number for each example, or two for each of the same examples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from mmlens.arguments import array_of
from mmlens.errors import InvalidValueError

Values = Sequence[float] | Sequence[int] | np.ndarray | Tensor


def sample_of(values: Values, what: str, *, at_least: int) -> np.ndarray:
    sample = array_of(what, values, "example")
    if len(sample) < at_least:
        raise InvalidValueError(
            f"{what} needs one number for each of at least {at_least} example(s), "
            f"got shape {list(sample.shape)}"
        )
    if not np.isfinite(sample).all():
        raise InvalidValueError(f"{what} needs finite numbers, got {sample[~np.isfinite(sample)][0]}")
    return sample


def pairs_of(values: Values, baseline: Values, what: str, *, at_least: int) -> tuple[np.ndarray, np.ndarray]:
    sample, reference = (sample_of(one, what, at_least=at_least) for one in (values, baseline))
    if len(sample) != len(reference):
        raise InvalidValueError(
            f"paired values are of the same examples: got {len(sample)} and {len(reference)}"
        )
    return sample, reference
