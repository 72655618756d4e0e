"""Compositions against one pass of plain hooks, while generating against the same edits written out by position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import tiny
import torch
from tiny.wrapped import QUESTION, generate, hooked, padded_prompt, two_image_prompt
from torch import Tensor

import mmlens
from mmlens.data.examples import Example
from mmlens.interventions.attention_edges import bias_attention, knockout, scale_heads
from mmlens.interventions.composition import by_layer, compose, during, edit_report, relay
from mmlens.interventions.edits import Edit
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import Hook, Intervention
from mmlens.model.prompt import Prompt


def add(name: str, amount: float, positions: Any = None) -> Intervention:
    return lambda model, prompt: [
        (name, Edit(model, prompt, name, lambda x, here: x + amount, positions=positions))
    ]


def double(name: str) -> Intervention:
    return lambda model, prompt: [(name, Edit(model, prompt, name, lambda x, here: 2 * x))]


def examples(n: int, seed: int) -> list[Example]:
    images = tiny.tiny_images(n, seed=seed)
    questions = [QUESTION, "Where is the red square?"]
    return [
        Example(question=questions[i % 2], answer="seven", images=(images[i],), id=f"e{seed}-{i}")
        for i in range(n)
    ]


STREAM = "blocks.1.hook_resid_pre"


# ---------------------------------------------------------------------- order


@torch.no_grad()
def test_on_one_hook_point_they_act_in_the_order_given() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    _, clean = model.run_with_cache(prompt, names_filter=STREAM)
    for parts, expected in (
        ((add(STREAM, 1.0), double(STREAM)), 2 * (clean[STREAM] + 1)),
        ((double(STREAM), add(STREAM, 1.0)), 2 * clean[STREAM] + 1),
    ):
        with model.hooks(fwd_hooks=compose(*parts)(model, prompt)):
            _, under = model.run_with_cache(prompt, names_filter=STREAM)
        assert torch.equal(under[STREAM], expected)
    # Between hook points the forward pass decides.
    early_last = compose(double("blocks.2.hook_resid_pre"), add(STREAM, 1.0))
    early_first = compose(add(STREAM, 1.0), double("blocks.2.hook_resid_pre"))
    logits = [
        model.run_with_hooks(prompt, fwd_hooks=both(model, prompt)) for both in (early_last, early_first)
    ]
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match="at least one"):
        compose()


# ---------------------------------------------------------------------- while generating


def by_hand(
    model: HookedVLM, prompt: Prompt, name: str, where: Callable[[int], Tensor]
) -> tuple[Tensor, Tensor]:
    """Greedy decoding without a cache: adds 1 to the stream where `where(length)` [batch, length] says."""
    inputs, logits = dict(prompt.inputs), []
    for _ in range(4):
        mask = where(inputs["input_ids"].shape[1])
        hook = (name, lambda x, hook, mask=mask: x + 1.0 * mask[..., None])
        out = model.run_with_hooks(inputs, fwd_hooks=[hook])[:, -1]
        logits.append(out)
        out = out.index_fill(-1, torch.tensor(model.hf_model.generation_config.eos_token_id or 0), -torch.inf)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], out.argmax(-1, keepdim=True)], -1)
        inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    return inputs["input_ids"], torch.stack(logits)


@torch.no_grad()
@pytest.mark.parametrize("when", ("prompt", "decode", "both"))
@pytest.mark.parametrize("kind", ("edit", "edit at the question", "plain", "plain, in place"))
def test_during_edits_the_same_positions_with_and_without_the_cache(kind: str, when: str) -> None:
    model = hooked("internvl")
    model.hf_model.generation_config.eos_token_id = 5
    prompt = padded_prompt(model)

    def in_place(x: Tensor, hook: Any) -> None:
        x += 1.0

    intervention = {
        "edit": add(STREAM, 1.0),
        "edit at the question": add(STREAM, 1.0, "question"),
        "plain": lambda model, prompt: [(STREAM, lambda x, hook: x + 1.0)],
        "plain, in place": lambda model, prompt: [(lambda name: name == STREAM, in_place)],
    }[kind]
    length = prompt.shape[1]
    at_prompt = (
        prompt.token_map.is_question if "question" in kind else torch.ones(prompt.shape, dtype=torch.bool)
    )

    def where(n: int) -> Tensor:
        generated = torch.full((len(prompt), n - length), when != "prompt")
        return torch.cat([at_prompt & (when != "decode"), generated], dim=1)

    ids, logits = by_hand(model, prompt, STREAM, where)
    for options in ({}, {"use_cache": False}):
        hooks = during(intervention, when)(model, prompt)
        given, given_logits = generate(model, prompt, 4, hooks, **options)
        assert torch.equal(given, ids)
        torch.testing.assert_close(given_logits, logits, atol=1e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("when", ("prompt", "decode", "both"))
def test_during_restricts_every_kind_of_intervention_alike(when: str) -> None:
    """With and without the cache, on keys, scores, relays and sliding windows."""
    for family in ("qwen3_vl", "gemma3"):
        model = hooked(family)
        prompt = padded_prompt(model)

        def on_keys(model: HookedVLM, prompt: Prompt) -> list[Hook]:
            return [("blocks.0.attn.hook_rot_k", lambda x, hook: x * 1.5)]

        parts = [
            knockout("question", "image"),
            bias_attention([(1, 2)], "image", 2.0),
            scale_heads([(1, 0)], 3.0, "text"),
            relay("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", lambda x, source: x - source),
            on_keys,
        ]
        # Keys that were prompt keys stay so: the cached run meets them again in every step.
        clean = generate(model, prompt, 4, [])[1]
        for part in parts:
            runs = []
            for options in ({}, {"use_cache": False}):
                hooks = during(part, when)(model, prompt)
                runs.append(generate(model, prompt, 4, hooks, **options)[1])
            torch.testing.assert_close(*runs, atol=2e-4, rtol=1e-3)
            assert (runs[0] - clean)[1:].abs().max() > 1e-4
            # The first token is predicted by the prompt alone.
            untouched = (runs[0] - clean)[0].abs().max() < 1e-4
            assert bool(untouched) == (when == "decode")


@torch.no_grad()
def test_a_plain_function_is_handed_the_prompts_positions_alone() -> None:
    """A function that counts from the end means the prompt's end, with and without the cache."""
    model = hooked("internvl")
    prompt = padded_prompt(model)

    def on_last(x: Tensor, hook: Any) -> None:
        assert x.shape[1] == prompt.shape[1]
        x[:, -1] += 1.0

    _, expected = generate(model, prompt, 4, during(add(STREAM, 1.0, "last"), "prompt")(model, prompt))
    for options in ({}, {"use_cache": False}):
        hooks = during(lambda model, prompt: [(STREAM, on_last)], "prompt")(model, prompt)
        _, given = generate(model, prompt, 4, hooks, **options)
        torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_during_on_the_prompts_images() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)

    def on_pixels(model: HookedVLM, prompt: Prompt) -> list[Hook]:
        return [("vision.hook_embed", lambda x, hook: x * 2), ("image.hook_embed", lambda x, hook: x + 1)]

    clean = model.run_with_hooks(prompt, fwd_hooks=on_pixels(model, prompt))
    assert torch.equal(
        model.run_with_hooks(prompt, fwd_hooks=during(on_pixels, "prompt")(model, prompt)), clean
    )
    with pytest.raises(ValueError, match="vision.hook_embed holds the prompt's images"):
        during(on_pixels, "decode")(model, prompt)
    with pytest.raises(ValueError, match="nearest: 'decode'"):
        during(on_pixels, "decoding")
    # The original edits are left alone.
    hooks = add(STREAM, 1.0)(model, prompt)
    during(lambda *_: hooks, "prompt")(model, prompt)
    assert hooks[0][1].generated and hooks[0][1].mask is None


