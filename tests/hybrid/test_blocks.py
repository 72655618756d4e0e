"""Attention by blocks against softmax over the keys of the rule, whatever the size of a block."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming_rules import rules, sees

from mmlens.hybrid.blocks import streaming_attention
from mmlens.hybrid.rule import StreamingRule, first_positions


@settings(deadline=None)
@given(
    rule=rules,
    length=st.integers(2, 40),
    block=st.sampled_from([1, 3, 8, 16]),
    padding=st.integers(0, 12),
    seed=st.integers(0, 100),
)
def test_blocks_are_softmax_over_the_rule(
    rule: StreamingRule, length: int, block: int, padding: int, seed: int
) -> None:
    drawn = torch.Generator().manual_seed(seed)
    padding = min(padding, length - 1)
    query = torch.randn(2, 4, length, 8, generator=drawn)
    key, value = (torch.randn(2, 2, length, 8, generator=drawn) for _ in range(2))
    firsts = [0, padding]
    real = torch.arange(length) >= torch.tensor(firsts)[:, None]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = causal[None, None] & real[:, None, None]
    first = first_positions(mask)
    assert first.tolist() == firsts
    kv_heads = [0, 0, 1, 1]
    found = streaming_attention(query, key, value, rule, mask, first, 0.3, block)
    for row in range(2):
        for head in range(4):
            for at in range(firsts[row], length):
                keys = [other for other in range(length) if sees(rule, at, other, firsts[row])]
                scores = 0.3 * key[row, kv_heads[head], keys] @ query[row, head, at]
                expected = scores.softmax(0) @ value[row, kv_heads[head], keys]
                torch.testing.assert_close(found[row, head, at], expected, atol=1e-5, rtol=1e-4)
    unpadded = streaming_attention(query[:1], key[:1], value[:1], rule, None, None, 0.3, block)
    torch.testing.assert_close(unpadded, found[:1], atol=1e-5, rtol=1e-4)
