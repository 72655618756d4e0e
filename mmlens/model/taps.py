"""Hook points on the inputs and outputs of unmodified modules.

A tap is attached to its module only while one of its hook points is live, so an idle model runs at the
speed of the plain one. A step is one view of the tensor with the hook point that sees it: the whole
tensor, its heads, its rows at image positions.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakMethod, WeakSet

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint, LensHandle

from mmlens.errors import InvalidValueError, UnsupportedError
from mmlens.families.anatomy import Projection, epsilon_of
from mmlens.internals import (
    Side,
    attach,
    detach,
    drop_unlisted,
    has_functions,
    stream_in,
    with_output,
    with_stream,
)
from mmlens.interrupts import undone
from mmlens.model.checked_hooks import CheckedHook, hook_function
from mmlens.model.linear import unadapted, weight_of
from mmlens.model.watch import Watch, refuse_saving


class LazyHookPoint(HookPoint):
    """A TransformerLens HookPoint that tells its taps, and the model's watch, when it gets a first hook or loses its
    last. What a hook function gives is checked (`CheckedHook`)."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch
        # Weakly: a tap holds its points, and a ring of both would keep the model's memory.
        self.taps: WeakSet[ModuleTap] = WeakSet()

    @property
    def is_live(self) -> bool:
        return bool(self.fwd_hooks or self.bwd_hooks)

    @property
    def functions(self) -> list[Callable[..., Any]]:
        """The hook functions that are set, as they were given."""
        return [_function(handle) for handle in (*self.fwd_hooks, *self.bwd_hooks)]

    @property
    def first_position(self) -> int:
        """The first position of the prompt that a hook may touch, as the hooks state; 0 where one states none."""
        if self.bwd_hooks:
            return 0
        return min((getattr(_function(handle), "first_position", 0) for handle in self.fwd_hooks), default=0)

    def add_hook(self, hook: Any, *args: Any, **kwargs: Any) -> LensHandle:
        """As in TransformerLens. Raises StateError where another thread, or another HookedVLM of the same Hugging
        Face model, has hooks set."""
        is_backward = "bwd" in (*args[:1], kwargs.get("dir"))
        checked = (
            hook if isinstance(hook, CheckedHook) else CheckedHook(hook_function("hook", hook), is_backward)
        )
        handles: list[LensHandle] = []

        def add() -> None:
            self.watch.add(self)
            handle: Any = super(LazyHookPoint, self).add_hook(checked, *args, **kwargs)
            handle.checked = checked
            handle.user_hook = checked.function
            self._settle()
            handles.append(handle)

        # An interrupt, or a refusal, leaves no half of a hook.
        undone(add, lambda: None if handles else self.drop([checked]))
        return handles[0]

    def clear_context(self) -> None:
        # TransformerLens deletes it first, and an interrupt would leave none.
        self.ctx: dict[Any, Any] = {}

    def remove_hooks(self, *args: Any, **kwargs: Any) -> None:
        # Of an add_hook that was interrupted, torch may hold a hook that stands in no list.
        if not (self.is_live or has_functions(self) or self in self.watch):
            return
        undone(lambda: super(LazyHookPoint, self).remove_hooks(*args, **kwargs), self._settle)

    def drop(self, hooks: Container[CheckedHook]) -> None:
        """Remove these hooks; harmless where they are gone already."""
        for name in ("fwd_hooks", "bwd_hooks"):
            kept = [handle for handle in getattr(self, name) if _checked(handle) not in hooks]
            setattr(self, name, kept)
        self._settle()

    def _settle(self) -> None:
        """Bring what depends on the lists of hooks to their state."""
        drop_unlisted(self)
        for tap in self.taps:
            tap.refresh()
        if not self.is_live:
            self.watch.discard(self)


def _checked(handle: LensHandle) -> Any:
    return getattr(handle, "checked", handle.user_hook)


def _function(handle: LensHandle) -> Any:
    hook = handle.user_hook
    return hook.function if isinstance(hook, CheckedHook) else hook


@dataclass(frozen=True, eq=False)
class Step:
    """One or more hook points and what they do to the tensor: `apply(tensor, module, inputs) -> tensor`."""

    hook_points: Sequence[LazyHookPoint]
    apply: Callable[[Tensor, nn.Module, tuple[Any, ...]], Tensor]

    @property
    def is_live(self) -> bool:
        return any(point.is_live for point in self.hook_points)


