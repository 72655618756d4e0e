"""Shared fixtures: one tiny random model per family, and the shipped micro model, loaded once."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny.wrapped import hooked

import mmlens
from mmlens.families.refused import BROKEN, refusal

# What tests import, and a program of its own.
collect_ignore = ["support", "bad_inputs"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Families that the installed transformers itself does not run are skipped, by that release alone.

    Tests of minutes begin first, so that no process waits for another's at the end.
    """
    items.sort(key=lambda item: item.get_closest_marker("minutes") is None)
    broken = {name: pytest.mark.skip(reason=refusal(name)) for name in BROKEN if refusal(name)}
    for item in items:
        call = getattr(item, "callspec", None)
        for value in () if call is None or "canary of" in call.id else call.params.values():
            if isinstance(value, str) and value in broken:
                item.add_marker(broken[value])


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Beside another busy process, two torch threads run many times slower than one.
    torch.set_num_threads(1)


@pytest.fixture(params=tiny.REPRESENTATIVES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> mmlens.HookedVLM:
    return hooked(family)


@pytest.fixture(scope="session")
def micro() -> mmlens.HookedVLM:
    return mmlens.HookedVLM.from_pretrained("micro")
