"""A HookedVLM over the weights of a TransformerBridge that is already loaded.

1. The bridge replaces modules of its Hugging Face model by its own and switches the model to eager attention;
   undoing that would break the bridge. So a second model is built from the bridge's configuration, with no
   memory for weights.
2. Both models are walked side by side, looking through the bridge's wrappers, and every parameter and buffer
   of the bridge's model becomes the new model's: the same tensors, not copies.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from mmlens import internals
from mmlens.errors import InvalidTypeError, InvalidValueError
from mmlens.model.hooked_vlm import HookedVLM


class BridgeError(InvalidValueError):
    """A TransformerBridge whose weights HookedVLM cannot take as they are."""


def from_bridge(
    bridge: Any,
    processor: ProcessorMixin | None = None,
    *,
    attn_implementation: str | None = None,
) -> HookedVLM:
    """A HookedVLM that shares every parameter and buffer with a TransformerBridge; no weight is copied.

    Logits are bit-equal to the plain Hugging Face model of these weights under `attn_implementation`: None means
    transformers' own choice, SDPA where the family has it, whatever the bridge forced. The bridge is left as it
    is and goes on working, with its hooks; hooks set on it are not taken along. Training one trains both. Do not
    process the bridge's weights afterwards (`enable_compatibility_mode`): in mixture-of-experts families that
    rewrites the shared tensors.

    `processor` None takes the bridge's, as it is (mmlens' own loading always resizes images by PIL). Where the
    bridge has none either, the result knows the bridge's tokenizer but cannot make prompts.

    Raises BridgeError for a bridge whose model is text-only, is not in this process (vLLM, Inspect), has
    processed weights or compatibility mode, or is quantized, adapted (LoRA) or spread over several devices;
    UnknownFamilyError for a family that mmlens refuses. A bridge is loaded and taken over like this::

        bridge = TransformerBridge.boot_transformers("llava-hf/llava-1.5-7b-hf")
        model = mmlens.from_bridge(bridge)
        logits, cache = model.run_with_cache(model.prompt("What is this?", images=["cat.png"]))
    """
    source = _hf_model(bridge)
    config = _plain_config(source.config)
    with init_empty_weights(include_buffers=False):
        model = internals.empty_model(source, config, attn_implementation)
    _share(model, source, "")
    model.generation_config = copy.deepcopy(source.generation_config)
    hooked = HookedVLM(model, processor or bridge.processor)
    hooked.tokenizer = hooked.tokenizer or bridge.tokenizer
    return hooked


def _hf_model(bridge: Any) -> PreTrainedModel:
    """The bridge's Hugging Face model, wrappers included, once it is sure that its weights can be shared."""
    # Here, not above: this import turns transformers' warnings off for the whole process.
    from transformer_lens.model_bridge import TransformerBridge

    if not isinstance(bridge, TransformerBridge):
        raise InvalidTypeError(f"from_bridge takes a TransformerBridge, not a {type(bridge).__name__}")
    try:
        model = bridge.original_model
    except AttributeError as error:
        raise BridgeError(f"the bridge's model is not in this process: {error}") from error
    if not isinstance(model, PreTrainedModel):
        raise BridgeError(f"the bridge holds a {type(model).__name__}, which is no Hugging Face model")
    if model.config.get_text_config() is model.config:
        raise BridgeError(
            f"the bridge holds a {type(model).__name__}, a text-only model; HookedVLM is for vision-language "
            "models. Keep the bridge for it"
        )
    if internals.is_processed(bridge):
        raise BridgeError(
            "the bridge is in compatibility mode, where norms may be folded and weights centred: they are no longer "
            "the Hugging Face model's. Call from_bridge before enable_compatibility_mode, or boot a new bridge"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise BridgeError("the bridge's model is quantized; load it with HookedVLM.from_pretrained instead")
    devices = {str(tensor.device) for tensor in model.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise BridgeError(
            f"the bridge's weights are on {', '.join(sorted(devices))}; sharing them needs them on one device"
        )
    return model


def _plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration without the attention outputs that a bridge asks for, which only eager attention has."""
    plain = copy.deepcopy(config)
    for part in (plain, *(getattr(plain, name, None) for name in plain.sub_configs)):
        if part is not None:
            part.output_attentions = False
    return plain


def _share(module: nn.Module, source: nn.Module | None, path: str) -> None:
    """Give `module` and its children the tensors and the mode of the bridge's `source`."""
    source = _unwrapped(source)
    if type(source) is not type(module):
        raise BridgeError(
            f"{path or 'the model'} is a {type(source).__name__} in the bridge, not a {type(module).__name__}: "
            "its weights are not those of the plain Hugging Face model"
        )
    for own, given in zip(internals.own_tensors(module), internals.own_tensors(source), strict=True):
        _share_tensors(own, given, path)
    module.training = source.training
    for name, child in internals.children_of(module).items():
        if child is not None:
            _share(child, internals.children_of(source).get(name), f"{path}.{name}".lstrip("."))


def _unwrapped(module: Any) -> Any:
    """The Hugging Face module under the bridge's wrappers."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    while isinstance(module, GeneralizedComponent):
        module = module.original_component
    return module


def _share_tensors(own: dict[str, Any], shared: Mapping[str, Any], path: str) -> None:
    for name, tensor in own.items():
        given = shared.get(name)
        if _shape(given) != _shape(tensor):
            raise BridgeError(
                f"{path}.{name} is {_shape(given)} in the bridge and {_shape(tensor)} by the model's configuration"
            )
        own[name] = given
    for name in shared.keys() - own.keys():
        # Where a model's unembedding has no bias the bridge adds one, of zeros.
        if shared[name] is not None and bool(shared[name].any()):
            raise BridgeError(f"{path}.{name} is in the bridge, and not in the plain Hugging Face model")


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(list(tensor.shape))
