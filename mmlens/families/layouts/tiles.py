"""The image stretched over a canvas of tiles, each a grid of its own, and a view of the whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import ProcessorMixin
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from mmlens.families.layouts.grids import Size, grid_side, image_grid, tiled
from mmlens.token_map import ImageGrid


def internvl(processor: ProcessorMixin, inputs: Mapping[str, Any], sizes: Sequence[Size]) -> list[ImageGrid]:
    """InternVL: the image stretched over a canvas of tiles (tiles 1..), then a thumbnail of it all (tile 0).

    An image that gets one tile has no thumbnail: the tile is then the whole image (tile 0).
    """
    if not sizes:
        return []
    options = processor._merge_kwargs()["images_kwargs"]
    image_processor = processor.image_processor

    def option(name: str) -> Any:
        return options.get(name, getattr(image_processor, name))

    size_option = option("size")
    tile_height, tile_width = size_option["height"], size_option["width"]
    side = grid_side(processor.image_seq_length, "image_seq_length")
    grids = []
    for size in sizes:
        across, down = 1, 1
        if option("crop_to_patches") and option("max_patches") > 1:
            across, down = get_optimal_tiled_canvas(
                (size[1], size[0]), (tile_height, tile_width), option("min_patches"), option("max_patches")
            )
        grids.append(image_grid(size, tiled(size, across, down, (tile_width, tile_height), side)))
    return grids


def idefics3(processor: ProcessorMixin, inputs: Mapping[str, Any], sizes: Sequence[Size]) -> list[ImageGrid]:
    """Idefics3, SmolVLM: the image stretched over whole tiles (tiles 1..), then a global image (tile 0).

    Without do_image_splitting, or where one tile holds the image, only the global image.
    """
    if not sizes:
        return []
    image_processor = processor.image_processor
    tile = image_processor.max_image_size["longest_edge"]
    side = grid_side(processor.image_seq_len, "image_seq_len")
    grids = []
    for size in sizes:
        across, down = 1, 1
        if image_processor.do_image_splitting:
            resized = _idefics3_resized(image_processor, size) if image_processor.do_resize else size
            across, down = _idefics3_tiles(resized, tile)
        grids.append(image_grid(size, tiled(size, across, down, (tile, tile), side)))
    return grids


def _idefics3_resized(image_processor: Any, size: Size) -> Size:
    """(width, height) after the first resize: the longest edge given, the other rounded up to an even number."""
    target = image_processor.size
    if not target.get("longest_edge"):
        return target["width"], target["height"]
    width, height = size
    longest = target["longest_edge"]
    if width >= height:
        width, height = longest, int(longest / (width / height))
        height += height % 2
    else:
        width, height = int(longest * (width / height)), longest
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    aspect_ratio = width / height
    most = 4096  # the processor's own bound on either edge
    if width >= height and width > most:
        width, height = most, int(most / aspect_ratio)
    elif height > width and height > most:
        width, height = int(most * aspect_ratio), most
    return max(width, 1), max(height, 1)


def _idefics3_tiles(resized: Size, tile: int) -> tuple[int, int]:
    """Tiles (across, down): each edge stretched to whole tiles, the longer one first."""
    width, height = resized
    aspect_ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / aspect_ratio) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * aspect_ratio) / tile) * tile
    return width // tile, height // tile
