"""Reading the pattern's rows at chosen positions, layer by layer in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from mmlens.errors import InvalidTypeError, InvalidValueError, StateError
from mmlens.model.choosing import Positions, positions_mask
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.inputs import Inputs
from mmlens.model.prompt import prompt_of

Rows = Float[Tensor, "batch head query key"]


def read_heads(
    model: HookedVLM,
    inputs: Inputs,
    queries: Positions,
    of_layer: Callable[[Rows, Tensor], Shaped[Tensor, "batch head *numbers"]],
) -> Shaped[Tensor, "batch layer head *numbers"]:
    """What `of_layer(rows, query mask)` makes of every layer's rows at the queries; NaN where the model has no head.

    Raises StateError where a layer gave no rows, and for the queries as `check_positions`.
    """
    found: dict[int, Tensor] = {}

    def consume(layer: int, rows: Rows, query_mask: Bool[Tensor, "batch query"]) -> None:
        found[layer] = of_layer(rows, query_mask)

    read_rows(model, inputs, queries, consume)
    return of_layers(model, found)


def of_layers(
    model: HookedVLM, found: Mapping[int, Shaped[Tensor, "batch _ *numbers"]]
) -> Shaped[Tensor, "batch layer head *numbers"]:
    """What every layer with heads gave as one tensor on the CPU; NaN where the model has no head."""
    missing = sorted(set(model.attention_layers) - set(found))
    if missing:
        raise StateError(f"layers {missing} gave no attention rows in this forward pass")
    batch, _, *numbers = next(iter(found.values())).shape
    values = torch.full((batch, *model.grid.shape, *numbers), torch.nan)
    for layer, own in found.items():
        values[:, layer, : own.shape[1]] = own.cpu()
    return values


def read_rows(
    model: HookedVLM,
    inputs: Inputs,
    queries: Positions,
    consume: Callable[[int, Tensor, Tensor], None],
) -> None:
    """Hand every layer's rows at the queries to `consume(layer, rows, query mask)`, after checking the queries."""
    model.attention_rows(inputs, checked_mask("queries", inputs, queries), consume)


def checked_mask(name: str, inputs: Inputs, positions: Positions) -> Bool[Tensor, "batch pos"]:
    """The mask that `positions` are for these inputs: words and functions are of a prompt; as `check_positions`."""
    chosen: Any = positions
    if isinstance(positions, str) or callable(positions):
        chosen = positions_mask(prompt_of(inputs, "inputs"), positions, name)
    check_positions(name, chosen, real_positions(inputs))
    return chosen


def real_positions(inputs: Inputs) -> Bool[Tensor, "batch pos"]:
    """Which positions are not padding."""
    tensors = inputs if isinstance(inputs, Mapping) else prompt_of(inputs, "inputs").inputs
    if tensors.get("attention_mask") is not None:
        return tensors["attention_mask"].bool()
    return torch.ones_like(tensors["input_ids"], dtype=torch.bool)


def check_positions(name: str, chosen: Bool[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]) -> None:
    """Raise TypeError or ValueError for a mask of another type or shape, an empty row, or a padded position."""
    if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool:
        given = chosen.dtype if isinstance(chosen, Tensor) else type(chosen).__name__
        raise InvalidTypeError(f"{name} is a boolean tensor [batch, pos], not {given}")
    if chosen.shape != real.shape:
        raise InvalidValueError(
            f"{name} has shape {list(chosen.shape)}, the inputs are [batch, pos] = {list(real.shape)}"
        )
    empty = (~chosen.any(-1)).nonzero().flatten().tolist()
    if empty:
        raise InvalidValueError(f"{name} marks no position in batch row(s) {empty}")
    padded = (chosen & ~real.to(chosen.device)).any(-1).nonzero().flatten().tolist()
    if padded:
        raise InvalidValueError(f"{name} marks padding in batch row(s) {padded}")


def mass_of_rows(
    rows: Rows, query_mask: Bool[Tensor, "batch query"], keys: Bool[Tensor, "batch key"]
) -> Float[Tensor, "batch head"]:
    """Mean over the real queries of the sum over `keys`, from rows padded to one number of queries.

    >>> rows = torch.tensor([[[[.9, .1], [.4, .6]]]])  # one example, one head, two queries, two keys
    >>> mass = mass_of_rows(rows, torch.tensor([[True, True]]), torch.tensor([[False, True]]))
    >>> round(mass.item(), 4)
    0.35
    """
    sums = torch.einsum("bhqk,bk->bhq", rows, keys.to(rows.dtype))
    # A padded query's row holds whatever the padding gave, NaN with some masks: drop it before the mean.
    return sums.masked_fill(~query_mask[:, None], 0).sum(-1) / query_mask.sum(-1)[:, None]


def mean_of_rows(rows: Rows, query_mask: Bool[Tensor, "batch query"]) -> Float[Tensor, "batch head key"]:
    """Mean of the rows over the real queries: the paper's average attention of each head (Eq. 22)."""
    if not bool(query_mask.all()):
        rows = rows.masked_fill(~query_mask[:, None, :, None], 0)
    return rows.sum(2) / query_mask.sum(-1)[:, None, None]


def mean_to(
    mean: Float[Tensor, "batch head key"], keys: Bool[Tensor, "batch key"] | Float[Tensor, "batch key"]
) -> Float[Tensor, "batch head"]:
    """Sum of the average attention over `keys`, or weighted by them."""
    return torch.einsum("bhk,bk->bh", mean, keys.to(mean.device, mean.dtype))
