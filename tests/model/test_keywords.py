"""Keywords of a run: what the model reads passes, what nothing reads is an error that names the nearest."""

from __future__ import annotations

import re
from typing import Any

import pytest
import tiny
import torch
from tiny.wrapped import hooked, padded_prompt

import mmlens
from mmlens import internals
from mmlens.errors import InvalidTypeError, InvalidValueError
from mmlens.model import keywords
from mmlens.model.loss import IGNORED

READ_BY_ALL = {
    "use_cache": False,
    "output_hidden_states": True,
    "output_attentions": False,
    "return_dict": True,
}


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.others_slow([*tiny.REPRESENTATIVES, *tiny.FURTHER_KINDS]))
def test_what_a_family_reads_passes_and_a_misspelling_does_not(family: str) -> None:
    model = mmlens.HookedVLM(tiny.tiny_model(family))
    inputs = tiny.tiny_inputs(family, [1])
    keywords.check_forward(model.hf_model, inputs)
    more = {**READ_BY_ALL, "labels": inputs["input_ids"], "position_ids": None}
    keywords.check_forward(model.hf_model, more)
    if model.hf_model.get_decoder() is not None:
        assert {"inputs_embeds", "past_key_values"} <= keywords.forward_keywords(model.hf_model)
    for name in ("pixel_value", "input_id", "logits_to_kep", "attention_masks", "output_hiden_states"):
        with pytest.raises(InvalidTypeError, match=rf"there is no keyword '{name}'; the nearest: "):
            keywords.check_forward(model.hf_model, {**inputs, name: None})


@torch.no_grad()
@pytest.mark.parametrize("family", [*tiny.REPRESENTATIVES, "gemma3", "mllama"])
def test_keyword_inputs_of_real_runs(family: str) -> None:
    """The keywords that users do give, each with its effect: bit-equal to the plain model's own."""
    model, plain = hooked(family), tiny.tiny_model(family)
    inputs = tiny.tiny_inputs(family, [2])
    expected = plain(**inputs).logits
    assert torch.equal(model(inputs), expected) and torch.equal(model(**inputs), expected)
    kept = model(inputs, logits_to_keep=2, use_cache=False, output_hidden_states=True)
    torch.testing.assert_close(kept, expected[:, -2:], atol=1e-5, rtol=1e-5)
    assert torch.equal(model(inputs, labels=inputs["input_ids"]), expected)
    masked = torch.ones_like(inputs["input_ids"])
    masked[:, 0] = 0
    rest = {name: value for name, value in inputs.items() if name != "attention_mask"}
    assert torch.equal(model(rest, attention_mask=masked), plain(**rest, attention_mask=masked).logits)


@torch.no_grad()
def test_logits_to_keep_holds_where_the_family_does_not_know_it() -> None:
    model = mmlens.HookedVLM(tiny.tiny_model("qwen2_5_omni_thinker"))
    inputs = tiny.tiny_inputs("qwen2_5_omni_thinker", [1])
    whole = model(inputs)
    for keep, expected in ((2, whole[:, -2:]), (0, whole), (torch.tensor([0, 3]), whole[:, [0, 3]])):
        assert torch.equal(model(inputs, logits_to_keep=keep), expected)
        assert torch.equal(model({**inputs, "logits_to_keep": keep}), expected)


def test_what_a_processor_gives_passes_though_the_model_drops_it(micro: mmlens.HookedVLM) -> None:
    prompt = micro.prompt("What colour is K?")
    name = "mm_token_type_ids"
    given = {**prompt.inputs, name: torch.zeros_like(prompt.inputs["input_ids"])}
    assert torch.equal(micro(given), micro(prompt))


@pytest.mark.parametrize(
    ("keyword", "nearest"),
    [
        ("name_filter", "names_filter"),
        ("return_typ", "return_type"),
        ("logits_to_kep", "logits_to_keep"),
        ("pixel_value", "pixel_values"),
        ("past_kv_cach", "past_kv_cache"),
        ("fwd_hook", "fwd_hooks"),
    ],
)
def test_a_misspelt_keyword_names_the_nearest(keyword: str, nearest: str, micro: mmlens.HookedVLM) -> None:
    prompt = micro.prompt("What colour is K?")
    given: dict[str, Any] = {keyword: None}
    for run in (micro, micro.run_with_cache, micro.run_with_hooks, lambda p, **k: micro({**p.inputs, **k})):
        with pytest.raises(InvalidTypeError, match=rf"no keyword '{keyword}'; the nearest: '{nearest}'"):
            run(prompt, **given)


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("start_at_layer", 2, "every run is a whole one"),
        ("stop_at_layer", 2, "every run is a whole one"),
        ("pos_slice", -1, "slice the cache"),
        ("prepend_bos", False, "token ids are run as they are"),
        ("tokens", torch.ones(1, 2), "token ids are the first argument"),
        ("past_kv_cache", object(), "past_key_values"),
        ("shortformer_pos_embed", torch.ones(1), "embeds positions"),
        ("padding_side", "left", "token ids are run as they are"),
        ("reset_hooks_end", False, "add_hook"),
        ("clear_contexts", True, "clear_contexts()"),
        ("return_cache_object", False, "cache_dict"),
    ],
)
def test_transformer_lens_options_say_why_they_are_not_served(
    option: str, value: Any, why: str, micro: mmlens.HookedVLM
) -> None:
    prompt = micro.prompt("What colour is K?")
    with pytest.raises(InvalidTypeError, match=rf"takes no {option} here.*{re.escape(why)}"):
        micro.run_with_cache(prompt, **{option: value})


