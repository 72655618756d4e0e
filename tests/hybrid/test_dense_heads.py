"""Hybrid attention against the plain eager model under a mask for each head, made here pair by pair."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import tiny
import torch
from tiny.wrapped import (
    family_prompt,
    hooked,
    hooked_family,
    largest_logit,
    padded_prompt,
    two_image_prompt,
)
from torch import Tensor
from transformers import LlamaModel

import mmlens
from mmlens.hybrid import layer as sparse_layer
from mmlens.hybrid.layer import NotCausalError
from mmlens.internals import CACHE_KEYWORDS
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import NoChangeWarning
from mmlens.model.prompt import Prompt

NOT_CAUSAL = ("gemma3", "paligemma", "gemma4", "shieldgemma2", "gemma4_unified", "molmo2")
CROSS = ("mllama", "idefics")
CAUSAL = tuple(name for name in tiny.FAMILIES if name not in (*NOT_CAUSAL, *CROSS))
ALWAYS = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "cohere_compass", "qwen3_5", "inkling2")
SINK, WINDOW = 3, 9

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def one_head_a_layer(model: HookedVLM) -> list[tuple[int, int]]:
    return [(layer, (layer + 1) % count) for layer, count in enumerate(model.grid.heads_per_layer) if count]


def cut_scores(scores: Tensor, real: Tensor, dense: set[int]) -> Tensor:
    """[batch, head, query, key] with what a streaming head may not see at the lowest score there is."""
    out, positions = scores.clone(), range(scores.shape[-1])
    for row in range(len(scores)):
        first = int(real[row].int().argmax())
        unseen = torch.tensor(
            [[key - first >= SINK and query - key >= WINDOW for key in positions] for query in positions]
        )
        for head in set(range(scores.shape[1])) - dense:
            out[row, head][unseen] = torch.finfo(scores.dtype).min
    return out


def cut_logits(model: HookedVLM, prompt: Prompt, dense: list[tuple[int, int]]) -> Tensor:
    """The plain run, its scores cut by a hook."""
    real = ~prompt.token_map.is_padding

    def cut(scores: Tensor, hook: Any) -> Tensor:
        layer = int(hook.name.split(".")[1])
        return cut_scores(scores, real, {head for at, head in dense if at == layer})

    def in_decoder(name: str) -> bool:
        return name.startswith("blocks.") and name.endswith("attn.hook_attn_scores")

    return model.run_with_hooks(prompt, fwd_hooks=[(in_decoder, cut)])


def check_every_path(model: HookedVLM, prompt: Prompt) -> None:
    dense, real = one_head_a_layer(model), ~prompt.token_map.is_padding
    plain, cut = model(prompt), cut_logits(model, prompt, one_head_a_layer(model))
    # Some families answer at fewer positions than the prompt has.
    shown = real if plain.shape[:2] == real.shape else torch.ones(plain.shape[:2], dtype=torch.bool)
    close = 1e-5 * largest_logit(plain)
    for path in ("auto", "masked", "blocks", "flex"):
        with mmlens.hybrid_attention(model, dense, sink=SINK, window=WINDOW, method=path):
            torch.testing.assert_close(model(prompt)[shown], cut[shown], atol=close, rtol=0)
    assert (cut - plain)[shown].abs().max() > 1e3 * close
    assert torch.equal(model(prompt), plain)


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.others_slow(ALWAYS, of=CAUSAL))
def test_every_path_equals_the_plain_model_with_its_scores_cut(family: str) -> None:
    model = hooked_family(family)
    check_every_path(model, family_prompt(family, model))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_row_without_padding_needs_no_mask(family: str) -> None:
    model = hooked(family)
    check_every_path(model, two_image_prompt(model))


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.others_slow(["gemma3"], of=NOT_CAUSAL))
def test_attention_both_ways_is_refused_by_name(family: str) -> None:
    model = hooked_family(family)
    with (
        mmlens.hybrid_attention(model, [(0, 0)], sink=SINK, window=WINDOW),
        pytest.raises(NotCausalError, match=f"layer 0 of {family} lets positions see what comes after them"),
    ):
        model(family_prompt(family, model))


@pytest.mark.parametrize("family", CROSS)
def test_cross_attention_is_refused_by_name(family: str) -> None:
    with pytest.raises(TypeError, match=f"{family} reads images by cross-attention"):
        mmlens.hybrid_attention(hooked_family(family), [(0, 0)]).__enter__()


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_all_heads_dense_or_a_wide_window_is_the_plain_model(family: str, attention: str) -> None:
    model = hooked(family, attn_implementation=attention)
    prompt = padded_prompt(model)
    shown = ~prompt.token_map.is_padding
    plain = model(prompt)[shown]
    for dense, window in ((model.heads, WINDOW), (one_head_a_layer(model), prompt.shape[1])):
        for path in ("auto", "masked", "blocks", "flex"):
            with (
                pytest.warns(mmlens.model.NoChangeWarning, match="hybrid attention changed nothing"),
                mmlens.hybrid_attention(model, dense, sink=SINK, window=window, method=path),
            ):
                torch.testing.assert_close(model(prompt)[shown], plain, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_eager_attention_takes_the_masked_reference() -> None:
    eager, sdpa = hooked("qwen3_vl", attn_implementation="eager"), hooked("qwen3_vl")
    prompt = padded_prompt(sdpa)
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
    prompt = two_image_prompt(model)
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
    prompt = two_image_prompt(model)
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
@pytest.mark.parametrize("padded", [False, True])
def test_each_path_is_the_one_that_computes(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal numbers would not show a fast path that is never taken."""
    taken: list[str] = []

    def counted(name: str) -> None:
        compute = getattr(sparse_layer, name)
        monkeypatch.setattr(sparse_layer, name, lambda *given: (taken.append(name), compute(*given))[1])

    for name in ("streaming_attention", "flex_attention"):
        counted(name)
    model = hooked("llava")
    prompt = padded_prompt(model) if padded else two_image_prompt(model)
    dense = [(at, 1) for at in range(model.cfg.n_layers)]
    for path, expected in (
        ("auto", {"streaming_attention"}),
        ("blocks", {"streaming_attention"}),
        ("flex", {"flex_attention"}),
        ("masked", set()),
    ):
        taken.clear()
        with mmlens.hybrid_attention(model, dense, sink=SINK, window=WINDOW, method=path):
            model(prompt)
            assert set(taken) == expected
            assert path != "flex" or len(taken) == model.cfg.n_layers
            # Whatever reads the pattern takes the reference.
            taken.clear()
            model.run_with_cache(prompt, names_filter="blocks.1.attn.hook_pattern")
            assert len(set(taken)) == len(expected) and taken.count("flex_attention") in (
                0,
                model.cfg.n_layers - 1,
            )
            taken.clear()
            model.run_with_cache(prompt, names_filter=lambda name: name.endswith("attn.hook_pattern"))
            assert not taken


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


