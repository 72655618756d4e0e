"""Path patching: what one part of the model tells another, with every other way between them shut.

Three runs define it, for a prompt (clean) and a source of other activations:

1. clean and source run: their activations are kept.
2. The senders write at the chosen positions what they write in the source; every other head, and with
   `mlps="frozen"` every other MLP, writes what it writes in the clean run. What the receivers then read is recorded.
3. The clean run, with the receivers reading what was recorded.

| variant | arguments | from |
|---|---|---|
| direct path, through the residual stream alone (an edge) | mlps="frozen" | Goldowsky-Dill 2023, Hanna 2024 |
| path through MLPs too | mlps="free" | Wang 2022 (IOI), section 3 and appendix B |
| all that follows from the receiver | downstream="free" | Wang 2022 |
| sender -> receiver -> logits and no other way | downstream="frozen" | Goldowsky-Dill 2023 |

Sources: arXiv 2211.00593 (Wang et al.), 2304.05969 (Goldowsky-Dill et al.), 2403.17806 (Hanna et al.).

How it is computed. Where everything between is frozen, layers only add to the stream, so a receiver's stream in run 2
is its clean stream plus what the senders write more than in the clean run, and run 2 need not be run: the layer's own
norm and projection are applied to that sum. What a sender writes is taken after the layer's own output projection,
post-norm and factor, so it is exact there too. With free MLPs, and where a receiver's input is no projection of the
normed stream (latent attention, layers without a norm), run 2 is a real run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.arguments import listed, one_of, unknown_name_message
from mmlens.errors import InvalidTypeError, InvalidValueError
from mmlens.families.anatomy import scale_of
from mmlens.heads import HeadSet, as_head_set
from mmlens.hook_names import PART_INPUTS, PARTS, block, layer_of
from mmlens.interventions.components import Component, Spec, components, why_missing
from mmlens.interventions.edits import Change, Edit, check_call
from mmlens.interventions.patching import PatchSource, SharedSource, Source, laid_over, shared_source
from mmlens.model.cache import is_packed
from mmlens.model.choosing import IfAny, Mask, Positions, check_each_example, if_any, positions_mask
from mmlens.model.evaluation import check_same_twice
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import Hook, Intervention, UnknownHookError
from mmlens.model.prompt import Prompt
from mmlens.model.weights import Block

Receiver = tuple[int, int, str] | tuple[int, str] | str
"""What reads: (layer, head, "q" | "k" | "v"), (layer, "mlp") or "logits"."""

MLPS = ("frozen", "free")
DOWNSTREAM = ("free", "frozen")
_INPUTS = ("q", "k", "v")
_WAYS = "(layer, head, 'q' | 'k' | 'v'), (layer, 'mlp') or 'logits'"

Stream = Float[Tensor, "batch pos d_model"]


def path_patch(
    senders: HeadSet | Iterable[Spec] | str,
    receivers: Iterable[Receiver] | str,
    source: PatchSource,
    *,
    positions: Positions = None,
    mlps: str = "frozen",
    downstream: str = "free",
) -> Intervention:
    """Let `receivers` read what they would read if `senders` alone wrote what they write in `source`.

    `senders` are heads (layer, head), (layer, "attn"), (layer, "mlp"), (layer, "layer"), neurons
    (layer, "mlp", neuron) or "image", the image embeddings with deep visual features. `receivers` are
    (layer, head, "q" | "k" | "v"), (layer, "mlp"), or "logits": the final stream. `source` is as for `patch`.

    `positions` are those where the senders write what they write in the source; None is all of the prompt. With
    attention frozen nothing moves between positions, so receivers read something new at the same positions only:
    for queries these are the querying positions, for keys and values the positions attended to. A receiver in a
    later layer than another one is set at every position of the prompt, so that it does not read the other's
    effect; "logits" read it, as run 3 has it. Generated tokens run free.

    Under grouped queries a head's k and v are those of its group: its siblings read them too (with
    downstream="frozen" what the siblings then write stays clean). A query's gate, where heads have one, is no part
    of "q". Several senders write together: their effect is not the sum of their effects one by one.

    `mlps`: whether MLPs between a sender and a receiver (and with downstream="frozen" between a receiver and the
    logits) are "frozen" at the clean run's output or "free" to read the stream as it then is. `downstream`:
    whether after the receivers everything runs "free", or all but the receivers is "frozen" (heads, and MLPs as
    `mlps` says). The module's docstring says which paper has which.

    Raises ValueError for an unknown variant, for a sender that comes before no receiver or a receiver that no
    sender comes before, for a family whose layers do more than add to the stream, and for keys under latent
    attention, whose rotated part all heads share; IndexError for heads and layers that the model does not have;
    UnknownHookError for parts of a layer that the family has no hook point for; and what `patch` raises for
    `source`.

    >>> import mmlens
    >>> from mmlens.data.scenes import scene_examples
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> one, other = (model.prompt_examples(scene_examples("objects", 1, seed=seed)) for seed in (0, 1))
    >>> hooks = path_patch([(0, 1), (1, "mlp")], [(2, 3, "q")], other, positions="last")(model, one)
    >>> [name for name, edit in hooks]
    ['blocks.2.attn.hook_q']
    >>> path_patch([(2, 1)], [(2, 3, "q")], other)(model, one)
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidValueError: sender L2H1 comes before no receiver (L2H3 q): a sender writes ...
    """
    for name, given, known in (("mlps", mlps, MLPS), ("downstream", downstream, DOWNSTREAM)):
        one_of(f"variant {name} =", given, known)
    if not isinstance(senders, HeadSet | str):
        senders = listed("senders", senders, "a HeadSet or a list of heads and other components", sets=True)
    receivers = (
        [receivers] if isinstance(receivers, str) else listed("receivers", receivers, f"a list of {_WAYS}")
    )
    shared, shared_clean = shared_source(source), shared_source(Source())
    of_source, of_clean = _wanted(senders, receivers)

    def intervention(model: HookedVLM, prompt: Prompt) -> list[Hook]:
        check_call(model, prompt)
        _check_family(model, mlps)
        sending = _senders(model, senders)
        reading = _readers(model, receivers)
        _check_order(sending, reading)
        mask = positions_mask(prompt, positions)
        mask = ~prompt.token_map.is_padding if mask is None else mask
        if not bool(mask.any()):
            return []
        if any(part.part == "image" for part in sending) and not isinstance(positions, IfAny):
            _check_image(model, prompt, mask)
        shared_clean.wanted[intervention] = of_clean + _wanted_of_model(model, sending, mlps, downstream)
        path = _Path(
            model=model,
            prompt=prompt,
            senders=sending,
            readers=reading,
            mask=mask,
            mlps=mlps,
            downstream=downstream,
            clean=partial(_laid_out, model, prompt, shared_clean),
            given=partial(_laid_out, model, prompt, shared),
        )
        with torch.no_grad():
            return _hooks(path)

    shared.wanted[intervention], shared_clean.wanted[intervention] = of_source, of_clean
    return intervention


# ---------------------------------------------------------------------- who sends, who reads


_EMBED, _ATTENTION, _MLP, _DEEP = -1, 0, 1, 2


def _depth(layer: int, step: int) -> int:
    """Where in the order of what is added to the stream a part stands; embeddings are at -1."""
    return 3 * layer + step


@dataclass(frozen=True)
class _Reader:
    """A receiver: the hook point that holds what it reads, and `sees`, the depth of all that it reads after."""

    what: str
    layer: int
    sees: int
    hook: str
    label: str
    head: int | None = None
    index: int | None = None
    """Its number on the hook point's head axis: the group's for k and v."""


def _senders(model: HookedVLM, given: HeadSet | Sequence[Spec] | str) -> list[Component]:
    sending = components(model, given)
    elsewhere = [part.label for part in sending if part.stack]
    if elsewhere:
        raise InvalidValueError(
            f"path_patch sends from the language model and the image embeddings, not from {', '.join(elsewhere)}; "
            "what the vision tower tells the language model enters by 'image'"
        )
    whole = {(part.layer, hook) for part in sending for hook in part.hooks if part.index is None}
    for part in sending:
        held = PARTS["attn" if part.part == "z" else "mlp"]
        if part.index is not None and (part.layer, f"blocks.{part.layer}.{held}") in whole:
            raise InvalidValueError(
                f"sender {part.label} is part of another sender, the whole {held} of its layer"
            )
        if part.layer is None or part.index is None:
            continue
        parts = model.anatomy.language[part.layer]
        what, output, known = "attn", parts.attention_output, (parts.mixer, parts.post_norm1)
        if part.part == "post":
            what, output, known = "mlp", parts.mlp_output, (parts.mlp_out, parts.post_norm2)
        if output not in known:
            raise InvalidValueError(
                f"sender {part.label}: what {model.family.model_type!r} adds to the stream comes out of a "
                f"{type(output).__name__} after it, which may mix positions; send from ({part.layer}, {what!r})"
            )
    return sending


def _readers(model: HookedVLM, receivers: Sequence[Receiver]) -> list[_Reader]:
    if not receivers:
        raise InvalidValueError(f"no receivers given: expected at least one of {_WAYS}")
    readers = [_reader(model, receiver) for receiver in receivers]
    repeated = sorted({reader.label for reader in readers if readers.count(reader) > 1})
    if repeated:
        raise InvalidValueError(
            f"each receiver may be named once; named more than once: {', '.join(repeated)}"
        )
    return sorted(readers, key=lambda reader: reader.sees)


def _reader(model: HookedVLM, receiver: Any) -> _Reader:
    n_layers = model.cfg.n_layers
    if isinstance(receiver, str):
        if receiver != "logits":
            raise InvalidValueError(
                unknown_name_message("receiver", receiver, ["logits"]) + f"; receivers are {_WAYS}"
            )
        hook = block(n_layers - 1, "hook_resid_post")
        return _Reader("logits", n_layers, _depth(n_layers, _ATTENTION), hook, "logits")
    if not isinstance(receiver, tuple) or not 2 <= len(receiver) <= 3:
        raise InvalidTypeError(f"a receiver is {_WAYS}, not {receiver!r}; receivers are given as a list")
    what = receiver[-1]
    known = _INPUTS if len(receiver) == 3 else ("mlp",)
    if not isinstance(what, str):
        raise InvalidTypeError(f"a receiver is {_WAYS}, not {receiver!r}")
    if what not in known:
        raise InvalidValueError(
            unknown_name_message(f"receiver {receiver!r}:", what, known) + f"; receivers are {_WAYS}"
        )
    if len(receiver) == 2:
        layer = receiver[0]
        (part,) = components(model, [(layer, "mlp")])
        hook = block(layer, PART_INPUTS["mlp"])
        _require(model, f"receiver {receiver!r}", hook)
        return _Reader("mlp", layer, _depth(layer, _MLP), hook, f"{part.label} in")
    ((layer, head),) = as_head_set([receiver[:2]], model.grid)
    attention = model.anatomy.language[layer].attention
    assert attention is not None
    hook = block(layer, PARTS[what])
    others = "from the image" if attention.reads_image else "of an earlier layer"
    if what != "q" and (attention.reads_image or attention.borrows_keys):
        raise InvalidValueError(f"receiver {receiver!r}: layer {layer} attends with keys and values {others}")
    _require(model, f"receiver {receiver!r}", hook)
    if what == "k" and attention.projections["k"].of_latent:
        raise InvalidValueError(
            f"receiver {receiver!r}: under latent attention part of a key is rotated and shared by all heads of the "
            "layer, so no head has a key of its own; its 'q' and 'v' can receive"
        )
    index = head if what == "q" else head // (attention.n_heads // attention.n_kv_heads)
    return _Reader(what, layer, _depth(layer, _ATTENTION), hook, f"L{layer}H{head} {what}", head, index)


def _require(model: HookedVLM, what: str, hook: str) -> None:
    if hook not in model.hook_dict:
        why = why_missing(model, hook)
        raise UnknownHookError(
            f"{what}: {model.family.model_type!r} has no hook point {hook!r}" + (f" ({why})" if why else "")
        )


def _check_family(model: HookedVLM, mlps: str) -> None:
    name, layers = model.family.model_type, range(model.cfg.n_layers)
    if not model.family.adds:
        raise InvalidValueError(
            f"path_patch: the layers of {name!r} do more than add to the residual stream, so what one part tells "
            "another has no path of its own; patch() replaces any activation"
        )
    if model.anatomy.has_layers_between:
        raise InvalidValueError(
            f"path_patch: layers of {name!r} that read the image stand between its layers"
        )
    if mlps == "free" and any(block(layer, "hook_mlp_out") not in model.hook_dict for layer in layers):
        raise InvalidValueError(
            f"mlps='free': {name!r} has layers in which no MLP can be told from attention"
        )


def _check_image(model: HookedVLM, prompt: Prompt, mask: Mask) -> None:
    is_image = model.image_mask(prompt)
    if is_image is None or not bool(is_image.any()):
        raise InvalidValueError("sender 'image': the prompt has no image")
    check_each_example(
        prompt, is_image & mask.to(is_image.device), "sender 'image': the positions choose no image position"
    )


def _check_order(senders: Sequence[Component], readers: Sequence[_Reader]) -> None:
    """Every sender must come before a receiver, and every receiver after a sender."""
    first = {part.label: min(_depth_of(hook) for hook in part.hooks) for part in senders}
    for label, depth in first.items():
        if depth >= readers[-1].sees:
            names = ", ".join(reader.label for reader in readers)
            raise InvalidValueError(
                f"sender {label} comes before no receiver ({names}): a sender writes what later parts read"
            )
    for reader in readers:
        if min(first.values()) >= reader.sees:
            raise InvalidValueError(
                f"receiver {reader.label} comes after no sender ({', '.join(first)}): it would read what it reads "
                "anyway"
            )


def _depth_of(hook: str) -> int:
    """Where in the order of what is added to the stream a sender's hook point stands."""
    layer = layer_of(hook)
    if layer is None:
        return _EMBED
    steps = {"hook_z": _ATTENTION, "hook_attn_out": _ATTENTION, "hook_deepstack": _DEEP}
    return _depth(layer, steps.get(hook.rsplit(".", 1)[-1], _MLP))


