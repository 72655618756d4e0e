"""TransformerBridge beside HookedVLM: weights taken over, activations compared, and where the two differ.

Every family for which TransformerLens has a working adapter is compared name by name and value by value. A hook
point that is not equal stands in DIFFERENCES with its reason, and the difference itself is asserted, so that the
table cannot outlive a fix.
"""

from __future__ import annotations

import functools
import inspect
import logging
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

import pytest
import tiny
import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge, supported_architectures
from transformer_lens.model_bridge.sources._hf_format import determine_architecture_from_hf_config
from transformer_lens.model_bridge.sources.transformers import helpers, source
from transformer_lens.tools.analysis.attribution_patching import attribution_patch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast
from transformers.utils import is_torchvision_available

import mmlens
from mmlens.model.bridge import BridgeError

REBUILT = (
    "llava",
    "llava_onevision",
    "llava_next",
    "idefics3",
    "mistral3",
    "gemma3",
    "shieldgemma2",
    "emu3",
    "qwen3_5",
    "qwen3_5_moe",
)
"""Families whose language attention the bridge computes itself: its hooks inside the softmax take edits."""

DELEGATED = (
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "glm4v",
    "llama4",
    "muse_glimmer",
    "gemma4",
    "gemma4_unified",
)
"""Families whose language attention the bridge leaves to Hugging Face's module and only watches."""

FAMILIES = REBUILT + DELEGATED
GATED = ("qwen3_5", "qwen3_5_moe")
MROPE = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v")
UNWRAPPED_NORMS = ("muse_glimmer", "gemma4", "gemma4_unified")
NO_ADAPTER = (
    "internvl",
    "qwen2_vl",
    "paligemma",
    "smolvlm",
    "idefics2",
    "mllama",
    "aya_vision",
    "chameleon",
)


@dataclass(frozen=True)
class Difference:
    """A hook point at which the bridge does not give what mmlens and TransformerLens' own definition give."""

    hook: str
    families: tuple[str, ...]
    kind: str
    """ "absent": the bridge has no such name. "silent": it never fires. "other": it fires with other values."""
    reason: str


DIFFERENCES = (
    Difference("hook_embed", FAMILIES, "other", "fires before the image features are scattered in"),
    Difference("blocks.*.attn.hook_attn_scores", DELEGATED, "other", "holds the pattern, after the softmax"),
    Difference("blocks.*.attn.hook_rot_[qk]", DELEGATED, "silent", "rotation happens inside HF's module"),
    Difference("blocks.*.attn.hook_q", GATED, "other", "holds the queries' gates too: twice the heads"),
    Difference("blocks.0.hook_attn_out", GATED, "absent", "a linear-attention layer has no such name"),
    Difference("blocks.*.hook_deepstack", ("qwen3_vl", "qwen3_vl_moe"), "absent", "mmlens' own name"),
    Difference("blocks.*.ln*.hook_*", UNWRAPPED_NORMS, "absent", "norms are not opened"),
    Difference("ln_final.hook_*", UNWRAPPED_NORMS, "absent", "norms are not opened"),
)

OPTIONAL = ("attn.hook_result", "hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")
"""Fire in the bridge after a switch only, which changes its arithmetic; they have tests of their own."""


# ---------------------------------------------------------------------- bridges of tiny models


@pytest.fixture(autouse=True, scope="module")
def _offline() -> Iterator[None]:
    """Nothing is looked up on the hub, and nothing is installed: a bridge without its processor runs pip."""
    level = logging.getLogger("transformers").level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(helpers, "_ensure_torchvision", lambda: False)
        patch.setattr(source, "load_modality_processor", lambda *args, **kwargs: None)
        for name in supported_architectures.__all__:
            adapter = getattr(supported_architectures, name)
            if "torchvision" in getattr(adapter, "required_libraries", ()):
                patch.setattr(adapter, "required_libraries", [])
        yield
    logging.getLogger("transformers").setLevel(level)


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    words = models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="w0", eos_token="w0")


def bridge_over(model: Any) -> TransformerBridge:
    model.config.architectures = [type(model).__name__]
    tokenizer = word_tokenizer(model.config.get_text_config().vocab_size)
    return TransformerBridge.boot_transformers(
        model.config.model_type, hf_model=model, tokenizer=tokenizer, device="cpu", dtype=model.dtype
    )


