"""Corruptions: only what was named changes, in the pixels, in the model's inputs and in what the model reads."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageStat
from tiny.wrapped import QUESTION, hooked, padded_prompt
from torch import Tensor

import mmlens
from mmlens.data.examples import Evidence, Example
from mmlens.errors import PromptError
from mmlens.interventions import (
    CorruptionError,
    blank_region,
    corrupted_prompt,
    evidence_of,
    layout_difference,
    noise_images,
    other_image,
    other_question,
    replace_region,
    same_layout,
    swap_regions,
)
from mmlens.model.prompt import Prompt
from mmlens.model.prompt_making import prompt_from_inputs
from mmlens.model.run_state import Span
from mmlens.token_map import TokenMapError


def batch() -> list[Example]:
    """Two examples that need padding: two images and a long question, one image and a short one."""
    images = tiny.tiny_images(3, seed=1, sizes=[(64, 48), (40, 72), (97, 64)])
    return [
        Example(
            question=QUESTION,
            answer="seven",
            candidates=("seven", "red"),
            images=tuple(images[:2]),
            evidence=(Evidence(1, (4, 8, 30, 61)),),
        ),
        Example(
            question="Where?",
            answer="K",
            candidates=("K", "Q"),
            images=(images[2],),
            evidence=(Evidence(0, (20, 10, 70, 50)),),
        ),
    ]


def outside(image: Image.Image, *boxes: Sequence[int]) -> bytes:
    """The pixels that no box covers (those it covers are painted black)."""
    cut = image.copy()
    for box in boxes:
        cut.paste((0, 0, 0), tuple(box))
    return cut.tobytes()


def assert_same_answers(one: Prompt, other: Prompt) -> None:
    assert one.answers == other.answers and one.candidates == other.candidates
    assert one.answer_ids is not None and torch.equal(one.answer_ids, other.answer_ids)
    assert all(map(torch.equal, one.candidate_ids, other.candidate_ids))


# ---------------------------------------------------------------------- regions


def test_blanked_evidence_changes_those_pixels_and_nothing_else(model: mmlens.HookedVLM) -> None:
    examples = batch()
    prompt = model.prompt_examples(examples)
    before = [[image.tobytes() for image in own] for own in prompt.images]
    blanked = blank_region(evidence_of(examples))(model, prompt)
    for row, example in enumerate(examples):
        region = example.evidence[0]
        for number, image in enumerate(example.images):
            now = blanked.images[row][number]
            if number != region.image:
                assert now.tobytes() == image.tobytes()
                continue
            box = tuple(int(edge) for edge in region.box)
            assert outside(now, box) == outside(image, box)
            mean = tuple(round(value) for value in ImageStat.Stat(image).mean)
            assert now.crop(box).tobytes() == Image.new("RGB", now.crop(box).size, mean).tobytes()
    assert [[image.tobytes() for image in own] for own in prompt.images] == before
    assert_same_answers(prompt, blanked)
    assert blanked.questions == prompt.questions and blanked.text == prompt.text
    assert blanked.token_map.to_pandas().equals(prompt.token_map.to_pandas())
    assert torch.equal(blanked.inputs["input_ids"], prompt.inputs["input_ids"])
    assert torch.equal(blanked.inputs["attention_mask"], prompt.inputs["attention_mask"])
    # Through the processor, as a prompt of the corrupted images would be.
    painted = [list(own) for own in prompt.images]
    for row, example in enumerate(examples):
        region = example.evidence[0]
        image = painted[row][region.image] = painted[row][region.image].copy()
        mean = tuple(round(value) for value in ImageStat.Stat(example.images[region.image]).mean)
        image.paste(mean, tuple(int(edge) for edge in region.box))
    expected = model.prompt(prompt.questions, painted).inputs
    assert expected.keys() == blanked.inputs.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, blanked.inputs[name]), name


@torch.no_grad()
def test_only_tokens_that_show_the_region_change(family: str) -> None:
    """With the tower's attention at zero a token sees its own pixels alone; resampling reaches past a box's edge."""
    model = hooked(family)
    prompt = model.prompt(QUESTION, images=tiny.tiny_images(1, seed=3, sizes=[(160, 160)]))
    blanked = blank_region((48, 64, 112, 112), fill="white")(model, prompt)

    def embeddings(prompt: Prompt) -> Tensor:
        off = [
            (name, lambda x, hook: torch.zeros_like(x))
            for name in model.hook_dict
            if name.startswith("vision.blocks.") and name.endswith("hook_attn_out")
        ]
        assert len(off) == 3
        with model.hooks(fwd_hooks=off):
            return model.run_with_cache(prompt, names_filter="hook_embed")[1]["hook_embed"]

    changed = (embeddings(prompt) - embeddings(blanked)).abs().amax(-1) > 1e-4
    inner = prompt.token_map.box(0, (64, 80, 96, 96))
    outer = prompt.token_map.box(0, (24, 40, 136, 136))
    assert bool(changed[inner].all()) and not bool(changed[~outer].any())
    assert 0 < int(inner.sum()) <= int(changed.sum()) < int(prompt.token_map.is_image.sum())


def test_a_region_is_every_pixel_that_a_box_touches() -> None:
    model = hooked("internvl")
    prompt = padded_prompt(model)
    expected = prompt.images[1][0].copy()
    expected.paste((255, 0, 0), (3, 5, 21, 11))
    for box in ((3.4, 5.0, 20.2, 10.999), (3.0000001, 4.999, 21.0001, 11)):
        blanked = blank_region(box, fill=(255, 0, 0))(model, prompt)
        assert blanked.images[1][0].tobytes() == expected.tobytes()
        assert blanked.images[0][1].tobytes() == prompt.images[0][1].tobytes()


def test_regions_may_be_several_whole_or_chosen_by_example() -> None:
    model = hooked("qwen3_vl")
    prompt = padded_prompt(model)
    blanked = blank_region([(0, 0, 8, 8), Evidence(0, (20, 20, 30, 30))], fill="#00ff00")(model, prompt)
    for own, now in zip(prompt.images, blanked.images, strict=True):
        assert outside(now[0], (0, 0, 8, 8), (20, 20, 30, 30)) == outside(
            own[0], (0, 0, 8, 8), (20, 20, 30, 30)
        )
        assert now[0].getpixel((7, 7)) == now[0].getpixel((25, 25)) == (0, 255, 0)
    whole = blank_region(Evidence(0))(model, prompt)
    for own, now in zip(prompt.images, whole.images, strict=True):
        mean = tuple(round(value) for value in ImageStat.Stat(own[0]).mean)
        assert now[0].tobytes() == Image.new("RGB", now[0].size, mean).tobytes()
    asked: list[tuple[int, str]] = []

    def last_image(prompt: Prompt, example: int) -> Evidence:
        asked.append((example, prompt.questions[example]))
        return Evidence(len(prompt.images[example]) - 1, (1, 2, 30, 31))

    by_example = blank_region(last_image, fill="black")(model, prompt)
    assert asked == [(0, QUESTION), (1, "Where?")]
    assert by_example.images[0][0].tobytes() == prompt.images[0][0].tobytes()
    for own, now in zip(prompt.images, by_example.images, strict=True):
        assert now[-1].tobytes() == outside(own[-1], (1, 2, 30, 31))


def test_swapped_regions_change_places() -> None:
    model = hooked("idefics3")
    prompt = model.prompt_examples(batch())
    a, b = (2, 3, 22, 13), (10, 30, 30, 40)
    swapped = swap_regions(a, b)(model, prompt)
    for own, now in zip(prompt.images, swapped.images, strict=True):
        assert now[0].crop(a).tobytes() == own[0].crop(b).tobytes()
        assert now[0].crop(b).tobytes() == own[0].crop(a).tobytes()
        assert outside(now[0], a, b) == outside(own[0], a, b)
    assert_same_answers(prompt, swapped)
    again = swap_regions(b, a)(model, swapped)
    assert all(torch.equal(again.inputs[name], value) for name, value in prompt.inputs.items())
    between = swap_regions(Evidence(0, a), Evidence(1, b))(model, model.prompt_examples(batch()[:1]))
    assert between.images[0][0].crop(a).tobytes() == prompt.images[0][1].crop(b).tobytes()
    assert between.images[0][1].crop(b).tobytes() == prompt.images[0][0].crop(a).tobytes()


def test_a_replaced_region_shows_the_source() -> None:
    model = hooked("llava_onevision")
    prompt = padded_prompt(model)
    sources = tiny.tiny_images(2, seed=9, sizes=[(12, 20)])
    box = (5, 6, 17, 26)
    replaced = replace_region(box, lambda prompt, example: sources[example])(model, prompt)
    for own, now, source in zip(prompt.images, replaced.images, sources, strict=True):
        assert now[0].crop(box).tobytes() == source.tobytes()
        assert outside(now[0], box) == outside(own[0], box)
    alike = replace_region(box, sources[0])(model, prompt)
    assert alike.images[1][0].crop(box).tobytes() == sources[0].tobytes()
    with pytest.raises(CorruptionError, match=r"source is 20 x 12 pixels, the region .* 12 x 20 pixels"):
        replace_region(box, sources[0].transpose(Image.Transpose.ROTATE_90))(model, prompt)
    with pytest.raises(CorruptionError, match="replace_region takes one region, not 2"):
        replace_region([box, box], sources[0])(model, prompt)


def test_evidence_is_found_by_question_and_pixels() -> None:
    model = hooked("llava")
    examples = batch()
    find = evidence_of(examples)
    turned = model.prompt_examples(examples[::-1])
    assert find(turned, 0) == list(examples[1].evidence) and find(turned, 1) == list(examples[0].evidence)
    other = dataclasses.replace(examples[1], evidence=(Evidence(0),))
    with pytest.raises(CorruptionError, match="same images, but not the same evidence"):
        evidence_of([*examples, other])
    with pytest.raises(
        CorruptionError, match=r"example 0 of the prompt \('Where\?' with 1 image\(s\)\) is not"
    ):
        evidence_of(examples[:1])(turned, 0)
    blanked = blank_region(find)(model, turned)
    with pytest.raises(CorruptionError, match="is not among the 2 example"):
        find(blanked, 0)
    bare = dataclasses.replace(examples[1], evidence=())
    with pytest.raises(CorruptionError, match="has no evidence"):
        evidence_of([bare])(turned, 0)


BAD_REGIONS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "outside": (
        lambda: blank_region((0, 0, 64, 49)),
        TokenMapError,
        r"image 0 of example 0: .* inside the image of 64 x 48 pixels; the nearest box inside is \(0, 0, 64, 48\)",
    ),
    "empty": (lambda: blank_region((5, 5, 5, 9)), TokenMapError, "not a box"),
    "nan": (lambda: blank_region((0, 0, float("nan"), 9)), TokenMapError, "not a box"),
    "turned": (lambda: blank_region((9, 9, 5, 5)), TokenMapError, r"nearest box inside is \(5, 5, 9, 9\)"),
    "sliver": (lambda: blank_region((5.0, 5, 5.004, 9)), CorruptionError, "too small"),
    "three": (lambda: blank_region((1, 2, 3)), TokenMapError, "a box is"),
    "words": (lambda: blank_region("evidence"), CorruptionError, "a region is a box .* not 'evidence'"),
    "none": (
        lambda: blank_region(lambda prompt, example: None),
        CorruptionError,
        "example 0: a region is a box",
    ),
    "no region": (lambda: blank_region([]), CorruptionError, "list of regions is empty"),
    "image": (
        lambda: blank_region((0, 0, 8, 8), image=1),
        IndexError,
        r"image 1 of example 1: the example has 1 image\(s\), 0 to 0",
    ),
    "negative image": (lambda: blank_region((0, 0, 8, 8), image=-1), ValueError, "image is -1; expected"),
    "fill": (
        lambda: blank_region((0, 0, 8, 8), fill="gray50"),
        ValueError,
        "no fill 'gray50'; the nearest: 'gr",
    ),
    "mean": (lambda: blank_region((0, 0, 8, 8), fill="means"), ValueError, "the nearest: 'mean'"),
    "four": (lambda: blank_region((0, 0, 8, 8), fill=(1, 2, 3, 4)), ValueError, "from 0 to 255, not"),
    "range": (lambda: blank_region((0, 0, 8, 8), fill=(1, 2, 256)), ValueError, "from 0 to 255, not"),
    "alpha": (lambda: blank_region((0, 0, 8, 8), fill="#11223344"), ValueError, "'#rrggbb'"),
    "sizes": (
        lambda: swap_regions((0, 0, 8, 8), (8, 8, 16, 17)),
        CorruptionError,
        "example 0: regions of 8 x 8 pixels and 8 x 9 pixels cannot change places",
    ),
    "overlap": (lambda: swap_regions((0, 0, 8, 8), (7, 7, 15, 15)), CorruptionError, "overlap"),
    "sides": (lambda: swap_regions([(0, 0, 8, 8)] * 2, (8, 8, 16, 16)), CorruptionError, "each side, not 2"),
}


@pytest.mark.parametrize("name", BAD_REGIONS)
def test_bad_regions_are_errors(name: str) -> None:
    make, error, message = BAD_REGIONS[name]
    model = hooked("internvl")
    prompt = model.prompt_examples(batch())
    with pytest.raises(error, match=message):
        make()(model, prompt)


# ---------------------------------------------------------------------- other images, other questions


def test_other_images_are_of_the_same_size_and_not_the_examples_own(model: mmlens.HookedVLM) -> None:
    examples = batch()
    prompt = model.prompt_examples(examples)
    own = [image for example in examples for image in example.images]
    pool = own + tiny.tiny_images(9, seed=7, sizes=[(64, 48), (40, 72), (97, 64)])
    other = other_image(pool, seed=2)(model, prompt)
    for row, example in enumerate(examples):
        now = [image.tobytes() for image in other.images[row]]
        assert [image.size for image in other.images[row]] == [image.size for image in example.images]
        assert set(now) <= {image.tobytes() for image in pool} - {image.tobytes() for image in example.images}
    assert layout_difference(prompt, other, boxes=True) is None
    assert_same_answers(prompt, other)
    # An example gets the same image in any batch, and another by another seed.
    alone = other_image(pool, seed=2)(model, model.prompt_examples(examples[1:]))
    assert alone.images[0][0].tobytes() == other.images[1][0].tobytes()
    drawn = {other_image(pool, seed=seed)(model, prompt).images[1][0].tobytes() for seed in range(12)}
    assert len(drawn) == 3
    second = other_image(pool, image=0, seed=2)(model, prompt)
    assert second.images[0][1].tobytes() == examples[0].images[1].tobytes()
    assert second.images[0][0].tobytes() != examples[0].images[0].tobytes()


def test_images_come_from_examples_and_none_twice() -> None:
    model = hooked("qwen2_5_vl")
    images = tiny.tiny_images(4, seed=3, sizes=[(48, 48)])
    pages = Example(question=QUESTION, answer="x", images=tuple(images[:2]))
    rest = Example(question="Where?", answer="y", images=tuple(images[2:]))
    prompt = model.prompt_examples([pages])
    for seed in range(4):
        drawn = other_image([pages, rest], seed=seed)(model, prompt).images[0]
        assert sorted(image.tobytes() for image in drawn) == sorted(image.tobytes() for image in images[2:])
    with pytest.raises(
        CorruptionError, match=r"among the 3 image\(s\) .* none is left for image 1 of example 0"
    ):
        other_image(images[:3])(model, prompt)
    with pytest.raises(CorruptionError, match="example 0 has no image"):
        other_image(images)(model, model.prompt("Where?"))
    with pytest.raises(CorruptionError, match="no image to draw from"):
        other_image([Example(question="Where?", answer="x")])
    with pytest.raises(PromptError, match="image 0 to draw from is a int"):
        other_image([3])


def test_an_image_of_another_size_must_be_laid_out_alike_or_stretched() -> None:
    larger = tiny.tiny_images(1, seed=4, sizes=[(96, 120)])[0]
    qwen = hooked("qwen3_vl")
    prompt = qwen.prompt(QUESTION, images=tiny.tiny_images(1, seed=0, sizes=[(64, 48)]))
    with pytest.raises(
        CorruptionError, match=r"laid out in another way: example 0 has \d+ positions \(12 of images\) and"
    ):
        other_image(larger)(qwen, prompt)
    loose = other_image(larger, equal_layout=False)(qwen, prompt)
    assert not same_layout(prompt, loose) and loose.images[0][0].tobytes() == larger.tobytes()
    stretched = other_image(larger, resize=True)(qwen, prompt)
    assert layout_difference(prompt, stretched, boxes=True) is None
    assert stretched.images[0][0].tobytes() == larger.resize((64, 48), Image.Resampling.BICUBIC).tobytes()
    # LLaVA has as many tokens for every size, but they show other pixels.
    llava = hooked("llava")
    prompt = llava.prompt(QUESTION, images=tiny.tiny_images(1, seed=0, sizes=[(64, 48)]))
    other = other_image(larger)(llava, prompt)
    assert same_layout(prompt, other)
    assert layout_difference(prompt, other, boxes=True) == (
        "image 0 of example 0 is 64 x 48 pixels and 96 x 120 pixels"
    )


def test_another_question_keeps_images_answers_and_length(model: mmlens.HookedVLM) -> None:
    examples = batch()
    prompt = model.prompt_examples(examples)
    tokenizer = model.tokenizer
    pool = [
        "What colour is the letter Q?",
        "What colour is the letter in the table?",
        "Which?",
        "How many objects are there?",
        "Where!",
        QUESTION,
        "Where?",
    ]
    n_tokens = {question: len(tokenizer(question)["input_ids"]) for question in pool}
    for seed in range(4):
        other = other_question(pool, seed=seed)(model, prompt)
        for before, after in zip(prompt.questions, other.questions, strict=True):
            assert before != after and n_tokens[before] == n_tokens[after]
        assert same_layout(prompt, other)
        assert_same_answers(prompt, other)
        assert other.images == prompt.images
        expected = model.prompt(other.questions, prompt.images).inputs
        assert torch.equal(expected["input_ids"], other.inputs["input_ids"])
    with pytest.raises(CorruptionError, match=r"none is laid out in the \d+ tokens of its own"):
        other_question(["Which is the first page of the table?"])(model, prompt)
    with pytest.raises(CorruptionError, match=r"laid out in another way: example 0 has \d+ positions"):
        other_question("Which is the first page of the table?")(model, prompt)
    loose = other_question("Which is the first page of the table?", equal_layout=False)(model, prompt)
    assert_same_answers(prompt, loose)
    assert set(loose.questions) == {"Which is the first page of the table?"}


def test_questions_by_function_from_examples_and_none_left() -> None:
    model = hooked("smolvlm")
    prompt = padded_prompt(model)
    other = other_question(lambda prompt, i: prompt.questions[i].replace("?", "!"))(model, prompt)
    assert other.questions == [question.replace("?", "!") for question in prompt.questions]
    examples = [Example(question=question, answer="x") for question in ("Where?", "Which?")]
    single = model.prompt("Where?")
    assert other_question(examples, equal_layout=False)(model, single).questions == ["Which?"]
    with pytest.raises(CorruptionError, match=r"0 differ from that of example 0 \('Where\?'\)$"):
        other_question(examples[:1])(model, single)
    with pytest.raises(CorruptionError, match="no question to draw from"):
        other_question([])
    with pytest.raises(PromptError, match="question is empty"):
        other_question(" ")(model, single)


# ---------------------------------------------------------------------- checks of every corruption


def test_what_changes_nothing_is_an_error() -> None:
    model = hooked("internvl")
    examples = batch()
    prompt = model.prompt_examples(examples)
    blanked = blank_region((0, 0, 16, 16), fill="red")(model, prompt)
    with pytest.raises(
        CorruptionError, match="leaves example 0 as it is: no pixel of its images and no token"
    ):
        blank_region((0, 0, 16, 16), fill="red")(model, blanked)
    first = blank_region(lambda prompt, i: (0, 0, 16, 16) if i else (16, 16, 32, 32), fill="red")
    with pytest.raises(CorruptionError, match="leaves example 1 as it is"):
        first(model, blanked)
    with pytest.raises(CorruptionError, match="leaves example 0 as it is"):
        other_question(lambda prompt, i: prompt.questions[i])(model, prompt)
    with pytest.raises(CorruptionError, match="leaves example 0 as it is"):
        corrupted_prompt(model, prompt)
    with pytest.raises(CorruptionError, match="leaves example 0 as it is"):
        swap_regions((0, 0, 8, 8), (8, 8, 16, 16))(model, blanked)


@pytest.mark.parametrize("encoded", [False, True])
def test_pixels_that_the_processor_crops_away_are_no_change(encoded: bool) -> None:
    """LLaVA shows the model the middle of a long image: of 300 x 100 pixels those from 100 to 200."""
    model = hooked("llava")
    images = tiny.tiny_images(2, seed=0, sizes=[(100, 100), (300, 100)])
    prompt = model.prompt([QUESTION, "Where?"], [[images[0]], [images[1]]])
    if encoded:
        prompt = model.encode_images(prompt)
    unseen = blank_region((0, 0, 60, 100))
    with pytest.raises(
        CorruptionError, match="leaves example 1 as it is: .* crops or shrinks the change away"
    ):
        unseen(model, prompt)
    with pytest.raises(
        CorruptionError, match="leaves example 0 as it is: .* crops or shrinks the change away"
    ):
        unseen(model, model.prompt("Where?", [images[1]]))
    seen = blank_region((0, 0, 60, 100))(model, model.prompt(QUESTION, [images[0]]))
    assert len(seen) == 1


@torch.no_grad()
def test_encoded_prompts_are_made_again_from_their_images(model: mmlens.HookedVLM) -> None:
    examples = batch()
    prompt = model.prompt_examples(examples)
    corruption = blank_region(evidence_of(examples), fill="black")
    plain, encoded = corruption(model, prompt), corruption(model, model.encode_images(prompt))
    assert encoded.image_features is not None and "pixel_values" not in encoded.inputs
    assert torch.equal(model(encoded), model(plain))
    assert not torch.equal(model(encoded), model(prompt))
    assert_same_answers(prompt, encoded)


def test_answers_set_by_hand_are_kept() -> None:
    model = hooked("llava")
    prompt = model.prompt_examples(batch())
    by_hand = dataclasses.replace(prompt, answer_ids=prompt.answer_ids + 1)
    blanked = blank_region((8, 8, 24, 24))(model, by_hand)
    assert torch.equal(blanked.answer_ids, prompt.answer_ids + 1)
    asked = other_question(lambda prompt, i: prompt.questions[i].replace("?", "!"))(model, prompt)
    assert_same_answers(prompt, asked)
    # What a corrupted prompt shows is no longer what its examples say of it.
    assert prompt.examples is not None and blanked.examples is None and asked.examples is None
    bare = blank_region((8, 8, 24, 24))(model, padded_prompt(model))
    assert bare.answers is None and bare.answer_ids is None


def test_prompts_that_cannot_be_made_again_are_refused() -> None:
    model = hooked("llava")
    prompt = padded_prompt(model)
    bare = prompt_from_inputs(model.processor, model.family.layout, prompt.inputs, prompt.images)
    with pytest.raises(CorruptionError, match="does not hold its questions and images"):
        other_question("Where?")(model, bare)
    with pytest.raises(IndexError, match="image 0 of example 0: the example has no image"):
        blank_region((0, 0, 8, 8))(model, model.prompt("Where?"))
    with pytest.raises(CorruptionError, match=r"1 question\(s\) for a batch of 2"):
        corrupted_prompt(model, prompt, questions=["Where?"])
    with pytest.raises(CorruptionError, match=r"3 image list\(s\) for a batch of 2"):
        corrupted_prompt(model, prompt, images=[[], [], []])


# ---------------------------------------------------------------------- layouts


def test_layout_differences_are_named() -> None:
    model = hooked("qwen3_vl")
    images = tiny.tiny_images(2, seed=0, sizes=[(64, 48)])
    one = model.prompt([QUESTION, "Where?"], [images[:1], images[1:]])

    def against(other: Prompt) -> str | None:
        assert same_layout(one, other) == same_layout(other, one) == (layout_difference(one, other) is None)
        return layout_difference(one, other)

    assert against(model.prompt([QUESTION, "Which?"], [images[1:], images[:1]])) is not None
    assert against(model.prompt([QUESTION.replace("K", "Q"), "Where!"], [images[1:], images[:1]])) is None
    assert against(model.prompt(QUESTION, images[:1])) == "the batches have 2 and 1 example(s)"
    assert (
        against(model.prompt([QUESTION, "Where?"], [images[:1], images])) == "example 1 has 1 and 2 image(s)"
    )
    length = one.shape[1]
    shorter = against(model.prompt(["What?", "Where?"], [images[:1], images[1:]]))
    assert shorter is not None and shorter.startswith(f"example 0 has {length} positions (12 of images) and ")
    # 64 x 48 and 48 x 64 pixels give as many tokens, in another grid.
    turned = [image.transpose(Image.Transpose.ROTATE_90) for image in images]
    first = int(one.token_map.is_image[1].int().argmax())
    assert against(model.prompt([QUESTION, "Where?"], [images[:1], turned[1:]])) == (
        f"position {first + 3} of example 1 is patch (image 0, tile 0, row 0, column 3) and "
        "patch (image 0, tile 0, row 1, column 0)"
    )


@pytest.mark.parametrize("name", ["image", "tile", "row", "col", "is_image", "is_padding", "is_question"])
def test_one_differing_entry_is_a_difference(name: str) -> None:
    prompt = hooked("llava").prompt(QUESTION, tiny.tiny_images(1))
    values = getattr(prompt.token_map, name).clone()
    position = int(prompt.token_map.is_image[0].int().argmax()) + 2
    values[0, position] = values[0, position] + 1 if values.dtype != torch.bool else ~values[0, position]
    other = dataclasses.replace(prompt, token_map=dataclasses.replace(prompt.token_map, **{name: values}))
    assert not same_layout(prompt, other) and same_layout(prompt, prompt)
    boxes = prompt.token_map.boxes.clone()
    boxes[0, position] += 1
    moved = dataclasses.replace(prompt, token_map=dataclasses.replace(prompt.token_map, boxes=boxes))
    assert same_layout(prompt, moved)
    difference = layout_difference(prompt, moved, boxes=True)
    assert difference is not None and difference.startswith(
        f"position {position} of example 0 shows the pixels"
    )


def test_padding_on_the_other_side_is_a_difference() -> None:
    model = hooked("llava")
    prompt = padded_prompt(model)
    rolled = {
        field.name: getattr(prompt.token_map, field.name).clone()
        for field in dataclasses.fields(prompt.token_map)
        if isinstance(getattr(prompt.token_map, field.name), torch.Tensor)
    }
    n_padding = int(prompt.token_map.is_padding[1].sum())
    for values in rolled.values():
        values[1] = values[1].roll(-n_padding, 0)
    other = dataclasses.replace(prompt, token_map=dataclasses.replace(prompt.token_map, **rolled))
    assert layout_difference(prompt, other) == "position 0 of example 1 is padding and template"


# ---------------------------------------------------------------------- noise


@torch.no_grad()
def test_noise_is_gaussian_of_the_embeddings_own_deviation(model: mmlens.HookedVLM) -> None:
    prompt = padded_prompt(model)
    names = ["blocks.0.hook_resid_pre"]
    clean = model.run_with_cache(prompt, names_filter=names)[1]["blocks.0.hook_resid_pre"]
    hooks = noise_images(2.5, seed=3)(model, prompt)
    with model.hooks(fwd_hooks=hooks):
        noisy = model.run_with_cache(prompt, names_filter=names)[1]["blocks.0.hook_resid_pre"]
    is_image = prompt.token_map.is_image
    assert torch.equal(noisy[~is_image], clean[~is_image])
    for row in range(2):
        before = clean[row][is_image[row]].double().numpy()
        scaled = (noisy[row][is_image[row]].double().numpy() - before) / before.std() / 2.5
        assert abs(scaled.mean()) < 5 / scaled.size**0.5
        assert abs(scaled.std() - 1) < 5 / (2 * scaled.size) ** 0.5
        # No row of the noise is another one's.
        assert np.abs(np.corrcoef(scaled) - np.eye(len(scaled))).max() < 0.9
    assert hooks[0][1].fired == 1
    assert hooks[0][1].size == pytest.approx(float((noisy - clean).abs().max()), rel=1e-5)


def added(model: mmlens.HookedVLM, prompt: Prompt, seed: int, example: int = 0, **options: Any) -> Tensor:
    """The noise that one example's image embeddings get, [image_token, d_model]."""
    clean = model.run_with_cache(prompt, names_filter="blocks.0.hook_resid_pre")[1]["blocks.0.hook_resid_pre"]
    with model.hooks(fwd_hooks=noise_images(seed=seed, **options)(model, prompt)):
        noisy = model.run_with_cache(prompt, names_filter="blocks.0.hook_resid_pre")[1][
            "blocks.0.hook_resid_pre"
        ]
    return (noisy - clean)[example][prompt.token_map.is_image[example]]


