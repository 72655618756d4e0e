"""Attributions of metrics of whole answers: what they estimate is what exact patching does."""

from __future__ import annotations

import functools

import pytest
import tiny
import torch
from tiny.wrapped import hooked

import mmlens
from mmlens import Example, HookedVLM
from mmlens.attribution import attribute, attribute_edges
from mmlens.errors import InvalidValueError
from mmlens.metrics import (
    candidate_log_probability_difference,
    multiple_choice,
    whole_answer_log_probability,
)
from mmlens.model.prompt import Prompt

FAMILIES = ("qwen3_vl", "llava")
METRICS = (whole_answer_log_probability, candidate_log_probability_difference)
CANDIDATES = ("the letter K", "the letter", "seven")

model_of = functools.cache(hooked)


@functools.cache
def prompts(family: str) -> tuple[Prompt, Prompt]:
    """A padded batch, and one that shows other images."""
    model, images = model_of(family), tiny.tiny_images(2, seed=3, sizes=[(64, 48)])
    others = tiny.tiny_images(2, seed=8, sizes=[(64, 48)])
    questions = ["What colour is it?", "Where is the red square?"]
    made = [
        model.prompt_examples(
            [
                Example(questions[at], CANDIDATES[at], images=(own[at],), candidates=CANDIDATES)
                for at in range(2)
            ]
        )
        for own in (images, others)
    ]
    return made[0], made[1]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_sum_to_what_patching_does(family: str, metric: mmlens.Metric) -> None:
    model, (prompt, source) = model_of(family), prompts(family)
    name = "blocks.2.attn.hook_z"
    scores = attribute(
        model, prompt, source, metric, nodes=[name], method="integrated_activation", steps=24
    ).scores[name]
    exact = mmlens.effect(model, prompt, mmlens.patch(name, source), metric)
    change = exact.values - exact.clean
    assert bool((change.abs() > 1e-3).all())
    torch.testing.assert_close(scores.sum(-1), change, rtol=0.02, atol=5e-3)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gradient_is_a_small_step(family: str, metric: mmlens.Metric) -> None:
    model, (prompt, source) = model_of(family), prompts(family)
    name, part = "blocks.1.hook_resid_pre", 1e-2
    scores = attribute(model, prompt, source, metric, nodes=[name]).scores[name]

    def step(size: float) -> mmlens.Intervention:
        def hooks(model: HookedVLM, longer: Prompt) -> list:
            assert longer.continuation is not None
            there = source.continued(longer.continuation.ids)
            _, cache = model.run_with_cache(there, names_filter=name)
            return [(name, lambda x, hook: x + size * (cache[name] - x))]

        return hooks

    up, down = (mmlens.effect(model, prompt, step(size), metric).values for size in (part, -part))
    torch.testing.assert_close(scores, (up - down) / (2 * part), rtol=0.03, atol=2e-2)


@pytest.mark.parametrize("metric", METRICS)
def test_edges_of_a_sender_sum_to_its_node(metric: mmlens.Metric) -> None:
    model, (prompt, source) = model_of("llava"), prompts("llava")
    nodes = attribute(model, prompt, source, metric, nodes="z")
    edges = attribute_edges(model, prompt, source, metric, senders="z")
    summed = edges.scores.nansum(-1)
    expected = torch.cat([nodes.scores[f"blocks.{layer}.attn.hook_z"] for layer in range(3)], 1)
    torch.testing.assert_close(summed, expected, rtol=1e-3, atol=1e-3)


def test_what_has_no_single_sum_is_refused() -> None:
    model, (prompt, source) = model_of("llava"), prompts("llava")
    by_position = attribute(
        model, prompt, source, whole_answer_log_probability, nodes="mlp", by_position=True
    ).scores["blocks.0.hook_mlp_out"]
    assert prompt.answer_tokens is not None
    assert by_position.shape == prompt.continued(prompt.answer_tokens).shape
    for options in ({"by_position": True}, {"method": "graddrop"}):
        with pytest.raises(InvalidValueError, match="depends on 3 runs"):
            attribute(model, prompt, source, candidate_log_probability_difference, **options)
    with pytest.raises(InvalidValueError, match="no gradient"):
        attribute(model, prompt, source, multiple_choice)
