"""Components: the parts of a model that ablation takes away and path patching sends from.

| written | what it is | hook points |
|---|---|---|
| (3, 5) | head 5 of language layer 3 | blocks.3.attn.hook_z |
| (3, "attn") | what attention, or another mixer of positions, adds to the stream | blocks.3.hook_attn_out |
| (3, "mlp") | what the MLP adds to the stream | blocks.3.hook_mlp_out |
| (3, "layer") | both of them | blocks.3.hook_attn_out, blocks.3.hook_mlp_out |
| (3, "mlp", 17) | neuron 17 of the MLP, where it has one layer of neurons | blocks.3.mlp.hook_post |
| ("vision", 1, 2) | head 2 of the tower's layer 1 | vision.blocks.1.attn.hook_z |
| ("vision", 1, "mlp") | as above, in the tower: "attn", "mlp" or "layer" | vision.blocks.1.hook_mlp_out |
| "image" | the image embeddings, and all that is added to them later | image.hook_embed, blocks.{l}.hook_deepstack |

Where a layer does more than add two outputs to the stream (`model.family.adds` is False), (3, "layer") leaves the
rest alone. A layer of one branch (Nemotron's) has (3, "attn") and (3, "layer"), which are then the same. Further
stacks go by their names in `model.anatomy.stacks`: ("qformer", 0, 2).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import numpy as np
from torch import Tensor

from mmlens.arguments import unknown_name_message
from mmlens.errors import InvalidTypeError, InvalidValueError, OutOfRangeError
from mmlens.families.anatomy import LayerParts
from mmlens.heads import HeadSet, as_head_set
from mmlens.hook_names import MODEL_PARTS, PARTS, block
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import UnknownHookError
from mmlens.model.weights import Block

Spec = Any
"""A component as it is written: a tuple or "image", see the table above."""
Specs = Iterable[Any]
"""A HeadSet, (layer, head) pairs as an integer array, a list of specs, or "image" alone."""

_WAYS = (
    "(layer, head), (layer, 'attn'), (layer, 'mlp'), (layer, 'layer'), (layer, 'mlp', neuron), "
    "('vision', layer, head) or 'image'"
)


@dataclass(frozen=True)
class _Part:
    """What a word for a part of a layer means: a whole activation, or one of many along an axis."""

    hooks: tuple[str, ...]
    label: str
    unit: str = ""
    """What it is one of: "head", "neuron"; "" for a whole activation."""
    axis: int = -1
    size: Callable[[LayerParts], int] = lambda parts: 0
    """How many there are along the axis."""
    why_missing: Callable[[LayerParts], str] = lambda parts: ""
    """Why a layer has no such hook point, where the family's record does not say."""


def _n_heads(parts: LayerParts) -> int:
    return parts.attention.n_heads if parts.attention is not None else 0


def _n_neurons(parts: LayerParts) -> int:
    mlp = Block("", parts).mlp
    # An offloaded weight cannot be read; a linear module that is wrapped has no width of its own.
    return getattr(mlp.out, "in_features", None) or mlp.W_out.shape[0]


def _no_neurons(parts: LayerParts) -> str:
    if parts.mlp_out is None:
        return "the layer has no MLP"
    return f"the layer's MLP is a {type(parts.mlp_out).__name__}, not one layer of neurons"


_PARTS: dict[str, _Part] = {
    "attn": _Part((PARTS["attn"],), "{place} attn"),
    "mlp": _Part((PARTS["mlp"],), "{place} mlp"),
    "layer": _Part((PARTS["attn"], PARTS["mlp"]), "{place}"),
    "z": _Part((PARTS["z"],), "{place}H{index}", "head", axis=-2, size=_n_heads),
    "post": _Part(
        (PARTS["post"],), "{place} mlp {index}", "neuron", size=_n_neurons, why_missing=_no_neurons
    ),
}
_WHOLE = [word for word, part in _PARTS.items() if not part.unit]
"""The words that are written; heads and neurons are written as numbers."""


@dataclass(frozen=True)
class Component:
    """A part of a model: the whole activation at `hooks`, or number `index` along their axis `axis`."""

    part: str
    """"attn", "mlp", "layer" (both), "z" (a head), "post" (a neuron) or "image"."""
    hooks: tuple[str, ...]
    stack: str = ""
    """"" for the language model, else the prefix of its stack's hook points ("vision.")."""
    layer: int | None = None
    """Its layer in that stack; None for the image embeddings."""
    index: int | None = None
    """The head or neuron; None for the whole activation."""
    axis: int = -1
    """The axis of `index`, counted from the end: towers that pack their images have one axis fewer in front."""
    size: int | None = None
    """How many heads or neurons there are along it."""

    @property
    def label(self) -> str:
        """Its name in tables and messages: L3H5, L3 attn, L3 mlp, L3 mlp 17, L3, vision L1H2, image."""
        if self.layer is None:
            return self.part
        place = f"{self.stack.replace('.', ' ')}L{self.layer}"
        return _PARTS[self.part].label.format(place=place, index=self.index)

    @property
    def unit(self) -> str:
        """What `index` counts: "head" or "neuron"."""
        return _PARTS[self.part].unit


