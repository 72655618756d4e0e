"""Which positions of a model's inputs are visual: those of token ids, or what an input of its own says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PretrainedConfig

from mmlens.errors import UnsupportedError
from mmlens.families.anatomy import Anatomy
from mmlens.families.media import unmapped_message, video_token
from mmlens.families.record import Family


class VisualPositions:
    """How the keyword inputs of one model say which of their positions are visual: of images, and of videos.

    Audio, and videos of a family whose layout of them is not known, are `held_beside` them: what needs the positions is
    then refused.
    """

    def __init__(self, family: Family, anatomy: Anatomy, config: PretrainedConfig) -> None:
        self._input, self._token = family.image_positions, anatomy.image_token
        self._config, self._has_videos = config, family.video_layout is not None
        self.held_beside = anatomy.other_media.held
        self.telling = ("input_ids", *filter(None, [self._input]))
        """The inputs that a mask is read from."""

    @property
    def exist(self) -> bool:
        """Whether the family's text has visual positions at all."""
        return bool(self._token or self._input)

    def are_told(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the inputs of a run say which positions are visual; embeddings alone do not."""
        return inputs.get(self.telling[-1]) is not None

    def check(self, inputs: Mapping[str, Any], purpose: str) -> None:
        """Raise UnsupportedError where the inputs hold what no token map knows."""
        held = self.held_beside(inputs)
        if held is not None:
            raise UnsupportedError(unmapped_message(held, purpose))

    def mask(self, inputs: Mapping[str, Any]) -> Bool[Tensor, "batch pos"] | None:
        """Which positions are visual; None where the family's text has none. Raises as `check`."""
        if not self.exist:
            return None
        self.check(inputs, "the mask of visual positions")
        if self._input:
            return inputs[self._input].bool()
        ids = inputs["input_ids"]
        return torch.isin(ids, torch.tensor(self.token_ids, device=ids.device))

    @property
    def token_ids(self) -> list[int]:
        """The ids that stand at visual positions."""
        found = [getattr(self._config, self._token or "", None)]
        if self._has_videos:
            found.append(video_token(self._config))
        return [token_id for token_id in found if token_id is not None]
