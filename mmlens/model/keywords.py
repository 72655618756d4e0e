"""Which keywords a run takes. transformers' forward methods take any and drop what they do not know.

1. A model's own keywords are the explicit parameters of its forward, and of what its **kwargs are handed to.
2. TransformerLens' options that a Hugging Face model cannot serve are refused with what to do in their place.
3. Anything else is a misspelling, refused with the nearest name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from mmlens.arguments import known_keywords, shown, unknown_name_message
from mmlens.errors import InvalidTypeError, InvalidValueError
from mmlens.internals import MODEL_KEYWORDS, renamed_keywords

_ALWAYS_READ = (
    "return_dict",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
)
"""What transformers' decorators and loss functions read of any forward's keywords."""
_READ_BY_LOSSES = ("ignore_index", "shift_labels")

_WHOLE_RUN = "every run is a whole one: edit the stream with hooks, or slice the cache after the run"
_OF_CACHE = "it is an option of run_with_cache"
_OF_HOOKS = "it is an option of run_with_hooks"
_IDS_AS_THEY_ARE = "token ids are run as they are, and prompts as the chat template renders them"

NOT_SERVED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "start_at_layer": ((), _WHOLE_RUN),
    "stop_at_layer": ((), _WHOLE_RUN),
    "pos_slice": ((), _WHOLE_RUN),
    "prepend_bos": ((), _IDS_AS_THEY_ARE),
    "padding_side": ((), _IDS_AS_THEY_ARE),
    "tokens": ((), "token ids are the first argument"),
    "input": ((), "what is run is the first argument"),
    "past_kv_cache": ((), "transformers keeps its own key-value cache: past_key_values, use_cache=True"),
    "use_past_kv_cache": ((), "transformers' option is use_cache"),
    "shortformer_pos_embed": ((), "the model embeds positions in its own way"),
    "one_zero_attention_mask": ((), "transformers' option is attention_mask"),
    "decoder_input": ((), "vision-language models have no decoder apart; token ids are the first argument"),
    "return_cache_object": ((True,), "the dictionary is the cache's cache_dict"),
    "reset_hooks_end": (
        (True,),
        "a run's hooks are removed at its end; use `with model.hooks(...)` or add_hook",
    ),
    "clear_contexts": ((False,), "call model.clear_contexts()"),
    "names_filter": ((), _OF_CACHE),
    "remove_batch_dim": ((), _OF_CACHE),
    "incl_bwd": ((), _OF_CACHE),
    "device": ((), f"{_OF_CACHE}; the model runs where its weights are"),
    "fwd_hooks": ((), _OF_HOOKS),
    "bwd_hooks": ((), _OF_HOOKS),
    "return_type": (
        (),
        "generate gives token ids, answer texts, and a run with return_type logits or the loss",
    ),
    "loss_per_token": ((), "it is an option of a run, model(prompt, return_type='loss')"),
    "stop_at_eos": ((True,), "generation ends at eos_token_id; min_new_tokens makes it go on"),
    "freq_penalty": ((0, 0.0), "transformers' option is repetition_penalty"),
    "verbose": ((True, False), "generate shows no progress"),
    "return_cache": ((False,), "generate_with_cache gives the prompt with its answer, and the cache of both"),
    "return_input_tokens": ((False,), "the prompt's ids are its inputs['input_ids']"),
}
"""TransformerLens' options that a Hugging Face model does not know: values that ask for nothing, and what to do."""


_AS_THEY_ARE = "weights stay as they are: nothing is folded or centred"
_WRAPPED = "HookedVLM(hf_model, processor) wraps what was loaded apart"

NOT_SERVED_BY_LOADING: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "device": (("cpu",), "transformers' option is device_map, such as device_map='cuda'"),
    "n_devices": ((1,), "device_map='auto' spreads the layers over all devices"),
    "move_to_device": ((True,), "transformers' option is device_map"),
    "fold_ln": ((False,), _AS_THEY_ARE),
    "center_writing_weights": ((False,), _AS_THEY_ARE),
    "center_unembed": ((False,), _AS_THEY_ARE),
    "fold_value_biases": ((False,), _AS_THEY_ARE),
    "refactor_factored_attn_matrices": ((False,), _AS_THEY_ARE),
    "hf_model": ((), _WRAPPED),
    "tokenizer": ((), _WRAPPED),
    "processor": ((), _WRAPPED),
    "default_prepend_bos": ((), _IDS_AS_THEY_ARE),
    "default_padding_side": (("left",), "prompts are padded on the left"),
    "first_n_layers": ((), "a model is loaded whole"),
    "checkpoint_index": ((), "a checkpoint on the hub is a revision: revision=..."),
    "checkpoint_value": ((), "a checkpoint on the hub is a revision: revision=..."),
    "load_in_8bit": ((False,), "quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True)"),
    "load_in_4bit": ((False,), "quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True)"),
}
"""Options of TransformerLens' from_pretrained, and old ones of transformers': as NOT_SERVED."""

_LOADING = (
    "attn_implementation",
    "cache_dir",
    "device_map",
    "dtype",
    "force_download",
    "local_files_only",
    "max_memory",
    "offload_folder",
    "quantization_config",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
    "use_fast",
)
"""What people pass to transformers' from_pretrained, to name the nearest of."""


