"""Attribution patching against finite differences, frozen runs and patterns recomputed by plain hooks."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from scipy import stats
from tiny.wrapped import QUESTION, hooked
from torch import Tensor, nn

import mmlens
from mmlens.attribution.check import PatchingComparison, compare_with_patching
from mmlens.attribution.edges import EdgeAttribution, Site, attribute_edges
from mmlens.attribution.nodes import Attribution, attribute
from mmlens.attribution.patterns import _key_changes, _score_factor
from mmlens.heads import HeadGrid
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import HookNeverFiredError, UnknownHookError
from mmlens.model.prompt import Prompt

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "idefics3", "gemma3")
"""Qwen3-VL has deep image features, Idefics3 tiles, Gemma 3 norms after attention and MLP."""


def contrast(logits: Tensor, prompt: Prompt) -> Tensor:
    """A smooth metric: how much more likely one token is than another."""
    return (logits[:, -1, 5] - logits[:, -1, 9]).float()


@functools.cache
def setting(family: str) -> tuple[HookedVLM, Prompt, Prompt]:
    """The model, two prompts of different length in one batch, and a source with other images and another word."""
    model = hooked(family)
    images = tiny.tiny_images(3, seed=1)
    flipped = [image.transpose(1) for image in images]
    prompt = model.prompt([QUESTION, "Where?"], images=[images[:2], images[2:]])
    source = model.prompt([QUESTION.replace("K", "Q"), "Where?"], images=[flipped[:2], flipped[2:]])
    return model, prompt, source


@torch.no_grad()
def cached(model: HookedVLM, prompt: Prompt, *names: str) -> dict[str, Tensor]:
    cache = model.run_with_cache(prompt, names_filter=list(dict.fromkeys(names)), logits_to_keep=1)[1]
    return {name: cache[name] for name in names}


@torch.no_grad()
def measured(model: HookedVLM, prompt: Prompt, *hooks: Any) -> Tensor:
    return contrast(model.run_with_hooks(prompt, fwd_hooks=list(hooks), logits_to_keep=1), prompt).double()


def slope(value: Callable[[float], Tensor], h: float = 2e-2) -> Tensor:
    """The derivative at 0 by central differences of two widths, exact to the fourth order."""
    wide, narrow = ((value(step) - value(-step)) / (2 * step) for step in (2 * h, h))
    return (4 * narrow - wide) / 3


def shift(change: Tensor, part: float) -> Callable[..., Tensor]:
    return lambda x, hook: x + part * change


def close(estimate: Tensor, truth: Tensor, rtol: float = 1e-2, atol: float = 2e-3) -> None:
    torch.testing.assert_close(estimate.double(), truth.double(), rtol=rtol, atol=atol)


# ---------------------------------------------------------------------- nodes


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_slopes_towards_the_source(family: str) -> None:
    model, prompt, source = setting(family)
    names = [
        "hook_embed",
        "image.hook_embed",
        "blocks.1.attn.hook_z",
        "blocks.1.attn.hook_k",
        "blocks.1.hook_mlp_out",
    ]
    names += ["blocks.1.hook_resid_mid", "blocks.1.image.hook_resid_post", "blocks.0.attn.hook_pattern"]
    names += ["blocks.0.hook_deepstack"] if model.anatomy.deep_after else []
    attribution = attribute(model, prompt, source, contrast, nodes=names)
    clean, there = cached(model, prompt, *names), cached(model, source, *names)
    for name in names:
        change = there[name] - clean[name]

        def value(part: float, name: str = name, change: Tensor = change) -> Tensor:
            return measured(model, prompt, (name, shift(change, part)))

        scores = attribution.scores[name]
        close(scores if scores.ndim == 1 else scores.sum(-1), slope(value))
    assert attribution.scores["hook_embed"].abs().min() > 1e-3


@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_each_head_and_position_has_its_own_slope(family: str) -> None:
    model, prompt, source = setting(family)
    name, head, last = "blocks.1.attn.hook_v", 1, prompt.shape[1] - 1
    scores = attribute(model, prompt, source, contrast, nodes=name, by_position=True).scores[name]
    change = cached(model, source, name)[name] - cached(model, prompt, name)[name]
    for position in (last, last - 12):
        only = torch.zeros_like(change)
        only[:, position, head] = change[:, position, head]
        truth = slope(lambda part, only=only: measured(model, prompt, (name, shift(only, part))))
        close(scores[:, position, head], truth, atol=1e-4)
        assert truth.abs().max() > 1e-3
    whole = attribute(model, prompt, source, contrast, nodes=name).scores[name]
    close(scores.nansum(1), whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(scores[..., 0].isnan(), prompt.token_map.is_padding)


def test_gradients_are_those_of_the_plain_model() -> None:
    """The Hugging Face model alone: its own autograd at the input of its own output projection."""
    model, prompt, source = setting("llava")
    plain = tiny.tiny_model("llava").eval()
    projection = plain.model.language_model.layers[1].self_attn.o_proj
    seen: list[Tensor] = []
    handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    contrast(plain(**prompt.inputs).logits, prompt).sum().backward(inputs=[seen[0]])
    assert seen[0].grad is not None
    with torch.no_grad():
        plain(**source.inputs)
    handle.remove()
    expected = ((seen[1] - seen[0]) * seen[0].grad).unflatten(-1, (4, 16)).sum((1, 3))
    close(
        attribute(model, prompt, source, contrast, nodes="z").scores["blocks.1.attn.hook_z"],
        expected,
        atol=1e-5,
    )


def test_scores_of_a_batch_are_those_of_its_examples() -> None:
    model = hooked("qwen2_5_vl")
    images = tiny.tiny_images(4, seed=3, sizes=[(64, 48)])
    both = model.prompt([QUESTION] * 2, images=[images[:1], images[1:2]])
    other = model.prompt([QUESTION] * 2, images=[images[2:3], images[3:]])
    nodes = ("z", "mlp", "resid_pre", "image")
    together = attribute(model, both, other, contrast, nodes=nodes, by_position=True)
    for row in (0, 1):
        alone, its = (model.prompt(QUESTION, images=images[i : i + 1]) for i in (row, 2 + row))
        single = attribute(model, alone, its, contrast, nodes=nodes, by_position=True)
        for name, scores in single.scores.items():
            torch.testing.assert_close(
                together.scores[name][row], scores[0], atol=2e-4, rtol=1e-3, equal_nan=True
            )


def test_scores_are_exact_effects_where_the_metric_is_linear() -> None:
    """Without final norm and last MLP, logits are linear in the last layer's heads, and in the stream after them."""
    plain = tiny.tiny_model("llava").eval()
    plain.model.language_model.norm = nn.Identity()
    plain.model.language_model.layers[2].mlp.down_proj.weight.data.zero_()
    model = HookedVLM(plain, tiny.tiny_processor("llava"))
    _, prompt, source = setting("llava")
    nodes = [
        "blocks.2.attn.hook_z",
        "blocks.2.attn.hook_v",
        "blocks.2.hook_resid_post",
        "blocks.2.hook_attn_out",
    ]
    for by_position in (False, True):
        attribution = attribute(model, prompt, source, contrast, nodes=nodes, by_position=by_position)
        compared = compare_with_patching(model, prompt, source, contrast, attribution, n=24)
        np.testing.assert_allclose(compared.table["estimate"], compared.table["exact"], atol=2e-5)
        assert (compared.n == 16 or by_position) and compared.pearson > 0.9999
        assert compared.table["exact"].abs().max() > 1e-2


