"""RAM and the head scores akin to it: do they name the same heads, and whose heads matter?"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats

from mmlens.data.examples import Example
from mmlens.effects.measure import effect
from mmlens.errors import InvalidValueError, MmlensWarning
from mmlens.experiments.ablations import (
    ablated,
    first_of_kinds,
    references,
    with_evidence,
)
from mmlens.experiments.common import (
    FIVE_PERCENT,
    across_rows,
    all_equal,
    arm_difference,
    flat_per_example,
    head_names,
    matched_controls,
    plain,
    ranged,
    read_null,
    resampled_means,
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
from mmlens.head_scores import HeadScores, half_mass_share, share_of
from mmlens.heads import HeadSet
from mmlens.scores.attention import gaze_score, null_calibrated_ram, query_focused_score, ram_per_token
from mmlens.scores.decoding import copy_score, visual_head_score
from mmlens.scores.lift import ram_lift
from mmlens.scores.logits import logit_contribution
from mmlens.scores.recomputed import PUBLISHED_RHO
from mmlens.scores.registry import SCORES
from mmlens.scores.retrieval import evidence_attention
from mmlens.scores.spatial import localization_score
from mmlens.statistics import rank_correlation, rank_correlation_interval
from mmlens.viz.intervals import plot_intervals
from mmlens.viz.matrix import plot_matrix

WITH_OPTIONS = frozenset(
    {
        "ram",
        "vision_mass",
        "ram_per_token",
        "ram_lift",
        "null_calibrated_ram",
        "query_focused_score",
        "gaze_score",
    }
    | {"localization_score", "visual_head_score", "logit_contribution", "copy_score", "key_token_ratio"}
)
"""Entries of `SCORES` that are taken on examples or with options of their own; the last has an experiment to itself."""

TOP, CONTROL = "top", "layer-matched"
SET = ["score", "arm", "draw"]


@dataclass(frozen=True)
class _Measured:
    """How far the scores agree, and what their tops cost: `table` has a row a score, `effects` one a set of heads."""

    scored: _Scored
    tops: dict[str, HeadSet]
    fraction: float
    n_draws: int
    agreement: pd.DataFrame
    effects: pd.DataFrame
    table: pd.DataFrame
    graded: str
    clean: dict[str, dict[str, float]]
    n_evaluation: int
    shortfall: dict[str, str]

    @property
    def count(self) -> int:
        return len(next(iter(self.tops.values())))

    @property
    def n_heads(self) -> int:
        return len(next(iter(self.scored.scores.values())).grid)

    def square(self, column: str, diagonal: float) -> np.ndarray:
        """A column of `agreement` as a matrix of the scores."""
        names = list(self.tops)
        values = pd.DataFrame(np.eye(len(names)) * diagonal, index=names, columns=names)
        for one, other, value in self.agreement[["score", "other", column]].itertuples(index=False):
            values.loc[one, other] = values.loc[other, one] = value
        return values.to_numpy()


@checked_settings
@judges_as_asked
def run(
    setup: Setup,
    *,
    fraction: float = FIVE_PERCENT,
    null_questions: tuple[str, ...] = ("N/A", "?"),
    mode: str = "mean",
    n_per_kind: int | None = 15,
    n_draws: int = 10,
    n_resamples: int = 1000,
) -> Findings:
    """Rank agreement of the scores, overlap of their top `fraction`, and what ablating each one's own top costs.

    Scores are taken on the selection split; the visual head's, logit contribution and copy score there on the
    examples that are answered right, as published. The copy score needs evidence in text: it is taken on examples
    without images whose question holds the answer once, and left out where there are fewer than two. The null
    question is given in several readings (`null_questions`; the first also serves the query-focused score). Ablation
    of each top, and of `n_draws` layer-matched random sets for each, is on the evaluation split. `n_per_kind` examples
    of each kind of either split (None: all).
    """
    if not null_questions:
        raise InvalidValueError("null_questions holds no question: give at least one, such as 'N/A'")
    scored = _scores(setup, fraction, null_questions, n_per_kind)
    if len(scored.scores) < 2:
        raise InvalidValueError(
            f"scores are compared: at least two that rank heads, not {list(scored.scores)} "
            f"({'; '.join(scored.notes)})"
        )
    tops = {name: scores.top(fraction) for name, scores in scored.scores.items()}
    evaluation = with_evidence(setup.evaluation, n_per_kind)
    texts = first_of_kinds([example for example in setup.evaluation if not example.evidence], n_per_kind)
    graded, graded_function = setup.judge.graded([*evaluation, *texts])
    sets, shortfall = _arms(tops, n_draws, setup.seed)
    outcomes = ablated(
        setup,
        [*evaluation, *texts],
        sets,
        references(setup, [mode]),
        {"accuracy": setup.judge.right, graded: graded_function},
        names=SET,
    )
    outcomes = outcomes[[name for name in outcomes if name not in SET] + SET]
    controls = sorted({example.kind for example in texts})
    effects = _effects(outcomes, controls, setup.seed)
    found = _Measured(
        scored,
        tops,
        fraction,
        n_draws,
        _agreement(scored.scores, tops, n_resamples, setup.seed),
        effects,
        _table(scored.scores, tops, effects, graded),
        graded,
        {metric: _clean(outcomes, controls, metric) for metric in ("accuracy", graded)},
        len(evaluation),
        shortfall,
    )
    per_example = [_per_example(name, scores) for name, scores in scored.scores.items()]
    return Findings(
        _statement(found),
        plain(_numbers(found)),
        tables=_tables(found),
        per_example={"outcomes": outcomes, "scores": pd.concat(per_example, ignore_index=True)},
        figures=_figures(found),
    )


# ---------------------------------------------------------------------- the scores


@dataclass
class _Scored:
    """The scores by name, the number of examples of each, and what has to be said of them."""

    scores: dict[str, HeadScores] = field(default_factory=dict)
    n_examples: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, scores: HeadScores) -> None:
        if all_equal(scores):
            self.notes.append(f"{name} is the same for all heads and was left out")
            return
        self.scores[name] = scores
        self.n_examples[name] = len(scores)


def _scores(setup: Setup, fraction: float, null_questions: Sequence[str], n_per_kind: int | None) -> _Scored:
    model = setup.model
    options = setup.options
    examples = with_evidence(setup.selection, n_per_kind)
    found = _Scored()
    attention = evidence_attention(model, examples, **options)
    found.add("RAM", attention.ram)
    found.add("vision mass", attention.vision_mass)
    found.add("RAM per token", ram_per_token(model, examples, **options))
    try:
        found.add("RAM lift", ram_lift(model, examples, **options))
    except ValueError as error:
        found.notes.append(f"RAM lift is against other visual tokens of any shape ({error})")
        found.add("RAM lift", ram_lift(model, examples, shape="any", **options))
    for question in null_questions:
        name = f"null-calibrated ({question})"
        with _told_in_the_notes(question):
            found.add(name, null_calibrated_ram(model, examples, null_question=question, **options))
        found.notes += read_null(setup, question)
    with _told_in_the_notes(null_questions[0]):
        focused = query_focused_score(model, examples, null_question=null_questions[0], **options)
    found.add("query-focused", focused)
    found.add("gaze", gaze_score(model, examples, **options))
    n_lowest = share_of(fraction, len(attention.ram.grid))
    found.add("localization", localization_score(model, examples, n_lowest=n_lowest, **options))
    right = _answered_right(setup, examples)
    if right:
        found.add("visual head", visual_head_score(model, right, **options))
        found.add("logit contribution", logit_contribution(model, right, **options))
    else:
        found.notes.append(
            "no example with evidence is answered right, so there is no visual head score and no logit contribution"
        )
    copyable = [example for example in setup.selection if not example.images and _holds_its_answer(example)]
    texts = _answered_right(setup, first_of_kinds(copyable, n_per_kind))
    if len(texts) > 1:
        found.add("copy (text)", copy_score(model, texts, **options))
    else:
        found.notes.append(
            f"the copy score was left out: {len(texts)} text-only example(s) hold their answer and are answered right"
        )
    for name, score in SCORES.items():
        if name not in WITH_OPTIONS:
            found.add(score.label, score(model, examples, **options))
    return found


def _answered_right(setup: Setup, examples: Sequence[Example]) -> list[Example]:
    if not examples:
        return []
    right = effect(setup.model, examples, None, setup.judge.right, **setup.options).clean
    return [example for example, value in zip(examples, right.tolist(), strict=True) if value]


def _holds_its_answer(example: Example) -> bool:
    return len(re.findall(rf"(?<!\w){re.escape(example.answer)}(?!\w)", example.question)) == 1


@contextmanager
def _told_in_the_notes(question: str) -> Iterator[None]:
    """No warning for every example of words in the null question that the tokenizer does not know: `_read_null`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".* in the question {re.escape(repr(question))}", MmlensWarning)
        yield


