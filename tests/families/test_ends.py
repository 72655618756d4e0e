"""Where the stacks end: what ln_final reads, and which vision layers reach the features."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from tiny.base import redraw
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from mmlens.effects.sweeps import sweep
from mmlens.interventions.ablation import ablate
from mmlens.metrics.outcomes import logit_difference_of
from mmlens.model.hooked_vlm import HookedVLM


def _with_deepstack_to_the_end(family: str) -> PreTrainedModel:
    """As many levels of DeepStack as there are language layers, and one more, which transformers drops."""
    config = tiny.tiny_config(family)
    n = config.text_config.num_hidden_layers
    config.vision_config.depth = n + 1
    config.vision_config.deepstack_visual_indexes = list(range(n + 1))
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    redraw(model, seed=0)
    return model.eval()


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe", "cosmos3_omni"])
@torch.no_grad()
def test_deepstack_behind_the_last_layer_has_its_hook_and_its_part(family: str) -> None:
    """Against what the plain model's own final norm is given."""
    plain = _with_deepstack_to_the_end(family)
    inputs = tiny.tiny_inputs(family, (2, 1))
    given: list[Tensor] = []
    final_norm = plain.get_decoder().norm
    handle = final_norm.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    expected = plain(**inputs).logits
    handle.remove()
    model = HookedVLM(plain)
    last = model.cfg.n_layers - 1
    assert [name for name in model.hook_dict if name.startswith("blocks.") and "deepstack" in name] == [
        f"blocks.{layer}.hook_deepstack" for layer in range(last + 1)
    ]
    assert torch.equal(model(inputs), expected)
    logits, cache = model.run_with_cache(inputs)
    assert torch.equal(logits, expected) or torch.allclose(logits, expected, atol=1e-5)
    gained = cache.unpacked(f"blocks.{last}.hook_deepstack")
    assert gained.abs().max() > 0.1
    torch.testing.assert_close(cache["resid_post", last] + gained, given[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache.decompose_resid().sum(0), given[0], atol=1e-4, rtol=1e-4)
    # Written, it reaches the logits at image positions, and no others.
    written = model.run_with_hooks(
        inputs, fwd_hooks=[(f"blocks.{last}.hook_deepstack", lambda x, hook: x * 0)]
    )
    changed = (written - expected).abs().amax(-1) > 1e-4
    assert torch.equal(changed, model.image_mask(inputs))


@pytest.mark.parametrize("family", ["qwen3_vl"])
def test_sweeps_are_exact_where_deepstack_goes_to_the_end(family: str) -> None:
    model = HookedVLM(_with_deepstack_to_the_end(family), tiny.tiny_processor(family))
    prompt = model.prompt("What colour is K?", images=tiny.tiny_images(2))
    interventions = {f"{layer}.{head}": ablate([(layer, head)]) for layer in range(3) for head in (0, 3)}
    metric = logit_difference_of(model, 5, 6)
    table = sweep(model, [prompt], interventions, metric).set_index("intervention")["value"]
    with torch.no_grad():
        for label, intervention in interventions.items():
            alone = model.run_with_hooks(prompt, fwd_hooks=list(intervention(model, prompt)))[0, -1]
            assert table[label] == pytest.approx(float(alone[5] - alone[6]), abs=1e-4)


@torch.no_grad()
def test_the_vision_layers_of_granite_that_no_projector_reads_have_no_hook_points() -> None:
    """Edits there would move nothing; `vision_feature_layer` says nothing in this family."""
    config = tiny.tiny_config("granite4_vision")
    config.vision_config.num_hidden_layers = 5
    config.deepstack_layer_map = [[1, 0], [-3, 1]]
    config.spatial_vision_layer, config.spatial_target_layers = 2, [2]
    plain = AutoModelForImageTextToText.from_config(config)
    redraw(plain, seed=0)
    model = HookedVLM(plain.eval())
    # Hidden state -3 of six is what the third layer gives.
    assert len(model.anatomy.stacks["vision."]) == 3 and len(model.anatomy.unread) == 2
    inputs = tiny.tiny_inputs("granite4_vision", (1,))
    clean = model(inputs)
    unread: Any = model.anatomy.unread[0]
    handle = unread.register_forward_hook(lambda module, args, out: out * 0)
    assert torch.equal(model(inputs), clean)
    handle.remove()
    moved = model.run_with_hooks(
        inputs, fwd_hooks=[("vision.blocks.2.hook_resid_post", lambda x, hook: x * 0)]
    )
    assert not torch.equal(moved, clean)


@torch.no_grad()
def test_the_tower_s_patterns_are_stacked_in_the_order_of_the_images() -> None:
    """Nemotron's tower attends once per image; transformers lays the same patterns out as blocks of one matrix."""
    plain = tiny.tiny_model("nemotron_h_omni", attn_implementation="eager")
    inputs = tiny.tiny_inputs("nemotron_h_omni", (2, 1))
    given = {name: inputs[name] for name in ("pixel_values", "image_grid_hw")}
    expected = plain.get_image_features(**given, output_attentions=True, return_dict=True).attentions
    model = HookedVLM(plain)
    lengths = inputs["image_grid_hw"].prod(-1)
    # Each image has the tower's own few tokens in front of its patches.
    lengths = lengths + (expected[0].shape[-1] - int(lengths.sum())) // len(lengths)
    for layer, matrix in enumerate(expected):
        name = f"vision.blocks.{layer}.attn.hook_pattern"
        _, cache = model.run_with_cache(inputs, names_filter=name)
        start = 0
        for image, length in enumerate(lengths.tolist()):
            own = matrix[0, :, start : start + length, start : start + length]
            assert torch.equal(cache[name][image, :, :length, :length], own)
            assert not cache[name][image, :, length:].any()
            start += length
