"""RAM's relatives against the full patterns of the plain eager model, with loops, and small sums by hand."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import REPRESENTATIVES, tiny_images, tiny_model, tiny_processor

from mmlens.data.examples import Evidence, Example
from mmlens.head_scores import HeadScores, half_mass_share
from mmlens.heads import HeadGrid
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.scores.attention import (
    _sum_of_documents,
    gaze_score,
    null_calibrated_ram,
    query_focused_score,
    ram_per_token,
)
from mmlens.scores.lift import fake_region, ram_lift
from mmlens.scores.retrieval import ram
from mmlens.token_map import ImageGrid, TokenMap

NULL = "Which word, if any, is it then?"


@functools.cache
def hooked(family: str) -> HookedVLM:
    return HookedVLM(tiny_model(family), tiny_processor(family))


@functools.cache
def plain_eager(family: str) -> Any:
    return tiny_model(family, attn_implementation="eager")


@torch.no_grad()
def pattern_of(family: str, example: Example) -> tuple[torch.Tensor, Any]:
    """[layer, head, query, key] of one example alone from the plain model, and its prompt."""
    prompt = hooked(family).prompt_examples([example])
    attentions = plain_eager(family)(**prompt.inputs, output_attentions=True).attentions
    return torch.stack(attentions)[:, 0], prompt


def examples_of(family: str) -> list[Example]:
    """One, two and one image, box and whole-image evidence, questions of different length: a batch needs padding."""
    a, b, c, d = tiny_images(4, seed=3)

    def middle(number: int, image: Image.Image, side: float) -> Evidence:
        x, y = image.width / 2, image.height / 2
        return Evidence(number, (x - side, y - side, x + side, y + side))

    two = (middle(1, c, 6), middle(0, b, 2))
    return [
        Example("What colour is the letter K?", "red", (a,), (middle(0, a, 8),), kind="box", id="a"),
        Example("Which?", "two", (b, c), two, id="b"),
        Example("Where is it, and what else?", "left", (d,), (middle(0, d, 4),), kind="page", id="c"),
    ]


def unasked(example: Example) -> Example:
    return Example(NULL, example.answer, example.images, example.evidence)


def mass(pattern: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Eq. 1, loop over queries: [layer, head]."""
    per_query = [pattern[:, :, x, keys].sum(-1) for x in queries.nonzero().flatten()]
    return sum(per_query) / len(per_query)  # type: ignore[return-value]


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_scores_are_those_of_the_full_patterns_example_by_example(family: str) -> None:
    """Library: padded batches of two. Truth: each example alone, from the plain model's own attentions."""
    model, examples = hooked(family), examples_of(family)
    options = {"batch_size": 2, "progress": False}
    null = null_calibrated_ram(model, examples, null_question=NULL, **options)
    gaze = gaze_score(model, examples, **options)
    gaze_images = gaze_score(model, examples, region="images", **options)
    per_token = ram_per_token(model, examples, **options)
    lift = ram_lift(model, examples, shape="any", **options)
    for index, example in enumerate(examples):
        pattern, prompt = pattern_of(family, example)
        null_pattern, null_prompt = pattern_of(family, unasked(example))
        question, evidence = prompt.token_map.is_question[0], prompt.token_map.evidence([example])[0]
        null_evidence = null_prompt.token_map.evidence([example])[0]
        asked = mass(pattern, question, evidence)
        expected = asked - mass(null_pattern, null_prompt.token_map.is_question[0], null_evidence)
        np.testing.assert_allclose(null.per_example[index], expected, atol=2e-6)
        np.testing.assert_allclose(gaze.per_example[index], pattern[:, :, -1, evidence].sum(-1), atol=2e-6)
        holding = torch.isin(prompt.token_map.image[0], torch.tensor([e.image for e in example.evidence]))
        expected = pattern[:, :, -1, holding].sum(-1)
        np.testing.assert_allclose(gaze_images.per_example[index], expected, atol=2e-6)
        np.testing.assert_allclose(per_token.per_example[index], asked / int(evidence.sum()), atol=2e-6)
        others = prompt.token_map.is_image[0] & ~evidence
        chance = mass(pattern, question, others) * int(evidence.sum()) / int(others.sum())
        np.testing.assert_allclose(lift.per_example[index], asked - chance, atol=2e-6)
    assert null.per_example.min() < 0 < null.per_example.max()
    assert null.kinds == ("box", "", "page")


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision"])
@pytest.mark.parametrize("cut", [None, 0.5])
@pytest.mark.parametrize("region", ["images", "evidence"])
def test_query_focused_score_with_loops(family: str, cut: float | None, region: str) -> None:
    model, examples = hooked(family), examples_of(family)
    given = query_focused_score(
        model, examples, null_question=NULL, cut=cut, region=region, batch_size=3, progress=False
    )
    n_dropped = 0
    for index, example in enumerate(examples):
        pattern, prompt = pattern_of(family, example)
        null_pattern, null_prompt = pattern_of(family, unasked(example))
        token_map = prompt.token_map
        evidence = token_map.evidence([example])[0]
        positions = token_map.is_image[0].nonzero().flatten().tolist()
        null_positions = null_prompt.token_map.is_image[0].nonzero().flatten().tolist()
        question, null_question = token_map.is_question[0], null_prompt.token_map.is_question[0]
        for layer, head in [(0, 0), (1, 2), (2, 3)]:
            calibrated = {
                at: float(pattern[layer, head, question][:, at].mean())
                - float(null_pattern[layer, head, null_question][:, null_at].mean())
                for at, null_at in zip(positions, null_positions, strict=True)
            }
            total = 0.0
            for image in {part.image for part in example.evidence}:
                own = {at: value for at, value in calibrated.items() if int(token_map.image[0, at]) == image}
                low = -np.inf
                if cut is not None:
                    low = np.mean(list(own.values())) - cut * np.std(list(own.values()), ddof=1)
                for at, value in own.items():
                    n_dropped += value < low
                    if value >= low and (region == "images" or bool(evidence[at])):
                        total += value
            assert float(given.per_example[index, layer, head]) == pytest.approx(total, abs=2e-6)
    assert (n_dropped > 0) == (cut is not None)


