"""What is read of the private or fast-moving interface of transformers, accelerate, TransformerLens and torch.

It is read here and nowhere else. tests/test_internals.py asks every function here for what the installed versions
give, and its failures name what moved.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from transformer_lens import ActivationCache
from transformer_lens.hook_points import HookPoint
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.image_utils import make_flat_list_of_images as make_flat_list_of_images
from transformers.modeling_utils import AttentionInterface
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from transformers.utils import ModelOutput, TransformersKwargs, is_torchvision_available
from transformers.utils.chat_template_utils import _get_template_variables
from transformers.video_processing_utils import BaseVideoProcessor as BaseVideoProcessor
from transformers.video_processing_utils import VideoProcessorMixin as VideoProcessorMixin
from transformers.video_utils import VideoMetadata as VideoMetadata

from mmlens.interrupts import Temporary

# ---------------------------------------------------------------------- Python: functions


def place_of(function: Callable[..., Any]) -> str:
    """A function's name and where it is written, as in "zero (notebook.py:12)"; nothing for what Python did not write.

    >>> place_of(place_of)
    'place_of (internals.py:...)'
    """
    own: Any = inspect.unwrap(function)
    code = getattr(own, "__code__", None)
    return f"{own.__qualname__} ({Path(code.co_filename).name}:{code.co_firstlineno})" if code else ""


# ---------------------------------------------------------------------- transformers: the key-value cache

CACHE_KEYWORDS = ("cache", "past_key_values")
"""What a decoder's forward calls its key-value cache: the first from transformers 5.24 on, the second before."""


def cached_length(kwargs: Mapping[str, Any]) -> int:
    """How many positions the cache in a decoder's keyword inputs already holds; 0 where there is no cache."""
    held = (kwargs[name] for name in CACHE_KEYWORDS if kwargs.get(name) is not None)
    cache = next(held, None)
    return 0 if cache is None else int(cache.get_seq_length())


# ---------------------------------------------------------------------- transformers: what there is

IMAGE_TEXT_MODELS: Mapping[str, str] = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
"""model_type -> the class of every image-text-to-text model."""

IMAGE_PROCESSORS: Mapping[str, Mapping[str, str]] = IMAGE_PROCESSOR_MAPPING_NAMES
"""model_type -> {"pil" or "torchvision": the class of its image processor}."""

MODEL_KEYWORDS = frozenset(TransformersKwargs.__annotations__)
"""Keywords that every model hands on to its parts."""


def processor_class_of(config_class: type) -> type[ProcessorMixin] | None:
    """The processor that belongs to a family; None where it has none of its own."""
    return PROCESSOR_MAPPING.get(config_class, None)


def processor_class_named(name: str) -> type[ProcessorMixin]:
    """The processor class that a file names."""
    return processor_class_from_name(name)


# ---------------------------------------------------------------------- transformers: renamed keywords


_IMAGE_DEFAULTS: dict[type[ProcessorMixin], dict[str, Any]] = {}


def image_defaults(processor: ProcessorMixin) -> dict[str, Any]:
    """The options of images that a processor's call gives its image half; of its class, unless it has its own."""
    kind = type(processor)
    if kind in _IMAGE_DEFAULTS and not getattr(processor, "images_kwargs", None):
        return dict(_IMAGE_DEFAULTS[kind])
    # transformers checks every option's type here, which takes longer than the layout of an image.
    defaults = processor._merge_kwargs()["images_kwargs"]
    if not getattr(processor, "images_kwargs", None):
        _IMAGE_DEFAULTS[kind] = defaults
    return dict(defaults)


def template_variables(template: str) -> set[str]:
    """The variables that a chat template reads, messages and the special tokens' names among them."""
    return set(_get_template_variables(template)) if template else set()


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


# ---------------------------------------------------------------------- transformers: images encoded beforehand

_ENCODED = "mm_encoder_outputs"
"""Under this keyword a model takes what `get_image_features` gave, by medium, in place of pixels."""


def encoded_images(features: Any) -> dict[str, Any]:
    """Keyword inputs that hold the tower's output; none where it is None."""
    return {} if features is None else {_ENCODED: {"image": features}}


