"""Activation patching: an activation of one run put in its place in another.

1. `patch(hook, source)` is made, and tells the run of its source that it wants `hook`.
2. When the first of them is built for a prompt, the source runs once and keeps what all patches alive want of it.
3. Each patch lays the source's activation over the prompt's own positions, equal layouts one to one, others as
   `positions` and `source_positions` say, and hands it to an `Edit`.

Denoising patches clean activations into a corrupted run, noising corrupted ones into a clean run: which is which
lies in the prompt that is run and in the source.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import ActivationCache

from mmlens.arguments import called, instance_of, shown, unknown_name_message, whole_numbers
from mmlens.errors import InvalidTypeError, InvalidValueError, OutOfRangeError
from mmlens.hook_names import axes_of, head_axis, runs_over_positions
from mmlens.interventions.edits import (
    Change,
    Edit,
    EditContext,
    check_call,
    intervention_of,
)
from mmlens.interventions.layouts import layout_difference
from mmlens.interventions.origin import OfAnotherModel, check_origin
from mmlens.model.cache import is_packed, over_positions
from mmlens.model.choosing import IfAny, Positions, if_any, positions_mask
from mmlens.model.continuing import as_continued
from mmlens.model.evaluation import check_same_twice
from mmlens.model.fingerprints import weights_version
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import Hook, HookNeverFiredError, Intervention, UnknownHookError, check_fired
from mmlens.model.prompt import Prompt

Activations: TypeAlias = ActivationCache | Mapping[str, Tensor]
"""Activations by hook name: TransformerLens' cache, or a dict."""

PromptOrActivations: TypeAlias = Prompt | ActivationCache | Mapping[str, Tensor] | OfAnotherModel
SourceOf = Callable[[HookedVLM, Prompt], PromptOrActivations]
"""From the prompt that is patched to the one to patch from, as a corruption gives it, or to activations."""


@dataclass(frozen=True, eq=False)
class Source:
    """A run to patch from: of `prompt` - None: of the prompt that is patched - under an intervention.

    `Source()` is the clean run of the prompt itself. Causal tracing (Meng et al. 2022, ROME, section 2) runs the
    prompt with noise on its image and restores clean activations one at a time:
    `compose(noise_images(), patch(hook, Source()))`.
    """

    prompt: Prompt | SourceOf | None = None
    under: Intervention | None = None

    def __post_init__(self) -> None:
        if self.prompt is not None and not isinstance(self.prompt, Prompt):
            called(
                "prompt",
                self.prompt,
                "a Prompt, a function (model, prompt) -> Prompt, or None",
                n_arguments=2,
            )
        if self.under is not None:
            intervention_of(self.under, "under")


SourcePositions: TypeAlias = (
    Bool[Tensor, "source_batch source_pos"] | str | Callable[[Prompt], Bool[Tensor, "batch pos"]] | None
)
"""As Positions, but of the source's prompt."""

PatchSource: TypeAlias = Source | Prompt | SourceOf | Activations | OfAnotherModel


