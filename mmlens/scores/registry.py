"""Every head score by name: what experiments compare, and where a new one is entered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mmlens.head_scores import HeadScores
from mmlens.scores.attention import gaze_score, null_calibrated_ram, query_focused_score, ram_per_token
from mmlens.scores.decoding import copy_score, visual_head_score
from mmlens.scores.lift import ram_lift
from mmlens.scores.logits import logit_contribution
from mmlens.scores.retrieval import key_token_ratio, ram, vision_mass
from mmlens.scores.score import HeadScore
from mmlens.scores.spatial import localization_score


@dataclass(frozen=True)
class KnownScore:
    """A function of mmlens that scores heads, what a table calls it beside others, and where it comes from."""

    function: Callable[..., HeadScores]
    label: str
    source: str

    def __call__(self, *args: Any, **options: Any) -> HeadScores:
        return self.function(*args, **options)


_PAPER = "arXiv 2606.05843"
SCORES: dict[str, HeadScore | KnownScore] = {
    "ram": KnownScore(ram, "RAM", _PAPER),
    "vision_mass": KnownScore(vision_mass, "vision mass", f"{_PAPER}, the contrast"),
    "key_token_ratio": KnownScore(key_token_ratio, "key token ratio", _PAPER),
    "ram_per_token": KnownScore(ram_per_token, "RAM per token", "RAM / |V*|"),
    "ram_lift": KnownScore(ram_lift, "RAM lift", "RAM against fake regions"),
    "null_calibrated_ram": KnownScore(null_calibrated_ram, "null-calibrated", "arXiv 2605.27243"),
    "query_focused_score": KnownScore(query_focused_score, "query-focused", "arXiv 2506.09944"),
    "gaze_score": KnownScore(gaze_score, "gaze", "arXiv 2606.14703"),
    "visual_head_score": KnownScore(visual_head_score, "visual head", "arXiv 2506.05344"),
    "localization_score": KnownScore(localization_score, "localization", "arXiv 2503.06287"),
    "logit_contribution": KnownScore(logit_contribution, "logit contribution", "arXiv 2607.01002"),
    "copy_score": KnownScore(copy_score, "copy (text)", "arXiv 2404.15574"),
}
"""By the name of the function: `mmlens.scores.ram` is `SCORES["ram"].function`."""
