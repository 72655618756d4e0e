"""What top and bottom heads look at (the paper's Fig. 1, 2 and 8), and how much of it is evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from mmlens.experiments.common import (
    PAPER,
    POOLED,
    across_table,
    beside_chance,
    head_names,
    plain,
    ranged,
    records,
    selectivity,
    token_counts,
    with_evidence,
)
from mmlens.experiments.core_heads_report import overlay_figures
from mmlens.experiments.experiment import Experiment, Findings, Setup, checked_settings
from mmlens.heads import HeadSet
from mmlens.scores.retrieval import EvidenceAttention, evidence_attention, ram
from mmlens.viz.intervals import plot_intervals


@checked_settings
def run(setup: Setup, *, n_heads: int = 1) -> Findings:
    """Attention of the `n_heads` top and bottom heads (by pooled RAM, selection split) on held-out examples.

    Pictures are of the first evaluation example of each kind. Beside them, over all evaluation examples, the share of
    these heads' attention to visual tokens that lies on the evidence (mean RAM / mean vision mass, summed over the
    heads), and what it would be were the same attention spread evenly over each example's visual tokens.
    """
    options: dict[str, Any] = {"batch_size": setup.batch_size, "progress": setup.progress}
    scores = ram(setup.model, with_evidence(setup.selection), **options)
    arms = {"top": scores.top(n_heads), "bottom": scores.bottom(n_heads)}
    examples = with_evidence(setup.evaluation)
    kinds = list(dict.fromkeys(example.kind for example in examples))
    seen = evidence_attention(setup.model, examples, **options)
    counts = token_counts(setup, examples)
    evidence_share = (counts["evidence"] / counts["visual"]).to_numpy()
    rows, per_example = [], []
    for kind in [POOLED, *(kinds if len(kinds) > 1 else [])]:
        at = [index for index, example in enumerate(examples) if kind in (POOLED, example.kind)]
        for arm, heads in arms.items():
            evidence, images = _summed(seen, heads, at)
            rows.append(
                {"kind": kind, "arm": arm, "heads": head_names(heads)}
                | selectivity(evidence, images, evidence_share[at])
                | {"n": len(at)}
            )
    for arm, heads in arms.items():
        evidence, images = _summed(seen, heads, range(len(examples)))
        per_example.append(
            pd.DataFrame(
                {
                    "arm": arm,
                    "kind": [e.kind for e in examples],
                    "ram": evidence.numpy(),
                    "vision_mass": images.numpy(),
                },
                index=pd.Index([e.id for e in examples], name="id"),
            ).assign(evidence_share=evidence_share)
        )
    table = pd.DataFrame(rows)
    pooled = table[table["kind"] == POOLED].set_index("arm")
    top, bottom = pooled.loc["top"], pooled.loc["bottom"]
    agrees = bool(top["low"] > max(bottom["high"], top["chance"]))
    statement = (
        f"Of the attention that the top head{'s' if n_heads > 1 else ''} by RAM ({top['heads']}) give"
        f"{'' if n_heads > 1 else 's'} to visual tokens, {ranged(top['selectivity'], top['low'], top['high'])} "
        f"lies on "
        f"the evidence, for the bottom ({bottom['heads']}) "
        f"{ranged(bottom['selectivity'], bottom['low'], bottom['high'])}; "
        f"spread evenly it would be {top['chance']:.2f} and {bottom['chance']:.2f} ({len(examples)} held-out "
        f"examples). "
        f"{'As in' if agrees else 'Unlike'} the paper's pictures, top heads "
        f"{'look' if agrees else 'do not clearly look'} at the evidence more than bottom heads and than chance."
    )
    named = [
        (f"{arm} {len(heads)} head{'s' if len(heads) > 1 else ''}", head)
        for arm, heads in arms.items()
        for head in heads
    ]
    figures = [
        (
            "Share of attention on the evidence",
            "Of the attention to visual tokens, 95% bootstrap intervals over held-out examples; beside each, "
            "what the "
            "same attention spread evenly would give.",
            plot_intervals(
                beside_chance(table, "arm"),
                row="kind",
                series="series",
                xlabel="Share on the evidence",
                percent=True,
            ),
        )
    ]
    for kind in kinds:
        figures += overlay_figures(setup.model, next(e for e in examples if e.kind == kind), named)
    return Findings(
        statement,
        plain({"agrees": agrees, "top": arms["top"], "bottom": arms["bottom"], "shares": records(table)}),
        tables={"shares": ("Share of the attention to visual tokens that lies on the evidence.", table)},
        per_example={"shares": pd.concat(per_example).reset_index()},
        figures=figures,
    )


def _summed(
    seen: EvidenceAttention, heads: HeadSet, examples: Sequence[int]
) -> tuple[Float[Tensor, " example"], Float[Tensor, " example"]]:
    """RAM and vision mass of the chosen examples, summed over the heads."""
    layers, within = (list(part) for part in zip(*heads, strict=True))
    on_evidence, on_images = (
        scores.per_example[list(examples)][:, layers, within].sum(-1)
        for scores in (seen.ram, seen.vision_mass)
    )
    return on_evidence, on_images


def across(findings: Mapping[str, Findings]) -> Findings:
    """Share of the attention on the evidence, top and bottom heads, by model."""
    rows = [
        {"model": name, **row, "mean": row["selectivity"]}
        for name, found in findings.items()
        for row in found.numbers["shares"]
        if row["kind"] == POOLED
    ]
    table = pd.DataFrame(rows)
    agreed = across_table(findings, lambda found: {"agrees": found["agrees"]})
    return Findings(
        f"Top heads look at the evidence more than bottom heads and than chance in {int(agreed['agrees'].sum())} of "
        f"{len(agreed)} models.",
        plain({"models": records(agreed), "shares": rows}),
        tables={"shares": ("Share of the attention to visual tokens that lies on the evidence.", table)},
        figures=[
            (
                "Share of attention on the evidence, by model",
                "Of the attention to visual tokens, 95% bootstrap intervals.",
                plot_intervals(
                    table, row="model", series="arm", xlabel="Share on the evidence", percent=True
                ),
            )
        ],
    )


EXPERIMENT = Experiment(
    name="overlays",
    title="What top and bottom heads look at",
    source=f"{PAPER}, Fig. 1, 2 and 8",
    question=(
        "Do the top heads look at the evidence of examples they were not chosen on, and what do bottom heads look "
        "at?"
    ),
    method=(
        "The {n_heads} top and bottom heads by RAM on the selection split were drawn over held-out examples, and the "
        "share of their attention to visual tokens that lies on the evidence was measured on all of these."
    ),
    run=run,
    cites=("arxiv_2606_05843",),
    across=across,
)
