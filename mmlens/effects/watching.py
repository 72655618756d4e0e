"""What hooks did: how often each fired, and how much it changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.errors import InvalidValueError
from mmlens.interventions.edits import Edit
from mmlens.model.checked_hooks import CountedHook
from mmlens.model.hooks import Hook, HookName

HookDone = tuple[str, int, float]
"""A hook's name, how often it fired, and the largest change that it made."""


class _MeasuredHook(CountedHook):
    """A hook function that keeps the size of its changes, against copies taken before."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name, self._function = name, function
        self._sizes: list[Tensor] = []

    @property
    def largest(self) -> float:
        # Not `size`, by which a block of hooks knows edits: this one may only read.
        return max((float(size) for size in self._sizes), default=0.0)

    def act(self, x: Tensor, hook: Any) -> Any:
        before = x.detach().clone()
        result = self._function(x, hook=hook)
        after = result if isinstance(result, Tensor) else x
        if after.shape != before.shape:
            raise InvalidValueError(
                f"the hook on {self._name} gave a tensor {list(after.shape)} for an activation {list(before.shape)}"
            )
        if before.numel():
            self._sizes.append(_largest_change(before, after.detach()))
        return result


@dataclass(frozen=True, eq=False)
class WatchedHook:
    """A hook and what it did: `fired` counts its calls, `size` is the largest absolute change of one element.

    `hook` is what to set in its place. Masking a score (to -inf) has size inf.
    """

    name: str
    hook: Hook
    _account: Edit | _MeasuredHook

    @property
    def fired(self) -> int:
        return self._account.fired

    @property
    def size(self) -> float:
        return self._account.size if isinstance(self._account, Edit) else self._account.largest

    @property
    def done(self) -> HookDone:
        return self.name, self.fired, self.size


def watched(hooks: Sequence[Hook]) -> list[WatchedHook]:
    """Each hook with a count of its calls and the size of its changes; set `[each.hook for each in watched(hooks)]`.

    An `Edit` that has not fired yet counts for itself. Any other function is wrapped: what it returns, or the tensor
    that it edited in place, is compared with a copy taken before. A hook set by a filter goes by the filter's name.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> hooks = watched([("hook_embed", lambda x, hook: x + 2)])
    >>> _ = model.run_with_hooks(model.prompt("What colour is K"), fwd_hooks=[each.hook for each in hooks])
    >>> hooks[0].name, hooks[0].fired, round(hooks[0].size, 3)
    ('hook_embed', 1, 2.0)
    """
    return [_watch(name, function) for name, function in hooks]


def _watch(point: HookName, function: Callable[..., Any]) -> WatchedHook:
    name = point if isinstance(point, str) else getattr(point, "__name__", repr(point))
    # One that has fired before would report that too.
    account = function if isinstance(function, Edit) and not function.fired else _MeasuredHook(name, function)
    return WatchedHook(name, (point, account), account)


def _largest_change(before: Tensor, after: Tensor) -> Float[Tensor, ""]:
    """Largest |after - before|: 0 where both are one infinity or both NaN, infinite where one of them is NaN."""
    dtype = torch.promote_types(before.dtype, torch.float32)
    before, after = before.to(dtype), after.to(device=before.device, dtype=dtype)
    alike = (after == before) | (after.isnan() & before.isnan())
    change = (after - before).abs().masked_fill(alike, 0.0)
    return change.nan_to_num(nan=torch.inf, posinf=torch.inf).max()


def hook_report(of_prompts: Iterable[Sequence[HookDone]]) -> pd.DataFrame:
    """One row per hook - hook, fired, size - from the (name, fired, size) of every prompt's hooks.

    `fired` is summed over prompts, `size` is the largest. The second hook that a prompt has on one point is the same
    row as the second that another prompt has there.

    >>> hook_report([[("hook_embed", 1, 0.5)], [("hook_embed", 1, 2.0)]]).to_dict("records")
    [{'hook': 'hook_embed', 'fired': 2, 'size': 2.0}]
    """
    totals = HookTotals()
    for hooks in of_prompts:
        totals.add(hooks)
    return totals.table()


class HookTotals:
    """What hooks did over many prompts, added up: the rows of `hook_report`."""

    def __init__(self) -> None:
        self._totals: dict[tuple[str, int], tuple[int, float]] = {}

    def add(self, hooks: Sequence[HookDone]) -> None:
        """The hooks of one prompt."""
        seen: Counter[str] = Counter()
        for name, fired, size in hooks:
            seen[name] += 1
            before, largest = self._totals.get((name, seen[name]), (0, 0.0))
            self._totals[name, seen[name]] = before + fired, max(largest, size)

    def table(self) -> pd.DataFrame:
        rows = [(name, fired, size) for (name, _), (fired, size) in self._totals.items()]
        return pd.DataFrame(rows, columns=["hook", "fired", "size"])
