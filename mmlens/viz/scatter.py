"""Two numbers of every head against each other, one panel for each of several ways to get the first."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from mmlens.viz.head_map import MARK
from mmlens.viz.style import INK, LABEL_SIZE, MUTED, drawn_table, legend_outside, name_axes, new_figure, tidy

_DOT = "#0072b2"


def plot_scatter(
    table: pd.DataFrame, *, panel: str, x: str, y: str, marked: str, xlabel: str, ylabel: str, note: str
) -> Figure:
    """`y` against `x` for every row, a panel for each value of `panel`; the y axis is common to all.

    Rows where the boolean column `marked` holds are filled and bigger; `note` says in the legend what that means.
    Raises ValueError for a missing column or no rows.

    >>> table = pd.DataFrame({"score": "RAM", "rank": [1, 2], "cost": [.5, .1], "sure": [True, False]})
    >>> figure = plot_scatter(
    ...     table, panel="score", x="rank", y="cost", marked="sure", xlabel="Rank", ylabel="Cost", note="sure"
    ... )
    >>> figure.axes[0].get_title(loc="left")
    'RAM'
    """
    drawn_table(table, [panel], [x, y, marked])
    names = list(dict.fromkeys(table[panel]))
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(2.5 * columns + 0.6, 2.3 * rows + 0.7)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for ax, name in zip(grid.flat, names, strict=False):
        part = table[table[panel] == name]
        sure = part[marked].to_numpy(bool)
        ax.axhline(0, color=MUTED, linewidth=0.8)
        ax.scatter(part[x][~sure], part[y][~sure], s=12, facecolors="none", edgecolors=_DOT, linewidths=0.8)
        ax.scatter(part[x][sure], part[y][sure], s=24, color=MARK, linewidths=0, label=note)
        name_axes(ax, title=str(name))
        tidy(ax, grid=True)
    for ax in list(grid.flat)[len(names) :]:
        ax.set_visible(False)
    figure.supxlabel(xlabel, fontsize=LABEL_SIZE, color=INK)
    figure.supylabel(ylabel, fontsize=LABEL_SIZE, color=INK)
    legend_outside(figure, *grid[0, 0].get_legend_handles_labels(), at="upper right")
    return figure
