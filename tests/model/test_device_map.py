"""Models whose layers are on different devices, or offloaded: the same logits, activations and edits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import dispatch_model
from fake_devices import FakeTensor, fake_devices
from tiny.wrapped import hooked, padded_prompt
from torch import Tensor, nn

import mmlens

# Plain; with deep injection; with gates on the tower's branches; with norms after attention and tied embeddings.
OFFLOADED = ("llava", "qwen3_vl", "internvl")
ON_TWO_DEVICES = ("llava", "qwen3_vl", "gemma3")

EDITED = (
    "blocks.{l}.attn.hook_q_input",
    "blocks.{l}.attn.hook_z",
    "blocks.{l}.attn.hook_result",
    "blocks.{l}.attn.hook_pattern",
    "blocks.{l}.ln1.hook_normalized",
    "blocks.{l}.ln2.hook_scale",
    "blocks.{l}.hook_resid_mid",
    "blocks.{l}.hook_mlp_in",
    "blocks.{l}.image.hook_resid_post",
    "blocks.{l}.hook_deepstack",
    "vision.blocks.{l}.attn.hook_result",
    "vision.blocks.{l}.hook_attn_out",
    "ln_final.hook_normalized",
)


def device_map(model: mmlens.HookedVLM, far: Callable[[str], str]) -> dict[str, str]:
    """Each layer of either stack by itself, and whatever holds no layers: path -> the device that `far` says."""
    layers = [
        parts.module for stack in (model.anatomy.language, *model.anatomy.stacks.values()) for parts in stack
    ]
    placed: dict[str, str] = {}

    def place(module: nn.Module, path: str) -> None:
        if any(module is layer for layer in layers) or not set(map(id, layers)) & set(
            map(id, module.modules())
        ):
            if module.state_dict() or list(module.buffers()):
                placed[path] = far(path)
            return
        for name, child in module.named_children():
            place(child, f"{path}.{name}".lstrip("."))
        for name, _ in module.named_parameters(recurse=False):
            placed[f"{path}.{name}".lstrip(".")] = far(path)

    place(model.hf_model, "")
    return placed


def on_cpu(x: Tensor) -> Tensor:
    return x.held if isinstance(x, FakeTensor) else x


def check_same(plain: mmlens.HookedVLM, placed: mmlens.HookedVLM) -> None:
    """Logits, every activation, attention rows, edits and generated tokens, bit by bit."""
    prompt, there = padded_prompt(plain), padded_prompt(placed)
    assert {x.device for x in there.inputs.values()} == {placed.device}
    clean = plain(prompt)
    assert torch.equal(on_cpu(placed(there)), clean)

    _, expected = plain.run_with_cache(prompt, names_filter=lambda name: True)
    _, cache = placed.run_with_cache(there, names_filter=lambda name: True)
    assert set(cache.cache_dict) == set(expected.cache_dict) == set(plain.hook_dict)
    for name, value in expected.cache_dict.items():
        assert torch.equal(on_cpu(cache[name]), value), name

    rows: dict[mmlens.HookedVLM, list[Tensor]] = {plain: [], placed: []}
    for model, given in ((plain, prompt), (placed, there)):
        model.attention_rows(
            given, given.last, lambda layer, row, real, to=rows[model]: to.append(on_cpu(row))
        )
    assert len(rows[plain]) == len(rows[placed]) == plain.cfg.n_layers
    assert all(map(torch.equal, rows[plain], rows[placed]))

    # All edits of a layer at once: one that did not arrive would show.
    for layer in (0, 1):
        names = [name for name in (name.format(l=layer) for name in EDITED) if name in plain.hook_dict]
        halve = [(name, lambda x, hook: x / 2) for name in names]
        edited = plain.run_with_hooks(prompt, fwd_hooks=halve)
        assert not torch.equal(edited, clean)
        assert torch.equal(on_cpu(placed.run_with_hooks(there, fwd_hooks=halve)), edited)

    hooks = [("blocks.1.attn.hook_z", lambda z, hook: z / 2)]
    with plain.hooks(fwd_hooks=hooks), placed.hooks(fwd_hooks=hooks):
        tokens = plain.generate(prompt, max_new_tokens=2, do_sample=False)
        assert torch.equal(on_cpu(placed.generate(there, max_new_tokens=2, do_sample=False)), tokens)


@pytest.mark.parametrize("family", OFFLOADED)
@torch.no_grad()
def test_layers_offloaded_to_disk(family: str, tmp_path: Path) -> None:
    """All but the first language layer on disk, the embeddings too: outside its forward a weight has no data."""
    tiny.tiny_model(family).save_pretrained(tmp_path)
    tiny.tiny_processor(family).save_pretrained(tmp_path)
    plain = mmlens.HookedVLM.from_pretrained(str(tmp_path))
    places = device_map(plain, lambda path: "cpu" if path.endswith("language_model.layers.0") else "disk")
    placed = mmlens.HookedVLM.from_pretrained(
        str(tmp_path), device_map=places, offload_folder=str(tmp_path / "offloaded")
    )
    offloaded = [weight.is_meta for weight in placed.hf_model.parameters()]
    assert any(offloaded) and not all(offloaded)
    assert placed.device == torch.device("cpu") and placed.cfg.device == "cpu"
    check_same(plain, placed)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(placed(ids), plain(ids))
    # A copy of what lies on the disk would take edits that never reach the model.
    with pytest.raises(NotImplementedError, match="offload"):
        placed.W_O  # noqa: B018
    assert torch.equal(placed.blocks[0].attn.W_O, plain.blocks[0].attn.W_O)


def on_two_devices(plain: mmlens.HookedVLM) -> mmlens.HookedVLM:
    """The same model with all but the first layer of each stack, and the head, on a second device."""
    far = [path for path in device_map(plain, lambda path: "") if re.search(r"\.[1-9]$", path)]
    if not plain.hf_model.config.tie_word_embeddings:
        far.append("lm_head")
    places = device_map(plain, lambda path: "fake:1" if path in far else "fake:0")
    model = tiny.tiny_model(plain.family.model_type)
    dispatch_model(model, places, main_device="fake:0", skip_keys=model._skip_keys_device_placement)
    placed = mmlens.HookedVLM(model, plain.processor)
    assert {str(weight.device) for weight in model.parameters()} == {"fake:0", "fake:1"}
    assert placed.device == torch.device("fake:0")
    return placed


@pytest.mark.parametrize("family", ON_TWO_DEVICES)
@torch.no_grad()
def test_layers_on_two_devices(family: str) -> None:
    plain = hooked(family)
    with fake_devices():
        check_same(plain, on_two_devices(plain))


@torch.no_grad()
def test_ablation_and_head_scores_on_two_devices() -> None:
    plain = hooked("qwen3_vl")
    examples = mmlens.scene_examples("objects", 3, seed=0)
    heads = [(0, 1), (1, 0), (2, 3)]
    with fake_devices():
        placed = on_two_devices(plain)
        means = [mmlens.mean_activations(model, examples) for model in (plain, placed)]
        assert means[0].keys() == means[1].keys()
        assert all(torch.equal(means[0][name], means[1][name]) for name in means[0])
        for mode, reference in (
            ("zero", None),
            ("mean", means[0]),
            ("mean_query", means[0]),
            ("uniform", None),
            ("resample", examples[1:]),
        ):
            intervention = mmlens.ablate(
                heads, mode, reference=reference, positions=lambda prompt: prompt.last
            )
            logits = []
            for model in (plain, placed):
                prompt = model.prompt_examples(examples[:1])
                hooks = intervention(model, prompt)
                logits.append(on_cpu(model.run_with_hooks(prompt, fwd_hooks=hooks, logits_to_keep=1)))
            assert torch.equal(*logits), mode
        scores = [mmlens.ram(model, examples, progress=False).per_example for model in (plain, placed)]
        assert torch.equal(*scores)
        ids = torch.tensor([5, 6])
        directions = [on_cpu(model.tokens_to_residual_directions(ids)) for model in (plain, placed)]
        assert torch.equal(*directions)
        assert torch.equal(on_cpu(placed.accumulated_bias(2)), plain.accumulated_bias(2))
