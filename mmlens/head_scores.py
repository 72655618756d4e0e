"""`HeadScores`: one score for each head and example, what chooses heads by it, and how firmly it ranks them."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
import scipy.stats
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlens.arguments import (
    file_to_write,
    fraction_of,
    instance_of,
    number,
    one_of,
    path_of,
    seed_of,
    shown,
    texts,
    whole_number,
)
from mmlens.errors import InvalidTypeError, InvalidValueError, MmlensWarning
from mmlens.files import read_parquet
from mmlens.heads import NO_HEAD, Head, HeadGrid, HeadSet, head_name

Counting = Literal["nearest", "ceiling", "percentile"]
"""How many heads a fraction of them is: see `HeadScores.top`."""


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores:
    """One score for each head of a model and each example; a head's score is its mean over examples.

    `per_example` is [example, layer, head]; `kinds` names each example's kind of task, where they have
    one. `grid` says which heads the model has (`model.grid`); left out, all of the array's. Where there is none the
    scores are NaN in every example: such a head has no rank, stands in no set and no table, and counts in no fraction.

    Raises ValueError for no examples, a grid of another shape, a head that is NaN and yet exists (a score that failed
    is never taken for a head that the model lacks), a score of one that does not, or a number of kinds other than the
    number of examples.

    >>> scores = HeadScores(torch.tensor([[[.1, .6], [.3, .2]], [[.3, .4], [.4, .1]]]), name="RAM")
    >>> scores.rank().tolist()
    [[2, 0], [1, 3]]
    >>> scores.top(1), scores.bottom(.25)
    (HeadSet(1 of 2 x 2: L0H1), HeadSet(1 of 2 x 2: L1H1))
    """

    per_example: Float[Tensor, "example layer head"]
    name: str
    kinds: tuple[str, ...] | None
    grid: HeadGrid

    def __init__(
        self,
        per_example: Float[Tensor, "example layer head"] | Float[np.ndarray, "example layer head"],
        name: str = "score",
        kinds: Sequence[str] | None = None,
        grid: HeadGrid | tuple[int, int] | None = None,
    ) -> None:
        instance_of("name", name, str, "a text")
        if not isinstance(per_example, (Tensor, np.ndarray)):
            raise InvalidTypeError(
                f"{name}: per_example is {shown(per_example)}; expected a tensor [example, layer, head]"
            )
        if kinds is not None:
            kinds = tuple(texts("kinds", kinds, "a text for each example"))
        scores = torch.as_tensor(per_example).detach().cpu()
        if scores.ndim != 3 or 0 in scores.shape or not scores.is_floating_point():
            raise InvalidValueError(
                f"{name}: expected floating-point scores of shape [example, layer, head] with at least "
                f"one of each, got {scores.dtype} {list(scores.shape)}"
            )
        shape = (scores.shape[1], scores.shape[2])
        hint = "; where the model lacks that head, say grid=model.grid" if grid is None else ""
        grid = HeadGrid.of(shape if grid is None else grid)
        if grid.shape != shape:
            raise InvalidValueError(
                f"{name}: scores of {shape[0]} layers x {shape[1]} heads, the grid has {grid.shape[0]} x "
                f"{grid.shape[1]}"
            )
        missing, exists = scores.isnan(), grid.exists
        if bool((missing & exists).any()):
            example, layer, head = (missing & exists).nonzero()[0].tolist()
            raise InvalidValueError(
                f"{name}: the score of head ({layer}, {head}) in example {example} is NaN{hint}"
            )
        if bool((~missing & ~exists).any()):
            example, layer, head = (~missing & ~exists).nonzero()[0].tolist()
            raise InvalidValueError(
                f"{name}: head ({layer}, {head}) has a score in example {example}, but layer {layer} has "
                f"{grid.heads_per_layer[layer]} heads; a head that does not exist is NaN"
            )
        if kinds is not None and len(kinds) != len(scores):
            raise InvalidValueError(f"{name}: {len(kinds)} kinds for {len(scores)} examples")
        for field, value in (("per_example", scores), ("name", name), ("kinds", kinds), ("grid", grid)):
            object.__setattr__(self, field, value)

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.per_example)

    def __repr__(self) -> str:
        examples, layers, heads = self.per_example.shape
        size = f"{layers} layers x {heads} heads" if self.grid.is_full else str(self.grid)
        return f"HeadScores({self.name}: {size}, {examples} examples)"

    @property
    def values(self) -> Float[Tensor, "layer head"]:
        """Mean over examples (summed in float64); NaN where the model has no head."""
        return self.per_example.double().mean(0).to(self.per_example.dtype)

    def rank(self) -> Int[Tensor, "layer head"]:
        """Each head's rank, 0 for the highest score; equal scores rank in (layer, head) order.

        NO_HEAD (-1) where the model has no head.
        """
        return self.grid.filled(_ranks(self._flat()), NO_HEAD)

    def top(self, n_or_fraction: int | float, *, count: Counting = "nearest") -> HeadSet:
        """The heads of highest score, highest first.

        An int is a number of heads, a float in (0, 1] a fraction of all heads: so `top(1)` is one head and
        `top(1.0)` all. `count` says how many heads a fraction is:

        - "nearest": the nearest whole number, which keeps the share as close to the one named as it can be.
        - "ceiling": the next whole number. So the lists of arXiv 2605.27243 were made.
        - "percentile": all heads with a score at or above that percentile of the scores (0.05: the 95th, linearly
          interpolated), as arXiv 2606.05843 words it. Heads of equal score stay together, in or out.

        5% are 3, 4 and 4 of 64 heads; 38, 39 and 39 of 768; 39, 40 and 40 of 784. Always at least 1.

        Scores that are the same for every head choose none: that is a ValueError, unless all heads are asked for.
        Where heads inside and outside the choice have the same score, the earlier (layer, head) is taken, and a
        warning names them. ValueError too for a `count` beside a number of heads, which it would not change.

        >>> scores = HeadScores(torch.linspace(1, 0, 64).reshape(1, 8, 8), "RAM")
        >>> len(scores.top(0.05)), len(scores.top(0.05, count="ceiling")), len(scores.top(0.05, count="percentile"))
        (3, 4, 4)
        """
        chosen = self._count(n_or_fraction, count)
        return self._chosen(self._order()[:chosen], f"the {chosen} highest")

    def bottom(self, n_or_fraction: int | float, *, count: Counting = "nearest") -> HeadSet:
        """The heads of lowest score, lowest first; counted, refused and warned of as in `top` (later heads first)."""
        chosen = self._count(n_or_fraction, count, highest=False)
        return self._chosen(self._order()[::-1][:chosen], f"the {chosen} lowest")

    def top_spread(self, n_or_fraction: int | float, *, count: Counting = "nearest") -> HeadSet:
        """As many heads as `top`, spread over the layers: the best of every layer before the second best of any.

        Where the number is no multiple of the layers, those whose next head scores highest give one more. Equal
        scores as in `top`.

        >>> scores = HeadScores(torch.tensor([[[0.9, 0.8], [0.1, 0.2]]]), "RAM")
        >>> scores.top(2), scores.top_spread(2)
        (HeadSet(2 of 2 x 2: L0H0 L0H1), HeadSet(2 of 2 x 2: L0H0 L1H1))
        """
        n_chosen = self._count(n_or_fraction, count)
        layer_of = [layer for layer, _ in self.grid.heads]
        of_layer: Counter[int] = Counter()
        turns = np.zeros(len(layer_of), dtype=np.int64)
        order = self._order()
        for index in order:
            turns[index] = of_layer[layer_of[index]]
            of_layer[layer_of[index]] += 1
        # A stable sort keeps the order of the scores within a turn.
        chosen = order[np.argsort(turns[order], kind="stable")][:n_chosen]
        return self._chosen(chosen, f"the best {n_chosen} over all layers", turns)

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
        return HeadScores(self.per_example[chosen], self.name, (kind,) * len(chosen), self.grid)

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
        means = counts @ self.per_example[:, self.grid.exists].double().numpy() / len(self)
        ranks = _ranks(means)
        low = np.quantile(ranks, (1 - level) / 2, axis=0, method="lower")
        high = np.quantile(ranks, (1 + level) / 2, axis=0, method="higher")
        return self.grid.filled(low, NO_HEAD), self.grid.filled(high, NO_HEAD)

    def spearman(self, other: HeadScores) -> float:
        """Spearman's rank correlation of the two scores over all heads (ties get their mean rank).

        Raises ValueError for models of different shape, and where one score is the same for every head.
        """
        instance_of("other", other, HeadScores, "HeadScores of the same model")
        if other.grid != self.grid:
            raise InvalidValueError(
                f"{self.name} is of {self.grid}, {other.name} of {other.grid}: no head-by-head correlation"
            )
        for scores in (self, other):
            if np.ptp(scores._flat()) == 0:
                raise InvalidValueError(
                    f"{scores.name} is equal for all heads: its rank correlation is undefined"
                )
        return float(scipy.stats.spearmanr(self._flat(), other._flat()).statistic)

    def stability(
        self, n_or_fraction: int | float = 0.05, *, count: Counting = "nearest"
    ) -> Int[Tensor, "layer head"]:
        """In how many kinds' `top(n_or_fraction, count=count)` each head stands (0 to the number of kinds).

        NO_HEAD (-1) where the model has no head.
        """
        if self.kinds is None:
            raise InvalidValueError(f"{self.name}: the examples carry no kinds to compare")
        times = self.grid.filled(torch.zeros(len(self.grid), dtype=torch.int64), NO_HEAD)
        for kind in sorted(set(self.kinds)):
            for head in self.select(kind).top(n_or_fraction, count=count):
                times[head] += 1
        return times

    def table(self, *, level: float = 0.95, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """One row per head, best first: layer, head, score, standard_error, rank, rank_low, rank_high.

        The standard error of the mean and the rank interval are missing (NA) where there is one example.
        """
        exists = self.grid.exists
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
        frame["heads_in_layer"] = np.asarray(self.grid.heads_per_layer)[layer]
        if self.kinds is not None:
            frame.insert(2, "kind", np.asarray(self.kinds, dtype=object)[example])
        return frame

    def save(self, path: str | Path) -> None:
        """Write `per_example_table` as parquet, which `load` reads.

        Raises ValueError where `path` is a folder, MissingFileError where the folder that it names is not there.
        """
        self.per_example_table().to_parquet(file_to_write("path", path), index=False)

    @classmethod
    def load(cls, path: str | Path, *, grid: HeadGrid | tuple[int, int] | None = None) -> HeadScores:
        """Read what `save` wrote.

        A file without the column heads_in_layer (which earlier versions did not write) is of a model that has all
        heads of the grid, unless `grid` says otherwise (`model.grid`).

        Raises ValueError where a column or a head of an example is missing, where the score of a head that exists is,
        where the file says other heads than `grid`, or is broken; MissingFileError where there is none.
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
        given = None if grid is None else HeadGrid.of(grid)
        if "heads_in_layer" in frame.columns:
            stated = frame.groupby("layer")["heads_in_layer"].agg(["min", "max"])
            own = HeadGrid(tuple(stated["min"]), n_heads=shape[2])
            if tuple(stated["max"]) != own.heads_per_layer or (given is not None and own != given):
                raise InvalidValueError(
                    f"{path} is of a model with {own.heads_per_layer} heads in its layers"
                    + (f", not {given.heads_per_layer}" if given else ", and not in all rows alike")
                )
            given = own
        return cls(scores, name=frame["name"].iloc[0], kinds=kinds, grid=given)

    def _flat(self) -> np.ndarray:
        """The scores of `grid.heads`."""
        return self.values[self.grid.exists].numpy()

    def _order(self) -> np.ndarray:
        """Numbers of the heads in `grid.heads`, the highest score first, equal ones in (layer, head) order."""
        return np.argsort(-self._flat(), kind="stable")

    def _chosen(self, chosen: np.ndarray, what: str, turns: np.ndarray | None = None) -> HeadSet:
        """The heads of these numbers in `grid.heads`, if the scores tell them from the others.

        `turns`: with them, heads of one layer or of one turn stand in for each other; without, all heads do.
        """
        every, scores = self.grid.heads, self._flat()
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
                _warn_of_ties(self.name, every, scores, inside[alike.any(1)], outside[alike.any(0)], what)
        return HeadSet((every[index] for index in chosen), self.grid)

    def _count(self, n_or_fraction: int | float, count: Counting, *, highest: bool = True) -> int:
        one_of("count", count, get_args(Counting))
        scores = self._flat() if highest else -self._flat()
        if isinstance(n_or_fraction, (float, np.floating)):
            if not 0 < n_or_fraction <= 1:
                raise InvalidValueError(
                    f"a fraction of heads lies in (0, 1], not {n_or_fraction}; a count is an int"
                )
            # Equal scores have no percentile that tells heads apart; `_chosen` says so.
            by_percentile = count == "percentile" and np.ptp(scores) > 0
            fraction = float(n_or_fraction)
            return _at_or_above(scores, fraction) if by_percentile else share_of(fraction, len(scores), count)
        return _number_of_heads(n_or_fraction, len(scores), count)


