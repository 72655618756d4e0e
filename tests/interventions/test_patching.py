"""Patches against hooks written by hand, one element after the other, with activations read by hand."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import tiny
import torch
from tiny.wrapped import QUESTION, hooked
from torch import Tensor

import mmlens
from mmlens.hook_names import axes_of
from mmlens.interventions import patching
from mmlens.interventions.noise import noise_images
from mmlens.interventions.patching import Source, patch
from mmlens.model.cache import without_batch_axis
from mmlens.model.hooks import HookNeverFiredError, UnknownHookError
from mmlens.model.prompt import Prompt

Heads = Sequence[int] | None

HOOKS = (
    "hook_resid_pre",
    "hook_attn_in",
    "ln1.hook_normalized",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_q_input",
    "attn.hook_v_input",
    "attn.hook_rot_q",
    "attn.hook_rot_k",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_z",
    "attn.hook_result",
    "hook_attn_out",
    "hook_resid_mid",
    "ln2.hook_scale",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
    "image.hook_resid_pre",
    "image.hook_z",
    "image.hook_attn_out",
    "hook_deepstack",
)


def padded(model: mmlens.HookedVLM, seed: int) -> Prompt:
    """Two rows of different length; with another seed, other images of the same sizes."""
    images = tiny.tiny_images(3, seed=seed)
    return model.prompt([QUESTION, "Where?"], images=[images[:2], images[2:]])


def one(model: mmlens.HookedVLM, seed: int, question: str = QUESTION) -> Prompt:
    return model.prompt(question, images=tiny.tiny_images(1, seed=seed))


def some(prompt: Prompt, seed: int = 0) -> Tensor:
    """A few of each row's positions, the last among them."""
    drawn = torch.rand(tuple(prompt.shape), generator=torch.Generator().manual_seed(seed)) < 0.15
    return (drawn | prompt.last) & ~prompt.token_map.is_padding


def read(model: mmlens.HookedVLM, prompt: Prompt, name: str) -> list[Tensor]:
    """The activation of every call of a hook point in one run."""
    seen: list[Tensor] = []
    model.run_with_hooks(prompt, fwd_hooks=[(name, lambda x, hook: seen.append(x.detach().clone()))])
    return seen


def by_hand(
    name: str, given: Tensor, prompt: Prompt, mask: Tensor, heads: Heads
) -> tuple[str, Callable[..., Tensor]]:
    """A hook that writes one position of one head after the other."""
    axes = axes_of(name)
    is_image = prompt.token_map.is_image
    number = is_image.flatten().cumsum(0).reshape(is_image.shape) - 1

    def paste(x: Tensor, hook: Any) -> Tensor:
        out = x.clone()
        for row, position in mask.nonzero().tolist():
            if axes[0] == "image_token":
                if not is_image[row, position]:
                    continue
                at: tuple[Any, ...] = (int(number[row, position]),)
            elif "query" in axes:
                for head in range(x.shape[1]) if heads is None else heads:
                    out[row, head, position, : given.shape[-1]] = given[row, head, position]
                continue
            else:
                at = (row, position)
            for head in [None] if heads is None else heads:
                where = at if head is None else (*at, head)
                out[where] = given[where]
        return out

    return name, paste


def heads_of(name: str) -> list[Heads]:
    has_heads = {"head", "kv_head"} & set(axes_of(name))
    return [[1]] if has_heads else [None]


# ---------------------------------------------------------------------- what is patched


