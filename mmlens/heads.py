"""Attention heads as data: `HeadSet`, an ordered set of (layer, head), and `HeadScores`, their scores.

Both know which heads the model has, so one that does not exist is refused where it is named and not where it
is used. Most models have the full grid of n_layers x n_heads. In a hybrid one some layers have no softmax
attention and so no heads, and in some models layers differ in their number: `heads_per_layer` says how many each
has, `n_heads` is then the largest number, and head 3 of a layer with 2 is as absent as one out of range.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmlens.arguments import (
    file_to_write,
    instance_of,
    listed,
    number,
    path_of,
    seed_of,
    shown,
    texts,
    whole_number,
    whole_numbers,
)
from mmlens.errors import InvalidTypeError, InvalidValueError, MmlensWarning, OutOfRangeError
from mmlens.files import read_parquet

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
"""What stands in a [layer, head] grid of ranks or counts where the model has no head."""


@dataclass(frozen=True, eq=False, repr=False)
class HeadSet:
    """An immutable set of (layer, head) pairs of a model with `n_layers` x `n_heads` query heads.

    `heads_per_layer` says how many heads each layer has where they are not all `n_heads`; complements and random
    draws are of those heads alone. Sets of models with other heads do not combine.

    It keeps the order in which the heads were given (by rank, where a score chose them), but two sets are
    equal when they hold the same heads. `|`, `&`, `-`, `^`, `<=` and `<` are those of sets, `in`, `len`
    and iteration work, and the left operand's order comes first. A set may be empty, as the intersection
    of two can be; functions that act on heads refuse an empty one (`as_head_set`).

    Raises IndexError for a head that the model does not have, ValueError for a repeated one, TypeError for
    anything that is not a pair of integers.

    >>> chosen = HeadSet([(1, 3), (0, 2)], n_layers=2, n_heads=4)
    >>> chosen
    HeadSet(2 of 2 x 4: L1H3 L0H2)
    >>> (0, 2) in chosen, chosen.by_layer(), len(chosen.complement())
    (True, {0: [2], 1: [3]}, 6)
    >>> HeadSet([(2, 0)], n_layers=2, n_heads=4)
    Traceback (most recent call last):
        ...
    mmlens.errors.OutOfRangeError: head (2, 0): layer 2 is out of range; ...
    >>> hybrid = HeadSet([(1, 0)], n_layers=3, n_heads=2, heads_per_layer=(0, 2, 2))
    >>> hybrid.complement()
    HeadSet(3 of 4 heads in 2 of 3 layers: L1H1 L2H0 L2H1)
    """

    heads: tuple[Head, ...]
    n_layers: int
    n_heads: int
    heads_per_layer: tuple[int, ...]

    def __init__(
        self, heads: Heads, *, n_layers: int, n_heads: int, heads_per_layer: Sequence[int] | None = None
    ) -> None:
        n_layers, n_heads = (
            whole_number(name, size, least=1) for name, size in (("n_layers", n_layers), ("n_heads", n_heads))
        )
        per_layer = _checked_layers(n_layers, n_heads, heads_per_layer)
        checked = tuple(_check_head(head, n_heads, per_layer) for head in _pairs(heads))
        repeated = sorted(head for head, count in Counter(checked).items() if count > 1)
        if repeated:
            raise InvalidValueError(f"each head may be named once; named more than once: {repeated}")
        object.__setattr__(self, "heads", checked)
        object.__setattr__(self, "n_layers", n_layers)
        object.__setattr__(self, "n_heads", n_heads)
        object.__setattr__(self, "heads_per_layer", per_layer)

    @classmethod
    def every(cls, n_layers: int, n_heads: int, heads_per_layer: Sequence[int] | None = None) -> HeadSet:
        """All heads of the model, layer by layer."""
        n_layers, n_heads = (
            whole_number(name, size, least=1) for name, size in (("n_layers", n_layers), ("n_heads", n_heads))
        )
        per_layer = _checked_layers(n_layers, n_heads, heads_per_layer)
        pairs = [(layer, head) for layer, count in enumerate(per_layer) for head in range(count)]
        return cls(pairs, n_layers=n_layers, n_heads=n_heads, heads_per_layer=per_layer)

    def __len__(self) -> int:
        return len(self.heads)

    def __iter__(self) -> Iterator[Head]:
        return iter(self.heads)

    def __contains__(self, head: object) -> bool:
        return head in self.heads

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HeadSet):
            return NotImplemented
        return self._model == other._model and set(self.heads) == set(other.heads)

    def __hash__(self) -> int:
        return hash((frozenset(self.heads), self._model))

    def __repr__(self) -> str:
        shown = " ".join(map(head_name, self.heads[:8]))
        more = f" and {len(self) - 8} more" if len(self) > 8 else ""
        size = _size(*self._model).removesuffix(" heads")
        return f"HeadSet({len(self)} of {size}{': ' if shown else ''}{shown}{more})"

    @property
    def shape(self) -> tuple[int, int]:
        """(n_layers, n_heads) of the model."""
        return self.n_layers, self.n_heads

    @property
    def _model(self) -> tuple[int, tuple[int, ...]]:
        return self.n_heads, self.heads_per_layer

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
        return HeadSet.every(*self.shape, self.heads_per_layer) - self

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
        left: dict[int, list[int]] = {layer: [] for layer in range(self.n_layers)}
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
        return HeadSet(
            heads, n_layers=self.n_layers, n_heads=self.n_heads, heads_per_layer=self.heads_per_layer
        )

    def _same_model(self, other: HeadSet) -> HeadSet:
        if not isinstance(other, HeadSet):
            raise InvalidTypeError(
                f"a HeadSet combines with another HeadSet, not with {type(other).__name__}"
            )
        if other._model != self._model:
            raise InvalidValueError(
                f"the two sets are of different models: {_size(*self._model)} and {_size(*other._model)}"
            )
        return other

    def _complement_of_at_least_its_size(self) -> tuple[Head, ...]:
        others = self.complement().heads
        if len(others) < len(self):
            raise InvalidValueError(
                f"no {len(self)} random heads outside the set: of the model's "
                f"{sum(self.heads_per_layer)} heads only {len(others)} are not in it"
            )
        return others


def as_head_set(
    heads: Heads,
    n_layers: int,
    n_heads: int,
    heads_per_layer: Sequence[int] | None = None,
    *,
    at_least: int = 1,
) -> HeadSet:
    """`heads` as a HeadSet of `at_least` one head of a model with `n_layers` x `n_heads` heads.

    `heads_per_layer` says how many heads each layer has; None: n_heads, or as a given HeadSet says. Raises
    ValueError for no heads, a repeated head, or a HeadSet of a model of another shape; IndexError for a head that
    the model does not have; TypeError for anything else than (layer, head) pairs of integers.

    >>> as_head_set([(0, 1)], n_layers=2, n_heads=4)
    HeadSet(1 of 2 x 4: L0H1)
    >>> as_head_set((0, 1), n_layers=2, n_heads=4)
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidTypeError: heads are (layer, head) pairs of integers, not 0; ...
    >>> as_head_set([(0, 1)], n_layers=3, n_heads=2, heads_per_layer=(0, 2, 2))
    Traceback (most recent call last):
        ...
    mmlens.errors.OutOfRangeError: head (0, 1): layer 0 has no softmax attention; layers with heads: 1, 2
    """
    if isinstance(heads, HeadSet):
        if heads.shape != (n_layers, n_heads):
            raise InvalidValueError(
                f"the heads are of a model with {heads.n_layers} x {heads.n_heads} heads, "
                f"this model has {n_layers} x {n_heads} (layers x heads)"
            )
        heads_per_layer = heads.heads_per_layer if heads_per_layer is None else tuple(heads_per_layer)
        # A set made without saying which heads there are stands on the full grid.
        if heads.heads_per_layer not in (heads_per_layer, (n_heads,) * n_layers):
            raise InvalidValueError(
                f"the heads are of another model: it has {heads.heads_per_layer} heads in its layers, "
                f"this one {heads_per_layer}"
            )
    checked = HeadSet(heads, n_layers=n_layers, n_heads=n_heads, heads_per_layer=heads_per_layer)
    if len(checked) < at_least:
        raise InvalidValueError("no heads given: expected at least one (layer, head)")
    return checked


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores:
    """One score for each head of a model and each example; a head's score is its mean over examples.

    `per_example` is [example, layer, head]; `kinds` names each example's kind of task, where they have
    one. `heads_per_layer` says how many heads each layer has, where not every layer has all of the grid; it is
    `model.heads_per_layer`. The heads beyond are NaN in every example: such a head has no rank, stands in no set and
    no table, and counts in no fraction.

    Raises ValueError for no examples, a head that is NaN and yet exists (a score that failed is never taken for a
    head that the model lacks), a score of one that does not, or a number of kinds other than the number of examples.

    >>> scores = HeadScores(torch.tensor([[[.1, .6], [.3, .2]], [[.3, .4], [.4, .1]]]), name="RAM")
    >>> scores.rank().tolist()
    [[2, 0], [1, 3]]
    >>> scores.top(1), scores.bottom(.25)
    (HeadSet(1 of 2 x 2: L0H1), HeadSet(1 of 2 x 2: L1H1))
    """

    per_example: Float[Tensor, "example layer head"]
    name: str = "score"
    kinds: tuple[str, ...] | None = None
    heads_per_layer: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        instance_of("name", self.name, str, "a text")
        if not isinstance(self.per_example, (Tensor, np.ndarray)):
            raise InvalidTypeError(
                f"{self.name}: per_example is {shown(self.per_example)}; expected a tensor [example, layer, head]"
            )
        if self.kinds is not None:
            object.__setattr__(self, "kinds", tuple(texts("kinds", self.kinds, "a text for each example")))
        scores = torch.as_tensor(self.per_example).detach().cpu()
        if scores.ndim != 3 or 0 in scores.shape or not scores.is_floating_point():
            raise InvalidValueError(
                f"{self.name}: expected floating-point scores of shape [example, layer, head] with at least "
                f"one of each, got {scores.dtype} {list(scores.shape)}"
            )
        missing = scores.isnan()
        n_layers, n_heads = scores.shape[1:]
        given = self.heads_per_layer or None
        object.__setattr__(self, "heads_per_layer", _checked_layers(n_layers, n_heads, given))
        exists = _exists(n_heads, self.heads_per_layer)
        if bool((missing & exists).any()):
            example, layer, head = (missing & exists).nonzero()[0].tolist()
            raise InvalidValueError(
                f"{self.name}: the score of head ({layer}, {head}) in example {example} is NaN"
                + (
                    ""
                    if given
                    else "; where the model lacks that head, say heads_per_layer=model.heads_per_layer"
                )
            )
        if bool((~missing & ~exists).any()):
            example, layer, head = (~missing & ~exists).nonzero()[0].tolist()
            raise InvalidValueError(
                f"{self.name}: head ({layer}, {head}) has a score in example {example}, but layer {layer} has "
                f"{self.heads_per_layer[layer]} heads; a head that does not exist is NaN"
            )
        if self.kinds is not None and len(self.kinds) != len(scores):
            raise InvalidValueError(f"{self.name}: {len(self.kinds)} kinds for {len(scores)} examples")
        object.__setattr__(self, "per_example", scores)

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.per_example)

    def __repr__(self) -> str:
        examples, layers, heads = self.per_example.shape
        full = bool(self.exists.all())
        size = f"{layers} layers x {heads} heads" if full else _size(*self._model)
        return f"HeadScores({self.name}: {size}, {examples} examples)"

    @property
    def values(self) -> Float[Tensor, "layer head"]:
        """Mean over examples (summed in float64); NaN where the model has no head."""
        return self.per_example.double().mean(0).to(self.per_example.dtype)

    @property
    def n_layers(self) -> int:
        return self.per_example.shape[1]

    @property
    def n_heads(self) -> int:
        return self.per_example.shape[2]

    @property
    def exists(self) -> Bool[Tensor, "layer head"]:
        """Which heads the model has."""
        return _exists(self.n_heads, self.heads_per_layer)

    def rank(self) -> Int[Tensor, "layer head"]:
        """Each head's rank, 0 for the highest score; equal scores rank in (layer, head) order.

        NO_HEAD (-1) where the model has no head.
        """
        return self._on_grid(_ranks(self._flat()))

    def top(self, n_or_fraction: int | float) -> HeadSet:
        """The heads of highest score, highest first.

        An int is a number of heads, a float in (0, 1] a fraction of all heads: so `top(1)` is one head and
        `top(1.0)` all. A fraction is rounded to the nearest whole number of heads, at least 1, which keeps
        the share as close to the one named as it can be (5% of 64 heads is 3). The paper's "at or above
        the 95th percentile" can hold one head more: 4 of 64, 40 instead of 39 of 784.

        Scores that are the same for every head choose none: that is a ValueError, unless all heads are asked for.
        Where heads inside and outside the choice have the same score, the earlier (layer, head) is taken, and a
        warning names them.
        """
        count = self._count(n_or_fraction)
        return self._chosen(self._order()[:count], f"the {count} highest")

    def bottom(self, n_or_fraction: int | float) -> HeadSet:
        """The heads of lowest score, lowest first; counted, refused and warned of as in `top` (later heads first)."""
        count = self._count(n_or_fraction)
        return self._chosen(self._order()[::-1][:count], f"the {count} lowest")

    def top_spread(self, n_or_fraction: int | float) -> HeadSet:
        """As many heads as `top`, spread over the layers: the best of every layer before the second best of any.

        Where the number is no multiple of the layers, those whose next head scores highest give one more. Equal
        scores as in `top`.

        >>> scores = HeadScores(torch.tensor([[[0.9, 0.8], [0.1, 0.2]]]), "RAM")
        >>> scores.top(2), scores.top_spread(2)
        (HeadSet(2 of 2 x 2: L0H0 L0H1), HeadSet(2 of 2 x 2: L0H0 L1H1))
        """
        count = self._count(n_or_fraction)
        layer_of = [layer for layer, _ in self._every]
        of_layer: Counter[int] = Counter()
        turns = np.zeros(len(layer_of), dtype=np.int64)
        order = self._order()
        for index in order:
            turns[index] = of_layer[layer_of[index]]
            of_layer[layer_of[index]] += 1
        # A stable sort keeps the order of the scores within a turn.
        chosen = order[np.argsort(turns[order], kind="stable")][:count]
        return self._chosen(chosen, f"the best {count} over all layers", turns)

    def select(self, kind: str) -> HeadScores:
        """The scores of the examples of one kind."""
        instance_of("kind", kind, str, "the name of a kind")
        if self.kinds is None:
            raise InvalidValueError(f"{self.name}: the examples carry no kinds, so none can be selected")
        chosen = [index for index, own in enumerate(self.kinds) if own == kind]
        if not chosen:
            raise InvalidValueError(
                f"{self.name}: no example of kind {kind!r}; kinds are {sorted(set(self.kinds))}"
            )
        return HeadScores(
            self.per_example[chosen], self.name, (kind,) * len(chosen), heads_per_layer=self.heads_per_layer
        )

    def rank_interval(
        self, level: float = 0.95, *, n_resamples: int = 1000, seed: int = 0
    ) -> tuple[Int[Tensor, "layer head"], Int[Tensor, "layer head"]]:
        """Lowest and highest rank of each head in the middle `level` of bootstrap resamples of the examples.

        Percentile bootstrap: examples are drawn with replacement, all heads ranked anew each time. The
        ends are ranks that occurred, never interpolated. It tells how firmly the examples place a head
        among its competitors; it is no confidence interval for a "true rank" among tied heads. NO_HEAD (-1)
        where the model has no head. Raises ValueError for fewer than 2 examples.
        """
        level = number("level", level, above=0, below=1)
        n_resamples, seed = whole_number("n_resamples", n_resamples, least=1), seed_of(seed)
        if len(self) < 2:
            raise InvalidValueError(
                f"{self.name}: a rank interval needs at least 2 examples, there is {len(self)}"
            )
        # A resample is a multinomial count of each example, so all resampled means are one matrix product.
        rng = np.random.default_rng(seed)
        counts = rng.multinomial(len(self), np.full(len(self), 1 / len(self)), size=n_resamples)
        means = counts @ self.per_example[:, self.exists].double().numpy() / len(self)
        ranks = _ranks(means)
        low = np.quantile(ranks, (1 - level) / 2, axis=0, method="lower")
        high = np.quantile(ranks, (1 + level) / 2, axis=0, method="higher")
        return self._on_grid(low), self._on_grid(high)

    def spearman(self, other: HeadScores) -> float:
        """Spearman's rank correlation of the two scores over all heads (ties get their mean rank).

        Raises ValueError for models of different shape, and where one score is the same for every head.
        """
        instance_of("other", other, HeadScores, "HeadScores of the same model")
        if other._model != self._model:
            raise InvalidValueError(
                f"{self.name} is of {_size(*self._model)}, {other.name} of {_size(*other._model)}: "
                "no head-by-head correlation"
            )
        for scores in (self, other):
            if np.ptp(scores._flat()) == 0:
                raise InvalidValueError(
                    f"{scores.name} is equal for all heads: its rank correlation is undefined"
                )
        return float(scipy.stats.spearmanr(self._flat(), other._flat()).statistic)

    def stability(self, n_or_fraction: int | float = 0.05) -> Int[Tensor, "layer head"]:
        """In how many kinds' `top(n_or_fraction)` each head stands (0 to the number of kinds).

        NO_HEAD (-1) where the model has no head.
        """
        if self.kinds is None:
            raise InvalidValueError(f"{self.name}: the examples carry no kinds to compare")
        count = self._on_grid(np.zeros(sum(self.heads_per_layer), dtype=np.int64))
        for kind in sorted(set(self.kinds)):
            for head in self.select(kind).top(n_or_fraction):
                count[head] += 1
        return count

    def table(self, *, level: float = 0.95, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """One row per head, best first: layer, head, score, standard_error, rank, rank_low, rank_high.

        The standard error of the mean and the rank interval are missing (NA) where there is one example.
        """
        exists = self.exists
        layer, head = np.nonzero(exists.numpy())
        frame = pd.DataFrame({"layer": layer, "head": head, "score": self._flat()})
        frame["standard_error"] = np.nan
        frame["rank"] = self.rank()[exists].numpy()
        frame["rank_low"] = frame["rank_high"] = pd.array([pd.NA] * len(frame), dtype="Int64")
        if len(self) > 1:
            low, high = self.rank_interval(level, n_resamples=n_resamples, seed=seed)
            deviation = self.per_example.double().std(0)[exists].numpy()
            frame["standard_error"] = deviation / math.sqrt(len(self))
            frame["rank_low"] = pd.array(low[exists].numpy(), dtype="Int64")
            frame["rank_high"] = pd.array(high[exists].numpy(), dtype="Int64")
        return frame.sort_values("rank", ignore_index=True)

    def per_example_table(self) -> pd.DataFrame:
        """One row per example and head of the grid: name, example, kind (where known), layer, head, score,
        heads_in_layer.

        The score of a head that the model does not have is missing; how many it has says heads_in_layer.
        """
        example, layer, head = np.indices(self.per_example.shape).reshape(3, -1)
        columns = {"name": self.name, "example": example, "layer": layer, "head": head}
        frame = pd.DataFrame(columns | {"score": self.per_example.flatten().numpy()})
        frame["heads_in_layer"] = np.asarray(self.heads_per_layer)[layer]
        if self.kinds is not None:
            frame.insert(2, "kind", np.asarray(self.kinds, dtype=object)[example])
        return frame

    def save(self, path: str | Path) -> None:
        """Write `per_example_table` as parquet, which `load` reads.

        Raises ValueError where `path` is a folder, MissingFileError where the folder that it names is not there.
        """
        self.per_example_table().to_parquet(file_to_write("path", path), index=False)

    @classmethod
    def load(cls, path: str | Path, *, heads_per_layer: Sequence[int] | None = None) -> HeadScores:
        """Read what `save` wrote.

        A file without the column heads_in_layer (which earlier versions did not write) is of a model that has all
        heads of the grid, unless `heads_per_layer` says otherwise (`model.heads_per_layer`).

        Raises ValueError where a column or a head of an example is missing, where the score of a head that exists is,
        where the file says another number of heads than `heads_per_layer`, or is broken; MissingFileError where there
        is none.
        """
        frame = read_parquet(path_of("path", path))
        missing = [
            column for column in ("name", "example", "layer", "head", "score") if column not in frame.columns
        ]
        if missing:
            raise InvalidValueError(
                f"{path} holds no head scores: no column {missing}; its columns are {list(frame.columns)}"
            )
        frame = frame.sort_values(["example", "layer", "head"], ignore_index=True)
        shape = tuple(
            int(frame[column].max()) + 1 if len(frame) else 0 for column in ("example", "layer", "head")
        )
        expected = np.indices(shape).reshape(3, -1).T
        if not np.array_equal(frame[["example", "layer", "head"]].to_numpy(), expected):
            raise InvalidValueError(
                f"{path} does not hold one score for each of {shape} (example, layer, head): "
                f"{len(frame)} rows, expected {len(expected)} different ones"
            )
        kinds = None
        if "kind" in frame.columns:
            kinds = tuple(frame.drop_duplicates("example")["kind"])
        scores = torch.from_numpy(frame["score"].to_numpy().copy()).reshape(shape)
        per_layer = (
            None if heads_per_layer is None else tuple(whole_numbers("heads_per_layer", heads_per_layer))
        )
        if "heads_in_layer" in frame.columns:
            stated = frame.groupby("layer")["heads_in_layer"].agg(["min", "max"])
            own = tuple(map(int, stated["min"]))
            if own != tuple(map(int, stated["max"])) or (per_layer is not None and own != per_layer):
                raise InvalidValueError(
                    f"{path} is of a model with {own} heads in its layers"
                    + (f", not {per_layer}" if per_layer else ", and not in all rows alike")
                )
            per_layer = own
        return cls(scores, name=frame["name"].iloc[0], kinds=kinds, heads_per_layer=per_layer or ())

    def _flat(self) -> np.ndarray:
        """The heads that exist, in (layer, head) order."""
        return self.values[self.exists].numpy()

    def _on_grid(self, values: np.ndarray) -> Int[Tensor, "layer head"]:
        grid = torch.full((self.n_layers, self.n_heads), NO_HEAD)
        grid[self.exists] = torch.from_numpy(values)
        return grid

    @property
    def _model(self) -> tuple[int, tuple[int, ...]]:
        return self.n_heads, self.heads_per_layer

    @property
    def _every(self) -> HeadSet:
        """The heads that exist, in the order of `_flat`."""
        return HeadSet.every(self.n_layers, self.n_heads, self.heads_per_layer)

    def _order(self) -> np.ndarray:
        """Numbers of the heads in `_every`, the highest score first, equal ones in (layer, head) order."""
        return np.argsort(-self._flat(), kind="stable")

    def _chosen(self, chosen: np.ndarray, what: str, turns: np.ndarray | None = None) -> HeadSet:
        """The heads of these numbers in `_every`, if the scores tell them from the others.

        `turns`: with them, heads of one layer or of one turn stand in for each other; without, all heads do.
        """
        every, scores = self._every, self._flat()
        is_chosen = np.zeros(len(every), dtype=bool)
        is_chosen[chosen] = True
        if len(chosen) < len(every):
            if np.ptp(scores) == 0:
                raise InvalidValueError(
                    f"{self.name} is {scores[0]:g} for each of the {len(every)} heads, so it chooses none of them; "
                    f"{what} would be the first ones there are"
                )
            layers = np.array([layer for layer, _ in every])
            inside, outside = is_chosen.nonzero()[0], (~is_chosen).nonzero()[0]
            alike = scores[inside][:, None] == scores[outside]
            if turns is not None:
                same_place = (layers[inside][:, None] == layers[outside]) | (
                    turns[inside][:, None] == turns[outside]
                )
                alike &= same_place
            if alike.any():
                self._warn_of_ties(every, scores, inside[alike.any(1)], outside[alike.any(0)], what)
        return every._with(every.heads[index] for index in chosen)

    def _warn_of_ties(
        self, every: HeadSet, scores: np.ndarray, inside: np.ndarray, outside: np.ndarray, what: str
    ) -> None:
        def named(indices: np.ndarray) -> str:
            more = f" and {len(indices) - 8} more" if len(indices) > 8 else ""
            return " ".join(head_name(every.heads[index]) for index in indices[:8]) + more

        shared = sorted({float(scores[index]) for index in inside})
        value = f"{shared[0]:g}" if len(shared) == 1 else "their score"
        warnings.warn(
            f"{self.name}: {what} of {len(every)} heads cut through a tie. {named(inside)} are among them, "
            f"{named(outside)} are not, and they share {value}: which are taken follows from their numbers alone",
            MmlensWarning,
            stacklevel=4,
        )

    def _count(self, n_or_fraction: int | float) -> int:
        total = sum(self.heads_per_layer)
        if isinstance(n_or_fraction, (float, np.floating)):
            if not 0 < n_or_fraction <= 1:
                raise InvalidValueError(
                    f"a fraction of heads lies in (0, 1], not {n_or_fraction}; a count is an int"
                )
            return share_of(float(n_or_fraction), total)
        try:
            count = whole_number("the number of heads", n_or_fraction)
        except InvalidTypeError:
            raise InvalidTypeError(
                f"expected a number of heads (int) or a fraction (float), not {shown(n_or_fraction)}"
            ) from None
        if not 1 <= count <= total:
            raise InvalidValueError(f"a count of heads lies in 1 to {total} (all heads), not {count}")
        return count


def share_of(fraction: float, n_heads: int) -> int:
    """The whole number of heads nearest to a fraction of `n_heads`, at least 1.

    >>> share_of(0.05, 64), share_of(0.05, 4)
    (3, 1)
    """
    # 1e-9 lifts products such as 100 * .145 = 14.499999999999998 to the half they stand for.
    return max(1, math.floor(fraction * n_heads + 0.5 + 1e-9))


def _ranks(scores: np.ndarray) -> np.ndarray:
    """0 for the highest along the last axis, ties in order of position."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(scores.shape[-1]), order.shape), axis=-1)
    return ranks


