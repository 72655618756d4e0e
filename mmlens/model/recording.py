"""Gathers what hook points hold in a run, and the gradients there: what `run_with_cache` makes a cache of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmlens.errors import InvalidValueError, StateError
from mmlens.model.hooks import Hook

OfOutput = bool | Callable[[Any], Tensor]
"""Of what number of a run's output gradients are asked for: of none, of the output itself, or of what a function
makes of it."""


class Recording:
    """The activations at `names` as hooks find them: `cache` by hook name, gradients as "<name>_grad".

    `copies` keeps what is found true where another hook may edit it in place. With layers on several devices each
    activation is on its own, unless `device` names one for all.
    """

    def __init__(
        self, names: list[str], *, gradients: bool, device: torch.device | str | None, copies: bool
    ) -> None:
        self.names, self.gradients = names, gradients
        self.cache: dict[str, Tensor] = {}
        self._device, self._copies = device, copies

    @property
    def fwd_hooks(self) -> list[Hook]:
        save = partial(self._save, suffix="")
        if not self.gradients:
            save.reads_only = True  # type: ignore[attr-defined]
        return [(name, save) for name in self.names]

    @property
    def bwd_hooks(self) -> list[Hook]:
        save = partial(self._save, suffix="_grad")
        return [(name, save) for name in self.names if self.gradients]

    def missing(self, *, gradients: bool) -> list[str]:
        """What never came, in the order of `names`."""
        wanted = [*self.names, *(f"{name}_grad" for name in self.names if gradients)]
        return [name for name in wanted if name not in self.cache]

    def _save(self, tensor: Tensor, hook: Any, *, suffix: str) -> None:
        name = hook.name + suffix
        value = tensor.detach().to(self._device) if self._device is not None else tensor.detach()
        if self._copies:
            value = value.clone()
        if name in self.cache:
            fill = float("-inf") if name.endswith("hook_attn_scores") else 0.0
            value = _stack_chunks(self.cache[name], value, fill)
        self.cache[name] = value


def _stack_chunks(before: Tensor, chunk: Tensor, fill: float) -> Tensor:
    """Append one attention call's activation on the first axis, both padded to the larger size on the others."""
    sizes = [max(pair) for pair in zip(before.shape[1:], chunk.shape[1:], strict=True)]

    def padded(x: Tensor) -> Tensor:
        amounts = [
            n
            for size, have in zip(reversed(sizes), reversed(x.shape[1:]), strict=True)
            for n in (0, size - have)
        ]
        return nn.functional.pad(x, amounts, value=fill)

    return torch.cat([padded(before), padded(chunk)])


def loss_of(output: Any, function: OfOutput) -> Tensor:
    """The one number of a run's output whose gradient is asked for.

    Raises InvalidValueError where it is not one number, StateError where it has no gradient.
    """
    loss = function(output) if callable(function) else output
    if isinstance(loss, tuple) and not callable(function):
        # return_type="both"
        loss = loss[-1]
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InvalidValueError(
            f"incl_bwd takes the gradient of one number, and {'its function' if callable(function) else 'the run'} "
            f"gave {given}: pass return_type='loss', or a function of the logits, "
            "incl_bwd=lambda logits: logits[0, -1, 7]"
        )
    if not loss.requires_grad:
        raise StateError(
            "incl_bwd needs gradients, and this run has none: leave torch.no_grad(), and let the parameters have them "
            "(hf_model.requires_grad_(True))"
        )
    return loss
