"""Layouts proven by occlusion: pixels inside a token's box change that token's embedding and no other's.

The observation goes through the model's own path from pixels to positions: the real processor, the vision
tower with its attention outputs set to zero (so that a patch sees itself alone), the projector's merge, and
the model's scatter into the language model's input. Layout code is only asked for the expectation.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from occlusion import (
    LAID_OUT,
    SIZES,
    _model_without_vision_attention,
    check_trials,
    occlusion_trials,
    prompt_of_images,
)
from PIL import Image
from tiny import (
    REPRESENTATIVES,
    TINY,
    others_slow,
    tiny_images,
    tiny_processor,
)
from tiny.first import IDEFICS_SIZE, INTERNVL_SIZE

from mmlens.families.layouts import anyres, block_grid, tiles
from mmlens.model.prompt_making import make_prompt
from mmlens.token_map import WHOLE_IMAGE_TILE, TokenMapError

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("family", "size"),
    [
        pytest.param(
            family,
            size,
            id=f"{family}-{name}",
            marks=[] if family in REPRESENTATIVES or name in ("wide", "odd") else [pytest.mark.slow],
        )
        for family in LAID_OUT
        for name, size in SIZES.items()
    ],
)
def test_pixels_of_a_box_change_its_token_alone(family: str, size: tuple[int, int]) -> None:
    processor = tiny_processor(family)
    if family in ("idefics3", "smolvlm"):
        # Lanczos reaches far: more tiles and less shrinking leave pixels that only one token shows.
        longest = 8 * IDEFICS_SIZE if size == SIZES["strip"] else 4 * IDEFICS_SIZE
        processor.image_processor.size = {"longest_edge": longest}
        size = (size[0] * longest // max(size), size[1] * longest // max(size))
    images = tiny_images(1, seed=3, sizes=[size])
    trials = occlusion_trials(family, processor, ["What colour is K?"], [images], seed=1, n_trials=10)
    check_trials(family, trials)


@pytest.mark.parametrize("family", others_slow(REPRESENTATIVES, of=LAID_OUT))
def test_several_images_in_a_padded_batch(family: str) -> None:
    sizes = TINY[family].sizes or [(160, 120), (90, 200), (240, 110), (130, 133)]
    images = tiny_images(4, seed=5, sizes=sizes)
    trials = occlusion_trials(
        family,
        tiny_processor(family),
        ["What colour is the letter K in the second image?", "Where?", "and"],
        [images[:2], [], images[2:]]
        if TINY[family].most_images is None
        else [[image] for image in images[:3]],
        seed=2,
        n_trials=16,
    )
    check_trials(family, trials, at_least=8)


# ---------------------------------------------------------------------- each family's own turns


def test_every_pixel_of_an_untiled_qwen_image_belongs_to_one_token() -> None:
    for family in ("qwen2_5_vl", "qwen3_vl"):
        grid = prompt_of_images(
            family, tiny_processor(family), tiny_images(1, sizes=[(97, 64)])
        ).token_map.grids[0][0]
        area = (grid.boxes[:, 2] - grid.boxes[:, 0]) * (grid.boxes[:, 3] - grid.boxes[:, 1])
        assert area.sum() == pytest.approx(97 * 64)
        assert grid.patches == (8, 12)
        assert (grid.row.max() + 1, grid.column.max() + 1) == (4, 6)


def test_llava_crops_the_long_edge_away() -> None:
    prompt = prompt_of_images("llava", tiny_processor("llava"), tiny_images(1, sizes=[(300, 100)]))
    boxes = prompt.token_map.grids[0][0].boxes
    # 100 -> 40, so 300 -> 120 of which the middle 40 stay: original pixels 100 to 200.
    assert boxes[:, 0].min() == pytest.approx(100) and boxes[:, 2].max() == pytest.approx(200)
    with pytest.raises(TokenMapError, match=r"maps to no token: .* only \(100, 0, 200, 100\)"):
        prompt.token_map.box(0, (0, 0, 90, 100))


def test_llava_pads_an_image_smaller_than_the_crop() -> None:
    processor = tiny_processor("llava")
    processor.image_processor.do_resize = False
    trials = occlusion_trials(
        "llava", processor, ["What colour is K?"], [tiny_images(1, sizes=[(30, 37)])], seed=0, n_trials=8
    )
    check_trials("llava", trials)
    grid = prompt_of_images("llava", processor, tiny_images(1, sizes=[(20, 40)])).token_map.grids[0][0]
    empty = grid.boxes[:, 2] <= grid.boxes[:, 0]
    assert empty.reshape(5, 5).tolist() == [[True, False, False, False, True]] * 5


@pytest.mark.parametrize(("strategy", "n_extra", "n_first"), [("full", 1, 1), ("full", 0, 0)])
def test_llava_class_token_kept_or_absent(strategy: str, n_extra: int, n_first: int) -> None:
    processor = tiny_processor("llava")
    processor.vision_feature_select_strategy, processor.num_additional_image_tokens = strategy, n_extra
    grid = prompt_of_images("llava", processor, tiny_images(1)).token_map.grids[0][0]
    assert len(grid) == 25 + n_extra
    assert (grid.row[:n_first] == -1).all() and (grid.row[n_first:] >= 0).all()


def test_llava_onevision_shrinks_a_large_mosaic() -> None:
    """anyres_max_1 shrinks by more than 1.1: tokens then mix neighbouring patches, and their boxes overlap."""
    processor = tiny_processor("llava_onevision")
    model = _model_without_vision_attention("llava_onevision")
    processor.vision_aspect_ratio = model.config.vision_aspect_ratio = "anyres_max_1"
    try:
        for size in ((300, 150), (160, 160), (200, 340)):
            images = tiny_images(1, sizes=[size])
            grid = prompt_of_images("llava_onevision", processor, images).token_map.grids[0][0]
            mosaic = grid.tile == WHOLE_IMAGE_TILE + 1
            assert 0 < mosaic.sum() < 34
            trials = occlusion_trials(
                "llava_onevision", processor, ["What colour is K?"], [images], seed=1, n_trials=12
            )
            check_trials("llava_onevision", trials)
    finally:
        model.config.vision_aspect_ratio = "anyres_max_4"


def test_llava_onevision_newlines_are_separators_of_their_image() -> None:
    images = tiny_images(1, sizes=[(300, 130)])
    token_map = prompt_of_images("llava_onevision", tiny_processor("llava_onevision"), images).token_map
    at = torch.nonzero(token_map.is_image[0] & (token_map.row[0] == -1)).flatten().tolist()
    n_rows = int(token_map.row[0][token_map.tile[0] == 1].max()) + 1
    assert len(at) == n_rows
    for position in at:
        assert token_map.where(position).kind == "separator" and token_map.where(position).image == 0
        assert bool(token_map.boxes[0, position].isnan().all())
        assert bool(token_map.image_tokens(0)[0, position])
        assert not bool(token_map.box(0, (0, 0, 300, 130))[0, position])


def test_video_llama_3_merges_patches_where_its_processor_says_so() -> None:
    processor = tiny_processor("video_llama_3")
    processor.image_processor.merge_size = 2
    images = tiny_images(2, seed=3, sizes=[(211, 187), (130, 160)])
    question = ["What colour is K?"]
    check_trials("video_llama_3", occlusion_trials("video_llama_3", processor, question, [images], 1, 10))
    assert prompt_of_images("video_llama_3", processor, images).token_map.grids[0][0].patches is not None


def test_internvl_tiles_follow_the_aspect_ratio() -> None:
    processor = tiny_processor("internvl")
    for size, n_tiles in (((200, 100), 2), ((100, 300), 3), ((40, 40), 1)):
        grid = prompt_of_images("internvl", processor, tiny_images(1, sizes=[size])).token_map.grids[0][0]
        assert sorted(set(grid.tile.tolist())) == (list(range(n_tiles + 1)) if n_tiles > 1 else [0])
        assert len(grid) == (INTERNVL_SIZE // 16) ** 2 * (n_tiles + (n_tiles > 1))
        assert grid.tile[-1] == WHOLE_IMAGE_TILE


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_idefics3_without_splitting_sees_the_whole_image_once(family: str) -> None:
    processor = tiny_processor(family)
    processor.image_processor.do_image_splitting = False
    images = tiny_images(2, sizes=[(96, 40), (50, 96)])
    assert set(prompt_of_images(family, processor, images).token_map.grids[0][0].tile.tolist()) == {
        WHOLE_IMAGE_TILE
    }
    check_trials(
        family,
        occlusion_trials(family, processor, ["What colour is K?"], [images], seed=4, n_trials=8),
        at_least=2,
    )


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
@pytest.mark.parametrize("longest", [70, 100, 130])
def test_idefics3_longest_edge_need_not_be_whole_tiles(family: str, longest: int) -> None:
    """The count of tiles is checked against the processor's own expansion whenever a prompt is made."""
    processor = tiny_processor(family)
    processor.image_processor.size = {"longest_edge": longest}
    for size in ((100, 60), (61, 100), (90, 90), (200, 33), (31, 40)):
        for do_resize in (True, False):
            processor.image_processor.do_resize = do_resize
            assert (
                len(prompt_of_images(family, processor, tiny_images(1, sizes=[size])).token_map.grids[0][0])
                % 9
                == 0
            )


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(8, 250), st.integers(8, 250)),
    longest=st.integers(20, 200),
    tile=st.sampled_from([31, 48]),
)
@example(size=(26, 50), longest=38, tile=31)
def test_idefics3_tiles_are_the_processors(size: tuple[int, int], longest: int, tile: int) -> None:
    image_processor = tiny_processor("idefics3").image_processor
    image_processor.size = {"longest_edge": longest}
    out = image_processor(
        [Image.new("RGB", size)], max_image_size={"longest_edge": tile}, return_row_col_info=True
    )
    across, down = tiles._idefics3_tiles(tiles._idefics3_resized(image_processor, size), tile)
    assert (out["rows"][0][0], out["cols"][0][0]) == ((down, across) if across * down > 1 else (0, 0))


