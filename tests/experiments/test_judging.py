"""How experiments judge answers: first tokens, whole answers and generated ones, from the command line and by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pandas as pd
import pytest
import tiny
import torch
from plain_runs import scenes

import mmlens
from mmlens.cli import main
from mmlens.data.examples import Evidence, Example, load_examples, save_examples
from mmlens.data.splits import split_examples
from mmlens.errors import InvalidValueError
from mmlens.experiments.catalog import EXPERIMENTS
from mmlens.experiments.experiment import Setup
from mmlens.experiments.judging import JUDGES
from mmlens.runs.paper import run_all
from mmlens.runs.rerun import rerun
from mmlens.runs.run import Request, read_record, request_of

CANDIDATES = ("the letter K", "the letter", "the second image", "the red square")
KEY = ["mode", "arm", "count", "draw", "id"]
JUDGING = {
    "core-heads",
    "doubtful-points",
    "emergence",
    "hybrid",
    "masking",
    "modes",
    "prediction",
    "score-comparison",
    "self-repair",
    "sufficiency",
    "transfer",
    "vision-heads",
}


def outcomes_of(folder: Path, place: str = "per_example") -> dict[str, pd.Series]:
    table = pd.read_parquet(folder / place / "outcomes.parquet")
    return {metric: rows.set_index(KEY)["value"].sort_index() for metric, rows in table.groupby("metric")}


@pytest.fixture(scope="module")
def micro_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shipped scenes: their answers are single tokens."""
    return save_examples(scenes(4, 5), tmp_path_factory.mktemp("scenes") / "data")


@pytest.mark.parametrize("experiment", ["masking", pytest.param("core-heads", marks=pytest.mark.slow)])
def test_of_answers_of_one_token_whole_and_first_token_are_the_same(
    experiment: str, micro_folder: Path, tmp_path: Path
) -> None:
    settings = ["modes=zero", "n_draws=1"]
    settings += ["shares=0.05", "n_per_kind=2"] if experiment == "masking" else ["counts=2,3"]
    place = "per_example" if experiment == "masking" else "."
    found = {}
    for answers in ("first token", "whole"):
        out = tmp_path / answers
        given = ["run", experiment, "--model", "micro", "--data", str(micro_folder), "--out", str(out)]
        assert main([*given, "--threads", "1", "--answers", answers, "--set", *settings]) == 0
        found[answers] = outcomes_of(out / "micro", place)
    first, whole = found["first token"], found["whole"]
    assert set(first) == {"accuracy", "invalid", "logit_difference"}
    assert set(whole) == {"accuracy", "candidate_log_probability_difference"}
    # Only an answer that is no candidate can be judged differently: whole answers are compared with candidates alone.
    valid = first["invalid"] == 0
    assert valid.mean() > 0.5 and 0 < first["accuracy"].mean() < 1
    pd.testing.assert_series_equal(first["accuracy"][valid], whole["accuracy"][valid])
    pd.testing.assert_series_equal(
        first["logit_difference"],
        whole["candidate_log_probability_difference"],
        check_names=False,
        atol=1e-4,
        check_dtype=False,
    )
    methods = {answers: (tmp_path / answers / "micro" / "methods.md").read_text() for answers in found}
    assert "judged" not in methods["first token"] and "Answers were judged whole" in methods["whole"]
    record = read_record(tmp_path / "whole" / "micro")
    assert record["request"]["answers"] == "whole" and "Answers were judged whole" in record["statement"]
    report = (tmp_path / "whole" / "micro" / "report.html").read_text()
    assert "whose whole answer is the most probable of its candidates" in report
    assert "first answer token" not in report


# ---------------------------------------------------------------------- candidates that share their first token


def chat(index: int) -> Example:
    """A question about the second of two images, after an answered one about the first."""
    images = tiny.tiny_images(2, seed=10 + index, sizes=[(64, 64)])
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "Where is the square now?"}],
        },
    ]
    return Example(
        "",
        CANDIDATES[index % 3],
        messages=messages,
        images=tuple(images),
        candidates=CANDIDATES,
        evidence=(Evidence(1, (8, 8, 40, 40)),),
        kind="chat",
        id=f"chat-{index}",
    )


@torch.no_grad()
def candidate_sums(model: mmlens.HookedVLM, heads: mmlens.HeadSet | None, example: Example) -> list[float]:
    """Log probability of each candidate, token by token, by the plain model with the heads cut out of its weights."""
    plain = copy.deepcopy(model.hf_model)
    for layer, head in heads or ():
        projection = plain.model.language_model.layers[layer].self_attn.o_proj
        projection.weight[:, head * model.cfg.d_head : (head + 1) * model.cfg.d_head] = 0
    prompt = model.prompt_examples([example])
    sums = []
    for candidate in example.candidates:
        before = model.tokenizer(prompt.text[0], add_special_tokens=False)["input_ids"]
        start = (prompt.answer_starts or [""])[0]
        whole = model.tokenizer(prompt.text[0] + start + candidate, add_special_tokens=False)["input_ids"]
        inputs, total = dict(prompt.inputs), 0.0
        for token in whole[len(before) :]:
            log_probs = plain(**inputs).logits[0, -1].log_softmax(-1)
            total += float(log_probs[token])
            for name, value in {"input_ids": token, "attention_mask": 1, "mm_token_type_ids": 0}.items():
                if name in inputs:
                    inputs[name] = torch.cat([inputs[name], torch.tensor([[value]])], 1)
        sums.append(total)
    return sums


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny.tiny_model("qwen3_vl").save_pretrained(folder)
    tiny.tiny_processor("qwen3_vl").save_pretrained(folder)
    return folder


