"""Layouts of LLaVA's relatives at released checkpoints' settings, and the settings that they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import record_of, tiny_images, tiny_processor

from mmlens.families.layouts import fixed_grid, resized_grid
from mmlens.model.prompt_making import make_prompt
from mmlens.token_map import WHOLE_IMAGE_TILE, ImageGrid, TokenMapError

SIZES = ((640, 480), (333, 1001), (1920, 200), (97, 101), (1001, 337))


def _as_published(family: str) -> Any:
    processor = tiny_processor(family)
    images = processor.image_processor
    if family in ("llava_next", "llava_next_video"):
        images.size, images.crop_size = {"shortest_edge": 336}, {"height": 336, "width": 336}
        images.image_grid_pinpoints, processor.patch_size = type(images).image_grid_pinpoints, 14
    elif family == "granite4_vision":
        images.size, images.crop_size = {"height": 384, "width": 384}, {"height": 384, "width": 384}
        images.image_grid_pinpoints = [[384 * h, 384 * w] for h in range(1, 5) for w in range(1, 5)]
        processor.patch_size, processor.downsample_rate = 16, "4/8"
    elif family in ("vipllava", "video_llava"):
        edge = 336 if family == "vipllava" else 224
        images.size, images.crop_size = {"shortest_edge": edge}, {"height": edge, "width": edge}
        processor.patch_size = 14
    elif family in ("deepseek_vl", "janus", "deepseek_vl_hybrid"):
        images.size, processor.num_image_tokens = {"height": 384, "width": 384}, 576
        if family == "deepseek_vl_hybrid":
            images.high_res_size = {"height": 1024, "width": 1024}
    else:
        merge = processor.spatial_merge_size
        images.size, processor.patch_size = (
            {"longest_edge": 1540 if merge == 2 else 1024},
            14 if merge == 2 else 16,
        )
        images.patch_size = {"height": processor.patch_size * merge, "width": processor.patch_size * merge}
        if family == "lighton_ocr":
            processor.effective_patch_size = processor.patch_size * merge
    return processor


def _grid(family: str, processor: Any, size: tuple[int, int]) -> ImageGrid:
    prompt = make_prompt(processor, record_of(family).layout, "What?", tiny_images(1, sizes=[size]))
    return prompt.token_map.grids[0][0]


@pytest.mark.parametrize(
    "family",
    [
        "llava_next",
        "llava_next_video",
        "granite4_vision",
        "vipllava",
        "video_llava",
        "deepseek_vl",
        "deepseek_vl_hybrid",
        "janus",
        "pixtral",
        "mistral3",
        "lighton_ocr",
    ],
)
def test_published_settings_show_the_whole_image(family: str) -> None:
    """A wrong count of tokens raises while the prompt is made."""
    processor = _as_published(family)
    for size in SIZES:
        boxes = _grid(family, processor, size).boxes
        low, high = np.nanmin(boxes, axis=0), np.nanmax(boxes, axis=0)
        seen = (low[0], low[1], high[2], high[3])
        if family in ("vipllava", "video_llava"):
            shorter = min(size)
            assert (seen[2] - seen[0], seen[3] - seen[1]) == pytest.approx((shorter, shorter), rel=0.01)
        else:
            assert seen == pytest.approx((0, 0, *size), rel=0.02)


def test_deepseek_counts_padding_as_tokens_without_area() -> None:
    grid = _grid("deepseek_vl", tiny_processor("deepseek_vl"), (300, 60))
    empty = (grid.boxes[:, 3] <= grid.boxes[:, 1]).reshape(5, 5)
    # 300 x 60 -> 40 x 14 (the processor's min_size), 13 pixels of padding above: rows 0 and 4 show none of it.
    assert empty.all(axis=1).tolist() == [True, False, False, False, True]
    assert not empty[1:4].any()


def test_pixtral_of_llavas_model_type_is_laid_out_as_pixtral() -> None:
    processor = tiny_processor("pixtral")
    inputs = {"image_sizes": torch.tensor([[40, 48]])}
    found = fixed_grid.llava(processor, inputs, [(97, 64)])[0]
    assert np.array_equal(found.boxes, resized_grid.pixtral(processor, inputs, [(97, 64)])[0].boxes)
    assert (found.row.max() + 1, found.column.max() + 1) == (5, 6)


def test_granite_boxes_are_those_of_its_queries() -> None:
    grid = _grid("granite4_vision", tiny_processor("granite4_vision"), (64, 64))
    base = grid.boxes[grid.tile == WHOLE_IMAGE_TILE]
    # Two by two queries, each over 2 x 2 of the view's 4 x 4 patches.
    assert base.tolist() == [[0, 0, 32, 32], [32, 0, 64, 32], [0, 32, 32, 64], [32, 32, 64, 64]]


@pytest.mark.parametrize(
    ("family", "changed", "message"),
    [
        ("llava_next", {"crop_size": {"height": 16, "width": 16}}, "crop_size .* differs from size"),
        ("deepseek_vl", {"do_pad": False}, "do_pad = False is not laid out"),
        ("janus", {"do_resize": False}, "do_resize = False"),
    ],
)
def test_image_processor_settings_that_are_not_laid_out_are_refused(
    family: str, changed: dict[str, Any], message: str
) -> None:
    processor = tiny_processor(family)
    for name, value in changed.items():
        setattr(processor.image_processor, name, value)
    with pytest.raises(TokenMapError, match=message):
        record_of(family).layout(processor, {}, [(64, 48)])


def test_processor_settings_that_are_not_laid_out_are_refused() -> None:
    processor = tiny_processor("llava_next")
    processor.num_additional_image_tokens = 0
    with pytest.raises(
        TokenMapError, match="num_additional_image_tokens = 0 with .*'default' is not laid out"
    ):
        record_of("llava_next").layout(processor, {}, [(64, 48)])
    processor = tiny_processor("mistral3")
    with pytest.raises(TokenMapError, match="40 x 24 pixels is no whole number of tokens of 16 x 16"):
        record_of("mistral3").layout(processor, {"image_sizes": torch.tensor([[24, 40]])}, [(64, 48)])
