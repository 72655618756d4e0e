"""What heads look at: their attention from the question to the images, drawn over these."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.data.examples import Example, chats_of_examples
from mmlens.experiments.experiment import Figures
from mmlens.heads import Head
from mmlens.model.hooked_vlm import HookedVLM, model_of
from mmlens.scores.rows import mean_of_rows
from mmlens.viz.overlay import plot_overlay_grid


@torch.no_grad()
def question_attention(
    model: HookedVLM, example: Example
) -> tuple[Float[Tensor, "layer head pos"], list[np.ndarray], list[np.ndarray]]:
    """Attention of every head averaged over the question's tokens, and each image's boxes and positions.

    NaN where the model has no head.
    """
    model_of(model)
    prompt = model.prompt(*chats_of_examples([example]))
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


def overlay_figures(model: HookedVLM, example: Example, heads: Sequence[tuple[str, Head]]) -> Figures:
    """For each of `heads`, (what it is one of, head), its attention from the question to every image of the example.

    One colour scale for all heads: on its own scale a head that ignores the images would look busy.
    """
    attention, boxes, positions = question_attention(model, example)
    evidence: list[list[tuple[float, float, float, float]]] = [[] for _ in example.images]
    for region in example.evidence:
        whole = (0.0, 0.0, *map(float, example.images.sizes[region.of_image]))
        evidence[region.of_image].append(region.box or whole)  # type: ignore[arg-type]
    layers, within = zip(*(head for _, head in heads), strict=True)
    largest = float(attention[list(layers), list(within)][:, np.concatenate(positions)].max())
    figures = []
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