def _pairs(heads: Heads) -> list[Any]:
    if isinstance(heads, HeadSet):
        return list(heads)
    if isinstance(heads, HeadScores):
        raise InvalidTypeError("heads are HeadScores; expected a HeadSet: scores.top(n) has the highest n")
    return listed("heads", heads, "a HeadSet or a list of (layer, head) pairs", sets=True)


def _checked_layers(n_layers: int, n_heads: int, heads_per_layer: Sequence[int] | None) -> tuple[int, ...]:
    """How many heads each layer has: `n_heads` where nothing else is said."""
    if heads_per_layer is None:
        return (n_heads,) * n_layers
    per_layer = tuple(whole_numbers("heads_per_layer", heads_per_layer))
    if len(per_layer) != n_layers or not any(per_layer) or not all(0 <= n <= n_heads for n in per_layer):
        raise InvalidValueError(
            f"heads_per_layer is a number from 0 to {n_heads} for each of {n_layers} layers, one at least above 0; "
            f"got {per_layer}"
        )
    return per_layer


def _exists(n_heads: int, heads_per_layer: Sequence[int]) -> Bool[Tensor, "layer head"]:
    return torch.arange(n_heads) < torch.tensor(heads_per_layer)[:, None]


def _size(n_heads: int, heads_per_layer: Sequence[int]) -> str:
    if set(heads_per_layer) == {n_heads}:
        return f"{len(heads_per_layer)} x {n_heads} heads"
    n_with_heads = sum(count > 0 for count in heads_per_layer)
    return f"{sum(heads_per_layer)} heads in {n_with_heads} of {len(heads_per_layer)} layers"


