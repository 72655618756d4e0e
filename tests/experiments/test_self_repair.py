"""Self-repair against plain runs: group costs, direct contributions by the bare modules, RAM by eager patterns."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from plain_runs import small_setup, without_heads

import mmlens
from mmlens.experiments.experiment import Findings, Setup
from mmlens.experiments.self_repair import EXPERIMENT, direct_contributions, measured_changes, run


@pytest.fixture(scope="module")
def setup(micro: mmlens.HookedVLM) -> Setup:
    return small_setup(micro)


@pytest.fixture(scope="module")
def found(setup: Setup) -> Findings:
    return run(setup, shares=(0.05, 0.1), mode="zero", n_draws=2, n_per_kind=4)


def judged(setup: Setup) -> list[mmlens.Example]:
    return [e for e in setup.evaluation if e.evidence and not e.id.endswith("-4")]


def test_excess_is_the_plain_model_s_group_cost_minus_its_members_costs(
    setup: Setup, found: Findings
) -> None:
    top = [tuple(head) for head in found.numbers["top"]][:2]
    examples = judged(setup)
    clean = without_heads(setup.model, [], examples)

    def cost(heads: list[tuple[int, int]]) -> float:
        without = without_heads(setup.model, heads, examples)
        return float(np.mean([clean[e.id][1] - without[e.id][1] for e in examples]))

    row = found.numbers["excess"][0]
    assert (row["metric"], row["arm"], row["size"], row["n"]) == ("logit_difference", "top", 2, len(examples))
    members = cost(top[:1]) + cost(top[1:])
    assert row["group"] == pytest.approx(cost(top), abs=3e-3) and row["members"] == pytest.approx(
        members, abs=5e-3
    )
    assert row["excess"] == pytest.approx(row["group"] - row["members"], abs=1e-6)
    assert row["excess_low"] <= row["excess"] <= row["excess_high"]


def test_random_groups_avoid_the_top_and_count_each_example_once(found: Findings) -> None:
    rows = [r for r in found.numbers["excess"] if r["metric"] == "logit_difference" and r["arm"] == "random"]
    assert [row["size"] for row in rows] == [2, 3, 6] and all(
        row["n_draws"] == 2 and row["n"] == 8 for row in rows
    )
    table = found.per_example["outcomes"]
    table = table[(table["metric"] == "logit_difference") & table["heads"].str.startswith("random 3 #")]
    assert rows[1]["group"] == pytest.approx((table["clean"] - table["value"]).mean(), abs=1e-6)


@torch.no_grad()
def plain_direct(
    model: mmlens.HookedVLM, prompt: mmlens.model.prompt.Prompt, wrong: int
) -> tuple[torch.Tensor, float]:
    """[layer, head], and the logit difference, from the bare modules' inputs and outputs."""
    plain = model.hf_model
    text = plain.model.language_model
    seen: dict[int, torch.Tensor] = {}
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, at=at: seen.__setitem__(at, args[0][0, -1])
        )
        for at, layer in enumerate(text.layers)
    ]
    handles.append(text.norm.register_forward_pre_hook(lambda _, args: seen.__setitem__(-1, args[0][0, -1])))
    try:
        logits = plain(**prompt.inputs).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    answer = int(prompt.answer_ids[0])
    rms = (seen[-1].pow(2).mean() + text.norm.variance_epsilon).sqrt()
    direction = (plain.lm_head.weight[answer] - plain.lm_head.weight[wrong]) * text.norm.weight / rms
    found = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)
    width = model.cfg.d_head
    for at, layer in enumerate(text.layers):
        for head in range(model.cfg.n_heads):
            cut = slice(head * width, (head + 1) * width)
            found[at, head] = (layer.self_attn.o_proj.weight[:, cut] @ seen[at][cut]) @ direction
    return found, float(logits[answer] - logits[wrong])


def test_direct_contributions_are_those_of_the_bare_modules(micro: mmlens.HookedVLM) -> None:
    examples = mmlens.scene_examples("objects", 2, seed=7)
    prompt = micro.prompt_examples(examples)
    wrong = torch.tensor(
        [
            int(ids[ids != answer][0])
            for ids, answer in zip(prompt.candidate_ids, prompt.answer_ids, strict=True)
        ]
    )
    found, scale = direct_contributions(micro, prompt, wrong)
    for row, example in enumerate(examples):
        truth, _ = plain_direct(micro, micro.prompt_examples([example]), int(wrong[row]))
        torch.testing.assert_close(found[row], truth, atol=2e-4, rtol=1e-3)
    doubled, own = direct_contributions(micro, prompt, wrong, 2 * scale)
    torch.testing.assert_close(doubled, found / 2)
    torch.testing.assert_close(own, scale)


