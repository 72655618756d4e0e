"""Each path of a layer against softmax in double precision over the pairs that a head sees."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming_rules import sees
from torch import Tensor

from mmlens.hybrid.layer import NotCausalError, StreamingLayer
from mmlens.hybrid.rule import StreamingRule

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

CLOSE = {torch.float64: 1e-10, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """Attention of two rows, the second padded on the left where `padding` is not None."""

    kv_heads: int
    group: int
    d_head: int
    d_value: int
    length: int
    padding: int | None
    window: int | None
    """The model's own window, as a sliding layer's mask has it."""
    rule: StreamingRule
    dense: tuple[bool, ...]
    dtype: torch.dtype
    seed: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        drawn = torch.Generator().manual_seed(self.seed)
        return tuple(
            torch.randn(2, heads, self.length, size, generator=drawn).to(self.dtype)
            for heads, size in (
                (self.kv_heads * self.group, self.d_head),
                (self.kv_heads, self.d_head),
                (self.kv_heads, self.d_value),
            )
        )  # type: ignore[return-value]

    @property
    def firsts(self) -> tuple[int, int]:
        return 0, self.padding or 0

    def mask(self) -> Tensor | None:
        if self.padding is None and self.window is None:
            return None
        own = [
            [[key >= first and self.own(at, key) for key in range(self.length)] for at in range(self.length)]
            for first in self.firsts
        ]
        return torch.tensor(own)[:, None]

    def own(self, at: int, key: int) -> bool:
        return key <= at and (self.window is None or at - key < self.window)

    def expected(self) -> Tensor:
        """[batch, pos, head, d_value] in double precision, query by query; 0 where a row is padding."""
        query, key, value = (tensor.double() for tensor in self.tensors())
        out = torch.zeros(2, self.length, query.shape[1], self.d_value, dtype=torch.double)
        for row, first in enumerate(self.firsts):
            for head in range(query.shape[1]):
                for at in range(first, self.length):
                    keys = [
                        other
                        for other in range(first, self.length)
                        if self.own(at, other) and (self.dense[head] or sees(self.rule, at, other, first))
                    ]
                    scores = 0.3 * key[row, head // self.group, keys] @ query[row, head, at]
                    out[row, at, head] = scores.softmax(0) @ value[row, head // self.group, keys]
        return out

    def layer(self, path: str) -> StreamingLayer:
        return StreamingLayer("layer 0", torch.tensor(self.dense), self.rule, path)

    def check(self, found: Tensor, expected: Tensor, close: float) -> None:
        for row, first in enumerate(self.firsts):
            torch.testing.assert_close(found[row, first:].double(), expected[row, first:], atol=close, rtol=0)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    length = draw(st.integers(2, 90))
    return Case(
        kv_heads,
        group,
        d_head=draw(st.sampled_from([8, 16])),
        d_value=draw(st.sampled_from([8, 16])),
        length=length,
        padding=draw(st.none() | st.integers(0, length - 1)),
        window=draw(st.none() | st.integers(1, 30)),
        rule=StreamingRule(draw(st.integers(0, 6)), draw(st.integers(1, 12))),
        dense=tuple(draw(st.lists(st.booleans(), min_size=kv_heads * group, max_size=kv_heads * group))),
        dtype=draw(st.sampled_from(list(CLOSE))),
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_blocks_flex_and_the_reference_are_softmax_over_what_a_head_sees(case: Case) -> None:
    query, key, value = case.tensors()
    mask = case.mask()
    if any(case.dense) and all(case.dense):
        # Nothing streams: the layer leaves the call to the model.
        assert not case.layer("blocks").acts_on(query, 0)
        return
    expected = case.expected()
    for path in ("blocks", "flex"):
        found = case.layer(path).run(query, key, value, mask, True, 0.3)
        assert found.dtype == case.dtype
        case.check(found, expected, CLOSE[case.dtype])
    keys, values = (tensor.repeat_interleave(case.group, 1) for tensor in (key, value))
    seen = case.layer("masked").masked(query, key, mask, True, 0)
    scores = (0.3 * query.double() @ keys.double().mT).masked_fill(~seen, -torch.inf)
    case.check((scores.softmax(-1) @ values.double()).transpose(1, 2), expected, 1e-10)


def test_an_additive_mask_is_cut_as_a_boolean_one() -> None:
    case = Case(2, 2, 8, 8, 12, 3, 5, StreamingRule(1, 2), (True, False, False, False), torch.float32, 0)
    query, key, _ = case.tensors()
    mask = case.mask()
    assert mask is not None
    lowest = torch.finfo(torch.float32).min
    additive = torch.zeros(mask.shape).masked_fill(~mask, lowest)
    layer = case.layer("auto")
    found = layer.masked(query, key, additive, False, 0)
    assert torch.equal(found == 0, layer.masked(query, key, mask, False, 0))
    assert set(found.unique().tolist()) == {lowest, 0.0}


def test_gradients_are_those_of_the_masked_reference() -> None:
    case = Case(2, 2, 8, 8, 70, 3, None, StreamingRule(2, 6), (True, False, False, False), torch.float64, 1)
    mask, layer = case.mask(), case.layer("blocks")
    grads = []
    for fast in (True, False):
        query, key, value = (tensor.requires_grad_() for tensor in case.tensors())
        if fast:
            out = layer.run(query, key, value, mask, True, 0.3)
        else:
            keys, values = (tensor.repeat_interleave(2, 1) for tensor in (key, value))
            scores = (0.3 * query @ keys.mT).masked_fill(~layer.masked(query, key, mask, True, 0), -1e300)
            out = (scores.softmax(-1) @ values).transpose(1, 2)
        out[1, 3:].square().sum().add(out[0].square().sum()).backward()
        grads.append([query.grad, key.grad, value.grad])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-6)


def test_what_is_kept_from_inference_mode_serves_a_run_with_gradients() -> None:
    case = Case(1, 2, 8, 8, 200, None, None, StreamingRule(3, 7), (True, False), torch.float32, 2)
    layer = case.layer("blocks")
    with torch.inference_mode():
        first = layer.run(*case.tensors(), None, True, None)
    again = layer.run(*(tensor.requires_grad_() for tensor in case.tensors()), None, True, None)  # type: ignore[call-arg]
    again.sum().backward()
    assert torch.equal(first, again)


def test_a_mask_that_looks_ahead_is_refused() -> None:
    case = Case(1, 2, 8, 8, 20, None, None, StreamingRule(1, 2), (True, False), torch.float32, 0)
    ahead = torch.ones(20, 20, dtype=torch.bool).tril(2)[None, None]
    for path in ("blocks", "flex"):
        with pytest.raises(NotCausalError, match="layer 0 lets positions see"):
            case.layer(path).run(*case.tensors(), ahead, False, None)
    with pytest.raises(NotCausalError, match="layer 0 lets positions see"):
        case.layer("masked").masked(*case.tensors()[:2], None, False, 0)
