"""`mmlens core-heads` as an experiment: its files are those of docs/core-heads.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmlens.experiments.core_heads_claim import MODES, core_heads
from mmlens.experiments.core_heads_report import write_core_heads_report
from mmlens.experiments.experiment import Experiment, Findings, Setup, checked_settings
from mmlens.heads import head_name
from mmlens.token_map import BoxMapping


@checked_settings
def run(
    setup: Setup,
    *,
    counts: Sequence[int] | None = None,
    modes: Sequence[str] = MODES,
    n_draws: int = 10,
    mapping: BoxMapping = "merged",
) -> Findings:
    """`mmlens.experiments.core_heads_claim`, whose keywords the settings are."""
    result = core_heads(
        setup.model,
        setup.selection,
        setup.evaluation,
        counts=counts,
        modes=modes,
        n_draws=n_draws,
        seed=setup.seed,
        batch_size=setup.batch_size,
        mapping=mapping,
        progress=setup.progress,
    )
    result.summary["model"]["name"] = setup.name or result.summary["model"]["name"]

    def save(folder: Path) -> list[str]:
        result.save(folder)
        write_core_heads_report(result, setup.model, folder / "report.html")
        tables = ("head_scores", "ablation", "outcomes", "ram_per_example")
        return ["summary.json", *(f"{name}.parquet" for name in tables)]

    top = ", ".join(map(head_name, result.top))
    statement = f"{result.summary['finding']['statement']}\nCoRe heads (top 5% by RAM): {top}"
    return Findings(statement, result.summary, save=save)


CORE_HEADS = Experiment(
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
)
