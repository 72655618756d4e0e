"""What a sweep may reuse: where each intervention starts, and which of them run together.

An intervention that first touches layer l and position p leaves everything before both as it was in the clean run:
layers before l whole, and in the layers from l on the keys and values of positions before p. Interventions with near
starts run as one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from mmlens.effects.partial import CleanRun, NotExactError, is_out_of_memory
from mmlens.hook_names import BLOCK_HOOKS, MODEL_PARTS, layer_of
from mmlens.internals import attention_implementation
from mmlens.interventions.edits import Edit
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import Hook

_FIRST_AFTER_ATTENTION = "attn.hook_z"
_AFTER_ATTENTION = set(list(BLOCK_HOOKS)[list(BLOCK_HOOKS).index(_FIRST_AFTER_ATTENTION) :]) | {
    "mlp.hook_post",
    "hook_deepstack",
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far, of the largest logit, a partial run without edits may be from the clean run: kernels that split work in
another way round in another way."""


@dataclass(frozen=True)
class Start:
    """Where an intervention's run starts.

    `attention_is_clean`: it touches `layer` after attention only. `may_trim`: its last-layer functions know their
    positions. `whole` says why everything has to run, tower included, where it has to; `reason` why no position is
    reused.
    """

    layer: int = 0
    first: int = 0
    attention_is_clean: bool = False
    may_trim: bool = False
    whole: str = ""
    reason: str = ""
    needs_images: bool = False
    """It touches the vision tower or projector, which then has to run."""

    @property
    def kind(self) -> tuple[int, bool, bool]:
        """What runs of one batch have in common."""
        return self.layer, self.attention_is_clean, self.may_trim


def planned(
    model: HookedVLM,
    clean: CleanRun | None,
    hooks: Sequence[Sequence[Hook]],
    memory: float,
    why_whole: str = "",
) -> tuple[list[Start], list[Group]]:
    """Where each intervention's run starts, and which of them run as one batch, of at most `memory` GiB.

    Without a clean run, for the reason `why_whole`, each is a whole run of its own.
    """
    starts = [start_of(model, clean, own, why_whole) for own in hooks]
    if clean is None:
        return starts, groups_of(starts, lambda first: 1)
    reuse = reuse_of(clean, starts)
    starts = [reuse.of(start) for start in starts]
    names = (name for own in hooks for match, _ in own for name in model.hook_names(match))
    edits_scores = any(name.endswith(("hook_attn_scores", "hook_pattern")) for name in names)

    def most(first: int) -> int:
        return _most_in_memory(clean, first, memory, edits_scores) if reuse.batch else 1

    return starts, groups_of(starts, most)


def start_of(model: HookedVLM, clean: CleanRun | None, hooks: Sequence[Hook], why_whole: str = "") -> Start:
    """The first layer and position that the hooks touch, at which the run can be cut; `why_whole` without a clean
    run to start from."""
    touched = [(name, function) for match, function in hooks for name in model.hook_names(match)]
    layers = {name: _layer(name, model.cfg.n_layers) for name, _ in touched}
    outside = [name for name, layer in layers.items() if layer is None]
    if clean is None or not touched or outside:
        where = f"it touches {outside[0]}, outside the language layers" if outside else "it sets no hook"
        return Start(whole=why_whole or where, needs_images=bool(outside))
    layer = min(own for own in layers.values() if own is not None)
    first, reason = _first_of(clean, [function for _, function in touched])
    at_start = [name for name, own in layers.items() if own == layer]
    return Start(
        layer=layer,
        first=first,
        attention_is_clean=layer < clean.n_layers and all(map(_is_after_attention, at_start)),
        may_trim=all(
            _may_trim(name, function, clean.n_layers, clean.logits_to_keep) for name, function in touched
        ),
        reason=reason,
    )


