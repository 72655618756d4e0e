"""A prompt and what follows it: answers, generated or given, as positions of their own.

`continued` puts tokens after each row. What the model is given beside tokens (masks, types, which images a position
reads) goes on as it stood at the row's last position; the rest belongs to images and stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmlens.arguments import listed, whole_numbers
from mmlens.errors import InvalidValueError, PromptError
from mmlens.token_map import NO_PATCH, TokenMap

if TYPE_CHECKING:
    from mmlens.model.prompt import Prompt

COUNTED_POSITIONS = "position_ids"


def continued(prompt: Prompt, ids: Sequence[Sequence[int]]) -> Prompt:
    """The prompt with these tokens after each row, one list per row, of whatever lengths, and padding on the left.

    The token map says `is_answer` at them; `Prompt.last` stays the position before the first of them. A prompt that
    goes on already goes on further. Answers, candidates and encoded images are the prompt's own.

    Raises PromptError for a prompt that is padded on the right, inputs with position_ids of their own, and rows that
    need padding where the padding's token is not known; ValueError where the number of lists is not the batch's, or all
    are empty.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> prompt = model.prompt(["What colour is K ?", "What colour is Q ?"])
    >>> longer = continued(prompt, [[7], [7, 8, 9]])
    >>> longer.token_map.is_answer.sum(1).tolist(), longer.token_map.is_padding.sum(1).tolist()
    ([1, 3], [2, 0])
    """
    rows = _checked(prompt, ids)
    moved = _Moved.of(prompt, rows)
    given = prompt.inputs
    if COUNTED_POSITIONS in given:
        raise PromptError(
            f"the prompt's inputs hold {COUNTED_POSITIONS}, which go on in a way of the model's own: leave them out, "
            "and the model counts positions itself"
        )
    padding, mask = ~moved.is_old & ~moved.is_new, given.get("attention_mask")
    tokens = moved.put(given["input_ids"], 0)
    is_new = moved.is_new.to(tokens.device)
    tokens[is_new] = torch.tensor([token for own in rows for token in own]).to(tokens)
    if bool(padding.any()):
        tokens[padding.to(tokens.device)] = _padding_token(prompt)
        mask = torch.ones_like(given["input_ids"]) if mask is None else mask
    inputs: dict[str, Any] = {**given, "input_ids": tokens}
    if mask is not None:
        inputs["attention_mask"] = moved.put(mask, 0)
    for name, value in given.items():
        if name not in ("input_ids", "attention_mask") and _is_of_positions(value, prompt.shape):
            inputs[name] = moved.put(value, 0)
            if name in prompt.values_after:
                inputs[name][is_new] = prompt.values_after[name]
    before = prompt.continuation
    whole = [*map(list.__add__, before.ids, rows)] if before is not None else rows
    offsets = None if prompt.offsets is None else moved.put(prompt.offsets, NO_PATCH)
    if offsets is not None:
        offsets[moved.is_new.to(offsets.device)] = NO_PATCH
    return dataclasses.replace(
        prompt,
        inputs=inputs,
        token_map=_map_of(prompt.token_map, moved),
        offsets=offsets,
        continuation=Continuation(prompt if before is None else before.prompt, whole),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Continuation:
    """What a continued prompt is made of: the prompt before the answer, and the tokens that follow each of its rows."""

    prompt: Prompt
    ids: list[list[int]]


def as_continued(other: Prompt, prompt: Prompt) -> Prompt:
    """`other` with the tokens after it that `prompt` has; as it is where either is none or both are continued."""
    if prompt.continuation is None or other.continuation is not None or len(other) != len(prompt):
        return other
    return continued(other, prompt.continuation.ids)


def mask_after(prompt: Prompt, mask: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch longer"]:
    """Positions of the prompt before its answer, where they stand in the continued one."""
    assert prompt.continuation is not None
    moved = _Moved.of(prompt.continuation.prompt, prompt.continuation.ids)
    return moved.put(mask, 0) & moved.is_old.to(mask.device)


@dataclasses.dataclass(frozen=True)
class _Moved:
    """Where the positions of a longer batch come from."""

    source: Int[Tensor, "batch longer"]
    """The position that stood there, or the row's last one."""
    is_old: Bool[Tensor, "batch longer"]
    is_new: Bool[Tensor, "batch longer"]

    @classmethod
    def of(cls, prompt: Prompt, rows: Sequence[Sequence[int]]) -> _Moved:
        device, (_, length) = prompt.token_map.device, prompt.shape
        n_new = torch.tensor([len(own) for own in rows], device=device)
        # BLIP-2's processor pads between image and text.
        n_before = prompt.token_map.is_padding.int().cumprod(1).sum(1)
        # All rows keep the padding that they had in common, so that going on twice is going on once by both.
        longer = length + int((n_new - n_before).max() + n_before.min())
        source = torch.arange(longer, device=device) - (longer - length - n_new)[:, None]
        is_new = source >= length
        return cls(source.clamp(0, length - 1), (source >= 0) & ~is_new, is_new)

    def put(self, values: Tensor, padding: float) -> Tensor:
        """Values [batch, pos, ...] at their new places, after the row's end its last ones."""
        source = self.source.to(values.device)
        put = values[torch.arange(len(source), device=values.device)[:, None], source]
        put[~(self.is_old | self.is_new).to(values.device)] = padding
        return put


