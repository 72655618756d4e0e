"""Attention edges against the plain eager Hugging Face model with its masks, projections or values edited by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from tiny.wrapped import QUESTION, generate, hooked, padded_prompt, two_image_prompt
from torch import Tensor
from transformers import PreTrainedModel

import mmlens
from mmlens.interventions.attention_edges import bias_attention, knockout, scale_heads
from mmlens.interventions.composition import during
from mmlens.interventions.edits import Edit, EditContext
from mmlens.model.choosing import if_any
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import NoChangeWarning
from mmlens.model.prompt import Prompt
from mmlens.token_map import text_only_map

# Sliding windows with image tokens that see each other, prefixes seen both ways, convolution layers, layers that
# differ in their number of heads, latent attention and chunks, beside one family of each common kind.
EDGE_FAMILIES = (*tiny.REPRESENTATIVES, "gemma3", "gemma4", "paligemma", "lfm2_vl", "step3p7", "llama4")


@contextmanager
def edited_masks(
    plain: PreTrainedModel, layers: list[int], edit: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """The plain model's eager attention masks, [batch, head, query, key], as `edit` makes them in some layers."""
    n_fired = 0

    def on_input(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        nonlocal n_fired
        mask = kwargs["attention_mask"]
        assert mask is not None and mask.is_floating_point()
        n_fired += 1
        n_heads = module.o_proj.in_features // module.head_dim if hasattr(module, "o_proj") else 4
        return args, {**kwargs, "attention_mask": edit(mask.expand(-1, n_heads, -1, -1).clone())}

    decoder = plain.get_decoder()
    modules = [getattr(decoder, "model", decoder).layers[layer].self_attn for layer in layers]
    handles = [module.register_forward_pre_hook(on_input, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    assert n_fired == len(layers)


def edges(prompt: Prompt, queries: Tensor, keys: Tensor) -> Tensor:
    """[batch, 1, query, key]"""
    return (queries[:, None, :, None] & keys[:, None, None, :]) & ~prompt.token_map.is_padding[:, None, None]


def assert_same_logits(given: Tensor, expected: Tensor) -> None:
    """Within rounding: 1e-5 of the largest logit."""
    assert (given - expected).abs().max() <= 1e-5 * expected.abs().max()


def edge_prompt(model: HookedVLM, family: str) -> Prompt:
    """A left-padded batch of two rows; where the processor needs torchvision, of inputs made by hand."""
    if model.processor is not None:
        return padded_prompt(model)
    inputs = tiny.tiny_inputs(family, [2, 1])
    is_image = model.image_mask(inputs)
    is_question = torch.zeros_like(is_image)
    is_question[:, -4:-1] = True
    token_map = replace(text_only_map(inputs["attention_mask"], is_question), is_image=is_image)
    return Prompt(inputs, token_map, ["", ""], [[], []], ["", ""])


def edge_model(family: str, **options: Any) -> HookedVLM:
    try:
        processor = tiny.tiny_processor(family)
    except ValueError:
        processor = None
    return HookedVLM(tiny.tiny_model(family, **options), processor)


def plain_eager(family: str) -> PreTrainedModel:
    return tiny.tiny_model(family, attn_implementation="eager")


def softmax_layers(model: HookedVLM) -> list[int]:
    return model.grid.layers


@torch.no_grad()
@pytest.mark.parametrize("family", EDGE_FAMILIES)
def test_knockout_equals_the_plain_eager_model_with_its_mask_edited(family: str) -> None:
    """All heads of all layers from the question to the images, then two heads of one layer from the last position."""
    model, plain = edge_model(family), plain_eager(family)
    prompt = edge_prompt(model, family)
    real = ~prompt.token_map.is_padding
    is_image = prompt.token_map.is_image
    assert prompt.token_map.is_padding.any()
    clean = plain(**prompt.inputs).logits
    layers = softmax_layers(model)
    lowest = torch.finfo(torch.float32).min

    blocked = edges(prompt, prompt.token_map.is_question, is_image)
    with edited_masks(plain, layers, lambda mask: mask.masked_fill(blocked, lowest)):
        expected = plain(**prompt.inputs).logits
    hooks = knockout("question", "image")(model, prompt)
    under = model.run_with_hooks(prompt, fwd_hooks=hooks)
    assert_same_logits(under[real], expected[real])
    assert (expected - clean)[real].abs().max() > 1e-3
    assert [edit.fired for _, edit in hooks] == [1] * len(layers)
    assert all(0 < edit.size <= 1 for _, edit in hooks)

    some = (
        edges(prompt, prompt.last, is_image)
        .expand(-1, model.grid.heads_per_layer[layers[-1]], -1, -1)
        .clone()
    )
    some[:, [0, 2]] = False
    with edited_masks(plain, layers[-1:], lambda mask: mask.masked_fill(some, lowest)):
        expected = plain(**prompt.inputs).logits
    others = [head for head in range(model.grid.heads_per_layer[layers[-1]]) if head not in (0, 2)]
    for intervention in (
        knockout("last", "image", layers=layers[-1], heads=others),
        knockout(lambda p: p.last, is_image, heads=[(layers[-1], head) for head in others]),
    ):
        under = model.run_with_hooks(prompt, fwd_hooks=intervention(model, prompt))
        assert_same_logits(under[real], expected[real])


@torch.no_grad()
@pytest.mark.parametrize("family", ("qwen3_vl", "gemma3", "inkling2"))
def test_a_knocked_out_pattern_is_zero_there_and_its_rows_rescaled(family: str) -> None:
    """inkling2 has a learnt sink: it keeps its score, so its share grows as the row's other shares do."""
    model = edge_model(family)
    prompt = edge_prompt(model, family)
    layer = softmax_layers(model)[0]
    name = f"blocks.{layer}.attn.hook_pattern"
    _, clean = model.run_with_cache(prompt, names_filter=name)
    hooks = knockout("question", "image", layers=layer, heads=[1])(model, prompt)
    with model.hooks(fwd_hooks=hooks):
        _, under = model.run_with_cache(prompt, names_filter=name)
    masses = []
    for row in range(len(prompt)):
        before, after = clean["pattern", layer][row], under["pattern", layer][row]
        is_query, is_key = prompt.token_map.is_question[row], prompt.token_map.is_image[row]
        assert not after[1][is_query][:, is_key].any()
        rows = before[1][is_query]
        taken = rows[:, is_key].sum(-1, keepdim=True)
        torch.testing.assert_close(after[1][is_query][:, ~is_key], rows[:, ~is_key] / (1 - taken))
        assert torch.equal(after[1][~is_query], before[1][~is_query])
        assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])
        # The size leaves a sink's share out.
        masses += (taken / rows.sum(-1, keepdim=True)).flatten().tolist()
        assert (after[1][is_query].sum(-1).max() < 0.9999) == (family == "inkling2")
    assert hooks[0][1].size == pytest.approx(max(masses), rel=1e-5)


@torch.no_grad()
def test_edges_that_the_mask_forbids_change_nothing_and_are_warned_of() -> None:
    model = hooked("llava")
    prompt = padded_prompt(model)
    hooks = knockout("image", "question")(model, prompt)
    with pytest.warns(NoChangeWarning):
        under = model.run_with_hooks(prompt, fwd_hooks=hooks)
    torch.testing.assert_close(under, model(prompt), atol=1e-5, rtol=1e-5)
    assert [edit.size for _, edit in hooks] == [0.0] * 3
    # A bias that would bring the mask's number up to 0.
    lifts = torch.finfo(torch.float32).max
    with pytest.warns(NoChangeWarning):
        model.run_with_hooks(
            prompt, fwd_hooks=bias_attention([(0, 1)], "question", lifts, queries="image")(model, prompt)
        )


@torch.no_grad()
@pytest.mark.parametrize("padded", (False, True))
def test_a_query_that_would_keep_no_key_is_an_error_that_names_it(padded: bool) -> None:
    model = hooked("llava")
    prompt = padded_prompt(model) if padded else two_image_prompt(model)
    first = int((~prompt.token_map.is_padding[-1]).int().argmax())
    row = len(prompt) - 1
    message = r"blocks\.1\.attn\.hook_attn_scores: in batch row \d, query position\(s\) .*no key"
    with pytest.raises(ValueError, match=message):
        model.run_with_hooks(prompt, fwd_hooks=knockout(None, "text", layers=1)(model, prompt))
    only = torch.zeros_like(prompt.token_map.is_image)
    only[row, first : first + 3] = True
    shown = f"in batch row {row}, query position\\(s\\) {first}, {first + 1}, {first + 2} would"
    with pytest.raises(ValueError, match=shown):
        model.run_with_hooks(prompt, fwd_hooks=knockout(if_any(only), if_any(only))(model, prompt))
    # One key is enough: position `first` may still see itself, and the row's whole mass goes there.
    keys = only.clone()
    keys[row, first] = False
    queries = torch.zeros_like(only)
    queries[row, first + 2] = True
    hooks = knockout(if_any(queries), if_any(keys), layers=0)(model, prompt)
    with model.hooks(fwd_hooks=hooks):
        _, cache = model.run_with_cache(prompt, names_filter="blocks.0.attn.hook_pattern")
    assert bool((cache["pattern", 0][row, :, first + 2, first] == 1).all())


@torch.no_grad()
@pytest.mark.parametrize("family", ("llava", "qwen3_vl", "gemma3", "gemma4", "lfm2_vl", "step3p7"))
def test_knockout_and_steering_with_and_without_the_cache_agree(family: str) -> None:
    """gemma3, gemma4 and step3p7 have caches that slide over the last keys alone."""
    model = edge_model(family)
    prompt = edge_prompt(model, family)
    layers = softmax_layers(model)
    for intervention in (
        during(knockout("text", "image"), "both"),
        bias_attention([(layers[0], 1), (layers[-1], 3)], "image", [2.0, -3.0]),
        mmlens.compose(knockout("last", "image"), scale_heads([(layers[-1], 0)], 3.0)),
    ):
        ids, logits = generate(model, prompt, 5, intervention(model, prompt))
        uncached, other_logits = generate(model, prompt, 5, intervention(model, prompt), use_cache=False)
        assert torch.equal(ids, uncached)
        torch.testing.assert_close(logits, other_logits, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_a_cache_of_fixed_length_has_unused_keys_at_its_end() -> None:
    model = hooked("llava")
    prompt = padded_prompt(model)
    hooks = knockout(None, "image", layers=[0, 2])(model, prompt)
    ids, logits = generate(model, prompt, 5, hooks)
    fixed, other_logits = generate(model, prompt, 5, hooks, cache_implementation="static")
    assert torch.equal(ids, fixed)
    torch.testing.assert_close(logits, other_logits, atol=1e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("family", ("qwen2_5_vl", "gemma3", "idefics3"))
def test_steering_adds_to_the_plain_models_mask(family: str) -> None:
    """A bias of the scores is the same as a float mask with that bias where it allows attention."""
    model, plain = hooked(family), plain_eager(family)
    prompt = padded_prompt(model)
    real = ~prompt.token_map.is_padding
    at = edges(prompt, prompt.token_map.is_question, prompt.token_map.is_image)
    delta = torch.tensor([1.5, -0.7])
    heads = [(1, 3), (1, 0)]

    def biased(mask: Tensor) -> Tensor:
        bias = torch.zeros(4)
        bias[[3, 0]] = delta
        return torch.where(at & (mask == 0), bias[:, None, None], mask)

    with edited_masks(plain, [1], biased):
        expected = plain(**prompt.inputs).logits
    hooks = bias_attention(heads, "image", delta, queries="question")(model, prompt)
    under = model.run_with_hooks(prompt, fwd_hooks=hooks)
    assert_same_logits(under[real], expected[real])
    assert (expected - plain(**prompt.inputs).logits)[real].abs().max() > 1e-3
    assert hooks[0][1].size == pytest.approx(1.5, rel=1e-5)


@torch.no_grad()
def test_steering_multiplies_odds_and_lifts_no_mask() -> None:
    model = hooked("qwen3_vl")
    prompt = padded_prompt(model)
    name = "blocks.1.attn.hook_pattern"
    keys = prompt.token_map.is_image | prompt.token_map.is_padding | prompt.last
    with model.hooks(fwd_hooks=knockout("question", "image", layers=1)(model, prompt)):
        _, before = model.run_with_cache(prompt, names_filter=name)
    both = mmlens.compose(knockout("question", "image", layers=1), bias_attention([(1, 2)], keys, 50.0))
    with model.hooks(fwd_hooks=both(model, prompt)):
        _, after = model.run_with_cache(prompt, names_filter=name)
    # The future, padding and what an earlier knockout blocked get nothing, however large the bias.
    assert not after["pattern", 1][before["pattern", 1] == 0].any()
    with model.hooks(fwd_hooks=bias_attention([(1, 2)], "image", 2.0, queries="last")(model, prompt)):
        _, steered = model.run_with_cache(prompt, names_filter=name)
    _, clean = model.run_with_cache(prompt, names_filter=name)

    def odds(pattern: Tensor) -> Tensor:
        mass = (pattern[:, 2, -1] * prompt.token_map.is_image).sum(-1)
        return mass / (1 - mass)

    torch.testing.assert_close(
        odds(steered["pattern", 1]) / odds(clean["pattern", 1]),
        torch.full((2,), 2.0).exp(),
        atol=0,
        rtol=1e-3,
    )


@torch.no_grad()
def test_edges_change_no_other_query_and_keep_gradients() -> None:
    model = hooked("internvl")
    prompt = two_image_prompt(model)
    delta = torch.tensor(0.5, requires_grad=True)
    with torch.enable_grad():
        hooks = bias_attention([(0, 0)], "image", delta, queries="last")(model, prompt)
        model.run_with_hooks(prompt, fwd_hooks=hooks)[0, -1, 0].backward()
    ahead, after = (
        model.run_with_hooks(
            prompt, fwd_hooks=bias_attention([(0, 0)], "image", d, queries="last")(model, prompt)
        )[0, -1, 0]
        for d in (0.51, 0.49)
    )
    assert float(delta.grad) == pytest.approx(float(ahead - after) / 0.02, rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_masks_are_seen_as_masks(dtype: torch.dtype) -> None:
    model = hooked("llava", dtype=dtype)
    prompt = padded_prompt(model)
    name = "blocks.1.attn.hook_pattern"
    _, clean = model.run_with_cache(prompt, names_filter=name)
    hooks = mmlens.compose(
        knockout("question", "image", layers=1), bias_attention([(1, 0)], "prompt", 20.0, queries="question")
    )(model, prompt)
    with model.hooks(fwd_hooks=hooks):
        _, under = model.run_with_cache(prompt, names_filter=name)
    future_or_padding = clean["pattern", 1] == 0
    allowed = (
        torch.ones(prompt.shape[1], prompt.shape[1]).tril().bool()
        & ~prompt.token_map.is_padding[:, None, None]
    )
    assert not under["pattern", 1][~allowed.expand_as(future_or_padding)].any()
    question, image = prompt.token_map.is_question, prompt.token_map.is_image
    blocked = (question[:, None, :, None] & image[:, None, None, :]).expand_as(future_or_padding)
    assert not under["pattern", 1][blocked].any() and clean["pattern", 1][blocked].any()
    with pytest.raises(ValueError, match="would keep no key"):
        model.run_with_hooks(prompt, fwd_hooks=knockout("question", "prompt")(model, prompt))


@torch.no_grad()
def test_scaled_heads_equal_scaled_columns_of_the_output_projection(family: str) -> None:
    model, plain = hooked(family), tiny.tiny_model(family)
    prompt = padded_prompt(model)
    real = ~prompt.token_map.is_padding
    heads, factors = [(1, 3), (0, 2), (1, 0)], [2.5, -1.0, 0.5]
    d_head = model.cfg.d_head
    for (layer, head), factor in zip(heads, factors, strict=True):
        weight = plain.get_decoder().layers[layer].self_attn.o_proj.weight
        weight[:, head * d_head : (head + 1) * d_head] *= factor
    under = model.run_with_hooks(prompt, fwd_hooks=scale_heads(heads, factors)(model, prompt))
    assert_same_logits(under[real], plain(**prompt.inputs).logits[real])


@torch.no_grad()
def test_scaling_at_positions_and_by_zero() -> None:
    model = hooked("smolvlm")
    prompt = padded_prompt(model)
    name = "blocks.2.attn.hook_z"
    _, clean = model.run_with_cache(prompt, names_filter=name)
    with model.hooks(fwd_hooks=scale_heads([(2, 1)], 3.0, "question")(model, prompt)):
        _, under = model.run_with_cache(prompt, names_filter=name)
    expected = clean["z", 2].clone()
    expected[:, :, 1] *= torch.where(prompt.token_map.is_question, 3.0, 1.0)[..., None]
    assert torch.equal(under["z", 2], expected)
    zeroed = model.run_with_hooks(prompt, fwd_hooks=scale_heads([(2, 1)], 0.0)(model, prompt))
    assert torch.equal(zeroed, model.run_with_hooks(prompt, fwd_hooks=mmlens.ablate([(2, 1)])(model, prompt)))
    with pytest.warns(NoChangeWarning):
        model.run_with_hooks(prompt, fwd_hooks=scale_heads([(2, 1)], 1.0)(model, prompt))


@torch.no_grad()
def test_the_micro_model_guesses_once_its_edges_to_the_images_are_gone(micro: HookedVLM) -> None:
    examples = mmlens.scene_examples("objects", 16, seed=3)
    blind = mmlens.effect(micro, examples, knockout(None, "image"), mmlens.accuracy)
    assert blind.clean_mean > 0.8
    assert blind.mean < 0.5
    untouched = mmlens.effect(micro, examples, knockout("image", "image"), mmlens.accuracy)
    assert untouched.mean > blind.mean


@torch.no_grad()
def test_bad_edges_are_errors() -> None:
    model = hooked("llava")
    prompt = padded_prompt(model)
    with pytest.raises(ValueError, match="knockout needs keys"):
        knockout("last", None)
    with pytest.raises(ValueError, match="bias_attention needs keys"):
        bias_attention([(0, 0)], None, 1.0)
    with pytest.raises(ValueError, match="nearest: 'image'"):
        knockout("last", "images")(model, prompt)
    with pytest.raises(ValueError, match="keys are padding alone"):
        knockout("last", prompt.token_map.is_padding)(model, prompt)
    with pytest.raises(ValueError, match="pairs name their layers"):
        knockout("last", "image", layers=[1], heads=[(1, 0)])(model, prompt)
    with pytest.raises(IndexError, match=r"head \(7, 0\): layer 7 is out of range"):
        knockout("last", "image", layers=7)(model, prompt)
    with pytest.raises(IndexError, match=r"layer -1 is out of range"):
        knockout("last", "image", layers=-1)(model, prompt)
    with pytest.raises(IndexError, match=r"head \(0, 4\)"):
        knockout("last", "image", heads=[4])(model, prompt)
    with pytest.raises(ValueError, match="no layers given"):
        knockout("last", "image", layers=[])(model, prompt)
    with pytest.raises(ValueError, match="no heads given"):
        knockout("last", "image", heads=[])(model, prompt)
    with pytest.raises(ValueError, match="named more than once"):
        knockout("last", "image", layers=[1, 1])(model, prompt)
    with pytest.raises(TypeError, match=r"layers\[\d\] is .*; expected a whole number"):
        knockout("last", "image", layers=[True])(model, prompt)
    with pytest.raises(ValueError, match="each of the 2 heads, not of shape"):
        bias_attention([(0, 0), (1, 0)], "image", [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="finite number, not nan"):
        scale_heads([(0, 0)], float("nan"))
    with pytest.raises(IndexError, match=r"head \(3, 0\)"):
        scale_heads([(3, 0)], 2.0)(model, prompt)
    with pytest.raises(IndexError, match="layer 0 has no softmax attention"):
        hybrid = edge_model("lfm2_vl")
        knockout("last", "image", layers=0)(hybrid, edge_prompt(hybrid, "lfm2_vl"))


@torch.no_grad()
def test_layers_that_attend_to_the_image_itself_are_left_out_or_refused() -> None:
    """Mllama's layers 1 and 3 have the image's states as keys, which are no positions of the prompt."""
    model = hooked("mllama")
    prompt = model.prompt(QUESTION, images=tiny.tiny_images(1, seed=0))
    early = torch.zeros_like(prompt.token_map.is_padding)
    early[:, 1:3] = True
    hooks = knockout("last", early)(model, prompt)
    assert [name for name, _ in hooks] == [f"blocks.{layer}.attn.hook_attn_scores" for layer in (0, 2)]
    model.run_with_hooks(prompt, fwd_hooks=hooks)
    with pytest.raises(ValueError, match=r"layer\(s\) \[1\] attend to the image by cross-attention"):
        knockout("last", early, layers=[0, 1])(model, prompt)
    with pytest.raises(ValueError, match="cross-attention"):
        bias_attention([(3, 0)], early, 1.0)(model, prompt)


@torch.no_grad()
@pytest.mark.parametrize("family", ("llava", "qwen3_vl", "gemma3"))
def test_rows_before_the_first_edited_query_stay_on_the_fast_path(family: str) -> None:
    """The edit is handed its own rows alone; beside a function that may touch any row, it is handed all of them."""
    model = hooked(family)
    prompt = padded_prompt(model)
    name = "blocks.1.attn.hook_attn_scores"
    seen: list[int] = []

    def halved(scores: Tensor, here: EditContext) -> Tensor:
        seen.append(scores.shape[2])
        return torch.where(scores > -1e4, scores / 2, scores)

    edit = Edit(model, prompt, name, halved, positions="last")
    alone = model.run_with_hooks(prompt, fwd_hooks=[(name, edit)])
    beside = model.run_with_hooks(prompt, fwd_hooks=[(name, edit), (name, lambda scores, hook: None)])
    assert seen == [1, prompt.shape[1]]
    real = ~prompt.token_map.is_padding
    torch.testing.assert_close(alone[real], beside[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["dots3_note", "qwen4_exp"])
@torch.no_grad()
def test_knockout_where_keys_are_chosen_first_is_the_plain_model_under_the_same_mask(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a padded batch, to the bit: the layer's own eager function with the edges masked, and no hook at all."""
    model = hooked(family, attn_implementation="eager")
    prompt = padded_prompt(model)
    queries = prompt.token_map.is_question
    # Every other image position, so that no query's chosen keys are all blocked.
    keys = prompt.token_map.is_image & (torch.arange(prompt.shape[1]) % 2 == 0)
    edits = knockout(queries, keys)(model, prompt)
    written = model.run_with_hooks(prompt, fwd_hooks=edits)

    plain = tiny.tiny_model(family, attn_implementation="eager")
    expected = plain(**prompt.inputs).logits
    in_decoder = set(plain.get_decoder().modules())
    edges = queries[:, None, :, None] & keys[:, None, None, :]
    module: Any = sys.modules[type(plain).__module__]
    own = module.eager_attention_forward

    def masked(
        layer: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any
    ) -> Any:
        if layer in in_decoder:
            attention_mask = attention_mask.masked_fill(edges, torch.finfo(attention_mask.dtype).min)
        return own(layer, query, key, value, attention_mask, **more)

    monkeypatch.setattr(module, "eager_attention_forward", masked)
    blocked = plain(**prompt.inputs).logits
    real = ~prompt.token_map.is_padding
    assert torch.equal(written[real], blocked[real])
    assert (blocked - expected)[real].abs().max() > 0.1
