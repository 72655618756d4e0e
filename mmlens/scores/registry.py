"""Every head score by name: what experiments compare, and where a new one is entered."""

from __future__ import annotations

from mmlens.scores.attention import GAZE_SCORE, NULL_CALIBRATED_RAM, QUERY_FOCUSED_SCORE, RAM_PER_TOKEN
from mmlens.scores.decoding import COPY_SCORE, VISUAL_HEAD_SCORE
from mmlens.scores.lift import RAM_LIFT
from mmlens.scores.logits import LOGIT_CONTRIBUTION
from mmlens.scores.retrieval import KEY_TOKEN_RATIO, RAM, VISION_MASS
from mmlens.scores.score import HeadScore
from mmlens.scores.spatial import LOCALIZATION_SCORE

SCORES: dict[str, HeadScore] = {
    "ram": RAM,
    "vision_mass": VISION_MASS,
    "key_token_ratio": KEY_TOKEN_RATIO,
    "ram_per_token": RAM_PER_TOKEN,
    "ram_lift": RAM_LIFT,
    "null_calibrated_ram": NULL_CALIBRATED_RAM,
    "query_focused_score": QUERY_FOCUSED_SCORE,
    "gaze_score": GAZE_SCORE,
    "visual_head_score": VISUAL_HEAD_SCORE,
    "localization_score": LOCALIZATION_SCORE,
    "logit_contribution": LOGIT_CONTRIBUTION,
    "copy_score": COPY_SCORE,
}
"""By the name of the function that takes its options: `mmlens.scores.ram` is `SCORES["ram"]`."""
