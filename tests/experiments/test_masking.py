"""Masking curves: how many heads, the plain model without them, and the verdict against the raw outcomes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from plain_runs import small_setup, without_heads

import mmlens
from mmlens.experiments.ablations import with_evidence
from mmlens.experiments.experiment import Findings, Setup
from mmlens.experiments.masking import EXPERIMENT, PUBLISHED, across
from mmlens.head_scores import share_of
from mmlens.scores.retrieval import ram

MODES = ("uniform_leaky", "zero")


@pytest.fixture(scope="module")
def setup(micro: mmlens.HookedVLM) -> Setup:
    return small_setup(micro)


@pytest.fixture(scope="module")
def found(setup: Setup) -> Findings:
    return EXPERIMENT.run(setup, shares=(1 / 64,), modes=MODES, n_draws=1, n_per_kind=3)


def test_counts_are_the_paper_s_shares_of_this_model(found: Findings) -> None:
    assert {share_of(share, 64) for share in EXPERIMENT.settings["shares"]} == {1, 2, 3}
    # 30 of 1152 heads, 2.6%, and the 5% of the abstract are always run too.
    assert found.numbers["counts"] == [1, 2]
    assert (found.numbers["count_nearest_2.6_percent"], found.numbers["count_nearest_5_percent"]) == (2, 3)
    assert found.tables["shares"][1]["heads here"].tolist() == [1, 1, 1, 2, 1, 1, 2, 2]


def test_zeroed_heads_are_cut_out_of_the_plain_model(setup: Setup, found: Findings) -> None:
    scores = ram(setup.model, with_evidence(setup.selection), progress=False)
    outcomes = found.per_example["outcomes"]
    chosen = outcomes[
        (outcomes["mode"] == "zero") & (outcomes["metric"] == "accuracy") & (outcomes["count"] == 2)
    ]
    assert chosen["id"].nunique() == 9  # three of each kind, the text-only controls among them
    by_id = {example.id: example for example in setup.evaluation}
    for arm, heads in (("top", scores.top(2)), ("bottom", scores.bottom(2))):
        rows = chosen[chosen["arm"] == arm]
        expected = without_heads(setup.model, heads, [by_id[name] for name in rows["id"]])
        assert dict(zip(rows["id"], rows["value"], strict=True)) == {i: v[0] for i, v in expected.items()}


def test_the_verdict_is_that_of_the_raw_outcomes_on_visual_examples(found: Findings) -> None:
    outcomes = found.per_example["outcomes"]
    for mode, verdict in found.numbers["verdicts"].items():
        at = outcomes[
            (outcomes["mode"] == mode)
            & (outcomes["metric"] == "accuracy")
            & (outcomes["count"] == 2)
            & (outcomes["kind"] != "text_recall")
        ]
        means = at.groupby(["arm", "example"])["value"].mean().groupby("arm").mean()
        for other in ("random", "layer_matched", "bottom"):
            assert verdict[f"top_minus_{other}"] == pytest.approx(means["top"] - means[other])
            assert verdict[f"top_below_{other}"] == (verdict[f"top_minus_{other}_interval"][1] < 0)
    assert found.numbers["agrees"] == all(v["top_below_random"] for v in found.numbers["verdicts"].values())
    assert "text_recall: uniform_leaky" in found.statement and "invalid answers" in found.statement
    json.dumps(found.numbers, allow_nan=False)


def test_published_numbers_are_the_figure_s() -> None:
    table = PUBLISHED.set_index(["model", "arm", "heads"])["score"]
    assert (
        len(table) == 30
        and table["Qwen3-VL-4B", "top", 5] == 27.0
        and table["LLaVA-OneVision-7B", "top", 30] == 2.4
    )
    assert np.isclose(
        PUBLISHED.set_index(["model", "arm", "heads"])["share"]["Qwen3-VL-4B", "top", 30], 0.026, atol=5e-4
    )


def test_across_shows_every_model_and_mode(found: Findings) -> None:
    both = across({"one": found, "two": found})
    assert len(both.tables["top_minus_random"][1]) == 4
    assert f"in {2 * found.numbers['agrees']} of 2 models" in both.statement
