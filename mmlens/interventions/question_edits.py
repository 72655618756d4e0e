"""Corruptions of what a prompt asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mmlens.arguments import (
    called,
    flag,
    listed,
    seed_of,
    texts,
)
from mmlens.data.examples import Example
from mmlens.interventions.corruptions import Corruption, CorruptionError, corrupted_prompt
from mmlens.interventions.edits import check_call
from mmlens.model.fingerprints import example_seed
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.prompt import Prompt


def other_question(
    questions: str | Sequence[str] | Sequence[Example] | Callable[[Prompt, int], str],
    *,
    seed: int = 0,
    equal_layout: bool = True,
) -> Corruption:
    """Exchange the question; images, answer and candidates stay those of the clean prompt.

    `questions` is one question, a list of questions or `Example`s to draw from by `seed`, or a function (prompt,
    example's index) that gives one. Where layouts must be equal, a question of as many tokens is drawn. What an
    example gets depends on `seed`, its question and its images, not on the batch.

    Raises, when applied, CorruptionError where there is no other question (of as many tokens) to draw, and as
    `corrupted_prompt`; PromptError for an empty question.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> prompt = model.prompt("What colour is K ?")
    >>> other_question(lambda prompt, i: prompt.questions[i].replace("K", "Q"))(model, prompt).questions
    ['What colour is Q ?']
    """
    seed = seed_of(seed)
    flag("equal_layout", equal_layout)
    if callable(questions):
        called("questions", questions, "a function (prompt, example's index) -> question", n_arguments=2)
    if not callable(questions) and not isinstance(questions, str):
        entries = listed("questions", questions, "a question, or a list of questions or of Example")
        pool = [entry.question if isinstance(entry, Example) else entry for entry in entries]
        texts("questions", pool)
        if not pool:
            raise CorruptionError("other_question: there is no question to draw from")
    else:
        pool = []

    def exchanged(model: HookedVLM, prompt: Prompt, example: int) -> str:
        if callable(questions):
            return questions(prompt, example)
        if isinstance(questions, str):
            return questions
        own = prompt.questions[example]
        others = sorted({question for question in pool if question != own})
        rng = np.random.default_rng([seed, *example_seed(prompt, example)])
        n_tokens = _n_tokens(model, prompt, example, own) if equal_layout else 0
        for index in rng.permutation(len(others)):
            if not equal_layout or _n_tokens(model, prompt, example, others[index]) == n_tokens:
                return others[index]
        alike = f"; none is laid out in the {n_tokens} tokens of its own" if equal_layout and others else ""
        raise CorruptionError(
            f"other_question: among {len(pool)} question(s) to draw from, {len(others)} differ from that of "
            f"example {example} ({own!r}){alike}"
        )

    def corruption(model: HookedVLM, prompt: Prompt) -> Prompt:
        check_call(model, prompt)
        made = [exchanged(model, prompt, example) for example in range(len(prompt))]
        return corrupted_prompt(model, prompt, questions=made, equal_layout=equal_layout)

    return corruption


def _n_tokens(model: HookedVLM, prompt: Prompt, example: int, question: str) -> int:
    """How long the rendered prompt is with another question, placeholders of images not expanded."""
    own, text = prompt.questions[example].strip(), prompt.text[example]
    before, _, after = text.rpartition(own)
    tokenizer: Any = model.tokenizer
    return len(tokenizer(f"{before}{question.strip()}{after}", add_special_tokens=False)["input_ids"])
