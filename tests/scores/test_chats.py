"""Scores on chats against the plain eager model, which is given the processor's own inputs for the chat.

No position is taken from mmlens: texts are found as runs of token ids between which they stand, images by the id of
their token between texts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_chats import Chat, plain_inputs, says
from tiny import tiny_images, tiny_model, tiny_processor
from tiny.wrapped import hooked
from torch import Tensor

import mmlens
from mmlens.data.examples import Evidence, Example
from mmlens.errors import MmlensWarning
from mmlens.interventions import ablate, other_image
from mmlens.metrics import accuracy, logit_difference
from mmlens.scores.attention import null_calibrated_ram
from mmlens.scores.retrieval import ram, vision_mass

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "smolvlm")
IMAGES = tiny_images(3, seed=1)
SHOT, ASKED = "It is Q", "How many objects are there?"


def chat() -> Chat:
    first, second, third = ({"type": "image", "image": image} for image in IMAGES)
    return [
        {"role": "system", "content": "Answer with one word."},
        says("user", first, "Which letter?"),
        says("assistant", SHOT),
        says(
            "user", "Of these", second, "or those", third, {"type": "text", "text": ASKED, "question": True}
        ),
    ]


def example(image: int = 1, **changes: Any) -> Example:
    options = {"messages": chat(), "answer": "seven", "candidates": ("seven", "red")}
    return Example(**{**options, "evidence": (Evidence(image),), **changes})


def run_of(ids: list[int], text: str, tokenizer: Any) -> range:
    """Where the tokens of a text stand among the ids, once."""
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = [at for at in range(len(ids)) if ids[at : at + len(wanted)] == wanted]
    assert len(found) == 1, (text, found)
    return range(found[0], found[0] + len(wanted))


@torch.no_grad()
def by_hand(family: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Patterns [layer, head, query, key] of the plain model, the question's positions, and each image's."""
    processor = tiny_processor(family)
    plain = {name: value for name, value in plain_inputs(processor, [chat()]).items() if name != "labels"}
    model = tiny_model(family, attn_implementation="eager")
    patterns = torch.stack([each[0] for each in model(**plain, output_attentions=True).attentions])
    ids = plain["input_ids"][0].tolist()
    places = [
        run_of(ids, text, processor.tokenizer) for text in ("Which letter?", "Of these", "or those", ASKED)
    ]
    is_image = torch.tensor(ids) == processor.image_token_id
    at = torch.arange(len(ids))
    images = [
        is_image & (at < places[0].start),
        is_image & (at >= places[1].stop) & (at < places[2].start),
        is_image & (at >= places[2].stop) & (at < places[3].start),
    ]
    question = (at >= places[3].start) & (at < places[3].stop)
    return patterns, question, images


