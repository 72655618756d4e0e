"""The one attention function: transformers' own, with hook points on the way in and inside the softmax.

1. transformers asks `AttentionInterface.get_interface` for the function of an attention layer. That method
   is wrapped once per process; the wrapper hands out a function that looks up the calling module here.
2. A module that no HookedVLM has tapped, or whose tap is idle, runs exactly what transformers would have run.
3. hook_rot_q and hook_rot_k see the rotated queries and keys and stay on the fast path.
4. A layer whose hook_attn_scores or hook_pattern is live leaves the fast path, alone: the family's own eager
   function runs, watched at its softmax, so that every quirk of the family stays exact. Where all hooks say which
   queries they touch, as edits do, the rows before the first of these stay on the fast path.
5. A few rows of the pattern come from q, k and the mask: softmax(q[rows] k^T scale + mask[rows]).

The name of the implementation stays "sdpa" or "eager": some families read it to decide what mask to build,
and a registered name of our own would silently drop theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmlens import internals
from mmlens.errors import InvalidValueError, UnsupportedError
from mmlens.internals import AttentionFunction
from mmlens.interrupts import undone
from mmlens.model.run_state import RunState
from mmlens.model.taps import LazyHookPoint


@dataclass(frozen=True)
class AttentionCall:
    """What an attention layer asks of its function: heads before positions, `mask` and `options` as transformers has
    them."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]


Attend = Callable[[AttentionCall], tuple[Tensor, Any]]
Around = Callable[[Attend, AttentionCall], tuple[Tensor, Any]]
"""(attend, call) -> what attention gives."""


@dataclass(frozen=True)
class QueryRows:
    """Query positions of a batch, padded to the largest count: `index` [batch, query], `real` says which count."""

    index: Int[Tensor, "batch query"]
    real: Bool[Tensor, "batch query"]

    @classmethod
    def of(cls, queries: Bool[Tensor, "batch pos"]) -> QueryRows:
        counts = queries.sum(-1)
        if (counts == 0).any():
            empty = (counts == 0).nonzero().flatten().tolist()
            raise InvalidValueError(f"no query position is chosen in batch row(s) {empty}")
        # A stable sort on "not chosen" brings the chosen positions first, in prompt order.
        order = (~queries).to(torch.int8).sort(dim=-1, stable=True).indices
        width = int(counts.max())
        return cls(order[:, :width], torch.arange(width, device=queries.device) < counts[:, None])


class Streams(Protocol):
    """A layer of which some heads see a few keys only (mmlens.hybrid)."""

    def acts_on(self, query: Tensor, first: int, answer: Tensor | None) -> bool: ...

    def masked(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        causal: bool,
        first: int,
        answer: Tensor | None,
    ) -> Tensor: ...

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool,
        scaling: float | None,
        answer: Tensor | None,
    ) -> Tensor: ...

    def is_fast(self, mask: Tensor | None) -> bool: ...


