"""One token per square block of patches, over the whole image resized to whole blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import ProcessorMixin

from mmlens.families.layouts.grids import Inputs, Sizes, still_patches, whole_grid
from mmlens.token_map import ImageGrid


def qwen(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Qwen-VL and its relatives: the image resized to whole blocks, one token per merge_size x merge_size patches.

    VideoLLaMA 3 does not merge the patches of images (merge_size 1).
    """
    return _blocks(sizes, still_patches(inputs), processor.image_processor.merge_size)


def nemotron(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Nemotron Omni: the image stretched over whole blocks, one token per 1 / downsample_ratio patches squared."""
    patches = np.asarray(inputs["image_grid_hw"]).tolist()
    return _blocks(sizes, patches, round(1 / processor.image_processor.downsample_ratio))


def _blocks(sizes: Sizes, patches: Sequence[Sequence[int]], merge: int) -> list[ImageGrid]:
    """One token per `merge` x `merge` of the (rows, columns) of patches of each image."""
    grids = []
    for size, (rows, columns) in zip(sizes, patches, strict=True):
        known = (rows, columns) if merge == 2 else None
        grids.append(whole_grid(size, (columns // merge, rows // merge), merge, (columns, rows), known))
    return grids
