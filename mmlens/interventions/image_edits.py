"""Corruptions of what a prompt shows: regions of its images filled, swapped or replaced, images exchanged."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageColor

from mmlens.arguments import (
    called,
    flag,
    listed,
    seed_of,
    unknown_name_message,
    whole_number,
)
from mmlens.boxes import SLIVER, checked_box
from mmlens.data.chats import Chat
from mmlens.data.examples import Evidence, Example, examples_of
from mmlens.data.images import LateImage, load_image, pixel_fingerprint
from mmlens.errors import InvalidValueError, OutOfRangeError
from mmlens.interventions.corruptions import Corruption, CorruptionError, corrupted_prompt
from mmlens.interventions.edits import check_call
from mmlens.interventions.layouts import in_pixels
from mmlens.model.fingerprints import example_seed, pixel_fingerprints
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.prompt import Prompt
from mmlens.token_map import Region

Where = Region | Sequence[Any] | Callable[[Prompt, int], Any]
"""Pixels of the original images: a box (left, top, right, bottom), a region such as `Evidence` (its box None: the
whole image), a list of those, or a function (prompt, example's index in the batch) that gives one of the three."""

Pixels = UInt8[np.ndarray, "_ _ 3"]


def blank_region(where: Where, *, image: int = 0, fill: str | Sequence[int] = "mean") -> Corruption:
    """Fill a region with one colour: every pixel that it touches, in the original image.

    A plain box is one of image number `image`; a region names its own. `evidence_of(examples)` gives each example's
    evidence. `fill` is "mean", the mean colour of the whole image, channel by channel and rounded, or a colour: a
    name that PIL knows, "#rrggbb", or (red, green, blue) from 0 to 255.

    Raises ValueError for an unknown colour; TokenMapError for a box that is empty or leaves its image, IndexError
    for an image that the example does not have, and CorruptionError where the region has that colour already or
    the processor crops it away - when applied.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> example = mmlens.scene_examples("objects", 1, seed=0)[0]
    >>> prompt = model.prompt_examples([example])
    >>> blanked = blank_region(evidence_of([example]), fill="grey")(model, prompt)
    >>> left, top, right, bottom = example.evidence[0].box
    >>> blanked.images[0][0].getpixel((left, top)), mmlens.interventions.same_layout(prompt, blanked)
    ((128, 128, 128), True)
    """
    image, colour = whole_number("image", image, least=0), _colour(fill)

    def blank(before: list[Pixels], regions: Regions, *at: Any) -> Changes:
        if colour is not None:
            return [(region, colour) for region in regions[0]]
        means = [np.rint(own.mean(axis=(0, 1))).astype(np.uint8) for own in before]
        return [(region, means[region.image]) for region in regions[0]]

    return _of_regions([where], image, blank)


def swap_regions(one: Where, other: Where, *, image: int = 0) -> Corruption:
    """Let two regions of equal size change places, in one image or between two.

    Regions are given as for `blank_region`, one on each side. Raises CorruptionError, when applied, where they
    are of different size, overlap, or show the same pixels; else as `blank_region`.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> prompt = model.prompt_examples(mmlens.scene_examples("objects", 1, seed=0))
    >>> swapped = swap_regions((0, 0, 32, 16), (32, 32, 64, 48))(model, prompt)
    >>> swapped.images[0][0].crop((0, 0, 32, 16)) == prompt.images[0][0].crop((32, 32, 64, 48))
    True
    """

    image = whole_number("image", image, least=0)

    def swap(before: list[Pixels], regions: Regions, name: str, *at: Any) -> Changes:
        a, b = (_only(sided, name, "swap_regions takes one region on each side") for sided in regions)
        if a.size != b.size:
            raise CorruptionError(
                f"{name}: regions of {in_pixels(a.size)} and {in_pixels(b.size)} cannot change places; "
                "give boxes of equal size"
            )
        if a.image == b.image and _overlap(a, b):
            raise CorruptionError(f"{name}: the regions {a.box} and {b.box} of image {a.image} overlap")
        return [(a, before[b.image][b.window]), (b, before[a.image][a.window])]

    return _of_regions([one, other], image, swap)


def replace_region(where: Where, source: Any | Callable[[Prompt, int], Any], *, image: int = 0) -> Corruption:
    """Put the pixels of `source` in a region's place.

    `source` is a PIL image or a path, or a function (prompt, example's index) that gives one, of exactly the
    region's size: `other.crop(box)`. The region is given as for `blank_region`. Raises CorruptionError, when
    applied, for a source of another size or the same pixels; else as `blank_region`.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> prompt, other = map(model.prompt_examples, [[e] for e in mmlens.scene_examples("objects", 2, seed=0)])
    >>> box = (0, 0, 32, 16)
    >>> replaced = replace_region(box, other.images[0][0].crop(box))(model, prompt)
    >>> replaced.images[0][0].crop(box) == other.images[0][0].crop(box)
    True
    """
    image = whole_number("image", image, least=0)
    fixed = None if callable(source) else load_image(source, "the source")

    def put(before: list[Pixels], regions: Regions, name: str, prompt: Prompt, example: int) -> Changes:
        region = _only(regions[0], name, "replace_region takes one region")
        given = load_image(source(prompt, example), f"the source of {name}") if fixed is None else fixed
        if given.size != region.size:
            raise CorruptionError(
                f"{name}: the source is {in_pixels(given.size)}, the region {region.box} {in_pixels(region.size)}; "
                "crop or resize the source"
            )
        return [(region, np.array(given))]

    return _of_regions([where], image, put)


def other_image(
    images: Any | Sequence[Any],
    *,
    image: int | None = None,
    resize: bool = False,
    seed: int = 0,
    equal_layout: bool = True,
) -> Corruption:
    """Exchange images for others, drawn from `images` by `seed`.

    `images` is a PIL image or path, a list of them, or a list of `Example`s, whose images are drawn one by one.
    `image` numbers the one that is exchanged; None: all of an example's images, each for a different one. None of
    the example's own is drawn. One of the same size is taken where there is one; else one of any size, which
    `resize` stretches to the size (bicubic). What an example gets depends on `seed`, its question and its images,
    not on the batch.

    Raises PromptError for what is no image; when applied, CorruptionError where an example has no image or no
    other is left to draw, and as `corrupted_prompt`.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> examples = mmlens.scene_examples("objects", 3, seed=0)
    >>> other = other_image(examples)(model, model.prompt_examples(examples[:1]))
    >>> other.images[0][0] in examples[1].images + examples[2].images
    True
    """
    image = None if image is None else whole_number("image", image, least=0)
    seed = seed_of(seed)
    flag("resize", resize)
    flag("equal_layout", equal_layout)
    if isinstance(images, Iterable) and not isinstance(images, (str, os.PathLike, Image.Image)):
        images = listed("images", images, "an image, or a list of images or of Example")
        given = [
            own for entry in images for own in (entry.images.given if isinstance(entry, Example) else [entry])
        ]
    else:
        given = [images]
    pool: dict[str, Image.Image | LateImage] = {}
    for number, entry in enumerate(given):
        if isinstance(entry, LateImage):
            pool.setdefault(entry.fingerprint, entry)
            continue
        loaded = load_image(entry, f"image {number} to draw from")
        pool.setdefault(pixel_fingerprint(loaded), loaded)
    if not pool:
        raise CorruptionError("other_image: there is no image to draw from")

    def exchanged(prompt: Prompt, example: int) -> list[Image.Image]:
        own = list(prompt.images[example])
        if not own:
            raise CorruptionError(f"other_image: example {example} has no image")
        rng = np.random.default_rng([seed, *example_seed(prompt, example)])
        present = {pixel_fingerprint(each) for each in own}
        left = {key: each for key, each in pool.items() if key not in present}
        for number in range(len(own)) if image is None else [_checked_image(prompt, example, image)]:
            if not left:
                raise CorruptionError(
                    f"other_image: among the {len(pool)} image(s) to draw from, none is left for image {number} of "
                    f"example {example} that the example does not have already"
                )
            size = own[number].size
            alike = [key for key, each in left.items() if each.size == size] or list(left)
            drawn = load_image(left.pop(alike[int(rng.integers(len(alike)))]))
            fits = drawn.size == size or not resize
            own[number] = drawn if fits else drawn.resize(size, Image.Resampling.BICUBIC)
        return own

    def corruption(model: HookedVLM, prompt: Prompt) -> Prompt:
        check_call(model, prompt)
        made = [exchanged(prompt, example) for example in range(len(prompt))]
        return corrupted_prompt(model, prompt, images=made, equal_layout=equal_layout)

    return corruption


def evidence_of(examples: Sequence[Example]) -> Callable[[Prompt, int], list[Evidence]]:
    """Where each example of a prompt has its evidence, for corruptions of regions.

    An example of the prompt is known by the texts of its chat and the pixels of its images, in any batch and order.
    Raises CorruptionError for two examples alike in those but not in their evidence; when
    asked, for an example that is not among `examples` (as one whose images were corrupted before), or has no
    evidence.
    """
    known: dict[tuple[Any, ...], tuple[Evidence, ...]] = {}
    examples = examples_of(examples)
    for entry in examples:
        videos = (each.fingerprint for each in entry.videos)
        key = (entry.said, *entry.images.fingerprints, *videos)
        if known.setdefault(key, entry.evidence) != entry.evidence:
            raise CorruptionError(
                f"two examples have the question {entry.question!r} and the same images, but not the same evidence"
            )

    def regions(prompt: Prompt, example: int) -> list[Evidence]:
        said: tuple[Any, ...] = () if prompt.messages is None else Chat(prompt.messages[example]).said
        if prompt.examples is not None:
            # Of a prompt made of inputs the chat is not known, and its examples may be.
            said = prompt.examples[example].said
        key = (said, *pixel_fingerprints(prompt, example))
        if key not in known:
            raise CorruptionError(
                f"example {example} of the prompt ({prompt.questions[example]!r} with {len(key) - 1} image(s)) is not "
                f"among the {len(examples)} example(s) given to evidence_of: they are matched by texts and pixels"
            )
        if not known[key]:
            raise CorruptionError(f"example {example} ({prompt.questions[example]!r}) has no evidence")
        return list(known[key])

    return regions


# ---------------------------------------------------------------------- regions


@dataclass(frozen=True)
class PixelRegion:
    """Whole pixels (left, top, right, bottom), right and bottom exclusive, of image number `image`."""

    image: int
    box: tuple[int, int, int, int]

    @property
    def window(self) -> tuple[slice, slice]:
        """The region as an index of an array [height, width, ...]."""
        left, top, right, bottom = self.box
        return slice(top, bottom), slice(left, right)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        left, top, right, bottom = self.box
        return right - left, bottom - top


Regions = list[list[PixelRegion]]
"""Of each `where`, what it means in one example."""
Changes = list[tuple[PixelRegion, np.ndarray]]
"""Regions, and the pixels or the colour that they show instead."""


def _of_regions(where: Sequence[Where], image: int, edit: Callable[..., Changes]) -> Corruption:
    """The corruption that edits the pixels of every example: `edit(pixels of its images, its regions, its name for
    errors, prompt, example)`."""

    def corruption(model: HookedVLM, prompt: Prompt) -> Prompt:
        check_call(model, prompt)
        made = []
        for example, own in enumerate(prompt.images):
            regions = [_regions(each, prompt, example, image) for each in where]
            before, after = ([np.array(each) for each in own] for _ in range(2))
            for region, shown in edit(before, regions, f"example {example}", prompt, example):
                after[region.image][region.window] = shown
            made.append([Image.fromarray(pixels) for pixels in after])
        return corrupted_prompt(model, prompt, images=made)

    return corruption


def _regions(where: Any, prompt: Prompt, example: int, image: int) -> list[PixelRegion]:
    """What `where` means in one example."""
    if callable(where):
        where = called("where", where, "a function (prompt, example's index) -> region", n_arguments=2)(
            prompt, example
        )
    if hasattr(where, "box") and hasattr(where, "image"):
        if where.image is None:
            raise CorruptionError(f"example {example}: {where} is of a video; edited are regions of images")
        return [_pixel_region(prompt, example, where.image, where.box)]
    if not isinstance(where, Sequence) or isinstance(where, str):
        raise CorruptionError(
            f"example {example}: a region is a box (left, top, right, bottom), an Evidence, or a list of them, not "
            f"{where!r}"
        )
    if not where:
        raise CorruptionError(f"example {example}: the list of regions is empty")
    if not isinstance(where[0], (Sequence, Region)) or isinstance(where[0], str):
        return [_pixel_region(prompt, example, image, where)]
    return [region for each in where for region in _regions(each, prompt, example, image)]


def _pixel_region(prompt: Prompt, example: int, image: int, box: Sequence[float] | None) -> PixelRegion:
    width, height = prompt.images[example][_checked_image(prompt, example, image)].size
    if box is None:
        return PixelRegion(image, (0, 0, width, height))
    where = f"image {image} of example {example}"
    left, top, right, bottom = checked_box(box, (width, height), where)
    low = (math.floor(left + SLIVER), math.floor(top + SLIVER))
    high = (math.ceil(right - SLIVER), math.ceil(bottom - SLIVER))
    if low[0] >= high[0] or low[1] >= high[1]:
        raise CorruptionError(f"{where}: the box {tuple(box)} is too small to hold part of a pixel")
    return PixelRegion(image, (*low, *high))


def _checked_image(prompt: Prompt, example: int, image: int) -> int:
    n_images = len(prompt.images[example])
    if not 0 <= image < n_images:
        there = f"{n_images} image(s), 0 to {n_images - 1}" if n_images else "no image"
        raise OutOfRangeError(f"image {image} of example {example}: the example has {there}")
    return image


def _only(regions: list[PixelRegion], name: str, expected: str) -> PixelRegion:
    if len(regions) != 1:
        raise CorruptionError(f"{name}: {expected}, not {len(regions)}")
    return regions[0]


def _overlap(a: PixelRegion, b: PixelRegion) -> bool:
    return max(a.box[0], b.box[0]) < min(a.box[2], b.box[2]) and max(a.box[1], b.box[1]) < min(
        a.box[3], b.box[3]
    )


def _colour(fill: str | Sequence[int]) -> Pixels | UInt8[np.ndarray, " 3"] | None:
    """The colour of `fill`; None for the image's mean."""
    if isinstance(fill, str) and fill == "mean":
        return None
    if isinstance(fill, str):
        try:
            values: Sequence[int] = ImageColor.getrgb(fill)
        except ValueError:
            known = ["mean", *ImageColor.colormap]
            raise InvalidValueError(unknown_name_message("fill", fill, known)) from None
    else:
        values = fill
    if (
        not isinstance(values, Sequence)
        or len(values) != 3
        or not all(
            isinstance(each, (int, np.integer)) and not isinstance(each, bool) and 0 <= each <= 255
            for each in values
        )
    ):
        raise InvalidValueError(
            f"fill is 'mean', a colour's name, '#rrggbb' or (red, green, blue) in whole numbers from 0 to 255, not "
            f"{fill!r}"
        )
    return np.array(values, dtype=np.uint8)