def _per_example(name: str, scores: HeadScores) -> pd.DataFrame:
    table = scores.per_example_table().rename(columns={"score": "value"}).assign(score=name)
    there = table[table["head"] < table["heads_in_layer"]]
    return there[["score", "example", "kind", "layer", "head", "value"]]


# ---------------------------------------------------------------------- agreement and effects


def _agreement(
    scores: Mapping[str, HeadScores], tops: Mapping[str, HeadSet], n_resamples: int, seed: int
) -> pd.DataFrame:
    """One row per pair of scores. Examples are resampled together where both have them."""
    means = {name: flat_per_example(own).mean(0) for name, own in scores.items()}
    draws = {name: resampled_means(own, n_resamples, seed) for name, own in scores.items()}
    total = len(next(iter(means.values())))
    rows = []
    for one, other in itertools.combinations(scores, 2):
        rho = float(rank_correlation(means[one], means[other]))
        low, high = rank_correlation_interval(
            rho, rank_correlation(draws[one], draws[other]), min(len(scores[one]), len(scores[other]))
        )
        shared = len(tops[one] & tops[other])
        by_chance = scipy.stats.hypergeom(total, len(tops[one]), len(tops[other]))
        rows.append(
            {
                "score": one,
                "other": other,
                "spearman": rho,
                "low": low,
                "high": high,
                "shared": shared,
                "expected": float(by_chance.mean()),
                "p_value": float(by_chance.sf(shared - 1)),
            }
        )
    return pd.DataFrame(rows)


