"""Processors as they are loaded: images by PIL everywhere, videos where torchvision is."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from transformers.utils import is_torchvision_available

import mmlens
from mmlens.families.processors import load_processor


@pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision")
def test_a_processor_is_loaded_with_its_video_half_where_torchvision_is(tmp_path: Path) -> None:
    tiny.tiny_model("qwen3_vl").save_pretrained(tmp_path)
    tiny.tiny_processor("qwen3_vl").save_pretrained(tmp_path)
    processor = load_processor(tmp_path)
    assert type(processor.video_processor).__name__ == "Qwen3VLVideoProcessor"
    assert processor.video_processor.patch_size == tiny.base.PATCH
    assert type(processor.image_processor).__name__.endswith("Pil")


def test_a_processor_whose_files_know_no_videos_is_loaded_without_that_half(tmp_path: Path) -> None:
    processor = mmlens.HookedVLM.from_pretrained("micro").processor
    assert "video_processor" not in type(processor).get_attributes()
    assert type(processor.image_processor).__name__.endswith("Pil")
