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

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from mmlens.arguments import flag, folder_to_write, listed, one_of, seed_of, whole_number, whole_numbers
from mmlens.data.examples import Example, check_no_repeats, examples_of, overlap_message, shared_groups
from mmlens.effects.measure import Effect, effect
from mmlens.errors import InvalidValueError
from mmlens.experiments.common import FIVE_PERCENT, POOLED
from mmlens.head_scores import HeadScores, share_of
from mmlens.heads import HeadSet
from mmlens.interventions.ablation import MODES as ABLATION_MODES
from mmlens.interventions.ablation import Means, ablate, mean_activations
from mmlens.metrics.outcomes import accuracy, invalid, logit_difference
from mmlens.model.hooked_vlm import HookedVLM, model_of
from mmlens.provenance import describe_model, versions
from mmlens.scores.retrieval import EvidenceAttention, evidence_attention
from mmlens.statistics import difference_interval_of, interval_of
from mmlens.token_map import BoxMapping, mapping_of

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
        for kind in _kinds_of(self.scores):
            table[f"score_{kind}"] = self.scores.select(kind).values.numpy()[at]
        table["vision_mass"] = self.attention.vision_mass.values.numpy()[at]
        table["key_token_ratio"] = self.attention.key_token_ratio.values.numpy()[at]
        if len(_kinds_of(self.scores)) > 1:
            table["stability"] = self.scores.stability(FIVE_PERCENT).numpy()[at]
        return table

    def save(self, folder: str | Path) -> Path:
        """Write summary.json, head_scores, ablation and outcomes as parquet (the first two as csv too)."""
        folder = folder_to_write("folder", folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text(
            json.dumps(self.summary, indent=1, allow_nan=False), encoding="utf-8"
        )
        for name, table in (("head_scores", self.head_table()), ("ablation", self.ablation)):
            table.to_parquet(folder / f"{name}.parquet", index=False)
            table.to_csv(folder / f"{name}.csv", index=False)
        self.outcomes.to_parquet(folder / "outcomes.parquet", index=False)
        self.scores.save(folder / "ram_per_example.parquet")
        return folder


def core_heads(
    model: HookedVLM,
    selection: Sequence[Example],
    evaluation: Sequence[Example],
    *,
    counts: Sequence[int] | None = None,
    modes: Sequence[str] = MODES,
    n_draws: int = 10,
    seed: int = 0,
    batch_size: int = 16,
    mapping: BoxMapping = "merged",
    force_overlap: bool = False,
    progress: bool = True,
) -> CoreHeads:
    """Run the experiment of this module's heading.

    Examples without evidence are text-only controls: in `selection` they only enter the reference of the mean
    ablation, in `evaluation` they are reported apart. `counts` are numbers of ablated heads; the default is
    1, 5%, 10% and 20% of all heads, and 5% is always among them. Splits that share examples or groups are refused
    unless `force_overlap`, which warns, and says so in the finding's statement: docs/truth.md shows how much better
    heads look on the examples that chose them.

    Raises ValueError where the two splits share an example or group, either holds an example twice or has none with
    evidence, where no mode, an unknown one or one twice is named, or a count leaves too few heads for the controls.
    """
    model_of(model)
    selection, evaluation = examples_of(selection, "selection"), examples_of(evaluation, "evaluation")
    n_draws, seed = whole_number("n_draws", n_draws, least=1), seed_of(seed)
    batch_size = whole_number("batch_size", batch_size, least=1)
    mapping_of(mapping)
    flag("force_overlap", force_overlap)
    flag("progress", progress)
    modes = _checked_modes(modes)
    n_shared = _check_splits(selection, evaluation, force_overlap)
    total = len(model.heads)
    counts = _counts(None if counts is None else whole_numbers("counts", counts, at_least=0), total)
    with_evidence = [example for example in selection if example.evidence]
    attention = evidence_attention(
        model, with_evidence, batch_size=batch_size, mapping=mapping, progress=progress
    )
    reference = (
        mean_activations(model, selection, batch_size=batch_size)
        if {"mean", "mean_query"} & set(modes)
        else None
    )
    arms, moved = _arms(attention.ram, counts, n_draws, seed)
    examples = sorted(evaluation, key=lambda e: (e.kind, len(e.images)))
    metrics = {"accuracy": accuracy, "invalid": invalid, "logit_difference": logit_difference}
    if not all(len(set(example.candidates)) > 1 for example in examples):
        metrics = {"accuracy": accuracy}
    prompts = [
        model.encode_images(model.prompt_examples(examples[start : start + batch_size]))
        for start in range(0, len(examples), batch_size)
    ]
    clean = effect(model, prompts, None, metrics)
    frames = [_outcomes(clean, examples, "clean", "clean", 0, 0)]
    runs = [(mode, arm, draw, heads) for mode in modes for arm, draw, heads in arms]
    for mode, arm, draw, heads in tqdm(runs, desc="ablations", unit="run", disable=not progress):
        intervention = ablate(heads, mode, reference=_reference(mode, reference, selection), seed=seed)
        found = effect(model, prompts, intervention, metrics, clean=clean)
        frames.append(_outcomes(found, examples, mode, arm, len(heads), draw))
    outcomes = pd.concat(frames, ignore_index=True)
    controls = sorted({example.kind for example in examples if not example.evidence})
    ablation = _summarise(outcomes, controls, total, seed, progress)
    named_arms: dict[str, list[HeadSet]] = {arm: [] for arm in ARMS[1:]}
    for arm, _, heads in arms:
        named_arms[arm].append(heads)
    summary = _summary(model, attention, ablation, examples, controls, named_arms, moved)
    if n_shared:
        summary["finding"]["statement"] += f" {_leaks(n_shared)}."
    summary["settings"] = {
        "counts": list(counts),
        "modes": list(modes),
        "n_draws": n_draws,
        "seed": seed,
        "batch_size": batch_size,
        "mapping": mapping,
        "n_selection": len(selection),
        "n_selection_with_evidence": len(with_evidence),
        "n_evaluation": len(evaluation),
        "level": 0.95,
    }
    kinds = sorted({example.kind for example in examples if example.evidence})
    shown = [next(e for e in examples if e.kind == kind and e.evidence) for kind in kinds]
    return CoreHeads(attention, outcomes, ablation, named_arms, summary, shown)


# ---------------------------------------------------------------------- arms


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
) -> tuple[list[tuple[str, int, HeadSet]], dict[int, str]]:
    """(arm, draw, heads), and for each count what the layer-matched draw could not keep in its layer."""
    arms: list[tuple[str, int, HeadSet]] = []
    moved: dict[int, str] = {}
    for count in counts:
        top = scores.top(count)
        arms += [("top", 0, top), ("bottom", 0, scores.bottom(count))]
        for draw in range(n_draws):
            arms.append(("random", draw, top.random(seed + draw)))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                arms.append(("layer_matched", draw, top.matched_random(seed + draw)))
            if caught:
                moved[count] = str(caught[0].message)
    return arms, moved


