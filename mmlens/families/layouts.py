"""How each processor lays an image out as tokens: one function per way of laying out.

A layout is `layout(processor, inputs, sizes) -> list[ImageGrid]`: `inputs` are what the processor returned,
`sizes` the original (width, height) of every image of the batch, batch-major. Every step between the original
image and a patch (resize, pad, crop, tile) is linear in x and in y apart, so a layout only has to say which
interval of the original each grid column and each grid row shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from transformers import ProcessorMixin
from transformers.image_processing_utils import select_best_resolution
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from mmlens.token_map import NO_PATCH, WHOLE_IMAGE_TILE, ImageGrid, TokenMapError

Size = tuple[int, int]
Layout = Callable[[ProcessorMixin, Mapping[str, Any], Sequence[Size]], list[ImageGrid]]
Intervals = Float[np.ndarray, "_ 2"]
View = tuple[int, Intervals, Intervals]
"""A tile's number, and the original pixels that its columns and its rows show."""


def qwen(processor: ProcessorMixin, inputs: Mapping[str, Any], sizes: Sequence[Size]) -> list[ImageGrid]:
    """Qwen2-VL to Qwen3-VL: the image resized to whole blocks, one token per merge_size x merge_size patches."""
    if not sizes:
        return []
    merge = processor.image_processor.merge_size
    grids = []
    for size, (frames, patch_rows, patch_columns) in zip(
        sizes, np.asarray(inputs["image_grid_thw"]).tolist(), strict=True
    ):
        if frames != 1:
            raise TokenMapError(
                f"an image of {frames} frames in image_grid_thw; give clips as a list of frame images"
            )
        columns = _pixels(_cells(patch_columns // merge, merge), size[0] / patch_columns, limit=size[0])
        rows = _pixels(_cells(patch_rows // merge, merge), size[1] / patch_rows, limit=size[1])
        patches = (patch_rows, patch_columns) if merge == 2 else None
        grids.append(_grid(size, [(WHOLE_IMAGE_TILE, columns, rows)], patches=patches))
    return grids


def llava(processor: ProcessorMixin, inputs: Mapping[str, Any], sizes: Sequence[Size]) -> list[ImageGrid]:
    """LLaVA 1.5: resize, crop (or pad) at the centre, one token per patch. What was cropped away has no token."""
    if not sizes:
        return []
    image_processor = processor.image_processor
    seen_height, seen_width = inputs["pixel_values"].shape[-2:]
    patch = processor.patch_size
    n_extra = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    if n_extra < -1:
        raise TokenMapError(
            f"num_additional_image_tokens = {processor.num_additional_image_tokens} is not laid out here"
        )
    grids = []
    for size in sizes:
        shown = _resized(image_processor, size) if image_processor.do_resize else size
        intervals = []
        for original, resized, seen in zip(size, shown, (seen_width, seen_height), strict=True):
            scale = original / resized
            start = -((resized - seen) // 2) * scale
            intervals.append(_pixels(_cells(seen // patch, patch), scale, start=start, limit=original))
        grid = _grid(size, [(WHOLE_IMAGE_TILE, intervals[0], intervals[1])])
        if n_extra > 0:
            # Class tokens that the model keeps: they stand before the patches and show none.
            grid = _joined(size, [*[_separator(size)] * n_extra, grid])
        elif n_extra == -1:
            # The model drops the tower's first output although the tower has no class token.
            grid = _part(grid, slice(1, None))
        grids.append(grid)
    return grids


def llava_onevision(
    processor: ProcessorMixin, inputs: Mapping[str, Any], sizes: Sequence[Size]
) -> list[ImageGrid]:
    """LLaVA-OneVision: a base view of the whole image (tile 0), then the tiles as ONE mosaic (tile 1).

    The mosaic's row and column count over all tiles, after the model has cut away most of the padding; every
    row ends in a learnt newline. Above anyres_max_{n} the model shrinks the mosaic bilinearly: a token's box
    is then the union of the (up to 2 x 2) patches that it mixes. Where an example has several images, each is
    padded to a square and seen once, with one newline.
    """
    if not sizes:
        return []
    image_processor = processor.image_processor
    if processor.vision_feature_select_strategy == "default":
        raise TokenMapError(
            "vision_feature_select_strategy='default' is not laid out for llava_onevision; expected 'full'"
        )
    if image_processor.do_center_crop:
        raise TokenMapError("do_center_crop is not laid out for llava_onevision")
    view = _square(image_processor.size)
    side = _side(processor.num_image_tokens, "num_image_tokens")
    patch = view // side
    alone = [n == 1 for n in np.asarray(inputs["batch_num_images"]).tolist() for _ in range(n)]
    grids = []
    for size, tiled in zip(sizes, alone, strict=True):
        if tiled:
            base = [_pixels(_cells(side, patch), length / view, limit=length) for length in size]
            mosaic = _anyres_mosaic(
                image_processor.image_grid_pinpoints, processor.vision_aspect_ratio, size, view, side
            )
            grids.append(
                _joined(size, [_grid(size, [(WHOLE_IMAGE_TILE, base[0], base[1])]), _newlined(size, *mosaic)])
            )
        else:
            longest = max(size)
            padded = [
                _pixels(_cells(side, patch), longest / view, start=(longest - length) // 2, limit=length)
                for length in size
            ]
            grids.append(
                _joined(size, [_grid(size, [(WHOLE_IMAGE_TILE, padded[0], padded[1])]), _separator(size)])
            )
    return grids


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
    side = _side(processor.image_seq_length, "image_seq_length")
    grids = []
    for size in sizes:
        across, down = 1, 1
        if option("crop_to_patches") and option("max_patches") > 1:
            across, down = get_optimal_tiled_canvas(
                (size[1], size[0]), (tile_height, tile_width), option("min_patches"), option("max_patches")
            )
        grids.append(_grid(size, _tiled(size, across, down, (tile_width, tile_height), side)))
    return grids


def idefics3(processor: ProcessorMixin, inputs: Mapping[str, Any], sizes: Sequence[Size]) -> list[ImageGrid]:
    """Idefics3, SmolVLM: the image stretched over whole tiles (tiles 1..), then a global image (tile 0).

    Without do_image_splitting, or where one tile holds the image, only the global image.
    """
    if not sizes:
        return []
    image_processor = processor.image_processor
    tile = image_processor.max_image_size["longest_edge"]
    side = _side(processor.image_seq_len, "image_seq_len")
    grids = []
    for size in sizes:
        across, down = 1, 1
        if image_processor.do_image_splitting:
            resized = _idefics3_resized(image_processor, size) if image_processor.do_resize else size
            across, down = _idefics3_tiles(resized, tile)
        grids.append(_grid(size, _tiled(size, across, down, (tile, tile), side)))
    return grids


# ---------------------------------------------------------------------- the steps of the processors


def _resized(image_processor: Any, size: Size) -> Size:
    """(width, height) after the image processor's resize."""
    target = image_processor.size
    if target.get("height") and target.get("width"):
        return target["width"], target["height"]
    if target.get("shortest_edge") and not target.get("longest_edge"):
        short, long = min(size), max(size)
        new_short, new_long = target["shortest_edge"], int(target["shortest_edge"] * long / short)
        return (new_short, new_long) if size[0] <= size[1] else (new_long, new_short)
    raise TokenMapError(
        f"the image processor's size is {dict(target)}; laid out are {{'shortest_edge'}} and {{'height', 'width'}}"
    )


def _anyres_mosaic(
    pinpoints: Sequence[Sequence[int]], vision_aspect_ratio: str, size: Size, view: int, side: int
) -> tuple[Intervals, Intervals]:
    """Columns and rows of the mosaic: fit into the best resolution, pad, patch, cut the padding, shrink."""
    width, height = size
    best_height, best_width = select_best_resolution((height, width), [list(p) for p in pinpoints])
    scale_x, scale_y = best_width / width, best_height / height
    if scale_x < scale_y:
        shown = (best_width, min(math.ceil(height * scale_x), best_height))
    else:
        shown = (min(math.ceil(width * scale_y), best_width), best_height)
    axes = []
    for original, fitted, canvas in zip(size, shown, (best_width, best_height), strict=True):
        tiles = canvas // view
        cells = np.concatenate([_cells(side, view // side, start=t * view) for t in range(tiles)])
        scale = original / fitted
        axes.append(_pixels(cells, scale, start=(canvas - fitted) // 2 * scale, limit=original))
    columns, rows = axes
    # The model cuts padding in its own way: from the two aspect ratios, in whole patches.
    if width / height > len(columns) / len(rows):
        kept = int(round(height * len(columns) / width, 7))
        cut = (len(rows) - kept) // 2
        rows = rows[cut : len(rows) - cut]
    else:
        kept = int(round(width * len(rows) / height, 7))
        cut = (len(columns) - kept) // 2
        columns = columns[cut : len(columns) - cut]
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
    """What each of `n` bilinear samples of a row of cells shows: the span of the one or two cells it mixes."""
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


# ---------------------------------------------------------------------- grids


def _cells(n: int, length: float, start: float = 0) -> Intervals:
    """`n` intervals of `length` next to each other."""
    left = start + length * np.arange(n, dtype=float)
    return np.stack([left, left + length], axis=-1)


def _pixels(cells: Intervals, scale: float, *, start: float = 0, limit: float) -> Intervals:
    """Intervals of a canvas as intervals of the image, cut off where they leave it.

    `scale` is original pixels per canvas pixel; the image begins `start` original pixels into the canvas.
    """
    return np.clip(cells * scale - start, 0, limit)


def _tiled(size: Size, across: int, down: int, tile: Size, side: int) -> list[View]:
    """Crops of a canvas over which the image was stretched, row by row, and last the whole image."""
    whole = [
        _pixels(_cells(side, edge // side), length / edge, limit=length)
        for length, edge in zip(size, tile, strict=True)
    ]
    if across * down == 1:
        return [(WHOLE_IMAGE_TILE, whole[0], whole[1])]
    views: list[View] = []
    for r in range(down):
        for c in range(across):
            columns = _pixels(
                _cells(side, tile[0] // side, c * tile[0]), size[0] / (across * tile[0]), limit=size[0]
            )
            rows = _pixels(
                _cells(side, tile[1] // side, r * tile[1]), size[1] / (down * tile[1]), limit=size[1]
            )
            views.append((1 + r * across + c, columns, rows))
    return [*views, (WHOLE_IMAGE_TILE, whole[0], whole[1])]


def _grid(size: Size, views: Sequence[View], patches: tuple[int, int] | None = None) -> ImageGrid:
    """One token per cell, view after view, each row by row."""
    parts = []
    for tile, columns, rows in views:
        n_rows, n_columns = len(rows), len(columns)
        row, column = np.divmod(np.arange(n_rows * n_columns), n_columns)
        boxes = np.stack([columns[column, 0], rows[row, 0], columns[column, 1], rows[row, 1]], axis=-1)
        parts.append(ImageGrid(size, np.full(len(row), tile), row, column, boxes, patches))
    return _joined(size, parts, patches)


def _newlined(size: Size, columns: Intervals, rows: Intervals) -> ImageGrid:
    """A mosaic (tile 1) whose every row ends in a learnt newline."""
    grid = _grid(size, [(WHOLE_IMAGE_TILE + 1, columns, rows)])
    parts: list[ImageGrid] = []
    for row in range(len(rows)):
        parts += [_part(grid, slice(row * len(columns), (row + 1) * len(columns))), _separator(size)]
    return _joined(size, parts)


def _separator(size: Size) -> ImageGrid:
    none: Int[np.ndarray, " token"] = np.array([NO_PATCH])
    return ImageGrid(size, none, none, none, np.full((1, 4), np.nan))


def _part(grid: ImageGrid, where: slice) -> ImageGrid:
    return ImageGrid(grid.size, grid.tile[where], grid.row[where], grid.column[where], grid.boxes[where])


def _joined(size: Size, parts: Sequence[ImageGrid], patches: tuple[int, int] | None = None) -> ImageGrid:
    return ImageGrid(
        size,
        np.concatenate([part.tile for part in parts]),
        np.concatenate([part.row for part in parts]),
        np.concatenate([part.column for part in parts]),
        np.concatenate([part.boxes for part in parts]),
        patches,
    )


def _side(n_tokens: int | None, name: str) -> int:
    side = math.isqrt(n_tokens or 0)
    if not n_tokens or side * side != n_tokens:
        raise TokenMapError(f"the processor's {name} is {n_tokens}; expected the square of a grid's side")
    return side


def _square(size: Any) -> int:
    edge = size.get("shortest_edge") or size.get("height")
    if not edge or size.get("width", edge) not in (edge, None):
        raise TokenMapError(f"the image processor's size is {dict(size)}; expected a square")
    return edge
