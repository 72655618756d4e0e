"""Whether two prompts are laid out alike: the same token at every position, the same images."""

from __future__ import annotations

import torch

from mmlens.arguments import (
    flag,
)
from mmlens.model.prompt import Prompt, prompt_of
from mmlens.token_map import SLIVER, TokenMap


def layout_difference(one: Prompt, other: Prompt, *, boxes: bool = False) -> str | None:
    """The first difference between the token layouts of two prompts, in words; None where they are equal.

    Equal layouts have the same number of examples, images and positions, and at every position the same kind of
    token: padding, text, question, or the same image, tile, row and column. With `boxes`, positions must also
    show the same pixels of images of the same size: a region then means the same positions in both.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> layout_difference(model.prompt("What colour is K ?"), model.prompt("What colour is Q ?")) is None
    True
    >>> layout_difference(model.prompt("What colour is K ?"), model.prompt("What colour is the letter K ?"))
    'example 0 has ... positions (0 of images) and ... positions (0 of images)'
    """
    prompt_of(one, "one")
    prompt_of(other, "other")
    flag("boxes", boxes)
    first, second = one.token_map.to("cpu"), other.token_map.to("cpu")
    if len(first) != len(second):
        return f"the batches have {len(first)} and {len(second)} example(s)"
    for example, (own, others) in enumerate(zip(first.grids, second.grids, strict=True)):
        if len(own) != len(others):
            return f"example {example} has {len(own)} and {len(others)} image(s)"
        for image, (grid, other_grid) in enumerate(zip(own, others, strict=True)):
            if boxes and grid.size != other_grid.size:
                return f"image {image} of example {example} is {in_pixels(grid.size)} and {in_pixels(other_grid.size)}"
    for example in range(len(first)):
        counts = [_counts(token_map, example) for token_map in (first, second)]
        if counts[0] != counts[1]:
            return f"example {example} has {counts[0]} and {counts[1]}"
    if first.image.shape != second.image.shape:
        return f"the batches are padded to {first.image.shape[1]} and {second.image.shape[1]} positions"
    names = ("image", "video", "tile", "row", "col", "is_image", "is_padding", "is_question", "is_answer")
    differ = torch.stack([getattr(first, name) != getattr(second, name) for name in names]).any(0)
    differ = differ | (first.frames != second.frames).any(-1)
    if bool(differ.any()):
        example, position = differ.nonzero()[0].tolist()
        places = [_place(token_map, example, position) for token_map in (first, second)]
        return f"position {position} of example {example} is {places[0]} and {places[1]}"
    differ = (first.boxes.nan_to_num(nan=-1) - second.boxes.nan_to_num(nan=-1)).abs().amax(-1) > SLIVER
    if boxes and bool(differ.any()):
        example, position = differ.nonzero()[0].tolist()
        shown = [tuple(token_map.boxes[example, position].tolist()) for token_map in (first, second)]
        return f"position {position} of example {example} shows the pixels {shown[0]} and {shown[1]}"
    return None


def same_layout(one: Prompt, other: Prompt, *, boxes: bool = False) -> bool:
    """Whether two prompts have the same token layout; `layout_difference` tells what differs."""
    return layout_difference(one, other, boxes=boxes) is None


def _counts(token_map: TokenMap, example: int) -> str:
    n_real = int((~token_map.is_padding[example]).sum())
    return f"{n_real} positions ({int(token_map.is_image[example].sum())} of images)"


def _place(token_map: TokenMap, example: int, position: int) -> str:
    """What stands at a position, in words."""
    place = token_map.where(position, example)
    parts = [
        f"{name} {value}"
        for name, value in (
            ("image", place.image),
            ("video", place.video),
            ("frames", place.frames),
            ("tile", place.tile),
            ("row", place.row),
            ("column", place.col),
        )
        if value is not None
    ]
    return f"{place.kind} ({', '.join(parts)})" if parts else place.kind


def in_pixels(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} pixels"
