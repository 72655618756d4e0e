"""One token per square block of patches, over the whole image resized to whole blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from transformers import ProcessorMixin

from mmlens.families.layouts.grids import Inputs, SeenVideo, Sizes, over_time, still_patches, whole_grid
from mmlens.token_map import ImageGrid, TokenMapError, VideoGrid


def qwen(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Qwen-VL and its relatives: the image resized to whole blocks, one token per merge_size x merge_size patches.

    VideoLLaMA 3 does not merge the patches of images (merge_size 1).
    """
    image_processor = processor.image_processor
    return _blocks(sizes, still_patches(inputs), image_processor.merge_size, image_processor.patch_size)


def qwen_video(processor: ProcessorMixin, inputs: Inputs, videos: Sequence[SeenVideo]) -> list[VideoGrid]:
    """Qwen-VL, GLM-V and relatives: the frames resized to whole blocks, a token per merge_size x merge_size patches.

    A patch is of temporal_patch_size frames: two that follow each other among those that were taken.
    """
    halves = processor.video_processor
    merge, merged = halves.merge_size, getattr(halves, "temporal_patch_size", 1)
    grids = []
    for video, (steps, rows, columns) in zip(
        videos, np.asarray(inputs["video_grid_thw"]).tolist(), strict=True
    ):
        whole = whole_grid(video.size, (columns // merge, rows // merge), merge, (columns, rows))
        grid = over_time(video, whole, merged=merged)
        if len(grid.shown) != steps:
            raise TokenMapError(
                f"{len(video.taken)} frames, {merged} in a temporal patch, are not the {steps} temporal patches that "
                "video_grid_thw holds"
            )
        grids.append(grid)
    return grids


def video_llama(processor: ProcessorMixin, inputs: Inputs, videos: Sequence[SeenVideo]) -> list[VideoGrid]:
    """VideoLLaMA 3: as Qwen-VL, without the tokens of patches that are as in the frame before (token compression)."""
    grids = qwen_video(processor, inputs, videos)
    ends = np.cumsum([len(grid) for grid in grids])[:-1]
    kept = np.split(np.asarray(inputs["video_compression_mask"], dtype=bool), ends)
    return [
        replace(
            grid, **{name: getattr(grid, name)[mask] for name in ("tile", "row", "column", "boxes", "step")}
        )
        for grid, mask in zip(grids, kept, strict=True)
    ]


def nemotron(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Nemotron Omni: the image stretched over whole blocks, one token per 1 / downsample_ratio patches squared."""
    patches = np.asarray(inputs["image_grid_hw"]).tolist()
    image_processor = processor.image_processor
    return _blocks(sizes, patches, round(1 / image_processor.downsample_ratio), image_processor.patch_size)


def _blocks(sizes: Sizes, patches: Sequence[Sequence[int]], merge: int, edge: int) -> list[ImageGrid]:
    """One token per `merge` x `merge` of the (rows, columns) of patches, of `edge` pixels, of each image."""
    grids = []
    for size, (rows, columns) in zip(sizes, patches, strict=True):
        known = (rows, columns) if merge == 2 else None
        counts = (columns // merge, rows // merge)
        grids.append(whole_grid(size, counts, merge, (columns, rows), known, unit=edge))
    return grids
