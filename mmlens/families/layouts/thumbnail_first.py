"""A thumbnail of the whole image, then the image stretched over a canvas of tiles."""

from __future__ import annotations

from transformers import ProcessorMixin

from mmlens.families.layouts.grids import Inputs, Sizes, image_grid, tiled, whole_view
from mmlens.token_map import WHOLE_IMAGE_TILE, ImageGrid


def perception(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Perception LM: a thumbnail (tile 0), then tiles row by row (1..); a token is pooling_ratio x pooling_ratio
    patches.

    With a vision_input_type other than "thumb+tile", the thumbnail alone. An image that gets one tile has its
    thumbnail besides.
    """
    image_processor = processor.image_processor
    tile = image_processor.tile_size
    cell = processor.patch_size * processor.pooling_ratio
    side = tile // processor.patch_size // processor.pooling_ratio
    grids = []
    for size in sizes:
        thumbnail = whole_view(size, (side, side), cell, (tile, tile))
        views = [thumbnail]
        if image_processor.vision_input_type == "thumb+tile":
            width, height = size
            across, down = image_processor._fit_image_to_canvas(
                width, height, tile
            ) or image_processor._find_closest_aspect_ratio(width, height, tile)
            tiles = tiled(size, across, down, (tile, tile), side)[:-1]
            views += tiles or [(WHOLE_IMAGE_TILE + 1, *thumbnail[1:])]
        grids.append(image_grid(size, views))
    return grids
