"""CoRe against vision heads: sets, overlap and selectivity from the plain model, accuracy from its weights."""

from __future__ import annotations

import json

import pytest
import scipy.stats
import torch
from plain_attention import seen_by_plain_model
from plain_runs import small_setup, without_heads

import mmlens
from mmlens.experiments.ablations import with_evidence
from mmlens.experiments.experiment import Findings, Setup
from mmlens.experiments.vision_heads import EXPERIMENT, across


@pytest.fixture(scope="module")
def setup(micro: mmlens.HookedVLM) -> Setup:
    return small_setup(micro)


@pytest.fixture(scope="module")
def found(setup: Setup) -> Findings:
    return EXPERIMENT.run(setup, modes=("zero",), n_draws=2)


def test_sets_and_their_overlap_are_those_of_the_plain_model(setup: Setup, found: Findings) -> None:
    seen = seen_by_plain_model(setup.model, with_evidence(setup.selection))
    means = [
        torch.stack(each).mean(0).flatten()
        for each in zip(*((s.ram, s.vision_mass) for s in seen), strict=True)
    ]
    tops = [[[int(at) // 8, int(at) % 8] for at in mean.argsort(descending=True)[:3]] for mean in means]
    assert [found.numbers["core"], found.numbers["vision"]] == tops
    shared = sum(head in tops[1] for head in tops[0])
    assert found.numbers["overlap"] == shared and found.numbers["expected_overlap"] == pytest.approx(9 / 64)
    # All ways of drawing 3 of 64 heads that hold at least as many of the 3.
    p_value = 1 - sum(scipy.stats.hypergeom.pmf(k, 64, 3, 3) for k in range(shared))
    assert found.numbers["overlap_p_value"] == pytest.approx(p_value)
    assert found.numbers["spearman"] == pytest.approx(scipy.stats.spearmanr(*means).statistic, abs=1e-3)


def test_accuracies_are_those_of_the_plain_model_without_the_heads(setup: Setup, found: Findings) -> None:
    examples = with_evidence(setup.evaluation)
    accuracy = {}
    for name, arm in (("core", "CoRe"), ("vision", "vision")):
        heads = [tuple(head) for head in found.numbers[name]]
        outcomes = without_heads(setup.model, heads, examples)
        accuracy[arm] = sum(value for value, _ in outcomes.values()) / len(outcomes)
        row = next(
            row
            for row in found.numbers["ablation"]
            if (row["arm"], row["kind"], row["metric"]) == (arm, "pooled", "accuracy")
        )
        assert row["mean"] == pytest.approx(accuracy[arm]) and row["n"] == len(examples)
    difference = found.numbers["core_minus_vision"]["zero"]
    assert difference["difference"] == pytest.approx(accuracy["CoRe"] - accuracy["vision"])
    assert found.numbers["core_matters_more"] == (difference["high"] < 0)
    drawn = found.per_example["ablation"]
    assert drawn[drawn["arm"] == "CoRe layer-matched"]["draw"].nunique() == 2
    json.dumps(found.numbers, allow_nan=False)


def test_selectivity_is_read_on_the_evaluation_split(setup: Setup, found: Findings) -> None:
    seen = seen_by_plain_model(setup.model, with_evidence(setup.evaluation))
    assert len(found.numbers["selectivity"]) == 6
    for row in found.numbers["selectivity"]:
        layer, head = (int(part) for part in row["head"][1:].split("H"))
        on_evidence = torch.tensor([float(s.ram[layer, head]) for s in seen])
        on_images = torch.tensor([float(s.vision_mass[layer, head]) for s in seen])
        share = torch.tensor([float(s.evidence.sum() / s.image.sum()) for s in seen])
        assert row["selectivity"] == pytest.approx(float(on_evidence.mean() / on_images.mean()), abs=1e-4)
        assert row["chance"] == pytest.approx(float((on_images * share).mean() / on_images.mean()), abs=1e-4)


def test_across_has_a_row_for_every_model_and_mode(found: Findings) -> None:
    both = across({"one": found, "two": found})
    assert both.tables["ablation"][1]["model"].tolist() == ["one", "two"]
    assert both.tables["overlap"][1]["overlap"].tolist() == [found.numbers["overlap"]] * 2
