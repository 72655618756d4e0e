"""Interventions on a run that goes on from a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny.wrapped import hooked, two_image_prompt
from torch import Tensor
from transformers import DynamicCache

import mmlens
from mmlens.errors import InvalidValueError
from mmlens.internals import CACHE_KEYWORDS
from mmlens.model.hooks import HookNeverFiredError
from mmlens.model.keywords import forward_keywords


@torch.no_grad()
def test_a_run_that_goes_on_from_a_cache_is_edited_at_the_prompts_positions() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    ids, mask = prompt.inputs["input_ids"], prompt.inputs["attention_mask"]
    key = next(name for name in CACHE_KEYWORDS if name in forward_keywords(model.hf_model))
    cut = ids.shape[1] - 3

    def goes_on(ids: Tensor, hooks: list[Any]) -> Tensor:
        cache = DynamicCache()
        before = {**prompt.inputs, "input_ids": ids[:, :cut], "attention_mask": mask[:, :cut]}
        model(before, **{key: cache}, use_cache=True)
        rest = {"input_ids": ids[:, cut:], "attention_mask": mask, key: cache}
        return model.run_with_hooks(rest, fwd_hooks=hooks)

    torch.testing.assert_close(goes_on(ids, []), model(prompt)[:, cut:], atol=1e-5, rtol=0)
    for intervention in (mmlens.knockout("last", "image"), mmlens.ablate([(0, 1)], positions="last")):
        hooks = intervention(model, prompt)
        whole = model.run_with_hooks(prompt, fwd_hooks=intervention(model, prompt))[:, cut:]
        assert not torch.allclose(whole, model(prompt)[:, cut:], atol=1e-3)
        torch.testing.assert_close(goes_on(ids, list(hooks)), whole, atol=1e-5, rtol=0)
        other = ids.clone()
        other[:, -1] = 7
        with pytest.raises(InvalidValueError, match=f"after {cut} positions in a cache"):
            goes_on(other, list(intervention(model, prompt)))
    with pytest.raises(HookNeverFiredError, match=r"image\.hook_embed"):
        goes_on(ids, [("image.hook_embed", lambda x, hook: 0 * x)])


@torch.no_grad()
def test_a_prompt_in_chunks_is_refused_with_what_to_leave_out() -> None:
    model = hooked("qwen3_vl")
    prompt = model.prompt("What colour is the letter K?")
    with model.hooks(fwd_hooks=mmlens.ablate([(0, 1)], positions="last")(model, prompt)):
        with pytest.raises(InvalidValueError, match="is its beginning: .*without prefill_chunk_size"):
            model.generate(prompt, max_new_tokens=2, prefill_chunk_size=3)
        assert model.generate(prompt, max_new_tokens=2).shape[1] == prompt.shape[1] + 2