def image_tower_inputs(
    model: PreTrainedModel, processor: Any, inputs: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What get_image_features takes of the inputs; None where the tower cannot be run apart from them."""
    encode: Any = getattr(model, "get_image_features", None)
    forwards = [
        inspect.signature(module.forward).parameters for module in (model, getattr(model, "model", model))
    ]
    if encode is None or not any(_ENCODED in taken for taken in forwards):
        return None
    parameters = inspect.signature(encode).parameters.values()
    taken = {each.name for each in parameters if each.kind is not each.VAR_KEYWORD}
    if len(taken) < len(parameters):
        # What it hands on to the tower: the image processor's other outputs.
        taken |= set(getattr(getattr(processor, "image_processor", None), "model_input_names", ()))
    given = {name: value for name, value in inputs.items() if name != "input_ids" and name in taken}
    required = {each.name for each in parameters if each.default is each.empty} - {"args", "kwargs"}
    needed = any(
        holds_pixels(value) and name in forwards[0] and forwards[0][name].default is inspect.Parameter.empty
        for name, value in given.items()
    )
    return None if needed or not required or not required <= given.keys() else given


def holds_pixels(value: Any) -> bool:
    """Whether an input is an image's content: grids, sizes, masks and positions of patches are whole numbers."""
    of_tensors = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(each, Tensor) and each.is_floating_point() for each in of_tensors)


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

BEYOND_THE_SOFTMAX = ("softcap", "s_aux", "position_bias")
"""Keyword arguments with which softmax(q k^T scale + mask) is not the pattern: a cap, a learnt sink, a bias."""


def is_causal(module: nn.Module | None, stated: bool | None) -> bool:
    """Whether an attention call without a mask is causal: as its arguments state, or as its module does."""
    return bool(getattr(module, "is_causal", True) if stated is None else stated)


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


def with_stream(
    args: tuple[Any, ...], kwargs: dict[str, Any], stream: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A module's arguments with another first tensor."""
    return ((stream, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): stream})


