"""Logit contributions against the plain model's output projections, value by value and in sum to the logit."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from tiny import tiny_images, tiny_model, tiny_processor

import mmlens
from mmlens.data.examples import Evidence, Example
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.scores.logits import logit_contribution, position_contributions


@functools.cache
def hooked(family: str) -> HookedVLM:
    return HookedVLM(tiny_model(family), tiny_processor(family))


def examples_of() -> list[Example]:
    a, b, c, d = tiny_images(4, seed=3)
    return [
        Example("What colour is the letter K?", "red", (a,), (Evidence(0, (8, 8, 40, 40)),), id="a"),
        Example("Which page?", "two", (b, c), (Evidence(1),), id="b"),
        Example("Where is it, and what else?", "left", (d,), (Evidence(0, (0, 0, 9, 9)),), id="c"),
    ]


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight / torch.sqrt((x * x).mean() + eps)


@torch.no_grad()
def by_positions(family: str, example: Example) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """phi [layer, head, pos] of the plain Qwen3-VL or LLaVA with plain hooks, the evidence and the visual tokens."""
    hf_model = tiny_model(family, attn_implementation="eager")
    prompt = hooked(family).prompt_examples([example])
    language = hf_model.model.language_model
    values, finals = [], []
    handles = [
        layer.self_attn.v_proj.register_forward_hook(lambda m, i, out: values.append(out[0]))
        for layer in language.layers
    ]
    handles.append(language.norm.register_forward_hook(lambda m, i, out: finals.append(i[0][0, -1])))
    attentions = hf_model(**prompt.inputs, output_attentions=True).attentions
    for handle in handles:
        handle.remove()
    norm = language.norm
    u = hf_model.lm_head.weight[int(prompt.answer_ids[0])] * rms(
        finals[0], norm.weight, norm.variance_epsilon
    )
    n_heads = attentions[0].shape[1]
    phi = []
    for layer, value, pattern in zip(language.layers, values, attentions, strict=True):
        d_head = layer.self_attn.head_dim
        per_kv = value.view(len(value), -1, d_head)
        n_shared = n_heads // per_kv.shape[1]
        of_layer = []
        for head in range(n_heads):
            w_o = layer.self_attn.o_proj.weight[:, head * d_head : (head + 1) * d_head]
            written = per_kv[:, head // n_shared] @ w_o.T  # [pos, d_model]
            of_layer.append(pattern[0, head, -1] * (written @ u))
        phi.append(torch.stack(of_layer))
    return torch.stack(phi), prompt.token_map.evidence([example])[0], prompt.token_map.is_image[0]


@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_contributions_of_positions_by_plain_hooks(family: str) -> None:
    model, examples = hooked(family), examples_of()
    given = {
        off: logit_contribution(model, examples, off_evidence=off, batch_size=2, progress=False)
        for off in ("all", None)
    }
    visual = logit_contribution(model, examples[:1], off_evidence="visual", progress=False)
    for index, example in enumerate(examples):
        phi, evidence, is_image = by_positions(family, example)
        on = phi[:, :, evidence].sum(-1)
        np.testing.assert_allclose(given[None].per_example[index], on, atol=2e-5)
        off = phi[:, :, ~evidence].mean(-1) * int(evidence.sum())
        np.testing.assert_allclose(given["all"].per_example[index], on - off, atol=2e-5)
        if index == 0:
            off = phi[:, :, is_image & ~evidence].mean(-1) * int(evidence.sum())
            np.testing.assert_allclose(visual.per_example[0], on - off, atol=2e-5)


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision", "internvl", "gemma3"])
def test_all_positions_and_layers_sum_to_what_attention_adds_to_the_logit(family: str) -> None:
    """The answer's logit with all attention outputs taken out of the final stream, norm frozen (Gemma norms after)."""
    model = hooked(family)
    prompt = model.prompt_examples(examples_of())
    whole = position_contributions(model, prompt, (~prompt.token_map.is_padding).float()).sum((1, 2))
    with torch.no_grad():
        _, cache = model.run_with_cache(prompt)
    added = sum(cache["attn_out", layer][:, -1] for layer in range(model.cfg.n_layers))
    assert isinstance(added, torch.Tensor)
    scale = cache["ln_final.hook_scale"][:, -1]
    u = model.residual_directions(prompt.answer_ids)
    if model.blocks[0].attn.b_O.any():
        added = added - sum(block.attn.b_O for block in model.blocks)
    expected = (added / scale * u).sum(-1)
    torch.testing.assert_close(whole, expected, atol=2e-4, rtol=1e-3)


def test_raw_direction_is_the_frozen_one_without_the_norm() -> None:
    """With a final norm of equal gain, frozen = gain x raw / scale, example by example."""
    model = HookedVLM(tiny_model("qwen3_vl"), tiny_processor("qwen3_vl"))
    assert model.ln_final is not None
    with torch.no_grad():
        model.ln_final.weight.fill_(1.7)
    examples = examples_of()
    frozen = logit_contribution(model, examples, progress=False).per_example
    raw = logit_contribution(model, examples, final_norm="none", progress=False).per_example
    for index, example in enumerate(examples):
        with torch.no_grad():
            _, cache = model.run_with_cache(
                model.prompt_examples([example]), names_filter="blocks.2.hook_resid_post"
            )
        stream = cache["resid_post", 2][0, -1]
        scale = torch.sqrt((stream**2).mean() + model.ln_final.variance_epsilon)
        torch.testing.assert_close(frozen[index], raw[index] * 1.7 / scale, atol=1e-5, rtol=1e-4)


def test_a_head_that_writes_nothing_scores_nothing() -> None:
    model = HookedVLM(tiny_model("qwen3_vl"), tiny_processor("qwen3_vl"))
    with torch.no_grad():
        model.blocks[1].attn.W_O[2] = 0.0
    scores = logit_contribution(model, examples_of(), progress=False)
    assert not scores.per_example[:, 1, 2].any()
    assert bool(scores.per_example[:, 1, 1].all())


def test_outputs_that_are_no_pattern_times_values_are_refused() -> None:
    """A hook that halves z stands for a gate between attention and output projection."""
    model = hooked("qwen3_vl")
    with (
        model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: z * 0.5)]),
        pytest.raises(
            ValueError, match=r"blocks.1.attn: its heads' output is not their pattern times hook_v"
        ),
    ):
        logit_contribution(model, examples_of(), progress=False)


def test_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    model, examples = hooked("qwen3_vl"), examples_of()
    with pytest.raises(ValueError, match="there is no final_norm 'freeze'.*'frozen'"):
        logit_contribution(model, examples, final_norm="freeze")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no off_evidence 'image'"):
        logit_contribution(model, examples, off_evidence="image")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="have no evidence"):
        logit_contribution(model, [Example("Which?", "K")])
    whole = Example("Where?", "K", tuple(tiny_images(1, seed=0)), (Evidence(0),))
    with pytest.raises(ValueError, match=r"batch row\(s\) \[0\] have no such position"):
        logit_contribution(model, [whole], off_evidence="visual", progress=False)
    with pytest.raises(ValueError, match="carries no answers"):
        prompt = model.prompt("Where?", [whole.images[0]])
        position_contributions(model, prompt, torch.ones(prompt.shape))


def test_micro_half_precision_agrees() -> None:
    examples = mmlens.scene_examples("objects", 3, seed=1)
    exact = logit_contribution(HookedVLM.from_pretrained("micro"), examples, progress=False)
    half = HookedVLM.from_pretrained("micro", dtype=torch.bfloat16)
    assert logit_contribution(half, examples, progress=False).spearman(exact) > 0.9