def cache_of(output: Any) -> Any:
    """The key-value cache in a model's output, whose name changed with transformers 5.24."""
    return next(output[name] for name in CACHE_KEYWORDS if name in output)


def on(cache: Any) -> dict[str, Any]:
    """The keyword that hands a model its cache, under the name that this transformers has."""
    taken = inspect.signature(LlamaModel.forward).parameters
    return {next(name for name in CACHE_KEYWORDS if name in taken): cache}


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "internvl"])
def test_generation_prefills_by_the_rule_and_decodes_densely(family: str) -> None:
    model = hooked(family)
    prompt, dense = two_image_prompt(model), one_head_a_layer(model)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    with mmlens.hybrid_attention(model, dense, sink=SINK, window=WINDOW):
        tokens = model.generate(prompt, **options)
        first = model.hf_model(**prompt.inputs, use_cache=True)
    # Decoding by hand: the plain model on the keys of all positions.
    cache, expected = cache_of(first), []
    assert cache.get_seq_length() == prompt.shape[1]
    token = first.logits[:, -1:].argmax(-1)
    for step in range(5):
        expected.append(int(token))
        at = torch.tensor([prompt.shape[1] + step])
        extra = {"position_ids": None} if family == "qwen3_vl" else {}
        token = (
            model.hf_model(input_ids=token, **on(cache), cache_position=at, use_cache=True, **extra)
            .logits[:, -1:]
            .argmax(-1)
        )
    assert tokens[0, -5:].tolist() == expected


def continued(model: HookedVLM, prompt: Prompt, further: Tensor) -> Tensor:
    """Logits of further tokens run on the prompt's cache."""
    cache = cache_of(model.hf_model(**prompt.inputs, use_cache=True))
    return model.hf_model(input_ids=further, **on(cache), use_cache=True).logits


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_prompt_in_two_pieces_is_the_prompt_in_one(family: str) -> None:
    model, further = hooked(family), torch.arange(40, 52)[None]
    prompt = two_image_prompt(model)
    added = {"input_ids": further, "attention_mask": torch.ones_like(further)}
    whole = {
        name: torch.cat([value, added.get(name, torch.zeros_like(further))], 1)
        if name in (*added, "mm_token_type_ids")
        else value
        for name, value in prompt.inputs.items()
    }
    with mmlens.hybrid_attention(model, one_head_a_layer(model), sink=SINK, window=WINDOW):
        found, expected = continued(model, prompt, further), model.hf_model(**whole).logits[:, -12:]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (continued(model, prompt, further) - expected).abs().max() > 1