@torch.no_grad()
def test_transformer_lens_options_that_ask_for_nothing_pass(micro: mmlens.HookedVLM) -> None:
    prompt = micro.prompt("What colour is K?")
    asked = dict.fromkeys(
        ("start_at_layer", "stop_at_layer", "pos_slice", "prepend_bos", "past_kv_cache", "tokens")
    )
    logits, _ = micro.run_with_cache(
        prompt, names_filter="hook_embed", **asked, reset_hooks_end=True, clear_contexts=False
    )
    assert torch.equal(logits, micro(prompt))


def test_return_dict_is_not_given_up(micro: mmlens.HookedVLM) -> None:
    with pytest.raises(InvalidTypeError, match="return_dict=False"):
        micro(micro.prompt("What colour is K?"), return_dict=False)


# ---------------------------------------------------------------------- generation


@pytest.mark.parametrize("family", tiny.others_slow(tiny.REPRESENTATIVES))
def test_a_misspelt_option_of_generate_names_the_nearest(family: str) -> None:
    if not tiny.TINY[family].generates:
        pytest.skip("the plain model cannot generate from the tiny inputs")
    model = mmlens.HookedVLM(tiny.tiny_model(family))
    inputs = tiny.tiny_inputs(family, [1])
    for name, nearest in (("max_new_token", "max_new_tokens"), ("do_samples", "do_sample")):
        with pytest.raises(
            InvalidTypeError, match=f"generate: there is no keyword '{name}'; the nearest: '{nearest}"
        ):
            model.generate(inputs, **{name: 2})


def test_generate_and_answer_take_what_transformers_takes(micro: mmlens.HookedVLM) -> None:
    prompt = micro.prompt_examples(mmlens.scene_examples("objects", 1, seed=0))
    greedy = micro.generate(prompt, max_new_tokens=2, do_sample=False)
    plain = micro.hf_model.generate(**prompt.inputs, max_new_tokens=2, do_sample=False)
    assert torch.equal(greedy, plain)
    record = micro.generate(
        prompt, max_new_tokens=2, num_beams=2, return_dict_in_generate=True, output_scores=True, verbose=False
    )
    assert len(record.scores) == 2
    assert micro.answer(prompt, max_new_tokens=1, use_cache=False) == micro.answer(prompt, max_new_tokens=1)


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("freq_penalty", 0.5, "repetition_penalty"),
        ("stop_at_eos", False, "eos_token_id"),
        ("use_past_kv_cache", False, "use_cache"),
        ("prepend_bos", True, "token ids are run as they are"),
        ("return_type", "str", "generate gives token ids, answer texts"),
    ],
)
def test_transformer_lens_options_of_generate_say_why(
    option: str, value: Any, why: str, micro: mmlens.HookedVLM
) -> None:
    prompt = micro.prompt("What colour is K?")
    for run in (micro.generate, micro.answer):
        with pytest.raises(InvalidTypeError, match=f"takes no {option} here.*{why}"):
            run(prompt, max_new_tokens=1, **{option: value})


def test_answer_gives_texts(micro: mmlens.HookedVLM) -> None:
    with pytest.raises(InvalidTypeError, match="call generate"):
        micro.answer(micro.prompt("What colour is K?"), return_dict_in_generate=True)


def test_transformers_own_errors_of_generate_stay(micro: mmlens.HookedVLM) -> None:
    with pytest.raises(ValueError, match="max_new_tokens"):
        micro.generate(micro.prompt("What colour is K?"), max_new_tokens=-1)


# ---------------------------------------------------------------------- the loss


def brute_force_loss(model: mmlens.HookedVLM, prompt: Any) -> list[list[float]]:
    """Of every row, -log p(token at p + 1 | up to p) wherever both are real and the token is text."""
    logits = model(prompt).double()
    ids, mask = prompt.inputs["input_ids"], prompt.inputs["attention_mask"]
    image = model.image_mask(prompt)
    rows = []
    for b in range(len(ids)):
        row = []
        for p in range(ids.shape[1] - 1):
            counts = mask[b, p] and mask[b, p + 1] and not image[b, p + 1]
            row.append(-float(logits[b, p].log_softmax(0)[ids[b, p + 1]]) if counts else 0.0)
        rows.append(row)
    return rows


