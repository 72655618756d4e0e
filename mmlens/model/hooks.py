"""Hooks on a model's hook points: what a list of them is, how long they live, and whether they fired."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from transformer_lens import HookedRootModule

from mmlens import hook_names
from mmlens.arguments import listed, shown, unknown_name_message
from mmlens.errors import InvalidTypeError, MmlensWarning, StateError, UnknownNameError
from mmlens.interrupts import OpenBlock, undone
from mmlens.model.checked_hooks import CheckedHook, hook_function
from mmlens.model.prompt import Prompt
from mmlens.model.run_state import RunState
from mmlens.model.watch import Watch

if TYPE_CHECKING:
    from mmlens.model.hooked_vlm import HookedVLM

HookName = str | Callable[[str], bool]
"""The name of a hook point, or a filter of names."""
Hook = tuple[HookName, Callable[..., Any]]
Intervention = Callable[["HookedVLM", Prompt], Sequence[Hook]]
"""Anything that turns (model, prompt) into forward hooks; composing is concatenating."""

_SHOWN = 5


class UnknownHookError(UnknownNameError):
    """A hook name that does not exist, or a filter that matches nothing."""


class HookNeverFiredError(StateError):
    """The model ran, and a hook set for that run never fired."""


class NoChangeWarning(MmlensWarning):
    """An intervention fired and changed nothing."""


def hooks_in(name: str, value: object) -> list[Hook]:
    """A list of hooks (name or filter, function), gathered once; InvalidTypeError for anything else.

    >>> hooks_in("fwd_hooks", ("hook_embed", print))
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidTypeError: fwd_hooks holds 'hook_embed' (str); expected a list of (hook name, function) pairs
    """
    expected = "a list of (hook name, function) pairs"
    hooks = listed(name, value, expected)
    # One function often stands at hundreds of hook points, and reading a signature takes time: each is looked at once.
    seen: set[int] = set()
    for hook in hooks:
        is_pair = isinstance(hook, (tuple, list)) and len(hook) == 2
        if not is_pair or not (isinstance(hook[0], str) or callable(hook[0])) or not callable(hook[1]):
            raise InvalidTypeError(f"{name} holds {shown(hook)}; expected {expected}")
        if id(hook[1]) not in seen:
            seen.add(id(hook[1]))
            hook_function(f"the function of {name} at {shown(hook[0])}", hook[1])
    return hooks


def check_fired(silent: Sequence[str], run: str = "this run") -> None:
    """Raise HookNeverFiredError where there are `silent` hook points: those with a hook that never fired in `run`.

    >>> check_fired(["vision.hook_embed"], "the source's run")
    Traceback (most recent call last):
        ...
    mmlens.model.hooks.HookNeverFiredError: vision.hook_embed never fired in the source's run. Hooks on image.*, ...
    """
    if not silent:
        return
    more = f" and {len(silent) - _SHOWN} more" if len(silent) > _SHOWN else ""
    raise HookNeverFiredError(
        f"{', '.join(silent[:_SHOWN])}{more} never fired in {run}. Hooks on image.*, vision.* and projector.* fire "
        "only where the prompt has an image, and those of the tower not after model.encode_images"
    )


class HookMethods(HookedRootModule):
    """TransformerLens' methods that set hooks, which check every name first and afterwards that each hook fired; a
    part of HookedVLM."""

    watch: Watch
    run_state: RunState

    def hook_names(self, match: HookName) -> list[str]:
        """The hook points that a name or a filter means; raises UnknownHookError where it means none."""
        if callable(match):
            names = [name for name in self.hook_dict if match(name)]
            if not names:
                raise UnknownHookError(
                    f"the filter matches none of the {len(self.hook_dict)} hook points, such as "
                    f"{', '.join(map(repr, list(self.hook_dict)[:3]))}"
                )
            return names
        if not isinstance(match, str):
            raise InvalidTypeError(f"a hook point is {shown(match)}; expected its name, or a filter of names")
        if match not in self.hook_dict:
            raise UnknownHookError(unknown_name_message("hook point", match, self.hook_dict))
        return [match]

    def _cached_names(self, names_filter: HookName | Sequence[str] | None) -> list[str]:
        if names_filter is None:
            costly = () if self.cfg.use_attn_result else hook_names.COSTLY_HOOKS
            return [name for name in self.hook_dict if not name.endswith(costly)]
        if isinstance(names_filter, str) or callable(names_filter):
            return self.hook_names(names_filter)
        names = listed("names_filter", names_filter, "a hook name, a filter of names, or a list of names")
        return list(dict.fromkeys(known for name in names for known in self.hook_names(name)))

    def add_hook(self, name: HookName, *args: Any, **kwargs: Any) -> None:
        """As in TransformerLens; raises UnknownHookError where `name` means no hook point."""
        for known in self.hook_names(name):
            super().add_hook(known, *args, **kwargs)

    def hooks(
        self,
        fwd_hooks: Sequence[Hook] = (),
        bwd_hooks: Sequence[Hook] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> HookBlock:
        """Hooks that live as long as the block, as in TransformerLens.

        A hook function gives None, or the whole activation in its shape, dtype and device, without new NaN or
        infinities; scores of -inf block keys.

        Raises UnknownHookError before anything runs where a name means nothing, and HookNeverFiredError at
        the end where the model ran inside the block and a forward hook never fired; StateError where another thread
        or another HookedVLM of the same Hugging Face model has hooks set. Warns (NoChangeWarning) where hooks are an
        intervention's edits, fired, and none of them changed anything.
        """
        fwd_hooks, bwd_hooks = hooks_in("fwd_hooks", fwd_hooks), hooks_in("bwd_hooks", bwd_hooks)
        return HookBlock(self, fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts)

    def reset_hooks(self, *args: Any, **kwargs: Any) -> None:
        """Remove all hooks, as in TransformerLens."""
        undone(lambda: None, lambda: super(HookMethods, self).reset_hooks(*args, **kwargs))

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: Sequence[Hook] = (),
        bwd_hooks: Sequence[Hook] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """Logits with the hooks live, as in TransformerLens. Raises and warns as `hooks`."""
        if bwd_hooks and reset_hooks_end:
            logging.warning("bwd_hooks are removed at the end of run_with_hooks; use `with model.hooks(...)`")
        block = self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts)
        output = block.around(lambda: self(*model_args, **model_kwargs))
        block.check()
        return output

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """As in TransformerLens; hook_q_input and its like are there either way, and cost only while hooked."""
        self.cfg.use_split_qkv_input = use_split_qkv_input


class HookBlock(OpenBlock[Any]):
    """Hooks that live as long as a `with` block; see `HookMethods.hooks`."""

    def __init__(
        self,
        model: HookMethods,
        fwd_hooks: Sequence[Hook],
        bwd_hooks: Sequence[Hook],
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> None:
        self.model = model
        self._forward = [(model.hook_names(name), CheckedHook(hook)) for name, hook in fwd_hooks]
        self._backward = [
            (model.hook_names(name), CheckedHook(hook, is_backward=True)) for name, hook in bwd_hooks
        ]
        self._resets, self._clears_contexts = reset_hooks_end, clear_contexts
        self._level = self._n_forwards = 0
        self._held = object()

    def begin(self) -> HookMethods:
        model = self.model
        self._n_forwards = model.run_state.n_forwards
        self._level = model.context_level = model.context_level + 1
        model.watch.add(self._held)
        for direction, hooks in (("fwd", self._forward), ("bwd", self._backward)):
            for names, hook in hooks:
                for name in names:
                    model.hook_dict[name].add_hook(hook, direction, level=self._level)
        return model

    def end(self) -> None:
        model = self.model
        hooks = [*self._forward, *self._backward]
        if self._resets:
            own = {hook for _, hook in hooks}
            for name in dict.fromkeys(name for names, _ in hooks for name in names):
                model.hook_dict[name].drop(own)
            if self._clears_contexts:
                model.clear_contexts()
        model.watch.discard(self._held)
        model.context_level = max(self._level - 1, 0)

    def check(self) -> None:
        """Raise HookNeverFiredError where the model ran and a forward hook never fired; warn where no edit changed
        anything."""
        if self.model.run_state.n_forwards > self._n_forwards:
            check_fired(sorted({names[0] for names, hook in self._forward if not hook.fired}))
        # Edits keep the size of what they changed; other functions are not known to edit.
        functions: list[Any] = [hook.function for _, hook in self._forward]
        edits = [hook for hook in functions if getattr(hook, "fired", 0) and hasattr(hook, "size")]
        if edits and not any(hook.size for hook in edits):
            warnings.warn(f"the intervention changed nothing: {edits[:3]}", NoChangeWarning, stacklevel=3)
