"""Pages and layouts of documents in the order of a score, and what share of the evidence comes first.

The protocol is that of MMDocIR (arXiv 2501.08828, and the evaluation code that came with it): for each question the
pages, or the layouts, of its own document are ranked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.arguments import array_of, instance_of, text, texts, whole_number
from mmlens.data.examples import Example, examples_of
from mmlens.data.pages import evidence_layouts, layouts_of, pages_with_evidence
from mmlens.errors import InvalidValueError

Scores = Sequence[Float[Tensor, " _"] | Float[np.ndarray, " _"] | Sequence[float]]


def ranked(scores: Float[Tensor, " _"] | Float[np.ndarray, " _"] | Sequence[float]) -> list[int]:
    """The numbers of what is scored, highest score first; equal scores keep their order.

    >>> ranked([.1, .7, .1, .9])
    [3, 1, 0, 2]
    """
    values = array_of("scores", scores, "_")
    if not np.isfinite(values).all():
        raise InvalidValueError("scores hold a number that is not finite, which has no place in an order")
    return np.argsort(-values, kind="stable").tolist()


def page_recall(
    examples: Iterable[Example], page_scores: Scores, k: int = 1
) -> Float[np.ndarray, " example"]:
    """Recall@k of pages for each question: |first k pages and pages with evidence| / |pages with evidence|.

    `page_scores[i]` has a number for each page of example i; equal scores keep the order of the pages. A question whose
    evidence is on more than k pages reaches 1 at no ranking. Raises ValueError for scores of another number of
    examples or of pages, or examples without evidence.

    >>> from mmlens.data import scene_examples
    >>> example = scene_examples("composed_documents", 1, seed=0)[0]
    >>> [region.image for region in example.evidence], page_recall([example], [[.1, .3, .2]], k=2).tolist()
    ([1], [1.0])
    """
    k = whole_number("k", k, least=1)
    found = []
    for example, own in _pairs(examples, page_scores, "page_scores"):
        gold = pages_with_evidence(example)
        _check_count(example, own, len(example.images), "page(s)")
        found.append(len(set(ranked(own)[:k]) & set(gold)) / len(gold))
    return np.array(found)


def layout_recall(
    examples: Iterable[Example], layout_scores: Scores, k: int = 1
) -> Float[np.ndarray, " example"]:
    """Recall@k of layouts for each question: the share of the evidence's area that the first k layouts cover.

    sum over the first k layouts, and over the evidence's boxes on their pages, of the area that both cover, divided
    by the area of all these boxes: MMDocIR's own measure, which counts twice what two layouts cover, so that it can
    pass 1 where layouts overlap. The candidates are `layouts_of(example)`. Raises ValueError as `page_recall`.
    """
    k = whole_number("k", k, least=1)
    found = []
    for example, own in _pairs(examples, layout_scores, "layout_scores"):
        shares = _evidence_shares(example)
        _check_count(example, own, len(shares), "layout(s)")
        found.append(shares[ranked(own)[:k]].sum())
    return np.array(found)


def chance_page_recall(examples: Iterable[Example], k: int = 1) -> Float[np.ndarray, " example"]:
    """What `page_recall` is on average over all orders of the pages: k / pages, at most 1."""
    k = whole_number("k", k, least=1)
    return np.array([min(1.0, k / len(example.images)) for example in _with_evidence(examples)])


def chance_layout_recall(examples: Iterable[Example], k: int = 1) -> Float[np.ndarray, " example"]:
    """What `layout_recall` is on average over all orders of the layouts: k / layouts of what all of them cover."""
    k = whole_number("k", k, least=1)
    shares = [_evidence_shares(example) for example in _with_evidence(examples)]
    return np.array([min(1.0, k / len(own)) * own.sum() for own in shares])


def macro_mean(recall: Float[np.ndarray, " example"] | Sequence[float], domains: Sequence[str]) -> float:
    """Mean over domains of each domain's mean over its questions (MMDocIR's macro); the micro mean is the plain one.

    MMDocIR's code divides by its ten domains whatever the questions; this by those that have a question, which is the
    same on the whole data set.

    >>> macro_mean([1., 1., 1., 0.], ["laws", "laws", "laws", "news"])
    0.5
    """
    numbers = array_of("recall", recall, "example")
    if not np.isfinite(numbers).all():
        raise InvalidValueError(
            "recall holds a number that is not finite; expected one from 0 to 1 for each question"
        )
    named = np.array(texts("domains", domains, "the domain of each question"), dtype=object)
    if len(named) != len(numbers) or not len(named):
        raise InvalidValueError(
            f"{len(named)} domains for recall of {len(numbers)} questions; expected one for each"
        )
    return float(np.mean([numbers[named == domain].mean() for domain in sorted(set(named))]))


def bm25_scores(question: str, page_texts: Sequence[str]) -> Float[Tensor, " page"]:
    """BM25 of a question for each page of a document by its text; the document's pages are the whole collection.

    Lucene's variant (bm25s), k1 = 1.5, b = 0.75: the sum over the question's words w of
    log(1 + (N - n_w + 0.5) / (n_w + 0.5)) tf / (tf + k1 (1 - b + b length / mean length)), with tf how often the page
    has w, N the number of pages and n_w of those with w. Words are runs of letters and digits in lower case; none is
    left out as too short or too common, none is cut to its stem.

    >>> bm25_scores("Which number has Q?", ["K 1 Q 2", "K 3", ""]).argmax().item()
    0
    """
    text("question", question)
    pages = [_words(page) for page in texts("page_texts", page_texts, "a text for each page", least=1)]
    if not any(pages):
        return torch.zeros(len(pages))
    # It takes a second, which whoever ranks no texts need not wait.
    import bm25s

    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index(pages, show_progress=False)
    known = [word for word in _words(question) if word in index.vocab_dict]
    return torch.tensor(index.get_scores(known)) if known else torch.zeros(len(pages))


# ---------------------------------------------------------------------- plumbing


def _words(of: str) -> list[str]:
    return re.findall(r"\w+", of.lower())


def _with_evidence(examples: Iterable[Example]) -> list[Example]:
    given = examples_of(examples)
    lacking = [example.id or f"number {at}" for at, example in enumerate(given) if not example.evidence]
    if lacking:
        raise InvalidValueError(f"{len(lacking)} of {len(given)} examples have no evidence: {lacking[:5]}")
    return given


def _pairs(
    examples: Iterable[Example], scores: Scores, name: str
) -> list[tuple[Example, Float[np.ndarray, " _"]]]:
    given = _with_evidence(examples)
    of_each = list(
        instance_of(name, scores, (Sequence, np.ndarray, Tensor), "a list with the scores of each example")
    )
    if len(of_each) != len(given):
        raise InvalidValueError(
            f"{name} are of {len(of_each)} example(s), the examples {len(given)}; expected one for each"
        )
    return [
        (example, array_of(f"{name}[{at}]", own, "_"))
        for at, (example, own) in enumerate(zip(given, of_each, strict=True))
    ]


def _check_count(example: Example, scores: Float[np.ndarray, " _"], count: int, what: str) -> None:
    if len(scores) != count:
        raise InvalidValueError(f"example {example.id!r} has {count} {what}, and {len(scores)} scores")


def _evidence_shares(example: Example) -> Float[np.ndarray, " layout"]:
    """Which share of the evidence's area each layout of the document covers."""
    layouts, evidence = layouts_of(example), evidence_layouts(example)
    if not layouts:
        raise InvalidValueError(
            f"example {example.id!r} names no layouts: they are a list in its metadata, "
            "{'page': 0, 'box': [left, top, right, bottom]}"
        )
    whole = sum(region.area for region in evidence)
    return np.array([sum(each.common_area(region) for region in evidence) / whole for each in layouts])
