"""A view of the whole image, then slices of it in a grid, each stretched to a size of its own."""

from __future__ import annotations

import numpy as np
from transformers import ProcessorMixin

from mmlens.families.layouts.grids import Inputs, Size, Sizes, View, cells, image_grid, pixels
from mmlens.families.layouts.tiles import image_options
from mmlens.token_map import WHOLE_IMAGE_TILE, ImageGrid, TokenMapError


def minicpm(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """MiniCPM-V, MiniCPM-OCR: the whole image (tile 0), then its slices row by row (tiles 1..).

    target_sizes says how many patches every view has; a token is 4 x 4 of them, or 2 x 2 where
    downsample_mode is "4x".
    """
    option = image_options(processor)
    if not option("do_resize"):
        raise TokenMapError(
            "do_resize = False is not laid out here; expected every view resized to whole tokens"
        )
    merged = 2 if option("downsample_mode") == "4x" else 4
    patches = iter(np.asarray(inputs["target_sizes"]).tolist())

    def view(tile: int, size: Size, across: int, down: int) -> View:
        place = max(tile - 1, 0)
        axes = []
        for length, n_patches, n_slices, number in zip(
            size, reversed(next(patches)), (across, down), (place % across, place // across), strict=True
        ):
            n, edge = n_patches // merged, length / n_slices
            axes.append(pixels(cells(n, edge / n, start=number * edge), 1, limit=length))
        return tile, axes[0], axes[1]

    grids = []
    for size in sizes:
        views = [view(WHOLE_IMAGE_TILE, size, 1, 1)]
        slices = None
        if option("slice_mode"):
            slices = processor.image_processor.get_sliced_grid(
                (size[1], size[0]), option("max_slice_nums"), option("scale_resolution")
            )
        if slices is not None:
            down, across = slices
            views += [view(tile, size, across, down) for tile in range(1, down * across + 1)]
        grids.append(image_grid(size, views))
    return grids
