"""Metrics of whole answers against loops over plain Hugging Face logits, tokens appended one at a time."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from tiny.wrapped import hooked
from torch import Tensor

import mmlens
from mmlens import Example
from mmlens.errors import InvalidValueError, PromptError
from mmlens.metrics import (
    candidate_log_probability_difference,
    choosing,
    mean_token_log_probability,
    multiple_choice,
    reads,
    says_yes,
    whole_answer_log_probability,
    yes_no_bias,
)

FAMILIES = (*tiny.REPRESENTATIVES, "gemma3", "paligemma", "mllama")
CANDIDATES = ("the letter K", "the letter", "the second image", "seven")
"""Of different lengths; the first three share their first tokens, and one is the beginning of another."""

model_of = functools.cache(hooked)


def examples(family: str, *, n_images: Sequence[int] = (1, 1, 1)) -> list[Example]:
    images = iter(tiny.tiny_images(sum(n_images), seed=3, sizes=tiny.TINY[family].sizes or None))
    questions = ["What colour is it?", "Where is the red square, and which page holds it?", "Which page?"]
    answers = [CANDIDATES[0], CANDIDATES[1], CANDIDATES[3]]
    return [
        Example(question, answer, images=tuple(next(images) for _ in range(n)), candidates=CANDIDATES)
        for question, answer, n in zip(questions, answers, n_images, strict=True)
    ]


@torch.no_grad()
def one_at_a_time(model: mmlens.HookedVLM, example: Example, answer: str) -> list[float]:
    """The log probability of each token of the answer, by one plain forward pass for each, the example alone."""
    prompt = model.prompt([example.question], [list(example.images)])
    start = (
        "" if answer.startswith((" ", "<")) else (model.prompt_examples([example]).answer_starts or [""])[0]
    )
    tokenizer = model.tokenizer
    text = prompt.text[0]
    whole = tokenizer(text + start + answer, add_special_tokens=False)["input_ids"]
    ids = whole[len(tokenizer(text, add_special_tokens=False)["input_ids"]) :]
    assert tokenizer.decode(ids).strip() == answer.strip()
    inputs = dict(prompt.inputs)
    found = []
    for token in ids:
        logits = model.hf_model(**inputs).logits[0, -1].float()
        found.append(float(logits.log_softmax(-1)[token]))
        appended = {
            "input_ids": token,
            "attention_mask": 1,
            "mm_token_type_ids": 0,
            "token_type_ids": 1 if model.family.model_type == "paligemma" else 0,
            "image_embeds_position_mask": 0,
        }
        for name, value in appended.items():
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], torch.tensor([[value]])], 1)
        for name in ("cross_attention_mask", "image_attention_mask"):
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], inputs[name][:, -1:]], 1)
    return found


@functools.cache
def by_hand(family: str, n_images: tuple[int, ...]) -> list[list[list[float]]]:
    model = model_of(family)
    return [
        [one_at_a_time(model, each, candidate) for candidate in CANDIDATES]
        for each in examples(family, n_images=n_images)
    ]


def effects(family: str, n_images: tuple[int, ...], batch_size: int) -> dict[str, Tensor]:
    metrics = [
        whole_answer_log_probability,
        mean_token_log_probability,
        candidate_log_probability_difference,
        multiple_choice,
        choosing(per="token"),
        choosing(per="character"),
        mmlens.answer_log_probability,
    ]
    found = mmlens.effect(
        model_of(family), examples(family, n_images=n_images), None, metrics, batch_size=batch_size
    )
    return {name: each.clean for name, each in found.items()}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("n_images", "batch_size"), [((1, 1, 1), 3), ((1, 1, 1), 1), ((0, 0, 0), 3)])
def test_values_are_those_of_plain_logits(family: str, n_images: tuple[int, ...], batch_size: int) -> None:
    if not any(n_images) and family == "paligemma":
        pytest.skip("its processor takes no prompt without an image")
    found = effects(family, n_images, batch_size)
    rows = by_hand(family, n_images)
    data = examples(family, n_images=n_images)
    rights = [CANDIDATES.index(example.answer) for example in data]
    sums = torch.tensor([[sum(own) for own in row] for row in rows])
    means = torch.tensor([[sum(own) / len(own) for own in row] for row in rows])
    letters = sums / torch.tensor([len(text) for text in CANDIDATES])
    at = torch.arange(len(rows)), torch.tensor(rights)

    def margin(scores: Tensor) -> Tensor:
        others = scores.clone()
        others[at] = -torch.inf
        return scores[at] - others.amax(-1)

    expected = {
        "whole_answer_log_probability": sums[at],
        "mean_token_log_probability": means[at],
        "candidate_log_probability_difference": margin(sums),
        "multiple_choice": (margin(sums) > 0).float(),
        "choosing('text', per='token')": (margin(means) > 0).float(),
        "choosing('text', per='character')": (margin(letters) > 0).float(),
        "answer_log_probability": torch.tensor(
            [row[right][0] for row, right in zip(rows, rights, strict=True)]
        ),
    }
    assert list(expected) == list(found)
    for name, values in expected.items():
        torch.testing.assert_close(
            found[name], values, atol=2e-3, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def numbers(*rows: Sequence[Sequence[float]]) -> list[list[Tensor]]:
    return [[torch.tensor(own) for own in row] for row in rows]


def prompt_with(model: mmlens.HookedVLM, candidates: tuple[str, ...], answer: str) -> Any:
    return model.prompt_examples([Example("What colour is K ?", answer, candidates=candidates)])


def test_what_is_chosen_by_what(micro: mmlens.HookedVLM) -> None:
    prompt = prompt_with(micro, ("red", "blue"), "red")
    # red: a sum of -3 in 3 tokens of "red", blue: -2 in one token.
    given = numbers([[-1.0, -1.0, -1.0], [-2.0]])
    assert multiple_choice(given, prompt).tolist() == [0]
    assert choosing(per="token")(given, prompt).tolist() == [1]
    assert choosing(per="character")(given, prompt).tolist() == [0]
    assert candidate_log_probability_difference(given, prompt).tolist() == [-1]
    # Equal ones choose neither.
    assert multiple_choice(numbers([[-1.0], [-1.0]]), prompt).tolist() == [0]


def test_letters_stand_for_candidates_in_their_order(model: mmlens.HookedVLM) -> None:
    texts = ("the second", "the third", "seven")
    example = Example("A) the second B) the third C) seven", texts[1], candidates=texts)
    of_b = reads("answer log probabilities", of=choosing("letter").of)(
        lambda log_probs, prompt: log_probs[0][1].sum()[None]
    )
    measured = float(mmlens.effect(model, [example], None, of_b).clean[0])
    assert measured == pytest.approx(sum(one_at_a_time(model, example, "B")), abs=1e-3)
    letters = [sum(one_at_a_time(model, example, letter)) for letter in "ABC"]
    expected = float(letters[1] > max(letters[0], letters[2]))
    assert mmlens.effect(model, [example], None, choosing("letter")).clean.tolist() == [expected]


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@torch.no_grad()
def test_tags_before_an_answer_are_given_and_not_measured() -> None:
    model = hooked("llava")
    model.processor.chat_template = THINKING
    example = Example("Which page?", "the letter K", candidates=CANDIDATES)
    prompt = model.prompt_examples([example])
    start = "<think>\n\n</think>\n\n"
    assert prompt.answer_starts == [start]
    of_start = model.tokenizer(start, add_special_tokens=False)["input_ids"]
    whole = one_at_a_time(model, example, start + example.answer)
    assert len(whole) > len(of_start)
    measured = mmlens.effect(
        model, [example], None, [whole_answer_log_probability, mean_token_log_probability]
    )
    own = whole[len(of_start) :]
    assert float(measured["whole_answer_log_probability"].clean) == pytest.approx(sum(own), abs=2e-3)
    assert float(measured["mean_token_log_probability"].clean) == pytest.approx(sum(own) / len(own), abs=1e-3)


def test_yes_and_no(model: mmlens.HookedVLM) -> None:
    data = [
        Example("Is it red?", "Yes", candidates=("Yes", "No")),
        Example("Is it seven?", "no", candidates=("no", "yes")),
    ]
    found = mmlens.effect(model, data, None, [yes_no_bias, says_yes, multiple_choice])
    expected = []
    for example in data:
        yes, no = sorted(example.candidates, key=str.casefold, reverse=True)
        expected.append(sum(one_at_a_time(model, example, yes)) - sum(one_at_a_time(model, example, no)))
    assert found["yes_no_bias"].clean.tolist() == pytest.approx(expected, abs=1e-3)
    assert found["says_yes"].clean.tolist() == [float(value > 0) for value in expected]
    assert found["multiple_choice"].clean.tolist() == [float(expected[0] > 0), float(expected[1] < 0)]
    with pytest.raises(InvalidValueError, match="yes and no"):
        mmlens.effect(model, [Example("Is it?", "red", candidates=("red", "no"))], None, yes_no_bias)


def test_what_cannot_be_measured_is_refused(micro: mmlens.HookedVLM) -> None:
    with pytest.raises(InvalidValueError, match="carries no answers"):
        mmlens.effect(micro, micro.prompt("What colour is K ?"), None, whole_answer_log_probability)
    with pytest.raises(InvalidValueError, match="example 0 .* no candidates"):
        mmlens.effect(micro, [Example("What colour is K ?", "red")], None, multiple_choice)
    with pytest.raises(InvalidValueError, match="no candidate but its answer"):
        mmlens.effect(
            micro,
            [Example("What colour is K ?", "red", candidates=("red",))],
            None,
            candidate_log_probability_difference,
        )
    with pytest.raises(PromptError, match="does not know 'heliotrope'"):
        mmlens.effect(
            micro, [Example("What colour is K ?", "heliotrope")], None, whole_answer_log_probability
        )
    with pytest.raises(InvalidValueError, match="of is of a metric"):
        reads("logits", of="answer")