@torch.no_grad()
def test_every_hook_point_is_patched_as_by_hand(model: mmlens.HookedVLM) -> None:
    prompt, source = padded(model, 1), padded(model, 5)
    mask, real = some(prompt), ~prompt.token_map.is_padding
    names = [f"blocks.1.{hook}" for hook in HOOKS if f"blocks.1.{hook}" in model.hook_dict]
    names += ["hook_embed", "image.hook_embed", "ln_final.hook_normalized"]
    assert len(names) >= 23
    given: dict[str, Tensor] = {}
    readers = [(name, lambda x, hook: given.update({hook.name: x.clone()})) for name in names]
    model.run_with_hooks(source, fwd_hooks=readers)
    clean = model(prompt)
    cases = [(name, heads) for name in names for heads in heads_of(name)]
    cases += [("blocks.1.attn.hook_z", None), ("blocks.1.attn.hook_pattern", None)]
    patches = [patch(name, source, positions=mask, heads=heads) for name, heads in cases]
    for (name, heads), intervention in zip(cases, patches, strict=True):
        patched = model.run_with_hooks(prompt, fwd_hooks=intervention(model, prompt))
        hook = by_hand(name, given[name], prompt, mask, heads)
        expected = model.run_with_hooks(prompt, fwd_hooks=[hook])
        torch.testing.assert_close(patched[real], expected[real], atol=1e-5, rtol=1e-5)
        assert (expected - clean)[real].abs().max() > 1e-4, (name, heads)


@torch.no_grad()
def test_patching_the_whole_embedding_is_running_the_source(model: mmlens.HookedVLM) -> None:
    """To the bit; where images enter the stream a second time, with that patched too."""
    prompt, source = padded(model, 1), padded(model, 5)
    again = [f"blocks.{layer}.hook_deepstack" for layer in model.anatomy.deep_after]
    patches = [patch(name, source) for name in ("blocks.0.hook_resid_pre", *again)]
    hooks = mmlens.compose(*patches)(model, prompt)
    real = ~prompt.token_map.is_padding
    patched, expected = model.run_with_hooks(prompt, fwd_hooks=hooks)[real], model(source)[real]
    # What is added between layers is read as a difference, which rounds.
    assert torch.equal(patched, expected) or (again and torch.allclose(patched, expected, atol=1e-5))
    assert not torch.equal(model(prompt), model(source))


@torch.no_grad()
def test_sources_of_all_kinds_agree() -> None:
    model = hooked("qwen3_vl")
    prompt, source = one(model, 1), one(model, 5)
    names = ["blocks.1.attn.hook_z", "blocks.2.attn.hook_pattern", "blocks.0.image.hook_resid_post"]
    _, cache = model.run_with_cache(source, names_filter=names)
    _, row = model.run_with_cache(source, names_filter=names, remove_batch_dim=True)
    sources = [
        source,
        Source(source),
        lambda model, prompt: source,
        lambda model, prompt: cache,
        cache,
        row,
        dict(cache.items()),
        without_batch_axis(dict(cache.items())),
    ]
    for name in names:
        runs = [
            model.run_with_hooks(prompt, fwd_hooks=patch(name, given, positions=some(prompt))(model, prompt))
            for given in sources
        ]
        assert all(torch.equal(run, runs[0]) for run in runs[1:])
        assert not torch.equal(runs[0], model(prompt))


