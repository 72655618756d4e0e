"""The rule against a loop over every pair, whatever the sizes and the padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streaming_rules import rules, sees

from mmlens.hybrid.rule import StreamingRule


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


@pytest.mark.parametrize(("sink", "window"), [(-1, 4), (2, 0)])
def test_a_rule_without_a_window_is_refused(sink: int, window: int) -> None:
    with pytest.raises(ValueError, match=f"sink={sink} and window={window}"):
        StreamingRule(sink, window)
