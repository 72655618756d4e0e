"""The runner: metrics on one prompt, in the clean run and under interventions, each in a whole run or a partial one.

`effect` and `sweep` hand it prompts and interventions. `passes` run the prompt, and its continuations where metrics
read whole answers; `plan` says from where each intervention is run and beside which others, `partial` runs the ends of
forward passes, and `mmlens.metrics` give the values.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mmlens.arguments import instance_of, listed, whole_number
from mmlens.effects.passes import AnswerPasses, PassOutcome, PromptPass, unwarned
from mmlens.effects.watching import HookDone
from mmlens.errors import InvalidValueError
from mmlens.metrics.outcomes import (
    DEFAULT_MAX_NEW_TOKENS,
    Metric,
    evaluate,
    metric_name,
    metric_of,
    what_reads,
)
from mmlens.model.evaluation import check_same_twice
from mmlens.model.hooked_vlm import HookedVLM, model_of
from mmlens.model.hooks import Hook, Intervention, NoChangeWarning
from mmlens.model.prompt import Prompt

Metrics = Mapping[str, Metric] | Sequence[Metric]
Values = dict[str, Float[Tensor, " example"]]
"""By metric."""


class MetricRuns:
    """The runs that a set of metrics needs of each prompt, and what the metrics make of them."""

    def __init__(self, model: HookedVLM, metric: Metric | Metrics, logits_to_keep: int) -> None:
        self.model = model_of(model)
        self.logits_to_keep = whole_number("logits_to_keep", logits_to_keep, least=0)
        self.metrics = named_metrics(metric)
        self.reads = {name: what_reads(function) for name, function in self.metrics.items()}
        self.compares = "clean logits" in self.reads.values()
        self.reads_logits = self.compares or "logits" in self.reads.values()
        self.of_answers = {
            name: self.metrics[name]
            for name, what in self.reads.items()
            if what == "answer log probabilities"
        }
        """The metrics that read continuations of the prompt; the others read the prompt itself."""
        self.of_prompt = {name: own for name, own in self.metrics.items() if name not in self.of_answers}
        self._n_tokens = {
            name: getattr(self.metrics[name], "max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
            for name, what in self.reads.items()
            if what == "answers"
        }
        check_same_twice(model.hf_model)

    def values(
        self, prompt: Prompt, hooks: Sequence[Hook], logits: Tensor | None, clean_logits: Tensor | None
    ) -> Values:
        """The values of the metrics of the prompt, from these logits and from answers generated under the hooks."""
        answers = {n_tokens: self._answers(prompt, hooks, n_tokens) for n_tokens in self._lengths}
        found = {}
        for name, function in self.of_prompt.items():
            what = self.reads[name]
            # A metric may work in place, and other metrics and later runs read the same logits: each gets a copy.
            own = None if logits is None or what == "answers" else logits.clone()
            clean = None if clean_logits is None or what != "clean logits" else clean_logits.clone()
            texts = answers.get(self._n_tokens.get(name, 0))
            value = evaluate(function, name, prompt, logits=own, clean_logits=clean, answers=texts)
            found[name] = value.detach()
        return found

    def values_of_answers(
        self, prompt: Prompt, passes: AnswerPasses, by_pass: Sequence[Sequence[Tensor]]
    ) -> Values:
        """The values of the metrics of whole answers, from the log probabilities that each pass gave."""
        return {
            name: evaluate(function, name, prompt, log_probs=passes.of_metric(name, by_pass)).detach()
            for name, function in self.of_answers.items()
        }

    @property
    def _lengths(self) -> list[int]:
        return sorted(set(self._n_tokens.values()))

    def _answers(self, prompt: Prompt, hooks: Sequence[Hook], n_tokens: int) -> list[str]:
        with unwarned(), self.model.hooks(fwd_hooks=list(hooks)):
            return self.model.answer(prompt, max_new_tokens=n_tokens, do_sample=False)


@dataclass(frozen=True)
class Outcome:
    """An intervention on one prompt: the metrics' values, what each hook did in each pass, and how it was run."""

    index: int
    """Which of the interventions."""
    values: Values
    has_moved: bool | None
    """Whether any logit did; None where there are no clean ones to compare with."""
    hooks: list[list[HookDone]]
    how: dict[str, Any]


