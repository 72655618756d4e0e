"""One token per square block of patches, over the whole image resized to whole blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import ProcessorMixin

from mmlens.families.layouts.grids import Size, cells, image_grid, pixels
from mmlens.token_map import WHOLE_IMAGE_TILE, ImageGrid, TokenMapError


def qwen(processor: ProcessorMixin, inputs: Mapping[str, Any], sizes: Sequence[Size]) -> list[ImageGrid]:
    """Qwen-VL and its relatives: the image resized to whole blocks, one token per merge_size x merge_size patches.

    VideoLLaMA 3 does not merge the patches of images (merge_size 1).
    """
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
        columns = pixels(cells(patch_columns // merge, merge), size[0] / patch_columns, limit=size[0])
        rows = pixels(cells(patch_rows // merge, merge), size[1] / patch_rows, limit=size[1])
        patches = (patch_rows, patch_columns) if merge == 2 else None
        grids.append(image_grid(size, [(WHOLE_IMAGE_TILE, columns, rows)], patches=patches))
    return grids


def nemotron(processor: ProcessorMixin, inputs: Mapping[str, Any], sizes: Sequence[Size]) -> list[ImageGrid]:
    """Nemotron Omni: the image stretched over whole blocks, one token per 1 / downsample_ratio patches squared."""
    if not sizes:
        return []
    merge = round(1 / processor.image_processor.downsample_ratio)
    grids = []
    for size, (patch_rows, patch_columns) in zip(
        sizes, np.asarray(inputs["image_grid_hw"]).tolist(), strict=True
    ):
        columns = pixels(cells(patch_columns // merge, merge), size[0] / patch_columns, limit=size[0])
        rows = pixels(cells(patch_rows // merge, merge), size[1] / patch_rows, limit=size[1])
        patches = (patch_rows, patch_columns) if merge == 2 else None
        grids.append(image_grid(size, [(WHOLE_IMAGE_TILE, columns, rows)], patches=patches))
    return grids
