"""What is drawn for an example depends on the example, not on the batch that it stands in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import mmlens
from mmlens.data.examples import Example
from mmlens.model.fingerprints import example_seed
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import Intervention

HEADS = [(0, 1), (0, 6), (1, 3), (2, 2), (3, 0), (3, 5)]


def examples() -> list[Example]:
    """Prompts of unlike length, images and kind, in an order that mixes them."""
    kinds = [mmlens.scene_examples(kind, 4, seed=3) for kind in ("objects", "images")]
    return [example for pair in zip(*kinds, strict=True) for example in pair]


def drawn() -> dict[str, Callable[[], Intervention]]:
    """Every intervention that draws something for each example."""
    pool = [*mmlens.scene_examples("objects", 6, seed=9), *mmlens.scene_examples("images", 6, seed=9)]
    return {
        "resample": lambda: mmlens.ablate(HEADS, "resample", reference=pool, seed=1),
        "resample the image": lambda: mmlens.ablate(
            ["image", (2, "mlp")], "resample", reference=pool, seed=1
        ),
        "noise": lambda: mmlens.interventions.noise_images(seed=1),
        "other image": lambda: mmlens.patch(
            "blocks.1.hook_resid_pre", mmlens.interventions.other_image(pool, seed=1)
        ),
        "other question": lambda: mmlens.patch(
            "hook_embed", mmlens.interventions.other_question(pool, seed=1)
        ),
    }


@pytest.mark.parametrize("name", drawn())
def test_effects_do_not_depend_on_the_batch_size(micro: HookedVLM, name: str) -> None:
    by_size = {
        size: mmlens.effect(micro, examples(), drawn()[name](), mmlens.logit_difference, batch_size=size)
        for size in (1, 3)
    }
    assert (by_size[1].values - by_size[1].clean).abs().min() > 0.05
    torch.testing.assert_close(by_size[3].values, by_size[1].values, atol=2e-3, rtol=1e-4)
    reordered = mmlens.effect(micro, examples()[::-1], drawn()[name](), mmlens.logit_difference, batch_size=8)
    torch.testing.assert_close(reordered.values.flip(0), by_size[1].values, atol=2e-3, rtol=1e-4)


def test_sweeps_do_not_depend_on_the_batch_size(micro: HookedVLM) -> None:
    tables = [
        mmlens.sweep(
            micro,
            examples(),
            {name: make() for name, make in drawn().items()},
            mmlens.logit_difference,
            batch_size=size,
            progress=False,
        ).sort_values(["intervention", "example"])
        for size in (3, 8)
    ]
    first, second = (table["value"].to_numpy() for table in tables)
    assert abs(first - second).max() < 2e-3


@pytest.mark.slow
def test_core_heads_does_not_depend_on_the_batch_size(micro: HookedVLM) -> None:
    selection = mmlens.scene_examples("objects", 8, seed=0)
    outcomes = [
        mmlens.core_heads(
            micro,
            selection,
            examples(),
            counts=[3],
            modes=["resample"],
            n_draws=1,
            batch_size=size,
            progress=False,
        ).outcomes
        for size in (3, 8)
    ]
    assert list(outcomes[0]["id"]) == list(outcomes[1]["id"])
    assert (outcomes[0]["value"] - outcomes[1]["value"]).abs().max() < 2e-3


def test_the_regions_of_a_permutation_test_do_not_depend_on_padding(micro: HookedVLM) -> None:
    """A shorter prompt beside longer ones is padded; the places drawn for it stay the same."""
    short = mmlens.scene_examples("objects", 3, seed=0)
    longer = [
        Example(f"{e.question} {e.question}", e.answer, e.images, e.evidence, e.kind)
        for e in mmlens.scene_examples("objects", 3, seed=1)
    ]
    found = [
        mmlens.scores.ram_significance(
            micro, [*short, *longer], max_regions=6, n_resamples=1999, batch_size=size, progress=False
        ).masses
        for size in (1, 6)
    ]
    for alone, together in zip(*found, strict=True):
        torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-4)


def test_an_examples_numbers_are_its_own(micro: HookedVLM) -> None:
    batch = micro.prompt_examples(examples())
    assert bool(batch.token_map.is_padding.any())
    seeds = [example_seed(batch, row) for row in range(len(batch))]
    assert [example_seed(micro.prompt_examples([e]), 0) for e in examples()] == seeds
    assert len({tuple(seed) for seed in seeds}) == len(seeds)


def chats() -> list[Example]:
    """Few-shot chats of unlike length: the first two differ in the shot's image alone, the third in its answer."""
    one, other, third = mmlens.scene_examples("objects", 3, seed=3)

    def after(shot: Example, answer: str, example: Example) -> Example:
        image = {"type": "image"}
        messages = [
            {"role": "user", "content": [image, {"type": "text", "text": one.question}]},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": [image, {"type": "text", "text": example.question}]},
        ]
        images = (*shot.images, *example.images)
        return Example(messages=messages, images=images, answer=example.answer, candidates=example.candidates)

    return [
        after(one, one.answer, third),
        after(other, one.answer, third),
        after(one, "red blue", third),
        *mmlens.scene_examples("images", 1, seed=3),
    ]


def test_every_turn_of_a_chat_is_part_of_its_numbers(micro: HookedVLM) -> None:
    """Of a shot's image and of its answer too, and whatever batch it stands in."""
    batch = micro.prompt_examples(chats())
    assert bool(batch.token_map.is_padding.any()) and batch.questions[0] == batch.questions[2]
    seeds = [tuple(example_seed(batch, row)) for row in range(len(batch))]
    assert len(set(seeds)) == len(set(batch.fingerprints)) == len(batch)
    for row, example in enumerate(chats()):
        alone = micro.prompt_examples([example])
        assert (
            tuple(example_seed(alone, 0)) == seeds[row] and alone.fingerprints[0] == batch.fingerprints[row]
        )


def test_what_is_drawn_for_a_chat_does_not_depend_on_its_batch(micro: HookedVLM) -> None:
    pool = mmlens.scene_examples("images", 6, seed=9)
    resample = mmlens.ablate(HEADS, "resample", reference=[*pool, *chats()], seed=1)
    found = [
        mmlens.effect(micro, chats(), resample, mmlens.answer_log_probability, batch_size=size).values
        for size in (1, 4)
    ]
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-3)