@pytest.mark.parametrize("family", ["qwen3_vl", "idefics3"])
def test_vision_side(family: str) -> None:
    model = hooked(family)
    images = tiny.tiny_images(2, seed=4, sizes=[(64, 48)])
    prompt, source = (model.prompt(QUESTION, images=[image]) for image in images)
    names = ["vision.blocks.1.attn.hook_z", "vision.blocks.1.hook_resid_post", "projector.hook_out"]
    attribution = attribute(model, prompt, source, contrast, nodes=names)
    clean, there = cached(model, prompt, *names), cached(model, source, *names)
    for name in names:
        change = there[name] - clean[name]
        truth = slope(
            lambda part, name=name, change=change: measured(model, prompt, (name, shift(change, part)))
        )
        scores = attribution.scores[name]
        close(scores if scores.ndim == 1 else scores.sum(-1), truth)
    rows = attribute(model, prompt, source, contrast, nodes=names, by_position=True)
    for name in names:
        close(rows.scores[name].sum(1), attribution.scores[name], atol=1e-4)
    compared = compare_with_patching(model, prompt, source, contrast, rows, n=5)
    assert compared.n == 5 and bool(np.isfinite(compared.table["exact"]).all())


# ---------------------------------------------------------------------- corrections


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "smolvlm"])
def test_integrated_activation_sums_to_the_exact_effect(family: str) -> None:
    model, prompt, source = setting(family)
    names = ["blocks.1.attn.hook_z", "blocks.2.hook_mlp_out"]
    attribution = attribute(
        model, prompt, source, contrast, nodes=names, method="integrated_activation", steps=12
    )
    there, clean = cached(model, source, *names), measured(model, prompt)
    for name in names:
        exact = measured(model, prompt, (name, lambda x, hook: there[hook.name])) - clean
        scores = attribution.scores[name]
        close(scores if scores.ndim == 1 else scores.sum(-1), exact, rtol=3e-2, atol=3e-2)


def test_integrated_activation_takes_the_midpoints() -> None:
    model, prompt, source = setting("llava")
    name = "blocks.0.attn.hook_z"
    attribution = attribute(
        model, prompt, source, contrast, nodes=name, method="integrated_activation", steps=2
    )
    change = cached(model, source, name)[name] - cached(model, prompt, name)[name]
    slopes = [
        slope(lambda h, part=part: measured(model, prompt, (name, shift(change, part + h))))
        for part in (0.25, 0.75)
    ]
    close(attribution.scores[name].sum(-1), torch.stack(slopes).mean(0))


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_integrated_is_the_mean_slope_along_the_embeddings(family: str) -> None:
    model, prompt, source = setting(family)
    moved = ["hook_embed", *(f"blocks.{layer}.hook_deepstack" for layer in model.anatomy.deep_after)]
    name, steps = "blocks.1.attn.hook_z", 3
    attribution = attribute(
        model, prompt, source, contrast, nodes=[name, "embed"], method="integrated", steps=steps
    )
    clean, there = cached(model, prompt, name, *moved), cached(model, source, name, *moved)
    change = there[name] - clean[name]
    slopes = []
    for i in range(steps):
        part = (i + 0.5) / steps
        path = [(at, shift(there[at] - clean[at], part)) for at in moved]
        slopes.append(slope(lambda h, path=path: measured(model, prompt, *path, (name, shift(change, h)))))
    close(attribution.scores[name].sum(-1), torch.stack(slopes).mean(0))
    # Without DeepStack the embeddings are all that changes, and theirs sum to the whole difference.
    if not model.anatomy.deep_after:
        fine = attribute(model, prompt, source, contrast, nodes="embed", method="integrated", steps=24)
        exact = measured(model, source) - measured(model, prompt)
        close(fine.scores["hook_embed"], exact, rtol=3e-2, atol=3e-2)


def test_integrated_refuses_a_path_that_does_not_reach_the_source() -> None:
    """Gemma 4's layers read embeddings of the token ids of their own."""
    model, prompt, source = setting("gemma4")
    with pytest.raises(ValueError, match=r"cannot reach the source: 'gemma4'"):
        attribute(model, prompt, source, contrast, nodes="z", method="integrated")


