"""The image shrunk where it is too large, never stretched to whole tokens: padding at the right and bottom fills up."""

from __future__ import annotations

import math
from typing import Any

from transformers import ProcessorMixin

from mmlens.families.layouts.grids import Inputs, Size, Sizes, still_patches, whole_grid
from mmlens.token_map import ImageGrid, TokenMapError


def kimi(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Kimi K2.5: an image above its budget of patches shrunk to whole pixels, then padded."""
    # The resize lives in a module that cannot be imported without torchvision, as this processor's images.
    from transformers.models.kimi_k25.image_processing_kimi_k25 import navit_resize

    image_processor = processor.image_processor

    def shown(size: Size, canvas: Size) -> Size:
        (height, width), _ = navit_resize(
            height=size[1],
            width=size[0],
            patch_size=image_processor.patch_size,
            merge_kernel_size=image_processor.merge_size,
            max_patches=image_processor.max_patches,
            max_size_per_side=image_processor.size["max_height"],
        )
        return width, height

    return _padded(image_processor, inputs, sizes, shown)


def glm(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """GLM-5 Next: scaled to fit whole tokens between min_image_tokens and max_image_tokens, then padded."""
    image_processor = processor.image_processor
    token = image_processor.patch_size * image_processor.merge_size

    def shown(size: Size, canvas: Size) -> Size:
        width, height = size
        scale = min(canvas[1] / height, canvas[0] / width)
        if height * width >= token**2 * image_processor.min_image_tokens:
            scale = min(1.0, scale)
        return (
            max(1, min(canvas[0], math.floor(width * scale))),
            max(1, min(canvas[1], math.floor(height * scale))),
        )

    return _padded(image_processor, inputs, sizes, shown)


def _padded(image_processor: Any, inputs: Inputs, sizes: Sizes, shown: Any) -> list[ImageGrid]:
    """`shown(size, canvas)` is the (width, height) of the image on its canvas, whose top left corner it fills."""
    patch, merge = image_processor.patch_size, image_processor.merge_size
    grids = []
    for size, (rows, columns) in zip(sizes, still_patches(inputs), strict=True):
        canvas = (columns * patch, rows * patch)
        content = shown(size, canvas) if image_processor.do_resize else size
        if content[0] > canvas[0] or content[1] > canvas[1]:
            raise TokenMapError(
                f"an image of {size} is shown as {content}, but image_grid_thw has room for {canvas} pixels; "
                "expected the image processor that made the inputs"
            )
        patches = (rows, columns) if merge == 2 else None
        grids.append(whole_grid(size, (columns // merge, rows // merge), patch * merge, content, patches))
    return grids
