"""Layouts of learnt queries: every pixel of an image reaches its own tokens alone, and no box is a token's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tiny import FAMILIES, TINY, record_of, tiny_images, tiny_model, tiny_processor
from torch import Tensor, nn

from mmlens.errors import MmlensWarning
from mmlens.families.layouts import queries
from mmlens.model.prompt import Prompt
from mmlens.model.prompt_making import make_prompt
from mmlens.token_map import NO_PATCH, WHOLE_IMAGE_TILE, TokenMapError

torch.set_num_threads(1)

QUERIED = tuple(
    name
    for name in FAMILIES
    if TINY[name].processor
    and getattr(record_of(name).layout, "__module__", None) == queries.__name__
    and record_of(name).layout is not queries.cross_attention
)
QUESTIONS = ["What colour is the letter K in the second image?", "Where?"]


def _rows(family: str) -> list[list[Image.Image]]:
    images = tiny_images(3, seed=5, sizes=[(160, 120), (90, 200), (130, 133)])
    return [images[:2], images[2:]] if TINY[family].most_images is None else [images[:1], images[1:2]]


def _prompt(family: str, images: Sequence[Sequence[Image.Image]], processor: Any = None) -> Prompt:
    return make_prompt(processor or tiny_processor(family), record_of(family).layout, QUESTIONS, images)


def _queries(prompt: Prompt, image: int, example: int) -> Tensor:
    """[batch, pos] where an image's queries stand, learnt separators left out."""
    return prompt.token_map.image_tokens(image, example=example) & (prompt.token_map.tile != NO_PATCH)


class _Entered(Exception):
    """Carries the first decoder layer's input out of the forward pass."""


def _entering(model: nn.Module, prompt: Prompt) -> Tensor:
    """[batch, pos, d_model] what enters the first decoder layer."""

    def stop(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        raise _Entered(args[0] if args else kwargs["hidden_states"])

    # What get_decoder() returns differs in depth; its first list of modules is the decoder's layers.
    layers = next(module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList))
    handle = layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**prompt.inputs)
    except _Entered as entered:
        return entered.args[0]
    finally:
        handle.remove()
    raise AssertionError("the decoder was not reached")


@pytest.mark.parametrize("family", QUERIED)
def test_an_image_changes_its_own_queries_alone(family: str) -> None:
    images = _rows(family)
    clean_prompt, model = _prompt(family, images), tiny_model(family)
    clean = _entering(model, clean_prompt)
    for example, own in enumerate(images):
        for number, image in enumerate(own):
            inverted = [list(row) for row in images]
            inverted[example][number] = ImageOps.invert(image)
            changed = (_entering(model, _prompt(family, inverted)) - clean).abs().amax(-1) > 1e-4
            assert torch.equal(changed, _queries(clean_prompt, number, example))


@pytest.mark.parametrize("family", QUERIED)
def test_a_few_pixels_reach_every_query_of_an_untiled_image(family: str) -> None:
    """Which is why a box maps to none of them."""
    images = _rows(family)
    clean_prompt, model = _prompt(family, images), tiny_model(family)
    if clean_prompt.token_map.grids[0][0].tile.max() != WHOLE_IMAGE_TILE:
        pytest.skip("the image is cut into tiles, and a query reads one tile")
    pixels = np.array(images[0][0])
    pixels[40:80, 50:110] = 255 - pixels[40:80, 50:110]
    painted = [[Image.fromarray(pixels), *images[0][1:]], *images[1:]]
    changed = (_entering(model, _prompt(family, painted)) - _entering(model, clean_prompt)).abs().amax(-1)
    assert torch.equal(changed > 1e-5, _queries(clean_prompt, 0, 0))


@pytest.mark.parametrize("family", QUERIED)
def test_queries_have_an_image_and_a_tile_but_no_box(family: str) -> None:
    token_map = _prompt(family, _rows(family)).token_map
    with pytest.raises(TokenMapError, match=r"image 0 of example 0: its \d+ tokens are learnt queries"):
        token_map.box(0, (0, 0, 20, 20))
    assert torch.equal(token_map.image_tokens(0)[0], token_map.is_image[0] & (token_map.image[0] == 0))
    for position in torch.nonzero(token_map.image_tokens(0)[0]).flatten().tolist():
        place = token_map.where(position)
        assert (place.image, place.row, place.box) == (0, None, None)
        tile = int(token_map.tile[0, position])
        assert (place.kind, place.tile) == (("separator", None) if tile == NO_PATCH else ("query", tile))


def test_a_number_of_queries_that_is_none_is_refused() -> None:
    processor = tiny_processor("blip-2")
    inputs = _prompt("blip-2", _rows("blip-2"), processor).inputs
    processor.num_query_tokens = None
    with pytest.raises(TokenMapError, match="num_query_tokens is None; expected a positive number"):
        queries.per_image("num_query_tokens")(processor, inputs, [(64, 48)])


def test_another_number_of_queries_than_the_prompt_has_is_refused() -> None:
    processor = tiny_processor("blip-2")
    processor.more_queries = 7
    with pytest.raises(TokenMapError, match=r"input_ids holds 6 visual token\(s\).* predicts 7"):
        make_prompt(processor, queries.per_image("more_queries"), "What?", tiny_images(1))


def test_images_read_by_cross_attention_have_no_position() -> None:
    with pytest.warns(MmlensWarning, match=r"have \[2, 1\] images: .*batches of equal numbers"):
        prompt = _prompt("mllama", [tiny_images(2), tiny_images(1)])
    assert [len(grids) for grids in prompt.token_map.grids] == [2, 1]
    assert not bool(prompt.token_map.is_image.any()) and bool(prompt.token_map.is_question.any())
    with pytest.raises(TokenMapError, match="image 1 of example 0 has no position in the prompt"):
        prompt.token_map.box(1, (0, 0, 5, 5))
