"""The parts that layouts are made of: intervals of pixels, grids of cells, tiles, separators."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from transformers import ProcessorMixin

from mmlens.boxes import Shown
from mmlens.token_map import NO_PATCH, WHOLE_IMAGE_TILE, ImageGrid, TokenMapError, VideoGrid

Size = tuple[int, int]
Sizes = Sequence[Size]
"""(width, height) of each image."""
Inputs = Mapping[str, Any]
"""What a processor gives, by name."""
Layout = Callable[[ProcessorMixin, Inputs, Sizes], list[ImageGrid]]
"""(processor, its inputs, sizes of at least one image) -> where each image's tokens come from."""


@dataclass(frozen=True)
class SeenVideo:
    """A video as a processor was given it: its size, how many frames it has, and which of them were taken, in order."""

    size: Size
    n_frames: int
    taken: tuple[int, ...]


VideoLayout = Callable[[ProcessorMixin, Inputs, Sequence[SeenVideo]], list[VideoGrid]]
"""(processor, its inputs, at least one video) -> where each video's tokens come from."""
Intervals = Float[np.ndarray, "_ 2"]
View = tuple[int, Intervals, Intervals]
"""A tile's number, and the original pixels that its columns and its rows show."""


def visual_token(text: Callable[[ProcessorMixin], str | None]) -> Callable[[Layout], Layout]:
    """Marks a layout whose visual positions hold another token than the processor's image_token_id names.

    `text` gives that token's text, None where no position is visual; `make_prompt` reads it as
    `layout.visual_token`.
    """

    def marked(layout: Layout) -> Layout:
        layout.visual_token = text  # type: ignore[attr-defined]
        return layout

    return marked


def cells(n: int, length: float, start: float = 0) -> Intervals:
    """`n` intervals of `length` next to each other."""
    left = start + length * np.arange(n, dtype=float)
    return np.stack([left, left + length], axis=-1)


def pixels(cells: Intervals, scale: float, *, start: float = 0, limit: float) -> Intervals:
    """Intervals of a canvas as intervals of the image, cut off where they leave it.

    `scale` is original pixels per canvas pixel; the image begins `start` original pixels into the canvas.
    """
    return np.clip(cells * scale - start, 0, limit)


