"""Where the paper's text can be read in two ways, or its method is doubtful: both readings, and what differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm import tqdm

from mmlens.data.examples import Evidence, Example
from mmlens.effects.measure import effect
from mmlens.errors import InvalidValueError
from mmlens.experiments.ablations import first_of_kinds
from mmlens.experiments.common import (
    FIVE_PERCENT,
    PAPER,
    POOLED,
    ablation_outcomes,
    ablation_table,
    arm_difference,
    head_names,
    kinds_of,
    plain,
    ranged,
    records,
    with_evidence,
)
from mmlens.experiments.experiment import Experiment, Findings, Setup, checked_settings
from mmlens.experiments.masking import LARGEST_OF_QWEN
from mmlens.head_scores import HeadScores
from mmlens.heads import HeadSet
from mmlens.metrics.outcomes import accuracy
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.prompt import Prompt, assembled_prompt, with_answers
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


@checked_settings
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
    judged = replace(setup, evaluation=first_of_kinds(setup.evaluation, n_per_kind))
    ours = ram(setup.model, examples, batch_size=setup.batch_size, progress=setup.progress)
    readings, left_out = [], {}
    for name, find in (
        ("box mapping", _box_mapping),
        ("question tokens", _question_tokens),
        ("evidence tags", partial(_evidence_tags, tags=tags, fallback_tags=fallback_tags)),
        ("mask", _mask),
        ("number of heads", _number_of_heads),
        ("mean over examples", _mean_of_ranks),
    ):
        found = find(setup, examples, ours, fraction, mode)
        if isinstance(found, str):
            left_out[name] = found
        else:
            readings.append(found)
    outcomes = pd.concat(
        [
            ablation_outcomes(
                judged,
                {
                    f"{reading.name}: {label}": [heads]
                    for reading in readings
                    for label, heads, of_mode in (
                        (reading.ours, reading.heads, reading.mode),
                        (reading.other, reading.other_heads, reading.other_mode),
                    )
                    if of_mode == each_mode
                },
                (each_mode,),
            )
            for each_mode in dict.fromkeys(
                m for reading in readings for m in (reading.mode, reading.other_mode)
            )
        ],
        ignore_index=True,
    )
    ablation = ablation_table(outcomes, setup.seed)
    table = pd.DataFrame([compared(reading, outcomes, ablation, setup.seed) for reading in readings])
    changed = table[(table["low"] > 0) | (table["high"] < 0)]
    total = len(ours.grid)
    statement = (
        f"{len(readings)} of {len(readings) + len(left_out)} doubtful points were read both ways. "
        + "; ".join(_said(row) for row in table.to_dict("records"))
        + f". The ablation result changes, its interval without 0, in {len(changed)}"
        + (f" ({', '.join(changed['reading'])})" if len(changed) else "")
        + "."
        + "".join(f" Not read both ways: {name}, {reason}." for name, reason in left_out.items())
    )
    drawn = ablation[(ablation["kind"] == POOLED) & (ablation["metric"] == "accuracy")]
    return Findings(
        statement,
        plain({"n_heads": total, "readings": records(table), "left_out": left_out}),
        tables={
            "readings": (
                "Both readings: agreement of scores and top heads, and accuracy with each one ablated.",
                table,
            ),
            "ablation": ("Accuracy and invalid answers on the evaluation split.", ablation),
        },
        per_example={"ablation": outcomes},
        figures=[
            (
                "Accuracy under each reading",
                "With the heads that each reading chooses ablated (or masked its way); 95% intervals, held-out "
                "examples.",
                plot_intervals(
                    drawn,
                    row="arm",
                    xlabel="Accuracy",
                    percent=True,
                    lines={"all heads": float(drawn["clean"].iloc[0])},
                ),
            )
        ],
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


def _said(row: Mapping[str, Any]) -> str:
    rho = "" if row["spearman"] is None or pd.isna(row["spearman"]) else f"Spearman {row['spearman']:.3f}, "
    difference, low, high = (row[name] for name in ("difference", "low", "high"))
    return (
        f"{row['reading']} ({row['other']} instead of {row['ours']}): {rho}{row['shared_heads']} of "
        f"{row['heads']} top "
        f"heads shared, accuracy {row['accuracy_ours']:.0%} and {row['accuracy_other']:.0%}, difference "
        f"{ranged(difference, low, high)}"
    )


# ---------------------------------------------------------------------- the points


def _compared(
    name: str,
    labels: tuple[str, str],
    ours: HeadScores,
    other: HeadScores,
    fraction: float,
    mode: str,
    note: str = "",
) -> Reading:
    heads, others = ours.top(fraction), other.top(fraction)
    return Reading(name, *labels, heads, others, mode, mode, ours.spearman(other), note)


def _box_mapping(
    setup: Setup, examples: Sequence[Example], ours: HeadScores, fraction: float, mode: str
) -> Reading | str:
    """On the examples whose evidence has a box: the others map alike."""
    boxed = [example for example in examples if any(region.box for region in example.evidence)]
    if not boxed:
        return "no evidence has a box"
    options: dict[str, Any] = {"batch_size": setup.batch_size, "progress": setup.progress}
    try:
        other = ram(setup.model, boxed, mapping="paper_floor", **options)
    except TokenMapError as error:
        return f"the paper's index is not defined for this model ({error})"
    note = f"{len(boxed)} of {len(examples)} examples have boxes"
    return _compared(
        "box mapping",
        ("2x2 merge", "paper's floor(index / 4)"),
        ram(setup.model, boxed, **options),
        other,
        fraction,
        mode,
        note,
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
    parts = []
    starts = range(0, len(examples), setup.batch_size)
    for start in tqdm(starts, desc="RAM from other positions", unit="batch", disable=not setup.progress):
        batch = examples[start : start + setup.batch_size]
        prompt = setup.model.prompt_examples(batch)
        parts.append(attention_mass(setup.model, prompt, queries(prompt), prompt.token_map.evidence(batch)))
    kinds = tuple(example.kind for example in examples)
    return HeadScores(torch.cat(parts), "RAM from other positions", kinds, setup.model.grid)


def _question_tokens(
    setup: Setup, examples: Sequence[Example], ours: HeadScores, fraction: float, mode: str
) -> Reading:
    other = ram_from(setup, examples, text_after_images)
    return _compared(
        "question tokens", ("question alone", "all text after the images"), ours, other, fraction, mode
    )


def _mask(setup: Setup, examples: Sequence[Example], ours: HeadScores, fraction: float, mode: str) -> Reading:
    heads = ours.top(fraction)
    return Reading("mask", "causal", "leaky, as written", heads, heads, "uniform", "uniform_leaky")


def _number_of_heads(
    setup: Setup, examples: Sequence[Example], ours: HeadScores, fraction: float, mode: str
) -> Reading | str:
    heads, fewer = ours.top(fraction), ours.top(LARGEST_OF_QWEN)
    if len(heads) == len(fewer):
        return f"{fraction:.1%} and {LARGEST_OF_QWEN:.1%} of {len(ours.grid)} heads are the same number"
    return Reading("number of heads", f"{fraction:.0%}", f"{LARGEST_OF_QWEN:.1%}", heads, fewer, mode, mode)


def _mean_of_ranks(
    setup: Setup, examples: Sequence[Example], ours: HeadScores, fraction: float, mode: str
) -> Reading | str:
    kinds = kinds_of(ours)
    if len(kinds) < 2:
        return "there is one kind of task"
    ranks = [ours.select(kind).rank().double().masked_fill(~ours.grid.exists, torch.nan) for kind in kinds]
    other = HeadScores(-torch.stack(ranks), "mean rank over kinds", tuple(kinds), ours.grid)
    return _compared(
        "mean over examples",
        ("mean RAM of all examples", "mean of the kinds' ranks"),
        ours,
        other,
        fraction,
        mode,
    )


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
    if model.processor is None or model.family.layout is None:
        raise InvalidValueError(
            "prompts with tags need a processor and a token map: model.prompt(...) must work"
        )
    rendered = []
    for example in examples:
        marked = {region.image for region in example.evidence}
        content: list[dict[str, str]] = []
        for number in range(len(example.images)):
            if number in marked and number - 1 not in marked:
                content.append({"type": "text", "text": tags[0]})
            content.append({"type": "image"})
            if number in marked and number + 1 not in marked:
                content.append({"type": "text", "text": tags[1]})
        content.append({"type": "text", "text": example.question})
        text = model.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        before, question, after = text.rpartition(example.question)
        rendered.append((before, question, after))
    prompt = assembled_prompt(
        model.processor,
        model.family.layout,
        rendered,
        [example.question for example in examples],
        [list(example.images) for example in examples],
    )
    return with_answers(prompt.to(model.device), model.processor, examples)


def _evidence_tags(
    setup: Setup,
    examples: Sequence[Example],
    ours: HeadScores,
    fraction: float,
    mode: str,
    *,
    tags: Tags,
    fallback_tags: Tags,
) -> Reading | str:
    """On examples of several images, some without evidence; V* is the whole of the images with it in both readings."""
    chosen = [
        replace(
            example, evidence=tuple(Evidence(image) for image in sorted({e.image for e in example.evidence}))
        )
        for example in examples
        if len({region.image for region in example.evidence}) < len(example.images)
    ]
    if not chosen:
        return "no example has images without evidence beside those with it"
    pair = usable_tags(setup.model, tags, fallback_tags)
    if pair is None:
        return f"the tokenizer knows neither {tags} nor {fallback_tags}"
    model, masses, prompts = setup.model, [], []
    starts = range(0, len(chosen), setup.batch_size)
    for start in tqdm(starts, desc="prompts with tags", unit="batch", disable=not setup.progress):
        batch = chosen[start : start + setup.batch_size]
        prompt = tagged_prompt(model, batch, pair)
        evidence = prompt.token_map.evidence(batch)
        masses.append(attention_mass(model, prompt, prompt.token_map.is_question, evidence))
        prompts.append(prompt)
    kinds = tuple(example.kind for example in chosen)
    tagged = HeadScores(torch.cat(masses), "RAM with tags", kinds, model.grid)
    untagged = ram(model, chosen, batch_size=setup.batch_size, progress=setup.progress)
    with_tags = effect(model, prompts, None, accuracy).mean
    without = effect(model, chosen, None, accuracy, batch_size=setup.batch_size).mean
    used = "" if pair == tags else f", which the tokenizer knows, in place of {' '.join(tags)}"
    note = (
        f"{len(chosen)} examples of several images, tags {' '.join(pair)}{used}; top heads' RAM "
        f"{_top_mean(untagged, fraction):.3f} "
        f"without and {_top_mean(tagged, fraction):.3f} with tags, accuracy (selection) {without:.0%} and "
        f"{with_tags:.0%}"
    )
    return _compared(
        "evidence tags", ("no tags", "tags in the prompt"), untagged, tagged, fraction, mode, note
    )


def _top_mean(scores: HeadScores, fraction: float) -> float:
    return float(torch.stack([scores.values[head] for head in scores.top(fraction)]).mean())


def across(findings: Mapping[str, Findings]) -> Findings:
    """What the other reading changes, by point and model."""
    rows = [
        {"model": name, **row, "mean": row["difference"]}
        for name, found in findings.items()
        for row in found.numbers["readings"]
    ]
    table = pd.DataFrame(rows)
    changed = table[(table["low"] > 0) | (table["high"] < 0)]
    said = [f"{row.reading} in {row.model}" for row in changed.itertuples()]
    return Findings(
        f"The other reading changes the ablation result (95% interval without 0) in {len(changed)} of "
        f"{len(table)} cases" + (f": {', '.join(said)}." if said else "."),
        plain({"readings": rows}),
        tables={
            "readings": (
                "Spearman of the two scores, shared top heads, and accuracy with each one's heads ablated.",
                table.drop(columns=["mean"]),
            )
        },
        figures=[
            (
                "What the other reading changes",
                "Accuracy under the other reading minus that under ours, paired by example, 95% intervals.",
                plot_intervals(
                    table,
                    row="reading",
                    series="model",
                    xlabel="Difference in accuracy",
                    lines={"no difference": 0.0},
                ),
            )
        ],
    )


EXPERIMENT = Experiment(
    name="readings",
    title="Doubtful points of the paper, read both ways",
    source=f"{PAPER}, Eq. 2-5, Alg. 1-2, sections 3 and 4",
    question="Where the paper's text and method differ or are doubtful, does it matter which reading one takes?",
    method=(
        "Every doubtful point was run both ways on the selection split (box to token, question tokens, tags in the "
        "prompt, the mask, the number of heads, the mean); the top {fraction} of each was ablated (mode "
        "{mode}) on the "
        "evaluation split."
    ),
    run=run,
    cites=("arxiv_2606_05843",),
    across=across,
)