@torch.no_grad()
def test_further_tokens_on_a_cut_cache_are_refused_by_name() -> None:
    model = hooked("exaone4_5")
    prompt = two_image_prompt(model)
    with (
        mmlens.hybrid_attention(model, [(0, 0)], sink=SINK, window=WINDOW),
        pytest.raises(
            NotImplementedError, match="layer 0 of exaone4_5: 12 further positions are run on a cache"
        ),
    ):
        continued(model, prompt, torch.arange(40, 52)[None])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_sweep_under_it_is_one_run_for_each_intervention(family: str) -> None:
    model = hooked(family)
    prompt, dense = padded_prompt(model), one_head_a_layer(model)
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
    prompt = two_image_prompt(model)
    with mmlens.hybrid_attention(model, [], sink=SINK, window=WINDOW):
        found = model(prompt)
    torch.testing.assert_close(found, cut_logits(model, prompt, []), atol=1e-4, rtol=1e-4)


def test_what_cannot_be_done_is_refused_by_name() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    with pytest.raises(ValueError, match="method is one of auto, masked, blocks, flex, not 'fast'"):
        mmlens.hybrid_attention(model, [(0, 0)], method="fast").__enter__()
    with pytest.raises(IndexError, match="layer 9 is out of range"):
        mmlens.hybrid_attention(model, [(9, 0)]).__enter__()
    with pytest.raises(ValueError, match="sink=-1"):
        mmlens.hybrid_attention(model, [(0, 0)], sink=-1).__enter__()
    with (
        mmlens.hybrid_attention(model, [(0, 0)], sink=SINK, window=WINDOW),
        pytest.raises(RuntimeError, match="open on this model already"),
    ):
        mmlens.hybrid_attention(model, [(0, 1)]).__enter__()
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


# ---------------------------------------------------------------------- answers in the same pass


@torch.no_grad()
def decoded(model: HookedVLM, prompt: Prompt, ids: list[int]) -> Tensor:
    """Logits at the last position of a prompt and at each token of its answer, given to the cache one at a time."""
    output = model.hf_model(**prompt.inputs, use_cache=True)
    logits = [output.logits[0, -1]]
    for token in ids:
        further = torch.tensor([[token]])
        output = model.hf_model(input_ids=further, **on(cache_of(output)), use_cache=True)
        logits.append(output.logits[0, -1])
    return torch.stack(logits)


@torch.no_grad()
@pytest.mark.parametrize("path", ["auto", "masked", "flex", "eager"])
@pytest.mark.parametrize("family", ["llava", "idefics3", "internvl"])
def test_an_answer_in_the_same_pass_is_decoded_by_dense_attention(family: str, path: str) -> None:
    attention = "eager" if path == "eager" else "sdpa"
    model = HookedVLM(tiny.tiny_model(family, attn_implementation=attention), tiny.tiny_processor(family))
    dense, images = one_head_a_layer(model), tiny.tiny_images(3, seed=1)
    shown = [images[:2], images[2:]]
    texts, ids = ["What colour is the big one now?", "Where?"], [list(range(40, 52)), [7, 8, 9]]
    method = "auto" if path == "eager" else path
    with mmlens.hybrid_attention(model, dense, sink=SINK, window=WINDOW, method=method):
        longer = model.prompt(texts, images=shown).continued(ids)
        found, streamed = model(longer), model(**longer.inputs)
        for row, own in enumerate(ids):
            expected = decoded(model, model.prompt(texts[row], images=shown[row]), own)
            close = 1e-5 * largest_logit(expected)
            torch.testing.assert_close(found[row, -len(own) - 1 :], expected, atol=close, rtol=0)
            if row == 0:
                # Of inputs alone nobody knows what is an answer.
                assert (streamed[row, -len(own) :] - expected[1:]).abs().max() > 100 * close
        # Prompts alone, and generated without a cache, are as they were.
        plain, prompt = model.prompt(texts[0], images=shown[0]), {"max_new_tokens": 6, "do_sample": False}
        without = model.generate(plain, use_cache=False, **prompt)
        assert torch.equal(model.generate(plain, **prompt), without)


@torch.no_grad()
def test_rows_of_an_answer_see_the_whole_prompt() -> None:
    model = hooked("llava")
    longer = two_image_prompt(model).continued([list(range(40, 52))])
    real, rows = ~longer.token_map.is_padding, {}
    with mmlens.hybrid_attention(model, [(0, 0)], sink=SINK, window=WINDOW):
        model.attention_rows(longer, "answer", lambda layer, own, chosen: rows.update({layer: own}))
    prompt = real & ~longer.token_map.is_answer
    for own in rows.values():
        assert bool((own[0][..., prompt[0]] > 0).all())


def test_a_long_answer_after_a_prompt_within_the_window_changes_nothing() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    longer = prompt.continued([[7] * 40])
    hybrid = mmlens.hybrid_attention(model, [], sink=SINK, window=prompt.shape[1])
    with pytest.warns(NoChangeWarning, match=rf"the longest has {prompt.shape[1]}\b"), hybrid:
        found = model(longer)
    torch.testing.assert_close(found, model(longer))
