"""Lays hook points over a model's own modules, by its anatomy: which module's input or output fires which of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from torch import Tensor, nn

from mmlens.families.anatomy import Anatomy, AttentionParts, LayerParts, scale_of
from mmlens.families.record import Family
from mmlens.internals import Side
from mmlens.model.attention import AttentionTap, tap_attention, untap_attention
from mmlens.model.linear import is_linear
from mmlens.model.run_state import RunState
from mmlens.model.taps import (
    LazyHookPoint,
    ModuleTap,
    Step,
    between_layers,
    branch,
    forked_input,
    head_results,
    heads,
    image_rows,
    normalization,
    of_features,
    projected_heads,
    residual_mid,
    scaled,
    whole,
)
from mmlens.model.watch import Watch
from mmlens.model.weights import Block, is_norm

_INSIDE_ATTENTION = ("hook_rot_q", "hook_rot_k", "hook_attn_scores", "hook_pattern")


class Wiring:
    """The hook points of one model, by name in `points`, and the taps that fire them.

    `attention` has every attention module with its tap, `by_layer` the taps of the language layers alone.
    """

    def __init__(
        self, family: Family, anatomy: Anatomy, watch: Watch, run: RunState, *, marks_images: bool
    ) -> None:
        self.points: dict[str, LazyHookPoint] = {}
        self.taps: list[ModuleTap] = []
        self.attention: list[tuple[nn.Module, AttentionTap]] = []
        self.by_layer: dict[int, AttentionTap] = {}
        self._watch, self._run = watch, run
        self.marks_images = marks_images
        self.batch_first = family.stream.startswith("[batch, pos")
        self._lay(family, anatomy)

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that have a tap."""
        return [tap.module for tap in self.taps] + [module for module, _ in self.attention]

    def attach(self) -> None:
        """Route the attention modules through their taps; other taps come and go with the hooks on their points."""
        for module, tap in self.attention:
            tap_attention(module, tap)

    def detach(self) -> None:
        for module, tap in self.attention:
            untap_attention(module, tap)

    # ------------------------------------------------------------------ what layers are laid with

    def point(self, name: str) -> LazyHookPoint:
        point = LazyHookPoint(self._watch)
        point.name = name
        self.points[name] = point
        return point

    def tap(self, module: nn.Module, side: Side, steps: Sequence[Step], packs: bool = False) -> None:
        """`packs`: the module may be given one flat axis of positions."""
        self.taps.append(ModuleTap(module, side, steps, self._run.n_rows if packs else lambda: None))

    def image_rows(self, name: str, d_head: int | None = None) -> Step:
        return image_rows(self.point(name), self._run.image_rows_of, d_head)

    def norm(
        self, name: str, norm: nn.Module | None, fires: Callable[[Tensor], bool] = lambda x: True
    ) -> None:
        if norm is not None and is_norm(norm):
            step = normalization(self.point(f"{name}.hook_scale"), self.point(f"{name}.hook_normalized"))
            steps = [Step(step.hook_points, lambda x, *args: step.apply(x, *args) if fires(x) else x)]
            self.tap(norm, "output", steps, packs=name.startswith("blocks."))

    def attention_of(
        self,
        prefix: str,
        parts: AttentionParts,
        z: list[Step],
        scale: Callable[[], Tensor | float | None] = lambda: None,
        forks: Mapping[str, Step] = MappingProxyType({}),
    ) -> AttentionTap:
        """Projections, the inside and the output of one attention module."""
        for name, projection in parts.projections.items():
            step = projected_heads(self.point(f"{prefix}hook_{name}"), projection)
            self.tap(projection.module, "output", [forks[name], step] if name in forks else [step])
        tap = AttentionTap({name: self.point(prefix + name) for name in _INSIDE_ATTENTION})
        self.attention.append((parts.module, tap))
        self.tap(parts.out, "input", z)
        if is_linear(parts.out):
            step = head_results(self.point(f"{prefix}hook_result"), parts.d_value, scale)
            self.tap(parts.out, "output", [step])
        return tap

    # ------------------------------------------------------------------ the whole model

    def _lay(self, family: Family, anatomy: Anatomy) -> None:
        embed = [whole(self.point("hook_embed"))]
        if self.marks_images and self.batch_first:
            embed.append(self.image_rows("image.hook_embed"))
        first: dict[int, list[Step]] = {0: embed}
        last: dict[int, list[Step]] = {}
        for layer in anatomy.deep_after:
            point = self.point(f"blocks.{layer}.hook_deepstack")
            at_output, at_input = between_layers(point, self._run.image_rows_of)
            last[layer] = [at_output]
            if layer + 1 < len(anatomy.language):
                first[layer + 1] = [at_input]
            elif anatomy.final_norm is not None:
                self.tap(anatomy.final_norm, "input", [at_input])
        for index, parts in enumerate(anatomy.language):
            block = _LanguageLayer(self, f"blocks.{index}.", parts)
            block.lay(first.get(index, []), last.get(index, []))
            if block.attention_tap is not None:
                block.attention_tap.run_state = self._run
                self.by_layer[index] = block.attention_tap
        self.norm("ln_final", anatomy.final_norm)
        for prefix, layers in anatomy.stacks.items():
            for index, parts in enumerate(layers):
                embed = [whole(self.point(f"{prefix}hook_embed"))] if index == 0 else []
                _Layer(self, f"{prefix}blocks.{index}.", parts).lay(embed, [])
        pools = family.vision is not None and family.vision.norm_pools
        self.norm("vision.ln_post", anatomy.vision_norm, fires=lambda x: not pools or x.ndim > 2)
        if anatomy.projector is not None:
            self.tap(anatomy.projector, "input", [of_features(self.point("projector.hook_in"))])
            self.tap(anatomy.projector, "output", [of_features(self.point("projector.hook_out"))])
        for index, merger in enumerate(anatomy.mergers):
            self.tap(merger, "output", [whole(self.point(f"vision.deepstack.{index}.hook_out"))])


