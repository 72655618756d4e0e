"""Which positions of a prompt are which pixels.

An `ImageGrid` says what every visual token of one image is, a `VideoGrid` of one video; a `TokenMap` says it for every
position of a batch. Boxes are (left, top, right, bottom) in pixels of the ORIGINAL image or video, right and bottom
exclusive, whatever the processor did in between (resizing, padding, cropping, tiling). Frames are numbered as in the
original video, whichever of them the processor chose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmlens.arguments import device_of, listed, shown, unknown_name_message, whole_number
from mmlens.boxes import SLIVER, Box, BoxScales, Shown, TokenMapError, checked_box
from mmlens.errors import InvalidTypeError, InvalidValueError, OutOfRangeError

BoxMapping = Literal["merged", "paper_floor"]
MAPPINGS: tuple[BoxMapping, ...] = ("merged", "paper_floor")

WHOLE_IMAGE_TILE = 0
"""The tile that shows the whole image: the only one of an untiled layout; in a tiled layout the base view,
thumbnail or global image. Crops are numbered from 1, row by row."""

NO_PATCH = -1
"""Image, video, frames, tile, row and column of what has none: text, padding; row and column of separators."""


@runtime_checkable
class Region(Protocol):
    """What `Evidence` is: an image or a video by its number in its prompt, frames of the video (None: all of them),
    and a box (None: all of the image)."""

    @property
    def image(self) -> int | None: ...

    @property
    def video(self) -> int | None: ...

    @property
    def frames(self) -> tuple[int, int] | None: ...

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
    single patches where every token is a 2 x 2 block of ONE such grid (Qwen), else None. `resized` is the one picture
    of the image that the model was shown, None where it was shown several (tiles) or the layout does not say.
    """

    size: tuple[int, int]
    tile: Int[np.ndarray, " token"]
    row: Int[np.ndarray, " token"]
    column: Int[np.ndarray, " token"]
    boxes: Float[np.ndarray, "token 4"]
    patches: tuple[int, int] | None = None
    resized: Shown | None = None

    def __len__(self) -> int:
        return len(self.tile)


@dataclass(frozen=True, kw_only=True)
class VideoGrid(ImageGrid):
    """What each visual token of one video is, in the order in which the tokens stand in the prompt.

    A temporal patch is what is seen at once: one frame, or several that the model merges. `size` is that of the frames,
    and every temporal patch has the tiles, rows, columns and boxes of an `ImageGrid`.
    """

    step: Int[np.ndarray, " token"]
    """The number of each token's temporal patch; -1 for a separator."""
    shown: tuple[tuple[int, ...], ...]
    """The original frames that each temporal patch shows, in order."""
    n_frames: int
    """How many frames the original video has."""

    @property
    def frames(self) -> Int[np.ndarray, "token 2"]:
        """The first and the last frame that each token shows; -1 for a separator."""
        ends = np.array([(min(own), max(own)) for own in self.shown] + [(NO_PATCH, NO_PATCH)])
        return ends[self.step]


@dataclass(frozen=True)
class Place:
    """What stands at one position. `image` and `video` are None for text and padding, `box` where there is no patch."""

    kind: Literal["text", "question", "template", "answer", "padding", "patch", "query", "separator"]
    image: int | None = None
    tile: int | None = None
    row: int | None = None
    col: int | None = None
    box: Box | None = None
    video: int | None = None
    frames: tuple[int, int] | None = None
    """The first and the last frame of the original video that a patch of it shows."""
    turn: int | None = None
    role: str | None = None
    part: int | None = None


