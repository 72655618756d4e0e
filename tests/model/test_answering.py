"""Generated answers as positions: equal to what was computed while they were generated."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from tiny.wrapped import family_prompt, hooked_family, largest_logit, padded_prompt
from torch import Tensor

import mmlens
from mmlens.errors import InvalidTypeError
from mmlens.model.answering import before_the_end
from mmlens.model.prompt import Prompt

FAMILIES = (*tiny.REPRESENTATIVES, "gemma3", "qwen3_5", "llama4", "paligemma", "mllama")
N_TOKENS = 4


def decoding(model: mmlens.HookedVLM, prompt: Prompt, names: list[str]) -> dict[str, list[Tensor]]:
    """What the hook points give at each step of plain cached decoding, at the newest position."""
    steps: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(x: Tensor, hook: Any) -> None:
        # [batch, head, query, key] or [batch, pos, ...]
        newest = x[:, :, -1] if hook.name.endswith("hook_pattern") else x[:, -1]
        steps[hook.name].append(newest.detach().clone())

    with model.hooks(fwd_hooks=[(name, keep) for name in names]), torch.no_grad():
        model.generate(prompt, max_new_tokens=N_TOKENS, do_sample=False, eos_token_id=None)
    return steps


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_s_positions_are_what_was_computed_while_it_was_generated(family: str) -> None:
    model = hooked_family(family)
    prompt = family_prompt(family, model)
    layers = model.attention_layers
    patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in layers]
    streams = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    steps = decoding(model, prompt, [*patterns, *streams])
    longer, cache = model.generate_with_cache(
        prompt, N_TOKENS, names_filter=streams, do_sample=False, eos_token_id=None
    )
    assert longer.token_map.is_answer.sum(1).tolist() == [N_TOKENS] * 2
    expected_ids = model.hf_model.generate(
        **prompt.inputs, max_new_tokens=N_TOKENS, do_sample=False, eos_token_id=None
    )[:, -N_TOKENS:]
    assert torch.equal(longer.inputs["input_ids"][:, -N_TOKENS:], expected_ids)
    for name in streams:
        tolerance = 3e-4 * largest_logit(cache[name])
        for step, own in enumerate(steps[name]):
            torch.testing.assert_close(cache[name][:, -N_TOKENS - 1 + step], own, atol=tolerance, rtol=0)
    rows: dict[int, Tensor] = {}
    model.attention_rows(
        longer, longer.token_map.is_answer, lambda layer, own, real: rows.update({layer: own})
    )
    for layer, name in zip(layers, patterns, strict=True):
        for step, own in enumerate(steps[name][1:]):
            n_keys = own.shape[-1]
            end = longer.shape[1] - N_TOKENS + step + 1
            shown = rows[layer][:, :, step]
            if n_keys <= longer.shape[1]:
                # Of the prompt; what cross-attention reads is no position.
                shown = shown[..., end - n_keys : end]
            torch.testing.assert_close(shown, own, atol=1e-4, rtol=0)


def test_each_row_ends_at_its_own_end(micro: mmlens.HookedVLM) -> None:
    examples = mmlens.scene_examples("objects", 6, seed=0)
    prompt = micro.prompt_examples(examples)
    ids = micro.generate(prompt, max_new_tokens=5, do_sample=False)[:, prompt.shape[1] :]
    longer = micro.continue_prompt(prompt, 5, do_sample=False)
    stop = micro.hf_model.generation_config.eos_token_id
    for row, own in enumerate(ids.tolist()):
        kept = own[: own.index(stop)] if stop in own else own
        shown = longer.inputs["input_ids"][row][longer.token_map.is_answer[row]].tolist()
        assert shown == kept
    assert micro.continuations(longer) == micro.answer(prompt, 5, do_sample=False)


def test_what_is_cut_off(micro: mmlens.HookedVLM) -> None:
    ids = torch.tensor([[5, 9, 9], [5, 6, 7], [9, 5, 6], [5, 8, 8], [8, 5, 9]])
    options = {"eos_token_id": [9], "pad_token_id": 8}
    assert before_the_end(micro.hf_model, ids, options).sum(1).tolist() == [1, 3, 0, 1, 2]
    assert before_the_end(micro.hf_model, ids, {"eos_token_id": None, "pad_token_id": None}).all()


def test_an_answer_that_ends_at_once_leaves_the_prompt_as_it_is(micro: mmlens.HookedVLM) -> None:
    prompt = micro.prompt("What colour is K ?")
    first = micro.generate(prompt, max_new_tokens=1, do_sample=False)[0, -1].item()
    assert micro.continue_prompt(prompt, 3, do_sample=False, eos_token_id=first) is prompt
    assert micro.continuations(prompt) == [""]


@torch.no_grad()
def test_hooks_that_are_set_act_while_the_answer_is_made(model: mmlens.HookedVLM) -> None:
    prompt = padded_prompt(model)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    hooks = mmlens.ablate([(0, 0), (1, 1)])(model, prompt)
    with model.hooks(fwd_hooks=hooks):
        under = model.continue_prompt(prompt, **options)
        expected = model.generate(prompt, **options)
    assert torch.equal(under.inputs["input_ids"][:, -3:], expected[:, -3:])


def test_one_answer_for_each_row(micro: mmlens.HookedVLM) -> None:
    prompt = micro.prompt("What colour is K ?")
    with pytest.raises(InvalidTypeError, match="num_return_sequences"):
        micro.continue_prompt(prompt, num_return_sequences=2, do_sample=True)
    with pytest.raises(InvalidTypeError, match="return_dict_in_generate"):
        micro.continue_prompt(prompt, return_dict_in_generate=True)
