"""HeadGrid, HeadSet and HeadScores against plain Python sets, scipy, and slow loops."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import mmlens
from mmlens.head_scores import HeadScores
from mmlens.heads import NO_HEAD, HeadGrid, HeadSet, as_head_set

# Type checking makes first calls slow, and the machine may be busy.
unhurried = settings(deadline=None)
shapes = st.tuples(st.integers(1, 6), st.integers(1, 6))


@st.composite
def pairs_of_a_model(draw: st.DrawFn, n: int = 1) -> tuple[tuple[int, int], list[list[tuple[int, int]]]]:
    """A model's (n_layers, n_heads) and `n` lists of its heads."""
    n_layers, n_heads = draw(shapes)
    pairs = st.tuples(st.integers(0, n_layers - 1), st.integers(0, n_heads - 1))
    return (n_layers, n_heads), [draw(st.lists(pairs, unique=True)) for _ in range(n)]


def head_sets(drawn: tuple[tuple[int, int], list[list[tuple[int, int]]]]) -> list[HeadSet]:
    (n_layers, n_heads), lists = drawn
    return [HeadSet(pairs, (n_layers, n_heads)) for pairs in lists]


@st.composite
def score_arrays(draw: st.DrawFn, min_examples: int = 1) -> np.ndarray:
    """[example, layer, head], few different numbers, so that ties are common."""
    shape = (draw(st.integers(min_examples, 5)), *draw(shapes))
    size = int(np.prod(shape))
    numbers = draw(st.lists(st.integers(-3, 3), min_size=size, max_size=size))
    return np.array(numbers, dtype=np.float32).reshape(shape)


def scores_of(array: np.ndarray) -> HeadScores:
    return HeadScores(torch.from_numpy(array))


ties_are_meant = pytest.mark.filterwarnings("ignore:.*cut through a tie")


@pytest.fixture
def as_users_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the tests' type checker, which would refuse a wrong type before mmlens can."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


# ---------------------------------------------------------------------- HeadSet


@unhurried
@given(pairs_of_a_model(n=2))
def test_set_algebra_is_that_of_python_sets(drawn: Any) -> None:
    a, b = head_sets(drawn)
    for combined, expected in (
        (a | b, set(a) | set(b)),
        (a & b, set(a) & set(b)),
        (a - b, set(a) - set(b)),
        (a ^ b, set(a) ^ set(b)),
    ):
        assert set(combined) == expected
        assert len(combined) == len(expected)
    assert (a <= b) == (set(a) <= set(b))
    assert (a < b) == (set(a) < set(b))
    assert (a == b) == (set(a) == set(b))
    if a == b:
        assert hash(a) == hash(b)


@unhurried
@given(pairs_of_a_model())
def test_complement_and_by_layer(drawn: Any) -> None:
    (heads,) = head_sets(drawn)
    everything = {(layer, head) for layer in range(heads.grid.n_layers) for head in range(heads.grid.n_heads)}
    assert set(heads.complement()) == everything - set(heads)
    assert heads.complement().complement() == heads
    assert {(layer, head) for layer, members in heads.by_layer().items() for head in members} == set(heads)
    assert list(heads.by_layer()) == sorted(heads.by_layer())


def test_order_is_kept_and_equality_ignores_it() -> None:
    a = HeadSet([(1, 3), (0, 2)], grid=(2, 4))
    assert list(a) == [(1, 3), (0, 2)]
    assert a == HeadSet([(0, 2), (1, 3)], grid=(2, 4))
    assert list(a | HeadSet([(0, 0), (0, 2)], grid=(2, 4))) == [(1, 3), (0, 2), (0, 0)]
    assert a != HeadSet([(0, 2), (1, 3)], grid=(3, 4))


def test_heads_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        HeadSet([(0, 0)], grid=(1, 1)).heads = ()  # type: ignore[misc]


@unhurried
@given(pairs_of_a_model(), st.integers(0, 2**31))
def test_random_controls_hold_no_member_of_the_set(drawn: Any, seed: int) -> None:
    (heads,) = head_sets(drawn)
    if len(heads.complement()) < len(heads):
        for draw in (heads.random, heads.matched_random):
            with pytest.raises(ValueError, match="not in it"):
                draw(seed)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matched = heads.matched_random(seed)
        assert matched == heads.matched_random(seed)
    for control in (heads.random(seed), matched):
        assert len(control) == len(heads)
        assert not len(control & heads)
    assert heads.random(seed) == heads.random(seed)


