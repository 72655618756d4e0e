"""Head scores and ablation in models whose layers differ: some without softmax attention, some with more heads or
wider ones, some whose queries are wider than their values.

Which heads each tiny model has, how wide they are and where they are projected is written down here by hand; the
expected numbers come from the plain model with PyTorch's own hooks, or from whole patterns.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor, nn

import mmlens
from mmlens.data.examples import Evidence, Example
from mmlens.data.scenes import KINDS, TEXT_KINDS
from mmlens.experiments import core_heads_claim
from mmlens.experiments.experiment import Setup
from mmlens.experiments.looking import question_attention
from mmlens.heads import HeadGrid
from mmlens.hook_names import block
from mmlens.interventions.ablation import Means, mean_activations
from mmlens.model.cross_attention import CrossAttentionError
from mmlens.model.prompt import Prompt
from mmlens.runs.run import write_findings
from mmlens.scores.retrieval import attention_mass, evidence_attention, ram, vision_mass
from mmlens.token_map import text_only_map


@dataclass(frozen=True)
class Heads:
    """The heads of one tiny model: {layer: (number of heads, width of q, width of z)}, and its projections' names."""

    layers: dict[int, tuple[int, int, int]]
    n_layers: int = 3
    q: str = "q_proj"
    out: str = "o_proj"
    attention: str = "layers.{}.self_attn"
    """Path of a layer's attention module from the decoder."""
    gated: bool = False
    """Whether each head's queries are followed by as many gates."""

    @property
    def per_layer(self) -> list[int]:
        return [self.layers.get(layer, (0,))[0] for layer in range(self.n_layers)]

    @property
    def every(self) -> list[tuple[int, int]]:
        return [(layer, head) for layer, (n_heads, *_) in self.layers.items() for head in range(n_heads)]


LETTERS = string.ascii_letters + string.digits
LATENT = (4, 24, 16)
FAMILIES = {
    "qwen3_5": Heads({1: (4, 16, 16), 2: (4, 16, 16)}, gated=True),
    "minicpmv4_6": Heads({1: (4, 16, 16), 2: (4, 16, 16)}, gated=True),
    "lfm2_vl": Heads({1: (4, 16, 16), 2: (4, 16, 16)}, out="out_proj"),
    "nemotron_h_omni": Heads({1: (4, 16, 16), 4: (4, 16, 16)}, n_layers=5, attention="model.layers.{}.mixer"),
    "step3p7": Heads({0: (4, 16, 16), 1: (8, 16, 16), 2: (4, 16, 16)}),
    "gemma4": Heads({0: (4, 16, 16), 1: (4, 32, 32), 2: (4, 16, 16), 3: (4, 32, 32)}, n_layers=4),
    "kimi_k25": Heads({0: LATENT, 1: LATENT, 2: LATENT}, q="q_b_proj"),
    "dots3_note": Heads({0: LATENT, 1: LATENT, 2: LATENT}, q="q_b_proj"),
    "glm5_next": Heads({1: LATENT, 2: LATENT}, q="q_b_proj"),
}


@functools.cache
def hooked(family: str) -> mmlens.HookedVLM:
    processor = tiny.tiny_processor(family) if family in ("qwen3_5", "minicpmv4_6") else None
    return mmlens.HookedVLM(tiny.tiny_model(family), processor)


@functools.cache
def plain(family: str) -> Any:
    return tiny.tiny_model(family)


@functools.cache
def prompt_of(family: str) -> Prompt:
    """A padded batch (two images, then one); its first text positions stand for the question."""
    inputs = tiny.tiny_inputs(family, [2, 1])
    mask = inputs["attention_mask"]
    assert not bool(mask.all()), "the batch is meant to hold padding"
    is_image = hooked(family).image_mask(inputs)
    assert is_image is not None and bool(is_image.any())
    text = (mask == 1) & ~is_image
    is_question = text & (text.cumsum(1) > text.sum(1, keepdim=True) - 4)
    where = replace(text_only_map(mask, is_question), is_image=is_image)
    return Prompt(inputs, where, ["?", "?"], [[], []], ["", ""])


def attention_of(family: str, layer: int) -> nn.Module:
    return plain(family).get_decoder().get_submodule(FAMILIES[family].attention.format(layer))


def projection(family: str, layer: int, name: str) -> nn.Module:
    return getattr(attention_of(family, layer), getattr(FAMILIES[family], name))


