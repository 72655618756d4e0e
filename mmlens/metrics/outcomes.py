"""Outcome metrics: functions of (logits, prompt) that give one number per example.

They look at the last position, where the answer's first token is predicted, and at first tokens only: an
answer of several tokens counts by its first. The prompt carries the token ids, as `model.prompt_examples`
makes it: `answer_ids` [batch], and `candidate_ids`, one tensor per example.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlens.prompt import Prompt


def accuracy(logits: Float[Tensor, "batch pos vocab"], prompt: Prompt) -> Float[Tensor, " batch"]:
    """1 where the most likely next token, of the whole vocabulary, is the answer's first token, else 0.

    A wrong answer that begins with the same token counts as right: use it where first tokens differ
    (`logit_difference` refuses candidates of which this is not true).
    """
    last = _last_logits(logits, prompt)
    return (last.argmax(-1) == _answer_ids(prompt, last)).float()


def answer_log_probability(
    logits: Float[Tensor, "batch pos vocab"], prompt: Prompt
) -> Float[Tensor, " batch"]:
    """Log probability, in nats, of the answer's first token as the next token."""
    last = _last_logits(logits, prompt)
    return last.log_softmax(-1).gather(-1, _answer_ids(prompt, last)[:, None]).squeeze(-1)


def logit_difference(logits: Float[Tensor, "batch pos vocab"], prompt: Prompt) -> Float[Tensor, " batch"]:
    """Logit of the answer's first token minus the highest one among the wrong candidates' first tokens.

    Raises ValueError where an example has no wrong candidate, or where a wrong one shares the answer's first
    token: no difference at one position tells those apart.
    """
    last = _last_logits(logits, prompt)
    answers = _answer_ids(prompt, last)
    candidates = _candidate_ids(prompt, last)
    differences = []
    for row, (answer, ids) in enumerate(zip(answers.tolist(), candidates, strict=True)):
        _check_distinct(prompt, row, answer, ids)
        wrong = ids[ids != answer]
        if not len(wrong):
            raise ValueError(f"logit_difference: example {row} of the batch has no candidate but its answer")
        differences.append(last[row, answer] - last[row, wrong].max())
    return torch.stack(differences)


def invalid(logits: Float[Tensor, "batch pos vocab"], prompt: Prompt) -> Float[Tensor, " batch"]:
    """1 where the most likely next token begins no candidate, nor the answer; else 0.

    It tells a lost format from a lost retrieval, which leaves a well-formed wrong answer. Raises ValueError
    where an example has no candidates.
    """
    last = _last_logits(logits, prompt)
    answers = _answer_ids(prompt, last)
    outcomes = []
    for row, (greedy, ids) in enumerate(zip(last.argmax(-1), _candidate_ids(prompt, last), strict=True)):
        if not len(ids):
            raise ValueError(
                f"invalid: example {row} of the batch has no candidates, so no answer is ill-formed"
            )
        outcomes.append(not bool((ids == greedy).any()) and bool(greedy != answers[row]))
    return torch.tensor(outcomes, dtype=last.dtype, device=last.device)


def _last_logits(logits: Float[Tensor, "batch pos vocab"], prompt: Prompt) -> Float[Tensor, "batch vocab"]:
    if logits.ndim != 3 or len(logits) != len(prompt):
        raise ValueError(
            f"expected logits [batch, pos, vocab] of the prompt's {len(prompt)} example(s), "
            f"got {list(logits.shape)}"
        )
    mask = prompt.inputs.get("attention_mask")
    if mask is not None and not bool(mask[:, -1].all()):
        rows = (mask[:, -1] == 0).nonzero().flatten().tolist()
        raise ValueError(f"batch row(s) {rows} end in padding: metrics of the next token need left padding")
    return logits[:, -1].float()


def _answer_ids(prompt: Prompt, logits: Float[Tensor, "batch vocab"]) -> Int[Tensor, " batch"]:
    if prompt.answer_ids is None:
        raise ValueError("the prompt carries no answers: make it with model.prompt_examples(examples)")
    return prompt.answer_ids.to(logits.device)


def _candidate_ids(prompt: Prompt, logits: Float[Tensor, "batch vocab"]) -> list[Int[Tensor, " _"]]:
    if prompt.candidate_ids is None:
        raise ValueError("the prompt carries no candidates: make it with model.prompt_examples(examples)")
    return [ids.to(logits.device) for ids in prompt.candidate_ids]


def _check_distinct(prompt: Prompt, row: int, answer: int, ids: Int[Tensor, " candidate"]) -> None:
    """Raise ValueError where a wrong candidate begins with the answer's first token."""
    assert prompt.answers is not None and prompt.candidates is not None
    own, names = prompt.answers[row], prompt.candidates[row]
    sharing = [
        name for name, first in zip(names, ids.tolist(), strict=True) if first == answer and name != own
    ]
    if sharing:
        raise ValueError(
            f"logit_difference: in example {row} of the batch the answer {own!r} and the wrong candidate(s) "
            f"{sharing} share their first token ({answer}), and one position cannot tell them apart"
        )