# ---------------------------------------------------------------------- the three runs


Read = Callable[[str], Float[Tensor, "batch pos ..."]]
"""Hook point -> its activation over all positions; zeros at text where the hook point has rows of images alone."""


@dataclass(frozen=True)
class _Path:
    """One path patch on one prompt, with the activations of run 1.

    `mask`: where the senders write what they write in the source. `readers` are in the order in which they read.
    """

    model: HookedVLM
    prompt: Prompt
    senders: list[Component]
    readers: list[_Reader]
    mask: Mask
    mlps: str
    downstream: str
    clean: Read
    given: Read

    @property
    def real(self) -> Mask:
        return ~self.prompt.token_map.is_padding

    def needs_run(self, reader: _Reader) -> bool:
        """Whether what it reads is known by a real run 2 alone."""
        forked = f"{reader.hook}_input" in self.model.hook_dict
        return self.mlps == "free" or (reader.what in _INPUTS and not forked)

    def reads_behind_another(self, reader: _Reader) -> bool:
        """Whether it would read the effect of another receiver, were it not set everywhere."""
        return reader.what != "logits" and reader.sees > self.readers[0].sees

    def heads(self, layer: int) -> list[int]:
        """The layer's heads that receive."""
        return sorted({r.head for r in self.readers if r.layer == layer and r.head is not None})