def patch(
    hook: str,
    source: PatchSource,
    *,
    positions: Positions = None,
    heads: Sequence[int] | None = None,
    source_positions: SourcePositions = None,
) -> Intervention:
    """Replace the activation at `hook` with the source's, at `positions` (None: the whole prompt) and `heads`.

    `source` is a Prompt to run, a function (model, prompt) -> Prompt or activations (a corruption: it fits every
    prompt of a data set), a `Source`, or activations themselves (a cache, or a dict by hook name). Row i of the batch
    is patched from row i of the source. A source is run once for all patches of it that are alive, and its activations
    are kept for the latest prompt until the last of those patches is gone (changed weights make it run again; a change
    through `.data` is not seen). Activations of another model are refused, unless `of_another_model` says so.
    Where hooks are live while a patch is built, the source runs under them too, for that patch alone.

    Layouts must be equal: the same token at every position, the same images. Where they are not, `source_positions`
    says what is patched from where: in each row it chooses as many positions of the source as `positions` does of the
    prompt, and they are matched in order. (Of activations without a prompt only shapes, and a cache's visual
    positions, can be compared.) At hook_rot_q and hook_rot_k the source's rotation comes along; in a padded
    batch `generate` rotates otherwise than one run does (it counts from each row's first token), so patch these there
    in batches without padding.

    For scores and patterns, positions are queries; their keys need equal layouts in any case. Heads are those of the
    hook point: for k and v the key-value heads, which several query heads share. On vision.*, projector.* and other
    stacks beside the language model there are no positions: the whole activation (of `heads`) is replaced, and images
    must be laid out alike. Generated tokens are not patched; the answer's positions of a continued prompt are, from a
    source that is continued by the same tokens. No gradient reaches the source.

    Raises ValueError where layouts differ, masks choose different numbers of positions, or shapes do not fit;
    UnknownHookError for a hook point that the model or the given activations do not have; IndexError for a head that
    there is not; TypeError for a source that is none; HookNeverFiredError where the source's run never reaches it.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> clean, corrupted = (model.prompt(f"What colour is {key} ?") for key in "KQ")
    >>> restored = patch("hook_embed", clean)
    >>> bool((model.run_with_hooks(corrupted, fwd_hooks=restored(model, corrupted)) == model(clean)).all())
    True
    """
    instance_of("hook", hook, str, "the name of a hook point")
    if positions is not None and not isinstance(positions, (str, Tensor)):
        called("positions", positions, "a mask, a name or a function of the prompt", n_arguments=1)
    chosen = None if heads is None else whole_numbers("heads", heads, at_least=0)
    if chosen is not None and not chosen:
        raise InvalidValueError(f"patch({hook!r}, ...): heads is empty, so the patch would do nothing")
    if source_positions is not None and positions is None:
        raise InvalidValueError(
            f"patch({hook!r}, ...): source_positions says where the activations for `positions` come from; "
            "give positions too"
        )
    shared = shared_source(source)

    def intervention(model: HookedVLM, prompt: Prompt) -> list[Hook]:
        check_call(model, prompt)
        model.hook_names(hook)
        origin = shared.origins(model, prompt, [hook])[hook]
        if not runs_over_positions(hook):
            if source_positions is not None:
                raise InvalidValueError(
                    f"{hook} does not run over the prompt's positions: it takes no source_positions"
                )
            _check_equal_images(hook, prompt, origin)
            change = _whole(model, hook, origin, chosen)
            return [(hook, Edit(model, prompt, hook, change, positions=positions, heads=chosen))]
        values = laid_over(model, prompt, hook, origin, positions, source_positions)
        if "query" in axes_of(hook):
            change = _rows_of_queries(hook, values, chosen)
        else:
            change = _of_positions(hook, values, chosen, _packed_mask(model, prompt, hook))
        edit = Edit(model, prompt, hook, change, positions=positions, heads=chosen, generated=False)
        return [(hook, edit)]

    shared.wanted[intervention] = (hook,)
    return intervention


# ---------------------------------------------------------------------- what the source gives


@dataclass(frozen=True)
class Origin:
    """One activation of a source, and what is known of the prompt that it comes from."""

    value: Tensor
    prompt: Prompt | None
    """None where activations alone were given."""
    image_mask: Bool[Tensor, "batch pos"] | None
    has_batch_axis: bool | None
    """None where that is not known."""


@dataclass
class _Latest:
    """What a source gave for one model and one prompt."""

    model: weakref.ref[HookedVLM]
    prompt: weakref.ref[Prompt] | None
    """The patched prompt, where the source depends on it."""
    given: PromptOrActivations | None
    """None where it is the patched prompt itself, which must not be kept alive from here."""
    weights: int
    """The version of the model's weights; other ones give other activations."""
    activations: dict[str, Tensor] = field(default_factory=dict)

    def is_of(self, model: HookedVLM, prompt: Prompt) -> bool:
        return (
            self.model() is model
            and (self.prompt is None or self.prompt() is prompt)
            and self.weights == weights_version(model.hf_model)
        )


