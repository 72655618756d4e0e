"""All experiments by name."""

from __future__ import annotations

from mmlens.experiments import (
    core_heads_claim,
    doubtful_points,
    emergence,
    head_map,
    hybrid,
    key_tokens,
    masking,
    modes,
    overlays,
    page_ranking,
    prediction,
    score_comparison,
    self_repair,
    stability,
    sufficiency,
    transfer,
    vision_heads,
)
from mmlens.experiments.experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        core_heads_claim.EXPERIMENT,
        head_map.EXPERIMENT,
        vision_heads.EXPERIMENT,
        stability.EXPERIMENT,
        masking.EXPERIMENT,
        key_tokens.EXPERIMENT,
        overlays.EXPERIMENT,
        doubtful_points.EXPERIMENT,
        prediction.EXPERIMENT,
        modes.EXPERIMENT,
        self_repair.EXPERIMENT,
        sufficiency.EXPERIMENT,
        transfer.EXPERIMENT,
        score_comparison.EXPERIMENT,
        page_ranking.EXPERIMENT,
        hybrid.EXPERIMENT,
        emergence.EXPERIMENT,
    )
}
