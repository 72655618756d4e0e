"""The curves are the table's numbers; what the table lacks is named."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

from mmlens.viz.ablation_curves import ARM_STYLES, plot_ablation_curves, plot_ablation_panels

COUNTS = (1, 3, 6)


def row(arm: str, count: int, mean: float, **others: Any) -> dict[str, Any]:
    draws = {"n_draws": 10, "draw_min": mean - 0.2, "draw_max": mean + 0.05}
    one = {"n_draws": 1, "draw_min": mean, "draw_max": mean}
    return {
        "mode": "mean",
        "arm": arm,
        "count": count,
        "fraction": count / 64,
        "kind": "pooled",
        "metric": "accuracy",
        "mean": mean,
        "low": mean - 0.02,
        "high": mean + 0.01,
        "n": 400,
        **(draws if arm in ("random", "layer_matched") else one),
        **others,
    }


@pytest.fixture
def table() -> pd.DataFrame:
    """Made-up accuracies; counts in falling order, so that the curves have to sort them."""
    rows = []
    for metric in ("accuracy", "logit_difference", "invalid"):
        rows.append(row("clean", 0, 0.97, mode="clean", metric=metric))
        for mode in ("mean", "zero"):
            for number, arm in enumerate(ARM_STYLES):
                for count in reversed(COUNTS):
                    rows.append(row(arm, count, 0.9 - 0.1 * count / (1 + number), mode=mode, metric=metric))
    return pd.DataFrame(rows)


def curve(ax: Axes, arm: str) -> Line2D:
    (found,) = [line for line in ax.lines if line.get_gid() == arm]
    return found


def test_curves_are_the_means_from_the_clean_run_on(table: pd.DataFrame) -> None:
    ax = plot_ablation_curves(table).axes[0]
    for arm, style in ARM_STYLES.items():
        line = curve(ax, arm)
        own = table[(table["mode"] == "mean") & (table["metric"] == "accuracy") & (table["arm"] == arm)]
        expected = own.set_index("count")["mean"].loc[list(COUNTS)]
        assert np.asarray(line.get_xdata()).tolist() == [0, *COUNTS]
        assert np.asarray(line.get_ydata()).tolist() == [0.97, *expected]
        assert to_hex(str(line.get_color())) == style.colour
    assert set(np.asarray(curve(ax, "clean").get_ydata())) == {0.97}


def test_bands_are_the_intervals_and_bars_the_draws(table: pd.DataFrame) -> None:
    ax = plot_ablation_curves(table).axes[0]
    bands = [artist for artist in ax.collections if isinstance(artist, PolyCollection)]
    assert len(bands) == len(ARM_STYLES)
    top = next(b for b in bands if to_hex(b.get_facecolor()[0][:3]) == ARM_STYLES["top"].colour)
    corners = {(x, round(y, 9)) for x, y in top.get_paths()[0].vertices}
    assert {(3, round(0.6 - 0.02, 9)), (3, round(0.6 + 0.01, 9)), (0, 0.95), (0, 0.98)} <= corners
    bars = [artist for artist in ax.collections if isinstance(artist, LineCollection)]
    assert len(bars) == 2  # the two random arms: the others were drawn once
    random = next(b for b in bars if to_hex(b.get_color()[0][:3]) == ARM_STYLES["random"].colour)
    expected = table[(table["arm"] == "random") & (table["mode"] == "mean") & (table["metric"] == "accuracy")]
    assert [segment.tolist() for segment in random.get_segments()] == [
        [[found["count"], found["draw_min"]], [found["count"], found["draw_max"]]]
        for found in expected.sort_values("count").to_dict("records")
    ]


def test_axes_say_counts_and_percentages(table: pd.DataFrame) -> None:
    figure = plot_ablation_curves(table, chance=0.1)
    lower, upper = figure.axes
    assert [label.get_text() for label in lower.get_xticklabels()] == ["0", "1", "3", "6"]
    assert [label.get_text() for label in upper.get_xticklabels()] == ["0%", "1.6%", "4.7%", "9.4%"]
    assert lower.get_xlim() == upper.get_xlim()
    assert set(np.asarray(curve(lower, "chance").get_ydata())) == {0.1}
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert {"clean, n = 400", "range of 10 draws", "chance", "top heads"} <= set(texts)


def test_panels_share_scales_and_draw_each_mode_and_kind(table: pd.DataFrame) -> None:
    other = table.assign(kind="objects", mean=table["mean"] - 0.1, low=table["low"] - 0.1)
    figure = plot_ablation_panels(
        pd.concat([table, other]), kinds=["pooled", "objects"], chance={"pooled": 0.1, "objects": 0.25}
    )
    panels = [ax for ax in figure.axes if ax.get_title(loc="left")]
    assert [ax.get_title(loc="left") for ax in panels] == [
        f"{kind}, {mode} ablation" for kind in ("pooled", "objects") for mode in ("mean", "zero")
    ]
    assert len({ax.get_ylim() for ax in panels}) == 1
    assert [curve(ax, "chance").get_ydata()[0] for ax in panels] == [0.1, 0.1, 0.25, 0.25]  # type: ignore[index]
    assert curve(panels[2], "top").get_ydata()[0] == pytest.approx(0.87)  # type: ignore[index]


def test_labels_do_not_overlap_however_many_counts() -> None:
    counts = [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32]
    rows = [row("clean", 0, 0.97), *(row("top", count, 0.5) for count in counts)]
    figure = plot_ablation_panels(pd.DataFrame(rows), modes=["mean"] * 3)
    figure.draw_without_rendering()
    for ax in figure.axes:
        boxes = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
        assert len(boxes) >= 4
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metric": "acuracy"}, "no metric 'acuracy'; the nearest: 'accuracy'"),
        ({"kind": "poled"}, "no kind 'poled'; the nearest: 'pooled'"),
        ({"mode": "zeros"}, "no mode 'zeros'; the nearest: 'zero'"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(
    table: pd.DataFrame, given: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plot_ablation_curves(table, **given)  # type: ignore[arg-type]


def test_bad_tables_are_refused(table: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"lacks the columns \['low', 'n'\]"):
        plot_ablation_curves(table.drop(columns=["low", "n"]))
    with pytest.raises(ValueError, match="no arm 'tops'; the nearest: 'top'"):
        plot_ablation_curves(table.replace({"arm": {"top": "tops"}}))
    with pytest.raises(ValueError, match=r"more than one row.*'top'"):
        plot_ablation_curves(pd.concat([table, table[table["arm"] == "top"].iloc[:1]]))
    with pytest.raises(ValueError, match="no clean row"):
        plot_ablation_curves(table[table["arm"] != "clean"])
    with pytest.raises(ValueError, match="not one value"):
        plot_ablation_curves(pd.concat([table, pd.DataFrame([row("clean", 0, 0.5, mode="other")])]))
    with pytest.raises(ValueError, match="mean nan"):
        plot_ablation_curves(table.assign(mean=np.nan))
    with pytest.raises(ValueError, match="different fractions"):
        plot_ablation_curves(table.assign(fraction=np.linspace(0.1, 0.2, len(table))))
    with pytest.raises(ValueError, match="at least one mode"):
        plot_ablation_panels(table, modes=[])
