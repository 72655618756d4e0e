"""The image in the upper left corner of whole cells, unstretched: padding at the right and bottom fills them up."""

from __future__ import annotations

import math

import numpy as np
from transformers import ProcessorMixin

from mmlens.families.layouts.grids import (
    Inputs,
    Sizes,
    cells,
    image_grid,
    pixels,
    square_edge,
    whole_grid,
    whole_image,
)
from mmlens.families.layouts.tiles import image_options
from mmlens.token_map import WHOLE_IMAGE_TILE, ImageGrid, TokenMapError


def fuyu(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Fuyu: an image that is too large shrunk to fit, one token per patch; the token that closes a row is text."""
    image_processor = processor.image_processor
    if not image_processor.do_pad:
        raise TokenMapError("do_pad = False is not laid out for fuyu; expected every image padded to `size`")
    room = (image_processor.size["width"], image_processor.size["height"])
    patches = (image_processor.patch_size["width"], image_processor.patch_size["height"])
    grids = []
    for size in sizes:
        shrunk = min(1.0, room[0] / size[0], room[1] / size[1]) if image_processor.do_resize else 1.0
        axes, shown_size = [], []
        for length, patch, most in zip(size, patches, room, strict=True):
            shown = length if shrunk == 1 else int(length * shrunk)
            shown_size.append(shown)
            seen = min(most, math.ceil(shown / patch) * patch)
            axes.append(pixels(cells(seen // patch, patch), length / shown, limit=length))
        picture = whole_image(size, (shown_size[0], shown_size[1]))
        grids.append(image_grid(size, [(WHOLE_IMAGE_TILE, axes[0], axes[1])], resized=picture))
    return grids


def inkling2(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Inkling 2: the image in its own size, one token per square cell; image_grid_thw counts cells."""
    cell = square_edge(processor.image_processor.size)
    return [
        whole_grid(size, (columns, rows), cell, size)
        for size, (_, rows, columns) in zip(sizes, np.asarray(inputs["image_grid_thw"]).tolist(), strict=True)
    ]


def inkling(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Inkling: one token per square cell of the image, resized where rescale_image_frac says so.

    A width of whole cells has a last column of padding besides.
    """
    option = image_options(processor)
    cell = square_edge(option("size"))
    grids = []
    for size in sizes:
        ratio = 1.0
        if option("rescale_image_frac") is not None:
            longest, most = max(size), option("rescale_image_max_upscaled_long_edge")
            target = longest * option("rescale_image_frac")
            ratio = (target if most is None else min(target, max(most, longest))) / longest
        shown = size if ratio == 1 else (math.floor(size[0] * ratio + 0.5), math.floor(size[1] * ratio + 0.5))
        grids.append(whole_grid(size, (shown[0] // cell + 1, -(-shown[1] // cell)), cell, shown))
    return grids