class AttentionTap:
    """The hook points of one attention layer, and whoever wants rows of its pattern."""

    def __init__(self, hook_points: dict[str, LazyHookPoint]) -> None:
        self.rot_q = hook_points["hook_rot_q"]
        self.rot_k = hook_points["hook_rot_k"]
        self.scores = hook_points["hook_attn_scores"]
        self.pattern = hook_points["hook_pattern"]
        self.watch = self.pattern.watch
        self.rows: QueryRows | None = None
        self.consume_rows: Callable[[Tensor], None] | None = None
        self.run_state: RunState | None = None
        """Which positions the queries are; None in towers."""
        self.around: Around | None = None
        """Stands between the module and its function where set: a partial run records and completes calls by it."""
        self.streaming: Streams | None = None
        """Which heads see a few keys only, where set (`mmlens.hybrid_attention`)."""

    @property
    def needs_softmax(self) -> bool:
        return self.scores.is_live or self.pattern.is_live

    def is_plain(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether softmax(q k^T scaling + mask) v is all that this call does: no hook inside, no cap, sink or bias."""
        is_hooked = self.needs_softmax or self.rot_q.is_live or self.rot_k.is_live
        return not is_hooked and self.streaming is None and _is_softmax_alone(kwargs)

    def run(
        self,
        fast: AttentionFunction,
        eager: AttentionFunction,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        self.watch.check_thread()
        attend = functools.partial(self._attend, fast, eager, module)
        call = AttentionCall(query, key, value, attention_mask, kwargs)
        return attend(call) if self.around is None else self.around(attend, call)

    def _attend(
        self, fast: AttentionFunction, eager: AttentionFunction, module: nn.Module, call: AttentionCall
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value, attention_mask, kwargs = call.query, call.key, call.value, call.mask, call.options
        if self.rot_q.is_live:
            query = self.rot_q(query.transpose(1, 2)).transpose(1, 2)
        if self.rot_k.is_live:
            key = self.rot_k(key.transpose(1, 2)).transpose(1, 2)
        if self.rows is not None or self.needs_softmax:
            _check_readable(module, attention_mask)
        start = 0 if self.run_state is None else self.run_state.span.first
        answer = None if self.streaming is None or self.run_state is None else self.run_state.answer_mask()
        if self.streaming is not None and self.streaming.acts_on(query, start, answer):
            _check_readable(module, attention_mask)
            causal = internals.is_causal(module, kwargs.get("is_causal"))
            reads = self.rows is not None or self.needs_softmax or not _is_softmax_alone(kwargs)
            if not (reads or start or fast is eager) and self.streaming.is_fast(attention_mask):
                scaling = kwargs.get("scaling")
                return self.streaming.run(query, key, value, attention_mask, causal, scaling, answer), None
            attention_mask = self.streaming.masked(query, key, attention_mask, causal, start, answer)
            if fast is eager:
                attention_mask = _additive_mask(module, query, key, attention_mask, causal)
        if self.rows is not None and self.consume_rows is not None:
            now = AttentionCall(query, key, value, attention_mask, kwargs)
            self.consume_rows(_attention_rows(self.rows, eager, module, now))
        if not self.needs_softmax:
            return fast(module, query, key, value, attention_mask, **kwargs)
        # Where the fast path is the eager one, there is nothing to stay on.
        first = 0 if fast is eager else self._first_hooked(query, kwargs)
        mask = _additive_mask(module, query, key, attention_mask, kwargs.get("is_causal"), first)
        attending = _attending(attention_mask, kwargs, first)
        watch = _SoftmaxWatch(self.scores, self.pattern, attending, key.shape[2])

        def watched() -> tuple[Tensor, Tensor | None]:
            watch.open()
            return eager(module, query[:, :, first:], key, value, mask, **kwargs)

        def run() -> tuple[Tensor, Tensor | None]:
            return undone(watched, watch.close)

        cut = self.run_state.queries_from(first) if first and self.run_state is not None else None
        output, weights = run() if cut is None else cut.around(run)
        if not first:
            return output, weights
        before, _ = fast(module, query, key, value, attention_mask, **kwargs)
        return torch.cat([before[:, :first], output], dim=1), None

    def _first_hooked(self, query: Tensor, kwargs: Mapping[str, Any]) -> int:
        """The first query, in the run under way, that hooks on scores and pattern touch.

        The rows before it stay on the fast path, where every hook says which positions it touches.
        """
        if self.run_state is None or kwargs.get("position_bias") is not None:
            return 0
        start, length = self.run_state.span
        if query.shape[2] != length:
            return 0
        first = min(point.first_position for point in (self.scores, self.pattern) if point.is_live)
        return min(max(first - start, 0), length - 1)


def _is_softmax_alone(kwargs: Mapping[str, Any]) -> bool:
    """Whether softmax(q k^T scaling + mask) is the family's pattern: no cap, sink or bias."""
    return all(kwargs.get(name) is None for name in internals.BEYOND_THE_SOFTMAX)


# Both held weakly: a tap belongs to its HookedVLM, a module to its Hugging Face model.
_TAPS: WeakKeyDictionary[nn.Module, ref[AttentionTap]] = WeakKeyDictionary()


def tap_attention(module: nn.Module, tap: AttentionTap) -> None:
    """Route the attention layer `module` through `tap` until `untap_attention` (the last tap counts)."""
    internals.wrap_attention(_tapped)
    _TAPS[module] = ref(tap)


def untap_attention(module: nn.Module, tap: AttentionTap) -> None:
    """No longer route the attention layer `module` through `tap`; harmless where it is not."""
    if _tap_of(module) is tap:
        _TAPS.pop(module, None)


def _tap_of(module: nn.Module) -> AttentionTap | None:
    known = _TAPS.get(module)
    return None if known is None else known()


def _tapped(fast: AttentionFunction, eager: AttentionFunction) -> AttentionFunction:
    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        tap = _tap_of(module)
        if tap is None:
            return fast(module, *args, **kwargs)
        return tap.run(fast, eager, module, *args, **kwargs)

    return attention


class _SoftmaxWatch(TorchFunctionMode):
    """Fires the score hook on the input of an eager function's softmax, the pattern hook on its dropout's input.

    `attending` are the rows that may attend to anything: a row that may not has no pattern, as in SDPA. After
    the `n_keys` columns some families have one for a learnt sink, which no hook sees.
    """

    def __init__(
        self, scores: LazyHookPoint, pattern: LazyHookPoint, attending: Tensor | None, n_keys: int
    ) -> None:
        super().__init__()
        self._scores, self._pattern, self._attending, self._n_keys = scores, pattern, attending, n_keys
        self.is_over = False

    def open(self) -> None:
        # No `with`: its end takes the topmost mode, and an interrupt may have left another there, or none.
        self.__enter__()

    def close(self) -> None:
        self.is_over = True
        # Earlier ones too: where an interrupt meets torch between two steps of a call, torch puts the mode back once
        # the error's traceback is gone.
        internals.drop_function_modes(_is_over)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.is_over:
            return func(*args, **(kwargs or {}))
        if func is internals.EAGER_SOFTMAX and self._scores.is_live:
            keys, sinks = args[0][..., : self._n_keys], args[0][..., self._n_keys :]
            edited = self._scores(keys)
            args = (torch.cat([edited, sinks], dim=-1) if sinks.shape[-1] else edited, *args[1:])
        if func is internals.EAGER_DROPOUT:
            pattern = args[0] if self._attending is None else args[0] * self._attending
            args = (self._pattern(pattern) if self._pattern.is_live else pattern, *args[1:])
        return func(*args, **(kwargs or {}))


def _is_over(mode: TorchFunctionMode) -> bool:
    return isinstance(mode, _SoftmaxWatch) and mode.is_over


def _check_readable(module: nn.Module, mask: Any) -> None:
    """Refuse implementations whose mask says less than their kernel does (flash, flex, paged)."""
    implementation = internals.attention_implementation(module)
    if implementation not in ("sdpa", "eager") or not (
        mask is None or (isinstance(mask, Tensor) and mask.ndim == 4)
    ):
        raise UnsupportedError(
            f"{type(module).__name__} runs {implementation!r} attention: its scores, pattern and pattern rows cannot "
            "be read exactly; load the model with attn_implementation='sdpa' (or 'eager')"
        )


def _attending(mask: Tensor | None, kwargs: dict[str, Any], first: int = 0) -> Tensor | None:
    """[batch, head or 1, query, 1] which rows of a boolean mask allow a key; None where every row does.

    SDPA gives a row that may attend to nothing (padding) an output of zero, where the eager softmax would spread
    it over all keys. With a position bias transformers hands SDPA a sum instead of a boolean mask, and there is no
    such row.
    """
    if mask is None or mask.dtype != torch.bool or kwargs.get("position_bias") is not None:
        return None
    rows = _from(mask, first).any(-1, keepdim=True)
    return None if bool(rows.all()) else rows


def _from(mask: Tensor, first: int) -> Tensor:
    """A mask's rows from query `first` on; a mask with one row has it for all queries."""
    return mask[..., first:, :] if mask.shape[-2] > 1 else mask


def _additive_mask(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool | None, first: int = 0
) -> Tensor | None:
    """The mask that an eager function adds to the scores of queries from `first` on, from what the fast path was given.

    SDPA takes a boolean mask (True = attend) or none at all, with causality as a flag of the module.
    """
    q_length, k_length = query.shape[2], key.shape[2]
    if mask is None:
        if q_length == 1 or not internals.is_causal(module, causal):
            return None
        rows = torch.ones(q_length - first, k_length, dtype=torch.bool, device=query.device)
        mask = rows.tril(first)[None, None]
    else:
        mask = _from(mask, first)
    if mask.dtype == torch.bool:
        blocked = torch.finfo(query.dtype).min
        return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, blocked)
    return mask[..., :k_length]