@torch.no_grad()
@pytest.mark.parametrize(
    "family",
    tiny.others_slow(["llava", "qwen2_5_vl", "internvl"], of=["llava", "qwen2_5_vl", "qwen3_vl", "internvl"]),
)
def test_the_vision_side_is_patched_in_whole(family: str) -> None:
    """Qwen's towers call attention once per image or window: each call gets its own."""
    model = hooked(family)
    prompt, source = padded(model, 1), padded(model, 5)
    for name in (
        "vision.hook_embed",
        "vision.blocks.1.hook_resid_post",
        "vision.blocks.1.attn.hook_pattern",
        "vision.blocks.1.attn.hook_rot_k",
        "vision.blocks.1.attn.hook_z",
        "projector.hook_out",
    ):
        calls = read(model, source, name)
        for heads in heads_of(name):
            left: list[Tensor] = []

            def paste(
                x: Tensor, hook: Any, heads: Heads = heads, left: list[Tensor] = left, name: str = name
            ) -> Tensor:
                given, axes = left.pop(0), axes_of(name)
                if heads is None:
                    return given
                axis = next(i for i, axis in enumerate(axes) if "head" in axis) - len(axes)
                return x.index_copy(axis, torch.tensor(heads), given.index_select(axis, torch.tensor(heads)))

            hooks = patch(name, source, heads=heads)(model, prompt)
            left[:] = calls
            expected = model.run_with_hooks(prompt, fwd_hooks=[(name, paste)])
            assert not left
            for _ in range(2):
                assert torch.equal(model.run_with_hooks(prompt, fwd_hooks=hooks), expected), (name, heads)
            assert not torch.equal(expected, model(prompt))
    embeddings = read(model, source, "image.hook_embed")[0]
    with model.hooks(fwd_hooks=patch("projector.hook_out", source)(model, prompt)):
        assert torch.equal(read(model, prompt, "image.hook_embed")[0], embeddings)


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["hook_resid_post", "attn.hook_z", "attn.hook_rot_k", "attn.hook_pattern", "attn.hook_attn_scores"],
)
def test_generated_tokens_are_not_patched(name: str) -> None:
    """Logits while generating, with a cache and without, are those of one run of the whole with the prompt patched."""
    model = hooked("internvl")
    # In a padded batch generate counts positions from each row's first token, which rotations would show.
    make = one if "rot" in name else padded
    prompt, source = make(model, 1), make(model, 5)
    name = f"blocks.1.{name}"
    (given,) = read(model, source, name)
    real = ~prompt.token_map.is_padding
    options = {
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "max_new_tokens": 4,
    }
    for positions, mask in ((None, real), ("last", prompt.last), (some(prompt), some(prompt))):
        with model.hooks(fwd_hooks=patch(name, source, positions=positions)(model, prompt)):
            cached = model.hf_model.generate(**prompt.inputs, **options)
            uncached = model.hf_model.generate(**prompt.inputs, use_cache=False, **options)
        ids = cached.sequences
        attended = torch.ones_like(ids)
        attended[:, : prompt.shape[1]] = prompt.inputs["attention_mask"]
        whole = {**prompt.inputs, "input_ids": ids, "attention_mask": attended}
        expected = model.run_with_hooks(whole, fwd_hooks=[by_hand(name, given, prompt, mask, None)])
        for run in (cached, uncached):
            assert torch.equal(run.sequences, ids)
            logits = torch.stack(run.logits, dim=1)
            torch.testing.assert_close(logits, expected[:, prompt.shape[1] - 1 : -1], atol=1e-4, rtol=1e-4)


def test_gradients_pass_where_nothing_is_patched() -> None:
    model = hooked("llava")
    with torch.no_grad():
        prompt, source = one(model, 1), one(model, 5)
    mask = some(prompt)
    seen: list[Tensor] = []

    def keep(x: Tensor, hook: Any) -> None:
        x.retain_grad()
        seen.append(x)

    hooks = patch("blocks.1.hook_resid_pre", source, positions=mask)(model, prompt)
    logits = model.run_with_hooks(prompt, fwd_hooks=[("blocks.0.hook_resid_post", keep), *hooks])
    logits.pow(2).sum().backward()
    gradient = seen[0].grad
    assert gradient is not None
    assert not gradient[mask].any() and gradient[~mask].abs().amax(-1).min() > 0


# ---------------------------------------------------------------------- where it comes from


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "internvl"])
def test_regions_are_matched_where_layouts_differ(family: str) -> None:
    model = hooked(family)
    images = tiny.tiny_images(3, seed=1)
    prompt = model.prompt([QUESTION, "Where?"], images=[images[:1], images[1:2]])
    source = model.prompt(["Which page?", QUESTION], images=[images[1:], images[:1]])
    assert prompt.shape != source.shape
    # Each row's first image of the source has other positions; as many of them as fit go over.
    there, here = (torch.zeros(tuple(p.shape), dtype=torch.bool) for p in (source, prompt))
    for row in range(2):
        own = prompt.token_map.is_image[row].nonzero().flatten()
        other = source.token_map.is_image[row].nonzero().flatten()
        n = min(len(own), len(other))
        here[row, own[:n:2]] = there[row, other[-n::2]] = True
    for name in (
        "blocks.1.hook_resid_pre",
        "blocks.1.attn.hook_z",
        "blocks.1.image.hook_attn_out",
        "blocks.1.attn.hook_rot_k",
    ):
        (given,) = read(model, source, name)
        (own_values,) = read(model, prompt, name)
        laid = own_values.clone()
        numbers = [
            p.token_map.is_image.flatten().cumsum(0).reshape(tuple(p.shape)) - 1 for p in (prompt, source)
        ]
        for (row, to), (_, start) in zip(here.nonzero().tolist(), there.nonzero().tolist(), strict=True):
            if "image." in name:
                laid[numbers[0][row, to]] = given[numbers[1][row, start]]
            else:
                laid[row, to] = given[row, start]
        expected = model.run_with_hooks(prompt, fwd_hooks=[by_hand(name, laid, prompt, here, None)])
        _, cache = model.run_with_cache(source, names_filter=name)
        for origin in (source, cache):
            patched = patch(name, origin, positions=here, source_positions=there)
            logits = model.run_with_hooks(prompt, fwd_hooks=patched(model, prompt))
            real = ~prompt.token_map.is_padding
            torch.testing.assert_close(logits[real], expected[real], atol=1e-5, rtol=1e-5)
        by_name = patch(name, source, positions="last", source_positions="last")
        if "image." not in name:
            with model.hooks(fwd_hooks=by_name(model, prompt)):
                (under,) = read(model, prompt, name)
            assert torch.equal(under[prompt.last], given[source.last])