def test_without_null_cut_and_distractors_the_query_focused_score_is_ram() -> None:
    model, examples = hooked("llava"), examples_of("llava")
    scores = query_focused_score(
        model, examples, null_question=None, cut=None, region="evidence", progress=False
    )
    expected = ram(model, examples, progress=False).per_example
    torch.testing.assert_close(scores.per_example, expected, atol=1e-6, rtol=0)


def test_documents_by_hand() -> None:
    """Two documents of four tokens; the cut of 1 sd drops -6 of the first: mean -1.25, sd 3.2."""
    attention = torch.tensor([[1.0, 0.0, 0.0, -6.0, 5.0, 5.0, 5.0, 5.0]])
    document = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    first = document == 0
    assert _sum_of_documents(attention, document, first, cut=1.0).tolist() == [1.0]
    assert _sum_of_documents(attention, document, first, cut=None).tolist() == [-5.0]
    assert _sum_of_documents(attention, document, first | ~first, cut=1.0).tolist() == [21.0]


# ---------------------------------------------------------------------- fake regions


def grid_map(*sizes: tuple[int, int], separators: int = 0) -> TokenMap:
    """Images of rows x columns tokens of one pixel each, `separators` after each, one text token before all."""
    grids = []
    for rows, columns in sizes:
        row, column = np.indices((rows, columns)).reshape(2, -1)
        blank = np.full(separators, -1)
        boxes = np.stack([column, row, column + 1, row + 1], axis=1).astype(float)
        grids.append(
            ImageGrid(
                (columns, rows),
                np.concatenate([np.zeros_like(row), blank]),
                np.concatenate([row, blank]),
                np.concatenate([column, blank]),
                np.concatenate([boxes, np.full((separators, 4), np.nan)]),
            )
        )
    n = sum(map(len, grids))
    is_image = torch.tensor([[False, *[True] * n]])
    return TokenMap.from_grids(is_image, torch.ones(1, n + 1, dtype=torch.long), ~is_image, [grids])


def test_fake_region_of_a_box_is_the_mean_over_its_placements() -> None:
    token_map = grid_map((4, 5))
    evidence = token_map.box(0, (1, 1, 3, 2))[0]  # row 1, columns 1 and 2
    cells = {(r, c) for r, c in itertools.product(range(4), range(5))}
    held = {(1, 1), (1, 2)}
    places = [
        ((r, c), (r, c + 1)) for r, c in cells if (r, c + 1) in cells and not {(r, c), (r, c + 1)} & held
    ]
    expected = torch.zeros(21)
    for place in places:
        for r, c in place:
            expected[1 + 5 * r + c] += 1 / len(places)
    torch.testing.assert_close(fake_region(token_map, evidence), expected)
    anywhere = fake_region(token_map, evidence, shape="any")
    assert anywhere.sum() == 2
    assert anywhere[token_map.is_image[0] & ~evidence].tolist() == pytest.approx([2 / 18] * 18)


