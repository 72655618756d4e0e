"""Streaming heads on CUDA: torch's FlexAttention over the blocks of keys that a query block sees."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import flex_attention as flex

from mmlens import internals
from mmlens.hybrid.rule import StreamingRule

BLOCK = 128


def flex_attention(
    query: Float[Tensor, "batch head pos d_head"],
    key: Float[Tensor, "batch kv_head pos d_head"],
    value: Float[Tensor, "batch kv_head pos d_value"],
    streams: Bool[Tensor, " head"],
    rule: StreamingRule,
    mask: Bool[Tensor, "_ 1 pos pos"] | None = None,
    first: Int[Tensor, " batch"] | None = None,
    scaling: float | None = None,
) -> Float[Tensor, "batch head pos d_value"]:
    """softmax(q k^T scaling + mask) v over the keys of `rule`; no block of keys is read for heads that do not stream.

    What comes out for those is not defined. All heads go in, so that a layer's shape, for which the kernel is compiled,
    does not depend on how many of them stream. Without a GPU the same function runs uncompiled, for tests.
    """
    block_mask = streaming_blocks(
        rule, streams.to(query.device), query.shape[2], mask, first, gradient=query.requires_grad
    )
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


def streaming_blocks(
    rule: StreamingRule,
    streams: Bool[Tensor, " head"],
    length: int,
    mask: Bool[Tensor, "batch 1 pos pos"] | None = None,
    first: Int[Tensor, " batch"] | None = None,
    *,
    gradient: bool = False,
) -> flex.BlockMask:
    """Which blocks of keys each block of queries sees, in part or whole, for heads that stream; none for the others.

    Told block by block: from a function of positions, torch would make a mask of heads x length^2 bytes first.
    """
    sink, window = rule.sink, rule.window
    # Lambdas, for torch counts their arguments, which a type checker around a function would hide.
    if mask is None:
        blocks = _causal_blocks(rule, length, streams.device)
        sees = lambda row, head, at, key: (key <= at) & ((at - key < window) | (key < sink))  # noqa: E731
    else:
        begins = torch.zeros(len(mask), dtype=torch.int, device=mask.device) if first is None else first
        room = -length % BLOCK
        # Without the axis of heads: an older torch takes no plain number among the indices.
        allowed = mask[:, 0]
        tiles = F.pad(allowed, (0, room, 0, room)).unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
        blocks = _listed(rule, length, begins, tiles.any(-1).any(-2), tiles.all(-1).all(-2))
        sees = lambda row, head, at, key: (  # noqa: E731
            allowed[row, at, key]
            & ((at - key < window) | ((key >= begins[row]) & (key < begins[row] + sink)))
        )
    n_in_part, in_part, n_whole, whole = blocks
    chosen = streams.int()[None, :, None]
    per_head = (-1, len(streams), -1, -1)
    return flex.BlockMask.from_kv_blocks(
        n_in_part * chosen,
        in_part.expand(per_head),
        n_whole * chosen,
        whole.expand(per_head),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(length, length),
        **internals.query_blocks(gradient),
    )


Listed = tuple[Tensor, Tensor, Tensor, Tensor]
"""Blocks of keys seen in part, and whole: their number [batch, 1, query block] and, first in each row, which."""


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def _causal_blocks(rule: StreamingRule, length: int, device: torch.device) -> Listed:
    number = -(-length // BLOCK)
    full = torch.arange(1, number + 1, device=device) * BLOCK <= length
    every = torch.ones(1, number, number, dtype=torch.bool, device=device)
    return _listed(
        rule, length, torch.zeros(1, dtype=torch.int, device=device), every, (full[:, None] & full)[None]
    )


def _listed(
    rule: StreamingRule,
    length: int,
    first: Int[Tensor, " batch"],
    some: Bool[Tensor, "batch block block"],
    every: Bool[Tensor, "batch block block"],
) -> Listed:
    """The blocks that the rule lets through of those of which `some` or `every` pair is open otherwise."""
    low = torch.arange(0, length, BLOCK, device=first.device)
    high = (low + BLOCK).clamp(max=length) - 1
    nearest, farthest = low[:, None] - high, high[:, None] - low
    begin = first[:, None, None]
    touches = (high >= begin) & (low < begin + rule.sink)
    within = (low >= begin) & (high < begin + rule.sink)
    whole = every & (nearest >= 0) & ((farthest < rule.window) | within)
    in_part = some & (farthest >= 0) & ((nearest < rule.window) | touches) & ~whole
    return (*_in_order(in_part), *_in_order(whole))


def _in_order(blocks: Bool[Tensor, "batch block block"]) -> tuple[Tensor, Tensor]:
    chosen = blocks[:, None].int()
    return chosen.sum(-1, dtype=torch.int), torch.argsort(chosen, dim=-1, descending=True, stable=True).int()
