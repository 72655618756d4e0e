"""Outcome metrics on logits whose right answers can be read off."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jaxtyping
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model, tiny_processor

from mmlens.data.examples import Example
from mmlens.metrics.outcomes import (
    accuracy,
    answer_log_probability,
    answer_rank,
    evaluate,
    invalid,
    kl_to_clean,
    logit_difference,
    logit_difference_of,
    reads,
)
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.prompt import Prompt

METRICS = (accuracy, answer_log_probability, answer_rank, invalid, logit_difference)


@functools.cache
def model() -> HookedVLM:
    return HookedVLM(tiny_model("llava"), tiny_processor("llava"))


@functools.cache
def prompt() -> Prompt:
    """Two text-only questions of different length; the four colours begin with different tokens."""
    return model().prompt_examples(
        [
            Example("What colour?", "red", candidates=("red", "blue", "green")),
            Example("What colour is the letter K?", "white", candidates=("blue", "white")),
        ]
    )


def first_token(text: str) -> int:
    return int(model().tokenizer(text, add_special_tokens=False)["input_ids"][0])


def logits_with(*rows: dict[str, float]) -> torch.Tensor:
    """[batch, pos, vocab] with the named first tokens' logits at the last position, and a decoy before it."""
    logits = torch.zeros(len(rows), 3, model().cfg.d_vocab)
    logits[:, :2, first_token("purple")] = 50
    for row, values in enumerate(rows):
        for text, value in values.items():
            logits[row, -1, first_token(text)] = value
    return logits


def test_answers_that_are_right_wrong_and_ill_formed() -> None:
    right = logits_with({"red": 5, "blue": 3, "green": 4}, {"white": 2, "blue": 1})
    assert accuracy(right, prompt()).tolist() == [1, 1]
    assert invalid(right, prompt()).tolist() == [0, 0]
    assert logit_difference(right, prompt()).tolist() == [1, 1]
    wrong = logits_with({"red": 3, "green": 7}, {"white": -1, "blue": 6})
    assert accuracy(wrong, prompt()).tolist() == [0, 0]
    assert invalid(wrong, prompt()).tolist() == [0, 0]
    assert logit_difference(wrong, prompt()).tolist() == [-4, -7]
    ill_formed = logits_with({"red": 3, "purple": 9}, {"white": 1, "purple": 2})
    assert accuracy(ill_formed, prompt()).tolist() == [0, 0]
    assert invalid(ill_formed, prompt()).tolist() == [1, 1]
    assert logit_difference(ill_formed, prompt()).tolist() == [3, 1]


@settings(deadline=None)
@given(st.floats(-20, 20), st.floats(-20, 20))
def test_log_probability_is_normalized_over_the_whole_vocabulary(red: float, purple: float) -> None:
    logits = logits_with({"red": red, "purple": purple}, {"white": 0})
    others = model().cfg.d_vocab - 2
    expected = red - math.log(math.exp(red) + math.exp(purple) + others)
    first, second = answer_log_probability(logits, prompt()).tolist()
    assert first == pytest.approx(expected, abs=1e-4)
    assert second == pytest.approx(-math.log(model().cfg.d_vocab), abs=1e-5)


def test_on_the_models_own_logits() -> None:
    with torch.no_grad():
        logits = model()(prompt())
    greedy = logits[:, -1].argmax(-1)
    expected = [float(token == first_token(a)) for token, a in zip(greedy, ("red", "white"), strict=True)]
    assert accuracy(logits, prompt()).tolist() == expected
    # The answer itself made the greedy one.
    assert accuracy(logits, replace(prompt(), answer_ids=greedy)).tolist() == [1, 1]


def test_answers_that_share_their_first_token_are_refused() -> None:
    same = model().prompt_examples([Example("What?", "red", candidates=("red", "red house", "blue"))])
    with pytest.raises(ValueError, match=r"'red' and the wrong candidate\(s\) \['red house'\] share"):
        logit_difference(logits_with({"red": 1}), same)
    # Wrong candidates may share theirs.
    others = model().prompt_examples([Example("What?", "red", candidates=("red", "blue house", "blue"))])
    assert logit_difference(logits_with({"red": 1}), others).tolist() == [1]