def _arms(
    tops: Mapping[str, HeadSet], n_draws: int, seed: int
) -> tuple[dict[tuple[str, str, int], HeadSet], dict[str, str]]:
    sets: dict[tuple[str, str, int], HeadSet] = {}
    shortfall = {}
    for name, heads in tops.items():
        drawn, message = matched_controls(heads, n_draws, seed)
        sets[name, TOP, 0] = heads
        sets |= {(name, CONTROL, draw): own for draw, own in enumerate(drawn)}
        if message:
            shortfall[name] = message
    return sets, shortfall


def _effects(outcomes: pd.DataFrame, controls: Sequence[str], seed: int) -> pd.DataFrame:
    """One row per score, arm, metric and group (evidence, text): cost with its interval, paired by example.

    `excess` is the cost of the top minus that of its controls on the same examples; the interval is of the difference.
    Intervals are over examples, of each example's mean over draws; draw_min and draw_max are single draws' extremes.
    """
    is_text = outcomes["kind"].isin(list(controls))
    rows = []
    for group, part in (("evidence", outcomes[~is_text]), ("text", outcomes[is_text])):
        for (score, metric), cell in part.groupby(["score", "metric"], sort=False):
            excess = arm_difference(cell, CONTROL, TOP, metric=metric, seed=seed)
            costs = summarised(cell, ["arm"], paired=("cost", "clean", "value"), seed=seed)
            for row in costs.to_dict("records"):
                rows.append(
                    {
                        "score": score,
                        "arm": row["arm"],
                        "metric": metric,
                        "group": group,
                        "n": row["n"],
                        "cost": row["cost"],
                        "low": row["cost_low"],
                        "high": row["cost_high"],
                        "draw_min": row["clean"] - row["draw_max"],
                        "draw_max": row["clean"] - row["draw_min"],
                    }
                )
                if row["arm"] == TOP:
                    rows[-1] |= dict(zip(("excess", "excess_low", "excess_high"), excess, strict=True))
    return pd.DataFrame(rows)


