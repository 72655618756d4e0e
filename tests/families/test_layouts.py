"""Layouts proven by occlusion: pixels inside a token's box change that token's embedding and no other's.

The observation goes through the model's own path from pixels to positions: the real processor, the vision
tower with its attention outputs set to zero (so that a patch sees itself alone), the projector's merge, and
the model's scatter into the language model's input. Layout code is only asked for the expectation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import (
    FAMILIES,
    REPRESENTATIVES,
    TINY,
    others_slow,
    record_of,
    tiny_images,
    tiny_model,
    tiny_processor,
)
from tiny.first import IDEFICS_SIZE, INTERNVL_SIZE
from torch import Tensor, nn

from mmlens.families.layouts import anyres, block_grid, fixed_grid, queries, tiles, visual_codes
from mmlens.model.prompt import Prompt
from mmlens.model.prompt_making import make_prompt
from mmlens.token_map import WHOLE_IMAGE_TILE, TokenMap, TokenMapError

torch.set_num_threads(1)

LAID_OUT = tuple(
    name
    for name in FAMILIES
    if TINY[name].processor
    and getattr(record_of(name).layout, "__module__", None)
    not in (None, queries.__name__, visual_codes.__name__)
)
"""Families whose tokens show patches; test_queries.py has those of learnt queries, test_visual_codes.py of codes."""


NO_VISION_ATTENTION = ("gemma4_unified", "fuyu", "inkling_mm_model")


STEPS_OVER_PIXELS = ("molmo2",)
"""Families that shrink images without antialiasing: a small region may fall between the pixels they read."""

OWN_WINDOW = {"molmo2": ("model.multi_modal_projector.image_pooling_2d",)}
"""Attention of a token to the patches that it pools, which is how it sees them."""


class _Embedded(Exception):
    """Carries the language model's input out of the forward pass."""


def _with_injected(inputs: dict[str, Any]) -> Tensor:
    """What enters the decoder, and beside it what it adds at image positions before some layers (Granite)."""
    embeddings: Tensor = inputs["inputs_embeds"]
    injected = [] if inputs.get("deepstack_features") is None else inputs["deepstack_features"].values()
    spread = [torch.zeros_like(embeddings).masked_scatter(inputs["vision_mask"], each) for each in injected]
    return torch.cat([embeddings, *spread], dim=-1)


def _ungated(module: nn.Module, args: Any, output: Any) -> Any:
    """A gate made of the mean over the whole image (squeeze and excitation): its input instead."""
    return args[0]


