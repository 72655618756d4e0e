"""Recall against loops by hand, chance against all orders, BM25 against its formula."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmlens.data.examples import Evidence, Example
from mmlens.data.pages import layouts_of
from mmlens.errors import MmlensError
from mmlens.scores.ranking import (
    bm25_scores,
    chance_layout_recall,
    chance_page_recall,
    layout_recall,
    macro_mean,
    page_recall,
    ranked,
)

PAGE = Image.new("RGB", (100, 200), "white")
LAYOUTS: list[dict[str, Any]] = [
    {"page": 0, "box": [0, 0, 100, 50]},
    {"page": 0, "box": [0, 50, 100, 60]},
    {"page": 1, "box": [10, 10, 30, 30]},
    {"page": 2, "box": [0, 0, 50, 100]},
]


def document(*evidence: Evidence, n_pages: int = 4, domain: str = "laws") -> Example:
    metadata = {"layouts": LAYOUTS, "domain": domain}
    return Example("What?", "x", [PAGE] * n_pages, evidence, kind="pages", metadata=metadata)


EXAMPLES = [
    document(Evidence(0, (0, 0, 50, 100))),
    document(Evidence(2), domain="news"),
    document(Evidence(1, (0, 0, 20, 20)), Evidence(3, (0, 0, 10, 10)), Evidence(3, (50, 50, 60, 60))),
]
SCORES = [[0.1, 0.4, 0.4, 0.2], [0.5, 0.1, 0.9, 0.3], [0.0, 0.7, 0.1, 0.9]]


@pytest.mark.parametrize("k", [1, 2, 3, 4, 9])
def test_recall_of_pages_is_the_loop(k: int) -> None:
    expected = []
    for example, scores in zip(EXAMPLES, SCORES, strict=True):
        order = []
        while len(order) < len(scores):
            best = None
            for page, score in enumerate(scores):
                if page not in order and (best is None or score > scores[best]):
                    best = page
            order.append(best)
        gold = {region.image for region in example.evidence}
        hits = 0
        for page in order[:k]:
            if page in gold:
                hits += 1
        expected.append(hits / len(gold))
    assert page_recall(EXAMPLES, SCORES, k).tolist() == expected
    if k == 1:
        assert expected == [0, 1, 0.5]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_recall_of_layouts_counts_pixels(k: int) -> None:
    """Area in pixels counted one by one, on masks of the pages."""
    scores = [[0.9, 0.8, 0.1, 0.7], [0.1, 0.2, 0.3, 0.9], [0.2, 0.9, 0.8, 0.1]]
    expected = []
    for example, own in zip(EXAMPLES, scores, strict=True):
        total = covered = 0
        for region in example.evidence:
            left, top, right, bottom = map(int, region.box or (0, 0, *PAGE.size))
            for y, x in itertools.product(range(top, bottom), range(left, right)):
                total += 1
                for number in sorted(range(4), key=lambda at: -own[at])[:k]:
                    one, two, three, four = LAYOUTS[number]["box"]
                    same = LAYOUTS[number]["page"] == region.image
                    covered += same and one <= x < three and two <= y < four
        expected.append(covered / total)
    assert layout_recall(EXAMPLES, scores, k).tolist() == pytest.approx(expected)
    if k == 1:
        assert expected == [0.5, 0.25, 0]


def test_chance_is_the_mean_over_all_orders() -> None:
    for k in (1, 2, 3):
        orders = [[float(x) for x in order] for order in itertools.permutations(range(4))]
        for recall, chance in ((page_recall, chance_page_recall), (layout_recall, chance_layout_recall)):
            every = np.mean([recall(EXAMPLES, [order] * 3, k) for order in orders], axis=0)
            assert chance(EXAMPLES, k).tolist() == pytest.approx(every.tolist())


def test_macro_is_a_mean_of_means_of_domains() -> None:
    values, domains = [1.0, 0.5, 0.0, 0.25], ["laws", "news", "laws", "laws"]
    by_domain: dict[str, list[float]] = {}
    for value, domain in zip(values, domains, strict=True):
        by_domain.setdefault(domain, []).append(value)
    means = [sum(own) / len(own) for own in by_domain.values()]
    assert macro_mean(values, domains) == pytest.approx(sum(means) / len(means)) == pytest.approx(11 / 24)


def test_bm25_is_its_formula() -> None:
    pages = ["The total is 42, the TOTAL of all.", "A table of totals", "the rest"]
    question = "What is the total of a table?"
    words = [re.findall(r"\w+", page.lower()) for page in pages]
    mean_length = sum(map(len, words)) / 3
    expected = []
    for page in words:
        score = 0.0
        for word in ("what", "is", "the", "total", "of", "a", "table"):
            n_with = sum(word in other for other in words)
            idf = math.log(1 + (3 - n_with + 0.5) / (n_with + 0.5))
            times = page.count(word)
            score += idf * times / (times + 1.5 * (1 - 0.75 + 0.75 * len(page) / mean_length))
        expected.append(score)
    found = bm25_scores(question, pages)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert ranked(found) == [0, 1, 2] and expected[1] > expected[2]
    assert bm25_scores("nothing known", pages).tolist() == [0, 0, 0]
    assert bm25_scores("total", ["", ""]).tolist() == [0, 0]


def test_what_cannot_be_ranked_is_named() -> None:
    with pytest.raises(MmlensError, match="page_scores are of 2 example"):
        page_recall(EXAMPLES, SCORES[:2])
    with pytest.raises(MmlensError, match=r"4 page\(s\), and 3 scores"):
        page_recall(EXAMPLES, [[1.0, 2.0, 3.0]] * 3)
    with pytest.raises(MmlensError, match="names no layouts"):
        layout_recall([Example("What?", "x", [PAGE], (Evidence(0),), id="a")], [[1.0]])
    with pytest.raises(MmlensError, match="1 of 1 examples have no evidence"):
        page_recall([Example("What?", "x", [PAGE])], [[1.0]])
    with pytest.raises(MmlensError, match="scores"):
        page_recall(EXAMPLES, [[float("nan")] * 4] * 3)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ({"page": 9, "box": [0, 0, 5, 5]}, r"layouts'\]\[0\]: page 9: the document has 4 page"),
        ({"page": 0, "box": [0, 0, 500, 5]}, r"layouts'\]\[0\]: page 0: the box"),
        ({"page": 0}, "expected a dict with page and box"),
        ("all", "expected a dict with page and box"),
        ({"page": 0, "box": [0, 0, 5, 5], "page_size": [0, 5]}, "page_size"),
        ({"page": 0, "box": [0, 0, 5, 5], "page_size": 5}, "page_size"),
        ({"page": 0, "box": [700, 0, 800, 5], "page_size": [612, 792]}, "page 0: the box"),
    ],
)
def test_layouts_that_are_none_are_named(layout: object, said: str) -> None:
    example = Example("What?", "x", [PAGE] * 4, metadata={"layouts": [layout]})
    with pytest.raises(MmlensError, match=said):
        layouts_of(example)


def test_published_units_become_pixels_cut_off_at_the_edge() -> None:
    layout = {"page": 1, "box": [306, 396, 620, 792], "page_size": [612.0, 792.0]}
    found = layouts_of(Example("What?", "x", [PAGE] * 4, metadata={"layouts": [layout]}))
    assert found[0].box == (50, 100, 100, 200) and found[0].area == 5000