class PromptRuns:
    """Metrics on one prompt: `clean_values`, and `under` interventions.

    `memory` None: every run is a whole one. Else interventions run from where they start, those that start together as
    one batch of at most so many GiB. `clean`: whether the clean run's logits are needed.
    """

    def __init__(
        self, runs: MetricRuns, prompt: Prompt, *, memory: float | None = None, clean: bool = True
    ) -> None:
        self.runs, self.model, self.prompt, self.memory, self._clean = runs, runs.model, prompt, memory, clean
        self.encoded = prompt if memory is None else self.model.encode_images(prompt)
        self.answers = AnswerPasses(self.model, prompt, runs.of_answers) if runs.of_answers else None
        self._clean_log_probs: dict[int, Sequence[Tensor]] = {}
        self._pass: PromptPass | None = None
        if runs.of_prompt:
            self._pass = PromptPass(
                self.model,
                prompt,
                self.encoded,
                runs.logits_to_keep,
                memory=memory,
                reads_logits=runs.reads_logits,
                clean=clean,
            )

    @functools.cached_property
    def clean_values(self) -> Values:
        """Read after `under`, it costs no run of its own."""
        found: Values = {}
        if self._pass is not None:
            logits = self._pass.clean_logits
            found |= self.runs.values(self.prompt, [], logits, logits)
        if self.answers is not None:
            for number in range(len(self.answers)):
                if number not in self._clean_log_probs:
                    self._keep_clean(number, self._answer_pass(number, memory=None, clean=True))
            by_pass = [self._clean_log_probs[number] for number in range(len(self.answers))]
            found |= self.runs.values_of_answers(self.prompt, self.answers, by_pass)
        return {name: found[name] for name in self.runs.metrics}

    def under(self, interventions: Sequence[Intervention]) -> Iterator[Outcome]:
        """Each intervention alone, as they are done: the order is the plan's."""
        of_answers = self._under_answers(interventions)
        if self._pass is None:
            for index, parts in enumerate(of_answers):
                yield self._outcome(index, {}, parts)
            return
        clean_logits = self._pass.clean_logits
        for outcome in self._pass.under(
            interventions,
            lambda hooks, logits: self.runs.values(self.prompt, hooks, logits, clean_logits),
        ):
            parts = of_answers[outcome.index] if of_answers else []
            yield self._outcome(outcome.index, outcome.measured, parts, outcome)

    def _under_answers(self, interventions: Sequence[Intervention]) -> list[list[PassOutcome[list[Tensor]]]]:
        """Of each intervention what it did in every pass over an answer; the passes come one after the other."""
        found: list[list[PassOutcome[list[Tensor]]]] = [[] for _ in interventions]
        for number in range(0 if self.answers is None else len(self.answers)):
            own = self._answer_pass(number, memory=self.memory, clean=self._clean)
            self._keep_clean(number, own)

            def read(hooks: Sequence[Hook], logits: Tensor | None, number: int = number) -> list[Tensor]:
                assert self.answers is not None and logits is not None
                return self.answers.read(number, logits)

            for outcome in own.under(interventions, read):
                found[outcome.index].append(outcome)
        return found

    def _answer_pass(self, number: int, *, memory: float | None, clean: bool) -> PromptPass:
        assert self.answers is not None
        ids = self.answers.rows(number)
        longer = self.prompt.continued(ids)
        encoded = longer if self.encoded is self.prompt else self.encoded.continued(ids)
        keep = self.answers.logits_to_keep(number)
        return PromptPass(self.model, longer, encoded, keep, memory=memory, clean=clean)

    def _keep_clean(self, number: int, own: PromptPass) -> None:
        if own.clean_logits is not None and self.answers is not None:
            self._clean_log_probs[number] = self.answers.read(number, own.clean_logits)

    def _outcome(
        self,
        index: int,
        values: Values,
        of_answers: Sequence[PassOutcome[list[Tensor]]],
        of_prompt: PassOutcome[Values] | None = None,
    ) -> Outcome:
        if self.answers is not None:
            by_pass = [outcome.measured for outcome in of_answers]
            values = values | self.runs.values_of_answers(self.prompt, self.answers, by_pass)
        passes: list[PassOutcome[Any]] = [*([] if of_prompt is None else [of_prompt]), *of_answers]
        moved = [outcome.has_moved for outcome in passes if outcome.has_moved is not None]
        how = passes[0].how | {
            "fired": sum(outcome.how["fired"] for outcome in passes),
            "size": max(outcome.how["size"] for outcome in passes),
        }
        return Outcome(
            index,
            {name: values[name] for name in self.runs.metrics},
            any(moved) if moved else None,
            [outcome.hooks for outcome in passes],
            how,
        )


def warn_of_nothing(message: str) -> None:
    """NoChangeWarning, as from the line that calls `effect` or `sweep`."""
    # Above this function: theirs, torch.no_grad's around it, and that line.
    warnings.warn(message, NoChangeWarning, stacklevel=4)


def named_metrics(metric: Metric | Metrics) -> dict[str, Metric]:
    """The metrics by name; raises InvalidTypeError for what is none, with the nearest metric where a name was given."""
    if isinstance(metric, Mapping):
        metrics = {
            instance_of("the name of a metric", name, str, "a text"): metric_of(f"metric[{name!r}]", own)
            for name, own in metric.items()
        }
    else:
        if callable(metric) or isinstance(metric, str) or metric is None:
            functions = [metric_of("metric", metric)]
        else:
            given = listed("metric", metric, "a metric, a list of metrics or {name: metric}")
            functions = [metric_of(f"metric[{at}]", own) for at, own in enumerate(given)]
        metrics = {metric_name(function): function for function in functions}
        if len(metrics) < len(functions):
            raise InvalidValueError("two of the metrics have the same name; pass {name: metric}")
    if not metrics:
        raise InvalidValueError("no metric given: expected a metric, a list of metrics or {name: metric}")
    return metrics
