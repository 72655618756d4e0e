"""Choosing positions of a prompt: by name, by text, by turn, by image.

One function, in two forms: `prompt.positions(...)` gives the mask of a prompt at hand, `positions(...)` a function from
a prompt to its mask, for prompts that are not made yet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from mmlens.arguments import called, instance_of, known_keywords, unknown_name_message, whole_number
from mmlens.data.examples import Example
from mmlens.errors import InvalidValueError, OutOfRangeError
from mmlens.model.continuing import mask_after

if TYPE_CHECKING:
    from mmlens.model.prompt import Prompt

Mask = Bool[Tensor, "batch pos"]
AnyMask = Bool[Tensor, "batch _"]
"""Of the prompt in hand, or of the one before its answer."""
Positions = AnyMask | str | Callable[[Any], Mask] | None
"""Where an intervention acts: a mask of the prompt's positions, one of NAMED_POSITIONS, a function from a prompt
to a mask, or everywhere (generated tokens too). In every example of a batch it chooses a position; `if_any` lifts
that."""

NAMED_POSITIONS: dict[str, Callable[[Prompt], Mask]] = {
    "last": lambda prompt: prompt.last,
    "question": lambda prompt: prompt.token_map.is_question,
    "image": lambda prompt: prompt.token_map.is_image,
    "text": lambda prompt: _of_prompt(prompt) & ~prompt.token_map.is_image,
    "template": lambda prompt: prompt.token_map.is_template,
    "evidence": lambda prompt: prompt.token_map.evidence(_examples_of(prompt)),
    "video": lambda prompt: prompt.token_map.video >= 0,
    "answer": lambda prompt: prompt.token_map.is_answer,
    "prompt": lambda prompt: _of_prompt(prompt),
}
"""Position masks by name; the roles of a chat ("user") are names too. All but "answer" are of what stands before it."""


def _of_prompt(prompt: Prompt) -> Mask:
    return ~prompt.token_map.is_padding & ~prompt.token_map.is_answer


def _examples_of(prompt: Prompt) -> Sequence[Example]:
    if prompt.examples is None:
        raise InvalidValueError(
            "positions 'evidence': the prompt knows no evidence; make it of examples that do, "
            "model.prompt_examples(examples)"
        )
    return prompt.examples


@dataclass(frozen=True)
class IfAny:
    """Positions that an example of a batch need not have: see `if_any`."""

    positions: AnyMask | str | Callable[[Prompt], Mask]

    def __call__(self, prompt: Prompt) -> Mask:
        return _mask_of(prompt, self.positions)


def if_any(positions: Positions) -> IfAny:
    """The same positions, and examples that have none of them are left as they are.

    Without it such an example is an error, in a batch or alone: an edit that does nothing there would weaken the mean
    effect unseen. With it the example counts as one on which the intervention has no effect.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> prompt = model.prompt("What colour is K ?")
    >>> mmlens.ablate([(0, 1)], positions="image")(model, prompt)
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidValueError: positions ('image') chooses no position in example(s) 0 of 1: ...
    >>> edit = mmlens.ablate([(0, 1)], positions=if_any("image"))(model, prompt)[0][1]
    >>> int(edit.mask.sum())
    0
    """
    if positions is None:
        raise InvalidValueError(
            "if_any takes positions, and None is every position: no example is without any"
        )
    return positions if isinstance(positions, IfAny) else IfAny(positions)


def positions_mask(prompt: Prompt, positions: Positions, what: str = "positions") -> Mask | None:
    """The mask that `positions` means for this prompt; None for everywhere.

    Raises ValueError (with the name of the argument, `what`) for an unknown name, a mask of another shape or type, and
    one that chooses no position in an example of the batch, or padding alone, unless it is wrapped in `if_any`.
    """
    if positions is None:
        return None
    mask = _mask_of(prompt, positions)
    if not isinstance(positions, IfAny):
        named = f" ({positions!r})" if isinstance(positions, str) else ""
        padding = prompt.token_map.is_padding.to(mask.device)
        is_padding = bool(mask.any()) and not bool((mask & ~padding).any())
        check_each_example(
            prompt, mask, f"{what}{named} {'are padding alone' if is_padding else 'chooses no position'}"
        )
    return mask


def check_each_example(prompt: Prompt, mask: Mask, fault: str) -> None:
    """Raise ValueError where the mask chooses nothing but padding in an example, with the `fault` and the examples."""
    none = ~(mask & ~prompt.token_map.is_padding.to(mask.device)).any(-1)
    if not bool(none.any()):
        return
    rows = none.nonzero().flatten().tolist()
    shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
    raise InvalidValueError(
        f"{fault} in example(s) {shown} of {len(prompt)}: the edit would do nothing there, unseen. Leave these "
        "examples out, choose other positions, or say that they are to stay as they are: if_any(positions)"
    )


def _mask_of(prompt: Prompt, positions: AnyMask | str | Callable[[Prompt], Mask]) -> Mask:
    if isinstance(positions, str):
        roles = dict.fromkeys(role for own in prompt.token_map.roles for role in own)
        if positions not in NAMED_POSITIONS and positions not in roles:
            known = [*NAMED_POSITIONS, *roles]
            raise InvalidValueError(unknown_name_message("named positions", positions, known))
        named = NAMED_POSITIONS.get(positions)
        mask = prompt.token_map.role(positions) if named is None else named(prompt)
    else:
        if callable(positions):
            called("positions", positions, "a function of the prompt that gives a mask", n_arguments=1)
        mask = positions(prompt) if callable(positions) else positions
    shape = tuple(prompt.shape)
    before = prompt.continuation
    if before is not None and isinstance(mask, Tensor) and mask.shape == before.prompt.shape != shape:
        # A mask that was made for the prompt before its answer.
        mask = mask_after(prompt, mask)
    if not isinstance(mask, Tensor) or tuple(mask.shape) != shape or mask.dtype != torch.bool:
        given = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise InvalidValueError(f"positions is a boolean mask [batch, pos] = {shape}, got {given}")
    return mask


# ---------------------------------------------------------------------- by text, turn, image

_NARROWING = ("text", "occurrence", "role", "turn", "part", "image", "video", "frames", "box")


def positions(among: Positions = None, **narrowed: Any) -> Callable[[Prompt], Mask]:
    """Positions of a prompt that is not made yet: `positions(...)(prompt)` is `prompt.positions(...)`.

    It stands wherever functions take positions, queries or keys.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> prompt = model.prompt("What colour is the letter K ?")
    >>> knockout = mmlens.knockout("last", positions(text="letter K"))
    >>> len(knockout(model, prompt)) > 0
    True
    """
    known_keywords("positions", narrowed, _NARROWING)
    return lambda prompt: chosen_positions(prompt, among, **narrowed)


def chosen_positions(
    prompt: Prompt,
    among: Positions = None,
    *,
    text: str | Sequence[str] | None = None,
    occurrence: int | None = None,
    role: str | None = None,
    turn: int | None = None,
    part: int | None = None,
    image: int | None = None,
    video: int | None = None,
    frames: tuple[int, int] | None = None,
    box: Sequence[float] | None = None,
) -> Mask:
    """The positions of all that is said, together: a boolean mask [batch, pos]; see `Prompt.positions`."""
    token_map = prompt.token_map
    given = ~token_map.is_padding if among is None else _mask_of(prompt, among).to(token_map.device)
    mask = given.clone()
    if role is not None:
        mask = mask & token_map.role(role)
    if turn is not None:
        mask = mask & _of_turn(prompt, whole_number("turn", turn))
    if part is not None:
        mask = mask & (token_map.part == whole_number("part", part, least=0))
    if video is not None or frames is not None:
        if image is not None:
            raise InvalidValueError("positions are of an image or of a video, not of both at once")
        number = 0 if video is None else video
        for row in range(len(prompt)):
            own = token_map.video_tokens(number, frames=frames, box=box, example=row)
            mask[row] &= own[row]
    elif box is not None or image is not None:
        number = 0 if image is None else image
        for row in range(len(prompt)):
            whole = token_map.image_tokens(number, example=row)
            own = whole if box is None else token_map.box(number, box, example=row)
            mask[row] &= own[row]
    if text is not None:
        wanted = [text] * len(prompt) if isinstance(text, str) else list(text)
        if len(wanted) != len(prompt):
            raise InvalidValueError(f"{len(wanted)} texts for a batch of {len(prompt)} example(s)")
        rows = [_of_text(prompt, row, each, occurrence, mask[row]) for row, each in enumerate(wanted)]
        mask = torch.stack(rows)
    elif occurrence is not None:
        raise InvalidValueError("occurrence counts the places of a text; give the text too: text=...")
    return mask


def _of_turn(prompt: Prompt, turn: int) -> Mask:
    token_map = prompt.token_map
    if not token_map.roles:
        raise InvalidValueError(f"turn {turn}: the prompt knows no chat")
    rows = []
    for row, roles in enumerate(token_map.roles):
        if not -len(roles) <= turn < len(roles):
            raise OutOfRangeError(
                f"turn {turn} of example {row}: the chat has {len(roles)} turn(s) ({', '.join(roles)})"
            )
        rows.append(token_map.turn[row] == turn % len(roles))
    return torch.stack(rows)


def _of_text(
    prompt: Prompt, row: int, wanted: str, occurrence: int | None, among: Bool[Tensor, " pos"]
) -> Bool[Tensor, " pos"]:
    if prompt.offsets is None:
        raise InvalidValueError("the prompt does not know which characters its positions stand for")
    characters = prompt.offsets[row].to(among.device)
    said = prompt.text[row]
    found = [
        (start, stop, covered)
        for start, stop in occurrences(said, wanted)
        if bool((covered := among & covered_by(characters, start, stop)).any())
    ]
    where = f"the text {wanted!r} in example {row}"
    if not found:
        raise InvalidValueError(f"{where}: it is not there{_nearest_place(said, wanted)}")
    if occurrence is None and len(found) > 1:
        places = "; ".join(
            f"{at}: {_around(said, start, stop)}" for at, (start, stop, _) in enumerate(found[:6])
        )
        raise InvalidValueError(
            f"{where}: it stands there {len(found)} times ({places}{'; ...' if len(found) > 6 else ''}); say which, "
            "occurrence=0, or narrow it, as by role= or turn="
        )
    at = whole_number("occurrence", 0 if occurrence is None else occurrence)
    if not -len(found) <= at < len(found):
        raise OutOfRangeError(f"occurrence {at} of {where}: it stands there {len(found)} time(s)")
    return found[at][2]


def covered_by(characters: Any, start: int, stop: int) -> Any:
    """Which tokens, by their characters [pos, 2] (tensor or array), stand for any character from start to stop."""
    return (characters[:, 0] >= 0) & (characters[:, 0] < stop) & (characters[:, 1] > start)


def occurrences(text: str, wanted: str) -> list[tuple[int, int]]:
    """Where a text stands in another: characters (start, stop), overlapping ones too.

    >>> occurrences("a red, red car", "red")
    [(2, 5), (7, 10)]
    """
    instance_of("text", wanted, str, "a text")
    if not wanted.strip():
        raise InvalidValueError(f"text is {wanted!r}; expected one that is not empty")
    found, at = [], text.find(wanted)
    while at >= 0:
        found.append((at, at + len(wanted)))
        at = text.find(wanted, at + 1)
    return found


def _nearest_place(text: str, wanted: str) -> str:
    """Where a text stands if case and white space do not count, or the whole prompt, for errors."""
    loose = re.compile(r"\s+".join(map(re.escape, wanted.split())), re.IGNORECASE)
    match = loose.search(text)
    if match:
        return f", but {match.group()!r} is: {_around(text, *match.span())}"
    return f" in {text if len(text) <= 400 else text[:200] + ' ... ' + text[-200:]!r}"


def _around(text: str, start: int, stop: int) -> str:
    """A piece of a text with what stands around it."""
    before = ("..." if start > 20 else "") + text[max(0, start - 20) : start]
    after = text[stop : stop + 20] + ("..." if stop + 20 < len(text) else "")
    return repr(f"{before}[{text[start:stop]}]{after}")