@torch.no_grad()
def test_the_loss_is_that_of_text_tokens(model: mmlens.HookedVLM) -> None:
    prompt = padded_prompt(model)
    expected = torch.tensor(brute_force_loss(model, prompt))
    each = model(prompt, return_type="loss", loss_per_token=True)
    assert each.shape == (2, prompt.inputs["input_ids"].shape[1] - 1)
    torch.testing.assert_close(each, expected, atol=1e-4, rtol=1e-4)
    # Padding in one row, images in both: neither counts.
    assert 0 < (expected > 0).sum() < expected.numel() / 2
    loss = model(prompt, return_type="loss")
    torch.testing.assert_close(loss, expected.sum() / (expected > 0).sum(), atol=1e-4, rtol=1e-4)
    logits, both = model(prompt, return_type="both")
    assert torch.equal(logits, model(prompt)) and torch.equal(both, loss)


@torch.no_grad()
@pytest.mark.parametrize("family", [*tiny.REPRESENTATIVES, "gemma3", "paligemma"])
def test_the_loss_is_hugging_faces_own_of_the_same_labels(family: str) -> None:
    model, plain = hooked(family), tiny.tiny_model(family)
    prompt = padded_prompt(model)
    ids, mask = prompt.inputs["input_ids"], prompt.inputs["attention_mask"].bool()
    labels = ids.masked_fill(model.image_mask(prompt) | ~mask, IGNORED)
    for row, first in zip(labels, mask.int().argmax(1), strict=True):
        row[first] = IGNORED
    expected = plain(**prompt.inputs, labels=labels).loss
    torch.testing.assert_close(model(prompt, return_type="loss"), expected, atol=1e-5, rtol=1e-5)
    # Labels of the user's own say what counts.
    labels[:, :-3] = IGNORED
    expected = plain(**prompt.inputs, labels=labels).loss
    torch.testing.assert_close(
        model(prompt, return_type="loss", labels=labels), expected, atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_the_loss_of_text_is_transformer_lens(micro: mmlens.HookedVLM) -> None:
    from transformer_lens.utilities.lm_utils import lm_cross_entropy_loss

    prompt = micro.prompt(["What colour is the letter K?", "What colour is K?"])
    ids, mask = prompt.inputs["input_ids"], prompt.inputs["attention_mask"].bool()
    assert not mask.all()
    for per_token in (False, True):
        expected = lm_cross_entropy_loss(micro(prompt), ids, mask, per_token)
        given = micro(prompt, return_type="loss", loss_per_token=per_token)
        torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


def test_the_loss_has_a_gradient_and_reaches_run_with_cache_and_hooks(micro: mmlens.HookedVLM) -> None:
    prompt = micro.prompt("What colour is the letter K?")
    loss, _ = micro.run_with_cache(prompt, names_filter="hook_embed", return_type="loss")
    (gradient,) = torch.autograd.grad(loss, micro.embed.weight)
    assert gradient.abs().sum() > 0
    worse = micro.run_with_hooks(
        prompt, return_type="loss", fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: x * 0)]
    )
    assert not torch.equal(worse, loss)


def test_losses_that_cannot_be_told_are_errors(micro: mmlens.HookedVLM) -> None:
    prompt = micro.prompt("What colour is the letter K?")
    with pytest.raises(InvalidValueError, match="no return_type 'los'; the nearest: 'loss'"):
        micro(prompt, return_type="los")
    with pytest.raises(InvalidValueError, match="loss_per_token asks for a loss"):
        micro(prompt, loss_per_token=True)
    with pytest.raises(InvalidValueError, match="Leave out logits_to_keep"):
        micro(prompt, return_type="loss", logits_to_keep=1)
    with pytest.raises(InvalidValueError, match="at least one text token"):
        micro(prompt.inputs["input_ids"][:, -1:], return_type="loss")
    embedded = micro.embed(prompt.inputs["input_ids"])
    with pytest.raises(InvalidValueError, match="needs labels, or input_ids"):
        micro(inputs_embeds=embedded, return_type="loss")
    with_labels = micro(inputs_embeds=embedded, labels=prompt.inputs["input_ids"], return_type="loss")
    torch.testing.assert_close(with_labels, micro(prompt, return_type="loss"), atol=1e-5, rtol=1e-5)


def test_renamed_keywords_are_read_off_the_decorators() -> None:
    from transformers.utils.deprecation import deprecate_kwarg

    @deprecate_kwarg("gone", version="99.0.0")
    @deprecate_kwarg("old", version="99.0.0", new_name="new")
    def function(new: int) -> int:
        return new

    assert internals.renamed_keywords(function) == {"old"}, (
        "transformers decorates renamed keywords in another way"
    )
