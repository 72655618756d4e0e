"""Experiments on a folder of chats, from the command line: the numbers are those of the plain model on these chats."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch
from plain_runs import without_heads

import mmlens
from mmlens.cli import main
from mmlens.data.examples import Evidence, Example, load_examples, save_examples
from mmlens.data.splits import split_examples
from mmlens.experiments.looking import question_attention


def few_shot(shot: Example, example: Example) -> Example:
    """An example after the answered question of another; its evidence is in the second of the chat's images."""
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": shot.question}]},
        {"role": "assistant", "content": [{"type": "text", "text": shot.answer}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example.question}]},
    ]
    evidence = tuple(Evidence(1, region.box) for region in example.evidence)
    return dataclasses.replace(
        example, question="", messages=messages, images=(*shot.images, *example.images), evidence=evidence
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shots = mmlens.scene_examples("objects", 16, seed=1)
    scenes = mmlens.scene_examples("objects", 16, seed=0)
    chats = [few_shot(*pair) for pair in zip(shots, scenes, strict=True)]
    assert all(
        len(each.images) == 2 and each.question == old.question
        for each, old in zip(chats, scenes, strict=True)
    )
    return save_examples(chats, tmp_path / "chats")


def test_masking_on_a_folder_of_chats(folder: Path, tmp_path: Path, micro: mmlens.HookedVLM) -> None:
    out = tmp_path / "out"
    given = [
        "run",
        "masking",
        "--model",
        "micro",
        "--data",
        str(folder),
        "--out",
        str(out),
        "--batch-size",
        "4",
    ]
    settings = ["shares=0.016", "modes=zero", "n_draws=1", "n_per_kind=4"]
    assert main([*given, "--threads", "1", "--set", *settings]) == 0
    examples = {example.id: example for example in load_examples(folder)}
    selection, evaluation = split_examples(list(examples.values()), 0.5, seed=0)
    outcomes = pd.read_parquet(out / "micro" / "per_example" / "outcomes.parquet")
    zeroed = outcomes[
        (outcomes["mode"] == "zero") & (outcomes["metric"] == "accuracy") & (outcomes["arm"] == "top")
    ]
    assert set(zeroed["id"]) <= {example.id for example in evaluation} and len(zeroed) >= 4
    scores = mmlens.ram(micro, selection, progress=False)
    for count, rows in zeroed.groupby("count"):
        truth = without_heads(micro, scores.top(int(count)), [examples[name] for name in rows["id"]])
        assert dict(zip(rows["id"], rows["value"], strict=True)) == {
            name: of[0] for name, of in truth.items()
        }


def test_overlays_show_every_image_of_a_chat(folder: Path, micro: mmlens.HookedVLM) -> None:
    example = load_examples(folder)[0]
    means, boxes, positions = question_attention(micro, example)
    prompt = micro.prompt_examples([example])
    assert len(boxes) == len(positions) == 2
    for image in range(2):
        assert positions[image].tolist() == prompt.positions(image=image)[0].nonzero().flatten().tolist()
    mass = mmlens.attention_mass(micro, prompt, prompt.positions("question"), prompt.positions(image=1))
    assert torch.allclose(means[..., positions[1]].sum(-1), mass[0], atol=1e-6)
