"""The shared arithmetic of the experiments against the plain model and counts by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from plain_runs import scenes, small_setup, without_heads

import mmlens
from mmlens.experiments.ablations import (
    ablated,
    all_heads,
    costs,
    first_of_kinds,
    head_costs,
    references,
    single_heads,
    with_evidence,
)
from mmlens.experiments.common import summarised
from mmlens.experiments.judging import JUDGES
from mmlens.heads import head_name


def test_single_head_costs_are_those_of_the_plain_model(micro: mmlens.HookedVLM) -> None:
    setup = small_setup(micro)
    heads = all_heads(setup)
    examples = with_evidence(setup.evaluation, 2)
    name, metric = setup.judge.graded(examples)
    metrics = {name: metric, "accuracy": mmlens.accuracy}
    table = ablated(setup, examples, single_heads(heads), references(setup, ["zero"]), metrics)
    by_head = head_costs(setup, table, name, "zero", heads)
    assert by_head.kinds == tuple(example.kind for example in examples)
    clean = without_heads(micro, [], examples)
    for head in ((0, 4), (0, 5), (7, 7)):
        truth = without_heads(micro, [head], examples)
        for index, example in enumerate(examples):
            expected = clean[example.id][1] - truth[example.id][1]
            assert float(by_head.per_example[index][head]) == pytest.approx(expected, abs=3e-3)
    accuracy = costs(table, "accuracy", "zero")
    assert list(accuracy.index) == [head_name(head) for head in micro.heads] and accuracy.shape[1] == len(
        examples
    )


def test_equal_sets_share_a_run_and_every_name_keeps_its_rows(micro: mmlens.HookedVLM) -> None:
    setup = small_setup(micro)
    one = mmlens.HeadSet([(0, 1), (1, 2)], setup.model.grid)
    same = mmlens.HeadSet([(1, 2), (0, 1)], setup.model.grid)
    table = ablated(setup, setup.evaluation[:3], {"a": one, "b": same}, references(setup, ["zero", "mean"]),
                    {"accuracy": mmlens.accuracy, "logit_difference": mmlens.logit_difference})  # fmt: skip
    assert len(table) == 2 * 2 * 2 * 3
    for mode in ("zero", "mean"):
        found = costs(table, "logit_difference", mode)
        assert list(found.index) == ["a", "b"]
        np.testing.assert_array_equal(found.loc["a"], found.loc["b"])
    assert not np.allclose(costs(table, "logit_difference", "zero"), costs(table, "logit_difference", "mean"))


def test_a_cost_counts_each_example_once() -> None:
    table = pd.DataFrame(
        {"example": [0, 0, 1, 1], "clean": [1.0, 1, 1, 1], "value": [0.0, 1, 1, 1], "draw": [0, 1, 0, 1]}
    ).assign(arm="top")
    cost = summarised(table, ["arm"], paired=("cost", "clean", "value")).iloc[0]
    assert cost["cost"] == 0.25 and cost["cost_low"] <= 0.25 <= cost["cost_high"] and cost["n"] == 2


def test_examples_are_cut_by_kind_and_the_metric_follows_the_candidates() -> None:
    examples = scenes(6, 1)
    chosen = first_of_kinds(examples, 2)
    assert {e.id for e in chosen} == {e.id for e in examples if e.id.endswith(("-0", "-1"))}
    assert chosen == sorted(chosen, key=lambda e: (e.kind, len(e.images)))
    assert {e.id for e in with_evidence(examples, 2)} == {e.id for e in chosen if e.evidence}
    assert len(first_of_kinds(examples, None)) == len(examples)
    with pytest.raises(ValueError, match="none of the 6 examples has evidence"):
        with_evidence([e for e in examples if not e.evidence], None)
    by_token = JUDGES["first token"]
    assert by_token.graded(chosen)[0] == "logit_difference"
    assert by_token.graded([*chosen, mmlens.Example("What?", "x")])[0] == "answer_log_probability"
    with pytest.raises(ValueError, match="at least 2"):
        first_of_kinds(examples, 1)