def test_a_layout_that_does_not_fit_the_inputs_is_refused() -> None:
    processor = tiny_processor("internvl")

    def one_tile_less(processor: Any, inputs: Any, sizes: Any) -> list[Any]:
        return [
            dataclasses.replace(
                grid, tile=grid.tile[9:], row=grid.row[9:], column=grid.column[9:], boxes=grid.boxes[9:]
            )
            for grid in tiles.internvl(processor, inputs, sizes)
        ]

    with pytest.raises(TokenMapError, match=r"example 0: input_ids holds 27 visual token\(s\).* predicts 18"):
        make_prompt(processor, one_tile_less, "What colour is K?", tiny_images(1, sizes=[(200, 100)]))


def test_processor_settings_that_are_not_laid_out_are_refused() -> None:
    processor = tiny_processor("llava")
    processor.image_processor.size = {"shortest_edge": 40, "longest_edge": 80}
    with pytest.raises(TokenMapError, match=r"the image processor's size is .*longest_edge"):
        prompt_of_images("llava", processor, tiny_images(1))
    processor = tiny_processor("internvl")
    processor.image_seq_length = 8
    with pytest.raises(TokenMapError, match="image_seq_length is 8; expected the square"):
        prompt_of_images("internvl", processor, tiny_images(1))
    onevision = tiny_processor("llava_onevision")
    inputs = prompt_of_images("llava_onevision", onevision, tiny_images(1)).inputs
    for name, value, message in (
        ("vision_aspect_ratio", "square", "vision_aspect_ratio is 'square'"),
        ("vision_feature_select_strategy", "default", "expected 'full'"),
    ):
        changed = tiny_processor("llava_onevision")
        setattr(changed, name, value)
        with pytest.raises(TokenMapError, match=message):
            anyres.llava_onevision(changed, inputs, [(64, 48)])
    onevision.image_processor.do_center_crop = True
    with pytest.raises(TokenMapError, match="do_center_crop"):
        anyres.llava_onevision(onevision, inputs, [(64, 48)])
    with pytest.raises(TokenMapError, match="an image of 2 frames"):
        block_grid.qwen(tiny_processor("qwen3_vl"), {"image_grid_thw": torch.tensor([[2, 4, 4]])}, [(64, 48)])


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_published_settings(family: str) -> None:
    """The settings of released checkpoints (sizes in pixels, tokens per tile); a wrong count raises."""
    processor = tiny_processor(family)
    image_processor = processor.image_processor
    if family == "llava":
        image_processor.size, image_processor.crop_size = (
            {"shortest_edge": 336},
            {"height": 336, "width": 336},
        )
        processor.patch_size = 14
    elif family == "llava_onevision":
        image_processor.size = {"height": 384, "width": 384}
        image_processor.image_grid_pinpoints = type(image_processor).image_grid_pinpoints
        processor.num_image_tokens, processor.vision_aspect_ratio = 27**2, "anyres_max_9"
    elif family in ("qwen2_5_vl", "qwen3_vl"):
        image_processor.patch_size = 14 if family == "qwen2_5_vl" else 16
        image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    elif family == "internvl":
        image_processor.size = {"height": 448, "width": 448}
        image_processor.max_patches, processor.image_seq_length = 12, 256
    else:
        tile, side = (364, 13) if family == "idefics3" else (512, 8)
        image_processor.size = {"longest_edge": 4 * tile}
        image_processor.max_image_size = {"longest_edge": tile}
        processor.image_seq_len = side**2
    for size in ((640, 480), (333, 1001), (1920, 200)):
        token_map = prompt_of_images(family, processor, tiny_images(1, sizes=[size])).token_map
        boxes = token_map.grids[0][0].boxes
        low, high = np.nanmin(boxes, axis=0), np.nanmax(boxes, axis=0)
        seen = (low[0], low[1], high[2], high[3])
        if family == "llava":
            shorter = min(size)
            assert (seen[2] - seen[0], seen[3] - seen[1]) == pytest.approx((shorter, shorter), abs=1)
        else:
            # 27 patches of 14 leave 6 of OneVision's 384 pixels unseen.
            assert seen == pytest.approx((0, 0, *size), rel=0.02)