def _checked(prompt: Prompt, ids: object) -> list[list[int]]:
    expected = "a list of token ids for each example"
    rows = [
        whole_numbers(f"ids[{at}]", row.tolist() if isinstance(row, Tensor) else row, least=0, at_least=0)
        for at, row in enumerate(listed("ids", ids, expected))
    ]
    if len(rows) != len(prompt):
        raise InvalidValueError(
            f"ids holds {len(rows)} list(s); expected one for each of {len(prompt)} example(s)"
        )
    if not any(rows):
        raise InvalidValueError("ids holds no token: there is nothing that follows the prompt")
    ends_padded = prompt.token_map.is_padding[:, -1].nonzero().flatten().tolist()
    if ends_padded:
        raise PromptError(
            f"example {ends_padded[0]} is padded on the right (its last position is padding), so nothing can follow "
            "it; pad on the left: tokenizer.padding_side = 'left'"
        )
    return rows


def _padding_token(prompt: Prompt) -> int:
    padded = prompt.inputs["input_ids"][prompt.token_map.is_padding.to(prompt.inputs["input_ids"].device)]
    if len(padded):
        return int(padded[0])
    if prompt.pad_id is None:
        raise PromptError(
            "rows of different lengths need padding, and the prompt does not know its tokenizer's token for it "
            "(Prompt.pad_id): set tokenizer.pad_token before the prompt is made, or give continuations of equal length"
        )
    return prompt.pad_id


def _is_of_positions(value: object, shape: tuple[int, ...]) -> bool:
    """Whether an input is over the prompt's positions. What is floating point is pixels."""
    return (
        isinstance(value, Tensor)
        and not value.is_floating_point()
        and value.ndim >= 2
        and tuple(value.shape[:2]) == tuple(shape)
    )


def _map_of(token_map: TokenMap, moved: _Moved) -> TokenMap:
    """The map at its new places; at padding and at the answer it knows nothing but that."""
    arrays: dict[str, Any] = {}
    for field in dataclasses.fields(token_map):
        values = getattr(token_map, field.name)
        if isinstance(values, Tensor):
            nothing = (
                torch.nan if values.is_floating_point() else 0 if values.dtype == torch.bool else NO_PATCH
            )
            arrays[field.name] = moved.put(values, nothing)
            arrays[field.name][moved.is_new] = nothing
    arrays["is_padding"] |= ~(moved.is_old | moved.is_new)
    arrays["is_answer"] |= moved.is_new
    return dataclasses.replace(token_map, **arrays)
