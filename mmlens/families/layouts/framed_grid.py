"""The image resized to whole blocks of patches, every row closed by a learnt token, and the whole framed in some."""

from __future__ import annotations

from transformers import ProcessorMixin

from mmlens.families.layouts import block_grid
from mmlens.families.layouts.grids import Inputs, Sizes, closed_rows, joined, separator
from mmlens.token_map import ImageGrid, TokenMapError


def hunyuan(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Hunyuan-VL: a learnt first token, rows of blocks that each end in a learnt newline, a learnt last token."""
    if not processor.cat_extra_token:
        raise TokenMapError(
            "cat_extra_token is False; expected True: the model frames every image by two tokens"
        )
    if processor.image_processor.spatial_patch_size != 1:
        raise TokenMapError(
            f"spatial_patch_size is {processor.image_processor.spatial_patch_size}; laid out is 1"
        )
    return [
        joined(size, [separator(size), *closed_rows(size, grid, int(grid.row.max()) + 1), separator(size)])
        for size, grid in zip(sizes, block_grid.qwen(processor, inputs, sizes), strict=True)
    ]


def hy_v4(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """HY V4 VL: rows of blocks that each end in a learnt newline, and no frame."""
    return [
        joined(size, closed_rows(size, grid, int(grid.row.max()) + 1))
        for size, grid in zip(sizes, block_grid.qwen(processor, inputs, sizes), strict=True)
    ]