def tiled(size: Size, across: int, down: int, tile: Size, side: int) -> list[View]:
    """Crops of a canvas over which the image was stretched, row by row, and last the whole image."""

    def crop(number: int, place: Size, canvas: Size) -> View:
        columns, rows = (
            pixels(cells(side, edge // side, at * edge), length / (n * edge), limit=length)
            for length, edge, at, n in zip(size, tile, place, canvas, strict=True)
        )
        return number, columns, rows

    whole = crop(WHOLE_IMAGE_TILE, (0, 0), (1, 1))
    if across * down == 1:
        return [whole]
    crops = [crop(1 + r * across + c, (c, r), (across, down)) for r in range(down) for c in range(across)]
    return [*crops, whole]


def whole_view(size: Size, counts: Size, cell: float, canvas: Size) -> View:
    """The whole image resized to a canvas, under `counts` (columns, rows) of square cells from its top left."""
    columns, rows = (
        pixels(cells(n, cell), length / resized, limit=length)
        for n, length, resized in zip(counts, size, canvas, strict=True)
    )
    return WHOLE_IMAGE_TILE, columns, rows


@functools.lru_cache(maxsize=64)
def whole_grid(
    size: Size,
    counts: Size,
    cell: float,
    canvas: Size,
    patches: tuple[int, int] | None = None,
    *,
    unit: int | None = 1,
) -> ImageGrid:
    """One token per cell of a `whole_view`. `unit` is how many pixels `canvas` counts as one; None: not known."""
    shown = None if unit is None else whole_image(size, (canvas[0] * unit, canvas[1] * unit))
    return image_grid(size, [whole_view(size, counts, cell, canvas)], patches, shown)


def whole_image(size: Size, resized: Size) -> Shown:
    """An image of `size` shown whole, stretched to `resized`."""
    return Shown(resized, (0, 0, *size))


def placed(size: Size, resized: Size, seen: Size, before: Size) -> Shown:
    """A picture of `seen` pixels that holds an image resized to `resized`, `before` pixels from its top left corner."""
    left, top = (-start * length / edge for start, length, edge in zip(before, size, resized, strict=True))
    right, bottom = (
        (edge - start) * length / edge_resized
        for edge, start, length, edge_resized in zip(seen, before, size, resized, strict=True)
    )
    return Shown(seen, (left, top, right, bottom))


def image_grid(
    size: Size,
    views: Sequence[View],
    patches: tuple[int, int] | None = None,
    resized: Shown | None = None,
) -> ImageGrid:
    """One token per cell, view after view, each row by row; `resized` is what the model is shown, of one view alone."""
    parts = []
    for tile, columns, rows in views:
        n_rows, n_columns = len(rows), len(columns)
        row, column = np.divmod(np.arange(n_rows * n_columns), n_columns)
        boxes = np.stack([columns[column, 0], rows[row, 0], columns[column, 1], rows[row, 1]], axis=-1)
        shown = resized if len(views) == 1 else None
        parts.append(ImageGrid(size, np.full(len(row), tile), row, column, boxes, patches, shown))
    grid = parts[0] if len(parts) == 1 else joined(size, parts, patches)
    # Images of one size share it.
    for array in (grid.tile, grid.row, grid.column, grid.boxes):
        array.flags.writeable = False
    return grid


def newlined(size: Size, columns: Intervals, rows: Intervals) -> ImageGrid:
    """A mosaic (tile 1) whose every row ends in a learnt newline.

    Of a very wide image the model cuts all rows away as padding: then there is none, and no newline.
    """
    grid = image_grid(size, [(WHOLE_IMAGE_TILE + 1, columns, rows)])
    return joined(size, [part_of(grid, slice(0, 0)), *closed_rows(size, grid, len(rows))])


def closed_rows(size: Size, grid: ImageGrid, n_rows: int) -> list[ImageGrid]:
    """The rows of a grid of one view, each closed by a learnt token."""
    return [part for row in range(n_rows) for part in (part_of(grid, grid.row == row), separator(size))]


def still_patches(inputs: Inputs) -> list[tuple[int, int]]:
    """(rows, columns) of each image's patches in image_grid_thw; TokenMapError for a clip of several frames."""
    counts = np.asarray(inputs["image_grid_thw"]).tolist()
    for frames, *_ in counts:
        if frames != 1:
            raise TokenMapError(
                f"an image of {frames} frames in image_grid_thw; give clips as a list of frame images"
            )
    return [(rows, columns) for _, rows, columns in counts]


@functools.lru_cache(maxsize=64)
def stretched_grid(size: Size, across: int, down: int, tile: Size, side: int) -> ImageGrid:
    """One token per cell of the views that `tiled` gives."""
    return image_grid(size, tiled(size, across, down, tile, side), resized=whole_image(size, tile))


def over_time(
    video: SeenVideo, of_step: ImageGrid, *, merged: int = 1, closing: ImageGrid | None = None
) -> VideoGrid:
    """The tokens `of_step` for every temporal patch of `merged` frames, and after the last one `closing`.

    Where the last temporal patch lacks frames, processors repeat the last one.
    """
    taken = video.taken + video.taken[-1:] * (-len(video.taken) % merged)
    shown = tuple(taken[at : at + merged] for at in range(0, len(taken), merged))
    whole = joined(video.size, [of_step] * len(shown) + ([] if closing is None else [closing]))
    step = np.repeat(np.arange(len(shown)), len(of_step))
    return VideoGrid(
        size=video.size,
        tile=whole.tile,
        row=whole.row,
        column=whole.column,
        boxes=whole.boxes,
        step=np.concatenate([step, np.full(len(whole) - len(step), NO_PATCH)]),
        shown=shown,
        resized=whole.resized,
        n_frames=video.n_frames,
    )


def separator(size: Size) -> ImageGrid:
    none: Int[np.ndarray, " token"] = np.array([NO_PATCH])
    return ImageGrid(size, none, none, none, np.full((1, 4), np.nan))


def part_of(grid: ImageGrid, where: slice | Bool[np.ndarray, " token"]) -> ImageGrid:
    return ImageGrid(
        grid.size,
        grid.tile[where],
        grid.row[where],
        grid.column[where],
        grid.boxes[where],
        resized=grid.resized,
    )


def joined(size: Size, parts: Sequence[ImageGrid], patches: tuple[int, int] | None = None) -> ImageGrid:
    # Separators show nothing; what else there is has to be of one picture.
    shown = {part.resized for part in parts if bool((part.tile != NO_PATCH).any())}
    return ImageGrid(
        size,
        np.concatenate([part.tile for part in parts]),
        np.concatenate([part.row for part in parts]),
        np.concatenate([part.column for part in parts]),
        np.concatenate([part.boxes for part in parts]),
        patches,
        shown.pop() if len(shown) == 1 else None,
    )


def grid_side(n_tokens: int | None, name: str) -> int:
    side = math.isqrt(n_tokens or 0)
    if not n_tokens or side * side != n_tokens:
        raise TokenMapError(f"the processor's {name} is {n_tokens}; expected the square of a grid's side")
    return side


def square_edge(size: Any) -> int:
    edge = size.get("shortest_edge") or size.get("height")
    if not edge or size.get("width", edge) not in (edge, None):
        raise TokenMapError(f"the image processor's size is {dict(size)}; expected a square")
    return edge
