"""Attention over shared and own keys against a softmax in float64, row by row, and against PyTorch's own."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mmlens.effects.shared_keys import shared_key_attention

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, float | None]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Queries, shared and own keys and values, a mask of any kind and a scale."""
    copies, batch, group = (draw(st.integers(1, 3)) for _ in range(3))
    n_kv_heads, n_shared, n_own = (draw(st.integers(1, 4)) for _ in range(3))
    n_queries = draw(st.integers(1, n_own))
    d_head, d_value = draw(st.sampled_from([(4, 4), (3, 5), (1, 2)]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    rows, n_heads, n_keys = copies * batch, n_kv_heads * group, n_shared + n_own
    query = torch.randn(rows, n_heads, n_queries, d_head)
    shared_key, shared_value = (torch.randn(batch, n_kv_heads, n_shared, d) for d in (d_head, d_value))
    own_key, own_value = (torch.randn(rows, n_kv_heads, n_own, d) for d in (d_head, d_value))
    kind = draw(st.sampled_from(["none", "boolean", "lowest", "bias"]))
    mask = None
    if kind != "none":
        of_rows = draw(st.sampled_from([1, batch, rows]))
        shape = (of_rows, draw(st.sampled_from([1, n_heads])), n_queries, n_keys)
        allowed = torch.rand(shape) > 0.4
        if kind != "boolean":
            allowed[..., 0] = True
        lowest = torch.zeros(shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        mask = {"boolean": allowed, "lowest": lowest, "bias": torch.randn(shape)}[kind]
    scaling = draw(st.sampled_from([None, 0.3, 2.0]))
    return query, shared_key, shared_value, own_key, own_value, mask, scaling


def laid_side_by_side(shared: Tensor, own: Tensor) -> Tensor:
    """Every row's keys or values: those of its example, then its own."""
    return torch.stack([torch.cat([shared[row % len(shared)], own[row]], 1) for row in range(len(own))])


def plain(case: Case) -> Tensor:
    """[row, query, head, d_value] in float64, one query at a time."""
    query, shared_key, shared_value, own_key, own_value, mask, scaling = case
    keys, values = laid_side_by_side(shared_key, own_key), laid_side_by_side(shared_value, own_value)
    rows, n_heads, n_queries, d_head = query.shape
    n_keys, group, batch = keys.shape[2], n_heads // keys.shape[1], len(shared_key)
    out = torch.zeros(rows, n_queries, n_heads, values.shape[-1], dtype=torch.float64)
    for row in range(rows):
        for head in range(n_heads):
            for q in range(n_queries):
                key, value = keys[row, head // group].double(), values[row, head // group].double()
                scores = key @ query[row, head, q].double() * (d_head**-0.5 if scaling is None else scaling)
                if mask is None:
                    scores[n_keys - n_queries + q + 1 :] = -torch.inf
                else:
                    of_row = mask[row if len(mask) == rows else row % batch if len(mask) == batch else 0]
                    added = of_row[head if len(of_row) > 1 else 0, q]
                    if added.dtype == torch.bool:
                        if not bool(added.any()):
                            continue
                        scores = scores.masked_fill(~added, -torch.inf)
                    else:
                        scores = scores + added.double()
                out[row, q, head] = scores.softmax(-1) @ value
    return out


@given(cases())
@settings(max_examples=150, deadline=None)
def test_it_is_a_softmax_over_both_kinds_of_keys(case: Case) -> None:
    torch.testing.assert_close(shared_key_attention(*case).double(), plain(case), atol=2e-6, rtol=1e-5)


@given(cases())
@settings(max_examples=100, deadline=None)
def test_it_is_what_sdpa_gives_on_keys_laid_side_by_side(case: Case) -> None:
    query, shared_key, shared_value, own_key, own_value, mask, scaling = case
    keys, values = laid_side_by_side(shared_key, own_key), laid_side_by_side(shared_value, own_value)
    rows, n_heads, n_queries, _ = query.shape
    if mask is None:
        mask = torch.ones(n_queries, keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - n_queries)
        mask = mask[None, None]
    full = mask.repeat(rows // len(mask), 1, 1, 1).expand(-1, n_heads, -1, -1)
    expected = F.scaled_dot_product_attention(query, keys, values, full, scale=scaling, enable_gqa=True)
    torch.testing.assert_close(shared_key_attention(*case), expected.transpose(1, 2), atol=2e-6, rtol=1e-5)


@given(cases())
@settings(max_examples=30, deadline=None)
def test_in_bfloat16_it_is_near_the_exact_value(case: Case) -> None:
    *tensors, mask, scaling = case
    low = [x.bfloat16() for x in tensors]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.clamp_min(torch.finfo(torch.bfloat16).min).bfloat16()
    z = shared_key_attention(*low, mask, scaling)  # type: ignore[call-arg]
    exact = plain((*(x.float() for x in low), None if mask is None else mask, scaling))
    assert z.dtype == torch.bfloat16
    torch.testing.assert_close(z.double(), exact, atol=0.1, rtol=0.05)


def test_a_row_that_may_attend_to_nothing_gives_zero() -> None:
    query, key, value = torch.randn(2, 2, 1, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    own_key, own_value = torch.randn(2, 1, 1, 4), torch.randn(2, 1, 1, 4)
    mask = torch.ones(2, 1, 1, 4, dtype=torch.bool)
    mask[1] = False
    z = shared_key_attention(query, key, value, own_key, own_value, mask)
    assert bool((z[1] == 0).all()) and bool((z[0] != 0).all())


def test_large_scores_do_not_overflow() -> None:
    query = torch.full((2, 1, 1, 2), 300.0)
    key, value = torch.full((1, 1, 2, 2), 300.0), torch.tensor([[[[1.0], [3.0]]]])
    own_key, own_value = torch.full((2, 1, 1, 2), -300.0), torch.full((2, 1, 1, 1), 9.0)
    z = shared_key_attention(query, key, value, own_key, own_value, None)
    torch.testing.assert_close(z, torch.full((2, 1, 1, 1), 2.0))


def test_nothing_that_is_given_is_written_to() -> None:
    tensors = [torch.randn(4, 2, 2, 4), *(torch.randn(2, 1, 3, 4) for _ in range(2))]
    tensors += [torch.randn(4, 1, 2, 4) for _ in range(2)]
    mask = torch.randn(2, 1, 2, 5)
    copies = [x.clone() for x in (*tensors, mask)]
    shared_key_attention(*tensors, mask)  # type: ignore[call-arg]
    assert all(map(torch.equal, (*tensors, mask), copies))