@torch.no_grad()
def test_noise_is_an_examples_own_in_every_run_and_batch(model: mmlens.HookedVLM) -> None:
    examples = batch()
    both, turned = model.prompt_examples(examples), model.prompt_examples(examples[::-1])
    alone = model.prompt_examples(examples[1:])
    noise = added(model, both, seed=0, example=1)
    for again in (
        added(model, turned, seed=0),
        added(model, alone, seed=0),
        added(model, model.encode_images(alone), 0),
    ):
        torch.testing.assert_close(again, noise, atol=1e-4, rtol=1e-4)
    for other in (
        added(model, alone, seed=1),
        added(model, other_question("Where!")(model, alone), seed=0),
        added(model, blank_region((8, 8, 40, 40))(model, alone), seed=0),
    ):
        correlation = np.corrcoef(other.flatten().numpy(), noise.flatten().numpy())[0, 1]
        assert abs(correlation) < 0.2


@torch.no_grad()
def test_noise_of_a_runs_end_and_of_generated_tokens() -> None:
    model = hooked("llava")
    prompt = padded_prompt(model)
    ((name, edit),) = noise_images(seed=0)(model, prompt)
    x = model.run_with_cache(prompt, names_filter=name)[1][name]
    whole = edit(x, None)
    # A run of the last positions: in both rows it begins within an image.
    first = int(prompt.token_map.is_image[1].int().argmax()) + 4
    in_hand = prompt.token_map.is_image & (torch.arange(prompt.shape[1]) >= first)
    rows = in_hand[prompt.token_map.is_image]
    assert 0 < int(rows.sum()) < len(rows)
    model.run_state.narrow(Span(first, prompt.shape[1] - first))
    assert torch.equal(edit(x[rows], None), whole[rows])
    with pytest.raises(ValueError, match=r"the run has 50 image tokens where its prompt has"):
        edit(x[:50], None)

    cached = noise_images(seed=0)(model, prompt)
    uncached = noise_images(seed=0)(model, prompt)
    with model.hooks(fwd_hooks=cached):
        first_ids = model.generate(prompt, max_new_tokens=4, do_sample=False)
    with model.hooks(fwd_hooks=uncached):
        second_ids = model.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(first_ids, second_ids)
    assert cached[0][1].fired == 1 and cached[0][1].size > 0


