"""Head ablation: take away what a head does, in one of six ways, and leave every other head alone.

| mode | what the head does instead |
|---|---|
| zero | z = 0 |
| mean | z = its mean over a reference set, text and image positions apart |
| resample | z = the same head's z in another example |
| uniform | attends alike to every key it may see (the paper's masking, within the causal and padding mask) |
| uniform_leaky | all scores 0 after the mask: sees future and padding keys too (Algorithm 2, literally) |
| mean_query | q = its mean over a reference set (before rotation), text and image positions apart |

Source: arXiv 2606.05843, Algorithm 2, for the uniform modes; which reading is meant, it does not say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.data.examples import Example
from mmlens.heads import HeadSet, as_head_set
from mmlens.hook_names import block, unknown_name_message
from mmlens.hooked_vlm import Hook, HookedVLM, Intervention
from mmlens.interventions.edits import Edit, Here, Positions, positions_mask
from mmlens.prompt import Prompt

MODES = ("zero", "mean", "resample", "uniform", "uniform_leaky", "mean_query")


@dataclass(frozen=True)
class HeadMeans:
    """Mean z and q of every head over a reference set, [position kind, layer, head, d_head]: text, then image.

    Padding is left out. A set without images has no image means; they are then NaN. So are heads that the model
    does not have, and what lies behind a layer's own d_head where another layer's is larger. Under latent
    attention z (d_value) is narrower than q.
    """

    z: Float[Tensor, "2 layer head d_value"]
    q: Float[Tensor, "2 layer head d_head"]
    n_examples: int


@torch.no_grad()
def mean_activations(model: HookedVLM, examples: Sequence[Example], *, batch_size: int = 16) -> HeadMeans:
    """The reference of `ablate(heads, "mean")` and "mean_query": one pass over `examples`, summed in float64."""
    if not examples:
        raise ValueError("mean_activations needs at least one example, got an empty list")
    sums = {name: torch.full(_means_shape(model, name), torch.nan).double() for name in ("z", "q")}
    sizes = {name: _head_sizes(model, name) for name in sums}
    for name, of_layer in sizes.items():
        for layer, (n_heads, width) in of_layer.items():
            sums[name][:, layer, :n_heads, :width] = 0
    counts = torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(examples), batch_size):
        prompt = model.prompt_examples(examples[start : start + batch_size])
        masks = _position_kinds(prompt)
        counts += torch.stack([mask.sum() for mask in masks]).double().cpu()

        def add(x: Tensor, hook: Any, masks: tuple[Tensor, Tensor] = masks) -> None:
            total = sums[hook.name.rsplit("_", 1)[1]]
            for kind, mask in enumerate(masks):
                total[kind, hook.layer(), : x.shape[2], : x.shape[3]] += (
                    x[mask.to(x.device)].double().sum(0).cpu()
                )

        hooks = [(block(layer, f"attn.hook_{name}"), add) for name in sums for layer in sizes[name]]
        model.run_with_hooks(prompt, fwd_hooks=hooks, logits_to_keep=1)
    means = {name: (total / counts[:, None, None, None]).float() for name, total in sums.items()}
    return HeadMeans(**means, n_examples=len(examples))


def _head_sizes(model: HookedVLM, name: str) -> dict[int, tuple[int, int]]:
    """{layer: (number of heads, width of z or q)} of the layers that have it."""
    layers = enumerate(parts.attention for parts in model.anatomy.language)
    attention = {layer: parts for layer, parts in layers if parts is not None}
    if name == "z":
        return {layer: (parts.n_heads, parts.d_value) for layer, parts in attention.items()}
    return {
        layer: (parts.n_heads, parts.projections[name].d_head)
        for layer, parts in attention.items()
        if name in parts.projections
    }


def _means_shape(model: HookedVLM, name: str) -> tuple[int, int, int, int]:
    width = max((width for _, width in _head_sizes(model, name).values()), default=0)
    return 2, model.cfg.n_layers, model.cfg.n_heads, width


def ablate(
    heads: HeadSet | Iterable[tuple[int, int]],
    mode: str = "zero",
    *,
    reference: HeadMeans | Sequence[Example] | None = None,
    positions: Positions = None,
    seed: int = 0,
) -> Intervention:
    """Ablate `heads` in the given mode, at `positions` of the prompt (None: everywhere, generated tokens too).

    `reference`: `mean_activations(model, examples)` for "mean" and "mean_query"; a list of examples for
    "resample", of which each prompt's rows draw one each, by `seed`. Raises ValueError for an unknown mode, a
    reference that the mode does not take, or positions that choose none; IndexError for a head that the model does
    not have.

    >>> ablate([(0, 1)], "zeroed")
    Traceback (most recent call last):
        ...
    ValueError: there is no ablation mode 'zeroed'; the nearest: 'zero'
    """
    if mode not in MODES:
        raise ValueError(unknown_name_message("ablation mode", mode, MODES))
    _check_reference(mode, reference)
    if not isinstance(heads, HeadSet):
        heads = list(heads)

    def intervention(model: HookedVLM, prompt: Prompt) -> list[Hook]:
        chosen = as_head_set(heads, model.cfg.n_layers, model.cfg.n_heads, model.heads_per_layer)
        edit = _EDITS[mode](model, prompt, chosen, reference, seed)
        where = positions_mask(prompt, positions)
        hooks: list[Hook] = []
        for layer, members in chosen.by_layer().items():
            name = block(layer, _HOOK[mode])
            change = partial(edit, layer=layer, members=members)
            hooks.append((name, Edit(model, prompt, name, change, positions=where, heads=members)))
        return hooks

    return intervention


HeadChange = Callable[..., Tensor]
"""(the heads' activation, what it covers, layer=, members=) -> what stands in its place."""

_HOOK = dict.fromkeys(("zero", "mean", "resample"), "attn.hook_z") | {
    "uniform": "attn.hook_attn_scores",
    "uniform_leaky": "attn.hook_attn_scores",
    "mean_query": "attn.hook_q",
}


def _zero(model: HookedVLM, prompt: Prompt, heads: HeadSet, reference: Any, seed: int) -> HeadChange:
    return lambda x, here, layer, members: torch.zeros_like(x)


def _uniform(model: HookedVLM, prompt: Prompt, heads: HeadSet, reference: Any, seed: int) -> HeadChange:
    def edit(scores: Tensor, here: Here, layer: int, members: list[int]) -> Tensor:
        # A masked score has the mask's huge negative number in it; no real score comes near half of it.
        masked = scores < torch.finfo(scores.dtype).min / 2
        return torch.where(masked, scores, torch.zeros_like(scores))

    return edit


def _mean_of(name: str) -> Callable[..., HeadChange]:
    def build(
        model: HookedVLM, prompt: Prompt, heads: HeadSet, reference: HeadMeans, seed: int
    ) -> HeadChange:
        means: Tensor = getattr(reference, name)
        shape, sizes = _means_shape(model, name), _head_sizes(model, name)
        if tuple(means.shape) != shape:
            raise ValueError(f"the reference means have shape {tuple(means.shape)}, this model needs {shape}")
        has_images = bool(prompt.token_map.is_image.any())
        if has_images and bool(means[1].isnan().all()):
            raise ValueError("the prompt has images, but the reference means come from examples without any")
        for layer, members in heads.by_layer().items():
            width = sizes[layer][1] if layer in sizes else 0
            if bool(means[: 1 + has_images, layer, members, :width].isnan().any()):
                raise ValueError(
                    f"the reference means of {name} are NaN for heads {members} of layer {layer}: they are of a model "
                    "with other heads, or its activations were NaN"
                )

        def edit(x: Tensor, here: Here, layer: int, members: list[int]) -> Tensor:
            of_text, of_image = means[:, layer, members, : x.shape[-1]].to(x)
            return torch.where(here.is_image.to(x.device)[:, :, None, None], of_image, of_text).expand_as(x)

        return edit

    return build


def _resample(
    model: HookedVLM, prompt: Prompt, heads: HeadSet, reference: Sequence[Example], seed: int
) -> HeadChange:
    """z of another example: text positions are matched from the prompt's end, image positions likewise.

    In prompts of equal layout that is position by position; where the other example has fewer positions of
    a kind, its own are used again from the end.
    """
    rng = np.random.default_rng([seed, *_fingerprint(prompt)])
    drawn = [
        _another(reference, question, images, rng)
        for question, images in zip(prompt.questions, prompt.images, strict=True)
    ]
    other = model.prompt_examples(drawn)
    names = [block(layer, "attn.hook_z") for layer in heads.by_layer()]
    with torch.no_grad():
        _, cache = model.run_with_cache(other, names_filter=names, logits_to_keep=1)
    index = _matched_positions(_position_kinds(prompt), _position_kinds(other))
    last = other.last.cpu().int().argmax(-1, keepdim=True)

    def edit(z: Tensor, here: Here, layer: int, members: list[int]) -> Tensor:
        source = cache[block(layer, "attn.hook_z")][:, :, members].to(z)
        # A generated token has no counterpart in the other prompt: it takes the last position's z.
        of_run = here.of_prompt(index, last).to(source.device)
        return source.gather(1, of_run[:, :, None, None].expand(-1, -1, *source.shape[2:]))

    return edit


def _matched_positions(here: tuple[Tensor, Tensor], there: tuple[Tensor, Tensor]) -> Tensor:
    """For every position of a prompt the position of the other prompt that it is matched with (padding: 0)."""
    index = torch.zeros(here[0].shape, dtype=torch.long)
    for row in range(len(index)):
        for targets, sources in zip(here, there, strict=True):
            to = targets[row].nonzero().flatten().cpu().flip(0)
            given = sources[row].nonzero().flatten().cpu().flip(0)
            if len(to) and not len(given):
                raise ValueError("resample: the prompt has images, but a reference example has none")
            if len(to):
                index[row, to] = given[torch.arange(len(to)) % len(given)]
    return index


_EDITS: dict[str, Callable[..., HeadChange]] = {
    "zero": _zero,
    "mean": _mean_of("z"),
    "resample": _resample,
    "uniform": _uniform,
    "uniform_leaky": _zero,
    "mean_query": _mean_of("q"),
}


def _position_kinds(prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Masks [batch, pos] of text and of image positions; padding is neither."""
    token_map = prompt.token_map
    return ~token_map.is_image & ~token_map.is_padding, token_map.is_image


def _check_reference(mode: str, reference: Any) -> None:
    if mode in ("mean", "mean_query") and not isinstance(reference, HeadMeans):
        raise ValueError(
            f"ablate(heads, {mode!r}) needs reference=mean_activations(model, examples), "
            f"got {type(reference).__name__}"
        )
    if mode == "resample" and not (
        isinstance(reference, Sequence) and reference and all(isinstance(e, Example) for e in reference)
    ):
        raise ValueError(
            f"ablate(heads, 'resample') needs reference=[examples to draw from], got {type(reference).__name__}"
        )
    if mode in ("zero", "uniform", "uniform_leaky") and reference is not None:
        raise ValueError(f"ablate(heads, {mode!r}) takes no reference, got {type(reference).__name__}")


def _fingerprint(prompt: Prompt) -> list[int]:
    """So that two batches do not draw the same reference examples in the same order."""
    ids = prompt.inputs["input_ids"]
    return [int(ids.sum()), int(ids.shape[1]), len(ids)]


def _another(
    reference: Sequence[Example], question: str, images: Sequence[Any], rng: np.random.Generator
) -> Example:
    """A reference example with as many images where there is one, and not the prompt's own."""
    others = [e for e in reference if (e.question, len(e.images)) != (question, len(images))]
    alike = [e for e in others if len(e.images) == len(images)] or [
        e for e in others if bool(e.images) == bool(images)
    ]
    if not alike:
        raise ValueError(
            f"resample: no reference example but the prompt's own for the question {question!r} "
            f"with {len(images)} image(s)"
        )
    return alike[int(rng.integers(len(alike)))]