class SharedSource:
    """A source and its run's activations. The interventions that patch from it own it; it goes with the last."""

    def __init__(self, source: Source | Activations | OfAnotherModel) -> None:
        self.source = source
        self.wanted: weakref.WeakKeyDictionary[Intervention, tuple[str, ...]] = weakref.WeakKeyDictionary()
        """What interventions that are alive will ask for, so that one run gives it all."""
        self._latest: _Latest | None = None

    def activations(self, model: HookedVLM, prompt: Prompt, hooks: Sequence[str]) -> dict[str, Tensor]:
        """The source's activations at the hook points, with the axes that each has in the model.

        Raises ValueError where the source is not laid out as the prompt is, and as `patch`.
        """
        values = {}
        for hook, origin in self.origins(model, prompt, hooks).items():
            if runs_over_positions(hook):
                laid_over(model, prompt, hook, origin)
                values[hook] = _with_batch_axis(hook, origin, len(prompt))
            else:
                _check_equal_images(hook, prompt, origin)
                values[hook] = origin.value
        return values

    def origins(self, model: HookedVLM, prompt: Prompt, hooks: Sequence[str]) -> dict[str, Origin]:
        """The source's activations as its run gave them, whatever its layout, running it where that must be."""
        if not isinstance(self.source, Source):
            return _of_activations(self.source, model, hooks)
        if any(point.is_live for point in model.hook_dict.values()):
            # A run under somebody's hooks is not the run that other patches want.
            return self._read(self._start(model, prompt), model, prompt, hooks, hooks)
        if self._latest is None or not self._latest.is_of(model, prompt):
            self._latest = None
            self._latest = self._start(model, prompt)
        wanted = hooks
        if not self._latest.activations.keys() >= set(hooks):
            wanted = [*hooks, *(name for names in self.wanted.values() for name in names)]
        return self._read(self._latest, model, prompt, hooks, wanted)

    def _start(self, model: HookedVLM, prompt: Prompt) -> _Latest:
        assert isinstance(self.source, Source)
        given: Any = self.source.prompt
        weights = weights_version(model.hf_model)
        if isinstance(given, Prompt):
            longer = as_continued(given, prompt)
            depends = None if prompt.continuation is None else weakref.ref(prompt)
            return _Latest(weakref.ref(model), depends, longer, weights)
        if callable(given):
            given = given(model, prompt)
            given = as_continued(given, prompt) if isinstance(given, Prompt) else given
            if not isinstance(given, (Prompt, Mapping, ActivationCache, OfAnotherModel)):
                raise InvalidTypeError(
                    "a source function (model, prompt) gives a Prompt or activations, this one gave "
                    f"{type(given).__name__}; for a run under an intervention take Source(under=...)"
                )
        if self.source.under is not None and isinstance(given, (Mapping, ActivationCache, OfAnotherModel)):
            raise InvalidTypeError("Source(under=...) needs a prompt to run; its function gave activations")
        return _Latest(weakref.ref(model), weakref.ref(prompt), None if given is prompt else given, weights)

    def _read(
        self,
        latest: _Latest,
        model: HookedVLM,
        prompt: Prompt,
        hooks: Sequence[str],
        wanted: Sequence[str],
    ) -> dict[str, Origin]:
        assert isinstance(self.source, Source)
        given = prompt if latest.given is None else latest.given
        if not isinstance(given, Prompt):
            return _of_activations(given, model, hooks)
        if not latest.activations.keys() >= set(hooks):
            known = {name: value for name, value in latest.activations.items() if name in wanted}
            missing = {name for name in wanted if name in model.hook_dict} - known.keys()
            latest.activations = known | _activations(model, given, missing, self.source.under)
        silent = [hook for hook in hooks if hook not in latest.activations]
        check_fired(silent, "the source's run")
        mask = model.image_mask(given)
        return {hook: Origin(latest.activations[hook], given, mask, True) for hook in hooks}


_SHARED: weakref.WeakValueDictionary[tuple[int, int], SharedSource] = weakref.WeakValueDictionary()
"""By the identity of what the source is made of, which its run keeps alive."""


def shared_source(source: PatchSource) -> SharedSource:
    """The one SharedSource of all interventions alive that patch from `source`.

    Raises TypeError for what is no source.
    """
    if isinstance(source, Mapping):
        if "input_ids" in source:
            raise InvalidTypeError(
                "the source is a model's keyword inputs; expected a Prompt to run, model.prompt(question, images), or "
                "activations by hook name"
            )
        for name, value in source.items():
            if not isinstance(value, Tensor):
                raise InvalidTypeError(
                    f"the source's {name!r} is {shown(value)}; expected an activation, a tensor"
                )
    if isinstance(source, (Mapping, ActivationCache, OfAnotherModel)):
        return SharedSource(source)
    if isinstance(source, Prompt) or (callable(source) and not isinstance(source, (type, torch.nn.Module))):
        source = Source(source)
    if not isinstance(source, Source):
        raise InvalidTypeError(
            "a source is a Prompt, a function (model, prompt) -> Prompt or activations, a Source, an ActivationCache "
            f"or a dict of activations, not {type(source).__name__}"
        )
    key = (id(source.prompt), id(source.under))
    shared = _SHARED.get(key)
    if shared is None:
        shared = _SHARED[key] = SharedSource(source)
    return shared


