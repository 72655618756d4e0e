"""The overlay's cells lie on the tokens' pixels and have the tokens' weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from PIL import Image

from mmlens.viz.overlay import EVIDENCE, HEAT, plot_attention_overlay, plot_overlay_grid

WIDTH, HEIGHT = 96, 64


@pytest.fixture
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def boxes() -> np.ndarray:
    return np.array(
        [(x, y, x + 32, y + 16) for y in range(0, HEIGHT, 16) for x in range(0, WIDTH, 32)], dtype=float
    )


def heat(ax: Axes) -> PatchCollection:
    (found,) = [artist for artist in ax.collections if isinstance(artist, PatchCollection)]
    return found


def drawn(ax: Axes) -> dict[tuple[float, ...], float]:
    """Box in pixels -> weight, as drawn."""
    cells = heat(ax)
    edges = [path.get_extents().extents for path in cells.get_paths()]
    return {tuple(e.tolist()): float(w) for e, w in zip(edges, np.asarray(cells.get_array()), strict=True)}


def test_cells_are_the_tokens_boxes_and_weights(image: Image.Image, boxes: np.ndarray) -> None:
    weights = np.random.default_rng(1).random(len(boxes))
    figure = plot_attention_overlay(image, boxes, weights, evidence=[(10, 5, 40, 30)], title="L5H3")
    ax = figure.axes[0]
    assert drawn(ax) == {tuple(box.tolist()): weight for box, weight in zip(boxes, weights, strict=True)}
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, WIDTH), (HEIGHT, 0))
    (picture,) = ax.images
    assert tuple(picture.get_extent()) == (0, WIDTH, HEIGHT, 0)
    (frame,) = ax.patches
    assert (frame.get_x(), frame.get_y(), frame.get_width(), frame.get_height()) == (10, 5, 30, 25)
    assert figure.axes[1].get_ylabel() == "attention"


def test_pixels_show_heat_where_the_weight_is(image: Image.Image) -> None:
    """Rendered: the right half is hot, the left half is the bare image."""
    white = Image.new("RGB", image.size, "white")
    halves = [(0, 0, 48, 64), (48, 0, 96, 64)]
    figure = plot_attention_overlay(white, halves, [0.0, 0.5])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    to_pixel = figure.axes[0].transData.transform
    for x, hot in ((24, False), (47, False), (49, True), (72, True)):
        column, row = to_pixel((x, 32)).astype(int)
        colour = pixels[len(pixels) - row, column]
        assert (colour.min() < 200) == hot
    assert HEAT(0.0)[3] == 0


def test_colour_scale_is_the_one_asked_for(image: Image.Image, boxes: np.ndarray) -> None:
    weights = np.linspace(0, 0.2, len(boxes))
    assert heat(plot_attention_overlay(image, boxes, weights).axes[0]).norm.vmax == pytest.approx(0.2)
    assert heat(plot_attention_overlay(image, boxes, weights, vmax=0.5).axes[0]).norm.vmax == 0.5
    plot_attention_overlay(image, boxes, np.zeros(len(boxes)))
    with pytest.raises(ValueError, match="below the largest weight"):
        plot_attention_overlay(image, boxes, weights, vmax=0.1)


def test_weight_without_pixels_is_said(image: Image.Image, boxes: np.ndarray) -> None:
    extended = np.vstack([boxes, [(np.nan,) * 4, (0, 0, 0, 0)]])
    weights = np.full(len(extended), 0.125)
    ax = plot_attention_overlay(image, extended, weights).axes[0]
    assert len(drawn(ax)) == len(boxes)
    assert ax.get_xlabel() == "not drawn: 0.25 on 2 token(s) without pixels"


def test_overlapping_tokens_are_said_and_the_finer_lie_on_top(image: Image.Image, boxes: np.ndarray) -> None:
    tiled = np.vstack([boxes, [(0, 0, WIDTH, HEIGHT)]])
    ax = plot_attention_overlay(image, tiled, np.arange(len(tiled), dtype=float)).axes[0]
    assert next(iter(drawn(ax))) == (0, 0, WIDTH, HEIGHT)
    assert "overlap" in ax.get_xlabel()


def test_tensors_of_any_type_are_taken(image: Image.Image, boxes: np.ndarray) -> None:
    weights = torch.full((len(boxes),), 0.25, dtype=torch.bfloat16, requires_grad=True)
    ax = plot_attention_overlay(image, torch.from_numpy(boxes).float(), weights).axes[0]
    assert drawn(ax) == {tuple(box.tolist()): 0.25 for box in boxes}


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_any_mode_of_image(image: Image.Image, boxes: np.ndarray, mode: str) -> None:
    plot_attention_overlay(image.convert(mode), boxes, np.ones(len(boxes)))


def test_grid_shares_one_scale_and_says_each_images_mass(image: Image.Image, boxes: np.ndarray) -> None:
    weights = [np.full(len(boxes), 0.01), np.full(len(boxes), 0.05), np.zeros(len(boxes))]
    figure = plot_overlay_grid(
        [image] * 3, [boxes] * 3, weights, evidence=[[], [(0, 0, 32, 32)], []], title="L5H3", columns=2
    )
    panels = figure.axes[:3]
    assert [ax.get_title() for ax in panels] == ["image 0: 0.120", "image 1: 0.600", "image 2: 0.000"]
    assert {heat(ax).norm.vmax for ax in panels} == {0.05}
    assert [len(ax.patches) for ax in panels] == [0, 1, 0]
    assert panels[1].title.get_color() == EVIDENCE
    assert not figure.axes[3].axison


def test_titles_of_many_images_do_not_overlap(image: Image.Image, boxes: np.ndarray) -> None:
    names = [f"a page with the long name {number}" for number in range(30)]
    figure = plot_overlay_grid([image] * 30, [boxes] * 30, [np.ones(len(boxes))] * 30, names=names)
    figure.draw_without_rendering()
    extents = [ax.title.get_window_extent() for ax in figure.axes[:30]]
    frames = [ax.get_window_extent() for ax in figure.axes[:30]]
    for number, text in enumerate(extents):
        assert not any(text.overlaps(other) for other in extents[number + 1 :])
        assert not any(text.overlaps(frame.padded(-1)) for frame in frames)


def test_bad_input_is_refused(image: Image.Image, boxes: np.ndarray) -> None:
    ones = np.ones(len(boxes))
    with pytest.raises(ValueError, match=r"boxes of shape \[12, 4\] and weights of shape \[11\]"):
        plot_attention_overlay(image, boxes, ones[:-1])
    with pytest.raises(ValueError, match=r"boxes of shape \[12, 3\]"):
        plot_attention_overlay(image, boxes[:, :3], ones)
    with pytest.raises(ValueError, match="weight of token 2 is -1"):
        plot_attention_overlay(image, boxes, np.where(np.arange(12) == 2, -1, 1))
    with pytest.raises(ValueError, match="lies outside its 96 x 64 pixels"):
        plot_attention_overlay(image, boxes + 500, ones)
    with pytest.raises(ValueError, match="none of the 2 tokens"):
        plot_attention_overlay(image, np.full((2, 4), np.nan), [0.1, 0.2])
    with pytest.raises(ValueError, match="evidence"):
        plot_attention_overlay(image, boxes, ones, evidence=[(0, 0, 97, 10)])
    with pytest.raises(TypeError, match="PIL"):
        plot_attention_overlay(np.zeros((4, 4)), boxes, ones)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights for 1 images, but 2 images"):
        plot_overlay_grid([image] * 2, [boxes] * 2, [ones])
    with pytest.raises(ValueError, match="at least one"):
        plot_overlay_grid([], [], [])
