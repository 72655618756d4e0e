"""Loading a Hugging Face processor with its PIL image half, with or without torchvision.

A processor with a video half refuses to be built where torchvision is missing, although images and text need
none of it. The video half is left out there, and a video is refused with the command that mends it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    BatchFeature,
    FuyuProcessor,
    ImageProcessingMixin,
    ProcessorMixin,
)
from transformers.video_processing_utils import BaseVideoProcessor

from mmlens import internals
from mmlens.errors import InvalidValueError


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
        BaseVideoProcessor.get_video_processor_dict(name_or_path, **hub_options)
    except OSError:
        return False
    return True


def load_processor(name_or_path: str | Path, **hub_options: Any) -> ProcessorMixin:
    """The processor that belongs to a model folder or hub id: images by PIL, videos where torchvision is.

    With torchvision installed transformers would resize images by it, to slightly other pixels; PIL gives the
    same numbers on every machine. `hub_options` go to `from_pretrained` (revision, token, cache_dir, ...).
    """
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
            name_or_path, backend="pil", **hub_options
        )
    return processor
