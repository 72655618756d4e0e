"""Attribution patching: what patching each node, or each edge, would do to a metric, estimated by gradients.

Exact patching takes one run for every node. The gradient of the metric in the clean run estimates all of them at
once: score(a) = sum over elements of (a_source - a_clean) * d metric / d a, the first-order change of the metric when
activation a is patched from the source run (Nanda 2023, "Attribution Patching").

| method | what takes the place of the clean run's gradient |
|---|---|
| gradient | nothing: one forward, one backward |
| integrated | its mean while `hook_embed` goes from clean to source (EAP-IG, Hanna et al. 2024) |
| integrated_activation | its mean while the hook point itself goes from clean to source (Marks et al. 2024) |
| graddrop | mean size of the estimate while one layer after another passes no gradient (AtP*, Kramar et al. 2024) |
| qk_fix | for queries and keys: the pattern is recomputed with the patched q or k, the gradient taken there (AtP*) |
| atp_star | qk_fix and graddrop together: AtP* |

1. `attribute` scores nodes, `attribute_edges` the edges from what writes to the residual stream to what reads it
   (edge attribution patching, Syed et al. 2023).
2. Gradients begin at the first hook point that is asked for, never at a weight.
3. `compare_with_patching` patches a sample exactly and says how far the estimates can be trusted.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor, nn
from transformer_lens import ActivationCache

from mmlens.cache import is_batched, is_packed
from mmlens.families.anatomy import AttentionParts, Projection, scale_of
from mmlens.heads import HeadScores
from mmlens.hook_names import block, unknown_name_message
from mmlens.hooked_vlm import Hook, HookedVLM
from mmlens.metrics.effects import Metric
from mmlens.prompt import Prompt
from mmlens.taps import weight_of
from mmlens.weights import reads_latent

Source: TypeAlias = Prompt | ActivationCache | Mapping[str, Tensor]
"""Where patched activations come from: a prompt of equal token layout, or its activations by hook point."""

METHODS = ("gradient", "integrated", "integrated_activation", "graddrop", "qk_fix", "atp_star")
EDGE_METHODS = ("gradient", "integrated")
UNSIGNED = ("graddrop", "atp_star")
"""Methods whose scores are sizes: mean absolute values, without a sign."""

_LAYER_NODES = {
    "head": "attn.hook_z",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "attention": "hook_attn_out",
    "mlp": "hook_mlp_out",
    "residual": "hook_resid_pre",
}
_MODEL_NODES = {"embed": "hook_embed", "image": "image.hook_embed"}
NODES = (*_LAYER_NODES, *_MODEL_NODES)
"""Words for nodes: heads (z), their q, k and v (k and v by KV head), attention and MLP outputs, the residual stream
into every layer and out of the last, all embeddings, image embeddings."""

SENDERS = ("embed", "image", "head", "attention", "mlp", "deepstack")
RECEIVERS = ("q", "k", "v", "attention", "mlp", "logits")

_PER_HEAD = re.compile(r"hook_(rot_)?[qkvz]$|hook_result$")
_SQUARE = re.compile(r"hook_(attn_scores|pattern)$")
_ON_STREAM = re.compile(r"hook_(resid_\w+|deepstack)$")
_SENDER_CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True, eq=False)
class Attribution:
    """A score for every node and example: an estimate of metric(node patched) - metric(clean), in the metric's unit.

    `scores` maps a hook point to [example, position, head]; without a position axis where nodes are whole
    activations (`by_position` False), without a head axis where the hook point has none. k and v have KV heads. NaN:
    there is no such node (padding; text, for a hook point of image tokens). Positions of vision.* and projector.*
    count rows in the tower's own order, image by image. Scores of "graddrop" and "atp_star" are sizes (`is_signed`).
    """

    scores: dict[str, Float[Tensor, "*node"]]
    method: str
    by_position: bool
    heads_per_layer: tuple[int, ...]

    @property
    def is_signed(self) -> bool:
        return self.method not in UNSIGNED

    @property
    def n_examples(self) -> int:
        return len(next(iter(self.scores.values())))

    def __repr__(self) -> str:
        return f"Attribution({self.method}: {len(self.scores)} hook points, {self.n_examples} examples)"

    def table(self) -> pd.DataFrame:
        """One row per node and example: hook, layer, head, position (<NA> where there is none), example, score."""
        frames = []
        for name, scores in self.scores.items():
            index = torch.nonzero(~scores.isnan())
            columns: dict[str, Any] = {"hook": name, "layer": _layer_of(name), "head": None, "position": None}
            axes = self._axes(scores, name)
            columns |= {axis: index[:, 1 + i].numpy() for i, axis in enumerate(axes)}
            columns |= {"example": index[:, 0].numpy(), "score": scores[tuple(index.T)].numpy()}
            frames.append(pd.DataFrame(columns, index=range(len(index))))
        table = pd.concat([frame for frame in frames if len(frame)] or frames[:1], ignore_index=True)
        return table.astype(dict.fromkeys(("layer", "head", "position"), "Int64"))

    def heads(self, node: str = "head") -> HeadScores:
        """The scores of every head ("head", "q") as `HeadScores`, for rankings, sets and maps.

        Raises ValueError for scores by position, for "k" and "v" under grouped queries (they have KV heads), and where
        these nodes were not scored.
        """
        if node not in ("head", "q", "k", "v"):
            raise ValueError(unknown_name_message("head node", node, ("head", "q", "k", "v")))
        if self.by_position:
            raise ValueError("these scores are by position; a head's one score takes by_position=False")
        found = {}
        for name, scores in self.scores.items():
            layer = _layer_of(name)
            if layer is not None and name == block(layer, _LAYER_NODES[node]):
                found[layer] = scores
        if not found:
            raise ValueError(f"{node!r} was not scored, only {list(self.scores)[:5]}")
        per_layer = self.heads_per_layer
        if node in ("k", "v") and any(own.shape[1] != per_layer[layer] for layer, own in found.items()):
            raise ValueError(
                f"{node!r} has one score per KV head, which several heads share: read scores or table()"
            )
        grid = torch.full((self.n_examples, len(per_layer), max(per_layer)), torch.nan)
        for layer, own in found.items():
            grid[:, layer, : own.shape[1]] = own
        missing = [layer for layer, count in enumerate(per_layer) if count and layer not in found]
        if missing:
            raise ValueError(f"{node!r} was scored in some layers only, not in {missing}")
        return HeadScores(grid, name=f"attribution ({self.method})", heads_per_layer=per_layer)

    def _axes(self, scores: Tensor, name: str) -> list[str]:
        """The names of the axes behind the first."""
        has_head = bool(_PER_HEAD.search(name) or _SQUARE.search(name))
        return ["position"] * self.by_position + ["head"] * has_head


@torch.inference_mode(False)
def attribute(
    model: HookedVLM,
    prompt: Prompt,
    source: Source,
    metric: Metric,
    *,
    nodes: str | Callable[[str], bool] | Sequence[str] = ("head", "mlp"),
    method: str = "gradient",
    steps: int = 8,
    by_position: bool = False,
    logits_to_keep: int = 1,
) -> Attribution:
    """Estimate for every node, and every example, what patching it from `source` would do to `metric`.

    A positive score: the metric rises when the node takes its source value. `nodes` are words (NODES), hook points by
    name, or a filter of names; vision.* and projector.* take a batch of one prompt. With `by_position` a node is one
    position of an activation (of a pattern: one query row), else all positions at once.

    "integrated" and "integrated_activation" average the gradient at `steps` midpoints. "integrated" moves all of
    `hook_embed`, image embeddings included, and what DeepStack adds. Scores of "integrated_activation" sum, over one
    hook point, to the exact effect of patching all of it, up to the error of the midpoint rule. "graddrop" stops the
    gradient through what attention and MLP of layer l add, for one l at a time, and averages |score| over those l
    that the node does not lie in. Under "qk_fix" each head's pattern is recomputed exactly with the patched q or k
    (with k: all positions together, or each position's alone with `by_position`), times the gradient at the pattern.

    Raises ValueError for a source of another layout, a metric that is no differentiable number per example, a model
    in training mode, and methods where they cannot be exact; UnknownHookError for a node that does not exist.
    No weight gets a gradient. Where a mixture of experts chooses other experts, no gradient knows of it.

    >>> from mmlens import HookedVLM, answer_log_probability, scene_examples
    >>> model = HookedVLM.from_pretrained("micro")
    >>> prompt, source = (model.prompt_examples([e]) for e in scene_examples("objects", 2, seed=0))
    >>> attribution = attribute(model, prompt, source, answer_log_probability)
    >>> attribution.heads().per_example.shape == (1, model.cfg.n_layers, model.cfg.n_heads)
    True
    """
    _check_choice("attribution method", method, METHODS)
    names = _node_names(model, nodes)
    _check_run(model, prompt, metric, method, steps)
    fixed = _fixed_layers(model, names) if method in ("qk_fix", "atp_star") else {}
    if method == "integrated" and any(not _is_language(name) for name in names):
        raise ValueError(
            "'integrated' moves the embeddings behind the vision tower, so it has no scores of vision.* and "
            "projector.*; take 'integrated_activation'"
        )
    if any(not _is_language(name) for name in names) and len(prompt) > 1:
        raise ValueError(
            f"vision.* and projector.* take a batch of one prompt, this one has {len(prompt)}: towers lay out images "
            "and tiles without saying whose they are"
        )
    plain = [name for name in names if name not in fixed]
    inside = [block(layer, hook) for layer in sorted(set(fixed.values())) for hook in _FIX_HOOKS]
    recorded = list(dict.fromkeys([*plain, *inside]))
    rotated = [block(layer, hook) for layer in sorted(set(fixed.values())) for hook in _FIX_HOOKS[:2]]
    sources = _source_values(model, prompt, source, [*plain, *rotated], logits_to_keep)
    if method.startswith("integrated") and all(map(_is_language, names)):
        prompt, source = _encoded(model, prompt), _encoded(model, source)
    run = _Runs(model, prompt, metric, logits_to_keep)
    whose = _Whose(model, prompt, by_position)

    def scored(values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scores = {}
        for name in values:
            if name in plain:
                change = sources[name].to(gradients[name].device).float() - values[name].float()
                scores[name] = whose.reduce(name, change * gradients[name].float())
        for name in fixed:
            scores[name] = _pattern_score(model, name, values, sources, gradients, by_position)
            if by_position:
                scores[name].masked_fill_(_padding(prompt)[..., None], torch.nan)
        return scores

    def graphs_along(name: str) -> Iterator[_Graph]:
        for i in range(steps):
            yield run.forward([name], sources, [(name, _towards(sources[name], (i + 0.5) / steps))])

    if method in ("gradient", "qk_fix"):
        graph = run.forward(recorded, sources)
        scores = scored(graph.values, graph.gradients())
    elif method in ("graddrop", "atp_star"):
        graph = run.forward(recorded, sources, drops=_contributions(model))
        scores = _dropped(model, graph, scored, names)
    else:
        clean = _source_values(model, prompt, prompt, names, logits_to_keep)
        if method == "integrated":
            graphs = run.along_embeddings(source, names, sources, steps)
            scores = _mean(scored(clean, graph.gradients()) for graph in graphs)
        else:
            scores = {}
            for name in names:
                only = {name: clean[name]}
                scores |= _mean(scored(only, graph.gradients()) for graph in graphs_along(name))
    return Attribution({name: scores[name] for name in names}, method, by_position, model.heads_per_layer)


# ---------------------------------------------------------------------- runs with gradients


@contextmanager
def _frozen(model: HookedVLM) -> Iterator[None]:
    """Gradients on, but of no weight; every weight's own setting is restored."""
    trained = [weight for weight in model.hf_model.parameters() if weight.requires_grad]
    try:
        for weight in trained:
            weight.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


@dataclass(eq=False)
class _Graph:
    """One forward pass whose metric can be differentiated at the recorded hook points."""

    metric: Tensor
    tensors: dict[str, Tensor]
    values: dict[str, Tensor]
    dropping: list[int]

    def gradients(self, *, keep: bool = False) -> dict[str, Tensor]:
        found = torch.autograd.grad(
            self.metric, list(self.tensors.values()), allow_unused=True, retain_graph=keep
        )
        return {
            name: torch.zeros_like(self.values[name]) if gradient is None else gradient
            for name, gradient in zip(self.tensors, found, strict=True)
        }


@dataclass
class _Runs:
    """Forward passes of one prompt with a graph behind chosen hook points."""

    model: HookedVLM
    prompt: Prompt
    metric: Metric
    logits_to_keep: int

    def forward(
        self,
        names: Sequence[str],
        like: Mapping[str, Tensor],
        edits: Sequence[Hook] = (),
        drops: Mapping[str, int] | None = None,
    ) -> _Graph:
        """Run with `edits`, and record `names`. `drops` says which hook points pass no gradient while their layer
        stands in the graph's `dropping`. `like` has the shapes that the recorded values must have."""
        tensors: dict[str, Tensor] = {}
        dropping: list[int] = []

        def record(x: Tensor, hook: Any) -> Tensor | None:
            if hook.name in tensors:
                raise ValueError(
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
        for name, layer in (drops or {}).items():
            hooks.append((name, partial(drop, layer=layer)))
        with _frozen(self.model):
            logits = self.model.run_with_hooks(
                self.prompt, fwd_hooks=hooks, logits_to_keep=self.logits_to_keep
            )
            for name in like.keys() & tensors.keys():
                _check_shape(name, like[name], tensors[name])
            measured = self.metric(logits, self.prompt)
            _check_measured(measured, self.prompt)
            if not measured.requires_grad:
                raise ValueError(
                    "the metric has no gradient at these nodes: it is not differentiable (an argmax, a detached "
                    "tensor), or none of them reaches the logits"
                )
            total = measured.sum()
        return _Graph(total, tensors, {name: x.detach() for name, x in tensors.items()}, dropping)

    def along_embeddings(
        self, source: Source, names: Sequence[str], like: Mapping[str, Tensor], steps: int
    ) -> Iterator[_Graph]:
        """Graphs at the midpoints of `steps` equal parts of the way from clean to source embeddings."""
        if not isinstance(source, Prompt):
            raise ValueError(
                "'integrated' takes a Prompt as its source, whose logits prove that the path ends there"
            )
        model = self.model
        moved = [name for name in model.hook_dict if name == "hook_embed" or name.endswith("hook_deepstack")]
        if not _has_images(model, self.prompt):
            moved = ["hook_embed"]
        ends = _source_values(model, self.prompt, source, moved, self.logits_to_keep)

        def edits(part: float) -> list[Hook]:
            return [(name, _towards(ends[name], part)) for name in moved]

        self._check_end(source, edits(1.0))
        for i in range(steps):
            yield self.forward(names, like, edits((i + 0.5) / steps))

    @torch.no_grad()
    def _check_end(self, source: Prompt, edits: Sequence[Hook]) -> None:
        """Raise ValueError where the source's embeddings in the prompt's run do not give the source's logits."""

        def logits(prompt: Prompt, hooks: Sequence[Hook]) -> Tensor:
            out = self.model.run_with_hooks(prompt, fwd_hooks=hooks, logits_to_keep=self.logits_to_keep)
            return out.float()

        clean, there, end = logits(self.prompt, ()), logits(source, ()), logits(self.prompt, edits)
        rounding = 1e-4 if self.model.cfg.dtype == torch.float32 else 2e-2
        if (end - there).norm() > 0.02 * (there - clean).norm() + rounding * there.norm():
            raise ValueError(
                f"'integrated' cannot reach the source: {self.model.family.model_type!r} takes more from its inputs "
                "than the embeddings that enter its first layer; take 'integrated_activation'"
            )


def _towards(end: Tensor, part: float) -> Callable[..., Tensor]:
    """A hook that moves an activation `part` of the way to `end`."""

    def edit(x: Tensor, hook: Any) -> Tensor:
        _check_shape(hook.name, end, x)
        target = end.to(x.device)
        return target.clone() if part == 1 else x + part * (target - x)

    return edit


@torch.no_grad()
def _source_values(
    model: HookedVLM, prompt: Prompt, source: Source, names: Sequence[str], logits_to_keep: int
) -> dict[str, Tensor]:
    """The source's activations at the hook points."""
    names = list(dict.fromkeys(names))
    if isinstance(source, Prompt):
        _check_layout(prompt, source)
        _, cache = model.run_with_cache(source, names_filter=names, logits_to_keep=logits_to_keep)
        return {name: cache[name] for name in names}
    given = source.cache_dict if isinstance(source, ActivationCache) else source
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(f"the source holds no {missing[:3]}, of {len(missing)} activations that it lacks")
    return {name: given[name].detach() for name in names}


def _check_shape(name: str, source: Tensor, own: Tensor) -> None:
    if source.shape != own.shape:
        raise ValueError(
            f"the source's {name} has shape {list(source.shape)}, the prompt's {list(own.shape)}: patching takes a "
            "source of equal layout"
        )


def _check_layout(prompt: Prompt, source: Prompt) -> None:
    own, other = prompt.token_map, source.token_map
    if prompt.shape != source.shape:
        raise ValueError(
            f"the source's tokens are [batch, pos] = {list(source.shape)}, the prompt's {list(prompt.shape)}: patching "
            "position by position takes a source of equal layout"
        )
    for name in ("is_padding", "is_image", "image", "tile", "row", "col"):
        differ = getattr(own, name).cpu() != getattr(other, name).cpu()
        if bool(differ.any()):
            example, position = differ.nonzero()[0].tolist()
            raise ValueError(
                f"source and prompt differ in layout: {name} at position {position} of example {example}"
            )


def _check_choice(kind: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        raise ValueError(unknown_name_message(kind, given, known))


def _check_run(model: HookedVLM, prompt: Prompt, metric: Metric, method: str, steps: int) -> None:
    if not isinstance(prompt, Prompt):
        raise TypeError(f"attribution takes a Prompt, not {type(prompt).__name__}")
    if model.hf_model.training:
        raise ValueError(
            "the model is in training mode, where dropout changes every run: call hf_model.eval()"
        )
    if not callable(metric):
        raise TypeError(f"the metric is a function of (logits, prompt), not {type(metric).__name__}")
    if steps < 1:
        raise ValueError(f"steps is at least 1, not {steps}")
    if method in UNSIGNED and not model.family.adds:
        raise ValueError(
            f"layers of {model.family.model_type!r} do more than add to the stream, so {method!r} cannot drop one"
        )


def _check_measured(values: Any, prompt: Prompt) -> None:
    if not isinstance(values, Tensor) or tuple(values.shape) != (len(prompt),):
        given = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"the metric gives one number per example, a tensor of shape [{len(prompt)}], not {given}"
        )
    if bool(values.isnan().any()):
        raise ValueError(f"the metric is NaN for example {int(values.isnan().nonzero()[0])} of the batch")


def _checked(name: str, scores: Tensor) -> Tensor:
    if not bool(scores.isfinite().all()):
        raise ValueError(f"scores of {name} are not finite: its activations or gradients overflow")
    return scores


def _mean(parts: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    count = 0
    for part in parts:
        total = {name: value + total.get(name, 0.0) for name, value in part.items()}
        count += 1
    return {name: value / count for name, value in total.items()}


# ---------------------------------------------------------------------- nodes


def _layer_of(name: str) -> int | None:
    found = re.match(r"blocks\.(\d+)\.", name)
    return int(found[1]) if found else None


def _is_language(name: str) -> bool:
    return is_batched(name) or is_packed(name)


def _node_names(model: HookedVLM, nodes: str | Callable[[str], bool] | Sequence[str]) -> list[str]:
    names: list[str] = []
    for node in [nodes] if isinstance(nodes, str) or callable(nodes) else list(nodes):
        if isinstance(node, str) and node in NODES:
            names += _names_of(model, node)
        elif isinstance(node, str) and node not in model.hook_dict:
            _check_choice("node or hook point", node, [*NODES, *model.hook_dict])
        else:
            names += model.hook_names(node)
    if not names:
        raise ValueError("no nodes given")
    inputs = [name for name in names if name.endswith("_input")]
    if inputs:
        raise ValueError(
            f"{inputs[0]} is a receiver of edges: attribute_edges scores what heads read, sender by sender"
        )
    return list(dict.fromkeys(names))


def _names_of(model: HookedVLM, word: str) -> list[str]:
    """The hook points that a word for nodes means in this model."""
    if word in _MODEL_NODES:
        return model.hook_names(_MODEL_NODES[word])
    layers = range(model.cfg.n_layers)
    names = [block(layer, _LAYER_NODES[word]) for layer in layers]
    if word == "residual":
        names.append(block(layers[-1], "hook_resid_post"))
    found = [name for name in names if name in model.hook_dict]
    return found or model.hook_names(names[0])


def _encoded(model: HookedVLM, source: Any) -> Any:
    """A prompt with its tower run once for all runs, unless a hook of the user's own acts there."""
    watched = any(point.is_live for name, point in model.hook_dict.items() if not _is_language(name))
    return model.encode_images(source) if isinstance(source, Prompt) and not watched else source


def _has_images(model: HookedVLM, prompt: Prompt) -> bool:
    mask = model.image_mask(prompt)
    return mask is not None and bool(mask.any())


def _padding(prompt: Prompt) -> Bool[Tensor, "batch pos"]:
    return prompt.token_map.is_padding.cpu()


@dataclass
class _Whose:
    """Which axis of an activation is which, to sum it to one score per node and to patch one node of it."""

    model: HookedVLM
    prompt: Prompt
    by_position: bool

    def reduce(self, name: str, product: Tensor) -> Float[Tensor, "*node"]:
        """Sums of elements: [example, position, head], less the axes that the node does not have."""
        example, positions, head = self._axes(name, product.ndim)
        kept = [axis for axis in (example, *positions, head) if axis is not None]
        summed = [axis for axis in range(product.ndim) if axis not in kept]
        # A product with nothing summed has no axes left to name; sum(()) would sum them all.
        x = product.sum(summed) if summed else product
        order = sorted(kept)
        x = _checked(name, x.permute([order.index(axis) for axis in kept]).cpu())
        if is_packed(name):
            return self._of_examples(x)
        if example is None:
            x = x[None]
        elif self.by_position:
            hidden = _padding(self.prompt)
            x = x.masked_fill(hidden if head is None else hidden[..., None], torch.nan)
        if self.by_position and len(positions) > 1:
            x = x.flatten(1, len(positions))
        return x

    def patched(self, name: str, x: Tensor, source: Tensor, place: Mapping[str, Any]) -> Tensor:
        """The activation with one node, at a "position" and "head" where it has them, taken from `source`."""
        _, positions, head = self._axes(name, x.ndim)
        index: list[Any] = [slice(None)] * x.ndim
        if "position" in place and is_packed(name):
            mask = self._image_mask()
            rows = torch.zeros_like(mask)
            rows[:, place["position"]] = True
            index[0] = rows[mask].to(x.device)
        elif "position" in place:
            sizes = [x.shape[axis] for axis in positions]
            for axis, at in zip(positions, np.unravel_index(place["position"], sizes), strict=True):
                index[axis] = int(at)
        if head is not None:
            index[head] = place["head"]
        x = x.clone()
        x[tuple(index)] = source.to(x)[tuple(index)]
        return x

    def _axes(self, name: str, ndim: int) -> tuple[int | None, tuple[int, ...], int | None]:
        """The axes of example, positions (none where nodes are whole activations) and head."""
        square = bool(_SQUARE.search(name))
        head = ndim - 3 if square else ndim - 2 if _PER_HEAD.search(name) else None
        example: int | None = None
        if is_packed(name):
            positions: tuple[int, ...] = (0,)
        elif is_batched(name):
            example, position = 0, 2 if square else 1
            stream = self.model.family.stream.strip("[]").split(", ")
            if re.search(r"hook_(resid_pre|resid_post|embed)$", name) and len(stream) == ndim:
                example, position = stream.index("batch"), stream.index("pos")
            positions = (position,)
        else:
            if square and self.by_position:
                raise ValueError(f"{name} has no scores by position; take by_position=False")
            positions = tuple(axis for axis in range(ndim - 1) if axis != head)
        return example, positions if self.by_position or is_packed(name) else (), head

    def _image_mask(self) -> Bool[Tensor, "batch pos"]:
        mask = self.model.image_mask(self.prompt)
        assert mask is not None
        return mask.cpu()

    def _of_examples(self, rows: Tensor) -> Tensor:
        """Scores of image tokens, laid over the positions or summed for each example."""
        mask = self._image_mask()
        if self.by_position:
            full = torch.full((*mask.shape, *rows.shape[1:]), torch.nan, dtype=rows.dtype)
            full[mask] = rows
            return full
        owner = torch.nonzero(mask)[:, 0]
        sums = torch.zeros(len(mask), *rows.shape[1:], dtype=rows.dtype).index_add(0, owner, rows)
        sums[~mask.any(1)] = torch.nan
        return sums


# ---------------------------------------------------------------------- GradDrop


def _contributions(model: HookedVLM) -> dict[str, int]:
    """What each layer adds to the stream: hook point -> layer."""
    found: dict[str, int] = {}
    for layer in range(model.cfg.n_layers):
        own = [block(layer, hook) for hook in ("hook_attn_out", "hook_mlp_out")]
        present = [name for name in own if name in model.hook_dict]
        if not present:
            raise ValueError(
                f"layer {layer} has neither hook_attn_out nor hook_mlp_out, so GradDrop cannot drop it"
            )
        found |= dict.fromkeys(present, layer)
    return found


def _dropped(
    model: HookedVLM,
    graph: _Graph,
    scored: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]],
    names: Sequence[str],
) -> dict[str, Tensor]:
    """The mean of |score| over backward passes that leave one layer out: never the layer whose branch a node is in."""
    totals: dict[str, Tensor] = {}
    counts = dict.fromkeys(names, 0)
    for layer in range(model.cfg.n_layers):
        graph.dropping[:] = [layer]
        scores = scored(graph.values, graph.gradients(keep=layer + 1 < model.cfg.n_layers))
        for name in names:
            if _layer_of(name) == layer and not _ON_STREAM.search(name):
                continue
            totals[name] = scores[name].abs() + totals.get(name, 0.0)
            counts[name] += 1
    if len(totals) < len(names):
        raise ValueError("GradDrop needs a model of at least two layers")
    return {name: totals[name] / counts[name] for name in names}


# ---------------------------------------------------------------------- the QK fix


_FIX_HOOKS = ("attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_attn_scores", "attn.hook_pattern")


def _fixed_layers(model: HookedVLM, names: Sequence[str]) -> dict[str, int]:
    """The language side's queries and keys among the nodes: hook point -> layer."""
    found = {}
    for name in names:
        layer = _layer_of(name)
        if layer is None or not re.search(r"\.attn\.hook_[qk]$", name):
            continue
        attention = _attention(model, layer)
        if "k" not in attention.projections or model._shares_keys:
            raise ValueError(
                f"the QK fix of {name} is refused: layers of {model.family.model_type!r} share keys, so a key acts in "
                "several patterns"
            )
        if any(
            reads_latent(attention, attention.projections[role])
            for role in ("q", "k") & attention.projections.keys()
        ):
            raise ValueError(
                f"the QK fix of {name} is refused: under latent attention hook_k is only a part of the keys"
            )
        found[name] = layer
    return found


def _attention(model: HookedVLM, layer: int) -> AttentionParts:
    attention = model.anatomy.language[layer].attention
    if attention is None:
        raise ValueError(f"layer {layer} has no softmax attention")
    return attention


@torch.no_grad()
def _pattern_score(
    model: HookedVLM,
    name: str,
    values: Mapping[str, Tensor],
    sources: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    by_position: bool,
) -> Float[Tensor, "*node"]:
    """AtP*'s QK fix: sum over (query, key) of (pattern with the patched q or k - pattern) * gradient at the pattern.

    With k by position, each key is patched alone, in every row that sees it.
    """
    layer = _layer_of(name)
    assert layer is not None
    rot_q, rot_k, scores, pattern = (values[block(layer, hook)].float() for hook in _FIX_HOOKS)
    new_q, new_k = (
        sources[block(layer, hook)].to(rot_q.device).float()
        for hook in ("attn.hook_rot_q", "attn.hook_rot_k")
    )
    gradient = gradients[block(layer, "attn.hook_pattern")].float()
    allowed = (scores > torch.finfo(values[block(layer, "attn.hook_attn_scores")].dtype).min / 2) & (
        pattern.sum(-1, keepdim=True) > 0
    )
    factor = _score_factor(model, layer, _products(rot_q, rot_k), scores, pattern, allowed)
    n_groups = rot_k.shape[2]
    if name.endswith("hook_q"):
        moved = factor * _products(new_q - rot_q, rot_k)
        change = (_softmax(scores + moved, allowed) - _softmax(scores, allowed)) * gradient
        score = change.sum(-1).transpose(1, 2) if by_position else change.sum((-1, -2))
        return _checked(name, score.cpu())
    moved = (factor * _products(rot_q, new_k - rot_k)).masked_fill(~allowed, 0.0)
    if by_position:
        share = _key_changes(scores, moved, gradient, allowed).sum(-2)
        return _checked(name, share.unflatten(1, (n_groups, -1)).sum(2).transpose(1, 2).cpu())
    change = ((_softmax(scores + moved, allowed) - _softmax(scores, allowed)) * gradient).sum((-1, -2))
    return _checked(name, change.unflatten(1, (n_groups, -1)).sum(2).cpu())


def _key_changes(scores: Tensor, moved: Tensor, gradient: Tensor, allowed: Tensor) -> Tensor:
    """How sum_j p_j g_j of each row changes when one key's score alone has moved, for every key.

    The key's probability goes from p to p', and the others keep their proportions: (p' - p) (g - mean of g over the
    others). Sums over the others leave the row's largest score out before they are taken, so that a row which attends
    to one key alone answers exactly too.
    """
    top, at = scores.double().masked_fill(~allowed, -torch.inf).max(-1, keepdim=True)
    logits = (scores.double() - top).masked_fill(~allowed, -torch.inf).nan_to_num(nan=-torch.inf)
    weights = logits.exp()
    below = weights.scatter(-1, at, 0.0)
    gradient = gradient.double()

    def of_others(values: Tensor) -> Tensor:
        behind = (below * values).sum(-1, keepdim=True)
        rest = behind + values.gather(-1, at) - weights * values
        return rest.scatter(-1, at, behind)

    others, total = of_others(torch.ones_like(weights)), 1 + below.sum(-1, keepdim=True)
    mean = torch.where(others > 0, of_others(gradient) / others, gradient)
    # 1 - p and 1 - p', which stay exact where p is 1 but for rounding.
    stays = (others.log() - logits - moved.double()).sigmoid()
    change = (others / total - stays) * (gradient - mean)
    return change.masked_fill(~allowed, 0.0).to(scores.dtype)


def _products(
    q: Float[Tensor, "batch query head d_head"], k: Float[Tensor, "batch key kv_head d_head"]
) -> Float[Tensor, "batch head query key"]:
    """q . k of every head, each with its group's keys."""
    grouped = q.unflatten(2, (k.shape[2], -1))
    return torch.einsum("bqgrd,bkgd->bgrqk", grouped, k).flatten(1, 2)


def _softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    p = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return p.masked_fill(~allowed, 0.0)


def _score_factor(
    model: HookedVLM, layer: int, products: Tensor, scores: Tensor, pattern: Tensor, allowed: Tensor
) -> float:
    """What q . k is multiplied by. Raises ValueError where scores and pattern are more than softmax(factor q . k)."""
    x, y = products[allowed].double(), scores[allowed].double()
    factor = float((x * y).sum() / (x * x).sum())
    exact = model.cfg.dtype == torch.float32
    off = float((y - factor * x).norm() / y.norm())
    spread = float((_softmax(scores, allowed) - pattern).abs().max())
    if off > (1e-4 if exact else 3e-2) or spread > (1e-4 if exact else 3e-2):
        raise ValueError(
            f"the QK fix is refused in layer {layer}: its pattern is not softmax(factor * q k) (a softcap, a learnt "
            "sink or a position bias stands there); take method='gradient' for q and k"
        )
    return factor


# ---------------------------------------------------------------------- edges


@dataclass(frozen=True)
class Site:
    """One end of an edge: what writes to the residual stream, or what reads it.

    `kind` is a word of SENDERS or RECEIVERS; `head` is a KV head where the kind is "k" or "v".

    >>> print(Site("head", 1, 3), Site("k", 2, 0), Site("mlp", 0), Site("logits"))
    L1H3 L2KV0.k L0.mlp logits
    """

    kind: str
    layer: int | None = None
    head: int | None = None

    def __str__(self) -> str:
        if self.layer is None:
            return self.kind
        if self.head is None:
            return f"L{self.layer}.{self.kind}"
        group = "KV" if self.kind in ("k", "v") else "H"
        suffix = "" if self.kind == "head" else f".{self.kind}"
        return f"L{self.layer}{group}{self.head}{suffix}"

    @property
    def time(self) -> int:
        """When it acts in the forward pass: an edge leads from an earlier site to a later one."""
        if self.layer is None:
            return 10**9 if self.kind == "logits" else -1
        step = {"mlp": 1, "deepstack": 2}.get(self.kind, 0)
        return 3 * self.layer + step


@dataclass(frozen=True, eq=False)
class EdgeAttribution:
    """A score for every edge and example, [example, sender, receiver]; NaN where the sender acts after the receiver.

    A score estimates metric - clean metric when only this receiver reads the sender's source value, in the metric's
    unit, summed over positions.
    """

    scores: Float[Tensor, "example sender receiver"]
    senders: tuple[Site, ...]
    receivers: tuple[Site, ...]
    method: str

    @property
    def is_signed(self) -> bool:
        return True

    @property
    def n_examples(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        n = int((~self.scores[0].isnan()).sum())
        return f"EdgeAttribution({self.method}: {n} edges, {self.n_examples} examples)"

    def table(self) -> pd.DataFrame:
        """One row per edge and example: sender, receiver, example, score."""
        index = torch.nonzero(~self.scores.isnan())
        return pd.DataFrame(
            {
                "sender": [str(self.senders[i]) for i in index[:, 1].tolist()],
                "receiver": [str(self.receivers[i]) for i in index[:, 2].tolist()],
                "example": index[:, 0].numpy(),
                "score": self.scores[tuple(index.T)].numpy(),
            }
        )


@torch.inference_mode(False)
def attribute_edges(
    model: HookedVLM,
    prompt: Prompt,
    source: Source,
    metric: Metric,
    *,
    senders: str | Sequence[str] = ("embed", "head", "mlp", "deepstack"),
    receivers: str | Sequence[str] = ("q", "k", "v", "mlp", "logits"),
    method: str = "gradient",
    steps: int = 8,
    logits_to_keep: int = 1,
) -> EdgeAttribution:
    """Estimate for every edge what patching it from `source` would do to `metric` (Syed et al. 2023).

    score(sender -> receiver) = sum over positions of (what the sender writes in the source - in the clean run) . d
    metric / d (what the receiver reads), the stream before the receiver's norm. A head's write is z W_O, in the unit of
    the stream: behind a post-norm it is taken through the norm's derivative at the clean activations, and times the
    layer's factor. Over all receivers ("q", "k", "v", "mlp", "logits") the edges of a sender sum to its node score, as
    long as all layers' attention reads by q, k and v alone: not where heads are gated or a layer has another
    mixer of positions, for which "attention" is the receiver (all that ln1 feeds).

    `senders` are words of SENDERS ("image": image embeddings, "embed": all embeddings, those included; "deepstack":
    deep image features, left out where a model has none), `receivers` of RECEIVERS; q by head, k and v by KV head.
    "integrated" averages over `steps` points between clean and source embeddings (EAP-IG), as in `attribute`.

    Raises ValueError where the layers do more than add to the stream, for attention output projections that are not
    linear, and as `attribute`; UnknownHookError where the model lacks the hook points of a sender or receiver.
    """
    _check_choice("method for edges", method, EDGE_METHODS)
    _check_run(model, prompt, metric, method, steps)
    if not model.family.adds:
        raise ValueError(
            f"layers of {model.family.model_type!r} do more than add to the stream, so no edge leads from one write "
            "to one reader"
        )
    sites = _Sites.of(model, prompt, senders, receivers)
    prompt, source = _encoded(model, prompt), _encoded(model, source)
    sources = _source_values(model, prompt, source, sites.written, logits_to_keep)
    clean = _source_values(model, prompt, prompt, sites.written, logits_to_keep)
    run = _Runs(model, prompt, metric, logits_to_keep)
    names = list(dict.fromkeys([*sites.written, *sites.read]))
    before_norms: dict[int, Tensor] = {}
    changes = {name: sources[name].to(clean[name].device).float() - clean[name].float() for name in clean}

    def scored(graph: _Graph) -> dict[str, Tensor]:
        return {"": _edge_scores(model, prompt, sites, changes, graph, before_norms)}

    with _watched_norms(model, sites, before_norms):
        if method == "gradient":
            scores = scored(run.forward(names, sources))
        else:
            scores = _mean(scored(graph) for graph in run.along_embeddings(source, names, sources, steps))
    return EdgeAttribution(
        _checked("edges", scores[""]).masked_fill(~sites.edges, torch.nan), *sites.ends, method
    )


@dataclass
class _Sites:
    """Senders and receivers in the order in which they act, and the hook points that show them."""

    senders: tuple[Site, ...]
    receivers: tuple[Site, ...]
    written: list[str]
    """Hook points of what the senders write (heads: their z)."""
    read: list[str]
    """Hook points whose gradients give those at the receivers."""

    @property
    def ends(self) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        return self.senders, self.receivers

    @property
    def edges(self) -> Bool[Tensor, "sender receiver"]:
        return torch.tensor([[s.time < r.time for r in self.receivers] for s in self.senders])

    @classmethod
    def of(
        cls, model: HookedVLM, prompt: Prompt, senders: str | Sequence[str], receivers: str | Sequence[str]
    ) -> _Sites:
        sending = [
            site for word in _words("sender", senders, SENDERS) for site in _senders(model, prompt, word)
        ]
        reading = [
            site for word in _words("receiver", receivers, RECEIVERS) for site in _receivers(model, word)
        ]
        if not sending or not reading:
            raise ValueError("edges need at least one sender and one receiver")
        sending.sort(key=lambda site: site.time)
        reading.sort(key=lambda site: site.time)
        written = [_written_at(site) for site in sending]
        read = [name for site in reading for name in _read_at(model, site)]
        return cls(tuple(sending), tuple(reading), list(dict.fromkeys(written)), list(dict.fromkeys(read)))


def _words(kind: str, given: str | Sequence[str], known: Sequence[str]) -> list[str]:
    words = [given] if isinstance(given, str) else list(dict.fromkeys(given))
    for word in words:
        _check_choice(f"{kind} of edges", word, known)
    return words


def _senders(model: HookedVLM, prompt: Prompt, word: str) -> list[Site]:
    if word in ("embed", "image"):
        model.hook_names(_MODEL_NODES[word])
        return [Site(word)]
    if word == "deepstack":
        # A prompt without images has none, as most models.
        deep = model.anatomy.deep_after if _has_images(model, prompt) else []
        return [Site("deepstack", layer) for layer in deep]
    layers = [_layer_of(name) for name in _names_of(model, word)]
    if word != "head":
        return [Site(word, layer) for layer in layers]
    sites = []
    for layer in layers:
        assert layer is not None
        attention = _attention(model, layer)
        if not isinstance(attention.out, nn.Linear):
            raise ValueError(
                f"the output projection of layer {layer} is a {type(attention.out).__name__}, not linear: what one "
                "head writes is not defined; take the sender 'attention'"
            )
        sites += [Site("head", layer, head) for head in range(attention.n_heads)]
    return sites


def _receivers(model: HookedVLM, word: str) -> list[Site]:
    if word == "logits":
        return [Site("logits")]
    hook = {"attention": "hook_attn_in", "mlp": "hook_mlp_in"}.get(word, f"attn.hook_{word}_input")
    names = [block(layer, hook) for layer in range(model.cfg.n_layers)]
    layers = [layer for layer, name in enumerate(names) if name in model.hook_dict]
    if not layers:
        model.hook_names(names[0])
    if word in ("attention", "mlp"):
        return [Site(word, layer) for layer in layers]
    sites = []
    for layer in layers:
        attention = _attention(model, layer)
        n_heads = attention.n_heads if word == "q" else attention.n_kv_heads
        sites += [Site(word, layer, head) for head in range(n_heads)]
    return sites


def _written_at(site: Site) -> str:
    if site.layer is None:
        return _MODEL_NODES[site.kind]
    return block(site.layer, {"deepstack": "hook_deepstack", **_LAYER_NODES}[site.kind])


def _read_at(model: HookedVLM, site: Site) -> list[str]:
    if site.layer is None:
        return [block(model.cfg.n_layers - 1, "hook_resid_post")]
    if site.kind == "mlp":
        return [block(site.layer, "hook_mlp_in")]
    stream = block(site.layer, "hook_attn_in")
    return [stream] if site.kind == "attention" else [stream, block(site.layer, f"attn.hook_{site.kind}")]


@contextmanager
def _watched_norms(model: HookedVLM, sites: _Sites, into: dict[int, Tensor]) -> Iterator[None]:
    """Keep what every norm behind a sending head's attention reads, in each run."""
    handles = []
    try:
        for layer in {site.layer for site in sites.senders if site.kind == "head"}:
            assert layer is not None
            norm = model.anatomy.language[layer].post_norm1
            if norm is not None and not isinstance(norm, nn.Identity):

                def keep(module: nn.Module, args: tuple[Any, ...], layer: int = layer) -> None:
                    into[layer] = args[0].detach()

                handles.append(norm.register_forward_pre_hook(keep))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _edge_scores(
    model: HookedVLM,
    prompt: Prompt,
    sites: _Sites,
    changes: Mapping[str, Tensor],
    graph: _Graph,
    before_norms: Mapping[int, Tensor],
) -> Float[Tensor, "example sender receiver"]:
    """Edge scores at one run's activations, a few positions at a time: every step is one position's own."""
    gradients = graph.gradients()
    batch, length = prompt.shape
    d_model = model.cfg.d_model
    width = max(1, _SENDER_CHUNK_BYTES // (4 * batch * len(sites.senders) * d_model))
    scores = torch.zeros(batch, len(sites.senders), len(sites.receivers))
    full = {name: _over_positions(model, prompt, name, change) for name, change in changes.items()}
    by_reader = [
        (kind_layer, list(group))
        for kind_layer, group in itertools.groupby(
            enumerate(sites.receivers), key=lambda item: (item[1].kind, item[1].layer)
        )
    ]
    for start in range(0, length, width):
        here = slice(start, start + width)
        writes = _writes(model, sites, full, before_norms, here)
        for (kind, layer), group in by_reader:
            columns, members = zip(*group, strict=True)
            gradient = _at_receivers(model, members, kind, layer, graph.values, gradients, here)
            n = sum(site.time < members[0].time for site in sites.senders)
            products = torch.einsum("bpsm,bprm->bsr", writes[:, :, :n].to(gradient.device), gradient)
            scores[:, :n, columns[0] : columns[-1] + 1] += products.cpu()
    return scores


def _over_positions(model: HookedVLM, prompt: Prompt, name: str, rows: Tensor) -> Tensor:
    """Rows of image tokens laid over all positions, zeros at text."""
    if not is_packed(name):
        return rows
    mask = model.image_mask(prompt)
    assert mask is not None
    mask = mask.to(rows.device)
    return rows.new_zeros(*mask.shape, *rows.shape[1:]).index_put((mask,), rows)


def _writes(
    model: HookedVLM,
    sites: _Sites,
    changes: Mapping[str, Tensor],
    before_norms: Mapping[int, Tensor],
    here: slice,
) -> Float[Tensor, "batch pos sender d_model"]:
    """How each sender's write changes, to first order where a norm stands behind attention."""
    writes: list[Tensor] = []
    device = next(iter(changes.values())).device
    for name, group in itertools.groupby(sites.senders, key=_written_at):
        members = list(group)
        change = changes[name][:, here]
        if members[0].kind == "head":
            assert members[0].layer is not None
            change = _head_writes(model, members[0].layer, change, before_norms, here)
        else:
            change = change.unsqueeze(2)
        writes.append(change.to(device))
    return torch.cat(writes, dim=2)


def _head_writes(
    model: HookedVLM, layer: int, change: Tensor, before_norms: Mapping[int, Tensor], here: slice
) -> Float[Tensor, "batch pos head d_model"]:
    parts, attention = model.anatomy.language[layer], _attention(model, layer)
    w_o = weight_of(attention.out, change).T.float().unflatten(0, (-1, attention.d_value))
    write = torch.einsum("bphd,hdm->bphm", change, w_o)
    if layer in before_norms:
        assert parts.post_norm1 is not None
        at = before_norms[layer][:, here].unsqueeze(2).expand(-1, -1, write.shape[2], -1).clone()
        write = _derivative(parts.post_norm1, at, write.to(at.dtype)).float()
    scale = scale_of(parts.module, parts.attention_scale)
    return write if scale is None else write * torch.as_tensor(scale, device=write.device).detach().float()


def _derivative(norm: nn.Module, at: Tensor, direction: Tensor) -> Tensor:
    """The norm's derivative along a direction: the gradient of its gradient, which is linear in what it is given."""
    with torch.enable_grad():
        x, weights = at.detach().requires_grad_(), torch.zeros_like(at).requires_grad_()
        backward = torch.autograd.grad(norm.forward(x), x, weights, create_graph=True)[0]
    return torch.autograd.grad(backward, weights, direction)[0]


def _at_receivers(
    model: HookedVLM,
    members: Sequence[Site],
    kind: str,
    layer: int | None,
    values: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    here: slice,
) -> Float[Tensor, "batch pos receiver d_model"]:
    """The metric's gradient at what the receivers read."""
    names = _read_at(model, members[0])
    if kind not in ("q", "k", "v"):
        return gradients[names[-1]][:, here].float().unsqueeze(2)
    assert layer is not None
    norm, projection = model.anatomy.language[layer].norm1, _attention(model, layer).projections[kind]
    assert norm is not None
    return _through_projection(norm, projection, values[names[0]][:, here], gradients[names[1]][:, here])


def _through_projection(
    norm: nn.Module,
    projection: Projection,
    stream: Float[Tensor, "batch pos d_model"],
    gradient: Float[Tensor, "batch pos head d_head"],
) -> Float[Tensor, "batch pos head d_model"]:
    """From the gradient at each head's q, k or v to that at what it reads: back through W and ln1."""
    weight = projection.read(weight_of(projection.module, gradient).T)
    normed = torch.einsum("bphd,mhd->bphm", gradient.float(), weight.float())
    with torch.enable_grad():
        copies = stream.unsqueeze(2).expand(-1, -1, normed.shape[2], -1).clone().requires_grad_()
        out = norm.forward(copies)
    return torch.autograd.grad(out, copies, normed.to(out.dtype))[0].float()


# ---------------------------------------------------------------------- against exact patching


@dataclass(frozen=True, eq=False)
class PatchingComparison:
    """Estimates beside exact patching effects, for a sample of nodes or edges, example by example.

    `table`: what was patched, example, estimate and exact (metric - clean metric). Where estimates are sizes, `exact`
    is one too, and there is no sign to agree on.
    """

    table: pd.DataFrame
    is_signed: bool

    def __repr__(self) -> str:
        sign = f", sign agreement {self.sign_agreement:.2f}" if self.is_signed else ""
        return f"PatchingComparison(Pearson {self.pearson:.3f}, Spearman {self.spearman:.3f}{sign}, n = {self.n})"

    @property
    def n(self) -> int:
        """Pairs of estimate and exact effect: nodes or edges times examples."""
        return len(self.table)

    @property
    def pearson(self) -> float:
        """Pearson's correlation over all pairs; NaN where estimates or effects are all equal."""
        return self._correlation(stats.pearsonr)

    @property
    def spearman(self) -> float:
        """Spearman's rank correlation over all pairs."""
        return self._correlation(stats.spearmanr)

    @property
    def sign_agreement(self) -> float:
        """Share of the pairs with an exact effect other than 0 whose estimate has its sign; NaN for sizes."""
        rows = self.table[self.table["exact"] != 0]
        if not self.is_signed or rows.empty:
            return float("nan")
        return float((np.sign(rows["estimate"]) == np.sign(rows["exact"])).mean())

    def _correlation(self, function: Callable[..., Any]) -> float:
        pairs = [self.table[name].to_numpy(dtype=float) for name in ("estimate", "exact")]
        if self.n < 2 or any(np.ptp(values) == 0 for values in pairs):
            return float("nan")
        return float(function(*pairs).statistic)


@torch.no_grad()
def compare_with_patching(
    model: HookedVLM,
    prompt: Prompt,
    source: Source,
    metric: Metric,
    attribution: Attribution | EdgeAttribution,
    *,
    n: int | None = 64,
    seed: int = 0,
    logits_to_keep: int = 1,
) -> PatchingComparison:
    """Patch `n` nodes or edges, drawn at random by `seed` (None: all of them), exactly, and set the effects beside
    the estimates.

    One run for each node or edge. A node takes its source value and everything behind it follows. Of an edge, only the
    receiver reads the sender's source value; behind a post-norm that is the norm of all heads' sum with this head's
    part exchanged. The arguments must be those of the attribution.

    Raises ValueError for another number of examples than the attribution's, n below 1, and as `attribute`.
    """
    if n is not None and n < 1:
        raise ValueError(f"n is at least 1, or None for all, not {n}")
    _check_run(model, prompt, metric, "gradient", 1)
    if attribution.n_examples != len(prompt):
        raise ValueError(
            f"the attribution is of {attribution.n_examples} example(s), the prompt has {len(prompt)}: pass the same"
        )
    if isinstance(attribution, Attribution):
        places = _node_places(attribution)
    else:
        places = [{"edge": pair} for pair in torch.nonzero(~attribution.scores[0].isnan()).tolist()]
    if n is not None and n < len(places):
        places = [
            places[i] for i in sorted(np.random.default_rng(seed).choice(len(places), n, replace=False))
        ]

    def measured(hooks: Sequence[Hook]) -> Tensor:
        logits = model.run_with_hooks(prompt, fwd_hooks=hooks, logits_to_keep=logits_to_keep)
        values = metric(logits, prompt)
        _check_measured(values, prompt)
        return values.double().cpu()

    if isinstance(attribution, Attribution):
        patches = _node_patches(model, prompt, source, attribution, places, logits_to_keep)
    else:
        patches = _edge_patches(model, prompt, source, attribution, places, logits_to_keep)
    clean = measured([])
    frames = []
    for label, estimates, hooks in patches:
        exact = measured(hooks) - clean
        frame = pd.DataFrame({"estimate": estimates.double().numpy(), "exact": exact.numpy()})
        frame.insert(0, "example", range(len(prompt)))
        frames.append(frame.assign(**label)[[*label, *frame.columns]].loc[(~estimates.isnan()).numpy()])
    table = pd.concat(frames, ignore_index=True)
    if not attribution.is_signed:
        table["exact"] = table["exact"].abs()
    return PatchingComparison(table, attribution.is_signed)


def _node_places(attribution: Attribution) -> list[dict[str, Any]]:
    places = []
    for name, scores in attribution.scores.items():
        axes = attribution._axes(scores, name)
        for index in torch.nonzero((~scores.isnan()).any(0)).tolist() if axes else [[]]:
            places.append({"hook": name, **dict(zip(axes, index, strict=True))})
    return places


Patch = tuple[dict[str, Any], Tensor, list[Hook]]
"""What is patched, the estimate of every example, and the hooks that patch it."""


def _node_patches(
    model: HookedVLM,
    prompt: Prompt,
    source: Source,
    attribution: Attribution,
    places: Sequence[Mapping[str, Any]],
    logits_to_keep: int,
) -> Iterator[Patch]:
    names = [place["hook"] for place in places]
    sources = _source_values(model, prompt, source, names, logits_to_keep)
    whose = _Whose(model, prompt, attribution.by_position)
    for place in places:
        name = place["hook"]

        def patch(x: Tensor, hook: Any, name: str = name, place: Mapping[str, Any] = place) -> Tensor:
            _check_shape(name, sources[name], x)
            return whose.patched(name, x, sources[name], place)

        index = tuple(place[axis] for axis in ("position", "head") if axis in place)
        label = {"hook": name, "position": place.get("position"), "head": place.get("head")}
        yield label, attribution.scores[name][(slice(None), *index)], [(name, patch)]


def _edge_patches(
    model: HookedVLM,
    prompt: Prompt,
    source: Source,
    attribution: EdgeAttribution,
    places: Sequence[Mapping[str, Any]],
    logits_to_keep: int,
) -> Iterator[Patch]:
    senders, receivers = attribution.senders, attribution.receivers
    written = [_written_at(senders[place["edge"][0]]) for place in places]
    sources = _source_values(model, prompt, source, written, logits_to_keep)
    before_norms: dict[int, Tensor] = {}
    with _watched_norms(model, _Sites(senders, receivers, [], []), before_norms):
        clean = _source_values(model, prompt, prompt, written, logits_to_keep)
    changes = {
        name: _over_positions(model, prompt, name, sources[name].to(clean[name].device) - clean[name])
        for name in clean
    }
    for place in places:
        sender, receiver = senders[place["edge"][0]], receivers[place["edge"][1]]
        change = changes[_written_at(sender)]
        if sender.kind == "head":
            change = _exact_head_write(model, sender, change, before_norms)

        def add(x: Tensor, hook: Any, change: Tensor = change, head: int | None = receiver.head) -> Tensor:
            x = x.clone()
            part = x if head is None else x[:, :, head]
            part += change.to(part)
            return x

        name = _read_at(model, receiver)[-1]
        hooks: list[Hook] = [(name if receiver.head is None else f"{name}_input", add)]
        estimates = attribution.scores[:, place["edge"][0], place["edge"][1]]
        yield {"sender": str(sender), "receiver": str(receiver)}, estimates, hooks


def _exact_head_write(
    model: HookedVLM, sender: Site, change: Tensor, before_norms: Mapping[int, Tensor]
) -> Float[Tensor, "batch pos d_model"]:
    layer, head = sender.layer, sender.head
    assert layer is not None and head is not None
    parts, attention = model.anatomy.language[layer], _attention(model, layer)
    w_o = weight_of(attention.out, change).T.unflatten(0, (-1, attention.d_value))[head]
    write = change[:, :, head] @ w_o
    if layer in before_norms:
        assert parts.post_norm1 is not None
        at = before_norms[layer]
        write = parts.post_norm1.forward(at + write) - parts.post_norm1.forward(at)
    scale = scale_of(parts.module, parts.attention_scale)
    return write if scale is None else write * scale
