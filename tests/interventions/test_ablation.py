"""Every mode of ablation against slow arithmetic on the plain model's own parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from tiny.wrapped import QUESTION, hooked, padded_prompt, two_image_prompt
from torch import Tensor, nn

import mmlens
from mmlens.data.examples import Example
from mmlens.errors import StateError
from mmlens.interventions.ablation import MODES, mean_activations
from mmlens.interventions.components import components
from mmlens.interventions.edits import Edit
from mmlens.model.hooks import HookNeverFiredError, UnknownHookError
from mmlens.model.prompt import Prompt
from mmlens.model.run_state import Span

HEADS = [(1, 2), (0, 1), (1, 3)]
EVERYTHING = [
    (0, 1),
    (1, "attn"),
    (1, "mlp"),
    (2, "layer"),
    (0, "mlp", 17),
    (0, "mlp", 3),
    ("vision", 0, 1),
    ("vision", 1, "layer"),
    "image",
]
TOWERS = {
    "llava": ("model.vision_tower.encoder.layers", "self_attn.out_proj", "mlp.fc2"),
    "qwen2_5_vl": ("model.visual.blocks", "attn.proj", "mlp.down_proj"),
    "qwen3_vl": ("model.visual.blocks", "attn.proj", "mlp.linear_fc2"),
    "internvl": ("model.vision_tower.encoder.layer", "attention.projection_layer", "mlp.fc2"),
}
"""Path of the plain model's vision layers, and in each the projections out of attention and MLP."""
DECODERS = (*TOWERS, "gemma3")
"""Families whose text layers have self_attn.o_proj and mlp.down_proj; Gemma 3's norms stand after them."""


def examples(n: int, seed: int = 5) -> list[Example]:
    images = tiny.tiny_images(n, seed=seed)
    questions = [QUESTION, "Where is the red square?", "How many objects are there in this picture?"]
    return [
        Example(question=questions[i % 3], answer="seven", images=(images[i],), id=f"e{i}") for i in range(n)
    ]


def alike(n: int, seed: int) -> list[Example]:
    """Examples whose images have one size."""
    images = tiny.tiny_images(n, seed=seed, sizes=[(64, 48)])
    return [Example(QUESTION, "seven", (image,), id=f"a{i}") for i, image in enumerate(images)]


def reference_of(mode: str, model: mmlens.HookedVLM) -> object:
    if mode in ("mean", "mean_query"):
        return mean_activations(model, examples(3))
    return examples(3) if mode == "resample" else None


def means_of(
    model: mmlens.HookedVLM, specs: Sequence[Any], reference: Sequence[Example]
) -> dict[str, Tensor]:
    hooks = [hook for part in components(model, specs) for hook in part.hooks]
    return mean_activations(model, reference, hooks=list(dict.fromkeys(hooks)), batch_size=2)


@contextmanager
def edited(module: nn.Module, edit: Callable[[Tensor], Tensor], side: str = "output") -> Iterator[None]:
    """A plain PyTorch hook that replaces what a module reads or gives."""
    handle = (
        module.register_forward_hook(lambda m, args, out: edit(out))
        if side == "output"
        else module.register_forward_pre_hook(lambda m, args: (edit(args[0]), *args[1:]))
    )
    try:
        yield
    finally:
        handle.remove()


def seen_by(model: nn.Module, module: nn.Module, side: str, prompts: Sequence[Prompt]) -> list[Tensor]:
    """What a module of the plain model reads or gives, for each prompt."""
    seen: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return x

    with edited(module, keep, side):
        for prompt in prompts:
            model(**prompt.inputs)
    return seen


def under_ablation(model: mmlens.HookedVLM, prompt: Prompt, *args: Any, **options: Any) -> Tensor:
    return model.run_with_hooks(prompt, fwd_hooks=mmlens.ablate(*args, **options)(model, prompt))


