"""TransformerLens' own tools on a HookedVLM with images, each against a value worked out by hand."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import tiny
import torch
from tiny.wrapped import hooked, padded_prompt, two_image_prompt
from torch import Tensor
from transformer_lens import ActivationCache, head_detector, patching
from transformer_lens.tools.analysis import direct_logit_attribution, logit_lens

import mmlens
from mmlens.model.hooks import HookNeverFiredError
from mmlens.model.prompt import Prompt

FEW = ("llava", "qwen3_vl", "internvl")
POST_NORMED = ("gemma3", "glm4v")
"""Norms stand after attention and MLP."""

SCALED = "granite4_vision"
"""Branches are multiplied by a factor before they enter the stream, and logits by another."""

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def everything(name: str) -> bool:
    return True


def small_prompt(model: mmlens.HookedVLM, seed: int = 0) -> Prompt:
    return model.prompt("K?", images=tiny.tiny_images(1, seed=seed, sizes=[(32, 32)]))


def two_small_prompts(model: mmlens.HookedVLM, seed: int) -> Prompt:
    images = tiny.tiny_images(2, seed=seed, sizes=[(32, 32), (32, 32)])
    return model.prompt(["K?", "S?"], images=[images[:1], images[1:]])


# ---------------------------------------------------------------------- the cache


@torch.no_grad()
@pytest.mark.parametrize("family", [*tiny.REPRESENTATIVES, *POST_NORMED, SCALED])
def test_parts_of_the_stream_sum_to_it_at_image_positions_too(family: str) -> None:
    model = hooked(family)
    prompt = padded_prompt(model)
    _, cache = model.run_with_cache(prompt, names_filter=everything)
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    final = cache["resid_post", n_layers - 1]
    stack, labels = cache.decompose_resid(return_labels=True)
    assert len(stack) == len(labels)
    torch.testing.assert_close(stack.sum(0), final, **CLOSE)
    torch.testing.assert_close(cache.decompose_resid(layer=2).sum(0), cache["resid_pre", 2], **CLOSE)
    torch.testing.assert_close(
        cache.decompose_resid(layer=1, mlp_input=True).sum(0), cache["resid_mid", 1], **CLOSE
    )
    last = cache.decompose_resid(pos_slice=-1)
    torch.testing.assert_close(last.sum(0), final[:, -1], **CLOSE)
    deep = [f"{layer}_deepstack" for layer in model.anatomy.deep_after]
    assert [label for label in labels if "deepstack" in label] == deep
    assert bool(deep) == (family in ("qwen3_vl", SCALED))
    without = cache.decompose_resid(incl_embeds=False)
    torch.testing.assert_close(
        without.sum(0), final - cache["embed"] - stack[len(labels) - len(deep) :].sum(0), **CLOSE
    )

    heads = cache.stack_head_results()
    by_layer = heads.unflatten(0, (n_layers, n_heads)).sum(1)
    attn_out = cache.stack_activation("attn_out")
    bias = torch.stack(
        [torch.as_tensor(block.bias(mlp=False)).expand(model.cfg.d_model) for block in model.blocks]
    )
    torch.testing.assert_close(by_layer + bias[:, None, None], attn_out, **CLOSE)
    # From hook_z alone, as after a run without hook_result.
    _, plain = model.run_with_cache(prompt)
    assert "blocks.0.attn.hook_result" not in plain
    torch.testing.assert_close(plain.stack_head_results(), heads, **CLOSE)
    with_rest, names = cache.stack_head_results(incl_remainder=True, return_labels=True)
    assert names == [*model.all_head_labels, "remainder"]
    torch.testing.assert_close(with_rest.sum(0), final, **CLOSE)

    full, names = cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True)
    assert names[: n_layers * n_heads] == model.all_head_labels and len(full) == len(names)
    torch.testing.assert_close(full.sum(0), final, **CLOSE)
    if family in POST_NORMED:
        with pytest.raises(ValueError, match="norm after the MLP.*expand_neurons=False"):
            cache.get_full_resid_decomposition()
    else:
        full, names = cache.get_full_resid_decomposition(return_labels=True)
        assert "L1N5" in names and len(full) == len(names)
        torch.testing.assert_close(full.sum(0), final, **CLOSE)
    direction = model.residual_directions(torch.tensor(7))
    projected = cache.get_full_resid_decomposition(
        expand_neurons=False, apply_ln=True, project_output_onto=direction
    )
    torch.testing.assert_close(projected.sum(0), cache["ln_final.hook_normalized"] @ direction, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("family", [*tiny.REPRESENTATIVES, *POST_NORMED, "aya_vision"])
def test_logit_attribution_is_the_logit(family: str) -> None:
    """Attributions of the parts, and of heads with a remainder, sum to the model's own logit difference."""
    model = hooked(family)
    prompt = padded_prompt(model)
    logits, cache = model.run_with_cache(prompt)
    tokens, wrong = torch.tensor([5, 9]), torch.tensor([6, 3])
    stack = cache.decompose_resid()
    attrs = cache.logit_attrs(stack, tokens, wrong)
    difference = torch.stack([row[:, a] - row[:, b] for row, a, b in zip(logits, tokens, wrong, strict=True)])
    torch.testing.assert_close(attrs.sum(0), difference, **CLOSE)
    result = direct_logit_attribution(model, prompt, tokens, wrong, unit="head")
    assert result.labels == [*model.all_head_labels, "remainder"]
    torch.testing.assert_close(result.attribution.sum(0), difference[:, -1], **CLOSE)
    by_component = direct_logit_attribution(model, prompt, tokens, wrong)
    torch.testing.assert_close(by_component.attribution, attrs[..., -1], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("family", FEW)
def test_a_heads_attribution_is_what_its_removal_costs_at_a_fixed_scale(family: str) -> None:
    """Zero the last layer's head, hold the final norm's scale and the MLP: the logit falls by the attribution."""
    model = hooked(family)
    prompt = small_prompt(model)
    clean, cache = model.run_with_cache(prompt, names_filter=everything)
    last = model.cfg.n_layers - 1
    attrs = cache.logit_attrs(cache.stack_head_results(pos_slice=-1), 7, pos_slice=-1)
    attrs = attrs.unflatten(0, (model.cfg.n_layers, -1))[last, :, 0]
    held = [
        (name, lambda x, hook: cache[hook.name])
        for name in ("ln_final.hook_scale", f"blocks.{last}.hook_mlp_out")
    ]
    for head in range(model.cfg.n_heads):

        def zero(z: Tensor, hook: object, head: int = head) -> Tensor:
            return z.index_fill(2, torch.tensor([head]), 0.0)

        under = model.run_with_hooks(prompt, fwd_hooks=[(f"blocks.{last}.attn.hook_z", zero), *held])
        torch.testing.assert_close(clean[0, -1, 7] - under[0, -1, 7], attrs[head], **CLOSE)


@torch.no_grad()
def test_accumulated_resid_and_norms_of_a_stack(model: mmlens.HookedVLM) -> None:
    prompt = padded_prompt(model)
    logits, cache = model.run_with_cache(prompt)
    stack, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    expected = [
        cache[kind, layer] for layer in range(model.cfg.n_layers) for kind in ("resid_pre", "resid_mid")
    ]
    expected.append(cache["resid_post", model.cfg.n_layers - 1])
    assert labels[-1] == "final_post" and torch.equal(stack, torch.stack(expected))
    normed = cache.accumulated_resid(apply_ln=True)
    for row, entry in zip(normed, cache.accumulated_resid(), strict=True):
        torch.testing.assert_close(row, model.ln_final(entry), **CLOSE)
    at_layer = cache.apply_ln_to_stack(cache["resid_pre", 1][None], layer=1)[0]
    torch.testing.assert_close(at_layer, cache["blocks.1.ln1.hook_normalized"], **CLOSE)
    at_mlp = cache.apply_ln_to_stack(cache["resid_mid", 1][None], layer=1, mlp_input=True)[0]
    torch.testing.assert_close(at_mlp, cache["blocks.1.ln2.hook_normalized"], **CLOSE)

    lens = logit_lens(model, prompt, positions=None, incl_mid=True)
    assert lens.labels == labels
    for row, entry in zip(lens.values, expected, strict=True):
        torch.testing.assert_close(row, model.unembed(model.ln_final(entry)), **CLOSE)
    torch.testing.assert_close(lens.values[-1], logits, **CLOSE)
    ranks = logit_lens(model, prompt, targets=[7]).rank_trajectory()
    by_hand = [(row > row[:, 7:8]).sum(-1) for row in lens.values[::2, :, -1]]
    assert torch.equal(ranks, torch.stack(by_hand))
    assert torch.equal(cache.logit_lens(targets=[7]).rank_trajectory(), ranks)


def test_a_lens_refuses_a_model_that_scales_its_logits() -> None:
    model = hooked(SCALED)
    with pytest.raises(ValueError, match="logit_lens reads .* differs from the model's own logits"):
        logit_lens(model, small_prompt(model))


@torch.no_grad()
def test_the_batch_axis_can_be_left_out_of_a_cache(model: mmlens.HookedVLM) -> None:
    prompt = two_image_prompt(model)
    _, cache = model.run_with_cache(prompt)
    _, row = model.run_with_cache(prompt, remove_batch_dim=True)
    _, later = model.run_with_cache(prompt)
    assert later.remove_batch_dim() is later and set(later) == set(row) == set(cache)
    for removed in (row, later):
        assert isinstance(removed, ActivationCache) and not removed.has_batch_dim
        for name in later:
            value = cache[name]
            language = name.startswith(("blocks.", "ln_final", "hook_"))
            packed = ".image." in name or "deepstack" in name
            assert torch.equal(removed[name], value[0] if language and not packed else value), name
    torch.testing.assert_close(row.decompose_resid(), cache.decompose_resid()[:, 0], **CLOSE)
    torch.testing.assert_close(row.stack_head_results(), cache.stack_head_results()[:, 0], **CLOSE)
    for run in (
        lambda: model.run_with_cache(padded_prompt(model), remove_batch_dim=True),
        lambda: model.run_with_cache(padded_prompt(model))[1].remove_batch_dim(),
    ):
        with pytest.raises(ValueError, match="batch of one prompt, this one has 2"):
            run()


def test_removing_the_batch_axis_twice_only_warns(caplog: pytest.LogCaptureFixture) -> None:
    model = hooked("llava")
    with torch.no_grad():
        _, cache = model.run_with_cache(small_prompt(model), remove_batch_dim=True)
    before = cache["resid_post", 1]
    with caplog.at_level(logging.WARNING):
        assert torch.equal(cache.remove_batch_dim()["resid_post", 1], before)
    assert "already" in caplog.text


@torch.no_grad()
@pytest.mark.parametrize("family", FEW)
def test_a_cache_can_be_cut_to_some_prompts(family: str) -> None:
    model = hooked(family)
    prompt = padded_prompt(model)
    mask = prompt.token_map.is_image
    _, cache = model.run_with_cache(prompt)
    owner = torch.arange(2)[:, None].expand_as(mask)[mask]
    for chosen, rows in ((1, [1]), ((1, 2), [1]), ([1, 0], [1, 0])):
        cut = cache.apply_slice_to_batch_dim(chosen)
        assert cut.has_batch_dim == (chosen != 1)
        whole = cache["resid_post", 1]
        assert torch.equal(cut["resid_post", 1], whole[1] if chosen == 1 else whole[rows])
        packed = cache["blocks.1.image.hook_resid_post"]
        expected = torch.cat([packed[owner == row] for row in rows])
        assert torch.equal(cut["blocks.1.image.hook_resid_post"], expected)
        assert not any(name.startswith(("vision.", "projector.")) for name in cut)
        parts = cut.decompose_resid().sum(0)
        torch.testing.assert_close(parts, cut["resid_post", model.cfg.n_layers - 1], **CLOSE)


@torch.no_grad()
def test_filters_cache_what_fires_and_names_must_fire() -> None:
    model = hooked("llava")
    text_only = model.prompt("What is it?")
    _, cache = model.run_with_cache(text_only, names_filter=lambda name: "hook_z" in name)
    z = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    assert list(cache) == z
    for nothing in (lambda name: "image" in name, ["blocks.0.attn.hook_z", "blocks.0.image.hook_z"]):
        with pytest.raises(HookNeverFiredError, match="never fired"):
            model.run_with_cache(text_only, names_filter=nothing)


# ---------------------------------------------------------------------- activation patching

Metric = Callable[[Tensor], Tensor]


def logit_gap(logits: Tensor) -> Tensor:
    return (logits[:, -1, 7] - logits[:, -1, 11]).mean()


def by_hand(
    model: mmlens.HookedVLM,
    corrupted: Prompt,
    clean: ActivationCache,
    name: str,
    cells: list[tuple[int, ...]],
    place: Callable[[tuple[int, ...]], tuple[int | slice, ...]],
) -> Tensor:
    """One run per cell, by a hook of its own that copies the clean values into a fresh tensor."""
    values = []
    for cell in cells:
        full_name = f"blocks.{cell[0]}.{name}"

        def paste(
            x: Tensor, hook: object, cell: tuple[int, ...] = cell, full_name: str = full_name
        ) -> Tensor:
            patched = x.clone()
            patched[place(cell)] = clean[full_name][place(cell)]
            return patched

        values.append(logit_gap(model.run_with_hooks(corrupted, fwd_hooks=[(full_name, paste)])))
    return torch.stack(values)


EVERY = slice(None)
STREAM = {
    patching.get_act_patch_resid_pre: "hook_resid_pre",
    patching.get_act_patch_resid_mid: "hook_resid_mid",
    patching.get_act_patch_attn_out: "hook_attn_out",
    patching.get_act_patch_mlp_out: "hook_mlp_out",
}
BY_POS = {
    patching.get_act_patch_attn_head_out_by_pos: "attn.hook_z",
    patching.get_act_patch_attn_head_q_by_pos: "attn.hook_q",
    patching.get_act_patch_attn_head_k_by_pos: "attn.hook_k",
    patching.get_act_patch_attn_head_v_by_pos: "attn.hook_v",
}
ALL_POS = {
    patching.get_act_patch_attn_head_out_all_pos: "attn.hook_z",
    patching.get_act_patch_attn_head_q_all_pos: "attn.hook_q",
    patching.get_act_patch_attn_head_k_all_pos: "attn.hook_k",
    patching.get_act_patch_attn_head_v_all_pos: "attn.hook_v",
}


@pytest.fixture(params=tiny.others_slow(["qwen3_vl"], of=FEW))
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[mmlens.HookedVLM, Prompt, ActivationCache]]:
    """A model, a batch of two corrupted prompts, and the cache of two clean ones with other images."""
    model = hooked(request.param)
    with torch.no_grad():
        clean, corrupted = two_small_prompts(model, 0), two_small_prompts(model, 5)
        # The vision tower has run once for all patches.
        corrupted = model.encode_images(corrupted)
        assert clean.shape == corrupted.shape
        logits, cache = model.run_with_cache(clean)
        assert (logit_gap(logits) - logit_gap(model(corrupted))).abs() > 1e-3
        yield model, corrupted, cache


