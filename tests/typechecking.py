"""What checks the shapes and types of mmlens' annotations while the tests run."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

EVERY = 16
"""A function inside another is made, and its check built, in every call of that: one of so many is checked."""

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_definitions: Counter[str] = Counter()


def typechecker(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function's annotations in every call; of functions inside others, one of `EVERY` that are made."""
    name = f"{function.__module__}.{function.__qualname__}"
    if "<locals>" in name:
        _definitions[name] += 1
        # jaxtyping asks twice for each, for its parameters and for what it returns.
        if (_definitions[name] - 1) // 2 % EVERY:
            return function
    return _check(function)