def _number_of_heads(given: object, total: int, count: Counting) -> int:
    try:
        number_of_heads = whole_number("the number of heads", given)
    except InvalidTypeError:
        raise InvalidTypeError(
            f"expected a number of heads (int) or a fraction (float), not {shown(given)}"
        ) from None
    if not 1 <= number_of_heads <= total:
        raise InvalidValueError(f"a count of heads lies in 1 to {total} (all heads), not {number_of_heads}")
    if count != "nearest":
        raise InvalidValueError(
            f"count={count!r} says how many heads a fraction is, and {number_of_heads} is their number already; "
            "expected a fraction such as 0.05, or no count"
        )
    return number_of_heads


def _at_or_above(scores: Float[np.ndarray, " head"], fraction: float) -> int:
    """How many scores are at or above the percentile above which `fraction` of them lie, at least one."""
    # The percentile lies between two scores, or on one; then rounding must not lift it above.
    place = math.ceil((1 - fraction) * (len(scores) - 1) - 1e-9)
    return int((scores >= np.sort(scores)[place]).sum())


def _warn_of_ties(
    name: str,
    every: Sequence[Head],
    scores: np.ndarray,
    inside: np.ndarray,
    outside: np.ndarray,
    what: str,
) -> None:
    def named(indices: np.ndarray) -> str:
        more = f" and {len(indices) - 8} more" if len(indices) > 8 else ""
        return " ".join(head_name(every[index]) for index in indices[:8]) + more

    shared = sorted({float(scores[index]) for index in inside})
    value = f"{shared[0]:g}" if len(shared) == 1 else "their score"
    warnings.warn(
        f"{name}: {what} of {len(every)} heads cut through a tie. {named(inside)} are among them, "
        f"{named(outside)} are not, and they share {value}: which are taken follows from their numbers alone",
        MmlensWarning,
        stacklevel=4,
    )