@dataclass(frozen=True)
class Pair:
    """A bridge, two HookedVLMs on its weights, and one prompt of two images (as the bridge takes its inputs)."""

    family: str
    bridge: TransformerBridge
    model: mmlens.HookedVLM
    eager: mmlens.HookedVLM
    inputs: dict[str, Tensor]

    @property
    def ids(self) -> Tensor:
        return self.inputs["input_ids"]

    @property
    def rest(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.inputs.items() if name != "input_ids"}

    @property
    def images(self) -> Tensor:
        mask = self.model.image_mask(self.inputs)
        assert mask is not None and mask.any() and not mask.all()
        return mask


@functools.cache
def pair(family: str) -> Pair:
    bridge = bridge_over(plain(family, "eager"))
    return Pair(
        family,
        bridge,
        mmlens.from_bridge(bridge),
        mmlens.from_bridge(bridge, attn_implementation="eager"),
        tiny.tiny_inputs(family, [2]),
    )


def gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def zero(activation: Tensor, hook: Any) -> Tensor:
    return torch.zeros_like(activation)


def plain(family: str, attention: str) -> Any:
    return tiny.tiny_model(family, attn_implementation=attention)


# ---------------------------------------------------------------------- from_bridge


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_model_from_a_bridge_is_the_plain_sdpa_model_on_the_bridges_own_tensors(family: str) -> None:
    bridge = bridge_over(tiny.tiny_model(family))
    inputs = tiny.tiny_inputs(family, [2, 1])
    ids, rest = inputs["input_ids"], {name: v for name, v in inputs.items() if name != "input_ids"}
    before = bridge(ids, **rest)
    forced = bridge.original_model.config._attn_implementation
    model = mmlens.from_bridge(bridge)
    reference = plain(family, "sdpa")
    assert torch.equal(model(inputs), reference(**inputs).logits)
    assert list(model.hf_model.state_dict()) == list(reference.state_dict())
    assert model.hf_model.config._attn_implementation == "sdpa"
    assert not any(module.training for module in model.hf_model.modules())
    for kind in ("parameters", "buffers"):
        bridges = {id(tensor) for tensor in getattr(bridge.original_model, kind)()}
        assert all(id(tensor) in bridges for tensor in getattr(model.hf_model, kind)())
    pointers = {tensor.data_ptr() for tensor in bridge.original_model.parameters()}
    assert all(tensor.data_ptr() in pointers for tensor in model.hf_model.parameters())
    # The bridge is as it was, and its hooks work beside ours.
    assert bridge.original_model.config._attn_implementation == forced
    assert torch.equal(bridge(ids, **rest), before)
    name = f"blocks.{model.attention_layers[0]}.attn.hook_z"
    assert gap(bridge.run_with_hooks(ids, fwd_hooks=[(name, zero)], **rest), before) > 0.1


@torch.no_grad()
def test_hooks_stay_on_their_own_side() -> None:
    this = pair("llava")
    clean, bridge_clean = this.model(this.inputs), this.bridge(this.ids, **this.rest)
    with this.bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_z", zero)]):
        assert torch.equal(this.model(this.inputs), clean)
        assert torch.equal(mmlens.from_bridge(this.bridge)(this.inputs), clean)
    with this.model.hooks([("blocks.0.attn.hook_z", zero)]):
        assert torch.equal(this.bridge(this.ids, **this.rest), bridge_clean)
        assert gap(this.model(this.inputs), clean) > 0.1


@torch.no_grad()
def test_half_precision_and_training_mode_are_the_bridges() -> None:
    hf_model = tiny.tiny_model("llava").to(torch.bfloat16)
    assert hf_model.config.dtype == torch.float32
    bridge = bridge_over(hf_model.train())
    model = mmlens.from_bridge(bridge)
    assert model.hf_model.dtype == model.hf_model.config.dtype == torch.bfloat16
    assert all(module.training for module in model.hf_model.modules())
    inputs = tiny.cast(tiny.tiny_inputs("llava", [2]), torch.bfloat16)
    reference = tiny.tiny_model("llava").to(torch.bfloat16)
    assert torch.equal(model(inputs), reference(**inputs).logits)


