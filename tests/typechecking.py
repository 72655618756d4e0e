"""What checks the shapes and types of mmlens' annotations while the tests run."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_checked: dict[Any, Callable[..., Any]] = {}


def typechecker(function: FunctionType) -> Callable[..., Any]:
    """`function` with its annotations checked in every call.

    jaxtyping hands over an empty function of each signature. One that is defined anew in every call of another has
    the same each time, and building its check is half the time of tests that make many models: it is built once.
    """
    if function.__defaults__ or function.__kwdefaults__:
        # A default is each definition's own, and would live as long as its check is kept.
        return _check(function)
    key = (
        function.__module__,
        function.__qualname__,
        function.__code__,
        tuple(function.__annotations__.items()),
    )
    if key not in _checked:
        _checked[key] = _check(function)
    return _checked[key]
