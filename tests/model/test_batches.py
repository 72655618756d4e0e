"""Batches: which examples run together, and what is no prompts."""

from __future__ import annotations

import jaxtyping
import pytest
import torch

from mmlens.data.examples import Example
from mmlens.data.scenes import scene_examples
from mmlens.model.batches import Batches
from mmlens.model.hooked_vlm import HookedVLM


def examples_of_two_sizes() -> list[Example]:
    """Pages have more pixels than crops."""
    small, large = scene_examples("objects", 3, seed=0), scene_examples("images", 2, seed=0)
    return [large[0], small[0], small[1], large[1], small[2]]


def test_examples_are_made_into_prompts_some_at_a_time(micro: HookedVLM) -> None:
    examples = examples_of_two_sizes()
    batches = Batches(micro, tuple(examples), batch_size=2)
    for _ in range(2):
        found = list(batches)
        assert [index for index, _ in found] == [[0, 1], [2, 3], [4]] and len(batches) == 3
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
    assert [index for index, _ in batches] == [[0, 1], [2]] and len(batches) == 2
    assert all(prompt is own for (_, prompt), own in zip(batches, made, strict=True))
    assert batches.examples == examples and batches.n_examples == 3
    assert Batches(micro, [made[0], micro.prompt("What colour is K")]).examples is None
    assert [prompt for _, prompt in Batches(micro, made[0])] == [made[0]]


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
