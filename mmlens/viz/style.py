"""What every figure of the package shares: colours, fonts' sizes, and how a figure is made and written.

Figures are `matplotlib.figure.Figure` objects outside pyplot, so that nothing is left behind in a loop
over thousands of them, and no window or backend is asked for.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import CenteredNorm, Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from mmlens.arguments import array_of, instance_of, table_of
from mmlens.errors import InvalidValueError

INK = "#1f2328"
MUTED = "#59636e"
GRID = "#e3e7eb"
PAPER = "#ffffff"

LABEL_SIZE = 9.0
TICK_SIZE = 8.0
TITLE_SIZE = 10.0


class DisplayedFigure(Figure):
    """A figure that notebooks show although pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=2 * self.dpi, bbox_inches="tight")
        return buffer.getvalue()


def new_figure(width: float, height: float, *, pictures: bool = False) -> Figure:
    """An empty white figure of `width` x `height` inches that keeps its labels from overlapping.

    `pictures`: its axes have a fixed aspect, and the room that this leaves between them is closed.
    """
    layout: Literal["compressed", "constrained"] = "compressed" if pictures else "constrained"
    return DisplayedFigure(figsize=(width, height), layout=layout, facecolor=PAPER)


def root_figure(ax: Axes) -> Figure:
    """The figure that holds `ax`, through subfigures."""
    instance_of("ax", ax, Axes, "matplotlib Axes, such as figure.subplots() gives")
    figure = ax.get_figure(root=True)
    if figure is None:
        raise InvalidValueError(
            "the axes given as `ax` belong to no figure; make them with Figure.subplots()"
        )
    return figure


def drawn_table(table: object, columns: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
    """A table that has these columns, and in those of `numbers` nothing but numbers (NaN among them)."""
    for name in (*columns, *numbers):
        instance_of("the name of a column", name, str, "a text")
    checked = table_of("table", table, [*columns, *numbers], f"one with {', '.join((*columns, *numbers))}")
    for name in numbers:
        array_of(f"the column {name!r}", checked[name], "row")
    return checked


def tidy(ax: Axes, *, grid: bool = False) -> None:
    """Sizes and colours of ticks and frame; with `grid`, horizontal lines behind the data."""
    ax.tick_params(labelsize=TICK_SIZE, colors=MUTED, labelcolor=INK, length=3, width=0.8)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)
        spine.set_linewidth(0.8)
    if grid:
        ax.set_axisbelow(True)
        ax.grid(axis="y", color=GRID, linewidth=0.8)


def bare(ax: Axes) -> None:
    """`tidy` for grids of cells: neither frame nor tick marks."""
    tidy(ax)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def name_axes(ax: Axes, *, x: str | None = None, y: str | None = None, title: str | None = None) -> None:
    """Labels of the axes, and the title at the left."""
    if x is not None:
        ax.set_xlabel(x, fontsize=LABEL_SIZE, color=INK)
    if y is not None:
        ax.set_ylabel(y, fontsize=LABEL_SIZE, color=INK)
    if title is not None:
        ax.set_title(title, fontsize=TITLE_SIZE, color=INK, loc="left")


def in_percent(axis: Axis) -> None:
    """Ticks of shares as whole percents."""
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def colours_of(numbers: NDArray[np.float64], top: float) -> tuple[str, Normalize]:
    """Colour map and scale: numbers >= 0 from 0 to `top` in one hue, others from blue to red, white at 0."""
    signed = bool((numbers < 0).any())
    return ("RdBu_r", CenteredNorm(0, top)) if signed else ("Blues", Normalize(0, top))


def colour_bar(
    figure: Figure, mappable: ScalarMappable, axes: Axes | list[Axes], label: str, **options: Any
) -> Colorbar:
    """A colour bar without a frame, beside the axes; `options` are those of `Figure.colorbar`."""
    bar = figure.colorbar(mappable, ax=axes, fraction=0.05, **options)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=TICK_SIZE, labelcolor=INK, length=0)
    bar.set_label(label, fontsize=LABEL_SIZE, color=INK)
    return bar


def legend_outside(figure: Figure, *entries: Any, at: str = "lower center", **options: Any) -> None:
    """A legend beside the axes, without a frame; `entries` (handles, labels) are by default those of the axes."""
    loc: Any = f"outside {at}"
    figure.legend(
        *entries,
        loc=loc,
        fontsize=TICK_SIZE,
        frameon=False,
        labelcolor=INK,
        **options,
    )


def labelled(positions: Sequence[float], gap: float, *, keep: Sequence[int] = ()) -> list[int]:
    """Indices of the positions that can carry a label when labels need `gap` between their centres.

    `keep` are indices that come first; the others follow from left to right where there is room.

    >>> labelled([0, 1, 2, 3], gap=1.5, keep=[3])
    [0, 3]
    """
    chosen: list[int] = []
    for index in [*keep, *range(len(positions))]:
        if index not in chosen and all(abs(positions[index] - positions[other]) >= gap for other in chosen):
            chosen.append(index)
    return sorted(chosen)


def see_through(name: str, *, low: float = 0.0, high: float = 1.0, opacity: float = 0.85) -> Colormap:
    """matplotlib's colour map `name` between `low` and `high`, invisible at 0, `opacity` at the maximum.

    Opacity grows with the square root, so that weak weights are seen and none is the bare image.
    """
    steps = np.linspace(0, 1, 256)
    colours = matplotlib.colormaps[name](low + (high - low) * steps)
    colours[:, 3] = opacity * np.sqrt(steps)
    return ListedColormap(colours, name=f"{name}_see_through")
