"""Loading a Hugging Face processor with its PIL image half, with or without torchvision, and changing its options.

A processor with a video half refuses to be built where torchvision is missing, although images and text need
none of it. The video half is left out there, and a video is refused with the command that mends it.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    BatchFeature,
    FuyuProcessor,
    ImageProcessingMixin,
    ProcessorMixin,
)

from mmlens import internals
from mmlens.arguments import shown, unknown_name_message
from mmlens.errors import InvalidTypeError, InvalidValueError, UnsupportedError


class _NoVideo:
    """Stands where a video half was: processors that copy its settings (MiniCPM-V's) find None, and no inputs."""

    model_input_names: list[str] = []

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@functools.cache
def without_video(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The processor class less its video half; saved folders name the original class.

    >>> from transformers import Qwen3VLProcessor
    >>> "video_processor" in without_video(Qwen3VLProcessor).get_attributes()
    False
    """

    order = processor_class.get_attributes()

    class ByName(ProcessorMixin):
        # ProcessorMixin pairs positional arguments with the attributes that are left, which shifts them where
        # the video half is not the last one (Qwen's omni processors).
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            named = {**dict(zip(order, args, strict=False)), **kwargs}
            named.pop("video_processor", None)
            super().__init__(**named)

    class WithoutVideo(processor_class, ByName):
        video_processor = _NoVideo()

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in processor_class.get_attributes() if name != "video_processor"]

        @classmethod
        def from_args_and_dict(
            cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any
        ) -> ProcessorMixin:
            at = order.index("video_processor")
            with_none = [*args[:at], None, *args[at:]]
            return super().from_args_and_dict(
                with_none, {**processor_dict, "video_processor": None}, **kwargs
            )

        # SmolVLM's own asks the video half for its frame rate, whatever the messages hold.
        apply_chat_template = ProcessorMixin.apply_chat_template

    return _named_as(processor_class, WithoutVideo)


def _processor_class(name_or_path: str | Path, **hub_options: Any) -> type[ProcessorMixin]:
    """The family's processor, or the one that the files name where the family has none of its own (GLM-OCR)."""
    config_class = type(AutoConfig.from_pretrained(name_or_path, **hub_options))
    named, _ = ProcessorMixin.get_processor_dict(name_or_path, **hub_options)
    of_family = internals.processor_class_of(config_class)
    if "PixtralProcessor" in (named.get("processor_class"), getattr(of_family, "__name__", None)):
        # Pixtral-12B's family is LLaVA, whose processor is another.
        return internals.pixtral_processor()
    if of_family is not None:
        return of_family
    if "processor_class" not in named:
        named, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path, **hub_options)
    if "processor_class" not in named:
        raise InvalidValueError(
            f"no file of {name_or_path} names its processor_class; transformers knows no other way"
        )
    return internals.processor_class_named(named["processor_class"])


def with_flat_images(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The processor class that also takes a list of images for every prompt, as others do (GOT-OCR 2 refuses it)."""

    class WithFlatImages(processor_class):
        def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
            flat = images
            if images is not None and any(isinstance(own, (list, tuple)) for own in images):
                flat = [image for own in images for image in own]
            # Its own reads these two without a default.
            kwargs = {"format": False, "images_kwargs": {}, **kwargs}
            return super().prepare_inputs_layout(images=flat, text=text, **kwargs)

    return _named_as(processor_class, WithFlatImages)


def with_placeholders(processor_class: type[FuyuProcessor]) -> type[FuyuProcessor]:
    """FuyuProcessor for prompts that name their images themselves, in any number.

    Its own writes the placeholder of one image in front of every prompt, and the token that begins the answer
    after it. Here the chat template writes both; "<0x04>" begins the answer.
    """

    class WithPlaceholders(processor_class):
        def __init__(self, image_processor: Any, tokenizer: Any, chat_template: Any = None, **kwargs: Any):
            super().__init__(image_processor, tokenizer, **kwargs)
            self.chat_template = chat_template

        def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
            # Its tokenizer pads on the left by itself; `image_patches`, the older name, is deprecated.
            return super().__call__(images=images, text=text, return_legacy_image_output=False, **kwargs)

        def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
            flat = (
                None if images is None else internals.make_flat_list_of_images([own for own in images if own])
            )
            return flat, [text] if isinstance(text, str) else list(text), None, None

        def _process_images(
            self, images: Any, return_legacy_image_output: bool = False, **kwargs: Any
        ) -> tuple[dict[str, Any], list[str]]:
            # Its own hands tensors to the PIL half, whose patchify_image takes arrays.
            processed = self.image_processor(images, **{**kwargs, "return_tensors": None})
            patch = self.image_processor.patch_size
            edges = (patch["height"], patch["width"])
            patches, replacements = [], []
            for (image,), (height,), (width,) in zip(
                processed["images"],
                processed["image_unpadded_heights"],
                processed["image_unpadded_widths"],
                strict=True,
            ):
                rows, columns = (
                    min(padded, math.ceil(length / edge) * edge) // edge
                    for padded, length, edge in zip(image.shape[-2:], (height, width), edges, strict=True)
                )
                shown = image[..., : rows * edges[0], : columns * edges[1]]
                patches.append(self.image_processor.patchify_image(image=shown, patch_size=patch))
                replacements.append(
                    self.replace_image_token({}, 0, num_patches=rows * columns, row_width=columns)
                )
            return {"pixel_values": torch.from_numpy(np.concatenate(patches))}, replacements

    return _named_as(processor_class, WithPlaceholders)


def _named_as(original: type[ProcessorMixin], changed: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Saved folders name the original class."""
    changed.__name__ = changed.__qualname__ = original.__name__
    changed.__module__ = original.__module__
    return changed


_CALLED_IN_OTHER_WAYS: dict[str, Callable[[Any], type[ProcessorMixin]]] = {
    "FuyuProcessor": with_placeholders,
    "GotOcr2Processor": with_flat_images,
}


def _has_video(name_or_path: str | Path, hub_options: dict[str, Any]) -> bool:
    """Whether the processor's video half can be built: torchvision is here, and the files have its settings."""
    if not internals.is_torchvision_available():
        return False
    try:
        internals.BaseVideoProcessor.get_video_processor_dict(name_or_path, **hub_options)
    except OSError:
        return False
    return True


def load_processor(name_or_path: str | Path, *, use_fast: bool = False, **hub_options: Any) -> ProcessorMixin:
    """The processor that belongs to a model folder or hub id: images by PIL, videos where torchvision is.

    With torchvision installed transformers would resize images by it, to slightly other pixels; PIL gives the
    same numbers on every machine. `use_fast` takes torchvision's image processor all the same. `hub_options` go to
    `from_pretrained` (revision, token, cache_dir, ...).

    Raises UnsupportedError for use_fast where torchvision is not installed.
    """
    if use_fast and not internals.is_torchvision_available():
        raise UnsupportedError(
            "use_fast=True takes torchvision's image processor, and torchvision is not installed: pip install "
            "torchvision. Without it images are processed by PIL (use_fast=False)"
        )
    processor_class = _processor_class(name_or_path, **hub_options)
    if "video_processor" in processor_class.get_attributes() and not _has_video(name_or_path, hub_options):
        processor_class = without_video(processor_class)  # type: ignore[arg-type]
    if processor_class.__name__ in _CALLED_IN_OTHER_WAYS:
        processor_class = _CALLED_IN_OTHER_WAYS[processor_class.__name__](processor_class)
    processor = processor_class.from_pretrained(name_or_path, **hub_options)
    if not hasattr(processor, "image_token") and not hasattr(processor, "image_token_id"):
        # PP-Chart2Table's knows no image token; its chat template writes what the model looks for.
        config = AutoConfig.from_pretrained(name_or_path, **hub_options)
        if hasattr(config, "image_token_id"):
            processor.image_token_id = config.image_token_id
    if internals.is_torchvision_available():
        processor.image_processor = AutoImageProcessor.from_pretrained(
            name_or_path, backend="torchvision" if use_fast else "pil", **hub_options
        )
    return processor


def separate(processor: ProcessorMixin) -> ProcessorMixin:
    """The same processor for another thread, which nothing that one of the two does to itself reaches."""
    twin = copy.copy(processor)
    for name in ("image_processor", "video_processor"):
        if name in vars(processor):
            setattr(twin, name, copy.copy(getattr(processor, name)))
    twin.tokenizer = internals.separate_tokenizer(processor.tokenizer)
    return twin


# ---------------------------------------------------------------------- options

_HALVES = {"images_kwargs": "image_processor", "videos_kwargs": "video_processor"}
"""transformers' name for the options of a half of a processor -> the half."""

_NO_OPTIONS = frozenset(
    {
        "data_format",
        "device",
        "disable_grouping",
        "input_data_format",
        "return_metadata",
        "return_tensors",
        "video_metadata",
    }
)
"""In what form pixels go in and come out, which the prompt settles."""


def option_names(processor: ProcessorMixin) -> frozenset[str]:
    """The options of a processor's images and clips, as its classes state them: "do_resize", "size", ...

    >>> from mmlens.model.loading import load
    >>> _, processor = load("micro")
    >>> {"do_resize", "size"} <= option_names(processor), "max_length" in option_names(processor)
    (True, False)
    """
    return frozenset().union(*(_names(processor, key) for key in _HALVES), _HALVES)


def with_options(processor: ProcessorMixin, options: Mapping[str, Any]) -> ProcessorMixin:
    """A processor that treats images and clips as processor(..., **options) of this one does.

    They are set on copies of its halves, so that layouts read them there; an option that images and clips share is
    set for both, as transformers does, and `images_kwargs` and `videos_kwargs` hold those of one half. What is None
    counts as not given. The tokenizer is shared, and the processor that was given stays as it is.

    Raises InvalidTypeError for a name that is none of its options, InvalidValueError for a value that such an option
    does not take.
    """
    per_half = _per_half(processor, {name: value for name, value in options.items() if value is not None})
    if not any(per_half.values()):
        return processor
    changed = copy.copy(processor)
    for key, own in per_half.items():
        half: Any = getattr(processor, _HALVES[key], None)
        if not own:
            continue
        known = half.valid_kwargs.__annotations__
        of_half = {name: value for name, value in own.items() if name in known}
        try:
            validate_typed_dict(half.valid_kwargs, of_half)
            setattr(changed, _HALVES[key], type(half).from_dict(half.to_dict(), **of_half))
        except (StrictDataclassError, ValueError, TypeError) as error:
            raise InvalidValueError(f"{type(half).__name__} takes no such options, {own}: {error}") from error
        # The processor's own defaults would go before the half's.
        defaults = {**getattr(processor, key, {}), **own}
        setattr(changed, key, {name: value for name, value in defaults.items() if name not in of_half})
    return changed


def _names(processor: ProcessorMixin, key: str) -> frozenset[str]:
    """The options of a half of the processor; none where it lacks the half."""
    half = getattr(processor, _HALVES[key], None)
    known = getattr(getattr(half, "valid_kwargs", None), "__annotations__", None)
    if known is None:
        return frozenset()
    stated = processor.valid_processor_kwargs.__annotations__[key]
    return frozenset({*known, *stated.__annotations__} - _NO_OPTIONS)


def _per_half(processor: ProcessorMixin, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of each half, by transformers' name for them."""
    names = {key: _names(processor, key) for key in _HALVES}
    per_half: dict[str, dict[str, Any]] = {
        key: {name: value for name, value in options.items() if name in names[key]} for key in _HALVES
    }
    unknown = [
        name for name in options if name not in _HALVES and not any(name in own for own in names.values())
    ]
    for key in _HALVES:
        nested = options.get(key, {})
        if not isinstance(nested, Mapping):
            raise InvalidTypeError(f"{key} is {shown(nested)}; expected a dict of options")
        twice = [name for name in nested if name in per_half[key]]
        if twice:
            raise InvalidTypeError(f"the option {twice[0]!r} is given twice, alone and in {key}")
        unknown += [name for name in nested if name not in names[key]]
        per_half[key].update({name: value for name, value in nested.items() if name in names[key]})
    if unknown:
        raise InvalidTypeError(
            f"{type(processor).__name__}: {unknown_name_message('option', unknown[0], sorted(option_names(processor)))}"
        )
    clips = per_half["videos_kwargs"]
    if {"fps", "num_frames"} & clips.keys():
        # As apply_chat_template does: a rate of frames is a wish to sample them.
        clips.setdefault("do_sample_frames", True)
    return per_half