def test_fake_region_of_a_whole_image_is_another_image_and_separators_are_matched_by_number() -> None:
    token_map = grid_map((2, 2), (2, 2), (3, 2), separators=1)
    evidence = token_map.image_tokens(0)[0]
    weights = fake_region(token_map, evidence)
    assert weights.sum() == pytest.approx(5)
    assert not weights[evidence].any()
    share = 1 / 12  # one separator over the 4 + 1 + 6 + 1 other visual tokens
    # Image 1 is one place, image 2 has two: rows 0-1 and rows 1-2.
    assert weights[6:10].tolist() == pytest.approx([1 / 3 + share] * 4)
    expected = [1 / 3 + share] * 2 + [2 / 3 + share] * 2 + [1 / 3 + share] * 2
    assert weights[11:17].tolist() == pytest.approx(expected)
    assert weights[[10, 17]].tolist() == pytest.approx([share] * 2)


def test_lift_of_a_box_is_ram_less_the_mean_of_all_fakes() -> None:
    family = "qwen3_vl"
    model = hooked(family)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8))
    example = Example("Where is the letter?", "red", (image,), (Evidence(0, (0, 0, 32, 16)),))
    lift = ram_lift(model, [example], progress=False)
    pattern, prompt = pattern_of(family, example)
    token_map, question = prompt.token_map, prompt.token_map.is_question[0]
    evidence = token_map.evidence([example])[0]
    n_rows, n_columns = int(token_map.row.max()) + 1, int(token_map.col.max()) + 1
    at = {
        (int(r), int(c)): i
        for i, (r, c) in enumerate(zip(token_map.row[0], token_map.col[0], strict=True))
        if r >= 0
    }
    cells = [cell for cell, position in at.items() if evidence[position]]
    fakes = []
    for down, right in itertools.product(range(-n_rows, n_rows), range(-n_columns, n_columns)):
        moved = [at.get((r + down, c + right)) for r, c in cells]
        if all(m is not None and not evidence[m] for m in moved):
            keys = torch.zeros_like(evidence)
            keys[moved] = True
            fakes.append(mass(pattern, question, keys))
    assert len(fakes) > 3
    expected = mass(pattern, question, evidence) - torch.stack(fakes).mean(0)
    np.testing.assert_allclose(lift.per_example[0], expected, atol=2e-6)


def test_shapes_that_fit_nowhere_are_refused() -> None:
    token_map = grid_map((3, 3))
    evidence = token_map.box(0, (0, 0, 2, 2))[0]
    with pytest.raises(ValueError, match=r"2 x 2 tokens fits nowhere else .* shape='any'"):
        fake_region(token_map, evidence)
    with pytest.raises(ValueError, match="every visual token"):
        fake_region(token_map, token_map.is_image[0], shape="any")
    with pytest.raises(ValueError, match="no position is marked"):
        fake_region(token_map, torch.zeros_like(evidence))
    example = Example("Where?", "K", tuple(tiny_images(1, seed=0)), (Evidence(0),), id="whole")
    with pytest.raises(ValueError, match="example 'whole': the evidence is every visual token"):
        ram_lift(hooked("qwen3_vl"), [example], progress=False)


# ---------------------------------------------------------------------- half of the mass


def test_half_mass_share_by_hand() -> None:
    def share(*values: float, of: float = 0.5) -> float:
        return half_mass_share(HeadScores(torch.tensor([[values]])), of)

    assert share(1.0, 1.0, 1.0, 1.0) == 0.5
    assert share(4.0, 3.0, 1.0, 0.0) == 0.25
    assert share(3.0, 4.0, 1.1, 0.0) == 0.5
    assert share(-50.0, 1.0, 0.0, 0.0) == 0.25
    assert share(0.1, 0.1, 0.1, 0.1, of=1.0) == 1.0
    absent = HeadScores(torch.tensor([[[2.0, 1.0], [1.0, torch.nan]]]), grid=HeadGrid((2, 1)))
    assert half_mass_share(absent) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="no head has a positive score"):
        share(-1.0, 0.0)
    with pytest.raises(ValueError, match="share is 0.0; expected"):
        share(1.0, of=0.0)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "score", [null_calibrated_ram, query_focused_score, gaze_score, ram_per_token, ram_lift]
)
def test_bad_examples_are_refused(score: Any) -> None:
    model, examples = hooked("llava"), examples_of("llava")
    with pytest.raises(ValueError, match="no prompts given"):
        score(model, [])
    with pytest.raises(ValueError, match="1 of 2 examples have no evidence .*: text-7"):
        score(model, [examples[0], Example("Which word?", "K", id="text-7")])
    with pytest.raises(ValueError, match="batch_size is 0; expected"):
        score(model, examples, batch_size=0)


def test_bad_options_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    model, examples = hooked("llava"), examples_of("llava")
    with pytest.raises(ValueError, match="there is no region 'image'.*'images'"):
        gaze_score(model, examples, region="image")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no shape 'box'"):
        ram_lift(model, examples, shape="box")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cut is -1.0; expected"):
        query_focused_score(model, examples, cut=-1.0)