@torch.no_grad()
def _activations(
    model: HookedVLM, prompt: Prompt, names: set[str], under: Intervention | None
) -> dict[str, Tensor]:
    """What fires of `names` when the source's prompt is run."""
    inside_softmax = {name for name in names if name.endswith(("hook_attn_scores", "hook_pattern"))}
    hooks = [] if under is None else list(under(model, prompt))
    activations: dict[str, Tensor] = {}
    # Reading inside the softmax moves a layer by rounding: what other patches get must not depend on it.
    for group in (names - inside_softmax, inside_softmax):
        if group:
            with model.hooks(fwd_hooks=hooks):
                activations |= _fired(model, prompt, group)
    return activations


def _fired(model: HookedVLM, prompt: Prompt, names: set[str]) -> dict[str, Tensor]:
    check_same_twice(model.hf_model)
    try:
        _, cache = model.run_with_cache(
            prompt, names_filter=lambda name: name in names, logits_to_keep=1, use_cache=False
        )
    except HookNeverFiredError:
        return {}
    return cache.cache_dict


def _of_activations(
    given: Activations | OfAnotherModel, model: HookedVLM, hooks: Sequence[str]
) -> dict[str, Origin]:
    check_origin(given, model, "the source")
    if isinstance(given, OfAnotherModel):
        given = given.activations
    known = given.cache_dict if isinstance(given, ActivationCache) else given
    origins = {}
    for hook in hooks:
        if hook not in known:
            raise UnknownHookError(unknown_name_message("activation in the source", hook, known))
        if not isinstance(known[hook], Tensor):
            raise InvalidTypeError(
                f"the source's {hook} is {shown(known[hook])}; expected an activation, a tensor"
            )
        mask, has_batch_axis = getattr(given, "image_mask", None), getattr(given, "has_batch_dim", None)
        origins[hook] = Origin(known[hook], None, mask, has_batch_axis)
    return origins


# ---------------------------------------------------------------------- over the prompt's positions


def _packed_mask(model: HookedVLM, prompt: Prompt, hook: str) -> Bool[Tensor, "batch pos"] | None:
    """The prompt's visual positions, where the hook point has their rows alone."""
    return model.image_mask(prompt) if is_packed(hook) else None


def laid_over(
    model: HookedVLM,
    prompt: Prompt,
    hook: str,
    origin: Origin,
    positions: Positions = None,
    source_positions: SourcePositions = None,
) -> Float[Tensor, "batch pos ..."]:
    """The source's activation over the positions of `prompt`, after the batch axis, whatever the hook point's axes.

    Axes after them stay in order: scores and patterns become [batch, query, head, key]. What no position asks for
    is anything.
    """
    values = _with_batch_axis(hook, origin, len(prompt))
    packed = _packed_mask(model, prompt, hook)
    if packed is not None:
        there = packed if origin.image_mask is None and source_positions is None else origin.image_mask
        values = _unpacked(hook, values, there)
        visual = there
    else:
        visual = None
        if "query" in axes_of(hook):
            values = values.transpose(1, 2)
    if source_positions is None or "query" in axes_of(hook):
        _check_equal_layout(model, prompt, hook, origin, values)
    if source_positions is None:
        return values
    here = positions_mask(prompt, positions)
    assert here is not None
    if isinstance(positions, IfAny) and not isinstance(source_positions, Tensor):
        # As many are chosen on both sides, so there may be none on both.
        source_positions = if_any(source_positions)
    chosen = _source_mask(origin, values, source_positions)
    if packed is not None and visual is not None:
        here, chosen = here.cpu() & packed.cpu(), chosen & visual.cpu()
    index = _matched(hook, here.cpu(), chosen).to(values.device)
    return values[torch.arange(len(values), device=values.device)[:, None], index]


