"""AtP*'s QK fix: the effect of a patched query or key through its attention pattern, recomputed exactly.

AtP* is Kramár et al. 2024 (arXiv 2403.00745; equations 7, 9 and 10, see `nodes` for what was verified). With P
the pattern, P' the pattern with the patched q or k, and G the metric's gradient at P, score = sum over (query, key) of
(P' - P) * G. By position, a query's score is that of its own row; a key is patched alone, in every row that sees it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.attribution.runs import attention_of, finite
from mmlens.errors import InvalidValueError
from mmlens.hook_names import block, layer_of
from mmlens.model.hooked_vlm import HookedVLM

FIX_HOOKS = ("attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_attn_scores", "attn.hook_pattern")


def fixed_layers(model: HookedVLM, names: Sequence[str]) -> dict[str, int]:
    """The language side's queries and keys among the nodes: hook point -> layer."""
    found = {}
    for name in names:
        layer = layer_of(name)
        if layer is None or not re.search(r"\.attn\.hook_[qk]$", name):
            continue
        attention = attention_of(model, layer)
        if "k" not in attention.projections or model.anatomy.shares_keys:
            raise InvalidValueError(
                f"the QK fix of {name} is refused: layers of {model.family.model_type!r} share keys, so a key acts in "
                "several patterns"
            )
        used = [projection for role, projection in attention.projections.items() if role != "v"]
        if any(projection.of_latent for projection in used):
            raise InvalidValueError(
                f"the QK fix of {name} is refused: under latent attention hook_k is only a part of the keys"
            )
        found[name] = layer
    return found


@torch.no_grad()
def pattern_score(
    model: HookedVLM,
    name: str,
    values: Mapping[str, Tensor],
    sources: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    by_position: bool,
) -> Float[Tensor, "*node"]:
    """Scores [example, (position), head]; k by KV head. `values` and `gradients` are those of FIX_HOOKS."""
    layer = layer_of(name)
    assert layer is not None
    rot_q, rot_k, scores, pattern = (values[block(layer, hook)].float() for hook in FIX_HOOKS)
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
        return finite(name, score)
    moved = (factor * _products(rot_q, new_k - rot_k)).masked_fill(~allowed, 0.0)
    if by_position:
        share = _key_changes(scores, moved, gradient, allowed).sum(-2)
        return finite(name, share.unflatten(1, (n_groups, -1)).sum(2).transpose(1, 2))
    change = ((_softmax(scores + moved, allowed) - _softmax(scores, allowed)) * gradient).sum((-1, -2))
    return finite(name, change.unflatten(1, (n_groups, -1)).sum(2))


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
        after = (below * values).sum(-1, keepdim=True)
        rest = after + values.gather(-1, at) - weights * values
        return rest.scatter(-1, at, after)

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
        raise InvalidValueError(
            f"the QK fix is refused in layer {layer}: its pattern is not softmax(factor * q k) (a softcap, a learnt "
            "sink or a position bias stands there); take method='gradient' for q and k"
        )
    return factor
