"""What hybrid attention costs in answers: which heads have to stay dense, how many, and with which window?"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from mmlens.data.examples import Example
from mmlens.effects.runner import MetricRuns, PromptRuns
from mmlens.errors import InvalidValueError
from mmlens.experiments.ablations import first_of_kinds, with_evidence
from mmlens.experiments.common import (
    PAPER,
    POOLED,
    across_rows,
    across_table,
    all_equal,
    arm_difference,
    kind_groups,
    matched_controls,
    of_models,
    plain,
    ranged,
    summarised,
)
from mmlens.experiments.experiment import (
    Experiment,
    Figures,
    Findings,
    Setup,
    checked_settings,
    judges_as_asked,
)
from mmlens.head_scores import HeadScores, share_of
from mmlens.heads import HeadSet, as_head_set
from mmlens.hybrid.dense_heads import hybrid_attention
from mmlens.hybrid.rule import StreamingRule
from mmlens.metrics.outcomes import Metric, kl_to_clean
from mmlens.model.batches import Batches
from mmlens.model.hooks import NoChangeWarning
from mmlens.model.prompt import Prompt
from mmlens.scores.logits import logit_contribution
from mmlens.scores.retrieval import evidence_attention
from mmlens.viz.intervals import plot_curves

CORE, RANDOM, MATCHED, ANY = "CoRe", "random", "layer-matched", "random of all heads"
SPREAD, LOWEST = "CoRe, spread over layers", "lowest RAM"
VISION, LOGIT = "vision mass", "logit contribution"
DENSE, NONE = "all heads dense", "no dense head"

PUBLISHED = pd.DataFrame(
    [
        {"model": model, "dense_share": share, "MLVU": mlvu, "VideoMME": video, "speedup": speedup}
        for model, rows in {
            "LLaVA-OneVision-7B": (
                (1, 64.7, 56.3, 1), (.026, 61.0, 54.0, 2.1), (.038, 63.0, 55.1, 2.1), (.064, 62.6, 55.2, 2.0),
                (.128, 63.2, 55.0, 1.9), (.191, 64.8, 56.5, 1.8),
            ),
            "Qwen3-VL-8B": (
                (1, 65.8, 65.0, 1), (.017, 62.8, 64.7, 2.3), (.026, 64.0, 65.0, 2.3), (.043, 64.8, 64.9, 2.2),
                (.087, 65.6, 64.9, 2.1), (.13, 65.7, 65.0, 2.0), (.217, 65.9, None, 1.8),
            ),
            "Qwen3-VL-32B": (
                (1, 69.4, 69.9, 1), (.012, 67.6, 69.4, 2.2), (.024, 68.1, 69.1, 2.2), (.037, 68.1, 69.2, 2.1),
                (.049, 68.7, 69.7, 2.1), (.061, 68.6, 69.6, 2.1), (.073, 68.6, 69.6, 2.0),
            ),
        }.items()
        for share, mlvu, video, speedup in rows
    ]
)  # fmt: skip
"""Averages over tasks, in percent, with CoRe heads dense, 512 sinks and a window of 4,096; no control was run."""


@checked_settings
@judges_as_asked
def run(
    setup: Setup,
    *,
    fractions: Sequence[float] = (0.025, 0.05, 0.1, 0.2, 0.4),
    windows: Sequence[int] = (8, 16, 32),
    sink: int = 4,
    n_per_kind: int | None = 10,
    n_draws: int = 3,
) -> Findings:
    """Accuracy and KL to dense with `fractions` of the heads dense and the others streaming, by window and arm.

    Arms: the heads of the highest RAM; the highest in each layer in turn, so that every layer has as many; random
    heads and layer-matched ones, none of them in the top, and random ones of all heads (`n_draws` each); the lowest
    RAM; the highest vision mass and the highest logit contribution, where the model's heads have one.
    Heads are chosen on the selection split, and judged on the first `n_per_kind` evaluation examples of each kind
    (None: all), text-only kinds too; an answer after its prompt is decoded by dense attention. `windows` and `sink`
    count tokens; a prompt that lies within them is dense.
    """
    if n_draws < 1:
        raise InvalidValueError(f"n_draws is at least 1, not {n_draws}")
    rules = [StreamingRule(sink, window) for window in windows]
    total = len(setup.model.heads)
    counts = sorted({share_of(fraction, total) for fraction in fractions})
    ram, others, notes = _scores(setup)
    sets, moved = _arms(ram, others, counts, n_draws, setup.seed)
    examples = first_of_kinds(setup.evaluation, n_per_kind)
    outcomes = _outcomes(setup, examples, sets, rules)
    controls = sorted({e.kind for e in examples if not e.evidence})
    table = _table(outcomes, controls, total, setup.seed)
    differences = _differences(outcomes, controls, setup.seed)
    judged = outcomes[~outcomes["kind"].isin(controls)]
    lengths = judged.drop_duplicates("example")["n_tokens"]
    shares = {rule.window: float(np.mean([rule.share(n) for n in lengths])) for rule in rules}
    table["computed"] = table["dense_share"] + (1 - table["dense_share"]) * table["window"].map(shares)
    statement, numbers = _judged(table, differences, counts, total, rules)
    return Findings(
        statement,
        plain(
            {
                **numbers,
                "counts": counts,
                "n_heads": total,
                "sink": sink,
                "windows": list(windows),
                "prompt_tokens": {"median": float(lengths.median()), "most": int(lengths.max())},
                "share_of_scores": shares,
                "layer_matched_shortfall": moved,
                "notes": notes,
                "table": table,
                "differences": differences,
            }
        ),
        tables={
            "quality": ("Accuracy, ill-formed answers and KL to dense, with 95% intervals.", table),
            "differences": ("CoRe heads dense minus another arm's, paired by example.", differences),
        },
        per_example={"outcomes": outcomes},
        figures=_figures(table, shares, sink),
    )


def _figures(table: pd.DataFrame, shares: Mapping[int, float], sink: int) -> Figures:
    """`shares`: window -> share of a dense head's scores that a streaming one computes."""
    by_work = _with_starts(table, (CORE, MATCHED))
    by_work["series"] = by_work["arm"] + ", window " + by_work["window"].astype(str)
    return [
        *(
            (
                f"Accuracy under hybrid attention, window {window}",
                f"Held-out examples with evidence; {sink} sinks; 95% intervals. Streaming heads compute "
                f"{share:.0%} of a dense head's scores here.",
                plot_curves(
                    _with_starts(table[table["window"] == window]),
                    x="dense_share",
                    series="arm",
                    xlabel="share of heads that are dense",
                    ylabel="accuracy",
                    percent=True,
                ),
            )
            for window, share in shares.items()
        ),
        (
            "Accuracy against the attention computed",
            "Scores computed by all heads, as a share of those with all heads dense: what a prefill can save. Held-out "
            "examples with evidence; 95% intervals.",
            plot_curves(
                by_work,
                x="computed",
                series="series",
                xlabel="attention scores computed, as a share of dense",
                ylabel="accuracy",
                percent=True,
            ),
        ),
    ]


