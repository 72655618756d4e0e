"""An edit belongs to one prompt."""

from __future__ import annotations

import pytest
import torch

import mmlens
from conftest import QUESTION, generate, hooked, padded_prompt, two_image_prompt
from mmlens.prompt import Prompt


def _others(model: mmlens.HookedVLM, prompt: Prompt) -> list[Prompt]:
    image = prompt.images[0][0]
    return [
        model.prompt("Which colour is the letter K?", images=[image]),
        model.prompt(QUESTION + " Say it.", images=[image]),
        model.prompt("K?", images=[image]),
        model.prompt([QUESTION, "Where?"], images=[[image], [image]]),
    ]


@torch.no_grad()
@pytest.mark.parametrize("family", ("llava", "qwen3_vl"))
def test_run_on_another_prompt_an_edit_at_positions_is_an_error(family: str) -> None:
    model = hooked(family)
    prompt = model.prompt(QUESTION, images=[two_image_prompt(model).images[0][0]])
    hooks = mmlens.ablate([(1, 0)], positions="question")(model, prompt)
    for other in _others(model, prompt):
        with pytest.raises(ValueError, match="intervention built for a prompt of .* is run on another one"):
            model.run_with_hooks(other, fwd_hooks=hooks)
    model.run_with_hooks(prompt, fwd_hooks=hooks)


@torch.no_grad()
@pytest.mark.parametrize("family", ("llava", "qwen3_vl"))
def test_generation_and_beams_are_runs_of_the_same_prompt(family: str) -> None:
    model = hooked(family)
    for prompt in (two_image_prompt(model), padded_prompt(model)):
        hooks = mmlens.ablate([(1, 0)], positions="question")(model, prompt)
        cached, uncached = (generate(model, prompt, 3, hooks, use_cache=use)[0] for use in (True, False))
        assert torch.equal(cached, uncached)
    one = two_image_prompt(model)
    everywhere = mmlens.ablate([(1, 0)], positions="last")(model, one)
    assert generate(model, one, 3, everywhere, num_beams=2)[0].shape[0] == 1