@dataclass(frozen=True)
class _Write:
    """What the senders at one hook point add to the stream in the source, less what they add in the clean run."""

    depth: int
    delta: Stream
    """Zero outside the patched positions."""


def _hooks(path: _Path) -> list[Hook]:
    """The hooks of run 3."""
    writes = _writes(path)
    by_hook: dict[str, list[_Reader]] = {}
    for reader in path.readers:
        by_hook.setdefault(reader.hook, []).append(reader)
    recorded = _run_2(path, writes)
    hooks: list[Hook] = []
    for hook, group in by_hook.items():
        reader = group[0]
        heads = sorted({r.index for r in group if r.index is not None}) or None
        where = _where(path, reader, writes)
        if path.needs_run(reader):
            values = recorded[hook] if heads is None else recorded[hook][:, :, heads]
            values = values - path.clean(hook) if reader.what == "logits" else values
        else:
            values = _reads(path, reader, heads, where, writes)
        # The logits also read what other receivers changed: to them the path is added.
        change = _added(values) if reader.what == "logits" else _set_to(values)
        # Where it is set follows from what the senders changed, which is checked where positions are read.
        hooks.append(
            (hook, Edit(path.model, path.prompt, hook, change, positions=if_any(where), heads=heads))
        )
    return [*hooks, *_frozen_downstream(path)]


