"""The image resized to whole blocks of patches and pooled block by block; patches carry their own positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import ProcessorMixin

from mmlens.families.layouts.grids import Inputs, SeenVideo, Sizes, over_time, whole_grid
from mmlens.token_map import ImageGrid, VideoGrid


def gemma4(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Gemma 4: image_position_ids hold the (column, row) of every patch; the model pools them."""
    image_processor = processor.image_processor
    pooled = image_processor.pooling_kernel_size
    return _blocks(inputs, sizes, pooled, pooled * image_processor.patch_size)


def gemma4_video(processor: ProcessorMixin, inputs: Inputs, videos: Sequence[SeenVideo]) -> list[VideoGrid]:
    """Gemma 4: video_position_ids hold the (column, row) of every patch of every frame; the model pools them."""
    pooled = processor.video_processor.pooling_kernel_size
    counts = (np.asarray(inputs["video_position_ids"]).max(axis=1) + 1) // pooled
    firsts = np.cumsum([0, *(len(video.taken) for video in videos)])
    grids = []
    for video, (columns, rows) in zip(videos, counts[firsts[:-1]].tolist(), strict=True):
        grids.append(over_time(video, whole_grid(video.size, (columns, rows), 1, (columns, rows))))
    return grids


def gemma4_unified(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Gemma 4 unified: image_position_ids hold the (column, row) of every block, merged by the processor."""
    image_processor = processor.image_processor
    return _blocks(inputs, sizes, 1, image_processor.pooling_kernel_size * image_processor.patch_size)


def _blocks(inputs: Inputs, sizes: Sizes, pooled: int, edge: int) -> list[ImageGrid]:
    """One token, of `edge` pixels, per `pooled` x `pooled` positions, row by row."""
    # Padding has position -1.
    counts = (np.asarray(inputs["image_position_ids"]).max(axis=1) + 1) // pooled
    return [
        whole_grid(size, (columns, rows), 1, (columns, rows), unit=edge)
        for size, (columns, rows) in zip(sizes, counts.tolist(), strict=True)
    ]
