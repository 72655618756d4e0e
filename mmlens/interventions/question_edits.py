"""Corruptions of what a prompt says: another question, or another text in any place of its chat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from mmlens.arguments import (
    called,
    flag,
    listed,
    seed_of,
    texts,
    whole_number,
)
from mmlens.data.chats import Chat, Message, parts_of, with_text
from mmlens.data.examples import Example
from mmlens.errors import PromptError
from mmlens.interventions.corruptions import Corruption, CorruptionError, corrupted_prompt, messages_of
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
    example's index) that gives one. Of a question in several texts of a turn, joined by spaces, one may be another.
    Where layouts must be equal, a question of as many tokens is drawn. What an
    example gets depends on `seed`, its question and its images, not on the batch.

    Raises, when applied, CorruptionError where there is no other question (of as many tokens) to draw, and as
    `corrupted_prompt`; PromptError for an empty question.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> prompt = model.prompt("What colour is K ?")
    >>> other_question(lambda prompt, i: prompt.questions[i].replace("K", "Q"))(model, prompt).questions
    ['What colour is Q ?']
    """
    drawn = _drawn("other_question", "questions", questions, seed, equal_layout)

    def corruption(model: HookedVLM, prompt: Prompt) -> Prompt:
        check_call(model, prompt)
        asked = prompt.token_map.is_question
        made = [drawn(model, prompt, row, own, asked[row]) for row, own in enumerate(prompt.questions)]
        return corrupted_prompt(model, prompt, questions=made, equal_layout=equal_layout)

    return corruption


def other_text(
    others: str | Sequence[str] | Callable[[Prompt, int], str],
    *,
    turn: int,
    part: int = 0,
    seed: int = 0,
    equal_layout: bool = True,
) -> Corruption:
    """Exchange one text of a chat: part number `part` of turn number `turn`, which count from 0, -1 the last turn.

    A system prompt is turn 0, an answer of a few-shot chat the turn after its question; content that is a plain text is
    part 0. `others` and `seed` are as the questions of `other_question`. The rest of the chat stays as it is, the
    answer and candidates too.

    Raises, when applied, CorruptionError for a chat without that turn or part, for a part that is no text, where there
    is no other text to draw, and as `corrupted_prompt`.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> chat = [{"role": role, "content": said} for role, said in (("user", "What is K ?"), ("assistant", "red"))]
    >>> prompt = model.prompt([*chat, {"role": "user", "content": "What colour is Q ?"}])
    >>> other = other_text("blue", turn=1)(model, prompt)
    >>> [message["content"] for message in other.messages[0]]
    ['What is K ?', 'blue', 'What colour is Q ?']
    """
    drawn = _drawn("other_text", "others", others, seed, equal_layout)
    turn, part = whole_number("turn", turn), whole_number("part", part, least=0)

    def corruption(model: HookedVLM, prompt: Prompt) -> Prompt:
        check_call(model, prompt)
        token_map, made = prompt.token_map, []
        for row, messages in enumerate(messages_of(prompt)):
            own = _text_of(messages, turn, part, row)
            at = turn % len(messages)
            positions = (token_map.turn[row] == at) & (token_map.part[row] == part)
            made.append(with_text(messages, at, part, drawn(model, prompt, row, own, positions)))
        return corrupted_prompt(model, prompt, messages=made, equal_layout=equal_layout)

    return corruption


def _text_of(messages: Sequence[Message], turn: int, part: int, row: int) -> str:
    """The text of one part of a chat."""
    if Chat(list(messages)).is_rendered:
        raise CorruptionError(
            f"example {row} was made of inputs, whose turns are not known; make it of its messages: model.prompt(chat)"
        )
    if not -len(messages) <= turn < len(messages):
        raise CorruptionError(f"turn {turn} of example {row}: its chat has {len(messages)} turn(s)")
    parts = parts_of(messages[turn])
    kinds = [each["type"] for each in parts]
    if part >= len(parts) or kinds[part] != "text":
        raise CorruptionError(
            f"part {part} of turn {turn} of example {row} is no text; the parts of that turn are {kinds}"
        )
    return parts[part]["text"]


_Draw = Callable[[HookedVLM, Prompt, int, str, Bool[Tensor, " pos"]], str]
"""(model, prompt, example, the text to exchange, its positions) -> another text."""


def _drawn(caller: str, name: str, given: Any, seed: int, equal_layout: bool) -> _Draw:
    """How another text is found: the one given, what the function gives, or one of a list, drawn by `seed`."""
    seed = seed_of(seed)
    flag("equal_layout", equal_layout)
    pool: list[str] = []
    noun = "question" if name == "questions" else "text"
    if callable(given):
        called(name, given, "a function (prompt, example's index) -> text", n_arguments=2)
    elif not isinstance(given, str):
        entries = listed(name, given, "a text, or a list of texts or of Example")
        pool = [entry.question if isinstance(entry, Example) else entry for entry in entries]
        texts(name, pool)
        if not pool:
            raise CorruptionError(f"{caller}: there is no {noun} to draw from")

    def draw(model: HookedVLM, prompt: Prompt, example: int, own: str, at: Bool[Tensor, " pos"]) -> str:
        if callable(given) or isinstance(given, str):
            text = given(prompt, example) if callable(given) else given
            if not isinstance(text, str) or not text.strip():
                raise PromptError(f"{caller}: the {noun} is empty, or no text: {text!r}")
            return text
        others = sorted({text for text in pool if text != own})
        rng = np.random.default_rng([seed, *example_seed(prompt, example)])
        n_tokens = _n_tokens(model, prompt, example, own, at, own) if equal_layout else 0
        for index in rng.permutation(len(others)):
            if not equal_layout or _n_tokens(model, prompt, example, own, at, others[index]) == n_tokens:
                return others[index]
        alike = f"; none is laid out in the {n_tokens} tokens of its own" if equal_layout and others else ""
        raise CorruptionError(
            f"{caller}: among {len(pool)} {noun}(s) to draw from, {len(others)} differ from that of "
            f"example {example} ({own!r}){alike}"
        )

    return draw


def _n_tokens(
    model: HookedVLM, prompt: Prompt, example: int, own: str, at: Bool[Tensor, " pos"], text: str
) -> int:
    """How long the rendered prompt is with another text in the place of its own, images' placeholders not expanded."""
    said, characters = prompt.text[example], prompt.offsets
    first = 0 if characters is None or not bool(at.any()) else int(characters[example][at][:, 0].min())
    start = said.find(own.strip(), max(first, 0))
    if start < 0:
        # It stands in several parts, with something between them.
        start = len(said)
    before, after = said[:start], said[start + len(own.strip()) :]
    tokenizer: Any = model.tokenizer
    return len(tokenizer(f"{before}{text.strip()}{after}", add_special_tokens=False)["input_ids"])