def _set_to(values: Float[Tensor, "batch pos ..."]) -> Change:
    return lambda x, here: here.of_prompt(values, 0.0).to(x)


def _added(values: Stream) -> Change:
    return lambda x, here: x + here.of_prompt(values, 0.0).to(x)


def _writes(path: _Path) -> list[_Write]:
    by_hook: dict[str, list[Component]] = {}
    for part in path.senders:
        for hook in part.hooks:
            by_hook.setdefault(hook, []).append(part)
    writes = []
    for hook, group in by_hook.items():
        clean = path.clean(hook)
        mask = path.mask.to(clean.device)
        before, after = clean[mask], path.given(hook).to(clean)[mask]
        indices = [part.index for part in group if part.index is not None]
        if indices:
            sending = _exchanged(before, after, indices, group[0].axis)
            before, after = (_added_to_the_stream(path.model, group[0], x) for x in (before, sending))
        delta = before.new_zeros(*mask.shape, before.shape[-1])
        delta[mask] = after - before
        writes.append(_Write(_depth_of(hook), delta))
    return writes


def _exchanged(x: Tensor, other: Tensor, indices: Sequence[int], axis: int) -> Tensor:
    """x with some heads or neurons taken from `other`."""
    index = torch.tensor(indices, device=x.device)
    return x.index_copy(axis, index, other.index_select(axis, index))