@unhurried
@given(pairs_of_a_model(), st.integers(0, 2**31))
def test_matched_random_keeps_the_layers_where_it_can(drawn: Any, seed: int) -> None:
    (heads,) = head_sets(drawn)
    if len(heads.complement()) < len(heads):
        return
    outside = {layer: len(members) for layer, members in heads.complement().by_layer().items()}
    counts = {layer: len(members) for layer, members in heads.by_layer().items()}
    short = {layer for layer, count in counts.items() if outside.get(layer, 0) < count}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        counts_drawn = {
            layer: len(members) for layer, members in heads.matched_random(seed).by_layer().items()
        }
    assert bool(caught) == bool(short)
    if not short:
        assert counts_drawn == counts
    for layer, count in counts.items():
        assert counts_drawn.get(layer, 0) >= min(count, outside.get(layer, 0))


def test_matched_random_takes_the_shortfall_from_the_nearest_layers() -> None:
    crowded = HeadSet([(2, 0), (2, 1), (2, 2)], grid=(5, 4))
    neighbours = set()
    for seed in range(40):
        with pytest.warns(UserWarning, match="2 of layer 2"):
            drawn = crowded.matched_random(seed)
        assert (2, 3) in drawn
        neighbours |= {layer for layer, _ in drawn} - {2}
    assert neighbours == {1, 3}


def test_random_is_uniform_over_the_complement() -> None:
    heads = HeadSet([(0, 0), (1, 1)], grid=(2, 4))
    counts = np.zeros((2, 4))
    for seed in range(1200):
        for head in heads.random(seed):
            counts[head] += 1
    drawn = counts[counts > 0]
    assert counts[0, 0] == counts[1, 1] == 0
    assert len(drawn) == 6
    assert scipy.stats.chisquare(drawn).pvalue > 1e-3


@pytest.mark.parametrize(
    ("heads", "error", "message"),
    [
        ([(2, 0)], IndexError, "layer 2 is out of range; the model has 2 layers"),
        ([(0, 4)], IndexError, "head 4 is out of range; .* of 4 heads"),
        ([(-1, 0)], IndexError, "layer -1"),
        ([(0, 1), (1, 1), (0, 1)], ValueError, r"more than once: \[\(0, 1\)\]"),
        ([], ValueError, "no heads given"),
        ([(0.0, 1.0)], TypeError, "pairs of integers"),
        ([(True, 1)], TypeError, "pairs of integers"),
        ((0, 1), TypeError, r"\[\(layer, head\)\]"),
        ([(0, 1, 1)], TypeError, "pairs of integers"),
        ("L0H1", TypeError, "HeadSet or a list"),
        (7, TypeError, "HeadSet or a list"),
        (HeadSet([(0, 0)], grid=(3, 4)), ValueError, "3 x 4 heads, this model has 2 x 4"),
    ],
)
def test_bad_heads_are_refused(
    as_users_run_it: None, heads: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        as_head_set(heads, (2, 4))  # type: ignore[arg-type]


def test_heads_may_come_as_numpy_integers_or_tensors() -> None:
    expected = HeadSet([(0, 1), (1, 2)], grid=(2, 4))
    assert as_head_set(np.array([[0, 1], [1, 2]]), (2, 4)) == expected
    assert as_head_set(torch.tensor([[0, 1], [1, 2]]), (2, 4)) == expected
    assert all(type(index) is int for head in as_head_set(np.array([[0, 1]]), (2, 4)) for index in head)


# ---------------------------------------------------------------------- HeadScores


@unhurried
@given(score_arrays())
def test_rank_is_the_position_in_a_stable_sort(array: np.ndarray) -> None:
    scores = scores_of(array)
    values = scores.values
    heads = sorted(
        ((layer, head) for layer in range(scores.grid.n_layers) for head in range(scores.grid.n_heads)),
        key=lambda at: (-float(values[at]), at),
    )
    assert [int(scores.rank()[at]) for at in heads] == list(range(len(heads)))


@unhurried
@ties_are_meant
@given(score_arrays(), st.data())
def test_top_and_bottom_are_the_two_ends_of_the_ranking(array: np.ndarray, data: st.DataObject) -> None:
    scores = scores_of(array)
    total = scores.grid.n_layers * scores.grid.n_heads
    count = data.draw(st.integers(1, total))
    assume(float(np.ptp(scores.values.numpy())) > 0)
    top, bottom = scores.top(count), scores.bottom(count)
    assert [int(scores.rank()[head]) for head in top] == list(range(count))
    assert [int(scores.rank()[head]) for head in bottom] == list(range(total - 1, total - 1 - count, -1))
    if count < total:
        assert top.complement() == scores.bottom(total - count)
        assert top < scores.top(count + 1)


@pytest.mark.parametrize(
    ("shape", "fraction", "count"),
    [
        ((8, 8), 0.05, 3),
        ((36, 32), 0.05, 58),
        ((28, 28), 0.05, 39),
        ((2, 2), 0.05, 1),
        ((2, 2), 1.0, 4),
        ((2, 2), 0.375, 2),
        ((10, 10), 0.145, 15),
    ],
)
def test_a_fraction_is_the_nearest_count_of_at_least_one(
    shape: tuple[int, int], fraction: float, count: int
) -> None:
    scores = HeadScores(torch.rand(1, *shape))
    assert len(scores.top(fraction)) == len(scores.bottom(fraction)) == count
    assert len(scores.top(1)) == 1


@pytest.mark.parametrize(
    ("n", "error"),
    [(0, ValueError), (5, ValueError), (0.0, ValueError), (1.5, ValueError), (True, TypeError)],
)
def test_impossible_counts_are_refused(n: float, error: type[Exception]) -> None:
    with pytest.raises(error):
        HeadScores(torch.rand(1, 2, 2)).top(n)


@unhurried
@given(score_arrays(), st.integers(0, 2**31))
def test_spearman_is_scipys_on_the_flattened_scores(array: np.ndarray, seed: int) -> None:
    scores = scores_of(array)
    other = HeadScores(
        torch.rand(3, scores.grid.n_layers, scores.grid.n_heads, generator=torch.manual_seed(seed))
    )
    a, b = scores.per_example.double().mean(0).float().flatten(), other.values.flatten()
    if len(set(a.tolist())) == 1:
        with pytest.raises(ValueError, match="undefined"):
            scores.spearman(other)
    else:
        assert scores.spearman(other) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
        assert scores.spearman(scores) == pytest.approx(1)


def test_spearman_refuses_another_shape() -> None:
    with pytest.raises(ValueError, match="2 x 2 heads"):
        HeadScores(torch.rand(1, 2, 2)).spearman(HeadScores(torch.rand(1, 2, 3)))


@settings(max_examples=20, deadline=None)
@given(score_arrays(min_examples=2), st.integers(0, 2**31))
def test_rank_interval_equals_a_loop_over_resamples(array: np.ndarray, seed: int) -> None:
    scores = scores_of(array)
    n = len(scores)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=30)
    ranks = []
    for count in counts:
        drawn = np.repeat(np.arange(n), count)
        # Sums of whole numbers are exact, so ties are ties here too.
        sums = scores.per_example[drawn].double().sum(0).flatten().tolist()
        order = sorted(range(len(sums)), key=lambda at: (-sums[at], at))
        ranks.append([order.index(at) for at in range(len(sums))])
    low, high = scores.rank_interval(0.8, n_resamples=30, seed=seed)
    expected = np.sort(ranks, axis=0)
    np.testing.assert_array_equal(low.flatten(), expected[int(np.floor(0.1 * 29))])
    np.testing.assert_array_equal(high.flatten(), expected[int(np.ceil(0.9 * 29))])


