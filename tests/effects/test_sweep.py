"""`sweep` against one whole run for every intervention, in every family, and what it says it reused."""

from __future__ import annotations

import warnings
from typing import Any

import pandas as pd
import pytest
import tiny
import torch
from tiny.wrapped import family_prompt, hooked_family, largest_logit
from torch import Tensor

from mmlens.effects.sweeps import reuse_table, sweep
from mmlens.interventions.edits import Edit
from mmlens.model.choosing import Positions
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import Intervention, NoChangeWarning
from mmlens.model.prompt import Prompt

ONE_BY_ONE = {
    *("gemma4", "mistral_large4", "glm5_next", "idefics"),
    *("minimax_m3_vl", "dots3_note", "hy_v4_vl", "inkling2", "inkling_mm_model"),
}
"""Families of which no partial run is exact: layers hand each other more than the stream, or something stands
between them."""


def logit(index: int) -> Any:
    def metric(logits: Tensor, prompt: Prompt) -> Tensor:
        return logits[:, -1, index].float()

    return metric


METRICS = {f"logit {index}": logit(index) for index in (5, 11, 100)}


def scaled(name: str, positions: Positions, heads: list[int] | None = None) -> Intervention:
    def intervention(model: HookedVLM, prompt: Prompt) -> list[Any]:
        return [(name, Edit(model, prompt, name, lambda x, here: 1.5 * x, positions=positions, heads=heads))]

    return intervention


def by_hand(name: str) -> Intervention:
    """A hook function of which nothing is known, that edits in place."""

    def negate(x: Tensor, hook: Any) -> None:
        x[:, -2:] *= -1

    return lambda model, prompt: [(name, negate)]


def every_kind(model: HookedVLM) -> dict[str, Intervention]:
    """Interventions that start early and late, after and before attention, everywhere and at the end."""
    first, last = model.attention_layers[0], model.attention_layers[-1]
    wanted: dict[str, tuple[str, Intervention]] = {}
    for layer in {first, last}:
        attention = model.anatomy.language[layer].attention
        own_keys = attention is not None and not attention.reads_image
        for hook, positions, heads in (
            ("attn.hook_z", None, [0]),
            ("attn.hook_z", "last", [0]),
            ("attn.hook_q", "last", [0]),
            *([("attn.hook_v", "text", [0])] if own_keys else []),
            ("attn.hook_pattern", "last", [0]),
            ("hook_resid_pre", None, None),
            ("hook_attn_out", "last", None),
            ("hook_resid_mid", "text", None),
            ("hook_mlp_out", None, None),
        ):
            name = f"blocks.{layer}.{hook}"
            wanted[f"{name} {positions}"] = name, scaled(name, positions, heads)
        name = f"blocks.{layer}.hook_resid_post"
        wanted[f"{name} by hand"] = name, by_hand(name)
    image = f"blocks.{last}.image.hook_resid_pre"
    for name in ("image.hook_embed", image, "hook_embed", "ln_final.hook_normalized"):
        wanted[name] = name, scaled(name, None)
    wanted["a tower head"] = "vision.blocks.1.attn.hook_z", scaled("vision.blocks.1.attn.hook_z", None, [1])
    return {label: intervention for label, (name, intervention) in wanted.items() if name in model.hook_dict}


def one_by_one(model: HookedVLM, prompt: Prompt, interventions: dict[str, Intervention]) -> pd.DataFrame:
    rows = []
    with torch.no_grad():
        for label, intervention in interventions.items():
            logits = model.run_with_hooks(prompt, fwd_hooks=intervention(model, prompt))
            for metric, function in METRICS.items():
                for example, value in enumerate(function(logits, prompt).tolist()):
                    rows.append((label, example, metric, value))
    return pd.DataFrame(rows, columns=["intervention", "example", "metric", "value"])


def largest_difference(table: pd.DataFrame, slow: pd.DataFrame) -> float:
    keys = ["intervention", "example", "metric"]
    both = table.merge(slow, on=keys, suffixes=("", "_slow"), validate="one_to_one")
    assert len(both) == len(table) == len(slow)
    return float((both["value"] - both["value_slow"]).abs().max())


@pytest.mark.parametrize(
    "name", tiny.others_slow((*tiny.REPRESENTATIVES, *tiny.FURTHER_KINDS, "gemma4", "idefics"))
)
def test_a_sweep_is_one_run_for_each_intervention(name: str) -> None:
    model = hooked_family(name)
    prompt, interventions = family_prompt(name, model), every_kind(model)
    with warnings.catch_warnings():
        # Some of these edits change nothing in some family: a tower head after the layer that is read.
        warnings.simplefilter("ignore", NoChangeWarning)
        slow = one_by_one(model, prompt, interventions)
        table = sweep(model, prompt, interventions, METRICS, progress=False)
    assert largest_difference(table, slow) < 1e-5 * largest_logit(model(prompt).detach())
    assert not model.list_hooks()
    reused = reuse_table(table).set_index("intervention")
    partial = reused["layer"] > 0
    assert partial.any() == (name not in ONE_BY_ONE), reused["why_not_more"].unique()
