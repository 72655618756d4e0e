"""The answers of a prompt's examples, and their tokens as they follow the prompt."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import ProcessorMixin

from mmlens.arguments import shown
from mmlens.data.examples import Example
from mmlens.errors import (
    InvalidValueError,
    PromptError,
)
from mmlens.model.answer_start import answer_start_of
from mmlens.model.fingerprints import processor_fingerprint
from mmlens.model.prompt import Prompt, Spelling
from mmlens.model.prompt_options import configured


def with_answers(
    prompt: Prompt,
    processor: ProcessorMixin,
    examples: Sequence[Example],
    answer_start: str | None = None,
) -> Prompt:
    """The prompt of these examples with them, and with their answers and candidates (`answered`)."""
    if len(examples) != len(prompt):
        raise PromptError(f"answers of {len(examples)} example(s), but the prompt has {len(prompt)}")
    answers, candidates = [each.answer for each in examples], [each.candidates for each in examples]
    return replace(answered(prompt, processor, answers, candidates, answer_start), examples=tuple(examples))


def answered(
    prompt: Prompt,
    processor: ProcessorMixin,
    answers: list[str],
    candidates: list[tuple[str, ...]],
    answer_start: str | Sequence[str] | None = None,
) -> Prompt:
    """The prompt with an answer and candidates for each example, and their token ids as they follow the prompt.

    Many tokenizers tell " yes" from "yes". `answer_start` is what stands between the prompt and an answer: None
    for what the chat template writes there in an assistant's turn (`answer_start_of`), "" or " " to choose, for all
    examples or for each. An answer that itself begins with white space is taken as it is.

    Raises PromptError where an answer or candidate is empty or holds a word that the tokenizer does not know, or
    another processor made the prompt; InvalidValueError for another `answer_start`.
    """
    if prompt.processor and prompt.processor != processor_fingerprint(processor):
        raise PromptError(
            "the prompt was made by another processor than this one, whose tokenizer would give the answers other ids"
        )
    if answer_start is None:
        template = configured(processor, prompt.options)[1]
        chats: Sequence[Any] = [None] * len(prompt) if prompt.messages is None else prompt.messages
        starts = [
            answer_start_of(processor, text, chat, template)
            for text, chat in zip(prompt.text, chats, strict=True)
        ]
    else:
        starts = [answer_start] * len(prompt) if isinstance(answer_start, str) else list(answer_start)
        is_unknown = isinstance(answer_start, str) and answer_start not in ("", " ")
        if len(starts) != len(prompt) or is_unknown:
            raise InvalidValueError(
                f"answer_start is {shown(answer_start)}; expected '' or ' ', or None for what the chat template writes"
            )

    @functools.cache
    def tokens(text: str, answer: str, unknown: bool = False) -> list[int]:
        return tokens_after(processor, text, answer, unknown=unknown)

    device = prompt.token_map.device
    answer_tokens: list[list[int]] = []
    candidate_tokens: list[list[list[int]]] = []
    start_tokens: list[list[int]] = []
    spelling = Spelling([], [], [])
    for text, start, answer, options in zip(prompt.text, starts, answers, candidates, strict=True):
        spelt = [_spelt(start, each) for each in (answer, *options)]
        whole = [tokens(text, each) for each in spelt]
        answer_tokens.append(whole[0])
        candidate_tokens.append(whole[1:])
        ids = [own[0] for own in whole]
        spelling.tokens.append(str(processor.tokenizer.convert_ids_to_tokens(ids[0])))
        # A tag that every answer begins with tells none apart, as white space does.
        start_tokens.append(tokens(text, start, unknown=True) if start.strip() else [])
        of_start = start_tokens[-1][:1]
        spelling.blank.append(
            any(each in of_start or not processor.tokenizer.decode([each]).strip() for each in ids)
        )
        others = (
            {} if of_start else {tokens(text, each, unknown=True)[0]: each for each in map(respelt, spelt)}
        )
        spelling.others.append({token: each for token, each in others.items() if token not in ids})
    return replace(
        prompt,
        answers=answers,
        candidates=candidates,
        answer_tokens=answer_tokens,
        candidate_tokens=candidate_tokens,
        start_tokens=start_tokens,
        answer_ids=torch.tensor([own[0] for own in answer_tokens], device=device),
        candidate_ids=[
            torch.tensor([own[0] for own in each], dtype=torch.long, device=device)
            for each in candidate_tokens
        ],
        answer_starts=starts,
        spelling=spelling,
    )


def answer_ids_of(prompt: Prompt) -> Int[Tensor, " batch"]:
    """The first token of each answer, for what measures the next token.

    Raises InvalidValueError where the prompt carries no answers, or where an answer or candidate begins with a token
    of white space alone, or of a tag that the chat template writes before every answer: it tells none from another.
    """
    if prompt.answer_ids is None:
        raise InvalidValueError("the prompt carries no answers: make it with model.prompt_examples(examples)")
    if prompt.spelling is not None and any(prompt.spelling.blank):
        row = prompt.spelling.blank.index(True)
        assert prompt.answers is not None and prompt.candidates is not None
        raise InvalidValueError(
            f"example {row} of the batch: after the prompt, the answer {prompt.answers[row]!r} or one of its "
            f"candidates {prompt.candidates[row]} begins with a token of white space alone or of a tag, which tells no "
            f"answer from another: the chat template writes {_start_of(prompt, row)!r} before answers. Measure "
            "whole answers or generated ones (mmlens.generated_accuracy), turn thinking off where the template has an "
            "option for it (enable_thinking=False), or leave it out: model.prompt_examples(examples, answer_start='')"
        )
    return prompt.answer_ids


def _start_of(prompt: Prompt, row: int) -> str:
    return "" if prompt.answer_starts is None else prompt.answer_starts[row]


def spelt_tokens(processor: ProcessorMixin, prompt: Prompt, row: int, text: str) -> list[int]:
    """The tokens of another text in the place of a prompt's answer, after what stands before its answers."""
    if prompt.answer_starts is None:
        raise InvalidValueError("the prompt carries no answers: make it with model.prompt_examples(examples)")
    return tokens_after(processor, prompt.text[row], _spelt(prompt.answer_starts[row], text))


