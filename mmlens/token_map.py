"""Which positions of a prompt are which pixels.

An `ImageGrid` says what every visual token of one image is; a `TokenMap` says it for every position of a
batch. Boxes are (left, top, right, bottom) in pixels of the ORIGINAL image, right and bottom exclusive,
whatever the processor did in between (resizing, padding, cropping, tiling).
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmlens.arguments import device_of, listed, number, shown, whole_number
from mmlens.errors import InvalidTypeError, InvalidValueError, OutOfRangeError

Box = tuple[float, float, float, float]
BoxMapping = Literal["merged", "paper_floor"]
MAPPINGS: tuple[BoxMapping, ...] = ("merged", "paper_floor")

WHOLE_IMAGE_TILE = 0
"""The tile that shows the whole image: the only one of an untiled layout; in a tiled layout the base view,
thumbnail or global image. Crops are numbered from 1, row by row."""

NO_PATCH = -1
"""Image, tile, row and column of what has none: text, padding; row and column of separators."""

SLIVER = 0.01
"""Pixels of overlap that do not count, so that rounded box edges match no neighbour."""


class TokenMapError(InvalidValueError):
    """A region or layout that cannot be mapped to positions."""


@runtime_checkable
class Region(Protocol):
    """What `Evidence` is: an image's number in its prompt and a box, or None for the whole image."""

    @property
    def image(self) -> int: ...

    @property
    def box(self) -> Box | None: ...


@runtime_checkable
class HasEvidence(Protocol):
    """What `Example` is, as far as a token map reads it."""

    @property
    def evidence(self) -> Sequence[Region]: ...


@dataclass(frozen=True)
class ImageGrid:
    """What each visual token of one image is, in the order in which the tokens stand in the prompt.

    `size` is the original image's (width, height). A separator (a learnt newline) has tile, row, column -1 and
    a NaN box; a learnt query, which reads a whole tile, has its tile, but row, column -1 and a NaN box; a token
    that shows only padding has a box of no area. `patches` is the (rows, columns) grid of
    single patches where every token is a 2 x 2 block of ONE such grid (Qwen), else None.
    """

    size: tuple[int, int]
    tile: Int[np.ndarray, " token"]
    row: Int[np.ndarray, " token"]
    column: Int[np.ndarray, " token"]
    boxes: Float[np.ndarray, "token 4"]
    patches: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.tile)


@dataclass(frozen=True)
class Place:
    """What stands at one position. `image` is None for text and padding; `box` None where there is no patch."""

    kind: Literal["text", "question", "answer", "padding", "patch", "query", "separator"]
    image: int | None = None
    tile: int | None = None
    row: int | None = None
    col: int | None = None
    box: Box | None = None


