"""Metrics of whole answers in attributions: their slopes, pass by pass.

A metric of whole answers is a function of log probabilities that come from several passes, one for each candidate. Its
slope at the clean run says how much each token's log probability counts; with these as fixed weights every pass has a
metric of its own, and an attribution is the sum over the passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmlens.effects.passes import AnswerPasses, token_log_probs
from mmlens.errors import InvalidValueError
from mmlens.metrics.outcomes import Metric, evaluate, metric_name, metric_of, what_reads
from mmlens.model.hooked_vlm import HookedVLM, model_of
from mmlens.model.prompt import Prompt, prompt_of


@dataclass(frozen=True)
class Part:
    """A prompt with one continuation of each row, and the metric's slope there, a metric of its logits."""

    prompt: Prompt
    metric: Metric
    logits_to_keep: int


def parts_of(model: HookedVLM, prompt: Prompt, metric: Metric, logits_to_keep: int) -> list[Part]:
    """The passes that a metric depends on: the prompt itself, or those over its answers.

    Raises ValueError for a metric of whole answers that has no gradient.
    """
    model_of(model)
    prompt_of(prompt)
    if what_reads(metric_of("metric", metric)) != "answer log probabilities":
        return [Part(prompt, metric, logits_to_keep)]
    name = metric_name(metric)
    passes = AnswerPasses(model, prompt, {name: metric})
    longer = [prompt.continued(passes.rows(number)) for number in range(len(passes))]
    by_pass: list[list[Tensor]] = []
    with torch.no_grad():
        for number, own in enumerate(longer):
            logits = model(own, logits_to_keep=passes.logits_to_keep(number))
            by_pass.append(passes.read(number, logits))
    leaves = [x.requires_grad_() for own in by_pass for x in own]
    with torch.enable_grad():
        value = evaluate(metric, name, prompt, log_probs=passes.of_metric(name, by_pass)).sum()
    if not value.requires_grad:
        raise InvalidValueError(
            f"metric {name} has no gradient: it is not differentiable (an argmax, a detached tensor)"
        )
    slopes = iter(torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True))
    parts = []
    for number, own in enumerate(longer):
        weights = [next(slopes) for _ in by_pass[number]]
        if any(bool(each.any()) for each in weights):
            slope = _slope(name, passes.rows(number), weights)
            parts.append(Part(own, slope, passes.logits_to_keep(number)))
    return parts


def _slope(name: str, rows: Sequence[Sequence[int]], weights: Sequence[Tensor]) -> Metric:
    def slope(logits: Tensor, prompt: Prompt) -> Tensor:
        found = token_log_probs(logits, rows)
        return torch.stack([(own * each.to(own)).sum() for own, each in zip(found, weights, strict=True)])

    slope.__name__ = name
    return slope
