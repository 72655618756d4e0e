"""Edge attribution patching: what patching each edge would do to a metric, estimated by gradients.

An edge leads from what writes to the residual stream to what reads it (Syed et al. 2023, "Attribution Patching
Outperforms Automated Circuit Discovery"; EAP-IG: Hanna et al. 2024). Its score is the first-order change of the metric
when this receiver alone reads what the sender writes in the source run; what else reads the stream reads the clean run.
`path_patch` patches edges exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.functional import jvp

from mmlens.arguments import listed, one_of
from mmlens.attribution.answers import parts_of
from mmlens.attribution.nodes import word_names
from mmlens.attribution.runs import (
    GradientRuns,
    Graph,
    attention_of,
    clean_values,
    difference,
    finite,
    laid_out,
    mean_of,
    source_values,
)
from mmlens.effects.grids import layers_with
from mmlens.errors import InvalidValueError
from mmlens.families.anatomy import Projection, scale_of
from mmlens.hook_names import MODEL_PARTS, PART_INPUTS, PARTS, block, layer_of
from mmlens.interventions.patching import PatchSource
from mmlens.metrics.outcomes import Metric
from mmlens.model.cache import is_packed
from mmlens.model.fingerprints import weights_fingerprints
from mmlens.model.hooked_vlm import HookedVLM, model_of
from mmlens.model.linear import is_linear, weight_of
from mmlens.model.prompt import Prompt

EDGE_METHODS = ("gradient", "integrated")
SENDERS = (*MODEL_PARTS, "z", "attn", "mlp", "deepstack")
RECEIVERS = (*PART_INPUTS, "logits")

_SENDER_CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Site:
    """One end of an edge: what writes to the residual stream, or what reads it.

    `kind` is a word of SENDERS or RECEIVERS; `head` is a KV head where the kind is "k" or "v".

    >>> print(Site("z", 1, 3), Site("k", 2, 0), Site("mlp", 0), Site("logits"))
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
        suffix = "" if self.kind == "z" else f".{self.kind}"
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
    examples: tuple[str, ...] = ()
    """A fingerprint of each example (`Prompt.fingerprints`); none where that is not known."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of the model's weights."""

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
    source: PatchSource,
    metric: Metric,
    *,
    senders: str | Sequence[str] = ("embed", "z", "mlp", "deepstack"),
    receivers: str | Sequence[str] = ("q", "k", "v", "mlp", "logits"),
    method: str = "gradient",
    steps: int = 8,
    logits_to_keep: int = 1,
) -> EdgeAttribution:
    """Estimate for every edge what patching it from `source` would do to `metric` (Syed et al. 2023).

    score(sender -> receiver) = sum over positions of (what the sender writes in the source - in the clean run) . d
    metric / d (what the receiver reads), the stream before the receiver's norm. A head's write is z W_O, in the unit of
    the stream: after a post-norm it is taken through the norm's derivative at the clean activations, and times the
    layer's factor. Over all receivers ("q", "k", "v", "mlp", "logits") the edges of a sender sum to its node score, as
    long as all layers' attention reads by q, k and v alone: not where heads are gated or a layer has another
    mixer of positions, for which "attn" is the receiver (all that ln1 feeds).

    `senders` are words of SENDERS ("image": image embeddings, "embed": all embeddings, those included; "deepstack":
    deep image features, left out where a model has none), `receivers` of RECEIVERS; q by head, k and v by KV head.
    "integrated" averages over `steps` points between clean and source embeddings (EAP-IG), as in `attribute`; `source`
    is as for `patch`.

    Trust edges from the embeddings to the first layer least. Nothing else is read there, so patching such an edge
    exchanges all that a head reads, and the metric can fall off a cliff that its slope does not show. On the micro
    model (8 examples of objects, logit difference), edges from "embed" to one group of the first layer cost 5 to 43
    logits and have slopes of about 1, but for its values. Few such edges decide Pearson's correlation with exact
    patching: .05 to .96 by which of them a sample of 64 edges holds. Without the sender "embed" it is .92 (Spearman
    .95). "integrated" ranks the edges worse there (Spearman .34): its gradients are those of runs in which all other
    edges have moved too.

    Raises ValueError where the layers do more than add to the stream, for attention output projections that are not
    linear, and as `attribute`; UnknownHookError where the model lacks the hook points of a sender or receiver.

    >>> from mmlens import HookedVLM, answer_log_probability, scene_examples
    >>> model = HookedVLM.from_pretrained("micro")
    >>> prompt, source = (model.prompt_examples([e]) for e in scene_examples("objects", 2, seed=0))
    >>> edges = attribute_edges(
    ...     model, prompt, source, answer_log_probability, senders="z", receivers="logits"
    ... )
    >>> edges.scores.shape == (1, len(model.heads), 1)
    True
    """
    one_of("method", method, EDGE_METHODS)
    if not model_of(model).family.adds:
        raise InvalidValueError(
            f"layers of {model.family.model_type!r} do more than add to the stream, so no edge leads from one write "
            "to one reader"
        )
    sending = [site for word in _words("sender", senders, SENDERS) for site in _senders(model, prompt, word)]
    reading = [site for word in _words("receiver", receivers, RECEIVERS) for site in _receivers(model, word)]
    if not sending or not reading:
        raise InvalidValueError("edges need at least one sender and one receiver")
    sending.sort(key=lambda site: site.time)
    reading.sort(key=lambda site: site.time)
    found = [
        _of_part(
            GradientRuns(model, part.prompt, part.metric, part.logits_to_keep, steps),
            source,
            sending,
            reading,
            method,
        )
        for part in parts_of(model, prompt, metric, logits_to_keep)
    ]
    is_edge = torch.tensor([[sender.time < receiver.time for receiver in reading] for sender in sending])
    scores = finite("edges", torch.stack(found).sum(0)).masked_fill(~is_edge, torch.nan)
    weights = weights_fingerprints(model.hf_model)
    return EdgeAttribution(scores, tuple(sending), tuple(reading), method, prompt.fingerprints, weights)


