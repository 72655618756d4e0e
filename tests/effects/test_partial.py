"""Partial runs against whole ones: where they may be cut, what layers and hooks are given, what is left behind."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny.wrapped import hooked, padded_prompt
from torch import Tensor

import mmlens
from mmlens import internals
from mmlens.effects import partial
from mmlens.effects.partial import CleanKeys, CleanRun, NotExactError, _cut, _cuts
from mmlens.interventions.edits import Edit
from mmlens.model.choosing import Positions
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import Hook, HookNeverFiredError
from mmlens.model.prompt import Prompt
from mmlens.token_map import text_only_map

# ---------------------------------------------------------------------- where a run may be cut


@st.composite
def masks(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A mask as attention is given it, and [query, key] whether any example and head allows the edge."""
    length = draw(st.integers(1, 7))
    batch, n_heads = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    allowed = torch.ones(batch, n_heads, length, length, dtype=torch.bool).tril()
    allowed &= torch.rand(allowed.shape) > draw(st.sampled_from([0.0, 0.5]))
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, length - 1))
        stop = draw(st.integers(start, length))
        allowed[
            draw(st.integers(0, batch - 1)), draw(st.integers(0, n_heads - 1)), start:stop, start:stop
        ] = True
    kind = draw(st.sampled_from(["boolean", "lowest", "infinite"]))
    if kind == "boolean":
        return allowed, allowed.any(1).any(0)
    low = torch.finfo(torch.float32).min if kind == "lowest" else -torch.inf
    bias = torch.randn(allowed.shape)
    return torch.where(allowed, bias, low), allowed.any(1).any(0)


