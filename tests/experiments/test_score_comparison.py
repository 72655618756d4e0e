"""The comparison of head scores against scipy, plain runs of the model and sums by hand."""

from __future__ import annotations

import itertools
import json
import math
import string
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from plain_runs import scenes, small_setup, without_heads

import mmlens
from mmlens.experiments import score_comparison
from mmlens.experiments.experiment import Findings, Setup
from mmlens.experiments.score_comparison import EXPERIMENT, run
from mmlens.head_scores import half_mass_share
from mmlens.runs.methods import bibtex_entries
from mmlens.runs.run import read_findings, write_findings
from mmlens.scores.attention import gaze_score, null_calibrated_ram
from mmlens.scores.decoding import copy_score
from mmlens.scores.registry import SCORES
from mmlens.scores.score import HeadScore

N_HEADS = 64

# Micro's tokenizer does not know the null question, and copy and visual head score most heads 0.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not know:mmlens.errors.MmlensWarning"),
    pytest.mark.filterwarnings("ignore:.*cut through a tie:mmlens.errors.MmlensWarning"),
]


@pytest.fixture(scope="module")
def setup(micro: mmlens.HookedVLM) -> Setup:
    return small_setup(micro)


@pytest.fixture(scope="module")
def found(setup: Setup) -> Findings:
    return run(setup, mode="zero", n_per_kind=3, n_draws=2, n_resamples=100)


def test_every_score_is_there_with_its_own_top(setup: Setup, found: Findings) -> None:
    selected = [e for e in setup.selection if e.evidence and e.id.endswith(("-0", "-1", "-2"))]
    texts = [e for e in setup.selection if not e.evidence and e.id.endswith(("-0", "-1", "-2"))]
    table = found.tables["scores"][1].set_index("score")
    assert len(table) == 12
    gaze = gaze_score(setup.model, selected, progress=False)
    null = null_calibrated_ram(setup.model, selected, null_question="?", progress=False)
    copied = copy_score(setup.model, texts, progress=False)
    for name, scores in (("gaze", gaze), ("null-calibrated (?)", null), ("copy (text)", copied)):
        assert found.numbers["top"][name] == [list(head) for head in scores.top(0.05)]
        assert table.loc[name, "half_mass"] == pytest.approx(half_mass_share(scores))
        assert table.loc[name, "n_examples"] == len(scores)
    assert found.numbers["count"] == 3 and found.numbers["n_heads"] == N_HEADS


def test_findings_can_be_written(found: Findings, tmp_path: Path) -> None:
    write_findings(found, tmp_path)
    again = read_findings(tmp_path)
    assert len(again.per_example["scores"]) == len(found.per_example["scores"]) > 0


def test_costs_are_the_plain_model_s(setup: Setup, found: Findings) -> None:
    examples = [e for e in setup.evaluation if e.id.endswith(("-0", "-1", "-2"))]
    effects = found.tables["effects"][1].set_index(["score", "arm", "metric", "group"])
    clean = without_heads(setup.model, [], examples)
    for name in ("RAM", "gaze"):
        cut = without_heads(setup.model, [tuple(head) for head in found.numbers["top"][name]], examples)
        for group, own in (
            ("evidence", [e for e in examples if e.evidence]),
            ("text", [e for e in examples if not e.evidence]),
        ):
            for at, metric in enumerate(("accuracy", "logit_difference")):
                expected = np.mean([clean[e.id][at] - cut[e.id][at] for e in own])
                row = effects.loc[(name, "top", metric, group)]
                assert row["cost"] == pytest.approx(expected, abs=2e-3)
                assert row["n"] == len(own)


def test_agreement_is_scipys(found: Findings) -> None:
    means = {
        name: frame.groupby(["layer", "head"])["value"].mean()
        for name, frame in found.per_example["scores"].groupby("score", sort=False)
    }
    pairs = found.tables["agreement"][1]
    assert [tuple(pair) for pair in pairs[["score", "other"]].to_numpy()] == list(
        itertools.combinations(means, 2)
    )
    for row in pairs.to_dict("records"):
        one, other = means[row["score"]], means[row["other"]]
        assert len(one) == N_HEADS
        assert row["spearman"] == pytest.approx(scipy.stats.spearmanr(one, other).statistic, abs=1e-6)
        assert row["low"] <= row["high"]
        tops = [{tuple(head) for head in found.numbers["top"][row[which]]} for which in ("score", "other")]
        shared = len(tops[0] & tops[1])
        assert row["shared"] == shared
        assert row["expected"] == pytest.approx(9 / N_HEADS)
        ways = sum(math.comb(3, k) * math.comb(N_HEADS - 3, 3 - k) for k in range(shared, 4))
        assert row["p_value"] == pytest.approx(ways / math.comb(N_HEADS, 3))


def test_excess_is_the_top_s_cost_less_its_own_controls(found: Findings) -> None:
    outcomes, effects = found.per_example["outcomes"], found.tables["effects"][1]
    for name in found.numbers["top"]:
        rows = outcomes[
            (outcomes["score"] == name)
            & (outcomes["metric"] == "accuracy")
            & (outcomes["kind"] != "text_recall")
        ]
        cost = (rows["clean"] - rows["value"]).groupby([rows["arm"], rows["draw"]]).mean()
        own = effects[
            (effects["score"] == name) & (effects["metric"] == "accuracy") & (effects["group"] == "evidence")
        ]
        own = own.set_index("arm")
        draws = cost["layer-matched"]
        assert len(draws) == 2
        assert own.loc["top", "excess"] == pytest.approx(cost["top"][0] - draws.mean())
        assert (
            own.loc["top", "excess_low"] - 1e-9
            <= own.loc["top", "excess"]
            <= own.loc["top", "excess_high"] + 1e-9
        )
        assert own.loc["layer-matched", ["draw_min", "draw_max"]].tolist() == pytest.approx(
            [draws.min(), draws.max()]
        )


