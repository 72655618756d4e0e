"""Do other heads stand in for ablated ones? Groups against the sum of their members, and who does more afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlens.data.examples import Example
from mmlens.errors import InvalidValueError
from mmlens.experiments.ablations import (
    ablated,
    all_heads,
    costs,
    references,
    single_heads,
    with_evidence,
)
from mmlens.experiments.common import (
    FIVE_PERCENT,
    across_rows,
    head_names,
    matched_controls,
    plain,
    ranged,
    selection_ram,
)
from mmlens.experiments.experiment import (
    Experiment,
    Figures,
    Findings,
    Setup,
    checked_settings,
    judges_as_asked,
)
from mmlens.experiments.judging import FIRST_TOKEN
from mmlens.head_scores import HeadScores, share_of
from mmlens.heads import HeadSet, head_name
from mmlens.hook_names import block
from mmlens.interventions.ablation import ablate
from mmlens.model.batches import Batches
from mmlens.model.evaluation import check_same_twice
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import Intervention
from mmlens.model.prompt import Prompt
from mmlens.model.prompt_answers import answer_ids_of
from mmlens.model.weights import subtracts_mean
from mmlens.scores.retrieval import attention_mass
from mmlens.statistics import benjamini_hochberg, difference_interval_of, paired_permutation_test
from mmlens.viz.intervals import plot_intervals

Group = tuple[str, int, int]
"""Arm, number of heads, draw."""


@dataclass(frozen=True)
class _Measured:
    """Costs of groups and of their members, and what changes in later heads without the top 5%.

    `no_direct` says why direct contributions were not read ("" where they were).
    """

    graded: str
    mode: str
    n_heads: int
    n_examples: int
    top: HeadSet
    excess: pd.DataFrame
    backup: pd.DataFrame
    sums: dict[str, Any]
    no_direct: str


@checked_settings
@judges_as_asked
def run(
    setup: Setup,
    *,
    shares: Sequence[float] = (0.05, 0.1, 0.2),
    mode: str = "mean",
    n_draws: int = 3,
    n_per_kind: int | None = 20,
    q: float = 0.05,
) -> Findings:
    """Additivity of ablation in groups of heads, and how all other heads change when the top 5% are ablated.

    Groups: the top heads by RAM on the selection split (2 heads, and each of `shares` of all), and `n_draws` random and
    layer-matched groups of the same size. excess = cost of the group - sum of its members' costs alone, on the same
    examples: above 0 where members stand in for each other (or what reads them saturates). Backup: the change, from the
    clean run to the run without the top 5%, of every later head's RAM and of its direct contribution to the logit
    difference; heads are told from unchanged ones by paired permutation tests at a false discovery rate of `q`.
    """
    heads = all_heads(setup)
    scores = selection_ram(setup)
    examples = with_evidence(setup.evaluation, n_per_kind)
    graded, metrics = setup.judge.graded_and_accuracy(examples)
    groups = _groups(scores, len(heads), shares, n_draws, setup.seed)
    members = {name: own for group in groups.values() for name, own in single_heads(group).items()}
    sets = members | {_label(group): own for group, own in groups.items()}
    reference = references(setup, [mode])
    outcomes = ablated(setup, examples, sets, reference, metrics)
    top = scores.top(FIVE_PERCENT)
    without = ablate(top, mode, reference=reference[mode], seed=setup.seed)
    no_direct = no_direct_parts(setup.model)
    if setup.answers != FIRST_TOKEN:
        no_direct = "they are to logits of first tokens, and answers were judged by more"
    elif graded != "logit_difference":
        no_direct = "some examples have no wrong candidate"
    changes = measured_changes(setup, examples, without, direct=not no_direct)
    found = _Measured(
        graded,
        mode,
        len(heads),
        len(examples),
        top,
        _excess(outcomes, groups, list(metrics), mode, setup.seed),
        _backup(changes, heads, top, q, setup.seed),
        _sums(changes, top, setup.seed),
        no_direct,
    )
    return Findings(
        _statement(found),
        plain(_numbers(found)),
        tables={
            "excess": ("Cost of groups of heads against the sum of their members' costs.", found.excess),
            "backup": ("Every later head: change when the top 5% are ablated.", found.backup),
        },
        per_example={"outcomes": outcomes, "changes": _long(changes, heads, examples)},
        figures=_figures(found),
    )


# ---------------------------------------------------------------------- additivity


def _groups(
    scores: HeadScores, n_heads: int, shares: Sequence[float], n_draws: int, seed: int
) -> dict[Group, HeadSet]:
    sizes = sorted({max(2, share_of(share, n_heads)) for share in (*shares, FIVE_PERCENT)} | {2})
    if sizes[-1] > n_heads // 2:
        raise InvalidValueError(
            f"a group of {sizes[-1]} of {n_heads} heads leaves too few others for random groups: shares up to 0.5"
        )
    groups: dict[Group, HeadSet] = {}
    for size in sizes:
        top = scores.top(size)
        groups["top", size, 0] = top
        for draw, own in enumerate(matched_controls(top, n_draws, seed)[0]):
            groups["random", size, draw] = top.random(seed + draw)
            groups["layer_matched", size, draw] = own
    return groups


def _label(group: Group) -> str:
    return "{} {} #{}".format(*group)


def _excess(
    table: pd.DataFrame,
    groups: Mapping[Group, HeadSet],
    metrics: Sequence[str],
    mode: str,
    seed: int,
) -> pd.DataFrame:
    rows = []
    for metric in metrics:
        cost = costs(table, metric, mode)
        for arm, size in dict.fromkeys((arm, size) for arm, size, _ in groups):
            draws = [key for key in groups if key[:2] == (arm, size)]
            # Each example's mean over draws is one value.
            group = cost.loc[[_label(key) for key in draws]].to_numpy().mean(0)
            members = np.mean(
                [cost.loc[[head_name(head) for head in groups[key]]].to_numpy().sum(0) for key in draws],
                axis=0,
            )
            row = {"metric": metric, "arm": arm, "size": size, "n_draws": len(draws), "n": len(group)}
            for name, values, before in (
                ("group", group, np.zeros_like(group)),
                ("members", members, np.zeros_like(group)),
                ("excess", group, members),
            ):
                low, high = difference_interval_of(values, before, seed)
                row |= {name: (values - before).mean(), f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------- backup


def direct_contributions(
    model: HookedVLM,
    prompt: Prompt,
    wrong: Int[Tensor, " batch"],
    scale: Float[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, "batch layer head"], Float[Tensor, " batch"]]:
    """What each head itself adds to logit(answer) - logit(`wrong`) at the last position; and the final norm's scale.

    z W_O . (d_answer - d_wrong) / scale, with d the model's `residual_directions` (before a cap or factor on logits);
    NaN where there is no head. `scale`: divide by this one instead of the run's own, so that a change of the norm is
    not taken for a change of the heads. Hooks that are set act. Raises ValueError for models in which a norm stands
    after attention, or whose layers do more than add to the stream: a head has no such part there.
    """
    reason = no_direct_parts(model)
    if reason:
        raise InvalidValueError(reason)
    answers = answer_ids_of(prompt)
    names = [block(layer, "attn.hook_z") for layer in model.attention_layers]
    final = [] if model.ln_final is None else ["ln_final.hook_scale"]
    check_same_twice(model.hf_model)
    _, cache = model.run_with_cache(prompt, names_filter=[*names, *final], logits_to_keep=1)
    own = cache[final[0]][:, -1].flatten().float() if final else torch.ones(len(prompt), device=model.device)
    right, other = (model.residual_directions(ids.to(model.device)).float() for ids in (answers, wrong))
    direction = (right - other) / (own if scale is None else scale.to(own))[:, None]
    if model.ln_final is not None and subtracts_mean(model.ln_final):
        direction = direction - direction.mean(-1, keepdim=True)
    found = model.grid.full(len(prompt))
    for layer, name in zip(model.attention_layers, names, strict=True):
        attn = model.blocks[layer].attn
        part = torch.einsum("bhd,hdm,bm->bh", cache[name][:, -1].float(), attn.W_O.float(), direction)
        found[:, layer, : part.shape[1]] = (part * attn._result_contribution_scale).cpu()
    return found, own.cpu()


def no_direct_parts(model: HookedVLM) -> str:
    """Why the logits are no sum of what heads write ("" where they are, up to the final norm)."""
    if not model.family.adds:
        return f"layers of {model.family.model_type!r} do more than add to the residual stream"
    if any(parts.post_norm1 is not None for parts in model.anatomy.language):
        return f"in {model.family.model_type!r} a norm stands after attention, so a head's part is none by itself"
    return ""


Changes = Mapping[str, tuple[Float[Tensor, "example layer head"], Float[Tensor, "example layer head"]]]
"""What is measured -> its values in the clean run and without the top heads."""


@torch.no_grad()
def measured_changes(
    setup: Setup, examples: Sequence[Example], without: Intervention, *, direct: bool = True
) -> dict[str, tuple[Tensor, Tensor]]:
    """RAM of every head, and (`direct`) its direct contribution, in the clean run and under `without`.

    The wrong answer and the final norm's scale are those of the clean run in both.
    """
    model = setup.model
    found: dict[str, list[tuple[Tensor, Tensor]]] = {what: [] for what in ("ram", "direct")[: 1 + direct]}
    for index, made in Batches(model, examples, **setup.options, label="backup"):
        prompt = model.encode_images(made)
        hooks = list(without(model, prompt))
        evidence = prompt.token_map.evidence([examples[at] for at in index])
        places = prompt.token_map.is_question, evidence
        clean = attention_mass(model, prompt, *places)
        with model.hooks(fwd_hooks=hooks):
            found["ram"].append((clean, attention_mass(model, prompt, *places)))
        if direct:
            wrong = _best_wrong(model, prompt)
            before, scale = direct_contributions(model, prompt, wrong)
            with model.hooks(fwd_hooks=list(without(model, prompt))):
                after, _ = direct_contributions(model, prompt, wrong, scale)
            found["direct"].append((before, after))
    return {
        what: (torch.cat([a for a, _ in own]), torch.cat([b for _, b in own])) for what, own in found.items()
    }


def _best_wrong(model: HookedVLM, prompt: Prompt) -> Int[Tensor, " batch"]:
    assert prompt.answer_ids is not None and prompt.candidate_ids is not None
    logits = model(prompt, logits_to_keep=1)[:, -1].float().cpu()
    rows = zip(logits, prompt.answer_ids.tolist(), prompt.candidate_ids, strict=True)
    best = []
    for row, answer, ids in rows:
        wrong = ids[ids != answer].cpu()
        best.append(int(wrong[row[wrong].argmax()]))
    return torch.tensor(best)


def _backup(changes: Changes, heads: HeadSet, top: HeadSet, q: float, seed: int) -> pd.DataFrame:
    """One row per measure and later head: layer, head, clean, without, change with interval, p, changed."""
    first = min(layer for layer, _ in top)
    later = [head for head in heads if head[0] > first and head not in top]
    frames = []
    for what, (before, after) in changes.items():
        n_resamples = max(9999, int(np.ceil(2 * len(later) / q)))
        rows = []
        for layer, head in later:
            old, new = before[:, layer, head].double().numpy(), after[:, layer, head].double().numpy()
            low, high = difference_interval_of(new, old, seed)
            p = paired_permutation_test(new, old, n_resamples=n_resamples, seed=seed)
            rows.append(
                {"what": what, "head": head_name((layer, head)), "clean": old.mean(), "without": new.mean()}
                | {"change": (new - old).mean(), "low": low, "high": high, "p": p}
            )
        frame = pd.DataFrame(rows, columns=["what", "head", "clean", "without", "change", "low", "high", "p"])
        frame["changed"] = benjamini_hochberg(frame["p"].to_numpy(float)) <= q if len(frame) else False
        frames.append(frame.sort_values("change", ascending=False, kind="stable"))
    return pd.concat(frames, ignore_index=True)


def _sums(changes: Changes, top: HeadSet, seed: int) -> dict[str, Any]:
    """Change of the direct contributions of the ablated heads and of all others, summed over heads, with intervals."""
    found: dict[str, Any] = {"measured": list(changes)}
    if "direct" not in changes:
        return found
    before, after = (part.double().numpy() for part in changes["direct"])
    for name, chosen in (("ablated", top), ("others", top.complement())):
        at = tuple(np.array(list(chosen)).T)
        old, new = (part[:, at[0], at[1]].sum(1) for part in (before, after))
        low, high = difference_interval_of(new, old, seed)
        found[name] = {"clean": old.mean(), "change": (new - old).mean(), "low": low, "high": high}
    return found


def _long(changes: Changes, heads: HeadSet, examples: Sequence[Example]) -> pd.DataFrame:
    of_example = pd.DataFrame({"id": [e.id for e in examples], "kind": [e.kind for e in examples]})
    of_example.insert(0, "example", range(len(examples)))
    frames = [
        of_example.assign(
            what=what,
            head=head_name((layer, head)),
            clean=before[:, layer, head].numpy(),
            without=after[:, layer, head].numpy(),
        )
        for what, (before, after) in changes.items()
        for layer, head in heads
    ]
    columns = ["what", "head", "example", "id", "kind", "clean", "without"]
    return pd.concat(frames, ignore_index=True)[columns]


# ---------------------------------------------------------------------- how it is told


def _statement(found: _Measured) -> str:
    graded, top = found.graded, found.top
    said = []
    excess = found.excess[(found.excess["metric"] == graded) & (found.excess["arm"] == "top")]
    for row in excess.to_dict("records"):
        verdict = (
            "more than its members together, as where they stand in for each other"
            if row["excess_low"] > 0
            else "less than its members together"
            if row["excess_high"] < 0
            else "as much as its members together"
        )
        said.append(
            f"top {row['size']}: {row['group']:.2f} against {row['members']:.2f}, excess "
            f"{ranged(row['excess'], row['excess_low'], row['excess_high'])} ({verdict})"
        )
    parts = []
    for what, name in (("ram", "RAM"), ("direct", "direct contribution to the logit difference")):
        own = found.backup[found.backup["what"] == what]
        if len(own):
            rise, fall = (
                int((own["changed"] & moved).sum()) for moved in (own["change"] > 0, own["change"] < 0)
            )
            parts.append(f"{name} rises in {rise} and falls in {fall} of {len(own)} later heads")
    return (
        f"Cost in {graded.replace('_', ' ')} of ablating a group against the sum of its members alone - "
        f"{'; '.join(said)}. When the top {len(top)} ({head_names(top)}) are ablated, "
        f"{'; '.join(parts) or 'no later head is left to change'}." + _said_of_direct(found)
    )


def _said_of_direct(found: _Measured) -> str:
    if "others" not in found.sums:
        return f" Direct contributions were not read: {found.no_direct}." if found.no_direct else ""
    of_ablated, others = found.sums["ablated"], found.sums["others"]
    verdict = (
        "they make up for some of it"
        if others["low"] > 0
        else "they do not make up for it; they lose too"
        if others["high"] < 0
        else "no backup is told from none"
    )
    return (
        f" Direct contributions: the ablated heads' own change by {of_ablated['change']:.2f}, those of all other heads "
        f"together by {ranged(others['change'], others['low'], others['high'])} ({verdict})."
    )


def _numbers(found: _Measured) -> dict[str, Any]:
    changed = found.backup[found.backup["changed"]]
    return {
        "n_heads": found.n_heads,
        "n_evaluation": found.n_examples,
        "top": found.top,
        "excess": found.excess,
        "sums": found.sums,
        "n_changed": {what: int((changed["what"] == what).sum()) for what in found.sums["measured"]},
        "backup": changed,
    }


def _figures(found: _Measured) -> Figures:
    shown = found.excess[found.excess["metric"] == found.graded]
    drawn = pd.concat(
        shown.assign(what=what, mean=shown[column], low=shown[f"{column}_low"], high=shown[f"{column}_high"])
        for what, column in (("group", "group"), ("sum of its members", "members"))
    )
    drawn["row"] = drawn["arm"].str.replace("_", "-") + " " + drawn["size"].astype(str)
    order = {"top": 0, "layer_matched": 1, "random": 2}
    drawn = drawn.sort_values(
        ["arm", "size"], key=lambda c: c.map(order) if c.name == "arm" else c, kind="stable"
    )
    return [
        (
            "Groups of heads against the sum of their members",
            f"{found.mode.capitalize()} ablation on {found.n_examples} examples; means over draws of the controls, "
            "95% intervals.",
            plot_intervals(
                drawn,
                row="row",
                series="what",
                xlabel=f"Cost in {found.graded.replace('_', ' ')}",
                lines={"0": 0.0},
            ),
        )
    ]


def across(findings: Mapping[str, Findings]) -> Findings:
    """The excess of the top groups by model, in units of the metric."""

    def is_drawn(row: Mapping[str, Any], numbers: Mapping[str, Any]) -> bool:
        return row["metric"] == numbers["excess"][0]["metric"] and row["arm"] in ("top", "random")

    table = across_rows(findings, "excess", is_drawn)
    for name, column in (("mean", "excess"), ("low", "excess_low"), ("high", "excess_high")):
        table[name] = table[column]
    table["group"] = table["model"] + ", " + table["size"].astype(str)
    figure = plot_intervals(
        table, row="group", series="arm", xlabel="Excess cost of the group", lines={"0": 0.0}
    )
    tops = table[table["arm"] == "top"]
    above, below = int((tops["low"] > 0).sum()), int((tops["high"] < 0).sum())
    return Findings(
        f"Of {len(tops)} groups of top heads over {len(findings)} model(s), {above} cost more than the sum of their "
        f"members (redundancy), {below} less, {len(tops) - above - below} neither.",
        {"groups": len(tops), "above": above, "below": below},
        tables={"excess": ("Cost of groups minus the sum of their members' costs.", table)},
        figures=[
            (
                "Cost of groups beyond the sum of their members",
                "Above 0 a group costs more than its members one by one; model and number of heads; 95% intervals.",
                figure,
            )
        ],
    )


EXPERIMENT = Experiment(
    name="self-repair",
    title="Do other heads stand in for ablated ones?",
    source="beyond arXiv 2606.05843; self-repair: arXiv 2307.15771, 2402.15390",
    question="Does a group cost more than its members one by one, and which heads do more when others are gone?",
    method=(
        "Groups of the top heads by RAM on the selection split (2 heads and shares {shares} of all), and {n_draws} "
        "random and layer-matched groups of as many, were ablated ({mode} ablation) as a whole and head by head on the "
        "same evaluation examples ({n_per_kind} of each kind); the difference has a paired bootstrap interval. With "
        "the top 5% ablated, the change of each later head's RAM and direct contribution to the logit difference "
        "(final norm's scale and best wrong answer held at the clean run's) was tested by paired permutations at a "
        "false discovery rate of {q}."
    ),
    run=run,
    cites=("arxiv_2606_05843", "arxiv_2307_15771", "arxiv_2402_15390"),
    across=across,
)
