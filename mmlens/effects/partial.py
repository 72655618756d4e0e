"""Partial runs: the end of a forward pass, from one layer and one position on, for many interventions at once.

1. `CleanRun.of` runs the prompt once and keeps what partial runs start from: the residual stream into every layer, what
   the stream gains between layers, keys and values as attention used them, and attention's output.
2. `CleanRun.partial` runs the model again with a stand-in for every layer. Stand-ins before the first layer do nothing;
   the others call the real layer on the stream in hand, cut to the positions from the first one on and stacked once per
   intervention. The model itself makes masks, rotations, logits - all that a layer is given - so nothing of a family is
   written here. Attention gets the clean keys and values of the positions before.
3. A partial run without edits must give the clean logits, and one with an edit what it gives in a whole run:
   `check` and `check_edited` compare. What is not exact is not taken.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmlens import internals
from mmlens.effects.shared_keys import shared_key_attention
from mmlens.errors import InvalidValueError, StateError
from mmlens.hook_names import block
from mmlens.internals import Side, attach, detach
from mmlens.interrupts import Temporary, undone
from mmlens.interventions.edits import Edit
from mmlens.model.attention import Around, Attend, AttentionCall, AttentionTap
from mmlens.model.checked_hooks import CheckedHook
from mmlens.model.choosing import if_any
from mmlens.model.evaluation import check_same_twice
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import Hook
from mmlens.model.prompt import Prompt
from mmlens.model.run_state import Span

T = TypeVar("T")

_MOST_SCORES = 2**26
"""More scores than this at once are left to the model's own attention function, which needs no room for them."""


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class NotExactError(StateError):
    """A partial run without edits that did not give the clean logits."""