# ---------------------------------------------------------------------- by layer


@torch.no_grad()
def test_a_schedule_is_the_composition_of_its_layers() -> None:
    model = hooked("llava")
    prompt = padded_prompt(model)
    expected = compose(mmlens.ablate([(0, 1)]), scale_heads([(1, 0), (2, 0)], 2.0))
    reference = model.run_with_hooks(prompt, fwd_hooks=expected(model, prompt))

    def schedule(layer: int) -> Intervention | None:
        return scale_heads([(layer, 0)], 2.0) if layer else mmlens.ablate([(0, 1)])

    for given in ({0: mmlens.ablate([(0, 1)]), range(1, 3): scale_heads([(1, 0), (2, 0)], 2.0)}, schedule):
        under = model.run_with_hooks(prompt, fwd_hooks=by_layer(given)(model, prompt))
        assert torch.equal(under, reference)
    with pytest.raises(
        ValueError, match=r"for layers 0 to 1 hooks blocks\.2\.attn\.hook_z, which is outside"
    ):
        by_layer({range(0, 2): scale_heads([(1, 0), (2, 0)], 2.0)})(model, prompt)
    with pytest.raises(ValueError, match=r"vision\.hook_embed, which is outside"):
        by_layer({1: lambda model, prompt: [("vision.hook_embed", lambda x, hook: x)]})(model, prompt)
    for layers in (3, -1, range(2, 4), range(0)):
        with pytest.raises(IndexError, match="out of range; the model has 3 layers"):
            by_layer({layers: mmlens.ablate([(0, 1)])})(model, prompt)
    with pytest.raises(ValueError, match="no intervention for any layer"):
        by_layer(lambda layer: None)(model, prompt)
    with pytest.raises(ValueError, match="empty"):
        by_layer({})