@pytest.mark.parametrize("family", ["gemma3", "granite4_vision"])
def test_graddrop_is_the_mean_slope_with_one_layer_frozen(family: str) -> None:
    """A layer that passes no gradient is one whose contributions stay at their clean values."""
    model, prompt, source = setting(family)
    names = ["blocks.0.attn.hook_z", "blocks.1.hook_resid_mid", "hook_embed"]
    # Granite 4 Vision multiplies what its layers add, and its runs are slow.
    names = names[:1] if family == "granite4_vision" else names
    attribution = attribute(model, prompt, source, contrast, nodes=names, method="graddrop")
    added = [
        f"blocks.{layer}.{hook}"
        for layer in range(model.cfg.n_layers)
        for hook in ("hook_attn_out", "hook_mlp_out")
    ]
    clean, there = cached(model, prompt, *names, *added), cached(model, source, *names)
    within = {"blocks.0.attn.hook_z": 0}
    for name in names:
        change = there[name] - clean[name]
        if name.endswith("hook_z"):
            change[:, :, [0, 1, 3]] = 0
        slopes = []
        for layer in set(range(model.cfg.n_layers)) - {within.get(name)}:
            frozen = [
                (at, lambda x, hook: clean[hook.name]) for at in added if at.startswith(f"blocks.{layer}.")
            ]

            def value(h: float, frozen: Any = frozen, name: str = name, change: Tensor = change) -> Tensor:
                return measured(model, prompt, (name, shift(change, h)), *frozen)

            slopes.append(slope(value))
        scores = attribution.scores[name]
        close(scores if scores.ndim == 1 else scores[:, 2], torch.stack(slopes).abs().mean(0))
    assert not attribution.is_signed


def slow_pattern_score(
    model: HookedVLM, prompt: Prompt, source: Prompt, name: str, head: int, position: int | None
) -> Tensor:
    """The pattern of a run with the patched q or k, times the gradient that autograd gives at the clean pattern."""
    pattern_name = name.rsplit(".", 1)[0] + ".hook_pattern"
    there = cached(model, source, name)[name]
    leaf: list[Tensor] = []

    def patch(x: Tensor, hook: Any) -> Tensor:
        where = slice(None) if position is None else position
        x[:, where, head] = there[:, where, head]
        return x

    def start(x: Tensor, hook: Any) -> Tensor:
        leaf.append(x.detach().clone().requires_grad_())
        return leaf[0]

    logits = model.run_with_hooks(prompt, fwd_hooks=[(pattern_name, start)], logits_to_keep=1)
    contrast(logits, prompt).sum().backward(inputs=leaf)
    with model.hooks(fwd_hooks=[(name, patch)]):
        patched = cached(model, prompt, pattern_name)[pattern_name]
    return ((patched - leaf[0].detach()) * leaf[0].grad).sum((1, 2, 3))


@pytest.mark.parametrize("family", FAMILIES)
def test_qk_fix_takes_the_recomputed_pattern(family: str) -> None:
    model, prompt, source = setting(family)
    last = prompt.shape[1] - 1
    whole = attribute(model, prompt, source, contrast, nodes=("q", "k"), method="qk_fix")
    single = attribute(model, prompt, source, contrast, nodes=("q", "k"), method="qk_fix", by_position=True)
    for name, head in (("blocks.1.attn.hook_q", 3), ("blocks.1.attn.hook_k", 1)):
        close(
            whole.scores[name][:, head],
            slow_pattern_score(model, prompt, source, name, head, None),
            atol=3e-6,
        )
        for at in (last, last - 10):
            truth = slow_pattern_score(model, prompt, source, name, head, at)
            close(single.scores[name][:, at, head], truth, atol=3e-6)
            assert truth.abs().max() > 3e-5


def test_qk_fix_of_a_key_that_stands_alone_or_saturates() -> None:
    """The first position attends to itself only; a saturated row still answers to a large change of one score."""
    scores = torch.tensor([[3.0, 0.0, 0.0], [60.0, 1.0, 0.0], [0.1, 0.2, 0.2], [-90.0, 0.0, 0.0]])
    allowed = torch.ones(4, 3).bool().tril()
    moved = torch.tensor([[-9.0, 0.0, 0.0], [-80.0, 70.0, 0.0], [0.5, -2.0, 1.0], [99.0, -50.0, 0.0]])
    gradient = torch.tensor([[2.0, 0.0, 0.0], [1.0, -1.0, 0.0], [0.3, 0.7, -0.4], [-0.2, 0.1, 0.5]])
    changes = _key_changes(scores, moved, gradient, allowed)
    for row, key in torch.nonzero(allowed).tolist():
        own = scores[row].masked_fill(~allowed[row], -torch.inf).double()
        before = own.softmax(-1)
        own[key] += moved[row, key]
        expected = ((own.softmax(-1) - before) * gradient[row]).sum()
        assert float(changes[row, key]) == pytest.approx(float(expected), abs=1e-6)


def test_atp_star_is_the_qk_fix_under_graddrop() -> None:
    """In a model of two layers, GradDrop leaves one run to a query of the first: the second layer frozen."""
    plain = tiny.tiny_model("llava").eval()
    plain.model.language_model.layers = plain.model.language_model.layers[:2]
    plain.config.get_text_config().num_hidden_layers = 2
    model = HookedVLM(plain, tiny.tiny_processor("llava"))
    _, prompt, source = setting("llava")
    name, added = "blocks.0.attn.hook_q", ("blocks.1.hook_attn_out", "blocks.1.hook_mlp_out")
    clean = cached(model, prompt, *added)
    with model.hooks(fwd_hooks=[(at, lambda x, hook: clean[hook.name]) for at in added]):
        expected = slow_pattern_score(model, prompt, source, name, 2, None).abs()
    attribution = attribute(model, prompt, source, contrast, nodes="q", method="atp_star")
    close(attribution.scores[name][:, 2], expected, atol=1e-4)


