"""Every mode of head ablation against slow arithmetic on the plain model's own parts."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

import mmlens
from conftest import QUESTION, hooked, padded_prompt, two_image_prompt
from mmlens.data.examples import Example
from mmlens.hooked_vlm import HookNeverFiredError
from mmlens.interventions.ablation import MODES, HeadMeans, mean_activations

HEADS = [(1, 2), (0, 1), (1, 3)]


def examples(n: int, seed: int = 5) -> list[Example]:
    images = tiny.tiny_images(n, seed=seed)
    questions = [QUESTION, "Where is the red square?", "How many objects are there in this picture?"]
    return [
        Example(question=questions[i % 3], answer="seven", images=(images[i],), id=f"e{i}") for i in range(n)
    ]


def reference_of(mode: str, model: mmlens.HookedVLM) -> object:
    if mode in ("mean", "mean_query"):
        return mean_activations(model, examples(3))
    return examples(3) if mode == "resample" else None


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_only_the_named_heads_change(model: mmlens.HookedVLM, mode: str) -> None:
    prompt = padded_prompt(model) if mode != "resample" else model.prompt_examples(examples(2, seed=8))
    names = ["blocks.0.attn.hook_z"]
    _, clean = model.run_with_cache(prompt, names_filter=names)
    intervention = mmlens.ablate([(0, 1)], mode, reference=reference_of(mode, model))
    with model.hooks(fwd_hooks=intervention(model, prompt)):
        _, under = model.run_with_cache(prompt, names_filter=names)
    real = ~prompt.token_map.is_padding
    changed = (under["z", 0] - clean["z", 0]).abs().amax(-1)[real].amax(0)
    others = [head for head in range(model.cfg.n_heads) if head != 1]
    assert changed[1] > 1e-3
    # Leaving the fast path moves a layer's other heads by rounding only.
    assert changed[others].max() < 1e-5


@torch.no_grad()
def test_zero_equals_output_projection_columns_set_to_zero(family: str) -> None:
    model, cut = hooked(family), tiny.tiny_model(family).eval()
    prompt = padded_prompt(model)
    d_head = model.cfg.d_head
    layers = cut.get_decoder().layers
    for layer, head in HEADS:
        layers[layer].self_attn.o_proj.weight[:, head * d_head : (head + 1) * d_head] = 0
    under = model.run_with_hooks(prompt, fwd_hooks=mmlens.ablate(HEADS)(model, prompt))
    torch.testing.assert_close(under, cut(**prompt.inputs).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_uniform_averages_the_values_a_query_may_see(model: mmlens.HookedVLM) -> None:
    """z = mean of v over real keys up to the query; leaky: over every key of the batch's width."""
    prompt = padded_prompt(model)
    group = model.cfg.n_heads // model.cfg.n_key_value_heads
    _, clean = model.run_with_cache(prompt, names_filter="blocks.1.attn.hook_v")
    values = clean["v", 1]
    mask = prompt.inputs["attention_mask"]
    for mode in ("uniform", "uniform_leaky"):
        with model.hooks(fwd_hooks=mmlens.ablate([(1, 2)], mode)(model, prompt)):
            _, under = model.run_with_cache(prompt, names_filter="blocks.1.attn.hook_z")
        for row in range(len(mask)):
            for position in mask[row].nonzero().flatten().tolist():
                seen = mask[row].bool() & (torch.arange(mask.shape[1]) <= position)
                keys = seen if mode == "uniform" else torch.ones_like(seen)
                expected = values[row, keys, 2 // group].mean(0)
                torch.testing.assert_close(under["z", 1][row, position, 2], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_mean_reference_is_the_mean_over_real_positions_of_each_kind(model: mmlens.HookedVLM) -> None:
    reference = mean_activations(model, examples(3), batch_size=2)
    sums: dict[str, list[list[Tensor]]] = {"z": [[], []], "q": [[], []]}
    for example in examples(3):
        prompt = model.prompt(example.question, images=example.images)
        is_image = prompt.token_map.is_image[0]
        _, cache = model.run_with_cache(
            prompt, names_filter=lambda name: name.endswith(("attn.hook_z", "attn.hook_q"))
        )
        for name, kinds in sums.items():
            for kind, mask in enumerate((~is_image, is_image)):
                kinds[kind].append(cache[name, 2][0][mask])
    for name, kinds in sums.items():
        for kind in (0, 1):
            expected = torch.cat(kinds[kind]).mean(0)
            torch.testing.assert_close(getattr(reference, name)[kind, 2], expected, atol=1e-5, rtol=1e-4)
    prompt = padded_prompt(model)
    with model.hooks(fwd_hooks=mmlens.ablate([(2, 3)], "mean", reference=reference)(model, prompt)):
        _, under = model.run_with_cache(prompt, names_filter="blocks.2.attn.hook_z")
    is_image, padding = prompt.token_map.is_image, prompt.token_map.is_padding
    assert (under["z", 2][is_image][:, 3] == reference.z[1, 2, 3]).all()
    assert (under["z", 2][~is_image & ~padding][:, 3] == reference.z[0, 2, 3]).all()
    with model.hooks(fwd_hooks=mmlens.ablate([(2, 3)], "mean_query", reference=reference)(model, prompt)):
        _, under = model.run_with_cache(prompt, names_filter="blocks.2.attn.hook_q")
    assert (under["q", 2][is_image][:, 3] == reference.q[1, 2, 3]).all()


@torch.no_grad()
def test_resample_takes_z_of_another_example_position_by_position() -> None:
    model = hooked("qwen3_vl")
    own, other = examples(1)[0], examples(1, seed=9)[0]
    other = Example(
        question="What colour is the letter Q?",
        answer="x",
        images=(other.images[0].resize(own.images[0].size),),
    )
    prompt = model.prompt_examples([own])
    _, source = model.run_with_cache(model.prompt_examples([other]), names_filter="blocks.1.attn.hook_z")
    with model.hooks(fwd_hooks=mmlens.ablate([(1, 0)], "resample", reference=[own, other])(model, prompt)):
        _, under = model.run_with_cache(prompt, names_filter="blocks.1.attn.hook_z")
    assert source["z", 1].shape == under["z", 1].shape
    assert torch.equal(under["z", 1][:, :, 0], source["z", 1][:, :, 0])
    with pytest.raises(ValueError, match="but the prompt's own"):
        mmlens.ablate([(1, 0)], "resample", reference=[own])(model, prompt)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_generation_with_and_without_cache_agree(mode: str) -> None:
    model = hooked("internvl")
    prompt = model.prompt_examples(examples(2, seed=8))
    intervention = mmlens.ablate(HEADS, mode, reference=reference_of(mode, model))
    clean = model.generate(prompt, max_new_tokens=5, do_sample=False)
    with model.hooks(fwd_hooks=intervention(model, prompt)):
        cached = model.generate(prompt, max_new_tokens=5, do_sample=False)
        uncached = model.generate(prompt, max_new_tokens=5, do_sample=False, use_cache=False)
    # With leaky masking a query sees future keys, which a cached run does not have yet.
    if mode != "uniform_leaky":
        assert torch.equal(cached, uncached)
    assert clean.shape == cached.shape


@torch.no_grad()
def test_positions_restrict_the_edit() -> None:
    model = hooked("llava")
    prompt = padded_prompt(model)
    _, clean = model.run_with_cache(prompt, names_filter="blocks.1.attn.hook_z")
    for positions in (prompt.token_map.is_question, lambda p: p.token_map.is_question):
        hooks = mmlens.ablate([(1, 2)], "zero", positions=positions)(model, prompt)
        with model.hooks(fwd_hooks=hooks):
            _, under = model.run_with_cache(prompt, names_filter="blocks.1.attn.hook_z")
        where = prompt.token_map.is_question
        assert not under["z", 1][where][:, 2].any()
        assert torch.equal(under["z", 1][~where], clean["z", 1][~where])


@torch.no_grad()
def test_composition_is_concatenation() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    both = mmlens.compose(mmlens.ablate([(0, 1)]), mmlens.ablate([(1, 2), (1, 3)]))
    together = mmlens.ablate([(0, 1), (1, 2), (1, 3)])
    assert torch.equal(
        model.run_with_hooks(prompt, fwd_hooks=both(model, prompt)),
        model.run_with_hooks(prompt, fwd_hooks=together(model, prompt)),
    )
    with pytest.raises(ValueError, match="at least one"):
        mmlens.compose()


@torch.no_grad()
def test_bad_ablations_are_errors() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    with pytest.raises(ValueError, match=r"'zeros'; the nearest: 'zero'"):
        mmlens.ablate([(0, 0)], "zeros")
    with pytest.raises(IndexError, match=r"head \(3, 0\).*3 layers"):
        mmlens.ablate([(3, 0)])(model, prompt)
    with pytest.raises(IndexError, match=r"head \(0, 4\)"):
        mmlens.ablate([(0, 4)])(model, prompt)
    with pytest.raises(ValueError, match="no heads"):
        mmlens.ablate([])(model, prompt)
    with pytest.raises(ValueError, match=r"needs reference=mean_activations"):
        mmlens.ablate([(0, 0)], "mean")
    with pytest.raises(ValueError, match="examples to draw from"):
        mmlens.ablate([(0, 0)], "resample", reference=[])
    with pytest.raises(ValueError, match="takes no reference"):
        mmlens.ablate([(0, 0)], "zero", reference=examples(1))
    with pytest.raises(ValueError, match=r"boolean mask \[batch, pos\]"):
        mmlens.ablate([(0, 0)], positions=torch.ones(1, 2, dtype=torch.bool))(model, prompt)
    with pytest.raises(ValueError, match="no position"):
        mmlens.ablate([(0, 0)], positions=torch.zeros_like(prompt.token_map.is_image))(model, prompt)
    wrong = HeadMeans(torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1), 1)
    with pytest.raises(ValueError, match="this model needs"):
        mmlens.ablate([(0, 0)], "mean", reference=wrong)(model, prompt)
    text_only = mean_activations(model, [Example(question="What?", answer="x")])
    with pytest.raises(ValueError, match="examples without any"):
        mmlens.ablate([(0, 0)], "mean", reference=text_only)(model, prompt)
    with pytest.raises(ValueError, match="empty list"):
        mean_activations(model, [])


@torch.no_grad()
def test_an_ablation_that_never_fires_is_an_error() -> None:
    """A hook set on a layer that the forward does not reach: here, a model whose later layers were removed."""
    model = hooked("llava")
    prompt = two_image_prompt(model)
    hooks = mmlens.ablate([(2, 0)])(model, prompt)
    model.hf_model.get_submodule("model.language_model").layers = model.hf_model.model.language_model.layers[
        :2
    ]
    model.hf_model.config.get_text_config().num_hidden_layers = 2
    with pytest.raises(HookNeverFiredError, match=r"blocks.2.attn.hook_z"):
        model.run_with_hooks(prompt, fwd_hooks=hooks)