def test_gradients_and_edits_of_weights_reach_the_bridge() -> None:
    bridge = bridge_over(tiny.tiny_model("llava"))
    model = mmlens.from_bridge(bridge)
    inputs = tiny.tiny_inputs("llava", [1])
    model(inputs).sum().backward()
    weight = bridge.original_model.get_parameter("lm_head._original_component.weight")
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    with torch.no_grad():
        weight.zero_()
        assert not model(inputs).any()


def test_a_bridge_booted_from_a_folder_brings_its_processor(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_model = tiny.tiny_model("llava")
    hf_model.config.architectures = ["LlavaForConditionalGeneration"]
    hf_model.save_pretrained(tmp_path)
    tiny.tiny_processor("llava").save_pretrained(tmp_path)
    monkeypatch.setattr(source, "load_modality_processor", helpers.load_modality_processor)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), device="cpu")
    # The bridge asks for attention outputs, which SDPA cannot give.
    assert bridge.original_model.config.output_attentions
    model = mmlens.from_bridge(bridge)
    assert model.processor is bridge.processor
    prompt = model.prompt("Where?", images=tiny.tiny_images(2))
    with torch.no_grad():
        assert torch.equal(model(prompt), hf_model(**prompt.inputs).logits)
    # With them asked for, transformers would not write this model's configuration.
    model.hf_model.save_pretrained(tmp_path / "again")


def test_a_bridge_without_processor_gives_its_tokenizer_and_a_processor_can_be_given() -> None:
    bridge = pair("llava").bridge
    model = mmlens.from_bridge(bridge)
    assert model.to_text(torch.tensor([[3]])) == ["w3"]
    with pytest.raises(ValueError, match="has no processor"):
        model.prompt("Where?")
    processor = tiny.tiny_processor("llava")
    assert mmlens.from_bridge(bridge, processor).prompt("Where?").questions == ["Where?"]


def test_something_else_than_a_bridge_is_refused() -> None:
    with pytest.raises(TypeError, match="takes a TransformerBridge, not a LlavaForConditionalGeneration"):
        mmlens.from_bridge(tiny.tiny_model("llava"))


def test_a_text_only_bridge_is_refused() -> None:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with pytest.raises(BridgeError, match="LlamaForCausalLM, a text-only model"):
        mmlens.from_bridge(bridge_over(LlamaForCausalLM(config)))


@pytest.mark.parametrize("processing", [{}, {"no_processing": True}])
def test_a_bridge_in_compatibility_mode_is_refused(processing: dict[str, bool]) -> None:
    bridge = bridge_over(tiny.tiny_model("llava"))
    bridge.enable_compatibility_mode(**processing)
    with pytest.raises(BridgeError, match="before enable_compatibility_mode"):
        mmlens.from_bridge(bridge)


def test_models_whose_weights_are_not_the_plain_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = bridge_over(tiny.tiny_model("llava"))
    with monkeypatch.context() as patch:
        patch.setattr(bridge.original_model, "hf_quantizer", object(), raising=False)
        with pytest.raises(BridgeError, match="quantized"):
            mmlens.from_bridge(bridge)
    with monkeypatch.context() as patch:
        patch.setattr(bridge, "_driver", types.SimpleNamespace())
        with pytest.raises(BridgeError, match="not in this process"):
            mmlens.from_bridge(bridge)
    head = bridge.original_model.lm_head.original_component
    head.bias.fill_(1.0)
    with pytest.raises(BridgeError, match=r"lm_head\.bias is in the bridge"):
        mmlens.from_bridge(bridge)
    head.bias.zero_()
    mlp = bridge.blocks[0].mlp.original_component
    mlp.act_fn = nn.ReLU()
    with pytest.raises(BridgeError, match=r"mlp\.act_fn is a ReLU in the bridge, not a SiLU"):
        mmlens.from_bridge(bridge)
    mlp.act_fn = nn.SiLU()
    bridge.original_model.get_submodule("model.vision_tower").to("meta")
    with pytest.raises(BridgeError, match="cpu, meta"):
        mmlens.from_bridge(bridge)


@torch.no_grad()
def test_processing_the_bridge_later_rewrites_shared_weights_in_some_families() -> None:
    for family, shared in (("llava", False), ("qwen3_vl_moe", True)):
        bridge = bridge_over(tiny.tiny_model(family))
        model = mmlens.from_bridge(bridge)
        inputs = tiny.tiny_inputs(family, [1])
        clean = model(inputs)
        bridge.enable_compatibility_mode()
        assert torch.equal(model(inputs), clean) is not shared