@dataclass
class CleanRun:
    """One prompt's clean run, in the pieces that partial runs start from."""

    model: HookedVLM
    prompt: Prompt
    logits_to_keep: int
    logits: Float[Tensor, "batch kept vocab"] = field(init=False)
    streams: list[Tensor] = field(default_factory=list)
    """What enters each layer, and at the end what leaves the last one."""
    gains: dict[int, Tensor] = field(default_factory=dict)
    """What the stream gains between a layer and the next, where it gains anything (deep injection)."""
    outputs: list[Any] = field(default_factory=list)
    """What each layer gives, without the stream: a tuple's further entries, or None where it gives the stream alone."""
    calls: dict[int, list[CleanKeys]] = field(default_factory=dict)
    """What each layer's calls of the attention function attended to."""
    attention: dict[int, AttentionEnd] = field(default_factory=dict)
    """How each attention module ended, where it ends with W_O."""

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, positions)."""
        batch, length = self.prompt.shape
        return batch, length

    @property
    def n_layers(self) -> int:
        return len(self.streams) - 1

    @classmethod
    @torch.no_grad()
    def of(cls, model: HookedVLM, prompt: Prompt, logits_to_keep: int = 1) -> CleanRun:
        """Run the prompt with no hook and keep the pieces. Raises ValueError where a layer does not run once."""
        check_same_twice(model.hf_model)
        clean = cls(model, prompt, logits_to_keep)
        logits = _Recorder(clean).recorded(
            lambda: model(prompt, logits_to_keep=logits_to_keep, use_cache=False)
        )
        clean.logits = logits[:, -logits_to_keep:]
        return clean

    def cut_before(self, position: int) -> int:
        """The last position at or before `position` at which a run may be cut; 0 where there is none."""
        latest = max(self.shape[1] - max(self.logits_to_keep, 1), 0)
        return next(at for at in range(min(position, latest), -1, -1) if self.cuts[at])

    def partial(
        self,
        layer: int,
        first: int,
        hooks: Sequence[Sequence[Hook]],
        *,
        attention_is_clean: bool = False,
        may_trim: bool = False,
    ) -> Float[Tensor, "intervention batch kept vocab"]:
        """Logits under each of several interventions, from layer `layer` and position `first` on.

        `hooks[i]` are intervention i's, which must touch nothing before. `attention_is_clean`: none of them touches
        layer `layer` before attention's output, which is then taken from the clean run. `may_trim`: the functions on
        the last layer know which positions they are given, so that it may run at the kept positions alone.
        """
        return _Replay(self, layer, first, hooks, attention_is_clean, may_trim).run()

    def check(self, layer: int, first: int, copies: int, tolerance: float) -> None:
        """Raise NotExactError unless `copies` stacked runs without edits all give the clean logits, to `tolerance` of
        their largest value."""
        self._compare(self._tried(layer, first, [()] * copies), [self.logits] * copies, tolerance)

    def check_edited(self, first: int, copies: int, tolerance: float) -> None:
        """Raise NotExactError unless an edit at layer 0 gives what it gives in a whole run, and leaves the runs
        stacked with it alone. It reaches all that depends on the stream."""
        name = block(0, "hook_resid_pre")
        mask = ~self.prompt.token_map.is_padding
        mask[:, :first] = False
        edit = Edit(self.model, self.prompt, name, lambda x, here: 1.5 * x, positions=if_any(mask))
        hooks: list[Hook] = [(name, edit)]
        with torch.no_grad():
            whole = self.model.run_with_hooks(
                self.prompt, fwd_hooks=hooks, logits_to_keep=self.logits_to_keep, use_cache=False
            )
        rows = [hooks, *[()] * (copies - 1)]
        expected = [whole[:, -self.logits.shape[1] :], *[self.logits] * (copies - 1)]
        self._compare(self._tried(0, first, rows), expected, tolerance)

    def _tried(self, layer: int, first: int, hooks: Sequence[Sequence[Hook]]) -> Tensor:
        try:
            return self.partial(layer, first, hooks, may_trim=True)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise NotExactError(f"{type(error).__name__}: {error}") from error

    def _compare(self, logits: Tensor, expected: Sequence[Tensor], tolerance: float) -> None:
        if logits.shape[1:] != self.logits.shape:
            raise NotExactError(f"logits {list(logits.shape[1:])} instead of {list(self.logits.shape)}")
        real = ~self.prompt.token_map.is_padding[:, -self.logits.shape[1] :].to(self.logits.device)
        for own, true in zip(logits, expected, strict=True):
            difference = (own - true)[real].abs().max()
            if not bool(difference <= tolerance * true[real].abs().max()):
                raise NotExactError(f"its logits are off by {float(difference):.2g}")

    @functools.cached_property
    def cuts(self) -> list[bool]:
        """For every position whether no earlier one attends to it or to a later one: where a run may be cut."""
        length = self.shape[1]
        return [True] + [False] * (length - 1) if self.no_cut else _cuts(self.calls, length)

    @functools.cached_property
    def no_cut(self) -> str:
        """Why runs cannot be cut at positions, where they cannot."""
        return self.whole or self._why_no_cut()

    @functools.cached_property
    def whole(self) -> str:
        """Why no partial run is exact, where none is: an edit would not reach what passes beside the stream."""
        own = sorted(set(self.gains) - set(self.model.anatomy.deep_after))
        if own:
            return f"the model itself changes the stream between layers {own[0]} and {own[0] + 1}"
        for layer, output in enumerate(self.outputs):
            if any(isinstance(entry, Tensor) for entry in output or ()):
                return f"layer {layer} hands on more than the stream"
        return ""

    def _why_no_cut(self) -> str:
        length = self.shape[1]
        if self.logits_to_keep == 0:
            return "the metric reads the logits of all positions"
        for layer, parts in enumerate(self.model.anatomy.language):
            calls = self.calls.get(layer, [])
            if parts.attention is None:
                return f"layer {layer} mixes positions without softmax attention"
            if len(calls) != 1:
                return f"layer {layer} calls attention {len(calls)} times"
            if calls[0].key.shape[2] != length:
                return f"layer {layer} attends to {calls[0].key.shape[2]} keys, not to the prompt's positions"
            mask = calls[0].mask
            if mask is not None and not (isinstance(mask, Tensor) and mask.shape[-2:] == (length, length)):
                return f"layer {layer} has a mask that says less than its attention does"
        return ""


@dataclass
class CleanKeys:
    """What one call of an attention function attended to in the clean run."""

    key: Tensor
    value: Tensor
    mask: Tensor | None
    is_causal: bool


@dataclass
class AttentionEnd:
    """The last step of an attention module: `out` (W_O) read `z`, and what it gave is what the module gives, alone
    or followed by `rest`."""

    module: nn.Module
    out: nn.Module
    z: Tensor
    rest: tuple[Any, ...] | None

    def alone(self, z: Tensor) -> Temporary[None]:
        """Inside the block the module does this step alone, on another z."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            attended = self.out(z)
            return attended if self.rest is None else (attended, *self.rest)

        return internals.forward_replaced(self.module, forward)


