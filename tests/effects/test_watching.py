"""What hooks did, by hand: their calls, and the largest change of one element."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tiny import tiny_images, tiny_model, tiny_processor
from torch import Tensor

from mmlens.effects.watching import _largest_change, hook_report, watched
from mmlens.interventions.edits import Edit
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.prompt import Prompt


@functools.cache
def model() -> HookedVLM:
    return HookedVLM(tiny_model("qwen3_vl"), tiny_processor("qwen3_vl"))


def two_prompts() -> Prompt:
    images = [[image] for image in tiny_images(2, seed=5)]
    return model().prompt(["What colour is K?", "Where is the K?"], images=images)


def test_watched_hooks_measure_what_functions_return_or_edit_in_place() -> None:
    prompt = model().prompt(
        ["What colour is K?", "Where is the K?"], images=[[image] for image in tiny_images(2, seed=5)]
    )

    def double(z: Tensor, hook: Any) -> Tensor:
        return z * 2

    def raise_one_element(z: Tensor, hook: Any) -> None:
        z[0, -1, 0, 0] += 0.25

    def in_place_and_returned(z: Tensor, hook: Any) -> Tensor:
        z[0, -1, 0, 0] -= 0.5
        return z

    def read(z: Tensor, hook: Any) -> None:
        return None

    name = "blocks.1.attn.hook_z"
    _, cache = model().run_with_cache(prompt, names_filter=name)
    functions = [raise_one_element, in_place_and_returned, double, read]
    hooks = watched([(name, function) for function in functions])
    plain = model().run_with_hooks(prompt, fwd_hooks=[(name, function) for function in functions])
    under = model().run_with_hooks(prompt, fwd_hooks=[each.hook for each in hooks])
    assert torch.equal(plain, under)
    assert [each.name for each in hooks] == [name] * 4
    assert [each.fired for each in hooks] == [1] * 4
    edited = cache[name].clone()
    edited[0, -1, 0, 0] -= 0.25
    expected = [0.25, 0.5, float(edited.abs().max()), 0.0]
    assert [each.size for each in hooks] == pytest.approx(expected, rel=1e-5)
    model().run_with_hooks(prompt, fwd_hooks=[each.hook for each in hooks])
    assert [each.fired for each in hooks] == [2] * 4


def test_watched_hooks_on_masked_scores_and_half_precision() -> None:
    masked = torch.tensor([-torch.inf, torch.nan, 1.0])
    assert float(_largest_change(masked, masked.clone())) == 0
    assert float(_largest_change(masked, torch.tensor([-torch.inf, torch.nan, 3.5]))) == 2.5
    assert float(_largest_change(masked, torch.tensor([0.0, torch.nan, 1.0]))) == torch.inf
    assert float(_largest_change(masked, torch.tensor([-torch.inf, 0.0, 1.0]))) == torch.inf
    half = torch.tensor([60000.0], dtype=torch.float16)
    assert float(_largest_change(half, -half)) == 2 * float(half)
    exact = torch.tensor([1.0], dtype=torch.float64)
    assert float(_largest_change(exact, exact + 1e-12)) == pytest.approx(1e-12, rel=1e-3)


def test_watched_hooks_by_filter_and_with_another_shape() -> None:
    prompt = model().prompt("What colour is K?", images=tiny_images(1, seed=5))

    def all_z(name: str) -> bool:
        return name.startswith("blocks") and name.endswith("attn.hook_z")

    hooks = watched([(all_z, lambda z, hook: z + 1)])
    model().run_with_hooks(prompt, fwd_hooks=[each.hook for each in hooks])
    assert (hooks[0].name, hooks[0].fired) == ("all_z", model().cfg.n_layers)
    assert hooks[0].size == pytest.approx(1, abs=1e-5)
    bad = watched([("blocks.1.attn.hook_z", lambda z, hook: z[:, :1])])
    with pytest.raises(ValueError, match=r"blocks.1.attn.hook_z gave a tensor \[1, 1, "):
        model().run_with_hooks(prompt, fwd_hooks=[each.hook for each in bad])


@torch.no_grad()
def test_edits_report_themselves_and_only_what_they_did_here() -> None:
    prompt = model().prompt(
        ["What colour is K?", "Where is the K?"], images=[[image] for image in tiny_images(2, seed=5)]
    )
    name = "blocks.1.attn.hook_z"
    _, cache = model().run_with_cache(prompt, names_filter=name)
    edit = Edit(model(), prompt, name, lambda x, here: torch.zeros_like(x), heads=[2])
    first = watched([(name, edit)])
    assert first[0].hook == (name, edit)
    model().run_with_hooks(prompt, fwd_hooks=[first[0].hook])
    size = float(cache[name][:, :, 2].abs().max())
    assert (first[0].fired, first[0].size) == (1, pytest.approx(size))
    second = watched([(name, edit)])
    assert (second[0].fired, second[0].size) == (0, 0.0)
    model().run_with_hooks(prompt, fwd_hooks=[second[0].hook])
    assert (second[0].fired, second[0].size) == (1, pytest.approx(size))


def test_reports_of_prompts_with_different_hooks() -> None:
    found = hook_report([[("a", 1, 2.0), ("a", 1, 0.0), ("b", 1, 1.0)], [("a", 2, 1.0), ("c", 1, 9.0)]])
    assert found.values.tolist() == [["a", 3, 2.0], ["a", 1, 0.0], ["b", 1, 1.0], ["c", 1, 9.0]]
