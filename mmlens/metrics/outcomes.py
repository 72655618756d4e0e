"""Outcome metrics: functions that give one number per example of a prompt.

What a metric reads stands on the function itself, as `metric.reads`:

- "logits", the default: called as metric(logits, prompt), logits [batch, pos, vocab];
- "clean logits": metric(logits, prompt, clean_logits), with those of the run without the intervention;
- "answers": metric(texts, prompt), with the text generated after each prompt, of at most `metric.max_new_tokens`
  tokens (mmlens.metrics.answers has these);
- "answer log probabilities": metric(log_probs, prompt), with the log probabilities of the tokens of each example's
  answer, or of each of its candidates, as `metric.of` says (mmlens.metrics.whole_answers has these).

Any function of yours is a metric; `reads` marks one that needs more than logits. `evaluate` calls them all.

The metrics of this file look at the last position, where the answer's first token is predicted, and at first
tokens only: an answer of several tokens counts by its first. The prompt carries the token ids, as
`model.prompt_examples` makes it: `answer_ids` [batch], and `candidate_ids`, one tensor per example. Log
probabilities, logit differences and KL can be backpropagated through; accuracy, rank and `invalid` are steps,
whose gradient is zero or none.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlens.arguments import (
    called,
    instance_of,
    listed,
    nearest_names,
    one_of,
    shown,
    unknown_name_message,
    whole_number,
)
from mmlens.errors import InvalidTypeError, InvalidValueError
from mmlens.model.fingerprints import processor_fingerprint
from mmlens.model.hooked_vlm import HookedVLM, model_of
from mmlens.model.prompt import Prompt, Spelling, prompt_of
from mmlens.model.prompt_answers import answer_ids_of, respelt

Metric = Callable[..., Tensor]
"""A function that gives one number per example: a tensor [batch]."""

Reads = Literal["logits", "clean logits", "answers", "answer log probabilities"]
Continuations = Callable[[HookedVLM, Prompt], list[list[list[int]]]]
"""(model, prompt) -> of each example the continuations that are measured, each the ids of its tokens."""
DEFAULT_MAX_NEW_TOKENS = 16
_AnyMetric = TypeVar("_AnyMetric", bound=Metric)


def _check_reads(what: str, where: str) -> None:
    if not isinstance(what, str) or what not in get_args(Reads):
        raise InvalidValueError(
            f"{where}: {unknown_name_message('thing a metric reads', what, get_args(Reads))}"
        )


def reads(
    what: Reads,
    *,
    max_new_tokens: int | None = None,
    of: Literal["answer", "candidates"] | Continuations | None = None,
) -> Callable[[_AnyMetric], _AnyMetric]:
    """Decorator: says what a metric reads, for "answers" how many tokens are generated (16 by default), and for
    "answer log probabilities" of what: the answer (the default), all candidates, or what a function (model, prompt)
    gives, of each example lists of token ids.

    Raises ValueError for another word, fewer than one token, or a number of tokens for what generates none.

    >>> @reads("answers", max_new_tokens=4)
    ... def length(texts, prompt):
    ...     return torch.tensor([float(len(text)) for text in texts])
    >>> length.reads, length.max_new_tokens
    ('answers', 4)
    """
    _check_reads(what, "reads(...)")
    if max_new_tokens is not None:
        max_new_tokens = whole_number("max_new_tokens", max_new_tokens, least=1)
    if max_new_tokens is not None and what != "answers":
        raise InvalidValueError(
            f"max_new_tokens is of a metric that reads 'answers'; got {max_new_tokens} for {what!r}"
        )
    if of is not None and what != "answer log probabilities":
        raise InvalidValueError(f"of is of a metric that reads 'answer log probabilities', not {what!r}")
    if isinstance(of, str):
        one_of("of", of, tuple(_CONTINUATIONS))

    def mark(metric: _AnyMetric) -> _AnyMetric:
        marked: Any = metric
        marked.reads = what
        if what == "answers":
            marked.max_new_tokens = max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        if what == "answer log probabilities":
            marked.of = of or "answer"
        return metric

    return mark


def _own_metrics() -> list[str]:
    """The names of the room's own metrics: what it exports that says what it reads."""
    room = importlib.import_module("mmlens.metrics")
    return [name for name, value in vars(room).items() if callable(value) and hasattr(value, "reads")]