def _scores(setup: Setup) -> tuple[HeadScores, dict[str, HeadScores], list[str]]:
    """RAM on the selection split, the other scores by name, and why one is missing."""
    examples = with_evidence(setup.selection)
    seen = evidence_attention(setup.model, examples, **setup.options)
    others, notes = {VISION: seen.vision_mass}, []
    try:
        others[LOGIT] = logit_contribution(setup.model, examples, **setup.options)
    except ValueError as error:
        notes.append(f"no arm of {LOGIT}: {error}")
    notes += [f"no arm of {name}: it is the same for all heads" for name in others if all_equal(others[name])]
    return seen.ram, {name: own for name, own in others.items() if not all_equal(own)}, notes


def _arms(
    ram: HeadScores, others: Mapping[str, HeadScores], counts: Sequence[int], n_draws: int, seed: int
) -> tuple[dict[tuple[str, int, int], HeadSet], dict[int, str]]:
    """(arm, count, draw) -> dense heads, and for each count what the layer-matched draw could not keep in its layer."""
    sets: dict[tuple[str, int, int], HeadSet] = {(NONE, 0, 0): ram.top(1) - ram.top(1)}
    moved: dict[int, str] = {}
    for count in counts:
        top = ram.top(count)
        sets[CORE, count, 0] = top
        sets[SPREAD, count, 0] = ram.top_spread(count)
        sets[LOWEST, count, 0] = ram.bottom(count)
        for name, scores in others.items():
            sets[name, count, 0] = scores.top(count)
        matched, shortfall = matched_controls(top, n_draws, seed)
        for draw, heads in enumerate(matched):
            sets[MATCHED, count, draw] = heads
            sets[RANDOM, count, draw] = top.random(seed + draw)
            sets[ANY, count, draw] = _drawn(ram, count, seed + draw)
        if shortfall:
            moved[count] = shortfall
    return sets, moved


def _drawn(scores: HeadScores, count: int, seed: int) -> HeadSet:
    """`count` heads of all, whatever their scores."""
    every = list(scores.top(1.0))
    drawn = np.random.default_rng(seed).choice(len(every), size=count, replace=False)
    return as_head_set([every[at] for at in drawn], scores.grid)