@dataclass(frozen=True)
class TokenMap(BoxScales):
    """For every position of a batch: text, or image or video, tile, row, column and box in original pixels.

    `is_image` says that a position is visual: of an image or of a video. `image`, `video`, `frames`, `tile`, `row` and
    `col` are -1 where there is none. Images count from 0 within their example, and so do videos; see WHOLE_IMAGE_TILE
    for tiles. A learnt separator belongs to its image (`is_image`, `image`) but is no patch: tile, row and col -1, box
    NaN. A learnt query has its tile, but row and col -1 and a NaN box.

    >>> token_map = text_only_map(torch.tensor([[0, 1, 1]]), torch.tensor([[False, False, True]]))
    >>> token_map.where(2).kind
    'question'
    >>> token_map.image_tokens(0)
    Traceback (most recent call last):
        ...
    mmlens.errors.OutOfRangeError: image 0 of example 0: the example has no image
    """

    image: Int[Tensor, "batch pos"]
    video: Int[Tensor, "batch pos"]
    frames: Int[Tensor, "batch pos 2"]
    """The first and the last frame of the original video that a position shows."""
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
    videos: tuple[tuple[VideoGrid, ...], ...]
    """The videos of each example, in prompt order."""
    turn: Int[Tensor, "batch pos"]
    """The message of the chat whose part stands here; -1 for what the chat template writes, and padding."""
    part: Int[Tensor, "batch pos"]
    """The part of that message."""
    roles: tuple[tuple[str, ...], ...] = ()
    """The role of each message of each example's chat; none where no chat is known."""

    @classmethod
    def from_grids(
        cls,
        is_image: Bool[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"],
        is_question: Bool[Tensor, "batch pos"],
        grids: Sequence[Sequence[ImageGrid]],
    ) -> TokenMap:
        """Lay each example's grids, of images and videos as they stand in the prompt, over its visual positions.

        Raises TokenMapError where an example has another number of visual positions than its grids predict.
        """
        batch, length = is_image.shape
        if len(grids) != batch:
            raise TokenMapError(f"grids for {len(grids)} example(s), but the batch has {batch}")
        names = ("image", "video", "tile", "row", "col")
        columns = {name: np.full((batch, length), NO_PATCH, dtype=np.int64) for name in names}
        frames = np.full((batch, length, 2), NO_PATCH, dtype=np.int64)
        boxes = np.full((batch, length, 4), np.nan, dtype=np.float32)
        mask = is_image.cpu()
        visual = mask.numpy()
        for example, own in enumerate(grids):
            at = np.flatnonzero(visual[example])
            predicted = sum(map(len, own))
            if len(at) != predicted:
                raise TokenMapError(
                    f"example {example}: input_ids holds {len(at)} visual token(s), but the layout of its "
                    f"{in_words(own)} of size {[grid.size for grid in own]} predicts {predicted} "
                    f"({[len(grid) for grid in own]} in each); was the image resized or the prompt cut "
                    "after it was processed?"
                )
            start = 0
            for grid, image, video in zip(own, *_numbers(own), strict=True):
                here = at[start : start + len(grid)]
                start += len(grid)
                columns["image"][example, here], columns["video"][example, here] = image, video
                columns["tile"][example, here] = grid.tile
                columns["row"][example, here] = grid.row
                columns["col"][example, here] = grid.column
                boxes[example, here] = grid.boxes
                if isinstance(grid, VideoGrid):
                    frames[example, here] = grid.frames
        arrays: dict[str, Any] = {name: torch.from_numpy(column) for name, column in columns.items()}
        return cls(
            **arrays,
            frames=torch.from_numpy(frames),
            boxes=torch.from_numpy(boxes),
            is_image=mask,
            is_padding=attention_mask.cpu() == 0,
            is_question=is_question.cpu(),
            is_answer=torch.zeros_like(mask),
            grids=tuple(tuple(grid for grid in own if not isinstance(grid, VideoGrid)) for own in grids),
            videos=tuple(tuple(grid for grid in own if isinstance(grid, VideoGrid)) for own in grids),
            turn=torch.full((batch, length), NO_PATCH),
            part=torch.full((batch, length), NO_PATCH),
        )

    def with_parts(
        self,
        turn: Int[Tensor, "batch pos"],
        part: Int[Tensor, "batch pos"],
        roles: Sequence[Sequence[str]],
        image_places: Sequence[Sequence[tuple[int, int]]],
        video_places: Sequence[Sequence[tuple[int, int]]],
    ) -> TokenMap:
        """The same map that also knows the chat: the turn and part of texts, and of each image and video."""
        turn, part = turn.clone(), part.clone()
        for numbers, of_rows in ((self.image, image_places), (self.video, video_places)):
            for row, places in enumerate(of_rows):
                for number, place in enumerate(places):
                    at = numbers[row] == number
                    turn[row, at], part[row, at] = place
        return dataclasses.replace(self, turn=turn, part=part, roles=tuple(map(tuple, roles)))

    @property
    def is_template(self) -> Bool[Tensor, "batch pos"]:
        """What the chat template and the processor write around the parts of the chat."""
        return (self.turn == NO_PATCH) & ~self.is_image & ~self.is_padding & ~self.is_answer

    def role(self, role: str) -> Bool[Tensor, "batch pos"]:
        """Positions of the turns of a role, images included, template not.

        Raises InvalidValueError where the map knows no chat, or no chat has the role.
        """
        return _of_role(self, role)

    def __len__(self) -> int:
        return self.image.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the arrays are."""
        return self.image.device

    def to(self, device: torch.device | str) -> TokenMap:
        """The same map with its arrays on `device`."""
        device = device_of(device)
        if device == self.device:
            return self
        moved: dict[str, Any] = {
            field.name: getattr(self, field.name).to(device)
            for field in dataclasses.fields(self)
            if field.name not in ("grids", "videos", "roles")
        }
        return TokenMap(**moved, grids=self.grids, videos=self.videos, roles=self.roles)

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
        """`image_tokens`, where the images are frames of a clip; those of a video are `video_tokens`."""
        return self.image_tokens(frame, example=example)

    def video_tokens(
        self,
        video: int,
        frames: Sequence[int] | None = None,
        box: Sequence[float] | None = None,
        *,
        example: int = 0,
    ) -> Bool[Tensor, "batch pos"]:
        """Positions that show frames (first, stop) of a video, stop exclusive, and pixels of a box in them.

        Frames are those of the original video, of which the processor shows the model some; a position whose temporal
        patch shows any of the span is chosen. Without `frames` and `box` it is every position of the video, its
        separators included.

        Raises IndexError where the batch has no such example, or the example no such video; TokenMapError for frames
        that the video does not have or of which the model is shown none, and for a box as `box` does.
        """
        video, grid = self._video(video, example)
        where = f"video {video} of example {example}"
        own = hit = self.video[example] == video
        if frames is not None:
            hit = hit & _showing(self, video, example, checked_frames(frames, grid.n_frames, where))
        if box is not None:
            hit = hit & _overlapping(self, example, checked_box(box, grid.size, where))
            _check_met(self, hit, own, example, box, where)
        selected = torch.zeros_like(self.is_image)
        selected[example] = hit
        return selected

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
        own = self.image[example] == image
        if mapping_of(mapping) == "merged":
            hit = own & _overlapping(self, example, (left, top, right, bottom))
        else:
            hit = _paper_floor(self, image, example, (left, top, right, bottom))
        _check_met(self, hit, own, example, box, f"image {image} of example {example}")
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
        list itself. A region without a box is its whole image, separators included, or its frames of a video.

        Raises TokenMapError where their number is not the batch's, or a row has no evidence, and as `region`.
        """
        rows = _evidence_rows(evidence)
        if len(rows) != len(self):
            raise TokenMapError(f"evidence for {len(rows)} example(s), but the batch has {len(self)}")
        selected = torch.zeros_like(self.is_image)
        for example, regions in enumerate(rows):
            if not regions:
                raise TokenMapError(f"example {example} has no evidence, so it maps to no token")
            for region in regions:
                selected |= self.region(region, example=example, mapping=mapping)
        return selected

    def region(
        self, region: Region, *, example: int = 0, mapping: BoxMapping = "merged"
    ) -> Bool[Tensor, "batch pos"]:
        """Positions of one region of evidence: `image_tokens`, `box` or `video_tokens`, and raises as these do.

        The mapping "paper_floor" is one of images; a box of a video under it raises TokenMapError.
        """
        if region.video is not None:
            if region.box is not None and mapping_of(mapping) != "merged":
                raise TokenMapError(
                    f"mapping={mapping!r} is defined for images; a video's boxes take 'merged'"
                )
            return self.video_tokens(region.video, region.frames, region.box, example=example)
        assert region.image is not None
        if region.box is None:
            return self.image_tokens(region.image, example=example)
        return self.box(region.image, region.box, example=example, mapping=mapping)

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
        return _place(self, example, position)

    def labels(self, example: int = 0) -> list[str | None]:
        """A name for every visual position of an example, None at text and padding.

        "<img0 r2c3>" is row 2, column 3 of image 0; "<img0 t1 r2c3>" of its tile 1, where an image has several;
        "<img0 t1 q5>" the tile's query 5; "<img0 sep>" a learnt separator; "<vid0 f4-5 r2c3>" a patch that shows frames
        4 to 5 of video 0.

        >>> text_only_map(torch.tensor([[1, 1]]), torch.tensor([[False, True]])).labels()
        [None, None]
        """
        self._check_example(example)
        return _labels(self, example)

    def to_pandas(self) -> pd.DataFrame:
        """One row per example and position: the arrays of the map as columns."""
        return _table(self)

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

    def _video(self, video: int, example: int) -> tuple[int, VideoGrid]:
        """The number of a video of an example, checked, and its grid."""
        self._check_example(example)
        video, own = whole_number("video", video), self.videos[example]
        if not 0 <= video < len(own):
            there = f"{len(own)} video(s), 0 to {len(own) - 1}" if own else "no video"
            raise OutOfRangeError(f"video {video} of example {example}: the example has {there}")
        return video, own[video]


def _showing(token_map: TokenMap, video: int, example: int, frames: tuple[int, int]) -> Bool[Tensor, " pos"]:
    """Which positions of a video show any of the frames (first, stop)."""
    first, stop = frames
    grid = token_map.videos[example][video]
    shows = np.array([any(first <= frame < stop for frame in own) for own in grid.shown] + [False])
    if not shows.any():
        seen = sorted({frame for own in grid.shown for frame in own})
        listing = ", ".join(map(str, seen[:12])) + (" ..." if len(seen) > 12 else "")
        raise TokenMapError(
            f"frames {first} to {stop - 1} of video {video} of example {example} map to no token: of its "
            f"{grid.n_frames} frames the processor shows the model {len(seen)}: {listing}"
        )
    selected = torch.zeros_like(token_map.is_image[example])
    selected[token_map.video[example] == video] = torch.as_tensor(shows[grid.step], device=token_map.device)
    return selected


def _overlapping(token_map: TokenMap, example: int, box: Box) -> Bool[Tensor, " pos"]:
    left, top, right, bottom = box
    edges = token_map.boxes[example].nan_to_num(nan=-1.0)
    overlap_x = edges[:, 2].clamp(max=right) - edges[:, 0].clamp(min=left)
    overlap_y = edges[:, 3].clamp(max=bottom) - edges[:, 1].clamp(min=top)
    return (overlap_x > SLIVER) & (overlap_y > SLIVER)


def _check_met(
    token_map: TokenMap,
    hit: Bool[Tensor, " pos"],
    own: Bool[Tensor, " pos"],
    example: int,
    box: Any,
    where: str,
) -> None:
    """Raise TokenMapError where no position is hit; `own` are those of the whole image or video."""
    if bool(hit.any()):
        return
    edges = token_map.boxes[example][own]
    edges = edges[(edges[:, 2] > edges[:, 0]) & (edges[:, 3] > edges[:, 1])]
    seen = "none"
    if len(edges):
        low, high = edges[:, :2].amin(0).tolist(), edges[:, 2:].amax(0).tolist()
        seen = f"({low[0]:g}, {low[1]:g}, {high[0]:g}, {high[1]:g})"
    raise TokenMapError(
        f"the box {tuple(box)} of {where} maps to no token: the processor shows the model only {seen} of its pixels"
    )


def _paper_floor(token_map: TokenMap, image: int, example: int, box: Box) -> Bool[Tensor, " pos"]:
    grid = token_map.grids[example][image]
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
    hit = torch.zeros_like(token_map.is_image[example])
    positions = torch.nonzero(token_map.image[example] == image).flatten()
    hit[positions[(patches // 4).unique().to(positions.device)]] = True
    return hit


def _place(token_map: TokenMap, example: int, position: int) -> Place:
    """What stands at a position that there is."""
    at = (example, position)
    turn = int(token_map.turn[at])
    said: dict[str, Any] = {}
    if turn != NO_PATCH:
        said = {"turn": turn, "role": token_map.roles[example][turn], "part": int(token_map.part[at])}
    if not bool(token_map.is_image[at]):
        kind: Literal["text", "question", "template", "answer", "padding"] = "text"
        if bool(token_map.is_padding[at]):
            kind = "padding"
        elif bool(token_map.is_question[at]):
            kind = "question"
        elif bool(token_map.is_answer[at]):
            kind = "answer"
        elif token_map.roles and turn == NO_PATCH:
            kind = "template"
        return Place(kind, **said)
    image, video, tile = (
        _number(column[at]) for column in (token_map.image, token_map.video, token_map.tile)
    )
    first, last = token_map.frames[at].tolist()
    seen = Place(
        "separator",
        image,
        tile,
        video=video,
        frames=None if first == NO_PATCH else (first, last),
        **said,
    )
    if int(token_map.row[at]) == NO_PATCH:
        return seen if tile is None else dataclasses.replace(seen, kind="query")
    left, top, right, bottom = token_map.boxes[at].tolist()
    return dataclasses.replace(
        seen,
        kind="patch",
        row=int(token_map.row[at]),
        col=int(token_map.col[at]),
        box=(left, top, right, bottom),
    )


def _of_role(token_map: TokenMap, role: str) -> Bool[Tensor, "batch pos"]:
    known = list(dict.fromkeys(each for own in token_map.roles for each in own))
    if role not in known:
        raise InvalidValueError(
            unknown_name_message("role", role, known) if known else f"role {role!r}: the prompt knows no chat"
        )
    numbers = [
        torch.tensor([at for at, each in enumerate(own) if each == role] or [-2]) for own in token_map.roles
    ]
    return torch.stack(
        [torch.isin(own, at.to(own.device)) for own, at in zip(token_map.turn, numbers, strict=True)]
    )


def _table(token_map: TokenMap) -> pd.DataFrame:
    batch, length = token_map.image.shape
    table = {
        "example": np.repeat(np.arange(batch), length),
        "position": np.tile(np.arange(length), batch),
    }
    for name in ("turn", "part", "image", "video", "tile", "row", "col"):
        table[name] = getattr(token_map, name).cpu().numpy().reshape(-1)
    spans = token_map.frames.cpu().numpy().reshape(-1, 2)
    table |= {name: spans[:, i] for i, name in enumerate(("first_frame", "last_frame"))}
    edges = token_map.boxes.cpu().numpy().reshape(-1, 4)
    table |= {name: edges[:, i] for i, name in enumerate(("left", "top", "right", "bottom"))}
    for name in ("is_image", "is_padding", "is_question", "is_answer"):
        table[name] = getattr(token_map, name).cpu().numpy().reshape(-1)
    return pd.DataFrame(table)


def _labels(token_map: TokenMap, example: int) -> list[str | None]:
    columns = (
        token_map.image,
        token_map.video,
        token_map.frames,
        token_map.tile,
        token_map.row,
        token_map.col,
    )
    places = zip(*(column[example].tolist() for column in columns), strict=True)
    n_queries: dict[tuple[str, int], int] = {}
    names: list[str | None] = []
    for image, video, (first, last), tile, row, col in places:
        if image == video == NO_PATCH:
            names.append(None)
            continue
        name, grid = (
            (f"img{image}", token_map.grids[example][image])
            if video == NO_PATCH
            else (f"vid{video}", token_map.videos[example][video])
        )
        prefix = name if first == NO_PATCH else f"{name} f{first}" + (f"-{last}" if last > first else "")
        prefix += f" t{tile}" if bool((grid.tile > WHOLE_IMAGE_TILE).any()) else ""
        if row != NO_PATCH:
            names.append(f"<{prefix} r{row}c{col}>")
        elif tile == NO_PATCH:
            names.append(f"<{name} sep>")
        else:
            number = n_queries.get((prefix, tile), 0)
            n_queries[prefix, tile] = number + 1
            names.append(f"<{prefix} q{number}>")
    return names


def mapping_of(value: object) -> BoxMapping:
    """How boxes become tokens: "merged" or "paper_floor"; TokenMapError for anything else.

    >>> mapping_of("paper")
    Traceback (most recent call last):
        ...
    mmlens.boxes.TokenMapError: mapping is 'merged' or 'paper_floor', not 'paper'
    """
    for mapping in MAPPINGS:
        if isinstance(value, str) and value == mapping:
            return mapping
    raise TokenMapError(f"mapping is 'merged' or 'paper_floor', not {value!r}")


def in_words(grids: Sequence[ImageGrid]) -> str:
    """How many images and videos these are.

    >>> in_words([])
    '0 image(s)'
    """
    n_videos = sum(isinstance(grid, VideoGrid) for grid in grids)
    n_images = len(grids) - n_videos
    counts = [f"{n_images} image(s)"] if n_images or not n_videos else []
    return " and ".join(counts + ([f"{n_videos} video(s)"] if n_videos else []))


def _numbers(grids: Sequence[ImageGrid]) -> tuple[list[int], list[int]]:
    """For every grid of an example the number of its image, and of its video; -1 where it is of the other kind."""
    images: list[int] = []
    videos: list[int] = []
    for grid in grids:
        own, other = (videos, images) if isinstance(grid, VideoGrid) else (images, videos)
        own.append(sum(number != NO_PATCH for number in own))
        other.append(NO_PATCH)
    return images, videos


def _number(value: Tensor) -> int | None:
    return None if int(value) == NO_PATCH else int(value)


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


def frames_of(name: str, value: object) -> tuple[int, int]:
    """A span of frames (first, stop), stop exclusive, in whole numbers; TokenMapError for one that holds no frame.

    >>> frames_of("frames", [4, 9])
    (4, 9)
    >>> frames_of("frames", (4, 4))
    Traceback (most recent call last):
        ...
    mmlens.boxes.TokenMapError: frames: the span (4, 4) holds no frame; it is (first, stop), stop exclusive
    """
    ends = listed(name, value, "a span of frames (first, stop)")
    if len(ends) != 2:
        raise TokenMapError(f"{name}: a span of frames is (first, stop), not {tuple(ends)}")
    first, stop = whole_number(f"first of {name}", ends[0]), whole_number(f"stop of {name}", ends[1])
    if first < 0 or first >= stop:
        raise TokenMapError(
            f"{name}: the span {(first, stop)} holds no frame; it is (first, stop), stop exclusive"
        )
    return first, stop


def checked_frames(frames: Sequence[int], n_frames: int, where: str) -> tuple[int, int]:
    """A span of frames of a video of `n_frames`; TokenMapError where it ends after the last one."""
    first, stop = frames_of(where, frames)
    if stop > n_frames:
        raise TokenMapError(
            f"{where}: the frames {(first, stop)} end after the last of its {n_frames} frames, {n_frames - 1}"
        )
    return first, stop
