"""Weights in TransformerLens' shapes, against what the model's own modules compute with them."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny.wrapped import hooked, two_image_prompt
from torch import Tensor
from transformers.activations import ACT2FN

import mmlens
from mmlens.model.taps import norm_arithmetic
from mmlens.model.weights import NoWeightError

FUSED, GATED, LATENT, SHARED_WIDTHS = "fuyu", "qwen3_5", "kimi_k25", "gemma4_unified"


def cached(family: str, n_images: int = 1) -> tuple[mmlens.HookedVLM, dict[str, Tensor]]:
    model = mmlens.HookedVLM(tiny.tiny_model(family))
    with torch.no_grad():
        _, cache = model.run_with_cache(**tiny.tiny_inputs(family, [n_images]))
    return model, cache.cache_dict


def shares_memory(view: Tensor, parameter: Tensor) -> bool:
    return view.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()


@torch.no_grad()
@pytest.mark.parametrize("family", [*tiny.REPRESENTATIVES, FUSED, GATED])
def test_projections_are_what_their_matrices_say(family: str) -> None:
    """hook_q = x W_Q + b_Q and so on, where x is rebuilt from hook_normalized and the norm's own gain and bias."""
    model, cache = cached(family)
    for layer in model.attention_layers:
        block = model.blocks[layer]
        x = cache[f"blocks.{layer}.ln1.hook_normalized"]
        gain = norm_arithmetic(block.ln1, x.shape[-1], x)[0]
        bias = getattr(block.ln1, "bias", None)
        x = x * gain + (0.0 if bias is None else bias)
        for role in "QKV":
            weight, bias = getattr(block.attn, f"W_{role}"), getattr(block.attn, f"b_{role}")
            expected = cache[f"blocks.{layer}.attn.hook_{role.lower()}"]
            assert weight.shape == (expected.shape[2], model.cfg.d_model, expected.shape[3])
            assert shares_memory(weight, block.parts.attention.projections[role.lower()].module.weight)
            projected = torch.einsum("bpm,hmd->bphd", x, weight) + bias
            torch.testing.assert_close(projected, expected, atol=1e-4, rtol=1e-4)
        z, out = cache[f"blocks.{layer}.attn.hook_z"], cache[f"blocks.{layer}.hook_attn_out"]
        assert shares_memory(block.attn.W_O, block.parts.attention.out.weight)
        torch.testing.assert_close(
            torch.einsum("bphd,hdm->bpm", z, block.attn.W_O) + block.attn.b_O, out, atol=1e-4, rtol=1e-4
        )


@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["llava", "internvl", "qwen3_vl", "glm4v", "lfm2_vl", FUSED, "cosmos3_edge"]
)
def test_mlp_weights_rebuild_the_mlp(family: str) -> None:
    """Separate, fused (glm4v), differently named (lfm2_vl) and ungated (fuyu, cosmos3_edge) ones."""
    model = mmlens.HookedVLM(tiny.tiny_model(family))
    text = model.hf_model.config.get_text_config()
    act = ACT2FN[getattr(text, "hidden_act", None) or "silu"]
    parts, mlp = model.anatomy.language[0], model.blocks[0].mlp
    x = torch.randn(2, 5, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    hidden = x @ mlp.W_in + mlp.b_in
    hidden = act(x @ mlp.W_gate) * hidden if mlp.is_gated else act(hidden)
    module = parts.mlp_out
    torch.testing.assert_close(hidden @ mlp.W_out + mlp.b_out, module(x), atol=1e-5, rtol=1e-4)
    assert model.cfg.gated_mlp == mlp.is_gated == (family not in (FUSED, "cosmos3_edge"))
    assert shares_memory(mlp.W_in, next(p for p in module.parameters() if shares_memory(mlp.W_in, p)))
    if mlp.is_gated:
        assert (
            model.W_gate.shape == model.W_in.shape == (model.cfg.n_layers, model.cfg.d_model, len(mlp.W_out))
        )
    else:
        assert model.W_gate is None
        with pytest.raises(NoWeightError, match="blocks.0.mlp has no W_gate"):
            mlp.W_gate  # noqa: B018


@torch.no_grad()
def test_stacked_weights_and_circuits(model: mmlens.HookedVLM) -> None:
    cfg = model.cfg
    n_layers, n_heads, n_kv = cfg.n_layers, cfg.n_heads, cfg.n_key_value_heads
    assert n_kv < n_heads
    assert model.W_Q.shape == (n_layers, n_heads, cfg.d_model, cfg.d_head)
    assert model.W_K.shape == model.W_V.shape == (n_layers, n_kv, cfg.d_model, cfg.d_head)
    assert model.W_O.shape == (n_layers, n_heads, cfg.d_head, cfg.d_model)
    assert model.b_Q.shape == (n_layers, n_heads, cfg.d_head)
    assert model.b_K.shape == model.b_V.shape == (n_layers, n_kv, cfg.d_head)
    assert model.b_O.shape == model.b_out.shape == (n_layers, cfg.d_model)
    assert model.W_E.shape == (len(model.embed.weight), cfg.d_model)
    assert model.W_U.shape == (cfg.d_model, len(model.b_U))
    assert shares_memory(model.W_U, model.hf_model.get_output_embeddings().weight)
    qk, ov = model.QK.AB, model.OV.AB
    for layer in range(n_layers):
        attn = model.blocks[layer].attn
        for head in range(n_heads):
            kv = head // (n_heads // n_kv)
            torch.testing.assert_close(qk[layer, head], attn.W_Q[head] @ attn.W_K[kv].T)
            torch.testing.assert_close(ov[layer, head], attn.W_V[kv] @ attn.W_O[head])
    assert model.all_head_labels[n_heads + 1] == "L1H1" and len(model.all_head_labels) == n_layers * n_heads


@torch.no_grad()
def test_a_head_reads_the_key_value_head_that_OV_gives_it(model: mmlens.HookedVLM) -> None:
    """Patterns times what OV makes of each position is what the head writes: the pairing under grouped queries."""
    prompt = two_image_prompt(model)
    _, cache = model.run_with_cache(prompt, names_filter=lambda name: name.startswith("blocks.1."))
    attn = model.blocks[1].attn
    x = cache["blocks.1.ln1.hook_normalized"]
    x = x * norm_arithmetic(model.blocks[1].ln1, x.shape[-1], x)[0]
    written = torch.einsum("bpm,hmn->bhpn", x, model.OV.AB[1])
    bias = attn.b_V.repeat_interleave(len(attn.W_O) // len(attn.b_V), dim=0)
    written = written + torch.einsum("hd,hdm->hm", bias, attn.W_O)[:, None]
    expected = torch.einsum("bhqk,bhkm->bqhm", cache["pattern", 1], written)
    torch.testing.assert_close(cache["result", 1], expected, atol=1e-4, rtol=1e-4)


def test_views_edit_the_model() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    with torch.no_grad():
        zeroed = model.run_with_hooks(
            prompt,
            fwd_hooks=[("blocks.1.attn.hook_q", lambda q, hook: q * torch.tensor([1.0, 0, 1, 1])[:, None])],
        )
        assert not torch.equal(model(prompt), zeroed)
        model.blocks[1].attn.W_Q[1] = 0
        torch.testing.assert_close(model(prompt), zeroed, atol=1e-5, rtol=1e-5)


def test_tied_embeddings_share_memory() -> None:
    model = hooked("llava")
    assert not shares_memory(model.W_U, model.W_E)
    model.hf_model.get_output_embeddings().weight = model.hf_model.get_input_embeddings().weight
    assert shares_memory(model.W_U, model.W_E)
    assert torch.equal(model.W_U, model.W_E.T) and not model.b_U.any()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "gemma3", "paligemma", "cohere2_vision", FUSED])
