"""The localization head's score: heads that look at the image, and at one compact place in it."""

from __future__ import annotations

import numpy as np
import scipy.ndimage
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmlens.arguments import BATCH_SIZE, array_of, number, whole_number
from mmlens.errors import InvalidTypeError, InvalidValueError
from mmlens.head_scores import HeadScores
from mmlens.model.batches import Prompts
from mmlens.model.hooked_vlm import HookedVLM, model_of
from mmlens.model.prompt import Prompt
from mmlens.scores.rows import Rows, mean_to, read_heads
from mmlens.scores.score import HeadScore
from mmlens.token_map import NO_PATCH, TokenMap


def localization_score(
    model: HookedVLM,
    prompts: Prompts,
    *,
    cut: float | None = None,
    n_lowest: int = 10,
    first_layer: int = 0,
    last_row: float | None = None,
    above: float = 2.0,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> HeadScores:
    """The localization head's score: how often a head's attention map is among the most compact ones.

    1. Of the last prompt token's attention, the sum on the image, per head and example. Heads stay whose mean over
       the examples is at least `cut` (None: at the elbow of the sorted means, `elbow`).
    2. Heads of layers before `first_layer` are left out, and of each example heads that give a cell of an image's last
       row more than `last_row` of their attention (None: none are; the source's code has 2 and .05, against heads
       that look there whatever is shown). In models of few layers 2 would leave out where retrieval is.
    3. Of each example, 1 for the `n_lowest` of these heads with the lowest `spatial_entropy` (of equal ones that with
       more attention on the image first), 0 for all others. The mean over examples is the selection frequency. A cell
       counts as attended where it has more than `above` times the map's mean.

    It asks for compact attention anywhere, so it needs no evidence. Source: arXiv 2503.06287 (10 heads of each
    example, of 1,024) and its code, of which there are two states that differ. That of June 2025 cuts at 1 x the mean
    and leaves no layer and no last row out, that of August 2025 cuts at 2 x the mean; both have top_k 5 in place of 10.
    Our default is the cut of August with the paper's 10; `SCORES["localization_score"].variant("june 2025")` and
    `"august 2025"` take each state's options. Our reading: the cut on the sum is on means over examples (both states
    take the elbow of each example, and June's compares heads' numbers with it, not their sums); several images, or
    tiles of one, are maps side by side with components of their own; learnt separators are left out.

    Raises ValueError for examples without images, n_lowest below 1 and a first_layer that there is not, TypeError
    where visual tokens are learnt queries without a place on a grid.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> scores = localization_score(model, mmlens.scene_examples("objects", 4, seed=0), n_lowest=3, progress=False)
    >>> round(float(scores.values.sum()), 4)
    3.0
    """
    n_lowest = whole_number("n_lowest", n_lowest, least=1)
    first_layer = whole_number("first_layer", first_layer, least=0, most=model_of(model).cfg.n_layers - 1)
    cut = None if cut is None else number("cut", cut)
    last_row = None if last_row is None else number("last_row", last_row)
    above = number("above", above, least=0)

    def of_all(read: Float[Tensor, "example layer head read=3"]) -> Float[Tensor, "example layer head"]:
        mass, entropy, lowest_row = read.unbind(-1)
        exists = ~mass[0].isnan()
        entropy = entropy.clone()
        entropy[:, :first_layer] = torch.inf
        if last_row is not None:
            entropy[lowest_row > last_row] = torch.inf
        selected = _selected(mass[:, exists].numpy(), entropy[:, exists].numpy(), cut, n_lowest)
        per_example = torch.full_like(mass, torch.nan)
        per_example[:, exists] = torch.from_numpy(selected)
        return per_example

    def of_batch(model: HookedVLM, prompt: Prompt) -> Float[Tensor, "batch layer head read=3"]:
        return _read_maps(model, prompt, above)

    score = HeadScore("localization score", of_batch, needs=("images",), of_all=of_all)
    return score(model, prompts, batch_size=batch_size, progress=progress)


def _read_maps(model: HookedVLM, prompt: Prompt, above: float) -> Float[Tensor, "batch layer head read=3"]:
    """Of the last token's attention: its mass on the image, its entropy there, the most that a last row's cell gets."""
    canvases = [_canvas(prompt.token_map, row) for row in range(len(prompt))]
    last_rows = [_last_rows(canvas) for canvas in canvases]

    def of_layer(rows: Rows, real: Bool[Tensor, "batch query"]) -> Float[Tensor, "batch head read=3"]:
        last = rows[:, :, 0].cpu()
        maps = [(a.numpy()[:, canvas], canvas >= 0) for a, canvas in zip(last, canvases, strict=True)]
        entropies = [torch.from_numpy(spatial_entropy(*of_example, above=above)) for of_example in maps]
        most = [a[:, cells].amax(-1) for a, cells in zip(last, last_rows, strict=True)]
        reads = mean_to(last, prompt.token_map.is_image), torch.stack(entropies).float(), torch.stack(most)
        return torch.stack(reads, dim=-1)

    return read_heads(model, prompt, prompt.last, of_layer)


def spatial_entropy(
    maps: Float[np.ndarray, "head row column"],
    cells: Bool[np.ndarray, "row column"] | None = None,
    *,
    above: float = 2.0,
) -> Float[np.ndarray, " head"]:
    """Entropy, in nats, of a map's mass over its connected components: 0 for one compact place.

    B = max(map - `above` * its mean, 0); components are 8-connected cells of B above 0; P(C) = the share of B's sum
    in component C; the entropy is -sum P log P. inf where nothing stands above. `cells` says which cells there are
    (None: all); the others count in no mean and connect nothing.

    Source: the code of arXiv 2503.06287, whose cut of B at .001 is 0 here.

    >>> corners = np.zeros((1, 4, 4))
    >>> corners[0, 0, 0] = corners[0, 3, 3] = 0.5
    >>> round(float(spatial_entropy(corners)[0]), 4)  # log 2
    0.6931
    """
    maps, above = array_of("maps", maps, "head row column"), number("above", above)
    known = np.ones(maps.shape[1:], dtype=bool) if cells is None else cells
    values = np.where(known, maps, 0.0).astype(np.float64)
    mean = values.sum((1, 2), keepdims=True) / known.sum()
    raised = np.where(known, np.maximum(values - above * mean, 0.0), 0.0)
    # One call for all maps: cells of different maps are no neighbours.
    neighbours = np.zeros((3, 3, 3), dtype=bool)
    neighbours[1] = True
    labels, n_components = scipy.ndimage.label(raised > 0, structure=neighbours)
    weight = np.bincount(labels.ravel(), weights=raised.ravel(), minlength=n_components + 1)[1:]
    head = np.zeros(n_components, dtype=int)
    head[labels[labels > 0] - 1] = np.nonzero(labels)[0]
    total = raised.sum((1, 2))
    share = weight / total[head] if n_components else weight
    entropy = np.where(total > 0, 0.0, np.inf)
    np.add.at(entropy, head, -share * np.log(share))
    return entropy


def elbow(values: Float[np.ndarray, " head"]) -> float:
    """The value at the elbow of the sorted values: farthest from the line between the lowest and the highest.

    Source: the code of arXiv 2503.06287.

    >>> elbow(np.array([0.9, 0.0, 0.1, 0.05, 1.0]))
    0.1
    """
    ordered = np.sort(array_of("values", values, "head"))
    if not ordered.size:
        raise InvalidValueError("values is empty; expected a number for each head")
    line = np.linspace(ordered[0], ordered[-1], len(ordered))
    # The distance to a line is the vertical distance times a constant.
    return float(ordered[np.abs(line - ordered).argmax()])


def _selected(
    mass: Float[np.ndarray, "example head"],
    entropy: Float[np.ndarray, "example head"],
    cut: float | None,
    n_lowest: int,
) -> Float[np.ndarray, "example head"]:
    mean = mass.mean(0, dtype=np.float64)
    keeps = mean >= (elbow(mean) if cut is None else cut)
    selected = np.zeros_like(mass)
    for example in range(len(mass)):
        order = np.lexsort((-mass[example], entropy[example]))
        compact = [head for head in order if keeps[head] and np.isfinite(entropy[example, head])]
        selected[example, compact[:n_lowest]] = 1
    return selected


def _canvas(token_map: TokenMap, example: int) -> np.ndarray:
    """[row, column] of the positions of an example's visual tokens; tiles below each other, -1 between them."""
    image, tile, row, column = (
        getattr(token_map, name)[example].cpu().numpy() for name in ("image", "tile", "row", "col")
    )
    on_grid = row != NO_PATCH
    if not on_grid.any():
        raise InvalidTypeError(
            "the visual tokens are learnt queries, which have no place on a grid: there is no map"
        )
    parts = []
    for own in sorted(set(zip(image[on_grid], tile[on_grid], strict=True))):
        at = np.nonzero(on_grid & (image == own[0]) & (tile == own[1]))[0]
        part = np.full((row[at].max() + 2, column[on_grid].max() + 1), -1)
        part[row[at], column[at]] = at
        parts.append(part)
    return np.concatenate(parts)


def _last_rows(canvas: np.ndarray) -> np.ndarray:
    """Positions of the cells in the last row of each tile: the row before the empty one that ends it."""
    empty = np.asarray((canvas < 0).all(1))
    cells = canvas[:-1][empty[1:] & ~empty[:-1]]
    return cells[cells >= 0]
