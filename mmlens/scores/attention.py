"""Head scores akin to RAM that read where the question or the last token looks, and RAM's corrected forms.

| function | score of a head | source |
|---|---|---|
| `null_calibrated_ram` | RAM minus RAM under a null question | arXiv 2605.27243 |
| `query_focused_score` | the same per token of whole documents, low outliers dropped | arXiv 2506.09944 |
| `gaze_score` | attention of the prompt's last token to the evidence | arXiv 2606.14703 |
| `ram_per_token` | RAM / number of evidence tokens | RAM corrected for the size of the evidence |
| `ram_lift` | RAM minus the mean RAM of regions of the same shape elsewhere | RAM against its own chance level |

Each takes (model, examples) and gives HeadScores with one score per example, as `mmlens.scores.retrieval.ram` does,
and reads nothing but rows of the pattern. The other relatives: what heads copy while decoding
(decoding.py), how compactly they look (spatial.py), what they write (logits.py).
`half_mass_share` says how few heads hold half of a score.

Arguments and errors that the functions share with `ram` are described there; the docstrings here name what is theirs.
Where a source's code was read, "stated" is what paper or code says and "our reading" what they leave open.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmlens.arguments import fraction_of, instance_of, number, one_of, shown, text, whole_number
from mmlens.data.examples import Evidence, Example
from mmlens.errors import InvalidTypeError, InvalidValueError
from mmlens.head_scores import HeadScores
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.prompt import Prompt, UnknownWordWarning
from mmlens.scores.retrieval import attention_mass, mean_of_rows
from mmlens.scores.rows import (
    LayerBuffer,
    Rows,
    kinds_of_examples,
    prompts_of,
    read_rows,
    real_positions,
    scored_examples,
)
from mmlens.token_map import BoxMapping, TokenMap

NULL_QUESTION = "N/A"
"""The null query of arXiv 2605.27243 and 2506.09944."""

Region = Literal["evidence", "images"]
"""The evidence itself (boxes), or every token of the images that hold it."""


def null_calibrated_ram(
    model: HookedVLM,
    examples: Sequence[Example],
    *,
    null_question: str = NULL_QUESTION,
    batch_size: int = 8,
    mapping: BoxMapping = "merged",
    progress: bool = True,
) -> HeadScores:
    """The multimodal retrieval head's score: RAM minus RAM with `null_question` in the question's place.

    Source: arXiv 2605.27243 ("N/A" is stated; that the null's own tokens are the queries then is our reading). What a
    head gives the evidence whatever is asked is taken away, so scores lie in -1 to 1. Two forward passes; the
    evidence of the null prompt is found in its own token map. A tokenizer may not know "N/A", or read it as words
    that are in the images: look at model.to_str_tokens("N/A") first.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> examples = mmlens.scene_examples("objects", 2, seed=0)
    >>> null_calibrated_ram(model, examples, null_question="?", progress=False)
    HeadScores(null-calibrated RAM: 8 layers x 8 heads, 2 examples)
    """
    examples = scored_examples(model, examples, batch_size, progress, mapping)
    text("null_question", null_question)
    per_example = torch.empty(len(examples), *model.grid.shape)
    pairs = _with_null_prompts(model, examples, null_question, batch_size, progress, "null-calibrated RAM")
    for chosen, prompt, null in pairs:
        batch = [examples[i] for i in chosen]
        asked, unasked = (
            attention_mass(
                model,
                each,
                each.token_map.is_question,
                each.token_map.evidence(batch, mapping=mapping),
            )
            for each in (prompt, null)
        )
        per_example[chosen] = asked - unasked
    return HeadScores(per_example, "null-calibrated RAM", kinds_of_examples(examples), model.grid)


def query_focused_score(
    model: HookedVLM,
    examples: Sequence[Example],
    *,
    null_question: str | None = NULL_QUESTION,
    cut: float | None = 2.0,
    region: Region = "images",
    batch_size: int = 8,
    mapping: BoxMapping = "merged",
    progress: bool = True,
) -> HeadScores:
    """The query-focused retrieval head's score (QRHead), with the prompt's images as its documents.

    Attention to every visual token, averaged over the question's tokens, minus the same under `null_question` (None:
    no null); within each document the tokens below mean - `cut` standard deviations (of n - 1; None: no cut) are
    dropped; the rest is summed over the documents that hold evidence.

    Source: arXiv 2506.09944, formula and published code. Our reading: a document is an image (page, frame), learnt
    separators included; its query span also holds the instruction and the template's end, ours the question alone.
    region="evidence" sums over the evidence's tokens only, which makes a difference where one image holds evidence and
    distractors.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> examples = mmlens.scene_examples("images", 2, seed=0)
    >>> query_focused_score(model, examples, null_question="?", progress=False).values.shape
    torch.Size([8, 8])
    """
    examples = scored_examples(model, examples, batch_size, progress, mapping)
    one_of("region", region, get_args(Region))
    if null_question is not None:
        text("null_question", null_question, "a text, or None for no null,")
    cut = None if cut is None else number("cut", cut, least=0)
    per_example = torch.empty(len(examples), *model.grid.shape)
    pairs = (
        ((chosen, prompt, None) for chosen, prompt in prompts_of(model, examples, batch_size, progress, "QR"))
        if null_question is None
        else _with_null_prompts(model, examples, null_question, batch_size, progress, "QR")
    )
    for chosen, prompt, null in pairs:
        batch = [examples[i] for i in chosen]
        keys = _region_tokens(prompt.token_map, batch, region, mapping).cpu()
        images = prompt.token_map.image.cpu()
        asked = _attention_to_images(model, prompt)
        unasked = None if null is None else _attention_to_images(model, null)
        scores = LayerBuffer(model, len(prompt))
        for layer, of_layer in asked.items():
            rows = []
            for row, attention in enumerate(of_layer):
                calibrated = attention if unasked is None else attention - unasked[layer][row]
                is_image = prompt.token_map.is_image[row].cpu()
                rows.append(
                    _sum_of_documents(calibrated, images[row][is_image], keys[row][is_image], cut=cut)
                )
            scores.put(layer, torch.stack(rows))
        per_example[chosen] = scores.take()
    return HeadScores(per_example, "query-focused score", kinds_of_examples(examples), model.grid)


def gaze_score(
    model: HookedVLM,
    examples: Sequence[Example],
    *,
    region: Region = "evidence",
    batch_size: int = 8,
    mapping: BoxMapping = "merged",
    progress: bool = True,
) -> HeadScores:
    """The gaze head's score: the attention of the prompt's last token, summed over the evidence.

    Source: arXiv 2606.14703 and its code: raw mass, not divided by what all images get, on the panel that the prompt
    asks about. Our reading: the evidence is that panel; region="images" takes whole images that hold evidence.
    Heads are turned towards positions by `mmlens.bias_attention`.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> scores = gaze_score(model, mmlens.scene_examples("objects", 2, seed=0), progress=False)
    >>> bool(((scores.values >= 0) & (scores.values <= 1.001)).all())
    True
    """
    examples = scored_examples(model, examples, batch_size, progress, mapping)
    one_of("region", region, get_args(Region))
    per_example = torch.empty(len(examples), *model.grid.shape)
    for chosen, prompt in prompts_of(model, examples, batch_size, progress, "gaze"):
        keys = _region_tokens(prompt.token_map, [examples[i] for i in chosen], region, mapping)
        per_example[chosen] = attention_mass(model, prompt, prompt.last, keys)
    return HeadScores(per_example, "gaze score", kinds_of_examples(examples), model.grid)


def ram_per_token(
    model: HookedVLM,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    mapping: BoxMapping = "merged",
    progress: bool = True,
) -> HeadScores:
    """RAM / |V*|: the mean attention per evidence token, which no longer grows with the size of the evidence.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> ram_per_token(model, mmlens.scene_examples("frames", 2, seed=0), progress=False)
    HeadScores(RAM per token: 8 layers x 8 heads, 2 examples)
    """
    examples = scored_examples(model, examples, batch_size, progress, mapping)
    per_example = torch.empty(len(examples), *model.grid.shape)
    for chosen, prompt in prompts_of(model, examples, batch_size, progress, "RAM per token"):
        evidence = prompt.token_map.evidence([examples[i] for i in chosen], mapping=mapping)
        mass = attention_mass(model, prompt, prompt.token_map.is_question, evidence)
        per_example[chosen] = mass / evidence.sum(-1).cpu()[:, None, None]
    return HeadScores(per_example, "RAM per token", kinds_of_examples(examples), model.grid)


def ram_lift(
    model: HookedVLM,
    examples: Sequence[Example],
    *,
    shape: Literal["same", "any"] = "same",
    batch_size: int = 8,
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
    examples = scored_examples(model, examples, batch_size, progress, mapping)
    one_of("shape", shape, ("same", "any"))
    per_example = torch.empty(len(examples), *model.grid.shape)
    for chosen, prompt in prompts_of(model, examples, batch_size, progress, "RAM lift"):
        batch = [examples[i] for i in chosen]
        evidence = prompt.token_map.evidence(batch, mapping=mapping)
        fakes = [
            _fake_of(prompt.token_map, evidence, row, example, shape) for row, example in enumerate(batch)
        ]
        contrast = evidence.cpu().float() - torch.stack(fakes)
        lift = LayerBuffer(model, len(prompt))

        def consume(
            layer: int,
            rows: Rows,
            real: Bool[Tensor, "batch query"],
            contrast: Tensor = contrast,
            lift: LayerBuffer = lift,
        ) -> None:
            mean = mean_of_rows(rows, real)
            lift.put(layer, torch.einsum("bhk,bk->bh", mean, contrast.to(mean.device)))

        read_rows(model, prompt, prompt.token_map.is_question, real_positions(prompt), consume)
        per_example[chosen] = lift.take()
    return HeadScores(per_example, "RAM lift", kinds_of_examples(examples), model.grid)


def fake_region(
    token_map: TokenMap,
    evidence: Bool[Tensor, " pos"],
    example: int = 0,
    *,
    shape: Literal["same", "any"] = "same",
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


def half_mass_share(scores: HeadScores, share: float = 0.5) -> float:
    """rho: the smallest fraction of all heads that holds `share` of the sum of the positive scores.

    Source: rho_0.5 of arXiv 2605.27243, which heads' means over examples enter. 0.05 is a sparse score; half of the
    share of heads with a positive score is the most there can be (all positive scores equal).

    Raises ValueError for a share outside (0, 1], and where no score is positive.

    >>> half_mass_share(HeadScores(torch.tensor([[[5.0, 2.0, 1.0, 1.0, -9.0]]])))  # 5 of 9
    0.2
    """
    instance_of("scores", scores, HeadScores, "HeadScores")
    share = fraction_of("share", share)
    values = scores.values[scores.grid.exists].double()
    positive = values.clamp(min=0).sort(descending=True).values
    if not bool(positive[0] > 0):
        raise InvalidValueError(f"{scores.name}: no head has a positive score, so there is no mass to share")
    held = positive.cumsum(0)
    # A sum that should meet the share exactly may miss it by rounding.
    n = int((held < share * held[-1] * (1 - 1e-12)).sum()) + 1
    return n / len(values)


# ---------------------------------------------------------------------- plumbing


def _with_null_prompts(
    model: HookedVLM,
    examples: Sequence[Example],
    null_question: str,
    batch_size: int,
    progress: bool,
    label: str,
) -> Iterator[tuple[list[int], Prompt, Prompt]]:
    """Batches of examples, each with its prompt and the prompt of the null question about the same images."""
    unasked = [replace(example, question=null_question) for example in examples]
    # Batches are by image size, so both have the same.
    nulls = prompts_of(model, unasked, batch_size, False, label)
    for chosen, prompt in prompts_of(model, examples, batch_size, progress, label):
        with warnings.catch_warnings():
            # A null question asks for nothing, so its words need not be known.
            warnings.simplefilter("ignore", UnknownWordWarning)
            _, null = next(nulls)
        yield chosen, prompt, null


def _attention_to_images(
    model: HookedVLM, prompt: Prompt
) -> dict[int, list[Float[Tensor, "head image_token"]]]:
    """Layer -> for each example, the question's mean attention to every visual token in prompt order."""
    read: dict[int, list[Tensor]] = {}

    def consume(layer: int, rows: Rows, real: Bool[Tensor, "batch query"]) -> None:
        mean = mean_of_rows(rows, real).cpu()
        read[layer] = [mean[row][:, prompt.token_map.is_image[row].cpu()] for row in range(len(mean))]

    read_rows(model, prompt, prompt.token_map.is_question, real_positions(prompt), consume)
    return read