def _with_batch_axis(hook: str, origin: Origin, n_rows: int) -> Tensor:
    axes = axes_of(hook)
    lacks_one = origin.has_batch_axis is False or (
        origin.has_batch_axis is None and origin.value.ndim == len(axes) - 1
    )
    if axes[0] != "batch" or not lacks_one:
        return origin.value
    if n_rows != 1:
        raise InvalidValueError(
            f"{hook}: the source's activations have no batch axis, which fits a batch of one prompt, this one has "
            f"{n_rows}"
        )
    return origin.value[None]


def _unpacked(hook: str, rows: Tensor, mask: Bool[Tensor, "batch pos"] | None) -> Tensor:
    """[image_token, ...] over all positions, zeros at text."""
    if mask is None:
        raise InvalidValueError(
            f"{hook} holds rows of visual positions alone, and which they were in the source is not known: give "
            "a Prompt, or the ActivationCache of model.run_with_cache"
        )
    if len(rows) != int(mask.sum()):
        raise InvalidValueError(
            f"{hook}: the source has {len(rows)} visual positions, "
            f"expected {int(mask.sum())}, of batch rows with {mask.sum(1).tolist()}"
        )
    return over_positions(rows, mask)


def _check_equal_layout(
    model: HookedVLM, prompt: Prompt, hook: str, origin: Origin, values: Float[Tensor, "batch pos ..."]
) -> None:
    remedy = (
        "keys cannot be matched, so scores and patterns need equal layouts"
        if "query" in axes_of(hook)
        else "equal layouts are patched one to one; else say what goes where: positions= and source_positions="
    )
    if origin.prompt is not None:
        difference = layout_difference(prompt, origin.prompt)
        if difference is not None:
            raise InvalidValueError(
                f"{hook}: this prompt and the source's are laid out differently: {difference}; {remedy}"
            )
    if tuple(values.shape[:2]) != tuple(prompt.shape):
        if prompt.continuation is not None and origin.prompt is None:
            remedy = (
                "an answer follows this prompt, and activations have none after theirs: give the Prompt they are of "
                "as the source, which is then run with the same answer"
            )
        raise InvalidValueError(
            f"{hook}: the source's activation {list(origin.value.shape)} does not run over this prompt's "
            f"[batch, pos] = {list(prompt.shape)}; {remedy}"
        )
    own = model.image_mask(prompt)
    if (
        own is not None
        and origin.image_mask is not None
        and not torch.equal(own.cpu(), origin.image_mask.cpu())
    ):
        raise InvalidValueError(f"{hook}: visual positions of this prompt and of the source differ; {remedy}")


def _source_mask(
    origin: Origin, values: Float[Tensor, "batch pos ..."], source_positions: SourcePositions
) -> Bool[Tensor, "batch pos"]:
    if isinstance(source_positions, IfAny) and origin.prompt is None:
        source_positions = source_positions.positions
    if origin.prompt is not None:
        mask = positions_mask(origin.prompt, source_positions, "source_positions")
        assert mask is not None
        return mask.cpu()
    if not isinstance(source_positions, Tensor):
        raise InvalidValueError(
            "source_positions of activations without a prompt is a boolean mask [batch, pos] of the source, not "
            f"{source_positions!r}"
        )
    if source_positions.dtype != torch.bool or source_positions.shape != values.shape[:2]:
        raise InvalidValueError(
            f"source_positions is a boolean mask [batch, pos] = {list(values.shape[:2])} of the source, got "
            f"{source_positions.dtype} {list(source_positions.shape)}"
        )
    return source_positions.cpu()


def _matched(
    hook: str, here: Bool[Tensor, "batch pos"], there: Bool[Tensor, "source_batch source_pos"]
) -> Int[Tensor, "batch pos"]:
    """For each chosen position, the source's position of the same rank in its row; 0 for others."""
    counts = [mask.sum(1).tolist() for mask in (here, there)]
    if counts[0] != counts[1]:
        raise InvalidValueError(
            f"{hook}: positions and source_positions are matched in order, so each row needs as many of one as of the "
            f"other; they choose {counts[0]} and {counts[1]}"
        )
    index = torch.zeros(here.shape, dtype=torch.long)
    index[here] = there.nonzero()[:, 1]
    return index


