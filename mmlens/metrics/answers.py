"""Metrics of generated answers: they read the text that follows each prompt, and give one number per example.

`generated_accuracy` and `generated_invalid` parse the answer among the candidates; `exact_match`, `relaxed_accuracy`
(ChartQA) and `anls` (documents) compare the whole text with the answer. All of them generate at most 16 tokens,
greedily; `generating` gives a metric more. The prompt carries one answer per example, as `model.prompt_examples`
makes it.

Texts are compared in Unicode's composed form (NFC), without regard to case, runs of white space, and a full stop at
the end. `anls` alone keeps the full stop.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

import torch
from jaxtyping import Float
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from mmlens.arguments import instance_of, whole_number
from mmlens.arguments import texts as texts_of
from mmlens.errors import InvalidValueError
from mmlens.metrics.outcomes import Metric, metric_name, metric_of, reads, what_reads
from mmlens.model.prompt import Prompt, prompt_of

TOLERANCE = Decimal("0.05")
"""The relative error that `relaxed_accuracy` allows."""
THRESHOLD = 0.5
"""The similarity below which `anls` counts an answer as wrong."""


def generating(metric: Metric, *, max_new_tokens: int) -> Metric:
    """The same metric of answers of up to `max_new_tokens` tokens, under the same name.

    Raises ValueError for a metric that does not read answers, or fewer than one token.

    >>> generating(exact_match, max_new_tokens=64).max_new_tokens
    64
    """
    what = what_reads(metric_of("metric", metric))
    if what != "answers":
        raise InvalidValueError(f"metric {metric_name(metric)} reads {what}, so nothing is generated for it")
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, least=1)

    @functools.wraps(metric)
    def longer(texts: Sequence[str], prompt: Prompt) -> Tensor:
        return metric(texts, prompt)

    return reads("answers", max_new_tokens=max_new_tokens)(longer)


# ---------------------------------------------------------------------- among candidates


@reads("answers")
def generated_accuracy(texts: Sequence[str], prompt: Prompt) -> Float[Tensor, " batch"]:
    """1 where the answer that `parse_answer` finds, among the candidates and the answer, is the answer; else 0.

    An example without candidates has its answer as the only option: then any text that names the answer counts.
    """
    return _scored(texts, prompt, lambda text, answer, options: _same(parse_answer(text, options), answer))


@reads("answers")
def generated_invalid(texts: Sequence[str], prompt: Prompt) -> Float[Tensor, " batch"]:
    """1 where `parse_answer` finds none of the candidates, nor the answer, or several; else 0.

    It tells a lost format from a lost retrieval: 1 - generated_accuracy - generated_invalid is the share of well-formed
    wrong answers. Raises ValueError where an example has no candidates.
    """
    for row, own in enumerate(_candidates(prompt)):
        if not own:
            raise InvalidValueError(
                f"generated_invalid: example {row} of the batch has no candidates, so no answer is ill-formed"
            )
    return _scored(texts, prompt, lambda text, answer, options: parse_answer(text, options) is None)


def parse_answer(text: str, options: Sequence[str]) -> str | None:
    """Which of the options the text gives as its answer; None where it names none, or several.

    1. A text that is one option and nothing else, but for white space and the signs .,:;!?()[]'"`* around it.
    2. Else the options named in it, as whole words; a number not as part of a larger one ("12" is not in "12.5",
       "1,120" or "-12"). Of two that overlap the longer is named ("dark red", not "red"). A single letter must have
       its own case, and A and I, which are words too, count only where no word follows.

    Case and runs of white space do not matter elsewhere, and the option comes back as it was given. What is said
    about an option is not read: "not red" names red. Scripts without spaces between words need no word boundary.

    >>> parse_answer("The letter is Dark red.", ["red", "dark red"])
    'dark red'
    >>> parse_answer("(B) because the bar is higher", ["A", "B"])
    'B'
    >>> parse_answer("red or blue", ["red", "blue"]) is None
    True
    """
    instance_of("text", text, str, "a text")
    by_plain: dict[str, str] = {}
    for option in texts_of("options", options, "a list of texts"):
        by_plain.setdefault(_plain(option), option)
    by_plain.pop("", None)
    alone = _plain(text).strip(_AROUND)
    for plain, option in by_plain.items():
        if alone == plain.strip(_AROUND) and alone:
            return option
    spaced = " ".join(unicodedata.normalize("NFC", text).split())
    spans = [
        (match.start(), match.end(), option)
        for option in by_plain.values()
        for match in _naming(option).finditer(spaced)
    ]
    named = {
        option
        for start, stop, option in spans
        if not any(
            first <= start and stop <= last and last - first > stop - start for first, last, _ in spans
        )
    }
    return named.pop() if len(named) == 1 else None


_AROUND = " .,:;!?()[]'\"`*"
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff"
"""Kana and Han: words stand side by side without a space."""
_SPACED = rf"[^\W{_UNSPACED}]"


def _naming(option: str) -> re.Pattern[str]:
    """What finds the option in a text, as `parse_answer` says."""
    words = unicodedata.normalize("NFC", option).split()
    pattern = r"\s".join(map(re.escape, words))
    first, last = words[0][0], words[-1][-1]
    before = rf"(?<!{_SPACED})" if re.match(_SPACED, first) else ""
    after = rf"(?!{_SPACED})" if re.match(_SPACED, last) else ""
    if first.isdigit():
        before += r"(?<![0-9][.,])(?<![-\u2212.])"
    if last.isdigit():
        after += r"(?![.,][0-9])"
    single = len(words) == 1 and len(option.strip()) == 1 and first.isalpha()
    if single and first in "AI":
        after += r"(?!\s\w)"
    return re.compile(before + pattern + after, 0 if single else re.IGNORECASE)


# ---------------------------------------------------------------------- the whole text


@reads("answers")
def exact_match(texts: Sequence[str], prompt: Prompt) -> Float[Tensor, " batch"]:
    """1 where the text is the answer, but for case, white space and a full stop at the end; else 0."""
    return _scored(texts, prompt, lambda text, answer, options: _same(text, answer))


@reads("answers")
def relaxed_accuracy(texts: Sequence[str], prompt: Prompt) -> Float[Tensor, " batch"]:
    """Relaxed accuracy: a number may be off by 5% of the answer, anything else must match (`exact_match`).

    Methani et al. 2020 (PlotQA, sec. 6); Masry et al. 2022 (ChartQA, sec. 5). Where text and answer both are
    numbers that `parse_number` accepts: 1 where |number - answer| <= .05 |answer|, in decimal arithmetic, and their
    units do not contradict each other: equal, or one of them has none. An answer of 0 takes 0 alone. Years are
    numbers too: 2015 is right for 2010, as in the papers.
    """
    return _scored(texts, prompt, lambda text, answer, options: relaxed_match(text, answer))


@reads("answers")
def anls(texts: Sequence[str], prompt: Prompt) -> Float[Tensor, " batch"]:
    """Normalized Levenshtein similarity of the text and the answer, 0 where it is below .5 (its mean: ANLS).

    Biten et al. 2019 (ST-VQA): s = 1 - edit distance / length of the longer text, in lower case and with runs of white
    space made one. Where s is exactly .5 it counts, as in the evaluation script of the benchmarks (DocVQA,
    InfographicVQA); the paper's formula gives 0 there.
    """
    return _scored(texts, prompt, lambda text, answer, options: similarity(text, answer))


@dataclass(frozen=True)
class Number:
    """A number read from a text, with its unit: a word, a currency sign, or none; a percentage is out of 1."""

    value: Decimal
    unit: str = ""


_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_NUMBER = re.compile(
    r"""(?P<sign>[-+\u2212]?)\s?(?P<currency>[$€£¥₹]?)\s?
    (?P<figures>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)
    (?P<exponent>e[-+]?[0-9]{1,3})?
    (?:\s?(?P<scale>thousand|million|billion|trillion)(?!\w))?
    (?:\s?(?P<percent>%|percent(?!\w))|\s?(?P<unit>[$€£¥₹]|(?:[^\W0-9_]|°)[^\s0-9_,;:!?()]*))?""",
    re.VERBOSE,
)


def parse_number(text: str) -> Number | None:
    """The number that the whole text is, or None.

    In this order, case and spaces between the parts aside: a sign (+, -, or the minus sign); a currency sign (one of
    $, €, £, ¥, ₹); figures, with a decimal point and with commas between thousands if at all; an exponent (e-3); a
    factor (thousand, million, billion, trillion); and %, "percent", a currency sign, or a unit of one word ("km",
    "km/h", "years"), which is not interpreted: "12 k" is 12 with the unit k.

    50% is .5, as in ChartQA's evaluation scripts, so that "50" is not right for "50%". Texts of more than that
    ("about 5", "12-15", "1/2", "12:30", "1,23", "A4", "the year 2010") are no numbers, nor are "nan" and "inf".

    >>> parse_number("$1,234.50"), parse_number("12 million km").value == 12_000_000
    (Number(value=Decimal('1234.50'), unit='$'), True)
    >>> parse_number("45%").value, parse_number("1,23")
    (Decimal('0.45'), None)
    """
    match = _NUMBER.fullmatch(_plain(text))
    if match is None:
        return None
    part = match.groupdict(default="")
    if part["currency"] and (part["percent"] or part["unit"]):
        return None
    value = Decimal(part["figures"].replace(",", "") + part["exponent"])
    shift = _SCALES.get(part["scale"], 0) - 2 * bool(part["percent"])
    value = value.scaleb(shift) * (-1 if part["sign"] in ("-", "\u2212") else 1)
    return Number(value, part["unit"] or part["currency"])


def relaxed_match(text: str, answer: str) -> bool:
    """Whether the text is right for the answer by `relaxed_accuracy`'s rule.

    >>> relaxed_match("1,045", "1000"), relaxed_match("1,051", "1000"), relaxed_match("5 km", "5 kg")
    (True, False, False)
    """
    given, right = parse_number(text), parse_number(answer)
    if given is None or right is None:
        return _same(text, answer)
    if given.unit and right.unit and given.unit != right.unit:
        return False
    return abs(given.value - right.value) <= TOLERANCE * abs(right.value)


def similarity(text: str, answer: str) -> float:
    """`anls` of one text and one answer.

    >>> similarity("Nov 1O, 1998", "nov 10, 1998"), similarity("october", "nov 10, 1998")
    (0.916..., 0.0)
    """
    given, right = (" ".join(part.lower().split()) for part in (text, answer))
    value = Levenshtein.normalized_similarity(given, right)
    return value if value >= THRESHOLD else 0.0


# ---------------------------------------------------------------------- plumbing


def _scored(
    texts: Sequence[str], prompt: Prompt, score: Callable[[str, str, tuple[str, ...]], float]
) -> Float[Tensor, " batch"]:
    """score(text, answer, the answer and all candidates) of every example."""
    candidates = _candidates(prompt)
    assert prompt.answers is not None
    texts = texts_of("texts", texts, "the text that was generated for each example")
    if len(texts) != len(prompt):
        raise InvalidValueError(
            f"texts holds {len(texts)} text(s); expected one for each of {len(prompt)} example(s)"
        )
    rows = zip(texts, prompt.answers, candidates, strict=True)
    return torch.tensor([float(score(text, answer, (answer, *own))) for text, answer, own in rows])


def _candidates(prompt: Prompt) -> list[tuple[str, ...]]:
    if prompt_of(prompt).answers is None or prompt.candidates is None:
        raise InvalidValueError("the prompt carries no answers: make it with model.prompt_examples(examples)")
    return prompt.candidates


def _plain(text: str) -> str:
    """Composed, case-folded, with single spaces, and without a full stop at the end (unless it is all there is)."""
    folded = " ".join(unicodedata.normalize("NFC", text.casefold()).split())
    return (
        folded[:-1].rstrip()
        if folded.endswith(".") and not folded.endswith("..") and folded != "."
        else folded
    )


def _same(text: str | None, answer: str) -> bool:
    return text is not None and _plain(text) == _plain(answer)
