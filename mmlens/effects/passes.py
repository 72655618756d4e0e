"""The runs over one prompt: clean, and under interventions, in whole passes or in partial ones.

A `PromptPass` runs one prompt as it stands. `answer_passes` are those over the continuations of a prompt that metrics
of whole answers read: the first of every example in one pass, the second of every example in the next, and so on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.effects.partial import CleanRun, is_out_of_memory
from mmlens.effects.plan import Group, Start, planned
from mmlens.effects.watching import HookDone, watched
from mmlens.interventions.edits import hooks_of
from mmlens.metrics.outcomes import Metric, continuations_of
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import Hook, Intervention, NoChangeWarning, check_fired
from mmlens.model.prompt import Prompt

T = TypeVar("T")


@dataclass(frozen=True)
class PassOutcome(Generic[T]):
    """An intervention in a pass: what was measured, whether the logits moved, what each hook did, how it was run."""

    index: int
    """Which of the interventions."""
    measured: T
    has_moved: bool | None
    """None where there are no logits to compare."""
    hooks: list[HookDone]
    how: dict[str, Any]


class PromptPass:
    """One prompt, clean and `under` interventions.

    `encoded` is the prompt with its images encoded, where runs may share that, or the prompt itself. `memory` None:
    every run is a whole one. Else interventions run from where they start, those that start together as one batch of at
    most so many GiB. `reads_logits`: whether anything reads them; `clean`: whether the clean run's are needed.
    """

    def __init__(
        self,
        model: HookedVLM,
        prompt: Prompt,
        encoded: Prompt,
        logits_to_keep: int,
        *,
        memory: float | None = None,
        reads_logits: bool = True,
        clean: bool = True,
    ) -> None:
        self.model, self.prompt, self.encoded, self.memory = model, prompt, encoded, memory
        self.logits_to_keep, self.reads_logits = logits_to_keep, reads_logits
        self.clean: CleanRun | None = None
        self.why_whole = "every run is a whole one"
        if memory is not None:
            self.clean, self.why_whole = self._clean_run()
        self.clean_logits: Tensor | None = None
        if self.clean is not None:
            self.clean_logits = self.clean.logits
        elif clean:
            self.clean_logits = self.logits(self.encoded, [])

    def logits(self, prompt: Prompt, hooks: Sequence[Hook]) -> Float[Tensor, "batch kept vocab"] | None:
        """In a whole run under the hooks; None where nothing reads them."""
        if not self.reads_logits:
            return None
        with unwarned():
            logits = self.model.run_with_hooks(
                prompt, fwd_hooks=list(hooks), logits_to_keep=self.logits_to_keep
            )
        # Some families give the logits of all positions, whatever is asked for.
        return logits[:, -self.logits_to_keep :]

    def _clean_run(self) -> tuple[CleanRun | None, str]:
        """What partial runs start from; or why there are none."""
        live = [name for name, point in self.model.hook_dict.items() if point.is_live]
        if live:
            # They would see cut and stacked activations, and act on the recorded ones a second time.
            return None, f"hooks are set on the model already, at {live[0]}"
        if not self.reads_logits:
            return None, "the metrics read generated answers, for which every run is whole"
        try:
            return CleanRun.of(self.model, self.encoded, self.logits_to_keep), ""
        except ValueError as error:
            return None, str(error)

    def under(
        self,
        interventions: Sequence[Intervention],
        measure: Callable[[Sequence[Hook], Tensor | None], T],
    ) -> Iterator[PassOutcome[T]]:
        """Each intervention alone, as they are done: the order is the plan's. `measure(hooks, logits)` may run more
        under the same hooks."""
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
                measured = measure(hooks[member], own)
                check_fired(sorted({each.name for each in watching[member] if not each.fired}))
                done = [each.done for each in watching[member]]
                has_moved = None
                if own is not None and self.clean_logits is not None:
                    has_moved = not torch.equal(own, self.clean_logits)
                yield PassOutcome(member, measured, has_moved, done, self._how(group, starts[member], done))

    def _logits(self, group: Group, hooks: Sequence[Sequence[Hook]]) -> Sequence[Tensor | None] | Tensor:
        """The logits under each of a group's interventions; None where nothing reads them."""
        start = group.start
        if start.whole:
            return [self.logits(self.prompt if start.needs_images else self.encoded, hooks[0])]
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


@contextmanager
def unwarned() -> Iterator[None]:
    """What changes nothing on one prompt may change something on another: that is judged at the end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoChangeWarning)
        yield


# ---------------------------------------------------------------------- passes over answers


LogProbs = list[list[Float[Tensor, " token"]]]
"""Of every example, of every continuation, the log probabilities of its tokens."""


class AnswerPasses:
    """What metrics of whole answers read of one prompt: which continuations, and in which passes.

    Continuations that several metrics read, or several examples in other places, are run once.
    """

    def __init__(self, model: HookedVLM, prompt: Prompt, metrics: Mapping[str, Metric]) -> None:
        self.wanted = {name: continuations_of(metric, model, prompt) for name, metric in metrics.items()}
        self.ids: list[list[tuple[int, ...]]] = [
            list(dict.fromkeys(tuple(ids) for each in self.wanted.values() for ids in each[row]))
            for row in range(len(prompt))
        ]
        """Of each example the distinct continuations, by pass."""
        self.starts = prompt.start_tokens or [[]] * len(prompt)

    def __len__(self) -> int:
        return max(map(len, self.ids))

    def rows(self, number: int) -> list[list[int]]:
        """What follows each row in a pass; a row that has no more continuations runs its first again."""
        return [list(own[number] if number < len(own) else own[0]) for own in self.ids]

    def logits_to_keep(self, number: int) -> int:
        """The answers' positions and the one before."""
        return 1 + max(map(len, self.rows(number)))

    def read(self, number: int, logits: Float[Tensor, "batch kept vocab"]) -> list[Float[Tensor, " token"]]:
        """The log probabilities of each row's continuation in a pass."""
        return token_log_probs(logits, self.rows(number))

    def of_metric(self, name: str, by_pass: Sequence[Sequence[Tensor]]) -> LogProbs:
        """What one metric reads, of what the passes gave: tokens of a tag before the answer are given, not measured."""
        return [
            [
                by_pass[self.ids[row].index(tuple(ids))][row][_n_common(ids, self.starts[row]) :].clone()
                for ids in each
            ]
            for row, each in enumerate(self.wanted[name])
        ]


def _n_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next(
        (at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
        min(len(one), len(other)),
    )


def token_log_probs(
    logits: Float[Tensor, "batch kept vocab"], rows: Sequence[Sequence[int]]
) -> list[Float[Tensor, " token"]]:
    """The log probability of each row's tokens, in nats, where they stand at the end of a run.

    >>> logits = torch.log(torch.tensor([[[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]]]))
    >>> [round(float(x.exp()), 2) for x in token_log_probs(logits, [[1, 0]])[0]]
    [0.1, 0.2]
    """
    found = []
    for own, ids in zip(logits, rows, strict=True):
        # Each token is predicted at the position before it.
        before = own[-len(ids) - 1 : -1].float().log_softmax(-1)
        found.append(before.gather(-1, torch.tensor([*ids], device=own.device)[:, None]).squeeze(-1))
    return found
