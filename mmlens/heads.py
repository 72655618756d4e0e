"""Attention heads as data: `HeadGrid`, which heads a model has, and `HeadSet`, an ordered set of (layer, head).

Every set knows its model's grid, so a head that does not exist is refused where it is named and not where it is used.
Most models have the full grid of n_layers x n_heads. In a hybrid one some layers have no softmax attention and so no
heads, and in some models layers differ in their number: n_heads is then the largest number, and head 3 of a layer with
2 is as absent as one out of range.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from mmlens.arguments import listed, seed_of, shown, whole_number, whole_numbers
from mmlens.errors import InvalidTypeError, InvalidValueError, OutOfRangeError

Head = tuple[int, int]


def head_name(head: Head) -> str:
    """A head as it is written everywhere.

    >>> head_name((1, 3))
    'L1H3'
    """
    return f"L{head[0]}H{head[1]}"


Heads = Iterable[Any]
"""A HeadSet, or (layer, head) pairs of integers: a list of tuples, an integer array or tensor [head, 2]."""

NO_HEAD = -1
"""What stands in a [layer, head] array of ranks or counts where the model has no head (in one of scores: NaN)."""


@dataclass(frozen=True)
class HeadGrid:
    """Which heads a model has: how many in each layer, and `n_heads`, the width of arrays [layer, head].

    `model.grid` is a model's; functions take a plain (n_layers, n_heads) for one whose layers all have `n_heads`.
    `n_heads` is the largest of `heads_per_layer` where it is left out.

    >>> grid = HeadGrid((0, 2, 1))
    >>> grid.shape, len(grid), grid.heads, grid.layers
    ((3, 2), 3, ((1, 0), (1, 1), (2, 0)), [1, 2])
    >>> grid.filled([5, 6, 7], missing=NO_HEAD).tolist()
    [[-1, -1], [5, 6], [7, -1]]
    >>> (2, 1) in grid, str(grid)
    (False, '3 heads in 2 of 3 layers')
    """

    heads_per_layer: tuple[int, ...]
    n_heads: int = 0

    def __post_init__(self) -> None:
        per_layer = tuple(whole_numbers("heads_per_layer", self.heads_per_layer, least=0))
        n_heads = whole_number("n_heads", self.n_heads, least=0) or max(per_layer)
        if not any(per_layer) or max(per_layer) > n_heads:
            raise InvalidValueError(
                f"heads_per_layer is a number from 0 to n_heads={n_heads} for each layer, one at least above 0; "
                f"got {per_layer}"
            )
        object.__setattr__(self, "heads_per_layer", per_layer)
        object.__setattr__(self, "n_heads", n_heads)

    @classmethod
    def of(cls, grid: HeadGrid | tuple[int, int]) -> HeadGrid:
        """A HeadGrid as it is; (n_layers, n_heads) as the grid in which every layer has n_heads.

        >>> HeadGrid.of((3, 2))
        HeadGrid(heads_per_layer=(2, 2, 2), n_heads=2)
        """
        if isinstance(grid, HeadGrid):
            return grid
        expected = "a HeadGrid (model.grid), or (n_layers, n_heads)"
        sizes = listed("grid", grid, expected)
        if len(sizes) != 2:
            raise InvalidValueError(f"grid is {shown(grid)}; expected {expected}")
        n_layers, n_heads = (
            whole_number(name, size, least=1)
            for name, size in zip(("n_layers", "n_heads"), sizes, strict=True)
        )
        return cls((n_heads,) * n_layers)

    def __len__(self) -> int:
        """The number of heads."""
        return sum(self.heads_per_layer)

    def __contains__(self, head: object) -> bool:
        return head in self.heads

    def __str__(self) -> str:
        if self.is_full:
            return f"{self.n_layers} x {self.n_heads} heads"
        return f"{len(self)} heads in {len(self.layers)} of {self.n_layers} layers"

    @property
    def n_layers(self) -> int:
        return len(self.heads_per_layer)

    @property
    def shape(self) -> tuple[int, int]:
        """(n_layers, n_heads)."""
        return self.n_layers, self.n_heads

    @property
    def is_full(self) -> bool:
        """Whether every layer has n_heads heads."""
        return set(self.heads_per_layer) == {self.n_heads}

    @property
    def layers(self) -> list[int]:
        """The layers that have heads."""
        return [layer for layer, count in enumerate(self.heads_per_layer) if count]

    @property
    def heads(self) -> tuple[Head, ...]:
        """Every head, layer by layer."""
        return tuple(
            (layer, head) for layer, count in enumerate(self.heads_per_layer) for head in range(count)
        )

    @property
    def exists(self) -> Bool[Tensor, "layer head"]:
        """Which places of an array [layer, head] are heads."""
        return torch.arange(self.n_heads) < torch.tensor(self.heads_per_layer)[:, None]

    def full(self, *leading: int, fill: float = torch.nan) -> Shaped[Tensor, "*leading layer head"]:
        """A new array [*leading, layer, head] that holds `fill`, and NaN where there is no head."""
        values = torch.full((*leading, *self.shape), torch.nan)
        values[..., self.exists] = fill
        return values

    def filled(self, values: Any, missing: float = torch.nan) -> Shaped[Tensor, "*leading layer head"]:
        """`values` [*leading, one for each of `heads`] as [*leading, layer, head]; `missing` where there is no head."""
        values = torch.as_tensor(values)
        placed = values.new_full((*values.shape[:-1], *self.shape), missing)
        placed[..., self.exists] = values
        return placed

    def checked(self, head: Any) -> Head:
        """A head of the model as a pair of ints; IndexError where it has none such, TypeError for anything else."""
        try:
            layer, index = (whole_number("a layer or head", part) for part in head)
        except (TypeError, ValueError):
            raise InvalidTypeError(
                f"heads are (layer, head) pairs of integers, not {head!r}; one head is written [(layer, head)]"
            ) from None
        of = f" of {self.n_heads} heads (0 to {self.n_heads - 1})" if self.is_full else ""
        model = f"the model has {self.n_layers} layers (0 to {self.n_layers - 1}){of}"
        if not 0 <= layer < self.n_layers:
            raise OutOfRangeError(f"head ({layer}, {index}): layer {layer} is out of range; {model}")
        count = self.heads_per_layer[layer]
        if not count:
            raise OutOfRangeError(
                f"head ({layer}, {index}): layer {layer} has no softmax attention; layers with heads: "
                + ", ".join(map(str, self.layers))
            )
        if not 0 <= index < count:
            here = model if of else f"layer {layer} has {count} heads (0 to {count - 1})"
            raise OutOfRangeError(f"head ({layer}, {index}): head {index} is out of range; {here}")
        return layer, index


@dataclass(frozen=True, eq=False, repr=False)
class HeadSet:
    """An immutable set of (layer, head) pairs of a model with the heads of `grid`.

    `grid` is a HeadGrid (`model.grid`), or (n_layers, n_heads) where every layer has n_heads; complements and random
    draws are of its heads alone. Sets of models with other heads do not combine.

    It keeps the order in which the heads were given (by rank, where a score chose them), but two sets are
    equal when they hold the same heads. `|`, `&`, `-`, `^`, `<=` and `<` are those of sets, `in`, `len`
    and iteration work, and the left operand's order comes first. A set may be empty, as the intersection
    of two can be; functions that act on heads refuse an empty one (`as_head_set`).

    Raises IndexError for a head that the model does not have, ValueError for a repeated one, TypeError for
    anything that is not a pair of integers.

    >>> chosen = HeadSet([(1, 3), (0, 2)], grid=(2, 4))
    >>> chosen
    HeadSet(2 of 2 x 4: L1H3 L0H2)
    >>> (0, 2) in chosen, chosen.by_layer(), len(chosen.complement())
    (True, {0: [2], 1: [3]}, 6)
    >>> HeadSet([(2, 0)], grid=(2, 4))
    Traceback (most recent call last):
        ...
    mmlens.errors.OutOfRangeError: head (2, 0): layer 2 is out of range; ...
    >>> HeadSet([(1, 0)], grid=HeadGrid((0, 2, 2))).complement()
    HeadSet(3 of 4 heads in 2 of 3 layers: L1H1 L2H0 L2H1)
    """

    heads: tuple[Head, ...]
    grid: HeadGrid

    def __init__(self, heads: Heads, grid: HeadGrid | tuple[int, int]) -> None:
        grid = HeadGrid.of(grid)
        expected = "a HeadSet or a list of (layer, head) pairs (scores.top(n) has the n highest)"
        given = listed("heads", heads, expected, sets=True)
        checked = tuple(grid.checked(head) for head in given)
        repeated = sorted(head for head, count in Counter(checked).items() if count > 1)
        if repeated:
            raise InvalidValueError(f"each head may be named once; named more than once: {repeated}")
        object.__setattr__(self, "heads", checked)
        object.__setattr__(self, "grid", grid)

    @classmethod
    def every(cls, grid: HeadGrid | tuple[int, int]) -> HeadSet:
        """All heads of the model, layer by layer.

        >>> HeadSet.every((2, 2))
        HeadSet(4 of 2 x 2: L0H0 L0H1 L1H0 L1H1)
        """
        grid = HeadGrid.of(grid)
        return cls(grid.heads, grid)

    def __len__(self) -> int:
        return len(self.heads)

    def __iter__(self) -> Iterator[Head]:
        return iter(self.heads)

    def __contains__(self, head: object) -> bool:
        return head in self.heads

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HeadSet):
            return NotImplemented
        return self.grid == other.grid and set(self.heads) == set(other.heads)

    def __hash__(self) -> int:
        return hash((frozenset(self.heads), self.grid))

    def __repr__(self) -> str:
        shown = " ".join(map(head_name, self.heads[:8]))
        more = f" and {len(self) - 8} more" if len(self) > 8 else ""
        size = str(self.grid).removesuffix(" heads")
        return f"HeadSet({len(self)} of {size}{': ' if shown else ''}{shown}{more})"

    def __or__(self, other: HeadSet) -> HeadSet:
        return self._with([*self.heads, *(self._same_model(other) - self)])

    def __and__(self, other: HeadSet) -> HeadSet:
        common = set(self._same_model(other))
        return self._with(head for head in self.heads if head in common)

    def __sub__(self, other: HeadSet) -> HeadSet:
        removed = set(self._same_model(other))
        return self._with(head for head in self.heads if head not in removed)

    def __xor__(self, other: HeadSet) -> HeadSet:
        return (self - other) | (other - self)

    def __le__(self, other: HeadSet) -> bool:
        return set(self.heads) <= set(self._same_model(other))

    def __lt__(self, other: HeadSet) -> bool:
        return set(self.heads) < set(self._same_model(other))

    def by_layer(self) -> dict[int, list[int]]:
        """{layer: its heads in the set}, layers ascending, heads in the set's order."""
        return {
            layer: [head for at, head in self.heads if at == layer]
            for layer in sorted({layer for layer, _ in self.heads})
        }

    def complement(self) -> HeadSet:
        """Every head of the model that is not in the set, layer by layer."""
        return HeadSet.every(self.grid) - self

    def random(self, seed: int) -> HeadSet:
        """As many heads, drawn uniformly without replacement from the complement.

        A control drawn from all heads can hold the very heads it is compared with; this one cannot.
        Raises ValueError when the complement holds fewer heads than the set.
        """
        rng = np.random.default_rng(seed_of(seed))
        others = self._complement_of_at_least_its_size()
        drawn = rng.choice(len(others), size=len(self), replace=False)
        return self._with(others[index] for index in sorted(drawn))

    def matched_random(self, seed: int) -> HeadSet:
        """As many heads in each layer, drawn uniformly without replacement from the complement.

        Where a layer has too few heads left, the shortfall comes from the complement in the nearest layers
        (both sides alike) after every layer has served its own need, with a warning that says how many
        heads moved. Raises ValueError when the whole complement holds fewer heads than the set.
        """
        rng = np.random.default_rng(seed_of(seed))
        left: dict[int, list[int]] = {layer: [] for layer in range(self.grid.n_layers)}
        for layer, head in self._complement_of_at_least_its_size():
            left[layer].append(head)
        drawn: list[Head] = []
        short: dict[int, int] = {}
        for layer, members in self.by_layer().items():
            taken = rng.permutation(left[layer])[: len(members)].tolist()
            drawn += [(layer, head) for head in taken]
            left[layer] = [head for head in left[layer] if head not in taken]
            if len(taken) < len(members):
                short[layer] = len(members) - len(taken)
        for layer, missing in short.items():
            for _ in range(missing):
                near = min(abs(other - layer) for other, heads in left.items() if heads)
                pool = [(at, h) for at, heads in left.items() if abs(at - layer) == near for h in heads]
                at, head = pool[rng.integers(len(pool))]
                drawn.append((at, head))
                left[at].remove(head)
        if short:
            moved = ", ".join(f"{count} of layer {layer}" for layer, count in short.items())
            warnings.warn(
                f"layer-matched random heads: too few heads outside the set in their own layer; "
                f"drawn from the nearest layers instead: {moved}",
                stacklevel=2,
            )
        return self._with(sorted(drawn))

    def _with(self, heads: Iterable[Head]) -> HeadSet:
        return HeadSet(heads, self.grid)

    def _same_model(self, other: HeadSet) -> HeadSet:
        if not isinstance(other, HeadSet):
            raise InvalidTypeError(
                f"a HeadSet combines with another HeadSet, not with {type(other).__name__}"
            )
        if other.grid != self.grid:
            raise InvalidValueError(f"the two sets are of different models: {self.grid} and {other.grid}")
        return other

    def _complement_of_at_least_its_size(self) -> tuple[Head, ...]:
        others = self.complement().heads
        if len(others) < len(self):
            raise InvalidValueError(
                f"no {len(self)} random heads outside the set: of the model's "
                f"{len(self.grid)} heads only {len(others)} are not in it"
            )
        return others


