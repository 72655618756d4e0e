"""Grids of patches against TransformerLens' own patching, and against effects taken one by one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from tiny.wrapped import hooked
from torch import Tensor
from transformer_lens import patching

import mmlens
from mmlens.effects.grids import (
    grid,
    patch_heads,
    patch_heads_qkv,
    patch_layers,
    patch_layers_positions,
    patch_layers_regions,
)
from mmlens.effects.sweeps import sweep
from mmlens.model.hooks import Intervention, UnknownHookError
from mmlens.model.prompt import Prompt

pytestmark = pytest.mark.filterwarnings("ignore::mmlens.model.hooks.NoChangeWarning")


def pair(model: mmlens.HookedVLM) -> tuple[Prompt, Prompt]:
    """A batch of two clean and of two corrupted prompts: other images."""
    made = []
    for seed in (0, 5):
        images = tiny.tiny_images(2, seed=seed, sizes=[(32, 32), (32, 32)])
        made.append(model.prompt(["K?", "S?"], images=[images[:1], images[1:]]))
    return made[0], made[1]


def gap(logits: Tensor, prompt: Prompt | None = None) -> Tensor:
    return logits[:, -1, 7] - logits[:, -1, 11]


def mean_gap(logits: Tensor) -> Tensor:
    return gap(logits).mean()


STREAM = {
    "hook_resid_pre": patching.get_act_patch_resid_pre,
    "hook_resid_mid": patching.get_act_patch_resid_mid,
    "hook_attn_out": patching.get_act_patch_attn_out,
    "hook_mlp_out": patching.get_act_patch_mlp_out,
}


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_grids_are_those_of_transformer_lens(family: str) -> None:
    model = hooked(family)
    clean, corrupted = pair(model)
    _, cache = model.run_with_cache(clean)
    encoded = model.encode_images(corrupted)
    length = corrupted.shape[1]
    chosen = torch.zeros(tuple(corrupted.shape), dtype=torch.bool)
    chosen[:, [5, length - 4, length - 1]] = True
    cells = list(itertools.product(range(model.cfg.n_layers), [5, length - 4, length - 1]))
    for hook, theirs in STREAM.items():
        table = sweep(
            model,
            corrupted,
            patch_layers_positions(model, clean, hook, prompt=corrupted, positions=chosen),
            gap,
            progress=False,
        )
        ours = grid(table, quantity="value")
        assert ours.index.tolist() == [0, 1, 2] and ours.columns.tolist() == [5, length - 4, length - 1]
        expected = theirs(
            model,
            encoded,
            cache,
            mean_gap,
            index_axis_names=None,
            index_df=pd.DataFrame(cells, columns=["layer", "pos"]),
        )
        np.testing.assert_allclose(ours.to_numpy().flatten(), expected, atol=1e-5)
    table = sweep(model, corrupted, patch_heads_qkv(model, clean), gap, progress=False)
    ours = grid(table, quantity="value")
    for kind, theirs in (
        ("z", patching.get_act_patch_attn_head_out_all_pos),
        ("q", patching.get_act_patch_attn_head_q_all_pos),
        ("k", patching.get_act_patch_attn_head_k_all_pos),
        ("v", patching.get_act_patch_attn_head_v_all_pos),
        ("pattern", patching.get_act_patch_attn_head_pattern_all_pos),
    ):
        expected = theirs(model, encoded, cache, mean_gap)
        np.testing.assert_allclose(ours.xs(kind, axis=1, level=1), expected, atol=1e-5)


@torch.no_grad()
def test_a_sweep_of_patches_equals_effects_one_by_one(family: str) -> None:
    """Partial and stacked runs hand patches parts of the prompt: every hook point, over a padded batch."""
    model = hooked(family)
    images = tiny.tiny_images(3, seed=1), tiny.tiny_images(3, seed=5)
    prompt, source = (
        model.prompt(["What colour is K?", "Where?"], images=[own[:2], own[2:]]) for own in images
    )
    mask = prompt.token_map.is_question | prompt.last
    mask |= prompt.token_map.is_image & (torch.arange(prompt.shape[1]) % 3 == 0)
    interventions: dict[object, Intervention] = {}
    for hook in (
        "hook_resid_pre",
        "hook_resid_post",
        "hook_mlp_out",
        "attn.hook_rot_q",
        "attn.hook_rot_k",
        "attn.hook_pattern",
        "attn.hook_attn_scores",
        "image.hook_z",
        "image.hook_mlp_out",
        "hook_deepstack",
    ):
        layers = [1] if f"blocks.1.{hook}" in model.hook_dict else []
        made = patch_layers(model, source, hook, positions=mask) if layers else {}
        interventions |= {(hook, layer): made[layer] for layer in layers}
    heads = patch_heads(model, source, "attn.hook_k", positions="question")
    interventions |= {("k", *head): heads[head] for head in list(heads)[2:4]}
    for positions in ("last", None):
        more = patch_layers(model, source, "attn.hook_pattern", positions=positions)
        interventions[positions, 2] = more[2]
    table = sweep(model, prompt, interventions, gap, progress=False)
    for label, intervention in interventions.items():
        alone = mmlens.effect(model, prompt, intervention, gap)
        rows = table[[own == label for own in table["intervention"]]]
        np.testing.assert_allclose(rows["value"], alone.values, atol=1e-5, err_msg=str(label))
        np.testing.assert_allclose(rows["clean"], alone.clean, atol=1e-5)


@torch.no_grad()
def test_regions_of_a_data_set(micro: mmlens.HookedVLM) -> None:
    """Each example's image is replaced by another: the evidence box and the rest of the image together restore it."""
    examples = mmlens.scene_examples("objects", 6, seed=1)
    others = mmlens.scene_examples("objects", 6, seed=2)
    clean = micro.prompt_examples(examples)
    corrupted = micro.prompt_examples(
        [
            mmlens.Example(e.question, e.answer, o.images, candidates=e.candidates)
            for e, o in zip(examples, others, strict=True)
        ]
    )
    evidence = clean.token_map.evidence(examples)
    regions = {
        "evidence": evidence,
        "elsewhere": clean.token_map.is_image & ~evidence,
        "image": "image",
        "text": lambda prompt: ~prompt.token_map.is_image & ~prompt.token_map.is_padding,
    }
    metric = mmlens.answer_log_probability
    table = sweep(
        micro, corrupted, patch_layers_regions(micro, clean, regions=regions), metric, progress=False
    )
    found, reached = grid(table), grid(table, quantity="value")
    assert found.columns.tolist() == list(regions) and len(found) == micro.cfg.n_layers
    with_clean = float(metric(micro(clean), clean).mean())
    assert reached.loc[0, "image"] == pytest.approx(with_clean, abs=1e-4)
    assert found.loc[0, "text"] == pytest.approx(0, abs=1e-6)
    assert found.loc[0, "evidence"] > 0.5 * found.loc[0, "image"] > 0
    assert found.loc[0, "evidence"] > found.loc[0, "elsewhere"]


