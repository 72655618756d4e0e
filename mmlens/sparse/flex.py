"""Dense and streaming heads in one call of torch's FlexAttention, with a block mask per head (CUDA)."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from mmlens.sparse.rule import StreamingRule


def flex_attention(
    query: Float[Tensor, "batch head pos d_head"],
    key: Float[Tensor, "batch kv_head pos d_head"],
    value: Float[Tensor, "batch kv_head pos d_value"],
    rule: StreamingRule,
    dense: Bool[Tensor, " head"],
    mask: Bool[Tensor, "batch _ pos pos"] | None = None,
    first: Int[Tensor, " batch"] | None = None,
    scaling: float | None = None,
) -> Float[Tensor, "batch head pos d_value"]:
    """softmax(q k^T scaling + mask) v over the keys of `rule`, or all causal ones for heads that are `dense`.

    Blocks of keys that a head does not see are skipped. On the CPU the same function runs uncompiled, for tests.
    """
    block_mask = _block_mask(rule, dense.to(query.device), mask, first, query)
    attend = _compiled() if query.is_cuda else flex.flex_attention
    return attend(
        query,
        key,
        value,
        block_mask=block_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


@cache
def _compiled() -> Any:
    return torch.compile(flex.flex_attention, dynamic=False)


def _block_mask(
    rule: StreamingRule, dense: Tensor, mask: Tensor | None, first: Tensor | None, query: Tensor
) -> flex.BlockMask:
    n_rows, n_heads, length, _ = query.shape
    sink, window = rule.sink, rule.window

    begins = torch.zeros(n_rows, dtype=torch.int, device=query.device) if first is None else first
    # A lambda, for torch counts its arguments, which a type checker around a function would hide.
    streams = lambda row, head, at, key: (  # noqa: E731
        dense[head] | (at - key < window) | ((key >= begins[row]) & (key < begins[row] + sink))
    )
    if mask is None:
        sees = lambda row, head, at, key: (key <= at) & streams(row, head, at, key)  # noqa: E731
    else:
        sees = lambda row, head, at, key: mask[row, 0, at, key] & streams(row, head, at, key)  # noqa: E731
    return flex.create_block_mask(
        sees, None if mask is None else n_rows, n_heads, length, length, device=query.device
    )