def metric_of(name: str, value: object) -> Metric:
    """A metric: a function of what it reads and the prompt. InvalidTypeError for anything else, such as its name.

    >>> metric_of("metric", "acuracy")
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidTypeError: metric is 'acuracy' (str); expected ... the nearest: mmlens.metrics.accuracy...
    """
    expected = "a function (logits, prompt) that gives one number per example"
    if isinstance(value, str):
        nearest = ", ".join(f"mmlens.metrics.{near}" for near in nearest_names(value, _own_metrics()))
        raise InvalidTypeError(
            f"{name} is {shown(value)}; expected the function itself, {expected}; the nearest: {nearest}"
        )
    function = called(name, value, expected)
    n_arguments = 3 if what_reads(function) == "clean logits" else 2
    return called(name, value, expected, n_arguments=n_arguments)


def metric_name(metric: Metric) -> str:
    """What a metric goes by where no name is given: its function's."""
    return getattr(metric, "__name__", repr(metric))


def what_reads(metric: Metric) -> Reads:
    """What the metric reads: its attribute `reads`, or "logits" where it has none. ValueError for another word."""
    what: Any = getattr(metric, "reads", "logits")
    _check_reads(what, metric_name(metric))
    return what


def continuations_of(metric: Metric, model: HookedVLM, prompt: Prompt) -> list[list[list[int]]]:
    """The tokens of what a metric of answer log probabilities reads: of each example, each of its continuations.

    Raises ValueError where the prompt carries no answers, or an example has none of what is read.
    """
    of: Any = getattr(metric, "of", "answer")
    found = (_CONTINUATIONS[of] if isinstance(of, str) else of)(model, prompt)
    for row, own in enumerate(found):
        if not own or not all(own):
            raise InvalidValueError(
                f"metric {metric_name(metric)}: example {row} of the batch has no {of if isinstance(of, str) else ''} "
                "to measure".replace("  ", " ")
            )
    return found


def _answer_tokens(model: HookedVLM, prompt: Prompt) -> list[list[list[int]]]:
    if prompt.answer_tokens is None:
        raise InvalidValueError("the prompt carries no answers: make it with model.prompt_examples(examples)")
    return [[own] for own in prompt.answer_tokens]


def _candidate_tokens(model: HookedVLM, prompt: Prompt) -> list[list[list[int]]]:
    if prompt.candidate_tokens is None:
        raise InvalidValueError(
            "the prompt carries no candidates: make it with model.prompt_examples(examples)"
        )
    return prompt.candidate_tokens


_CONTINUATIONS: dict[str, Continuations] = {"answer": _answer_tokens, "candidates": _candidate_tokens}


def evaluate(
    metric: Metric,
    name: str,
    prompt: Prompt,
    *,
    logits: Float[Tensor, "batch pos vocab"] | None = None,
    clean_logits: Float[Tensor, "batch clean_pos vocab"] | None = None,
    answers: Sequence[str] | None = None,
    log_probs: Sequence[Sequence[Tensor]] | None = None,
) -> Float[Tensor, " example"]:
    """The metric's values for the prompt's examples, float32 on the CPU, from what it reads.

    What it does not read is left aside; a gradient is kept. Raises ValueError (with the metric's `name`) where what
    it reads was not given, a number of answers is not the prompt's, or the metric gives anything but one number
    per example, or NaN.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> prompt = model.prompt_examples(mmlens.scene_examples("objects", 2, seed=0))
    >>> evaluate(accuracy, "accuracy", prompt, logits=model(prompt)).shape
    torch.Size([2])
    """
    what = what_reads(metric)
    prompt_of(prompt)
    if what == "answers":
        if answers is None:
            raise InvalidValueError(f"metric {name} reads generated answers: none were given")
        texts = list(answers)
        if len(texts) != len(prompt):
            raise InvalidValueError(f"metric {name}: {len(texts)} answer(s) for a prompt of {len(prompt)}")
        return _checked(name, metric(texts, prompt), prompt)
    if what == "answer log probabilities":
        if log_probs is None or len(log_probs) != len(prompt):
            given = "none were" if log_probs is None else f"those of {len(log_probs)} example(s) were"
            raise InvalidValueError(
                f"metric {name} reads log probabilities of the answers of {len(prompt)} example(s): {given} given"
            )
        return _checked(name, metric(log_probs, prompt), prompt)
    if logits is None:
        raise InvalidValueError(f"metric {name} reads logits: none were given")
    if what == "logits":
        return _checked(name, metric(logits, prompt), prompt)
    if clean_logits is None:
        raise InvalidValueError(f"metric {name} reads the clean run's logits too: none were given")
    return _checked(name, metric(logits, prompt, clean_logits), prompt)