def test_what_a_metric_needs_and_does_not_get() -> None:
    plain = model().prompt("What colour?")
    logits = logits_with({"red": 1})
    for metric in METRICS:
        with pytest.raises(ValueError, match="carries no answers"):
            metric(logits, plain)
        with pytest.raises(ValueError, match=r"expected logits \[batch, pos, vocab\] of the prompt's 2"):
            metric(logits, prompt())
    without = model().prompt_examples([Example("What colour?", "red")])
    with pytest.raises(ValueError, match="no candidate but its answer"):
        logit_difference(logits, without)
    with pytest.raises(ValueError, match="no candidates"):
        invalid(logits, without)


def test_padding_at_the_end_is_refused() -> None:
    flipped = {name: tensor.flip(1) for name, tensor in prompt().inputs.items()}
    for metric in METRICS:
        with pytest.raises(ValueError, match=r"batch row\(s\) \[0\] end in padding"):
            metric(logits_with({}, {}), replace(prompt(), inputs=flipped))


def test_nan_logits_are_refused_and_infinite_ones_are_not() -> None:
    """A NaN wins or loses every comparison by accident; -inf is a token that is forbidden."""
    spoilt = logits_with({}, {"white": 2})
    spoilt[1, -1, 3] = torch.nan
    for metric in METRICS:
        with pytest.raises(ValueError, match=r"logits of example\(s\) \[1\] of the batch are NaN"):
            metric(spoilt, prompt())
    spoilt[1, -1, 3] = -torch.inf
    # What stands at other positions ranks nothing.
    spoilt[1, 0, 3] = torch.nan
    for metric in METRICS:
        assert bool(metric(spoilt, prompt()).isfinite().all())


def test_rank_of_the_answer() -> None:
    logits = logits_with({"red": 5, "blue": 7, "green": 6}, {"white": 9, "blue": 1})
    assert answer_rank(logits, prompt()).tolist() == [3, 1]
    # Equal logits share the best of their ranks; all tokens but the named ones have logit 0.
    tied = logits_with({"red": 7, "blue": 7, "green": 8}, {"white": 0, "blue": 1})
    assert answer_rank(tied, prompt()).tolist() == [2, 2]
    below = logits_with({"red": -1}, {"white": 0})
    assert answer_rank(below, prompt()).tolist() == [model().cfg.d_vocab, 1]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31))
def test_rank_equals_sorting_and_scipys_minimum_rank(seed: int) -> None:
    logits = torch.randint(-3, 4, (2, 1, model().cfg.d_vocab), generator=torch.manual_seed(seed)).float()
    for row, answer in enumerate(("red", "white")):
        ranks = scipy.stats.rankdata(-logits[row, 0].numpy(), method="min")
        assert answer_rank(logits, prompt())[row] == ranks[first_token(answer)]


def test_kl_to_the_clean_run() -> None:
    """Against scipy's relative entropy, at the last position and in the right direction."""
    rng = torch.manual_seed(0)
    under, clean = (3 * torch.randn(2, 4, model().cfg.d_vocab, generator=rng) for _ in range(2))
    found = kl_to_clean(under, prompt(), clean)
    for row in range(2):
        p, q = (scipy.special.softmax(x[row, -1].double().numpy()) for x in (clean, under))
        assert float(found[row]) == pytest.approx(scipy.stats.entropy(p, q), rel=1e-5)
    assert kl_to_clean(clean + 7, prompt(), clean).tolist() == pytest.approx([0, 0], abs=1e-10)
    assert kl_to_clean.reads == "clean logits"
    # Differences that single precision would lose in its rounding: about half the variance of the change.
    near = clean.clone()
    near[:, -1] += 1e-4 * torch.randn(2, model().cfg.d_vocab, generator=rng)
    for row, value in enumerate(kl_to_clean(near, prompt(), clean).tolist()):
        p = scipy.special.softmax(clean[row, -1].double().numpy())
        change = (near - clean)[row, -1].double().numpy()
        variance = np.sum(p * change**2) - np.sum(p * change) ** 2
        assert value == pytest.approx(variance / 2, rel=0.01)


def test_kl_where_tokens_are_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = torch.zeros(2, 1, model().cfg.d_vocab)
    clean[:, :, 10:] = -torch.inf
    under = clean.clone()
    under[0, 0, 3] = 1.0
    under[1, 0, 3] = -torch.inf
    found = kl_to_clean(under, prompt(), clean)
    assert float(found[0]) == pytest.approx(math.log((9 + math.e) / 10) - 0.1)
    assert float(found[1]) == math.inf
    # The tests' type checker would refuse other shapes before mmlens can.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="the clean run has logits"):
        kl_to_clean(under, prompt(), clean[:, :, :-1])