def as_head_set(heads: Heads, grid: HeadGrid | tuple[int, int], *, at_least: int = 1) -> HeadSet:
    """`heads` as a HeadSet of `at_least` one head of a model with the heads of `grid`.

    A HeadSet on the full grid of the same shape is one that was made without saying which heads there are.

    Raises ValueError for no heads, a repeated head, or a HeadSet of another model; IndexError for a head that
    the model does not have; TypeError for anything else than (layer, head) pairs of integers.

    >>> as_head_set([(0, 1)], (2, 4))
    HeadSet(1 of 2 x 4: L0H1)
    >>> as_head_set((0, 1), (2, 4))
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidTypeError: heads are (layer, head) pairs of integers, not 0; ...
    >>> as_head_set([(0, 1)], HeadGrid((0, 2, 2)))
    Traceback (most recent call last):
        ...
    mmlens.errors.OutOfRangeError: head (0, 1): layer 0 has no softmax attention; layers with heads: 1, 2
    """
    grid = HeadGrid.of(grid)
    if isinstance(heads, HeadSet):
        own = heads.grid
        if own.shape != grid.shape:
            raise InvalidValueError(
                f"the heads are of a model with {own.n_layers} x {own.n_heads} heads, "
                f"this model has {grid.n_layers} x {grid.n_heads} (layers x heads)"
            )
        if own != grid and not own.is_full:
            raise InvalidValueError(
                f"the heads are of another model: it has {own.heads_per_layer} heads in its layers, "
                f"this one {grid.heads_per_layer}"
            )
    checked = HeadSet(heads, grid)
    if len(checked) < at_least:
        raise InvalidValueError("no heads given: expected at least one (layer, head)")
    return checked