def test_qk_fix_is_refused_where_a_pattern_is_no_softmax_of_q_k() -> None:
    model, _, _ = setting("llava")
    products = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    allowed = torch.ones_like(products).bool().tril()
    pattern = (0.3 * products).masked_fill(~allowed, -torch.inf).softmax(-1)
    assert _score_factor(model, 0, products, 0.3 * products, pattern, allowed) == pytest.approx(0.3)
    capped = torch.tanh(products)
    with_cap = capped.masked_fill(~allowed, -torch.inf).softmax(-1)
    for scores, shown in ((capped, with_cap), (0.3 * products, 0.9 * pattern)):
        with pytest.raises(ValueError, match="softcap, a learnt sink"):
            _score_factor(model, 0, products, scores, shown, allowed)
    shared, prompt, source = setting("gemma4")
    with pytest.raises(ValueError, match="share keys"):
        attribute(shared, prompt, source, contrast, nodes="k", method="qk_fix")
    latent, prompt, source = setting("mistral_large4")
    with pytest.raises(ValueError, match="latent attention"):
        attribute(latent, prompt, source, contrast, nodes="k", method="qk_fix")


# ---------------------------------------------------------------------- edges


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_edges_are_slopes_at_what_the_receiver_reads(family: str) -> None:
    """The receiver's input moves towards what it would read if the sender's output came from the source."""
    model, prompt, source = setting(family)
    edges = attribute_edges(model, prompt, source, contrast, senders=("z", "mlp", "image", "deepstack"))
    chosen = [
        (Site("z", 0, 1), Site("q", 1, 2), "blocks.1.attn.hook_q_input"),
        (Site("z", 0, 3), Site("v", 2, 1), "blocks.2.attn.hook_v_input"),
        (Site("z", 1, 2), Site("mlp", 1), "blocks.1.hook_mlp_in"),
        (Site("mlp", 0), Site("k", 2, 0), "blocks.2.attn.hook_k_input"),
        (Site("image"), Site("v", 0, 1), "blocks.0.attn.hook_v_input"),
        (Site("z", 2, 0), Site("logits"), "blocks.2.hook_resid_post"),
    ]
    if model.anatomy.deep_after:
        chosen.append((Site("deepstack", 0), Site("mlp", 1), "blocks.1.hook_mlp_in"))
    for sender, receiver, at in chosen:
        write = write_change(model, prompt, source, sender)

        def move(x: Tensor, hook: Any, part: float, write: Tensor, head: int | None) -> Tensor:
            x = x.clone()
            (x if head is None else x[:, :, head])[:] += part * write
            return x

        hook = functools.partial(move, write=write, head=receiver.head)
        truth = slope(
            lambda h, at=at, hook=hook: measured(model, prompt, (at, functools.partial(hook, part=h)))
        )
        score = edges.scores[:, edges.senders.index(sender), edges.receivers.index(receiver)]
        close(score, truth, atol=1e-3)


@torch.no_grad()
def write_change(model: HookedVLM, prompt: Prompt, source: Prompt, sender: Site) -> Tensor:
    """How the stream after the sender moves, per unit of the sender's way to the source, by finite differences."""
    names = {"z": "attn.hook_z", "mlp": "hook_mlp_out", "deepstack": "hook_deepstack"}
    name = "image.hook_embed" if sender.layer is None else f"blocks.{sender.layer}.{names[sender.kind]}"
    change = cached(model, source, name)[name] - cached(model, prompt, name)[name]
    if sender.kind == "z":
        others = [head for head in range(4) if head != sender.head]
        change[:, :, others] = 0
    after = {"z": "hook_resid_mid", "mlp": "hook_resid_post"}.get(sender.kind, "hook_resid_pre")
    layer = {"deepstack": 1, "image": 0}.get(sender.kind, sender.layer)

    def stream(part: float) -> Tensor:
        with model.hooks(fwd_hooks=[(name, shift(change, part))]):
            return cached(model, prompt, f"blocks.{layer}.{after}")[f"blocks.{layer}.{after}"].double()

    return slope(stream).float()


