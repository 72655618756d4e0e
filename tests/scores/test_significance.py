"""Significance of RAM: against sums taken by hand, all permutations counted, and regions counted on paper."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import tiny
import torch
from planted import Planted, planted_model
from tiny.wrapped import hooked

import mmlens
from mmlens.data.examples import Evidence, Example
from mmlens.scores.significance import other_places, ram_significance, region_permutation_test


@functools.cache
def planted() -> Planted:
    return planted_model("llava")


def test_p_values_are_those_of_all_draws_counted() -> None:
    rng = np.random.default_rng(0)
    masses = [torch.from_numpy(rng.random((n, 3))) for n in (4, 3, 5, 2)]
    sums = np.array(
        [
            np.sum([m[i].numpy() for m, i in zip(masses, draw, strict=True)], 0)
            for draw in itertools.product(*(range(len(m)) for m in masses))
        ]
    )
    observed = np.sum([m[0].numpy() for m in masses], 0)
    exact = (sums >= observed - 1e-12).mean(0)
    found = region_permutation_test(masses, n_resamples=200_000, seed=1)
    np.testing.assert_allclose(found, exact, atol=0.004)


def test_masses_are_sums_of_the_plain_pattern() -> None:
    model, examples = planted().model, planted().examples(3, seed=0)
    found = ram_significance(model, examples, progress=False)
    prompt = model.prompt_examples(examples)
    outputs = model.hf_model(**prompt.inputs, output_attentions=False)
    assert outputs.logits.isfinite().all()
    _, cache = model.run_with_cache(prompt)
    for row, example in enumerate(examples):
        regions = [example.evidence, *other_places(prompt, row, example)]
        assert len(found.masses[row]) == len(regions) == 25
        for region, mass in zip(regions, found.masses[row], strict=True):
            keys = prompt.token_map.evidence(
                [region if r == row else e.evidence for r, e in enumerate(examples)]
            )[row]
            for layer in range(model.cfg.n_layers):
                pattern = cache[f"blocks.{layer}.attn.hook_pattern"][row]
                by_hand = pattern[:, prompt.token_map.is_question[row]][..., keys].sum(-1).mean(-1)
                torch.testing.assert_close(mass[layer], by_hand, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.ram.per_example, mmlens.ram(model, examples, progress=False).per_example)
    mean = torch.stack([own.mean(0) for own in found.masses])
    torch.testing.assert_close(found.lift.per_example, found.ram.per_example - mean)


def test_other_objects_leave_the_heads_that_match_alone() -> None:
    """Against all places a head that likes objects passes too; against the other objects only those that match."""
    case = planted()
    examples = case.examples(24, seed=3)
    truth = set(case.named("matching", "reader"))
    found = ram_significance(case.model, examples, regions=case.other_objects, progress=False)
    assert set(found.significant()) == truth and {len(own) for own in found.masses} == {8}
    table = found.table()
    assert {tuple(head) for head in table[["layer", "head"]][:2].to_numpy().tolist()} == truth
    assert (table["adjusted"][:2] <= 0.01).all() and (table["adjusted"][2:] > 0.05).all()
    looker = case.roles["looker"]
    assert found.p_values[looker] > 0.05 and abs(found.lift.values[looker]) < 1e-4
    assert found.significant(q=0.0001).heads == ()


def places(model: mmlens.HookedVLM, images: list, *evidence: Evidence) -> list[tuple[Evidence, ...]]:
    example = Example("Where?", "x", images=tuple(images), evidence=evidence)
    return other_places(model.prompt_examples([example]), 0, example)


def test_places_of_boxes_images_and_spans() -> None:
    model = hooked("qwen3_vl")
    wide, tall = (
        tiny.tiny_images(2, sizes=[(64, 48), (64, 48)]),
        tiny.tiny_images(3, sizes=[(48, 64), (64, 48), (64, 48)]),
    )
    box = (16.0, 16.0, 48.0, 32.0)
    # A 2 x 1 box fits 3 x 3 times into 4 x 3 tokens of 16 pixels, in each of two images.
    found = places(model, wide, Evidence(0, box))
    assert len(found) == 17 and len(set(found)) == 17
    assert all(
        right <= 64 and bottom <= 48 and left % 16 == top % 16 == 0
        for (region,) in found
        for left, top, right, bottom in [region.box]
    )
    # An image of another size holds no place.
    assert {region.image for (region,) in places(model, tall, Evidence(2, box))} == {1, 2}
    # Whole images, and spans of them.
    assert places(model, tall, Evidence(1)) == [(Evidence(0),), (Evidence(2),)]
    assert places(model, tall, Evidence(0), Evidence(1)) == [(Evidence(1), Evidence(2))]
    # Two boxes keep their distance.
    other = (48.0, 16.0, 64.0, 32.0)
    pairs = places(model, wide[:1], Evidence(0, box), Evidence(0, other))
    assert len(pairs) == 2 * 3 - 1
    assert all(two.box[0] - one.box[0] == 32 and two.box[1] == one.box[1] for one, two in pairs)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "internvl", "gemma3", "idefics3"])
def test_families_with_tiles_and_separators(family: str) -> None:
    model = hooked(family)
    images = tiny.tiny_images(2, seed=0, sizes=tiny.TINY[family].sizes or None)
    examples = [
        Example("Where?", "x", images=(image,), evidence=(Evidence(0, (0.0, 0.0, 20.0, 20.0)),), id=str(i))
        for i, image in enumerate(images)
    ]
    examples.append(Example("Where?", "x", images=tuple(images), evidence=(Evidence(1),), id="whole"))
    try:
        found = ram_significance(model, examples, n_resamples=999, progress=False)
    except ValueError as error:
        assert "none covers" in str(error)
        return
    for own, ram in zip(found.masses, mmlens.ram(model, examples, progress=False).per_example, strict=True):
        torch.testing.assert_close(own[0], ram, equal_nan=True)


def test_more_places_than_wanted_are_drawn_by_seed() -> None:
    case = planted()
    examples = case.examples(4, seed=0)
    few = [ram_significance(case.model, examples, max_regions=6, seed=s, progress=False) for s in (0, 0, 1)]
    assert {len(own) for found in few for own in found.masses} == {6}
    assert all(torch.equal(a, b) for a, b in zip(few[0].masses, few[1].masses, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(few[0].masses, few[2].masses, strict=True))


def test_bad_requests_are_refused() -> None:
    case = planted()
    examples = case.examples(2, seed=0)
    with pytest.raises(ValueError, match="take 320 or more"):
        ram_significance(case.model, examples, n_resamples=100)
    with pytest.raises(ValueError, match="at least 2, not 1"):
        ram_significance(case.model, examples, max_regions=1)
    with pytest.raises(ValueError, match="'0-0': of 1 other region.* none covers 1 token"):
        ram_significance(
            case.model, examples, regions=lambda e: [[Evidence(0, (0.0, 0.0, 40.0, 40.0))]], progress=False
        )
    with pytest.raises(ValueError, match="have no evidence"):
        ram_significance(case.model, [Example("What?", "x")])
    with pytest.raises(ValueError, match="above 0 and below 1"):
        ram_significance(case.model, examples, progress=False).significant(5)
    with pytest.raises(ValueError, match="no masses given"):
        region_permutation_test([])
