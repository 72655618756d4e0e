"""The image resized to whole tokens, its shape kept as near as that allows; one token per square of patches."""

from __future__ import annotations

import numpy as np
from transformers import ProcessorMixin

from mmlens.families.layouts.grids import Inputs, Sizes, whole_grid
from mmlens.token_map import ImageGrid, TokenMapError


def pixtral(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Pixtral, Mistral 3, LightOnOCR: a token per spatial_merge_size x spatial_merge_size patches.

    `image_sizes` says how large the processor made each image. Where rows end in a break token (all but
    LightOnOCR's), that is a token of its own id and counts as text.
    """
    token = processor.patch_size * processor.spatial_merge_size
    patches = processor.spatial_merge_size == 2
    grids = []
    for size, (height, width) in zip(sizes, np.asarray(inputs["image_sizes"]).tolist(), strict=True):
        if height % token or width % token:
            raise TokenMapError(
                f"an image resized to {width} x {height} pixels is no whole number of tokens of {token} x {token}; "
                f"expected the image processor's patch_size to be {token}"
            )
        grid = (height // processor.patch_size, width // processor.patch_size) if patches else None
        grids.append(whole_grid(size, (width // token, height // token), token, (width, height), grid))
    return grids