@pytest.mark.parametrize("family", FAMILIES)
def test_ram_of_a_chat_is_the_attention_rows_summed_by_hand(family: str) -> None:
    patterns, question, images = by_hand(family)
    model = hooked(family)
    for number, keys in enumerate(images):
        found = ram(model, [example(number)], progress=False).per_example[0]
        expected = torch.zeros(patterns.shape[:2])
        queries = question.nonzero().flatten().tolist()
        for layer in range(patterns.shape[0]):
            for head in range(patterns.shape[1]):
                for query in queries:
                    for key in keys.nonzero().flatten().tolist():
                        expected[layer, head] += patterns[layer, head, query, key] / len(queries)
        assert torch.allclose(found.to(expected), expected, atol=1e-5) and float(expected.max()) > 0
    seen = vision_mass(model, [example()], progress=False).per_example[0]
    expected = patterns[:, :, question][..., images[0] | images[1] | images[2]].sum(-1).mean(-1)
    assert torch.allclose(seen.to(expected), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_batch_of_unequal_chats_scores_as_each_alone(family: str) -> None:
    model = hooked(family)
    image = {"type": "image", "image": IMAGES[0]}
    short = Example(
        messages=[says("user", image, "Who?")], answer="K", evidence=(Evidence(0, (0, 0, 30, 30)),)
    )
    plain = Example("Where is it?", "red", (IMAGES[1],), (Evidence(0),))
    given = [example(), short, plain, example(2)]
    together = ram(model, given, progress=False).per_example
    for row, each in enumerate(given):
        alone = ram(model, [each], progress=False).per_example[0]
        assert torch.allclose(together[row], alone, atol=1e-5)


def test_a_null_question_takes_the_question_s_place_in_the_same_chat() -> None:
    model = hooked("llava")
    found = null_calibrated_ram(model, [example()], null_question="what is this", progress=False)
    null = [*chat()[:-1], {"role": "user", "content": [*chat()[-1]["content"][:-1]]}]
    null[-1]["content"].append({"type": "text", "text": "what is this", "question": True})
    expected = ram(model, [example()], progress=False).per_example[0]
    expected = expected - ram(model, [example(messages=null)], progress=False).per_example[0]
    assert torch.allclose(found.per_example[0], expected, atol=1e-6)


def test_evidence_after_the_question_is_told_of() -> None:
    """What stands after a token cannot be attended to: RAM is 0 whatever the model does."""
    model = hooked("llava")
    late = [says("user", "What is this?", {"type": "image", "image": IMAGES[0]})]
    given = [example(), Example(messages=late, answer="red", evidence=(Evidence(0),), id="late")]
    with pytest.warns(MmlensWarning, match=r"example 'late' stands after its question"):
        found = ram(model, given, progress=False).per_example
    assert bool((found[1] == 0).all()) and bool((found[0] > 0).all())


def test_effects_sweeps_and_hybrid_attention_take_chats() -> None:
    """The numbers are those of the prompts made by hand."""
    model = hooked("qwen2_5_vl")
    given = [example(), example(2, answer="red")]
    prompt = model.prompt_examples(given)
    base = logit_difference(model(prompt), prompt)
    clean = mmlens.effect(model, given, None, logit_difference)
    assert torch.allclose(clean.values.float(), base.float(), atol=1e-5)
    edited = mmlens.effect(model, given, ablate([(1, 2)], positions="question"), logit_difference)
    plain = model.run_with_hooks(prompt, fwd_hooks=ablate([(1, 2)], positions="question")(model, prompt))
    assert torch.allclose(edited.values.float(), logit_difference(plain, prompt).float(), atol=1e-5)
    arms = {name: ablate([head], positions="question") for name, head in (("L1H2", (1, 2)), ("L0H0", (0, 0)))}
    table = mmlens.sweep(model, given, arms, logit_difference)
    assert torch.allclose(torch.tensor(table["value"].tolist()[:2]), edited.values.float(), atol=1e-5)
    with mmlens.hybrid_attention(model, dense=[(0, 0)], sink=4, window=8):
        windowed = mmlens.effect(model, given, None, accuracy)
    assert windowed.values.shape == (2,)
    corrupted = other_image(tiny_images(1, seed=5, sizes=[IMAGES[2].size])[0], image=2)(
        model, model.prompt_examples(given[:1])
    )
    assert not torch.allclose(logit_difference(model(corrupted), corrupted), base[:1], atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_generated_answers_are_those_of_the_plain_inputs(family: str) -> None:
    model, processor = hooked(family), tiny_processor(family)
    plain = {name: value for name, value in plain_inputs(processor, [chat()]).items() if name != "labels"}
    out = tiny_model(family).generate(**plain, max_new_tokens=4, do_sample=False)
    said = processor.tokenizer.decode(out[0, plain["input_ids"].shape[1] :], skip_special_tokens=True)
    assert model.answer(model.prompt_examples([example()]), max_new_tokens=4) == [said.strip()]


@torch.no_grad()
def test_patching_all_of_a_corrupted_chat_gives_the_corrupted_run() -> None:
    model = hooked("llava")
    prompt = model.prompt_examples([example()])
    shown = tiny_images(1, seed=5, sizes=[IMAGES[1].size])[0]
    corrupted = other_image(shown, image=1)(model, prompt)
    patched = mmlens.effect(
        model, prompt, mmlens.patch("blocks.0.hook_resid_pre", corrupted), logit_difference, progress=False
    )
    expected, clean = (logit_difference(model(each), each) for each in (corrupted, prompt))
    assert torch.allclose(patched.values.float(), expected.float(), atol=1e-4)
    assert not torch.allclose(expected, clean, atol=1e-4)