@reads("logits")
def accuracy(logits: Float[Tensor, "batch pos vocab"], prompt: Prompt) -> Float[Tensor, " batch"]:
    """1 where the most likely next token, of the whole vocabulary, is the answer's first token, else 0.

    A wrong answer that begins with the same token counts as right: use it where first tokens differ
    (`logit_difference` refuses candidates of which this is not true), and `generated_accuracy` elsewhere.
    """
    last = _last_logits(logits, prompt)
    return (last.argmax(-1) == _answer_ids(prompt, last)).float()


@reads("logits")
def answer_log_probability(
    logits: Float[Tensor, "batch pos vocab"], prompt: Prompt
) -> Float[Tensor, " batch"]:
    """Log probability, in nats, of the answer's first token as the next token."""
    last = _last_logits(logits, prompt)
    return last.log_softmax(-1).gather(-1, _answer_ids(prompt, last)[:, None]).squeeze(-1)


@reads("logits")
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
            raise InvalidValueError(
                f"logit_difference: example {row} of the batch has no candidate but its answer"
            )
        differences.append(last[row, answer] - last[row, wrong].max())
    return torch.stack(differences)


def logit_difference_of(
    model: HookedVLM, answer: str | int, wrong: str | int | Sequence[str | int]
) -> Metric:
    """The logit difference between tokens of your choice, the same for every prompt: a metric to hand to `effect`.

    Logit of `answer` minus the highest logit among `wrong`, at the last position; prompts need no answers. A token
    is its id, or a text that is one token exactly as it follows the prompt: many tokenizers tell " red" from "red",
    and a MmlensWarning says where the model's most probable token is the other one.

    Raises ValueError for a text that is several tokens, an id outside the vocabulary, no wrong token, and an
    answer that is among the wrong ones.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> red_or_blue = logit_difference_of(model, "red", "blue")
    >>> mmlens.effect(model, model.prompt("What colour is K", images=[]), None, red_or_blue).metric
    "logit_difference_of('red', 'blue')"
    """
    model_of(model)
    given = [wrong] if isinstance(wrong, (str, int, np.integer)) else wrong
    given = listed("wrong", given, "at least one wrong token: its text or id, or a list of them", least=1)
    right, others = _token_id(model, answer), [_token_id(model, token) for token in given]
    if right in others:
        raise InvalidValueError(f"the answer {answer!r} and a wrong token are the same token ({right})")
    texts = [token for token in (answer, *given) if isinstance(token, str)]
    spelling = Spelling([str(answer)], [False], [_other_spellings(model, texts, {right, *others})])

    made_for = processor_fingerprint(model.processor) if model.processor is not None else ""

    def difference(logits: Float[Tensor, "batch pos vocab"], prompt: Prompt) -> Float[Tensor, " batch"]:
        if prompt.processor and made_for and prompt.processor != made_for:
            raise InvalidValueError(
                f"{difference.__name__}: its tokens are of another model's tokenizer than this prompt's: make the "
                "metric with the model that is run"
            )
        last = _last_logits(logits, prompt)
        if not spelling.is_checked:
            spelling.check(last.argmax(-1).tolist())
        return last[:, right] - last[:, others].amax(-1)

    difference.__name__ = f"logit_difference_of({answer!r}, {wrong!r})"
    return difference


@reads("logits")
def answer_rank(logits: Float[Tensor, "batch pos vocab"], prompt: Prompt) -> Float[Tensor, " batch"]:
    """Rank of the answer's first token among the whole vocabulary: 1 is the most likely next token.

    1 + the number of tokens with a higher logit, so that tokens of equal logits share the best of their ranks
    (common in half precision).
    """
    last = _last_logits(logits, prompt)
    own = last.gather(-1, _answer_ids(prompt, last)[:, None])
    return 1 + (last > own).sum(-1).to(last.dtype)


@reads("clean logits")
def kl_to_clean(
    logits: Float[Tensor, "batch pos vocab"],
    prompt: Prompt,
    clean_logits: Float[Tensor, "batch clean_pos vocab"],
) -> Float[Tensor, " batch"]:
    """KL(clean || intervened), in nats, between the next-token distributions at the last position.

    Sum over the vocabulary of p_clean (log p_clean - log p_intervened), in float64; 0 where the intervention
    changed no probability, infinite where it takes a token away that the clean run allows. It needs no answers.
    Its gradient at the clean run is zero: gradient methods see nothing there.
    """
    clean = _last_logits(clean_logits, prompt).detach().double().log_softmax(-1)
    under = _last_logits(logits, prompt).double().log_softmax(-1)
    if clean.shape != under.shape:
        raise InvalidValueError(
            f"kl_to_clean: the clean run has logits {list(clean_logits.shape)}, this one {list(logits.shape)}"
        )
    share = clean.exp()
    # A token of probability 0 adds nothing, though its log probability is infinite.
    surprise = (clean - under).masked_fill(share == 0, 0.0)
    return (share * surprise).sum(-1).clamp(min=0).float()


