"""Rules of hybrid attention, and what a head sees under one, pair by pair."""

from __future__ import annotations

from hypothesis import strategies as st

from mmlens.hybrid.rule import StreamingRule

rules = st.builds(StreamingRule, st.integers(0, 9), st.integers(1, 9))


def sees(rule: StreamingRule, query: int, key: int, first: int) -> bool:
    return first <= key <= query and (key - first < rule.sink or query - key < rule.window)