def _added_to_the_stream(
    model: HookedVLM, part: Component, x: Float[Tensor, "row ..."]
) -> Float[Tensor, "row d_model"]:
    """What a layer's branch adds to the stream where its heads or neurons are `x`."""
    assert part.layer is not None
    parts = model.anatomy.language[part.layer]
    if part.part == "z":
        assert parts.attention is not None
        out, norm, scale, x = parts.attention.out, parts.post_norm1, parts.attention_scale, x.flatten(-2)
    else:
        out, norm, scale = Block("", parts).mlp.out, parts.post_norm2, parts.mlp_scale
    # `forward`, not the modules themselves: hooks stand for runs.
    added = out.forward(x[None])
    added = added if norm is None else norm.forward(added)
    factor = scale_of(parts.module, scale)
    return (added if factor is None else added * factor)[0]


def _reaching(reader: _Reader, writes: Sequence[_Write]) -> list[Stream]:
    return [write.delta for write in writes if write.depth < reader.sees]


def _where(path: _Path, reader: _Reader, writes: Sequence[_Write]) -> Mask:
    """Where run 3 sets what the receiver reads."""
    if path.reads_behind_another(reader):
        return path.real
    changed = torch.stack([delta.any(-1).to(path.mask.device) for delta in _reaching(reader, writes)])
    # Where the source is the clean run itself, the edit stands where it would, and changes nothing.
    return changed.any(0) if bool(changed.any()) else path.mask