def _reference(mode: str, means: Means | None, selection: Sequence[Example]) -> Any:
    return {"mean": means, "mean_query": means, "resample": list(selection)}.get(mode)


def _leaks(n_shared: int) -> str:
    return (
        f"Selection and evaluation share {n_shared} example(s) or group(s), by force: heads chosen and judged on the "
        "same data look better than they are"
    )


def _checked_modes(modes: Sequence[str]) -> tuple[str, ...]:
    chosen = tuple(listed("modes", modes, f"a list of ablation modes, such as {list(MODES)}", least=1))
    for mode in chosen:
        one_of("mode", mode, ABLATION_MODES)
    repeated = sorted({mode for mode in chosen if chosen.count(mode) > 1})
    if repeated:
        raise InvalidValueError(f"modes: each may be named once; named more than once: {repeated}")
    return chosen


def _check_splits(
    selection: Sequence[Example], evaluation: Sequence[Example], force_overlap: bool = False
) -> int:
    """The number of shared examples or groups: 0 unless forced."""
    for name, split in (("selection", selection), ("evaluation", evaluation)):
        if not any(example.evidence for example in split):
            raise InvalidValueError(f"the {name} split of {len(split)} example(s) has none with evidence")
        check_no_repeats(name, split)
        mixed = {e.kind for e in split if e.evidence} & {e.kind for e in split if not e.evidence}
        if mixed:
            raise InvalidValueError(
                f"in the {name} split some examples of kind {sorted(mixed)[0]!r} have evidence and some have none; "
                "text-only controls need a kind of their own"
            )

    shared = shared_groups(selection, evaluation)
    n_shared = len(shared)
    if n_shared and not force_overlap:
        raise InvalidValueError(f"{overlap_message(shared)}, or pass force_overlap=True to see by how much")
    if n_shared:
        warnings.warn(_leaks(n_shared), stacklevel=3)
    return n_shared


