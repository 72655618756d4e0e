"""Learnt queries that each read a whole view: a token belongs to its image and tile, and shows no patch of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter

import numpy as np
from transformers import ProcessorMixin

from mmlens import internals
from mmlens.families.layouts.grids import Inputs, Layout, Size, Sizes, joined, separator, visual_token
from mmlens.token_map import NO_PATCH, WHOLE_IMAGE_TILE, ImageGrid, TokenMapError


def query_grid(size: Size, n_queries: int, tiles: Sequence[int] = (WHOLE_IMAGE_TILE,)) -> ImageGrid:
    """`n_queries` tokens for every tile, tile after tile; none has a row, a column or a box.

    >>> query_grid((64, 48), 2, tiles=(1, 2, WHOLE_IMAGE_TILE)).tile
    array([1, 1, 2, 2, 0, 0])
    """
    tile = np.repeat(np.asarray(tiles, dtype=int), n_queries)
    none = np.full(len(tile), NO_PATCH)
    return ImageGrid(size, tile, none, none, np.full((len(tile), 4), np.nan))


def per_image(count: str) -> Layout:
    """The layout of a processor that writes as many tokens for every image as its attribute `count` says.

    `count` may be a path ("image_processor.num_queries").
    """

    def layout(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
        n_queries = attrgetter(count)(processor)
        if not isinstance(n_queries, int) or n_queries < 1:
            raise TokenMapError(
                f"the processor's {count} is {n_queries!r}; expected a positive number of tokens"
            )
        return [query_grid(size, n_queries) for size in sizes]

    return layout


def idefics2(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Idefics 2: image_seq_len learnt queries that read the whole image (tile 0); with do_image_splitting as many
    for each of its four quarters before it (tiles 1 to 4)."""
    quarters = (1, 2, 3, 4) if processor.image_processor.do_image_splitting else ()
    return [query_grid(size, processor.image_seq_len, (*quarters, WHOLE_IMAGE_TILE)) for size in sizes]


def aria(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Aria: as many queries for an image as size_conversion says for the edge of its view."""
    if internals.image_defaults(processor).get("split_image"):
        raise TokenMapError("split_image is not laid out for aria")
    n_queries = processor.size_conversion[inputs["pixel_values"].shape[2]]
    return [query_grid(size, n_queries) for size in sizes]


def deepseek_ocr2(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """DeepSeek-OCR 2: the queries of every crop (tiles 1..; none of small images), of the whole (tile 0), and a
    learnt separator."""
    image_processor = processor.image_processor
    token = processor.patch_size * processor.downsample_ratio
    n_whole, n_crop = (
        math.ceil(edge / token) ** 2 for edge in (image_processor.size["height"], image_processor.tile_size)
    )
    grids = []
    for size, n_crops in zip(sizes, np.asarray(inputs.get("num_local_patches", ())).tolist(), strict=True):
        crops = [query_grid(size, n_crop, range(1, n_crops + 1))] if n_crops else []
        grids.append(joined(size, [*crops, query_grid(size, n_whole), separator(size)]))
    return grids


@visual_token(lambda processor: None)
def cross_attention(processor: ProcessorMixin, inputs: Inputs, sizes: Sizes) -> list[ImageGrid]:
    """Mllama: cross-attention reads the images, and no position of the prompt is one."""
    return [query_grid(size, 0) for size in sizes]
