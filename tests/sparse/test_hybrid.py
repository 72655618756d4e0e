"""Hybrid attention against the plain eager model under a mask for each head, made here position by position."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import mmlens
from mmlens.hooked_vlm import HookedVLM
from mmlens.prompt import Prompt
from mmlens.sparse.layer import NotCausalError

CAUSAL = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "deepseek_vl", "mistral3", "qwen3_5")
SINK, WINDOW = 3, 9

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def hooked(family: str, **options: Any) -> HookedVLM:
    return HookedVLM(tiny.tiny_model(family, **options), tiny.tiny_processor(family))


def prompt_of(model: HookedVLM, padded: bool) -> Prompt:
    images = tiny.tiny_images(3, seed=1)
    if padded:
        return model.prompt(["What colour is the letter K?", "Where?"], images=[images[:2], images[2:]])
    return model.prompt("What colour is the letter K?", images=images[:2])


def one_head_a_layer(model: HookedVLM) -> list[tuple[int, int]]:
    return [(layer, (layer + 1) % count) for layer, count in enumerate(model.heads_per_layer) if count]


def cut_rows(pattern: Tensor, real: Tensor, dense: set[int]) -> Tensor:
    """[batch, head, query, key] with what a streaming head may not see set to 0 and rows rescaled."""
    out = pattern.clone()
    for row in range(len(pattern)):
        first = int(real[row].int().argmax())
        for head in set(range(pattern.shape[1])) - dense:
            for query in range(pattern.shape[2]):
                for key in range(query + 1):
                    if key - first >= SINK and query - key >= WINDOW:
                        out[row, head, query, key] = 0
    return out / out.sum(-1, keepdim=True).clamp(min=1e-30)


def cut_logits(model: HookedVLM, prompt: Prompt, dense: list[tuple[int, int]]) -> Tensor:
    """The plain run, each pattern cut by a hook."""
    real = ~prompt.token_map.is_padding

    def cut(pattern: Tensor, hook: Any) -> Tensor:
        layer = int(hook.name.split(".")[1])
        return cut_rows(pattern, real, {head for at, head in dense if at == layer})

    def patterns(name: str) -> bool:
        return name.startswith("blocks.") and name.endswith("attn.hook_pattern")

    return model.run_with_hooks(prompt, fwd_hooks=[(patterns, cut)])


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["one", "padded"])
@pytest.mark.parametrize("family", CAUSAL)
def test_every_path_equals_the_plain_model_with_its_pattern_cut(family: str, padded: bool) -> None:
    model = hooked(family)
    prompt, dense = prompt_of(model, padded), one_head_a_layer(model)
    shown = ~prompt.token_map.is_padding
    expected, plain = cut_logits(model, prompt, dense)[shown], model(prompt)[shown]
    for path in ("auto", "masked", "blocks", "flex"):
        with mmlens.hybrid_attention(model, dense, sink=SINK, window=WINDOW, path=path):
            torch.testing.assert_close(model(prompt)[shown], expected, atol=1e-4, rtol=1e-4)
    assert (expected - plain).abs().max() > 1e-3
    assert torch.equal(model(prompt)[shown], plain)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_all_heads_dense_or_a_wide_window_is_the_plain_model(family: str, attention: str) -> None:
    model = hooked(family, attn_implementation=attention)
    prompt = prompt_of(model, padded=True)
    shown = ~prompt.token_map.is_padding
    plain = model(prompt)[shown]
    for dense, window in ((model.heads, WINDOW), (one_head_a_layer(model), prompt.shape[1])):
        for path in ("auto", "masked", "blocks", "flex"):
            with mmlens.hybrid_attention(model, dense, sink=SINK, window=window, path=path):
                torch.testing.assert_close(model(prompt)[shown], plain, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_eager_attention_takes_the_masked_reference() -> None:
    eager, sdpa = hooked("qwen3_vl", attn_implementation="eager"), hooked("qwen3_vl")
    prompt = prompt_of(sdpa, padded=True)
    shown = ~prompt.token_map.is_padding
    runs = []
    for model in (eager, sdpa):
        with mmlens.hybrid_attention(model, one_head_a_layer(model), sink=SINK, window=WINDOW):
            runs.append(model(prompt)[shown])
    torch.testing.assert_close(*runs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_head_streams_while_its_sibling_in_the_group_stays_dense() -> None:
    model = hooked("qwen3_vl")
    assert model.cfg.n_key_value_heads == 2 and model.cfg.n_heads == 4
    prompt = prompt_of(model, padded=False)
    _, plain = model.run_with_cache(prompt)
    with mmlens.hybrid_attention(model, [(0, 1)], sink=SINK, window=WINDOW):
        _, hybrid = model.run_with_cache(prompt)
    z, z_plain = (cache["blocks.0.attn.hook_z"] for cache in (hybrid, plain))
    # Heads 0 and 1 share keys and values.
    torch.testing.assert_close(z[:, :, 1], z_plain[:, :, 1])
    for head in (0, 2, 3):
        assert (z[:, -1, head] - z_plain[:, -1, head]).abs().max() > 1e-4


@torch.no_grad()
def test_hooks_stay_live_and_patterns_are_those_of_the_rule() -> None:
    model = hooked("llava")
    prompt = prompt_of(model, padded=False)
    dense, length = [(1, 2)], prompt.shape[1]
    with mmlens.hybrid_attention(model, dense, sink=SINK, window=WINDOW) as heads:
        logits, cache = model.run_with_cache(prompt)
        unread = model(prompt)
        ablated = model.run_with_hooks(
            prompt, fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: torch.zeros_like(z))]
        )
    assert list(heads) == dense
    torch.testing.assert_close(unread, logits, atol=1e-5, rtol=1e-5)
    assert (ablated - logits).abs().max() > 1e-3
    positions = torch.arange(length)
    ahead = positions[:, None] - positions
    seen = (ahead >= 0) & ((ahead < WINDOW) | (positions < SINK))
    for layer in range(model.cfg.n_layers):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0]
        for head in range(model.cfg.n_heads):
            allowed = ahead >= 0 if (layer, head) in dense else seen
            assert (pattern[head][~allowed] == 0).all() and (pattern[head][allowed] > 0).all()


@torch.no_grad()
def test_ram_is_read_off_the_streaming_patterns(micro: HookedVLM) -> None:
    examples = mmlens.scene_examples("documents", 3, seed=5)
    dense = [(0, 4), (3, 2)]
    with mmlens.hybrid_attention(micro, dense, sink=2, window=8):
        scores = mmlens.ram(micro, examples, batch_size=3, progress=False)
        for index, example in enumerate(examples):
            prompt = micro.prompt_examples([example])
            _, cache = micro.run_with_cache(prompt)
            question = prompt.token_map.is_question[0]
            evidence = prompt.token_map.evidence([example])[0]
            for layer in range(micro.cfg.n_layers):
                pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0]
                expected = pattern[:, question][:, :, evidence].sum(-1).mean(-1)
                torch.testing.assert_close(scores.per_example[index, layer], expected, atol=1e-5, rtol=1e-4)
    plain = mmlens.ram(micro, examples, batch_size=3, progress=False)
    assert (plain.values - scores.values).abs().max() > 0.05


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "internvl"])
def test_generation_prefills_by_the_rule_and_decodes_densely(family: str) -> None:
    model = hooked(family)
    prompt, dense = prompt_of(model, padded=False), one_head_a_layer(model)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    with mmlens.hybrid_attention(model, dense, sink=SINK, window=WINDOW):
        tokens = model.generate(prompt, **options)
        first = model.hf_model(**prompt.inputs, use_cache=True)
    # Decoding by hand: the plain model on the keys of all positions.
    cache, expected = first.past_key_values, []
    assert cache.get_seq_length() == prompt.shape[1]
    token = first.logits[:, -1:].argmax(-1)
    for step in range(5):
        expected.append(int(token))
        at = torch.tensor([prompt.shape[1] + step])
        extra = {"position_ids": None} if family == "qwen3_vl" else {}
        token = (
            model.hf_model(input_ids=token, past_key_values=cache, cache_position=at, use_cache=True, **extra)
            .logits[:, -1:]
            .argmax(-1)
        )
    assert tokens[0, -5:].tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_sweep_under_it_is_one_run_for_each_intervention(family: str) -> None:
    model = hooked(family)
    prompt, dense = prompt_of(model, padded=True), one_head_a_layer(model)
    interventions = {
        f"L{layer}H{head} {positions}": mmlens.ablate([(layer, head)], "zero", positions=positions)
        for layer, head in ((0, 1), (1, 3), (2, 0))
        for positions in (None, "last")
    }

    def logit(logits: Tensor, prompt: Prompt) -> Tensor:
        return logits[:, -1, 7]

    with mmlens.hybrid_attention(model, dense, sink=SINK, window=WINDOW):
        table = mmlens.sweep(model, prompt, interventions, logit, progress=False)
        expected = [
            logit(model.run_with_hooks(prompt, fwd_hooks=intervention(model, prompt)), prompt).tolist()
            for intervention in interventions.values()
        ]
    by_name = table.groupby("intervention", sort=False)["value"].apply(list)
    torch.testing.assert_close(torch.tensor(list(by_name)), torch.tensor(expected), atol=1e-4, rtol=1e-4)
    plain = mmlens.sweep(model, prompt, interventions, logit, progress=False)
    assert (plain["value"] - table["value"]).abs().max() > 1e-3


@torch.no_grad()
def test_no_dense_head_at_all_is_allowed() -> None:
    model = hooked("llava")
    prompt = prompt_of(model, padded=False)
    with mmlens.hybrid_attention(model, [], sink=SINK, window=WINDOW):
        found = model(prompt)
    torch.testing.assert_close(found, cut_logits(model, prompt, []), atol=1e-4, rtol=1e-4)


def test_what_cannot_be_done_is_refused_by_name() -> None:
    model = hooked("llava")
    prompt = prompt_of(model, padded=False)
    with pytest.raises(ValueError, match="path is one of auto, masked, blocks, flex, not 'fast'"):
        mmlens.hybrid_attention(model, [(0, 0)], path="fast").__enter__()
    with pytest.raises(IndexError, match="layer 9 is out of range"):
        mmlens.hybrid_attention(model, [(9, 0)]).__enter__()
    with pytest.raises(ValueError, match="sink=-1"):
        mmlens.hybrid_attention(model, [(0, 0)], sink=-1).__enter__()
    with (
        mmlens.hybrid_attention(model, [(0, 0)], sink=SINK, window=WINDOW),
        pytest.raises(RuntimeError, match="open on this model already"),
    ):
        mmlens.hybrid_attention(model, [(0, 1)]).__enter__()
    both_ways = hooked("gemma3")
    with (
        mmlens.hybrid_attention(both_ways, [(0, 0)], sink=SINK, window=WINDOW),
        pytest.raises(NotCausalError, match="layer 0 of gemma3.* see what comes behind them"),
    ):
        both_ways(prompt_of(both_ways, padded=False))
    with pytest.raises(TypeError, match="cross"):
        mmlens.hybrid_attention(HookedVLM(tiny.tiny_model("mllama")), [(0, 0)]).__enter__()
    # Whatever was refused, nothing is left behind.
    with torch.no_grad():
        assert torch.equal(model(prompt), hooked("llava")(prompt))


def test_an_exception_closes_it() -> None:
    model = hooked("llava")
    with (
        pytest.raises(KeyError),
        mmlens.hybrid_attention(model, [(0, 0)], sink=SINK, window=WINDOW),
    ):
        raise KeyError
    assert all(model.attention_tap(layer).streaming is None for layer in range(model.cfg.n_layers))
