"""The one list of hook points is what the models have, no more and no less."""

from __future__ import annotations

import re

from mmlens import HookedVLM
from mmlens.arguments import unknown_name_message
from mmlens.hook_names import BLOCK_HOOKS, BLOCK_IMAGE_HOOKS, MODEL_HOOKS, block

OPTIONAL = re.compile(
    r"vision\.ln_post|vision\.deepstack|blocks\.{l}\.(hook_deepstack|ln\d_post|mlp\.|attn\.hook_._input)"
)


def documented() -> set[str]:
    names = {block(0, hook).replace(".0.", ".{l}.") for hook in (*BLOCK_HOOKS, *BLOCK_IMAGE_HOOKS)}
    return names | {f"vision.blocks.{{l}}.{hook}" for hook in BLOCK_HOOKS} | set(MODEL_HOOKS)


def test_every_hook_point_is_documented_and_every_documented_one_exists(model: HookedVLM) -> None:
    present = {
        re.sub(r"deepstack\.\d+", "deepstack.{i}", re.sub(r"blocks\.\d+", "blocks.{l}", name))
        for name in model.hook_dict
    }
    assert present <= documented()
    assert all(OPTIONAL.search(name) for name in documented() - present)
    if model.family.model_type == "qwen3_vl":
        assert {"blocks.{l}.hook_deepstack", "vision.deepstack.{i}.hook_out"} <= present
    if model.family.model_type in ("idefics3", "smolvlm"):
        assert "vision.ln_post.hook_normalized" in present


def test_a_name_like_no_other_gets_examples() -> None:
    assert (
        unknown_name_message("mode", "xyzzy", ["zero", "mean"])
        == "there is no mode 'xyzzy'; there are: 'zero', 'mean'"
    )
