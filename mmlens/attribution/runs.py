"""Forward passes whose metric can be differentiated at hook points, for `attribute` and `attribute_edges`.

Gradients begin at the first hook point that is recorded, and no weight gets one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.arguments import whole_number
from mmlens.errors import InvalidValueError
from mmlens.families.anatomy import AttentionParts
from mmlens.hook_names import block, runs_over_positions
from mmlens.interrupts import Temporary
from mmlens.interventions.layouts import layout_difference
from mmlens.interventions.patching import PatchSource, Source, shared_source
from mmlens.metrics.outcomes import Metric, evaluate, metric_name, metric_of, what_reads
from mmlens.model.cache import over_positions
from mmlens.model.evaluation import check_same_twice
from mmlens.model.hooked_vlm import HookedVLM, model_of
from mmlens.model.hooks import Hook
from mmlens.model.linear import gradients_pass
from mmlens.model.prompt import Prompt, prompt_of


@dataclass(eq=False)
class Graph:
    """One forward pass whose metric, summed over examples, can be differentiated at the recorded hook points."""

    metric: Tensor
    tensors: dict[str, Tensor]
    dropping: list[int]
    """The layer that passes no gradient, where there is one."""

    @property
    def values(self) -> dict[str, Tensor]:
        return {name: x.detach() for name, x in self.tensors.items()}

    def gradients(self, *, keep: bool = False) -> dict[str, Tensor]:
        """By hook point; zeros where the metric does not depend on one. `keep`: the graph is used once more."""
        inputs = list(self.tensors.values())
        found = torch.autograd.grad(
            self.metric, inputs, allow_unused=True, materialize_grads=True, retain_graph=keep
        )
        return dict(zip(self.tensors, found, strict=True))


@dataclass
class GradientRuns:
    """Forward passes of one prompt with a graph after chosen hook points."""

    model: HookedVLM
    prompt: Prompt
    metric: Metric
    logits_to_keep: int
    steps: int = 1
    """Where gradients are averaged: over how many points."""

    def __post_init__(self) -> None:
        model_of(self.model)
        prompt_of(self.prompt)
        metric_of("metric", self.metric)
        self.steps = whole_number("steps", self.steps, least=1)
        self.logits_to_keep = whole_number("logits_to_keep", self.logits_to_keep, least=0)
        check_same_twice(self.model.hf_model)
        self.metric_name = metric_name(self.metric)
        reads = what_reads(self.metric)
        if reads == "answers":
            raise InvalidValueError(
                f"metric {self.metric_name} reads generated answers, which have no gradient: take one of the logits"
            )
        self.clean_logits = None
        if reads == "clean logits":
            with torch.no_grad():
                self.clean_logits = self.model(self.prompt, logits_to_keep=self.logits_to_keep)
        self._run = self.prompt

    def encode_images(self) -> None:
        """Run the tower once for all runs to come, unless a hook of the user's own acts there."""
        live = [name for name, point in self.model.hook_dict.items() if point.is_live]
        self._run = (
            self.model.encode_images(self.prompt) if all(map(runs_over_positions, live)) else self.prompt
        )

    def forward(
        self, names: Sequence[str], edits: Sequence[Hook] = (), drops: Mapping[str, int] | None = None
    ) -> Graph:
        """Run with `edits`, and record `names`. `drops` says which hook points pass no gradient while their layer
        stands in the graph's `dropping`."""
        tensors: dict[str, Tensor] = {}
        dropping: list[int] = []

        def record(x: Tensor, hook: Any) -> Tensor | None:
            if hook.name in tensors:
                raise InvalidValueError(
                    f"{hook.name} fires several times in one run (once per image or window), so it is no single node"
                )
            if not x.requires_grad:
                x = x.detach().clone().requires_grad_()
                tensors[hook.name] = x
                return x.clone()
            tensors[hook.name] = x
            # A layer may edit its stream in place; the copy keeps that from the recorded tensor. What is read as
            # resid_mid is the stream itself, and any copy would be written back into it.
            return None if hook.name.endswith("hook_resid_mid") else x.clone()

        def drop(x: Tensor, hook: Any, layer: int) -> Tensor:
            if not x.requires_grad:
                return x
            x = x.clone()
            x.register_hook(lambda gradient: torch.zeros_like(gradient) if layer in dropping else gradient)
            return x

        hooks = [*edits, *((name, record) for name in names)]
        hooks += [(name, partial(drop, layer=layer)) for name, layer in (drops or {}).items()]

        def measure() -> Tensor:
            with gradients_pass(self.model.hf_model):
                logits = self.model.run_with_hooks(
                    self._run, fwd_hooks=hooks, logits_to_keep=self.logits_to_keep
                )
            # A metric may work in place, and the clean logits serve every graph.
            clean = None if self.clean_logits is None else self.clean_logits.clone()
            return evaluate(self.metric, self.metric_name, self.prompt, logits=logits, clean_logits=clean)

        measured = _frozen_weights(self.model).around(measure)
        if not measured.requires_grad:
            raise InvalidValueError(
                "the metric has no gradient at these nodes: it is not differentiable (an argmax, a detached tensor), "
                "or none of them reaches the logits"
            )
        return Graph(measured.sum(), tensors, dropping)

    def along_embeddings(self, source: PatchSource, names: Sequence[str]) -> Iterator[Graph]:
        """Graphs at the midpoints of the way from clean to source embeddings.

        Raises ValueError where that way does not end at the source.
        """
        model, mask = self.model, self.model.image_mask(self.prompt)
        deep = [name for name in model.hook_dict if name.endswith("hook_deepstack")]
        moved = ["hook_embed", *(deep if mask is not None and bool(mask.any()) else [])]
        end = block(model.cfg.n_layers - 1, "hook_resid_post")
        ends = source_values(model, self.prompt, source, [*moved, end])

        def edits(part: float) -> list[Hook]:
            return [(name, towards(ends[name], part)) for name in moved]

        self._check_end(end, ends[end], edits(1.0))
        for part in self.midpoints():
            yield self.forward(names, edits(part))

    def midpoints(self) -> list[float]:
        """Of `steps` equal parts of the way from 0 to 1."""
        return [(i + 0.5) / self.steps for i in range(self.steps)]

    @torch.no_grad()
    def _check_end(self, name: str, there: Tensor, edits: Sequence[Hook]) -> None:
        """Raise ValueError where the source's embeddings in the prompt's run do not give the source's final stream."""

        def final(hooks: Sequence[Hook]) -> Tensor:
            with self.model.hooks(fwd_hooks=hooks):
                _, cache = self.model.run_with_cache(self._run, names_filter=[name], logits_to_keep=1)
            return cache[name].float().nan_to_num()

        there = there.float().nan_to_num()
        clean, end = final(()).to(there.device), final(edits).to(there.device)
        rounding = 1e-4 if self.model.cfg.dtype == torch.float32 else 2e-2
        if (end - there).norm() > 0.02 * (there - clean).norm() + rounding * there.norm():
            raise InvalidValueError(
                f"'integrated' cannot reach the source: {self.model.family.model_type!r} takes more from it than the "
                "embeddings that enter its first layer; take 'integrated_activation'"
            )


