"""Scores from other queries than the question: against rows that are summed by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mmlens
from mmlens import HookedVLM
from mmlens.errors import InvalidValueError
from mmlens.model.prompt import Prompt
from mmlens.scores import (
    key_token_ratio,
    null_calibrated_ram,
    query_focused_score,
    ram_lift,
    ram_per_token,
    ram_significance,
    vision_mass,
)


@pytest.fixture(scope="module")
def longer(micro: HookedVLM) -> Prompt:
    prompt = micro.prompt_examples(mmlens.scene_examples("objects", 3, seed=0))
    return micro.continue_prompt(prompt, 3, do_sample=False, eos_token_id=None)


def rows_of(model: HookedVLM, prompt: Prompt) -> list[Tensor]:
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    with torch.no_grad():
        _, cache = model.run_with_cache(prompt, names_filter=names)
    return [cache[name] for name in names]


def by_hand(model: HookedVLM, prompt: Prompt, queries: Tensor, keys: Tensor) -> Tensor:
    found = torch.zeros(len(prompt), model.cfg.n_layers, model.cfg.n_heads)
    for layer, pattern in enumerate(rows_of(model, prompt)):
        for row in range(len(prompt)):
            found[row, layer] = pattern[row][:, queries[row]][:, :, keys[row]].sum(-1).mean(-1)
    return found


def test_generated_tokens_are_queries(micro: HookedVLM, longer: Prompt) -> None:
    evidence = longer.positions("evidence")
    for queries in ("answer", longer.token_map.is_answer, lambda prompt: prompt.token_map.is_answer):
        found = mmlens.ram(micro, longer, queries=queries, progress=False)
        expected = by_hand(micro, longer, longer.token_map.is_answer, evidence)
        torch.testing.assert_close(found.per_example, expected, atol=1e-5, rtol=0)
    asked = mmlens.ram(micro, longer, progress=False).per_example
    assert longer.continuation is not None
    plain = mmlens.ram(micro, longer.continuation.prompt, progress=False).per_example
    # The question does not see the answer.
    torch.testing.assert_close(asked, plain, atol=1e-5, rtol=0)


def test_words_stand_for_masks(micro: HookedVLM, longer: Prompt) -> None:
    mass = mmlens.attention_mass(micro, longer, "answer", "image")
    masks = longer.token_map.is_answer, longer.token_map.is_image
    assert torch.equal(mass, mmlens.attention_mass(micro, longer, *masks))
    read: dict[int, Tensor] = {}
    micro.attention_rows(longer, "answer", lambda layer, rows, real: read.update({layer: rows}))
    for layer, pattern in enumerate(rows_of(micro, longer)):
        for row in range(len(longer)):
            own = pattern[row][:, longer.token_map.is_answer[row]]
            torch.testing.assert_close(read[layer][row], own, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("score", "options"),
    [
        (vision_mass, {}),
        (key_token_ratio, {}),
        (ram_per_token, {}),
        (ram_lift, {}),
        (null_calibrated_ram, {"null_question": "?"}),
        (query_focused_score, {"null_question": "?"}),
    ],
)
def test_every_relative_takes_queries(
    micro: HookedVLM, longer: Prompt, score: Callable[..., Any], options: dict[str, Any]
) -> None:
    question = score(micro, longer, progress=False, **options).per_example
    same = score(micro, longer, queries="question", progress=False, **options).per_example
    answer = score(micro, longer, queries="answer", progress=False, **options).per_example
    assert torch.equal(question, same) and not torch.equal(question, answer)


def test_lift_and_significance_of_an_answer(micro: HookedVLM, longer: Prompt) -> None:
    evidence = longer.positions("evidence")
    mass = by_hand(micro, longer, longer.token_map.is_answer, evidence)
    per_token = ram_per_token(micro, longer, queries="answer", progress=False).per_example
    torch.testing.assert_close(per_token, mass / evidence.sum(-1)[:, None, None], atol=1e-5, rtol=0)
    found = ram_significance(micro, longer, queries="answer", progress=False)
    torch.testing.assert_close(found.ram.per_example, mass, atol=1e-5, rtol=0)


def test_what_has_no_answer_is_refused(micro: HookedVLM) -> None:
    examples = mmlens.scene_examples("objects", 2, seed=0)
    with pytest.raises(InvalidValueError, match="'answer'.* chooses no position"):
        mmlens.ram(micro, examples, queries="answer", progress=False)
    with pytest.raises(InvalidValueError, match="question"):
        mmlens.ram(micro, examples, queries="qestion", progress=False)
