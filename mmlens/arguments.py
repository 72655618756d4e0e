"""Checks of arguments at the border of the public surface: one set of small validators.

Each takes the argument's name and value, gives the value back in its plain type, and raises InvalidTypeError or
InvalidValueError with what was given, what was expected and, where there are names to choose from, the nearest one.
"""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmlens.errors import InvalidTypeError, InvalidValueError

T = TypeVar("T")

BATCH_SIZE = 16
"""How many examples run together where a function's `batch_size` is left out."""


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


def nearest_names(given: str, known: Iterable[str]) -> list[str]:
    """The names nearest to the one given; all of them where none is near."""
    known = list(known)
    return difflib.get_close_matches(given, known, n=3, cutoff=0.5) or known


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
    """An int, or an integer of NumPy or torch; a bool or a float is none.

    >>> whole_number("n", np.int64(3), least=1), whole_number("seed", 0)
    (3, 0)
    >>> whole_number("n", True)
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidTypeError: n is True (bool); expected a whole number
    """
    bounds = _bounds(least, most)
    try:
        plain = _scalar(value)
        given = None if isinstance(plain, (bool, np.bool_)) else operator.index(cast("Any", plain))
    except TypeError:
        given = None
    if given is None:
        raise InvalidTypeError(f"{name} is {shown(value)}; expected a whole number{bounds}")
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
    plain = _scalar(value)
    if isinstance(plain, (bool, np.bool_)) or not isinstance(plain, numbers.Real):
        raise InvalidTypeError(f"{name} is {shown(value)}; expected a number{bounds}")
    given = float(plain)
    is_outside = (
        (least is not None and given < least)
        or (most is not None and given > most)
        or (above is not None and given <= above)
        or (below is not None and given >= below)
    )
    if is_outside or not math.isfinite(given):
        raise InvalidValueError(f"{name} is {value!r}; expected a finite number{bounds}")
    return given


def fraction_of(name: str, value: object) -> float:
    """A share of a whole: above 0 and at most 1."""
    return number(name, value, above=0, most=1)


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


def text(name: str, value: object, expected: str = "a text") -> str:
    """A text that is not empty.

    >>> text("null_question", " ")
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidValueError: null_question is ' '; expected a text that is not empty
    """
    given = instance_of(name, value, str, expected)
    if not given.strip():
        raise InvalidValueError(f"{name} is {given!r}; expected {expected} that is not empty")
    return given


def path_of(name: str, value: object) -> Path:
    """A path, given as a text or a Path."""
    if not isinstance(value, (str, os.PathLike)) or isinstance(os.fspath(value), bytes):
        raise InvalidTypeError(f"{name} is {shown(value)}; expected a path (a text or a pathlib.Path)")
    if not os.fspath(value):
        raise InvalidValueError(f"{name} is {value!r}; expected a path")
    return Path(value)


def file_to_write(name: str, value: object) -> Path:
    """The path of a file that can be written: no folder, and in a folder that there is."""
    path = path_of(name, value)
    if path.is_dir():
        raise InvalidValueError(f"{name} is the folder {str(path)!r}; expected the path of a file to write")
    if not path.parent.is_dir():
        raise InvalidValueError(
            f"{name} is {str(path)!r}, and there is no folder {str(path.parent)!r} to write it to: make it first"
        )
    return path


def folder_to_write(name: str, value: object) -> Path:
    """The path of a folder that is there or can be made: no part of it is a file."""
    path = path_of(name, value)
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise InvalidValueError(
                f"{name} is {str(path)!r}, and {str(part)!r} is a file; expected a folder"
            )
    return path


def listed(name: str, value: object, expected: str, *, least: int = 0, sets: bool = False) -> list[Any]:
    """The items of a list, tuple, generator or other ordered iterable, gathered once.

    A text, a mapping and a set are refused: their items are letters, keys, or in no order. With `sets` a set is taken,
    its items sorted.

    >>> listed("images", (i for i in range(2)), "a list of images")
    [0, 1]
    >>> listed("candidates", "red", "a list of texts")
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidTypeError: candidates is 'red' (str); expected a list of texts
    """
    if sets and isinstance(value, (set, frozenset)):
        value = sorted(
            value, key=lambda item: (str(type(item)), item) if isinstance(item, tuple) else (repr(item),)
        )
    unordered = (str, bytes, Mapping, set, frozenset)
    if isinstance(value, unordered) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        raise InvalidTypeError(f"{name} is {shown(value)}; expected {expected}")
    items = list(value)
    if len(items) < least:
        given = f"no {name} given" if not items else f"{name} has {len(items)} item(s)"
        raise InvalidValueError(f"{given}: expected {expected}, at least {least}")
    return items


def names_of(name: str, value: object, known: Iterable[str]) -> list[str]:
    """A list of some of a few names, each once.

    >>> names_of("modes", ("zero", "meen"), ["zero", "mean"])
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidValueError: there is no mode 'meen'; the nearest: 'mean'
    """
    names = list(known)
    given = listed(name, value, f"a list of some of {', '.join(map(repr, names))}", least=1)
    return _each_once(name, [one_of(name.removesuffix("s"), item, names) for item in given])


def whole_numbers(
    name: str, value: object, *, least: int | None = None, most: int | None = None, at_least: int = 1
) -> list[int]:
    """A list of `at_least` one whole number, each from `least` to `most`."""
    given = listed(name, value, f"a list of whole numbers{_bounds(least, most)}", least=at_least)
    return [whole_number(f"{name}[{at}]", item, least=least, most=most) for at, item in enumerate(given)]


