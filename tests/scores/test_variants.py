"""What sources compute where our defaults differ: each option alone against spans that are found by hand."""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_images, tiny_model, tiny_processor

import mmlens
from mmlens.data.examples import Evidence, Example
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.prompt import Prompt
from mmlens.scores import (
    FIVE_NULLS,
    SCORES,
    document_ndcg,
    document_scores,
    localization_score,
    logit_contribution,
    null_calibrated_ram,
    query_focused_score,
    question_to_end,
)
from mmlens.scores.registry import KnownScore
from mmlens.scores.spans import image_marks

MARKS = {
    "qwen3_vl": ("<|vision_start|>", "<|vision_end|>"),
    "gemma3": ("<start_of_image>", "<end_of_image>"),
    "internvl": ("<img>", "</img>"),
}


@functools.cache
def hooked(family: str) -> HookedVLM:
    return HookedVLM(tiny_model(family), tiny_processor(family))


def choosing(question: str = "Which of these is in the document?") -> Example:
    """Two pages, a question, and two images to choose from: the multiple choice of MM-NIAH."""
    a, b, c, d = tiny_images(4, seed=2)
    return Example(
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "The document:"},
                    {"type": "image", "image": a},
                    {"type": "image", "image": b},
                    {"type": "text", "text": question, "question": True},
                    {"type": "image", "image": c},
                    {"type": "text", "text": "or"},
                    {"type": "image", "image": d},
                    {"type": "text", "text": "Answer with a letter."},
                ],
            }
        ],
        answer="A",
        evidence=(Evidence(image=1),),
    )


def pattern_of(family: str, prompt: Prompt) -> torch.Tensor:
    """[layer, head, query, key] of the plain model's own eager attention."""
    with torch.no_grad():
        out: Any = tiny_model(family, attn_implementation="eager")(**prompt.inputs, output_attentions=True)
    return torch.stack(out.attentions)[:, 0]


