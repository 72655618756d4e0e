"""Scores of pages and layouts against attention summed by hand over the plain eager model's full patterns."""

from __future__ import annotations

import functools
import math
import random
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import REPRESENTATIVES, tiny_images, tiny_model, tiny_processor

import mmlens
from mmlens.data.examples import Evidence, Example
from mmlens.data.images import LateImage
from mmlens.data.many import ExampleStream
from mmlens.errors import MmlensError
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.scores.pages import PageScores, page_scores, page_scores_of_sets

QUIET: dict[str, Any] = {"progress": False}


@functools.cache
def hooked(family: str) -> HookedVLM:
    return HookedVLM(tiny_model(family), tiny_processor(family))


@torch.no_grad()
def plain_mean(model: HookedVLM, plain: Any, example: Example) -> tuple[torch.Tensor, Any]:
    """Attention averaged over the question [layer, head, key], from the plain eager model, with the token map."""
    prompt = model.prompt_examples([example])
    patterns = torch.stack([own[0] for own in plain(**prompt.inputs, output_attentions=True).attentions])
    return patterns[:, :, prompt.token_map.is_question[0]].mean(2), prompt.token_map


def by_hand(
    model: HookedVLM, plain: Any, example: Example, heads: list[tuple[int, int]], windows: list[list[int]]
) -> tuple[list[float], list[float]]:
    """Scores of pages and of layouts, token by token."""
    pages, layouts = [0.0] * len(example.images), [0.0] * len(example.metadata.get("layouts", ()))
    for window in windows:
        shown = Example(example.question, example.answer, [example.images[page] for page in window])
        mean, token_map = plain_mean(model, plain, shown)
        for at, page in enumerate(window):
            for pos in range(mean.shape[-1]):
                if token_map.image[0, pos] != at:
                    continue
                score = sum(float(mean[layer, head, pos]) for layer, head in heads) / len(heads)
                pages[page] += score
                left, top, right, bottom = token_map.boxes[0, pos].tolist()
                if math.isnan(left):  # a separator, which belongs to its page alone
                    continue
                for number, layout in enumerate(example.metadata.get("layouts", ())):
                    one, two, three, four = layout["box"]
                    meets = (
                        min(three, right) - max(one, left) > 0.01 and min(four, bottom) - max(two, top) > 0.01
                    )
                    if layout["page"] == page and meets:
                        layouts[number] += score
    return pages, layouts


def documents() -> list[Example]:
    """Three pages and two, of different sizes, so that a batch needs padding; layouts out of order."""
    a, b, c, d, e = tiny_images(5, seed=3)

    def box(image: Image.Image, share: float) -> list[float]:
        return [0, 0, image.width * share, image.height * share]

    layouts = [
        {"page": 2, "box": box(c, 0.5)},
        {"page": 0, "box": box(a, 1.0)},
        {"page": 0, "box": box(a, 0.3)},
    ]
    return [
        Example(
            "Where is the letter K?", "red", (a, b, c), (Evidence(1),), id="a", metadata={"layouts": layouts}
        ),
        Example("Which?", "two", (d, e), (Evidence(0),), id="b"),
    ]


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_scores_are_attention_summed_by_hand(family: str) -> None:
    model, plain = hooked(family), tiny_model(family, attn_implementation="eager")
    heads = [(0, 1), (1, 0)]
    layouts = not has_no_boxes(model)
    for per_prompt in (None, 1, 2):
        found = page_scores(model, documents(), heads, pages_per_prompt=per_prompt, layouts=layouts, **QUIET)
        for number, example in enumerate(documents()):
            n = len(example.images)
            size = per_prompt or n
            windows = [list(range(first, min(first + size, n))) for first in range(0, n, size)]
            pages, boxes = by_hand(model, plain, example, heads, windows)
            assert found.pages[number].tolist() == pytest.approx(pages, abs=1e-5)
            if layouts:
                assert found.layouts[number].tolist() == pytest.approx(boxes, abs=1e-5)


def has_no_boxes(model: HookedVLM) -> bool:
    """Whether the tokens of an image are learnt queries, to which no box maps."""
    token_map = model.prompt("Which?", images=tiny_images(1)).token_map
    return bool(token_map.boxes[token_map.is_image].isnan().all())