@torch.no_grad()
def test_a_source_is_run_once_for_all_patches_of_it() -> None:
    model = hooked("llava")
    prompt, other = padded(model, 1), padded(model, 7)
    runs: list[int] = []
    handle = model.hf_model.register_forward_pre_hook(lambda *args: runs.append(1))
    calls: list[Prompt] = []

    def corruption(model: mmlens.HookedVLM, prompt: Prompt) -> Prompt:
        calls.append(prompt)
        return padded(model, 5)

    names = [f"blocks.{layer}.{hook}" for layer in range(3) for hook in ("hook_resid_pre", "attn.hook_z")]
    for source, n_runs in (
        (padded(model, 5), 1),
        (corruption, 2),
        (Source(under=mmlens.ablate([(0, 1)])), 2),
    ):
        runs.clear()
        patches = [patch(name, source) for name in names]
        hooks = [patched(model, p) for p in (prompt, other) for patched in patches]
        assert len(runs) == n_runs and len(hooks) == 12
        # A later name needs a run of its own, a known one does not.
        patch(names[0], source)(model, other)
        assert len(runs) == n_runs
        patch("hook_embed", source)(model, other)
        assert len(runs) == n_runs + 1
    assert calls == [prompt, other]
    handle.remove()


@pytest.fixture
def quick_collection() -> Iterator[None]:
    """The collector goes through what the test makes alone, not through all that tests before it left."""
    gc.freeze()
    yield
    gc.unfreeze()