def test_labels_follow_the_model() -> None:
    """Layers and heads that there are, in models whose layers differ."""
    model = hooked("qwen3_vl")
    clean, corrupted = pair(model)
    mask = corrupted.last | corrupted.token_map.is_question
    made = patch_layers_positions(model, clean, "attn.hook_z", prompt=corrupted, positions=mask)
    columns = mask.any(0).nonzero().flatten().tolist()
    assert list(made) == list(itertools.product(range(3), columns))
    assert list(patch_layers_positions(model, clean, prompt=corrupted)) == list(
        itertools.product(range(3), range(corrupted.shape[1]))
    )
    kv_heads = list(itertools.product(range(3), range(2)))
    assert list(patch_heads(model, clean, "attn.hook_v")) == kv_heads
    assert list(patch_heads(model, clean)) == model.heads
    kinds = patch_heads_qkv(model, clean, parts=["v", "pattern"])
    assert list(kinds) == [(*head, "v") for head in kv_heads] + [(*head, "pattern") for head in model.heads]
    hybrid = mmlens.HookedVLM(tiny.tiny_model("qwen3_5"))
    attended = hybrid.grid.layers
    assert 0 < len(attended) < hybrid.cfg.n_layers
    assert list(patch_layers(hybrid, clean, "attn.hook_pattern")) == attended
    assert list(patch_heads(hybrid, clean)) == hybrid.heads


def test_bad_grids_are_errors() -> None:
    model = hooked("llava")
    clean, corrupted = pair(model)
    with pytest.raises(UnknownHookError, match=r"'hook_residpre'; the nearest: 'hook_resid_pre'"):
        patch_layers(model, clean, "hook_residpre")
    with pytest.raises(ValueError, match=r"hook_mlp_out is \[batch, pos, d_model\]: it has no heads"):
        patch_heads(model, clean, "hook_mlp_out")
    with pytest.raises(ValueError, match=r"no part 'patern'; the nearest: 'pattern'"):
        patch_heads_qkv(model, clean, parts=["patern"])
    with pytest.raises(ValueError, match="regions is empty"):
        patch_layers_regions(model, clean, regions={})
    with pytest.raises(ValueError, match=r"named positions 'lst'; the nearest: 'last'"):
        patch_layers_positions(model, clean, prompt=corrupted, positions="lst")


def a_table() -> pd.DataFrame:
    rows = [
        ((layer, head, kind), example, metric, 10 * layer + head + example, 1.0)
        for layer, head, kind in ((2, 0, "q"), (2, 1, "q"), (0, 0, "v"))
        for example in range(2)
        for metric in ("one", "two")
    ]
    return pd.DataFrame(rows, columns=["intervention", "example", "metric", "value", "clean"])


def test_a_grid_holds_means_over_examples_in_the_tables_order() -> None:
    found = grid(a_table(), "two")
    assert found.index.tolist() == [2, 0] and found.index.name == "layer"
    assert found.columns.tolist() == [(0, "q"), (1, "q"), (0, "v")]
    assert found.loc[2, (1, "q")] == (21 + 22) / 2 - 1 and found.loc[0, (0, "v")] == 0.5 - 1
    assert math.isnan(found.loc[2, (0, "v")]) and math.isnan(found.loc[0, (0, "q")])
    assert grid(a_table(), "one", quantity="clean").loc[2, (0, "q")] == 1
    by_layer = a_table().assign(intervention=[label[0] for label in a_table()["intervention"]])
    alone = grid(by_layer, "one", quantity="value")
    assert alone.columns.tolist() == ["value"] and alone.loc[2, "value"] == (20 + 21 + 21 + 22) / 4


def test_tables_that_are_no_grid_are_errors() -> None:
    table = a_table()
    with pytest.raises(ValueError, match="the table holds the metrics 'one', 'two': name one"):
        grid(table)
    with pytest.raises(ValueError, match=r"no metric in the table 'tow'; the nearest: 'two'"):
        grid(table, "tow")
    with pytest.raises(ValueError, match=r"no quantity 'values'; the nearest: 'value'"):
        grid(table, "one", quantity="values")
    with pytest.raises(ValueError, match="has no rows"):
        grid(table.iloc[:0])
    with pytest.raises(ValueError, match="lacks the columns"):
        grid(table.drop(columns="intervention"))
    mixed = table.assign(intervention=[(0, 1) if i else (0,) for i in range(len(table))])
    with pytest.raises(ValueError, match="all alike"):
        grid(mixed, "one")
