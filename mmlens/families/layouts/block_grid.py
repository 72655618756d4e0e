"""One token per square block of patches, over the whole image resized to whole blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import ProcessorMixin

from mmlens.families.layouts.grids import Size, cells, image_grid, pixels
from mmlens.token_map import WHOLE_IMAGE_TILE, ImageGrid, TokenMapError


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
        columns = pixels(cells(patch_columns // merge, merge), size[0] / patch_columns, limit=size[0])
        rows = pixels(cells(patch_rows // merge, merge), size[1] / patch_rows, limit=size[1])
        patches = (patch_rows, patch_columns) if merge == 2 else None
        grids.append(image_grid(size, [(WHOLE_IMAGE_TILE, columns, rows)], patches=patches))
    return grids