# ---------------------------------------------------------------------- parity, name by name


def _difference(family: str, name: str) -> Difference | None:
    found = [d for d in DIFFERENCES if family in d.families and fnmatch(name, d.hook)]
    assert len(found) <= 1, (name, found)
    return found[0] if found else None


def _language_hooks(model: mmlens.HookedVLM) -> list[str]:
    """TransformerLens' language-side names; image.* is the same activation at some positions."""
    return [
        name
        for name in model.hook_dict
        if name.startswith(("hook_", "blocks.", "ln_final."))
        and ".image." not in name
        and not name.endswith(OPTIONAL)
    ]


def _kind(name: str, bridge: TransformerBridge, theirs: Any, ours: Any) -> str:
    """How the bridge's activation compares; norms are recomputed by mmlens, so they may differ by rounding."""
    if name not in theirs.cache_dict:
        return "silent" if name in bridge.hook_dict else "absent"
    if theirs[name].shape != ours[name].shape:
        return "other"
    tolerance = 1e-6 if "ln" in name else 0.0
    return "equal" if gap(theirs[name], ours[name]) <= tolerance else "other"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_activations_equal_the_bridges_under_eager_attention(family: str) -> None:
    this = pair(family)
    this.bridge.set_use_hook_mlp_in(True)
    try:
        logits, theirs = this.bridge.run_with_cache(this.ids, **this.rest)
    finally:
        this.bridge.set_use_hook_mlp_in(False)
    names = _language_hooks(this.eager)
    our_logits, ours = this.eager.run_with_cache(this.inputs, names_filter=names)
    assert torch.equal(logits, our_logits)
    found = {name: _kind(name, this.bridge, theirs, ours) for name in names}
    expected = {}
    for name in names:
        known = _difference(family, name)
        expected[name] = known.kind if known else "equal"
    assert found == expected
    assert sum(kind == "equal" for kind in found.values()) >= 10 * this.eager.cfg.n_layers


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_hook_result_where_the_bridge_has_it(family: str) -> None:
    """Its switch raises where attention is delegated; elsewhere it changes the order of sums, so only nearly equal."""
    this = pair(family)
    names = [f"blocks.{layer}.attn.hook_result" for layer in this.eager.attention_layers]
    _, ours = this.eager.run_with_cache(this.inputs, names_filter=names)
    if family in DELEGATED:
        with pytest.raises(NotImplementedError, match="use_attn_result"):
            this.bridge.set_use_attn_result(True)
    else:
        this.bridge.set_use_attn_result(True)
        try:
            _, theirs = this.bridge.run_with_cache(this.ids, **this.rest)
        finally:
            this.bridge.set_use_attn_result(False)
        for name in names:
            torch.testing.assert_close(theirs[name], ours[name], rtol=1e-4, atol=1e-5)
    # Independent of both: what the heads add up to is the output projection, less its bias.
    for layer, name in zip(this.eager.attention_layers, names, strict=True):
        out = this.eager.anatomy.language[layer].attention.out
        z = this.eager.run_with_cache(this.inputs, names_filter=f"blocks.{layer}.attn.hook_z")[1]["z", layer]
        total = z.flatten(-2) @ out.weight.T
        torch.testing.assert_close(ours[name].sum(-2), total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
@torch.no_grad()
def test_hook_attn_in_is_the_bridges_without_its_head_axis(family: str) -> None:
    this = pair(family)
    name = "blocks.1.hook_attn_in"
    this.bridge.set_use_attn_in(True)
    try:
        _, theirs = this.bridge.run_with_cache(this.ids, **this.rest)
    finally:
        this.bridge.set_use_attn_in(False)
    _, ours = this.eager.run_with_cache(this.inputs, names_filter=name)
    assert theirs[name].shape[2] == this.eager.cfg.n_heads
    torch.testing.assert_close(
        theirs[name], ours[name][:, :, None].expand_as(theirs[name]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl", "qwen3_5"])
@torch.no_grad()
def test_what_each_heads_queries_keys_and_values_read(family: str) -> None:
    this = pair(family)
    names = [f"blocks.1.attn.hook_{part}_input" for part in "qkv"]
    _, ours = this.eager.run_with_cache(this.inputs, names_filter=names)

    def without_first_head(x: Tensor, hook: Any) -> Tensor:
        return torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, 1:]], dim=2)

    edits = [(name, without_first_head) for name in names]
    edited = this.eager.run_with_hooks(this.inputs, fwd_hooks=edits)
    assert gap(edited, this.eager(this.inputs)) > 0.1
    try:
        if family in DELEGATED or family in GATED:
            with pytest.raises(NotImplementedError, match="use_split_qkv_input"):
                this.bridge.set_use_split_qkv_input(True)
                this.bridge(this.ids, **this.rest)
            return
        this.bridge.set_use_split_qkv_input(True)
        _, theirs = this.bridge.run_with_cache(this.ids, **this.rest)
        for name in names:
            assert torch.equal(theirs[name], ours[name])
        bridge_edited = this.bridge.run_with_hooks(this.ids, fwd_hooks=edits, **this.rest)
        torch.testing.assert_close(edited, bridge_edited, rtol=1e-4, atol=1e-4)
    finally:
        if family not in DELEGATED:
            this.bridge.set_use_split_qkv_input(False)


