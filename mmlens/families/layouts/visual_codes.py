"""Images as codes of a learnt vocabulary: one code per cell of the image, which the decoder reads as a token id."""

from __future__ import annotations

import numpy as np
from transformers import ProcessorMixin

from mmlens.families.layouts.fixed_grid import centre_cropped, centre_picture, resized_size
from mmlens.families.layouts.grids import (
    Inputs,
    Sizes,
    cells,
    closed_rows,
    grid_side,
    image_grid,
    joined,
    square_edge,
    whole_grid,
)
from mmlens.token_map import WHOLE_IMAGE_TILE, ImageGrid


def chameleon(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Chameleon: resized, cropped at the centre, a square of codes. What was cropped away has no token."""
    image_processor = processor.image_processor
    side = grid_side(processor.image_seq_length, "image_seq_length")
    seen = square_edge(image_processor.crop_size)
    grids = []
    for size in sizes:
        shown = resized_size(image_processor, size)
        axes = [
            centre_cropped(length, resized, seen, cells(side, seen / side))
            for length, resized in zip(size, shown, strict=True)
        ]
        picture = centre_picture(size, shown, (seen, seen))
        grids.append(image_grid(size, [(WHOLE_IMAGE_TILE, axes[0], axes[1])], resized=picture))
    return grids


def emu3(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Emu3: the image resized to whole cells, rows of codes that each end in the code of a line's end."""
    return [
        joined(size, closed_rows(size, grid, int(grid.row.max()) + 1))
        for size, grid in zip(sizes, _cells_of(inputs, sizes, processor.downsample_ratio), strict=True)
    ]


def apertus(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Apertus 1.5: the image resized to whole cells, one code for each; rows are closed by a token of text."""
    return _cells_of(inputs, sizes, processor.image_processor.spatial_factor)


def _cells_of(inputs: Inputs, sizes: Sizes, cell: int) -> list[ImageGrid]:
    """One token per cell of `cell` pixels of each resized image, whose heights and widths are in `image_sizes`."""
    return [
        whole_grid(size, (width // cell, height // cell), cell, (width, height))
        for size, (height, width) in zip(sizes, np.asarray(inputs["image_sizes"]).tolist(), strict=True)
    ]
