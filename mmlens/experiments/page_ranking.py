"""Whether the heads that look at the evidence rank the pages of a document (arXiv 2605.27243, on MMDocIR)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mmlens.data.examples import Example
from mmlens.data.pages import domain_of, evidence_layouts, layouts_of, page_texts_of, pages_with_evidence
from mmlens.errors import InvalidValueError
from mmlens.experiments.ablations import all_heads
from mmlens.experiments.common import (
    FIVE_PERCENT,
    across_table,
    head_names,
    matched_controls,
    of_models,
    plain,
    ranged,
    read_null,
)
from mmlens.experiments.experiment import Experiment, Figures, Findings, Setup, checked_settings
from mmlens.heads import HeadSet
from mmlens.scores.pages import PageScores, page_scores_of_sets
from mmlens.scores.ranking import (
    bm25_scores,
    chance_layout_recall,
    chance_page_recall,
    layout_recall,
    macro_mean,
    page_recall,
)
from mmlens.scores.retrieval import ram
from mmlens.statistics import difference_interval_of, interval_of, is_binary, percentile_interval
from mmlens.viz.intervals import plot_intervals

SOURCE = "arXiv 2605.27243"
PUBLISHED = pd.DataFrame(
    [("page", 0.647, 0.645, 0.077, 0.074), ("layout", 0.390, 0.393, 0.063, 0.068)],
    columns=["level", "macro", "micro", "above_best_baseline_macro", "above_best_baseline_micro"],
).assign(k=1, model="Qwen3-VL-8B", data="MMDocIR")
"""Recall@1 of the heads in any of four other tasks' top 5%, four pages a prompt or 200 layouts cut out of theirs, less
what "N/A" gives; the baselines are trained retrievers."""

KS = {"page": (1, 3, 5), "layout": (1, 5, 10)}
"""Those of MMDocIR."""

NONE = "none"
"""No calibration."""

SEVERAL_WORDS = {"page": "pages", "layout": "layouts"}


@dataclass(frozen=True)
class _Level:
    """The questions that are ranked at one level, and what each arm's Recall@k is on them."""

    name: str
    examples: list[Example]
    recall: pd.DataFrame
    """A row per calibration, arm, draw, k and question: these, and example, id, domain, group, recall."""


@dataclass(frozen=True)
class _Measured:
    """The chosen heads, and recall of all arms in tables."""

    top: HeadSet
    shortfall: str
    fraction: float
    levels: dict[str, _Level]
    table: pd.DataFrame
    differences: pd.DataFrame
    domains: pd.DataFrame
    notes: list[str]
    pages_per_prompt: int | None

    def row(self, level: str, arm: str, calibration: str = NONE) -> pd.Series:
        """Recall@1."""
        table = self.table
        found = table[
            (table["level"] == level)
            & (table["arm"] == arm)
            & (table["calibration"] == calibration)
            & (table["k"] == 1)
        ]
        return found.iloc[0]

    def difference(self, level: str, other: str, calibration: str = NONE) -> pd.Series:
        """Recall@1 of the top heads less another arm's."""
        table = self.differences
        found = table[
            (table["level"] == level) & (table["other"] == other) & (table["calibration"] == calibration)
        ]
        return found.iloc[0]

    @property
    def calibrations(self) -> list[str]:
        return list(dict.fromkeys(self.table[self.table["arm"] == "top"]["calibration"]))

    @property
    def agrees(self) -> bool:
        return bool(self.difference("page", "random")["low"] > 0)


