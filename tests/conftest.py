"""Shared fixtures: one tiny random model per family, and the shipped micro model, loaded once."""

from __future__ import annotations

import pytest
import tiny
import torch

import mmlens
from mmlens.prompt import Prompt

QUESTION = "What colour is the letter K?"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Beside another busy process, two torch threads run many times slower than one.
    torch.set_num_threads(1)


def hooked(family: str, **options: object) -> mmlens.HookedVLM:
    return mmlens.HookedVLM(tiny.tiny_model(family, **options).eval(), tiny.tiny_processor(family))


def two_image_prompt(model: mmlens.HookedVLM) -> Prompt:
    return model.prompt(QUESTION, images=tiny.tiny_images(2, seed=0))


def padded_prompt(model: mmlens.HookedVLM) -> Prompt:
    """Two rows of different length: the second has one image and a shorter question."""
    images = tiny.tiny_images(3, seed=1)
    return model.prompt([QUESTION, "Where?"], images=[images[:2], images[2:]])


@pytest.fixture(params=tiny.REPRESENTATIVES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> mmlens.HookedVLM:
    return hooked(family)


@pytest.fixture(scope="session")
def micro() -> mmlens.HookedVLM:
    return mmlens.HookedVLM.from_pretrained("micro")
