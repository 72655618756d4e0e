"""Families whose images are codes: no pixel reaches an embedding but through the choice of a code.

The proof has two halves. The encoder's: painting a cell moves the values that codes are chosen from most there,
so the centre of what changes follows the painted cell in rows and in columns (loosely, as convolutions are wide).
The model's: a position of the prompt holds another embedding if, and only if, the code of that very row and
column is another.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import FAMILIES, TINY, record_of, tiny_images, tiny_inputs, tiny_model, tiny_processor
from torch import Tensor, nn
from transformers import ProcessorMixin

from mmlens.families.layouts import visual_codes
from mmlens.model.prompt import Prompt
from mmlens.model.prompt_making import make_prompt

torch.set_num_threads(1)

CODED = tuple(
    name
    for name in FAMILIES
    if getattr(record_of(name).layout, "__module__", None) == visual_codes.__name__ and TINY[name].processor
)


class _Seen:
    """What a forward pass of the model chose and embedded."""

    def __init__(self, family: str) -> None:
        self.model = tiny_model(family)
        self.values: list[Tensor] = []
        self.embeddings: Tensor
        quantizer = next(
            module for module in self.model.modules() if type(module).__name__.endswith("VectorQuantizer")
        )
        quantizer.register_forward_pre_hook(self._keep_values)
        decoder = self.model.get_decoder()
        first = decoder.layers[0]
        first.register_forward_pre_hook(self._keep_embeddings, with_kwargs=True)
        self.codes_of = quantizer

    def _keep_values(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # [image, channel, row, column], or with a time axis of one in front of the channels. Some families give all
        # images at once, others one at a time.
        self.values += args[0].reshape(len(args[0]), *args[0].shape[-3:])

    def _keep_embeddings(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> None:
        self.embeddings = args[0] if args else kwargs["hidden_states"]

    def __call__(self, prompt: Prompt) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """[row, column, channel] values and [row, column] codes of each image, [batch, pos, d_model] embeddings."""
        self.values = []
        with torch.no_grad():
            self.model(**prompt.inputs)
            values = [image.movedim(0, -1) for image in self.values]
            table = self.codes_of.embedding
            # The nearest code; Apertus takes the one of the largest inner product.
            codes = [
                table(image).argmax(-1)
                if isinstance(table, nn.Linear)
                else torch.cdist(image.flatten(0, 1), table.weight).argmin(-1).reshape(image.shape[:2])
                for image in values
            ]
        return values, codes, self.embeddings


def _painted(image: Image.Image, box: tuple[float, ...]) -> Image.Image:
    pixels = np.array(image)
    left, top, right, bottom = (round(edge) for edge in box)
    patch = pixels[top:bottom, left:right]
    patch[...] = np.where(patch.mean(axis=(0, 1)) < 128, 255, 0)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("family", CODED)
def test_a_token_is_the_code_of_its_cell(family: str) -> None:
    processor, layout, seen = tiny_processor(family), record_of(family).layout, _Seen(family)
    questions = ["What colour is the letter K in the second image?", "and"]
    images = [tiny_images(2, seed=5, sizes=[(64, 48), (40, 72)]), tiny_images(1, seed=6, sizes=[(60, 70)])]
    clean_prompt = make_prompt(processor, layout, questions, images)
    token_map = clean_prompt.token_map
    values, codes, embeddings = seen(clean_prompt)
    generator = np.random.default_rng(0)
    places, centres = [], []
    n_changed = 0
    for number, (example, image) in enumerate([(0, 0), (0, 1), (1, 0)]):
        own = torch.nonzero((token_map.image[example] == image) & (token_map.row[example] >= 0)).flatten()
        for position in generator.choice(own.numpy(), size=10, replace=False):
            place = token_map.where(int(position), example)
            assert place.box is not None and place.row is not None and place.col is not None
            painted = [list(each) for each in images]
            painted[example][image] = _painted(images[example][image], place.box)
            new_values, new_codes, new_embeddings = seen(make_prompt(processor, layout, questions, painted))
            assert len(values) == len(new_values) == 3
            assert all(torch.equal(new_values[i], values[i]) for i in range(3) if i != number)

            rows, columns = (
                int(token_map.row[example][own].max()) + 1,
                int(token_map.col[example][own].max()) + 1,
            )
            # Where images are padded to one size, what lies beyond an image's own cells is no token.
            strength = (new_values[number] - values[number])[:rows, :columns].norm(dim=-1) ** 4
            weights = strength / strength.sum()
            centres.append(
                [
                    float((weights.sum(1) * torch.arange(rows)).sum()) / rows,
                    float((weights.sum(0) * torch.arange(columns)).sum()) / columns,
                ]
            )
            places.append([place.row / rows, place.col / columns])

            other_code = new_codes[number] != codes[number]
            other_embedding = (new_embeddings != embeddings).any(-1)
            expected = torch.zeros_like(other_embedding)
            expected[example, own] = other_code[token_map.row[example][own], token_map.col[example][own]]
            assert torch.equal(other_embedding, expected)
            n_changed += int(expected.sum())
    assert n_changed > 30
    for axis in range(2):
        assert np.corrcoef(np.array(places)[:, axis], np.array(centres)[:, axis])[0, 1] > 0.6


def test_the_end_of_a_line_belongs_to_its_image_and_shows_nothing() -> None:
    layout = record_of("emu3").layout
    prompt = make_prompt(tiny_processor("emu3"), layout, "What?", tiny_images(1, sizes=[(64, 40)]))
    grid = prompt.token_map.grids[0][0]
    height, width = prompt.inputs["image_sizes"][0].tolist()
    rows, columns = height // 8, width // 8
    assert len(grid) == rows * (columns + 1)
    assert (grid.row.reshape(rows, columns + 1)[:, -1] == -1).all()
    assert np.nanmax(grid.boxes[:, 2]) == pytest.approx(64) and np.nanmax(grid.boxes[:, 3]) == pytest.approx(
        40
    )


def test_chameleon_sees_the_middle_of_a_long_image() -> None:
    layout = record_of("chameleon").layout
    prompt = make_prompt(tiny_processor("chameleon"), layout, "What?", tiny_images(1, sizes=[(96, 24)]))
    boxes = prompt.token_map.grids[0][0].boxes
    assert (boxes[:, 0].min(), boxes[:, 2].max()) == pytest.approx((36, 60))


@pytest.mark.skipif("apertus1p5" not in FAMILIES, reason="new in transformers 5.24")
def test_the_codes_of_apertus_are_cells_of_the_resized_image_row_by_row() -> None:
    """On inputs made by hand, where there is no torchvision: repainted cells change the embeddings there alone."""
    inputs, seen = tiny_inputs("apertus1p5", [1]), _Seen("apertus1p5")
    rows, columns = (inputs["image_sizes"][0] // 8).tolist()
    layout = record_of("apertus1p5").layout
    assert layout is not None
    processor: Any = ProcessorMixin.__new__(ProcessorMixin)
    processor.image_processor = SimpleNamespace(spatial_factor=8)
    (grid,) = layout(processor, inputs, [(100, 50)])
    # An image of 100 x 50 pixels was shown at columns x rows cells.
    assert grid.boxes[0].tolist() == pytest.approx([0, 0, 100 / columns, 50 / rows])
    assert grid.boxes[columns].tolist() == pytest.approx([0, 50 / rows, 100 / columns, 100 / rows])
    seen.model(**inputs)
    clean, positions = seen.embeddings, inputs["input_ids"][0] == seen.model.config.image_token_id
    assert int(positions.sum()) == len(grid) == rows * columns
    codes = seen.model.model.get_image_tokens(inputs["pixel_values"], inputs["image_sizes"])[0]
    table = seen.model.get_input_embeddings().weight
    assert torch.equal(clean[0, positions], table[codes])
    shown = inputs["pixel_values"].clone()
    shown[:, :, : 8 * rows // 2] *= -3
    seen.model(**{**inputs, "pixel_values": shown})
    moved = (seen.embeddings != clean).any(-1)[0, positions].reshape(rows, columns).float()
    assert moved[: rows // 2].mean() > moved[rows // 2 + 1 :].mean()
