"""What is read of the private or fast-moving interface of transformers, accelerate, TransformerLens and torch.

It is read here and nowhere else. tests/test_internals.py asks every function here for what the installed versions
give, and its failures name what moved.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformer_lens.hook_points import HookPoint
from transformers import ProcessorMixin
from transformers.modeling_utils import AttentionInterface
from transformers.utils import is_torchvision_available

# ---------------------------------------------------------------------- transformers: the key-value cache

CACHE_KEYWORDS = ("cache", "past_key_values")
"""What a decoder's forward calls its key-value cache: the first from transformers 5.24 on, the second before."""


def cached_length(kwargs: Mapping[str, Any]) -> int:
    """How many positions the cache in a decoder's keyword inputs already holds; 0 where there is no cache."""
    held = (kwargs[name] for name in CACHE_KEYWORDS if kwargs.get(name) is not None)
    cache = next(held, None)
    return 0 if cache is None else int(cache.get_seq_length())


# ---------------------------------------------------------------------- transformers: renamed keywords


def renamed_keywords(function: Callable[..., Any]) -> set[str]:
    """Old names under which a function still takes keywords: what its `deprecate_kwarg` decorators stand for."""
    found: set[str] = set()
    link: Any = function
    while link is not None:
        code = getattr(link, "__code__", None)
        closure = getattr(link, "__closure__", None) or ()
        held = dict(zip(code.co_freevars if code else (), closure, strict=False))
        if "old_name" in held and held["new_name"].cell_contents is not None:
            found.add(held["old_name"].cell_contents)
        link = getattr(link, "__wrapped__", None)
    return found


# ---------------------------------------------------------------------- torch: FlexAttention


def query_blocks(wanted: bool) -> dict[str, Any]:
    """The option of `BlockMask.from_kv_blocks` that leaves out lists which the backward pass alone reads.

    An older torch has no such option, and always makes them.
    """
    known = inspect.signature(BlockMask.from_kv_blocks).parameters
    return {"compute_q_blocks": wanted} if "compute_q_blocks" in known else {}


# ---------------------------------------------------------------------- transformers: attention

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]
"""(module, query, key, value, mask, **options) -> output and, of eager functions, the pattern."""

EAGER_SOFTMAX, EAGER_DROPOUT = F.softmax, F.dropout
"""What every family's eager attention function calls: the first on the scores, then the second on the pattern."""


def attention_implementation(module: nn.Module) -> str:
    """The name of the attention that a model, or one of its modules, runs: "sdpa", "eager", ..."""
    config: Any = module.config
    return config._attn_implementation


def asks_for_attention(module: nn.Module) -> bool:
    """Whether the module's own forward asks transformers' attention interface for its function."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(module).forward).__code__.co_names


@functools.cache
def wrap_attention(wrapped: Callable[[AttentionFunction, AttentionFunction], AttentionFunction]) -> None:
    """From now on every attention layer of this process that asks for its function is given
    `wrapped(that function, the family's eager function)`. Once for each `wrapped`.
    """
    original = AttentionInterface.get_interface

    @functools.wraps(original)
    def get_interface(
        self: AttentionInterface, attn_implementation: str, default: AttentionFunction
    ) -> AttentionFunction:
        return wrapped(original(self, attn_implementation, default), default)

    AttentionInterface.get_interface = get_interface


# ---------------------------------------------------------------------- transformers: decoder layers


def stream_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual stream among a decoder layer's arguments: the first of them, by keyword too."""
    return args[0] if args else next(iter(kwargs.values()))


def stream_out(output: Any) -> Any:
    """The residual stream in what a decoder layer gives, an attention module's output in what that gives."""
    return output[0] if isinstance(output, tuple) else output


def rest_of(output: Any) -> tuple[Any, ...] | None:
    """What a module gives after its first tensor; None where it gives that alone."""
    return output[1:] if isinstance(output, tuple) else None


LayerCall = Callable[[tuple[Any, ...], dict[str, Any]], Any]


class _StandIn(nn.Module):
    """Stands in the list of layers in a layer's place; its attributes are the layer's."""

    def __init__(self, layer: nn.Module, call: LayerCall) -> None:
        super().__init__()
        # Not registered as a submodule: the layer is not this module's.
        self.__dict__["stands_for"], self.__dict__["call"] = layer, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stands_for"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["call"](args, kwargs)


@contextmanager
def layers_replaced(layers: nn.ModuleList, call_of: Callable[[int, nn.Module], LayerCall]) -> Iterator[None]:
    """Inside the block the model calls `call_of(index, layer)` in the place of each decoder layer."""
    real = list(layers)
    try:
        for index, layer in enumerate(real):
            layers[index] = _StandIn(layer, call_of(index, layer))
        yield
    finally:
        for index, layer in enumerate(real):
            layers[index] = layer


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the block the module's forward is another function."""
    attributes = vars(module)
    own = {name: attributes[name] for name in ("forward",) if name in attributes}
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        attributes.update(own)


# ---------------------------------------------------------------------- accelerate


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate runs a module that it brings weights to; None where it does not."""
    placed = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return torch.device("cuda", placed) if isinstance(placed, int) else placed and torch.device(placed)


def moves_weights(module: nn.Module) -> bool:
    """Whether accelerate brings weights in and out around the module or a part of it."""
    return any(hasattr(part, "_hf_hook") for part in module.modules())


# ---------------------------------------------------------------------- TransformerLens' hook points


@contextmanager
def hooks_suspended(points: Iterable[HookPoint], deeper_than: int) -> Iterator[None]:
    """Inside the block, hooks that were set in contexts deeper than that level do not act."""
    held = []
    for point in points:
        for handles, functions in (("fwd_hooks", "_forward_hooks"), ("bwd_hooks", "_backward_hooks")):
            own, live = getattr(point, handles), getattr(point, functions)
            late = [handle for handle in own if (handle.context_level or 0) > deeper_than]
            if late:
                held.append((point, handles, list(own), live, list(live.items())))
                setattr(point, handles, [handle for handle in own if handle not in late])
                for handle in late:
                    live.pop(handle.hook.id)
    try:
        yield
    finally:
        for point, handles, own, live, functions_before in held:
            setattr(point, handles, own)
            live.clear()
            live.update(functions_before)
            for tap in point.taps:
                tap.refresh()


# ---------------------------------------------------------------------- transformers: processors


def pixtral_processor() -> type[ProcessorMixin]:
    """PixtralProcessor, with or without torchvision.

    Its module imports one function from the torchvision half of its images; the PIL half has the same function,
    and stands in for the other while the module is imported.
    """
    if not is_torchvision_available():
        torchvision_half = "transformers.models.pixtral.image_processing_pixtral"
        pil_half = importlib.import_module("transformers.models.pixtral.image_processing_pil_pixtral")
        sys.modules[torchvision_half] = pil_half
        try:
            importlib.import_module("transformers.models.pixtral.processing_pixtral")
        finally:
            del sys.modules[torchvision_half]
    return importlib.import_module("transformers.models.pixtral.processing_pixtral").PixtralProcessor
