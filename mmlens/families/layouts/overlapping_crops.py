"""A view of the whole image, then one mosaic of crops that overlap, so that every patch of it has its surroundings."""

from __future__ import annotations

import numpy as np
from transformers import ProcessorMixin

from mmlens.families.layouts.grids import (
    Inputs,
    Intervals,
    Sizes,
    cells,
    image_grid,
    pixels,
    square_edge,
    visual_token,
)
from mmlens.families.layouts.tiles import image_options
from mmlens.token_map import WHOLE_IMAGE_TILE, ImageGrid


@visual_token(lambda processor: "<im_patch>")
def molmo2(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Molmo 2: the image stretched to one square (tile 0), then stretched over the canvas of its crops (tile 1).

    A token pools a window of patches (2 x 2). Every patch of the canvas is taken from the one crop that it is
    not the margin of, so rows and columns count over the whole canvas. The tokens that close rows and views are
    text.
    """
    # The function stands in a module of its own for every image processor.
    from transformers.models.molmo2.image_processing_molmo2 import compute_crop_geometry

    option = image_options(processor)
    view, patch = square_edge(option("size")), option("patch_size")
    pool_height, pool_width = option("pooling_size")
    grids = []
    for size, (whole_rows, whole_columns, rows, columns) in zip(
        sizes, np.asarray(inputs["image_grids"]).tolist(), strict=True
    ):
        width, height = size
        _, _, canvas_height, canvas_width = compute_crop_geometry(
            height,
            width,
            max_crops=option("max_crops"),
            overlap_margins=option("overlap_margins"),
            crop_size=view,
            patch_size=patch,
        )
        views = []
        for tile, n_columns, n_rows, edges in (
            (WHOLE_IMAGE_TILE, whole_columns, whole_rows, (view, view)),
            (WHOLE_IMAGE_TILE + 1, columns, rows, (canvas_width, canvas_height)),
        ):
            views.append(
                (
                    tile,
                    _pooled(n_columns, pool_width, patch, edges[0], width),
                    _pooled(n_rows, pool_height, patch, edges[1], height),
                )
            )
        grids.append(image_grid(size, views))
    return grids


def _pooled(n: int, pool: int, patch: int, edge: int, length: int) -> Intervals:
    """`n` windows of `pool` patches over an edge; half of the patches that lack stand before it, rounded down."""
    before = (n * pool - edge // patch) // 2
    scale = length / edge
    return pixels(cells(n, pool * patch), scale, start=before * patch * scale, limit=length)