def _stream(path: _Path, reader: _Reader, hook: str, writes: Sequence[_Write]) -> Stream:
    """The clean stream plus what reaches the receiver through it."""
    stream = path.clean(hook)
    return stream + sum(delta.to(stream.device) for delta in _reaching(reader, writes))


def _reads(
    path: _Path, reader: _Reader, heads: Sequence[int] | None, where: Mask, writes: Sequence[_Write]
) -> Float[Tensor, "batch pos ..."]:
    """What a receiver reads in run 2 where all between is frozen, at the positions `where`; logits: what is added."""
    if reader.what == "logits":
        return torch.stack([delta.to(path.mask.device) for delta in _reaching(reader, writes)]).sum(0)
    if reader.what == "mlp":
        return _stream(path, reader, reader.hook, writes)
    parts = path.model.anatomy.language[reader.layer]
    assert parts.attention is not None and parts.norm1 is not None
    projection = parts.attention.projections[reader.what]
    stream = _stream(path, reader, block(reader.layer, "hook_resid_pre"), writes)
    where = where.to(stream.device)
    projected = projection.module.forward(parts.norm1.forward(stream[where][None]))
    chosen = projection.read(projected)[0][:, heads]
    values = chosen.new_zeros(*where.shape, *chosen.shape[1:])
    values[where] = chosen
    return values


def _run_2(path: _Path, writes: Sequence[_Write]) -> dict[str, Tensor]:
    """What receivers read in a real run 2, by hook point, for those that need one."""
    readers = [reader for reader in path.readers if path.needs_run(reader)]
    if not readers:
        return {}
    if path.mlps == "free":
        hooks = _attention_frozen(path, writes)
    else:
        streams = {block(reader.layer, "hook_resid_pre"): reader for reader in readers}
        hooks = [(hook, _replaced(_stream(path, reader, hook, writes))) for hook, reader in streams.items()]
    names = list(dict.fromkeys(reader.hook for reader in readers))
    check_same_twice(path.model.hf_model)
    with path.model.hooks(fwd_hooks=hooks):
        _, cache = path.model.run_with_cache(
            path.prompt, names_filter=names, logits_to_keep=1, use_cache=False
        )
    return cache.cache_dict


def _replaced(values: Tensor) -> Callable[..., Tensor]:
    return lambda x, hook: values.to(x)


def _attention_frozen(path: _Path, writes: Sequence[_Write]) -> list[Hook]:
    """Run 2 with free MLPs: attention adds its clean output and what the senders add, other senders are replaced."""
    model, last = path.model, path.readers[-1].sees
    first = min(write.depth for write in writes)
    attention = {write.depth: write.delta for write in writes if write.depth % 3 == _ATTENTION}
    hooks: list[Hook] = []
    for layer in range(model.cfg.n_layers):
        depth = _depth(layer, _ATTENTION)
        if first <= depth < last:
            name = block(layer, "hook_attn_out")
            hooks.append((name, _replaced(path.clean(name) + attention.get(depth, 0.0))))
    is_image = model.image_mask(path.prompt)
    for part in path.senders:
        for name in part.hooks:
            if _depth_of(name) % 3 == _ATTENTION:
                continue
            mask, given = path.mask, path.given(name)
            if is_packed(name):
                assert is_image is not None
                mask, given = mask[is_image.to(mask.device)], given[is_image.to(given.device)]
            hooks.append((name, partial(_sent, mask=mask, given=given, part=part)))
    return hooks


