"""Models with adapters (PEFT): taking off PEFT's outer wrapper, and loading a folder that holds an adapter alone."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mmlens.errors import InvalidValueError, MmlensError, UnsupportedError

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"


class AdapterError(MmlensError, OSError):
    """An adapter that cannot be loaded as it was saved."""


def without_wrapper(model: Any) -> Any:
    """The Hugging Face model inside PEFT's wrapper, its adapter in place; anything else as it is.

    Raises UnsupportedError for an adapter that is not in the model's modules: virtual tokens in front of the prompt,
    adapters that PEFT's own wrapper switches on at run time.
    """
    configs = getattr(model, "peft_config", None)
    if (
        not isinstance(model, nn.Module)
        or isinstance(model, PreTrainedModel)
        or not isinstance(configs, dict)
    ):
        return model
    for name, config in configs.items():
        if getattr(config, "is_prompt_learning", False) or getattr(config, "alora_invocation_tokens", None):
            raise UnsupportedError(
                f"the adapter {name!r} ({type(config).__name__}) acts in PEFT's wrapper, not in the model's modules: "
                "without it the model is the base model. HookedVLM takes adapters that change weights, LoRA and its kin"
            )
    unwrap: Any = getattr(model, "get_base_model", None)
    return unwrap() if unwrap is not None else getattr(model, "model", model)


def adapter_base(folder: str) -> str | None:
    """The base model that a folder's adapter is for; None where the folder holds none.

    Raises AdapterError where the folder's adapter names no base model or its weights are not in safetensors.
    """
    file = Path(folder) / ADAPTER_CONFIG
    if not file.is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{str(file)!r} names no base model ({error!r})") from error
    if not isinstance(base, str) or not base:
        raise AdapterError(
            f"{str(file)!r} names no base model: load the base, add the adapter with PEFT and wrap that, "
            "HookedVLM(PeftModel.from_pretrained(model, folder), processor)"
        )
    if not (Path(folder) / _WEIGHTS).is_file():
        raise AdapterError(
            f"the adapter in {folder!r} has no {_WEIGHTS}: adapters come from safetensors only"
        )
    return base


def with_adapter(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """The model with the folder's adapter in place, not merged.

    Raises AdapterError where PEFT is not installed, or where a tensor of the adapter is missing or fits nothing.
    """
    try:
        from peft import PeftConfig, get_peft_model
        from peft.utils import load_peft_weights, set_peft_model_state_dict
    except ImportError as error:
        raise AdapterError(f"{folder!r} holds an adapter, which needs PEFT: pip install peft") from error
    try:
        with warnings.catch_warnings():
            # What it warns of, missing tensors among it, is an error below.
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, PeftConfig.from_pretrained(folder))
            result = set_peft_model_state_dict(adapted, load_peft_weights(folder, device=str(model.device)))
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise AdapterError(f"the adapter in {folder!r} does not fit its base model: {error}") from error
    missing = [name for name in result.missing_keys if "lora_" in name or "modules_to_save" in name]
    if missing or result.unexpected_keys:
        raise AdapterError(
            f"the adapter in {folder!r} does not fit its base model: {len(missing)} of its tensors are missing "
            f"({', '.join(missing[:3])}), {len(result.unexpected_keys)} fit nothing "
            f"({', '.join(result.unexpected_keys[:3])})"
        )
    taken = without_wrapper(adapted)
    if not isinstance(taken, PreTrainedModel):
        raise InvalidValueError(f"PEFT gave a {type(taken).__name__} for the adapter in {folder!r}")
    return taken.eval()
