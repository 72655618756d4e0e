"""What an intervention does to a metric: per example, against the clean run, with intervals.

`effect` runs the prompts clean and under the intervention, hands each metric what it reads (mmlens.metrics.outcomes:
logits, the clean run's logits too, or generated answers), and watches every hook: how often it fired, and how much it
changed (`Effect.report`).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from mmlens.arguments import flag, instance_of, listed, number, shown, whole_number, whole_numbers
from mmlens.data.examples import Example
from mmlens.errors import InvalidTypeError, InvalidValueError, OutOfRangeError
from mmlens.interventions.edits import Edit, hooks_of, intervention_of
from mmlens.metrics.outcomes import (
    DEFAULT_MAX_NEW_TOKENS,
    Metric,
    evaluate,
    metric_name,
    metric_of,
    what_reads,
)
from mmlens.model.evaluation import check_same_twice
from mmlens.model.fingerprints import same_weights, weights_fingerprints
from mmlens.model.hooked_vlm import Hook, HookedVLM, HookName, Intervention, NoChangeWarning, model_of
from mmlens.model.prompt import Prompt
from mmlens.statistics import Interval, mean_interval, paired_difference_interval, ratio_interval

Metrics = Mapping[str, Metric] | Sequence[Metric]


# ---------------------------------------------------------------------- what hooks did


@dataclass(eq=False)
class WatchedHook:
    """A hook and what it did: `fired` counts its calls, `size` is the largest absolute change of one element.

    `hook` is what to set in its place. Masking a score (to -inf) has size inf.
    """

    name: str
    hook: Hook
    _fired: int = 0
    _sizes: list[Tensor] = field(default_factory=list)
    _edit: Edit | None = None

    @property
    def fired(self) -> int:
        return self._fired if self._edit is None else self._edit.fired

    @property
    def size(self) -> float:
        if self._edit is not None:
            return self._edit.size
        return max((float(size) for size in self._sizes), default=0.0)


def watched(hooks: Sequence[Hook]) -> list[WatchedHook]:
    """Each hook with a count of its calls and the size of its changes; set `[each.hook for each in watched(hooks)]`.

    An `Edit` that has not fired yet counts for itself. Any other function is wrapped: what it returns, or the tensor
    that it edited in place, is compared with a copy taken before. A hook set by a filter goes by the filter's name.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> hooks = watched([("hook_embed", lambda x, hook: x + 2)])
    >>> _ = model.run_with_hooks(model.prompt("What colour is K"), fwd_hooks=[each.hook for each in hooks])
    >>> hooks[0].name, hooks[0].fired, round(hooks[0].size, 3)
    ('hook_embed', 1, 2.0)
    """
    return [_watch(name, function) for name, function in hooks]


def _watch(point: HookName, function: Callable[..., Any]) -> WatchedHook:
    name = point if isinstance(point, str) else getattr(point, "__name__", repr(point))
    # One that has fired before would report that too.
    if isinstance(function, Edit) and not function.fired:
        return WatchedHook(name, (point, function), _edit=function)
    this = WatchedHook(name, (point, function))

    def measured(tensor: Tensor, **kwargs: Any) -> Any:
        before = tensor.detach().clone()
        result = function(tensor, **kwargs)
        after = result if isinstance(result, Tensor) else tensor
        if after.shape != before.shape:
            raise InvalidValueError(
                f"the hook on {name} gave a tensor {list(after.shape)} for an activation {list(before.shape)}"
            )
        this._fired += 1
        if before.numel():
            this._sizes.append(_largest_change(before, after.detach()))
        return result

    this.hook = (point, measured)
    return this


def _largest_change(before: Tensor, after: Tensor) -> Float[Tensor, ""]:
    """Largest |after - before|: 0 where both are one infinity or both NaN, infinite where one of them is NaN."""
    dtype = torch.promote_types(before.dtype, torch.float32)
    before, after = before.to(dtype), after.to(device=before.device, dtype=dtype)
    alike = (after == before) | (after.isnan() & before.isnan())
    change = (after - before).abs().masked_fill(alike, 0.0)
    return change.nan_to_num(nan=torch.inf, posinf=torch.inf).max()


def hook_report(of_prompts: Iterable[Sequence[tuple[str, int, float]]]) -> pd.DataFrame:
    """One row per hook - hook, fired, size - from the (name, fired, size) of every prompt's hooks.

    `fired` is summed over prompts, `size` is the largest. The second hook that a prompt has on one point is the same
    row as the second that another prompt has there.

    >>> hook_report([[("hook_embed", 1, 0.5)], [("hook_embed", 1, 2.0)]]).to_dict("records")
    [{'hook': 'hook_embed', 'fired': 2, 'size': 2.0}]
    """
    totals: dict[tuple[str, int], tuple[int, float]] = {}
    for hooks in of_prompts:
        seen: Counter[str] = Counter()
        for name, fired, size in hooks:
            seen[name] += 1
            before, largest = totals.get((name, seen[name]), (0, 0.0))
            totals[name, seen[name]] = before + fired, max(largest, size)
    rows = [(name, fired, size) for (name, _), (fired, size) in totals.items()]
    return pd.DataFrame(rows, columns=["hook", "fired", "size"])


def _no_report() -> pd.DataFrame:
    return hook_report([])


# ---------------------------------------------------------------------- the effect


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
    report: pd.DataFrame = field(default_factory=_no_report)
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
    prompts: Prompt | Sequence[Prompt] | Sequence[Example],
    intervention: Intervention | None,
    metric: Metric,
    *,
    clean: Effect | None = None,
    batch_size: int = 16,
    level: float = 0.95,
    logits_to_keep: int = 1,
    progress: bool = False,
) -> Effect: ...


@overload
def effect(
    model: HookedVLM,
    prompts: Prompt | Sequence[Prompt] | Sequence[Example],
    intervention: Intervention | None,
    metric: Metrics,
    *,
    clean: Mapping[str, Effect] | None = None,
    batch_size: int = 16,
    level: float = 0.95,
    logits_to_keep: int = 1,
    progress: bool = False,
) -> dict[str, Effect]: ...


@torch.no_grad()
def effect(
    model: HookedVLM,
    prompts: Prompt | Sequence[Prompt] | Sequence[Example],
    intervention: Intervention | None,
    metric: Metric | Metrics,
    *,
    clean: Effect | Mapping[str, Effect] | None = None,
    batch_size: int = 16,
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
    model_of(model)
    items = checked_run(prompts, batch_size, logits_to_keep, progress)
    level = number("level", level, above=0, below=1)
    if intervention is not None:
        intervention_of(intervention)
    metrics = named_metrics(metric)
    earlier = None if clean is None else _earlier(clean, metrics)
    runs = MetricRuns(model, metrics, logits_to_keep)
    values: dict[str, list[Tensor]] = {name: [] for name in metrics}
    clean_values: dict[str, list[Tensor]] = {name: [] for name in metrics}
    did: list[list[tuple[str, int, float]]] = []
    moved: list[bool] = []
    seen: list[str] = []
    weights = weights_fingerprints(model.hf_model)
    for prompt in prompt_batches(model, items, batch_size, progress):
        seen += prompt.fingerprints
        _check_earlier(earlier, seen, weights)
        clean_logits = None
        if earlier is None or (runs.compares and intervention is not None):
            clean_logits = runs.logits(prompt, [])
        if earlier is None:
            answers = runs.answers(prompt, [])
            runs.measure(clean_values, prompt, clean_logits, clean_logits, answers)
        if intervention is None:
            continue
        watching = watched(hooks_of(intervention, model, prompt))
        hooks = [each.hook for each in watching]
        logits = runs.logits(prompt, hooks)
        runs.measure(values, prompt, logits, clean_logits, runs.answers(prompt, hooks))
        did.append([(each.name, each.fired, each.size) for each in watching])
        if logits is not None and clean_logits is not None:
            moved.append(not torch.equal(logits, clean_logits))
    report = hook_report(did)
    if intervention is not None:
        _warn_of_nothing(report, moved)

    effects = {}
    for name in metrics:
        without = earlier[name].clean if earlier is not None else torch.cat(clean_values[name])
        under = without if intervention is None else torch.cat(values[name])
        if len(under) != len(without):
            raise InvalidValueError(
                f"`clean` holds {len(without)} examples, these prompts {len(under)}: "
                "it must come from the same prompts"
            )
        effects[name] = Effect(under, without, name, level, report, tuple(seen), weights)
    return effects[next(iter(metrics))] if callable(metric) else effects


@contextmanager
def _unwarned() -> Iterator[None]:
    """What changes nothing on one prompt may change something on another: that is judged at the end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoChangeWarning)
        yield