# ---------------------------------------------------------------------- recording


class _Recorder:
    """Fills a clean run's pieces while the model runs."""

    def __init__(self, clean: CleanRun) -> None:
        self.clean, self.model = clean, clean.model
        self._left: Tensor | None = None
        """What the latest layer gave."""
        self._ended: tuple[Tensor, Tensor] | None = None
        """What the latest W_O read and gave."""

    def recorded(self, run: Callable[[], T]) -> T:
        """What `run()` gives, its pieces recorded. Raises ValueError where a layer did not run once."""
        anatomy = self.model.anatomy
        # What is hooked where: known before the first is set, so that all are found again.
        hooks: list[tuple[nn.Module, Side, Callable[..., Any]]] = []
        for layer in anatomy.layers:
            hooks += [(layer, "input", self._on_input), (layer, "output", self._on_output)]
        for index, parts in enumerate(anatomy.language):
            if parts.attention is not None:
                module, out = parts.attention.module, parts.attention.out
                hooks.append((out, "output", self._on_attention_out))
                hooks.append((module, "output", functools.partial(self._on_attention, index, out)))

        def recording() -> T:
            self.model.watch.add(self)
            for module, side, hook in hooks:
                attach(module, side, hook)
            arounds = {layer: self._attention(layer) for layer in self.model.attention_layers}
            return _around_attention(self.model, arounds).around(run)

        def undo() -> None:
            for module, side, hook in hooks:
                detach(module, side, hook)
            self.model.watch.discard(self)

        result = undone(recording, undo)
        clean, n_layers = self.clean, len(anatomy.layers)
        if len(clean.streams) != n_layers or len(clean.outputs) != n_layers or self._left is None:
            raise InvalidValueError(f"{len(clean.outputs)} layer calls in a model of {n_layers} layers")
        clean.streams.append(self._left)
        return result

    def _on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model.watch.check_thread()
        # A model may write into the stream after a layer, so it is copied.
        stream = internals.stream_in(args, kwargs).clone()
        if self._left is not None:
            gained = stream - self._left.to(stream.device)
            if bool(gained.any()):
                self.clean.gains[len(self.clean.streams) - 1] = gained
        self.clean.streams.append(stream)

    def _on_output(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self._left = internals.stream_out(output).clone()
        self.clean.outputs.append(internals.rest_of(output))

    def _on_attention_out(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self._ended = (args[0], output) if args and isinstance(output, Tensor) else None

    def _on_attention(
        self,
        layer: int,
        out: nn.Module,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        ended, self._ended = self._ended, None
        # A second call has its own keys, and no single end.
        if ended is None or len(self.clean.calls.get(layer, ())) != 1 or internals.moves_weights(module):
            self.clean.attention.pop(layer, None)
            return
        z, given = ended
        attended = internals.stream_out(output)
        if isinstance(attended, Tensor) and attended.shape == given.shape and torch.equal(attended, given):
            self.clean.attention[layer] = AttentionEnd(module, out, z, internals.rest_of(output))

    def _attention(self, layer: int) -> Around:
        def around(attend: Attend, call: AttentionCall) -> tuple[Tensor, Any]:
            parts = self.model.anatomy.language[layer].attention
            causal = internals.is_causal(parts.module if parts else None, call.options.get("is_causal"))
            self.clean.calls.setdefault(layer, []).append(CleanKeys(call.key, call.value, call.mask, causal))
            return attend(call)

        return around


def _cuts(calls: Mapping[int, Sequence[CleanKeys]], length: int) -> list[bool]:
    """For every position whether no position before it attends to it or further on, in any layer."""
    possible = torch.ones(length, dtype=torch.bool)
    seen: set[tuple[int, bool]] = set()
    for own in calls.values():
        mask, is_causal = own[0].mask, own[0].is_causal
        if (id(mask), is_causal) in seen:
            continue
        seen.add((id(mask), is_causal))
        if mask is None:
            if not is_causal:
                possible[1:] = False
            continue
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        # [query, key] over examples and heads; the furthest key that a position or one before it sees.
        allowed = allowed.flatten(0, -3).any(0)[:, :length].cpu()
        furthest = (allowed * torch.arange(1, length + 1)).amax(-1).cummax(0).values
        possible[1:] &= furthest[:-1] <= torch.arange(1, length)
    return possible.tolist()


# ---------------------------------------------------------------------- replaying


class _StopAtAttentionError(Exception):
    """Raised inside a layer once its keys and values are known."""


class _Replay:
    def __init__(
        self,
        clean: CleanRun,
        layer: int,
        first: int,
        hooks: Sequence[Sequence[Hook]],
        attention_is_clean: bool,
        may_trim: bool,
    ) -> None:
        self.clean, self.layer, self.first, self.n = clean, layer, first, len(hooks)
        self.model = clean.model
        self.hooks = hooks
        self.attention_is_clean = attention_is_clean
        length, keep = clean.shape[1], clean.logits_to_keep
        self.kept_from = length - keep if may_trim and keep and not clean.no_cut else first
        if not clean.cuts[self.kept_from] or internals.moves_weights(self.model.anatomy.layers[-1]):
            self.kept_from = first
        self.state: Tensor | None = None

    @torch.no_grad()
    def run(self) -> Float[Tensor, "intervention batch kept vocab"]:
        model, keep = self.model, self.clean.logits_to_keep
        hooks = _stacked_hook(model, self.hooks)
        replaced = internals.layers_replaced(model.anatomy.layers, self._call)

        def run() -> Tensor:
            model.watch.add(self)
            given: Tensor = replaced.around(
                lambda: model.run_with_hooks(
                    self.clean.prompt, fwd_hooks=hooks, logits_to_keep=keep, use_cache=False
                )
            )
            return given

        logits = undone(run, lambda: model.watch.discard(self))
        # Some families give the logits of all positions, whatever is asked for.
        return logits[:, -keep:].unflatten(0, (self.n, self.clean.shape[0]))

    def _call(self, index: int, layer: nn.Module) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
        clean, is_last = self.clean, index == self.clean.n_layers - 1

        def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.model.watch.check_thread()
            given = internals.stream_in(args, kwargs)
            if index >= self.layer:
                if self.state is None:
                    self.state = self._stacked(clean.streams[index][:, self.first :])
                self._run_layer(index, layer, args, kwargs)
                if index in clean.gains:
                    self.state = self.state + self._stacked(clean.gains[index][:, self.first :])
            stream: Tensor | None = given
            if is_last:
                if self.state is None:
                    self._place(self.first)
                    self.state = self._stacked(clean.streams[-1][:, self.first :])
                stream = self.state
            rest = clean.outputs[index]
            return stream if rest is None else (stream, *rest)

        return call

    def _run_layer(self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        known = self.clean.calls[index][0] if index in self.clean.calls else None
        first, own = self.first, None
        end = self.clean.attention.get(index) if index == self.layer and self.attention_is_clean else None
        if index == self.clean.n_layers - 1 and self.kept_from > first:
            first = self.kept_from
            if end is None:
                own = self._keys_and_values(index, layer, args, kwargs, first)
            assert self.state is not None
            self.state = self.state[:, first - self.first :]
        around: Around | None = None
        if known is not None and first and end is None:
            around = self._attention(self.model.attention_tap(index), known, own, first)
        self._place(first)
        given_args, given_kwargs = self._given(layer, args, kwargs, first)

        def run() -> Any:
            return layer(*given_args, **given_kwargs)

        def ended() -> Any:
            return run() if end is None else end.alone(self._stacked(end.z[:, first:])).around(run)

        arounds = {} if around is None else {index: around}
        self.state = internals.stream_out(_around_attention(self.model, arounds).around(ended))

    def _keys_and_values(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], stop: int
    ) -> tuple[Tensor, Tensor]:
        """A layer's keys and values at the positions up to `stop` that run; the layer is left before it attends."""
        found: list[Tensor] = []

        def around(attend: Attend, call: AttentionCall) -> tuple[Tensor, Any]:
            found[:] = [call.key, call.value]
            raise _StopAtAttentionError

        self._place(self.first)
        given_args, given_kwargs = self._given(layer, args, kwargs, self.first)
        with suppress(_StopAtAttentionError):
            _around_attention(self.model, {index: around}).around(lambda: layer(*given_args, **given_kwargs))
        key, value = (x[:, :, : stop - self.first] for x in found)
        return key, value

    def _attention(
        self, tap: AttentionTap, known: CleanKeys, own: tuple[Tensor, Tensor] | None, first: int
    ) -> Around:
        """Attention to the clean keys before `self.first`, the stacked runs' own keys after, and those at hand."""
        clean_key, clean_value = known.key[:, :, : self.first], known.value[:, :, : self.first]

        def around(attend: Attend, call: AttentionCall) -> tuple[Tensor, Any]:
            query, key, value, mask, options = call.query, call.key, call.value, call.mask, call.options
            if own is not None:
                key, value = torch.cat([own[0], key], 2), torch.cat([own[1], value], 2)
            n_scores = query.shape[:3].numel() * self.first
            if self.first and n_scores <= _MOST_SCORES and tap.is_plain(options):
                scaling = options.get("scaling")
                z = shared_key_attention(query, clean_key, clean_value, key, value, mask, scaling)
                return z, None
            key = torch.cat([self._stacked(clean_key), key], 2)
            value = torch.cat([self._stacked(clean_value), value], 2)
            if mask is None and query.shape[2] > 1:
                mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
                mask = mask.tril(first)[None, None]
                options = {**options, "is_causal": False} if "is_causal" in options else options
            return attend(AttentionCall(query, key, value, mask, options))

        return around

    def _stacked(self, x: Tensor) -> Tensor:
        """[batch, ...] once per intervention, intervention by intervention."""
        return x.repeat(self.n, *[1] * (x.ndim - 1))

    def _place(self, first: int) -> None:
        """Tell the model which rows and positions the hooks that fire next see."""
        self.model.run_state.narrow(Span(first, self.clean.shape[1] - first), self.n)

    def _given(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], first: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a layer is called with: the stream in hand, and all else cut to positions and rows."""
        names = internals.input_names(layer, args, kwargs)
        _, *others = (*args, *kwargs.values())
        given = [
            _cut(value, internals.LAYER_INPUTS.get(name, ()), self.clean.shape, first, self.n)
            for name, value in zip(names[1:], others, strict=True)
        ]
        given = [self.state, *given]
        return tuple(given[: len(args)]), dict(zip(kwargs, given[len(args) :], strict=True))


def _cut(value: Any, ways: Sequence[str], shape: tuple[int, int], first: int, n: int) -> Any:
    """A layer's argument made for [batch, pos], for positions from `first` on and the batch `n` times.

    `ways` are the axes that it may have, which its number of axes decides; of none of them it stays as it is.
    """
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(entry, ways, shape, first, n) for entry in value)
    if not isinstance(value, Tensor):
        return value
    batch, length = shape
    axes = next((axes for axes in map(str.split, ways) if len(axes) == value.ndim), [])
    if "pos" in axes:
        value = value.narrow(axes.index("pos"), first, length - first)
    row = axes.index("batch") if "batch" in axes else None
    if n == 1 or row is None or value.shape[row] != batch:
        return value
    if batch == 1:
        return value.expand([n if axis == row else size for axis, size in enumerate(value.shape)])
    return value.repeat([n if axis == row else 1 for axis in range(value.ndim)])


def _stacked_hook(model: HookedVLM, hooks: Sequence[Sequence[Hook]]) -> list[Hook]:
    """All interventions' hooks as one, which gives each intervention its own rows of the stacked batch.

    One, because of the points that a filter means not all need fire.
    """
    at: dict[str, list[tuple[int, CheckedHook]]] = {}
    for row, own in enumerate(hooks):
        for match, function in own:
            for name in model.hook_names(match):
                at.setdefault(name, []).append((row, CheckedHook(function)))
    if not at:
        return []

    def stacked(x: Tensor, hook: Any) -> Tensor:
        out = x.clone()
        rows = out.unflatten(0, (len(hooks), -1))
        for row, checked in at[hook.name]:
            edited = checked(rows[row], hook=hook)
            if edited is not None:
                rows[row] = edited
        return out

    stated: Any = stacked
    stated.first_position = min(
        getattr(checked.function, "first_position", 0) for entries in at.values() for _, checked in entries
    )
    stated.is_checked = True
    return [(at.__contains__, stacked)]


# ---------------------------------------------------------------------- plumbing


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory is full, as CPU allocators do in words alone."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        text in str(error) for text in _OUT_OF_MEMORY
    )


def _around_attention(model: HookedVLM, arounds: Mapping[int, Around]) -> Temporary[None]:
    """While it is open, `arounds` stand between attention layers and their function."""
    taps = {layer: model.attention_tap(layer) for layer in arounds}

    def begin() -> None:
        for layer, tap in taps.items():
            tap.around = arounds[layer]

    def end() -> None:
        for tap in taps.values():
            tap.around = None

    return Temporary(begin, end)
