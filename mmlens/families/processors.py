"""Loading a Hugging Face processor with its PIL image half, with or without torchvision.

A processor with a video half refuses to be built where torchvision is missing, although images and text need
none of it. The video half is left out and clips come as frames.
"""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, ImageProcessingMixin, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from transformers.utils import is_torchvision_available


class _NoVideo:
    """Stands where a video half was: processors that copy its settings (MiniCPM-V's) find None."""

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
            return super().from_args_and_dict(with_none, {**processor_dict, "video_processor": None}, **kwargs)

        # SmolVLM's own asks the video half for its frame rate, whatever the messages hold.
        apply_chat_template = ProcessorMixin.apply_chat_template

    WithoutVideo.__name__ = WithoutVideo.__qualname__ = processor_class.__name__
    WithoutVideo.__module__ = processor_class.__module__
    return WithoutVideo


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


def _processor_class(name_or_path: str | Path, **hub_options: Any) -> type[ProcessorMixin]:
    """The family's processor, or the one that the files name where the family has none of its own (GLM-OCR)."""
    config_class = type(AutoConfig.from_pretrained(name_or_path, **hub_options))
    if config_class in PROCESSOR_MAPPING:
        return PROCESSOR_MAPPING[config_class]
    named, _ = ProcessorMixin.get_processor_dict(name_or_path, **hub_options)
    if "processor_class" not in named:
        named, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path, **hub_options)
    if "processor_class" not in named:
        raise ValueError(f"no file of {name_or_path} names its processor_class; transformers knows no other way")
    return processor_class_from_name(named["processor_class"])


def load_processor(name_or_path: str | Path, **hub_options: Any) -> ProcessorMixin:
    """The processor that belongs to a model folder or hub id: images by PIL, clips as separate frames.

    With torchvision installed transformers would resize images by it, to slightly other pixels; PIL gives the
    same numbers on every machine. `hub_options` go to `from_pretrained` (revision, token, cache_dir, ...).
    """
    processor_class = _processor_class(name_or_path, **hub_options)
    if "video_processor" in processor_class.get_attributes():
        processor_class = without_video(processor_class)
    processor = processor_class.from_pretrained(name_or_path, **hub_options)
    if is_torchvision_available():
        processor.image_processor = AutoImageProcessor.from_pretrained(
            name_or_path, backend="pil", **hub_options
        )
    return processor
