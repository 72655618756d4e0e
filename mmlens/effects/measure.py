"""What an intervention does to a metric: per example, against the clean run, with intervals.

`effect` runs the prompts clean and under the intervention in whole runs, hands each metric what it reads
(mmlens.metrics.outcomes: logits, the clean run's logits too, or generated answers), and watches every hook: how often
it fired, and how much it changed (`Effect.report`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.arguments import BATCH_SIZE, instance_of, listed, number, shown, whole_numbers
from mmlens.effects.runner import (
    MetricRuns,
    Metrics,
    PromptRuns,
    Values,
    warn_of_nothing,
)
from mmlens.effects.watching import HookTotals, hook_report
from mmlens.errors import InvalidTypeError, InvalidValueError, OutOfRangeError
from mmlens.interventions.edits import intervention_of
from mmlens.metrics.agreement import warn_of_disagreement
from mmlens.metrics.answers import generated_accuracy
from mmlens.metrics.outcomes import Metric, accuracy
from mmlens.model.batches import Batches, Prompts
from mmlens.model.fingerprints import same_weights, weights_fingerprints
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import Intervention
from mmlens.statistics import Interval, mean_interval, paired_difference_interval, ratio_interval


@dataclass(frozen=True, eq=False)
class Recovered:
    """How much of the gap between corrupted and clean prompts an intervention closes; see `Effect.recovered`.

    `gain` is what the intervention adds to the metric of each corrupted prompt, `gap` what its clean prompt has more;
    `fraction` is the ratio of their means. `per_example` is NaN where the example has no gap.
    """

    fraction: float
    per_example: Float[Tensor, " example"]
    gain: Float[Tensor, " example"]
    gap: Float[Tensor, " example"]
    level: float = 0.95

    def __repr__(self) -> str:
        return f"Recovered({self.fraction:.4g} of {float(self.gap.mean()):.4g}, {len(self.gap)} examples)"

    @property
    def interval(self) -> Interval:
        """Bootstrap interval of `fraction`, examples drawn with both numbers (`statistics.ratio_interval`).

        ValueError for a single example.
        """
        return ratio_interval(self.gain, self.gap, level=self.level)


@dataclass(frozen=True, eq=False)
class Effect:
    """A metric's value for every example under an intervention (`values`) and without it (`clean`).

    Intervals are Wilson's (the difference: Newcombe's paired) where every value is 0 or 1 and bootstrap
    intervals (BCa) of the examples otherwise; see mmlens.statistics. `report` says what the intervention did, one
    row per hook: `hook` (the hook point), `fired` (calls, over all prompts and runs) and `size` (the largest absolute
    change of one element of the activation). It is empty without an intervention.
    """

    values: Float[Tensor, " example"]
    clean: Float[Tensor, " example"]
    metric: str = "metric"
    level: float = 0.95
    report: pd.DataFrame = field(default_factory=lambda: hook_report([]))
    examples: tuple[str, ...] = ()
    """A fingerprint of each example (`Prompt.fingerprints`); none where that is not known."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of the model's weights; none where they are not known."""

    def __post_init__(self) -> None:
        instance_of("metric", self.metric, str, "the name of a metric")
        for name, values in (("values", self.values), ("clean", self.clean)):
            instance_of(name, values, Tensor, "a tensor with one number for each example")
        number("level", self.level, above=0, below=1)
        if self.values.shape != self.clean.shape or self.values.ndim != 1 or not len(self.values):
            raise InvalidValueError(
                f"{self.metric}: expected one value per example under the intervention and one without, "
                f"got {list(self.values.shape)} and {list(self.clean.shape)}"
            )

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return f"Effect({self.metric}: {self.mean:.4g}, clean {self.clean_mean:.4g}, {len(self)} examples)"

    @property
    def mean(self) -> float:
        """Mean over examples under the intervention."""
        return float(self.values.double().mean())

    @property
    def clean_mean(self) -> float:
        return float(self.clean.double().mean())

    @property
    def difference(self) -> float:
        """Mean of (intervention - clean) over examples."""
        return float((self.values.double() - self.clean.double()).mean())

    @property
    def interval(self) -> Interval:
        """Interval of `mean`."""
        return mean_interval(self.values, level=self.level)

    @property
    def clean_interval(self) -> Interval:
        return mean_interval(self.clean, level=self.level)

    @property
    def difference_interval(self) -> Interval:
        """Interval of `difference`, paired by example."""
        return paired_difference_interval(self.values, self.clean, level=self.level)

    def select(self, examples: Sequence[int] | Tensor) -> Effect:
        """The same for some of the examples (indices, or a boolean mask)."""
        chosen = _chosen_examples(examples, len(self))
        rows = torch.arange(len(self))[chosen].reshape(-1).tolist()
        own = tuple(self.examples[row] for row in rows) if self.examples else ()
        return Effect(
            self.values[chosen],
            self.clean[chosen],
            self.metric,
            self.level,
            self.report,
            own,
            self.weights,
        )

    def recovered(self, target: Effect | Float[Tensor, " example"]) -> Recovered:
        """For denoising: the share of the gap that the intervention closes, 0 for none and 1 for all of it.

        This effect is of corrupted prompts (`clean` is the corrupted run without the intervention). `target` holds
        the metric on the clean prompts, example by example: an Effect, of which the run without intervention
        (`clean`) is taken, or a tensor. For noising - an effect of clean prompts, corrupted ones as target - the same
        number is the share of the damage that the intervention does.

        fraction = (mean(values) - mean(clean)) / (mean(target) - mean(clean)), and per example the same without
        means; NaN there where the gap is below 1e-5 of the two numbers' size, which is rounding.

        Raises ValueError for a target of another metric or number of examples, numbers that are not finite, and where
        the means of target and corrupted prompts coincide (to 1e-5), so that there is nothing to recover.

        >>> patched = Effect(torch.tensor([3.0, 1.0, 2.5]), clean=torch.tensor([1.0, 0.0, 2.0]))
        >>> recovered = patched.recovered(torch.tensor([5.0, 4.0, 3.0]))
        >>> recovered, recovered.per_example.tolist()
        (Recovered(0.3889 of 3, 3 examples), [0.5, 0.25, 0.5])
        """
        goal = target
        if isinstance(target, Effect):
            if target.metric != self.metric:
                raise InvalidValueError(
                    f"the target is of metric {target.metric}, this effect of {self.metric}"
                )
            goal = target.clean
        if not isinstance(goal, Tensor) or goal.shape != self.values.shape:
            given = list(goal.shape) if isinstance(goal, Tensor) else type(goal).__name__
            raise InvalidValueError(
                f"the target is an Effect or a tensor of the same {len(self)} examples, clean; got {given}"
            )
        corrupted, aim = self.clean.double(), goal.detach().cpu().double()
        if not all(bool(part.isfinite().all()) for part in (self.values, corrupted, aim)):
            raise InvalidValueError(
                f"{self.metric}: a share of a gap needs finite numbers, and one of these is not"
            )
        gain, gap = self.values.double() - corrupted, aim - corrupted
        if abs(float(gap.mean())) <= 1e-5 * max(abs(float(aim.mean())), abs(self.clean_mean)):
            raise InvalidValueError(
                f"{self.metric}: its mean is {float(aim.mean()):.6g} on the target prompts and {self.clean_mean:.6g} "
                "on the corrupted ones, so there is nothing to recover"
            )
        no_gap = gap.abs() <= 1e-5 * torch.maximum(aim.abs(), corrupted.abs())
        return Recovered(
            fraction=float(gain.mean() / gap.mean()),
            per_example=(gain / gap).masked_fill(no_gap, torch.nan).float(),
            gain=gain,
            gap=gap,
            level=self.level,
        )

    def table(self) -> pd.DataFrame:
        """One row per example: example, value, clean, difference."""
        frame = pd.DataFrame({"value": self.values.double().numpy(), "clean": self.clean.double().numpy()})
        frame.insert(0, "example", range(len(frame)))
        return frame.assign(difference=frame["value"] - frame["clean"])


