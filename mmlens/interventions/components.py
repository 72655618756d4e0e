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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal

import numpy as np
from torch import Tensor

from mmlens.arguments import unknown_name_message
from mmlens.errors import InvalidTypeError, InvalidValueError, OutOfRangeError
from mmlens.families.anatomy import LayerParts
from mmlens.heads import HeadSet, as_head_set
from mmlens.model.hooked_vlm import HookedVLM, UnknownHookError
from mmlens.model.weights import Block

Kind = Literal["head", "attn", "mlp", "layer", "neuron", "image"]
Spec = Any
"""A component as it is written: a tuple or "image", see the table above."""
Specs = Iterable[Any]
"""A HeadSet, (layer, head) pairs as an integer array, a list of specs, or "image" alone."""

_OUTPUTS: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "attn": ("attn", ("hook_attn_out",)),
    "mlp": ("mlp", ("hook_mlp_out",)),
    "layer": ("layer", ("hook_attn_out", "hook_mlp_out")),
}
_WAYS = (
    "(layer, head), (layer, 'attn'), (layer, 'mlp'), (layer, 'layer'), (layer, 'mlp', neuron), "
    "('vision', layer, head) or 'image'"
)


@dataclass(frozen=True)
class Component:
    """A part of a model: the whole activation at `hooks`, or number `index` along their axis `axis`."""

    kind: Kind
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
            return "image"
        place = f"{self.stack.replace('.', ' ')}L{self.layer}"
        return {
            "head": f"{place}H{self.index}",
            "neuron": f"{place} mlp {self.index}",
            "layer": place,
        }.get(self.kind, f"{place} {self.kind}")


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
        if spec != "image":
            raise InvalidValueError(f"there is no component {spec!r}; components are a list of {_WAYS}")
        why = model.family.past_the_stream
        if why:
            raise UnknownHookError(
                f"{model.family.model_type} has no component 'image': {why}, so no hook point holds all of them"
            )
        deep = [f"blocks.{layer}.hook_deepstack" for layer in model.anatomy.deep_after]
        return _known(model, spec, Component("image", ("image.hook_embed", *deep)))
    if not isinstance(spec, Sequence):
        raise InvalidTypeError(f"components are a list of {_WAYS}; {spec!r} is none of them")
    stack, within = (
        ("", tuple(spec)) if not spec or not isinstance(spec[0], str) else (f"{spec[0]}.", spec[1:])
    )
    layers = model.anatomy.language if not stack else _stack(model, spec, stack)
    if len(within) not in (2, 3) or not _is_integer(within[0]):
        raise InvalidTypeError(f"a component is {_WAYS}, not {spec!r}")
    layer, what = int(within[0]), within[1]
    if not stack and len(within) == 2 and not isinstance(what, str):
        as_head_set([within], model.grid)
    if not 0 <= layer < len(layers):
        where = f"its {spec[0]} stack" if stack else "the model"
        raise OutOfRangeError(
            f"component {spec!r}: layer {layer} is out of range; {where} has {len(layers)} layers "
            f"(0 to {len(layers) - 1})"
        )
    prefix, parts = f"{stack}blocks.{layer}.", layers[layer]
    if len(within) == 3:
        return _neuron(model, spec, stack, layer, parts, within[1:])
    if isinstance(what, str):
        if what not in _OUTPUTS:
            raise InvalidValueError(unknown_name_message(f"component {spec!r} of a layer,", what, _OUTPUTS))
        kind, outputs = _OUTPUTS[what]
        hooks = tuple(prefix + hook for hook in outputs)
        if kind == "layer":
            # A layer of one branch has no other: its record says so.
            hooks = tuple(h for h in hooks if h in model.hook_dict or not why_missing(model, h)) or hooks
        return _known(model, spec, Component(kind, hooks, stack, layer))
    if not _is_integer(what):
        raise InvalidTypeError(f"a component is {_WAYS}, not {spec!r}")
    hook = f"{prefix}attn.hook_z"
    size = parts.attention.n_heads if parts.attention is not None else 0
    found = _known(model, spec, Component("head", (hook,), stack, layer, int(what), axis=-2, size=size))
    return _in_range(spec, found, "head")


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


def _stack(model: HookedVLM, spec: Spec, prefix: str) -> list[LayerParts]:
    if prefix not in model.anatomy.stacks:
        why = why_missing(model, f"{prefix}blocks.0.hook_resid_pre")
        if why:
            raise UnknownHookError(f"{model.family.model_type} has no component {spec!r}: {why}")
        known = [name.removesuffix(".") for name in model.anatomy.stacks]
        raise InvalidValueError(unknown_name_message(f"component {spec!r} of a stack", str(spec[0]), known))
    return model.anatomy.stacks[prefix]


def _neuron(
    model: HookedVLM, spec: Spec, stack: str, layer: int, parts: LayerParts, within: Sequence[Any]
) -> Component:
    what, neuron = within
    if what != "mlp" or not _is_integer(neuron):
        raise InvalidTypeError(f"a neuron is (layer, 'mlp', neuron), not {spec!r}")
    hook = f"{stack}blocks.{layer}.mlp.hook_post"
    if hook not in model.hook_dict:
        kind = (
            "no MLP" if parts.mlp_out is None else f"{type(parts.mlp_out).__name__}, not one layer of neurons"
        )
        why = "only language layers have hook points at neurons" if stack else f"layer {layer} has {kind}"
        raise UnknownHookError(f"{model.family.model_type} has no component {spec!r}: {why}")
    mlp = Block(f"blocks.{layer}", parts).mlp
    # An offloaded weight cannot be read; a linear module that is wrapped has no width of its own.
    size = getattr(mlp.out, "in_features", None) or mlp.W_out.shape[0]
    return _in_range(spec, Component("neuron", (hook,), stack, layer, int(neuron), size=size), "neuron")


def _known(model: HookedVLM, spec: Spec, found: Component) -> Component:
    for hook in found.hooks:
        if hook not in model.hook_dict:
            why = why_missing(model, hook)
            raise UnknownHookError(
                f"{model.family.model_type} has no component {spec!r}: it has no hook point {hook!r}"
                + (f" ({why})" if why else "")
            )
    return found


def _in_range(spec: Spec, found: Component, what: str) -> Component:
    assert found.index is not None and found.size is not None
    if not 0 <= found.index < found.size:
        raise OutOfRangeError(
            f"component {spec!r}: {what} {found.index} is out of range; {found.hooks[0]} has {found.size} {what}s "
            f"(0 to {found.size - 1})"
        )
    return found


def why_missing(model: HookedVLM, hook: str) -> str:
    """What the family's record says of a hook point that is not there; "" where it says nothing."""
    general = re.sub(r"\.\d+\.", ".{l}.", hook)
    return next((why for pattern, why in model.family.missing.items() if fnmatch(general, pattern)), "")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