def _clean(outcomes: pd.DataFrame, controls: Sequence[str], metric: str) -> dict[str, float]:
    first = outcomes[outcomes["metric"] == metric].drop_duplicates("example")
    is_text = first["kind"].isin(list(controls))
    parts = {"evidence": first[~is_text], "text": first[is_text]}
    return {group: float(part["clean"].mean()) for group, part in parts.items() if len(part)}


def _table(
    scores: Mapping[str, HeadScores], tops: Mapping[str, HeadSet], effects: pd.DataFrame, graded: str
) -> pd.DataFrame:
    sources = {score.label: score.source for score in SCORES.values()}
    rows = []
    of_top = effects[effects["arm"] == TOP].set_index(["score", "metric", "group"])
    for name, own in scores.items():
        values = own.values[own.grid.exists].sort(descending=True).values
        count = len(tops[name])
        positive = int((values > 0).sum())
        row: dict[str, Any] = {
            "score": name,
            "source": sources[name if name in sources else name.split(" (")[0]],
            "n_examples": len(own),
            "half_mass": half_mass_share(own) if positive else np.nan,
            "positive_heads": positive,
            "tied_at_cut": bool(count < len(values) and values[count - 1] == values[count]),
            "top": head_names(tops[name]),
        }
        for metric in ("accuracy", graded):
            cell = of_top.loc[(name, metric, "evidence")]
            row |= {f"{metric}_cost": cell["cost"]} | {
                f"{metric}_{key}": cell[key] for key in ("excess", "excess_low", "excess_high")
            }
        if (name, "accuracy", "text") in of_top.index:
            row["text_accuracy_cost"] = of_top.loc[(name, "accuracy", "text"), "cost"]
        rows.append(row)
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------- how it is told


def _statement(found: _Measured) -> str:
    clean, pairs = found.clean["accuracy"], found.agreement
    lowest, highest = (pairs.loc[pick] for pick in (pairs["spearman"].idxmin(), pairs["spearman"].idxmax()))
    with_ram = pairs[pairs["score"] == "RAM"].sort_values("spearman", ascending=False)
    mass = found.table[found.table["score"].str.startswith("null-calibrated")]
    tied = found.table[found.table["tied_at_cut"]]["score"].tolist()
    published = PUBLISHED_RHO.select_dtypes("number")
    return (
        f"{len(found.table)} scores of {found.n_heads} heads: mean Spearman of pairs "
        f"{pairs['spearman'].mean():.2f}, from {lowest['spearman']:.2f} ({lowest['score']} - {lowest['other']}) to "
        f"{highest['spearman']:.2f} "
        f"({highest['score']} - {highest['other']}); with RAM: "
        + ", ".join(
            f"{row['other']} {ranged(row['spearman'], row['low'], row['high'])}"
            for row in with_ram.to_dict("records")
        )
        + f". Cost in accuracy of ablating each one's own top {found.count} (clean "
        f"{clean['evidence']:.0%}, {found.n_evaluation} examples): {_said_of_costs(found)}"
        + (
            f" On text-only examples ({clean['text']:.0%} clean) RAM's top costs "
            f"{found.table.set_index('score').loc['RAM', 'text_accuracy_cost']:.0%}."
            if "RAM" in found.tops and "text" in clean
            else ""
        )
        + " Half of the positive score lies in "
        + ", ".join(
            f"{row['half_mass']:.1%} of the heads for {row['score']}" for row in mass.to_dict("records")
        )
        + f" (published: {published.min().min()}% to {published.max().max()}% in models of far more heads)."
        + (
            f" Equal scores at the cut, so that part of the top is arbitrary: {', '.join(tied)}."
            if tied
            else ""
        )
        + "".join(f" {note[0].upper()}{note[1:]}." for note in found.scored.notes)
    )