def test_rank_interval_is_narrow_where_the_examples_agree_and_wide_where_they_do_not() -> None:
    generator = torch.manual_seed(0)
    firm = torch.arange(16.0).reshape(1, 4, 4) + 0.01 * torch.randn(50, 4, 4, generator=generator)
    low, high = HeadScores(firm).rank_interval()
    assert torch.equal(low, high)
    low, high = HeadScores(torch.randn(50, 4, 4, generator=generator)).rank_interval()
    assert float((high - low).float().mean()) > 5


def test_rank_interval_of_one_example_is_refused_and_missing_from_the_table() -> None:
    scores = HeadScores(torch.rand(1, 2, 2))
    with pytest.raises(ValueError, match="at least 2 examples"):
        scores.rank_interval()
    assert scores.table()[["rank_low", "rank_high", "standard_error"]].isna().all().all()


def test_table_holds_every_head_once_best_first() -> None:
    scores = HeadScores(torch.rand(6, 3, 4, generator=torch.manual_seed(1)))
    table = scores.table()
    assert list(table.columns) == [
        "layer",
        "head",
        "score",
        "standard_error",
        "rank",
        "rank_low",
        "rank_high",
    ]
    assert list(table["rank"]) == list(range(12))
    assert list(zip(table["layer"], table["head"], strict=True)) == list(scores.top(12))
    assert ((table["rank_low"] <= table["rank"]) & (table["rank"] <= table["rank_high"])).all()
    layer, head = scores.top(1).heads[0]
    expected = scipy.stats.sem(scores.per_example[:, layer, head].double())
    assert table["standard_error"][0] == pytest.approx(expected)


