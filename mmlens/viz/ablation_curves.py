"""What is left of a metric as more and more heads are ablated: the causal test of a choice of heads.

The table has one row for each mode, arm, count, kind and metric: `mode` (how heads are ablated), `arm`
(which heads: top, bottom, random, layer_matched, or clean for none), `count` and `fraction` of heads,
`kind` of example, `metric`, `mean` with its 95% interval `low` to `high` over `n` examples, and for the
random arms (optional) the number of draws `n_draws` with the lowest and highest mean of a single draw,
`draw_min` and `draw_max`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from mmlens.arguments import number, one_of, texts, unknown_name_message
from mmlens.errors import InvalidValueError
from mmlens.viz.style import (
    INK,
    LABEL_SIZE,
    MUTED,
    TICK_SIZE,
    TITLE_SIZE,
    drawn_table,
    in_percent,
    labelled,
    legend_outside,
    name_axes,
    new_figure,
    root_figure,
    tidy,
)


@dataclass(frozen=True)
class ArmStyle:
    """How an arm looks in every figure: told apart by colour (also for the colour-blind) and by marker."""

    label: str
    colour: str
    marker: str


ARM_STYLES: dict[str, ArmStyle] = {
    "top": ArmStyle("top heads", "#d55e00", "o"),
    "layer_matched": ArmStyle("layer-matched random", "#009e73", "s"),
    "random": ArmStyle("random", "#b07aa1", "D"),
    "bottom": ArmStyle("bottom heads", "#0072b2", "^"),
}

METRIC_LABELS: dict[str, str] = {
    "accuracy": "Accuracy",
    "logit_difference": "Logit difference, right \N{MINUS SIGN} best wrong",
    "candidate_log_probability_difference": "Log probability of the answer \N{MINUS SIGN} best wrong",
    "invalid": "Invalid answers",
}

SHARES = ("accuracy", "invalid")
"""Metrics that are shares of examples, drawn from 0 to 100%."""

CLEAN = "clean"
_KEYS = ["mode", "arm", "count", "kind", "metric"]
_COLUMNS = ["mode", "arm", "count", "fraction", "kind", "metric", "mean", "low", "high", "n"]
_NUMBERS = ["count", "fraction", "mean", "low", "high", "n"]
_OPTIONAL = ["n_draws", "draw_min", "draw_max"]


def plot_ablation_curves(
    table: pd.DataFrame,
    *,
    metric: str = "accuracy",
    kind: str = "pooled",
    mode: str = "mean",
    chance: float | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """`metric` against the number of ablated heads, one curve per arm, for one kind and one mode.

    Every curve starts at the clean run (count 0), which is also a dashed line; bands are the 95% intervals,
    thin bars the lowest and highest single draw of a random arm, `chance` a dotted line. Counts are on a
    square-root scale, since they are usually spaced so; the upper axis gives them in % of all heads.

    Raises ValueError for missing columns, a row that stands twice, a missing clean row, values that are no
    numbers, and for a metric, kind, mode or arm that is not known.
    """
    curves = _curves(table, metric, kind, mode)
    chance = None if chance is None else number("chance", chance)
    own = ax is None
    if ax is None:
        figure = new_figure(6.2, 4.1)
        ax = figure.subplots()
    else:
        figure = root_figure(ax)
    _draw(ax, curves, metric, chance, width=5.0)
    name_axes(
        ax,
        x="Ablated heads (above: % of all heads)",
        y=METRIC_LABELS.get(metric, metric),
        title=f"{kind}, {mode} ablation" if title is None else title,
    )
    if own:
        _legend(figure, [curves], chance is not None, columns=3)
    return figure


def plot_ablation_panels(
    table: pd.DataFrame,
    *,
    metric: str = "accuracy",
    kinds: Sequence[str] = ("pooled",),
    modes: Sequence[str] | None = None,
    chance: float | Mapping[str, float] | None = None,
    title: str = "",
) -> Figure:
    """`plot_ablation_curves` of several modes side by side, one row per kind, all on the same scales.

    `modes` are by default all of the table, in its order; `chance` is one level, or one for each kind. The y
    axis is common to all panels. Raises ValueError as `plot_ablation_curves`, and for no mode or no kind.
    """
    _check_table(table)
    if chance is not None:
        for value in chance.values() if isinstance(chance, Mapping) else [chance]:
            number("chance", value)
    kinds = texts("kinds", kinds, "a list of kinds of example")
    if modes is not None:
        modes = texts("modes", modes, "a list of ablation modes")
    if modes is None:
        modes = list(dict.fromkeys(table["mode"][table["arm"] != CLEAN]))
    if not modes or not kinds:
        raise InvalidValueError(
            f"expected at least one mode and one kind, got modes {list(modes)} and kinds {list(kinds)}"
        )
    panels = [[_curves(table, metric, kind, mode) for mode in modes] for kind in kinds]
    width = 3.1 if len(modes) > 1 else 5.0
    figure = new_figure(width * len(modes) + 0.8, 2.7 * len(kinds) + 1.1)
    grid = figure.subplots(len(kinds), len(modes), sharey=True, squeeze=False)
    for row, kind in enumerate(kinds):
        level = chance.get(kind) if isinstance(chance, Mapping) else chance
        for column, mode in enumerate(modes):
            ax = grid[row, column]
            _draw(ax, panels[row][column], metric, level, width=width - 0.4)
            name = f"{mode} ablation" if len(kinds) == 1 else f"{kind}, {mode} ablation"
            name_axes(ax, title=name)
    figure.supylabel(METRIC_LABELS.get(metric, metric), fontsize=LABEL_SIZE, color=INK)
    for ax in grid[-1]:
        name_axes(ax, x="Ablated heads (above: % of all)")
    if title:
        figure.suptitle(title, fontsize=TITLE_SIZE + 1, color=INK)
    _legend(
        figure,
        [curves for row in panels for curves in row],
        chance is not None,
        columns=6 if len(modes) > 2 else 3,
    )
    return figure


@dataclass(frozen=True)
class _Curves:
    clean: pd.Series[Any]
    arms: dict[str, pd.DataFrame]
    fractions: dict[int, float]


def _check_table(table: pd.DataFrame) -> None:
    drawn_table(table, [name for name in _COLUMNS if name not in _NUMBERS], _NUMBERS)
    for arm in table["arm"].unique():
        if arm not in (CLEAN, *ARM_STYLES):
            raise InvalidValueError(unknown_name_message("arm", str(arm), [CLEAN, *ARM_STYLES]))


def _curves(table: pd.DataFrame, metric: str, kind: str, mode: str) -> _Curves:
    _check_table(table)
    ablated = table["arm"] != CLEAN
    for word, given, known in (
        ("metric", metric, table["metric"]),
        ("kind", kind, table["kind"]),
        ("mode", mode, table["mode"][ablated]),
    ):
        one_of(word, given, [str(name) for name in dict.fromkeys(known)])
    wanted = table[(table["metric"] == metric) & (table["kind"] == kind)]
    rows = wanted[(wanted["mode"] == mode) & (wanted["arm"] != CLEAN)]
    if rows.empty:
        raise InvalidValueError(f"the table has no {metric} of {kind} examples under {mode} ablation")
    twice = rows[rows.duplicated(_KEYS)]
    if len(twice):
        raise InvalidValueError(f"the table holds more than one row for {twice[_KEYS].iloc[0].to_dict()}")
    # A clean run has no mode of its own: its row may stand once for all modes.
    clean = wanted[wanted["arm"] == CLEAN]
    clean = clean[clean["mode"] == mode] if (clean["mode"] == mode).any() else clean
    if clean.empty:
        raise InvalidValueError(f"the table has no clean row for the {metric} of {kind} examples")
    if clean["mean"].nunique() > 1:
        raise InvalidValueError(
            f"the clean {metric} of {kind} examples is not one value: {sorted(clean['mean'].unique())}"
        )
    for row in (*clean.to_dict("records"), *rows.to_dict("records")):
        _check_row(row)
    shares = rows.groupby("count")["fraction"]
    if (shares.nunique() > 1).any():
        raise InvalidValueError(
            f"one count of heads is given as different fractions: {shares.unique().to_dict()}"
        )
    arms = {
        arm: rows[rows["arm"] == arm].sort_values("count") for arm in ARM_STYLES if arm in set(rows["arm"])
    }
    fractions = {int(count): float(share) for count, share in shares.first().items()}
    return _Curves(clean.iloc[0], arms, fractions)


def _check_row(row: Mapping[Any, Any]) -> None:
    where = {key: row[key] for key in _KEYS}
    if not np.isfinite([row["mean"], row["low"], row["high"]]).all() or row["low"] > row["high"]:
        raise InvalidValueError(
            f"mean {row['mean']} with the interval {row['low']} to {row['high']} is no curve's point: {where}"
        )
    if row["arm"] != CLEAN and not (row["count"] >= 1 and 0 < row["fraction"] <= 1):
        raise InvalidValueError(
            f"{row['count']} heads as fraction {row['fraction']} of all: expected at least 1 head: {where}"
        )


def _draw(ax: Axes, curves: _Curves, metric: str, chance: float | None, *, width: float) -> None:
    """`width`: of the axes in inches, about, to know how many tick labels have room."""
    ax.set_xscale("function", functions=(_root, _square))
    clean = curves.clean
    ax.axhline(clean["mean"], color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1.5, gid="clean")
    if chance is not None:
        ax.axhline(chance, color=MUTED, linewidth=1.2, linestyle=(0, (1, 2)), zorder=1.5, gid="chance")
    # The top heads are drawn last: they are what the figure is about.
    for depth, (arm, rows) in enumerate(reversed(curves.arms.items())):
        style = ARM_STYLES[arm]
        count = np.array([0, *rows["count"]], dtype=float)
        mean, low, high = (
            np.array([clean[name], *rows[name]], dtype=float) for name in ("mean", "low", "high")
        )
        ax.fill_between(count, low, high, color=style.colour, alpha=0.16, linewidth=0, zorder=2 + 0.1 * depth)
        drawn = _drawn(rows)
        if len(drawn):
            ax.vlines(
                drawn["count"].to_numpy(float),
                drawn["draw_min"].to_numpy(float),
                drawn["draw_max"].to_numpy(float),
                color=style.colour,
                linewidth=1.0,
                alpha=0.75,
                zorder=2.5 + 0.1 * depth,
            )
        ax.plot(
            count,
            mean,
            color=style.colour,
            marker=style.marker,
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            linewidth=1.6,
            zorder=3 + 0.1 * depth,
            gid=arm,
        )
    counts = [0, *curves.fractions]
    ax.set_xlim(_square(-0.05) * max(counts), _square(1.05) * max(counts))
    tidy(ax, grid=True)
    _count_axes(ax, counts, [0.0, *curves.fractions.values()], width)
    if metric in SHARES:
        ax.set_ylim(-0.03, 1.05)
        in_percent(ax.yaxis)


def _count_axes(ax: Axes, counts: list[int], fractions: list[float], width: float) -> None:
    left, right = _root(np.array(ax.get_xlim()))
    inches = [float((root - left) / (right - left) * width) for root in _root(np.array(counts, dtype=float))]
    # 5% of all heads is what the CoRe-head paper speaks of, so that label goes before its neighbours.
    paper = min(range(len(counts)), key=lambda index: abs(fractions[index] - 0.05))
    keep = [len(counts) - 1, 0, paper]
    shown = labelled(inches, 0.2, keep=keep)
    ax.set_xticks(counts, [str(count) if index in shown else "" for index, count in enumerate(counts)])
    upper = ax.twiny()
    upper.set_xscale("function", functions=(_root, _square))
    upper.set_xlim(ax.get_xlim())
    shown = labelled(inches, 0.36, keep=keep)
    upper.set_xticks(
        counts, [_percent(share) if index in shown else "" for index, share in enumerate(fractions)]
    )
    upper.tick_params(labelsize=TICK_SIZE - 1, colors=MUTED, labelcolor=MUTED, length=3, width=0.8, pad=1)
    for spine in upper.spines.values():
        spine.set_visible(False)


def _legend(figure: Figure, panels: Sequence[_Curves], chance: bool, *, columns: int) -> None:
    arms = [arm for arm in ARM_STYLES if any(arm in curves.arms for curves in panels)]
    entries: list[tuple[Artist, str]] = [
        (
            Line2D(
                [],
                [],
                color=ARM_STYLES[arm].colour,
                marker=ARM_STYLES[arm].marker,
                markersize=4.5,
                linewidth=1.6,
            ),
            ARM_STYLES[arm].label,
        )
        for arm in arms
    ]
    n = sorted({int(curves.clean["n"]) for curves in panels})
    examples = f"{n[0]}" if len(n) == 1 else f"{n[0]} to {n[-1]}"
    entries.append((Line2D([], [], color=INK, linewidth=1, linestyle=(0, (4, 3))), f"clean, n = {examples}"))
    entries.append((Patch(color=MUTED, alpha=0.25, linewidth=0), "95% interval"))
    drawn = [_drawn(rows) for curves in panels for rows in curves.arms.values()]
    draws = sorted({int(count) for rows in drawn if len(rows) for count in rows["n_draws"]})
    if draws:
        number = f"{draws[0]}" if len(draws) == 1 else f"{draws[0]} to {draws[-1]}"
        bar = Line2D([], [], color=MUTED, linewidth=1, marker="|", markersize=9, linestyle="none")
        entries.append((bar, f"range of {number} draws"))
    if chance:
        entries.append((Line2D([], [], color=MUTED, linewidth=1.2, linestyle=(0, (1, 2))), "chance"))
    legend_outside(figure, *zip(*entries, strict=True), ncols=min(columns, len(entries)), handlelength=2.2)


def _drawn(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that stand for several draws of heads, and so have a range of draws to show."""
    if not set(_OPTIONAL) <= set(rows.columns):
        return rows.iloc[:0]
    return rows[(rows["n_draws"] > 1) & rows["draw_min"].notna() & rows["draw_max"].notna()]


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.2g}%" if percent < 10 else f"{percent:.0f}%"


def _root(count: Any) -> Any:
    return np.sign(count) * np.sqrt(np.abs(count))


def _square(root: Any) -> Any:
    return np.sign(root) * np.square(root)
