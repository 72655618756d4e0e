"""Fingerprints change with what they are of, and with nothing else."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import os
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from PIL import Image

import mmlens
from mmlens.data.examples import Evidence, Example
from mmlens.experiments.catalog import EXPERIMENTS
from mmlens.provenance import (
    EDITED,
    code_fingerprint,
    data_fingerprint,
    describe_model,
    fingerprint,
    machine,
    versions,
)
from mmlens.runs.rerun import is_current


def test_fingerprint_is_of_the_weights(micro: mmlens.HookedVLM) -> None:
    other = mmlens.HookedVLM(copy.deepcopy(micro.hf_model), micro.processor)
    assert fingerprint(other) == fingerprint(micro)
    with torch.no_grad():
        other.hf_model.lm_head.weight[0, 0] += 1
    assert fingerprint(other) != fingerprint(micro)


def example() -> Example:
    return Example(
        "What?", "red", (Image.new("RGB", (4, 4)),), (Evidence(0, (0, 0, 2, 2)),), "kind", ("red", "blue"), "a", "g"
    )  # fmt: skip


def test_every_part_of_an_example_is_in_the_data_s_fingerprint() -> None:
    was = data_fingerprint([example()])
    assert was == data_fingerprint([dataclasses.replace(example(), metadata={"note": 1})])
    assert was == data_fingerprint(
        [dataclasses.replace(example(), evidence=(Evidence(0, (0.0, 0.0, 2.0, 2.0)),))]
    )
    pixel = Image.new("RGB", (4, 4))
    pixel.putpixel((3, 3), (0, 0, 1))
    for change in (
        {"question": "Who?"},
        {"answer": "blue"},
        {"images": (pixel,)},
        {"images": (Image.new("RGB", (2, 8)),)},
        {"evidence": (Evidence(0, (0, 0, 2, 3)),)},
        {"evidence": (Evidence(0),)},
        {"kind": "other"},
        {"candidates": ("blue", "red")},
        {"id": "b"},
        {"group": "h"},
    ):
        assert data_fingerprint([dataclasses.replace(example(), **change)]) != was, change  # type: ignore[arg-type]
    assert data_fingerprint([example(), example()]) != was != data_fingerprint([])


def test_a_palette_is_part_of_an_image() -> None:
    def paletted(red: int) -> Example:
        image = Image.new("P", (4, 4))
        image.putpalette([red, 0, 0])
        return Example("What?", "red", (image,))

    assert data_fingerprint([paletted(1)]) != data_fingerprint([paletted(2)])


def test_code_s_fingerprint_follows_imports_within_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = "def inner():\n    from mmlens.scores import retrieval\n    import json\n"
    (tmp_path / "made_up.py").write_text(source)
    made_up = importlib.import_module("made_up")
    was = code_fingerprint(made_up.inner)
    assert was == code_fingerprint(made_up.inner)
    (tmp_path / "made_up.py").write_text(source + "x = 1\n")
    assert code_fingerprint(made_up.inner) != was
    (tmp_path / "made_up.py").write_text(source)
    changed = tmp_path / "attention.py"
    changed.write_text(Path(sys.modules["mmlens.scores.retrieval"].__file__ or "").read_text() + "x = 1\n")
    monkeypatch.setattr("mmlens.scores.retrieval.__file__", str(changed))
    assert code_fingerprint(made_up.inner) != was


def test_source_written_after_it_was_read_is_marked_and_never_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "written_before.py"
    path.write_text("def run():\n    pass\n")
    os.utime(path, (0, 0))
    function = importlib.import_module("written_before").run
    before = code_fingerprint(function)
    assert not before.endswith(EDITED)
    experiment = dataclasses.replace(EXPERIMENTS["masking"], run=function)
    assert is_current({"versions": versions(), "code": before}, experiment)
    path.write_text("def run():\n    return 1\n")
    after = code_fingerprint(function)
    assert after.endswith(EDITED) and not after.startswith(before)
    for code in (before, after):
        assert not is_current({"versions": versions(), "code": code}, experiment)


def test_versions_and_machine_are_those_at_hand(micro: mmlens.HookedVLM) -> None:
    # torch says its build of itself (2.14.1+cu130), which the package's metadata may leave out.
    assert versions()["torch"] == version("torch")
    assert Version(version("torch")).public == Version(torch.__version__).public
    found = machine(micro)
    assert found["threads"] == torch.get_num_threads() and found["device"] == "cpu"
    assert found["dtype"] == "float32"
    told = describe_model(micro, "mine")
    assert told["name"] == "mine" and told["n_layers"] == len(micro.hf_model.model.language_model.layers)
    assert describe_model(micro)["name"] == "micro"
