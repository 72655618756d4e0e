"""Where a head looks: attention as heat over the image, one cell for each visual token.

Cells are the tokens' own boxes in the original image's pixels; nothing is interpolated. Boxes and images
come from a prompt's token map, weights from attention rows averaged over the question's tokens.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.patheffects
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from mmlens.arguments import array_of, listed, number, texts, whole_number
from mmlens.boxes import box_of
from mmlens.errors import InvalidTypeError, InvalidValueError
from mmlens.viz.style import (
    INK,
    MUTED,
    TICK_SIZE,
    TITLE_SIZE,
    colour_bar,
    name_axes,
    new_figure,
    root_figure,
    see_through,
)

EVIDENCE = "#0072b2"
HEAT = see_through("YlOrRd", low=0.35, high=0.95, opacity=0.78)

_PIXELS_PER_INCH = 220
"""Of an image as drawn; more would only make the file large."""

_GREY, _FADE = 0.55, 0.3
"""How far the image is drawn towards grey and then towards white, so that the heat is the strongest colour."""

_LONGEST_SIDE = 4.6
_WIDEST_MONTAGE = 9.0
_MOST_COLUMNS = 8
"""Inches, inches, and images in a row."""


def plot_attention_overlay(
    image: Image.Image,
    boxes: Tensor | ArrayLike,
    weights: Tensor | ArrayLike,
    *,
    evidence: Sequence[Sequence[float]] = (),
    title: str = "",
    vmax: float | None = None,
    label: str = "attention",
    ax: Axes | None = None,
) -> Figure:
    """`weights` [token] over `image`, each in its token's box: `boxes` [token, 4] (left, top, right, bottom).

    Boxes are in pixels of the image as given. `evidence` boxes are outlined in blue. The colour bar goes from
    0 (invisible) to `vmax`, by default the largest weight. Tokens without pixels (separators with a NaN box,
    padding with one of no area) cannot be drawn; what weight they hold is said below the picture. Where
    tokens overlap (crops over the view of the whole image) the finer ones are drawn over the coarser, and the
    picture says so.

    Raises ValueError where boxes and weights are not one box of four numbers and one weight >= 0 per token,
    a weight is above `vmax`, a box lies outside the image, or no token has pixels.

    >>> picture = Image.new("RGB", (64, 32), "white")
    >>> figure = plot_attention_overlay(picture, [(0, 0, 32, 32), (32, 0, 64, 32)], [.1, .4], title="L1H3")
    >>> figure.axes[0].get_title(loc="left")
    'L1H3'
    """
    cells = _cells(image, boxes, weights, evidence, "the image")
    top = _colour_top([cells], vmax)
    if ax is None:
        width, height = _inches(image.size, _LONGEST_SIDE)
        figure = new_figure(width + 1.0, height + 0.7, pictures=True)
        ax = figure.subplots()
    else:
        figure = root_figure(ax)
    _draw(ax, image, cells, evidence, top, inches=_LONGEST_SIDE)
    name_axes(ax, title=title)
    note = _note([cells])
    if note:
        ax.set_xlabel(note, fontsize=TICK_SIZE - 1, color=MUTED, loc="left")
    _colour_bar(figure, [ax], top, label)
    return figure


def plot_overlay_grid(
    images: Sequence[Image.Image],
    boxes: Sequence[Tensor | ArrayLike],
    weights: Sequence[Tensor | ArrayLike],
    *,
    evidence: Sequence[Sequence[Sequence[float]]] | None = None,
    names: Sequence[str] | None = None,
    title: str = "",
    columns: int | None = None,
    vmax: float | None = None,
    label: str = "attention",
) -> Figure:
    """`plot_attention_overlay` of all images of one prompt (pages, frames, a long context) for one head.

    One entry per image in `boxes`, `weights`, and where given `evidence` (the boxes in that image; none is
    an empty list) and `names`. All share one colour scale. Above each image stand its name, by default its
    number, and the sum of its tokens' weights: the mass of attention on that image.

    Raises ValueError where the lists differ in length, there is no image, or as `plot_attention_overlay`.
    """
    if isinstance(images, Image.Image):
        raise InvalidTypeError("images is one image; expected a list of PIL images: [image]")
    images = listed("images", images, "a list of PIL images, at least one", least=1)
    boxes = listed("boxes", boxes, "boxes [token, 4] for each image")
    weights = listed("weights", weights, "weights [token] for each image")
    if names is not None:
        names = texts("names", names, "a name for each image")
    if columns is not None:
        columns = whole_number("columns", columns, least=1)
    evidence = [()] * len(images) if evidence is None else evidence
    names = [f"image {number}" for number in range(len(images))] if names is None else names
    for word, given in (("boxes", boxes), ("weights", weights), ("evidence", evidence), ("names", names)):
        if len(given) != len(images):
            raise InvalidValueError(f"{word} for {len(given)} images, but {len(images)} images")
    all_cells = [
        _cells(images[number], boxes[number], weights[number], evidence[number], f"image {number}")
        for number in range(len(images))
    ]
    top = _colour_top(all_cells, vmax)
    columns = columns or _columns([image.size for image in images])
    rows = math.ceil(len(images) / columns)
    across = min(2.2, _WIDEST_MONTAGE / columns)
    down = max(_inches(image.size, across)[1] for image in images)
    line = max(12, int(across / 0.065))
    titles = [
        textwrap.fill(f"{name}: {cells.total:.3f}", line)
        for name, cells in zip(names, all_cells, strict=True)
    ]
    heading = 0.14 * max(text.count("\n") + 1 for text in titles) + 0.12
    figure = new_figure(
        max(across * columns + 1.2, 3.6), (down + heading) * rows + (0.55 if title else 0.35), pictures=True
    )
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, image, cells, own, text in zip(grid, images, all_cells, evidence, titles, strict=False):
        _draw(ax, image, cells, own, top, inches=across)
        ax.set_title(text, fontsize=TICK_SIZE - 1, color=EVIDENCE if len(own) else INK, pad=3)
    for ax in grid[len(images) :]:
        ax.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=TITLE_SIZE, color=INK)
    said = [
        "beside each name: the sum over the image's tokens",
        *(["blue: evidence"] if any(evidence) else []),
    ]
    note = _note(all_cells)
    figure.supxlabel(
        "; ".join([*said, *([note] if note else [])]), fontsize=TICK_SIZE - 1, color=MUTED, wrap=True
    )
    _colour_bar(figure, list(grid), top, label)
    return figure


@dataclass(frozen=True)
class _Cells:
    """The tokens of one image, coarse ones first."""

    boxes: NDArray[np.float64]
    weights: NDArray[np.float64]
    n_hidden: int
    hidden_weight: float
    overlap: bool

    @property
    def total(self) -> float:
        return float(self.weights.sum() + self.hidden_weight)


def _note(all_cells: Sequence[_Cells]) -> str:
    hidden, weight = (
        sum(numbers) for numbers in zip(*((c.n_hidden, c.hidden_weight) for c in all_cells), strict=True)
    )
    parts = [f"not drawn: {weight:.3g} on {hidden} token(s) without pixels"] if hidden else []
    if any(cells.overlap for cells in all_cells):
        parts.append("tokens overlap: finer over coarser")
    return "; ".join(parts)


def _cells(
    image: Image.Image,
    boxes: Tensor | ArrayLike,
    weights: Tensor | ArrayLike,
    evidence: Sequence[Sequence[float]],
    where: str,
) -> _Cells:
    if not isinstance(image, Image.Image):
        raise InvalidTypeError(f"{where} is a {type(image).__name__}: expected a PIL image")
    edges, values = (
        array_of(f"{name} of {where}", given, None)
        for name, given in (("boxes", boxes), ("weights", weights))
    )
    if edges.ndim != 2 or edges.shape[1] != 4 or values.shape != edges.shape[:1]:
        raise InvalidValueError(
            f"{where}: boxes of shape {list(edges.shape)} and weights of shape {list(values.shape)}: expected "
            "[token, 4] and [token] with as many tokens"
        )
    if not np.isfinite(values).all() or (values < 0).any():
        token = int(np.flatnonzero(~(np.isfinite(values) & (values >= 0)))[0])
        raise InvalidValueError(f"{where}: the weight of token {token} is {values[token]}; attention is >= 0")
    for box in listed(f"the evidence of {where}", evidence, "a list of boxes (left, top, right, bottom)"):
        _check_evidence(box_of(f"the evidence of {where}", box), image.size, where)
    with_pixels = (edges[:, 2] > edges[:, 0]) & (edges[:, 3] > edges[:, 1])
    if not with_pixels.any():
        raise InvalidValueError(
            f"{where}: none of the {len(edges)} tokens has a box with pixels, so nothing can be drawn"
        )
    shown, size = edges[with_pixels], np.array(image.size)
    outside = (shown[:, :2] >= size).any(1) | (shown[:, 2:] <= 0).any(1) | ~np.isfinite(shown).all(1)
    if outside.any():
        box = tuple(shown[outside][0].tolist())
        raise InvalidValueError(
            f"{where}: the box {box} lies outside its {size[0]} x {size[1]} pixels; are the boxes this image's?"
        )
    area = (shown[:, 2] - shown[:, 0]) * (shown[:, 3] - shown[:, 1])
    order = np.argsort(-area, kind="stable")
    return _Cells(
        shown[order],
        values[with_pixels][order],
        n_hidden=int((~with_pixels).sum()),
        hidden_weight=float(values[~with_pixels].sum()),
        # More area than the image has cannot lie side by side; a little more is rounding and padding.
        overlap=bool(area.sum() > 1.25 * size.prod()),
    )


def _check_evidence(box: Sequence[float], size: tuple[int, int], where: str) -> None:
    if len(box) != 4 or not (0 <= box[0] < box[2] <= size[0] and 0 <= box[1] < box[3] <= size[1]):
        raise InvalidValueError(
            f"{where}: the evidence {tuple(box)} is no box (left, top, right, bottom) inside its "
            f"{size[0]} x {size[1]} pixels"
        )


def _colour_top(all_cells: Sequence[_Cells], vmax: float | None) -> float:
    largest = max(float(cells.weights.max()) for cells in all_cells)
    if vmax is None:
        return largest or 1.0
    vmax = number("vmax", vmax)
    if not vmax > 0 or largest > vmax * (1 + 1e-6):
        raise InvalidValueError(
            f"vmax = {vmax} is below the largest weight, {largest}: its cells would look like fewer"
        )
    return vmax


def _draw(
    ax: Axes,
    image: Image.Image,
    cells: _Cells,
    evidence: Sequence[Sequence[float]],
    top: float,
    *,
    inches: float,
) -> None:
    width, height = image.size
    ax.imshow(
        _faded(image, round(inches * _PIXELS_PER_INCH)),
        extent=(0, width, height, 0),
        interpolation="none",
        aspect="equal",
    )
    heat = PatchCollection(
        [Rectangle((left, upper), right - left, lower - upper) for left, upper, right, lower in cells.boxes],
        cmap=HEAT,
        norm=Normalize(0, top),
        linewidths=0,
        antialiaseds=False,
        zorder=2,
    )
    heat.set_array(cells.weights)
    ax.add_collection(heat, autolim=False)
    for left, upper, right, lower in evidence:
        frame = Rectangle(
            (left, upper),
            right - left,
            lower - upper,
            fill=False,
            edgecolor=EVIDENCE,
            linewidth=1.8,
            zorder=3,
        )
        frame.set_path_effects([matplotlib.patheffects.withStroke(linewidth=3.4, foreground="white")])
        frame.set_clip_on(False)
        ax.add_patch(frame)
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_color(MUTED)
        spine.set_linewidth(0.6)


def _faded(image: Image.Image, longest: int) -> NDArray[np.uint8]:
    flat = image.convert("RGBA")
    paper = Image.new("RGBA", flat.size, "white")
    flat = Image.alpha_composite(paper, flat).convert("RGB")
    flat.thumbnail((longest, longest))
    pixels = np.asarray(flat, dtype=np.float64)
    pixels += _GREY * (np.asarray(flat.convert("L"), dtype=np.float64)[..., None] - pixels)
    return (pixels + _FADE * (255 - pixels)).round().astype(np.uint8)


def _colour_bar(figure: Figure, axes: list[Axes], top: float, label: str) -> None:
    heat = ScalarMappable(Normalize(0, top), HEAT)
    aspect = max(12.0, 6.0 * figure.get_figheight())
    bar = colour_bar(figure, heat, axes, label, pad=0.02, aspect=aspect, shrink=0.9)
    bar.solids.set_edgecolor("none")  # type: ignore[union-attr]


def _inches(size: tuple[int, int], longest: float) -> tuple[float, float]:
    width, height = size
    return longest * width / max(size), longest * height / max(size)


def _columns(sizes: Sequence[tuple[int, int]]) -> int:
    """So many columns that the montage is about 1.6 times as wide as it is high."""
    aspect = float(np.mean([width / height for width, height in sizes]))
    return max(1, min(len(sizes), _MOST_COLUMNS, round(math.sqrt(1.6 * len(sizes) / aspect))))