class ModuleTap:
    """Runs its live steps, in order, on the first input or the first output of `module` (on each of a list).

    `n_rows` says how many prompts the batch has, where steps expect [batch, pos, ...]: some layers hand their
    MLP one flat axis [batch * pos].
    """

    def __init__(
        self,
        module: nn.Module,
        side: Side,
        steps: Sequence[Step],
        n_rows: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.module, self.side, self.steps, self.n_rows = module, side, tuple(steps), n_rows
        for step in self.steps:
            for point in step.hook_points:
                point.taps.add(self)

    def refresh(self) -> None:
        hook = self._on_input if self.side == "input" else self._on_output
        if any(step.is_live for step in self.steps):
            # Prepended: transformers records hidden states by forward hooks of its own, and must record the edit.
            attach(self.module, self.side, hook, prepend=True)
        else:
            detach(self.module, self.side, hook)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleTap:
        # A copy of the Hugging Face model is a plain one, even while hooks are set on the original.
        return ModuleTap(nn.Identity(), self.side, ())

    def __reduce__(self) -> Any:
        refuse_saving()

    def _run(self, tensor: Tensor, inputs: tuple[Any, ...]) -> Tensor:
        n_rows = self.n_rows() if tensor.ndim == 2 else None
        if n_rows is not None:
            tensor = tensor.unflatten(0, (n_rows, -1))
        for step in self.steps:
            if step.is_live:
                tensor = step.apply(tensor, self.module, inputs)
        return tensor if n_rows is None else tensor.flatten(0, 1)

    def _on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = stream_in(args, kwargs)
        return with_stream(args, kwargs, self._run(first, args or (first,)))

    def _on_output(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        inputs = args or tuple(kwargs.values())
        return with_output(output, lambda tensor: self._run(tensor, inputs))


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method that does not keep its object alive."""
    held = WeakMethod(method)

    def call(*args: Any) -> Any:
        bound = held()
        assert bound is not None, "the hooks of a model that is gone cannot fire"
        return bound(*args)

    return call


ImageMask = Callable[[Tensor], Tensor | None]
"""Gives the boolean mask of image positions for a tensor [batch, pos, ...], or None where the run has none."""


def whole(point: LazyHookPoint) -> Step:
    """The tensor as it is."""
    return Step([point], lambda x, module, inputs: point(x))


def of_features(point: LazyHookPoint) -> Step:
    """The tensor as it is, where the module reads features: Ovis' table of visual words also embeds ids."""
    return Step([point], lambda x, module, inputs: point(x) if inputs[0].is_floating_point() else x)


def branch(point: LazyHookPoint) -> Step:
    """A copy that only this reader sees: an edit, in place or not, leaves the residual stream alone."""
    return Step([point], lambda x, module, inputs: point(x.clone()))


def scaled(steps: Sequence[Step], scale: Callable[[], Tensor | float | None]) -> list[Step]:
    """Steps that see the tensor times `scale`, as it enters the residual stream; reading changes no bit."""

    def seen_scaled(step: Step) -> Step:
        def apply(x: Tensor, module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
            factor = torch.as_tensor(scale(), dtype=x.dtype, device=x.device)
            return x + _before(factor, step.apply(x * factor, module, inputs) - x * factor, module)

        return Step(step.hook_points, apply)

    return [seen_scaled(step) for step in steps]


def _before(factor: Tensor, change: Tensor, module: nn.Module) -> Tensor:
    """The change of a branch's output that becomes `change` once it is multiplied by the layer's factor."""
    shut = factor == 0
    if bool(shut.any()) and bool((change * shut).any()):
        raise InvalidValueError(
            f"what {type(module).__name__} adds to the stream is multiplied by a gate of exactly 0: it can be "
            "read, but no edit of it can reach the stream"
        )
    return change / factor.masked_fill(shut, 1)


def heads(point: LazyHookPoint, d_head: int) -> Step:
    """[..., head * d_head] seen as [..., head, d_head]."""
    return Step([point], lambda x, module, inputs: point(x.unflatten(-1, (-1, d_head))).flatten(-2))


def projected_heads(point: LazyHookPoint, projection: Projection) -> Step:
    """The heads that a projection's output holds, alone or beside others."""

    def apply(x: Tensor, module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
        # Latent attention projects its keys and values as [batch, 1, pos, ...].
        output = x.squeeze(1) if x.ndim == 4 else x
        return projection.write(output, point(projection.read(output))).reshape(x.shape)

    return Step([point], apply)


def image_rows(point: LazyHookPoint, image_mask: ImageMask, d_head: int | None = None) -> Step:
    """The rows at image positions, packed [image_token, ...] in batch-major order; skipped where there are none."""

    def apply(x: Tensor, module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
        mask = image_mask(x)
        if mask is None:
            return x
        rows = x[mask]
        edited = point(rows if d_head is None else rows.unflatten(-1, (-1, d_head)))
        return x.index_put((mask,), edited if d_head is None else edited.flatten(-2))

    return Step([point], apply)


def normalization(scale_point: LazyHookPoint, normalized_point: LazyHookPoint) -> Step:
    """hook_scale and hook_normalized of a LayerNorm or RMSNorm, before its weight and bias.

    The module's own output is kept and only the change that a hook made is added, so that reading is exact.
    """

    def apply(out: Tensor, module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
        x = inputs[0].to(out.device).float().reshape(out.shape)
        gain, centred, eps = norm_arithmetic(module, x.shape[-1], out)
        if centred:
            x = x - x.mean(-1, keepdim=True)
        scale = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        clean = (x / scale).to(out.dtype)
        normalized = normalized_point((x / scale_point(scale.clone())).to(out.dtype))
        return out + (normalized - clean) * gain

    return Step([scale_point, normalized_point], apply)


@torch.no_grad()
def norm_arithmetic(norm: nn.Module, width: int, like: Tensor) -> tuple[Tensor, bool, float]:
    """What a norm multiplies the normalized vector by, whether it subtracts the mean first, and its epsilon.

    Classes disagree on whether the weight is stored less one, so the norm is asked: its response to a vector
    of alternating ones (mean 0, mean square 1) is its gain, and only a norm that subtracts the mean maps a
    constant to its bias.
    """
    eps = epsilon_of(unadapted(norm))
    if eps is None:
        raise UnsupportedError(f"{type(norm).__name__} has no epsilon that mmlens knows of")
    weight = next(norm.parameters(), like)
    # accelerate brings its inputs to an offloaded norm by itself.
    ones = torch.ones(1, 1, width, dtype=like.dtype, device=like.device if weight.is_meta else weight.device)
    alternating = ones.clone()
    alternating[..., 1::2] = -1
    # `forward`, not the module itself: a probe must not fire hooks.
    plus, minus, level = (norm.forward(x).to(like.device) for x in (alternating, -alternating, ones))
    gain = (plus - minus) / 2 * alternating.to(like.device) * (1 + eps) ** 0.5
    bias = (plus + minus) / 2
    centred = bool((level - bias).abs().mean() < 0.1 * gain.abs().mean())
    return gain[0, 0], centred, eps


def forked_input(point: LazyHookPoint, projection: Projection, norm: nn.Module) -> tuple[Step, Step]:
    """hook_q_input and its like: one copy of the stream per head [..., head, d_model], read by that head alone.

    The first step, on the norm's input, remembers the stream; the second, on the projection's output, adds to
    each head W_h (norm(edited copy) - norm(stream)), which is exactly nothing where a copy was not edited.
    """
    stream: list[Tensor] = []

    def at_norm(x: Tensor, module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
        stream[:] = [x]
        return x

    def at_projection(out: Tensor, module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
        projected, x = projection.read(out), stream.pop().unsqueeze(-2)
        edited = point(x.expand(*x.shape[:-2], projected.shape[-2], -1).clone())
        same = (edited == x).all(-1, keepdim=True)
        gained = norm.forward(edited) - norm.forward(x)
        # Rounding is taken away where nothing was edited, but not the gradient.
        gained = gained - gained.detach().masked_fill(~same, 0.0)
        weight = projection.read(weight_of(module, out).T)
        return projection.write(out, projected + torch.einsum("...hm,mhd->...hd", gained, weight))

    return Step([point], at_norm), Step([point], at_projection)


def head_results(
    point: LazyHookPoint, d_head: int, scale: Callable[[], Tensor | float | None] = lambda: None
) -> Step:
    """hook_result: what each head adds to the attention output, z_h W_O[h] times `scale`, as [..., head, d_model].

    As with the norms, the module's own output is kept and the change of the sum over heads is added.
    """

    def apply(out: Tensor, module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
        z = inputs[0].to(out.device).unflatten(-1, (-1, d_head))
        w_o = weight_of(module, out).T.unflatten(0, (-1, d_head))
        known = scale()
        factor = torch.as_tensor(1.0 if known is None else known, dtype=out.dtype, device=out.device)
        result = torch.einsum("...hd,hdm->...hm", z, w_o) * factor
        clean = result.sum(-2)
        return out + _before(factor, point(result).sum(-2) - clean, module)

    return Step([point], apply)


def residual_mid(steps: Sequence[Step]) -> Step:
    """hook_resid_mid: an edit must reach the MLP AND the residual stream around it.

    transformers keeps the stream in a local variable that no module sees; what the MLP branch reads is that
    same tensor, so an edit is written into it.
    """

    def apply(x: Tensor, module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
        for step in steps:
            if step.is_live:
                edited = step.apply(x, module, inputs)
                if edited is not x:
                    x.copy_(edited)
        return x

    return Step([point for step in steps for point in step.hook_points], apply)


def between_layers(point: LazyHookPoint, image_mask: ImageMask) -> tuple[Step, Step]:
    """hook_deepstack: what the stream gains at image positions between one layer's output and the next one's input.

    The first step, last on a layer's output, remembers it; the second, first on the next layer's input, takes
    the difference.
    """
    before: list[Tensor] = []

    def at_output(x: Tensor, module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
        before[:] = [x.clone()]
        return x

    def at_input(x: Tensor, module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
        mask = image_mask(x)
        if mask is None or not before:
            return x
        gained = x[mask] - before.pop()[mask]
        edited = point(gained.clone())
        return x.index_put((mask,), edited - gained, accumulate=True)

    return Step([point], at_output), Step([point], at_input)
