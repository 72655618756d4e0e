"""Patches merged by two convolutions of stride 2: a token's cell is the 4 x 4 patches of its own strides.

The kernels reach further, over a patch or two of the neighbouring cells.
"""

from __future__ import annotations

import numpy as np
from transformers import ProcessorMixin

from mmlens.families.layouts.grids import (
    Inputs,
    Sizes,
    cells,
    closed_rows,
    grid_side,
    image_grid,
    joined,
    newlined,
    pixels,
    separator,
    square_edge,
    stretched_grid,
    tiled,
)
from mmlens.families.layouts.tiles import image_options, stretched_tiles
from mmlens.token_map import WHOLE_IMAGE_TILE, ImageGrid, TokenMapError


def got_ocr2(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """GOT-OCR 2: the image stretched to one square; with crop_to_patches over a canvas of squares (tiles 1..), then
    the whole once more (tile 0)."""
    square_edge(image_options(processor)("size"))
    return stretched_tiles(processor, sizes, grid_side(processor.num_image_tokens, "num_image_tokens"))


def pp_chart2table(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """PP-Chart2Table: the image stretched to one square.

    Its processor expands nothing: the chat template writes all of an image's tokens, and they are counted.
    """
    edge = square_edge(processor.image_processor.size)
    n_tokens = int((np.asarray(inputs["input_ids"]) == processor.image_token_id).sum())
    side = grid_side(
        n_tokens // len(sizes), "number of tokens for each image, which the chat template writes,"
    )
    return [stretched_grid(size, 1, 1, (edge, edge), side) for size in sizes]


def step3p7(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Step 3.7: windows of the image, each stretched to a crop (tiles 1.., none of small images), then the whole
    stretched to a square (tile 0).

    A sliver of an image is first padded to a square, at its right or bottom.
    """
    option = image_options(processor)
    view, crop = square_edge(option("size")), option("patch_size")
    token = processor.image_processor.vision_patch_size * processor.image_processor.downsampler_stride
    grids = []
    for size in sizes:
        _, cropped, window, across, down, padded = processor.image_processor._plan_patches(*size, view, crop)
        canvas = (max(size), max(size)) if padded else size
        views = []
        for tile in range(1, across * down + 1):
            axes = []
            for length, full, shown, number in zip(
                size, canvas, cropped, ((tile - 1) % across, (tile - 1) // across), strict=True
            ):
                start = number * window
                n, edge = crop // token, min(start + window, shown) - start
                axes.append(pixels(cells(n, edge / n, start), full / shown, limit=length))
            views.append((tile, axes[0], axes[1]))
        columns, rows = (
            pixels(cells(view // token, token), full / view, limit=length)
            for length, full in zip(size, canvas, strict=True)
        )
        grids.append(image_grid(size, [*views, (WHOLE_IMAGE_TILE, columns, rows)]))
    return grids


def unlimited_ocr(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Unlimited-OCR: the image stretched over a canvas of tiles, as ONE mosaic (tile 1; none of small images), then
    the whole padded to a square (tile 0). Every row ends in a learnt newline, the image in a learnt separator.
    """
    # The function that chooses the canvas stands in a module that needs torchvision, as this processor's images do.
    from transformers.models.unlimited_ocr import image_processing_unlimited_ocr as images

    option = image_options(processor)
    token = processor.patch_size * processor.downsample_ratio
    view, tile = max(option("size")["height"], option("size")["width"]), option("tile_size")
    if view % token or tile % token:
        raise TokenMapError(
            f"views of {view} and tiles of {tile} pixels are not whole tokens of {token} pixels"
        )
    grids = []
    for size in sizes:
        parts = []
        if option("crop_to_patches") and max(size) > tile:
            across, down = images.get_optimal_tiled_canvas(
                (size[1], size[0]), (tile, tile), option("min_patches"), option("max_patches")
            )
            columns, rows = (
                pixels(cells(n * (tile // token), token), length / (n * tile), limit=length)
                for n, length in zip((across, down), size, strict=True)
            )
            parts.append(newlined(size, columns, rows))
        if not option("crop_to_patches") and view <= option("maximum_pad_value"):
            whole = image_grid(size, tiled(size, 1, 1, (view, view), view // token))
        else:
            axes = []
            for length in size:
                shown = round(length * view / max(size))
                scale = length / shown
                axes.append(
                    pixels(
                        cells(view // token, token), scale, start=(view - shown) // 2 * scale, limit=length
                    )
                )
            whole = image_grid(size, [(WHOLE_IMAGE_TILE, axes[0], axes[1])])
        grids.append(joined(size, [*parts, *closed_rows(size, whole, view // token), separator(size)]))
    return grids
