"""Streaming heads on the CPU: attention by blocks of queries, each with the keys it can see and no others."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from mmlens.hybrid.rule import StreamingRule

BLOCK = 64
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
    length, grouped = query.shape[2], query.shape[1] != key.shape[1]
    output = like_sdpa(query, value)
    # Rows that begin later have their sinks later.
    earliest, latest = (0, 0) if first is None else (int(first.min()), int(first.max()))
    sinks_end = min(latest + rule.sink, length)
    # The first queries of every row see all that is before them.
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
    for start in range(whole, length, block):
        stop = min(start + block, length)
        near = min(max(start - rule.window + 1, sinks_end), stop)
        keys, values = (
            torch.cat([tensor[:, :, earliest:sinks_end], tensor[:, :, near:stop]], 2)
            for tensor in (key, value)
        )
        if mask is None:
            bias = _unpadded_bias(rule, stop - start, query.dtype, query.device)
        else:
            columns = torch.cat([torch.arange(earliest, sinks_end), torch.arange(near, stop)]).to(mask.device)
            rows = torch.arange(start, stop, device=mask.device)
            seen = rule.allowed(rows, columns, first)
            seen = seen[None, None] if first is None else seen[:, None]
            bias = _bias(seen & mask[:, :, start:stop][..., columns], query.dtype)
        output[:, :, start:stop] = F.scaled_dot_product_attention(
            query[:, :, start:stop], keys, values, attn_mask=bias, scale=scaling, enable_gqa=grouped
        )
    return output


# Kept from a run in inference mode, it would be refused in a later one with gradients.
@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _unpadded_bias(rule: StreamingRule, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a block of `size` queries adds to the scores of sinks and window: the same wherever the block lies."""
    start = rule.sink + rule.window
    columns = torch.cat([torch.arange(rule.sink), torch.arange(rule.sink + 1, start + size)])
    return _bias(rule.allowed(torch.arange(start, start + size), columns)[None, None], dtype).to(device)


def _bias(seen: Bool[Tensor, "batch _ query key"], dtype: torch.dtype) -> Float[Tensor, "batch _ query key"]:
    """SDPA on the CPU would turn a boolean mask into this one in every call."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, torch.finfo(dtype).min
    )


def like_sdpa(query: Tensor, value: Tensor) -> Tensor:
    """An empty [batch, head, pos, d_value] whose positions follow each other in memory, as the module wants them."""
    batch, n_heads, length, _ = query.shape
    return query.new_empty(batch, length, n_heads, value.shape[-1]).transpose(1, 2)
