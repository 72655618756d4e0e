"""Where the paper's text can be read in two ways, or its method is doubtful: both readings, and what differs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm import tqdm

from mmlens.data.chats import QUESTION, Chat, Message, Place, asked_texts, chats_of, parts_of
from mmlens.data.examples import Evidence, Example, chats_of_examples
from mmlens.effects.measure import effect
from mmlens.experiments.ablations import first_of_kinds, with_evidence
from mmlens.experiments.common import (
    FIVE_PERCENT,
    PAPER,
    POOLED,
    ablation_outcomes,
    ablation_table,
    across_rows,
    arm_difference,
    head_names,
    kinds_of,
    plain,
    ranged,
)
from mmlens.experiments.experiment import (
    Experiment,
    Figures,
    Findings,
    Setup,
    checked_settings,
    judges_as_asked,
)
from mmlens.experiments.masking import LARGEST_OF_QWEN
from mmlens.head_scores import HeadScores
from mmlens.heads import HeadSet
from mmlens.model.batches import Batches
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.prompt import Prompt
from mmlens.model.prompt_answers import with_answers
from mmlens.scores.retrieval import attention_mass, ram
from mmlens.token_map import TokenMapError
from mmlens.viz.intervals import plot_intervals

Tags = tuple[str, str]


@dataclass(frozen=True)
class Reading:
    """Two ways to read one thing: each chooses heads and ablates them in a mode. `note` says what else is to know."""

    name: str
    ours: str
    other: str
    heads: HeadSet
    other_heads: HeadSet
    mode: str
    other_mode: str
    spearman: float | None = None
    note: str = ""


@dataclass(frozen=True)
class _Given:
    """What every point starts from: `ours` is RAM of `examples`, whose top `fraction` is ablated in `mode`."""

    setup: Setup
    examples: Sequence[Example]
    ours: HeadScores
    fraction: float
    mode: str
    tags: Sequence[Tags]
    """The marks that the paper names, then those for tokenizers which lack them."""

    @property
    def top(self) -> HeadSet:
        return self.ours.top(self.fraction)

    def read(
        self,
        name: str,
        ours: str,
        other: str,
        scores: HeadScores,
        *,
        own: HeadScores | None = None,
        note: str = "",
    ) -> Reading:
        """A point of which `scores` are the other reading; `own` are ours where they are not RAM of all examples."""
        own = self.ours if own is None else own
        heads, others = own.top(self.fraction), scores.top(self.fraction)
        return Reading(name, ours, other, heads, others, self.mode, self.mode, own.spearman(scores), note)


@checked_settings
@judges_as_asked
def run(
    setup: Setup,
    *,
    fraction: float = FIVE_PERCENT,
    mode: str = "mean",
    tags: Tags = ("<evidence>", "</evidence>"),
    fallback_tags: Tags = (":", "."),
    n_per_kind: int | None = 20,
) -> Findings:
    """Both readings of every doubtful point: Spearman of the scores, shared top heads, accuracy with each ablated.

    Scores and heads are of the selection split, accuracy of the first `n_per_kind` evaluation examples of each kind
    (None: all). The points: how boxes become tokens; which tokens are the question's; literal tags around evidence in
    the prompt (`tags`, or `fallback_tags` where the tokenizer lacks those); masking with and without causal mask; 5% or
    the 2.6% that the figure masks; the mean over examples or that of the kinds' ranks. A point that cannot be read in
    two ways here is named with the reason.
    """
    examples = with_evidence(setup.selection)
    ours = ram(setup.model, examples, **setup.options)
    given = _Given(setup, examples, ours, fraction, mode, (tags, fallback_tags))
    points = {name: read(given) for name, read in POINTS.items()}
    readings = [point for point in points.values() if isinstance(point, Reading)]
    outcomes = _outcomes(replace(setup, evaluation=first_of_kinds(setup.evaluation, n_per_kind)), readings)
    ablation = ablation_table(outcomes, setup.seed)
    table = pd.DataFrame([compared(reading, outcomes, ablation, setup.seed) for reading in readings])
    left_out = {name: reason for name, reason in points.items() if isinstance(reason, str)}
    return Findings(
        _statement(table, left_out),
        plain({"n_heads": len(ours.grid), "readings": table, "left_out": left_out}),
        tables={
            "readings": (
                "Both readings: agreement of scores and top heads, and accuracy with each one ablated.",
                table,
            ),
            "ablation": ("Accuracy and invalid answers on the evaluation split.", ablation),
        },
        per_example={"ablation": outcomes},
        figures=_figures(ablation),
    )


# ---------------------------------------------------------------------- what is computed


def _outcomes(setup: Setup, readings: Sequence[Reading]) -> pd.DataFrame:
    """Both sets of heads of every reading ablated, each in its own mode."""
    runs = [
        (mode, f"{reading.name}: {label}", heads)
        for reading in readings
        for mode, label, heads in (
            (reading.mode, reading.ours, reading.heads),
            (reading.other_mode, reading.other, reading.other_heads),
        )
    ]
    return pd.concat(
        [
            ablation_outcomes(setup, {arm: [heads] for mode, arm, heads in runs if mode == each}, (each,))
            for each in dict.fromkeys(mode for mode, _, _ in runs)
        ],
        ignore_index=True,
    )


def compared(
    reading: Reading, outcomes: pd.DataFrame, ablation: pd.DataFrame, seed: int
) -> dict[str, object]:
    """One row of the table: what the two readings share, and accuracy under the other minus accuracy under ours."""
    first, second = (f"{reading.name}: {label}" for label in (reading.ours, reading.other))
    # The two readings of a mask are runs in different modes: compared as arms of one.
    chosen = outcomes[outcomes["arm"].isin([first, second])].assign(mode="")
    difference, low, high = arm_difference(chosen, second, first, mode="", seed=seed)
    means = ablation[(ablation["kind"] == POOLED) & (ablation["metric"] == "accuracy")].set_index("arm")[
        "mean"
    ]
    shared, size = reading.heads & reading.other_heads, (len(reading.heads), len(reading.other_heads))
    return {
        "reading": reading.name,
        "ours": reading.ours,
        "other": reading.other,
        "spearman": reading.spearman,
        "shared_heads": len(shared),
        "heads": size[0],
        "other_heads": size[1],
        "top_ours": head_names(reading.heads),
        "top_other": head_names(reading.other_heads),
        "accuracy_ours": means[first],
        "accuracy_other": means[second],
        "difference": difference,
        "low": low,
        "high": high,
        "note": reading.note,
    }


# ---------------------------------------------------------------------- the points


def _box_mapping(given: _Given) -> Reading | str:
    """On the examples whose evidence has a box: the others map alike."""
    boxed = [example for example in given.examples if any(region.box for region in example.evidence)]
    if not boxed:
        return "no evidence has a box"
    try:
        other = ram(given.setup.model, boxed, mapping="paper_floor", **given.setup.options)
    except TokenMapError as error:
        return f"the paper's index is not defined for this model ({error})"
    return given.read(
        "box mapping",
        "2x2 merge",
        "paper's floor(index / 4)",
        other,
        own=ram(given.setup.model, boxed, **given.setup.options),
        note=f"{len(boxed)} of {len(given.examples)} examples have boxes",
    )


def text_after_images(prompt: Prompt) -> Bool[Tensor, "batch pos"]:
    """All positions after the last visual token, padding apart: the question with the template's tokens around it."""
    tokens = prompt.token_map
    before = tokens.is_image.flip(1).cumsum(1).flip(1) > 0
    return ~before & ~tokens.is_padding


