"""Positions that one example of a batch does not have: an error that names it, unless `if_any` leaves it as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mmlens
from mmlens.data.examples import Example
from mmlens.interventions.ablation import mean_activations
from mmlens.interventions.edits import Edit
from mmlens.model.choosing import if_any, positions_mask
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import Intervention
from mmlens.model.prompt import Prompt

Where = Any
SOURCE = "blocks.1.hook_resid_pre"


def examples() -> list[Example]:
    """The second one has no image, the third another question."""
    first, third = mmlens.scene_examples("objects", 2, seed=0)
    return [first, Example("What colour is K ?", first.answer, candidates=first.candidates), third]


def other_images(model: HookedVLM, prompt: Prompt) -> Prompt:
    """The same questions about other images, where there are any."""
    shown = mmlens.scene_examples("objects", 1, seed=7)[0].images
    return model.prompt(prompt.questions, [list(shown[: len(own)]) for own in prompt.images])


READERS: dict[str, Callable[[HookedVLM, Where], Intervention]] = {
    "ablate": lambda model, where: mmlens.ablate([(0, 1), (2, "mlp")], positions=where),
    "ablate to the mean": lambda model, where: mmlens.ablate(
        [(0, 1)], "mean", reference=mean_activations(model, examples()), positions=where
    ),
    "ablate to uniform": lambda model, where: mmlens.ablate([(0, 1)], "uniform", positions=where),
    "patch": lambda model, where: mmlens.patch(SOURCE, other_images, positions=where),
    "patch from elsewhere": lambda model, where: mmlens.patch(
        SOURCE, other_images, positions=where, source_positions=where
    ),
    "path_patch": lambda model, where: mmlens.path_patch([(0, 1)], "logits", other_images, positions=where),
    "knockout of keys": lambda model, where: mmlens.knockout("last", where),
    "knockout of queries": lambda model, where: mmlens.knockout(where, first_of),
    "bias_attention": lambda model, where: mmlens.bias_attention([(0, 1)], where, 1.0),
    "bias_attention of queries": lambda model, where: mmlens.bias_attention(
        [(0, 1)], "text", 1.0, queries=where
    ),
    "scale_heads": lambda model, where: mmlens.interventions.scale_heads([(0, 1)], 2.0, where),
    "relay": lambda model, where: mmlens.interventions.relay(
        "blocks.0.hook_resid_pre", "blocks.2.hook_resid_pre", lambda x, source: x + source, positions=where
    ),
    "noise_images": lambda model, where: mmlens.interventions.noise_images(positions=where),
    "ablate the image": lambda model, where: mmlens.ablate("image", positions=where),
    "composed": lambda model, where: mmlens.compose(
        mmlens.ablate([(1, 1)]),
        mmlens.interventions.during(mmlens.ablate([(0, 1)], positions=where), "prompt"),
    ),
    "regions of a grid": lambda model, where: mmlens.effects.patch_layers_regions(
        model, other_images, regions={"there": where}
    )[1, "there"],
}


def first_of(prompt: Prompt) -> Tensor:
    """Each example's first real position, which every later one may attend to."""
    real = ~prompt.token_map.is_padding
    return real & (real.cumsum(1) == 1)


def image_after_the_first(prompt: Prompt) -> Tensor:
    return prompt.token_map.is_image & ~first_of(prompt)


def mask_of_images(prompt: Prompt) -> Tensor:
    return prompt.token_map.is_image


@pytest.mark.parametrize("name", READERS)
def test_an_example_without_the_positions_is_named(micro: HookedVLM, name: str) -> None:
    prompt = micro.prompt_examples(examples())
    where = image_after_the_first if name == "knockout of queries" else mask_of_images
    with pytest.raises(ValueError, match=r"in example\(s\) 1 of 3|example\(s\) \[1\] would stay clean"):
        READERS[name](micro, where)(micro, prompt)
    # An example alone is refused alike, and those that have images are not.
    with pytest.raises(ValueError, match=r"in example\(s\) 0 of 1|example\(s\) \[0\] would stay clean"):
        READERS[name](micro, where)(micro, micro.prompt_examples(examples()[1:2]))
    READERS[name](micro, where)(micro, micro.prompt_examples([examples()[0], examples()[2]]))


