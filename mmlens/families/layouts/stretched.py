"""The whole image stretched to one square view, one token per cell; Gemma 3 may add crops, each a view of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import ProcessorMixin

from mmlens import internals
from mmlens.families.layouts.grids import (
    Inputs,
    Size,
    Sizes,
    View,
    cells,
    grid_side,
    image_grid,
    pixels,
    square_edge,
    visual_token,
    whole_image,
)
from mmlens.token_map import ImageGrid, TokenMapError


def paligemma(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """PaliGemma: one token per patch of the stretched image."""
    side = _side(processor)
    return [_views(size, [(0, 0, *size)], processor, side) for size in sizes]


@visual_token(lambda processor: processor.tokenizer.image_token)
def gemma3(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Gemma 3, ShieldGemma 2: one token per pooled block of the stretched image (tile 0).

    With do_pan_and_scan, an elongated image is also cut across its longer edge into crops (tiles 1..), each
    stretched to the square in its turn.
    """
    options = internals.image_defaults(processor)
    image_processor = processor.image_processor
    side = _side(processor)
    grids = []
    for size in sizes:
        boxes = [(0, 0, *size)]
        if options.get("do_pan_and_scan", image_processor.do_pan_and_scan):
            boxes += _pan_and_scan(image_processor, options, size)
        grids.append(_views(size, boxes, processor, side))
    return grids


def _views(
    size: Size, boxes: list[tuple[int, int, int, int]], processor: ProcessorMixin, side: int
) -> ImageGrid:
    """The whole image, and crops of it, each stretched to one square."""
    edge = square_edge(processor.image_processor.size)
    views = [_view(tile, box, size, processor, side) for tile, box in enumerate(boxes)]
    return image_grid(size, views, resized=whole_image(size, (edge, edge)))


def _side(processor: ProcessorMixin) -> int:
    if not processor.image_processor.do_resize:
        raise TokenMapError(
            "do_resize = False is not laid out here; expected every image stretched to one square"
        )
    return grid_side(processor.image_seq_length, "image_seq_length")


def _view(
    tile: int, box: tuple[int, int, int, int], size: Size, processor: ProcessorMixin, side: int
) -> View:
    """The cells of a square over which a box of the image was stretched."""
    edge = square_edge(processor.image_processor.size)
    columns, rows = (
        pixels(cells(side, edge // side), (stop - start) / edge, start=-start, limit=min(stop, length))
        for start, stop, length in zip(box[:2], box[2:], size, strict=True)
    )
    return tile, columns, rows


def _pan_and_scan(
    image_processor: Any, options: Mapping[str, Any], size: Size
) -> list[tuple[int, int, int, int]]:
    """The crops that the image processor takes, found by letting it crop an image of pixel coordinates."""
    names = (
        "pan_and_scan_min_crop_size",
        "pan_and_scan_max_num_crops",
        "pan_and_scan_min_ratio_to_activate",
    )
    width, height = size
    coordinates = np.stack(np.broadcast_arrays(np.arange(width), np.arange(height)[:, None]))
    crops = image_processor.pan_and_scan(
        coordinates, **{name: options.get(name, getattr(image_processor, name)) for name in names}
    )
    return [
        (int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1)
        for x, y in (crop[:2] for crop in crops)
    ]
