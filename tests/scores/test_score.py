"""The loop of head scores and their registry: prompts or examples, checks before a run, a score of one's own."""

from __future__ import annotations

import inspect

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import mmlens
from mmlens.data.examples import Example
from mmlens.data.scenes import scene_examples
from mmlens.model.prompt import Prompt
from mmlens.scores.registry import SCORES, KnownScore
from mmlens.scores.score import HeadScore


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Two sizes of image, so that batches are not in the order given."""
    large, small = scene_examples("images", 1, seed=0), scene_examples("objects", 3, seed=0)
    return [large[0], *small]


def test_every_score_is_the_function_of_its_name_that_takes_prompts() -> None:
    for name, score in SCORES.items():
        assert isinstance(score, KnownScore) and score.function is getattr(mmlens.scores, name)
        assert list(inspect.signature(score.function).parameters)[:2] == ["model", "prompts"], name
    assert len({score.label for score in SCORES.values()}) == len(SCORES)


@pytest.mark.parametrize("name", ["ram", "vision_mass", "null_calibrated_ram", "logit_contribution"])
def test_prompts_give_what_their_examples_give(
    micro: mmlens.HookedVLM, examples: list[Example], name: str
) -> None:
    alone = SCORES[name](micro, examples, batch_size=1, progress=False)
    prompts = [micro.prompt_examples([example]) for example in examples]
    for given in (prompts, [micro.encode_images(prompt) for prompt in prompts]):
        found = SCORES[name](micro, given, progress=False)
        torch.testing.assert_close(found.per_example, alone.per_example, rtol=0, atol=1e-6)
        assert found.kinds == alone.kinds == tuple(example.kind for example in examples)


def test_a_score_of_ones_own_is_one_function(micro: mmlens.HookedVLM, examples: list[Example]) -> None:
    def question_length(model: mmlens.HookedVLM, prompt: Prompt) -> Float[Tensor, "batch layer head"]:
        return model.grid.full(len(prompt), fill=1.0) * prompt.token_map.is_question.sum(-1)[:, None, None]

    found = HeadScore("length", question_length)(micro, examples, batch_size=2, progress=False)
    lengths = [int(micro.prompt_examples([e]).token_map.is_question.sum()) for e in examples]
    assert found.per_example[:, 3, 2].tolist() == lengths and found.name == "length"


def test_options_with_a_value_for_each_example_keep_their_order(
    micro: mmlens.HookedVLM, examples: list[Example]
) -> None:
    def given(model: mmlens.HookedVLM, prompt: Prompt, number: list[int]) -> Tensor:
        return torch.tensor(number)[:, None, None] * model.grid.full(len(prompt), fill=1.0)

    score = HeadScore("number", given)
    found = score(micro, examples, batch_size=3, progress=False, of_example={"number": [5, 6, 7, 8]})
    assert found.per_example[:, 0, 0].tolist() == [5, 6, 7, 8]


def test_prompts_that_know_no_examples_are_refused(micro: mmlens.HookedVLM, examples: list[Example]) -> None:
    prompt = micro.prompt(examples[0].question, images=list(examples[0].images))
    with pytest.raises(ValueError, match=r"does not know its examples.*model.prompt_examples\(examples\)"):
        mmlens.ram(micro, prompt)
    assert mmlens.scores.vision_mass(micro, prompt, progress=False).kinds is None


def test_an_unknown_need_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests' type checker would refuse it before mmlens can.
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match="there is no need 'evidenc'; the nearest: 'evidence'"):
        HeadScore("x", lambda model, prompt: model.grid.full(len(prompt)), needs=("evidenc",))  # type: ignore[arg-type]