def test_select_and_stability() -> None:
    per_example = torch.tensor([[[9.0, 1.0], [0.0, 2.0]], [[8.0, 1.0], [0.0, 2.0]], [[1.0, 0.0], [9.0, 2.0]]])
    scores = HeadScores(per_example, kinds=("page", "page", "clip"))
    assert torch.equal(scores.select("page").per_example, per_example[:2])
    assert scores.select("clip").top(1).heads == ((1, 0),)
    assert scores.stability(1).tolist() == [[1, 0], [1, 0]]
    assert scores.stability(2).tolist() == [[1, 0], [1, 2]]
    with pytest.raises(ValueError, match=r"no example of kind 'frame'; kinds are \['clip', 'page'\]"):
        scores.select("frame")
    with pytest.raises(ValueError, match="no kinds"):
        HeadScores(per_example).select("page")


@pytest.mark.parametrize("kinds", [None, ("a", "b", "a")])
def test_save_and_load_are_inverse(tmp_path: Path, kinds: tuple[str, ...] | None) -> None:
    scores = HeadScores(torch.rand(3, 2, 4), name="RAM", kinds=kinds)
    scores.save(tmp_path / "scores.parquet")
    loaded = HeadScores.load(tmp_path / "scores.parquet")
    assert torch.equal(loaded.per_example, scores.per_example)
    assert loaded.per_example.dtype == torch.float32
    assert (loaded.name, loaded.kinds) == ("RAM", kinds)


def test_load_refuses_an_incomplete_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    HeadScores(torch.rand(2, 2, 2)).save(path)
    frame = pd.read_parquet(path)
    frame.drop(index=3).to_parquet(path)
    with pytest.raises(ValueError, match="7 rows, expected 8"):
        HeadScores.load(path)
    frame.drop(columns="head").to_parquet(path)
    with pytest.raises(ValueError, match=r"no column \['head'\]"):
        HeadScores.load(path)