@torch.no_grad()
def test_noise_at_chosen_positions() -> None:
    model = hooked("internvl")
    prompt = model.prompt(QUESTION, images=tiny.tiny_images(2, seed=0, sizes=[(64, 48)]))
    token_map = prompt.token_map
    where = token_map.box(1, (0, 0, 30, 20))
    noise = added(model, prompt, seed=0, positions=where)
    everywhere = added(model, prompt, seed=0)
    here = where[0][token_map.is_image[0]]
    assert torch.equal(noise[here], everywhere[here]) and not bool(noise[~here].any())
    named = added(model, prompt, seed=0, positions=lambda prompt: prompt.token_map.image_tokens(1))
    of_second = token_map.image[0][token_map.is_image[0]] == 1
    assert torch.equal(named.any(-1), of_second)
    with pytest.raises(CorruptionError, match=r"example\(s\) \[0\] would stay clean: .* among those chosen"):
        noise_images(positions="question")(model, prompt)


@torch.no_grad()
def test_noise_reaches_deepstack_features_too() -> None:
    model = hooked("qwen3_vl")
    prompt = padded_prompt(model)
    deep = [f"blocks.{layer}.hook_deepstack" for layer in model.anatomy.deep_after]
    assert deep
    hooks = noise_images(3, seed=0)(model, prompt)
    assert [name for name, _ in hooks] == ["image.hook_embed", *deep]
    assert [name for name, _ in noise_images(3, deepstack=False)(model, prompt)] == ["image.hook_embed"]
    clean = model.run_with_cache(prompt, names_filter=deep)[1]
    with model.hooks(fwd_hooks=hooks):
        noisy = model.run_with_cache(prompt, names_filter=deep)[1]
    n_first = int(prompt.token_map.is_image[0].sum())
    for name in deep:
        for rows in (slice(0, n_first), slice(n_first, None)):
            ratio = (noisy[name][rows] - clean[name][rows]).std() / clean[name][rows].std()
            assert ratio == pytest.approx(3, rel=0.1)
    first, second = (noisy[name] - clean[name] for name in deep[:2])
    assert abs(np.corrcoef(first.flatten(), second.flatten())[0, 1]) < 0.1


