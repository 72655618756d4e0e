"""Occlusion: which tokens change with the pixels of a box, through the real processor and model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny import (
    FAMILIES,
    TINY,
    record_of,
    tiny_model,
)
from torch import Tensor, nn

from mmlens.families.layouts import block_grid, fixed_grid, queries, visual_codes
from mmlens.model.prompt import Prompt
from mmlens.model.prompt_making import make_prompt
from mmlens.token_map import WHOLE_IMAGE_TILE, TokenMap

LAID_OUT = tuple(
    name
    for name in FAMILIES
    if TINY[name].processor
    and getattr(record_of(name).layout, "__module__", None)
    not in (None, queries.__name__, visual_codes.__name__)
)
"""Families whose tokens show patches; test_queries.py has those of learnt queries, test_visual_codes.py of codes."""


NO_VISION_ATTENTION = ("gemma4_unified", "fuyu", "inkling_mm_model")


STEPS_OVER_PIXELS = ("molmo2",)
"""Families that shrink images without antialiasing: a small region may fall between the pixels they read."""

OWN_WINDOW = {"molmo2": ("model.multi_modal_projector.image_pooling_2d",)}
"""Attention of a token to the patches that it pools, which is how it sees them."""


class _Embedded(Exception):
    """Carries the language model's input out of the forward pass."""


def _with_injected(inputs: dict[str, Any]) -> Tensor:
    """What enters the decoder, and beside it what it adds at image positions before some layers (Granite)."""
    embeddings: Tensor = inputs["inputs_embeds"]
    injected = [] if inputs.get("deepstack_features") is None else inputs["deepstack_features"].values()
    spread = [torch.zeros_like(embeddings).masked_scatter(inputs["vision_mask"], each) for each in injected]
    return torch.cat([embeddings, *spread], dim=-1)


def _ungated(module: nn.Module, args: Any, output: Any) -> Any:
    """A gate made of the mean over the whole image (squeeze and excitation): its input instead."""
    return args[0]


def _keep_own_taps(model: nn.Module) -> None:
    """Convolutions whose kernels overlap keep the taps of their own stride: outputs then part the input.

    Which taps those are is the convention of a grid of cells. The whole kernel reaches further, and an odd one
    with a stride of 2 is centred on the first of its two pixels.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module.padding, str):
            for axis, (size, stride, padding) in enumerate(
                zip(module.kernel_size, module.stride, module.padding, strict=True), start=2
            ):
                others = [tap for tap in range(size) if not padding <= tap < padding + stride]
                kept = module.weight.data.index_fill(axis, torch.tensor(others, dtype=torch.long), 0)
                module.weight.data = kept * (size / (size - len(others))) ** 0.5
        elif type(module).__name__ in ("SEModule", "SqueezeExcite"):
            module.register_forward_hook(_ungated)


@functools.cache
def _model_without_vision_attention(family: str) -> nn.Module:
    model = tiny_model(family)
    decoder = model.get_decoder()

    def zeroed(module: nn.Module, args: Any, output: Any) -> Any:
        return (
            (torch.zeros_like(output[0]), *output[1:])
            if isinstance(output, tuple)
            else torch.zeros_like(output)
        )

    _keep_own_taps(model)
    n_zeroed = 0
    inside_decoder = {id(module) for module in decoder.modules()}
    windows = [model.get_submodule(path) for path in OWN_WINDOW.get(family, ())]
    for module in model.modules():
        mixes = type(module).__name__.endswith(("Attention", "Attention2d", "AttentionRope", "ShortConv"))
        if id(module) in inside_decoder or not mixes or module in windows:
            continue
        # A module around attention may add the residual stream as well, which must stay.
        if not any(
            type(part).__name__.endswith(("Attention", "Attention2d")) for part in list(module.modules())[1:]
        ):
            module.register_forward_hook(zeroed)
            n_zeroed += 1
    assert n_zeroed >= 3 or family in NO_VISION_ATTENTION

    def stop(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        raise _Embedded(_with_injected(kwargs))

    decoder.register_forward_pre_hook(stop, with_kwargs=True)
    return model


def embeddings_of(family: str, prompt: Prompt) -> Tensor:
    """[batch, pos, d_model] what enters the language model at every position, vision attention off."""
    try:
        with torch.no_grad():
            # Llama 4's processor gives bfloat16.
            inputs = {
                k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v
                for k, v in prompt.inputs.items()
            }
            _model_without_vision_attention(family)(**inputs)
    except _Embedded as reached:
        return reached.args[0]
    raise AssertionError("the language model was not reached")


def painted(image: Image.Image, region: tuple[int, int, int, int]) -> Image.Image:
    """The image with a region of pixels set to the far end of the scale, channel by channel."""
    pixels = np.array(image)
    left, top, right, bottom = region
    patch = pixels[top:bottom, left:right]
    patch[...] = np.where(patch.mean(axis=(0, 1)) < 128, 255, 0)
    return Image.fromarray(pixels)


def region_in(
    box: Sequence[float], margin: tuple[float, float], generator: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """Some whole pixels of a box that keep the margin: at least half of what there is, at a random place."""
    edges = []
    for low, high, keep in ((box[0], box[2], margin[0]), (box[1], box[3], margin[1])):
        first, last = int(np.ceil(low + keep)), int(np.floor(high - keep))
        if last <= first:
            return None
        length = int(np.ceil((last - first) / 2))
        start = int(generator.integers(first, last - length + 1))
        edges.append((start, start + length))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


def _margins(
    family: str, processor: Any, size: tuple[int, int], token_map: TokenMap, example: int
) -> list[Tensor]:
    """How far in original pixels, in x and in y, resampling carries a pixel into each token's view."""
    boxes = token_map.boxes[example]
    margins = []
    for axis in range(2):
        length = (boxes[:, axis + 2] - boxes[:, axis]).nan_to_num()
        # A box at the image's edge may show less than a cell: the longest of its view tells the view's scale.
        views = token_map.image[example] * 1000 + token_map.tile[example]
        longest = torch.stack([length[views == view].max() for view in views])
        scale = (longest / TINY[family].cell).clamp(min=1)
        if family in ("idefics3", "smolvlm"):
            # Lanczos, reach 3: to the longest edge, to whole tiles, and the global image once more.
            first = max(size) / processor.image_processor.size["longest_edge"]
            twice = 3 * max(1, first) * (1 if first == 1 else 2)
            margins.append(twice + 1 + torch.where(token_map.tile[example] == WHOLE_IMAGE_TILE, 3 * scale, 0))
        else:
            margins.append(TINY[family].reach * scale + 1)
    return margins


