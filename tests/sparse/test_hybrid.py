"""Hybrid attention against the plain eager model under a mask for each head, made here position by position."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

import mmlens
from mmlens.hooked_vlm import HookedVLM

CAUSAL = (
    "llava",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "idefics3",
    "gemma4",
    "step3p7",
    "deepseek_vl",
    "lfm2_vl",
    "mistral3",
    "qwen3_5",
)


def prompt_of(model: HookedVLM, padded: bool) -> mmlens.prompt.Prompt:
    images = tiny.tiny_images(3, seed=1)
    if padded:
        return model.prompt(["What colour is the letter K?", "Where?"], images=[images[:2], images[2:]])
    return model.prompt("What colour is the letter K?", images=images[:2])


def slow_rule(pattern: Tensor, real: Tensor, dense: set[int], sink: int, window: int) -> Tensor:
    """[batch, head, query, key] with what a streaming head may not see set to 0 and rows rescaled."""
    out = pattern.clone()
    for row in range(len(pattern)):
        first = int(real[row].int().argmax())
        for head in range(pattern.shape[1]):
            if head in dense:
                continue
            for query in range(pattern.shape[2]):
                for key in range(query + 1):
                    if key - first >= sink and query - key >= window:
                        out[row, head, query, key] = 0
    return out / out.sum(-1, keepdim=True).clamp(min=1e-30)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", CAUSAL)
def test_paths_equal_the_plain_model_with_its_pattern_cut(family: str, padded: bool) -> None:
    model = HookedVLM(tiny.tiny_model(family), tiny.tiny_processor(family))
    prompt = prompt_of(model, padded)
    n_layers, counts = model.cfg.n_layers, model.heads_per_layer
    dense = [(layer, (layer + 1) % counts[layer]) for layer in range(n_layers) if counts[layer]]
    real = ~prompt.token_map.is_padding
    sink, window = 3, 9

    def cut(pattern: Tensor, hook: object) -> Tensor:
        layer = int(hook.name.split(".")[1])  # type: ignore[attr-defined]
        return slow_rule(pattern, real, {h for l, h in dense if l == layer}, sink, window)

    hooks = [(lambda name: name.startswith("blocks.") and name.endswith("attn.hook_pattern"), cut)]
    expected = model.run_with_hooks(prompt, fwd_hooks=hooks)
    shown = real[..., None]
    for path in ("masked", "blocks", "flex"):
        with mmlens.hybrid_attention(model, dense, sink=sink, window=window, path=path):
            logits = model(prompt)
        assert torch.allclose(logits * shown, expected * shown, atol=1e-4), (
            path,
            (logits - expected).abs().max(),
        )
    assert not torch.allclose(expected * shown, model(prompt) * shown, atol=1e-3)