def _first_of(clean: CleanRun, functions: Sequence[Callable[..., Any]]) -> tuple[int, str]:
    """The position to start from for functions that touch the prompt, and why it is none further on."""
    # A function that states no first position, as edits do, may touch any.
    stated = [getattr(function, "first_position", None) for function in functions]
    firsts = [first for first in stated if first is not None]
    if len(firsts) < len(stated):
        return clean.cut_before(0), "the positions that a hook function touches are not known"
    wanted = min(firsts)
    first = clean.cut_before(wanted)
    if wanted > clean.shape[1] - clean.logits_to_keep:
        return first, f"the metric reads the last {clean.logits_to_keep} positions" if first < wanted else ""
    if not wanted or clean.no_cut:
        return first, clean.no_cut if wanted else ""
    return first, f"positions {first} to {wanted} are attended to from before" if first < wanted else ""


def _layer(name: str, n_layers: int) -> int | None:
    if name in MODEL_PARTS.values():
        return 0
    return n_layers if name.startswith("ln_final.") else layer_of(name)


def _is_after_attention(name: str) -> bool:
    within = name.split(".", 2)[2] if name.startswith("blocks.") else ""
    return within.replace("image.hook_z", "attn.hook_z").removeprefix("image.") in _AFTER_ATTENTION


def _may_trim(name: str, function: Callable[..., Any], n_layers: int, n_kept: int) -> bool:
    """Whether the last layer may run at the kept positions alone, what stands before its attention twice.

    An edit of other positions would not fire there, and seem to change nothing.
    """
    layer = _layer(name, n_layers)
    if layer is None or layer < n_layers - 1:
        # What the stream gains after a layer is seen at the next one's input.
        return not (layer == n_layers - 2 and name.endswith("hook_deepstack"))
    if not isinstance(function, Edit) or ".image." in name:
        return False
    if function.mask is not None and not bool(function.mask[:, -n_kept:].any()):
        return False
    return layer == n_layers or _is_after_attention(name)


@dataclass(frozen=True)
class Reuse:
    """What partial runs of one prompt may take from its clean run, tried out on runs without edits."""

    partial: bool = True
    """Whether any partial run is exact."""
    depth: bool = True
    position: bool = True
    batch: bool = True
    reason: str = ""
    """Why not more."""

    def of(self, start: Start) -> Start:
        """The start that is left of a wanted one."""
        if start.whole:
            return start
        if not self.partial:
            return Start(whole=self.reason)
        return Start(
            layer=start.layer if self.depth else 0,
            first=start.first if self.position else 0,
            attention_is_clean=start.attention_is_clean and self.depth,
            may_trim=start.may_trim and self.position,
            reason="; ".join(filter(None, [start.reason, self.reason])),
        )


_TRIED = [
    Reuse(depth=depth, position=position, batch=batch)
    for depth, position in ((True, True), (True, False), (False, True), (False, False))
    for batch in (True, False)
]
"""From the most to the least."""


@dataclass
class _Tried:
    """What has been found exact for one model and one kind of prompt."""

    level: int = 0
    """The first of _TRIED that has not failed."""
    layers: set[int] = field(default_factory=set)
    """Start layers at which it was tried."""
    is_edited: bool = False
    """Whether an edited run was tried too."""
    reason: str = ""


_FOUND: WeakKeyDictionary[HookedVLM, dict[Hashable, _Tried]] = WeakKeyDictionary()


