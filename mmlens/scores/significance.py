"""Which heads attend to the evidence more than to other places: a test of RAM for every head at once.

1. For every example, take the evidence's region and every other region of the same shape in the prompt's images.
2. Measure RAM (arXiv 2606.05843, Eq. 1) on each of them, in one forward pass.
3. If the place of the evidence means nothing to a head, each of the regions could as well have been the evidence:
   draw one for every example, and count how often the sum of their RAM reaches that of the evidence.

This is a permutation test within examples. It is exact where the evidence's place is drawn alike from all its places,
whatever the model does; it says nothing of what the place means to a head. A head that looks at all objects of a
crowded image passes where most of the image is background: give `regions` (the other objects) to ask whether it
looks at the right one. Evidence that stands at usual places favours heads with a liking for these places: give
`regions` at which the evidence of other examples stands.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmlens.arguments import BATCH_SIZE, called, listed, number, seed_of, shown, whole_number
from mmlens.data.examples import Evidence, Example
from mmlens.errors import InvalidTypeError, InvalidValueError
from mmlens.head_scores import HeadScores
from mmlens.heads import HeadSet
from mmlens.model.batches import Prompts
from mmlens.model.choosing import Positions
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.prompt import Prompt
from mmlens.scores.retrieval import region_tokens
from mmlens.scores.rows import Rows, mean_of_rows, read_heads
from mmlens.scores.score import known_examples, score_batches
from mmlens.statistics import benjamini_hochberg
from mmlens.token_map import BoxMapping, TokenMapError, mapping_of

Regions = Callable[[Example], Iterable[Sequence[Evidence]]]


@dataclass(frozen=True, eq=False)
class RamSignificance:
    """What `ram_significance` found.

    `ram` is RAM of the evidence, `lift` that minus the mean over all regions of the example, the evidence's among
    them; `p_values` are one-sided, `adjusted` the same after Benjamini and Hochberg over all heads (NaN where the
    model has no head). `masses` holds RAM of every region of each example, the evidence's first.
    """

    ram: HeadScores
    lift: HeadScores
    p_values: Float[np.ndarray, "layer head"]
    adjusted: Float[np.ndarray, "layer head"]
    masses: tuple[Float[Tensor, "_ layer head"], ...]

    def significant(self, q: float = 0.05) -> HeadSet:
        """The heads whose adjusted p-value is at most `q`, the largest lift first; there may be none.

        Among them the expected share of false ones is at most `q`.
        """
        q = number("q", q, above=0, below=1)
        order = self.lift.top(1.0)
        return HeadSet([head for head in order if self.adjusted[head] <= q], order.grid)

    def table(self) -> pd.DataFrame:
        """One row per head, the largest lift first: layer, head, ram, lift, p_value, adjusted."""
        heads = list(self.lift.top(1.0))
        at = tuple(np.array(heads).T)
        return pd.DataFrame(
            {
                "layer": at[0],
                "head": at[1],
                "ram": self.ram.values.numpy()[at],
                "lift": self.lift.values.numpy()[at],
                "p_value": self.p_values[at],
                "adjusted": self.adjusted[at],
            }
        )


def ram_significance(
    model: HookedVLM,
    prompts: Prompts,
    *,
    queries: Positions = "question",
    regions: Regions | None = None,
    max_regions: int = 200,
    n_resamples: int = 9999,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    mapping: BoxMapping = "merged",
    progress: bool = True,
) -> RamSignificance:
    """Test for every head whether its RAM is higher on the evidence than on other regions of the same prompts.

    `regions` gives, for an example, the regions that the evidence is compared with; None is `other_places`, at most
    `max_regions` - 1 of them, drawn by `seed` where there are more. Regions that cover another number of tokens than
    the evidence, or the same tokens as an earlier one, are left out.

    p = (1 + number of draws with a sum of RAM at or above the evidence's) / (1 + n_resamples), so no p-value is below
    1 / (n_resamples + 1): with m heads, `adjusted` can reach q only where n_resamples >= m / q (m of them are tested,
    and one may be the only one). The same draws serve all heads.

    Raises ValueError for examples without evidence, an example none of whose regions is left, n_resamples too few for
    a single head to pass at 5%, or max_regions below 2; CrossAttentionError as `attention_mass`.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> found = ram_significance(model, mmlens.scene_examples("objects", 6, seed=0), progress=False)
    >>> found.p_values.shape == (model.cfg.n_layers, model.cfg.n_heads)
    True
    """
    mapping_of(mapping)
    batches = score_batches(model, prompts, ("evidence",), batch_size, progress, "RAM of regions")
    n_heads = len(model.grid)
    n_resamples, seed = whole_number("n_resamples", n_resamples, least=1), seed_of(seed)
    max_regions = whole_number("max_regions", max_regions)
    if regions is not None:
        called("regions", regions, "a function from an example to its regions, or None")
    if n_resamples < 20 * n_heads:
        raise InvalidValueError(
            f"n_resamples={n_resamples} cannot show one of {n_heads} heads at 5% after correction: take {20 * n_heads} "
            "or more"
        )
    if max_regions < 2:
        raise InvalidValueError(
            f"max_regions counts the evidence's own, so it is at least 2, not {max_regions}"
        )
    by_number: dict[int, Tensor] = {}
    for index, prompt in batches:
        masks = [
            _masks(prompt, row, example, regions, max_regions, seed, mapping)
            for row, example in enumerate(known_examples(prompt))
        ]
        by_number |= zip(index, _mass_of_regions(model, prompt, queries, masks), strict=True)
    masses = [by_number[at] for at in range(len(by_number))]
    kinds = batches.kinds
    evidence = torch.stack([own[0] for own in masses])
    lift = evidence - torch.stack([own.mean(0) for own in masses])
    scores = HeadScores(evidence, "RAM", kinds, model.grid)
    p_values = np.full(evidence.shape[1:], np.nan)
    exists = scores.grid.exists
    p_values[exists.numpy()] = region_permutation_test(
        [own[:, exists] for own in masses], n_resamples=n_resamples, seed=seed
    )
    return RamSignificance(
        scores,
        HeadScores(lift, "RAM lift", kinds, model.grid),
        p_values,
        benjamini_hochberg(p_values),
        tuple(masses),
    )


def region_permutation_test(
    masses: Sequence[Float[Tensor, "_ head"]], *, n_resamples: int = 9999, seed: int = 0
) -> Float[np.ndarray, " head"]:
    """One-sided p-values of every head from its attention to the regions of each example, the evidence's first.

    See the module's heading. Sums that differ by rounding alone (one part in a million) count as equal, so that a
    head that looks everywhere alike has p = 1.

    >>> masses = [torch.tensor([[0.9, 0.2], [0.1, 0.2], [0.1, 0.2], [0.1, 0.2]])] * 8
    >>> region_permutation_test(masses, n_resamples=999).tolist()
    [0.001, 1.0]
    """
    masses = listed("masses", masses, "a list of tensors [region, head], one for each example", least=1)
    for at, own in enumerate(masses):
        if not isinstance(own, Tensor) or own.ndim != 2 or not own.numel():
            raise InvalidTypeError(f"masses[{at}] is {shown(own)}; expected a tensor [region, head]")
    n_resamples = whole_number("n_resamples", n_resamples, least=1)
    rng = np.random.default_rng(seed_of(seed))
    sums = np.zeros((n_resamples, masses[0].shape[1]))
    reached = np.zeros(masses[0].shape[1])
    for own in masses:
        values = own.double().numpy()
        reached += values[0]
        sums += values[rng.integers(len(values), size=n_resamples)]
    at_least = sums >= reached - 1e-6 * np.abs(reached)
    return (1 + at_least.sum(0)) / (1 + n_resamples)


# ---------------------------------------------------------------------- regions


def other_places(prompt: Prompt, row: int, example: Example) -> list[tuple[Evidence, ...]]:
    """The example's evidence moved, as one rigid shape, to every place of its prompt's images where it fits.

    Boxes move by whole tokens within images of the same size, and from image to image; evidence that is a whole image
    moves to other images alone. Several regions keep their distances, within an image and from image to image. Places
    may overlap the evidence, so that the set of places does not depend on which of them is the true one.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> (example,) = mmlens.scene_examples("objects", 1, seed=0)
    >>> len(other_places(model.prompt_examples([example]), 0, example))  # a 2 x 1 box in 6 x 6 tokens
    29
    """
    sizes = example.images.sizes
    numbers = [region.of_image for region in example.evidence]
    boxes = [region.box for region in example.evidence if region.box is not None]
    across, down = [0.0], [0.0]
    if boxes:
        width, height = sizes[numbers[0]]
        step_x, step_y = _token_size(prompt, row, example)
        across = _steps(min(box[0] for box in boxes), width - max(box[2] for box in boxes), step_x)
        down = _steps(min(box[1] for box in boxes), height - max(box[3] for box in boxes), step_y)
    places = []
    for further in range(-min(numbers), len(sizes) - max(numbers)):
        moved = [number + further for number in numbers]
        if boxes and any(sizes[new] != sizes[numbers[0]] for new in [*moved, *numbers]):
            continue
        for x, y in itertools.product(across, down):
            if (further, x, y) != (0, 0, 0):
                places.append(tuple(_moved(region, further, x, y) for region in example.evidence))
    return places


def _steps(before: float, after: float, step: float) -> list[float]:
    """Whole steps that keep within `before` to one side and `after` to the other."""
    return [step * k for k in range(-int(before / step + 1e-6), int(after / step + 1e-6) + 1)]


def _moved(region: Evidence, images: int, x: float, y: float) -> Evidence:
    if region.box is None:
        return Evidence(region.of_image + images)
    left, top, right, bottom = region.box
    return Evidence(region.of_image + images, (left + x, top + y, right + x, bottom + y))


def _token_size(prompt: Prompt, row: int, example: Example) -> tuple[float, float]:
    """Width and height in pixels of the smallest of the evidence's tokens."""
    at = region_tokens(prompt, row, example.evidence, "merged")
    boxes = prompt.token_map.boxes[row][at]
    sizes = boxes[:, 2:] - boxes[:, :2]
    sizes = sizes[(sizes > 0).all(-1)]
    if not len(sizes):
        raise InvalidValueError(f"example {example.id!r}: the evidence's tokens show no pixels of their own")
    return float(sizes[:, 0].min()), float(sizes[:, 1].min())


def _masks(
    prompt: Prompt,
    row: int,
    example: Example,
    regions: Regions | None,
    max_regions: int,
    seed: int,
    mapping: BoxMapping,
) -> Bool[Tensor, "region pos"]:
    """The evidence's tokens first, then those of the other regions of as many tokens."""
    evidence = region_tokens(prompt, row, example.evidence, mapping)
    others = (
        other_places(prompt, row, example) if regions is None else [tuple(each) for each in regions(example)]
    )
    if len(others) >= max_regions:
        # The draw is by place, not by the example's rank in the data nor by how far its batch is padded.
        place = int(evidence[~prompt.token_map.is_padding[row]].int().argmax())
        rng = np.random.default_rng([seed, place, len(others)])
        others = [others[i] for i in rng.choice(len(others), max_regions - 1, replace=False)]
    kept = {tuple(evidence.nonzero().flatten().tolist()): evidence}
    for other in others:
        try:
            mask = region_tokens(prompt, row, other, mapping)
        except TokenMapError:
            if regions is not None:
                raise
            # Pixels that the processor crops away.
            continue
        if mask.sum() == evidence.sum():
            kept.setdefault(tuple(mask.nonzero().flatten().tolist()), mask)
    if len(kept) < 2:
        raise InvalidValueError(
            f"example {example.id!r}: of {len(others)} other region(s) none covers {int(evidence.sum())} token(s), as "
            "its evidence does, elsewhere; give regions=..., or leave the example out"
        )
    return torch.stack(list(kept.values()))


def _mass_of_regions(
    model: HookedVLM, prompt: Prompt, queries: Positions, masks: Sequence[Bool[Tensor, "_ pos"]]
) -> list[Float[Tensor, "_ layer head"]]:
    """RAM of every region of every row of the prompt."""
    most = max(map(len, masks))
    padded = torch.stack([torch.cat([own, own.new_zeros(most - len(own), own.shape[1])]) for own in masks])

    def mass_of(rows: Rows, query_mask: Bool[Tensor, "batch query"]) -> Float[Tensor, "batch head region"]:
        mean = mean_of_rows(rows, query_mask)
        return torch.einsum("bhk,brk->bhr", mean, padded.to(mean.device, mean.dtype))

    mass = read_heads(model, prompt, queries, mass_of).movedim(-1, 1)
    return [mass[row, : len(own)] for row, own in enumerate(masks)]
