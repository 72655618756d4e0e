"""Where heads look: attention mass from the question to a region, and the scores built on it.

All of it is read from the pattern's rows at the query positions, layer by layer during one forward pass;
no position x position pattern is ever made. Equations are those of arXiv 2606.05843.

A [layer, head] at which the model has no head (a layer without softmax attention, or with fewer heads than others)
is NaN throughout. Models that read images by cross-attention are refused: their keys are no positions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmlens.arguments import BATCH_SIZE
from mmlens.data.examples import Evidence
from mmlens.errors import MmlensWarning
from mmlens.head_scores import HeadScores
from mmlens.heads import Heads, as_head_set
from mmlens.model.batches import Prompts, in_order
from mmlens.model.choosing import Positions
from mmlens.model.cross_attention import refuse_cross_attention
from mmlens.model.hooked_vlm import HookedVLM, model_of
from mmlens.model.inputs import Inputs
from mmlens.model.prompt import Prompt
from mmlens.scores.rows import (
    Rows,
    check_positions,
    checked_mask,
    mass_of_rows,
    mean_of_rows,
    mean_to,
    of_layers,
    read_heads,
    read_rows,
    real_positions,
)
from mmlens.scores.score import HeadScore, known_examples, score_batches
from mmlens.token_map import BoxMapping, mapping_of


def attention_mass(
    model: HookedVLM, inputs: Inputs, queries: Positions, keys: Positions
) -> Float[Tensor, "batch layer head"]:
    """Mean over query positions of the attention summed over key positions (Eq. 1), for every head.

    One forward pass. The result is float32 on the CPU, between 0 and 1; NaN where the model has no head. Queries and
    keys are boolean masks, or, of a prompt, words ("question", "evidence", "answer") or functions of it.

    Raises TypeError for queries or keys that are not boolean; ValueError where their shape is not that of
    the inputs, where a batch row has no query or no key, or where one lies on padding; CrossAttentionError, before
    anything runs, for a model that reads images by cross-attention.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> prompt = model.prompt("What colour is K", images=[])
    >>> mass = attention_mass(model, prompt, queries="question", keys="prompt")
    >>> bool(torch.allclose(mass, torch.ones(1, model.cfg.n_layers, model.cfg.n_heads), atol=1e-5))
    True
    """
    refuse_cross_attention(model_of(model))
    mask = checked_mask("keys", inputs, keys)
    return read_heads(
        model, inputs, queries, lambda rows, real: mass_of_rows(rows, real, mask.to(rows.device))
    )


def vision_mass(
    model: HookedVLM,
    prompts: Prompts,
    *,
    queries: Positions = "question",
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> HeadScores:
    """Attention from the question's tokens to all visual tokens of the prompt, by which the paper ranks "vision heads".

    `queries` puts other positions in the question's place, as in `ram`. The visual tokens are those at which the token
    map says `is_image`, learnt separators among them. Raises ValueError where a prompt has no image.
    """

    def of_batch(model: HookedVLM, prompt: Prompt) -> Float[Tensor, "batch layer head"]:
        token_map = prompt.token_map
        check_positions("the prompt's images", token_map.is_image, real_positions(prompt))
        return read_heads(
            model,
            prompt,
            queries,
            lambda rows, real: mean_to(mean_of_rows(rows, real), token_map.is_image),
        )

    score = HeadScore("vision mass", of_batch, needs=("images",))
    return score(model, prompts, batch_size=batch_size, progress=progress)


def ram(
    model: HookedVLM,
    prompts: Prompts,
    *,
    queries: Positions = "question",
    batch_size: int = BATCH_SIZE,
    mapping: BoxMapping = "merged",
    progress: bool = True,
) -> HeadScores:
    """Retrieval Attention Mass of every head on every example (Eq. 1): from the question to the evidence.

    RAM of head h = mean over question tokens x of the sum over evidence tokens y of A_h[x, y]; causal, not
    divided by the number of evidence tokens. `prompts` are examples, or prompts made of them
    (`model.prompt_examples`). `mapping` is how boxes become tokens ("merged", or "paper_floor" for the paper's
    index). Examples of like size share a batch, and `per_example` is in the order given.

    `queries` puts other positions in the question's place: a word, a mask, or a function of the prompt. "answer" are
    the tokens of a generated answer, of prompts that have one: `[model.continue_prompt(prompt) for prompt in prompts]`.

    Raises ValueError for no examples, for examples without evidence (named), and prompts that know no examples;
    CrossAttentionError as `attention_mass` does. Warns (MmlensWarning) where all evidence of an example stands after
    its question, as in a chat that asks before it shows: there every head's RAM is 0.
    """
    mapping_of(mapping)

    def of_batch(model: HookedVLM, prompt: Prompt) -> Float[Tensor, "batch layer head"]:
        evidence = evidence_tokens(prompt, mapping)
        mass = attention_mass(model, prompt, queries, evidence)
        _warn_of_unseen_evidence(prompt, queries, evidence, mass)
        return mass

    score = HeadScore("RAM", of_batch, needs=("evidence",))
    return score(model, prompts, batch_size=batch_size, progress=progress)


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
        grid = self.ram.grid
        ratio = torch.stack([100 * own.float().mean(-1) for own in self.hits])
        ratio.masked_fill_(~grid.exists, torch.nan)
        return HeadScores(ratio, "key token ratio", self.ram.kinds, grid)

    def key_token_coverage(self, heads: Heads) -> Float[Tensor, " example"]:
        """100 |union over the heads of (T_top(h) & V*)| / |V*| (Eq. 25), in percent, for every example."""
        chosen = list(as_head_set(heads, self.ram.grid))
        layers, within = [layer for layer, _ in chosen], [head for _, head in chosen]
        return torch.stack([100 * hits[layers, within].any(0).float().mean() for hits in self.hits])


def evidence_attention(
    model: HookedVLM,
    prompts: Prompts,
    *,
    queries: Positions = "question",
    batch_size: int = BATCH_SIZE,
    mapping: BoxMapping = "merged",
    progress: bool = True,
) -> EvidenceAttention:
    """RAM, vision mass and key tokens of every head on every example, from one pass over the rows.

    Key tokens (Eq. 22-25): average the attention over the question's tokens, over all L positions of the
    prompt (padding is none of them); a head's key tokens T_top are the max(1, floor(.05 L)) positions with
    most of it, the earlier first among equals. Arguments and errors as in `ram`.
    """
    mapping_of(mapping)
    batches = score_batches(model, prompts, ("evidence",), batch_size, progress, "evidence attention")
    to_evidence: list[tuple[list[int], Tensor]] = []
    to_vision: list[tuple[list[int], Tensor]] = []
    hits: dict[int, Tensor] = {}
    for index, prompt in batches:
        evidence, vision, of_batch = _read_evidence(model, prompt, queries, mapping)
        to_evidence.append((index, evidence))
        to_vision.append((index, vision))
        hits |= zip(index, of_batch, strict=True)
    return EvidenceAttention(
        HeadScores(in_order(to_evidence), "RAM", batches.kinds, model.grid),
        HeadScores(in_order(to_vision), "vision mass", batches.kinds, model.grid),
        tuple(hits[at] for at in range(len(hits))),
    )


def _read_evidence(
    model: HookedVLM, prompt: Prompt, queries: Positions, mapping: BoxMapping
) -> tuple[Float[Tensor, "batch layer head"], Float[Tensor, "batch layer head"], list[Tensor]]:
    """Mass on the evidence and on all visual tokens; each example's hits [layer, head, evidence_token]."""
    real, is_image = real_positions(prompt), prompt.token_map.is_image
    evidence = evidence_tokens(prompt, mapping)
    check_positions("evidence", evidence, real)
    masses: dict[int, Tensor] = {}
    hits = [torch.zeros(*model.grid.shape, int(tokens.sum()), dtype=torch.bool) for tokens in evidence]

    def consume(layer: int, rows: Rows, query_mask: Bool[Tensor, "batch query"]) -> None:
        mean = mean_of_rows(rows, query_mask)
        masses[layer] = torch.stack([mean_to(mean, evidence), mean_to(mean, is_image)], dim=-1)
        top = key_tokens(mean, real.to(mean.device)).cpu()
        for row, of_example in enumerate(hits):
            of_example[layer, : top.shape[1]] = top[row][:, evidence[row].cpu()]

    read_rows(model, prompt, queries, consume)
    to_evidence, to_vision = of_layers(model, masses).unbind(-1)
    _warn_of_unseen_evidence(prompt, queries, evidence, to_evidence)
    return to_evidence, to_vision, hits


