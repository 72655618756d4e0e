"""Recall of ranked pages against the plain model's attention and loops; tables, figures and words that follow."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
from plain_attention import seen_by_plain_model
from plain_runs import scenes

import mmlens
from mmlens.data.examples import Evidence, Example
from mmlens.experiments.experiment import Findings, Setup
from mmlens.experiments.page_ranking import EXPERIMENT, _Resampling, across

KINDS = ("documents", "frames")


@pytest.fixture(scope="module")
def setup(micro: mmlens.HookedVLM) -> Setup:
    kinds = (*KINDS, "objects", "text_recall")
    return Setup(micro, scenes(4, 1, kinds), scenes(4, 2, kinds), batch_size=10, progress=False)


@pytest.fixture(scope="module")
def found(setup: Setup) -> Findings:
    return EXPERIMENT.run(setup, n_draws=3, n_resamples=200, null_questions=("?",))


def row(found: Findings, table: str, **named: object) -> dict[str, float]:
    rows = [own for own in found.numbers[table] if all(own[key] == value for key, value in named.items())]
    assert len(rows) == 1
    return rows[0]


def test_recall_is_that_of_the_plain_model(setup: Setup, found: Findings) -> None:
    """Pages scored by hand from full patterns, ranked and counted in loops; the heads are chosen on selection."""
    chosen_on = [e for e in setup.selection if e.kind in KINDS]
    ram = sum(seen.ram for seen in seen_by_plain_model(setup.model, chosen_on))
    best = ram.flatten().argsort(descending=True)[:3].tolist()
    heads = [(at // 8, at % 8) for at in best]
    assert sorted(map(tuple, found.numbers["heads"])) == sorted(heads)
    examples = [e for e in setup.evaluation if e.kind in KINDS]
    recalls: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for example, seen in zip(examples, seen_by_plain_model(setup.model, examples), strict=True):
        image = setup.model.prompt_examples([example]).token_map.image[0]
        scores = []
        for page in range(len(example.images)):
            of_heads = [float(seen.mean[layer, head][image == page].sum()) for layer, head in heads]
            scores.append(sum(of_heads) / 3)
        gold = {region.image for region in example.evidence}
        recalls[example.kind].append(float(scores.index(max(scores)) in gold) / len(gold))
    mine = row(found, "recall", level="page", arm="top", calibration="none", k=1)
    assert mine["micro"] == pytest.approx(np.mean(recalls["documents"] + recalls["frames"]))
    assert mine["macro"] == pytest.approx((np.mean(recalls["documents"]) + np.mean(recalls["frames"])) / 2)
    assert mine["low"] <= mine["micro"] <= mine["high"] and mine["n"] == 8
    for kind in KINDS:
        of_kind = row(found, "domains", level="page", domain=kind, arm="top")
        assert of_kind["mean"] == pytest.approx(np.mean(recalls[kind]))
    json.dumps(found.numbers, allow_nan=False)


def test_the_other_rankings_stand_beside_it(setup: Setup, found: Findings) -> None:
    examples = [e for e in setup.evaluation if e.kind in KINDS]
    chance = row(found, "recall", level="page", arm="chance", calibration="none", k=1)
    assert chance["micro"] == pytest.approx(np.mean([1 / len(e.images) for e in examples]))
    best = row(found, "recall", level="page", arm="best possible", calibration="none", k=1)
    assert best["micro"] == pytest.approx(np.mean([1 / len({r.image for r in e.evidence}) for e in examples]))
    random = row(found, "recall", level="page", arm="random", calibration="none", k=1)
    assert random["n_draws"] == 3 and random["draw_min"] <= random["micro"] <= random["draw_max"]
    table = found.tables["recall"][1]
    assert set(table["arm"]) == {"top", "random", "all", "bm25", "chance", "best possible"}
    assert set(table[table["arm"] == "all"]["calibration"]) == {"none", "?"}
    assert set(table[table["level"] == "layout"]["n"]) == {4}
    # Each letter stands on one page and in one line.
    for level, few in (("page", [e for e in examples if e.kind == "documents"]), ("layout", [])):
        of_words = found.per_example["recall"]
        own = of_words[(of_words["arm"] == "bm25") & (of_words["level"] == level) & (of_words["k"] == 1)]
        assert own[own["domain"] == "documents"]["recall"].tolist() == [1.0] * (len(few) or 4)
    top, others = (
        row(found, "recall", level="layout", arm=arm, calibration="?", k=1) for arm in ("top", "random")
    )
    difference = row(found, "differences", level="layout", other="random", calibration="?")
    assert difference["difference"] == pytest.approx(top["micro"] - others["micro"])
    draws = found.per_example["recall"].query(
        "arm == 'random' and level == 'layout' and calibration == '?' and k == 1"
    )
    as_good = sum(draws.groupby("draw")["recall"].mean() >= top["micro"])
    assert difference["p_of_draws"] == (1 + as_good) / 4


def test_it_is_told_with_what_the_source_found(found: Findings) -> None:
    assert "64.7 macro / 64.5 micro, layouts 39.0 / 39.3" in found.statement
    assert "are not to be compared" in found.statement
    published = EXPERIMENT.published
    assert published is not None and published["macro"].tolist() == [0.647, 0.39]
    assert [title for title, _, _ in found.figures] == [
        "Recall@1 of pages",
        "Recall@1 of layouts",
        "Recall@1 of pages by domain",
    ]


def test_intervals_are_over_documents_within_domains() -> None:
    """Questions of one document are drawn together: ten alike say no more than one."""
    one = pd.DataFrame(
        {"recall": [0.0, 1.0, 1.0, 0.0], "domain": ["a", "a", "b", "b"], "group": list("wxyz")}
    )
    ten = pd.concat([one] * 10)
    alone, repeated = _Resampling(2000, 0)(one), _Resampling(2000, 0)(ten)
    assert repeated == pytest.approx(alone)
    apart = _Resampling(2000, 0)(ten.assign(group=range(40)))
    assert apart["high"] - apart["low"] < 0.5 * (alone["high"] - alone["low"])
    # Within a domain the mean of two documents is 0, .5 or 1, so that of two domains has quarters.
    assert (alone["low"], alone["high"], alone["macro"]) == (0.0, 1.0, 0.5)
    assert not math.isnan(_Resampling(10, 0)(one.assign(recall=1.0))["low"])


def test_differences_that_are_all_alike_have_the_interval_of_a_difference() -> None:
    none = pd.DataFrame(
        {"recall": [0.0] * 4, "domain": "a", "group": list("wxyz"), "other": [0.0, 1.0, 1.0, 0.0]}
    )
    found = _Resampling(10, 0)(none)
    assert found["low"] < 0 < found["high"]
    found = _Resampling(10, 0)(none.assign(other=0.25))
    assert (found["low"], found["high"]) == (0, 0)


def test_without_documents_it_is_refused(setup: Setup) -> None:
    lacking = dataclasses.replace(setup, evaluation=scenes(3, 2, ["objects"]))
    with pytest.raises(ValueError, match="none of the 3 evaluation examples has several images"):
        EXPERIMENT.run(lacking)
    with pytest.raises(ValueError, match="pages_per_prompt"):
        EXPERIMENT.run(setup, pages_per_prompt=0)


def test_documents_without_texts_and_layouts_are_ranked_all_the_same(setup: Setup) -> None:
    bare = [
        Example(e.question, e.answer, e.images, tuple(Evidence(r.image) for r in e.evidence), id=e.id)
        for e in setup.evaluation
        if e.kind in KINDS
    ]
    found = EXPERIMENT.run(
        dataclasses.replace(setup, evaluation=bare),
        n_draws=2,
        null_questions=(),
        pages_per_prompt=2,
        n_resamples=50,
    )
    assert "BM25 was left out" in found.statement and "2 page(s) a prompt" in found.statement
    table = found.tables["recall"][1]
    assert set(table["level"]) == {"page"} and set(table["calibration"]) == {"none"}
    assert len(found.figures) == 1


def test_across_counts_the_models_that_agree(found: Findings) -> None:
    agreeing = Findings("", {**found.numbers, "agrees": True})
    both = across({"one": agreeing, "two": Findings("", {**found.numbers, "agrees": False})})
    assert "in 1 of 2 models" in both.statement and len(both.figures) == 1
