"""The head map's cells, ticks and outlines are the numbers and heads given."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mmlens.head_scores import HeadScores
from mmlens.heads import HeadGrid, HeadSet
from mmlens.viz.head_map import plot_head_map


def mesh(figure: Figure) -> QuadMesh:
    (found,) = [artist for artist in figure.axes[0].collections if isinstance(artist, QuadMesh)]
    return found


def outlined(figure: Figure) -> set[tuple[int, int]]:
    frames = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    return {(round(frame.get_y() + 0.5), round(frame.get_x() + 0.5)) for frame in frames}


@pytest.mark.parametrize("shape", [(8, 8), (36, 32), (1, 1), (3, 40)])
def test_each_cell_has_its_score_at_its_layer_and_head(shape: tuple[int, int]) -> None:
    values = np.random.default_rng(0).gamma(0.3, size=shape)
    figure = plot_head_map(values)
    cells = mesh(figure)
    assert np.array_equal(np.asarray(cells.get_array()).reshape(shape), values)
    corners = cells.get_coordinates()
    layer, head = shape[0] - 1, shape[1] - 1
    assert corners[layer, head].tolist() == [head - 0.5, layer - 0.5]
    # Layer 0 is the bottom row: y grows upwards.
    assert figure.axes[0].get_ylim()[0] < figure.axes[0].get_ylim()[1]
    assert max(len(figure.axes[0].get_xticks()), len(figure.axes[0].get_yticks())) <= 16


def test_scores_are_the_mean_over_examples_and_name_the_colour_bar() -> None:
    scores = HeadScores(torch.rand(5, 3, 4, dtype=torch.float64), name="RAM")
    figure = plot_head_map(scores, title="every head")
    drawn = np.asarray(mesh(figure).get_array()).reshape(3, 4)
    assert np.allclose(drawn, scores.per_example.numpy().mean(0), atol=1e-12)
    assert figure.axes[1].get_ylabel() == "RAM"
    assert figure.axes[0].get_title(loc="left") == "every head"


def test_marked_heads_and_no_others_are_outlined() -> None:
    scores = HeadScores(torch.rand(2, 36, 32), name="RAM")
    chosen = scores.top(0.05)
    assert outlined(plot_head_map(scores, heads=chosen)) == set(chosen)
    assert outlined(plot_head_map(scores)) == set()


def test_colours_start_at_zero_and_signed_scores_are_white_at_zero() -> None:
    plain, signed = mesh(plot_head_map(np.array([[0.2, 0.6]]))), mesh(plot_head_map(np.array([[-0.2, 0.6]])))
    assert (plain.norm.vmin, plain.norm.vmax) == (0, 0.6)
    assert signed.norm(0.0) == 0.5
    assert signed.cmap(signed.norm(0.0))[:3] == pytest.approx((0.97, 0.97, 0.97), abs=0.02)


def test_it_draws_into_given_axes_and_shows_in_a_notebook() -> None:
    figure = Figure()
    left, _ = figure.subplots(1, 2)
    assert plot_head_map(np.zeros((2, 2)), ax=left) is figure
    picture = plot_head_map(np.ones((2, 2)))
    assert picture._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


def test_bad_scores_and_heads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[layer, head\].*\[3\]"):
        plot_head_map(np.zeros(3))
    with pytest.raises(ValueError, match=r"head \(1, 0\) is nan"):
        plot_head_map(np.array([[0.0], [np.nan]]))
    other = HeadSet([(0, 0)], grid=(3, 2))
    with pytest.raises(ValueError, match=r"3 x 2 heads.*2 x 2"):
        plot_head_map(np.zeros((2, 2)), heads=other)
    with pytest.raises(TypeError, match="HeadSet"):
        plot_head_map(np.zeros((2, 2)), heads=[(0, 0)])  # type: ignore[arg-type]


def test_cells_without_a_head_are_hatched_and_nothing_else() -> None:
    values = torch.rand(3, 4, 3, dtype=torch.float64)
    values[:, 1], values[:, 3, 2:] = torch.nan, torch.nan
    scores = HeadScores(values, name="RAM", grid=HeadGrid((3, 0, 3, 2)))
    figure = plot_head_map(scores, heads=scores.top(2))
    drawn = mesh(figure).get_array()
    assert drawn is not None
    absent = np.ma.getmaskarray(drawn).reshape(4, 3)
    assert np.array_equal(absent, ~scores.grid.exists.numpy())
    assert np.allclose(drawn.reshape(4, 3)[~absent], scores.values.numpy()[~absent])
    assert mesh(figure).norm.vmax == pytest.approx(float(scores.values[scores.grid.exists].max()))
    (hatched,) = [artist for artist in figure.axes[0].collections if artist.get_gid() == "absent"]
    corners = [path.get_extents() for path in hatched.get_paths()]
    cells = {(round(box.y0 + 0.5), round(box.x0 + 0.5)) for box in corners}
    assert cells == {(1, 0), (1, 1), (1, 2), (3, 2)} and hatched.get_hatch()
    legend = figure.axes[0].get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["no such head"]
    figure.savefig(io.BytesIO())
    full = plot_head_map(HeadScores(torch.rand(2, 3, 3)))
    assert full.axes[0].get_legend() is None and len(full.axes[0].collections) == 1
    with pytest.raises(IndexError, match=r"marked heads \[\(1, 0\)\] have no score"):
        plot_head_map(scores, heads=HeadSet([(1, 0)], grid=(4, 3)))