def with_output(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A module's output with its tensor changed: alone, first of a tuple, each of a list, or of a ModelOutput what the
    next module reads."""
    if isinstance(output, ModelOutput):
        field = "pooler_output" if output.get("pooler_output") is not None else "last_hidden_state"
        return type(output)(**{**output, field: change(output[field])})
    if isinstance(output, list):
        return [change(tensor) for tensor in output]
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return change(output)


def rest_of(output: Any) -> tuple[Any, ...] | None:
    """What a module gives after its first tensor; None where it gives that alone."""
    return output[1:] if isinstance(output, tuple) else None


LAYER_INPUTS: dict[str, tuple[str, ...]] = {
    "attention_mask": ("batch head pos key", "batch pos"),
    "cache_position": ("pos",),
    "conv_mask": ("batch pos",),
    "cross_attention_mask": ("batch head pos key",),
    "full_text_row_masked_out_mask": ("batch head pos key",),
    "moe_mm_token_type_ids": ("batch pos",),
    "per_layer_input": ("batch pos d",),
    "ple_input_ids": ("batch pos",),
    "position_embeddings": ("batch pos d", "section batch pos d"),
    "position_ids": ("batch pos", "section batch pos"),
}
"""The axes of what models give their decoder layers beside the stream; where there are two ways, they differ in number.
An axis of 1 stands for all."""


def input_names(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """The names of a layer's arguments, those given by place first."""
    by_place = list(inspect.signature(layer.forward).parameters)[: len(args)] if len(args) > 1 else ["stream"]
    return [*by_place[: len(args)], *kwargs]


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


def layers_replaced(layers: nn.ModuleList, call_of: Callable[[int, nn.Module], LayerCall]) -> Temporary[None]:
    """Inside the block the model calls `call_of(index, layer)` in the place of each decoder layer."""
    real = list(layers)

    def begin() -> None:
        for index, layer in enumerate(real):
            layers[index] = _StandIn(layer, call_of(index, layer))

    def end() -> None:
        for index, layer in enumerate(real):
            layers[index] = layer

    return Temporary(begin, end)


def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Temporary[None]:
    """Inside the block the module's forward is another function."""
    attributes = vars(module)
    own = {name: attributes[name] for name in ("forward",) if name in attributes}

    def begin() -> None:
        module.forward = forward

    def end() -> None:
        attributes.pop("forward", None)
        attributes.update(own)

    return Temporary(begin, end)


def may_recompute(model: nn.Module) -> list[nn.Module]:
    """The modules that can leave activations to be computed again in the backward pass (gradient checkpointing)."""
    return [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]


def recomputes(module: Any) -> bool:
    """Whether one of `may_recompute` will do so in a run with gradients."""
    return bool(module.gradient_checkpointing and module.training)


# ---------------------------------------------------------------------- torch: hooks on modules

Side = Literal["input", "output"]
_HOOKS: dict[Side, tuple[str, ...]] = {
    "input": ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    "output": ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}


def attach(module: nn.Module, side: Side, hook: Callable[..., Any], *, prepend: bool = False) -> None:
    """Register `hook` on the module's input or output, unless it is there. The module alone keeps the account, so an
    interrupt cannot leave a hook that nothing knows of."""
    main, marks = (getattr(module, name) for name in _HOOKS[side][:2])
    if any(known == hook and key in marks for key, known in main.items()):
        return
    detach(module, side, hook)
    register: Any = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
    register(hook, with_kwargs=True, prepend=prepend)


def detach(module: nn.Module, side: Side, hook: Callable[..., Any]) -> None:
    """Take `hook` from the module; harmless where it is not there."""
    main, *marks = (getattr(module, name) for name in _HOOKS[side])
    for key in [key for key, known in list(main.items()) if known == hook]:
        main.pop(key, None)
        for mark in marks:
            mark.pop(key, None)


# ---------------------------------------------------------------------- torch: modules and tensors

DROPOUT, BATCH_STATISTICS = nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm
"""The classes of all modules with dropout's rate `p`, and of all that compute other numbers in training mode."""

COMPILED = "_orig_mod"
"""Where torch.compile keeps the module that it wraps."""


def children_of(module: nn.Module) -> dict[str, Any]:
    """A module's own children by name; what is set here is what it calls."""
    return module._modules


def own_tensors(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """A module's own parameters and buffers by name."""
    return module._parameters, module._buffers


def n_changes(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; tensors made in inference mode keep no count."""
    return None if tensor.is_inference() else tensor._version


def is_made_of_others(tensor: Tensor) -> bool:
    """Whether a tensor is made of others, as torchao's are, and holds its numbers in a form of its own."""
    return hasattr(tensor, "__tensor_flatten__")


def tensors_in(tensor: Any) -> list[Tensor]:
    """The tensors that a tensor is made of; a plain one alone."""
    return (
        [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        if is_made_of_others(tensor)
        else [tensor]
    )


# ---------------------------------------------------------------------- torch: function modes


def drop_function_modes(is_over: Callable[[TorchFunctionMode], bool]) -> None:
    """Take off torch's stack the modes that are over, wherever on it they stand."""
    stack = _get_current_function_mode_stack()
    if not any(map(is_over, stack)):
        return
    for _ in stack:
        _pop_mode()
    for mode in stack:
        if not is_over(mode):
            _push_mode(mode)


# ---------------------------------------------------------------------- accelerate


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate runs a module that it brings weights to; None where it does not."""
    placed = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return torch.device("cuda", placed) if isinstance(placed, int) else placed and torch.device(placed)


def moves_weights(module: nn.Module) -> bool:
    """Whether accelerate brings weights in and out around the module or a part of it."""
    return any(hasattr(part, "_hf_hook") for part in module.modules())


# ---------------------------------------------------------------------- TransformerLens' hook points

_OF_TRANSFORMER_LENS = HookPoint.add_hook.__qualname__


def has_functions(point: HookPoint) -> bool:
    """Whether torch has functions to call at a hook point."""
    return bool(point._forward_hooks or point._backward_hooks)


def drop_unlisted(point: HookPoint) -> None:
    """Of an add_hook that was interrupted, torch may have a function that stands in no list of the hook point's."""
    listed = {handle.hook.id for handle in (*point.fwd_hooks, *point.bwd_hooks)}
    for registered in (point._forward_hooks, point._backward_hooks):
        for key, function in list(registered.items()):
            if key not in listed and getattr(function, "__qualname__", "").startswith(_OF_TRANSFORMER_LENS):
                registered.pop(key, None)


def is_processed(bridge: Any) -> bool:
    """Whether a TransformerBridge has folded or centred its model's weights."""
    return bool(bridge.compatibility_mode or bridge._weights_processed)


def compute_head_results(cache: ActivationCache) -> None:
    """Have a cache hold hook_result of every layer."""
    cache._ensure_head_results()


# ---------------------------------------------------------------------- transformers: a model without weights


def empty_model(
    like: PreTrainedModel, config: PreTrainedConfig, attn_implementation: str | None
) -> PreTrainedModel:
    """A model of the same class and dtype, to be given its tensors."""
    return type(like)._from_config(config, dtype=like.dtype, attn_implementation=attn_implementation)


# ---------------------------------------------------------------------- transformers: processors


def separate_tokenizer(tokenizer: Any) -> Any:
    """The same fast tokenizer for another thread: every call sets padding and truncation on the tokenizer itself.

    The vocabulary is shared, and not copied.
    """
    shared = tokenizer.backend_tokenizer
    backend = type(shared)(shared.model)
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        part = getattr(shared, name)
        if part is not None:
            setattr(backend, name, part)
    backend.encode_special_tokens = shared.encode_special_tokens
    added = shared.get_added_tokens_decoder()
    backend.add_tokens([token for _, token in sorted(added.items())])
    if backend.get_added_tokens_decoder() != added:
        return copy.deepcopy(tokenizer)
    twin = copy.copy(tokenizer)
    twin._tokenizer = backend
    return twin


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