def spans_by_hand(family: str, prompt: Prompt, question: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The source's query span and evidence span: from a mark to a mark, both included."""
    tokens = prompt.inputs["input_ids"][0].tolist()
    begin, end = hooked(family).tokenizer.convert_tokens_to_ids(list(MARKS[family]))
    begins, ends = ([at for at, token in enumerate(tokens) if token == mark] for mark in (begin, end))
    assert len(begins) == len(ends) == 4
    start = prompt.text[0].index(question)
    assert prompt.offsets is not None
    first = next(at for at, (low, high) in enumerate(prompt.offsets[0].tolist()) if low <= start < high)
    queries, evidence = (torch.zeros(len(tokens), dtype=torch.bool) for _ in range(2))
    queries[first : ends[3] + 1] = True
    evidence[begins[1] : ends[1] + 1] = True
    return queries, evidence


@pytest.mark.parametrize("family", MARKS)
def test_the_multimodal_retrieval_score_as_its_code_has_it(family: str) -> None:
    model, asked = hooked(family), "Which of these is in the document?"
    found = SCORES["null_calibrated_ram"].variant("published")(model, [choosing()], progress=False)
    parts = []
    for question in (asked, FIVE_NULLS):
        prompt = model.prompt_examples([choosing(question)])
        queries, evidence = spans_by_hand(family, prompt, question)
        parts.append(pattern_of(family, prompt)[:, :, queries][:, :, :, evidence].sum(-1).mean(-1))
    np.testing.assert_allclose(found.per_example[0], parts[0] - parts[1], atol=2e-6)
    # Each option alone makes a difference.
    ours = null_calibrated_ram(model, [choosing()], progress=False)
    for option in ({"null_question": FIVE_NULLS}, {"choices": True}, {"marks": True}):
        other = null_calibrated_ram(model, [choosing()], progress=False, **option)
        assert not np.allclose(ours.per_example, other.per_example, atol=1e-6)


@pytest.mark.parametrize("family", ["llava_onevision", "llava"])
def test_families_without_marks_have_none(family: str) -> None:
    model = hooked(family)
    prompt = model.prompt("Which?", images=tiny_images(2, seed=0))
    assert image_marks(model, prompt) == {(0, 0): [], (0, 1): []}
    example = Example("Which?", "a", tuple(tiny_images(2, seed=0)), (Evidence(image=0),))
    with_marks, without = (
        null_calibrated_ram(model, [example], marks=marks, progress=False) for marks in (True, False)
    )
    assert torch.equal(with_marks.per_example, without.per_example)


def test_one_mark_between_two_images_ends_the_first() -> None:
    model = hooked("mistral3")
    prompt = model.prompt("Which?", images=tiny_images(2, seed=0))
    marks = image_marks(model, prompt)
    ids = [int(prompt.inputs["input_ids"][0, at]) for own in marks.values() for at in own]
    names = model.tokenizer.convert_ids_to_tokens(ids)
    assert [len(own) for own in marks.values()] == [1, 1] and names == ["[IMG_END]", "[IMG_END]"]


def test_marks_are_of_whole_images_alone() -> None:
    model = hooked("qwen3_vl")
    (a,) = tiny_images(1, seed=0)
    box = Example("Which?", "a", (a,), (Evidence(image=0, box=(0, 0, *a.size)),))
    with_marks, without = (
        null_calibrated_ram(model, [box], marks=marks, progress=False) for marks in (True, False)
    )
    assert torch.equal(with_marks.per_example, without.per_example)


def test_choices_are_of_the_question() -> None:
    with pytest.raises(ValueError, match=r"choices=True .* queries is 'last' \(str\); expected 'question'"):
        null_calibrated_ram(hooked("qwen3_vl"), [choosing()], queries="last", choices=True)


def test_the_query_span_of_qrhead(micro: HookedVLM) -> None:
    examples = mmlens.scene_examples("images", 3, seed=0)
    prompt = micro.prompt_examples(examples)
    span = question_to_end(prompt)
    for row in range(3):
        first = int(prompt.token_map.is_question[row].nonzero()[0])
        assert span[row].nonzero().flatten().tolist() == list(range(first, prompt.shape[1]))
    published = SCORES["query_focused_score"].variant("published")
    found = published(micro, examples, null_question="?", progress=False)
    by_option = query_focused_score(
        micro, examples, queries=question_to_end, null_question="?", progress=False
    )
    assert torch.equal(found.per_example, by_option.per_example)


def test_variants_are_options_of_their_functions() -> None:
    n_variants = 0
    for score in SCORES.values():
        for options in getattr(score, "variants", {}).values():
            n_variants += 1
            known = inspect.signature(score.function).parameters
            assert set(options) <= set(known)
            assert any(known[name].default != value for name, value in options.items())
    assert n_variants == 5
    score = SCORES["localization_score"]
    assert isinstance(score, KnownScore) and set(score.variants) == {"june 2025", "august 2025"}
    with pytest.raises(KeyError, match="variant of localization 'june'.*'june 2025'"):
        score.variant("june")
    with pytest.raises(KeyError, match="RAM has no variants"):
        SCORES["ram"].variant("published")


def test_the_cut_of_localization_heads_by_name(micro: HookedVLM) -> None:
    examples = mmlens.scene_examples("objects", 4, seed=0)
    score = SCORES["localization_score"]
    june = score.variant("june 2025")(micro, examples, progress=False)
    by_options = localization_score(micro, examples, above=1.0, n_lowest=5, progress=False)
    assert torch.equal(june.per_example, by_options.per_example)
    assert bool((june.per_example.sum((1, 2)) == 5).all())
    august = score.variant("august 2025")(micro, examples, last_row=None, progress=False)
    assert not august.per_example[:, :2].any() and not torch.equal(june.per_example, august.per_example)


def test_logit_contribution_by_name(micro: HookedVLM) -> None:
    examples = mmlens.scene_examples("objects", 2, seed=0)
    raw = SCORES["logit_contribution"].variant("published")(micro, examples, progress=False)
    by_option = logit_contribution(micro, examples, final_norm="none", progress=False)
    assert torch.equal(raw.per_example, by_option.per_example)
    assert not torch.allclose(
        raw.per_example, logit_contribution(micro, examples, progress=False).per_example
    )


# ---------------------------------------------------------------------- heads by how they rank documents


def slow_ndcg(scores: list[float], gold: set[int], k: int) -> float:
    """Mean over every order that the scores allow."""
    orders = [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(scores[one] >= scores[other] for one, other in itertools.pairwise(order))
    ]
    ideal = sum(1 / np.log2(rank + 2) for rank in range(min(k, len(gold))))
    dcg = [sum(1 / np.log2(rank + 2) for rank, at in enumerate(order[:k]) if at in gold) for order in orders]
    return float(np.mean(dcg) / ideal)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_ndcg_is_the_mean_over_orders(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 5))
    numbers = st.lists(st.integers(0, 3).map(float), min_size=n, max_size=n)
    scores = np.array([[data.draw(numbers) for _ in range(2)] for _ in range(2)]).transpose(2, 0, 1)
    gold = data.draw(st.sets(st.integers(0, n - 1), min_size=1))
    k = data.draw(st.integers(1, 6))
    found = document_ndcg([scores], [gold], k=k)
    for layer, head in np.ndindex(2, 2):
        expected = slow_ndcg(scores[:, layer, head].tolist(), gold, k)
        assert float(found.values[layer, head]) == pytest.approx(expected, abs=1e-6)
    assert found.name == f"NDCG@{k}"


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision"])
def test_scores_of_gold_documents_sum_to_the_query_focused_score(family: str) -> None:
    a, b, c, d = tiny_images(4, seed=3)
    examples = [
        Example("Which page?", "two", (a, b, c), (Evidence(image=0), Evidence(image=2))),
        Example("Where is it?", "left", (d,), (Evidence(image=0),)),
    ]
    options: dict[str, Any] = {"null_question": "what is this", "cut": 0.5, "progress": False}
    of_documents = document_scores(hooked(family), examples, batch_size=2, **options)
    assert [len(each) for each in of_documents] == [3, 1]
    found = query_focused_score(hooked(family), examples, **options)
    for example, own, expected in zip(examples, of_documents, found.per_example, strict=True):
        np.testing.assert_allclose(own[[part.image for part in example.evidence]].sum(0), expected, atol=1e-6)
    ranked = document_ndcg(of_documents, [{0, 2}, {0}], grid=hooked(family).grid)
    assert ranked.grid == found.grid and bool((ranked.per_example[1] == 1).all())