def fractions_of(name: str, value: object) -> list[float]:
    """A list of at least one share of a whole, each above 0 and at most 1."""
    given = listed(name, value, "a list of numbers above 0 and of at most 1", least=1)
    return [fraction_of(f"{name}[{at}]", item) for at, item in enumerate(given)]


def texts(name: str, value: object, expected: str = "a list of texts", *, least: int = 0) -> list[str]:
    """A list of texts; one text alone is none."""
    given = listed(name, value, expected, least=least)
    return [
        instance_of(f"{name}[{at}]", item, str, f"a text: {name} is {expected}")
        for at, item in enumerate(given)
    ]


def array_of(name: str, value: object, axes: str | None) -> NDArray[np.float64]:
    """Numbers as a float64 array with these axes (None: of any shape): a tensor, an array, a Series or a list.

    >>> array_of("values", [1, 2.5], "example").tolist()
    [1.0, 2.5]
    >>> array_of("scores", [1.0, 2.0], "layer head")
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidValueError: scores is an array of shape [2]; expected numbers [layer, head]
    """
    names = None if axes is None else axes.split()
    expected = "an array of numbers" if names is None else f"numbers [{', '.join(names)}]"
    if isinstance(value, Tensor):
        array = value.detach().cpu().numpy() if not value.is_floating_point() else None
        array = value.detach().cpu().double().numpy() if array is None else array
    elif isinstance(value, (str, bytes, Mapping, set, frozenset)) or not isinstance(
        value, (Iterable, np.ndarray)
    ):
        raise InvalidTypeError(f"{name} is {shown(value)}; expected {expected}")
    else:
        try:
            array = np.asarray(value if hasattr(value, "__array__") else list(value))
        except (ValueError, TypeError, RuntimeError):
            array = np.empty(0, dtype=object)
    if array.dtype.kind not in "biuf" and array.size:
        array = _numbers_of_objects(array)
    if array is None or array.dtype.kind not in "biuf":
        raise InvalidTypeError(f"{name} is {shown(value)}; expected {expected}, all of them real numbers")
    if names is not None and array.ndim != len(names):
        raise InvalidValueError(f"{name} is an array of shape {list(array.shape)}; expected {expected}")
    return array.astype(np.float64)


def table_of(name: str, value: object, columns: Iterable[str], expected: str) -> pd.DataFrame:
    """A pandas table with rows and with these columns.

    >>> table_of("table", pd.DataFrame({"a": [1]}), ["a", "b"], "a table of pairs")
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidValueError: the table lacks the columns ['b']; it has ['a']; expected a table of pairs
    """
    table = instance_of(name, value, pd.DataFrame, f"{expected}, as a pandas DataFrame")
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise InvalidValueError(
            f"the {name} lacks the columns {missing}; it has {[str(column) for column in table.columns]}; "
            f"expected {expected}"
        )
    if not len(table):
        raise InvalidValueError(f"the {name} has no rows; expected {expected}")
    return table


def device_of(value: object, name: str = "device") -> torch.device:
    """A device of torch.

    >>> device_of("cpuu")
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidValueError: device is 'cpuu'; expected a device of torch, such as 'cpu' or 'cuda:0'
    """
    expected = "a device of torch, such as 'cpu' or 'cuda:0'"
    if isinstance(value, bool) or not isinstance(value, (str, int, torch.device)):
        raise InvalidTypeError(f"{name} is {shown(value)}; expected {expected}")
    try:
        return torch.device(value)
    except RuntimeError:
        raise InvalidValueError(f"{name} is {value!r}; expected {expected}") from None


def called(
    name: str, value: object, expected: str, *, n_arguments: int | None = None, keywords: Iterable[str] = ()
) -> Callable[..., Any]:
    """A function, or anything else that can be called; a class is none.

    `n_arguments`: it takes so many by place, and these `keywords` by name.

    >>> called("metric", lambda logits: logits, "a function (logits, prompt)", n_arguments=2)
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidTypeError: metric is <function ...; expected a function (logits, prompt): it takes (logits)
    """
    if not callable(value) or isinstance(value, type):
        raise InvalidTypeError(f"{name} is {shown(value)}; expected {expected}")
    if n_arguments is not None:
        try:
            signature = inspect.signature(value)
        except (ValueError, TypeError):
            return value
        try:
            signature.bind(*[None] * n_arguments, **dict.fromkeys(keywords))
        except TypeError:
            raise InvalidTypeError(
                f"{name} is {shown(value)}; expected {expected}: it takes {signature}"
            ) from None
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


def _scalar(value: object) -> object:
    """What an array or tensor without axes holds; anything else as it is."""
    return value.item() if isinstance(value, (np.ndarray, Tensor)) and value.ndim == 0 else value


def _numbers_of_objects(array: NDArray[Any]) -> NDArray[np.float64] | None:
    """Numbers in an array of Python objects (tensors without axes, Fractions); None where there is anything else."""
    try:
        found = [number("", item) if np.isfinite(float(item)) else float(item) for item in array.ravel()]
    except (TypeError, ValueError):
        return None
    return np.array(found, dtype=np.float64).reshape(array.shape)


def _each_once(name: str, items: list[str]) -> list[str]:
    repeated = sorted({item for item in items if items.count(item) > 1})
    if repeated:
        raise InvalidValueError(
            f"{name} names {', '.join(map(repr, repeated))} more than once; expected each once"
        )
    return items


def _bounds(
    least: float | None, most: float | None, above: float | None = None, below: float | None = None
) -> str:
    words = [
        f"{word} {bound}"
        for word, bound in (("of at least", least), ("of at most", most), ("above", above), ("below", below))
        if bound is not None
    ]
    return f" {' and '.join(words)}" if words else ""
