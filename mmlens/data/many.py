"""Many examples: made when they are read, from a stream or by their numbers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

from mmlens.arguments import called, instance_of, seed_of, whole_number
from mmlens.data.examples import Example
from mmlens.errors import OutOfRangeError


class ExampleStream(Iterable[Example]):
    """Examples that are made when they are read, and again each time, so that however many there are fit in memory.

    `start` gives an iterator from the first example on, anew each time; `name` is what errors call them. Whatever takes
    a list of examples takes a stream, and goes through it once; what has to compare examples with each other makes a
    list of them, in which images are still late.

    >>> stream = ExampleStream(lambda: (Example(f"Question {i}?", "yes", id=str(i)) for i in range(20_000)), "mine")
    >>> stream, [example.id for example in stream.take(2)]
    (ExampleStream(mine), ['0', '1'])
    """

    def __init__(self, start: Callable[[], Iterator[Example]], name: str = "examples") -> None:
        called("start", start, "a function that gives an iterator of examples")
        self._start, self.name = start, instance_of("name", name, str, "a text")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name})"

    def __iter__(self) -> Iterator[Example]:
        return iter(self._start())

    @property
    def n_known(self) -> int | None:
        """How many there are; None where that is not known before the end."""
        return None

    def take(self, n: int) -> ExampleStream:
        """The first n, or all where there are fewer."""
        n = whole_number("n", n, least=0)
        return ExampleStream(lambda: itertools.islice(self, n), self.name)

    def where(self, keep: Callable[[Example], bool]) -> ExampleStream:
        """Those for which `keep` says so.

        >>> from mmlens.data import scene_examples
        >>> many = Examples(8, scene_examples("objects", 8, seed=0).__getitem__)
        >>> len(list(many.where(lambda example: example.answer == many[0].answer)))
        2
        """
        called("keep", keep, "a function from an example to True or False")
        return ExampleStream(lambda: filter(keep, self), self.name)


class Examples(ExampleStream, Sequence[Example]):
    """`n` examples, of which `at` makes one by its number when it is read; see `ExampleStream`.

    >>> many = Examples(20_000, lambda i: Example(f"Question {i}?", "yes", id=str(i)), "mine")
    >>> many, many[-1].id, len(many[10:20])
    (Examples(mine: 20000), '19999', 10)
    """

    def __init__(self, n: int, at: Callable[[int], Example], name: str = "examples") -> None:
        super().__init__(lambda: map(self._at, range(self._n)), name)
        self._n = whole_number("n", n, least=0)
        self._at = called("at", at, "a function from a number to its example")

    def __repr__(self) -> str:
        return f"Examples({self.name}: {len(self)})"

    def __len__(self) -> int:
        return self._n

    @property
    def n_known(self) -> int:
        return self._n

    @overload
    def __getitem__(self, at: int) -> Example: ...

    @overload
    def __getitem__(self, at: slice) -> Examples: ...

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return self._chosen(range(len(self))[at])
        number = whole_number("the number of an example", at)
        if not -len(self) <= number < len(self):
            raise OutOfRangeError(f"{self.name} are {len(self)}, numbered 0 to {len(self) - 1}; no {number}")
        return self._at(number % len(self))

    def _chosen(self, numbers: Sequence[int]) -> Examples:
        return Examples(len(numbers), lambda at: self._at(numbers[at]), self.name)

    def take(self, n: int) -> Examples:
        """The first n, or all where there are fewer."""
        return self._chosen(range(min(whole_number("n", n, least=0), len(self))))

    def shuffled(self, seed: int) -> Examples:
        """In a random order."""
        order = list(range(len(self)))
        random.Random(seed_of(seed)).shuffle(order)
        return self._chosen(order)