@checked_settings
def run(
    setup: Setup,
    *,
    fraction: float = FIVE_PERCENT,
    n_draws: int = 20,
    null_questions: tuple[str, ...] = ("N/A", "?"),
    pages_per_prompt: int | None = None,
    n_resamples: int = 1000,
) -> Findings:
    """Recall@k of pages and layouts ranked by the attention of the top heads, and by what else could rank them.

    Questions are those about several images of which some hold evidence and some do not. The heads are the top
    `fraction` by RAM on such questions of the selection split; the others are `n_draws` layer-matched random sets, all
    heads, BM25 on the pages' texts where the examples have them, chance, and the best that any ranking could do. Each
    ranking by heads is also calibrated by each of `null_questions`. Layouts are ranked where metadata name them.
    `pages_per_prompt` as in `page_scores`. Intervals are the percentile bootstrap's over documents (groups) within
    domains, `n_resamples` of them. Raises ValueError where no question of a split is such a one.
    """
    chosen_on, examples = (
        _rankable(split, name)
        for name, split in (("selection", setup.selection), ("evaluation", setup.evaluation))
    )
    top = ram(setup.model, chosen_on, **setup.options).top(fraction)
    drawn, shortfall = matched_controls(top, n_draws, setup.seed)
    arms = {"top": [top], "random": drawn, "all": [all_heads(setup)]}
    scores = _scores(setup, examples, arms, null_questions, pages_per_prompt)
    levels, notes = _levels(examples, scores)
    notes += [note for question in null_questions for note in read_null(setup, question)]
    interval = _Resampling(n_resamples, setup.seed)
    found = _Measured(
        top,
        shortfall,
        fraction,
        levels,
        _table(levels, interval),
        _differences(levels, interval),
        _domains(levels),
        notes,
        pages_per_prompt,
    )
    return Findings(
        _statement(found),
        plain(_numbers(found)),
        tables=_tables(found),
        per_example={
            "recall": pd.concat(
                [level.recall.assign(level=name) for name, level in levels.items()], ignore_index=True
            )
        },
        figures=_figures(found),
    )


# ---------------------------------------------------------------------- what is computed


def _rankable(examples: Iterable[Example], name: str) -> list[Example]:
    given = list(examples)
    found = [
        example
        for example in given
        if example.evidence
        and all(region.video is None for region in example.evidence)
        and len(pages_with_evidence(example)) < len(example.images)
    ]
    if not found:
        raise InvalidValueError(
            f"page-ranking ranks the pages (images) of documents: none of the {len(given)} {name} examples has "
            "several images of which some hold evidence and some do not"
        )
    return found


Scored = dict[str, dict[tuple[str, int], PageScores]]
"""Calibration -> (arm, draw) -> scores."""


def _scores(
    setup: Setup,
    examples: Sequence[Example],
    arms: Mapping[str, Sequence[HeadSet]],
    null_questions: Sequence[str],
    pages_per_prompt: int | None,
) -> Scored:
    sets = {f"{arm} {draw}": heads for arm, drawn in arms.items() for draw, heads in enumerate(drawn)}
    keys = [(arm, draw) for arm, drawn in arms.items() for draw in range(len(drawn))]

    def of(question: str | None) -> dict[tuple[str, int], PageScores]:
        found = page_scores_of_sets(
            setup.model,
            examples,
            sets,
            other_question=question,
            pages_per_prompt=pages_per_prompt,
            **setup.options,
        )
        return dict(zip(keys, found.values(), strict=True))

    asked = of(None)
    nulls = {question: of(question) for question in null_questions}
    return {NONE: asked} | {
        question: {key: asked[key] - null[key] for key in keys} for question, null in nulls.items()
    }


def _levels(examples: list[Example], scores: Scored) -> tuple[dict[str, _Level], list[str]]:
    """Pages, and layouts of the questions that name some; and what was left out."""
    notes = []
    texts = [page_texts_of(example) for example in examples]
    by_text = None if None in texts else [_bm25(e, text) for e, text in zip(examples, texts, strict=True)]
    if by_text is None:
        notes.append("BM25 was left out, since not all examples have the texts of their pages")
    levels = {
        "page": _level(
            "page",
            examples,
            {calibration: {key: own.pages for key, own in of.items()} for calibration, of in scores.items()},
            by_text,
        )
    }
    with_layouts = [at for at, example in enumerate(examples) if layouts_of(example)]
    if with_layouts:
        few = [examples[at] for at in with_layouts]
        words = [[layout.text for layout in layouts_of(example)] for example in few]
        known = all(text is not None for own in words for text in own)
        levels["layout"] = _level(
            "layout",
            few,
            {
                calibration: {key: [own.layouts[at] for at in with_layouts] for key, own in of.items()}
                for calibration, of in scores.items()
            },
            [_bm25(e, own) for e, own in zip(few, words, strict=True)] if known else None,
        )
    return levels, notes


def _bm25(example: Example, texts: Any) -> Any:
    return bm25_scores(example.question, texts)


