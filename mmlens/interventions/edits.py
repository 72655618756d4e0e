"""An edit: the hook function every intervention is made of.

It changes an activation at chosen positions and heads of a prompt, whichever of them the run under way computes
(the whole prompt, its end, a generated token), and remembers how often it fired and how much it changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from mmlens.arguments import called, shown
from mmlens.errors import InvalidTypeError, InvalidValueError, OutOfRangeError
from mmlens.hook_names import axes_of, head_axis, position_axis, runs_over_positions
from mmlens.model.checked_hooks import CountedHook
from mmlens.model.choosing import IfAny, Positions, check_each_example, positions_mask
from mmlens.model.hooked_vlm import HookedVLM, model_of
from mmlens.model.hooks import Hook, Intervention, hooks_in
from mmlens.model.prompt import Prompt, prompt_of
from mmlens.model.run_state import Span


def intervention_of(value: object, name: str = "intervention") -> Intervention:
    """An intervention; InvalidTypeError for anything else.

    >>> intervention_of([("hook_embed", print)])
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidTypeError: intervention is [(...; expected a function (model, prompt) -> hooks, such as ...
    """
    expected = "a function (model, prompt) -> hooks, such as mmlens.ablate(...) makes"
    if isinstance(value, (list, tuple)):
        raise InvalidTypeError(
            f"{name} is {shown(value)}; expected {expected}: hooks of your own are one as "
            "`lambda model, prompt: hooks`, several interventions as mmlens.compose(*interventions)"
        )
    if isinstance(value, (torch.nn.Module, Prompt)):
        raise InvalidTypeError(f"{name} is {shown(value)}; expected {expected}")
    return called(name, value, expected, n_arguments=2)


def hooks_of(intervention: Intervention, model: HookedVLM, prompt: Prompt) -> list[Hook]:
    """The hooks of an intervention for a prompt; InvalidTypeError where it gives something else."""
    return hooks_in("what the intervention gave", intervention(model, prompt))


def check_call(model: object, prompt: object) -> None:
    """Raise InvalidTypeError where an intervention is called on something else than a HookedVLM and a Prompt."""
    model_of(model)
    prompt_of(prompt)


@dataclass(frozen=True)
class EditContext:
    """What part of a prompt the activation in hand covers: `span` positions, of which some may be generated."""

    prompt: Prompt
    span: Span
    model: HookedVLM | None = None
    """The model that runs, where it is to be checked that it runs this prompt."""

    def of_prompt(self, values: Tensor, generated: Tensor | float | bool) -> Tensor:
        """Values [batch, pos, ...] of the prompt, at the positions in hand; `generated` at those after it.

        `generated` is one value, or a tensor [batch, 1, ...]. Raises ValueError where another prompt is being run.
        """
        self.check_run()
        first, stop = self.span.first, self.span.first + self.span.length
        known = values[:, first:stop]
        n_more = self.span.length - known.shape[1]
        if n_more:
            after = torch.as_tensor(generated, dtype=values.dtype, device=values.device)
            shape = (len(values), n_more, *values.shape[2:])
            known = torch.cat([known, after.expand(shape)], dim=1)
        return self.of_rows(known)

    def of_rows(self, values: Tensor) -> Tensor:
        """Values [batch, ...] of the prompt's rows, for the rows in hand: beams and several samples repeat each."""
        copies = 1 if self.model is None else self.model.run_state.copies(self.prompt)
        return values if copies == 1 else values.repeat_interleave(copies, 0)

    def check_run(self) -> None:
        """Raise ValueError where another prompt is being run: other tokens, or other images."""
        if self.model is not None:
            self.model.run_state.check(self.prompt)

    @property
    def is_image(self) -> Bool[Tensor, "batch span"]:
        return self.of_prompt(self.prompt.token_map.is_image, False)


Change = Callable[[Tensor, EditContext], Tensor]
"""(the activation at the chosen heads, what it covers) -> what stands in its place; the edit keeps it at the chosen
positions only."""


class Edit(CountedHook):
    """A TransformerLens hook function that changes one hook point's activation for one prompt.

    `fired` counts its calls, `size` is the largest absolute change that it made so far. Heads index the hook
    point's own head axis (key-value heads for k and v). A partial or a cached run computes some of the prompt's
    positions; the edit then acts on those of its positions that are there.
    """

    edits_in_place = False
    """It gives a new tensor, and leaves the one it is handed."""

    def __init__(
        self,
        model: HookedVLM,
        prompt: Prompt,
        name: str,
        change: Change,
        *,
        positions: Positions = None,
        heads: Sequence[int] | None = None,
        generated: bool | None = None,
    ) -> None:
        """`generated`: whether it acts on generated tokens; by default where no positions are chosen.

        Raises UnknownHookError for a name that the model does not have, ValueError for positions or heads on a
        hook point whose activation has no such axis, IndexError for a head that there is not.
        """
        model.hook_names(name)
        self.model, self.prompt, self.name, self.change = model, prompt, name, change
        self.axes = axes_of(name)
        self.is_language = runs_over_positions(name)
        self.mask = positions_mask(prompt, positions)
        self.generated = self.mask is None if generated is None else generated
        if self.mask is not None and self.generated:
            # In a continued prompt they are positions.
            self.mask = self.mask | prompt.token_map.is_answer.to(self.mask.device)
        if not self.is_language and not (self.mask is None and self.generated):
            raise InvalidValueError(
                f"{name} does not run over the prompt's positions, so positions cannot be chosen there; edit "
                "image.hook_embed (the same embeddings as they enter the language model) at image positions"
            )
        if self.axes[0] == "image_token" and self.mask is not None and not isinstance(positions, IfAny):
            is_image = model.image_mask(prompt)
            visual = (
                torch.zeros_like(self.mask) if is_image is None else self.mask & is_image.to(self.mask.device)
            )
            check_each_example(
                prompt,
                visual,
                f"{name} has rows of visual positions alone, and positions chooses none of these",
            )
        self.heads = None if heads is None else list(heads)
        if heads is not None and head_axis(name) is None:
            raise InvalidValueError(f"{name} is [{', '.join(self.axes)}]: it has no heads to choose")
        self._sizes: list[Tensor] = []

    @property
    def size(self) -> float:
        """The largest absolute change of one element so far."""
        return max(map(float, self._sizes), default=0.0)

    @property
    def first_position(self) -> int:
        """The first position that it can change, over the batch."""
        if not self.is_language or self.mask is None:
            return 0
        return int(self.mask.any(0).int().argmax()) if bool(self.mask.any()) else self.mask.shape[1]

    def __repr__(self) -> str:
        heads = "" if self.heads is None else f", heads {self.heads}"
        where = "" if self.mask is None else f", {int(self.mask.sum())} positions"
        return f"Edit({self.name}{heads}{where}: fired {self.fired} times, size {self.size:.3g})"

    def act(self, x: Tensor, hook: Any) -> Tensor:
        here = EditContext(self.prompt, self._span(x), self.model)
        of_heads = head_axis(self.name) or 0
        chosen, index = x, None
        if self.heads is not None:
            n_heads = x.shape[of_heads]
            if min(self.heads) < 0 or max(self.heads) >= n_heads:
                raise OutOfRangeError(f"heads {self.heads} of {self.name}: it has heads 0 to {n_heads - 1}")
            index = torch.tensor(self.heads, device=x.device)
            chosen = x.index_select(of_heads, index)
        # The change may work in place; what was there is still needed.
        edited = self.change(chosen.clone(), here)
        if edited.shape[1:] != chosen.shape[1:] or len(edited) not in (1, len(chosen)):
            raise InvalidValueError(
                f"the edit of {self.name} gives {list(edited.shape)} for an activation {list(chosen.shape)}: it keeps "
                "the shape, but for a batch of one that stands for all rows"
            )
        edited = edited.to(x.dtype)
        where = self._where(x, here)
        if where is not None:
            edited = torch.where(where, edited, chosen)
        if edited.numel():
            change = (edited.detach().float() - chosen.detach().float()).abs()
            # Masked scores are infinite on some paths: what stays masked did not change.
            self._sizes.append(change.nan_to_num(0.0).max())
        return (
            edited.expand_as(x) if index is None else x.index_copy(of_heads, index, edited.expand_as(chosen))
        )

    def _span(self, x: Tensor) -> Span:
        span = self.model.run_state.span
        if "key" in self.axes and "query" not in self.axes:
            # Keys reach back to the prompt's start, or as far as a sliding window's cache does.
            n_keys = x.shape[self.axes.index("key")]
            return Span(span.first + span.length - n_keys, n_keys)
        return span

    def _where(self, x: Tensor, here: EditContext) -> Tensor | None:
        if not self.is_language or (self.mask is None and self.generated):
            return None
        mask = torch.ones(tuple(self.prompt.shape), dtype=torch.bool) if self.mask is None else self.mask
        where = here.of_prompt(mask, self.generated).to(x.device)
        if self.axes[0] == "image_token":
            is_image = self.model.image_mask(self.prompt)
            assert is_image is not None
            rows = where[here.of_prompt(is_image, False).to(x.device)]
            return rows.reshape(-1, *[1] * (x.ndim - 1))
        axis = position_axis(self.name)
        if x.shape[axis] != where.shape[1]:
            raise InvalidValueError(
                f"{self.name} covers {x.shape[axis]} places in a run of {where.shape[1]} positions: it is not over the "
                "prompt's positions here (keys and values of cross-attention are not), so positions cannot be chosen"
            )
        shape = [1] * x.ndim
        shape[0], shape[axis] = where.shape
        return where.reshape(shape)