def test_residual_directions_give_the_logits(family: str) -> None:
    """RMSNorm, RMSNorm with its weight stored less one, LayerNorm without and with bias (kept in the constant)."""
    model, cache = cached(family)
    logits = model.unembed(model.ln_final(cache[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"]))
    ids = torch.tensor([[3, 8], [5, 1]])
    directions = model.residual_directions(ids)
    assert directions.shape == (2, 2, model.cfg.d_model)
    made = torch.einsum("bpm,ijm->bpij", cache["ln_final.hook_normalized"], directions)
    constant = logits[..., ids] - made
    torch.testing.assert_close(constant, constant[:, :1].expand_as(constant), atol=1e-4, rtol=1e-4)
    # Where norm and unembedding have no bias there is no constant.
    if family != FUSED:
        torch.testing.assert_close(made, logits[..., ids], atol=1e-4, rtol=1e-4)


def test_kinds_of_norm_are_told_apart() -> None:
    kinds = {family: hooked_config(family) for family in ("llava", "gemma3", "cohere2_vision", FUSED)}
    assert kinds == {
        "llava": ("RMS", True), "gemma3": ("RMS", True), "cohere2_vision": ("LN", False), FUSED: ("LN", False),
    }  # fmt: skip


def hooked_config(family: str) -> tuple[str, bool]:
    cfg = mmlens.HookedVLM(tiny.tiny_model(family)).cfg
    return cfg.normalization_type, cfg.final_rms


def test_what_a_family_does_not_have_is_an_error() -> None:
    latent = mmlens.HookedVLM(tiny.tiny_model(LATENT))
    for weight in ("W_Q", "W_K", "W_V"):
        with pytest.raises(NoWeightError, match="latent attention .* from a normalized latent of"):
            getattr(latent, weight)
    assert latent.W_O.shape[1:3] == (latent.cfg.n_heads, latent.cfg.d_head)
    hybrid = mmlens.HookedVLM(tiny.tiny_model(GATED))
    absent = set(range(hybrid.cfg.n_layers)) - set(hybrid.attention_layers)
    with pytest.raises(NoWeightError, match=f"blocks.{min(absent)} has no softmax attention: its mixer is"):
        hybrid.W_K  # noqa: B018
    experts = mmlens.HookedVLM(tiny.tiny_model("aria"))
    with pytest.raises(NoWeightError, match="blocks.0.mlp has no W_in: AriaTextMoELayer is made of router"):
        experts.W_in  # noqa: B018
    uneven = mmlens.HookedVLM(tiny.tiny_model(SHARED_WIDTHS))
    with pytest.raises(
        NoWeightError, match=r"attn.W_Q of the layers cannot be stacked.*model.blocks\[l\].attn.W_Q"
    ):
        uneven.W_Q  # noqa: B018
    assert uneven.blocks[0].attn.W_Q.shape != uneven.blocks[-1].attn.W_Q.shape


@torch.no_grad()
def test_accumulated_bias() -> None:
    model = mmlens.HookedVLM(tiny.tiny_model(FUSED))
    attn = [layer.attention.out.bias for layer in model.anatomy.language]
    mlp = [layer.mlp_out.dense_4h_to_h.bias for layer in model.anatomy.language]
    assert all(bias.any() for bias in [*attn, *mlp])
    torch.testing.assert_close(model.accumulated_bias(2), attn[0] + mlp[0] + attn[1] + mlp[1])
    torch.testing.assert_close(model.accumulated_bias(1, mlp_input=True), attn[0] + mlp[0] + attn[1])
    torch.testing.assert_close(model.accumulated_bias(2, include_mlp_biases=False), attn[0] + attn[1])
    assert not hooked("llava").accumulated_bias(3).any()
