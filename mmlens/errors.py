"""The errors that mmlens raises: one base class, and beside it the built-in class that fits each.

`except MmlensError` catches whatever mmlens refuses; `except ValueError` and its like go on working.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class MmlensError(Exception):
    """Base of every error that mmlens raises on purpose. Its message says what was given and what was expected.

    >>> import mmlens
    >>> error = mmlens.model.UnknownHookError
    >>> issubclass(error, mmlens.MmlensError), issubclass(error, KeyError)
    (True, True)
    """


class InvalidValueError(MmlensError, ValueError):
    """An argument of the right type with a value that cannot be used."""


class InvalidTypeError(MmlensError, TypeError):
    """An argument of a type that cannot be used, or a keyword that nothing knows."""


class UnknownNameError(MmlensError, KeyError):
    """A name that is in no list of names."""

    def __str__(self) -> str:
        # KeyError shows its message in quotation marks.
        return str(self.args[0]) if self.args else ""


class OutOfRangeError(MmlensError, IndexError):
    """A layer, head, example or position that there is not."""


class MissingFileError(MmlensError, FileNotFoundError):
    """A path at which there is no file."""


class UnsupportedError(MmlensError, NotImplementedError):
    """What this model or this machine cannot do."""


class StateError(MmlensError, RuntimeError):
    """A call that is right by itself, at a time or in a state in which it would give a wrong number."""


class MmlensWarning(UserWarning):
    """Base of every warning that mmlens gives."""


_OF_THREAD = threading.local()


def warn(message: str, category: type[Warning] = MmlensWarning, stacklevel: int = 1) -> None:
    """`warnings.warn`, or, within `held_warnings` of the same thread, kept for later."""
    held = getattr(_OF_THREAD, "held", None)
    if held is None:
        warnings.warn(message, category, stacklevel=stacklevel + 1)
    else:
        held.append((message, category))


@contextmanager
def held_warnings() -> Iterator[list[tuple[str, type[Warning]]]]:
    """Keeps what is warned of in this thread, for another one to `warn` of.

    Python's own filters and lists of warnings are the whole process's, so one thread cannot catch its own by them.
    """
    held: list[tuple[str, type[Warning]]] = []
    _OF_THREAD.held = held
    try:
        yield held
    finally:
        del _OF_THREAD.held


class PromptError(InvalidValueError):
    """A question, image or template from which no prompt can be made."""
