"""Transfer against the plain model, and its table against the raw outcomes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from plain_runs import small_setup, without_heads

import mmlens
from mmlens.experiments.experiment import Findings, Setup
from mmlens.experiments.transfer import EXPERIMENT, _groups, _ratio, run


@pytest.fixture(scope="module")
def setup(micro: mmlens.HookedVLM) -> Setup:
    return small_setup(micro)


@pytest.fixture(scope="module")
def found(setup: Setup) -> Findings:
    return run(setup, fraction=0.05, mode="zero", n_draws=2, n_per_kind=4)


def test_every_cell_is_the_plain_model_s_loss_on_held_out_examples(setup: Setup, found: Findings) -> None:
    examples = [e for e in setup.evaluation if not e.id.endswith("-4")]
    clean = without_heads(setup.model, [], examples)
    assert len(found.numbers["cells"]) == 3 * 3
    for kind in ("objects", "documents", "pooled"):
        heads = [tuple(head) for head in found.numbers["heads"][kind]]
        without = without_heads(setup.model, heads, examples)
        for judged in ("objects", "documents", "text_recall"):
            cell = next(
                c for c in found.numbers["cells"] if (c["chosen_on"], c["judged_on"]) == (kind, judged)
            )
            expected = [clean[e.id][0] - without[e.id][0] for e in examples if e.kind == judged]
            assert cell["lost"] == pytest.approx(np.mean(expected)) and cell["n"] == 4
            assert cell["lost_low"] <= cell["lost"] <= cell["lost_high"]
            assert cell["beyond"] == pytest.approx(cell["lost"] - cell["lost_random"])


def test_heads_are_those_of_their_kind_s_ram_on_the_selection_split(setup: Setup, found: Findings) -> None:
    for kind in ("objects", "documents"):
        own = mmlens.ram(setup.model, [e for e in setup.selection if e.kind == kind], progress=False)
        assert [tuple(head) for head in found.numbers["heads"][kind]] == list(own.top(0.05))
    both = [set(map(tuple, found.numbers["heads"][kind])) for kind in ("objects", "documents")]
    assert found.numbers["overlap"]["objects"]["documents"] == len(both[0] & both[1])


def test_groups_and_ratio_follow_from_the_raw_outcomes(found: Findings) -> None:
    raw = found.per_example["outcomes"]
    raw = raw[(raw["arm"] == "chosen") & (raw["chosen_on"] != "pooled")].assign(
        loss=lambda t: t["clean"] - t["value"]
    )
    own, other = (
        raw[raw["kind"] == raw["chosen_on"]],
        raw[(raw["kind"] != raw["chosen_on"]) & (raw["kind"] != "text_recall")],
    )
    rows = {r["judged_on"]: r for r in found.numbers["groups"] if r["arm"] == "chosen"}
    assert rows["own kind"]["mean"] == pytest.approx(own["loss"].mean())
    assert rows["other kinds"]["mean"] == pytest.approx(other["loss"].mean())
    assert rows["text_recall"]["mean"] == pytest.approx(raw.loc[raw["kind"] == "text_recall", "loss"].mean())
    if rows["own kind"]["low"] > 0:
        assert found.numbers["other_to_own"]["ratio"] == pytest.approx(
            other["loss"].mean() / own["loss"].mean()
        )
    else:
        assert found.numbers["other_to_own"]["ratio"] is None


def test_a_share_of_a_loss_that_may_be_nothing_is_not_given() -> None:
    """Of 20 examples the own heads cost 2, or 16, and the others' heads the same ones."""
    rows = [
        {"arm": "chosen", "chosen_on": on, "kind": kind, "example": f"{kind}{i}", "clean": 1.0, "heads": on}
        for on in ("a", "b")
        for kind in ("a", "b")
        for i in range(10)
    ]
    table = pd.DataFrame(rows)
    for lost, known in ((1, False), (8, True)):
        table["value"] = (table["example"].str[1:].astype(int) >= lost).astype(float)
        found = _ratio(table, ["a", "b"], _groups(table, ["a", "b"], [], 0), 0)
        assert (found["ratio"] == 1.0) if known else (found["ratio"] is None)


def test_an_interval_without_bounds_is_none() -> None:
    """One of four examples is lost by its own heads: a third of the draws have no loss to share."""
    lost = {("a", "a", 0), ("b", "a", 1)}
    table = pd.DataFrame(
        [
            {
                "arm": "chosen",
                "chosen_on": on,
                "kind": "a",
                "example": i,
                "clean": 1.0,
                "value": float((on, "a", i) not in lost),
            }
            for on in ("a", "b")
            for i in range(4)
        ]
    )
    told = pd.DataFrame([{"judged_on": "own kind", "arm": "chosen", "low": 0.1}])
    assert _ratio(table, ["a", "b"], told, 0) == {"ratio": 1.0, "low": None, "high": None}


def test_layer_matched_sets_avoid_the_chosen_heads_and_are_averaged(found: Findings) -> None:
    raw = found.per_example["outcomes"]
    part = raw[
        (raw["arm"] == "layer_matched") & (raw["chosen_on"] == "objects") & (raw["kind"] == "documents")
    ]
    assert part["heads"].nunique() == 2 and part["example"].nunique() == 4
    cell = next(
        c for c in found.numbers["cells"] if (c["chosen_on"], c["judged_on"]) == ("objects", "documents")
    )
    assert (
        cell["lost_random"] == pytest.approx((part["clean"] - part["value"]).mean()) and cell["n_draws"] == 2
    )


def test_one_kind_is_refused(setup: Setup) -> None:
    with pytest.raises(ValueError, match="transfer is between kinds"):
        run(replace(setup, selection=[e for e in setup.selection if e.kind != "documents"]))


def test_across_collects_ratios(found: Findings) -> None:
    across = EXPERIMENT.across({"one": found, "two": found})
    assert across.numbers["other_to_own"]["two"] == found.numbers["other_to_own"]["ratio"]
