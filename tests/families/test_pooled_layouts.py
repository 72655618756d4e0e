"""Settings of the pooled families' processors beside their defaults: laid out, or refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from occlusion import SIZES, check_trials, occlusion_trials, prompt_of_images
from tiny import TINY, record_of, tiny_images, tiny_processor
from tiny.pooled import SIDE
from transformers.utils import is_torchvision_available

from mmlens.token_map import WHOLE_IMAGE_TILE, TokenMapError

needs_torchvision = pytest.mark.skipif(
    not is_torchvision_available(), reason="the family's image processor is written on torchvision"
)
QUESTION = ["What colour is K?"]


def _tiles(family: str, processor: Any, size: tuple[int, int]) -> list[int]:
    tile = prompt_of_images(family, processor, tiny_images(1, sizes=[size])).token_map.grids[0][0].tile
    return list(dict.fromkeys(tile.tolist()))


def _proven(family: str, processor: Any, size: tuple[int, int], seed: int = 1) -> None:
    images = tiny_images(1, seed=3, sizes=[size])
    check_trials(family, occlusion_trials(family, processor, QUESTION, [images], seed, n_trials=10))


@pytest.mark.parametrize(("size", "n_crops"), [((300, 130), 2), ((110, 330), 3), ((211, 187), 0)])
def test_gemma3_pan_and_scan(size: tuple[int, int], n_crops: int) -> None:
    processor = tiny_processor("gemma3")
    processor.images_kwargs = {**processor.images_kwargs, "do_pan_and_scan": True}
    for name, value in (("min_crop_size", 32), ("max_num_crops", 3), ("min_ratio_to_activate", 1.2)):
        processor.images_kwargs[f"pan_and_scan_{name}"] = value
    assert _tiles("gemma3", processor, size) == list(range(n_crops + 1))
    _proven("gemma3", processor, size)


def test_gemma3_crops_of_an_odd_width_meet() -> None:
    processor = tiny_processor("gemma3")
    processor.images_kwargs = {
        **processor.images_kwargs,
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 32,
        "pan_and_scan_max_num_crops": 3,
    }
    grid = prompt_of_images("gemma3", processor, tiny_images(1, sizes=[(301, 100)])).token_map.grids[0][0]
    edges = [(grid.boxes[grid.tile == t, 0].min(), grid.boxes[grid.tile == t, 2].max()) for t in (1, 2, 3)]
    assert edges == [(0, 101), (101, 202), (202, 301)]


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_an_image_that_is_not_stretched_is_refused(family: str) -> None:
    processor = tiny_processor(family)
    processor.image_processor.do_resize = False
    with pytest.raises(TokenMapError, match="do_resize = False"):
        prompt_of_images(family, processor, tiny_images(1, sizes=[(SIDE, SIDE)]))


def test_paligemma_places_its_question_before_the_newline_it_adds() -> None:
    processor = tiny_processor("paligemma")
    prompt = prompt_of_images("paligemma", processor, tiny_images(2))
    assert prompt.text[0].endswith("assistant\n") and "labels" not in prompt.inputs
    assert processor.tokenizer.decode(prompt.inputs["input_ids"][0]).endswith("assistant\n\n")
    ids = prompt.inputs["input_ids"][0][prompt.token_map.is_question[0]]
    assert processor.tokenizer.decode(ids) == "What colour is K?"


def test_gemma3_marks_its_soft_tokens_and_not_the_token_before_them() -> None:
    processor = tiny_processor("gemma3")
    prompt = prompt_of_images("gemma3", processor, tiny_images(2))
    assert processor.image_token_id == processor.tokenizer.boi_token_id
    ids = prompt.inputs["input_ids"][prompt.token_map.is_image]
    assert set(ids.tolist()) == {processor.tokenizer.image_token_id}


@pytest.mark.parametrize("covering", [True, False])
def test_ovis2_sees_the_whole_image_first(covering: bool) -> None:
    processor = tiny_processor("ovis2")
    processor.image_processor.use_covering_area_grid = covering
    for size in SIZES.values():
        tiles = _tiles("ovis2", processor, size)
        assert tiles == list(range(len(tiles))) and tiles[0] == WHOLE_IMAGE_TILE
        _proven("ovis2", processor, size)
    processor.image_processor.crop_to_patches = False
    assert _tiles("ovis2", processor, (300, 130)) == [WHOLE_IMAGE_TILE]


def test_granite_docling_without_tiles_and_on_the_fine_route(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = tiny_processor("granite_docling")
    page = tiny_images(1, sizes=[(300, 130)])
    coarse = prompt_of_images("granite_docling", processor, page).token_map.grids[0][0]
    processor.image_processor.fine_route = True
    fine = prompt_of_images("granite_docling", processor, page).token_map.grids[0][0]
    assert len(fine) == 4 * len(coarse)
    tiny = TINY["granite_docling"]
    monkeypatch.setitem(TINY, "granite_docling", dataclasses.replace(tiny, cell=tiny.cell / 2))
    _proven("granite_docling", processor, (300, 130))
    processor.image_processor.crop_to_patches = False
    assert _tiles("granite_docling", processor, (300, 130)) == [WHOLE_IMAGE_TILE]


def test_idefics2_quarters_come_before_the_whole_image() -> None:
    processor = tiny_processor("idefics2")
    processor.image_processor.do_image_splitting = True
    assert _tiles("idefics2", processor, (90, 60)) == [1, 2, 3, 4, WHOLE_IMAGE_TILE]


def test_gemma4_boxes_tile_the_image() -> None:
    for size in ((97, 64), (210, 10), (31, 300)):
        grid = prompt_of_images(
            "gemma4", tiny_processor("gemma4"), tiny_images(1, sizes=[size])
        ).token_map.grids[0][0]
        area = (grid.boxes[:, 2] - grid.boxes[:, 0]) * (grid.boxes[:, 3] - grid.boxes[:, 1])
        assert area.sum() == pytest.approx(size[0] * size[1]) and 0 < len(grid) <= 70


@needs_torchvision
def test_llama4_canvas() -> None:
    processor = tiny_processor("llama4")
    # Smaller than a tile: one padded tile, which is the whole image.
    assert _tiles("llama4", processor, (40, 30)) == [WHOLE_IMAGE_TILE]
    grid = prompt_of_images("llama4", processor, tiny_images(1, sizes=[(40, 20)])).token_map.grids[0][0]
    # 40 x 20 becomes 48 x 24 in the upper left of 48 x 48: the third row of tokens shows only padding.
    empty = grid.boxes[:, 3] <= grid.boxes[:, 1]
    assert empty.tolist() == [False] * 6 + [True] * 3
    assert _tiles("llama4", processor, (90, 40)) == [1, 2, WHOLE_IMAGE_TILE]
    processor.image_processor.resize_to_max_canvas = True
    for size in ((40, 30), (300, 130), (110, 250), (211, 187)):
        _proven("llama4", processor, size)


@needs_torchvision
def test_lfm2_thumbnail_and_splitting() -> None:
    processor = tiny_processor("lfm2_vl")
    assert _tiles("lfm2_vl", processor, (300, 130)) == [1, 2, WHOLE_IMAGE_TILE]
    processor.image_processor.use_thumbnail = False
    assert _tiles("lfm2_vl", processor, (300, 130)) == [1, 2]
    _proven("lfm2_vl", processor, (300, 130))
    processor.image_processor.do_image_splitting = False
    assert _tiles("lfm2_vl", processor, (300, 130)) == [WHOLE_IMAGE_TILE]
    _proven("lfm2_vl", processor, (300, 130))


@needs_torchvision
def test_cohere2_without_tiles() -> None:
    processor = tiny_processor("cohere2_vision")
    assert _tiles("cohere2_vision", processor, (300, 130)) == [1, 2, 3, WHOLE_IMAGE_TILE]
    processor.image_processor.crop_to_patches = False
    assert _tiles("cohere2_vision", processor, (300, 130)) == [WHOLE_IMAGE_TILE]


@pytest.mark.parametrize(
    "family",
    ["gemma3", "paligemma", "aya_vision", "qianfan_ocr", "ovis2", "granite_docling", "gemma4"]
    + [
        pytest.param(family, marks=needs_torchvision)
        for family in ("gemma4_unified", "llama4", "lfm2_vl", "cohere2_vision")
    ],
)
def test_published_settings(family: str) -> None:
    """The settings of released checkpoints; make_prompt raises where the number of tokens differs."""
    processor = tiny_processor(family)
    images = processor.image_processor
    if family == "gemma3":
        images.size, processor.image_seq_length = {"height": 896, "width": 896}, 256
        processor.full_image_sequence = "<start_of_image>" + "<image_soft_token>" * 256 + "<end_of_image>"
    elif family == "paligemma":
        images.size, processor.image_seq_length = {"height": 448, "width": 448}, 1024
    elif family == "aya_vision":
        images.size, images.max_patches = {"height": 364, "width": 364}, 12
        processor.img_size, processor.patch_size = 364, 28
    elif family == "qianfan_ocr":
        images.size, images.max_patches = {"height": 448, "width": 448}, 12
        processor.image_seq_length = 256
    elif family == "ovis2":
        images.size, images.max_patches = {"height": 448, "width": 448}, 9
        processor.image_seq_length = 256
    elif family == "granite_docling":
        images.size, images.max_patches = {"height": 512, "width": 512}, 16
        processor.image_seq_len = 64
    elif family == "llama4":
        images.size, images.max_patches, processor.patch_size = {"height": 336, "width": 336}, 16, 14
    elif family in ("lfm2_vl", "cohere2_vision"):
        processor.image_processor = type(images)()
        processor.patch_size = getattr(processor.image_processor, "patch_size", None)
    else:
        images.patch_size, images.pooling_kernel_size, images.max_soft_tokens = 16, 3, 280
    for size in ((640, 480), (333, 1001), (1920, 200)):
        boxes = torch.tensor(
            prompt_of_images(family, processor, tiny_images(1, sizes=[size])).token_map.grids[0][0].boxes
        )
        seen = (*boxes.amin(dim=0)[:2].tolist(), *boxes.amax(dim=0)[2:].tolist())
        assert seen == pytest.approx((0, 0, *size), rel=0.02), TINY[family].model_type
    assert record_of(family).layout is not None