def _keep_own_taps(model: nn.Module) -> None:
    """Convolutions whose kernels overlap keep the taps of their own stride: outputs then part the input.

    Which taps those are is the convention of a grid of cells. The whole kernel reaches further, and an odd one
    with a stride of 2 is centred on the first of its two pixels.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module.padding, str):
            for axis, (size, stride, padding) in enumerate(
                zip(module.kernel_size, module.stride, module.padding, strict=True), start=2
            ):
                others = [tap for tap in range(size) if not padding <= tap < padding + stride]
                kept = module.weight.data.index_fill(axis, torch.tensor(others, dtype=torch.long), 0)
                module.weight.data = kept * (size / (size - len(others))) ** 0.5
        elif type(module).__name__ in ("SEModule", "SqueezeExcite"):
            module.register_forward_hook(_ungated)


@functools.cache
def _model_without_vision_attention(family: str) -> nn.Module:
    model = tiny_model(family)
    decoder = model.get_decoder()

    def zeroed(module: nn.Module, args: Any, output: Any) -> Any:
        return (
            (torch.zeros_like(output[0]), *output[1:])
            if isinstance(output, tuple)
            else torch.zeros_like(output)
        )

    _keep_own_taps(model)
    n_zeroed = 0
    inside_decoder = {id(module) for module in decoder.modules()}
    windows = [model.get_submodule(path) for path in OWN_WINDOW.get(family, ())]
    for module in model.modules():
        mixes = type(module).__name__.endswith(("Attention", "Attention2d", "AttentionRope", "ShortConv"))
        if id(module) in inside_decoder or not mixes or module in windows:
            continue
        # A module around attention may add the residual stream as well, which must stay.
        if not any(
            type(part).__name__.endswith(("Attention", "Attention2d")) for part in list(module.modules())[1:]
        ):
            module.register_forward_hook(zeroed)
            n_zeroed += 1
    assert n_zeroed >= 3 or family in NO_VISION_ATTENTION

    def stop(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        raise _Embedded(_with_injected(kwargs))

    decoder.register_forward_pre_hook(stop, with_kwargs=True)
    return model


def _embeddings(family: str, prompt: Prompt) -> Tensor:
    """[batch, pos, d_model] what enters the language model at every position, vision attention off."""
    try:
        with torch.no_grad():
            # Llama 4's processor gives bfloat16.
            inputs = {
                k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v
                for k, v in prompt.inputs.items()
            }
            _model_without_vision_attention(family)(**inputs)
    except _Embedded as reached:
        return reached.args[0]
    raise AssertionError("the language model was not reached")


def _painted(image: Image.Image, region: tuple[int, int, int, int]) -> Image.Image:
    """The image with a region of pixels set to the far end of the scale, channel by channel."""
    pixels = np.array(image)
    left, top, right, bottom = region
    patch = pixels[top:bottom, left:right]
    patch[...] = np.where(patch.mean(axis=(0, 1)) < 128, 255, 0)
    return Image.fromarray(pixels)


def _region(
    box: Sequence[float], margin: tuple[float, float], generator: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """Some whole pixels of a box that keep the margin: at least half of what there is, at a random place."""
    edges = []
    for low, high, keep in ((box[0], box[2], margin[0]), (box[1], box[3], margin[1])):
        first, last = int(np.ceil(low + keep)), int(np.floor(high - keep))
        if last <= first:
            return None
        length = int(np.ceil((last - first) / 2))
        start = int(generator.integers(first, last - length + 1))
        edges.append((start, start + length))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


def _margins(
    family: str, processor: Any, size: tuple[int, int], token_map: TokenMap, example: int
) -> list[Tensor]:
    """How far in original pixels, in x and in y, resampling carries a pixel into each token's view."""
    boxes = token_map.boxes[example]
    margins = []
    for axis in range(2):
        length = (boxes[:, axis + 2] - boxes[:, axis]).nan_to_num()
        # A box at the image's edge may show less than a cell: the longest of its view tells the view's scale.
        views = token_map.image[example] * 1000 + token_map.tile[example]
        longest = torch.stack([length[views == view].max() for view in views])
        scale = (longest / TINY[family].cell).clamp(min=1)
        if family in ("idefics3", "smolvlm"):
            # Lanczos, reach 3: to the longest edge, to whole tiles, and the global image once more.
            first = max(size) / processor.image_processor.size["longest_edge"]
            twice = 3 * max(1, first) * (1 if first == 1 else 2)
            margins.append(twice + 1 + torch.where(token_map.tile[example] == WHOLE_IMAGE_TILE, 3 * scale, 0))
        else:
            margins.append(TINY[family].reach * scale + 1)
    return margins