def test_heads_that_are_not_there_stay_so() -> None:
    scores = torch.rand(4, 2, 2)
    scores[:, 1, 1] = torch.nan
    found = document_ndcg([scores, scores], [[1], [0, 3]], grid=mmlens.heads.HeadGrid((2, 1)))
    assert len(found.grid) == 3 and len(found) == 2 and bool(found.values[1, 1].isnan())


@pytest.mark.parametrize(
    ("scores", "gold", "said"),
    [
        ([], [], "no documents given: expected an array"),
        ([np.ones((2, 1, 1))], [], r"documents are of 1 example\(s\), gold of 0"),
        ([np.ones((2, 1, 1))], [[]], r"no gold\[0\] given: expected the numbers"),
        ([np.ones((2, 1, 1))], [[2]], r"gold\[0\] is \[2\]; .* from 0 to 1"),
        ([np.array([[[np.nan]], [[1.0]]])], [[0]], "NaN for some documents of a head and not for others"),
        (
            [np.ones((2, 1, 1)), np.ones((2, 1, 2))],
            [[0], [0]],
            r"several sizes, \[layer, head\] = \[\(1, 1\)",
        ),
    ],
)
def test_bad_documents_are_refused(scores: list[np.ndarray], gold: list[list[int]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        document_ndcg(scores, gold)