def _level(
    name: str,
    examples: list[Example],
    scores: Mapping[str, Mapping[tuple[str, int], Sequence[Any]]],
    by_text: Sequence[Any] | None,
) -> _Level:
    recall, chance = (
        (page_recall, chance_page_recall) if name == "page" else (layout_recall, chance_layout_recall)
    )
    about = pd.DataFrame(
        {
            "example": range(len(examples)),
            "id": [example.id for example in examples],
            "domain": [domain_of(example) for example in examples],
            "group": [example.group or example.id or str(at) for at, example in enumerate(examples)],
        }
    )
    most = max(len(own) for own in next(iter(scores[NONE].values())))
    rows = []
    for k in KS[name]:
        # The first k of k candidates hold all there is, whatever the order.
        if k > 1 and k >= most:
            continue
        given: dict[tuple[str, str, int], np.ndarray] = {
            (calibration, arm, draw): recall(examples, own, k)
            for calibration, of in scores.items()
            for (arm, draw), own in of.items()
        }
        if by_text is not None:
            given[NONE, "bm25", 0] = recall(examples, by_text, k)
        given[NONE, "chance", 0] = chance(examples, k)
        given[NONE, "best possible", 0] = recall(examples, [_held(name, example) for example in examples], k)
        rows += [
            about.assign(calibration=calibration, arm=arm, draw=draw, k=k, recall=values)
            for (calibration, arm, draw), values in given.items()
        ]
    return _Level(name, examples, pd.concat(rows, ignore_index=True))


def _held(level: str, example: Example) -> list[float]:
    """How much of the evidence each page or layout holds: the ranking that no other can pass."""
    if level == "page":
        pages = pages_with_evidence(example)
        return [float(page in pages) for page in range(len(example.images))]
    evidence = evidence_layouts(example)
    return [sum(each.common_area(region) for region in evidence) for each in layouts_of(example)]


@dataclass(frozen=True)
class _Resampling:
    """Means over questions, micro and macro, with percentile intervals over documents drawn within each domain."""

    n_resamples: int
    seed: int

    def __call__(self, part: pd.DataFrame) -> dict[str, float]:
        """Of one value for each question, in the column `recall`; where it is a difference, `other` is from what."""
        values = part["recall"].to_numpy(float)
        found = {"micro": float(values.mean()), "macro": macro_mean(values, part["domain"].tolist())}
        if np.ptp(values) == 0:
            # No resample differs then; shares of 0 or 1 have an interval all the same, and differences of them.
            low, high = interval_of(values, self.seed)
            if "other" in part:
                other = part["other"].to_numpy(float)
                of_shares = is_binary(other) and is_binary(values + other)
                low = high = float(values.mean())
                if of_shares:
                    low, high = difference_interval_of(values + other, other, self.seed)
            return found | {"low": low, "high": high, "macro_low": low, "macro_high": high}
        rng = np.random.default_rng(self.seed)
        sums, counts = [], []
        for _, domain in part.groupby("domain", sort=True):
            of_group = domain.groupby("group", sort=True)["recall"].agg(["sum", "count"]).to_numpy(float)
            times = rng.multinomial(
                len(of_group), np.full(len(of_group), 1 / len(of_group)), self.n_resamples
            )
            sums.append(times @ of_group[:, 0])
            counts.append(times @ of_group[:, 1])
        total, number = np.array(sums), np.array(counts)
        low, high = percentile_interval(total.sum(0) / number.sum(0))
        macro_low, macro_high = percentile_interval((total / number).mean(0))
        return found | {"low": low, "high": high, "macro_low": macro_low, "macro_high": macro_high}


def _of_questions(rows: pd.DataFrame) -> pd.DataFrame:
    """Each question's mean over draws."""
    return rows.groupby(["example", "domain", "group"], sort=True, as_index=False)["recall"].mean()


def _table(
    levels: Mapping[str, _Level], interval: Callable[[pd.DataFrame], dict[str, float]]
) -> pd.DataFrame:
    rows = []
    for name, level in levels.items():
        for (k, arm, calibration), part in level.recall.groupby(["k", "arm", "calibration"], sort=False):
            draws = part.groupby("draw")["recall"].mean()
            rows.append(
                {"level": name, "k": k, "arm": arm, "calibration": calibration}
                | interval(_of_questions(part))
                | {"draw_min": draws.min(), "draw_max": draws.max(), "n_draws": len(draws)}
                | {"n": part["example"].nunique(), "n_documents": part["group"].nunique()}
            )
    return pd.DataFrame(rows)