@pytest.mark.parametrize(
    ("values", "kinds", "message"),
    [
        (torch.zeros(0, 2, 2), None, "at least one"),
        (torch.zeros(2, 2), None, r"\[example, layer, head\]"),
        (torch.zeros(1, 2, 2, dtype=torch.int64), None, "floating-point"),
        (torch.full((1, 2, 2), torch.nan), None, r"head \(0, 0\) in example 0 is NaN"),
        (torch.zeros(2, 2, 2), ("a",), "1 kinds for 2 examples"),
    ],
)
def test_bad_scores_are_refused(
    as_users_run_it: None, values: torch.Tensor, kinds: tuple[str, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        HeadScores(values, kinds=kinds)


# ---------------------------------------------------------------------- models whose layers differ in heads


@st.composite
def uneven_models(draw: st.DrawFn) -> tuple[tuple[int, ...], int]:
    """What a HeadGrid is made of: layers without heads, and layers with fewer than others."""
    n_layers, n_heads = draw(shapes)
    per_layer = draw(st.lists(st.integers(0, n_heads), min_size=n_layers, max_size=n_layers).filter(any))
    return tuple(per_layer), n_heads


def existing(grid: HeadGrid) -> list[tuple[int, int]]:
    return [(layer, head) for layer, count in enumerate(grid.heads_per_layer) for head in range(count)]


def uneven_scores(grid: HeadGrid, n: int, seed: int) -> HeadScores:
    """Few different numbers, so that ties are common; NaN where there is no head."""
    drawn = np.random.default_rng(seed).integers(-3, 4, (n, *grid.shape)).astype(np.float32)
    for layer, count in enumerate(grid.heads_per_layer):
        drawn[:, layer, count:] = np.nan
    return HeadScores(torch.from_numpy(drawn), grid=grid)


@unhurried
@given(uneven_models(), st.data())
def test_no_set_ever_holds_a_head_that_does_not_exist(model: Any, data: st.DataObject) -> None:
    grid = HeadGrid(*model)
    every = existing(grid)
    a, b = (HeadSet(data.draw(st.lists(st.sampled_from(every), unique=True)), grid) for _ in range(2))
    assert list(HeadSet.every(grid)) == list(grid.heads) == every
    assert set(a.complement()) == set(every) - set(a) and a.complement().complement() == a
    for combined, expected in (
        (a | b, set(a) | set(b)),
        (a & b, set(a) & set(b)),
        (a - b, set(a) - set(b)),
        (a ^ b, set(a) ^ set(b)),
    ):
        # The model's heads come along: a second complement is again of those alone.
        assert set(combined) == expected and set(combined.complement()) == set(every) - expected
    seed = data.draw(st.integers(0, 2**31))
    if 2 * len(a) > len(every):
        for draw in (a.random, a.matched_random):
            with pytest.raises(ValueError, match=f"of the model's {len(every)} heads only"):
                draw(seed)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        controls = a.random(seed), a.matched_random(seed)
    for control in controls:
        assert len(control) == len(a) and set(control) <= set(every) - set(a)
        assert set(control.complement()) == set(every) - set(control)


@unhurried
@ties_are_meant
@given(uneven_models(), st.integers(0, 2**31), st.data())
def test_scores_rank_only_the_heads_that_exist(model: Any, seed: int, data: st.DataObject) -> None:
    grid = HeadGrid(*model)
    every = existing(grid)
    scores = uneven_scores(grid, 4, seed)
    assert scores.grid == grid
    assume(len(every) == 1 or np.ptp(scores.values[scores.grid.exists].numpy()) > 0)
    values = scores.per_example.double().mean(0)
    best_first = sorted(every, key=lambda at: (-float(values[at]), at))
    count = data.draw(st.integers(1, len(every)))
    assert list(scores.top(count)) == best_first[:count]
    assert list(scores.bottom(count)) == best_first[::-1][:count]
    assert list(scores.top(1.0)) == best_first
    assert len(scores.top(0.05)) == max(1, int(np.floor(0.05 * len(every) + 0.5)))
    assert set(scores.top(count).complement()) == set(best_first[count:])
    with pytest.raises(ValueError, match=f"lies in 1 to {len(every)} "):
        scores.top(len(every) + 1)
    rank, (low, high) = scores.rank(), scores.rank_interval(n_resamples=20)
    for layer, head in np.ndindex(*grid.shape):
        expected = best_first.index((layer, head)) if (layer, head) in every else -1
        assert int(rank[layer, head]) == expected
        assert (int(low[layer, head]) >= 0) == (int(high[layer, head]) >= 0) == ((layer, head) in every)
    table = scores.table(n_resamples=20)
    assert list(zip(table["layer"], table["head"], strict=True)) == best_first
    assert not table.isna().any().any()


def test_uneven_scores_by_kind_and_between_scores() -> None:
    """Four heads in two of three layers: the same numbers as in a full grid of these heads alone."""
    full = torch.rand(6, 2, 2, generator=torch.manual_seed(3))
    uneven = torch.cat([full[:, :1], torch.full((6, 1, 2), torch.nan), full[:, 1:]], dim=1)
    kinds = ("a", "a", "b", "b", "c", "c")
    one, other = HeadScores(full, kinds=kinds), HeadScores(uneven, kinds=kinds, grid=HeadGrid((2, 0, 2)))
    rows = [0, 2]
    for read in (
        lambda s: s.values,
        lambda s: s.rank(),
        lambda s: s.rank_interval()[0],
        lambda s: s.rank_interval()[1],
        lambda s: s.stability(1),
    ):
        assert torch.equal(read(other)[rows], read(one))
    assert other.values[1].isnan().all() and (other.stability(1)[1] == -1).all()
    rho = one.select("a").spearman(one.select("b"))
    assert other.select("a").spearman(other.select("b")) == rho
    for column in ("score", "standard_error", "rank", "rank_low", "rank_high"):
        assert one.table()[column].tolist() == other.table()[column].tolist()
    assert repr(other) == "HeadScores(score: 4 heads in 2 of 3 layers, 6 examples)"
    with pytest.raises(ValueError, match="is of 4 heads in 2 of 3 layers, score of 3 x 2 heads"):
        other.spearman(HeadScores(torch.rand(2, 3, 2)))


def test_saving_keeps_which_heads_exist(tmp_path: Path) -> None:
    """The first and last layers have no heads, and no layer has as many as the grid is wide."""
    grid = HeadGrid((0, 1, 2, 0), n_heads=3)
    scores = HeadScores(uneven_scores(grid, 3, 0).per_example, name="RAM", kinds=("x", "y", "x"), grid=grid)
    scores.save(tmp_path / "scores.parquet")
    loaded = HeadScores.load(tmp_path / "scores.parquet")
    torch.testing.assert_close(loaded.per_example, scores.per_example, rtol=0, atol=0, equal_nan=True)
    assert loaded.grid == scores.grid == grid
    assert loaded.top(1) == scores.top(1) and loaded.kinds == scores.kinds


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ((0, 1), r"head \(0, 1\): layer 0 has no softmax attention; layers with heads: 1, 2$"),
        ((2, 2), r"head \(2, 2\): head 2 is out of range; layer 2 has 2 heads \(0 to 1\)$"),
        ((1, 4), r"head 4 is out of range; layer 1 has 4 heads"),
        ((1, -1), r"head -1 is out of range"),
        ((3, 0), r"layer 3 is out of range; the model has 3 layers \(0 to 2\)$"),
    ],
)
def test_a_head_that_does_not_exist_is_named_with_the_reason(head: tuple[int, int], message: str) -> None:
    grid = HeadGrid((0, 4, 2))
    with pytest.raises(IndexError, match=message):
        HeadSet([head], grid)
    with pytest.raises(IndexError, match=message):
        as_head_set([(1, 0), head], grid)