def _frozen_weights(model: HookedVLM) -> Temporary[None]:
    """Gradients on, but of no weight; every weight's own setting is restored, and so is whether gradients are on."""
    trained = [weight for weight in model.hf_model.parameters() if weight.requires_grad]
    had_gradients = torch.is_grad_enabled()

    def begin() -> None:
        torch.set_grad_enabled(True)
        for weight in trained:
            weight.requires_grad_(False)

    def end() -> None:
        for weight in trained:
            weight.requires_grad_(True)
        torch.set_grad_enabled(had_gradients)

    return Temporary(begin, end)


def source_values(
    model: HookedVLM, prompt: Prompt, source: PatchSource, names: Sequence[str]
) -> dict[str, Tensor]:
    """The source's activations at the hook points, as its run gave them.

    Raises ValueError where its prompt is laid out otherwise, and as `patch`.
    """
    origins = shared_source(source).origins(model, prompt, list(dict.fromkeys(names)))
    prompts = {id(origin.prompt): origin.prompt for origin in origins.values() if origin.prompt is not None}
    for other in prompts.values():
        different = layout_difference(prompt, other)
        if different is not None:
            raise InvalidValueError(f"prompt and source are laid out differently: {different}")
    return {name: origin.value.detach() for name, origin in origins.items()}


def clean_values(model: HookedVLM, prompt: Prompt, names: Sequence[str]) -> dict[str, Tensor]:
    """The prompt's own activations."""
    return source_values(model, prompt, Source(), names)


def difference(name: str, source: Tensor, own: Tensor) -> Tensor:
    """source - own in float32. Raises ValueError for unequal shapes."""
    if source.shape != own.shape:
        raise InvalidValueError(
            f"the source's {name} has shape {list(source.shape)}, the prompt's {list(own.shape)}: patching takes a "
            "source of equal layout"
        )
    return source.to(own.device).float() - own.float()


def towards(end: Tensor, part: float) -> Callable[..., Tensor]:
    """A hook that moves an activation `part` of the way to `end`."""

    def edit(x: Tensor, hook: Any) -> Tensor:
        change = difference(hook.name, end, x).to(x.dtype)
        return end.to(x).clone() if part == 1 else x + part * change

    return edit


def laid_out(
    model: HookedVLM, prompt: Prompt, rows: Float[Tensor, "image_token ..."], fill: float = 0.0
) -> Float[Tensor, "batch pos ..."]:
    """Rows of the prompt's image tokens over all its positions, `fill` at text."""
    mask = model.image_mask(prompt)
    assert mask is not None
    return over_positions(rows, mask, fill)


def attention_of(model: HookedVLM, layer: int) -> AttentionParts:
    attention = model.anatomy.language[layer].attention
    if attention is None:
        raise InvalidValueError(f"layer {layer} has no softmax attention")
    return attention


def finite(name: str, scores: Tensor) -> Tensor:
    """The scores, on the CPU. Raises ValueError where one is not finite."""
    if not bool(scores.isfinite().all()):
        raise InvalidValueError(f"scores of {name} are not finite: its activations or gradients overflow")
    return scores.cpu()


def mean_of(parts: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Means by name."""
    total = next(parts)
    count = 1
    for part in parts:
        total = {name: total[name] + value for name, value in part.items()}
        count += 1
    return {name: value / count for name, value in total.items()}