def _attention_rows(
    rows: QueryRows, eager: AttentionFunction, module: nn.Module, call: AttentionCall
) -> Float[Tensor, "batch head query key"]:
    """Post-softmax attention at the chosen query positions, in float32."""
    query, key, mask, kwargs = call.query, call.key, call.mask, call.options
    if not _is_softmax_alone(kwargs):
        return _rows_of_eager_pattern(rows, eager, module, call)
    batch, n_heads, _, d_head = query.shape
    n_kv_heads, k_length = key.shape[1], key.shape[2]
    index = rows.index.to(query.device)
    width = index.shape[1]
    chosen = query.gather(2, index[:, None, :, None].expand(-1, n_heads, -1, d_head)).float()
    grouped = chosen.reshape(batch, n_kv_heads, (n_heads // n_kv_heads) * width, d_head)
    # One example at a time: the float32 copy of the keys is then never larger than one example's.
    scaling = kwargs.get("scaling")
    scale = d_head**-0.5 if scaling is None else scaling
    scores = torch.cat(
        [torch.matmul(g * scale, k.float().mT)[None] for g, k in zip(grouped, key, strict=True)]
    )
    scores = scores.reshape(batch, n_heads, width, k_length)
    if mask is not None:
        mask = mask[..., :k_length].expand(batch, -1, -1, -1)
        picked = mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, k_length))
        if picked.dtype == torch.bool:
            scores = scores.masked_fill(~picked, torch.finfo(scores.dtype).min)
            return scores.softmax(-1) * picked.any(-1, keepdim=True)
        scores = scores + picked.float()
    elif query.shape[2] > 1 and internals.is_causal(module, kwargs.get("is_causal")):
        future = torch.arange(k_length, device=index.device) > index[..., None]
        scores = scores.masked_fill(future[:, None], torch.finfo(scores.dtype).min)
    return scores.softmax(-1)


def _rows_of_eager_pattern(
    rows: QueryRows, eager: AttentionFunction, module: nn.Module, call: AttentionCall
) -> Float[Tensor, "batch head query key"]:
    """The slow way, for families with a softcap, sinks or a position bias: their own full pattern, then the rows."""
    full = _additive_mask(module, call.query, call.key, call.mask, call.options.get("is_causal"))
    pattern = eager(module, call.query, call.key, call.value, full, **call.options)[1]
    if pattern is None:
        raise UnsupportedError(f"{type(module).__name__} gives no attention pattern to take rows from")
    attending = _attending(call.mask, call.options)
    pattern = pattern if attending is None else pattern * attending
    index = rows.index.to(pattern.device)[:, None, :, None]
    return pattern.gather(2, index.expand(-1, pattern.shape[1], -1, pattern.shape[3])).float()
