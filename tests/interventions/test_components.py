"""Components: what each way of writing one means, on every family, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from tiny.wrapped import hooked
from torch import Tensor

import mmlens
from mmlens.interventions.components import component, components
from mmlens.model.hooks import UnknownHookError

WAYS = {
    (1, 2): ("L1H2", ("blocks.1.attn.hook_z",)),
    (1, "attn"): ("L1 attn", ("blocks.1.hook_attn_out",)),
    (1, "mlp"): ("L1 mlp", ("blocks.1.hook_mlp_out",)),
    (1, "layer"): ("L1", ("blocks.1.hook_attn_out", "blocks.1.hook_mlp_out")),
    (1, "mlp", 95): ("L1 mlp 95", ("blocks.1.mlp.hook_post",)),
    ("vision", 0, 3): ("vision L0H3", ("vision.blocks.0.attn.hook_z",)),
    ("vision", 2, "attn"): ("vision L2 attn", ("vision.blocks.2.hook_attn_out",)),
    ("vision", 2, "mlp"): ("vision L2 mlp", ("vision.blocks.2.hook_mlp_out",)),
    ("vision", 2, "layer"): ("vision L2", ("vision.blocks.2.hook_attn_out", "vision.blocks.2.hook_mlp_out")),
}


def test_every_way_of_writing_a_component() -> None:
    model = hooked("llava")
    found = {spec: component(model, spec) for spec in WAYS}
    assert {spec: (part.label, part.hooks) for spec, part in found.items()} == WAYS
    neuron, head = found[(1, "mlp", 95)], found["vision", 0, 3]
    assert (neuron.part, neuron.layer, neuron.index, neuron.axis, neuron.size) == ("post", 1, 95, -1, 96)
    assert (head.part, head.stack, head.index, head.axis, head.size) == ("z", "vision.", 3, -2, 4)
    assert component(model, "image").hooks == ("image.hook_embed",)
    deep = ("image.hook_embed", "blocks.0.hook_deepstack", "blocks.1.hook_deepstack")
    assert component(hooked("qwen3_vl"), "image").hooks == deep


def test_lists_of_components() -> None:
    model = hooked("llava")
    mixed = [(0, 1), "image", (0, "mlp"), ("vision", 0, 0)]
    assert [part.label for part in components(model, mixed)] == ["L0H1", "image", "L0 mlp", "vision L0H0"]
    assert [part.label for part in components(model, "image")] == ["image"]
    heads = mmlens.HeadSet([(2, 1), (0, 3)], grid=(3, 4))
    for given in (heads, [(2, 1), (0, 3)], np.array([[2, 1], [0, 3]]), torch.tensor([[2, 1], [0, 3]])):
        assert [part.label for part in components(model, given)] == ["L2H1", "L0H3"]


def test_what_is_no_component_is_an_error() -> None:
    model = hooked("llava")
    for spec, error, message in (
        ((3, 0), IndexError, r"head \(3, 0\): layer 3 is out of range; the model has 3 layers"),
        ((0, 4), IndexError, r"head \(0, 4\)"),
        ((3, "mlp"), IndexError, r"layer 3 is out of range; the model has 3 layers \(0 to 2\)"),
        ((-1, "mlp"), IndexError, r"layer -1 is out of range"),
        ((0, "mlp", 96), IndexError, r"neuron 96 is out of range; .* has 96 neurons \(0 to 95\)"),
        ((0, "mlp", -1), IndexError, r"neuron -1 is out of range"),
        (("vision", 3, 0), IndexError, r"layer 3 is out of range; its vision stack has 3 layers"),
        (("vision", 0, 4), IndexError, r"head 4 is out of range; .* has 4 heads"),
        ((0, "mlps"), ValueError, r"'mlps'; the nearest: 'mlp'"),
        ((0, "z"), ValueError, r"component \(0, 'z'\) of a layer, 'z'"),
        (("vison", 0, 0), ValueError, r"'vison'; the nearest: 'vision'"),
        ("images", ValueError, r"no component 'images'; components are a list"),
        ((0, "attn", 1), TypeError, r"a neuron is \(layer, 'mlp', neuron\)"),
        ((0, 1, 2), TypeError, r"a neuron is"),
        ((0, "mlp", 1.0), TypeError, r"a neuron is"),
        ((0,), TypeError, r"a component is \(layer, head\)"),
        ((), TypeError, r"a component is \(layer, head\)"),
        (("vision", "mlp"), TypeError, r"a component is"),
        ((True, "mlp"), TypeError, r"a component is"),
        ((0, 1.5), TypeError, r"a component is"),
        (("vision", 0, 1.5), TypeError, r"a component is"),
        (("vision", 0, "mlp", 3), UnknownHookError, r"only language layers have hook points at neurons"),
    ):
        with pytest.raises(error, match=message):
            component(model, spec)
    for given, error, message in (
        ([], ValueError, r"no heads or other components given"),
        ([(0, 1), (0, 1)], ValueError, r"named once.*L0H1, L0H1"),
        ([(0, "layer"), (0, "mlp")], ValueError, r"named once.*L0, L0 mlp"),
        ((3, "mlp"), TypeError, r"components are a list of .*; 3 is none of them"),
    ):
        with pytest.raises(error, match=message):
            components(model, given)


def test_components_that_a_family_does_not_have_are_refused_with_the_reason() -> None:
    for family, spec, message in (
        ("mllama", "image", "cross-attention reads the images: no position of the prompt is one"),
        ("gemma4", "image", "projected from the embeddings themselves"),
        ("fuyu", ("vision", 0, 0), "its vision side is one projection"),
        ("lfm3_vl", ("vision", 0, 0), "its short convolution layers have no softmax attention"),
        ("nemotron_h_omni", (0, "mlp"), "each of its layers is one norm and one mixer"),
        ("nemotron_h_omni", (0, "mlp", 0), "the layer has no MLP"),
        ("aria", (0, "mlp", 0), "AriaTextMoELayer, not one layer of neurons"),
    ):
        model = mmlens.HookedVLM(tiny.tiny_model(family))
        with pytest.raises(UnknownHookError, match=f"{family} has no component .*{message}"):
            component(model, spec)
    nemotron = mmlens.HookedVLM(tiny.tiny_model("nemotron_h_omni"))
    assert component(nemotron, (0, "layer")).hooks == ("blocks.0.hook_attn_out",)


@torch.no_grad()
@pytest.mark.parametrize("family", ("llava", "qwen3_vl", "granite4_vision", "idefics3", "internvl", "fuyu"))
def test_the_image_component_is_all_that_the_language_model_gets_of_the_images(family: str) -> None:
    """With the component at zero, pixels no longer matter; without it they do."""
    model = hooked(family)
    images = tiny.tiny_images(1, seed=0) + tiny.tiny_images(1, seed=1)
    prompts = [model.prompt("Where is it?", images=[image]) for image in images]
    names = component(model, "image").hooks

    def zero(x: Tensor, hook: object) -> Tensor:
        return torch.zeros_like(x)

    clean = [model(prompt) for prompt in prompts]
    without = [model.run_with_hooks(prompt, fwd_hooks=[(name, zero) for name in names]) for prompt in prompts]
    assert (clean[0] - clean[1]).abs().max() > 0.1
    torch.testing.assert_close(*without, atol=1e-5, rtol=1e-5)