# ---------------------------------------------------------------------- tables


def _outcomes(
    effects: Mapping[str, Effect], examples: Sequence[Example], mode: str, arm: str, count: int, draw: int
) -> pd.DataFrame:
    frame = pd.concat(
        [
            pd.DataFrame({"example": np.arange(len(examples)), "metric": name, "value": found.values.numpy()})
            for name, found in effects.items()
        ],
        ignore_index=True,
    )
    frame.insert(0, "id", [examples[i].id for i in frame["example"]])
    frame.insert(1, "kind", [examples[i].kind for i in frame["example"]])
    return frame.assign(mode=mode, arm=arm, count=count, draw=draw)


def _groups(outcomes: pd.DataFrame, controls: Sequence[str]) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each kind, and all kinds with evidence together."""
    yield from outcomes.groupby("kind", sort=True)
    yield POOLED, outcomes[~outcomes["kind"].isin(list(controls))]


def _summarise(
    outcomes: pd.DataFrame, controls: Sequence[str], n_heads: int, seed: int, progress: bool
) -> pd.DataFrame:
    """Means over examples (random arms: of each example's mean over draws) with 95% intervals.

    `difference` is against the clean run on the same examples, paired. draw_min and draw_max are the lowest
    and highest mean of a single draw.
    """
    clean = outcomes[outcomes["arm"] == "clean"].set_index(["metric", "example"])["value"]
    rows = []
    cells = list(outcomes.groupby(["mode", "arm", "count", "metric"], sort=False))
    for (mode, arm, count, metric), cell in tqdm(cells, desc="intervals", unit="cell", disable=not progress):
        for kind, part in _groups(cell, controls):
            values = part.groupby("example")["value"].mean()
            before = clean[metric].loc[values.index]
            difference = values - before
            draws = part.groupby("draw")["value"].mean()
            low, high = interval_of(values.to_numpy(), seed)
            difference_low, difference_high = difference_interval_of(
                values.to_numpy(), before.to_numpy(), seed
            )
            rows.append(
                {
                    "mode": mode,
                    "arm": arm,
                    "count": count,
                    "fraction": count / n_heads,
                    "kind": kind,
                    "is_control": kind in controls,
                    "metric": metric,
                    "mean": values.mean(),
                    "low": low,
                    "high": high,
                    "difference": difference.mean(),
                    "difference_low": difference_low,
                    "difference_high": difference_high,
                    "n": len(values),
                    "n_draws": len(draws),
                    "draw_min": draws.min(),
                    "draw_max": draws.max(),
                }
            )
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------- summary


def _kinds_of(scores: HeadScores) -> list[str]:
    return sorted(set(scores.kinds or ()))


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
    model: HookedVLM,
    attention: EvidenceAttention,
    ablation: pd.DataFrame,
    examples: Sequence[Example],
    controls: Sequence[str],
    arms: Mapping[str, Sequence[HeadSet]],
    moved: Mapping[int, str],
) -> dict[str, Any]:
    scores = attention.ram
    kinds = _kinds_of(scores)
    clean = ablation[ablation["arm"] == "clean"]
    top = scores.top(FIVE_PERCENT)
    coverage = attention.key_token_coverage(top)
    ratio = attention.key_token_ratio.values
    return {
        "schema": SCHEMA,
        "model": describe_model(model),
        "versions": versions(("mmlens", "torch", "transformers", "transformer-lens")),
        "finding": _finding(ablation, examples, len(top)),
        "clean": {
            kind: {metric: _cell(clean, kind=kind, metric=metric) for metric in sorted(set(clean["metric"]))}
            for kind in sorted(set(clean["kind"]))
        },
        "controls": list(controls),
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


def _finding(ablation: pd.DataFrame, examples: Sequence[Example], count: int) -> dict[str, Any]:
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
