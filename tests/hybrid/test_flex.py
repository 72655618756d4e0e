"""The blocks that FlexAttention is given against those that torch finds pair by pair, and its compiled kernel."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from mmlens.hybrid.flex import flex_attention, streaming_blocks
from mmlens.hybrid.layer import StreamingLayer
from mmlens.hybrid.rule import StreamingRule

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def listed(number: Tensor, which: Tensor) -> Tensor:
    """[batch, head, query block, key block]: the blocks of a list."""
    out = torch.zeros(which.shape, dtype=torch.bool)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in which.shape[:3])).reshape(-1, 3).tolist():
        out[tuple(at)][which[tuple(at)][: int(number[tuple(at)])].long()] = True
    return out


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [100, 128, 129, 700])
@pytest.mark.parametrize("sink", [0, 5, 128, 300])
def test_blocks_of_flex_attention_are_those_that_torch_finds_pair_by_pair(
    padded: bool, length: int, sink: int
) -> None:
    streams = torch.tensor([True, False, True])
    first = torch.tensor([0, 37]) if padded else None
    mask = None
    if first is not None:
        real = torch.arange(length) >= first[:, None]
        mask = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None, None]
    for window in (1, 7, 128, 257):
        found = streaming_blocks(StreamingRule(sink, window), streams, length, mask, first)
        expected = torch_flex.create_block_mask(
            found.mask_mod, None if mask is None else 2, 1, length, length, device="cpu"
        )
        some = listed(found.kv_num_blocks, found.kv_indices)
        every = listed(found.full_kv_num_blocks, found.full_kv_indices)
        assert not (some & every).any() and not (some | every)[:, 1].any()
        for head in (0, 2):
            needed = listed(expected.kv_num_blocks, expected.kv_indices)[:, 0]
            full = listed(expected.full_kv_num_blocks, expected.full_kv_indices)[:, 0]
            if padded:
                # Bounds of blocks overlook what rule and padding leave of a block together.
                assert (every[:, head] <= full).all() and (needed | full <= (some | every)[:, head]).all()
            else:
                assert torch.equal(every[:, head], full) and torch.equal(some[:, head], needed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for the CPU with g++")
@pytest.mark.parametrize("padded", [False, True])
def test_the_compiled_kernel_reads_no_more_than_the_listed_blocks(padded: bool) -> None:
    """FlexAttention's own kernel, for the CPU: uncompiled, it does not look at the lists."""
    generator, length, rule = torch.Generator().manual_seed(0), 700, StreamingRule(5, 140)
    query = torch.randn(2, 4, length, 16, generator=generator)
    key, value = (torch.randn(2, 2, length, 16, generator=generator) for _ in range(2))
    layer = StreamingLayer("layer 0", torch.tensor([True, False, False, False]), rule, "flex")
    mask = first = None
    if padded:
        first = torch.tensor([0, 37])
        real = torch.arange(length) >= first[:, None]
        mask = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None, None]
    blocks = streaming_blocks(rule, ~layer.dense, length, mask, first)
    kernel = torch.compile(torch_flex.flex_attention, dynamic=False)
    with torch.no_grad():
        compiled = kernel(query, key, value, block_mask=blocks, scale=0.3, enable_gqa=True)
        plain = flex_attention(query, key, value, ~layer.dense, rule, mask, first, 0.3)
    assert (compiled[:, 0] == 0).all()
    for row, start in enumerate((0, 0) if first is None else first.tolist()):
        torch.testing.assert_close(compiled[row, 1:, start:], plain[row, 1:, start:], atol=1e-5, rtol=0)
