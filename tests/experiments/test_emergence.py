"""Emergence through checkpoints: the oracle's sums by hand, and checkpoints that are one and the same model."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

import mmlens
from mmlens.data.examples import DataError
from mmlens.experiments.emergence import EXPERIMENT, oracle_images
from mmlens.experiments.experiment import Setup
from mmlens.runs.run import write_findings


@pytest.fixture(scope="module")
def setup(micro: mmlens.HookedVLM) -> Setup:
    splits = [
        [e for kind in ("objects", "documents") for e in mmlens.scene_examples(kind, 4, seed)]
        for seed in (1, 2)
    ]
    return Setup(micro, *splits, batch_size=4, progress=False)


def test_an_oracle_token_is_the_sum_of_its_words(micro: mmlens.HookedVLM, setup: Setup) -> None:
    example = setup.selection[0]
    prompt = micro.prompt_examples([example])
    hooks = oracle_images(micro, prompt, [example])(micro, prompt)
    with micro.hooks(fwd_hooks=hooks):
        _, cache = micro.run_with_cache(prompt, names_filter="blocks.0.hook_resid_pre")
    where = prompt.token_map.evidence([example])
    table, vocabulary = micro.hf_model.get_input_embeddings().weight, micro.tokenizer.get_vocab()
    expected = table[vocabulary[example.metadata["key"]]] + table[vocabulary[example.answer]]
    for row in cache["blocks.0.hook_resid_pre"][where]:
        assert torch.allclose(row, expected, atol=1e-5)


def test_copies_of_a_trained_model_are_the_same_at_every_step(setup: Setup, tmp_path: Path) -> None:
    for step in ("00010", "00020"):
        shutil.copytree(Path(mmlens.__file__).parent / "shipped/micro", tmp_path / step)
    found = EXPERIMENT.run(setup, checkpoints=str(tmp_path), n_per_kind=4)
    first, last = found.numbers["rows"]
    assert first | {"step": 20} == last and found.numbers["last_step"] == 20
    assert (
        last["clean"] == 1.0
        and last["spearman_with_last"] == pytest.approx(1)
        and last["overlap_with_last"] == 1
    )
    # The tower was trained to give these sums, so its own RAM is nearly that of the oracle.
    scores = mmlens.ram(setup.model, setup.selection, progress=False)
    assert last["largest_ram"] == pytest.approx(float(scores.values.max()), abs=0.02)


@torch.no_grad()
def test_outcomes_are_those_of_the_model_with_heads_cut_out_of_its_weights(
    setup: Setup, tmp_path: Path
) -> None:
    shutil.copytree(Path(mmlens.__file__).parent / "shipped/micro", tmp_path / "00010")
    found = EXPERIMENT.run(setup, checkpoints=str(tmp_path), n_per_kind=4)
    write_findings(found, tmp_path / "run")
    outcomes = found.per_example["outcomes"].set_index(["arm", "id"])["value"]
    names = found.numbers["rows"][0]["own_heads"].split()
    heads = [tuple(int(number) for number in name[1:].split("H")) for name in names]
    assert len(heads) == 3
    for arm, cut in (("clean", []), ("own_top", heads)):
        model = mmlens.HookedVLM(copy.deepcopy(setup.model.hf_model), setup.model.processor)
        for layer, head in cut:
            projection = model.hf_model.model.language_model.layers[layer].self_attn.o_proj
            width = model.cfg.d_head
            projection.weight[:, head * width : (head + 1) * width] = 0
        for example in setup.evaluation:
            prompt = model.prompt_examples([example])
            with model.hooks(fwd_hooks=oracle_images(model, prompt, [example])(model, prompt)):
                logits = model(prompt)[0, -1]
            assert outcomes[arm, example.id] == float(logits.argmax() == prompt.answer_ids[0])


def test_answers_are_judged_as_asked(setup: Setup, tmp_path: Path) -> None:
    shutil.copytree(Path(mmlens.__file__).parent / "shipped/micro", tmp_path / "00010")
    found = {
        answers: EXPERIMENT.run(
            dataclasses.replace(setup, answers=answers), checkpoints=str(tmp_path), n_per_kind=2
        )
        for answers in ("first token", "whole", "generated")
    }
    outcomes = {name: own.per_example["outcomes"].set_index(["arm", "id"]) for name, own in found.items()}
    # Its answers are single tokens and right, clean; a wrong one may be none of the candidates.
    for name, own in outcomes.items():
        assert (own.loc["clean", "value"] == 1).all()
        wrong = own["value"] == 0
        assert wrong.any() and (outcomes["first token"]["value"][wrong] == 0).all(), name
    assert "judged as generated" in found["generated"].statement


def test_what_is_no_checkpoint_is_refused(setup: Setup, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no checkpoint: make them with"):
        EXPERIMENT.run(setup, checkpoints=str(tmp_path))
    shutil.copytree(Path(mmlens.__file__).parent / "shipped/llava-onevision", tmp_path / "00010")
    with pytest.raises(DataError, match=r"has 6 layers of 8 heads, the model 8 of 8"):
        EXPERIMENT.run(setup, checkpoints=str(tmp_path), n_per_kind=2)
