"""Processors as they are loaded, and their options: the inputs of plain transformers' call with them, the map right."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from occlusion import LAID_OUT, check_trials, occlusion_trials
from PIL import Image
from tiny import FAMILIES, TINY, record_of, tiny_images, tiny_model, tiny_processor
from tiny.base import PATCH
from torch import Tensor

import mmlens
from mmlens.errors import InvalidTypeError, InvalidValueError, UnsupportedError
from mmlens.families.processors import load_processor, option_names, with_options
from mmlens.model.prompt_making import make_prompt

torch.set_num_threads(1)

OPTIONS: dict[str, dict[str, Any]] = {
    "min_pixels": {"min_pixels": 40_000},
    "max_pixels": {"max_pixels": 4_000},
    "edges": {"size": {"shortest_edge": 3_000, "longest_edge": 5_000}},
    "longest_edge": {"size": {"longest_edge": 64}},
    "square": {"size": {"height": 64, "width": 64}},
    "not resized": {"do_resize": False},
    "as it is": {"do_normalize": False, "do_rescale": False},
    "one tile": {"crop_to_patches": False},
    "two tiles": {"max_patches": 2},
    "one view": {"do_image_splitting": False},
    "small tiles": {"max_image_size": {"longest_edge": 32}},
    "small view": {"max_image_size": 490, "min_image_size": 100},
    "crops": {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8},
    "no crop": {"do_center_crop": False},
    "no names of tiles": {"return_row_col_info": False},
    "pinpoints": {"image_grid_pinpoints": [[64, 64], [64, 128]]},
    "no slices": {"max_slice_nums": 1},
    "split": {"split_image": True},
    "one half": {"images_kwargs": {"do_rescale": False}},
}

PLAIN_DROPS = {
    ("idefics", "square"),
    ("mllama", "not resized"),
    *((family, "pinpoints") for family in ("llava_next", "llava_next_video", "granite4_vision")),
}
"""What the processor's own call takes and then reads its attribute all the same, in part: llava_next's counts tokens
by its own pinpoints, so that its inputs do not fit together."""

_BUILT = [family for family in FAMILIES if TINY[family].processor is not None]


def _images(family: str) -> list[Image.Image]:
    sizes = TINY[family].sizes or [(160, 120), (90, 200)]
    return tiny_images(2, seed=1, sizes=sizes)[: TINY[family].most_images or 2]


def _called(family: str, processor: Any, **options: Any) -> dict[str, Any] | None:
    """What a plain call gives; None where the processor refuses."""
    images = _images(family)
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": "Where?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    try:
        return dict(processor(text=[text], images=[images], return_tensors="pt", **options))
    except (ValueError, TypeError, LookupError, RuntimeError, AttributeError, StrictDataclassError):
        return None


def _same(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, Tensor) else repr(value) == repr(other[name])
        for name, value in one.items()
    )


@pytest.mark.filterwarnings("ignore:Passing `min_pixels`:FutureWarning")
@pytest.mark.parametrize("family", _BUILT)
def test_options_give_what_the_plain_call_with_them_gives(family: str) -> None:
    processor = tiny_processor(family)
    before = _called(family, processor)
    n_changed = 0
    for name, options in OPTIONS.items():
        if not options.keys() <= option_names(processor) or (family, name) in PLAIN_DROPS:
            continue
        plain = _called(family, processor, **options)
        if plain is None:
            continue
        assert _same(_called(family, with_options(processor, options)), plain), name
        n_changed += not _same(plain, before)
    # The processor itself stays as it was.
    assert _same(_called(family, processor), before)
    assert n_changed >= 2


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2_vl", {"max_pixels": 6_000}),
        ("qwen2_5_vl", OPTIONS["edges"]),
        ("qwen3_vl", {"min_pixels": 40_000, "max_pixels": 80_000}),
        ("glm4v", OPTIONS["edges"]),
        ("internvl", OPTIONS["one tile"]),
        ("internvl", OPTIONS["two tiles"]),
        ("idefics3", {"size": {"longest_edge": 192}}),
        ("smolvlm", {"size": {"longest_edge": 192}, "images_kwargs": {"do_rescale": True}}),
        ("llava", {"size": {"shortest_edge": 60}}),
        ("llava_onevision", {"resample": 2}),
        ("llava_next", {"do_pad": True}),
        ("pixtral", {"size": {"longest_edge": 96}}),
        ("gemma3", OPTIONS["crops"]),
        ("paligemma", {"do_normalize": False}),
        ("gemma4", {"max_soft_tokens": 140}),
        ("aya_vision", OPTIONS["one tile"]),
        ("granite_docling", OPTIONS["one half"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
@pytest.mark.filterwarnings("ignore:Passing `min_pixels`:FutureWarning")
def test_the_map_is_right_under_options(family: str, options: dict[str, Any]) -> None:
    assert family in LAID_OUT
    processor = with_options(tiny_processor(family), options)
    size = (192, 83) if family in ("idefics3", "smolvlm") else (300, 130)
    trials = occlusion_trials(
        family, processor, ["What colour is K?"], [tiny_images(1, seed=3, sizes=[size])], seed=1, n_trials=8
    )
    check_trials(family, trials, at_least=2)


def test_an_option_reaches_the_number_of_tokens() -> None:
    processor, layout = tiny_processor("qwen3_vl"), record_of("qwen3_vl").layout
    assert layout is not None
    image = tiny_images(1, sizes=[(320, 160)])
    few = make_prompt(with_options(processor, {"max_pixels": 8192}), layout, "Where?", image)
    many = make_prompt(processor, layout, "Where?", image)
    # 128 x 64 pixels of patches of 8, merged 2 x 2.
    assert few.token_map.grids[0][0].patches == (8, 16)
    assert few.token_map.grids[0][0].size == many.token_map.grids[0][0].size == (320, 160)
    assert int(few.token_map.is_image.sum()) == 32 < int(many.token_map.is_image.sum())


def test_names_are_those_of_the_processor() -> None:
    processor = tiny_processor("qwen3_vl")
    assert {"min_pixels", "max_pixels", "size", "do_resize", "images_kwargs"} <= option_names(processor)
    assert not {"return_tensors", "padding", "max_length", "truncation"} & option_names(processor)
    with pytest.raises(InvalidTypeError, match="no option 'max_pixel'; the nearest: 'max_pixels'"):
        with_options(processor, {"max_pixel": 3})
    with pytest.raises(InvalidTypeError, match="no option 'crop_to_patches'"):
        with_options(processor, {"crop_to_patches": True})
    with pytest.raises(InvalidTypeError, match="no option 'padding'"):
        with_options(processor, {"padding": "max_length"})
    with pytest.raises(InvalidTypeError, match="'size' is given twice"):
        with_options(processor, {"size": {"longest_edge": 8}, "images_kwargs": {"size": {"longest_edge": 9}}})
    with pytest.raises(InvalidTypeError, match="images_kwargs is 3 .*expected a dict"):
        with_options(processor, {"images_kwargs": 3})
    with pytest.raises(InvalidValueError, match=r"takes no such options, \{'max_pixels': 'many'\}"):
        with_options(processor, {"max_pixels": "many"})


def test_none_is_as_if_not_given() -> None:
    processor = tiny_processor("qwen3_vl")
    assert with_options(processor, {"max_pixels": None, "size": None}) is processor


def test_options_of_loading_are_those_of_every_prompt() -> None:
    model = mmlens.HookedVLM.from_pretrained("micro", max_pixels=1024, do_resize=None)
    assert model.processor.image_processor.size["longest_edge"] == 1024
    plain = load_processor(mmlens.model.loading.model_source("micro"))
    assert plain.image_processor.size["longest_edge"] != 1024
    image = tiny_images(1, sizes=[(128, 128)])
    prompt = model.prompt("What colour is the letter K ?", image)
    assert prompt.token_map.grids[0][0].patches is not None
    assert int(prompt.token_map.is_image.sum()) < int(
        mmlens.HookedVLM.from_pretrained("micro")
        .prompt("What colour is the letter K ?", image)
        .token_map.is_image.sum()
    )
    assert model(prompt).isfinite().all()


def test_what_model_and_processor_both_have_goes_to_both(tmp_path: Path) -> None:
    """llava_next counts tokens in its processor and cuts padding in its model, both by the pinpoints."""
    tiny_model("llava_next").save_pretrained(tmp_path)
    tiny_processor("llava_next").save_pretrained(tmp_path)
    pinpoints = [[24, 72], [72, 24]]
    model = mmlens.HookedVLM.from_pretrained(str(tmp_path), image_grid_pinpoints=pinpoints)
    assert model.processor.image_processor.image_grid_pinpoints == pinpoints
    assert model.hf_model.config.image_grid_pinpoints == pinpoints
    assert model(model.prompt("Where?", tiny_images(1, sizes=[(60, 60)]))).isfinite().all()
    saved = tmp_path / "saved"
    model.processor.save_pretrained(saved)
    assert load_processor(tmp_path).image_processor.image_grid_pinpoints != pinpoints
    assert (
        tiny_processor("llava_next").from_pretrained(saved).image_processor.image_grid_pinpoints == pinpoints
    )


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_use_fast_without_torchvision_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="pip install torchvision"):
        mmlens.HookedVLM.from_pretrained("micro", use_fast=True)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_use_fast_is_the_users_choice() -> None:
    names = [
        type(mmlens.HookedVLM.from_pretrained("micro", use_fast=fast).processor.image_processor).__name__
        for fast in (False, True)
    ]
    assert names == ["Qwen2VLImageProcessorPil", "Qwen2VLImageProcessor"]


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")
def test_a_processor_is_loaded_with_its_video_half_where_torchvision_is(tmp_path: Path) -> None:
    tiny_model("qwen3_vl").save_pretrained(tmp_path)
    tiny_processor("qwen3_vl").save_pretrained(tmp_path)
    processor = load_processor(tmp_path)
    assert type(processor.video_processor).__name__ == "Qwen3VLVideoProcessor"
    assert processor.video_processor.patch_size == PATCH
    assert type(processor.image_processor).__name__.endswith("Pil")


def test_a_processor_whose_files_know_no_videos_is_loaded_without_that_half(tmp_path: Path) -> None:
    processor = mmlens.HookedVLM.from_pretrained("micro").processor
    assert "video_processor" not in type(processor).get_attributes()
    assert type(processor.image_processor).__name__.endswith("Pil")
