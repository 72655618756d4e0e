"""What a prompt can hold beside text and what token maps know: audio, and video where its layout is not known.

transformers names them by two conventions: the configuration has `video_token_id` (or `video_token_index`), the id
that stands at their positions, and the model has `get_video_features`, which takes their inputs; audio likewise.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

_MEDIA = ("video", "audio")
_TYPES = {"image": 1, "video": 2, "audio": 3}
"""What stands at their positions in transformers' mm_token_type_ids; at text 0."""


@dataclass(frozen=True)
class OtherMedia:
    """How to see that inputs hold media that no token map knows."""

    ids: Mapping[str, int] = field(default_factory=dict)
    """What names a token id -> the id that stands at the positions of a clip."""
    inputs: frozenset[str] = frozenset()
    """The model's inputs that bring clips."""
    types: frozenset[int] = frozenset({_TYPES["video"], _TYPES["audio"]})
    """Their types in mm_token_type_ids."""

    def held(self, inputs: Mapping[str, Any]) -> str | None:
        """What of video or audio the inputs hold, in words; None where they hold neither."""
        ids: Any = inputs.get("input_ids")
        for name, token_id in self.ids.items() if ids is not None else ():
            count = int((ids == token_id).sum())
            if count:
                return f"{count} position(s) of {name} = {token_id}"
        # GLM's videos stand at the id of its images, and are told apart by transformers' token types alone.
        types = inputs.get("mm_token_type_ids")
        count = 0 if types is None else sum(int((types == each).sum()) for each in self.types)
        if count:
            return f"{count} position(s) whose mm_token_type_ids say video or audio"
        brought = [name for name in sorted(self.inputs) if _brings(inputs.get(name))]
        return f"clips ({', '.join(brought)})" if brought else None


def other_media(model: PreTrainedModel, image_token: str, mapped: Collection[str] = ()) -> OtherMedia:
    """The video and audio of a model but what is `mapped`; `image_token` is the configuration's attribute with the id
    of its images."""
    ids: dict[str, int] = {}
    inputs: set[str] = set()
    unmapped = [medium for medium in _MEDIA if medium not in mapped]
    for medium in unmapped:
        # InstructBLIP-Video has frames for images.
        taken = _taken_by(model, f"get_{medium}_features")
        if taken is None or image_token.startswith(medium):
            continue
        inputs |= taken - (_taken_by(model, "get_image_features") or set())
        for name in (f"{medium}_token_id", f"{medium}_token_index"):
            token_id = getattr(model.config, name, None)
            if isinstance(token_id, int) and token_id != getattr(model.config, image_token or "", None):
                ids.setdefault(name, token_id)
    return OtherMedia(ids, frozenset(inputs), frozenset(_TYPES[medium] for medium in unmapped))


def video_token(config: Any) -> int | None:
    """The id at the positions of a model's videos, by its configuration; None where it names none."""
    found = [getattr(config, name, None) for name in ("video_token_id", "video_token_index")]
    return next((token_id for token_id in found if isinstance(token_id, int)), None)


def media_of(processor: ProcessorMixin, image_ids: Tensor, mapped: Collection[str] = ()) -> OtherMedia:
    """The video and audio that a processor knows, but what is `mapped`; `image_ids` are those of its images."""
    ids: dict[str, int] = {}
    unmapped = [medium for medium in _MEDIA if medium not in mapped]
    for medium in unmapped:
        token_id = getattr(processor, f"{medium}_token_id", None)
        token = getattr(processor, f"{medium}_token", None)
        if token_id is None and token is not None:
            token_id = processor.tokenizer.convert_tokens_to_ids(str(token))
        if isinstance(token_id, int) and not bool((image_ids == token_id).any()):
            ids[f"{medium}_token_id"] = token_id
    return OtherMedia(ids, types=frozenset(_TYPES[medium] for medium in unmapped))


def unmapped_message(held: str, purpose: str) -> str:
    """Why `purpose` is refused for inputs that hold `held`."""
    return (
        f"the inputs hold {held}, which no token map knows: {purpose} would take them for text. Give a video in a "
        "chat, model.prompt(messages), or as a list of frames, model.prompt(question, images=frames); a plain run, and "
        "hooks that run over all positions, take these inputs as they are"
    )


def _taken_by(model: PreTrainedModel, method: str) -> set[str] | None:
    """Names of the parameters of a model's method, and of its inner model's; None where neither has it."""
    found = [getattr(owner, method, None) for owner in (model, getattr(model, "model", None))]
    parameters = [inspect.signature(each).parameters.values() for each in found if callable(each)]
    names = {each.name for of_one in parameters for each in of_one if each.kind is each.POSITIONAL_OR_KEYWORD}
    return names if parameters else None


def _brings(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() > 0
    return isinstance(value, (list, tuple)) and len(value) > 0