def test_findings_are_plain_and_say_what_was_read(found: Findings) -> None:
    json.dumps(found.numbers, allow_nan=False)
    assert any("reads the null question 'N/A' as N <|unk|> A" in note for note in found.numbers["notes"])
    assert all(name in found.statement for name in found.numbers["top"])
    assert len(found.figures) == 4
    assert EXPERIMENT.published is not None
    *numbers, what = EXPERIMENT.published.iloc[0].tolist()
    assert numbers == ["Qwen3-VL-8B", 5.6, 6.7, 7.2, 8.2] and "five context lengths, 8k to 128k" in what


def test_what_cannot_be_scored_is_left_out_and_said(micro: mmlens.HookedVLM) -> None:
    """No text examples, no answer that is right, and evidence that fills its image: no three scores, another lift."""
    wrong = [
        mmlens.Example(
            e.question, "red" if e.answer != "red" else "blue", e.images, (mmlens.Evidence(0, (0, 0, 96, 80)),), "big",
            e.candidates, f"{e.id}-wrong",
        )
        for e in scenes(3, 1, ["objects"])
    ]  # fmt: skip
    setup = Setup(micro, wrong, scenes(3, 2, ["objects"]), batch_size=10, progress=False)
    found = run(setup, null_questions=("?",), mode="zero", n_draws=1, n_resamples=20)
    assert not {"visual head", "logit contribution", "copy (text)"} & found.numbers["top"].keys()
    notes = " ".join(found.numbers["notes"])
    assert "no example with evidence is answered right" in notes
    assert "RAM lift is against other visual tokens of any shape" in notes
    assert "the copy score was left out: 0 text-only" in notes
    assert set(found.tables["effects"][1]["group"]) == {"evidence"}
    assert "text_accuracy_cost" not in found.tables["scores"][1].columns


def test_scores_that_rank_no_heads_are_left_out_and_ties_are_told(
    micro: mmlens.HookedVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One planted score is 0 for every head; another tells one head from 63 that are equal; a third is new."""

    def planted(name: str, *above: tuple[int, int]):
        def score(model, examples, **_):
            values = torch.zeros(len(examples), 8, 8)
            for head in above:
                values[:, head[0], head[1]] = 1.0
            return mmlens.HeadScores(values, name, tuple(e.kind for e in examples), model.grid)

        return score

    monkeypatch.setattr(score_comparison, "visual_head_score", planted("visual head"))
    monkeypatch.setattr(score_comparison, "gaze_score", planted("gaze", (5, 2)))
    ramp = torch.arange(64.0).reshape(1, 8, 8)
    own = HeadScore("ramp", lambda model, prompt: ramp.repeat(len(prompt), 1, 1), source="a test")
    monkeypatch.setitem(SCORES, "ramp", own)
    setup = Setup(micro, scenes(3, 1, ["objects"]), scenes(3, 2, ["objects"]), batch_size=10, progress=False)
    with pytest.warns(mmlens.errors.MmlensWarning, match="gaze: the 3 highest of 64 heads cut through a tie"):
        found = run(setup, null_questions=("?",), mode="zero", n_draws=1, n_resamples=20)
    assert "visual head" not in found.numbers["top"]
    assert "Visual head is the same for all heads and was left out." in found.statement
    pairs = found.tables["agreement"][1]
    assert "visual head" not in {*pairs["score"], *pairs["other"]} and "gaze" in {*pairs["score"]}
    scores = found.tables["scores"][1].set_index("score")["tied_at_cut"]
    assert scores["gaze"] and not scores["RAM"]
    assert found.numbers["top"]["gaze"][0] == [5, 2]
    assert "part of the top is arbitrary: gaze." in found.statement
    assert found.numbers["top"]["ramp"] == [[7, 7], [7, 6], [7, 5]]
    assert found.tables["scores"][1].set_index("score").loc["ramp", "source"] == "a test"


def test_across_models(found: Findings) -> None:
    assert EXPERIMENT.across is not None
    both = EXPERIMENT.across({"a": found, "b": found})
    json.dumps(both.numbers, allow_nan=False)
    ram = found.tables["scores"][1].set_index("score").loc["RAM"]
    assert both.numbers["mean_excess"]["RAM"] == pytest.approx(ram["accuracy_excess"])
    assert len(both.tables["excess"][1]) == 24
    told = int(ram["accuracy_excess_low"] > 0)
    assert f"RAM {ram['accuracy_excess']:.0%} ({2 * told} of 2)" in both.statement


def test_settings_and_sources() -> None:
    named = {field for _, field, _, _ in string.Formatter().parse(EXPERIMENT.method) if field}
    assert named <= EXPERIMENT.settings.keys()
    assert set(EXPERIMENT.cites) <= bibtex_entries().keys()


def test_bad_settings_are_refused(setup: Setup) -> None:
    with pytest.raises(ValueError, match="null_questions holds no question"):
        run(setup, null_questions=())
    with pytest.raises(ValueError, match="n_draws is 0; expected"):
        run(setup, n_draws=0)
    with pytest.raises(ValueError, match="n_per_kind"):
        run(setup, n_per_kind=1)
