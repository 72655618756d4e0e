"""A base view of the whole image, then its tiles put together as one mosaic whose rows end in newlines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Float
from transformers import ProcessorMixin
from transformers.image_processing_utils import select_best_resolution

from mmlens.families.layouts.fixed_grid import cropped_view
from mmlens.families.layouts.grids import (
    Inputs,
    Intervals,
    SeenVideo,
    Size,
    Sizes,
    cells,
    grid_side,
    image_grid,
    joined,
    newlined,
    over_time,
    pixels,
    separator,
    square_edge,
    whole_grid,
    whole_view,
)
from mmlens.token_map import WHOLE_IMAGE_TILE, ImageGrid, TokenMapError, VideoGrid


def llava_onevision(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """LLaVA-OneVision: a base view of the whole image (tile 0), then the tiles as ONE mosaic (tile 1).

    The mosaic's row and column count over all tiles, after the model has cut away most of the padding; every
    row ends in a learnt newline. Above anyres_max_{n} the model shrinks the mosaic bilinearly: a token's box
    is then the union of the (up to 2 x 2) patches that it mixes. Where an example has several images, each is
    padded to a square and seen once, with one newline.
    """
    image_processor = processor.image_processor
    if processor.vision_feature_select_strategy == "default":
        raise TokenMapError(
            "vision_feature_select_strategy='default' is not laid out for llava_onevision; expected 'full'"
        )
    if image_processor.do_center_crop:
        raise TokenMapError("do_center_crop is not laid out for llava_onevision")
    view = square_edge(image_processor.size)
    side = grid_side(processor.num_image_tokens, "num_image_tokens")
    patch = view // side
    alone = [n == 1 for n in np.asarray(inputs["batch_num_images"]).tolist() for _ in range(n)]
    grids = []
    for size, tiled in zip(sizes, alone, strict=True):
        if tiled:
            base = whole_grid(size, (side, side), patch, (view, view))
            mosaic = _mosaic(image_processor.image_grid_pinpoints, size, view, side, patch)
            rest = newlined(size, *_limited(*mosaic, processor.vision_aspect_ratio, side))
        else:
            longest = max(size)
            columns, rows = (
                pixels(cells(side, patch), longest / view, start=(longest - length) // 2, limit=length)
                for length in size
            )
            base, rest = image_grid(size, [(WHOLE_IMAGE_TILE, columns, rows)]), separator(size)
        grids.append(joined(size, [base, rest]))
    return grids


def llava_next(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """LLaVA-NeXT, Granite Vision: a base view of the whole image (tile 0), then the tiles as ONE mosaic (tile 1).

    The mosaic's row and column count over all tiles, after the model has cut away most of the padding; every
    row ends in a learnt newline. Where the projector keeps `downsample_rate` of the patches along each edge,
    a token is one cell of the coarser grid.
    """
    image_processor = processor.image_processor
    view = square_edge(image_processor.size)
    if image_processor.crop_size and square_edge(image_processor.crop_size) != view:
        raise TokenMapError(
            f"crop_size {dict(image_processor.crop_size)} differs from size {dict(image_processor.size)}; "
            "laid out is a crop of the whole view"
        )
    n_extra = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    if n_extra:
        raise TokenMapError(
            f"num_additional_image_tokens = {processor.num_additional_image_tokens} with "
            f"vision_feature_select_strategy = {processor.vision_feature_select_strategy!r} is not laid out here; "
            "expected 1 with 'default' or 0 with 'full'"
        )
    kept = Fraction(getattr(processor, "downsample_rate", None) or 1)
    side, cell = int(view // processor.patch_size * kept), float(processor.patch_size / kept)
    grids = []
    for size in sizes:
        base = whole_grid(size, (side, side), cell, (view, view))
        mosaic = _mosaic(image_processor.image_grid_pinpoints, size, view, side, cell)
        grids.append(joined(size, [base, newlined(size, *mosaic)]))
    return grids


def llava_onevision_video(
    processor: ProcessorMixin, inputs: Inputs, videos: Sequence[SeenVideo]
) -> list[VideoGrid]:
    """LLaVA-OneVision: every frame stretched to one view, its patches halved bilinearly; one newline after the last.

    An odd number of patches is not halved evenly: a token's box is then the union of the patches that it mixes.
    """
    half = processor.video_processor
    if half.do_center_crop:
        raise TokenMapError("do_center_crop is not laid out for videos of llava_onevision")
    height, width = np.shape(inputs["pixel_values_videos"][0])[-2:]
    side = grid_side(processor.num_image_tokens, "num_image_tokens")
    grids = []
    for video in videos:
        tile, columns, rows = whole_view(video.size, (side, side), width // side, (width, height))
        halved = [_shrunk(intervals, math.ceil(side / 2)) for intervals in (columns, rows)]
        frame = image_grid(video.size, [(tile, halved[0], halved[1])])
        grids.append(over_time(video, frame, closing=separator(video.size)))
    return grids


def llava_next_video(
    processor: ProcessorMixin, inputs: Inputs, videos: Sequence[SeenVideo]
) -> list[VideoGrid]:
    """LLaVA-NeXT-Video: every frame resized and cropped at the centre to one view, a token per 2 x 2 patches of it."""
    height, width = np.shape(inputs["pixel_values_videos"][0])[-2:]
    cell = 2 * processor.patch_size
    if height % cell or width % cell:
        raise TokenMapError(
            f"frames of {width} x {height} pixels are no whole tokens of {cell} x {cell} pixels"
        )
    return [
        over_time(
            video,
            image_grid(
                video.size, [cropped_view(processor.video_processor, video.size, (width, height), cell)]
            ),
        )
        for video in videos
    ]


def _mosaic(
    pinpoints: Sequence[Sequence[int]], size: Size, view: int, side: int, cell: float
) -> tuple[Intervals, Intervals]:
    """Columns and rows of the mosaic: fit into the best resolution, pad, cut into cells, cut the padding.

    Every view of `view` pixels has `side` cells of `cell` pixels along each edge.
    """
    width, height = size
    best_height, best_width = select_best_resolution((height, width), [list(p) for p in pinpoints])
    scale_x, scale_y = best_width / width, best_height / height
    if scale_x < scale_y:
        shown = (best_width, min(math.ceil(height * scale_x), best_height))
    else:
        shown = (min(math.ceil(width * scale_y), best_width), best_height)
    axes = []
    for original, fitted, canvas in zip(size, shown, (best_width, best_height), strict=True):
        row_of_cells = np.concatenate([cells(side, cell, start=t * view) for t in range(canvas // view)])
        scale = original / fitted
        axes.append(pixels(row_of_cells, scale, start=(canvas - fitted) // 2 * scale, limit=original))
    columns, rows = axes
    # The model cuts padding in its own way: from the two aspect ratios, in whole patches.
    if width / height > len(columns) / len(rows):
        kept = int(round(height * (len(columns) / width), 7))
        cut = (len(rows) - kept) // 2
        rows = rows[cut : len(rows) - cut]
    else:
        kept = int(round(width * (len(rows) / height), 7))
        cut = (len(columns) - kept) // 2
        columns = columns[cut : len(columns) - cut]
    return columns, rows


def _limited(
    columns: Intervals, rows: Intervals, vision_aspect_ratio: str, side: int
) -> tuple[Intervals, Intervals]:
    """The mosaic shrunk to about as many tokens as "anyres_max_{n}" admits: those of n views."""
    if not vision_aspect_ratio.removeprefix("anyres_max_").isdigit():
        raise TokenMapError(
            f"vision_aspect_ratio is {vision_aspect_ratio!r}; expected 'anyres_max_' and a number"
        )
    most = int(vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(len(columns) * len(rows) / (most * side**2))
    if ratio > 1.1:
        columns = _shrunk(columns, int(len(columns) // ratio))
        rows = _shrunk(rows, int(len(rows) // ratio))
    return columns, rows


def _shrunk(intervals: Intervals, n: int) -> Float[np.ndarray, "shrunk 2"]:
    """What each of `n` bilinear samples of a row of cells shows: the span of the one or two it mixes."""
    # Sample i of torch's bilinear interpolation stands at (i + 1/2) * length / n - 1/2.
    source = np.maximum((np.arange(n) + 0.5) * len(intervals) / n - 0.5, 0)
    first = np.floor(source + 1e-4).astype(int)
    second = np.where(source - first > 1e-4, np.minimum(first + 1, len(intervals) - 1), first)
    spans = np.stack([intervals[first], intervals[second]])
    # A cell of pure padding has no width: its edge must not stretch the span.
    empty = spans[..., 0] >= spans[..., 1]
    left = np.where(empty, np.inf, spans[..., 0]).min(axis=0)
    right = np.where(empty, -np.inf, spans[..., 1]).max(axis=0)
    both_empty = empty.all(axis=0)
    return np.stack(
        [np.where(both_empty, spans[0, :, 0], left), np.where(both_empty, spans[0, :, 0], right)], axis=-1
    )
