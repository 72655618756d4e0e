"""Corruptions: the same prompt with something else in it, and noise on what the model read of its images.

A corruption is a function (model, prompt) -> Prompt. Images and questions are changed before the model's own
processor sees them, for every example of the batch, and answers and candidates stay attached, so that metrics
of the corrupted run are about the clean prompt's answer.

| corruption | what it changes |
|---|---|
| `blank_region` | a region of an image is filled with one colour |
| `swap_regions` | two regions of equal size change places |
| `replace_region` | a region shows other pixels |
| `other_image` | images are exchanged for others |
| `other_question` | the question is exchanged for another |

`noise_images` acts on embeddings, which no prompt holds: it is an intervention, (model, prompt) -> hooks.

Two things are checked each time. Every example must have changed in what the model is given, or the corruption
would weaken an effect unseen. And its positions must be what they were (`layout_difference`), as activation
patching needs; `equal_layout=False` lifts that where another image or question may be laid out otherwise.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageColor
from torch import Tensor

from mmlens.arguments import (
    called,
    flag,
    listed,
    seed_of,
    texts,
    unknown_name_message,
    whole_number,
)
from mmlens.arguments import number as real_number
from mmlens.data.examples import Evidence, Example, examples_of
from mmlens.data.images import load_image, pixel_fingerprint
from mmlens.errors import InvalidValueError, OutOfRangeError
from mmlens.hook_names import block
from mmlens.interventions.edits import (
    Change,
    Edit,
    Here,
    IfAny,
    Positions,
    check_call,
    if_any,
    positions_mask,
)
from mmlens.model.evaluation import check_same_twice
from mmlens.model.fingerprints import example_seed
from mmlens.model.hooked_vlm import Hook, HookedVLM, Intervention, model_of
from mmlens.model.prompt import Prompt, answered, prompt_of, render
from mmlens.token_map import Region, TokenMap, checked_box

Corruption = Callable[[HookedVLM, Prompt], Prompt]
"""The same prompt with something else in it."""

Where = Region | Sequence[Any] | Callable[[Prompt, int], Any]
"""Pixels of the original images: a box (left, top, right, bottom), a region such as `Evidence` (its box None: the
whole image), a list of those, or a function (prompt, example's index in the batch) that gives one of the three."""

_SLIVER = 0.01
"""Part of a pixel that does not count, as in token maps."""


class CorruptionError(InvalidValueError):
    """A corruption that cannot be made, changes nothing, or changes the layout."""


# ---------------------------------------------------------------------- layouts


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
                return (
                    f"image {image} of example {example} is {_size(grid.size)} and {_size(other_grid.size)}"
                )
    for example in range(len(first)):
        counts = [_counts(token_map, example) for token_map in (first, second)]
        if counts[0] != counts[1]:
            return f"example {example} has {counts[0]} and {counts[1]}"
    if first.image.shape != second.image.shape:
        return f"the batches are padded to {first.image.shape[1]} and {second.image.shape[1]} positions"
    names = ("image", "tile", "row", "col", "is_image", "is_padding", "is_question")
    differ = torch.stack([getattr(first, name) != getattr(second, name) for name in names]).any(0)
    if bool(differ.any()):
        example, position = differ.nonzero()[0].tolist()
        places = [_place(token_map, example, position) for token_map in (first, second)]
        return f"position {position} of example {example} is {places[0]} and {places[1]}"
    differ = (first.boxes.nan_to_num(nan=-1) - second.boxes.nan_to_num(nan=-1)).abs().amax(-1) > _SLIVER
    if boxes and bool(differ.any()):
        example, position = differ.nonzero()[0].tolist()
        shown = [tuple(token_map.boxes[example, position].tolist()) for token_map in (first, second)]
        return f"position {position} of example {example} shows the pixels {shown[0]} and {shown[1]}"
    return None


def same_layout(one: Prompt, other: Prompt, *, boxes: bool = False) -> bool:
    """Whether two prompts have the same token layout; `layout_difference` tells what differs."""
    return layout_difference(one, other, boxes=boxes) is None


# ---------------------------------------------------------------------- corruptions of prompts


def corrupted_prompt(
    model: HookedVLM,
    prompt: Prompt,
    *,
    questions: Sequence[str] | None = None,
    images: Sequence[Sequence[Any]] | None = None,
    equal_layout: bool = True,
) -> Prompt:
    """`prompt` made again with other questions or images, one entry per example; for corruptions of your own.

    It goes through the model's processor. Answers and candidates are the prompt's own, their first tokens found
    again where the text has changed. Images are encoded where the prompt's were (`HookedVLM.encode_images`).

    Raises CorruptionError where an example's inputs stay what they were, `equal_layout` is set and the layout
    has changed, the number of questions or image lists is not the batch's, or the prompt does not hold its
    questions and images (`prompt_from_inputs`).
    """
    model_of(model)
    flag("equal_layout", equal_layout)
    if questions is not None:
        questions = texts("questions", questions, "one question for each example")
    if images is not None:
        images = listed("images", images, "one list of images for each example")
    if not all(question.strip() for question in prompt_of(prompt).questions):
        raise CorruptionError(
            "the prompt does not hold its questions and images, so it cannot be made again: make it with "
            "model.prompt(...) or model.prompt_examples(...)"
        )
    for name, given in (("question(s)", questions), ("image list(s)", images)):
        if given is not None and len(given) != len(prompt):
            raise CorruptionError(f"{len(given)} {name} for a batch of {len(prompt)} example(s)")
    made = model.prompt(
        prompt.questions if questions is None else list(questions),
        prompt.images if images is None else [list(own) for own in images],
    ).to(prompt.token_map.device)
    difference = layout_difference(prompt, made) if equal_layout else None
    if difference:
        raise CorruptionError(
            f"the corrupted prompt is laid out in another way: {difference}. Activation patching needs equal "
            "layouts; where nothing does, pass equal_layout=False"
        )
    for example in range(len(prompt)):
        unchanged = _unchanged(model, prompt, made, example)
        if unchanged:
            raise CorruptionError(f"the corruption leaves example {example} as it is: {unchanged}")
    made = _answered(model, prompt, made)
    return made if prompt.image_features is None else model.encode_images(made)


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
    >>> blanked.images[0][0].getpixel((left, top)), same_layout(prompt, blanked)
    ((128, 128, 128), True)
    """
    image, colour = whole_number("image", image, least=0), _colour(fill)

    def blank(before: list[Pixels], regions: list[list[PixelRegion]], *at: Any) -> list[Pixels]:
        after = [pixels.copy() for pixels in before]
        for region in regions[0]:
            own = before[region.image]
            after[region.image][region.window] = (
                np.rint(own.mean(axis=(0, 1))).astype(np.uint8) if colour is None else colour
            )
        return after

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

    def swap(before: list[Pixels], regions: list[list[PixelRegion]], name: str, *at: Any) -> list[Pixels]:
        a, b = (_only(sided, name, "swap_regions takes one region on each side") for sided in regions)
        if a.size != b.size:
            raise CorruptionError(
                f"{name}: regions of {_size(a.size)} and {_size(b.size)} cannot change places; give boxes of equal size"
            )
        if a.image == b.image and _overlap(a, b):
            raise CorruptionError(f"{name}: the regions {a.box} and {b.box} of image {a.image} overlap")
        after = [pixels.copy() for pixels in before]
        after[a.image][a.window] = before[b.image][b.window]
        after[b.image][b.window] = before[a.image][a.window]
        return after

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

    def put(
        before: list[Pixels], regions: list[list[PixelRegion]], name: str, prompt: Prompt, example: int
    ) -> list[Pixels]:
        region = _only(regions[0], name, "replace_region takes one region")
        given = load_image(source(prompt, example), f"the source of {name}") if fixed is None else fixed
        if given.size != region.size:
            raise CorruptionError(
                f"{name}: the source is {_size(given.size)}, the region {region.box} {_size(region.size)}; crop or "
                "resize the source"
            )
        after = [pixels.copy() for pixels in before]
        after[region.image][region.window] = np.array(given)
        return after

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
        given = [own for entry in images for own in (entry.images if isinstance(entry, Example) else [entry])]
    else:
        given = [images]
    pool: dict[str, Image.Image] = {}
    for number, entry in enumerate(given):
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
            drawn = left.pop(alike[int(rng.integers(len(alike)))])
            fits = drawn.size == size or not resize
            own[number] = drawn if fits else drawn.resize(size, Image.Resampling.BICUBIC)
        return own

    def corruption(model: HookedVLM, prompt: Prompt) -> Prompt:
        check_call(model, prompt)
        made = [exchanged(prompt, example) for example in range(len(prompt))]
        return corrupted_prompt(model, prompt, images=made, equal_layout=equal_layout)

    return corruption


def other_question(
    questions: str | Sequence[str] | Sequence[Example] | Callable[[Prompt, int], str],
    *,
    seed: int = 0,
    equal_layout: bool = True,
) -> Corruption:
    """Exchange the question; images, answer and candidates stay those of the clean prompt.

    `questions` is one question, a list of questions or `Example`s to draw from by `seed`, or a function (prompt,
    example's index) that gives one. Where layouts must be equal, a question of as many tokens is drawn. What an
    example gets depends on `seed`, its question and its images, not on the batch.

    Raises, when applied, CorruptionError where there is no other question (of as many tokens) to draw, and as
    `corrupted_prompt`; PromptError for an empty question.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> prompt = model.prompt("What colour is K ?")
    >>> other_question(lambda prompt, i: prompt.questions[i].replace("K", "Q"))(model, prompt).questions
    ['What colour is Q ?']
    """
    seed = seed_of(seed)
    flag("equal_layout", equal_layout)
    if callable(questions):
        called("questions", questions, "a function (prompt, example's index) -> question", n_arguments=2)
    if not callable(questions) and not isinstance(questions, str):
        entries = listed("questions", questions, "a question, or a list of questions or of Example")
        pool = [entry.question if isinstance(entry, Example) else entry for entry in entries]
        texts("questions", pool)
        if not pool:
            raise CorruptionError("other_question: there is no question to draw from")
    else:
        pool = []

    def exchanged(model: HookedVLM, prompt: Prompt, example: int) -> str:
        if callable(questions):
            return questions(prompt, example)
        if isinstance(questions, str):
            return questions
        own, n_images = prompt.questions[example], len(prompt.images[example])
        others = sorted({question for question in pool if question != own})
        rng = np.random.default_rng([seed, *example_seed(prompt, example)])
        n_tokens = _n_tokens(model, own, n_images) if equal_layout else 0
        for index in rng.permutation(len(others)):
            if not equal_layout or _n_tokens(model, others[index], n_images) == n_tokens:
                return others[index]
        alike = f"; none is laid out in the {n_tokens} tokens of its own" if equal_layout and others else ""
        raise CorruptionError(
            f"other_question: among {len(pool)} question(s) to draw from, {len(others)} differ from that of "
            f"example {example} ({own!r}){alike}"
        )

    def corruption(model: HookedVLM, prompt: Prompt) -> Prompt:
        check_call(model, prompt)
        made = [exchanged(model, prompt, example) for example in range(len(prompt))]
        return corrupted_prompt(model, prompt, questions=made, equal_layout=equal_layout)

    return corruption


def evidence_of(examples: Sequence[Example]) -> Callable[[Prompt, int], list[Evidence]]:
    """Where each example of a prompt has its evidence, for corruptions of regions.

    A prompt holds no evidence. An example of the prompt is known by its question and the pixels of its images, in
    any batch and order. Raises CorruptionError for two examples alike in those but not in their evidence; when
    asked, for an example that is not among `examples` (as one whose images were corrupted before), or has no
    evidence.
    """
    known: dict[tuple[str, ...], tuple[Evidence, ...]] = {}
    examples = examples_of(examples)
    for entry in examples:
        key = (entry.question, *map(pixel_fingerprint, entry.images))
        if known.setdefault(key, entry.evidence) != entry.evidence:
            raise CorruptionError(
                f"two examples have the question {entry.question!r} and the same images, but not the same evidence"
            )

    def regions(prompt: Prompt, example: int) -> list[Evidence]:
        key = (prompt.questions[example], *map(pixel_fingerprint, prompt.images[example]))
        if key not in known:
            raise CorruptionError(
                f"example {example} of the prompt ({prompt.questions[example]!r} with {len(key) - 1} image(s)) is not "
                f"among the {len(examples)} example(s) given to evidence_of: they are matched by question and pixels"
            )
        if not known[key]:
            raise CorruptionError(f"example {example} ({prompt.questions[example]!r}) has no evidence")
        return list(known[key])

    return regions


# ---------------------------------------------------------------------- noise


def noise_images(
    std: float = 3.0, *, positions: Positions = None, deepstack: bool = True, seed: int = 0
) -> Intervention:
    """Add Gaussian noise to the image embeddings as they enter the language model (`image.hook_embed`).

    Every element gets noise of mean 0 and of `std` times the standard deviation that all elements of the example's
    clean image embeddings have (Meng et al. 2022, ROME, section 2.1: 3 times that of the subjects' embeddings). At
    `positions` alone, those of them that are visual: `lambda prompt: prompt.token_map.box(0, box)`. Learnt
    separators are visual. `positions=if_any("image")` leaves examples without an image as they are.

    Where the family adds visual features to the stream again between layers (`hook_deepstack`), these get noise of
    `std` times their own deviation too, or the image would reach the model clean; `deepstack=False` leaves them be.

    An example's noise depends on `seed`, its tokens and its images: it is the same in every run, in any batch, and
    where a run computes the prompt's end alone. Each prompt is run once without noise, to measure the deviation.
    Generated tokens get none.

    Raises ValueError for a `std` that is not above 0; when built, CorruptionError where an example has no visual
    position to be changed or the family's prompts have none at all, and as `Edit`.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> prompt = model.prompt_examples(mmlens.scene_examples("objects", 2, seed=0))
    >>> hooks = noise_images(seed=1)(model, prompt)
    >>> logits = model.run_with_hooks(prompt, fwd_hooks=hooks)
    >>> hooks[0][1].fired, hooks[0][1].size > 0
    (1, True)
    """
    std, seed = real_number("std", std, above=0), seed_of(seed)
    flag("deepstack", deepstack)

    def intervention(model: HookedVLM, prompt: Prompt) -> list[Hook]:
        check_call(model, prompt)
        is_image = model.image_mask(prompt)
        if is_image is None:
            raise CorruptionError(
                f"prompts of {model.family.model_type!r} have no visual positions: the model reads images by "
                "cross-attention, so no image embedding enters the stream"
            )
        is_image = is_image.cpu()
        chosen = positions_mask(prompt, if_any("image") if positions is None else positions)
        assert chosen is not None
        where = chosen.cpu() & is_image
        clean = (~where.any(1)).nonzero().flatten().tolist()
        if clean and not isinstance(positions, IfAny):
            raise CorruptionError(
                f"noise_images: example(s) {clean} would stay clean: they have "
                + ("no image" if positions is None else "no visual position among those chosen")
                + "; if_any(positions) leaves them so"
            )
        if len(clean) == len(prompt):
            return []
        names = ["image.hook_embed"]
        if deepstack:
            names += [block(layer, "hook_deepstack") for layer in model.anatomy.deep_after]
        check_same_twice(model.hf_model)
        with torch.no_grad():
            _, cache = model.run_with_cache(prompt, names_filter=names, logits_to_keep=1)
        return [
            (
                name,
                Edit(
                    model,
                    prompt,
                    name,
                    _added(_noise(prompt, is_image, cache[name], std, [seed, number]), is_image),
                    positions=if_any(where),
                    generated=False,
                ),
            )
            for number, name in enumerate(names)
        ]

    return intervention


def _noise(
    prompt: Prompt,
    is_image: Bool[Tensor, "batch pos"],
    embeddings: Float[Tensor, "image_token d_model"],
    std: float,
    seeds: list[int],
) -> Float[Tensor, "image_token d_model"]:
    """Noise for every example, drawn on the CPU, so that it is the same on all devices."""
    noise = []
    for example, own in enumerate(embeddings.split(is_image.sum(1).tolist())):
        rng = np.random.default_rng([*seeds, *example_seed(prompt, example)])
        drawn = torch.from_numpy(rng.standard_normal(tuple(own.shape), dtype=np.float32))
        noise.append(drawn * (std * float(own.double().std(correction=0))) if len(own) else drawn)
    return torch.cat(noise).to(embeddings)


def _added(noise: Float[Tensor, "image_token d_model"], is_image: Bool[Tensor, "batch pos"]) -> Change:
    """The change that adds to each visual row in hand the noise of its position."""
    number = torch.full(is_image.shape, -1)
    number[is_image] = torch.arange(len(noise))

    def change(x: Tensor, here: Here) -> Tensor:
        rows = here.of_prompt(number, -1)
        rows = rows[rows >= 0]
        if len(rows) != len(x):
            raise InvalidValueError(
                f"noise_images: the run has {len(x)} image tokens where its prompt has {len(rows)}; it was built for "
                "another prompt"
            )
        return x + noise[rows.to(noise.device)].to(x)

    return change


# ---------------------------------------------------------------------- regions


Pixels = UInt8[np.ndarray, "_ _ 3"]


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


def _of_regions(
    where: Sequence[Where], image: int, edit: Callable[..., list[Pixels]]
) -> Callable[[HookedVLM, Prompt], Prompt]:
    """The corruption that edits the pixels of every example: `edit(pixels of its images, its regions of each
    `where`, its name for errors, prompt, example)`."""

    def corruption(model: HookedVLM, prompt: Prompt) -> Prompt:
        check_call(model, prompt)
        made = []
        for example, own in enumerate(prompt.images):
            regions = [_regions(each, prompt, example, image) for each in where]
            edited = edit([np.array(each) for each in own], regions, f"example {example}", prompt, example)
            made.append([Image.fromarray(pixels) for pixels in edited])
        return corrupted_prompt(model, prompt, images=made)

    return corruption


def _regions(where: Any, prompt: Prompt, example: int, image: int) -> list[PixelRegion]:
    """What `where` means in one example."""
    if callable(where):
        where = called("where", where, "a function (prompt, example's index) -> region", n_arguments=2)(
            prompt, example
        )
    given = where
    if hasattr(given, "box") and hasattr(given, "image"):
        return [_pixel_region(prompt, example, given.image, given.box)]
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise CorruptionError(
            f"example {example}: a region is a box (left, top, right, bottom), an Evidence, or a list of them, not "
            f"{given!r}"
        )
    if not given:
        raise CorruptionError(f"example {example}: the list of regions is empty")
    if not isinstance(given[0], (Sequence, Region)) or isinstance(given[0], str):
        return [_pixel_region(prompt, example, image, given)]
    return [region for each in given for region in _regions(each, prompt, example, image)]


def _pixel_region(prompt: Prompt, example: int, image: int, box: Sequence[float] | None) -> PixelRegion:
    width, height = prompt.images[example][_checked_image(prompt, example, image)].size
    if box is None:
        return PixelRegion(image, (0, 0, width, height))
    where = f"image {image} of example {example}"
    left, top, right, bottom = checked_box(box, (width, height), where)
    low = (math.floor(left + _SLIVER), math.floor(top + _SLIVER))
    high = (math.ceil(right - _SLIVER), math.ceil(bottom - _SLIVER))
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


# ---------------------------------------------------------------------- plumbing


def _unchanged(model: HookedVLM, before: Prompt, after: Prompt, example: int) -> str:
    """Why one example's inputs are what they were; "" where they are not."""
    tokens = [_real_tokens(prompt, example) for prompt in (before, after)]
    if not torch.equal(*tokens):
        return ""
    images = [[pixel_fingerprint(each) for each in prompt.images[example]] for prompt in (before, after)]
    if images[0] == images[1]:
        return "no pixel of its images and no token of its question is another"
    pair = [before, after]
    if len(before) > 1 or before.image_features is not None:
        # Families pack the images of a batch in ways of their own; alone, an example's inputs are all there is.
        pair = [model.prompt(prompt.questions[example], prompt.images[example]) for prompt in pair]
    if _equal_inputs(*(prompt.inputs for prompt in pair)):
        return (
            "pixels were changed, but the processor crops or shrinks the change away before the model sees it"
        )
    return ""


def _equal_inputs(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        for name, value in one.items()
    )


def _real_tokens(prompt: Prompt, example: int) -> Int[Tensor, " _"]:
    return prompt.inputs["input_ids"][example][~prompt.token_map.is_padding[example]]


def _answered(model: HookedVLM, before: Prompt, after: Prompt) -> Prompt:
    """`after` with the answers of `before`."""
    names = ("answers", "candidates", "answer_ids", "candidate_ids", "answer_starts", "spelling")
    kept = replace(after, **{name: getattr(before, name) for name in names})
    if before.answers is None or before.text == after.text:
        return kept
    candidates = before.candidates or [()] * len(before)
    return answered(kept, model.processor, before.answers, candidates, before.answer_starts)


def _n_tokens(model: HookedVLM, question: str, n_images: int) -> int:
    """How long the rendered prompt is, placeholders of images not expanded."""
    processor: Any = model.processor
    text = "".join(render(processor, question, n_images))
    return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} pixels"


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
            ("tile", place.tile),
            ("row", place.row),
            ("column", place.col),
        )
        if value is not None
    ]
    return f"{place.kind} ({', '.join(parts)})" if parts else place.kind