def _sum_of_documents(
    attention: Float[Tensor, "head image_token"],
    document: Tensor,
    keys: Bool[Tensor, " image_token"],
    *,
    cut: float | None,
) -> Float[Tensor, " head"]:
    total = attention.new_zeros(len(attention))
    for page in document[keys].unique().tolist():
        inside = document == page
        tokens = attention[:, inside]
        if cut is not None and tokens.shape[1] > 1:
            low = tokens.mean(-1, keepdim=True) - cut * tokens.std(-1, keepdim=True)
            tokens = tokens.masked_fill(tokens < low, 0)
        total += (tokens * keys[inside]).sum(-1)
    return total


def _region_tokens(
    token_map: TokenMap, examples: Sequence[Example], region: Region, mapping: BoxMapping
) -> Bool[Tensor, "batch pos"]:
    if region == "evidence":
        return token_map.evidence(examples, mapping=mapping)
    return token_map.evidence([[Evidence(part.image) for part in example.evidence] for example in examples])


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


def _fake_of(
    token_map: TokenMap,
    evidence: Bool[Tensor, "batch pos"],
    row: int,
    example: Example,
    shape: Literal["same", "any"],
) -> Float[Tensor, " pos"]:
    """`fake_region`, whose errors say which example it was."""
    try:
        return fake_region(token_map, evidence[row], row, shape=shape)
    except ValueError as error:
        raise InvalidValueError(f"example {example.id!r}: {error}") from error