@torch.no_grad()
def _outcomes(
    setup: Setup,
    examples: Sequence[Example],
    sets: Mapping[tuple[str, int, int], HeadSet],
    rules: Sequence[StreamingRule],
) -> pd.DataFrame:
    """One row per window, arm, count, draw, example and metric: with its value, and that of the dense run."""
    rows: list[pd.DataFrame] = []
    shares = setup.judge.shares(examples)
    for index, prompt in Batches(setup.model, list(examples), **setup.options):
        frame = pd.DataFrame(
            {
                "example": index,
                "id": [examples[at].id for at in index],
                "kind": [examples[at].kind for at in index],
                "n_tokens": (~prompt.token_map.is_padding).sum(-1).tolist(),
            }
        )
        metrics = {**shares, "kl_to_dense": _kl_to(setup.model(prompt, logits_to_keep=1))}
        before = _measured(setup, prompt, metrics)
        done: dict[tuple[int, HeadSet], dict[str, Any]] = {}
        for rule in rules:
            for (arm, count, draw), heads in sets.items():
                run = (rule.window, heads)
                if run not in done:
                    with (
                        warnings.catch_warnings(),
                        hybrid_attention(setup.model, heads, sink=rule.sink, window=rule.window),
                    ):
                        # Some batches have short prompts only.
                        warnings.simplefilter("ignore", NoChangeWarning)
                        done[run] = _measured(setup, prompt, metrics)
                rows += [
                    frame.assign(
                        window=rule.window,
                        arm=arm,
                        count=count,
                        draw=draw,
                        metric=metric,
                        value=values,
                        clean=before[metric],
                    )
                    for metric, values in done[run].items()
                ]
    return pd.concat(rows, ignore_index=True)


def _kl_to(dense: torch.Tensor) -> Metric:
    """KL of the next token after the prompt to what these logits say."""
    return lambda logits, prompt: kl_to_clean(logits, prompt, dense)


def _measured(setup: Setup, prompt: Prompt, metrics: Mapping[str, Metric]) -> dict[str, Any]:
    values = PromptRuns(MetricRuns(setup.model, metrics, logits_to_keep=1), prompt).clean_values
    return {name: own.tolist() for name, own in values.items()}


def _table(outcomes: pd.DataFrame, controls: Sequence[str], total: int, seed: int) -> pd.DataFrame:
    """Means over examples of each one's mean over draws, by window, arm, count, metric and kind."""
    groups = kind_groups(outcomes["kind"], controls)
    table = summarised(outcomes, ["window", "arm", "count", "metric"], groups, paired=None, seed=seed)
    table["dense_share"] = table["count"] / total
    columns = "window arm count dense_share kind metric n n_draws mean low high clean"
    return table[columns.split()]


def _differences(outcomes: pd.DataFrame, controls: Sequence[str], seed: int) -> pd.DataFrame:
    """CoRe minus every other arm, and minus all heads dense, on the same examples with evidence."""
    chosen = outcomes[~outcomes["kind"].isin(list(controls)) & (outcomes["metric"] != "invalid")]
    core = chosen[chosen["arm"] == CORE]
    every = pd.concat([chosen[chosen["count"] > 0], core.assign(arm=DENSE, value=core["clean"])])
    rows = []
    for (window, count, metric), cell in every.groupby(["window", "count", "metric"]):
        for arm in [*sorted(set(cell["arm"]) - {CORE, DENSE}), DENSE]:
            mean, low, high = arm_difference(cell, CORE, arm, metric=metric, seed=seed)
            rows.append(
                {"window": window, "count": count, "metric": metric, "minus": arm}
                | {"mean": mean, "low": low, "high": high}
            )
    return pd.DataFrame(rows)