# ---------------------------------------------------------------------- relay


@torch.no_grad()
@pytest.mark.parametrize("positions", (None, "question"))
def test_a_relay_writes_what_stood_elsewhere_in_the_same_run(family: str, positions: str | None) -> None:
    """With an ablation before it, so that what it reads is that run's own."""
    model = hooked(family)
    prompt = padded_prompt(model)
    read, write = "blocks.0.hook_resid_mid", "blocks.2.hook_resid_pre"
    earlier = mmlens.ablate([(0, 1), (0, 2)])
    with model.hooks(fwd_hooks=earlier(model, prompt)):
        _, seen = model.run_with_cache(prompt, names_filter=[read, write])
    expected = seen[write] - 0.5 * seen[read]
    if positions:
        expected = torch.where(prompt.token_map.is_question[..., None], expected, seen[write])
    whole = compose(earlier, relay(read, write, lambda x, source: x - 0.5 * source, positions=positions))
    hooks = whole(model, prompt)
    for _ in range(2):
        with model.hooks(fwd_hooks=hooks):
            _, under = model.run_with_cache(prompt, names_filter=write)
        torch.testing.assert_close(under[write], expected, atol=1e-5, rtol=1e-5)
    assert hooks[-2][1].first_position == hooks[-1][1].first_position

    # What a later function writes there, in place, is not what was read.
    def in_place(x: Tensor, hook: Any) -> None:
        x += 1.0

    both = compose(relay(read, write, lambda x, source: source), lambda model, prompt: [(read, in_place)])
    _, clean = model.run_with_cache(prompt, names_filter=read)
    with model.hooks(fwd_hooks=both(model, prompt)):
        _, under = model.run_with_cache(prompt, names_filter=write)
    assert torch.equal(under[write], clean[read])