def occlusion_trials(
    family: str,
    processor: Any,
    questions: list[str],
    images: list[list[Image.Image]],
    seed: int,
    n_trials: int,
) -> list[tuple[set[int], set[int], int]]:
    """(changed positions, expected positions, occluded position) of one example per trial."""
    layout = record_of(family).layout
    clean_prompt = make_prompt(processor, layout, questions, images)
    clean = _embeddings(family, clean_prompt)
    token_map = clean_prompt.token_map
    generator = np.random.default_rng(seed)
    patches = torch.nonzero(token_map.row >= 0).tolist()
    trials: list[tuple[set[int], set[int], int]] = []
    for index in np.concatenate([generator.permutation(len(patches)) for _ in range(4)]):
        if len(trials) == n_trials:
            break
        example, position = patches[index]
        place = token_map.where(position, example)
        assert place.box is not None and place.image is not None
        image = images[example][place.image]
        margin_x, margin_y = _margins(family, processor, image.size, token_map, example)
        region = _region(place.box, (float(margin_x[position]), float(margin_y[position])), generator)
        if region is None:
            continue
        # What the painted pixels reach must be what they lie in, or rounding decides: such draws are left out.
        boxes = token_map.boxes[example].nan_to_num(nan=-1e9)
        same_image = token_map.image[example] == place.image
        area = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        reached = (
            (boxes[:, 0] < region[2] + margin_x)
            & (boxes[:, 2] > region[0] - margin_x)
            & (boxes[:, 1] < region[3] + margin_y)
            & (boxes[:, 3] > region[1] - margin_y)
        ).where(same_image & area, torch.tensor(False))
        inside = token_map.box(place.image, region, example=example)[example]
        if not torch.equal(reached, inside):
            continue
        shown_x = boxes[:, 2].clamp(max=region[2]) - boxes[:, 0].clamp(min=region[0])
        shown_y = boxes[:, 3].clamp(max=region[3]) - boxes[:, 1].clamp(min=region[1])
        if family in STEPS_OVER_PIXELS and bool(((shown_x < margin_x) | (shown_y < margin_y))[inside].any()):
            continue
        painted = [list(own) for own in images]
        painted[example][place.image] = _painted(image, region)
        occluded = _embeddings(family, make_prompt(processor, layout, questions, painted))
        assert occluded.shape == clean.shape
        strength = (occluded - clean).norm(dim=-1)
        changed = (occluded - clean).abs().amax(-1) > 1e-4
        if not TINY[family].exact_proof:
            # Convolutions carry some of the change to neighbours: those that change most count.
            most = strength[example].topk(int(inside.sum())).values.min()
            changed[example] &= strength[example] >= most
        others = torch.arange(len(questions)) != example
        assert not bool(changed[others].any()), "another example of the batch changed"
        trials.append(
            (
                set(torch.nonzero(changed[example]).flatten().tolist()),
                set(torch.nonzero(inside).flatten().tolist()),
                position,
            )
        )
    return trials


def _check(family: str, trials: list[tuple[set[int], set[int], int]], at_least: int = 4) -> None:
    assert len(trials) >= at_least, f"only {len(trials)} boxes were large enough to test"
    for changed, expected, position in trials:
        assert position in expected
        assert changed == expected
        if record_of(family).layout in (fixed_grid.llava, block_grid.qwen):
            assert changed == {position}


SIZES = {
    "square": (160, 160),
    "wide": (300, 130),
    "tall": (110, 250),
    "odd": (211, 187),
    "strip": (400, 100),
}


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
    _check(family, trials)


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
    _check(family, trials, at_least=8)


# ---------------------------------------------------------------------- each family's own turns


def _grids(family: str, processor: Any, images: list[Image.Image]) -> Prompt:
    return make_prompt(processor, record_of(family).layout, "What colour is K?", images)


def test_every_pixel_of_an_untiled_qwen_image_belongs_to_one_token() -> None:
    for family in ("qwen2_5_vl", "qwen3_vl"):
        grid = _grids(family, tiny_processor(family), tiny_images(1, sizes=[(97, 64)])).token_map.grids[0][0]
        area = (grid.boxes[:, 2] - grid.boxes[:, 0]) * (grid.boxes[:, 3] - grid.boxes[:, 1])
        assert area.sum() == pytest.approx(97 * 64)
        assert grid.patches == (8, 12)
        assert (grid.row.max() + 1, grid.column.max() + 1) == (4, 6)


def test_llava_crops_the_long_edge_away() -> None:
    prompt = _grids("llava", tiny_processor("llava"), tiny_images(1, sizes=[(300, 100)]))
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
    _check("llava", trials)
    grid = _grids("llava", processor, tiny_images(1, sizes=[(20, 40)])).token_map.grids[0][0]
    empty = grid.boxes[:, 2] <= grid.boxes[:, 0]
    assert empty.reshape(5, 5).tolist() == [[True, False, False, False, True]] * 5