@torch.no_grad()
def test_the_bridge_numbers_the_positions_of_a_padded_row_from_its_first_token() -> None:
    """The plain model's forward counts padding too. Rotation is relative, so only hook_rot_q and _k can tell."""
    this = pair("llava")
    inputs = tiny.tiny_inputs("llava", [2, 1])
    real = inputs["attention_mask"].bool()
    assert real[0].all() and not real[1, 0]
    ids, rest = inputs["input_ids"], {name: v for name, v in inputs.items() if name != "input_ids"}
    logits, theirs = this.bridge.run_with_cache(ids, **rest)
    our_logits, ours = this.eager.run_with_cache(inputs)
    reference = plain("llava", "eager")(**inputs).logits
    assert torch.equal(our_logits, reference)
    torch.testing.assert_close(logits[real], our_logits[real], rtol=1e-4, atol=1e-4)
    for hook in ("rot_q", "rot_k"):
        assert gap(theirs[hook, 0][0], ours[hook, 0][0]) == 0
        assert gap(theirs[hook, 0][1][real[1]], ours[hook, 0][1][real[1]]) > 0.1
    pattern = (theirs["pattern", 2] - ours["pattern", 2]).abs().transpose(1, 2)
    assert pattern[real].max() < 1e-5


# ---------------------------------------------------------------------- what a user of the bridge meets


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bridge_forces_eager_attention_on_the_users_model(family: str) -> None:
    hf_model = tiny.tiny_model(family)
    assert hf_model.config._attn_implementation == "sdpa"
    bridge_over(hf_model)
    # LLaVA-OneVision's adapter overrides the step that forces it.
    assert hf_model.config._attn_implementation == ("sdpa" if family == "llava_onevision" else "eager")
    untouched = tiny.tiny_model(family)
    mmlens.HookedVLM(untouched)
    assert untouched.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hook", ["hook_pattern", "hook_attn_scores"])
@torch.no_grad()
def test_edits_inside_the_softmax_act_in_mmlens_and_are_dropped_where_the_bridge_delegates(
    family: str, hook: str
) -> None:
    this = pair(family)
    name = f"blocks.{this.model.attention_layers[-1]}.attn.{hook}"
    clean = this.bridge(this.ids, **this.rest)
    if family in DELEGATED:
        with pytest.warns(UserWarning, match="delegates its computation"):
            edited = this.bridge.run_with_hooks(this.ids, fwd_hooks=[(name, zero)], **this.rest)
        assert torch.equal(edited, clean)
    else:
        edited = this.bridge.run_with_hooks(this.ids, fwd_hooks=[(name, zero)], **this.rest)
        assert gap(edited, clean) > 0.1
        ours = this.eager.run_with_hooks(this.inputs, fwd_hooks=[(name, zero)])
        torch.testing.assert_close(ours, edited, rtol=1e-4, atol=1e-4)
    sdpa = this.model.run_with_hooks(this.inputs, fwd_hooks=[(name, zero)])
    assert gap(sdpa, this.model(this.inputs)) > 0.1


