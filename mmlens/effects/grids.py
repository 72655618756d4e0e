"""Sweeps that a TransformerLens user knows, as {label: intervention}: patching by layer and position, region or head.

All of them take (model, source, hook), and by name what else they need: `positions`, or the `prompt` or `regions` that
name their columns. `source` is as for `patch`. Labels are (layer, ...), so that `grid` can lay a sweep's table out
again, layers in rows. Layers that have no such hook point (hybrid models) and heads that a layer does not have are left
out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mmlens.arguments import instance_of, names_of, one_of, table_of, unknown_name_message
from mmlens.errors import InvalidValueError
from mmlens.hook_names import PARTS, axes_of, block
from mmlens.interventions.patching import PatchSource, patch
from mmlens.model.choosing import Positions, if_any, positions_mask
from mmlens.model.hooked_vlm import HookedVLM, model_of
from mmlens.model.hooks import Intervention, UnknownHookError
from mmlens.model.prompt import Prompt, prompt_of

HEAD_PARTS = ("z", "q", "k", "v", "pattern")
"""What `patch_heads_qkv` patches of a head."""


def patch_layers(
    model: HookedVLM, source: PatchSource, hook: str = "hook_resid_pre", *, positions: Positions = None
) -> dict[int, Intervention]:
    """{layer: `patch` of its `hook`}: "hook_mlp_out", "hook_attn_out", "attn.hook_z" (all heads), ...

    Raises UnknownHookError where no layer has the hook point.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> clean = model.prompt("What colour is K ?")
    >>> list(patch_layers(model, clean, "hook_mlp_out")) == list(range(model.cfg.n_layers))
    True
    """
    return {
        layer: patch(block(layer, hook), source, positions=positions) for layer in layers_with(model, hook)
    }


def patch_layers_positions(
    model: HookedVLM,
    source: PatchSource,
    hook: str = "hook_resid_pre",
    *,
    prompt: Prompt,
    positions: Positions = None,
) -> dict[tuple[int, int], Intervention]:
    """{(layer, position): `patch` of `hook` there} for every position that is chosen (None: that is not padding).

    A position is a column of `prompt`, and is patched in those rows of the batch where it is chosen; so the
    interventions fit this prompt and others of its shape. Raises UnknownHookError where no layer has the hook point,
    ValueError as `positions_mask`.
    """
    mask = positions_mask(prompt_of(prompt), "prompt" if positions is None else positions)
    assert mask is not None
    single = {}
    for column in mask.any(0).nonzero().flatten().tolist():
        single[column] = mask.new_zeros(mask.shape)
        single[column][:, column] = mask[:, column]
    return {
        (layer, column): patch(block(layer, hook), source, positions=if_any(at))
        for layer in layers_with(model, hook)
        for column, at in single.items()
    }


def patch_layers_regions(
    model: HookedVLM,
    source: PatchSource,
    hook: str = "hook_resid_pre",
    *,
    regions: Mapping[str, Positions],
) -> dict[tuple[int, str], Intervention]:
    """{(layer, name): `patch` of `hook` at that region}; `regions` gives positions by name.

    Functions of the prompt fit every prompt of a data set: `{"evidence": lambda prompt: ..., "last": "last"}`.
    Raises UnknownHookError where no layer has the hook point, ValueError for no region.
    """
    instance_of("regions", regions, Mapping, "a dict {name: positions}")
    if not regions:
        raise InvalidValueError(
            'regions is empty: give positions by name, such as {"image": "image", "last": "last"}'
        )
    return {
        (layer, name): patch(block(layer, hook), source, positions=positions)
        for layer in layers_with(model, hook)
        for name, positions in regions.items()
    }


def patch_heads(
    model: HookedVLM, source: PatchSource, hook: str = "attn.hook_z", *, positions: Positions = None
) -> dict[tuple[int, int], Intervention]:
    """{(layer, head): `patch` of that head's `hook`}; heads of k and v are key-value heads.

    Raises UnknownHookError where no layer has the hook point, ValueError where it has no heads.
    """
    return {
        (layer, head): patch(block(layer, hook), source, positions=positions, heads=[head])
        for layer in layers_with(model, hook)
        for head in range(n_heads_at(model, layer, hook))
    }


def patch_heads_qkv(
    model: HookedVLM,
    source: PatchSource,
    *,
    parts: Sequence[str] = HEAD_PARTS,
    positions: Positions = None,
) -> dict[tuple[int, int, str], Intervention]:
    """{(layer, head, part): `patch`} for each of `parts` of HEAD_PARTS; for k and v the key-value heads.

    At `positions` of the queries z, q and pattern, of the keys and values k and v. A part that no layer has (k and v,
    where heads read a latent one) is an UnknownHookError; ValueError for an unknown part.
    """
    return {
        (*head, part): intervention
        for part in names_of("parts", parts, HEAD_PARTS)
        for head, intervention in patch_heads(model, source, PARTS[part], positions=positions).items()
    }


def layers_with(model: HookedVLM, hook: str) -> list[int]:
    """The language layers that have the hook point; raises UnknownHookError where none has."""
    model_of(model)
    instance_of("hook", hook, str, "the name of a hook point in its layer, such as 'hook_resid_pre'")
    layers = [layer for layer in range(model.cfg.n_layers) if block(layer, hook) in model.hook_dict]
    if not layers:
        known = {
            name.split(".", 2)[2]: None
            for layer in range(model.cfg.n_layers)
            for name in model.hook_dict
            if name.startswith(block(layer, ""))
        }
        raise UnknownHookError(unknown_name_message("hook point of a layer", hook, known))
    return layers


def n_heads_at(model: HookedVLM, layer: int, hook: str) -> int:
    """How many heads a layer's hook point has: query heads, or key-value heads. Raises ValueError where it has none."""
    axes = axes_of(block(layer, hook))
    attention = model.anatomy.language[layer].attention
    if attention is None or not {"head", "kv_head"} & set(axes):
        raise InvalidValueError(f"{hook} is [{', '.join(axes)}]: it has no heads")
    return attention.n_kv_heads if "kv_head" in axes else attention.n_heads


def grid(table: pd.DataFrame, metric: str | None = None, *, quantity: str = "effect") -> pd.DataFrame:
    """A sweep's table as layers x positions, regions or heads: means over examples.

    `table` has the columns intervention, example, metric, value and clean; labels are (layer, column) or longer,
    which gives columns of several levels, or a layer alone. `quantity` is "effect" (value - clean), "value" or "clean".
    What was not run is NaN. Rows and columns stand in the table's order.

    Raises ValueError where the table holds several metrics and none is named, one that it does not hold, no rows, or
    labels that are no tuples of equal length.

    >>> rows = [((layer, at), layer + at, 1.0) for layer in (0, 1) for at in (4, 5)]
    >>> table = pd.DataFrame(rows, columns=["intervention", "value", "clean"]).assign(example=0, metric="m")
    >>> grid(table)
             4    5
    layer
    0      3.0  4.0
    1      4.0  5.0
    """
    table_of("table", table, ["intervention", "metric", "value", "clean"], "a sweep's table")
    one_of("quantity", quantity, ("effect", "value", "clean"))
    metrics = list(table["metric"].unique())
    if metric is None and len(metrics) > 1:
        raise InvalidValueError(f"the table holds the metrics {', '.join(map(repr, metrics))}: name one")
    if metric is not None and metric not in metrics:
        raise InvalidValueError(unknown_name_message("metric in the table", metric, map(str, metrics)))
    chosen = table[table["metric"] == (metrics[0] if metric is None else metric)]
    values = chosen["value"] - chosen["clean"] if quantity == "effect" else chosen[quantity]
    by_label: dict[tuple[Any, ...], list[float]] = {}
    for label, value in zip(chosen["intervention"], values, strict=True):
        by_label.setdefault(label if isinstance(label, tuple) else (label,), []).append(float(value))
    if len({len(label) for label in by_label}) > 1:
        raise InvalidValueError(
            f"labels of a grid are (layer, column) or (layer,) all alike; got {list(by_label)[:3]} and others"
        )
    rows = list(dict.fromkeys(label[0] for label in by_label))
    columns = list(dict.fromkeys(label[1:] for label in by_label))
    means = np.full((len(rows), len(columns)), np.nan)
    for label, of_examples in by_label.items():
        means[rows.index(label[0]), columns.index(label[1:])] = np.mean(of_examples)
    n_levels = len(columns[0])
    names: Any = (
        pd.MultiIndex.from_tuples(columns)
        if n_levels > 1
        else [column[0] if column else quantity for column in columns]
    )
    return pd.DataFrame(means, index=pd.Index(rows, name="layer"), columns=names)
