"""Reading the pattern's rows at chosen positions, batch by batch: what all head scores share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from mmlens.arguments import flag, whole_number
from mmlens.data.examples import Example, examples_of
from mmlens.errors import InvalidTypeError, InvalidValueError, StateError
from mmlens.model.hooked_vlm import HookedVLM, Inputs, model_of
from mmlens.model.prompt import Prompt, prompt_of
from mmlens.token_map import BoxMapping, mapping_of

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


class CrossAttentionError(InvalidTypeError):
    """Attention from positions to positions was asked of a model whose images are at no position."""


def refuse_cross_attention(model: HookedVLM) -> None:
    """Raise CrossAttentionError for a model whose image keys are at no position of the prompt."""
    if model.family.reads_by_cross_attention:
        raise CrossAttentionError(
            f"{model.family.model_type} reads images by cross-attention: the keys there are image patches, and no "
            "position of the prompt is one, so no attention goes from the question to the image's positions. Hooks "
            "read the patterns of those layers (attn.hook_pattern)"
        )


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


def checked_examples(
    model: HookedVLM, examples: Sequence[Example], batch_size: int, progress: bool
) -> list[Example]:
    """The examples as a list, once what every score of heads takes has been checked."""
    model_of(model)
    whole_number("batch_size", batch_size, least=1)
    flag("progress", progress)
    return examples_of(examples)


def scored_examples(
    model: HookedVLM, examples: Sequence[Example], batch_size: int, progress: bool, mapping: BoxMapping
) -> list[Example]:
    """`checked_examples` of a score of the attention to evidence: each has some, and the model's images positions.

    Raises ValueError for examples without evidence (named), TokenMapError for an unknown mapping, and
    CrossAttentionError as `refuse_cross_attention`.
    """
    examples = checked_examples(model, examples, batch_size, progress)
    mapping_of(mapping)
    refuse_cross_attention(model)
    return _with_evidence(examples)


def _with_evidence(examples: list[Example]) -> list[Example]:
    without = [example.id or f"number {i}" for i, example in enumerate(examples) if not example.evidence]
    if without:
        raise InvalidValueError(
            f"{len(without)} of {len(examples)} examples have no evidence (text-only controls have none): "
            f"{', '.join(without[:5])}{' ...' if len(without) > 5 else ''}"
        )
    return examples


def kinds_of_examples(examples: Sequence[Example]) -> tuple[str, ...] | None:
    """The kind of each example, or None where one has none."""
    return tuple(example.kind for example in examples) if any(example.kind for example in examples) else None


def prompts_of(
    model: HookedVLM, examples: Sequence[Example], batch_size: int, progress: bool, label: str
) -> Iterator[tuple[list[int], Prompt]]:
    """Batches of examples of like image size, which keeps the padding short."""

    def pixels(index: int) -> int:
        return sum(image.width * image.height for image in examples[index].images)

    order = sorted(range(len(examples)), key=pixels)
    with tqdm(total=len(examples), desc=label, unit="example", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [examples[index] for index in chosen]
            yield chosen, model.prompt([e.question for e in batch], images=[list(e.images) for e in batch])
            bar.update(len(chosen))