def _of_part(
    run: GradientRuns, source: PatchSource, sending: list[Site], reading: list[Site], method: str
) -> Tensor:
    """The scores [example, sender, receiver] of the runs of one prompt."""
    model, prompt = run.model, run.prompt
    written = list(dict.fromkeys(map(written_at, sending)))
    names = list(dict.fromkeys([*written, *(name for site in reading for name in _recorded(model, site))]))
    sources, clean = source_values(model, prompt, source, written), clean_values(model, prompt, written)
    changes = {
        name: _over_positions(model, prompt, name, difference(name, sources[name], clean[name]))
        for name in written
    }
    if method == "gradient":
        graphs = iter([run.forward(names)])
    else:
        run.encode_images()
        graphs = run.along_embeddings(source, names)
    return mean_of({"edges": _edge_scores(model, sending, reading, changes, graph)} for graph in graphs)[
        "edges"
    ]


# ---------------------------------------------------------------------- senders and receivers


def _words(kind: str, given: str | Sequence[str], known: Sequence[str]) -> list[str]:
    expected = f"a list of some of {', '.join(map(repr, known))}"
    words = [given] if isinstance(given, str) else listed(f"{kind}s", given, expected, least=1)
    words = [one_of(f"{kind} of edges", word, known) for word in words]
    return list(dict.fromkeys(words))


def _senders(model: HookedVLM, prompt: Prompt, word: str) -> list[Site]:
    if word in ("embed", "image"):
        word_names(model, word)
        return [Site(word)]
    if word == "deepstack":
        # A prompt without images has none, as most models.
        mask = model.image_mask(prompt)
        deep = model.anatomy.deep_after if mask is not None and bool(mask.any()) else []
        return [Site("deepstack", layer) for layer in deep]
    layers = [layer_of(name) for name in word_names(model, word)]
    if word != "z":
        return [Site(word, layer) for layer in layers]
    sites = []
    for layer in layers:
        assert layer is not None
        attention = attention_of(model, layer)
        if not is_linear(attention.out):
            raise InvalidValueError(
                f"the output projection of layer {layer} is a {type(attention.out).__name__}, not linear: what one "
                "head writes is not defined; take the sender 'attn'"
            )
        sites += [Site("z", layer, head) for head in range(attention.n_heads)]
    return sites


def _receivers(model: HookedVLM, word: str) -> list[Site]:
    if word == "logits":
        return [Site("logits")]
    layers = layers_with(model, PART_INPUTS[word])
    if word in ("attn", "mlp"):
        return [Site(word, layer) for layer in layers]
    sites = []
    for layer in layers:
        attention = attention_of(model, layer)
        n_heads = attention.n_heads if word == "q" else attention.n_kv_heads
        sites += [Site(word, layer, head) for head in range(n_heads)]
    return sites


def written_at(site: Site) -> str:
    """The hook point of what a sender writes; of a head its z."""
    return MODEL_PARTS[site.kind] if site.layer is None else block(site.layer, PARTS[site.kind])


def read_at(model: HookedVLM, site: Site) -> str:
    """The hook point of what a receiver reads, which it alone reads."""
    if site.layer is None:
        return block(model.cfg.n_layers - 1, PARTS["resid_post"])
    return block(site.layer, PART_INPUTS[site.kind])


