"""What a hook function may give: nothing, or a tensor like the one it was handed, without new NaN or infinities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmlens import internals
from mmlens.arguments import called
from mmlens.errors import InvalidTypeError, InvalidValueError
from mmlens.internals import place_of


class CountedHook:
    """A hook function that counts its calls in `fired`: what it does it does in `act`."""

    fired = 0

    def act(self, x: Tensor, hook: Any) -> Any:
        raise NotImplementedError

    def __call__(self, x: Tensor, hook: Any) -> Any:
        self.fired += 1
        return self.act(x, hook)


class CheckedHook(CountedHook):
    """A user's hook function, held to what a hook may give.

    None leaves the activation as it is (or as the function changed it in place). A function may say of itself
    `reads_only` or `is_checked` (it calls checked ones alone): it is then not held to anything; and
    `edits_in_place = False`, which spares a look at what it is handed.
    """

    def __init__(self, function: Callable[..., Any], is_backward: bool = False) -> None:
        self.function, self.is_backward = function, is_backward
        self._is_trusted = getattr(function, "reads_only", False) or getattr(function, "is_checked", False)
        # Not known of a user's function before its first call.
        self._edits_in_place: bool = getattr(function, "edits_in_place", True)

    def __repr__(self) -> str:
        return described(self.function)

    def act(self, x: Tensor, hook: Any) -> Any:
        if self._is_trusted or not isinstance(x, Tensor):
            return self.function(x, hook=hook)
        like = _kind(x)
        # Scores of -inf are keys that are blocked.
        is_wrong = torch.isnan if hook.name.endswith("hook_attn_scores") else _is_not_finite
        was_wrong = self._edits_in_place and _has(is_wrong, x)
        version = internals.n_changes(x)
        given = self.function(x, hook=hook)
        # A tensor of inference mode does not count its changes.
        is_changed = version is None or internals.n_changes(x) != version
        # A backward hook may give its gradient in a tuple of one.
        in_tuple = self.is_backward and isinstance(given, tuple) and len(given) == 1
        result = given[0] if in_tuple else given
        if result is None or result is x:
            if not is_changed:
                self._edits_in_place = False
                return given
            result = x
        self._edits_in_place = is_changed and self._edits_in_place
        self._check_kind(result, like, hook.name)
        if (
            _has(is_wrong, result)
            and not was_wrong
            and (is_changed or bool((is_wrong(result) & ~is_wrong(x)).any()))
        ):
            what = "NaN" if bool(result.isnan().any()) else "infinite values"
            raise InvalidValueError(
                f"the hook {self} made {what} at {hook.name}, where there was none: numbers after it would be NaN"
            )
        if hook.name.endswith("hook_attn_scores"):
            self._check_rows(result, None if is_changed else x, hook.name)
        return given

    def _check_kind(self, result: Any, like: tuple[Any, ...], name: str) -> None:
        if not isinstance(result, Tensor):
            raise InvalidTypeError(
                f"the hook {self} gave {type(result).__name__} at {name}; expected a tensor of shape {list(like[0])}, "
                "or None where nothing is to change"
            )
        given = _kind(result)
        if given == like:
            return
        words = ("shape", "dtype", "device")
        which = next(index for index in range(3) if given[index] != like[index])
        old, new = like[which], given[which]
        old, new = (list(old), list(new)) if which == 0 else (old, new)
        way_out = (
            "change the part that is meant and return the whole (x[:, -1] = 0; return x)"
            if which == 0
            else f"return result.to({'dtype' if which == 1 else 'device'}=x.{words[which]})"
        )
        raise InvalidValueError(
            f"the hook {self} gave a tensor of {words[which]} {new} at {name}; what it was handed has {words[which]} "
            f"{old}, and the same must come back: {way_out}"
        )

    def _check_rows(self, scores: Tensor, before: Tensor | None, name: str) -> None:
        """The softmax of a row without a finite score, or with an infinite one, is NaN."""
        if not scores.numel():
            return
        infinite = scores.detach().amax(-1).isinf()
        if bool(infinite.any()) and before is not None:
            infinite &= ~before.detach().amax(-1).isinf()
        if bool(infinite.any()):
            raise InvalidValueError(
                f"the hook {self} left {int(infinite.sum())} queries at {name} without a finite largest score, and "
                "the softmax of such a row is NaN: block keys with -inf, but not all of a query's"
            )


def hook_function(name: str, value: object) -> Callable[..., Any]:
    """A function that a hook point can call; InvalidTypeError for anything else.

    >>> hook_function("hook", lambda z: 0 * z)
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidTypeError: hook is <function ...; expected a function (activation, hook): it takes (z)
    """
    return called(name, value, "a function (activation, hook)", n_arguments=1, keywords=["hook"])


def described(function: Callable[..., Any]) -> str:
    """A hook function as an error message names it."""
    inner = getattr(function, "func", None)
    # The repr of a partial would hold its arguments, which may be large.
    return place_of(function) or (f"partial({described(inner)}, ...)" if callable(inner) else repr(function))


def _is_not_finite(x: Tensor) -> Tensor:
    return ~x.isfinite()


def _has(is_wrong: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether a tensor holds such a value, NaN or an infinity. Its sum alone is asked where it is finite."""
    if not x.is_floating_point() or x.is_meta:
        return False
    x = x.detach()
    total = x.sum().item()
    # The sum of finite numbers of half precision may be infinite.
    may_be = math.isnan(total) if is_wrong is torch.isnan else not math.isfinite(total)
    return may_be and bool(is_wrong(x).any())


def _kind(x: Tensor) -> tuple[Any, ...]:
    return tuple(x.shape), x.dtype, x.device