def _chosen_examples(examples: object, n: int) -> Tensor:
    """Indices, each of one of the n examples, or a mask of them."""
    given: Any = examples
    if not isinstance(examples, (Tensor, np.ndarray)):
        given = listed("examples", examples, "a list of indices, or a boolean mask", least=1)
        if not all(isinstance(item, (bool, np.bool_)) for item in given):
            given = whole_numbers("examples", given)
    chosen = torch.as_tensor(given)
    if chosen.ndim != 1 or chosen.is_floating_point() or chosen.is_complex() or not len(chosen):
        raise InvalidTypeError(
            f"examples is {shown(examples)}; expected a list of indices, or a boolean mask"
        )
    if chosen.dtype == torch.bool:
        if len(chosen) != n or not bool(chosen.any()):
            raise InvalidValueError(
                f"examples is a mask of {len(chosen)}, {int(chosen.sum())} of them chosen; expected one of all {n} "
                "examples that chooses at least one"
            )
    elif int(chosen.min()) < -n or int(chosen.max()) >= n:
        raise OutOfRangeError(
            f"examples are {chosen.tolist()[:8]}; expected indices of the {n} examples, 0 to {n - 1}"
        )
    return chosen


@overload
def effect(
    model: HookedVLM,
    prompts: Prompts,
    intervention: Intervention | None,
    metric: Metric,
    *,
    clean: Effect | None = None,
    batch_size: int = BATCH_SIZE,
    level: float = 0.95,
    logits_to_keep: int = 1,
    progress: bool = False,
) -> Effect: ...


