"""How experiments judge answers: by their first token, whole, or as they are generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmlens.data.examples import Example
from mmlens.errors import InvalidValueError
from mmlens.metrics.answers import generated_accuracy, generated_invalid
from mmlens.metrics.outcomes import (
    DEFAULT_MAX_NEW_TOKENS,
    Metric,
    accuracy,
    answer_log_probability,
    invalid,
    logit_difference,
    metric_name,
)
from mmlens.metrics.whole_answers import (
    candidate_log_probability_difference,
    multiple_choice,
    whole_answer_log_probability,
)

FIRST_TOKEN = "first token"


@dataclass(frozen=True)
class Judge:
    """The metrics of one way to judge answers.

    `right` is 1 for a right answer, `invalid` 1 for what is no candidate (None: there is no such answer);
    `difference` sets the answer against its wrong candidates, `log_probability` is of the answer alone. `caption` says
    what the share of right answers is of, and `told` how answers were judged, wherever findings are told ("" for the
    first token, which experiments judge by unless they are asked otherwise).
    """

    right: Metric
    invalid: Metric | None
    difference: Metric
    log_probability: Metric
    caption: str
    told: str

    def shares(self, examples: Sequence[Example]) -> dict[str, Metric]:
        """Metrics that are shares of examples: accuracy and, where all have a wrong candidate, invalid answers."""
        found = {"accuracy": self.right}
        if self.invalid is not None and all(len(set(example.candidates)) > 1 for example in examples):
            found["invalid"] = self.invalid
        return found

    def graded(self, examples: Sequence[Example]) -> tuple[str, Metric]:
        """`difference` where every example has a wrong candidate, else `log_probability`, by the metric's own name."""
        has_wrong = all(set(example.candidates) - {example.answer} for example in examples)
        metric = self.difference if has_wrong else self.log_probability
        return metric_name(metric), metric

    def graded_and_accuracy(self, examples: Sequence[Example]) -> tuple[str, dict[str, Metric]]:
        """The name of `graded`, and both metrics that costs are told in, it and accuracy."""
        name, metric = self.graded(examples)
        return name, {name: metric, "accuracy": self.right}


JUDGES: dict[str, Judge] = {
    FIRST_TOKEN: Judge(
        accuracy,
        invalid,
        logit_difference,
        answer_log_probability,
        "whose first answer token is right",
        "",
    ),
    "whole": Judge(
        multiple_choice,
        None,
        candidate_log_probability_difference,
        whole_answer_log_probability,
        "whose whole answer is the most probable of its candidates",
        "Answers were judged whole: right where the answer, all its tokens together, is more probable than every other "
        "candidate, so that no answer is invalid",
    ),
    "generated": Judge(
        generated_accuracy,
        generated_invalid,
        candidate_log_probability_difference,
        whole_answer_log_probability,
        "whose generated text names the answer",
        f"Answers were judged as generated: right where the text decoded greedily after the prompt (at most "
        f"{DEFAULT_MAX_NEW_TOKENS} tokens) names the answer and no other candidate; graded costs are of log "
        "probabilities of whole answers",
    ),
}
"""The choices of `answers`."""


def check_candidates(answers: str, name: str, examples: Sequence[Example]) -> None:
    """Raise ValueError where answers are judged whole and an example lacks its answer or another among candidates."""
    if answers != "whole":
        return
    lacking = [e for e in examples if e.answer not in e.candidates or len(set(e.candidates)) < 2]
    if lacking:
        raise InvalidValueError(
            f"answers='whole' judges an answer among its candidates, and {len(lacking)} of {len(examples)} examples of "
            f"the {name} split do not have their answer and another as candidates (the first: {lacking[0].id!r}): give "
            "them as Example(..., candidates=(...)), or judge answers as 'generated' or by the 'first token'"
        )