@pytest.mark.parametrize("family", DELEGATED)
@torch.no_grad()
def test_a_zeroed_pattern_is_a_zeroed_z(family: str) -> None:
    """What the edit should have done: z = pattern v, so no pattern is no z, which the bridge does let one edit."""
    this = pair(family)
    layer = this.model.attention_layers[-1]
    pattern = this.eager.run_with_hooks(this.inputs, fwd_hooks=[(f"blocks.{layer}.attn.hook_pattern", zero)])
    z = this.bridge.run_with_hooks(this.ids, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", zero)], **this.rest)
    torch.testing.assert_close(pattern, z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", DELEGATED)
@torch.no_grad()
def test_where_the_bridge_delegates_its_scores_are_the_pattern(family: str) -> None:
    this = pair(family)
    layer = this.model.attention_layers[0]
    _, theirs = this.bridge.run_with_cache(this.ids, **this.rest)
    names = [f"blocks.{layer}.attn.hook_{hook}" for hook in ("attn_scores", "pattern")]
    _, ours = this.eager.run_with_cache(this.inputs, names_filter=names)
    assert torch.equal(theirs["attn_scores", layer], theirs["pattern", layer])
    torch.testing.assert_close(ours["attn_scores", layer].softmax(-1), ours["pattern", layer])
    assert gap(ours["attn_scores", layer], ours["pattern", layer]) > 0.1


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "idefics3", "gemma3"])
@torch.no_grad()
def test_the_bridge_drops_pattern_edits_in_the_vision_tower(family: str) -> None:
    this = pair(family)
    clean = this.bridge(this.ids, **this.rest)
    name = "vision_encoder.encoder_layers.0.attn.hook_pattern"
    with pytest.warns(UserWarning, match="delegates its computation"):
        edited = this.bridge.run_with_hooks(this.ids, fwd_hooks=[(name, zero)], **this.rest)
    assert torch.equal(edited, clean)
    ours = this.model.run_with_hooks(this.inputs, fwd_hooks=[("vision.blocks.0.attn.hook_pattern", zero)])
    assert gap(ours, this.model(this.inputs)) > 0.1


@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", "qwen3_vl", "glm4v", "qwen3_5", "mistral3", "llama4", "muse_glimmer"]
)
@torch.no_grad()
def test_the_bridge_has_no_pattern_in_the_other_vision_towers(family: str) -> None:
    this = pair(family)
    assert not [n for n in this.bridge.hook_dict if n.startswith("vision") and n.endswith("hook_pattern")]
    ours = this.model.run_with_hooks(this.inputs, fwd_hooks=[("vision.blocks.0.attn.hook_pattern", zero)])
    assert gap(ours, this.model(this.inputs)) > 0.1


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "glm4v"])
@torch.no_grad()
def test_decompose_resid_adds_up_at_image_positions(family: str) -> None:
    this = pair(family)
    _, theirs = this.bridge.run_with_cache(this.ids, **this.rest)
    _, ours = this.eager.run_with_cache(this.inputs)
    last = ours["resid_post", this.eager.cfg.n_layers - 1]
    bridge_error = (theirs.decompose_resid().sum(0) - last).abs().amax(-1)
    assert bridge_error[this.images].min() > 0.1 and bridge_error[~this.images].max() < 1e-4
    assert gap(ours.decompose_resid().sum(0), last) < 1e-4
    # hook_embed is the whole reason: it lacks the image.
    assert gap(theirs["hook_embed"][~this.images], ours["hook_embed"][~this.images]) == 0
    assert gap(ours["hook_embed"], ours["resid_pre", 0]) == 0


@torch.no_grad()
def test_decompose_resid_of_the_bridge_also_lacks_deepstack() -> None:
    this = pair("qwen3_vl")
    _, theirs = this.bridge.run_with_cache(this.ids, **this.rest)
    _, ours = this.eager.run_with_cache(this.inputs)
    last = ours["resid_post", 2]
    merged = theirs.decompose_resid().sum(0) - theirs["hook_embed"] + theirs["resid_pre", 0]
    assert gap(merged[this.images], last[this.images]) > 0.1
    gained = sum(ours[f"blocks.{layer}.hook_deepstack"] for layer in (0, 1))
    torch.testing.assert_close(merged[this.images] + gained, last[this.images], rtol=1e-4, atol=1e-4)
    assert gap(ours.decompose_resid().sum(0), last) < 1e-4