@torch.no_grad()
@pytest.mark.usefixtures("quick_collection")
def test_a_sources_activations_go_with_its_patches() -> None:
    model = hooked("llava")
    prompt, source = one(model, 1), one(model, 5)
    gc.collect()
    known = len(patching._SHARED)
    patches = {name: patch(name, source) for name in ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre")}
    patches["blocks.1.hook_resid_pre"](model, prompt)
    shared = patching.shared_source(source)
    kept = weakref.ref(
        shared.origins(model, prompt, ["blocks.0.hook_resid_pre"])["blocks.0.hook_resid_pre"].value
    )
    assert len(patching._SHARED) == known + 1 and kept() is not None
    del shared, patches["blocks.0.hook_resid_pre"]
    gc.collect()
    # What no patch wants any more goes at the next run.
    patch("blocks.2.hook_resid_pre", source)(model, prompt)
    gc.collect()
    assert kept() is None
    patches.clear()
    gc.collect()
    assert len(patching._SHARED) == known
    prompts = [one(model, seed) for seed in (1, 2)]
    under = patch("blocks.0.hook_resid_pre", Source(under=mmlens.ablate([(0, 1)])))
    itself = patch("blocks.0.hook_resid_pre", lambda model, prompt: prompt)
    alive = [weakref.ref(p) for p in prompts]
    for p in prompts:
        under(model, p)
        itself(model, p)
    del p
    prompts.clear()
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


@torch.no_grad()
def test_what_a_patch_gets_does_not_depend_on_other_patches() -> None:
    """Nor on hooks that write into it: with a pattern read, a layer's attention rounds otherwise."""
    model = hooked("llava")
    prompt, source = one(model, 1), one(model, 5)
    name = "blocks.1.hook_resid_pre"
    pattern, resid = (patch(n, source) for n in ("blocks.0.attn.hook_pattern", name))
    pattern(model, prompt)
    with model.hooks(fwd_hooks=resid(model, prompt)):
        (given,) = read(model, prompt, name)
    assert torch.equal(given, read(model, source, name)[0])

    for name in ("vision.hook_embed", "hook_embed"):
        patched = patch(name, source)
        expected = model.run_with_hooks(prompt, fwd_hooks=patched(model, prompt))
        spoilt = [*patched(model, prompt), (name, lambda x, hook: x.zero_())]
        assert not torch.equal(model.run_with_hooks(prompt, fwd_hooks=spoilt), expected)
        assert torch.equal(model.run_with_hooks(prompt, fwd_hooks=patched(model, prompt)), expected)


@torch.no_grad()
def test_live_hooks_do_not_leak_into_other_patches() -> None:
    model = hooked("llava")
    prompt, source = one(model, 1), one(model, 5)
    name = "blocks.2.hook_resid_pre"

    def zero(x: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(x)

    def patched(intervention: Any) -> Tensor:
        hooks = intervention(model, prompt)
        return model.run_with_hooks(prompt, fwd_hooks=hooks)

    first = patch(name, source)
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", zero)]):
        (under,) = read(model, source, name)
        hooks = first(model, prompt)
    read(model, prompt, name)  # An edit asks which prompt ran last under hooks.
    assert torch.equal(hooks[0][1](under * 0, None), under)
    (clean,) = read(model, source, name)
    assert torch.equal(patched(first), patched(patch(name, {name: clean})))
    assert not torch.equal(under, clean)


@torch.no_grad()
def test_a_source_under_an_intervention() -> None:
    model = hooked("qwen3_vl")
    prompt = padded(model, 1)
    zeroed = mmlens.ablate([(0, 1), (0, 2)])
    name = "blocks.1.attn.hook_v"
    with model.hooks(fwd_hooks=zeroed(model, prompt)):
        (given,) = read(model, prompt, name)
    hooks = patch(name, Source(under=zeroed), heads=[0])(model, prompt)
    everywhere = torch.ones(tuple(prompt.shape), dtype=torch.bool)
    expected = model.run_with_hooks(prompt, fwd_hooks=[by_hand(name, given, prompt, everywhere, [0])])
    real = ~prompt.token_map.is_padding
    torch.testing.assert_close(model.run_with_hooks(prompt, fwd_hooks=hooks)[real], expected[real])


# ---------------------------------------------------------------------- on a model that answers


@torch.no_grad()
def test_causal_tracing_restores_the_clean_run(micro: mmlens.HookedVLM) -> None:
    """Noise on the image and everything restored after it: the clean run. Restored nowhere: the noisy one."""
    prompt = micro.prompt_examples(mmlens.scene_examples("objects", 4, seed=0))
    clean = micro(prompt)
    noise = noise_images(seed=3)
    noisy = micro.run_with_hooks(prompt, fwd_hooks=noise(micro, prompt))
    assert (noisy - clean).abs().max() > 0.1
    last = micro.cfg.n_layers - 1
    restored = mmlens.compose(
        noise, *(patch(f"blocks.{layer}.hook_resid_pre", Source()) for layer in range(2))
    )
    torch.testing.assert_close(micro.run_with_hooks(prompt, fwd_hooks=restored(micro, prompt)), clean)
    at_end = mmlens.compose(noise, patch(f"blocks.{last}.hook_resid_post", Source(), positions="last"))
    logits = micro.run_with_hooks(prompt, fwd_hooks=at_end(micro, prompt))
    torch.testing.assert_close(logits[:, -1], clean[:, -1])
    torch.testing.assert_close(logits[:, 0], noisy[:, 0])


@torch.no_grad()
def test_denoising_and_noising_mirror_each_other(micro: mmlens.HookedVLM) -> None:
    """Two questions about one image differ at the key alone: its residual stream at layer 0 is the whole difference.

    Denoising it in the corrupted run gives the clean run's metric, noising it in the clean run the corrupted one's.
    """
    examples = mmlens.scene_examples("objects", 30, seed=4)
    example = next(
        e for e in examples if len({e.metadata["facts"][k] for k in sorted(e.metadata["facts"])[:2]}) == 2
    )
    keys = sorted(example.metadata["facts"])[:2]
    words = example.question.replace("?", " ?").split()
    asked = example.metadata["key"]
    questions = [example.question.replace(f" {asked}", f" {key}") for key in keys]
    assert words.count(asked) == 1
    clean, corrupted = (
        micro.prompt_examples(
            [
                mmlens.Example(
                    question,
                    example.metadata["facts"][keys[0]],
                    example.images,
                    candidates=example.candidates,
                )
            ]
        )
        for question in questions
    )
    differs = clean.inputs["input_ids"] != corrupted.inputs["input_ids"]
    assert int(differs.sum()) == 1
    gap = mmlens.logit_difference
    with_clean, with_corrupted = gap(micro(clean), clean), gap(micro(corrupted), corrupted)
    assert with_clean > 0 > with_corrupted
    for prompt, source, reached in ((corrupted, clean, with_clean), (clean, corrupted, with_corrupted)):
        whole = mmlens.effect(micro, prompt, patch("blocks.0.hook_resid_pre", source, positions=differs), gap)
        torch.testing.assert_close(whole.values, reached)
        last = f"blocks.{micro.cfg.n_layers - 1}.hook_resid_post"
        end = mmlens.effect(micro, prompt, patch(last, source, positions="last"), gap)
        torch.testing.assert_close(end.values, reached)
        one_head = mmlens.effect(
            micro, prompt, patch("blocks.1.attn.hook_z", source, positions="question", heads=[0]), gap
        )
        assert min(with_clean, with_corrupted) - 1 < one_head.values < max(with_clean, with_corrupted) + 1


# ---------------------------------------------------------------------- what is refused


@torch.no_grad()
def test_bad_patches_are_errors() -> None:
    model = hooked("llava")
    prompt, source = padded(model, 1), padded(model, 5)
    z = "blocks.1.attn.hook_z"
    with pytest.raises(
        UnknownHookError, match=r"'blocks.1.attn.hook_Z'; the nearest: 'blocks.1.attn.hook_z'"
    ):
        patch("blocks.1.attn.hook_Z", source)(model, prompt)
    with pytest.raises(IndexError, match="2 key-value heads"):
        patch("blocks.1.attn.hook_k", source, heads=[2])(model, prompt)
    with pytest.raises(IndexError, match="4 heads"):
        patch(z, source, heads=[-1])(model, prompt)
    with pytest.raises(ValueError, match="no heads"):
        patch("blocks.1.hook_mlp_out", source, heads=[0])(model, prompt)
    with pytest.raises(ValueError, match="heads is empty"):
        patch(z, source, heads=[])
    with pytest.raises(ValueError, match="give positions too"):
        patch(z, source, source_positions="last")
    with pytest.raises(TypeError, match="not HookedVLM"):
        patch(z, model)
    with pytest.raises(TypeError, match="not type"):
        patch(z, Source)
    with pytest.raises(TypeError, match=r"gave list.*Source\(under="):
        patch(z, mmlens.ablate([(0, 0)]))(model, prompt)
    with pytest.raises(TypeError, match="needs a prompt to run"):
        patch(z, Source(lambda model, prompt: {}, under=mmlens.ablate([(0, 0)])))(model, prompt)
    with pytest.raises(UnknownHookError, match="activation in the source.*nearest: 'blocks.2.attn.hook_z'"):
        patch(z, {"blocks.2.attn.hook_z": torch.zeros(1)})(model, prompt)
    with pytest.raises(ValueError, match="positions cannot be chosen there"):
        patch("vision.blocks.0.hook_resid_pre", source, positions="image")(model, prompt)
    with pytest.raises(ValueError, match="takes no source_positions"):
        patch("vision.blocks.0.hook_resid_pre", source, positions="image", source_positions="image")(
            model, prompt
        )
    fewer = model.prompt([QUESTION, "Where?"], images=[source.images[0][:1], source.images[1]])
    with pytest.raises(HookNeverFiredError, match="vision.hook_embed never fired in the source's run"):
        patch("vision.hook_embed", model.encode_images(source))(model, prompt)
    with pytest.raises(ValueError, match="images .* laid out differently"):
        patch("vision.hook_embed", fewer)(model, prompt)


@torch.no_grad()
def test_other_layouts_are_errors() -> None:
    model = hooked("llava")
    prompt, source = padded(model, 1), padded(model, 5)
    z = "blocks.1.attn.hook_z"
    longer = model.prompt([QUESTION, QUESTION], images=[source.images[0], source.images[1]])
    swapped = model.prompt(["Where?", QUESTION], images=[source.images[0][:1], source.images[1] * 2])
    for other, difference in (
        (longer, "example 1 has"),
        (swapped, "example 0 has"),
        (one(model, 1), "batches have 2 and 1"),
    ):
        with pytest.raises(ValueError, match=rf"laid out differently: .*{difference}.*source_positions="):
            patch(z, other, positions="last")(model, prompt)
    with pytest.raises(ValueError, match="scores and patterns need equal layouts"):
        patch("blocks.1.attn.hook_pattern", longer, positions="last", source_positions="last")(model, prompt)
    with pytest.raises(ValueError, match=r"they choose \[.*\] and \[.*\]"):
        patch(z, longer, positions="question", source_positions="question")(model, prompt)
    with pytest.raises(ValueError, match="they choose"):
        patch(z, one(model, 1), positions="last", source_positions="last")(model, prompt)
    _, cache = model.run_with_cache(longer)
    with pytest.raises(ValueError, match="visual positions of this prompt and of the source differ"):
        patch(z, cache)(model, prompt)
    with pytest.raises(ValueError, match=r"does not run over this prompt's \[batch, pos\] = \[1, "):
        patch(z, dict(cache.items()))(model, one(model, 1))
    plain = one(model, 1)
    _, own = model.run_with_cache(plain)
    for activations in (own, dict(own.items())):
        with pytest.raises(
            ValueError, match=r"an answer follows this prompt, .* give the Prompt they are of"
        ):
            patch(z, activations)(model, plain.continued([[7, 8]]))
    # As long, and as many image tokens, but elsewhere.
    words, images = "What colour is the letter K? Where is it?", tiny.tiny_images(2, seed=0)
    moved = model.prompt([words, words], images=[images[:1], images[1:]])
    rolled = torch.roll(moved.token_map.is_image, 1, dims=1)
    _, cache = model.run_with_cache(moved)
    cache._image_mask = rolled
    with pytest.raises(ValueError, match="visual positions of this prompt and of the source differ"):
        patch(z, cache)(model, moved)
    with pytest.raises(ValueError, match="boolean mask .* of the source, not 'last'"):
        patch(z, cache, positions="last", source_positions="last")(model, moved)
    with pytest.raises(
        ValueError, match=r"boolean mask \[batch, pos\] = .* of the source, got torch.bool \[2, 3\]"
    ):
        patch(z, cache, positions="last", source_positions=torch.ones(2, 3, dtype=torch.bool))(model, moved)
    rows = dict(cache.items())["blocks.1.image.hook_z"]
    with pytest.raises(ValueError, match="the source has 49 visual positions, expected 50"):
        patch("blocks.1.image.hook_z", {"blocks.1.image.hook_z": rows[:-1]})(model, moved)
    with pytest.raises(ValueError, match="which they were in the source is not known"):
        patch(
            "blocks.1.image.hook_z",
            {"blocks.1.image.hook_z": rows},
            positions="image",
            source_positions=rolled,
        )(model, moved)
    with pytest.raises(ValueError, match="fits a batch of one prompt, this one has 2"):
        patch(z, {z: torch.zeros(moved.shape[1], 4, 16)})(model, moved)
    narrow = {z: torch.zeros(*moved.shape, 4, 8)}
    with pytest.raises(ValueError, match=r"\[2, .*, 4, 8\] does not fit this run's \[2, .*, 4, 16\]"):
        model.run_with_hooks(moved, fwd_hooks=patch(z, narrow)(model, moved))