def test_changes_are_read_without_the_heads_at_the_clean_scale(setup: Setup) -> None:
    """Both runs redone one example at a time with the bare model, its heads zeroed in the weights."""
    model, examples = setup.model, judged(setup)[:2]
    top = [(0, 4), (0, 5)]
    changes = measured_changes(setup, examples, mmlens.ablate(top, "zero"))
    zeroed = copy.deepcopy(model.hf_model)
    for layer, head in top:
        width = model.cfg.d_head
        zeroed.model.language_model.layers[layer].self_attn.o_proj.weight.data[
            :, head * width : (head + 1) * width
        ] = 0
    zeroed.set_attn_implementation("eager")
    for row, example in enumerate(examples):
        prompt = model.prompt_examples([example])
        with torch.no_grad():
            logits = model.hf_model(**prompt.inputs).logits[0, -1]
            attentions = zeroed(**prompt.inputs, output_attentions=True).attentions
        question, evidence = prompt.token_map.is_question[0], prompt.token_map.evidence([example])[0]
        ram = torch.stack([a[0][:, question][:, :, evidence].sum(-1).mean(-1) for a in attentions])
        torch.testing.assert_close(changes["ram"][1][row], ram, atol=1e-5, rtol=0)
        assert not torch.allclose(changes["ram"][0][row][1:], ram[1:], atol=1e-3)
        ids, answer = prompt.candidate_ids[0], int(prompt.answer_ids[0])
        wrong = ids[ids != answer]
        best = int(wrong[logits[wrong].argmax()])
        clean, _ = plain_direct(model, prompt, best)
        torch.testing.assert_close(changes["direct"][0][row], clean, atol=2e-4, rtol=1e-3)
        # Zeroed heads write nothing; layer 0's others are what they were.
        after = changes["direct"][1][row]
        assert after[0, 4] == after[0, 5] == 0
        torch.testing.assert_close(
            after[0, [0, 1, 2, 3, 6, 7]], clean[0, [0, 1, 2, 3, 6, 7]], atol=2e-4, rtol=1e-3
        )


def test_backup_table_holds_the_later_heads_and_their_changes(found: Findings) -> None:
    backup, raw = found.tables["backup"][1], found.per_example["changes"]
    top = {f"L{layer}H{head}" for layer, head in found.numbers["top"]}
    first = min(layer for layer, _ in found.numbers["top"])
    assert set(backup["what"]) == {"ram", "direct"}
    for what, rows in backup.groupby("what"):
        assert not set(rows["head"]) & top and all(
            int(name[1 : name.index("H")]) > first for name in rows["head"]
        )
        own = raw[raw["what"] == what].groupby("head")[["clean", "without"]].mean()
        for row in rows.head(3).to_dict("records"):
            assert row["change"] == pytest.approx(
                own.loc[row["head"], "without"] - own.loc[row["head"], "clean"], abs=1e-5
            )
            assert row["low"] <= row["change"] <= row["high"]
    others = raw[(raw["what"] == "direct") & ~raw["head"].isin(top)]
    change = (others["without"] - others["clean"]).groupby(others["example"]).sum().mean()
    assert found.numbers["sums"]["others"]["change"] == pytest.approx(change, abs=1e-3)


def test_what_cannot_be_is_refused(setup: Setup) -> None:
    with pytest.raises(ValueError, match="too few others for random groups"):
        run(setup, shares=(0.8,))
    with pytest.raises(ValueError, match="carries no answers"):
        direct_contributions(setup.model, setup.model.prompt("What?"), torch.tensor([1]))


def test_across_counts_groups(found: Findings) -> None:
    across = EXPERIMENT.across({"one": found, "two": found})
    assert across.numbers["groups"] == 2 * 3
    assert across.numbers["above"] + across.numbers["below"] <= 6
    [(_, _, figure)] = across.figures
    ax = figure.axes[0]
    rows = [label.get_text() for label in ax.get_yticklabels()]
    assert len(rows) == len(set(rows)) == 6 and {row.split(", ")[0] for row in rows} == {"one", "two"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["top", "random"]
    # A mark is one group's: no two of a series stand in one row.
    for dots in ax.containers:
        heights = dots.lines[0].get_ydata()
        assert len(heights) == len(set(heights)) <= len(rows)
