"""Options of one prompt: the inputs of the plain call with them, a map that is right, corruptions that keep them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import TINY, tiny_images, tiny_model, tiny_processor
from torch import Tensor

from mmlens.errors import InvalidTypeError, MmlensError
from mmlens.interventions import blank_region, other_image
from mmlens.model.hooked_vlm import HookedVLM

CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "there"}]},
    {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "image"}]},
]
OPTIONS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"max_pixels": 4_000},
    "qwen2_5_vl": {"min_pixels": 30_000, "max_pixels": 60_000},
    "qwen3_vl": {"size": {"shortest_edge": 3_000, "longest_edge": 5_000}},
    "glm4v": {"size": {"shortest_edge": 3_000, "longest_edge": 5_000}},
    "internvl": {"crop_to_patches": False},
    "llava_onevision": {"resample": 2},
    "idefics3": {"do_image_splitting": False},
    "smolvlm": {"size": {"longest_edge": 144}},
    "pixtral": {"size": {"longest_edge": 64}},
    "paligemma": {"do_normalize": False},
    "gemma3": {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8},
    "gemma4": {"max_soft_tokens": 140},
    "llava": {"size": {"shortest_edge": 60}},
}


def _model(family: str) -> HookedVLM:
    return HookedVLM(tiny_model(family), tiny_processor(family))


@pytest.mark.filterwarnings("ignore:Passing `m.._pixels`:FutureWarning")
@pytest.mark.filterwarnings("ignore::mmlens.errors.MmlensWarning")
@pytest.mark.parametrize("family", OPTIONS)
def test_inputs_are_those_of_the_processors_own_call(family: str) -> None:
    model, options = _model(family), OPTIONS[family]
    first, second = tiny_images(2, seed=0, sizes=TINY[family].sizes or [(300, 130), (160, 120)])[:2]
    prompt = model.prompt(CHAT, [first, second], **options)
    filled = [
        {
            **message,
            "content": [
                {"type": "image", "image": (first, second)[turn > 0]} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for turn, message in enumerate(CHAT)
    ]
    plain = model.processor.apply_chat_template(
        filled,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs=dict(options),
    )
    for name, value in prompt.inputs.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, plain[name]), name
    other = model.prompt(CHAT, [first, second])
    assert any(
        isinstance(value, Tensor)
        and (value.shape != other.inputs[name].shape or not torch.equal(value, other.inputs[name]))
        for name, value in prompt.inputs.items()
    ), "the option changed nothing"
    assert prompt.options == options
    # Its fingerprint of the processor is the model's: what may differ between prompts of one model.
    assert model(prompt).isfinite().all()


def test_corruptions_make_the_prompt_again_with_its_options() -> None:
    model = _model("qwen3_vl")
    image, other = tiny_images(2, seed=0, sizes=[(300, 130), (300, 130)])
    prompt = model.prompt("Where?", [image], max_pixels=9_000)
    blanked = blank_region((0, 0, 150, 130))(model, prompt)
    assert blanked.token_map.shown_size(0) == prompt.token_map.shown_size(0) != (300, 130)
    exchanged = other_image(other)(model, prompt)
    assert exchanged.options == {"max_pixels": 9_000}
    width, height = exchanged.token_map.shown_size(0)
    assert width * height <= 9_000


def test_options_that_nothing_knows_are_refused() -> None:
    model = _model("qwen3_vl")
    image = tiny_images(1, sizes=[(300, 130)])
    with pytest.raises(
        InvalidTypeError, match="no option of a prompt 'max_pixel'; the nearest: 'max_pixels'"
    ):
        model.prompt("Where?", image, max_pixel=3)
    with pytest.raises(MmlensError, match="takes no such options"):
        model.prompt("Where?", image, max_pixels="many")
    # The model's own processor is not touched by any of it.
    assert model.prompt("Where?", image, max_pixels=4_000).token_map.shown_size(0) != model.prompt(
        "Where?", image
    ).token_map.shown_size(0)
