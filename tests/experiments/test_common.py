"""The shared parts of the paper's experiments against plain Hugging Face runs and hand-made numbers."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from plain_runs import scenes, small_setup, without_heads

import mmlens
from mmlens.experiments.ablations import with_evidence
from mmlens.experiments.common import (
    ablation_outcomes,
    ablation_table,
    all_equal,
    arm_difference,
    matched_controls,
    plain,
    resampled_means,
    selectivity,
    token_counts,
    top_unless_tied,
)
from mmlens.experiments.experiment import Setup
from mmlens.head_scores import HeadScores
from mmlens.heads import HeadGrid, HeadSet


@pytest.fixture(scope="module")
def setup(micro: mmlens.HookedVLM) -> Setup:
    return small_setup(micro)


@pytest.fixture(scope="module")
def arms() -> dict[str, list[HeadSet]]:
    def heads(*pairs: tuple[int, int]) -> HeadSet:
        return HeadSet(pairs, grid=(8, 8))

    return {"top": [heads((0, 4), (0, 5))], "random": [heads((3, 1), (3, 2)), heads((0, 4), (0, 5))]}


@pytest.fixture(scope="module")
def outcomes(setup: Setup, arms: dict[str, list[HeadSet]]) -> pd.DataFrame:
    return ablation_outcomes(setup, arms, ("zero",))


def test_outcomes_are_those_of_the_plain_model_without_the_heads(
    setup: Setup, arms: dict[str, list[HeadSet]], outcomes: pd.DataFrame
) -> None:
    examples = with_evidence(setup.evaluation)
    accuracy = outcomes[outcomes["metric"] == "accuracy"]
    assert len(accuracy) == 3 * len(examples) == 30 and set(accuracy["n_heads"]) == {2}
    for arm, sets in arms.items():
        for draw, heads in enumerate(sets):
            expected = without_heads(setup.model, heads, examples)
            rows = accuracy[(accuracy["arm"] == arm) & (accuracy["draw"] == draw)]
            assert dict(zip(rows["id"], rows["value"], strict=True)) == {i: v[0] for i, v in expected.items()}
    intact = without_heads(setup.model, [], examples)
    assert all(row.clean == intact[row.id][0] for row in accuracy.itertuples())


def test_the_table_averages_draws_within_examples(outcomes: pd.DataFrame) -> None:
    table = ablation_table(outcomes).set_index(["arm", "kind", "metric"])
    values = outcomes[(outcomes["arm"] == "random") & (outcomes["metric"] == "accuracy")]
    row = table.loc[("random", "pooled", "accuracy")]
    assert row["mean"] == pytest.approx(values["value"].mean()) and row["n"] == 10 and row["n_draws"] == 2
    assert row["low"] <= row["mean"] <= row["high"]
    objects = values[values["kind"] == "objects"]
    assert table.loc[("random", "objects", "accuracy"), "difference"] == pytest.approx(
        (objects["value"] - objects["clean"]).mean()
    )


def test_the_difference_of_two_arms_is_paired_by_example(outcomes: pd.DataFrame) -> None:
    mean, low, high = arm_difference(outcomes, "top", "random", mode="zero")
    chosen = outcomes[outcomes["metric"] == "accuracy"]
    by_arm = {arm: part.groupby("example")["value"].mean() for arm, part in chosen.groupby("arm")}
    assert mean == pytest.approx((by_arm["top"] - by_arm["random"]).mean()) and low <= mean <= high < 0


def test_token_counts_are_those_of_each_prompt_alone(setup: Setup) -> None:
    examples = with_evidence(setup.evaluation)
    counts = token_counts(setup, examples)
    for at in (0, 4, 9):
        prompt = setup.model.prompt_examples([examples[at]])
        length = prompt.inputs["input_ids"].shape[1]
        visual = int((prompt.inputs["input_ids"] == setup.model.hf_model.config.image_token_id).sum())
        evidence = int(prompt.token_map.evidence([examples[at]]).sum())
        assert counts.iloc[at].tolist() == [length, visual, evidence, length // 20]


def test_selectivity_and_its_chance_by_hand() -> None:
    found = selectivity(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.2, 0.6, 0.4]), [0.1, 0.2, 0.5])
    assert found["selectivity"] == pytest.approx(0.6 / 1.2) and found["low"] < 0.5 < found["high"]
    assert found["chance"] == pytest.approx((0.2 * 0.1 + 0.6 * 0.2 + 0.4 * 0.5) / 1.2)


def test_resamples_keep_the_number_of_examples_of_each_kind() -> None:
    values = torch.tensor([1.0, 2.0, 30.0, 50.0]).view(4, 1, 1).expand(4, 1, 2).clone()
    means = resampled_means(HeadScores(values, kinds=("a", "a", "b", "b")), 500, seed=0)
    assert means.shape == (500, 2) and set(means[:, 0]) <= {
        (a + b) / 4 for a in (2, 3, 4) for b in (60, 80, 100)
    }
    assert means.mean() == pytest.approx(83 / 4, abs=0.5)


def test_heads_that_do_not_exist_are_no_columns() -> None:
    values = torch.tensor([[[0.1, 0.2], [0.3, torch.nan]]] * 3)
    assert resampled_means(HeadScores(values, grid=HeadGrid((2, 1))), 5, seed=0).shape == (5, 3)


def test_a_shortfall_of_layer_matched_heads_is_said() -> None:
    crowded = HeadSet([(0, 0), (0, 1)], grid=(3, 3))
    drawn, moved = matched_controls(crowded, 2, seed=0)
    assert len(drawn) == 2 and "1 of layer 0" in moved and not any(heads & crowded for heads in drawn)
    assert matched_controls(HeadSet([(0, 0)], grid=(3, 3)), 2, seed=0)[1] == ""


def test_small_things() -> None:
    assert plain({"heads": HeadSet([(1, 0)], grid=(2, 1))}) == {"heads": [[1, 0]]}
    with pytest.raises(ValueError, match="none of the 2 examples has evidence"):
        with_evidence(scenes(2, 0, ["text_recall"]))


def test_tops_are_none_where_equal_scores_would_choose_by_place() -> None:
    values = torch.tensor([[0.1, 0.9, 0.5], [0.5, 0.5, 0.2]])
    scores = HeadScores(values[None])
    assert list(top_unless_tied(scores, 1 / 6) or ()) == [(0, 1)]
    assert top_unless_tied(scores, 2 / 6) is None and top_unless_tied(scores, 3 / 6) is None
    # All three equal heads are inside.
    assert set(top_unless_tied(scores, 4 / 6) or ()) == {(0, 1), (0, 2), (1, 0), (1, 1)}
    assert len(top_unless_tied(scores, 1.0) or ()) == 6
    same = HeadScores(torch.full((2, 2, 3), 0.25))
    assert all_equal(same) and not all_equal(scores) and top_unless_tied(same, 0.5) is None
    # A head that the model lacks is no head that differs.
    ragged = HeadScores(torch.tensor([[[1.0, 1.0], [1.0, torch.nan]]]), grid=HeadGrid((2, 1)))
    assert all_equal(ragged)
