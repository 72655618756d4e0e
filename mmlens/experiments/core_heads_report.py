"""The report of `core_heads`: head map, ablation curves, and what top and bottom heads look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from mmlens.data.examples import Example
from mmlens.experiments.common import FIVE_PERCENT, POOLED
from mmlens.experiments.core_heads_claim import CoreHeads
from mmlens.heads import Head, head_name
from mmlens.model.hooked_vlm import HookedVLM, model_of
from mmlens.scores.rows import mean_of_rows
from mmlens.viz.ablation_curves import plot_ablation_panels
from mmlens.viz.head_map import plot_head_map
from mmlens.viz.overlay import plot_overlay_grid
from mmlens.viz.report import write_report

Figures = list[tuple[str, str, Figure]]


def write_core_heads_report(result: CoreHeads, model: HookedVLM, path: str | Path) -> Path:
    """A self-contained HTML page of the experiment; see `mmlens.viz.report.write_report`."""
    figures = [*_head_maps(result), *_curves(result), *_overlays(result, model)]
    accuracy = result.ablation[
        (result.ablation["metric"] == "accuracy") & (result.ablation["kind"] == POOLED)
    ]
    tables = [
        ("Heads", "Every head, best first, on the selection split.", result.head_table().round(4)),
        ("Ablation, accuracy, pooled", "The evaluation split; ablation.csv has the rest.", accuracy.round(4)),
    ]
    summary = {key: value for key, value in result.summary.items() if key != "heads"}
    # Why a mode fails stands in the statement; as columns the reasons would only widen the table.
    finding = result.summary["finding"]
    reasons = ("top_breaks", "harmful_controls")
    rows = [{key: value for key, value in row.items() if key not in reasons} for row in finding["rows"]]
    summary["finding"] = {**finding, "rows": rows}
    summary["top 5%"] = _names(result.summary["heads"]["top_5_percent"])
    return write_report(path, summary, figures, tables)


@torch.no_grad()
def question_attention(
    model: HookedVLM, example: Example
) -> tuple[Float[Tensor, "layer head pos"], list[np.ndarray], list[np.ndarray]]:
    """Attention of every head averaged over the question's tokens, and each image's boxes and positions.

    NaN where the model has no head.
    """
    model_of(model)
    prompt = model.prompt(example.question, images=example.images)
    means = torch.full((*model.grid.shape, prompt.shape[1]), torch.nan)

    def consume(layer: int, rows: Tensor, real: Tensor) -> None:
        mean = mean_of_rows(rows, real)[0]
        means[layer, : len(mean)] = mean.cpu()

    model.attention_rows(prompt, prompt.token_map.is_question, consume)
    boxes, positions = [], []
    for image in range(len(example.images)):
        chosen = prompt.token_map.image_tokens(image)[0].cpu()
        positions.append(chosen.nonzero().flatten().numpy())
        boxes.append(prompt.token_map.boxes[0].cpu()[chosen].numpy())
    return means, boxes, positions


def _names(pairs: Sequence[Sequence[int]]) -> str:
    return ", ".join(head_name((layer, head)) for layer, head in pairs)


def _head_maps(result: CoreHeads) -> Figures:
    scores = result.scores
    kinds = sorted(set(scores.kinds or ()))
    figures: Figures = [
        (
            "Retrieval Attention Mass",
            "Mean attention from the question's tokens to the evidence, selection split; the top 5% are outlined.",
            plot_head_map(scores, heads=result.top, title="all kinds"),
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
            plot_head_map(result.attention.vision_mass, heads=result.top, title="vision mass"),
        )
    )
    return figures


def _curves(result: CoreHeads) -> Figures:
    table = result.ablation
    finding = result.summary["finding"]
    controls = list(result.summary["controls"])
    kinds = [kind for kind in dict.fromkeys(table["kind"]) if kind not in (POOLED, *controls)]
    figures: Figures = []
    for metric, caption in (
        ("accuracy", "Share of held-out examples whose first answer token is right."),
        ("logit_difference", "Logit of the answer minus the best wrong candidate's."),
        ("invalid", "Share of answers that are no candidate at all: lost format, not lost retrieval."),
    ):
        if metric in set(table["metric"]):
            chance = finding["chance"] if metric == "accuracy" else None
            figure = plot_ablation_panels(table, metric=metric, chance=chance)
            figures.append((f"Ablation: {metric.replace('_', ' ')}", caption, figure))
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


def _overlays(result: CoreHeads, model: HookedVLM) -> Figures:
    """The two best and the two worst heads on one held-out example of each kind."""
    heads = [
        *(("top two heads", head) for head in result.scores.top(2)),
        *(("bottom two heads", head) for head in result.scores.bottom(2)),
    ]
    return [
        figure for example in result.overlay_examples for figure in overlay_figures(model, example, heads)
    ]


def overlay_figures(model: HookedVLM, example: Example, heads: Sequence[tuple[str, Head]]) -> Figures:
    """For each of `heads`, (what it is one of, head), its attention from the question to every image of the example.

    One colour scale for all heads: on its own scale a head that ignores the images would look busy.
    """
    attention, boxes, positions = question_attention(model, example)
    evidence: list[list[tuple[float, float, float, float]]] = [[] for _ in example.images]
    for region in example.evidence:
        whole = (0.0, 0.0, *map(float, example.images[region.image].size))
        evidence[region.image].append(region.box or whole)  # type: ignore[arg-type]
    layers, within = zip(*(head for _, head in heads), strict=True)
    largest = float(attention[list(layers), list(within)][:, np.concatenate(positions)].max())
    figures: Figures = []
    for arm, (layer, head) in heads:
        figure = plot_overlay_grid(
            example.images,
            boxes,
            [attention[layer, head, chosen].numpy() for chosen in positions],
            evidence=evidence,
            vmax=largest,
            title=f"L{layer}H{head}",
        )
        caption = (
            f"“{example.question}” (answer: {example.answer}). Attention of L{layer}H{head}, one of the "
            f"{arm}, averaged over the question's tokens; the evidence is outlined."
        )
        figures.append(
            (f"{example.kind or 'example'}: {arm.split()[0]} head L{layer}H{head}", caption, figure)
        )
    return figures
