"""Checks of arguments at the border of the public surface: one set of small validators.

Each takes the argument's name and value, gives the value back in its plain type, and raises InvalidTypeError or
InvalidValueError with what was given, what was expected and, where there are names to choose from, the nearest one.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from mmlens.errors import InvalidTypeError, InvalidValueError

T = TypeVar("T")


def shown(value: object) -> str:
    """A value and its type as an error message shows them, cut short.

    >>> shown(3.5), shown("a" * 99)
    ('3.5 (float)', "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa... (str)")
    """
    try:
        text = repr(value)
    except Exception:
        text = "a value"
    text = text if len(text) <= 60 else text[:59] + "..."
    return f"{text} ({type(value).__name__})"


def unknown_name_message(kind: str, given: object, known: Iterable[str]) -> str:
    """What was given, and the nearest right names.

    >>> unknown_name_message("hook point", "blocks.0.attn.hook_Z", ["blocks.0.attn.hook_z"])
    "there is no hook point 'blocks.0.attn.hook_Z'; the nearest: 'blocks.0.attn.hook_z'"
    """
    known = list(known)
    nearest = difflib.get_close_matches(str(given), known, n=3, cutoff=0.5)
    named = nearest or known[:8]
    label = "the nearest" if nearest else "there are"
    return f"there is no {kind} {given!r}; {label}: {', '.join(map(repr, named))}"


def instance_of(name: str, value: object, types: type[T] | tuple[type[T], ...], expected: str) -> T:
    """`value`, an instance of `types`; `expected` says in words what that is, and how to get one.

    >>> instance_of("question", 3, str, "a text")
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidTypeError: question is 3 (int); expected a text
    """
    if not isinstance(value, types):
        raise InvalidTypeError(f"{name} is {shown(value)}; expected {expected}")
    return value


def whole_number(name: str, value: object, *, least: int | None = None, most: int | None = None) -> int:
    """An int, or a NumPy integer; a bool or a float is none.

    >>> whole_number("n", np.int64(3), least=1), whole_number("seed", 0)
    (3, 0)
    >>> whole_number("n", True)
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidTypeError: n is True (bool); expected a whole number
    """
    bounds = _bounds(least, most)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        raise InvalidTypeError(f"{name} is {shown(value)}; expected a whole number{bounds}")
    given = int(value)
    if (least is not None and given < least) or (most is not None and given > most):
        raise InvalidValueError(f"{name} is {given}; expected a whole number{bounds}")
    return given


def seed_of(value: object, name: str = "seed") -> int:
    """A seed: a whole number from 0 to 2^63 - 1, which both NumPy and torch take."""
    return whole_number(name, value, least=0, most=2**63 - 1)


def number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """A finite real number; a bool is none. `above` and `below` are bounds that it may not reach.

    >>> number("level", 0.95, above=0, below=1)
    0.95
    >>> number("level", "0.95", above=0, below=1)
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidTypeError: level is '0.95' (str); expected a number above 0 and below 1
    """
    bounds = _bounds(least, most, above, below)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise InvalidTypeError(f"{name} is {shown(value)}; expected a number{bounds}")
    given = float(value)
    is_outside = (
        (least is not None and given < least)
        or (most is not None and given > most)
        or (above is not None and given <= above)
        or (below is not None and given >= below)
    )
    if is_outside or not math.isfinite(given):
        raise InvalidValueError(f"{name} is {value!r}; expected a finite number{bounds}")
    return given


def flag(name: str, value: object) -> bool:
    """True or False; a number or a text is neither.

    >>> flag("progress", 1)
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidTypeError: progress is 1 (int); expected True or False
    """
    if not isinstance(value, (bool, np.bool_)):
        raise InvalidTypeError(f"{name} is {shown(value)}; expected True or False")
    return bool(value)


def one_of(name: str, value: object, known: Iterable[str]) -> str:
    """One of a few names.

    >>> one_of("mode", "meen", ["zero", "mean"])
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidValueError: there is no mode 'meen'; the nearest: 'mean'
    """
    names = list(known)
    if not isinstance(value, str):
        raise InvalidTypeError(f"{name} is {shown(value)}; expected one of {', '.join(map(repr, names))}")
    if value not in names:
        raise InvalidValueError(unknown_name_message(name, value, names))
    return value


def listed(name: str, value: object, expected: str, *, least: int = 0) -> list[Any]:
    """The items of a list, tuple, generator or other ordered iterable, gathered once.

    A text, a mapping and a set are refused: their items are letters, keys, or in no order.

    >>> listed("images", (i for i in range(2)), "a list of images")
    [0, 1]
    >>> listed("candidates", "red", "a list of texts")
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidTypeError: candidates is 'red' (str); expected a list of texts
    """
    unordered = (str, bytes, Mapping, set, frozenset)
    if isinstance(value, unordered) or not isinstance(value, Iterable):
        raise InvalidTypeError(f"{name} is {shown(value)}; expected {expected}")
    items = list(value)
    if len(items) < least:
        raise InvalidValueError(f"{name} has {len(items)} item(s); expected {expected}, {least} or more")
    return items


def called(name: str, value: object, expected: str) -> Callable[..., Any]:
    """A function."""
    if not callable(value):
        raise InvalidTypeError(f"{name} is {shown(value)}; expected {expected}")
    return value


def known_keywords(function: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raise InvalidTypeError where a keyword is none of `known`, with the nearest name.

    >>> known_keywords("run_with_cache", ["name_filter"], ["names_filter", "device"])
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidTypeError: run_with_cache: there is no keyword 'name_filter'; the nearest: 'names_filter'
    """
    for name in given:
        if name not in known:
            raise InvalidTypeError(f"{function}: {unknown_name_message('keyword', name, known)}")


def _bounds(
    least: float | None, most: float | None, above: float | None = None, below: float | None = None
) -> str:
    words = [
        f"{word} {bound}"
        for word, bound in (("of at least", least), ("of at most", most), ("above", above), ("below", below))
        if bound is not None
    ]
    return f" {' and '.join(words)}" if words else ""