def _sent(x: Tensor, hook: Any, *, mask: Tensor, given: Tensor, part: Component) -> Tensor:
    given = given.to(x)
    if part.index is not None:
        given = _exchanged(x, given, [part.index], part.axis)
    return torch.where(mask.to(x.device).unsqueeze(-1), given, x)


def _frozen_downstream(path: _Path) -> list[Hook]:
    """Run 3 with all but the receivers as in the clean run, from the first of them on."""
    if path.downstream == "free":
        return []
    model, first = path.model, path.readers[0].sees
    hooks: list[Hook] = []

    def freeze(hook: str, clean: str = "", heads: Sequence[int] | None = None) -> None:
        values = path.clean(clean or hook)
        change = _set_to(values if heads is None else values[:, :, heads])
        hooks.append((hook, Edit(model, path.prompt, hook, change, positions=path.real, heads=heads)))

    for layer in range(first // 3, model.cfg.n_layers):
        receiving, attention = path.heads(layer), model.anatomy.language[layer].attention
        if _depth(layer, _ATTENTION) > first:
            read = block(layer, "hook_attn_in")
            if receiving:
                _require(model, "receivers in several layers, downstream='frozen'", read)
            if read in model.hook_dict:
                # Frozen at its input, its keys and values are clean too: later layers and tokens may attend to them.
                freeze(read, block(layer, "hook_resid_pre"))
            else:
                freeze(block(layer, "hook_attn_out"))
        if receiving and attention is not None and len(receiving) < attention.n_heads:
            # Others change where they share a key or value with a receiver, or a norm after the heads.
            others = [head for head in range(attention.n_heads) if head not in receiving]
            freeze(block(layer, "attn.hook_z"), heads=others)
        receives = any(r.layer == layer and r.what == "mlp" for r in path.readers)
        if path.mlps == "frozen" and not receives and block(layer, "hook_mlp_out") in model.hook_dict:
            freeze(block(layer, "hook_mlp_out"))
    return hooks


# ---------------------------------------------------------------------- the activations of run 1


def _laid_out(
    model: HookedVLM, prompt: Prompt, shared: SharedSource, hook: str
) -> Float[Tensor, "batch pos ..."]:
    return laid_over(model, prompt, hook, shared.origins(model, prompt, [hook])[hook])


def _wanted(
    senders: HeadSet | Sequence[Spec] | str, receivers: Sequence[Receiver]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Hook points that are needed of the source and of the clean run, as far as they are known without a model."""
    of_source = []
    for spec in [] if isinstance(senders, str) else senders:
        if isinstance(spec, tuple) and len(spec) == 2:
            word = spec[1] if isinstance(spec[1], str) else "z"
            of_source.append(f"blocks.{spec[0]}.{PARTS.get(word, '')}")
    reads = [receiver for receiver in receivers if isinstance(receiver, tuple)]
    of_clean = [
        f"blocks.{read[0]}.{PART_INPUTS['mlp'] if read[-1] == 'mlp' else PARTS['resid_pre']}"
        for read in reads
    ]
    return tuple(of_source), (*of_source, *of_clean)


def _wanted_of_model(
    model: HookedVLM, senders: Sequence[Component], mlps: str, downstream: str
) -> tuple[str, ...]:
    """The other hook points that are needed of the clean run."""
    outputs = ["hook_attn_out"] * (mlps == "free") + ["hook_resid_pre"] * (downstream == "frozen")
    outputs += ["hook_mlp_out"] * (mlps == "frozen" and downstream == "frozen")
    layers = range(model.cfg.n_layers)
    return (
        *(hook for part in senders for hook in part.hooks),
        *(block(layer, output) for output in outputs for layer in layers),
    )
