"""What of each image-text-to-text family in transformers is supported: what `mmlens families` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import pandas as pd

from mmlens.families.catalog import FAMILIES
from mmlens.families.record import Family
from mmlens.families.refused import refusal
from mmlens.hook_names import BLOCK_HOOKS, BLOCK_IMAGE_HOOKS, MODEL_HOOKS
from mmlens.internals import IMAGE_PROCESSORS, IMAGE_TEXT_MODELS

if TYPE_CHECKING:
    from mmlens.model.hooked_vlm import HookedVLM

Status = Literal["supported", "partly", "refused", "untested"]

_WHERE_THERE_ARE = ("ln1_post.", "ln2_post.")
_OWN = (
    "vision.ln_post",
    "vision.deepstack",
    "blocks.{l}.hook_deepstack",
    "blocks.{l}.mlp.hook_post",
    *(f"blocks.{{l}}.attn.hook_{name}_input" for name in "qkv"),
)


def missing_hooks(model: HookedVLM) -> list[str]:
    """Hook points of the vocabulary that the model, or one of its layers, does not have; layers written {l}.

    Norms after attention and MLP, the tower's last norm, deep injection, one layer of neurons (experts have
    several) and inputs by head are parts that a family has or has not; they are never missing.
    """
    usual = [hook for hook in BLOCK_HOOKS if not hook.startswith(_WHERE_THERE_ARE)]
    missing = [name for name in MODEL_HOOKS if not name.startswith(_OWN) and name not in model.hook_dict]
    n_vision = len(model.anatomy.stacks.get("vision.", ()))
    for prefix, n_layers, hooks in (
        ("", len(model.anatomy.language), [*usual, *BLOCK_IMAGE_HOOKS]),
        ("vision.", n_vision, usual),
    ):
        for hook in hooks:
            names = [f"{prefix}blocks.{layer}.{hook}" for layer in range(n_layers)]
            if not n_layers or any(name not in model.hook_dict for name in names):
                missing.append(f"{prefix}blocks.{{l}}.{hook}")
    return missing


def support_table() -> pd.DataFrame:
    """One row per family of transformers' image-text-to-text mapping: family, status, token map, notes.

    >>> table = support_table().set_index("family")
    >>> table.loc["qwen3_vl", "status"], table.loc["blip", "status"]
    ('supported', 'refused')
    """
    rows = [_row(name) for name in sorted(IMAGE_TEXT_MODELS)]
    return pd.DataFrame(rows, columns=["family", "status", "token_map", "notes"])


def _token_map(family: Family) -> str:
    if family.layout is None:
        return f"no: {family.no_layout}"
    images = IMAGE_PROCESSORS.get(family.model_type) or {"pil": ""}
    return "yes" if images.get("pil") is not None else "yes; its image processor needs torchvision"


def _row(name: str) -> tuple[str, Status, str, str]:
    why = refusal(name)
    if why is not None:
        return name, "refused", "no", why
    if name in FAMILIES:
        family = FAMILIES[name]
        notes = "; ".join(f"no {pattern}: {why}" for pattern, why in family.missing.items())
        token_map = _token_map(family)
        return name, "partly" if family.missing else "supported", token_map, notes
    return name, "untested", "no", "a family that mmlens has no record of; discovery is tried, with a warning"
