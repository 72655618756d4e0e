"""Both readings of the doubtful points, each against the plain model or a count by hand."""

from __future__ import annotations

import dataclasses
import json

import pandas as pd
import pytest
import scipy.stats
import tiny
import torch
from plain_attention import seen_by_plain_model
from plain_runs import scenes

import mmlens
from mmlens.experiments.ablations import with_evidence
from mmlens.experiments.common import ablation_table
from mmlens.experiments.doubtful_points import (
    EXPERIMENT,
    Reading,
    across,
    compared,
    ram_from,
    tagged_prompt,
    text_after_images,
    usable_tags,
)
from mmlens.experiments.experiment import Findings, Setup
from mmlens.heads import HeadSet
from mmlens.scores.retrieval import ram

KINDS = ("documents", "frames", "objects")


@pytest.fixture(scope="module")
def setup(micro: mmlens.HookedVLM) -> Setup:
    return Setup(micro, scenes(4, 1, KINDS), scenes(2, 2, KINDS), batch_size=12, progress=False)


@pytest.fixture(scope="module")
def found(setup: Setup) -> Findings:
    return EXPERIMENT.run(setup, mode="zero")


def row(found: Findings, name: str) -> dict[str, object]:
    return next(row for row in found.numbers["readings"] if row["reading"] == name)


def test_every_point_is_read_both_ways_on_micro(found: Findings) -> None:
    names = [
        "box mapping",
        "question tokens",
        "evidence tags",
        "mask",
        "number of heads",
        "mean over examples",
    ]
    assert [row["reading"] for row in found.numbers["readings"]] == names and not found.numbers["left_out"]
    json.dumps(found.numbers, allow_nan=False)


def test_the_paper_s_box_mapping_is_compared_on_examples_with_boxes(setup: Setup, found: Findings) -> None:
    boxed = [e for e in with_evidence(setup.selection) if e.kind != "frames"]
    values = [
        ram(setup.model, boxed, mapping=mapping, progress=False).values.flatten().numpy()
        for mapping in ("merged", "paper_floor")
    ]
    expected = scipy.stats.spearmanr(*values).statistic
    assert row(found, "box mapping")["spearman"] == pytest.approx(expected, abs=1e-6) and expected < 0.999
    assert row(found, "box mapping")["note"] == "8 of 12 examples have boxes"


def test_text_after_the_images_is_the_question_within_the_template(setup: Setup) -> None:
    examples = [*scenes(1, 3, ["frames"]), *scenes(1, 3, ["objects"])]
    prompt = setup.model.prompt_examples(examples)
    later = text_after_images(prompt)
    ids, image_id = prompt.inputs["input_ids"], setup.model.hf_model.config.image_token_id
    for own, mask, question in zip(ids, later, prompt.token_map.is_question, strict=True):
        last = int((own == image_id).nonzero()[-1])
        assert mask.nonzero().flatten().tolist() == list(range(last + 1, len(own)))
        assert bool((question & ~mask).sum() == 0) and mask.sum() > question.sum()


def test_other_query_positions_give_ram_of_those_positions(setup: Setup) -> None:
    examples = with_evidence(setup.selection)[:5]
    asked = ram_from(setup, examples, lambda prompt: prompt.token_map.is_question)
    plain = torch.stack([seen.ram for seen in seen_by_plain_model(setup.model, examples)])
    torch.testing.assert_close(asked.per_example, plain, atol=1e-5, rtol=0)
    later = ram_from(setup, examples, text_after_images)
    assert (later.per_example - asked.per_example).abs().max() > 1e-3


def test_tags_stand_around_runs_of_images_with_evidence_and_change_nothing_else(setup: Setup) -> None:
    examples = scenes(3, 5, ["frames"])
    apart = dataclasses.replace(
        examples[2], evidence=(mmlens.Evidence(0), mmlens.Evidence(5), mmlens.Evidence(11))
    )
    examples = [*examples[:2], apart]
    tagged = tagged_prompt(setup.model, examples, (":", "."))
    tokenizer = setup.model.tokenizer
    opening, closing = (tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in (":", "."))
    for at, example in enumerate(examples):
        plain = setup.model.prompt_examples([example])
        ids = tagged.inputs["input_ids"][at][~tagged.token_map.is_padding[at]].tolist()
        without = list(ids)
        marked = sorted({region.image for region in example.evidence})
        runs = [i for i in marked if i - 1 not in marked]
        for tag in (opening, closing):
            assert ids.count(tag) == plain.inputs["input_ids"][0].tolist().count(tag) + len(runs)
        starts = [i for i, token in enumerate(ids) if token == 3]  # <|vision_start|>
        ends = [i for i, token in enumerate(ids) if token == 4]
        for image, (start, end) in enumerate(zip(starts, ends, strict=True)):
            assert (ids[start - 1] == opening) == (image in runs)
            assert (ids[end + 1] == closing) == (image in marked and image + 1 not in marked)
        tags_at = [p for p, token in enumerate(ids) if token in (opening, closing) and p <= ends[-1] + 1]
        for position in reversed(tags_at):
            del without[position]
        assert without == plain.inputs["input_ids"][0].tolist()
        question = tagged.inputs["input_ids"][at][tagged.token_map.is_question[at]]
        assert torch.equal(question, plain.inputs["input_ids"][0][plain.token_map.is_question[0]])
        assert tagged.token_map.evidence(examples)[at].sum() == plain.token_map.evidence([example]).sum()
    assert tagged.answers == [example.answer for example in examples]