def reuse_of(clean: CleanRun, starts: Iterable[Start]) -> Reuse:
    """The most that is exact, tried out at every layer at which a run is to start.

    What was found holds for the model's later prompts of the same kind: as many examples, with images and padding or
    without.
    """
    if clean.whole:
        return Reuse(partial=False, reason=f"no partial run is exact here: {clean.whole}")
    partial = [start for start in starts if not start.whole]
    if not partial:
        return Reuse()
    tried = _FOUND.setdefault(clean.model, {}).setdefault(_kind(clean), _Tried())
    first = max(start.first for start in partial)
    tolerance = TOLERANCE.get(clean.logits.dtype, 1e-1)
    wanted = {start.layer for start in partial}
    while tried.level < len(_TRIED):
        reuse = _TRIED[tried.level]
        copies, cut = (2 if reuse.batch else 1), (first if reuse.position else 0)
        try:
            for layer in sorted(wanted - tried.layers if reuse.depth else {0} - tried.layers):
                clean.check(layer, cut, copies, tolerance)
                tried.layers.add(layer)
            if not tried.is_edited:
                near_end = clean.cut_before(clean.shape[1] * 15 // 16) if reuse.position else 0
                clean.check_edited(near_end, copies, tolerance)
                tried.is_edited = True
        except NotExactError as error:
            reason = tried.reason or str(error).split("\n")[0]
            tried.level, tried.layers, tried.is_edited, tried.reason = tried.level + 1, set(), False, reason
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return Reuse(partial=False, reason="there was no memory to try partial runs")
        else:
            return replace(reuse, reason=tried.reason)
    return Reuse(partial=False, reason=f"no partial run is exact here: {tried.reason}")


def _kind(clean: CleanRun) -> Hashable:
    """Prompts alike in this are alike in what is exact."""
    token_map = clean.prompt.token_map
    return (
        len(clean.prompt),
        bool(token_map.is_image.any()),
        bool(token_map.is_padding.any()),
        clean.logits_to_keep,
        clean.logits.dtype,
        attention_implementation(clean.model.hf_model),
        bool(clean.no_cut),
    )


@dataclass(frozen=True)
class Group:
    """Interventions (by number) that run as one batch."""

    members: tuple[int, ...]
    start: Start


_OVERHEAD = 64
"""Positions of one layer's run that cost about what a further batch costs."""


def groups_of(starts: Sequence[Start], most: Callable[[int], int]) -> list[Group]:
    """Interventions that start at the same layer run together, from the first position of any of them.

    Running one from further ahead than it needs costs positions; a further batch costs what `_OVERHEAD` of them do.
    `most(first)` is the largest batch that memory allows.
    """
    groups: list[Group] = []
    whole = [index for index, start in enumerate(starts) if start.whole]
    partial = [index for index, start in enumerate(starts) if not start.whole]
    order = sorted(partial, key=lambda index: (*starts[index].kind, -starts[index].first))
    batch: list[int] = []

    def close() -> None:
        if batch:
            groups.append(Group(tuple(batch), starts[batch[-1]]))
            batch.clear()

    for index in order:
        start = starts[index]
        if batch:
            more = sum(starts[member].first - start.first for member in batch)
            alike = start.kind == starts[batch[-1]].kind
            if not alike or more > _OVERHEAD or len(batch) >= most(start.first):
                close()
        batch.append(index)
    close()
    return [*groups, *(Group((index,), starts[index]) for index in whole)]


_NUMBERS_AT_ONCE = 2**20
"""Of the stream, on a CPU: 2,048 positions of width 512."""


def _most_in_memory(clean: CleanRun, first: int, memory: float, edits_scores: bool) -> int:
    """How many interventions from position `first` on fit into `memory` GiB, by the sizes of what a layer holds."""
    model, (batch, length) = clean.model, clean.shape
    cfg = model.cfg
    d_mlp = cfg.d_mlp or 4 * cfg.d_model
    n_kv_heads = cfg.n_key_value_heads or cfg.n_heads
    of_position = 8 * cfg.d_model + 3 * d_mlp
    of_key = 4 * n_kv_heads * cfg.d_head
    if edits_scores:
        of_key += 3 * cfg.n_heads * (length - first)
    numbers = (length - first) * of_position + length * of_key + 3 * clean.logits[0].numel()
    most = int(memory * 2**30 / (batch * numbers * clean.logits.element_size()))
    if model.device.type == "cpu":
        # A processor gains nothing from more at once than fills its caches.
        most = min(most, _NUMBERS_AT_ONCE // (batch * (length - first) * cfg.d_model))
    return max(1, most)
