"""Metrics of whole answers, teacher-forced: every token of an answer given, how probable is it?

They read log probabilities: for each example and each of its continuations (the answer, or the answer and then all
candidates) those of its tokens, in nats, each given the prompt and the tokens before it. `effect` and `sweep` get them
from one forward pass over the prompt with the continuation after it (`Prompt.continued`), under the same intervention,
built for that longer prompt. So candidates may share their first tokens, and be of any length.

The tokens are those of the answer as it follows the prompt; what ends an answer is not among them. All can be
backpropagated through but `multiple_choice` and `says_yes`, which are steps.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.arguments import one_of
from mmlens.errors import InvalidValueError
from mmlens.metrics.outcomes import Metric, reads
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.prompt import Prompt
from mmlens.model.prompt_answers import spelt_tokens

LogProbs = Sequence[Sequence[Float[Tensor, " token"]]]
"""Of every example, of every continuation, in order."""
Ids = list[list[list[int]]]
"""Tokens of every continuation of every example."""


# ---------------------------------------------------------------------- of the answer


@reads("answer log probabilities", of="answer")
def whole_answer_log_probability(log_probs: LogProbs, prompt: Prompt) -> Float[Tensor, " batch"]:
    """Log probability, in nats, of the whole answer after the prompt: the sum over its tokens."""
    return torch.stack([own.sum() for (own,) in log_probs])


@reads("answer log probabilities", of="answer")
def mean_token_log_probability(log_probs: LogProbs, prompt: Prompt) -> Float[Tensor, " batch"]:
    """`whole_answer_log_probability` over the number of the answer's tokens."""
    return torch.stack([own.mean() for (own,) in log_probs])


# ---------------------------------------------------------------------- among candidates


@reads("answer log probabilities", of="candidates")
def candidate_log_probability_difference(log_probs: LogProbs, prompt: Prompt) -> Float[Tensor, " batch"]:
    """Log probability of the whole answer minus the highest one among the wrong candidates.

    Candidates may share their first tokens. Raises ValueError where an example has no wrong candidate.
    """
    differences = []
    for row, own in enumerate(_sums(log_probs)):
        right = _right(prompt, row)
        wrong = torch.cat([own[:right], own[right + 1 :]])
        if not len(wrong):
            raise InvalidValueError(f"example {row} of the batch has no candidate but its answer")
        differences.append(own[right] - wrong.max())
    return torch.stack(differences)


By = Literal["text", "letter"]
Per = Literal["answer", "token", "character"]


def choosing(by: By = "text", *, per: Per = "answer") -> Metric:
    """Multiple choice: 1 where the answer has the highest log probability of all candidates, alone; else 0.

    `by` "text": of the candidates as they are written (letters, where the candidates are letters). "letter": of the
    letters "A", "B", ... in the candidates' places, for prompts that list the candidates so, in their order. `per`
    divides each candidate's sum by the number of its tokens, or of its characters, so that longer candidates are not at
    a disadvantage. `multiple_choice` is `choosing("text")`.

    Raises ValueError, when it is run, where an example has no candidates, or more than there are letters.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> examples = mmlens.scene_examples("objects", 4, seed=0)
    >>> mmlens.effect(model, examples, None, choosing(per="token")).metric
    "choosing('text', per='token')"
    """
    one_of("by", by, get_args(By))
    one_of("per", per, get_args(Per))

    def chosen(log_probs: LogProbs, prompt: Prompt) -> Float[Tensor, " batch"]:
        values = []
        for row, own in enumerate(_sums(log_probs)):
            right = _right(prompt, row)
            lengths = [len(tokens) for tokens in log_probs[row]]
            if per == "character":
                lengths = [len(text) for text in _options(prompt, row, by)]
            scores = own if per == "answer" else own / torch.tensor(lengths).to(own)
            others = torch.cat([scores[:right], scores[right + 1 :]])
            values.append(float(bool((scores[right] > others).all())))
        return torch.tensor(values)

    chosen.__name__ = chosen.__qualname__ = f"choosing({by!r}, per={per!r})"
    return reads("answer log probabilities", of="candidates" if by == "text" else _of_letters)(chosen)


@reads("answer log probabilities", of="candidates")
def multiple_choice(log_probs: LogProbs, prompt: Prompt) -> Float[Tensor, " batch"]:
    """1 where the whole answer is more probable than every other candidate; else 0. `choosing` gives variants.

    Raises ValueError where an example has no candidates.
    """
    return choosing()(log_probs, prompt)


# ---------------------------------------------------------------------- yes or no


@reads("answer log probabilities", of="candidates")
def yes_no_bias(log_probs: LogProbs, prompt: Prompt) -> Float[Tensor, " batch"]:
    """Log probability of "yes" minus that of "no", whichever is right: above 0 the model says yes.

    Over as many questions to be answered by yes as by no, its mean is the model's bias towards yes. The candidates are
    yes and no, in any case and order; raises ValueError for others.
    """
    differences = []
    for row, own in enumerate(_sums(log_probs)):
        texts = [text.strip().casefold() for text in _candidates(prompt, row)]
        if sorted(texts) != ["no", "yes"]:
            raise InvalidValueError(
                f"yes_no_bias: example {row} of the batch has the candidates {_candidates(prompt, row)}; expected yes "
                "and no"
            )
        differences.append(own[texts.index("yes")] - own[texts.index("no")])
    return torch.stack(differences)


@reads("answer log probabilities", of="candidates")
def says_yes(log_probs: LogProbs, prompt: Prompt) -> Float[Tensor, " batch"]:
    """1 where "yes" is more probable than "no", else 0: its mean is the share of questions answered by yes."""
    return (yes_no_bias(log_probs, prompt) > 0).float()


# ---------------------------------------------------------------------- plumbing


def _sums(log_probs: LogProbs) -> list[Float[Tensor, " continuation"]]:
    return [torch.stack([tokens.sum() for tokens in own]) for own in log_probs]


def _candidates(prompt: Prompt, row: int) -> tuple[str, ...]:
    if prompt.candidates is None or not prompt.candidates[row]:
        raise InvalidValueError(
            f"example {row} of the batch has no candidates: give them as Example(..., candidates=(...))"
        )
    return prompt.candidates[row]


def _right(prompt: Prompt, row: int) -> int:
    """Which of the candidates is the answer."""
    candidates = _candidates(prompt, row)
    assert prompt.answers is not None
    if prompt.answers[row] not in candidates:
        raise InvalidValueError(
            f"example {row} of the batch: its answer {prompt.answers[row]!r} is none of its candidates {candidates}"
        )
    return candidates.index(prompt.answers[row])


def _options(prompt: Prompt, row: int, by: By) -> Sequence[str]:
    """The candidates' texts, or the letters in their places."""
    candidates = _candidates(prompt, row)
    if by == "text":
        return candidates
    if len(candidates) > len(string.ascii_uppercase):
        raise InvalidValueError(
            f"example {row} of the batch has {len(candidates)} candidates, more than there are letters"
        )
    return string.ascii_uppercase[: len(candidates)]


def _of_letters(model: HookedVLM, prompt: Prompt) -> Ids:
    return [
        [spelt_tokens(model.processor, prompt, row, letter) for letter in _options(prompt, row, "letter")]
        for row in range(len(prompt))
    ]
