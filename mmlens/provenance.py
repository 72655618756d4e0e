"""What a result was computed with: versions, machine, and fingerprints of weights, examples and code."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mmlens.data.chats import Chat
from mmlens.data.examples import Example
from mmlens.model.fingerprints import tensor_bytes
from mmlens.model.hooked_vlm import HookedVLM

PACKAGES = ("mmlens", "torch", "transformers", "transformer-lens", "numpy", "scipy")

_IMPORTED = time.time()
"""When this process read its source; what is written later does not run in it."""

EDITED = "+edited"
"""Ends the fingerprint of source that was written after this process had read it, so that it equals no other's."""

_DIGITS = 16
"""Hexadecimal digits of a fingerprint: 64 bits, so that two of a million differ but for one chance in 10^7."""


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of packages, and of Python.

    >>> sorted(versions(["torch"]))
    ['python', 'torch']
    """
    return {**{name: version(name) for name in packages}, "python": platform.python_version()}


def machine(model: HookedVLM) -> dict[str, Any]:
    """Platform, threads of torch, and where the model lies: its device (or device map) and dtype."""
    placed = getattr(model.hf_model, "hf_device_map", None)
    device = str(model.hf_model.device)
    return {
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": device,
        **({"device_name": torch.cuda.get_device_name()} if device.startswith("cuda") else {}),
        **({"device_map": {name or "all": str(where) for name, where in placed.items()}} if placed else {}),
        "dtype": str(model.hf_model.dtype).removeprefix("torch."),
    }


def describe_model(model: HookedVLM, name: str = "") -> dict[str, Any]:
    """A model in plain JSON: its name (default: its configuration's), family, sizes, dtype and fingerprint."""
    return {
        "name": name
        or model.hf_model.config.name_or_path.rsplit("/", 1)[-1]
        or type(model.hf_model).__name__,
        "family": model.family.model_type,
        "n_layers": model.cfg.n_layers,
        "n_heads": model.cfg.n_heads,
        # Only where not every layer has n_heads of them.
        **({} if model.grid.is_full else {"heads_per_layer": model.grid.heads_per_layer}),
        "n_key_value_heads": model.cfg.n_key_value_heads,
        "n_parameters": sum(p.numel() for p in model.hf_model.parameters()),
        "dtype": str(model.hf_model.dtype).removeprefix("torch."),
        "fingerprint": fingerprint(model),
    }


def fingerprint(model: HookedVLM) -> str:
    """A short hash of the model's weights: the same for the same numbers, whatever the file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.hf_model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:_DIGITS]


def data_fingerprint(examples: Sequence[Example]) -> str:
    """A short hash of examples, in their order: text, pixels, evidence and all else but the metadata.

    >>> from mmlens.data.scenes import scene_examples
    >>> one, other = (scene_examples("objects", 2, seed) for seed in (0, 1))
    >>> data_fingerprint(one) == data_fingerprint(scene_examples("objects", 2, 0)) != data_fingerprint(other)
    True
    """
    digest = hashlib.sha256()
    for example in examples:
        # A palette is no part of the bytes of an image that has one.
        images = [image.convert("RGBA") if image.mode == "P" else image for image in example.images]
        pixels = [(image.mode, image.size, hashlib.sha256(image.tobytes()).hexdigest()) for image in images]
        pixels += [("video", video.size, video.fingerprint) for video in example.videos]
        evidence = [
            (
                region.image if region.video is None else ("video", region.video, region.frames),
                region.box and tuple(map(float, region.box)),
            )
            for region in example.evidence
        ]
        texts = [getattr(example, name) for name in ("id", "kind", "group", "question", "answer")]
        texts += [list(each) for each in Chat(list(example.messages)).said]
        digest.update(json.dumps([texts, example.candidates, evidence, pixels]).encode() + b"\n")
    return digest.hexdigest()[:_DIGITS]


def code_fingerprint(function: Callable[..., Any]) -> str:
    """A short hash of the source that `function` is made of: its module and the modules of mmlens it imports.

    Imports are followed through the source, those inside functions too; other packages have versions. It ends in
    "+edited" where a file is younger than this process: what ran is then not what was hashed.
    """
    found: dict[str, tuple[bytes, float]] = {}
    _follow(function.__module__, found)
    digest = hashlib.sha256()
    for name, (source, _) in sorted(found.items()):
        digest.update(f"{name}\n".encode() + source)
    edited = any(written > _IMPORTED for _, written in found.values())
    return digest.hexdigest()[:_DIGITS] + (EDITED if edited else "")


def _follow(module: str, found: dict[str, tuple[bytes, float]]) -> None:
    """Add a module's source, when it was written, and what it imports from mmlens."""
    path = _source_file(module)
    if module in found or path is None:
        return
    found[module] = path.read_bytes(), path.stat().st_mtime
    for name in _imports(found[module][0]):
        _follow(name, found)


@cache
def _imports(source: bytes) -> tuple[str, ...]:
    """What a module imports from mmlens; from a package it may be a module of it."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(name for name in dict.fromkeys(names) if name.split(".")[0] == "mmlens")


def _source_file(module: str) -> Path | None:
    if module in sys.modules:
        file = getattr(sys.modules[module], "__file__", None)
        return None if file is None else Path(file)
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(found.origin) if found is not None and found.origin is not None else None
