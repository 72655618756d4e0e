"""The rule against a loop over every pair, whatever the sizes and the padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmlens.sparse.blocks import streaming_attention
from mmlens.sparse.rule import StreamingRule, first_positions

rules = st.builds(StreamingRule, st.integers(0, 9), st.integers(1, 9))


def sees(rule: StreamingRule, query: int, key: int, first: int) -> bool:
    return first <= key <= query and (key - first < rule.sink or query - key < rule.window)


@given(rule=rules, length=st.integers(1, 24), firsts=st.lists(st.integers(0, 10), min_size=1, max_size=3))
def test_allowed_is_the_rule_pair_by_pair(rule: StreamingRule, length: int, firsts: list[int]) -> None:
    positions = torch.arange(length)
    firsts = [min(first, length - 1) for first in firsts]
    found = rule.allowed(positions, positions, torch.tensor(firsts))
    expected = [
        [[sees(rule, query, key, first) for key in range(length)] for query in range(length)]
        for first in firsts
    ]
    assert found.tolist() == expected
    assert rule.allowed(positions, positions).tolist() == [
        [sees(rule, query, key, 0) for key in range(length)] for query in range(length)
    ]


@given(rule=rules, length=st.integers(1, 30))
def test_share_counts_the_scores(rule: StreamingRule, length: int) -> None:
    positions = torch.arange(length)
    seen = rule.allowed(positions, positions).sum()
    # Sinks within the window are counted once, as they are computed once.
    assert rule.share(length) == pytest.approx(float(seen) / (length * (length + 1) / 2))
    assert rule.sees_all(length) == (int(seen) == length * (length + 1) // 2)


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


@pytest.mark.parametrize(("sink", "window"), [(-1, 4), (2, 0)])
def test_a_rule_without_a_window_is_refused(sink: int, window: int) -> None:
    with pytest.raises(ValueError, match=f"sink={sink} and window={window}"):
        StreamingRule(sink, window)
