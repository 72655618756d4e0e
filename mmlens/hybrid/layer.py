"""One attention layer under hybrid attention: which path a call takes, and the masked reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from mmlens.errors import InvalidTypeError, UnsupportedError
from mmlens.hybrid.blocks import like_sdpa, streaming_attention
from mmlens.hybrid.flex import flex_attention
from mmlens.hybrid.rule import StreamingRule, first_positions

METHODS = ("auto", "masked", "blocks", "flex")


@dataclass
class Tally:
    """What the layers were asked for: the longest run of several positions, and whether any head streamed in one."""

    longest: int = 0
    streamed: bool = False


@dataclass(frozen=True)
class StreamingLayer:
    """`dense` [head]: the heads that attend to everything; all others follow `rule`. `method`: `hybrid_attention`'s.

    `answer` [batch, query], where it is given, are queries that follow the prompt: they see everything in all heads.
    """

    name: str
    dense: Bool[Tensor, " head"]
    rule: StreamingRule
    method: str = "auto"
    tally: Tally = field(default_factory=Tally)

    def acts_on(
        self,
        query: Float[Tensor, "batch head query d_head"],
        first: int,
        answer: Bool[Tensor, "batch query"] | None = None,
    ) -> bool:
        """Whether a call is hybrid: several queries, some that do not see all, and a head that streams."""
        length = query.shape[2]
        if length == 1:
            return False
        of_prompt = length if answer is None else int((~answer).any(0).sum())
        acts = not bool(self.dense.all()) and not self.rule.sees_all(first + of_prompt) and of_prompt > 0
        self.tally.longest = max(self.tally.longest, first + of_prompt)
        self.tally.streamed |= acts
        return acts

    def is_fast(self, mask: Tensor | None) -> bool:
        """Whether a call under this mask may leave the masked reference."""
        return self.method != "masked" and (mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1))

    def masked(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        causal: bool,
        first: int,
        answer: Bool[Tensor, "batch query"] | None = None,
    ) -> Tensor:
        """The model's mask with the rule in it [batch or 1, head, query, key]: boolean, or additive as given."""
        self._check(query, key, mask, causal, first)
        queries = torch.arange(first, first + query.shape[2], device=query.device)
        keys = torch.arange(key.shape[2], device=query.device)
        own = None if mask is None else mask[..., : len(keys)]
        seen = None if own is None else own if own.dtype == torch.bool else own == 0
        allowed = self._allowed(queries, keys, None if seen is None else first_positions(seen), answer)
        if own is None:
            return allowed & (queries[:, None] >= keys)
        if own.dtype == torch.bool:
            return allowed & own
        return own.masked_fill(~allowed, torch.finfo(own.dtype).min)

    def run(
        self,
        query: Float[Tensor, "batch head pos d_head"],
        key: Float[Tensor, "batch kv_head key d_head"],
        value: Float[Tensor, "batch kv_head key d_value"],
        mask: Tensor | None,
        causal: bool,
        scaling: float | None,
        answer: Bool[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch pos head d_value"]:
        """Dense heads by SDPA, streaming heads by the fast path of the device; a run from the prompt's first token.

        An answer's queries, the last ones, are then done once more, under a mask.
        """
        self._check(query, key, mask, causal, 0)
        length, group = query.shape[2], query.shape[1] // key.shape[1]
        key, value = key[:, :, :length], value[:, :, :length]
        mask = None if mask is None else mask[..., :length]
        first = None if mask is None else first_positions(mask)
        given = self.rule, mask, first, scaling
        flexible = self.method == "flex" or (query.is_cuda and self.method == "auto")
        if not flexible and not self.dense.any() and answer is None:
            return streaming_attention(query, key, value, *given).transpose(1, 2)
        output = like_sdpa(query, value)
        if flexible:
            output[:] = flex_attention(query, key, value, ~self.dense, *given)
        else:
            for heads, kv_heads in _equal_groups(~self.dense, group, query.device):
                output[:, heads] = streaming_attention(
                    query[:, heads], key[:, kv_heads], value[:, kv_heads], *given
                )
        for heads, kv_heads in _equal_groups(self.dense, group, query.device):
            output[:, heads] = F.scaled_dot_product_attention(
                query[:, heads],
                key[:, kv_heads],
                value[:, kv_heads],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=len(heads) != len(kv_heads),
            )
        if answer is not None:
            tail = int(answer.any(0).int().argmax())
            positions = torch.arange(length, device=query.device)
            allowed = self._allowed(positions[tail:], positions, first, answer[:, tail:])
            allowed = allowed & (positions[tail:, None] >= positions if mask is None else mask[:, :, tail:])
            output[:, :, tail:] = F.scaled_dot_product_attention(
                query[:, :, tail:], key, value, attn_mask=allowed, scale=scaling, enable_gqa=group > 1
            )
        return output.transpose(1, 2)

    def _allowed(
        self,
        queries: Int[Tensor, " query"],
        keys: Int[Tensor, " key"],
        first: Int[Tensor, " batch"] | None,
        answer: Bool[Tensor, "batch query"] | None,
    ) -> Bool[Tensor, "batch head query key"]:
        """Which keys the rule lets each head see, [batch or 1, ...]; what comes after a dense query is not left out."""
        allowed = self.rule.allowed(queries, keys, first)
        allowed = allowed[None] if first is None else allowed
        if answer is not None:
            allowed = allowed | answer[:, :, None].to(allowed.device)
        return allowed[:, None] | self.dense.to(allowed.device)[None, :, None, None]

    def _check(self, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, first: int) -> None:
        """Raise NotCausalError where a query sees what comes after it, NotImplementedError where keys are cut off."""
        length, n_keys = query.shape[2], key.shape[2]
        if n_keys < first + length:
            raise UnsupportedError(
                f"{self.name}: {length} further positions are run on a cache that keeps {n_keys - length} of {first} "
                "keys (a sliding window): hybrid attention needs the prompt in one piece here"
            )
        if mask is None:
            sees_ahead = not causal
        else:
            next_keys = mask[..., : first + length].diagonal(first + 1, -2, -1)
            sees_ahead = bool((next_keys if mask.dtype == torch.bool else next_keys == 0).any())
        if sees_ahead:
            raise NotCausalError(
                f"{self.name} lets positions see what comes after them (both ways within an image, or an encoder): "
                "hybrid attention is defined for causal attention"
            )


def _equal_groups(
    chosen: Bool[Tensor, " head"], group: int, device: torch.device | str
) -> Iterator[tuple[Int[Tensor, " head"], Int[Tensor, " kv_head"]]]:
    """The chosen query heads with their key-value heads, those apart whose key-value heads have more or fewer of them.

    >>> [[ids.tolist() for ids in pair] for pair in _equal_groups(torch.tensor([1, 0, 1, 1, 0, 1]) > 0, 2, "cpu")]
    [[[0, 5], [0, 2]], [[2, 3], [1]]]
    """
    by_key = chosen.view(-1, group)
    counts = by_key.sum(-1)
    for count in sorted(set(counts.tolist()) - {0}):
        kv_heads = counts == count
        heads = (by_key & kv_heads[:, None]).flatten()
        yield heads.nonzero().flatten().to(device), kv_heads.nonzero().flatten().to(device)


class NotCausalError(InvalidTypeError):
    """Hybrid attention was asked of attention that is not causal."""
