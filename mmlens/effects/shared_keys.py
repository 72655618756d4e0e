"""Attention of many runs that share their first keys and values, without a copy of those for every run."""

from __future__ import annotations

import torch
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
    rows, n_heads, n_queries, d_head = query.shape
    batch, n_kv_heads, n_shared, _ = shared_key.shape
    n_own, d_value = own_key.shape[2], own_value.shape[3]
    copies, group = rows // batch, n_heads // n_kv_heads
    scale = d_head**-0.5 if scaling is None else scaling
    # [copy, batch, kv_head, group, query, d_head]; a key-value head's shared keys meet all copies' queries at once.
    parted = (query * scale).reshape(copies, batch, n_kv_heads, group, n_queries, d_head)
    together = parted.permute(1, 2, 0, 3, 4, 5).reshape(batch, n_kv_heads, -1, d_head)
    to_shared = (together @ shared_key.mT).float()
    to_shared = to_shared.view(batch, n_kv_heads, copies, group, n_queries, n_shared)
    to_own = parted.flatten(0, 1).flatten(2, 3) @ own_key.mT
    to_own = to_own.float().view(copies, batch, n_kv_heads, group, n_queries, n_own).permute(1, 2, 0, 3, 4, 5)
    allowed = None
    if mask is None:
        ahead = torch.arange(n_queries, device=query.device)[:, None] + n_own - n_queries
        to_own.masked_fill_(torch.arange(n_own, device=query.device) > ahead, -torch.inf)
    else:
        parts = _by_group(mask, batch, copies, n_kv_heads, group)
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
    seen = to_shared.to(query.dtype).reshape(batch, n_kv_heads, -1, n_shared) @ shared_value
    seen = seen.view(batch, n_kv_heads, copies, group, n_queries, d_value)
    own = to_own.permute(2, 0, 1, 3, 4, 5).to(query.dtype).reshape(rows, n_kv_heads, -1, n_own) @ own_value
    own = own.view(copies, batch, n_kv_heads, group, n_queries, d_value).permute(1, 2, 0, 3, 4, 5)
    z = (seen + own).float() / total
    if allowed is not None:
        z = z * allowed
    # [copy, batch, query, kv_head, group, d_value]
    return z.to(query.dtype).permute(2, 0, 4, 1, 3, 5).reshape(rows, n_queries, n_heads, d_value)


def _by_group(
    mask: Tensor, batch: int, copies: int, n_kv_heads: int, group: int
) -> Shaped[Tensor, "batch kv_head copy group query keys"]:
    """A mask [rows or batch or 1, head or 1, query, keys] with the axes of the scores."""
    heads = (n_kv_heads, group) if mask.shape[1] > 1 else (1, 1)
    mask = mask.unflatten(1, heads)
    rows = (copies, batch) if len(mask) == copies * batch else (1, len(mask))
    return mask.unflatten(0, rows).permute(1, 2, 0, 3, 4, 5)
