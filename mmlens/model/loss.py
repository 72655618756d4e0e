"""The loss of predicting the next token, as TransformerLens gives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmlens.errors import InvalidValueError

IGNORED = -100
"""The label of a position that no loss counts, as in transformers."""


def labels_of(
    given: Mapping[str, Any], image_mask: Callable[[Mapping[str, Any]], Tensor | None]
) -> Int[Tensor, "batch pos"]:
    """What a run's keyword inputs have for labels: their own, or those of their text (`text_labels`).

    Raises InvalidValueError where they have neither labels nor token ids with a mask.
    """
    if given.get("labels") is not None:
        return given["labels"]
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if ids is None or (mask is not None and mask.shape != ids.shape):
        raise InvalidValueError(
            "a loss needs labels, or input_ids with an attention_mask [batch, pos] to take them from"
        )
    return text_labels(ids, None if mask is None else mask.bool(), image_mask(given))


def text_labels(
    ids: Int[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"] | None,
    visual: Bool[Tensor, "batch pos"] | None,
) -> Int[Tensor, "batch pos"]:
    """The ids as labels; IGNORED at visual positions, at padding and at a row's first token after padding.

    So a prediction counts where it is made at a real position and is of a text token that is real. What stands at a
    visual position is a placeholder: no model was trained to predict it.

    >>> ids = torch.tensor([[0, 0, 5, 9, 9, 6, 7]])
    >>> text_labels(ids, ids > 0, ids == 9).tolist()
    [[-100, -100, -100, -100, -100, 6, 7]]
    """
    counts = torch.ones_like(ids, dtype=torch.bool) if visual is None else ~visual
    if real is not None:
        counts = counts & real
        counts[:, 1:] &= real[:, :-1]
    return ids.masked_fill(~counts, IGNORED)


def next_token_loss(
    logits: Float[Tensor, "batch kept vocab"], labels: Int[Tensor, "batch pos"], *, per_token: bool = False
) -> Float[Tensor, ""] | Float[Tensor, "batch pos-1"]:
    """Cross entropy in float32 of the logits at p for the label at p + 1, where that is not IGNORED.

    The mean over what counts, or `per_token` each: 0 where nothing counts, as in TransformerLens. Raises
    InvalidValueError where logits and labels differ in shape, and where nothing counts at all.
    """
    if logits.shape[:2] != labels.shape:
        raise InvalidValueError(
            f"a loss needs logits at every position: they are of [batch, pos] = {list(logits.shape[:2])}, the tokens "
            f"of {list(labels.shape)}. Leave out logits_to_keep and a key-value cache"
        )
    targets = labels[:, 1:].to(logits.device)
    if not bool((targets != IGNORED).any()):
        raise InvalidValueError(
            "a loss needs at least one text token after the first real position; there is none"
        )
    losses = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(targets.shape)
    return losses if per_token else losses.sum() / (targets != IGNORED).sum()
