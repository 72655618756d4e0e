"""Metrics of generated answers against tables worked by hand and slow references."""

from __future__ import annotations

import functools
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model, tiny_processor

from mmlens.data.examples import Example
from mmlens.metrics.answers import (
    anls,
    exact_match,
    generated_accuracy,
    generated_invalid,
    generating,
    parse_answer,
    parse_number,
    relaxed_accuracy,
    relaxed_match,
    similarity,
)
from mmlens.metrics.outcomes import accuracy, evaluate
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.prompt import Prompt

METRICS = (generated_accuracy, generated_invalid, exact_match, relaxed_accuracy, anls)


@functools.cache
def model() -> HookedVLM:
    return HookedVLM(tiny_model("llava"), tiny_processor("llava"))


def prompt_of(*answers: tuple[str, tuple[str, ...]]) -> Prompt:
    return model().prompt_examples(
        [Example("What is it?", answer, candidates=candidates) for answer, candidates in answers]
    )


# ---------------------------------------------------------------------- among candidates

COLOURS = ("red", "dark red", "blue")


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("red", COLOURS, "red"),
        ("  Red.\n", COLOURS, "red"),
        ("**red**", COLOURS, "red"),
        ("The letter K is RED, I think.", COLOURS, "red"),
        ("It is dark\n red", COLOURS, "dark red"),
        ("dark red, not red", COLOURS, None),
        ("red or blue", COLOURS, None),
        ("reddish", COLOURS, None),
        ("bored", COLOURS, None),
        ("", COLOURS, None),
        ("...", COLOURS, None),
        ("green", COLOURS, None),
        ("red red red", COLOURS, "red"),
        # Numbers are not found inside others.
        ("12", ("12", "1"), "12"),
        ("There are 12 of them.", ("12", "2", "1"), "12"),
        ("12.5", ("12", "5"), None),
        ("1,120", ("120", "1"), None),
        ("-12", ("12",), None),
        ("\u221212 degrees", ("12", "-12"), None),
        ("-12 degrees", ("12", "-12"), "-12"),
        ("Page 7.", ("7",), "7"),
        ("50%", ("50%", "50"), "50%"),
        # Letters of choices.
        ("B", ("A", "B"), "B"),
        ("b", ("A", "B"), "B"),
        ("(B) A house", ("A", "B"), "B"),
        ("A: red", ("A", "B"), "A"),
        ("Answer: A", ("A", "B"), "A"),
        ("A dog stands there", ("A", "B"), None),
        ("A dog, so B", ("A", "B"), "B"),
        ("I think C.", ("I", "C"), "C"),
        ("the plan b house", ("A", "B"), None),
        # Options with signs, spaces and other scripts.
        ("It is C#, surely", ("C", "C#"), "C#"),
        ("the  New   York office", ("new york", "york"), "new york"),
        ("字母是红色的", ("红色", "蓝色"), "红色"),
        ("CAFE\u0301", ("caf\u00e9", "tea"), "caf\u00e9"),
        ("Red", ("Red", "red"), "Red"),
        ("either", ("", " "), None),
    ],
)
def test_parsing_among_options(text: str, options: tuple[str, ...], expected: str | None) -> None:
    assert parse_answer(text, options) == expected


WORDS = ("alpha", "beta", "gamma", "delta epsilon", "12", "3.5", "x-ray", "Ω")


@settings(deadline=None)
@given(
    st.sampled_from(WORDS),
    st.sampled_from(["{}", "It is {}.", "the answer: {}!", "{}, surely", "say '{}' aloud", "**{}**"]),
    st.sampled_from([str, str.upper, str.title]),
)
def test_one_option_in_a_sentence_is_found_and_two_are_not(word: str, sentence: str, case: object) -> None:
    text = sentence.format(case(word))  # type: ignore[operator]
    # A single letter keeps its own case.
    assert parse_answer(text, WORDS) == word
    other = WORDS[(WORDS.index(word) + 1) % len(WORDS)]
    assert parse_answer(f"{text} {other}", WORDS) is None
    assert parse_answer(f"q{word}q", [w for w in WORDS if w != word]) is None