@pytest.mark.parametrize(("strategy", "n_extra", "n_first"), [("full", 1, 1), ("full", 0, 0)])
def test_llava_class_token_kept_or_absent(strategy: str, n_extra: int, n_first: int) -> None:
    processor = tiny_processor("llava")
    processor.vision_feature_select_strategy, processor.num_additional_image_tokens = strategy, n_extra
    grid = _grids("llava", processor, tiny_images(1)).token_map.grids[0][0]
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
            grid = _grids("llava_onevision", processor, images).token_map.grids[0][0]
            mosaic = grid.tile == WHOLE_IMAGE_TILE + 1
            assert 0 < mosaic.sum() < 34
            trials = occlusion_trials(
                "llava_onevision", processor, ["What colour is K?"], [images], seed=1, n_trials=12
            )
            _check("llava_onevision", trials)
    finally:
        model.config.vision_aspect_ratio = "anyres_max_4"


def test_llava_onevision_newlines_are_separators_of_their_image() -> None:
    images = tiny_images(1, sizes=[(300, 130)])
    token_map = _grids("llava_onevision", tiny_processor("llava_onevision"), images).token_map
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
    _check("video_llama_3", occlusion_trials("video_llama_3", processor, question, [images], 1, 10))
    assert _grids("video_llama_3", processor, images).token_map.grids[0][0].patches is not None


def test_internvl_tiles_follow_the_aspect_ratio() -> None:
    processor = tiny_processor("internvl")
    for size, n_tiles in (((200, 100), 2), ((100, 300), 3), ((40, 40), 1)):
        grid = _grids("internvl", processor, tiny_images(1, sizes=[size])).token_map.grids[0][0]
        assert sorted(set(grid.tile.tolist())) == (list(range(n_tiles + 1)) if n_tiles > 1 else [0])
        assert len(grid) == (INTERNVL_SIZE // 16) ** 2 * (n_tiles + (n_tiles > 1))
        assert grid.tile[-1] == WHOLE_IMAGE_TILE


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_idefics3_without_splitting_sees_the_whole_image_once(family: str) -> None:
    processor = tiny_processor(family)
    processor.image_processor.do_image_splitting = False
    images = tiny_images(2, sizes=[(96, 40), (50, 96)])
    assert set(_grids(family, processor, images).token_map.grids[0][0].tile.tolist()) == {WHOLE_IMAGE_TILE}
    _check(
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
            assert len(_grids(family, processor, tiny_images(1, sizes=[size])).token_map.grids[0][0]) % 9 == 0


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

    with pytest.raises(TokenMapError, match=r"example 0: input_ids holds 27 image token\(s\).* predicts 18"):
        make_prompt(processor, one_tile_less, "What colour is K?", tiny_images(1, sizes=[(200, 100)]))


def test_processor_settings_that_are_not_laid_out_are_refused() -> None:
    processor = tiny_processor("llava")
    processor.image_processor.size = {"shortest_edge": 40, "longest_edge": 80}
    with pytest.raises(TokenMapError, match=r"the image processor's size is .*longest_edge"):
        _grids("llava", processor, tiny_images(1))
    processor = tiny_processor("internvl")
    processor.image_seq_length = 8
    with pytest.raises(TokenMapError, match="image_seq_length is 8; expected the square"):
        _grids("internvl", processor, tiny_images(1))
    onevision = tiny_processor("llava_onevision")
    inputs = _grids("llava_onevision", onevision, tiny_images(1)).inputs
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
        token_map = _grids(family, processor, tiny_images(1, sizes=[size])).token_map
        boxes = token_map.grids[0][0].boxes
        low, high = np.nanmin(boxes, axis=0), np.nanmax(boxes, axis=0)
        seen = (low[0], low[1], high[2], high[3])
        if family == "llava":
            shorter = min(size)
            assert (seen[2] - seen[0], seen[3] - seen[1]) == pytest.approx((shorter, shorter), abs=1)
        else:
            # 27 patches of 14 leave 6 of OneVision's 384 pixels unseen.
            assert seen == pytest.approx((0, 0, *size), rel=0.02)