@torch.no_grad()
def test_patching_tools_run_the_bridge_without_the_image() -> None:
    this = replace(pair("llava"), inputs=tiny.tiny_inputs("llava", [1]))
    bridge = this.bridge
    corrupted = this.ids.clone()
    corrupted[:, -3] = 5
    seen: list[Tensor] = []

    def metric(logits: Tensor) -> Tensor:
        seen.append(logits)
        return logits[0, -1, 3]

    _, clean_cache = bridge.run_with_cache(this.ids, **this.rest)
    patching.get_act_patch_attn_out(bridge, corrupted, clean_cache, metric)
    # Position 0 comes before what differs, so patching attn_out of layer 0 there changes nothing: this is the
    # run that is patched.
    with_image = bridge(corrupted, **this.rest)
    assert gap(seen[0], bridge(corrupted)) < 1e-5
    assert gap(seen[0], with_image) > 0.1
    with pytest.raises(TypeError, match="attention_mask"):
        patching.get_act_patch_attn_out(bridge, corrupted, clean_cache, metric, **this.rest)

    with pytest.raises(ValueError, match="token ids alone bring no image"):
        patching.get_act_patch_attn_out(
            this.model, corrupted, this.model.run_with_cache(this.inputs)[1], metric
        )
    clean = this.model.run_with_cache(this.inputs)[1]["attn_out", 0]
    patched = this.model.run_with_hooks(
        {**this.inputs, "input_ids": corrupted},
        fwd_hooks=[("blocks.0.hook_attn_out", lambda x, hook: torch.cat([clean[:, :1], x[:, 1:]], 1))],
    )
    torch.testing.assert_close(patched, with_image, rtol=1e-4, atol=1e-4)


def test_attribution_patching_runs_the_bridge_without_the_image() -> None:
    this = pair("llava")
    corrupted = this.ids.clone()
    corrupted[:, -3] = 5
    seen: list[Tensor] = []

    def metric(logits: Tensor) -> Tensor:
        seen.append(logits.detach())
        return logits[0, -1, 3]

    scores = attribution_patch(this.bridge, this.ids, corrupted, metric).node_scores
    assert any(score != 0 for score in scores.values())
    with torch.no_grad():
        for logits, ids in zip(seen, (this.ids, corrupted), strict=True):
            assert torch.equal(logits, this.bridge(ids))
            assert gap(logits, this.bridge(ids, **this.rest)) > 0.1


_GREEDY = {"max_new_tokens": 4, "do_sample": False}
_BRIDGE_GREEDY = {**_GREEDY, "verbose": False, "return_type": "tokens", "stop_at_eos": False}
LOSES_ITS_CACHE = "cache" in inspect.signature(LlamaModel.forward).parameters
"""Since transformers 5.24 the cache is `cache`; attention that a bridge computes itself looks for the old name."""


@pytest.mark.parametrize("family", ["llava", "idefics3", "llama4", *MROPE, *GATED])
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_generation(family: str) -> None:
    """Ours is the plain model's. The bridge's crashes on mRoPE positions, and on 5.24 decodes without a cache."""
    this = pair(family)
    truth = plain(family, "eager").generate(**this.inputs, min_new_tokens=4, **_GREEDY)
    assert torch.equal(this.eager.generate(this.inputs, min_new_tokens=4, **_GREEDY), truth)
    uncached = this.eager.generate(this.inputs, min_new_tokens=4, use_cache=False, **_GREEDY)
    assert torch.equal(uncached, truth)
    loses = LOSES_ITS_CACHE and family in REBUILT
    if family in MROPE or (family in GATED and not loses):
        with pytest.raises(RuntimeError, match="must match"):
            this.bridge.generate(this.ids, **_BRIDGE_GREEDY, **this.rest)
        return
    tokens, length = this.bridge.generate(this.ids, **_BRIDGE_GREEDY, **this.rest), this.ids.shape[1]
    assert torch.equal(tokens[:, : length + 1], truth[:, : length + 1])
    assert torch.equal(tokens, truth) != loses, (
        "TransformerLens reads the cache by its new name: TransformerBridge.generate is right again"
        if loses
        else "TransformerBridge.generate gives other tokens than the plain model: its attention lost the cache"
    )


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_uncached_generation_of_the_bridge_loses_the_image_after_one_token(family: str) -> None:
    this = pair(family)
    ids = this.bridge.generate(this.ids, use_past_kv_cache=False, **_BRIDGE_GREEDY, **this.rest)
    length = this.ids.shape[1]
    for step, given in enumerate((this.rest, {}, {})):
        expected = this.bridge(ids[:, : length + step], **given)[0, -1].argmax()
        assert ids[0, length + step] == expected
    truth = this.eager.generate(this.inputs, min_new_tokens=4, **_GREEDY)
    assert ids[0, length] == truth[0, length] and not torch.equal(ids, truth)


