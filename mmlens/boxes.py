"""Boxes: what one is, and its pixels on other scales.

A box is (left, top, right, bottom), right and bottom exclusive, in pixels of the original image; whatever takes a box
takes it so. Models answer on other scales: in pixels of the image as they were shown it (Qwen2.5-VL), in parts of a
thousand of its width and height (Qwen3-VL, InternVL), or from 0 to 1. `to_pixels` and `from_pixels` convert; of an
image that a prompt holds, `TokenMap.to_original` and `TokenMap.from_original`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmlens.arguments import listed, number, unknown_name_message
from mmlens.errors import InvalidValueError

Box = tuple[float, float, float, float]
_RELATIVE: dict[str, int] = {"0-1": 1, "0-1000": 1000}
"""Scales of parts of an image's width and height: what the whole is counted as."""

SLIVER = 0.01
"""Pixels of overlap that do not count, so that rounded box edges match no neighbour."""


class TokenMapError(InvalidValueError):
    """A region or layout that cannot be mapped to positions."""


@dataclass(frozen=True)
class Shown:
    """One picture that the model was shown of an image: its (width, height), and which box of the original it shows.

    The box reaches beyond the image where the picture is padded, and is smaller where the image was cropped.
    """

    size: tuple[int, int]
    box: Box


def to_pixels(box: Sequence[float], scale: str, size: tuple[int, int]) -> Box:
    """A box that is counted from 0 to 1, or from 0 to 1000, in pixels of an image of `size` = (width, height).

    Raises TokenMapError for a box that leaves this scale or has no area, and for one from 0 to 1 given as 0 to 1000;
    InvalidValueError for another scale.

    >>> to_pixels((250, 0, 500, 1000), "0-1000", (640, 480))
    (160.0, 0.0, 320.0, 480.0)
    """
    canvas = _relative(scale)
    return _moved(_on_scale(box, scale, canvas, "the box"), canvas, (0, 0, *size))


def from_pixels(box: Sequence[float], scale: str, size: tuple[int, int]) -> Box:
    """A box in pixels of an image of `size` = (width, height), counted from 0 to 1 or from 0 to 1000; not rounded.

    Raises TokenMapError for a box outside the image, or without area.

    >>> from_pixels((160, 0, 320, 480), "0-1", (640, 480))
    (0.25, 0.0, 0.5, 1.0)
    """
    canvas = _relative(scale)
    return _moved(checked_box(box, size, "the box"), (0, 0, *size), canvas)


class BoxScales:
    """Boxes of a token map's images on other scales; a part of TokenMap."""

    def _grid(self, image: int, example: int) -> tuple[int, Any]:
        """The number of an image of an example, and its ImageGrid."""
        raise NotImplementedError

    def shown_size(self, image: int, *, example: int = 0) -> tuple[int, int]:
        """(width, height) of the picture of an image that the model was shown: after resizing, cropping and padding.

        Raises TokenMapError where it was shown several (tiles, or a view of the whole and crops), or where the
        family's layout does not know; IndexError where there is no such image.
        """
        return self._shown(image, example).size

    def to_original(self, image: int, box: Sequence[float], scale: str, *, example: int = 0) -> Box:
        """A box that a model answered with, in pixels of the original image.

        `scale` says what it is counted in: "resized" for pixels of the picture that the model was shown (Qwen2.5-VL),
        "0-1" or "0-1000" for parts of the image's width and height (Qwen3-VL). What a padded picture shows beyond the
        image is cut off.

        Raises TokenMapError for a box that leaves the scale, has no area or shows padding alone, and, of "resized", as
        `shown_size`.
        """
        canvas, shown = self._scale(scale, image, example)
        where = f"image {image} of example {example}"
        moved = _moved(_on_scale(box, scale, canvas, where), canvas, shown)
        return _common(moved, (0, 0, *self._grid(image, example)[1].size), f"{where}: the box {tuple(box)}")

    def from_original(self, image: int, box: Sequence[float], scale: str, *, example: int = 0) -> Box:
        """A box in pixels of the original image on another scale, as `to_original`; not rounded.

        What was cropped away is cut off. Raises TokenMapError for a box outside the image, for one that was cropped
        away whole, and, of "resized", as `shown_size`.
        """
        canvas, shown = self._scale(scale, image, example)
        where = f"image {image} of example {example}"
        inside = checked_box(box, self._grid(image, example)[1].size, where)
        return _moved(_common(inside, shown, f"{where}: the box {tuple(box)}"), shown, canvas)

    def _scale(self, scale: str, image: int, example: int) -> tuple[Box, Box]:
        """The box that a scale spans, on this scale and in pixels of the original image."""
        if scale == "resized":
            shown = self._shown(image, example)
            return (0, 0, *shown.size), shown.box
        return _relative(scale), (0, 0, *self._grid(image, example)[1].size)

    def _shown(self, image: int, example: int) -> Shown:
        number, grid = self._grid(image, example)
        if grid.resized is None:
            n_views = len(np.unique(grid.tile[grid.tile >= 0]))
            why = (
                f"it was shown {n_views} pictures of it"
                if n_views > 1
                else "this family's layout does not say"
            )
            raise TokenMapError(
                f"image {number} of example {example}: there is no one size that the model was shown ({why}); parts of "
                "the whole image are on the scales '0-1' and '0-1000'"
            )
        return grid.resized


