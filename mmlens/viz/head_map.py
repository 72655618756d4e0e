"""The layer x head grid of a score: which heads stand out, and where in the model they are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import matplotlib.patheffects
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mmlens.arguments import array_of
from mmlens.errors import InvalidTypeError, InvalidValueError, OutOfRangeError
from mmlens.head_scores import HeadScores
from mmlens.heads import HeadSet
from mmlens.viz.style import (
    INK,
    PAPER,
    TICK_SIZE,
    bare,
    colour_bar,
    colours_of,
    name_axes,
    new_figure,
    root_figure,
)

if TYPE_CHECKING:
    from matplotlib.collections import QuadMesh

MARK = "#d55e00"
"""Outline of marked heads: the colour that the top heads have in every figure."""

ABSENT = "#b8c0c8"
"""Hatching of cells at which the model has no head."""

_MOST_TICKS = 16


def plot_head_map(
    scores: HeadScores | Tensor | ArrayLike,
    *,
    heads: HeadSet | None = None,
    title: str = "",
    label: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """One cell per head, coloured by its score; layer 0 is the bottom row, as the stream flows upwards.

    `scores` are HeadScores (their mean over examples is drawn, their name is on the colour bar) or an array
    [layer, head]; `label` names the quantity instead. The heads of `heads` are outlined. Scores that are all
    >= 0 are drawn from 0 in one hue, others from blue (below 0) to red, white at 0. Cells of HeadScores at which
    the model has no head are hatched, and a note below says so.

    Raises ValueError for another shape than [layer, head], a score that is not finite, or `heads` of a model
    of another shape; IndexError where one of `heads` has no score; TypeError where `heads` is no HeadSet.

    >>> figure = plot_head_map(np.array([[.1, .6], [.2, .3]]), label="RAM", title="two layers of two heads")
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['Layer', 'RAM']
    """
    values, exists = _checked_scores(scores)
    if heads is not None:
        _check_heads(heads, exists)
    if label is None:
        label = scores.name if isinstance(scores, HeadScores) else "score"
    n_layers, n_heads = values.shape
    if ax is None:
        cell = min(0.42, 8.0 / max(n_layers, n_heads))
        figure = new_figure(max(3.2, cell * n_heads + 1.6), max(2.4, cell * n_layers + 1.0), pictures=True)
        ax = figure.subplots()
    else:
        figure = root_figure(ax)

    drawn = values[exists]
    # Equal scores still need two ends of the colour bar.
    colours, norm = colours_of(drawn, np.abs(drawn).max() or 1.0)
    mesh: QuadMesh = ax.pcolormesh(
        np.arange(n_heads + 1) - 0.5,
        np.arange(n_layers + 1) - 0.5,
        np.ma.masked_array(values, ~exists),
        cmap=colours,
        norm=norm,
        edgecolors=PAPER,
        linewidth=0.6 if max(values.shape) <= 16 else 0.2 if max(values.shape) <= 48 else 0,
    )
    ax.set_aspect("equal")
    if not exists.all():
        _hatch(ax, ~exists)
    if heads is not None:
        _outline(ax, heads)
    bare(ax)
    ax.set_xticks(_ticks(n_heads, max(values.shape)))
    ax.set_yticks(_ticks(n_layers, max(values.shape)))
    name_axes(ax, x="Head", y="Layer", title=title)
    colour_bar(figure, mesh, ax, label, pad=0.03, aspect=max(12.0, 6.0 * figure.get_figheight()))
    return figure


def _checked_scores(
    scores: HeadScores | Tensor | ArrayLike,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Scores [layer, head], and at which of them there is a head."""
    if isinstance(scores, HeadSet):
        raise InvalidTypeError(
            "scores is a HeadSet; expected HeadScores or an array [layer, head] (heads=... marks)"
        )
    values = array_of("scores", scores.values if isinstance(scores, HeadScores) else scores, None)
    if values.ndim != 2 or 0 in values.shape:
        raise InvalidValueError(
            f"a head map takes scores [layer, head], not an array of shape {list(values.shape)}"
        )
    exists = (
        scores.grid.exists.numpy() if isinstance(scores, HeadScores) else np.ones(values.shape, dtype=bool)
    )
    if not np.isfinite(values[exists]).all():
        layer, head = np.argwhere(~np.isfinite(values) & exists)[0]
        raise InvalidValueError(
            f"the score of head ({layer}, {head}) is {values[layer, head]}: expected a finite number"
        )
    return values, exists


def _check_heads(heads: HeadSet, exists: NDArray[np.bool_]) -> None:
    shape = exists.shape
    if not isinstance(heads, HeadSet):
        raise InvalidTypeError(
            f"the marked heads are a HeadSet, not {type(heads).__name__}: HeadSet([(layer, head)], ...)"
        )
    own = heads.grid
    if own.shape != shape:
        raise InvalidValueError(
            f"the marked heads are of a model with {own.n_layers} x {own.n_heads} heads, the scores of one "
            f"with {shape[0]} x {shape[1]} (layers x heads)"
        )
    absent = [head for head in heads if not exists[head]]
    if absent:
        raise OutOfRangeError(f"the marked heads {absent} have no score: the model has no such heads")


def _hatch(ax: Axes, absent: NDArray[np.bool_]) -> None:
    style: dict[str, Any] = {"facecolor": PAPER, "edgecolor": ABSENT, "hatch": "////", "linewidth": 0.0}
    cells = [Rectangle((head - 0.5, layer - 0.5), 1, 1) for layer, head in np.argwhere(absent)]
    hatched = PatchCollection(cells, **style, zorder=0.5)
    hatched.set_gid("absent")
    ax.add_collection(hatched, autolim=False)
    ax.legend(
        handles=[Patch(**style, label="no such head")],
        # Below the axis' label, whatever the size of the grid.
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        borderaxespad=4,
        frameon=False,
        fontsize=TICK_SIZE,
        labelcolor=INK,
    )


def _outline(ax: Axes, heads: HeadSet) -> None:
    width = 1.8 if max(heads.grid.shape) <= 16 else 1.1
    halo = matplotlib.patheffects.withStroke(linewidth=width + 1.6, foreground=PAPER)
    for layer, head in heads:
        frame = Rectangle(
            (head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor=MARK, linewidth=width, zorder=3
        )
        frame.set_path_effects([halo])
        frame.set_gid(f"L{layer}H{head}")
        # Not clipped, so that the outline of a head at the edge of the grid is as thick as any other.
        frame.set_clip_on(False)
        ax.add_patch(frame)


def _ticks(count: int, longer: int) -> list[int]:
    step = 2 ** max(0, math.ceil(math.log2(longer / _MOST_TICKS)))
    return list(range(0, count, step))
