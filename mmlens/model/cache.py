"""ActivationCache for a model that sees images: TransformerLens' own, where visual positions need more.

Three kinds of activations stand in one cache. Most of the language side is [batch, ...]; rows at visual positions
(`blocks.{l}.image.*`, `hook_deepstack`) are packed over the batch; the vision tower and projector have images,
tiles or patches first. Only the first kind has a batch axis.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities import Slice, get_act_name

from mmlens import internals
from mmlens.arguments import instance_of, one_of, shown, unknown_name_message, whole_number
from mmlens.errors import InvalidTypeError, InvalidValueError, UnknownNameError, UnsupportedError
from mmlens.families.media import unmapped_message
from mmlens.model.taps import norm_arithmetic

Labelled: TypeAlias = Tensor | tuple[Tensor, list[str]]
SliceLike: TypeAlias = Slice | int | tuple[int | None, ...] | list[int] | Tensor | np.ndarray | None
"""What TransformerLens takes as a slice (its own alias is spelled in a deprecated way)."""


class VLMActivationCache(ActivationCache):
    """An ActivationCache that knows which positions of its run were visual.

    `decompose_resid` and `get_full_resid_decomposition` also count what deep injection adds to the stream
    ("0_deepstack", at the visual positions), and `stack_head_results` what a norm after attention makes of each
    head, so that the parts sum to the stream everywhere.
    """

    cache_dict: dict[str, Tensor]
    has_batch_dim: bool

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: Any,
        has_batch_dim: bool = True,
        image_mask: Bool[Tensor, "batch pos"] | None = None,
        unmapped: str | None = None,
    ) -> None:
        """`unmapped` says what the run's inputs held that no token map knows (audio, videos that are not mapped)."""
        super().__init__(cache_dict, model, has_batch_dim)
        self._image_mask, self.unmapped = image_mask, unmapped

    @property
    def image_mask(self) -> Bool[Tensor, "batch pos"] | None:
        """Which positions of the run were visual. Raises UnsupportedError where it held what no token map knows."""
        if self.unmapped is not None:
            raise UnsupportedError(unmapped_message(self.unmapped, "the cache's mask of visual positions"))
        return self._image_mask

    def __getitem__(self, key: str | tuple[Any, ...]) -> Tensor:
        """An activation by its full name, or as in TransformerLens by cache["z", 3], cache["scale", 3, "ln1"].

        Raises UnknownNameError (a KeyError) with the nearest names where the cache does not hold it.
        """
        if isinstance(key, str) and key in self.cache_dict:
            return self.cache_dict[key]
        name = self._full_name(key)
        if name in self.cache_dict:
            return self.cache_dict[name]
        if name in getattr(self.model, "hook_dict", {}):
            raise UnknownNameError(
                f"{name!r} is not in this cache, which holds {len(self.cache_dict)} activations: either names_filter "
                "left it out (hook_result and the like are cached by name alone), or it never fired in the run"
            )
        known = list(self.cache_dict)
        given = repr(key) if name == key else f"{key!r} ({name!r})"
        message = unknown_name_message("activation", name, known).replace(repr(name), given, 1)
        raise UnknownNameError(message if known else f"there is no activation {given}: the cache is empty")

    def _full_name(self, key: Any) -> str:
        parts = (key,) if isinstance(key, str) else key
        expected = 'an activation is named by a text, or as ("z", layer) or ("scale", layer, "ln1")'
        if not isinstance(parts, tuple) or not 1 <= len(parts) <= 3 or not isinstance(parts[0], str):
            raise InvalidTypeError(f"{expected}, not {shown(key)}")
        layer = parts[1] if len(parts) > 1 else None
        if layer is not None:
            n_layers = self.model.cfg.n_layers
            layer = whole_number("layer", layer)
            if not -n_layers <= layer < n_layers and not parts[0].startswith("vision"):
                raise UnknownNameError(
                    f"there is no layer {layer} for {parts[0]!r}: the model has layers 0 to {n_layers - 1} (or -1 to "
                    f"{-n_layers} from the end)"
                )
            layer = layer + n_layers if layer < 0 else layer
        if not all(isinstance(part, (str, type(None))) for part in parts[2:]):
            raise InvalidTypeError(f"{expected}, not {shown(key)}")
        try:
            return str(get_act_name(parts[0], layer, *parts[2:]))
        except (AssertionError, AttributeError, IndexError, ValueError):
            return parts[0]

    def remove_batch_dim(self, batch_size: int | None = None) -> VLMActivationCache:
        """The same cache without the batch axis of its language side, changed in place.

        Raises ValueError for a batch of more than one prompt.
        """
        if self.has_batch_dim:
            self.cache_dict = without_batch_axis(self.cache_dict)
            self.has_batch_dim = False
        else:
            logging.warning("Tried removing batch dimension after already having removed it.")
        return self

    def apply_slice_to_batch_dim(self, batch_slice: SliceLike) -> VLMActivationCache:
        """The cache of some of the batch's prompts: their visual rows, and nothing of the vision side.

        The vision side is left out because towers arrange images, tiles and patches each in their own way.
        """
        chosen = batch_slice if isinstance(batch_slice, Slice) else Slice(batch_slice)
        if chosen.mode == "empty":
            return self
        if not self.has_batch_dim:
            raise InvalidValueError("this cache has no batch axis to slice")
        cache: dict[str, Tensor] = {}
        if self._image_mask is not None:
            batch = torch.arange(len(self._image_mask), device=self._image_mask.device)
            # Packed rows are in batch-major order, whatever order the prompts are chosen in.
            owner = batch[:, None].expand_as(self._image_mask)[self._image_mask]
            kept = chosen.apply(batch).reshape(-1)
            rows = torch.cat([torch.nonzero(owner == row).flatten() for row in kept])
        for name, value in self.cache_dict.items():
            if is_batched(name):
                cache[name] = chosen.apply(value, dim=0)
            elif is_packed(name):
                cache[name] = value[rows.to(value.device)]
        mask = None if self._image_mask is None else self._image_mask[kept]
        return VLMActivationCache(cache, self.model, chosen.mode != "int", mask, self.unmapped)

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: SliceLike = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Labelled:
        """As in TransformerLens; after the layers come the deep injections, which count as embeddings.

        Raises ValueError in families whose layers do more than add to the stream: no parts sum to it there.
        """
        self._check_adds()
        one_of("mode", mode, ("all", "mlp", "attn"))
        layer = self._checked_layer(layer)
        stack, labels = super().decompose_resid(
            layer, mlp_input, mode, False, pos_slice, incl_embeds, return_labels=True
        )
        if incl_embeds:
            stack, labels = self._with_deep_injections(stack, labels, layer, pos_slice)
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input=mlp_input, pos_slice=pos_slice)
        return (stack, labels) if return_labels else stack

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: SliceLike = None,
        apply_ln: bool = False,
    ) -> Labelled:
        """As in TransformerLens: what each head adds to the stream, [layer * head, ..., d_model].

        Where a norm stands after attention, a head's part is its hook_result centred and divided as the norm did
        to the sum, times the norm's gain. Raises ValueError for layers without softmax attention, or with fewer heads
        than others, and in families whose layers do more than add to the stream.
        """
        self._check_adds()
        layer = self._checked_layer(layer)
        parts = self.model.anatomy.language
        n = len(parts) if layer in (None, -1) else layer
        without = [index for index in range(n) if parts[index].attention is None]
        if without:
            raise InvalidValueError(
                f"layers {without} have no attention heads, so the stream is no sum of heads; decompose_resid "
                "has what their mixers add"
            )
        uneven = [index for index in range(n) if parts[index].attention.n_heads != self.model.cfg.n_heads]
        if uneven:
            raise InvalidValueError(
                f"layers {uneven} have another number of heads than cfg.n_heads = {self.model.cfg.n_heads}; read "
                "blocks.{layer}.attn.hook_result layer by layer"
            )
        internals.compute_head_results(self)
        results = {
            name: self._entering(index, self.cache_dict[name])
            for index in range(n)
            if parts[index].post_norm1 is not None
            for name in [f"blocks.{index}.attn.hook_result"]
        }
        entering = ActivationCache({**self.cache_dict, **results}, self.model, self.has_batch_dim)
        return entering.stack_head_results(layer, return_labels, incl_remainder, pos_slice, apply_ln)

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: SliceLike = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Labelled:
        """As in TransformerLens; after its parts come the deep injections. Raises ValueError as `decompose_resid`."""
        self._check_adds()
        layer = self._checked_layer(layer)
        stack, labels = super().get_full_resid_decomposition(
            layer, mlp_input, expand_neurons, apply_ln, pos_slice, True, project_output_onto
        )
        empty = self["hook_embed"].new_zeros(0)
        deep, names = self._with_deep_injections(empty, [], layer, pos_slice)
        if names:
            if apply_ln:
                deep = self.apply_ln_to_stack(deep, layer, mlp_input=mlp_input, pos_slice=pos_slice)
            if project_output_onto is not None:
                deep = deep @ project_output_onto
            stack, labels = torch.cat([stack, deep]), [*labels, *names]
        return (stack, labels) if return_labels else stack

    def stack_neuron_results(self, layer: int, *args: Any, **kwargs: Any) -> Labelled:
        """As in TransformerLens. Raises ValueError where a norm stands after the MLP: neurons do not sum to it."""
        last = self.model.cfg.n_layers if layer in (None, -1) else layer
        normed = [index for index, block in enumerate(self.model.anatomy.language[:last]) if block.post_norm2]
        if normed:
            raise InvalidValueError(
                f"layers {normed} have a norm after the MLP, so what enters the stream is no sum of neurons; "
                "take get_full_resid_decomposition(expand_neurons=False)"
            )
        return super().stack_neuron_results(layer, *args, **kwargs)

    # ------------------------------------------------------------------ plumbing

    def _checked_layer(self, layer: object) -> int | None:
        """Up to which layer a stream is decomposed: None and -1 are all of them."""
        return None if layer is None else whole_number("layer", layer, least=-1, most=self.model.cfg.n_layers)

    def _check_adds(self) -> None:
        family = self.model.family
        if not family.adds:
            raise InvalidValueError(
                f"the layers of {family.model_type!r} do more than add to the residual stream, so it is no sum of "
                "their outputs; accumulated_resid gives the stream itself"
            )

    def _batch_size(self) -> int:
        return next((len(value) for name, value in self.cache_dict.items() if is_batched(name)), 1)

    def _entering(self, layer: int, results: Float[Tensor, "... head d_model"]) -> Tensor:
        norm = self.model.anatomy.language[layer].post_norm1
        gain, centred, _ = norm_arithmetic(norm, results.shape[-1], results)
        if centred:
            results = results - results.mean(-1, keepdim=True)
        return results / self[f"blocks.{layer}.ln1_post.hook_scale"].unsqueeze(-2) * gain

    def _with_deep_injections(
        self, stack: Tensor, labels: list[str], layer: int | None, pos_slice: SliceLike
    ) -> tuple[Tensor, list[str]]:
        deep_after = self.model.anatomy.deep_after
        if not deep_after or self.image_mask is None or not bool(self.image_mask.any()):
            return stack, labels
        last = self.model.cfg.n_layers if layer in (None, -1) else layer
        layers = [deep for deep in deep_after if deep < last]
        if not layers:
            return stack, labels
        chosen = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
        parts = [chosen.apply(self.unpacked(f"blocks.{deep}.hook_deepstack"), dim=-2) for deep in layers]
        added = torch.stack(parts).to(stack.dtype)
        return torch.cat([stack, added]) if len(stack) else added, [
            *labels,
            *(f"{deep}_deepstack" for deep in layers),
        ]

    def unpacked(self, name: str) -> Float[Tensor, "*shape"]:
        """A packed activation ([image_token, ...]) laid over all positions, zeros at text: [batch, pos, ...].

        Without the batch axis where the cache has none. Raises ValueError where `name` is not packed or the run
        had no images.
        """
        if not is_packed(instance_of("name", name, str, "the name of an activation")):
            raise InvalidValueError(f"{name!r} is not packed: it has no axis of visual positions alone")
        if self.image_mask is None:
            raise InvalidValueError(
                f"{name!r} cannot be laid over the positions: the run had no visual positions"
            )
        rows = self[name]
        full = over_positions(rows, self.image_mask)
        return full if self.has_batch_dim else full[0]


