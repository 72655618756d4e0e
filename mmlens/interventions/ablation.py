"""Ablation: take away what a part of the model does, in one of six ways, and leave every other part alone.

| mode | what stands in the component's place |
|---|---|
| zero | 0 |
| mean | its mean over a reference set, text and image positions apart |
| resample | its activation in another example |
| uniform | attention alike to every key it may see (the paper's masking, within the causal and padding mask) |
| uniform_leaky | all scores 0 after the mask: it sees future and padding keys too (Algorithm 2, literally) |
| mean_query | what follows from q = its mean over a reference set (before rotation), text and image positions apart |

The last three are for heads of the language model. Components are heads, neurons, outputs of attention and MLP, image
embeddings, and their like in the vision tower: see mmlens/interventions/components.py. Source of the uniform modes:
arXiv 2606.05843, Algorithm 2; which reading is meant, it does not say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from mmlens.arguments import BATCH_SIZE, listed, one_of, seed_of
from mmlens.data.examples import Example
from mmlens.data.images import pixel_fingerprint
from mmlens.data.many import ExampleStream
from mmlens.errors import InvalidValueError
from mmlens.heads import HeadSet
from mmlens.hook_names import axes_of, layer_of
from mmlens.interventions.components import Component, Specs
from mmlens.interventions.components import components as components_of
from mmlens.interventions.edits import (
    Change,
    Edit,
    EditContext,
    check_call,
)
from mmlens.interventions.origin import OfAnotherModel, check_origin
from mmlens.model.batches import Batches, Prompts
from mmlens.model.cache import is_batched, is_masked, is_packed
from mmlens.model.choosing import IfAny, Mask, Positions, check_each_example, positions_mask
from mmlens.model.evaluation import check_same_twice
from mmlens.model.fingerprints import example_seed, weights_fingerprints
from mmlens.model.hooked_vlm import HookedVLM, model_of
from mmlens.model.hooks import Hook, HookName, Intervention
from mmlens.model.prompt import Prompt

MODES = ("zero", "mean", "resample", "uniform", "uniform_leaky", "mean_query")

Means = Mapping[str, Tensor]
"""Hook name -> its mean activation [kind, ...] over a reference set, as `mean_activations` gives it."""

_HEAD_MODES = {"uniform": "hook_attn_scores", "uniform_leaky": "hook_attn_scores", "mean_query": "hook_q"}
"""Modes of language heads alone, and where they edit: the other modes edit z."""


class MeanActivations(dict[str, Tensor]):
    """Hook name -> its mean activation [kind, ...] over a reference set, and the model that it is of."""

    def __init__(self, means: Mapping[str, Tensor], weights: Mapping[str, str]) -> None:
        super().__init__(means)
        self.weights = dict(weights)

    def __reduce__(self) -> tuple[Any, ...]:
        return MeanActivations, (dict(self), self.weights)


@torch.no_grad()
def mean_activations(
    model: HookedVLM,
    prompts: Prompts,
    *,
    hooks: HookName | Sequence[str] | None = None,
    batch_size: int = BATCH_SIZE,
) -> MeanActivations:
    """Mean activations over a reference set: the reference of `ablate(components, "mean")` and "mean_query".

    One pass over `prompts`, summed in float64. `hooks` are hook names or a filter of them, by default z and q of
    every language head. Where an activation runs over the prompt's positions, `kind` is text, then image; padding
    is left out, and a set without images has no image mean: it is NaN. Of other hook points (image.*, the vision
    tower) there is one kind: the mean is over all image tokens, or all patches that the tower runs (where it pads
    images, padding too); examples without images do not count.

    Raises ValueError for no prompts, hook points whose activations run over queries and keys, and ones that need
    images where no example has any; UnknownHookError for a name that there is not.

    >>> model = HookedVLM.from_pretrained("micro")
    >>> means = mean_activations(model, [Example("What colour is the K?", "red")], hooks=["blocks.0.hook_mlp_out"])
    >>> means["blocks.0.hook_mlp_out"].shape == (2, model.cfg.d_model)
    True
    """
    check_same_twice(model_of(model).hf_model)
    batches = Batches(model, prompts, batch_size)
    names = _mean_hooks(model, hooks)
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for _, prompt in batches:
        masks = _position_kinds(prompt)

        def add(x: Tensor, hook: Any, masks: tuple[Mask, Mask] = masks) -> None:
            groups = (
                [x[mask.to(x.device)] for mask in masks] if is_batched(hook.name) else [_rows(x, hook.name)]
            )
            total = torch.stack([group.double().sum(0).cpu() for group in groups])
            count = torch.tensor([len(group) for group in groups], dtype=torch.float64)
            sums[hook.name] = sums.get(hook.name, 0) + total
            counts[hook.name] = counts.get(hook.name, 0) + count

        fire = [name for name in names if is_batched(name) or any(prompt.images) or any(prompt.videos)]
        if fire:
            model.run_with_hooks(prompt, fwd_hooks=[(name, add) for name in fire], logits_to_keep=1)
    missing = [name for name in names if name not in sums]
    if missing:
        raise InvalidValueError(f"no example has an image, so there is no mean of {missing[:5]}")
    means = {
        name: (total / counts[name].view(-1, *[1] * (total.ndim - 1))).float() for name, total in sums.items()
    }
    return MeanActivations(means, weights_fingerprints(model.hf_model))


def ablate(
    components: Specs,
    mode: str = "zero",
    *,
    reference: Means | OfAnotherModel | Sequence[Example] | ExampleStream | None = None,
    positions: Positions = None,
    seed: int = 0,
) -> Intervention:
    """Ablate `components` in the given mode, at `positions` of the prompt (None: everywhere, generated tokens too).

    `components`: a HeadSet, or a list of (layer, head), (layer, "attn"), (layer, "mlp"), (layer, "layer"),
    (layer, "mlp", neuron), ("vision", layer, head) and "image"; the vision tower has no positions to choose.
    "image" replaces image embeddings where they enter the language model and wherever the family adds visual
    features to them again (DeepStack): with positions of a region, that region alone.

    `reference`: `mean_activations(model, examples)` for "mean" and "mean_query", of this very model unless they are
    wrapped in `of_another_model`; a list of examples for
    "resample", of which each example draws one, by `seed`, its tokens and its images: the same in any batch. Text
    positions take what stands at the other example's text position as far from the end, image positions likewise;
    the vision tower takes patch by patch, from examples whose images are of the same sizes.

    Raises ValueError for an unknown mode, a mode that a component does not take, a reference that the mode does
    not take, or an example of a batch in which positions choose none, or that has no image to ablate (`if_any`
    leaves it as it is); and what `component` raises (IndexError for a head that the model does not have).

    >>> ablate([(0, 1)], "zeroed")
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidValueError: there is no ablation mode 'zeroed'; the nearest: 'zero'
    """
    one_of("ablation mode", mode, MODES)
    seed = seed_of(seed)
    if isinstance(reference, ExampleStream):
        reference = list(reference)
    _check_reference(mode, reference)
    if not isinstance(components, str | HeadSet | np.ndarray | Tensor):
        components = listed(
            "components", components, "a HeadSet or a list of heads and other components", sets=True
        )

    def intervention(model: HookedVLM, prompt: Prompt) -> list[Hook]:
        check_call(model, prompt)
        targets = _targets(components_of(model, components), mode)
        targets = _with_rows(model, prompt, targets, positions)
        changes = _CHANGES[mode](model, prompt, targets, reference, seed)
        return [
            (target.hook, target.edit(model, prompt, change, positions))
            for target, change in zip(targets, changes, strict=True)
        ]

    return intervention


@dataclass(frozen=True)
class _Target:
    """What is ablated at one hook point: all of it, or some heads or neurons."""

    hook: str
    parts: list[Component]

    @property
    def index(self) -> list[int] | None:
        chosen = [part.index for part in self.parts if part.index is not None]
        return chosen or None

    def of(self, x: Tensor) -> Tensor:
        """The ablated heads or neurons of the activation, or of what has the same last axes."""
        if self.index is None:
            return x
        return x.index_select(self.parts[0].axis, torch.tensor(self.index, device=x.device))

    def edit(self, model: HookedVLM, prompt: Prompt, change: Change, where: Positions) -> Edit:
        if self.parts[0].part == "z" or self.index is None:
            return Edit(model, prompt, self.hook, change, positions=where, heads=self.index)

        def whole(x: Tensor, here: EditContext) -> Tensor:
            chosen = self.of(x)
            index = torch.tensor(self.index, device=x.device)
            return x.index_copy(self.parts[0].axis, index, change(chosen, here).to(x.dtype).expand_as(chosen))

        return Edit(model, prompt, self.hook, whole, positions=where)


def _targets(parts: Sequence[Component], mode: str) -> list[_Target]:
    by_hook: dict[str, list[Component]] = {}
    for part in parts:
        if mode in _HEAD_MODES and (part.part != "z" or part.stack):
            raise InvalidValueError(
                f"mode {mode!r} is for heads of the language model; {part.label} takes 'zero', 'mean' or 'resample'"
            )
        for hook in part.hooks:
            hook = hook.replace("hook_z", _HEAD_MODES.get(mode, "hook_z"))
            by_hook.setdefault(hook, []).append(part)
    return [_Target(hook, parts) for hook, parts in by_hook.items()]


def _with_rows(
    model: HookedVLM, prompt: Prompt, targets: Sequence[_Target], positions: Positions
) -> list[_Target]:
    """The targets that have something to ablate in this prompt: image embeddings where it has images.

    Raises ValueError where an example has none of the image positions to be ablated, unless `positions` says that it
    is to be left then.
    """
    if not any(is_packed(target.hook) for target in targets):
        return list(targets)
    mask = positions_mask(prompt, positions)
    images = model.image_mask(prompt)
    visual = torch.zeros(tuple(prompt.shape), dtype=torch.bool) if images is None else images.cpu()
    visual = visual if mask is None else visual & mask.cpu()
    if not isinstance(positions, IfAny):
        fault = "has no image positions to ablate" if mask is None else "chooses no image position"
        check_each_example(prompt, visual, f"{'the prompt' if mask is None else 'positions'} {fault}")
    return [target for target in targets if bool(visual.any()) or not is_packed(target.hook)]


# ---------------------------------------------------------------------- what stands in a component's place


def _zero(
    model: HookedVLM, prompt: Prompt, targets: Sequence[_Target], reference: None, seed: int
) -> list[Change]:
    return [lambda x, here: torch.zeros_like(x)] * len(targets)


def _uniform(
    model: HookedVLM, prompt: Prompt, targets: Sequence[_Target], reference: None, seed: int
) -> list[Change]:
    def change(scores: Tensor, here: EditContext) -> Tensor:
        return torch.where(is_masked(scores, model.hf_model.dtype), scores, torch.zeros_like(scores))

    return [change] * len(targets)


def _mean(
    model: HookedVLM, prompt: Prompt, targets: Sequence[_Target], reference: Means | OfAnotherModel, seed: int
) -> list[Change]:
    check_origin(reference, model, "the reference means")
    if isinstance(reference, OfAnotherModel):
        reference = reference.activations
    has_images = bool(prompt.token_map.is_image.any())
    absent = [target.hook for target in targets if target.hook not in reference]
    if absent:
        raise InvalidValueError(
            f"the reference holds no means of {absent[:5]} ({len(absent)} of the {len(targets)} hook points that are "
            "ablated): take them of this model by mean_activations(model, examples, hooks=[every hook point])"
        )
    changes: list[Change] = []
    for target in targets:
        means, first = reference[target.hook], target.parts[0]
        _check_kinds(target.hook, means)
        if first.index is not None and means.shape[first.axis] != first.size:
            raise InvalidValueError(
                f"the reference means of {target.hook} have shape {list(means.shape)}; this model has "
                f"{first.size} {first.unit}s there"
            )
        means = target.of(means)
        if is_batched(target.hook) and has_images and bool(means[1].isnan().all()):
            raise InvalidValueError(
                "the prompt has images, but the reference means come from examples without any"
            )
        if bool(means[: 1 + has_images].isnan().any()):
            raise InvalidValueError(f"the reference means of {target.hook} are NaN: its activations were")
        changes.append(partial(_to_mean, means=means, hook=target.hook))
    return changes


def _check_kinds(hook: str, means: Tensor) -> None:
    """Raise ValueError for means without the axis of text and image: a head's mean would be taken for a kind's."""
    n_kinds = 2 if is_batched(hook) else 1
    n_features = sum(axis not in _ROW_AXES | {"image_token"} for axis in axes_of(hook))
    if means.ndim != 1 + n_features or len(means) != n_kinds:
        kinds = "2 kinds (text, then image)" if n_kinds == 2 else "1 kind"
        raise InvalidValueError(
            f"the reference means of {hook} have shape {list(means.shape)}, expected [kind, ...] with {kinds} and "
            f"{n_features} further axes, as mean_activations gives them"
        )


def _to_mean(x: Tensor, here: EditContext, *, means: Float[Tensor, "kind ..."], hook: str) -> Tensor:
    features = means.shape[1:]
    if x.shape[x.ndim - len(features) :] != features:
        raise InvalidValueError(
            f"the reference means of {hook} end in {list(features)}, this model's activation in "
            f"{list(x.shape[-len(features) :])}: they are of another model"
        )
    means = means.to(x)
    if len(means) == 1:
        return means[0].expand_as(x)
    is_image = here.is_image.to(x.device)
    return torch.where(is_image.view(*is_image.shape, *[1] * len(features)), means[1], means[0])


def _resample(
    model: HookedVLM, prompt: Prompt, targets: Sequence[_Target], reference: Sequence[Example], seed: int
) -> list[Change]:
    """Activations of another example: text positions are matched from the prompt's end, image positions likewise.

    In prompts of equal layout that is position by position; where the other example has fewer positions of
    a kind, its own are used again from the end.
    """
    same_sizes = not all(is_batched(target.hook) or is_packed(target.hook) for target in targets)
    drawn = [
        # By the example, not by its place in a batch: the numbers must not depend on the batch size.
        _another(
            reference, question, images, np.random.default_rng([seed, *example_seed(prompt, row)]), same_sizes
        )
        for row, (question, images) in enumerate(zip(prompt.questions, prompt.images, strict=True))
    ]
    other = model.prompt_examples(drawn)
    check_same_twice(model.hf_model)
    with torch.no_grad():
        _, cache = model.run_with_cache(
            other, names_filter=[target.hook for target in targets], logits_to_keep=1
        )
    sources = [
        target.of(cache.unpacked(target.hook) if is_packed(target.hook) else cache[target.hook])
        for target in targets
    ]
    return [
        _to_prompt_values(model, prompt, other, source)
        if is_batched(target.hook)
        else _to_image_values(model, prompt, other, source)
        if is_packed(target.hook)
        else partial(_to_same_patches, source=source, hook=target.hook)
        for target, source in zip(targets, sources, strict=True)
    ]


def _to_prompt_values(model: HookedVLM, prompt: Prompt, other: Prompt, source: Tensor) -> Change:
    rows = torch.arange(len(source), device=source.device)[:, None]
    index = _matched_positions(_position_kinds(prompt), _position_kinds(other)).to(source.device)
    # A generated token has no counterpart in the other prompt: it takes what stands at the last position.
    last = other.last.int().argmax(-1, keepdim=True).to(source.device)
    index = torch.where(prompt.token_map.is_answer.to(source.device), last, index)
    values, after = source[rows, index], source[rows, last]
    return lambda x, here: here.of_prompt(values, after).to(x)


def _to_image_values(model: HookedVLM, prompt: Prompt, other: Prompt, source: Tensor) -> Change:
    here_mask, there_mask = (model.image_mask(each) for each in (prompt, other))
    assert here_mask is not None and there_mask is not None
    here_mask = here_mask.to(source.device)
    rows = torch.arange(len(source), device=source.device)[:, None]
    values = source[rows, _matched_positions([here_mask], [there_mask]).to(source.device)]
    return lambda x, here: here.of_prompt(values, 0.0)[here.of_prompt(here_mask, False)].to(x)


def _to_same_patches(x: Tensor, here: EditContext, *, source: Tensor, hook: str) -> Tensor:
    here.check_run()
    if x.shape != source.shape:
        raise InvalidValueError(
            f"resample: {hook} is {list(x.shape)} here and {list(source.shape)} in the reference run, so their patches "
            "cannot be matched (a tower that runs several times in one forward pass cannot be resampled)"
        )
    return source.to(x)


def _matched_positions(
    here: Sequence[Bool[Tensor, "batch pos"]], there: Sequence[Bool[Tensor, "batch other_pos"]]
) -> Int[Tensor, "batch pos"]:
    """For every position of a prompt the position of the other prompt that it is matched with (padding: 0)."""
    index = torch.zeros(here[0].shape, dtype=torch.long)
    for row in range(len(index)):
        for targets, sources in zip(here, there, strict=True):
            to = targets[row].nonzero().flatten().cpu().flip(0)
            given = sources[row].nonzero().flatten().cpu().flip(0)
            if len(to) and not len(given):
                raise InvalidValueError("resample: the prompt has images, but a reference example has none")
            if len(to):
                index[row, to] = given[torch.arange(len(to)) % len(given)]
    return index


_CHANGES: dict[str, Callable[..., list[Change]]] = {
    "zero": _zero,
    "mean": _mean,
    "resample": _resample,
    "uniform": _uniform,
    "uniform_leaky": _zero,
    "mean_query": _mean,
}
"""(model, prompt, targets, reference, seed) -> for each target what becomes of its ablated part."""


# ---------------------------------------------------------------------- axes and references


_ROW_AXES = {"batch", "pos", "key", "image", "patch", "..."}


def _rows(x: Tensor, hook: str) -> Tensor:
    """An activation of the vision side, one row per patch or image token."""
    n_features = x.ndim - 1 if is_packed(hook) else sum(axis not in _ROW_AXES for axis in axes_of(hook))
    return x.flatten(0, x.ndim - n_features - 1)


def _mean_hooks(model: HookedVLM, hooks: HookName | Sequence[str] | None) -> list[str]:
    if hooks is None:
        names = [name for name in model.hook_dict if name.endswith(("attn.hook_z", "attn.hook_q"))]
        return [name for name in names if layer_of(name) is not None]
    one = isinstance(hooks, str) or callable(hooks)
    given: list[Any] = [hooks] if one else listed("hooks", hooks, "hook names or a filter of them")
    names = [name for match in given for name in model.hook_names(match)]
    for name in names:
        if "query" in axes_of(name):
            raise InvalidValueError(
                f"{name} is [{', '.join(axes_of(name))}]: a mean over positions of queries and keys is none of a head"
            )
    return names


def _position_kinds(prompt: Prompt) -> tuple[Mask, Mask]:
    """Masks [batch, pos] of text and of image positions; padding and what follows the prompt is neither."""
    token_map = prompt.token_map
    is_text = ~token_map.is_image & ~token_map.is_padding & ~token_map.is_answer
    return is_text, token_map.is_image


def _check_reference(mode: str, reference: Any) -> None:
    if isinstance(reference, OfAnotherModel):
        reference = reference.activations
    if mode in ("mean", "mean_query") and not isinstance(reference, Mapping):
        raise InvalidValueError(
            f"ablate(..., {mode!r}) needs reference=mean_activations(model, examples), "
            f"got {type(reference).__name__}"
        )
    if mode == "resample" and not (
        isinstance(reference, Sequence) and reference and all(isinstance(e, Example) for e in reference)
    ):
        raise InvalidValueError(
            f"ablate(..., 'resample') needs reference=[examples to draw from], got {type(reference).__name__}"
        )
    if mode in ("zero", "uniform", "uniform_leaky") and reference is not None:
        raise InvalidValueError(f"ablate(..., {mode!r}) takes no reference, got {type(reference).__name__}")


def _another(
    reference: Sequence[Example],
    question: str,
    images: Sequence[Image.Image],
    rng: np.random.Generator,
    same_sizes: bool,
) -> Example:
    """A reference example with as many images where there is one, and not the prompt's own.

    With `same_sizes`, one with other images of the same sizes, whatever it asks.
    """
    if same_sizes:
        sizes, pixels = tuple(image.size for image in images), tuple(map(pixel_fingerprint, images))
        sized = [e for e in reference if e.images.sizes == sizes]
        alike = [e for e in sized if e.images.fingerprints != pixels]
    else:
        others = [e for e in reference if (e.question, len(e.images)) != (question, len(images))]
        alike = [e for e in others if len(e.images) == len(images)] or [
            e for e in others if bool(e.images) == bool(images)
        ]
    if not alike:
        raise InvalidValueError(
            f"resample: no reference example but the prompt's own for the question {question!r} "
            f"with {len(images)} image(s)" + (f" of sizes {list(sizes)}" if same_sizes else "")
        )
    return alike[int(rng.integers(len(alike)))]
