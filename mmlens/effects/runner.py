"""The runner: metrics on one prompt, in the clean run and under interventions, each in a whole run or a partial one.

`effect` and `sweep` hand it prompts and interventions. `plan` says from where each intervention is run and beside
which others, `partial` runs the ends of forward passes, and `mmlens.metrics` give the values.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mmlens.arguments import instance_of, listed, whole_number
from mmlens.effects.partial import CleanRun, is_out_of_memory
from mmlens.effects.plan import Group, Start, planned
from mmlens.effects.watching import HookDone, watched
from mmlens.errors import InvalidValueError
from mmlens.interventions.edits import hooks_of
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
from mmlens.model.hooks import Hook, Intervention, NoChangeWarning, check_fired
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
        self._n_tokens = {
            name: getattr(self.metrics[name], "max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
            for name, what in self.reads.items()
            if what == "answers"
        }
        check_same_twice(model.hf_model)

    def logits(self, prompt: Prompt, hooks: Sequence[Hook]) -> Float[Tensor, "batch kept vocab"] | None:
        """In a whole run under the hooks; None where no metric reads logits."""
        if not self.reads_logits:
            return None
        with _unwarned():
            logits = self.model.run_with_hooks(
                prompt, fwd_hooks=list(hooks), logits_to_keep=self.logits_to_keep
            )
        # Some families give the logits of all positions, whatever is asked for.
        return logits[:, -self.logits_to_keep :]

    def values(
        self, prompt: Prompt, hooks: Sequence[Hook], logits: Tensor | None, clean_logits: Tensor | None
    ) -> Values:
        """Every metric's values, from these logits and from answers generated under the hooks."""
        answers = {n_tokens: self._answers(prompt, hooks, n_tokens) for n_tokens in self._lengths}
        found = {}
        for name, function in self.metrics.items():
            what = self.reads[name]
            # A metric may work in place, and other metrics and later runs read the same logits: each gets a copy.
            own = None if logits is None or what == "answers" else logits.clone()
            clean = None if clean_logits is None or what != "clean logits" else clean_logits.clone()
            texts = answers.get(self._n_tokens.get(name, 0))
            value = evaluate(function, name, prompt, logits=own, clean_logits=clean, answers=texts)
            found[name] = value.detach()
        return found

    @property
    def _lengths(self) -> list[int]:
        return sorted(set(self._n_tokens.values()))

    def _answers(self, prompt: Prompt, hooks: Sequence[Hook], n_tokens: int) -> list[str]:
        with _unwarned(), self.model.hooks(fwd_hooks=list(hooks)):
            return self.model.answer(prompt, max_new_tokens=n_tokens, do_sample=False)


@dataclass(frozen=True)
class Outcome:
    """An intervention on one prompt: the metrics' values, what each hook did, and how it was run."""

    index: int
    """Which of the interventions."""
    values: Values
    logits: Float[Tensor, "batch kept vocab"] | None
    hooks: list[HookDone]
    how: dict[str, Any]


class PromptRuns:
    """Metrics on one prompt: `clean_values`, and `under` interventions.

    `memory` None: every run is a whole one. Else interventions run from where they start, those that start together as
    one batch of at most so many GiB. `clean`: whether the clean run's logits are needed.
    """

    def __init__(
        self, runs: MetricRuns, prompt: Prompt, *, memory: float | None = None, clean: bool = True
    ) -> None:
        self.runs, self.model, self.prompt, self.memory = runs, runs.model, prompt, memory
        self.encoded = prompt
        """The prompt with its images encoded, where runs may share that."""
        self.clean: CleanRun | None = None
        self.why_whole = "every run is a whole one"
        if memory is not None:
            self.encoded = self.model.encode_images(prompt)
            self.clean, self.why_whole = self._clean_run()
        self.clean_logits: Tensor | None = None
        if self.clean is not None:
            self.clean_logits = self.clean.logits
        elif clean:
            self.clean_logits = runs.logits(self.encoded, [])

    def _clean_run(self) -> tuple[CleanRun | None, str]:
        """What partial runs start from; or why there are none."""
        live = [name for name, point in self.model.hook_dict.items() if point.is_live]
        if live:
            # They would see cut and stacked activations, and act on the recorded ones a second time.
            return None, f"hooks are set on the model already, at {live[0]}"
        if not self.runs.reads_logits:
            return None, "the metrics read generated answers, for which every run is whole"
        try:
            return CleanRun.of(self.model, self.encoded, self.runs.logits_to_keep), ""
        except ValueError as error:
            return None, str(error)

    @functools.cached_property
    def clean_values(self) -> Values:
        return self.runs.values(self.prompt, [], self.clean_logits, self.clean_logits)

    def under(self, interventions: Sequence[Intervention]) -> Iterator[Outcome]:
        """Each intervention alone, as they are done: the order is the plan's."""
        watching = [watched(hooks_of(each, self.model, self.prompt)) for each in interventions]
        hooks = [[each.hook for each in own] for own in watching]
        starts, waiting = planned(self.model, self.clean, hooks, self.memory or 0, self.why_whole)
        while waiting:
            group = waiting.pop(0)
            try:
                logits = self._logits(group, [hooks[member] for member in group.members])
            except (MemoryError, RuntimeError) as error:
                if len(group.members) == 1 or not is_out_of_memory(error):
                    raise
                half = (len(group.members) + 1) // 2
                parts = group.members[:half], group.members[half:]
                waiting[:0] = [replace(group, members=part) for part in parts]
                continue
            for member, own in zip(group.members, logits, strict=True):
                values = self.runs.values(self.prompt, hooks[member], own, self.clean_logits)
                check_fired(sorted({each.name for each in watching[member] if not each.fired}))
                done = [each.done for each in watching[member]]
                yield Outcome(member, values, own, done, self._how(group, starts[member], done))

    def _logits(self, group: Group, hooks: Sequence[Sequence[Hook]]) -> Sequence[Tensor | None] | Tensor:
        """The logits under each of a group's interventions; None where no metric reads them."""
        start = group.start
        if start.whole:
            return [self.runs.logits(self.prompt if start.needs_images else self.encoded, hooks[0])]
        assert self.clean is not None
        return self.clean.partial(
            start.layer,
            start.first,
            hooks,
            attention_is_clean=start.attention_is_clean,
            may_trim=start.may_trim,
        )

    def _how(self, group: Group, own: Start, done: Sequence[HookDone]) -> dict[str, Any]:
        start = group.start
        once = self.encoded.image_features is not None and not start.needs_images
        images = "once" if once else "with every run"
        beside = f"it ran beside one that starts at position {start.first}" if start.first < own.first else ""
        return {
            "layer": start.layer,
            "position": start.first,
            "batch": len(group.members),
            "images": images if bool(self.prompt.token_map.is_image.any()) else "none",
            "why_not_more": start.whole or "; ".join(filter(None, [own.reason, beside])),
            "fired": sum(fired for _, fired, _ in done),
            "size": max((size for _, _, size in done), default=0.0),
        }


def warn_of_nothing(message: str) -> None:
    """NoChangeWarning, as from the line that calls `effect` or `sweep`."""
    # Above this function: theirs, torch.no_grad's around it, and that line.
    warnings.warn(message, NoChangeWarning, stacklevel=4)


@contextmanager
def _unwarned() -> Iterator[None]:
    """What changes nothing on one prompt may change something on another: that is judged at the end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoChangeWarning)
        yield


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