def respelt(answer: str) -> str:
    """The answer without the space before it, or with one where it has none."""
    return answer.lstrip() if answer[:1].isspace() else f" {answer}"


def _spelt(start: str, answer: str) -> str:
    if not answer.strip():
        raise PromptError(f"an answer or candidate is empty ({answer!r}), so it has no first token")
    return answer if answer[0].isspace() and not start.strip() else start + answer


def tokens_after(processor: ProcessorMixin, text: str, answer: str, *, unknown: bool = False) -> list[int]:
    """All tokens of an answer as it follows the prompt's text, which stands as it is.

    Where the tokenizer would merge the answer's start into the prompt's last token, the answer's own tokens are taken.
    Raises PromptError for a word that the tokenizer does not know, unless `unknown` allows it.
    """
    tokenizer = processor.tokenizer
    encoded = tokenizer(text + answer, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    own = [token for token, (_, last) in zip(ids, offsets, strict=True) if last > len(text)]
    if not own or offsets[len(ids) - len(own)][0] < len(text):
        own = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not unknown:
        check_known(tokenizer, answer, own)
    return own


def check_known(tokenizer: Any, text: str, ids: Sequence[int]) -> None:
    """Raise PromptError where the tokenizer knows a text only as its token for unknown words."""
    unknown = tokenizer.unk_token
    if unknown is not None and unknown not in text and tokenizer.unk_token_id in ids:
        raise PromptError(
            f"the tokenizer does not know {text!r}, or a word of it: it would be the token {unknown!r}, which stands "
            "for every word that it does not know"
        )
