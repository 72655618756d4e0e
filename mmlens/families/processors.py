"""Loading a Hugging Face processor with its PIL image half, with or without torchvision.

A processor with a video half refuses to be built where torchvision is missing, although images and text need
none of it. The video half is left out and clips come as frames.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available


@functools.cache
def without_video(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The processor class less its video half; saved folders name the original class.

    >>> from transformers import Qwen3VLProcessor
    >>> "video_processor" in without_video(Qwen3VLProcessor).get_attributes()
    False
    """

    class WithoutVideo(processor_class):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in processor_class.get_attributes() if name != "video_processor"]

        @classmethod
        def from_args_and_dict(
            cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any
        ) -> ProcessorMixin:
            return super().from_args_and_dict(args, {**processor_dict, "video_processor": None}, **kwargs)

        # SmolVLM's own asks the video half for its frame rate, whatever the messages hold.
        apply_chat_template = ProcessorMixin.apply_chat_template

    WithoutVideo.__name__ = WithoutVideo.__qualname__ = processor_class.__name__
    WithoutVideo.__module__ = processor_class.__module__
    return WithoutVideo


def load_processor(name_or_path: str | Path, **hub_options: Any) -> ProcessorMixin:
    """The processor that belongs to a model folder or hub id: images by PIL, clips as separate frames.

    With torchvision installed transformers would resize images by it, to slightly other pixels; PIL gives the
    same numbers on every machine. `hub_options` go to `from_pretrained` (revision, token, cache_dir, ...).
    """
    processor_class = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(name_or_path, **hub_options))]
    if "video_processor" in processor_class.get_attributes():
        processor_class = without_video(processor_class)
    processor = processor_class.from_pretrained(name_or_path, **hub_options)
    if is_torchvision_available():
        processor.image_processor = AutoImageProcessor.from_pretrained(
            name_or_path, backend="pil", **hub_options
        )
    return processor
