"""Outcome metrics on logits whose right answers can be read off."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model, tiny_processor

from mmlens.data.examples import Example
from mmlens.hooked_vlm import HookedVLM
from mmlens.metrics.outcomes import accuracy, answer_log_probability, invalid, logit_difference
from mmlens.prompt import Prompt

METRICS = (accuracy, answer_log_probability, invalid, logit_difference)


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


def test_an_answer_outside_the_candidates_is_valid_and_compared_with_all_of_them() -> None:
    open_ended = model().prompt_examples([Example("What colour?", "red", candidates=("blue", "green"))])
    logits = logits_with({"red": 5, "blue": 3, "green": 4})
    assert invalid(logits, open_ended).tolist() == [0]
    assert logit_difference(logits, open_ended).tolist() == [1]


def test_answers_that_share_their_first_token_are_refused() -> None:
    same = model().prompt_examples([Example("What?", "red", candidates=("red", "red house", "blue"))])
    with pytest.raises(ValueError, match=r"'red' and the wrong candidate\(s\) \['red house'\] share"):
        logit_difference(logits_with({"red": 1}), same)


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
