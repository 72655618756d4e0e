"""Where heads look: attention mass from the question to a region, and the scores built on it.

All of it is read from the pattern's rows at the query positions, layer by layer during one forward pass;
no position x position pattern is ever made.

- Retrieval Attention Mass (RAM), Eq. 1 of arXiv 2606.05843: `ram`.
- The same mass on all visual tokens, by which the paper ranks its "vision heads": `vision_mass`.
- Key Token Ratio and Key Token Coverage, Eq. 22-25: `key_token_ratio`, `key_token_coverage`.
- All of these from one pass: `evidence_attention`.

A [layer, head] at which the model has no head (a layer without softmax attention, or with fewer heads than others)
is NaN throughout. Models that read images by cross-attention are refused: their keys are no positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmlens.data.examples import Example
from mmlens.head_scores import HeadScores
from mmlens.heads import Heads, as_head_set
from mmlens.model.hooked_vlm import HookedVLM, Inputs, model_of
from mmlens.model.prompt import Prompt, prompt_of
from mmlens.scores.rows import (
    LayerBuffer,
    Rows,
    check_positions,
    kinds_of_examples,
    prompts_of,
    read_rows,
    real_positions,
    refuse_cross_attention,
    scored_examples,
)
from mmlens.token_map import BoxMapping


def attention_mass(
    model: HookedVLM, inputs: Inputs, queries: Bool[Tensor, "batch pos"], keys: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch layer head"]:
    """Mean over query positions of the attention summed over key positions (Eq. 1), for every head.

    One forward pass. The result is float32 on the CPU, between 0 and 1; NaN where the model has no head.

    Raises TypeError for queries or keys that are not boolean; ValueError where their shape is not that of
    the inputs, where a batch row has no query or no key, or where one lies on padding; CrossAttentionError, before
    anything runs, for a model that reads images by cross-attention.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> prompt = model.prompt("What colour is K", images=[])
    >>> everywhere = torch.ones(prompt.inputs["input_ids"].shape, dtype=torch.bool)
    >>> mass = attention_mass(model, prompt, queries=everywhere, keys=everywhere)
    >>> bool(torch.allclose(mass, torch.ones(1, model.cfg.n_layers, model.cfg.n_heads), atol=1e-5))
    True
    """
    refuse_cross_attention(model_of(model))
    real = real_positions(inputs)
    check_positions("keys", keys, real)
    mass = LayerBuffer(model, len(real))

    def consume(layer: int, rows: Rows, query_mask: Bool[Tensor, "batch query"]) -> None:
        mass.put(layer, mass_of_rows(rows, query_mask, keys.to(rows.device)))

    read_rows(model, inputs, queries, real, consume)
    return mass.take()


def vision_mass(model: HookedVLM, prompt: Prompt) -> Float[Tensor, "batch layer head"]:
    """`attention_mass` from the question's tokens to all visual tokens of the prompt.

    The visual tokens are those at which the token map says `is_image`, learnt separators among them. Raises
    ValueError where a prompt of the batch has no image.
    """
    token_map = prompt_of(prompt).token_map
    return attention_mass(model, prompt, token_map.is_question, token_map.is_image)


def ram(
    model: HookedVLM,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    mapping: BoxMapping = "merged",
    progress: bool = True,
) -> HeadScores:
    """Retrieval Attention Mass of every head on every example (Eq. 1): from the question to the evidence.

    RAM of head h = mean over question tokens x of the sum over evidence tokens y of A_h[x, y]; causal, not
    divided by the number of evidence tokens. `mapping` is how boxes become tokens ("merged", or
    "paper_floor" for the paper's index). Examples of like size share a batch, and `per_example` is in the
    order given.

    Raises ValueError for no examples, and for examples without evidence (named); CrossAttentionError as
    `attention_mass` does.
    """
    examples = scored_examples(model, examples, batch_size, progress, mapping)
    per_example = torch.empty(len(examples), *model.grid.shape)
    for chosen, prompt in prompts_of(model, examples, batch_size, progress, "RAM"):
        evidence = prompt.token_map.evidence([examples[i] for i in chosen], mapping=mapping)
        per_example[chosen] = attention_mass(model, prompt, prompt.token_map.is_question, evidence)
    return HeadScores(per_example, "RAM", kinds_of_examples(examples), model.grid)


@dataclass(frozen=True)
class EvidenceAttention:
    """What `evidence_attention` reads in one pass: RAM, vision mass, and the key tokens of every head.

    `hits[i]` [layer, head, evidence token] says which of example i's evidence tokens are key tokens of each
    head.
    """

    ram: HeadScores
    vision_mass: HeadScores
    hits: tuple[Bool[Tensor, "layer head _"], ...]

    @property
    def key_token_ratio(self) -> HeadScores:
        """100 |T_top(h) & V*| / |V*| (Eq. 23), in percent; the paper calls 50 and more a hit."""
        ratio = torch.stack([100 * hits.float().mean(-1) for hits in self.hits])
        ratio = ratio.masked_fill(~self.ram.grid.exists, torch.nan)
        return HeadScores(ratio, "key token ratio", self.ram.kinds, self.ram.grid)

    def key_token_coverage(self, heads: Heads) -> Float[Tensor, " example"]:
        """100 |union over the heads of (T_top(h) & V*)| / |V*| (Eq. 25), in percent, for every example."""
        chosen = list(as_head_set(heads, self.ram.grid))
        layers, within = [layer for layer, _ in chosen], [head for _, head in chosen]
        return torch.stack([100 * hits[layers, within].any(0).float().mean() for hits in self.hits])


def evidence_attention(
    model: HookedVLM,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    mapping: BoxMapping = "merged",
    progress: bool = True,
) -> EvidenceAttention:
    """RAM, vision mass and key tokens of every head on every example, from one pass over the rows.

    Key tokens (Eq. 22-25): average the attention over the question's tokens, over all L positions of the
    prompt (padding is none of them); a head's key tokens T_top are the max(1, floor(.05 L)) positions with
    most of it, the earlier first among equals. Arguments and errors as in `ram`.
    """
    examples = scored_examples(model, examples, batch_size, progress, mapping)
    shape = len(examples), *model.grid.shape
    to_evidence, to_vision = torch.empty(shape), torch.empty(shape)
    hits: dict[int, Tensor] = {}
    for chosen, prompt in prompts_of(model, examples, batch_size, progress, "evidence attention"):
        evidence = prompt.token_map.evidence([examples[i] for i in chosen], mapping=mapping)
        to_evidence[chosen], to_vision[chosen], of_batch = _read_evidence(model, prompt, evidence)
        hits |= zip(chosen, of_batch, strict=True)
    kinds = kinds_of_examples(examples)
    return EvidenceAttention(
        HeadScores(to_evidence, "RAM", kinds, model.grid),
        HeadScores(to_vision, "vision mass", kinds, model.grid),
        tuple(hits[index] for index in range(len(examples))),
    )


def _read_evidence(
    model: HookedVLM, prompt: Prompt, evidence: Bool[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch layer head"], Float[Tensor, "batch layer head"], list[Tensor]]:
    """Mass on the evidence and on all visual tokens; each example's hits [layer, head, evidence_token]."""
    real, is_image = real_positions(prompt), prompt.token_map.is_image
    check_positions("evidence", evidence, real)
    to_evidence, to_vision = LayerBuffer(model, len(prompt)), LayerBuffer(model, len(prompt))
    hits = [torch.zeros(*model.grid.shape, int(tokens.sum()), dtype=torch.bool) for tokens in evidence]

    def consume(layer: int, rows: Rows, query_mask: Bool[Tensor, "batch query"]) -> None:
        mean = mean_of_rows(rows, query_mask)
        for mass, keys in ((to_evidence, evidence), (to_vision, is_image)):
            mass.put(layer, torch.einsum("bhk,bk->bh", mean, keys.to(mean.device, mean.dtype)))
        top = key_tokens(mean, real.to(mean.device)).cpu()
        for row, of_example in enumerate(hits):
            of_example[layer, : top.shape[1]] = top[row][:, evidence[row].cpu()]

    read_rows(model, prompt, prompt.token_map.is_question, real, consume)
    return to_evidence.take(), to_vision.take(), hits


def key_token_ratio(
    model: HookedVLM,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    mapping: BoxMapping = "merged",
    progress: bool = True,
) -> HeadScores:
    """Share of the evidence tokens, in percent, that are among each head's key tokens (Eq. 22-23).

    See `evidence_attention`, which gives it together with RAM and the coverage of any set of heads.
    """
    return evidence_attention(
        model, examples, batch_size=batch_size, mapping=mapping, progress=progress
    ).key_token_ratio


def key_token_coverage(
    model: HookedVLM,
    examples: Sequence[Example],
    heads: Heads,
    *,
    batch_size: int = 8,
    mapping: BoxMapping = "merged",
    progress: bool = True,
) -> Float[Tensor, " example"]:
    """Share of the evidence tokens, in percent, that are key tokens of at least one of `heads` (Eq. 24-25).

    See `evidence_attention`, which answers for any number of head sets after one pass.
    """
    chosen = as_head_set(heads, model_of(model).grid)
    return evidence_attention(
        model, examples, batch_size=batch_size, mapping=mapping, progress=progress
    ).key_token_coverage(chosen)


def mass_of_rows(
    rows: Rows, query_mask: Bool[Tensor, "batch query"], keys: Bool[Tensor, "batch key"]
) -> Float[Tensor, "batch head"]:
    """Mean over the real queries of the sum over `keys`, from rows padded to one number of queries.

    >>> rows = torch.tensor([[[[.9, .1], [.4, .6]]]])  # one example, one head, two queries, two keys
    >>> mass = mass_of_rows(rows, torch.tensor([[True, True]]), torch.tensor([[False, True]]))
    >>> round(mass.item(), 4)
    0.35
    """
    sums = torch.einsum("bhqk,bk->bhq", rows, keys.to(rows.dtype))
    # A padded query's row holds whatever the padding gave, NaN with some masks: drop it before the mean.
    return sums.masked_fill(~query_mask[:, None], 0).sum(-1) / query_mask.sum(-1)[:, None]


def mean_of_rows(rows: Rows, query_mask: Bool[Tensor, "batch query"]) -> Float[Tensor, "batch head key"]:
    """Mean of the rows over the real queries: the paper's average attention of each head (Eq. 22)."""
    if not bool(query_mask.all()):
        rows = rows.masked_fill(~query_mask[:, None, :, None], 0)
    return rows.sum(2) / query_mask.sum(-1)[:, None, None]


def key_tokens(
    mean: Float[Tensor, "batch head key"], real: Bool[Tensor, "batch key"]
) -> Bool[Tensor, "batch head key"]:
    """The max(1, floor(.05 L)) of an example's L real positions with most average attention (T_top, Eq. 22).

    >>> mean = torch.tensor([[[.2, .5, .3]]])
    >>> key_tokens(mean, torch.ones(1, 3, dtype=torch.bool)).tolist()
    [[[False, True, False]]]
    """
    order = mean.masked_fill(~real[:, None], -1.0).sort(dim=-1, descending=True, stable=True).indices
    counts = (real.sum(-1) // 20).clamp(min=1)
    first = torch.arange(mean.shape[-1], device=mean.device) < counts[:, None, None]
    return torch.zeros_like(mean, dtype=torch.bool).scatter(-1, order, first.expand_as(mean))