@dataclass(frozen=True)
class TokenMap:
    """For every position of a batch: text, or image, tile, row, column and box in original pixels.

    `image`, `tile`, `row`, `col` are -1 where there is none. Images count from 0 within their example; see
    WHOLE_IMAGE_TILE for tiles. A learnt separator belongs to its image (`is_image`, `image`) but is no patch:
    tile, row and col -1, box NaN. A learnt query has its tile, but row and col -1 and a NaN box.

    >>> token_map = text_only_map(torch.tensor([[0, 1, 1]]), torch.tensor([[False, False, True]]))
    >>> token_map.where(2).kind
    'question'
    >>> token_map.image_tokens(0)
    Traceback (most recent call last):
        ...
    mmlens.errors.OutOfRangeError: image 0 of example 0: the example has no image
    """

    image: Int[Tensor, "batch pos"]
    tile: Int[Tensor, "batch pos"]
    row: Int[Tensor, "batch pos"]
    col: Int[Tensor, "batch pos"]
    boxes: Float[Tensor, "batch pos 4"]
    is_image: Bool[Tensor, "batch pos"]
    is_padding: Bool[Tensor, "batch pos"]
    is_question: Bool[Tensor, "batch pos"]
    is_answer: Bool[Tensor, "batch pos"]
    """What follows the prompt: see `Prompt.continued`."""
    grids: tuple[tuple[ImageGrid, ...], ...]
    """The images of each example, in prompt order."""

    @classmethod
    def from_grids(
        cls,
        is_image: Bool[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"],
        is_question: Bool[Tensor, "batch pos"],
        grids: Sequence[Sequence[ImageGrid]],
    ) -> TokenMap:
        """Lay each example's grids over its visual positions, in order.

        Raises TokenMapError where an example has another number of visual positions than its grids predict.
        """
        batch, length = is_image.shape
        if len(grids) != batch:
            raise TokenMapError(f"grids for {len(grids)} example(s), but the batch has {batch}")
        columns = {name: torch.full((batch, length), NO_PATCH) for name in ("image", "tile", "row", "col")}
        boxes = torch.full((batch, length, 4), torch.nan)
        mask = is_image.cpu()
        for example, own in enumerate(grids):
            found, predicted = int(mask[example].sum()), sum(len(grid) for grid in own)
            if found != predicted:
                raise TokenMapError(
                    f"example {example}: input_ids holds {found} image token(s), but the layout of its "
                    f"{len(own)} image(s) of size {[grid.size for grid in own]} predicts {predicted} "
                    f"({[len(grid) for grid in own]} per image); was the image resized or the prompt cut "
                    "after it was processed?"
                )
            if not own:
                continue
            at = mask[example]
            numbers = np.repeat(np.arange(len(own)), [len(grid) for grid in own])
            for name, values in (
                ("image", numbers),
                ("tile", np.concatenate([grid.tile for grid in own])),
                ("row", np.concatenate([grid.row for grid in own])),
                ("col", np.concatenate([grid.column for grid in own])),
            ):
                columns[name][example, at] = torch.as_tensor(values)
            boxes[example, at] = torch.as_tensor(
                np.concatenate([grid.boxes for grid in own]), dtype=boxes.dtype
            )
        return cls(
            **columns,
            boxes=boxes,
            is_image=mask,
            is_padding=attention_mask.cpu() == 0,
            is_question=is_question.cpu(),
            is_answer=torch.zeros_like(mask),
            grids=tuple(tuple(own) for own in grids),
        )

    def __len__(self) -> int:
        return self.image.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the arrays are."""
        return self.image.device

    def to(self, device: torch.device | str) -> TokenMap:
        """The same map with its arrays on `device`."""
        device = device_of(device)
        moved = {
            field.name: getattr(self, field.name).to(device)
            for field in dataclasses.fields(self)
            if field.name != "grids"
        }
        return TokenMap(**moved, grids=self.grids)

    # ------------------------------------------------------------------ regions -> positions

    def image_tokens(self, image: int, *, example: int = 0) -> Bool[Tensor, "batch pos"]:
        """Every position of one image, its separators included; all other examples are False.

        Raises IndexError where the batch has no such example, or the example no such image.
        """
        image, _ = self._grid(image, example)
        selected = torch.zeros_like(self.is_image)
        selected[example] = self.image[example] == image
        return selected

    def page(self, page: int, *, example: int = 0) -> Bool[Tensor, "batch pos"]:
        """`image_tokens`, where the images are pages of a document."""
        return self.image_tokens(page, example=example)

    def frame(self, frame: int, *, example: int = 0) -> Bool[Tensor, "batch pos"]:
        """`image_tokens`, where the images are frames of a clip."""
        return self.image_tokens(frame, example=example)

    def box(
        self, image: int, box: Sequence[float], *, example: int = 0, mapping: BoxMapping = "merged"
    ) -> Bool[Tensor, "batch pos"]:
        """Positions whose own box overlaps `box` = (left, top, right, bottom) in the original image's pixels.

        In a tiled layout these are positions of the crops and of the whole-image view. mapping="paper_floor"
        is the CoRe-head paper's rule instead (arXiv 2606.05843, Eq. 2-5): both ends of the box inclusive in
        the grid of single patches, then floor(patch index / 4), which is NOT where 2 x 2 merging puts them.

        Raises TokenMapError for a box that is empty, leaves its image or is scaled to 0 to 1, for one that meets no
        token (pixels that were cropped away), where the image's tokens are learnt queries, and for "paper_floor"
        where tokens are not 2 x 2 blocks of one grid.
        """
        image, grid = self._grid(image, example)
        left, top, right, bottom = checked_box(box, grid.size, f"image {image} of example {example}")
        if not len(grid):
            raise TokenMapError(
                f"image {image} of example {example} has no position in the prompt: cross-attention reads it, and its "
                "patches are keys of the cross-attention layers"
            )
        if (grid.row == NO_PATCH).all():
            raise TokenMapError(
                f"image {image} of example {example}: its {len(grid)} tokens are learnt queries that each read a "
                "whole view, so no box maps to some of them; take image_tokens(...), or evidence without a box"
            )
        if mapping_of(mapping) == "merged":
            edges = self.boxes[example].nan_to_num(nan=-1.0)
            overlap_x = edges[:, 2].clamp(max=right) - edges[:, 0].clamp(min=left)
            overlap_y = edges[:, 3].clamp(max=bottom) - edges[:, 1].clamp(min=top)
            hit = (self.image[example] == image) & (overlap_x > SLIVER) & (overlap_y > SLIVER)
        else:
            hit = self._paper_floor(image, example, grid, (left, top, right, bottom))
        if not bool(hit.any()):
            raise TokenMapError(
                f"the box {tuple(box)} of image {image} of example {example} maps to no token: the processor "
                f"shows the model only {self._shown(image, example)} of the image's {grid.size[0]} x {grid.size[1]} "
                "pixels"
            )
        selected = torch.zeros_like(self.is_image)
        selected[example] = hit
        return selected

    def evidence(
        self,
        evidence: HasEvidence | Sequence[HasEvidence | Region | Sequence[Region]],
        *,
        mapping: BoxMapping = "merged",
    ) -> Bool[Tensor, "batch pos"]:
        """The union of each example's evidence regions, one row per example.

        Takes examples, or lists of Evidence, one per batch row; for a batch of one also the example or the
        list itself. A region without a box is its whole image, separators included.

        Raises TokenMapError where their number is not the batch's, or a row has no evidence, and as `box`.
        """
        rows = _evidence_rows(evidence)
        if len(rows) != len(self):
            raise TokenMapError(f"evidence for {len(rows)} example(s), but the batch has {len(self)}")
        selected = torch.zeros_like(self.is_image)
        for example, regions in enumerate(rows):
            if not regions:
                raise TokenMapError(f"example {example} has no evidence, so it maps to no token")
            for region in regions:
                if region.box is None:
                    selected |= self.image_tokens(region.image, example=example)
                else:
                    selected |= self.box(region.image, region.box, example=example, mapping=mapping)
        return selected

    # ------------------------------------------------------------------ positions -> regions

    def where(self, position: int, example: int = 0) -> Place:
        """What stands at a position (negative: from the end).

        Raises IndexError where the batch has no such example or the prompt no such position.
        """
        self._check_example(example)
        position = whole_number("position", position)
        length = self.image.shape[1]
        if not -length <= position < length:
            raise OutOfRangeError(
                f"position {position} is outside the prompt of {length} positions (0 to {length - 1})"
            )
        at = (example, position)
        if not bool(self.is_image[at]):
            kind: Literal["text", "question", "answer", "padding"] = "text"
            if bool(self.is_padding[at]):
                kind = "padding"
            elif bool(self.is_question[at]):
                kind = "question"
            elif bool(self.is_answer[at]):
                kind = "answer"
            return Place(kind)
        if int(self.row[at]) == NO_PATCH:
            image, tile = int(self.image[at]), int(self.tile[at])
            return Place("separator", image) if tile == NO_PATCH else Place("query", image, tile)
        left, top, right, bottom = self.boxes[at].tolist()
        return Place(
            "patch",
            image=int(self.image[at]),
            tile=int(self.tile[at]),
            row=int(self.row[at]),
            col=int(self.col[at]),
            box=(left, top, right, bottom),
        )

    def labels(self, example: int = 0) -> list[str | None]:
        """A name for every visual position of an example, None at text and padding.

        "<img0 r2c3>" is row 2, column 3 of image 0; "<img0 t1 r2c3>" of its tile 1, where an image has several;
        "<img0 t1 q5>" the tile's query 5; "<img0 sep>" a learnt separator.

        >>> text_only_map(torch.tensor([[1, 1]]), torch.tensor([[False, True]])).labels()
        [None, None]
        """
        self._check_example(example)
        columns = (self.image, self.tile, self.row, self.col)
        places = zip(*(column[example].tolist() for column in columns), strict=True)
        tiled = [bool((grid.tile > WHOLE_IMAGE_TILE).any()) for grid in self.grids[example]]
        n_queries: dict[tuple[int, int], int] = {}
        names: list[str | None] = []
        for image, tile, row, col in places:
            prefix = f"img{image} t{tile}" if image >= 0 and tiled[image] else f"img{image}"
            if image == NO_PATCH:
                names.append(None)
            elif row != NO_PATCH:
                names.append(f"<{prefix} r{row}c{col}>")
            elif tile == NO_PATCH:
                names.append(f"<img{image} sep>")
            else:
                number = n_queries.get((image, tile), 0)
                n_queries[image, tile] = number + 1
                names.append(f"<{prefix} q{number}>")
        return names

    def to_pandas(self) -> pd.DataFrame:
        """One row per example and position: the arrays of the map as columns."""
        batch, length = self.image.shape
        table = {
            "example": np.repeat(np.arange(batch), length),
            "position": np.tile(np.arange(length), batch),
        }
        for name in ("image", "tile", "row", "col"):
            table[name] = getattr(self, name).cpu().numpy().reshape(-1)
        edges = self.boxes.cpu().numpy().reshape(-1, 4)
        table |= {name: edges[:, i] for i, name in enumerate(("left", "top", "right", "bottom"))}
        for name in ("is_image", "is_padding", "is_question", "is_answer"):
            table[name] = getattr(self, name).cpu().numpy().reshape(-1)
        return pd.DataFrame(table)

    # ------------------------------------------------------------------ plumbing

    def _check_example(self, example: int) -> None:
        example = whole_number("example", example)
        if not 0 <= example < len(self):
            raise OutOfRangeError(
                f"example {example}: the batch has {len(self)} example(s), 0 to {len(self) - 1}"
            )

    def _grid(self, image: int, example: int) -> tuple[int, ImageGrid]:
        """The number of an image of an example, checked, and its grid."""
        self._check_example(example)
        image, own = whole_number("image", image), self.grids[example]
        if not 0 <= image < len(own):
            there = f"{len(own)} image(s), 0 to {len(own) - 1}" if own else "no image"
            raise OutOfRangeError(f"image {image} of example {example}: the example has {there}")
        return image, own[image]

    def _shown(self, image: int, example: int) -> str:
        edges = self.boxes[example][self.image[example] == image]
        edges = edges[(edges[:, 2] > edges[:, 0]) & (edges[:, 3] > edges[:, 1])]
        if not len(edges):
            return "none"
        low, high = edges[:, :2].amin(0).tolist(), edges[:, 2:].amax(0).tolist()
        return f"({low[0]:g}, {low[1]:g}, {high[0]:g}, {high[1]:g})"

    def _paper_floor(self, image: int, example: int, grid: ImageGrid, box: Box) -> Bool[Tensor, " pos"]:
        if grid.patches is None:
            raise TokenMapError(
                "mapping='paper_floor' is defined only where every token is a 2 x 2 block of one grid of patches "
                "(the Qwen-VL families, merge_size 2); use mapping='merged' here"
            )
        rows, columns = grid.patches
        width, height = grid.size
        left, right = (min(int(x * columns // width), columns - 1) for x in (box[0], box[2]))
        top, bottom = (min(int(y * rows // height), rows - 1) for y in (box[1], box[3]))
        patches = (torch.arange(top, bottom + 1)[:, None] * columns + torch.arange(left, right + 1)).flatten()
        hit = torch.zeros_like(self.is_image[example])
        positions = torch.nonzero(self.image[example] == image).flatten()
        hit[positions[(patches // 4).unique().to(positions.device)]] = True
        return hit


def mapping_of(value: object) -> BoxMapping:
    """How boxes become tokens: "merged" or "paper_floor"; TokenMapError for anything else.

    >>> mapping_of("paper")
    Traceback (most recent call last):
        ...
    mmlens.token_map.TokenMapError: mapping is 'merged' or 'paper_floor', not 'paper'
    """
    for mapping in MAPPINGS:
        if isinstance(value, str) and value == mapping:
            return mapping
    raise TokenMapError(f"mapping is 'merged' or 'paper_floor', not {value!r}")


def text_only_map(
    attention_mask: Int[Tensor, "batch pos"], is_question: Bool[Tensor, "batch pos"] | None = None
) -> TokenMap:
    """The token map of a batch without images.

    >>> text_only_map(torch.tensor([[0, 1, 1]])).is_padding.tolist()
    [[True, False, False]]
    """
    nothing = torch.zeros(attention_mask.shape, dtype=torch.bool)
    question = nothing.clone() if is_question is None else is_question
    return TokenMap.from_grids(nothing, attention_mask, question, [()] * attention_mask.shape[0])


def _evidence_rows(
    evidence: HasEvidence | Sequence[HasEvidence | Region | Sequence[Region]],
) -> list[Sequence[Region]]:
    expected = "an example, a list of examples, or a list of Evidence for each"
    if isinstance(evidence, HasEvidence):
        return [evidence.evidence]
    entries = listed("evidence", evidence, expected)
    if entries and isinstance(entries[0], Region):
        entries = [entries]
    rows = []
    for at, entry in enumerate(entries):
        own = entry.evidence if isinstance(entry, HasEvidence) else listed(f"evidence[{at}]", entry, expected)
        for region in own:
            if not isinstance(region, Region):
                raise InvalidTypeError(
                    f"a region of evidence[{at}] is {shown(region)}; expected Evidence(image, box): "
                    f"evidence is {expected}"
                )
        rows.append(own)
    return rows


def box_of(name: str, value: object) -> Box:
    """Four plain numbers (left, top, right, bottom); of which image, and whether they fit it, is not looked at.

    >>> box_of("box", [0, 0, np.float64(16.5), 8])
    (0, 0, 16.5, 8)
    """
    expected = "a box (left, top, right, bottom) in pixels"
    sides = listed(name, value, expected)
    if len(sides) != 4:
        raise TokenMapError(f"{name}: a box is (left, top, right, bottom), not {tuple(sides)}")
    for side, given in zip(("left", "top", "right", "bottom"), sides, strict=True):
        if isinstance(given, numbers.Real) and not math.isfinite(given):
            raise TokenMapError(
                f"{name}: the box {tuple(sides)} is not a box (left, top, right, bottom) of finite numbers"
            )
        number(f"{side} of {name} {tuple(sides)}", given)
    left, top, right, bottom = (side.item() if hasattr(side, "item") else side for side in sides)
    return left, top, right, bottom


def checked_box(box: Sequence[float], size: tuple[int, int], where: str) -> Box:
    """`box`, if it is a box of positive area inside an image of `size` = (width, height) and in pixels.

    Raises TokenMapError for any other, and for one that lies within (0, 0, 1, 1) of an image of more than 2 pixels:
    that is a box scaled to 0 to 1, which would choose one pixel.
    """
    width, height = size
    left, top, right, bottom = box = box_of(where, box)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        nearest = (
            max(0, min(left, right)),
            max(0, min(top, bottom)),
            min(width, max(left, right)),
            min(height, max(top, bottom)),
        )
        hint = (
            f"; the nearest box inside is {nearest}"
            if nearest[0] < nearest[2] and nearest[1] < nearest[3]
            else ""
        )
        raise TokenMapError(
            f"{where}: the box {tuple(box)} is not a box (left, top, right, bottom) inside the image of "
            f"{width} x {height} pixels{hint}"
        )
    if right <= 1 and bottom <= 1 and max(size) > 2:
        scaled = tuple(
            round(edge * side, 2) for edge, side in zip((left, top, right, bottom), 2 * size, strict=True)
        )
        raise TokenMapError(
            f"{where}: the box {tuple(box)} is scaled to 0 to 1, and boxes are in pixels of the original image, "
            f"{width} x {height}: multiplied by its size it is {scaled}"
        )
    return left, top, right, bottom