def cut(family: str, layer: int, name: str, x: Tensor) -> Tensor:
    """q or z of every head [batch, pos, head, width], as a view of a projection's output or input."""
    n_heads, d_query, d_value = FAMILIES[family].layers[layer]
    if name == "z":
        return x.view(*x.shape[:2], n_heads, d_value)
    if FAMILIES[family].gated:
        return x.view(*x.shape[:2], n_heads, 2 * d_query)[..., :d_query]
    return x.view(*x.shape[:2], n_heads, d_query)


@contextmanager
def edited(family: str, layer: int, name: str, edit: Callable[[Tensor], None]) -> Iterator[None]:
    """PyTorch hooks on the plain model that write into q or z [batch, pos, head, width] of one layer."""

    def on_query(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        edit(cut(family, layer, "q", output))
        return output

    def on_z(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].contiguous().clone()
        edit(cut(family, layer, "z", x))
        return (x,)

    handle = (
        projection(family, layer, "q").register_forward_hook(on_query)
        if name == "q"
        else projection(family, layer, "out").register_forward_pre_hook(on_z)
    )
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def activations(family: str, inputs: dict[str, Tensor]) -> dict[tuple[str, int], Tensor]:
    """q and z [batch, pos, head, width] of every layer of the plain model."""
    seen: dict[tuple[str, int], Tensor] = {}
    handles = []
    for layer in FAMILIES[family].layers:
        for name in ("q", "z"):

            def keep(x: Tensor, layer: int = layer, name: str = name) -> None:
                seen[name, layer] = cut(family, layer, name, x.contiguous().clone())

            handles.append(
                projection(family, layer, "q").register_forward_hook(lambda m, a, out, keep=keep: keep(out))
                if name == "q"
                else projection(family, layer, "out").register_forward_pre_hook(
                    lambda m, args, keep=keep: keep(args[0])
                )
            )
    plain(family)(**inputs)
    for handle in handles:
        handle.remove()
    return seen


@functools.cache
def reference_of(family: str) -> Means:
    """`mean_activations` where the reference set is the padded batch itself."""
    model, prompt = hooked(family), prompt_of(family)
    model.prompt_examples = lambda examples: prompt  # type: ignore[method-assign]
    try:
        return mean_activations(model, [Example("?", "x")] * 2)
    finally:
        del model.prompt_examples


@pytest.fixture(params=FAMILIES)
def uneven(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_model_says_which_heads_it_has(uneven: str) -> None:
    model, heads = hooked(uneven), FAMILIES[uneven]
    assert list(model.grid.heads_per_layer) == heads.per_layer
    assert model.heads == heads.every
    assert model.cfg.n_heads == max(heads.per_layer) and model.cfg.n_layers == heads.n_layers


# ---------------------------------------------------------------------- attention


@torch.no_grad()
def test_attention_mass_is_that_of_the_whole_patterns(uneven: str) -> None:
    """Loops over the cached pattern of every layer that has one; NaN exactly where there is no head."""
    model, prompt = hooked(uneven), prompt_of(uneven)
    _, cache = model.run_with_cache(prompt.inputs, names_filter=lambda name: name.endswith("hook_pattern"))
    queries, keys = prompt.token_map.is_question, prompt.token_map.is_image
    mass = attention_mass(model, prompt, queries, keys)
    looked_at = vision_mass(model, prompt, progress=False).per_example
    torch.testing.assert_close(looked_at, mass, rtol=0, atol=1e-6, equal_nan=True)
    expected = np.full(mass.shape, np.nan)
    for example, (layer, head) in ((row, at) for row in range(2) for at in FAMILIES[uneven].every):
        pattern = cache[block(layer, "attn.hook_pattern")][example, head]
        per_query = [
            sum(float(pattern[x, y]) for y in keys[example].nonzero().flatten())
            for x in queries[example].nonzero().flatten()
        ]
        expected[example, layer, head] = sum(per_query) / len(per_query)
    np.testing.assert_allclose(mass.numpy(), expected, atol=2e-6)
    assert np.nanmax(expected) > 1e-2


def examples_with_boxes() -> list[Example]:
    a, b, c = tiny.tiny_images(3, seed=3)
    return [
        Example("What colour is the letter K?", "red", (a,), (Evidence(0, (8, 8, 40, 40)),), kind="box"),
        Example("Which?", "two", (b, c), (Evidence(1), Evidence(0, (10, 20, 30, 60))), kind="page"),
        Example("Where is it, and what else?", "left", (c,), (Evidence(0, (0, 0, 20, 20)),), kind="box"),
    ]


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_5", "minicpmv4_6"])
def test_scores_on_examples_are_those_of_the_plain_model(family: str) -> None:
    """RAM, vision mass and key tokens in padded batches; every example alone from the eager model's patterns."""
    model, examples, layers = hooked(family), examples_with_boxes(), list(FAMILIES[family].layers)
    eager = tiny.tiny_model(family, attn_implementation="eager")
    scores = ram(model, examples, batch_size=2, progress=False)
    read = evidence_attention(model, examples, batch_size=3, progress=False)
    chosen = [(1, 3), (2, 0)]
    coverage = read.key_token_coverage(chosen)
    assert scores.grid == read.key_token_ratio.grid == HeadGrid((0, 4, 4))
    for index, example in enumerate(examples):
        prompt = model.prompt_examples([example])
        # Layers without softmax attention give no pattern, or None.
        given = eager(**prompt.inputs, output_attentions=True).attentions
        patterns = [pattern[0] for pattern in given if pattern is not None]
        assert len(patterns) == len(layers)
        question, evidence = prompt.token_map.is_question[0], prompt.token_map.evidence([example])[0]
        n_top = max(1, int(evidence.numel() * 0.05))
        covered = torch.zeros_like(evidence)
        for layer, pattern in zip(layers, patterns, strict=True):
            rows = pattern[:, question]
            for found, keys in (
                (scores, evidence),
                (read.ram, evidence),
                (read.vision_mass, prompt.token_map.is_image[0]),
            ):
                expected = rows[:, :, keys].sum(-1).mean(-1)
                torch.testing.assert_close(found.per_example[index, layer], expected, atol=1e-6, rtol=0)
            for head in range(4):
                top = torch.zeros_like(evidence)
                top[rows[head].mean(0).argsort(descending=True, stable=True)[:n_top]] = True
                share = 100 * float((top & evidence).sum() / evidence.sum())
                assert float(read.key_token_ratio.per_example[index, layer, head]) == pytest.approx(share)
                covered |= top & evidence if (layer, head) in chosen else torch.zeros_like(evidence)
        assert float(coverage[index]) == pytest.approx(100 * float(covered.sum() / evidence.sum()))
        attention, _, _ = question_attention(model, example)
        assert attention[0].isnan().all()
        mean = torch.stack([pattern[:, question].mean(1) for pattern in patterns])
        torch.testing.assert_close(attention[layers], mean, atol=1e-6, rtol=0)
    assert (0, 0) not in scores.top(1.0) and len(scores.top(1.0)) == 8 == len(scores.table())
    with pytest.raises(IndexError, match="layer 0 has no softmax attention; layers with heads: 1, 2"):
        read.key_token_coverage([(0, 1)])


def test_nan_attention_is_an_error_and_not_a_missing_layer() -> None:
    """A model whose activations overflow in a whole layer must not pass for one without that layer's heads."""
    model = mmlens.HookedVLM(tiny.tiny_model("qwen3_5"), tiny.tiny_processor("qwen3_5"))
    with torch.no_grad():
        model.hf_model.get_decoder().layers[2].self_attn.q_norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"RAM: the score of head \(2, 0\) in example 0 is NaN"):
        ram(model, examples_with_boxes(), progress=False)


@pytest.mark.parametrize("family", ["mllama", "idefics"])
def test_cross_attention_families_are_refused_before_anything_runs(family: str) -> None:
    model = mmlens.HookedVLM(tiny.tiny_model(family))
    inputs = tiny.tiny_inputs(family, [1, 1])
    everywhere = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    model.hf_model.register_forward_pre_hook(lambda *args: pytest.fail("the model ran"))
    example = Example("Where?", "x", (Image.new("RGB", (9, 9)),), (Evidence(0),))
    for call in (
        lambda: attention_mass(model, inputs, everywhere, everywhere),
        lambda: ram(model, [example]),
        lambda: evidence_attention(model, [example]),
        lambda: mmlens.scores.key_token_ratio(model, [example]),
    ):
        with pytest.raises(CrossAttentionError, match=f"{family} reads images by cross-attention"):
            call()


# ---------------------------------------------------------------------- ablation


def edges_of(family: str) -> list[tuple[int, int]]:
    """The last head of each of the layers with the first, most and last heads: none exists in a smaller layer."""
    layers = FAMILIES[family].layers
    largest = max(layers, key=lambda layer: layers[layer])
    return [(layer, layers[layer][0] - 1) for layer in sorted({min(layers), largest, max(layers)})]


@torch.no_grad()
def test_mean_reference_is_the_mean_of_the_plain_model_s_heads(uneven: str) -> None:
    reference, prompt = reference_of(uneven), prompt_of(uneven)
    is_image, is_padding = prompt.token_map.is_image, prompt.token_map.is_padding
    seen = activations(uneven, prompt.inputs)
    # Of every head that there is, and of nothing else.
    assert reference.keys() == {block(layer, f"attn.hook_{name}") for name, layer in seen}
    for (name, layer), x in seen.items():
        found = reference[block(layer, f"attn.hook_{name}")]
        for kind, mask in enumerate((~is_image & ~is_padding, is_image)):
            torch.testing.assert_close(found[kind], x[mask].mean(0), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["zero", "mean", "mean_query"])
def test_ablation_equals_writing_into_the_plain_model_s_projections(uneven: str, mode: str) -> None:
    model, prompt, reference = hooked(uneven), prompt_of(uneven), reference_of(uneven)
    is_image, real = prompt.token_map.is_image, ~prompt.token_map.is_padding
    clean = plain(uneven)(**prompt.inputs).logits
    seen = activations(uneven, prompt.inputs)
    name = "q" if mode == "mean_query" else "z"
    for layer, head in edges_of(uneven):
        of_head = seen[name, layer][:, :, head].double()
        of_text, of_image = of_head[real & ~is_image].mean(0), of_head[is_image].mean(0)
        value = torch.where(is_image[..., None], of_image, of_text).float() * (mode != "zero")

        def write(x: Tensor, head: int = head, value: Tensor = value) -> None:
            x[:, :, head] = value

        with edited(uneven, layer, name, write):
            expected = plain(uneven)(**prompt.inputs).logits
        ablation = mmlens.ablate([(layer, head)], mode, reference=None if mode == "zero" else reference)
        under = model.run_with_hooks(prompt, fwd_hooks=ablation(model, prompt))
        torch.testing.assert_close(under[real], expected[real], atol=2e-5, rtol=1e-4)
        assert (expected - clean)[real].abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("mode", ["uniform", "uniform_leaky"])
def test_uniform_ablation_equals_writing_an_even_pattern(uneven: str, mode: str) -> None:
    model, prompt = hooked(uneven), prompt_of(uneven)
    real = ~prompt.token_map.is_padding
    for layer, head in edges_of(uneven):

        def even(pattern: Tensor, hook: Any, head: int = head) -> Tensor:
            # A key that may be seen has some attention, one that is masked exactly none.
            seen = (pattern[:, head] > 0) | (mode == "uniform_leaky")
            pattern = pattern.clone()
            pattern[:, head] = seen / seen.sum(-1, keepdim=True).clamp(min=1)
            return pattern

        expected = model.run_with_hooks(prompt, fwd_hooks=[(block(layer, "attn.hook_pattern"), even)])
        ablation = mmlens.ablate([(layer, head)], mode)(model, prompt)
        under = model.run_with_hooks(prompt, fwd_hooks=ablation)
        torch.testing.assert_close(under[real], expected[real], atol=2e-5, rtol=1e-4)
        clean = plain(uneven)(**prompt.inputs).logits
        assert (expected - clean)[real].abs().max() > 1e-3


@torch.no_grad()
def test_layers_that_share_keys_see_every_position_while_hooks_are_set() -> None:
    """transformers runs Gemma 4's last layers at the positions of `logits_to_keep` alone; hooks need all of them."""
    model, prompt = hooked("gemma4"), prompt_of("gemma4")
    length = prompt.inputs["input_ids"].shape[1]
    hooks = mmlens.ablate([(2, 1), (3, 3)], positions=prompt.token_map.is_image)(model, prompt)
    whole = model.run_with_hooks(prompt, fwd_hooks=hooks)
    kept = model.run_with_hooks(prompt, fwd_hooks=hooks, logits_to_keep=2)
    torch.testing.assert_close(kept, whole[:, -2:], atol=1e-5, rtol=1e-5)
    assert model.run_with_hooks(prompt, fwd_hooks=hooks, logits_to_keep=length + 5).shape[1] == length
    _, cache = model.run_with_cache(prompt, names_filter="blocks.3.attn.hook_z", logits_to_keep=1)
    assert cache["z", 3].shape[1] == length
    # Without hooks nothing changes, to the bit.
    assert torch.equal(
        model(prompt, logits_to_keep=1), plain("gemma4")(**prompt.inputs, logits_to_keep=1).logits
    )
    seen: list[int] = []
    with model.hooks([("blocks.3.attn.hook_z", lambda z, hook: seen.append(z.shape[1]))]):
        model.generate(prompt, max_new_tokens=2, do_sample=False)
    assert seen == [length, 1]


@torch.no_grad()
def test_resample_takes_the_other_example_s_z() -> None:
    model = hooked("qwen3_5")
    own, other = (
        Example(question, "x", (image,), id=question)
        for question, image in zip(
            ("What colour is the letter K?", "What colour is the letter Q?"),
            tiny.tiny_images(2, sizes=((64, 64),)),
            strict=True,
        )
    )
    prompt = model.prompt_examples([own])
    source = activations("qwen3_5", model.prompt_examples([other]).inputs)["z", 2]
    ablation = mmlens.ablate([(2, 3)], "resample", reference=[own, other])(model, prompt)
    with model.hooks(fwd_hooks=ablation):
        _, under = model.run_with_cache(prompt, names_filter="blocks.2.attn.hook_z")
    assert torch.equal(under["z", 2][:, :, 3], source[:, :, 3])


def test_controls_of_a_model_hold_only_heads_that_it_has(uneven: str) -> None:
    model, heads = hooked(uneven), FAMILIES[uneven]
    chosen = mmlens.HeadSet(heads.every[-2:], HeadGrid(tuple(heads.per_layer)))
    absent = [
        (layer, head)
        for layer, count in enumerate(heads.per_layer)
        for head in range(count, max(heads.per_layer))
    ]
    prompt = prompt_of(uneven)
    for seed in range(20):
        for control in (chosen.random(seed), chosen.matched_random(seed)):
            assert set(control) <= set(heads.every) - set(chosen)
            mmlens.ablate(control)(model, prompt)
    for layer, head in absent:
        reason = "has no softmax attention" if not heads.per_layer[layer] else "has 4 heads"
        with pytest.raises(IndexError, match=rf"head \({layer}, {head}\).*layer {layer} {reason}"):
            mmlens.ablate([(layer, head)])(model, prompt)


@torch.no_grad()
def test_means_of_a_model_with_other_heads_are_refused() -> None:
    model, prompt = hooked("qwen3_5"), prompt_of("qwen3_5")
    elsewhere = {"blocks.1.attn.hook_z": torch.zeros(2, 2, 16)}
    with pytest.raises(ValueError, match=r"blocks.1.attn.hook_z have shape \[2, 2, 16\]; .* 4 heads"):
        mmlens.ablate([(1, 1)], "mean", reference=elsewhere)(model, prompt)
    with pytest.raises(ValueError, match=r"no means of \['blocks.2.attn.hook_z'\]"):
        mmlens.ablate([(2, 1)], "mean", reference=elsewhere)(model, prompt)
    narrow = {"blocks.0.attn.hook_z": torch.zeros(2, 4, 24)}
    hooks = mmlens.ablate([(0, 0)], "mean", reference=narrow)(hooked("kimi_k25"), prompt_of("kimi_k25"))
    with pytest.raises(ValueError, match=r"end in \[1, 24\], .* in \[1, 16\]"):
        hooked("kimi_k25").run_with_hooks(prompt_of("kimi_k25"), fwd_hooks=hooks)


# ---------------------------------------------------------------------- the experiment


def test_core_heads_of_a_hybrid_model(tmp_path: Path) -> None:
    model = hooked("qwen3_5")
    kinds = (KINDS[0], TEXT_KINDS[0])
    # The tiny tokenizer's words share first tokens, its letters do not.
    selection, evaluation = (
        [
            dataclasses.replace(
                example,
                answer=LETTERS[example.candidates.index(example.answer)],
                candidates=tuple(LETTERS[: len(example.candidates)]),
            )
            for kind in kinds
            for example in mmlens.scene_examples(kind, 2, seed)
        ]
        for seed in (1, 2)
    )
    setup = Setup(model, selection, evaluation, batch_size=4, progress=False)
    result = core_heads_claim.measured(setup, modes=("mean",), n_draws=1)
    every = FAMILIES["qwen3_5"].every
    for sets in result.arms.values():
        assert all(set(heads) <= set(every) for heads in sets)
    assert len(result.top) == 1 and set(result.ablation["count"]) == {0, 1, 2}
    one = result.ablation[result.ablation["count"] == 1]
    assert set(one["fraction"]) == {1 / 8}
    table = result.head_table()
    assert sorted(zip(table["layer"], table["head"], strict=True)) == every
    assert not table.isna().any().any()
    found = core_heads_claim.run(setup, modes=("mean",), n_draws=1)
    write_findings(found, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["model"]["heads_per_layer"] == [0, 4, 4]
    assert mmlens.HeadScores.load(tmp_path / "ram_per_example.parquet").top(2) == result.scores.top(2)
    assert len(pd.read_parquet(tmp_path / "head_scores.parquet")) == 8
