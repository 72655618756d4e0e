"""Composing interventions is concatenating their hooks."""

from __future__ import annotations

from mmlens.hooked_vlm import Hook, HookedVLM, Intervention
from mmlens.prompt import Prompt


def compose(*interventions: Intervention) -> Intervention:
    """All of them at once; on a hook point that several touch, they act in the order given.

    Each is built on the clean model: what one computes for itself (a resampled activation) does not see the
    others' edits.
    """
    if not interventions:
        raise ValueError("compose needs at least one intervention")

    def intervention(model: HookedVLM, prompt: Prompt) -> list[Hook]:
        return [hook for part in interventions for hook in part(model, prompt)]

    return intervention
