"""Images as codes of a learnt vocabulary: one code per cell of the image, which the decoder reads as a token id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import ProcessorMixin

from mmlens.families.layouts.fixed_grid import centre_cropped, resized_size
from mmlens.families.layouts.grids import (
    Size,
    cells,
    grid_side,
    image_grid,
    joined,
    part_of,
    pixels,
    separator,
    square_edge,
)
from mmlens.token_map import WHOLE_IMAGE_TILE, ImageGrid


def chameleon(processor: ProcessorMixin, inputs: Mapping[str, Any], sizes: Sequence[Size]) -> list[ImageGrid]:
    """Chameleon: resized, cropped at the centre, a square of codes. What was cropped away has no token."""
    if not sizes:
        return []
    image_processor = processor.image_processor
    side = grid_side(processor.image_seq_length, "image_seq_length")
    seen = square_edge(image_processor.crop_size)
    grids = []
    for size in sizes:
        axes = [
            centre_cropped(length, resized, seen, cells(side, seen / side))
            for length, resized in zip(size, resized_size(image_processor, size), strict=True)
        ]
        grids.append(image_grid(size, [(WHOLE_IMAGE_TILE, axes[0], axes[1])]))
    return grids


def emu3(processor: ProcessorMixin, inputs: Mapping[str, Any], sizes: Sequence[Size]) -> list[ImageGrid]:
    """Emu3: the image resized to whole cells, rows of codes that each end in the code of a line's end."""
    if not sizes:
        return []
    cell = processor.downsample_ratio
    grids = []
    for size, (height, width) in zip(sizes, np.asarray(inputs["image_sizes"]).tolist(), strict=True):
        n_columns, n_rows = width // cell, height // cell
        columns = pixels(cells(n_columns, cell), size[0] / width, limit=size[0])
        rows = pixels(cells(n_rows, cell), size[1] / height, limit=size[1])
        grid = image_grid(size, [(WHOLE_IMAGE_TILE, columns, rows)])
        parts: list[ImageGrid] = []
        for row in range(n_rows):
            parts += [part_of(grid, slice(row * n_columns, (row + 1) * n_columns)), separator(size)]
        grids.append(joined(size, parts))
    return grids