def _check_heads(hook: str, n_heads: int, heads: Sequence[int] | None) -> None:
    axes = axes_of(hook)
    if heads is None:
        return
    if head_axis(hook) is None:
        raise InvalidValueError(f"{hook} is [{', '.join(axes)}]: it has no heads to choose")
    if min(heads) < 0 or max(heads) >= n_heads:
        kind = "key-value heads" if "kv_head" in axes else "heads"
        raise OutOfRangeError(f"heads {list(heads)} of {hook}: it has {n_heads} {kind}, 0 to {n_heads - 1}")


def _of_heads(x: Tensor, axis: int, heads: Sequence[int] | None) -> Tensor:
    return x if heads is None else x.index_select(axis, torch.tensor(heads, device=x.device))


def _of_positions(
    hook: str, values: Float[Tensor, "batch pos ..."], heads: Sequence[int] | None, packed: Tensor | None
) -> Change:
    _check_heads(hook, values.shape[2], heads)

    def change(x: Tensor, here: EditContext) -> Tensor:
        given = _of_heads(here.of_prompt(values, 0), 2, heads)
        if packed is not None:
            given = given[here.of_prompt(packed, False).to(given.device)]
        elif len(given) == 1:
            given = given.expand(len(x), *given.shape[1:])
        return _fitting(hook, given, x)

    return change


def _rows_of_queries(
    hook: str, values: Float[Tensor, "batch query head key"], heads: Sequence[int] | None
) -> Change:
    _check_heads(hook, values.shape[2], heads)
    length, n_keys = values.shape[1], values.shape[-1]

    def change(x: Tensor, here: EditContext) -> Tensor:
        first = here.span.first
        n_known = max(0, min(first + here.span.length, length) - first)
        if not n_known:
            return x
        given = here.of_rows(_of_heads(values[:, first : first + n_known], 2, heads).transpose(1, 2))
        # Generated keys, which an uncached run has too, are after every query of the prompt.
        block = (slice(None), slice(None), slice(n_known), slice(n_keys))
        patched = x.clone()
        if len(given) == 1:
            given = given.expand(len(x), *given.shape[1:])
        patched[block] = _fitting(hook, given, x[block])
        return patched

    return change


def _fitting(hook: str, given: Tensor, x: Tensor) -> Tensor:
    if given.shape != x.shape:
        raise InvalidValueError(
            f"{hook}: the source's activation {list(given.shape)} does not fit this run's {list(x.shape)}"
        )
    return given.to(x)


# ---------------------------------------------------------------------- beside the language model


def _check_equal_images(hook: str, prompt: Prompt, origin: Origin) -> None:
    """Towers lay out images in ways of their own; images that give the same tokens are laid out alike."""
    if origin.prompt is None:
        return
    layouts = [
        [
            [
                # An image without tokens (read by cross-attention) is laid out by its size.
                (grid.tile.tolist(), grid.row.tolist(), grid.column.tolist()) if len(grid) else grid.size
                for grid in own
            ]
            for own in each.token_map.grids
        ]
        for each in (prompt, origin.prompt)
    ]
    if layouts[0] != layouts[1]:
        raise InvalidValueError(
            f"{hook}: the images of this prompt and of the source are laid out differently; it is patched in whole, so "
            "each image needs one of the same layout in the source"
        )


def _whole(model: HookedVLM, hook: str, origin: Origin, heads: Sequence[int] | None) -> Change:
    """All positions of the activation; where the hook point fires once per image or window, call by call."""
    axis = head_axis(hook) or 0
    _check_heads(hook, origin.value.shape[axis], heads)
    values = _of_heads(origin.value, axis, heads)
    run, n_done = -1, 0

    def change(x: Tensor, here: EditContext) -> Tensor:
        nonlocal run, n_done
        here.check_run()
        given = values
        if origin.prompt is not None and x.ndim == values.ndim and len(x) < len(values):
            # A cache stacks the calls of one run on the first axis, each padded to the largest.
            now = model.run_state.n_forwards
            first = n_done % len(values) if run == now else 0
            run, n_done = now, first + len(x)
            given = values[first:n_done][(slice(None), *map(slice, x.shape[1:]))]
        # A copy: the model may write into what it is given.
        return _fitting(hook, given, x).clone()

    return change