def _relative(scale: object) -> Box:
    """The box that a relative scale spans."""
    if scale == "resized":
        raise InvalidValueError(
            "the scale 'resized' needs the prompt that the image stands in: prompt.token_map.to_original(image, box, "
            "'resized')"
        )
    if scale not in _RELATIVE:
        raise InvalidValueError(unknown_name_message("scale", scale, ("resized", *_RELATIVE)))
    most = _RELATIVE[str(scale)]
    return (0, 0, most, most)


def _on_scale(box: Sequence[float], scale: str, canvas: Box, where: str) -> Box:
    """`box`, if it has an area inside `canvas`, and is none from 0 to 1 on a larger scale."""
    left, top, right, bottom = box = box_of(where, box)
    if not (0 <= left < right <= canvas[2] and 0 <= top < bottom <= canvas[3]):
        raise TokenMapError(
            f"{where}: the box {tuple(box)} is not a box (left, top, right, bottom) on the scale {scale!r}, which goes "
            f"to {canvas[2]:g} x {canvas[3]:g}"
        )
    if right <= 1 and bottom <= 1 and max(canvas) > 2:
        raise TokenMapError(f"{where}: the box {tuple(box)} is on the scale '0-1', not {scale!r}")
    return left, top, right, bottom


def _moved(box: Box, source: Box, target: Box) -> Box:
    """A box within `source` at the same place within `target`."""
    left, top, right, bottom = (
        (edge - source[axis]) * (target[axis + 2] - target[axis]) / (source[axis + 2] - source[axis])
        + target[axis]
        for edge, axis in zip(box, (0, 1, 0, 1), strict=True)
    )
    return left, top, right, bottom


def _common(box: Box, other: Box, name: str) -> Box:
    """What two boxes have in common."""
    left, top = max(box[0], other[0]), max(box[1], other[1])
    right, bottom = min(box[2], other[2]), min(box[3], other[3])
    if left >= right or top >= bottom:
        raise TokenMapError(f"{name} and what the model was shown of the image have no pixel in common")
    return left, top, right, bottom


def box_of(name: str, value: object) -> Box:
    """Four plain numbers (left, top, right, bottom); of which image, and whether they fit it, is not looked at.

    >>> box_of("box", [0, 0, np.float64(16.5), 8])
    (0, 0, 16.5, 8)
    """
    expected = "a box (left, top, right, bottom) in pixels"
    sides = listed(name, value, expected)
    if len(sides) != 4:
        raise TokenMapError(f"{name}: a box is (left, top, right, bottom), not {tuple(sides)}")
    for side, given in zip(("left", "top", "right", "bottom"), sides, strict=True):
        if isinstance(given, numbers.Real) and not math.isfinite(given):
            raise TokenMapError(
                f"{name}: the box {tuple(sides)} is not a box (left, top, right, bottom) of finite numbers"
            )
        number(f"{side} of {name} {tuple(sides)}", given)
    left, top, right, bottom = (side.item() if hasattr(side, "item") else side for side in sides)
    return left, top, right, bottom


def checked_box(box: Sequence[float], size: tuple[int, int], where: str) -> Box:
    """`box`, if it is a box of positive area inside an image of `size` = (width, height) and in pixels.

    Raises TokenMapError for any other, and for one that lies within (0, 0, 1, 1) of an image of more than 2 pixels:
    that is a box scaled to 0 to 1, which would choose one pixel. A box scaled to 0 to 1000 is outside a smaller image,
    and in a larger one cannot be told from pixels.
    """
    width, height = size
    left, top, right, bottom = box = box_of(where, box)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        nearest = (
            max(0, min(left, right)),
            max(0, min(top, bottom)),
            min(width, max(left, right)),
            min(height, max(top, bottom)),
        )
        hint = (
            f"; the nearest box inside is {nearest}"
            if nearest[0] < nearest[2] and nearest[1] < nearest[3]
            else ""
        )
        if 0 <= left < right <= 1000 and 0 <= top < bottom <= 1000:
            thousandths = tuple(round(edge, 2) for edge in to_pixels(box, "0-1000", size))
            hint += f". If it is counted from 0 to 1000, it is {thousandths} (mmlens.boxes.to_pixels)"
        raise TokenMapError(
            f"{where}: the box {tuple(box)} is not a box (left, top, right, bottom) inside the image of "
            f"{width} x {height} pixels{hint}"
        )
    if right <= 1 and bottom <= 1 and max(size) > 2:
        scaled = tuple(
            round(edge * side, 2) for edge, side in zip((left, top, right, bottom), 2 * size, strict=True)
        )
        raise TokenMapError(
            f"{where}: the box {tuple(box)} is scaled to 0 to 1, and boxes are in pixels of the original image, "
            f"{width} x {height}: multiplied by its size it is {scaled}"
        )
    return left, top, right, bottom