def key_token_ratio(
    model: HookedVLM,
    prompts: Prompts,
    *,
    queries: Positions = "question",
    batch_size: int = BATCH_SIZE,
    mapping: BoxMapping = "merged",
    progress: bool = True,
) -> HeadScores:
    """Share of the evidence tokens, in percent, that are among each head's key tokens (Eq. 22-23).

    See `evidence_attention`, which gives it together with RAM and the coverage of any set of heads.
    """
    return evidence_attention(
        model, prompts, queries=queries, batch_size=batch_size, mapping=mapping, progress=progress
    ).key_token_ratio


def key_token_coverage(
    model: HookedVLM,
    prompts: Prompts,
    heads: Heads,
    *,
    queries: Positions = "question",
    batch_size: int = BATCH_SIZE,
    mapping: BoxMapping = "merged",
    progress: bool = True,
) -> Float[Tensor, " example"]:
    """Share of the evidence tokens, in percent, that are key tokens of at least one of `heads` (Eq. 24-25).

    See `evidence_attention`, which answers for any number of head sets after one pass.
    """
    chosen = as_head_set(heads, model_of(model).grid)
    return evidence_attention(
        model, prompts, queries=queries, batch_size=batch_size, mapping=mapping, progress=progress
    ).key_token_coverage(chosen)


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