def component(model: HookedVLM, spec: Spec) -> Component:
    """The component that `spec` means (the module's table), checked against the model.

    Raises TypeError for what is no spec, ValueError for an unknown word in one, IndexError for a layer, head or
    neuron that there is not, and UnknownHookError for a component that the family has no hook point for, with the
    reason where its record has one.

    >>> model = HookedVLM.from_pretrained("micro")
    >>> component(model, (2, "mlp")).hooks, component(model, ("vision", 0, 1)).label
    (('blocks.2.hook_mlp_out',), 'vision L0H1')
    >>> component(model, (2, "mpl"))
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidValueError: there is no component (2, 'mpl') of a layer, 'mpl'; the nearest: 'mlp'
    """
    if isinstance(spec, str):
        return _of_the_model(model, spec)
    stack, layer, word, index = _read(spec)
    parts = _layer(model, spec, stack, layer, index if word == "z" else None)
    if index is None and word not in _WHOLE:
        raise InvalidValueError(unknown_name_message(f"component {spec!r} of a layer,", word, _WHOLE))
    part = _PARTS[word]
    hooks = tuple(f"{stack}{block(layer, hook)}" for hook in part.hooks)
    if len(hooks) > 1:
        # A layer of one branch has no other: its record says so.
        hooks = tuple(h for h in hooks if h in model.hook_dict or not why_missing(model, h)) or hooks
    for hook in hooks:
        if hook not in model.hook_dict:
            why = why_missing(model, hook) or part.why_missing(parts)
            if word == "post" and stack:
                why = "only language layers have hook points at neurons"
            raise _missing(model, spec, hook, why)
    size = part.size(parts) if part.unit else None
    if size is not None and index is not None and not 0 <= index < size:
        raise OutOfRangeError(
            f"component {spec!r}: {part.unit} {index} is out of range; {hooks[0]} has {size} {part.unit}s "
            f"(0 to {size - 1})"
        )
    return Component(word, hooks, stack, layer, index, part.axis, size)


def components(model: HookedVLM, given: Specs) -> list[Component]:
    """The components that `given` means, in its order.

    Raises what `component` and `as_head_set` raise, and ValueError for none, or for one that is named twice.
    """
    if isinstance(given, HeadSet | np.ndarray | Tensor):
        given = list(as_head_set(given, model.grid))
    found = [component(model, spec) for spec in ([given] if isinstance(given, str) else given)]
    if not found:
        raise InvalidValueError(f"no heads or other components given: expected at least one of {_WAYS}")
    counts = Counter((hook, part.index) for part in found for hook in part.hooks)
    twice = [part.label for part in found if any(counts[hook, part.index] > 1 for hook in part.hooks)]
    if twice:
        raise InvalidValueError(
            f"each component may be named once; these are or share the same: {', '.join(twice)}"
        )
    return found


def _of_the_model(model: HookedVLM, word: str) -> Component:
    if word != "image":
        raise InvalidValueError(f"there is no component {word!r}; components are a list of {_WAYS}")
    why, hook = model.family.past_the_stream, MODEL_PARTS[word]
    if why:
        raise UnknownHookError(
            f"{model.family.model_type} has no component {word!r}: {why}, so no hook point holds all of them"
        )
    if hook not in model.hook_dict:
        raise _missing(model, word, hook, why_missing(model, hook))
    deep = [block(layer, PARTS["deepstack"]) for layer in model.anatomy.deep_after]
    return Component(word, (hook, *deep))


def _read(spec: Spec) -> tuple[str, int, str, int | None]:
    """(the stack's prefix, layer, word of the part, head or neuron) that a spec is written for."""
    if not isinstance(spec, Sequence):
        raise InvalidTypeError(f"components are a list of {_WAYS}; {spec!r} is none of them")
    stack, within = (f"{spec[0]}.", spec[1:]) if spec and isinstance(spec[0], str) else ("", spec)
    match tuple(within):
        case (layer, str(word)) if _is_integer(layer):
            return stack, int(layer), word, None
        case (layer, head) if _is_integer(layer) and _is_integer(head):
            return stack, int(layer), "z", int(head)
        case (layer, "mlp", neuron) if _is_integer(layer) and _is_integer(neuron):
            return stack, int(layer), "post", int(neuron)
        case (layer, _, _) if _is_integer(layer):
            raise InvalidTypeError(f"a neuron is (layer, 'mlp', neuron), not {spec!r}")
    raise InvalidTypeError(f"a component is {_WAYS}, not {spec!r}")


def _layer(model: HookedVLM, spec: Spec, stack: str, layer: int, head: int | None) -> LayerParts:
    """The layer of a stack; errors name the stack, or the head of the language model."""
    if not stack and head is not None:
        as_head_set([(layer, head)], model.grid)
    layers = model.anatomy.language if not stack else _stack(model, spec, stack)
    if not 0 <= layer < len(layers):
        where = f"its {spec[0]} stack" if stack else "the model"
        raise OutOfRangeError(
            f"component {spec!r}: layer {layer} is out of range; {where} has {len(layers)} layers "
            f"(0 to {len(layers) - 1})"
        )
    return layers[layer]


def _stack(model: HookedVLM, spec: Spec, prefix: str) -> list[LayerParts]:
    if prefix not in model.anatomy.stacks:
        why = why_missing(model, f"{prefix}blocks.0.hook_resid_pre")
        if why:
            raise UnknownHookError(f"{model.family.model_type} has no component {spec!r}: {why}")
        known = [name.removesuffix(".") for name in model.anatomy.stacks]
        raise InvalidValueError(unknown_name_message(f"component {spec!r} of a stack", str(spec[0]), known))
    return model.anatomy.stacks[prefix]


def _missing(model: HookedVLM, spec: Spec, hook: str, why: str) -> UnknownHookError:
    return UnknownHookError(
        f"{model.family.model_type} has no component {spec!r}: it has no hook point {hook!r}"
        + (f" ({why})" if why else "")
    )


def why_missing(model: HookedVLM, hook: str) -> str:
    """What the family's record says of a hook point that is not there; "" where it says nothing."""
    general = re.sub(r"\.\d+\.", ".{l}.", hook)
    return next((why for pattern, why in model.family.missing.items() if fnmatch(general, pattern)), "")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
