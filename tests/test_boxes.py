"""Boxes on other scales: pixels of the image as it was shown, 0 to 1, 0 to 1000."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from occlusion import LAID_OUT, prompt_of_images
from tiny import TINY, record_of, tiny_images, tiny_model, tiny_processor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from mmlens.boxes import TokenMapError, checked_box, from_pixels, to_pixels
from mmlens.data.examples import Evidence, Example, load_examples
from mmlens.errors import InvalidValueError, OutOfRangeError
from mmlens.families.processors import with_options
from mmlens.interventions import blank_region
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.prompt_making import make_prompt
from mmlens.token_map import TokenMap

SIZE = (300, 130)


def _map(family: str, size: tuple[int, int] = SIZE, **options: Any) -> TokenMap:
    processor = with_options(tiny_processor(family), options)
    return prompt_of_images(family, processor, tiny_images(1, seed=0, sizes=[size])).token_map


# ---------------------------------------------------------------------- relative scales


def test_relative_boxes_are_parts_of_width_and_height() -> None:
    assert to_pixels((0.25, 0.5, 0.75, 1), "0-1", (400, 200)) == (100, 100, 300, 200)
    assert to_pixels((250, 500, 750, 1000), "0-1000", (400, 200)) == (100, 100, 300, 200)
    assert from_pixels((100, 100, 300, 200), "0-1", (400, 200)) == (0.25, 0.5, 0.75, 1)
    assert from_pixels((100, 100, 300, 200), "0-1000", (400, 200)) == (250, 500, 750, 1000)


@pytest.mark.parametrize(
    ("box", "scale", "said"),
    [
        ((0, 0, 1.2, 1), "0-1", r"is not a box .* on the scale '0-1', which goes to 1 x 1"),
        ((0, 0, 1001, 10), "0-1000", "on the scale '0-1000', which goes to 1000 x 1000"),
        ((5, 5, 5, 9), "0-1000", "is not a box"),
        ((0.1, 0.1, 0.9, 0.9), "0-1000", "is on the scale '0-1', not '0-1000'"),
        ((0, 0, float("nan"), 1), "0-1", "finite"),
        ((0, 0, 1), "0-1", "a box is"),
    ],
)
def test_a_box_off_its_scale_is_refused(box: Any, scale: Any, said: str) -> None:
    with pytest.raises(TokenMapError, match=said):
        to_pixels(box, scale, (400, 200))


def test_a_scale_that_there_is_not() -> None:
    with pytest.raises(InvalidValueError, match="no scale '0-100'; the nearest: '0-1000'"):
        to_pixels((0, 0, 1, 1), "0-100", (4, 4))
    with pytest.raises(InvalidValueError, match=r"needs the prompt .*token_map.to_original"):
        from_pixels((0, 0, 1, 1), "resized", (4, 4))
    with pytest.raises(InvalidValueError, match="no scale 'pixels'"):
        _map("qwen3_vl").to_original(0, (0, 0, 5, 5), "pixels")


# ---------------------------------------------------------------------- what the model was shown


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("options", [{}, {"max_pixels": 9_000}, {"min_pixels": 80_000}])
@pytest.mark.filterwarnings("ignore:Passing `min_pixels`:FutureWarning")
def test_qwen_is_shown_what_smart_resize_says(family: str, options: dict[str, int]) -> None:
    token_map = _map(family, **options)
    images = with_options(tiny_processor(family), options).image_processor
    height, width = smart_resize(
        SIZE[1], SIZE[0], images.patch_size * 2, images.size["shortest_edge"], images.size["longest_edge"]
    )
    assert token_map.shown_size(0) == (width, height)
    # The corner that a model answers with, in original pixels and back.
    box = token_map.to_original(0, (0, 0, width / 2, height), "resized")
    assert box == pytest.approx((0, 0, 150, 130))
    assert token_map.from_original(0, box, "resized") == pytest.approx((0, 0, width / 2, height))


@pytest.mark.parametrize("family", LAID_OUT)
def test_tokens_are_whole_cells_of_the_picture_shown(family: str) -> None:
    """Independent of how the layout found the size: cells have the same length in the model's picture."""
    token_map = _map(family)
    grid = token_map.grids[0][0]
    n_views = len(np.unique(grid.tile[grid.tile >= 0]))
    if grid.resized is None:
        assert n_views > 1 or family in ("deepseek_vl_hybrid", "perception_lm", "lfm2_vl"), family
        with pytest.raises(TokenMapError, match="there is no one size"):
            token_map.shown_size(0)
        return
    width, height = token_map.shown_size(0)
    cell, checked = TINY[family].cell, 0
    for row, column, box in zip(grid.row, grid.column, grid.boxes, strict=True):
        if row < 0 or not (box[0] < box[2] and box[1] < box[3]):
            continue
        expected = (column * cell, row * cell, (column + 1) * cell, (row + 1) * cell)
        found = token_map.from_original(0, tuple(box), "resized")
        assert token_map.to_original(0, found, "resized") == pytest.approx(tuple(box), abs=1e-3)
        assert expected[2] <= width + cell and expected[3] <= height + cell
        for edge in range(4):
            # What the image's own edge cuts off is no whole cell.
            if 0 < box[edge] < SIZE[edge % 2]:
                assert found[edge] == pytest.approx(expected[edge], abs=1e-3 * cell)
                checked += 1
    assert checked


