"""Clips in the inputs are visual positions; what is not mapped is refused by whatever reads which positions are."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from mmlens.errors import InvalidValueError, UnsupportedError
from mmlens.model.hooked_vlm import HookedVLM


def _ids_of(n: int, token: int) -> Tensor:
    return torch.tensor([[5, 6] + [token] * n + [7, 8, 9]])


def _qwen_clip(config: Any) -> dict[str, Tensor]:
    """Two steps of four frames, each a grid of 4 x 6 patches; Qwen3 puts marks around every step."""
    vision, (t, h, w) = config.vision_config, (2, 4, 6)
    n = h * w // vision.spatial_merge_size**2
    runs, length = (t, n) if config.model_type == "qwen3_vl" else (1, t * n)
    marks = [config.vision_start_token_id, *[config.video_token_id] * length, config.vision_end_token_id]
    ids = torch.tensor([[5, 6, *marks * runs, 7, 8, 9]])
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.video_token_id).long() * 2,
        "pixel_values_videos": torch.randn(t * h * w, width, generator=torch.Generator().manual_seed(0)),
        "video_grid_thw": torch.tensor([[t, h, w]]),
    }


def _glm_clip(config: Any) -> dict[str, Tensor]:
    """GLM's videos stand at the id of its images, between marks of their own."""
    vision, (t, h, w) = config.vision_config, (1, 4, 4)
    n = t * h * w // vision.spatial_merge_size**2
    ids = torch.tensor(
        [
            [
                5,
                config.video_start_token_id,
                *[config.image_token_id] * n,
                config.video_end_token_id,
                7,
                8,
            ]
        ]
    )
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).long() * 2,
        "pixel_values_videos": torch.randn(t * h * w, width, generator=torch.Generator().manual_seed(0)),
        "video_grid_thw": torch.tensor([[t, h, w]]),
    }


def _llava_clip(config: Any) -> dict[str, Tensor]:
    """Four frames, each pooled to a quarter of its patches."""
    side = config.vision_config.image_size
    n = 4 * (side // config.vision_config.patch_size // 2) ** 2
    ids = _ids_of(n, config.video_token_index)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.randn(1, 4, 3, side, side, generator=torch.Generator().manual_seed(0)),
    }


CLIPS = {
    "qwen2_5_vl": _qwen_clip,
    "qwen3_vl": _qwen_clip,
    "glm4v": _glm_clip,
    "llava_next_video": _llava_clip,
}

every_clip = pytest.mark.parametrize("family", CLIPS)


def _is_visual(inputs: dict[str, Tensor], config: Any) -> Tensor:
    types = inputs.get("mm_token_type_ids")
    return inputs["input_ids"] == config.video_token_index if types is None else types > 0