def ram_from(
    setup: Setup, examples: Sequence[Example], queries: Callable[[Prompt], Bool[Tensor, "batch pos"]]
) -> HeadScores:
    """RAM from other positions than the question's: `queries` gives them for a prompt."""
    parts, label = [], "RAM from other positions"
    for index, prompt in Batches(setup.model, examples, **setup.options, label=label):
        evidence = prompt.token_map.evidence([examples[at] for at in index])
        parts.append(attention_mass(setup.model, prompt, queries(prompt), evidence))
    kinds = tuple(example.kind for example in examples)
    return HeadScores(torch.cat(parts), label, kinds, setup.model.grid)


def _question_tokens(given: _Given) -> Reading:
    other = ram_from(given.setup, given.examples, text_after_images)
    return given.read("question tokens", "question alone", "all text after the images", other)


def _mask(given: _Given) -> Reading:
    heads = given.top
    return Reading("mask", "causal", "leaky, as written", heads, heads, "uniform", "uniform_leaky")


def _number_of_heads(given: _Given) -> Reading | str:
    few, many = f"{LARGEST_OF_QWEN:.1%}", given.fraction
    heads, fewer = given.top, given.ours.top(LARGEST_OF_QWEN)
    if len(heads) == len(fewer):
        return f"{many:.1%} and {few} of {len(given.ours.grid)} heads are the same number"
    return Reading("number of heads", f"{many:.0%}", few, heads, fewer, given.mode, given.mode)


