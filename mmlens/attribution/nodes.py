"""Attribution patching: what patching each node would do to a metric, estimated by gradients.

Exact patching takes one run for every node. The gradient of the metric in the clean run estimates all of them at
once: score(a) = sum over elements of (a_source - a_clean) * d metric / d a, the first-order change of the metric when
activation a is patched from the source run (Nanda 2023, "Attribution Patching").

| method | what takes the place of the clean run's gradient |
|---|---|
| gradient | nothing: one forward, one backward |
| integrated | its mean while `hook_embed` goes from clean to source (EAP-IG, Hanna et al. 2024) |
| integrated_activation | its mean while the hook point itself goes from clean to source (Marks et al. 2024) |
| graddrop | mean size of the estimate while one layer after another passes no gradient (AtP*, Kramár et al. 2024) |
| qk_fix | for queries and keys: the pattern is recomputed with the patched q or k, the gradient taken there (AtP*) |
| atp_star | qk_fix and graddrop together: AtP* |

Nodes are scored here, edges in `edges`; `check` sets either beside exact patching, which says
how far the estimates can be trusted.

GradDrop, in the paper: 1 / (L - 1) times the sum over layers of |estimate with the gradient dropped at what the layer
adds to the stream|, L being the number of layers. A node's own layer adds 0 to that sum, so this is the mean over the
others. What was verified: the 1 / (L - 1), the sum of sizes and the QK fix, against a public implementation that
cites the paper's equations 7 to 11 (github.com/koayon/atp_star). From memory, as the paper's text was not at hand: that
what is dropped is attention and MLP of a layer together. The library's own: nodes on the stream (embeddings,
`resid_pre`, deep features) lie in no layer and get the mean over all L; scores are of each example, not their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.arguments import flag, listed, one_of, unknown_name_message
from mmlens.attribution.answers import parts_of
from mmlens.attribution.patterns import FIX_HOOKS, fixed_layers, pattern_score
from mmlens.attribution.runs import (
    GradientRuns,
    Graph,
    clean_values,
    difference,
    finite,
    laid_out,
    mean_of,
    source_values,
    towards,
)
from mmlens.effects.grids import layers_with
from mmlens.errors import InvalidValueError
from mmlens.head_scores import HeadScores
from mmlens.heads import HeadGrid
from mmlens.hook_names import MODEL_PARTS, PARTS, axes_of, block, layer_of, runs_over_positions
from mmlens.interventions.patching import PatchSource
from mmlens.metrics.outcomes import Metric, metric_name
from mmlens.model.cache import is_batched, is_packed
from mmlens.model.fingerprints import weights_fingerprints
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.prompt import Prompt

METHODS = ("gradient", "integrated", "integrated_activation", "graddrop", "qk_fix", "atp_star")
UNSIGNED = ("graddrop", "atp_star")
"""Methods whose scores are sizes: mean absolute values, without a sign."""

NODES = ("z", "q", "k", "v", "attn", "mlp", "resid_pre", *MODEL_PARTS)
"""Words for nodes: heads (z), their q, k and v (k and v by KV head), attention and MLP outputs, the residual stream
into every layer and out of the last, all embeddings, image embeddings."""

_NODES = "words for nodes, hook points or a filter of names, or a list of these"

_ON_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_deepstack")


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
    grid: HeadGrid
    examples: tuple[str, ...] = ()
    """A fingerprint of each example (`Prompt.fingerprints`); none where that is not known."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of the model's weights."""

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
            columns: dict[str, Any] = {"hook": name, "layer": layer_of(name), "head": None, "position": None}
            columns |= {axis: index[:, 1 + i].numpy() for i, axis in enumerate(self.axes(name))}
            columns |= {"example": index[:, 0].numpy(), "score": scores[tuple(index.T)].numpy()}
            frames.append(pd.DataFrame(columns, index=range(len(index))))
        table = pd.concat([frame for frame in frames if len(frame)] or frames[:1], ignore_index=True)
        return table.astype(dict.fromkeys(("layer", "head", "position"), "Int64"))

    def heads(self, node: str = "z") -> HeadScores:
        """The scores of every head ("z", "q") as `HeadScores`, for rankings, sets and maps.

        Raises ValueError for scores by position, for "k" and "v" under grouped queries (they have KV heads), and where
        these nodes were not scored.
        """
        if node not in ("z", "q", "k", "v"):
            raise InvalidValueError(unknown_name_message("head node", node, ("z", "q", "k", "v")))
        if self.by_position:
            raise InvalidValueError(
                "these scores are by position; a head's one score takes by_position=False"
            )
        grid = self.grid
        hooks = [block(layer, PARTS[node]) for layer in range(grid.n_layers)]
        found = {layer: self.scores[hook] for layer, hook in enumerate(hooks) if hook in self.scores}
        if not found:
            raise InvalidValueError(f"{node!r} was not scored, only {list(self.scores)[:5]}")
        if node in ("k", "v") and any(
            own.shape[1] != grid.heads_per_layer[layer] for layer, own in found.items()
        ):
            raise InvalidValueError(
                f"{node!r} has one score per KV head, which several heads share: read scores or table()"
            )
        values = grid.full(self.n_examples)
        for layer, own in found.items():
            values[:, layer, : own.shape[1]] = own
        missing = [layer for layer in grid.layers if layer not in found]
        if missing:
            raise InvalidValueError(f"{node!r} was scored in some layers only, not in {missing}")
        return HeadScores(values, name=f"attribution ({self.method})", grid=grid)

    def axes(self, name: str) -> list[str]:
        """The axes of a hook point's scores after the first: "position", "head", both or none."""
        return ["position"] * self.by_position + ["head"] * bool({"head", "kv_head"} & set(axes_of(name)))


