"""How far attribution can be trusted: estimates beside exact patching, for a sample of nodes or edges."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from mmlens.arguments import instance_of, seed_of, whole_number
from mmlens.attribution.edges import EdgeAttribution, Site, read_at, write_changes
from mmlens.attribution.nodes import Attribution, node_axes
from mmlens.attribution.runs import attention_of, difference, source_values
from mmlens.effects.sweeps import sweep
from mmlens.errors import InvalidValueError
from mmlens.hook_names import runs_over_positions
from mmlens.interventions.edits import Edit
from mmlens.interventions.patching import PatchSource, patch, shared_source
from mmlens.interventions.paths import path_patch
from mmlens.metrics.outcomes import Metric, metric_of
from mmlens.model.choosing import if_any
from mmlens.model.fingerprints import same_weights, weights_fingerprints
from mmlens.model.hooked_vlm import HookedVLM, model_of
from mmlens.model.hooks import Hook, Intervention, NoChangeWarning
from mmlens.model.prompt import Prompt, prompt_of

_AT_ONCE = 32
"""How many patches are built together: each may hold an activation of its own."""

Place = Mapping[str, Any]
"""A node (hook, position, head) or an edge (sender, receiver)."""


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
    source: PatchSource,
    metric: Metric,
    attribution: Attribution | EdgeAttribution,
    *,
    n: int | None = 64,
    seed: int = 0,
    logits_to_keep: int = 1,
) -> PatchingComparison:
    """Patch `n` nodes or edges, drawn at random by `seed` (None: all of them), exactly, and set the effects beside
    the estimates.

    A node takes its source value and everything after it follows (`patch`). Of an edge, only the receiver reads what
    the sender writes in the source (`path_patch` with frozen MLPs; ends that it does not have - embeddings alone, deep
    image features, attention as a whole - by adding the change to what the receiver reads). All are run by `sweep`. The
    arguments must be those of the attribution.

    A few large effects decide Pearson's correlation, Spearman's knows ranks alone: where they differ, look at the
    table.

    Raises ValueError for other examples or another model than the attribution's, n below 1, and as `attribute`,
    `patch` and `path_patch`.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> prompt, source = (model.prompt_examples([e]) for e in mmlens.scene_examples("objects", 2, seed=0))
    >>> attribution = mmlens.attribute(model, prompt, source, mmlens.logit_difference, nodes="mlp")
    >>> compare_with_patching(model, prompt, source, mmlens.logit_difference, attribution, n=4).n
    4
    """
    model_of(model)
    prompt_of(prompt)
    metric_of("metric", metric)
    instance_of(
        "attribution", attribution, (Attribution, EdgeAttribution), "what attribute or attribute_edges gave"
    )
    n = None if n is None else whole_number("n", n, least=1)
    seed, logits_to_keep = seed_of(seed), whole_number("logits_to_keep", logits_to_keep, least=0)
    if attribution.n_examples != len(prompt):
        raise InvalidValueError(
            f"the attribution is of {attribution.n_examples} example(s), the prompt has {len(prompt)}: pass the same"
        )
    other = [row for row, each in enumerate(attribution.examples) if each != prompt.fingerprints[row]]
    if other:
        raise InvalidValueError(
            f"the attribution is of another prompt: example {other[0]} has another text, image or answer there. Pass "
            "the prompt that was attributed"
        )
    if attribution.weights and not same_weights(attribution.weights, weights_fingerprints(model.hf_model)):
        raise InvalidValueError("the attribution is of another model: its weights are not this one's")
    places = _nodes(attribution) if isinstance(attribution, Attribution) else _edges(attribution)
    if n is not None and n < len(places):
        chosen = np.random.default_rng(seed).choice(len(places), n, replace=False)
        places = [places[i] for i in sorted(chosen)]
    # Held, so that one run of the source serves all patches.
    held = shared_source(source)
    frames = []
    for start in range(0, len(places), _AT_ONCE):
        group = places[start : start + _AT_ONCE]
        patches = {i: _exact(model, prompt, source, *place) for i, place in enumerate(group)}
        with warnings.catch_warnings():
            # What is the same in the source has no effect.
            warnings.simplefilter("ignore", NoChangeWarning)
            table = sweep(model, prompt, patches, metric, logits_to_keep=logits_to_keep, progress=False)
        effects = (table["value"] - table["clean"]).to_numpy().reshape(len(group), len(prompt))
        frames += [_frame(*place, exact) for place, exact in zip(group, effects, strict=True)]
    del held
    result = pd.concat(frames, ignore_index=True)
    if not attribution.is_signed:
        result["exact"] = result["exact"].abs()
    return PatchingComparison(result, attribution.is_signed)


def _nodes(attribution: Attribution) -> list[tuple[Place, Float[Tensor, " example"]]]:
    """Every node and its estimates."""
    places: list[tuple[Place, Tensor]] = []
    for name, scores in attribution.scores.items():
        axes = attribution.axes(name)
        for index in torch.nonzero((~scores.isnan()).any(0)).tolist() if axes else [[]]:
            at = dict(zip(axes, index, strict=True))
            place = {"hook": name, "position": at.get("position"), "head": at.get("head")}
            places.append((place, scores[(slice(None), *index)]))
    return places


def _edges(attribution: EdgeAttribution) -> list[tuple[Place, Float[Tensor, " example"]]]:
    """Every edge and its estimates."""
    return [
        (
            {"sender": attribution.senders[i], "receiver": attribution.receivers[j]},
            attribution.scores[:, i, j],
        )
        for i, j in torch.nonzero(~attribution.scores[0].isnan()).tolist()
    ]


def _frame(place: Place, estimates: Tensor, exact: Float[np.ndarray, " example"]) -> pd.DataFrame:
    labels = {name: str(value) if isinstance(value, Site) else value for name, value in place.items()}
    columns = {"example": range(len(exact)), "estimate": estimates.double().numpy(), "exact": exact}
    return pd.DataFrame({**labels, **columns})[~estimates.isnan().numpy()]


def _exact(
    model: HookedVLM, prompt: Prompt, source: PatchSource, place: Place, estimates: Tensor
) -> Intervention:
    """The intervention whose effect is estimated."""
    if "sender" in place:
        return _exact_edge(model, source, place["sender"], place["receiver"])
    name, position, head = place["hook"], place["position"], place["head"]
    if position is not None and not runs_over_positions(name):
        return partial(_tower_patch, source=source, place=place)
    mask = None
    if position is not None:
        mask = torch.zeros(tuple(prompt.shape), dtype=torch.bool)
        mask[:, position] = ~estimates.isnan()
    # A position of padding has no estimate, and stays as it is.
    at = None if mask is None else if_any(mask)
    return patch(name, source, positions=at, heads=None if head is None else [head])


def _tower_patch(model: HookedVLM, prompt: Prompt, *, source: PatchSource, place: Place) -> list[Hook]:
    """One position of vision.* or projector.*, which `patch` replaces as a whole only."""
    name = place["hook"]
    given = source_values(model, prompt, source, [name])[name]

    def change(x: Tensor, hook: Any) -> Tensor:
        difference(name, given, x)
        _, positions, head = node_axes(model, name, x.ndim)
        index: list[Any] = [slice(None)] * x.ndim
        sizes = [x.shape[axis] for axis in positions]
        for axis, at in zip(positions, np.unravel_index(place["position"], sizes), strict=True):
            index[axis] = int(at)
        if head is not None:
            index[head] = place["head"]
        x = x.clone()
        x[tuple(index)] = given.to(x)[tuple(index)]
        return x

    return [(name, change)]


def _exact_edge(model: HookedVLM, source: PatchSource, sender: Site, receiver: Site) -> Intervention:
    sends = sender.head if sender.kind == "z" else sender.kind
    reads: tuple[Any, ...] | str = "logits"
    if receiver.kind == "mlp":
        reads = (receiver.layer, "mlp")
    elif receiver.layer is not None and receiver.head is not None:
        attention = attention_of(model, receiver.layer)
        shared_by = 1 if receiver.kind == "q" else attention.n_heads // attention.n_kv_heads
        reads = (receiver.layer, receiver.head * shared_by, receiver.kind)
    if sender.kind not in ("z", "attn", "mlp") or receiver.kind == "attn":
        return partial(_added, source=source, sender=sender, receiver=receiver)
    return path_patch([(sender.layer, sends)], [reads], source)


def _added(
    model: HookedVLM, prompt: Prompt, *, source: PatchSource, sender: Site, receiver: Site
) -> list[Hook]:
    """What the sender writes more in the source, added to what the receiver reads."""
    write = write_changes(model, prompt, source, sender)
    heads = None if receiver.head is None else [receiver.head]
    write = write if heads is None else write.unsqueeze(2)
    name = read_at(model, receiver)
    return [
        (name, Edit(model, prompt, name, lambda x, here: x + here.of_prompt(write, 0.0).to(x), heads=heads))
    ]
