"""Who has something set on a Hugging Face model, and the hooks on its own forward pass that go with it.

1. At most one HookedVLM of a model has something set at a time, in one thread: hooks, rows that are asked for, layers
   replaced for a partial run. Another HookedVLM or another thread that would run the model meanwhile is refused,
   because it would see edits that it did not ask for.
2. While nothing is set, the Hugging Face model has nothing of ours in it: it can be saved, copied and run anywhere.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import nn

from mmlens import internals
from mmlens.errors import MmlensWarning, StateError
from mmlens.internals import attach, detach

_LOCK = threading.RLock()
_WATCHES: WeakKeyDictionary[nn.Module, WeakSet[Watch]] = WeakKeyDictionary()


class Watch:
    """What one HookedVLM has set on its Hugging Face model. `attach` and `detach` go with the first and the last of it.

    The model is held weakly while nothing is set, so that it is freed with its last user. Once something is set it
    lives as long as the Hugging Face model does: the hooks act there.
    """

    def __init__(self, model: nn.Module, hf_model: nn.Module) -> None:
        self._model: Callable[[], Any] = ref(model)
        self._hf_model: Callable[[], Any] = ref(hf_model)
        self._in_use: Any = None
        self._is_attached = False
        self._set: set[Any] = set()
        self._thread: threading.Thread | None = None
        with _LOCK:
            _WATCHES.setdefault(hf_model, WeakSet()).add(self)

    def __contains__(self, what: Any) -> bool:
        return what in self._set

    def __bool__(self) -> bool:
        return bool(self._set)

    @property
    def model(self) -> Any:
        return self._model()

    @property
    def points(self) -> list[Any]:
        """The hook points that have a hook."""
        return [what for what in self._set if isinstance(what, nn.Module)]

    def others(self) -> list[Watch]:
        """Those of other HookedVLMs of the same Hugging Face model that have something set."""
        known = _WATCHES.get(self._hf_model(), ())
        return [other for other in known if other is not self and other]

    def add(self, what: Any) -> None:
        """Set `what`. Raises StateError where another thread or another HookedVLM has something set."""
        with _LOCK:
            self.check_thread()
            self.check_others()
            self._thread = threading.current_thread()
            self._in_use = self._model()
            self._set.add(what)
            if not self._is_attached:
                self._in_use.attach()
                self._is_attached = True

    def discard(self, what: Any) -> None:
        """Take `what` away; harmless where it is not set."""
        with _LOCK:
            self._set.discard(what)
            model = self._model()
            if self._set or model is None:
                return
            self._is_attached = False
            model.detach()
            self._in_use = self._thread = None

    def check_thread(self) -> None:
        """Raise StateError in any thread but that which set what is set."""
        if self._set and threading.current_thread() is not self._thread:
            name = "another thread" if self._thread is None else f"thread {self._thread.name!r}"
            raise StateError(
                f"{name} has hooks set on this model, and thread {threading.current_thread().name!r} would run "
                "under them. Open the hooks in the thread that runs the model (of generate with a streamer: inside "
                "the function that the thread runs), wait until they are gone "
                "(model.reset_hooks()), or give each thread a model of its own"
            )

    def check_others(self) -> None:
        """Raise StateError where another HookedVLM of the same Hugging Face model has something set."""
        for other in self.others():
            named = ", ".join(point.name for point in other.points[:3]) or "a run of its own"
            raise StateError(
                f"another HookedVLM of this Hugging Face model has hooks set ({named}), which would act on this one "
                "too: call reset_hooks() there first, or use one HookedVLM throughout"
            )


class StandingModules:
    """Where modules of a Hugging Face model, and all that hold them, stood when it was wrapped."""

    def __init__(self, hf_model: nn.Module, modules: Iterable[nn.Module]) -> None:
        paths = {module: path for path, module in hf_model.named_modules()}
        holders: dict[str, None] = {}
        for module in modules:
            names = paths[module].split(".") if paths.get(module) else []
            holders |= dict.fromkeys(".".join(names[:n]) for n in range(1, len(names) + 1))
        self._places: list[tuple[Mapping[str, Any], str, str, Any]] = []
        """(the holder's children, path, name, module)."""
        for path in holders:
            parent, _, name = path.rpartition(".")
            siblings = internals.children_of(hf_model.get_submodule(parent))
            self._places.append((siblings, path, name, siblings[name]))

    def check(self) -> None:
        """Raise StateError where one of them is no longer there: hooks on it would act on nothing."""
        for siblings, path, name, module in self._places:
            now = siblings.get(name)
            # A partial run puts something in a layer's place for its own time.
            if now is not module and getattr(now, "stands_for", None) is not module:
                raise StateError(
                    f"{path} ({type(module).__name__}) of the Hugging Face model was replaced by a "
                    f"{type(now).__name__} since it was wrapped (an adapter was added, or weights were quantized), so "
                    "hooks on it act on nothing: wrap it again, HookedVLM(hf_model, processor)"
                )


class RunHooks:
    """What runs before the forward pass of a Hugging Face model, and of its decoder, while something is set."""

    def __init__(self, on_forward: Callable[..., Any], on_decoder: Callable[..., Any]) -> None:
        self._on_forward, self._on_decoder = on_forward, on_decoder

    def attach(self, hf_model: nn.Module, decoder: nn.Module) -> None:
        attach(hf_model, "input", self._before_forward)
        attach(decoder, "input", self._before_decoder)

    def detach(self, hf_model: nn.Module, decoder: nn.Module) -> None:
        detach(hf_model, "input", self._before_forward)
        detach(decoder, "input", self._before_decoder)

    def _before_forward(self, *args: Any) -> Any:
        return self._on_forward(*args)

    def _before_decoder(self, *args: Any) -> Any:
        return self._on_decoder(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> RunHooks:
        # A copy of the Hugging Face model is a plain one, even while hooks are set on the original.
        plain = RunHooks(_nothing, _nothing)
        memo[id(self)] = plain
        return plain

    def __reduce__(self) -> Any:
        refuse_saving()


def refuse_saving() -> NoReturn:
    raise StateError(
        "hooks are set on this Hugging Face model, and would be saved with it: save it once they are gone "
        "(after the `with` block, or model.reset_hooks())"
    )


def _nothing(*args: Any) -> None:
    return None


def take_over(hf_model: nn.Module) -> None:
    """Before a Hugging Face model is wrapped again: hooks that an earlier HookedVLM has set on it are removed, with a
    warning, since a notebook cell that runs twice would otherwise edit twice.

    Raises StateError while a block of hooks, or a run, of an earlier one is open.
    """
    for watch in [watch for watch in _WATCHES.get(hf_model, ()) if watch]:
        names = [point.name for point in watch.points]
        # Blocks and runs hold what is no hook point.
        if len(names) < len(watch._set):
            raise StateError(
                "another HookedVLM of this Hugging Face model has a block of hooks open, or runs: wrap the model again "
                "after that"
            )
        watch.model.reset_hooks(including_permanent=True)
        warnings.warn(
            f"the Hugging Face model was wrapped before, and hooks on {', '.join(names[:3])} were still set: they are "
            "removed",
            MmlensWarning,
            stacklevel=3,
        )


def check_checkpointing(modules: list[Any], hooks: Mapping[str, list[Any]]) -> None:
    """Raise StateError where activations would be computed again in the backward pass, under hooks or without them.

    `modules` are those that may do so. Hooks that only read change no gradient.
    """
    if not torch.is_grad_enabled() or not any(map(internals.recomputes, modules)):
        return
    edits = [
        name
        for name, functions in hooks.items()
        if not all(getattr(function, "reads_only", False) for function in functions)
    ]
    if edits:
        raise StateError(
            f"gradient checkpointing is on, and {', '.join(edits[:3])} has hooks: the backward pass would compute the "
            "layers again, with hooks fired twice or not at all, and give wrong gradients. Call "
            "hf_model.gradient_checkpointing_disable() or hf_model.eval(), or run under torch.no_grad()"
        )
