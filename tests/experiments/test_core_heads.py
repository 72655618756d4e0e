"""The experiment on the shipped model, small: its tables against plain Hugging Face runs and against each other."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import mmlens
from mmlens.cli import main
from mmlens.data.scenes import KINDS, TEXT_KINDS
from mmlens.experiments.common import POOLED
from mmlens.experiments.core_heads_claim import ARMS, EXPERIMENT, CoreHeads, across, core_heads
from mmlens.runs.data import EVALUATION_SEED, SELECTION_SEED
from mmlens.runs.record import read_record
from mmlens.runs.rerun import is_current
from mmlens.runs.run import read_findings

SETTINGS = {"counts": [2], "modes": ("zero", "mean"), "n_draws": 2, "batch_size": 10, "progress": False}


def scenes(n: int, seed: int) -> list[mmlens.Example]:
    return [e for kind in (*KINDS, *TEXT_KINDS) for e in mmlens.scene_examples(kind, n, seed)]


@pytest.fixture(scope="module")
def result(micro: mmlens.HookedVLM) -> CoreHeads:
    return core_heads(micro, scenes(4, 1), scenes(5, 2), **SETTINGS)


def test_modes_and_examples_are_checked_before_anything_runs(micro: mmlens.HookedVLM) -> None:
    selection, evaluation = scenes(4, 1), scenes(5, 2)
    for modes, said in (
        ([], "modes.*at least 1"),
        ("zero", "modes.*list"),
        (["zero", "zero"], "'zero' more than once"),
        (["zero", "uniforme"], "uniforme.*uniform"),
    ):
        with pytest.raises((ValueError, KeyError, TypeError), match=said):
            core_heads(micro, selection, evaluation, **{**SETTINGS, "modes": modes})
    for splits, which in (
        (([*selection, selection[0]], evaluation), "selection"),
        ((selection, [*evaluation, evaluation[0]]), "evaluation"),
    ):
        with pytest.raises(ValueError, match=f"{which} split holds 1 example.*more than once"):
            core_heads(micro, *splits, **SETTINGS)
    # Without ids, what two examples show tells them apart.
    nameless = [[dataclasses.replace(e, id="") for e in split] for split in (selection, evaluation)]
    with pytest.raises(ValueError, match="share 1 example"):
        core_heads(micro, nameless[0], [*nameless[1], nameless[0][0]], **SETTINGS)
    assert len(core_heads(micro, *nameless, **{**SETTINGS, "modes": ["zero"]}).scores.top(1)) == 1


@torch.no_grad()
def test_zero_ablated_accuracy_is_that_of_the_plain_model_without_those_heads(
    micro: mmlens.HookedVLM, result: CoreHeads
) -> None:
    """One example at a time, the heads' columns of the output projection set to zero in a copy of the weights."""
    plain = copy.deepcopy(micro.hf_model)
    d_head = micro.cfg.d_head
    top = result.scores.top(3)
    for layer, head in top:
        projection = plain.model.language_model.layers[layer].self_attn.o_proj
        projection.weight[:, head * d_head : (head + 1) * d_head] = 0
    outcomes = result.outcomes
    rows = outcomes[(outcomes["arm"] == "top") & (outcomes["mode"] == "zero") & (outcomes["count"] == 3)]
    for example in scenes(5, 2):
        prompt = micro.prompt_examples([example])
        logits = plain(**prompt.inputs).logits[0, -1]
        mine = rows[rows["id"] == example.id].set_index("metric")["value"]
        answer, candidates = int(prompt.answer_ids[0]), prompt.candidate_ids[0]
        wrong = candidates[candidates != answer]
        assert mine["accuracy"] == float(logits.argmax() == answer)
        assert mine["logit_difference"] == pytest.approx(
            float(logits[answer] - logits[wrong].max()), abs=2e-3
        )
        assert mine["invalid"] == float(int(logits.argmax()) not in candidates.tolist())