def _mean_of_ranks(given: _Given) -> Reading | str:
    ours, kinds = given.ours, kinds_of(given.ours)
    if len(kinds) < 2:
        return "there is one kind of task"
    ranks = [ours.select(kind).rank().double().masked_fill(~ours.grid.exists, torch.nan) for kind in kinds]
    other = HeadScores(-torch.stack(ranks), "mean rank over kinds", tuple(kinds), ours.grid)
    return given.read("mean over examples", "mean RAM of all examples", "mean of the kinds' ranks", other)


def usable_tags(model: HookedVLM, *candidates: Tags) -> Tags | None:
    """The first pair of texts that the tokenizer has tokens for, none of them unknown."""
    tokenizer = model.tokenizer
    for pair in candidates:
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair]
        if all(ids) and not any(tokenizer.unk_token_id in own for own in ids):
            return pair
    return None


def tagged_prompt(model: HookedVLM, examples: Sequence[Example], tags: Tags) -> Prompt:
    """The examples' prompts with literal `tags` as text around every run of consecutive images that hold evidence."""
    chats = [
        _tagged(chat, {region.of_image for region in example.evidence}, tags)
        for chat, example in zip(chats_of(*chats_of_examples(examples), None, None), examples, strict=True)
    ]
    return with_answers(model.prompt(chats), model.processor, examples)


def _tagged(chat: Chat, marked: Collection[int], tags: Tags) -> list[Message]:
    """The chat with `tags` around its images of these numbers, which stand in a row, and its question as it was."""
    asked, number, messages = dict(asked_texts(chat)), 0, []
    for turn, message in enumerate(chat.messages):
        parts: list[dict[str, Any]] = []
        is_open = False
        for at, part in enumerate(parts_of(message)):
            is_marked = part["type"] == "image" and number in marked
            number += part["type"] == "image"
            if is_marked != is_open:
                parts.append({"type": "text", "text": tags[int(is_open)]})
                is_open = is_marked
            if Place(turn, at) in asked:
                part = {**part, QUESTION: asked[Place(turn, at)] or True}
            parts.append(part)
        parts += [{"type": "text", "text": tags[1]}] if is_open else []
        messages.append(
            {**message, "content": parts} if isinstance(message.get("content"), list) else message
        )
    return messages


def _evidence_tags(given: _Given) -> Reading | str:
    """On examples of several images, some without evidence; V* is the whole of the images with it in both readings."""
    setup, model = given.setup, given.setup.model
    chosen = [
        replace(
            example,
            evidence=tuple(Evidence(image) for image in sorted({e.of_image for e in example.evidence})),
        )
        for example in given.examples
        if len({region.of_image for region in example.evidence}) < len(example.images)
    ]
    if not chosen:
        return "no example has images without evidence beside those with it"
    pair = usable_tags(model, *given.tags)
    if pair is None:
        return f"the tokenizer knows neither {' nor '.join(map(str, given.tags))}"
    masses, prompts = [], []
    starts = range(0, len(chosen), setup.batch_size)
    for start in tqdm(starts, desc="prompts with tags", unit="batch", disable=not setup.progress):
        batch = chosen[start : start + setup.batch_size]
        prompt = tagged_prompt(model, batch, pair)
        evidence = prompt.token_map.evidence(batch)
        masses.append(attention_mass(model, prompt, prompt.token_map.is_question, evidence))
        prompts.append(prompt)
    kinds = tuple(example.kind for example in chosen)
    tagged = HeadScores(torch.cat(masses), "RAM with tags", kinds, model.grid)
    untagged = ram(model, chosen, **setup.options)
    with_tags = effect(model, prompts, None, setup.judge.right).mean
    without = effect(model, chosen, None, setup.judge.right, batch_size=setup.batch_size).mean
    asked = given.tags[0]
    used = "" if pair == asked else f", which the tokenizer knows, in place of {' '.join(asked)}"
    note = (
        f"{len(chosen)} examples of several images, tags {' '.join(pair)}{used}; top heads' RAM "
        f"{_top_mean(untagged, given.fraction):.3f} without and {_top_mean(tagged, given.fraction):.3f} with tags, "
        f"accuracy (selection) {without:.0%} and {with_tags:.0%}"
    )
    return given.read("evidence tags", "no tags", "tags in the prompt", tagged, own=untagged, note=note)


