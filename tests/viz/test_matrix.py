"""Matrices as pictures: numbers where they belong, bad input refused."""

from __future__ import annotations

import numpy as np
import pytest

from mmlens.viz.matrix import plot_matrix


def test_every_number_stands_in_its_cell() -> None:
    values = np.array([[0.1, -0.25, 0.5], [0.75, np.nan, 1.0]])
    figure = plot_matrix(values, ["a", "b"], ["x", "y", "z"], label="rho", title="agreement")
    figure.canvas.draw()
    ax = figure.axes[0]
    drawn = {text.get_position(): text.get_text() for text in ax.texts}
    assert drawn == {
        (0.5, 0.5): "0.10", (1.5, 0.5): "-0.25", (2.5, 0.5): "0.50", (0.5, 1.5): "0.75", (2.5, 1.5): "1.00",
    }  # fmt: skip
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"] and ax.yaxis_inverted()
    mesh = ax.collections[0]
    assert mesh.norm.vmin == -mesh.norm.vmax == -1.0


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[1, 2\] for 2 rows and 2 columns"):
        plot_matrix([[1.0, 2.0]], ["a", "b"])
    with pytest.raises(ValueError, match="every cell is missing"):
        plot_matrix([[np.nan]], ["a"])
