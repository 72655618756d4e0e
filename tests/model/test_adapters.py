"""Models with an adapter: whatever is read, measured or edited is that of the model with the adapter merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny.wrapped import two_image_prompt
from torch import Tensor, nn

import mmlens
from mmlens.errors import StateError, UnsupportedError
from mmlens.model.adapters import AdapterError
from mmlens.model.loading import load
from mmlens.model.weights import NoWeightError

peft = pytest.importorskip("peft", exc_type=ImportError)

pytestmark = [
    # PEFT reads a property of transformers' that is renamed, and warns of the configurations that are tried here.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


def lora(**changes: Any) -> Any:
    options = {"r": 4, "lora_alpha": 2, "target_modules": ALL_LINEAR, "init_lora_weights": False, **changes}
    return peft.LoraConfig(**options)


KINDS: dict[str, Callable[[], Any]] = {
    "LoRA": lora,
    "rank patterns, rsLoRA": lambda: lora(
        rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 9}, use_rslora=True
    ),
    "DoRA": lambda: lora(use_dora=True),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=ALL_LINEAR, init_weights=False),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    ),
    "whole modules": lambda: lora(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    "embedding": lambda: lora(target_modules=["embed_tokens", "q_proj"]),
    "tower and projector": lambda: lora(
        target_modules=r".*vision.*(q_proj|fc1)|.*projector.*linear_\d|.*o_proj"
    ),
}


def adapted(config: Any, *, family: str = "llava", seed: int = 7) -> Any:
    torch.manual_seed(seed)
    model = peft.get_peft_model(tiny.tiny_model(family), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Some kinds begin at nothing, and copies of whole modules as they were.
            if "modules_to_save" in name or "ia3" in name or ("lora_B" in name and "bias" in name):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def nudge(x: Tensor, hook: Any) -> Tensor:
    x = x.clone()
    x[:, -1, 1] += 1
    return x


def close(given: Any, expected: Any) -> None:
    torch.testing.assert_close(given, expected, atol=2e-4, rtol=2e-4, equal_nan=True)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_weights_runs_and_hooks_are_the_merged_models(kind: str) -> None:
    processor = tiny.tiny_processor("llava")
    model = mmlens.HookedVLM(adapted(KINDS[kind]()), processor)
    merged = mmlens.HookedVLM(adapted(KINDS[kind]()).merge_and_unload(), processor)
    plain = mmlens.HookedVLM(tiny.tiny_model("llava"), processor)
    prompt = two_image_prompt(model)
    assert not torch.allclose(model(prompt), plain(prompt), atol=1e-3)
    close(model(prompt), merged(prompt))
    assert model.hook_dict.keys() == merged.hook_dict.keys()
    _, cache = model.run_with_cache(prompt, names_filter=lambda name: True)
    _, expected = merged.run_with_cache(prompt, names_filter=lambda name: True)
    assert cache.keys() == expected.keys()
    for name in expected:
        close(cache[name], expected[name])
    for name in (
        "W_Q",
        "W_K",
        "W_V",
        "W_O",
        "W_in",
        "W_gate",
        "W_out",
        "W_E",
        "W_U",
        "b_Q",
        "b_V",
        "b_O",
        "b_out",
    ):
        close(getattr(model, name), getattr(merged, name))
    close(cache.stack_head_results(), expected.stack_head_results())
    close(
        cache.get_full_resid_decomposition(pos_slice=-1), expected.get_full_resid_decomposition(pos_slice=-1)
    )
    for role in "qkv":
        hooks = [(f"blocks.1.attn.hook_{role}_input", nudge)]
        close(model.run_with_hooks(prompt, fwd_hooks=hooks), merged.run_with_hooks(prompt, fwd_hooks=hooks))
    hooks = [(f"blocks.{layer}.attn.hook_z", lambda x, hook: x * 0) for layer in range(model.cfg.n_layers)]
    close(model.run_with_hooks(prompt, fwd_hooks=hooks), merged.run_with_hooks(prompt, fwd_hooks=hooks))


def test_attribution_and_scores_are_the_merged_models() -> None:
    examples = mmlens.scene_examples("documents", 3, seed=0)

    def wrapped(merge: bool) -> mmlens.HookedVLM:
        hf_model, processor = load("micro")
        torch.manual_seed(0)
        config = lora(target_modules=ALL_LINEAR[:-1], lora_alpha=1)
        model = peft.get_peft_model(hf_model, config).eval()
        return mmlens.HookedVLM(model.merge_and_unload() if merge else model, processor)

    model, merged = wrapped(merge=False), wrapped(merge=True)
    prompt = merged.prompt_examples(examples)
    blank = mmlens.interventions.blank_region(mmlens.interventions.evidence_of(examples))
    edges, expected = (
        mmlens.attribution.attribute_edges(m, prompt, blank, mmlens.logit_difference).scores
        for m in (model, merged)
    )
    close(edges.nan_to_num(0), expected.nan_to_num(0))
    for score in (mmlens.ram, mmlens.scores.logit_contribution):
        close(*(score(m, examples, progress=False).per_example for m in (model, merged)))


@torch.no_grad()
def test_several_adapters_and_none() -> None:
    """What counts is which adapters are active now, also after the model was wrapped."""
    outer = adapted(lora())
    torch.manual_seed(8)
    outer.add_adapter("second", lora(target_modules=["o_proj"]))
    outer.eval()
    model = mmlens.HookedVLM(outer)
    base = mmlens.HookedVLM(tiny.tiny_model("llava"))
    o_proj = model.blocks[0].parts.attention.out

    def delta(name: str) -> Tensor:
        return o_proj.get_delta_weight(name)

    def w_o() -> Tensor:
        return model.blocks[0].attn.W_O.flatten(0, 1).T

    plain = base.blocks[0].attn.W_O.flatten(0, 1).T
    close(w_o(), plain + delta("default"))
    outer.base_model.set_adapter(["default", "second"])
    close(w_o(), plain + delta("default") + delta("second"))
    with outer.disable_adapter():
        assert torch.equal(w_o(), plain)
    outer.base_model.set_adapter("second")
    outer.merge_adapter()
    close(w_o(), plain + delta("second"))


@torch.no_grad()
def test_adapters_put_into_the_model_without_a_wrapper() -> None:
    torch.manual_seed(7)
    inside = peft.inject_adapter_in_model(lora(target_modules=["o_proj"]), tiny.tiny_model("llava")).eval()
    model = mmlens.HookedVLM(inside)
    layer = inside.model.language_model.layers[1].self_attn.o_proj
    close(model.W_O[1].flatten(0, 1).T, layer.base_layer.weight + layer.get_delta_weight("default"))


def test_the_wrapper_is_taken_off() -> None:
    outer = adapted(lora())
    assert mmlens.HookedVLM(outer).hf_model is outer.get_base_model()
    inner = adapted(lora()).base_model
    assert mmlens.HookedVLM(inner).hf_model is inner.model


def test_adapters_that_are_not_in_the_modules_are_refused() -> None:
    model = tiny.tiny_model("llava")
    model.config.num_attention_heads, model.config.hidden_size = 4, 64
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, num_layers=3, token_dim=64, num_attention_heads=4
    )
    with pytest.raises(UnsupportedError, match="acts in PEFT's wrapper"):
        mmlens.HookedVLM(peft.get_peft_model(model, config))


def test_weights_under_an_adapters_active_dropout_are_an_error() -> None:
    model = mmlens.HookedVLM(adapted(lora(lora_dropout=0.1)))
    model.train()
    with pytest.raises(StateError, match=r"W_O cannot be read while .* dropout is active: call model.eval"):
        model.W_O  # noqa: B018
    model.eval()
    assert model.W_O.isfinite().all()
    # Without dropout, training mode changes no weight.
    still = mmlens.HookedVLM(adapted(lora()))
    expected = still.W_O
    still.train()
    assert torch.equal(still.W_O, expected)


def test_a_module_that_is_not_linear_has_no_weight() -> None:
    class Bent(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    model = mmlens.HookedVLM(tiny.tiny_model("llava"))
    out = model.blocks[0].parts.attention.out
    out.__class__ = Bent
    with pytest.raises(
        NoWeightError, match=r"blocks.0.attn.W_O cannot be read: Bent does more than multiply"
    ):
        model.blocks[0].attn.W_O  # noqa: B018


# ---------------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base, processor = tmp_path / "base", tiny.tiny_processor("llava")
    tiny.tiny_model("llava").save_pretrained(base)
    processor.save_pretrained(base)
    outer = adapted(lora(modules_to_save=["multi_modal_projector"]))
    outer.peft_config["default"].base_model_name_or_path = str(base)
    outer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@torch.no_grad()
def test_a_folder_with_an_adapter_loads_with_its_base(folder: Path) -> None:
    model = mmlens.HookedVLM.from_pretrained(str(folder), dtype=torch.float32)
    config = lora(modules_to_save=["multi_modal_projector"])
    merged = mmlens.HookedVLM(adapted(config).merge_and_unload(), tiny.tiny_processor("llava"))
    prompt = two_image_prompt(model)
    close(model(prompt), merged(prompt))
    close(model.W_Q, merged.W_Q)
    assert not any(module.training for module in model.hf_model.modules())


def test_an_adapter_that_does_not_fit_is_an_error(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(name for name in tensors if "lora_B" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, file)
    with pytest.raises(AdapterError, match="1 of its tensors are missing"):
        mmlens.HookedVLM.from_pretrained(str(folder))
    save_file({**tensors, "base_model.model.elsewhere.lora_A.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(AdapterError, match="1 fit nothing"):
        mmlens.HookedVLM.from_pretrained(str(folder))


def test_an_adapter_folder_that_cannot_be_loaded_says_why(folder: Path) -> None:
    config = folder / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace(str(folder.parent / "base"), str(folder.parent / "gone")))
    with pytest.raises(
        mmlens.model.loading.ModelNotFoundError, match=r"holds an adapter of .*gone.*there is no folder"
    ):
        mmlens.HookedVLM.from_pretrained(str(folder))
    config.write_text('{"peft_type": "LORA"}')
    with pytest.raises(AdapterError, match="names no base model"):
        mmlens.HookedVLM.from_pretrained(str(folder))
    config.write_text(text)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="safetensors only"):
        mmlens.HookedVLM.from_pretrained(str(folder))