@every_clip
@torch.no_grad()
def test_the_positions_of_a_clip_are_visual_ones(family: str) -> None:
    plain = tiny.tiny_model(family)
    inputs = CLIPS[family](plain.config)
    expected = plain(**inputs).logits
    blank = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"] * 0}
    assert not torch.allclose(plain(**blank).logits, expected, atol=1e-3)
    model = HookedVLM(plain)
    assert torch.equal(model(inputs), expected)
    assert torch.equal(model(**inputs), expected)
    is_visual = _is_visual(inputs, plain.config)
    assert is_visual.sum() > 2
    assert torch.equal(model.image_mask(inputs), is_visual)
    logits, cache = model.run_with_cache(inputs)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(cache.image_mask, is_visual)
    for name, whole in (
        ("image.hook_embed", "hook_embed"),
        ("blocks.1.image.hook_resid_post", "blocks.1.hook_resid_post"),
    ):
        torch.testing.assert_close(cache[name], cache[whole][is_visual])

    # An edit there is an edit of the clip: without it the model sees no other clip's pixels.
    def without(x: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(x)

    deep = [name for name in model.hook_dict if name.endswith("hook_deepstack")]
    edits = [(name, without) for name in ("image.hook_embed", *deep)]
    runs = [model.run_with_hooks(each, fwd_hooks=edits) for each in (inputs, blank)]
    torch.testing.assert_close(*runs)
    assert not torch.allclose(runs[0], expected, atol=1e-3)


@torch.no_grad()
def test_a_stream_that_holds_a_deeply_injected_clip_is_the_sum_of_its_parts() -> None:
    """DeepStack adds a clip's features between the layers."""
    for family in ("qwen3_vl", "qwen2_5_vl"):
        model = HookedVLM(tiny.tiny_model(family))
        _, cache = model.run_with_cache(_qwen_clip(model.hf_model.config))
        torch.testing.assert_close(
            cache.decompose_resid().sum(0),
            cache["resid_post", model.cfg.n_layers - 1],
            atol=1e-4,
            rtol=1e-4,
        )


@torch.no_grad()
def test_what_reads_which_positions_are_visual_refuses_a_clip_that_is_not_mapped() -> None:
    """Molmo 2's clips stand at the id of its images, and how they are laid out is not known."""
    model = HookedVLM(tiny.tiny_model("molmo2"))
    images = tiny.tiny_inputs("molmo2", [1])
    inputs = {**images, "pixel_values_videos": torch.ones(1, 2, 3)}
    refused = pytest.raises(UnsupportedError, match="no token map knows.*list of frames")
    with refused:
        model.image_mask(inputs)
    # Nothing is left behind: an image alone passes.
    assert model.image_mask(images).any()


@pytest.mark.parametrize("family", ["qwen2_5_omni_thinker", "gemma4"])
@torch.no_grad()
def test_a_prompt_that_holds_another_medium_is_not_encoded_ahead(family: str) -> None:
    """A prompt of images alone is: its runs are then the same to the bit."""
    model = HookedVLM(tiny.tiny_model(family), tiny.tiny_processor(family))
    prompt = model.prompt("What colour is K?", images=tiny.tiny_images(1))
    encoded = model.encode_images(prompt)
    assert encoded.image_features is not None
    assert torch.equal(model(encoded), model(prompt))
    for token_id in model.anatomy.other_media.ids.values():
        ids = prompt.inputs["input_ids"].clone()
        ids[:, -2] = token_id
        prompt.inputs["input_ids"] = ids
        with pytest.raises(UnsupportedError, match=f"1 position.*= {token_id}"):
            model.encode_images(prompt)
        with pytest.raises(UnsupportedError):
            model(prompt)


@torch.no_grad()
def test_a_clip_beside_an_image_is_seen_by_its_input_alone() -> None:
    """Whatever the ids: molmo2's clips stand at the id of its images."""
    model = HookedVLM(tiny.tiny_model("molmo2"))
    inputs = tiny.tiny_inputs("molmo2", [1])
    assert model.image_mask(inputs).any()
    with pytest.raises(UnsupportedError, match="pixel_values_videos"):
        model.image_mask({**inputs, "pixel_values_videos": torch.ones(1, 2, 3)})
    assert model.image_mask({**inputs, "pixel_values_videos": None}).any()


def test_token_ids_alone_bring_no_clip() -> None:
    model = HookedVLM(tiny.tiny_model("qwen3_vl"))
    with pytest.raises(InvalidValueError, match="token ids alone bring no image"):
        model(torch.tensor([[5, model.hf_model.config.video_token_id, 7]]))
    assert model(torch.tensor([[5, 6, 7]])).shape[:2] == (1, 3)


@pytest.mark.parametrize(
    "family", tiny.others_slow(("qwen2_5_omni_thinker", "molmo2", "internvl", "instructblipvideo", "emu3"))
)
def test_every_family_that_takes_clips_says_how_to_see_them(family: str) -> None:
    """By transformers' own word on what the model takes; the frames of InstructBLIP-Video and InternVL are images."""
    model = tiny.tiny_model(family)
    media = HookedVLM(model).anatomy.other_media
    others = set(model.input_modalities) & {"video", "audio"}
    if tiny.record_of(family).video_layout is not None:
        others -= {"video"}
    if family in ("instructblipvideo", "internvl"):
        others = set()
    for medium in others:
        assert any(medium in name for name in media.ids) or any(medium in name for name in media.inputs)
    assert media.held(tiny.tiny_inputs(family, [1])) is None
