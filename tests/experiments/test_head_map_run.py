"""The head map against the plain model's attention, and its summary numbers by hand."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from plain_attention import seen_by_plain_model
from plain_runs import small_setup

import mmlens
from mmlens.experiments.ablations import with_evidence
from mmlens.experiments.experiment import Findings, Setup
from mmlens.experiments.head_map import BAND, EXPERIMENT, PUBLISHED, across, gini


@pytest.fixture(scope="module")
def setup(micro: mmlens.HookedVLM) -> Setup:
    return small_setup(micro)


@pytest.fixture(scope="module")
def found(setup: Setup) -> Findings:
    return EXPERIMENT.run(setup, n_resamples=200)


def test_scores_and_places_are_those_of_the_plain_model(setup: Setup, found: Findings) -> None:
    examples = with_evidence(setup.selection)
    plain = torch.stack([seen.ram for seen in seen_by_plain_model(setup.model, examples)])
    table = found.per_example["ram"].set_index("id")
    np.testing.assert_allclose(table.to_numpy(), plain.flatten(1).numpy(), atol=1e-5)
    mean = plain.mean(0).flatten()
    best = mean.argsort(descending=True)[:3]
    pooled = found.numbers["kinds"]["pooled"]
    assert pooled["top"] == [[int(at) // 8, int(at) % 8] for at in best]
    assert pooled["depth"] == pytest.approx(float((best // 8).float().mean() / 7))
    assert pooled["share_of_top"] == pytest.approx(float(mean[best].sum() / mean.sum()), abs=1e-5)
    low, high = pooled["depth_interval"]
    assert 0 <= low <= high <= 1
    objects = plain[[e.kind == "objects" for e in examples]].mean(0)
    rows = found.tables["layers"][1].set_index(["kind", "layer"])
    np.testing.assert_allclose(
        rows.loc["objects", "share_of_ram"], (objects.sum(1) / objects.sum()).numpy(), atol=1e-5
    )
    assert rows.loc["pooled", "top_heads"].sum() == 3
    inside = sum(BAND[0] <= layer / 7 <= BAND[1] for layer, _ in pooled["top"])
    assert found.numbers["in_band"] == inside and found.numbers["agrees"] == (2 * inside >= 3)
    assert found.numbers["share_of_all_heads_in_band"] == 2 / 8  # layers 3 and 4
    json.dumps(found.numbers, allow_nan=False)


def test_the_gini_coefficient_is_the_mean_absolute_difference() -> None:
    values = np.random.default_rng(0).gamma(1.0, size=(3, 17))
    for row, value in zip(values, gini(values), strict=True):
        assert value == pytest.approx(np.abs(row[:, None] - row).mean() / (2 * row.mean()))
    with pytest.raises(ValueError, match="scores >= 0"):
        gini(np.array([-1.0, 2.0]))


def test_the_band_is_the_paper_s() -> None:
    row = PUBLISHED.iloc[0]
    assert [depth * (row["n_layers"] - 1) for depth in BAND] == [row["first_layer"], row["last_layer"]]


def test_moving_with_scale_needs_intervals_that_do_not_meet(found: Findings) -> None:
    def at(depth: float, size: int, family: str = "qwen3_vl") -> Findings:
        pooled = {**found.numbers["kinds"]["pooled"], "depth": depth}
        pooled["depth_interval"] = [depth - 0.1, depth + 0.1]
        changed: dict[str, Any] = {"n_parameters": size, "family": family, "kinds": {"pooled": pooled}}
        return Findings("", {**found.numbers, **changed})

    later = across({"large": at(0.7, 2), "small": at(0.4, 1), "other": at(0.1, 3, "llava")})
    assert later.numbers["later_with_scale"] == {"qwen3_vl": True} and "later with scale" in later.statement
    assert later.tables["models"][1]["model"].tolist() == ["other", "small", "large"]
    assert across({"large": at(0.5, 2), "small": at(0.4, 1)}).numbers["later_with_scale"] == {
        "qwen3_vl": False
    }
    small, large = at(0.4, 1), at(0.7, 2)
    small.numbers["kinds"]["other_task"] = small.numbers["kinds"]["pooled"]
    assert "two sizes with the same tasks" in across({"large": large, "small": small}).statement
    assert "two sizes with the same tasks" in across({"one": at(0.5, 2), "two": at(0.9, 2)}).statement
