"""Overlays: the numbers beside the pictures from the plain model's attention, and the pictures of every kind."""

from __future__ import annotations

import json

import pytest
import torch
from plain_attention import seen_by_plain_model
from plain_runs import small_setup

import mmlens
from mmlens.experiments.ablations import with_evidence
from mmlens.experiments.experiment import Findings, Setup
from mmlens.experiments.overlays import EXPERIMENT, across
from mmlens.scores.retrieval import ram


@pytest.fixture(scope="module")
def setup(micro: mmlens.HookedVLM) -> Setup:
    return small_setup(micro)


@pytest.fixture(scope="module")
def found(setup: Setup) -> Findings:
    return EXPERIMENT.run(setup, n_heads=2)


def test_shares_are_those_of_the_plain_model(setup: Setup, found: Findings) -> None:
    examples = with_evidence(setup.evaluation)
    seen = seen_by_plain_model(setup.model, examples)
    scores = ram(setup.model, with_evidence(setup.selection), progress=False)
    heads = {"top": scores.top(2), "bottom": scores.bottom(2)}
    assert found.numbers["top"] == [list(head) for head in heads["top"]]
    assert len(found.numbers["shares"]) == 6
    for row in found.numbers["shares"]:
        chosen = [s for s, e in zip(seen, examples, strict=True) if row["kind"] in ("pooled", e.kind)]
        evidence, images, even = (
            torch.tensor([[value(s, head) for head in heads[row["arm"]]] for s in chosen]).sum()
            for value in (
                lambda s, head: float(s.ram[head]),
                lambda s, head: float(s.vision_mass[head]),
                lambda s, head: float(s.vision_mass[head] * s.evidence.sum() / s.image.sum()),
            )
        )
        assert row["n"] == len(chosen)
        assert row["selectivity"] == pytest.approx(float(evidence / images), abs=1e-4)
        assert row["chance"] == pytest.approx(float(even / images), abs=1e-4)
    json.dumps(found.numbers, allow_nan=False)


def test_there_is_a_picture_of_every_head_and_kind(found: Findings) -> None:
    titles = [title for title, _, _ in found.figures[1:]]
    top, bottom = found.numbers["top"], found.numbers["bottom"]
    assert titles == [
        f"{kind}: {arm} head L{layer}H{head}"
        for kind in ("documents", "objects")
        for arm, heads in (("top", top), ("bottom", bottom))
        for layer, head in heads
    ]
    assert "one of the top 2 heads" in found.figures[1][1]


def test_the_verdict_needs_top_above_bottom_and_chance(found: Findings) -> None:
    rows = {row["arm"]: row for row in found.numbers["shares"] if row["kind"] == "pooled"}
    expected = rows["top"]["low"] > max(rows["bottom"]["high"], rows["top"]["chance"])
    assert found.numbers["agrees"] == expected
    both = across({"one": found, "two": found})
    assert f"in {2 * expected} of 2 models" in both.statement