def test_whole_answers_of_candidates_that_share_their_first_token(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = save_examples([chat(index) for index in range(12)], tmp_path / "chats")
    given = ["run", "masking", "--model", str(tiny_folder), "--data", str(data), "--threads", "1"]
    settings = ["--set", "shares=0.05", "modes=zero", "n_draws=1", "n_per_kind=6"]
    # One position cannot tell them apart, and that is said.
    assert main([*given, "--out", str(tmp_path / "first"), *settings]) != 0
    assert "share their first token" in capsys.readouterr().err
    out = tmp_path / "whole"
    assert main([*given, "--out", str(out), "--answers", "whole", *settings]) == 0
    found = outcomes_of(out / tiny_folder.name)
    model = mmlens.HookedVLM.from_pretrained(str(tiny_folder))
    examples = {example.id: example for example in load_examples(data)}
    selection, _ = split_examples(list(examples.values()), 0.5, seed=0)
    top = mmlens.ram(model, selection, progress=False).top(1)
    for mode, arm, heads in (("clean", "clean", None), ("zero", "top", top)):
        count = 0 if heads is None else 1
        accuracy = found["accuracy"].loc[mode, arm, count, 0]
        difference = found["candidate_log_probability_difference"].loc[mode, arm, count, 0]
        assert len(accuracy) == 6
        for name in accuracy.index:
            sums = candidate_sums(model, heads, examples[name])
            right = CANDIDATES.index(examples[name].answer)
            margin = sums[right] - max(sums[:right] + sums[right + 1 :])
            assert difference[name] == pytest.approx(margin, abs=2e-4)
            assert accuracy[name] == float(margin > 0)
    assert 0 < found["accuracy"].mean() < 1
    again = rerun(out / tiny_folder.name, progress=False)
    assert again.same and again.n_values > 100


# ---------------------------------------------------------------------- the choice itself


def test_generated_answers_are_judged_as_generated_accuracy_does(micro: mmlens.HookedVLM) -> None:
    selection, evaluation = scenes(2, 1, ["objects"]), scenes(3, 2, ["objects"])
    found = mmlens.core_heads(
        micro,
        selection,
        evaluation,
        counts=[3],
        modes=["zero"],
        n_draws=1,
        progress=False,
        answers="generated",
    )
    assert set(found.outcomes["metric"]) == {"accuracy", "invalid", "candidate_log_probability_difference"}
    rows = found.outcomes[(found.outcomes["metric"] == "accuracy") & (found.outcomes["arm"] == "top")]
    by_hand = mmlens.effect(micro, evaluation, mmlens.ablate(found.top, "zero"), mmlens.generated_accuracy)
    expected = dict(zip([example.id for example in evaluation], by_hand.values.tolist(), strict=True))
    assert len(found.top) == 3 and dict(zip(rows["id"], rows["value"], strict=True)) == expected
    assert "judged as generated" in found.summary["finding"]["statement"]


def test_experiments_that_judge_otherwise_refuse(micro: mmlens.HookedVLM, tmp_path: Path) -> None:
    able = {name for name, each in EXPERIMENTS.items() if getattr(each.run, "judges_as_asked", False)}
    assert able == JUDGING
    setup = Setup(micro, scenes(2, 1), scenes(2, 2), progress=False, answers="whole")
    for name in set(EXPERIMENTS) - able:
        with pytest.raises(InvalidValueError, match=f"{name} cannot judge answers as 'whole'"):
            EXPERIMENTS[name].run(setup)
    assert main(["run", "key-tokens", "--model", "micro", "--out", str(tmp_path), "--answers", "whole"]) != 0
    assert not (tmp_path / "micro" / "run.json").exists()
    with pytest.raises(InvalidValueError, match="stability cannot judge answers as 'generated'"):
        run_all(
            ["micro"], tmp_path, Request("", "", answers="generated"), experiments=["masking", "stability"]
        )


def test_whole_answers_need_candidates(micro: mmlens.HookedVLM) -> None:
    bare = [Example("What?", "red", id=f"bare-{index}") for index in range(2)]
    with pytest.raises(InvalidValueError, match=r"2 of 2 examples of the evaluation split .* 'generated'"):
        Setup(micro, scenes(2, 1), bare, answers="whole")
    Setup(micro, scenes(2, 1), bare, answers="generated")
    with pytest.raises(InvalidValueError, match="there is no answers 'hole'; the nearest: 'whole'"):
        Setup(micro, scenes(2, 1), bare, answers="hole")
    assert JUDGES["generated"].graded(bare)[0] == "whole_answer_log_probability"


def test_a_record_from_before_the_choice_is_of_first_tokens() -> None:
    record = {"request": json.loads('{"experiment": "masking", "model": "micro"}')}
    assert request_of(record).answers == "first token"
