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

from mmlens.effects.partial import CleanRun, NotExactError
from mmlens.hook_names import BLOCK_HOOKS, layer_of
from mmlens.internals import attention_implementation
from mmlens.interventions.edits import Edit
from mmlens.model.hooked_vlm import Hook, HookedVLM

_FIRST_BEHIND_ATTENTION = "attn.hook_z"
_BEHIND_ATTENTION = set(list(BLOCK_HOOKS)[list(BLOCK_HOOKS).index(_FIRST_BEHIND_ATTENTION) :]) | {
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


def start_of(model: HookedVLM, clean: CleanRun, hooks: Sequence[Hook]) -> Start:
    """The first layer and position that the hooks touch, at which the run can be cut."""
    touched = [(name, function) for match, function in hooks for name in model.hook_names(match)]
    if not touched:
        return Start(whole="it sets no hook")
    layers = []
    for name, _ in touched:
        layer = _layer(name, clean.n_layers)
        if layer is None:
            return Start(whole=f"it touches {name}, outside the language layers", needs_images=True)
        layers.append(layer)
    layer = min(layers)
    # A function that states no first position, as edits do, may touch any.
    firsts = [getattr(function, "first_position", None) for _, function in touched]
    known = [first for first in firsts if first is not None]
    reason = "" if len(known) == len(firsts) else "the positions that a hook function touches are not known"
    wanted = 0 if reason else min(known)
    first = clean.cut_before(wanted)
    if wanted and not reason and wanted > clean.shape[1] - clean.logits_to_keep:
        reason = f"the metric reads the last {clean.logits_to_keep} positions" if first < wanted else ""
    elif wanted and not reason:
        reason = clean.no_cut or (
            f"positions {first} to {wanted} are attended to from before" if first < wanted else ""
        )
    at_start = [name for (name, _), own in zip(touched, layers, strict=True) if own == layer]
    return Start(
        layer=layer,
        first=first,
        attention_is_clean=layer < clean.n_layers and all(map(_is_behind_attention, at_start)),
        may_trim=all(
            _may_trim(name, function, clean.n_layers, clean.logits_to_keep) for name, function in touched
        ),
        reason=reason,
    )


def _layer(name: str, n_layers: int) -> int | None:
    if name in ("hook_embed", "image.hook_embed"):
        return 0
    return n_layers if name.startswith("ln_final.") else layer_of(name)


def _is_behind_attention(name: str) -> bool:
    within = name.split(".", 2)[2] if name.startswith("blocks.") else ""
    return within.replace("image.hook_z", "attn.hook_z").removeprefix("image.") in _BEHIND_ATTENTION


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
    return layer == n_layers or _is_behind_attention(name)


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
        else:
            return replace(reuse, reason=tried.reason)
    return Reuse(partial=False, reason=f"no partial run is exact here: {tried.reason}")


def _kind(clean: CleanRun) -> Hashable:
    """Prompts alike in this are alike in what is exact: the batch, images, padding, and sizes that may be confused."""
    model, token_map, (batch, length) = clean.model, clean.prompt.token_map, clean.shape
    cfg = model.cfg
    sizes = (cfg.n_heads, cfg.n_key_value_heads, cfg.d_head, cfg.d_model, cfg.d_mlp, cfg.n_layers)
    return (
        batch,
        bool(token_map.is_image.any()),
        bool(token_map.is_padding.any()),
        length if length in sizes else None,
        clean.logits_to_keep,
        clean.logits.dtype,
        attention_implementation(model.hf_model),
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
