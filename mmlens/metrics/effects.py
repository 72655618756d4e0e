"""What an intervention does to a metric: per example, against the clean run, with intervals."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from mmlens.data.examples import Example
from mmlens.hooked_vlm import HookedVLM, Intervention
from mmlens.prompt import Prompt
from mmlens.statistics import Interval, mean_interval, paired_difference_interval

Metric = Callable[[Tensor, Prompt], Tensor]
Metrics = Mapping[str, Metric] | Sequence[Metric]


@dataclass(frozen=True, eq=False)
class Effect:
    """A metric's value for every example under an intervention (`values`) and without it (`clean`).

    Intervals are Wilson's (the difference: Newcombe's paired) where every value is 0 or 1 and bootstrap
    intervals (BCa) of the examples otherwise; see mmlens.statistics.
    """

    values: Float[Tensor, " example"]
    clean: Float[Tensor, " example"]
    metric: str = "metric"
    level: float = 0.95

    def __post_init__(self) -> None:
        if self.values.shape != self.clean.shape or self.values.ndim != 1 or not len(self.values):
            raise ValueError(
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
        chosen = torch.as_tensor(examples)
        return Effect(self.values[chosen], self.clean[chosen], self.metric, self.level)

    def table(self) -> pd.DataFrame:
        """One row per example: example, value, clean, difference."""
        frame = pd.DataFrame({"value": self.values.double().numpy(), "clean": self.clean.double().numpy()})
        frame.insert(0, "example", range(len(frame)))
        return frame.assign(difference=frame["value"] - frame["clean"])


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

    `clean`, an earlier result on the same prompts in the same order, saves running them clean again: its
    `clean` values are taken. The model gives logits for the last `logits_to_keep` positions only, 0 for
    all of them.

    Warns where the intervention sets no hook, or changed no logit of any prompt (with `clean` given, the
    second goes unseen). Raises ValueError for no prompts, a metric that does not give one finite-or-infinite
    number per example, or a `clean` of other metrics or another number of examples; TypeError for prompts
    that are neither Prompt nor Example.
    """
    metrics = _named(metric)
    earlier = None if clean is None else _earlier(clean, metrics)
    values: dict[str, list[Tensor]] = {name: [] for name in metrics}
    clean_values: dict[str, list[Tensor]] = {name: [] for name in metrics}
    any_hook = changed = False

    def measure(into: dict[str, list[Tensor]], logits: Tensor, prompt: Prompt) -> None:
        for name, function in metrics.items():
            into[name].append(_checked(name, function(logits, prompt), prompt))

    for prompt in _prompts(model, prompts, batch_size, progress):
        clean_logits = None
        if earlier is None:
            clean_logits = model.run_with_hooks(prompt, fwd_hooks=[], logits_to_keep=logits_to_keep)
            measure(clean_values, clean_logits, prompt)
        if intervention is None:
            continue
        hooks = list(intervention(model, prompt))
        any_hook = any_hook or bool(hooks)
        logits = model.run_with_hooks(prompt, fwd_hooks=hooks, logits_to_keep=logits_to_keep)
        measure(values, logits, prompt)
        changed = changed or clean_logits is None or not torch.equal(logits, clean_logits)
    if intervention is not None and not (any_hook and changed):
        what = "changed no logit of any prompt" if any_hook else "set no hook on any prompt"
        warnings.warn(f"the intervention {what}: its effect is that of the clean run", stacklevel=2)

    effects = {}
    for name in metrics:
        without = earlier[name].clean if earlier is not None else torch.cat(clean_values[name])
        under = without if intervention is None else torch.cat(values[name])
        if len(under) != len(without):
            raise ValueError(
                f"`clean` holds {len(without)} examples, these prompts {len(under)}: "
                "it must come from the same prompts"
            )
        effects[name] = Effect(under, without, name, level)
    return effects[next(iter(metrics))] if callable(metric) else effects


def _named(metric: Metric | Metrics) -> dict[str, Metric]:
    if isinstance(metric, Mapping):
        metrics = dict(metric)
    else:
        functions = [metric] if callable(metric) else list(metric)
        metrics = {getattr(function, "__name__", repr(function)): function for function in functions}
        if len(metrics) < len(functions):
            raise ValueError("two of the metrics have the same name; pass {name: metric}")
    if not metrics:
        raise ValueError("no metric given")
    return metrics


def _earlier(clean: Effect | Mapping[str, Effect], metrics: Mapping[str, Metric]) -> dict[str, Effect]:
    given = {clean.metric: clean} if isinstance(clean, Effect) else dict(clean)
    missing = [name for name in metrics if name not in given]
    if missing:
        raise ValueError(f"`clean` holds no values of {missing}, only of {list(given)}")
    return {name: given[name] for name in metrics}


def _checked(name: str, values: Tensor, prompt: Prompt) -> Float[Tensor, " example"]:
    if not isinstance(values, Tensor) or tuple(values.shape) != (len(prompt),):
        given = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"metric {name} gives one number per example, a tensor of shape [{len(prompt)}], not {given}"
        )
    values = values.detach().cpu().float()
    if bool(values.isnan().any()):
        raise ValueError(f"metric {name} is NaN for example {int(values.isnan().nonzero()[0])} of a batch")
    return values


def _prompts(
    model: HookedVLM, prompts: Prompt | Sequence[Prompt] | Sequence[Example], batch_size: int, progress: bool
) -> Iterator[Prompt]:
    items: list[Prompt | Example] = [prompts] if isinstance(prompts, Prompt) else list(prompts)
    if not items:
        raise ValueError("no prompts given")
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1, not {batch_size}")
    ready = [item for item in items if isinstance(item, Prompt)]
    examples = [item for item in items if isinstance(item, Example)]
    if len(items) not in (len(ready), len(examples)):
        raise TypeError(
            "prompts are a Prompt, a list of Prompt or a list of Example, all of one type; "
            f"got {', '.join(sorted({type(item).__name__ for item in items}))}"
        )
    starts = range(0, len(examples), batch_size)
    made = (model.prompt_examples(examples[start : start + batch_size]) for start in starts)
    with tqdm(total=len(examples) or sum(map(len, ready)), unit="example", disable=not progress) as bar:
        for prompt in ready or made:
            yield prompt
            bar.update(len(prompt))
