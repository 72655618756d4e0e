"""Hybrid attention: chosen heads attend to everything, the others to sinks and a window (arXiv 2606.05843, section 5).

It stands where the attention function of each language layer is called (`AttentionTap.streaming`). What it does there
depends on the call:

| call | done |
|---|---|
| one query (decoding), or all heads dense, or a prompt within sinks and window | the model's own function |
| a hook inside the softmax, or rows of the pattern wanted | the model's own function, with the rule in its mask |
| a softcap, learnt sinks or a position bias; eager attention | the same: the masked reference |
| all else | dense heads by SDPA; streaming heads by blocks (CPU) or FlexAttention (CUDA) |
"""

from __future__ import annotations

import warnings

import torch

from mmlens.errors import InvalidValueError, StateError, UnsupportedError
from mmlens.heads import Heads, HeadSet, as_head_set
from mmlens.hybrid.layer import METHODS, StreamingLayer, Tally
from mmlens.hybrid.rule import StreamingRule
from mmlens.internals import attention_implementation
from mmlens.interrupts import Temporary
from mmlens.model.cross_attention import refuse_cross_attention
from mmlens.model.hooked_vlm import HookedVLM, model_of
from mmlens.model.hooks import NoChangeWarning


def hybrid_attention(
    model: HookedVLM, dense: Heads, *, sink: int = 512, window: int = 4096, method: str = "auto"
) -> Temporary[HeadSet]:
    """While it is open, only the `dense` heads attend to the whole prompt; the others see sinks and a window.

    A streaming head's query at i sees j <= i with j < `sink` or i - j < `window`, counted from the row's first real
    token. The prompt is run so (any pass over several positions); a generated token is decoded by dense attention on
    the cache, which holds the keys of all positions. So are the tokens of an answer that follow a Prompt in one pass
    (`Prompt.continued`, metrics of whole answers): what they give is what decoding gives. Heads are query heads,
    whatever key-value heads they share. Sliding-window layers keep their own window. Hooks fire as ever; where one
    reads scores or patterns, that layer runs by its mask. Yields the dense heads; an empty list has all heads stream.

    `method` is "masked" (the reference: the model's own function under a mask for each head), "blocks" (blocks of
    queries), "flex" (torch's FlexAttention), or "auto", which takes blocks on the CPU and FlexAttention on CUDA.

    Raises TypeError for a model without causal self-attention over its visual positions (at the first run:
    NotCausalError), NotImplementedError for an attention implementation other than sdpa and eager, and for
    positions added to a cut cache; ValueError for a rule without a window, an unknown method, or heads of another
    model; RuntimeError where it is open already. Warns (NoChangeWarning) at the end where prompts were run and all
    heads saw all of them.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> example = mmlens.scene_examples("documents", 1, seed=0)[0]
    >>> prompt = model.prompt_examples([example])
    >>> with hybrid_attention(model, [(0, 4), (0, 5)], sink=4, window=16):
    ...     logits = model(prompt)
    >>> bool((logits - model(prompt)).abs().max() > 0)
    True
    """
    heads = as_head_set(dense, model_of(model).grid, at_least=0)
    rule = StreamingRule(sink, window)
    if method not in METHODS:
        raise InvalidValueError(f"method is one of {', '.join(METHODS)}, not {method!r}")
    refuse_cross_attention(model)
    implementation = attention_implementation(model.hf_model)
    if implementation not in ("sdpa", "eager"):
        raise UnsupportedError(
            f"hybrid attention stands in for sdpa or eager attention, and the model was loaded with {implementation!r}"
        )
    taps = {layer: model.attention_tap(layer) for layer in model.grid.layers}
    if any(tap.streaming is not None for tap in taps.values()):
        raise StateError("hybrid attention is open on this model already: close it first")
    by_layer, tally, held = heads.by_layer(), Tally(), object()

    def begin() -> HeadSet:
        model.watch.add(held)
        for layer, tap in taps.items():
            is_dense = torch.zeros(model.grid.heads_per_layer[layer], dtype=torch.bool)
            is_dense[by_layer.get(layer, [])] = True
            tap.streaming = StreamingLayer(
                f"layer {layer} of {model.family.model_type}", is_dense, rule, method, tally
            )
        return heads

    def end() -> None:
        for tap in taps.values():
            tap.streaming = None
        model.watch.discard(held)

    def check() -> None:
        if not tally.longest or tally.streamed:
            return
        why = (
            "all heads are dense"
            if len(heads) == len(model.grid)
            else f"no prompt was longer than {sink} sinks and a window of {window} (the longest has {tally.longest})"
        )
        warnings.warn(f"hybrid attention changed nothing: {why}", NoChangeWarning, stacklevel=4)

    return Temporary(begin, end, check)