def evidence_tokens(prompt: Prompt, mapping: BoxMapping = "merged") -> Bool[Tensor, "batch pos"]:
    """The tokens of the evidence of the prompt's own examples."""
    return prompt.token_map.evidence(known_examples(prompt), mapping=mapping)


def _warn_of_unseen_evidence(
    prompt: Prompt,
    queries: Positions,
    evidence: Bool[Tensor, "batch pos"],
    mass: Float[Tensor, "batch layer head"],
) -> None:
    """Warn of examples whose evidence stands after the question: no head can attend to it from there."""
    asked = checked_mask("queries", prompt, queries).to(evidence.device)
    at = torch.arange(asked.shape[1], device=asked.device)
    first = torch.where(evidence.to(asked.device), at, len(at)).amin(-1)
    last = torch.where(asked, at, -1).amax(-1)
    # Models whose text sees what follows it attend there all the same.
    unseen = (first > last).cpu() & (mass.nan_to_num() == 0).flatten(1).all(-1).cpu()
    names = [repr(each.id) if each.id else str(row) for row, each in enumerate(known_examples(prompt))]
    late = [name for name, is_late in zip(names, unseen.tolist(), strict=True) if is_late]
    if late and not (isinstance(queries, str) and queries == "question"):
        warnings.warn(
            f"the evidence of example {', '.join(late)} stands after all queries, which cannot look there: the "
            "attention is 0 whatever the model does",
            MmlensWarning,
            stacklevel=2,
        )
    elif late:
        warnings.warn(
            f"the evidence of example {', '.join(late)} stands after its question, where no token of the question can "
            "look: the attention is 0 whatever the model does. Put the question after the images, or mark the part "
            "after them as the question",
            MmlensWarning,
            stacklevel=2,
        )


def region_tokens(
    prompt: Prompt, row: int, regions: Iterable[Evidence], mapping: BoxMapping
) -> Bool[Tensor, " pos"]:
    """The tokens of regions of images in one row of the prompt; without a box a region is its whole image."""
    token_map = prompt.token_map
    found = torch.zeros_like(token_map.is_image[row])
    for region in regions:
        found |= token_map.region(region, example=row, mapping=mapping)[row]
    return found
