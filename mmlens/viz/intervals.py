"""Means with their intervals: rows of dots and whiskers, curves with bands, dots with whiskers both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmlens.arguments import flag, instance_of, number, texts
from mmlens.errors import InvalidValueError
from mmlens.viz.style import (
    GRID,
    INK,
    MUTED,
    TICK_SIZE,
    TITLE_SIZE,
    drawn_table,
    in_percent,
    legend_outside,
    name_axes,
    new_figure,
    tidy,
)

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#b07aa1", "#8c6d1f", "#56b4e9", "#1f2328", "#cc79a7")
"""Told apart also by the colour-blind; the first is that of the top heads, the second of the bottom heads."""

MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")


def _look(at: int) -> tuple[str, str]:
    """Colour and marker of a series: no two of the first 64 are alike."""
    return COLOURS[at % len(COLOURS)], MARKERS[(at + at // len(COLOURS)) % len(MARKERS)]


def plot_intervals(
    table: pd.DataFrame,
    *,
    row: str,
    series: str | None = None,
    xlabel: str,
    lines: Mapping[str, float] | None = None,
    percent: bool = False,
    title: str = "",
) -> Figure:
    """One line for each value of the column `row`, with a dot at `mean` and a whisker from `low` to `high`.

    `series` is a column that tells several dots of a line apart by colour and marker. `lines` are named values at
    which a dashed line stands. Rows and series keep the table's order. A row without `low` and `high` has a dot only.

    Raises ValueError for a missing column, a table without rows, or a mean that is not finite.

    >>> table = pd.DataFrame({"head": ["L0H1", "L0H2"], "mean": [.4, .2], "low": [.3, .1], "high": [.5, .3]})
    >>> figure = plot_intervals(table, row="head", xlabel="RAM")
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['L0H1', 'L0H2']
    """
    _check(table, [row, *([series] if series else [])])
    flag("percent", percent)
    for name, value in instance_of("lines", lines or {}, Mapping, "a dict {name: number}").items():
        number(f"lines[{name!r}]", value)
    names = list(dict.fromkeys(table[row]))
    groups = list(dict.fromkeys(table[series])) if series else [None]
    figure = new_figure(6.4, 0.24 * len(names) * max(1.0, 0.45 * len(groups)) + 1.1 + 0.2 * len(groups))
    ax = figure.subplots()
    for at, group in enumerate(groups):
        colour, marker = _look(at)
        part = table if group is None else table[table[series] == group]
        shift = (at - (len(groups) - 1) / 2) * 0.7 / len(groups)
        y = np.array([names.index(name) for name in part[row]]) + shift
        mean = part["mean"].to_numpy(float)
        reach = np.vstack([mean - part["low"].to_numpy(float), part["high"].to_numpy(float) - mean])
        ax.errorbar(
            mean,
            y,
            # A mean over draws may lie a rounding error outside its own interval.
            xerr=np.nan_to_num(reach.clip(min=0)),
            fmt=marker,
            color=colour,
            markersize=5,
            linewidth=1.3,
            label=None if group is None else str(group),
        )
    for name, value in (lines or {}).items():
        ax.axvline(value, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=0)
        ax.annotate(
            name,
            (value, 1),
            xycoords=("data", "axes fraction"),
            xytext=(2, 2),
            textcoords="offset points",
            fontsize=TICK_SIZE - 1,
            color=MUTED,
        )
    ax.set_yticks(range(len(names)), [str(name) for name in names])
    ax.set_ylim(len(names) - 0.4, -0.6)
    tidy(ax)
    ax.grid(axis="x", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    if percent:
        in_percent(ax.xaxis)
    name_axes(ax, x=xlabel)
    ax.set_title(title, fontsize=TITLE_SIZE, color=INK, loc="left", pad=16 if lines else 6)
    if series:
        _legend(figure, groups)
    return figure


def plot_curves(
    table: pd.DataFrame,
    *,
    x: str,
    series: str,
    xlabel: str,
    ylabel: str,
    percent: bool = False,
    title: str = "",
    dashed: Sequence[str] | Mapping[str, str] = (),
) -> Figure:
    """`mean` against the column `x`, one curve for each value of `series`, with a band from `low` to `high`.

    Series in `dashed` (numbers from elsewhere) are drawn thin and dashed; where `dashed` gives each another series, in
    the colour of that. A row whose low and high are missing has no band. Raises ValueError as `plot_intervals`, and for
    a name in `dashed` that is no series.

    >>> table = pd.DataFrame({"k": [1, 2], "arm": "top", "mean": [.4, .6], "low": [.3, .5], "high": [.5, .7]})
    >>> len(plot_curves(table, x="k", series="arm", xlabel="heads", ylabel="coverage").axes[0].lines)
    1
    """
    _check(table, [series], [x])
    flag("percent", percent)
    dashed = dashed if isinstance(dashed, Mapping) else texts("dashed", dashed, "a list of series")
    names = list(dict.fromkeys(table[series]))
    partners = dict(dashed) if isinstance(dashed, Mapping) else {}
    unknown = [name for name in (*dashed, *partners.values()) if name not in names]
    if unknown:
        raise InvalidValueError(f"no series {unknown} to dash; the series are {names}")
    figure = new_figure(6.2, 3.9)
    ax = figure.subplots()
    for at, name in enumerate(names):
        part = table[table[series] == name].sort_values(x)
        colour, marker = _look(names.index(partners[name]) if name in partners else at)
        style = (
            {"linewidth": 1.0, "linestyle": (0, (4, 2)), "alpha": 0.8}
            if name in dashed
            else {"linewidth": 1.6}
        )
        ax.plot(
            part[x],
            part["mean"],
            color=colour,
            marker=marker,
            markersize=4,
            label=str(name),
            **style,
        )
        with_band = part.dropna(subset=["low", "high"])
        ax.fill_between(
            with_band[x], with_band["low"], with_band["high"], color=colour, alpha=0.15, linewidth=0
        )
    _label_curves(ax, xlabel, ylabel, percent, title)
    _legend(figure, names)
    return figure


def plot_trade_off(
    table: pd.DataFrame, *, x: str, series: str, xlabel: str, ylabel: str, percent: bool = False
) -> Figure:
    """`mean` against `x`, both measured: a dot for every row with whiskers both ways, from `x`_low to `x`_high across.

    Dots of a series are joined in the order of the table's rows, which need not be that of `x`. Raises ValueError as
    `plot_intervals`.

    >>> row = {"arm": "top", "speed": 2., "speed_low": 1.9, "speed_high": 2.2, "mean": .4, "low": .3, "high": .5}
    >>> figure = plot_trade_off(pd.DataFrame([row]), x="speed", series="arm", xlabel="speed-up", ylabel="accuracy")
    >>> figure.axes[0].get_xlabel()
    'speed-up'
    """
    _check(table, [series], [x, f"{x}_low", f"{x}_high"])
    flag("percent", percent)
    names = list(dict.fromkeys(table[series]))
    figure = new_figure(6.2, 3.9)
    ax = figure.subplots()
    for at, name in enumerate(names):
        part = table[table[series] == name]
        colour, marker = _look(at)
        across, up = (
            np.vstack([part[middle] - part[low], part[high] - part[middle]]).clip(min=0)
            for middle, low, high in ((x, f"{x}_low", f"{x}_high"), ("mean", "low", "high"))
        )
        ax.errorbar(
            part[x],
            part["mean"],
            xerr=across,
            yerr=up,
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.4,
            elinewidth=0.7,
            label=str(name),
        )
    _label_curves(ax, xlabel, ylabel, percent)
    _legend(figure, names)
    return figure


def _label_curves(ax: Axes, xlabel: str, ylabel: str, percent: bool, title: str = "") -> None:
    tidy(ax, grid=True)
    if percent:
        in_percent(ax.yaxis)
    name_axes(ax, x=xlabel, y=ylabel, title=title)


def _check(table: pd.DataFrame, columns: Sequence[str], numbers: Sequence[str] = ()) -> None:
    drawn_table(table, columns, [*numbers, "mean", "low", "high"])
    if not np.isfinite(table["mean"].to_numpy(float)).all():
        raise InvalidValueError("a mean of the table is not finite")


def _legend(figure: Figure, names: Sequence[object]) -> None:
    longest = max(len(str(name)) for name in names) + 8
    # About 14 characters an inch at this size.
    legend_outside(figure, ncols=max(1, min(len(names), int(14 * figure.get_figwidth()) // longest)))