def occlusion_trials(
    family: str,
    processor: Any,
    questions: list[str],
    images: list[list[Image.Image]],
    seed: int,
    n_trials: int,
) -> list[tuple[set[int], set[int], int]]:
    """(changed positions, expected positions, occluded position) of one example per trial."""
    layout = record_of(family).layout
    assert layout is not None
    clean_prompt = make_prompt(processor, layout, questions, images)
    clean = embeddings_of(family, clean_prompt)
    token_map = clean_prompt.token_map
    generator = np.random.default_rng(seed)
    patches = torch.nonzero(token_map.row >= 0).tolist()
    trials: list[tuple[set[int], set[int], int]] = []
    for index in np.concatenate([generator.permutation(len(patches)) for _ in range(4)]):
        if len(trials) == n_trials:
            break
        example, position = patches[index]
        place = token_map.where(position, example)
        assert place.box is not None and place.image is not None
        image = images[example][place.image]
        margin_x, margin_y = _margins(family, processor, image.size, token_map, example)
        region = region_in(place.box, (float(margin_x[position]), float(margin_y[position])), generator)
        if region is None:
            continue
        # What the painted pixels reach must be what they lie in, or rounding decides: such draws are left out.
        boxes = token_map.boxes[example].nan_to_num(nan=-1e9)
        same_image = token_map.image[example] == place.image
        area = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        reached = (
            (boxes[:, 0] < region[2] + margin_x)
            & (boxes[:, 2] > region[0] - margin_x)
            & (boxes[:, 1] < region[3] + margin_y)
            & (boxes[:, 3] > region[1] - margin_y)
        ).where(same_image & area, torch.tensor(False))
        inside = token_map.box(place.image, region, example=example)[example]
        if not torch.equal(reached, inside):
            continue
        shown_x = boxes[:, 2].clamp(max=region[2]) - boxes[:, 0].clamp(min=region[0])
        shown_y = boxes[:, 3].clamp(max=region[3]) - boxes[:, 1].clamp(min=region[1])
        if family in STEPS_OVER_PIXELS and bool(((shown_x < margin_x) | (shown_y < margin_y))[inside].any()):
            continue
        changed_images = [list(own) for own in images]
        changed_images[example][place.image] = painted(image, region)
        occluded = embeddings_of(family, make_prompt(processor, layout, questions, changed_images))
        assert occluded.shape == clean.shape
        strength = (occluded - clean).norm(dim=-1)
        changed = (occluded - clean).abs().amax(-1) > 1e-4
        if not TINY[family].exact_proof:
            # Convolutions carry some of the change to neighbours: those that change most count.
            most = strength[example].topk(int(inside.sum())).values.min()
            changed[example] &= strength[example] >= most
        others = torch.arange(len(questions)) != example
        assert not bool(changed[others].any()), "another example of the batch changed"
        trials.append(
            (
                set(torch.nonzero(changed[example]).flatten().tolist()),
                set(torch.nonzero(inside).flatten().tolist()),
                position,
            )
        )
    return trials


def check_trials(family: str, trials: list[tuple[set[int], set[int], int]], at_least: int = 4) -> None:
    assert len(trials) >= at_least, f"only {len(trials)} boxes were large enough to test"
    for changed, expected, position in trials:
        assert position in expected
        assert changed == expected
        if record_of(family).layout in (fixed_grid.llava, block_grid.qwen):
            assert changed == {position}


SIZES = {
    "square": (160, 160),
    "wide": (300, 130),
    "tall": (110, 250),
    "odd": (211, 187),
    "strip": (400, 100),
}


def prompt_of_images(family: str, processor: Any, images: list[Image.Image]) -> Prompt:
    layout = record_of(family).layout
    assert layout is not None
    return make_prompt(processor, layout, "What colour is K?", images)
