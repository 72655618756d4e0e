"""Putting interventions together: at once, by layer, while generating, one hook point to another.

The order of a composition: hook points act in the order in which the forward pass reaches them; on one hook point the
functions act in the order in which the interventions are given, each on what the one before it left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from mmlens.arguments import called, instance_of, one_of, whole_number
from mmlens.errors import InvalidValueError, OutOfRangeError, StateError
from mmlens.hook_names import BLOCK_HOOKS, layer_of, position_axis, runs_over_positions
from mmlens.interventions.edits import (
    Edit,
    EditContext,
    check_call,
    intervention_of,
)
from mmlens.model.cache import is_batched, is_packed
from mmlens.model.choosing import Positions
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import Hook, Intervention, hooks_in
from mmlens.model.prompt import Prompt
from mmlens.model.run_state import Span

# ---------------------------------------------------------------------- all of them


def compose(*interventions: Intervention) -> Intervention:
    """All of them at once; the module's text says in which order they act.

    Each is built for the model as it is: what it runs to know what to do (a source, a resampled example) does not see
    the others. Where it should, patch from `Source(under=...)`.

    Raises ValueError for no interventions.

    >>> from mmlens.interventions.ablation import ablate
    >>> model = HookedVLM.from_pretrained("micro")
    >>> both = compose(ablate([(0, 1)]), ablate([(2, 3)]))
    >>> [name for name, _ in both(model, model.prompt("What colour is the K?"))]
    ['blocks.0.attn.hook_z', 'blocks.2.attn.hook_z']
    """
    if not interventions:
        raise InvalidValueError("compose needs at least one intervention")
    for at, part in enumerate(interventions):
        intervention_of(part, f"intervention {at}")

    def intervention(model: HookedVLM, prompt: Prompt) -> list[Hook]:
        check_call(model, prompt)
        return [hook for part in interventions for hook in part(model, prompt)]

    return intervention


# ---------------------------------------------------------------------- while generating


def during(intervention: Intervention, when: str) -> Intervention:
    """The same intervention while generating: at the prompt's positions, at generated tokens ("decode"), or at both.

    | when | at the prompt | at generated tokens |
    |---|---|---|
    | "prompt" | where its own positions say | nowhere |
    | "decode" | nowhere | at each of them |
    | "both" | where its own positions say | at each of them |

    The first generated token is predicted at the prompt's last position, so "decode" begins with the second. With and
    without the key-value cache the same positions are edited. A hook function that is no Edit is restricted too: it is
    handed the prompt's positions, or the generated ones in hand (with the cache one at a time), and nothing else.
    Hook points that hold the prompt's images alone (image.*, vision.*, projector.*) are part of the prompt.

    Raises ValueError for another `when`, and for "decode" with a hook on the prompt's images.

    >>> from mmlens.interventions.ablation import ablate
    >>> model = HookedVLM.from_pretrained("micro")
    >>> prompt = model.prompt("What colour is the K?")
    >>> [(edit.mask, edit.generated) for _, edit in during(ablate([(0, 1)]), "prompt")(model, prompt)]
    [(None, False)]
    """
    called("during(intervention, when): intervention", intervention, "an intervention, as ablate(...) gives")
    intervention_of(intervention)
    one_of("part of a generation", when, ("prompt", "decode", "both"))

    def restricted(model: HookedVLM, prompt: Prompt) -> list[Hook]:
        check_call(model, prompt)
        hooks: list[Hook] = []
        for match, function in intervention(model, prompt):
            for name in model.hook_names(match):
                hooks.append((name, _restricted(model, prompt, name, function, when)))
        return hooks

    return restricted


def _restricted(
    model: HookedVLM, prompt: Prompt, name: str, function: Callable[..., Any], when: str
) -> Callable[..., Any]:
    if not is_batched(name):
        if when == "decode":
            raise InvalidValueError(
                f"during(..., 'decode'): {name} holds the prompt's images, which no generated token is part of"
            )
        return function
    if isinstance(function, Edit):
        # A copy that has not fired yet.
        edit = copy.copy(function)
        edit.fired, edit._sizes = 0, []
    elif when == "both":
        return function
    else:
        edit = Edit(model, prompt, name, _of_part(prompt, name, function, model.hook_dict[name], when))
    edit.generated = when != "prompt"
    is_answer = prompt.token_map.is_answer
    if when == "decode":
        edit.mask = is_answer.clone()
    elif bool(is_answer.any()):
        # In a continued prompt what was generated is positions.
        mask = torch.ones_like(is_answer) if edit.mask is None else edit.mask
        edit.mask = mask & ~is_answer if when == "prompt" else mask | is_answer
    return edit


def _of_part(
    prompt: Prompt, name: str, function: Callable[..., Any], hook: Any, when: str
) -> Callable[[Tensor, EditContext], Tensor]:
    """A hook function as an Edit's change, which hands it the prompt's positions or the generated ones alone."""
    axis = position_axis(name)

    n_answer = prompt.token_map.is_answer.sum(1)
    if len(set(n_answer.tolist())) > 1:
        raise InvalidValueError(
            f"during(..., {when!r}): the hook function on {name} is no Edit, and the answers of this batch have "
            f"{n_answer.tolist()} tokens, so it can be handed no part of the prompt: run these prompts one by one"
        )

    def change(x: Tensor, here: EditContext) -> Tensor:
        length = x.shape[axis]
        n_prompt = min(max(prompt.shape[1] - int(n_answer[0]) - here.span.first, 0), length)
        start, stop = (0, n_prompt) if when == "prompt" else (n_prompt, length)
        if start == stop:
            return x
        part = x.narrow(axis, start, stop - start).clone()
        edited = function(part, hook=hook)
        edited = part if edited is None else edited
        pieces = (x.narrow(axis, 0, start), edited, x.narrow(axis, stop, length - stop))
        return torch.cat(pieces, dim=axis)

    return change


# ---------------------------------------------------------------------- by layer

Schedule = Mapping[int | range, Intervention] | Callable[[int], Intervention | None]


def by_layer(schedule: Schedule) -> Intervention:
    """Interventions scheduled by language layer: {layer or range of layers: intervention}, or a function of the layer.

    Each may set hooks in its own layers only, which is checked when it is built. A function is asked for every layer
    of the model and gives None where nothing is to be done. They act as in `compose`.

    Raises ValueError for an empty schedule, a function that gives None for every layer, and a hook outside the layers
    it is scheduled for; IndexError for a layer that the model does not have.

    >>> from mmlens.interventions.ablation import ablate
    >>> model = HookedVLM.from_pretrained("micro")
    >>> prompt = model.prompt("What colour is the K?")
    >>> hooks = by_layer(lambda layer: ablate([(layer, 0)]) if layer > 1 else None)(model, prompt)
    >>> [name for name, _ in hooks] == [f"blocks.{layer}.attn.hook_z" for layer in range(2, model.cfg.n_layers)]
    True
    >>> by_layer({1: ablate([(0, 0)])})(model, prompt)
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidValueError: by_layer: the intervention for layer 1 hooks blocks.0.attn.hook_z, which is outside
    """
    if isinstance(schedule, Mapping):
        for key, part in schedule.items():
            if part is not None:
                intervention_of(part, f"the intervention for layer {key!r}")
    else:
        called(
            "schedule", schedule, "{layer or range: intervention} or a function of the layer", n_arguments=1
        )
    if not callable(schedule) and not schedule:
        raise InvalidValueError("by_layer needs a schedule {layer or range: intervention}, got an empty one")

    def intervention(model: HookedVLM, prompt: Prompt) -> list[Hook]:
        check_call(model, prompt)
        hooks: list[Hook] = []
        entries = (
            {layer: schedule(layer) for layer in range(model.cfg.n_layers)}
            if callable(schedule)
            else schedule
        )
        scheduled = {key: part for key, part in entries.items() if part is not None}
        if not scheduled:
            raise InvalidValueError("by_layer: the schedule gives no intervention for any layer of the model")
        for key, part in scheduled.items():
            if not isinstance(key, range):
                key = whole_number("a layer of the schedule", key)
            layers = key if isinstance(key, range) else range(key, key + 1)
            shown = f"layers {key.start} to {key.stop - 1}" if isinstance(key, range) else f"layer {key}"
            if not layers or min(layers) < 0 or max(layers) >= model.cfg.n_layers:
                raise OutOfRangeError(
                    f"by_layer: {key!r} is out of range; the model has {model.cfg.n_layers} layers "
                    f"(0 to {model.cfg.n_layers - 1})"
                )
            for match, function in part(model, prompt):
                outside = [name for name in model.hook_names(match) if layer_of(name) not in layers]
                if outside:
                    raise InvalidValueError(
                        f"by_layer: the intervention for {shown} hooks {outside[0]}, which is outside"
                    )
                hooks.append((match, function))
        return hooks

    return intervention


# ---------------------------------------------------------------------- one hook point to another


def relay(
    read: str,
    write: str,
    function: Callable[[Tensor, Tensor], Tensor],
    *,
    positions: Positions = None,
) -> Intervention:
    """Edit the hook point `write` by what stands at `read` in the same run: x becomes function(x, source).

    `source` is a copy of the activation at `read`, edits that are made there before this one included, at those
    positions that `x` covers; how many that are depends on the run (one, while decoding with the cache). So the
    function works position by position: of `x` and `source` at one position it makes the new x there. It gives a tensor
    of x's shape, of which `positions` are kept (None: all, generated tokens too).

    Both hook points are of the language model, and both or neither at image positions (image.*). Raises
    UnknownHookError for another name, ValueError where `write` fires before `read` or has other positions, and where
    the function gives another shape; RuntimeError where `read` did not fire before `write` in a run.

    >>> from mmlens.data.scenes import scene_examples
    >>> model = HookedVLM.from_pretrained("micro")
    >>> prompt = model.prompt_examples(scene_examples("objects", 1, seed=0))
    >>> undo = relay("blocks.1.hook_attn_out", "blocks.3.hook_resid_pre", lambda x, source: x - source)
    >>> hooks = undo(model, prompt)
    >>> logits = model.run_with_hooks(prompt, fwd_hooks=hooks)
    >>> [(edit.fired, edit.size > 0) for _, edit in hooks]
    [(1, False), (1, True)]
    """

    for name, hook in (("read", read), ("write", write)):
        instance_of(name, hook, str, "the name of a hook point")
    called("function", function, "a function (x, source) -> x", n_arguments=2)

    def intervention(model: HookedVLM, prompt: Prompt) -> list[Hook]:
        check_call(model, prompt)
        for name in (read, write):
            model.hook_names(name)
        _check_relay(read, write)
        seen: list[tuple[Tensor, Span]] = []

        def look(x: Tensor, here: EditContext) -> Tensor:
            seen[:] = [(x.clone(), here.span)]
            return x

        def change(x: Tensor, here: EditContext) -> Tensor:
            if not seen:
                raise StateError(f"relay: {write} fired in a run in which {read} had not fired before it")
            source, span = seen.pop()
            source = _same_positions(source, span, read, here.span).to(x.device)
            edited = function(x, source)
            if not isinstance(edited, Tensor) or edited.shape != x.shape:
                given = list(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
                raise InvalidValueError(
                    f"relay: the function gives what stands at {write} instead, a tensor of shape {list(x.shape)}, "
                    f"not {given}; its source, {read}, has shape {list(source.shape)}"
                )
            return edited

        # The reading edit has the written positions, so that a run may be cut before the first of them.
        return [
            (name, Edit(model, prompt, name, own, positions=positions))
            for name, own in ((read, look), (write, change))
        ]

    return intervention


def _check_relay(read: str, write: str) -> None:
    for name in (read, write):
        if not runs_over_positions(name):
            raise InvalidValueError(
                f"relay: {name} is no hook point of the language model; a relay joins two hook points that fire in "
                "every step over the same positions"
            )
    if is_packed(read) != is_packed(write):
        raise InvalidValueError(
            f"relay: {read} and {write} are not over the same positions: one holds the image positions alone. Use "
            "the hook point of all positions, with positions='image'"
        )
    if _place(write) <= _place(read):
        raise InvalidValueError(
            f"relay: {write} does not come after {read} in the forward pass, so it cannot read it"
        )


# In the order they fire, where BLOCK_HOOKS leaves it open.
_AFTER = {
    "attn.hook_q_input": "ln1.hook_normalized",
    "attn.hook_k_input": "attn.hook_q",
    "attn.hook_v_input": "attn.hook_k",
    "mlp.hook_post": "ln2.hook_normalized",
}


def _place(name: str) -> tuple[int, float]:
    """When a hook point of the language model fires: by layer, and within the layer.

    Hook points that no list orders come last in their layer.
    """
    layer = layer_of(name)
    if layer is None:
        return (10**6 if name.startswith("ln_final.") else -1), float(name.endswith("normalized"))
    within = name.split(".", 2)[2].removeprefix("image.").replace("cross_attn.", "attn.")
    order = list(BLOCK_HOOKS)
    known = _AFTER.get(within, within)
    place = float(order.index(known)) if known in order else float(len(order))
    return layer, place + 0.5 * (within in _AFTER)


def _same_positions(source: Tensor, span: Span, name: str, wanted: Span) -> Tensor:
    """The source at the positions `wanted`, which a run may have cut between the two hook points."""
    if span == wanted or is_packed(name):
        return source
    start = wanted.first - span.first
    if start < 0 or start + wanted.length > span.length:
        raise StateError(
            f"relay: {name} was computed for positions {span.first} to {span.first + span.length - 1} alone, "
            f"and {wanted.first} to {wanted.first + wanted.length - 1} are to be edited"
        )
    return source.narrow(position_axis(name), start, wanted.length)


# ---------------------------------------------------------------------- report


def edit_report(hooks: Sequence[Hook]) -> pd.DataFrame:
    """Where the hooks of an intervention acted and how large their edits were, one row per hook.

    Columns: `hook`; `heads` (None: no choice of heads); `positions`, how many of the batch's prompt positions it may
    change (None: all); `generated`, whether it acts on generated tokens; `fired`, how often it was called since it was
    built; `size`, the largest change so far, in the unit `measure`: of one element of the activation, or (knockout)
    the attention mass taken from one query. A function that is no Edit counts nothing: it has NaN there.

    >>> from mmlens.interventions.ablation import ablate
    >>> model = HookedVLM.from_pretrained("micro")
    >>> prompt = model.prompt("What colour is the K?")
    >>> hooks = ablate([(0, 1), (1, 2)], positions="last")(model, prompt)
    >>> with model.hooks(fwd_hooks=hooks):
    ...     logits = model(prompt)
    >>> edit_report(hooks)[["hook", "heads", "positions", "fired"]]
                       hook heads  positions  fired
    0  blocks.0.attn.hook_z  (1,)          1      1
    1  blocks.1.attn.hook_z  (2,)          1      1
    """
    rows = []
    for match, function in hooks_in("hooks", hooks):
        row: dict[str, Any] = {
            "hook": match if isinstance(match, str) else getattr(match, "__name__", repr(match))
        }
        if isinstance(function, Edit):
            row |= {
                "heads": None if function.heads is None else tuple(function.heads),
                "positions": None if function.mask is None else int(function.mask.sum()),
                "generated": function.generated,
                "fired": function.fired,
                "size": function.size,
                "measure": getattr(function, "measure", "element"),
            }
        rows.append(row)
    columns = ["hook", "heads", "positions", "generated", "fired", "size", "measure"]
    return pd.DataFrame(rows, columns=columns)