def _differences(
    levels: Mapping[str, _Level], interval: Callable[[pd.DataFrame], dict[str, float]]
) -> pd.DataFrame:
    """Recall@1 of the top heads less that of every other arm, on the same questions.

    `p_of_draws` is the share of random sets that do as well as the top heads, the top heads counted among them.
    """
    rows = []
    for name, level in levels.items():
        first = level.recall[level.recall["k"] == 1]
        for calibration, of in first.groupby("calibration", sort=False):
            top = of[of["arm"] == "top"]
            others = [arm for arm in first["arm"].unique() if arm not in ("top", "best possible")]
            for other in others:
                theirs = of[of["arm"] == other]
                if not len(theirs):
                    theirs = first[(first["arm"] == other) & (first["calibration"] == NONE)]
                mine, draws = _of_questions(top), theirs.groupby("draw")["recall"].mean()
                other_recall = _of_questions(theirs)["recall"]
                difference = mine.assign(recall=mine["recall"] - other_recall, other=other_recall)
                row = interval(difference)
                as_good = int((draws >= mine["recall"].mean()).sum())
                rows.append(
                    {"level": name, "calibration": calibration, "other": other}
                    | {"difference": row["micro"], "low": row["low"], "high": row["high"]}
                    | {"macro": row["macro"], "macro_low": row["macro_low"], "macro_high": row["macro_high"]}
                    | {"p_of_draws": (1 + as_good) / (1 + len(draws)) if other == "random" else np.nan}
                )
    return pd.DataFrame(rows)


def _domains(levels: Mapping[str, _Level]) -> pd.DataFrame:
    """Recall@1 of every arm, not calibrated, in each domain."""
    rows = []
    for name, level in levels.items():
        first = level.recall[(level.recall["k"] == 1) & (level.recall["calibration"] == NONE)]
        for (domain, arm), part in first.groupby(["domain", "arm"], sort=False):
            of_questions = _of_questions(part)["recall"].to_numpy()
            low, high = interval_of(of_questions, 0)
            rows.append(
                {"level": name, "domain": domain, "arm": arm, "mean": of_questions.mean()}
                | {"low": low, "high": high, "n": len(of_questions)}
            )
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------- how it is told


def _told(found: _Measured, level: str, arm: str, calibration: str = NONE) -> str:
    row = found.row(level, arm, calibration)
    return f"{row['macro']:.1%} macro / {row['micro']:.1%} micro"


def _statement(found: _Measured) -> str:
    parts = []
    for level, measured in found.levels.items():
        arms = [
            f"{arm} {_told(found, level, arm)}" for arm in measured.recall["arm"].unique() if arm != "top"
        ]
        difference = found.difference(level, "random")
        calibrated = [
            f"{question!r} {_told(found, level, 'top', question)}"
            for question in found.calibrations
            if question != NONE
        ]
        parts.append(
            f"Recall@1 of {SEVERAL_WORDS[level]} is {_told(found, level, 'top')} on {len(measured.examples)} "
            f"questions about {measured.recall['group'].nunique()} documents; {', '.join(arms)}. The top heads less "
            f"random ones: {ranged(difference['difference'], difference['low'], difference['high'])}"
            + (f". Calibrated by a null question: {', '.join(calibrated)}" if calibrated else "")
        )
    windows = (
        "all pages of a document in one prompt"
        if found.pages_per_prompt is None
        else f"{found.pages_per_prompt} page(s) a prompt"
    )
    return (
        f"Ranked by the attention of the top {found.fraction:.0%} of heads by RAM on the selection split "
        f"({len(found.top)} of {len(found.top.grid)}: {head_names(found.top)}), {windows}: {'; '.join(parts)}. "
        f"This {'agrees' if found.agrees else 'does not agree'} with the source, where a few heads rank pages without "
        f"training (Qwen3-VL-8B on MMDocIR: pages 64.7 macro / 64.5 micro, layouts 39.0 / 39.3); its documents have 65 "
        "pages on average, so its numbers and these are not to be compared."
        + "".join(f" {note[0].upper()}{note[1:]}." for note in found.notes)
    )


def _numbers(found: _Measured) -> dict[str, Any]:
    return {
        "agrees": found.agrees,
        "heads": found.top,
        "layer_matched_shortfall": found.shortfall,
        "recall": found.table,
        "differences": found.differences,
        "domains": found.domains,
        "notes": found.notes,
    }