class _Layer:
    """One layer of a stack beside the language model, in the order in which its hook points fire."""

    packs = False
    """Whether its modules may be given one flat axis of positions."""

    def __init__(self, wiring: Wiring, prefix: str, parts: LayerParts) -> None:
        self.wiring, self.prefix, self.parts = wiring, prefix, parts
        self.attention_tap: AttentionTap | None = None

    def lay(self, first: list[Step], last: list[Step]) -> None:
        """`first` and `last` are steps at the layer's input and output, around its own."""
        self.tap(self.parts.module, "input", [*first, *self.seen("hook_resid_pre")])
        self.lay_attention()
        self.lay_mlp()
        self.tap(self.parts.module, "output", [*self.seen("hook_resid_post"), *last])

    def lay_attention(self) -> None:
        parts, point = self.parts, self.point
        forks = self.forks()
        if parts.norm1 is not None and parts.mixer is not None:
            attn_in = branch(point("hook_attn_in"))
            self.tap(parts.norm1, "input", [attn_in, *(at_norm for at_norm, _ in forks.values())])
        self.norm("ln1", parts.norm1)
        if parts.attention is not None:
            self.attention_tap = self.wiring.attention_of(
                f"{self.prefix}attn.",
                parts.attention,
                self.seen("hook_z", parts.attention.d_value),
                lambda: scale_of(parts.module, parts.attention_scale),
                {role: at_projection for role, (_, at_projection) in forks.items()},
            )
        self.norm("ln1_post", parts.post_norm1)
        if parts.attention_output is not None:
            self.tap(parts.attention_output, "output", self.added("hook_attn_out", parts.attention_scale))
        if parts.cross_attention is not None:
            z = [heads(point("cross_attn.hook_z"), parts.cross_attention.d_value)]
            self.wiring.attention_of(f"{self.prefix}cross_attn.", parts.cross_attention, z)

    def lay_mlp(self) -> None:
        parts = self.parts
        after = parts.norm2 or parts.mlp_in
        if parts.has_resid_mid and after is not None:
            mid = residual_mid(self.seen("hook_resid_mid"))
            self.tap(after, "input", [mid, branch(self.point("hook_mlp_in"))])
        self.norm("ln2", parts.norm2)
        self.lay_neurons()
        self.norm("ln2_post", parts.post_norm2)
        if parts.mlp_output is not None:
            self.tap(parts.mlp_output, "output", self.added("hook_mlp_out", parts.mlp_scale))

    def lay_neurons(self) -> None:
        """Hook points inside the MLP."""

    def forks(self) -> dict[str, tuple[Step, Step]]:
        """What each head's queries, keys and values read, where that is the stream after ln1."""
        return {}

    def point(self, name: str) -> LazyHookPoint:
        return self.wiring.point(self.prefix + name)

    def tap(self, module: nn.Module, side: Side, steps: Sequence[Step]) -> None:
        self.wiring.tap(module, side, steps, packs=self.packs)

    def norm(self, name: str, norm: nn.Module | None) -> None:
        self.wiring.norm(self.prefix + name, norm)

    def seen(self, name: str, d_head: int | None = None) -> list[Step]:
        """The tensor, where `d_head` is given by heads."""
        return [heads(self.point(f"attn.{name}"), d_head) if d_head else whole(self.point(name))]

    def added(self, name: str, scale: str | None) -> list[Step]:
        """What a branch adds to the stream: its last module's output, times the layer's factor."""
        steps = self.seen(name)
        return steps if scale is None else scaled(steps, lambda: scale_of(self.parts.module, scale))


class _LanguageLayer(_Layer):
    packs = True

    def seen(self, name: str, d_head: int | None = None) -> list[Step]:
        """The tensor, and its rows at image positions."""
        steps, wiring = super().seen(name, d_head), self.wiring
        if wiring.marks_images and ("resid" not in name or wiring.batch_first):
            steps.append(wiring.image_rows(f"{self.prefix}image.{name}", d_head))
        return steps

    def lay_neurons(self) -> None:
        mlp = Block(self.prefix, self.parts).mlp
        if mlp.is_plain:
            self.tap(mlp.out, "input", [whole(self.point("mlp.hook_post"))])

    def forks(self) -> dict[str, tuple[Step, Step]]:
        attention, norm = self.parts.attention, self.parts.norm1
        if attention is None or norm is None or not is_norm(norm):
            return {}
        return {
            role: forked_input(self.point(f"attn.hook_{role}_input"), projection, norm)
            for role, projection in attention.projections.items()
            if not projection.of_latent and (role == "q" or not attention.reads_image)
        }