def test_tags_in_a_chat_leave_its_other_turns_and_its_question_as_they_are(setup: Setup) -> None:
    shot, asked = scenes(2, 5, ["objects"])[:2]
    image = {"type": "image"}
    chat = [
        {"role": "user", "content": [image, {"type": "text", "text": shot.question}]},
        {"role": "assistant", "content": shot.answer},
        {"role": "user", "content": [image, image, {"type": "text", "text": asked.question}]},
    ]
    images = (*shot.images, *shot.images, *asked.images)
    example = mmlens.Example(
        messages=chat, images=images, answer=asked.answer, evidence=(mmlens.Evidence(2),)
    )
    tagged = tagged_prompt(setup.model, [example], (":", "."))
    by_hand = [chat[0], chat[1], {"role": "user", "content": list(chat[2]["content"])}]
    tags = [{"type": "text", "text": tag} for tag in (":", ".")]
    by_hand[2]["content"][1:2] = [tags[0], image, tags[1]]
    by_hand[2]["content"][-1] = {**by_hand[2]["content"][-1], "question": True}
    expected = setup.model.prompt(by_hand, images)
    assert torch.equal(tagged.inputs["input_ids"], expected.inputs["input_ids"])
    assert torch.equal(tagged.token_map.is_question, expected.token_map.is_question)
    assert tagged.questions == [asked.question]


def test_tags_are_those_that_the_tokenizer_has(setup: Setup) -> None:
    assert usable_tags(setup.model, ("<evidence>", "</evidence>"), (":", ".")) == (":", ".")
    assert usable_tags(setup.model, ("<evidence>", ":")) is None


def test_the_mask_s_two_readings_have_one_set_of_heads_and_two_modes(setup: Setup, found: Findings) -> None:
    heads = ram(setup.model, with_evidence(setup.selection), progress=False).top(0.05)
    examples, expected = with_evidence(setup.evaluation), {}
    for label, mode in (("causal", "uniform"), ("leaky, as written", "uniform_leaky")):
        expected[label] = mmlens.effect(
            setup.model, examples, mmlens.ablate(heads, mode), mmlens.accuracy
        ).mean
    mask = row(found, "mask")
    assert (mask["accuracy_ours"], mask["accuracy_other"]) == pytest.approx(tuple(expected.values()))
    assert mask["difference"] == pytest.approx(mask["accuracy_other"] - mask["accuracy_ours"])
    assert mask["shared_heads"] == mask["heads"] == 3 and mask["spearman"] is None
    assert (row(found, "number of heads")["heads"], row(found, "number of heads")["other_heads"]) == (3, 2)


def test_the_mean_of_ranks_gives_every_kind_one_vote(setup: Setup, found: Findings) -> None:
    scores = ram(setup.model, with_evidence(setup.selection), progress=False)
    ranks = sum(scipy.stats.rankdata(-scores.select(kind).values.flatten().numpy()) for kind in KINDS)
    expected = scipy.stats.spearmanr(scores.values.flatten().numpy(), -ranks).statistic
    assert row(found, "mean over examples")["spearman"] == pytest.approx(expected, abs=1e-6)


def test_what_cannot_be_read_two_ways_is_named_with_its_reason(setup: Setup) -> None:
    alike = dataclasses.replace(
        setup, selection=scenes(3, 1, ["objects"]), evaluation=scenes(2, 2, ["objects"])
    )
    found = EXPERIMENT.run(alike, fraction=0.026)
    assert set(found.numbers["left_out"]) == {"evidence tags", "number of heads", "mean over examples"}
    assert "Not read both ways: evidence tags, no example has images without evidence" in found.statement


def test_a_model_without_the_paper_s_index_says_so() -> None:
    model = mmlens.HookedVLM(
        tiny.tiny_model("llava_onevision").eval(), tiny.tiny_processor("llava_onevision")
    )
    setup = Setup(
        model, scenes(2, 1, ["objects", "documents"]), scenes(2, 2, ["objects"]), batch_size=4, progress=False
    )
    found = EXPERIMENT.run(setup, mode="zero", fraction=0.2)
    assert "not defined for this model" in found.numbers["left_out"]["box mapping"]
    # A byte-level tokenizer spells the tags out.
    assert "<evidence> </evidence>; top" in row(found, "evidence tags")["note"]


def test_the_difference_is_that_of_the_other_reading() -> None:
    heads = HeadSet([(0, 0)], grid=(1, 2))
    reading = Reading("point", "ours", "theirs", heads, heads, "mean", "zero")
    values = {"point: ours": ("mean", [1, 1, 1, 0]), "point: theirs": ("zero", [1, 0, 0, 0])}
    outcomes = pd.concat(
        pd.DataFrame({"mode": mode, "arm": arm, "metric": "accuracy", "example": range(4), "value": each})
        for arm, (mode, each) in values.items()
    ).assign(kind="objects", clean=1.0, n_heads=1, draw=0)
    row = compared(reading, outcomes, ablation_table(outcomes), seed=0)
    assert (row["accuracy_ours"], row["accuracy_other"], row["difference"]) == (0.75, 0.25, -0.5)
    assert row["low"] < -0.5 < row["high"]


def test_across_names_what_changes(found: Findings) -> None:
    changed = [
        {**each, "difference": -0.5, "low": -0.6, "high": -0.4} for each in found.numbers["readings"][:1]
    ]
    both = across({"one": found, "two": Findings("", {**found.numbers, "readings": changed})})
    assert "box mapping in two" in both.statement and len(both.tables["readings"][1]) == 7