def test_right_wrong_and_invalid_answers() -> None:
    prompt = prompt_of(*[("red", COLOURS)] * 4)
    texts = ["Red.", "It is blue", "red, or blue", "I cannot see it"]
    assert generated_accuracy(texts, prompt).tolist() == [1, 0, 0, 0]
    assert generated_invalid(texts, prompt).tolist() == [0, 0, 1, 1]


def test_examples_without_candidates() -> None:
    prompt = prompt_of(("red", COLOURS), ("Paris", ()))
    assert generated_accuracy(["blue", "It is in Paris, France"], prompt).tolist() == [0, 1]
    with pytest.raises(ValueError, match="example 1 of the batch has no candidates"):
        generated_invalid(["blue", "Paris"], prompt)


# ---------------------------------------------------------------------- the whole text


def test_exact_match() -> None:
    rows = [
        ("New York", "new  york.", 1),
        ("New York", "New York City", 0),
        ("3.5", "3.5.", 1),
        ("3.5", "35", 0),
        ("caf\u00e9", "CAFE\u0301", 1),
        ("...", "...", 1),
        ("a", "", 0),
    ]
    prompt = prompt_of(*[(answer, ()) for answer, _, _ in rows])
    assert exact_match([text for _, text, _ in rows], prompt).tolist() == [right for _, _, right in rows]


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("12", "12", ""),
        (" -3.5. ", "-3.5", ""),
        ("\u22123.5", "-3.5", ""),
        ("+7", "7", ""),
        (".5", "0.5", ""),
        ("5.", "5", ""),
        ("1,234", "1234", ""),
        ("12,345,678.90", "12345678.9", ""),
        ("1234", "1234", ""),
        ("1e3", "1000", ""),
        ("2.5E-3", "0.0025", ""),
        ("45%", "0.45", ""),
        ("45 %", "0.45", ""),
        ("45 percent", "0.45", ""),
        ("-0.5%", "-0.005", ""),
        ("$1,234.50", "1234.5", "$"),
        ("-$5", "-5", "$"),
        ("5 €", "5", "€"),
        ("12 million", "12000000", ""),
        ("$1.2 billion", "1200000000", "$"),
        ("3 Thousand people", "3000", "people"),
        ("12 km", "12", "km"),
        ("12km/h", "12", "km/h"),
        ("20 °C", "20", "°c"),
        ("4 m²", "4", "m²"),
        ("12 k", "12", "k"),
        ("5 thousandths", "5", "thousandths"),
        ("2010s", "2010", "s"),
        ("5e", "5", "e"),
        ("0012", "12", ""),
    ],
)
def test_texts_that_are_numbers(text: str, value: str, unit: str) -> None:
    number = parse_number(text)
    assert number is not None
    assert (number.value, number.unit) == (Decimal(value), unit)


@pytest.mark.parametrize(
    "text",
    ["", ".", "-", "about 5", "12-15", "1/2", "12:30", "1,23", "1,2345", "12,34,567", "1.2.3", "A4", "nan", "inf",
     "1_000", "the year 2010", "5 is wrong", "$5 km", "$5%", "5 % off", "3 x 4", "10^3", "1 234", "٣", "--5", "%"],
)  # fmt: skip
def test_texts_that_are_no_numbers(text: str) -> None:
    assert parse_number(text) is None


