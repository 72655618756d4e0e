"""Video and audio in the inputs: plain runs pass as they do, whatever reads which positions are images refuses."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from mmlens.errors import UnsupportedError
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.prompt_making import prompt_from_inputs
from mmlens.scores.retrieval import attention_mass


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


@every_clip
@torch.no_grad()
def test_plain_runs_and_hooks_over_all_positions_take_a_clip_as_transformers_does(family: str) -> None:
    plain = tiny.tiny_model(family)
    inputs = CLIPS[family](plain.config)
    expected = plain(**inputs).logits
    blank = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"] * 0}
    assert not torch.allclose(plain(**blank).logits, expected, atol=1e-3)
    model = HookedVLM(plain)
    assert torch.equal(model(inputs), expected)
    assert torch.equal(model(**inputs), expected)
    hooks = [("blocks.1.hook_resid_post", lambda x, hook: x)]
    assert torch.equal(model.run_with_hooks(inputs, fwd_hooks=hooks), expected)
    # What fires is cached, but for what would read which positions are images.
    logits, cache = model.run_with_cache(inputs)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert "blocks.0.hook_resid_post" in cache.cache_dict
    assert not [name for name in cache.cache_dict if "image." in name or name.endswith("hook_deepstack")]
    _, every = model.run_with_cache(inputs, names_filter=lambda name: name.startswith("blocks.0."))
    assert "blocks.0.hook_resid_post" in every.cache_dict
    ids = inputs["input_ids"]
    queries, keys = torch.zeros_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool)
    queries[:, -1] = True
    mass = attention_mass(model, inputs, queries, keys)
    torch.testing.assert_close(mass[0], torch.ones_like(mass[0]))


@every_clip
@torch.no_grad()
def test_what_reads_which_positions_are_images_refuses_a_clip(family: str) -> None:
    model = HookedVLM(tiny.tiny_model(family), tiny.tiny_processor(family))
    inputs = CLIPS[family](model.hf_model.config)
    refused = pytest.raises(UnsupportedError, match="no token map knows yet.*list of frames")
    with refused:
        model.image_mask(inputs)
    for name in ("blocks.1.image.hook_resid_post", "image.hook_embed"):
        with refused:
            model.run_with_hooks(inputs, fwd_hooks=[(name, lambda x, hook: x)])
        with refused:
            model.run_with_cache(inputs, names_filter=name)
    with refused:
        prompt_from_inputs(model.processor, model.family.layout, inputs)
    _, cache = model.run_with_cache(inputs)
    with refused:
        _ = cache.image_mask
    # Nothing is left behind: an image alone passes.
    prompt = model.prompt("What colour is K?", images=tiny.tiny_images(1))
    assert model.image_mask(prompt).any()


@torch.no_grad()
def test_the_parts_of_a_stream_that_holds_a_deeply_injected_clip_are_refused() -> None:
    """DeepStack adds a clip's features between the layers, at positions that the cache does not know."""
    model = HookedVLM(tiny.tiny_model("qwen3_vl"))
    _, cache = model.run_with_cache(_qwen_clip(model.hf_model.config))
    for parts in (cache.decompose_resid, cache.get_full_resid_decomposition):
        with pytest.raises(UnsupportedError, match="video_token_id"):
            parts()
    # Without deep injection nothing is missing from the sum.
    other = HookedVLM(tiny.tiny_model("qwen2_5_vl"))
    _, cache = other.run_with_cache(_qwen_clip(other.hf_model.config))
    torch.testing.assert_close(
        cache.decompose_resid().sum(0), cache["resid_post", other.cfg.n_layers - 1], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("family", ["llava_onevision", "llava_next_video", "qwen2_5_omni_thinker", "gemma4"])
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
    with pytest.raises(UnsupportedError, match="video_token_id"):
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
    if family in ("instructblipvideo", "internvl"):
        others = set()
    for medium in others:
        assert any(medium in name for name in media.ids) or any(medium in name for name in media.inputs)
    assert media.held(tiny.tiny_inputs(family, [1])) is None
