"""Finding and loading a model and its processor: shipped with the package, in a folder, or on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from mmlens import internals
from mmlens.arguments import flag, instance_of, shown, unknown_name_message
from mmlens.errors import InvalidTypeError, InvalidValueError, MmlensError, UnsupportedError
from mmlens.families.catalog import FAMILIES, UnknownFamilyError, family_of
from mmlens.families.processors import load_processor, option_names, with_options
from mmlens.model import adapters
from mmlens.model.keywords import check_loading, load_error

_SHIPPED_FOLDER = Path(__file__).parents[1] / "shipped"
_HUB_OPTIONS = (
    "revision",
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
    "subfolder",
    "trust_remote_code",
)


class ModelNotFoundError(MmlensError, OSError):
    """No such shipped model or folder, or the hub did not give it."""


class IncompleteModelError(MmlensError, OSError):
    """Weights that do not fill the model, or are not the folder's own."""


class RemoteCodeError(InvalidValueError):
    """A model with code of its own, which nobody asked to run."""


def shipped_models() -> list[str]:
    """Names of the models that come with the package.

    >>> "micro" in shipped_models()
    True
    """
    return sorted(path.parent.name for path in _SHIPPED_FOLDER.glob("*/config.json"))


def scene_kinds(name_or_path: str | Path) -> dict[str, list[str]] | None:
    """The kinds of generated scenes that a model was trained on: `visual`, with images, and `text`, of text alone.

    They stand in the tasks.json of its folder, which experiments/training/train.py writes; None where there is none.
    Raises ValueError where the file holds something else.

    >>> scene_kinds("micro")["visual"]
    ['objects', 'documents', 'frames', 'images']
    """
    name = str(name_or_path)
    folder = _SHIPPED_FOLDER / name if name in shipped_models() else Path(name).expanduser()
    file = folder / "tasks.json"
    if not file.is_file():
        return None
    try:
        kinds = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidValueError(f"{str(file)!r} is no JSON: {error}") from error
    if not isinstance(kinds, dict) or not all(isinstance(kinds.get(key), list) for key in ("visual", "text")):
        raise InvalidValueError(
            f"{str(file)!r} should hold two lists of kinds, 'visual' and 'text'; it holds {kinds!r:.200}"
        )
    return {key: [str(kind) for kind in kinds[key]] for key in ("visual", "text")}


