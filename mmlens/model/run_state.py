"""What run of a model is under way: of which prompt, over which positions, and in which rows of its batch."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from mmlens import internals
from mmlens.errors import InvalidValueError, UnsupportedError
from mmlens.families.media import unmapped_message
from mmlens.interrupts import Temporary
from mmlens.model.prompt import Prompt
from mmlens.model.visual import VisualPositions


class Span(NamedTuple):
    """A run of positions: `first`, and how many."""

    first: int
    length: int


class RunState:
    """The run under way. HookedVLM tells it when a forward pass begins, and hooks that fire ask it where they are.

    `n_forwards` counts the forward passes that have begun. `span` is which positions are computed: all of a prompt,
    its end, or, while decoding, the newest. `unmapped` says what the inputs hold that no token map knows.
    """

    def __init__(self, visual: VisualPositions) -> None:
        self._visual = visual
        self.n_forwards = 0
        self.span = Span(0, 0)
        self.unmapped: str | None = None
        self.prompt: Prompt | None = None
        """The prompt that `forward`, `generate` or `encode_images` is at work on, where it was given one."""
        self._checked: Prompt | None = None
        self._whole_inputs: Mapping[str, Tensor] = {}
        self._inputs: Mapping[str, Tensor] = {}
        """Of the inputs that tell what is visual, the rows and positions in hand."""
        self._pixels: dict[str, weakref.ref[Tensor]] = {}
        self._stacked = 1
        """How often a partial run has the batch."""

    # ------------------------------------------------------------------ told by the model

    def at_work_on(self, inputs: Any, encoding: Mapping[str, Any] | None = None) -> Temporary[None]:
        """Hooks that fire inside the block can ask whether the prompt is the one they were built for.

        `encoding`: the inputs, where the tower alone is run, which is no forward pass.
        """
        before = self.prompt

        def begin() -> None:
            self.prompt = inputs if isinstance(inputs, Prompt) else None
            self._checked = None
            if encoding is not None:
                self._whole_inputs = self._inputs = {"input_ids": encoding["input_ids"]}

        def end() -> None:
            self.prompt = before

        return Temporary(begin, end)

    def begin(self, given: Mapping[str, Any]) -> None:
        """A forward pass of the Hugging Face model begins on these keyword inputs."""
        self.n_forwards += 1
        self._checked = None
        # Until the decoder begins, nothing is known of its positions: not those of the run before.
        self.span, self._stacked = Span(0, 0), 1
        self.unmapped = self._visual.held_beside(given)
        # Image rows are found in the inputs of the run that is under way.
        self._whole_inputs = {
            name: given[name] for name in self._visual.telling if given.get(name) is not None
        }
        self._inputs = self._whole_inputs
        # They are alive as long as the run is.
        self._pixels = {
            name: weakref.ref(value)
            for name, value in given.items()
            if isinstance(value, Tensor) and value.is_floating_point() and name != "inputs_embeds"
        }

    def begin_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The decoder, `module`, begins on these arguments."""
        given = kwargs.get("inputs_embeds")
        if given is None:
            given = args[0] if args else kwargs.get("input_ids")
        self.span = Span(internals.cached_length(kwargs), 0 if given is None else given.shape[1])
        standing = next(map(len, self._whole_inputs.values()), 0)
        if given is None or not standing or len(given) == standing or len(given) % standing:
            return
        # Families that generate past their own forward leave the prompt's inputs standing; beams repeat their rows.
        self._inputs = self._whole_inputs = {
            name: value.repeat_interleave(len(given) // standing, 0)
            for name, value in self._whole_inputs.items()
        }

    def narrow(self, span: Span, copies: int = 1) -> None:
        """A partial run goes on with these positions alone, and with the batch `copies` times."""
        self.span, self._stacked = span, copies
        self._inputs = {
            name: value[:, span.first :].repeat(copies, 1) for name, value in self._whole_inputs.items()
        }

    def queries_from(self, first: int) -> Temporary[None]:
        """Inside the block hooks see the run's queries from the number `first` on."""
        whole = self.span

        def begin() -> None:
            self.span = Span(whole.first + first, whole.length - first)

        def end() -> None:
            self.span = whole

        return Temporary(begin, end)

    # ------------------------------------------------------------------ asked by hooks

    def n_rows(self) -> int | None:
        """How many rows the batch in hand has, where that is known."""
        ids = self._inputs.get("input_ids")
        return None if ids is None else len(ids)

    def image_mask(self) -> Bool[Tensor, "batch pos"] | None:
        """Which of the positions in hand are visual; None where there are none, or nothing says which."""
        known = self.unmapped is None and self._visual.are_told(self._inputs)
        return self._visual.mask(self._inputs) if known else None

    def image_rows_of(self, x: Tensor) -> Bool[Tensor, "batch pos"] | None:
        """Which positions of an activation [batch, pos, ...] are visual; None where none is.

        Raises UnsupportedError where the inputs hold what no token map knows, InvalidValueError where nothing says it.
        """
        if self.unmapped is not None:
            raise UnsupportedError(unmapped_message(self.unmapped, "image.* hooks and hook_deepstack"))
        if not self._visual.are_told(self._inputs):
            raise InvalidValueError("image.* hooks need input_ids: the model was run on inputs_embeds alone")
        mask = self.image_mask()
        if mask is None or not bool(mask.any()):
            return None
        # Families that generate past their own forward leave the prompt's inputs standing.
        return mask.to(x.device) if mask.shape[1] == x.shape[1] else None

    def answer_mask(self) -> Bool[Tensor, "batch pos"] | None:
        """Which of the positions in hand follow the prompt, as tokens of an answer do; None where none is known to."""
        if self.prompt is None:
            return None
        known, (first, length) = self.prompt.token_map.is_answer, self.span
        # What is beyond the prompt that was given has been generated.
        generated = known.new_ones(len(known), max(first + length - known.shape[1], 0))
        mask = torch.cat([known, generated], 1)[:, first : first + length]
        if not bool(mask.any()):
            return None
        return mask.repeat_interleave(self.copies(self.prompt), 0).repeat(self._stacked, 1)

    def copies(self, prompt: Prompt) -> int:
        """How often the run has each row of the prompt, copy by copy: beams and several samples repeat it."""
        n_running, n_rows = len(self._whole_inputs.get("input_ids", ())), prompt.shape[0]
        return n_running // n_rows if n_running and n_running % n_rows == 0 else 1

    def check(self, prompt: Prompt) -> None:
        """Raise ValueError where the run is of another prompt, in tokens or images; compared once a run."""
        if self._checked is prompt:
            return
        ids, own = self._whole_inputs.get("input_ids"), prompt.inputs.get("input_ids")
        if ids is not None and own is not None:
            stop = self.span.first + self.span.length
            goes_on = self.span.first > 0 and ids.shape[1] < stop
            # A run that goes on from a cache is given the rest of the prompt, or what was generated after it. The span
            # may be of its last queries alone.
            first = stop - ids.shape[1] if goes_on else 0
            if first < own.shape[1]:
                self._check_tokens(prompt, ids, own, first, goes_on)
            if not goes_on:
                self._check_images(prompt)
        self._checked = prompt

    def _check_tokens(self, prompt: Prompt, ids: Tensor, own: Tensor, first: int, goes_on: bool) -> None:
        rows = own[:, first:].repeat_interleave(self.copies(prompt), 0).to(ids)
        # Without a cache, generated tokens follow the prompt. From a cache, a part of the rest may be run.
        known = ids[:, : rows.shape[1]]
        is_same = torch.equal(known, rows[:, : known.shape[1]])
        if is_same and (known.shape[1] >= rows.shape[1] or goes_on):
            return
        way_out = ". This one is its beginning: run the prompt whole (without prefill_chunk_size)"
        raise InvalidValueError(
            f"an intervention built for a prompt of [batch, pos] = {list(own.shape)} is run on another one of "
            f"{list(ids.shape)}{f', after {first} positions in a cache' if first else ''}: interventions are "
            f"built for each prompt, intervention(model, prompt){way_out if is_same else ''}"
        )

    def _check_images(self, prompt: Prompt) -> None:
        other = self._other_images(prompt)
        if other:
            raise InvalidValueError(
                f"an intervention built for one prompt is run on one of the same text with other images ({other} "
                "differs): interventions are built for each prompt, intervention(model, prompt)"
            )

    def _other_images(self, prompt: Prompt) -> str:
        """The first input of the run, beside its text, that is not the prompt's; "" where there is none."""
        if self.prompt is prompt:
            return ""
        if self.prompt is not None:
            one, other = self.prompt.vision, prompt.vision
            return next((name for name in one.keys() | other.keys() if one.get(name) != other.get(name)), "")
        for name, held in self._pixels.items():
            value, own = held(), prompt.inputs.get(name)
            # Beams and several samples repeat the rows.
            if value is None or own is value or not isinstance(own, Tensor) or own.shape != value.shape:
                continue
            if not torch.equal(own.to(value), value):
                return name
        return ""
