"""Dots, whiskers and curves: where they are drawn, and bad input refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from mmlens.viz.intervals import plot_curves, plot_intervals, plot_trade_off

TABLE = pd.DataFrame(
    {
        "row": ["a", "a", "b"],
        "arm": ["top", "bottom", "top"],
        "k": [1, 1, 2],
        "mean": [0.4, 0.2, 0.6],
        "low": [0.3, 0.1, np.nan],
        "high": [0.6, 0.3, np.nan],
    }
)


def test_dots_and_whiskers_are_where_the_table_says() -> None:
    figure = plot_intervals(TABLE, row="row", series="arm", xlabel="share", lines={"chance": 0.1})
    figure.canvas.draw()
    ax = figure.axes[0]
    top, bottom = ax.containers
    np.testing.assert_allclose(top.lines[0].get_xdata(), [0.4, 0.6])
    segments = top.lines[2][0].get_segments()
    np.testing.assert_allclose([segment[:, 0] for segment in segments], [[0.3, 0.6], [0.6, 0.6]])
    # The two series of a row stand beside each other, the rows from top to bottom.
    assert top.lines[0].get_ydata()[0] < bottom.lines[0].get_ydata()[0] < top.lines[0].get_ydata()[1]
    assert [text.get_text() for text in ax.texts] == ["chance"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["top", "bottom"]


def test_curves_are_sorted_and_only_what_has_an_interval_has_a_band() -> None:
    shuffled = TABLE.iloc[::-1]
    figure = plot_curves(shuffled, x="k", series="arm", xlabel="heads", ylabel="coverage", dashed=["bottom"])
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["top"].get_xdata().tolist() == [1, 2] and lines["bottom"].get_linestyle() == "--"
    figure.canvas.draw()


def test_a_dashed_series_takes_the_look_of_its_partner() -> None:
    partners = {"bottom": "top"}
    figure = plot_curves(TABLE, x="k", series="arm", xlabel="heads", ylabel="coverage", dashed=partners)
    top, bottom = figure.axes[0].lines
    assert (top.get_color(), top.get_linestyle()) == (bottom.get_color(), "-")
    assert bottom.get_linestyle() == "--"
    with pytest.raises(ValueError, match=r"no series \['middle'\]"):
        plot_curves(TABLE, x="k", series="arm", xlabel="", ylabel="", dashed={"bottom": "middle"})


def test_a_trade_off_joins_rows_in_their_order_with_whiskers_both_ways() -> None:
    table = pd.DataFrame({"arm": "top", "mean": [0.4, 0.6], "low": [0.3, 0.5], "high": [0.6, 0.7]})
    table = table.assign(speed=[2.0, 1.5], speed_low=[1.8, 1.5], speed_high=[2.5, 1.6])
    figure = plot_trade_off(
        table, x="speed", series="arm", xlabel="speed-up", ylabel="accuracy", percent=True
    )
    (bars,) = figure.axes[0].containers
    assert bars.lines[0].get_xdata().tolist() == [2.0, 1.5]
    across, up = ([segment.tolist() for segment in lines.get_segments()] for lines in bars.lines[2])
    np.testing.assert_allclose([[x for x, _ in ends] for ends in across], [[1.8, 2.5], [1.5, 1.6]])
    np.testing.assert_allclose([[y for _, y in ends] for ends in up], table[["low", "high"]].to_numpy())
    with pytest.raises(ValueError, match=r"lacks the columns \['speed_low'\]"):
        plot_trade_off(table.drop(columns="speed_low"), x="speed", series="arm", xlabel="", ylabel="")


def test_no_two_series_look_alike() -> None:
    names = [str(n) for n in range(20)]
    table = pd.DataFrame({"series": names, "row": "a", "x": 1, "mean": 0.5, "low": 0.4, "high": 0.6})
    dots = plot_intervals(table, row="row", series="series", xlabel="").axes[0].containers
    curves = plot_curves(table, x="x", series="series", xlabel="", ylabel="").axes[0].lines
    for lines in ([dot.lines[0] for dot in dots], curves):
        assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(names)


def test_bad_tables_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lacks the columns \['high'\]"):
        plot_intervals(TABLE.drop(columns="high"), row="row", xlabel="")
    with pytest.raises(ValueError, match="no rows"):
        plot_curves(TABLE.iloc[:0], x="k", series="arm", xlabel="", ylabel="")
    with pytest.raises(ValueError, match="not finite"):
        plot_intervals(TABLE.assign(mean=np.nan), row="row", xlabel="")
    with pytest.raises(ValueError, match=r"no series \['middle'\]"):
        plot_curves(TABLE, x="k", series="arm", xlabel="", ylabel="", dashed=["middle"])
