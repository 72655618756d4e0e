"""Spatial entropy against a flood fill by hand, and the selection of compact heads against the full patterns."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_images, tiny_model, tiny_processor

from mmlens.data.examples import Example
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.scores.spatial import elbow, localization_score, spatial_entropy


@functools.cache
def hooked(family: str) -> HookedVLM:
    return HookedVLM(tiny_model(family), tiny_processor(family))


def slow_entropy(maps: list[np.ndarray], above: float = 2.0) -> float:
    """Flood fill over 8 neighbours; several maps have one mean and no common components."""
    mean = np.mean(np.concatenate([each.ravel() for each in maps]))
    masses = []
    for each in maps:
        raised = np.maximum(each - above * mean, 0)
        unseen = {tuple(cell) for cell in np.argwhere(raised > 0)}
        while unseen:
            stack, mass = [unseen.pop()], 0.0
            while stack:
                row, column = stack.pop()
                mass += raised[row, column]
                near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & unseen
                unseen -= near
                stack += near
            masses.append(mass)
    shares = np.array(masses) / sum(masses) if masses else np.array([])
    return float(-(shares * np.log(shares)).sum()) if masses else np.inf


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 7), st.integers(1, 7), st.floats(0, 2.5))
def test_entropy_equals_a_flood_fill(seed: int, rows: int, columns: int, above: float) -> None:
    maps = np.random.default_rng(seed).exponential(size=(3, rows, columns)) ** 2
    for entropy, each in zip(spatial_entropy(maps, above=above), maps, strict=True):
        assert float(entropy) == pytest.approx(slow_entropy([each], above), abs=1e-9)


def test_entropy_by_hand() -> None:
    maps = np.zeros((4, 5, 5))
    maps[0, 2, 2] = 1.0  # one place
    maps[1, 0, 0], maps[1, 4, 4] = 0.75, 0.25
    maps[2, 0, 0], maps[2, 1, 1] = 0.5, 0.5  # neighbours over the corner are one place
    maps[3] = 1.0  # nothing stands out
    given = spatial_entropy(maps)
    raised = np.array([0.75, 0.25]) - 2 / 25
    shares = raised / raised.sum()
    assert given.tolist() == pytest.approx([0.0, -(shares * np.log(shares)).sum(), 0.0, np.inf])
    cells = np.ones((5, 5), dtype=bool)
    cells[4] = False
    assert spatial_entropy(maps[1:2], cells).tolist() == [0.0]


def test_elbow_by_hand() -> None:
    """0, 0, 0, 1, 10: the line from 0 to 10 stands 6.5 above the fourth value, 5 above the third."""
    assert elbow(np.array([10.0, 0.0, 0.0, 1.0, 0.0])) == 1.0
    assert elbow(np.full(5, 0.3)) == pytest.approx(0.3)


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision"])
@pytest.mark.parametrize(
    ("cut", "first_layer", "last_row", "above"),
    [(None, 0, None, 2.0), (0.0, 0, None, 1.0), (0.0, 1, None, 2.0), (0.0, 0, 0.03, 2.0)],
)
def test_selection_frequency_from_full_patterns(
    family: str, cut: float | None, first_layer: int, last_row: float | None, above: float
) -> None:
    """Several images and tiles; each example alone in the plain eager model."""
    model = hooked(family)
    a, b, c, d = tiny_images(4, seed=3)
    examples = [
        Example("What colour is the letter K?", "red", (a,)),
        Example("Which page?", "two", (b, c)),
        Example("Where?", "left", (d,)),
    ]
    options: dict[str, Any] = {"cut": cut, "first_layer": first_layer, "last_row": last_row, "n_lowest": 3}
    options["above"] = above
    scores = localization_score(model, examples, batch_size=2, progress=False, **options)
    plain: Any = tiny_model(family, attn_implementation="eager")
    mass, entropy, n_passed_over = [], [], 0
    for example in examples:
        prompt = model.prompt_examples([example])
        with torch.no_grad():
            last = torch.stack(plain(**prompt.inputs, output_attentions=True).attentions)[:, 0, :, -1]
        token_map = prompt.token_map
        mass.append(last[:, :, token_map.is_image[0]].sum(-1).numpy())
        groups = sorted(
            {
                (int(i), int(t))
                for i, t, r in zip(token_map.image[0], token_map.tile[0], token_map.row[0], strict=True)
                if r >= 0
            }
        )
        own = np.empty(last.shape[:2])
        for layer, head in np.ndindex(*own.shape):
            maps = []
            for image, tile in groups:
                at = (token_map.image[0] == image) & (token_map.tile[0] == tile) & (token_map.row[0] >= 0)
                size = int(token_map.row[0][at].max()) + 1, int(token_map.col[0][at].max()) + 1
                picture = np.zeros(size)
                picture[token_map.row[0][at], token_map.col[0][at]] = last[layer, head, at]
                maps.append(picture)
            lowest = max(picture[-1].max() for picture in maps)
            passed_over = layer < first_layer or (last_row is not None and lowest > last_row)
            n_passed_over += passed_over
            own[layer, head] = np.inf if passed_over else slow_entropy(maps, above)
        entropy.append(own)
    assert n_passed_over < 3 * mass[0].size and bool(n_passed_over) == bool(first_layer or last_row)
    means = np.mean(mass, axis=0)
    keeps = means >= (elbow(means.ravel()) if cut is None else cut)
    for index in range(3):
        candidates = [h for h in np.ndindex(*keeps.shape) if keeps[h] and np.isfinite(entropy[index][h])]
        best = sorted(candidates, key=lambda h: (round(entropy[index][h], 6), -mass[index][h]))[:3]
        chosen = {tuple(h) for h in scores.per_example[index].nonzero().tolist()}
        assert chosen == set(best)


def test_bad_input_is_refused() -> None:
    model = hooked("qwen3_vl")
    with pytest.raises(ValueError, match="1 of 1 examples have no image, .*: text"):
        localization_score(model, [Example("Where?", "K", id="text")])
    with pytest.raises(ValueError, match="no prompts given"):
        localization_score(model, [])
    with pytest.raises(ValueError, match="n_lowest is 0; expected"):
        localization_score(model, [Example("Where?", "K", tuple(tiny_images(1, seed=0)))], n_lowest=0)
    with pytest.raises(ValueError, match="first_layer is 99; expected"):
        localization_score(model, [Example("Where?", "K", tuple(tiny_images(1, seed=0)))], first_layer=99)
