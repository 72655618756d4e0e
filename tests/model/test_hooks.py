"""Hooks are counted by one function, wherever they are looked at; those that never fired are one error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny.wrapped import hooked, two_image_prompt

from mmlens.effects.watching import watched
from mmlens.interventions.ablation import ablate
from mmlens.model.checked_hooks import CheckedHook
from mmlens.model.hooks import HookNeverFiredError, check_fired, hooks_in


def test_what_never_fired_is_named_five_at_most() -> None:
    check_fired([])
    names = [f"blocks.{layer}.image.hook_z" for layer in range(7)]
    with pytest.raises(
        HookNeverFiredError, match=r"^blocks.0.image.hook_z, .*blocks.4.image.hook_z and 2 more"
    ):
        check_fired(names)
    with pytest.raises(
        HookNeverFiredError, match=r"^blocks.6.image.hook_z never fired in the source's run\."
    ):
        check_fired(names[6:], "the source's run")


@torch.no_grad()
def test_every_account_of_a_hook_has_the_calls_of_its_module() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    attention = model.anatomy.language[1].attention
    assert attention is not None
    calls: list[None] = []
    handle = attention.out.register_forward_hook(lambda module, args, output: calls.append(None))
    ((name, edit),) = ablate([(1, 0)])(model, prompt)
    own = watched([(name, edit), (name, lambda z, hook: z * 2)])
    checked = CheckedHook(lambda z, hook: None)
    # A hook point takes a checked hook as it is.
    model.hook_dict[name].add_hook(checked)
    try:
        with model.hooks(fwd_hooks=[each.hook for each in own]):
            model.generate(prompt, max_new_tokens=3, do_sample=False)
    finally:
        handle.remove()
        model.reset_hooks()
    assert len(calls) == 3
    assert [edit.fired, checked.fired, *(each.fired for each in own)] == [3] * 4
    assert own[0].size == edit.size > 0


@pytest.mark.parametrize("given", ["hook_embed", [("hook_embed", 3)], [("hook_embed", lambda z: z)], 7])
def test_what_is_no_list_of_hooks_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match="fwd_hooks"):
        hooks_in("fwd_hooks", given)