def _tables(found: _Measured) -> dict[str, tuple[str, pd.DataFrame]]:
    return {
        "recall": (
            "Recall@k as MMDocIR has it: macro is the mean over domains, micro the mean over questions; 95% intervals "
            "over documents. `calibration` is the null question whose scores were taken away; random is the mean over "
            "draws, draw_min and draw_max the lowest and highest draw; bm25 reads the texts that the data give of "
            "their pages (of generated scenes, the words that were drawn); best possible is below 1 where evidence is "
            "on more than k pages.",
            found.table,
        ),
        "differences": (
            "Recall@1 of the top heads less another arm's on the same questions, micro and macro; p_of_draws is the "
            "share of random sets that do as well, the top heads counted among them.",
            found.differences,
        ),
        "domains": ("Recall@1 in each domain, not calibrated.", found.domains),
        "published": (
            "Recall@1 that the source gives; above_best_baseline is by how much it passes trained retrievers.",
            PUBLISHED,
        ),
    }


def _figures(found: _Measured) -> Figures:
    figures = []
    for level in found.levels:
        table = found.table[(found.table["level"] == level) & (found.table["k"] == 1)]
        lines = {
            arm: float(table[table["arm"] == arm]["micro"].iloc[0]) for arm in ("chance", "best possible")
        }
        shown = table[~table["arm"].isin(lines)].rename(columns={"micro": "mean"})
        shown = shown.assign(
            calibration=["not calibrated" if own == NONE else f"less {own!r}" for own in shown["calibration"]]
        )
        figures.append(
            (
                f"Recall@1 of {SEVERAL_WORDS[level]}",
                "Share of the evidence that is ranked first, mean over questions, 95% intervals over documents; "
                "random: the mean over layer-matched draws.",
                plot_intervals(
                    shown,
                    row="arm",
                    series="calibration",
                    xlabel=f"Recall@1 of {SEVERAL_WORDS[level]}",
                    lines=lines,
                    percent=True,
                ),
            )
        )
    pages = found.domains[found.domains["level"] == "page"]
    if pages["domain"].nunique() > 1:
        figures.append(
            (
                "Recall@1 of pages by domain",
                "Not calibrated; 95% intervals over questions.",
                plot_intervals(pages, row="domain", series="arm", xlabel="Recall@1 of pages", percent=True),
            )
        )
    return figures


def across(findings: Mapping[str, Findings]) -> Findings:
    """Recall@1 of pages by the top heads, random ones and BM25, by model."""

    def picked(numbers: Mapping[str, Any]) -> dict[str, Any]:
        first = {
            row["arm"]: row["micro"]
            for row in numbers["recall"]
            if (row["level"], row["k"], row["calibration"]) == ("page", 1, NONE)
        }
        difference = next(
            row
            for row in numbers["differences"]
            if (row["level"], row["calibration"], row["other"]) == ("page", NONE, "random")
        )
        named = {f"{arm}_recall": value for arm, value in first.items()}
        return named | {
            "mean": difference["difference"],
            "low": difference["low"],
            "high": difference["high"],
            "p_of_draws": difference["p_of_draws"],
            "agrees": numbers["agrees"],
        }

    table = across_table(findings, picked)
    return Findings(
        f"The top heads by RAM rank pages better than random heads of the same layers in {of_models(table['agrees'])}.",
        plain({"models": table}),
        tables={
            "models": (
                "Recall@1 of pages (micro, not calibrated) by each ranking, and the top heads less random ones.",
                table,
            )
        },
        figures=[
            (
                "Top heads less random heads",
                "Recall@1 of pages by the top heads less that by layer-matched random heads, 95% intervals.",
                plot_intervals(
                    table,
                    row="model",
                    xlabel="Recall@1 of pages, top \N{MINUS SIGN} random",
                    lines={"no difference": 0.0},
                ),
            )
        ],
    )


EXPERIMENT = Experiment(
    name="page-ranking",
    title="Pages ranked by heads, without training",
    source=f"{SOURCE}, on MMDocIR (arXiv 2501.08828)",
    question=(
        "Does the attention of the heads that look at the evidence put a document's right pages first, and its right "
        "layouts?"
    ),
    method=(
        "Pages, and layouts where the data name them, were scored for each question by the attention mass of the top "
        "{fraction} of heads by RAM on the selection split (pages in a prompt: {pages_per_prompt}, where none is "
        "all pages of the document), and ranked within their document; Recall@k follows MMDocIR, macro over domains, "
        "micro over questions. Beside them: {n_draws} layer-matched random sets, all heads, each also less the scores "
        "under a null question ({null_questions}), BM25 on page texts, and chance. Intervals are from {n_resamples} "
        "resamples of documents within domains."
    ),
    run=run,
    cites=("arxiv_2605_27243", "dong2025mmdocir", "arxiv_2407_03618", "arxiv_2606_05843"),
    published=PUBLISHED,
    across=across,
)