@torch.no_grad()
@pytest.mark.parametrize("name", READERS)
def test_by_name_it_is_left_as_it_is(micro: HookedVLM, name: str) -> None:
    """Each row as where the examples that have the positions are run alone, the others without the intervention."""
    prompt = micro.prompt_examples(examples())
    where = image_after_the_first if name == "knockout of queries" else mask_of_images
    lenient, strict = READERS[name](micro, if_any(where)), READERS[name](micro, where)
    under = micro.run_with_hooks(prompt, fwd_hooks=lenient(micro, prompt), logits_to_keep=1)
    for row, example in enumerate(examples()):
        alone = micro.prompt_examples([example])
        expected = micro(alone, logits_to_keep=1)
        if row != 1:
            expected = micro.run_with_hooks(alone, fwd_hooks=strict(micro, alone), logits_to_keep=1)
        elif name == "composed":
            expected = micro.run_with_hooks(
                alone, fwd_hooks=mmlens.ablate([(1, 1)])(micro, alone), logits_to_keep=1
            )
        torch.testing.assert_close(under[row], expected[0], atol=1e-3, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::mmlens.model.NoChangeWarning")
@pytest.mark.parametrize("name", ["ablate", "patch", "noise_images", "ablate the image", "path_patch"])
def test_effects_and_sweeps_count_it_in_any_batch(micro: HookedVLM, name: str) -> None:
    """Also where a batch holds no example that has the positions."""
    by_size = [
        mmlens.effect(
            micro,
            examples(),
            READERS[name](micro, if_any("image")),
            mmlens.answer_log_probability,
            batch_size=size,
        )
        for size in (1, 3)
    ]
    torch.testing.assert_close(by_size[0].values, by_size[1].values, atol=1e-3, rtol=1e-4)
    assert by_size[0].values[1] == by_size[0].clean[1]
    tables = [
        mmlens.sweep(
            micro,
            examples(),
            {"it": READERS[name](micro, if_any("image"))},
            mmlens.answer_log_probability,
            batch_size=size,
            progress=False,
        )
        for size in (1, 3)
    ]
    for table in tables:
        found = torch.tensor(table["value"].to_list()).float()
        torch.testing.assert_close(found, by_size[0].values, atol=1e-3, rtol=1e-4)


def test_masks_names_and_padding(micro: HookedVLM) -> None:
    prompt = micro.prompt_examples(examples())
    mask = torch.zeros(tuple(prompt.shape), dtype=torch.bool)
    mask[:, 0] = True
    assert prompt.token_map.is_padding[:, 0].tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"positions chooses no position in example\(s\) 1 of 3"):
        positions_mask(prompt, mask)
    with pytest.raises(
        ValueError, match=r"positions \('image'\) chooses no position in example\(s\) 1 of 3: .*if_any"
    ):
        Edit(micro, prompt, "hook_embed", lambda x, here: x, positions="image")
    assert torch.equal(positions_mask(prompt, if_any(mask)), mask)
    assert if_any(if_any("image")) == if_any("image")
    for every in ("last", "question", "text", "prompt"):
        positions_mask(prompt, every)
    with pytest.raises(ValueError, match="None is every position"):
        if_any(None)
    with pytest.raises(ValueError, match="no named positions 'imag'"):
        positions_mask(prompt, if_any("imag"))
    # Rows of visual positions alone: a mask of text chooses none of them.
    with pytest.raises(ValueError, match=r"positions chooses none of these in example\(s\) 0, 1, 2 of 3"):
        Edit(micro, prompt, "image.hook_embed", lambda x, here: x, positions="text")


def test_grids_by_position_patch_the_rows_that_have_it(micro: HookedVLM) -> None:
    """A column is padding in one row: that row is left, as the grid says."""
    prompt = micro.prompt_examples(examples())
    grid = mmlens.effects.patch_layers_positions(micro, other_images, prompt=prompt)
    hooks = grid[1, 0](micro, prompt)
    assert hooks[0][1].mask.nonzero().tolist() == [[0, 0], [2, 0]]


def test_an_image_to_ablate_is_asked_of_every_example(micro: HookedVLM) -> None:
    prompt = micro.prompt_examples(examples())
    with pytest.raises(ValueError, match=r"no image positions to ablate in example\(s\) 1 of 3"):
        mmlens.ablate("image")(micro, prompt)
    without = micro.prompt_examples(examples()[1:2])
    assert mmlens.ablate(["image"], positions=if_any("image"))(micro, without) == []
    # What is no image is ablated everywhere.
    names = [name for name, _ in mmlens.ablate(["image", (1, 1)], positions=if_any("text"))(micro, without)]
    assert names == ["blocks.1.attn.hook_z"]
