"""Heads by how they rank documents: each head's score of each image, and the NDCG of the ranking that it makes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import scipy.stats
import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.arguments import (
    BATCH_SIZE,
    array_of,
    listed,
    number,
    text,
    whole_number,
    whole_numbers,
)
from mmlens.errors import InvalidValueError
from mmlens.head_scores import HeadScores
from mmlens.heads import HeadGrid
from mmlens.model.batches import Prompts
from mmlens.model.choosing import Positions
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.scores.attention import NULL_QUESTION, calibrated_attention, documents_of, sum_of_document
from mmlens.scores.rows import of_layers
from mmlens.scores.score import score_batches


def document_scores(
    model: HookedVLM,
    prompts: Prompts,
    *,
    queries: Positions = "question",
    null_question: str | None = NULL_QUESTION,
    cut: float | None = 2.0,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> list[Float[Tensor, "_ layer head"]]:
    """What each head gives each document of an example, for all images of it: [document, layer, head], in order.

    The parts of `query_focused_score`, document by document: attention to a document's tokens, averaged over the
    question's tokens, minus the same under `null_question`, tokens below mean - `cut` standard deviations dropped. A
    document is an image (page, frame), evidence or not; after the images those of videos. `document_ndcg` makes a score
    of heads of them. Options and errors as in `query_focused_score`, but that no evidence is needed.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> examples = mmlens.scene_examples("images", 2, seed=0)
    >>> scores = document_scores(model, examples, null_question="?", progress=False)
    >>> [each.shape for each in scores]
    [torch.Size([14, 8, 8]), torch.Size([14, 8, 8])]
    """
    if null_question is not None:
        text("null_question", null_question, "a text, or None for no null,")
    cut = None if cut is None else number("cut", cut, least=0)
    batches = score_batches(model, prompts, ("images",), batch_size, progress, "document scores")
    found: dict[int, Tensor] = {}
    for index, prompt in batches:
        attention = calibrated_attention(model, prompt, queries, null_question)
        documents = documents_of(prompt)
        for row, at in enumerate(index):
            of_document = []
            for document in documents[row].unique().tolist():
                inside = documents[row] == document
                layers = {
                    layer: sum_of_document(of_layer[row][:, inside], cut)[None]
                    for layer, of_layer in attention.items()
                }
                of_document.append(of_layers(model, layers)[0])
            found[at] = torch.stack(of_document)
    return [found[at] for at in range(len(found))]


def document_ndcg(
    documents: Sequence[Float[Tensor, "_ layer head"] | Float[np.ndarray, "_ layer head"]],
    gold: Sequence[Collection[int]],
    *,
    k: int = 10,
    grid: HeadGrid | tuple[int, int] | None = None,
) -> HeadScores:
    """NDCG@k of the ranking that each head makes of each example's documents: a score of heads, 0 to 1.

    `documents[i]` holds what each head gives each document of example i, `gold[i]` the numbers of the documents that
    hold the answer. With the documents in descending order of a head's score, DCG = sum of 1 / log2(r + 1) over gold
    documents at rank r <= k, from 1; NDCG = DCG / its largest value, that of gold documents first. Documents of equal
    score share what their ranks give, so that a head that tells none apart gets what a random order does.

    So the NQ lists of QRHead (arXiv 2506.09944) were ranked, with k = 10 and a head's score of a document as in
    `document_scores`; its tool breaks ties by the documents' names. It needs nothing but scores of documents, so text
    that some other library scored will do. `grid` as in HeadScores.

    Raises ValueError for no examples, other numbers of scores and of gold, a gold document that there is not, no gold
    document, and scores that are NaN for some documents of a head alone.

    >>> found = document_ndcg([torch.tensor([[[0.1, 0.9]], [[0.7, 0.2]], [[0.2, 0.1]]])], [[1]])  # 3 documents, 2 heads
    >>> [round(score, 3) for score in found.values.flatten().tolist()]  # ranks 1 and 2
    [1.0, 0.631]
    """
    k = whole_number("k", k, least=1)
    given = listed("documents", documents, "an array [document, layer, head] for each example", least=1)
    right = listed("gold", gold, "the numbers of the gold documents of each example")
    if len(right) != len(given):
        raise InvalidValueError(
            f"documents are of {len(given)} example(s), gold of {len(right)}; expected one for each"
        )
    discount = np.concatenate([[0.0], 1 / np.log2(np.arange(1, k + 1) + 1)]).cumsum()
    rows = []
    for at, (own, numbers) in enumerate(zip(given, right, strict=True)):
        values = array_of(f"documents[{at}]", own, "document layer head")
        n_documents = len(values)
        named = listed(f"gold[{at}]", numbers, "the numbers of the gold documents", least=1, sets=True)
        wanted = sorted(set(whole_numbers(f"gold[{at}]", named, least=0)))
        if wanted[-1] >= n_documents:
            raise InvalidValueError(
                f"gold[{at}] is {wanted}; expected numbers of documents from 0 to {n_documents - 1}"
            )
        absent = np.isnan(values)
        if (absent.any(0) != absent.all(0)).any():
            raise InvalidValueError(
                f"documents[{at}] are NaN for some documents of a head and not for others"
            )
        # The documents of one score hold the ranks from `first` to `last`, and share what these give.
        first, last = (
            scipy.stats.rankdata(np.where(absent, 0.0, -values), method=method, axis=0).astype(int)
            for method in ("min", "max")
        )
        gains = discount[np.minimum(last, k)] - discount[np.minimum(first - 1, k)]
        shared = gains / np.maximum(last - first + 1, 1)
        ndcg = shared[wanted].sum(0) / discount[min(len(wanted), k)]
        rows.append(np.where(absent.any(0), np.nan, ndcg))
    shapes = {row.shape for row in rows}
    if len(shapes) > 1:
        raise InvalidValueError(f"documents are of models of several sizes, [layer, head] = {sorted(shapes)}")
    return HeadScores(np.stack(rows), f"NDCG@{k}", grid=grid)
