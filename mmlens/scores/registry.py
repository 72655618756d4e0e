"""Every head score by name: what experiments compare, and where a new one is entered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mmlens.arguments import shown, unknown_name_message
from mmlens.errors import UnknownNameError
from mmlens.head_scores import HeadScores
from mmlens.scores.attention import (
    FIVE_NULLS,
    gaze_score,
    null_calibrated_ram,
    query_focused_score,
    ram_per_token,
)
from mmlens.scores.decoding import copy_score, visual_head_score
from mmlens.scores.lift import ram_lift
from mmlens.scores.logits import logit_contribution
from mmlens.scores.retrieval import key_token_ratio, ram, vision_mass
from mmlens.scores.score import HeadScore
from mmlens.scores.spans import question_to_end
from mmlens.scores.spatial import localization_score


@dataclass(frozen=True)
class KnownScore:
    """A function of mmlens that scores heads, what a table calls it beside others, and where it comes from."""

    function: Callable[..., HeadScores]
    label: str
    source: str
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What the source does where our defaults differ, by name: options of the function."""

    def __call__(self, *args: Any, **options: Any) -> HeadScores:
        return self.function(*args, **options)

    def variant(self, name: str) -> Callable[..., HeadScores]:
        """The function with the options of a variant; options that are given with the call go before them.

        Raises UnknownNameError for a name that is in no `variants`.

        >>> import mmlens
        >>> score = SCORES["logit_contribution"]
        >>> dict(score.variants["published"])
        {'final_norm': 'none'}
        >>> model = mmlens.HookedVLM.from_pretrained("micro")
        >>> score.variant("published")(model, mmlens.scene_examples("objects", 2, seed=0), progress=False)
        HeadScores(logit contribution: 8 layers x 8 heads, 2 examples)
        """
        if not isinstance(name, str) or name not in self.variants:
            if not self.variants:
                raise UnknownNameError(
                    f"{self.label} has no variants ({shown(name)}): call it with its own options"
                )
            raise UnknownNameError(unknown_name_message(f"variant of {self.label}", name, self.variants))
        return partial(self.function, **self.variants[name])


_PAPER = "arXiv 2606.05843"
SCORES: dict[str, HeadScore | KnownScore] = {
    "ram": KnownScore(ram, "RAM", _PAPER),
    "vision_mass": KnownScore(vision_mass, "vision mass", f"{_PAPER}, the contrast"),
    "key_token_ratio": KnownScore(key_token_ratio, "key token ratio", _PAPER),
    "ram_per_token": KnownScore(ram_per_token, "RAM per token", "RAM / |V*|"),
    "ram_lift": KnownScore(ram_lift, "RAM lift", "RAM against fake regions"),
    "null_calibrated_ram": KnownScore(
        null_calibrated_ram,
        "null-calibrated",
        "arXiv 2605.27243",
        {"published": {"null_question": FIVE_NULLS, "choices": True, "marks": True}},
    ),
    "query_focused_score": KnownScore(
        query_focused_score,
        "query-focused",
        "arXiv 2506.09944",
        {"published": {"queries": question_to_end}},
    ),
    "gaze_score": KnownScore(gaze_score, "gaze", "arXiv 2606.14703"),
    "visual_head_score": KnownScore(visual_head_score, "visual head", "arXiv 2506.05344"),
    "localization_score": KnownScore(
        localization_score,
        "localization",
        "arXiv 2503.06287",
        {
            "june 2025": {"above": 1.0, "n_lowest": 5},
            "august 2025": {"above": 2.0, "n_lowest": 5, "first_layer": 2, "last_row": 0.05},
        },
    ),
    "logit_contribution": KnownScore(
        logit_contribution,
        "logit contribution",
        "arXiv 2607.01002",
        {"published": {"final_norm": "none"}},
    ),
    "copy_score": KnownScore(copy_score, "copy (text)", "arXiv 2404.15574"),
}
"""By the name of the function: `mmlens.scores.ram` is `SCORES["ram"].function`."""