def _said_of_costs(found: _Measured) -> str:
    graded, name = found.graded, found.graded.replace("_", " ")
    effects = found.effects[(found.effects["arm"] == CONTROL) & (found.effects["group"] == "evidence")]
    control = effects.set_index(["metric", "score"])["cost"]
    each = "; ".join(
        f"{row['score']} {row['accuracy_cost']:.0%} (controls {control['accuracy', row['score']]:.0%}; {name} "
        f"{row[f'{graded}_cost']:.1f} against {control[graded, row['score']]:.1f})"
        for row in found.table.sort_values(f"{graded}_cost", ascending=False).to_dict("records")
    )
    told = {
        metric: found.table[found.table[f"{metric}_excess_low"] > 0]["score"].tolist()
        for metric in ("accuracy", graded)
    }
    missed = [score for score in found.table["score"] if score not in told["accuracy"]]
    return (
        f"{each}. More than layer-matched random heads, in accuracy: {', '.join(told['accuracy']) or 'none'}; in "
        f"{name}: {', '.join(told[graded]) or 'none'}."
        + (f" Not told from them in accuracy: {', '.join(missed)}." if missed else "")
    )


def _numbers(found: _Measured) -> dict[str, Any]:
    return {
        "top": found.tops,
        "count": found.count,
        "n_heads": found.n_heads,
        "graded": found.graded,
        "clean": found.clean,
        "n_selection": found.scored.n_examples,
        "n_evaluation": found.n_evaluation,
        "scores": found.table,
        "agreement": found.agreement,
        "effects": found.effects,
        "notes": found.scored.notes,
        "layer_matched_shortfall": found.shortfall,
    }


def _tables(found: _Measured) -> dict[str, tuple[str, pd.DataFrame]]:
    return {
        "scores": (
            "The scores: how few heads hold half of each, and what its own top heads cost.",
            found.table,
        ),
        "agreement": (
            "Every pair of scores: Spearman over all heads, heads in common among the two tops, and the "
            "probability of as many by chance.",
            found.agreement,
        ),
        "effects": (
            "Cost (clean minus ablated) of each top and of its controls, on evidence and on text.",
            found.effects,
        ),
        "half_mass_published": (
            "rho_0.5 in % as published (arXiv 2605.27243): the mean of rho_0.5 at five context lengths, 8k to 128k "
            "tokens. Ours is of one set of examples, all lengths together.",
            PUBLISHED_RHO,
        ),
    }


def _figures(found: _Measured) -> Figures:
    names, share = list(found.tops), f"top {found.fraction:.0%}"
    drawn = found.effects[found.effects["group"] == "evidence"].rename(columns={"cost": "mean"})
    overlap = found.square("shared", diagonal=found.count)
    return [
        (
            "Agreement of ranks",
            "Spearman's rank correlation over all heads, selection split.",
            plot_matrix(found.square("spearman", diagonal=1.0), names, label="Spearman", vmax=1.0),
        ),
        (
            "Heads in common",
            f"Heads that two scores' {share} ({found.count} heads) share.",
            plot_matrix(overlap, names, label="heads", vmax=float(overlap.max()) or 1.0, decimals=0),
        ),
        *(
            (
                f"Cost in {metric.replace('_', ' ')}",
                f"Each score's own {share} ablated, and layer-matched random heads ({found.n_draws} draws); "
                "examples with evidence of the evaluation split, 95% intervals.",
                plot_intervals(
                    drawn[drawn["metric"] == metric],
                    row="score",
                    series="arm",
                    xlabel=f"Cost in {metric.replace('_', ' ')}, clean \N{MINUS SIGN} ablated",
                    percent=metric == "accuracy",
                    lines={"no cost": 0.0},
                ),
            )
            for metric in ("accuracy", found.graded)
        ),
    ]