@reads("logits")
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
            raise InvalidValueError(
                f"invalid: example {row} of the batch has no candidates, so no answer is ill-formed"
            )
        outcomes.append(not bool((ids == greedy).any()) and bool(greedy != answers[row]))
    return torch.tensor(outcomes, dtype=last.dtype, device=last.device)


def _other_spellings(model: HookedVLM, texts: Sequence[str], own: set[int]) -> dict[int, str]:
    """The tokens that the texts would be with the space before them that they lack, or without theirs."""
    found: dict[int, str] = {}
    for other in map(respelt, texts):
        try:
            token = model.to_single_token(other)
        except ValueError:
            continue
        if token not in own:
            found[token] = other
    return found


def _token_id(model: HookedVLM, token: str | int) -> int:
    if isinstance(token, str):
        return model.to_single_token(token)
    token = whole_number("a token, which is a text or an id,", token)
    if not 0 <= token < model.cfg.d_vocab:
        raise InvalidValueError(f"token id {token} lies outside the vocabulary, 0 to {model.cfg.d_vocab - 1}")
    return token


def _checked(name: str, values: Tensor, prompt: Prompt) -> Float[Tensor, " example"]:
    if not isinstance(values, Tensor) or tuple(values.shape) != (len(prompt),):
        given = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InvalidValueError(
            f"metric {name} gives one number per example, a tensor of shape [{len(prompt)}], not {given}"
        )
    values = values.cpu().float()
    if bool(values.isnan().any()):
        raise InvalidValueError(
            f"metric {name} is NaN for example {int(values.isnan().nonzero()[0])} of a batch"
        )
    return values


def _last_logits(logits: Float[Tensor, "batch pos vocab"], prompt: Prompt) -> Float[Tensor, "batch vocab"]:
    instance_of("logits", logits, Tensor, "the logits of a run, a tensor [batch, pos, vocab]")
    if logits.ndim != 3 or len(logits) != len(prompt_of(prompt)):
        raise InvalidValueError(
            f"expected logits [batch, pos, vocab] of the prompt's {len(prompt)} example(s), "
            f"got {list(logits.shape)}"
        )
    mask = prompt.inputs.get("attention_mask")
    if mask is not None and not bool(mask[:, -1].all()):
        rows = (mask[:, -1] == 0).nonzero().flatten().tolist()
        raise InvalidValueError(
            f"batch row(s) {rows} end in padding: metrics of the next token need left padding"
        )
    last = logits[:, -1].float()
    rows = last.isnan().any(-1)
    if bool(rows.any()):
        examples = rows.nonzero().flatten().tolist()
        raise InvalidValueError(
            f"the logits of example(s) {examples} of the batch are NaN at the last position, so they rank no token"
        )
    return last


def _answer_ids(prompt: Prompt, logits: Float[Tensor, "batch vocab"]) -> Int[Tensor, " batch"]:
    ids = answer_ids_of(prompt)
    if prompt.spelling is not None and not prompt.spelling.is_checked:
        prompt.spelling.check(logits.argmax(-1).tolist())
    return ids.to(logits.device)


def _candidate_ids(prompt: Prompt, logits: Float[Tensor, "batch vocab"]) -> list[Int[Tensor, " _"]]:
    if prompt.candidate_ids is None:
        raise InvalidValueError(
            "the prompt carries no candidates: make it with model.prompt_examples(examples)"
        )
    return [ids.to(logits.device) for ids in prompt.candidate_ids]


def _check_distinct(prompt: Prompt, row: int, answer: int, ids: Int[Tensor, " candidate"]) -> None:
    """Raise ValueError where a wrong candidate begins with the answer's first token."""
    assert prompt.answers is not None and prompt.candidates is not None
    own, names = prompt.answers[row], prompt.candidates[row]
    sharing = [
        name for name, first in zip(names, ids.tolist(), strict=True) if first == answer and name != own
    ]
    if sharing:
        raise InvalidValueError(
            f"logit_difference: in example {row} of the batch the answer {own!r} and the wrong candidate(s) {sharing} "
            f"share their first token ({answer}), and one position cannot tell them apart; "
            "candidate_log_probability_difference and generated_accuracy can"
        )