def _recorded(model: HookedVLM, site: Site) -> list[str]:
    """The hook points whose values and gradients give the gradient at what a receiver reads."""
    if site.layer is None or site.head is None:
        return [read_at(model, site)]
    return [block(site.layer, PART_INPUTS["attn"]), block(site.layer, PARTS[site.kind])]


# ---------------------------------------------------------------------- scores


def _over_positions(model: HookedVLM, prompt: Prompt, name: str, rows: Tensor) -> Tensor:
    """Rows of image tokens laid over all positions, zeros at text; other activations as they are."""
    return laid_out(model, prompt, rows) if is_packed(name) else rows


@torch.no_grad()
def write_changes(
    model: HookedVLM, prompt: Prompt, source: PatchSource, sender: Site
) -> Float[Tensor, "batch pos d_model"]:
    """What a sender adds to the stream more in the source than in the clean run."""
    name = written_at(sender)
    clean = clean_values(model, prompt, [name])[name]
    change = difference(name, source_values(model, prompt, source, [name])[name], clean)
    if sender.layer is not None and sender.head is not None:
        return _head_writes(model, sender.layer, clean, change, exact=True)[:, :, sender.head]
    return _over_positions(model, prompt, name, change)


@torch.no_grad()
def _edge_scores(
    model: HookedVLM,
    senders: Sequence[Site],
    receivers: Sequence[Site],
    changes: Mapping[str, Float[Tensor, "batch pos ..."]],
    graph: Graph,
) -> Float[Tensor, "example sender receiver"]:
    """Edge scores at one run's activations, a few positions at a time: every step is one position's own."""
    values, gradients = graph.values, graph.gradients()
    batch, length = next(iter(changes.values())).shape[:2]
    width = max(1, _SENDER_CHUNK_BYTES // (4 * batch * len(senders) * model.cfg.d_model))
    scores = torch.zeros(batch, len(senders), len(receivers))
    for start in range(0, length, width):
        here = slice(start, start + width)
        writes = _writes(model, senders, changes, values, here)
        column = 0
        for _, group in itertools.groupby(receivers, key=lambda site: (site.kind, site.layer)):
            members = list(group)
            gradient = _at_receivers(model, members[0], values, gradients, here)
            n = sum(site.time < members[0].time for site in senders)
            products = torch.einsum("bpsm,bprm->bsr", writes[:, :, :n].to(gradient.device), gradient)
            scores[:, :n, column : column + len(members)] += products.cpu()
            column += len(members)
    return scores


def _writes(
    model: HookedVLM,
    senders: Sequence[Site],
    changes: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    here: slice,
) -> Float[Tensor, "batch pos sender d_model"]:
    """How each sender's write changes, to first order where a norm stands after attention."""
    writes: list[Tensor] = []
    device = next(iter(changes.values())).device
    for name, group in itertools.groupby(senders, key=written_at):
        sender, change = next(group), changes[name][:, here]
        if sender.kind == "z":
            assert sender.layer is not None
            change = _head_writes(model, sender.layer, values[name][:, here], change)
        else:
            change = change.unsqueeze(2)
        writes.append(change.to(device))
    return torch.cat(writes, dim=2)


def _head_writes(
    model: HookedVLM,
    layer: int,
    z: Float[Tensor, "batch pos head d_head"],
    change: Float[Tensor, "batch pos head d_head"],
    *,
    exact: bool = False,
) -> Float[Tensor, "batch pos head d_model"]:
    """What each head alone adds to the stream more where its z changes; to first order, or exactly."""
    parts, attention = model.anatomy.language[layer], attention_of(model, layer)
    w_o = weight_of(attention.out, change).T.float().unflatten(0, (-1, attention.d_value))
    write = torch.einsum("bphd,hdm->bphm", change, w_o)
    if parts.post_norm1 is not None:
        # `forward`, not the modules themselves: their hooks stand for runs.
        at = attention.out.forward(z.flatten(-2)).unsqueeze(2).expand_as(write)
        norm, write = parts.post_norm1.forward, write.to(at.dtype)
        write = (norm(at + write) - norm(at) if exact else jvp(norm, at.clone(), write)[1]).float()
    scale = scale_of(parts.module, parts.attention_scale)
    return write if scale is None else write * torch.as_tensor(scale, device=write.device).detach().float()


def _at_receivers(
    model: HookedVLM,
    site: Site,
    values: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    here: slice,
) -> Float[Tensor, "batch pos receiver d_model"]:
    """The metric's gradient at what the receivers of this kind and layer read."""
    names = _recorded(model, site)
    gradient = gradients[names[-1]][:, here]
    if site.layer is None or site.head is None:
        return gradient.float().unsqueeze(2)
    norm, projection = model.anatomy.language[site.layer].norm1, attention_of(model, site.layer).projections
    assert norm is not None
    return _through_projection(norm, projection[site.kind], values[names[0]][:, here], gradient)


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