def test_pixels_are_as_many_as_the_picture_has() -> None:
    for family in ("llava", "paligemma", "gemma3", "deepseek_vl", "janus", "chameleon"):
        layout = record_of(family).layout
        assert layout is not None
        prompt = make_prompt(tiny_processor(family), layout, "Where?", tiny_images(1, sizes=[SIZE]))
        height, width = prompt.inputs["pixel_values"].shape[-2:]
        assert prompt.token_map.shown_size(0) == (width, height), family


def test_a_cropped_image_is_shown_in_part() -> None:
    # 300 x 100 is resized to 120 x 40, of which the model sees the middle 40.
    token_map = _map("llava", (300, 100))
    assert token_map.shown_size(0) == (40, 40)
    assert token_map.to_original(0, (0, 0, 40, 40), "resized") == pytest.approx((100, 0, 200, 100))
    assert token_map.from_original(0, (0, 0, 150, 100), "resized") == pytest.approx((0, 0, 20, 40))
    assert token_map.to_original(0, (0, 0, 500, 1000), "0-1000") == (0, 0, 150, 100)
    with pytest.raises(TokenMapError, match="no pixel in common"):
        token_map.from_original(0, (0, 0, 50, 50), "resized")


def test_a_padded_image_ends_inside_the_picture() -> None:
    # The longest edge fills the square; above and below there is padding.
    token_map = _map("deepseek_vl", (200, 100))
    edge = token_map.shown_size(0)[0]
    assert token_map.to_original(0, (0, 0, edge, edge), "resized") == pytest.approx((0, 0, 200, 100))
    with pytest.raises(TokenMapError, match="no pixel in common"):
        token_map.to_original(0, (0, 0, edge, edge / 8), "resized")


def test_tiles_have_no_one_size_and_relative_boxes_still() -> None:
    token_map = _map("internvl")
    with pytest.raises(TokenMapError, match=r"shown \d+ pictures of it"):
        token_map.to_original(0, (0, 0, 5, 5), "resized")
    assert token_map.to_original(0, (500, 0, 1000, 1000), "0-1000") == (150, 0, 300, 130)
    assert token_map.from_original(0, (150, 0, 300, 130), "0-1") == (0.5, 0, 1, 1)
    alone = _map("internvl", crop_to_patches=False)
    width, height = alone.shown_size(0)
    assert alone.to_original(0, (0, 0, width, height), "resized") == (0, 0, 300, 130)


def test_an_image_that_there_is_not() -> None:
    token_map = _map("qwen3_vl")
    for call in (lambda: token_map.shown_size(1), lambda: token_map.to_original(1, (0, 0, 5, 5), "0-1")):
        with pytest.raises(OutOfRangeError, match="image 1 of example 0"):
            call()
    with pytest.raises(TokenMapError, match=r"on the scale 'resized', which goes to \d+ x \d+"):
        token_map.to_original(0, (0, 0, 5000, 5), "resized")


# ---------------------------------------------------------------------- boxes that look relative


def test_a_box_that_looks_relative_is_refused_wherever_boxes_stand(tmp_path: Path) -> None:
    image = tiny_images(1, sizes=[SIZE])[0]
    token_map = _map("qwen3_vl")
    model = HookedVLM(tiny_model("qwen3_vl"), tiny_processor("qwen3_vl"))
    prompt = model.prompt("Where?", [image])
    lines = tmp_path / "examples.jsonl"
    image.save(tmp_path / "image.png")
    for box, said in (
        ((0.1, 0.2, 0.5, 0.6), r"is scaled to 0 to 1.*it is \(30.0, 26.0, 150.0, 78.0\)"),
        (
            (100, 200, 500, 600),
            r"inside the image of 300 x 130 pixels.*counted from 0 to 1000, it is \(30.0, 26.0, 150.0, 78.0\)",
        ),
    ):
        line = {"question": "Where?", "answer": "K", "images": ["image.png"]}
        lines.write_text(json.dumps({**line, "evidence": [{"image": 0, "box": list(box)}]}) + "\n")
        for call in (
            lambda box=box: checked_box(box, SIZE, "here"),
            lambda box=box: Example("Where?", "K", (image,), (Evidence(0, box),)),
            lambda: load_examples(tmp_path),
            lambda box=box: token_map.box(0, box),
            lambda box=box: token_map.evidence([Evidence(0, box)]),
            lambda box=box: blank_region(box)(model, prompt),
        ):
            with pytest.raises(InvalidValueError, match=said):
                call()


def test_a_thousandth_that_lies_inside_a_large_image_is_a_box_of_pixels() -> None:
    assert checked_box((100, 200, 500, 600), (1200, 800), "here") == (100, 200, 500, 600)
    assert torch.is_tensor(_map("qwen3_vl").box(0, (0, 0, 300, 130)))
