"""RAM against its own chance level: what a head gives the evidence more than other places of the same shape."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmlens.arguments import BATCH_SIZE, instance_of, one_of, shown, whole_number
from mmlens.errors import InvalidTypeError, InvalidValueError
from mmlens.head_scores import HeadScores
from mmlens.model.batches import Prompts
from mmlens.model.choosing import Positions
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.prompt import Prompt
from mmlens.scores.retrieval import evidence_tokens
from mmlens.scores.rows import mean_of_rows, mean_to, read_heads
from mmlens.scores.score import HeadScore, known_examples
from mmlens.token_map import BoxMapping, TokenMap, mapping_of

Shape = Literal["same", "any"]
"""Fake regions of the evidence's own shape, or any other visual tokens."""


def ram_lift(
    model: HookedVLM,
    prompts: Prompts,
    *,
    queries: Positions = "question",
    shape: Shape = "same",
    batch_size: int = BATCH_SIZE,
    mapping: BoxMapping = "merged",
    progress: bool = True,
) -> HeadScores:
    """RAM minus the mean RAM of fake regions: as many tokens, elsewhere in the prompt's images.

    0 is chance: a head that looks at images alike, or at the question's neighbourhood, gets none. Fake regions keep
    the evidence's shape on the grid of tokens and move it to every place, in any image or tile of the prompt, where it
    meets no evidence (shape="same"), or are any sets of other visual tokens (shape="any"). The mean is over all of
    them, not over draws, so it is exact and needs no seed; see `fake_region`.

    Raises ValueError where the shape fits nowhere else (shape="same"), or the prompt has no other visual token.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> ram_lift(model, mmlens.scene_examples("documents", 2, seed=0), progress=False)
    HeadScores(RAM lift: 8 layers x 8 heads, 2 examples)
    """
    one_of("shape", shape, ("same", "any"))
    mapping_of(mapping)

    def of_batch(model: HookedVLM, prompt: Prompt) -> Float[Tensor, "batch layer head"]:
        evidence = evidence_tokens(prompt, mapping)
        fakes = []
        for row, example in enumerate(known_examples(prompt)):
            try:
                fakes.append(fake_region(prompt.token_map, evidence[row], row, shape=shape))
            except ValueError as error:
                raise InvalidValueError(f"example {example.id!r}: {error}") from error
        contrast = evidence.cpu().float() - torch.stack(fakes)
        return read_heads(
            model,
            prompt,
            queries,
            lambda rows, real: mean_to(mean_of_rows(rows, real), contrast),
        )

    score = HeadScore("RAM lift", of_batch, needs=("evidence",))
    return score(model, prompts, batch_size=batch_size, progress=progress)


def fake_region(
    token_map: TokenMap,
    evidence: Bool[Tensor, " pos"],
    example: int = 0,
    *,
    shape: Shape = "same",
) -> Float[Tensor, " pos"]:
    """How often a position is in a fake region of the evidence, on average: weights that sum to |V*|.

    shape="any": |V*| / n at each of the n visual tokens that are no evidence, the mean over all sets of |V*| of them
    (where there are that many). shape="same": the evidence in each image or tile is one rigid shape; the weights
    are the mean over every place where it fits on a grid of tokens without meeting evidence. Shapes of several images
    are placed independently, so that two may meet. Evidence tokens without a place on a grid (learnt separators,
    queries) count as under "any".

    Raises ValueError where there is no evidence, no other visual token, or a shape fits nowhere.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> prompt = model.prompt_examples(mmlens.scene_examples("objects", 1, seed=0))
    >>> token = prompt.token_map.box(0, (0, 0, 16, 16))[0]
    >>> weights = fake_region(prompt.token_map, token)
    >>> bool(weights.sum() == 1), int((weights > 0).sum()), int(prompt.token_map.is_image.sum())
    (True, 35, 36)
    """
    instance_of("token_map", token_map, TokenMap, "a TokenMap: prompt.token_map")
    one_of("shape", shape, ("same", "any"))
    example = whole_number("example", example, least=0, most=len(token_map) - 1)
    if not isinstance(evidence, Tensor) or evidence.dtype != torch.bool or evidence.ndim != 1:
        raise InvalidTypeError(
            f"evidence is {shown(evidence)}; expected a boolean tensor [pos] of one example"
        )
    chosen = evidence.cpu().numpy()
    others = token_map.is_image[example].cpu().numpy() & ~chosen
    if not chosen.any():
        raise InvalidValueError("no position is marked as evidence, so it has no fake region")
    if not others.any():
        raise InvalidValueError(
            "the evidence is every visual token of the prompt: there is none left for a fake region"
        )
    image, tile, row, column = (
        getattr(token_map, name)[example].cpu().numpy() for name in ("image", "tile", "row", "col")
    )
    placed = chosen & (row >= 0) if shape == "same" else np.zeros_like(chosen)
    weights = np.zeros(len(chosen))
    weights[others] = (chosen & ~placed).sum() / others.sum()
    grids = [(image == i) & (tile == t) & (row >= 0) for i, t in sorted(set(zip(image, tile, strict=True)))]
    for source in grids:
        part = placed & source
        if not part.any():
            continue
        cells = _on_grid(np.ones(part.sum(), dtype=bool), row[part], column[part])
        counts, n_places = np.zeros(len(chosen)), 0
        for grid in grids:
            if not grid.any():
                continue
            free = _on_grid(others[grid], row[grid], column[grid])
            covered, n = _placements(free, cells)
            low_row, low_column = row[grid].min(), column[grid].min()
            counts[grid] += covered[row[grid] - low_row, column[grid] - low_column]
            n_places += n
        if not n_places:
            raise InvalidValueError(
                f"the evidence's shape of {cells.shape[0]} x {cells.shape[1]} tokens fits nowhere else in the prompt's "
                "images; shape='any' takes other visual tokens of any shape"
            )
        weights += counts / n_places
    return torch.from_numpy(weights).float()


def _on_grid(values: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Boolean values as an array [row, column] from the smallest row and column on; False where there is none."""
    grid = np.zeros((np.ptp(row) + 1, np.ptp(column) + 1), dtype=bool)
    grid[row - row.min(), column - column.min()] = values
    return grid


def _placements(free: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, int]:
    """How many placements of a shape cover each cell, and how many there are; it must lie on free cells alone."""
    covered = np.zeros(free.shape)
    n = 0
    rows, columns = cells.shape
    if rows > free.shape[0] or columns > free.shape[1]:
        return covered, 0
    windows = np.lib.stride_tricks.sliding_window_view(free, cells.shape)
    for top, left in np.argwhere((windows | ~cells).all((-2, -1))):
        covered[top : top + rows, left : left + columns] += cells
        n += 1
    return covered, n