def half_mass_share(scores: HeadScores, share: float = 0.5) -> float:
    """rho: the smallest fraction of all heads that holds `share` of the sum of the positive scores.

    Source: rho_0.5 of arXiv 2605.27243, which heads' means over examples enter. 0.05 is a sparse score; half of the
    share of heads with a positive score is the most there can be (all positive scores equal).

    Raises ValueError for a share outside (0, 1], and where no score is positive.

    >>> half_mass_share(HeadScores(torch.tensor([[[5.0, 2.0, 1.0, 1.0, -9.0]]])))  # 5 of 9
    0.2
    """
    instance_of("scores", scores, HeadScores, "HeadScores")
    share = fraction_of("share", share)
    values = scores.values[scores.grid.exists].double()
    positive = values.clamp(min=0).sort(descending=True).values
    if not bool(positive[0] > 0):
        raise InvalidValueError(f"{scores.name}: no head has a positive score, so there is no mass to share")
    held = positive.cumsum(0)
    # A sum that should meet the share exactly may miss it by rounding.
    n = int((held < share * held[-1] * (1 - 1e-12)).sum()) + 1
    return n / len(values)


def share_of(fraction: float, n_heads: int, count: Counting = "nearest") -> int:
    """The whole number of heads nearest to a fraction of `n_heads`, or the next one ("ceiling"), at least 1.

    >>> share_of(0.05, 64), share_of(0.05, 64, "ceiling"), share_of(0.05, 4)
    (3, 4, 1)
    """
    if count != "nearest":
        # Products such as 100 * .07 = 7.000000000000001 are the whole number that they stand for.
        return max(1, math.ceil(fraction * n_heads - 1e-9))
    # 1e-9 lifts products such as 100 * .145 = 14.499999999999998 to the half they stand for.
    return max(1, math.floor(fraction * n_heads + 0.5 + 1e-9))


def _ranks(scores: np.ndarray) -> np.ndarray:
    """0 for the highest along the last axis, ties in order of position."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(scores.shape[-1]), order.shape), axis=-1)
    return ranks
