"""What top and bottom heads look at (the paper's Fig. 1, 2 and 8), and how much of it is evidence."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from mmlens.data.examples import Example
from mmlens.experiments.ablations import with_evidence
from mmlens.experiments.common import (
    PAPER,
    POOLED,
    across_rows,
    across_table,
    beside_chance,
    head_names,
    of_models,
    plain,
    ranged,
    selection_ram,
    selectivity,
    token_counts,
)
from mmlens.experiments.experiment import Experiment, Figures, Findings, Setup, checked_settings
from mmlens.experiments.looking import overlay_figures
from mmlens.heads import HeadSet
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.scores.retrieval import EvidenceAttention, evidence_attention
from mmlens.viz.intervals import plot_intervals


@dataclass(frozen=True)
class _Measured:
    """What top and bottom heads give to the evidence, by kind; `seen` and `evidence_share` are of `examples`."""

    arms: dict[str, HeadSet]
    examples: list[Example]
    seen: EvidenceAttention
    evidence_share: np.ndarray

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(example.kind for example in self.examples))

    @functools.cached_property
    def shares(self) -> pd.DataFrame:
        rows = []
        for kind in [POOLED, *(self.kinds if len(self.kinds) > 1 else [])]:
            at = [index for index, e in enumerate(self.examples) if kind in (POOLED, e.kind)]
            for arm, heads in self.arms.items():
                share = selectivity(*_summed(self.seen, heads, at), self.evidence_share[at])
                rows.append({"kind": kind, "arm": arm, "heads": head_names(heads)} | share | {"n": len(at)})
        return pd.DataFrame(rows)

    @property
    def pooled(self) -> pd.DataFrame:
        return self.shares[self.shares["kind"] == POOLED].set_index("arm")

    @property
    def agrees(self) -> bool:
        top, bottom = self.pooled.loc["top"], self.pooled.loc["bottom"]
        return bool(top["low"] > max(bottom["high"], top["chance"]))


@checked_settings
def run(setup: Setup, *, n_heads: int = 1) -> Findings:
    """Attention of the `n_heads` top and bottom heads (by pooled RAM, selection split) on held-out examples.

    Pictures are of the first evaluation example of each kind. Beside them, over all evaluation examples, the share of
    these heads' attention to visual tokens that lies on the evidence (mean RAM / mean vision mass, summed over the
    heads), and what it would be were the same attention spread evenly over each example's visual tokens.
    """
    scores = selection_ram(setup)
    examples = with_evidence(setup.evaluation)
    seen = evidence_attention(setup.model, examples, **setup.options)
    counts = token_counts(setup, examples)
    found = _Measured(
        {"top": scores.top(n_heads), "bottom": scores.bottom(n_heads)},
        examples,
        seen,
        (counts["evidence"] / counts["visual"]).to_numpy(),
    )
    return Findings(
        _statement(found),
        plain(
            {
                "agrees": found.agrees,
                "top": found.arms["top"],
                "bottom": found.arms["bottom"],
                "shares": found.shares,
            }
        ),
        tables={
            "shares": ("Share of the attention to visual tokens that lies on the evidence.", found.shares)
        },
        per_example={"shares": _per_example(found)},
        figures=_figures(found, setup.model),
    )


# ---------------------------------------------------------------------- what is computed


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


def _per_example(found: _Measured) -> pd.DataFrame:
    frames = []
    for arm, heads in found.arms.items():
        evidence, images = _summed(found.seen, heads, range(len(found.examples)))
        frames.append(
            pd.DataFrame(
                {
                    "id": [e.id for e in found.examples],
                    "arm": arm,
                    "kind": [e.kind for e in found.examples],
                    "ram": evidence.numpy(),
                    "vision_mass": images.numpy(),
                    "evidence_share": found.evidence_share,
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


# ---------------------------------------------------------------------- how it is told


def _statement(found: _Measured) -> str:
    top, bottom, several = found.pooled.loc["top"], found.pooled.loc["bottom"], len(found.arms["top"]) > 1
    return (
        f"Of the attention that the top head{'s' if several else ''} by RAM ({top['heads']}) give"
        f"{'' if several else 's'} to visual tokens, {ranged(top['selectivity'], top['low'], top['high'])} lies on "
        f"the evidence, for the bottom ({bottom['heads']}) "
        f"{ranged(bottom['selectivity'], bottom['low'], bottom['high'])}; "
        f"spread evenly it would be {top['chance']:.2f} and {bottom['chance']:.2f} ({len(found.examples)} held-out "
        f"examples). {'As in' if found.agrees else 'Unlike'} the paper's pictures, top heads "
        f"{'look' if found.agrees else 'do not clearly look'} at the evidence more than bottom heads and than chance."
    )


def _figures(found: _Measured, model: HookedVLM) -> Figures:
    figures = [
        (
            "Share of attention on the evidence",
            "Of the attention to visual tokens, 95% bootstrap intervals over held-out examples; beside each, what the "
            "same attention spread evenly would give.",
            plot_intervals(
                beside_chance(found.shares, "arm"),
                row="kind",
                series="series",
                xlabel="Share on the evidence",
                percent=True,
            ),
        )
    ]
    named = [
        (f"{arm} {len(heads)} head{'s' if len(heads) > 1 else ''}", head)
        for arm, heads in found.arms.items()
        for head in heads
    ]
    for kind in found.kinds:
        figures += overlay_figures(model, next(e for e in found.examples if e.kind == kind), named)
    return figures


def across(findings: Mapping[str, Findings]) -> Findings:
    """Share of the attention on the evidence, top and bottom heads, by model."""
    table = across_rows(findings, "shares", lambda row, _: row["kind"] == POOLED)
    table["mean"] = table["selectivity"]
    agreed = across_table(findings, ["agrees"])
    figure = plot_intervals(table, row="model", series="arm", xlabel="Share on the evidence", percent=True)
    return Findings(
        "Top heads look at the evidence more than bottom heads and than chance in "
        f"{of_models(agreed['agrees'])}.",
        plain({"models": agreed, "shares": table}),
        tables={"shares": ("Share of the attention to visual tokens that lies on the evidence.", table)},
        figures=[
            (
                "Share of attention on the evidence, by model",
                "Of the attention to visual tokens, 95% bootstrap intervals.",
                figure,
            )
        ],
    )


EXPERIMENT = Experiment(
    name="overlays",
    title="What top and bottom heads look at",
    source=f"{PAPER}, Fig. 1, 2 and 8",
    question=(
        "Do the top heads look at the evidence of examples they were not chosen on, and what do bottom heads look at?"
    ),
    method=(
        "The {n_heads} top and bottom heads by RAM on the selection split were drawn over held-out examples, and the "
        "share of their attention to visual tokens that lies on the evidence was measured on all of these."
    ),
    run=run,
    cites=("arxiv_2606_05843",),
    across=across,
)