@given(st.lists(masks(), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_a_cut_is_where_no_earlier_position_attends_across(given_masks: list[tuple[Tensor, Tensor]]) -> None:
    length = given_masks[0][0].shape[-1]
    same = [(mask, edges) for mask, edges in given_masks if mask.shape[-1] == length]
    key = torch.zeros(1, 1, length, 1)
    calls = {layer: [CleanKeys(key, key, mask, True)] for layer, (mask, _) in enumerate(same)}
    expected = [
        not any(
            bool(edges[query, seen])
            for _, edges in same
            for query in range(cut)
            for seen in range(cut, length)
        )
        for cut in range(length)
    ]
    assert _cuts(calls, length) == expected


def test_cuts_without_a_mask() -> None:
    key = torch.zeros(1, 1, 3, 1)
    causal, both_ways = CleanKeys(key, key, None, True), CleanKeys(key, key, None, False)
    assert _cuts({0: [causal]}, 3) == [True] * 3
    assert _cuts({0: [causal], 1: [both_ways]}, 3) == [True, False, False]


def test_the_edges_of_an_image_that_looks_both_ways() -> None:
    """Gemma 3's images attend to themselves as a whole: a run may start at an image, not within."""
    model = hooked("gemma3")
    prompt = model.prompt("What colour is K?", images=tiny.tiny_images(1, seed=1))
    is_image = prompt.token_map.is_image[0].tolist()
    cuts = CleanRun.of(model, prompt).cuts
    within = [now and before for before, now in itertools.pairwise([False, *is_image])]
    assert cuts == [not inside for inside in within] and any(within)
    clean = CleanRun.of(model, prompt, logits_to_keep=3)
    first, last = is_image.index(True), len(is_image) - 1
    assert clean.cut_before(first + 2) == first
    assert clean.cut_before(last) == last - 2
    assert CleanRun.of(model, prompt, logits_to_keep=last + 9).cut_before(last) == 0


# ---------------------------------------------------------------------- what a layer is given


@pytest.mark.parametrize("shape", [(1, 5), (2, 5), (3, 5), (4, 16), (2, 3), (3, 3)])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_arguments_are_cut_at_positions_and_stacked_by_copies(shape: tuple[int, int], n: int) -> None:
    """Each argument of a layer, beside the same made by hand; sizes may agree, names of axes decide."""
    batch, length = shape
    first = 2
    sizes = {"batch": batch, "pos": length, "key": length, "head": 4, "section": 3, "d": 16}
    for name, way in ((name, way) for name, ways in internals.LAYER_INPUTS.items() for way in ways):
        axes = way.split()
        for of_one in ((), ("batch",), ("head",)):
            value = torch.randn([1 if axis in of_one else sizes[axis] for axis in axes])
            expected = value.narrow(axes.index("pos"), first, length - first)
            if "batch" in axes and n > 1:
                expected = torch.cat([expected] * n, axes.index("batch"))
            got = _cut(value, internals.LAYER_INPUTS[name], shape, first, n)
            # An axis of 1 stands for all rows.
            if "batch" in of_one and batch > 1:
                expected = value.narrow(axes.index("pos"), first, length - first)
            assert torch.equal(*torch.broadcast_tensors(got, expected)), (name, axes)
            assert got.shape[axes.index("pos")] == length - first
    together = _cut((torch.zeros(batch, length), [None, "x"]), ("batch pos",), shape, first, n)
    assert together[0].shape[1] == length - first and together[1] == [None, "x"]
    unknown = torch.zeros(batch, length)
    assert _cut(unknown, (), shape, first, n) is unknown


# ---------------------------------------------------------------------- equal to whole runs


def scaled(
    model: HookedVLM, prompt: Prompt, name: str, positions: Positions, factor: float = 1.5
) -> list[Hook]:
    return [(name, Edit(model, prompt, name, lambda x, here: factor * x, positions=positions))]


def text_prompt(batch: int, length: int) -> Prompt:
    generator = torch.Generator().manual_seed(batch * 100 + length)
    ids = torch.randint(5, 200, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return Prompt(inputs, text_only_map(mask), [""] * batch, [[] for _ in range(batch)], [""] * batch)


@torch.no_grad()
def check_against_whole_runs(
    model: HookedVLM,
    prompt: Prompt,
    rows: list[list[Hook]],
    layer: int,
    first: int,
    keep: int = 1,
    **options: Any,
) -> None:
    clean = CleanRun.of(model, prompt, keep)
    logits = clean.partial(layer, first, rows, **options)
    for own, hooks in zip(logits, rows, strict=True):
        whole = model.run_with_hooks(prompt, fwd_hooks=hooks, logits_to_keep=keep)[:, -keep:]
        assert not torch.equal(whole, clean.logits)
        torch.testing.assert_close(own, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "attention"),
    [("llava", "sdpa"), ("llava", "eager"), ("qwen3_vl", "sdpa"), ("gemma3", "eager")],
)
def test_any_cut_and_any_batch_is_exact(family: str, attention: str) -> None:
    """From the first and the last layer, after early and late cuts, with and without trimming."""
    model = hooked(family, attn_implementation=attention)
    prompt = model.encode_images(padded_prompt(model))
    length = prompt.shape[1]
    clean = CleanRun.of(model, prompt, 2)
    for layer in (0, 2):
        for first in {clean.cut_before(8), clean.cut_before(length // 2), length - 2}:
            mask = torch.zeros(tuple(prompt.shape), dtype=torch.bool)
            mask[:, first:] = True
            hooks = ("hook_resid_pre", "attn.hook_k", "attn.hook_rot_q", "attn.hook_pattern", "hook_mlp_out")
            rows = [scaled(model, prompt, f"blocks.{layer}.{hook}", mask) for hook in hooks]
            check_against_whole_runs(model, prompt, rows, layer, first, keep=2, may_trim=layer < 2)
            after = [scaled(model, prompt, f"blocks.{layer}.attn.hook_z", mask, f) for f in (0.0, 1.5, 2.0)]
            check_against_whole_runs(
                model, prompt, after, layer, first, keep=2, attention_is_clean=True, may_trim=True
            )


@pytest.mark.parametrize(("batch", "length"), [(1, 16), (2, 16), (3, 4), (2, 64), (1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_sizes_that_could_be_confused(family: str, batch: int, length: int) -> None:
    """As many positions as head dimensions (16), model dimensions (64), heads (4), layers (3) or examples."""
    model = hooked(family)
    prompt = text_prompt(batch, length)
    cuts = CleanRun.of(model, prompt).cuts
    for first in {0, *(at for at in (length // 2, length - 1) if cuts[at])}:
        mask = torch.zeros(batch, length, dtype=torch.bool)
        mask[:, first:] = True
        for n in (1, 2, 3):
            factors = [0.5, 1.5, 2.0][:n]
            rows = [scaled(model, prompt, "blocks.1.hook_mlp_out", mask, factor) for factor in factors]
            check_against_whole_runs(model, prompt, rows, 1, first)


@pytest.mark.parametrize("most_scores", [0, 2**26])
def test_causal_attention_without_a_mask(monkeypatch: pytest.MonkeyPatch, most_scores: int) -> None:
    """A prompt without padding has no mask; hooks inside attention and large runs take the model's own function."""
    monkeypatch.setattr(partial, "_MOST_SCORES", most_scores)
    model = hooked("llava")
    prompt = text_prompt(2, 9)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[:, 4:] = True
    assert CleanRun.of(model, prompt).calls[1][0].mask is None
    for hook in ("attn.hook_pattern", "attn.hook_rot_q", "attn.hook_v"):
        rows = [scaled(model, prompt, f"blocks.1.{hook}", mask, factor) for factor in (0.5, 2.0)]
        check_against_whole_runs(model, prompt, rows, 1, 4, keep=3, may_trim=True)


def test_several_functions_of_one_intervention_act_in_order() -> None:
    """Edits and plain functions, twice on one hook point, by filter, in place or giving nothing back."""
    model = hooked("llava")
    prompt = model.encode_images(padded_prompt(model))
    name = "blocks.1.attn.hook_z"

    def add(x: Tensor, hook: Any) -> Tensor:
        return x + 1

    def double_in_place(x: Tensor, hook: Any) -> None:
        x *= 2

    def only_look(x: Tensor, hook: Any) -> None:
        assert x.shape[0] == 2 and hook.name.endswith("hook_z")

    rows: list[list[Hook]] = [
        [(name, add), (name, double_in_place)],
        [(name, double_in_place), (name, add), (name, only_look)],
        [*scaled(model, prompt, name, "question"), (name, add)],
        [(lambda known: known.endswith(("1.attn.hook_z", "2.attn.hook_z")), add)],
        [(name, add), ("blocks.2.hook_resid_pre", double_in_place)],
    ]
    check_against_whole_runs(model, prompt, rows, 1, 0)


def test_deep_features_at_kept_positions() -> None:
    """What the stream gains after a layer is seen at the next one's input, here the last layer's."""
    model = hooked("qwen3_vl")
    assert model.anatomy.deep_after == [0, 1] and model.cfg.n_layers == 3
    prompt = model.encode_images(model.prompt("What colour is K?", images=tiny.tiny_images(1, seed=1)))
    first = int(prompt.token_map.is_image[0].int().argmax())
    keep = prompt.shape[1] - first - 3
    for layer in (0, 1):
        rows = [scaled(model, prompt, f"blocks.{layer}.hook_deepstack", "image", f) for f in (0.0, 3.0)]
        check_against_whole_runs(model, prompt, rows, layer, first, keep=keep)


# ---------------------------------------------------------------------- what is not exact is not taken


def test_a_partial_run_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hooked("llava")
    prompt = model.encode_images(padded_prompt(model))
    clean = CleanRun.of(model, prompt)
    middle = prompt.shape[1] // 2
    clean.check(1, middle, 2, 1e-4)
    clean.check_edited(middle, 2, 1e-4)
    run = CleanRun.partial

    def off_by_a_little(*args: Any, **options: Any) -> Tensor:
        logits = run(*args, **options)
        logits[-1] += 0.01
        return logits

    monkeypatch.setattr(CleanRun, "partial", off_by_a_little)
    with pytest.raises(NotExactError, match="off by 0.01"):
        clean.check(1, middle, 2, 1e-4)
    with pytest.raises(NotExactError, match="off by 0.01"):
        clean.check_edited(middle, 2, 1e-4)
    monkeypatch.setattr(CleanRun, "partial", lambda *args, **options: run(*args, **options)[..., 1:])
    with pytest.raises(NotExactError, match="instead of"):
        clean.check(1, middle, 2, 1e-4)


def test_layers_between_the_layers_forbid_partial_runs() -> None:
    """IDEFICS reads the image between its layers: what is added there follows from the stream that is edited."""
    model = hooked_without_processor("idefics")
    inputs = tiny.tiny_inputs("idefics", (1,))
    mask = inputs["attention_mask"]
    prompt = Prompt(dict(inputs), text_only_map(mask), [""], [[]], [""])
    assert "between layers 1 and 2" in CleanRun.of(model, prompt).whole


def hooked_without_processor(family: str) -> HookedVLM:
    return HookedVLM(tiny.tiny_model(family).eval(), None)


def test_a_mask_that_is_no_tensor_forbids_cuts() -> None:
    """As flex attention has, and flash attention, whose mask is of keys alone."""
    model = hooked("llava")
    prompt = text_prompt(2, 6)
    for mask in (object(), torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 1, 1, 6, dtype=torch.bool)):
        clean = CleanRun.of(model, prompt)
        clean.calls[1][0].mask = mask
        assert "layer 1 has a mask" in clean._why_no_cut()


# ---------------------------------------------------------------------- what is left behind


def traces(model: HookedVLM) -> tuple[Any, ...]:
    """All that a run in pieces touches of a model."""
    modules = list(model.hf_model.modules())
    return (
        [id(module) for module in modules],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules],
        [vars(module).get("forward") for module in modules],
        [model.attention_tap(layer).around for layer in model.attention_layers],
        model.list_hooks(),
    )


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize(
    "hook", ["hook_resid_pre", "attn.hook_q", "attn.hook_pattern", "attn.hook_z", "hook_mlp_out"]
)
@torch.no_grad()
def test_an_exception_anywhere_leaves_the_model_as_it_was(error: type[BaseException], hook: str) -> None:
    model = hooked("llava")
    prompt = model.encode_images(padded_prompt(model))
    before, logits = traces(model), model(prompt)
    clean = CleanRun.of(model, prompt)
    assert traces(model) == before

    def fail(x: Tensor, here: Any) -> Tensor:
        raise error("stop")

    for layer, after in itertools.product((1, 2), {False, hook in ("attn.hook_z", "hook_mlp_out")}):
        name = f"blocks.{layer}.{hook}"
        edit = Edit(model, prompt, name, fail, positions="last")
        with pytest.raises(error, match="stop"):
            clean.partial(
                layer, prompt.shape[1] - 3, [[(name, edit)], ()], attention_is_clean=after, may_trim=True
            )
        assert traces(model) == before
    assert torch.equal(model(prompt), logits)


@torch.no_grad()
def test_a_forward_of_the_users_own_stays() -> None:
    model = hooked("llava")
    prompt = model.encode_images(padded_prompt(model))
    module = model.anatomy.language[1].attention.module
    calls = []

    @functools.wraps(module.forward)
    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return type(module).forward(module, *args, **kwargs)

    module.forward = own
    rows = [scaled(model, prompt, "blocks.1.attn.hook_z", None)]
    check_against_whole_runs(model, prompt, rows, 1, 0, attention_is_clean=True)
    assert module.forward is own and calls


def test_a_hook_that_never_fires_is_an_error() -> None:
    model = hooked("llava")
    prompt = model.prompt("What colour is K?")
    clean = CleanRun.of(model, prompt)
    with pytest.raises(HookNeverFiredError, match="never fired"):
        clean.partial(1, 0, [[("blocks.1.image.hook_z", lambda x, hook: x)]])


@torch.no_grad()
def test_models_share_nothing() -> None:
    """Runs of one model in pieces, in turn with those of another."""
    models = [
        mmlens.HookedVLM(tiny.tiny_model("llava", seed=seed), tiny.tiny_processor("llava")) for seed in (0, 1)
    ]
    prompts = [model.encode_images(padded_prompt(model)) for model in models]
    cleans = [CleanRun.of(model, prompt) for model, prompt in zip(models, prompts, strict=True)]
    for model, prompt, clean in zip(models, prompts, cleans, strict=True):
        hooks = scaled(model, prompt, "blocks.1.attn.hook_z", "last")
        whole = model.run_with_hooks(prompt, fwd_hooks=hooks, logits_to_keep=1)
        torch.testing.assert_close(clean.partial(1, clean.shape[1] - 1, [hooks])[0], whole, atol=1e-5, rtol=0)
