"""Streaming heads on the CPU: attention by blocks of queries, each with the keys it can see and no others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
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
    kv_heads: Sequence[int],
    mask: Tensor | None = None,
    first: Int[Tensor, " batch"] | None = None,
    scaling: float | None = None,
    block: int = BLOCK,
) -> Float[Tensor, "batch head pos d_value"]:
    """softmax(q k^T scaling + mask) v over the keys of `rule`, for queries and keys of the same positions.

    `kv_heads` names each query head's key-value head. `mask` is the model's own, boolean [batch, 1, pos, pos] (None:
    causal); what it forbids stays forbidden. `first` are the rows' first real positions where rows are padded.
    """
    batch, n_heads, length, _ = query.shape
    output = query.new_empty(batch, n_heads, length, value.shape[-1])
    index = torch.tensor(list(kv_heads), device=query.device)
    # Rows that begin later have their sinks later.
    earliest, latest = (0, 0) if first is None else (int(first.min()), int(first.max()))
    sinks = earliest, min(latest + rule.sink, length)
    same: dict[int, Tensor] = {}
    for start in range(0, length, block):
        stop = min(start + block, length)
        near = max(start - rule.window + 1, 0)
        parted = near > sinks[1]
        ranges = (sinks, (near, stop)) if parted else ((min(sinks[0], near), stop),)
        keys, values = (
            torch.cat([tensor[:, :, low:high] for low, high in ranges], 2)[:, index]
            for tensor in (key, value)
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
            query[:, :, start:stop], keys, values, attn_mask=bias, scale=scaling
        )
    return output