@torch.no_grad()
def test_a_relay_from_head_to_head_and_at_image_positions() -> None:
    model = hooked("qwen2_5_vl")
    prompt = padded_prompt(model)

    def copy_head(x: Tensor, source: Tensor) -> Tensor:
        return x.index_copy(2, torch.tensor([3]), source[:, :, :1])

    _, clean = model.run_with_cache(prompt, names_filter=["blocks.0.attn.hook_z", "blocks.2.attn.hook_z"])
    hooks = relay("blocks.0.attn.hook_z", "blocks.2.attn.hook_z", copy_head)(model, prompt)
    with model.hooks(fwd_hooks=hooks):
        _, under = model.run_with_cache(prompt, names_filter="blocks.2.attn.hook_z")
    assert torch.equal(under["z", 2][:, :, 3], clean["z", 0][:, :, 0])
    assert torch.equal(under["z", 2][:, :, :3], clean["z", 2][:, :, :3])

    images = relay("image.hook_embed", "blocks.1.image.hook_resid_pre", lambda x, source: source)(
        model, prompt
    )
    # What the layer reads: hook_resid_pre itself fires before its image rows do.
    name = "blocks.1.hook_attn_in"
    _, embedded = model.run_with_cache(prompt, names_filter=["image.hook_embed", name])
    with model.hooks(fwd_hooks=images):
        _, under = model.run_with_cache(prompt, names_filter=name)
    mask = prompt.token_map.is_image
    assert torch.equal(under[name][mask], embedded["image.hook_embed"])
    assert torch.equal(under[name][~mask], embedded[name][~mask])


@torch.no_grad()
def test_bad_relays_are_errors() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)

    def build(read: str, write: str) -> None:
        relay(read, write, lambda x, source: x)(model, prompt)

    build("blocks.1.attn.hook_q", "blocks.1.attn.hook_pattern")
    build("hook_embed", "ln_final.hook_normalized")
    for read, write in (
        ("blocks.2.hook_resid_pre", "blocks.1.hook_resid_post"),
        ("blocks.1.hook_mlp_out", "blocks.1.hook_mlp_in"),
        ("blocks.1.attn.hook_z", "blocks.1.attn.hook_q_input"),
        ("ln_final.hook_scale", "blocks.2.hook_resid_post"),
        (STREAM, STREAM),
    ):
        with pytest.raises(ValueError, match="does not come after"):
            build(read, write)
    with pytest.raises(ValueError, match="no hook point of the language model"):
        build("vision.hook_embed", STREAM)
    with pytest.raises(ValueError, match="not over the same positions"):
        build("image.hook_embed", STREAM)
    with pytest.raises(mmlens.model.UnknownHookError, match="nearest"):
        build(STREAM, "blocks.1.hook_resid_prost")
    wrong = relay("blocks.0.attn.hook_z", STREAM, lambda x, source: source)(model, prompt)
    with pytest.raises(ValueError, match=r"of shape \[1, \d+, 64\], not \[1, \d+, 4, 16\]"):
        model.run_with_hooks(prompt, fwd_hooks=wrong)
    halves = relay("blocks.0.hook_resid_pre", STREAM, lambda x, source: source)(model, prompt)
    with pytest.raises(RuntimeError, match="had not fired before it"):
        model.run_with_hooks(prompt, fwd_hooks=halves[1:])


# ---------------------------------------------------------------------- report


@torch.no_grad()
def test_a_report_says_where_edits_fired_and_how_large_they_were() -> None:
    model = hooked("llava")
    prompt = padded_prompt(model)
    name = "blocks.1.attn.hook_z"
    _, clean = model.run_with_cache(prompt, names_filter=name)
    hooks = compose(
        scale_heads([(1, 2)], 3.0, "question"),
        knockout("last", "image", layers=0),
        lambda model, prompt: [("blocks.0.hook_resid_pre", lambda x, hook: None)],
    )(model, prompt)
    table = edit_report(hooks)
    assert list(table["hook"]) == [name, "blocks.0.attn.hook_attn_scores", "blocks.0.hook_resid_pre"]
    assert list(table["fired"][:2]) == [0, 0] and pd.isna(table["fired"][2])
    with model.hooks(fwd_hooks=hooks[:1]):
        model(prompt)
        model(prompt)
    row = edit_report(hooks).iloc[0]
    expected = 2 * clean["z", 1][prompt.token_map.is_question][:, 2].abs().max()
    assert row["fired"] == 2 and row["size"] == pytest.approx(float(expected))
    assert (row["heads"], row["positions"], row["generated"], row["measure"]) == (
        (2,),
        int(prompt.token_map.is_question.sum()),
        False,
        "element",
    )
    assert edit_report(hooks).iloc[1]["measure"] == "attention mass"
    assert list(edit_report([]).columns) == list(table.columns)
