"""The image stretched over a canvas of tiles, each a grid of its own, and a view of the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import ProcessorMixin
from transformers.image_utils import SizeDict
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.idefics3.image_processing_pil_idefics3 import get_resize_output_image_size
from transformers.models.ovis2 import image_processing_pil_ovis2 as ovis2_images

from mmlens import internals
from mmlens.families.layouts.grids import (
    Inputs,
    SeenVideo,
    Size,
    Sizes,
    View,
    cells,
    grid_side,
    image_grid,
    over_time,
    pixels,
    square_edge,
    stretched_grid,
    tiled,
    visual_token,
    whole_grid,
)
from mmlens.token_map import WHOLE_IMAGE_TILE, ImageGrid, TokenMapError, VideoGrid

Canvas = Callable[[Size, Size, int, int], Size]
"""(height, width) of image and tile, fewest and most tiles -> tiles across and down."""


def internvl(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """InternVL, Qianfan-OCR: the image stretched over a canvas of tiles (tiles 1..), then a thumbnail of it all
    (tile 0).

    An image that gets one tile has no thumbnail: the tile is then the whole image (tile 0).
    """
    return stretched_tiles(processor, sizes, grid_side(processor.image_seq_length, "image_seq_length"))


def aya(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Aya Vision: InternVL's tiles and thumbnail; img_size and patch_size say how many tokens a tile has."""
    return stretched_tiles(processor, sizes, processor.img_size // processor.patch_size)


def cohere2(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Cohere Command A Vision: InternVL's tiles and thumbnail, on a canvas that shrinks the image least.

    Its image processor calls the number of tokens on a tile's side patch_size.
    """
    # The image processor's module needs torchvision, and so does the processor that was given.
    from transformers.models.cohere2_vision import image_processing_cohere2_vision as cohere2_images

    return stretched_tiles(processor, sizes, processor.patch_size, cohere2_images.get_optimal_tiled_canvas)


def stretched_tiles(
    processor: ProcessorMixin, sizes: Sizes, side: int, canvas: Canvas = get_optimal_tiled_canvas
) -> list[ImageGrid]:
    """Tiles of `side` x `side` tokens over the canvas that `canvas` chooses for each image."""
    option = image_options(processor)
    size_option = option("size")
    tile_height, tile_width = size_option["height"], size_option["width"]
    grids = []
    for size in sizes:
        across, down = 1, 1
        if option("crop_to_patches") and option("max_patches") > 1:
            across, down = canvas(
                (size[1], size[0]), (tile_height, tile_width), option("min_patches"), option("max_patches")
            )
        edges = (tile_width, tile_height)
        grids.append(stretched_grid(size, across, down, edges, side))
    return grids


def image_options(processor: ProcessorMixin) -> Callable[[str], Any]:
    """An image option by name: the processor's own default for it, else the image processor's attribute."""
    defaults = internals.image_defaults(processor)
    return lambda name: defaults.get(name, getattr(processor.image_processor, name, None))


def internvl_video(processor: ProcessorMixin, inputs: Inputs, videos: Sequence[SeenVideo]) -> list[VideoGrid]:
    """InternVL: every frame stretched to one tile."""
    if processor.video_processor.do_center_crop:
        raise TokenMapError("do_center_crop is not laid out for videos of internvl")
    return _stretched_frames(videos, grid_side(processor.image_seq_length, "image_seq_length"))


def smolvlm_video(processor: ProcessorMixin, inputs: Inputs, videos: Sequence[SeenVideo]) -> list[VideoGrid]:
    """SmolVLM: every frame stretched to one square, without tiles."""
    if not processor.video_processor.do_resize:
        raise TokenMapError("do_resize = False is not laid out for videos of smolvlm")
    return _stretched_frames(videos, grid_side(processor.image_seq_len, "image_seq_len"))


def _stretched_frames(videos: Sequence[SeenVideo], side: int) -> list[VideoGrid]:
    return [over_time(video, whole_grid(video.size, (side, side), 1, (side, side))) for video in videos]


def granite_docling(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Granite Docling: the page stretched over whole tiles (tiles 1..), then a view of it all (tile 0).

    On the fine route (tile_fine_mask among the inputs) a tile has four times as many tokens.
    """
    defaults = internals.image_defaults(processor)
    image_processor = processor.image_processor
    tile = square_edge(image_processor.size)
    side = grid_side(processor.image_seq_len, "image_seq_len") * (2 if "tile_fine_mask" in inputs else 1)
    grids = []
    for width, height in sizes:
        down, across = image_processor.get_tile_grid(height, width, defaults)
        grids.append(stretched_grid((width, height), across, down, (tile, tile), side))
    return grids


@visual_token(lambda processor: "<IMG_ATOM>")
def ovis2(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Ovis 2: a view of the whole image (tile 0), then the image stretched over a canvas of tiles (tiles 1..)."""
    option = image_options(processor)
    tile = square_edge(option("size"))
    side = grid_side(processor.image_seq_length, "image_seq_length")
    if not option("do_resize") or option("do_center_crop"):
        raise TokenMapError("do_resize = False and do_center_crop are not laid out for ovis2")
    grids = []
    for size in sizes:
        across, down = 1, 1
        if option("crop_to_patches") and option("max_patches") > 1:
            if option("use_covering_area_grid"):
                across, down = ovis2_images.get_min_tile_covering_grid(
                    (size[1], size[0]), target_patch_size=tile, max_image_tiles=option("max_patches")
                )
            else:
                across, down = ovis2_images.get_optimal_tiled_canvas(
                    (size[1], size[0]), (tile, tile), option("min_patches"), option("max_patches")
                )
        *tiles, whole = tiled(size, across, down, (tile, tile), side)
        grids.append(image_grid(size, [whole, *tiles]))
    return grids


@visual_token(lambda processor: processor.img_patch_token)
def llama4(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Llama 4: the image in the upper left corner of a padded canvas of tiles (tiles 1..), then a view of the
    whole image stretched to one tile (tile 0).

    A canvas of one tile is tile 0 itself, padded and not stretched. Tokens of padding have boxes without area.
    """
    # The image processor's module needs torchvision, and so does the processor that was given.
    from transformers.models.llama4 import image_processing_llama4 as llama4_images

    option = image_options(processor)
    tile = square_edge(option("size"))
    merged = math.isqrt(processor.downsample_ratio) * processor.patch_size
    if tile % merged:
        raise TokenMapError(f"tiles of {tile} pixels are not whole tokens of {merged} pixels")
    side = tile // merged
    resolutions = torch.tensor(
        llama4_images.find_supported_resolutions(
            max_num_chunks=option("max_patches"), patch_size=SizeDict(height=tile, width=tile)
        )
    )
    to_max_canvas = option("resize_to_max_canvas")
    grids = []
    for width, height in sizes:
        size = (width, height)
        canvas = llama4_images.get_best_fit((height, width), resolutions, resize_to_max_canvas=to_max_canvas)
        canvas_height, canvas_width = canvas.tolist()
        room = (canvas_height, canvas_width)
        if not to_max_canvas:
            room = (min(max(height, tile), canvas_height), min(max(width, tile), canvas_width))
        shown_height, shown_width = llama4_images.get_max_res_without_distortion((height, width), room)
        shown = (max(shown_width, 1), max(shown_height, 1))
        across, down = canvas_width // tile, canvas_height // tile
        views: list[View] = []
        for r in range(down):
            for c in range(across):
                columns, rows = (
                    pixels(cells(side, merged, start=n * tile), length / fitted, limit=length)
                    for n, length, fitted in zip((c, r), size, shown, strict=True)
                )
                views.append((1 + r * across + c, columns, rows))
        if len(views) == 1:
            views = [(WHOLE_IMAGE_TILE, *views[0][1:])]
        else:
            views += tiled(size, 1, 1, (tile, tile), side)
        grids.append(image_grid(size, views))
    return grids


def lfm2(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """LFM2-VL: a large image stretched over a canvas of tiles (tiles 1..), then, with use_thumbnail, a view of
    the whole image (tile 0); a smaller image is that view alone.

    A token stands for downsample_factor x downsample_factor patches; spatial_shapes hold every view's patches.
    """
    option = image_options(processor)
    image_processor = processor.image_processor
    factor, tile = option("downsample_factor"), option("tile_size")
    budget = {name: option(name) for name in ("max_image_tokens", "encoder_patch_size", "downsample_factor")}
    shapes = iter(torch.as_tensor(inputs["spatial_shapes"]).tolist())
    grids = []
    for width, height in sizes:
        across, down = 1, 1
        splits = option("do_image_splitting") and not option("min_tiles") == option("max_tiles") == 1
        if splits and image_processor._is_image_too_large(
            height=height, width=width, max_pixels_tolerance=option("max_pixels_tolerance"), **budget
        ):
            across, down, *_ = image_processor._get_grid_layout(
                height, width, option("min_tiles"), option("max_tiles"), tile
            )
        views: list[View] = []
        if across * down > 1:
            for number in range(across * down):
                views.append(_patched(next(shapes), (width, height), factor, number, across, down))
        if across * down == 1 or option("use_thumbnail"):
            views.append(_patched(next(shapes), (width, height), factor))
        grids.append(image_grid((width, height), views))
    return grids


def _patched(
    patches: Sequence[int], size: Size, factor: int, number: int | None = None, across: int = 1, down: int = 1
) -> View:
    """Tile `number` of a canvas over which the image was stretched, a token per `factor` x `factor` patches."""
    r, c = divmod(number or 0, across)
    columns, rows = (
        pixels(cells(n // factor, factor, start=n * at), length / (n * tiles), limit=length)
        for n, at, tiles, length in zip(reversed(patches), (c, r), (across, down), size, strict=True)
    )
    return (WHOLE_IMAGE_TILE if number is None else number + 1, columns, rows)


def idefics3(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Idefics3, SmolVLM: the image stretched over whole tiles (tiles 1..), then a global image (tile 0).

    Without do_image_splitting, or where one tile holds the image, only the global image.
    """
    image_processor = processor.image_processor
    tile = image_processor.max_image_size["longest_edge"]
    side = grid_side(processor.image_seq_len, "image_seq_len")
    grids = []
    for size in sizes:
        across, down = 1, 1
        if image_processor.do_image_splitting:
            resized = _idefics3_resized(image_processor, size) if image_processor.do_resize else size
            across, down = _idefics3_tiles(resized, tile)
        grids.append(stretched_grid(size, across, down, (tile, tile), side))
    return grids


def _idefics3_resized(image_processor: Any, size: Size) -> Size:
    """(width, height) after the first resize: the longest edge given, the other rounded up to an even number."""
    target = image_processor.size
    if not target.get("longest_edge"):
        return target["width"], target["height"]
    height, width = get_resize_output_image_size(np.broadcast_to(0, size[::-1]), target["longest_edge"])
    return width, height


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