def test_logit_difference_of_given_tokens() -> None:
    logits = logits_with({"red": 5, "blue": 3, "green": 4}, {"white": 2, "blue": 1, "red": -1})
    plain = replace(prompt(), answers=None, candidates=None, answer_ids=None, candidate_ids=None)
    red = logit_difference_of(model(), "?", ["!", 7])
    question, other = (int(model().to_single_token(text)) for text in "?!")
    logits[:, -1, [question, other, 7]] = torch.tensor([[1.5, 1.0, -2.0], [0.0, 1.0, 4.0]])
    assert red(logits, plain).tolist() == [0.5, -4.0]
    assert logit_difference_of(model(), question, other)(logits, plain).tolist() == [0.5, -1.0]
    assert red.__name__ == "logit_difference_of('?', ['!', 7])"
    for arguments, message in [
        (("a long text", "?"), "tokens, not one"),
        (("?", []), "at least one wrong"),
        (("?", ["!", question]), "the same token"),
        (("?", model().cfg.d_vocab), "outside the vocabulary"),
        ((-1, "?"), "outside the vocabulary"),
    ]:
        with pytest.raises(ValueError, match=message):
            logit_difference_of(model(), *arguments)


@pytest.mark.parametrize("name", ["log probability", "difference", "given", "kl"])
def test_gradients_equal_finite_differences(name: str) -> None:
    rng = torch.manual_seed(1)
    clean = torch.randn(2, 2, model().cfg.d_vocab, generator=rng)
    metrics: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "log probability": lambda x: answer_log_probability(x, prompt()),
        "difference": lambda x: logit_difference(x, prompt()),
        "given": lambda x: logit_difference_of(model(), first_token("red"), first_token("blue"))(x, prompt()),
        "kl": lambda x: evaluate(kl_to_clean, "kl", prompt(), logits=x, clean_logits=clean),
    }
    logits = torch.randn(clean.shape, generator=rng).requires_grad_()
    step = torch.randn(clean.shape, generator=rng)
    value = metrics[name](logits)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    with torch.no_grad():
        ahead, after = (metrics[name](logits + sign * 1e-2 * step) for sign in (1, -1))
    along = (gradient * step).sum((1, 2))
    torch.testing.assert_close(along, (ahead - after) / 2e-2, atol=1e-3, rtol=1e-3)
    assert float(along.abs().min()) > 5e-3
    assert not gradient[:, 0].any()


def test_evaluate_calls_each_metric_with_what_it_reads() -> None:
    @reads("answers", max_new_tokens=3)
    def lengths(texts: Any, prompt: Prompt) -> torch.Tensor:
        return torch.tensor([float(len(text)) for text in texts])

    def plain(logits: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        return logits[:, -1, 0].double()

    logits = torch.arange(2.0)[:, None, None].expand(2, 1, model().cfg.d_vocab)
    given: dict[str, Any] = {"logits": logits, "clean_logits": logits, "answers": ["a", "bcd"]}
    values = evaluate(plain, "plain", prompt(), **given)
    assert values.tolist() == [0, 1]
    assert values.dtype == torch.float32
    assert evaluate(lengths, "lengths", prompt(), **given).tolist() == [1, 3]
    assert evaluate(kl_to_clean, "kl", prompt(), **given).tolist() == [0, 0]

    def misread(logits: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        return logits

    misread.reads = "clean logit"  # type: ignore[attr-defined]
    for metric, missing, message in [
        (plain, "logits", "metric m reads logits: none"),
        (kl_to_clean, "clean_logits", "metric m reads the clean run's logits too"),
        (lengths, "answers", "metric m reads generated answers"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate(metric, "m", prompt(), **{**given, missing: None})
    with pytest.raises(ValueError, match=r"1 answer\(s\) for a prompt of 2"):
        evaluate(lengths, "m", prompt(), answers=["a"])
    with pytest.raises(
        ValueError, match="misread: there is no .* 'clean logit'; the nearest: 'clean logits'"
    ):
        evaluate(misread, "m", prompt(), **given)


def test_a_metric_may_only_read_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests' type checker would refuse a wrong word before mmlens can.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="'answer'; the nearest: 'answers'"):
        reads("answer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_new_tokens is 0; expected"):
        reads("answers", max_new_tokens=0)
    with pytest.raises(ValueError, match="got 5 for 'logits'"):
        reads("logits", max_new_tokens=5)