def test_ram_is_the_plain_model_s_attention_on_the_evidence(
    micro: mmlens.HookedVLM, result: CoreHeads
) -> None:
    plain = copy.deepcopy(micro.hf_model)
    plain.set_attn_implementation("eager")
    examples = [example for example in scenes(4, 1) if example.evidence]
    for index in (0, 5, 10, 15):
        prompt = micro.prompt_examples([examples[index]])
        with torch.no_grad():
            attentions = plain(**prompt.inputs, output_attentions=True).attentions
        question = prompt.token_map.is_question[0]
        evidence = prompt.token_map.evidence([examples[index]])[0]
        assert evidence.sum() > 1
        expected = torch.stack([a[0][:, question][:, :, evidence].sum(-1).mean(-1) for a in attentions])
        torch.testing.assert_close(result.scores.per_example[index], expected, atol=1e-6, rtol=0)


def test_tables_agree_with_the_raw_outcomes(result: CoreHeads) -> None:
    outcomes, ablation = result.outcomes, result.ablation
    assert set(ablation["arm"]) == set(ARMS) and set(ablation["count"]) == {0, 2, 3}
    assert set(ablation["kind"]) == {*KINDS, *TEXT_KINDS, POOLED}
    for row in ablation.sample(40, random_state=0).itertuples():
        chosen = outcomes[
            (outcomes["mode"] == row.mode) & (outcomes["arm"] == row.arm) & (outcomes["count"] == row.count)
            & (outcomes["metric"] == row.metric)
        ]  # fmt: skip
        chosen = chosen[chosen["kind"].isin(KINDS) if row.kind == POOLED else chosen["kind"] == row.kind]
        assert row.mean == pytest.approx(chosen["value"].mean())
        assert row.low <= row.mean + 1e-9 and row.mean <= row.high + 1e-9
        assert row.n == chosen["id"].nunique() and row.n_draws == chosen["draw"].nunique()
        by_draw = chosen.groupby("draw")["value"].mean()
        assert (row.draw_min, row.draw_max) == (by_draw.min(), by_draw.max())


def test_arms_are_what_they_say(result: CoreHeads) -> None:
    for count, draws in ((2, slice(0, 2)), (3, slice(2, 4))):
        top = result.scores.top(count)
        assert top in result.arms["top"] and result.scores.bottom(count) in result.arms["bottom"]
        for arm in ("random", "layer_matched"):
            drawn = result.arms[arm][draws]
            assert len(drawn) == 2 and all(len(heads) == count and not heads & top for heads in drawn)
            assert drawn[0] != drawn[1]
    assert result.summary["heads"]["top_5_percent"] == [list(pair) for pair in result.top]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(micro: mmlens.HookedVLM) -> None:
    settings = {**SETTINGS, "modes": (*SETTINGS["modes"], "resample")}
    once, again = (core_heads(micro, scenes(1, 1), scenes(2, 2), **settings) for _ in range(2))
    pd.testing.assert_frame_equal(again.outcomes, once.outcomes)
    pd.testing.assert_frame_equal(again.ablation, once.ablation)
    assert again.summary == once.summary


def test_leaks_and_impossible_settings_are_refused(micro: mmlens.HookedVLM) -> None:
    with pytest.raises(ValueError, match=r"share 24 example\(s\).*documents-1-0"):
        core_heads(micro, scenes(4, 1), scenes(4, 1), **SETTINGS)
    with pytest.raises(ValueError, match=r"selection split of 2 .* has none with evidence"):
        core_heads(micro, mmlens.scene_examples("text_recall", 2, 1), scenes(1, 2), **SETTINGS)
    unmarked = dataclasses.replace(mmlens.scene_examples("objects", 1, 9)[0], evidence=())
    with pytest.raises(
        ValueError, match=r"evaluation split some examples of kind 'objects' .* kind of their own"
    ):
        core_heads(micro, scenes(1, 1), [*scenes(1, 2), unmarked], **SETTINGS)
    with pytest.raises(ValueError, match="between 1 and 32 of the model's 64"):
        core_heads(micro, scenes(1, 1), scenes(1, 2), counts=[40], progress=False)
    with pytest.raises(ValueError, match="n_draws"):
        core_heads(micro, scenes(1, 1), scenes(1, 2), n_draws=0, progress=False)


