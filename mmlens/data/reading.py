"""Rows read as examples, with the number and the id of every row that cannot be read."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from mmlens.arguments import seed_of
from mmlens.data.examples import DataError, Example
from mmlens.data.many import Examples, ExampleStream
from mmlens.data.tables import Row, Rows
from mmlens.errors import MmlensError, MmlensWarning, warn

Read = Callable[[int, Row], Iterable[Example]]
"""The examples of a row, by its number; RowError for a row that holds none and should."""


class RowError(DataError):
    """A row that cannot be read: its number, its id where it has one, and the reason."""

    def __init__(self, rows: str, number: int, id: str, reason: str) -> None:
        self.skipped = Skipped(number, id, reason)
        super().__init__(f"{rows}, {self.skipped}")


@dataclass(frozen=True)
class Skipped:
    """A row that was left out: its number from 0, its id ("" where it has none), and why.

    >>> print(Skipped(17, "q17", "the answer is missing"))
    row 17 (id 'q17'): the answer is missing
    """

    row: int
    id: str
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}{f' (id {self.id!r})' if self.id else ''}: {self.reason}"


class _Reading:
    """Rows, how they are read, and which of them were left out in the last pass."""

    def __init__(self, rows: Rows, read: Read, skips: bool, order: Sequence[int] | None = None) -> None:
        self.rows, self.read, self.skips, self.order = rows, read, skips, order
        self.skipped: tuple[Skipped, ...] = ()
        self._told = 0

    def examples(self, number: int, row: Row | None = None) -> list[Example]:
        """The examples of one row; RowError where it cannot be read."""
        try:
            if row is None:
                assert self.rows.at is not None
                row = self.rows.at(number)
            found = list(self.read(number, row))
            if self.skips:
                for example in found:
                    self._check_images(number, example)
            return found
        except RowError:
            raise
        except (MmlensError, OSError, ValueError, LookupError, TypeError) as error:
            raise RowError(self.rows.name, number, "", said(error)) from error

    def _check_images(self, number: int, example: Example) -> None:
        try:
            example.check_images()
        except (MmlensError, OSError) as error:
            # Images are named by their row, which is said in front.
            named = rf"^{re.escape(self.rows.name)}, row {number}( \(id '.*?'\))?, "
            raise RowError(self.rows.name, number, example.id, re.sub(named, "", said(error))) from error

    def through(self) -> Iterator[tuple[int, Example]]:
        """(number of the row, example) of every row, in one pass; two of one id are an error."""
        rows_of_ids: dict[int, int] = {}
        skipped: list[Skipped] = []
        try:
            for number, row in self._numbered():
                try:
                    found = self.examples(number, row)
                    self._check_ids(number, found, rows_of_ids)
                except RowError as error:
                    if not self.skips:
                        raise
                    skipped.append(error.skipped)
                    continue
                for example in found:
                    yield number, example
        finally:
            self._note(skipped)

    def _numbered(self) -> Iterator[tuple[int, Row | None]]:
        if self.rows.n is not None:
            yield from ((number, None) for number in self.order or range(self.rows.n))
            return
        number = -1
        try:
            for number, row in enumerate(self.rows):
                yield number, row
        except MmlensError:
            raise
        except Exception as error:
            raise RowError(
                self.rows.name,
                number + 1,
                "",
                f"the stream broke off here, and no row after it can be read: {said(error)}",
            ) from error

    def _check_ids(self, number: int, found: list[Example], rows_of_ids: dict[int, int]) -> None:
        # Hashes in the place of ids: of 20,000 rows they take two megabytes, however long ids are.
        for example in found:
            if example.id:
                other = rows_of_ids.setdefault(hash(example.id), number)
                if other != number or (found[0] is not example and found[0].id == example.id):
                    raise RowError(
                        self.rows.name,
                        number,
                        example.id,
                        f"the id is that of row {other} too; ids name one row each",
                    )

    def _note(self, skipped: list[Skipped]) -> None:
        self.skipped = tuple(skipped)
        if len(skipped) > self._told:
            self._told = len(skipped)
            shown = "; ".join(map(str, skipped[:5]))
            more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
            warn(
                f"{self.rows.name}: {len(skipped)} row(s) were skipped: {shown}{more}",
                MmlensWarning,
                stacklevel=3,
            )


def said(error: Exception) -> str:
    """What an error says, with its type where it is none of ours."""
    return str(error) if isinstance(error, MmlensError) else f"{type(error).__name__}: {error}"


class RowExamples(Examples):
    """Examples of rows that have numbers, one of each row; `skipped` are the rows that were left out.

    Where rows may be left out, all are read once when this is made: their cells, and the headers of their images.
    """

    def __init__(self, rows: Rows, read: Read, *, skips: bool) -> None:
        assert rows.n is not None
        self._reading = _Reading(rows, read, skips)
        numbers = [number for number, _ in self._reading.through()] if skips else range(rows.n)
        if not numbers:
            raise DataError(f"no row of {rows.name} could be read: {self.skipped[0]}")
        # So that what is wrong with all rows is said at once.
        self._reading.examples(numbers[0])
        super().__init__(len(numbers), lambda at: self._reading.examples(numbers[at])[0], rows.name)
        if not skips:
            self._start = lambda: (example for _, example in self._reading.through())

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """The rows that could not be read and were left out."""
        return self._reading.skipped

    def __repr__(self) -> str:
        left_out = f", {len(self.skipped)} row(s) skipped" if self.skipped else ""
        return f"Examples({self.name}: {len(self)}{left_out})"


class RowStream(ExampleStream):
    """Examples of rows that come as a stream, or of which one gives any number of examples.

    `skipped` are the rows that were left out in the last pass, which a warning at its end counts.
    """

    def __init__(self, rows: Rows, read: Read, *, skips: bool, order: Sequence[int] | None = None) -> None:
        self._reading = _Reading(rows, read, skips, order)
        super().__init__(self._all, rows.name)

    def shuffled(self, seed: int) -> RowStream:
        """Rows in a random order, the examples of one after each other; rows of a stream stay as they come."""
        reading = self._reading
        if reading.rows.n is None:
            return self
        order = list(range(reading.rows.n))
        random.Random(seed_of(seed)).shuffle(order)
        return RowStream(reading.rows, reading.read, skips=reading.skips, order=order)

    def _all(self) -> Iterator[Example]:
        n = 0
        for _, example in self._reading.through():
            n += 1
            yield example
        if not n and self.skipped:
            raise DataError(f"no row of {self.name} could be read: {self.skipped[0]}")

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """The rows that could not be read and were left out, in the last pass."""
        return self._reading.skipped

    def __repr__(self) -> str:
        left_out = f", {len(self.skipped)} row(s) skipped" if self.skipped else ""
        return f"ExampleStream({self.name}{left_out})"