def across(findings: Mapping[str, Findings]) -> Findings:
    """Every score's cost beyond its controls and its rank correlation with RAM, model by model."""
    columns = {
        **{name: name for name in ("model", "score", "half_mass")},
        "accuracy_cost": "cost",
        "accuracy_excess": "mean",
        "accuracy_excess_low": "low",
        "accuracy_excess_high": "high",
    }
    table = across_rows(findings, "scores")[list(columns)].rename(columns=columns)
    pairs = across_rows(findings, "agreement")
    figure = plot_intervals(
        table,
        row="score",
        series="model",
        xlabel="Excess cost in accuracy",
        percent=True,
        lines={"controls": 0.0},
    )
    mean = table.groupby("score", sort=False)["mean"].mean().sort_values(ascending=False)
    told = table[table["low"] > 0].groupby("score")["model"].nunique()
    n_models = table.groupby("score")["model"].nunique()
    with_ram = pairs[pairs["score"] == "RAM"].groupby("other", sort=False)["spearman"].mean()
    statement = (
        f"Accuracy that each score's own top costs beyond layer-matched random heads, mean over {len(findings)} "
        "model(s), and in how many it is told from 0: "
        + ", ".join(
            f"{name} {value:.0%} ({told.get(name, 0)} of {n_models[name]})" for name, value in mean.items()
        )
        + ". Mean Spearman with RAM: "
        + ", ".join(f"{name} {value:.2f}" for name, value in with_ram.items())
        + "."
    )
    return Findings(
        statement,
        plain({"excess": table, "mean_excess": mean.to_dict(), "spearman_with_ram": with_ram.to_dict()}),
        tables={
            "excess": (
                "Cost in accuracy of each score's top, and its excess over layer-matched heads.",
                table,
            ),
            "agreement": ("Rank agreement of all pairs of scores.", pairs),
        },
        figures=[
            (
                "Cost beyond controls",
                "Accuracy lost with each score's own top ablated, minus that with layer-matched random heads, paired "
                "by example, 95% intervals.",
                figure,
            )
        ],
    )


EXPERIMENT = Experiment(
    name="score-comparison",
    title="RAM and its relatives",
    source=(
        "scores of arXiv 2606.05843, 2605.27243, 2506.09944, 2404.15574, 2506.05344, 2503.06287, 2606.14703 and "
        "2607.01002"
    ),
    question=(
        "Do the published head scores name the same heads, and does ablating each one's own top heads matter alike?"
    ),
    method=(
        "Every score was taken on the selection split ({n_per_kind} examples of each kind of either split; null "
        "questions: {null_questions}), those that count answers on the examples answered right. Rankings of all heads "
        "were compared by Spearman's correlation, with recentred bootstrap intervals ({n_resamples} resamples of the "
        "examples). The top {fraction} of each score, and {n_draws} layer-matched random sets for each, were ablated "
        "({mode} ablation, at all positions) on the evaluation split."
    ),
    run=run,
    cites=(
        "arxiv_2606_05843",
        "arxiv_2605_27243",
        "arxiv_2506_09944",
        "arxiv_2404_15574",
        "arxiv_2506_05344",
        "arxiv_2503_06287",
        "arxiv_2606_14703",
        "arxiv_2607_01002",
    ),
    published=PUBLISHED_RHO,
    across=across,
)