def _top_mean(scores: HeadScores, fraction: float) -> float:
    return float(torch.stack([scores.values[head] for head in scores.top(fraction)]).mean())


POINTS: dict[str, Callable[[_Given], Reading | str]] = {
    "box mapping": _box_mapping,
    "question tokens": _question_tokens,
    "evidence tags": _evidence_tags,
    "mask": _mask,
    "number of heads": _number_of_heads,
    "mean over examples": _mean_of_ranks,
}
"""Each gives both readings of it, or the reason why there are not two."""


# ---------------------------------------------------------------------- how it is told


def _statement(table: pd.DataFrame, left_out: Mapping[str, str]) -> str:
    """`table` has a row for each point that was read both ways; `left_out` says why the others were not."""
    changed = table[(table["low"] > 0) | (table["high"] < 0)]
    return (
        f"{len(table)} of {len(table) + len(left_out)} doubtful points were read both ways. "
        + "; ".join(_said(row) for row in table.to_dict("records"))
        + f". The ablation result changes, its interval without 0, in {len(changed)}"
        + (f" ({', '.join(changed['reading'])})" if len(changed) else "")
        + "."
        + "".join(f" Not read both ways: {name}, {reason}." for name, reason in left_out.items())
    )


def _said(row: Mapping[str, Any]) -> str:
    rho = "" if row["spearman"] is None or pd.isna(row["spearman"]) else f"Spearman {row['spearman']:.3f}, "
    difference, low, high = (row[name] for name in ("difference", "low", "high"))
    return (
        f"{row['reading']} ({row['other']} instead of {row['ours']}): {rho}{row['shared_heads']} of "
        f"{row['heads']} top heads shared, accuracy {row['accuracy_ours']:.0%} and {row['accuracy_other']:.0%}, "
        f"difference {ranged(difference, low, high)}"
    )


def _figures(ablation: pd.DataFrame) -> Figures:
    drawn = ablation[(ablation["kind"] == POOLED) & (ablation["metric"] == "accuracy")]
    return [
        (
            "Accuracy under each reading",
            "With the heads that each reading chooses ablated (or masked its way); 95% intervals, held-out examples.",
            plot_intervals(
                drawn,
                row="arm",
                xlabel="Accuracy",
                percent=True,
                lines={"all heads": float(drawn["clean"].iloc[0])},
            ),
        )
    ]


def across(findings: Mapping[str, Findings]) -> Findings:
    """What the other reading changes, by point and model."""
    table = across_rows(findings, "readings")
    drawn = table.assign(mean=table["difference"])
    figure = plot_intervals(
        drawn, row="reading", series="model", xlabel="Difference in accuracy", lines={"no difference": 0.0}
    )
    changed = table[(table["low"] > 0) | (table["high"] < 0)]
    said = [f"{row.reading} in {row.model}" for row in changed.itertuples()]
    return Findings(
        f"The other reading changes the ablation result (95% interval without 0) in {len(changed)} of "
        f"{len(table)} cases" + (f": {', '.join(said)}." if said else "."),
        plain({"readings": drawn}),
        tables={
            "readings": (
                "Spearman of the two scores, shared top heads, and accuracy with each one's heads ablated.",
                table,
            )
        },
        figures=[
            (
                "What the other reading changes",
                "Accuracy under the other reading minus that under ours, paired by example, 95% intervals.",
                figure,
            )
        ],
    )


EXPERIMENT = Experiment(
    name="doubtful-points",
    title="Doubtful points of the paper, read both ways",
    source=f"{PAPER}, Eq. 2-5, Alg. 1-2, sections 3 and 4",
    question="Where the paper's text and method differ or are doubtful, does it matter which reading one takes?",
    method=(
        "Every doubtful point was run both ways on the selection split (box to token, question tokens, tags in the "
        "prompt, the mask, the number of heads, the mean); the top {fraction} of each was ablated (mode {mode}) on the "
        "evaluation split."
    ),
    run=run,
    cites=("arxiv_2606_05843",),
    across=across,
)
