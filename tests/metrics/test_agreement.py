"""First tokens and generated answers side by side."""

from __future__ import annotations

import dataclasses
import warnings

import pytest

import mmlens
from mmlens import HookedVLM
from mmlens.errors import MmlensWarning
from mmlens.metrics import first_token_agreement


def test_a_table_of_what_both_say(micro: HookedVLM) -> None:
    examples = mmlens.scene_examples("objects", 5, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = first_token_agreement(micro, examples, batch_size=2)
    found = mmlens.effect(micro, examples, None, [mmlens.accuracy, mmlens.generated_accuracy], batch_size=2)
    assert table["accuracy"].tolist() == found["accuracy"].clean.tolist()
    assert table["generated_accuracy"].tolist() == found["generated_accuracy"].clean.tolist()
    batches = [micro.prompt_examples(examples[at : at + 2]) for at in range(0, 5, 2)]
    texts = [text for prompt in batches for text in micro.answer(prompt, 16, do_sample=False)]
    assert table["text"].tolist() == texts


def test_an_answer_that_begins_otherwise_is_told(micro: HookedVLM) -> None:
    """As where a template's answers begin with something that the first token does not look for."""
    prompt = micro.prompt_examples(mmlens.scene_examples("objects", 1, seed=0))
    assert mmlens.effect(micro, prompt, None, mmlens.generated_accuracy).clean.tolist() == [1]
    assert prompt.answer_ids is not None
    elsewhere = dataclasses.replace(prompt, answer_ids=prompt.answer_ids + 1)
    metrics = [mmlens.accuracy, mmlens.generated_accuracy]
    with pytest.warns(MmlensWarning, match="1 of 1 generated answers are right"):
        mmlens.effect(micro, elsewhere, None, metrics)
    with pytest.warns(MmlensWarning, match="first_token_agreement"):
        first_token_agreement(micro, elsewhere)
