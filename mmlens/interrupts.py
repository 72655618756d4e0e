"""Temporary states that end whatever happens, an interrupt (Ctrl-C) at any moment included.

Python raises KeyboardInterrupt between any two steps, those of a `finally` among them. So what undoes a state may be
called twice, and is: an interrupt in the midst of the first call, or right before it, leaves the second.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


def undone(run: Callable[[], T], undo: Callable[[], None]) -> T:
    """What `run()` gives, with `undo()` done after it. `run` also sets up what is undone; `undo` may be called twice.

    >>> state = []
    >>> undone(lambda: state.append(1) or len(state), state.clear), state
    (1, [])
    """
    try:
        try:
            return run()
        finally:
            undo()
    finally:
        undo()


class OpenBlock(Generic[T]):
    """A `with` block: `begin()`, and at the end `end()`, which may be called twice; then, where no error left the
    block, `check()`."""

    _is_open = False

    def begin(self) -> T:
        raise NotImplementedError

    def end(self) -> None:
        raise NotImplementedError

    def check(self) -> None:
        return None

    def close(self) -> None:
        if self._is_open:
            self.end()
            self._is_open = False

    def around(self, run: Callable[[], U]) -> U:
        """What `run()` gives inside the block, without the check at its end. Unlike a `with` statement it has no moment
        at which an interrupt would leave the block open."""

        def inside() -> U:
            self.__enter__()
            return run()

        return undone(inside, self.close)

    def __enter__(self) -> T:
        try:
            self._is_open = True
            return self.begin()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # On one line: no interrupt is then raised between the function's first line and the `try`.
        try: self.close()  # fmt: skip  # noqa: E701
        finally:
            self.close()
        if kind is None:
            self.check()

    def __del__(self) -> None:
        # An interrupt before the first line of __exit__ leaves the block open until nothing refers to it.
        self.close()


class Temporary(OpenBlock[T]):
    """A block of functions.

    >>> state = []
    >>> with Temporary(lambda: state.append(1), state.clear):
    ...     print(state)
    [1]
    >>> state
    []
    """

    def __init__(
        self, begin: Callable[[], T], end: Callable[[], None], check: Callable[[], None] = lambda: None
    ) -> None:
        self._functions = begin, end, check

    def begin(self) -> T:
        return self._functions[0]()

    def end(self) -> None:
        self._functions[1]()

    def check(self) -> None:
        self._functions[2]()
