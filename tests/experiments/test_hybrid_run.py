"""Quality under hybrid attention on the micro model, small: against the plain model under a mask, and from raw rows."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest
import torch

import mmlens
from mmlens.experiments.experiment import Findings, Setup
from mmlens.experiments.hybrid import ANY, CORE, EXPERIMENT, LOWEST, MATCHED, NONE, RANDOM, across
from mmlens.hybrid.rule import StreamingRule

SINK, WINDOW = 2, 8


@pytest.fixture(scope="module")
def setup(micro: mmlens.HookedVLM) -> Setup:
    kinds = ("objects", "documents")
    selection = [e for kind in (*kinds, "text_recall") for e in mmlens.scene_examples(kind, 4, 1)]
    evaluation = [e for kind in (*kinds, "text_recall") for e in mmlens.scene_examples(kind, 3, 2)]
    return Setup(micro, selection, evaluation, batch_size=5, progress=False)


@pytest.fixture(scope="module")
def found(setup: Setup) -> Findings:
    return EXPERIMENT.run(
        setup, fractions=(0.03, 0.05), windows=(WINDOW, 400), sink=SINK, n_per_kind=3, n_draws=2
    )


@torch.no_grad()
def test_without_a_dense_head_it_is_the_plain_model_under_the_rule_s_mask(
    setup: Setup, found: Findings
) -> None:
    outcomes = found.per_example["outcomes"]
    rows = outcomes[(outcomes["arm"] == NONE) & (outcomes["window"] == WINDOW)].set_index(["id", "metric"])
    rule = StreamingRule(SINK, WINDOW)
    for example in setup.evaluation:
        prompt = setup.model.prompt_examples([example])
        positions = torch.arange(prompt.shape[1])
        inputs = dict(prompt.inputs)
        plain = setup.model.hf_model(**inputs).logits[0, -1].double().log_softmax(-1)
        # Positions first, for they are counted off the mask of padding.
        kept = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        counted = {name: inputs[name] for name in kept if name in inputs}
        if "image_grid_thw" in inputs:
            inputs["position_ids"] = setup.model.hf_model.model.get_rope_index(**counted)[0]
        inputs["attention_mask"] = rule.allowed(positions, positions)[None, None]
        masked = setup.model.hf_model(**inputs).logits[0, -1]
        assert rows.loc[(example.id, "accuracy"), "value"] == float(masked.argmax() == prompt.answer_ids[0])
        kl = (plain.exp() * (plain - masked.double().log_softmax(-1))).sum()
        assert rows.loc[(example.id, "kl_to_dense"), "value"] == pytest.approx(float(kl), abs=1e-4)


def test_arms_and_tables_follow_from_the_raw_outcomes(setup: Setup, found: Findings) -> None:
    outcomes, table = found.per_example["outcomes"], found.tables["quality"][1]
    assert found.numbers["counts"] == [2, 3] and found.numbers["n_heads"] == 64
    assert outcomes.groupby("arm")["draw"].nunique()[[RANDOM, MATCHED, ANY, CORE]].tolist() == [2, 2, 2, 1]
    cell = outcomes[(outcomes["window"] == WINDOW) & (outcomes["count"] == 2) & (outcomes["arm"] == RANDOM)]
    pooled = cell[(cell["metric"] == "kl_to_dense") & (cell["kind"] != "text_recall")]
    row = table[
        (table["window"] == WINDOW) & (table["count"] == 2) & (table["arm"] == RANDOM)
        & (table["metric"] == "kl_to_dense") & (table["kind"] == "pooled")
    ].iloc[0]  # fmt: skip
    assert row["mean"] == pytest.approx(pooled["value"].mean()) and row["n"] == 6
    assert row["low"] <= row["mean"] <= row["high"]
    differences = found.tables["differences"][1].set_index(["window", "count", "metric", "minus"])
    core = outcomes[(outcomes["arm"] == CORE) & (outcomes["count"] == 2) & (outcomes["window"] == WINDOW)]
    core = core[(core["metric"] == "kl_to_dense") & (core["kind"] != "text_recall")]
    assert differences.loc[(WINDOW, 2, "kl_to_dense", RANDOM), "mean"] == pytest.approx(
        core["value"].mean() - pooled["value"].mean()
    )


@pytest.mark.slow
def test_whole_answers_of_one_token_are_judged_as_first_tokens_are(setup: Setup, found: Findings) -> None:
    # Chosen among candidates, for nothing but a candidate can be the answer; what is valid is judged the same.
    asked = {"fractions": (0.03,), "windows": (WINDOW,), "sink": SINK, "n_per_kind": 3, "n_draws": 1}
    whole = EXPERIMENT.run(dataclasses.replace(setup, answers="whole"), **asked)
    key = ["window", "arm", "count", "draw", "id"]
    first = found.per_example["outcomes"].pivot_table("value", key, "metric")
    values = (
        whole.per_example["outcomes"].pivot_table("value", key, "metric").join(first.add_suffix("_first"))
    )
    assert set(whole.per_example["outcomes"]["metric"]) == {"accuracy", "kl_to_dense"}
    valid = values[values["invalid_first"] == 0]
    assert len(valid) > 20 and 0 < valid["accuracy"].mean() < 1
    assert (valid["accuracy"] == valid["accuracy_first"]).all()
    assert values["kl_to_dense"].to_numpy() == pytest.approx(values["kl_to_dense_first"].to_numpy(), abs=1e-4)
    assert "Answers were judged whole" in whole.statement


def test_generated_answers_are_those_of_plain_generation_under_it(setup: Setup) -> None:
    asked = {"fractions": (0.03,), "windows": (WINDOW,), "sink": SINK, "n_per_kind": 2, "n_draws": 1}
    judged = EXPERIMENT.run(dataclasses.replace(setup, answers="generated"), **asked)
    rows = judged.per_example["outcomes"].set_index(["arm", "metric", "id"])["value"]
    for example in setup.evaluation[:2]:
        prompt = setup.model.prompt_examples([example])
        with mmlens.hybrid_attention(setup.model, [], sink=SINK, window=WINDOW):
            texts = setup.model.answer(prompt, max_new_tokens=16, do_sample=False)
        expected = float(mmlens.generated_accuracy(texts, prompt))
        assert rows[NONE, "accuracy", example.id] == expected


def test_a_window_over_the_whole_prompt_costs_nothing(found: Findings) -> None:
    outcomes = found.per_example["outcomes"]
    whole = outcomes[outcomes["window"] == 400]
    assert (whole["value"] == whole["clean"]).all()
    assert not found.numbers["verdicts"][1]["window_matters"]
    assert found.numbers["share_of_scores"]["400"] == 1.0
    kl = outcomes[(outcomes["window"] == WINDOW) & (outcomes["metric"] == "kl_to_dense")]
    assert kl.groupby("arm")["value"].mean()[LOWEST] > kl.groupby("arm")["value"].mean()[CORE]


def outcomes_of(found: Findings, arm: str, metric: str) -> pd.DataFrame:
    rows = found.per_example["outcomes"]
    rows = rows[(rows["arm"] == arm) & (rows["metric"] == metric) & (rows["window"] == WINDOW)]
    return rows[rows["kind"] != "text_recall"]


def test_across_counts_the_models_in_which_it_matters_which_heads_are_dense(found: Findings) -> None:
    said = across({"one": found, "two": found})
    assert f"in {2 * found.numbers['agrees']} of 2 models" in said.statement
    assert len(said.tables["verdicts"][1]) == 4
    wide = said.tables["accuracies"][1].set_index(["model", "window", "dense_share"])
    quality = found.tables["quality"][1]
    for arm in (CORE, LOWEST, RANDOM):
        row = quality[
            (quality["arm"] == arm) & (quality["count"] == 3) & (quality["window"] == WINDOW)
            & (quality["kind"] == "pooled") & (quality["metric"] == "accuracy")
        ]  # fmt: skip
        assert wide.loc[("two", WINDOW, 3 / 64), arm] == row["mean"].item()
    none = outcomes_of(found, NONE, "accuracy")
    assert wide.loc[("one", WINDOW, 0.0), CORE] == none["value"].mean()


def test_no_draws_are_refused(setup: Setup) -> None:
    with pytest.raises(ValueError, match="n_draws is 0; expected"):
        EXPERIMENT.run(setup, n_draws=0)