def _check_head(pair: Any, n_heads: int, heads_per_layer: Sequence[int]) -> Head:
    try:
        layer, head = (_integer(part) for part in pair)
    except (TypeError, ValueError):
        raise InvalidTypeError(
            f"heads are (layer, head) pairs of integers, not {pair!r}; one head is written [(layer, head)]"
        ) from None
    n_layers = len(heads_per_layer)
    of = f" of {n_heads} heads (0 to {n_heads - 1})" if set(heads_per_layer) == {n_heads} else ""
    model = f"the model has {n_layers} layers (0 to {n_layers - 1}){of}"
    if not 0 <= layer < n_layers:
        raise OutOfRangeError(f"head ({layer}, {head}): layer {layer} is out of range; {model}")
    count = heads_per_layer[layer]
    if not count:
        others = ", ".join(str(other) for other, n in enumerate(heads_per_layer) if n)
        raise OutOfRangeError(
            f"head ({layer}, {head}): layer {layer} has no softmax attention; layers with heads: {others}"
        )
    if not 0 <= head < count:
        here = model if of else f"layer {layer} has {count} heads (0 to {count - 1})"
        raise OutOfRangeError(f"head ({layer}, {head}): head {head} is out of range; {here}")
    return layer, head


def _integer(value: Any) -> int:
    return whole_number("a layer or head", value)
