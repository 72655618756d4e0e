"""What is read of transformers' private or fast-moving interface: here, and nowhere else.

tests/test_internals.py asks each of them for what the
installed version gives, and its failure names what moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CACHE_KEYWORDS = ("cache", "past_key_values")
"""What a decoder's forward calls its key-value cache: the first from transformers 5.24 on, the second before."""


def cached_length(kwargs: Mapping[str, Any]) -> int:
    """How many positions the cache in a decoder's keyword inputs already holds; 0 where there is no cache."""
    held = (kwargs[name] for name in CACHE_KEYWORDS if kwargs.get(name) is not None)
    cache = next(held, None)
    return 0 if cache is None else int(cache.get_seq_length())
