"""A small table of numbers as a picture: one coloured cell for each pair, its number written in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from torch import Tensor

from mmlens.arguments import array_of, number, texts, whole_number
from mmlens.errors import InvalidValueError
from mmlens.viz.style import INK, PAPER, TICK_SIZE, bare, colour_bar, colours_of, name_axes, new_figure


def plot_matrix(
    values: Tensor | ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str] | None = None,
    *,
    title: str = "",
    label: str = "",
    row_label: str = "",
    column_label: str = "",
    vmax: float | None = None,
    decimals: int = 2,
) -> Figure:
    """`values` [row, column], each cell coloured and with its number; a cell that is NaN is left empty.

    `columns` are by default the rows. Values that are all >= 0 are drawn from 0 in one hue, others from blue (below
    0) to red, white at 0; `vmax` is the largest size that colours tell apart, by default the largest there is.

    Raises ValueError where names and values do not fit together, or there is no number.

    >>> figure = plot_matrix([[1.0, 0.5], [0.5, 1.0]], ["objects", "frames"], label="Spearman")
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['1.00', '0.50', '0.50', '1.00']
    """
    table = array_of("values", values, None)
    rows = texts("rows", rows, "a list of names")
    columns = rows if columns is None else texts("columns", columns, "a list of names")
    vmax = None if vmax is None else number("vmax", vmax, above=0)
    decimals = whole_number("decimals", decimals, least=0)
    if table.shape != (len(rows), len(columns)):
        raise InvalidValueError(
            f"values of shape {list(table.shape)} for {len(rows)} rows and {len(columns)} columns of names"
        )
    numbers = table[np.isfinite(table)]
    if not len(numbers):
        raise InvalidValueError("no number to draw: every cell is missing")
    top = (float(np.abs(numbers).max()) if vmax is None else vmax) or 1.0
    colours, norm = colours_of(numbers, top)
    longest = max(map(len, rows))
    figure = new_figure(0.72 * len(columns) + 0.075 * longest + 1.6, 0.5 * len(rows) + 1.5)
    ax = figure.subplots()
    mesh = ax.pcolormesh(
        np.ma.masked_invalid(table),
        cmap=colours,
        norm=norm,
        edgecolors=PAPER,
        linewidth=1,
    )
    for row, column in np.argwhere(np.isfinite(table)):
        strong = abs(table[row, column]) > 0.6 * top
        ax.text(
            column + 0.5,
            row + 0.5,
            f"{table[row, column]:.{decimals}f}",
            ha="center",
            va="center",
            fontsize=TICK_SIZE,
            color=PAPER if strong else INK,
        )
    bare(ax)
    turned = max(map(len, columns)) > 9
    ax.set_xticks(
        np.arange(len(columns)) + 0.5,
        columns,
        rotation=30 if turned else 0,
        ha="right" if turned else "center",
    )
    ax.set_yticks(np.arange(len(rows)) + 0.5, rows)
    ax.invert_yaxis()
    name_axes(ax, x=column_label, y=row_label, title=title)
    colour_bar(figure, mesh, ax, label, pad=0.03)
    return figure