def tower_layer(model: nn.Module, family: str, layer: int) -> tuple[nn.Module, nn.Module]:
    path, out, mlp = TOWERS[family]
    module = model.get_submodule(path)[layer]
    return module.get_submodule(out), module.get_submodule(mlp)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_only_the_named_heads_change(model: mmlens.HookedVLM, mode: str) -> None:
    prompt = padded_prompt(model) if mode != "resample" else model.prompt_examples(examples(2, seed=8))
    names = ["blocks.0.attn.hook_z"]
    _, clean = model.run_with_cache(prompt, names_filter=names)
    intervention = mmlens.ablate([(0, 1)], mode, reference=reference_of(mode, model))
    with model.hooks(fwd_hooks=intervention(model, prompt)):
        _, under = model.run_with_cache(prompt, names_filter=names)
    real = ~prompt.token_map.is_padding
    changed = (under["z", 0] - clean["z", 0]).abs().amax(-1)[real].amax(0)
    others = [head for head in range(model.cfg.n_heads) if head != 1]
    assert changed[1] > 1e-3
    # Leaving the fast path moves a layer's other heads by rounding only.
    assert changed[others].max() < 1e-5


@torch.no_grad()
def test_zero_equals_output_projection_columns_set_to_zero(family: str) -> None:
    model, cut = hooked(family), tiny.tiny_model(family).eval()
    prompt = padded_prompt(model)
    d_head = model.cfg.d_head
    layers = cut.get_decoder().layers
    for layer, head in HEADS:
        layers[layer].self_attn.o_proj.weight[:, head * d_head : (head + 1) * d_head] = 0
    under = model.run_with_hooks(prompt, fwd_hooks=mmlens.ablate(HEADS)(model, prompt))
    torch.testing.assert_close(under, cut(**prompt.inputs).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_uniform_averages_the_values_a_query_may_see(model: mmlens.HookedVLM) -> None:
    """z = mean of v over real keys up to the query; leaky: over every key of the batch's width."""
    prompt = padded_prompt(model)
    group = model.cfg.n_heads // model.cfg.n_key_value_heads
    _, clean = model.run_with_cache(prompt, names_filter="blocks.1.attn.hook_v")
    values = clean["v", 1]
    mask = prompt.inputs["attention_mask"]
    for mode in ("uniform", "uniform_leaky"):
        with model.hooks(fwd_hooks=mmlens.ablate([(1, 2)], mode)(model, prompt)):
            _, under = model.run_with_cache(prompt, names_filter="blocks.1.attn.hook_z")
        for row in range(len(mask)):
            for position in mask[row].nonzero().flatten().tolist():
                seen = mask[row].bool() & (torch.arange(mask.shape[1]) <= position)
                keys = seen if mode == "uniform" else torch.ones_like(seen)
                expected = values[row, keys, 2 // group].mean(0)
                torch.testing.assert_close(under["z", 1][row, position, 2], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_mean_reference_is_the_mean_over_real_positions_of_each_kind(model: mmlens.HookedVLM) -> None:
    reference = mean_activations(model, examples(3), batch_size=2)
    sums: dict[str, list[list[Tensor]]] = {"z": [[], []], "q": [[], []]}
    for example in examples(3):
        prompt = model.prompt(example.question, images=example.images)
        is_image = prompt.token_map.is_image[0]
        _, cache = model.run_with_cache(
            prompt, names_filter=lambda name: name.endswith(("attn.hook_z", "attn.hook_q"))
        )
        for name, kinds in sums.items():
            for kind, mask in enumerate((~is_image, is_image)):
                kinds[kind].append(cache[name, 2][0][mask])
    for name, kinds in sums.items():
        for kind in (0, 1):
            expected = torch.cat(kinds[kind]).mean(0)
            torch.testing.assert_close(
                reference[f"blocks.2.attn.hook_{name}"][kind], expected, atol=1e-5, rtol=1e-4
            )
    prompt = padded_prompt(model)
    with model.hooks(fwd_hooks=mmlens.ablate([(2, 3)], "mean", reference=reference)(model, prompt)):
        _, under = model.run_with_cache(prompt, names_filter="blocks.2.attn.hook_z")
    is_image, padding = prompt.token_map.is_image, prompt.token_map.is_padding
    assert (under["z", 2][is_image][:, 3] == reference["blocks.2.attn.hook_z"][1, 3]).all()
    assert (under["z", 2][~is_image & ~padding][:, 3] == reference["blocks.2.attn.hook_z"][0, 3]).all()
    with model.hooks(fwd_hooks=mmlens.ablate([(2, 3)], "mean_query", reference=reference)(model, prompt)):
        _, under = model.run_with_cache(prompt, names_filter="blocks.2.attn.hook_q")
    assert (under["q", 2][is_image][:, 3] == reference["blocks.2.attn.hook_q"][1, 3]).all()


@torch.no_grad()
def test_resample_takes_z_of_another_example_position_by_position() -> None:
    model = hooked("qwen3_vl")
    own, other = examples(1)[0], examples(1, seed=9)[0]
    other = Example(
        question="What colour is the letter Q?",
        answer="x",
        images=(other.images[0].resize(own.images[0].size),),
    )
    prompt = model.prompt_examples([own])
    _, source = model.run_with_cache(model.prompt_examples([other]), names_filter="blocks.1.attn.hook_z")
    with model.hooks(fwd_hooks=mmlens.ablate([(1, 0)], "resample", reference=[own, other])(model, prompt)):
        _, under = model.run_with_cache(prompt, names_filter="blocks.1.attn.hook_z")
    assert source["z", 1].shape == under["z", 1].shape
    assert torch.equal(under["z", 1][:, :, 0], source["z", 1][:, :, 0])
    with pytest.raises(ValueError, match="but the prompt's own"):
        mmlens.ablate([(1, 0)], "resample", reference=[own])(model, prompt)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_generation_with_and_without_cache_agree(mode: str) -> None:
    model = hooked("internvl")
    prompt = model.prompt_examples(examples(2, seed=8))
    intervention = mmlens.ablate(HEADS, mode, reference=reference_of(mode, model))
    clean = model.generate(prompt, max_new_tokens=5, do_sample=False)
    with model.hooks(fwd_hooks=intervention(model, prompt)):
        cached = model.generate(prompt, max_new_tokens=5, do_sample=False)
        uncached = model.generate(prompt, max_new_tokens=5, do_sample=False, use_cache=False)
    # With leaky masking a query sees future keys, which a cached run does not have yet.
    if mode != "uniform_leaky":
        assert torch.equal(cached, uncached)
    assert clean.shape == cached.shape


@torch.no_grad()
def test_positions_restrict_the_edit() -> None:
    model = hooked("llava")
    prompt = padded_prompt(model)
    _, clean = model.run_with_cache(prompt, names_filter="blocks.1.attn.hook_z")
    for positions in (prompt.token_map.is_question, lambda p: p.token_map.is_question):
        hooks = mmlens.ablate([(1, 2)], "zero", positions=positions)(model, prompt)
        with model.hooks(fwd_hooks=hooks):
            _, under = model.run_with_cache(prompt, names_filter="blocks.1.attn.hook_z")
        where = prompt.token_map.is_question
        assert not under["z", 1][where][:, 2].any()
        assert torch.equal(under["z", 1][~where], clean["z", 1][~where])


# ---------------------------------------------------------------------- components beside heads


@torch.no_grad()
@pytest.mark.parametrize("family", DECODERS)
def test_zero_components_equal_weights_set_to_zero(family: str) -> None:
    """Of attention, MLP and neurons, text-only and with images; these projections have no bias."""
    model = hooked(family)
    for spec, path, columns in (
        ((1, "attn"), "self_attn.o_proj", slice(None)),
        ((1, "mlp"), "mlp.down_proj", slice(None)),
        ((1, "mlp", 17), "mlp.down_proj", slice(17, 18)),
    ):
        cut = tiny.tiny_model(family).eval()
        out = cut.get_decoder().layers[1].get_submodule(path)
        assert out.bias is None
        out.weight[:, columns] = 0
        for prompt in (padded_prompt(model), model.prompt(["What?", "Where is the red square?"])):
            under = under_ablation(model, prompt, [spec])
            real = ~prompt.token_map.is_padding
            torch.testing.assert_close(under[real], cut(**prompt.inputs).logits[real], atol=1e-5, rtol=1e-5)
            assert not torch.allclose(under[real], model(prompt)[real], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("family", TOWERS)
def test_zero_components_of_the_vision_tower(family: str) -> None:
    """A head's columns at zero; an output is zero only with its bias."""
    model, d_head = hooked(family), 8
    prompt = padded_prompt(model)
    for spec, is_mlp, columns in (
        (("vision", 1, 3), False, slice(3 * d_head, 4 * d_head)),
        (("vision", 1, "attn"), False, slice(None)),
        (("vision", 1, "mlp"), True, slice(None)),
    ):
        cut = tiny.tiny_model(family).eval()
        out = tower_layer(cut, family, 1)[is_mlp]
        out.weight[:, columns] = 0
        expected_with_bias = cut(**prompt.inputs).logits
        if spec[2] != 3:
            assert out.bias.any()
            out.bias.zero_()
        under = under_ablation(model, prompt, [spec])
        expected = cut(**prompt.inputs).logits
        torch.testing.assert_close(under, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(under, model(prompt), atol=1e-3)
        assert spec[2] == 3 or not torch.allclose(under, expected_with_bias, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("family", ("llava", "qwen3_vl", "gemma3"))
def test_mean_components_equal_writing_the_mean_into_the_plain_model(family: str) -> None:
    model = hooked(family)
    plain, prompt = model.hf_model, padded_prompt(model)
    layer = plain.get_decoder().layers[1]
    own = [model.prompt(e.question, images=e.images) for e in examples(3)]
    kinds = [prompt.token_map.is_image, ~prompt.token_map.is_image & ~prompt.token_map.is_padding]
    mlp_output = layer.post_feedforward_layernorm if family == "gemma3" else layer.mlp
    for spec, module, side, at in (
        ((1, "mlp"), mlp_output, "output", slice(None)),
        ((1, "mlp", 17), layer.mlp.down_proj, "input", slice(17, 18)),
    ):
        activations = seen_by(plain, module, side, own)
        means = [
            torch.cat(
                [x[0][p.token_map.is_image[0] == wanted] for x, p in zip(activations, own, strict=True)]
            ).mean(0)
            for wanted in (True, False)
        ]

        def write(x: Tensor, means: Sequence[Tensor] = means, at: slice = at) -> Tensor:
            x = x.clone()
            for mask, mean in zip(kinds, means, strict=True):
                x[..., at] = torch.where(mask[..., None], mean[at], x[..., at])
            return x

        with edited(module, write, side):
            expected = plain(**prompt.inputs).logits
        under = under_ablation(model, prompt, [spec], "mean", reference=means_of(model, [spec], examples(3)))
        real = ~prompt.token_map.is_padding
        torch.testing.assert_close(under[real], expected[real], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(under[real], model(prompt)[real], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.parametrize("mode", ("mean", "resample"))
def test_vision_heads_equal_writing_into_the_plain_tower(family: str, mode: str) -> None:
    """Towers [image or tile, patch] and packed ones [patch]; the mean is over all patches of all images."""
    model, specs = hooked(family), [("vision", 1, 2), ("vision", 1, 0)]
    own, reference = alike(1, seed=3)[0], [*alike(1, seed=3), *alike(1, seed=4)]
    prompt = model.prompt_examples([own])
    out, _ = tower_layer(model.hf_model, family, 1)
    prompts = [model.prompt(e.question, images=e.images) for e in reference]
    sources = seen_by(model.hf_model, out, "input", prompts)
    mean = torch.cat([x.reshape(-1, x.shape[-1]) for x in sources]).mean(0)

    def write(x: Tensor) -> Tensor:
        x = x.clone()
        for head in (0, 2):
            at = slice(8 * head, 8 * head + 8)
            x[..., at] = sources[1][..., at] if mode == "resample" else mean[at]
        return x

    with edited(out, write, "input"):
        expected = model.hf_model(**prompt.inputs).logits
    given = means_of(model, specs, reference) if mode == "mean" else reference
    under = under_ablation(model, prompt, specs, mode, reference=given)
    torch.testing.assert_close(under, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(under, model(prompt), atol=1e-3)


@torch.no_grad()
def test_resampled_images_and_mlps_are_those_of_the_other_example() -> None:
    """Prompts of different length: text and image positions are matched from their ends."""
    model = hooked("qwen3_vl")
    own = Example("Where is the red square?", "x", tuple(tiny.tiny_images(1, seed=1, sizes=[(64, 48)])))
    other = Example(QUESTION, "x", tuple(tiny.tiny_images(1, seed=2, sizes=[(96, 64)])))
    prompt, there = (model.prompt_examples([example]) for example in (own, other))
    deep = [f"blocks.{layer}.hook_deepstack" for layer in (0, 1)]
    names = ["image.hook_embed", *deep, "blocks.2.hook_mlp_out"]
    _, source = model.run_with_cache(there, names_filter=names)
    hooks = mmlens.ablate(["image", (2, "mlp")], "resample", reference=[own, other])(model, prompt)
    with model.hooks(fwd_hooks=hooks):
        _, under = model.run_with_cache(prompt, names_filter=names)
    n_image = int(prompt.token_map.is_image.sum())
    assert n_image < int(there.token_map.is_image.sum())
    for name in names[:3]:
        torch.testing.assert_close(under[name], source[name][-n_image:], atol=1e-6, rtol=1e-5)
    for here, is_image in ((0, True), (0, False)):
        mine = under["blocks.2.hook_mlp_out"][here][prompt.token_map.is_image[here] == is_image]
        theirs = source["blocks.2.hook_mlp_out"][0][there.token_map.is_image[0] == is_image]
        n = min(len(mine), len(theirs))
        assert torch.equal(mine[-n:], theirs[-n:])
    # A generated token takes what stands at the other prompt's last position.
    (mlp,) = [edit for name, edit in hooks if name == "blocks.2.hook_mlp_out"]
    model.run_state.narrow(Span(prompt.shape[1], 1))
    generated = mlp(torch.zeros(1, 1, model.cfg.d_model), None)
    assert torch.equal(generated, source["blocks.2.hook_mlp_out"][:, -1:])


@torch.no_grad()
@pytest.mark.parametrize("family", ("llava", "qwen3_vl"))
@pytest.mark.parametrize("mode", ("zero", "mean"))
def test_an_image_region_equals_writing_into_the_plain_decoder_s_inputs(family: str, mode: str) -> None:
    """Embeddings and, in Qwen3-VL, what DeepStack adds at the region's positions."""
    model = hooked(family)
    prompt = padded_prompt(model)
    region = prompt.token_map.box(image=0, box=(0, 0, 30, 30))
    is_image = prompt.token_map.is_image
    assert 0 < region.sum() < is_image.sum()
    own = [model.prompt(e.question, images=e.images) for e in examples(3)]
    decoder, given = model.hf_model.get_decoder(), []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(kwargs)

    handle = decoder.register_forward_pre_hook(keep, with_kwargs=True)
    for each in own:
        model.hf_model(**each.inputs)
    handle.remove()
    packed = [[kw["inputs_embeds"][0][p.token_map.is_image[0]] for kw, p in zip(given, own, strict=True)]]
    if family == "qwen3_vl":
        packed += [[kw["deepstack_visual_embeds"][layer] for kw in given] for layer in range(2)]
    means = [torch.cat(rows).mean(0) * (mode == "mean") for rows in packed]

    def write(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs["inputs_embeds"] = torch.where(region[..., None], means[0], kwargs["inputs_embeds"])
        if family == "qwen3_vl":
            kwargs["deepstack_visual_embeds"] = [
                torch.where(region[is_image][:, None], mean, rows)
                for rows, mean in zip(kwargs["deepstack_visual_embeds"], means[1:], strict=True)
            ]
        return args, kwargs

    handle = decoder.register_forward_pre_hook(write, with_kwargs=True)
    expected = model.hf_model(**prompt.inputs).logits
    handle.remove()
    reference = means_of(model, ["image"], examples(3)) if mode == "mean" else None
    positions = mmlens.interventions.if_any(region)
    under = under_ablation(model, prompt, "image", mode, reference=reference, positions=positions)
    real = ~prompt.token_map.is_padding
    torch.testing.assert_close(under[real], expected[real], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(under[real], model(prompt)[real], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("mode", ("zero", "mean", "resample"))
@pytest.mark.parametrize("family", ("llava", "qwen3_vl"))
def test_everything_at_once_with_a_cache_and_without_and_part_by_part(family: str, mode: str) -> None:
    """Generation agrees; and each edit of a run's end is the end of the edit of the whole."""
    model = hooked(family)
    examples_here, others = alike(2, seed=8), alike(3, seed=9)
    prompt = model.prompt_examples(examples_here)
    if mode == "resample":
        others = [Example("Where is the red square?", "x", e.images) for e in others]
    reference = {"mean": lambda: means_of(model, EVERYTHING, others), "resample": lambda: others}.get(mode)
    hooks = mmlens.ablate(EVERYTHING, mode, reference=reference() if reference else None)(model, prompt)
    with model.hooks(fwd_hooks=hooks):
        cached = model.generate(prompt, max_new_tokens=4, do_sample=False)
        uncached = model.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(cached, uncached)
    first, length = 6, prompt.shape[1]
    _, cache = model.run_with_cache(prompt, names_filter=[name for name, _ in hooks])
    image_rows = prompt.token_map.is_image.nonzero()[:, 1] >= first
    for name, edit in hooks:
        assert isinstance(edit, Edit) and edit.size > 0
        if not edit.is_language:
            continue
        x, packed = cache[name], edit.axes[0] == "image_token"
        model.run_state.narrow(Span(0, length))
        whole = edit(x, None)
        model.run_state.narrow(Span(first, length - first))
        end = (lambda t: t[image_rows]) if packed else (lambda t: t[:, first:])
        assert torch.equal(edit(end(x), None), end(whole)), name


@torch.no_grad()
def test_positions_restrict_components() -> None:
    model = hooked("internvl")
    prompt = padded_prompt(model)
    where = prompt.token_map.is_question
    names = ["blocks.1.hook_mlp_out", "blocks.0.mlp.hook_post"]
    _, clean = model.run_with_cache(prompt, names_filter=names)
    with model.hooks(
        fwd_hooks=mmlens.ablate([(1, "mlp"), (0, "mlp", 5)], positions="question")(model, prompt)
    ):
        _, under = model.run_with_cache(prompt, names_filter=names)
    assert not under[names[0]][where].any() and not under[names[1]][where][:, 5].any()
    torch.testing.assert_close(under[names[1]][~where], clean[names[1]][~where], atol=0, rtol=0)
    others = [neuron for neuron in range(96) if neuron != 5]
    assert torch.equal(under[names[1]][where][:, others], clean[names[1]][where][:, others])
    before = torch.arange(prompt.shape[1]) < where.int().argmax(-1, keepdim=True)
    assert torch.equal(under[names[0]][before], clean[names[0]][before])


@torch.no_grad()
def test_a_layer_is_both_its_outputs() -> None:
    model = hooked("qwen2_5_vl")
    prompt = two_image_prompt(model)
    _, cache = model.run_with_cache(prompt, names_filter="blocks.1.hook_resid_pre")
    whole = mmlens.ablate([(1, "layer")])
    with model.hooks(fwd_hooks=whole(model, prompt)):
        logits, under = model.run_with_cache(prompt, names_filter="blocks.1.hook_resid_post")
    assert torch.equal(under["resid_post", 1], cache["resid_pre", 1])
    both = mmlens.compose(mmlens.ablate([(1, "attn")]), mmlens.ablate([(1, "mlp")]))
    assert torch.equal(model.run_with_hooks(prompt, fwd_hooks=both(model, prompt)), logits)


@torch.no_grad()
@pytest.mark.parametrize(("mode", "read"), [("mean", "z"), ("mean_query", "q")])
def test_means_without_the_axis_of_text_and_image_are_refused(mode: str, read: str) -> None:
    """Of a model with two heads, or two layers, they would be taken for text's and image's."""
    model = hooked("llava")
    prompt = two_image_prompt(model)
    means = mean_activations(model, examples(2))
    name = f"blocks.1.attn.hook_{read}"
    for wrong in (means[name][0], means[name][:1], means[name][0][None, None], means[name].mean(0)):
        with pytest.raises(ValueError, match=rf"means of {name} have shape .*2 kinds \(text, then image\)"):
            mmlens.ablate([(1, 0)], mode, reference={**means, name: wrong})(model, prompt)
    assert mmlens.ablate([(1, 0)], mode, reference=means)(model, prompt)


@torch.no_grad()
def test_means_count_only_what_an_image_gives() -> None:
    """Examples without images, in a batch of their own, do not count for image hook points."""
    model = hooked("llava")
    hooks = ["image.hook_embed", "vision.blocks.0.attn.hook_z", "blocks.0.hook_resid_pre"]
    with_text = [Example("What?", "x"), Example("Where?", "x"), *examples(3)]
    alone = mean_activations(model, examples(3), hooks=hooks)
    mixed = mean_activations(model, with_text, hooks=hooks, batch_size=2)
    for name in hooks[:2]:
        assert len(mixed[name]) == 1
        torch.testing.assert_close(mixed[name], alone[name], atol=1e-6, rtol=1e-5)
    kinds = mixed["blocks.0.hook_resid_pre"]
    torch.testing.assert_close(kinds[1], mixed["image.hook_embed"][0], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(kinds[0], alone["blocks.0.hook_resid_pre"][0], atol=1e-3)
    filtered = mean_activations(model, examples(3), hooks=lambda name: name in hooks)
    assert all(torch.equal(filtered[name], alone[name]) for name in hooks)


@torch.no_grad()
def test_composition_is_concatenation() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    both = mmlens.compose(mmlens.ablate([(0, 1)]), mmlens.ablate([(1, 2), (1, 3)]))
    together = mmlens.ablate([(0, 1), (1, 2), (1, 3)])
    assert torch.equal(
        model.run_with_hooks(prompt, fwd_hooks=both(model, prompt)),
        model.run_with_hooks(prompt, fwd_hooks=together(model, prompt)),
    )
    with pytest.raises(ValueError, match="at least one"):
        mmlens.compose()


@torch.no_grad()
def test_bad_ablations_are_errors() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    with pytest.raises(ValueError, match=r"'zeros'; the nearest: 'zero'"):
        mmlens.ablate([(0, 0)], "zeros")
    with pytest.raises(IndexError, match=r"head \(3, 0\).*3 layers"):
        mmlens.ablate([(3, 0)])(model, prompt)
    with pytest.raises(IndexError, match=r"head \(0, 4\)"):
        mmlens.ablate([(0, 4)])(model, prompt)
    with pytest.raises(ValueError, match="no heads"):
        mmlens.ablate([])(model, prompt)
    with pytest.raises(ValueError, match=r"needs reference=mean_activations"):
        mmlens.ablate([(0, 0)], "mean")
    with pytest.raises(ValueError, match="examples to draw from"):
        mmlens.ablate([(0, 0)], "resample", reference=[])
    with pytest.raises(ValueError, match="takes no reference"):
        mmlens.ablate([(0, 0)], "zero", reference=examples(1))
    with pytest.raises(ValueError, match=r"boolean mask \[batch, pos\]"):
        mmlens.ablate([(0, 0)], positions=torch.ones(1, 2, dtype=torch.bool))(model, prompt)
    with pytest.raises(ValueError, match="no position"):
        mmlens.ablate([(0, 0)], positions=torch.zeros_like(prompt.token_map.is_image))(model, prompt)
    wrong = {"blocks.0.attn.hook_z": torch.zeros(2, 3, 16)}
    with pytest.raises(ValueError, match=r"shape \[2, 3, 16\]; this model has 4 heads"):
        mmlens.ablate([(0, 0)], "mean", reference=wrong)(model, prompt)
    with pytest.raises(ValueError, match=r"no means of \['blocks.1.hook_mlp_out'\] \(1 of the 1"):
        mmlens.ablate([(1, "mlp")], "mean", reference=wrong)(model, prompt)
    nan = {"blocks.0.attn.hook_z": torch.full((2, 4, 16), torch.nan)}
    nan["blocks.0.attn.hook_z"][1, 0] = 0
    with pytest.raises(ValueError, match="are NaN"):
        mmlens.ablate([(0, 0)], "mean", reference=nan)(model, prompt)
    for mode in ("uniform", "uniform_leaky", "mean_query"):
        for spec, label in (((1, "mlp"), "L1 mlp"), (("vision", 0, 1), "vision L0H1"), ("image", "image")):
            with pytest.raises(
                ValueError, match=f"'{mode}' is for heads of the language model; {label} takes"
            ):
                reference = wrong if mode == "mean_query" else None
                mmlens.ablate([spec], mode, reference=reference)(model, prompt)
    with pytest.raises(ValueError, match="does not run over the prompt's positions"):
        mmlens.ablate([("vision", 0, 1)], positions="image")(model, prompt)
    with pytest.raises(ValueError, match="chooses no image position"):
        mmlens.ablate("image", positions="question")(model, prompt)
    with pytest.raises(ValueError, match="no image positions"):
        mmlens.ablate("image")(model, model.prompt("What?"))
    with pytest.raises(HookNeverFiredError, match=r"vision.blocks.0"):
        under_ablation(model, model.prompt("What?"), [("vision", 0, 1)])
    with pytest.raises(ValueError, match=r"own .* of sizes \[\(64, 48\), \(40, 72\)\]"):
        mmlens.ablate([("vision", 0, 1)], "resample", reference=examples(3))(model, prompt)
    with pytest.raises(ValueError, match=r"queries and keys"):
        mean_activations(model, examples(1), hooks="blocks.0.attn.hook_pattern")
    with pytest.raises(ValueError, match=r"no example has an image.*image.hook_embed"):
        mean_activations(model, [Example("What?", "x")], hooks=["image.hook_embed"])
    with pytest.raises(UnknownHookError, match=r"the nearest: 'blocks.0.hook_mlp_out'"):
        mean_activations(model, examples(1), hooks="blocks.0.hook_mlpout")
    text_only = mean_activations(model, [Example(question="What?", answer="x")])
    with pytest.raises(ValueError, match="examples without any"):
        mmlens.ablate([(0, 0)], "mean", reference=text_only)(model, prompt)
    with pytest.raises(ValueError, match="no prompts given"):
        mean_activations(model, [])


@torch.no_grad()
def test_an_ablation_of_a_layer_that_was_removed_is_an_error() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    hooks = mmlens.ablate([(2, 0)])(model, prompt)
    model.hf_model.get_submodule("model.language_model").layers = model.hf_model.model.language_model.layers[
        :2
    ]
    model.hf_model.config.get_text_config().num_hidden_layers = 2
    with pytest.raises(StateError, match=r"model.language_model.layers .* was replaced"):
        model.run_with_hooks(prompt, fwd_hooks=hooks)


@torch.no_grad()
def test_uniform_on_chameleon_is_a_pattern_of_equal_weights() -> None:
    """Its queries and keys are normed, and its logits of image codes are masked: neither changes what uniform is."""
    model = hooked("chameleon")
    prompt = padded_prompt(model)
    real = ~prompt.token_map.is_padding
    n = real.shape[1]
    allowed = torch.ones(n, n, dtype=torch.bool).tril()[None] & real[:, None, :]
    equal = allowed / allowed.sum(-1, keepdim=True).clamp(min=1)

    def written(pattern: Tensor, hook: Any) -> Tensor:
        return pattern.index_copy(1, torch.tensor([1]), equal[:, None])

    expected = model.run_with_hooks(prompt, fwd_hooks=[("blocks.1.attn.hook_pattern", written)])
    logits = model.run_with_hooks(prompt, fwd_hooks=list(mmlens.ablate([(1, 1)], "uniform")(model, prompt)))
    torch.testing.assert_close(logits[real], expected[real], atol=1e-5, rtol=1e-5)
    shown = expected > torch.finfo(expected.dtype).min
    assert (expected - model(prompt))[real[..., None] & shown].abs().max() > 1e-3


@pytest.mark.parametrize("family", ("gemma4", "gemma4_unified"))
def test_ablation_under_generate_from_keyword_inputs_is_the_plain_models_under_raw_hooks(family: str) -> None:
    """Logits move by several units at every step; the tokens of these tiny models are too sure to change."""
    model, plain = mmlens.HookedVLM(tiny.tiny_model(family)), tiny.tiny_model(family)
    inputs = tiny.tiny_inputs(family, (2, 1))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    clean = plain.generate(**inputs, **options)

    def zero(module: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (torch.zeros_like(args[0]),)

    for layer in plain.get_decoder().layers:
        layer.self_attn.o_proj.register_forward_pre_hook(zero)
    expected = plain.generate(**inputs, **options)
    heads = [
        (f"blocks.{layer}.attn.hook_z", lambda z, hook: torch.zeros_like(z))
        for layer in range(model.cfg.n_layers)
    ]
    with model.hooks(fwd_hooks=heads):
        found = model.generate(inputs, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for step, logits in enumerate(found.logits):
        torch.testing.assert_close(logits, expected.logits[step], atol=1e-4, rtol=1e-5)
        assert (logits - clean.logits[step]).abs().max() > 1
