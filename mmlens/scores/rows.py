"""Reading the pattern's rows at chosen positions, layer by layer in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmlens.errors import InvalidTypeError, InvalidValueError, StateError
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.inputs import Inputs
from mmlens.model.prompt import prompt_of

Rows = Float[Tensor, "batch head query key"]


class LayerBuffer:
    """[batch, layer, head], filled one layer at a time; refuses to be read with a layer missing.

    NaN where the model has no head.
    """

    def __init__(self, model: HookedVLM, batch: int) -> None:
        self._values = model.grid.full(batch)
        self._missing = set(model.attention_layers)

    def put(self, layer: int, values: Float[Tensor, "batch head"]) -> None:
        self._values[:, layer, : values.shape[1]] = values.cpu()
        self._missing.discard(layer)

    def take(self) -> Float[Tensor, "batch layer head"]:
        if self._missing:
            raise StateError(f"layers {sorted(self._missing)} gave no attention rows in this forward pass")
        return self._values


def read_rows(
    model: HookedVLM,
    inputs: Inputs,
    queries: Bool[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"],
    consume: Callable[[int, Tensor, Tensor], None],
) -> None:
    """Hand every layer's rows at the queries to `consume(layer, rows, query mask)`, after checking the queries."""
    check_positions("queries", queries, real)
    model.attention_rows(inputs, queries, consume)


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