def test_calibration_takes_away_what_the_null_question_gives() -> None:
    model, plain = hooked("qwen2_vl"), tiny_model("qwen2_vl", attn_implementation="eager")
    heads = [(0, 0), (1, 1), (0, 2)]
    found = page_scores(model, documents(), heads, null_question="N/A", **QUIET)
    for number, example in enumerate(documents()):
        windows = [list(range(len(example.images)))]
        null = Example("N/A", "x", example.images, metadata=example.metadata)
        asked, unasked = (by_hand(model, plain, each, heads, windows) for each in (example, null))
        for mine, one, two in zip((found.pages, found.layouts), asked, unasked, strict=True):
            expected = [x - y for x, y in zip(one, two, strict=True)]
            assert mine[number].tolist() == pytest.approx(expected, abs=1e-5)


def test_several_sets_are_what_each_alone_is(micro: mmlens.HookedVLM) -> None:
    examples = mmlens.scene_examples("documents", 3, seed=4)
    sets = {"one": [(0, 4)], "two": [(3, 3), (5, 1)], "all": micro.heads}
    together = page_scores_of_sets(micro, examples, sets, **QUIET)
    for name, heads in sets.items():
        alone = page_scores(micro, examples, heads, **QUIET)
        for one, two in zip(
            together[name].pages + together[name].layouts, alone.pages + alone.layouts, strict=True
        ):
            torch.testing.assert_close(one, two)


def test_a_chat_keeps_its_texts_and_a_page_its_place(micro: mmlens.HookedVLM) -> None:
    """A chat that says what a plain example says scores its pages the same, whole and page by page."""
    plain = mmlens.scene_examples("documents", 2, seed=6)
    chats = [
        Example(
            messages=[
                {
                    "role": "user",
                    "content": [*[{"type": "image"}] * len(e.images), {"type": "text", "text": e.question}],
                }
            ],
            images=e.images,
            answer=e.answer,
            metadata=e.metadata,
        )
        for e in plain
    ]
    for options in ({}, {"pages_per_prompt": 1}, {"null_question": "?", "pages_per_prompt": 2}):
        one, two = (page_scores(micro, given, [(0, 4)], **options, **QUIET) for given in (plain, chats))
        for mine, theirs in zip(one.pages + one.layouts, two.pages + two.layouts, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_late_pages_of_a_stream_are_let_go(micro: mmlens.HookedVLM) -> None:
    examples = mmlens.scene_examples("documents", 4, seed=6)
    opened = 0

    def late(image: Image.Image) -> LateImage:
        def give() -> Image.Image:
            nonlocal opened
            opened += 1
            return image.copy()

        return LateImage(give)

    def start() -> Any:
        for e in examples:
            yield Example(e.question, e.answer, [late(i) for i in e.images], e.evidence, metadata=e.metadata)

    streamed = page_scores(micro, ExampleStream(start), [(0, 4)], pages_per_prompt=1, **QUIET)
    held = page_scores(micro, examples, [(0, 4)], pages_per_prompt=1, **QUIET)
    assert opened and len(streamed) == 4
    for one, two in zip(streamed.pages + streamed.layouts, held.pages + held.layouts, strict=True):
        torch.testing.assert_close(one, two)


def test_what_cannot_be_scored_is_named(micro: mmlens.HookedVLM) -> None:
    example = mmlens.scene_examples("documents", 1, seed=0)[0]
    with pytest.raises(MmlensError, match="'text' has no image, and a page is an image"):
        page_scores(micro, [Example("What?", "x", id="text")], [(0, 0)], **QUIET)
    with pytest.raises(MmlensError, match="head_sets holds no set"):
        page_scores_of_sets(micro, [example], {}, **QUIET)
    with pytest.raises(MmlensError, match="at least 1"):
        page_scores(micro, [example], [(0, 0)], pages_per_prompt=0, **QUIET)
    one, two = (page_scores(micro, given, [(0, 0)], **QUIET) for given in ([example], [example] * 2))
    with pytest.raises(MmlensError, match="are of other documents"):
        two - one
    assert isinstance(two - two, PageScores)


def test_models_without_image_positions_are_refused() -> None:
    with pytest.raises(MmlensError, match="cross-attention"):
        page_scores(hooked("mllama"), documents(), [(0, 0)], **QUIET)


def test_ranking_finds_the_page_that_a_head_was_planted_to_look_at(micro: mmlens.HookedVLM) -> None:
    """The heads with most RAM elsewhere put the right page first far more often than chance does."""
    rng = random.Random(0)
    examples = mmlens.scene_examples("documents", 20, seed=rng.randrange(100))
    top = mmlens.ram(micro, mmlens.scene_examples("documents", 20, seed=200), progress=False).top(3)
    found = page_scores(micro, examples, top, **QUIET)
    right = [int(own.argmax()) == e.evidence[0].image for own, e in zip(found.pages, examples, strict=True)]
    assert sum(right) >= 14
