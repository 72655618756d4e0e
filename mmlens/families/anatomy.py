"""Finds the parts of a model that hook points stand on: stacks, layers, attention, norms, projections.

1. The decoder is what transformers says it is (`get_decoder`); its layers are its first list of modules.
2. The vision tower's layers are the first list of attending layers outside the decoder.
3. Within a layer, a part is known by its attribute's name (`names.ROLES`); a family with another name says so in its
   record.
4. An attention module is one whose forward asks for transformers' attention interface; every other mixer of
   positions (convolution, linear attention, relative-position attention) has no scores to hook.
5. Sizes follow from the projections' own weights, and how a projection's output is cut into heads from the sizes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmlens import internals
from mmlens.errors import InvalidValueError
from mmlens.families.media import OtherMedia, other_media
from mmlens.families.names import (
    ATTENTION_ROLES,
    BETWEEN_LAYERS,
    EPSILONS,
    IMAGE_STATES,
    IMAGE_TOKENS,
    KEYS_OF_AN_EARLIER_LAYER,
    LATENT_QUERIES,
    LAYER_NORMS_AROUND_MLP,
    MLP_ROLES,
    NOT_VISION,
    PROJECTORS,
    ROLES,
    STREAM_NORMS,
)
from mmlens.families.record import Family, Stack

T = TypeVar("T")
Roles = Mapping[str, tuple[str, ...]]
Names = Mapping[str, str | tuple[str, ...] | None]

_TANH = "tanh "


class AnatomyError(InvalidValueError):
    """A model in which a part is not where it is looked for."""


@dataclass(frozen=True)
class Projection:
    """[..., head, d_head] within the output of a linear module.

    The last axis of the output is `groups` of `widths` (one part after the other in each group), and `part`
    says which one this is: grouped by head where queries and their gates, or latent keys and values,
    alternate; one group where a fused projection gives all queries, then all keys, then all values.
    """

    module: nn.Module
    widths: tuple[int, ...]
    part: int
    d_head: int
    of_latent: bool = False
    """Whether it is projected from a latent, not from the (normalized) residual stream."""

    def read(self, output: Tensor) -> Tensor:
        """[..., head, d_head]."""
        groups = output.unflatten(-1, (-1, sum(self.widths)))
        return groups.split(self.widths, dim=-1)[self.part].reshape(*output.shape[:-1], -1, self.d_head)

    def write(self, output: Tensor, heads: Tensor) -> Tensor:
        """The output with this part replaced by [..., head, d_head]."""
        parts = list(output.unflatten(-1, (-1, sum(self.widths))).split(self.widths, dim=-1))
        parts[self.part] = heads.reshape(parts[self.part].shape)
        return torch.cat(parts, dim=-1).flatten(-2)


@dataclass(frozen=True)
class AttentionParts:
    """One softmax attention module. `d_head` is that of queries and keys, `d_value` what W_O reads per head."""

    module: nn.Module
    out: nn.Module
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_value: int
    projections: Mapping[str, Projection]
    """Of "q", "k" and "v", those that the module has."""
    reads_image: bool = False
    """Whether keys and values are projected from images, not from the stream (cross-attention)."""
    borrows_keys: bool = False
    """Whether it attends with the keys and values of an earlier layer."""


@dataclass(frozen=True)
class LayerParts:
    """One layer; a part that it does not have is None.

    `attention_output` and `mlp_output` are the modules whose outputs, times the scales, enter the stream.
    `mixer` is what mixes positions, attention or not.
    """

    module: nn.Module
    attention: AttentionParts | None
    mixer: nn.Module | None
    norm1: nn.Module | None
    post_norm1: nn.Module | None
    norm2: nn.Module | None
    post_norm2: nn.Module | None
    mlp_in: nn.Module | None
    mlp_out: nn.Module | None
    attention_output: nn.Module | None
    mlp_output: nn.Module | None
    attention_scale: str | None
    mlp_scale: str | None
    cross_attention: AttentionParts | None
    has_resid_mid: bool


@dataclass(frozen=True)
class Anatomy:
    """Where everything is."""

    decoder: nn.Module
    """The module that runs the language layers, one after the other."""
    layers: nn.ModuleList
    language: list[LayerParts]
    unread: list[nn.Module]
    """Vision layers after the one that the features are taken from: they reach no logit."""
    stacks: dict[str, list[LayerParts]]
    """Prefix of the hook points -> layers; the vision tower's is "vision."."""
    final_norm: nn.Module | None
    vision_norm: nn.Module | None
    projector: nn.Module | None
    mergers: list[nn.Module]
    deep_after: list[int]
    image_token: str
    other_media: OtherMedia
    """What inputs can hold beside text and images."""

    @property
    def has_layers_between(self) -> bool:
        """Whether layers that read the image stand between the language layers."""
        return BETWEEN_LAYERS in self.stacks

    @property
    def shares_keys(self) -> bool:
        """Whether some language layers attend with the keys of earlier ones."""
        return any(
            parts.attention is not None and "k" not in parts.attention.projections for parts in self.language
        )