@torch.inference_mode(False)
def attribute(
    model: HookedVLM,
    prompt: Prompt,
    source: PatchSource,
    metric: Metric,
    *,
    nodes: str | Callable[[str], bool] | Sequence[str] = ("z", "mlp"),
    method: str = "gradient",
    steps: int = 8,
    by_position: bool = False,
    logits_to_keep: int = 1,
) -> Attribution:
    """Estimate for every node, and every example, what patching it from `source` would do to `metric`.

    A positive score: the metric rises when the node takes its source value. `source` is as for `patch`, of equal
    layout. `nodes` are words (NODES), hook points by name, or a filter of names; vision.* and projector.* take a batch
    of one prompt. With `by_position` a node is one position of an activation (of a pattern: one query row), else all
    positions at once.

    "integrated" and "integrated_activation" average the gradient at `steps` midpoints. "integrated" moves all of
    `hook_embed`, image embeddings included, and what DeepStack adds. Scores of "integrated_activation" sum, over one
    hook point, to the exact effect of patching all of it, up to the error of the midpoint rule. "graddrop" stops the
    gradient through what attention and MLP of layer l add, for one l at a time, and averages |score| over those l
    that the node does not lie in. Under "qk_fix" each head's pattern is recomputed exactly with the patched q or k
    (with k: all positions together, or each position's alone with `by_position`), times the gradient at the pattern;
    nodes that are neither q nor k have their plain score.

    Of a metric of whole answers, the runs are those over its candidates, source and all, and scores are summed over
    them with the metric's slopes at the clean run; by position, positions are those of the prompt with its answer.

    Raises ValueError for a source of another layout, a metric that is no differentiable number per example, a model
    in training mode, an unknown node (with the nearest names), and methods where they cannot be exact; and as `patch`
    for `source`. No weight gets a gradient. Where a mixture of experts chooses other experts, no gradient knows of it,
    and the gradient of `kl_to_clean` is zero at the clean run: take an integrated method for it.

    >>> from mmlens import HookedVLM, answer_log_probability, scene_examples
    >>> model = HookedVLM.from_pretrained("micro")
    >>> prompt, source = (model.prompt_examples([e]) for e in scene_examples("objects", 2, seed=0))
    >>> attribution = attribute(model, prompt, source, answer_log_probability)
    >>> attribution.heads().per_example.shape == (1, model.cfg.n_layers, model.cfg.n_heads)
    True
    """
    one_of("method", method, METHODS)
    flag("by_position", by_position)
    parts = parts_of(model, prompt, metric, logits_to_keep)
    names = _node_names(model, nodes)
    _check_method(model, prompt, method, names)
    fixed = fixed_layers(model, names) if method in ("qk_fix", "atp_star") else {}
    if len(parts) > 1 and (by_position or method in UNSIGNED):
        why = (
            "and after the prompt each has another answer at its positions, which have no score in common: take "
            "by_position=False"
            if by_position
            else f"and {method!r} gives sizes without signs, whose sum over runs is of no difference: take "
            "method='gradient', 'integrated' or 'qk_fix'"
        )
        raise InvalidValueError(
            f"metric {metric_name(metric)} depends on {len(parts)} runs, one for each candidate, {why}; or a metric of "
            "the answer alone: mmlens.metrics.whole_answer_log_probability"
        )
    scores: dict[str, Tensor] = {}
    for part in parts:
        run = GradientRuns(model, part.prompt, part.metric, part.logits_to_keep, steps)
        found = _estimates(_Nodes(run, names, fixed, by_position, source), method)
        scores = {name: found[name] + scores[name] if scores else found[name] for name in names}
    weights = weights_fingerprints(model.hf_model)
    return Attribution(scores, method, by_position, model.grid, prompt.fingerprints, weights)