@pytest.mark.parametrize(
    ("family", "method"),
    [*((family, "gradient") for family in FAMILIES), ("qwen3_vl", "integrated"), ("gemma3", "integrated")],
)
def test_edges_of_a_sender_sum_to_its_node(family: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt, source = setting(family)
    # Few positions at a time, which no sum over positions may notice.
    monkeypatch.setattr("mmlens.attribution.edges._SENDER_CHUNK_BYTES", 4 * 2 * 17 * 64 * 16)
    edges = attribute_edges(
        model, prompt, source, contrast, senders=("embed", "z", "mlp"), method=method, steps=2
    )
    nodes = attribute(model, prompt, source, contrast, nodes=("embed", "z", "mlp"), method=method, steps=2)
    hooks = {"z": "attn.hook_z", "mlp": "hook_mlp_out"}
    for i, sender in enumerate(edges.senders):
        name = "hook_embed" if sender.layer is None else f"blocks.{sender.layer}.{hooks[sender.kind]}"
        node = nodes.scores[name] if sender.head is None else nodes.scores[name][:, sender.head]
        close(edges.scores[:, i].nansum(-1), node, rtol=1e-3, atol=2e-4)
    present = ~edges.scores[0].isnan()
    assert (
        int(present.sum())
        == len(edges.table()) // 2
        == sum(a.time < b.time for a in edges.senders for b in edges.receivers)
    )


def test_edges_to_attention_as_a_whole_are_those_to_its_heads() -> None:
    model, prompt, source = setting("qwen3_vl")
    split = attribute_edges(model, prompt, source, contrast, receivers=("q", "k", "v"))
    whole = attribute_edges(model, prompt, source, contrast, receivers="attn")
    for i, receiver in enumerate(whole.receivers):
        columns = [j for j, one in enumerate(split.receivers) if one.layer == receiver.layer]
        close(split.scores[:, :, columns].sum(-1).nan_to_num(), whole.scores[:, :, i].nan_to_num(), atol=1e-4)


def test_edges_of_a_linear_reader_are_exact() -> None:
    plain = tiny.tiny_model("qwen3_vl").eval()
    plain.model.language_model.norm = nn.Identity()
    model = HookedVLM(plain, tiny.tiny_processor("qwen3_vl"))
    _, prompt, source = setting("qwen3_vl")
    edges = attribute_edges(
        model, prompt, source, contrast, senders=("image", "z", "mlp", "deepstack"), receivers="logits"
    )
    compared = compare_with_patching(model, prompt, source, contrast, edges, n=None)
    assert compared.n == 2 * (1 + 12 + 3 + 2 + (len(model.anatomy.deep_after) - 2))
    np.testing.assert_allclose(compared.table["estimate"], compared.table["exact"], atol=5e-5)
    assert compared.table["exact"].abs().max() > 1e-2


# ---------------------------------------------------------------------- what stays as it was


def test_weights_and_hooks_are_as_before_even_after_an_error() -> None:
    model, prompt, source = setting("qwen3_vl")
    weights = list(model.hf_model.parameters())
    weights[3].requires_grad_(False)
    before = [weight.requires_grad for weight in weights]
    logits = measured(model, prompt)

    def broken(logits: Tensor, prompt: Prompt) -> Tensor:
        raise KeyError("a metric of the user's own")

    with torch.no_grad():
        for method in ("gradient", "atp_star"):
            attribute(model, prompt, source, contrast, nodes=("z", "q"), method=method)
        attribute_edges(model, prompt, source, contrast)
        for function in (attribute, attribute_edges):
            with pytest.raises(KeyError, match="own"):
                function(model, prompt, source, broken)
    assert [weight.requires_grad for weight in weights] == before
    weights[3].requires_grad_(True)
    assert all(weight.grad is None for weight in weights)
    assert not any(point.is_live for point in model.hook_dict.values())
    assert not any(
        layer.post_norm1._forward_pre_hooks for layer in model.anatomy.language if layer.post_norm1
    )
    assert torch.equal(measured(model, prompt), logits)


def test_inside_inference_mode_and_with_a_hook_of_the_users_own() -> None:
    model, prompt, source = setting("llava")
    plain = attribute(model, prompt, source, contrast)
    with torch.inference_mode():
        inside = attribute(model, prompt, source, contrast)
    assert all(torch.equal(plain.scores[name], inside.scores[name]) for name in plain.scores)
    with model.hooks(fwd_hooks=[("blocks.2.attn.hook_z", lambda z, hook: torch.zeros_like(z))]):
        ablated = attribute(model, prompt, source, contrast)
    assert not torch.equal(ablated.scores["blocks.0.attn.hook_z"], plain.scores["blocks.0.attn.hook_z"])


def test_bfloat16_gives_the_same_ranking() -> None:
    model, prompt, source = setting("gemma3")
    halved = hooked("gemma3", dtype=torch.bfloat16)
    casts = [
        dataclasses.replace(one, inputs=tiny.cast(one.inputs, torch.bfloat16)) for one in (prompt, source)
    ]
    for nodes, method in ((("z", "mlp"), "gradient"), ("q", "qk_fix")):
        full = attribute(model, prompt, source, contrast, nodes=nodes, method=method)
        half = attribute(halved, *casts, contrast, nodes=nodes, method=method)
        pairs = [torch.cat([x.scores[name].flatten() for name in full.scores]) for x in (full, half)]
        assert float(stats.pearsonr(*pairs).statistic) > 0.97
    edges, rounded = (
        attribute_edges(m, *p, contrast)  # type: ignore[call-arg]
        for m, p in ((model, (prompt, source)), (halved, casts))
    )
    there = ~edges.scores.isnan()
    assert float(stats.pearsonr(edges.scores[there], rounded.scores[there]).statistic) > 0.95


def test_a_cache_is_a_source() -> None:
    model, prompt, source = setting("internvl")
    by_prompt = attribute(model, prompt, source, contrast)
    _, cache = model.run_with_cache(source, logits_to_keep=1)
    for given in (cache, cache.cache_dict):
        scores = attribute(model, prompt, given, contrast).scores["blocks.1.attn.hook_z"]
        close(scores, by_prompt.scores["blocks.1.attn.hook_z"], rtol=1e-4, atol=1e-5)
    with pytest.raises(UnknownHookError, match=r"no activation in the source 'blocks.0.attn.hook_z'"):
        attribute(model, prompt, {"blocks.0.hook_mlp_out": torch.zeros(1)}, contrast)


# ---------------------------------------------------------------------- results


def test_tables_and_head_scores() -> None:
    model, prompt, source = setting("qwen3_vl")
    attribution = attribute(model, prompt, source, contrast, nodes=("z", "k", "mlp"))
    table = attribution.table()
    assert list(table.columns) == ["hook", "layer", "head", "position", "example", "score"]
    assert len(table) == 2 * 3 * (4 + 2 + 1)
    row = table[(table["hook"] == "blocks.1.attn.hook_z") & (table["head"] == 2) & (table["example"] == 1)]
    assert row["score"].item() == pytest.approx(float(attribution.scores["blocks.1.attn.hook_z"][1, 2]))
    assert table[table["hook"] == "blocks.0.hook_mlp_out"]["head"].isna().all()
    heads = attribution.heads()
    assert heads.per_example.shape == (2, 3, 4)
    assert torch.equal(heads.per_example[:, 1], attribution.scores["blocks.1.attn.hook_z"])
    with pytest.raises(ValueError, match="KV head"):
        attribution.heads("k")
    with pytest.raises(ValueError, match="'q' was not scored"):
        attribution.heads("q")
    images = attribute(model, prompt, source, contrast, nodes="image", by_position=True)
    assert len(images.table()) == int(prompt.token_map.is_image.sum())
    with pytest.raises(ValueError, match="by position"):
        images.heads()


def test_hybrid_families_have_heads_in_their_attention_layers_only() -> None:
    model, prompt, source = setting("qwen3_5")
    attribution = attribute(model, prompt, source, contrast)
    assert {name for name in attribution.scores if "hook_z" in name} == {
        f"blocks.{layer}.attn.hook_z" for layer in model.attention_layers
    }
    assert attribution.heads().grid == model.grid


def test_comparison_statistics_against_scipy_and_by_hand() -> None:
    import pandas as pd

    estimate, exact = [1.0, -2.0, 0.5, 0.1], [2.0, -1.0, -0.5, 0.0]
    compared = PatchingComparison(pd.DataFrame({"estimate": estimate, "exact": exact}), True)
    assert compared.pearson == pytest.approx(np.corrcoef(estimate, exact)[0, 1])
    assert compared.spearman == pytest.approx(0.8)
    assert compared.sign_agreement == pytest.approx(2 / 3) and compared.n == 4
    flat = PatchingComparison(pd.DataFrame({"estimate": [1.0, 1.0], "exact": [0.0, 1.0]}), False)
    assert np.isnan(flat.pearson) and np.isnan(flat.sign_agreement)


def test_compared_effects_are_those_of_plain_hooks() -> None:
    model, prompt, source = setting("llava_onevision")
    names = ["blocks.1.attn.hook_z", "image.hook_embed"]
    there, clean = cached(model, source, *names), measured(model, prompt)
    mask = prompt.token_map.is_image

    def patch(x: Tensor, hook: Any, row: Any) -> Tensor:
        where = slice(None) if row.position is None or np.isnan(row.position) else int(row.position)
        if hook.name == names[0]:
            x[:, where, int(row.head)] = there[hook.name][:, where, int(row.head)]
            return x
        chosen = torch.zeros_like(mask)
        chosen[:, where] = True
        return torch.where(chosen[mask][:, None], there[hook.name], x)

    for name, by_position in itertools.product(names, (False, True)):
        attribution = attribute(model, prompt, source, contrast, nodes=name, by_position=by_position)
        table = compare_with_patching(model, prompt, source, contrast, attribution, n=4, seed=2).table
        assert table["exact"].abs().max() > 1e-4
        for row in table.itertuples():
            effect = measured(model, prompt, (row.hook, functools.partial(patch, row=row))) - clean
            assert row.exact == pytest.approx(float(effect[row.example]), abs=1e-5)


def test_estimates_agree_with_exact_patching_on_the_micro_model(micro: HookedVLM) -> None:
    examples = mmlens.scene_examples("objects", 8, seed=0)
    prompt, source = micro.prompt_examples(examples[:4]), micro.prompt_examples(examples[4:])
    agreement = {}
    for nodes, method in (("z", "gradient"), ("q", "gradient"), ("q", "qk_fix")):
        attribution = attribute(micro, prompt, source, mmlens.logit_difference, nodes=nodes, method=method)
        compared = compare_with_patching(micro, prompt, source, mmlens.logit_difference, attribution, n=20)
        agreement[nodes, method] = compared.spearman
    assert agreement["z", "gradient"] > 0.75
    # Saturated attention hides queries from the gradient; the recomputed pattern finds them.
    assert agreement["q", "qk_fix"] > max(0.75, agreement["q", "gradient"] + 0.1)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_compared_edges_are_those_of_plain_hooks(family: str) -> None:
    """The sender's write is known from a run with its output patched, and added to what the receiver reads."""
    model, prompt, source = setting(family)
    pairs: list[tuple[Site, Site]] = [
        (Site("z", 0, 1), Site("q", 1, 2)),
        (Site("z", 0, 3), Site("k", 2, 1)),
        (Site("mlp", 0), Site("v", 2, 1)),
        (Site("attn", 0), Site("mlp", 0)),
        (Site("z", 1, 2), Site("attn", 2)),
        (Site("image"), Site("v", 0, 1)),
        (Site("embed"), Site("k", 0, 0)),
        (Site("z", 2, 0), Site("logits")),
    ]
    pairs += [(Site("deepstack", 0), Site("mlp", 1))] if model.anatomy.deep_after else []
    hooks = {"mlp": "hook_mlp_in", "attn": "hook_attn_in"}
    outputs = {
        "z": "attn.hook_z",
        "mlp": "hook_mlp_out",
        "deepstack": "hook_deepstack",
        "attn": "hook_attn_out",
    }
    streams = {"mlp": "hook_resid_post", "z": "hook_resid_mid", "attn": "hook_resid_mid"}
    clean, truths = measured(model, prompt), []
    for sender, receiver in pairs:
        write_at = f"blocks.{sender.layer}.{outputs[sender.kind]}" if sender.layer is not None else ""
        write_at = write_at or {"image": "image.hook_embed", "embed": "hook_embed"}[sender.kind]
        stream_layer = 1 if sender.kind == "deepstack" else sender.layer or 0
        stream = f"blocks.{stream_layer}.{streams.get(sender.kind, 'hook_resid_pre')}"
        there = cached(model, source, write_at)[write_at]

        def patch(x: Tensor, hook: Any, sender: Site = sender, there: Tensor = there) -> Tensor:
            (x if sender.head is None else x[:, :, sender.head])[:] = (
                there if sender.head is None else there[:, :, sender.head]
            )
            return x

        before = cached(model, prompt, stream)[stream]
        with model.hooks(fwd_hooks=[(write_at, patch)]):
            write = cached(model, prompt, stream)[stream] - before
        read_at = f"blocks.{receiver.layer}.{hooks.get(receiver.kind, f'attn.hook_{receiver.kind}_input')}"
        read_at = "blocks.2.hook_resid_post" if receiver.kind == "logits" else read_at

        def add(x: Tensor, hook: Any, write: Tensor = write, head: int | None = receiver.head) -> Tensor:
            (x if head is None else x[:, :, head])[:] += write
            return x

        truth = measured(model, prompt, (read_at, add)) - clean
        truths.append(truth)
        assert truth.abs().max() > 1e-3
    scores = torch.full((2, len(pairs), len(pairs)), torch.nan)
    scores.diagonal(dim1=1, dim2=2).zero_()
    senders, receivers = zip(*pairs, strict=True)
    edges = EdgeAttribution(scores, senders, receivers, "gradient")
    table = compare_with_patching(model, prompt, source, contrast, edges, n=None).table
    assert list(table["sender"])[::2] == [*map(str, senders)]
    assert list(table["receiver"])[::2] == [*map(str, receivers)]
    np.testing.assert_allclose(table["exact"], torch.cat(truths), atol=2e-5)


def test_edges_from_the_embeddings_fall_off_a_cliff(micro: HookedVLM) -> None:
    """The estimate of such an edge is the right slope; its effect is another thing, unlike those of heads."""
    examples = mmlens.scene_examples("objects", 4, seed=0)
    prompt, source = micro.prompt_examples(examples[:2]), micro.prompt_examples(examples[2:])
    name, metric = "hook_embed", mmlens.logit_difference
    change = cached(micro, source, name)[name] - cached(micro, prompt, name)[name]

    @torch.no_grad()
    def value(part: float) -> Tensor:
        def move(x: Tensor, hook: Any) -> Tensor:
            x[:, :, 2] += part * change
            return x

        hooks = [("blocks.0.attn.hook_v_input", move)]
        return metric(micro.run_with_hooks(prompt, fwd_hooks=hooks, logits_to_keep=1), prompt).double()

    edges = attribute_edges(micro, prompt, source, metric)
    receiver = edges.receivers.index(Site("v", 0, 2))
    score = edges.scores[:, edges.senders.index(Site("embed")), receiver]
    close(score, slope(value, h=5e-3), rtol=2e-2, atol=2e-2)
    effect = value(1.0) - value(0.0)
    assert float((effect - score).min()) < -20
    of_heads = attribute_edges(micro, prompt, source, metric, senders=("z", "mlp"))
    compared = compare_with_patching(micro, prompt, source, metric, of_heads, n=32)
    assert compared.pearson > 0.9 and compared.spearman > 0.9


def test_sources_are_those_of_patch() -> None:
    """A corruption, and a run under an intervention, give what their activations give."""
    model, prompt, source = setting("qwen3_vl")
    plain = attribute(model, prompt, source, contrast, nodes=("z", "image"))
    made = attribute(model, prompt, lambda model, prompt: source, contrast, nodes=("z", "image"))
    for name, scores in plain.scores.items():
        assert torch.equal(made.scores[name], scores)
    corruption = mmlens.interventions.blank_region((0, 0, 20, 20), fill="grey")
    blanked = corruption(model, prompt)
    for method in ("gradient", "integrated"):
        by_prompt, by_function = (
            attribute_edges(model, prompt, one, contrast, receivers="mlp", method=method, steps=2)
            for one in (blanked, corruption)
        )
        assert torch.equal(by_prompt.scores.nan_to_num(), by_function.scores.nan_to_num())
    ablated = mmlens.interventions.Source(under=mmlens.ablate([(0, 1)]))
    name = "blocks.0.attn.hook_z"
    scores = attribute(model, prompt, ablated, contrast, nodes="z").scores[name]
    zeros = {name: cached(model, prompt, name)[name]}
    zeros[name][:, :, 1] = 0
    close(scores, attribute(model, prompt, zeros, contrast, nodes=name).scores[name], atol=1e-5)
    assert not scores[:, [0, 2, 3]].any() and scores[:, 1].all()


def test_a_metric_that_reads_the_clean_run() -> None:
    model, prompt, source = setting("llava")
    name = "blocks.2.hook_mlp_out"
    attribution = attribute(
        model,
        prompt,
        source,
        mmlens.metrics.kl_to_clean,
        nodes=name,
        method="integrated_activation",
        steps=12,
    )
    compared = compare_with_patching(model, prompt, source, mmlens.metrics.kl_to_clean, attribution)
    np.testing.assert_allclose(compared.table["estimate"], compared.table["exact"], rtol=5e-2)
    assert compared.table["exact"].min() > 1e-3


def test_a_metric_that_edits_its_logits_changes_no_score() -> None:
    """Neither its own slopes, nor the clean logits, which every graph of an integrated method reads."""
    model, prompt, source = setting("qwen3_vl")

    def in_place(logits: Tensor, prompt: Prompt) -> Tensor:
        value = contrast(logits.clone(), prompt)
        logits.mul_(0)
        return value

    @mmlens.metrics.reads("clean logits")
    def weighted(logits: Tensor, prompt: Prompt, clean_logits: Tensor) -> Tensor:
        return contrast(logits, prompt) * (1 + clean_logits[:, -1, 5].abs())

    @mmlens.metrics.reads("clean logits")
    def weighted_in_place(logits: Tensor, prompt: Prompt, clean_logits: Tensor) -> Tensor:
        value = weighted(logits, prompt, clean_logits.clone())
        clean_logits.fill_(7.0)
        return value

    for method, metric, edits in (
        ("gradient", contrast, in_place),
        ("integrated_activation", weighted, weighted_in_place),
    ):
        plain, edited = (
            attribute(model, prompt, source, own, nodes="z", method=method) for own in (metric, edits)
        )
        for name in plain.scores:
            assert torch.equal(plain.scores[name], edited.scores[name])
            assert plain.scores[name].abs().sum() > 0


# ---------------------------------------------------------------------- errors


def test_bad_arguments_are_errors() -> None:
    model, prompt, source = setting("llava")
    with pytest.raises(ValueError, match=r"'gradients'; the nearest: 'gradient'"):
        attribute(model, prompt, source, contrast, method="gradients")
    with pytest.raises(ValueError, match=r"'resid'; the nearest: 'resid_pre'"):
        attribute(model, prompt, source, contrast, nodes="resid")
    with pytest.raises(ValueError, match=r"'blocks.0.attn.hook_Z'; the nearest: 'blocks.0.attn.hook_z'"):
        attribute(model, prompt, source, contrast, nodes=["blocks.0.attn.hook_Z"])
    with pytest.raises(ValueError, match="no nodes"):
        attribute(model, prompt, source, contrast, nodes=[])
    with pytest.raises(ValueError, match="attribute_edges"):
        attribute(model, prompt, source, contrast, nodes="blocks.0.attn.hook_q_input")
    with pytest.raises(ValueError, match="batch of one"):
        attribute(model, prompt, source, contrast, nodes="projector.hook_out")
    with pytest.raises(ValueError, match="steps is 0; expected"):
        attribute(model, prompt, source, contrast, method="integrated", steps=0)
    with pytest.raises(ValueError, match="not differentiable"):
        attribute(model, prompt, source, lambda logits, prompt: logits[:, -1].argmax(-1).float())
    with pytest.raises(ValueError, match=r"shape \[2\], not \[\]"):
        attribute(model, prompt, source, lambda logits, prompt: logits.sum())
    with pytest.raises(ValueError, match="NaN for example 0"):
        attribute(model, prompt, source, lambda logits, prompt: logits[:, -1, 0] * torch.nan)
    with pytest.raises(ValueError, match="generated answers, which have no gradient"):
        attribute(model, prompt, source, mmlens.metrics.exact_match)
    with pytest.raises(UnknownHookError, match="hook_resid_post"):
        attribute(
            model, prompt, cached(model, source, "hook_embed"), contrast, nodes="embed", method="integrated"
        )
    with pytest.raises(ValueError, match=r"'query'.*there are|'query'"):
        attribute_edges(model, prompt, source, contrast, receivers="query")
    with pytest.raises(ValueError, match="'qk_fix'"):
        attribute_edges(model, prompt, source, contrast, method="qk_fix")
    attribution = attribute(model, prompt, source, contrast)
    with pytest.raises(ValueError, match="n is 0; expected"):
        compare_with_patching(model, prompt, source, contrast, attribution, n=0)
    one = Attribution(
        {name: x[:1] for name, x in attribution.scores.items()}, "gradient", False, HeadGrid((4, 4, 4))
    )
    with pytest.raises(ValueError, match=r"1 example\(s\), the prompt has 2"):
        compare_with_patching(model, prompt, source, contrast, one)


def test_sources_of_another_layout_are_errors() -> None:
    model, prompt, _ = setting("llava_onevision")
    images = tiny.tiny_images(3, seed=1)
    longer = model.prompt(["Describe the scene. " * 6 + QUESTION, "Where?"], images=[images[:2], images[2:]])
    with pytest.raises(ValueError, match="example 0 has 61 positions .* and 115"):
        attribute(model, prompt, longer, contrast)
    swapped = model.prompt(["Where?", QUESTION], images=[images[2:], images[:2]])
    with pytest.raises(ValueError, match="laid out differently: example 0 has"):
        attribute(model, prompt, swapped, contrast)
    activations = {"blocks.0.hook_mlp_out": torch.zeros(2, 3, 64)}
    with pytest.raises(ValueError, match=r"\[2, 3, 64\], the prompt's"):
        attribute(model, prompt, activations, contrast, nodes="blocks.0.hook_mlp_out")


def test_refused_models() -> None:
    model, prompt, source = setting("llava")
    attention = model.anatomy.language[1].attention.module
    attention.attention_dropout = 0.1
    model.hf_model.train()
    try:
        with pytest.raises(RuntimeError, match="training mode"):
            attribute(model, prompt, source, contrast)
    finally:
        attention.attention_dropout = 0.0
        model.hf_model.eval()
    gated, prompt, source = setting("gemma4")
    with pytest.raises(ValueError, match="more than add to the stream"):
        attribute_edges(gated, prompt, source, contrast)
    with pytest.raises(ValueError, match="cannot drop one"):
        attribute(gated, prompt, source, contrast, method="graddrop")
    without, prompt, source = setting("exaone4_5")
    with pytest.raises(UnknownHookError, match="hook_q_input"):
        attribute_edges(without, prompt, source, contrast)


def test_images_are_asked_of_a_prompt_without_any() -> None:
    model, _, _ = setting("llava")
    prompt = model.prompt("What colour is the letter K?")
    with pytest.raises(HookNeverFiredError):
        attribute(model, prompt, prompt, contrast, nodes="image")


def test_a_comparison_is_of_the_prompt_and_the_model_that_were_attributed(micro: mmlens.HookedVLM) -> None:
    examples = mmlens.scene_examples("objects", 3, seed=0)
    prompt, other, source = (micro.prompt_examples([example]) for example in examples)
    metric = mmlens.logit_difference
    for attribution in (
        attribute(micro, prompt, source, metric, nodes="mlp"),
        attribute_edges(micro, prompt, source, metric, senders="mlp", receivers="mlp"),
    ):
        with pytest.raises(ValueError, match="of another prompt: example 0"):
            compare_with_patching(micro, other, source, metric, attribution, n=1)
        # Made anew of the same example, or with its images encoded, it is the same prompt.
        again = micro.encode_images(micro.prompt_examples(examples[:1]))
        assert compare_with_patching(micro, again, source, metric, attribution, n=1).n == 1
        tuned = mmlens.HookedVLM(copy.deepcopy(micro.hf_model), micro.processor)
        with torch.no_grad():
            tuned.hf_model.lm_head.weight.mul_(1.1)
        with pytest.raises(ValueError, match="of another model"):
            compare_with_patching(tuned, prompt, source, metric, attribution, n=1)