@torch.no_grad()
def test_bad_noise_is_an_error() -> None:
    for std in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="std is .*; expected a finite number above 0"):
            noise_images(std)
    model = hooked("llava")
    mixed = model.prompt([QUESTION, "Where?"], [tiny.tiny_images(1), []])
    with pytest.raises(CorruptionError, match=r"example\(s\) \[1\] would stay clean: they have no image"):
        noise_images()(model, mixed)
    with pytest.raises(CorruptionError, match="they have no image"):
        noise_images()(model, model.prompt("Where?"))
    cross = hooked("mllama")
    prompt = cross.prompt(QUESTION, images=tiny.tiny_images(1))
    with pytest.raises(CorruptionError, match="'mllama' have no visual positions"):
        noise_images()(cross, prompt)
    assert same_layout(prompt, blank_region((0, 0, 30, 30))(cross, prompt))


# ---------------------------------------------------------------------- a model that has learnt its task


@torch.no_grad()
def test_the_micro_model_loses_what_is_taken_away(micro: mmlens.HookedVLM) -> None:
    examples = mmlens.scene_examples("objects", 16, seed=11)
    prompt = micro.prompt_examples(examples)
    find = evidence_of(examples)

    def elsewhere(prompt: Prompt, example: int) -> tuple[float, ...]:
        """A slot of the evidence's size in another place: the next one, down and around."""
        left, top, right, bottom = examples[example].evidence[0].box
        below = (top + 16) % prompt.images[example][0].size[1]
        return left, below, right, below + bottom - top

    def accuracy(prompt: Prompt, hooks: Any = ()) -> float:
        return float(mmlens.accuracy(micro.run_with_hooks(prompt, fwd_hooks=list(hooks)), prompt).mean())

    assert accuracy(prompt) > 0.9
    assert accuracy(blank_region(find)(micro, prompt)) < 0.5
    assert accuracy(blank_region(elsewhere, fill="black")(micro, prompt)) > 0.9
    # A letter that changes places takes its colour with it.
    assert accuracy(swap_regions(find, elsewhere)(micro, prompt)) > 0.8
    assert accuracy(prompt, noise_images(seed=0)(micro, prompt)) < 0.5
    assert accuracy(other_image(mmlens.scene_examples("objects", 30, seed=12))(micro, prompt)) < 0.6
    asked = other_question(lambda prompt, i: re.sub(r"\b[A-Z]\b", "Q", prompt.questions[i]))
    rest = [example for example in examples if not re.search(r"\bQ\b", example.question)]
    other = asked(micro, micro.prompt_examples(rest))
    assert accuracy(other) < 0.5
    assert same_layout(other, micro.prompt_examples(rest))