@overload
def effect(
    model: HookedVLM,
    prompts: Prompts,
    intervention: Intervention | None,
    metric: Metrics,
    *,
    clean: Mapping[str, Effect] | None = None,
    batch_size: int = BATCH_SIZE,
    level: float = 0.95,
    logits_to_keep: int = 1,
    progress: bool = False,
) -> dict[str, Effect]: ...


@torch.no_grad()
def effect(
    model: HookedVLM,
    prompts: Prompts,
    intervention: Intervention | None,
    metric: Metric | Metrics,
    *,
    clean: Effect | Mapping[str, Effect] | None = None,
    batch_size: int = BATCH_SIZE,
    level: float = 0.95,
    logits_to_keep: int = 1,
    progress: bool = False,
) -> Effect | dict[str, Effect]:
    """`metric` on every prompt under `intervention` and in the clean run, in the order given.

    `prompts` is a Prompt, a list of them (each one batch), or examples, which are made into prompts
    `batch_size` at a time. `intervention` None is the clean run alone. Several metrics - a list of
    functions, or {name: function} - share the runs and give {name: Effect}.

    Metrics that read answers generate them greedily (`HookedVLM.answer`), clean and under the same hooks, once for
    each number of new tokens; without a metric of logits nothing else is run.

    `clean`, an earlier result on the same prompts in the same order, saves running them clean again: its
    `clean` values are taken. Only metrics that read the clean run's logits still need that run. The model gives
    logits for the last `logits_to_keep` positions only, 0 for all of them.

    Warns where the intervention sets no hook, changed no activation (every size in `Effect.report` is 0), or changed
    no logit of any prompt (seen where clean logits are there to compare with). Raises HookNeverFiredError for a hook
    that never fired; ValueError for no prompts, a metric that does not give one finite-or-infinite number per example,
    or a `clean` of other metrics, other examples or another model; TypeError for prompts that are neither Prompt nor
    Example.
    """
    runs = MetricRuns(model, metric, logits_to_keep)
    batches = Batches(model, prompts, batch_size, progress=progress)
    level = number("level", level, above=0, below=1)
    if intervention is not None:
        intervention_of(intervention)
    earlier = None if clean is None else _earlier(clean, runs.metrics)
    under: list[Values] = []
    done = HookTotals()
    clean_values: list[Values] = []
    moved: list[bool] = []
    seen: list[str] = []
    weights = weights_fingerprints(model.hf_model)
    for _, prompt in batches:
        seen += prompt.fingerprints
        _check_earlier(earlier, seen, weights)
        own = PromptRuns(runs, prompt, clean=earlier is None or (runs.compares and intervention is not None))
        if earlier is None:
            clean_values.append(own.clean_values)
        for outcome in own.under([] if intervention is None else [intervention]):
            if outcome.has_moved is not None:
                moved.append(outcome.has_moved)
            under.append(outcome.values)
            for hooks in outcome.hooks:
                done.add(hooks)
    report = done.table()
    nothing = "" if intervention is None else _nothing_done(report, moved)
    if nothing:
        warn_of_nothing(f"the intervention {nothing}: its effect is that of the clean run")

    effects = {}
    for name in runs.metrics:
        without = earlier[name].clean if earlier else torch.cat([values[name] for values in clean_values])
        values = torch.cat([own[name] for own in under]) if under else without
        if len(values) != len(without):
            raise InvalidValueError(
                f"`clean` holds {len(without)} examples, these prompts {len(values)}: "
                "it must come from the same prompts"
            )
        effects[name] = Effect(values, without, name, level, report, tuple(seen), weights)
    _warn_of_disagreement(runs.metrics, effects)
    return effects[next(iter(effects))] if callable(metric) else effects


