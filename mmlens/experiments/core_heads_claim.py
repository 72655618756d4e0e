"""The paper's claim as one experiment: find CoRe heads on one split, test them causally on another.

1. Score every head by RAM on the selection split, per kind of task and pooled (equal weight to every example).
2. Ablate, on the evaluation split, the top heads of the pooled ranking, the bottom ones, as many drawn at
   random from the rest, and as many drawn from the rest of the same layers, at several counts and in
   several modes; every arm on the same examples.
3. Report accuracy, logit difference against the best wrong answer and the share of ill-formed answers, per
   kind, pooled, and on text-only controls, with intervals.

Source: arXiv 2606.05843, section 4 (its Fig. 6a), with the controls it lacks: layer-matched random heads, heads
chosen and judged on different examples, intervals, several ablation modes, a control that needs no image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from mmlens.arguments import BATCH_SIZE, names_of, whole_number, whole_numbers
from mmlens.data.examples import Example, examples_of
from mmlens.errors import InvalidValueError
from mmlens.experiments.ablations import ablated, references
from mmlens.experiments.common import (
    FIVE_PERCENT,
    POOLED,
    kind_groups,
    kinds_of,
    matched_controls,
    plain,
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
from mmlens.experiments.judging import FIRST_TOKEN, JUDGES
from mmlens.experiments.looking import overlay_figures
from mmlens.head_scores import HeadScores, share_of
from mmlens.heads import HeadSet, head_name
from mmlens.interventions.ablation import MODES as ABLATION_MODES
from mmlens.metrics.outcomes import metric_name
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.provenance import describe_model, versions
from mmlens.scores.retrieval import EvidenceAttention, evidence_attention
from mmlens.token_map import BoxMapping, mapping_of
from mmlens.viz.ablation_curves import plot_ablation_panels
from mmlens.viz.head_map import plot_head_map

SCHEMA = "mmlens.core-heads/1"
ARMS = ("clean", "top", "bottom", "random", "layer_matched")
MODES = ("mean", "zero", "uniform")

# The finding is said to hold where the top heads cost at least this share of the accuracy above chance,
COST_OF_TOP = 0.5
# and each control at most this share of what the top heads cost.
COST_OF_CONTROL = 0.25


@dataclass(frozen=True, eq=False)
class CoreHeads:
    """What `core_heads` found.

    `outcomes` has one row per (mode, arm, count, draw, example, metric): the raw results. `ablation` is their
    summary, one row per (mode, arm, count, kind, metric); docs/core-heads.md describes the columns.
    """

    attention: EvidenceAttention
    outcomes: pd.DataFrame
    ablation: pd.DataFrame
    arms: dict[str, list[HeadSet]]
    summary: dict[str, Any]
    overlay_examples: list[Example] = field(default_factory=list)
    answers: str = FIRST_TOKEN

    @property
    def scores(self) -> HeadScores:
        """RAM on the selection split."""
        return self.attention.ram

    @property
    def top(self) -> HeadSet:
        """The top 5% of the pooled ranking."""
        return self.scores.top(FIVE_PERCENT)

    def head_table(self) -> pd.DataFrame:
        """One row per head, best first: pooled RAM with its rank and interval, RAM per kind, side metrics."""
        table = self.scores.table()
        at = (table["layer"].to_numpy(), table["head"].to_numpy())
        for kind in kinds_of(self.scores):
            table[f"score_{kind}"] = self.scores.select(kind).values.numpy()[at]
        table["vision_mass"] = self.attention.vision_mass.values.numpy()[at]
        table["key_token_ratio"] = self.attention.key_token_ratio.values.numpy()[at]
        if len(kinds_of(self.scores)) > 1:
            table["stability"] = self.scores.stability(FIVE_PERCENT).numpy()[at]
        return table


def core_heads(
    model: HookedVLM,
    selection: Iterable[Example],
    evaluation: Iterable[Example],
    *,
    counts: Sequence[int] | None = None,
    modes: Sequence[str] = MODES,
    n_draws: int = 10,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    mapping: BoxMapping = "merged",
    force_overlap: bool = False,
    progress: bool = True,
    answers: str = FIRST_TOKEN,
) -> CoreHeads:
    """Run the experiment of this module's heading.

    Examples without evidence are text-only controls: in `selection` they only enter the reference of the mean
    ablation, in `evaluation` they are reported apart. `counts` are numbers of ablated heads; the default is
    1, 5%, 10% and 20% of all heads, and 5% is always among them. Splits that share examples or groups are refused
    unless `force_overlap`, which warns, and says so in the finding's statement: docs/truth.md shows how much better
    heads look on the examples that chose them. `answers` is how answers are judged: by their "first token", "whole" or
    "generated" (docs/experiments.md).

    Raises ValueError where the two splits share an example or group, either holds an example twice or has none with
    evidence, where no mode, an unknown one or one twice is named, or a count leaves too few heads for the controls.
    """
    selection, evaluation = examples_of(selection, "selection"), examples_of(evaluation, "evaluation")
    setup = Setup(
        model, selection, evaluation, seed, batch_size, progress, force_overlap=force_overlap, answers=answers
    )
    return measured(setup, counts=counts, modes=modes, n_draws=n_draws, mapping=mapping)


def measured(
    setup: Setup,
    *,
    counts: Sequence[int] | None = None,
    modes: Sequence[str] = MODES,
    n_draws: int = 10,
    mapping: BoxMapping = "merged",
) -> CoreHeads:
    """`core_heads` of a setup."""
    n_draws = whole_number("n_draws", n_draws, least=1)
    mapping_of(mapping)
    modes = tuple(names_of("modes", modes, ABLATION_MODES))
    _check_evidence(setup)
    total = len(setup.model.heads)
    counts = _counts(None if counts is None else whole_numbers("counts", counts, at_least=0), total)
    selected = [example for example in setup.selection if example.evidence]
    attention = evidence_attention(setup.model, selected, mapping=mapping, **setup.options)
    sets, moved = _arms(attention.ram, counts, n_draws, setup.seed)
    examples = sorted(setup.evaluation, key=lambda e: (e.kind, len(e.images)))
    outcomes = _outcomes(setup, examples, sets, modes)
    ablation = _ablation(outcomes, total, setup)
    arms: dict[str, list[HeadSet]] = {arm: [] for arm in ARMS[1:]}
    for (arm, _, _), heads in sets.items():
        arms[arm].append(heads)
    summary = _summary(setup, attention, ablation, examples, arms, moved)
    summary["settings"] = {
        "counts": list(counts),
        "modes": list(modes),
        "n_draws": n_draws,
        "seed": setup.seed,
        "batch_size": setup.batch_size,
        "mapping": mapping,
        "n_selection": len(setup.selection),
        "n_selection_with_evidence": len(selected),
        "n_evaluation": len(examples),
        "level": 0.95,
        **({} if setup.answers == FIRST_TOKEN else {"answers": setup.answers}),
    }
    shown = {example.kind: example for example in reversed(examples) if example.evidence}
    return CoreHeads(
        attention,
        outcomes.drop(columns="clean"),
        ablation,
        arms,
        summary,
        [shown[kind] for kind in sorted(shown)],
        setup.answers,
    )


# ---------------------------------------------------------------------- computing


def _check_evidence(setup: Setup) -> None:
    for name, split in (("selection", setup.selection), ("evaluation", setup.evaluation)):
        if not any(example.evidence for example in split):
            raise InvalidValueError(f"the {name} split of {len(split)} example(s) has none with evidence")
        mixed = {e.kind for e in split if e.evidence} & {e.kind for e in split if not e.evidence}
        if mixed:
            raise InvalidValueError(
                f"in the {name} split some examples of kind {sorted(mixed)[0]!r} have evidence and some have none; "
                "text-only controls need a kind of their own"
            )


def _counts(counts: Sequence[int] | None, total: int) -> tuple[int, ...]:
    five = share_of(FIVE_PERCENT, total)
    chosen = {five, *(counts if counts is not None else (1, round(0.1 * total), round(0.2 * total)))}
    for count in chosen:
        if not 1 <= count <= total // 2:
            raise InvalidValueError(
                f"a count of {count} heads: the controls need as many others, so it lies between 1 and "
                f"{total // 2} of the model's {total} heads"
            )
    return tuple(sorted(chosen))


def _arms(
    scores: HeadScores, counts: Sequence[int], n_draws: int, seed: int
) -> tuple[dict[tuple[str, int, int], HeadSet], dict[int, str]]:
    """(arm, count, draw) -> heads, and for each count what the layer-matched draw could not keep in its layer."""
    sets: dict[tuple[str, int, int], HeadSet] = {}
    moved: dict[int, str] = {}
    for count in counts:
        top = scores.top(count)
        sets |= {("top", count, 0): top, ("bottom", count, 0): scores.bottom(count)}
        matched, shortfall = matched_controls(top, n_draws, seed)
        for draw, heads in enumerate(matched):
            sets |= {("random", count, draw): top.random(seed + draw), ("layer_matched", count, draw): heads}
        if shortfall:
            moved[count] = shortfall
    return sets, moved


def _outcomes(
    setup: Setup,
    examples: Sequence[Example],
    sets: Mapping[tuple[str, int, int], HeadSet],
    modes: Sequence[str],
) -> pd.DataFrame:
    """A row per mode, set, metric and example, those of the run without an ablation first."""
    judge = setup.judge
    metrics = judge.shares(examples)
    if all(len(set(example.candidates)) > 1 for example in examples):
        metrics[metric_name(judge.difference)] = judge.difference
    found = ablated(setup, examples, sets, references(setup, modes), metrics, names=("arm", "count", "draw"))
    # In single precision, as models compute: the means over draws, and so the intervals, are of such numbers.
    found = found.astype({"value": "float32", "clean": "float32"})
    clean = found.drop_duplicates(["metric", "example"]).assign(mode="clean", arm="clean", count=0, draw=0)
    clean["value"] = clean["clean"]
    columns = ["id", "kind", "example", "metric", "value", "mode", "arm", "count", "draw", "clean"]
    return pd.concat([clean, found], ignore_index=True)[columns]


def _ablation(outcomes: pd.DataFrame, n_heads: int, setup: Setup) -> pd.DataFrame:
    controls = _controls(setup.evaluation)
    groups = kind_groups(outcomes["kind"], controls)
    groups[POOLED] = groups.pop(POOLED)
    by = ["mode", "arm", "count", "metric"]
    table = summarised(outcomes, by, groups, seed=setup.seed, progress=setup.progress)
    table["fraction"] = table["count"] / n_heads
    table["is_control"] = table["kind"].isin(controls)
    columns = (
        "mode arm count fraction kind is_control metric mean low high difference difference_low difference_high "
        "n n_draws draw_min draw_max"
    )
    return table[columns.split()]


def _controls(examples: Sequence[Example]) -> list[str]:
    """The kinds that are text-only."""
    return sorted({example.kind for example in examples if not example.evidence})


# ---------------------------------------------------------------------- numbers and words


def _pairs(heads: HeadSet) -> list[list[int]]:
    return [[layer, head] for layer, head in heads]


def _cell(ablation: pd.DataFrame, **where: Any) -> dict[str, float]:
    chosen = ablation
    for column, value in where.items():
        chosen = chosen[chosen[column] == value]
    row = chosen.iloc[0]
    return {name: float(row[name]) for name in ("mean", "low", "high", "draw_min", "draw_max")} | {
        "n": int(row["n"])
    }


def _summary(
    setup: Setup,
    attention: EvidenceAttention,
    ablation: pd.DataFrame,
    examples: Sequence[Example],
    arms: Mapping[str, Sequence[HeadSet]],
    moved: Mapping[int, str],
) -> dict[str, Any]:
    scores = attention.ram
    kinds = kinds_of(scores)
    clean = ablation[ablation["arm"] == "clean"]
    top = scores.top(FIVE_PERCENT)
    coverage = attention.key_token_coverage(top)
    ratio = attention.key_token_ratio.values
    return {
        "schema": SCHEMA,
        "model": describe_model(setup.model, setup.name),
        "versions": versions(("mmlens", "torch", "transformers", "transformer-lens")),
        "finding": _finding(ablation, examples, len(top), [setup.judge.told, setup.leak]),
        "clean": {
            kind: {metric: _cell(clean, kind=kind, metric=metric) for metric in sorted(set(clean["metric"]))}
            for kind in sorted(set(clean["kind"]))
        },
        "controls": _controls(examples),
        "heads": {
            "top_5_percent": _pairs(top),
            "top_5_percent_by_kind": {kind: _pairs(scores.select(kind).top(FIVE_PERCENT)) for kind in kinds},
            "arms": {
                arm: [{"count": len(heads), "heads": _pairs(heads)} for heads in sets]
                for arm, sets in arms.items()
            },
            "layer_matched_shortfall": {str(count): message for count, message in moved.items()},
        },
        "key_tokens": {
            "ratio_of_top_5_percent": float(np.mean([ratio[head] for head in top])),
            "ratio_of_bottom_5_percent": float(
                np.mean([ratio[head] for head in scores.bottom(FIVE_PERCENT)])
            ),
            "coverage_of_top_5_percent": float(coverage.mean()),
        },
        "spearman": {
            f"{one} - {other}": scores.select(one).spearman(scores.select(other))
            for i, one in enumerate(kinds)
            for other in kinds[i + 1 :]
        },
    }


def _finding(
    ablation: pd.DataFrame, examples: Sequence[Example], count: int, notes: Sequence[str]
) -> dict[str, Any]:
    """Whether the top 5% carry retrieval: by the two thresholds at the head of this module, mode by mode."""
    with_evidence = [example for example in examples if example.evidence]
    chance = float(np.mean([1 / len(e.candidates) if e.candidates else 0.0 for e in with_evidence]))
    pooled = ablation[(ablation["kind"] == POOLED) & (ablation["metric"] == "accuracy")]
    clean = _cell(pooled, arm="clean")
    rows = []
    for mode in dict.fromkeys(pooled["mode"]):
        if mode == "clean":
            continue
        cells = {arm: _cell(pooled, mode=mode, arm=arm, count=count) for arm in ARMS[1:]}
        cost = {arm: clean["mean"] - cell["mean"] for arm, cell in cells.items()}
        top_breaks = cost["top"] >= COST_OF_TOP * (clean["mean"] - chance)
        harmful = [arm for arm in ARMS[2:] if cost[arm] > COST_OF_CONTROL * max(cost["top"], 0.0)]
        rows.append(
            {
                "mode": mode,
                "holds": bool(top_breaks and not harmful),
                "top_breaks": bool(top_breaks),
                "harmful_controls": harmful,
                "clean": clean,
                **cells,
            }
        )
    held = [row["mode"] for row in rows if row["holds"]]
    failed = [f"{row['mode']} ({_why_not(row)})" for row in rows if not row["holds"]]
    numbers = "; ".join(
        f"{row['mode']}: top {row['top']['mean']:.0%}, layer-matched random {row['layer_matched']['mean']:.0%}, "
        f"random {row['random']['mean']:.0%}, bottom {row['bottom']['mean']:.0%}"
        for row in rows
    )
    verdict = (
        "The finding holds in every mode"
        if not failed
        else f"The finding holds in {', '.join(held)} but not in {', '.join(failed)}"
        if held
        else f"The finding does not hold in any mode: {', '.join(failed)}"
    )
    statement = (
        f"{verdict}. Accuracy on {clean['n']} held-out examples is {clean['mean']:.0%} with all heads "
        f"(chance {chance:.0%}), and with {count} heads ({FIVE_PERCENT:.0%} of all) ablated - {numbers}."
    )
    statement += "".join(f" {note}." for note in notes if note)
    return {
        "holds": not failed,
        "statement": statement,
        "count": count,
        "chance": chance,
        "rule": (
            f"holds in a mode where the top heads cost at least {COST_OF_TOP:.0%} of the accuracy above chance "
            f"and each control at most {COST_OF_CONTROL:.0%} of what the top heads cost"
        ),
        "rows": rows,
    }


def _why_not(row: Mapping[str, Any]) -> str:
    controls = " and ".join(arm.replace("_", "-") for arm in row["harmful_controls"])
    reasons = [] if row["top_breaks"] else ["the top heads cost too little"]
    return "; ".join([*reasons, *([f"{controls} heads cost too much"] if controls else [])])


# ---------------------------------------------------------------------- the experiment of the catalog


@checked_settings
@judges_as_asked
def run(
    setup: Setup,
    *,
    counts: Sequence[int] | None = None,
    modes: Sequence[str] = MODES,
    n_draws: int = 10,
    mapping: BoxMapping = "merged",
) -> Findings:
    """`core_heads`, whose keywords the settings are; its files are those of docs/core-heads.md."""
    found = measured(setup, counts=counts, modes=modes, n_draws=n_draws, mapping=mapping)
    top = ", ".join(map(head_name, found.top))
    return Findings(
        f"{found.summary['finding']['statement']}\nCoRe heads (top 5% by RAM): {top}",
        found.summary,
        tables={
            "finding": (
                "Accuracy on held-out examples with evidence, 95% intervals.",
                _verdicts(found.summary),
            ),
            "head_scores": ("Every head, best first, on the selection split.", found.head_table()),
            "ablation": ("Every mode, arm, count, kind and metric, on the evaluation split.", found.ablation),
        },
        per_example={
            "outcomes": found.outcomes,
            "ram_per_example": found.scores.per_example_table(),
        },
        figures=[*_head_maps(found), *_curves(found), *_overlays(found, setup.model)],
        flat=True,
    )


def _verdicts(summary: Mapping[str, Any]) -> pd.DataFrame:
    """A row per mode and arm: accuracy with these heads ablated, 5% of all, and whether the finding holds."""
    return pd.DataFrame(
        [
            {"mode": row["mode"], "holds": row["holds"], "arm": arm} | row[arm]
            for row in summary["finding"]["rows"]
            for arm in ARMS
        ]
    )


def _head_maps(found: CoreHeads) -> Figures:
    scores = found.scores
    kinds = kinds_of(scores)
    figures: Figures = [
        (
            "Retrieval Attention Mass",
            "Mean attention from the question's tokens to the evidence, selection split; the top 5% are outlined.",
            plot_head_map(scores, heads=found.top, title="all kinds"),
        )
    ]
    if len(kinds) > 1:
        figures += [
            (
                f"RAM, {kind}",
                f"The same on the examples of kind {kind} alone, with that kind's own top 5% outlined.",
                plot_head_map(scores.select(kind), heads=scores.select(kind).top(FIVE_PERCENT), title=kind),
            )
            for kind in kinds
        ]
    figures.append(
        (
            "Attention to all visual tokens",
            "Mean attention from the question to every visual token; outlined are the top 5% by RAM, for contrast.",
            plot_head_map(found.attention.vision_mass, heads=found.top, title="vision mass"),
        )
    )
    return figures


METRIC_CAPTIONS = {
    "accuracy": "Share of held-out examples {}.",
    "logit_difference": "Logit of the answer minus the best wrong candidate's.",
    "candidate_log_probability_difference": "Log probability of the whole answer minus the best wrong candidate's.",
    "invalid": "Share of answers that are no candidate at all: lost format, not lost retrieval.",
}


def metric_figures(found: CoreHeads, titles: Mapping[str, str]) -> Figures:
    """Metrics, name -> title, against the number of heads ablated, a figure each; those not measured are left out."""
    chance = {"accuracy": found.summary["finding"]["chance"]}
    measured = set(found.ablation["metric"])
    return [
        (
            title,
            METRIC_CAPTIONS[metric].format(JUDGES[found.answers].caption),
            plot_ablation_panels(found.ablation, metric=metric, chance=chance.get(metric)),
        )
        for metric, title in titles.items()
        if metric in measured
    ]


def _curves(found: CoreHeads) -> Figures:
    table, controls = found.ablation, found.summary["controls"]
    kinds = [kind for kind in dict.fromkeys(table["kind"]) if kind not in (POOLED, *controls)]
    figures = metric_figures(
        found, {metric: f"Ablation: {metric.replace('_', ' ')}" for metric in METRIC_CAPTIONS}
    )
    figures.append(
        (
            "Ablation by kind of task",
            "Accuracy, one row per kind of visual question.",
            plot_ablation_panels(table, kinds=kinds),
        )
    )
    if controls:
        figures.append(
            (
                "Ablation on text-only controls",
                "Accuracy on questions without an image: what the same heads do for other work.",
                plot_ablation_panels(table, kinds=controls),
            )
        )
    return figures


def _overlays(found: CoreHeads, model: HookedVLM) -> Figures:
    """The two best and the two worst heads on one held-out example of each kind."""
    heads = [
        *(("top two heads", head) for head in found.scores.top(2)),
        *(("bottom two heads", head) for head in found.scores.bottom(2)),
    ]
    return [figure for example in found.overlay_examples for figure in overlay_figures(model, example, heads)]


def across(findings: Mapping[str, Findings]) -> Findings:
    """In which models and modes the finding holds, with the accuracies behind it."""
    rows = pd.concat(
        [_verdicts(found.numbers).assign(model=model) for model, found in findings.items()], ignore_index=True
    )
    table = rows[["model", *(name for name in rows if name != "model")]]
    held = [model for model, found in findings.items() if found.numbers["finding"]["holds"]]
    return Findings(
        f"The finding holds in every mode in {len(held)} of {len(findings)} models"
        + (f": {', '.join(held)}." if held else "."),
        plain({"holds": held, "models": list(findings)}),
        tables={"finding": ("Accuracy on held-out examples with evidence, 95% intervals.", table)},
    )


EXPERIMENT = Experiment(
    name="core-heads",
    title="CoRe heads, found on one split and ablated on another",
    source="arXiv 2606.05843, section 4",
    question="Do the heads that attend most to the evidence carry the answer, and do other heads not?",
    method=(
        "Heads were ranked by Retrieval Attention Mass (Eq. 1; boxes to tokens: {mapping}), pooled over the selection "
        "examples with evidence. On the evaluation examples, the top and bottom heads of that ranking, as many drawn "
        "at random from the rest, and as many from the rest of the same layers ({n_draws} draws of each) were ablated "
        "at all positions (modes: {modes}; numbers of heads: {counts}, or where none 1, 5%, 10%, 20% of all)."
    ),
    run=run,
    cites=("arxiv_2606_05843",),
    across=across,
    by_name="`masking` asks the same of fewer draws and examples, at the shares of the paper's figure",
)