# ---------------------------------------------------------------------- estimates


class _Nodes:
    """The nodes of one attribution: those of `fixed` are scored through their layer's pattern, the others plainly."""

    def __init__(
        self,
        run: GradientRuns,
        names: list[str],
        fixed: dict[str, int],
        by_position: bool,
        source: PatchSource,
    ) -> None:
        self.run, self.names, self.fixed, self.by_position, self.source = (
            run,
            names,
            fixed,
            by_position,
            source,
        )
        self.plain = [name for name in names if name not in fixed]
        inside = [block(layer, hook) for layer in sorted(set(fixed.values())) for hook in FIX_HOOKS]
        self.recorded = [*self.plain, *(name for name in inside if name not in self.plain)]
        rotated = [name for name in inside if name.endswith(FIX_HOOKS[:2])]
        self.sources = source_values(run.model, run.prompt, source, [*self.plain, *rotated])

    def scores(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the nodes whose values are given."""
        model, prompt, by_position = self.run.model, self.run.prompt, self.by_position
        scores = {}
        for name in (name for name in self.plain if name in values):
            change = difference(name, self.sources[name], values[name])
            scores[name] = _node_scores(model, prompt, name, change * gradients[name].float(), by_position)
        for name in self.fixed:
            scores[name] = pattern_score(model, name, values, self.sources, gradients, by_position)
            if by_position:
                scores[name].masked_fill_(prompt.token_map.is_padding.cpu()[..., None], torch.nan)
        return scores


def _estimates(nodes: _Nodes, method: str) -> dict[str, Tensor]:
    """Scores by hook point, as the table of methods says."""
    run, names = nodes.run, nodes.names
    if method in ("gradient", "qk_fix"):
        graph = run.forward(nodes.recorded)
        return nodes.scores(graph.values, graph.gradients())
    if method in UNSIGNED:
        return _dropped(nodes, run.forward(nodes.recorded, drops=_contributions(run.model)))
    clean = clean_values(run.model, run.prompt, names)
    if all(map(runs_over_positions, names)):
        run.encode_images()
    if method == "integrated":
        graphs = run.along_embeddings(nodes.source, names)
        return mean_of(nodes.scores(clean, graph.gradients()) for graph in graphs)
    scores: dict[str, Tensor] = {}
    for name in names:
        midpoints = (towards(nodes.sources[name], part) for part in run.midpoints())
        graphs = (run.forward([name], [(name, edit)]) for edit in midpoints)
        only = {name: clean[name]}
        scores |= mean_of(nodes.scores(only, graph.gradients()) for graph in graphs)
    return scores


# ---------------------------------------------------------------------- nodes


def _check_method(model: HookedVLM, prompt: Prompt, method: str, names: Sequence[str]) -> None:
    if method in UNSIGNED and not model.family.adds:
        raise InvalidValueError(
            f"layers of {model.family.model_type!r} do more than add to the stream, so {method!r} cannot drop one"
        )
    if all(map(runs_over_positions, names)):
        return
    if method == "integrated":
        raise InvalidValueError(
            "'integrated' moves the embeddings after the vision tower, so it has no scores of vision.* and "
            "projector.*; take 'integrated_activation'"
        )
    if len(prompt) > 1:
        raise InvalidValueError(
            f"vision.* and projector.* take a batch of one prompt, this one has {len(prompt)}: towers lay out images "
            "and tiles without saying whose they are"
        )


def _node_names(model: HookedVLM, nodes: str | Callable[[str], bool] | Sequence[str]) -> list[str]:
    names: list[str] = []
    for node in [nodes] if isinstance(nodes, str) or callable(nodes) else listed("nodes", nodes, _NODES):
        if isinstance(node, str) and node in NODES:
            names += word_names(model, node)
        elif isinstance(node, str) and node not in model.hook_dict:
            one_of("node or hook point", node, [*NODES, *model.hook_dict])
        else:
            names += model.hook_names(node)
    if not names:
        raise InvalidValueError("no nodes given")
    inputs = [name for name in names if name.endswith("_input")]
    if inputs:
        raise InvalidValueError(
            f"{inputs[0]} is a receiver of edges: attribute_edges scores what heads read, sender by sender"
        )
    return list(dict.fromkeys(names))


def word_names(model: HookedVLM, word: str) -> list[str]:
    """The hook points that a word of NODES means in this model. Raises UnknownHookError where it has none."""
    if word in MODEL_PARTS:
        return model.hook_names(MODEL_PARTS[word])
    hook = PARTS[word]
    names = [block(layer, hook) for layer in layers_with(model, hook)]
    if word == "resid_pre":
        names.append(block(model.cfg.n_layers - 1, "hook_resid_post"))
    return names


def node_axes(model: HookedVLM, name: str, ndim: int) -> tuple[int | None, tuple[int, ...], int | None]:
    """The axes of example (None where examples are packed), of positions, and of head (None where there is none)."""
    axes, stream = axes_of(name), tuple(model.family.stream.strip("[]").split(", "))
    # Towers that pack their images have one axis fewer in front.
    from_end = next((i - len(axes) for i, axis in enumerate(axes) if axis in ("head", "kv_head")), None)
    head = None if from_end is None else ndim + from_end
    if is_packed(name):
        return None, (0,), head
    if not is_batched(name):
        return None, tuple(axis for axis in range(ndim - 1) if axis != head), head
    if name.endswith((*_ON_STREAM, "hook_embed")) and len(stream) == ndim:
        axes = stream
    position = next(i for i, axis in enumerate(axes) if axis in ("pos", "query", "key"))
    return axes.index("batch"), (position,), head


def _node_scores(
    model: HookedVLM, prompt: Prompt, name: str, product: Tensor, by_position: bool
) -> Float[Tensor, "*node"]:
    """Sums of elements: [example, position, head], less the axes that the node does not have."""
    example, positions, head = node_axes(model, name, product.ndim)
    if by_position and not runs_over_positions(name) and "query" in axes_of(name):
        raise InvalidValueError(f"{name} has no scores by position; take by_position=False")
    if not by_position and not is_packed(name):
        positions = ()
    kept = [axis for axis in (example, *positions, head) if axis is not None]
    summed = [axis for axis in range(product.ndim) if axis not in kept]
    x = finite(name, product.permute(*kept, *summed).flatten(len(kept)).sum(-1))
    if is_packed(name):
        return _of_examples(model, prompt, x, by_position)
    if example is None:
        return x.flatten(0, len(positions) - 1)[None] if positions else x[None]
    if by_position:
        padding = prompt.token_map.is_padding.cpu()
        return x.masked_fill(padding if head is None else padding[..., None], torch.nan)
    return x


def _of_examples(model: HookedVLM, prompt: Prompt, rows: Tensor, by_position: bool) -> Float[Tensor, "*node"]:
    """Scores of image tokens, laid over the positions or summed for each example."""
    scores = laid_out(model, prompt, rows, torch.nan)
    return scores if by_position else scores.nansum(1).masked_fill(scores.isnan().all(1), torch.nan)


# ---------------------------------------------------------------------- GradDrop


def _contributions(model: HookedVLM) -> dict[str, int]:
    """What each layer adds to the stream: hook point -> layer."""
    found: dict[str, int] = {}
    for layer in range(model.cfg.n_layers):
        own = [block(layer, hook) for hook in ("hook_attn_out", "hook_mlp_out")]
        present = [name for name in own if name in model.hook_dict]
        if not present:
            raise InvalidValueError(
                f"layer {layer} has neither hook_attn_out nor hook_mlp_out, so GradDrop cannot drop it"
            )
        found |= dict.fromkeys(present, layer)
    return found


def _dropped(nodes: _Nodes, graph: Graph) -> dict[str, Tensor]:
    """The mean of |score| over backward passes that leave one layer out: never the layer whose branch a node is in."""
    totals: dict[str, Tensor] = {}
    counts = dict.fromkeys(nodes.names, 0)
    n_layers = nodes.run.model.cfg.n_layers
    for layer in range(n_layers):
        graph.dropping[:] = [layer]
        scores = nodes.scores(graph.values, graph.gradients(keep=layer + 1 < n_layers))
        for name in nodes.names:
            if layer_of(name) == layer and not name.endswith(_ON_STREAM):
                continue
            totals[name] = scores[name].abs() + totals.get(name, 0.0)
            counts[name] += 1
    if len(totals) < len(nodes.names):
        raise InvalidValueError("GradDrop needs a model of at least two layers")
    return {name: totals[name] / counts[name] for name in nodes.names}
