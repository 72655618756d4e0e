"""Batches: which examples run together, and what is no prompts."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import replace

import jaxtyping
import pytest
import torch

import mmlens
from mmlens.data.examples import Example
from mmlens.data.scenes import scene_examples
from mmlens.errors import PromptError
from mmlens.model import batches as batches_module
from mmlens.model.batches import Batches, ahead
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.prompt_making import UnknownWordWarning


def examples_of_two_sizes() -> list[Example]:
    """Pages have more pixels than crops."""
    small, large = scene_examples("objects", 3, seed=0), scene_examples("images", 2, seed=0)
    return [large[0], small[0], small[1], large[1], small[2]]


def test_examples_are_made_into_prompts_some_at_a_time(micro: HookedVLM) -> None:
    examples = examples_of_two_sizes()
    batches = Batches(micro, tuple(examples), batch_size=2)
    for _ in range(2):
        found = list(batches)
        assert [index for index, _ in found] == [[0, 1], [2, 3], [4]] and batches.n_batches == 3
        for index, prompt in found:
            expected = micro.prompt_examples([examples[at] for at in index])
            assert torch.equal(prompt.inputs["input_ids"], expected.inputs["input_ids"])
            assert prompt.answers == expected.answers and prompt.examples == expected.examples
    assert batches.examples == examples and batches.n_examples == 5


def test_like_sizes_may_share_a_batch_and_keep_their_numbers(micro: HookedVLM) -> None:
    examples = examples_of_two_sizes()
    found = list(Batches(micro, examples, batch_size=3, by_size=True, answers=False))
    assert [index for index, _ in found] == [[1, 2, 4], [0, 3]]
    for index, prompt in found:
        assert prompt.examples == tuple(examples[at] for at in index) and prompt.answers is None


def test_prompts_are_batches_as_they_are(micro: HookedVLM) -> None:
    examples = scene_examples("objects", 3, seed=0)
    made = [micro.prompt_examples(examples[:2]), micro.prompt_examples(examples[2:])]
    batches = Batches(micro, made, batch_size=1, by_size=True)
    assert [index for index, _ in batches] == [[0, 1], [2]] and batches.n_batches == 2
    assert all(prompt is own for (_, prompt), own in zip(batches, made, strict=True))
    assert batches.examples == examples and batches.n_examples == 3
    assert Batches(micro, [made[0], micro.prompt("What colour is K")]).examples is None
    assert [prompt for _, prompt in Batches(micro, made[0])] == [made[0]]


# ---------------------------------------------------------------------- prepared ahead


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("mmlens")]


def test_scores_are_the_same_to_the_bit_with_and_without_a_thread(
    micro: HookedVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = scene_examples("documents", 50, seed=0)
    made_ahead = mmlens.ram(micro, examples, batch_size=4)
    monkeypatch.setattr(batches_module, "ahead", lambda functions: (function() for function in functions))
    in_place = mmlens.ram(micro, examples, batch_size=4)
    assert torch.equal(made_ahead.per_example, in_place.per_example)


def test_prompts_are_those_of_the_model_while_it_tokenizes(micro: HookedVLM) -> None:
    """The main thread pads its own batches meanwhile, which on one tokenizer would change how the others are padded."""
    own = batches_module._PromptMaker(micro).processor
    assert own.tokenizer.backend_tokenizer is not micro.tokenizer.backend_tokenizer
    assert own.image_processor is not micro.processor.image_processor
    examples = scene_examples("objects", 64, seed=0)
    texts = [example.question for example in examples[:4]] + ["What colour is K"]
    once = micro.tokenizer(texts, padding=True)["input_ids"]
    alone = [micro.tokenizer(text)["input_ids"] for text in texts]
    for index, prompt in Batches(micro, examples, batch_size=4):
        for _ in range(20):
            assert micro.tokenizer(texts, padding=True)["input_ids"] == once
            assert [micro.tokenizer(text)["input_ids"] for text in texts] == alone
        expected = micro.prompt_examples([examples[at] for at in index])
        assert all(torch.equal(value, expected.inputs[name]) for name, value in prompt.inputs.items())
        assert prompt.fingerprints == expected.fingerprints and prompt.processor == expected.processor


def test_options_of_all_prompts_reach_those_made_ahead() -> None:
    model = mmlens.HookedVLM.from_pretrained("micro")
    model.prompt_options = {"max_pixels": 2_048}
    examples = scene_examples("documents", 3, seed=0)
    for _, prompt in Batches(model, examples, batch_size=1):
        width, height = prompt.token_map.shown_size(0)
        assert width * height <= 2_048 and prompt.options == {"max_pixels": 2_048}


def test_the_next_prompt_is_made_while_one_is_in_use(micro: HookedVLM) -> None:
    made: list[tuple[int, str]] = []
    started = threading.Event()

    def making(number: int) -> Callable[[], int]:
        def make() -> int:
            made.append((number, threading.current_thread().name))
            started.set()
            return number

        return make

    results = ahead(making(number) for number in range(4))
    assert made == []
    for number, result in enumerate(results):
        assert result == number
        if number < 3:
            assert started.wait(timeout=10)
        # One ahead, and no further.
        assert [at for at, _ in made][-1] <= number + 1
        started.clear()
    assert [at for at, _ in made] == [0, 1, 2, 3]
    assert [name.startswith("mmlens") for _, name in made] == [False, True, True, True]
    assert threads() == []
    assert list(ahead([])) == []


def test_an_error_is_raised_where_its_example_stands(micro: HookedVLM) -> None:
    examples = scene_examples("objects", 40, seed=0)
    examples[37] = replace(examples[37], question=" ")
    seen: list[int] = []
    with pytest.raises(PromptError, match="question is empty"):
        for index, _ in Batches(micro, examples, batch_size=8):
            seen += index
    assert seen == list(range(32))
    assert threads() == []


def test_leaving_early_leaves_no_thread(micro: HookedVLM) -> None:
    examples = scene_examples("objects", 40, seed=0)
    for _ in Batches(micro, examples, batch_size=8):
        break
    assert threads() == []

    def interrupted() -> None:
        for _ in Batches(micro, examples, batch_size=8):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert threads() == []


def test_warnings_are_given_where_the_examples_stand() -> None:
    model = mmlens.HookedVLM.from_pretrained("micro")
    examples = [
        replace(example, question=f"What colour is the letter K {word}")
        for word, example in zip(
            ("uno", "due", "tre", "sei"), scene_examples("objects", 4, seed=0), strict=True
        )
    ]

    def words(caught: list[warnings.WarningMessage]) -> list[str]:
        return [
            word
            for each in caught
            for word in ("uno", "due", "tre", "sei")
            if f"does not know '{word}'" in str(each.message) and each.category is UnknownWordWarning
        ]

    batches = iter(Batches(model, examples, batch_size=1))
    for word in ("uno", "due", "tre", "sei"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            next(batches)
        assert words(caught) == [word]
        # What the main thread does about its own warnings does not swallow those of the next prompt.
        with warnings.catch_warnings(record=True) as meanwhile:
            warnings.simplefilter("always")
            threading.Event().wait(0.1)
        assert words(meanwhile) == []


@pytest.fixture
def as_users_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the tests' type checker, which would refuse a wrong type before mmlens can."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts given"),
        ("What?", "prompts is 'What\\?'"),
        ([3], "a list of Prompt or a list of Example, all of one type; got int"),
    ],
)
def test_what_is_no_prompts_is_refused(
    as_users_run_it: None, micro: HookedVLM, prompts: object, message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Batches(micro, prompts)  # type: ignore[arg-type]


def test_prompts_and_examples_together_are_refused(as_users_run_it: None, micro: HookedVLM) -> None:
    (example,) = scene_examples("objects", 1, seed=0)
    with pytest.raises(TypeError, match="all of one type; got Example, Prompt"):
        Batches(micro, [micro.prompt_examples([example]), example])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"one example is written \[example\]"):
        Batches(micro, example)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size is 0"):
        Batches(micro, [example], batch_size=0)
