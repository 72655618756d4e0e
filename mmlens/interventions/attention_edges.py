"""Attention edges: block or bias attention from some positions to others, and scale what a head gives.

An edge is (layer, head, query position, key position). `knockout` and `bias_attention` change the scores as the
softmax reads them: after scaling, softcap and position bias, with the mask added. An edge that the mask forbids
(the future, padding, what lies outside a sliding window) is never changed. A layer whose scores are edited runs the
family's eager attention, that layer alone (see mmlens/model/attention.py).

Keys are positions of the prompt: generated tokens are keys that stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmlens.arguments import array_of, listed, shown, whole_number, whole_numbers
from mmlens.errors import InvalidTypeError, InvalidValueError
from mmlens.heads import Head, Heads, HeadSet, as_head_set
from mmlens.hook_names import block
from mmlens.interventions.edits import (
    Change,
    Edit,
    EditContext,
    check_call,
)
from mmlens.model.cache import is_masked
from mmlens.model.choosing import IfAny, Mask, Positions, if_any, positions_mask
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import Hook, Intervention
from mmlens.model.prompt import Prompt
from mmlens.model.run_state import Span

PerHead = float | Sequence[float] | Float[Tensor, ""] | Float[Tensor, " head"]
"""One number for all heads, or one for each of them, in the order in which the heads are given."""

_SCORES = "attn.hook_attn_scores"


def knockout(
    queries: Positions,
    keys: Positions,
    *,
    layers: int | Iterable[int] | None = None,
    heads: HeadSet | Iterable[Head] | Iterable[int] | None = None,
) -> Intervention:
    """Block attention from `queries` to `keys`: softmax(scores + M) with M = -inf on these edges and 0 elsewhere.

    This is attention knockout (Geva et al. 2023, arXiv 2304.14767): a blocked key's weight is exactly 0,
    and the row's other weights are renormalised. An edge from a position to itself is blocked like any other.

    `queries` None: every position, generated tokens too (see `during` for these alone). `layers` None: every layer that
    attends to the prompt's positions. `heads` None: all of them; integers mean these heads of each layer; pairs
    (layer, head) name their layers themselves. With learnt sinks the sink keeps its score, as the row's other keys do.

    The edits' `size` is an attention mass, not a score: the largest share that one head's query had on its blocked
    keys, from 0 to 1 (without the sink's share). It is 0, and warned of, where the mask forbade every edge anyway.

    Raises ValueError, when it runs, where a query would keep no key at all; when it is built, for `keys` None, an
    example in which positions choose none (`if_any` leaves it as it is), `layers` beside pairs, and a layer that
    attends to something else than the prompt's positions (cross-attention); IndexError for a layer or head that there
    is not, or without softmax attention.

    >>> from mmlens.data.scenes import scene_examples
    >>> model = HookedVLM.from_pretrained("micro")
    >>> prompt = model.prompt_examples(scene_examples("objects", 2, seed=0))
    >>> hooks = knockout("last", "image", layers=range(2))(model, prompt)
    >>> logits = model.run_with_hooks(prompt, fwd_hooks=hooks)
    >>> [name for name, _ in hooks], 0 < hooks[0][1].size <= 1
    (['blocks.0.attn.hook_attn_scores', 'blocks.1.attn.hook_attn_scores'], True)
    """
    _check_keys("knockout", keys, "blocking every key leaves a query nothing to attend to")
    of_layers: int | list[int] | None
    if layers is None:
        of_layers = None
    elif isinstance(layers, Iterable) and getattr(layers, "ndim", 1) != 0:
        of_layers = whole_numbers(
            "layers", listed("layers", layers, "a layer or a list of layers", sets=True)
        )
    else:
        of_layers = whole_number("layers", layers)
    of_heads = heads if heads is None or isinstance(heads, HeadSet) else _listed_heads(heads)

    def intervention(model: HookedVLM, prompt: Prompt) -> list[Hook]:
        check_call(model, prompt)
        chosen = _edge_heads(model, of_layers, of_heads)
        where, is_key = _queries(prompt, queries), _real(prompt, keys, "keys")

        def change(scores: Tensor, here: EditContext) -> Tensor:
            blocked = _at_keys(is_key, here, scores) & ~is_masked(scores, model.hf_model.dtype)
            return scores.masked_fill(blocked, torch.finfo(scores.dtype).min)

        return [
            (
                name,
                KnockoutEdit(
                    model, prompt, name, change, positions=where, heads=own, generated=queries is None
                ),
            )
            for name, own in _by_hook(model, chosen, _SCORES)
        ]

    return intervention


class KnockoutEdit(Edit):
    """An edit that masks scores. `size` is the largest attention mass that it took from one head's query (0 to 1)."""

    measure = "attention mass"

    def act(self, x: Tensor, hook: Any) -> Tensor:
        n_known = len(self._sizes)
        blocked = super().act(x, hook)
        # A score's change to the mask's huge number says nothing.
        del self._sizes[n_known:]
        changed = blocked != x
        rows = changed.any(-1)
        self._check_rows(blocked, rows)
        mass = x.detach()[rows].float().softmax(-1).masked_fill(~changed[rows], 0).sum(-1)
        if len(mass):
            self._sizes.append(mass.max().clamp(max=1.0))
        return blocked

    def _check_rows(
        self, scores: Float[Tensor, "batch head query key"], rows: Bool[Tensor, "batch head query"]
    ) -> None:
        """Raise ValueError where a row that lost keys has none left."""
        empty = torch.zeros_like(rows)
        empty[rows] = is_masked(scores[rows], self.model.hf_model.dtype).all(-1)
        if not bool(empty.any()):
            return
        row, head, _ = empty.nonzero()[0].tolist()
        positions = (empty[row].any(0).nonzero().flatten() + self.model.run_state.span.first).tolist()
        shown = f"{', '.join(map(str, positions[:8]))}{', ...' if len(positions) > 8 else ''}"
        raise InvalidValueError(
            f"knockout at {self.name}: in batch row {row}, query position(s) {shown} would keep no key to attend to "
            f"(head {head} is one such head), and a softmax over no key is not defined. Leave these queries out, "
            "or leave them a key"
        )


def bias_attention(
    heads: HeadSet | Iterable[Head],
    keys: Positions,
    delta: PerHead,
    *,
    queries: Positions = None,
) -> Intervention:
    """Add `delta` (in nats, before the softmax) to the scores of `heads` from `queries` to `keys`.

    The odds of attending to one of `keys` against any other key are multiplied by exp(delta), so a negative delta
    turns the heads away. Zhang et al. 2023 (PASTA, arXiv 2311.02262) is the special case of delta = -log(alpha) > 0 at
    the emphasised tokens: there, all other keys' weights are multiplied by alpha and the row is renormalised. What the
    mask forbids stays forbidden. `queries` None: every position, generated tokens too.

    Raises ValueError for `keys` None, an example in which positions choose none (`if_any` leaves it as it is), a delta
    that is not finite or whose length is not that of `heads`; heads as in `ablate`.

    >>> bias_attention([(0, 1)], "image", float("-inf"))
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidValueError: bias_attention: delta is a finite number, not -inf; ...
    """
    _check_keys("bias_attention", keys, "a bias towards every key changes no softmax")
    heads = heads if isinstance(heads, HeadSet) else _listed_heads(heads)
    hint = "to block the edges use knockout(queries, keys, heads=...)"
    deltas = _per_head("bias_attention", "delta", delta, len(heads), hint)

    def intervention(model: HookedVLM, prompt: Prompt) -> list[Hook]:
        check_call(model, prompt)
        chosen = _head_set(model, heads, over_the_prompt=True)
        where, is_key = _queries(prompt, queries), _real(prompt, keys, "keys")

        def change(scores: Tensor, here: EditContext, deltas: Tensor) -> Tensor:
            biased = _at_keys(is_key, here, scores) & ~is_masked(scores, model.hf_model.dtype)
            return torch.where(biased, scores + deltas.to(scores)[:, None, None], scores)

        return _per_head_edits(model, prompt, chosen, _SCORES, change, deltas, where, queries is None)

    return intervention


def scale_heads(
    heads: HeadSet | Iterable[Head], factor: PerHead, positions: Positions = None
) -> Intervention:
    """Multiply what each of `heads` gives, z, by `factor` at `positions` (None: everywhere, generated tokens too).

    0 takes the head away as `ablate(heads, "zero")` does, 1 leaves it (which is warned of), 2 doubles what it writes.

    Raises ValueError for a factor that is not finite or whose length is not that of `heads`, and for positions that
    choose none; heads as in `ablate`.

    >>> from mmlens.data.scenes import scene_examples
    >>> model = HookedVLM.from_pretrained("micro")
    >>> prompt = model.prompt_examples(scene_examples("objects", 1, seed=0))
    >>> scale_heads([(0, 1), (2, 3)], [0.5, 2.0], "last")(model, prompt)[1]
    ('blocks.2.attn.hook_z', Edit(blocks.2.attn.hook_z, heads [3], 1 positions: fired 0 times, size 0))
    """
    heads = heads if isinstance(heads, HeadSet) else _listed_heads(heads)
    factors = _per_head("scale_heads", "factor", factor, len(heads), "to take a head away the factor is 0")

    def intervention(model: HookedVLM, prompt: Prompt) -> list[Hook]:
        check_call(model, prompt)
        chosen = _head_set(model, heads)

        def change(z: Tensor, here: EditContext, deltas: Tensor) -> Tensor:
            return z * deltas.to(z)[:, None]

        return _per_head_edits(
            model, prompt, chosen, "attn.hook_z", change, factors, positions, positions is None
        )

    return intervention


# ---------------------------------------------------------------------- heads


def _listed_heads(heads: object) -> list[Any]:
    given = listed("heads", heads, "a HeadSet or a list of heads", sets=True)
    return [
        tuple(head) if isinstance(head, (list, np.ndarray, Tensor)) and len(head) else head for head in given
    ]


def _head_set(model: HookedVLM, heads: Heads, *, over_the_prompt: bool = False) -> HeadSet:
    """`heads` as a HeadSet of this model; `over_the_prompt` refuses heads whose keys are not the prompt's positions."""
    chosen = as_head_set(heads, model.grid)
    elsewhere = [layer for layer in chosen.by_layer() if _looks_elsewhere(model, layer)]
    if over_the_prompt and elsewhere:
        raise InvalidValueError(
            f"layer(s) {elsewhere} attend to the image by cross-attention, so their keys are no positions of the "
            f"prompt; edit the scores of {block(elsewhere[0], _SCORES)} with a hook of your own"
        )
    return chosen


def _edge_heads(
    model: HookedVLM,
    layers: int | Sequence[int] | None,
    heads: HeadSet | Sequence[Any] | None,
) -> HeadSet:
    """What `layers` and `heads` of a knockout mean in this model."""
    if heads is not None and (isinstance(heads, HeadSet) or not _are_integers(heads)):
        if layers is not None:
            raise InvalidValueError(
                f"knockout: (layer, head) pairs name their layers themselves; give integers with layers={layers!r}, "
                "or pairs alone"
            )
        return _head_set(model, heads, over_the_prompt=True)
    if layers is None:
        chosen = [layer for layer in model.attention_layers if not _looks_elsewhere(model, layer)]
    else:
        chosen = [layers] if isinstance(layers, int) else list(layers)
    pairs = []
    for layer in chosen:
        n_heads = model.grid.heads_per_layer[layer] if 0 <= layer < model.cfg.n_layers else 0
        # A layer that there is not, or without heads, is refused by its head 0.
        pairs += [(layer, head) for head in (range(n_heads or 1) if heads is None else heads)]
    return _head_set(model, pairs, over_the_prompt=True)


def _are_integers(values: Sequence[Any]) -> bool:
    return all(hasattr(value, "__index__") and not isinstance(value, bool) for value in values)


def _looks_elsewhere(model: HookedVLM, layer: int) -> bool:
    parts = model.anatomy.language[layer].attention
    return parts is not None and parts.reads_image


def _by_hook(model: HookedVLM, heads: HeadSet, hook: str) -> list[tuple[str, list[int] | None]]:
    """[(hook point, the heads to edit there)]; None where these are all of its heads."""
    return [
        (block(layer, hook), None if sorted(own) == list(range(model.grid.heads_per_layer[layer])) else own)
        for layer, own in heads.by_layer().items()
    ]


def _per_head(
    function: str, name: str, value: PerHead, n_heads: int, hint: str
) -> Float[Tensor, ""] | Float[Tensor, " head"]:
    if isinstance(value, (bool, str)) or value is None:
        raise InvalidTypeError(
            f"{function}: {name} is {shown(value)}; expected a finite number, or one for each head; {hint}"
        )
    plain: Any = value
    if not isinstance(value, Tensor):
        plain = array_of(name, value if isinstance(value, Iterable) else np.asarray(value), None)
    number = torch.as_tensor(plain, dtype=torch.float32)
    if not bool(number.isfinite().all()):
        raise InvalidValueError(f"{function}: {name} is a finite number, not {value}; {hint}")
    if number.ndim and tuple(number.shape) != (n_heads,):
        raise InvalidValueError(
            f"{function}: {name} is one number, or one for each of the {n_heads} heads, "
            f"not of shape {list(number.shape)}"
        )
    return number.float()


def _per_head_edits(
    model: HookedVLM,
    prompt: Prompt,
    heads: HeadSet,
    hook: str,
    change: Any,
    values: Tensor,
    where: Positions,
    generated: bool,
) -> list[Hook]:
    """Edits of a layer's heads each, whose `change` is given these heads' own values."""
    of_head = dict(zip(heads, values.expand(len(heads)), strict=True))
    hooks: list[Hook] = []
    for layer, own in heads.by_layer().items():
        name = block(layer, hook)
        its: Change = partial(change, deltas=torch.stack([of_head[layer, head] for head in own]))
        hooks.append((name, Edit(model, prompt, name, its, positions=where, heads=own, generated=generated)))
    return hooks


# ---------------------------------------------------------------------- positions


def _check_keys(function: str, keys: Positions, why: str) -> None:
    if keys is None:
        raise InvalidValueError(f"{function} needs keys=positions of the prompt, got None: {why}")


def _real(prompt: Prompt, positions: Positions, role: str) -> Mask:
    """The mask without padding, which no query attends to and whose rows nobody reads."""
    mask = positions_mask(prompt, positions, role)
    assert mask is not None
    return mask & ~prompt.token_map.is_padding.to(mask.device)


def _queries(prompt: Prompt, queries: Positions) -> IfAny | None:
    """None where all positions are queries and none is padding."""
    if queries is None and not bool(prompt.token_map.is_padding.any()):
        return None
    return if_any(_real(prompt, "prompt" if queries is None else queries, "queries"))


def _at_keys(is_key: Mask, here: EditContext, scores: Tensor) -> Bool[Tensor, "row 1 1 key"]:
    """Which of the scores' keys are chosen.

    The last key is the run's newest position, or lies after it, unused, in a cache of fixed length; the first is the
    prompt's first, or as far back as a sliding window's cache reaches.
    """
    n_keys = scores.shape[-1]
    first = max(here.span.first + here.span.length - n_keys, 0)
    chosen = replace(here, span=Span(first, n_keys)).of_prompt(is_key, False)
    return chosen[:, None, None].to(scores.device)