def forward_keywords(model: PreTrainedModel) -> frozenset[str]:
    """The keywords that the model's forward reads, itself or by handing its **kwargs on.

    >>> from mmlens.model.loading import load
    >>> model, _ = load("micro")
    >>> known = forward_keywords(model)
    >>> {"pixel_values", "labels", "output_hidden_states"} <= known, "logits_to_kep" in known
    (True, False)
    """
    base = getattr(model, model.base_model_prefix, None)
    parts = [model, *(part for part in (base, model.get_decoder()) if isinstance(part, PreTrainedModel))]
    towers = [getattr(type(part), "get_image_features", None) for part in parts]
    return _keywords_of((*(type(part).forward for part in parts), *filter(None, towers)))


@functools.cache
def _keywords_of(functions: tuple[Callable[..., Any], ...]) -> frozenset[str]:
    """Explicit parameters of the first function; of the others too where it hands on what it does not know."""
    known = _explicit(functions[0])
    parameters = inspect.signature(functions[0]).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        for function in functions[1:]:
            known |= _explicit(function)
        known |= {*MODEL_KEYWORDS, *_READ_BY_LOSSES}
    return frozenset(known | {*_ALWAYS_READ})


def _explicit(function: Callable[..., Any]) -> set[str]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return {
        parameter.name for parameter in parameters if parameter.kind in named and parameter.name != "self"
    } | {*renamed_keywords(function)}


def check_forward(
    model: PreTrainedModel, given: Mapping[str, Any], more: Iterable[str] = ()
) -> dict[str, Any]:
    """`given` without what asks for nothing. `more`: names that are right though the model drops them.

    Raises InvalidTypeError for a keyword that nothing reads, and for `return_dict` False.
    """
    served = {**given}
    own = forward_keywords(model)
    # Most runs' keywords are all known.
    if not served.keys() <= own:
        served = _without_idle(served, own)
        right = {*own, *more}
        known_keywords("HookedVLM", served, [*sorted(right), "inputs", "return_type", *NOT_SERVED])
    if served.get("return_dict") is False:
        raise InvalidTypeError(
            "HookedVLM takes no return_dict=False: it reads what the model gives by its names"
        )
    return served


def check_loading(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` without what asks for nothing. What else transformers does not know it refuses itself: `load_error`.

    Raises InvalidTypeError for an option of TransformerLens' alone, InvalidValueError for a dtype that there is not.
    """
    served = _without_idle({**given}, (), NOT_SERVED_BY_LOADING, "from_pretrained takes no {}")
    for name in ("dtype", "torch_dtype"):
        value = served.get(name)
        for dtype in value.values() if isinstance(value, dict) else [value]:
            _check_dtype(name, dtype)
    return served


def load_error(given: Iterable[str], error: TypeError, of_processor: Iterable[str] = ()) -> Exception:
    """transformers' error, or, where that is about an unknown option, one that names it and the nearest.

    `of_processor` are the options of the processor.
    """
    unknown = [name for name in given if f"unexpected keyword argument '{name}'" in str(error)]
    if not unknown:
        return error
    message = unknown_name_message("option", unknown[0], sorted({*_LOADING, *of_processor}))
    return InvalidTypeError(
        f"from_pretrained: {message}. Neither transformers' loading, nor the model's configuration, nor its processor "
        "knows it"
    )


def _check_dtype(name: str, dtype: object) -> None:
    if dtype is None or isinstance(dtype, torch.dtype) or dtype == "auto":
        return
    dtypes = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]
    known = sorted({str(value).removeprefix("torch.") for value in dtypes if value.is_floating_point})
    if not isinstance(dtype, str):
        raise InvalidTypeError(f"{name} is {shown(dtype)}; expected a torch.dtype, such as torch.bfloat16")
    if not isinstance(getattr(torch, dtype.removeprefix("torch."), None), torch.dtype):
        raise InvalidValueError(unknown_name_message(name, dtype, ["auto", *known]))


def check_generate(model: PreTrainedModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` without what asks for nothing; InvalidTypeError for an option of TransformerLens' alone.

    What else `generate` does not know transformers refuses itself: see `explained`.
    """
    return _without_idle({**given}, _generate_keywords(model))


def explained(model: PreTrainedModel, given: Iterable[str], error: ValueError) -> Exception:
    """transformers' error, or, where that is about unknown keywords, one that names the nearest."""
    known = _generate_keywords(model)
    try:
        if "model_kwargs" in str(error):
            known_keywords("generate", given, [*sorted(known), *NOT_SERVED])
    except InvalidTypeError as named:
        return named
    return error


def _generate_keywords(model: PreTrainedModel) -> Collection[str]:
    options = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    return forward_keywords(model) | _explicit(type(model).generate) | options


def _without_idle(
    given: dict[str, Any],
    own: Collection[str],
    not_served: Mapping[str, tuple[tuple[Any, ...], str]] = NOT_SERVED,
    refused: str = "HookedVLM takes no {} here, which transformers would drop in silence",
) -> dict[str, Any]:
    for name in [name for name in given if name in not_served and name not in own]:
        idle, instead = not_served[name]
        value = given.pop(name)
        if value is not None and not any(type(value) is type(same) and value == same for same in idle):
            raise InvalidTypeError(f"{refused.format(name)}: {instead}")
    return given
