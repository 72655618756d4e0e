"""One view of fixed size per image, one token per patch of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import ProcessorMixin

from mmlens.boxes import Shown
from mmlens.families.layouts import resized_grid
from mmlens.families.layouts.grids import (
    Inputs,
    Intervals,
    SeenVideo,
    Size,
    Sizes,
    View,
    cells,
    grid_side,
    image_grid,
    joined,
    over_time,
    part_of,
    pixels,
    placed,
    separator,
    square_edge,
)
from mmlens.token_map import WHOLE_IMAGE_TILE, ImageGrid, TokenMapError, VideoGrid


def llava(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """LLaVA 1.5: resize, crop (or pad) at the centre, one token per patch. What was cropped away has no token."""
    if hasattr(processor, "image_break_token"):
        # Pixtral-12B has LLaVA's model type, but its own processor.
        return resized_grid.pixtral(processor, inputs, sizes)
    image_processor = processor.image_processor
    seen = inputs["pixel_values_images"] if "pixel_values_images" in inputs else inputs["pixel_values"]
    seen_height, seen_width = seen.shape[-2:]
    patch = processor.patch_size
    n_extra = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    if n_extra < -1:
        raise TokenMapError(
            f"num_additional_image_tokens = {processor.num_additional_image_tokens} is not laid out here"
        )
    grids = []
    for size in sizes:
        shown = resized_size(image_processor, size) if image_processor.do_resize else size
        seen_size = (seen_width, seen_height)
        view = cropped_view(image_processor, size, seen_size, patch)
        grid = image_grid(size, [view], resized=centre_picture(size, shown, seen_size))
        if n_extra > 0:
            # Class tokens that the model keeps: they stand before the patches and show none.
            grid = joined(size, [*[separator(size)] * n_extra, grid])
        elif n_extra == -1:
            # The model drops the tower's first output although the tower has no class token.
            grid = part_of(grid, slice(1, None))
        grids.append(grid)
    return grids


def video_llava(processor: ProcessorMixin, inputs: Inputs, videos: Sequence[SeenVideo]) -> list[VideoGrid]:
    """Video-LLaVA: every frame as LLaVA 1.5 sees an image, after its class tokens, which the model keeps."""
    height, width = np.shape(inputs["pixel_values_videos"][0])[-2:]
    grids = []
    for video in videos:
        view = cropped_view(processor.video_processor, video.size, (width, height), processor.patch_size)
        class_tokens = [separator(video.size)] * processor.num_additional_image_tokens
        grids.append(over_time(video, joined(video.size, [*class_tokens, image_grid(video.size, [view])])))
    return grids


def deepseek(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """DeepSeek-VL, Janus: the longest edge resized to the view, the other padded at both ends; a token per patch.

    With a view of high resolution besides (deepseek_vl_hybrid), the padded square of that one is what the
    smaller view shows, and one token stands for both.
    """
    image_processor = processor.image_processor
    if not (image_processor.do_resize and image_processor.do_pad):
        raise TokenMapError(
            f"do_resize = {image_processor.do_resize}, do_pad = {image_processor.do_pad} is not laid out here; "
            "expected both"
        )
    view = square_edge(image_processor.size)
    square = square_edge(getattr(image_processor, "high_res_size", image_processor.size))
    side = grid_side(processor.num_image_tokens, "num_image_tokens")
    grids = []
    for size in sizes:
        intervals, edges = [], []
        for length in size:
            resized = max(round(length * (square / max(size))), image_processor.min_size)
            edges.append(resized)
            scale = length / resized
            cell = view // side * square / view
            intervals.append(
                pixels(cells(side, cell), scale, start=(square - resized) // 2 * scale, limit=length)
            )
        # Of two views in sizes of their own, neither is the one picture.
        before = ((square - edges[0]) // 2, (square - edges[1]) // 2)
        picture = placed(size, (edges[0], edges[1]), (view, view), before) if view == square else None
        grids.append(image_grid(size, [(WHOLE_IMAGE_TILE, intervals[0], intervals[1])], resized=picture))
    return grids


def cropped_view(image_processor: Any, size: Size, seen: Size, cell: int) -> View:
    """The whole image, resized, and cropped (or padded) at the centre to `seen` pixels, in square cells."""
    shown = resized_size(image_processor, size) if image_processor.do_resize else size
    columns, rows = (
        centre_cropped(original, resized, length, cells(length // cell, cell))
        for original, resized, length in zip(size, shown, seen, strict=True)
    )
    return WHOLE_IMAGE_TILE, columns, rows


def centre_cropped(original: int, resized: int, seen: int, shown: Intervals) -> Intervals:
    """Original pixels of intervals of the `seen` pixels that were cut (or padded) at the centre of `resized`."""
    scale = original / resized
    return pixels(shown, scale, start=-((resized - seen) // 2) * scale, limit=original)


def centre_picture(size: Size, resized: Size, seen: Size) -> Shown:
    """The `seen` pixels that were cut (or padded) at the centre of an image resized to `resized`."""
    before = (-((resized[0] - seen[0]) // 2), -((resized[1] - seen[1]) // 2))
    return placed(size, resized, seen, before)


def resized_size(image_processor: Any, size: Size) -> Size:
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
