"""Streaming heads on the CPU: attention by blocks of queries, each with the keys it can see and no others."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from mmlens.sparse.rule import StreamingRule

BLOCK = 128
"""Queries a block: fewer waste fewer keys on the window's edges, more cost fewer calls."""


def streaming_attention(
    query: Float[Tensor, "batch head pos d_head"],
    key: Float[Tensor, "batch kv_head pos d_head"],
    value: Float[Tensor, "batch kv_head pos d_value"],
    rule: StreamingRule,
    mask: Bool[Tensor, "_ 1 pos pos"] | None = None,
    first: Int[Tensor, " batch"] | None = None,
    scaling: float | None = None,
    block: int = BLOCK,
) -> Float[Tensor, "batch head pos d_value"]:
    """softmax(q k^T scaling + mask) v over the keys of `rule`, for queries and keys of the same positions.

    Key-value heads are shared by equal groups of neighbouring query heads. `mask` is the model's own (None: causal);
    what it forbids stays forbidden. `first` are the rows' first real positions where rows are padded.
    """
    batch, n_heads, length, _ = query.shape
    grouped = n_heads != key.shape[1]
    output = like_sdpa(query, value)
    # Rows that begin later have their sinks later.
    earliest, latest = (0, 0) if first is None else (int(first.min()), int(first.max()))
    sinks = earliest, min(latest + rule.sink, length)
    # The first queries of every row see all that is behind them.
    whole = min(earliest + rule.sink + rule.window, length)
    output[:, :, :whole] = F.scaled_dot_product_attention(
        query[:, :, :whole],
        key[:, :, :whole],
        value[:, :, :whole],
        attn_mask=None if mask is None else mask[..., :whole, :whole],
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=grouped,
    )
    same: dict[int, Tensor] = {}
    for start in range(whole, length, block):
        stop = min(start + block, length)
        near = start - rule.window + 1
        parted = near > sinks[1]
        ranges = (sinks, (near, stop)) if parted else ((min(sinks[0], near), stop),)
        keys, values = (
            torch.cat([tensor[:, :, low:high] for low, high in ranges], 2) for tensor in (key, value)
        )
        bias = same.get(stop - start) if parted and mask is None else None
        if bias is None:
            columns = torch.cat([torch.arange(low, high, device=query.device) for low, high in ranges])
            rows = torch.arange(start, stop, device=query.device)
            allowed = rule.allowed(rows, columns, first)
            allowed = allowed[None, None] if first is None else allowed[:, None]
            if mask is not None:
                allowed = allowed & mask[:, :, start:stop][..., columns]
            # SDPA on the CPU would turn a boolean mask into this one in every call.
            bias = torch.zeros(allowed.shape, dtype=query.dtype, device=query.device)
            bias.masked_fill_(~allowed, torch.finfo(query.dtype).min)
            if parted and mask is None:
                same[stop - start] = bias
        output[:, :, start:stop] = F.scaled_dot_product_attention(
            query[:, :, start:stop], keys, values, attn_mask=bias, scale=scaling, enable_gqa=grouped
        )
    return output


def like_sdpa(query: Tensor, value: Tensor) -> Tensor:
    """An empty [batch, head, pos, d_value] whose positions follow each other in memory, as the module wants them."""
    batch, n_heads, length, _ = query.shape
    return query.new_empty(batch, length, n_heads, value.shape[-1]).transpose(1, 2)