def dissect(model: PreTrainedModel, family: Family) -> Anatomy:
    """The model's parts. Raises AnatomyError, naming the part, where a needed one is not found."""
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    path, layers = _layers(model, family.language, decoder, exclude=set())
    if layers is None:
        raise AnatomyError(f"{type(decoder).__name__} holds no list of decoder layers")
    language = [layer_parts(layer, family.language) for layer in layers]
    if not any(layer.attention for layer in language):
        raise AnatomyError(
            f"no layer of {type(decoder).__name__} has attention that goes through transformers' attention interface"
        )
    stacks: dict[str, list[LayerParts]] = {}
    unread: list[nn.Module] = []
    if family.vision is not None:
        _, tower = _layers(model, family.vision, model, exclude=inside)
        if tower is not None:
            n_read = _n_read(model, family, len(tower))
            stacks["vision."] = [layer_parts(layer, family.vision) for layer in tower[:n_read]]
            unread = list(tower[n_read:])
    for prefix, stack in family.more_stacks.items():
        stacks[prefix] = [layer_parts(layer, stack) for layer in _all_at(model, stack.layers or "")]
    deep = family.deep_injection
    image_token = _image_token(model, family)
    return Anatomy(
        decoder=_submodule(model, path.rpartition(".")[0]),
        layers=layers,
        language=language,
        unread=unread,
        stacks=stacks,
        final_norm=_final_norm(model, family.language, path),
        vision_norm=_own(_submodule(model, family.vision.norm))
        if family.vision and family.vision.norm
        else None,
        projector=_projector(model, family, inside),
        mergers=list(_submodule(model, deep.mergers)) if deep else [],
        deep_after=[layer for layer in deep.after(model.config) if layer < len(language)] if deep else [],
        image_token=image_token,
        other_media=other_media(model, image_token, () if family.video_layout is None else ("video",)),
    )


def layer_parts(layer: nn.Module, stack: Stack) -> LayerParts:
    """The parts of one layer, by the record's names or the common ones."""
    names = dict(stack.names)
    if hasattr(layer, LAYER_NORMS_AROUND_MLP) and hasattr(layer, "post_attention_layernorm"):
        names.setdefault("post_norm1", "post_attention_layernorm")
        if not hasattr(layer, "pre_feedforward_layernorm"):
            names.setdefault("norm2", None)

    def part(role: str) -> Any:
        return _part(layer, role, ROLES, names)

    mixer = part("attention")
    attention = None
    if mixer is not None and internals.asks_for_attention(mixer):
        attention = attention_parts(mixer, names, _attribute(layer, names.get("layer_out")))
    mixer = mixer if mixer is not None else part("mixer")
    mlp = part("mlp")
    mlp_in, mlp_out = (mlp, mlp) if mlp is not None else (part("mlp_in"), part("mlp_out"))
    norm1, post_norm1 = part("norm1"), part("post_norm1")
    norm2, post_norm2 = part("norm2"), part("post_norm2")
    cross = _attribute(layer, names["cross_attention"]) if names.get("cross_attention") else None
    return LayerParts(
        module=layer,
        attention=attention,
        mixer=mixer,
        norm1=norm1,
        post_norm1=post_norm1,
        norm2=norm2,
        post_norm2=post_norm2,
        mlp_in=mlp_in,
        mlp_out=mlp_out,
        attention_output=part("attention_output")
        if "attention_output" in names
        else _own(post_norm1) or mixer,
        mlp_output=part("mlp_output") if "mlp_output" in names else _own(post_norm2) or mlp_out,
        attention_scale=_name(layer, "attention_scale", ROLES, names),
        mlp_scale=_name(layer, "mlp_scale", ROLES, names),
        cross_attention=None
        if cross is None
        else attention_parts(cross, names, _attribute(layer, names.get("layer_cross_out"))),
        # Where both branches read one norm's output (parallel attention and MLP), nothing stands between them.
        has_resid_mid=mlp_in is not None
        and mixer is not None
        and (norm2 is not None or norm1 is None)
        and names.get("resid_mid", "") is not None,
    )


