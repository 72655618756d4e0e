"""HookedVLM against the plain Hugging Face model, for every supported family."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from tiny.wrapped import hooked, padded_prompt, two_image_prompt
from torch import Tensor
from transformer_lens import ActivationCache

import mmlens
from mmlens.errors import PromptError
from mmlens.model.hooks import HookNeverFiredError, UnknownHookError

INSIDE_SOFTMAX = ("hook_attn_scores", "hook_pattern")


@torch.no_grad()
def test_encoding_images_once_changes_no_bit(model: mmlens.HookedVLM) -> None:
    for prompt in (two_image_prompt(model), padded_prompt(model)):
        encoded = model.encode_images(prompt)
        assert not any(value.is_floating_point() for value in encoded.inputs.values())
        for _ in range(2):
            assert torch.equal(model(encoded), model(prompt))
        zero = [("blocks.1.attn.hook_z", lambda z, hook: z * 0)]
        assert torch.equal(
            model.run_with_hooks(encoded, fwd_hooks=zero), model.run_with_hooks(prompt, fwd_hooks=zero)
        )
        with pytest.raises(HookNeverFiredError, match="vision"):
            model.run_with_hooks(encoded, fwd_hooks=[("vision.blocks.0.hook_resid_pre", lambda x, hook: x)])
    text_only = model.prompt("What is it?")
    assert model.encode_images(text_only) is text_only


@torch.no_grad()
def test_eager_reads_scores_and_patterns_bit_equal(family: str) -> None:
    model = hooked(family, attn_implementation="eager")
    prompt = padded_prompt(model)
    clean = model(prompt)
    logits, cache = model.run_with_cache(prompt)
    assert torch.equal(logits, clean)
    reference = model.hf_model(**prompt.inputs, output_attentions=True).attentions
    for layer, pattern in enumerate(reference):
        assert torch.equal(cache["pattern", layer], pattern)


@torch.no_grad()
def test_cached_activations_have_the_values_of_the_plain_model(model: mmlens.HookedVLM) -> None:
    prompt = padded_prompt(model)
    logits, cache = model.run_with_cache(prompt, names_filter=lambda name: True)
    assert isinstance(cache, ActivationCache)
    assert set(cache.cache_dict) == set(model.hook_dict)
    cfg = model.cfg
    mask, real = prompt.token_map.is_image, ~prompt.token_map.is_padding
    for layer in range(cfg.n_layers):
        for name in ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post"):
            full, packed = cache[f"blocks.{layer}.{name}"], cache[f"blocks.{layer}.image.{name}"]
            assert torch.equal(full[mask], packed)
        assert torch.equal(cache["z", layer][mask], cache[f"blocks.{layer}.image.hook_z"])
        mid = cache["resid_pre", layer] + cache["attn_out", layer]
        torch.testing.assert_close(mid, cache["resid_mid", layer])
        post = cache["resid_mid", layer] + cache["mlp_out", layer]
        torch.testing.assert_close(post, cache["resid_post", layer])
        torch.testing.assert_close(
            cache["result", layer].sum(2), cache["attn_out", layer], atol=2e-5, rtol=1e-4
        )
        # Padding may attend to nothing: under SDPA its rows are zero.
        rows = real[:, None, :, None]
        torch.testing.assert_close(
            cache["pattern", layer].sum(-1, keepdim=True), rows.expand(-1, cfg.n_heads, -1, -1).float()
        )
        torch.testing.assert_close(cache["attn_scores", layer].softmax(-1) * rows, cache["pattern", layer])
    # Hidden states of the plain model, before each layer.
    hidden = model.hf_model(**prompt.inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(logits, model(prompt), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cache["embed"], hidden[0], atol=1e-4, rtol=1e-4)
    for layer in range(cfg.n_layers - 1):
        torch.testing.assert_close(cache["resid_post", layer], hidden[layer + 1], atol=1e-4, rtol=1e-4)
    assert torch.equal(cache["embed"], cache["resid_pre", 0])
    assert torch.equal(cache["embed"][mask], cache["image.hook_embed"])
    _, subset = model.run_with_cache(prompt, names_filter=["blocks.0.hook_resid_pre", "blocks.1.attn.hook_z"])
    assert set(subset.cache_dict) == {"blocks.0.hook_resid_pre", "blocks.1.attn.hook_z"}


@torch.no_grad()
def test_deep_injection_is_what_separates_a_layer_from_the_next() -> None:
    model = hooked("qwen3_vl")
    prompt = two_image_prompt(model)
    _, cache = model.run_with_cache(prompt)
    for layer in (0, 1):
        jump = cache["resid_pre", layer + 1] - cache["resid_post", layer]
        mask = prompt.token_map.is_image
        torch.testing.assert_close(jump[mask], cache[f"blocks.{layer}.hook_deepstack"], atol=1e-5, rtol=1e-4)
        assert not jump[~mask].any()
        # The stream's gain is a difference of two sums, the merger's output was one of the terms.
        torch.testing.assert_close(
            cache[f"vision.deepstack.{layer}.hook_out"],
            cache[f"blocks.{layer}.hook_deepstack"],
            atol=1e-5,
            rtol=1e-5,
        )


@torch.no_grad()
def test_resid_mid_reaches_mlp_and_stream(model: mmlens.HookedVLM) -> None:
    """Against the layer's own arithmetic: x' + MLP(norm(x')), for an edit by value and one in place."""
    prompt = two_image_prompt(model)
    layer = model.anatomy.language[1].module
    _, cache = model.run_with_cache(prompt, names_filter="blocks.1.hook_resid_mid")
    edited = cache["resid_mid", 1].clone()
    edited[:, -1] *= -2
    expected = edited + layer.mlp(layer.post_attention_layernorm(edited))

    def in_place(x: Tensor, hook: object) -> Tensor:
        x[:, -1] *= -2
        return x

    for edit in (lambda x, hook: edited, in_place):
        with model.hooks(fwd_hooks=[("blocks.1.hook_resid_mid", edit)]):
            _, under = model.run_with_cache(prompt, names_filter="blocks.1.hook_resid_post")
        torch.testing.assert_close(under["resid_post", 1], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_branch_inputs_do_not_touch_the_stream(model: mmlens.HookedVLM) -> None:
    prompt = two_image_prompt(model)
    names = [
        "blocks.1.hook_resid_pre",
        "blocks.1.hook_resid_mid",
        "blocks.1.hook_attn_out",
        "blocks.1.hook_mlp_out",
    ]
    _, clean = model.run_with_cache(prompt, names_filter=names)

    def zero_in_place(x: Tensor, hook: object) -> Tensor:
        return x.mul_(0)

    with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_in", zero_in_place)]):
        _, under = model.run_with_cache(prompt, names_filter=names)
    assert torch.equal(under["resid_mid", 1], clean["resid_mid", 1])
    assert not torch.equal(under["mlp_out", 1], clean["mlp_out", 1])
    with model.hooks(fwd_hooks=[("blocks.1.hook_attn_in", zero_in_place)]):
        _, under = model.run_with_cache(prompt, names_filter=names)
    assert torch.equal(under["resid_pre", 1], clean["resid_pre", 1])
    assert not torch.equal(under["attn_out", 1], clean["attn_out", 1])


def test_an_edit_of_v_stays_in_the_key_value_cache() -> None:
    model = hooked("qwen3_vl")
    prompt = two_image_prompt(model)

    def edit(v: Tensor, hook: object) -> Tensor:
        return v.roll(1, -1)

    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_v", edit)]):
        cached = model.generate(prompt, max_new_tokens=6, do_sample=False)
        uncached = model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, uncached)


def test_backward_hooks_see_the_gradient() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    grads = {}

    def save(grad: Tensor, hook: object) -> None:
        grads[hook.name] = grad.clone()

    with model.hooks(bwd_hooks=[("blocks.2.hook_resid_mid", save), ("blocks.2.hook_resid_post", save)]):
        model(prompt)[0, -1, 0].backward()
    # The stream passes the gradient on and the MLP adds its own.
    assert grads["blocks.2.hook_resid_mid"].abs().sum() > 0
    assert not torch.equal(grads["blocks.2.hook_resid_mid"], grads["blocks.2.hook_resid_post"])


@torch.no_grad()
def test_bad_hooks_are_errors() -> None:
    model = hooked("qwen3_vl")
    prompt = two_image_prompt(model)
    with pytest.raises(
        UnknownHookError, match=r"'blocks.0.attn.hook_Z'; the nearest: 'blocks.0.attn.hook_z'"
    ):
        model.run_with_hooks(prompt, fwd_hooks=[("blocks.0.attn.hook_Z", lambda x, hook: x)])
    with pytest.raises(UnknownHookError, match="blocks.7.attn.hook_z"):
        model.run_with_cache(prompt, names_filter="blocks.7.attn.hook_z")
    with pytest.raises(UnknownHookError, match="matches none"):
        model.run_with_hooks(prompt, fwd_hooks=[(lambda name: "nothing" in name, lambda x, hook: x)])
    with pytest.raises(UnknownHookError):
        model.add_hook("blocks.0.hook_resid", lambda x, hook: x)
    text_only = model.prompt("What is it?")
    with pytest.raises(HookNeverFiredError, match="blocks.0.image.hook_z"):
        model.run_with_hooks(text_only, fwd_hooks=[("blocks.0.image.hook_z", lambda x, hook: x)])
    with pytest.raises(HookNeverFiredError, match="projector"):
        model.run_with_cache(text_only, names_filter="projector.hook_out")
    _, cache = model.run_with_cache(text_only)
    assert "blocks.0.hook_resid_pre" in cache and "image.hook_embed" not in cache
    with pytest.raises(TypeError, match="Prompt"):
        model("What is it?")
    with pytest.raises(ValueError, match="return_type"):
        model(prompt, return_type="predictions")


def test_patterns_of_other_attention_kernels_are_refused() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    layer = model.hf_model.model.language_model.layers[1].self_attn
    layer.config = copy.copy(layer.config)
    layer.config._attn_implementation_internal = "flex_attention"
    for run in (
        lambda: model.run_with_hooks(prompt, fwd_hooks=[("blocks.1.attn.hook_pattern", lambda x, hook: x)]),
        lambda: mmlens.scores.vision_mass(model, prompt),
    ):
        with pytest.raises(
            NotImplementedError, match="'flex_attention'.*load the model with attn_implementation='sdpa'"
        ):
            run()


def test_generation_from_right_padding_is_refused() -> None:
    model = hooked("llava")
    prompt = padded_prompt(model)
    flipped = {**prompt.inputs, "attention_mask": prompt.inputs["attention_mask"].flip(1)}
    with pytest.raises(PromptError, match="example 1 is padded on the right"):
        model.generate(flipped, max_new_tokens=1)


def test_a_missing_processor_is_an_error() -> None:
    with pytest.raises(ValueError, match="no processor"):
        mmlens.HookedVLM(tiny.tiny_model("llava")).prompt("What?")


@torch.no_grad()
def test_cache_stays_true_when_another_hook_edits_in_place() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    _, clean = model.run_with_cache(prompt, names_filter="blocks.0.hook_resid_post")

    def zero(x: Tensor, hook: object) -> Tensor:
        x[:] = 0
        return x

    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", zero)]):
        _, cache = model.run_with_cache(prompt, names_filter="blocks.0.hook_resid_post")
    assert torch.equal(cache["resid_post", 0], clean["resid_post", 0])


@torch.no_grad()
def test_vision_layers_behind_the_features_have_no_hook_points() -> None:
    """LLaVA takes its features before the tower's last layers; what comes after reaches no logit."""
    plain = tiny.tiny_model("llava").eval()
    plain.config.vision_feature_layer = -2
    model = mmlens.HookedVLM(plain, tiny.tiny_processor("llava"))
    blocks = {name.split(".")[2] for name in model.hook_dict if name.startswith("vision.blocks.")}
    assert blocks == {"0", "1"}
    prompt = two_image_prompt(model)
    clean = model(prompt)
    under = model.run_with_hooks(
        prompt, fwd_hooks=[("vision.blocks.1.hook_resid_post", lambda x, hook: x.roll(1, 1))]
    )
    assert (under - clean).abs().max() > 1e-3


@torch.no_grad()
def test_vision_attention_called_per_image_is_stacked_in_the_cache() -> None:
    model = hooked("qwen3_vl")
    prompt = model.prompt("What?", images=tiny.tiny_images(2, seed=0, sizes=[(32, 32), (64, 32)]))
    patches = prompt.inputs["image_grid_thw"].prod(-1).tolist()
    assert patches[0] < patches[1]
    _, cache = model.run_with_cache(prompt)
    pattern = cache["vision.blocks.0.attn.hook_pattern"]
    assert pattern.shape == (2, 4, max(patches), max(patches))
    assert not pattern[0, :, patches[0] :].any() and not pattern[0, :, :, patches[0] :].any()
    torch.testing.assert_close(pattern[0, :, : patches[0]].sum(-1), torch.ones(4, patches[0]))
    assert cache["vision.blocks.0.attn.hook_attn_scores"][0, 0, 0, -1] == float("-inf")
    # Each image's pattern is what the image has alone.
    alone = model.prompt("What?", images=prompt.images[0][:1])
    _, single = model.run_with_cache(alone)
    torch.testing.assert_close(
        pattern[:1, :, : patches[0], : patches[0]], single["vision.blocks.0.attn.hook_pattern"]
    )


@torch.no_grad()
def test_a_gate_of_zero_is_read_exactly_and_refuses_edits() -> None:
    plain = tiny.tiny_model("mllama")
    model = mmlens.HookedVLM(plain)
    model.anatomy.language[1].module.cross_attn_attn_gate.zero_()
    inputs = tiny.tiny_inputs("mllama")
    clean = model(inputs)
    for hook in ("attn.hook_result", "hook_attn_out"):
        name = f"blocks.1.{hook}"
        assert torch.equal(model.run_with_hooks(inputs, fwd_hooks=[(name, lambda x, hook: x)]), clean)
        with pytest.raises(ValueError, match="a gate of exactly 0"):
            model.run_with_hooks(inputs, fwd_hooks=[(name, lambda x, hook: x + 1)])


@torch.no_grad()
def test_a_name_given_twice_is_cached_once() -> None:
    model, name = hooked("llava"), "blocks.1.attn.hook_z"
    prompt = padded_prompt(model)
    _, once = model.run_with_cache(prompt, names_filter=[name])
    _, twice = model.run_with_cache(prompt, names_filter=[name, name])
    assert list(twice) == [name] and torch.equal(once[name], twice[name])


@pytest.mark.parametrize("role", ["q", "k", "v"])
def test_what_heads_read_has_a_gradient(role: str) -> None:
    """A backward hook sees the derivative of the logits, known by finite differences; the logits change by no bit."""
    model = hooked("qwen2_5_vl")
    inputs, head, name = padded_prompt(model).inputs, 1, f"blocks.1.attn.hook_{role}_input"
    seen: list[Tensor] = []

    def save(gradient: Tensor, hook: object) -> None:
        seen.append(gradient)

    clean = model(inputs)
    with model.hooks(bwd_hooks=[(name, save)]):
        logits = model(inputs)
        logits[:, -1, 5].sum().backward()
    model.hf_model.zero_grad(set_to_none=True)
    assert torch.equal(logits, clean)
    direction = torch.randn(seen[0].shape, generator=torch.Generator().manual_seed(0))
    direction[:, :, [i for i in range(direction.shape[2]) if i != head]] = 0

    @torch.no_grad()
    def slope(step: float) -> Tensor:
        ends = [
            model.run_with_hooks(inputs, fwd_hooks=[(name, lambda x, hook, part=part: x + part * direction)])
            for part in (step, -step)
        ]
        return (ends[0] - ends[1])[:, -1, 5].sum() / (2 * step)

    # Of two widths, exact to the fourth order.
    exact = (4 * slope(0.01) - slope(0.02)) / 3
    torch.testing.assert_close((seen[0] * direction).sum(), exact, rtol=1e-2, atol=1e-4)
    assert exact.abs() > 1e-2
