"""Attention of many runs that share their first keys and values, without a copy of those for every run."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor


def shared_key_attention(
    query: Float[Tensor, "rows head query d_head"],
    shared_key: Float[Tensor, "batch kv_head shared d_head"],
    shared_value: Float[Tensor, "batch kv_head shared d_value"],
    own_key: Float[Tensor, "rows kv_head own d_head"],
    own_value: Float[Tensor, "rows kv_head own d_value"],
    mask: Shaped[Tensor, "... query keys"] | None,
    scaling: float | None = None,
) -> Float[Tensor, "rows query head d_value"]:
    """softmax(q [k_shared, k_own]^T scaling + mask) [v_shared, v_own], for `rows` = copies x batch, copy by copy.

    The keys' positions are the shared ones, then the row's own; queries are the last of them. `mask` is boolean
    (True: attend) or additive, [batch or 1, head or 1, query, shared + own] or with all rows first; None means causal.
    A row of a boolean mask that allows nothing gives zero, as in SDPA. The softmax is float32.
    """
    batch, n_kv_heads, n_shared, d_head = shared_key.shape
    n_own, n_queries = own_key.shape[2], query.shape[2]
    copies, group = len(query) // batch, query.shape[1] // n_kv_heads
    query = query * (d_head**-0.5 if scaling is None else scaling)
    # A key-value head's shared keys meet all copies' queries at once.
    together = rearrange(query, "(copy b) (kv group) q d -> b kv (copy group q) d", b=batch, kv=n_kv_heads)
    to_shared = rearrange(
        (together @ shared_key.mT).float(),
        "b kv (copy group q) k -> b kv copy group q k",
        copy=copies,
        group=group,
    )
    apart = rearrange(query, "row (kv group) q d -> row kv (group q) d", kv=n_kv_heads)
    to_own = rearrange(
        (apart @ own_key.mT).float(), "(copy b) kv (group q) k -> b kv copy group q k", b=batch, group=group
    )
    allowed = None
    if mask is None:
        ahead = torch.arange(n_queries, device=query.device)[:, None] + n_own - n_queries
        to_own.masked_fill_(torch.arange(n_own, device=query.device) > ahead, -torch.inf)
    else:
        # One of a mask's rows and heads stands for all, one of a batch for all copies.
        parts = rearrange(
            mask,
            "(copy b) (kv group) q k -> b kv copy group q k",
            copy=copies if len(mask) == copies * batch else 1,
            kv=n_kv_heads if mask.shape[1] > 1 else 1,
        )
        if mask.dtype == torch.bool:
            allowed = parts.any(-1, keepdim=True)
            blocked = torch.finfo(torch.float32).min
            to_shared = to_shared.masked_fill(~parts[..., :n_shared], blocked)
            to_own = to_own.masked_fill(~parts[..., n_shared:], blocked)
        else:
            to_shared, to_own = to_shared + parts[..., :n_shared], to_own + parts[..., n_shared:]
    # A softmax over both, without laying them side by side.
    largest = torch.maximum(to_shared.amax(-1, keepdim=True), to_own.amax(-1, keepdim=True))
    to_shared, to_own = to_shared.sub_(largest).exp_(), to_own.sub_(largest).exp_()
    total = to_shared.sum(-1, keepdim=True) + to_own.sum(-1, keepdim=True)
    seen = rearrange(to_shared.to(query.dtype), "b kv copy group q k -> b kv (copy group q) k") @ shared_value
    own = rearrange(to_own.to(query.dtype), "b kv copy group q k -> (copy b) kv (group q) k") @ own_value
    seen = rearrange(seen, "b kv (copy group q) d -> b kv copy group q d", copy=copies, group=group)
    own = rearrange(own, "(copy b) kv (group q) d -> b kv copy group q d", b=batch, group=group)
    z = (seen + own).float() / total
    if allowed is not None:
        z = z * allowed
    return rearrange(z.to(query.dtype), "b kv copy group q d -> (copy b) q (kv group) d")