def is_packed(name: str) -> bool:
    """Whether an activation has one row per visual position of the batch.

    >>> is_packed("blocks.2.image.hook_z"), is_packed("blocks.2.attn.hook_z")
    (True, False)
    """
    return f".{name}".find(".image.") >= 0 or name.removesuffix("_grad").endswith("hook_deepstack")


def over_positions(
    rows: Float[Tensor, "image_token ..."], mask: Bool[Tensor, "batch pos"], fill: float = 0.0
) -> Float[Tensor, "batch pos ..."]:
    """The rows of a packed activation at the visual positions `mask`, in batch-major order; `fill` elsewhere."""
    mask = mask.to(rows.device)
    return rows.new_full((*mask.shape, *rows.shape[1:]), fill).index_put((mask,), rows)


def is_masked(scores: Float[Tensor, "*rows key"], mask_dtype: torch.dtype) -> Bool[Tensor, "*rows key"]:
    """Which attention scores hold the mask's huge negative number; no real score comes near half of it.

    `mask_dtype` is the type that the mask is made in, the model's: some families add it up in float32.

    >>> is_masked(torch.tensor([1e3, -65504.0]), torch.float16)
    tensor([False,  True])
    """
    lowest = max(torch.finfo(scores.dtype).min, torch.finfo(mask_dtype).min)
    return scores < lowest / 2


def is_batched(name: str) -> bool:
    """Whether an activation's first axis is the batch.

    >>> is_batched("hook_embed"), is_batched("image.hook_embed"), is_batched("vision.hook_embed")
    (True, False, False)
    """
    return name.startswith(("blocks.", "hook_", "ln_final.")) and not is_packed(name)


def without_batch_axis(cache: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch of one without its batch axis. Raises ValueError for a larger batch."""
    sizes = {len(value) for name, value in cache.items() if is_batched(name)}
    if sizes - {1}:
        raise InvalidValueError(f"remove_batch_dim needs a batch of one prompt, this one has {max(sizes)}")
    return {name: value[0] if is_batched(name) else value for name, value in cache.items()}