@pytest.mark.parametrize(
    ("family", "right"),
    [("llava", True), ("qwen2_5_vl", False), ("qwen3_vl", False), ("glm4v", False), ("gemma3", False)],
)
@torch.no_grad()
def test_start_at_layer(family: str, right: bool) -> None:
    """The bridge resumes without what came with the image: mRoPE positions, DeepStack, Gemma's mask over images."""
    this = pair(family)
    logits, cache = this.bridge.run_with_cache(this.ids, **this.rest)
    resumed = this.bridge(cache["resid_pre", 1], start_at_layer=1)
    assert torch.equal(resumed, logits) if right else gap(resumed, logits) > 0.1
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        this.bridge(cache["resid_pre", 1], start_at_layer=1, **this.rest)
    with pytest.raises(TypeError, match="start_at_layer"):
        this.model(this.inputs, start_at_layer=1)


@torch.no_grad()
def test_pos_slice_cuts_the_pixels_of_patches() -> None:
    this = pair("qwen2_5_vl")
    _, whole = this.bridge.run_with_cache(this.ids, **this.rest)
    _, cut = this.bridge.run_with_cache(this.ids, pos_slice=(-5, None), **this.rest)
    name = "vision_encoder.hook_in"
    n_patches, n_values = whole[name].shape
    assert n_values == this.inputs["pixel_values"].shape[1]
    assert cut[name].shape == (n_patches, 5)
    with pytest.raises(TypeError, match="pos_slice"):
        this.model.run_with_cache(this.inputs, pos_slice=(-5, None))


@torch.no_grad()
def test_path_patching_refuses_grouped_queries_and_delegated_attention() -> None:
    def sweep(family: str, component: str) -> Tensor:
        this = pair(family)
        corrupted = this.ids.clone()
        corrupted[:, -3] = 5
        caches = [this.bridge.run_with_cache(ids, **this.rest)[1] for ids in (this.ids, corrupted)]
        return patching.get_act_patch_direct_path(
            this.bridge, corrupted, *caches, lambda logits: logits[0, -1, 3],
            src_layer=0, src_head=0, component=component, verbose=False,
        )  # fmt: skip

    assert sweep("llava", "q").shape == (3, 4)
    for component in ("k", "v"):
        with pytest.raises(ValueError, match="GQA"):
            sweep("llava", component)
    with pytest.raises(NotImplementedError, match="use_split_qkv_input"):
        sweep("qwen2_5_vl", "q")


@pytest.mark.parametrize("model_type", NO_ADAPTER)
def test_families_without_an_adapter(model_type: str) -> None:
    config = tiny.tiny_config(model_type)
    config.architectures = [type(tiny.tiny_model(model_type)).__name__]
    with pytest.raises(ValueError, match="Could not determine supported architecture"):
        determine_architecture_from_hf_config(config)
    assert model_type in mmlens.families.catalog.FAMILIES


def test_a_llava_with_pixtrals_tower_does_not_boot() -> None:
    with pytest.raises(AttributeError, match="embeddings"):
        bridge_over(tiny.tiny_model("pixtral"))
    assert mmlens.HookedVLM(tiny.tiny_model("pixtral")).cfg.n_layers == 3


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is there")
def test_qwen_and_glm_adapters_ask_for_torchvision_though_nothing_calls_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other tests run these families without it."""
    adapter = supported_architectures.Qwen2_5_VLArchitectureAdapter
    monkeypatch.setattr(adapter, "required_libraries", ["torchvision"])
    with pytest.raises(ImportError, match="needs the optional torchvision library"):
        bridge_over(tiny.tiny_model("qwen2_5_vl"))