def load(
    name_or_path: str | Path | Any, *, use_fast: bool = False, **hf_options: Any
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A Hugging Face model in eval mode and its processor. Weights come from safetensors only.

    Options that the processor's classes state (`option_names`) are the processor's, and the model's besides where its
    configuration has them; all others go to the model. `use_fast` takes torchvision's image processor for PIL's.

    A folder that holds an adapter alone gives its base model with it (PEFT). A folder's own code runs only with
    trust_remote_code=True in this call; without it, transformers' own class is taken where there is one.

    Raises ModelNotFoundError, or UnknownFamilyError before any weight is loaded; IncompleteModelError where a tensor
    is missing, has another shape, or comes from outside the folder; RemoteCodeError for a model that needs its own
    code; AdapterError for an adapter that does not fit; InvalidTypeError for an option that neither model nor
    processor knows; UnsupportedError for use_fast without torchvision.
    """
    instance_of(
        "name_or_path", name_or_path, (str, Path), "a shipped model's name, a folder, or 'owner/name'"
    )
    source = model_source(str(name_or_path))
    base = adapters.adapter_base(source)
    if base is not None:
        return _load_adapted(source, base, use_fast, hf_options)
    hf_options = check_loading(hf_options)
    hf_options.setdefault("trust_remote_code", False)
    hub_options = {key: hf_options[key] for key in _HUB_OPTIONS if key in hf_options}
    if hf_options.pop("output_loading_info", False):
        raise InvalidValueError(
            "output_loading_info is not given back: a tensor that is missing is an error here"
        )
    _check_inside(source, hf_options.get("subfolder") or "")
    names: frozenset[str] = frozenset()
    try:
        config = AutoConfig.from_pretrained(source, **hub_options)
        _check_takes_images(config)
        family_of(config.model_type)
        processor = load_processor(source, use_fast=flag("use_fast", use_fast), **hub_options)
        names = option_names(processor)
        processor = with_options(processor, {name: hf_options[name] for name in names & hf_options.keys()})
        of_model = {
            name: value for name, value in hf_options.items() if name not in names or hasattr(config, name)
        }
        model, loaded = AutoModelForImageTextToText.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, **of_model
        )
    except (OSError, HfHubHTTPError) as error:
        raise ModelNotFoundError(_explain(source, error)) from error
    except MmlensError:
        raise
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise RemoteCodeError(
                f"{source!r} has code of its own, which runs only where the call asks for it: look through it, then "
                "pass trust_remote_code=True"
            ) from error
        raise InvalidValueError(f"{str(name_or_path)!r} cannot be loaded so: {error}") from error
    except TypeError as error:
        raise load_error(hf_options, error, names) from error
    except (ImportError, AssertionError) as error:
        # A package, or a kind of device, that this machine lacks.
        raise UnsupportedError(
            f"{str(name_or_path)!r} cannot be loaded so on this machine: {error}"
        ) from error
    except RuntimeError as error:
        if "mismatched" not in str(error):
            raise
        # Shapes that differ: transformers names the tensors.
        raise IncompleteModelError(
            f"the weights in {source!r} do not fit its configuration: {error}"
        ) from error
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise IncompleteModelError(
            f"the weights in {source!r} lack {len(missing)} tensor(s) of a {type(model).__name__}, which would be "
            f"drawn at random: {', '.join(missing[:5])}"
        )
    return model.eval(), processor


def _check_inside(source: str, subfolder: str) -> None:
    """Refuse an index of weights that names a file outside the folder. Links stay right: the hub's cache is made so."""
    for file in sorted((Path(source) / subfolder).glob("*.index.json")) if Path(source).is_dir() else ():
        try:
            names = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise IncompleteModelError(f"{str(file)!r} is no index of weights ({error!r})") from error
        for name in names:
            if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
                raise IncompleteModelError(
                    f"{str(file)!r} names {name!r}, which lies outside the model's folder: weights come from inside it"
                )


def _load_adapted(
    folder: str, base: str, use_fast: bool, hf_options: dict[str, Any]
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The base model with the folder's adapter; the folder's processor where it has one, else the base's."""
    try:
        model, processor = load(base, use_fast=use_fast, **hf_options)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"{folder!r} holds an adapter of {base!r}, and {error}") from error
    if any((Path(folder) / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        processor = load_processor(
            folder, use_fast=use_fast, trust_remote_code=hf_options.get("trust_remote_code", False)
        )
        names = option_names(processor) & hf_options.keys()
        processor = with_options(processor, {name: hf_options[name] for name in names})
    return adapters.with_adapter(model, folder), processor


def checked_model(model: Any) -> PreTrainedModel:
    """The Hugging Face model to wrap: `model`, or what PEFT's wrapper holds.

    Raises InvalidTypeError, with the way to one, for anything else; UnknownFamilyError for a text-only model.
    """
    if isinstance(model, (str, Path)):
        raise InvalidTypeError(
            f"HookedVLM wraps a loaded model, not the name {str(model)!r}: HookedVLM.from_pretrained({str(model)!r}) "
            "loads one"
        )
    taken = adapters.without_wrapper(model)
    if not isinstance(taken, PreTrainedModel):
        ways = {
            "TransformerBridge": "mmlens.from_bridge(bridge) takes one over",
            "HookedVLM": "it is wrapped already; its Hugging Face model is .hf_model",
        }
        # torch.compile and parallel wrappers hold the model.
        held = next(
            (
                n
                for n in (internals.COMPILED, "module")
                if isinstance(getattr(model, n, None), PreTrainedModel)
            ),
            "",
        )
        loads = "HookedVLM.from_pretrained(name or folder) loads one"
        way = (
            f"it holds one, .{held}, to wrap in its place" if held else ways.get(type(model).__name__, loads)
        )
        raise InvalidTypeError(f"HookedVLM wraps a Hugging Face model, not {shown(model)}: {way}")
    if taken.config.model_type not in FAMILIES and taken.config.get_text_config() is taken.config:
        raise UnknownFamilyError(
            f"{type(taken).__name__} is no vision-language model (its family is {taken.config.model_type!r}); for a "
            "text-only model take TransformerLens' TransformerBridge"
        )
    return taken


def check_processor(processor: Any) -> None:
    """Refuse what is no processor: a tokenizer alone knows nothing of images."""
    if processor is not None and not hasattr(processor, "tokenizer"):
        raise InvalidTypeError(
            f"the processor is {shown(processor)}; expected the model's whole processor, as "
            "AutoProcessor.from_pretrained gives it, or None"
        )


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model's inputs go: to its weights or, with a device_map, where accelerate runs its first module."""
    placed = internals.execution_device(model)
    return model.device if placed is None else placed


def _check_takes_images(config: PretrainedConfig) -> None:
    """Refuse, before any weight is read, what transformers has no image-text-to-text model for."""
    known = internals.IMAGE_TEXT_MODELS
    if config.model_type not in known and not getattr(config, "auto_map", None):
        raise UnknownFamilyError(
            unknown_name_message("image-text-to-text family", config.model_type, known)
            + ". `mmlens families` lists them all; for a text-only model take TransformerLens' TransformerBridge"
        )


def model_source(name: str) -> str:
    """Where a model is: a folder, which a shipped model's is too, or its name on the hub, which is not asked.

    >>> model_source("mikro")
    Traceback (most recent call last):
        ...
    mmlens.model.loading.ModelNotFoundError: there is no shipped model or folder 'mikro'; the nearest: 'micro'. ...
    """
    if name in shipped_models():
        return str(_SHIPPED_FOLDER / name)
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", adapters.ADAPTER_CONFIG)):
            raise ModelNotFoundError(f"the folder {name!r} holds no config.json: it is no model folder")
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelNotFoundError(f"there is no folder {name!r}")
    if "/" not in name:
        raise ModelNotFoundError(
            unknown_name_message("shipped model or folder", name, shipped_models())
            + ". A model on the hub is named 'owner/name'"
        )
    return name


def _explain(source: str, error: Exception) -> str:
    """One sentence for what went wrong, from the chain of errors that transformers raised."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    if any(isinstance(link, GatedRepoError) for link in chain):
        return f"{source!r} is gated: accept its terms on the hub and log in (`hf auth login`), or pass token=..."
    if any(isinstance(link, RepositoryNotFoundError) for link in chain):
        return f"the hub has no model {source!r} (or it is private: pass token=...)"
    if Path(source).is_dir():
        return f"the model in {source!r} cannot be loaded: {error}"
    if any(isinstance(link, LocalEntryNotFoundError) for link in chain):
        return (
            f"{source!r} is not on this machine and the hub is out of reach. Offline, use a folder or a shipped "
            f"model ({', '.join(shipped_models())}); HF_HUB_OFFLINE=1 saves the retries"
        )
    return f"{source!r} cannot be loaded: {error}"