@settings(deadline=None)
@given(
    st.decimals(min_value=-(10**9), max_value=10**9, places=3),
    st.booleans(),
    st.sampled_from(["", " ", "  "]),
    st.sampled_from([("", 1, ""), ("%", Fraction(1, 100), ""), ("million", 10**6, ""), ("kg", 1, "kg")]),
)
def test_written_numbers_are_read_back(
    value: Decimal, commas: bool, space: str, unit: tuple[str, int | Fraction, str]
) -> None:
    text = f"{value:,f}" if commas else f"{value:f}"
    number = parse_number(text + space + unit[0])
    assert number is not None
    assert Fraction(number.value) == Fraction(value) * unit[1]
    assert number.unit == unit[2]


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("105", "100", True),
        ("95", "100", True),
        ("105.1", "100", False),
        ("94.9", "100", False),
        ("1.05", "1", True),
        ("100", "105", True),
        ("-100", "100", False),
        ("-98", "-100", True),
        ("0", "0", True),
        ("0.0", "0", True),
        ("0.01", "0", False),
        ("1,030", "1000", True),
        ("47%", "45%", True),
        ("0.46", "45%", True),
        ("45", "45%", False),
        ("$1,200", "1200", True),
        ("$1,200", "€1,200", False),
        ("12 km", "12", True),
        ("12", "12 km", True),
        ("12 km", "12 kg", False),
        ("12 million", "12,100,000", True),
        ("12 million", "12", False),
        ("2015", "2010", True),
        ("Yes.", "yes", True),
        ("Yes, it is", "yes", False),
        ("five", "5", False),
        ("5", "five", False),
        ("12-15", "12-15", True),
        ("12:30", "12:31", False),
        ("", "5", False),
    ],
)
def test_relaxed_matches(text: str, answer: str, right: bool) -> None:
    assert relaxed_match(text, answer) == right
    assert relaxed_accuracy([text], prompt_of((answer, ()))).tolist() == [float(right)]


@settings(deadline=None)
@given(st.integers(-3000, 3000), st.integers(-3000, 3000))
def test_the_tolerance_is_exact_and_relative_to_the_answer(text: int, answer: int) -> None:
    expected = abs(Fraction(text) - answer) <= Fraction(5, 100) * abs(answer)
    assert relaxed_match(str(text), str(answer)) == expected
    assert relaxed_match(f"{text / 100:.2f}", f"{answer / 100:.2f}") == expected


def test_anls_of_a_table() -> None:
    rows = [
        ("nov 10, 1998", "Nov 10,  1998", 1.0),
        ("nov 10, 1998", "Nov 1O, 1998", 11 / 12),
        ("university", "universty", 0.9),
        ("coca cola", "cola", 0.0),
        ("abcd", "abXY", 0.5),
        ("abc", "aXY", 0.0),
        ("itc", "itc.", 0.75),
        ("red", "", 0.0),
    ]
    prompt = prompt_of(*[(answer, ()) for answer, _, _ in rows])
    assert anls([text for _, text, _ in rows], prompt).tolist() == pytest.approx(
        [score for *_, score in rows]
    )
    assert similarity("", "") == 1.0


@functools.cache
def slow_distance(one: str, other: str) -> int:
    if not one or not other:
        return len(one) + len(other)
    return min(
        slow_distance(one[1:], other) + 1,
        slow_distance(one, other[1:]) + 1,
        slow_distance(one[1:], other[1:]) + (one[0] != other[0]),
    )


@settings(deadline=None)
@given(st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_similarity_equals_its_recursive_definition(one: str, other: str) -> None:
    expected = 1 - slow_distance(one, other) / max(len(one), len(other), 1)
    assert similarity(one, other) == (expected if expected >= 0.5 else 0.0)


# ---------------------------------------------------------------------- as metrics


def test_every_metric_reads_answers_and_gives_one_number_per_example() -> None:
    prompt = prompt_of(("red", COLOURS), ("blue", COLOURS))
    for metric in METRICS:
        assert (metric.reads, metric.max_new_tokens) == ("answers", 16)
        longer = generating(metric, max_new_tokens=64)
        assert (longer.reads, longer.max_new_tokens, longer.__name__) == ("answers", 64, metric.__name__)
        assert metric.max_new_tokens == 16
        for either in (metric, longer):
            assert evaluate(either, "m", prompt, answers=["red", "red"]).shape == (2,)


def test_what_a_metric_of_answers_needs() -> None:
    plain = model().prompt("What is it?")
    for metric in METRICS:
        with pytest.raises(ValueError, match="carries no answers"):
            evaluate(metric, "m", plain, answers=["red"])
    with pytest.raises(ValueError, match="accuracy reads logits, so nothing is generated"):
        generating(accuracy, max_new_tokens=3)
    with pytest.raises(ValueError, match="max_new_tokens is 0; expected a whole number of at least 1"):
        generating(exact_match, max_new_tokens=0)