def some_positions(prompt: Prompt) -> list[int]:
    """The first and the last visual position and the last of all."""
    image = prompt.token_map.is_image[0].nonzero().flatten()
    return [int(image[0]), int(image[-1]), prompt.shape[1] - 1]


def n_heads_of(model: mmlens.HookedVLM, name: str) -> int:
    return model.cfg.n_key_value_heads if name.endswith(("hook_k", "hook_v")) else model.cfg.n_heads


def test_patching_the_stream(pair: tuple[mmlens.HookedVLM, Prompt, ActivationCache]) -> None:
    model, corrupted, cache = pair
    cells = list(itertools.product(range(model.cfg.n_layers), some_positions(corrupted)))
    rows = pd.DataFrame(cells, columns=["layer", "pos"])
    for function, name in STREAM.items():
        patched = function(model, corrupted, cache, logit_gap, index_axis_names=None, index_df=rows)
        expected = by_hand(model, corrupted, cache, name, cells, lambda cell: (EVERY, cell[1]))
        torch.testing.assert_close(patched, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.slow
def test_patching_the_stream_in_whole() -> None:
    model = hooked("qwen3_vl")
    clean, corrupted = small_prompt(model, 0), model.encode_images(small_prompt(model, 5))
    _, cache = model.run_with_cache(clean)
    shape = (model.cfg.n_layers, corrupted.shape[1])
    cells = list(itertools.product(*map(range, shape)))
    every = patching.get_act_patch_block_every(model, corrupted, cache, logit_gap)
    for table, name in zip(every, ("hook_resid_pre", "hook_attn_out", "hook_mlp_out"), strict=True):
        expected = by_hand(model, corrupted, cache, name, cells, lambda cell: (EVERY, cell[1]))
        assert table.shape == shape
        torch.testing.assert_close(table.flatten(), expected, atol=1e-5, rtol=1e-5)
    # Patches at image positions do something: that is where the two prompts differ.
    effect = every[0, 1] - logit_gap(model(corrupted))
    is_image = corrupted.token_map.is_image[0]
    assert effect[is_image].abs().max() > 1e-4 and effect[: int(is_image.int().argmax())].abs().max() < 1e-6


def test_patching_heads_at_all_positions(pair: tuple[mmlens.HookedVLM, Prompt, ActivationCache]) -> None:
    model, corrupted, cache = pair
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    tables = []
    for function, name in ALL_POS.items():
        patched = function(model, corrupted, cache, logit_gap)
        assert patched.shape == (n_layers, n_heads_of(model, name))
        cells = list(itertools.product(*map(range, patched.shape)))
        expected = by_hand(model, corrupted, cache, name, cells, lambda cell: (EVERY, EVERY, cell[1]))
        torch.testing.assert_close(patched.flatten(), expected, atol=1e-5, rtol=1e-5)
        tables.append(torch.nn.functional.pad(patched, (0, n_heads - patched.shape[1])))
    patched = patching.get_act_patch_attn_head_pattern_all_pos(model, corrupted, cache, logit_gap)
    cells = list(itertools.product(range(n_layers), range(n_heads)))
    expected = by_hand(model, corrupted, cache, "attn.hook_pattern", cells, lambda cell: (EVERY, cell[1]))
    torch.testing.assert_close(patched.flatten(), expected, atol=1e-5, rtol=1e-5)
    every = patching.get_act_patch_attn_head_all_pos_every(model, corrupted, cache, logit_gap)
    torch.testing.assert_close(every, torch.stack([*tables, patched]))
    per_example = patching.get_act_patch_attn_head_out_all_pos(
        model,
        corrupted,
        cache,
        lambda logits: logits[:, -1, 7] - logits[:, -1, 11],
        reduce="none",
        baseline=True,
    )
    torch.testing.assert_close(per_example.mean(), tables[0])


def test_patching_heads_by_position(pair: tuple[mmlens.HookedVLM, Prompt, ActivationCache]) -> None:
    """On some cells of each table (image positions, question, last): the whole has thousands."""
    model, corrupted, cache = pair
    positions = some_positions(corrupted)
    for function, name in BY_POS.items():
        heads = range(n_heads_of(model, name))
        cells = list(itertools.product((0, 2), positions, heads))
        rows = pd.DataFrame(cells, columns=["layer", "pos", "head"])
        patched = function(model, corrupted, cache, logit_gap, index_axis_names=None, index_df=rows)
        expected = by_hand(model, corrupted, cache, name, cells, lambda cell: (EVERY, cell[1], cell[2]))
        torch.testing.assert_close(patched, expected, atol=1e-5, rtol=1e-5)
    pattern = "attn.hook_pattern"
    cells = list(itertools.product((0, 2), range(model.cfg.n_heads), positions))
    rows = pd.DataFrame(cells, columns=["layer", "head_index", "dest_pos"])
    patched = patching.get_act_patch_attn_head_pattern_by_pos(
        model, corrupted, cache, logit_gap, index_axis_names=None, index_df=rows
    )
    expected = by_hand(model, corrupted, cache, pattern, cells, lambda cell: (EVERY, cell[1], cell[2]))
    torch.testing.assert_close(patched, expected, atol=1e-5, rtol=1e-5)
    cells = list(itertools.product((0, 2), (1,), positions, positions))
    rows = pd.DataFrame(cells, columns=["layer", "head_index", "dest_pos", "src_pos"])
    patched = patching.get_act_patch_attn_head_pattern_dest_src_pos(
        model, corrupted, cache, logit_gap, index_axis_names=None, index_df=rows
    )
    expected = by_hand(model, corrupted, cache, pattern, cells, lambda cell: (EVERY, *cell[1:]))
    torch.testing.assert_close(patched, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.slow
def test_patching_by_position_in_whole() -> None:
    """The wrapper over all tables: one text-only pair, short enough for every cell."""
    model = hooked("llava")
    clean, corrupted = model.to_tokens("What is K?"), model.to_tokens("What is S?")
    assert clean.shape == corrupted.shape
    _, cache = model.run_with_cache(clean)
    every = patching.get_act_patch_attn_head_by_pos_every(model, corrupted, cache, logit_gap)
    assert every.shape == (5, model.cfg.n_layers, corrupted.shape[1], model.cfg.n_heads)
    cells = list(
        itertools.product(range(model.cfg.n_layers), range(corrupted.shape[1]), range(model.cfg.n_heads))
    )
    for table, name in ((0, "attn.hook_z"), (1, "attn.hook_q")):
        expected = by_hand(model, corrupted, cache, name, cells, lambda cell: (EVERY, cell[1], cell[2]))
        torch.testing.assert_close(every[table].flatten(), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", [*FEW, "fuyu"])
def test_patching_direct_paths_between_heads(family: str) -> None:
    """Against arithmetic by hand: W_Q of the receiving head on the norm of its own edited copy of the stream."""
    model = hooked(family)
    clean, corrupted = small_prompt(model, 0), small_prompt(model, 5)
    _, clean_cache = model.run_with_cache(clean)
    _, cache = model.run_with_cache(corrupted)
    source = 1
    patched = patching.get_act_patch_direct_path(
        model, corrupted, clean_cache, cache, logit_gap, src_layer=0, src_head=source, verbose=False
    )
    assert not patched[0].any()
    w_o = model.blocks[0].attn.W_O[source]
    delta = (clean_cache["z", 0][:, :, source] - cache["z", 0][:, :, source]) @ w_o
    for layer, head in itertools.product((1, 2), range(model.cfg.n_heads)):
        attn = model.blocks[layer].attn
        copy = model.blocks[layer].ln1(cache["resid_pre", layer] + delta)
        query = copy @ attn.W_Q[head] + attn.b_Q[head]

        def paste(q: Tensor, hook: object, head: int = head, query: Tensor = query) -> Tensor:
            q = q.clone()
            q[:, :, head] = query
            return q

        expected = model.run_with_hooks(corrupted, fwd_hooks=[(f"blocks.{layer}.attn.hook_q", paste)])
        torch.testing.assert_close(patched[layer, head], logit_gap(expected), atol=1e-5, rtol=1e-4)
    assert (patched[1:] - logit_gap(model(corrupted))).abs().max() > 1e-5
    assert not model.cfg.use_split_qkv_input
    if model.cfg.n_key_value_heads < model.cfg.n_heads:
        with pytest.raises(ValueError, match="GQA"):
            patching.get_act_patch_direct_path(model, corrupted, clean_cache, cache, logit_gap, 0, 0, "v")
    else:
        values = patching.get_act_patch_direct_path(
            model, corrupted, clean_cache, cache, logit_gap, 0, source, "v", verbose=False
        )
        ln1, attn = model.blocks[1].ln1, model.blocks[1].attn

        def paste_v(v: Tensor, hook: object) -> Tensor:
            v = v.clone()
            v[:, :, 2] = ln1(cache["resid_pre", 1] + delta) @ attn.W_V[2] + attn.b_V[2]
            return v

        expected = model.run_with_hooks(corrupted, fwd_hooks=[("blocks.1.attn.hook_v", paste_v)])
        torch.testing.assert_close(values[1, 2], logit_gap(expected), atol=1e-5, rtol=1e-4)


def test_direct_paths_are_refused_where_a_norm_stands_behind_the_heads() -> None:
    model = hooked("gemma3")
    prompt = small_prompt(model)
    with torch.no_grad():
        _, cache = model.run_with_cache(prompt)
    with pytest.raises(ValueError, match="normalized or scaled before the residual add"):
        patching.get_act_patch_direct_path(model, prompt, cache, cache, logit_gap, 0, 0)


# ---------------------------------------------------------------------- tokens and heads


@torch.no_grad()
def test_detecting_heads_in_a_prompt_with_images(model: mmlens.HookedVLM) -> None:
    prompt = two_image_prompt(model)
    _, cache = model.run_with_cache(prompt, remove_batch_dim=True)
    ids = prompt.inputs["input_ids"][0].tolist()
    is_image = prompt.token_map.is_image[0].tolist()
    n = len(ids)
    same = [[i > j and ids[i] == ids[j] and not is_image[i] for j in range(n)] for i in range(n)]
    wanted = {
        "previous_token_head": [[i == j + 1 for j in range(n)] for i in range(n)],
        "duplicate_token_head": same,
        "induction_head": [[j > 0 and j <= i and same[i][j - 1] for j in range(n)] for i in range(n)],
    }
    assert sum(map(sum, same)) > 0
    for name, pairs in wanted.items():
        scores = head_detector.detect_head(model, prompt, name, cache=cache)
        for layer in range(model.cfg.n_layers):
            pattern = cache["pattern", layer]
            expected = (pattern * torch.tensor(pairs)).sum((-2, -1)) / pattern.sum((-2, -1))
            torch.testing.assert_close(scores[layer], expected)
    # Without the cache TransformerLens would run the model on token ids alone.
    with pytest.raises(ValueError, match="token ids alone bring no image"):
        head_detector.detect_head(model, prompt, "previous_token_head")


@torch.no_grad()
def test_text_goes_in_as_tokens_and_images_do_not() -> None:
    model = hooked("qwen3_vl")
    tokens = model.to_tokens("What is it?")
    plain = model.hf_model(input_ids=tokens).logits
    torch.testing.assert_close(model(tokens), plain)
    batch = model.to_tokens(["What colour is the letter K?", "What is it?"])
    assert (batch[1] == model.tokenizer.pad_token_id).any()
    torch.testing.assert_close(model(batch)[1, -1], plain[0, -1], atol=1e-4, rtol=1e-4)
    prompt = two_image_prompt(model)
    for ids in (prompt.inputs["input_ids"], model.to_tokens(prompt)):
        with pytest.raises(ValueError, match="token ids alone bring no image"):
            model(ids)
    with pytest.raises(TypeError, match="integers"):
        model(torch.zeros(1, 3))


def test_tokens_and_text() -> None:
    model = hooked("llava")
    tokenizer = model.tokenizer
    text = "What colour?"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert model.to_tokens(text, prepend_bos=False).tolist() == [ids]
    assert "".join(model.to_str_tokens(text, prepend_bos=False)) == text
    assert model.to_string(ids) == text and model.to_string(torch.tensor([ids, ids])) == [text, text]
    assert model.to_single_token(tokenizer.decode(ids[:1])) == ids[0]
    assert model.to_single_str_token(ids[0]) == tokenizer.decode(ids[:1])
    assert model.to_str_tokens([text, text], prepend_bos=False)[1] == model.to_str_tokens(torch.tensor(ids))
    with pytest.raises(ValueError, match=f"{len(ids)} tokens, not one"):
        model.to_single_token(text)
    word = tokenizer.decode(ids[:1])
    directions = model.tokens_to_residual_directions(word)
    assert torch.equal(directions, model.tokens_to_residual_directions(torch.tensor([[ids[0]]])))
    assert torch.equal(directions, model.residual_directions(torch.tensor(ids))[0])
    bare = mmlens.HookedVLM(tiny.tiny_model("llava"))
    with pytest.raises(ValueError, match="no tokenizer"):
        bare.to_tokens(text)


def test_positions_have_names(model: mmlens.HookedVLM) -> None:
    prompt = padded_prompt(model)
    for example in range(2):
        names = model.to_str_tokens(prompt, example=example)
        places = [prompt.token_map.where(position, example) for position in range(prompt.shape[1])]
        for name, place, token in zip(
            names, places, prompt.inputs["input_ids"][example].tolist(), strict=True
        ):
            if place.kind == "patch":
                assert name.endswith(f" r{place.row}c{place.col}>") and name.startswith(f"<img{place.image} ")
                tiles = {
                    other.tile for other in places if other.image == place.image and other.tile is not None
                }
                assert (f" t{place.tile} " in name) == (len(tiles) > 1)
            elif place.kind == "separator":
                assert name == f"<img{place.image} sep>"
            else:
                assert name == model.tokenizer.decode([token])
        patches = [name for name, place in zip(names, places, strict=True) if place.kind == "patch"]
        assert len(set(patches)) == len(patches)


@torch.no_grad()
def test_circuitsvis_shows_patterns_over_patches() -> None:
    attention = pytest.importorskip("circuitsvis").attention
    model = hooked("qwen3_vl")
    prompt = small_prompt(model)
    _, cache = model.run_with_cache(prompt, remove_batch_dim=True)
    labels, pattern = model.to_str_tokens(prompt), cache["pattern", 1]
    assert len(labels) == pattern.shape[-1] == prompt.shape[1]
    html = attention.attention_patterns(tokens=labels, attention=pattern).show_code()
    assert "<img0 r1c1>" in html and f"{float(pattern[2, -1, 4]):.4f}"[:5] in html


def test_the_page_about_the_tools_says_what_happens() -> None:
    page = (Path(__file__).parents[2] / "docs" / "transformer-lens.md").read_text()
    section = page[page.index("## TransformerLens' tools") :].split("\n## ")[0]
    code = "\n".join(re.findall(r"```python\n(.*?)```", section, re.S))
    names: dict[str, Tensor] = {}
    with torch.no_grad():
        exec(compile(code, "docs/transformer-lens.md", "exec"), names)
    answer, logits = names["answer"], names["logits"]
    torch.testing.assert_close(names["direct"].attribution.sum(), logits[0, -1, answer], **CLOSE)
    assert names["per_head"].shape == (64, 1) and names["table"].shape == (8, 8)
    assert names["lens"].rank_trajectory()[-1] == 0


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "decomposes", "message"),
    [
        ("muse_spark", False, "layers of 'muse_spark' do more than add"),
        ("gemma4", False, "layers of 'gemma4' do more than add"),
        ("qwen3_5", True, "have no attention heads"),
        ("step3p7", True, "have another number of heads than cfg.n_heads"),
    ],
)
def test_parts_that_do_not_sum_to_the_stream_are_refused(family: str, decomposes: bool, message: str) -> None:
    model = mmlens.HookedVLM(tiny.tiny_model(family))
    _, cache = model.run_with_cache(
        tiny.tiny_inputs(family), names_filter=lambda name: name.startswith(("blocks.", "hook_"))
    )
    with pytest.raises(ValueError, match=message):
        cache.stack_head_results()
    if decomposes:
        total = cache.decompose_resid(layer=-1).sum(0)
        torch.testing.assert_close(total, cache["resid_post", model.cfg.n_layers - 1], atol=1e-4, rtol=1e-4)
    else:
        with pytest.raises(ValueError, match=message):
            cache.decompose_resid()
        with pytest.raises(ValueError, match=message):
            cache.get_full_resid_decomposition()
    assert len(model.all_head_labels) == len(model.heads)