def _warn_of_disagreement(metrics: Mapping[str, Metric], effects: Mapping[str, Effect]) -> None:
    """Where both were measured: whether the clean run's first tokens see what its generated answers say."""
    of = {metric: name for name, metric in metrics.items()}
    first, generated = of.get(accuracy), of.get(generated_accuracy)
    if first is not None and generated is not None:
        clean = effects[first].clean.tolist(), effects[generated].clean.tolist()
        # As from the line that calls `effect`.
        warn_of_disagreement(*clean, stacklevel=5)


def _nothing_done(report: pd.DataFrame, moved: Sequence[bool]) -> str:
    """What an intervention left undone on every prompt, in words; nothing where it changed something."""
    if report.empty:
        return "set no hook on any prompt"
    if not (report["size"] > 0).any():
        return "changed no activation of any prompt (the size of every edit is 0)"
    return "changed no logit of any prompt" if moved and not any(moved) else ""


def _earlier(clean: Effect | Mapping[str, Effect], metrics: Mapping[str, Metric]) -> dict[str, Effect]:
    given = {clean.metric: clean} if isinstance(clean, Effect) else clean
    if not isinstance(given, Mapping) or not all(isinstance(own, Effect) for own in given.values()):
        raise InvalidTypeError(
            f"clean is {shown(clean)}; expected an earlier Effect on these prompts, or {{name: Effect}}"
        )
    missing = [name for name in metrics if name not in given]
    if missing:
        raise InvalidValueError(f"`clean` holds no values of {missing}, only of {list(given)}")
    return {name: given[name] for name in metrics}


def _check_earlier(
    earlier: Mapping[str, Effect] | None, seen: Sequence[str], weights: Mapping[str, str]
) -> None:
    """Raise ValueError where an earlier clean run was of other examples than the first ones, or of another model."""
    for name, own in (earlier or {}).items():
        if own.weights and not same_weights(own.weights, weights):
            raise InvalidValueError(f"`clean` ({name}) is of another model: its weights are not this one's")
        if own.examples and own.examples[: len(seen)] != tuple(seen) and len(seen) <= len(own.examples):
            other = next(i for i, each in enumerate(seen) if each != own.examples[i])
            raise InvalidValueError(
                f"`clean` ({name}) is of other prompts: example {other} has another text, image or answer there. It is "
                "an earlier result on the same prompts in the same order"
            )