def attention_parts(module: nn.Module, names: Names, out: nn.Module | None = None) -> AttentionParts:
    """Heads, sizes and projections of an attention module; `out` is given where it stands outside the module."""

    def part(role: str) -> Any:
        return _part(module, role, ATTENTION_ROLES, names)

    out = part("out") if out is None else out
    if out is None:
        raise AnatomyError(f"{type(module).__name__} has no output projection among {ATTENTION_ROLES['out']}")
    n_heads = _n_heads(module)
    d_value = getattr(module, "v_head_dim", None) or _width(out, "in_features") // n_heads
    projections: dict[str, Projection] = {}
    q, k, v, fused, latent = part("q"), part("k"), part("v"), part("qkv"), part("latent_kv")
    d_head = _first(module, ("qk_head_dim", "head_dim", "attention_head_size", "head_size"), int) or d_value
    n_kv_heads = n_heads // (getattr(module, "num_key_value_groups", None) or 1)
    if fused is not None:
        n_kv_heads = (_width(fused, "out_features") // d_head - n_heads) // 2
        sizes = (n_heads * d_head, n_kv_heads * d_head, n_kv_heads * d_head)
        if names.get("qkv_order") == "by_head":
            sizes = (d_head,) * 3
        for index, name in enumerate(("q", "k", "v")):
            projections[name] = Projection(fused, sizes, index, d_head)
    if q is not None:
        # Twice the width: every head's queries are followed by its gate.
        gated = _width(q, "out_features") == 2 * n_heads * d_head
        of_latent = getattr(module, LATENT_QUERIES, None) is q
        projections["q"] = Projection(q, (d_head, d_head) if gated else (d_head,), 0, d_head, of_latent)
    if latent is not None:
        d_nope = _width(latent, "out_features") // n_heads - d_value
        projections["k"] = Projection(latent, (d_nope, d_value), 0, d_nope, True)
        projections["v"] = Projection(latent, (d_nope, d_value), 1, d_value, True)
    borrows_keys = bool(getattr(module, KEYS_OF_AN_EARLIER_LAYER, False))
    if k is not None and not borrows_keys:
        n_kv_heads = _width(k, "out_features") // d_head
        projections["k"] = Projection(k, (d_head,), 0, d_head)
    if v is not None and not borrows_keys:
        projections["v"] = Projection(v, (d_value,), 0, d_value)
    reads_image = IMAGE_STATES in inspect.signature(module.forward).parameters
    return AttentionParts(
        module, out, n_heads, n_kv_heads, d_head, d_value, projections, reads_image, borrows_keys
    )


def mlp_linear(parts: LayerParts, role: str) -> nn.Module | None:
    """A linear module of a layer's MLP ("in", "gate", "gate_and_in", "out"); None where there is none."""
    first, last = parts.mlp_in, parts.mlp_out
    if first is not last:
        # Two linear modules of the layer itself.
        return {"in": first, "out": last}.get(role)
    return _first(last, MLP_ROLES[role], nn.Module)


def is_called_norm(module: nn.Module) -> bool:
    """Whether a module in a norm's place divides by a scale (some families have gates or factors there)."""
    return "Norm" in type(module).__name__


def epsilon_of(norm: nn.Module) -> float | None:
    """What a norm adds before the root; None where it goes by no known name."""
    found = (getattr(norm, name, None) for name in EPSILONS)
    return next((float(value) for value in found if value is not None), None)


def scale_of(layer: nn.Module, name: str | None) -> Tensor | float | None:
    """What a branch's output is multiplied by before it enters the stream; "tanh " before a name applies tanh."""
    if name is None:
        return None
    value = _attribute(layer, name)
    return value.tanh() if name.startswith(_TANH) else value


# ---------------------------------------------------------------------- looking


def _submodule(root: nn.Module, path: str) -> Any:
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise AnatomyError(
            f"{type(root).__name__} has no module {path!r}, where its family's record expects one ({error})"
        ) from error


def _all_at(root: nn.Module, path: str) -> list[nn.Module]:
    """The layers at a path in which * stands for every module of a list."""
    before, star, after = path.partition(".*.")
    if star:
        return [layer for owner in _submodule(root, before) for layer in _all_at(owner, after)]
    found = _submodule(root, path)
    return list(found) if isinstance(found, nn.ModuleList) else [found]


def _attribute(root: Any, path: str | tuple[str, ...] | None) -> Any:
    assert not isinstance(path, tuple), "names of several versions are for parts of layers and attention"
    for name in path.removeprefix(_TANH).split(".") if path else ():
        root = getattr(root, name, None)
    return root if path else None


def _name(root: nn.Module, role: str, roles: Roles, names: Names) -> str | None:
    candidates = names[role] if role in names else roles[role]
    if candidates is None or isinstance(candidates, str):
        return candidates
    return next((name for name in candidates if _attribute(root, name) is not None), None)


def _part(root: nn.Module, role: str, roles: Roles, names: Names) -> Any:
    path = _name(root, role, roles, names)
    found = _attribute(root, path)
    if path is not None and role in names and found is None:
        raise AnatomyError(
            f"{type(root).__name__} has no {path!r}, where its family's record expects its {role}"
        )
    return found


def _first(owner: object, names: Iterable[str], kind: type[T]) -> T | None:
    """The first of the owner's attributes under these names that is of a kind."""
    found = (getattr(owner, name, None) for name in names)
    return next((value for value in found if isinstance(value, kind)), None)


def _own(module: nn.Module | None) -> nn.Module | None:
    return None if isinstance(module, nn.Identity) else module


def _width(linear: nn.Module, name: str) -> int:
    width = getattr(linear, name, None)
    if width is None:
        # A module around a linear one.
        weight = next(weight for weight in linear.parameters() if weight.ndim == 2)
        width = weight.shape[0 if name == "out_features" else 1]
    return int(width)


def _n_heads(module: nn.Module) -> int:
    n_heads = _first(module, ("num_heads", "num_attention_heads", "n_heads"), int)
    if n_heads is None:
        config = getattr(module, "config", None)
        n_heads = _first(config, ("num_attention_heads", "num_heads", "n_heads"), int)
    if n_heads is None:
        raise AnatomyError(f"{type(module).__name__} does not say how many heads it has")
    return n_heads


def _lists(root: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Lists of modules, those nearest to the root first."""
    found = [(name, module) for name, module in root.named_modules() if isinstance(module, nn.ModuleList)]
    yield from sorted(found, key=lambda entry: entry[0].count("."))


def _attends(layer: nn.Module) -> bool:
    return any(
        getattr(layer, name, None) is not None for role in ("attention", "mixer") for name in ROLES[role]
    )


def _layers(
    model: PreTrainedModel, stack: Stack, root: nn.Module, exclude: set[int]
) -> tuple[str, nn.ModuleList | None]:
    """The list of a stack's layers, and its path from the model."""
    if stack.layers is not None:
        return stack.layers, _submodule(model, stack.layers)
    for path, modules in _lists(root):
        if id(modules) in exclude or any(word in path for word in NOT_VISION):
            continue
        if len(modules) and any(_attends(layer) for layer in modules):
            return next(name for name, module in model.named_modules() if module is modules), modules
    return "", None


def _final_norm(model: PreTrainedModel, stack: Stack, layers: str) -> nn.Module | None:
    """The norm that stands beside the list of layers."""
    if stack.norm is not None:
        return _submodule(model, stack.norm)
    owner = _submodule(model, layers.rpartition(".")[0])
    return _first(owner, STREAM_NORMS, nn.Module)


def _projector(model: PreTrainedModel, family: Family, inside_decoder: set[int]) -> nn.Module | None:
    if family.projector is not None:
        return _submodule(model, family.projector) if family.projector else None
    outside = [
        (name.rsplit(".", 1)[-1], name.count("."), module)
        for name, module in model.named_modules()
        if id(module) not in inside_decoder
    ]
    known = [entry for entry in outside if entry[0] in PROJECTORS]
    return min(known, key=lambda entry: (entry[1], PROJECTORS.index(entry[0])))[2] if known else None


def _image_token(model: PreTrainedModel, family: Family) -> str:
    if family.image_token is not None or family.image_positions:
        return family.image_token or ""
    for name in IMAGE_TOKENS:
        if isinstance(getattr(model.config, name, None), int):
            return name
    raise AnatomyError(
        f"{type(model.config).__name__} has none of {', '.join(IMAGE_TOKENS)}: which positions are images?"
    )


def _n_read(model: PreTrainedModel, family: Family, n_layers: int) -> int:
    """How many vision layers lie before the features that the projector gets; later ones reach no logit."""
    known = family.feature_layer
    chosen = known(model.config) if callable(known) else _attribute(model.config, known)
    if chosen is None:
        return n_layers
    indices = [chosen] if isinstance(chosen, int) else list(chosen)
    # Hidden state 0 is the tower's input, so there is one more hidden state than layers.
    return max(index if index >= 0 else n_layers + 1 + index for index in indices)
