"""One view of fixed size per image, one token per patch of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import ProcessorMixin

from mmlens.families.layouts.grids import Size, cells, image_grid, joined, part_of, pixels, separator
from mmlens.token_map import WHOLE_IMAGE_TILE, ImageGrid, TokenMapError


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
        shown = resized_size(image_processor, size) if image_processor.do_resize else size
        intervals = []
        for original, resized, seen in zip(size, shown, (seen_width, seen_height), strict=True):
            scale = original / resized
            start = -((resized - seen) // 2) * scale
            intervals.append(pixels(cells(seen // patch, patch), scale, start=start, limit=original))
        grid = image_grid(size, [(WHOLE_IMAGE_TILE, intervals[0], intervals[1])])
        if n_extra > 0:
            # Class tokens that the model keeps: they stand before the patches and show none.
            grid = joined(size, [*[separator(size)] * n_extra, grid])
        elif n_extra == -1:
            # The model drops the tower's first output although the tower has no class token.
            grid = part_of(grid, slice(1, None))
        grids.append(grid)
    return grids


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