class MetricRuns:
    """The runs that a set of metrics needs of each prompt, and what the metrics make of them."""

    def __init__(self, model: HookedVLM, metrics: Mapping[str, Metric], logits_to_keep: int) -> None:
        check_same_twice(model.hf_model)
        self.model, self.metrics, self.logits_to_keep = model, metrics, logits_to_keep
        read = {name: what_reads(function) for name, function in metrics.items()}
        self.compares = "clean logits" in read.values()
        self.reads_logits = self.compares or "logits" in read.values()
        self._n_tokens = {
            name: getattr(metrics[name], "max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
            for name, what in read.items()
            if what == "answers"
        }

    def logits(self, prompt: Prompt, hooks: list[Hook]) -> Tensor | None:
        if not self.reads_logits:
            return None
        with _unwarned():
            return self.model.run_with_hooks(prompt, fwd_hooks=hooks, logits_to_keep=self.logits_to_keep)

    def answers(self, prompt: Prompt, hooks: list[Hook]) -> dict[int, list[str]]:
        """{number of new tokens: the generated texts}"""
        texts = {}
        for n_tokens in sorted(set(self._n_tokens.values())):
            with _unwarned(), self.model.hooks(fwd_hooks=hooks):
                texts[n_tokens] = self.model.answer(prompt, max_new_tokens=n_tokens, do_sample=False)
        return texts

    def measure(
        self,
        into: dict[str, list[Tensor]],
        prompt: Prompt,
        logits: Tensor | None,
        clean_logits: Tensor | None,
        answers: Mapping[int, Sequence[str]],
    ) -> None:
        for name, function in self.metrics.items():
            texts = answers.get(self._n_tokens.get(name, 0))
            what = what_reads(function)
            # A metric may work in place, and other metrics and later runs read the same logits: each gets a copy.
            own = None if logits is None or what == "answers" else logits.clone()
            clean = None if clean_logits is None or what != "clean logits" else clean_logits.clone()
            value = evaluate(function, name, prompt, logits=own, clean_logits=clean, answers=texts)
            into[name].append(value.detach())


def _warn_of_nothing(report: pd.DataFrame, moved: Sequence[bool]) -> None:
    if report.empty:
        what = "set no hook on any prompt"
    elif not (report["size"] > 0).any():
        what = "changed no activation of any prompt (the size of every edit is 0)"
    elif moved and not any(moved):
        what = "changed no logit of any prompt"
    else:
        return
    message = f"the intervention {what}: its effect is that of the clean run"
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


def checked_run(
    prompts: Prompt | Sequence[Prompt] | Sequence[Example],
    batch_size: int,
    logits_to_keep: int,
    progress: bool,
) -> list[Prompt | Example]:
    """The prompts, or the examples, as a list, once what all runs of metrics take has been checked."""
    whole_number("batch_size", batch_size, least=1)
    whole_number("logits_to_keep", logits_to_keep, least=0)
    flag("progress", progress)
    return prompts_or_examples(prompts)


def prompts_or_examples(prompts: Prompt | Sequence[Prompt] | Sequence[Example]) -> list[Prompt | Example]:
    """The prompts, or the examples, as a list; raises InvalidTypeError for anything else, or both together."""
    expected = "a Prompt, a list of Prompt or a list of Example, all of one type"
    if isinstance(prompts, Prompt):
        return [prompts]
    if isinstance(prompts, Example):
        raise InvalidTypeError(
            f"prompts is {shown(prompts)}; expected {expected}: one example is written [example]"
        )
    items = listed("prompts", prompts, expected, least=1)
    if not any(all(isinstance(item, kind) for item in items) for kind in (Prompt, Example)):
        raise InvalidTypeError(
            f"prompts are {expected}; got {', '.join(sorted({type(item).__name__ for item in items}))}"
        )
    return items


def prompt_batches(
    model: HookedVLM, items: Sequence[Prompt | Example], batch_size: int, progress: bool
) -> Iterator[Prompt]:
    """The prompts, or those of the examples, `batch_size` at a time; items as `checked_run` gives them."""
    ready = [item for item in items if isinstance(item, Prompt)]
    examples = [item for item in items if isinstance(item, Example)]
    starts = range(0, len(examples), batch_size)
    made = (model.prompt_examples(examples[start : start + batch_size]) for start in starts)
    with tqdm(total=len(examples) or sum(map(len, ready)), unit="example", disable=not progress) as bar:
        for prompt in ready or made:
            yield prompt
            bar.update(len(prompt))