def _judged(
    table: pd.DataFrame,
    differences: pd.DataFrame,
    counts: Sequence[int],
    total: int,
    rules: Sequence[StreamingRule],
) -> tuple[str, dict[str, Any]]:
    pooled = table[(table["kind"] == POOLED) & (table["metric"] == "accuracy")]
    at = pooled.set_index(["window", "arm", "count"])
    against = differences[differences["metric"] == "accuracy"].set_index(["window", "count", "minus"])
    clean = float(pooled["clean"].iloc[0])
    said, verdicts = [], []
    for rule in rules:
        window = rule.window
        none = at.loc[(window, NONE, 0)]
        better = [
            count
            for count in counts
            if all(against.loc[(window, count, arm), "low"] > 0 for arm in (RANDOM, MATCHED))
        ]
        worse = {
            arm: [count for count in counts if against.loc[(window, count, arm), "high"] < 0]
            for arm in (RANDOM, MATCHED)
        }
        kept = [
            count
            for count in counts
            if all(against.loc[(window, more, DENSE), "high"] >= 0 for more in counts if more >= count)
        ]
        verdicts.append(
            {
                "window": window,
                "none": float(none["mean"]),
                "window_matters": bool(none["high"] < clean),
                "core_above_random_at": better,
                "core_below_random_at": sorted({count for fewer in worse.values() for count in fewer}),
                "core_as_dense_from": kept[0] if kept else None,
            }
        )
        by_share = ", ".join(
            f"{at.loc[(window, CORE, count), 'mean']:.0%} ({count / total:.1%})" for count in counts
        )
        most = {
            arm: max(at.loc[(window, arm, count), "mean"] for count in counts) for arm in (RANDOM, MATCHED)
        }
        said.append(
            f"Window {window}: {ranged(none['mean'], none['low'], none['high'])} without a dense head; with CoRe heads "
            f"dense (share of all) {by_share}; random ones at most {most[RANDOM]:.0%}, layer-matched ones at most "
            f"{most[MATCHED]:.0%}. "
            + (
                f"CoRe heads are better than both with {_shares(better, total)}"
                if better
                else "CoRe heads are better than both at no share"
            )
            + "".join(
                f", worse than {arm} ones with {_shares(fewer, total)}"
                for arm, fewer in worse.items()
                if fewer
            )
            + (f", and not told from dense from {_shares(kept[:1], total)} on" if kept else "")
        )
    agrees = any(verdict["window_matters"] and verdict["core_above_random_at"] for verdict in verdicts)
    return f"All heads dense: {clean:.0%}. " + ". ".join(said) + ".", {
        "agrees": agrees,
        "clean": clean,
        "verdicts": verdicts,
    }


def _shares(counts: Sequence[int], total: int) -> str:
    return ", ".join(f"{count / total:.1%}" for count in counts)


def _with_starts(table: pd.DataFrame, arms: Sequence[str] | None = None) -> pd.DataFrame:
    """Pooled accuracies of each arm (None: all) and window, each beginning with no dense head."""
    pooled = table[(table["kind"] == POOLED) & (table["metric"] == "accuracy")]
    none, others = pooled[pooled["arm"] == NONE], pooled[pooled["arm"] != NONE]
    names = list(dict.fromkeys(others["arm"])) if arms is None else arms
    return pd.concat([part for arm in names for part in (none.assign(arm=arm), others[others["arm"] == arm])])


def across(findings: Mapping[str, Findings]) -> Findings:
    """Where CoRe heads keep more of the answers than random ones, and what every arm keeps, by model."""
    table = across_table(findings, ("agrees", "clean", "n_heads", "counts"))
    verdicts = across_rows(findings, "verdicts")
    accuracies = pd.concat([_wide(found).assign(model=model) for model, found in findings.items()])
    kept = accuracies[["model", *(name for name in accuracies if name != "model")]]
    return Findings(
        f"Where the window matters, dense CoRe heads keep more answers than as many random or layer-matched ones, at "
        f"some share and window, in {of_models(table['agrees'])}.",
        plain({"models": table, "verdicts": verdicts, "accuracies": kept}),
        tables={
            "verdicts": ("By model and window.", verdicts),
            "accuracies": ("Accuracy with evidence by arm.", kept),
        },
    )


def _wide(found: Findings) -> pd.DataFrame:
    """Pooled accuracy: a row for each window and number of dense heads, a column for each arm."""
    pooled = _with_starts(found.tables["quality"][1])
    return (
        pooled.pivot_table("mean", ["window", "dense_share"], "arm", sort=False)
        .rename_axis(columns=None)
        .reset_index()
        .sort_values(["window", "dense_share"])
    )


EXPERIMENT = Experiment(
    name="hybrid",
    title="Hybrid attention: which heads must stay dense",
    source=f"{PAPER}, section 5 and Appendix G.4; the controls are not in the paper",
    question=(
        "If a few heads attend to everything and the others to sinks and a window, are the answers kept, and does it "
        "matter which heads these are?"
    ),
    method=(
        "Prompts were run with a share of the heads dense ({fractions}) and the others attending to the first {sink} "
        "tokens and the last {windows} only. Dense heads were those of the highest RAM, the same number in every "
        "layer, random, layer-matched random (both without the top), random of all, lowest RAM, highest vision mass or "
        "highest logit contribution, chosen on the selection split."
    ),
    run=run,
    cites=("arxiv_2606_05843", "arxiv_2309_17453"),
    published=PUBLISHED,
    across=across,
)
