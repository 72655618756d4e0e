"""Examples as they are: question, answer, and images with the boxes of their evidence."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

import matplotlib.patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from mmlens.arguments import whole_number
from mmlens.data.examples import Example, examples_of
from mmlens.viz.overlay import EVIDENCE
from mmlens.viz.style import INK, MUTED, TICK_SIZE, new_figure

_WIDTH, _LETTERS = 8.0, 112
"""Inches across, and letters in a line of text."""

_PANEL, _LINE = 2.7, 0.17
"""Inches down, of an image and of a line of text."""

_PIXELS = 1000
"""Of the longest side of an image as drawn; more would only make the file large."""


def plot_examples(examples: Iterable[Example], *, n_images: int = 3) -> Figure:
    """A row for each example: its id, question, answer and candidates, and below them images with its evidence in blue.

    Of an example with several images those with evidence are drawn, `n_images` at most, else the first; evidence that
    is a whole image is a frame around it. Of a video the middle one of the evidence's frames stands for all.

    Raises InvalidTypeError for what is no list of examples; what images raise that do not open, or boxes outside them.

    >>> from mmlens.data import scene_examples
    >>> figure = plot_examples(scene_examples("objects", 2, seed=0))
    >>> len(figure.axes)
    2
    """
    shown = examples_of(examples)
    most = whole_number("n_images", n_images, least=1)
    rows = [(_said(example), _panels(example, most)) for example in shown]
    heights = [_LINE * (1 + len(said.splitlines())) + _inches(panels) for said, panels in rows]
    figure = new_figure(_WIDTH, sum(heights))
    parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)
    for part, (said, panels) in zip(parts[:, 0], rows, strict=True):
        title = part.suptitle(said, x=0.01, ha="left", fontsize=TICK_SIZE, color=INK)
        # A "$" is money here, and no formula.
        title.set_parse_math(False)
        if panels:
            for ax, panel in zip(part.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
                _draw(ax, *panel)
    return figure


def _inches(panels: list[tuple[Image.Image, list[Any], str]]) -> float:
    """How far down the images of an example reach, side by side."""
    across = _WIDTH / max(len(panels), 1)
    return max((min(_PANEL, across * image.height / image.width) + 0.3 for image, _, _ in panels), default=0)


def _said(example: Example) -> str:
    asked = " ".join(example.question.split())
    lines = [
        " · ".join(part for part in (example.id, example.kind, example.group) if part),
        *textwrap.wrap(f"Q: {asked}", _LETTERS, max_lines=4),
        *textwrap.wrap(f"A: {example.answer}", _LETTERS, max_lines=2),
    ]
    if example.candidates:
        lines += textwrap.wrap(f"of: {', '.join(example.candidates)}", _LETTERS, max_lines=2)
    if not example.evidence:
        lines.append("no evidence: a text-only control")
    return "\n".join(line for line in lines if line)


def _panels(example: Example, most: int) -> list[tuple[Image.Image, list[Any], str]]:
    """(image, boxes, caption) of what is drawn; a box that is None is the whole image."""
    panels = []
    numbers = sorted({region.image for region in example.evidence if region.image is not None})
    drawn, n_left_out = numbers[:most], len(numbers[most:])
    for number in drawn or range(min(1, len(example.images))):
        boxes = [region.box for region in example.evidence if region.image == number]
        more = f"; evidence in {n_left_out} more" if n_left_out and number == drawn[-1] else ""
        caption = f"image {number + 1} of {len(example.images)}{more}" if len(example.images) > 1 else ""
        panels.append((example.images[number], boxes, caption))
    for number, video in enumerate(example.videos):
        regions = [region for region in example.evidence if region.video == number]
        first, stop = next((each.frames for each in regions if each.frames), (0, video.n_frames))
        middle = (first + stop - 1) // 2
        caption = f"frame {middle} of {video.n_frames}, evidence in {first} to {stop - 1}"
        panels.append((video.frame(middle), [region.box for region in regions], caption))
    return panels[:most]


def _draw(ax: Axes, image: Image.Image, boxes: list[Any], caption: str) -> None:
    width, height = image.size
    small = image.copy()
    small.thumbnail((_PIXELS, _PIXELS))
    ax.imshow(small.convert("RGB"), extent=(0, width, height, 0), interpolation="antialiased")
    for box in boxes:
        left, top, right, bottom = box or (0, 0, width, height)
        ax.add_patch(
            Rectangle(
                (left, top),
                right - left,
                bottom - top,
                fill=False,
                edgecolor=EVIDENCE,
                linewidth=1.8 if box else 3.0,
                path_effects=[matplotlib.patheffects.withStroke(linewidth=3.6, foreground="white")]
                if box
                else (),
            )
        )
    ax.set_anchor("W")
    ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_color(MUTED)
    if caption:
        ax.set_xlabel(caption, fontsize=TICK_SIZE - 1, color=MUTED, loc="left")