def test_a_set_made_for_the_full_grid_is_checked_against_the_model() -> None:
    full, grid = HeadSet([(0, 1)], grid=(3, 4)), HeadGrid((0, 4, 2))
    with pytest.raises(IndexError, match="layer 0 has no softmax attention"):
        as_head_set(full, grid)
    taken = as_head_set(HeadSet([(1, 1)], grid=(3, 4)), grid)
    assert len(taken.complement()) == 5
    assert as_head_set(taken, grid) == taken != HeadSet([(1, 1)], grid=(3, 4))
    with pytest.raises(ValueError, match="6 heads in 2 of 3 layers and 3 x 4 heads"):
        taken | full


def test_a_grid_counts_its_heads_and_fills_arrays_where_they_are() -> None:
    grid = HeadGrid((0, 3, 1), n_heads=4)
    assert (grid.shape, len(grid), grid.layers, grid.is_full) == ((3, 4), 4, [1, 2], False)
    assert (
        grid.exists.nonzero().tolist()
        == [list(head) for head in grid.heads]
        == [[1, 0], [1, 1], [1, 2], [2, 0]]
    )
    assert HeadGrid((0, 3, 1)).n_heads == 3 and HeadGrid.of((2, 3)) == HeadGrid((3, 3)) != HeadGrid((3, 3), 4)
    values = torch.arange(8.0).reshape(2, 4)
    filled = grid.filled(values)
    assert torch.equal(filled[:, grid.exists], values) and filled[:, ~grid.exists].isnan().all()
    ranks = grid.filled(np.array([3, 1, 2, 0]), NO_HEAD)
    assert ranks.dtype == torch.int64 and ranks.tolist() == [[-1] * 4, [3, 1, 2, -1], [0, -1, -1, -1]]
    assert grid.full(5, fill=2).nan_to_num(-1).sum() == 5 * (2 * 4 - 8) and grid.full().isnan().all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: HeadGrid((0, 5, 2), 4), ValueError, "heads_per_layer is a number from 0 to n_heads=4 for each"),
        (lambda: HeadGrid((0, 0, 0), 4), ValueError, r"one at least above 0; got \(0, 0, 0\)"),
        (lambda: HeadGrid((0, -1, 2)), ValueError, r"heads_per_layer\[1\] is -1"),
        (lambda: HeadGrid(()), ValueError, "no heads_per_layer given"),
        (lambda: HeadGrid(4), TypeError, "heads_per_layer is 4"),  # type: ignore[arg-type]
        (lambda: HeadGrid.of((3, 4, 4)), ValueError, r"expected a HeadGrid \(model.grid\), or \(n_layers, n_heads\)"),  # type: ignore[arg-type]
        (lambda: HeadGrid.of((0, 4)), ValueError, "n_layers is 0"),
        (lambda: HeadSet([], 4), TypeError, "grid is 4"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_a_grid_that_no_model_has_is_refused(
    as_users_run_it: None, make: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_nan_is_an_error_wherever_a_head_exists() -> None:
    """Only the grid says that a head is missing: not that its scores are, wherever it stands."""
    scores = torch.rand(2, 2, 3)
    scores[:, 1, 1:] = torch.nan
    assert HeadScores(scores, grid=HeadGrid((3, 1))).top(1.0).by_layer()[1] == [0]
    with pytest.raises(ValueError, match=r"head \(1, 1\) in example 0 is NaN; .*grid=model.grid"):
        HeadScores(scores)
    with pytest.raises(ValueError, match=r"score of head \(1, 1\) in example 0 is NaN$"):
        HeadScores(scores, grid=HeadGrid((3, 2)))
    with pytest.raises(ValueError, match=r"head \(0, 2\) has a score in example 0, but layer 0 has 2 heads"):
        HeadScores(scores, grid=HeadGrid((2, 1), n_heads=3))
    with pytest.raises(ValueError, match="scores of 2 layers x 3 heads, the grid has 3 x 3"):
        HeadScores(scores, grid=(3, 3))
    for example, layer, head in ((1, 0, 2), (slice(None), 0, 1), (slice(None), 1, 2), (slice(None), 0, 0)):
        one = torch.rand(2, 2, 3)
        one[example, layer, head] = torch.nan
        with pytest.raises(ValueError, match=rf"score of head \({layer}, {head}\) in example . is NaN"):
            HeadScores(one)


def test_a_saved_nan_is_never_taken_for_a_head_that_there_is_not(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    HeadScores(torch.rand(2, 2, 3), name="RAM").save(path)
    frame = pd.read_parquet(path)
    frame.loc[(frame["layer"] == 1) & (frame["head"] == 2), "score"] = np.nan
    frame.to_parquet(path)
    with pytest.raises(ValueError, match=r"head \(1, 2\) in example 0 is NaN"):
        HeadScores.load(path)
    # A file that does not say which heads there are: the caller may.
    frame.drop(columns="heads_in_layer").to_parquet(path)
    with pytest.raises(ValueError, match=r"head \(1, 2\) in example 0 is NaN"):
        HeadScores.load(path)
    assert HeadScores.load(path, grid=HeadGrid((3, 2))).grid == HeadGrid((3, 2))
    uneven_scores(HeadGrid((3, 1)), 2, 0).save(path)
    assert HeadScores.load(path).grid == HeadGrid((3, 1))
    assert HeadScores.load(path, grid=HeadGrid((3, 1))).grid == HeadGrid((3, 1))
    with pytest.raises(ValueError, match=r"with \(3, 1\) heads in its layers, not \(3, 2\)"):
        HeadScores.load(path, grid=HeadGrid((3, 2)))
    HeadScores(torch.rand(1, 2, 3)).save(path)
    pd.read_parquet(path).drop(columns="heads_in_layer").to_parquet(path)
    assert HeadScores.load(path).grid == HeadGrid((3, 3))


# ---------------------------------------------------------------------- how many heads a fraction is


@pytest.mark.parametrize(
    ("n_heads", "nearest", "others"), [(64, 3, 4), (768, 38, 39), (784, 39, 40), (1152, 58, 58), (100, 5, 5)]
)
def test_five_percent_of_the_heads_by_each_count(n_heads: int, nearest: int, others: int) -> None:
    """768 heads are those of gemma-3-12b, 38.4 of them 5%: its published lists hold 39."""
    generator = torch.Generator().manual_seed(n_heads)
    scores = HeadScores(torch.randperm(n_heads, generator=generator).float().reshape(1, 4, -1))
    assert len(scores.top(0.05)) == len(scores.top(0.05, count="nearest")) == nearest
    for choose in (scores.top, scores.bottom, scores.top_spread):
        assert len(choose(0.05, count="ceiling")) == len(choose(0.05, count="percentile")) == others
    assert scores.top(0.05, count="ceiling").heads[:nearest] == scores.top(0.05).heads
    assert scores.bottom(0.05, count="percentile").heads[:nearest] == scores.bottom(0.05).heads


@unhurried
@ties_are_meant
@given(score_arrays(), st.integers(1, 20).map(lambda part: part / 20))
def test_percentiles_are_numpys_and_keep_equal_scores_together(array: np.ndarray, fraction: float) -> None:
    scores = scores_of(array)
    values = scores.values.numpy().ravel()
    assume(float(np.ptp(values)) > 0)
    # NumPy may miss by rounding a percentile that is a score.
    above = values >= np.percentile(values, 100 * (1 - fraction)) - 1e-6
    below = values <= np.percentile(values, 100 * fraction) + 1e-6
    top, bottom = scores.top(fraction, count="percentile"), scores.bottom(fraction, count="percentile")
    for chosen, expected in ((top, above), (bottom, below)):
        assert [head in chosen for head in scores.grid.heads] == expected.tolist()
    ceiling = scores.top(fraction, count="ceiling")
    assert len(ceiling) == max(1, int(np.ceil(fraction * len(values) - 1e-9)))


def test_counts_on_ties() -> None:
    """Of 20 heads two share the highest score: the 95th percentile is it, and both are at it."""
    scores = HeadScores(torch.tensor([[[5.0, 5.0, *range(18)]]]).clamp(max=5))
    spread = HeadScores(torch.tensor([[[9.0, 9.0, *[float(i) / 20 for i in range(18)]]]]))
    assert spread.top(0.05, count="percentile").heads == ((0, 0), (0, 1))
    with pytest.warns(mmlens.MmlensWarning, match="cut through a tie"):
        assert spread.top(0.05, count="ceiling").heads == ((0, 0),)
    assert len(scores.top(0.05, count="percentile")) == int((scores.values == 5).sum())
    kinds = HeadScores(spread.per_example.repeat(2, 1, 1), kinds=("a", "b"))
    assert kinds.stability(0.05, count="percentile").flatten().tolist() == [2, 2, *[0] * 18]


def test_a_count_beside_a_number_of_heads_is_refused(as_users_run_it: None) -> None:
    scores = HeadScores(torch.rand(1, 4, 5))
    with pytest.raises(ValueError, match="count='ceiling' says how many heads a fraction is, and 3 is"):
        scores.top(3, count="ceiling")
    with pytest.raises(ValueError, match="there is no count 'ceil'.*'ceiling'"):
        scores.top(0.05, count="ceil")
    with pytest.raises(ValueError, match="is 1 for each of the 20 heads"):
        HeadScores(torch.ones(1, 4, 5)).top(0.05, count="percentile")
    assert len(HeadScores(torch.ones(1, 4, 5)).top(1.0, count="percentile")) == 20


# ---------------------------------------------------------------------- ties


def test_scores_that_are_all_alike_choose_no_head() -> None:
    """Counts that are 0 for every head, as copying is where nothing is copied."""
    choices: list[Callable[[HeadScores], Any]] = [
        lambda scores: scores.top(0.05),
        lambda scores: scores.bottom(3),
        lambda scores: scores.top_spread(4),
        lambda scores: scores.stability(0.05),
        lambda scores: scores.select("a").top(1),
    ]
    for value in (0.0, 0.25):
        nothing = HeadScores(torch.full((3, 4, 5), value), name="copy score", kinds=("a", "a", "b"))
        for choose in choices:
            with pytest.raises(ValueError, match=rf"copy score is {value:g} for each of the 20 heads"):
                choose(nothing)
        # All of them are no choice, and ranks and tables stay what they were.
        assert len(nothing.top(1.0)) == len(nothing.bottom(20)) == len(nothing.top_spread(20)) == 20
        assert nothing.rank().flatten().tolist() == list(range(20))
    uneven = HeadScores(torch.tensor([[[0.0, torch.nan], [0.0, 0.0]]]), grid=HeadGrid((1, 2)))
    with pytest.raises(ValueError, match="is 0 for each of the 3 heads"):
        uneven.top(1)
    assert len(HeadScores(torch.zeros(1, 1, 1)).top(1)) == 1


def test_a_cut_through_a_tie_is_warned_of_with_the_heads() -> None:
    scores = HeadScores(torch.tensor([[[3.0, 0.0, 0.0], [0.0, 2.0, 1.0]]]), name="visual head score")
    said = (
        "the 4 highest of 6 heads cut through a tie. L0H1 are among them, L0H2 L1H0 are not, and they share 0"
    )
    with pytest.warns(mmlens.MmlensWarning, match=said):
        assert scores.top(4).heads == ((0, 0), (1, 1), (1, 2), (0, 1))
    with pytest.warns(
        mmlens.MmlensWarning, match="the 1 lowest of 6 .* L1H0 are among them, L0H1 L0H2 are not"
    ):
        assert scores.bottom(1).heads == ((1, 0),)
    with pytest.warns(mmlens.MmlensWarning, match="cut through a tie"):
        HeadScores(scores.per_example, kinds=("a",)).stability(4)
    many = HeadScores(torch.cat([torch.rand(1, 1, 10) + 1, torch.zeros(1, 3, 10)], dim=1))
    with pytest.warns(
        mmlens.MmlensWarning, match=r"L1H0 L1H1 are among them, L1H2 .* L1H9 and 20 more are not"
    ):
        many.top(12)


def test_ties_that_the_cut_does_not_go_through_are_no_matter() -> None:
    """Warnings are errors here."""
    scores = HeadScores(torch.tensor([[[3.0, 0.0, 0.0], [0.0, 2.0, 2.0]]]))
    assert scores.top(3).heads == ((0, 0), (1, 1), (1, 2))
    assert scores.bottom(3).heads == ((1, 0), (0, 2), (0, 1))
    assert len(scores.top(6)) == len(scores.bottom(1.0)) == 6
    assert scores.top(1).heads == ((0, 0),)


def test_spread_heads_warn_where_another_choice_is_as_good() -> None:
    """Of two heads of one layer, or of the last turn, one is taken and its equal is not."""
    within = HeadScores(torch.tensor([[[3.0, 3.0], [1.0, 2.0]]]))
    with pytest.warns(mmlens.MmlensWarning, match="L0H0 are among them, L0H1 are not"):
        assert within.top_spread(2).heads == ((0, 0), (1, 1))
    between = HeadScores(torch.tensor([[[3.0, 1.0], [4.0, 1.0]]]))
    with pytest.warns(mmlens.MmlensWarning, match="L0H1 are among them, L1H1 are not"):
        assert between.top_spread(3).heads == ((1, 0), (0, 0), (0, 1))
    # Equal scores of other turns and layers could not stand in for each other.
    apart = HeadScores(torch.tensor([[[3.0, 2.0], [2.0, 1.0]]]))
    assert apart.top_spread(2).heads == ((0, 0), (1, 0))


def test_heads_of_a_model_with_other_layers_are_refused() -> None:
    """Sets that say which heads there are; one of the full grid says nothing."""
    hybrid = HeadSet([(1, 0)], HeadGrid((0, 4, 2)))
    assert as_head_set(hybrid, HeadGrid((0, 4, 2))) == hybrid
    for per_layer in ((0, 4, 4), (4, 4, 4)):
        with pytest.raises(ValueError, match=r"heads are of another model: it has \(0, 4, 2\) heads in its"):
            as_head_set(hybrid, HeadGrid(per_layer))