def test_the_command_writes_what_the_function_finds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--n-selection", "3", "--n-evaluation", "3", "--draws", "2", "--counts", "3", "--modes", "zero"]
    assert main(["core-heads", "--model", "micro", "--out", str(tmp_path), *sizes]) == 0
    assert "CoRe heads" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["schema"] == "mmlens.core-heads/1" and summary["model"]["name"] == "micro"
    assert summary["settings"]["n_selection"] == 18
    heads = pd.read_parquet(tmp_path / "head_scores.parquet")
    assert len(heads) == 64 and heads["rank"].tolist() == list(range(64))
    assert heads[["layer", "head"]].head(3).to_numpy().tolist() == summary["heads"]["top_5_percent"]
    np.testing.assert_allclose(pd.read_csv(tmp_path / "head_scores.csv")["score"], heads["score"], rtol=1e-5)
    for name in ("ablation.parquet", "ablation.csv", "outcomes.parquet"):
        assert (tmp_path / name).stat().st_size
    loaded = mmlens.HeadScores.load(tmp_path / "ram_per_example.parquet")
    assert loaded.top(3).heads == tuple(map(tuple, summary["heads"]["top_5_percent"]))
    page = (tmp_path / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "Retrieval Attention Mass" in page
    # What was written is read back, by the runs of any experiment, and repeated by one.
    found = read_findings(tmp_path)
    assert found.numbers["heads"] == summary["heads"] and not (tmp_path / "tables").exists()
    pd.testing.assert_frame_equal(found.tables["head_scores"][1], heads)
    assert is_current(read_record(tmp_path), EXPERIMENT)
    said = across({"one": found, "other": found})
    verdicts = {row["mode"]: row for row in summary["finding"]["rows"]}
    table = said.tables["finding"][1]
    assert len(table) == 10 and set(table["model"]) == {"one", "other"}
    for row in table.itertuples():
        assert row.mean == verdicts[row.mode][row.arm]["mean"]
    assert f"in {2 * summary['finding']['holds']} of 2 models" in said.statement


def test_the_command_runs_on_a_folder_of_examples(tmp_path: Path) -> None:
    data = mmlens.data.save_examples(
        [e for kind in ("objects", "documents") for e in mmlens.scene_examples(kind, 6, 3)], tmp_path / "data"
    )
    options = ["--draws", "1", "--counts", "3", "--modes", "zero"]
    out = tmp_path / "out"
    assert main(["core-heads", "--model", "micro", "--data", str(data), "--out", str(out), *options]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["settings"]["n_selection"] == 6 == summary["settings"]["n_evaluation"]
    assert set(summary["clean"]) == {"objects", "documents", POOLED}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere", "--data", "."], "no folder of examples|no examples.jsonl"),
        (["--model", "micro", "--data", "nowhere"], "no folder of examples 'nowhere'"),
        (["--model", "Qwen/Qwen3-VL-4B-Instruct"], "needs --data"),
        (["--model", "mikro"], "no shipped model or folder 'mikro'; the nearest: 'micro'"),
    ],
)
def test_user_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["core-heads", "--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    import re

    assert re.search(message, error) and error.count("\n") == 1


def test_seeds_of_the_command_are_disjoint_from_each_other_and_from_training() -> None:
    selection, evaluation = scenes(3, SELECTION_SEED), scenes(3, EVALUATION_SEED)
    assert not {e.id for e in selection} & {e.id for e in evaluation}
    assert max(SELECTION_SEED, EVALUATION_SEED) < 2**20
