"""`sweep`: many interventions on many prompts as one table, at the price of what differs between them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from mmlens.arguments import instance_of, number, shown
from mmlens.data.examples import Example
from mmlens.effects.measure import (
    Metric,
    MetricRuns,
    Metrics,
    WatchedHook,
    checked_run,
    named_metrics,
    prompt_batches,
    watched,
)
from mmlens.effects.partial import CleanRun, is_out_of_memory
from mmlens.effects.plan import Group, Start, groups_of, reuse_of, start_of
from mmlens.errors import InvalidTypeError, InvalidValueError
from mmlens.interventions.edits import hooks_of, intervention_of
from mmlens.model.hooked_vlm import (
    Hook,
    HookedVLM,
    HookNeverFiredError,
    Intervention,
    NoChangeWarning,
    model_of,
)
from mmlens.model.prompt import Prompt

_NUMBERS_AT_ONCE = 2**20
"""Of the stream, on a CPU: 2,048 positions of width 512."""


@torch.no_grad()
def sweep(
    model: HookedVLM,
    prompts: Prompt | Sequence[Prompt] | Sequence[Example],
    interventions: Mapping[Any, Intervention],
    metric: Metric | Metrics,
    *,
    batch_size: int = 16,
    memory: float = 1.0,
    logits_to_keep: int = 1,
    progress: bool = True,
) -> pd.DataFrame:
    """`metric` on every prompt under every intervention, each alone: what `effect` gives, one by one, but faster.

    One row per intervention, example and metric: intervention (its label), example, metric, value, clean.
    `table.attrs["reuse"]` says, for every intervention and prompt, from which layer and position it was run, in a
    batch of how many, and why not from later; `reuse_table` shows it.

    Every prompt is run once without an intervention. An intervention then runs from the first layer and the first
    position that it touches, on the clean run's residual stream, keys and values; interventions that start together
    run as one batch; images are encoded once. All this is taken only where a run without edits gives the clean
    logits (to 1e-5 in fp32; in half precision other kernels round otherwise). Hook functions that are not the
    library's edits may touch any position, so they reuse layers only.

    `prompts` and `batch_size` are as for `effect`; `memory` bounds, in GiB, what the stacked runs hold beside
    model and clean run (an estimate; out of memory halves the batch). `logits_to_keep` is the number of last
    positions whose logits the metric reads (0: all, which gives up the reuse of positions). Metrics that read
    generated answers run `generate` under one intervention after the other.

    Raises ValueError for no interventions, and HookNeverFiredError where one of an intervention's hooks never fired;
    warns (NoChangeWarning) of interventions that changed nothing on any prompt.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> examples = mmlens.scene_examples("objects", 4, seed=0)
    >>> heads = {head: mmlens.ablate([head], positions="last") for head in model.heads[:3]}
    >>> table = sweep(model, examples, heads, mmlens.answer_log_probability, progress=False)
    >>> list(table.columns), len(table)
    (['intervention', 'example', 'metric', 'value', 'clean'], 12)
    """
    model_of(model)
    items = checked_run(prompts, batch_size, logits_to_keep, progress)
    memory = number("memory", memory, above=0)
    _check_interventions(interventions)
    metrics = named_metrics(metric)
    collected = _Collected(list(interventions), list(metrics))
    with tqdm(
        total=len(interventions) * _n_batches(items, batch_size), disable=not progress, unit="run"
    ) as bar:
        for prompt in prompt_batches(model, items, batch_size, progress=False):
            own = _PromptSweep(model, prompt, MetricRuns(model, metrics, logits_to_keep), memory)
            hooks = [
                watched(hooks_of(intervention, model, prompt)) for intervention in interventions.values()
            ]
            for index, values, note in own.run(hooks):
                collected.add(index, values, own.clean_values, {**note, **_done(hooks[index])})
                bar.update()
            collected.next_prompt(len(prompt))
    collected.warn_of_nothing()
    return collected.table()


def reuse_table(table: pd.DataFrame) -> pd.DataFrame:
    """What each run of a sweep reused: intervention, example (the first of its batch), layer, position, batch,
    fired, size of the largest change, and why not more."""
    if "reuse" not in instance_of("table", table, pd.DataFrame, "a sweep's table").attrs:
        raise InvalidValueError(
            "this table is not a sweep's, or has lost its attrs on the way: no 'reuse' in table.attrs"
        )
    return pd.DataFrame(table.attrs["reuse"])


def _check_interventions(interventions: object) -> None:
    expected = "a dict {label: intervention}"
    if not isinstance(interventions, Mapping):
        hint = (
            ": dict(enumerate(interventions)) numbers them"
            if isinstance(interventions, (list, tuple))
            else ""
        )
        raise InvalidTypeError(f"interventions is {shown(interventions)}; expected {expected}{hint}")
    if not interventions:
        raise InvalidValueError(
            f"no interventions given: sweep needs at least one intervention, as {expected}"
        )
    for label, intervention in interventions.items():
        intervention_of(intervention, f"interventions[{label!r}]")


class _PromptSweep:
    """All interventions on one prompt."""

    def __init__(self, model: HookedVLM, prompt: Prompt, runs: MetricRuns, memory: float) -> None:
        self.model, self.prompt, self.runs, self.memory = model, prompt, runs, memory
        self.encoded = model.encode_images(prompt)
        self.stacks, self.edits_scores = True, False
        self.clean: CleanRun | None = None
        self.why_whole = self._why_whole()
        if not self.why_whole:
            try:
                self.clean = CleanRun.of(model, self.encoded, runs.logits_to_keep)
            except ValueError as error:
                self.why_whole = str(error)
        self.clean_logits = self._whole(self.encoded, []) if self.clean is None else self.clean.logits
        self.clean_values = self._values(self.clean_logits, [])

    def _why_whole(self) -> str:
        """Why all runs are whole ones, where that is known beforehand."""
        live = [name for name, point in self.model.hook_dict.items() if point.is_live]
        if live:
            # They would see cut and stacked activations, and act on the recorded ones a second time.
            return f"hooks are set on the model already, at {live[0]}"
        if not self.runs.reads_logits:
            return "the metrics read generated answers, for which every run is whole"
        return ""

    def run(
        self, hooks: Sequence[Sequence[WatchedHook]]
    ) -> Iterator[tuple[int, dict[str, Tensor], dict[str, Any]]]:
        """(number, {metric: values}, what was reused) of every intervention, as they are done."""
        functions = [[each.hook for each in own] for own in hooks]
        starts = self._starts(functions)
        waiting = groups_of(starts, self._most)
        while waiting:
            group = waiting.pop(0)
            try:
                logits = self._logits(group, [functions[member] for member in group.members])
            except (MemoryError, RuntimeError) as error:
                if len(group.members) == 1 or not is_out_of_memory(error):
                    raise
                half = (len(group.members) + 1) // 2
                waiting[:0] = [
                    replace(group, members=part) for part in (group.members[:half], group.members[half:])
                ]
                continue
            for member, own in zip(group.members, logits, strict=True):
                values = self._values(own, functions[member])
                silent = [each.name for each in hooks[member] if not each.fired]
                if silent:
                    raise HookNeverFiredError(
                        f"the model ran, but these hooks never fired: {', '.join(sorted(set(silent))[:5])}"
                    )
                yield member, values, self._note(group, starts[member])

    def _note(self, group: Group, own: Start) -> dict[str, Any]:
        start = group.start
        images = (
            "once" if self.encoded.image_features is not None and not start.needs_images else "with every run"
        )
        beside = f"it ran beside one that starts at position {start.first}" if start.first < own.first else ""
        return {
            "layer": start.layer,
            "position": start.first,
            "batch": len(group.members),
            "images": images if bool(self.prompt.token_map.is_image.any()) else "none",
            "why_not_more": start.whole or "; ".join(filter(None, [own.reason, beside])),
        }

    def _starts(self, functions: Sequence[Sequence[Hook]]) -> list[Start]:
        if self.clean is None:
            return [Start(whole=self.why_whole)] * len(functions)
        wanted = [start_of(self.model, self.clean, own) for own in functions]
        names = {name for own in functions for match, _ in own for name in self.model.hook_names(match)}
        self.edits_scores = any(name.endswith(("hook_attn_scores", "hook_pattern")) for name in names)
        try:
            reuse = reuse_of(self.clean, wanted)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return [Start(whole="there was no memory to try partial runs")] * len(functions)
        self.stacks = reuse.batch
        return [reuse.of(start) for start in wanted]

    def _logits(
        self, group: Group, hooks: Sequence[Sequence[Hook]]
    ) -> Sequence[Tensor | None] | Float[Tensor, "intervention batch kept vocab"]:
        """The logits under each of a group's interventions; None where no metric reads them."""
        start = group.start
        if start.whole:
            return [self._whole(self.prompt if start.needs_images else self.encoded, hooks[0])]
        assert self.clean is not None
        return self.clean.partial(
            start.layer,
            start.first,
            hooks,
            attention_is_clean=start.attention_is_clean,
            may_trim=start.may_trim,
        )

    def _whole(self, prompt: Prompt, hooks: Sequence[Hook]) -> Float[Tensor, "batch kept vocab"] | None:
        logits = self.runs.logits(prompt, list(hooks))
        return None if logits is None else logits[:, -self.runs.logits_to_keep :]

    def _values(self, logits: Tensor | None, hooks: list[Hook]) -> dict[str, Tensor]:
        values: dict[str, list[Tensor]] = {name: [] for name in self.runs.metrics}
        answers = self.runs.answers(self.prompt, hooks)
        self.runs.measure(values, self.prompt, logits, self.clean_logits, answers)
        return {name: own[0] for name, own in values.items()}

    def _most(self, first: int) -> int:
        """How many interventions from position `first` on fit into `memory`, by the sizes of what a layer holds."""
        if not self.stacks or self.clean is None:
            return 1
        cfg, (batch, length) = self.model.cfg, self.prompt.shape
        d_mlp = cfg.d_mlp or 4 * cfg.d_model
        n_kv_heads = cfg.n_key_value_heads or cfg.n_heads
        of_position = 8 * cfg.d_model + 3 * d_mlp
        of_key = 4 * n_kv_heads * cfg.d_head
        if self.edits_scores:
            of_key += 3 * cfg.n_heads * (length - first)
        numbers = (length - first) * of_position + length * of_key + 3 * self.clean.logits[0].numel()
        bytes_each = batch * numbers * self.clean.logits.element_size()
        most = int(self.memory * 2**30 / bytes_each)
        if self.model.device.type == "cpu":
            # A processor gains nothing from more at once than fills its caches.
            most = min(most, _NUMBERS_AT_ONCE // (batch * (length - first) * cfg.d_model))
        return max(1, most)


def _n_batches(items: Sequence[Prompt | Example], batch_size: int) -> int:
    return -(-len(items) // batch_size) if isinstance(items[0], Example) else len(items)


def _done(hooks: Sequence[WatchedHook]) -> dict[str, Any]:
    return {
        "fired": sum(each.fired for each in hooks),
        "size": max((each.size for each in hooks), default=0.0),
    }


class _Collected:
    """A sweep's numbers as they come in, in the order of interventions and examples in the end."""

    def __init__(self, labels: list[Any], metrics: list[str]) -> None:
        self.labels, self.metrics = labels, metrics
        self.first_example = 0
        self.values: dict[tuple[int, str], list[tuple[int, Tensor, Tensor]]] = {
            (index, name): [] for index in range(len(labels)) for name in metrics
        }
        self.notes: list[dict[str, Any]] = []

    def add(
        self, index: int, values: Mapping[str, Tensor], clean: Mapping[str, Tensor], note: Mapping[str, Any]
    ) -> None:
        for name, own in values.items():
            self.values[index, name].append((self.first_example, own, clean[name]))
        self.notes.append({"intervention": self.labels[index], "example": self.first_example, **note})

    def next_prompt(self, n_examples: int) -> None:
        self.first_example += n_examples

    def warn_of_nothing(self) -> None:
        changed = {note["intervention"] for note in self.notes if note["size"] > 0}
        idle = [label for label in self.labels if label not in changed]
        if idle:
            warnings.warn(
                f"{len(idle)} of {len(self.labels)} interventions changed no activation of any prompt, the first "
                f"of them {idle[0]!r}: their values are the clean run's",
                NoChangeWarning,
                # After this method, `sweep` and torch.no_grad's wrapper.
                stacklevel=4,
            )

    def table(self) -> pd.DataFrame:
        rows: dict[str, list[Any]] = {
            name: [] for name in ("intervention", "example", "metric", "value", "clean")
        }
        for (index, metric), batches in self.values.items():
            for first, values, clean in batches:
                n = len(values)
                rows["intervention"] += [self.labels[index]] * n
                rows["example"] += range(first, first + n)
                rows["metric"] += [metric] * n
                rows["value"] += values.double().tolist()
                rows["clean"] += clean.double().tolist()
        frame = pd.DataFrame({**rows, "intervention": pd.Series(rows["intervention"], dtype=object)})
        frame.attrs["reuse"] = self.notes
        return frame
